"""Bradley-Terry loss of all pairs of a group whose ranks differ, without memory for the pairs.

README.md beside this file has the algebra. Letters: N groups, M candidates.
"""

import triton
import triton.language as tl
from fastrm_kernels.groups import bounds, groups_of, load_rank, store_total


@triton.jit(
    do_not_specialize=["M", "N", "steps"],
    do_not_specialize_on_alignment=[
        "scores_ptr", "offsets_ptr", "ranks_ptr", "margin_ptr", "terms_ptr", "pairs_ptr",
        "slopes_ptr",
    ],
)  # fmt: skip
def _bradley_terry_pairs_kernel(
    scores_ptr, offsets_ptr, ranks_ptr, margin_ptr, terms_ptr, pairs_ptr, slopes_ptr,
    M, N, steps, temperature: tl.float64, center_coef: tl.float64,
    HAS_MARGIN: tl.constexpr, CENTER: tl.constexpr, COEF: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """BLOCK_I candidates: the terms and number of their wins, the slope of wins and losses."""
    temperature = tl.full((), temperature, tl.float64)
    center_coef = tl.full((), center_coef, tl.float64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    ok = i < M
    first, last = bounds(offsets_ptr, groups_of(offsets_ptr, i, ok, N, steps), ok, M)
    rank_i = load_rank(ranks_ptr, i, ok)[:, None]
    s_i = tl.load(scores_ptr + i, mask=ok, other=0.0).to(tl.float64)[:, None]
    lost_i = s_i  # the score with which a candidate loses
    if HAS_MARGIN:
        lost_i += tl.load(margin_ptr + i, mask=ok, other=0.0).to(tl.float64)[:, None]
    terms = tl.zeros((BLOCK_I,), tl.float64)
    pairs = tl.zeros((BLOCK_I,), tl.int32)
    slopes = tl.zeros((BLOCK_I,), tl.float64)
    begin, end = tl.min(tl.where(ok, first, M), axis=0), tl.max(last, axis=0)
    for block in range(begin, end, BLOCK_J):
        j = block + tl.arange(0, BLOCK_J)
        ok_j = j < end
        rank_j = load_rank(ranks_ptr, j, ok_j)[None, :]
        s_j = tl.load(scores_ptr + j, mask=ok_j, other=0.0).to(tl.float64)[None, :]
        lost_j = s_j
        if HAS_MARGIN:
            lost_j += tl.load(margin_ptr + j, mask=ok_j, other=0.0).to(tl.float64)[None, :]
        pair = (first[:, None] <= j[None, :]) & (j[None, :] < last[:, None]) & ok[:, None]
        wins = pair & (rank_i < rank_j)
        pair = pair & (rank_i != rank_j)
        x = tl.where(wins, lost_j - s_i, lost_i - s_j) / temperature
        e = tl.exp(-tl.abs(x))
        term = tl.maximum(x, 0.0) + _log1p(e)
        slope = tl.where(x >= 0, 1.0, e) / (1 + e) / temperature
        slope = tl.where(wins, -slope, slope)
        if CENTER:
            both = s_i + s_j
            term += center_coef * both * both
            slope += center_coef * 2 * both
        terms += tl.sum(tl.where(wins, term, 0.0), axis=1)
        pairs += tl.sum(wins.to(tl.int32), axis=1)
        if COEF:
            slopes += tl.sum(tl.where(pair, slope, 0.0), axis=1)
    tl.store(terms_ptr + i, terms, mask=ok)
    tl.store(pairs_ptr + i, pairs, mask=ok)
    if COEF:
        tl.store(slopes_ptr + i, slopes, mask=ok)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0; what 1 + x rounds away is made good (Goldberg, 1991, theorem 4)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit(
    do_not_specialize=["M", "N", "steps"],
    do_not_specialize_on_alignment=[
        "offsets_ptr", "slopes_ptr", "stats_ptr", "loss_ptr", "coef_ptr"
    ],
)  # fmt: skip
def _bradley_terry_finish_kernel(
    offsets_ptr, slopes_ptr, stats_ptr, loss_ptr, coef_ptr, M, N, steps,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up the loss, each other finishes BLOCK coefficients."""
    pid = tl.program_id(0) - 1
    if pid < 0:
        if REDUCTION != "none":
            store_total(loss_ptr, stats_ptr, N, BLOCK)
    else:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        ok = i < M
        n = groups_of(offsets_ptr, i, ok, N, steps)
        scale = tl.load(stats_ptr + N + n, mask=ok, other=0.0)
        coef = tl.load(slopes_ptr + i, mask=ok, other=0.0) * scale
        tl.store(coef_ptr + i, coef.to(coef_ptr.dtype.element_ty), mask=ok)
