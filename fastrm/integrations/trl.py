"""TRL's `RewardTrainer` on ragged groups: one chosen completion against any number of rejected.

Letters: N groups, M candidates, M x S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastrm.groups import offsets_from_sizes
from fastrm.model import attach_head
from fastrm.trainer import group_stats


class GroupCollator:
    """Tokenised rows as one batch, the candidates of a group in neighbouring rows, chosen first.

    A row is ``{"chosen_ids": ids, "rejected_ids": [ids, ...]}``, or TRL's with one rejected
    ``"rejected_ids": ids``, and may have a margin: one number, or one for each rejected.

    The batch holds input_ids and attention_mask (M, S), offsets (N + 1,), rows (M,), margin (M,)
    where rows have one, and labels (N,), all 0: the position of the chosen one.

    Args:
        pad_token_id: fills rows up. Hugging Face pools the last token that is not padding, so an
            equal token at the end of a candidate is left out here.
        pad_to_multiple_of: S is a multiple of it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        groups = [[e["chosen_ids"], *_rejected(e["rejected_ids"])] for e in examples]
        ids = [torch.tensor(self._read(c)) for group in groups for c in group]
        lengths = torch.tensor([len(c) for c in ids])
        S = -int(-lengths.max() // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        input_ids = torch.nn.functional.pad(
            input_ids, (0, S - input_ids.shape[1]), value=self.pad_token_id
        )
        batch = {
            # By this name, because Trainer counts these over the batches of an optimiser step.
            "labels": torch.zeros(len(groups), dtype=torch.int64),
            "input_ids": input_ids,
            "attention_mask": (torch.arange(S) < lengths[:, None]).long(),
            "offsets": offsets_from_sizes([len(group) for group in groups]),
            "rows": torch.arange(len(ids)) * S + lengths - 1,
        }
        if "margin" in examples[0]:
            margins = [_margin(e["margin"], len(g)) for e, g in zip(examples, groups, strict=True)]
            batch["margin"] = torch.cat(margins)
        return batch

    def _read(self, ids: Sequence[int]) -> Sequence[int]:
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad_token_id:
            end -= 1
        return ids[:end]


class ListwiseRewardTrainer(trl.RewardTrainer):
    """`trl.RewardTrainer` with fastrm's fused listwise loss.

    Data is TRL's, ``prompt?, chosen, rejected, margin?``, and `rejected` may be a list of any
    number of completions. With one rejected loss, gradients and logs are TRL's own. With more,
    accuracy is the share of groups whose chosen one has strictly the highest reward and margin the
    chosen reward minus the highest other; `center_rewards_coefficient` is that of
    `fastrm.listwise_loss`. A step's gradient is that of the mean over all its groups, however they
    were cut into micro-batches and devices.

    The model's head is replaced by a `fastrm.model.RewardHead` that has the same parameters.

    Args:
        model, args, kwargs: as for `trl.RewardTrainer`. `compute_metrics` is refused: what a model
            returns here is no (N, 2) rewards; the metrics above are logged without it.
        data_collator: in place of `GroupCollator`.
    """

    args: trl.RewardConfig
    model: PreTrainedModel
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: trl.RewardConfig | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics must be None: groups are ragged, and accuracy, "
                             "margin and rewards are logged without it")  # fmt: skip
        super().__init__(model, args, data_collator, **kwargs)
        self.head = attach_head(self.model)
        self.model_accepts_loss_kwargs = True  # so that the groups of a step are counted
        if data_collator is None:
            tokenizer: Any = self.processing_class
            multiple: Any = self.args.pad_to_multiple_of  # TRL has made a number of its "auto"
            self.data_collator = GroupCollator(tokenizer.pad_token_id, multiple)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: trl.RewardConfig, dataset_name: str
    ) -> Any:
        """Tokenise as TRL does, where `rejected` is a list; leave out what is too long whole."""
        first = next(iter(dataset))
        if "chosen_ids" in first or not _is_list_of_completions(first["rejected"]):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        is_stream = isinstance(dataset, IterableDataset)
        options = {} if is_stream else {"num_proc": args.dataset_num_proc}
        dataset = dataset.map(_tokenized, fn_kwargs={"tokenizer": processing_class}, **options)
        if args.max_length is not None:
            dataset = dataset.filter(
                lambda e: max(map(len, [e["chosen_ids"], *e["rejected_ids"]])) <= args.max_length,
                **options,
            )
        return dataset

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over the groups of this micro-batch / number of groups of the optimiser step."""
        batch: dict[str, Tensor] = {
            name: inputs.pop(name) for name in ("offsets", "rows", "margin") if name in inputs
        }
        batch["target"] = inputs.pop("labels")
        options: dict[str, Any] = {
            "center_coef": self.args.center_rewards_coefficient or 0.0,
            "num_items_in_batch": num_items_in_batch,
        }
        with self.head.fitting(batch, **options) as result:
            outputs = model(**inputs, use_cache=False)
        loss = outputs.logits.flatten()[0]
        self._note(result.scores, batch, inputs["attention_mask"])
        if num_items_in_batch is not None:
            # Data parallelism averages gradients over processes where this needs their sum.
            loss = loss * self.accelerator.num_processes
        return (loss, {"rewards": result.scores}) if return_outputs else loss

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("use fastrm.evaluate.score_rows for the rewards of rows")

    @torch.no_grad()
    def _note(self, scores: Tensor, batch: Mapping[str, Tensor], attention_mask: Tensor) -> None:
        """TRL's metrics of a batch."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        _, _, _, pairs, margin, *_ = group_stats(scores, batch).double().T
        sums = torch.stack([(margin > 0).sum(), margin.sum(), pairs.sum(), scores.sum().double(),
                            pairs.new_tensor(len(scores)), attention_mask.sum()])  # fmt: skip
        sums = self.accelerator.reduce(sums, reduction="sum")
        ends = self.accelerator.gather(torch.stack([scores.min(), scores.max()])).tolist()
        accurate, margins, n, rewards, M, tokens = sums.tolist()
        if self.model.training:
            self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]
        found = {"min_reward": min(ends), "mean_reward": rewards / M, "max_reward": max(ends),
                 "accuracy": accurate / max(n, 1), "margin": margins / max(n, 1)}  # fmt: skip
        for name, value in found.items():
            metrics[name].append(value)


def _rejected(ids: Sequence[Any]) -> Sequence[Sequence[int]]:
    return ids if not ids or isinstance(ids[0], Sequence) else [ids]


def _margin(margin: float | Sequence[float], K: int) -> Tensor:  # (K,)
    found = torch.as_tensor(margin, dtype=torch.float32)
    if found.dim() and len(found) != K - 1:
        raise ValueError(f"margin must be a number, or {K - 1}, one a rejected, got {margin}")
    return torch.cat([found.new_zeros(1), found.expand(K - 1)])


def _is_list_of_completions(rejected: Any) -> bool:
    """Of texts or of message lists; not one text or one message list."""
    return isinstance(rejected, list) and not (rejected and isinstance(rejected[0], dict))


def _tokenized(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}

    def ids(completion: Any) -> list[int]:
        full = completion if row.get("prompt") is None else row["prompt"] + completion
        if isinstance(full, str):
            end = "" if full.endswith(tokenizer.eos_token) else tokenizer.eos_token
            return tokenizer(text=full + end)["input_ids"]
        return tokenizer.apply_chat_template(full, return_dict=True, **options)["input_ids"]

    return {"chosen_ids": ids(row["chosen"]), "rejected_ids": [ids(r) for r in row["rejected"]]}
