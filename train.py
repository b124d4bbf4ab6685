"""Train a model: python train.py PRESET [--run FOLDER] [--field value ...]; --help lists the presets."""

from cm_jax.cli import main_train

if __name__ == "__main__":
    main_train()
