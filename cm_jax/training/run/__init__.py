"""Everything that a run keeps in its folder or does between training steps."""
