"""Rewards of rows under a model, and how good they are.

A row is `{"prompt", "candidates", "best"}`, see `fastrm.data`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastrm import packing
from fastrm.data import DataError, RaggedCollator, row_target, tokenize_row

Row = Mapping[str, Any]


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    layout: str = "auto",
    progress: bool = False,
) -> list[list[float] | None]:
    """The raw reward of every candidate, fp32, with no sigmoid.

    Args:
        model: a reward model, see `fastrm.load_reward_model`; read in evaluation mode.
        tokenizer: its tokenizer.
        rows: checked rows, see `fastrm.data.read_rows`; they need no `best`.
        batch_size: groups at a time. Groups of similar length go together.
        max_length: tokens of a prompt with one candidate, never more than the model reads. A longer
            prompt is cut at its left.
        layout: one of `fastrm.packing.LAYOUTS`; auto: for each batch the cheapest.
        progress: show a progress bar on stderr.

    Returns:
        For each row a list of its candidates' rewards, or None where one does not fit.
    """
    from tqdm.auto import tqdm

    from fastrm.model import attach_head, is_encoder, token_limit

    head, pairs = attach_head(model), is_encoder(model)
    limit = token_limit(model, tokenizer, max_length)
    with torch.inference_mode():
        layouts, _ = packing.usable(model, head, pairs, layout, gradients=False)
    cost = packing.Cost.of(model)
    collate = RaggedCollator(tokenizer.pad_token_id, not pairs, layouts, cost)
    rewards: list[list[float] | None] = [None] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(
            total=len(rows), desc="scoring", unit="group", disable=not progress
        ) as bar:  # fmt: skip
            for chunk in _by_length(rows, 64 * batch_size, batch_size):
                found = [(n, tokenize_row(tokenizer, dict(rows[n]), limit, pairs)) for n in chunk]
                fits = [(n, example) for n, example in found if example is not None]
                if fits:
                    batch = collate([example for _, example in fits])
                    batch = packing.to_device(batch, model.device)
                    with head.scoring(batch) as result:
                        packing.run(model, batch, model.config)
                    groups = result.scores.split(batch["offsets"].diff().tolist())
                    for (n, _), scores in zip(fits, groups, strict=True):
                        rewards[n] = scores.tolist()
                bar.update(len(chunk))
    finally:
        model.train(was_training)
    return rewards


def evaluate_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], **options: Any
) -> dict[str, float]:
    """`metrics` of the rows that fit, and `left_out`, how many do not.

    Args:
        model, tokenizer, rows, options: as for `score_rows`.

    Raises:
        DataError: no row fits.
    """
    scores = score_rows(model, tokenizer, rows, **options)
    kept = [(row, s) for row, s in zip(rows, scores, strict=True) if s is not None]
    if not kept:
        raise DataError("no group is left, every one has a candidate that does not fit")
    found = metrics([row for row, _ in kept], [s for _, s in kept])
    return {**found, "left_out": len(rows) - len(kept)}


def _by_length(rows: Sequence[Row], window: int, batch_size: int) -> Iterator[list[int]]:
    """Batches of positions, rows of similar length together within each window."""
    for start in range(0, len(rows), window):
        order = sorted(range(start, min(start + window, len(rows))), key=lambda n: _size(rows[n]))
        for i in range(0, len(order), batch_size):
            yield order[i : i + batch_size]


def _size(row: Row) -> int:
    return text_length(row["prompt"]) + max(map(text_length, row["candidates"]))


def credit(scores: Sequence[float], best: Sequence[int]) -> float:
    """How much of the top of `scores` is best: 1/#tied with one best, as RewardBench 2 counts it.

    A score that is not a number earns nothing for its group.
    """
    if any(map(math.isnan, scores)):
        return 0.0
    top = max(scores)
    tied = [i for i, score in enumerate(scores) if score == top]
    return sum(i in best for i in tied) / len(tied)


def best_of(row: Row) -> list[int]:
    """The positions of the best candidates, several where labels or ranks tie."""
    target = row_target(dict(row))
    if target is None:
        raise ValueError("row must say which candidate is best, but has no best, labels or ranks")
    if isinstance(target, int):
        return [target]
    return [i for i, share in enumerate(target) if share == target.max()]


def _expected(scores: Sequence[float], row: Row) -> float:
    """The mean of `scores` under the row's target distribution."""
    target = row_target(dict(row))
    if target is None or isinstance(target, int):
        return scores[target or 0]
    return math.fsum(float(share) * score for share, score in zip(target, scores, strict=True))


def chosen(scores: Sequence[float]) -> int:
    """The position of the highest score, the first of several."""
    return max(range(len(scores)), key=lambda i: scores[i])


def text_length(text: str | Sequence[Mapping[str, Any]]) -> int:
    """Characters of a candidate, a text or a list of messages."""
    if isinstance(text, str):
        return len(text)
    return sum(len(message["content"]) for message in text)


def baselines(rows: Sequence[Row]) -> dict[str, float]:
    """What needs no model: accuracy of a random and of the longest candidate; n, the groups."""
    chance, longest = 0.0, 0.0
    for row in rows:
        best = best_of(row)
        chance += len(best) / len(row["candidates"])
        longest += credit([float(text_length(c)) for c in row["candidates"]], best)
    return {"chance": chance / len(rows), "longest": longest / len(rows), "n": len(rows)}


def metrics(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """How good `scores` are on `rows`, each metric a mean over groups.

    Args:
        rows: N rows with `best`, `labels` or `ranks`.
        scores: N lists, one score a candidate.

    Returns:
        accuracy: credit of the highest score, 1/#tied when the best is one of those tied.
        loss: -Σ q log softmax(scores), where q is 1 at the best, or the labels as shares.
        margin: the best's score minus the highest of the others, over groups that have others.
        chance, longest, n: see `baselines`.

    Raises:
        ValueError: no rows, or scores that do not fit them.
    """
    if len(rows) != len(scores) or not rows:
        raise ValueError(
            f"rows and scores must be equally many, at least 1; got {len(rows)} and {len(scores)}"
        )
    accuracy, loss, margins = 0.0, 0.0, []
    for n, (row, s) in enumerate(zip(rows, scores, strict=True)):
        best = best_of(row)
        if len(s) != len(row["candidates"]):
            raise ValueError(
                f"scores[{n}] must have {len(row['candidates'])} scores, one a candidate, "
                f"got {len(s)}"
            )
        top = max(s)
        accuracy += credit(s, best)
        loss += top + math.log(sum(math.exp(x - top) for x in s)) - _expected(s, row)
        if others := [x for i, x in enumerate(s) if i not in best]:
            margins.append(max(s[i] for i in best) - max(others))
    return {
        "accuracy": accuracy / len(rows),
        "loss": loss / len(rows),
        "margin": sum(margins) / len(margins) if margins else 0.0,
        **baselines(rows),
    }
