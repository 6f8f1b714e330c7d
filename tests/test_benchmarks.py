"""The benchmarks: that every contender does the job, that a wrong one is refused, what is written.

`pytest tests/test_benchmarks.py --benchmark-enable` times the contenders; otherwise each runs once.
"""

from __future__ import annotations

import argparse
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


def crash(*inputs):
    raise RuntimeError("out of order\nand more")


@pytest.mark.parametrize(
    "broken, says",
    [
        (wrong_loss, "loss is off by 1.0e-03 of its norm, limit 1e-04"),
        (wrong_dhidden, "dhidden is off by"),
        (wrong_dweight, "dweight is off by"),
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


def test_calls_are_interleaved_and_rotate():
    seen = []
    calls = {n: measure.Call(lambda i, n=n: seen.append((n, i))) for n in "abc"}
    samples = measure.interleave(calls, measure.CpuClock(), 0)
    order = "".join(n for n, _ in seen[3 * measure.WARMUP :])
    assert order == ("abc" + "bca" + "cab") * 3 + "abc"
    assert [i for _, i in seen] == list(range(len(seen)))  # never the inputs of the call before
    assert {len(s.time) for s in samples.values()} == {measure.MIN_ROUNDS}


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
