"""Web page for sampling and editing: the images it shows (rendering.py), and the page (page.py)."""
