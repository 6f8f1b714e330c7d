"""The C++ kernels as a fused backend: names and argument order for the autograd functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from fastrm_csrc import build
from torch import Tensor

Options = tuple[float, float, float, str]  # temperature, label_smoothing, center_coef, reduction


class CppBackend:
    """Forward saves one coefficient a candidate, dl/ds_i; backward is a rank-1 write."""

    def __init__(self, build_mode: str = "auto", cache_dir: Path = build.CACHE_DIR) -> None:
        build.load(build_mode, cache_dir)
        _register_fakes()
        # An overload is called directly: the packet would look it up by the arguments' types.
        self.score_fwd = torch.ops.fastrm_cpp.score.default
        self._fwd = torch.ops.fastrm_cpp.listwise_fwd.default
        self._bwd = torch.ops.fastrm_cpp.rank1_bwd.default

    def listwise_fwd(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
        target: Tensor, rows: Tensor | None, margin: Tensor | None, group_weight: Tensor | None,
        num_items: Tensor | None, temperature: float, label_smoothing: float, center_coef: float,
        reduction: str, needs_grad: bool, needs_dweight: bool,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss, the scores, and (coef, dweight for a unit gradient or offsets)."""
        loss, scores, coef, dweight = self._fwd(
            hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
            temperature, label_smoothing, center_coef, reduction, needs_grad, needs_dweight,
        )  # fmt: skip
        return loss, scores, (coef, offsets if reduction == "none" else dweight)

    @staticmethod
    def reads_twice(reduction: str, center_coef: float) -> bool:
        """Per-group gradients come after forward; centring is known within its one pass."""
        return reduction == "none"

    def listwise_bwd(
        self, grad: Tensor, weight: Tensor, rows: Tensor | None, state: tuple[Any, ...],
        hidden: Tensor | None, shape: torch.Size, dtype: torch.dtype, options: Options,
        needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        coef, other = state
        again = options[3] == "none"
        return self._bwd(
            grad, coef, other if again else None, weight, rows, hidden,
            other if needs_dweight and not again else None, shape, dtype,
            needs_dhidden, needs_dweight, needs_dbias, options[2] == 0,
        )  # fmt: skip

    def score_bwd(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor | None,
        needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self._bwd(
            torch.ones((), device="cpu"), grad, None, weight, rows, hidden, None, hidden.shape,
            hidden.dtype,
            needs_dhidden, needs_dweight, needs_dbias, False,
        )  # fmt: skip


def _register_fakes() -> None:
    """Shapes and dtypes of the operators' results, for `torch.compile`."""

    @torch.library.register_fake("fastrm_cpp::score")
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
