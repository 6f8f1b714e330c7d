import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastrm.data import RaggedCollator, check_rows, read_rows, tokenize_rows
from fastrm.model import set_pad_token
from fastrm.trainer import RewardConfig, RewardTrainer, _StopOnPlateau, group_stats

from .conftest import make_decoder, make_rows, make_tokenizer


def config(folder, **options):
    """Quick and quiet: rows in order, a constant learning rate, no clipping."""
    defaults = dict(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[],
        train_sampling_strategy="sequential", lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=0, logging_steps=1, learning_rate=0.05,
    )  # fmt: skip
    return RewardConfig(**{**defaults, **options})


def trained(folder, rows, model=None, eval_rows=None, sgd=True, resume=None, **options):
    model = make_decoder() if model is None else model
    args = config(folder, **options)
    optimizers = (torch.optim.SGD(model.parameters(), lr=args.learning_rate) if sgd else None, None)
    trainer = RewardTrainer(
        model, args, rows, eval_rows, make_tokenizer(), optimizers=optimizers
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batches(rows, size, tokenizer):
    collate = RaggedCollator(tokenizer.pad_token_id, last_token=True)
    examples = tokenize_rows(tokenizer, rows, None, pairs=False)
    for i in range(0, len(examples), size):
        yield collate(examples[i : i + size])


def plain_loss(logits, batch, eps=0.0, temperature=1.0, center=0.0):
    """Sum over groups in a Python loop; knows nothing of fastrm."""
    total = logits.new_zeros(())
    sizes = batch["offsets"].diff().tolist()
    for r, b in zip(logits.split(sizes), batch["target"], strict=True):
        ce = torch.nn.functional.cross_entropy(r[None] / temperature, b[None], label_smoothing=eps)
        total = total + ce + center * (2 * r.mean()) ** 2
    return total


def plain_run(rows, size, steps, **options):
    """Plain PyTorch, one batch of `size` groups an optimiser step."""
    model, tokenizer = make_decoder().train(), make_tokenizer()
    set_pad_token(model, tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _, batch in zip(range(steps), batches(rows, size, tokenizer), strict=False):
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = plain_loss(outputs.logits[:, 0], batch, **options) / len(batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def assert_same_weights(a, b, atol=1e-6):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options, plain",
    [
        ({}, {}),
        (
            dict(temperature=2.0, label_smoothing_factor=0.1, center_rewards_coefficient=0.05),
            dict(temperature=2.0, eps=0.1, center=0.05),
        ),
    ],
    ids=["plain", "options"],
)
def test_trains_as_a_plain_loop_does(tmp_path, options, plain):
    rows = make_rows(24)
    model, losses = plain_run(rows, 8, 3, **plain)
    trainer = trained(tmp_path, rows, **options)
    assert logged(trainer) == pytest.approx(losses, abs=1e-5)
    assert_same_weights(trainer.model, model)


@pytest.mark.parametrize("micro, accumulate", [(2, 4), (3, 3)], ids=["equal", "unequal"])
def test_accumulation_changes_nothing(tmp_path, micro, accumulate):
    rows = make_rows(16 if micro == 2 else 8)
    whole = trained(tmp_path, rows)  # micro-batches of 3, 3 and 2 groups against one of 8
    cut = trained(
        tmp_path, rows, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate
    )
    assert whole.state.global_step == cut.state.global_step == len(rows) // 8
    assert_same_weights(whole.model, cut.model)
    for name in ("loss", "accuracy", "margin", "reward", "p_best"):
        assert logged(whole, name) == pytest.approx(logged(cut, name), abs=1e-5), name


RANKS = """
import os, sys
from tests.test_trainer import make_rows, trained
import torch
trainer = trained(sys.argv[1], make_rows(16), per_device_train_batch_size=int(sys.argv[3]))
if trainer.is_world_process_zero():
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save((model.state_dict(), trainer.state.log_history), sys.argv[2])
trainer.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # without the end of Python, during which gloo's threads now and then abort it
"""


def test_two_processes_change_nothing(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               script, tmp_path / "out", tmp_path / "model.pt", "4"]  # fmt: skip
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            process.terminate()  # not kill: torchrun then stops its workers
    assert process.returncode == 0, output[-3000:]
    weights, history = torch.load(tmp_path / "model.pt", weights_only=False)
    one = trained(tmp_path, make_rows(16))
    for name, p in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], p, atol=1e-6, rtol=0)
    for name in ("loss", "accuracy", "margin", "reward", "p_best"):
        both = [entry[name] for entry in history if name in entry]
        assert both == pytest.approx(logged(one, name), abs=1e-5), name


def by_hand(rewards, rows):
    """The metrics of DESIGN from lists of rewards, one group at a time."""
    loss, credit, margins, p_best = [], [], [], []
    for r, row in zip(rewards, rows, strict=True):
        best, rest = r[row["best"]], r[: row["best"]] + r[row["best"] + 1 :]
        p = math.exp(best) / sum(map(math.exp, r))
        p_best.append(p)
        loss.append(-math.log(p))
        credit.append(1 / r.count(max(r)) if best == max(r) else 0.0)
        margins += [best - max(rest)] if rest else []
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    return {
        "loss": mean(loss), "accuracy": mean(credit), "margin": mean(margins),
        "reward": mean([x for r in rewards for x in r]), "p_best": mean(p_best),
    }  # fmt: skip


def rewards_of(model, rows):
    tokenizer = make_tokenizer()
    with torch.no_grad():
        (batch,) = batches(rows, len(rows), tokenizer)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = model.eval()(**inputs).logits[:, 0]
    return [r.tolist() for r in logits.split(batch["offsets"].diff().tolist())]


def test_metrics_are_exact_over_the_window_and_over_the_evaluation_set(tmp_path):
    rows, other = make_rows(21), make_rows(13, seed=1)  # batches of 8, 8, 5 and of 8, 5
    trainer = trained(tmp_path, rows, eval_rows=other, learning_rate=0.0, logging_steps=3,
                      logging_first_step=False)  # fmt: skip
    assert len(logged(trainer)) == 1
    for prefix, data in (("", rows), ("eval_", other)):
        for name, value in by_hand(rewards_of(trainer.model, data), data).items():
            assert logged(trainer, prefix + name) == [pytest.approx(value, abs=1e-5)], name
    again = trainer.evaluate(rows, metric_key_prefix="test")
    assert again["test_accuracy"] == pytest.approx(logged(trainer, "accuracy")[0])
    assert again["test_left_out"] == again["test_prompts_cut"] == 0
    assert not any(name.startswith("eval_") for name in again)
    with pytest.raises(NotImplementedError, match="score_rows"):
        trainer.predict(rows)


def test_the_probability_of_the_best_is_that_of_the_loss(tmp_path):
    rows, other = make_rows(5), make_rows(4, seed=1)
    trainer = trained(tmp_path, rows, eval_rows=other, learning_rate=0.0, temperature=3.0)
    for prefix, data in (("", rows), ("eval_", other)):
        cooled = [[x / 3 for x in r] for r in rewards_of(trainer.model, data)]
        expected = by_hand(cooled, data)
        for name in ("loss", "p_best"):
            assert logged(trainer, prefix + name) == [pytest.approx(expected[name], abs=1e-5)]


def test_the_order_follows_the_seed_of_the_data_where_there_is_one(tmp_path):
    def order(**seeds):
        args = config(tmp_path, train_sampling_strategy="random", **seeds)
        trainer = RewardTrainer(make_decoder(), args, make_rows(40), None, make_tokenizer())
        return [batch["target"].tolist() for batch in trainer.get_train_dataloader()]

    assert order(seed=1, data_seed=2) == order(seed=2) != order(seed=1)


def test_the_last_step_is_logged_too(tmp_path):
    trainer = trained(tmp_path, make_rows(32), logging_steps=3, logging_first_step=False)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 4]


def test_the_options_passed_in_stay_as_they_are(tmp_path):
    args = config(tmp_path)
    before = args.to_dict()
    RewardTrainer(make_decoder(), args, make_rows(8), None, make_tokenizer())
    assert args.to_dict() == before and before["eval_strategy"] == "epoch"


def test_group_stats_by_hand():
    scores = torch.tensor([1.0, 1.0, 0.0, 2.0, 3.0, 5.0, 5.0, 5.0, 1.0])
    offsets = torch.tensor([0, 3, 4, 5, 8, 9])
    hard = group_stats(scores, {"offsets": offsets, "target": torch.tensor([1, 0, -100, 2, -100])})
    assert hard[:, 1].tolist() == [1, 1, 0, 1, 0]
    assert hard[:, 2].tolist() == pytest.approx([1 / 2, 1, 0, 1 / 3, 0])
    assert hard[:, 3].tolist() == [1, 0, 0, 1, 0] and hard[:, 4].tolist() == [0] * 5
    assert hard[:, 5].tolist() == [2, 2, 0, 15, 0] and hard[:, 6].tolist() == [3, 1, 0, 3, 0]
    assert hard[0, 7].item() == pytest.approx(math.e / (2 * math.e + 1))
    soft = torch.tensor([0.5, 0.0, 0.5, 1.0, 1.0, 0.2, 0.4, 0.4, 1.0])
    stats = group_stats(scores, {"offsets": offsets, "target": soft})
    assert stats[:, 2].tolist() == pytest.approx([1 / 2, 1, 1, 2 / 3, 1])
    assert stats[0, 7].item() == pytest.approx((math.e + 1) / (2 * math.e + 1))


def test_soft_labels_margins_and_weights_reach_the_loss(tmp_path):
    rows = [
        {"prompt": "p", "candidates": ["a", "b b", "c"], "labels": [1, 0, 3], "margin": 0.5},
        {"prompt": "q", "candidates": ["a", "b b"], "best": 1, "weight": 2.0, "margin": [1, 2]},
    ]
    trainer = trained(tmp_path, rows, learning_rate=0.0)
    (a, b) = (torch.tensor(r, dtype=torch.float64) for r in rewards_of(trainer.model, rows))
    q = torch.tensor([0.25, 0, 0.75], dtype=torch.float64)
    first = -(q * torch.log_softmax(a + torch.tensor([0, 0.5, 0]), 0)).sum()
    second = -2 * torch.log_softmax(b + torch.tensor([1, 0]), 0)[1]
    assert logged(trainer) == [pytest.approx(float(first + second) / 2, abs=1e-5)]


def ranked_rows():
    return [
        {"prompt": "p", "candidates": ["a", "b b", "c", "d"], "ranks": [1, 0, -1, 1]},
        {"prompt": "q", "candidates": ["a", "b b", "c"], "best": 1, "margin": [1, 2, 3]},
        {"prompt": "r", "candidates": ["a", "b b"], "labels": [1, 3]},
    ]


@pytest.mark.parametrize("max_tokens", [None, 8])  # the second: groups in chunks
@pytest.mark.parametrize("loss", ["plackett_luce", "bradley_terry"])
def test_losses_of_a_ranking(tmp_path, loss, max_tokens):
    """Rows without ranks have those of their best or their labels."""
    model = make_decoder().double()
    trainer = trained(
        tmp_path, ranked_rows(), model, loss=loss, learning_rate=0.0, temperature=0.7,
        per_device_train_batch_size=3, max_tokens_per_batch=max_tokens,
        gradient_accumulation_steps=1 if max_tokens is None else 3,
    )  # fmt: skip
    groups = rewards_of(trainer.model, ranked_rows())
    pairs = [[(1, 0), (1, 3), (1, 2), (0, 2), (3, 2)], [(1, 0), (1, 2)], [(1, 0)]]
    last = [[(1, (0, 1, 2, 3)), (0, (0, 2, 3)), (3, (0, 2, 3))], [(1, (0, 1, 2))], [(1, (0, 1))]]
    margins = [[0] * 4, [1, 2, 3], [0, 0]]
    total = 0.0
    for r, won, chosen, m in zip(groups, pairs, last, margins, strict=True):
        z = torch.tensor(r, dtype=torch.float64) / 0.7
        if loss == "bradley_terry":
            terms = [-torch.nn.functional.logsigmoid(z[i] - z[j] - m[j] / 0.7) for i, j in won]
            total += float(sum(terms)) / len(terms)
        else:
            total += float(sum(torch.logsumexp(z[list(js)], 0) - z[i] for i, js in chosen))
    assert logged(trainer) == [pytest.approx(total / 3, abs=1e-5)]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_evaluation_in_chunks_has_the_same_metrics(tmp_path, layout):
    """Of whole small groups and of parts of a large one, each within the limit."""
    rows = make_rows(9, seed=3, sizes=(1, 2, 3)) + make_rows(1, seed=4, sizes=(20,))
    found, most = [], 10**6
    for limit in (None, 90):
        trainer = trained(
            tmp_path, ranked_rows(), make_decoder().double(), rows, layout=layout,
            learning_rate=0.0, per_device_eval_batch_size=5, max_tokens_per_batch=limit,
        )  # fmt: skip
        calls = []
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda _, ids: calls.append(ids[0].numel()))  # noqa: B023
        collate = trainer.data_collator
        found.append(trainer.evaluate())
        assert trainer.data_collator is collate  # not that of the chunks
        if limit is not None:
            assert len(calls) > 2 * -(-len(rows) // 5)
            if layout == "shared":  # else the padding comes on top
                assert max(calls) <= limit < most
        most = max(calls)
    names = [n for n in found[0] if "runtime" not in n and "per_second" not in n]
    assert len(names) > 5
    assert [found[1][n] for n in names] == pytest.approx([found[0][n] for n in names], abs=1e-6)


def test_chunks_of_a_ranking_give_the_same_weights(tmp_path):
    runs = [
        trained(tmp_path, ranked_rows(), make_decoder().double(), loss="plackett_luce",
                per_device_train_batch_size=1, max_tokens_per_batch=n).model
        for n in (None, 8)
    ]  # fmt: skip
    assert_same_weights(*runs, atol=1e-7)  # its RMSNorm rounds to fp32


def test_distillation_learns_from_a_teacher(tmp_path):
    rows = [
        {"prompt": "p", "candidates": ["a", "b b", "c"], "best": 0, "teacher_scores": [1, 2, 0.5]}
    ]
    trainer = trained(tmp_path, rows, learning_rate=0.0, distillation_coef=0.6)
    z = torch.tensor(rewards_of(trainer.model, rows)[0], dtype=torch.float64)
    q = torch.tensor([1, 2, 0.5], dtype=torch.float64).softmax(0)
    expected = -z.log_softmax(0)[0] - 0.6 * (q * z.log_softmax(0)).sum()
    assert logged(trainer) == [pytest.approx(float(expected), abs=1e-5)]
    plain = trained(tmp_path, rows, learning_rate=0.0)
    assert logged(plain) == [pytest.approx(float(-z.log_softmax(0)[0]), abs=1e-5)]
    with pytest.raises(ValueError, match="distillation_coef needs rows with teacher_scores"):
        trained(tmp_path, ranked_rows(), distillation_coef=0.6)


def test_backends_give_the_same_curve(tmp_path):
    from fastrm import backends

    try:
        backends.choose("cpu", "cpp")
    except RuntimeError as e:
        pytest.skip(str(e))
    options = dict(sgd=False, learning_rate=1e-3, max_steps=20, num_train_epochs=5)
    curves = [
        logged(trained(tmp_path, make_rows(64), backend=backend, **options))
        for backend in ("cpp", "torch")
    ]
    assert len(curves[0]) == 20 and curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_resume_continues_to_the_bit(tmp_path):
    options = dict(
        sgd=False, learning_rate=1e-3, train_sampling_strategy="random", disable_dropout=False,
        num_train_epochs=2, save_strategy="steps", save_steps=5, lr_scheduler_type="linear",
    )  # fmt: skip
    rows = make_rows(64)
    whole = trained(tmp_path, rows, make_decoder("gpt2", dropout=0.1), **options)
    assert whole.state.global_step == 16
    resumed = trained(
        tmp_path, rows, make_decoder("gpt2", seed=1, dropout=0.1),
        resume=str(tmp_path / "checkpoint-5"), **options,
    )  # fmt: skip
    assert_same_weights(resumed.model, whole.model, atol=0)
    assert logged(resumed) == logged(whole)


def test_dropout_is_off_unless_asked_for(tmp_path):
    rows = make_rows(16)
    plain = trained(tmp_path, rows, make_decoder("gpt2"))
    off = trained(tmp_path, rows, make_decoder("gpt2", dropout=0.3))
    on = trained(tmp_path, rows, make_decoder("gpt2", dropout=0.3), disable_dropout=False)
    assert_same_weights(plain.model, off.model, atol=0)
    assert not torch.equal(plain.model.score.weight, on.model.score.weight)


@pytest.mark.parametrize("with_eval", [False, True])
def test_stops_on_a_plateau(tmp_path, with_eval):
    rows = make_rows(8)
    options = dict(num_train_epochs=50, early_stopping_patience=3)
    eval_rows = rows if with_eval else None
    flat = trained(tmp_path, rows, eval_rows=eval_rows, learning_rate=0.0, **options)
    assert flat.state.global_step == 4  # one step sets the mark, three bring nothing
    falling = trained(
        tmp_path, rows, eval_rows=eval_rows, learning_rate=1e-3, **options | {"num_train_epochs": 9}
    )
    assert falling.state.global_step == 9
    small = dict(learning_rate=1e-3, early_stopping_threshold=10.0)
    assert trained(tmp_path, rows, eval_rows=eval_rows, **options, **small).state.global_step == 4


@pytest.mark.parametrize("losses, stops", [
    ([3, 2, 3], False), ([3, 3, 2], False), ([3, 3, 3], True), ([2, 3, 2.5, 2.1], True),
    ([3, 2], False), ([3, 2.95, 2.9], True), ([3, 2.95, 2.8], False),
])  # fmt: skip
def test_a_plateau_is_two_logs_without_an_improvement(losses, stops):
    state = TrainerState(log_history=[{"loss": x} for x in losses])
    control = TrainerControl()
    _StopOnPlateau(patience=2, threshold=0.1).on_log(None, state, control)
    assert control.should_training_stop == stops


def test_a_path_is_enough_and_the_seed_decides(tmp_path):
    make_decoder().model.save_pretrained(tmp_path / "a")  # a backbone without a head
    make_tokenizer().save_pretrained(tmp_path / "a")
    runs = []
    for seed in (1, 1, 2):
        args = config(tmp_path / "out", seed=seed)
        trainer = RewardTrainer(str(tmp_path / "a"), args, make_rows(8))
        trainer.train()
        runs.append(trainer)
    assert runs[0].processing_class.pad_token == "<pad>"
    assert_same_weights(runs[0].model, runs[1].model, atol=0)
    assert not torch.equal(runs[0].model.score.weight, runs[2].model.score.weight)
    runs[0].save_model(str(tmp_path / "b"))
    again = RewardTrainer(str(tmp_path / "b"), args, eval_dataset=make_rows(8))
    assert again.evaluate()["eval_loss"] == pytest.approx(
        RewardTrainer(runs[0].model, args).evaluate(make_rows(8))["eval_loss"], abs=1e-6
    )


def test_says_what_it_trains(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    rows = make_rows(6)
    rows[1]["candidates"] = ["word " * 300] * 5
    rows[2]["prompt"] = "word " * 300
    with caplog.at_level("INFO", logger="fastrm"):
        RewardTrainer(make_decoder(), config(tmp_path), datasets.Dataset.from_list(rows), None,
                      make_tokenizer())  # fmt: skip
    (line,) = [r.getMessage() for r in caplog.records if "training" in r.getMessage()]
    K = sum(len(r["candidates"]) for i, r in enumerate(rows) if i != 1)
    for part in (f"5 groups, {K} candidates", "1 prompts cut at the left to 128 tokens",
                 "1 groups left out", "layout shared", "0.0M parameters"):  # fmt: skip
        assert part in line
    with pytest.raises(ValueError, match="eval_dataset: no group is left"):
        RewardTrainer(make_decoder(), config(tmp_path), rows, [rows[1]], make_tokenizer())
    with pytest.raises(ValueError, match="train_dataset row 1: column 'best'"):
        unlabelled = {"prompt": "", "candidates": ["a"]}
        RewardTrainer(
            make_decoder(), config(tmp_path), [rows[0], unlabelled], None, make_tokenizer()
        )


def test_what_cannot_be_trained_is_said_before_the_first_step(tmp_path, caplog):
    rows = make_rows(4)
    with pytest.raises(TypeError, match="args must be a fastrm.RewardConfig, got TrainingArgum"):
        RewardTrainer(make_decoder(), TrainingArguments(str(tmp_path)), rows)
    with pytest.raises(ValueError, match="processing_class must be the model's tokenizer"):
        RewardTrainer(make_decoder(), config(tmp_path), rows)
    taught = [{**row, "teacher_scores": [0.0] * len(row["candidates"])} for row in rows]
    distils = config(tmp_path, distillation_coef=1.0)
    with pytest.raises(ValueError, match="eval_dataset has 4 without, the first is row 0"):
        RewardTrainer(make_decoder(), distils, taught, rows, make_tokenizer())
    RewardTrainer(make_decoder(), distils, taught, taught, make_tokenizer())
    with pytest.raises(ValueError, match="metric_for_best_model must be one of loss, accuracy"):
        RewardTrainer(make_decoder(), config(tmp_path, metric_for_best_model="eval_acc"), rows,
                      rows, make_tokenizer())  # fmt: skip
    stops = config(tmp_path, early_stopping_patience=1, eval_strategy="epoch")
    with pytest.raises(ValueError, match="one of easy_loss, .*, hard_loss, .*, got 'loss'"):
        sets = {"easy": rows, "hard": rows}
        RewardTrainer(make_decoder(), stops, rows, sets, make_tokenizer())
    stops.metric_for_best_model = "hard_loss"
    RewardTrainer(make_decoder(), stops, rows, sets, make_tokenizer())
    wide = make_tokenizer()
    wide.add_tokens(["eight"])
    with pytest.raises(ValueError, match="train_dataset: the tokenizer gives token 300, and"):
        RewardTrainer(make_decoder(), config(tmp_path), rows, None, wide)
    flexible = make_decoder(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="flex_attention trains on a GPU only"):
        RewardTrainer(flexible, config(tmp_path), rows, None, make_tokenizer())
    RewardTrainer(flexible, config(tmp_path), None, rows, make_tokenizer())
    for loss, warns in (("plackett_luce", True), ("bradley_terry", False)):
        caplog.clear()
        args = config(tmp_path, loss=loss)
        RewardTrainer(make_decoder(), args, [{**rows[0], "margin": 1.0}], None, make_tokenizer())
        assert ("takes no margin" in caplog.text) == warns


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(temperature=0.0), "temperature must be a finite number above 0, got 0.0"),
        (dict(center_rewards_coefficient=-1.0), "center_rewards_coefficient must"),
        (dict(label_smoothing_factor=1.5), "label_smoothing_factor must be from 0 to 1"),
        (dict(max_length=0), "max_length must be above 0"),
        (dict(learning_rate=-1e-5), "learning_rate must be 0 or more, got -1e-05"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size must be above 0"),
        (dict(per_device_eval_batch_size=0), "per_device_eval_batch_size must be above 0"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be above 0"),
        (dict(seed=-1), "seed must be from 0 to 2^32 - 1, got -1"),
        (dict(max_steps=-2), "max_steps must be above 0, or -1 for epochs, got -2"),
        (dict(num_train_epochs=0), "num_train_epochs must be above 0"),
        (dict(model_dtype="int8"), "model_dtype must be auto, float32, bfloat16 or float16"),
        (dict(distillation_coef=-1.0), "distillation_coef must be a finite number, 0 or more"),
        (dict(early_stopping_threshold=-0.1), "early_stopping_threshold must be 0 or more"),
        (dict(loss="hinge"), "loss must be one of listwise, plackett_luce, bradley_terry"),
        (dict(loss="plackett_luce", distillation_coef=1.0), "distillation_coef must be 0"),
        (dict(layout="tree"), "layout must be one of auto, padded, split, packed, shared, cached"),
        (dict(backend="cuda"), "backend must be one of triton, cpp, torch, got 'cuda'"),
        (dict(early_stopping_patience=0), "early_stopping_patience must be above 0"),
        (dict(remove_unused_columns=True), "remove_unused_columns must be False"),
        (dict(train_sampling_strategy="group_by_length"), "train_sampling_strategy must be random"),
        (dict(bf16_full_eval=True), "bf16_full_eval must be False"),
        (dict(accelerator_config={"dispatch_batches": True}), "dispatch_batches must not be set"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_config_refuses_what_cannot_work(tmp_path, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        config(tmp_path, **options)


def test_every_option_is_documented():
    from dataclasses import fields

    ours = set(RewardConfig.__annotations__)
    assert {"max_length", "temperature", "backend"} <= ours
    assert all(f.metadata.get("help") for f in fields(RewardConfig) if f.name in ours)


@pytest.mark.slow
def test_minilm_learns_truthfulqa(tmp_path, minilm, data_file):
    train = read_rows(data_file("truthfulqa_mc1.train.jsonl"))
    test = read_rows(data_file("truthfulqa_mc1.test.jsonl"))
    args = RewardConfig(str(tmp_path), num_train_epochs=2, learning_rate=5e-5, seed=3,
                        per_device_train_batch_size=8, save_strategy="no")  # fmt: skip
    trainer = RewardTrainer(minilm, args, train, test)
    trainer.train()
    assert logged(trainer, "eval_accuracy")[-1] >= 0.70
    assert len(check_rows(test)) == 154


@pytest.mark.slow
def test_smollm2_loss_falls(tmp_path, smollm2, data_file):
    rows = read_rows(data_file("truthfulqa_mc1.train.jsonl"))[:16]
    args = RewardConfig(str(tmp_path), max_steps=8, learning_rate=3e-5, seed=3, logging_steps=1,
                        per_device_train_batch_size=4, save_strategy="no")  # fmt: skip
    trainer = RewardTrainer(smollm2, args, rows)
    trainer.train()
    losses = logged(trainer)
    assert sum(losses[4:]) < 0.8 * sum(losses[:4]), losses
