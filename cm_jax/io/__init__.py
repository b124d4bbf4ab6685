"""Files: atomic writes, .npz archives, images, safetensors, JSON validation."""
