"""From rows to batches: read, check, tokenise once, collate ragged groups.

A row is ``{"prompt": text or messages, "candidates": [text or messages, ...], "best": int}`` with
optional ``weight``, ``margin``, and ``labels`` or ``ranks`` in place of ``best``.
Letters: N groups, M candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastrm.packing import Cost, plan

Row = dict[str, Any]


class DataError(ValueError):
    """A row that cannot be used; the message says where, which column and what was expected."""


class Example(TypedDict):
    """A tokenised group of K candidates."""

    input_ids: list[np.ndarray]  # K arrays: prompt and candidate in one
    token_type_ids: list[np.ndarray] | None
    prompt_length: int  # tokens at the start that all candidates share; 0 for pairs
    target: int | np.ndarray  # position of the best, or (K,) distribution
    margin: np.ndarray | None  # (K,)
    weight: float | None
    cut: bool  # whether the prompt lost tokens at its left


class Examples(list[Example]):
    """Tokenised groups, and how many were left out because a candidate alone does not fit."""

    dropped = 0


def read_rows(path: str | Path, labelled: bool = True) -> list[Row]:
    """Rows of a JSONL file, each checked; other columns are kept.

    Args:
        path: one JSON object a line; blank lines are skipped.
        labelled: whether each row must say which candidate is best.

    Raises:
        DataError: the file or a row cannot be used, "FILE:LINE: column 'x': expected ..., got ...".
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: expected UTF-8 text, got byte {e.object[e.start]:#04x} "
                        f"at position {e.start}") from None  # fmt: skip
    except OSError as e:
        raise DataError(f"{path}: expected a JSONL file, got: {e.strerror}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(f"{where}: expected a JSON object on one line, got broken JSON: "
                            f"{e.msg} at character {e.colno}") from None  # fmt: skip
        except (ValueError, RecursionError) as e:  # a number or a nesting beyond all use
            raise DataError(f"{where}: expected a JSON object on one line, got: {e}") from None
        _check_row(row, where, labelled)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: expected at least one row, got an empty file")
    return rows


def check_rows(rows: Iterable[Any], source: str = "", labelled: bool = True) -> list[Row]:
    """The same checks for a list or a `datasets.Dataset`.

    Args:
        rows: the rows.
        source: what to call them in an error, such as the argument's name.
        labelled: whether each row must say which candidate is best.

    Raises:
        DataError: "row 3: column 'x': expected ..., got ...".
    """
    prefix = f"{source} " if source else ""
    if isinstance(rows, str | bytes | dict) or not hasattr(rows, "__len__"):
        raise DataError(f"{prefix}rows: expected a list of rows or a datasets.Dataset, "
                        f"got {type(rows).__name__}")  # fmt: skip
    rows = list(rows)
    for i, row in enumerate(rows):
        _check_row(row, f"{prefix}row {i}", labelled)
    if not rows:
        raise DataError(f"{prefix}rows: expected at least one row, got none")
    return rows


def _check_row(row: Any, where: str, labelled: bool) -> None:
    def refuse(column: str, expected: str, value: Any = None) -> NoReturn:
        got = repr(value) if column in row and value is not None else "nothing"
        got = got if len(got) <= 80 else got[:77] + "..."
        raise DataError(f"{where}: column '{column}': expected {expected}, got {got}")

    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with columns 'prompt', 'candidates' and "
                        f"'best', got {type(row).__name__}")  # fmt: skip
    if not _is_text(row.get("prompt")):
        refuse("prompt", "text or a list of messages {'role': text, 'content': text}",
               row.get("prompt"))  # fmt: skip
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        refuse("candidates", "a list of at least one candidate", candidates)
    K = len(candidates)
    for k, candidate in enumerate(candidates):
        if not _is_text(candidate):
            raise DataError(f"{where}: column 'candidates': expected text or a list of messages as "
                            f"candidate {k}, got {repr(candidate)[:60]}")  # fmt: skip

    def numbers(column: str, lowest: float, kind: type = float) -> list[Any]:
        values = row[column]
        fits = isinstance(values, list) and len(values) == K
        if not fits or not all(_is_number(v, kind) and v >= lowest for v in values):
            what = "integers" if kind is int else "finite numbers"
            least = "" if lowest == -math.inf else f" of at least {lowest:g}"
            refuse(column, f"{K} {what}{least}, one a candidate", values)
        return values

    best = row.get("best")
    if best is not None and not (_is_number(best, int) and 0 <= best < K):
        refuse("best", f"an integer from 0 to {K - 1}, the position of the best candidate", best)
    if row.get("labels") is not None and sum(numbers("labels", 0)) <= 0:
        refuse("labels", "at least one number above 0", row["labels"])
    if row.get("ranks") is not None and max(numbers("ranks", -1, int)) < 0:
        refuse("ranks", "at least one rank of 0 or more (-1 is unranked)", row["ranks"])
    if labelled and all(row.get(c) is None for c in ("best", "labels", "ranks")):
        refuse("best", f"an integer from 0 to {K - 1}, the position of the best candidate")
    weight, margin = row.get("weight"), row.get("margin")
    if weight is not None and not (_is_number(weight, float) and weight >= 0):
        refuse("weight", "a finite number of at least 0", weight)
    if margin is not None and not _is_number(margin, float):
        numbers("margin", -math.inf)


def _is_text(value: Any) -> bool:
    if isinstance(value, str):  # half of a surrogate pair, from text that was cut, is no text
        return not any("\ud800" <= c <= "\udfff" for c in value)
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str) and _is_text(m["content"])
        for m in value
    )  # fmt: skip


def _is_number(value: Any, kind: type) -> bool:
    kinds = (int,) if kind is int else (int, float)
    # The batches are fp32; NaN fails the comparison too.
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= 3.4e38


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
    prompt, candidates, is_chat = _texts(tokenizer, row)
    if pairs:
        tokens = _tokenize_pairs(tokenizer, prompt, candidates, max_length)
    else:
        tokens = _tokenize_apart(tokenizer, prompt, candidates, max_length, is_chat)
    if tokens is None:
        return None
    input_ids, types, shared, cut = tokens
    margin = row.get("margin")
    target = row_target(row)
    return Example(
        input_ids=input_ids,
        token_type_ids=types,
        prompt_length=shared,
        target=-100 if target is None else target,
        margin=None if margin is None else np.broadcast_to(np.float32(margin), len(input_ids)),
        weight=row.get("weight"),
        cut=cut,
    )


def tokenize_rows(
    tokenizer: Any, rows: Iterable[Row], max_length: int | None, pairs: bool
) -> Examples:
    """All rows as `Examples`; those that do not fit are left out and counted."""
    examples = Examples()
    for row in rows:
        example = tokenize_row(tokenizer, row, max_length, pairs)
        if example is None:
            examples.dropped += 1
        else:
            examples.append(example)
    return examples


def _texts(tokenizer: Any, row: Row) -> tuple[str, list[str], bool]:
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
    the loss reads: offsets (N + 1,), target (N,) or (M,), rows (M,) unless the model pools and the
    layout is padded (candidate i is row `rows[i]` of the hidden states), and margin (M,) and
    group_weight (N,) where a row has them.

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
        return batch


def _targets(targets: Sequence[int | np.ndarray], sizes: Sequence[int]) -> Tensor:
    """Positions (N,), or distributions (M,) as soon as one group has one."""
    if all(isinstance(t, int) for t in targets):
        return torch.tensor(targets)
    one_hot = [np.eye(k, dtype=np.float32)[t] if isinstance(t, int) else t
               for t, k in zip(targets, sizes, strict=True)]  # fmt: skip
    return torch.from_numpy(np.concatenate(one_hot))
