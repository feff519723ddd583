"""The Cast that torch means where it promotes types in silence: ONNX lets no operator mix them.

torch.cat of float16 and float32 gives float32. Its exporter writes the casts of most operators, but not of
torch.concat, torch.stack and a tensor's power (torch 2.13): there the output has the type that torch computed, and the
inputs have others.

1. An input that must have its operator's output type, and has another, is cast to it: Concat, or the base of a Pow.
2. An input that may have a type of its own is left alone: the condition of a Where, the exponent of a Pow.
3. Where the exporter left an output without a type, it is that of such inputs; where those differ, nothing is done.
4. Operators of other domains, and operators whose types agree, are left alone.
"""

from __future__ import annotations

from functools import cache

import onnx_ir as ir


def promote_types(model: ir.Model) -> ir.Model:
    """Inserts the missing Casts in place; returns the model."""
    opset = model.opset_imports[""]
    for node in list(model.graph):
        if node.domain or not node.outputs:
            continue
        output = node.outputs[0]
        inputs = {i: v for i, v in enumerate(node.inputs) if v is not None and _shares(node.op_type, opset, i)}
        types = {v.dtype for v in inputs.values() if v.dtype is not None}
        if output.dtype is None and len(types) == 1:
            output.dtype = types.pop()
        for index, value in inputs.items() if output.dtype is not None else ():
            if value.dtype not in (None, output.dtype):
                cast = ir.node("Cast", [value], {"to": output.dtype})
                cast.outputs[0].shape, cast.outputs[0].type = value.shape, output.type
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
    return model


@cache
def _shares(op_type: str, opset: int, index: int) -> bool:
    """Whether an input has the type of the first output, whichever that is."""
    import onnx

    schema = onnx.defs.get_schema(op_type, opset)
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    # What is not homogeneous are the states of a Loop and the like, each of a type of its own.
    return bool(formal.is_homogeneous and formal.type_str == schema.outputs[0].type_str)
