"""What is compiled: model families, and where models come from. `registry` lists the families."""
