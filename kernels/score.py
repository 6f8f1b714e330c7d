"""Scores of chosen rows, and the two halves of any head's backward: rank-1 write, weighted sum.

Letters: T rows of hidden, M candidates, D hidden size, G programs.
"""

import triton
import triton.language as tl
from fastrm_kernels.rows import (
    candidate_rows,
    dot_rows,
    load_columns,
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
        t, found = candidate_rows(rows_ptr, i, ok, T, HAS_ROWS)
        at = row_start(t, S, stride_b, stride_s, BATCHED, ALIGN)
        s = dot_rows(hidden_ptr, at, found, weight_ptr, 0, D0, D, ACC)
        if D1 > 0:
            s += dot_rows(hidden_ptr, at, found, weight_ptr, D0, D1, D, ACC)
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
        coef = tl.load(coef_ptr + i, mask=ok, other=0.0).to(ACC)[:, None]
        sum0 += tl.sum(coef * load_tile(hidden_ptr, at, found, 0, D0, D, ACC), axis=0)
        if D1 > 0:
            sum1 += tl.sum(coef * load_tile(hidden_ptr, at, found, D0, D1, D, ACC), axis=0)
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
