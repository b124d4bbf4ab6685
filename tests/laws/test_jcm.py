"""Checkpoints of openai/consistency_models_cifar10: every leaf named, used once, and nothing guessed."""
