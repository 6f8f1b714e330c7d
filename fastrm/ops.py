"""The autograd functions of the Triton kernels.

Forward gives the loss and, in the same pass over hidden, what backward needs: hidden itself is kept
only where the weight gradient cannot be known in that pass. The C++ operators are differentiable
themselves (csrc/autograd.cpp): on the CPU a graph node in Python would cost more than the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrm import backends
from fastrm.groups import group_of


def listwise_loss(
    hidden: Tensor,  # (T, D) or (B, S, D)
    weight: Tensor,  # (D,) or (1, D)
    bias: Tensor | None,  # () or (1,)
    offsets: Tensor,  # (N + 1,)
    target: Tensor,  # (N,) or (M,)
    rows: Tensor | None,  # (M,)
    margin: Tensor | None,  # (M,)
    group_weight: Tensor | None,  # (N,)
    num_items: Tensor | None,  # ()
    temperature: float,
    label_smoothing: float,
    center_coef: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss () or (N,) and detached scores (M,)."""
    fused = backends.FUSED["triton"]
    options = (temperature, label_smoothing, center_coef, reduction)
    groups = (offsets, target, rows, margin, group_weight, num_items)
    if _wants_grad(hidden, weight, bias):
        return _ListwiseLoss.apply(hidden, weight, bias, *groups, options)
    return fused.listwise_fwd(hidden, weight, bias, *groups, *options, False, False)[:2]


def score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> Tensor:
    """Scores (M,)."""
    fused = backends.FUSED["triton"]
    if _wants_grad(hidden, weight, bias):
        return _Score.apply(hidden, weight, bias, rows)
    return fused.score_fwd(hidden, weight, bias, rows)


def _wants_grad(*inputs: Tensor | None) -> bool:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return True  # so that forward mode is refused, not answered with no tangent
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _ListwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
        target: Tensor, rows: Tensor | None, margin: Tensor | None, group_weight: Tensor | None,
        num_items: Tensor | None, options: tuple[float, float, float, str],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_dweight = ctx.needs_input_grad[1]
        fused = backends.FUSED["triton"]
        loss, scores, state = fused.listwise_fwd(
            hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
            *options, True, needs_dweight,
        )  # fmt: skip
        # Where one pass cannot weigh the rows for dweight, backward reads hidden again.
        again = hidden if needs_dweight and fused.reads_twice(options[3], options[2]) else None
        ctx.save_for_backward(weight, bias, again, rows, *state)
        ctx.mark_non_differentiable(scores)
        if not torch.compiler.is_compiling():  # which does not know it, and needs it not
            ctx.set_materialize_grads(False)  # else zeros are made for the scores
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.options = options
        return loss, scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        if grad is None:  # of a loss that nothing depends on
            return (None,) * 10
        weight, bias, hidden, rows, *state = ctx.saved_tensors
        grads = backends.FUSED["triton"].listwise_bwd(
            grad, weight, rows, tuple(state), hidden, ctx.shape, ctx.dtype, ctx.options,
            *ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *_asked(ctx, grads, bias), *(None,) * 7


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, rows)
        return backends.FUSED["triton"].score_fwd(hidden, weight, bias, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        hidden, weight, bias, rows = ctx.saved_tensors
        grads = backends.FUSED["triton"].score_bwd(
            grad, hidden, weight, rows, *ctx.needs_input_grad[:3]
        )
        return *_asked(ctx, grads, bias), None


def ranking_loss(
    name: str,  # plackett_luce or bradley_terry
    scores: Tensor,  # (M,)
    offsets: Tensor,  # (N + 1,)
    ranks: Tensor,  # (M,)
    extra: Tensor | None,  # (M,) position_weight or margin
    group_weight: Tensor | None,  # (N,)
    num_items: Tensor | None,  # ()
    temperature: float,
    center_coef: float,
    reduction: str,
) -> Tensor:
    """Loss () or (N,) of scores."""
    forward = getattr(backends.FUSED["triton"], f"{name}_fwd")
    args = (scores, offsets, ranks, extra, group_weight, num_items)
    options = (temperature, center_coef, reduction)
    if _wants_grad(scores):
        return _RankingLoss.apply(forward, *args, options)
    return forward(*args, *options, False)[0]


class _RankingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: Any, scores: Tensor, offsets: Tensor, ranks: Tensor,
        extra: Tensor | None, group_weight: Tensor | None, num_items: Tensor | None,
        options: tuple[float, float, str],
    ) -> Tensor:  # fmt: skip
        loss, coef = forward(
            scores, offsets, ranks, extra, group_weight, num_items, *options, True
        )
        ctx.save_for_backward(coef, offsets)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        coef, offsets = ctx.saved_tensors
        if grad.dim():
            grad = grad.index_select(0, group_of(offsets, len(coef)))
        return None, grad * coef, *(None,) * 6


def _refuse_second_order() -> None:
    """The gradients here have no graph of their own: with create_graph they would look constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused backends are differentiable once; create_graph=True needs backend='torch'"
        )


def _asked(
    ctx: Any, grads: Sequence[Tensor], bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dhidden, dweight, dbias = grads
    needs = ctx.needs_input_grad
    if bias is None or not needs[2]:
        out = None
    else:
        out = dbias.reshape(bias.shape).to(bias.dtype)
    return dhidden if needs[0] else None, dweight if needs[1] else None, out
