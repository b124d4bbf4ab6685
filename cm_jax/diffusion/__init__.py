"""The mathematics as pure functions: noise schedules and distributions, curricula, losses, ODE steps."""
