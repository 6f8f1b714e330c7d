"""Scores of chosen rows, and the two halves of any head's backward: rank-1 write, weighted sum.

The kernels named `heads` do the same for E heads, and read hidden once for all of them; those named
`dot` do so for hidden states in bf16, on tensor cores.
Letters: T rows of hidden, M candidates, D hidden size, E heads, G programs.
"""

import triton
import triton.language as tl
from fastrm_kernels.rows import (
    DOT,
    candidate_rows,
    dot_rows,
    load_columns,
    load_index,
    load_rows,
    load_tile,
    row_start,
    store_columns,
    store_outer,
)

INTS = ["M", "T", "S", "per_program", "stride_b", "stride_s"]  # no reason to compile again


@triton.jit(
    do_not_specialize=INTS, do_not_specialize_on_alignment=["bias_ptr", "rows_ptr", "scores_ptr"]
)
def _score_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, rows_ptr, scores_ptr,
    M, T, S, per_program, stride_b, stride_s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, BATCHED: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    bias = tl.zeros((), ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr).to(ACC)
    start = tl.program_id(0) * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, tl.minimum(i, end - 1), True, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)
        s = dot_rows(load_rows(hidden_ptr, at, 0, D0, D), weight_ptr, 0, D0, D, ACC)
        if D1 > 0:
            s += dot_rows(load_rows(hidden_ptr, at, D0, D1, D), weight_ptr, D0, D1, D, ACC)
        tl.store(scores_ptr + i, tl.where(found, s + bias, float("nan")), mask=ok)


@triton.jit(
    do_not_specialize=["M", "T", "per_program"],
    do_not_specialize_on_alignment=["coef_ptr", "rows_ptr"],
)
def _rank1_kernel(
    coef_ptr, weight_ptr, rows_ptr, dhidden_ptr,
    M, T, per_program,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    w0 = load_columns(weight_ptr, 0, D0, D, ACC)
    if D1 > 0:
        w1 = load_columns(weight_ptr, D0, D1, D, ACC)
    start = tl.program_id(0) * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        coef = tl.load(coef_ptr + i, mask=ok, other=0.0).to(ACC)
        store_outer(dhidden_ptr, t, found, coef, w0, 0, D0, D)
        if D1 > 0:
            store_outer(dhidden_ptr, t, found, coef, w1, D0, D1, D)


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=["coef_ptr", "rows_ptr"])
def _weighted_sum_kernel(
    hidden_ptr, coef_ptr, rows_ptr, partial_ptr,
    M, T, S, per_program, stride_b, stride_s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC: tl.constexpr, HAS_ROWS: tl.constexpr, BATCHED: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sum0 = tl.zeros((D0,), ACC)
    if D1 > 0:
        sum1 = tl.zeros((D1,), ACC)
    start = pid * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)
        coef = tl.load(coef_ptr + i, mask=ok, other=0.0).to(ACC)
        used = found & (coef != 0)  # nothing of a row that counts for nothing, NaN included
        h0 = load_tile(hidden_ptr, at, used, 0, D0, D, ACC)
        sum0 += tl.sum(coef[:, None] * h0, axis=0)
        if D1 > 0:
            h1 = load_tile(hidden_ptr, at, used, D0, D1, D, ACC)
            sum1 += tl.sum(coef[:, None] * h1, axis=0)
    partial_ptr += pid.to(tl.int64) * D
    store_columns(partial_ptr, sum0, 0, D0, D)
    if D1 > 0:
        store_columns(partial_ptr, sum1, D0, D1, D)


@triton.jit(do_not_specialize=["G"])
def _sum_partials_kernel(
    partial_ptr, out_ptr, G, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_d = cols < D
    total = tl.zeros((BLOCK_C,), ACC)
    for lo in range(0, G, BLOCK_P):
        p = lo + tl.arange(0, BLOCK_P)
        at = partial_ptr + p.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.sum(tl.load(at, mask=(p < G)[:, None] & in_d[None, :], other=0.0), axis=0)
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=in_d)


@triton.jit(
    do_not_specialize=[*INTS, "E"],
    do_not_specialize_on_alignment=["bias_ptr", "rows_ptr", "scores_ptr"],
)
def _score_heads_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, rows_ptr, scores_ptr,
    M, T, S, per_program, E, stride_b, stride_s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    ACC: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, BATCHED: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)
        h0 = load_tile(hidden_ptr, at, found, 0, D0, D, ACC)  # stays in registers
        if D1 > 0:
            h1 = load_tile(hidden_ptr, at, found, D0, D1, D, ACC)
        for e in range(E):
            w = weight_ptr + tl.cast(e, tl.int64) * D
            s = tl.sum(h0 * load_columns(w, 0, D0, D, ACC)[None, :], axis=1)
            if D1 > 0:
                s += tl.sum(h1 * load_columns(w, D0, D1, D, ACC)[None, :], axis=1)
            if HAS_BIAS:
                s += tl.load(bias_ptr + e).to(ACC)
            out = tl.where(found, s, float("nan"))
            tl.store(scores_ptr + i.to(tl.int64) * E + e, out, mask=ok)


@triton.jit(
    do_not_specialize=["M", "T"], do_not_specialize_on_alignment=["rows_ptr", "inverse_ptr"]
)
def _inverse_kernel(rows_ptr, inverse_ptr, M, T, BLOCK: tl.constexpr):
    """inverse[rows[i]] = i; nothing clears the other places."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, found = candidate_rows(rows_ptr, i, i < M, T, True)
    tl.store(inverse_ptr + t, i, mask=found)


@triton.jit(
    do_not_specialize=["M", "T", "per_program", "G"],
    do_not_specialize_on_alignment=["coef_ptr", "rows_ptr", "inverse_ptr"],
)
def _outer_heads_kernel(
    coef_ptr, weight_ptr, rows_ptr, inverse_ptr, dhidden_ptr,
    M, T, per_program, G,
    D: tl.constexpr, E: tl.constexpr, HELD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, ACC: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK_D columns of some rows; the weights of HELD heads are in registers."""
    g = tl.program_id(0) % G
    cols = (tl.program_id(0) // G * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    in_d = cols < D
    held = ()
    for k in tl.static_range(HELD):
        w = tl.load(weight_ptr + k * D + cols, mask=in_d, other=0.0).to(ACC)
        held = held + (w,)  # type: ignore[assignment]  # noqa: RUF005 (no stars in Triton)
    start = g * per_program
    end = start + tl.minimum(per_program, T - start)
    for block in range(start, end, BLOCK_M):
        t = block + tl.arange(0, BLOCK_M)
        ok = t < end
        if HAS_ROWS:
            # An entry of inverse counts only if rows says so too.
            i = tl.load(inverse_ptr + t, mask=ok, other=-1)
            chosen = ok & (i >= 0) & (i < M)
            chosen = chosen & (load_index(rows_ptr + i, chosen, -1) == t)
        else:
            i, chosen = t, ok
        at, chosen = coef_ptr + i.to(tl.int64)[:, None] * E, chosen[:, None]
        out = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for k in tl.static_range(HELD):
            out += tl.load(at + k, mask=chosen, other=0.0).to(ACC) * held[k]
        for e in range(HELD, E):
            head = weight_ptr + tl.cast(e, tl.int64) * D
            w = tl.load(head + cols, mask=in_d, other=0.0).to(ACC)
            out += tl.load(at + e, mask=chosen, other=0.0).to(ACC) * w
        out = tl.where(chosen, out, 0.0).to(dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + t.to(tl.int64)[:, None] * D + cols, out, mask=ok[:, None] & in_d)


@triton.jit(
    do_not_specialize=[*INTS, "G"], do_not_specialize_on_alignment=["coef_ptr", "rows_ptr"]
)
def _weighted_sum_heads_kernel(
    hidden_ptr, coef_ptr, rows_ptr, partial_ptr,
    M, T, S, per_program, G, stride_b, stride_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, ACC: tl.constexpr, BATCHED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program adds up some rows, BLOCK_D columns and BLOCK_E heads: partial is (G, E, D)."""
    g = tl.program_id(0) % G
    cols = tl.program_id(0) // G % ((D + BLOCK_D - 1) // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    heads = tl.program_id(0) // G // ((D + BLOCK_D - 1) // BLOCK_D) * BLOCK_E
    heads += tl.arange(0, BLOCK_E)
    in_d, in_e = (cols < D)[None, :], (heads < E)[:, None]
    total = tl.zeros((BLOCK_E, BLOCK_D), ACC)
    start = g * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        for j in tl.static_range(BLOCK_M):  # so many loads are under way
            i = block + j + tl.arange(0, 1)
            ok = i < end
            t, found = candidate_rows(rows_ptr, i, ok, T, True)
            at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)[:, None] + cols[None, :]
            h = tl.load(hidden_ptr + at, mask=found[:, None] & in_d, other=0.0).to(ACC)
            at = i.to(tl.int64)[None, :] * E + heads[:, None]
            coef = tl.load(coef_ptr + at, mask=ok[None, :] & in_e, other=0.0).to(ACC)
            total += coef * h
    at = (tl.cast(g, tl.int64) * E + heads[:, None]) * D + cols[None, :]
    tl.store(partial_ptr + at, total, mask=in_e & in_d)


@triton.jit(
    do_not_specialize=[*INTS, "G"],
    do_not_specialize_on_alignment=["bias_ptr", "rows_ptr", "scores_ptr"],
)
def _score_dot_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, rows_ptr, scores_ptr,
    M, T, S, per_program, G, stride_b, stride_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, PIECES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,
    BATCHED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program takes some rows and BLOCK_E heads, whose weights are sums of PIECES of bf16."""
    g = tl.program_id(0) % G
    heads = (tl.program_id(0) // G * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    in_e = heads < E
    start = g * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        at = hidden_ptr + row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)[:, None]
        s = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for lo in range(0, D, BLOCK_D):
            cols = lo + tl.arange(0, BLOCK_D)
            in_d = cols < D
            h = tl.load(at + cols[None, :], mask=found[:, None] & in_d[None, :], other=0.0)
            w = weight_ptr + heads.to(tl.int64) * D + cols[:, None]
            w = tl.load(w, mask=in_e & in_d[:, None], other=0.0)
            part = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # tensor cores truncate: no long sums
            for p in tl.static_range(PIECES):
                piece, w = split_piece(w, p == PIECES - 1)
                part = tl.dot(h.to(DOT), piece, part)
            s += part
        if HAS_BIAS:
            s += tl.load(bias_ptr + heads, mask=in_e, other=0.0).to(tl.float32)
        out = tl.where(found[:, None], s, float("nan"))
        tl.store(scores_ptr + i.to(tl.int64)[:, None] * E + heads, out, mask=ok[:, None] & in_e)


@triton.jit(
    do_not_specialize=[*INTS, "G"], do_not_specialize_on_alignment=["coef_ptr", "rows_ptr"]
)
def _weighted_sum_dot_kernel(
    hidden_ptr, coef_ptr, rows_ptr, partial_ptr,
    M, T, S, per_program, G, stride_b, stride_s,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BATCHED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """As _weighted_sum_heads_kernel, each coefficient as three of bf16."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    g = tl.program_id(0) % G
    cols = (tl.program_id(0) // G % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    heads = (tl.program_id(0) // G // COLUMNS * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
    in_d, in_e = cols < D, heads < E
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    start = g * per_program
    end = start + tl.minimum(per_program, M - start)
    for block in range(start, end, BLOCK_M):
        i = block + tl.arange(0, BLOCK_M)
        ok = i < end
        t, found = candidate_rows(rows_ptr, i, ok, T, True)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)[:, None] + cols
        h = tl.load(hidden_ptr + at, mask=found[:, None] & in_d, other=0.0)
        at = i.to(tl.int64)[None, :] * E + heads
        coef = tl.load(coef_ptr + at, mask=ok[None, :] & in_e, other=0.0)
        part = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for p in tl.static_range(3):
            piece, coef = split_piece(coef, p == 2)
            part = tl.dot(piece, h.to(DOT), part)
        total += part
    at = (tl.cast(g, tl.int64) * E + heads) * D + cols
    tl.store(partial_ptr + at, total, mask=in_e & in_d)


@triton.jit
def split_piece(x, LAST: tl.constexpr):
    """The leading bits of x as a number of bf16, and the rest; the last of three is the rest."""
    if LAST:
        piece = x
    else:
        x = x.to(tl.float32)
        piece = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x -= piece
    return piece.to(tl.bfloat16).to(DOT), x
