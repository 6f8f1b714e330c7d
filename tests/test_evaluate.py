"""Metrics against numbers worked out by hand, and scores against the model's own forward."""

import itertools
import json
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

from fastrm import cli, evaluate
from fastrm.plots import calibration_plot, curve, reward_plot, smooth, training_plot

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
    alone = evaluate.assess(ROWS[2:3], [[7.0]])  # no others at all
    assert alone["margin"] == 0 and "margin:   0.000" in evaluate.report(alone, "on x")


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
    again = evaluate.score_rows(model, tokenizer, rows, max_length=8)
    assert again[1] == pytest.approx(scores[1], abs=1e-5)  # without dropout both times
    rows = [{**row, "best": 0} for row in rows]
    found = evaluate.evaluate_rows(model, tokenizer, rows, max_length=8)
    assert found["n"] == 1 and found["left_out"] == 1
    assert evaluate.report(found, "on x").endswith(
        "\nleft out: 1 groups with a candidate that does not fit"
    )
    with pytest.raises(evaluate.DataError, match="no group is left"):
        evaluate.evaluate_rows(model, tokenizer, rows[:1], max_length=8)


@pytest.mark.parametrize(
    ("scores", "best", "expected"),
    [
        ([3.0, 2.0, 1.0], [0], 1),
        ([3.0, 2.0, 1.0], [2], 1 / 3),
        ([2.0, 2.0, 1.0], [0], (1 + 1 / 2) / 2),  # first or second
        ([3.0, 1.0, 1.0, 1.0], [2], (1 / 2 + 1 / 3 + 1 / 4) / 3),
        # Two of three that tie: the first hit is first in 2 of 3 orders, else second.
        ([1.0, 1.0, 1.0], [0, 1], 2 / 3 + 1 / 2 / 3),
        ([1.0, 5.0, 1.0], [0, 1], 1),
        ([math.nan, 1.0], [1], 0),
    ],
)
def test_reciprocal_rank(scores, best, expected):
    assert evaluate.reciprocal_rank(scores, best) == pytest.approx(expected)


def test_reciprocal_rank_is_the_mean_over_all_orders():
    scores, best = [1.0, 2.0, 1.0, 1.0, 0.0, 1.0], [0, 3, 4]
    found = []
    for order in itertools.permutations(range(6)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: ties in the order given
        found.append(1 / (1 + min(ranked.index(i) for i in best)))
    expected = sum(found) / len(found)
    assert evaluate.reciprocal_rank(scores, best) == pytest.approx(expected)


def test_ndcg_by_hand():
    gains, log3 = [3.0, 1.0, 0.0], math.log2(3)
    ideal = 3 + 1 / log3
    assert evaluate.ndcg([9.0, 5.0, 1.0], gains) == 1
    assert evaluate.ndcg([1.0, 5.0, 9.0], gains) == pytest.approx((1 / log3 + 3 / 2) / ideal)
    # A tie of the first two: each place gets their mean gain.
    assert evaluate.ndcg([5.0, 5.0, 1.0], gains) == pytest.approx(2 * (1 + 1 / log3) / ideal)
    assert evaluate.ndcg([math.nan, 0.0, 0.0], gains) == 0


def test_ndcg_is_that_of_sklearn():
    ndcg_score = pytest.importorskip("sklearn.metrics", reason="scikit-learn is missing").ndcg_score
    gains, scores = [3.0, 0.0, 2.0, 1.0], [0.1, 0.4, 0.4, -2.0]  # its ties are averaged too
    expected = ndcg_score([gains], [scores])
    assert evaluate.ndcg(scores, gains) == pytest.approx(expected)


def test_grades():
    assert evaluate.grades({"labels": [0.5, 2]}) == [0.5, 2]
    assert evaluate.grades({"ranks": [7, 0, -1, 7]}) == [1, 2, 0, 1]
    assert evaluate.grades({"best": 0}) is None


def test_calibration_by_hand():
    # Two candidates each: probabilities 0.75, 0.75, 0.5 (a tie), of which one, none and half right.
    rows = [{"prompt": "p", "candidates": ["a", "b"], "best": b} for b in (0, 1, 0)]
    scores = [[math.log(3), 0.0], [math.log(3), 0.0], [1.0, 1.0]]
    rows.append({"prompt": "p", "candidates": ["a"], "best": 0})  # says nothing
    found = evaluate.calibration(rows, [*scores, [9.0]])
    assert found["n"] == 3
    assert [(b["low"], b["n"]) for b in found["bins"]] == [(0.4, 1), (0.7, 2)]
    assert found["bins"][1]["confidence"] == pytest.approx(0.75)
    assert found["bins"][1]["accuracy"] == found["bins"][0]["accuracy"] == 0.5
    assert found["ece"] == pytest.approx(2 / 3 * 0.25)
    assert found["nll"] == pytest.approx((-math.log(0.75) - math.log(0.25) + math.log(2)) / 3)
    assert found["temperature"] is None  # right as often as wrong: the flatter the better
    rows.append({"prompt": "p", "candidates": ["a", "b"], "best": 0})
    for wrong in ([math.nan, 0.0], [math.inf, 0.0]):  # says nothing either
        assert evaluate.calibration(rows, [*scores, [9.0], wrong]) == found


def test_fitted_temperature():
    # Right 3 times of 4 at odds of 81:1; odds of 3:1 are right, and 81 = 3^4.
    rows = [{"prompt": "p", "candidates": ["a", "b"], "best": b} for b in (0, 0, 1, 0)]
    found = evaluate.calibration(rows, [[math.log(81), 0.0]] * 4)
    assert found["temperature"] == pytest.approx(4)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found["nll_fitted"] == pytest.approx(entropy)
    assert found["nll"] > found["nll_fitted"]
    assert evaluate.calibration(rows[:1], [[1.0, 0.0]])["temperature"] is None  # never wrong


def test_fitted_temperature_on_ragged_groups_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    rows, scores = [], []
    for n in range(60):
        K = 2 + n % 4
        s = torch.randn(K, generator=generator, dtype=torch.float64)
        best = int(torch.multinomial(torch.softmax(2 * s, 0), 1, generator=generator))
        rows.append({"prompt": "p", "candidates": ["a"] * K, "best": best})
        scores.append(s.tolist())

    def nll(t):
        parts = [
            torch.nn.functional.cross_entropy(torch.tensor(s) / t, torch.tensor(row["best"]))
            for row, s in zip(rows, scores, strict=True)
        ]
        return float(sum(parts)) / len(parts)

    found = evaluate.calibration(rows, scores)
    t = found["temperature"]
    assert found["nll_fitted"] == pytest.approx(nll(t), abs=1e-5)
    assert nll(t) < min(nll(t * 1.05), nll(t / 1.05), nll(1.0))


def test_reward_spread_by_hand():
    rows = [
        {"prompt": "p", "candidates": ["a", "b", "c"], "ranks": [0, 1, 1]},
        {"prompt": "p", "candidates": ["a", "b"], "best": 1},
    ]
    found = evaluate.reward_spread(rows, [[3.0, 1.0, -1.0], [0.0, 2.0]])
    assert found["mean"] == 1 and found["std"] == pytest.approx(math.sqrt(10 / 5))
    assert (found["min"], found["max"]) == (-1, 3)
    assert found["std_in_group"] == pytest.approx(math.sqrt((4 + 0 + 4 + 1 + 1) / 5))
    best, rest = found["by_rank"]
    assert (best["rank"], best["n"], best["mean"], best["std"]) == (1, 2, 2.5, 0.5)
    assert (rest["rank"], rest["n"], rest["mean"]) == (2, 3, 0)
    assert rest["std"] == pytest.approx(math.sqrt(2 / 3))


def test_ties_score_by_hand():
    rows = [
        {"id": "tied:0", "prompt": "p", "candidates": ["a", "b", "c"], "labels": [1, 1, 0]},
        {"id": "ref:0", "prompt": "p", "candidates": ["a", "b"], "best": 0},
        {"id": "tied:1", "prompt": "p", "candidates": ["a", "b", "c"], "labels": [1, 1, 0]},
        {"id": "ref:1", "prompt": "p", "candidates": ["a", "b"], "best": 0},
        {"prompt": "p", "candidates": ["a", "b"], "best": 0},
    ]
    # Gap 4 and width 1, its fellow's gap 0.5; then gap -1 (a wrong one is higher), width 2, gap 3.
    scores = [[5.0, 6.0, 1.0], [1.5, 1.0], [3.0, 1.0, 2.0], [4.0, 1.0], [0.0, 1.0]]
    found = evaluate.ties_score(rows, scores)
    assert found["tied_accuracy"] == 0.5 and found["ref_accuracy"] == 1
    assert found["preferred"] == 0.5 and found["preferred_hard"] == 0
    margin = (math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert found["margin"] == pytest.approx(margin)
    assert found["score"] == pytest.approx(0.3 * 1.5 + 0.2 * 0.5 + 0.01 * margin)
    assert evaluate.ties_score(rows[4:], scores[4:]) is None
    # Right answers that tie exactly: the margin is without limit.
    assert evaluate.ties_score(rows[:2], [[5.0, 5.0, 1.0], [1.5, 1.0]])["margin"] == 1
    level = evaluate.ties_score(rows[:2], [[5.0, 5.0, 5.0], [1.5, 1.0]])  # a wrong one ties too
    assert level["tied_accuracy"] == level["margin"] == 0 and level["ref_accuracy"] == 1


def test_assess_and_its_subsets():
    rows = [{**row, "subset": "ab"[n % 2]} for n, row in enumerate(ROWS)]
    rows[0] = {**rows[0], "best": None, "labels": [0, 1, 0]}
    scores = [[0.0, math.log(2), 0.0], [1.0, 1.0], [7.0], [0.0, 0.0, 0.0, math.log(3)]]
    found = evaluate.assess(rows, scores)
    assert found.items() >= evaluate.metrics(rows, scores).items()
    assert found["mrr"] == pytest.approx((1 + 3 / 4 + 1 + 1) / 4)
    assert found["ndcg"] == 1 and "ties" not in found
    a, b = found["subsets"]["a"], found["subsets"]["b"]
    assert (a["n"], a["accuracy"], a["ndcg"]) == (2, 1, 1)
    assert (b["n"], b["accuracy"], b["ndcg"]) == (2, 0.75, None)
    text = evaluate.report(found, "on rows.jsonl")
    assert "\n  rank 1 " in text and "\n  rank 2 " in text
    assert "mrr:      0.938" in text and "\nsubset  groups  accuracy" in text
    assert math.isclose(json.loads(json.dumps(found))["mrr"], found["mrr"])
    both = [{**row, "source": "x"} for row in rows]  # the first of the columns there are
    assert evaluate.assess(both, scores)["subsets"].keys() == {"a", "b"}
    by_source = [{"source": "x", **row} for row in ROWS]
    assert evaluate.assess(by_source, scores)["subsets"].keys() == {"x"}


@pytest.mark.parametrize("scores", [[[1.0, 2.0, 0.0], [3.0, 1.0]], [[0.0] * 3, [0.0] * 2]])
def test_reward_pictures(tmp_path, scores):
    found = evaluate.calibration(ROWS[:2], scores)
    calibration_plot(found, tmp_path / "a.png", title="x")
    calibration_plot(evaluate.calibration(ROWS[2:3], [[1.0]]), tmp_path / "b.png")
    reward_plot(ROWS[:2], scores, tmp_path / "c.png", title="x")
    reward_plot(ROWS[2:3], [[1.0]], tmp_path / "d.png")
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_best_of_n():
    row = {"prompt": "p", "candidates": ["a", "b", "c"], "best": 2, "id": 7}
    found = evaluate.best_of_n(row, [1.0, 3.0], 2)
    assert found == {"prompt": "p", "id": 7, "candidate": "b", "score": 3.0, "chosen": 1, "of": 2}
    of_each = {name: [1, 0, 2] for name in ("labels", "ranks", "margin", "teacher_scores")}
    assert evaluate.best_of_n(row | of_each, [1.0, 3.0], 2) == found
    assert evaluate.best_of_n(row, [1.0, 1.0, 1.0], 9)["of"] == 3
    assert evaluate.best_of_n(row, None, 2)["candidate"] is None


@pytest.fixture
def saved(tmp_path, reward_model):
    model, tokenizer = reward_model
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "red", "candidates": ["green blue", "red", "blue blue red green"], "best": 0},
        {"prompt": "green", "candidates": ["red red", "blue"], "best": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder, command, *options):
    where = "--file" if command == "evaluate" else "--input"
    return cli.main(
        [command, "--model", str(folder / "model"), where, str(folder / "rows.jsonl"), *options]
    )


def test_normalised_scores_have_mean_0_and_deviation_1(saved, capsys):
    assert run(saved, "score", "--normalize") == 2
    error = capsys.readouterr().err
    assert "no reward_mean and reward_std" in error and "--fit-normalization" in error
    weights = (saved / "model" / "model.safetensors").read_bytes()
    assert run(saved, "evaluate", "--fit-normalization", "--output-dir", str(saved / "o")) == 0
    assert "written: reward_mean" in capsys.readouterr().out
    assert {p.name for p in (saved / "o").iterdir()} == {"calibration.png", "rewards.png"}
    assert (saved / "model" / "model.safetensors").read_bytes() == weights
    assert run(saved, "score") == 0
    raw = [x for line in capsys.readouterr().out.splitlines() for x in json.loads(line)["scores"]]
    config = json.loads((saved / "model" / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(sum(raw) / 5)
    assert run(saved, "score", "--normalize") == 0
    lines = capsys.readouterr().out.splitlines()
    normal = torch.tensor([x for line in lines for x in json.loads(line)["scores"]])
    assert float(normal.mean()) == pytest.approx(0, abs=1e-5)
    assert float(normal.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_best_of_on_the_command_line(saved, capsys):
    assert run(saved, "score") == 0
    scores = [json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines()]
    assert run(saved, "score", "--best-of", "2") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in (saved / "rows.jsonl").read_text().splitlines()]
    for row, s, best in zip(rows, scores, found, strict=True):
        k = evaluate.chosen(s[:2])
        assert best["candidate"] == row["candidates"][k] and best["chosen"] == k
        assert best["score"] == pytest.approx(s[k], abs=1e-5) and best["of"] == 2
        assert "candidates" not in best
    assert run(saved, "score", "--best-of", "3") == 0
    assert "1 have fewer than 3 candidates" in capsys.readouterr().err


def test_normalisation_needs_rewards_that_differ(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="standard deviation of 0"):
        evaluate.save_normalization(tmp_path, 1.0, 0.0)
    for std in (None, 0.0):
        config = BertConfig(reward_mean=1.0, reward_std=std)
        with pytest.raises(ValueError, match="no reward_mean and reward_std above 0"):
            evaluate.normalization(config)
    with pytest.raises(ValueError, match=r"with its config\.json"):
        evaluate.save_normalization(tmp_path / "no", 1.0, 1.0)
