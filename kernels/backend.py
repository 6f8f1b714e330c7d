"""The Triton kernels as a fused backend: buffers, grids, launches; operators for torch.compile.

Letters: N groups, M candidates, T rows of hidden, D hidden size, G programs.
"""

import math
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from fastrm_kernels import listwise, rows, score
from torch import Tensor

BLOCK_C, BLOCK_P = 64, 32  # columns of dweight a program adds up, partials it reads together
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
_arrived: dict[tuple[torch.device, int], Tensor] = {}


class TritonBackend:
    """Forward saves the scores and two numbers a group; backward is a rank-1 write.

    Eager calls launch directly; under torch.compile the same functions are operators.
    """

    @staticmethod
    def reads_twice(reduction: str, center_coef: float) -> bool:
        """Per-group gradients come after forward, a group's mean score at its end."""
        return reduction == "none" or center_coef != 0

    def score_fwd(self, *args: Any) -> Tensor:
        return (_score_fwd_op if torch.compiler.is_compiling() else _score_fwd)(*args)

    def score_bwd(self, *args: Any) -> list[Tensor]:
        return (_score_bwd_op if torch.compiler.is_compiling() else _score_bwd)(*args)

    def listwise_fwd(self, *args: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        run = _listwise_fwd_op if torch.compiler.is_compiling() else _listwise_fwd
        loss, scores, *state = run(*args)
        _, _, _, offsets, target, _, margin, group_weight, *_ = args
        return loss, scores, (offsets, target, margin, group_weight, scores, *state)

    def listwise_bwd(
        self, grad: Tensor, weight: Tensor, chosen: Tensor | None,
        state: tuple[Any, ...], hidden: Tensor | None, shape: Any, dtype: torch.dtype,
        options: tuple[float, float, float, str],
        needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
    ) -> list[Tensor]:  # fmt: skip
        run: Any = _listwise_bwd_op if torch.compiler.is_compiling() else _listwise_bwd
        return run(
            grad, weight, chosen, *state, hidden, shape, dtype, *options,
            needs_dhidden, needs_dweight, needs_dbias,
        )  # fmt: skip


class _Head:
    """What every launch over hidden needs: strides, sizes, tile and the split of M rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, chosen: Tensor | None) -> None:
        self.chosen, self.D = chosen, hidden.shape[-1]
        self.T = math.prod(hidden.shape[:-1])
        self.M = self.T if chosen is None else chosen.shape[0]
        if self.T >= 2**31:
            raise ValueError(f"hidden must have less than 2^31 rows, got {self.T}")
        self.hidden, self.S, self.stride_b, self.stride_s = rows.row_strides(hidden)
        self.weight = weight.reshape(-1).contiguous()
        self.acc = torch.promote_types(hidden.dtype, torch.float32)
        t = rows.tile(self.D, hidden.element_size())
        self.meta = _meta(self.D, t, self.acc)
        self.options = _options(t)
        self.G, self.per_program = rows.split(self.M, t, hidden.device)


def _meta(D: int, t: rows.Tile, acc: torch.dtype) -> dict[str, Any]:
    return dict(D=D, D0=t.D0, D1=t.D1, BLOCK_M=t.BLOCK_M, ACC=_ACC[acc])


def _options(t: rows.Tile) -> dict[str, Any]:
    return dict(num_warps=t.num_warps, enable_fp_fusion=True)  # Triton 3.10 fuses only if told


def _score_fwd(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], chosen: Optional[Tensor]  # noqa: UP045
) -> Tensor:
    head = _Head(hidden, weight, chosen)
    scores = hidden.new_empty(head.M, dtype=head.acc)
    if head.M:
        score._score_fwd_kernel[(head.G,)](
            head.hidden, head.weight, bias, chosen, scores, head.M, head.T, head.S,
            head.per_program, head.stride_b, head.stride_s, **head.meta,
            HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, **head.options,
        )  # fmt: skip
    return scores


def _score_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, chosen: Optional[Tensor],  # noqa: UP045
    needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    head = _Head(hidden, weight, chosen)
    grad = grad.contiguous()
    dhidden = dweight = dbias = grad.new_empty(0)
    if needs_dhidden:
        make = torch.empty if chosen is None else torch.zeros
        dhidden = make(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if head.M:
            score._rank1_kernel[(head.G,)](
                grad, head.weight, chosen, dhidden, head.M, head.T, head.per_program,
                **head.meta, HAS_ROWS=chosen is not None, **head.options,
            )  # fmt: skip
    if needs_dweight:
        dweight = _weighted_sum(head, weight, grad)
    if needs_dbias:
        dbias = grad.sum()
    return [dhidden, dweight, dbias]


def _weighted_sum(head: _Head, weight: Tensor, coef: Tensor) -> Tensor:
    """Σ coef_i h_i, in weight's shape and dtype; coef (M,)."""
    dweight = weight.new_empty(weight.shape)
    partial = coef.new_empty(head.G, head.D)
    if head.M:
        score._weighted_sum_kernel[(head.G,)](
            head.hidden, coef, head.chosen, partial, head.M, head.T, head.S, head.per_program,
            head.stride_b, head.stride_s, **head.meta, HAS_ROWS=head.chosen is not None,
            **head.options,
        )  # fmt: skip
    score._sum_partials_kernel[(triton.cdiv(head.D, BLOCK_C),)](
        partial, dweight, head.G, D=head.D, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
        ACC=head.meta["ACC"], enable_fp_fusion=True,
    )  # fmt: skip
    return dweight


def _listwise_fwd(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], offsets: Tensor,  # noqa: UP045
    target: Tensor, chosen: Optional[Tensor], margin: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], num_items: Optional[Tensor], temperature: float,  # noqa: UP045
    label_smoothing: float, center_coef: float, reduction: str, needs_grad: bool,
    needs_dweight: bool,
) -> list[Tensor]:  # fmt: skip
    """Loss, scores, and the buffers listwise.py names: stats, divisor, pieces, ... (or empty)."""
    head = _Head(hidden, weight, chosen)
    M, N, G = head.M, offsets.shape[0] - 1, head.G
    soft = target.is_floating_point()
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    buffers = _buffers(hidden, chosen, N, G, soft, center_coef, reduction, one_pass, inverted)
    loss, scores, stats, divisor, pieces, marks, partial, inverse = buffers
    if M == 0 or N == 0:
        loss.zero_()
        return buffers
    listwise._listwise_fwd_kernel[(G,)](
        head.hidden, head.weight, bias, offsets.contiguous(), target.contiguous(),
        _contiguous(chosen), _contiguous(margin), _contiguous(group_weight), num_items,
        loss, scores, stats, divisor, pieces, marks, partial, inverse,
        _arrival_counter(hidden.device), M, N, head.T, head.S, head.per_program, G,
        head.stride_b, head.stride_s, temperature, label_smoothing, center_coef, **head.meta,
        ONE_PROGRAM=G == 1, SOFT=soft, CENTER=center_coef != 0,
        HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, HAS_MARGIN=margin is not None,
        HAS_GROUP_WEIGHT=group_weight is not None, HAS_NUM_ITEMS=num_items is not None,
        REDUCTION=reduction, DWEIGHT=one_pass, INVERSE=inverted, **head.options,
    )  # fmt: skip
    return buffers


def _plan(
    chosen: Tensor | None, reduction: str, center_coef: float, needs_grad: bool,
    needs_dweight: bool,
) -> tuple[bool, bool]:  # fmt: skip
    """Whether forward adds up dweight, and whether it notes which candidate a row is."""
    one_pass = needs_dweight and not TritonBackend.reads_twice(reduction, center_coef)
    return one_pass, needs_grad and chosen is not None


def _buffers(
    hidden: Tensor, chosen: Tensor | None, N: int, G: int, soft: bool, center_coef: float,
    reduction: str, one_pass: bool, inverted: bool,
) -> list[Tensor]:  # fmt: skip
    T, D = math.prod(hidden.shape[:-1]), hidden.shape[-1]
    M = T if chosen is None else chosen.shape[0]
    acc = torch.promote_types(hidden.dtype, torch.float32)
    new = hidden.new_empty
    return [
        new((N,) if reduction == "none" else (), dtype=acc),  # loss
        new(M, dtype=acc),  # scores
        new((4 if soft or center_coef else 2, N), dtype=acc),  # stats
        new((), dtype=acc),  # divisor
        new((G, listwise.PIECES.value), dtype=acc),
        new((G, listwise.MARKS.value), dtype=torch.int32),
        new((G, 3, D) if one_pass else (0,), dtype=acc),  # partial
        new(T if inverted else 0, dtype=torch.int32),  # inverse
    ]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _listwise_bwd(
    grad: Tensor, weight: Tensor, chosen: Optional[Tensor], offsets: Tensor,  # noqa: UP045
    target: Tensor, margin: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], scores: Tensor, stats: Tensor, divisor: Tensor,  # noqa: UP045
    pieces: Tensor, marks: Tensor, partial: Tensor, inverse: Tensor,
    hidden: Optional[Tensor], shape: list[int], dtype: torch.dtype,  # noqa: UP045
    temperature: float, label_smoothing: float, center_coef: float, reduction: str,
    needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    """dhidden, dweight and dbias; empty where not needed."""
    D, M, N = shape[-1], scores.shape[0], offsets.shape[0] - 1
    T = math.prod(shape[:-1])
    t = rows.tile(D, dtype.itemsize)
    dhidden, dweight, dbias = _gradients(
        weight, scores, shape, dtype, needs_dhidden, needs_dweight, needs_dbias
    )
    if M == 0 or N == 0:
        return [dhidden.zero_(), dweight.zero_(), dbias.zero_()]
    again = needs_dweight and partial.numel() == 0
    wants_coef = again or (needs_dbias and center_coef != 0)
    coef = torch.empty_like(scores) if wants_coef else None
    programs, per_program, rows_per_program = 0, 1, 1
    if needs_dhidden or wants_coef:
        programs, rows_per_program = rows.split(T, t, weight.device)
        per_program = triton.cdiv(triton.cdiv(M, programs), t.BLOCK_M) * t.BLOCK_M
    columns = triton.cdiv(D, BLOCK_C) if needs_dweight and not again else 0
    if programs + columns:
        listwise._listwise_bwd_kernel[(programs + columns,)](
            grad.contiguous(), weight.reshape(-1), offsets.contiguous(), target.contiguous(),
            _contiguous(chosen), _contiguous(margin), _contiguous(group_weight), scores, stats,
            divisor, pieces, marks, partial, inverse, dhidden, dweight, coef, M, N, T,
            per_program, rows_per_program, programs, marks.shape[0],
            temperature, label_smoothing, center_coef, **_meta(D, t, scores.dtype),
            BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, SOFT=target.is_floating_point(),
            CENTER=center_coef != 0, HAS_ROWS=chosen is not None, HAS_MARGIN=margin is not None,
            HAS_GROUP_WEIGHT=group_weight is not None, REDUCTION=reduction,
            DHIDDEN=needs_dhidden, COEF=wants_coef, **_options(t),
        )  # fmt: skip
    if again:
        assert hidden is not None and coef is not None
        dweight = _weighted_sum(_Head(hidden, weight, chosen), weight, coef)
    if needs_dbias:  # a shift of the scores leaves a softmax as it is: exactly 0 but for centring
        dbias = dbias.zero_() if coef is None or not center_coef else coef.sum()
    return [dhidden, dweight, dbias]


def _gradients(
    weight: Tensor, scores: Tensor, shape: Any, dtype: torch.dtype, needs_dhidden: bool,
    needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    return [
        weight.new_empty(shape if needs_dhidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        scores.new_empty(() if needs_dbias else (0,)),
    ]


def _arrival_counter(device: torch.device) -> Tensor:
    """A zero that the last program of each launch sets back to zero; one a stream."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # belongs to the graph
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream)
    if key not in _arrived:
        _arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived[key]


_score_fwd_op = torch.library.custom_op("fastrm_triton::score_fwd", _score_fwd, mutates_args=())
_score_bwd_op = torch.library.custom_op("fastrm_triton::score_bwd", _score_bwd, mutates_args=())
_listwise_fwd_op = torch.library.custom_op(
    "fastrm_triton::listwise_fwd", _listwise_fwd, mutates_args=()
)
_listwise_bwd_op = torch.library.custom_op(
    "fastrm_triton::listwise_bwd", _listwise_bwd, mutates_args=()
)


@_score_fwd_op.register_fake
def _(hidden, weight, bias, chosen):
    M = math.prod(hidden.shape[:-1]) if chosen is None else chosen.shape[0]
    return hidden.new_empty(M, dtype=torch.promote_types(hidden.dtype, torch.float32))


@_score_bwd_op.register_fake
def _(grad, hidden, weight, chosen, needs_dhidden, needs_dweight, needs_dbias):
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    return _gradients(weight, grad, hidden.shape, hidden.dtype, *needs)


@_listwise_fwd_op.register_fake
def _(
    hidden, weight, bias, offsets, target, chosen, margin, group_weight, num_items,
    temperature, label_smoothing, center_coef, reduction, needs_grad, needs_dweight,
):  # fmt: skip
    M = math.prod(hidden.shape[:-1]) if chosen is None else chosen.shape[0]
    # A tile is made for one D, so a compiled graph is too.
    G, _ = rows.split(M, rows.tile(int(hidden.shape[-1]), hidden.dtype.itemsize), hidden.device)
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    soft = target.is_floating_point()
    N = offsets.shape[0] - 1
    return _buffers(hidden, chosen, N, G, soft, center_coef, reduction, one_pass, inverted)


@_listwise_bwd_op.register_fake
def _(
    grad, weight, chosen, offsets, target, margin, group_weight, scores, stats, divisor, pieces,
    marks, partial, inverse, hidden, shape, dtype, temperature, label_smoothing, center_coef,
    reduction, needs_dhidden, needs_dweight, needs_dbias,
):  # fmt: skip
    return _gradients(weight, scores, shape, dtype, needs_dhidden, needs_dweight, needs_dbias)
