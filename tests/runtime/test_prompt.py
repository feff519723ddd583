"""The runtime's tokenizer against transformers' CLIPTokenizer and T5Tokenizer, on small vocabularies."""

import json
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer, T5Tokenizer, TokenizersBackend

from tests.tiny_t5 import write_spiece, write_t5_tokenizer
from toolchain.errors import BundleError, ModelError, RequestError
from toolchain.models.tokenizers import write_tokenizer
from toolchain.runtime.prompt import PromptTokenizer

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


def t5(folder: Path) -> Path:
    return write_t5_tokenizer(folder)


def t5_with_both_files(folder: Path) -> Path:
    write_spiece(write_t5_tokenizer(folder) / "spiece.model")
    return folder


def t5_saved_again(folder: Path) -> Path:
    T5Tokenizer.from_pretrained(write_t5_tokenizer(folder / "old")).save_pretrained(folder / "new")
    return folder / "new"


def write(folder: Path, cls: str, out: Path, **options: bool) -> None:
    write_tokenizer(folder, cls, MAX_LENGTH, out, **{"t5": cls.startswith("T5"), "inversion": True} | options)


CLIP = (from_vocab, from_tokenizer_json, with_another_pad)
T5 = (t5, t5_with_both_files, t5_saved_again)
Tokenizer = CLIPTokenizer | T5Tokenizer
Pair = tuple[Tokenizer, PromptTokenizer]


@pytest.fixture(scope="module", params=[*CLIP, *T5], ids=lambda f: f.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = request.param(tmp_path_factory.mktemp("model") / "tokenizer")
    out = tmp_path_factory.mktemp("bundle") / "tokenizer"
    theirs = T5Tokenizer if request.param in T5 else CLIPTokenizer
    write(folder, theirs.__name__, out)
    assert sorted(path.name for path in out.iterdir()) == ["settings.json", "tokenizer.json"]
    return theirs.from_pretrained(folder), PromptTokenizer(out)


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
    "a</s> red <pad><unk> <extra_id_3>circle \u2581of \u2581\u2581 left",
    "\u3000a\u2003red\u200bcircle\u00ad \ufb01ne \u2460 \r\n\n",
    "a " * (MAX_LENGTH - 3),
    "a " * (MAX_LENGTH - 2),
    "a " * (MAX_LENGTH - 1) + "red",
    "the red circle left of the red circle " * 10,
    "unknown words, " * 10 + "and \u00fcml\u00e4uts at the end",
    string.printable * 3,
]


def cut_as_diffusers_shows_it(tokenizer: Tokenizer, prompt: str) -> str:
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
    room = MAX_LENGTH - (1 if pair[1].bos is None else 2)  # T5 has an end alone
    assert pair[1].encode("a " * room).cut == ""
    assert pair[1].encode("a " * room + "red circle").cut == "red circle"


@pytest.mark.parametrize("prompt", [None, 3, b"a", ["a"], "\ud800"], ids=repr)
def test_refuses_what_is_no_text(pair: Pair, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        pair[1].encode(prompt)


def test_runtime_needs_no_transformers() -> None:
    modules = "toolchain.runtime.prompt, toolchain.runtime.noise, toolchain.weights.mapped"
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
        (config(padding_side="left"), "padding_side"),
        (config(truncation_side="left"), "truncation_side"),
    ],
)
def test_build_refuses_damaged_tokenizers(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    refused(write_model_tokenizer(tmp_path / "tokenizer"), "CLIPTokenizer", damage, says)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_all, "expected: spiece.model, or tokenizer.json"),
        (replace("tokenizer.json", "{}"), "cannot be read"),
        (replace("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'), "cannot be read"),
        (config(padding_side="left"), "padding_side"),
        (config(truncation_side="left"), "truncation_side"),
    ],
)
def test_build_refuses_damaged_t5_tokenizers(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    refused(write_t5_tokenizer(tmp_path / "tokenizer"), "T5TokenizerFast", damage, says)


def refused(folder: Path, cls: str, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    out = folder.parent / "out"
    with pytest.raises(ModelError, match=says) as caught:
        write(folder, cls, out)
    assert str(folder) in str(caught.value)
    assert not out.exists()


def test_a_sentencepiece_model_alone_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spiece(tmp_path / "spiece.model")
    monkeypatch.setattr("toolchain.models.tokenizers.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install sentencepiece") as caught:
        write(tmp_path, "T5Tokenizer", tmp_path / "out")
    assert "save_pretrained" in str(caught.value)


def test_a_sentencepiece_model_alone_is_read_with_its_package(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="transformers reads spiece.model with sentencepiece alone")
    (tmp_path / "old").mkdir()
    write_spiece(tmp_path / "old" / "spiece.model")
    write_t5_tokenizer(tmp_path / "new")
    for name in ("old", "new"):
        write(tmp_path / name, "T5Tokenizer", tmp_path / f"{name}-out")
    old, new = (PromptTokenizer(tmp_path / f"{name}-out") for name in ("old", "new"))
    for prompt in PROMPTS:
        assert np.array_equal(old.encode(prompt).ids, new.encode(prompt).ids)


SETTINGS = {"max_length": 16, "bos": 1, "eos": 2, "pad": 2, "vectors": {}}


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
        replace("settings.json", json.dumps(SETTINGS | {"eos": None})),
        replace("settings.json", json.dumps(SETTINGS | {"more": 1})),
        replace("settings.json", json.dumps(SETTINGS | {"vectors": ["<s>"]})),
        replace("settings.json", json.dumps(SETTINGS | {"vectors": {"<s>": 1}})),
        replace("settings.json", json.dumps({"max_length": 16})),
    ],
)
def test_runtime_refuses_damaged_bundles(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write(write_model_tokenizer(tmp_path / "tokenizer"), "CLIPTokenizer", tmp_path / "out")
    PromptTokenizer(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(BundleError, match="tokenizer"):
        PromptTokenizer(tmp_path / "out")


def add_inversions(folder: Path, cls: type[Tokenizer]) -> Tokenizer:
    """As `load_textual_inversion` leaves a tokenizer: three vectors, two of a token in capitals, one, two in a word."""
    tokenizer = cls.from_pretrained(folder)
    tokenizer.add_tokens(["<s>", "<s>_1", "<s>_2", "<Big>", "<Big>_1", "<one>", "s", "s_1"])
    tokenizer.save_pretrained(folder)
    return tokenizer


INVERSIONS = [
    "a <s> of <s>, red",
    "<s>",
    "a<s>b <S> <Big> <big>",
    "<s>_1 and <s>_2, <one> left",
    "<s> <s>_1",
    "circles s",
    "<s> " * MAX_LENGTH,
    "the red circle",
]


@pytest.mark.parametrize("make", [from_vocab, t5], ids=lambda f: f.__name__)
def test_textual_inversions_of_several_vectors(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    cls = T5Tokenizer if make in T5 else CLIPTokenizer
    theirs = add_inversions(make(tmp_path / "tokenizer"), cls)
    write(tmp_path / "tokenizer", cls.__name__, tmp_path / "out")
    write(tmp_path / "tokenizer", cls.__name__, tmp_path / "plain", inversion=False)
    ours, plain = PromptTokenizer(tmp_path / "out"), PromptTokenizer(tmp_path / "plain")
    for prompt in INVERSIONS:
        converted = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, theirs)
        for text, tokenizer in ((converted, ours), (prompt, plain)):
            expected = theirs(text, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
            assert tokenizer.encode(prompt).ids[0].tolist() == expected, prompt
    third = theirs.convert_tokens_to_ids("<s>_2")
    assert third in ours.encode("a <s>").ids
    assert third not in plain.encode("a <s>").ids


def generic(folder: Path, made: Path) -> Path:
    """As transformers 5 saves a tokenizer that it knows no class of."""
    tokenizer = (T5Tokenizer if made.name == "t5" else CLIPTokenizer).from_pretrained(made)
    TokenizersBackend(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    ).save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    return folder


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_tokenizer_without_a_class_of_its_own(tmp_path: Path, name: str) -> None:
    made = write_model_tokenizer(tmp_path / name) if name == "clip" else write_t5_tokenizer(tmp_path / name)
    folder = generic(tmp_path / "generic", made)
    write(folder, "TokenizersBackend", tmp_path / "out", t5=name == "t5")
    theirs, ours = TokenizersBackend.from_pretrained(folder), PromptTokenizer(tmp_path / "out")
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
        assert ours.encode(prompt).ids[0].tolist() == expected


def test_a_tokenizer_without_a_class_must_end_prompts_as_its_text_encoder_expects(tmp_path: Path) -> None:
    folder = generic(tmp_path / "generic", write_model_tokenizer(tmp_path / "clip"))
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | {"post_processor": None}))
    with pytest.raises(ModelError, match="does not begin, end or pad prompts"):
        write(folder, "TokenizersBackend", tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"expected: tokenizer\.json"):
        write(folder, "TokenizersBackend", tmp_path / "out")
