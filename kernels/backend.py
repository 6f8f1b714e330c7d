"""The Triton kernels as a fused backend: buffers, grids, launches; operators for torch.compile.

Letters: N groups, M candidates, T rows of hidden, D hidden size, E heads, G programs.
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import triton.language as tl
from fastrm_kernels import bradley_terry, groups, listwise, plackett_luce, rows, score
from torch import Tensor

BLOCK_C = 32  # columns of dweight a program adds up
SLICES = 64  # most parts that a sum over programs is split into
COUNTERS = 4096  # arrivals counted at once, a stream
SMALL = rows.Tile(0, 0, 0, 4, 2)  # warps and registers of kernels that read no hidden states
PAIRS = rows.Tile(0, 0, 0, 4, 3)  # of those that form pairs
BLOCK_G = 512  # candidates, or groups, read together where scores alone are
BLOCK_I, BLOCK_J = 16, 32  # candidates on either side of the pairs formed together
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
        return _run(_score_fwd, _score_fwd_op, *args)

    def score_bwd(self, *args: Any) -> list[Tensor]:
        return _run(_score_bwd, _score_bwd_op, *args)

    def plackett_luce_fwd(self, *args: Any) -> tuple[Tensor, Tensor]:
        return _run(_plackett_luce_fwd, _plackett_luce_fwd_op, *args)

    def bradley_terry_fwd(self, *args: Any) -> tuple[Tensor, Tensor]:
        return _run(_bradley_terry_fwd, _bradley_terry_fwd_op, *args)

    def listwise_fwd(self, *args: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        loss, scores, *state = _run(_listwise_fwd, _listwise_fwd_op, *args)
        _, _, _, offsets, target, _, margin, group_weight, *_ = args
        return loss, scores, (offsets, target, margin, group_weight, scores, *state)

    def listwise_bwd(
        self, grad: Tensor, weight: Tensor, chosen: Tensor | None,
        state: tuple[Any, ...], hidden: Tensor | None, shape: Any, dtype: torch.dtype,
        options: tuple[float, float, float, str],
        needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
    ) -> list[Tensor]:  # fmt: skip
        return _run(
            _listwise_bwd, _listwise_bwd_op,
            grad, weight, chosen, *state, hidden, shape, dtype, *options,
            needs_dhidden, needs_dweight, needs_dbias,
        )  # fmt: skip


def _run(eager: Callable[..., Any], op: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    # A lazy negation (x.conj().imag) is not in memory; for operators the dispatcher sees to that.
    return eager(*[x.resolve_neg() if isinstance(x, Tensor) and x.is_neg() else x for x in args])


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
_launch_score_heads_fwd = _Launch(score._score_heads_fwd_kernel)
_launch_inverse = _Launch(score._inverse_kernel)
_launch_outer_heads = _Launch(score._outer_heads_kernel)
_launch_weighted_sum_heads = _Launch(score._weighted_sum_heads_kernel)
_launch_score_dot_fwd = _Launch(score._score_dot_fwd_kernel)
_launch_weighted_sum_dot = _Launch(score._weighted_sum_dot_kernel)
_launch_listwise_fwd = _Launch(listwise._listwise_fwd_kernel)
_launch_listwise_bwd = _Launch(listwise._listwise_bwd_kernel)
_launch_plackett_luce_below = _Launch(plackett_luce._plackett_luce_below_kernel)
_launch_plackett_luce_finish = _Launch(plackett_luce._plackett_luce_finish_kernel)
_launch_bradley_terry_pairs = _Launch(bradley_terry._bradley_terry_pairs_kernel)
_launch_bradley_terry_finish = _Launch(bradley_terry._bradley_terry_finish_kernel)
_launch_group_loss = _Launch(groups._group_loss_kernel)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple([None if x is None else x.dtype for x in tensors])


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _heads(weight: Tensor) -> int:
    return 1 if weight.dim() == 1 else weight.shape[0]


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Head:
    """What every launch over hidden needs: strides, sizes, tile and the split of M rows."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, chosen: Tensor | None,
        tile: Callable[[int, int], rows.Tile] = rows.tile,
    ) -> None:  # fmt: skip
        *batch, self.D = hidden.shape
        self.E = _heads(weight)
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
        self.tile = tile(self.D, hidden.element_size())
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
    scores = _new_scores(hidden, weight, head.M)
    if head.E > 1 and hidden.dtype == torch.bfloat16:
        _score_dot(head, _contiguous(bias), scores)
    elif head.M:
        many = head.E > 1
        launch = _launch_score_heads_fwd if many else _launch_score_fwd
        launch(
            head.G, hidden.device, (*head.key(), *_dtypes(bias, chosen)),
            (head.hidden, head.weight, _contiguous(bias), head.chosen, scores, head.M, head.T,
             head.S, head.per_program, *[head.E] * many, head.stride_b, head.stride_s),
            lambda: head.constants(
                HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, **head.layout()
            ),
            head.tile,
        )  # fmt: skip
    return scores


def _score_dot(head: _Head, bias: Tensor | None, scores: Tensor) -> None:
    t = rows.score_dot_tile(head.E)
    G, per_program = rows.split(head.M, t, scores.device)
    if head.M:
        _launch_score_dot_fwd(
            G * _blocks(head.E, t.D1), scores.device,
            (head.E, *head.key(), *_dtypes(bias, head.chosen)),
            (head.hidden, head.weight, bias, head.chosen, scores, head.M, head.T, head.S,
             per_program, G, head.stride_b, head.stride_s),
            lambda: dict(
                D=head.D, E=head.E, BLOCK_E=t.D1, BLOCK_D=t.D0, BLOCK_M=t.BLOCK_M,
                PIECES=1 if head.weight.dtype == torch.bfloat16 else 3, HAS_BIAS=bias is not None,
                HAS_ROWS=head.chosen is not None, **head.layout(),
            ),
            t,
        )  # fmt: skip


def _new_scores(hidden: Tensor, weight: Tensor, M: int) -> Tensor:
    E = _heads(weight)
    return hidden.new_empty((M, E) if E > 1 else (M,), dtype=_acc(hidden.dtype))


def _score_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, chosen: Optional[Tensor],  # noqa: UP045
    needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool,
) -> list[Tensor]:  # fmt: skip
    head = _Head(hidden, weight, chosen)
    grad = grad.contiguous()
    dhidden = dweight = dbias = grad.new_empty(0)
    if head.E > 1:
        return [
            _outer_heads(head, grad, hidden) if needs_dhidden else dhidden,
            _weighted_sum_heads(head, weight, grad) if needs_dweight else dweight,
            grad.sum(0) if needs_dbias else dbias,
        ]
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


def _outer_heads(head: _Head, coef: Tensor, hidden: Tensor) -> Tensor:
    """Σ_e coef_ie w_e in the row of candidate i, 0 in the others; coef (M, E)."""
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    inverse = None
    if head.chosen is not None and head.M:
        inverse = head.chosen.new_empty(head.T, dtype=torch.int32)
        _launch_inverse(
            _blocks(head.M, BLOCK_G), hidden.device, _dtypes(head.chosen),
            (head.chosen, inverse, head.M, head.T), lambda: dict(BLOCK=BLOCK_G), SMALL,
        )  # fmt: skip
    if head.M == 0:
        return dhidden.zero_()
    t = rows.outer_tile(head.D, hidden.element_size())
    parts = _blocks(head.D, t.D0)
    G, per_program = rows.split(head.T, t, hidden.device, parts)
    _launch_outer_heads(
        G * parts, hidden.device, (head.E, *head.key(), *_dtypes(coef, head.chosen)),
        (coef, head.weight, head.chosen, inverse, dhidden, head.M, head.T, per_program, G),
        lambda: dict(
            D=head.D, E=head.E, HELD=min(head.E, t.D1), BLOCK_D=t.D0, BLOCK_M=t.BLOCK_M,
            ACC=head.constants()["ACC"], HAS_ROWS=head.chosen is not None,
        ),
        t,
    )  # fmt: skip
    return dhidden


def _weighted_sum(head: _Head, weight: Tensor, coef: Tensor) -> Tensor:
    """Σ coef_i h_i, in weight's shape and dtype; coef (M,)."""
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
    return _sum_partials(head, weight, partial, key)


def _weighted_sum_heads(head: _Head, weight: Tensor, coef: Tensor) -> Tensor:
    """Σ_i coef_ie h_i, in weight's shape and dtype; coef (M, E)."""
    dot = head.hidden.dtype == torch.bfloat16
    t = rows.sum_dot_tile(head.E) if dot else rows.heads_tile(head.D, head.E)
    parts = _blocks(head.D, t.D0) * _blocks(head.E, t.D1)
    G, per_program = rows.split(head.M, t, weight.device, parts)
    partial = coef.new_empty(G, head.E * head.D)
    key = (head.E, *head.key(), *_dtypes(coef))
    if head.M:
        # A row that counts for no head, which may hold NaN, is left out like one that is not there.
        chosen = torch.arange(head.M, device=coef.device) if head.chosen is None else head.chosen
        chosen = chosen.long().masked_fill(~coef.any(1), -1)
        launch = _launch_weighted_sum_dot if dot else _launch_weighted_sum_heads
        launch(
            G * parts, weight.device, key,
            (head.hidden, coef, chosen, partial, head.M, head.T, head.S, per_program, G,
             head.stride_b, head.stride_s),
            lambda: dict(
                D=head.D, E=head.E, BLOCK_E=t.D1, BLOCK_D=t.D0, BLOCK_M=t.BLOCK_M,
                **({} if dot else dict(ACC=head.constants()["ACC"])), **head.layout(),
            ),
            t,
        )  # fmt: skip
    return _sum_partials(head, weight, partial, key)


def _sum_partials(head: _Head, weight: Tensor, partial: Tensor, key: tuple[Any, ...]) -> Tensor:
    """The sum of the rows of partial (G, D) or (G, E·D), in weight's shape and dtype."""
    dweight = weight.new_empty(weight.shape)
    G, size = partial.shape
    _launch_sum_partials(
        _blocks(size, BLOCK_C), weight.device, (size, *key), (partial, dweight, G),
        lambda: dict(D=size, BLOCK_P=32, BLOCK_C=BLOCK_C, ACC=head.constants()["ACC"]), head.tile,
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
    head = _Head(hidden, weight, chosen, rows.forward_tile)
    M, N, G = head.M, offsets.shape[0] - 1, head.G
    soft = target.is_floating_point()
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    buffers = _buffers(
        hidden, M, N, head.T, G, head.tile, soft, center_coef, reduction, one_pass, inverted
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
    hidden: Tensor, M: int, N: int, T: int, G: int, t: rows.Tile, soft: bool, center_coef: float,
    reduction: str, one_pass: bool, inverted: bool,
) -> list[Tensor]:  # fmt: skip
    partial = 3 * hidden.shape[-1] * G if one_pass else 0
    new, acc = hidden.new_empty, _acc(hidden.dtype)
    return [
        new((N,) if reduction == "none" else (), dtype=acc),  # loss
        new(M, dtype=acc),  # scores
        new(partial + _state_size(G, N, t, soft, center_coef), dtype=acc),  # state
        new(_pieces(G) * listwise.MARKS.value + (T if inverted else 0), dtype=torch.int32),  # index
    ]


def _pieces(G: int) -> int:
    return G + 2 * (G // listwise.FAN.value)


def _state_size(G: int, N: int, t: rows.Tile, soft: bool, center_coef: float) -> int:
    """Numbers in state beside partial."""
    notes = G * (listwise.NOTES.value + 2 * t.BLOCK_M)
    return 1 + _pieces(G) * listwise.PIECES.value + (4 if soft or center_coef else 2) * N + notes


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
    soft = target.is_floating_point()
    t = rows.write_tile(D, plain=not soft and center_coef == 0)
    forward_t = rows.forward_tile(D, dtype.itemsize)
    dhidden, dweight, dbias = _gradients(
        weight, scores, shape, dtype, center_coef, needs_dhidden, needs_dweight, needs_dbias
    )
    if M == 0 or N == 0:
        return [dhidden.zero_(), dweight.zero_(), dbias.zero_()]
    G, _ = rows.split(M, forward_t, weight.device)
    # what forward was told
    one_pass = state.numel() > _state_size(G, N, forward_t, soft, center_coef)
    again = needs_dweight and not one_pass
    wants_coef = again or (needs_dbias and center_coef != 0)
    coef = scores.new_empty(M) if needs_dhidden or wants_coef else None
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
             needs_dhidden, zero is None, sums is None, coef is None, one_pass,
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
                SLICED=sums is not None, ZERO=zero is not None, ROWS=t.ROWS,
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


def _plackett_luce_fwd(
    scores: Tensor, offsets: Tensor, ranks: Tensor, position_weight: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], num_items: Optional[Tensor], temperature: float,  # noqa: UP045
    center_coef: float, reduction: str, needs_coef: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss () or (N,) and, where needed, its derivative by each score (M,)."""
    scores, offsets, ranks, position_weight = _all_contiguous(
        scores, offsets, ranks, position_weight
    )
    loss, coef = _ranking_outputs(scores, offsets, reduction, needs_coef)
    M, N, device = scores.shape[0], offsets.shape[0] - 1, scores.device
    if M == 0 or N == 0:
        return _nothing_to_rank(loss, coef, M, N)
    order = _order(offsets, ranks)
    block, fan = rows.scan_blocks(device)
    per_program = _blocks(_blocks(M, block), fan) * block
    G = _blocks(M, per_program)
    terms, below, stats, pieces = scores.new_empty(
        3 * M + 3 * N + 8 * fan, dtype=torch.float64
    ).split([M, 2 * M, 3 * N, 8 * fan])
    after, before = pieces.split(4 * fan)
    steps = N.bit_length()
    key = (G == 1, reduction, needs_coef, *_dtypes(scores, offsets, ranks, position_weight))
    inputs = (scores, offsets, ranks, position_weight, order)
    sizes = (M, N, steps, per_program, G, temperature)
    constants = dict(
        HAS_POSITION_WEIGHT=position_weight is not None, ONE_PROGRAM=G == 1, BLOCK=block, FAN=fan
    )
    for final in (False, True) if G > 1 else (True,):
        _launch_plackett_luce_below(
            G, device, (final, *key), (*inputs, after, before, terms, below, *sizes),
            lambda: constants | dict(FINAL=final, COEF=needs_coef), SMALL,  # noqa: B023
        )  # fmt: skip
    _group_loss(
        terms, None, scores, offsets, ranks, group_weight, num_items, loss, stats, center_coef,
        reduction,
    )  # fmt: skip
    if needs_coef or reduction != "none":
        _launch_plackett_luce_finish(
            1 + G * needs_coef, device, key,
            (*inputs, before, below, stats, loss, coef, *sizes),
            lambda: constants | dict(REDUCTION=reduction), SMALL,
        )  # fmt: skip
    return loss, coef


def _bradley_terry_fwd(
    scores: Tensor, offsets: Tensor, ranks: Tensor, margin: Optional[Tensor],  # noqa: UP045
    group_weight: Optional[Tensor], num_items: Optional[Tensor], temperature: float,  # noqa: UP045
    center_coef: float, reduction: str, needs_coef: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss () or (N,) and, where needed, its derivative by each score (M,)."""
    scores, offsets, ranks, margin = _all_contiguous(scores, offsets, ranks, margin)
    loss, coef = _ranking_outputs(scores, offsets, reduction, needs_coef)
    M, N, device = scores.shape[0], offsets.shape[0] - 1, scores.device
    if M == 0 or N == 0:
        return _nothing_to_rank(loss, coef, M, N)
    terms, slopes, stats = scores.new_empty(2 * M + 3 * N, dtype=torch.float64).split(
        [M, M, 3 * N]
    )
    pairs = scores.new_empty(M, dtype=torch.int32)
    steps = N.bit_length()
    key = (needs_coef, reduction, *_dtypes(scores, offsets, ranks, margin))
    _launch_bradley_terry_pairs(
        _blocks(M, BLOCK_I), device, (center_coef != 0, *key),
        (scores, offsets, ranks, margin, terms, pairs, slopes, M, N, steps, temperature,
         center_coef),
        lambda: dict(
            HAS_MARGIN=margin is not None, CENTER=center_coef != 0, COEF=needs_coef,
            BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J,
        ),
        PAIRS,
    )  # fmt: skip
    _group_loss(
        terms, pairs, scores, offsets, ranks, group_weight, num_items, loss, stats, 0.0, reduction
    )
    if needs_coef or reduction != "none":
        _launch_bradley_terry_finish(
            1 + _blocks(M, BLOCK_G) * needs_coef, device, key,
            (offsets, slopes, stats, loss, coef, M, N, steps),
            lambda: dict(REDUCTION=reduction, BLOCK=BLOCK_G), SMALL,
        )  # fmt: skip
    return loss, coef


def _group_loss(
    terms: Tensor, pairs: Tensor | None, scores: Tensor, offsets: Tensor, ranks: Tensor,
    group_weight: Tensor | None, num_items: Tensor | None, loss: Tensor, stats: Tensor,
    center_coef: float, reduction: str,
) -> None:  # fmt: skip
    """Loss and weight of each group into stats, as groups.py describes."""
    _launch_group_loss(
        offsets.shape[0] - 1, scores.device,
        (center_coef != 0, reduction,
         *_dtypes(pairs, scores, offsets, ranks, group_weight, num_items)),
        (terms, pairs, scores, offsets, ranks, _contiguous(group_weight), num_items, loss, stats,
         scores.shape[0], offsets.shape[0] - 1, center_coef),
        lambda: dict(
            PAIRS=pairs is not None, CENTER=center_coef != 0,
            HAS_GROUP_WEIGHT=group_weight is not None, HAS_NUM_ITEMS=num_items is not None,
            REDUCTION=reduction, BLOCK=BLOCK_G,
        ),
        SMALL,
    )  # fmt: skip


def _all_contiguous(*tensors: Any) -> list[Any]:
    return [_contiguous(x) for x in tensors]


def _ranking_outputs(
    scores: Tensor, offsets: Tensor, reduction: str, needs_coef: bool
) -> tuple[Tensor, Tensor]:
    M, N = scores.shape[0], offsets.shape[0] - 1
    if M >= rows.MOST:
        raise ValueError(f"at most {rows.MOST} candidates, got {M}")
    return (
        scores.new_empty((N,) if reduction == "none" else ()),
        scores.new_empty(M if needs_coef else 0),
    )


def _nothing_to_rank(loss: Tensor, coef: Tensor, M: int, N: int) -> tuple[Tensor, Tensor]:
    """No groups: 0; groups without candidates are invalid."""
    if M > 0:
        raise ValueError(f"offsets must end at the {M} candidates, got no group")
    return loss.fill_(math.nan if N else 0.0), coef


def _order(offsets: Tensor, ranks: Tensor) -> Tensor:
    """Candidates by group and rank, the unranked last; whatever offsets hold, all of them once."""
    group = torch.searchsorted(
        offsets[1:].long(), torch.arange(ranks.shape[0], device=ranks.device), right=True
    )
    last = (ranks.long() - 1).masked_fill(ranks < 0, torch.iinfo(torch.int64).max)
    order = last.argsort(stable=True)
    return order.index_select(0, group.index_select(0, order).argsort(stable=True))


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
_plackett_luce_fwd_op = torch.library.custom_op(
    "fastrm_triton::plackett_luce_fwd", _plackett_luce_fwd, mutates_args=()
)
_bradley_terry_fwd_op = torch.library.custom_op(
    "fastrm_triton::bradley_terry_fwd", _bradley_terry_fwd, mutates_args=()
)


@_plackett_luce_fwd_op.register_fake
@_bradley_terry_fwd_op.register_fake
def _(
    scores, offsets, ranks, extra, group_weight, num_items, temperature, center_coef, reduction,
    needs_coef,
):  # fmt: skip
    return _ranking_outputs(scores, offsets, reduction, needs_coef)


@_score_fwd_op.register_fake
def _(hidden, weight, bias, chosen):
    M = math.prod(hidden.shape[:-1]) if chosen is None else chosen.shape[0]
    return _new_scores(hidden, weight, M)


@_score_bwd_op.register_fake
def _(grad, hidden, weight, chosen, needs_dhidden, needs_dweight, needs_dbias):
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    dhidden, dweight, dbias = _gradients(weight, grad, hidden.shape, hidden.dtype, 1.0, *needs)
    return [dhidden, dweight, grad.sum(0) if needs_dbias else dbias]


@_listwise_fwd_op.register_fake
def _(
    hidden, weight, bias, offsets, target, chosen, margin, group_weight, num_items,
    temperature, label_smoothing, center_coef, reduction, needs_grad, needs_dweight,
):  # fmt: skip
    T = math.prod(hidden.shape[:-1])
    M = T if chosen is None else chosen.shape[0]
    # A tile is made for one D, so a compiled graph is too.
    t = rows.forward_tile(int(hidden.shape[-1]), hidden.dtype.itemsize)
    G, _ = rows.split(M, t, hidden.device)
    one_pass, inverted = _plan(chosen, reduction, center_coef, needs_grad, needs_dweight)
    soft = target.is_floating_point()
    N = offsets.shape[0] - 1
    return _buffers(hidden, M, N, T, G, t, soft, center_coef, reduction, one_pass, inverted)


@_listwise_bwd_op.register_fake
def _(
    grad, weight, chosen, offsets, target, margin, group_weight, scores, state, index, hidden,
    shape, dtype, temperature, label_smoothing, center_coef, reduction,
    needs_dhidden, needs_dweight, needs_dbias,
):  # fmt: skip
    needs = (needs_dhidden, needs_dweight, needs_dbias)
    return _gradients(weight, scores, shape, dtype, center_coef, *needs)
