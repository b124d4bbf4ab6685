"""Sample images: python sample.py [CHECKPOINT] [--labels ...] [--steps ...] [--output ...]; see --help."""

from cm_jax.cli import main_sample

if __name__ == "__main__":
    main_sample()
