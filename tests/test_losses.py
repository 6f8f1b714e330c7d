"""The losses beside the listwise one, on every backend, against float64 loops over groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, error, make, ragged_sizes
from torch import Tensor

import fastrm

CUDA = torch.cuda.is_available()
TRITON = pytest.param("triton", marks=pytest.mark.gpu) if CUDA else "triton"
BACKENDS: list[Any] = ["torch", "cpp", TRITON]
DEVICE = {"torch": "cpu", "cpp": "cpu", "triton": "cuda" if CUDA else "cpu"}
LOSSES = {
    "plackett_luce": fastrm.plackett_luce_loss, "bradley_terry": fastrm.bradley_terry_loss,
}  # fmt: skip


def ranking(
    loss: str, sizes: list[int], D: int, seed: int = 0, *, levels: int = 4, extra: bool = False,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments in float64; `levels` ranks, so that some tie, and -1 for about a quarter."""
    p = make(sizes, D, seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    ranks = torch.randint(-1, levels, (sum(sizes),), generator=g)
    args = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias, "offsets": p.offsets,
            "ranks": ranks, **p.options}  # fmt: skip
    if extra:
        name = "position_weight" if loss == "plackett_luce" else "margin"
        args[name] = torch.rand(sum(sizes), generator=g, dtype=torch.float64) * 2
    return args


def oracle(loss: str, args: dict[str, Any]) -> Tensor:
    """The definition, group by group and pair by pair."""
    h = args["hidden"].reshape(-1, args["hidden"].shape[-1])
    h = h if args.get("rows") is None else h[args["rows"]]
    s = h @ args["weight"]
    s = s if args["bias"] is None else s + args["bias"]
    o, t, c = args["offsets"].tolist(), args.get("temperature", 1.0), args.get("center_coef", 0.0)
    losses = []
    for n, (a, b) in enumerate(zip(o, o[1:], strict=False)):
        r = [10**9 if x < 0 else x for x in args["ranks"][a:b].tolist()]
        r = {a + k: x for k, x in enumerate(r)}
        total = 0.0 * s[a:b].sum()
        if loss == "plackett_luce":
            for i in r:
                rest = [j for j in r if r[j] >= r[i]]
                weight = 1.0 if args.get("position_weight") is None else args["position_weight"][i]
                if r[i] < 10**9:
                    total = total + weight * (torch.logsumexp(s[rest] / t, 0) - s[i] / t)
            total = total + c * (2 * s[a:b].mean()) ** 2
        else:
            pairs = [(i, j) for i in r for j in r if r[i] < r[j]]
            for i, j in pairs:
                m = 0.0 if args.get("margin") is None else args["margin"][j]
                total = total - F.logsigmoid((s[i] - s[j] - m) / t) + c * (s[i] + s[j]) ** 2
            total = total / max(len(pairs), 1)
        gw = args.get("group_weight")
        losses.append(total if gw is None else total * gw[n])
    out = torch.stack(losses)
    if args.get("reduction", "mean") == "none":
        return out
    items = args.get("num_items_in_batch")
    divisor = float(len(losses) if items is None else items)
    return out.sum() / (divisor if args.get("reduction", "mean") == "mean" else 1.0)


def run(function: Any, args: dict[str, Any], backend: str | None = None) -> dict[str, Tensor]:
    device = "cpu" if backend is None else DEVICE[backend]
    args = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}
    leaves = {k: args[k].detach().requires_grad_() for k in ("hidden", "weight", "bias")
              if args[k] is not None}  # fmt: skip
    loss = function({**args, **leaves})
    up = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=device).view(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), up)
    return {"loss": loss.detach().cpu(), **{k: g.cpu() for k, g in zip(leaves, grads, strict=True)}}


def call(loss: str, backend: str) -> Any:
    def function(args: dict[str, Any]) -> Tensor:
        args = dict(args)
        head = [args.pop(k) for k in ("hidden", "weight", "bias")]
        return LOSSES[loss](*head, **args, backend=backend)

    return function


def check_close(loss: str, args: dict[str, Any], backend: str, tolerance: float) -> None:
    exact = run(lambda a: oracle(loss, a), args)
    got = run(call(loss, backend), args, backend)
    scale = max(1.0, *(float(x.abs().max()) for x in exact.values()))
    for name, x in exact.items():
        gap = float((got[name] - x).abs().max())
        assert gap <= tolerance * scale, (name, gap, scale)
    if args["bias"] is not None and not args.get("center_coef"):
        assert torch.equal(got["bias"], torch.zeros(()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_matches_the_definition(backend: str, loss: str) -> None:
    @settings(max_examples=12 if backend == "triton" else 60, deadline=None, database=None)
    @given(st.data())
    def check(data: Any) -> None:
        draw = data.draw
        args = ranking(
            loss, draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)),
            draw(st.integers(1, 9)), draw(st.integers(0, 2**20)),
            levels=draw(st.sampled_from([1, 3, 20])), extra=draw(st.booleans()),
            bias=draw(st.booleans()), gathered=draw(st.booleans()),
            scale=draw(st.sampled_from([0.0, 1.0, 50.0])), group_weight=draw(st.booleans()),
            temperature=draw(st.sampled_from([1.0, 0.4])),
            center_coef=draw(st.sampled_from([0.0, 0.3])),
            reduction=draw(st.sampled_from(["mean", "sum", "none"])),
            num_items_in_batch=draw(st.sampled_from([None, 7, torch.tensor(3.0)])),
        )  # fmt: skip
        check_close(loss, args, backend, 1e-10)

    check()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["cpp", TRITON])
def test_error_budget(backend: str, loss: str, dtype: str) -> None:
    """Within 2x (loss) and 3x (gradients) the error of eager PyTorch in the same dtype."""
    sizes = ragged_sizes("uniform", 60, torch.Generator().manual_seed(0))
    args = ranking(loss, sizes, 384, scale=2.0)
    for name in ("hidden", "weight", "bias"):
        args[name] = args[name].to(DTYPES[dtype])
    wide = {k: v.double() if k in ("hidden", "weight", "bias") else v for k, v in args.items()}
    exact = run(lambda a: oracle(loss, a), wide)
    ours, theirs = run(call(loss, backend), args, backend), run(call(loss, "torch"), args)
    for name in ("loss", "hidden", "weight"):
        allowed = (2 if name == "loss" else 3) * error(theirs[name], exact[name])
        unit = torch.finfo(ours[name].dtype).eps
        assert ours[name].dtype == theirs[name].dtype
        assert error(ours[name], exact[name]) <= max(allowed, unit), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str, loss: str) -> None:
    args = ranking(loss, [3, 1, 7, 40], 8, scale=1e4, levels=50)
    check_close(loss, args, backend, 1e-10)
    args = {k: v.float() if k in ("hidden", "weight", "bias") else v for k, v in args.items()}
    found = run(call(loss, backend), args, backend)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_is_the_listwise_loss(backend: str, loss: str) -> None:
    args = ranking(loss, [2] * 5, 6, extra=loss == "bradley_terry")
    args["ranks"] = torch.tensor([0, 1, 1, 0, 3, -1, 0, 7, 2, 1])

    def listwise(a: dict[str, Any]) -> Tensor:
        return fastrm.listwise_loss(
            a["hidden"], a["weight"], a["bias"], offsets=a["offsets"], margin=a.get("margin"),
            target=torch.tensor([0, 1, 0, 0, 1]), backend="torch",
        )  # fmt: skip

    got, exact = run(call(loss, backend), args, backend), run(listwise, args)
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labelled_pairs(backend: str, reduction: str) -> None:
    args = ranking("bradley_terry", [3, 2, 1, 4], 5, group_weight=True)
    args.pop("ranks")
    pairs = torch.tensor([[0, 1], [0, 2], [0, 2], [4, 3], [6, 9], [7, 6]])
    margin = torch.tensor([0.1, 0.0, 2.0, 0.5, 0.0, -1.0])
    mine = args | {"pairs": pairs, "margin": margin, "center_coef": 0.2, "reduction": reduction}

    def expected(a: dict[str, Any]) -> Tensor:
        s = a["hidden"] @ a["weight"] + a["bias"]
        won, lost = s[pairs].T
        each = -F.logsigmoid(won - lost - margin) + 0.2 * (won + lost) ** 2
        zero = 0.0 * s.sum()
        losses = torch.stack([each[:3].mean(), each[3], zero, each[4:].mean()])
        losses = losses * a["group_weight"]
        return losses if reduction == "none" else getattr(losses, reduction)()

    got, exact = run(call("bradley_terry", backend), mine, backend), run(expected, mine)
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labelled_pairs_of_a_part_of_a_step_at_a_temperature(backend: str) -> None:
    args = ranking("bradley_terry", [3, 2], 5, temperature=0.4, num_items_in_batch=7)
    del args["ranks"]
    args["pairs"] = pairs = torch.tensor([[0, 1], [2, 0], [4, 3]])
    args["margin"] = margin = torch.tensor([0.1, 2.0, 0.5])

    def expected(a: dict[str, Any]) -> Tensor:
        won, lost = (a["hidden"] @ a["weight"] + a["bias"])[pairs].T
        each = -F.logsigmoid((won - lost - margin) / 0.4)
        return (each[:2].mean() + each[2]) / 7

    got, exact = run(call("bradley_terry", backend), args, backend), run(expected, args)
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_candidate_of_many_labelled_pairs(dtype: torch.dtype) -> None:
    """Its gradient has as many terms, which are not added up in the scores' type."""
    K = 2001
    scores = (torch.randn(K, generator=torch.Generator().manual_seed(0)) / 2).to(dtype)
    pairs = torch.stack([torch.zeros(K - 1, dtype=torch.int64), torch.arange(1, K)], 1)
    x, exact = (scores.to(t, copy=True).requires_grad_() for t in (dtype, torch.float64))
    offsets = torch.tensor([0, K])
    fastrm.bradley_terry_loss_from_scores(x, offsets=offsets, pairs=pairs).backward()
    F.softplus(exact[1:] - exact[0]).mean().backward()
    assert x.grad is not None and exact.grad is not None
    # Rounded once, from terms in float32.
    torch.testing.assert_close(
        x.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7
    )


@pytest.mark.parametrize("heads", [1, 2])
def test_labelled_pairs_have_the_same_bits_for_any_thread_count(heads: int) -> None:
    N = 60_000
    scores = torch.randn(4 * N, heads, generator=torch.Generator().manual_seed(0)).squeeze(1)
    offsets = torch.arange(0, 4 * N + 1, 4)
    pairs = torch.stack([offsets[:-1], offsets[:-1] + 1], 1)
    found = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            loss = fastrm.bradley_terry_loss_from_scores(
                scores, offsets=offsets, pairs=torch.cat([pairs, pairs + 1]), backend="cpp"
            )
            found.add(float(loss))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ["listwise", *LOSSES])
def test_an_ensemble_is_the_mean_of_its_heads(backend: str, loss: str, reduction: str) -> None:
    args = ranking(loss, [3, 1, 5], 6, group_weight=True, gathered=True, center_coef=0.1)
    ranks = args.pop("ranks")
    label = {"target": torch.tensor([2, -100, 0])} if loss == "listwise" else {"ranks": ranks}
    function = getattr(fastrm, f"{loss}_loss")
    E = 3
    g = torch.Generator().manual_seed(4)
    args["weight"] = torch.randn(E, 6, generator=g, dtype=torch.float64)
    args["bias"] = torch.randn(E, generator=g, dtype=torch.float64)
    args |= label | {"reduction": reduction}

    def together(a: dict[str, Any]) -> Tensor:
        a = dict(a)
        head = [a.pop(k) for k in ("hidden", "weight", "bias")]
        out, scores = function(*head, **a, return_scores=True, backend=backend)
        h = head[0].reshape(-1, 6)[a["rows"]]
        torch.testing.assert_close(scores, (h @ head[1].T + head[2]).detach())
        return out

    def apart(a: dict[str, Any]) -> Tensor:
        a = dict(a)
        hidden, weight, bias = [a.pop(k) for k in ("hidden", "weight", "bias")]
        parts = [function(hidden, weight[e], bias[e], **a, backend="torch") for e in range(E)]
        return torch.stack(parts).mean(0)

    got, exact = run(together, args, backend), run(apart, args)
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labelled_pairs_of_an_ensemble_are_compared_by_every_head(reduction: str) -> None:
    args = ranking("bradley_terry", [3, 2, 1, 4], 5, group_weight=True, reduction=reduction)
    del args["ranks"]
    args |= {"pairs": torch.tensor([[0, 1], [0, 2], [4, 3], [7, 6]]), "center_coef": 0.2,
             "margin": torch.tensor([0.1, 0.0, 2.0, 0.5])}  # fmt: skip
    g = torch.Generator().manual_seed(4)
    weight, bias = (torch.randn(3, *D, generator=g, dtype=torch.float64) for D in ((5,), ()))

    def apart(a: dict[str, Any]) -> Tensor:
        heads = zip(a.pop("weight"), a.pop("bias"), strict=True)
        parts = [fastrm.bradley_terry_loss(**a, weight=w, bias=b) for w, b in heads]
        return torch.stack(parts).mean(0)

    mine = args | {"weight": weight, "bias": bias}
    got = run(lambda a: fastrm.bradley_terry_loss(**a), mine)
    for name, x in run(apart, mine).items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("items", [7, torch.tensor(3.0)])
@pytest.mark.parametrize("loss", ["listwise", *LOSSES])
def test_an_ensemble_is_divided_by_the_groups_of_the_whole_step(loss: str, items: Any) -> None:
    args = ranking(loss, [3, 1, 5], 6)
    ranks = args.pop("ranks")
    args |= {"target": torch.tensor([2, 0, 0])} if loss == "listwise" else {"ranks": ranks}
    function = getattr(fastrm, f"{loss}_loss")
    E, g = 3, torch.Generator().manual_seed(4)
    args |= {"weight": torch.randn(E, 6, generator=g, dtype=torch.float64), "bias": None}
    for backend in ("torch", "cpp"):
        found = function(**args, num_items_in_batch=items, backend=backend)
        exact = function(**args, reduction="sum", backend="torch") / float(items)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
        parts = [function(**args | {"weight": w}, reduction="sum") for w in args["weight"]]
        torch.testing.assert_close(found, sum(parts) / E / float(items), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_that_is_left_out_of_an_ensemble_may_hold_anything(
    backend: str, gathered: bool, dtype: torch.dtype
) -> None:
    args = ranking("plackett_luce", [3, 4, 5], 6, gathered=gathered)
    del args["ranks"]
    hidden = args["hidden"].detach().to(dtype)
    args |= {"target": torch.tensor([2, -100, 0]), "weight": torch.randn(3, 6), "bias": None}
    rows = args["rows"][3:7] if gathered else slice(3, 7)
    found = []
    for value in (0.0, math.nan, math.inf):
        hidden.view(-1, 6)[rows] = value
        mine = {**args, "hidden": hidden.clone()}
        found.append(run(lambda a: fastrm.listwise_loss(**a, backend=backend), mine, backend))
    for other in found[1:]:
        for name in found[0]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [[2, -100, 0], None, "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_teacher_adds_its_cross_entropy(backend: str, target: Any, reduction: str) -> None:
    p = make([3, 1, 4], 5, soft=target == "soft", group_weight=True, center_coef=0.2)
    teacher = torch.randn(8, generator=torch.Generator().manual_seed(1))
    counted = torch.ones(3)
    labels = p.target
    if isinstance(target, list):
        labels = torch.tensor(target)
        counted = (labels != -100).double()
    args = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    d = DEVICE[backend]
    gw = p.options["group_weight"]

    def ours(a: dict[str, Any]) -> Tensor:
        return fastrm.listwise_loss(
            a["hidden"], a["weight"], a["bias"], offsets=p.offsets.to(d),
            target=None if target is None else labels.to(d), teacher_scores=teacher.to(d),
            distillation_coef=0.6, group_weight=gw.to(d), center_coef=0.2, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    def expected(a: dict[str, Any]) -> Tensor:
        s = a["hidden"] @ a["weight"] + a["bias"]
        losses = []
        for n, (z, t) in enumerate(zip(s.split([3, 1, 4]), teacher.split([3, 1, 4]), strict=True)):
            one = 0.6 * F.cross_entropy(z[None], t.double().softmax(0)[None])
            if target == "soft":
                one = one + F.cross_entropy(z[None], labels.split([3, 1, 4])[n][None])
            elif target is not None:
                one = one + F.cross_entropy(z[None], labels[n, None].clamp(min=0))
            losses.append(counted[n] * gw[n] * (one + 0.2 * (2 * z.mean()) ** 2))
        out = torch.stack(losses)
        if reduction == "none":
            return out
        return out.sum() / (counted.sum() if reduction == "mean" else 1)

    got, exact = run(ours, args, backend), run(expected, args)
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-7)  # an fp32 teacher


def test_targets_from_labels_and_scores() -> None:
    offsets = torch.tensor([0, 3, 4])
    labels = torch.tensor([1, 0, 3, 2])
    assert fastrm.target_from_labels(labels, offsets).tolist() == [0.25, 0, 0.75, 1]
    soft = fastrm.target_from_scores(labels.double(), offsets)
    torch.testing.assert_close(soft[:3], labels[:3].double().softmax(0))
    assert soft[3] == 1
    positions = fastrm.position_weight_from_ranks(torch.tensor([1, -1, 0, 5]), offsets)
    assert positions.tolist() == [0.25, 0, 0.75, 0]  # 2^(3-p) - 1 of 4, and 0 of a group of one
    with pytest.raises(ValueError, match=r"labels\[1\]"):
        fastrm.target_from_labels(torch.tensor([1, -1, 0, 1]), offsets)
    with pytest.raises(ValueError, match="group 1"):
        fastrm.target_from_labels(torch.tensor([1, 0, 0, 0]), offsets)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": torch.tensor([0, 1, -2, 0, 1])}, r"ranks\[2\] must be 0 or more"),
        ({"ranks": torch.tensor([0, 1, 2])}, r"ranks must have shape \(5,\)"),
        ({"ranks": torch.rand(5)}, "ranks must have dtype"),
        ({"offsets": torch.tensor([0, 3, 4])}, r"offsets\[2\] must be 5"),
        ({"offsets": torch.tensor([0, 3, 3, 5])}, "offsets"),
        ({"group_weight": torch.tensor([1.0, torch.inf])}, r"group_weight\[1\]"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.tensor(2.0)}, "temperature"),
        ({"center_coef": torch.tensor(0.1)}, "center_coef"),
        ({"bias": torch.tensor(1)}, "bias must have dtype"),
        ({"reduction": "max"}, "reduction"),
        ({"num_items_in_batch": 0}, "num_items_in_batch"),
        ({"weight": torch.ones(2, 3)}, "weight must have shape"),
        ({"backend": "cuda"}, "backend"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_bad_arguments_are_named(
    backend: str, loss: str, change: dict[str, Any], says: str
) -> None:
    args: dict[str, Any] = dict(
        hidden=torch.randn(5, 4), weight=torch.randn(4), offsets=torch.tensor([0, 3, 5]),
        ranks=torch.tensor([0, 1, -1, 0, 1]), backend=backend,
    )  # fmt: skip
    LOSSES[loss](**args)
    with pytest.raises((ValueError, TypeError), match=says):
        LOSSES[loss](**args | change)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_no_groups(backend: str) -> None:
    for loss in LOSSES.values():
        hidden = torch.zeros(0, 4, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        out = loss(hidden, torch.ones(4), offsets=torch.tensor([0]), ranks=none, backend=backend)
        out.backward()
        assert out == 0 and hidden.grad is not None


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_long_and_many(backend: str) -> None:
    """A ranking of 1e5, 1e5 rankings of 4, and all pairs of 3000 without a matrix of them."""
    g = torch.Generator().manual_seed(0)
    M = 100_000
    s = torch.randn(M, generator=g, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(M, generator=g)
    loss = fastrm.plackett_luce_loss_from_scores(
        s, offsets=torch.tensor([0, M]), ranks=order.argsort(), backend=backend
    )
    exact = (s[order].flip(0).logcumsumexp(0).flip(0) - s[order]).sum()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, s)[0] for x in (loss, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    many = torch.randn(4 * M, generator=g, dtype=torch.float64)
    ranks = torch.arange(4).repeat(M)
    loss = fastrm.plackett_luce_loss_from_scores(
        many, offsets=4 * torch.arange(M + 1), ranks=ranks, backend=backend
    )
    z = many.view(M, 4)
    exact = (z.flip(1).logcumsumexp(1).flip(1) - z).sum(1).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    K = 3000
    loss = fastrm.bradley_terry_loss_from_scores(
        many[:K], offsets=torch.tensor([0, K]), ranks=torch.arange(K), backend=backend
    )
    d = many[:K, None] - many[:K]
    exact = -F.logsigmoid(d[torch.ones(K, K, dtype=torch.bool).triu(1)]).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)


HIDDEN, OFFSETS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), [0, 2, 5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offsets": torch.tensor([0, 2, 4])}, r"offsets\[2\] must be 5"),
        ({"offsets": torch.tensor([0, 2, 9])}, r"offsets\[2\] must be 5"),
        ({"offsets": torch.tensor([1, 2, 5])}, r"offsets\[0\] must be 0"),
        ({"ranks": torch.zeros(3, dtype=torch.int64)}, r"ranks must have shape \(5,\)"),
        ({"group_weight": torch.tensor([1.0, torch.nan])}, r"group_weight\[1\]"),
        ({"num_items_in_batch": torch.tensor(0)}, "num_items_in_batch must be finite and above 0"),
        ({"rows": torch.arange(4)}, r"offsets\[2\] must be 4|ranks must have shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_bad_arguments_of_an_ensemble(backend: str, change: dict[str, Any], says: str) -> None:
    args = dict(offsets=torch.tensor(OFFSETS), ranks=torch.arange(5), backend=backend)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=says):
            loss(HIDDEN, torch.ones(2, 4), **args | change)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (torch.tensor([[0.7, 1.9]]), "pairs must have dtype"),
        (torch.tensor([[2, 3, 4], [3, 4, 2]]), r"pairs must have shape \(P, 2\)"),
        (torch.tensor([0, 1]), r"pairs must have shape \(P, 2\)"),
        ([[0, 1]], "pairs must be a torch.Tensor"),
        (torch.tensor([[0, 1], [2, 5]]), r"pairs\[1, 1\] must be from 0 to 4"),
        (torch.tensor([[0, 1], [1, 2]]), r"pairs\[1\] must name two candidates of one group"),
        (torch.tensor([[0, 0]]), r"pairs\[0\] must name two"),
    ],
)
def test_bad_pairs(heads: int, pairs: Any, says: str) -> None:
    weight = torch.ones(heads, 4)
    with pytest.raises((ValueError, TypeError), match=says):
        fastrm.bradley_terry_loss(HIDDEN, weight, offsets=torch.tensor(OFFSETS), pairs=pairs)


@pytest.mark.parametrize("pair", [[0, 9], [0, 3], [0, 0], [-1, 0]])
def test_bad_pairs_are_no_number_where_values_are_not_looked_at(pair: list[int]) -> None:
    """Compiled, as on CUDA."""
    def loss(pairs: Tensor) -> Tensor:
        return fastrm.bradley_terry_loss(
            HIDDEN, torch.ones(4), offsets=torch.tensor(OFFSETS), pairs=pairs, backend="torch"
        )

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([pair])).isnan()
    torch.testing.assert_close(compiled(torch.tensor([[0, 1]])), loss(torch.tensor([[0, 1]])))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"margin": torch.ones(5)}, "margin must be None with teacher_scores"),
        ({"distillation_coef": 0.0}, "distillation_coef must be a finite number above 0, got 0.0"),
        ({"distillation_coef": math.inf}, "distillation_coef must be a finite number above 0"),
        ({"teacher_scores": torch.full((5,), torch.inf)}, r"teacher_scores\[0\]"),
        ({"teacher_scores": torch.ones(4)}, r"teacher_scores must have shape \(5,\)"),
        ({"teacher_scores": None, "target": None}, "target may be None only with teacher_scores"),
    ],
)
def test_bad_arguments_beside_a_teacher(change: dict[str, Any], says: str) -> None:
    args: dict[str, Any] = dict(
        offsets=torch.tensor(OFFSETS), target=torch.tensor([1, 2]), teacher_scores=torch.ones(5)
    )  # fmt: skip
    fastrm.listwise_loss(HIDDEN, torch.ones(4), **args)
    with pytest.raises(ValueError, match=says):
        fastrm.listwise_loss(HIDDEN, torch.ones(4), **args | change)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_hidden_states_and_heads_are_differentiated(backend: str, heads: int) -> None:
    d = DEVICE[backend]
    hidden, weight = HIDDEN.to(d), torch.ones(heads, 4, device=d).requires_grad_()
    each, group, pair, items = (torch.rand(n, device=d, requires_grad=True) for n in (5, 2, 3, ()))
    offsets, ranks = torch.tensor(OFFSETS, device=d), torch.arange(5, device=d)
    target = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0], device=d).requires_grad_()
    calls: list[tuple[Any, dict[str, Any]]] = [
        (fastrm.listwise_loss, dict(target=target, margin=each)),
        (fastrm.listwise_loss, dict(target=target, teacher_scores=each)),
        (fastrm.listwise_loss, dict(target=None, teacher_scores=each)),
        (fastrm.plackett_luce_loss, dict(ranks=ranks, position_weight=each)),
        (fastrm.bradley_terry_loss, dict(ranks=ranks, margin=each)),
        (fastrm.bradley_terry_loss, dict(
            pairs=torch.tensor([[0, 1], [2, 3], [2, 4]], device=d), margin=pair
        )),
    ]  # fmt: skip
    for function, options in calls:
        loss, scores = function(
            hidden, weight, offsets=offsets, group_weight=group, num_items_in_batch=items,
            return_scores=True, backend=backend, **options,
        )  # fmt: skip
        assert not scores.requires_grad
        loss.backward()
        assert all(x.grad is None for x in (each, group, pair, items, target)), options
    assert weight.grad is not None


def test_small_integers_do_not_wrap() -> None:
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 200])
    at = torch.tensor([156], dtype=torch.uint8)  # -100, if it wrapped
    options: dict[str, Any] = dict(offsets=offsets, teacher_scores=scores)
    narrow, wide = (
        fastrm.listwise_loss_from_scores(scores, target=t, **options) for t in (at, at.long())
    )
    assert narrow == wide > 0
    ranks = torch.randint(0, 200, (200,), dtype=torch.uint8)
    for name in LOSSES:
        function = getattr(fastrm, f"{name}_loss_from_scores")
        for backend in ("torch", "cpp"):
            ours, exact = (
                function(scores, offsets=offsets, ranks=r, backend=backend)
                for r in (ranks, ranks.long())
            )
            assert ours == exact
    heads = torch.randn(5, 2)
    items = torch.tensor(200, dtype=torch.uint8)
    args: dict[str, Any] = dict(offsets=torch.tensor(OFFSETS), target=torch.tensor([0, 1]))
    loss = fastrm.listwise_loss_from_scores(heads, num_items_in_batch=items, **args)
    exact = fastrm.listwise_loss_from_scores(heads, num_items_in_batch=200, **args)
    torch.testing.assert_close(loss, exact)


@pytest.mark.parametrize("target", [[3, -100], None])
def test_a_teachers_loss_is_divided_by_the_groups_of_the_whole_step(target: Any) -> None:
    scores, teacher = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    options: dict[str, Any] = dict(
        offsets=torch.tensor([0, 5, 8]), teacher_scores=teacher,
        target=None if target is None else torch.tensor(target),
    )  # fmt: skip
    total = fastrm.listwise_loss_from_scores(scores, reduction="sum", **options)
    for items in (7, torch.tensor(7)):
        ours = fastrm.listwise_loss_from_scores(scores, num_items_in_batch=items, **options)
        torch.testing.assert_close(ours, total / 7, rtol=1e-12, atol=0)


def test_label_smoothing_leaves_the_teacher_as_it_is() -> None:
    scores, teacher = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    ours = fastrm.listwise_loss_from_scores(
        scores, offsets=torch.tensor([0, 5]), target=torch.tensor([3]), teacher_scores=teacher,
        label_smoothing=0.2,
    )  # fmt: skip
    exact = F.cross_entropy(scores[None], torch.tensor([3]), label_smoothing=0.2)
    exact = exact + F.cross_entropy(scores[None], teacher.softmax(0)[None])
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)


def test_a_tensor_without_memory_is_refused() -> None:
    args: dict[str, Any] = dict(offsets=torch.tensor(OFFSETS), target=torch.tensor([0, 1]))
    for weight in (torch.ones(4, device="meta"), torch.ones(2, 4, device="meta")):
        with pytest.raises(ValueError, match="weight must be on hidden's device cpu, got meta"):
            fastrm.listwise_loss(HIDDEN, weight, **args)
        with pytest.raises(ValueError, match="weight must be on hidden's device cpu, got meta"):
            fastrm.score(HIDDEN, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_masked_candidate_below_the_ranking(loss: str, backend: str) -> None:
    """Its score of -inf changes neither the loss of the others nor their gradient."""
    function = getattr(fastrm, f"{loss}_loss_from_scores")
    scores = torch.tensor([1.0, 0.0, -torch.inf, -torch.inf, 0.5, 2.0], device=DEVICE[backend])
    offsets, ranks = torch.tensor([0, 4, 6]), torch.tensor([0, 1, -1, -1, 0, 1])
    x = scores.requires_grad_()
    out = function(x, offsets=offsets.to(x.device), ranks=ranks.to(x.device), backend=backend)
    (found,) = torch.autograd.grad(out, x)
    some = scores[[0, 1, 4, 5]].detach().requires_grad_()
    pairs = [F.softplus(some[1] - some[0]), F.softplus(some[3] - some[2])]
    if loss == "bradley_terry":  # the masked are beaten by both, which costs nothing
        pairs[0] = pairs[0] / 5
    exact = (pairs[0] + pairs[1]) / 2
    torch.testing.assert_close(out, exact)
    (expected,) = torch.autograd.grad(exact, some)
    torch.testing.assert_close(found[[0, 1, 4, 5]], expected)
    assert (found[[2, 3]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_score_that_is_no_number_stays_in_its_group(loss: str, backend: str) -> None:
    function = getattr(fastrm, f"{loss}_loss_from_scores")
    x = torch.tensor([1.0, 2.0, torch.nan, 1.0], device=DEVICE[backend], requires_grad=True)
    out = function(x, offsets=torch.tensor([0, 2, 4], device=x.device),
                   ranks=torch.arange(4, device=x.device), reduction="none", backend=backend)
    out.sum().backward()
    assert out.isnan().tolist() == [False, True]
    assert x.grad is not None and x.grad.isfinite()[:2].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_unranked_are_below_the_largest_rank(loss: str, backend: str) -> None:
    function = getattr(fastrm, f"{loss}_loss_from_scores")
    x = torch.arange(3.0, device=DEVICE[backend])
    for best, middle, unranked in ((0, 1, 2), (2, 1, 0)):  # wherever they stand
        found = []
        for last in (1, 2**63 - 1):
            ranks = torch.empty(3, dtype=torch.int64)
            ranks[best], ranks[middle], ranks[unranked] = 0, last, -1
            found.append(function(x, offsets=torch.tensor([0, 3], device=x.device),
                                  ranks=ranks.to(x.device), backend=backend))  # fmt: skip
        assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_shift_of_the_scores_changes_nothing(backend: str) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    ranks, offsets = torch.tensor([0, 2, 1]), torch.tensor([0, 3])
    for loss in LOSSES:
        function = getattr(fastrm, f"{loss}_loss_from_scores")
        plain, far = (
            function(s, offsets=offsets, ranks=ranks, backend=backend) for s in (x, x + 1e12)
        )
        torch.testing.assert_close(far, plain, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_compiles_whole(loss: str) -> None:
    def function(hidden: Tensor, weight: Tensor, offsets: Tensor, ranks: Tensor) -> Tensor:
        return LOSSES[loss](hidden, weight, offsets=offsets, ranks=ranks, backend="torch")

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for seed, last in enumerate([4, 2, 7, 20, 40, 80, 160, 600]):
        args = ranking(loss, [2, 3, last], 6, seed, bias=False)
        inputs = [args[k] for k in ("hidden", "weight", "offsets", "ranks")]
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_and_targets_of_any_strides_and_types(dtype: torch.dtype) -> None:
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets, pairs = torch.tensor([0, 4, 6]), torch.tensor([[0, 1], [2, 3], [1, 3], [5, 4]])
    found = fastrm.bradley_terry_loss_from_scores(
        scores, offsets=offsets, pairs=pairs.T.contiguous().T, reduction="none"
    )
    s = scores.float()
    each = F.softplus(s[pairs[:, 1]] - s[pairs[:, 0]])
    torch.testing.assert_close(found, torch.stack([each[:3].mean(), each[3]]))
    target = torch.tensor([0.25, 0.75, 0.0, 0.0, 0.5, 0.5]).to(dtype)
    ours = fastrm.listwise_loss_from_scores(
        scores, offsets=offsets, target=target, teacher_scores=scores
    )
    exact = torch.stack([
        F.cross_entropy(s[None, g], target[None, g].float())
        + F.cross_entropy(s[None, g], s[None, g].softmax(1))
        for g in (slice(0, 4), slice(4, 6))
    ])  # fmt: skip
    torch.testing.assert_close(ours, exact.mean())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda o: fastrm.target_from_labels(torch.ones(4), o), r"offsets\[2\] must be 4"),
        (lambda o: fastrm.target_from_labels(torch.ones(5, 2), o), r"labels must have shape \(M,"),
        (lambda o: fastrm.target_from_labels([1.0], o), "labels must be a torch.Tensor"),
        (lambda o: fastrm.target_from_scores(torch.full((5,), torch.nan), o), r"scores\[0\]"),
        (lambda o: fastrm.position_weight_from_ranks(torch.ones(5), o), "ranks must have dtype"),
        (lambda o: fastrm.position_weight_from_ranks(torch.arange(5) - 2, o), r"ranks\[0\]"),
    ],
)
def test_bad_arguments_of_the_helpers(call: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call(torch.tensor(OFFSETS))
