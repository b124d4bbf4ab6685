"""Convert checkpoints: python -m convert SOURCE DESTINATION [--to ...] [--check]; see --help."""

from cm_jax.cli import main_convert

if __name__ == "__main__":
    main_convert()
