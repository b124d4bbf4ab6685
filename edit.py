"""Edit pictures: python edit.py KIND PICTURE ... [--variants ...] [--output ...]; --help lists the kinds."""

from cm_jax.cli import main_edit

if __name__ == "__main__":
    main_edit()
