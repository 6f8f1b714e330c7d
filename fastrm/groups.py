"""Ragged groups as offsets: candidates `offsets[n]:offsets[n + 1]` form group n."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrm import checks


def offsets_from_sizes(sizes: Tensor | Sequence[int]) -> Tensor:
    """Offsets of consecutive groups from their sizes.

    Args:
        sizes: (N,) integer tensor or sequence of ints, candidates per group, each at least 1.

    Returns:
        (N + 1,) int64 tensor on the device of `sizes`: 0 followed by the running sum.

    Raises:
        TypeError: `sizes` is not integer.
        ValueError: `sizes` is not one-dimensional, or (on CPU) has an entry below 1.
    """
    sizes = _integers("sizes", sizes)
    if sizes.device.type == "cpu" and sizes.numel() and int(sizes.min()) < 1:
        n = int((sizes < 1).nonzero()[0])
        raise ValueError(f"sizes[{n}] is {int(sizes[n])}; every group needs at least 1 candidate")
    offsets = torch.zeros(sizes.numel() + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=offsets[1:])
    return offsets


def offsets_from_ids(group_ids: Tensor | Sequence[int]) -> Tensor:
    """Offsets of groups given the group id of each candidate, equal ids standing together.

    The number of groups depends on the values, so this waits for the device when `group_ids`
    is on one; build offsets in the data loader where that matters.

    Args:
        group_ids: (M,) integer tensor or sequence of ints; a group is a run of equal ids.

    Returns:
        (N + 1,) int64 tensor on the device of `group_ids`.

    Raises:
        TypeError: `group_ids` is not integer.
        ValueError: it is not one-dimensional, or (on CPU) an id comes back after another one.
    """
    ids = _integers("group_ids", group_ids)
    runs, sizes = torch.unique_consecutive(ids, return_counts=True)
    if ids.device.type == "cpu" and runs.unique().numel() != runs.numel():
        seen: set[int] = set()
        repeated = next(r for r in runs.tolist() if r in seen or seen.add(r))  # type: ignore[func-returns-value]
        raise ValueError(
            f"group_ids has id {repeated} in separate places; sort the candidates so that each "
            "group is one run"
        )
    return offsets_from_sizes(sizes)


def target_from_labels(labels: Tensor, offsets: Tensor) -> Tensor:
    """The `target` of `fastrm.listwise_loss` for several positives, ties or grades.

    Args:
        labels: (M,) numbers >= 0: 1 for each positive and 0 for the others, or grades.
        offsets: (N + 1,) integer, as in `fastrm.listwise_loss`.

    Returns:
        (M,) fp32 (fp64 for fp64 labels): ``labels / Σ labels`` over each group; the target of the
        softmax loss of TF-Ranking (which weighs each group by its ``Σ labels``).

    Raises:
        TypeError, ValueError: an argument does not fit; (on CPU) a label is below 0 or not finite,
            or a group has none above 0.
    """
    _check("labels", labels, offsets)
    labels = labels.detach().to(torch.promote_types(labels.dtype, torch.float32))
    group = group_of(offsets, len(labels))
    total = group_sums(labels, offsets)
    if _looks_at_values(labels):
        bad = ~(labels.isfinite() & (labels >= 0))
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(f"labels[{i}] must be finite, 0 or more, got {float(labels[i])}")
        if (total == 0).any():
            raise ValueError(f"group {int((total == 0).nonzero()[0])} has no label above 0")
    return (labels / total.index_select(0, group)).to(labels.dtype)


def target_from_scores(scores: Tensor, offsets: Tensor) -> Tensor:
    """The `target` of `fastrm.listwise_loss` from scores: their softmax over each group.

    With labels as scores this is the target of ListNet (Cao et al., 2007), with those of another
    model that of distillation.

    Args:
        scores: (M,) numbers.
        offsets: (N + 1,) integer, as in `fastrm.listwise_loss`.

    Returns:
        (M,) fp32 (fp64 for fp64 scores), a distribution over each group.

    Raises:
        TypeError, ValueError: an argument does not fit; (on CPU) a score is not finite.
    """
    _check("scores", scores, offsets)
    if _looks_at_values(scores):
        checks.finite("scores", scores)
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    group = group_of(offsets, len(scores))
    top = torch.segment_reduce(scores, "max", offsets=_bounds(offsets, len(scores)), unsafe=True)
    e = (scores - top.index_select(0, group)).double().exp()
    return (e / group_sums(e, offsets).index_select(0, group)).to(scores.dtype)


def position_weight_from_ranks(ranks: Tensor, offsets: Tensor) -> Tensor:
    """The `position_weight` of p-ListMLE (Lan et al., 2014, section 4.2) from ranks.

    The candidate at position p of K, counted from 1, weighs ``2^(K-p) - 1``, divided by their sum,
    as in sentence-transformers' PListMLELoss. Equal ranks, and the unranked, take positions in the
    order in which they stand.

    Args:
        ranks: (M,) integer, as in `fastrm.plackett_luce_loss`.
        offsets: (N + 1,) integer.

    Returns:
        (M,) fp32, which sums to 1 over a group of two or more and is 0 in a group of one.

    Raises:
        TypeError, ValueError: an argument does not fit; (on CPU) a rank is below -1.
    """
    _check("ranks", ranks, offsets, checks.INTS)
    if _looks_at_values(ranks):
        checks.ranks_values(ranks)
    group = group_of(offsets, len(ranks))
    order = order_by_rank(ranks, group)
    place = torch.arange(len(ranks), device=ranks.device)  # sorted, each group stays where it was
    p = torch.empty_like(place).index_copy_(0, order, place - offsets[:-1].long()[group] + 1)
    K = offsets.diff()[group].double()
    least = torch.exp2(-K)
    return ((torch.exp2(-p.double()) - least) / (1 - (K + 1) * least)).where(K > 1, 0).float()


def group_of(offsets: Tensor, M: int) -> Tensor:
    """(M,) int64: the group of each candidate; a valid one whatever `offsets` hold."""
    i = torch.arange(M, device=offsets.device)
    last = max(offsets.shape[0] - 2, 0)
    # Not in offsets[1:]: torch.compile searches a slice on a GPU from its tensor's beginning.
    return torch.searchsorted(offsets.long().contiguous(), i, right=True).sub(1).clamp(0, last)


def order_by_rank(ranks: Tensor, group: Tensor) -> Tensor:
    """(M,) int64: candidates by group, then by rank, the unranked last; stable."""
    order = rank_keys(ranks).argsort(stable=True)
    return order.index_select(0, group.index_select(0, order).argsort(stable=True))


def rank_keys(ranks: Tensor) -> Tensor:
    """(M,) int64 in the order of the ranks, the unranked above all: the largest rank too."""
    return (ranks.long() - 1).where(ranks >= 0, torch.iinfo(torch.int64).max)


def _check(
    name: str, x: Tensor, offsets: Tensor, dtypes: tuple[torch.dtype, ...] = checks.ALL
) -> None:
    checks.tensor(name, x, dtypes)
    if x.dim() != 1:
        checks.refuse(name, "have shape (M,)", tuple(x.shape))
    checks.offsets(offsets, x.device)
    if _looks_at_values(x):
        checks.offsets_values(offsets, len(x))


def _looks_at_values(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What long sums are formed in: serial fp32 ones lose a digit every few hundred terms."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64


def _bounds(offsets: Tensor, M: int) -> Tensor:
    """Offsets that stay inside M whatever they hold."""
    return offsets.long().clamp(0, M).cummax(0).values


def group_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """(N,) fp64 sums over groups, in a fixed order on every device."""
    return torch.segment_reduce(x.double(), "sum", offsets=_bounds(offsets, len(x)), unsafe=True)


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(list(values), dtype=None if values else torch.int64)
        except (TypeError, ValueError, RuntimeError):  # what torch makes of it
            raise TypeError(f"{name} must be integers, got {values!r:.60}") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(values.shape)}")
    return values
