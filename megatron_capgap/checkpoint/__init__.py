"""Checkpoints: saved and loaded in any layout, published atomically, verified on load."""
