"""Files: atomic writes, .npz archives, images, JSON validation."""
