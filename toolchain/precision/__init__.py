"""Low precision: which weights of a graph are stored in fewer bits, and with which numbers. Pure, as `graph` is."""
