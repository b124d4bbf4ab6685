"""Training: one pure step, run on one device or many, in a folder that survives."""
