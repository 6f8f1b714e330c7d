"""The losses in plain PyTorch: the oracle of every test and the `torch` backend.

Letters: N groups, M candidates, T rows of hidden, D hidden size. Everything here is ordinary
differentiable code; every other backend is measured against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrm.groups import group_of, order_by_rank, rank_keys, sum_dtype

ROWS_OF_PAIRS = 256  # candidates whose pairs are formed together


def score_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """Scores `w·h_i + b` of the chosen rows, (M,) or (M, E), in fp32 (fp64 for fp64 hidden)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    h = hidden.reshape(-1, hidden.shape[-1])
    h = h if rows is None else h[rows.long()]
    weight = weight.squeeze(0) if weight.dim() == 2 else weight  # (D,) or (E, D)
    scores = F.linear(h.to(dtype), weight.to(dtype))
    return scores if bias is None else scores + bias.reshape(weight.shape[:-1]).to(dtype)


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
    i, group = torch.arange(M, device=scores.device), group_of(offsets, M)
    wide = sum_dtype(scores.device)

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
        scores = torch.where(spread(counted), scores, 0)  # or 0 times an infinite one is NaN
    z = scores if margin is None else scores + torch.where(q > 0, 0, margin.to(scores.dtype))
    z = z / temperature
    q = (1 - label_smoothing) * q + label_smoothing / spread(size).to(q.dtype)
    top = z.new_full((N,), -torch.inf).scatter_reduce(0, group, z.detach(), "amax")
    log_sum = spread(total((z - spread(top)).exp()).log().to(wide)).to(z.dtype)
    # From differences to the maximum: a log-sum-exp as large as the scores would round them away.
    loss = total(torch.where(q > 0, q * (log_sum - (z - spread(top))), 0))
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


def plackett_luce_loss_ref(
    scores: Tensor,  # (M,)
    offsets: Tensor,  # (N + 1,)
    ranks: Tensor,  # (M,)
    position_weight: Tensor | None = None,  # (M,)
    group_weight: Tensor | None = None,  # (N,)
    num_items_in_batch: Tensor | None = None,  # ()
    temperature: float = 1.0,
    center_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Each ranked candidate against those not above it (M² when compiled); invalid groups: NaN."""
    groups = _Groups(scores, offsets)
    order = order_by_rank(ranks, groups.of)
    last = rank_keys(ranks)
    group, rank = groups.of.index_select(0, order), last.index_select(0, order)
    i = torch.arange(len(order), device=scores.device)
    # From differences to the maximum, as above.
    top = groups.scores.detach().new_full((len(groups.size),), -torch.inf)
    top = top.scatter_reduce(0, groups.of, groups.scores.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0).index_select(0, groups.of)
    z = ((groups.scores - top) / temperature).index_select(0, order)
    # The gradient of logaddexp(-inf, -inf) would be NaN, and so would that of a finite one beside
    # a NaN.
    below, step = z.masked_fill(z == -torch.inf, torch.finfo(z.dtype).min), 1
    if torch.compiler.is_compiling():  # a graph cannot depend on how many there are
        after = (group[:, None] == group) & (i[:, None] <= i)
        below = torch.where(after, below, -torch.inf).logsumexp(1)
    else:  # log Σ exp over a candidate and the `step` - 1 after it in its group
        while step < len(order):
            other = (i + step).clamp(max=len(order) - 1)
            inside = (i + step < len(order)) & (group == group.index_select(0, other))
            both = torch.logaddexp(below, below.index_select(0, torch.where(inside, other, i)))
            below, step = torch.where(inside, both, below), 2 * step
    starts = torch.ones_like(i, dtype=torch.bool)
    starts[1:] = (group[1:] != group[:-1]) | (rank[1:] != rank[:-1])
    below = below.index_select(0, torch.where(starts, i, 0).cummax(0).values)  # ties share it
    terms = torch.zeros_like(groups.scores).index_put((order,), below - z)
    weight = (ranks >= 0).to(terms.dtype)
    weight = weight if position_weight is None else weight * position_weight.to(terms.dtype)
    loss = groups.total(torch.where(weight != 0, weight * terms, 0))
    if center_coef:
        loss = loss + center_coef * (2 * groups.total(groups.scores) / groups.size).square()
    return groups.reduce(loss, ranks, group_weight, num_items_in_batch, reduction)


def bradley_terry_loss_ref(
    scores: Tensor,  # (M,)
    offsets: Tensor,  # (N + 1,)
    ranks: Tensor,  # (M,)
    margin: Tensor | None = None,  # (M,)
    group_weight: Tensor | None = None,  # (N,)
    num_items_in_batch: Tensor | None = None,  # ()
    temperature: float = 1.0,
    center_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """All pairs of a group whose ranks differ, some rows of pairs at a time; M² when compiled."""
    groups = _Groups(scores, offsets)
    last = rank_keys(ranks)
    M, s = len(last), groups.scores
    z_lost = s if margin is None else s + margin.to(s.dtype)

    def wins(i: slice, j: slice, s: Tensor, z_lost: Tensor) -> tuple[Tensor, Tensor]:
        """Of candidates i over those of j: loss terms and their number."""
        beaten = (groups.of[i, None] == groups.of[j]) & (last[i, None] < last[j])
        # Masked before too: 0 times the slope at an infinite difference, or NaN, is NaN.
        gap = torch.where(beaten, s[i, None] - z_lost[j], 0)
        pair = -F.logsigmoid(gap / temperature)  # softplus has a threshold
        if center_coef:
            pair = pair + center_coef * torch.where(beaten, s[i, None] + s[j], 0).square()
        return torch.where(beaten, pair, 0).sum(1), beaten.sum(1)

    parts = []
    if torch.compiler.is_compiling():  # a graph cannot depend on what offsets hold
        parts.append(wins(slice(None), slice(None), s, z_lost))
    else:
        bounds = offsets.long().clamp(0, M).tolist()
        n = m = 0
        for at in range(0, M, ROWS_OF_PAIRS):
            i = slice(at, min(at + ROWS_OF_PAIRS, M))
            while n < len(bounds) - 2 and bounds[n + 1] <= i.start:
                n += 1
            while m < len(bounds) - 1 and bounds[m] < i.stop:
                m += 1
            j = slice(bounds[n], bounds[m])
            parts.append(checkpoint(wins, i, j, s, z_lost, use_reentrant=False))  # not M·K numbers
    terms, number = (torch.cat(x) for x in zip(*parts, strict=True)) if parts else (s, s)
    loss = groups.total(terms) / groups.total(number.to(s.dtype)).clamp(min=1)
    return groups.reduce(loss, ranks, group_weight, num_items_in_batch, reduction)


class _Groups:
    """Sums over groups."""

    def __init__(self, scores: Tensor, offsets: Tensor) -> None:
        self.dtype = scores.dtype
        self.scores = scores.to(sum_dtype(scores.device))
        self.offsets, self.size = offsets, offsets.long().diff()
        self.of = group_of(offsets, len(scores))

    def total(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.size)).index_add(0, self.of, x)

    def reduce(
        self, loss: Tensor, ranks: Tensor, group_weight: Tensor | None,
        num_items_in_batch: Tensor | None, reduction: str,
    ) -> Tensor:  # fmt: skip
        if group_weight is not None:
            loss = loss * group_weight.to(loss.dtype)
        valid = (self.size > 0) & (self.total((ranks.long() < -1).to(loss.dtype)) == 0)
        loss = loss.masked_fill(~valid, torch.nan)
        if reduction != "none":
            # Broken offsets can hide in valid-looking groups.
            broken = (self.offsets[0] != 0) | (self.offsets[-1] != len(self.of))
            loss = loss.sum().masked_fill(broken, torch.nan)
        if reduction == "mean":
            N = max(len(self.size), 1)
            loss = loss / (N if num_items_in_batch is None else num_items_in_batch.to(loss.dtype))
        return loss.to(self.dtype)
