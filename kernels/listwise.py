"""Listwise softmax cross entropy fused with its head: one pass over hidden, one rank-1 write.

README.md beside this file has the algebra. Letters: N groups, M candidates, T rows of hidden,
D hidden size, G programs. A group is *inside* a program when all its rows are; otherwise its
pieces are the tail of one program, whole programs, and the head of a last one, where it closes.

Buffers between forward and backward (A is fp32, or fp64 for fp64 hidden):
  scores  (M,) A        raw scores w·h + b
  stats   (2|4, N) A    per group: max of z, log Σ exp(z - max); with soft labels or centring also
                        the label mass Q and the score sum
  pieces  (G, 11) A     per program: (max, Σ exp, label term, Q, score sum) of its head and of its
                        tail, and the loss of the groups inside it
  marks   (G, 6) int32  per program: group of the head, group of the tail, does the head close
                        here, groups counted, is the tail open, are the offsets broken
  partial (G, 3, D) A   per program: weight gradient so far, Σ e h of its head, Σ e h of its tail
"""

import triton
import triton.language as tl
from fastrm_kernels.rows import (
    candidate_rows,
    find_group,
    load_columns,
    load_index,
    load_tile,
    row_start,
    store_columns,
    store_outer,
)

PIECES = tl.constexpr(11)
MARKS = tl.constexpr(6)
CHUNK = tl.constexpr(128)  # pieces joined at a time, two a program


@triton.jit
def _candidate(
    i, g, ok, offsets_ptr, target_ptr, group_weight_ptr, label_smoothing,
    SOFT: tl.constexpr, HAS_GROUP_WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Group bounds, labels and weight of candidate i in group g.

    The weight is 0 for a group left out and NaN for one whose target or size is invalid.
    """
    first = load_index(offsets_ptr + g, ok, 0)
    last = load_index(offsets_ptr + g + 1, ok, 1)
    size = last - first
    if SOFT:
        q = tl.load(target_ptr + i, mask=ok, other=0.0).to(ACC)
        counted = ok
        valid = size > 0
    else:
        target = load_index(target_ptr + g, ok, 0)
        q = (i - first == target).to(ACC)
        counted = ok & (target != -100)
        valid = (size > 0) & ((target == -100) | ((target >= 0) & (target < size)))
    smooth = (1 - label_smoothing) * q + label_smoothing / tl.maximum(size, 1).to(ACC)
    if HAS_GROUP_WEIGHT:
        gw = tl.load(group_weight_ptr + g, mask=ok, other=0.0).to(ACC)
    else:
        gw = tl.full(g.shape, 1.0, ACC)
    gw = tl.where(counted, gw, 0.0)
    gw = tl.where(valid, gw, float("nan"))
    return first, last, size.to(ACC), q, smooth, gw, counted


@triton.jit
def _logit(s, q, i, ok, margin_ptr, temperature, HAS_MARGIN: tl.constexpr, ACC: tl.constexpr):
    """z = (s + margin where not a target) / temperature."""
    if HAS_MARGIN:
        margin = tl.load(margin_ptr + i, mask=ok, other=0.0).to(ACC)
        s += tl.where(q > 0, 0.0, margin)
    return s / temperature


@triton.jit
def _block_groups(offsets_ptr, i, n, N, BLOCK_M: tl.constexpr):
    """Group of each of BLOCK_M consecutive candidates, the first of which is in group n."""
    j = tl.arange(0, BLOCK_M)
    inside = n + 1 + j < N  # the end of the last group is not a boundary between groups
    bounds = load_index(offsets_ptr + n + 1 + j, inside, 0)
    passed = (bounds[None, :] <= i[:, None]) & inside[None, :]
    return n + tl.sum(passed.to(tl.int32), axis=1)


@triton.jit
def _at(x, here):
    """The value of x where `here` holds, in one place."""
    return tl.sum(tl.where(here, x, 0), axis=0)


@triton.jit
def _shift(m_from, m_to):
    """exp(m_from - m_to), 0 when there is nothing to carry (m_from = -inf)."""
    return tl.where(m_from == float("-inf"), 0.0, tl.exp(m_from - m_to))


@triton.jit
def _join_pieces(n0, m0, s0, k0, q0, r0, n1, m1, s1, k1, q1, r1):
    """Joins two neighbouring pieces (group, max, Σ exp, label term, Q, score sum)."""
    same = n0 == n1
    m = tl.where(same, tl.maximum(m0, m1), m1)
    a = tl.where(same, _shift(m0, m), 0.0)
    b = _shift(m1, m)
    k = _moved(k0, q0, m0, m)
    return (
        n1,
        m,
        a * s0 + b * s1,
        tl.where(same, k, 0.0) + _moved(k1, q1, m1, m),
        tl.where(same, q0, 0.0) + q1,
        tl.where(same, r0, 0.0) + r1,
    )


@triton.jit
def _moved(k, q, m_from, m_to):
    """Label term Σ q (z - m) moved from one maximum to another."""
    return tl.where(m_from == float("-inf"), k, k + q * (m_from - m_to))


@triton.jit
def _group_loss(gw, s, k, Q, r, size, center_coef, CENTER: tl.constexpr):
    """gw (Q log Σ exp(z - m) - Σ q (z - m) + c (2 mean)^2), and 0 for a group left out."""
    loss = Q * tl.log(s) - k
    if CENTER:
        mean = r / size
        loss += center_coef * 4 * mean * mean
    return tl.where(gw == 0, 0.0, gw * loss)


@triton.jit
def _listwise_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, offsets_ptr, target_ptr, rows_ptr, margin_ptr,
    group_weight_ptr, num_items_ptr,
    loss_ptr, scores_ptr, stats_ptr, divisor_ptr, pieces_ptr, marks_ptr, partial_ptr, inverse_ptr,
    arrived_ptr,
    M, N, T, S, per_program, G,
    stride_b, stride_s,
    temperature: tl.float64, label_smoothing: tl.float64, center_coef: tl.float64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_PROGRAM: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr, CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr, HAS_NUM_ITEMS: tl.constexpr, REDUCTION: tl.constexpr,
    DWEIGHT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    temperature = tl.full((), temperature, ACC)
    label_smoothing = tl.full((), label_smoothing, ACC)
    center_coef = tl.full((), center_coef, ACC)
    pid = tl.program_id(0)
    start = pid * per_program
    end = tl.minimum(start + per_program, M)

    w0 = load_columns(weight_ptr, 0, D0, D, ACC)
    if D1 > 0:
        w1 = load_columns(weight_ptr, D0, D1, D, ACC)
    bias = tl.zeros((), ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr).to(ACC)

    # n is the group of the next row; m, s, k, Q, r of its rows before that, in this program.
    n = find_group(offsets_ptr, start, N, 32)
    head_group = n
    m_open = tl.full((), float("-inf"), ACC)
    s_open = tl.zeros((), ACC)
    k_open = tl.zeros((), ACC)
    q_open = tl.zeros((), ACC)
    r_open = tl.zeros((), ACC)
    m_head = m_open
    s_head = s_open
    k_head = k_open
    q_head = q_open
    r_head = r_open
    n_last = n
    head_closes = tl.full((), 0, tl.int32)
    groups = tl.full((), 0, tl.int32)
    loss = tl.zeros((), ACC)
    if DWEIGHT:
        partial_ptr += pid.to(tl.int64) * 3 * D
        done0 = tl.zeros((D0,), ACC)
        open0 = tl.zeros((D0,), ACC)
        if D1 > 0:
            done1 = tl.zeros((D1,), ACC)
            open1 = tl.zeros((D1,), ACC)

    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        block_end = tl.minimum(block + BLOCK_M, end)
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s)
        h0 = load_tile(hidden_ptr, at, found, 0, D0, D, ACC)
        s = tl.sum(h0 * w0[None, :], axis=1)
        if D1 > 0:
            h1 = load_tile(hidden_ptr, at, found, D0, D1, D, ACC)
            s += tl.sum(h1 * w1[None, :], axis=1)
        s = tl.where(found, s + bias, float("nan"))
        tl.store(scores_ptr + i, s, mask=ok)
        if INVERSE:
            tl.store(inverse_ptr + t, i, mask=found)

        g = _block_groups(offsets_ptr, i, n, N, BLOCK_M)
        first, last, size, q, smooth, gw, counted = _candidate(
            i, g, ok, offsets_ptr, target_ptr, group_weight_ptr, label_smoothing,
            SOFT, HAS_GROUP_WEIGHT, ACC,
        )  # fmt: skip
        z = _logit(s, q, i, ok, margin_ptr, temperature, HAS_MARGIN, ACC)

        # Sums over each candidate's group: its rows in this block, and what is open before it.
        same = (g[:, None] == g[None, :]) & ok[None, :]
        was_open = g == n
        m = tl.max(tl.where(same, z[None, :], float("-inf")), axis=1)
        m = tl.where(was_open, tl.maximum(m, m_open), m)
        e = tl.where(z == float("-inf"), 0.0, tl.exp(z - m))
        s_all = tl.sum(tl.where(same, e[None, :], 0.0), axis=1)
        s_all += tl.where(was_open, s_open * _shift(m_open, m), 0.0)
        term = tl.where(smooth == 0, 0.0, smooth * (z - m))
        k = tl.sum(tl.where(same, term[None, :], 0.0), axis=1)
        k += tl.where(was_open, _moved(k_open, q_open, m_open, m), 0.0)
        Q = tl.sum(tl.where(same, smooth[None, :], 0.0), axis=1)
        Q += tl.where(was_open, q_open, 0.0)
        r = tl.sum(tl.where(same, s[None, :], 0.0), axis=1)
        r += tl.where(was_open, r_open, 0.0)

        closes = ok & (last <= block_end)
        inside = closes & (first >= start)
        ends = closes & (i == last - 1)
        finished = ends & inside
        groups += tl.sum((ends & counted).to(tl.int32), axis=0)
        group_loss = _group_loss(gw, s_all, k, Q, r, size, center_coef, CENTER)
        loss += tl.sum(tl.where(finished, group_loss, 0.0), axis=0)
        _store_stats(stats_ptr, g, N, m, s_all, Q, r, finished, SOFT or CENTER)
        if REDUCTION == "none":
            tl.store(loss_ptr + g, group_loss, mask=finished)

        is_first = i == block
        is_last = i == block_end - 1
        n_last = _at(g, is_last)
        stays = _at(closes.to(tl.int32), is_last) == 0  # the last row's group goes on
        ends_head = ends & (first < start)
        head_ends = tl.sum(ends_head.to(tl.int32), axis=0) > 0

        if DWEIGHT:
            # What is known goes to `done`; e of a group that goes on waits for its sum in `open`.
            into_done = tl.where(inside, Q * e / s_all, 0.0) - smooth
            into_done = tl.where(ok & (gw != 0), gw * into_done / temperature, 0.0)
            into_open = tl.where(ok & stays & (g == n_last), e, 0.0)
            moved = _shift(m_open, _at(m, is_first))
            carry = tl.where(stays & (n_last == n), moved, 0.0)
            gw_open = _at(gw, is_first & inside)
            finish = gw_open * _at(Q, is_first) / (_at(s_all, is_first) * temperature) * moved
            finish = tl.where(gw_open != 0, finish, 0.0)
            if head_ends:
                into_head = tl.where(was_open & ok, e, 0.0)
                head0 = moved * open0 + tl.sum(into_head[:, None] * h0, axis=0)
                store_columns(partial_ptr + D, head0, 0, D0, D)
                if D1 > 0:
                    head1 = moved * open1 + tl.sum(into_head[:, None] * h1, axis=0)
                    store_columns(partial_ptr + D, head1, D0, D1, D)
            done0 += finish * open0 + tl.sum(into_done[:, None] * h0, axis=0)
            open0 = carry * open0 + tl.sum(into_open[:, None] * h0, axis=0)
            if D1 > 0:
                done1 += finish * open1 + tl.sum(into_done[:, None] * h1, axis=0)
                open1 = carry * open1 + tl.sum(into_open[:, None] * h1, axis=0)

        if head_ends:
            head_closes = tl.full((), 1, tl.int32)
            m_head = _at(m, ends_head)
            s_head = _at(s_all, ends_head)
            k_head = _at(k, ends_head)
            q_head = _at(Q, ends_head)
            r_head = _at(r, ends_head)
        m_open = tl.where(stays, _at(m, is_last), float("-inf"))
        s_open = tl.where(stays, _at(s_all, is_last), 0.0)
        k_open = tl.where(stays, _at(k, is_last), 0.0)
        q_open = tl.where(stays, _at(Q, is_last), 0.0)
        r_open = tl.where(stays, _at(r, is_last), 0.0)
        n = tl.where(stays, n_last, tl.minimum(n_last + 1, N - 1))

    tail_open = (s_open != 0).to(tl.int32)
    if DWEIGHT:
        store_columns(partial_ptr, done0, 0, D0, D)
        if D1 > 0:
            store_columns(partial_ptr, done1, D0, D1, D)
        if tail_open:
            store_columns(partial_ptr + 2 * D, open0, 0, D0, D)
            if D1 > 0:
                store_columns(partial_ptr + 2 * D, open1, D0, D1, D)
    broken = _broken_offsets(offsets_ptr, pid, G, M, N)

    mark = marks_ptr + pid * MARKS
    tl.store(mark, head_group)
    tl.store(mark + 1, n_last)
    tl.store(mark + 2, head_closes)
    tl.store(mark + 3, groups)
    tl.store(mark + 4, tail_open)
    tl.store(mark + 5, broken)
    if ONE_PROGRAM:
        _finish(
            loss, groups, broken, loss_ptr, stats_ptr, divisor_ptr, num_items_ptr, N,
            HAS_NUM_ITEMS, REDUCTION, ACC,
        )  # fmt: skip
    else:
        piece = pieces_ptr + pid * PIECES
        tl.store(piece, m_head)
        tl.store(piece + 1, s_head)
        tl.store(piece + 2, k_head)
        tl.store(piece + 3, q_head)
        tl.store(piece + 4, r_head)
        tl.store(piece + 5, m_open)
        tl.store(piece + 6, s_open)
        tl.store(piece + 7, k_open)
        tl.store(piece + 8, q_open)
        tl.store(piece + 9, r_open)
        tl.store(piece + 10, loss)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == G - 1:
            tl.store(arrived_ptr, 0)  # ready for the next launch
            _combine_pieces(
                offsets_ptr, target_ptr, group_weight_ptr, num_items_ptr, loss_ptr, stats_ptr,
                divisor_ptr, pieces_ptr, marks_ptr, N, G, label_smoothing, center_coef,
                ACC, SOFT, CENTER, HAS_GROUP_WEIGHT, HAS_NUM_ITEMS, REDUCTION,
            )  # fmt: skip


@triton.jit
def _combine_pieces(
    offsets_ptr, target_ptr, group_weight_ptr, num_items_ptr, loss_ptr, stats_ptr, divisor_ptr,
    pieces_ptr, marks_ptr, N, G, label_smoothing, center_coef,
    ACC: tl.constexpr, SOFT: tl.constexpr, CENTER: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr, HAS_NUM_ITEMS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """The scalars of groups that lie in several programs, by the last program, in fixed order."""
    loss = tl.zeros((), ACC)
    groups = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    g0 = tl.full((), -1, tl.int32)  # what is joined before this chunk of the pieces
    m0 = tl.full((), float("-inf"), ACC)
    s0 = tl.zeros((), ACC)
    k0 = tl.zeros((), ACC)
    q0 = tl.zeros((), ACC)
    r0 = tl.zeros((), ACC)
    for lo in range(0, 2 * G, CHUNK):
        # The pieces in row order: head and tail of program 0, of program 1, ...
        x = lo + tl.arange(0, CHUNK)
        p = x // 2
        ok = p < G
        is_head = ok & (x % 2 == 0)
        mark = marks_ptr + p * MARKS
        piece = pieces_ptr + p * PIECES + (x % 2) * 5
        g = tl.load(mark + x % 2, mask=ok, other=-1, cache_modifier=".cg")
        m = tl.load(piece, mask=ok, other=float("-inf"), cache_modifier=".cg")
        s = tl.load(piece + 1, mask=ok, other=0.0, cache_modifier=".cg")
        k = tl.load(piece + 2, mask=ok, other=0.0, cache_modifier=".cg")
        Q = tl.load(piece + 3, mask=ok, other=0.0, cache_modifier=".cg")
        r = tl.load(piece + 4, mask=ok, other=0.0, cache_modifier=".cg")
        g, m, s, k, Q, r = tl.associative_scan((g, m, s, k, Q, r), 0, _join_pieces)
        g, m, s, k, Q, r = _join_pieces(g0, m0, s0, k0, q0, r0, g, m, s, k, Q, r)
        is_last = x == lo + CHUNK - 1
        g0 = _at(g, is_last)
        m0 = _at(m, is_last)
        s0 = _at(s, is_last)
        k0 = _at(k, is_last)
        q0 = _at(Q, is_last)
        r0 = _at(r, is_last)

        ends = is_head & (tl.load(mark + 2, mask=is_head, other=0, cache_modifier=".cg") == 1)
        first, last, size, q, smooth, gw, counted = _candidate(
            x * 0, g, ends, offsets_ptr, target_ptr, group_weight_ptr, label_smoothing,
            SOFT, HAS_GROUP_WEIGHT, ACC,
        )  # fmt: skip
        group_loss = _group_loss(gw, s, k, Q, r, size, center_coef, CENTER)
        _store_stats(stats_ptr, g, N, m, s, Q, r, ends, SOFT or CENTER)
        if REDUCTION == "none":
            tl.store(loss_ptr + g, group_loss, mask=ends)
        inside = pieces_ptr + p * PIECES + 10
        loss += tl.sum(tl.load(inside, mask=is_head, other=0.0, cache_modifier=".cg"), axis=0)
        loss += tl.sum(tl.where(ends, group_loss, 0.0), axis=0)
        counts = tl.load(mark + 3, mask=is_head, other=0, cache_modifier=".cg")
        groups += tl.sum(counts, axis=0)
        flags = tl.load(mark + 5, mask=is_head, other=0, cache_modifier=".cg")
        broken = tl.maximum(broken, tl.max(flags, axis=0))
    _finish(
        loss, groups, broken, loss_ptr, stats_ptr, divisor_ptr, num_items_ptr, N,
        HAS_NUM_ITEMS, REDUCTION, ACC,
    )  # fmt: skip


@triton.jit
def _store_stats(stats_ptr, g, N, m, s, Q, r, ok, FOUR: tl.constexpr):
    at = stats_ptr + g
    tl.store(at, m, mask=ok)
    tl.store(at + N, tl.log(s), mask=ok)
    if FOUR:
        tl.store(at + 2 * N, Q, mask=ok)
        tl.store(at + 3 * N, r, mask=ok)


@triton.jit
def _broken_offsets(offsets_ptr, pid, G, M, N):
    """1 if this program's share of offsets does not rise from 0 to M, else 0."""
    share = (N + G - 1) // G
    broken = (tl.load(offsets_ptr) != 0) | (tl.load(offsets_ptr + N) != M)
    broken = broken.to(tl.int32)
    for lo in range(pid * share, tl.minimum(pid * share + share, N), 256):
        n = lo + tl.arange(0, 256)
        ok = n < N
        a = tl.load(offsets_ptr + n, mask=ok, other=0)
        b = tl.load(offsets_ptr + n + 1, mask=ok, other=1)
        broken = tl.maximum(broken, tl.max((ok & (a >= b)).to(tl.int32), axis=0))
    return broken


@triton.jit
def _finish(
    loss, groups, broken, loss_ptr, stats_ptr, divisor_ptr, num_items_ptr, N,
    HAS_NUM_ITEMS: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the loss and its divisor; broken offsets turn everything into NaN."""
    nan = tl.full((), float("nan"), ACC)
    if HAS_NUM_ITEMS:
        divisor = tl.load(num_items_ptr).to(ACC)
    else:
        divisor = tl.maximum(groups, 1).to(ACC)
    if REDUCTION != "mean":
        divisor = tl.full((), 1.0, ACC)
    tl.store(divisor_ptr, tl.where(broken > 0, nan, divisor))
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.where(broken > 0, nan, loss / divisor))
    elif broken > 0:
        for lo in range(0, N, 256):
            n = lo + tl.arange(0, 256)
            tl.store(loss_ptr + n, nan, mask=n < N)


@triton.jit
def _listwise_bwd_kernel(
    grad_ptr, weight_ptr, offsets_ptr, target_ptr, rows_ptr, margin_ptr, group_weight_ptr,
    scores_ptr, stats_ptr, divisor_ptr, pieces_ptr, marks_ptr, partial_ptr, inverse_ptr,
    dhidden_ptr, dweight_ptr, coef_ptr,
    M, N, T, per_program, rows_per_program, programs, G,
    temperature: tl.float64, label_smoothing: tl.float64, center_coef: tl.float64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr,
    CENTER: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr, REDUCTION: tl.constexpr, DHIDDEN: tl.constexpr,
    COEF: tl.constexpr,
):  # fmt: skip
    temperature = tl.full((), temperature, ACC)
    label_smoothing = tl.full((), label_smoothing, ACC)
    center_coef = tl.full((), center_coef, ACC)
    pid = tl.program_id(0)
    scale = 1 / tl.load(divisor_ptr)
    if REDUCTION != "none":
        scale *= tl.load(grad_ptr).to(ACC)
    if pid < programs:
        if DHIDDEN:
            w0 = load_columns(weight_ptr, 0, D0, D, ACC)
            if D1 > 0:
                w1 = load_columns(weight_ptr, D0, D1, D, ACC)
        start = pid * per_program
        end = tl.minimum(start + per_program, M)
        n = find_group(offsets_ptr, tl.minimum(start, M - 1), N, 32)
        for block in range(start, end, BLOCK_M):
            i = block + tl.arange(0, BLOCK_M)
            ok = i < end
            g = _block_groups(offsets_ptr, i, n, N, BLOCK_M)
            n = tl.minimum(_at(g, i == tl.minimum(block + BLOCK_M, end) - 1), N - 1)
            first, last, size, q, smooth, gw, counted = _candidate(
                i, g, ok, offsets_ptr, target_ptr, group_weight_ptr, label_smoothing,
                SOFT, HAS_GROUP_WEIGHT, ACC,
            )  # fmt: skip
            s = tl.load(scores_ptr + i, mask=ok, other=0.0)
            z = _logit(s, q, i, ok, margin_ptr, temperature, HAS_MARGIN, ACC)
            stat = stats_ptr + g
            m = tl.load(stat, mask=ok, other=0.0)
            log_s = tl.load(stat + N, mask=ok, other=0.0)
            p = tl.where(z == float("-inf"), 0.0, tl.exp(z - m - log_s))
            if SOFT or CENTER:
                p *= tl.load(stat + 2 * N, mask=ok, other=0.0)
            coef = (p - smooth) / temperature
            if CENTER:
                r = tl.load(stat + 3 * N, mask=ok, other=0.0)
                coef += 8 * center_coef * r / (size * size)
            coef = tl.where(gw == 0, 0.0, gw * coef) * scale
            if REDUCTION == "none":
                coef *= tl.load(grad_ptr + g, mask=ok, other=0.0).to(ACC)
            if COEF:
                tl.store(coef_ptr + i, coef, mask=ok)
            if DHIDDEN:
                t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
                store_outer(dhidden_ptr, t * D, found, coef, w0, 0, D0, D)
                if D1 > 0:
                    store_outer(dhidden_ptr, t * D, found, coef, w1, D0, D1, D)
        if DHIDDEN and HAS_ROWS:
            # inverse[t] was never cleared: row t is a candidate's only if its entry says so too.
            start = pid * rows_per_program
            end = tl.minimum(start + rows_per_program, T)
            for block in range(start, end, BLOCK_M):
                t = block + tl.arange(0, BLOCK_M)
                ok = t < end
                i = tl.load(inverse_ptr + t, mask=ok, other=-1)
                known = ok & (i >= 0) & (i < M)
                taken = known & (tl.load(rows_ptr + i, mask=known, other=-1) == t)
                none = tl.zeros((BLOCK_M,), ACC)
                at = t.to(tl.int64) * D
                store_outer(dhidden_ptr, at, ok & ~taken, none, tl.zeros((D0,), ACC), 0, D0, D)
                if D1 > 0:
                    zeros = tl.zeros((D1,), ACC)
                    store_outer(dhidden_ptr, at, ok & ~taken, none, zeros, D0, D1, D)
    else:
        # dweight, BLOCK_C columns of it: what each program finished, and the pieces of groups
        # that lie in several, which only now have their maximum and sum.
        cols = (pid - programs) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_d = cols < D
        total = tl.zeros((BLOCK_C,), ACC)
        for lo in range(0, G, BLOCK_P):
            p = lo + tl.arange(0, BLOCK_P)
            ok = p < G
            at = partial_ptr + p.to(tl.int64)[:, None] * 3 * D + cols[None, :]
            total += tl.sum(tl.load(at, mask=ok[:, None] & in_d[None, :], other=0.0), axis=0)
            for slot in tl.static_range(2):
                mark = marks_ptr + p * MARKS
                has = ok & (tl.load(mark + 2 + 2 * slot, mask=ok, other=0) == 1)
                g = tl.load(mark + slot, mask=has, other=0)
                first, last, size, q, smooth, gw, counted = _candidate(
                    p * 0, g, has, offsets_ptr, target_ptr, group_weight_ptr, label_smoothing,
                    SOFT, HAS_GROUP_WEIGHT, ACC,
                )  # fmt: skip
                m = tl.load(pieces_ptr + p * PIECES + 5 * slot, mask=has, other=0.0)
                stat = stats_ptr + g
                m_all = tl.load(stat, mask=has, other=0.0)
                weigh = tl.exp(m - m_all - tl.load(stat + N, mask=has, other=0.0)) / temperature
                if SOFT or CENTER:
                    weigh *= tl.load(stat + 2 * N, mask=has, other=0.0)
                weigh = tl.where(has & (gw != 0), gw * weigh, 0.0)
                piece = tl.load(at + (slot + 1) * D, mask=has[:, None] & in_d[None, :], other=0.0)
                total += tl.sum(weigh[:, None] * piece, axis=0)
        out = (scale * total).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + cols, out, mask=in_d)
