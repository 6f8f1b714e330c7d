"""`fastrm data check`: what it says of a file whose faults are known."""

import json

import pytest

import fastrm
from fastrm import cli
from fastrm.data import DataError, tokenize_row
from fastrm.data_check import SHOWN, check_data, report
from fastrm.demo import demo_rows

from .conftest import make_rows, make_tokenizer

PAIR = {"prompt": "p", "candidates": ["ab", "c"], "best": 0}
ROWS = [
    PAIR,
    PAIR,  # a row twice
    PAIR | {"candidates": ["ab", "d"]},  # a prompt with other candidates
    {"prompt": "q", "candidates": ["x"], "best": 0},  # nothing to compare
    {"prompt": "r", "candidates": ["same", "same", "same"], "best": 2},
    {"prompt": "s", "candidates": ["y", "y", "zz"], "ranks": [1, 0, 0]},
    {"prompt": "a", "chosen": "bb", "rejected": "c"},
    {"prompt": "a", "candidates": ["b"], "best": 1},  # two that are wrong
    "not a row",
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_counts_by_hand(tmp_path):
    file = write(tmp_path / "x.jsonl", ROWS)
    with file.open("a") as f:
        f.write("{broken\n")
    found, lengths = check_data(file)
    assert found["rows"] == 10 and found["groups"] == 7 and found["candidates"] == 15
    assert found["formats"] == {"fastrm": 6, "TRL": 1}
    assert found["sizes"] == {"1": 1, "2": 4, "3": 2}
    assert found["repeated_rows"] == 1 and found["repeated_prompts"] == 1
    assert found["repeated_candidates"] == 2 and found["equal_candidates"] == 1
    assert found["first"] == 4 / 6
    assert found["chance"] == pytest.approx((4 / 2 + 1 + 1 / 3 + 2 / 3) / 7)
    assert found["longest"] == pytest.approx((4 + 1 + 1 / 3 + 1) / 7)
    assert sorted(lengths) == [2] * 7 + [3] * 5 + [5] * 3  # the prompt is one character
    assert found["characters"]["candidate"] == {
        "least": 1, "median": 2, "mean": pytest.approx(29 / 15), "p99": 4, "most": 4
    }  # fmt: skip
    assert [error.split(":")[1] for error in found["errors"]] == ["8", "9", "10"]
    for error, part in zip(found["errors"], ["'best'", "JSON object", "broken JSON"], strict=True):
        assert part in error
    text = report(found)
    for error in found["errors"]:
        assert f"\n  {error}" in text
    assert "1 group of one candidate" in text and "1 group of several candidates that are" in text


def test_tokens_are_those_of_training(tmp_path):
    tokenizer = make_tokenizer()
    rows = make_rows(60)
    limit = 25
    found, lengths = check_data(write(tmp_path / "x.jsonl", rows), tokenizer, limit)
    whole = [tokenize_row(tokenizer, row, None, pairs=False) for row in rows]
    assert lengths == [len(ids) for example in whole for ids in example["input_ids"]]
    fitted = [tokenize_row(tokenizer, row, limit, pairs=False) for row in rows]
    assert found["left_out"] == sum(example is None for example in fitted) > 0
    assert found["cut"] == sum(example is not None and example["cut"] for example in fitted) > 0
    text = report(found)
    assert f"max_length 25: {found['cut']} prompts cut at the left" in text
    assert f"{found['left_out']} groups with a candidate of more than 25 tokens" in text


def test_a_row_that_cannot_be_tokenised_is_an_error(tmp_path):
    chat = {"prompt": [{"role": "user", "content": "p"}], "candidates": ["a", "b"], "best": 0}
    file = write(tmp_path / "x.jsonl", [chat, PAIR])
    found, _ = check_data(file, make_tokenizer())
    assert found["groups"] == 1
    assert found["errors"][0].startswith(f"{file}:1: ") and "chat template" in found["errors"][0]


def notes(tmp_path, rows):
    return " ".join(check_data(write(tmp_path / "x.jsonl", rows))[0]["notes"])


def test_a_best_that_is_always_first_is_pointed_out(tmp_path):
    rows = [{"prompt": str(n), "candidates": ["ab", "cd", "ef"], "best": 0} for n in range(10)]
    assert "candidate 0 in all 10 groups" in notes(tmp_path, rows)
    assert "candidate 0" not in notes(tmp_path, [*rows, rows[0] | {"best": 1}])
    assert "candidate 0" not in notes(tmp_path, rows[:9])
    pairs = [{"prompt": str(n), "chosen": "ab", "rejected": "cd"} for n in range(10)]
    assert not notes(tmp_path, pairs)  # that is where the format puts it


def test_length_that_gives_the_best_away_is_pointed_out(tmp_path):
    """4 standard deviations of a random choice: 20 of 100 pairs beyond 50."""
    rows = [{"prompt": str(n), "candidates": ["long", "s"], "best": int(n % 2 == 0 and n < 58)}
            for n in range(100)]  # fmt: skip
    assert sum(row["best"] == 0 for row in rows) == 71
    assert "far more often than by chance" in notes(tmp_path, rows)
    rows[1]["best"] = 1
    assert "chance" not in notes(tmp_path, rows)
    rows = [row | {"best": 1} for row in rows]
    assert "far less often than by chance" in notes(tmp_path, rows)


def test_demo_data_is_clean(tmp_path):
    assert not notes(tmp_path, demo_rows()[0])


def test_many_sizes_and_many_errors(tmp_path):
    rows = [{"prompt": str(K), "candidates": ["a"] * K, "best": 0} for K in range(1, 40)]
    found, _ = check_data(write(tmp_path / "x.jsonl", rows + [{}] * 30))
    text = report(found)
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("candidates"))
    binned = [line.split("#")[0].split()[-1] for line in lines[first : first + 7]]
    assert binned == ["1-1", "2-2", "3-4", "5-8", "9-16", "17-32", "33-64"]
    assert sum(int(line.split()[-2]) for line in lines[first : first + 7]) == 39
    assert len(found["errors"]) == 30
    assert lines[-1] == f"  and {30 - SHOWN} more; --json F writes them all"


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", ROWS[:7])
    write(tmp_path / "bad.jsonl", ROWS)
    args = ["data", "check", "good.jsonl", "--output-dir", "out", "--json", "found.json"]
    assert cli.main(args) == 0
    out = capsys.readouterr()
    assert out.out.startswith("good.jsonl: 7 rows, 7 groups that can be used, 15 candidates\n")
    assert "errors      none" in out.out and not out.err
    assert (tmp_path / "out" / "data.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == check_data("good.jsonl")[0]
    assert cli.main(["data", "check", "bad.jsonl"]) == 1
    assert "2 rows that cannot be used" in capsys.readouterr().out
    write(tmp_path / "none.jsonl", [{}])
    assert cli.main(["data", "check", "none.jsonl", "--output-dir", "out"]) == 1
    assert "0 groups that can be used" in capsys.readouterr().out


def test_command_counts_the_tokens_of_a_model(tmp_path, capsys, monkeypatch, minilm):
    from transformers import AutoTokenizer

    file = write(tmp_path / "x.jsonl", make_rows(20))
    args = ["data", "check", str(file), "--model", minilm, "--json", str(tmp_path / "found")]
    assert cli.main([*args, "--max-length", "20"]) == 0
    found = json.loads((tmp_path / "found").read_text())
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected, _ = check_data(file, tokenizer, 20, pairs=True)
    assert found == expected and found["cut"] > 0
    assert cli.main(args) == 0  # no more than the model reads
    assert json.loads((tmp_path / "found").read_text())["max_length"] == 512


def test_the_limit_is_that_of_training(tmp_path):
    from transformers import LlamaConfig

    make_tokenizer().save_pretrained(tmp_path / "m")
    LlamaConfig(max_position_embeddings=4096, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path / "m"
    )
    file = write(tmp_path / "x.jsonl", [PAIR])
    args = ["data", "check", str(file), "--model", str(tmp_path / "m")]
    assert cli.main([*args, "--json", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["max_length"] == fastrm.RewardConfig("unused").max_length == 1024


@pytest.mark.parametrize("arguments, message", [
    (["none.jsonl"], "fastrm data: error: none.jsonl: expected a JSONL file, got: No such file"),
    (["empty.jsonl"], "empty.jsonl: expected at least one row"),
    ([], "fastrm data check: error: the following arguments are required: FILE"),
    (["x.jsonl", "--max-length", "5"], "--max-length counts tokens and so needs --model"),
    (["x.jsonl", "--max-lenght", "5"], "unknown option --max-lenght; did you mean --max-length"),
    (["x.jsonl", "--max-length", "0", "--model", "m"], "expected an integer of at least 1"),
    (["x.jsonl", "--model", "nowhere/m"], "cannot load the tokenizer of nowhere/m: "),
    (["x.jsonl", "--json", "no/where"], "no/where: No such file"),
    (["x.jsonl", "--output-dir", "x.jsonl"], "--output-dir x.jsonl: File exists"),
])  # fmt: skip
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", ROWS)
    write(tmp_path / "empty.jsonl", [])
    assert cli.main(["data", "check", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_shows_what_the_command_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "--help"])
    text = capsys.readouterr().out
    rows = text.partition("one of them wrong,\n")[2].partition("the first prints\n")[0]
    (tmp_path / "train.jsonl").write_text(rows)
    shown = text.partition("the first prints\n")[2].partition("\n\n")[0]
    assert cli.main(["data", "check", "train.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert [line.removeprefix("  ") for line in shown.splitlines()] == printed.splitlines()


def test_an_empty_source_is_an_error(tmp_path):
    with pytest.raises(DataError, match="at least one row"):
        check_data(write(tmp_path / "x.jsonl", []))
