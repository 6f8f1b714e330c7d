"""Listwise softmax cross entropy fused with its head: one pass over hidden, one rank-1 write.

README.md beside this file has the algebra. Letters: N groups, M candidates, T rows of hidden,
D hidden size, G programs. A group is *inside* a program when all its rows are; otherwise its
pieces are the tail of one program, whole programs, and the head of a last one, where it closes.

Buffers between forward and backward (A is fp32, or fp64 for fp64 hidden), beside the scores:
  state: partial (G, 3, D) A  per program: what it knows of dweight, Σ e h of its head, of its tail
         divisor () A
         pieces (P, 11) A     per program: (max, Σ exp, label term, Q, score sum) of its head and of
                              its tail, and the loss of the groups inside it
         stats (2|4, N) A     per group: max of z, log Σ exp(z - max); with soft labels or centring
                              also the label mass Q and the score sum
         notes (G, 7 + 2 BLOCK_M) A  of forward alone, per program: what comes before the next rows
                              (max, Σ exp, label term, Q, score sum), what its open sum is added to
                              the done one with and kept with; per row its weight in a sum, and what
                              its label takes
  index: marks (P, 8) int32   per program: group of the head, group of the tail (of the next row),
                              does the head close here, groups counted, is the tail open, are the
                              offsets broken; rows of a head that ends, and all before an open group
         inverse (T,) int32   with `rows`: which candidate a row of hidden is
P is G and, where G > FAN, a place for each FAN programs joined. Without dweight partial is empty.
"""

import triton
import triton.language as tl
from fastrm_kernels.rows import (
    candidate_rows,
    dot_rows,
    find_group,
    load_columns,
    load_index,
    load_row,
    load_rows,
    row_start,
    store_columns,
    store_outer,
)

PIECES = tl.constexpr(11)
MARKS = tl.constexpr(8)
NOTES = tl.constexpr(7)
FAN = tl.constexpr(64)  # programs whose pieces are joined together; at most FAN * FAN programs


@triton.jit
def _bounds(offsets_ptr, n, ok):
    return load_index(offsets_ptr + n, ok, 0), load_index(offsets_ptr + n + 1, ok, 1)


@triton.jit
def _group(
    first, last, target_ptr, group_weight_ptr, n, ok,
    SOFT: tl.constexpr, HAS_GROUP_WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of group n with these bounds the best candidate, the weight, and whether it counts.

    The weight is 0 for a group left out and NaN for one whose target or size is invalid.
    """
    size = last - first
    best = first
    valid = size > 0
    counted = size >= size
    if not SOFT:
        target = load_index(target_ptr + n, ok, 0)
        counted = target != -100
        valid = valid & ((target < size) & (target >= 0) | ~counted)
        best = tl.where(counted, first + target, -1)
    gw = tl.full(size.shape, 1.0, ACC)
    if HAS_GROUP_WEIGHT:
        gw = tl.load(group_weight_ptr + n, mask=ok, other=0.0).to(ACC)
    gw = tl.where(counted, gw, 0.0)
    return best, tl.where(valid, gw, float("nan")), counted.to(tl.int32)


@triton.jit
def _smooth(q, size, label_smoothing, SMOOTH: tl.constexpr, ACC: tl.constexpr):
    label = q
    if SMOOTH:
        label = (1 - label_smoothing) * q + label_smoothing / tl.maximum(size, 1.0)
    return label


@triton.jit
def _nothing(ACC: tl.constexpr):
    """Max, Σ exp, label term, Q and score sum of no rows."""
    zero = tl.zeros((), ACC)
    return tl.full((), float("-inf"), ACC), zero, zero, zero, zero


@triton.jit
def _logit(s, q, i, ok, margin_ptr, per_temperature, HAS_MARGIN: tl.constexpr, ACC: tl.constexpr):
    """z = (s + margin where not a target) / temperature."""
    if HAS_MARGIN:
        margin = tl.load(margin_ptr + i, mask=ok, other=0.0).to(ACC)
        s += tl.where(q > 0, 0.0, margin)
    return s * per_temperature


@triton.jit
def _groups_of_rows(offsets_ptr, i, ok, n, N, ROWS: tl.constexpr):
    """Group and its bounds of each of ROWS consecutive candidates, the first of which is in n.

    As many groups further as bounds from n's last on are not beyond the row, found by bisection.
    """
    j = n + 1 + tl.arange(0, ROWS)
    bounds = load_index(offsets_ptr + j, j <= N, 2147483647)
    passed = tl.zeros((ROWS,), tl.int32)
    for step in tl.static_range(1, 16):
        if ROWS >> step > 0:
            beyond = tl.gather(bounds, passed + (ROWS >> step) - 1, 0) > i
            passed += tl.where(beyond, 0, ROWS >> step)
    g = tl.minimum(n + passed, N - 1)
    return g, load_index(offsets_ptr + g, ok, 0), tl.gather(bounds, passed, 0)


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
        tl.where(same, a * s0, 0.0) + b * s1,
        tl.where(same, k, 0.0) + _moved(k1, q1, m1, m),
        tl.where(same, q0, 0.0) + q1,
        tl.where(same, r0, 0.0) + r1,
    )


@triton.jit
def _moved(k, q, m_from, m_to):
    """Label term Σ q (z - m) moved from one maximum to another."""
    return tl.where(m_from == float("-inf"), k, k + q * (m_from - m_to))


@triton.jit
def _group_loss(
    gw, m, s, k, Q, r, size, center_coef, LABELS: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    """gw (Q log Σ exp(z - m) - Σ q (z - m) + c (2 mean)^2), and 0 for a group left out."""
    if LABELS:
        loss = Q * tl.log(s) - k
    else:
        loss = tl.log(s) - (k - m)
    if CENTER:
        mean = r / size
        loss += center_coef * 4 * mean * mean
    return tl.where(gw == 0, 0.0, gw * loss)


@triton.jit
def _places(state_ptr, index_ptr, G, D: tl.constexpr, PARTIAL: tl.constexpr):
    """Where partial, divisor, pieces, stats, marks and inverse begin."""
    divisor_ptr = state_ptr
    if PARTIAL:
        divisor_ptr += tl.cast(G, tl.int64) * 3 * D
    P = G + 2 * (G // FAN)
    pieces_ptr = divisor_ptr + 1
    return (
        state_ptr, divisor_ptr, pieces_ptr, pieces_ptr + P * PIECES, index_ptr,
        index_ptr + P * MARKS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["M", "N", "T", "S", "per_program", "G", "stride_b", "stride_s"],
    do_not_specialize_on_alignment=[
        "bias_ptr", "offsets_ptr", "target_ptr", "rows_ptr", "margin_ptr", "group_weight_ptr",
        "num_items_ptr", "loss_ptr", "scores_ptr", "index_ptr", "arrived_ptr",
    ],
)  # fmt: skip
def _listwise_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, offsets_ptr, target_ptr, rows_ptr, margin_ptr,
    group_weight_ptr, num_items_ptr,
    loss_ptr, scores_ptr, state_ptr, index_ptr, arrived_ptr,
    M, N, T, S, per_program, G,
    stride_b, stride_s,
    temperature: tl.float64, label_smoothing: tl.float64, center_coef: tl.float64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_PROGRAM: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr,
    CENTER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, BATCHED: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MARGIN: tl.constexpr, HAS_GROUP_WEIGHT: tl.constexpr,
    HAS_NUM_ITEMS: tl.constexpr, REDUCTION: tl.constexpr, DWEIGHT: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    LABELS: tl.constexpr = SOFT or SMOOTH  # else one label a group, of mass 1
    partial_ptr, divisor_ptr, pieces_ptr, stats_ptr, marks_ptr, inverse_ptr = _places(
        state_ptr, index_ptr, G, D, DWEIGHT
    )
    notes_ptr = stats_ptr + tl.cast(N, tl.int64) * (4 if SOFT or CENTER else 2)
    temperature = tl.full((), temperature, ACC)
    label_smoothing = tl.full((), label_smoothing, ACC)
    center_coef = tl.full((), center_coef, ACC)
    pid = tl.program_id(0)
    start = pid * per_program
    end = start + tl.minimum(per_program, M - start)
    bias = tl.zeros((), ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr).to(ACC)

    # n is the group of the next row; m, s, k, Q, r of its rows before that, in this program.
    n = find_group(offsets_ptr, start, N, 32)
    m, s, k, Q, r = _nothing(ACC)
    head = tl.where(load_index(offsets_ptr + n, start < end, 0) < start, n, -1)
    mark = marks_ptr + pid * MARKS
    piece = pieces_ptr + pid * PIECES
    notes_ptr += pid * (NOTES + 2 * BLOCK_M)
    tl.store(mark, n)
    tl.store(mark + 2, 0)
    if not ONE_PROGRAM:
        _store_piece(piece, m, s, k, Q, r, True, LABELS, CENTER)
    per_temperature = 1 / temperature
    groups = tl.zeros((BLOCK_M,), tl.int32)
    loss = tl.zeros((BLOCK_M,), ACC)
    if DWEIGHT:
        partial_ptr += pid.to(tl.int64) * 3 * D
        done0 = tl.zeros((D0,), ACC)
        open0 = tl.zeros((D0,), ACC)
        if D1 > 0:
            done1 = tl.zeros((D1,), ACC)
            open1 = tl.zeros((D1,), ACC)

    for block in range(start, end, BLOCK_M):
        stop = block + tl.minimum(BLOCK_M, end - block)
        i = block + tl.arange(0, BLOCK_M)
        ok = i < stop
        t, found = candidate_rows(rows_ptr, tl.minimum(i, stop - 1), True, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)
        h = load_rows(hidden_ptr, at, 0, D0, D)  # on their way while groups are looked up
        g, first, last = _groups_of_rows(offsets_ptr, i, ok, n, N, BLOCK_M)
        best, gw, counted = _group(
            first, last, target_ptr, group_weight_ptr, g, ok, SOFT, HAS_GROUP_WEIGHT, ACC
        )
        scores = dot_rows(h, weight_ptr, 0, D0, D, ACC)
        if D1 > 0:
            h1 = load_rows(hidden_ptr, at, D0, D1, D)
            scores += dot_rows(h1, weight_ptr, D0, D1, D, ACC)
        tl.store(scores_ptr + i, tl.where(found, scores + bias, float("nan")), mask=ok)
        if INVERSE:
            tl.store(inverse_ptr + t, i, mask=ok & found)

        # By way of memory: each thread has all scores and would weigh all rows; a lane, one row.
        tl.debug_barrier()
        m_i, s_i, k_i, Q_i, r_i = _weigh_rows(
            block, stop, start, m, s, k, Q, r, g, first, last, best, gw, target_ptr, margin_ptr,
            scores_ptr, mark, notes_ptr, N, per_temperature, label_smoothing,
            BLOCK_M, ACC, SOFT, SMOOTH, CENTER, HAS_MARGIN, DWEIGHT,
        )  # fmt: skip
        tl.debug_barrier()
        closes = ok & (i == last - 1)
        inside = closes & (first >= start)
        mass = tl.full((BLOCK_M,), 1.0, ACC)
        if LABELS:
            mass = Q_i
        size = (last - first).to(ACC)
        lost = _group_loss(gw, m_i, s_i, k_i, mass, r_i, size, center_coef, LABELS, CENTER)
        loss += tl.where(inside, lost, 0.0)
        groups += tl.where(closes, counted, 0)
        _store_stats(stats_ptr, g, N, m_i, s_i, mass, r_i, inside, SOFT, CENTER)
        if REDUCTION == "none":
            tl.store(loss_ptr + g, lost, mask=inside)
        if n == head:
            closes = closes & (first < start)
            here = tl.zeros((BLOCK_M,), tl.int32)
            tl.store(mark + 2 + here, 1, mask=closes)
            _store_piece(piece + here, m_i, s_i, k_i, Q_i, r_i, closes, LABELS, CENTER)
        n = tl.load(mark + 1)
        m, s, k = tl.load(notes_ptr), tl.load(notes_ptr + 1), tl.load(notes_ptr + 2)
        if LABELS:
            Q = tl.load(notes_ptr + 3)
        if CENTER:
            r = tl.load(notes_ptr + 4)

        if DWEIGHT:
            finish, keep = tl.load(notes_ptr + 5), tl.load(notes_ptr + 6)
            done0 += finish * open0
            open0 *= keep
            if D1 > 0:
                done1 += finish * open1
                open1 *= keep
            # Rows, from the L1 cache: of a head that ends, of groups that are done, of one that
            # goes on.
            begin = block
            until = block + tl.load(mark + 6)
            for part in tl.static_range(3):
                for row in range(begin, until):
                    weight = tl.load(notes_ptr + NOTES + row - block)
                    if weight != 0:
                        u, exists = candidate_rows(rows_ptr, row, True, T, HAS_ROWS)
                        u_ptr = hidden_ptr + row_start(u, S, stride_b, stride_s, BATCHED, ALIGN)
                        g0 = load_row(u_ptr, 0, D0, D, ACC)
                        if D1 > 0:
                            g1 = load_row(u_ptr, D0, D1, D, ACC)
                        if part == 1:
                            done0 += weight * g0
                            if D1 > 0:
                                done1 += weight * g1
                        else:
                            open0 += weight * g0
                            if D1 > 0:
                                open1 += weight * g1
                if part != 1:  # what the labels take is known
                    for row in range(begin, until):
                        take = tl.load(notes_ptr + NOTES + BLOCK_M + row - block)
                        if take != 0:
                            u, exists = candidate_rows(rows_ptr, row, True, T, HAS_ROWS)
                            u_ptr = hidden_ptr + row_start(u, S, stride_b, stride_s, BATCHED, ALIGN)
                            done0 -= take * load_row(u_ptr, 0, D0, D, ACC)
                            if D1 > 0:
                                done1 -= take * load_row(u_ptr, D0, D1, D, ACC)
                if part == 0:
                    if until > begin:
                        store_columns(partial_ptr + D, open0, 0, D0, D)
                        open0 = tl.zeros((D0,), ACC)
                        if D1 > 0:
                            store_columns(partial_ptr + D, open1, D0, D1, D)
                            open1 = tl.zeros((D1,), ACC)
                begin = until
                until = tl.where(part == 0, block + tl.load(mark + 7), stop)

    loss, groups = tl.sum(loss, axis=0), tl.sum(groups, axis=0)
    tail_open = (s != 0).to(tl.int32)
    if DWEIGHT:
        store_columns(partial_ptr, done0, 0, D0, D)
        if D1 > 0:
            store_columns(partial_ptr, done1, D0, D1, D)
        if tail_open:
            store_columns(partial_ptr + 2 * D, open0, 0, D0, D)
            if D1 > 0:
                store_columns(partial_ptr + 2 * D, open1, D0, D1, D)
    broken = _broken_offsets(offsets_ptr, pid, G, M, N)

    tl.store(mark + 3, groups)
    tl.store(mark + 4, tail_open)
    tl.store(mark + 5, broken)
    if ONE_PROGRAM:
        _finish(
            loss, groups, broken, loss_ptr, stats_ptr, divisor_ptr, num_items_ptr, N,
            HAS_NUM_ITEMS, REDUCTION, ACC,
        )  # fmt: skip
    else:
        _store_piece(piece + 5, m, s, k, Q, r, True, LABELS, CENTER)
        tl.store(piece + 10, loss)
        # The last of FAN neighbours joins their pieces into one, then the last of those joins all.
        levels = tl.where(G > FAN, 2, 1)
        cluster = pid // FAN
        lo = cluster * FAN
        count = tl.minimum(G - lo, FAN)
        counter = arrived_ptr + 1 + cluster
        last_here = pid >= 0
        for level in range(levels):
            if last_here:
                tl.debug_barrier()
                last_here = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
            if last_here:
                tl.store(counter, 0)  # ready for the next launch
                loss, groups, broken = _join_neighbours(
                    offsets_ptr, target_ptr, group_weight_ptr, loss_ptr, stats_ptr,
                    pieces_ptr, marks_ptr, N, lo, count, tl.where(level == 0, lo * per_program, 0),
                    G + cluster, level + 1 < levels, center_coef,
                    ACC, SOFT, LABELS, CENTER, HAS_GROUP_WEIGHT, REDUCTION,
                )  # fmt: skip
            lo = G
            count = (G + FAN - 1) // FAN
            counter = arrived_ptr
        if last_here:
            _finish(
                loss, groups, broken, loss_ptr, stats_ptr, divisor_ptr, num_items_ptr, N,
                HAS_NUM_ITEMS, REDUCTION, ACC,
            )  # fmt: skip


@triton.jit
def _weigh_rows(
    block, stop, start, m, s, k, Q, r, g, first, last, best, gw, target_ptr, margin_ptr,
    scores_ptr, mark, notes_ptr, N, per_temperature, label_smoothing,
    ROWS: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr,
    CENTER: tl.constexpr, HAS_MARGIN: tl.constexpr, DWEIGHT: tl.constexpr,
):  # fmt: skip
    """The softmax of rows `block` to `stop`, one a lane.

    Notes what comes before the next rows and what is added of each row to which sum. Returns max,
    Σ exp, label term, Q and score sum of each row and those of its group before it, relative to the
    maximum that the group has after these rows.
    """
    LABELS: tl.constexpr = SOFT or SMOOTH
    lane = tl.arange(0, ROWS)
    i = block + lane
    ok = i < stop
    is_first, is_last = lane == 0, i == stop - 1
    if SOFT:
        q = tl.load(target_ptr + i, mask=ok, other=0.0).to(ACC)
    else:
        q = (i == best).to(ACC)
    score = tl.load(scores_ptr + i, mask=ok, other=0.0)
    z = _logit(score, q, i, ok, margin_ptr, per_temperature, HAS_MARGIN, ACC)
    exists = z != float("-inf")
    label = _smooth(q, (last - first).to(ACC), label_smoothing, SMOOTH, ACC)

    last_lane = tl.minimum(tl.maximum(tl.minimum(last, stop) - 1 - block, 0), ROWS - 1)
    m_i = tl.where(is_first, tl.maximum(z, m), z)
    _, m_i = tl.associative_scan((g, m_i), 0, _max_of_group)
    m_i = tl.gather(m_i, last_lane, 0)
    shift = _shift(m, m_i)
    e = tl.where(exists, tl.exp(z - m_i), 0.0)
    s_i = tl.where(is_first, s * shift + e, e)
    Q_i = tl.zeros((ROWS,), ACC)
    r_i = tl.zeros((ROWS,), ACC)
    if LABELS:
        k_i = tl.where(exists, label * (z - m_i), float("-inf"))
        k_i = tl.where(label == 0, 0.0, k_i)
        k_i += tl.where(is_first, _moved(k, Q, m, m_i), 0.0)
        Q_i = tl.where(is_first, label + Q, label)
    else:
        k_i = tl.where(q > 0, z, 0.0) + tl.where(is_first, k, 0.0)
    if CENTER:
        r_i = tl.where(is_first, score + r, score)
    _, s_i, k_i, Q_i, r_i = tl.associative_scan((g, s_i, k_i, Q_i, r_i), 0, _sums_of_group)

    closes = ok & (i == last - 1)
    here = lane * 0
    _store_piece(
        notes_ptr + here, tl.where(closes, float("-inf"), m_i), tl.where(closes, 0.0, s_i),
        tl.where(closes, 0.0, k_i), tl.where(closes, 0.0, Q_i), tl.where(closes, 0.0, r_i),
        is_last, LABELS, CENTER,
    )  # fmt: skip
    tl.store(mark + 1 + here, tl.minimum(g + closes.to(tl.int32), N - 1), mask=is_last)
    if DWEIGHT:
        is_head = first < start
        ends = last <= stop
        final = ends & ~is_head
        counts = ok & (gw != 0)
        finish = gw * per_temperature / tl.gather(s_i, last_lane, 0)
        if LABELS:
            finish *= tl.gather(Q_i, last_lane, 0)
        take = tl.where(label != 0, gw * label * per_temperature, 0.0)
        weight = tl.where(counts, tl.where(final, finish * e - take, e), 0.0)  # NaN or not
        take = tl.where(counts, take, 0.0)
        tl.store(notes_ptr + NOTES + lane, weight)
        tl.store(notes_ptr + NOTES + ROWS + lane, take)
        # What the first row's group has so far is done, or moves to its new maximum.
        joins = tl.where(counts & final, finish * shift, 0.0)
        stays = tl.where(counts & ~final, shift, 0.0)
        tl.store(notes_ptr + 5 + here, joins, mask=is_first)
        tl.store(notes_ptr + 6 + here, stays, mask=is_first)
        # Rows of a head that ends here, and rows before the group that goes on.
        head_rows = tl.where(ends & is_head, tl.maximum(last - block, 0), 0)
        tl.store(mark + 6 + here, head_rows, mask=is_first)
        going_on = tl.minimum(tl.maximum(first, block), stop)
        tl.store(mark + 7 + here, tl.where(ends, stop, going_on) - block, mask=is_last)
    return m_i, s_i, k_i, Q_i, r_i


@triton.jit
def _max_of_group(n0, m0, n1, m1):
    return n1, tl.where(n0 == n1, tl.maximum(m0, m1), m1)


@triton.jit
def _sums_of_group(n0, s0, k0, q0, r0, n1, s1, k1, q1, r1):
    same = n0 == n1
    return (
        n1, tl.where(same, s0, 0.0) + s1, tl.where(same, k0, 0.0) + k1,
        tl.where(same, q0, 0.0) + q1, tl.where(same, r0, 0.0) + r1,
    )  # fmt: skip


@triton.jit
def _store_piece(ptr, m, s, k, Q, r, ok, LABELS: tl.constexpr, CENTER: tl.constexpr):
    tl.store(ptr, m, mask=ok)
    tl.store(ptr + 1, s, mask=ok)
    tl.store(ptr + 2, k, mask=ok)
    if LABELS:
        tl.store(ptr + 3, Q, mask=ok)
    if CENTER:
        tl.store(ptr + 4, r, mask=ok)


@triton.jit
def _join_neighbours(
    offsets_ptr, target_ptr, group_weight_ptr, loss_ptr, stats_ptr, pieces_ptr, marks_ptr,
    N, lo, count, first_row, out, keep, center_coef,
    ACC: tl.constexpr, SOFT: tl.constexpr, LABELS: tl.constexpr, CENTER: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Joins the pieces lo to lo + count in row order; with keep, leaves one for all of them in out.

    Groups that begin at first_row or later and end here are finished. Also returns loss, groups
    counted, and whether offsets are broken, of all of them.
    """
    x = tl.arange(0, 2 * FAN)  # head and tail of the first, of the second, ...
    p = lo + x // 2
    ok = x // 2 < count
    is_head = ok & (x % 2 == 0)
    mark = marks_ptr + p * MARKS
    piece = pieces_ptr + p * PIECES + (x % 2) * 5
    g = tl.load(mark + x % 2, mask=ok, other=-1, cache_modifier=".cg")
    m = tl.load(piece, mask=ok, other=float("-inf"), cache_modifier=".cg")
    s = tl.load(piece + 1, mask=ok, other=0.0, cache_modifier=".cg")
    k = tl.load(piece + 2, mask=ok, other=0.0, cache_modifier=".cg")
    Q = tl.zeros((2 * FAN,), ACC)
    r = tl.zeros((2 * FAN,), ACC)
    if LABELS:
        Q = tl.load(piece + 3, mask=ok, other=0.0, cache_modifier=".cg")
    if CENTER:
        r = tl.load(piece + 4, mask=ok, other=0.0, cache_modifier=".cg")
    closes = is_head & (tl.load(mark + 2, mask=is_head, other=0, cache_modifier=".cg") == 1)
    inside = pieces_ptr + p * PIECES + 10
    loss = tl.sum(tl.load(inside, mask=is_head, other=0.0, cache_modifier=".cg"), axis=0)
    groups = tl.sum(tl.load(mark + 3, mask=is_head, other=0, cache_modifier=".cg"), axis=0)
    broken = tl.max(tl.load(mark + 5, mask=is_head, other=0, cache_modifier=".cg"), axis=0)
    g, m, s, k, Q, r = tl.associative_scan((g, m, s, k, Q, r), 0, _join_pieces)

    first, last = _bounds(offsets_ptr, g, closes)
    best, gw, counted = _group(
        first, last, target_ptr, group_weight_ptr, g, closes, SOFT, HAS_GROUP_WEIGHT, ACC
    )
    finished = closes & (first >= first_row)
    if LABELS:
        mass = Q
    else:
        mass = tl.full((2 * FAN,), 1.0, ACC)
    size = (last - first).to(ACC)
    lost = _group_loss(gw, m, s, k, mass, r, size, center_coef, LABELS, CENTER)
    _store_stats(stats_ptr, g, N, m, s, mass, r, finished, SOFT, CENTER)
    if REDUCTION == "none":
        tl.store(loss_ptr + g, lost, mask=finished)
    loss += tl.sum(tl.where(finished, lost, 0.0), axis=0)

    if keep:
        head = closes & (first < first_row)
        tail = x == 2 * count - 1
        to_mark = marks_ptr + out * MARKS
        to_piece = pieces_ptr + out * PIECES
        tl.store(to_mark, _at(g, x == 0))
        tl.store(to_mark + 1, _at(g, tail))
        tl.store(to_mark + 2, tl.sum(head.to(tl.int32), axis=0))
        tl.store(to_mark + 3, groups)
        tl.store(to_mark + 5, broken)
        m_head = tl.max(tl.where(head, m, float("-inf")), axis=0)
        _store_piece(
            to_piece, m_head, _at(s, head), _at(k, head), _at(Q, head), _at(r, head), keep,
            LABELS, CENTER,
        )  # fmt: skip
        _store_piece(
            to_piece + 5, _at(m, tail), _at(s, tail), _at(k, tail), _at(Q, tail), _at(r, tail),
            keep, LABELS, CENTER,
        )  # fmt: skip
        tl.store(to_piece + 10, loss)
    return loss, groups, broken


@triton.jit
def _store_stats(
    stats_ptr, g, N, m, s, Q, r, ok, SOFT: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    at = stats_ptr + g
    tl.store(at, m, mask=ok)
    tl.store(at + N, tl.log(s), mask=ok)
    if SOFT:
        tl.store(at + tl.cast(N, tl.int64) * 2, Q, mask=ok)
    if CENTER:
        tl.store(at + tl.cast(N, tl.int64) * 3, r, mask=ok)


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


@triton.jit(
    do_not_specialize=["M", "N", "T", "per_program", "rows_per_program", "slices", "G"],
    do_not_specialize_on_alignment=[
        "grad_ptr", "offsets_ptr", "target_ptr", "rows_ptr", "margin_ptr", "group_weight_ptr",
        "scores_ptr", "state_ptr", "index_ptr", "sums_ptr", "arrived_ptr", "dweight_ptr",
        "dbias_ptr", "coef_ptr",
    ],
)  # fmt: skip
def _listwise_bwd_kernel(
    grad_ptr, weight_ptr, offsets_ptr, target_ptr, rows_ptr, margin_ptr, group_weight_ptr,
    scores_ptr, state_ptr, index_ptr, sums_ptr, arrived_ptr,
    dhidden_ptr, dweight_ptr, dbias_ptr, coef_ptr,
    M, N, T, per_program, rows_per_program, slices, G,
    temperature: tl.float64, label_smoothing: tl.float64, center_coef: tl.float64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr,
    SMOOTH: tl.constexpr, CENTER: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_MARGIN: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr, REDUCTION: tl.constexpr, DHIDDEN: tl.constexpr,
    PARTIAL: tl.constexpr, SLICED: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    temperature = tl.full((), temperature, ACC)
    label_smoothing = tl.full((), label_smoothing, ACC)
    center_coef = tl.full((), center_coef, ACC)
    COLUMNS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    partial_ptr, divisor_ptr, pieces_ptr, stats_ptr, marks_ptr, inverse_ptr = _places(
        state_ptr, index_ptr, G, D, PARTIAL
    )
    scale = 1 / tl.load(divisor_ptr)
    if REDUCTION != "none":
        scale *= tl.load(grad_ptr).to(ACC)
    if ZERO:
        if tl.program_id(0) == 0:
            tl.store(dbias_ptr, 0.0)
    pid = tl.program_id(0) - slices * COLUMNS  # those that add up dweight come first: they wait
    if pid < 0:
        column = tl.program_id(0) % COLUMNS
        _sum_partials(
            column, tl.program_id(0) // COLUMNS, scale, offsets_ptr, target_ptr, group_weight_ptr,
            stats_ptr, pieces_ptr, marks_ptr, partial_ptr, sums_ptr, arrived_ptr, dweight_ptr,
            N, slices, G, temperature, D, BLOCK_C, BLOCK_P, ACC, SOFT, HAS_GROUP_WEIGHT, SLICED,
        )  # fmt: skip
    else:
        if DHIDDEN:
            w0 = load_columns(weight_ptr, 0, D0, D, ACC)
            if D1 > 0:
                w1 = load_columns(weight_ptr, D0, D1, D, ACC)
        start = pid * per_program
        end = start + tl.minimum(per_program, M - start)
        n = find_group(offsets_ptr, tl.minimum(start, M - 1), N, 32)
        for block in range(start, end, ROWS):
            stop = block + tl.minimum(ROWS, end - block)
            i = block + tl.arange(0, ROWS)
            ok = i < stop
            g, first, last = _groups_of_rows(offsets_ptr, i, ok, n, N, ROWS)
            n = tl.max(tl.where(ok, tl.minimum(g + (last <= stop).to(tl.int32), N - 1), 0), axis=0)
            best, gw, counted = _group(
                first, last, target_ptr, group_weight_ptr, g, ok, SOFT, HAS_GROUP_WEIGHT, ACC
            )
            size = (last - first).to(ACC)
            if SOFT:
                q = tl.load(target_ptr + i, mask=ok, other=0.0).to(ACC)
            else:
                q = (i == best).to(ACC)
            s = tl.load(scores_ptr + i, mask=ok, other=0.0)
            z = _logit(s, q, i, ok, margin_ptr, 1 / temperature, HAS_MARGIN, ACC)
            stat = stats_ptr + g
            m = tl.load(stat, mask=ok, other=0.0)
            log_s = tl.load(stat + N, mask=ok, other=0.0)
            # NaN, as the loss is, in a group whose scores are all -inf.
            masked = (z == float("-inf")) & (m != float("-inf"))
            p = tl.where(masked, 0.0, tl.exp(z - m - log_s))
            if SOFT:
                p *= tl.load(stat + tl.cast(N, tl.int64) * 2, mask=ok, other=0.0)
            coef = (p - _smooth(q, size, label_smoothing, SMOOTH, ACC)) / temperature
            if CENTER:
                r = tl.load(stat + tl.cast(N, tl.int64) * 3, mask=ok, other=0.0)
                coef += 8 * center_coef * r / (size * size)
            coef = tl.where(gw == 0, 0.0, gw * coef) * scale
            if REDUCTION == "none":
                coef *= tl.load(grad_ptr + g, mask=ok, other=0.0).to(ACC)
            if coef_ptr is not None:
                tl.store(coef_ptr + i, coef, mask=ok)
            if DHIDDEN:
                tl.debug_barrier()  # a lane has one coefficient, and every thread writes all rows
                for some in range(block, stop, BLOCK_M):
                    j = some + tl.arange(0, BLOCK_M)
                    c = tl.load(coef_ptr + j, mask=j < stop, other=0.0)
                    t, found = candidate_rows(rows_ptr, j, j < stop, T, HAS_ROWS)
                    store_outer(dhidden_ptr, t, found, c, w0, 0, D0, D)
                    if D1 > 0:
                        store_outer(dhidden_ptr, t, found, c, w1, D0, D1, D)
        if DHIDDEN and HAS_ROWS:
            # inverse[t] was never cleared: row t is a candidate's only if its entry says so too.
            start = pid * rows_per_program
            end = start + tl.minimum(rows_per_program, T - start)
            for block in range(start, end, BLOCK_M):
                t = block + tl.arange(0, BLOCK_M)
                ok = t < end
                i = tl.load(inverse_ptr + t, mask=ok, other=-1)
                known = ok & (i >= 0) & (i < M)
                taken = known & (tl.load(rows_ptr + i, mask=known, other=-1) == t)
                none = tl.zeros((BLOCK_M,), ACC)
                store_outer(dhidden_ptr, t, ok & ~taken, none, tl.zeros((D0,), ACC), 0, D0, D)
                if D1 > 0:
                    zeros = tl.zeros((D1,), ACC)
                    store_outer(dhidden_ptr, t, ok & ~taken, none, zeros, D0, D1, D)


@triton.jit
def _sum_partials(
    column, part, scale, offsets_ptr, target_ptr, group_weight_ptr, stats_ptr, pieces_ptr,
    marks_ptr, partial_ptr, sums_ptr, arrived_ptr, dweight_ptr, N, slices, G, temperature,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
    SOFT: tl.constexpr, HAS_GROUP_WEIGHT: tl.constexpr, SLICED: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of dweight from one part of the programs; the last part adds up all.

    What each program finished, and the pieces of groups that lie in several, which only now have
    their maximum and sum.
    """
    cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
    in_d = cols < D
    total = tl.zeros((BLOCK_C,), ACC)
    share = (G + slices - 1) // slices
    end = tl.minimum(part * share + share, G)
    for lo in range(part * share, end, BLOCK_P):
        p = lo + tl.arange(0, BLOCK_P)
        ok = p < end
        at = partial_ptr + p.to(tl.int64)[:, None] * 3 * D + cols[None, :]
        total += tl.sum(tl.load(at, mask=ok[:, None] & in_d[None, :], other=0.0), axis=0)
        for slot in range(2):
            mark = marks_ptr + p * MARKS
            has = ok & (tl.load(mark + 2 + 2 * slot, mask=ok, other=0) == 1)
            g = tl.load(mark + slot, mask=has, other=0)
            first, last = _bounds(offsets_ptr, g, has)
            best, gw, counted = _group(
                first, last, target_ptr, group_weight_ptr, g, has, SOFT, HAS_GROUP_WEIGHT, ACC
            )
            m = tl.load(pieces_ptr + p * PIECES + 5 * slot, mask=has, other=0.0)
            stat = stats_ptr + g
            m_all = tl.load(stat, mask=has, other=0.0)
            weigh = tl.exp(m - m_all - tl.load(stat + N, mask=has, other=0.0)) / temperature
            if SOFT:
                weigh *= tl.load(stat + tl.cast(N, tl.int64) * 2, mask=has, other=0.0)
            has = has & (gw != 0)
            weigh = tl.where(has, gw * weigh, 0.0)
            piece = tl.load(at + (slot + 1) * D, mask=has[:, None] & in_d[None, :], other=0.0)
            total += tl.sum(weigh[:, None] * piece, axis=0)
    is_last = part >= 0
    if SLICED:
        tl.store(sums_ptr + part * D + cols, total, mask=in_d)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + column, 1, sem="acq_rel") == slices - 1
        if is_last:
            tl.store(arrived_ptr + column, 0)  # ready for the next launch
            total = tl.zeros((BLOCK_C,), ACC)
            for lo in range(0, slices, BLOCK_P):
                j = lo + tl.arange(0, BLOCK_P)
                at = sums_ptr + j[:, None] * D + cols[None, :]
                mask = (j < slices)[:, None] & in_d[None, :]
                total += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    if is_last:
        out = (scale * total).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + cols, out, mask=in_d)
