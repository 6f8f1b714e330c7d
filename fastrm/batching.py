"""Micro-batches of whole groups, the same number on every device.

Letters: N groups, K candidates of a group.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from fastrm.data import Example
from fastrm.packing import GROUP_KEYS

MIXING = 4  # swaps a group is offered before each epoch


def group_tokens(example: Example, shared: bool) -> int:
    """Tokens that the backbone computes for a group, its prompt once where that is shared."""
    K = len(example["input_ids"])
    repeated = (K - 1) * example["prompt_length"] if shared else 0
    return sum(map(len, example["input_ids"])) - repeated


class GroupBatchSampler(Sampler[list[int]]):
    """The micro-batches of one device: lists of positions in the dataset.

    Every group comes once an epoch. All devices have the same number of micro-batches, in every
    epoch, and the k-th ones have about the same number of groups or tokens. One without groups
    comes only among the last of an epoch that has too few for all devices. The order depends on
    seed and epoch alone.

    With `max_tokens` the groups are first dealt out, the largest first and each to the micro-batch
    that has the fewest tokens, to as few as hold them all; then, for each epoch, groups at random
    change places where both fit. Unshuffled, micro-batches are filled in the order of the dataset.

    Args:
        tokens: of each group.
        groups: in a micro-batch, unless there is `max_tokens`.
        max_tokens: in a micro-batch; a group with more has one to itself.
        ranks: number of devices.
        rank: which device.
        seed: of the order.
        shuffle: whether to change the order from epoch to epoch.
        drop_last: whether to leave out groups at the end that do not fill a step of all devices.
    """

    def __init__(
        self,
        tokens: Sequence[int],  # (N,)
        groups: int,
        max_tokens: int | None = None,
        *,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.tokens = list(tokens)
        self.groups = groups
        self.max_tokens = max_tokens
        self.ranks = ranks
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self._dealt: list[list[int]] = []
        if max_tokens is not None:
            self._dealt = self._deal(max_tokens) if shuffle else self._fill(max_tokens)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.max_tokens is not None:
            return len(self._dealt) // self.ranks
        step = self.groups * self.ranks
        return len(self.tokens) // step if self.drop_last else -(-len(self.tokens) // step)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._epoch()[self.rank :: self.ranks]

    def _epoch(self) -> list[list[int]]:
        """The micro-batches of all devices, in turn."""
        if self.max_tokens is not None:
            return self._mixed(self.max_tokens) if self.shuffle else self._dealt
        N, step = len(self.tokens), self.groups * self.ranks
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(N, generator=generator).numpy() if self.shuffle else np.arange(N)
        starts = range(0, len(self) * step, step)
        return [part.tolist() for s in starts
                for part in np.array_split(order[s : s + step], self.ranks)]  # fmt: skip

    def _fill(self, limit: int) -> list[list[int]]:
        """In the order of the dataset, for all devices at once."""
        batches: list[list[int]] = []
        turn: list[list[int]] = [[] for _ in range(self.ranks)]
        totals = [0] * self.ranks
        for i, n in enumerate(self.tokens):
            emptiest = totals.index(min(totals))
            if 0 < totals[emptiest] and totals[emptiest] + n > limit:
                batches += turn
                turn, totals = [[] for _ in range(self.ranks)], [0] * self.ranks
                emptiest = 0
            turn[emptiest].append(i)
            totals[emptiest] += n
        return batches + turn

    def _deal(self, limit: int) -> list[list[int]]:
        large = [i for i, n in enumerate(self.tokens) if n > limit]
        small = [i for i, n in enumerate(self.tokens) if n <= limit]
        small.sort(key=self.tokens.__getitem__, reverse=True)
        # Twice the fewest possible always do, and one more never makes the fullest one fuller.
        low = -(-self._total(small) // limit)
        high = 2 * low
        while low < high:
            middle = (low + high) // 2
            fullest = max(map(self._total, self._dealt_to(middle, small)))
            low, high = (low, middle) if fullest <= limit else (middle + 1, high)
        count = -(-(low + len(large)) // self.ranks) * self.ranks
        return [[i] for i in large] + self._dealt_to(count - len(large), small)

    def _dealt_to(self, count: int, groups: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, b) for b in range(count)]
        for i in groups if count else ():
            total, b = emptiest[0]
            batches[b].append(i)
            heapq.heapreplace(emptiest, (total + self.tokens[i], b))
        return batches

    def _mixed(self, limit: int) -> list[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        batches = [list(batch) for batch in self._dealt]
        totals = [self._total(batch) for batch in batches]
        places = [(b, k) for b, batch in enumerate(batches) if totals[b] <= limit
                  for k in range(len(batch))]  # fmt: skip
        for partners in random.integers(len(places), size=(MIXING, len(places))).tolist():
            for (a, j), place in zip(places, partners, strict=True):
                b, k = places[place]
                more = self.tokens[batches[b][k]] - self.tokens[batches[a][j]]
                if totals[a] + more <= limit and totals[b] - more <= limit:
                    batches[a][j], batches[b][k] = batches[b][k], batches[a][j]
                    totals[a] += more
                    totals[b] -= more
        # Neighbours in size go to the devices at the same time, so that none waits for another.
        order = sorted(range(len(batches)), key=totals.__getitem__, reverse=True)
        turns = random.permutation(np.array(order).reshape(-1, self.ranks))
        return [batches[b] for b in random.permuted(turns, axis=1).flat]

    def _total(self, batch: Sequence[int]) -> int:
        return sum(self.tokens[i] for i in batch)


class ChunkingCollator:
    """Collates groups; those that have more than `max_tokens` become a batch of chunks.

    Chunks are batches of consecutive candidates, of one group or of whole ones: what the loss reads
    lies in the batch itself, what the backbone reads in its `chunks`. Of what a `GroupBatchSampler`
    brings, only a group by itself can be that large. For a device without groups there is a batch
    of one candidate that is left out of the loss.

    Args:
        collate: makes a batch of examples.
        examples: the dataset, where a device can be without groups.
        max_tokens: in a chunk of several candidates; None: no chunks.
        shared: whether the candidates of a batch share their prompt.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Example]], dict[str, Any]],
        examples: Sequence[Example],
        max_tokens: int | None,
        shared: bool,
    ) -> None:
        self.collate = collate
        self.max_tokens = max_tokens
        self.shared = shared
        shortest = min(examples, key=lambda e: group_tokens(e, True), default=None)
        self.filler = [] if shortest is None else [_candidates(shortest, 0, 1)]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self.collate(examples or self.filler)
        chunks = list(self._chunks(examples))
        if len(chunks) < 2:
            return batch
        found = {name: batch[name] for name in GROUP_KEYS if name in batch}
        return found | {"chunks": [self.collate(chunk) for chunk in chunks]}

    def _chunks(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        if self.max_tokens is None:
            return
        whole: list[Example] = []
        left = self.max_tokens
        for example in examples:
            tokens = group_tokens(example, self.shared)
            if whole and tokens > left:
                yield whole
                whole, left = [], self.max_tokens
            if tokens > left:
                yield from ([part] for part in self._parts(example, left))
            else:
                whole.append(example)
                left -= tokens
        if whole:
            yield whole

    def _parts(self, example: Example, max_tokens: int) -> Iterator[Example]:
        start, K = 0, len(example["input_ids"])
        for end in range(1, K + 1):
            longer = _candidates(example, start, end + 1)
            if end == K or group_tokens(longer, self.shared) > max_tokens:
                yield _candidates(example, start, end)
                start = end


def _candidates(example: Example, start: int, end: int) -> Example:
    """Some candidates of a group, which is left out of the loss."""

    def part(values: Any) -> Any:
        return None if values is None else values[start:end]

    return {
        **example,
        "input_ids": example["input_ids"][start:end],
        "token_type_ids": part(example["token_type_ids"]),
        "margin": part(example["margin"]),
        "target": -100,
        "ranks": part(example.get("ranks")),
        "teacher_scores": part(example.get("teacher_scores")),
    }
