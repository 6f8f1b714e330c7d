"""What the losses of scores share: groups of candidates, their loss and weight, the batch's loss.

All sums are in fp64: the vectors are of the scores' size, and rounding once, at the end, is cheap.
Letters: N groups, M candidates.

Per group, in fp64 (3, N): loss; scale, what a gradient of the group's loss is multiplied with; and
shift, what centring adds to it.
"""

import triton
import triton.language as tl
from fastrm_kernels.rows import load_index


@triton.jit
def groups_of(offsets_ptr, i, ok, N, steps):
    """Last n with offsets[n] <= i by bisection in 2^steps > N; in [0, N) whatever offsets hold."""
    low = i * 0
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        before = load_index(offsets_ptr + middle, ok, 0) <= i
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def bounds(offsets_ptr, n, ok, M):
    """First candidate of group n and the one after its last, both in [0, M]."""
    first = load_index(offsets_ptr + n, ok, 0)
    last = load_index(offsets_ptr + n + 1, ok, 0)
    return tl.minimum(tl.maximum(first, 0), M), tl.minimum(tl.maximum(last, 0), M)


@triton.jit
def load_rank(ranks_ptr, i, ok):
    """Ranks less 1 in int64, the unranked and the invalid below all others."""
    rank = tl.load(ranks_ptr + i, mask=ok, other=-1).to(tl.int64)
    return tl.where(rank < 0, 0x7FFFFFFFFFFFFFFF, rank - 1)


@triton.jit(
    do_not_specialize=["M", "N"],
    do_not_specialize_on_alignment=[
        "terms_ptr", "pairs_ptr", "scores_ptr", "offsets_ptr", "ranks_ptr", "group_weight_ptr",
        "num_items_ptr", "loss_ptr", "stats_ptr",
    ],
)  # fmt: skip
def _group_loss_kernel(
    terms_ptr, pairs_ptr, scores_ptr, offsets_ptr, ranks_ptr, group_weight_ptr, num_items_ptr,
    loss_ptr, stats_ptr, M, N, center_coef: tl.float64,
    PAIRS: tl.constexpr, CENTER: tl.constexpr, HAS_GROUP_WEIGHT: tl.constexpr,
    HAS_NUM_ITEMS: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group: its loss from its candidates' terms, a mean over its pairs or centred as a whole."""
    center_coef = tl.full((), center_coef, tl.float64)
    n = tl.program_id(0)
    first = load_index(offsets_ptr + n, n < N, 0)
    last = load_index(offsets_ptr + n + 1, n < N, 0)
    valid = (first >= 0) & (first < last) & (last <= M)
    begins, ends = load_index(offsets_ptr, n < N, 0), load_index(offsets_ptr + N, n < N, 0)
    valid = valid & (begins == 0) & (ends == M)
    sums = tl.zeros((BLOCK,), tl.float64)
    pairs = tl.zeros((BLOCK,), tl.float64)
    scores = tl.zeros((BLOCK,), tl.float64)
    bad = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.where(valid, first, 0), tl.where(valid, last, 0), BLOCK):
        i = block + tl.arange(0, BLOCK)
        ok = i < last
        sums += tl.load(terms_ptr + i, mask=ok, other=0.0)
        bad |= (tl.load(ranks_ptr + i, mask=ok, other=-1).to(tl.int64) < -1).to(tl.int32)
        if PAIRS:
            pairs += tl.load(pairs_ptr + i, mask=ok, other=0).to(tl.float64)
        if CENTER:
            scores += tl.load(scores_ptr + i, mask=ok, other=0.0).to(tl.float64)
    loss = tl.sum(sums, axis=0)
    scale = tl.full((), 1.0, tl.float64)
    shift = tl.zeros((), tl.float64)
    if PAIRS:
        scale /= tl.maximum(tl.sum(pairs, axis=0), 1.0)
        loss *= scale
    if CENTER:
        size = (last - first).to(tl.float64)
        mean = tl.sum(scores, axis=0) / size
        loss += center_coef * 4 * mean * mean
        shift = center_coef * 8 * mean / size
    weight = tl.full((), 1.0, tl.float64)
    if HAS_GROUP_WEIGHT:
        weight = tl.load(group_weight_ptr + n).to(tl.float64)
    if REDUCTION == "mean":
        if HAS_NUM_ITEMS:
            weight /= tl.load(num_items_ptr).to(tl.float64)
        else:
            weight /= N.to(tl.float64)
    weight = tl.where(valid & (tl.sum(bad, axis=0) == 0), weight, float("nan"))
    if REDUCTION == "none":
        tl.store(loss_ptr + n, weight * loss)
    tl.store(stats_ptr + n, weight * loss)
    tl.store(stats_ptr + N + n, weight * scale)
    tl.store(stats_ptr + 2 * tl.cast(N, tl.int64) + n, weight * shift)


@triton.jit
def store_total(loss_ptr, stats_ptr, N, BLOCK: tl.constexpr):
    """The batch's loss: the sum of all groups', already divided."""
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(0, N, BLOCK):
        n = block + tl.arange(0, BLOCK)
        total += tl.load(stats_ptr + n, mask=n < N, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0).to(loss_ptr.dtype.element_ty))
