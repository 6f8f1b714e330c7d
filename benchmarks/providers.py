"""Who is measured: the same loss from the same inputs, each in its fastest form.

Eager PyTorch may round the scores to the type of hidden, as the field does, and whoever pads is
told the longest group for nothing. `NAME+compile` is the same function under torch.compile with
static shapes. Letters: N groups, M candidates, T rows of hidden, D hidden size.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrm
from fastrm import backends

Provider = Callable[..., Tensor]


def fastrm_loss(
    backend: str,
    hidden: Tensor,  # (M, D) or (B, S, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # ()
    offsets: Tensor,  # (N + 1,)
    target: Tensor,  # (N,)
    rows: Tensor | None,  # (M,)
    longest: int,
) -> Tensor:
    return fastrm.listwise_loss(
        hidden, weight, bias, offsets=offsets, target=target, rows=rows, backend=backend
    )


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
    M, N = len(scores), len(target)
    group = torch.repeat_interleave(offsets.diff(), output_size=M)
    shift = longest * torch.arange(N, device=scores.device) - offsets[:-1]
    place = torch.arange(M, device=scores.device) + shift.index_select(0, group)
    padded = scores.new_full((N * longest,), -torch.inf).scatter(0, place, scores)
    return F.cross_entropy(padded.view(N, longest), target)


def eager_loop(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, target: Tensor,
    rows: Tensor | None, longest: int,
) -> Tensor:  # fmt: skip
    """A cross entropy for each group."""
    groups = _scores(hidden, weight, bias, rows).split(offsets.diff().tolist())
    return torch.stack([F.cross_entropy(s, t) for s, t in zip(groups, target, strict=True)]).mean()


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None) -> Tensor:
    h = hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows)
    return (h @ weight + bias).float()


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
PROVIDERS: dict[str, Provider] = {
    "fastrm-triton": partial(fastrm_loss, "triton"),
    "fastrm-cpp": partial(fastrm_loss, "cpp"),
    "fastrm-torch": partial(fastrm_loss, "torch"),
    "eager-segment": eager_segment,
    "eager-padded": eager_padded,
    "eager-loop": eager_loop,
}
MAX_LOOP = 200  # groups
COMPILE = "+compile"
# The loop compiled is every group unrolled: minutes, again for each raggedness.
NAMES = [*CLONES, SMALLEST, *PROVIDERS] + [n + COMPILE for n in PROVIDERS if n != "eager-loop"]


def provider(name: str) -> Provider:
    function = PROVIDERS[name.removesuffix(COMPILE)]
    return torch.compile(function, dynamic=False) if name.endswith(COMPILE) else function


def why_not(name: str, device_type: str) -> str | None:
    """Why a provider cannot run on such a device; None if it can."""
    if name == "clone-huge" and not hasattr(mmap, "MADV_HUGEPAGE"):
        return "it needs Linux"
    if name in ("clone-huge", "copy") and device_type != "cpu":
        return "it is about the pages of CPU memory"
    if name.startswith("fastrm-triton") and device_type == "cpu":
        return "it needs a CUDA device"
    if name.startswith("fastrm-"):
        try:
            backends.choose(device_type, name.removesuffix(COMPILE).removeprefix("fastrm-"))
        except RuntimeError as e:
            return str(e)
    return None
