"""What is measured: the points, their inputs, and the bytes that no implementation can avoid.

Letters: N groups, M candidates, T rows of hidden, D hidden size, K candidates of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("uniform", "zipf", "giant")
LAYOUTS = ("packed", "gathered", "last")
LOSSES = ("listwise", "plackett_luce", "bradley_terry", "ensemble")  # the last: listwise, 8 heads
HEADS = 8
SEQUENCE = 32  # tokens of a sequence in the layouts (B, S, D)
KB, MB, GB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Point:
    candidates: int
    hidden_size: int = 4096
    dtype: str = "bf16"
    groups: str = "8"  # K; or "uniform" from 2 to 16, "zipf", "giant" for one group of all
    layout: str = "packed"  # (M, D); or (B, S, D) with candidates "gathered" or each one's "last"
    loss: str = "listwise"

    @property
    def num_rows(self) -> int:
        """T: as many as candidates; about four times that (gathered) or S times (last)."""
        if self.layout == "packed":
            return self.candidates
        return SEQUENCE * (self.candidates if self.layout == "last" else -(-self.candidates // 8))

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * DTYPES[self.dtype].itemsize

    @property
    def hidden_bytes(self) -> int:
        """Of the candidates' rows, M·D."""
        return self.candidates * self.row_bytes

    def limit_bytes(self, mode: str) -> int:
        """Forward reads the M rows once; backward writes every one of the T rows once, and where
        the loss knows its coefficients only after a pass, reads the M rows again."""
        if mode == "forward":
            return self.hidden_bytes
        return self.clone_bytes + (0 if self.loss == "listwise" else self.hidden_bytes)

    @property
    def clone_bytes(self) -> int:
        return self.hidden_bytes + self.num_rows * self.row_bytes

    def __str__(self) -> str:
        groups = f"K={self.groups}" if self.groups.isdecimal() else self.groups
        where = f"{self.candidates}x{self.hidden_size} {self.dtype} {groups} {self.layout}"
        return where if self.loss == "listwise" else f"{where} {self.loss}"


@dataclass
class Problem:
    point: Point
    hidden: Tensor  # (M, D) or (B, S, D), a leaf
    weight: Tensor  # (D,), or (E, D) for an ensemble; a leaf
    bias: Tensor  # (), or (E,); a leaf
    offsets: Tensor  # (N + 1,)
    target: Tensor  # (N,); of the losses of a ranking (M,) ranks
    rows: Tensor | None  # (M,)
    longest: int  # the largest K, told to whoever pads for nothing
    grad: Tensor  # (): N, as a loss scale would, so that fp16 gradients are not all subnormal

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
        """The arguments of a provider."""
        return (
            self.hidden, self.weight, self.bias, self.offsets, self.target, self.rows, self.longest
        )  # fmt: skip

    def fresh(self, copy: bool = False) -> Problem:
        """The same with leaves of its own; hidden in memory of its own if `copy`."""
        hidden = self.hidden.detach()
        hidden = (hidden.clone() if copy else hidden).requires_grad_()
        weight, bias = (x.detach().requires_grad_() for x in (self.weight, self.bias))
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = self.bias.grad = None


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Normal hidden states, and a head that gives scores of standard deviation 1."""
    on_cpu, on_device = (torch.Generator(d).manual_seed(seed) for d in ("cpu", device))
    M, D, T, dtype = point.candidates, point.hidden_size, point.num_rows, DTYPES[point.dtype]
    offsets = make_offsets(point.groups, M, on_cpu)
    sizes = offsets.diff()
    N = len(sizes)
    target = (torch.rand(N, generator=on_cpu, dtype=torch.float64) * sizes).long()
    if point.loss in ("plackett_luce", "bradley_terry"):
        target = torch.randperm(M, generator=on_cpu)  # only the order inside a group counts
    heads = (HEADS,) if point.loss == "ensemble" else ()
    rows = None
    if point.layout == "gathered":
        rows = torch.randperm(T, generator=on_cpu)[:M].sort().values
    elif point.layout == "last":
        last = torch.randint(SEQUENCE // 2, SEQUENCE, (M,), generator=on_cpu)
        rows = torch.arange(M) * SEQUENCE + last
    shape = (M, D) if rows is None else (T // SEQUENCE, SEQUENCE, D)
    hidden = torch.empty(shape, dtype=dtype, device=device).normal_(generator=on_device)
    weight = torch.empty(*heads, D, dtype=dtype, device=device)
    weight.normal_(0, D**-0.5, generator=on_device)
    return Problem(
        point, hidden.requires_grad_(), weight.requires_grad_(),
        torch.full(heads, 0.5, dtype=dtype, device=device, requires_grad=True), offsets.to(device),
        target.to(device), rows if rows is None else rows.to(device),
        int(sizes.max()), torch.tensor(float(N), device=device),
    )  # fmt: skip


def make_offsets(groups: str, M: int, generator: torch.Generator) -> Tensor:
    """(N + 1,) offsets of groups of that kind; the last group is cut off at M."""
    if groups == "giant":
        return torch.tensor([0, M])
    if groups == "uniform":
        sizes = torch.randint(2, 17, (M,), generator=generator)
    elif groups == "zipf":  # P(K) ~ K^-1.5 from 2 to 1000
        share = torch.arange(2, 1001, dtype=torch.float64) ** -1.5
        sizes = 2 + torch.multinomial(share, M, replacement=True, generator=generator)
    else:
        sizes = torch.full((M,), int(groups))
    ends = sizes.cumsum(0)
    return torch.cat([torch.tensor([0]), ends[ends < M], torch.tensor([M])])


def sweeps(device_type: str) -> dict[str, list[Point]]:
    """Lines through the grid around D = 4096, bf16, K = 8, packed; a CPU gets smaller ones."""
    cuda = device_type == "cuda"
    largest, large = (4 * GB, GB) if cuda else (GB, 64 * MB)
    typical = ((12, 896), (64, 896), (64, 4096), (512, 4096))
    candidates, narrow = (10**6, 896) if cuda else (2**16, 576)
    rows = 8192 if cuda else 512
    found = {
        "small": [Point(M, D, dtype) for dtype in ("bf16", "fp32") for M, D in typical],
        "size": [sized(n) for n in _powers_of_4(64 * KB, largest)],
        "hidden": [
            sized(large, D, dtype)
            for dtype in DTYPES
            for D in (576, 896, 2048, 3584, 4096, 5120, 8192, 16384)
        ],
        "ragged": [
            Point(candidates, narrow, "bf16", groups)
            for groups in ("8", "2", "4", "64", "uniform", "zipf", "giant")
        ],
        "layout": [Point(rows, layout=layout) for layout in LAYOUTS],
        "losses": [
            replace(p, loss=loss) for loss in LOSSES
            for p in (Point(512), Point(512, dtype="fp32"), sized(large))
        ],
        "costs": [Point(512)],  # the last: launches are counted there, by a profiler
    }
    big = [sized(large), Point(candidates, narrow, groups="uniform")]
    return {"quick": [Point(M, D) for M, D in typical] + big, **found}


def sized(hidden_bytes: int, hidden_size: int = 4096, dtype: str = "bf16") -> Point:
    """The point whose M·D is nearest to that many bytes."""
    return Point(round(hidden_bytes / Point(1, hidden_size, dtype).row_bytes), hidden_size, dtype)


def _powers_of_4(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 4
