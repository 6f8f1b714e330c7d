"""Pictures of a training run."""

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
