"""Training: a pure step, on one device or many, and runs that survive interruption."""
