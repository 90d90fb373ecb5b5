"""Checkpoints in and out of this package's layout."""
