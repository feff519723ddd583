"""Artifacts on disk: found by content, published atomically, verified; and the files of the user's cache."""
