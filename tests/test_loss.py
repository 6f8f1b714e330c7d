"""The losses on every backend against torch's own cross entropy, group by group, in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastrm_kernels import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, HIDDEN_SIZES, Problem, error, make, problems, ragged_sizes
from torch.autograd import forward_ad

import fastrm
from fastrm import backends

# Triton runs in its interpreter where there is no GPU: slow, so it gets fewer and smaller cases.
CUDA = torch.cuda.is_available()
TRITON = pytest.param("triton", marks=pytest.mark.gpu) if CUDA else "triton"
BACKENDS: list[Any] = ["torch", "cpp", TRITON]
DEVICE = {"torch": "cpu", "cpp": "cpu", "triton": "cuda" if CUDA else "cpu"}


def on(p: Problem, backend: str) -> Problem:
    d = DEVICE[backend]
    move = {k: v.to(d) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    bias = None if p.bias is None else p.bias.to(d)
    return Problem(p.hidden.to(d), p.weight.to(d), bias, p.offsets.to(d), p.target.to(d), move)


def check_close(p: Problem, backend: str, tolerance: float) -> None:
    g = torch.randn(len(p.offsets) - 1, generator=torch.Generator().manual_seed(1))
    grad = g if p.options.get("reduction") == "none" else None
    exact = p.oracle(grad)
    got = on(p, backend).run(backend, None if grad is None else grad.to(DEVICE[backend]))
    scale = max(float(x.abs().max()) for k, x in exact.items() if k != "scores")
    for name, x in exact.items():
        gap = float((got[name].cpu() - x).abs().max())
        assert gap <= tolerance * max(scale, 1.0), (name, gap, scale)
    if p.bias is not None and not p.options.get("center_coef"):
        assert torch.equal(got["dbias"].cpu(), torch.zeros_like(p.bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_matches_cross_entropy(backend: str) -> None:
    @settings(max_examples=25 if backend == "triton" else 250, deadline=None, database=None)
    @given(problems(8, 20, 40) if backend == "triton" else problems())
    def check(p: Problem) -> None:
        check_close(p, backend, 1e-10)

    check()


@pytest.mark.parametrize("kind", ["ones", "pairs", "giant", "uniform", "zipf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_raggedness(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    M = 20_000
    if backend == "triton" and not CUDA:  # each row costs the interpreter some milliseconds
        M = 1500
        monkeypatch.setattr(rows, "forward_tile", lambda D, size: rows.Tile(32, 1, 512, 4, 1))
    sizes = ragged_sizes(kind, M, torch.Generator().manual_seed(3))
    check_close(make(sizes, 33, temperature=0.7, margin=True), backend, 1e-9)


ALLOWED = {"loss": 2, "scores": 2, "dhidden": 3, "dweight": 3}


def budget_cases() -> list[Any]:
    out = []
    for backend in ("cpp", "triton"):
        for dtype in DTYPES:
            for D in HIDDEN_SIZES:
                marks = [pytest.mark.gpu] if DEVICE[backend] == "cuda" else []
                name = f"{backend}-{dtype}-{D}"
                out.append(pytest.param(backend, dtype, D, id=name, marks=marks))
    return out


@pytest.mark.parametrize(("backend", "dtype", "D"), budget_cases())
def test_error_budget(backend: str, dtype: str, D: int) -> None:
    """Losses within 2x, gradients within 3x the error of eager PyTorch in the same dtype.

    The errors are those of vectors, added up in squares over several raggednesses: the rounding
    of one number can be as lucky as it likes.
    """
    interpreted = backend == "triton" and DEVICE[backend] == "cpu"
    M = max(8, min(64, 40_000 // D)) if interpreted else max(64, min(4000, 500_000 // D))
    eager, fused = dict.fromkeys(ALLOWED, 0.0), dict.fromkeys(ALLOWED, 0.0)
    for kind in ("uniform",) if interpreted else ("uniform", "zipf", "giant", "pairs"):
        sizes = ragged_sizes(kind, M, torch.Generator().manual_seed(D))
        p = make(sizes, D, seed=D, scale=2.0).to(DTYPES[dtype])
        for reduction, names in (("mean", ("dhidden", "dweight")), ("none", ("loss", "scores"))):
            p.options["reduction"] = reduction
            exact, ours = p.oracle(), on(p, backend).run(backend)
            theirs = p.run("torch")
            for name in names:
                assert ours[name].dtype == theirs[name].dtype
                eager[name] += error(theirs[name], exact[name]) ** 2
                fused[name] += error(ours[name].cpu(), exact[name]) ** 2
    for name, times in ALLOWED.items():
        stored = DTYPES[dtype] if name.startswith("d") else ours[name].dtype
        # One unit in the last place is right; and for fp64 the oracle is no better than that.
        unit = 1e-13 if dtype == "fp64" else torch.finfo(stored).eps
        assert fused[name] ** 0.5 <= max(times * eager[name] ** 0.5, unit), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_scores_keep_fp32_accuracy(backend: str, scale: float) -> None:
    """Scores of ±1e4 and a shift of 1e4: no overflow, and p from differences, not from exp(lse)."""
    p = make([3, 9, 2, 1, 40], 64, scale=scale).to(torch.float32)
    p.weight.mul_(64).round_().div_(64)
    p.hidden.mul_(16).round_().div_(16)  # so that the scores themselves are exact
    exact, got = p.oracle(), on(p, backend).run(backend)
    assert error(got["loss"].cpu(), exact["loss"]) < 1e-5
    assert error(got["dhidden"].cpu(), exact["dhidden"]) < 1e-5 * max(1, scale / 1e2)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("base", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("K", [4, 3000])
def test_a_shift_of_fp64_scores_costs_nothing(backend: str, base: float, K: int) -> None:
    scores = torch.arange(K, dtype=torch.float64).mul_(-0.5)
    scores[0] += 8
    exact = F.cross_entropy(scores[None], torch.tensor([0]))
    ours = fastrm.listwise_loss_from_scores(
        scores + base, offsets=torch.tensor([0, K]), target=torch.tensor([0]), backend=backend
    )
    assert float((ours - exact).abs()) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(backend: str, reduction: str, soft: bool) -> None:
    p = on(make([1, 4, 2], 5, soft=soft, gathered=True, center_coef=0.3, margin=True), backend)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fastrm.listwise_loss(
            hidden, weight, bias, offsets=p.offsets, target=p.target, reduction=reduction,
            backend=backend, **p.options,
        )  # fmt: skip

    leaves = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_is_differentiable_and_unrounded(backend: str) -> None:
    d = DEVICE[backend]
    p = on(make([4, 3], 50, gathered=True).to(torch.bfloat16), backend)
    rows = p.options["rows"]
    scores = fastrm.score(p.hidden, p.weight, p.bias, rows=rows, backend=backend)
    exact = p.hidden.double().reshape(-1, 50)[rows] @ p.weight.double() + p.bias.double()
    assert scores.dtype == torch.float32 and error(scores.cpu(), exact.cpu()) < 1e-6
    h = torch.randn(9, 5, dtype=torch.float64, device=d, requires_grad=True)
    w = torch.randn(1, 5, dtype=torch.float64, device=d, requires_grad=True)
    b = torch.randn(1, dtype=torch.float64, device=d, requires_grad=True)
    picked = torch.tensor([7, 0, 3], device=d)
    assert torch.autograd.gradcheck(
        lambda h, w, b: fastrm.score(h, w, b, rows=picked, backend=backend), (h, w, b)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_scores_equals_the_head(backend: str) -> None:
    p = on(make([3, 1, 6], 8, margin=True, temperature=0.5, label_smoothing=0.1), backend)
    whole = p.run(backend)
    scores = whole["scores"].clone().requires_grad_()
    loss = fastrm.listwise_loss_from_scores(
        scores, offsets=p.offsets, target=p.target, backend=backend, **p.options
    )
    torch.testing.assert_close(loss, whole["loss"], rtol=1e-12, atol=1e-12)
    (dscores,) = torch.autograd.grad(loss, scores, torch.full_like(loss, 1.5))
    torch.testing.assert_close(dscores @ p.hidden, whole["dweight"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_are_the_trl_loss(backend: str) -> None:
    """mean(-logσ(rc - rr - m)) + c·mean((rc + rr)²), as TRL's RewardTrainer states it."""
    g = torch.Generator().manual_seed(0)
    chosen, rejected, m = (torch.randn(40, generator=g, dtype=torch.float64) for _ in range(3))
    exact = -F.logsigmoid(chosen - rejected - m).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    d = DEVICE[backend]
    got = fastrm.listwise_loss_from_scores(
        torch.stack([chosen, rejected], 1).flatten().to(d), center_coef=0.01, backend=backend,
        offsets=torch.arange(0, 81, 2, device=d), margin=m.repeat_interleave(2).to(d),
        target=torch.zeros(40, dtype=torch.int64, device=d),
    )  # fmt: skip
    assert abs(float(got) - float(exact)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_count_for_nothing(backend: str) -> None:
    d = DEVICE[backend]
    # One candidate: loss 0, and it counts.
    p = on(make([1, 3], 4), backend)
    alone = on(Problem(p.hidden[1:], p.weight, p.bias, torch.tensor([0, 3]), p.target[1:]), backend)
    torch.testing.assert_close(p.run(backend)["loss"] * 2, alone.run(backend)["loss"])
    # Every group left out, and no group at all: 0 and zero gradients, so that a rank takes part.
    p.target = torch.full_like(p.target, -100)
    none = Problem(p.hidden[:0], p.weight, p.bias, torch.tensor([0], device=d), p.target[:0])
    rows = torch.tensor([], dtype=torch.int64, device=d)
    unread = Problem(p.hidden, p.weight, p.bias, none.offsets, none.target, {"rows": rows})
    for q in (p, none, unread):
        got = q.run(backend)
        assert got["loss"].shape == () and float(got["loss"]) == 0
        assert got["dhidden"].shape == q.hidden.shape
        assert not any(got[k].any() for k in ("dhidden", "dweight", "dbias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["columns", "expanded", "sliced", "batch_strided"])
def test_strides(backend: str, layout: str) -> None:
    p = make([4, 1, 7], 24)
    h = {
        "columns": torch.randn(24, 12, dtype=torch.float64).t(),
        "expanded": torch.randn(1, 24, dtype=torch.float64).expand(12, 24),
        "sliced": torch.randn(12, 60, dtype=torch.float64)[:, 7:31],
        "batch_strided": torch.randn(3, 9, 24, dtype=torch.float64)[:, 2:6],
    }[layout]
    p.hidden = h
    check_close(p, backend, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend: str) -> None:
    p = on(make([3, 2], 6), backend)
    kw: dict[str, Any] = dict(offsets=p.offsets, target=p.target, backend=backend)
    full = p.run(backend)
    for i, name in enumerate(("dhidden", "dweight", "dbias")):
        leaves = [p.hidden.detach(), p.weight.detach(), p.bias.detach()]  # type: ignore[union-attr]
        leaves[i].requires_grad_()
        fastrm.listwise_loss(*leaves, **kw).mul(1.5).backward()
        torch.testing.assert_close(leaves[i].grad, full[name])
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)
    with torch.no_grad():
        loss = fastrm.listwise_loss(p.hidden.requires_grad_(), p.weight, **kw)
    assert not loss.requires_grad


class _Dropped(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_gradient_that_never_arrives_adds_nothing(backend: str, heads: int) -> None:
    p = on(make([2, 3], 8), backend)
    weight = p.weight.expand(heads, -1).clone().requires_grad_()
    hidden = p.hidden.requires_grad_()
    loss = fastrm.listwise_loss(
        hidden, weight, offsets=p.offsets, target=p.target, backend=backend
    )
    _Dropped.apply(loss).backward()
    assert all(x.grad is None or not x.grad.any() for x in (hidden, weight))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_group_that_is_left_out_may_hold_anything(
    backend: str, reduction: str, value: float
) -> None:
    """Small ones beside others, and one over several programs: nothing of it goes anywhere."""
    sizes = [3, 200, 2, 1, 5, 2, 90]
    p = make(sizes, 130, reduction=reduction).to(torch.float32)
    left_out, first = (0, 1, 4), fastrm.offsets_from_sizes(sizes)
    p.target[list(left_out)] = -100
    p.weight.abs_()  # so that inf gives inf
    clean = on(p, backend).run(backend)
    for every in (2, 1):
        for n in left_out:
            p.hidden[first[n] : first[n + 1] : every] = value
        found = on(p, backend).run(backend)
        for name in ("loss", "dweight", "dhidden"):
            assert torch.equal(found[name], clean[name]), (name, every)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_candidates_of_a_group_that_is_left_out(backend: str) -> None:
    d = DEVICE[backend]
    scores = torch.tensor([1.0, -math.inf, 0.5, 1.5], device=d, requires_grad=True)
    loss = fastrm.listwise_loss_from_scores(
        scores, offsets=torch.tensor([0, 2, 4], device=d),
        target=torch.tensor([-100, 1], device=d), center_coef=0.1, backend=backend,
    )  # fmt: skip
    loss.backward()
    two = scores.detach()[2:].cpu().double().requires_grad_()
    exact = F.cross_entropy(two[None], torch.tensor([1])) + 0.1 * two.sum() ** 2
    exact.backward()
    expected = torch.cat([torch.zeros(2), two.grad.float()])
    torch.testing.assert_close(scores.grad.cpu(), expected)
    torch.testing.assert_close(loss.detach().cpu(), exact.detach().float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-math.inf, math.inf])
@pytest.mark.parametrize("K", [1, 3])
def test_where_the_loss_is_no_number_its_gradient_is_none(
    backend: str, value: float, K: int
) -> None:
    """So that a gradient scaler sees it; of that group alone."""
    d = DEVICE[backend]
    scores = torch.cat([torch.full((K,), value), torch.ones(2)]).to(d).requires_grad_()
    loss = fastrm.listwise_loss_from_scores(
        scores, offsets=torch.tensor([0, K, K + 2], device=d),
        target=torch.tensor([0, 1], device=d), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss.isnan() and scores.grad[0].isnan()
    torch.testing.assert_close(scores.grad[K:].cpu(), torch.tensor([0.25, -0.25]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["hidden", "weight", "margin", "group_weight", "grad"])
def test_tensors_that_are_negated_lazily(backend: str, which: str) -> None:
    """As x.conj().imag is: a real tensor whose memory holds the opposite."""
    p = make([2, 4, 1], 8, margin=True, group_weight=True, reduction="none").to(torch.float32)
    p, grad = on(p, backend), torch.tensor([0.5, 2.0, 1.0], device=DEVICE[backend])

    def run(lazily: bool) -> list[torch.Tensor]:
        def view(name: str, x: torch.Tensor) -> torch.Tensor:
            return torch._neg_view(-x) if lazily and name == which else x

        leaves = [p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()]
        loss = fastrm.listwise_loss(
            view("hidden", leaves[0]), view("weight", leaves[1]), offsets=p.offsets,
            target=p.target, reduction="none", backend=backend,
            margin=view("margin", p.options["margin"]),
            group_weight=view("group_weight", p.options["group_weight"]),
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves, view("grad", grad))]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoothed_gradients_of_large_groups_are_as_exact_as_eager(backend: str) -> None:
    d, K = DEVICE[backend], 2000
    scores = torch.randn(K, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, dtype=torch.int64)

    def gradient(loss: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].cpu()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x[None], target, label_smoothing=0.1)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return fastrm.listwise_loss_from_scores(
            x, offsets=torch.tensor([0, K], device=d), target=target.to(d), label_smoothing=0.1,
            backend=backend,
        )  # fmt: skip

    exact = gradient(eager, scores.double())
    assert error(gradient(ours, scores.to(d)), exact) <= 3 * error(gradient(eager, scores), exact)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_hidden_is_not_saved(backend: str) -> None:
    """What forward keeps for backward is a few numbers a candidate and a group, and D-vectors."""
    p = on(make([4] * 64, 96).to(torch.float32), backend)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hidden = p.hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = fastrm.listwise_loss(
            hidden, p.weight.requires_grad_(), offsets=p.offsets, target=p.target, backend=backend
        )
    assert hidden.untyped_storage().data_ptr() not in kept
    M, N, D = 256, 64, 96
    small = 4 * D + 8 * (N + 1) + 8 * N  # weight, offsets, target
    if backend == "cpp":
        assert sum(kept.values()) <= 4 * M + 4 * D + small
    else:
        tile = rows.forward_tile(D, 4)
        G, _ = rows.split(M, tile, hidden.device)
        each = 12 * D + 4 * 11 + 4 * 8 + 4 * (7 + 2 * tile.BLOCK_M)
        assert sum(kept.values()) <= 4 * M + 8 * N + G * each + 4 + small
    loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_autocast(backend: str) -> None:
    """A bf16 backbone under an fp32 head: exact in the head; autocast changes no bit."""
    p = on(make([3, 5, 2], 48, seed=4), backend)
    hidden = p.hidden.to(torch.bfloat16).requires_grad_()
    weight, bias = p.weight.float()[None].requires_grad_(), p.bias.float()[None].requires_grad_()  # type: ignore[union-attr]
    kw: dict[str, Any] = dict(offsets=p.offsets, target=p.target, backend=backend)
    loss = fastrm.listwise_loss(hidden, weight, bias, **kw)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32 and weight.grad.shape == (1, 48)
    exact = Problem(hidden.detach(), weight.detach(), bias.detach(), p.offsets, p.target).oracle()
    assert error(loss.detach().cpu(), exact["loss"].cpu()) < 1e-6
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert torch.equal(fastrm.listwise_loss(hidden, weight, bias, **kw), loss)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_index_dtypes(backend: str, dtype: torch.dtype) -> None:
    p = on(make([3, 5, 2], 7, gathered=True), backend)
    expected = p.run(backend)
    p.offsets, p.target = p.offsets.to(dtype), p.target.to(torch.int8)
    p.options["rows"] = p.options["rows"].to(torch.uint8)
    got = p.run(backend)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_masked_with_minus_infinity(backend: str) -> None:
    d = DEVICE[backend]
    scores = torch.randn(700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:300] = -math.inf
    scores[300:600:2] = -math.inf
    exact = F.cross_entropy(scores[None], torch.tensor([699]))
    x = scores.to(d).requires_grad_()
    loss = fastrm.listwise_loss_from_scores(
        x, offsets=torch.tensor([0, 700], device=d), target=torch.tensor([699], device=d),
        backend=backend,
    )  # fmt: skip
    assert abs(float(loss) - float(exact)) < 1e-12
    (dscores,) = torch.autograd.grad(loss, x)
    expected = scores.softmax(0) - F.one_hot(torch.tensor(699), 700)
    torch.testing.assert_close(dscores.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_the_fused_backward_cannot_do_is_refused(backend: str) -> None:
    p = on(make([4], 3), backend)
    hidden, weight, _ = p._leaves()
    kw: dict[str, Any] = dict(offsets=p.offsets, target=p.target, backend=backend)
    for value in (fastrm.listwise_loss(hidden, weight, **kw),
                  fastrm.score(hidden, weight, backend=backend).sum()):  # fmt: skip
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="forward mode AD|jvp|functorch"):
        torch.func.jvp(lambda h: fastrm.listwise_loss(h, weight.detach(), **kw),
                       (p.hidden,), (p.hidden,))  # fmt: skip
    ranks = {"offsets": p.offsets, "ranks": torch.arange(4, device=p.hidden.device)}
    for recorded in (True, False):  # which forward mode does not ask
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            dual = forward_ad.make_dual(p.hidden, p.hidden)
            for call in (
                lambda w: fastrm.listwise_loss(dual, w, **kw),  # noqa: B023
                lambda w: fastrm.score(dual, w, backend=backend),  # noqa: B023
                lambda w: fastrm.plackett_luce_loss_from_scores(
                    dual[:, 0], **ranks, backend=backend  # noqa: B023
                ),
            ):
                with pytest.raises(RuntimeError, match="forward mode AD|jvp"):
                    call(weight.detach())


@pytest.mark.parametrize("backend", [None, "cpp"])
def test_the_first_call_of_a_process_may_be_compiled(backend: str | None) -> None:
    """It loads the backend while it is traced."""
    code = f"""if True:
        import torch, fastrm
        def loss(hidden, weight, offsets, target):
            return fastrm.listwise_loss(
                hidden, weight, offsets=offsets, target=target, backend={backend!r}
            )
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        args = torch.ones(5, 4), torch.ones(4), torch.tensor([0, 2, 5]), torch.tensor([0, 1])
        print(float(compiled(*args)))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx((math.log(2) + math.log(3)) / 2)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("center_coef", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd(heads: int, center_coef: float, reduction: str) -> None:
    """A graph that was made in eager runs under it, and gives the same gradients."""
    p = make([2, 3], 4).to(torch.bfloat16)
    leaves = p.hidden, p.weight.expand(heads, -1).clone(), torch.zeros(heads)
    for x in leaves:
        x.requires_grad_()
    options: dict[str, Any] = dict(center_coef=center_coef, reduction=reduction, backend="cpp")

    def loss() -> torch.Tensor:
        return fastrm.listwise_loss(*leaves, offsets=p.offsets, target=p.target, **options).sum()

    expected = torch.autograd.grad(loss(), leaves)
    value = loss()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, expected, strict=True))


def test_devices_without_autocast() -> None:
    hidden, weight, offsets = (torch.ones(5, 4), torch.ones(4), torch.tensor([0, 2, 5]))
    args: Any = [x.to("meta") for x in (hidden, weight)]
    groups: Any = dict(offsets=offsets.to("meta"))
    assert fastrm.score(*args).shape == (5,)
    target, ranks = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (2, 5))
    assert fastrm.listwise_loss(*args, **groups, target=target).shape == ()
    assert fastrm.plackett_luce_loss(*args, **groups, ranks=ranks).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_head_is_differentiated(backend: str) -> None:
    p = on(make([3, 2], 4, soft=True, margin=True, group_weight=True), backend)
    constants = [p.options["margin"], p.options["group_weight"], p.target]
    for x in constants:
        x.requires_grad_()
    loss = fastrm.listwise_loss(
        p.hidden, p.weight, offsets=p.offsets, target=p.target, backend=backend, **p.options
    )
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_narrow_index_dtypes_reach_past_their_range(backend: str) -> None:
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0))
    got = fastrm.listwise_loss_from_scores(
        scores, offsets=torch.tensor([0, 200]), target=torch.tensor([156], dtype=torch.uint8),
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got, F.cross_entropy(scores[None], torch.tensor([156])))
    rows = torch.tensor([5, 100, 1], dtype=torch.int8)
    hidden = torch.randn(400, 3)
    found = fastrm.score(hidden, torch.ones(3), rows=rows, backend=backend)
    torch.testing.assert_close(found, hidden[rows.long()].sum(1))


def test_score_gradients_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        hidden = torch.ones(4, 3, device="cpu")
        weight = torch.ones(3, device="cpu", requires_grad=True)
        (dweight,) = torch.autograd.grad(fastrm.score(hidden, weight).sum(), weight)
    assert torch.equal(dweight, torch.full((3,), 4.0, device="cpu"))


HOSTILE: dict[str, dict[str, Any]] = {
    "offsets fall": {"offsets": [0, 70, 30, 100]},
    "offsets huge": {"offsets": [0, 2**40, 2**50, 100]},
    "offsets negative": {"offsets": [0, -5, -3, 100]},
    "offsets short": {"offsets": [0, 3, 9, 50]},
    "target high": {"target": [0, 40, 2**40]},
    "target low": {"target": [-1, 0, 1]},
    "rows out": {"rows": [*range(99), 2**40]},
    "rows negative": {"rows": [*range(99), -7]},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("D", [16, 300])
def test_unchecked_hostile_input_gives_nan(bad: dict[str, Any], D: int, reduction: str) -> None:
    """On a device nothing checks values: the kernels alone keep bad ones harmless and visible."""
    device = DEVICE["triton"]
    p = on(make([10, 30, 60], D).to(torch.float32), "triton")
    backends.choose(device, "triton")
    x = {k: torch.tensor(v, device=device) for k, v in bad.items()}
    offsets, target, chosen = (x.get(k, getattr(p, k, None)) for k in ("offsets", "target", "rows"))
    triton = backends.FUSED["triton"]
    loss, scores, state = triton.listwise_fwd(
        p.hidden, p.weight, p.bias, offsets, target, chosen, None, None, None, 1.0, 0.0, 0.0,
        reduction, True, True,
    )  # fmt: skip
    assert loss.isnan().any()
    dhidden, dweight, _ = triton.listwise_bwd(
        torch.ones_like(loss), p.weight, chosen, state, p.hidden, p.hidden.shape, torch.float32,
        (1.0, 0.0, 0.0, reduction), True, True, False,
    )  # fmt: skip
    assert dhidden.isnan().any() and dweight.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend: str) -> None:
    sizes = ragged_sizes("zipf", 300, torch.Generator().manual_seed(9))
    p = on(make(sizes, 130, gathered=True).to(torch.bfloat16), backend)
    first = p.run(backend)
    for _ in range(3):
        again = p.run(backend)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_same_bits_for_any_thread_count() -> None:
    sizes = ragged_sizes("zipf", 6000, torch.Generator().manual_seed(9))
    p = make(sizes, 384).to(torch.bfloat16)
    before, first = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            got = p.run("cpp")
            first = first or got
            assert all(torch.equal(first[k], got[k]) for k in first), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_once_for_every_raggedness(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled_at_first = 0

    def loss(hidden: Any, weight: Any, bias: Any, offsets: Any, target: Any) -> torch.Tensor:
        return fastrm.listwise_loss(
            hidden, weight, bias, offsets=offsets, target=target, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        sizes = ragged_sizes("uniform", 40 + 13 * seed, g)
        p = on(make(sizes, 32, seed=seed).to(torch.float32), backend)
        expected = p.run(backend)
        leaves = p._leaves()
        out = compiled(*leaves, p.offsets, p.target)
        grads = torch.autograd.grad(out, leaves, torch.full_like(out, 1.5))
        got = [out, *grads]
        for name, x in zip(("loss", "dhidden", "dweight", "dbias"), got, strict=True):
            assert torch.equal(x, expected[name]), name
        compiled_at_first = compiled_at_first or counter.frame_count
    assert counter.frame_count == compiled_at_first


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("hidden list", {"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ("hidden int", {"hidden": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "hidden .*int64"),
    ("hidden 1-d", {"hidden": torch.ones(5)}, ValueError, r"hidden must have shape .*\(5,\)"),
    ("weight size", {"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\)"),
    ("bias size", {"bias": torch.ones(2)}, ValueError, r"bias must have shape \(\) or \(1,\)"),
    ("offsets list", {"offsets": [0, 2, 5]}, TypeError, "offsets must be a torch.Tensor"),
    ("offsets float", {"offsets": torch.tensor([0.0, 5])}, TypeError, "offsets .*float32"),
    ("offsets empty", {"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must"),
    ("offsets start", {"offsets": torch.tensor([1, 2, 5])}, ValueError, r"offsets\[0\] must be 0"),
    ("offsets end", {"offsets": torch.tensor([0, 2, 4])}, ValueError, r"offsets\[2\] must be 5"),
    ("offsets beyond", {"offsets": torch.tensor([0, 2, 9])}, ValueError, r"offsets\[2\] must be 5"),
    ("group empty", {"offsets": torch.tensor([0, 5, 5])}, ValueError, r"offsets\[1\] is 5"),
    ("offsets fall", {"offsets": torch.tensor([0, 7, 5])}, ValueError, r"offsets\[2\] is 5"),
    ("target high", {"target": torch.tensor([0, 3])}, ValueError, r"target\[1\] must be from 0"),
    ("target low", {"target": torch.tensor([-1, 0])}, ValueError, r"target\[0\] must .* got -1"),
    ("target size", {"target": torch.tensor([0])}, ValueError, r"target must have shape \(2,\)"),
    ("target bool", {"target": torch.tensor([True, False])}, TypeError, "target must have dtype"),
    ("soft size", {"target": torch.ones(2)}, ValueError, r"target must have shape \(5,\)"),
    ("soft sum", {"target": torch.tensor([0.5, 0.5, 1, 1, 0])}, ValueError, "group 1 sums to 2"),
    ("soft sign", {"target": torch.tensor([1.5, -0.5, 1, 0, 0])}, ValueError, r"target\[1\] must"),
    ("soft nan", {"target": torch.tensor([1, 0, 1, math.nan, 0])}, ValueError, r"target\[3\] must"),
    ("rows high", {"rows": torch.tensor([0, 1, 2, 3, 5])}, ValueError, r"rows\[4\] must be from 0"),
    ("rows low", {"rows": torch.tensor([0, -1, 2, 3, 4])}, ValueError, r"rows\[1\] must .*got -1"),
    ("rows twice", {"rows": torch.tensor([0, 1, 2, 1, 4])}, ValueError, r"rows\[1\] and rows\[3\]"),
    ("rows float", {"rows": torch.arange(5.0)}, TypeError, "rows must have dtype"),
    ("margin size", {"margin": torch.ones(2)}, ValueError, r"margin must have shape \(5,\)"),
    ("margin inf", {"margin": torch.full((5,), math.inf)}, ValueError, r"margin\[0\] must be fin"),
    ("weights size", {"group_weight": torch.ones(5)}, ValueError, r"group_weight .*\(2,\)"),
    ("weights nan", {"group_weight": torch.tensor([1, math.nan])}, ValueError, r"weight\[1\]"),
    ("temperature", {"temperature": 0.0}, ValueError, "temperature must be .* above 0"),
    ("tensors", {"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a Python floa"),
    ("tensor", {"center_coef": torch.tensor(0.0)}, TypeError, "center_coef .* got Tensor"),
    ("numpy", {"temperature": np.float32(2)}, TypeError, "temperature .* got float32"),
    ("flag", {"label_smoothing": True}, TypeError, "label_smoothing .* got bool"),
    ("huge", {"center_coef": 10**400}, ValueError, "center_coef must be a finite number"),
    ("sparse", {"hidden": torch.ones(5, 4).to_sparse()}, TypeError, "hidden must be dense"),
    ("sparse offsets", {"offsets": torch.tensor([0, 2, 5]).to_sparse()}, TypeError, "offsets must"),
    ("smoothing", {"label_smoothing": 1.5}, ValueError, "label_smoothing must be .* 0 to 1"),
    ("centring", {"center_coef": -1.0}, ValueError, "center_coef must be"),
    ("reduction", {"reduction": "avg"}, ValueError, 'reduction must be "mean", "sum" or "none"'),
    ("items zero", {"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be at least 1"),
    ("items type", {"num_items_in_batch": 1.5}, TypeError, "num_items_in_batch must be an int"),
    ("items value", {"num_items_in_batch": torch.tensor(0)}, ValueError, "num_items_in_batch must"),
    ("backend", {"backend": "cuda"}, ValueError, 'backend must be "triton", "cpp", "torch"'),
    ("no backend", {"backend": ""}, ValueError, 'backend must be "triton", "cpp", "torch"'),
]


@pytest.mark.parametrize(("bad", "kind", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_the_argument(
    backend: str, bad: dict[str, Any], kind: type[Exception], message: str
) -> None:
    args: dict[str, Any] = dict(
        hidden=torch.ones(5, 4), weight=torch.ones(4), offsets=torch.tensor([0, 2, 5]),
        target=torch.tensor([0, 1]), backend=backend,
    )  # fmt: skip
    args |= bad
    hidden, weight = args.pop("hidden"), args.pop("weight")
    if DEVICE[backend] == "cuda":
        pytest.skip("on CUDA values are not checked: see test_unchecked_hostile_input_gives_nan")
    with pytest.raises(kind, match=message):
        fastrm.listwise_loss(hidden, weight, args.pop("bias", None), **args)


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.integers(1, 9), max_size=30))
def test_offsets_helpers_agree(sizes: list[int]) -> None:
    offsets = fastrm.offsets_from_sizes(sizes)
    assert offsets.tolist() == [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    ids = [7 * n for n, k in enumerate(sizes) for _ in range(k)]
    assert torch.equal(fastrm.offsets_from_ids(ids), offsets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastrm.offsets_from_sizes([2, 0, 1]), r"sizes\[1\] is 0"),
        (lambda: fastrm.offsets_from_sizes(torch.ones(2, 2, dtype=torch.int64)), "one-dimensional"),
        (lambda: fastrm.offsets_from_ids([4, 4, 1, 4]), "id 4 in separate places"),
        (lambda: fastrm.offsets_from_sizes(3), "sizes must be integers, got 3"),
        (lambda: fastrm.offsets_from_sizes([10**30]), "sizes must be integers"),
        (lambda: fastrm.offsets_from_ids(["a", "b"]), "group_ids must be integers"),
    ],
)
def test_offsets_helpers_refuse(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
