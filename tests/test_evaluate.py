"""Metrics against numbers worked out by hand, and scores against the model's own forward."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastrm import evaluate
from fastrm.plots import curve, smooth, training_plot

ROWS = [
    {"prompt": "p", "candidates": ["a", "bbb", "cc"], "best": 1},
    {"prompt": "p", "candidates": ["aa", "bb"], "best": 0},
    {"prompt": "p", "candidates": ["a"], "best": 0},
    {"prompt": "p", "candidates": ["a", "b", "cc", "d"], "best": 3},
]


@pytest.mark.parametrize(
    ("scores", "best", "expected"),
    [
        ([0.0, 2.0, 1.0], [1], 1),
        ([2.0, 0.0, 1.0], [1], 0),
        ([2.0, 2.0, 1.0], [1], 1 / 2),
        ([2.0, 2.0, 1.0], [2], 0),
        ([0.0, 0.0, 0.0], [0], 1 / 3),
        ([3.0, 3.0, 1.0], [0, 1], 1),
        ([3.0, 1.0, 3.0], [0, 1], 1 / 2),
        ([-1.0], [0], 1),
        ([math.nan, 1.0], [1], 0),
        ([1.0, math.nan], [0], 0),
    ],
)
def test_credit(scores, best, expected):
    assert evaluate.credit(scores, best) == expected


def test_metrics_by_hand():
    scores = [[0.0, math.log(2), 0.0], [1.0, 1.0], [7.0], [0.0, 0.0, 0.0, math.log(3)]]
    found = evaluate.metrics(ROWS, scores)
    assert found["n"] == 4
    assert found["accuracy"] == (1 + 1 / 2 + 1 + 1) / 4
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 + 1 / 4) / 4)
    assert found["longest"] == (1 + 1 / 2 + 1 + 0) / 4
    # -log 2/4, -log 1/2, 0, -log 3/6
    assert found["loss"] == pytest.approx(3 * math.log(2) / 4)
    assert found["margin"] == pytest.approx((math.log(2) + 0 + math.log(3)) / 3)


def test_metrics_with_labels_and_ranks():
    rows = [
        {"prompt": "p", "candidates": ["a", "b", "c"], "labels": [1, 1, 0]},
        {"prompt": "p", "candidates": ["a", "b", "c"], "ranks": [2, -1, 1]},
    ]
    found = evaluate.metrics(rows, [[1.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    assert found["accuracy"] == (1 / 2 + 1) / 2
    assert found["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    e = math.e
    losses = math.log(2 * e + 1) - 1 / 2, math.log(2 + e**5) - 5
    assert found["loss"] == pytest.approx(sum(losses) / 2)
    assert found["margin"] == (0 + 5) / 2


def test_metrics_do_not_overflow():
    found = evaluate.metrics(ROWS[:1], [[-1e4, 1e4, 0.0]])
    assert found["loss"] == 0 and found["accuracy"] == 1
    assert evaluate.metrics(ROWS[:1], [[1e4, -1e4, 0.0]])["loss"] == 2e4


def test_metrics_refuse_scores_that_do_not_fit():
    with pytest.raises(ValueError, match=r"scores\[1\] must have 2 scores.*got 3"):
        evaluate.metrics(ROWS[:2], [[0.0] * 3, [0.0] * 3])
    with pytest.raises(ValueError, match="equally many"):
        evaluate.metrics([], [])


def test_length_of_messages():
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    assert evaluate.text_length(messages) == 5
    assert evaluate.chosen([1.0, 3.0, 3.0]) == 1


def test_curve_keeps_finite_points_only():
    log = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan},
           {"step": 3, "loss": 1.0}, {"step": 3, "train_loss": 9.0}]  # fmt: skip
    assert curve(log, "loss") == ([1, 3], [2.0, 1.0])
    assert curve(log, "eval_loss") == ([0], [3.0])
    assert curve(log, "accuracy") == ([], [])


def test_smooth():
    assert smooth([2.0] * 30) == pytest.approx([2.0] * 30)
    assert smooth([4.0, 0.0])[0] == 4.0  # the start is not pulled to 0


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_training_plot(tmp_path, steps):
    log = [{"step": i, "loss": 2 - i / 40, "accuracy": i / 40} for i in range(steps)]
    log += [{"step": i, "eval_loss": 2.0, "eval_accuracy": 0.5} for i in range(0, steps, 10)]
    training_plot(log, tmp_path / "plot.png", chance=0.25)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def reward_model(request):
    """A random model of four words, and its tokenizer."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    if request.param == "encoder":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )  # fmt: skip
        config = BertConfig(num_labels=1, pad_token_id=0, **sizes)
        return BertForSequenceClassification(config).eval(), tokenizer
    config = LlamaConfig(num_labels=1, pad_token_id=0, **sizes)
    return LlamaForSequenceClassification(config).eval(), tokenizer


def test_scores_are_those_of_the_model_alone(reward_model):
    model, tokenizer = reward_model
    rows = [
        {"prompt": "red", "candidates": ["green blue", "red", "blue blue red green"]},
        {"prompt": "blue green red red", "candidates": ["green"]},
        {"prompt": "green", "candidates": ["red red", "blue"]},
    ]
    together = evaluate.score_rows(model, tokenizer, rows, batch_size=2)
    assert [len(s) for s in together] == [3, 1, 2]
    alone = [evaluate.score_rows(model, tokenizer, [row])[0] for row in rows]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    texts = [(row["prompt"], c) for row in rows for c in row["candidates"]]
    for (prompt, candidate), reward in zip(texts, sum(together, []), strict=True):
        if model.config.model_type == "bert":
            inputs = tokenizer(prompt, candidate, return_tensors="pt")
        else:
            ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, candidate)]
            inputs = {"input_ids": torch.tensor([[*ids[0], *ids[1], tokenizer.eos_token_id]])}
        with torch.no_grad():
            assert float(model(**inputs).logits) == pytest.approx(reward, abs=1e-5)


def test_scoring_leaves_the_mode_alone_and_marks_what_does_not_fit(reward_model):
    model, tokenizer = reward_model
    rows = [{"prompt": "red", "candidates": ["red " * 20, "blue"]},
            {"prompt": "red " * 20, "candidates": ["red", "blue"]}]  # fmt: skip
    model.train()
    scores = evaluate.score_rows(model, tokenizer, rows, max_length=8)
    assert model.training
    model.eval()
    assert scores[0] is None and len(scores[1]) == 2
    rows = [{**row, "best": 0} for row in rows]
    found = evaluate.evaluate_rows(model, tokenizer, rows, max_length=8)
    assert found["n"] == 1 and found["left_out"] == 1
    with pytest.raises(evaluate.DataError, match="no group is left"):
        evaluate.evaluate_rows(model, tokenizer, rows[:1], max_length=8)
