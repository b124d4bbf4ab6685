"""Model configurations and checkpoint files: native, single-file, published."""
