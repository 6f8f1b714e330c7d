"""Ragged problems and an oracle for them that shares no code with the library."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import fastrm

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
HIDDEN_SIZES = (1, 7, 96, 384, 576, 896, 1000, 3584, 4096, 5120, 16384)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def run(self, backend: str | None, grad: Tensor | None = None) -> dict[str, Tensor]:
        """Loss, scores and gradients from one backend."""
        leaves = self._leaves()
        loss, scores = fastrm.listwise_loss(
            *leaves, offsets=self.offsets, target=self.target, backend=backend,
            return_scores=True, **self.options,
        )  # fmt: skip
        return self._grads(leaves, loss, scores, grad)

    def oracle(self, grad: Tensor | None = None) -> dict[str, Tensor]:
        """The same, group by group, from torch's own cross entropy in float64."""
        exact = self.to(torch.float64)
        leaves = exact._leaves()
        hidden, weight, bias = leaves
        o = dict(self.options)
        h = hidden.reshape(-1, hidden.shape[-1])
        scores = (h if o.get("rows") is None else h[o["rows"]]) @ weight.reshape(-1)
        scores = scores if bias is None else scores + bias.reshape(())
        N = len(self.offsets) - 1
        losses = [self._group(n, scores) for n in range(N)]
        loss = torch.stack(losses) if N else scores.sum() + scores.new_zeros(0)
        reduction = o.get("reduction", "mean")
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            counted = N if self.target.is_floating_point() else int((self.target != -100).sum())
            items = o.get("num_items_in_batch")
            loss = loss / (max(counted, 1) if items is None else float(items))
        return exact._grads(leaves, loss, scores.detach(), grad)

    def _group(self, n: int, scores: Tensor) -> Tensor:
        o = self.options
        sl = slice(int(self.offsets[n]), int(self.offsets[n + 1]))
        s = scores[sl]
        if self.target.is_floating_point():
            q = self.target[sl].double()
        elif int(self.target[n]) == -100:
            return 0.0 * s.sum()
        else:
            q = F.one_hot(self.target[n].long(), len(s)).double()
        z = s
        if o.get("margin") is not None:
            z = z + torch.where(q > 0, 0.0, o["margin"][sl].double())
        z = z / o.get("temperature", 1.0)
        loss = F.cross_entropy(z[None], q[None], label_smoothing=o.get("label_smoothing", 0.0))
        loss = loss + o.get("center_coef", 0.0) * (2 * s.mean()) ** 2
        weight = o.get("group_weight")
        return loss if weight is None else loss * weight[n].double()

    def _leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        # detach() alone keeps strides, expanded ones too
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(), bias

    @staticmethod
    def _grads(leaves: Any, loss: Tensor, scores: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
        wanted = [x for x in leaves if x is not None]
        up = torch.full_like(loss, 1.5) if grad is None else grad.to(loss.dtype)
        grads = torch.autograd.grad(loss, wanted, up)
        names = ["dhidden", "dweight", "dbias"][: len(wanted)]
        return {"loss": loss.detach(), "scores": scores, **dict(zip(names, grads, strict=True))}


def ragged_sizes(kind: str, M: int, generator: torch.Generator) -> list[int]:
    """Group sizes that add up to about M."""
    if kind == "ones":
        return [1] * M
    if kind == "pairs":
        return [2] * max(M // 2, 1)
    if kind == "giant":
        return [M]
    if kind == "uniform":
        draw = torch.randint(2, 17, (M,), generator=generator).tolist()
    elif kind == "zipf":
        rank = 1 + torch.randint(0, 1000, (M,), generator=generator)
        draw = [max(1, 300 // int(r)) for r in rank]
    else:
        raise ValueError(kind)
    sizes, total = [], 0
    for k in draw:
        if total >= M:
            break
        sizes.append(min(k, M - total))
        total += sizes[-1]
    return sizes


def make(
    sizes: list[int], D: int, seed: int = 0, *, soft: bool = False, bias: bool = True,
    gathered: bool = False, batched: bool = False, scale: float = 1.0, ignore: bool = False,
    margin: bool = False, group_weight: bool = False, **options: Any,
) -> Problem:  # fmt: skip
    """A float64 problem: normal hidden states, and a weight that gives scores of std `scale`."""
    g = torch.Generator().manual_seed(seed)
    M, N = sum(sizes), len(sizes)
    shape: tuple[int, ...] = (M, D)
    if gathered:
        S = 3 + M // 3
        shape = (4, S, D)
        options["rows"] = torch.randperm(4 * S, generator=g)[:M]
    elif batched:
        shape = (1, M, D)
    hidden = torch.randn(shape, generator=g, dtype=torch.float64)
    weight = torch.randn(D, generator=g, dtype=torch.float64) * scale / D**0.5
    b = torch.randn((), generator=g, dtype=torch.float64) if bias else None
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if soft:
        x = torch.rand(M, generator=g, dtype=torch.float64)
        x = x * (torch.rand(M, generator=g) > 0.4)
        x[offsets[:-1]] += 0.1
        group = torch.repeat_interleave(torch.arange(N), torch.tensor(sizes))
        target = x / torch.zeros(N, dtype=torch.float64).index_add(0, group, x)[group]
    else:
        target = torch.tensor(
            [int(torch.randint(0, k, (), generator=g)) for k in sizes], dtype=torch.int64
        )
        if ignore:
            target[::3] = -100
    if margin:
        options["margin"] = torch.rand(M, generator=g, dtype=torch.float64) * 3
    if group_weight:
        options["group_weight"] = torch.rand(N, generator=g, dtype=torch.float64) + 0.1
    return Problem(hidden, weight, b, offsets, target, options)


@st.composite
def problems(draw: Any, max_groups: int = 12, max_size: int = 30, max_d: int = 40) -> Problem:
    """Any raggedness, any option, in float64."""
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_groups))
    soft = draw(st.booleans())
    items = draw(st.sampled_from([None, 7, torch.tensor(5), torch.tensor(3.0)]))
    return make(
        sizes, draw(st.integers(1, max_d)), draw(st.integers(0, 2**20)), soft=soft,
        bias=draw(st.booleans()), gathered=draw(st.booleans()), batched=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 0.3, 3.0, 100.0])),
        ignore=not soft and draw(st.booleans()),
        margin=draw(st.booleans()), group_weight=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.3, 2.7])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        center_coef=draw(st.sampled_from([0.0, 0.01, 0.7])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])), num_items_in_batch=items,
    )  # fmt: skip


def error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖ in float64; NaN counts as infinite."""
    got, exact = got.double().flatten(), exact.double().flatten()
    gap = float((got - exact).norm()) / max(float(exact.norm()), 1e-300)
    return gap if gap == gap else float("inf")
