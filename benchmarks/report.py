"""Tables and plots from result files, and into the documents that have a place for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fastrm_benchmarks.problems import KINDS, Point
from fastrm_benchmarks.providers import COMPILE, NAMES, SMALLEST

Row = dict[str, Any]
BOTH = "forward_backward"
FUSED = ("fastrm-triton", "fastrm-cpp")
FIELDS = ("candidates", "hidden_size", "dtype", "groups", "layout", "loss")
COLORS = {
    "fastrm-triton": "#2a6fbb", "fastrm-cpp": "#2a6fbb", "eager-segment": "#d1495b",
    "eager-padded": "#e09f3e", "clone": "#777777", "clone-huge": "#b5b5b5",
}  # fmt: skip


@dataclass
class Machine:
    """All results of one device."""

    folder: Path
    device: str
    sources: dict[str, dict[str, dict[str, None]]]  # by sweep and version of torch: commits
    rows: list[Row]

    def versions(self, *sweeps: str) -> str:
        """Of torch and of fastrm, that the rows of these sweeps come from."""
        commits: dict[str, dict[str, None]] = {}
        for sweep in sweeps:
            for torch, found in self.sources.get(sweep, {}).items():
                commits.setdefault(torch, {}).update(found)
        return "; ".join(
            f"torch {torch}, commit{'s' * (len(found) > 1)} {', '.join(found)}"
            for torch, found in commits.items()
        )

    def sweep(self, name: str) -> dict[Point, dict[tuple[str, str], Row]]:
        """Rows of a sweep by point, then by (provider, mode)."""
        found: dict[Point, dict[tuple[str, str], Row]] = {}
        for row in self.rows:
            if row["sweep"] == name and "provider" in row:
                point = Point(**{field: row[field] for field in FIELDS})
                found.setdefault(point, {})[row["provider"], row.get("mode", BOTH)] = row
        return found


def write(results: Path) -> str:
    """Plots beside the results, tables into the README.md above them; returns the tables.

    Raises:
        ValueError: no result file there.
    """
    machines = [load(folder) for folder in sorted(results.glob("*")) if any(folder.glob("*.jsonl"))]
    if not machines:
        raise ValueError(f"{results}: no */*.jsonl there")
    tables = make_tables(machines)
    for machine in machines:
        make_plots(machine)
    for document in (results.parent / "README.md", results.parent.parent / "README.md"):
        if document.exists():
            text = document.read_text(encoding="utf-8")
            filled = fill(text, tables)
            if filled != text:
                document.write_text(filled, encoding="utf-8")
    return "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items() if "/" not in name)


def load(folder: Path) -> Machine:
    rows: list[Row] = []
    sources: dict[str, dict[str, dict[str, None]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        env = json.loads(head)["environment"]
        found = [{"loss": "listwise", **json.loads(line)} for line in lines]
        for row in found:
            of_torch = sources.setdefault(row["sweep"], {}).setdefault(env["torch"], {})
            of_torch[env["commit"]] = None
        rows += found
    return Machine(folder, env["device"], sources, rows)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Replace what stands between <!-- bench:NAME --> and <!-- /bench --> where NAME is known."""

    def table(match: re.Match[str]) -> str:
        found = tables.get(match[2])
        return match[0] if found is None else f"{match[1]}\n{found}\n<!-- /bench -->"

    return re.sub(r"(<!-- bench:(\S+) -->).*?<!-- /bench -->", table, text, flags=re.DOTALL)


def make_tables(machines: Sequence[Machine]) -> dict[str, str]:
    """By sweep, of every device; by FOLDER/SWEEP, of one."""
    makers: dict[str, Callable[[Machine], str]] = {
        "summary": _summary, "costs": _costs, "small": _small, "floor": _floor, "train": _train
    }  # fmt: skip
    for sweep in ("size", "ragged", "hidden", "layout", "losses", "quick", "custom"):
        makers[sweep] = partial(_relative, sweep=sweep)
    found: dict[str, str] = {}
    for name, make in makers.items():
        parts = {machine.folder.name: make(machine) for machine in machines}
        parts = {folder: table for folder, table in parts.items() if table}
        if parts:
            found[name] = "\n\n".join(parts.values())
            found |= {f"{folder}/{name}": table for folder, table in parts.items()}
    return found


def _relative(machine: Machine, sweep: str) -> str:
    """Time of forward and backward in units of the clone's."""
    points = machine.sweep(sweep)
    names = [n for n in _providers(points) if n not in ("clone", SMALLEST)]
    lines = []
    for point, rows in points.items():
        clone = rows.get(("clone", BOTH))
        if clone is not None:
            cells = [_cell(rows.get((n, BOTH)), "of_clone", "{:.2f}".format) for n in names]
            lines.append([_label(sweep, point), _time(clone["time_s"]), *cells])
    caption = "forward and backward, in units of the time of the clone"
    return _table(machine, [sweep], caption, [sweep, "clone", *names], lines)


def _small(machine: Machine) -> str:
    """Wall-clock time of small batches, of calls and, on CUDA, of graph replays."""
    points = machine.sweep("small")
    names = _providers(points)
    lines = []
    for mode, suffix in ((BOTH, ""), ("graph", ", CUDA graph")):
        for point, rows in points.items():
            if ("clone", mode) in rows:
                cells = [_cell(rows.get((n, mode)), "wall_s", _time) for n in names]
                lines.append([_label("small", point) + suffix, *cells])
    caption = "forward and backward by the clock on the wall, host included"
    return _table(machine, ["small"], caption, ["small batches", *names], lines)


def _floor(machine: Machine) -> str:
    """Small batches beside what autograd costs with nothing to compute, and the traffic."""
    lines = []
    for point, rows in machine.sweep("small").items():
        times = {n: r["wall_s"] for (n, mode), r in rows.items() if mode == BOTH and "wall_s" in r}
        fused = next((times[n] for n in FUSED if n in times), None)
        if fused is None or not {"clone", SMALLEST} <= times.keys():
            continue
        floor = times["clone"] + times[SMALLEST]
        cells = [_label("small", point), _time(floor), _time(fused)]
        for suffix in ("", COMPILE):
            others = [times[n + suffix] for n in ("eager-segment", "eager-padded")
                      if n + suffix in times]  # fmt: skip
            best = min(others, default=float("nan"))
            cells += [f"{best / fused:.1f}x", f"{best / floor:.1f}x"]
        lines.append(cells)
    heads = ["", "floor", "fastrm", "faster than eager", "the floor is", "than compiled"]
    return _table(machine, ["small"], "by the wall clock", [*heads, "the floor is"], lines)


def _costs(machine: Machine) -> str:
    """What else a call costs."""
    points = machine.sweep("costs")
    if not points:
        return ""
    point = next(iter(points))
    lines = []
    for name in _providers(points):
        row = points[point].get((name, BOTH))
        if row is not None and "time_s" in row and "saved_bytes" in row:
            hidden = "hidden and " if row["saves_hidden"] else ""
            counts = [_count(row.get(k)) for k in ("launches", "syncs")]
            peak = row.get("peak_bytes")
            lines.append(
                [name, *counts]
                + ["–" if peak is None else _bytes(peak), hidden + _bytes(row["saved_bytes"])]
            )
    caption = f"one forward and backward of {point}"
    heads = ["", "launches", "synchronisations", "peak memory", "kept for backward"]
    return _table(machine, ["costs"], caption, heads, lines)


def _train(machine: Machine) -> str:
    """Training steps: a line a contestant."""
    rows = [row for row in machine.rows if row["sweep"] == "train" and "groups_per_s" in row]
    padded = {r["setting"]: r["groups_per_s"] for r in rows if r["provider"] == "padded-loop"}
    lines, seen = [], None
    for row in rows:
        setting, speed, peak = row["setting"], row["groups_per_s"], row["peak_bytes"]
        base = padded.get(setting)
        lines.append([
            setting if setting != seen else "", row["provider"], f"{speed:.2f}",
            f"{speed / base:.2f}" if base else "–",
            f"{row['tokens_computed'] / row['tokens_once']:.2f}", _time(row["head_loss_s"]),
            "–" if peak is None else _bytes(peak),
        ])  # fmt: skip
        seen = setting
    caption = "whole training steps"
    heads = ["", "", "groups/s", "times padded-loop", "tokens computed / needed", "head and loss"]
    heads += ["memory beyond model and optimiser"]
    return _table(machine, ["train"], caption, heads, lines)


def _summary(machine: Machine) -> str:
    """A typical batch, the largest one and the most uneven one."""
    size, ragged = machine.sweep("size"), machine.sweep("ragged")
    typical = machine.sweep("small").get(Point(64, 4096))
    chosen = [(f"{Point(64, 4096)}, by the wall clock", typical, "wall_s")] if typical else []
    if size:
        point = max(size, key=lambda p: p.hidden_bytes)
        chosen.append((str(point), size[point], "time_s"))
    chosen += [(str(p), rows, "time_s") for p, rows in ragged.items() if p.groups == "giant"]
    lines = []
    for label, rows, key in chosen:
        times = {n: row[key] for (n, mode), row in rows.items() if mode == BOTH and key in row}
        fused = next((n for n in FUSED if n in times), None)
        others = {n: t for n, t in times.items() if n.startswith("eager-")}
        if fused and others and "clone" in times:
            best = min(others, key=others.__getitem__)
            lines.append(
                [label, _time(times["clone"]), _time(times[fused]), f"{best} {_time(times[best])}"]
                + [f"{times[best] / times[fused]:.1f}x"]
            )
    heads = ["", "clone", "fastrm", "best eager or compiled", "fastrm is faster by"]
    return _table(machine, ["small", "size", "ragged"], "forward and backward", heads, lines)


def _table(
    machine: Machine, sweeps: Sequence[str], caption: str, heads: Sequence[str],
    lines: Sequence[Sequence[str]],
) -> str:  # fmt: skip
    """Markdown whose columns line up in plain text too."""
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]

    def line_up(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in pairs]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    title = f"{machine.device} ({machine.versions(*sweeps)}): {caption}"
    return "\n".join([f"{title}\n", *map(line_up, (heads, rule, *lines))])


def details(rows: Iterable[Row]) -> str:
    """Every number a person reads after a run, a block for each point."""
    blocks: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["sweep"], *(row[f] for f in FIELDS)), []).append(row)
    text = []
    for (sweep, *fields), found in blocks.items():
        point = Point(*fields)
        text.append(f"\n{sweep}: {point}, {_bytes(point.hidden_bytes)} of candidates")
        cuda = any(row.get("host_s") is not None for row in found)
        heads = f"  {'':<22}{'mode':<17}{'time':>9}{'p20':>9}{'p80':>9}{'of clone':>10}{'GB/s':>8}"
        text.append(heads + (f"{'wall':>9}{'host':>9}{'launches':>10}{'syncs':>7}" if cuda else ""))
        for row in found:
            line = f"  {row.get('provider', ''):<22}"
            if "time_s" not in row:
                state = "failed" if "failed" in row else "skipped"
                text.append(f"{line}{row.get('mode', ''):<17}{state}: {row[state]}")
                continue
            line += f"{row['mode']:<17}" + "".join(
                f"{_time(row[k]):>9}" for k in ("time_s", "p20_s", "p80_s")
            )
            line += f"{row['of_clone']:>10.2f}{row.get('gb_per_s', 0):>8.1f}"
            if cuda:
                line += f"{_time(row['wall_s']):>9}{_time(row['host_s']):>9}"
                line += f"{_count(row.get('launches')):>10}{_count(row.get('syncs')):>7}"
            text.append(line)
    return "\n".join(text)


def make_plots(machine: Machine) -> None:
    """size.png, small.png, ragged.png and train.png beside the results they show."""
    if machine.sweep("size"):
        _plot_size(machine)
    if machine.sweep("small"):
        _plot_bars(machine, "small", "wall_s", 1e6, "µs by the wall clock, host included")
    if machine.sweep("ragged"):
        _plot_bars(machine, "ragged", "of_clone", 1, "time in units of hidden.clone()")
    if any(row["sweep"] == "train" for row in machine.rows):
        _plot_train(machine)


def _plot_size(machine: Machine) -> None:
    points = machine.sweep("size")
    figure, axes = _figure(f"Forward and backward, {_line(points)}", machine.device)
    for name in _shown(points):
        rows = {p: r[name, BOTH] for p, r in points.items() if (name, BOTH) in r}
        rows = {p: row for p, row in rows.items() if "of_clone" in row}
        x = [p.hidden_bytes for p in rows]
        axes.plot(x, [r["of_clone"] for r in rows.values()], label=name, **_style(name))
        if name.startswith("fastrm"):
            low, high = ([r[k] / r["time_s"] * r["of_clone"] for r in rows.values()]
                         for k in ("p20_s", "p80_s"))  # fmt: skip
            axes.fill_between(x, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
            for at, row in zip(x, rows.values(), strict=True):
                _number(axes, at, row["of_clone"], COLORS[name], row["of_clone"])
    axes.set_xscale("log", base=2)
    ticks = sorted(p.hidden_bytes for p in points)
    axes.set_xticks(ticks, [_bytes(t) for t in ticks])
    axes.set_xlabel("size of the candidates' hidden states")
    axes.set_ylabel("time in units of hidden.clone()")
    _log_ticks(axes)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    figure.savefig(machine.folder / "size.png")


def _plot_bars(machine: Machine, sweep: str, key: str, unit: float, ylabel: str) -> None:
    points = {p: rows for p, rows in machine.sweep(sweep).items() if p.dtype == "bf16"}
    names = [n for n in _shown(points) if key != "of_clone" or n != "clone"]
    values = [rows[n, BOTH][key] * unit for rows in points.values() for n in names
              if key in rows.get((n, BOTH), {})]  # fmt: skip
    if not values:
        return
    figure, axes = _figure(f"Forward and backward, {_line(points)}", machine.device)
    width = 0.84 / len(names)
    top = min(max(values), 8 * median(values))  # what is far above is cut off, and its number given
    axes.set_ylim(0, 1.3 * top)
    for k, name in enumerate(names):
        found = [rows.get((name, BOTH), {}).get(key) for rows in points.values()]
        at = [i + (k - (len(names) - 1) / 2) * width for i, v in enumerate(found) if v is not None]
        heights = [v * unit for v in found if v is not None]
        hatch = "////" if name.endswith(COMPILE) else None
        color = COLORS[name.removesuffix(COMPILE)]
        look = {"edgecolor": "white", "linewidth": 0.5, "hatch": hatch}
        axes.bar(at, [min(h, top) for h in heights], width, color=color, label=name, **look)
        for x, height in zip(at, heights, strict=True):
            if height > top or name.startswith("fastrm") and hatch is None:
                _number(axes, x, min(height, top), color, height)
    if key == "of_clone":
        axes.axhline(1, color=COLORS["clone"], linewidth=1.2, linestyle="--", label="clone")
    axes.set_xticks(range(len(points)), [_label(sweep, p) for p in points])
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper center")
    figure.savefig(machine.folder / f"{sweep}.png")


def _plot_train(machine: Machine) -> None:
    """Groups a second of fastrm, and of TRL where it ran, in units of the padded loop's."""
    speeds: dict[str, dict[str, float]] = {}
    for row in machine.rows:
        if row["sweep"] == "train" and "groups_per_s" in row:
            speeds.setdefault(row["setting"], {})[row["provider"]] = row["groups_per_s"]
    speeds = {s: v for s, v in speeds.items() if {"padded-loop", "fastrm-auto"} <= v.keys()}
    figure, axes = _figure("Training steps, groups a second", machine.device)
    names = [n for n in ("fastrm-auto", "trl") if any(n in v for v in speeds.values())]
    for k, name in enumerate(names):
        times = [v.get(name, 0) / v["padded-loop"] for v in speeds.values()]
        at = [i + 0.4 * (k - (len(names) - 1) / 2) for i in range(len(speeds))]
        color = "#2a6fbb" if name == "fastrm-auto" else "#e09f3e"
        axes.barh(at, times, 0.36, color=color, label=name)
        for y, value in zip(at, times, strict=True):
            if value:
                axes.text(value, y, f" {value:.2f}", va="center", fontsize=9, color=color)
    axes.axvline(1, color=COLORS["clone"], linewidth=1.2, linestyle="--", label="padded-loop")
    axes.set_yticks(range(len(speeds)), list(speeds), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times the padded loop")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(machine.folder / "train.png")


def _figure(title: str, device: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(f"{title}\n{device}", fontsize=11)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _number(axes: Any, x: float, y: float, color: str, value: float) -> None:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    axes.annotate(
        f"{value:.{digits}f}", (x, y), xytext=(0, 4), ha="center",
        textcoords="offset points", color=color, fontsize=9, fontweight="bold", zorder=4,
    )  # fmt: skip


def _log_ticks(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _style(name: str) -> dict[str, Any]:
    plain = name.removesuffix(COMPILE)
    style: dict[str, Any] = {"color": COLORS[plain], "linewidth": 1.5}
    if plain.startswith("fastrm"):
        style |= {"linewidth": 2.5, "marker": "o", "markersize": 5, "zorder": 3}
    if name.endswith(COMPILE) or name == "clone":
        style["linestyle"] = "--"
    if name == "clone-huge":
        style["linestyle"] = ":"
    return style


def _providers(points: Mapping[Point, Mapping[tuple[str, str], Row]]) -> list[str]:
    found = {name for rows in points.values() for name, _ in rows}
    return [name for name in NAMES if name in found]


def _shown(points: Mapping[Point, Mapping[tuple[str, str], Row]]) -> list[str]:
    """The providers of a plot: the reference is not there to be fast."""
    names = _providers(points)
    fused = [n for n in names if n.startswith("fastrm") and n in COLORS]
    return fused + [n for n in names if n not in fused and n.removesuffix(COMPILE) in COLORS
                    and not n.startswith("fastrm")]  # fmt: skip


def _line(points: Iterable[Point]) -> str:
    """What all points have in common."""
    points = list(points)
    p = points[0]
    parts = {
        f"M={p.candidates}": len({q.candidates for q in points}),
        f"D={p.hidden_size}": len({q.hidden_size for q in points}),
        p.dtype: len({q.dtype for q in points}),
        f"K={p.groups}": len({q.groups for q in points}),
        p.layout: len({q.layout for q in points}),
    }
    return ", ".join(part for part, values in parts.items() if values == 1)


def _label(sweep: str, point: Point) -> str:
    """What a point is called among its sweep's."""
    if sweep == "size":
        return _bytes(point.hidden_bytes)
    if sweep == "hidden":
        return f"{point.hidden_size} {point.dtype}"
    if sweep == "small":
        return f"{point.candidates}x{point.hidden_size} {point.dtype}"
    if sweep == "ragged":
        return point.groups if point.groups in KINDS else f"K={point.groups}"
    if sweep == "losses":
        return f"{point.loss}, {point.candidates}x{point.hidden_size} {point.dtype}"
    return point.layout if sweep == "layout" else str(point)


def _cell(row: Row | None, key: str, text: Callable[[float], str]) -> str:
    if row is None or "skipped" in row:
        return "–"
    return "failed" if "failed" in row else text(row[key])


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            break
    value = seconds / scale
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _bytes(n: int) -> str:
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} B"


def _count(n: int | None) -> str:
    return "–" if n is None else str(n)
