"""The runtime's tokenizer against transformers' CLIPTokenizer, on a small byte-level BPE."""

import json
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from toolchain.errors import BundleError, ModelError, RequestError
from toolchain.models.tokenizers import write_clip_tokenizer
from toolchain.runtime.prompt import ClipTokenizer

MAX_LENGTH = 16
WORDS = ("red", "circle", "left", "of", "a", "the")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def write_model_tokenizer(folder: Path, **config: Any) -> Path:
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    symbols = byte_symbols()
    tokens = dict.fromkeys([*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), BOS, EOS])
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *dict.fromkeys(map(" ".join, merges))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def from_vocab(folder: Path) -> Path:
    return write_model_tokenizer(folder)


def from_tokenizer_json(folder: Path) -> Path:
    CLIPTokenizer.from_pretrained(write_model_tokenizer(folder / "old")).save_pretrained(folder / "new")
    assert not (folder / "new" / "vocab.json").exists()
    return folder / "new"


def with_another_pad(folder: Path) -> Path:
    return write_model_tokenizer(folder, pad_token="!")


Pair = tuple[CLIPTokenizer, ClipTokenizer]


@pytest.fixture(scope="module", params=[from_vocab, from_tokenizer_json, with_another_pad], ids=lambda f: f.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = request.param(tmp_path_factory.mktemp("model") / "tokenizer")
    out = tmp_path_factory.mktemp("bundle") / "tokenizer"
    write_clip_tokenizer(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["settings.json", "tokenizer.json"]
    return CLIPTokenizer.from_pretrained(folder), ClipTokenizer(out)


PROMPTS = [
    "",
    " ",
    "a red circle",
    "A RED  Circle\n\tleft of the\u00a0circle",
    "xylophone, quite unknown!!",
    "it's the dog's 42nd",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m na\u00efve \u00df \u0130",
    "\u7d05\u3044\u5186 \u043a\u0440\u0443\u0433 \u062f\u0627\u0626\u0631\u0629",
    "emoji \U0001f469\u200d\U0001f680\ufe0f ok \x00 nul",
    "a <|endoftext|> b <|startoftext|>!",
    "</w> a</w> ! ! !",
    "a " * (MAX_LENGTH - 3),
    "a " * (MAX_LENGTH - 2),
    "a " * (MAX_LENGTH - 1) + "red",
    "the red circle left of the red circle " * 10,
    "unknown words, " * 10 + "and \u00fcml\u00e4uts at the end",
    string.printable * 3,
]


def cut_as_diffusers_shows_it(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The text of the warning in StableDiffusionPipeline.encode_prompt."""
    ids = tokenizer(prompt, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="np")
    whole = tokenizer(prompt, padding="longest", return_tensors="np").input_ids
    if whole.shape[-1] >= MAX_LENGTH and not np.array_equal(ids.input_ids, whole):
        return str(tokenizer.batch_decode(whole[:, MAX_LENGTH - 1 : -1])[0])
    return ""


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: ascii(p[:20]))
def test_equals_transformers(pair: Pair, prompt: str) -> None:
    theirs, ours = pair
    expected = theirs(prompt, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
    encoded = ours.encode(prompt)
    assert encoded.ids.dtype == np.int64
    assert encoded.ids.shape == (1, MAX_LENGTH)
    assert encoded.ids[0].tolist() == expected
    assert encoded.cut == cut_as_diffusers_shows_it(theirs, prompt)


def test_the_cut_begins_at_the_first_word_without_room(pair: Pair) -> None:
    assert pair[1].encode("a " * (MAX_LENGTH - 2)).cut == ""
    assert pair[1].encode("a " * (MAX_LENGTH - 2) + "red circle").cut == "red circle"


@pytest.mark.parametrize("prompt", [None, 3, b"a", ["a"], "\ud800"], ids=repr)
def test_refuses_what_is_no_text(pair: Pair, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        pair[1].encode(prompt)


def test_runtime_needs_no_transformers() -> None:
    modules = "toolchain.runtime.prompt, toolchain.runtime.noise, toolchain.weights"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_text(text)

    return act


def config(**values: Any) -> Callable[[Path], None]:
    return replace("tokenizer_config.json", json.dumps(values))


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("vocab.json"), "got: merges.txt"),
        (remove("merges.txt"), "got: vocab.json"),
        (remove_all, "got: none of them"),
        (replace("vocab.json", "{"), "cannot be read"),
        (replace("vocab.json", '{"a": 0}'), "cannot be read"),
        (replace("merges.txt", "#version: 0.2\na b c d\n"), "cannot be read"),
        (replace("tokenizer.json", "{}"), "cannot be read"),
        (replace("tokenizer.json", "{"), "cannot be read"),
        (config(), "how many tokens"),
        (config(model_max_length=2), "how many tokens"),
        (config(model_max_length=16, padding_side="left"), "padding_side"),
        (config(model_max_length=16, truncation_side="left"), "truncation_side"),
    ],
)
def test_build_refuses_damaged_tokenizers(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = write_model_tokenizer(tmp_path / "tokenizer")
    damage(folder)
    with pytest.raises(ModelError, match=says) as caught:
        write_clip_tokenizer(folder, tmp_path / "out")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


SETTINGS = {"max_length": 16, "bos": 1, "eos": 2, "pad": 2}


@pytest.mark.parametrize(
    "damage",
    [
        remove("tokenizer.json"),
        remove("settings.json"),
        replace("tokenizer.json", "{}"),
        replace("settings.json", "{"),
        replace("settings.json", "[]"),
        replace("settings.json", json.dumps(SETTINGS | {"max_length": 2})),
        replace("settings.json", json.dumps(SETTINGS | {"bos": "1"})),
        replace("settings.json", json.dumps(SETTINGS | {"bos": True})),
        replace("settings.json", json.dumps(SETTINGS | {"pad": -1})),
        replace("settings.json", json.dumps(SETTINGS | {"more": 1})),
        replace("settings.json", json.dumps({"max_length": 16})),
    ],
)
def test_runtime_refuses_damaged_bundles(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_clip_tokenizer(write_model_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    ClipTokenizer(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(BundleError, match="tokenizer"):
        ClipTokenizer(tmp_path / "out")
