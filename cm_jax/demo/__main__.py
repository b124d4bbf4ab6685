"""A page in the browser: python -m cm_jax.demo [CHECKPOINT ...] [--port ...]; --help tells the rest."""

from cm_jax.cli import main_demo

if __name__ == "__main__":
    main_demo()
