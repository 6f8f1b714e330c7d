"""The public functions: argument checks, then one dispatch to a backend.

Letters: N groups, M candidates, T rows of hidden, D hidden size, K_n candidates of group n.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastrm import backends, ops
from fastrm.reference import listwise_loss_ref, score_ref

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_REDUCTIONS = ("mean", "sum", "none")
IGNORE_INDEX = -100


def listwise_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    target: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Any:
    """Listwise softmax cross entropy of a linear head over ragged groups, in one fused pass.

    With scores ``s_i = w·h_i + b``, logits ``z_i = (s_i + margin_i [i no target]) / temperature``
    and the target distribution ``q`` of group n (smoothed to ``(1-ε) q + ε/K_n``)::

        loss_n = group_weight_n · ( -Σ_i q_i log softmax(z)_i + center_coef · (2 · mean_i s_i)² )

    This is the top-one ListNet loss (Cao et al., 2007, eq. 5); with one positive and K = 2 it is
    the Bradley-Terry loss ``-log σ(s_best - s_other)`` of InstructGPT (Ouyang et al., 2022, eq. 1).
    The centring term is the auxiliary loss of Eisenstein et al. (2023), equal to TRL's
    ``center_rewards_coefficient`` at K = 2.

    Args:
        hidden: (T, D) or (B, S, D) float64/32/16 or bfloat16, any strides: hidden states.
        weight: (D,) or (1, D) floating, the head.
        bias: () or (1,) floating, or None. Its gradient is exactly 0 unless `center_coef` is set,
            because the softmax does not see a shift.
        offsets: (N+1,) integer; candidates ``offsets[n]:offsets[n+1]`` form group n. Starts at 0,
            strictly increasing, ends at M. See `offsets_from_sizes`.
        target: (N,) integer, position of the best candidate inside its group, or -100 to leave
            the group out; or (M,) floating, a distribution over each group (each sums to 1).
        rows: (M,) integer, distinct: candidate i is row ``rows[i]`` of ``hidden.reshape(-1, D)``.
            None: row i.
        temperature: divides the logits; > 0.
        label_smoothing: ε in [0, 1], as in `torch.nn.functional.cross_entropy`.
        margin: (M,) floating, added to the scores of candidates that are not targets; detached.
        group_weight: (N,) floating, multiplies each group's loss; the divisor does not see it.
        center_coef: weight of the centring term, >= 0.
        reduction: "mean" over the groups not left out, "sum", or "none" for one loss a group.
        num_items_in_batch: the divisor of "mean", an int or 0-d tensor: the number of groups of
            the whole optimiser step under gradient accumulation or data parallelism.
        return_scores: also return the scores.
        backend: None chooses; "triton", "cpp" or "torch" is that one or an error.

    Returns:
        The loss, fp32 (fp64 for fp64 hidden): () or, for "none", (N,). With `return_scores`,
        ``(loss, scores)`` with scores (M,) in the loss's dtype, detached. Differentiable once,
        with respect to hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. On CPU values are
            checked too. On CUDA they are not (it would cost a synchronisation) unless
            FASTRM_CHECK=1 is set: there a group with invalid input gives NaN.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    # On the CPU every function called here counts: a small batch costs as much as ten of them.
    if backend in backends.CPU_IS_CPP and isinstance(hidden, Tensor) and hidden.is_cpu:
        name = "cpp"
    else:
        name = backends.choose(_device_type(hidden), backend)
    num_items = num_items_in_batch
    if name == "cpp":
        # The operator checks everything itself; what it refuses is then said in the usual words.
        try:
            if num_items is not None:
                num_items = _divisor(num_items, reduction, hidden.device)
            if temperature != 1.0 or label_smoothing or center_coef:
                _check_options(temperature, label_smoothing, center_coef, reduction)
            loss, scores = backends.FUSED["cpp"].listwise_loss(
                hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
                temperature, label_smoothing, center_coef, reduction,
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            num_items = _check(
                hidden, weight, bias, offsets, target, rows, margin, group_weight, temperature,
                label_smoothing, center_coef, reduction, num_items_in_batch,
            )  # fmt: skip
            _check_values(hidden, offsets, target, rows, margin, group_weight, num_items)
            raise
        return (loss, scores) if return_scores else loss
    groups = (offsets, target, rows, margin, group_weight)
    options = (temperature, label_smoothing, center_coef, reduction)
    num_items = _check(hidden, weight, bias, *groups, *options, num_items_in_batch)
    if backends.check_values(hidden.device.type, name):
        _check_values(hidden, *groups, num_items)
    if name == "torch":
        # Added times 0, so that the gradient of a shift is 0 and not rounding noise.
        shift = bias if bias is None or center_coef else bias.detach() + 0.0 * bias
        with torch.autocast(hidden.device.type, enabled=False):
            scores = score_ref(hidden, weight, shift, rows)
            loss = listwise_loss_ref(
                scores, offsets, target.detach(), _constant(margin), _constant(group_weight),
                _constant(num_items), temperature, label_smoothing, center_coef, reduction,
            )  # fmt: skip
        scores = scores.detach()
    else:
        loss, scores = ops.listwise_loss(
            hidden, weight, bias, *groups, num_items, float(temperature),
            float(label_smoothing), float(center_coef), reduction,
        )  # fmt: skip
    return (loss, scores) if return_scores else loss


def listwise_loss_from_scores(
    scores: Tensor,
    *,
    offsets: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`listwise_loss` for trainers that already have the scores.

    Args:
        scores: (M,) floating, one score a candidate; used in fp32 at least.
        offsets, target, temperature, label_smoothing, margin, group_weight, center_coef,
        reduction, num_items_in_batch, backend: as in `listwise_loss`.

    Returns:
        The loss, fp32 (fp64 for fp64 scores): () or (N,); differentiable with respect to scores.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    _check_tensor("scores", scores, _FLOATS)
    if scores.dim() != 1:
        _refuse("scores", "have shape (M,)", tuple(scores.shape))
    # A head of one unit weight over hidden states of size 1: h·1 is exact.
    one = torch.ones(1, dtype=scores.dtype, device=scores.device)
    return listwise_loss(
        scores.unsqueeze(-1), one, offsets=offsets, target=target, temperature=temperature,
        label_smoothing=label_smoothing, margin=margin, group_weight=group_weight,
        center_coef=center_coef, reduction=reduction, num_items_in_batch=num_items_in_batch,
        backend=backend,
    )  # fmt: skip


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores ``w·h_i + b`` of the chosen rows, never rounded to the input type.

    Args:
        hidden: (T, D) or (B, S, D) floating: hidden states.
        weight: (D,) or (1, D) floating, the head.
        bias: () or (1,) floating, or None.
        rows: (M,) integer, distinct rows of ``hidden.reshape(-1, D)``; None: all of them.
        backend: as in `listwise_loss`.

    Returns:
        (M,) scores, fp32 (fp64 for fp64 hidden), differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    name = backends.choose(_device_type(hidden), backend)
    if name == "cpp":
        try:
            return backends.FUSED["cpp"].score(hidden, weight, bias, rows)
        except (TypeError, ValueError, RuntimeError):
            T, _ = _check_head(hidden, weight, bias, rows)
            if rows is not None:
                _check_rows(rows, T)
            raise
    T, _ = _check_head(hidden, weight, bias, rows)
    if rows is not None and backends.check_values(hidden.device.type, name):
        _check_rows(rows, T)
    if name == "torch":
        with torch.autocast(hidden.device.type, enabled=False):
            return score_ref(hidden, weight, bias, rows)
    return ops.score(hidden, weight, bias, rows)


def _device_type(hidden: Any) -> str:
    _check_tensor("hidden", hidden, _FLOATS)
    return hidden.device.type


def _constant(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.detach()


def _refuse(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{name} must {expected}, got {got}")


def _check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {kinds}, got {x.dtype}")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        _refuse(name, f"be on hidden's device {device}", x.device)


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[int, int]:
    """Shapes, dtypes and devices of the head's arguments; returns T and D."""
    _check_tensor("hidden", hidden, _FLOATS)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        _refuse("hidden", "have shape (T, D) or (B, S, D) with D >= 1", tuple(hidden.shape))
    D = hidden.shape[-1]
    T = hidden.shape[0] if hidden.dim() == 2 else hidden.shape[0] * hidden.shape[1]
    _check_tensor("weight", weight, _FLOATS)
    if weight.shape != (D,) and weight.shape != (1, D):
        _refuse("weight", f"have shape ({D},) or (1, {D}) to fit hidden", tuple(weight.shape))
    _check_device("weight", weight, hidden.device)
    if bias is not None:
        _check_tensor("bias", bias, _FLOATS)
        if bias.shape != () and bias.shape != (1,):
            _refuse("bias", "have shape () or (1,)", tuple(bias.shape))
        _check_device("bias", bias, hidden.device)
    if rows is not None:
        _check_tensor("rows", rows, _INTS)
        if rows.dim() != 1:
            _refuse("rows", "have shape (M,)", tuple(rows.shape))
        _check_device("rows", rows, hidden.device)
    return T, D


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    target: Tensor,
    rows: Tensor | None,
    margin: Tensor | None,
    group_weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
    center_coef: float,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
) -> Tensor | None:
    """Shapes, dtypes, devices and options; returns the divisor as a tensor."""
    T, _ = _check_head(hidden, weight, bias, rows)
    M, device = T if rows is None else rows.shape[0], hidden.device
    _check_tensor("offsets", offsets, _INTS)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        _refuse("offsets", "have shape (N + 1,)", tuple(offsets.shape))
    _check_device("offsets", offsets, device)
    N = offsets.shape[0] - 1
    _check_tensor("target", target, _INTS + _FLOATS)
    _check_device("target", target, device)
    if target.dtype in _FLOATS:
        if target.shape != (M,):
            _refuse("target", f"have shape ({M},) when floating, a candidate each",
                    tuple(target.shape))  # fmt: skip
    elif target.shape != (N,):
        _refuse("target", f"have shape ({N},) when integer, a group each", tuple(target.shape))
    for name, x, n, each in (("margin", margin, M, "candidate"),
                             ("group_weight", group_weight, N, "group")):  # fmt: skip
        if x is not None:
            _check_tensor(name, x, _FLOATS)
            if x.shape != (n,):
                _refuse(name, f"have shape ({n},), a {each} each", tuple(x.shape))
            _check_device(name, x, device)
    _check_options(temperature, label_smoothing, center_coef, reduction)
    return _divisor(num_items_in_batch, reduction, device)


def _check_options(
    temperature: float, label_smoothing: float, center_coef: float, reduction: str
) -> None:
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        _refuse("temperature", "be a finite number above 0", temperature)
    if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing <= 1):
        _refuse("label_smoothing", "be a number from 0 to 1", label_smoothing)
    if not (isinstance(center_coef, int | float) and 0 <= center_coef < math.inf):
        _refuse("center_coef", "be a finite number, 0 or more", center_coef)
    if reduction not in _REDUCTIONS:
        _refuse("reduction", 'be "mean", "sum" or "none"', repr(reduction))


def _divisor(
    num_items_in_batch: int | Tensor | None, reduction: str, device: torch.device
) -> Tensor | None:
    """What "mean" divides by, as a tensor; None: the number of groups not left out."""
    if num_items_in_batch is None or reduction != "mean":
        return None
    if isinstance(num_items_in_batch, Tensor):
        _check_tensor("num_items_in_batch", num_items_in_batch, _INTS + _FLOATS)
        if num_items_in_batch.dim() != 0:
            _refuse("num_items_in_batch", "be an int or a 0-d tensor",
                    f"shape {tuple(num_items_in_batch.shape)}")  # fmt: skip
        return num_items_in_batch.to(device)
    if isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int):
        raise TypeError(
            "num_items_in_batch must be an int or a 0-d tensor, "
            f"got {type(num_items_in_batch).__name__}"
        )
    if not 1 <= num_items_in_batch < 2**63:
        _refuse("num_items_in_batch", "be at least 1, and below 2^63", num_items_in_batch)
    return torch.full((), num_items_in_batch, dtype=torch.int64, device=device)


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def _check_rows(rows: Tensor, T: int) -> None:
    rows = rows.long()
    bad = (rows < 0) | (rows >= T)
    if bad.any():
        i = _first(bad)
        _refuse(f"rows[{i}]", f"be from 0 to {T - 1}, a row of hidden", int(rows[i]))
    seen, first = torch.unique(rows, return_inverse=True)
    if seen.shape[0] != rows.shape[0]:
        repeats = torch.bincount(first)[first] > 1
        i = _first(repeats)
        j = _first(repeats & (rows == rows[i]) & (torch.arange(len(rows), device=rows.device) > i))
        raise ValueError(f"rows must be distinct, but rows[{i}] and rows[{j}] are {int(rows[i])}")


def _check_values(
    hidden: Tensor,
    offsets: Tensor,
    target: Tensor,
    rows: Tensor | None,
    margin: Tensor | None,
    group_weight: Tensor | None,
    num_items: Tensor | None,
) -> None:
    """Everything that needs the values; on a device this waits for it."""
    T = math.prod(hidden.shape[:-1])
    M, N = T if rows is None else rows.shape[0], offsets.shape[0] - 1
    if int(offsets[0]) != 0:
        _refuse("offsets[0]", "be 0", int(offsets[0]))
    if int(offsets[N]) != M:
        _refuse(f"offsets[{N}]", f"be {M}, the number of candidates", int(offsets[N]))
    sizes = offsets.long().diff()
    target = target if target.dtype in _FLOATS else target.long()
    if (sizes < 1).any():
        n = _first(sizes < 1)
        raise ValueError(
            f"offsets must increase, so that every group has a candidate, but offsets[{n}] is "
            f"{int(offsets[n])} and offsets[{n + 1}] is {int(offsets[n + 1])}"
        )
    if target.dtype in _FLOATS:
        bad = ~((target >= 0) & target.isfinite())
        if bad.any():
            i = _first(bad)
            _refuse(f"target[{i}]", "be a probability, finite and 0 or more", float(target[i]))
        group = torch.repeat_interleave(sizes, output_size=M)
        total = torch.zeros(N, dtype=torch.float64, device=target.device)
        total.index_add_(0, group, target.double())
        slack = 2e-2 if target.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if ((total - 1).abs() > slack).any():
            n = _first((total - 1).abs() > slack)
            raise ValueError(
                f"target must be a distribution over each group, but that of group {n} sums to "
                f"{float(total[n]):.6g}; expected 1"
            )
    else:
        bad = ((target < 0) & (target != IGNORE_INDEX)) | (target >= sizes)
        if bad.any():
            n = _first(bad)
            _refuse(f"target[{n}]", f"be from 0 to {int(sizes[n]) - 1}, a position inside its "
                    f"group, or {IGNORE_INDEX}", int(target[n]))  # fmt: skip
    for name, x in (("margin", margin), ("group_weight", group_weight)):
        if x is not None and not x.isfinite().all():
            i = _first(~x.isfinite())
            _refuse(f"{name}[{i}]", "be finite", float(x[i]))
    if num_items is not None and not num_items > 0:
        _refuse("num_items_in_batch", "be above 0", num_items.item())
    if rows is not None:
        _check_rows(rows, T)
