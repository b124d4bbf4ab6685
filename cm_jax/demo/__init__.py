"""A page on this machine to draw and edit with: what it draws, and the page around it."""
