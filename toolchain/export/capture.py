"""Weightless export: a component's graph is captured from its config, without reading or allocating its weights.

The module is built under fake tensors, which have shapes but no memory, traced by `torch.export`, and written as ONNX.
Every tensor of the module's state dict, parameter or persistent buffer, becomes an initializer that carries the
checkpoint's own tensor name and no bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
import torch.fx.config as fx_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.onnx._internal.exporter._registration import ONNXRegistry

from toolchain.errors import DiffbuildError, ExportError, ModelError, first_line
from toolchain.garbage import gc_paused
from toolchain.graph import IR_VERSION, OPSET
from toolchain.graph.liveness import facts
from toolchain.graph.opset import allow_bfloat16
from toolchain.graph.placeholder import placeholder, static_shape
from toolchain.graph.round_trips import drop_round_trips
from toolchain.graph.simplify import simplify
from toolchain.graph.typed import check_types
from toolchain.models.component import Component
from toolchain.recipe import Bucket, Recipe
from toolchain.signature import GraphSpec
from toolchain.store.facts import GRAPH_FACTS

if TYPE_CHECKING:
    from torch import nn

    from toolchain.models.source import ModelSource


# A model that its config describes wrongly fails while it is traced, with whatever the first line to notice raises.
EXPORT_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch.onnx.errors.OnnxExporterError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
)

TRANSLATIONS = functools.cache(ONNXRegistry.from_torchlib)
"""Opset -> the exporter's table of operators. It reads that from its own source for each graph (torch 2.13): 0.5 s."""


def capture(component: Component, source: ModelSource, recipe: Recipe, bucket: Bucket) -> ir.Model:
    """The component's graph for one bucket, simplified, with its weights as placeholders named as in the checkpoint.

    Raises ModelError for a config that no module can be built from, ExportError where the exporter fails or the graph
    does not have the component's signature or breaks ONNX's rules of types and shapes.
    """
    # An export makes millions of objects and little garbage: looking for it takes 10 % of the time.
    with _quiet(), gc_paused():
        model = _exported(component, source, recipe, bucket)
        model = simplify(model)
        if recipe.component(component.name).keep_float32:
            model = drop_round_trips(model)
        model.ir_version = IR_VERSION
        model.graph.name = component.name
        check_signature(model, component.spec(source, bucket, recipe), component.name)
        check_types(allow_bfloat16(model))  # as a backend for bfloat16 will have it
    return model


def _exported(component: Component, source: ModelSource, recipe: Recipe, bucket: Bucket) -> ir.Model:
    """As the exporter writes it, but for its weights, which are placeholders. Raises as `capture`."""
    spec = component.spec(source, bucket, recipe)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _translations_read_once(), _without_stack_traces(), fake, torch.no_grad():
            module = make_module(component, source, recipe)
            inputs = {t.name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs}
            program = torch.export.export(module, (), inputs, strict=False)
            exported = torch.onnx.export(
                program,
                (),
                kwargs=inputs,
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            # A tied parameter is in the state dict under each of its names, and the exporter takes one of them.
            weights = set(module.state_dict(keep_vars=True))
    except EXPORT_ERRORS as error:
        raise ExportError(
            f"the {component.name} cannot be exported",
            where=f"{component.name} {bucket}",
            got=first_line(error),
            hint="set DIFFBUILD_LOG=debug for the exporter's own report",
        ) from error
    assert exported is not None
    _detach_weights(exported.model, weights, component.prefix)
    return exported.model


def write_graph(model: ir.Model, folder: Path) -> None:
    """The graph as `graph.onnx` and, for the forecast of memory, what it will hold."""
    ir.save(model, folder / "graph.onnx")
    (folder / GRAPH_FACTS).write_text(json.dumps(facts(model), indent=1) + "\n")


def make_module(component: Component, source: ModelSource, recipe: Recipe) -> nn.Module:
    """The wrapper to export, built from its config. ModelError for a config that no module can be made from."""
    try:
        return component.module(source, recipe)
    except DiffbuildError:
        raise
    except Exception as error:  # the libraries raise anything for a config that they cannot make a module of
        raise ModelError(
            f"the {component.name} cannot be constructed from its config",
            where=source.path / component.folder / "config.json",
            got=first_line(error),
            hint="download the folder again",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's chatter hides our own messages; errors still come as exceptions."""
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch.onnx",
            "torch.export",
            "onnxscript",
            "onnx_ir",
            "onnxscript.optimizer._constant_folding",
            "onnx_ir.tensor_adapters",
        )
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _translations_read_once() -> Iterator[None]:
    plain = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(TRANSLATIONS)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """The line of Python behind each node, which `simplify` drops again: 5 % of the time."""
    before = fx_config.do_not_emit_stack_traces
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def _detach_weights(model: ir.Model, weights: set[str], prefix: str) -> None:
    """Renames every weight to the checkpoint's name and drops its bytes; constants keep their values.

    ExportError for a buffer that is not in the checkpoint: built under fake tensors it has no values.
    """
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if name not in weights:
            if isinstance(tensor.raw, FakeTensor):
                raise ExportError(
                    "a buffer has no values, because it is neither in the checkpoint nor computed in forward()",
                    where=name,
                    hint="give the module its values as an input, as the wrapper of CLIP does with its positions",
                )
            continue
        key = name.removeprefix(prefix)
        value.const_value = placeholder(key, tensor.dtype, static_shape(tensor))
        value.name = key


def check_signature(model: ir.Model, spec: GraphSpec, stage: str) -> None:
    """Raises ExportError unless names, dtypes, shapes, order and opset are the contract's."""
    for side, values, tensors in (
        ("input", model.graph.inputs, spec.inputs),
        ("output", model.graph.outputs, spec.outputs),
    ):
        got = [_describe(v) for v in values]
        expected = [f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors]
        if got != expected:
            raise ExportError(
                f"the graph of {stage} does not have the component's {side}s", where=stage, expected=expected, got=got
            )
    opset = model.graph.opset_imports.get("")
    if opset != OPSET:
        raise ExportError(
            "the graph has another opset than the exporter was asked for", where=stage, expected=OPSET, got=opset
        )


def _describe(value: ir.Value) -> str:
    dtype = str(value.dtype.numpy()) if value.dtype is not None else "?"
    shape = [d if isinstance(d, int) else str(d) for d in value.shape] if value.shape is not None else "?"
    return f"{value.name} {dtype} {shape}"
