"""sentence-transformers' `CrossEncoderTrainer` with fastrm's loss, and one of its evaluators."""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from toy import make_rows, make_tokenizer
from transformers import BertConfig, BertForSequenceClassification

import fastrm
from fastrm.integrations.sentence_transformers import ListwiseLoss


def labelled(rows):
    """The columns of sentence-transformers' listwise losses; the best one has label 1."""
    labels = [[int(k == r["best"]) for k in range(len(r["candidates"]))] for r in rows]
    return {"query": [r["prompt"] for r in rows], "docs": [r["candidates"] for r in rows],
            "labels": labels}


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:  # in place of CrossEncoder("google-bert/bert-base")
    config = BertConfig(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = CrossEncoder(folder, device="cpu")

held_out = make_rows(32, seed=1)
evaluator = CrossEncoderRerankingEvaluator(
    [{"query": r["prompt"], "positive": [r["candidates"][r["best"]]],
      "documents": r["candidates"]} for r in held_out],
    show_progress_bar=False,
)
trainer = CrossEncoderTrainer(
    model=model,
    args=CrossEncoderTrainingArguments(
        "runs/reranker", learning_rate=2e-3, per_device_train_batch_size=8, num_train_epochs=8,
        logging_steps=12, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    ),
    train_dataset=Dataset.from_dict(labelled(make_rows(96))),
    loss=ListwiseLoss(model, target=fastrm.target_from_labels),
    evaluator=evaluator,
)
before = evaluator(model)["map"]
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']:3d}  loss {log['loss']:.4f}")
print(f"mean average precision on held-out queries: {before:.3f} -> {evaluator(model)['map']:.3f}")
