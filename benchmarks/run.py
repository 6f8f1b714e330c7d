"""Points in, JSON lines out: every provider is checked, then timed beside the others.

Letters: N groups, M candidates, T rows of hidden, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastrm_benchmarks import check, measure
from fastrm_benchmarks.measure import Call, CpuClock, CudaClock
from fastrm_benchmarks.problems import (
    DTYPES,
    KINDS,
    LAYOUTS,
    LOSSES,
    MB,
    Point,
    Problem,
    make_problem,
    sweeps,
)
from fastrm_benchmarks.providers import (
    CLONES,
    COMPILE,
    MAX_LOOP,
    NAMES,
    SMALLEST,
    Provider,
    cloner,
    provider,
    smallest,
    why_not,
)
from torch import Tensor

from fastrm.environment import environment

Row = dict[str, Any]
Plan = Mapping[str, tuple[Sequence[Point], Sequence[str]]]  # of each sweep, points and providers
GRAPH_BYTES = 16 * MB  # M·D up to where launches are worth a CUDA graph
CPU_MEMORY = 10  # what a point may take, in units of hidden: the reference works in fp32


class Skip(Exception):
    """A provider that is not meant for a point."""


class Wrong(Exception):
    """A provider that does not give the loss or its gradients."""


def bench(
    plan: Plan,
    device: torch.device,
    seconds: float,
    output: Path | None = None,
    command: str = "",
) -> tuple[list[Row], list[Path]]:
    """Measure; write a file for each sweep, or one to `output`. Returns all rows and the files."""
    title = device_title(device)
    folder = results_folder() / re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    head = {"environment": environment() | _machine(device, title), "command": command}
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    rows: list[Row] = []
    paths: list[Path] = []
    with Progress(sum(len(points) for points, _ in plan.values())) as progress:
        for sweep, (points, names) in plan.items():
            path = output or folder / f"{sweep}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if path in paths else "w") as file:
                if path not in paths:
                    print(json.dumps(head), file=file)
                    paths.append(path)
                for point in points:
                    progress.begin(str(point))
                    for row in measure_point(
                        point, names, device, clock, seconds, progress.step,
                        count_launches=sweep == "costs" and device.type == "cuda",
                    ):  # fmt: skip
                        rows.append({"sweep": sweep, **rounded(row)})
                        print(json.dumps(rows[-1]), file=file, flush=True)
                    progress.end()
    return rows, paths


def measure_point(
    point: Point,
    names: Sequence[str],
    device: torch.device,
    clock: CpuClock | CudaClock,
    seconds: float,
    step: Callable[[str], None] = lambda text: None,
    count_launches: bool = False,
) -> list[Row]:
    """A row for each provider and mode, or one where the memory does not suffice for any."""
    if any(name.endswith(COMPILE) for name in names):
        torch.compiler.reset()
    available = measure.available_bytes() if device.type == "cpu" else math.inf
    try:
        if CPU_MEMORY * point.num_rows * point.row_bytes > available:
            raise torch.OutOfMemoryError(f"{available / 2**30:.1f} GiB are available")
        names = list(dict.fromkeys(["clone", *names]))
        return _measure_point(point, names, device, clock, seconds, step, count_launches)
    except torch.OutOfMemoryError as e:
        return [{**asdict(point), **_outcome(e, "")}]
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_point(
    point: Point,
    names: Sequence[str],
    device: torch.device,
    clock: CpuClock | CudaClock,
    seconds: float,
    step: Callable[[str], None],
    count_launches: bool,
) -> list[Row]:
    step("inputs")
    problem = make_problem(point, device)
    exact = check.exact(problem)
    base = {**asdict(point), "num_groups": len(problem.offsets) - 1, "longest": problem.longest}
    rows: list[Row] = []
    counted: list[tuple[Row, Call]] = []
    functions: dict[str, Provider] = {}
    facts: dict[str, Row] = {}
    for name in names:
        if name in (*CLONES, SMALLEST):
            continue
        step(f"check {name}")
        try:
            functions[name], facts[name] = _checked(name, problem, exact)
        except Exception as e:  # whoever breaks down is reported, and the others are measured
            rows.append({**base, "provider": name, **_outcome(e, name)})
        problem.clear()

    # On CUDA the clock itself sees to a cold cache.
    rotation = 1
    if device.type == "cpu":
        rotation += 3 * measure.cache_bytes(device) // (point.num_rows * point.row_bytes)
    problems = [problem, *(problem.fresh(copy=True) for _ in range(rotation - 1))]
    modes = ["forward", "forward_backward"]
    if device.type == "cuda" and point.hidden_bytes <= GRAPH_BYTES:
        modes.append("graph")
    for mode in modes:
        calls: dict[str, Call] = {}
        for name in [n for n in names if n in (*CLONES, SMALLEST) or n in functions]:
            what = {**base, "provider": name, "mode": mode}
            try:
                if name in CLONES:
                    calls[name] = _clone(name, problems, mode)
                elif name == SMALLEST:
                    calls[name] = _smallest(device, mode)
                elif mode == "graph":
                    calls[name] = _graph(name, functions[name], problem, exact)
                else:
                    calls[name] = _calls(functions[name], problems, mode)
            except Exception as e:
                rows.append({**what, **_outcome(e, name)})
        step(f"time {mode}")
        samples = measure.interleave(calls, clock, seconds)
        clone_s = samples["clone"].summary()["time_s"]
        for name, call in calls.items():
            found = samples[name].summary()
            moved = point.clone_bytes if name in CLONES else point.limit_bytes(mode)
            row = {**base, "provider": name, "mode": mode, **found}
            if name != SMALLEST:
                row |= {"limit_bytes": moved, "gb_per_s": moved / found["time_s"] / 1e9}
            row["of_clone"] = found["time_s"] / clone_s
            row["rotation"] = rotation
            if device.type == "cuda" and mode != "graph":
                row |= measure.cuda_costs(call)
            rows.append(row | facts.get(name, {}))
            if count_launches and mode != "graph":
                counted.append((rows[-1], call))
    for row, call in counted:
        row["launches"] = measure.cuda_launches(call)
    return rows


def _checked(name: str, problem: Problem, exact: check.Exact) -> tuple[Provider, Row]:
    """The provider and what is known without a clock: errors, and what it saves for backward."""
    if name == "eager-loop" and len(problem.offsets) > MAX_LOOP + 1:
        raise Skip(f"more than {MAX_LOOP} groups")
    if name == "sentence-transformers" and problem.longest * (
        len(problem.offsets) - 1
    ) != problem.point.candidates:
        raise Skip("its lists are made for groups of one size")
    function = provider(name, problem.point.loss)
    if function is None:
        raise Skip(f"not for {problem.point.loss}")
    errors = check.errors(problem, _forward_backward(function, problem), exact)
    wrong = check.verdict(name, problem.point.dtype, errors)
    if wrong:
        raise Wrong(wrong)
    return function, {"errors": errors, **measure.saved(function, problem)}


def _forward_backward(function: Provider, problem: Problem) -> Tensor:
    loss = function(*problem.inputs())
    loss.backward(problem.grad)
    return loss


def _calls(function: Provider, problems: Sequence[Problem], mode: str) -> Call:
    n = len(problems)
    if mode == "forward":
        inputs = [p.inputs() for p in problems]
        return Call(lambda i: function(*inputs[i % n]))
    return Call(
        lambda i: _forward_backward(function, problems[i % n]), lambda i: problems[i % n].clear()
    )


def _clone(name: str, problems: Sequence[Problem], mode: str) -> Call:
    """A clone of as many rows as make the bytes of the limit: all of hidden if it is packed."""
    point, n = problems[0].point, len(problems)
    half = (point.candidates + point.num_rows) // 2
    sources = [p.hidden.detach().flatten(0, -2)[:half] for p in problems]
    clone = cloner(name, sources[0])
    if mode == "graph":
        graph, _ = _capture(lambda: clone(sources[0]), lambda: None)
        return Call(lambda i: graph.replay())
    return Call(lambda i: clone(sources[i % n]))


def _smallest(device: torch.device, mode: str) -> Call:
    leaf = torch.zeros((), device=device, requires_grad=True)
    if mode == "graph":
        raise Skip("there is nothing to capture")
    if mode == "forward":
        return Call(lambda i: smallest(leaf))
    return Call(lambda i: smallest(leaf).backward(), lambda i: setattr(leaf, "grad", None))


def _graph(name: str, function: Provider, problem: Problem, exact: check.Exact) -> Call:
    """Replay of forward and backward, checked too."""
    if name in ("eager-loop", "sentence-transformers"):
        raise Skip("it waits for the device, which a graph cannot")
    own = problem.fresh()  # gradients of a graph lie where it was captured
    graph, loss = _capture(lambda: _forward_backward(function, own).detach(), own.clear)
    graph.replay()
    wrong = check.verdict(name, problem.point.dtype, check.errors(own, loss, exact))
    if wrong:
        raise Wrong(wrong)
    return Call(lambda i: graph.replay())


def _capture(
    run: Callable[[], Tensor], clear: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(measure.WARMUP):  # what happens once must not be captured
            run()
            clear()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    return graph, kept


def rounded(row: Row) -> Row:
    """Four digits, which is more than clocks are good for."""
    return {
        k: float(f"{v:.4g}") if isinstance(v, float) else rounded(v) if isinstance(v, dict) else v
        for k, v in row.items()
    }


def _outcome(error: Exception, name: str) -> Row:
    """Why there is no time: `failed` is a mistake of ours, and the exit code."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return {"skipped": f"out of memory: {text}"}
    if isinstance(error, Skip):
        return {"skipped": text}
    if isinstance(error, Wrong):
        return {"failed": text}
    # What the compiler cannot compile is no mistake of plain PyTorch code.
    plain = name.endswith(COMPILE) and name.startswith(("eager-", "fastrm-torch"))
    kind = "skipped" if plain else "failed"
    return {kind: f"{type(error).__name__}: {text}"}


def choose(args: argparse.Namespace) -> tuple[Plan, torch.device]:
    """What the options of `fastrm bench` ask for.

    Raises:
        ValueError: an option that does not exist here, with those that do.
    """
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    one_of("--device", kind, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.providers or [n for n in NAMES if why_not(n, kind) is None]
    for name in names:
        one_of("--providers", name, NAMES)
        reason = why_not(name, kind)
        if reason:
            raise ValueError(f"--providers {name}: {reason}")
    known = sweeps(kind)
    asked = args.sweep or ["quick"]
    for name in asked:
        one_of("--sweep", name, [*known, "all"])
    if "all" in asked:
        asked = [name for name in known if name != "quick"]
    plan = {name: (known[name], names) for name in known if name in asked}
    if not args.providers:
        for name, (points, _) in plan.items():
            # A peer's lists take long to make, and compiling for each point longer.
            without = [] if name == "losses" else ["sentence-transformers"]
            if name in ("hidden", "losses"):
                without += [n for n in names if n.endswith(COMPILE)]
            plan[name] = (points, [n for n in names if n not in without])
    options = {
        "candidates": args.candidates, "hidden_size": args.hidden_size, "dtype": args.dtype,
        "groups": args.groups, "layout": args.layout, "loss": args.loss,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        if args.candidates is None or args.sweep:
            raise ValueError("one point is --candidates M and what belongs to it, without --sweep")
        point = Point(**given)
        one_of("--dtype", point.dtype, DTYPES)
        one_of("--layout", point.layout, LAYOUTS)
        one_of("--loss", point.loss, LOSSES)
        if not (point.groups.isdecimal() and int(point.groups) > 0):
            one_of("--groups", point.groups, ["K", *KINDS])
        elif int(point.groups) > point.candidates:
            raise ValueError(f"--groups must be at most --candidates, {point.candidates}, got "
                             f"{point.groups}")  # fmt: skip
        plan = {"custom": ([point], names)}
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    return plan, torch.device(kind)


def one_of(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}; got {value!r}")


def device_title(device: torch.device) -> str:
    """The device's name, and for a CPU the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.sub(r"\(R\)|\(TM\)|CPU|@.*", "", environment()["cpu"].partition(",")[0])
    return f"{' '.join(name.split())}, {torch.get_num_threads()} threads"


def _machine(device: torch.device, title: str) -> dict[str, str]:
    """What decides about memory, beside the versions."""
    found = {"device": title, "cache": f"{measure.cache_bytes(device) / MB:.1f} MiB"}
    found["load"] = f"{os.getloadavg()[0]:.1f} at the start"
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if device.type == "cpu" and pages.exists():
        found["huge pages"] = pages.read_text().partition("[")[2].partition("]")[0]
    return found


def results_folder() -> Path:
    here = Path(__file__).resolve().parent
    in_checkout = (here.parent / "pyproject.toml").exists()
    return here / "results" if in_checkout else Path("fastrm-bench")


class Progress:
    """A bar on a terminal that has tqdm, else two lines for each point, on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.bar = total, 0, None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="point", leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, what: str) -> None:
        self.what, self.started = what, time.perf_counter()
        if self.bar is None:
            print(f"[{self.number + 1}/{self.total}] {what} ...", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{self.what}: {text}")

    def end(self) -> None:
        self.number += 1
        if self.bar is not None:
            self.bar.update()
            return
        seconds = time.perf_counter() - self.started
        print(f"[{self.number}/{self.total}] {seconds:.0f} s", file=sys.stderr, flush=True)
