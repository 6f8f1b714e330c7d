"""Draws docs/images/*.svg; run it after a change here: python docs/pictures.py"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
USED, BEST, PAD, PROMPT = "#4c78a8", "#f58518", "#e6e6e6", "#54a24b"
SIZES = (2, 5, 1, 3)
matplotlib.rcParams.update({"svg.hashsalt": "fastrm", "font.size": 10})


def box(ax: Axes, x: float, y: float, color: str, text: str = "", width: float = 1) -> None:
    ax.add_patch(matplotlib.patches.Rectangle((x, y), width * 0.94, 0.8, color=color))
    ax.text(x + 0.47 * width, y + 0.4, text, ha="center", va="center", color="white", size=9)


def finish(figure: Figure, ax: Axes, name: str, width: float, height: float) -> None:
    ax.set(xlim=(-1.4, width), ylim=(-0.2, height))
    ax.set_aspect("equal")
    ax.axis("off")
    figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


def ragged_groups() -> None:
    figure = Figure(figsize=(8, 3.2))
    ax = figure.add_subplot()
    best = (1, 0, 0, 2)
    ax.text(0, 5.1, "padded to the longest group:\n20 places for 11 candidates")
    for n, K in enumerate(SIZES):
        for k in range(max(SIZES)):
            color = PAD if k >= K else BEST if k == best[n] else USED
            box(ax, k, 4 - n, color, f"{n}.{k}" if k < K else "")
    ax.text(7, 5.1, "one after another,\nwith the place where each group begins")
    ax.text(7, 3.9, "offsets  [0, 2, 7, 8, 11]      target  [1, 0, 0, 2]", family="monospace")
    x = 7.0
    for n, K in enumerate(SIZES):
        for k in range(K):
            box(ax, x + k, 2.4, BEST if k == best[n] else USED, f"{n}.{k}")
        ax.plot([x, x + K - 0.06], [2.2, 2.2], color="black", linewidth=1)
        ax.text(x + K / 2, 1.9, f"group {n}", ha="center", va="top", size=8)
        x += K
    finish(figure, ax, "ragged-groups", 18.2, 6.6)


def exact_loss() -> None:
    figure = Figure(figsize=(8, 2.6))
    ax = figure.add_subplot()
    losses = [[2.0, 1.0, 3.0, 2.0, 1.0], [6.0]]
    x = 0.0
    for m, batch in enumerate(losses):
        for value in batch:
            box(ax, x, 2, USED, f"{value:g}")
            x += 1
        mean = sum(batch) / len(batch)
        ax.text(x - len(batch) / 2, 1.7, f"micro-batch {m}: mean {mean:g}", ha="center", va="top")
        x += 2.2
    every = [v for batch in losses for v in batch]
    means = [sum(b) / len(b) for b in losses]
    ax.text(10.5, 2.5, f"mean of the means: {sum(means) / 2:g}", color="#b00020")
    ax.text(10.5, 1.7, f"mean over the step's groups: {sum(every) / len(every):g}")
    finish(figure, ax, "exact-loss", 17, 3)


def shared_prompt() -> None:
    figure = Figure(figsize=(8, 3.6))
    ax = figure.add_subplot()
    names = ["p0", "p1", "p2", "a0", "a1", "b0", "b1", "b2", "c0"]
    colors = [PROMPT] * 3 + [USED] * 2 + [BEST] * 3 + ["#b279a2"]
    ends = [9, 9, 9, 5, 5, 8, 8, 8, 9]  # the queries before this place may read the key
    for i, name in enumerate(names):
        box(ax, i, 9.4, colors[i], name)
        box(ax, -1.3, 8 - i, colors[i], name)
        for j in range(len(names)):
            box(ax, j, 8 - i, colors[j] if j <= i < ends[j] else PAD)
    ax.text(-1.3, 10.6, "a row of queries sees the keys in colour")
    for y, text in ((8, "a prompt of 3 tokens, candidates a, b, c"),
                    (6.9, "unshared: (3+2) + (3+3) + (3+1) = 15 tokens"),
                    (5.8, "shared: 3 + 2 + 3 + 1 = 9 tokens"),
                    (4.4, "positions: 0 1 2 | 3 4 | 3 4 5 | 3")):  # fmt: skip
        ax.text(10, y, text)
    finish(figure, ax, "shared-prompt", 19, 11.2)


if __name__ == "__main__":
    for draw in (ragged_groups, exact_loss, shared_prompt):
        draw()
