"""The trainer: `transformers.Trainer` with ragged groups, the fused loss and exact accounting.

Letters: N groups, M candidates.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, seed_worker

from fastrm import backends, functional, packing
from fastrm.batching import ChunkingCollator, GroupBatchSampler, group_tokens
from fastrm.data import Examples, RaggedCollator, check_rows, tokenize_rows
from fastrm.model import (
    LOSSES,
    attach_head,
    disable_dropout,
    is_encoder,
    load_reward_model,
    loss_columns,
    set_pad_token,
    token_limit,
)

log = logging.getLogger("fastrm")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RewardConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the options of the listwise loss.

    Batch sizes count groups, each with all its candidates.
    """

    max_length: int | None = _option(
        1024,
        "Most tokens of a prompt with one candidate. A longer prompt is cut at its left; a group "
        "with a candidate that does not fit even so is left out. Never more than the model reads.",
    )
    layout: str = _option(
        "auto",
        "Where a batch's tokens lie: padded (each candidate in a row, as long as the longest), "
        "split (the same in a few forwards, each of similar lengths), packed (one candidate after "
        "another in a row), shared (a prompt once for all its candidates) or cached (the same in "
        "two forwards). The results are the same; auto takes the cheapest that the model can run.",
    )
    loss: str = _option(
        "listwise",
        "listwise (softmax cross entropy of the best candidate, or of the labels), plackett_luce "
        "(ListMLE: the whole ranking) or bradley_terry (every pair that the ranks order). Rows "
        "without ranks have those that their best or their labels give.",
    )
    temperature: float = _option(1.0, "Divides the rewards in the softmax of the loss.")
    center_rewards_coefficient: float | None = _option(
        None, "Weight of the term that keeps each group's mean reward near 0, such as 0.01."
    )
    distillation_coef: float = _option(
        0.0, "Weight of the cross entropy with the softmax of the rows' teacher_scores (listwise)."
    )
    disable_dropout: bool = _option(True, "Train without the model's dropout.")
    model_dtype: str = _option(
        "float32",
        "Dtype of the backbone's weights when `model` is a path: float32, bfloat16, float16, or "
        "auto for the checkpoint's. The head is always float32.",
    )
    attn_implementation: str | None = _option(
        None,
        "Attention when `model` is a path: sdpa, eager, flex_attention (for long rows on a GPU: no "
        "mask of their length squared), flash_attention_2. Not given: what transformers takes.",
    )
    backend: str | None = _option(
        None, "Who computes the loss: triton, cpp or torch. Not given: the fastest that runs here."
    )
    early_stopping_patience: int | None = _option(
        None,
        "Stop when this many evaluations in a row (without an evaluation set: logs of the training "
        "loss) bring no improvement of the loss, or of metric_for_best_model. With a large "
        "num_train_epochs: train until convergence. The result is the last model, or with "
        "load_best_model_at_end the best one.",
    )
    early_stopping_threshold: float = _option(
        0.0, "Improvements up to this size do not count for early stopping."
    )

    num_train_epochs: float = _option(1.0, "Passes over the training groups.")
    learning_rate: float = _option(2e-5, "Peak learning rate of AdamW.")
    warmup_steps: float = _option(
        0.05, "Steps of linear warmup; below 1, a share of all optimiser steps."
    )
    per_device_train_batch_size: int = _option(
        8, "GROUPS per device and forward pass in training, each with all its candidates."
    )
    max_tokens_per_batch: int | None = _option(
        None,
        "Fill the batches of training with whole groups up to so many tokens, in place of "
        "per_device_train_batch_size groups. Counted are those that the model computes, without "
        "padding. A group with more is computed in chunks of its candidates, at the price of one "
        "more forward pass: the gradient is the same, the memory that of a chunk. In evaluation a "
        "batch with more is.",
    )
    per_device_eval_batch_size: int = _option(8, "GROUPS per device in evaluation.")
    label_smoothing_factor: float = _option(
        0.0, "Share of the target that is spread evenly over each group's candidates, 0 to 1."
    )
    logging_steps: float = _option(10, "Steps between logs; below 1, a share of all steps.")
    logging_first_step: bool = _option(True, "Log after the first step too.")
    logging_nan_inf_filter: bool = _option(
        False, "Hide NaN and infinite losses from the logs, which waits for the device every step."
    )
    eval_strategy: IntervalStrategy | str = _option(
        "epoch", "When to evaluate: no, steps or epoch. Without an evaluation set: never."
    )
    remove_unused_columns: bool = _option(
        False, "Must be False: the loss reads columns that the model does not."
    )
    use_cpu: bool = _option(
        not torch.accelerator.is_available(),
        "Train on the CPU. Several processes there need it, or each would train alone.",
    )
    dataloader_pin_memory: bool = _option(
        torch.cuda.is_available(), "Pin batches in memory for faster copies to the device."
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        def need(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} must {expected}, got {getattr(self, name)!r}")

        need(self.learning_rate >= 0, "learning_rate", "be 0 or more")
        need(self.per_device_train_batch_size > 0, "per_device_train_batch_size", "be above 0")
        need(self.max_tokens_per_batch is None or self.max_tokens_per_batch > 0,
             "max_tokens_per_batch", "be above 0")  # fmt: skip
        need(self.max_tokens_per_batch is None or not self.dataloader_drop_last,
             "dataloader_drop_last", "be False with max_tokens_per_batch")  # fmt: skip
        need(self.per_device_eval_batch_size > 0, "per_device_eval_batch_size", "be above 0")
        need(self.gradient_accumulation_steps > 0, "gradient_accumulation_steps", "be above 0")
        need(0 <= self.seed < 2**32, "seed", "be from 0 to 2^32 - 1")
        need(self.max_steps > 0 or self.max_steps == -1, "max_steps",
             "be above 0, or -1 for epochs")  # fmt: skip
        need(self.max_steps > 0 or self.num_train_epochs > 0, "num_train_epochs", "be above 0")
        need(self.model_dtype in ("auto", "float32", "bfloat16", "float16"), "model_dtype",
             "be auto, float32, bfloat16 or float16")  # fmt: skip
        need(self.max_length is None or self.max_length > 0, "max_length", "be above 0")
        layouts = ("auto", *packing.LAYOUTS)
        need(self.layout in layouts, "layout", f"be one of {', '.join(layouts)}")
        need(self.loss in LOSSES, "loss", f"be one of {', '.join(LOSSES)}")
        for name in ("label_smoothing_factor", "distillation_coef"):
            need(self.loss == "listwise" or getattr(self, name) == 0, name,
                 f"be 0 with loss {self.loss}")  # fmt: skip
        need(0 <= self.distillation_coef < float("inf"), "distillation_coef",
             "be a finite number, 0 or more")  # fmt: skip
        need(0 < self.temperature < float("inf"), "temperature", "be a finite number above 0")
        center = self.center_rewards_coefficient
        need(center is None or 0 <= center < float("inf"), "center_rewards_coefficient",
             "be a finite number, 0 or more")  # fmt: skip
        need(0 <= self.label_smoothing_factor <= 1, "label_smoothing_factor", "be from 0 to 1")
        need(self.backend in (None, *backends.NAMES), "backend",
             f"be one of {', '.join(backends.NAMES)}")  # fmt: skip
        need(self.early_stopping_patience is None or self.early_stopping_patience > 0,
             "early_stopping_patience", "be above 0")  # fmt: skip
        need(self.early_stopping_threshold >= 0, "early_stopping_threshold", "be 0 or more")
        need(not self.remove_unused_columns, "remove_unused_columns",
             "be False, because the loss reads columns that the model does not")  # fmt: skip
        need(self.train_sampling_strategy in ("random", "sequential"), "train_sampling_strategy",
             "be random or sequential, because groups have no single length")  # fmt: skip
        for name in ("bf16_full_eval", "fp16_full_eval"):
            need(not getattr(self, name), name, "be False, because it rounds the trained weights")
        for name in ("dispatch_batches", "split_batches"):
            if getattr(self.accelerator_config, name, None):
                raise ValueError(f"accelerator_config.{name} must not be set, because it "
                                 "cuts batches by rows and groups are ragged")  # fmt: skip


class RewardTrainer(Trainer):
    """Trains a reward model or reranker on ragged groups of candidates.

    The gradient of an optimiser step is that of the sum over all its groups divided by their
    number, however they were cut into micro-batches and devices. Logs carry, over exactly the
    groups since the last log (and with `eval_` over the evaluation set): loss, accuracy (1 divided
    by the number of candidates that tie for the top, 0 if the best is not among them, as in
    RewardBench 2), margin (best minus the highest other reward), reward (mean over candidates) and
    p_best (mean probability of the best). They come from the scores of the loss's own forward.

    Args:
        model: a sequence classifier with one label, or the name or path of a pretrained model.
            The head of a model that is passed in is replaced by a `RewardHead` with its parameters.
        args: the options.
        train_dataset: a list of rows or a `datasets.Dataset`, see `fastrm.data`.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; None loads the model's own. Its padding token is set where
            the model's differs, see `fastrm.model.set_pad_token`.
        data_collator: in place of `fastrm.data.RaggedCollator`.
        callbacks: further callbacks.
        optimizers: optimizer and scheduler in place of those that `args` describes.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        data_collator: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args is not None and not isinstance(args, RewardConfig):
            raise TypeError(f"args must be a fastrm.RewardConfig, got {type(args).__name__}")
        args = copy.copy(args) if args is not None else RewardConfig()
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs, and ragged groups cannot be split by "
                "torch.nn.DataParallel: start one process per GPU with torchrun or accelerate "
                "launch, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        name = model if isinstance(model, str) else model.config._name_or_path
        if processing_class is None:
            if not name:
                raise ValueError("processing_class must be the model's tokenizer: the model does "
                                 "not say where it came from")  # fmt: skip
            processing_class = AutoTokenizer.from_pretrained(name)
        if isinstance(model, str):
            set_seed(args.seed)  # a new head is drawn from it
            model = load_reward_model(
                model, tokenizer=processing_class, dtype=args.model_dtype,
                attn_implementation=args.attn_implementation,
            )  # fmt: skip
        self.head = attach_head(model)
        if not self.head.weight.requires_grad:
            log.warning(
                "the head does not train; with PEFT, task_type='SEQ_CLS' or "
                "modules_to_save=['score'] in the config makes it"
            )
        set_pad_token(model, processing_class)
        if args.disable_dropout:
            disable_dropout(model)

        attention = model.config.get_text_config()._attn_implementation
        on_cpu = args.device.type == "cpu"
        if train_dataset is not None and attention == "flex_attention" and on_cpu:
            raise ValueError("attn_implementation flex_attention trains on a GPU only: PyTorch has "
                             "no backward pass of it for CPUs")  # fmt: skip
        if args.layout != "auto" and data_collator is not None:
            raise ValueError(f"layout must be auto with a data_collator, got {args.layout!r}")
        if args.ddp_broadcast_buffers is None:
            # They are constants, and layout split calls the model in turns of its own on each rank.
            args.ddp_broadcast_buffers = False
        self._max_tokens = token_limit(model, processing_class, args.max_length)
        self._pairs = is_encoder(model)
        self._model_config = model.config
        self._tokenizer = processing_class
        self._vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
        self._loss, self._distils = args.loss, args.distillation_coef > 0
        if train_dataset is not None:
            train_dataset = self._tokenized(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                k: self._tokenized(v, f"eval_dataset[{k!r}]") for k, v in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        elif args.eval_strategy == IntervalStrategy.EPOCH and not args.load_best_model_at_end:
            args.eval_strategy = IntervalStrategy.NO
        metric = args.metric_for_best_model
        sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
        names = [of_set + name for of_set in sets for name in _means([0.0] * 8)]
        if metric and metric.removeprefix("eval_") not in names:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(names)}, "
                             f"got {metric!r}")  # fmt: skip
        self._options: dict[str, Any] = {
            "temperature": args.temperature,
            "center_coef": args.center_rewards_coefficient or 0.0,
            "backend": args.backend,
        }
        if args.loss == "listwise":
            self._options["label_smoothing"] = args.label_smoothing_factor
        if self._distils:
            self._options["distillation_coef"] = args.distillation_coef
        self._window: Tensor | None = None  # sums of `group_stats` since the last log
        own: list[TrainerCallback] = [_LogLastStep()]
        if args.early_stopping_patience is not None:
            stop = (args.early_stopping_patience, args.early_stopping_threshold)
            evaluates = args.eval_strategy != IntervalStrategy.NO
            own.append(_StopEarly(*stop) if evaluates else _StopOnPlateau(*stop))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or RaggedCollator(processing_class.pad_token_id, last_token=not self._pairs),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=_eval_metrics,
            callbacks=[*own, *(callbacks or ())],
            optimizers=optimizers,
        )
        # The loss of a micro-batch is already divided by the groups of the whole step.
        self.model_accepts_loss_kwargs = True
        layout = "layout of the data_collator"
        if data_collator is None:
            layout = self._set_layouts(model, args.layout, train_dataset)
        if train_dataset is not None:
            self._describe(model, train_dataset, layout)

    def _tokenized(self, rows: Any, name: str) -> Examples:
        if isinstance(rows, Examples):
            return rows
        checked = check_rows(rows, name)
        if self._loss == "plackett_luce" and any(row.get("margin") for row in checked):
            log.warning("%s: the loss plackett_luce takes no margin, and leaves out those of the "
                        "rows", name)  # fmt: skip
        if self._distils and (without := [
            i for i, row in enumerate(checked) if row.get("teacher_scores") is None
        ]):  # fmt: skip
            raise ValueError(f"distillation_coef needs rows with teacher_scores: {name} has "
                             f"{len(without)} without, the first is row {without[0]}")  # fmt: skip
        examples = tokenize_rows(self._tokenizer, checked, self._max_tokens, self._pairs)
        if not examples:
            raise ValueError(f"{name}: no group is left, every one has a candidate of more than "
                             f"{self._max_tokens} tokens")  # fmt: skip
        largest = max(int(ids.max()) for e in examples for ids in e["input_ids"])
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise ValueError(f"{name}: the tokenizer gives token {largest}, and the model knows "
                             f"{self._vocabulary}: the two do not belong together")  # fmt: skip
        if name.startswith("eval"):
            log.info("%s: %d groups; %s", name, len(examples), self._said_of_length(examples))
        return examples

    def _said_of_length(self, examples: Examples) -> str:
        cut, left_out = _cut_and_left_out(examples)
        return (f"{cut} prompts cut at the left to {self._max_tokens} tokens, "
                f"{left_out} groups left out as too long")  # fmt: skip

    def _set_layouts(self, model: PreTrainedModel, layout: str, examples: Examples | None) -> str:
        """Tell the collator which layouts the model can run; returns what to log of them."""
        collate: Any = self.data_collator
        refused: dict[str, str] = {}
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "is sharded, and must be called as often on every device"
            refused |= {"split": reason, "cached": reason}
        if self.args.gradient_checkpointing:
            refused["cached"] = "keeps no cache under gradient checkpointing"
        collate.cost = packing.Cost.of(model)
        # One process decides for all: elsewhere the weights of a model in shards may not be there.
        decision: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                with self.accelerator.autocast():
                    decision[0] = packing.usable(
                        model, self.head, self._pairs, layout, refused=refused
                    )
            except ValueError as error:
                decision[0] = error
        broadcast_object_list(decision)
        if isinstance(decision[0], ValueError):
            raise decision[0]
        collate.layouts, reasons = decision[0]
        if examples is None:
            return ""
        size = self.args.per_device_train_batch_size
        found = packing.describe(examples, size, collate.layouts, collate.cost, not self._pairs)
        return found + "".join(f"; not {other}: the model {why}" for other, why in reasons.items())

    def _describe(self, model: torch.nn.Module, examples: Examples, layout: str) -> None:
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info(
            "training %s: %.1fM parameters, %d groups, %d candidates, %d tokens; %s; %s",
            type(model).__name__, parameters / 1e6, len(examples),
            sum(len(e["input_ids"]) for e in examples),
            sum(len(ids) for e in examples for ids in e["input_ids"]),
            self._said_of_length(examples), layout,
        )  # fmt: skip

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`, with the batches of `fastrm.batching`."""
        args: Any = self.args
        examples: Any = self.train_dataset
        collate: Any = self.data_collator
        if examples is None:
            raise ValueError("training needs a train_dataset")
        limit = args.max_tokens_per_batch
        shared = _shares_prompts(collate)
        tokens = [group_tokens(e, shared) for e in examples]
        if self.is_deepspeed_enabled and limit is not None and max(tokens) > limit:
            raise ValueError(
                "max_tokens_per_batch must hold every group with DeepSpeed, which updates after "
                f"each backward pass and so cannot take one in chunks: got {limit}, and a group "
                f"of {max(tokens)} tokens"
            )
        self._batches = GroupBatchSampler(
            tokens, self._train_batch_size, limit,
            ranks=self.accelerator.num_processes, rank=self.accelerator.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random", drop_last=args.dataloader_drop_last,
        )  # fmt: skip
        if limit is not None:
            log.info(
                "%d batches of at most %d tokens an epoch on each of %d devices; %d groups have "
                "more and are computed in chunks",
                len(self._batches), limit, self._batches.ranks, sum(n > limit for n in tokens),
            )  # fmt: skip
        self._collate = ChunkingCollator(collate, examples, limit, shared)
        loader: DataLoader = DataLoader(
            examples, batch_sampler=self._batches, collate_fn=self._collate,
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor, in_order=args.dataloader_in_order,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )  # fmt: skip
        # The sampler brings the batches of this device alone, so nothing is left to shard.
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0,
            put_on_device=self.accelerator.device_placement,
            non_blocking=self.accelerator.non_blocking,
        )  # fmt: skip

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Groups of an optimiser step; their mean where batches are filled by tokens."""
        if self._batches.max_tokens is None:
            return super().get_total_train_batch_size(args)
        groups = len(self._batches.tokens) * args.gradient_accumulation_steps
        return round(groups / len(self._batches))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimiser step and the number of its groups on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._batches.max_tokens is not None and self.is_fsdp_enabled:
            self._align(batches, device)
        return batches, self._count_groups(batches, device)

    def _align(self, batches: list[Any], device: torch.device) -> None:
        """Give micro-batches idle chunks: a model in shards must be called as often everywhere."""
        own = torch.tensor([len(b.get("chunks", [b])) for b in batches], device=device)
        most = self.accelerator.gather(own).view(-1, len(batches)).amax(0)
        for batch, n in zip(batches, (most - own).tolist(), strict=True):
            if n > 0:
                batch.setdefault("chunks", [_without_groups(batch)])
                batch["idle"] = [_without_groups(self._collate([]))] * n

    def _count_groups(self, batches: Iterable[Any], device: torch.device) -> Tensor:
        count = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            count += _counted(batch).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over the groups of this micro-batch / number of groups of the optimiser step."""
        if num_items_in_batch is None:
            num_items_in_batch = self._count_groups([inputs], inputs["offsets"].device)
        options = {**self._options, "num_items_in_batch": num_items_in_batch}
        if "chunks" in inputs:
            result, outputs = self._in_chunks(model, inputs, options)
        else:
            with self._fitting(inputs, **options) as result:
                outputs = packing.run(model, inputs, self._model_config)
        loss = outputs.logits.flatten()[0]
        if model.training:
            stats = group_stats(result.scores, inputs, self._options["temperature"]).sum(0)
            stats[0].copy_(loss.detach() * num_items_in_batch)
            self._window = stats if self._window is None else self._window + stats
        # Data parallelism averages gradients over processes where this needs their sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _in_chunks(
        self, model: torch.nn.Module, inputs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The loss of a group, of which only the last chunk is left to backpropagate.

        Gradient caching (Gao et al., 2021): all scores without a graph, the gradient of the loss
        with respect to them, then each chunk with a graph. The last one brings the loss itself,
        with the hidden states of the others as constants, and so the gradient of the head.
        """
        idle = len(inputs.get("idle", ()))
        chunks, config = [*inputs.get("idle", ()), *inputs["chunks"]], self._model_config
        group = {k: inputs[k] for k in packing.GROUP_KEYS if k in inputs}
        seed = int(torch.randint(2**62, ()))  # both forwards of a chunk drop the same units
        read = []
        for k, chunk in enumerate(chunks):
            with torch.no_grad(), self._seeded(seed + k):
                read.append(self._read(model, chunk))
        with torch.enable_grad():
            scores = torch.cat([r.scores for r in read]).requires_grad_()
            loss = self._loss_from_scores(scores[idle:], group, options)
        gradients = torch.autograd.grad(loss, scores)[0].split([len(r.scores) for r in read])
        for k, chunk in enumerate(chunks[:-1]):
            with self.accelerator.no_sync(model), self._seeded(seed + k):
                with self.head.pulling(chunk, gradients[k]):
                    pulled = packing.run(model, chunk, config).logits.flatten()[0]
                if pulled.requires_grad:  # or only the head trains
                    self.accelerator.backward(pulled * self.accelerator.num_processes)
        before = torch.cat([r.hidden for r in read[:-1]])[idle:]
        with self._seeded(seed + len(chunks) - 1):
            with self._fitting({**chunks[-1], **group}, before, **options) as result:
                outputs = packing.run(model, chunks[-1], config)
        return result, outputs

    def _read(self, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        """Hidden states and scores of the batch's candidates."""
        with self.head.reading(batch) as result:
            packing.run(model, batch, self._model_config)
        return result

    def _fitting(self, batch: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """The head gives the loss of `args`."""
        return self.head.fitting(self._taught(batch), *args, loss=self._loss, **options)

    def _loss_from_scores(self, scores: Tensor, batch: Mapping[str, Any], options: Any) -> Tensor:
        function = getattr(functional, f"{self._loss}_loss_from_scores")
        columns = loss_columns(self._loss, self._taught(batch))
        return function(scores, **columns, **options)

    def _taught(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch; without the teacher's scores where nothing is to be learnt from them."""
        if self._distils:
            if "teacher_scores" not in batch:
                raise ValueError("distillation_coef needs rows with teacher_scores")
            return batch
        return {name: x for name, x in batch.items() if name != "teacher_scores"}

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(seed)
            yield

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Statistics of each group, (N, 8); the trainer gathers them for the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            options = {**self._options, "reduction": "none"}
            if "chunks" in inputs:
                scores = torch.cat([self._read(model, chunk).scores for chunk in inputs["chunks"]])
                loss = self._loss_from_scores(scores, inputs, options)
            else:
                with self._fitting(inputs, **options) as result:
                    packing.run(model, inputs, self._model_config)
                scores, loss = result.scores, result.loss
            stats = group_stats(scores, inputs, self._options["temperature"])
            stats[:, 0].copy_(loss)
        return None, stats, stats[:, 1]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`, with a model card (an adapter has PEFT's), and a model in
        shards is saved whole; neither in checkpoints.
        """
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.should_save and not _internal_call:
            from fastrm.card import write_card

            write_card(self, output_dir)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; says what was too long too."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        cut, left_out = _cut_and_left_out(dataloader.dataset)
        prefix = kwargs.get("metric_key_prefix", "eval")
        return output._replace(metrics={
            **(output.metrics or {}), f"{prefix}_prompts_cut": cut, f"{prefix}_left_out": left_out
        })  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`; takes rows too."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        collate: Any = self.data_collator
        args: Any = self.args
        limit = args.max_tokens_per_batch
        if limit is not None and not self.is_fsdp_enabled:  # whose shards all take the same turns
            self.data_collator = ChunkingCollator(collate, (), limit, _shares_prompts(collate))
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("use fastrm.evaluate.score_rows for the rewards of rows")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; what a window of training steps brings is exact over its groups."""
        if "loss" in logs and self._window is not None:
            sums = self.accelerator.reduce(self._window, reduction="sum")
            logs.update(_means(sums.tolist()))
            self._window = None
        if "train_runtime" in logs:
            cut, left_out = _cut_and_left_out(self.train_dataset)
            logs.update(train_prompts_cut=cut, train_left_out=left_out)
        super().log(logs, start_time)


def _shares_prompts(collate: Any) -> bool:
    return not {"shared", "cached"}.isdisjoint(getattr(collate, "layouts", ()))


def _cut_and_left_out(examples: Any) -> tuple[int, int]:
    """How many prompts lost tokens at their left, and how many groups did not fit even so."""
    return sum(int(e["cut"]) for e in examples), examples.dropped


def _without_groups(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in packing.GROUP_KEYS}


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: the groups that are not left out."""
    target = batch["target"]
    if target.is_floating_point():
        return torch.ones_like(batch["offsets"][1:], dtype=torch.bool)
    return target != -100


def group_stats(scores: Tensor, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """What the metrics need of each group, (N, 8), without waiting for the device.

    The columns: loss (0, for the caller to fill), groups (0 or 1), credit, groups with a margin,
    margin, sum of rewards, candidates, probability of the best. Their sums are all `_means` needs.
    """
    offsets, target = batch["offsets"], batch["target"]
    M, N = scores.shape[0], offsets.shape[0] - 1
    i = torch.arange(M, device=scores.device)
    group = torch.searchsorted(offsets[1:].contiguous(), i, right=True)

    def total(x: Tensor) -> Tensor:
        return scores.new_zeros(N).index_add(0, group, x.to(scores.dtype))

    def top(x: Tensor, among: Tensor | None = None) -> Tensor:
        x = x if among is None else torch.where(among, x, -torch.inf)
        return x.new_full((N,), -torch.inf).scatter_reduce(0, group, x, "amax")

    if target.is_floating_point():
        q = target.to(scores.dtype)
        best = q == top(q)[group]
    else:
        best = i - offsets[group] == target[group]
    highest, of_best, of_rest = top(scores), top(scores, best), top(scores, ~best)
    at_top = scores == highest[group]
    margin = of_best - of_rest
    p = ((scores - highest[group]) / temperature).exp()
    columns = (
        torch.zeros_like(highest),
        torch.ones_like(highest),
        total(at_top & best) / total(at_top),
        margin.isfinite().to(scores.dtype),
        torch.where(margin.isfinite(), margin, 0),
        total(scores),
        total(torch.ones_like(scores)),
        total(torch.where(best, p, 0)) / total(p),
    )
    return torch.where(_counted(batch)[:, None], torch.stack(columns, dim=1), 0)


def _means(sums: Sequence[float]) -> dict[str, float]:
    """Metrics from the summed columns of `group_stats`."""
    loss, groups, credit, with_margin, margin, reward, candidates, p_best = sums
    return {
        "loss": loss / max(groups, 1),
        "accuracy": credit / max(groups, 1),
        "margin": margin / max(with_margin, 1),
        "reward": reward / max(candidates, 1),
        "p_best": p_best / max(groups, 1),
    }


def _eval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return _means(np.asarray(prediction.predictions, dtype=np.float64).sum(0).tolist())


class _LogLastStep(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class _StopEarly(EarlyStoppingCallback):
    """Says which evaluation was best: training ends with that model only where it is asked to."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_global_step
        if best and best < state.global_step and not args.load_best_model_at_end:
            log.info(
                "ended at step %d; %s was best at step %d, %.4f: load_best_model_at_end, with "
                "save_strategy and save_steps as for evaluation, ends with that model",
                state.global_step, args.metric_for_best_model, best, state.best_metric,
            )  # fmt: skip


class _StopOnPlateau(TrainerCallback):
    """Stop when the training loss has not improved for some logs; resumes from the log history."""

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:
            return  # it has been said
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        before, recent = losses[: -self.patience], losses[-self.patience :]
        if before and min(recent) >= min(before) - self.threshold:
            log.info("training loss has not improved for %d logs, stopping", self.patience)
            control.should_training_stop = True
