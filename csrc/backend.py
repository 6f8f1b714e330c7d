"""The C++ operators, loaded: those of `CppBackend` differentiate themselves."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from fastrm_csrc import build
from torch import Tensor


class CppBackend:
    """Forward saves one coefficient a candidate, dl/ds_i; backward is a multiplication by it."""

    def __init__(self, build_mode: str = "auto", cache_dir: Path = build.CACHE_DIR) -> None:
        build.load(build_mode, cache_dir)
        _register_fakes()
        # An overload is called directly: the packet would look it up by the arguments' types.
        self.score = torch.ops.fastrm_cpp.score.default
        self.listwise_loss = torch.ops.fastrm_cpp.listwise_loss.default
        self.plackett_luce = torch.ops.fastrm_cpp.plackett_luce.default
        self.bradley_terry = torch.ops.fastrm_cpp.bradley_terry.default


def _register_fakes() -> None:
    """Shapes and dtypes of the operators' results, for `torch.compile`."""

    @torch.library.register_fake("fastrm_cpp::score_fwd")
    def _(hidden, weight, bias, rows):
        _need_one_device(hidden, weight, bias, rows)
        return hidden.new_empty(_scores(hidden, weight, rows), dtype=_accumulator(hidden))

    @torch.library.register_fake("fastrm_cpp::listwise_fwd")
    def _(
        hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
        temperature, label_smoothing, center_coef, reduction, needs_coef, needs_dweight,
    ):  # fmt: skip
        _need_one_device(
            hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items
        )
        scores, dtype = _scores(hidden, weight, rows), _accumulator(hidden)
        per_group = reduction == "none"
        one_pass = needs_dweight and not per_group and len(scores) == 1
        return (
            hidden.new_empty((offsets.shape[0] - 1,) if per_group else (), dtype=dtype),
            hidden.new_empty(scores, dtype=dtype),
            hidden.new_empty(scores if needs_coef else (0,), dtype=dtype),
            hidden.new_empty(hidden.shape[-1] if one_pass else 0, dtype=dtype),
        )

    @torch.library.register_fake("fastrm_cpp::head_bwd")
    def _(
        grad, coef, offsets, weight, rows, hidden, dweight_unit, hidden_shape, hidden_dtype,
        needs_dhidden, needs_dweight, needs_dbias,
    ):  # fmt: skip
        return (
            weight.new_empty(hidden_shape if needs_dhidden else (0,), dtype=hidden_dtype),
            weight.new_empty(weight.shape if needs_dweight else (0,)),
            coef.new_empty(() if needs_dbias else (0,)),
        )

    @torch.library.register_fake("fastrm_cpp::heads_bwd")
    def _(
        dscores, weight, rows, hidden, hidden_shape, hidden_dtype, needs_dhidden, needs_dweight,
        needs_dbias,
    ):  # fmt: skip
        return (
            weight.new_empty(hidden_shape if needs_dhidden else (0,), dtype=hidden_dtype),
            weight.new_empty(weight.shape if needs_dweight else (0,)),
            dscores.new_empty(weight.shape[0] if needs_dbias else 0),
        )

    for name in ("plackett_luce_fwd", "bradley_terry_fwd"):

        @torch.library.register_fake(f"fastrm_cpp::{name}")
        def _(
            scores, offsets, ranks, extra, group_weight, num_items, temperature, center_coef,
            reduction, needs_coef,
        ):  # fmt: skip
            _need_one_device(scores, offsets, ranks, extra, group_weight, num_items)
            N = offsets.shape[0] - 1
            return (
                scores.new_empty((N,) if reduction == "none" else ()),
                scores.new_empty(scores.shape[0] if needs_coef else 0),
            )


def _need_one_device(*tensors: Tensor | None) -> None:
    """One tensor on the meta device leads here, and the result would be memory as it is."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _scores(hidden: Tensor, weight: Tensor, rows: Tensor | None) -> tuple[int, ...]:
    """(M,) or, for E heads, (M, E)."""
    M = math.prod(hidden.shape[:-1]) if rows is None else rows.shape[0]
    return (M, weight.shape[0]) if weight.dim() == 2 and weight.shape[0] > 1 else (M,)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
