"""Evaluate samples or a checkpoint: python -m cm_jax.evaluation SAMPLES_OR_CHECKPOINT REFERENCE [--metrics ...]."""

from cm_jax.cli import main_evaluate

if __name__ == "__main__":
    main_evaluate()
