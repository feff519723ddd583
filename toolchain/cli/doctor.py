"""What `diffbuild doctor` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolchain.cli.output import device_line, megabytes
from toolchain.terminal import table


def _backend_line(backend: Mapping[str, Any]) -> str:
    if backend["works"]:
        return f"works: {device_line(backend['device'])}"
    if backend["builds"]:
        return f"builds here, runs on an NVIDIA GPU ({backend['reason']}): {device_line(backend['device'])}"
    return f"cannot run: {backend['reason']}"


def doctor_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    from toolchain.engines.onnxruntime.package import EITHER

    store, cpu = facts["store"], facts["cpu"]
    rows = [
        ["diffbuild", f"{facts['versions']['diffbuild']}, Python {facts['versions']['python']}, {facts['system']}"],
        ["cpu", f"{cpu['features']}, {cpu['physical_cores']} physical cores"],
    ]
    rows += [["gpu", ", ".join(gpu.values())] for gpu in facts["gpus"]] or [["gpu", f"none: {facts['no_gpu']}"]]
    for name, backend in facts["backends"].items():
        rows.append([f"backend {name}", _backend_line(backend)])
    for use, found in facts["libraries"].items():
        listed = ", ".join(f"{name} {number}" for name, number in found.items() if number) or "nothing"
        missing = facts["missing"][use]
        rows.append([f"for {use}", listed + (f"; missing: {', '.join(missing)}" if missing else "")])
    state = "" if store["exists"] else ", not there yet"
    state += "" if store["writable"] else ", not writable"
    rows.append(["store", f"{store['path']}{state}, {megabytes(store['free_bytes'])} free"])
    yield from table(rows, indent="")
    for line in facts["advisories"]:
        yield f"warning: {line}"
    if facts["missing"]["build"]:
        yield "hint: pip install 'diffbuild[build]' installs what a build needs"
    if not facts["works"]:
        yield f"no backend can run here. hint: {EITHER}"
