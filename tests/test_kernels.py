"""The Triton kernels: pieces of pieces, operators, what is saved, heads, rankings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastrm_kernels import backend, listwise, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, Problem, error, make, ragged_sizes

import fastrm
from fastrm import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a program, so that a small problem has pieces of pieces to join."""
    monkeypatch.setattr(rows, "forward_tile", lambda D, size: rows.Tile(4, 0, 1, 1, 1))
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
    tile = rows.forward_tile(96, 4)
    G, _ = rows.split(M, tile, hidden.device)
    assert G <= rows.sm_count(hidden.device) * tile.programs_per_sm
    N, T, P = M // 4, hidden.shape[:-1].numel(), G + 2 * (G // listwise.FAN.value)
    inputs = [weight, p.offsets, p.target, p.options.get("rows")]
    small = sum(x.untyped_storage().nbytes() for x in inputs if x is not None)
    inverse = 4 * T if gathered else 0
    notes = 4 * G * (7 + 2 * tile.BLOCK_M)
    assert sum(kept.values()) == 4 * M + 8 * N + 12 * G * 96 + 76 * P + 4 + notes + inverse + small


class _Nothing:
    """A kernel that is not run: only what is allocated around it counts."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def head_problem(
    layout: str, D: int, E: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """hidden, weight and bias to differentiate by; rows; and an incoming gradient."""
    g = torch.Generator().manual_seed(D + E)
    hidden = torch.randn(5, 14, 2 * D, generator=g, dtype=torch.float64).to(dtype)
    hidden = {
        "plain": hidden[:, :, :D].contiguous().view(70, D), "padded": hidden[:, 2:9, :D],
        "columns": hidden[0, :, ::2], "gathered": hidden[:, 2:9, :D],
    }[layout]  # fmt: skip
    T = hidden.shape[:-1].numel()
    chosen = torch.randperm(T, generator=g)[:17] if layout == "gathered" else None
    weight, bias = torch.randn(E, D, generator=g) / D**0.5, torch.randn(E, generator=g)
    grad = torch.randn(T if chosen is None else 17, E, generator=g, dtype=torch.float64)
    leaves = [hidden.to(DEVICE), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)]
    chosen = None if chosen is None else chosen.to(DEVICE)
    return [x.requires_grad_() for x in leaves], chosen, grad.to(DEVICE)


def score_and_gradients(
    leaves: list[torch.Tensor], chosen: torch.Tensor | None, grad: torch.Tensor, name: str
) -> list[torch.Tensor]:
    scores = fastrm.score(*leaves, rows=chosen, backend=name)
    return [scores, *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "D", "E"),
    [("plain", 7, 3), ("padded", 300, 2), ("columns", 96, 5), ("gathered", 40, 7)],
)
def test_heads(poisoned: None, layout: str, D: int, E: int, dtype: str) -> None:
    """Scores within 2x, gradients within 3x the error of eager PyTorch."""
    leaves, chosen, grad = head_problem(layout, D, E, DTYPES[dtype])
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = score_and_gradients(exact_leaves, chosen, grad, "torch")
    eager = score_and_gradients(leaves, chosen, grad, "torch")
    ours = score_and_gradients(leaves, chosen, grad, "triton")
    for times, got, theirs, x in zip((2, 3, 3, 3), ours, eager, exact, strict=True):
        assert got.dtype == theirs.dtype and got.shape == theirs.shape
        unit = 1e-13 if dtype == "fp64" else torch.finfo(got.dtype).eps
        budget = times * error(theirs.detach(), x.detach())
        assert error(got.detach(), x.detach()) <= max(budget, unit)
    hidden, weight, bias = leaves
    for e in (0, E - 1):
        alone = fastrm.score(hidden, weight[e], bias[e], rows=chosen, backend="triton")
        if dtype != "bf16":  # which several heads multiply on tensor cores
            assert torch.equal(alone, ours[0][:, e])
    again = score_and_gradients(leaves, chosen, grad, "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_more_heads_than_a_program_adds_up(dtype: str) -> None:
    leaves, chosen, grad = head_problem("gathered", 70, 66, DTYPES[dtype])
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = score_and_gradients(exact_leaves, chosen, grad, "torch")
    ours = score_and_gradients(leaves, chosen, grad, "triton")
    for a, b in zip(ours, exact, strict=True):
        unit = 1e-14 if dtype == "fp64" else torch.finfo(a.dtype).eps
        assert error(a.detach(), b.detach()) < unit


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_of_hidden_states_in_bf16_keep_every_bit_of_the_weights(wide: torch.dtype) -> None:
    """On tensor cores in pieces; with a scale at which a piece that is lost would show."""
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(70, 300, generator=g, device=DEVICE).bfloat16()
    weight = (torch.randn(5, 300, generator=g, device=DEVICE) * 1e-3).to(wide)
    grad = torch.randn(70, 5, generator=g, device=DEVICE) * 1e3
    triton = backends.FUSED[backends.choose(DEVICE, "triton")]
    scores = triton.score_fwd(hidden, weight, None, None)
    _, dweight, _ = triton.score_bwd(grad, hidden, weight.float(), None, False, True, False)
    wide_hidden, wide_weight = hidden.double(), weight.double()
    bound = wide_hidden.abs() @ wide_weight.abs().T
    assert ((scores - wide_hidden @ wide_weight.T).abs() <= 2e-7 * bound).all()
    bound = grad.double().abs().T @ wide_hidden.abs()
    assert ((dweight - grad.double().T @ wide_hidden).abs() <= 2e-7 * bound).all()


def test_heads_of_rows_that_are_not_there(
    poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(programs: int, device: torch.device, key: Any, args: Any, *rest: Any) -> None:
        args[1].zero_()  # as if every row had been candidate 0
        note(programs, device, key, args, *rest)

    note = backend._launch_inverse
    monkeypatch.setattr(backend, "_launch_inverse", stale)
    leaves, _, _ = head_problem("plain", 20, 3, torch.float32)
    hidden, weight, _ = leaves
    chosen = torch.tensor([4, 2**40, 9, -7, 70], device=DEVICE)
    triton = backends.FUSED[backends.choose(DEVICE, "triton")]
    scores = triton.score_fwd(hidden.detach(), weight.detach(), None, chosen)
    assert scores.isnan().all(1).tolist() == [False, True, False, True, True]
    grad = torch.ones(5, 3, device=DEVICE)
    dhidden, dweight, dbias = triton.score_bwd(
        grad, hidden.detach(), weight.detach(), chosen, True, True, True
    )
    expected = torch.zeros_like(hidden).index_fill(0, chosen[[0, 2]], 1.0) * weight.sum(0)
    torch.testing.assert_close(dhidden, expected)
    torch.testing.assert_close(dweight[0], hidden[[4, 9]].sum(0))
    assert dbias.tolist() == [5.0] * 3


def test_the_gradient_of_a_bias_alone_is_0(poisoned: None) -> None:
    p = on_device(make([3, 2], 5))
    assert p.bias is not None
    bias = p.bias.requires_grad_()
    fastrm.listwise_loss(
        p.hidden, p.weight, bias, offsets=p.offsets, target=p.target, backend="triton"
    ).backward()
    assert bias.grad is not None and bias.grad == 0


def test_heads_without_rows_and_gradients_not_asked_for() -> None:
    leaves, _, _ = head_problem("plain", 8, 2, torch.float32)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    scores = fastrm.score(*leaves, rows=none, backend="triton")
    grads = torch.autograd.grad(scores.sum(), leaves)
    assert scores.shape == (0, 2) and not any(x.any() for x in grads)
    scores = fastrm.score(leaves[0].detach(), leaves[1], leaves[2].detach(), backend="triton")
    (dweight,) = torch.autograd.grad(scores.sum(), leaves[1])
    torch.testing.assert_close(dweight[1], leaves[0].sum(0).detach())


RANKINGS = {"plackett_luce": "position_weight", "bradley_terry": "margin"}


def ranking(
    sizes: list[int], seed: int = 0, scale: float = 2.0, extra: bool = True,
    group_weight: bool = True, most: int = 5, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Scores in float64, offsets, ranks from -1 with ties, and options."""
    g = torch.Generator().manual_seed(seed)
    M, N = sum(sizes), len(sizes)
    scores = torch.randn(M, generator=g, dtype=torch.float64) * scale
    ranks = torch.randint(-1, most, (M,), generator=g)
    more = torch.rand(M, generator=g) * (torch.rand(M, generator=g) > 0.2) if extra else None
    weight = torch.rand(N, generator=g) if group_weight else None
    return dict(scores=scores, offsets=fastrm.offsets_from_sizes(sizes), ranks=ranks, extra=more,
                group_weight=weight, **options)  # fmt: skip


def run_ranking(
    name: str, p: dict[str, Any], which: str, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Loss and gradient, for the incoming gradients 1, or -1 to 1 of the groups."""
    device = DEVICE if which == "triton" else "cpu"
    p = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    scores, extra = p.pop("scores").to(dtype).detach().requires_grad_(), p.pop("extra")
    function = getattr(fastrm, f"{name}_loss_from_scores")
    loss = function(scores, **{RANKINGS[name]: extra}, **p, backend=which)
    up = torch.linspace(-1, 1, len(loss)) if loss.dim() else torch.ones(())
    return [loss.detach().cpu(), *[
        x.cpu() for x in torch.autograd.grad(loss, scores, up.to(device, loss.dtype))
    ]]  # fmt: skip


def ranking_oracle(name: str, p: dict[str, Any]) -> list[torch.Tensor]:
    """The same in float64, group by group and sum by sum."""
    s = p["scores"].double().detach().requires_grad_()
    tau, center = p.get("temperature", 1.0), p.get("center_coef", 0.0)
    extra = torch.ones_like(s) if name == "plackett_luce" else torch.zeros_like(s)
    extra = extra if p["extra"] is None else p["extra"].double()
    losses = []
    for a, b in zip(p["offsets"].tolist(), p["offsets"][1:].tolist(), strict=False):
        rank = [r if r >= 0 else math.inf for r in p["ranks"][a:b].tolist()]
        terms = []
        for i in range(b - a):
            lost = [j for j in range(b - a) if rank[i] < rank[j]]
            if name == "bradley_terry" and lost:
                j = a + torch.tensor(lost)
                terms.append(-F.logsigmoid((s[a + i] - s[j] - extra[j]) / tau)
                             + center * (s[a + i] + s[j]) ** 2)  # fmt: skip
            elif name == "plackett_luce" and rank[i] < math.inf:
                rest = a + torch.tensor([j for j in range(b - a) if rank[i] <= rank[j]])
                z = s[rest] / tau
                terms.append(extra[a + i, None] * (z.logsumexp(0) - s[a + i] / tau))
        found = torch.cat([0 * s[a:b], *terms])
        if name == "bradley_terry":
            losses.append(found.sum() / max(len(found) - (b - a), 1))
        else:
            losses.append(found.sum() + center * (2 * s[a:b].mean()) ** 2)
    loss = torch.stack(losses)
    if p["group_weight"] is not None:
        loss = loss * p["group_weight"].double()
    reduction, items = p.get("reduction", "mean"), p.get("num_items_in_batch")
    up = torch.ones(())
    if reduction == "none":
        up = torch.linspace(-1, 1, len(loss))
    else:
        N = 1 if reduction == "sum" else len(loss) if items is None else float(items)
        loss = loss.sum() / N
    return [loss.detach(), *torch.autograd.grad(loss, s, up.to(loss.dtype))]


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_match_the_oracle(poisoned: None, name: str) -> None:
    @settings(max_examples=12 if DEVICE == "cpu" else 100, deadline=None, database=None)
    @given(
        sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 2**20),
        scale=st.sampled_from([0.0, 2.0, 100.0]), extra=st.booleans(),
        group_weight=st.booleans(), most=st.sampled_from([0, 1, 3, 1000]),
        temperature=st.sampled_from([1.0, 0.3, 2.7]), center_coef=st.sampled_from([0.0, 0.7]),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        num_items_in_batch=st.sampled_from([None, 7, torch.tensor(3.0)]),
    )  # fmt: skip
    def check(**options: Any) -> None:
        p = ranking(**options)
        for got, x in zip(run_ranking(name, p, "triton"), ranking_oracle(name, p), strict=True):
            scale = max(1.0, float(x.abs().max()))
            assert float((got - x).abs().max()) <= 1e-11 * scale

    check()


@pytest.mark.parametrize("shares", [(4, 4), (4, 8), (64, 1)])
def test_rankings_that_cross_programs(
    poisoned: None, monkeypatch: pytest.MonkeyPatch, shares: tuple[int, int]
) -> None:
    """Blocks of few candidates: groups and classes that begin, go on and end anywhere."""
    if DEVICE == "cuda":
        shares = (max(shares[0], 32), shares[1])
    monkeypatch.setattr(rows, "scan_blocks", lambda device: shares)
    for sizes, most in (([30], 3), ([1, 20, 4, 4, 8, 1], 2), ([40], 1), ([3] * 6, 100)):
        p = ranking(sizes, most=most, center_coef=0.2, temperature=0.6)
        exact = ranking_oracle("plackett_luce", p)
        got = run_ranking("plackett_luce", p, "triton")
        assert all(error(a, b) < 1e-13 for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_have_eager_accuracy(name: str) -> None:
    """Losses within 2x, gradients within 3x the error of the reference in fp32."""
    ours, eager = [0.0, 0.0], [0.0, 0.0]
    for kind in ("uniform", "giant", "pairs"):
        for reduction, at in (("none", 0), ("mean", 1)):
            sizes = ragged_sizes(kind, 40, torch.Generator().manual_seed(1))
            p = ranking(sizes, temperature=0.7, center_coef=0.1, reduction=reduction)
            p["scores"] = p["scores"].float()
            exact = ranking_oracle(name, p)[at]
            ours[at] += error(run_ranking(name, p, "triton", torch.float32)[at], exact) ** 2
            eager[at] += error(run_ranking(name, p, "torch", torch.float32)[at], exact) ** 2
    assert ours[0] ** 0.5 <= 2 * eager[0] ** 0.5 and ours[1] ** 0.5 <= 3 * eager[1] ** 0.5


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("scale", [40.0, 1e4])
def test_rankings_of_extreme_scores(name: str, scale: float) -> None:
    """No overflow; and for pairs, log(1 + e^x) of a small e^x is not rounded away."""
    p = ranking([2, 9, 30], scale=scale, extra=False)
    p["scores"] = p["scores"].float()
    exact = ranking_oracle(name, p)
    got = run_ranking(name, p, "triton", torch.float32)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, exact, strict=True))
    if name == "bradley_terry":
        p = ranking([2], extra=False) | dict(
            scores=torch.tensor([scale, -1.0]), ranks=torch.arange(2)
        )
        exact = ranking_oracle(name, p)
        got = run_ranking(name, p, "triton", torch.float32)
        assert all(error(a, b) < 1e-6 for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_have_the_same_bits_every_run(name: str) -> None:
    p = ranking(ragged_sizes("zipf", 40, torch.Generator().manual_seed(2)))
    first = run_ranking(name, p, "triton", torch.float32)
    again = run_ranking(name, p, "triton", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_rankings_by_narrow_integers(dtype: torch.dtype) -> None:
    p = ranking([3, 40], most=60) | dict(offsets=torch.tensor([0, 3, 43]))
    p["ranks"] = p["ranks"].abs() if dtype == torch.uint8 else p["ranks"]
    narrow = p | dict(ranks=p["ranks"].to(dtype), offsets=p["offsets"].to(dtype))
    for name in RANKINGS:
        wide, found = run_ranking(name, p, "triton"), run_ranking(name, narrow, "triton")
        assert all(torch.equal(a, b) for a, b in zip(wide, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_groups_by_narrow_integers(dtype: torch.dtype) -> None:
    p = make([1, 3, 7, 2, 40], 33, gathered=True)
    last = 255 if dtype == torch.uint8 else 127
    p.options["rows"][-1] = last  # what masked lanes must not be taken for
    p.options["rows"] = p.options["rows"].to(dtype)
    p = replace(p, hidden=torch.randn(4, 64, 33), weight=p.weight.float(), bias=None)
    narrow = replace(p, offsets=p.offsets.to(dtype), target=p.target.to(dtype))
    wide, found = p.run("cpp"), on_device(narrow).run("triton")
    for name in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(found[name].cpu(), wide[name], rtol=1e-5, atol=1e-6, msg=name)
    assert wide["dhidden"].reshape(-1, 33)[last].abs().max() > 0


HOSTILE = {
    "fall": [0, 10, 3, 16], "huge": [0, 2**40, 2**50, 16], "negative": [0, -5, -3, 16],
    "short": [0, 3, 8, 12], "long": [0, 3, 8, 17], "late": [1, 3, 8, 16], "empty": [0, 8, 8, 16],
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", RANKINGS)
def test_hostile_rankings_give_nan(poisoned: None, name: str, reduction: str) -> None:
    """On a device nothing checks values: no access outside, NaN where something is invalid."""
    forward = getattr(backends.FUSED["triton"], f"{name}_fwd")
    p = ranking([3, 5, 8])
    scores, ranks = p["scores"].to(DEVICE), p["ranks"].to(DEVICE)

    def run(offsets: list[int], ranks: torch.Tensor) -> Any:
        return forward(scores, torch.tensor(offsets, device=DEVICE), ranks, None, None, None, 1.0,
                       0.1, reduction, True)  # fmt: skip

    good = run([0, 3, 8, 16], ranks)
    for case, offsets in HOSTILE.items():
        loss, coef = run(offsets, ranks)
        assert loss.isnan().any(), case
        if case in ("short", "long", "late"):  # which groups are wrong cannot be known
            assert loss.isnan().all() and coef.isnan().all(), case
    bad = ranks.clone()
    bad[4], bad[6] = -2, -(2**63)
    loss, coef = run([0, 3, 8, 16], bad)
    inside = torch.zeros(16, dtype=torch.bool)
    inside[3:8] = True
    assert torch.equal(coef.isnan().cpu(), inside)
    assert torch.equal(coef.cpu()[~inside], good[1].cpu()[~inside])
    wrong = loss.isnan().tolist()
    assert wrong is True if reduction == "mean" else wrong == [False, True, False]
    with pytest.raises(ValueError, match="got no group"):
        run([0], ranks)


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_with_nan_scores_spare_other_groups(name: str) -> None:
    p = ranking([7, 20, 13], most=4, reduction="none", group_weight=False)
    clean = run_ranking(name, p, "triton")
    p["scores"][12] = math.nan
    p["ranks"][12] = 0
    loss, grad = run_ranking(name, p, "triton")
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss[::2], clean[0][::2])
    assert torch.equal(grad[:7], clean[1][:7]) and torch.equal(grad[27:], clean[1][27:])


@pytest.mark.parametrize("name", RANKINGS)
def test_nothing_to_rank(name: str) -> None:
    for reduction, shape in (("mean", ()), ("none", (0,))):
        p = ranking([], reduction=reduction)
        loss, grad = run_ranking(name, p, "triton")
        assert loss.shape == shape and not loss.any() and grad.shape == (0,)


@pytest.mark.parametrize("name", RANKINGS)
def test_ranking_operators(name: str) -> None:
    op = getattr(backend, f"_{name}_fwd_op")
    none: dict[str, Any] = {"extra": False, "group_weight": False}
    cases: Any = (("mean", True, {}), ("none", True, none), ("sum", False, {}))
    for reduction, needs, options in cases:
        p = ranking([3, 1, 7], **options)
        tensors = [p[k] if p[k] is None else p[k].to(DEVICE) for k in (
            "scores", "offsets", "ranks", "extra", "group_weight",
        )]  # fmt: skip
        torch.library.opcheck(op, (*tensors, None, 0.7, 0.1, reduction, needs))


def test_head_operators() -> None:
    for layout in ("padded", "gathered"):
        leaves, chosen, grad = head_problem(layout, 9, 3, torch.float32)
        hidden, weight, bias = [x.detach() for x in leaves]
        torch.library.opcheck(backend._score_fwd_op, (hidden, weight, bias, chosen))
        backward = (grad.float(), hidden, weight, chosen, True, True, True)
        torch.library.opcheck(backend._score_bwd_op, backward)


@pytest.mark.parametrize(("name", "E"), [("plackett_luce", 1), ("bradley_terry", 3)])
def test_compiled_rankings_have_the_bits_of_eager(name: str, E: int) -> None:
    """hidden to loss, once for every raggedness."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss(hidden: Any, weight: Any, offsets: Any, ranks: Any, chosen: Any) -> torch.Tensor:
        function = getattr(fastrm, f"{name}_loss")
        return function(
            hidden, weight, offsets=offsets, ranks=ranks, rows=chosen, backend="triton"
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., torch.Tensor] = torch.compile(
        loss, backend=counter, fullgraph=True, dynamic=True
    )
    first = 0
    for seed, sizes in enumerate(([3, 2, 4, 1], [8, 5], [2] * 3)):
        p = on_device(make(sizes, 11, seed, gathered=True, bias=False).to(torch.float32))
        ranks = torch.arange(sum(sizes), device=DEVICE) % 3 - 1
        hidden, weight, _ = p._leaves()
        weight = torch.stack([weight.detach() * (e + 1) for e in range(E)]).requires_grad_()
        found = []
        for call in (loss, compiled):
            value = call(hidden, weight, p.offsets, ranks, p.options["rows"])
            found.append([value, *torch.autograd.grad(value, [hidden, weight])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        first = first or counter.frame_count
    assert counter.frame_count == first
