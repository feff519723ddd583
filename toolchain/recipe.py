"""A recipe: one flat TOML file that is the whole truth of a build. Frozen dataclasses and strict TOML -> Recipe.

The dataclasses below are the schema: their annotations say what a value may be, their defaults are the only defaults.
Nothing is coerced except an integer where a number is wanted, and every problem is reported at once with its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from toolchain import shipped
from toolchain.errors import RecipeError
from toolchain.options import (
    Count,
    OnnxRuntimeCudaOptions,
    OnnxRuntimeOptions,
    Rule,
    StepCount,
    TensorRtOptions,
    TensorRtRtxOptions,
    Text,
    Whole,
    step_range,
)

Seed = Annotated[int, Rule("an integer from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64)]
NotNegative = Annotated[float, Rule("a number of 0 or more", lambda x: 0 <= x < math.inf)]
Decibels = Annotated[float, Rule("a number above 0", lambda x: 0 < x < math.inf)]
Strength = Annotated[float, Rule("a number above 0, at most 1", lambda x: 0 < x <= 1)]
Share = Annotated[float, Rule("a number above 0, at most 1", lambda x: 0 < x <= 1)]
EXACT_PSNR_DB, ROUNDED_PSNR_DB = 60.0, 40.0
NOT_EMPTY = Rule("a list with at least one entry", lambda entries: len(entries) > 0)

BUCKET_FORM = 'batch x height x width in pixels, such as "1x512x768", sizes in multiples of 8'


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape that is compiled: pictures per run, height and width in pixels. Written "1x512x768"."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """RecipeError unless `text` is a bucket. The exact size factor is the family's to check; 8 divides them all."""
        problem = _bucket_problem(text)
        if problem:
            raise RecipeError(f"bucket: {problem}", expected=BUCKET_FORM, got=_show(text))
        return cls(*map(int, text.split("x")))


BUCKET_SETS = {
    # The sizes near a megapixel that SDXL was trained with, squarest first.
    "sdxl-aspect-ratios": (
        "1x1024x1024", "1x896x1152", "1x1152x896", "1x832x1216", "1x1216x832", "1x768x1344", "1x1344x768",
        "1x640x1536", "1x1536x640",
    ),
}  # fmt: skip
"""Lists of buckets with a name: what `buckets` may be in place of a list."""


@dataclass(frozen=True)
class ComponentRecipe:
    """How one component is compiled.

    keep_float32  dotted module names or fnmatch patterns that stay in float32
    tokens        longest prompt of a T5 text encoder; 0 takes the family's default
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    keep_float32: tuple[Text, ...] = ()
    tokens: Whole = 0


@dataclass(frozen=True)
class Sampling:
    """Defaults of `generate`, and which coefficient tables lie in the bundle.

    step_counts: numbers and ranges. What a range asks for and a scheduler cannot do is left out, and said.
    strengths: of image to image; each starts its schedules at another step, and so needs tables of its own.
    """

    scheduler: Text = "model"
    steps: Count = 20
    guidance: NotNegative = 5.0
    schedulers: Annotated[tuple[Text, ...], NOT_EMPTY] = ("model",)
    step_counts: Annotated[tuple[StepCount, ...], NOT_EMPTY] = ("1-50",)
    strengths: tuple[Strength, ...] = ()

    @property
    def tables(self) -> dict[str, dict[int, bool]]:
        """What to compile: scheduler -> numbers of steps, each with whether it was asked for by itself, not in a range.
        The default scheduler has the default number of steps too."""
        counts: dict[int, bool] = {}
        for entry in self.step_counts:
            counts |= {steps: counts.get(steps, False) or type(entry) is int for steps in step_range(entry)}
        found = {scheduler: dict(counts) for scheduler in (self.scheduler, *self.schedulers)}
        found[self.scheduler][self.steps] = True
        return found


@dataclass(frozen=True)
class Tolerance:
    """How far a component may be from the reference in float32. The defaults suit float32 engines, TF32 included.

    cosine     least cosine similarity
    snr_db     least signal-to-noise ratio
    max_error  largest absolute error, relative to the largest magnitude of the reference
    """

    cosine: Share = 0.99999
    snr_db: Decibels = 60.0
    max_error: Share = 1e-3


@dataclass(frozen=True)
class Check:
    """The proof: prompts x seeds drawn by engines and reference, least PSNR and SSIM of the pictures.

    psnr_db: 0 takes `EXACT_PSNR_DB` where the recipe computes in float32 alone, else `ROUNDED_PSNR_DB`.
    """

    prompts: Annotated[tuple[Text, ...], NOT_EMPTY]
    seeds: Annotated[tuple[Seed, ...], NOT_EMPTY] = (0,)
    psnr_db: NotNegative = 0.0
    ssim: Share = 0.98
    components: Mapping[str, Tolerance] = field(default_factory=dict, hash=False)

    def tolerance(self, name: str) -> Tolerance:
        """The tolerance of a component; the default where `[check.components.NAME]` is absent."""
        return self.components.get(name, Tolerance())


@dataclass(frozen=True)
class Safety:
    """checker: whether the model's safety checker is compiled and looks at every picture: what it flags is black."""

    checker: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build. `name` is the file's stem; family, backend and component names are checked by their owners.

    without: optional components to leave out, such as the VAE's encoder where nobody needs image to image.
    """

    name: Text
    family: Text
    backend: Text = "onnxruntime"
    buckets: Annotated[tuple[Bucket, ...], NOT_EMPTY]
    classifier_free_guidance: bool = True
    without: tuple[Text, ...] = ()
    components: Mapping[str, ComponentRecipe] = field(default_factory=dict, hash=False)
    sampling: Sampling = Sampling()
    safety: Safety = Safety()
    onnxruntime: OnnxRuntimeOptions = field(default_factory=OnnxRuntimeOptions)
    onnxruntime_cuda: OnnxRuntimeCudaOptions = field(default_factory=OnnxRuntimeCudaOptions)
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)
    tensorrt_rtx: TensorRtRtxOptions = field(default_factory=TensorRtRtxOptions)
    check: Check

    def component(self, name: str) -> ComponentRecipe:
        """The recipe of a component; the default where `[components.NAME]` is absent."""
        return self.components.get(name, ComponentRecipe())

    @property
    def rounds(self) -> bool:
        """Whether anything is computed in less than float32: a component's type, or products in TF32."""
        options = getattr(self, self.backend, None)  # whether the name is a backend's is checked elsewhere
        tf32: bool = getattr(options, "tf32", False)
        return tf32 or any(own.dtype != "float32" for own in self.components.values())

    @property
    def picture_limits(self) -> dict[str, float]:
        """The least that a check's pictures must have of each measure."""
        default = ROUNDED_PSNR_DB if self.rounds else EXACT_PSNR_DB
        return {"psnr_db": self.check.psnr_db or default, "ssim": self.check.ssim}

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump, every default written out."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`, as strict as the TOML. RecipeError."""
        table = {key: value for key, value in data.items() if key != "name"}
        return _structure(table, data.get("name"), where=f"recipe {data.get('name')!r} as JSON")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name.

    RecipeError when it cannot be read, is not TOML, or holds anything but a recipe.
    """
    path = shipped.find(Path(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise RecipeError("the recipe is not text", where=path, expected="TOML in UTF-8", got=got) from error
    except OSError as error:
        expected = "a TOML file, or the name of a recipe that comes with diffbuild"
        raise RecipeError(
            "the recipe cannot be read", where=path, expected=expected, got=error.strerror, hint=_nearby(path)
        ) from error
    return parse_recipe(text, path.stem, str(path))


def parse_recipe(text: str, name: str, where: str) -> Recipe:
    """TOML text -> Recipe called `name`; `where` is what the errors call the text. RecipeError with every problem."""
    import tomllib  # here, because a runtime that reads a bundle's JSON has no use for it

    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        what = f"the recipe is not TOML: {str(error)[: at.start()] if at else error}"
        raise RecipeError(what, where=":".join([where, *(at.groups() if at else ())])) from error
    return _structure(data, name, where=where)


def _nearby(path: Path) -> str:
    """What may have been meant: the files where it was looked for, or a shipped recipe."""
    folder = path if path.is_dir() else path.parent
    places = [p for p in (folder, folder / "recipes") if p.is_dir() and p.resolve() != shipped.folder()]
    found = [str(f) for place in places for f in sorted(place.glob("*.toml")) if f.name != "pyproject.toml"]
    listed = [f"recipes nearby: {', '.join(found[:20])}"] if found else []
    listed.append(f"diffbuild recipes lists those that come with it{_nearest(path.stem, shipped.names())}")
    return "; ".join(listed)


def _structure(data: dict[str, Any], name: Any, *, where: str) -> Recipe:
    problems: list[str] = []
    given = {"name": _read(Text, name, "name", problems)}  # not a key of the table: the file's name is the recipe's
    recipe = _read_table(Recipe, data, "", problems, given=given)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n  ".join([f"{count} in the recipe:", *problems]), where=where)
    assert isinstance(recipe, Recipe)
    return recipe


def _read(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as `kind`. A problem is appended to `problems` as one line, and the result is then of no use."""
    if get_origin(kind) is Annotated:
        inner, rule = get_args(kind)
        before = len(problems)
        result = _read(inner, value, path, problems)
        if get_origin(inner) is not tuple and len(problems) > before:
            problems[before:] = [_line(path, "wrong type", rule.expected, value)]
        elif len(problems) == before and not rule.holds(result):
            empty = not result.strip() if isinstance(result, str) else isinstance(result, tuple)
            problems.append(_line(path, "empty" if empty else "out of range", rule.expected, value))
        return result
    if is_dataclass(kind) and kind is not Bucket:
        return _read_table(kind, value, path, problems, given={})
    if get_origin(kind) is tuple:
        if get_args(kind)[0] is Bucket and type(value) is str:
            return _read_bucket_set(value, path, problems)
        return _read_list(get_args(kind)[0], value, path, problems)
    if get_origin(kind) is Mapping:
        if type(value) is dict:
            return {key: _read(get_args(kind)[1], v, _join(path, key), problems) for key, v in value.items()}
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        if type(value) is str:
            problems.append(_line(path, f"unknown value{_nearest(value, get_args(kind))}", _describe(kind), value))
            return None
    elif isinstance(kind, UnionType):
        if type(value) in get_args(kind):
            return value
    elif kind is Bucket:
        if type(value) is str:
            problem = _bucket_problem(value)
            return problems.append(_line(path, problem, BUCKET_FORM, value)) if problem else Bucket.parse(value)
    elif kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf
    elif type(value) is kind:
        return value
    problems.append(_line(path, "wrong type", _describe(kind), value))
    return None


def _read_table(kind: Any, value: Any, path: str, problems: list[str], *, given: Mapping[str, Any]) -> Any:
    """A dataclass from a table; the fields in `given` are set already and are no keys of the table."""
    if type(value) is not dict:
        problems.append(_line(path, "wrong type", "a table", value))
        return None
    known = {key: entry for key, entry in _schema(kind).items() if key not in given}
    values = dict(given)
    before = len(problems)
    for key in value:
        if key not in known:
            problems.append(_unknown(kind, _join(path, key), key, known))
    for key, (annotation, required) in known.items():
        if key in value:
            values[key] = _read(annotation, value[key], _join(path, key), problems)
        elif required and is_dataclass(annotation):
            # Go in with nothing, so that the keys that must be written are named rather than the table.
            values[key] = _read_table(annotation, {}, _join(path, key), problems, given={})
        elif required:
            problems.append(f"{_join(path, key)}: missing key (expected {_describe(annotation)}, got nothing)")
    return kind(**values) if len(problems) == before else None


def _unknown(kind: Any, path: str, key: str, known: Any) -> str:
    reason = getattr(kind, "REFUSED", {}).get(key)
    if reason:
        return f"{path}: cannot be had: {reason}"
    return _line(path, f"unknown key{_nearest(key, known)}", f"one of {', '.join(known)}", key)


def _read_list(kind: Any, value: Any, path: str, problems: list[str]) -> tuple[Any, ...]:
    """Lists are sets in order: an entry that is given twice is a slip of the pen."""
    if type(value) is not list:
        problems.append(_line(path, "wrong type", f"a list, each {_describe(kind)}", value))
        return ()
    results: list[Any] = []
    for i, entry in enumerate(value):
        before = len(problems)
        result = _read(kind, entry, f"{path}[{i}]", problems)
        if len(problems) == before and result in results:
            problems.append(_line(f"{path}[{i}]", "duplicate", "each entry once", entry))
        results.append(result)
    return tuple(results)


def _read_bucket_set(name: str, path: str, problems: list[str]) -> tuple[Bucket, ...]:
    if name not in BUCKET_SETS:
        expected = "a list of buckets, or one of " + ", ".join(BUCKET_SETS)
        problems.append(_line(path, f"unknown name{_nearest(name, BUCKET_SETS)}", expected, name))
    return tuple(map(Bucket.parse, BUCKET_SETS.get(name, ())))


@cache
def _schema(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Key -> (annotation, required) of a dataclass."""

    def required(item: Field[Any]) -> bool:
        return item.default is MISSING and item.default_factory is MISSING

    hints = get_type_hints(kind, include_extras=True)
    return {item.name: (hints[item.name], required(item)) for item in fields(kind)}


def _bucket_problem(text: str) -> str | None:
    if not re.fullmatch(r"-?[0-9]{1,9}x-?[0-9]{1,9}x-?[0-9]{1,9}", text):
        return "not a bucket"
    batch, height, width = sizes = tuple(map(int, text.split("x")))
    if min(sizes) < 1:
        return "not positive"
    if height % 8 or width % 8:
        return "not a multiple of 8"
    # One spelling per bucket: "01x64x64" would be a second name of the same files.
    return None if text == f"{batch}x{height}x{width}" else "not a bucket"


def _describe(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].expected)
    if isinstance(kind, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Mapping or (is_dataclass(kind) and kind is not Bucket):
        return "a table"
    return {Bucket: BUCKET_FORM, str: "a string", int: "an integer", float: "a number", bool: "true or false"}[kind]


def _line(path: str, problem: str, expected: str, got: Any) -> str:
    return f"{path or 'recipe'}: {problem} (expected {expected}, got {_show(got)})"


def _show(value: Any) -> str:
    """A value as TOML's reader wrote it, short enough for a line."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, (str, float)) or value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join(path: str, key: str) -> str:
    name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else repr(key)
    return f"{path}.{name}" if path else name


def _nearest(name: str, known: Any) -> str:
    import difflib  # here, because a right recipe has no use for it

    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Bucket):
        return str(value)
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
