"""Ragged groups as offsets: candidates `offsets[n]:offsets[n + 1]` form group n."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def offsets_from_sizes(sizes: Tensor | Sequence[int]) -> Tensor:
    """Offsets of consecutive groups from their sizes.

    Args:
        sizes: (N,) integer tensor or sequence of ints, candidates per group, each at least 1.

    Returns:
        (N + 1,) int64 tensor on the device of `sizes`: 0 followed by the running sum.

    Raises:
        TypeError: `sizes` is not integer.
        ValueError: `sizes` is not one-dimensional, or (on CPU) has an entry below 1.
    """
    sizes = _integers("sizes", sizes)
    if sizes.device.type == "cpu" and sizes.numel() and int(sizes.min()) < 1:
        n = int((sizes < 1).nonzero()[0])
        raise ValueError(f"sizes[{n}] is {int(sizes[n])}; every group needs at least 1 candidate")
    offsets = torch.zeros(sizes.numel() + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=offsets[1:])
    return offsets


def offsets_from_ids(group_ids: Tensor | Sequence[int]) -> Tensor:
    """Offsets of groups given the group id of each candidate, equal ids standing together.

    The number of groups depends on the values, so this waits for the device when `group_ids`
    is on one; build offsets in the data loader where that matters.

    Args:
        group_ids: (M,) integer tensor or sequence of ints; a group is a run of equal ids.

    Returns:
        (N + 1,) int64 tensor on the device of `group_ids`.

    Raises:
        TypeError: `group_ids` is not integer.
        ValueError: it is not one-dimensional, or (on CPU) an id comes back after another one.
    """
    ids = _integers("group_ids", group_ids)
    runs, sizes = torch.unique_consecutive(ids, return_counts=True)
    if ids.device.type == "cpu" and runs.unique().numel() != runs.numel():
        seen: set[int] = set()
        repeated = next(r for r in runs.tolist() if r in seen or seen.add(r))  # type: ignore[func-returns-value]
        raise ValueError(
            f"group_ids has id {repeated} in separate places; sort the candidates so that each "
            "group is one run"
        )
    return offsets_from_sizes(sizes)


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor(values) if len(values) else torch.tensor([], dtype=torch.int64)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(values.shape)}")
    return values
