"""Builder configuration, optimization profiles and the timing cache."""

from __future__ import annotations

import json
from typing import Any

from tensorrt._enums import (
    BuilderFlag,
    EngineCapability,
    HardwareCompatibilityLevel,
    MemoryPoolType,
    PreviewFeature,
    ProfilingVerbosity,
    RuntimePlatform,
    Severity,
    TilingOptimizationLevel,
)
from tensorrt._interfaces import Buffer, Dims, IHostMemory, IProgressMonitor, Reporter, padded
from tensorrt._rules import VERSION, Made, at_least, gpu, initialised

REFITS = ("REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL")
"""Of which the last one that is set holds."""
MAX_LEVEL = 5


class IOptimizationProfile(Made):
    """`set_shape` takes what is no range; the config does not take the profile then. What is no shape raises."""

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        for shape in (min, opt, max):
            if not all(hasattr(size, "__index__") for size in shape) or len(shape) > Dims.MAX_DIMS:
                raise TypeError(f"set_shape(): incompatible function arguments: {shape!r} is no shape")
        shapes = [tuple(int(d) for d in s) for s in (min, opt, max)]
        for name, shape in zip(("min", "opt", "max"), shapes, strict=True):
            if any(size < 0 for size in shape):
                self._report.error("IOptimizationProfile::setDimensions: Error Code 3: Parameter check failed")
                raise RuntimeError(f"Shape provided for {name} is inconsistent with other shapes.")
        self._shapes[input] = shapes

    def __bool__(self) -> bool:
        return not self._bad()

    def _bad(self) -> list[str]:
        """Inputs whose shapes are no range."""
        return [
            name
            for name, shapes in self._shapes.items()
            if len({len(shape) for shape in shapes}) > 1
            or not all(low <= best <= high for low, best, high in zip(*shapes, strict=True))
        ]

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(s) for s in self._shapes.get(input, [])]

    @property
    def extra_memory_target(self) -> float:
        return self._extra_memory_target

    @extra_memory_target.setter
    def extra_memory_target(self, value: float) -> None:
        if 0 <= value <= 1:
            self._extra_memory_target = value


class ITimingCache(Made):
    """Grows by one entry for each new (operator, shapes, dtypes) that a build times."""

    def serialize(self) -> IHostMemory:
        data = {"version": self._version, "gpu": self._gpu, "entries": sorted(self._entries)}
        return IHostMemory(padded(b"FAKECACHE" + json.dumps(data).encode()))

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._version != self._version or (input_cache._gpu != self._gpu and not ignore_mismatch):
            return False
        self._entries.update(input_cache._entries)
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


def _read_cache(data: bytes, report: Reporter) -> ITimingCache:
    """What cannot be read gives an empty cache and words in the log."""
    empty = ITimingCache._make(version=VERSION, gpu=gpu(), entries=set())
    if not data:
        return empty
    try:
        assert data.startswith(b"FAKECACHE")
        content = json.loads(data[9:])
        assert content["version"] == VERSION
    except (AssertionError, ValueError, KeyError):
        report.error("createTimingCache: the serialized timing cache is corrupt or of another version")
        report(Severity.WARNING, "The timing cache will not be used!")
        return empty
    return ITimingCache._make(version=content["version"], gpu=content["gpu"], entries=set(content["entries"]))


class IBuilderConfig(Made):
    """Every option of the binding that a build may set; those without effect here are stored."""

    def reset(self) -> None:
        self._set_defaults()

    def _set_defaults(self) -> None:
        self._flags = 1 << int(BuilderFlag.TF32)
        self._pools: dict[MemoryPoolType, int] = {}
        self._previews: dict[PreviewFeature, bool] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._monitor: IProgressMonitor | None = None
        self._values: dict[str, Any] = {}

    def set_flag(self, flag: BuilderFlag) -> None:
        others = sum(1 << int(BuilderFlag[name]) for name in REFITS if flag.name in REFITS and name != flag.name)
        if self._flags & others:
            self._report(
                Severity.WARNING,
                "Unset previous flag because kREFIT, kREFIT_INDIVIDUAL and kREFIT_IDENTICAL are mutually exclusive.",
            )
        self._flags = self._flags & ~others | 1 << int(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def flags(self) -> int:
        return self._flags

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = int(value)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        if pool_size < 0:
            raise TypeError(f"set_memory_pool_limit(): incompatible function arguments: {pool_size} is no size_t")
        self._pools[pool] = int(pool_size)

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._pools.get(pool, 80 << 30)

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        self._previews[feature] = enable

    def get_preview_feature(self, feature: PreviewFeature) -> bool:
        return self._previews.get(feature, False)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            self._report.error(
                "IOptimizationProfile::isValid: Error Code 4: API Usage Error (Invalid optimization profiles for input "
                f"tensors {', '.join(profile._bad())}, please ensure that they satisfy MIN<=OPT<=MAX.)"
            )
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: Buffer) -> ITimingCache:
        return _read_cache(bytes(memoryview(serialized_timing_cache)), self._report)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._gpu != gpu() and not ignore_mismatch:
            self._report.error(f"setTimingCache: the timing cache was made on {cache._gpu}, not on {gpu()}")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    @property
    def progress_monitor(self) -> IProgressMonitor:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, value: IProgressMonitor | None) -> None:
        if value is not None:
            initialised(value)
        self._monitor = value


def _option(name: str, kind: Any, default: Any) -> None:
    def get(self: Any) -> Any:
        return self._values.get(name, default)

    def set_(self: Any, value: Any) -> None:
        wrong = not hasattr(value, "__index__") if kind is int else False
        if wrong or (kind is not int and not isinstance(value, kind)):
            raise TypeError(f"IBuilderConfig.{name}: incompatible value {value!r}, expected {kind.__name__}")
        if name == "builder_optimization_level":
            if value < 0:
                self._report.error("IBuilderConfig::setBuilderOptimizationLevel: Error Code 3: Parameter check failed")
                return
            value = min(int(value), MAX_LEVEL)
        if name == "max_aux_streams" and value < 0:
            self._report(Severity.WARNING, f"nbStreams {value} should not be negative, it has no effect.")
            return
        self._values[name] = value

    setattr(IBuilderConfig, name, property(get, set_))


for _name, _kind, _default in (
    ("builder_optimization_level", int, 3),
    ("max_aux_streams", int, -1),
    ("max_num_tactics", int, -1),
    ("avg_timing_iterations", int, 1),
    ("l2_limit_for_tiling", int, 0),
    ("profile_stream", int, 0),
    ("profiling_verbosity", ProfilingVerbosity, ProfilingVerbosity.LAYER_NAMES_ONLY),
    ("hardware_compatibility_level", HardwareCompatibilityLevel, HardwareCompatibilityLevel.NONE),
    ("tiling_optimization_level", TilingOptimizationLevel, TilingOptimizationLevel.NONE),
    ("runtime_platform", RuntimePlatform, RuntimePlatform.SAME_AS_BUILD),
    ("engine_capability", EngineCapability, EngineCapability.STANDARD),
    *([("build_route", str, "")] if at_least(11, 1) else []),
):
    _option(_name, _kind, _default)
if at_least(11, 1):
    IBuilderConfig.all_build_routes = property(lambda self: '{"-fake-knob": ["0", "1"]}')
