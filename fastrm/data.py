"""From rows to batches: read, check, tokenise once, collate ragged groups.

A row is ``{"prompt": text or messages, "candidates": [text or messages, ...], "best": int}`` with
``labels`` or ``ranks`` in place of ``best`` if you like, and optional ``weight``, ``margin`` and
``teacher_scores``. Rows in other libraries' formats are converted to it, see `fastrm.formats`.
Letters: N groups, M candidates, K candidates of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastrm import formats
from fastrm.formats import DataError, Row, is_number, is_text, numbers, refuse
from fastrm.packing import Cost, plan


class Example(TypedDict):
    """A tokenised group of K candidates."""

    input_ids: list[np.ndarray]  # K arrays: prompt and candidate in one
    token_type_ids: list[np.ndarray] | None
    prompt_length: int  # tokens at the start that all candidates share; 0 for pairs
    target: int | np.ndarray  # position of the best, or (K,) distribution
    margin: np.ndarray | None  # (K,)
    weight: float | None
    cut: bool  # whether the prompt lost tokens at its left
    ranks: NotRequired[np.ndarray | None]  # (K,) int64, lower is better, -1 unranked
    teacher_scores: NotRequired[np.ndarray | None]  # (K,) fp32


class Examples(list[Example]):
    """Tokenised groups; which rows they are of, and how many rows have a candidate too long."""

    rows: Sequence[int] = ()
    dropped = 0


def read_rows(source: str | Path, labelled: bool = True) -> list[Row]:
    """Rows of a file or a dataset, each converted where need be and checked.

    Args:
        source: a JSONL, JSON (a list of rows), CSV, TSV or Parquet file, or NAME or NAME:SPLIT of a
            dataset on the Hugging Face hub (split train); rows in one of `fastrm.formats.FORMATS`.
            A CSV cell holds text, or JSON for messages, lists and numbers.
        labelled: whether each row must say which candidate is best.

    Returns:
        The rows in fastrm's format; columns that it does not know are kept.

    Raises:
        DataError: the source or a row cannot be used, such as "FILE:LINE: column 'x': expected ...,
            got ...".
    """
    rows = [to_row(raw, where, labelled) for where, raw in formats.load(source)]
    if not rows:
        raise DataError(f"{source}: expected at least one row, got an empty file")
    return rows


def check_rows(rows: Iterable[Any], source: str = "", labelled: bool = True) -> list[Row]:
    """The same conversions and checks for a list or a `datasets.Dataset`.

    Args:
        rows: the rows, in one of `fastrm.formats.FORMATS`.
        source: what to call them in an error, such as the argument's name.
        labelled: whether each row must say which candidate is best.

    Raises:
        DataError: "row 3: column 'x': expected ..., got ...".
    """
    prefix = f"{source} " if source else ""
    if isinstance(rows, str | bytes | dict) or not hasattr(rows, "__len__"):
        raise DataError(f"{prefix}rows: expected a list of rows or a datasets.Dataset, "
                        f"got {type(rows).__name__}")  # fmt: skip
    found = [to_row(row, f"{prefix}row {i}", labelled) for i, row in enumerate(rows)]
    if not found:
        raise DataError(f"{prefix}rows: expected at least one row, got none")
    return found


def to_row(raw: Any, where: str, labelled: bool = True) -> Row:
    """One row, converted where need be and checked; one in fastrm's format comes back itself.

    Args:
        raw: the row, or the `DataError` that reading it gave.
        where: what to call it in an error.
        labelled: whether it must say which candidate is best.

    Raises:
        DataError: "WHERE: column 'x': expected ..., got ...".
    """
    row = formats.convert(raw, where)
    best = row.get("best")
    if isinstance(best, float) and best.is_integer():  # as pandas writes a column that has gaps
        row = row | {"best": int(best)}
    _check_row(row, where, labelled)
    return row


def _check_row(row: Row, where: str, labelled: bool) -> None:
    formats.text(row, "prompt", where)
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        refuse(where, "candidates", "a list of at least one candidate", candidates)
    K = len(candidates)
    for k, candidate in enumerate(candidates):
        if not is_text(candidate):
            refuse(where, "candidates", f"text or a list of messages as candidate {k}", candidate)
    best = row.get("best")
    if best is not None and not (is_number(best, int) and 0 <= best < K):
        refuse(where, "best", f"an integer from 0 to {K - 1}, the position of the best candidate",
               best)  # fmt: skip
    if row.get("labels") is not None:
        labels = numbers(row, "labels", K, where, 0)
        if sum(labels) <= 0:
            refuse(where, "labels", "at least one number above 0", labels)
        if best is not None and labels[best] < max(labels):
            refuse(where, "best", "a candidate of the largest of its labels", best)
    if row.get("ranks") is not None and max(numbers(row, "ranks", K, where, -1, int)) < 0:
        refuse(where, "ranks", "at least one rank of 0 or more (-1 is unranked)", row["ranks"])
    if labelled and all(row.get(c) is None for c in ("best", "labels", "ranks")):
        refuse(where, "best", f"an integer from 0 to {K - 1}, the position of the best candidate")
    weight, margin = row.get("weight"), row.get("margin")
    if weight is not None and not (is_number(weight, float) and weight >= 0):
        refuse(where, "weight", "a finite number of at least 0", weight)
    if margin is not None and not is_number(margin, float):
        numbers(row, "margin", K, where)
    if row.get("teacher_scores") is not None:
        numbers(row, "teacher_scores", K, where)


def row_target(row: Row) -> int | np.ndarray | None:
    """The best candidate's position, or a distribution (K,) from `labels` or tied `ranks`.

    `labels` are divided by their sum. The lowest of `ranks` is best, -1 is unranked.
    """
    if row.get("labels") is not None:
        labels = np.asarray(row["labels"], dtype=np.float64)
        return (labels / labels.sum()).astype(np.float32)
    if row.get("best") is not None:
        return int(row["best"])
    if row.get("ranks") is None:
        return None
    top = min(r for r in row["ranks"] if r >= 0)
    ties = [r == top for r in row["ranks"]]
    return ties.index(True) if sum(ties) == 1 else np.asarray(ties, np.float32) / sum(ties)


def tokenize_row(tokenizer: Any, row: Row, max_length: int | None, pairs: bool) -> Example | None:
    """A row as token ids, or None if a candidate does not fit in `max_length` at all.

    Decoders (`pairs` False) read prompt and candidate, tokenised apart and concatenated, then EOS
    where that is not the padding token. Encoders (`pairs` True) read the tokenizer's own pair
    template. Messages go through the chat template, which brings its own special tokens. What is
    too long loses tokens at the left of the prompt, the same for every candidate of the group;
    never a part of a candidate.
    """
    prompt, candidates, is_chat = row_texts(tokenizer, row)
    if pairs:
        tokens = _tokenize_pairs(tokenizer, prompt, candidates, max_length)
    else:
        tokens = _tokenize_apart(tokenizer, prompt, candidates, max_length, is_chat)
    if tokens is None:
        return None
    input_ids, types, shared, cut = tokens
    margin, ranks, teacher_scores = map(row.get, ("margin", "ranks", "teacher_scores"))
    target = row_target(row)
    return Example(
        input_ids=input_ids,
        token_type_ids=types,
        prompt_length=shared,
        target=-100 if target is None else target,
        margin=None if margin is None else np.broadcast_to(np.float32(margin), len(input_ids)),
        weight=row.get("weight"),
        cut=cut,
        ranks=None if ranks is None else np.array(ranks, np.int64),
        teacher_scores=None if teacher_scores is None else np.array(teacher_scores, np.float32),
    )


def tokenize_rows(
    tokenizer: Any, rows: Iterable[Row], max_length: int | None, pairs: bool
) -> Examples:
    """All rows as `Examples`; those that do not fit are left out and counted."""
    found = [tokenize_row(tokenizer, row, max_length, pairs) for row in rows]
    examples = Examples(example for example in found if example is not None)
    examples.rows = [n for n, example in enumerate(found) if example is not None]
    examples.dropped = len(found) - len(examples)
    return examples


def row_texts(tokenizer: Any, row: Row) -> tuple[str, list[str], bool]:
    """Prompt and candidates as text, and whether they come from the chat template."""
    prompt, candidates = row["prompt"], row["candidates"]
    if isinstance(prompt, str) and all(isinstance(c, str) for c in candidates):
        return prompt, candidates, False
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("rows with messages: expected a tokenizer with a chat template, got "
                        f"{type(tokenizer).__name__} without one")  # fmt: skip
    head = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def render(messages: list[dict[str, str]], **kwargs: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    full = [
        render(head + ([{"role": "assistant", "content": c}] if isinstance(c, str) else c))
        for c in candidates
    ]
    for shared in (render(head, add_generation_prompt=True), render(head)):
        if all(text.startswith(shared) for text in full):
            return shared, [text[len(shared) :] for text in full], True
    # A template that rewrites earlier turns: nothing is shared, so nothing may be cut.
    return "", full, True


@lru_cache(maxsize=8)
def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself, such as BOS."""
    full = tokenizer("x")["input_ids"]
    return full[: full.index(tokenizer("x", add_special_tokens=False)["input_ids"][0])]


# Ids, token types, length of the shared start, whether the prompt was cut.
Tokens = tuple[list[np.ndarray], list[np.ndarray] | None, int, bool]


def _tokenize_apart(
    tokenizer: Any, prompt: str, candidates: Sequence[str], max_length: int | None, is_chat: bool
) -> Tokens | None:
    ids = tokenizer([prompt, *candidates], add_special_tokens=False)["input_ids"]
    prefix = [] if is_chat else _prefix(tokenizer)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = []
    for answer in ids[1:]:
        if not is_chat and eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        # Hugging Face pools the last token that is not padding: nothing may end in that id.
        while answer and answer[-1] == pad:
            answer = answer[:-1]
        answers.append(answer)
    excess = 0
    if max_length is not None:
        longest = len(prefix) + len(ids[0]) + max(len(a) for a in answers)
        excess = max(longest - max_length, 0)
        if excess > len(ids[0]):
            return None
    head = [*prefix, *ids[0][excess:]]
    if any(not a for a in answers):
        while head and head[-1] == pad:
            head = head[:-1]
        if not head:
            raise DataError(f"prompt {prompt!r} and a candidate: expected at least one token")
    return [np.array(head + a, dtype=np.int32) for a in answers], None, len(head), excess > 0


def _tokenize_pairs(
    tokenizer: Any, prompt: str, candidates: Sequence[str], max_length: int | None
) -> Tokens | None:
    encoded = tokenizer([prompt] * len(candidates), list(candidates), truncation=False)
    excess = 0 if max_length is None else max(len(i) for i in encoded["input_ids"]) - max_length
    keep: list[np.ndarray] | None = None
    if excess > 0:
        keep = []
        for k in range(len(candidates)):
            is_prompt = np.array([s == 0 for s in encoded.sequence_ids(k)])
            if is_prompt.sum() < excess:
                return None
            keep.append(~(is_prompt & (is_prompt.cumsum() <= excess)))

    def arrays(name: str) -> list[np.ndarray]:
        found = [np.array(ids, dtype=np.int32) for ids in encoded[name]]
        return found if keep is None else [f[k] for f, k in zip(found, keep, strict=True)]

    types = arrays("token_type_ids") if "token_type_ids" in encoded else None
    return arrays("input_ids"), types, 0, keep is not None


class RaggedCollator:
    """A list of examples as one batch.

    The batch holds what the backbone reads, input_ids and what else its layout brings, and what
    the loss reads: offsets (N + 1,), target (N,) or (M,), ranks (M,) (those of the row, or that its
    best or its labels give), rows (M,) unless the model pools and the layout is padded (candidate i
    is row `rows[i]` of the hidden states), margin (M,) and group_weight (N,) where a row has them,
    and teacher_scores (M,) where all have them.

    Args:
        pad_token_id: fills rows up.
        last_token: whether a candidate is read at its last token; otherwise the model pools.
        layouts: those of `fastrm.packing` to choose from, for each batch the cheapest.
        cost: what a batch costs.
    """

    def __init__(
        self,
        pad_token_id: int,
        last_token: bool,
        layouts: Sequence[str] = ("padded",),
        cost: Cost | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.last_token = last_token
        self.layouts = layouts
        self.cost = cost or Cost()

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = plan(examples, self.layouts, self.cost, self.last_token).build(self.pad_token_id)
        sizes = [len(e["input_ids"]) for e in examples]
        batch["offsets"] = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
        batch["target"] = _targets([e["target"] for e in examples], sizes)
        margins = [e["margin"] for e in examples]
        if any(m is not None for m in margins):
            filled = [np.zeros(k, np.float32) if m is None else m
                      for m, k in zip(margins, sizes, strict=True)]  # fmt: skip
            batch["margin"] = torch.from_numpy(np.concatenate(filled))
        weights = [e["weight"] for e in examples]
        if any(w is not None for w in weights):
            batch["group_weight"] = torch.tensor(
                [1.0 if w is None else w for w in weights], dtype=torch.float32
            )
        batch["ranks"] = torch.from_numpy(np.concatenate([_ranks(e) for e in examples]))
        taught: list[Any] = [e.get("teacher_scores") for e in examples]
        if all(t is not None for t in taught):
            batch["teacher_scores"] = torch.from_numpy(np.concatenate(taught))
        return batch


def _targets(targets: Sequence[int | np.ndarray], sizes: Sequence[int]) -> Tensor:
    """Positions (N,), or distributions (M,) as soon as one group has one."""
    if all(isinstance(t, int) for t in targets):
        return torch.tensor(targets)
    # All 0 for one that is left out, -100: fit for scoring, refused by the loss.
    one_hot = [(np.arange(k) == t).astype(np.float32) if isinstance(t, int) else t
               for t, k in zip(targets, sizes, strict=True)]  # fmt: skip
    return torch.from_numpy(np.concatenate(one_hot))


def _ranks(example: Example) -> np.ndarray:
    """Ranks (K,): given; or the best before all others; or the larger share first, 0 unranked."""
    given, target = example.get("ranks"), example["target"]
    if given is not None:
        return given
    if isinstance(target, int):
        return np.where(np.arange(len(example["input_ids"])) == target, 0, -1)
    return np.where(target > 0, np.unique(-target, return_inverse=True)[1], -1)
