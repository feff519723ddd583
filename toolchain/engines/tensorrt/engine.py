"""TensorRT's runtime, and that of TensorRT for RTX: engines over opened plans, launched as captured CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.cuda.capacity import largest_open, warn_of_load, weight_bytes
from toolchain.cuda.capturing import CapturingMemory
from toolchain.cuda.driver import ALLOCATION, free_memory_bytes
from toolchain.cuda.memory import DeviceBuffer
from toolchain.cuda.staging import ALIGNMENT
from toolchain.engines.device_buffers import EngineBuffers
from toolchain.engines.tensorrt.library import Library
from toolchain.engines.tensorrt.open_plan import OpenPlan, read_facts
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec


class TensorRtMemory(CapturingMemory):
    """A GPU's memory and the plans that are open there."""

    def __init__(self, library: Library, cuda_graph: str = "step", kernel_specialization: str = "eager") -> None:
        """cuda_graph: see `CapturingMemory`; kernel_specialization: see `OpenPlan`."""
        super().__init__(cuda_graph)
        self._library, self._kernel_specialization = library, kernel_specialization
        self._plans: dict[Path, OpenPlan] = {}

    def take(self, folder: Path, weights: Mapping[str, Path]) -> OpenPlan:
        """The plan of a folder, opened once for all who use it at the same time."""
        if folder not in self._plans:
            with ALLOCATION:
                self._plans[folder] = OpenPlan(self._library, folder, weights, self._kernel_specialization)
        self._plans[folder].users += 1
        return self._plans[folder]

    def leave(self, plan: OpenPlan) -> None:
        """Releases a plan, and closes an unused one, unless it serves several buckets: the next will ask for it."""
        plan.users -= 1
        if not plan.users and (plan.profiles == 1 or self.closed):
            self._plans.pop(plan.folder).close()

    def close(self) -> None:
        """Plans that are in use are closed by those who use them."""
        for plan in [plan for plan in self._plans.values() if not plan.users]:
            self._plans.pop(plan.folder).close()
        super().close()


def open_memory(
    library: Library,
    folders: Sequence[Path],
    cuda_graph: str,
    open_buckets: int | None = None,
    kernel_specialization: str = "eager",
) -> TensorRtMemory:
    """The memory of a pipeline, with activations shared by the engines in `folders`. Warns where they will not fit.

    Raises EngineError.
    """
    facts = {folder: read_facts(folder) for folder in folders}
    needed = max((f["activation_bytes"] for f in facts.values()), default=0)
    weights = {
        folder: f["plan_bytes"] + (weight_bytes(folder.parent) if f["stripped"] else 0) for folder, f in facts.items()
    }
    warn_of_load(largest_open(weights, open_buckets), needed, free_memory_bytes())
    memory = TensorRtMemory(library, cuda_graph, kernel_specialization)
    memory.reserve(needed)
    return memory


class TensorRtEngine:
    """A plan at the shapes of one bucket. Every binding has a context; all contexts share the memory's scratch."""

    def __init__(self, folder: Path, weights: Mapping[str, Path], spec: GraphSpec, memory: TensorRtMemory) -> None:
        self.spec = spec
        self._memory = memory
        self._bindings: list[_Binding] = []
        self._launches: list[Callable[[], None]] = []
        self._buffers = EngineBuffers(spec, folder, memory, ALIGNMENT)
        self._plan: OpenPlan | None = memory.take(folder, weights)
        try:
            self._profile = self._plan.profile_of(spec)
        except BaseException:
            self.close()
            raise

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        """A launch on these buffers, captured as the memory captures. Raises EngineError."""
        assert self._plan is not None, "the engine is closed"
        with ALLOCATION:
            context = self._context(self._plan, self._buffers.by_tensor(buffers))
        binding = _Binding(context, self._memory.stream, self._plan.failure)
        self._bindings.append(binding)
        launch = self._memory.capture(binding, binding.capturable)
        self._launches.append(launch)
        self._plan.keep_kernels()
        return launch

    def close(self) -> None:
        """Waits for the GPU, frees contexts and buffers, and leaves the plan."""
        self._memory.release(*self._launches)
        with ALLOCATION:
            for binding in self._bindings:
                binding.context = None
        self._buffers.free()
        self._bindings, self._launches = [], []
        if self._plan is not None:
            self._memory.leave(self._plan)
        self._plan = None

    def _context(self, plan: OpenPlan, buffers: Mapping[str, DeviceBuffer]) -> Any:
        engine, context = plan.engine, plan.context()
        if context is None:
            raise plan.failure("TensorRT cannot make an execution context")
        if plan.profiles > 1:
            self._choose_profile(plan, context)
        block = self._memory.scratch(engine.device_memory_size_v2)
        context.set_device_memory(block.address, block.nbytes)
        refused = [name for name, b in buffers.items() if not context.set_tensor_address(name, b.address)]
        unknown = context.infer_shapes()
        if refused or unknown:
            raise plan.failure("TensorRT does not take the buffers", [f"refused: {', '.join([*refused, *unknown])}"])
        for tensor in self.spec.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if shape != tensor.shape:
                details = [f"{tensor.name} {list(shape)}, expected {list(tensor.shape)}"]
                raise plan.failure("the engine gives an output of another shape", details)
        return context

    def _choose_profile(self, plan: OpenPlan, context: Any) -> None:
        """Sets the shapes of the bucket. TensorRT copies what it computes from them on the stream of the launches."""
        try:
            chosen = context.set_optimization_profile_async(self._profile, self._memory.stream)
        except RuntimeError as error:  # how the binding reports a failure
            raise plan.failure("TensorRT does not take the bucket's shapes", [str(error)]) from error
        refused = [t.name for t in self.spec.inputs if not context.set_input_shape(t.name, t.shape)]
        if refused or not chosen:
            raise plan.failure("TensorRT does not take the bucket's shapes", [f"refused: {', '.join(refused)}"])


class _Binding:
    """Enqueues one execution context. Engine and caller share it, so that the engine can take the context away."""

    def __init__(self, context: Any, stream: int, failure: Callable[[str], EngineError]) -> None:
        self.context = context
        self._stream = stream
        self._failure = failure

    def capturable(self) -> bool:
        """Whether the library reports the work as capturable in a CUDA graph; assumed true if it cannot tell."""
        asked = getattr(self.context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._stream))

    def __call__(self) -> None:
        assert self.context is not None, "the engine is closed"
        if not self.context.execute_async_v3(self._stream):
            raise self._failure("TensorRT cannot run the engine")
