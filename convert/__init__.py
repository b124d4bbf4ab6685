"""`python -m convert`: the command for cm_jax.conversion, from a checkout of the repository."""
