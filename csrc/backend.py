"""The C++ operators, loaded: `listwise_loss` and `score` differentiate themselves."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from fastrm_csrc import build
from torch import Tensor


class CppBackend:
    """Forward saves one coefficient a candidate, dl/ds_i; backward is a rank-1 write."""

    def __init__(self, build_mode: str = "auto", cache_dir: Path = build.CACHE_DIR) -> None:
        build.load(build_mode, cache_dir)
        _register_fakes()
        # An overload is called directly: the packet would look it up by the arguments' types.
        self.score = torch.ops.fastrm_cpp.score.default
        self.listwise_loss = torch.ops.fastrm_cpp.listwise_loss.default


def _register_fakes() -> None:
    """Shapes and dtypes of the operators' results, for `torch.compile`."""

    @torch.library.register_fake("fastrm_cpp::score_fwd")
    def _(hidden, weight, bias, rows):
        return hidden.new_empty(_candidates(hidden, rows), dtype=_accumulator(hidden))

    @torch.library.register_fake("fastrm_cpp::listwise_fwd")
    def _(
        hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
        temperature, label_smoothing, center_coef, reduction, needs_coef, needs_dweight,
    ):  # fmt: skip
        M, D, dtype = _candidates(hidden, rows), hidden.shape[-1], _accumulator(hidden)
        per_group = reduction == "none"
        return (
            hidden.new_empty((offsets.shape[0] - 1,) if per_group else (), dtype=dtype),
            hidden.new_empty(M, dtype=dtype),
            hidden.new_empty(M if needs_coef else 0, dtype=dtype),
            hidden.new_empty(D if needs_dweight and not per_group else 0, dtype=dtype),
        )

    @torch.library.register_fake("fastrm_cpp::rank1_bwd")
    def _(
        grad, coef, offsets, weight, rows, hidden, dweight_unit, hidden_shape, hidden_dtype,
        needs_dhidden, needs_dweight, needs_dbias, shift_invariant,
    ):  # fmt: skip
        return (
            weight.new_empty(hidden_shape if needs_dhidden else (0,), dtype=hidden_dtype),
            weight.new_empty(weight.shape if needs_dweight else (0,)),
            coef.new_empty(() if needs_dbias else (0,)),
        )


def _candidates(hidden: Tensor, rows: Tensor | None) -> int:
    return math.prod(hidden.shape[:-1]) if rows is None else rows.shape[0]


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
