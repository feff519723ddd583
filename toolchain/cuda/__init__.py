"""What every backend on a GPU runs on: driver calls, memory behind one stream, captured graphs, the loop."""
