"""The files in the folder of an engine of TensorRT, beside `engine.json`, and the version of their format."""

FORMAT = 1
PLAN = "engine.plan"
GRAPH = "graph.onnx"
"""Of a stripped plan: the graph that it was built from, through which it is filled with its weights."""
