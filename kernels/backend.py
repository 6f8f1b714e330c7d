"""The Triton kernels as a fused backend: buffers, grids, launches; operators for torch.compile.

Letters: N groups, M candidates, T rows of hidden, D hidden size, G programs.
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import triton.language as tl
from fastrm_kernels import listwise, rows, score
from torch import Tensor

BLOCK_C = 32  # columns of dweight a program adds up
SLICES = 64  # most parts that a sum over programs is split into
COUNTERS = 4096  # arrivals counted at once, a stream
_counters: dict[tuple[torch.device, int], Tensor] = {}


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


class _Launch:
    """Launches one kernel; Triton is asked which compiled form fits only for keys not seen before.

    The key holds all that a compiled form depends on: every constant, the dtypes of the tensors
    given, and what Triton specialises on: of hidden and weight whether they begin at a multiple of
    16 bytes (what is allocated here does), of strides whether they take 64 bits.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, programs: int, device: torch.device, key: tuple[Any, ...], args: tuple[Any, ...],
        constants: Callable[[], dict[str, Any]], t: rows.Tile,
    ) -> None:  # fmt: skip
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(programs, device, key, args, constants, t)
        found = self.compiled.get((device, key))
        if found is not None:
            compiled, values = found
            compiled[(programs, 1, 1)](*args, *values)
            return
        named = constants()
        compiled = self.kernel[(programs,)](*args, **named, **rows.options(t))
        if compiled is not None:  # the interpreter compiles nothing
            values = tuple(named[x] for x in self.kernel.arg_names[len(args):])
            self.compiled[device, key] = compiled, values


_launch_score_fwd = _Launch(score._score_fwd_kernel)
_launch_rank1 = _Launch(score._rank1_kernel)
_launch_weighted_sum = _Launch(score._weighted_sum_kernel)
_launch_sum_partials = _Launch(score._sum_partials_kernel)
_launch_listwise_fwd = _Launch(listwise._listwise_fwd_kernel)
_launch_listwise_bwd = _Launch(listwise._listwise_bwd_kernel)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple([None if x is None else x.dtype for x in tensors])


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Head:
    """What every launch over hidden needs: strides, sizes, tile and the split of M rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, chosen: Tensor | None) -> None:
        *batch, self.D = hidden.shape
        self.T = math.prod(batch)
        self.M = self.T if chosen is None else chosen.shape[0]
        if self.T >= rows.MOST or self.M >= rows.MOST:
            raise ValueError(f"at most {rows.MOST} rows, got {max(self.T, self.M)}")
        if self.M > 0 and self.T == 0:
            raise ValueError("rows names candidates, and hidden has no row")
        self.chosen = _contiguous(chosen)
        self.weight = weight.contiguous()
        self.hidden, self.S, self.stride_b, self.stride_s = rows.row_strides(hidden)
        self.align = math.gcd(self.stride_b, self.stride_s, 16)
        self.tile = rows.tile(self.D, hidden.element_size())
        self.G, self.per_program = rows.split(self.M, self.tile, hidden.device)

    def key(self) -> tuple[Any, ...]:
        """All that the compiled form of a kernel that reads hidden gets from hidden and weight."""
        return (
            self.D, self.hidden.dtype, self.weight.dtype, _aligned(self.hidden),
            _aligned(self.weight), self.S != 1, self.align, self.stride_b >= 2**31,
            self.stride_s >= 2**31,
        )  # fmt: skip

    def layout(self) -> dict[str, Any]:
        return dict(BATCHED=self.S != 1, ALIGN=self.align)

    def constants(self, **more: Any) -> dict[str, Any]:
        return _constants(self.D, self.tile, self.hidden.dtype) | more


def _constants(D: int, t: rows.Tile, dtype: torch.dtype) -> dict[str, Any]:
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(D=D, D0=t.D0, D1=t.D1, BLOCK_M=t.BLOCK_M, ACC=acc)


def _score_fwd(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], chosen: Optional[Tensor]  # noqa: UP045
) -> Tensor:
    head = _Head(hidden, weight, chosen)
    scores = hidden.new_empty(head.M, dtype=_acc(hidden.dtype))
    if head.M:
        _launch_score_fwd(
            head.G, hidden.device, (*head.key(), *_dtypes(bias, chosen)),
            (head.hidden, head.weight, bias, head.chosen, scores, head.M, head.T, head.S,
             head.per_program, head.stride_b, head.stride_s),
            lambda: head.constants(
                HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, **head.layout()
            ),
            head.tile,
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
            _launch_rank1(
                head.G, hidden.device, (*head.key(), *_dtypes(grad, chosen)),
                (grad, head.weight, head.chosen, dhidden, head.M, head.T, head.per_program),
                lambda: head.constants(HAS_ROWS=chosen is not None), head.tile,
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
    key = (*head.key(), *_dtypes(coef, head.chosen))
    if head.M:
        _launch_weighted_sum(
            head.G, weight.device, key,
            (head.hidden, coef, head.chosen, partial, head.M, head.T, head.S, head.per_program,
             head.stride_b, head.stride_s),
            lambda: head.constants(HAS_ROWS=head.chosen is not None, **head.layout()),
            head.tile,
        )  # fmt: skip
    _launch_sum_partials(
        _blocks(head.D, BLOCK_C), weight.device, key, (partial, dweight, head.G),
        lambda: dict(D=head.D, BLOCK_P=32, BLOCK_C=BLOCK_C, ACC=head.constants()["ACC"]), head.tile,
    )  # fmt: skip
    return dweight


def _listwise_fwd(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], offsets: Tensor,  # noqa: UP045
    target: Tensor, chosen: Optional[Tensor], margin: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], num_items: Optional[Tensor], temperature: float,  # noqa: UP045
    label_smoothing: float, center_coef: float, reduction: str, needs_grad: bool,
    needs_dweight: bool,
) -> list[Tensor]:  # fmt: skip
    """Loss, scores, and the two buffers that listwise.py describes: state and index."""
    head = _Head(hidden, weight, chosen)
    M, N, G = head.M, offsets.shape[0] - 1, head.G
    soft = target.is_floating_point()
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    buffers = _buffers(
        hidden, M, N, head.T, G, soft, center_coef, reduction, one_pass, inverted
    )
    loss, scores, state, index = buffers
    if M == 0 or N == 0:
        loss.zero_()
        return buffers
    _launch_listwise_fwd(
        G, hidden.device,
        (*head.key(), G == 1, label_smoothing != 0, center_coef != 0, reduction, one_pass, inverted,
         *_dtypes(bias, offsets, target, chosen, margin, group_weight, num_items)),
        (head.hidden, head.weight, bias, offsets.contiguous(), target.contiguous(), head.chosen,
         _contiguous(margin), _contiguous(group_weight), num_items, loss, scores, state, index,
         _arrivals(hidden.device), M, N, head.T, head.S, head.per_program, G,
         head.stride_b, head.stride_s, temperature, label_smoothing, center_coef),
        lambda: head.constants(
            ONE_PROGRAM=G == 1, SOFT=soft, SMOOTH=label_smoothing != 0, CENTER=center_coef != 0,
            HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, **head.layout(),
            HAS_MARGIN=margin is not None, HAS_GROUP_WEIGHT=group_weight is not None,
            HAS_NUM_ITEMS=num_items is not None, REDUCTION=reduction, DWEIGHT=one_pass,
            INVERSE=inverted,
        ),
        head.tile,
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
    hidden: Tensor, M: int, N: int, T: int, G: int, soft: bool, center_coef: float,
    reduction: str, one_pass: bool, inverted: bool,
) -> list[Tensor]:  # fmt: skip
    partial = 3 * hidden.shape[-1] * G if one_pass else 0
    new, acc = hidden.new_empty, _acc(hidden.dtype)
    return [
        new((N,) if reduction == "none" else (), dtype=acc),  # loss
        new(M, dtype=acc),  # scores
        new(partial + _state_size(G, N, soft, center_coef), dtype=acc),  # state
        new(_pieces(G) * listwise.MARKS.value + (T if inverted else 0), dtype=torch.int32),  # index
    ]


def _pieces(G: int) -> int:
    return G + 2 * (G // listwise.FAN.value)


def _state_size(G: int, N: int, soft: bool, center_coef: float) -> int:
    """Numbers in state beside partial."""
    return 1 + _pieces(G) * listwise.PIECES.value + (4 if soft or center_coef else 2) * N


def _listwise_bwd(
    grad: Tensor, weight: Tensor, chosen: Optional[Tensor], offsets: Tensor,  # noqa: UP045
    target: Tensor, margin: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], scores: Tensor, state: Tensor, index: Tensor,  # noqa: UP045
    hidden: Optional[Tensor], shape: list[int], dtype: torch.dtype,  # noqa: UP045
    temperature: float, label_smoothing: float, center_coef: float, reduction: str,
    needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    """dhidden, dweight and dbias; empty where not needed."""
    *batch, D = shape
    T, M, N = math.prod(batch), scores.shape[0], offsets.shape[0] - 1
    t = rows.tile(D, dtype.itemsize)
    dhidden, dweight, dbias = _gradients(
        weight, scores, shape, dtype, center_coef, needs_dhidden, needs_dweight, needs_dbias
    )
    if M == 0 or N == 0:
        return [dhidden.zero_(), dweight.zero_(), dbias.zero_()]
    G, _ = rows.split(M, t, weight.device)
    soft = target.is_floating_point()
    one_pass = state.numel() > _state_size(G, N, soft, center_coef)  # what forward was told
    again = needs_dweight and not one_pass
    wants_coef = again or (needs_dbias and center_coef != 0)
    coef = torch.empty_like(scores) if wants_coef else None
    zero = dbias if needs_dbias and center_coef == 0 else None
    programs, per_program, rows_per_program = 0, 1, 1
    if needs_dhidden or wants_coef:
        programs, rows_per_program = rows.split(T, t, weight.device)
        per_program = _blocks(_blocks(M, programs), t.BLOCK_M) * t.BLOCK_M
    columns, block_p = _blocks(D, BLOCK_C), max(4 * t.num_warps, 8)
    slices, sums = 0, None
    if needs_dweight and one_pass:
        slices = min(_blocks(G, 2 * block_p), SLICES) if columns <= COUNTERS else 1
        sums = scores.new_empty(slices * D) if slices > 1 else None
    if needs_dhidden or needs_dweight or wants_coef:
        weight_d = weight.contiguous()
        _launch_listwise_bwd(
            programs + slices * columns, weight.device,
            (D, dtype, _aligned(weight_d), label_smoothing != 0, center_coef != 0, reduction,
             needs_dhidden, zero is None, sums is None, wants_coef, one_pass,
             *_dtypes(grad, weight, offsets, target, chosen, margin, group_weight)),
            (grad.contiguous(), weight_d, offsets.contiguous(), target.contiguous(),
             _contiguous(chosen), _contiguous(margin), _contiguous(group_weight), scores, state,
             index, sums, _arrivals(weight.device), dhidden, dweight,
             zero, coef, M, N, T, per_program, rows_per_program, slices, G,
             temperature, label_smoothing, center_coef),
            lambda: _constants(D, t, dtype) | dict(
                BLOCK_C=BLOCK_C, BLOCK_P=block_p, SOFT=soft,
                SMOOTH=label_smoothing != 0, CENTER=center_coef != 0, HAS_ROWS=chosen is not None,
                HAS_MARGIN=margin is not None, HAS_GROUP_WEIGHT=group_weight is not None,
                REDUCTION=reduction, DHIDDEN=needs_dhidden, PARTIAL=one_pass,
                SLICED=sums is not None, ZERO=zero is not None, COEF=wants_coef,
            ),
            t,
        )  # fmt: skip
    elif needs_dbias:
        dbias.zero_()
    if again:
        assert hidden is not None and coef is not None
        dweight = _weighted_sum(_Head(hidden, weight, chosen), weight, coef)
    if needs_dbias and center_coef != 0:
        assert coef is not None
        dbias = coef.sum()
    return [dhidden, dweight, dbias]


def _gradients(
    weight: Tensor, scores: Tensor, shape: Any, dtype: torch.dtype, center_coef: float,
    needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    """A shift of the scores leaves a softmax as it is: dbias is 0, in any dtype, but for centring.
    """
    return [
        weight.new_empty(shape if needs_dhidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        (scores if center_coef else weight).new_empty(() if needs_dbias else (0,)),
    ]


def _arrivals(device: torch.device) -> Tensor:
    """Zeros that the last programs of each launch set back to zero; one set a stream."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)  # belongs to the graph
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


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
    return hidden.new_empty(M, dtype=_acc(hidden.dtype))


@_score_bwd_op.register_fake
def _(grad, hidden, weight, chosen, needs_dhidden, needs_dweight, needs_dbias):
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    return _gradients(weight, grad, hidden.shape, hidden.dtype, 1.0, *needs)


@_listwise_fwd_op.register_fake
def _(
    hidden, weight, bias, offsets, target, chosen, margin, group_weight, num_items,
    temperature, label_smoothing, center_coef, reduction, needs_grad, needs_dweight,
):  # fmt: skip
    T = math.prod(hidden.shape[:-1])
    M = T if chosen is None else chosen.shape[0]
    # A tile is made for one D, so a compiled graph is too.
    G, _ = rows.split(M, rows.tile(int(hidden.shape[-1]), hidden.dtype.itemsize), hidden.device)
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    soft = target.is_floating_point()
    N = offsets.shape[0] - 1
    return _buffers(hidden, M, N, T, G, soft, center_coef, reduction, one_pass, inverted)


@_listwise_bwd_op.register_fake
def _(
    grad, weight, chosen, offsets, target, margin, group_weight, scores, state, index, hidden,
    shape, dtype, temperature, label_smoothing, center_coef, reduction,
    needs_dhidden, needs_dweight, needs_dbias,
):  # fmt: skip
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    return _gradients(weight, scores, shape, dtype, center_coef, *needs)
