"""`diffbuild doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from toolchain import api
from toolchain.cli.console import answer, examples, json_option, store_option, verbosity
from toolchain.cli.text import device_line, megabytes
from toolchain.terminal import table


@click.command(epilog=examples("diffbuild doctor", "diffbuild doctor --json"))
@store_option
@json_option
@verbosity
@click.pass_context
def doctor(ctx: click.Context, store: Path | None, as_json: bool) -> None:
    """Show what can run on this machine, and why not.

    Lists backends, library versions, CPU, GPU and the disk of the store. Exit code 0 when
    one backend at least works, 1 when none does.
    """
    facts = api.examine_machine(store)
    answer(as_json, lambda: facts, lambda: doctor_lines(facts))
    ctx.exit(0 if facts["works"] else 1)


def doctor_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What `doctor` prints."""
    from toolchain.engines.onnxruntime.package import EITHER

    store, cpu = facts["store"], facts["cpu"]
    rows = [
        ["diffbuild", f"{facts['versions']['diffbuild']}, Python {facts['versions']['python']}, {facts['system']}"],
        ["cpu", f"{cpu['features']}, {cpu['physical_cores']} physical cores"],
    ]
    rows += [["gpu", ", ".join(gpu.values())] for gpu in facts["gpus"]] or [["gpu", f"none: {facts['no_gpu']}"]]
    for name, backend in facts["backends"].items():
        rows.append([f"backend {name}", _backend_line(backend)])
    for use, versions in facts["libraries"].items():
        listed = ", ".join(f"{name} {number}" for name, number in versions.items() if number) or "nothing"
        missing = facts["missing"][use]
        rows.append([f"for {use}", listed + (f"; missing: {', '.join(missing)}" if missing else "")])
    state = "" if store["exists"] else ", not there yet"
    state += "" if store["writable"] else ", not writable"
    rows.append(["store", f"{store['path']}{state}, {megabytes(store['free_bytes'])} free"])
    rows.append(["recommended", _recommendation_line(facts["recommended"])])
    yield from table(rows, indent="")
    for line in facts["advisories"]:
        yield f"warning: {line}"
    if facts["missing"]["build"]:
        yield "hint: pip install 'diffbuild[build]' installs what a build needs"
    if not facts["works"]:
        yield f"no backend can run here. hint: {EITHER}"


def _recommendation_line(recommended: Mapping[str, Any]) -> str:
    dtype, lacks = recommended["dtype"], recommended["lacks"]
    what = recommended["backend"] + (f" in {dtype}" if dtype else "")
    return f"{what}: {recommended['reason']}" + (f"; it cannot run yet: {lacks}" if lacks else "")


def _backend_line(backend: Mapping[str, Any]) -> str:
    if backend["works"]:
        return f"works: {device_line(backend['device'])}"
    if backend["builds"]:
        return f"builds here, runs on an NVIDIA GPU ({backend['reason']}): {device_line(backend['device'])}"
    return f"cannot run: {backend['reason']}"
