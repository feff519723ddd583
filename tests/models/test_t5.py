"""T5 encoders: captured without weights in every precision, and equal to transformers' own in each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tests.tiny import recipe_for
from tests.tiny_t5 import write_t5_tokenizer
from toolchain.errors import DiffbuildError, ModelError, RecipeError
from toolchain.export.capture import capture
from toolchain.graph.placeholder import is_weight
from toolchain.models.checks import T5_WIDE, check_t5
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import t5_text_encoder
from toolchain.recipe import Bucket, Recipe
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.safetensors import read_folder

BUCKET = Bucket(1, 64, 64)
FOLDER = "text_encoder_2"
TOKENS = 24
COMPONENT = t5_text_encoder(FOLDER, context="context", tokens=TOKENS, optional=False)
WIDE = T5_WIDE
PRECISIONS = [("float32", ()), ("float16", (WIDE,)), ("bfloat16", ()), ("bfloat16", (WIDE,))]
TIED = ("shared.weight", "encoder.embed_tokens.weight")
IDS = torch.tensor([[5, 17, 3, 40, 41, 1, *[0] * (TOKENS - 6)]])


def make_t5(folder: Path, *, gated: bool = True) -> Path:
    """A model folder with nothing but an encoder of T5 1.1, or of the first T5, and its tokenizer."""
    torch.manual_seed(0)
    write_t5_tokenizer(folder / "tokenizer_2")
    config = T5Config(
        vocab_size=213,
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,  # both directions and the logarithmic half are in use at 24 tokens
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu" if gated else "relu",
        is_encoder_decoder=False,
    )
    text = T5EncoderModel(config)
    torch.nn.init.normal_(text.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    text.save_pretrained(folder / FOLDER)
    index = {FOLDER: ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"block_out_channels": [1]}')  # every model's sizes are read of it
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(make_t5(tmp_path_factory.mktemp("t5") / "model"), "t5", None)


def in_precision(dtype: str, kept: tuple[str, ...]) -> Recipe:
    recipe: Recipe = recipe_for(FOLDER, dtype=dtype, keep_float32=kept)
    return recipe


@pytest.fixture(scope="module")
def graphs(source: ModelSource) -> dict[Any, ir.Model]:
    return {case: capture(COMPONENT, source, in_precision(*case), BUCKET) for case in PRECISIONS}


def weights_of(graph: ir.Model, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    uses = weight_uses(graph)
    write_weights(uses, find_tensors(uses, read_folder(folder), folder), out)
    return load_file(out)


def run(graph: ir.Model, source: ModelSource, out: Path) -> torch.Tensor:
    """In ONNX Runtime, with the weights of the checkpoint."""
    graph = graph.clone()
    for name, tensor in weights_of(graph, source.path / FOLDER, out / "w.safetensors").items():
        graph.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"ids": IDS.numpy()})[0])


def of_transformers(source: ModelSource, dtype: torch.dtype) -> torch.Tensor:
    text = T5EncoderModel.from_pretrained(source.path / FOLDER, dtype=dtype).eval()
    with torch.no_grad():
        output: torch.Tensor = text(IDS)[0]
    return output.float()


@pytest.mark.parametrize("case", PRECISIONS, ids=str)
def test_every_weight_is_a_reference_in_its_precision(graphs: dict[Any, ir.Model], case: Any) -> None:
    dtype, kept = case
    found = {u.name: u.dtype for u in weight_uses(graphs[case])}
    assert len(found) == 1 + 1 + 3 * 9 + 1  # embedding, positions, three blocks, norm
    low = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert found == {name: "F32" if kept and name.endswith(".wo.weight") else low for name in found}


@pytest.mark.parametrize("case", PRECISIONS, ids=str)
def test_positions_are_constants(graphs: dict[Any, ir.Model], case: Any) -> None:
    graph = graphs[case].graph
    assert not {"Log", "Range", "Less", "Abs"} & {node.op_type for node in graph}
    inline = [v.const_value.numpy() for v in graph.initializers.values() if not is_weight(v)]  # type: ignore[union-attr]
    buckets = [a for a in inline if a.shape == (TOKENS, TOKENS)]
    assert len(buckets) == 1
    assert set(buckets[0].ravel()) == {*range(8), *range(9, 16)}  # the eighth is position 0 to the right: none


@pytest.mark.parametrize("case", PRECISIONS[:2], ids=str)
def test_the_graph_computes_what_transformers_does(
    graphs: dict[Any, ir.Model], source: ModelSource, tmp_path: Path, case: Any
) -> None:
    expected = of_transformers(source, getattr(torch, case[0]))
    got = run(graphs[case], source, tmp_path)
    tolerance = 1e-5 if case[0] == "float32" else 3e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_graph_in_bfloat16(graphs: dict[Any, ir.Model], source: ModelSource, tmp_path: Path) -> None:
    """With onnx's own evaluator, because ONNX Runtime has no bfloat16 on a CPU."""
    graph = graphs["bfloat16", ()].clone()
    original = load_file(source.path / FOLDER / "model.safetensors")
    for name, tensor in weights_of(graph, source.path / FOLDER, tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, original[name if name in original else TIED[0]].to(torch.bfloat16))
        bits = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        graph.graph.initializers[name].const_value = ir.tensor(bits, ir.DataType.BFLOAT16, name=name)
    got = torch.from_numpy(ReferenceEvaluator(ir.to_proto(graph)).run(None, {"ids": IDS.numpy()})[0])
    expected = of_transformers(source, torch.float32)
    assert 20 * torch.log10(expected.std() / (got - expected).std()) > 35


@pytest.mark.parametrize("case", PRECISIONS[:3], ids=str)
def test_the_module_is_transformers_own(source: ModelSource, case: Any) -> None:
    """To the last bit: transformers keeps the same modules in float32, and with them the sum over the blocks."""
    module = COMPONENT.module(source, in_precision(*case))
    text = T5EncoderModel.from_pretrained(source.path / FOLDER, dtype=getattr(torch, case[0]))
    module.text.load_state_dict(text.state_dict())  # type: ignore[union-attr, operator]
    with torch.no_grad():
        assert torch.equal(module(IDS), of_transformers(source, getattr(torch, case[0])))


def test_the_first_t5_without_gates(tmp_path: Path) -> None:
    source = ModelSource(make_t5(tmp_path / "model", gated=False), "t5", None)
    graph = capture(COMPONENT, source, in_precision("float32", ()), BUCKET)
    expected = of_transformers(source, torch.float32)
    torch.testing.assert_close(run(graph, source, tmp_path), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_checkpoint_in_float32(source: ModelSource) -> None:
    with torch.no_grad():
        assert torch.equal(
            COMPONENT.reference(source, in_precision("bfloat16", ()))(IDS), of_transformers(source, torch.float32)
        )


@pytest.mark.parametrize(
    "kept", [(WIDE,), ("encoder.block.*",), ("encoder.block.*.layer.1",), ("*",), (WIDE, "encoder.block.1")]
)
def test_sums_beyond_float16_stay_finite(source: ModelSource, kept: tuple[str, ...]) -> None:
    """T5-XXL's blocks add up to more than the 65504 of float16; the last norm brings that back."""
    module = COMPONENT.module(source, in_precision("float16", kept))
    reference = COMPONENT.reference(source, in_precision("float32", ()))
    for name, parameter in reference.requires_grad_(False).named_parameters():
        if name.endswith(".wo.weight"):
            parameter.mul_(60_000)
    module.load_state_dict(reference.state_dict())
    peaks = []
    reference.text.encoder.block[1].register_forward_hook(lambda *a: peaks.append(float(a[2][0].abs().max())))  # type: ignore[union-attr, index, operator]
    with torch.no_grad():
        expected, got = reference(IDS), module(IDS)
    assert peaks[0] > 65504
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("names", [TIED[:1], TIED[1:], TIED], ids=str)
def test_the_embedding_is_found_under_both_its_names(
    graphs: dict[Any, ir.Model], source: ModelSource, tmp_path: Path, names: tuple[str, ...]
) -> None:
    tensors = load_file(source.path / FOLDER / "model.safetensors")
    (held,) = tensors.keys() & set(TIED)
    embedding = tensors.pop(held)
    save_file(tensors | {name: embedding.clone() for name in names}, tmp_path / "model.safetensors")
    written = weights_of(graphs[PRECISIONS[0]], tmp_path, tmp_path / "w.out")
    (name,) = written.keys() & set(TIED)
    assert torch.equal(written[name], embedding)


def test_its_length_is_the_recipes(source: ModelSource) -> None:
    for tokens, expected in ((0, TOKENS), (77, 77)):
        spec = COMPONENT.spec(source, BUCKET, recipe_for(FOLDER, tokens=tokens))
        assert spec.input("ids").shape == (1, expected)
        assert spec.outputs[0].shape == (1, expected, 48)


def check(source: ModelSource, recipe: Recipe) -> None:
    check_t5(source, FOLDER, FOLDER, recipe, 512)


GOOD: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "tokens": 512},
    *({"dtype": "float16", "keep_float32": (kept,)} for kept in (WIDE, "*", "encoder", "encoder.block.*", "*.wo")),
]


@pytest.mark.parametrize("own", GOOD, ids=str)
def test_recipes_that_t5_can_follow(source: ModelSource, own: dict[str, Any]) -> None:
    check(source, recipe_for(FOLDER, **own))


BAD: list[tuple[dict[str, Any], dict[str, Any], type[DiffbuildError], tuple[str, ...]]] = [
    ({"d_model": 0}, {}, ModelError, ("d_model is not a size", "got: 0")),
    ({"num_layers": "3"}, {}, ModelError, ("num_layers is not a size", "'3'")),
    (
        {},
        {"tokens": 513},
        RecipeError,
        ("not take prompts of this length", "at most 512", "got: 513", f"{FOLDER}.tokens"),
    ),
    ({}, {"dtype": "float16"}, RecipeError, ("T5 overflows in float16", WIDE, "bfloat16", f"components.{FOLDER}")),
    (
        {},
        {"dtype": "float16", "keep_float32": ("encoder.block.0.*", "encoder.final_layer_norm")},
        RecipeError,
        ("T5 overflows in float16", "encoder.final_layer_norm"),
    ),
]


@pytest.mark.parametrize(("config", "own", "error", "says"), BAD, ids=str)
def test_what_t5_cannot_be(
    source: ModelSource,
    tmp_path: Path,
    config: dict[str, Any],
    own: dict[str, Any],
    error: type[DiffbuildError],
    says: tuple[str, ...],
) -> None:
    model = copy_of(source, tmp_path, "config.json")
    path = model.path / FOLDER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(error) as caught:
        check(model, recipe_for(FOLDER, **own))
    assert all(words in str(caught.value) for words in says)


def test_a_tokenizer_is_asked_for_where_there_are_weights(source: ModelSource, tmp_path: Path) -> None:
    model = copy_of(source, tmp_path, "config.json", "model.safetensors")
    with pytest.raises(ModelError, match="the tokenizer is incomplete") as caught:
        check(model, recipe_for())
    assert "tokenizer_2" in str(caught.value)


def copy_of(source: ModelSource, folder: Path, *files: str) -> ModelSource:
    for place in ("model_index.json", "vae/config.json", *(f"{FOLDER}/{file}" for file in files)):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes((source.path / place).read_bytes())
    return replace(source, path=folder)
