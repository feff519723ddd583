"""ONNX passes, graph -> graph: none knows a model, reads a recipe or touches the disk.

Weights are `onnx_ir.ExternalTensor`s that point nowhere: a pass moves and renames them, and never reads their values.
"""

OPSET = 20
IR_VERSION = 10
