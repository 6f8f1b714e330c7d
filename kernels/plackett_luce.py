"""Plackett-Luce loss: a log-sum-exp over each candidate and those below it, from sorted candidates.

README.md beside this file has the algebra. Letters: N groups, M candidates, G programs. Candidates
are sorted by group and, inside it, by rank; a *place* is a position in that order, and a *class*
the candidates of a group that share a rank. Each program takes an even share of the places, in
blocks; what crosses from one program to the next is found from what each knows of its own share.
"""

import triton
import triton.language as tl
from fastrm_kernels.groups import bounds, groups_of, load_rank, store_total

POINTERS = [
    "scores_ptr", "offsets_ptr", "ranks_ptr", "position_weight_ptr", "order_ptr", "after_ptr",
    "before_ptr", "terms_ptr", "below_ptr", "stats_ptr", "loss_ptr", "coef_ptr",
]  # fmt: skip
INTS = ["M", "N", "steps", "per_program", "G"]


@triton.jit
def _shift(m_from, m_to):
    """exp(m_from - m_to), 0 when there is nothing to carry (m_from = -inf)."""
    return tl.where(m_from == float("-inf"), 0.0, tl.exp(m_from - m_to))


@triton.jit
def _join(m0, s0, f0, m1, s1, f1):
    """Σ e^m s of two neighbouring runs as (max, scaled sum); f = 2: the second starts a group."""
    m = tl.where(f1 == 2, m1, tl.maximum(m0, m1))
    s = tl.where(f1 == 2, s1, _shift(m0, m) * s0 + _shift(m1, m) * s1)
    return m, s, tl.maximum(f0, f1)


@triton.jit
def _join_classes(m0, s0, f0, w0, m1, s1, f1, w1):
    """The same, and the weight of a class; f = 1: the second starts a class."""
    m, s, f = _join(m0, s0, f0, m1, s1, f1)
    return m, s, f, tl.where(f1 > 0, w1, w0 + w1)


@triton.jit
def _last(x, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0), axis=0)


@triton.jit
def _load_piece(ptr, ok):
    """(max, scaled sum, flag, weight) of a share, nothing where masked."""
    m = tl.load(ptr, mask=ok, other=float("-inf"))
    s = tl.load(ptr + 1, mask=ok, other=0.0)
    f = tl.load(ptr + 2, mask=ok, other=0.0).to(tl.int32)
    return m, s, f, tl.load(ptr + 3, mask=ok, other=0.0)


@triton.jit
def _store_piece(ptr, m, s, f, w):
    tl.store(ptr, m)
    tl.store(ptr + 1, s)
    tl.store(ptr + 2, f.to(tl.float64))
    tl.store(ptr + 3, w)


@triton.jit
def _candidates(
    scores_ptr, offsets_ptr, ranks_ptr, position_weight_ptr, order_ptr, p, ok, M, N, steps,
    temperature, HAS_POSITION_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Of the candidates at places p: logit, weight, rank, and the bounds of their groups."""
    i = tl.load(order_ptr + p, mask=ok, other=0)
    z = tl.load(scores_ptr + i, mask=ok, other=0.0).to(tl.float64) / temperature
    rank = tl.load(ranks_ptr + i, mask=ok, other=-1).to(tl.int64)
    w = tl.full(p.shape, 1.0, tl.float64)
    if HAS_POSITION_WEIGHT:
        w = tl.load(position_weight_ptr + i, mask=ok, other=0.0).to(tl.float64)
    w = tl.where(rank < 0, 0.0, w)
    first, last = bounds(offsets_ptr, groups_of(offsets_ptr, p, ok, N, steps), ok, M)
    return i, z, w, load_rank(ranks_ptr, i, ok), first, last


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=POINTERS)
def _plackett_luce_below_kernel(
    scores_ptr, offsets_ptr, ranks_ptr, position_weight_ptr, order_ptr,
    after_ptr, before_ptr, terms_ptr, below_ptr,
    M, N, steps, per_program, G, temperature: tl.float64,
    HAS_POSITION_WEIGHT: tl.constexpr, FINAL: tl.constexpr, ONE_PROGRAM: tl.constexpr,
    COEF: tl.constexpr, BLOCK: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """From the last place to the first: Σ e^z over a candidate and those after it in its group.

    First each program leaves what its share is to the programs before it (after). Then, FINAL, it
    knows what follows its share, and writes the terms of the loss; at the first place of each class
    -log Σ e^z and the class's weight (below); and what its share is to those after it (before).
    """
    temperature = tl.full((), temperature, tl.float64)
    pid = tl.program_id(0)
    start = pid * per_program
    end = start + tl.minimum(per_program, M - start)
    m = tl.full((), float("-inf"), tl.float64)
    s = tl.zeros((), tl.float64)
    f = tl.full((), 0, tl.int32)
    w = tl.zeros((), tl.float64)
    if FINAL and not ONE_PROGRAM:
        other = G - 1 - tl.arange(0, FAN)
        piece = _load_piece(after_ptr + 4 * other, other > pid)
        m_all, s_all, f_all, w_all = tl.associative_scan(piece, 0, _join_classes)
        m, s, w = _last(m_all, FAN), _last(s_all, FAN), _last(w_all, FAN)
    # Σ v e^u over the places of the group that goes on after this share.
    u_open = tl.full((), float("-inf"), tl.float64)
    v_open = tl.zeros((), tl.float64)
    closed = tl.full((), 0, tl.int32)

    for k in range(0, end - start, BLOCK):
        p = end - 1 - k - tl.arange(0, BLOCK)
        ok = p >= start
        i, z, w_p, rank, first, last = _candidates(
            scores_ptr, offsets_ptr, ranks_ptr, position_weight_ptr, order_ptr, p, ok, M, N, steps,
            temperature, HAS_POSITION_WEIGHT,
        )  # fmt: skip
        more = ok & (p + 1 < last) & (p + 1 < M)
        next_rank = load_rank(ranks_ptr, tl.load(order_ptr + p + 1, mask=more, other=0), more)
        f_p = tl.where(more, (rank != next_rank).to(tl.int32), 2)
        f_p = tl.where(ok, f_p, 0)
        m_p = tl.where(ok, z, float("-inf"))
        s_p = tl.where(ok & (z != float("-inf")), 1.0, 0.0).to(tl.float64)
        w_c = tl.where(ok, w_p, 0.0)
        m_b, s_b, f_b, w_b = tl.associative_scan((m_p, s_p, f_p, w_c), 0, _join_classes)
        m_b, s_b, f_b, w_b = _join_classes(m, s, f, w, m_b, s_b, f_b, w_b)
        m, s, f, w = _last(m_b, BLOCK), _last(s_b, BLOCK), _last(f_b, BLOCK), _last(w_b, BLOCK)
        if FINAL:
            same = ok & (p > first) & (p > 0)
            before = tl.load(order_ptr + p - 1, mask=same, other=0)
            starts = ok & (~same | (load_rank(ranks_ptr, before, same) != rank)) & (w_b != 0)
            below = m_b + tl.log(s_b)
            term = tl.where(starts, w_b * below, 0.0) - tl.where(w_p != 0, w_p * z, 0.0)
            tl.store(terms_ptr + p, term, mask=ok)
            if COEF:
                u = tl.where(starts, -below, float("-inf"))
                v = tl.where(starts, w_b, 0.0)
                tl.store(below_ptr + p, u, mask=ok)
                tl.store(below_ptr + M + p, v, mask=ok)
                # The last group that begins in this share, which the first block to see it closes.
                begins = tl.max(tl.where(ok & (p == first), p, start), axis=0)
                u = tl.where((p >= begins) & (closed == 0), u, float("-inf"))
                u_before = u_open
                u_open = tl.maximum(u_open, tl.max(u, axis=0))
                v_open = _shift(u_before, u_open) * v_open + tl.sum(_shift(u, u_open) * v, axis=0)
                closed = tl.maximum(closed, tl.max((ok & (p == first)).to(tl.int32), axis=0))
    if not FINAL:
        _store_piece(after_ptr + 4 * pid, m, s, f, w)
    elif COEF and not ONE_PROGRAM:
        _store_piece(before_ptr + 4 * pid, u_open, v_open, 2 * closed, w)


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=POINTERS)
def _plackett_luce_finish_kernel(
    scores_ptr, offsets_ptr, ranks_ptr, position_weight_ptr, order_ptr, before_ptr, below_ptr,
    stats_ptr, loss_ptr, coef_ptr,
    M, N, steps, per_program, G, temperature: tl.float64,
    HAS_POSITION_WEIGHT: tl.constexpr, ONE_PROGRAM: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """The first program adds up the loss; the others go from the first place of their share to the
    last, with Σ over the classes at and above a candidate of weight / Σ e^z."""
    temperature = tl.full((), temperature, tl.float64)
    pid = tl.program_id(0) - 1
    if pid < 0:
        if REDUCTION != "none":
            store_total(loss_ptr, stats_ptr, N, BLOCK)
    else:
        start = pid * per_program
        end = start + tl.minimum(per_program, M - start)
        m = tl.full((), float("-inf"), tl.float64)
        s = tl.zeros((), tl.float64)
        f = tl.full((), 0, tl.int32)
        if not ONE_PROGRAM:
            other = tl.arange(0, FAN)
            m_o, s_o, f_o, w_o = _load_piece(before_ptr + 4 * other, other < pid)
            m_all, s_all, f_all = tl.associative_scan((m_o, s_o, f_o), 0, _join)
            m, s = _last(m_all, FAN), _last(s_all, FAN)
        for block in range(start, end, BLOCK):
            p = block + tl.arange(0, BLOCK)
            ok = p < end
            i, z, w_p, rank, first, last = _candidates(
                scores_ptr, offsets_ptr, ranks_ptr, position_weight_ptr, order_ptr, p, ok, M, N,
                steps, temperature, HAS_POSITION_WEIGHT,
            )  # fmt: skip
            u = tl.load(below_ptr + p, mask=ok, other=float("-inf"))
            v = tl.load(below_ptr + M + p, mask=ok, other=0.0)
            f_p = tl.where(ok & (p == first), 2, 0)
            m_b, s_b, f_b = tl.associative_scan((u, v, f_p), 0, _join)
            m_b, s_b, f_b = _join(m, s, f, m_b, s_b, f_b)
            m, s, f = _last(m_b, BLOCK), _last(s_b, BLOCK), _last(f_b, BLOCK)
            slope = tl.where(m_b == float("-inf"), 0.0, tl.exp(z + m_b) * s_b) - w_p
            n = groups_of(offsets_ptr, i, ok, N, steps)
            scale = tl.load(stats_ptr + N + n, mask=ok, other=0.0)
            shift = tl.load(stats_ptr + 2 * tl.cast(N, tl.int64) + n, mask=ok, other=0.0)
            coef = slope / temperature * scale + shift
            tl.store(coef_ptr + i, coef.to(coef_ptr.dtype.element_ty), mask=ok)
