"""The demo's data: which ending completes this sentence, from Python's own documentation.

Every Python carries `pydoc_data.topics`, the language reference as plain text: real English prose
that needs no download. A group is the first half of a sentence, its own second half, and 1 to 8
second halves from elsewhere in the same document, of about the same length; half of these are the
ones that share most words with the first half.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any

from fastrm.evaluate import metrics

SMALLEST, LARGEST = 2, 9  # candidates in a group
FEWEST_WORDS, MOST_WORDS = 10, 22  # of a sentence; a longer one loses its start
NEAREST = 30  # distractors come from so many endings nearest in length
FEWEST_SENTENCES = 3 * LARGEST  # of a document
HELD_OUT_EVERY = 5  # every fifth document

Row = dict[str, Any]
Similarity = Callable[[str, str], float]


def demo_rows(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, from different documents; the same on every call."""
    found = documents(topics)
    similarity = word_overlap(s for _, sentences in found for s in sentences)
    train: list[Row] = []
    held_out: list[Row] = []
    for i, (name, sentences) in enumerate(found):
        part = held_out if i % HELD_OUT_EVERY == 2 else train
        part += _groups(sentences, similarity, random.Random(f"{seed} {name}"))
    for part in (train, held_out):
        random.Random(seed).shuffle(part)
    return train, held_out


def documents(topics: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Names and sentences of the documents, the longest document first.

    Topics overlap (one is often a section of another): a paragraph that shares a sentence with one
    before it is left out, so that no text is both trained on and held out.
    """
    seen: set[str] = set()
    found = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        kept: list[str] = []
        for paragraph in _prose(topics[name]):
            sentences = list(_sentences(paragraph))
            if not seen.intersection(sentences):
                kept += sentences
            seen.update(sentences)
        kept = [s for s in dict.fromkeys(kept) if len(s.split()) >= FEWEST_WORDS]
        if len(kept) >= FEWEST_SENTENCES:
            found.append((name, kept))
    return found


def word_overlap(texts: Iterable[str]) -> Similarity:
    """Cosine of two texts as bags of words, rare words counting more (TF-IDF)."""
    bags = [set(_words(text)) for text in texts]
    count = Counter(word for bag in bags for word in bag)

    def vector(text: str) -> dict[str, float]:
        weights = {w: math.log((1 + len(bags)) / (1 + count[w])) + 1 for w in set(_words(text))}
        norm = math.sqrt(sum(x * x for x in weights.values())) or 1.0
        return {w: x / norm for w, x in weights.items()}

    def similarity(a: str, b: str) -> float:
        x, y = vector(a), vector(b)
        return sum(x[w] * y[w] for w in x.keys() & y.keys())

    return similarity


def overlap_accuracy(rows: Sequence[Row]) -> float:
    """How often the candidate that shares most words with the prompt is the best."""
    similarity = word_overlap(text for row in rows for text in [row["prompt"], *row["candidates"]])
    scores = [[similarity(row["prompt"], c) for c in row["candidates"]] for row in rows]
    return metrics(rows, scores)["accuracy"]


def _groups(sentences: Sequence[str], similarity: Similarity, rng: random.Random) -> Iterator[Row]:
    halves = []
    for sentence in sentences:
        words = sentence.split()[-MOST_WORDS:]
        cut = rng.randint(2 * len(words) // 5, 3 * len(words) // 5)
        halves.append((" ".join(words[:cut]), " ".join(words[cut:])))
    endings = list(dict.fromkeys(ending for _, ending in halves))
    for prompt, best in halves:
        others = sorted((e for e in endings if e != best), key=lambda e: abs(len(e) - len(best)))
        pool = sorted(others[:NEAREST], key=lambda e: -similarity(prompt, e))
        size = rng.randint(SMALLEST, LARGEST)
        similar = (size - 1) // 2
        distractors = pool[:similar] + rng.sample(pool[similar:], size - 1 - similar)
        candidates = [best, *distractors]
        rng.shuffle(candidates)
        yield {"prompt": prompt, "candidates": candidates, "best": candidates.index(best)}


def _prose(topic: str) -> Iterator[str]:
    """The paragraphs of a topic as one line each, without headings, code, grammar and tables."""
    for block in re.split(r"\n\s*\n", topic):
        text = " ".join(block.split())
        text = re.sub(r"^([*-]|\d+\.|\[\d+\]) ", "", text)
        text = re.sub(r"\*+(\w[^*]*)\*+", r"\1", text)
        letters = sum(c.isalpha() or c == " " for c in text)
        if (
            text[:1].isupper()
            and text.endswith(".")
            and letters > 0.85 * len(text)
            and not re.search(r"::=|>>>|[|]|={3}|-{3}|\*{3}|^(New|Changed|Deprecated) ", text)
        ):
            yield text


def _sentences(paragraph: str) -> Iterator[str]:
    start = ""
    for piece in re.split(r"(?<=[.!?])\s+(?=[A-Z\"(])", paragraph):
        start = f"{start} {piece}".strip()
        if not re.search(r"\b(e\.g|i\.e|etc|cf|vs|resp)\.$", start):
            yield start
            start = ""
    if start:
        yield start


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z_]{2,}", text.lower())
