"""Where the time of a picture goes, and how long others take for the same picture. See `run`."""
