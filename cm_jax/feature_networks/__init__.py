"""Inception-V3 and VGG16/LPIPS, with their weight files."""
