"""Pictures of a training run, of its data, and of the rewards of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN, EVAL, GREY = "#2a6fbb", "#d1495b", "#777777"


def training_plot(
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    chance: float | None = None,
    title: str = "",
) -> None:
    """Loss and accuracy over steps, on the training groups and the held-out ones, as a PNG.

    Args:
        log_history: what `Trainer.state.log_history` holds: dicts with `step` and `loss`,
            `accuracy`, `eval_loss` or `eval_accuracy`.
        path: where to write.
        chance: accuracy of a random choice, drawn as a line.
        title: one line above both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        steps, values = curve(log_history, name)
        if len(steps) > 4:
            axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
            values = smooth(values)
        axes.plot(steps, values, color=TRAIN, linewidth=2, label="training groups")
        steps, values = curve(log_history, f"eval_{name}")
        if steps:
            axes.plot(
                steps, values, color=EVAL, linewidth=1.5, marker="o", markersize=5,
                label="held out", clip_on=False, zorder=3,
            )  # fmt: skip
            away = 8 if name == "loss" else -17  # from the training curve
            axes.annotate(
                f"{values[-1]:.2f}", (steps[-1], values[-1]), xytext=(3, away), ha="right",
                textcoords="offset points", color=EVAL, fontsize=11, fontweight="bold",
            )  # fmt: skip
        if name == "accuracy":
            axes.set_ylim(0, 1.02)
            if chance is not None:
                axes.axhline(chance, color=GREY, linewidth=1, linestyle="--", label="chance")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(name.capitalize(), fontsize=11)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def data_plot(
    sizes: Mapping[str, int],
    lengths: Sequence[int],
    path: str | Path,
    *,
    unit: str,
    max_length: int | None = None,
    title: str = "",
) -> None:
    """How many candidates groups have and how long sequences are, as a PNG.

    Args:
        sizes: how many groups have K candidates, by K.
        lengths: of each prompt with one candidate.
        path: where to write.
        unit: of the lengths, such as tokens.
        max_length: drawn as a line where something is longer.
        title: one line above both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(
        [int(K) for K in sizes], weights=list(sizes.values()), color=TRAIN, rwidth=0.9,
        bins=_whole_bins(min(map(int, sizes)), max(map(int, sizes))),
    )  # fmt: skip
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("Candidates of a group", fontsize=11)
    left.set_xlabel("candidates")
    left.set_ylabel("groups")
    for axes in (left, right):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.hist(lengths, bins=_whole_bins(min(lengths), max(lengths)), color=TRAIN)
    right.set_title("Prompt with one candidate", fontsize=11)
    right.set_xlabel(unit)
    right.set_ylabel("candidates")
    if max_length is not None and max(lengths) > max_length:
        right.axvline(max_length, color=EVAL, linestyle="--", linewidth=1, label="max_length")
        right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def calibration_plot(found: Mapping[str, Any], path: str | Path, *, title: str = "") -> None:
    """Accuracy over confidence and how many groups have which confidence, as a PNG.

    Args:
        found: of `fastrm.evaluate.calibration`.
        path: where to write.
        title: one line above both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    bins = found["bins"]
    middles = [(b["low"] + b["high"]) / 2 for b in bins]
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    left.bar(middles, [b["accuracy"] for b in bins], width=0.09, color=TRAIN, alpha=0.35)
    left.plot(
        [b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=TRAIN, marker="o",
        markersize=5, linewidth=0, label="the groups of a tenth", clip_on=False,
    )  # fmt: skip
    left.set_xlim(0, 1)
    left.set_ylim(0, 1.02)
    left.set_xlabel("probability of the highest reward")
    left.set_ylabel("accuracy")
    said = "" if found["ece"] is None else f": ECE {found['ece']:.3f}"
    left.set_title(f"Reliability{said}", fontsize=11)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    right.bar(middles, [b["n"] for b in bins], width=0.09, color=TRAIN)
    right.set_xlim(0, 1)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("probability of the highest reward")
    right.set_ylabel("groups")
    right.set_title(f"{found['n']} groups of several candidates", fontsize=11)
    _finish(figure, (left, right), path, title)


def reward_plot(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[float]],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Rewards of the best candidates and of the others, and of each minus the best other, as a PNG.

    Args:
        rows: N rows, see `fastrm.data`.
        scores: N lists, one reward a candidate.
        path: where to write.
        title: one line above both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from fastrm.evaluate import best_of

    best: list[float] = []
    others: list[float] = []
    margins: list[float] = []
    for row, s in zip(rows, scores, strict=True):
        top = best_of(row)
        rest = [x for i, x in enumerate(s) if i not in top]
        best += [s[i] for i in top]
        others += rest
        if rest:
            margins.append(max(s[i] for i in top) - max(rest))
    figure = Figure(figsize=(8, 3.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    low, high = min(best + others), max(best + others)
    width = (high - low) / 30 or 1.0
    edges = [low + width * i for i in range(31)]
    for values, color, label in ((others, GREY, "others"), (best, TRAIN, "best")):
        share = [100 / max(len(values), 1)] * len(values)
        left.hist(values, edges, weights=share, color=color, alpha=0.6, label=label)
    left.set_xlabel("reward")
    left.set_ylabel("% of the best, % of the others")
    left.set_title("Rewards", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    if margins:
        # Stacked: a tie lies in the first bin of those that are right.
        right.hist(
            [[m for m in margins if m <= 0], [m for m in margins if m > 0]],
            _zero_bins(min(margins), max(margins)), stacked=True, color=[EVAL, TRAIN],
            label=["wrong or tied", "right"],
        )  # fmt: skip
        right.legend(frameon=False, fontsize=9)
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("best minus the highest other")
    right.set_ylabel("groups")
    right.set_title("Margins", fontsize=11)
    _finish(figure, (left, right), path, title)


def _zero_bins(low: float, high: float) -> list[float]:
    """Edges of about 30 bins of one width, one of them at 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / 30 or 1.0
    return [width * i for i in range(math.floor(low / width), math.ceil(high / width) + 2)]


def _finish(figure: Any, panels: Sequence[Any], path: str | Path, title: str) -> None:
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def _whole_bins(low: int, high: int) -> list[float]:
    """Edges between whole numbers, of at most 50 bins of the same width."""
    width = -(-(high - low + 1) // 50)
    return [low - 0.5 + width * i for i in range((high - low) // width + 2)]


def curve(log_history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one logged quantity; the last of several at one step."""
    points = {e["step"]: e[name] for e in log_history if math.isfinite(e.get(name, math.nan))}
    return list(points), list(points.values())


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average over about a tenth of the run, not biased towards the start."""
    decay = 1 - 1 / max(2, len(values) / 10)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out
