"""Who is measured: the same loss from the same inputs, each in its fastest form.

Eager PyTorch may round the scores to the type of hidden, as the field does, and whoever pads is
told the longest group for nothing. `NAME+compile` is the same function under torch.compile with
static shapes. Letters: N groups, M candidates, T rows of hidden, D hidden size.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrm
from fastrm import backends

Provider = Callable[..., Tensor]


def fastrm_loss(
    loss: str,
    backend: str,
    hidden: Tensor,  # (M, D) or (B, S, D)
    weight: Tensor,  # (D,) or (E, D)
    bias: Tensor,  # () or (E,)
    offsets: Tensor,  # (N + 1,)
    target: Tensor,  # (N,), or ranks (M,)
    rows: Tensor | None,  # (M,)
    longest: int,
) -> Tensor:
    function, label = _FASTRM[loss]
    return function(
        hidden, weight, bias, offsets=offsets, rows=rows, backend=backend, **{label: target}
    )


_FASTRM: dict[str, tuple[Callable[..., Tensor], str]] = {
    "listwise": (fastrm.listwise_loss, "target"),
    "ensemble": (fastrm.listwise_loss, "target"),
    "plackett_luce": (fastrm.plackett_luce_loss, "ranks"),
    "bradley_terry": (fastrm.bradley_terry_loss, "ranks"),
}


def eager_segment(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """log-sum-exp of each group by scatter; no padding, no synchronisation."""
    scores = _scores(hidden, weight, bias, rows)
    M, N = len(scores), len(target)
    group = torch.repeat_interleave(offsets.diff(), output_size=M)
    top = scores.new_full((N,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
    sums = scores.new_zeros(N).index_add(0, group, (scores - top.index_select(0, group)).exp())
    return (sums.log() + top - scores.index_select(0, offsets[:-1] + target)).mean()


def eager_padded(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """Scores spread over (N, longest), -inf elsewhere, then torch's cross entropy."""
    scores = _scores(hidden, weight, bias, rows)
    return F.cross_entropy(_padded(scores, offsets, longest, -torch.inf), target)


def eager_ensemble(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """One product with all heads, then a cross entropy for each."""
    each = _scores(hidden, weight, bias, rows).unbind(1)
    padded = [_padded(scores, offsets, longest, -torch.inf) for scores in each]
    return F.cross_entropy(torch.cat(padded), target.repeat(len(each)))


def eager_plackett_luce(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, ranks: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """ListMLE: scores sorted by rank, and a log-cumulative-sum from the last to the first."""
    least = torch.finfo(torch.float32).min
    scores = _padded(_scores(hidden, weight, bias, rows), offsets, longest, least)
    order = _padded(ranks, offsets, longest, len(ranks)).argsort(1)
    scores = scores.gather(1, order)
    below = scores.flip(1).logcumsumexp(1).flip(1)
    there = torch.arange(longest, device=scores.device) < offsets.diff()[:, None]
    return ((below - scores) * there).sum(1).mean()


def eager_bradley_terry(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, ranks: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """All pairs of a padded group, (N, longest, longest)."""
    scores = _padded(_scores(hidden, weight, bias, rows), offsets, longest, 0.0)
    order = _padded(ranks, offsets, longest, len(ranks))
    wins = order[:, :, None] < order[:, None, :]
    wins = wins & (order[:, None, :] < len(ranks))
    terms = F.softplus(scores[:, None, :] - scores[:, :, None]) * wins
    return (terms.sum((1, 2)) / wins.sum((1, 2)).clamp(min=1)).mean()


def sentence_transformers(
    loss: str, hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """Its own ListNetLoss, ListMLELoss or RankNetLoss, given the scores; groups of one size."""
    from sentence_transformers.cross_encoder import losses

    model = _Scored(_scores(hidden, weight, bias, rows))
    options: dict[str, dict[str, Any]] = {
        "ListMLELoss": {"respect_input_order": False}, "RankNetLoss": {"reduction_log": "natural"},
    }  # fmt: skip
    function = getattr(losses, loss)(model, mini_batch_size=-1, **options.get(loss, {}))
    if loss == "ListNetLoss":  # takes the softmax of the labels: one at the best
        labels = 1e4 * F.one_hot(target, longest).float()
    else:
        labels = (-target).float().view(-1, longest)
    return function(_queries(len(labels), longest), list(labels.unbind()))


class _Scored(torch.nn.Module):
    """In place of a model: its pairs are scored already."""

    num_labels = 1

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores, self.device = scores, scores.device

    def preprocess(self, pairs: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.scores}


@lru_cache
def _queries(N: int, K: int) -> list[Any]:
    return [[""] * N, [[""] * K] * N]


def eager_loop(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """A cross entropy for each group."""
    groups = _scores(hidden, weight, bias, rows).split(offsets.diff().tolist())
    return torch.stack([F.cross_entropy(s, t) for s, t in zip(groups, target, strict=True)]).mean()


def _padded(x: Tensor, offsets: Tensor, longest: int, value: float) -> Tensor:
    """(M,) as (N, longest)."""
    M, N = len(x), len(offsets) - 1
    group = torch.repeat_interleave(offsets.diff(), output_size=M)
    shift = longest * torch.arange(N, device=x.device) - offsets[:-1]
    place = torch.arange(M, device=x.device) + shift.index_select(0, group)
    return x.new_full((N * longest,), value).scatter(0, place, x).view(N, longest)


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None) -> Tensor:
    h = hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows)
    return (h @ (weight if weight.dim() == 1 else weight.T) + bias).float()


def clone_huge(x: Tensor) -> Tensor:
    """A clone into fresh 2 MB pages: what memory allows where `clone` faults 4 KB pages in."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, x.nbytes, flags=private)  # unmapped with the tensor
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=x.dtype).view_as(x).copy_(x)


def cloner(name: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes clones of tensors like x."""
    if name == "copy":
        return torch.empty_like(x).copy_
    return clone_huge if name == "clone-huge" else torch.clone


def smallest(leaf: Tensor) -> Tensor:
    """The least that a differentiable function can do: what PyTorch itself costs."""
    return leaf.exp()


CLONES = ("clone", "clone-huge", "copy")  # they move the limit's bytes and compute nothing
SMALLEST = "smallest"
BACKENDS = ("triton", "cpp", "torch")
OF_LOSS: dict[str, dict[str, Provider]] = {
    "listwise": {
        "eager-segment": eager_segment, "eager-padded": eager_padded, "eager-loop": eager_loop,
        "sentence-transformers": partial(sentence_transformers, "ListNetLoss"),
    },
    "plackett_luce": {
        "eager-padded": eager_plackett_luce,
        "sentence-transformers": partial(sentence_transformers, "ListMLELoss"),
    },
    "bradley_terry": {
        "eager-padded": eager_bradley_terry,
        "sentence-transformers": partial(sentence_transformers, "RankNetLoss"),
    },
    "ensemble": {"eager-padded": eager_ensemble},
}  # fmt: skip
for _loss, _providers in OF_LOSS.items():
    _providers |= {f"fastrm-{b}": partial(fastrm_loss, _loss, b) for b in BACKENDS}
PLAIN = (
    *(f"fastrm-{b}" for b in BACKENDS), *("eager-segment", "eager-padded", "eager-loop"),
    "sentence-transformers",
)  # fmt: skip
MAX_LOOP = 200  # groups
COMPILE = "+compile"
# The loop compiled is every group unrolled: minutes, again for each raggedness.
_NOT_COMPILED = ("eager-loop", "sentence-transformers")
NAMES = [*CLONES, SMALLEST, *PLAIN] + [n + COMPILE for n in PLAIN if n not in _NOT_COMPILED]


def provider(name: str, loss: str = "listwise") -> Provider | None:
    """None: there is none of that name for this loss."""
    function = OF_LOSS[loss].get(name.removesuffix(COMPILE))
    if function is None:
        return None
    return torch.compile(function, dynamic=False) if name.endswith(COMPILE) else function


def why_not(name: str, device_type: str) -> str | None:
    """Why a provider cannot run on such a device; None if it can."""
    if name == "clone-huge" and not hasattr(mmap, "MADV_HUGEPAGE"):
        return "it needs Linux"
    if name in ("clone-huge", "copy") and device_type != "cpu":
        return "it is about the pages of CPU memory"
    if name.startswith("fastrm-triton") and device_type == "cpu":
        return "it needs a CUDA device"
    if name == "sentence-transformers" and find_spec("sentence_transformers") is None:
        return "it is not installed"
    if name.startswith("fastrm-"):
        try:
            backends.choose(device_type, name.removesuffix(COMPILE).removeprefix("fastrm-"))
        except RuntimeError as e:
            return str(e)
    return None
