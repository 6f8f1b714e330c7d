"""Where rows come from and what they look like: files, datasets, and other libraries' formats.

A row in another library's format is recognised by its columns and converted to fastrm's own, see
`fastrm.data`. Other columns are kept; `weight` and `margin` mean the same in every format.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

Row = dict[str, Any]


class DataError(ValueError):
    """A row that cannot be used; the message says where, which column and what was expected."""


class Format(NamedTuple):
    name: str
    columns: str  # as a reader is told
    marks: tuple[str, ...]  # a row that has one of these columns is in this format
    convert: Callable[[Row, str], Row]  # takes its columns out of a row


def convert(raw: Any, where: str) -> Row:
    """A row in fastrm's format, which is yet to be checked; a row that has it comes back as it is.

    Args:
        raw: a row in any of `FORMATS`, or the `DataError` that reading it gave.
        where: what to call the row in an error.

    Raises:
        DataError: "WHERE: TRL row: column 'x': expected ..., got ...".
    """
    if isinstance(raw, DataError):
        raise raw
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected a JSON object with columns 'prompt', 'candidates' and "
                        f"'best', got {type(raw).__name__}")  # fmt: skip
    found = recognise(raw)
    if found is None:
        names = [repr(name) for name, value in raw.items() if value is not None]
        got = ", ".join(names[:20] + ["..."] * (len(names) > 20)) or "none"
        raise DataError(f"{where}: expected the columns of one of the formats {KNOWN}; "
                        f"got the columns {got}")  # fmt: skip
    if found is FORMATS[0]:
        return raw
    rest = dict(raw)
    converted = found.convert(rest, f"{where}: {found.name} row")
    return {name: value for name, value in rest.items() if name not in _GIVEN} | converted


def recognise(raw: Row) -> Format | None:
    """The format of a row."""
    for present in _present(raw):
        for found in FORMATS:
            if not present.keys().isdisjoint(found.marks):
                return found
        if _by_order(present):
            return SENTENCE_TRANSFORMERS
    return None


def _present(row: Row) -> Iterator[Row]:
    """The columns that hold something: of Parquet not None, of CSV if possible not empty text."""
    present = {name: value for name, value in row.items() if value is not None}
    yield {name: value for name, value in present.items() if not isinstance(value, str) or value}
    yield present


def _own(row: Row, where: str) -> Row:
    return row


def _trl(row: Row, where: str) -> Row:
    prompt = None if row.get("prompt") is None else text(row, "prompt", where)
    several = row.get("rejected")
    if isinstance(several, list) and several and not isinstance(several[0], dict):
        return _several_rejected(row, prompt, where)
    chosen, rejected = text(row, "chosen", where), text(row, "rejected", where)
    if type(chosen) is not type(rejected):
        refuse(where, "rejected", f"{'text' if isinstance(chosen, str) else 'messages'}, as "
               "'chosen' is", rejected)  # fmt: skip
    if prompt is None or isinstance(prompt, str) and isinstance(chosen, list):
        # Messages often repeat a prompt that is given as text beside them.
        n = _shared(chosen, rejected)
        if n or prompt is None:
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if prompt == []:
        refuse(where, "chosen", "a 'prompt' beside it, or messages that begin as those of "
               "'rejected' do", chosen)  # fmt: skip
    del row["chosen"], row["rejected"]
    return {"prompt": prompt, "candidates": [chosen, rejected], "best": 0}


def _several_rejected(row: Row, prompt: Any, where: str) -> Row:
    """A list of rejected answers, as `fastrm.integrations.trl.ListwiseRewardTrainer` reads it."""
    chosen, rejected = text(row, "chosen", where), row["rejected"]
    for k, answer in enumerate(rejected):
        if type(answer) is not type(chosen) or not is_text(answer):
            what = "text" if isinstance(chosen, str) else "messages"
            refuse(where, "rejected", f"{what}, as 'chosen' is", answer, f" as answer {k}")
    if prompt is None:
        shared = min(_shared(chosen, answer) for answer in rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], [r[shared:] for r in rejected]
    del row["chosen"], row["rejected"]
    found = {"prompt": prompt, "candidates": [chosen, *rejected], "best": 0}
    if isinstance(row.get("margin"), list):  # one for each rejected answer
        found["margin"] = [0.0, *numbers(row, "margin", len(rejected), where)]
    return found


def _shared(chosen: Any, rejected: Any) -> int:
    """Characters or messages that both begin with, as TRL's `extract_prompt` counts them.

    A space before the first difference belongs to the answers, and none of them is left empty.
    """
    shorter = min(len(chosen), len(rejected))
    for n in range(shorter):
        if chosen[n] != rejected[n]:
            return n - 1 if n and chosen[n - 1] == " " else n
    return max(shorter - 1, 0)


def _nemo_rl(row: Row, where: str) -> Row:
    prompt, completions = text(row, "context", where), row.get("completions")
    expected = "a list of {'rank': integer of at least 0, 'completion': messages}"
    if not isinstance(completions, list) or not completions:
        refuse(where, "completions", expected, completions)
    for k, completion in enumerate(completions):
        if not (
            isinstance(completion, dict) and is_text(completion.get("completion"))
            and is_number(completion.get("rank"), int) and completion["rank"] >= 0
        ):  # fmt: skip
            refuse(where, "completions", expected, completion, f" as completion {k}")
    del row["context"], row["completions"]
    return {
        "prompt": prompt,
        "candidates": [completion["completion"] for completion in completions],
        "ranks": [completion["rank"] for completion in completions],
    }


def _flag_embedding(row: Row, where: str) -> Row:
    """`pos` first, then `neg`; several `pos` share the target; the scores are `teacher_scores`."""
    query, pos = text(row, "query", where), _texts(row, "pos", where, least=1)
    neg = _texts(row, "neg", where)
    scores: dict[str, list[float]] = {}
    if row.get("pos_scores") is not None or row.get("neg_scores") is not None:
        if not neg and row.get("neg_scores") is None:
            row["neg_scores"] = []
        scores["teacher_scores"] = [
            *numbers(row, "pos_scores", len(pos), where),
            *numbers(row, "neg_scores", len(neg), where),
        ]
    for column in ("query", "pos", "neg", "pos_scores", "neg_scores"):
        row.pop(column, None)
    return {"prompt": query, "candidates": pos + neg, **_first(len(pos), len(neg)), **scores}


def _tevatron(row: Row, where: str) -> Row:
    """A passage is its title and its text with a space between, as Tevatron joins them."""
    query, pos = text(row, "query", where), _passages(row, "positive_passages", where, least=1)
    neg = _passages(row, "negative_passages", where)
    for column in ("query", "positive_passages", "negative_passages"):
        row.pop(column, None)
    return {"prompt": query, "candidates": pos + neg, **_first(len(pos), len(neg))}


def _passages(row: Row, column: str, where: str, least: int = 0) -> list[str]:
    expected = "a list of {'title': text (optional), 'text': text}"
    found = row.get(column)
    if found is None and not least:
        return []
    if not isinstance(found, list) or len(found) < least:
        refuse(where, column, expected + (", at least one" if least else ""), found)
    joined = []
    for k, passage in enumerate(found):
        parts = []
        if isinstance(passage, dict):
            title = [passage["title"]] if passage.get("title") else []
            parts = [*title, passage.get("text")]
        if not parts or not all(isinstance(p, str) and is_text(p) for p in parts):
            refuse(where, column, expected, passage, f" as passage {k}")
        joined.append(" ".join(parts))
    return joined


def _sentence_transformers(row: Row, where: str) -> Row:
    """Labels are shares of the target, divided by their sum; ListNet there takes their softmax."""
    query, documents, labels = next(filter(None, map(_by_order, _present(row))))
    candidates = _texts(row, documents, where, least=1)
    values = numbers(row, labels, len(candidates), where, 0)
    if sum(values) <= 0:
        refuse(where, labels, "at least one number above 0", values)
    prompt = text(row, query, where)
    for column in (query, documents, labels):
        del row[column]
    return {"prompt": prompt, "candidates": candidates, **_target(values)}


def _negatives(row: Row, where: str) -> Row:
    """The first other column of text, then `positive`, and `negative` or `negative_1`, ..."""
    columns = [name for name in row if _NEGATIVE.fullmatch(name)]
    names = [name for name in columns if row[name] not in (None, "")] or ["negative"]
    prompt = next((name for present in _present(row) for name, value in present.items()
                   if is_text(value) and name not in ("positive", *columns)), "anchor")  # fmt: skip
    found = {
        "prompt": text(row, prompt, where),
        "candidates": [text(row, name, where) for name in ("positive", *names)], "best": 0,
    }  # fmt: skip
    for name in (prompt, "positive", *columns):
        del row[name]
    return found


def _by_order(present: Row) -> list[str] | None:
    """Names of the columns text, texts and labels, which sentence-transformers tells by order.

    Only the labels' column has a name of its own there, and may be anywhere; where it has, further
    columns may follow.
    """
    columns = [name for name in present if name not in ("weight", "margin")]
    named = [name for name in columns if name in ("label", "labels", "score", "scores")]
    if named:
        columns = [name for name in columns if name != named[0]][:2] + named[:1]
    return columns if [type(present[name]) for name in columns] == [str, list, list] else None


def _first(positives: int, negatives: int) -> Row:
    return _target([1.0] * positives + [0.0] * negatives)


def _target(labels: list[float]) -> Row:
    """`best` where one label alone is above 0, which is the same distribution."""
    positive = [k for k, label in enumerate(labels) if label > 0]
    return {"best": positive[0]} if len(positive) == 1 else {"labels": labels}


SENTENCE_TRANSFORMERS = Format(
    "sentence-transformers", "a text, a list of texts, a list of labels", (), _sentence_transformers
)
FORMATS = (
    Format("fastrm", "prompt, candidates, best or labels or ranks", ("candidates", "best"), _own),
    Format("TRL", "prompt (optional), chosen, rejected (one or a list), margin (optional)",
           ("chosen", "rejected"), _trl),
    Format("NeMo-RL", "context, completions", ("completions",), _nemo_rl),
    Format("FlagEmbedding", "query, pos, neg, pos_scores and neg_scores (optional)",
           ("pos", "neg"), _flag_embedding),
    Format("Tevatron", "query, positive_passages, negative_passages",
           ("positive_passages", "negative_passages"), _tevatron),
    SENTENCE_TRANSFORMERS,
    Format("sentence-transformers triplet", "anchor, positive, negative or negative_1, ...",
           ("positive",), _negatives),
)  # fmt: skip
KNOWN = "; ".join(f"{f.name}: {f.columns}" for f in FORMATS)
_GIVEN = {"prompt", "candidates", "best", "labels", "ranks", "teacher_scores"}  # by a conversion


def text(row: Row, column: str, where: str) -> Any:
    """What a column of text or messages holds."""
    if not is_text(row.get(column)):
        refuse(where, column, "text or a list of messages {'role': text, 'content': text}",
               row.get(column))  # fmt: skip
    return row[column]


def _texts(row: Row, column: str, where: str, least: int = 0) -> list[str]:
    found = row.get(column)
    if found is None and not least:
        return []
    if not isinstance(found, list) or len(found) < least:
        refuse(where, column, f"a list of {'at least one text' if least else 'texts'}", found)
    for k, value in enumerate(found):
        if not isinstance(value, str) or not is_text(value):
            refuse(where, column, "a list of texts", value, f" as text {k}")
    return found


def numbers(
    row: Row, column: str, K: int, where: str, lowest: float = -math.inf, kind: type = float
) -> list[Any]:
    """What a column of K numbers holds."""
    values = row.get(column)
    fits = isinstance(values, list) and len(values) == K
    if not fits or not all(is_number(v, kind) and v >= lowest for v in values or ()):
        what = "integers" if kind is int else "finite numbers"
        least = "" if lowest == -math.inf else f" of at least {lowest:g}"
        refuse(where, column, f"{K} {what}{least}, one a candidate", values)
    return values  # type: ignore[return-value]


def refuse(where: str, column: str, expected: str, got: Any = None, which: str = "") -> NoReturn:
    shown = "nothing" if got is None else repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise DataError(f"{where}: column '{column}': expected {expected}, got {shown}{which}")


def is_text(value: Any) -> bool:
    """Whether a value is text, or messages with a role and a text each."""
    if isinstance(value, str):
        try:  # half of a surrogate pair, from text that was cut, is no text
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str) and is_text(m["content"])
        for m in value
    )  # fmt: skip


def is_number(value: Any, kind: type) -> bool:
    """Whether a batch, fp32 or int64, can hold it. NaN fails the comparison."""
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, int | float) and abs(value) <= 3.4e38


def load(source: str | Path) -> Iterator[tuple[str, Any]]:
    """What to call each row in an error, and the row, or the `DataError` that reading it gave.

    Args:
        source: a file, CSV, TSV, Parquet or JSON by its name and JSON lines else; or where there
            is no such file NAME or NAME:SPLIT of a dataset on the Hugging Face hub (split train).

    Raises:
        DataError: the source cannot be read at all.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in _READERS and _HUB.fullmatch(str(source)) and not path.exists():
        return _read_hub(str(source))
    kind, reader = _READERS.get(suffix, _READERS[".jsonl"])
    try:
        return reader(path)
    except OSError as e:
        problem = e.strerror or _first_line(e)
        raise DataError(f"{path}: expected a {kind} file, got: {problem}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: expected UTF-8 text, got byte {e.object[e.start]:#04x} "
                        f"at position {e.start}") from None  # fmt: skip


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    return _lines(path.read_text(encoding="utf-8-sig"), path)


def _lines(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parsed(line, where, "a JSON object on one line")


def _parsed(content: str, where: str, expected: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as e:
        line = "" if e.lineno == 1 else f"line {e.lineno}, "
        got = f"got broken JSON: {e.msg.removesuffix(' at')} at {line}character {e.colno}"
    except (ValueError, RecursionError) as e:  # a number or a nesting beyond all use
        got = f"got: {e}"
    return DataError(f"{where}: expected {expected}, {got}")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """One list of rows; many a file of this name holds JSON lines."""
    content = path.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        return _lines(content, path)
    rows = _parsed(content, str(path), "a JSON list of rows")
    if isinstance(rows, DataError):
        raise rows
    return ((f"{path}: row {i}", row) for i, row in enumerate(rows))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        content = file.read()
    return _csv_rows(content, path, "\t" if path.suffix.lower() == ".tsv" else ",")


def _csv_rows(content: str, path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    before = csv.field_size_limit(sys.maxsize)  # a cell may hold many candidates
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            where = f"{path}:{line}"
            if cells:  # not a blank line
                yield where, _csv_row(header, cells, where)
            line = reader.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: expected CSV, got: {e}") from None
    finally:
        csv.field_size_limit(before)


def _csv_row(header: list[str], cells: list[str], where: str) -> Row | DataError:
    if len(cells) != len(header):
        return DataError(f"{where}: expected {len(header)} cells, as many as columns in the first "
                         f"line, got {len(cells)}")  # fmt: skip
    try:
        return {c: _cell(c, cell, where) for c, cell in zip(header, cells, strict=True)}
    except DataError as e:
        return e


def _cell(column: str, cell: str, where: str) -> Any:
    """Messages, lists and numbers are written as JSON, a text as itself."""
    if column in _NOT_TEXT:
        value = _parsed(cell, f"{where}: column '{column}'", "JSON") if cell else None
        if isinstance(value, DataError):
            raise value
        return value
    if not cell.startswith("["):
        return cell
    value = _parsed(cell, where, "JSON")
    # A text may begin like a list, and may even be one.
    if isinstance(value, DataError):
        return cell
    several = column == "rejected" and bool(value) and all(map(is_text, value))
    may_be_list = column not in _TEXT and not _NEGATIVE.fullmatch(column)
    return value if may_be_list or is_text(value) or several else cell


_NEGATIVE = re.compile(r"negative(_\d+)?")
_TEXT = {"prompt", "chosen", "rejected", "context", "query", "question", "anchor", "positive"}
_NOT_TEXT = {
    "candidates", "best", "labels", "ranks", "teacher_scores", "weight", "margin", "completions",
    "pos", "neg", "pos_scores", "neg_scores", "positive_passages", "negative_passages",
}  # fmt: skip


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise DataError(f"{path}: a Parquet file needs pyarrow, which is not installed: "
                        "pip install pyarrow") from None  # fmt: skip
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except ArrowInvalid as e:
        raise DataError(f"{path}: expected a Parquet file, got: {_first_line(e)}") from None
    return ((f"{path}: row {i}", row) for i, row in enumerate(rows))


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: no such file; a dataset of the hub needs the datasets library, "
                        "which is not installed: pip install datasets") from None  # fmt: skip
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise DataError(f"{source}: no such file, and no dataset that could be loaded: "
                        f"{_first_line(e)}") from None  # fmt: skip
    return ((f"{source}: row {i}", row) for i, row in enumerate(rows))


_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\S+)?")  # NAME, OWNER/NAME, and either with :SPLIT
_READERS: dict[str, tuple[str, Callable[[Path], Iterator[tuple[str, Any]]]]] = {
    ".jsonl": ("JSONL", _read_jsonl),
    ".json": ("JSON", _read_json),
    ".csv": ("CSV", _read_csv),
    ".tsv": ("TSV", _read_csv),
    ".parquet": ("Parquet", _read_parquet),
}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
