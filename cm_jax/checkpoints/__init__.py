"""Model configurations and checkpoints: native folders, single files, published names."""
