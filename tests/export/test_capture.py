"""The weightless graph computes what the torch module computes, and its weight file is the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.onnx._internal.exporter._registration import ONNXRegistry

import toolchain.weights.derived as weights_module
from tests.tiny import recipe_for
from toolchain import api
from toolchain.errors import ExportError, ModelError, WeightsError
from toolchain.export.capture import TRANSLATIONS, capture, check_signature
from toolchain.graph import OPSET
from toolchain.graph.placeholder import is_weight
from toolchain.models.component import Component
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Bucket
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import MappedWeights
from toolchain.weights.safetensors import read_folder

BUCKET = Bucket(1, 64, 64)
COMPONENTS = [c.name for c in MODELS["sd"].components]


def component(name: str) -> Component:
    return MODELS["sd"].component(name)


@pytest.fixture(scope="module")
def graphs(tiny_model: Path) -> dict[str, ir.Model]:
    source = resolve_model(str(tiny_model))
    return {name: capture(component(name), source, recipe_for(), BUCKET) for name in COMPONENTS}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_weight_is_a_reference_and_in_the_checkpoint(
    graphs: dict[str, ir.Model], tiny_model: Path, name: str
) -> None:
    checkpoint = read_folder(tiny_model / component(name).folder)
    weights = [n for n, v in graphs[name].graph.initializers.items() if is_weight(v)]
    assert weights
    assert set(weights) <= set(checkpoint)
    inline = sum(v.const_value.nbytes for v in graphs[name].graph.initializers.values() if not is_weight(v))  # type: ignore[union-attr]
    assert inline < 32_768


def test_the_whole_unet_is_used(graphs: dict[str, ir.Model], tiny_model: Path) -> None:
    weights = {n for n, v in graphs["denoiser"].graph.initializers.items() if is_weight(v)}
    assert weights == set(read_folder(tiny_model / "unet"))


def test_the_exporters_table_is_read_once_and_left_as_it_was(graphs: dict[str, ir.Model]) -> None:
    assert TRANSLATIONS.cache_info().misses == 1
    assert isinstance(ONNXRegistry.__dict__["from_torchlib"], classmethod)
    assert TRANSLATIONS(OPSET).functions.keys() == ONNXRegistry.from_torchlib(OPSET).functions.keys()


def test_a_graph_with_another_signature_is_refused(graphs: dict[str, ir.Model]) -> None:
    wrong = GraphSpec((TensorSpec("latents", "float32", (1, 4, 9, 8)),), ())
    with pytest.raises(ExportError, match="does not have the component's inputs"):
        check_signature(graphs["vae_decoder"], wrong, "vae_decoder")


def test_a_graph_of_another_opset_is_refused(graphs: dict[str, ir.Model]) -> None:
    graph, spec = graphs["vae_decoder"].clone(), GraphSpec((), ())
    graph.graph.inputs.clear()
    graph.graph.outputs.clear()
    check_signature(graph, spec, "vae_decoder")
    graph.graph.opset_imports[""] = 18
    with pytest.raises(ExportError, match="another opset"):
        check_signature(graph, spec, "vae_decoder")


BAD_CONFIGS = [
    ("unet", {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}),
    ("unet", {"norm_num_groups": 7}),
    ("unet", {"layers_per_block": "two"}),
    ("vae", {"scaling_factor": "large"}),
    ("text_encoder", {"hidden_act": "no-such-activation"}),
    ("text_encoder", {"num_attention_heads": 5}),
]


@pytest.mark.parametrize(("folder", "changes"), BAD_CONFIGS)
def test_a_config_of_which_no_module_can_be_made(tiny_copy: Path, folder: str, changes: dict[str, Any]) -> None:
    path = tiny_copy / folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    wrong = next(c for c in MODELS["sd"].components if c.folder == folder)
    with pytest.raises(ModelError, match="cannot be constructed from its config") as error:
        capture(wrong, resolve_model(str(tiny_copy)), recipe_for(), BUCKET)
    assert error.value.where == path


@pytest.mark.parametrize("fault", [AssertionError(), KeyError("conv"), ValueError("first\nsecond"), TypeError("no")])
def test_a_module_that_fails_while_it_is_traced(tiny_model: Path, fault: Exception) -> None:
    class Broken(torch.nn.Module):
        def forward(self, **_: torch.Tensor) -> torch.Tensor:
            raise fault

    broken = replace(component("vae_decoder"), module=lambda *_: Broken())
    with pytest.raises(ExportError, match="cannot be exported"):
        capture(broken, resolve_model(str(tiny_model)), recipe_for(), BUCKET)


def test_a_damaged_weight_file_is_found_before_the_graphs_are_built(
    tiny_copy: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    started: list[str] = []
    with pytest.raises(WeightsError):
        api.export_graphs(
            tiny_recipe,
            str(tiny_copy),
            tmp_path / "out",
            store=tmp_path / "store",
            progress=lambda step, _: started.append(step.name),
        )
    assert started == []


def test_a_checkpoint_is_opened_once(
    graphs: dict[str, ir.Model], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class Counted(MappedWeights):
        def __init__(self, *files: Path) -> None:
            opened.extend(files)
            super().__init__(*files)

    monkeypatch.setattr(weights_module, "MappedWeights", Counted)
    weights_of(graphs["vae_decoder"], tiny_model / "vae", tmp_path / "w.safetensors")
    assert opened == [tiny_model / "vae" / "diffusion_pytorch_model.safetensors"]


def weights_of(graph: ir.Model, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    uses = weight_uses(graph)
    write_weights(uses, find_tensors(uses, read_folder(folder), folder), out)
    return load_file(out)


def test_weights_are_converted_and_transposed(graphs: dict[str, ir.Model], tiny_model: Path, tmp_path: Path) -> None:
    from toolchain.graph.transpose import SUFFIX, transpose_weights

    written = weights_of(transpose_weights(graphs["denoiser"]), tiny_model / "unet", tmp_path / "w.safetensors")
    original = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    turned = [name for name in written if name.endswith(SUFFIX)]
    assert len(turned) > 10
    for name, tensor in written.items():
        source = original[name.removesuffix(SUFFIX)]
        assert torch.equal(tensor, source.T if name.endswith(SUFFIX) else source)


def test_float16_weights_are_rounded_once(tiny_model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_model))
    recipe = recipe_for("denoiser", dtype="float16", keep_float32=("time_embedding", "conv_out"))
    graph = capture(component("denoiser"), source, recipe, BUCKET)
    written = weights_of(graph, tiny_model / "unet", tmp_path / "w.safetensors")
    original = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in written.items():
        kept = name.startswith(("time_embedding.", "conv_out."))
        assert tensor.dtype == (torch.float32 if kept else torch.float16), name
        assert torch.equal(tensor, original[name].to(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_widened_as_diffusers_does(
    graphs: dict[str, ir.Model], tiny_copy: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from diffusers import UNet2DConditionModel

    change(tiny_copy / "unet", lambda t: t.update({k: v.to(dtype) for k, v in t.items() if k.endswith(".weight")}))
    written = weights_of(graphs["denoiser"], tiny_copy / "unet", tmp_path / "w.safetensors")
    theirs = UNet2DConditionModel.from_pretrained(tiny_copy / "unet", dtype=torch.float32).state_dict()
    assert len(written) == len(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in written.items())


def change(folder: Path, edit: Any) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_older_names_of_attention_weights_are_found(
    graphs: dict[str, ir.Model], tiny_copy: Path, tmp_path: Path
) -> None:
    """SD 1.x VAEs name them query, key, value and proj_attn, some as 1x1 convolutions."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    plain = load_file(tiny_copy / "vae" / "diffusion_pytorch_model.safetensors")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            for new, old in older.items():
                if f".{new}." in name:
                    tensor = tensors.pop(name)
                    tensors[name.replace(f".{new}.", f".{old}.")] = (
                        tensor[..., None, None] if tensor.ndim == 2 else tensor
                    )

    change(tiny_copy / "vae", rename)
    written = weights_of(graphs["vae_decoder"], tiny_copy / "vae", tmp_path / "w.safetensors")
    assert any(".to_q." in name for name in written)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in written.items())


def test_text_encoders_with_and_without_the_older_prefix(
    graphs: dict[str, ir.Model], tiny_copy: Path, tmp_path: Path
) -> None:
    path = tiny_copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    renamed = {
        k.removeprefix("text_model.") if k.startswith("text_model.") else f"text_model.{k}": v
        for k, v in tensors.items()
    }
    save_file({**renamed, "text_model.embeddings.position_ids": torch.arange(24)[None]}, path)
    assert weights_of(graphs["text_encoder"], tiny_copy / "text_encoder", tmp_path / "w.safetensors")


BAD_CHECKPOINTS = [
    (lambda t: t.pop("conv_in.weight"), ["conv_in.weight: missing", "the nearest is conv_"]),
    (lambda t: t.update({"conv_in.weight": torch.zeros(3, 3)}), ["conv_in.weight: expected shape", "got [3, 3]"]),
    (lambda t: t.update({"conv_in.bias": torch.zeros(32, dtype=torch.int64)}), ["conv_in.bias", "I64"]),
]


@pytest.mark.parametrize(("edit", "messages"), BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(
    graphs: dict[str, ir.Model], tiny_copy: Path, tmp_path: Path, edit: Any, messages: list[str]
) -> None:
    change(tiny_copy / "unet", edit)
    with pytest.raises(WeightsError) as error:
        weights_of(graphs["denoiser"], tiny_copy / "unet", tmp_path / "w.safetensors")
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(
    graphs: dict[str, ir.Model], tiny_copy: Path, tmp_path: Path, value: float
) -> None:
    change(tiny_copy / "unet", lambda t: t["conv_in.weight"].fill_(value))
    with pytest.raises(WeightsError, match="infinite or NaN in the checkpoint"):
        weights_of(graphs["denoiser"], tiny_copy / "unet", tmp_path / "w.safetensors")


def test_values_beyond_float16_are_named(tiny_copy: Path, tmp_path: Path) -> None:
    change(tiny_copy / "unet", lambda t: t["conv_in.weight"].fill_(1e6))
    graph = capture(
        component("denoiser"), resolve_model(str(tiny_copy)), recipe_for("denoiser", dtype="float16"), BUCKET
    )
    with pytest.raises(WeightsError, match="beyond the range of F16") as error:
        weights_of(graph, tiny_copy / "unet", tmp_path / "w.safetensors")
    assert "keep_float32" in str(error.value)


def test_exporting_twice_gives_the_same_bytes(graphs: dict[str, ir.Model], tiny_model: Path, tmp_path: Path) -> None:
    again = capture(component("vae_decoder"), resolve_model(str(tiny_model)), recipe_for(), BUCKET)
    for name, graph in (("a", graphs["vae_decoder"]), ("b", again)):
        ir.save(graph, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
