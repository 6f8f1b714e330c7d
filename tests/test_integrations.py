"""fastrm inside other libraries' trainers, held to those libraries' own numbers."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fastrm
from fastrm import cli
from fastrm.evaluate import score_rows
from fastrm.model import load_reward_model

from .conftest import TEXT, make_decoder, make_rows, make_tokenizer

CHAT = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
HEAD = "base_model.model.score.weight"


def logged(trainer, name="loss"):
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])


def reward_groups(rewards, K):
    """Rewards (M,) of groups of sizes K."""
    return rewards.split(list(K))


# TRL


@pytest.fixture
def trl():
    pytest.importorskip("datasets", reason="datasets is not installed")
    return pytest.importorskip("trl", reason="trl is not installed")


def preference_rows(n, most=1, seed=0):
    """Rows of TRL with lists of 1 to `most` rejected answers."""
    rng = random.Random(seed)

    def words(least, most):
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(least, most)))

    return [
        {
            "prompt": words(1, 12) + " ",
            "chosen": words(1, 9) + " eight",
            "rejected": [words(1, 9) for _ in range(rng.randint(1, most))],
        }
        for _ in range(n)
    ]


def trl_trainer(cls, folder, rows, eval_rows=None, model=None, peft_config=None, pad="<pad>", **o):
    from datasets import Dataset
    from trl import RewardConfig

    defaults = dict(
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", report_to=[],
        logging_steps=1, per_device_train_batch_size=4, learning_rate=5e-4,
    )  # fmt: skip
    return cls(
        make_decoder() if model is None else model,
        RewardConfig(str(folder), **{**defaults, **o}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=make_tokenizer(pad=pad, template=CHAT),
        peft_config=peft_config,
    )


def listwise_trainer(*args, **options):
    from fastrm.integrations.trl import ListwiseRewardTrainer

    return trl_trainer(ListwiseRewardTrainer, *args, **options)


@pytest.mark.parametrize("with_options", [False, True])
def test_trl_pairs_give_its_own_curve_and_logs(trl, tmp_path, with_options):
    rows, options = preference_rows(40), {}
    if with_options:
        options = {"center_rewards_coefficient": 0.1, "pad_to_multiple_of": 8}
        rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(rows)]
    pairs = [{**row, "rejected": row["rejected"][0]} for row in rows]
    theirs = trl_trainer(trl.RewardTrainer, tmp_path, pairs, max_steps=20, **options)
    as_pairs = listwise_trainer(tmp_path, pairs, max_steps=20, **options)
    as_lists = listwise_trainer(tmp_path, rows, max_steps=20, **options)
    for trainer in (theirs, as_pairs, as_lists):
        trainer.train()
    assert len(logged(theirs)) == 20 and logged(theirs)[-5:].mean() < 0.7 * logged(theirs)[0]
    names = ["loss", "grad_norm", "num_tokens", "min_reward", "mean_reward", "max_reward",
             "accuracy", "margin"]  # fmt: skip
    for trainer in (as_pairs, as_lists):
        for name in names:
            want = logged(theirs, name)
            error = (logged(trainer, name) - want).abs().max()
            assert error <= 1e-4 * want.abs().max().clamp(min=1), name


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_trl_groups_are_cross_entropy_of_the_models_own_rewards(trl, tmp_path, pad):
    rows, model = preference_rows(7, most=5), make_decoder()
    for i, row in enumerate(rows):
        row["margin"] = [0.1 * i * k for k in range(len(row["rejected"]))]
    trainer = listwise_trainer(tmp_path, rows, model=model, pad=pad,
                               center_rewards_coefficient=0.3)  # fmt: skip
    examples = list(trainer.train_dataset)
    batch = trainer.data_collator(examples)
    K = batch["offsets"].diff().tolist()
    assert K == [1 + len(row["rejected"]) for row in rows] and len(set(K)) > 2

    rewards = model(batch["input_ids"], batch["attention_mask"]).logits.squeeze(-1)  # pools itself
    losses = []
    for r, row in zip(reward_groups(rewards, K), rows, strict=True):
        logits = torch.cat([r[:1], r[1:] + torch.tensor(row["margin"])])
        losses.append(F.cross_entropy(logits, torch.tensor(0)) + 0.3 * (2 * r.mean()) ** 2)
    want = torch.stack(losses).mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    want_gradients = torch.autograd.grad(want, parameters)

    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    torch.testing.assert_close(outputs["rewards"], rewards.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(loss, parameters), want_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=2, max_size=5),
        min_size=1, max_size=5,
    ),
    multiple=st.sampled_from([None, 4]),
)  # fmt: skip
def test_trl_rows_are_the_last_tokens_that_are_not_padding(groups, multiple):
    pytest.importorskip("trl", reason="trl is not installed")
    from fastrm.integrations.trl import GroupCollator

    rows = [{"chosen_ids": g[0], "rejected_ids": g[1:]} for g in groups]
    batch = GroupCollator(0, multiple)(rows)
    flat = [ids for group in groups for ids in group]
    S = batch["input_ids"].shape[1]
    assert S % (multiple or 1) == 0
    assert batch["offsets"].diff().tolist() == [len(g) for g in groups]
    for i, ids in enumerate(flat):
        at = int(batch["rows"][i]) - i * S
        nonzero = [k for k, t in enumerate(ids) if t != 0]
        assert at == (nonzero[-1] if nonzero else 0)
        assert batch["input_ids"][i, : at + 1].tolist() == ids[: at + 1]
        assert batch["input_ids"][i, at + 1 :].eq(0).all()
        assert batch["attention_mask"][i].tolist() == [1] * (at + 1) + [0] * (S - at - 1)


def test_trl_micro_batches_and_an_uneven_last_one_change_nothing(trl, tmp_path):
    rows = preference_rows(5, most=4)
    weights = []
    for size, accumulated in ((5, 1), (2, 3)):  # 5 groups; 2 + 2 + 1 groups
        trainer = listwise_trainer(
            tmp_path, rows, max_steps=1, optim="sgd", lr_scheduler_type="constant",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            max_grad_norm=0, learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in make_decoder().parameters()])
    assert (weights[0] - start).abs().max() > 1e-2
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_trl_evaluation_is_the_mean_over_groups(trl, tmp_path):
    rows, model = preference_rows(7, most=5, seed=1), make_decoder()
    trainer = listwise_trainer(
        tmp_path, rows, rows, model=model, per_device_eval_batch_size=3
    )  # 3 + 3 + 1 groups
    model.eval()
    tokenizer = trainer.processing_class
    losses, accurate = [], []
    for row in rows:
        texts = [row["prompt"] + c + "<eos>" for c in (row["chosen"], *row["rejected"])]
        r = torch.cat([model(**_ids(tokenizer, t)).logits.flatten() for t in texts]).detach()
        losses.append(F.cross_entropy(r, torch.tensor(0)))
        accurate.append(float(r[0] > r[1:].max()))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == found["eval_loss"]
    counts = [3, 3, 1]
    means = [sum(a) / n for a, n in zip((accurate[:3], accurate[3:6], accurate[6:]), counts,
                                        strict=True)]  # fmt: skip
    # The trainer's metrics are means over batches, as in TRL.
    assert logged(trainer, "eval_accuracy")[0] == pytest.approx(sum(means) / 3)


def _ids(tokenizer, text):
    return {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}


def test_trl_messages_tools_and_long_rows(trl, tmp_path):
    def say(role, content):
        return [{"role": role, "content": content}]

    row = {"prompt": say("user", "legs?"), "chosen": say("assistant", "eight"),
           "rejected": [say("assistant", "six"), say("assistant", "none " * 30)]}  # fmt: skip
    short = {**row, "rejected": row["rejected"][:1]}
    pair = {**row, "rejected": row["rejected"][0]}
    theirs = trl_trainer(trl.RewardTrainer, tmp_path, [pair]).train_dataset[0]
    ours = listwise_trainer(tmp_path, [row, short], max_length=40).train_dataset
    assert len(ours) == 1  # the other has a candidate of more than 40 tokens
    assert ours[0]["chosen_ids"] == theirs["chosen_ids"]
    assert ours[0]["rejected_ids"] == [theirs["rejected_ids"]]
    assert len(listwise_trainer(tmp_path, [row, short], max_length=None).train_dataset) == 2


def test_trl_with_lora_trains_and_saves_the_head(trl, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import load_file

    model = make_decoder()
    before = model.score.weight.detach().clone()
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["score"],
                           target_modules=["q_proj", "v_proj"])  # fmt: skip
    trainer = listwise_trainer(tmp_path, preference_rows(16, 3), model=model, peft_config=lora,
                               learning_rate=1e-2)  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")[HEAD]
    assert torch.equal(saved, trainer.head.weight.detach())
    assert (saved - before).abs().max() > 1e-3


RANK = """
import os
import sys
sys.path.insert(0, sys.argv[1])  # examples/
import json
from pathlib import Path
from datasets import Dataset
from toy import make_model, make_rows, make_tokenizer
from trl import RewardConfig
from fastrm.integrations.trl import ListwiseRewardTrainer

def preference(row):
    rejected = list(row["candidates"])
    chosen = rejected.pop(row["best"])
    return {"prompt": row["prompt"] + " ", "chosen": chosen, "rejected": rejected}

rows = Dataset.from_list([preference(r) for r in make_rows(32)])
trainer = ListwiseRewardTrainer(
    make_model(),
    RewardConfig(sys.argv[2], per_device_train_batch_size=int(sys.argv[3]), max_steps=6,
                 learning_rate=3e-3, use_cpu=True, bf16=False, logging_steps=1, report_to="none",
                 per_device_eval_batch_size=int(sys.argv[3]), eval_strategy="steps", eval_steps=6,
                 save_strategy="no", disable_tqdm=True),
    train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer(),
)
trainer.train()
if trainer.is_world_process_zero():
    Path(sys.argv[2], "history.json").write_text(json.dumps(trainer.state.log_history))
if trainer.accelerator.num_processes > 1:
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # without the end of Python, during which gloo's threads now and then abort it
"""


def test_trl_on_two_processes_is_the_same(trl, tmp_path, monkeypatch):
    script, folders = tmp_path / "rank.py", [tmp_path / "one", tmp_path / "two"]
    script.write_text(RANK)
    for folder in folders:
        folder.mkdir()
    examples = str(Path(__file__).parents[1] / "examples")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setattr(sys, "argv", [str(script), examples, str(folders[0]), "8"])
    runpy.run_path(str(script))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), examples, str(folders[1]), "4"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = [json.loads((folder / "history.json").read_text()) for folder in folders]
    steps = [[log for log in history if "loss" in log] for history in found]
    assert len(steps[0]) == len(steps[1]) == 6
    for one, two in zip(*steps, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward",
                     "max_reward", "num_tokens"):  # fmt: skip
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    evals = [next(log for log in history if "eval_loss" in log) for history in found]
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert evals[1][name] == pytest.approx(evals[0][name], rel=1e-4), name


def test_trl_refuses_what_groups_cannot_bring(trl, tmp_path):
    from fastrm.integrations.trl import GroupCollator, ListwiseRewardTrainer

    row = {"chosen_ids": [1], "rejected_ids": [[2], [3]], "margin": [1.0]}
    with pytest.raises(ValueError, match=r"margin must be a number, or 2, .* got \[1.0\]"):
        GroupCollator(0)([row])
    with pytest.raises(NotImplementedError, match="score_rows"):
        listwise_trainer(tmp_path, preference_rows(2)).predict(None)
    with pytest.raises(ValueError, match="compute_metrics must be None"):
        ListwiseRewardTrainer(make_decoder(), compute_metrics=lambda prediction: {})


# sentence-transformers


def make_cross_encoder(folder, num_labels=1):
    from sentence_transformers.cross_encoder import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_labels=num_labels, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():  # the usual start makes scores too equal for their target to matter
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu")


def labelled(rows, grades=False):
    rng, K = random.Random(1), [len(r["candidates"]) for r in rows]
    if grades:
        labels = [[rng.randint(0, 3) for _ in range(n)] for n in K]
    else:
        labels = [[int(k == r["best"]) for k in range(n)] for r, n in zip(rows, K, strict=True)]
    return {"query": [r["prompt"] for r in rows], "docs": [r["candidates"] for r in rows],
            "labels": labels}  # fmt: skip


def reranker(folder, loss, data, **options):
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )

    defaults = dict(
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, learning_rate=2e-3,
    )  # fmt: skip
    extra = {name: options.pop(name) for name in ("evaluator", "eval_dataset") if name in options}
    if "eval_dataset" in extra:
        extra["eval_dataset"] = Dataset.from_dict(extra["eval_dataset"])
    return CrossEncoderTrainer(
        model=loss.model, loss=loss, train_dataset=Dataset.from_dict(data),
        args=CrossEncoderTrainingArguments(str(folder / "out"), **{**defaults, **options}), **extra,
    )  # fmt: skip


@pytest.fixture
def sentence_transformers():
    name = "sentence_transformers"
    return pytest.importorskip(name, reason="sentence-transformers is not installed")


def test_listnet_curve_is_that_of_sentence_transformers(sentence_transformers, tmp_path):
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    from fastrm.integrations.sentence_transformers import ListwiseLoss

    data = labelled(make_rows(80), grades=True)
    curves = []
    for make in (ListNetLoss, ListwiseLoss):
        loss = make(make_cross_encoder(tmp_path))
        trainer = reranker(tmp_path, loss, data, max_steps=20)
        trainer.train()
        curves.append(logged(trainer))
    assert len(curves[0]) == 20 and curves[0].std() > 0.01
    assert (curves[0] - curves[1]).abs().max() <= 1e-4


def test_labels_as_shares_are_the_cross_entropy_with_them(sentence_transformers, tmp_path):
    from fastrm.integrations.sentence_transformers import ListwiseLoss

    model = make_cross_encoder(tmp_path).train()
    rows = make_rows(6, sizes=(1, 2, 4))
    labels = [torch.tensor([float(k == r["best"]) + 0.5 for k in range(len(r["candidates"]))])
              for r in rows]  # fmt: skip
    loss = ListwiseLoss(model, target=fastrm.target_from_labels, temperature=2.0)
    inputs = [[r["prompt"] for r in rows], [r["candidates"] for r in rows]]
    got = loss(inputs, labels)
    want = []
    for r, label in zip(rows, labels, strict=True):
        features = model.preprocess([(r["prompt"], c) for c in r["candidates"]])
        scores = model(features)["scores"].view(-1) / 2.0
        want.append(-(label / label.sum() * scores.log_softmax(0)).sum())
    torch.testing.assert_close(got, torch.stack(want).mean(), rtol=1e-5, atol=1e-6)
    got.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reranking_evaluator_and_model_card_work(sentence_transformers, tmp_path):
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    from fastrm.integrations.sentence_transformers import ListwiseLoss

    rows, held_out = make_rows(64), make_rows(16, seed=1, sizes=(3, 4, 5))
    evaluator = CrossEncoderRerankingEvaluator(
        [{"query": r["prompt"], "positive": [r["candidates"][r["best"]]],
          "documents": r["candidates"]} for r in held_out],
        show_progress_bar=False, write_csv=False,
    )  # fmt: skip
    model = make_cross_encoder(tmp_path)
    before = evaluator(model)["map"]
    trainer = reranker(
        tmp_path,
        ListwiseLoss(model, target=fastrm.target_from_labels, label_smoothing=0.1),
        labelled(rows), evaluator=evaluator, eval_dataset=labelled(held_out), learning_rate=5e-3,
        eval_strategy="steps", eval_steps=30, max_steps=60,
    )  # fmt: skip
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2 and len(logged(trainer, "eval_map")) == 2
    assert logged(trainer, "eval_loss")[-1] < logged(trainer, "eval_loss")[0]
    assert evaluator(model)["map"] > before + 0.1
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "ListwiseLoss" in card and "target_from_labels" in card and "label_smoothing" in card


def test_an_encoder_of_fastrm_has_the_same_rewards_in_a_cross_encoder(
    sentence_transformers, tmp_path
):
    from sentence_transformers.cross_encoder import CrossEncoder

    make_cross_encoder(tmp_path / "base")
    args = fastrm.RewardConfig(str(tmp_path / "out"), use_cpu=True, max_steps=3, report_to=[],
                               save_strategy="no", learning_rate=1e-2)  # fmt: skip
    trainer = fastrm.RewardTrainer(str(tmp_path / "base"), args, make_rows(24))
    trainer.train()
    trainer.save_model()
    rows = make_rows(6, seed=1)
    want = flat(score_rows(trainer.model, trainer.processing_class, rows))
    pairs = [(r["prompt"], c) for r in rows for c in r["candidates"]]
    got = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(
        pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_listwise_loss_says_what_does_not_fit(sentence_transformers, tmp_path):
    from fastrm.integrations.sentence_transformers import ListwiseLoss

    with pytest.raises(ValueError, match="model must have num_labels=1, got num_labels=2"):
        ListwiseLoss(make_cross_encoder(tmp_path / "two", num_labels=2))
    loss = ListwiseLoss(make_cross_encoder(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"labels must be one a document, \[2\].*got \[1\]"):
        loss([["q"], [["a", "b"]]], [torch.tensor([1.0])])
    with pytest.raises(ValueError, match=r"labels must be one a document.*got one a query"):
        loss([["q"], [["a", "b"]]], torch.tensor([1.0]))
    with pytest.raises(ValueError, match="inputs must be queries and lists of documents, got 3"):
        loss([["q"], [["a"]], [["b"]]], [torch.tensor([1.0])])


# PEFT, quantised backbones, 8-bit optimisers: fastrm.RewardTrainer


def lora_model(base, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    defaults = dict(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"],
                    modules_to_save=["score"])  # fmt: skip
    return peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **options}))


def train_lora(folder, model, rows=None, resume=None, **options):
    defaults = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[],
                    logging_steps=1, learning_rate=1e-2, num_train_epochs=3)  # fmt: skip
    trainer = fastrm.RewardTrainer(
        model, fastrm.RewardConfig(str(folder), **{**defaults, **options}), rows or make_rows(24),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(groups):
    return torch.tensor([r for group in groups for r in group])


def backbone(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_round_trip_keeps_rewards_and_the_trained_head(tmp_path, dtype):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import load_file

    tokenizer = make_tokenizer()
    make_decoder().to(dtype).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def base():
        return load_reward_model(str(tmp_path / "base"), dtype=dtype)

    model = lora_model(base())
    head_before, frozen = base().score.weight.detach(), backbone(model)
    trainer = train_lora(tmp_path / "out", model)
    assert logged(trainer)[-3:].mean() < 0.8 * logged(trainer)[:3].mean()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved[HEAD], trainer.head.weight.detach())
    assert (saved[HEAD] - head_before).abs().max() > 1e-3

    rows = make_rows(8, seed=1)
    want = flat(score_rows(model, tokenizer, rows, layout="padded"))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    got = flat(score_rows(loaded, tokenizer, rows, layout="padded"))
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    if dtype == torch.float32:  # merging rounds the sum of backbone and adapter to its dtype
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        adapter, scored = str(tmp_path / "adapter"), tmp_path / "scored.jsonl"
        assert cli.main(["score", "--model", adapter, "--input", str(tmp_path / "rows.jsonl"),
                         "--output", str(scored)]) == 0  # fmt: skip
        got = flat(json.loads(line)["scores"] for line in scored.read_text().splitlines())
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert cli.main(["verify", "--model", adapter]) == 2  # other readers load no adapter
        assert cli.main(["data", "check", str(tmp_path / "rows.jsonl"), "--model", adapter]) == 0
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        for m in (merged, load_reward_model(str(tmp_path / "merged"))):
            got = flat(score_rows(m, tokenizer, rows, layout="padded"))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_task_type_alone_makes_the_head_train(tmp_path):
    model = lora_model(make_decoder(), modules_to_save=None)
    before = make_decoder().score.weight.detach()
    trainer = train_lora(tmp_path, model, max_steps=3)
    assert trainer.head.weight.requires_grad
    assert (trainer.head.weight.detach() - before).abs().max() > 1e-3


def test_lora_training_resumes_where_it_stopped(tmp_path):
    options = dict(save_strategy="steps", save_steps=4, max_steps=8)
    whole = train_lora(tmp_path / "out", lora_model(make_decoder()), **options)
    again = train_lora(tmp_path / "again", lora_model(make_decoder()), **options,
                       resume=str(tmp_path / "out" / "checkpoint-4"))  # fmt: skip
    torch.testing.assert_close(logged(again)[-4:], logged(whole)[-4:], rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(
        whole.model.named_parameters(), again.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_backbone_in_4_bits_with_an_8_bit_optimiser(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    make_decoder().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score"],
        ),
    )  # fmt: skip
    model = lora_model(base, r=128)  # bitsandbytes keeps 32 bits for what has below 4096 numbers
    frozen = backbone(model)
    assert any(p.dtype == torch.uint8 for p in frozen.values())
    trainer = train_lora(tmp_path / "out", model, optim="adamw_bnb_8bit")
    assert logged(trainer)[-3:].mean() < 0.8 * logged(trainer)[:3].mean()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    state = trainer.optimizer.state
    assert {s["state1"].dtype for s in state.values()} == {torch.uint8, torch.float32}


def test_backbone_in_int8_of_torchao(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForSequenceClassification, TorchAoConfig

    make_decoder().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float32, device_map="cpu",
        quantization_config=TorchAoConfig(
            Int8WeightOnlyConfig(), modules_to_not_convert=["score"]
        ),
    )  # fmt: skip
    model = lora_model(base)
    assert type(base.model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"
    trainer = train_lora(tmp_path / "out", model)
    assert logged(trainer)[-3:].mean() < 0.8 * logged(trainer)[:3].mean()
