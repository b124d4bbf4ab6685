"""What a training run keeps in its folder, and what it does beside the training step."""
