"""Rewards of rows under a model, and how good they are.

A row is `{"prompt", "candidates", "best"}`, see `fastrm.data`. Letters: N groups, M candidates.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrm import packing
from fastrm.data import DataError, RaggedCollator, row_target, tokenize_row

Row = Mapping[str, Any]
log = logging.getLogger("fastrm")

SUBSET_COLUMNS = ("subset", "source")
BINS = 10


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
            prompt is cut at its left, and a warning says how many were.
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
    cut = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(
            total=len(rows), desc="scoring", unit="group", disable=not progress
        ) as bar:  # fmt: skip
            for chunk in _by_length(rows, 64 * batch_size, batch_size):
                found = [(n, tokenize_row(tokenizer, dict(rows[n]), limit, pairs)) for n in chunk]
                fits = [(n, example) for n, example in found if example is not None]
                cut += sum(example["cut"] for _, example in fits)
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
    if cut:
        log.warning("%d prompts cut at the left, to %d tokens with a candidate", cut, limit)
    return rewards


def evaluate_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], **options: Any
) -> dict[str, Any]:
    """`assess` of the rows that fit, and `left_out`, how many do not.

    Args:
        model, tokenizer, rows, options: as for `score_rows`.

    Raises:
        DataError: no row fits.
    """
    kept, scores = scored(rows, score_rows(model, tokenizer, rows, **options))
    return {**assess(kept, scores), "left_out": len(rows) - len(kept)}


def scored(
    rows: Sequence[Row], scores: Sequence[list[float] | None]
) -> tuple[list[Row], list[list[float]]]:
    """The rows that have scores, and their scores; `DataError` if there are none."""
    pairs = [(row, s) for row, s in zip(rows, scores, strict=True) if s is not None]
    if not pairs:
        raise DataError("no group is left, every one has a candidate that does not fit")
    return [row for row, _ in pairs], [s for _, s in pairs]


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


def assess(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Everything that is known of `scores` on `rows`.

    Args:
        rows: N rows with `best`, `labels` or `ranks`.
        scores: N lists, one raw reward a candidate.

    Returns:
        What `metrics` has, and mrr and ndcg (None where no row has labels or ranks), means of
        `reciprocal_rank` and `ndcg` over groups; rewards, see `reward_spread`; calibration, see
        `calibration`; ties, see `ties_score`, where there are rows for it; and subsets, the first
        of these for each value of a column `subset` or `source`, where there is one.

    Raises:
        ValueError: as `metrics`.
    """
    found: dict[str, Any] = _summary(rows, scores)
    found["rewards"] = reward_spread(rows, scores)
    found["calibration"] = calibration(rows, scores)
    if ties := ties_score(rows, scores):
        found["ties"] = ties
    if column := next((c for c in SUBSET_COLUMNS if any(c in row for row in rows)), None):
        parts: dict[str, list[int]] = defaultdict(list)
        for n, row in enumerate(rows):
            parts[str(row.get(column))].append(n)
        found["subsets"] = {
            name: _summary([rows[n] for n in part], [scores[n] for n in part])
            for name, part in sorted(parts.items())
        }
    return found


def _summary(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    found: dict[str, Any] = metrics(rows, scores)
    found["mrr"] = _mean(
        reciprocal_rank(s, best_of(row)) for row, s in zip(rows, scores, strict=True)
    )
    graded = [(s, g) for row, s in zip(rows, scores, strict=True) if (g := grades(row))]
    found["ndcg"] = _mean(ndcg(s, g) for s, g in graded) if graded else None
    return found


def reciprocal_rank(scores: Sequence[float], best: Sequence[int]) -> float:
    """1/rank of the first best candidate, expected over a random order of candidates that tie.

    Source: McSherry and Najork, Computing information retrieval performance measures efficiently
    in the presence of tied scores, 2008. A score that is not a number gives 0.
    """
    if any(map(math.isnan, scores)):
        return 0.0
    top = max(scores[i] for i in best)
    above, tied = sum(s > top for s in scores), sum(s == top for s in scores)
    hits = sum(scores[i] == top for i in best)
    # In C(tied - 1 - j, hits - 1) of C(tied, hits) orders the first hit is the j-th of the tied.
    ways = (math.comb(tied - 1 - j, hits - 1) / (above + 1 + j) for j in range(tied - hits + 1))
    return sum(ways) / math.comb(tied, hits)


def grades(row: Row) -> list[float] | None:
    """The gain of each candidate: its label; or of ranks 1 for the last, 2 for the one before, ...

    Equal ranks count once, and unranked candidates gain 0. None if the row has neither.
    """
    if row.get("labels") is not None:
        return [float(x) for x in row["labels"]]
    if row.get("ranks") is None:
        return None
    levels = sorted({r for r in row["ranks"] if r >= 0}, reverse=True)
    return [levels.index(r) + 1.0 if r >= 0 else 0.0 for r in row["ranks"]]


def ndcg(scores: Sequence[float], gains: Sequence[float]) -> float:
    """DCG of the order of `scores` divided by that of the best order, 0 to 1.

    DCG = Σ gain / log2(1 + position), with the gains as they are (Järvelin and Kekäläinen,
    Cumulated gain-based evaluation of IR techniques, 2002), expected over a random order of
    candidates that tie (McSherry and Najork, 2008). A score that is not a number gives 0.
    """
    if any(map(math.isnan, scores)):
        return 0.0
    return _dcg(scores, gains) / _dcg(gains, gains)


def _dcg(keys: Sequence[float], gains: Sequence[float]) -> float:
    total, position = 0.0, 1
    for key in sorted(set(keys), reverse=True):
        tied = [gain for k, gain in zip(keys, gains, strict=True) if k == key]
        discounts = sum(1 / math.log2(1 + position + j) for j in range(len(tied)))
        total += discounts * sum(tied) / len(tied)
        position += len(tied)
    return total


def reward_spread(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard deviation (of the population) of the rewards.

    Returns:
        mean, std, min and max over the M candidates; std_in_group, the root of the mean squared
        distance of a reward from its group's mean; and by_rank, a dict of rank, n, mean and std
        for each place in the data's own order, where 1 is the best and equals share a place.
    """
    places: dict[int, list[float]] = defaultdict(list)
    for row, s in zip(rows, scores, strict=True):
        best = best_of(row)
        gains = grades(row) or [float(i in best) for i in range(len(s))]
        levels = sorted(set(gains), reverse=True)
        for gain, x in zip(gains, s, strict=True):
            places[levels.index(gain) + 1].append(x)
    flat = np.concatenate([np.asarray(s, np.float64) for s in scores])
    inner = np.concatenate([np.asarray(s, np.float64) - np.mean(s) for s in scores])
    return {
        "mean": float(flat.mean()), "std": float(flat.std()),
        "min": float(flat.min()), "max": float(flat.max()),
        "std_in_group": float(np.sqrt((inner**2).mean())),
        "by_rank": [
            {"rank": r, "n": len(x), "mean": float(np.mean(x)), "std": float(np.std(x))}
            for r, x in sorted(places.items())
        ],
    }  # fmt: skip


def calibration(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether softmax(scores) means what it says, over groups of at least two candidates.

    The confidence of a group is the probability of its highest score, and its accuracy the
    `credit`; for two candidates that is sigmoid(difference of the rewards).

    Returns:
        n: groups.
        bins: for each tenth of (0, 1] that has groups low, high, n, and their mean confidence and
            accuracy.
        ece: Σ n/N |accuracy - confidence| over the bins (Guo et al., On calibration of modern
            neural networks, 2017).
        nll: -Σ q log softmax(scores), the mean over groups.
        temperature: the T for which softmax(scores / T) has the lowest nll on these same rows
            (temperature scaling, same source), and nll_fitted, that nll. None for both where nll
            falls without end, because the best is always highest, or never has an advantage.
    """
    some = [(r, s) for r, s in zip(rows, scores, strict=True)
            if len(s) > 1 and all(map(math.isfinite, s))]  # fmt: skip
    if not some:
        return {"n": 0, "bins": [], "ece": None, "nll": None, "temperature": None,
                "nll_fitted": None}  # fmt: skip
    fit = _Fit(some)
    confidence = np.maximum.reduceat(fit.probabilities(1.0), fit.starts)
    right = np.array([credit(s, best_of(row)) for row, s in some])
    of_bin = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1)
    bins, ece = [], 0.0
    for b in range(BINS):
        inside = of_bin == b
        if n := int(inside.sum()):
            said, was = float(confidence[inside].mean()), float(right[inside].mean())
            bins.append({"low": b / BINS, "high": (b + 1) / BINS, "n": n,
                         "confidence": said, "accuracy": was})  # fmt: skip
            ece += n / len(some) * abs(was - said)
    temperature = fit.temperature()
    return {
        "n": len(some), "bins": bins, "ece": ece, "nll": fit.nll(1.0), "temperature": temperature,
        "nll_fitted": None if temperature is None else fit.nll(1 / temperature),
    }  # fmt: skip


class _Fit:
    """The negative log likelihood of softmax(beta · scores), which is convex in beta."""

    def __init__(self, some: Sequence[tuple[Row, Sequence[float]]]) -> None:
        sizes = np.array([len(s) for _, s in some])
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.group = np.repeat(np.arange(len(some)), sizes)
        raw = np.concatenate([np.asarray(s, np.float64) for _, s in some])
        self.scores = raw - np.maximum.reduceat(raw, self.starts)[self.group]
        targets = [row_target(dict(row)) for row, _ in some]
        self.q = np.concatenate([
            np.eye(k)[t] if isinstance(t, int) else np.asarray(t, np.float64)
            for t, k in zip(targets, sizes, strict=True)
        ])  # fmt: skip

    def probabilities(self, beta: float) -> np.ndarray:
        e = np.exp(beta * self.scores)
        return e / np.add.reduceat(e, self.starts)[self.group]

    def nll(self, beta: float) -> float:
        lse = np.log(np.add.reduceat(np.exp(beta * self.scores), self.starts))
        return float((lse.sum() - beta * (self.q * self.scores).sum()) / len(self.starts))

    def temperature(self) -> float | None:
        """1/beta where the derivative is 0, between 1e-6 and 1e6; None if it is not there."""

        def slope(log_beta: float) -> float:
            p = self.probabilities(math.exp(log_beta))
            return float(((p - self.q) * self.scores).sum())

        low, high = math.log(1e-6), math.log(1e6)
        if slope(low) >= 0 or slope(high) <= 0:
            return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        return math.exp(-(low + high) / 2)


def ties_score(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """The score of RewardBench 2's subset Ties (Malik et al., 2025; `process_single_model` there).

    A row counts whose `id` is "tied:i", a prompt with several right answers (`labels`), or "ref:i",
    its fellow with one. A group is accurate if every right answer scores above every wrong one;
    `gap` is the lowest right minus the highest wrong, `width` the highest right minus the lowest.

    Returns:
        tied_accuracy and ref_accuracy; preferred, the share of pairs where the tied gap is above
        the width; preferred_hard, where the smaller of both gaps is; margin, the mean of
        tanh(smaller gap / width - 1), 0 where that is 0/0; and score, 0.3, 0.3, 0.2, 0.2 and 0.01
        of these. None if no i has both.
    """
    stats: dict[str, dict[str, tuple[float, float]]] = {"tied": {}, "ref": {}}
    for row, s in zip(rows, scores, strict=True):
        kind, _, i = str(row.get("id", "")).partition(":")
        if kind in stats:
            best = best_of(row)
            right = [s[k] for k in best]
            wrong = [x for k, x in enumerate(s) if k not in best]
            gap = min(right) - max(wrong, default=-math.inf)
            stats[kind][i] = (gap, max(right) - min(right))
    both = stats["tied"].keys() & stats["ref"].keys()
    if not both:
        return None
    accuracy = {kind: _mean(gap > 0 for gap, _ in x.values()) for kind, x in stats.items()}
    pairs = [(*stats["tied"][i], stats["ref"][i][0]) for i in both]
    preferred = _mean(gap > width for gap, width, _ in pairs)
    hard = _mean(min(gap, ref) > width for gap, width, ref in pairs)
    margin = _mean(_tanh_ratio(min(gap, ref), width) for gap, width, ref in pairs)
    return {
        "tied_accuracy": accuracy["tied"], "ref_accuracy": accuracy["ref"],
        "preferred": preferred, "preferred_hard": hard, "margin": margin,
        "score": 0.3 * (accuracy["tied"] + accuracy["ref"]) + 0.2 * (preferred + hard)
        + 0.01 * margin,
    }  # fmt: skip


def _tanh_ratio(gap: float, width: float) -> float:
    if width == 0:
        return 0.0 if gap == 0 else math.copysign(1.0, gap)
    return math.tanh(gap / width - 1)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def best_of_n(row: Row, scores: Sequence[float] | None, n: int) -> dict[str, Any]:
    """The best of the first `n` candidates, in place of all that the row has of candidates.

    Args:
        row: a row.
        scores: of its first `n` candidates, or of all where it has fewer; None if one does not fit.

    Returns:
        The row's other columns, and candidate, its score, `chosen`, its position, and `of`, how
        many it was chosen from. The first of several that tie; without scores all but `of` None.
    """
    per_candidate = ("candidates", "best", "labels", "ranks", "margin", "teacher_scores")
    found = {name: x for name, x in row.items() if name not in per_candidate}
    of = min(n, len(row["candidates"]))
    if scores is None:
        return {**found, "candidate": None, "score": None, "chosen": None, "of": of}
    k = chosen(scores)
    return {**found, "candidate": row["candidates"][k], "score": scores[k], "chosen": k, "of": of}


def save_normalization(folder: str | Path, mean: float, std: float) -> None:
    """Keep mean and standard deviation of the rewards in a model's config, as `reward_mean` and
    `reward_std`; the weights, and so the raw rewards, stay as they are.

    Raises:
        ValueError: `folder` has no config.json, or `std` is not above 0.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: expected the folder of a model, with its config.json")
    if not 0 < std < math.inf:
        raise ValueError(f"rewards must differ to be normalised, got a standard deviation of {std}")
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"reward_mean": mean, "reward_std": std}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def normalization(config: Any) -> tuple[float, float]:
    """`reward_mean` and `reward_std` of a model's config: (reward - mean) / std is normalised.

    Raises:
        ValueError: the config has none.
    """
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    if mean is None or not std:
        raise ValueError("config.json has no reward_mean and reward_std above 0: first run `fastrm "
                         "evaluate --fit-normalization` on rows like those of use")  # fmt: skip
    return float(mean), float(std)


def report(m: Mapping[str, Any], where: str) -> str:
    """What `assess` found, as lines to read."""
    lines = [
        f"accuracy: {m['accuracy']:.3f}  {where}, {m['n']} groups",
        f"chance:   {m['chance']:.3f}  (a random candidate)",
        f"longest:  {m['longest']:.3f}  (the longest candidate)",
        f"loss:     {m['loss']:.4f}  " + ("(as trained: its kind, temperature, weights, margins)"
                                         if "p_best" in m else "(softmax cross entropy)"),
        f"margin:   {m['margin']:.3f}  (reward of the best minus the highest of the others)",
    ]
    if "mrr" in m:
        lines.append(f"mrr:      {m['mrr']:.3f}  (1 / rank of the best)")
    if m.get("ndcg") is not None:
        lines.append(f"ndcg:     {m['ndcg']:.3f}  (by labels or ranks)")
    if ties := m.get("ties"):
        lines.append(f"ties:     {ties['score']:.3f}  (RewardBench 2)")
    if rewards := m.get("rewards"):
        lines.append(f"rewards:  {rewards['mean']:.3f} ± {rewards['std']:.3f}, within a group ± "
                     f"{rewards['std_in_group']:.3f}")  # fmt: skip
        lines += [
            f"  rank {x['rank']:<3} {x['mean']:.3f} ± {x['std']:.3f}  ({x['n']} candidates)"
            for x in rewards["by_rank"][:10]
        ]
    if (c := m.get("calibration")) and c["n"]:
        lines.append(f"ece:      {c['ece']:.3f}  (how far probabilities are from accuracy)")
        lines.append(
            "          no finite temperature lowers the loss most" if c["temperature"] is None else
            f"          loss {c['nll']:.4f}; at temperature {c['temperature']:.3f}, the best here, "
            f"{c['nll_fitted']:.4f}"
        )  # fmt: skip
    if subsets := m.get("subsets"):
        width = max(map(len, subsets))
        columns = ("accuracy", "chance", "loss", "margin", "mrr", "ndcg")
        lines.append(f"{'subset':<{width}}  groups  " + "  ".join(f"{c:>8}" for c in columns))
        for name, x in subsets.items():
            cells = (f"{'-' if x[c] is None else format(x[c], '.3f'):>8}" for c in columns)
            lines.append(f"{name:<{width}}  {x['n']:>6}  " + "  ".join(cells))
    if m.get("left_out"):
        lines.append(f"left out: {m['left_out']} groups with a candidate that does not fit")
    return "\n".join(lines)
