"""The command line: parse, one call into the interface, print."""
