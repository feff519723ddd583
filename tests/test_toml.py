"""What writes TOML, against Python's reader."""

from __future__ import annotations

import tomllib

from toolchain.recipe.toml import Noted, toml

DATA = {"family": "sd", "buckets": ["1x64x64"], "check": {"prompts": ["a " * 80, "b"], "seeds": [0, 1]}}


def test_what_is_written_is_read_again() -> None:
    assert tomllib.loads(toml(DATA)) == DATA


def test_comments_stand_behind_values_and_entries() -> None:
    exclude = [Noted("down.0", "0.3 of\nthe error"), "up.*"]
    text = toml({"quantize": {"weights": "int8", "scales": Noted("mse", "1.2 dB better"), "exclude": exclude}})
    expected = '[quantize]\nweights = "int8"\nscales = "mse"  # 1.2 dB better\nexclude = [\n'
    assert text == f'{expected}  "down.0",  # 0.3 of the error\n  "up.*",\n]'
    assert tomllib.loads(text)["quantize"]["exclude"] == ["down.0", "up.*"]


def test_a_list_with_a_comment_of_its_own() -> None:
    text = toml({"keep": Noted([], "nothing overflows")})
    assert text == "keep = []  # nothing overflows"
