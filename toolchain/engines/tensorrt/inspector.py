"""The layers of a TensorRT engine, as its inspector reports them.

The inspector's JSON has two layouts: of a layer's tensors, TensorRT 10 writes "Format/Datatype", 11 writes "Format" and
"Datatype" apart. The builder's log tells the same in a notation of its own, one line for each layer:

    Name: n, LayerType: t, Inputs: [ { Name: x, Datatype: Half, ... }], Outputs: [...], ..., Metadata: m
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from toolchain.engines.layers import Layer, dtype_in

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*?)(?:, Metadata: (?P<metadata>.*))?$")
DATATYPE = re.compile(r"Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PROFILE = re.compile(r" \[profile \d+\]$")
"""What the names of an engine with several optimization profiles end in."""


def read_layers(information: Mapping[str, Any]) -> list[Layer]:
    """The layers of an inspector's document; one without detail is a bare name."""
    layers = []
    for entry in information.get("Layers", []):
        if isinstance(entry, Mapping):
            tensors = [t for side in ("Inputs", "Outputs") for t in entry.get(side) or [] if isinstance(t, Mapping)]
            words = [str(t[k]) for t in tensors for k in ("Format/Datatype", "Datatype", "DataType") if k in t]
            weights = entry.get("Weights")
            words += [str(weights.get("Type"))] if isinstance(weights, Mapping) else []
            dtypes = frozenset(d for d in map(dtype_in, words) if d)
            layers.append(Layer(str(entry.get("Name")), str(entry.get("LayerType")), dtypes, _nodes(entry)))
        else:
            layers.append(Layer(str(entry), "", frozenset(), ()))
    return layers


def read_log(text: str) -> list[Layer]:
    """The layers of the builder's log; lines that describe none are passed over."""
    layers = []
    for match in filter(None, map(LAYER.match, text.splitlines())):
        dtypes = frozenset(d for d in map(dtype_in, DATATYPE.findall(match["rest"])) if d)
        nodes = _nodes({"Name": match["name"], "Metadata": match["metadata"]})
        layers.append(Layer(match["name"], match["kind"], dtypes, nodes))
    return layers


def _nodes(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """A layer's nodes: from its metadata, or else from its name, which joins theirs with " + "."""
    named = NODE.findall(str(entry.get("Metadata") or ""))
    return tuple(named or PROFILE.sub("", str(entry.get("Name"))).split(" + "))
