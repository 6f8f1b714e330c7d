"""The model card: its blocks run and agree, its numbers are the trainer's, yours stays."""

import importlib.util
import re

import pytest

from fastrm import RewardConfig, RewardTrainer
from fastrm.card import MARKER

from .conftest import make_decoder, make_rows, make_tokenizer

HAS_CROSS_ENCODER = importlib.util.find_spec("sentence_transformers") is not None
READERS = {"fastrm", "transformers", "pipeline", "CrossEncoder (sentence-transformers)"}
CHAT = {"template": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"}


def trainer_in(folder, tokenizer=None, model=None, **options):
    args = RewardConfig(
        str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[],
        learning_rate=1e-3, max_steps=2, logging_steps=1, **options,
    )  # fmt: skip
    rows, held_out = make_rows(12), make_rows(5, seed=1)
    trainer = RewardTrainer(model or make_decoder(), args, rows, held_out, tokenizer)
    trainer.train()
    return trainer, rows, held_out


@pytest.mark.parametrize("kind", ["decoder", "bos", "pad is eos", "chat", "encoder"])
def test_the_blocks_of_a_card_run_and_agree(tmp_path, monkeypatch, kind, request):
    options = {"bos": {"bos": "<bos>"}, "pad is eos": {"pad": "<eos>"}, "chat": CHAT}.get(kind, {})
    encoder = request.getfixturevalue("minilm") if kind == "encoder" else None
    tokenizer = None if encoder else make_tokenizer(**options)
    trainer, *_ = trainer_in(tmp_path / "model", tokenizer, encoder)
    trainer.save_model()
    text = (tmp_path / "model" / "README.md").read_text()
    blocks = dict(re.findall(r"With ([^\n]+):\n\n```python\n(.*?)\n```", text, re.DOTALL))
    assert set(blocks) == READERS
    monkeypatch.chdir(tmp_path)
    found = {}
    for reader, code in blocks.items():
        if "sentence_transformers" in code and not HAS_CROSS_ENCODER:
            continue
        namespace = {}
        exec(code, namespace)
        found[reader] = namespace["rewards"]
    (expected,) = found.pop("fastrm")
    assert expected[0] != expected[1]
    for rewards in found.values():
        assert rewards == pytest.approx(expected, abs=1e-5)


def test_what_a_card_says(tmp_path):
    trainer, rows, held_out = trainer_in(tmp_path, make_tokenizer(), temperature=2.0)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n") and MARKER in text
    assert "library_name: transformers" in text and "pipeline_tag: text-classification" in text
    for name, part in (("training", rows), ("held-out", held_out)):
        candidates = sum(len(row["candidates"]) for row in part)
        assert f"| {name} data | {len(part)} groups, {candidates} candidates;" in text
    assert "| loss | listwise |" in text and "| temperature | 2.0 |" in text
    log = trainer.state.log_history
    trained = next(e["accuracy"] for e in reversed(log) if "accuracy" in e)
    evaluated = next(e["eval_accuracy"] for e in reversed(log) if "eval_accuracy" in e)
    assert f"| accuracy | {trained:.4f} | {evaluated:.4f} |" in text
    assert "| base model | not named |" in text and "base_model" not in text
    assert str(tmp_path) not in text  # a card goes to others


def test_a_card_of_the_user_stays_and_ours_is_renewed(tmp_path):
    trainer, *_ = trainer_in(tmp_path, make_tokenizer())
    file = tmp_path / "README.md"
    trainer.save_model()
    first = file.read_text()
    trainer.state.global_step = 77
    trainer.save_model()
    assert "| steps | 77, " in file.read_text() != first
    file.write_text("# Mine\n")
    trainer.save_model()
    assert file.read_text() == "# Mine\n"


def test_checkpoints_have_none(tmp_path):
    trainer, *_ = trainer_in(tmp_path, make_tokenizer())
    trainer.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    assert (tmp_path / "checkpoint" / "config.json").exists()
    assert not (tmp_path / "checkpoint" / "README.md").exists()
