"""End to end: training steps of fastrm's layouts beside the loops that others train with.

The same model, tokens, batches and AdamW for all, a step of each in turn, in one process.
Letters: N groups, M candidates, K candidates of one group.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastrm_benchmarks import run
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastrm
from fastrm import packing
from fastrm.data import Example, Examples
from fastrm.environment import environment

# Random weights of the sizes people train, for time and memory; no file is read.
SMALL: dict[str, Any] = dict(
    hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=2, vocab_size=8192,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-small": dict(model_type="llama", **SMALL),
    "qwen2-small": dict(model_type="qwen2", **SMALL),
    "llama-1b": dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    ),
    "qwen2-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
    ),
}  # fmt: skip
PAD = 0
LEARNING_RATE = 1e-5
LOSS_AGREES = {"fp32": 1e-3, "bf16": 5e-2}  # relative, of the first step, which is the same for all


@dataclass(frozen=True)
class Setting:
    model: str  # of CONFIGS, or a directory or hub name
    data: str  # "P/K/R": random prompts of P tokens and K answers of R; or a file of groups
    batch_size: int = 8  # groups
    dtype: str = "fp32"
    max_length: int = 1024
    attn_implementation: str | None = None  # of transformers; None for its choice

    def __str__(self) -> str:
        names = [x if _is_shape(x) else Path(x).name.removesuffix(".jsonl")
                 for x in (self.model, self.data)]  # fmt: skip
        attention = f", {self.attn_implementation}" if self.attn_implementation else ""
        return f"{names[0]}, {names[1]}, {self.batch_size} groups, {self.dtype}{attention}"


class Contestant:
    """One way to train; `loss` gives what a batch of groups costs, with its graph."""

    def __init__(self, model: Any, loss: Callable[[Any, Sequence[Example]], Tensor]) -> None:
        self.model, self.loss = model, loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)  # Trainer's
        self.parameters = parameters
        self.tokens = 0  # that the backbone has computed
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.tokens += inputs[0].numel()

    def step(self, examples: Sequence[Example]) -> float:
        loss = self.loss(self.model, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    def head_and_loss(self, examples: Sequence[Example]) -> float:
        """Seconds from the backbone's last output of a batch to the first gradient of one."""
        marks: dict[str, float] = {}

        def now(name: str) -> None:
            if self.parameters[0].is_cuda:
                torch.cuda.synchronize()
            marks[name] = time.perf_counter()

        def arrived(gradient: Tensor) -> None:
            if "gradient" not in marks:
                now("gradient")

        def left(module: Any, inputs: Any, output: Any) -> None:
            output.last_hidden_state.register_hook(arrived)
            now("hidden")

        hook = self.model.base_model.register_forward_hook(left)
        self.loss(self.model, examples).backward()
        self.optimizer.zero_grad()
        hook.remove()
        return marks["gradient"] - marks["hidden"]


def _fastrm(layout: str) -> Callable[[Any, Examples], Contestant]:
    def make(model: Any, examples: Examples) -> Contestant:
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved
            args = fastrm.RewardConfig(
                folder, layout=layout, report_to=[], max_length=None,
                use_cpu=model.device.type == "cpu",
            )  # fmt: skip
            tokenizer = _tokenizer()
            trainer: Any = fastrm.RewardTrainer(model, args, examples, processing_class=tokenizer)

        def loss(model: Any, batch: Sequence[Example]) -> Tensor:
            inputs = trainer._prepare_inputs(trainer.data_collator(batch))
            return trainer.compute_loss(model, inputs)

        return Contestant(trainer.model.train(), loss)

    return make


def _padded_loop(model: Any, examples: Examples) -> Contestant:
    """What one writes by hand: every candidate padded, the model's own head, cross entropy."""

    def loss(model: Any, batch: Sequence[Example]) -> Tensor:
        sequences = [torch.from_numpy(ids).long() for e in batch for ids in e["input_ids"]]
        sizes = [len(e["input_ids"]) for e in batch]
        ids = pad_sequence(sequences, True, PAD).to(model.device)
        mask = pad_sequence([torch.ones_like(s) for s in sequences], True).to(model.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if batch[0]["token_type_ids"] is not None:
            types = [torch.from_numpy(t).long() for e in batch for t in e["token_type_ids"] or ()]
            inputs["token_type_ids"] = pad_sequence(types, True).to(model.device)
        scores = model(**inputs).logits.squeeze(-1).float()
        padded = pad_sequence(scores.split(sizes), True, -torch.inf)
        target = torch.tensor([e["target"] for e in batch], device=model.device)
        return F.cross_entropy(padded, target)

    return Contestant(model.train(), loss)


def _trl(model: Any, examples: Examples) -> Contestant:
    """TRL's own RewardTrainer on the same tokens: its collator and its loss."""
    import trl
    from datasets import Dataset

    def pairs(batch: Sequence[Example]) -> list[dict[str, list[int]]]:
        return [
            {"chosen_ids": e["input_ids"][e["target"]].tolist(),
             "rejected_ids": e["input_ids"][1 - e["target"]].tolist()}
            for e in batch
        ]  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        args = trl.RewardConfig(
            folder, report_to=[], max_length=None, gradient_checkpointing=False, bf16=False,
            use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        trainer: Any = trl.RewardTrainer(
            model, args, train_dataset=Dataset.from_list(pairs(examples)),
            processing_class=_tokenizer(),
        )  # fmt: skip

    def loss(model: Any, batch: Sequence[Example]) -> Tensor:
        return trainer.compute_loss(
            model, trainer._prepare_inputs(trainer.data_collator(pairs(batch)))
        )

    return Contestant(trainer.model.train(), loss)


CONTESTANTS: Mapping[str, Callable[[Any, Examples], Contestant]] = {
    **{f"fastrm-{layout}": _fastrm(layout) for layout in ("auto", *packing.LAYOUTS)},
    "padded-loop": _padded_loop,
    "trl": _trl,
}
DEFAULT = ("fastrm-auto", "fastrm-padded", "padded-loop", "trl")


def choose(args: argparse.Namespace) -> tuple[list[Setting], Sequence[str]]:
    """What the options of `fastrm bench train` ask for.

    Raises:
        ValueError: an option that does not exist, with those that do.
    """
    names = args.contestants or DEFAULT
    for name in names:
        run.one_of("--contestants", name, CONTESTANTS)
    run.one_of("--dtype", args.dtype, LOSS_AGREES)
    for model in args.model:
        for data in args.data:
            if _is_shape(data) or (Path(data).is_file() and model not in CONFIGS):
                continue
            file = ": it has no tokenizer" if model in CONFIGS else " or a file of groups"
            raise ValueError(f"--data for --model {model} must be P/K/R, such as 128/4/32{file}, "
                             f"got {data}")  # fmt: skip
    options = (args.batch_size, args.dtype, args.max_length, args.attn_implementation)
    return [Setting(m, d, *options) for m in args.model for d in args.data], names


def bench(
    settings: Sequence[Setting],
    names: Sequence[str],
    device: torch.device,
    steps: int,
    output: Path | None = None,
    command: str = "",
) -> tuple[list[run.Row], list[Path]]:
    """Measure; a result file for each setting, or one."""
    title = run.device_title(device)
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    head = {"environment": environment() | {"device": title}, "command": command}
    rows: list[run.Row] = []
    paths: list[Path] = []
    with run.Progress(len(settings)) as progress:
        for setting in settings:
            name = "train-" + re.sub(r"[^a-z0-9.]+", "-", str(setting).lower())
            path = output or run.results_folder() / slug / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            progress.begin(str(setting))
            found = measure(setting, names, device, steps, progress.step)
            with path.open("a" if path in paths else "w") as file:
                if path not in paths:
                    print(json.dumps(head), file=file)
                    paths.append(path)
                for row in found:
                    print(json.dumps(run.rounded(row)), file=file)
            rows += found
            progress.end()
    return rows, paths


def measure(
    setting: Setting,
    names: Sequence[str],
    device: torch.device,
    steps: int,
    note: Callable[[str], None] = lambda text: None,
) -> list[run.Row]:
    """A row for each contestant: times of its steps on the same batches, in turns."""
    note("data and model")
    model, examples = make_model(setting, device), make_examples(setting)
    N = setting.batch_size
    batches = [examples[i : i + N] for i in range(0, len(examples) - N + 1, N)][: steps + 1]
    base = {"sweep": "train", "setting": str(setting), "batch_size": N, **_facts(batches[1:])}
    rows: list[run.Row] = []
    running: dict[str, tuple[Contestant, list[float], list[float]]] = {}
    for name in names:
        why = _why_not(name, examples)
        if why:
            rows.append({**base, "provider": name, "skipped": why})
            continue
        try:
            running[name] = CONTESTANTS[name](copy.deepcopy(model), Examples(examples)), [], []
        except ValueError as e:  # a layout that this model cannot run
            rows.append({**base, "provider": name, "skipped": str(e)})
    peaks = {}  # first, while this process leaves the memory to those that it starts
    for name in list(running):
        note(f"memory of {name}")
        try:
            peaks[name] = _peak_memory(setting, name, device)
        except MemoryError as e:
            rows.append({**base, "provider": name, "skipped": str(e)})
            del running[name]
    if not running:
        return rows
    order = list(running)
    for i, batch in enumerate(batches):
        note(f"step {i} of {len(batches) - 1}")
        for name in order[i % len(order) :] + order[: i % len(order)]:
            contestant, times, losses = running[name]
            begin = time.perf_counter()
            losses.append(contestant.step(batch))
            times.append(time.perf_counter() - begin)
            if i == 0:
                contestant.tokens = 0  # those of the steps that are timed are reported
    first = median(losses[0] for _, _, losses in running.values())
    for name, (contestant, times, losses) in running.items():
        row = {**base, "provider": name, "losses": losses}
        if not abs(losses[0] - first) <= LOSS_AGREES[setting.dtype] * abs(first):
            wrong = f"the first loss is {losses[0]:.4g}, where others have {first:.4g}"
            rows.append({**row, "failed": wrong})
            continue
        times = times[1:]  # the first warms up
        tokens = contestant.tokens
        note(f"head of {name}")
        rows.append({
            **row, "step_s": median(times), "groups_per_s": N * len(times) / sum(times),
            "tokens_computed": tokens,
            "head_loss_s": median(contestant.head_and_loss(batch) for batch in batches[-3:]),
            "peak_bytes": peaks[name],
        })  # fmt: skip
    return rows


def _why_not(name: str, examples: Sequence[Example]) -> str | None:
    if name != "trl":
        return None
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if any(len(e["input_ids"]) != 2 for e in examples):
        return "its RewardTrainer knows pairs only"
    return None


def _facts(batches: Sequence[Sequence[Example]]) -> dict[str, int]:
    """Tokens of all batches: as they are, padded to each batch's longest, and prompts once."""
    lengths = [[len(s) for e in batch for s in e["input_ids"]] for batch in batches]
    once = [
        e["prompt_length"] + sum(len(s) - e["prompt_length"] for s in e["input_ids"])
        for batch in batches for e in batch
    ]  # fmt: skip
    return {
        "groups": sum(map(len, batches)),
        "tokens": sum(map(sum, lengths)),
        "tokens_padded": sum(len(x) * max(x) for x in lengths),
        "tokens_once": sum(once),
    }


def _peak_memory(setting: Setting, name: str, device: torch.device) -> int | None:
    """Memory of two steps beyond model and optimiser, those of the batches with the longest
    candidates; None where the system does not tell. Of a CPU only a new process can.

    Raises:
        MemoryError: the new process was killed.
    """
    if device.type == "cuda":
        return _memory(setting, name, str(device), torch.get_num_threads())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_quiet) as pool:
        future = pool.submit(_memory, setting, name, str(device), torch.get_num_threads())
        try:
            return future.result()
        except BrokenProcessPool:
            raise MemoryError(
                "two steps of it were killed, most likely for want of memory: a smaller "
                "--batch-size or --dtype bf16 takes less"
            ) from None


def _quiet() -> None:
    """In a new process, which reports a head that is new on purpose and draws bars otherwise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _memory(setting: Setting, name: str, device: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    model, examples = make_model(setting, torch.device(device)), make_examples(setting)
    N = setting.batch_size
    batches = sorted(
        (examples[i : i + N] for i in range(0, len(examples) - N + 1, N)),
        key=lambda batch: max(len(s) for e in batch for s in e["input_ids"]),
    )[-2:]
    contestant = CONTESTANTS[name](model, Examples(examples))
    contestant.step(examples[:1])  # makes the optimiser's state
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = _status("VmRSS")
        except OSError:
            return None
    for batch in batches:
        contestant.step(batch)
    return (_status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def _status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def _is_shape(data: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(/[1-9]\d*){2}", data) is not None


def make_model(setting: Setting, device: torch.device) -> Any:
    """A sequence classifier with one label; the same weights every time."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    how = {
        "dtype": torch.bfloat16 if setting.dtype == "bf16" else torch.float32,
        "attn_implementation": setting.attn_implementation,
    }
    torch.manual_seed(0)
    if setting.model in CONFIGS:
        options = dict(CONFIGS[setting.model])
        config = AutoConfig.for_model(
            options.pop("model_type"), num_labels=1, pad_token_id=PAD, **options
        )
        with device:  # where a GPU makes a billion weights in no time
            model = AutoModelForSequenceClassification.from_config(config, **how)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            setting.model, num_labels=1, pad_token_id=PAD, **how
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(device)


def make_examples(setting: Setting) -> Examples:
    """Tokenised groups in an order that does not depend on who trains."""
    if _is_shape(setting.data):
        P, K, R = map(int, setting.data.split("/"))
        g = np.random.default_rng(0)
        examples = Examples()
        for _ in range(64 * setting.batch_size):
            prompt = g.integers(1, 8192, P)
            answers = [np.concatenate([prompt, g.integers(1, 8192, R)]) for _ in range(K)]
            examples.append(Example(
                input_ids=[a.astype(np.int32) for a in answers], token_type_ids=None,
                prompt_length=P, target=int(g.integers(K)), margin=None, weight=None, cut=False,
            ))  # fmt: skip
        return examples
    from transformers import AutoConfig, AutoTokenizer

    from fastrm.data import read_rows, tokenize_rows
    from fastrm.model import is_encoder

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    model = type("Named", (), {"config": AutoConfig.from_pretrained(setting.model)})()
    rows = read_rows(setting.data)
    random.Random(0).shuffle(rows)
    return tokenize_rows(tokenizer, rows, setting.max_length, is_encoder(model))


def _tokenizer() -> Any:
    """The least that a trainer asks of one: the data is tokenised already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": PAD, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip


def table(rows: Sequence[run.Row]) -> str:
    """What `fastrm bench train` prints."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = [row for row in rows if row["setting"] == setting]
        counts = of[0]
        lines.append(
            f"\n{setting}: {counts['groups']} groups timed; tokens: {counts['tokens_padded']} "
            f"padded, {counts['tokens']} not, {counts['tokens_once']} with each prompt once"
        )
        speeds = {row["provider"]: row.get("groups_per_s") for row in of}
        reference = speeds.get("padded-loop")
        for row in of:
            if "groups_per_s" not in row:
                reason = row.get("skipped") or f"WRONG: {row.get('failed')}"
                lines.append(f"  {row['provider']:<16}{reason}")
                continue
            ratio = f"{row['groups_per_s'] / reference:6.2f} x" if reference else ""
            peak = row["peak_bytes"]
            lines.append(
                f"  {row['provider']:<16}{row['groups_per_s']:8.2f} groups/s {ratio}"
                f"{row['tokens_computed']:9d} tokens"
                f"{1e3 * row['head_loss_s']:8.2f} ms in head and loss"
                + ("" if peak is None else f"{peak / 2**20:9.0f} MB")
            )
    return "\n".join(lines)
