"""Writes the README's tables of numbers from what lies in benchmarks/results.

python benchmarks/table.py        # rewrites README.md between its two marks; a test holds that both agree
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"

Row = tuple[str, str]
SPEED = {
    "sd15_half_width": "SD 1.5 at half width, random weights, 256x256, 10 steps with guidance",
    "shapes": "`shapes`, 20 steps with guidance",
}
OTHERS = {"diffusers": "diffusers", "compile": "torch.compile", "openvino": "OpenVINO on the same graphs"}
PUBLISHED = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35-medium": "SD 3.5 medium",
    "flux-dev": "FLUX.1 dev",
}


def speed(found: dict[str, Any]) -> Iterator[Row]:
    """What others take is a multiple of ours, round by round in one run."""
    for name, title in SPEED.items():
        measured = found[name]
        ours = measured["contenders"]["diffbuild"]
        others = ", ".join(f"{OTHERS[o]} {r['median']:.2f} times as long" for o, r in measured["ratios"].items())
        yield f"a picture, {title}", f"{ours['total']['median'] / 1e3:.2f} s; {others}"
        share = ours["counts"]["loop_overhead_ms"] / ours["stages"]["denoise_ms"]["median"]
        noise = measured["own_noise"]["share"]
        yield (
            "share of its loop outside the engine; how far the medians of two runs differ",
            f"{share:.3%}; {noise:.1%}",
        )
        came, said = ours["grown_mb"], measured["forecast_mb"]
        yield (
            "memory that came with its engines; the forecast",
            f"{came:.0f} MB; {said:.0f} MB ({said / came - 1:+.1%})",
        )


def options(found: dict[str, Any]) -> Iterator[Row]:
    times = found["ms_per_step"]
    ours = times["as built"]
    yield "a step of the same SD 1.5 at half width, with one thing otherwise: as built", f"{ours:.0f} ms"
    yield from ((f"&nbsp; {name}", f"{ms / ours:.2f} times as long") for name, ms in times.items() if ms != ours)
    yield from ((f"&nbsp; {name}", "cannot be built") for name in found["failed"])


def cpu(found: dict[str, Any]) -> Iterator[Row]:
    start, sizes = found["start_to_png"], found["denoiser_sizes"]
    decibels = {name: value for name, value in found["psnr_db"].items() if isinstance(value, int | float)}
    refused = ", ".join(f"`{name}`" for name in found["psnr_db"] if name not in decibels)
    worst = min(decibels, key=lambda name: decibels[name])
    own = ", ".join(f"{size / 1e6:.2f} MB" for size in sizes["own_bytes"].values())
    yield (
        "process start to PNG, `shapes`, 20 steps",
        f"{start['diffbuild']['median_s']:.2f} s; diffusers {start['diffusers']['median_s']:.2f} s, "
        f"{start['times_faster']['median']:.1f} times as long (at least {start['times_faster']['min']:.1f})",
    )
    yield (
        f"picture against diffusers, float32, {len(decibels)} schedulers, 20 steps",
        f"PSNR >= {decibels[worst]:.0f} dB (worst: `{worst}`)" + (refused and f"; refused: {refused}"),
    )
    yield "`build` of `shapes` with nothing to do", f"{found['build']['no_op']['median_s']:.2f} s"
    yield "first `build` of `shapes`, two buckets", f"{found['build']['first_s']:.0f} s"
    yield "verified load of that bundle, two buckets warmed up", f"{found['verified_load']['median_s']:.2f} s"
    yield "denoiser of `shapes` on disk", f"{sizes['shared_bytes'] / 1e6:.1f} MB shared, and per bucket {own}"


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
        f"the denoisers of {' or '.join(map(str, count))} buckets made one graph, real size: {names}",
        f"{seconds} s; {refused} nodes that TensorRT's parser would refuse by its tables",
    )


def rtx_builds(found: dict[str, Any]) -> Iterator[Row]:
    parts = found["parts"]
    for name, measured in parts.items():
        model = PUBLISHED[name.removesuffix("-buckets")]
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


def host_work(found: dict[str, Any]) -> Iterator[Row]:
    step, fresh = (found["steps"][kind]["us_per_step"] for kind in ("the same noise", "fresh noise in every step"))
    yield (
        "host work per step of a GPU's loop, on a pretended GPU whose launches return at once",
        f"{step:.0f} µs; with fresh noise in every step, drawn for {found['bucket']}, {fresh:.0f} µs",
    )


def score(found: dict[str, Any]) -> Iterator[Row]:
    facts = ", ".join(f"{fact} {found['model'][fact]:.1%}" for fact in ("colours", "background", "everything"))
    yield f"`shapes` on {found['captions']} held-out captions", f"{facts} right"


SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "speed": ("benchmarks/speed.py", speed),
    "options": ("benchmarks/options.py", options),
    "cpu": ("benchmarks/cpu.py", cpu),
    "export_scale": ("benchmarks/export_scale.py", exports),
    "real_size_numerics": ("benchmarks/real_size_numerics.py", real_size),
    "merge_scale": ("benchmarks/merge_scale.py", merges),
    "rtx_build": ("benchmarks/rtx_build.py", rtx_builds),
    "host_work": ("benchmarks/host_work.py", host_work),
    "shapes-score": ("examples/shapes/evaluate.py", score),
}
"""Result -> the script that wrote it, and its rows."""


def table() -> str:
    lines, machines = ["| what | measured |", "|---|---|"], []
    for name, (script, rows) in SOURCES.items():
        found = json.loads((RESULTS / f"{name}.json").read_text())
        lines += [f"| {what} | {value} |" for what, value in rows(found)]
        on = found.get("machine")
        machines.append(f"- `{script}`" + (f": {on['cpu']}, {on['cores']} cores, Python {on['python']}" if on else ""))
    return "\n".join(
        [*lines, "", "From top to bottom, by these scripts, whose JSON lies in `benchmarks/results/`:", "", *machines]
    )


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
