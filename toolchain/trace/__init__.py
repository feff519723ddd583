"""Where the time of one generation goes, on a timeline. See `record`."""
