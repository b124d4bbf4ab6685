"""Files that ship with the package: see NOTICE.md."""
