"""Compiled models of OpenVINO, as building makes and running opens them, and the files of an engine."""

from __future__ import annotations

from toolchain.engines.cpu import physical_cores
from toolchain.recipe.options import OpenVinoOptions

BLOB = "model.blob"
WEIGHTS = "weights.safetensors"
BLOB_DIGEST, WEIGHT_BYTES = "blob_sha256", "file_bytes"
"""Keys of `engine.json`: what an engine was exported as, and the length of the weight file that it points into."""


def settings(options: OpenVinoOptions) -> dict[str, str]:
    """Properties of a compiled model under these options, by OpenVINO's names.

    Under ACCURACY every operator keeps the type that it has in the graph. Under PERFORMANCE, the default, a CPU that
    has bfloat16 computes float32 graphs in it. OPTIMIZE_SIZE leaves out of an exported model what a weight file holds.
    """
    shared = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY", "CACHE_MODE": "OPTIMIZE_SIZE"}
    if options.device != "CPU":
        return shared
    return shared | {
        "INFERENCE_NUM_THREADS": str(options.threads or physical_cores()),
        "NUM_STREAMS": "1",  # a pipeline launches one engine at a time, on all threads
        "ENABLE_CPU_PINNING": "YES" if options.pin_threads else "NO",
        "MODEL_DISTRIBUTION_POLICY": "TENSOR_PARALLEL" if options.tensor_parallel else "",
    }


def explained(error: RuntimeError) -> str:
    """The last line of an error of OpenVINO, which says what is wrong; those before it name places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
