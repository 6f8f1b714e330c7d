"""The benchmarks: that every contender does the job, that a wrong one is refused, what is written.

`pytest tests/test_benchmarks.py --benchmark-enable` times the contenders; otherwise each runs once.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import signal
from dataclasses import replace
from typing import Any

import problems as test_problems
import pytest
import torch
from fastrm_benchmarks import check, measure, providers, report, run
from fastrm_benchmarks.problems import (
    DTYPES,
    LOSSES,
    Point,
    make_offsets,
    make_problem,
    sized,
    sweeps,
)

from fastrm import cli

CPU = torch.device("cpu")
HERE = [n for n in providers.OF_LOSS["listwise"]
        if n != "sentence-transformers" and providers.why_not(n, "cpu") is None]  # fmt: skip
SMALL = Point(48, 96, "fp32", "uniform")


def outcome(name, problem):
    """The errors of a provider and the verdict on them."""
    loss = providers.provider(name, problem.point.loss)(*problem.inputs())
    loss.backward(problem.grad)
    errors = check.errors(problem, loss, check.exact(problem))
    return errors, check.verdict(name, problem.point.dtype, errors)


@pytest.mark.parametrize("layout", ["packed", "gathered", "last"])
@pytest.mark.parametrize("groups", ["2", "8", "uniform", "zipf", "giant"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HERE)
def test_every_provider_gives_the_loss_and_its_gradients(name, dtype, groups, layout):
    errors, wrong = outcome(name, make_problem(Point(60, 104, dtype, groups, layout), CPU))
    assert wrong is None, errors


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("groups", ["2", "8", "uniform"])
@pytest.mark.parametrize("layout", ["packed", "gathered"])
def test_every_provider_and_peer_gives_every_loss(loss, groups, layout):
    for name in providers.OF_LOSS[loss]:
        if name == "fastrm-triton" or providers.why_not(name, "cpu") is not None:
            continue
        if name == "sentence-transformers" and groups == "uniform":
            continue  # the mean of RankNet's pairs is that over the groups' if they are alike
        for dtype in ("bf16", "fp32"):
            point = Point(64, 104, dtype, groups, layout, loss)
            errors, wrong = outcome(name, make_problem(point, CPU))
            assert wrong is None, (name, errors)


@pytest.mark.parametrize("name", ["fastrm-torch+compile"])
def test_a_compiled_provider_does_too(name):
    errors, wrong = outcome(name, make_problem(SMALL, CPU))
    assert wrong is None, errors


@pytest.mark.parametrize("layout", ["packed", "gathered", "last"])
def test_the_check_agrees_with_the_oracle_of_the_other_tests(layout):
    problem = make_problem(replace(SMALL, layout=layout), CPU, seed=3)
    exact = check.exact(problem)
    leaves = (problem.hidden.detach(), problem.weight.detach(), problem.bias.detach())
    oracle = test_problems.Problem(
        *leaves, problem.offsets, problem.target, {"rows": problem.rows}
    ).oracle(problem.grad)
    assert test_problems.error(exact.loss, oracle["loss"]) < 1e-14
    assert test_problems.error(exact.dweight, oracle["dweight"]) < 1e-13
    for name in ("hidden", "weight"):
        getattr(problem, name).grad = oracle[f"d{name}"].float()
    errors = check.errors(problem, oracle["loss"], exact)
    assert errors["loss"] < 1e-14 and max(errors.values()) < 1e-7


def wrong_loss(*inputs):
    return 1.001 * providers.eager_segment(*inputs)


def wrong_dhidden(hidden, *rest):
    """The right loss; one row of hidden gets no gradient."""
    mask = torch.ones(len(hidden), 1).index_fill(0, torch.tensor([5]), 0)
    return providers.eager_segment(mask * hidden + ((1 - mask) * hidden).detach(), *rest)


def wrong_dweight(hidden, weight, *rest):
    return providers.eager_segment(hidden, 1.01 * weight - 0.01 * weight.detach(), *rest)


def no_dweight(hidden, weight, *rest):
    return providers.eager_segment(hidden, weight.detach(), *rest)


def crash(*inputs):
    raise RuntimeError("out of order\nand more")


@pytest.mark.parametrize(
    "broken, says",
    [
        (wrong_loss, "loss is off by 1.0e-03 of its norm, limit 1e-04"),
        (wrong_dhidden, "dhidden is off by"),
        (wrong_dweight, "dweight is off by"),
        (no_dweight, "RuntimeError: backward left no gradient"),
        (crash, "RuntimeError: out of order"),
    ],
)
def test_a_wrong_provider_is_refused_and_not_timed(monkeypatch, broken, says):
    monkeypatch.setitem(providers.OF_LOSS["listwise"], "eager-padded", broken)
    names = ["eager-padded", "eager-segment"]
    rows = run.measure_point(SMALL, names, CPU, measure.CpuClock(), 0)
    (refused,) = (row for row in rows if row["provider"] == "eager-padded")
    assert refused["failed"].startswith(says) and "time_s" not in refused
    timed = {(r["provider"], r["mode"]) for r in rows if "time_s" in r}
    modes = ("forward", "forward_backward")
    assert timed == {(n, m) for n in ("clone", "eager-segment") for m in modes}


def test_a_nan_is_wrong():
    assert check.verdict("eager-loop", "bf16", {"loss": math.nan})


def test_fastrm_is_held_to_limits_of_its_own():
    errors = {"loss": 1e-5, "dhidden": 1e-2}
    assert check.verdict("eager-padded", "bf16", errors) is None
    for name in ("fastrm-cpp", "fastrm-torch+compile"):
        assert check.verdict(name, "bf16", {"loss": 1e-6, "dhidden": 4e-3}) is None
        assert "loss is off by" in check.verdict(name, "bf16", {"loss": 1e-5})
        assert "dhidden is off by" in check.verdict(name, "bf16", {"dhidden": 1e-2})


@pytest.mark.parametrize("layout", ["gathered", "last"])
def test_a_gradient_in_a_row_that_is_no_candidate_is_wrong(layout):
    problem = make_problem(replace(SMALL, layout=layout), CPU)
    providers.eager_segment(*problem.inputs()).backward(problem.grad)
    loss, exact = providers.eager_segment(*problem.inputs()), check.exact(problem)
    assert check.errors(problem, loss, exact)["dhidden"] < 1e-5
    grad = problem.hidden.grad.flatten(0, -2)
    others = torch.ones(len(grad), dtype=torch.bool).index_fill(0, problem.rows, False)
    grad[others.nonzero()[-1]] = grad.abs().max()
    assert check.errors(problem, loss, exact)["dhidden"] > 1e-2


def test_the_rows_compared_are_spread_from_first_to_last():
    assert check._spread(10, 4, CPU).tolist() == [0, 3, 6, 9]
    assert check._spread(3, 4, CPU).tolist() == [0, 1, 2]


def test_bytes():
    packed = Point(100, 576, "bf16")
    assert packed.hidden_bytes == packed.limit_bytes("forward") == 100 * 576 * 2
    assert packed.limit_bytes("forward_backward") == 2 * 100 * 576 * 2
    last = Point(100, 576, "fp32", layout="last")
    assert last.num_rows == 3200
    assert last.limit_bytes("forward_backward") == (100 + 3200) * 576 * 4
    assert sized(64 * 2**20) == Point(8192, 4096, "bf16")
    assert sized(2**30, 896, "fp32").hidden_bytes == pytest.approx(2**30, rel=1e-5)


@pytest.mark.parametrize("name", providers.CLONES)
def test_clones_are_equal(name):
    x = torch.randn(33, 7).bfloat16()
    copy = providers.cloner(name, x)(x)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("layout", ["packed", "gathered", "last"])
def test_the_clone_moves_the_bytes_of_the_limit(layout):
    point = Point(64, 32, "fp32", layout=layout)
    call = run._clone("clone", [make_problem(point, CPU)], "forward")
    assert 2 * call.run(0).nbytes == point.limit_bytes("forward_backward")


def test_groups_and_sweeps():
    generator = torch.Generator().manual_seed(0)
    for groups in ("1", "3", "uniform", "zipf", "giant"):
        offsets = make_offsets(groups, 1000, generator)
        assert offsets[0] == 0 and offsets[-1] == 1000 and (offsets.diff() > 0).all()
    for device in ("cpu", "cuda"):
        found = sweeps(device)
        names = ["quick", "small", "size", "hidden", "ragged", "layout", "losses", "costs"]
        assert list(found) == names
        most = max(p.hidden_bytes for points in found.values() for p in points)
        assert most == (2**32 if device == "cuda" else 2**30)
        assert all(len(set(points)) == len(points) for points in found.values())


def test_quantiles():
    assert measure.quantiles([float(x) for x in range(101)]) == (20, 50, 80)
    assert measure.quantiles([3.0, 1.0]) == pytest.approx((1.4, 2.0, 2.6))
    samples = measure.Samples([3.0, 1.0], [10.0, 30.0], [5.0, 7.0], [True, False])
    assert samples.summary() == {
        "time_s": 2, "p20_s": pytest.approx(1.4), "p80_s": pytest.approx(2.6), "samples": 2,
        "wall_s": 20, "host_s": 6, "queued": 0.5,
    }  # fmt: skip


def test_memory_and_caches_in_bytes(monkeypatch):
    files = {"/proc/meminfo": "MemTotal:  9 kB\nMemAvailable:   3 kB\n",
             "/sys/devices/system/cpu/cpu0/cache/index2/size": "1024K\n"}  # fmt: skip
    monkeypatch.setattr(measure, "Path", lambda name: File(files[name]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert measure.available_bytes() == 3 * 2**10
    assert measure.cache_bytes(CPU) == 3 * 2**20


class File(str):
    def read_text(self):
        return str(self)


def test_calls_are_interleaved_and_rotate():
    seen = []
    calls = {n: measure.Call(lambda i, n=n: seen.append((n, i))) for n in "abc"}
    samples = measure.interleave(calls, measure.CpuClock(), 0)
    order = "".join(n for n, _ in seen[3 * measure.WARMUP :])
    assert order == ("abc" + "bca" + "cab") * 3 + "abc"
    assert [i for _, i in seen] == list(range(len(seen)))  # never the inputs of the call before
    assert {len(s.time) for s in samples.values()} == {measure.MIN_ROUNDS}


class Clock:
    """Stands for the module `time`; only what is spent goes by."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_what_a_call_leaves_is_freed_off_the_clock(clock):
    class Kept:
        def __del__(self):
            clock.spend(10)

    def run_once(i):
        clock.spend(1)
        return Kept()

    samples, cleared = measure.Samples(), []
    call = measure.Call(run_once, lambda i: (cleared.append(i), clock.spend(100)))
    measure.CpuClock().sample(call, 3, samples)
    assert samples.time == samples.wall == [1] and cleared == [3] and clock.now == 111


def test_rounds_go_on_for_as_long_as_asked(clock):
    collects = []

    def run_once(i):
        clock.spend(0.5)
        collects.append(gc.isenabled())

    calls = {name: measure.Call(run_once) for name in "ab"}
    samples = measure.interleave(calls, measure.CpuClock(), seconds=25)
    assert [len(s.time) for s in samples.values()] == [25, 25]
    assert not any(collects[2 * measure.WARMUP :]) and gc.isenabled()


def test_saved_bytes_do_not_count_inputs():
    problem = make_problem(SMALL, CPU)

    def save(hidden, weight, *rest):
        doubled = 2 * hidden  # saved by the product, as is the weight
        return (doubled * weight).sum()

    assert measure.saved(save, problem) == {"saved_bytes": 48 * 96 * 4, "saves_hidden": False}
    assert measure.saved(lambda h, w, *_: (h * w).sum(), problem)["saves_hidden"]


def test_what_the_compiler_cannot_compile_is_skipped():
    name = "eager-segment" + providers.COMPILE
    assert run._outcome(TypeError("a\nb"), name) == {"skipped": "TypeError: a"}
    assert run._outcome(TypeError("a\nb"), "eager-segment") == {"failed": "TypeError: a"}
    assert "failed" in run._outcome(TypeError(), "fastrm-cpp+compile")
    assert "failed" in run._outcome(run.Wrong("loss is off"), name)


def test_too_much_for_the_memory_is_skipped():
    (row,) = run.measure_point(Point(10**9), [], CPU, measure.CpuClock(), 0)
    assert row["skipped"].startswith("out of memory") and row["candidates"] == 10**9


def test_a_peer_is_measured_where_its_lists_are_of_one_size():
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    name = "sentence-transformers"
    for groups in ("8", "uniform"):
        rows = run.measure_point(Point(64, 32, groups=groups), [name], CPU, measure.CpuClock(), 0)
        (skipped,) = [r.get("skipped") for r in rows if r["provider"] == name][-1:]
        assert (skipped is None) == (groups == "8"), rows
    options = dict.fromkeys(
        ("device", "threads", "providers", "candidates", "hidden_size", "dtype", "groups",
         "layout", "loss")
    )  # fmt: skip
    plan, _ = run.choose(argparse.Namespace(sweep=["all"], seconds=1.0, **options))
    assert {sweep for sweep, (_, names) in plan.items() if name in names} == {"losses"}


def test_bench_writes_json_lines_that_the_report_turns_into_tables(tmp_path, capsys, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    tiny = {"small": [Point(64, 4096), Point(9, 64)], "size": [Point(8, 64), Point(16, 64)],
            "ragged": [Point(64, 64), Point(64, 64, groups="giant")],
            "costs": [Point(16, 64)]}  # fmt: skip
    monkeypatch.setattr(run, "sweeps", lambda kind: tiny)
    file = results / "here" / "all.jsonl"
    fused = [n for n in HERE if n == "fastrm-cpp"]
    few = [*fused, "fastrm-torch", "eager-segment", "eager-loop"]
    given = ["--sweep", *tiny, "--providers", *few, "--seconds", "0.01", "--output", str(file)]
    assert cli.main(["bench", *given]) == 0
    assert "forward_backward" in capsys.readouterr().out
    head, *rows = map(json.loads, file.read_text().splitlines())
    assert head["environment"]["torch"] == torch.__version__
    assert head["command"].startswith("fastrm bench --sweep small size ragged costs")
    assert len(rows) == 7 * (1 + len(few)) * 2  # points, providers with the clone, modes
    for row in rows:
        assert row["p20_s"] <= row["time_s"] <= row["p80_s"] and row["samples"] >= 10
        assert row["gb_per_s"] == pytest.approx(row["limit_bytes"] / row["time_s"] / 1e9, rel=2e-3)
        if row["provider"] == "clone":
            assert row["of_clone"] == 1
    document = tmp_path / "README.md"
    unknown = "b <!-- bench:x -->?<!-- /bench -->"
    document.write_text(f"a <!-- bench:size --> old <!-- /bench --> {unknown}")
    assert cli.main(["bench", "--report", str(results)]) == 0
    text = document.read_text()
    assert "old" not in text and "| 1 KB " in text and text.endswith(unknown)
    assert {p.name for p in (results / "here").glob("*.png")} == {
        "size.png", "small.png", "ragged.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert all(f"## {name}\n" in printed for name in (["summary"] if fused else []) + [*tiny])


def test_a_table_names_the_commits_of_its_own_rows(tmp_path):
    for commit, sweep in (("aaaa", "size"), ("bbbb", "hidden"), ("cccc", "hidden")):
        head = {"environment": {"device": "d", "torch": "2", "commit": commit}}
        point = Point(8, 64 if commit < "c" else 128)
        row = {"sweep": sweep, **vars(point), "provider": "clone", "mode": "forward_backward"}
        lines = (json.dumps(x) for x in (head, row | {"time_s": 1.0, "of_clone": 1.0}))
        (tmp_path / f"{commit}.jsonl").write_text("\n".join(lines))
    tables = report.make_tables([report.load(tmp_path)])
    assert tables["size"].startswith("d (torch 2, commit aaaa): ")
    assert tables["hidden"].startswith("d (torch 2, commits bbbb, cccc): ")


def cells(table):
    """The lines of a table below its heads, by their first cell."""
    found = [[c.strip() for c in line[2:-2].split(" | ")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in found[4:]}


def test_tables_by_hand(tmp_path):
    rows = []

    def add(sweep, point, provider, mode="forward_backward", **numbers):
        rows.append({"sweep": sweep, **vars(point), "provider": provider, "mode": mode, **numbers})

    small, even, giant = Point(64, 4096), Point(16, 64), Point(32, 64, groups="giant")
    for name, wall in (("clone", 1e-3), (providers.SMALLEST, 1e-3), ("fastrm-cpp", 4e-3),
                       ("eager-segment", 12e-3), ("eager-padded", 8e-3),
                       ("eager-segment+compile", 6e-3)):  # fmt: skip
        add("small", small, name, wall_s=wall, time_s=wall / 2)
        add("small", small, name, "forward", wall_s=wall / 4, time_s=wall / 8)
    for point, sweep in ((Point(8, 64), "size"), (even, "size"), (giant, "ragged")):
        add(sweep, point, "clone", time_s=2.5e-6, wall_s=9.0, of_clone=1.0)
        add(sweep, point, "fastrm-cpp", "forward", time_s=1e-6, of_clone=9.0)
        add(sweep, point, "fastrm-cpp", time_s=5e-6, wall_s=9.0, of_clone=2.0)
        add(sweep, point, "eager-padded", failed="x")
        add(sweep, point, "eager-segment", time_s=250e-6, of_clone=100.0)
        add(sweep, point, "eager-loop", skipped="x")
        add(sweep, point, "eager-padded+compile", time_s=15e-6, of_clone=6.0)
    add("costs", even, "fastrm-cpp", time_s=1.0, saves_hidden=False, saved_bytes=3 * 2**9)
    add("costs", even, "eager-segment", time_s=1.0, saves_hidden=True, saved_bytes=3 * 2**29,
        launches=7, syncs=0, peak_bytes=2**21)  # fmt: skip
    train = {"sweep": "train", "setting": "a", "tokens": 90, "tokens_once": 40}
    for name, speed, tokens in (("padded-loop", 2.0, 90), ("fastrm-auto", 5.0, 60)):
        rows.append({**train, "provider": name, "groups_per_s": speed, "peak_bytes": None,
                     "tokens_computed": tokens, "head_loss_s": 0.25})  # fmt: skip
    rows.append({**train, "provider": "trl", "skipped": "pairs only"})
    machine = report.Machine(tmp_path / "here", "d", {}, rows)
    tables = {name: cells(table) for name, table in report.make_tables([machine]).items()}

    assert tables["floor"] == {"64x4096 bf16": ["2 ms", "4 ms", "2.0x", "4.0x", "1.5x", "3.0x"]}
    # In the order of NAMES: fastrm, eager-segment, eager-padded, eager-loop, and those compiled.
    walls = ["1 ms", "1 ms", "4 ms", "12 ms", "8 ms", "6 ms"]
    assert tables["small"] == {"64x4096 bf16": walls}
    times = ["2.5 µs", "2.00", "100.00", "failed", "–", "6.00"]
    assert tables["size"] == {"1 KB": times, "2 KB": times}
    best = ["2.5 µs", "5 µs", "eager-padded+compile 15 µs", "3.0x"]
    assert tables["summary"] == {
        f"{small}, by the wall clock": ["1 ms", "4 ms", "eager-segment+compile 6 ms", "1.5x"],
        str(even): best, str(giant): best,
    }  # fmt: skip
    assert tables["costs"] == {
        "fastrm-cpp": ["–", "–", "–", "1.5 KB"],
        "eager-segment": ["7", "0", "2 MB", "hidden and 1.5 GB"],
    }
    assert tables["train"] == {
        "a": ["padded-loop", "2.00", "1.00", "2.25", "250 ms", "–"],
        "": ["fastrm-auto", "5.00", "2.50", "1.50", "250 ms", "–"],
    }


def test_failures_are_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(providers.OF_LOSS["listwise"], "eager-padded", wrong_loss)
    given = ["bench", "--candidates", "9", "--hidden-size", "32", "--dtype", "fp32"]
    given += ["--seconds", "0.01", "--output", str(tmp_path / "x.jsonl"), "--providers"]
    assert cli.main([*given, "eager-padded"]) == 1
    assert "failed: loss is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, says",
    [
        (["--sweep", "sizes"], "--sweep must be one of quick, .*got 'sizes'"),
        (["--providers", "liger"], "--providers must be one of clone, .*got 'liger'"),
        (["--providers", "fastrm-triton"], "fastrm-triton: it needs a CUDA device"),
        (["--device", "tpu"], "--device must be one of cpu.*got 'tpu'"),
        (["--hidden-size", "64"], "one point is --candidates M"),
        (["--candidates", "8", "--dtype", "int8"], "--dtype must be one of bf16, .*'int8'"),
        (["--candidates", "8", "--groups", "zip"], "--groups must be one of K, .*'zip'"),
        (["--candidates", "8", "--groups", "9"], "--groups must be at most --candidates, 8, got 9"),
        (["--candidates", "8", "--layout", "x"], "--layout must be one of packed, .*'x'"),
        (["--candidates", "8", "--seconds", "0"], "--seconds must be above 0"),
        (["--candidates", "8", "--output", "/dev/null/x"], "/dev/null"),
        (["--report", "nowhere"], r"nowhere: no \*/\*.jsonl there"),
        (["--frob"], "unknown option --frob"),
    ],
)
def test_mistakes_get_one_line(given, says, capsys):
    assert cli.main(["bench", *given]) == 2
    assert re.search(f"^fastrm bench: error: .*{says}", capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    device = torch.device("cuda")
    names = [n for n in providers.NAMES if providers.why_not(n, "cuda") is None]
    names = [n for n in names if not n.endswith(providers.COMPILE)]
    clock = measure.CudaClock(device)
    rows = run.measure_point(Point(64, 896), names, device, clock, 0.1, count_launches=True)
    assert [row["failed"] for row in rows if "failed" in row] == []
    timed = {(r["provider"], r["mode"]): r for r in rows if "time_s" in r}
    modes = ("forward", "forward_backward", "graph")
    waits = {(n, "graph") for n in ("eager-loop", "sentence-transformers")}
    assert timed.keys() == {(n, m) for n in names for m in modes} - waits
    fused, loop = (timed[n, "forward_backward"] for n in ("fastrm-triton", "eager-loop"))
    assert fused["syncs"] == 0 and fused["launches"] in (2, None) and not fused["saves_hidden"]
    assert loop["syncs"] > 0 and fused["peak_bytes"] >= 64 * 896 * 2
    assert fused["queued"] == 1 and fused["time_s"] < fused["wall_s"] and fused["host_s"] > 0


@pytest.mark.parametrize("shape", [(12, 896), (64, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", ["clone", *HERE])
def test_speed(benchmark, name, shape):
    problem = make_problem(Point(*shape), CPU)
    if name == "clone":
        call = run._clone("clone", [problem], "forward_backward")
    else:
        call = run._calls(providers.provider(name), [problem], "forward_backward")

    def once():
        call.run(0)
        call.clear(0)

    benchmark(once)


TINY = dict(
    model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, vocab_size=8192,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("transformers")
    from fastrm_benchmarks import train

    monkeypatch.setitem(train.CONFIGS, "tiny", TINY)
    monkeypatch.setattr(train, "_peak_memory", lambda *args: 2**20)  # a process each, seconds
    return train


@pytest.mark.parametrize("other", ["fastrm", "trl"])
def test_training_steps_agree_and_are_timed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Of every layout and the padded loop, and of TRL's trainer where it is installed."""
    if other == "trl":
        pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr(tiny, "LEARNING_RATE", 1e-3)
    setting = tiny.Setting("tiny", "5/2/3", batch_size=2)
    names = ["padded-loop", *(n for n in tiny.CONTESTANTS if n.startswith(other))]
    rows = tiny.measure(setting, names, torch.device("cpu"), steps=20)
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert row["groups"] == 40 and row["groups_per_s"] > 0, row
        assert (row["tokens"], row["tokens_once"]) == (40 * 2 * 8, 40 * (5 + 2 * 3))
        once = row["provider"] in ("fastrm-shared", "fastrm-cached", "fastrm-auto")
        assert row["tokens_computed"] == row["tokens_once" if once else "tokens"]
        assert row["head_loss_s"] > 0
        # The same losses step after step: the same gradients and updates.
        assert row["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4)
    assert max(rows[0]["losses"]) - min(rows[0]["losses"]) > 0.01  # the weights did move
    assert len(tiny.table(rows).splitlines()) == 2 + len(names)


class Steps:
    """A contestant whose steps take what they are told to."""

    def __init__(self, name: str, clock: Clock, seconds: list[float], loss: float = 2.0) -> None:
        self.name, self.clock, self.seconds, self.loss = name, clock, iter(seconds), loss
        self.tokens, self.heads = 0, iter([1.0, 9.0, 2.0])
        self.seen: list[Any] = []

    def step(self, batch: Any) -> float:
        self.seen.append((self.name, [len(ids) for e in batch for ids in e["input_ids"]]))
        self.tokens += 10
        self.clock.spend(next(self.seconds))
        return self.loss

    def head_and_loss(self, batch: Any) -> float:
        return next(self.heads)


def lengths(*groups: list[int]) -> list[Any]:
    """Groups whose prompt is one token, from the lengths of their candidates."""
    return [{"input_ids": [torch.arange(n).numpy() for n in K], "prompt_length": 1, "target": 0,
             "token_type_ids": None} for K in groups]  # fmt: skip


def test_what_is_reported_of_training_steps(
    tiny: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all but the first, in turns; a loss that is no number is wrong."""
    monkeypatch.setattr(tiny, "time", clock)
    monkeypatch.setattr(tiny, "make_model", lambda *args: None)
    monkeypatch.setattr(tiny, "make_examples", lambda s: lengths([3, 5], [2, 2, 2]) * 4)
    seconds = [100.0, 1.0, 6.0, 2.0]
    ours = [Steps(n, clock, seconds, loss) for n, loss in
            (("a", 2.0), ("b", 2.001), ("c", math.nan))]  # fmt: skip
    for contestant in ours:
        contestant.seen = ours[0].seen
        monkeypatch.setitem(tiny.CONTESTANTS, contestant.name, lambda *args, c=contestant: c)
    a, b, wrong = tiny.measure(tiny.Setting("tiny", "x", batch_size=2), "abc", CPU, 3)
    assert "".join(name for name, _ in ours[0].seen) == "abc" + "bca" + "cab" + "abc"
    assert "failed" in wrong and "groups_per_s" not in wrong
    for row in (a, b):
        assert row["step_s"] == 2 and row["groups_per_s"] == pytest.approx(2 * 3 / 9)
        assert row["tokens_computed"] == 30 and row["head_loss_s"] == 2
        assert (row["groups"], row["tokens"], row["tokens_padded"], row["tokens_once"]) == (
            3 * 2, 3 * 14, 3 * 5 * 5, 3 * (7 + 4)
        )  # fmt: skip


def test_memory_is_that_of_the_longest_batches(
    tiny: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "make_model", lambda *args: None)
    monkeypatch.setattr(tiny, "make_examples", lambda s: lengths([3], [2, 9], [5], [4, 7], [6]))
    contestant = Steps("a", clock, [0.0] * 9)
    monkeypatch.setitem(tiny.CONTESTANTS, "a", lambda *args: contestant)
    tiny._memory(tiny.Setting("tiny", "x", batch_size=1), "a", "cpu", torch.get_num_threads())
    assert [batch for _, batch in contestant.seen] == [[3], [4, 7], [2, 9]]
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert tiny._status("VmRSS") == pytest.approx(resident, rel=0.1)


def test_one_file_holds_every_setting(
    tiny: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(tiny, "make_model", lambda *args: None)
    monkeypatch.setattr(tiny, "make_examples", lambda s: lengths([3, 5], [2, 2]))
    monkeypatch.setitem(tiny.CONTESTANTS, "a", lambda *args: Steps("a", clock, [1.0] * 9))
    settings = [tiny.Setting("tiny", data, batch_size=1) for data in ("x", "y")]
    rows, paths = tiny.bench(settings, ["a"], CPU, 1, tmp_path / "all.jsonl")
    head, *written = map(json.loads, paths[0].read_text().splitlines())
    assert len(paths) == 1 and "environment" in head
    names = [str(setting) for setting in settings]
    assert [row["setting"] for row in written] == [row["setting"] for row in rows] == names


@pytest.mark.parametrize("data", ["0/4/32", "128/4", __file__, "nowhere.jsonl"])
def test_training_data_that_there_is_not_is_refused(capsys: Any, data: str) -> None:
    assert cli.main(["bench", "train", "--model", "llama-small", "--data", data]) == 2
    assert f"must be P/K/R, such as 128/4/32: it has no tokenizer, got {data}" in (
        capsys.readouterr().err
    )


def test_a_wrong_training_step_is_not_timed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, examples: Any) -> Any:
        right = tiny.CONTESTANTS["padded-loop"](model, examples)
        return tiny.Contestant(model, lambda m, batch: 1.01 * right.loss(m, batch))

    monkeypatch.setitem(tiny.CONTESTANTS, "wrong", wrong)
    names = ["padded-loop", "wrong", "fastrm-padded", "trl"]
    *rows, pairs_only = tiny.measure(tiny.Setting("tiny", "5/3/3"), names, torch.device("cpu"), 1)
    found = {row["provider"]: row for row in (*rows, pairs_only)}
    assert "failed" in found["wrong"] and "groups_per_s" not in found["wrong"]
    assert "groups_per_s" in found["padded-loop"] and "groups_per_s" in found["fastrm-padded"]
    assert "skipped" in found["trl"]


def test_a_contestant_that_is_killed_for_memory_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    from fastrm_benchmarks import train

    monkeypatch.setattr(train, "_memory", _killed)
    setting = train.Setting("llama-small", "5/3/3", batch_size=1)
    (row,) = train.measure(setting, ["padded-loop"], CPU, 1)
    assert "want of memory" in row["skipped"] and "groups_per_s" not in row
    assert "want of memory" in train.table([row])


def _killed(*args: Any) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
