"""The schema of a recipe: frozen dataclasses, whose defaults are the only defaults. `reading` holds data against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from toolchain.recipe.bucket import Bucket
from toolchain.recipe.options import (
    BackendOptions,
    Count,
    OnnxRuntimeCudaOptions,
    OnnxRuntimeOptions,
    OpenVinoOptions,
    Prompt,
    Rule,
    StepCount,
    TensorRtOptions,
    TensorRtRtxOptions,
    Text,
    Whole,
    step_range,
)
from toolchain.recipe.reading import structure

Seed = Annotated[int, Rule("an integer from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64)]
NotNegative = Annotated[float, Rule("a number of 0 or more", lambda x: 0 <= x < math.inf)]
Decibels = Annotated[float, Rule("a number above 0", lambda x: 0 < x < math.inf)]
Strength = Annotated[float, Rule("a number above 0, at most 1", lambda x: 0 < x <= 1)]
Share = Annotated[float, Rule("a number above 0, at most 1", lambda x: 0 < x <= 1)]
ShareOrNone = Annotated[float, Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)]
BLOCK = 64
BlockSize = Annotated[int, Rule("32, 64 or 128, or 0 for 64", lambda n: n in (0, 32, 64, 128))]
EXACT_PSNR_DB, ROUNDED_PSNR_DB, COARSE_PSNR_DB = 60.0, 40.0, 28.0
NOT_EMPTY = Rule("a list with at least one entry", lambda entries: len(entries) > 0)


@dataclass(frozen=True)
class Quantize:
    """Which weights of a component are stored in fewer bits, and whether their inputs are rounded too.

    weights      the type of convolutions' and matrix products' weights
    exclude      dotted module names or fnmatch patterns that are left alone
    scales       "max" keeps the largest weight of every scale, "mse" clips it where the squared error is then least
    activations  the type that the inputs of quantised weights are rounded to, that of the weights; "none" leaves them
    ranges       how a calibration's ranges become scales, as `precision.ranges.parse_method` takes it
    smoothing    how much of the magnitude of a linear layer's input is moved into its weights: SmoothQuant's alpha
    block_size   weights in int4 along the inputs of a linear layer that share a scale; 0 takes `BLOCK`
    insist       takes what is refused as too coarse for a component: float8 in a VAE
    """

    weights: Literal["int8", "int4", "float8"]
    exclude: tuple[Text, ...] = ()
    scales: Literal["max", "mse"] = "max"
    activations: Literal["none", "int8", "float8"] = "none"
    ranges: Text = "max"
    smoothing: ShareOrNone = 0.0
    block_size: BlockSize = 0
    insist: bool = False

    @property
    def block(self) -> int:
        """Weights that share a scale; 0 where each output channel has one."""
        return (self.block_size or BLOCK) if self.weights == "int4" else 0


@dataclass(frozen=True)
class ComponentRecipe:
    """How one component is compiled.

    keep_float32  dotted module names or fnmatch patterns that stay in float32
    tokens        longest prompt of a T5 text encoder; 0 takes the family's default
    quantize      None where all weights stay in the component's type
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    keep_float32: tuple[Text, ...] = ()
    tokens: Whole = 0
    quantize: Quantize | None = None

    @property
    def precision(self) -> str:
        """In words: its type, and that of its weights and activations where they are quantised."""
        if self.quantize is None:
            return self.dtype
        activations = "" if self.quantize.activations == "none" else f" x {self.quantize.activations}"
        return f"{self.dtype} with {self.quantize.weights}{activations}"


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
        tables = {scheduler: dict(counts) for scheduler in (self.scheduler, *self.schedulers)}
        tables[self.scheduler][self.steps] = True
        return tables


@dataclass(frozen=True)
class Tolerance:
    """How far a component may be from the reference in float32. The defaults suit float32 engines, TF32 included; see
    `Recipe.tolerance` for a component without a table.

    cosine     least cosine similarity
    snr_db     least signal-to-noise ratio
    max_error  largest absolute error, relative to the largest magnitude of the reference
    """

    cosine: Share = 0.99999
    snr_db: Decibels = 60.0
    max_error: Share = 1e-3


TOLERANCES = {
    "float32": Tolerance(),
    "float16": Tolerance(cosine=0.999, snr_db=35.0, max_error=0.03),
    "bfloat16": Tolerance(cosine=0.995, snr_db=25.0, max_error=0.1),
    "int4": Tolerance(cosine=0.98, snr_db=14.0, max_error=0.3),
}
"""Of a component without a table, by its dtype: what rounding to it costs a sound network, and some more."""
COSTS = {"int8": "float16", "float8": "bfloat16", "int4": "int4"}
"""A type of weights -> the entry of `TOLERANCES` that it costs at least. int4 has 19 dB in every layer alone."""


@dataclass(frozen=True)
class Check:
    """The proof: prompts x seeds drawn by engines and reference, least PSNR and SSIM of the pictures.

    psnr_db: 0 takes `EXACT_PSNR_DB` where the recipe computes in float32 alone, `COARSE_PSNR_DB` where weights are in
    int4 or float8, else `ROUNDED_PSNR_DB`.
    """

    prompts: Annotated[tuple[Text, ...], NOT_EMPTY]
    seeds: Annotated[tuple[Seed, ...], NOT_EMPTY] = (0,)
    psnr_db: NotNegative = 0.0
    ssim: Share = 0.98
    components: Mapping[str, Tolerance] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Calibration:
    """What is drawn to learn how large activations get: every prompt with every seed.

    prompts    a list, or the name of one
    seeds      each is counted up over the prompts, so that no two pictures begin with the same noise
    scheduler  empty: the recipe's default
    steps      0: the recipe's default
    """

    prompts: Annotated[tuple[Prompt, ...], NOT_EMPTY]
    seeds: Annotated[tuple[Seed, ...], NOT_EMPTY] = (0,)
    scheduler: str = ""
    steps: Whole = 0


@dataclass(frozen=True)
class Safety:
    """checker: whether the model's safety checker is compiled and looks at every picture: what it flags is black."""

    checker: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build. `name` is the file's stem; family, backend and component names are checked by their owners.

    without: optional components to leave out, such as the VAE's encoder where nobody needs image to image.
    calibration: None where the recipe needs none.
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
    openvino: OpenVinoOptions = field(default_factory=OpenVinoOptions)
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)
    tensorrt_rtx: TensorRtRtxOptions = field(default_factory=TensorRtRtxOptions)
    calibration: Calibration | None = None
    check: Check

    def component(self, name: str) -> ComponentRecipe:
        """The recipe of a component; the default where `[components.NAME]` is absent."""
        return self.components.get(name, ComponentRecipe())

    def options(self, backend: str) -> BackendOptions:
        """The table of a backend, by the name that its registries know."""
        options: BackendOptions = getattr(self, backend)
        return options

    def tolerance(self, name: str) -> Tolerance:
        """The tolerance of a component; that of its dtype where `[check.components.NAME]` is absent.

        With quantised weights it is what these cost at least. With rounded activations it is bfloat16's.
        """
        component = self.component(name)
        costs: list[str] = [component.dtype]
        if component.quantize is not None:
            costs.append(COSTS[component.quantize.weights])
            costs += ["bfloat16"] if component.quantize.activations != "none" else []
        return self.check.components.get(name) or TOLERANCES[max(costs, key=list(TOLERANCES).index)]

    @property
    def precisions(self) -> str:
        """In words: the denoiser's precision, then what differs from it."""
        usual = self.component("denoiser").precision
        others = [f"{name} {part.precision}" for name, part in self.components.items() if part.precision != usual]
        return ", ".join([usual, *others])

    @property
    def quantizes(self) -> bool:
        """Whether the weights of any component are stored in fewer bits."""
        return any(c.quantize is not None for c in self.components.values())

    @property
    def unquantized(self) -> Recipe:
        """The same recipe without any table `quantize`."""
        return replace(self, components={name: replace(c, quantize=None) for name, c in self.components.items()})

    @property
    def rounds(self) -> bool:
        """Whether anything is less than float32: a component's type, its weights, or products in TF32."""
        options = getattr(self, self.backend, None)  # whether the name is a backend's is checked elsewhere
        tf32: bool = getattr(options, "tf32", False)
        return tf32 or self.quantizes or any(c.dtype != "float32" for c in self.components.values())

    @property
    def picture_limits(self) -> dict[str, float]:
        """The least that a check's pictures must have of each measure."""
        coarse = any(c.quantize and c.quantize.weights != "int8" for c in self.components.values())
        default = COARSE_PSNR_DB if coarse else ROUNDED_PSNR_DB if self.rounds else EXACT_PSNR_DB
        return {"psnr_db": self.check.psnr_db or default, "ssim": self.check.ssim}

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump, every default written out."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`, as strict as the TOML. RecipeError."""
        table = {key: value for key, value in data.items() if key != "name"}
        recipe: Recipe = structure(cls, table, data.get("name"), where=f"recipe {data.get('name')!r} as JSON")
        return recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Bucket):
        return str(value)
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
