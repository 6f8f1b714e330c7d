"""The C++ kernels against a float64 oracle, and the properties the library promises of them."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastrm
from fastrm import backends

build = pytest.importorskip("fastrm_csrc.build")
try:
    build.load("auto", build.CACHE_DIR)
except build.BuildError as error:
    if os.environ.get("FASTRM_BUILD_CPP") == "1":
        raise
    pytest.skip(f"no C++ kernels here: {error}", allow_module_level=True)

ops = torch.ops.fastrm_cpp
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 7, 96, 384, 576, 896, 1000, 3584, 4096, 5120, 16384]


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(autouse=True)
def same_start():
    threads, isa = torch.get_num_threads(), ops.isa()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    ops.set_isa(isa)
    ops.set_huge_pages(True)


# ---- the oracle: plain PyTorch, group by group ---------------------------------------------------


def oracle(hidden, weight, bias, sizes, target, dtype, rows=None, margin=None, group_weight=None,
           num_items=None, temperature=1.0, label_smoothing=0.0, center_coef=0.0,
           reduction="mean"):  # fmt: skip
    """Loss and scores in `dtype`, differentiable."""
    h = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    h = h if rows is None else h[rows.long()]
    scores = h @ weight.reshape(-1).to(dtype)
    if bias is not None:
        scores = scores + bias.reshape(()).to(dtype)
    losses, counted, start = [], 0, 0
    for n, size in enumerate(sizes):
        part = slice(start, start + size)
        start += size
        s = scores[part]
        if target.is_floating_point():
            q = target[part].to(dtype)
        elif target[n] < 0:
            losses.append(0 * s.sum())
            continue
        else:
            q = torch.nn.functional.one_hot(target[n].long(), size).to(dtype)
        counted += 1
        m = 0 if margin is None else margin[part].to(dtype) * (q == 0)
        z = (s + m) / temperature
        q = (1 - label_smoothing) * q + label_smoothing / size
        loss = -(q * z.log_softmax(0)).sum() + center_coef * (2 * s.mean()) ** 2
        losses.append(loss if group_weight is None else loss * group_weight[n].to(dtype))
    loss = torch.stack(losses) if losses else torch.zeros(0, dtype=dtype)
    if reduction == "sum":
        return loss.sum(), scores
    if reduction == "mean":
        divisor = max(counted, 1) if num_items is None else float(num_items)
        return loss.sum() / divisor, scores
    return loss, scores


class Listwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, offsets, target, options):
        o = {"rows": None, "margin": None, "group_weight": None, "num_items": None,
             "temperature": 1.0, "label_smoothing": 0.0, "center_coef": 0.0,
             "reduction": "mean", **options}  # fmt: skip
        needs = ctx.needs_input_grad
        loss, scores, coef, unit = ops.listwise_fwd(
            hidden, weight, bias, offsets, target, o["rows"], o["margin"], o["group_weight"],
            o["num_items"], o["temperature"], o["label_smoothing"], o["center_coef"],
            o["reduction"], any(needs), needs[1],
        )  # fmt: skip
        ctx.none = o["reduction"] == "none"
        ctx.shift_invariant = o["center_coef"] == 0
        keep = (hidden, offsets) if ctx.none else (None, None)
        ctx.save_for_backward(coef, unit, weight, o["rows"], *keep)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(scores)
        return loss, scores

    @staticmethod
    def backward(ctx, grad, _):
        coef, unit, weight, rows, hidden, offsets = ctx.saved_tensors
        needs = ctx.needs_input_grad
        out = ops.head_bwd(
            grad, coef, offsets, weight, rows, hidden, None if ctx.none else unit, ctx.shape,
            ctx.dtype, *needs[:2], needs[2] and not ctx.shift_invariant,
        )  # fmt: skip
        out = (*out[:2], torch.zeros_like(out[2].sum()) if ctx.shift_invariant else out[2])
        out = [g if need else None for g, need in zip(out, needs[:3], strict=True)]
        return *out, None, None, None


def offsets_of(sizes, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)


def make(sizes, D, dtype, seed=0, scale=1.0, soft=False, weight_dtype=None, leave_out=0.0):
    g = torch.Generator().manual_seed(seed)
    M = sum(sizes)
    hidden = torch.randn(M, D, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(D, generator=g, dtype=torch.float64) * scale / math.sqrt(D)
    weight = weight.to(weight_dtype or dtype)
    if soft:
        target = torch.cat([torch.rand(k, generator=g).softmax(0) for k in sizes])
    else:
        high = torch.tensor(sizes, dtype=torch.float64)
        target = (torch.rand(len(sizes), generator=g, dtype=torch.float64) * high).long()
        target[torch.rand(len(sizes), generator=g) < leave_out] = -100
    return hidden, weight, torch.tensor(0.25, dtype=acc(dtype)), target


def run(fn, hidden, weight, bias, grad=None):
    """Loss, scores and the three gradients of fn at copies of the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, scores = fn(*leaves)
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
    return loss.detach(), scores.detach(), *(t.grad for t in leaves)


def error(value, exact):
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_close(
    sizes, hidden, weight, bias, target, grad=None, index_dtype=torch.int64, **options
):
    """Loss within 2x and gradients within 3x of the error of eager PyTorch in A, or one ulp."""
    A = acc(hidden.dtype)
    exact = run(
        lambda h, w, b: oracle(h, w, b, sizes, target, torch.float64, **options),
        hidden.double(), weight.double(), bias.double(), grad,
    )  # fmt: skip
    eager = run(
        lambda h, w, b: oracle(h, w, b, sizes, target, A, **options), hidden, weight, bias, grad
    )
    tensors = dict(options)
    if "num_items" in tensors:
        tensors["num_items"] = torch.tensor(tensors["num_items"])
    offsets = offsets_of(sizes, index_dtype)
    fused = run(
        lambda h, w, b: Listwise.apply(h, w, b, offsets, target, tensors),
        hidden, weight, bias, grad,
    )  # fmt: skip
    # One ulp of what each result is made of: scores are sums of D products, coefficients are
    # differences of probabilities as exact as the scores, gradients are coefficients times rows.
    eps, w64 = torch.finfo(A).eps, weight.double()
    h64 = hidden.double().reshape(-1, hidden.shape[-1])
    score_ulp = eps * max((h64.abs() @ w64.abs().reshape(-1)).nan_to_num().max().item(), 1.0)
    temperature, center = options.get("temperature", 1.0), options.get("center_coef", 0.0)
    share = 1.0 if grad is None else grad.abs().max().item()
    share *= options.get("group_weight", torch.ones(1)).abs().max().item()
    if options.get("reduction", "mean") == "mean":
        counted = len(sizes) if target.is_floating_point() else (target >= 0).sum().item()
        share /= options.get("num_items", max(counted, 1))
    coef_ulp = score_ulp * share * (1 / temperature**2 + 8 * center)
    floors = {
        "loss": score_ulp * share * (1 / temperature + 8 * center * exact[1].abs().max().item()),
        "scores": score_ulp,
        "dhidden": coef_ulp * w64.abs().max().item(),
        "dweight": coef_ulp * h64.nan_to_num().abs().max().item() * math.sqrt(len(sizes)),
        "dbias": coef_ulp * math.sqrt(len(sizes)),
    }
    for (name, floor), ours, theirs, truth in zip(floors.items(), fused, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if name == "dbias" and center == 0:
            assert ours.item() == 0
            continue
        info = torch.finfo(ours.dtype)
        floor += info.eps * (truth.abs().max().item() + info.tiny)
        limit = (2 if name in ("loss", "scores") else 3) * max(error(theirs, truth), floor)
        assert error(ours, truth) <= limit, f"{name}: {error(ours, truth)} > {limit}"


# ---- values --------------------------------------------------------------------------------------


def zipf(n, top):
    return [max(1, top // (i + 1)) for i in range(n)]


RAGGED = {
    "one_of_one": [1],
    "ones": [1] * 9,
    "mixed": [1, 5, 2, 16, 1, 3, 40],
    "pairs": [2] * 33,
    "long": [70],
    "zipf": zipf(12, 300),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", DIMS)
def test_dims(D, dtype):
    for name in ("mixed", "long"):
        sizes = RAGGED[name]
        assert_close(sizes, *make(sizes, D, dtype, seed=D))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_raggedness(name, dtype):
    sizes = RAGGED[name]
    assert_close(sizes, *make(sizes, 96, dtype, leave_out=0.2))


@pytest.mark.parametrize("D", [1, 64, 4096])
def test_giant_group_in_pieces(D):
    sizes = [3, 9000 if D < 4096 else 400, 2, 1]
    options = dict(center_coef=0.1, label_smoothing=0.1, temperature=0.7)
    assert_close(sizes, *make(sizes, D, torch.float32, scale=3.0))
    assert_close(sizes, *make(sizes, D, torch.bfloat16, scale=3.0), **options)
    assert_close(sizes, *make(sizes, D, torch.float32, soft=True), **options)


def test_many_pairs():
    sizes = [2] * 10_000
    hidden, weight, bias, target = make(sizes, 64, torch.float32)
    offsets = offsets_of(sizes)
    loss, scores = Listwise.apply(hidden, weight, bias, offsets, target, {})
    s = (hidden.double() @ weight.double()).view(-1, 2)
    exact = torch.nn.functional.cross_entropy(s, target)
    assert abs(loss.item() - exact.item()) < 1e-6


@st.composite
def problems(draw):
    sizes = draw(
        st.one_of(
            st.lists(st.integers(1, 12), min_size=1, max_size=20),
            st.lists(st.sampled_from([1, 2, 60, 150]), min_size=1, max_size=4),
        )
    )
    options = {}
    soft = draw(st.booleans())
    M, N = sum(sizes), len(sizes)
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        options["margin"] = torch.randn(M, generator=g)
    if draw(st.booleans()):
        options["group_weight"] = torch.rand(N, generator=g) + 0.1
    if draw(st.booleans()):
        options["num_items"] = draw(st.sampled_from([1, 3, 100]))
    options["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    options["center_coef"] = draw(st.sampled_from([0.0, 0.01, 0.5]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    grad = torch.tensor(draw(st.sampled_from([1.0, -2.5, 1024.0])))
    if options["reduction"] == "none":
        grad = torch.randn(N, generator=g)
    dtype = draw(st.sampled_from(DTYPES))
    weight_dtype = draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    D = draw(st.sampled_from([1, 3, 17, 64, 130, 1030]))
    tensors = make(sizes, D, dtype, draw(st.integers(0, 1000)), draw(st.sampled_from([0.1, 1, 8])),
                   soft, weight_dtype, 0.2)  # fmt: skip
    layout = draw(st.sampled_from(["flat", "rows", "padded", "strided", "one_row_weight"]))
    hidden, weight, bias, target = tensors
    if layout in ("rows", "padded"):
        B, S = draw(st.integers(1, 3)), M + draw(st.integers(0, 5))
        options["rows"] = torch.randperm(B * S, generator=g)[:M].int()
        hidden = torch.randn(B, S, D, generator=g, dtype=torch.float64).to(dtype)
        if layout == "padded":
            hidden = torch.cat([hidden, hidden.new_full((B, 2, D), math.nan)], 1)[:, :S]
    elif layout == "strided":
        hidden = torch.cat([hidden, hidden], 1)[:, :D]
    elif layout == "one_row_weight":
        weight = weight.view(1, -1)
    return sizes, (hidden, weight, bias, target), grad, options


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from(ops.isas()))
def test_any_problem(problem, index_dtype, isa):
    sizes, tensors, grad, options = problem
    ops.set_isa(isa)
    assert_close(sizes, *tensors, grad=grad, index_dtype=index_dtype, **options)


def test_half_precision_soft_target():
    sizes = [3, 4]
    hidden, weight, bias, target = make(sizes, 32, torch.bfloat16, soft=True)
    assert_close(sizes, hidden, weight, bias, target.bfloat16())


@pytest.mark.parametrize("stride0", ["rows", "batch", "last"])
def test_expanded_hidden(stride0):
    base = torch.randn(64)
    hidden = {
        "rows": base.expand(6, 64),
        "batch": torch.randn(3, 64).expand(2, 3, 64),
        "last": torch.randn(6, 1).expand(6, 64),
    }[stride0]
    assert_close([2, 4], hidden, torch.randn(64), torch.tensor(0.0), torch.tensor([1, 3]))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_scores(size):
    hidden = torch.tensor([[1.0], [-1.0], [0.5]])
    weight, offsets = torch.tensor([size]), torch.tensor([0, 3])
    loss, _ = Listwise.apply(hidden, weight, None, offsets, torch.tensor([0]), {})
    assert loss.item() == 0
    loss, _ = Listwise.apply(hidden, weight, None, offsets, torch.tensor([1]), {})
    assert loss.item() == pytest.approx(2 * size, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("K", [3, 300])
def test_non_finite_scores_give_nan(bad, K):
    hidden = torch.ones(K, 4)
    hidden[1] = bad
    args = (torch.ones(4), None, torch.tensor([0, K]), torch.tensor([0]), {})
    assert Listwise.apply(hidden, *args)[0].isnan()


def test_left_out_group_takes_no_part():
    hidden = torch.randn(5, 8)
    hidden[3:] = math.nan
    weight = torch.randn(8, requires_grad=True)
    h = hidden.requires_grad_()
    offsets, target = torch.tensor([0, 3, 5]), torch.tensor([1, -100])
    loss, _ = Listwise.apply(h, weight, None, offsets, target, {})
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert (h.grad[3:] == 0).all() and (h.grad[:3] != 0).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_groups(reduction):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    args = (None, torch.tensor([0]), torch.zeros(0, dtype=torch.int64), {"reduction": reduction})
    loss, scores = Listwise.apply(hidden, weight, *args)
    assert loss.shape == ((0,) if reduction == "none" else ()) and scores.shape == (0,)
    loss.sum().backward()
    assert hidden.grad.shape == (0, 8) and (weight.grad == 0).all()


def test_no_groups_but_rows():
    hidden = torch.full((2, 3, 8), math.nan).requires_grad_()
    weight, empty = torch.randn(8, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, _ = Listwise.apply(hidden, weight, None, torch.tensor([0]), empty, {"rows": empty})
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_only_what_is_asked_for():
    hidden, weight, _, target = make([3, 4], 16, torch.float32)
    offsets = offsets_of([3, 4])
    common = (hidden, weight, None, offsets, target, None, None, None, None, 1.0, 0.0, 0.0, "mean")
    _, _, coef, dweight = ops.listwise_fwd(*common, False, False)
    assert coef.shape == dweight.shape == (0,)
    for needs in itertools.product([True, False], repeat=3):
        out = ops.head_bwd(torch.tensor(1.0), torch.ones(7), None, weight, None, hidden, None,
                            [7, 16], torch.float32, *needs)  # fmt: skip
        shapes = [(7, 16), (16,), ()]
        for g, need, shape in zip(out, needs, shapes, strict=True):
            assert g.shape == (shape if need else (0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_score(dtype, gathered):
    hidden = torch.randn(3, 50, 100, dtype=torch.float64).to(dtype)
    weight = torch.randn(1, 100, dtype=torch.float64).to(dtype)
    rows = torch.randperm(150)[:60] if gathered else None
    bias = torch.tensor([0.5])
    scores = ops.score(hidden, weight, bias, rows)
    flat = hidden.reshape(-1, 100)
    flat = flat if rows is None else flat[rows]
    exact = flat.double() @ weight[0].double() + 0.5
    assert scores.dtype == acc(dtype)
    eps = torch.finfo(scores.dtype).eps
    assert error(scores, exact) <= 4 * eps * (flat.double().abs() @ weight[0].double().abs()).max()
    grad = torch.randn(len(scores), dtype=acc(dtype))
    dhidden, dweight, dbias = ops.head_bwd(
        torch.ones(()), grad, None, weight, rows, hidden, None, hidden.shape, dtype,
        True, True, True,
    )  # fmt: skip
    outer = grad.double()[:, None] * weight.double()
    want = torch.zeros(150, 100, dtype=torch.float64)
    want[rows if gathered else slice(None)] = outer
    eps = torch.finfo(dtype).eps
    assert error(dhidden.view(150, 100), want) <= eps * want.abs().max()
    assert dweight.shape == weight.shape and dweight.dtype == weight.dtype
    want, eager = grad.double() @ flat.double(), grad @ flat.to(acc(dtype))
    # Where eager is the oracle itself, that is no better than 1e-13.
    unit = 1e-13 if dtype == torch.float64 else eps
    allowed = max(3 * (eager.double() - want).norm(), unit * want.norm())
    assert (dweight[0].double() - want).norm() <= allowed
    assert dbias.item() == pytest.approx(grad.double().sum().item(), rel=1e-5)


def test_score_of_a_row_does_not_depend_on_the_others():
    hidden, weight = torch.randn(37, 1000), torch.randn(1000)
    all_scores = ops.score(hidden, weight, None, None)
    for i in (0, 5, 35, 36):
        assert torch.equal(ops.score(hidden[i : i + 1], weight, None, None)[0], all_scores[i])


# ---- several heads -------------------------------------------------------------------------------


def assert_heads_close(hidden, weight, bias, rows, grad):
    """Scores and gradients of E heads against float64: relative to the sums of magnitudes that they
    are made of, so that what cancels is not held against them."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    scores = ops.score(*leaves, rows)
    scores.backward(grad.to(scores.dtype))
    h = hidden.detach().double().reshape(-1, hidden.shape[-1])
    chosen = h if rows is None else h[rows.long()]
    w, b, g = weight.detach().double(), bias.double(), grad.double()

    def spread(x):
        return x if rows is None else torch.zeros_like(h).index_copy(0, rows.long(), x)

    exact = {
        "scores": (chosen @ w.T + b, chosen.abs() @ w.abs().T + b.abs(), scores),
        "dhidden": (spread(g @ w), spread(g.abs() @ w.abs()), leaves[0].grad.reshape(h.shape)),
        "dweight": (g.T @ chosen, g.abs().T @ chosen.abs(), leaves[1].grad),
        "dbias": (g.sum(0), g.abs().sum(0), leaves[2].grad),
    }
    for name, (want, size, got) in exact.items():
        assert got.shape == want.shape, name
        # A sum of a few parts of a hundred terms, then one rounding to the output's type.
        unit = 8 * torch.finfo(acc(hidden.dtype)).eps + torch.finfo(got.dtype).eps
        tiny = torch.finfo(got.dtype).tiny * len(h)
        assert (got.double() - want).abs().sub(unit * size + tiny).max() <= 0, name


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(ops.isas()), st.integers(2, 21))
def test_heads(data, dtype, isa, E):
    ops.set_isa(isa)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    D = data.draw(st.sampled_from([1, 7, 64, 100, 513, 1000, 2049]))
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    hidden = torch.randn(B, S, D, generator=g, dtype=torch.float64).to(dtype)
    layout = data.draw(st.sampled_from(["flat", "batched", "strided", "expanded", "columns"]))
    if layout == "flat":
        hidden = hidden.view(B * S, D)
    elif layout == "strided":
        hidden = torch.cat([hidden, hidden.new_full((B, 2, D), math.nan)], 1)[:, :S]
    elif layout == "expanded":
        hidden = hidden[:1].expand(B, S, D)
    elif layout == "columns":
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    rows = None
    if data.draw(st.booleans()):
        rows = torch.randperm(B * S, generator=g)[: data.draw(st.integers(1, B * S))].int()
    weight_dtype = data.draw(st.sampled_from([dtype, torch.float32, torch.bfloat16]))
    weight = (torch.randn(E, D, generator=g) / math.sqrt(D)).to(weight_dtype)
    bias = torch.randn(E, generator=g).to(data.draw(st.sampled_from([torch.float32, dtype])))
    grad = torch.randn(B * S if rows is None else len(rows), E, generator=g)
    assert_heads_close(hidden, weight, bias, rows, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ops.isas())
def test_heads_isa(isa, dtype):
    ops.set_isa(isa)
    hidden, bias = torch.randn(300, 1100, dtype=torch.float64).to(dtype), torch.randn(9)
    weight, grad = torch.randn(9, 1100).div(33).to(dtype), torch.randn(9, 300)
    assert_heads_close(hidden, weight, bias, None, grad.T)  # strided, as that of a transpose comes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_bits_do_not_depend_on_threads_or_neighbours(dtype):
    hidden, weight = torch.randn(700, 2100).to(dtype), torch.randn(5, 2100)
    grad = torch.randn(700, 5)
    offsets, target = offsets_of([300, 1, 2, 397]), torch.tensor([7, 0, -100, 5])

    def once():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        scores = ops.score(*leaves)
        scores.backward(grad)
        loss = fastrm.listwise_loss(*leaves, offsets=offsets, target=target, temperature=0.9)
        return scores.detach(), loss.detach(), *(x.grad for x in leaves), *torch.autograd.grad(
            loss, leaves
        )

    first = once()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True))
    for i in (0, 37, 699):
        assert torch.equal(ops.score(hidden[i : i + 1], weight)[0], first[0][i])
    assert torch.equal(ops.score(hidden, weight[:2]), first[0][:, :2])


def test_heads_leave_out_rows_that_take_no_part():
    hidden, weight = torch.randn(5, 8), torch.full((3, 8), math.inf)
    hidden[3:] = math.nan
    dscores = torch.randn(5, 3)
    dscores[3:] = 0
    dhidden, dweight, _ = ops.heads_bwd(
        dscores, weight, None, hidden, hidden.shape, torch.float32, True, True, True
    )
    assert dweight.isfinite().all() and (dhidden[3:] == 0).all()
    no_rows = ops.heads_bwd(dscores[:0], weight, torch.zeros(0, dtype=torch.int64), hidden,
                            hidden.shape, torch.float32, True, True, True)  # fmt: skip
    assert all((x == 0).all() for x in no_rows)


def test_heads_refuse():
    hidden, weight = torch.ones(5, 4), torch.ones(3, 4)
    for args, kind, message in [
        ((hidden, torch.ones(3, 5), None), ValueError, r"or, for E heads, \(E, 4\)"),
        ((hidden, torch.ones(0, 4), None), ValueError, "weight must have shape"),
        ((hidden, torch.ones(3, 4, 1), None), ValueError, "weight must have shape"),
        ((hidden, weight, torch.ones(2)), ValueError, r"bias must have shape \(3,\)"),
        ((hidden, weight, torch.ones(())), ValueError, r"bias must have shape \(3,\)"),
        ((hidden, weight.int(), None), TypeError, "weight"),
        ((hidden, weight, None, torch.tensor([5])), ValueError, r"rows\[0\] = 5"),
    ]:
        with pytest.raises(kind, match=message):
            ops.score(*args)
    for dscores, rows, message in [
        (torch.ones(4, 3), None, "dscores has 4 rows for 5"),
        (torch.ones(5, 2), None, "dscores must have shape"),
        (torch.ones(5), None, "dscores must have shape"),
        (torch.ones(1, 3), torch.tensor([-1]), r"rows\[0\] = -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.heads_bwd(dscores, weight, rows, hidden, [5, 4], torch.float32, True, True, True)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(ops.score(hidden, weight).sum(), hidden)
    assert torch.equal(grad, torch.full((5, 4), 3.0))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(ops.score(hidden, weight).sum(), hidden, create_graph=True)


# ---- rankings ------------------------------------------------------------------------------------

RANKINGS = ["plackett_luce", "bradley_terry"]


def ranking_oracle(name, scores, sizes, ranks, extra=None, group_weight=None, num_items=None,
                   temperature=1.0, center_coef=0.0, reduction="mean"):  # fmt: skip
    """The formulas of the docstrings, a group at a time, every pair and every sum spelled out."""
    losses, start = [], 0
    for n, K in enumerate(sizes):
        part = slice(start, start + K)
        start += K
        s, x = scores[part], None if extra is None else extra[part].to(scores.dtype)
        rank = torch.where(ranks[part] < 0, torch.iinfo(torch.int64).max, ranks[part].long())
        if name == "plackett_luce":
            z = s / temperature
            below = rank[None, :] >= rank[:, None]  # [i, j]: j is not above i
            sums = z.expand(K, K).masked_fill(~below, -math.inf).logsumexp(1)
            weight = (ranks[part] >= 0).to(s.dtype) * (1 if x is None else x)
            loss = (weight * (sums - z)).sum() + center_coef * (2 * s.mean()) ** 2
        else:
            lose = s if x is None else s + x
            wins = rank[:, None] < rank[None, :]  # [i, j]: i beats j
            pair = torch.nn.functional.logsigmoid((s[:, None] - lose[None, :]) / temperature)
            pair = center_coef * (s[:, None] + s[None, :]) ** 2 - pair
            loss = torch.where(wins, pair, 0).sum() / wins.sum().clamp(min=1)
        losses.append(loss if group_weight is None else loss * group_weight[n].to(s.dtype))
    loss = torch.stack(losses) if losses else scores.new_zeros(0)
    if reduction == "none":
        return loss
    divisor = 1 if reduction == "sum" else max(len(sizes), 1) if num_items is None else num_items
    return loss.sum() / divisor


def ranking_run(fn, scores, grad=None):
    scores = scores.detach().requires_grad_()
    loss = fn(scores)
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
    return loss.detach(), scores.grad


def ranking_op(name, sizes, ranks, **options):
    if "num_items" in options:
        options["num_items"] = torch.tensor(options["num_items"])
    fn = getattr(ops, name)
    return lambda scores: fn(scores, offsets_of(sizes), ranks, **options)


def assert_ranking_close(name, scores, sizes, ranks, grad=None, **options):
    """Loss within 2x and gradients within 3x of the error of eager PyTorch, or some ulps."""

    def oracle(x):
        return ranking_oracle(name, x, sizes, ranks, **options)

    exact = ranking_run(oracle, scores.double(), grad)
    eager = ranking_run(oracle, scores, grad)
    ours = ranking_run(ranking_op(name, sizes, ranks, **options), scores, grad)
    eps, z = torch.finfo(scores.dtype).eps, scores.double().abs().max().item()
    # Where eager is the oracle itself it says nothing: an error in z is one in each term.
    unit = 16 * torch.finfo(torch.float64).eps * (1 + z / options.get("temperature", 1.0))
    for times, our, their, want in zip((2, 3), ours, eager, exact, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        size = max(want.abs().max().item(), *(x.abs().max().item() for x in exact)) + 1
        floor = unit * size * max(sizes) + eps * want.abs().max().item()
        assert error(our, want) <= times * max(error(their, want), floor)


@st.composite
def rankings(draw):
    sizes = draw(
        st.one_of(
            st.lists(st.integers(1, 12), min_size=1, max_size=20),
            st.lists(st.sampled_from([1, 2, 60, 150]), min_size=1, max_size=4),
        )
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    M, N = sum(sizes), len(sizes)
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int8]))
    ranks = torch.randint(-1, draw(st.sampled_from([0, 1, 2, 5, 120])), (M,), generator=g).to(kind)
    options = {}
    if draw(st.booleans()):
        options["extra"] = torch.randn(M, generator=g).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        options["group_weight"] = torch.rand(N, generator=g) + 0.1
    if draw(st.booleans()):
        options["num_items"] = draw(st.sampled_from([1, 3, 100]))
    options["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    options["center_coef"] = draw(st.sampled_from([0.0, 0.01, 0.5]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    grad = torch.tensor(draw(st.sampled_from([1.0, -2.5, 1024.0])))
    if options["reduction"] == "none":
        grad = torch.randn(N, generator=g)
    scores = torch.randn(M, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.1, 3, 200]))
    scores = scores.to(draw(st.sampled_from([torch.float64, torch.float32])))
    if draw(st.booleans()):
        scores = scores[:, None].expand(M, 3)[:, 1]
    return scores, sizes, ranks, grad, options


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(RANKINGS), rankings(), st.sampled_from(ops.isas()))
def test_any_ranking(name, problem, isa):
    scores, sizes, ranks, grad, options = problem
    ops.set_isa(isa)
    assert_ranking_close(name, scores, sizes, ranks, grad, **options)


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_long_ranking(name, dtype):
    """Long enough for the pairs to be cut in pieces."""
    sizes = [3, 1600, 2]
    ranks = torch.randint(-1, 900, (sum(sizes),))
    scores = torch.randn(sum(sizes), dtype=dtype) * 2
    extra = torch.rand(sum(sizes))
    assert_ranking_close(name, scores, sizes, ranks, extra=extra, center_coef=0.1)


@pytest.mark.parametrize("name", RANKINGS)
def test_ranking_gradcheck(name):
    sizes, ranks = [3, 1, 6], torch.tensor([1, 0, -1, 0, 2, 0, 0, 1, -1, -1])
    scores = torch.randn(10, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        fn = ranking_op(name, sizes, ranks, extra=torch.rand(10), center_coef=0.3, temperature=0.7,
                        group_weight=torch.rand(3), reduction=reduction)  # fmt: skip
        torch.autograd.gradcheck(fn, scores)


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", [[3000], [4] * 3000, zipf(30, 2500)], ids=["one", "4s", "zipf"])
def test_ranking_bits_do_not_depend_on_threads(name, reduction, sizes):
    scores, ranks = torch.randn(sum(sizes)), torch.randint(-1, 50, (sum(sizes),))
    fn = ranking_op(name, sizes, ranks, reduction=reduction, center_coef=0.01)
    first = ranking_run(fn, scores)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for ours, want in zip(ranking_run(fn, scores), first, strict=True):
            assert torch.equal(ours, want)


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e30])
def test_extreme_scores_of_rankings(name, shift):
    """Of 0 and 1e4 the better costs nothing, the worse its whole distance; a shift is not seen."""
    scores = torch.tensor([1e4, 0.0, -1e4, 5.0], dtype=torch.float64)
    scores = (scores + shift).clone()
    for ranks, least in (([0, 2, 3, 1], 0.0), ([3, 1, 0, 2], 1e4)):
        loss, grad = ranking_run(ranking_op(name, [4], torch.tensor(ranks)), scores)
        assert loss.isfinite() and grad.isfinite().all()
        if abs(shift) < 1e30:
            assert loss >= least and (least or loss < 1e-2)
    masked = torch.tensor([3.0, -math.inf, 1.0])
    loss, grad = ranking_run(ranking_op(name, [3], torch.tensor([0, -1, 1])), masked)
    want = math.log1p(math.exp(-2)) / (3 if name == "bradley_terry" else 1)
    assert loss.item() == pytest.approx(want, rel=1e-6) and grad[1] == 0
    nan = torch.tensor([3.0, math.nan, 1.0, 5.0, 6.0])
    losses = ranking_op(name, [3, 2], torch.tensor([0, -1, 1, 0, 1]), reduction="none")(nan)
    assert losses[0].isnan() and losses[1].isfinite()


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_without_anything_to_order(name):
    scores = torch.randn(3)
    loss, grad = ranking_run(ranking_op(name, [1, 2], torch.tensor([0, -1, -1])), scores)
    assert loss == 0 and (grad == 0).all()
    for reduction in ("mean", "sum", "none"):
        fn = ranking_op(name, [], torch.zeros(0, dtype=torch.int64), reduction=reduction)
        loss, grad = ranking_run(fn, torch.zeros(0))
        assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    fn = ranking_op(name, [1, 2], torch.tensor([0, 0, 1]), group_weight=torch.zeros(2))
    loss, grad = ranking_run(fn, scores)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("name", RANKINGS)
def test_the_bias_of_a_ranking_gets_no_gradient(name):
    fn = getattr(fastrm, f"{name}_loss")
    for shape in ((6,), (3, 6)):
        bias = torch.randn(shape[:-1], requires_grad=True)
        args = (torch.randn(9, 6), torch.randn(shape), bias)
        loss = fn(*args, offsets=offsets_of([4, 5]), ranks=torch.arange(9), backend="cpp")
        loss.backward()
        assert torch.equal(bias.grad, torch.zeros(shape[:-1]))
        fn(*args, offsets=offsets_of([4, 5]), ranks=torch.arange(9), backend="cpp",
           center_coef=0.1).backward()  # fmt: skip
        assert (bias.grad != 0).all()


def test_pairs_of_a_long_group_take_little_memory():
    """Its 5·10^7 pairs as a matrix would be 400 MB in fp32. The peak of a process of its own."""
    script = """
        import resource, torch
        from fastrm import backends
        backends.choose("cpu", "cpp")
        op, K = torch.ops.fastrm_cpp.bradley_terry, 10_000
        def once(K):
            scores = torch.randn(K, requires_grad=True)
            op(scores, torch.tensor([0, K]), torch.randperm(K)).backward()
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        once(10)
        before = peak()
        once(K)
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert int(out.stdout.split()[-1]) * 1024 < 40e6


@pytest.mark.parametrize("name", RANKINGS)
def test_many_rankings_and_a_long_one(name):
    """Quadratic time or a loop in Python would take minutes."""
    M = 400_000
    started = time.monotonic()
    scores, ranks = torch.randn(M), torch.randint(-1, 4, (M,))
    loss, grad = ranking_run(ranking_op(name, [4] * (M // 4), ranks), scores)
    assert loss.isfinite() and grad.isfinite().all()
    K = 100_000 if name == "plackett_luce" else 10_000
    loss, grad = ranking_run(ranking_op(name, [K], torch.randperm(K)), scores[:K])
    assert loss.isfinite() and abs(grad.double().sum().item()) < 1e-3 * grad.abs().sum().item()
    assert time.monotonic() - started < 30


RANKED = dict(
    scores=torch.ones(5), offsets=torch.tensor([0, 2, 5]), ranks=torch.tensor([0, 1, 0, 1, -1]),
    extra=None, group_weight=None, num_items=None, temperature=1.0, center_coef=0.0,
    reduction="mean", needs_coef=True,
)  # fmt: skip
BAD_RANKED = [
    (dict(offsets=torch.tensor([1, 2, 5])), ValueError, r"offsets\[0\] must be 0, got 1"),
    (dict(offsets=torch.tensor([0, 5, 5])), ValueError, r"offsets\[1\] = 5 and offsets\[2\] = 5"),
    (dict(offsets=torch.tensor([0, 2, 9])), ValueError, r"candidates 5, but offsets\[2\] = 9"),
    (dict(offsets=torch.tensor([0, 2**62, 5])), ValueError, r"offsets\[1\]"),
    (dict(offsets=torch.tensor([], dtype=torch.int64)), ValueError, "offsets"),
    (dict(offsets=torch.tensor([0.0, 2, 5])), TypeError, "offsets must hold integers"),
    (dict(ranks=torch.tensor([0, 1, -2, 0, 0])), ValueError, r"ranks\[2\] = -2 must be"),
    (dict(ranks=torch.tensor([0, 1, 2, 3])), ValueError, "each of the 5 candidates, got 4"),
    (dict(ranks=torch.ones(5)), TypeError, "ranks must hold integers"),
    (dict(ranks=torch.ones(5, dtype=torch.bool)), TypeError, "ranks must hold integers"),
    (dict(scores=torch.ones(5, 1)), ValueError, "scores must be 1-dimensional"),
    (dict(scores=torch.ones(5).half()), TypeError, "scores must be float64 or float32"),
    (dict(scores=torch.ones(5).int()), TypeError, "scores must be float64 or float32"),
    (dict(extra=torch.tensor([0, 0, math.inf, 0, 0])), ValueError, r"EXTRA\[2\] must be finite"),
    (dict(extra=torch.ones(4)), ValueError, "EXTRA must have shape"),
    (dict(extra=torch.ones(5).int()), TypeError, "EXTRA must be float64"),
    (dict(group_weight=torch.tensor([0, math.nan])), ValueError, r"group_weight\[1\]"),
    (dict(group_weight=torch.ones(3)), ValueError, "group_weight must have shape"),
    (dict(num_items=torch.tensor(0)), ValueError, "num_items_in_batch must be > 0"),
    (dict(num_items=torch.tensor(math.nan)), ValueError, "num_items_in_batch must be > 0"),
    (dict(temperature=0.0), ValueError, "temperature"),
    (dict(temperature=math.nan), ValueError, "temperature"),
    (dict(center_coef=-1.0), ValueError, "center_coef"),
    (dict(reduction="avg"), ValueError, "reduction"),
]


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("change,kind,message", BAD_RANKED, ids=[b[2][:24] for b in BAD_RANKED])
def test_bad_rankings(name, change, kind, message):
    forward = getattr(ops, f"{name}_fwd")
    forward(*RANKED.values())
    extra = "position_weight" if name == "plackett_luce" else "margin"
    with pytest.raises(kind, match=message.replace("EXTRA", extra)):
        forward(*{**RANKED, **change}.values())


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_are_differentiable_once(name):
    fn = ranking_op(name, [2, 3], torch.arange(5))
    scores = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fn(scores), scores, create_graph=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        fn(torch.autograd.forward_ad.make_dual(scores.detach(), torch.ones(5)))
    with torch.no_grad():
        assert not fn(scores).requires_grad


@pytest.mark.parametrize("name", [*RANKINGS, "heads"])
def test_compiles_once_for_any_raggedness(name):
    backends.choose("cpu", "cpp")
    counter, at_first = CompileCounterWithBackend("aot_eager"), 0

    def fn(hidden, weight, offsets, ranks, target):
        if name == "heads":
            return fastrm.listwise_loss(hidden, weight, offsets=offsets, target=target)
        loss = getattr(fastrm, f"{name}_loss")
        return loss(hidden, weight, offsets=offsets, ranks=ranks, reduction="none").sum()

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ([3, 4, 5], [2, 9], [1, 1, 7, 30], [6, 2, 2, 2, 5, 1]):
        M = sum(sizes)
        hidden, weight = torch.randn(M, 64, requires_grad=True), torch.randn(8, 64)
        args = (weight, offsets_of(sizes), torch.arange(M) % 5 - 1,
                torch.zeros(len(sizes), dtype=torch.int64))  # fmt: skip
        got, want = compiled(hidden, *args), fn(hidden, *args)
        assert torch.equal(got, want)
        ours, theirs = (torch.autograd.grad(x, hidden)[0] for x in (got, want))
        assert torch.equal(ours, theirs)
        at_first = at_first or counter.frame_count
    assert counter.frame_count == at_first


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [[2] * 3000, zipf(40, 4000), [9000]], ids=["pairs", "zipf", "one"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(sizes, reduction, dtype):
    hidden, weight, bias, target = make(sizes, 200, dtype)
    options = {"reduction": reduction, "center_coef": 0.01, "temperature": 0.5}
    grad = torch.randn(len(sizes)) if reduction == "none" else None

    def once():
        args = (offsets_of(sizes), target, options)
        return run(lambda h, w, b: Listwise.apply(h, w, b, *args), hidden, weight, bias, grad)

    first = once()
    for threads in (1, 2, 3, 4, 4, 1):
        torch.set_num_threads(threads)
        for ours, want in zip(once(), first, strict=True):
            assert torch.equal(ours, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ops.isas())
def test_isa(isa, dtype):
    ops.set_isa(isa)
    assert ops.isa() == isa
    for sizes, D in ((RAGGED["mixed"], 1000), (RAGGED["long"], 7), ([300], 129)):
        assert_close(sizes, *make(sizes, D, dtype), center_coef=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ops.isas())
def test_conversions_are_torchs(isa, dtype):
    """Widening every bit pattern and rounding every kind of float32 matches PyTorch's."""
    ops.set_isa(isa)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = ops.score(every[:, None], torch.ones(1, dtype=dtype), None, None)
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide[~every.isnan()], every[~every.isnan()].float())
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=g)
    near = every.float().view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0x1000, 0x8000])
    for bits in (patterns, near.reshape(-1)):
        values = bits.to(torch.int32).view(torch.float32)
        values = values[values.isfinite() & ((values == 0) | (values.abs() >= 1e-37))]
        out = ops.head_bwd(torch.ones(()), torch.ones(1), None, values, None, None, None,
                            [1, len(values)], dtype, True, False, False)[0][0]  # fmt: skip
        assert torch.equal(out, values.to(dtype))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("D", [4096, 4090])
def test_big_output(huge, D):
    ops.set_huge_pages(huge)
    T = (70 << 20) // (D * 2)
    weight, coef = torch.randn(D), torch.randn(T)
    out = ops.head_bwd(torch.tensor(2.0), coef, None, weight, None, None, None, [T, D],
                        torch.bfloat16, True, False, False)[0]  # fmt: skip
    assert torch.equal(out, ((2 * coef)[:, None] * weight).bfloat16())
    assert out.is_contiguous() and out.storage_offset() == 0
    out.resize_(T + 1, D)  # the storage grows like any other
    assert torch.equal(out[0], (2 * coef[0] * weight).bfloat16())


def test_pooled_output():
    """A freed block serves the next output, and only once at a time."""
    weight, coef = torch.randn(1024), torch.randn(512)

    def once(mul):
        return ops.head_bwd(torch.tensor(mul), coef, None, weight, None, None, None, [512, 1024],
                             torch.float32, True, False, False)[0]  # fmt: skip

    first, second = once(1.0), once(2.0)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(second, 2 * first)
    freed = first.data_ptr()
    del first
    third = once(4.0)
    assert third.data_ptr() == freed and torch.equal(third, 2 * second)


def test_every_row_is_written_and_no_other():
    hidden = torch.full((4, 5, 24), math.nan)
    rows = torch.tensor([19, 0, 7])
    out = ops.head_bwd(torch.tensor(1.0), torch.tensor([1.0, 2.0, 0.0]), None,
                        torch.full((24,), 3.0), rows, None, None, hidden.shape, torch.float32,
                        True, False, False)[0].view(20, 24)  # fmt: skip
    want = torch.zeros(20, 24)
    want[19], want[0] = 3.0, 6.0
    assert torch.equal(out, want)


def test_one_openmp_runtime():
    """In a process of its own: other libraries bring theirs."""
    code = (
        "import torch, fastrm; fastrm.score(torch.ones(2, 3), torch.ones(3), backend='cpp')\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print({x.split()[-1] for x in maps if 'libgomp' in x or 'libiomp' in x})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(eval(run.stdout)) <= 1, run.stdout


# ---- bad input -----------------------------------------------------------------------------------

GOOD = dict(
    hidden=torch.ones(5, 4), weight=torch.ones(4), bias=None, offsets=torch.tensor([0, 2, 5]),
    target=torch.tensor([0, 1]), rows=None, margin=None, group_weight=None, num_items=None,
    temperature=1.0, label_smoothing=0.0, center_coef=0.0, reduction="mean", needs_coef=True,
    needs_dweight=True,
)  # fmt: skip
BAD = [
    (dict(offsets=torch.tensor([1, 2, 5])), ValueError, r"offsets\[0\] must be 0, got 1"),
    (dict(offsets=torch.tensor([0, 5, 5])), ValueError, r"offsets\[1\] = 5 and offsets\[2\] = 5"),
    (dict(offsets=torch.tensor([0, 7, 5])), ValueError, r"offsets\[1\] = 7"),
    (dict(offsets=torch.tensor([0, 2, 9])), ValueError, r"candidates 5, but offsets\[2\] = 9"),
    (dict(offsets=torch.tensor([], dtype=torch.int64)), ValueError, "offsets"),
    (dict(offsets=torch.tensor([0.0, 2, 5])), TypeError, "offsets must hold integers"),
    (dict(target=torch.tensor([0, 3])), ValueError, r"target\[1\] = 3 .* 3 candidates"),
    (dict(target=torch.tensor([-1, 0])), ValueError, r"target\[0\] = -1"),
    (dict(target=torch.tensor([0])), ValueError, "target"),
    (dict(target=torch.tensor([0.5, 0.5, 0.5, 0.2, 0.1])), ValueError, "group 1 .*sums to 0.8"),
    (dict(target=torch.tensor([2.0, -1.0, 1, 0, 0])), ValueError, r"target\[1\]"),
    (dict(target=torch.tensor([math.nan, 1.0, 1, 0, 0])), ValueError, r"target\[0\]"),
    (dict(rows=torch.tensor([0, 1, 2, 3, 5])), ValueError, r"rows\[4\] = 5 .* 5 rows"),
    (dict(rows=torch.tensor([0, 1, -1, 3, 4])), ValueError, r"rows\[2\] = -1"),
    (dict(rows=torch.tensor([0, 1, 2, 3, 1])), ValueError, r"rows\[4\] = 1 appears twice"),
    (dict(margin=torch.tensor([0, 0, math.inf, 0, 0])), ValueError, r"margin\[2\]"),
    (dict(margin=torch.zeros(4)), ValueError, "margin"),
    (dict(group_weight=torch.tensor([0, math.nan])), ValueError, r"group_weight\[1\]"),
    (dict(num_items=torch.tensor(0)), ValueError, "num_items_in_batch must be > 0"),
    (dict(weight=torch.ones(3)), ValueError, "weight must have shape"),
    (dict(weight=torch.ones(4, dtype=torch.int64)), TypeError, "weight"),
    (dict(hidden=torch.ones(5, 4, dtype=torch.int32)), TypeError, "hidden"),
    (dict(hidden=torch.ones(4)), ValueError, "hidden"),
    (dict(temperature=0.0), ValueError, "temperature"),
    (dict(reduction="avg"), ValueError, "reduction"),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing"),
]


@pytest.mark.parametrize("change,kind,message", BAD, ids=[b[2][:24] for b in BAD])
def test_bad_input(change, kind, message):
    ops.listwise_fwd(*GOOD.values())
    with pytest.raises(kind, match=message):
        ops.listwise_fwd(*{**GOOD, **change}.values())


def test_backward_checks_rows():
    with pytest.raises(ValueError, match=r"rows\[0\] = 9"):
        ops.head_bwd(torch.tensor(1.0), torch.ones(1), None, torch.ones(4), torch.tensor([9]),
                      None, None, [5, 4], torch.float32, True, False, False)  # fmt: skip


def test_expanded_gradient():
    """The gradient of .sum() comes as a stride-0 vector."""
    sizes = [2, 3]
    hidden, weight, _, target = make(sizes, 8, torch.float32)
    h = hidden.requires_grad_()
    options = {"reduction": "none"}
    Listwise.apply(h, weight, None, offsets_of(sizes), target, options)[0].sum().backward()
    assert h.grad.isfinite().all()


# ---- building ------------------------------------------------------------------------------------


def test_build_is_cached():
    path = build.library_path("0", build.CACHE_DIR)
    assert path.name == build.library_name() and build.library_path("auto", build.CACHE_DIR) == path


def test_no_compiler(tmp_path):
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(tmp_path, cxx="no-such-compiler")


def test_compiler_error_is_shown(tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'fatal: this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="this compiler is broken"):
        build.build(tmp_path / "out", cxx=str(compiler))
    assert not (tmp_path / "out" / build.library_name()).exists()


def test_tensors_without_memory_are_refused():
    hidden, weight, bias, target = make([3, 1, 4], 6, torch.float32)
    for empty in (hidden, weight):
        size = empty.untyped_storage().nbytes()
        empty.untyped_storage().resize_(0)  # as FSDP leaves them between its uses
        with pytest.raises(ValueError, match="has no memory"):
            ops.listwise_loss(hidden, weight, bias, offsets_of([3, 1, 4]), target)
        empty.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match="D > 0"):
        ops.head_bwd(torch.ones(()), torch.ones(3), None, torch.ones(0), None, None, None,
                      [3, 0], torch.float32, True, False, False)  # fmt: skip


def test_frozen_head_keeps_no_hidden():
    hidden, weight, bias, target = make([3, 1, 4], 6, torch.float32)
    hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.score(hidden, weight, bias).sum().backward()
    assert hidden.data_ptr() not in [x.data_ptr() for x in kept]
    assert torch.equal(hidden.grad, weight.expand(8, 6))


@pytest.mark.parametrize(
    "op",
    ["score", "score_fwd", "listwise_loss", "listwise_fwd", "head_bwd", "score_heads",
     "score_fwd_heads", "listwise_loss_heads", "listwise_fwd_heads", "heads_bwd", "plackett_luce",
     "plackett_luce_fwd", "bradley_terry", "bradley_terry_fwd"],
)  # fmt: skip
def test_opcheck(op):
    """Schema, fake kernels, autograd registration and AOT dispatch, by PyTorch's own check."""
    backends.choose("cpu", "cpp")  # registers the fake kernels
    hidden, weight, bias, target = make([3, 1, 4], 6, torch.float32)
    rows, offsets = torch.tensor([7, 0, 2, 3, 1, 6, 5, 4]), offsets_of([3, 1, 4])
    head = (hidden, weight, bias)
    heads = (hidden.clone(), torch.randn(3, 6), torch.randn(3))
    if op in ("score", "listwise_loss"):
        head = tuple(t.requires_grad_() for t in head)
    if op in ("score_heads", "listwise_loss_heads"):
        heads = tuple(t.requires_grad_() for t in heads)
    groups = (offsets, target, rows, torch.rand(8), torch.rand(3), torch.tensor(5))
    scores = torch.randn(8, requires_grad=op in RANKINGS)
    ranked = (scores, offsets, rows, *groups[3:], 0.7, 0.02)
    options = (0.7, 0.1, 0.02, "mean")
    args = {
        "score": (*head, rows), "score_fwd": (*head, rows),
        "listwise_loss": (*head, *groups, *options),
        "listwise_fwd": (*head, *groups, *options, True, True),
        "head_bwd": (torch.rand(3), torch.rand(8), offsets, weight, rows, hidden, None,
                      [8, 6], torch.float32, True, True, True),
        "score_heads": (*heads, rows), "score_fwd_heads": (*heads, rows),
        "listwise_loss_heads": (*heads, *groups, *options),
        "listwise_fwd_heads": (*heads, *groups, *options, True, True),
        "heads_bwd": (torch.rand(8, 3), heads[1], rows, hidden, [8, 6], torch.float32, True, True,
                      True),
        "plackett_luce": (*ranked, "mean"), "plackett_luce_fwd": (*ranked, "none", True),
        "bradley_terry": (*ranked, "none"), "bradley_terry_fwd": (*ranked, "mean", True),
    }[op]  # fmt: skip
    torch.library.opcheck(getattr(ops, op.removesuffix("_heads")).default, args)


def test_building_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    with pytest.raises(build.BuildError, match="switched off"):
        build.library_path("0", tmp_path)


def test_killed_build_does_not_block_the_next(tmp_path):
    """A process killed while it holds the lock leaves a file that stops nobody."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    out = tmp_path / "out"
    script = f"""
        import importlib.util, pathlib
        spec = importlib.util.spec_from_file_location("b", {build.__file__!r})
        b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)
        b.build(pathlib.Path({str(out)!r}), cxx={str(slow)!r})
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)],
                             start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob(".*.build/build.ninja")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert list(out.glob(".*.lock"))
    started = time.monotonic()
    quick = tmp_path / "quick"
    quick.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    quick.chmod(0o755)
    assert build.build(out, cxx=str(quick)).exists()
    assert time.monotonic() - started < 30
    assert not list(out.glob(".*.build"))


def test_importing_the_builder_reads_no_environment():
    source = Path(build.__file__).read_text()
    assert "os.environ" not in source and "getenv" not in source
