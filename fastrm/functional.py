"""The public functions: argument checks, then one dispatch to a backend.

`listwise_loss` with one head is fused with it: one pass over hidden. Every other loss is the scores
and then a loss of those alone, and reads hidden once more for the weight gradient.

Letters: N groups, M candidates, T rows of hidden, D hidden size, K_n candidates of group n,
E heads, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastrm import backends, checks, ops
from fastrm.groups import group_of, group_sums, sum_dtype, target_from_scores
from fastrm.reference import (
    bradley_terry_loss_ref,
    listwise_loss_ref,
    plackett_luce_loss_ref,
    score_ref,
)


def listwise_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    target: Tensor | None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    distillation_coef: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Any:
    """Listwise softmax cross entropy of a linear head over ragged groups, in one fused pass.

    With scores ``s_i = w·h_i + b``, logits ``z_i = (s_i + margin_i [i no target]) / temperature``
    and the target distribution ``q`` of group n (smoothed to ``(1-ε) q + ε/K_n``):

        loss_n = group_weight_n · ( -Σ_i q_i log softmax(z)_i + center_coef · (2 · mean_i s_i)² )

    This is the top-one ListNet loss (Cao et al., 2007, eq. 5); with one positive and K = 2 it is
    the Bradley-Terry loss ``-log σ(s_best - s_other)`` of InstructGPT (Ouyang et al., 2022, eq. 1).
    The centring term is the auxiliary loss of Eisenstein et al. (2023), equal to TRL's
    ``center_rewards_coefficient`` at K = 2. Less the entropy of ``q``, which no parameter changes,
    it is the Kullback-Leibler divergence ``KL(q ‖ softmax(z))``.

    Args:
        hidden: (T, D) or (B, S, D) float64/32/16 or bfloat16, any strides: hidden states.
        weight: (D,) or (1, D) floating, the head; or (E, D), E heads, an ensemble: the loss is the
            mean of theirs.
        bias: () or (1,) floating, or (E,), or None. Its gradient is exactly 0 unless `center_coef`
            is set, because the softmax does not see a shift.
        offsets: (N+1,) integer; candidates ``offsets[n]:offsets[n+1]`` form group n. Starts at 0,
            strictly increasing, ends at M. See `offsets_from_sizes`.
        target: (N,) integer, position of the best candidate inside its group, or -100 to leave
            the group out, its teacher too; or (M,) floating, a distribution over each group (each
            sums to 1): soft labels, several positives, ties. See `target_from_labels` and
            `target_from_scores`. None, with `teacher_scores`: distillation alone.
        rows: (M,) integer, distinct: candidate i is row ``rows[i]`` of ``hidden.reshape(-1, D)``.
            None: row i.
        temperature: divides the logits; > 0.
        label_smoothing: ε in [0, 1], as in `torch.nn.functional.cross_entropy`.
        margin: (M,) floating, added to the scores of candidates that are not targets; detached.
            With a teacher every candidate is a target, so the two exclude each other.
        teacher_scores: (M,) floating, the scores of a teacher: adds ``distillation_coef`` times
            the cross entropy of ``softmax(teacher_scores)`` (the distillation term of
            FlagEmbedding; Hinton et al., 2015), which is not smoothed; detached. Divide them by a
            temperature of theirs. Groups that are left out need finite scores here.
        distillation_coef: weight of that term, > 0.
        group_weight: (N,) floating, multiplies each group's loss; the divisor does not see it.
            Detached.
        center_coef: weight of the centring term, >= 0.
        reduction: "mean" over the groups not left out, "sum", or "none" for one loss a group.
        num_items_in_batch: the divisor of "mean", an int or 0-d tensor: the number of groups of
            the whole optimiser step under gradient accumulation or data parallelism.
        return_scores: also return the scores.
        backend: None chooses; "triton", "cpp" or "torch" is that one or an error.

    Returns:
        The loss, fp32 (fp64 for fp64 hidden): () or, for "none", (N,). With `return_scores`,
        ``(loss, scores)`` with scores (M,), or (M, E), in the loss's dtype, detached.
        Differentiable once, by backend "torch" twice, with respect to hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. On CPU values are
            checked too. On CUDA they are not (it would cost a synchronisation) unless
            FASTRM_CHECK=1 is set: there a group with invalid input gives NaN. Under torch.compile
            only the C++ kernels check values, of what a teacher or pairs have become.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if teacher_scores is not None or target is None:
        checks.head(hidden, weight, bias, rows)
        checks.options(temperature, center_coef, reduction, label_smoothing)
        target, group_weight, center_coef, num_items_in_batch = _with_teacher(
            hidden, rows, offsets, target, label_smoothing, margin, teacher_scores,
            distillation_coef, group_weight, center_coef, reduction, num_items_in_batch,
        )  # fmt: skip
        label_smoothing = 0.0
    # On the CPU every function called here counts: a small batch costs as much as ten of them.
    # Not what a compiler sees: what is loaded changes while it looks.
    known = not torch.compiler.is_compiling() and backend in backends.CPU_IS_CPP
    if known and isinstance(hidden, Tensor) and hidden.is_cpu:
        name = "cpp"
    else:
        name = backends.choose(_device_type(hidden), backend)
    num_items = num_items_in_batch
    if name == "cpp":
        # The operator checks everything itself; what it refuses is then said in the usual words.
        try:
            if num_items is not None:
                num_items = checks.divisor(num_items, reduction, hidden.device)
            if not _plain(temperature, label_smoothing, center_coef):
                checks.options(temperature, center_coef, reduction, label_smoothing)
            loss, scores = backends.FUSED["cpp"].listwise_loss(
                hidden, weight, bias, offsets, target, rows, margin, group_weight, num_items,
                temperature, label_smoothing, center_coef, reduction,
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            num_items = _check_listwise(
                hidden, weight, bias, offsets, target, rows, margin, group_weight, temperature,
                label_smoothing, center_coef, reduction, num_items_in_batch,
            )  # fmt: skip
            _check_listwise_values(hidden, offsets, target, rows, margin, group_weight, num_items)
            raise
        return (loss, scores) if return_scores else loss
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] > 1:
        return _two_passes(
            listwise_loss_from_scores, hidden, weight, bias, rows, center_coef == 0,
            return_scores, backend, offsets=offsets, target=target, temperature=temperature,
            label_smoothing=label_smoothing, margin=margin, group_weight=group_weight,
            center_coef=center_coef, reduction=reduction, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip
    groups = (offsets, target, rows, margin, group_weight)
    options = (temperature, label_smoothing, center_coef, reduction)
    num_items = _check_listwise(hidden, weight, bias, *groups, *options, num_items_in_batch)
    if backends.check_values(hidden.device.type, name):
        _check_listwise_values(hidden, *groups, num_items)
    if name == "torch":
        shift = bias if bias is None or center_coef else _shift(bias)
        with _no_autocast(hidden.device.type):
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
    target: Tensor | None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    distillation_coef: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`listwise_loss` of scores that are there already; its other arguments are the same.

    Args:
        scores: (M,) floating, one score a candidate, or (M, E); used in fp32 at least.

    Returns:
        The loss, fp32 (fp64 for fp64 scores): () or (N,); differentiable with respect to scores.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    checks.scores(scores)
    options: dict[str, Any] = dict(
        offsets=offsets, target=target, temperature=temperature, label_smoothing=label_smoothing,
        margin=margin, teacher_scores=teacher_scores, distillation_coef=distillation_coef,
        group_weight=group_weight, center_coef=center_coef, reduction=reduction,
        num_items_in_batch=num_items_in_batch, backend=backend,
    )  # fmt: skip
    if scores.dim() == 2:
        return _mean_over_heads(listwise_loss_from_scores, scores, **options)
    # A head of one unit weight over hidden states of size 1: h·1 is exact.
    one = torch.ones(1, dtype=scores.dtype, device=scores.device)
    return listwise_loss(scores.unsqueeze(-1), one, **options)


def plackett_luce_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    ranks: Tensor,
    position_weight: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Any:
    """Negative log-likelihood of each group's ranking under the Plackett-Luce model (ListMLE).

    The best candidate is chosen from all, the second best from the rest, and so on. With logits
    ``z = s / temperature`` and i over the ranked candidates:

        loss_n = group_weight_n · ( Σ_i position_weight_i · ( log Σ_{j not above i} e^{z_j} - z_i )
                                    + center_coef · (2 · mean_i s_i)² )

    ListMLE (Xia et al., 2008, eq. 7); with `position_weight_from_ranks` its position-aware form,
    p-ListMLE (Lan et al., 2014, eq. 6). Only the best ranked: `listwise_loss`. Candidates of equal
    rank are not below each other and share their sum (Breslow, 1974). Arguments that are not named
    here are those of `listwise_loss`.

    Args:
        ranks: (M,) integer, lower is better; only their order inside the group counts. -1:
            unranked, below every ranked one and in no order: it takes part in the sums alone.
        position_weight: (M,) floating, the weight of the position that candidate i holds; detached.

    Returns:
        As `listwise_loss`. "mean" divides by all N groups.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    return _two_passes(
        plackett_luce_loss_from_scores, hidden, weight, bias, rows, center_coef == 0,
        return_scores, backend, offsets=offsets, ranks=ranks, position_weight=position_weight,
        temperature=temperature, group_weight=group_weight, center_coef=center_coef,
        reduction=reduction, num_items_in_batch=num_items_in_batch,
    )  # fmt: skip


def plackett_luce_loss_from_scores(
    scores: Tensor,
    *,
    offsets: Tensor,
    ranks: Tensor,
    position_weight: Tensor | None = None,
    temperature: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`plackett_luce_loss` of scores that are there already; its other arguments are the same.

    Args:
        scores: (M,) floating, one score a candidate, or (M, E); used in fp32 at least.

    Returns:
        The loss, fp32 (fp64 for fp64 scores): () or (N,); differentiable with respect to scores.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    checks.scores(scores)
    if scores.dim() == 2:
        return _mean_over_heads(
            plackett_luce_loss_from_scores, scores, offsets=offsets, ranks=ranks,
            position_weight=position_weight, temperature=temperature, group_weight=group_weight,
            center_coef=center_coef, reduction=reduction, num_items_in_batch=num_items_in_batch,
            backend=backend,
        )  # fmt: skip
    return _ranking_loss(
        "plackett_luce", plackett_luce_loss_ref, scores, offsets, ranks,
        ("position_weight", position_weight), group_weight, temperature, center_coef, reduction,
        num_items_in_batch, backend,
    )  # fmt: skip


def bradley_terry_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    ranks: Tensor | None = None,
    pairs: Tensor | None = None,
    margin: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Any:
    """Bradley-Terry loss of every pair that a ranking orders, or of labelled pairs.

    Over the P_n pairs of group n, i better than j:

        loss_n = group_weight_n / P_n · Σ_(i, j) ( -log σ( (s_i - s_j - margin) / temperature )
                                                   + center_coef · (s_i + s_j)² )

    The mean over a prompt's pairs is InstructGPT's (Ouyang et al., 2022, eq. 1), margin and
    centring are those of TRL's RewardTrainer. A group without a pair has loss 0 and counts.
    Arguments that are not named here are those of `listwise_loss`.

    Args:
        ranks: (M,) integer, lower is better: every pair of a group whose ranks differ. -1:
            unranked, below every ranked one and in no order.
        pairs: (P, 2) integer instead of `ranks`: the better and the worse candidate of each
            labelled pair, numbers from 0 to M - 1, both of one group.
        margin: (M,) floating with `ranks`: that of candidate j in the pairs that it loses; (P,)
            with `pairs`. Detached.

    Returns:
        As `listwise_loss`. "mean" divides by all N groups.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    return _two_passes(
        bradley_terry_loss_from_scores, hidden, weight, bias, rows, center_coef == 0,
        return_scores, backend, offsets=offsets, ranks=ranks, pairs=pairs, margin=margin,
        temperature=temperature, group_weight=group_weight, center_coef=center_coef,
        reduction=reduction, num_items_in_batch=num_items_in_batch,
    )  # fmt: skip


def bradley_terry_loss_from_scores(
    scores: Tensor,
    *,
    offsets: Tensor,
    ranks: Tensor | None = None,
    pairs: Tensor | None = None,
    margin: Tensor | None = None,
    temperature: float = 1.0,
    group_weight: Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`bradley_terry_loss` of scores that are there already; its other arguments are the same.

    Args:
        scores: (M,) floating, one score a candidate, or (M, E); used in fp32 at least.

    Returns:
        The loss, fp32 (fp64 for fp64 scores): () or (N,); differentiable with respect to scores.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    checks.scores(scores)
    if (ranks is None) == (pairs is None):
        raise ValueError("bradley_terry_loss needs either ranks or pairs")
    if pairs is not None:
        checks.pairs(pairs, scores.device)
    if scores.dim() == 2:
        return _mean_over_heads(
            bradley_terry_loss_from_scores, scores, offsets=offsets, ranks=ranks, pairs=pairs,
            margin=margin, temperature=temperature, group_weight=group_weight,
            center_coef=center_coef, reduction=reduction, num_items_in_batch=num_items_in_batch,
            backend=backend,
        )  # fmt: skip
    if pairs is not None:
        return _labelled_pairs(
            scores, offsets, pairs, margin, group_weight, temperature, center_coef, reduction,
            num_items_in_batch, backend,
        )  # fmt: skip
    return _ranking_loss(
        "bradley_terry", bradley_terry_loss_ref, scores, offsets, ranks, ("margin", margin),
        group_weight, temperature, center_coef, reduction, num_items_in_batch, backend,
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
        weight: (D,) or (1, D) floating, the head; or (E, D), E heads.
        bias: () or (1,) floating, or (E,), or None.
        rows: (M,) integer, distinct rows of ``hidden.reshape(-1, D)``; None: all of them.
        backend: as in `listwise_loss`.

    Returns:
        (M,) scores, or (M, E), fp32 (fp64 for fp64 hidden), differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as `listwise_loss`.
    """
    name = backends.choose(_device_type(hidden), backend)
    if name == "cpp":
        try:
            return backends.FUSED["cpp"].score(hidden, weight, bias, rows)
        except (TypeError, ValueError, RuntimeError):
            T, _ = checks.head(hidden, weight, bias, rows)
            checks.rows_values(rows, T)
            raise
    T, _ = checks.head(hidden, weight, bias, rows)
    if backends.check_values(hidden.device.type, name):
        checks.rows_values(rows, T)
    if name == "torch":
        with _no_autocast(hidden.device.type):
            return score_ref(hidden, weight, bias, rows)
    return ops.score(hidden, weight, bias, rows)


def _two_passes(
    loss_from_scores: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None,
    rows: Tensor | None, shift_invariant: bool, return_scores: bool, backend: str | None,
    **options: Any,
) -> Any:  # fmt: skip
    """A loss that knows its coefficients only when it has seen all scores of a group."""
    if isinstance(bias, Tensor) and bias.dtype in checks.FLOATS and shift_invariant:
        bias = _shift(bias)  # another dtype stays what it is, for score to refuse
    scores = score(hidden, weight, bias, rows=rows, backend=backend)
    loss = loss_from_scores(scores, backend=backend, **options)
    return (loss, scores.detach()) if return_scores else loss


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Some devices have none to switch off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _shift(bias: Tensor) -> Tensor:
    """A bias that the loss does not see: its gradient is 0, not rounding noise."""
    return bias.detach() + 0.0 * bias


def _mean_over_heads(
    loss_from_scores: Callable[..., Tensor], scores: Tensor, *, offsets: Tensor, reduction: str,
    num_items_in_batch: int | Tensor | None, **options: Any,
) -> Tensor:  # fmt: skip
    """The mean of E losses: E times as many groups."""
    M, E = scores.shape
    N = checks.offsets(offsets, scores.device)
    starts = M * torch.arange(E, device=offsets.device)[:, None]
    # The end stays the caller's, so that a wrong one is found.
    end = (E - 1) * M + offsets[-1:].long()
    each: dict[str, Any] = {"offsets": torch.cat([(starts + offsets[:-1]).flatten(), end])}
    for name, x in options.items():
        if isinstance(x, Tensor) and x.dim() == 1:
            each[name] = x.repeat(E)
        elif name == "pairs" and x is not None:
            each[name] = (starts[:, :, None] + x).reshape(-1, 2)
        else:
            each[name] = x
    divisor = checks.divisor(num_items_in_batch, reduction, scores.device)
    if divisor is not None and backends.check_values(scores.device.type, "torch"):
        checks.divisor_value(divisor)
    how = "sum" if divisor is not None else reduction
    try:
        loss = loss_from_scores(scores.T.reshape(-1), reduction=how, **each)
    except (TypeError, ValueError, RuntimeError):
        # In the words for one head, which has what the caller passed.
        loss_from_scores(scores[:, 0], offsets=offsets, reduction=reduction, **options)
        raise
    if reduction == "none":
        return loss.view(E, N).mean(0)
    if how == "mean":
        return loss
    return loss / E if divisor is None else loss / (E * divisor.detach().to(loss.dtype))


def _plain(temperature: float, label_smoothing: float, center_coef: float) -> bool:
    """Whether the options are as they are if not given. The operators would take tensors too."""
    floats = type(temperature) is type(label_smoothing) is type(center_coef) is float
    return floats and temperature == 1.0 and label_smoothing == center_coef == 0.0


def _ranking_loss(
    name: str, reference: Callable[..., Tensor], scores: Tensor, offsets: Tensor, ranks: Any,
    extra: tuple[str, Tensor | None], group_weight: Tensor | None, temperature: float,
    center_coef: float, reduction: str, num_items_in_batch: int | Tensor | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """A loss of scores (M,) and ranks (M,), with one more number for each candidate."""
    which, device = backends.choose(scores.device.type, backend), scores.device
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if which == "cpp":
        # The operator checks everything itself; what it refuses is then said in the usual words.
        if not _plain(temperature, 0.0, center_coef):
            checks.options(temperature, center_coef, reduction)
        try:
            return getattr(backends.FUSED["cpp"], name)(
                wide, offsets, ranks, extra[1], group_weight,
                checks.divisor(num_items_in_batch, reduction, device), temperature, center_coef,
                reduction,
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            _check_ranking(
                wide, offsets, ranks, extra, group_weight, temperature, center_coef, reduction,
                num_items_in_batch, values=True,
            )  # fmt: skip
            raise
    num_items = _check_ranking(
        wide, offsets, ranks, extra, group_weight, temperature, center_coef, reduction,
        num_items_in_batch, values=backends.check_values(device.type, which),
    )  # fmt: skip
    groups = (offsets, ranks, _constant(extra[1]), _constant(group_weight), _constant(num_items))
    options = (float(temperature), float(center_coef), reduction)
    with _no_autocast(device.type):
        if which == "torch":
            return reference(wide, *groups, *options)
        return ops.ranking_loss(name, wide, *groups, *options)


def _check_ranking(
    scores: Tensor, offsets: Tensor, ranks: Any, extra: tuple[str, Tensor | None],
    group_weight: Tensor | None, temperature: float, center_coef: float, reduction: str,
    num_items_in_batch: int | Tensor | None, values: bool,
) -> Tensor | None:  # fmt: skip
    """Everything about the arguments of `_ranking_loss`; returns the divisor as a tensor."""
    M, device = scores.shape[0], scores.device
    N = checks.offsets(offsets, device)
    checks.tensor("ranks", ranks, checks.INTS)
    checks.vector("ranks", ranks, M, "candidate", device, checks.INTS)
    checks.vector(*extra, M, "candidate", device)
    checks.vector("group_weight", group_weight, N, "group", device)
    checks.options(temperature, center_coef, reduction)
    num_items = checks.divisor(num_items_in_batch, reduction, device)
    if values:
        checks.offsets_values(offsets, M)
        checks.ranks_values(ranks)
        checks.finite(*extra)
        checks.finite("group_weight", group_weight)
        checks.divisor_value(num_items)
    return num_items


def _labelled_pairs(
    scores: Tensor, offsets: Tensor, pairs: Tensor, margin: Tensor | None,
    group_weight: Tensor | None, temperature: float, center_coef: float, reduction: str,
    num_items_in_batch: int | Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    """Each pair is a group of two, which weighs as much as its group's mean gives it."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    device, M, P = scores.device, scores.shape[0], pairs.shape[0]
    N = checks.offsets(offsets, device)
    checks.vector("margin", margin, P, "pair", device)
    checks.vector("group_weight", group_weight, N, "group", device)
    checks.options(temperature, center_coef, reduction)
    num_items = _constant(checks.divisor(num_items_in_batch, reduction, device))
    if backends.check_values(device.type, "torch"):
        checks.offsets_values(offsets, M)
        checks.pairs_values(pairs, offsets)
        checks.finite("margin", margin)
        checks.finite("group_weight", group_weight)
        checks.divisor_value(num_items)
    pairs, ends = pairs.long().contiguous(), offsets[1:].long().contiguous()
    groups = torch.searchsorted(ends, pairs, right=True)
    wrong = (groups[:, 0] != groups[:, 1]) | (pairs[:, 0] == pairs[:, 1])
    wrong = wrong | ((pairs < 0) | (pairs >= M)).any(1)
    wrong = wrong | (offsets[0] != 0) | (offsets[-1] != M) | (offsets.long().diff() < 1).any()
    group = groups[:, 0].clamp(max=max(N - 1, 0))
    count = group.new_zeros(N).index_add(0, group, torch.ones_like(group))
    each = 1 / count.to(wide)
    if group_weight is not None:
        each = each * group_weight.detach()
    chosen = pairs.clamp(0, max(M - 1, 0)).flatten()
    # A candidate of many pairs has a gradient of many terms: added up in float64. The backward of
    # x[i] is in a fixed order on CUDA, that of index_select on the CPU.
    exact = scores.to(sum_dtype(device))
    both = exact.index_select(0, chosen) if device.type == "cpu" else exact[chosen]
    loss = listwise_loss_from_scores(
        both.to(wide), offsets=2 * torch.arange(P + 1, device=device), backend=backend,
        target=torch.zeros(P, dtype=torch.int64, device=device), temperature=temperature,
        margin=None if margin is None else torch.stack([margin, margin], 1).flatten(),
        center_coef=center_coef, reduction="none" if reduction == "none" else "sum",
        group_weight=each.index_select(0, group).masked_fill(wrong, torch.nan),
    )  # fmt: skip
    if reduction == "none":
        # As above: index_add is in a fixed order on the CPU, index_put on CUDA.
        zeros, terms = exact.new_zeros(N), loss.to(exact.dtype)
        if device.type == "cpu":
            return zeros.index_add(0, group, terms).to(wide)
        return zeros.index_put((group,), terms, accumulate=True).to(wide)
    return loss if reduction == "sum" else loss / (max(N, 1) if num_items is None else num_items)


def _with_teacher(
    hidden: Tensor, rows: Tensor | None, offsets: Tensor, target: Tensor | None,
    label_smoothing: float, margin: Tensor | None, teacher_scores: Tensor | None,
    distillation_coef: float, group_weight: Tensor | None, center_coef: float, reduction: str,
    num_items_in_batch: int | Tensor | None,
) -> tuple[Tensor, Tensor, float, int | Tensor | None]:  # fmt: skip
    """Target, group weight, centring and divisor of the loss and `distillation_coef` times that of
    the teacher: (1 + c) times the loss of a target between the two."""
    if teacher_scores is None:
        raise ValueError("target may be None only with teacher_scores")
    if margin is not None:
        raise ValueError("margin must be None with teacher_scores: every candidate is a target")
    c = distillation_coef
    checks.number("distillation_coef", c, "be a finite number above 0", lambda x: x > 0)
    M = hidden.shape[:-1].numel() if rows is None else len(rows)
    N = checks.offsets(offsets, hidden.device)
    checks.vector("teacher_scores", teacher_scores, M, "candidate", hidden.device)
    checks.vector("group_weight", group_weight, N, "group", hidden.device)
    if target is not None:
        checks.target(target, M, N, hidden.device)
    if backends.check_values(hidden.device.type, "torch"):
        checks.offsets_values(offsets, M)
        checks.finite("teacher_scores", teacher_scores)
        if target is not None:
            checks.target_values(target, offsets)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    teacher = target_from_scores(teacher_scores.detach().to(wide), offsets)
    gw = teacher.new_ones(N) if group_weight is None else group_weight.detach().to(wide)
    if target is None:
        return teacher, gw * c, center_coef / c, num_items_in_batch
    group, size = group_of(offsets, M), offsets.diff()
    counted = torch.ones(N, dtype=torch.bool, device=target.device)
    if target.dtype in checks.FLOATS:
        q = target.detach().to(wide)
        if target.dtype in (torch.bfloat16, torch.float16):  # its sum is as rounded as it is
            q = q / group_sums(q, offsets).index_select(0, group).to(wide)
    else:
        target = target.long()
        counted = target != checks.IGNORE_INDEX
        wrong = counted & ((target < 0) | (target >= size))
        gw = torch.where(counted, gw, 0).masked_fill(wrong, torch.nan)
        position = torch.arange(M, device=offsets.device) - offsets[:-1].index_select(0, group)
        # A group that is left out has some target, of weight 0.
        best = torch.where(counted, target, 0)
        q = (position == best.index_select(0, group)).to(wide)
        if reduction == "mean" and num_items_in_batch is None:
            num_items_in_batch = counted.sum().clamp(min=1)
    if label_smoothing:
        share = label_smoothing / size.index_select(0, group).to(wide)
        q = (1 - label_smoothing) * q + share
    q = torch.where(counted.index_select(0, group), (q + c * teacher) / (1 + c), q)
    return q, gw * (1 + c), center_coef / (1 + c), num_items_in_batch


def _device_type(hidden: Any) -> str:
    checks.tensor("hidden", hidden, checks.FLOATS)
    return hidden.device.type


def _constant(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.detach()


def _check_listwise(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, target: Tensor,
    rows: Tensor | None, margin: Tensor | None, group_weight: Tensor | None, temperature: float,
    label_smoothing: float, center_coef: float, reduction: str,
    num_items_in_batch: int | Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Shapes, dtypes, devices and options; returns the divisor as a tensor."""
    _, M = checks.head(hidden, weight, bias, rows)
    device = hidden.device
    N = checks.offsets(offsets, device)
    checks.target(target, M, N, device)
    checks.vector("margin", margin, M, "candidate", device)
    checks.vector("group_weight", group_weight, N, "group", device)
    checks.options(temperature, center_coef, reduction, label_smoothing)
    return checks.divisor(num_items_in_batch, reduction, device)


def _check_listwise_values(
    hidden: Tensor, offsets: Tensor, target: Tensor, rows: Tensor | None, margin: Tensor | None,
    group_weight: Tensor | None, num_items: Tensor | None,
) -> None:  # fmt: skip
    """Everything that needs the values; on a device this waits for it."""
    T = hidden.shape[:-1].numel()
    checks.offsets_values(offsets, T if rows is None else rows.shape[0])
    checks.target_values(target, offsets)
    checks.finite("margin", margin)
    checks.finite("group_weight", group_weight)
    checks.divisor_value(num_items)
    checks.rows_values(rows, T)
