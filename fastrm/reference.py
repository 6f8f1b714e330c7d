"""The losses in plain PyTorch: the oracle of every test and the `torch` backend.

Letters: N groups, M candidates, T rows of hidden, D hidden size. Everything here is ordinary
differentiable code; every other backend is measured against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """Scores `w·h_i + b` (M,) of the chosen rows, in fp32 (fp64 for fp64 hidden)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    h = hidden.reshape(-1, hidden.shape[-1])
    h = h if rows is None else h[rows.long()]
    scores = h.to(dtype) @ weight.reshape(-1).to(dtype)
    return scores if bias is None else scores + bias.reshape(()).to(dtype)


def listwise_loss_ref(
    scores: Tensor,  # (M,)
    offsets: Tensor,  # (N + 1,)
    target: Tensor,  # (N,) index or (M,) distribution
    margin: Tensor | None = None,  # (M,)
    group_weight: Tensor | None = None,  # (N,)
    num_items_in_batch: Tensor | None = None,  # ()
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Segmented softmax cross entropy; a group whose target or offsets are invalid gives NaN."""
    M, N = scores.shape[0], offsets.shape[0] - 1
    first, size = offsets[:-1].long(), offsets.long().diff()
    i = torch.arange(M, device=scores.device)
    group = torch.searchsorted(offsets[1:].contiguous(), i, right=True).clamp(max=max(N - 1, 0))
    # Serial fp32 sums lose a digit every few hundred candidates. (MPS has no fp64.)
    wide = torch.float32 if scores.device.type == "mps" else torch.float64

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(N, dtype=wide).index_add(0, group, x.to(wide)).to(x.dtype)

    def spread(x: Tensor) -> Tensor:  # index_select: the backward of x[group] is in no fixed order
        return x.index_select(0, group)

    if target.is_floating_point():
        q, counted = target.to(scores.dtype), torch.ones_like(size, dtype=torch.bool)
        valid = (size > 0) & ((total(q) - 1).abs() <= 2e-2) & (total((q < 0).to(q.dtype)) == 0)
    else:
        target = target.long()
        q = (i - spread(first) == spread(target)).to(scores.dtype)
        counted = target != -100
        valid = (size > 0) & (~counted | ((target >= 0) & (target < size)))
    z = scores if margin is None else scores + torch.where(q > 0, 0, margin.to(scores.dtype))
    z = z / temperature
    q = (1 - label_smoothing) * q + label_smoothing / spread(size).to(q.dtype)
    top = z.new_full((N,), -torch.inf).scatter_reduce(0, group, z.detach(), "amax")
    log_sum = total((z - spread(top)).exp()).log()
    # From differences to the maximum: a log-sum-exp as large as the scores would round them away.
    loss = total(torch.where(q > 0, q * (spread(log_sum) - (z - spread(top))), 0))
    if center_coef:
        loss = loss + center_coef * (2 * total(scores) / size).square()
    if group_weight is not None:
        loss = loss * group_weight.to(loss.dtype)
    loss = torch.where(counted, loss, 0).masked_fill(~valid, torch.nan)
    if reduction == "none":
        return loss
    if N:  # broken offsets can hide in valid-looking groups
        broken = (offsets[0] != 0) | (offsets[-1] != M)
        loss = loss.masked_fill(broken, torch.nan)
    if reduction == "sum":
        return loss.sum()
    divisor = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return loss.sum() / divisor.to(loss.dtype)
