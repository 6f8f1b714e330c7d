"""Rows of hidden on the device: how D is tiled, how rows are found and read.

Letters: T rows of hidden, M candidates, N groups, D hidden size. A row is one tile of D0 columns,
padded to a power of two, or two, D0 and D1, so that 5120 = 4096 + 1024 masks nothing where one
padded tile of 8192 would waste registers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels may hold PTX: not on ROCm, and not in Triton's interpreter.
HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)
# What tensor cores multiply; the interpreter cannot multiply bf16, whose products fp32 holds.
DOT = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
MOST = 2**31 - 2**10  # rows: those of a block that goes beyond the last still have 32-bit numbers


@dataclass(frozen=True)
class Tile:
    D0: int
    D1: int
    BLOCK_M: int  # rows read together
    num_warps: int
    programs_per_sm: int
    ROWS: int = 0  # coefficients formed together: of the rank-1 write alone

    @property
    def registers(self) -> int:
        """What a thread may use so that all its programs are resident, of an SM's 65536."""
        return min(65536 // (32 * self.num_warps * self.programs_per_sm) // 8 * 8, 255)


@lru_cache
def tile(D: int, element_size: int) -> Tile:
    """Tile of the kernels of score.py: as few warps as hold two D-wide sums."""
    D0, D1, num_warps = _columns(D)
    values = -(-(D0 + D1) // (32 * num_warps))  # of a row, in each thread
    spare = max((80 if D <= 512 else 144) - 2 * values, 0)  # registers for rows on their way
    rows_read = max(min(4 * spare // (values * element_size), 16 if D <= 128 else 4), 1)
    BLOCK_M = 1 << rows_read.bit_length() - 1
    return Tile(D0, D1, BLOCK_M, num_warps, 12 if D <= 512 else 8 // num_warps)


@lru_cache
def forward_tile(D: int, element_size: int) -> Tile:
    """Tile of the listwise pass: as many rows are scored and weighed together as fit registers."""
    D0, D1, num_warps = _columns(D)
    if element_size > 2:
        num_warps = min(2 * num_warps, 8)
    warps = 12 if D <= 1024 else 8  # resident
    sums = 2 * -(-(D0 + D1) // (32 * num_warps)) * max(element_size // 4, 1)  # a thread's registers
    spare = 65536 // (32 * warps) - sums - 40  # for rows on their way
    rows_read = spare * 4 * 32 * num_warps // (D0 * element_size)
    most = 8 if D <= 8192 else 16 // element_size**2
    BLOCK_M = 1 << max(min(rows_read, most), 1).bit_length() - 1
    return Tile(D0, D1, BLOCK_M, num_warps, warps // num_warps)


@lru_cache
def write_tile(D: int, plain: bool) -> Tile:
    """Tile of the rank-1 write: a thread holds its part of the weight, and no sums.

    Plain coefficients, from one label a group and without centring, need fewer registers.
    """
    D0, D1, _ = _columns(D)
    num_warps = 1 << min(max((D0 + D1) // 512, 2), 8 if D <= 8192 else 16).bit_length() - 1
    return Tile(D0, D1, 2, num_warps, (24 if plain else 16) // num_warps, 32)


def _columns(D: int) -> tuple[int, int, int]:
    """D0 and D1 columns, and the warps that share them."""
    D0, D1 = triton.next_power_of_2(D), 0
    if D0 > 8192 or (D0 > 256 and D <= D0 * 3 // 4):
        D0 //= 2
        D1 = triton.next_power_of_2(D - D0)
    return D0, D1, 1 << min(max((D0 + D1) // 1024, 1), 8).bit_length() - 1


def options(t: Tile, cuda: bool = torch.version.hip is None) -> dict[str, Any]:
    """For Triton: 3.10 fuses only if told, and ptxas left alone spills where it need not."""
    return dict(num_warps=t.num_warps, enable_fp_fusion=True) | (
        dict(maxnreg=t.registers) if cuda else {}
    )


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a device; Triton's interpreter on the CPU plays one that has 3."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def scan_blocks(device: torch.device) -> tuple[int, int]:
    """Numbers scanned together, and most programs; the interpreter scans one after the other."""
    return (16, 4) if device.type == "cpu" else (512, 128)


def split(M: int, t: Tile, device: torch.device, parts: int = 1) -> tuple[int, int]:
    """Programs G and rows per program: an even split of M rows, whatever the groups are.

    Where the columns are split into `parts`, each part has G programs.
    """
    most = max(min(sm_count(device) * t.programs_per_sm, 4096) // parts, 1)
    blocks = -(-M // t.BLOCK_M)
    per_program = max(-(-blocks // most), 1) * t.BLOCK_M
    return -(-M // per_program), per_program


@lru_cache
def outer_tile(D: int, element_size: int) -> Tile:
    """D0 columns of BLOCK_M rows of the rank-E write, and the weights of D1 heads in registers."""
    values = 4 if element_size == 8 else 8  # of a row, in each thread
    D0 = min(triton.next_power_of_2(D), 128 * values)
    num_warps = max(D0 // (32 * values), 1)
    return Tile(D0, 8, 4, num_warps, 12 // num_warps)


@lru_cache
def score_dot_tile(E: int) -> Tile:
    """BLOCK_M rows and D0 columns of them at once, by D1 heads, on tensor cores."""
    heads = max(min(triton.next_power_of_2(E), 64), 16)
    return Tile(2048 // heads, heads, 64, 4, 2)


@lru_cache
def sum_dot_tile(E: int) -> Tile:
    """D0 columns of D1 heads, which a program adds up over its rows, BLOCK_M at once."""
    heads = max(min(triton.next_power_of_2(E), 64), 16)
    return Tile(4096 // heads, heads, 32, 4, 2)


@lru_cache
def heads_tile(D: int, E: int) -> Tile:
    """D0 columns of D1 heads, which a program adds up over its rows, BLOCK_M on their way."""
    heads = min(triton.next_power_of_2(E), 64)
    resident = 4 if heads <= 16 else 2  # each thread holds the coefficients of all heads
    return Tile(min(triton.next_power_of_2(D), 4096 // heads), heads, 4, 4, resident)


def row_strides(hidden: Tensor) -> tuple[Tensor, int, int, int]:
    """hidden with unit last stride, and (S, stride_b, stride_s): row t is (t // S, t % S)."""
    if hidden.stride(-1) != 1 and hidden.shape[-1] > 1:
        hidden = hidden.contiguous()
    if hidden.dim() == 2:
        return hidden, 1, hidden.stride(0), 0
    B, S, _ = hidden.shape
    if B == 1 or hidden.stride(0) == S * hidden.stride(1):  # rows are evenly spaced
        return hidden, 1, hidden.stride(1), 0
    return hidden, S, hidden.stride(0), hidden.stride(1)


@triton.jit
def row_start(t, S, stride_b, stride_s, BATCHED: tl.constexpr, ALIGN: tl.constexpr):
    """Element offset of row t, in int64; ALIGN divides both strides."""
    if BATCHED:
        b = t // S
        at = tl.cast(b, tl.int64) * stride_b + tl.cast(t - b * S, tl.int64) * stride_s
    else:
        at = tl.cast(t, tl.int64) * stride_b
    return tl.multiple_of(at, ALIGN)


@triton.jit
def load_rows(ptr, start, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """(BLOCK_M, DC) values at columns LO.. of rows that begin at `start`, all of which exist."""
    cols = LO + tl.arange(0, DC)
    at = ptr + start[:, None] + cols[None, :]
    if LO + DC <= D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def dot_rows(h, weight_ptr, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """(BLOCK_M,) products of columns LO.. of rows with those of the weight."""
    w = load_columns(weight_ptr, LO, DC, D, ACC)
    return tl.sum(widen(h, D, ACC) * w[None, :], axis=1)


@triton.jit
def load_tile(ptr, start, ok, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """(BLOCK_M, DC) values at columns LO.. of the rows that begin at `start`; 0 where masked."""
    cols = LO + tl.arange(0, DC)
    if LO + DC <= D:
        mask = ok[:, None]
    else:
        mask = ok[:, None] & (cols < D)[None, :]
    at = ptr + start[:, None] + cols[None, :]
    return widen(tl.load(at, mask=mask, other=0.0), D, ACC)


@triton.jit
def load_row(ptr, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """(DC,) values at columns LO.. of the row at ptr, which nothing reads again in this launch."""
    cols = LO + tl.arange(0, DC)
    if LO + DC <= D:
        h = tl.load(ptr + cols, eviction_policy="evict_first")
    else:
        h = tl.load(ptr + cols, mask=cols < D, other=0.0, eviction_policy="evict_first")
    return widen(h, D, ACC)


@triton.jit
def widen(h, D: tl.constexpr, ACC: tl.constexpr):
    """h in ACC; two of bf16 take two instructions, where the compiler finds three.

    A thread must have pairs, which the tiles of this file see to unless h is narrow.
    """
    WIDE: tl.constexpr = h.shape[-1] >= 128 and 4 * h.shape[-1] >= D
    if HAS_PTX and WIDE and h.dtype == tl.bfloat16 and ACC == tl.float32:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [h], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = h.to(ACC)
    return wide


@triton.jit
def load_columns(ptr, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """(DC,) values at columns LO.. of a vector; 0 beyond D."""
    cols = LO + tl.arange(0, DC)
    return widen(tl.load(ptr + cols, mask=cols < D, other=0.0), D, ACC)


@triton.jit
def store_columns(ptr, values, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """The inverse of load_columns."""
    cols = LO + tl.arange(0, DC)
    tl.store(ptr + cols, values.to(ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def store_outer(ptr, t, ok, coef, w, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """Rank-1 write: row t[i] gets coef[i] * w, rounded once."""
    store_tile(ptr, t, ok, coef[:, None] * w[None, :], LO, DC, D)


@triton.jit
def store_tile(ptr, t, ok, values, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """Row t[i] gets values[i] at columns LO.., rounded once."""
    cols = LO + tl.arange(0, DC)
    if LO + DC <= D:
        mask = ok[:, None]
    else:
        mask = ok[:, None] & (cols < D)[None, :]
    out = values.to(ptr.dtype.element_ty)
    tl.store(ptr + t.to(tl.int64)[:, None] * D + cols[None, :], out, mask=mask)


@triton.jit
def candidate_rows(rows_ptr, i, ok, T, HAS_ROWS: tl.constexpr):
    """Row of hidden for candidate i, and whether it exists."""
    if HAS_ROWS:
        t = load_index(rows_ptr + i, ok, -1)
        found = (t >= 0) & (t < T)
        t = tl.where(found, t, 0)
    else:
        t, found = i, ok
    return t, found


@triton.jit
def load_index(ptr, ok, other):
    """Integers below 2^31, the size of a register less; what is out of range stays so."""
    x = tl.load(ptr, mask=ok, other=0).to(tl.int64)
    x = tl.minimum(tl.maximum(x, -200), 2147483647).to(tl.int32)
    return tl.where(ok, x, other)  # tl.load would cast it to ptr's type: 2^31 - 1 to -1 in int16


@triton.jit
def find_group(offsets_ptr, i, N, PROBES: tl.constexpr):
    """Last n with offsets[n] <= i: PROBES-ary search; in [0, N) whatever offsets hold."""
    lo = i * 0
    size = lo + N
    probe = tl.arange(0, PROBES)
    while size > 1:
        step = (size + PROBES - 1) // PROBES
        at = lo + probe * step
        inside = probe * step < size
        below = inside & (tl.load(offsets_ptr + at, mask=inside, other=0).to(tl.int64) <= i)
        jump = tl.maximum(tl.sum(below.to(tl.int32), axis=0) - 1, 0) * step
        lo += jump
        size = tl.minimum(step, size - jump)
    return lo
