"""Draw images: python sample.py [CHECKPOINT] [--labels ...] [--steps ...] [--output ...]; --help tells the rest."""

from cm_jax.cli import main_sample

if __name__ == "__main__":
    main_sample()
