"""Writes the tables of numbers in README.md and docs/measurements.md from the JSON in benchmarks/results.

python benchmarks/table.py        # rewrites both pages between their marks; a test fails where they differ
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = tuple[str, str]
SPEED = {
    "sd15_half_width": "SD 1.5 at half width, random weights, 256x256, 10 steps with guidance",
    "shapes": "`shapes`, 20 steps with guidance",
}
OTHERS = {"diffusers": "diffusers", "compile": "torch.compile", "openvino": "OpenVINO on the same graphs"}
OPENVINO = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8 (denoiser and decoder) and bfloat16",
}
PUBLISHED = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35-medium": "SD 3.5 medium",
    "flux-dev": "FLUX.1 dev",
}


def speed(found: dict[str, Any]) -> Iterator[Row]:
    """The others' times are multiples of ours, round by round in one run."""
    for name, title in SPEED.items():
        measured = found[name]
        ours = measured["contenders"]["diffbuild"]
        others = ", ".join(f"{OTHERS[o]} {r['median']:.2f} times as long" for o, r in measured["ratios"].items())
        yield f"a picture, {title}", f"{ours['total']['median'] / 1e3:.2f} s; {others}"
        share = ours["counts"]["loop_overhead_ms"] / ours["stages"]["denoise_ms"]["median"]
        noise = measured["own_noise"]["share"]
        yield (
            "share of its loop outside the engine; difference between the medians of two runs",
            f"{share:.3%}; {noise:.1%}",
        )
        grown, forecast = ours["grown_mb"], measured["forecast_mb"]
        yield (
            "memory added by its engines; forecast",
            f"{grown:.0f} MB; {forecast:.0f} MB ({forecast / grown - 1:+.1%})",
        )


def options(found: dict[str, Any]) -> Iterator[Row]:
    times = found["ms_per_step"]
    ours = times["as built"]
    yield "one step of the same SD 1.5 at half width, as built", f"{ours:.0f} ms"
    yield from (
        (f"&nbsp; with one change: {name}", f"{ms / ours:.2f} times as long")
        for name, ms in times.items()
        if ms != ours
    )
    yield from ((f"&nbsp; with one change: {name}", "cannot be built") for name in found["failed"])


def cpu(found: dict[str, Any]) -> Iterator[Row]:
    start, sizes = found["start_to_png"], found["denoiser_sizes"]
    measured = {name: value for name, value in found["psnr_db"].items() if value == "inf" or not isinstance(value, str)}
    decibels = {name: float(value) for name, value in measured.items()}
    refused = ", ".join(f"`{name}`" for name in found["psnr_db"] if name not in decibels)
    worst = min(decibels, key=lambda name: decibels[name])
    per_bucket = ", ".join(f"{size / 1e6:.2f} MB" for size in sizes["own_bytes"].values())
    yield (
        "process start to PNG, `shapes`, 20 steps",
        f"{start['diffbuild']['median_s']:.2f} s; diffusers {start['diffusers']['median_s']:.2f} s, "
        f"{start['times_faster']['median']:.1f} times as long (at least {start['times_faster']['min']:.1f})",
    )
    yield (
        f"picture against diffusers, float32, {len(decibels)} schedulers, 20 steps",
        f"PSNR >= {decibels[worst]:.0f} dB (worst: `{worst}`)" + (refused and f"; refused: {refused}"),
    )
    yield "second `build` of `shapes`, with nothing to do", f"{found['build']['no_op']['median_s']:.2f} s"
    yield "first `build` of `shapes`, two buckets", f"{found['build']['first_s']:.0f} s"
    yield "load of that bundle, verified, two buckets warmed up", f"{found['verified_load']['median_s']:.2f} s"
    yield "denoiser of `shapes` on disk", f"{sizes['shared_bytes'] / 1e6:.1f} MB shared, and per bucket {per_bucket}"


def exports(found: dict[str, Any]) -> Iterator[Row]:
    for name, title in PUBLISHED.items():
        step = found["models"][name]["denoiser"]
        yield (
            f"export of the real-size {title} step from its config, {step['dtype']}, {step['bucket']}",
            f"{step['seconds']:.0f} s, {step['peak_gb']:.2f} GB peak memory, {step['graph_mb']:.1f} MB of graph "
            f"for {step['parameters'] / 1e9:.2f} billion parameters",
        )


def real_size(found: dict[str, Any]) -> Iterator[Row]:
    for name, measured in found["models"].items():
        engine, torch, second = (measured[part] for part in ("engine", "torch", "second_bucket"))
        title = f"{PUBLISHED[name]}, random weights, {measured['denoiser_dtype']}"
        yield (
            f"one step of {title}, {measured['bucket']}",
            f"{engine['step_s']:.1f} s, torch {torch['step_s']:.1f} s; {torch['snr_of_update_db']:.0f} dB between them",
        )
        yield (
            f"`build` of it; of a second bucket, {measured['second']}",
            f"{measured['build']['seconds']:.0f} s; {second['seconds']:.0f} s and "
            f"{second['added_bytes'] / 1e6:.1f} MB more on disk",
        )


def merges(found: dict[str, Any]) -> Iterator[Row]:
    models = found["models"]
    names = ", ".join(PUBLISHED[name] for name in models)
    seconds = ", ".join(f"{m['seconds']:.1f}" for m in models.values())
    refused = sum(len(m["refused"]) for m in models.values())
    count = {len(m["buckets"]) for m in models.values()}
    yield (
        f"the denoisers of {' or '.join(map(str, count))} buckets merged into one graph, real size: {names}",
        f"{seconds} s; {refused} nodes that TensorRT's parser would refuse, by its tables",
    )


QUANTIZED = {"-int8": "int8", "-int4": "int4"}


def rtx_builds(found: dict[str, Any]) -> Iterator[Row]:
    parts = found["parts"]
    for name, measured in parts.items():
        weights = next((kind for suffix, kind in QUANTIZED.items() if name.endswith(suffix)), None)
        model = PUBLISHED[name.removesuffix("-buckets").removesuffix(f"-{weights}")]
        if weights is not None:
            took = measured["quantizing"]
            model += f" ({weights})"
            yield (
                f"quantising the weights of the real-size {model} denoiser, random numbers, streamed",
                f"{took['seconds']:.0f} s, {took['peak_gb']:.1f} GB peak memory; {measured['weights_gb']:.2f} GB, "
                f"{took['share']:.3f} of what they were",
            )
        if "plan_gb" not in measured and "parsed" not in measured:
            continue
        if "parsed" in measured:
            size = f"{measured['weights_gb']:.1f} GB of weights"
            yield (
                f"the real-size {model} denoiser in the parser of TensorRT for RTX, {size}",
                f"{measured['seconds']:.0f} s, nothing refused",
            )
            continue
        first = parts.get(name.removesuffix("-buckets"), measured)
        more = "" if first is measured else f", {measured['plan_gb'] / first['plan_gb']:.3f} times that of one bucket"
        buckets = "one bucket" if measured["buckets"] == 1 else f"{measured['buckets']} buckets"
        yield (
            f"the real-size {model} denoiser as an engine of TensorRT for RTX, {buckets}, random weights, no GPU",
            f"{measured['cpu_seconds']:.0f} s of CPU, {measured['peak_gb']:.1f} GB peak memory for "
            f"{measured['weights_gb']:.2f} GB of weights; a plan of {measured['plan_gb']:.2f} GB{more}",
        )


def int8_step(found: dict[str, Any]) -> Iterator[Row]:
    measured = found["sd15_half_width"]
    times, sizes = ({name: m["median"] for name, m in measured["ms"].items()}, measured["weight_mb"])
    plain, eager = times["float32"] / times["int8"], times["diffusers"] / times["int8"]
    yield (
        "one step of SD 1.5 at half width in int8, on a CPU with VNNI",
        f"{times['int8']:.0f} ms; float32 {plain:.2f} times, diffusers {eager:.2f} times as long; "
        f"{measured['share_of_macs']:.0%} of the products with weights in int8",
    )
    errors = measured["psnr_db"]
    yield (
        "&nbsp; its latents against float32 along the trajectory",
        f"{min(errors):.1f} dB in the worst of {len(errors)} steps, {statistics.median(errors):.1f} dB in the median",
    )
    small, large = (sum(sizes[name].values()) for name in ("int8", "float32"))
    yield "&nbsp; its weight files; in float32", f"{small:.0f} MB; {large:.0f} MB, {small / large:.3f} of them"


def openvino(found: dict[str, Any]) -> Iterator[Row]:
    """Ratios are medians over rounds, in each of which all draw."""
    measured = found["sd15_half_width"]
    ratios = {name: statistics.median(rounds) for name, rounds in measured["ratios"].items()}
    for name, title in OPENVINO.items():
        seconds = measured["median_ms"][f"openvino {name}"]["total_ms"] / 1e3
        others = (f"diffusers float32 / openvino {name}", f"diffusers bfloat16 / openvino {name}")
        wide, short = (ratios[other] for other in others)
        yield (
            f"a picture, SD 1.5 at half width, with OpenVINO in {title}",
            f"{seconds:.2f} s; diffusers in float32 {wide:.2f}, in bfloat16 {short:.2f}, ONNX Runtime in float32 "
            f"{ratios[f'onnxruntime float32 / openvino {name}']:.2f} times as long",
        )
    step = found["sd15_real_step"]
    seconds = statistics.median(step["seconds"]["openvino bfloat16"])
    yield (
        "one step of SD 1.5, random weights, 1x512x512, with OpenVINO in bfloat16",
        f"{seconds:.2f} s, torch in float32 {statistics.median(step['ratios']):.2f} times as long",
    )
    start = found["shapes_start_to_png"]
    late = statistics.median(start["ratios"]["openvino float32"])
    yield (
        "process start to PNG, `shapes`, with OpenVINO in float32",
        f"{statistics.median(start['seconds']['openvino float32']):.2f} s, {late:.2f} times that of ONNX Runtime",
    )


def host_work(found: dict[str, Any]) -> Iterator[Row]:
    step, fresh = (found["steps"][kind]["us_per_step"] for kind in ("the same noise", "fresh noise in every step"))
    yield (
        "host work per step of a GPU's loop, on a simulated GPU whose launches return at once",
        f"{step:.0f} µs; with fresh noise in every step, for {found['bucket']}, {fresh:.0f} µs",
    )


def score(found: dict[str, Any]) -> Iterator[Row]:
    facts = ", ".join(f"{fact} {found['model'][fact]:.1%}" for fact in ("colours", "background", "everything"))
    yield f"`shapes` on {found['captions']} held-out captions", f"{facts} right"


def calibration(found: dict[str, Any]) -> Iterator[Row]:
    names = {"shapes": "`shapes`", "sd15_half_width": "SD 1.5 at half width, 256x256"}
    for key in (key for key in names if key in found):
        row = found[key]
        what = f"calibration of {names[key]}, per picture of {row['steps']} steps"
        size = f"a file of {row['file_bytes'] / 1e6:.1f} MB"
        yield (
            what,
            f"{row['ratio']:.2f} times as long as drawing it, {len(row['ratios'])} pairs on a shared machine; {size}",
        )


def quality(found: dict[str, Any]) -> Iterator[Row]:
    against = found["against"]
    for name, measured in found["bundles"].items():
        psnr, score = measured["psnr_db"], measured["score"]["everything"]
        flip = "" if measured["flip"] is None else f", FLIP {measured['flip']['median']:.4f} in the median"
        parts = (
            f"PSNR {psnr['median']:.1f} dB in the median, {psnr['min']:.1f} dB at least{flip}",
            f"captions {score:.1%} right, {against['score']['everything']:.1%} before",
            f"denoiser {measured['share_of_bytes']['denoiser']:.2f} times as large",
            f"a step {measured['times_as_long']:.2f} times as long, on a shared machine",
        )
        yield f"`{name}` against `{against['recipe']}`, {found['captions']} held-out captions", "; ".join(parts)


def tuning(found: dict[str, Any]) -> Iterator[Row]:
    def words(point: dict[str, Any]) -> str:
        numbers = f"{point['median_psnr_db']:.1f} dB in the median, {point['psnr_db']:.1f} dB at least"
        return f"{point['share']:.1%} of the multiply-accumulates in int8: PSNR {numbers}"

    prompts, others = found["prompts"], found["held_out"]
    least = f"with other seeds {others['median_psnr_db']:.1f} and {others['psnr_db']:.1f} dB"
    yield f"`shapes` tuned, {prompts} captions, weights and activations in int8", f"{words(found['chosen'])}; {least}"
    curves = {"": found["points"]}
    if "least_error_options" in found:
        curves[f", with {found['least_error_options']['options']}"] = found["least_error_options"]["points"]
    for options, points in curves.items():
        curve = "; ".join(f"{p['share']:.0%}: {p['median_psnr_db']:.1f} and {p['psnr_db']:.1f} dB" for p in points)
        yield f"&nbsp; its curve{options}: share in int8, PSNR in the median and at least", curve
    for point in found["naive"]:
        yield "&nbsp; with the largest ranges and scales, and no smoothing", words(point)


SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "speed": ("benchmarks/speed.py", speed),
    "options": ("benchmarks/options.py", options),
    "cpu": ("benchmarks/cpu.py", cpu),
    "export_scale": ("benchmarks/export_scale.py", exports),
    "real_size_numerics": ("benchmarks/real_size_numerics.py", real_size),
    "merge_scale": ("benchmarks/merge_scale.py", merges),
    "rtx_build": ("benchmarks/rtx_build.py", rtx_builds),
    "rtx_quantized": ("benchmarks/rtx_build.py", rtx_builds),
    "int8_step": ("benchmarks/int8_step.py", int8_step),
    "openvino": ("benchmarks/openvino_speed.py", openvino),
    "host_work": ("benchmarks/host_work.py", host_work),
    "quality": ("benchmarks/quality.py", quality),
    "calibration": ("benchmarks/calibration.py", calibration),
    "quality_int4": ("benchmarks/quality.py", quality),
    "quality_int8": ("benchmarks/quality.py", quality),
    "quality_bf16": ("benchmarks/quality.py", quality),
    "tuning": ("benchmarks/tuning.py", tuning),
    "shapes-score": ("examples/shapes/evaluate.py", score),
}
"""Result -> the script that wrote it, and its rows."""


SUMMARY = (
    "process start to PNG, `shapes`, 20 steps",
    "a picture, `shapes`, 20 steps with guidance",
    "a picture, SD 1.5 at half width, random weights, 256x256, 10 steps with guidance",
    "a picture, SD 1.5 at half width, with OpenVINO in bfloat16",
    "one step of SD 1.5, random weights, float32, 1x512x512",
    "picture against diffusers, float32, 27 schedulers, 20 steps",
    "second `build` of `shapes`, with nothing to do",
    "export of the real-size SDXL step from its config, float16, 1x1024x1024",
)
"""The rows that the README shows."""


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def rows() -> list[Row]:
    return [row for name, (_, make_rows) in SOURCES.items() for row in make_rows(results(name))]


def markdown(rows: Iterable[Row]) -> str:
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def summary() -> str:
    """The README's table. KeyError where a row of SUMMARY is no longer measured."""
    values = dict(rows())
    return markdown((what, values[what]) for what in SUMMARY)


def table() -> str:
    """The table of docs/measurements.md: every row, and the machine behind each script."""
    machines = []
    for name, (script, _) in SOURCES.items():
        on = results(name).get("machine")
        machines.append(f"- `{script}`" + (f": {on['cpu']}, {on['cores']} cores, Python {on['python']}" if on else ""))
    intro = "From top to bottom, measured by these scripts, whose JSON is in `benchmarks/results/`:"
    return "\n".join([markdown(rows()), "", intro, "", *machines])


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("summary", summary),
    "docs/measurements.md": ("numbers", table),
}
"""Page -> the mark around its table, and what writes it."""


def parts(page: str) -> tuple[str, str, str]:
    """A page before, in and after its table."""
    mark = PAGES[page][0]
    before, rest = (ROOT / page).read_text().split(f"<!-- {mark} -->\n")
    inside, after = rest.split(f"<!-- /{mark} -->")
    return before, inside.strip(), after


def main() -> None:
    for page, (mark, write) in PAGES.items():
        before, _, after = parts(page)
        (ROOT / page).write_text(f"{before}<!-- {mark} -->\n{write()}\n<!-- /{mark} -->{after}")


if __name__ == "__main__":
    main()
