"""Rows of hidden on the device: how D is tiled, how rows are found and read.

Letters: T rows of hidden, M candidates, N groups, D hidden size. A row is held as two tiles,
D0 (a power of two <= D) and D1 (the rest, padded to a power of two), so that 5120 = 4096 + 1024
masks nothing where one padded tile of 8192 would waste registers.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    D0: int
    D1: int
    BLOCK_M: int  # rows read together
    num_warps: int
    programs_per_sm: int


@lru_cache
def tile(D: int, element_size: int) -> Tile:
    """Tile for hidden size D: rows, weight and sums in registers, which spill above D = 8192."""
    if D < 32:
        D0, D1 = triton.next_power_of_2(D), 0
    else:
        D0 = 1 << (D.bit_length() - 1)
        D1 = triton.next_power_of_2(D - D0) if D > D0 else 0
        if D1 == D0:
            D0, D1 = 2 * D0, 0
    held = D0 + D1
    if held <= 256:
        found = Tile(D0, D1, 16, 4, 16)
    elif held <= 1024:
        found = Tile(D0, D1, 4, 4, 8)
    elif held <= 2048:
        found = Tile(D0, D1, 2, 4, 4)
    elif held <= 4096:
        found = Tile(D0, D1, 2, 8, 2)
    else:
        found = Tile(D0, D1, 1, 16, 1)
    if element_size == 8:  # float64 values take twice the registers
        found = Tile(D0, D1, max(1, found.BLOCK_M // 2), found.num_warps, found.programs_per_sm)
    return found


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a device; Triton's interpreter on the CPU plays one that has 3."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(M: int, t: Tile, device: torch.device) -> tuple[int, int]:
    """Programs G and rows per program: an even split of M rows, whatever the groups are."""
    most = sm_count(device) * t.programs_per_sm
    blocks = -(-M // t.BLOCK_M)
    per_program = max(-(-blocks // most), 1) * t.BLOCK_M
    return -(-M // per_program), per_program


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
def row_start(t, S, stride_b, stride_s):
    """Element offset of row t, in int64."""
    b = t // S
    return b * stride_b + (t - b * S) * stride_s


@triton.jit
def load_tile(ptr, start, ok, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """(BLOCK_M, DC) values at columns LO.. of the rows that begin at `start`; 0 where masked."""
    cols = LO + tl.arange(0, DC)
    if LO + DC <= D:
        mask = ok[:, None]
    else:
        mask = ok[:, None] & (cols < D)[None, :]
    return tl.load(ptr + start[:, None] + cols[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def load_columns(ptr, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """(DC,) values at columns LO.. of a vector; 0 beyond D."""
    cols = LO + tl.arange(0, DC)
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(ACC)


@triton.jit
def store_columns(ptr, values, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """The inverse of load_columns."""
    cols = LO + tl.arange(0, DC)
    tl.store(ptr + cols, values.to(ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def store_outer(ptr, start, ok, coef, w, LO: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """Rank-1 write: row at start[i] gets coef[i] * w, rounded once."""
    cols = LO + tl.arange(0, DC)
    if LO + DC <= D:
        mask = ok[:, None]
    else:
        mask = ok[:, None] & (cols < D)[None, :]
    out = (coef[:, None] * w[None, :]).to(ptr.dtype.element_ty)
    tl.store(ptr + start[:, None] + cols[None, :], out, mask=mask)


@triton.jit
def candidate_rows(rows_ptr, i, ok, T, HAS_ROWS: tl.constexpr):
    """Row of hidden for candidate i, in int64, and whether it exists."""
    if HAS_ROWS:
        t = tl.load(rows_ptr + i, mask=ok, other=0).to(tl.int64)
    else:
        t = i.to(tl.int64)
    found = ok & (t >= 0) & (t < T)
    return tl.where(found, t, 0), found


@triton.jit
def load_index(ptr, ok, other):
    """Integers below 2^31, the size of a register less; what is out of range stays so."""
    x = tl.load(ptr, mask=ok, other=other).to(tl.int64)
    return tl.minimum(tl.maximum(x, -200), 2147483647).to(tl.int32)


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
