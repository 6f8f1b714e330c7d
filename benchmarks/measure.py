"""Clocks, and what else a call costs: launches, synchronisations, memory."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastrm_benchmarks.problems import Problem
from fastrm_benchmarks.providers import Provider
from torch import Tensor

MIN_ROUNDS, WARMUP = 10, 3
MAX_QUEUE = 256


@dataclass
class Call:
    run: Callable[[int], object]  # on the i-th inputs; what it returns is freed off the clock
    clear: Callable[[int], None] = lambda i: None  # the gradients that it left, likewise
    queue: int = 1  # pieces of work that keep a device busy while the call is submitted


@dataclass
class Samples:
    time: list[float] = field(default_factory=list)  # seconds: device time, on CPU the clock
    wall: list[float] = field(default_factory=list)  # until the result is there
    host: list[float] = field(default_factory=list)  # until the call returns
    queued: list[bool] = field(default_factory=list)  # submitted whole before the device began

    def summary(self) -> dict[str, Any]:
        p20, median, p80 = quantiles(self.time)
        found = {"time_s": median, "p20_s": p20, "p80_s": p80, "samples": len(self.time)}
        return found | {
            "wall_s": quantiles(self.wall)[1],
            "host_s": quantiles(self.host)[1] if self.host else None,
            "queued": sum(self.queued) / len(self.queued) if self.queued else None,
        }


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def cache_bytes(device: torch.device) -> int:
    """The L2 cache of a GPU; of a CPU the L2 caches of the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        each = int(size.removesuffix("K")) * 2**10
    except (OSError, ValueError):
        each = 2**21
    return each * torch.get_num_threads()


class CpuClock:
    """Wall clock. Cold inputs come from the caller, who rotates them."""

    def warm_up(self, call: Call, turn: Iterator[int]) -> None:
        for _ in range(WARMUP):
            self.sample(call, next(turn), Samples())

    def sample(self, call: Call, i: int, samples: Samples) -> None:
        begin = time.perf_counter()
        kept = call.run(i)
        seconds = time.perf_counter() - begin
        del kept
        call.clear(i)
        samples.time.append(seconds)
        samples.wall.append(seconds)


class CudaClock:
    """Events around a call for device time, then the clock around another for the host.

    A read of 3 L2 sizes goes before each: it leaves nothing of the inputs in the L2 and no dirty
    lines, and enough of them queue up that the device is still busy when the call is submitted.
    """

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.zeros(3 * cache_bytes(device) // 4, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def warm_up(self, call: Call, turn: Iterator[int]) -> None:
        """Also finds how long a queue hides the host; a call that waits for the device has none."""
        call.queue = 1
        for _ in range(WARMUP):
            self.sample(call, next(turn), Samples())
        while call.queue < MAX_QUEUE:
            trial = Samples()
            for _ in range(WARMUP):
                self.sample(call, next(turn), trial)
            call.queue *= 2  # once more than needed, so that a late host does not show either
            if all(trial.queued):
                return
        call.queue = 1

    def sample(self, call: Call, i: int, samples: Samples) -> None:
        torch.cuda.synchronize()
        for _ in range(call.queue):
            self.scratch.sum()
        self.start.record()
        kept = call.run(i)
        self.end.record()
        samples.queued.append(not self.start.query())
        self.end.synchronize()
        samples.time.append(self.start.elapsed_time(self.end) / 1e3)
        del kept
        call.clear(i)

        self.scratch.sum()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        kept = call.run(i)
        returned = time.perf_counter()
        torch.cuda.synchronize()
        samples.wall.append(time.perf_counter() - begin)
        samples.host.append(returned - begin)
        del kept
        call.clear(i)


def interleave(
    calls: Mapping[str, Call], clock: CpuClock | CudaClock, seconds: float
) -> dict[str, Samples]:
    """Every call once a round, in an order that rotates, for so long but MIN_ROUNDS at least."""
    names, turn = list(calls), itertools.count()
    for name in names:
        clock.warm_up(calls[name], turn)
    found = {name: Samples() for name in names}
    gc.collect()
    gc.disable()
    try:
        begin, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or time.perf_counter() - begin < seconds:
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                clock.sample(calls[name], next(turn), found[name])
            rounds += 1
    finally:
        gc.enable()
    return found


def cuda_costs(call: Call) -> dict[str, int]:
    """Memory beyond the inputs, and waits for the device, of one call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call.run(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    call.clear(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call.run(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    call.clear(0)
    syncs = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
    return {"peak_bytes": peak, "syncs": syncs}


def cuda_launches(call: Call) -> int | None:
    """Kernels and copies of one call; None where the profiler may not look at the device.

    The profiler may slow down what comes after it in a process, so nothing is timed then.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call.run(0)
        torch.cuda.synchronize()
    call.clear(0)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events()) or None


def saved(function: Provider, problem: Problem) -> dict[str, Any]:
    """Bytes that autograd keeps between forward and backward beside the inputs."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*problem.inputs())
    inputs = [x for x in problem.inputs() if isinstance(x, Tensor)]
    own = {x.untyped_storage().data_ptr() for x in inputs}
    return {
        "saved_bytes": sum(s.nbytes() for at, s in kept.items() if at not in own),
        "saves_hidden": problem.hidden.untyped_storage().data_ptr() in kept,
    }


def available_bytes() -> float:
    """Memory that a process can still have; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return float(next(found, math.inf)) * 2**10
