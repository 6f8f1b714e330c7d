"""The model card that a trainer writes beside the model: README.md, for the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

import fastrm
from fastrm.environment import environment
from fastrm.verify import Form, serving_form

log = logging.getLogger("fastrm")
MARKER = "<!-- written by fastrm; without this line it is yours, and no training overwrites it -->"
EXAMPLE = {"prompt": "What is 2 + 2?", "candidates": [" 4", " 22"]}
OPTIONS = (
    "temperature", "label_smoothing_factor", "center_rewards_coefficient", "distillation_coef",
    "learning_rate", "per_device_train_batch_size", "max_tokens_per_batch",
    "gradient_accumulation_steps", "max_length", "layout", "bf16", "seed",
)  # fmt: skip
METRICS = ("accuracy", "loss", "margin", "reward", "p_best")


def write_card(trainer: Any, folder: str | Path | None = None) -> Path | None:
    """Write README.md beside a saved model: what it is, how it was trained, how to read it.

    Args:
        trainer: a `fastrm.RewardTrainer`.
        folder: where the model was saved; None is the trainer's output_dir.

    Returns:
        The file, or None where there is a README.md that fastrm did not write, which stays.
    """
    file = Path(folder or trainer.args.output_dir) / "README.md"
    if file.exists() and MARKER not in file.read_text(encoding="utf-8"):
        log.info("%s is not fastrm's, and stays as it is", file)
        return None
    base = trainer.model.config._name_or_path
    is_hub = bool(base) and not Path(base).exists()
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-classification",
        tags=["reward-model", "fastrm"], base_model=base if is_hub else None,
    )  # fmt: skip
    form, _ = serving_form(trainer.processing_class, [EXAMPLE], trainer._pairs)
    text = "\n".join(_card(trainer, file.resolve().parent.name, base, is_hub, form))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n\n{text}\n").save(file)
    return file


def _card(trainer: Any, name: str, base: str, is_hub: bool, form: Form) -> list[str]:
    args, log_history = trainer.args, trainer.state.log_history
    used = {"max_length": trainer._max_tokens}
    if layouts := getattr(trainer.data_collator, "layouts", ()):
        several = "for each batch the cheapest of " * (len(layouts) > 1)
        used["layout"] = several + ", ".join(layouts)
    architecture = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    found = [
        f"# {name}", "",
        f"A reward model: {architecture} with one output, a raw reward for a prompt with a "
        "candidate. Rewards compare the candidates of one prompt; a higher one is better, and "
        "none is a probability.", "",
        "## Training", "",
        "| | |", "| --- | --- |",
        f"| base model | {base if is_hub else Path(base).name or 'not named'} |",
    ]  # fmt: skip
    for title, examples in _data(trainer):
        candidates = sum(len(e["input_ids"]) for e in examples)
        found.append(f"| {title} | {len(examples)} groups, {candidates} candidates; "
                     f"{examples.dropped} groups left out as too long |")  # fmt: skip
    found += [
        f"| loss | {args.loss} |",
        f"| steps | {trainer.state.global_step}, {trainer.state.epoch or 0:.3g} epochs |",
        *(f"| {name} | {x} |" for name in OPTIONS if (x := used.get(name, getattr(args, name)))
          is not None),
        "",
    ]
    columns = [("training", _last(log_history, "")), ("held out", _last(log_history, "eval_"))]
    columns = [(title, values) for title, values in columns if values]
    if columns:
        found += [
            "At the end (accuracy: 1 / number of candidates that tie for the highest reward, 0 if "
            "the best is not one; training: the groups since the log before):", "",
            "| | " + " | ".join(title for title, _ in columns) + " |",
            "| --- |" + " ---: |" * len(columns),
            *(
                f"| {m} | " + " | ".join(_number(values.get(m)) for _, values in columns) + " |"
                for m in METRICS
            ),
            "",
        ]  # fmt: skip
    versions = environment()
    return [*found, *_usage(name, form), "## Versions", "",
            f"fastrm {fastrm.__version__}, torch {torch.__version__}, transformers "
            f"{versions['transformers']}, accelerate {versions['accelerate']}"]  # fmt: skip


def _data(trainer: Any) -> list[tuple[str, Any]]:
    held_out = trainer.eval_dataset
    parts = held_out.items() if isinstance(held_out, dict) else [("", held_out)]
    found = [("training data", trainer.train_dataset)]
    found += [(f"held-out data {name}".strip(), x) for name, x in parts]
    return [(title, x) for title, x in found if x is not None]


def _last(log_history: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, float]:
    """The last logged metrics, under the names without prefix."""
    entries = [e for e in log_history if f"{prefix}accuracy" in e]
    entry = entries[-1] if entries else {}
    return {m: entry[f"{prefix}{m}"] for m in METRICS if f"{prefix}{m}" in entry}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _usage(name: str, form: Form) -> list[str]:
    candidates = EXAMPLE["candidates"]
    inputs = [form.inputs(str(EXAMPLE["prompt"]), c) for c in candidates]
    rows = [{"prompt": EXAMPLE["prompt"], "candidates": candidates}]
    special = "" if form.special else ", add_special_tokens=False"
    processing = "" if form.special else (
        ', processing_kwargs={"text": {"add_special_tokens": False}}'
    )  # fmt: skip
    pairs = [list(x.values()) for x in inputs]
    notes = (
        f"These readers tokenise by themselves, and get a text as `{form}`, which gives the tokens "
        "of training. Messages go through the chat template first. With one label pipelines and "
        "CrossEncoder apply a sigmoid where nobody says otherwise."
    )
    blocks = (
        ("fastrm", f"""\
import fastrm
from fastrm.evaluate import score_rows
from transformers import AutoTokenizer

path = {json.dumps(name)}  # this folder
tokenizer = AutoTokenizer.from_pretrained(path)
model = fastrm.load_reward_model(path, tokenizer=tokenizer)
rows = {json.dumps(rows)}
rewards = score_rows(model, tokenizer, rows)  # one list a row"""),
        ("transformers", f"""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = {json.dumps(name)}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
texts = {json.dumps([list(column) for column in zip(*pairs, strict=True)])}
inputs = tokenizer(*texts, padding=True, padding_side="right", return_tensors="pt"{special})
with torch.inference_mode():
    rewards = model(**inputs).logits[:, 0].tolist()"""),
        ("pipeline", f"""\
from transformers import pipeline

path = {json.dumps(name)}
reader = pipeline("text-classification", model=path, dtype="float32")
texts = {json.dumps(inputs)}
found = reader(texts, function_to_apply="none"{special})
rewards = [x["score"] for x in found]"""),
        ("CrossEncoder (sentence-transformers)", f"""\
import torch
from sentence_transformers import CrossEncoder

path = {json.dumps(name)}
reader = CrossEncoder(path, model_kwargs={{"dtype": torch.float32}})
reader[0].modality_config.pop("message", None)  # or it applies a chat template of the tokenizer
texts = {json.dumps(pairs)}
rewards = reader.predict(texts, activation_fn=torch.nn.Identity(){processing}).tolist()"""),
    )  # fmt: skip
    lines = ["## Rewards", "", notes, ""]
    for title, code in blocks:
        lines += [f"With {title}:", "", f"```python\n{code}\n```", ""]
    return [*lines, f"`fastrm verify --model {name}` says whether they all agree, and why if not.",
            ""]  # fmt: skip
