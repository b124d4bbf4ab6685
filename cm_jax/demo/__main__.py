"""Web page for sampling and editing: python -m cm_jax.demo [CHECKPOINT ...] [--port ...]; options: --help."""

from cm_jax.cli import main_demo

if __name__ == "__main__":
    main_demo()
