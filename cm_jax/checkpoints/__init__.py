"""Model configurations and checkpoints: native folders and files, published names."""
