"""Are the arguments of the public functions what they have to be? If not, which, where and why.

What looks at values waits for the device where there is one, so its callers decide.
Letters: N groups, M candidates, T rows of hidden, D hidden size, E heads, P pairs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ALL = (*FLOATS, *INTS, torch.bool)
REDUCTIONS = ("mean", "sum", "none")
IGNORE_INDEX = -100


def refuse(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{name} must {expected}, got {got}")


def tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {kinds}, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}")


def on_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        refuse(name, f"be on hidden's device {device}", x.device)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[int, int]:
    """Shapes, dtypes and devices of hidden and the head or heads; returns T and M."""
    tensor("hidden", hidden, FLOATS)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        refuse("hidden", "have shape (T, D) or (B, S, D) with D >= 1", tuple(hidden.shape))
    D = hidden.shape[-1]
    T = hidden.shape[0] if hidden.dim() == 2 else hidden.shape[0] * hidden.shape[1]
    tensor("weight", weight, FLOATS)
    if weight.dim() not in (1, 2) or weight.shape[-1] != D or weight.shape[0] == 0:
        refuse("weight", f"have shape ({D},), (1, {D}) or, for E heads, (E, {D}) to fit hidden",
               tuple(weight.shape))  # fmt: skip
    on_device("weight", weight, hidden.device)
    if bias is not None:
        tensor("bias", bias, FLOATS)
        E = 1 if weight.dim() == 1 else weight.shape[0]
        if bias.shape != (E,) and (E > 1 or bias.shape != ()):
            refuse("bias", "have shape () or (1,)" if E == 1 else f"have shape ({E},), a head each",
                   tuple(bias.shape))  # fmt: skip
        on_device("bias", bias, hidden.device)
    if rows is not None:
        tensor("rows", rows, INTS)
        if rows.dim() != 1:
            refuse("rows", "have shape (M,)", tuple(rows.shape))
        on_device("rows", rows, hidden.device)
    return T, T if rows is None else rows.shape[0]


def scores(x: Any) -> None:
    tensor("scores", x, FLOATS)
    if x.dim() not in (1, 2) or (x.dim() == 2 and x.shape[1] == 0):
        refuse("scores", "have shape (M,) or, for E heads, (M, E)", tuple(x.shape))


def offsets(x: Tensor, device: torch.device) -> int:
    """Shape, dtype and device; returns N."""
    tensor("offsets", x, INTS)
    if x.dim() != 1 or x.shape[0] == 0:
        refuse("offsets", "have shape (N + 1,)", tuple(x.shape))
    on_device("offsets", x, device)
    return x.shape[0] - 1


def target(x: Tensor, M: int, N: int, device: torch.device) -> None:
    tensor("target", x, INTS + FLOATS)
    on_device("target", x, device)
    if x.dtype in FLOATS:
        if x.shape != (M,):
            refuse("target", f"have shape ({M},) when floating, a candidate each", tuple(x.shape))
    elif x.shape != (N,):
        refuse("target", f"have shape ({N},) when integer, a group each", tuple(x.shape))


def vector(
    name: str, x: Tensor | None, size: int, each: str, device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:  # fmt: skip
    """An optional (size,) tensor, a number for each candidate, group or pair."""
    if x is not None:
        tensor(name, x, dtypes)
        if x.shape != (size,):
            refuse(name, f"have shape ({size},), a {each} each", tuple(x.shape))
        on_device(name, x, device)


def pairs(x: Any, device: torch.device) -> None:
    tensor("pairs", x, INTS)
    if x.dim() != 2 or x.shape[1] != 2:
        refuse("pairs", "have shape (P, 2)", tuple(x.shape))
    on_device("pairs", x, device)


def number(name: str, x: Any, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a Python float or int, got {type(x).__name__}")
    if not (fits(x) and x <= sys.float_info.max):
        refuse(name, expected, x)


def options(
    temperature: float, center_coef: float, reduction: str, label_smoothing: float = 0.0
) -> None:
    number("temperature", temperature, "be a finite number above 0", lambda x: x > 0)
    number("label_smoothing", label_smoothing, "be a number from 0 to 1", lambda x: 0 <= x <= 1)
    number("center_coef", center_coef, "be a finite number, 0 or more", lambda x: x >= 0)
    if reduction not in REDUCTIONS:
        refuse("reduction", 'be "mean", "sum" or "none"', repr(reduction))


def divisor(
    num_items_in_batch: int | Tensor | None, reduction: str, device: torch.device
) -> Tensor | None:
    """What "mean" divides by, as a tensor; None: the number of groups not left out."""
    if num_items_in_batch is None or reduction != "mean":
        return None
    if isinstance(num_items_in_batch, Tensor):
        tensor("num_items_in_batch", num_items_in_batch, INTS + FLOATS)
        if num_items_in_batch.dim() != 0:
            refuse("num_items_in_batch", "be an int or a 0-d tensor",
                   f"shape {tuple(num_items_in_batch.shape)}")  # fmt: skip
        return num_items_in_batch.to(device)
    if isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int):
        raise TypeError(
            "num_items_in_batch must be an int or a 0-d tensor, "
            f"got {type(num_items_in_batch).__name__}"
        )
    if not 1 <= num_items_in_batch < 2**63:
        refuse("num_items_in_batch", "be at least 1, and below 2^63", num_items_in_batch)
    return torch.full((), num_items_in_batch, dtype=torch.int64, device=device)


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def rows_values(rows: Tensor | None, T: int) -> None:
    if rows is None:
        return
    rows = rows.long()
    bad = (rows < 0) | (rows >= T)
    if bad.any():
        i = _first(bad)
        refuse(f"rows[{i}]", f"be from 0 to {T - 1}, a row of hidden", int(rows[i]))
    seen, first = torch.unique(rows, return_inverse=True)
    if seen.shape[0] != rows.shape[0]:
        repeats = torch.bincount(first)[first] > 1
        i = _first(repeats)
        j = _first(repeats & (rows == rows[i]) & (torch.arange(len(rows), device=rows.device) > i))
        raise ValueError(f"rows must be distinct, but rows[{i}] and rows[{j}] are {int(rows[i])}")


def offsets_values(offsets: Tensor, M: int) -> None:
    N = offsets.shape[0] - 1
    if int(offsets[0]) != 0:
        refuse("offsets[0]", "be 0", int(offsets[0]))
    if int(offsets[N]) != M:
        refuse(f"offsets[{N}]", f"be {M}, the number of candidates", int(offsets[N]))
    sizes = offsets.long().diff()
    if (sizes < 1).any():
        n = _first(sizes < 1)
        raise ValueError(
            f"offsets must increase, so that every group has a candidate, but offsets[{n}] is "
            f"{int(offsets[n])} and offsets[{n + 1}] is {int(offsets[n + 1])}"
        )


def target_values(target: Tensor, offsets: Tensor) -> None:
    sizes = offsets.long().diff()
    if target.dtype in FLOATS:
        bad = ~((target >= 0) & target.isfinite())
        if bad.any():
            i = _first(bad)
            refuse(f"target[{i}]", "be a probability, finite and 0 or more", float(target[i]))
        group = torch.repeat_interleave(sizes, output_size=target.shape[0])
        total = torch.zeros(len(sizes), dtype=torch.float64, device=target.device)
        total.index_add_(0, group, target.double())
        slack = 2e-2 if target.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if ((total - 1).abs() > slack).any():
            n = _first((total - 1).abs() > slack)
            raise ValueError(
                f"target must be a distribution over each group, but that of group {n} sums to "
                f"{float(total[n]):.6g}; expected 1"
            )
    else:
        target = target.long()
        bad = ((target < 0) & (target != IGNORE_INDEX)) | (target >= sizes)
        if bad.any():
            n = _first(bad)
            refuse(f"target[{n}]", f"be from 0 to {int(sizes[n]) - 1}, a position inside its "
                   f"group, or {IGNORE_INDEX}", int(target[n]))  # fmt: skip


def ranks_values(ranks: Tensor) -> None:
    bad = ranks.long() < -1
    if bad.any():
        i = _first(bad)
        refuse(f"ranks[{i}]", "be 0 or more, or -1 for unranked", int(ranks[i]))


def pairs_values(pairs: Tensor, offsets: Tensor) -> None:
    pairs, M = pairs.long(), int(offsets[-1])
    bad = (pairs < 0) | (pairs >= M)
    if bad.any():
        p, side = bad.nonzero()[0].tolist()
        refuse(f"pairs[{p}, {side}]", f"be from 0 to {M - 1}, a candidate", int(pairs[p, side]))
    group = torch.searchsorted(offsets.long().contiguous(), pairs.contiguous(), right=True)
    bad = (group[:, 0] != group[:, 1]) | (pairs[:, 0] == pairs[:, 1])
    if bad.any():
        p = _first(bad)
        refuse(f"pairs[{p}]", "name two candidates of one group", tuple(pairs[p].tolist()))


def finite(name: str, x: Tensor | None) -> None:
    if x is not None and not x.isfinite().all():
        i = _first(~x.isfinite())
        refuse(f"{name}[{i}]", "be finite", float(x[i]))


def divisor_value(num_items: Tensor | None) -> None:
    if num_items is not None and not 0 < num_items < math.inf:
        refuse("num_items_in_batch", "be finite and above 0", num_items.item())
