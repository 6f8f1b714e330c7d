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
        out = ops.rank1_bwd(
            grad, coef, offsets, weight, rows, hidden, None if ctx.none else unit, ctx.shape,
            ctx.dtype, needs[0], needs[1], needs[2], ctx.shift_invariant,
        )  # fmt: skip
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
        out = ops.rank1_bwd(torch.tensor(1.0), torch.ones(7), None, weight, None, hidden, None,
                            [7, 16], torch.float32, *needs, False)  # fmt: skip
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
    dhidden, dweight, dbias = ops.rank1_bwd(
        torch.ones(()), grad, None, weight, rows, hidden, None, hidden.shape, dtype,
        True, True, True, False,
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
        out = ops.rank1_bwd(torch.ones(()), torch.ones(1), None, values, None, None, None,
                            [1, len(values)], dtype, True, False, False, True)[0][0]  # fmt: skip
        assert torch.equal(out, values.to(dtype))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("D", [4096, 4090])
def test_big_output(huge, D):
    ops.set_huge_pages(huge)
    T = (70 << 20) // (D * 2)
    weight, coef = torch.randn(D), torch.randn(T)
    out = ops.rank1_bwd(torch.tensor(2.0), coef, None, weight, None, None, None, [T, D],
                        torch.bfloat16, True, False, False, True)[0]  # fmt: skip
    assert torch.equal(out, ((2 * coef)[:, None] * weight).bfloat16())
    assert out.is_contiguous() and out.storage_offset() == 0
    out.resize_(T + 1, D)  # the storage grows like any other
    assert torch.equal(out[0], (2 * coef[0] * weight).bfloat16())


def test_pooled_output():
    """A freed block serves the next output, and only once at a time."""
    weight, coef = torch.randn(1024), torch.randn(512)

    def once(mul):
        return ops.rank1_bwd(torch.tensor(mul), coef, None, weight, None, None, None, [512, 1024],
                             torch.float32, True, False, False, True)[0]  # fmt: skip

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
    out = ops.rank1_bwd(torch.tensor(1.0), torch.tensor([1.0, 2.0, 0.0]), None,
                        torch.full((24,), 3.0), rows, None, None, hidden.shape, torch.float32,
                        True, False, False, True)[0].view(20, 24)  # fmt: skip
    want = torch.zeros(20, 24)
    want[19], want[0] = 3.0, 6.0
    assert torch.equal(out, want)


def test_one_openmp_runtime():
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}) <= 1


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
        ops.rank1_bwd(torch.tensor(1.0), torch.ones(1), None, torch.ones(4), torch.tensor([9]),
                      None, None, [5, 4], torch.float32, True, False, False, True)  # fmt: skip


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
        ops.rank1_bwd(torch.ones(()), torch.ones(3), None, torch.ones(0), None, None, None,
                      [3, 0], torch.float32, True, False, False, True)  # fmt: skip


def test_frozen_head_keeps_no_hidden():
    hidden, weight, bias, target = make([3, 1, 4], 6, torch.float32)
    hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.score(hidden, weight, bias).sum().backward()
    assert hidden.data_ptr() not in [x.data_ptr() for x in kept]
    assert torch.equal(hidden.grad, weight.expand(8, 6))


@pytest.mark.parametrize("op", ["score", "score_fwd", "listwise_loss", "listwise_fwd", "rank1_bwd"])
def test_opcheck(op):
    """Schema, fake kernels, autograd registration and AOT dispatch, by PyTorch's own check."""
    backends.choose("cpu", "cpp")  # registers the fake kernels
    hidden, weight, bias, target = make([3, 1, 4], 6, torch.float32)
    rows, offsets = torch.tensor([7, 0, 2, 3, 1, 6, 5, 4]), offsets_of([3, 1, 4])
    head = (hidden, weight, bias)
    if op in ("score", "listwise_loss"):
        head = tuple(t.requires_grad_() for t in head)
    groups = (offsets, target, rows, torch.rand(8), torch.rand(3), torch.tensor(5))
    options = (0.7, 0.1, 0.02, "mean")
    args = {
        "score": (*head, rows), "score_fwd": (*head, rows),
        "listwise_loss": (*head, *groups, *options),
        "listwise_fwd": (*head, *groups, *options, True, True),
        "rank1_bwd": (torch.rand(3), torch.rand(8), offsets, weight, rows, hidden, None,
                      [8, 6], torch.float32, True, True, True, False),
    }[op]  # fmt: skip
    torch.library.opcheck(getattr(ops, op).default, args)


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
