"""Everything that a machine with an NVIDIA GPU can tell, in order of worth, by one command.

    PYTHONPATH=. python3 benchmarks/gpu_run/run.py --output gpu-report

Each part is a process of its own with a deadline of its own, and writes OUTPUT/PART.json after each of its stages: one
that crashes, hangs or is too slow costs the others nothing, and what was measured is on disk whenever this is stopped.
OUTPUT/run.json says how each part ended, OUTPUT/run.log what all of them printed. See the README beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from benchmarks.gpu_run import packs
from benchmarks.gpu_run.record import ROOT, RUNNING, attempt, facts, write_json

HERE = "benchmarks.gpu_run"
GRACE_S = 5.0
LEAST_S = 15.0
"""A part that would have less time than this is not begun."""
TAIL = 4000  # characters of a part's output that go into its JSON


@dataclass(frozen=True)
class Part:
    """`run` is MODULE:FUNCTION; `needs` are packs without which it cannot begin, where packs were brought at all."""

    name: str
    run: str
    deadline_s: float
    needs: tuple[str, ...] = ()


PARTS = (
    Part("tests", f"{HERE}.gpu_tests:measure", 150),
    Part("torch_steps", f"{HERE}.torch_steps:measure", 150),
    Part("shapes", f"{HERE}.models:shapes", 240, ("build", "onnxruntime_gpu")),
    Part("rtx", f"{HERE}.rtx:measure", 90, ("rtx", "rtx_bundle")),
    Part("sd15", f"{HERE}.models:sd15", 420, ("build",)),
    Part("sdxl", f"{HERE}.models:sdxl", 560, ("build",)),
)


class Stopped(BaseException):
    """Somebody wants the whole run to end; the argument is the signal's number."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise Stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """One run over some parts; `ends` is when all of it must be over, on the monotonic clock."""

    def __init__(self, output: Path, packed: Path, seconds: float) -> None:
        self.output, self.packed = output, packed
        self.ends = time.monotonic() + seconds
        self.found: dict[str, Any] = {**facts(), "packs": {}, "parts": {}}

    def unpack(self) -> None:
        """Whatever has come whole."""
        for name, pack in packs.manifest(self.packed).items():
            missing = packs.lacking(self.packed, pack)
            if missing:
                self.found["packs"][name] = {"lacking": missing}
                continue
            started = time.monotonic()
            done = attempt(lambda n=name, p=pack: packs.unpack(self.packed, n, p))  # type: ignore[misc]
            self.found["packs"][name] = done if isinstance(done, dict) else {"seconds": _since(started)}
        self.write()

    def lacking(self, part: Part) -> str | None:
        """Why a part cannot begin yet."""
        for name in part.needs:
            state = self.found["packs"].get(name, {})
            if "error" in state:
                return f"{name} cannot be unpacked: {state['error']}"
            if "lacking" in state:
                return f"{name} waits for {', '.join(state['lacking'])}"
        return None

    def part(self, part: Part) -> None:
        """Runs it to its end, its deadline or the run's; its JSON is there afterwards, whatever happened."""
        path = self.output / f"{part.name}.json"
        reason = self.lacking(part)
        seconds = min(part.deadline_s, self.ends - time.monotonic())
        if reason is None and seconds < min(LEAST_S, part.deadline_s):
            reason = "no time is left"
        if reason is not None:
            self.ended(part, path, f"not begun: {reason}", 0, "")
            return
        self.found["parts"][part.name] = {"state": RUNNING}
        self.write()
        started = time.monotonic()
        with (self.output / "run.log").open("a+") as log:
            log.write(f"=== {part.name}\n")
            log.flush()
            begins = log.tell()
            process = self.start(part, path, log)
            stopped = None
            try:
                process.wait(seconds)
                state = _ending(process.returncode)
            except subprocess.TimeoutExpired:
                state = f"past its deadline of {seconds:.0f} s"
            except Stopped as caught:
                stopped, state = caught, f"stopped by {signal.Signals(caught.args[0]).name}"
            _end(process)
            log.seek(begins)
            self.ended(part, path, state, _since(started), log.read()[-TAIL:])
        if stopped is not None:
            raise stopped

    def start(self, part: Part, path: Path, log: IO[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"{HERE}.part", part.run, str(path), str(os.getpid())]
        # A process group, so that what the part starts ends with it; no session, which a machine might leave running.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(self.packed),
            cwd=ROOT,
            process_group=0,
        )

    def ended(self, part: Part, path: Path, state: str, seconds: float, said: str) -> None:
        """Completes what the part wrote, or writes it where it wrote nothing."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            shared = {name: self.found[name] for name in ("pretended", "machine", "versions")}
            found = {"part": part.name, "state": state, **shared, "stages": {}}
        stages = found["stages"]
        failed = [name for name, value in stages.items() if isinstance(value, dict) and {"error", "running"} & {*value}]
        found |= {"state": state, "seconds": seconds} | ({} if state == "done" else {"log": said})
        write_json(path, found)
        self.found["parts"][part.name] = {"state": state, "seconds": seconds, "failed": failed}
        self.write()
        print(
            f"{part.name}: {state}, {seconds:.0f} s" + (f", failed: {', '.join(failed)}" if failed else ""), flush=True
        )

    def write(self) -> None:
        write_json(self.output / "run.json", self.found)


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _ending(code: int) -> str:
    if code == 0:
        return "done"
    return f"failed with exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and what it started. One that hangs in the driver, where no signal reaches it, is left behind."""
    for number, grace in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def environment(packed: Path) -> dict[str, str]:
    """Of a part: what was brought along comes first, and CUDA's libraries are found where pip put them."""
    site = packed / "unpacked" / "site"
    libraries = [str(path) for place in sys.path if place for path in sorted(Path(place).glob("nvidia/*/lib"))]
    joined = {
        "PYTHONPATH": [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")],
        "LD_LIBRARY_PATH": [*libraries, os.environ.get("LD_LIBRARY_PATH", "")],
    }
    return {
        **os.environ,
        **{name: os.pathsep.join(dict.fromkeys(p for p in places if p)) for name, places in joined.items()},
        "DIFFBUILD_CACHE": str(packed / "cache"),
        "DIFFBUILD_GPU_RUN": str(packed),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in parts], help="[default: all]")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when all must be over  [default: never]")
    parser.add_argument("--packed", type=Path, default=ROOT / ".gpu_run", help="what pack.py wrote, and scratch space")
    chosen = parser.parse_args(arguments)
    for folder in (chosen.output, chosen.packed):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(chosen.output.absolute(), chosen.packed.absolute(), chosen.seconds)
    try:
        with stoppable():
            run.unpack()
            for part in parts:
                if not chosen.parts or part.name in chosen.parts:
                    run.part(part)
    except Stopped as stopped:
        return 128 + int(stopped.args[0])
    ended = run.found["parts"].values()
    return 0 if all(part["state"] == "done" and not part["failed"] for part in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
