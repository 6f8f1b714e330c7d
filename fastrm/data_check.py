"""What is in a data file, and what is wrong with it, before any training.

Letters: K candidates of a group.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrm import formats
from fastrm.data import DataError, Row, to_row, tokenize_row
from fastrm.evaluate import baselines, best_of, text_length

SHOWN = 20  # errors in a report


def check_data(
    source: str | Path,
    tokenizer: Any = None,
    max_length: int | None = None,
    pairs: bool = False,
    progress: bool = False,
) -> tuple[dict[str, Any], list[int]]:
    """Look at every row, and do not stop at one that cannot be used.

    Args:
        source: see `fastrm.data.read_rows`.
        tokenizer: counts tokens; None: characters alone.
        max_length: tokens of a prompt with one candidate.
        pairs: whether the model is an encoder, which reads pairs.
        progress: show a bar on stderr if tokenising takes longer than a second.

    Returns:
        What `report` prints, fit for JSON: of the groups that can be used
            formats: how many rows are in each format
            sizes: how many groups have K candidates, by K
            characters, tokens: least, median, mean, p99 and most of a prompt, a candidate, and (the
                tokens) of a prompt with one candidate
            cut, left_out: groups whose prompt is cut, or with a candidate that does not fit
            repeated_rows, repeated_prompts: beyond the first; a repeated row is no repeated prompt
            repeated_candidates, equal_candidates: groups where some, or all of several, are equal
            first: share of the groups of several whose best is candidate 0
            chance, longest: accuracy of a random and of the longest candidate
            notes: what looks wrong, in words
            errors: of the rows that cannot be used
        And the lengths for a plot: of each prompt with one candidate, in tokens if counted.

    Raises:
        DataError: the source cannot be read, or has no rows.
    """
    raws = list(formats.load(source))
    if not raws:
        raise DataError(f"{source}: expected at least one row, got an empty file")
    rows: list[Row] = []
    errors: list[str] = []
    lengths: list[int] = []
    cut = left_out = 0
    names: Counter[str] = Counter()
    for where, raw in _bar(raws, progress and tokenizer is not None):
        try:
            row = to_row(raw, where)
            if tokenizer is not None:
                try:
                    found, is_cut, fits = _tokens(tokenizer, row, max_length, pairs)
                except DataError as e:
                    raise DataError(f"{where}: {e}") from None
                lengths += found
                cut, left_out = cut + is_cut, left_out + (not fits)
        except DataError as e:
            errors.append(str(e))
            continue
        known = formats.recognise(raw)
        names[known.name if known else ""] += 1
        rows.append(row)
    summary: dict[str, Any] = {
        "source": str(source),
        "rows": len(raws),
        "groups": len(rows),
        "candidates": sum(len(row["candidates"]) for row in rows),
        "formats": dict(names),
    }
    if rows:
        summary |= _facts(rows)
        if tokenizer is None:
            lengths = [text_length(row["prompt"]) + text_length(candidate)
                       for row in rows for candidate in row["candidates"]]  # fmt: skip
        else:
            summary |= {"tokens": _spread(lengths), "max_length": max_length, "cut": cut,
                        "left_out": left_out}  # fmt: skip
        summary["notes"] = _notes(summary, rows)
    return {**summary, "errors": errors}, lengths


def _bar(raws: Sequence[Any], shown: bool) -> Any:
    if not shown:
        return raws
    from tqdm.auto import tqdm

    return tqdm(raws, desc="tokenising", unit="row", delay=1)


def _tokens(
    tokenizer: Any, row: Row, max_length: int | None, pairs: bool
) -> tuple[list[int], bool, bool]:
    """Tokens of the prompt with each candidate, uncut; whether it is cut, and whether it fits."""
    whole = tokenize_row(tokenizer, row, None, pairs)
    assert whole is not None  # everything fits where there is no limit
    lengths = [len(ids) for ids in whole["input_ids"]]
    if max_length is None or max(lengths) <= max_length:
        return lengths, False, True
    fits = tokenize_row(tokenizer, row, max_length, pairs) is not None
    return lengths, fits, fits


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    prompts: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    repeated = equal = first = several = 0
    for row in rows:
        prompt, *candidates = map(json.dumps, (row["prompt"], *row["candidates"]))
        K, different = len(candidates), len(set(candidates))
        repeated += different < K
        equal += different == 1 < K
        prompts[prompt] += 1
        whole["\n".join([prompt, *candidates])] += 1
        if K > 1:
            several += 1
            first += 0 in best_of(row)
    same_row = len(rows) - len(whole)
    sizes = Counter(len(row["candidates"]) for row in rows)
    found = baselines(rows)
    return {
        "sizes": {str(K): sizes[K] for K in sorted(sizes)},
        "characters": {
            "prompt": _spread([text_length(row["prompt"]) for row in rows]),
            "candidate": _spread([text_length(c) for row in rows for c in row["candidates"]]),
        },
        "repeated_rows": same_row,
        "repeated_prompts": len(rows) - len(prompts) - same_row,
        "repeated_candidates": repeated,
        "equal_candidates": equal,
        "first": first / several if several else None,
        "chance": found["chance"],
        "longest": found["longest"],
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "mean": statistics.fmean(ordered),
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "most": ordered[-1],
    }


def _notes(found: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    notes = []
    groups, single = found["groups"], found["sizes"].get("1", 0)
    several = groups - single
    if single:
        notes.append(f"{_many(single, 'group')} of one candidate, with a loss of 0")
    if found["equal_candidates"]:
        equal = _many(found["equal_candidates"], "group")
        notes.append(f"{equal} of several candidates that are all equal: nothing can be learnt")
    # Other formats put the best first by themselves.
    if found["first"] == 1 and several > 9 and set(found["formats"]) == {"fastrm"}:
        notes.append(f"the best is candidate 0 in all {several} groups that have several: is it "
                     "set? (The model scores each alone and cannot see its position.)")  # fmt: skip
    chance, longest = found["chance"], found["longest"]
    shares = [len(best_of(row)) / len(row["candidates"]) for row in rows]
    error = math.sqrt(sum(p * (1 - p) for p in shares)) / groups  # of a random choice's accuracy
    if abs(longest - chance) > 4 * error:
        much = "more" if longest > chance else "less"
        notes.append(f"the longest candidate is the best far {much} often than by chance: length "
                     "alone tells good from bad")  # fmt: skip
    if found.get("left_out"):
        notes.append(f"{_many(found['left_out'], 'group')} with a candidate of more than "
                     f"{found['max_length']} tokens: training leaves them out")  # fmt: skip
    return notes


def report(found: Mapping[str, Any]) -> str:
    """The text that `fastrm data check` prints of what `check_data` found."""
    groups, errors = found["groups"], found["errors"]
    lines = [f"{found['source']}: {_many(found['rows'], 'row')}, {_many(groups, 'group')} that can "
             f"be used, {_many(found['candidates'], 'candidate')}"]  # fmt: skip

    def say(what: str, text: str) -> None:
        lines.append(f"{what:<12}{text}")

    if groups:
        say("format", ", ".join(f"{k} ({_many(n, 'row')})" for k, n in found["formats"].items()))
        for k, (sizes, n) in enumerate(_binned(found["sizes"])):
            bar = "#" * math.ceil(30 * n / groups)
            say("" if k else "candidates", f"{sizes:>9}  {bar} {_many(n, 'group')}")
        for what, spread in found["characters"].items():
            say("" if what == "candidate" else "characters", f"{what:>9}  {_said(spread)}")
        if "tokens" in found:
            say("tokens", f"of a prompt with one candidate  {_said(found['tokens'])}")
        if found.get("max_length"):
            say("", f"max_length {found['max_length']}: {_many(found['cut'], 'prompt')} cut at the "
                f"left, {_many(found['left_out'], 'group')} left out")  # fmt: skip
        say("repeated", f"{_many(found['repeated_rows'], 'row')}; "
            f"{_many(found['repeated_prompts'], 'prompt')} with other candidates; candidates "
            f"inside {_many(found['repeated_candidates'], 'group')}")  # fmt: skip
        if found["first"] is not None:
            say("best", f"candidate 0 in {found['first']:.3f} of the groups that have several")
        say("accuracy", f"{found['chance']:.3f} by chance, {found['longest']:.3f} by taking the "
            "longest candidate")  # fmt: skip
        for note in found["notes"]:
            say("note", note)
    say("errors", f"{_many(len(errors), 'row')} that cannot be used" if errors else "none")
    lines += [f"  {error}" for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"  and {len(errors) - SHOWN} more; --json F writes them all")
    return "\n".join(lines)


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _said(spread: Mapping[str, float]) -> str:
    return (f"{spread['least']} to {spread['most']}, median {spread['median']:g}, "
            f"99% have at most {spread['p99']}")  # fmt: skip


def _binned(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Each K, or where there are many up to each power of 2."""
    if len(sizes) <= 12:
        return list(sizes.items())
    bins: Counter[int] = Counter()
    for K, n in sizes.items():
        bins[(int(K) - 1).bit_length()] += n
    return [(f"{2 ** (b - 1) + 1 if b else 1}-{2**b}", bins[b]) for b in sorted(bins)]
