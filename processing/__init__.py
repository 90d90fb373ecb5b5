"""Frames and text in. These files travel to the Hub, flattened into one folder."""
