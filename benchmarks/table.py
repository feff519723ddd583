"""Writes the README's table of numbers from what lies in benchmarks/results.

python benchmarks/table.py        # rewrites README.md between its two marks; a test holds that both agree
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"


PUBLISHED = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35-medium": "SD 3.5 medium",
    "flux-dev": "FLUX.1 dev",
}


def rows(cpu: dict[str, Any], score: dict[str, Any], scale: dict[str, Any]) -> list[tuple[str, str]]:
    start, sizes = cpu["start_to_png"], cpu["denoiser_sizes"]
    decibels = {name: value for name, value in cpu["psnr_db"].items() if isinstance(value, int | float)}
    worst = min(decibels, key=lambda name: decibels[name])
    own = ", ".join(f"{size / 1e6:.2f} MB" for size in sizes["own_bytes"].values())
    model = score["model"]
    steps = {PUBLISHED[name]: scale["models"][name]["denoiser"] for name in PUBLISHED if name in scale["models"]}
    return [
        (
            "process start to PNG, `shapes`, 20 steps",
            f"{start['diffbuild']['median_s']:.2f} s; diffusers {start['diffusers']['median_s']:.2f} s, "
            f"{start['times_faster']['median']:.1f} times as long (at least {start['times_faster']['min']:.1f})",
        ),
        (
            f"picture against diffusers, float32, {len(decibels)} schedulers, 20 steps",
            f"PSNR >= {decibels[worst]:.0f} dB (worst: `{worst}`)",
        ),
        ("`build` of `shapes` with nothing to do", f"{cpu['build']['no_op']['median_s']:.2f} s"),
        ("first `build` of `shapes`, two buckets", f"{cpu['build']['first_s']:.0f} s"),
        ("verified load of that bundle, two buckets warmed up", f"{cpu['verified_load']['median_s']:.2f} s"),
        *(
            (
                f"export of the real-size {name} step from its config, {step['dtype']}, {step['bucket']}",
                f"{step['seconds']:.0f} s, {step['peak_gb']:.2f} GB peak memory, {step['graph_mb']:.1f} MB of graph "
                f"for {step['parameters'] / 1e9:.2f} billion parameters",
            )
            for name, step in steps.items()
        ),
        ("denoiser of `shapes` on disk", f"{sizes['shared_bytes'] / 1e6:.1f} MB shared, and per bucket {own}"),
        (
            f"`shapes` on {score['captions']} held-out captions",
            ", ".join(f"{fact} {model[fact]:.1%}" for fact in ("colours", "background", "everything")) + " right",
        ),
    ]


def table() -> str:
    cpu = json.loads((RESULTS / "cpu.json").read_text())
    score = json.loads((RESULTS / "shapes-score.json").read_text())
    scale = json.loads((RESULTS / "export_scale.json").read_text())
    versions = cpu["machine"]["versions"]
    names = ", ".join(
        f"{name} {versions[name]}" for name in versions if name.startswith(("torch", "diffusers", "onnxr"))
    )
    lines = ["| what | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows(cpu, score, scale))]
    machine = f"{cpu['machine']['cpu']}, {cpu['machine']['cores']} cores, Python {cpu['machine']['python']}"
    lines += ["", f"Medians on {machine}; {names}. `python benchmarks/cpu.py` measures all but the exports, which are"]
    lines += [
        "`python benchmarks/export_scale.py`, and the score, `python examples/shapes/evaluate.py`; the JSON lies in"
    ]
    lines += ["`benchmarks/results/`."]
    return "\n".join(lines)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
