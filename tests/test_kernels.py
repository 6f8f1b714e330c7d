"""The Triton kernels: resources on GPUs that are not here, launches, operators, what is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrm_kernels import backend, listwise, rows
from problems import Problem, error, make

import fastrm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
D = "96,384,576,896,1000,2048,3584,4096,5120,8192,16384"
EVERY_OPTION = [f"{k}=True" for k in (
    "SOFT", "SMOOTH", "CENTER", "HAS_ROWS", "BATCHED", "HAS_MARGIN", "HAS_GROUP_WEIGHT",
    "HAS_NUM_ITEMS", "INVERSE",
)]  # fmt: skip
TWO_PASSES = ["DWEIGHT=False", "PARTIAL=False", "SLICED=False", "COEF=True", "REDUCTION=none"]


def aot(*words: str) -> list[dict[str, Any]]:
    """What aot.py prints, from a process that does not run the kernels in the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *words],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_resources() -> None:
    """No spill and no stack, and as many programs resident as the grid is made for."""
    reports = aot(
        "sm_90", "bf16", D,
        "+", "sm_90", "fp32", "384,896,2048,4096,8192,16384",
        "+", "sm_80,sm_100", "bf16", "384,1000,4096,5120,16384",
        "+", "sm_80,sm_100", "fp32", "96,896,3584,16384",
        "+", "sm_80,sm_100", "fp16", "576,8192",
        "+", "sm_90", "bf16", "384,4096,16384", *EVERY_OPTION,
        "+", "sm_90", "bf16", "1000", *EVERY_OPTION, *TWO_PASSES,
    )  # fmt: skip
    assert len(reports) == 2 * (11 + 6 + 10 + 8 + 4 + 3 + 1)
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        threads = 32 * report["warps"] * report["programs"]
        assert threads * -(-report["registers"] // 8) * 8 <= 65536, report
        assert report["programs"] * (report["shared"] + 1024) <= 64 * 1024, report


def test_every_target_compiles() -> None:
    reports = aot("sm_90", "fp64", "384,8192", "+", "gfx942", "bf16", "96,4096,5120")
    assert [r.get("binary", r.get("registers")) > 0 for r in reports] == [True] * 10


def test_a_cached_launch_is_tritons_own() -> None:
    (report,) = aot("launches")  # which compares every argument
    for name in ("plain", "gathered"):
        kernels = ["_listwise_fwd_kernel", "_listwise_bwd_kernel"]
        assert report[name]["launches"] == kernels
        assert report[name]["operators"] == ["aten.new_empty.default"]


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a program, so that a small problem has pieces of pieces to join."""
    monkeypatch.setattr(rows, "tile", lambda D, size: rows.Tile(4, 0, 1, 1, 1))
    monkeypatch.setattr(rows, "sm_count", lambda device: 4096)


def on_device(p: Problem) -> Problem:
    move = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    bias = None if p.bias is None else p.bias.to(DEVICE)
    return Problem(
        p.hidden.to(DEVICE), p.weight.to(DEVICE), bias, p.offsets.to(DEVICE), p.target.to(DEVICE),
        move,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([200], {}),
        ([1, 61, 2, 1, 70, 2, 2, 63], {"soft": True, "label_smoothing": 0.1, "margin": True}),
        ([2] * 66 + [3] * 5, {"gathered": True, "ignore": True}),
        ([65, 63, 64], {"center_coef": 0.3, "group_weight": True}),
        ([30, 90, 30], {"reduction": "none"}),
    ],
)  # fmt: skip
def test_pieces_of_pieces(many_programs: None, sizes: list[int], options: Any) -> None:
    p = make(sizes, 3, temperature=0.7, **options)
    grad = torch.linspace(-1, 1, len(sizes)) if options.get("reduction") == "none" else None
    exact = p.oracle(grad)
    got = on_device(p).run("triton", None if grad is None else grad.to(DEVICE))
    for name in ("loss", "scores", "dhidden", "dweight"):
        assert error(got[name].cpu(), exact[name]) < 1e-12, name


OPERATORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gathered": {"gathered": True, "margin": True, "ignore": True},
    "soft": {"soft": True, "label_smoothing": 0.1, "group_weight": True, "bias": False},
    "two passes": {"center_coef": 0.1, "reduction": "none"},
}


@pytest.mark.parametrize("options", OPERATORS.values(), ids=OPERATORS)
def test_operators(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake, and dispatch under aot of each operator."""
    buffers = backend._buffers  # two runs are compared, places that no kernel writes included
    monkeypatch.setattr(backend, "_buffers", lambda *args: [x.zero_() for x in buffers(*args)])
    p = on_device(make([3, 1, 5, 9], 7, **options).to(torch.float32))
    o, chosen = p.options, p.options.get("rows")
    extras = (o.get("margin"), o.get("group_weight"))
    numbers = (
        1.0, o.get("label_smoothing", 0.0), o.get("center_coef", 0.0), o.get("reduction", "mean")
    )  # fmt: skip
    forward = (
        p.hidden, p.weight, p.bias, p.offsets, p.target, chosen, *extras, None, *numbers, True,
        True,
    )  # fmt: skip
    loss, scores, state, index = backend._listwise_fwd(*forward)
    grad = torch.ones_like(loss)
    backward = (
        grad, p.weight, chosen, p.offsets, p.target, *extras, scores, state, index, p.hidden,
        list(p.hidden.shape), torch.float32, *numbers, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(backend._listwise_fwd_op, forward)
    torch.library.opcheck(backend._listwise_bwd_op, backward)
    torch.library.opcheck(backend._score_fwd_op, (p.hidden, p.weight, p.bias, chosen))
    torch.library.opcheck(
        backend._score_bwd_op, (scores, p.hidden, p.weight, chosen, True, True, True)
    )


def test_compiled_has_the_bits_of_eager() -> None:
    """With `rows`; test_loss.py has the same without."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss(hidden: Any, weight: Any, offsets: Any, target: Any, chosen: Any) -> torch.Tensor:
        return fastrm.listwise_loss(
            hidden, weight, offsets=offsets, target=target, rows=chosen, backend="triton"
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., torch.Tensor] = torch.compile(
        loss, backend=counter, fullgraph=True, dynamic=True
    )
    first = 0
    for seed, sizes in enumerate(([3, 2, 7, 1, 4], [20, 4], [2] * 9, [5, 1, 1, 8], [4] * 7)):
        p = on_device(make(sizes, 11, seed, gathered=True, bias=False).to(torch.float32))
        found = []
        for call in (loss, compiled):
            hidden, weight, _ = p._leaves()
            value = call(hidden, weight, p.offsets, p.target, p.options["rows"])
            found.append([value, *torch.autograd.grad(value, [hidden, weight])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        first = first or counter.frame_count
    assert counter.frame_count == first


@pytest.mark.parametrize("M", [64, 6400])
@pytest.mark.parametrize("gathered", [False, True])
def test_what_forward_keeps(M: int, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula in kernels/README.md, to the byte; nothing of hidden, and a bound on G."""
    monkeypatch.setattr(backend._launch_listwise_fwd, "kernel", _Nothing())
    p = on_device(make([4] * (M // 4), 96, gathered=gathered, bias=False).to(torch.float32))
    hidden, weight, _ = p._leaves()
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fastrm.listwise_loss(
            hidden, weight, offsets=p.offsets, target=p.target, backend="triton", **p.options
        )
    assert hidden.untyped_storage().data_ptr() not in kept
    G, _ = rows.split(M, rows.tile(96, 4), hidden.device)
    assert G <= rows.sm_count(hidden.device) * rows.tile(96, 4).programs_per_sm
    N, T, P = M // 4, hidden.shape[:-1].numel(), G + 2 * (G // listwise.FAN.value)
    inputs = [weight, p.offsets, p.target, p.options.get("rows")]
    small = sum(x.untyped_storage().nbytes() for x in inputs if x is not None)
    inverse = 4 * T if gathered else 0
    assert sum(kept.values()) == 4 * M + 8 * N + 12 * G * 96 + 68 * P + 4 + inverse + small


class _Nothing:
    """A kernel that is not run: only what is allocated around it counts."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None
