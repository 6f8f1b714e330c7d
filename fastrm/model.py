"""Reward models: ordinary Hugging Face sequence classifiers whose scalar head can be the loss.

Letters: N groups, M candidates, B x S tokens, T = B·S rows of hidden, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import cached_file

from fastrm import functional
from fastrm.packing import backbone, padding_position

# The losses that a trainer can take, and what of a batch they read.
LOSSES: Mapping[str, tuple[str, ...]] = {
    "listwise": ("offsets", "target", "margin", "teacher_scores", "group_weight"),
    "plackett_luce": ("offsets", "ranks", "group_weight"),
    "bradley_terry": ("offsets", "ranks", "margin", "group_weight"),
}
_WHERE = ("revision", "subfolder", "token", "cache_dir")  # arguments that say which file


@dataclass
class HeadResult:
    """What the head computed inside `fitting`, `scoring` or `reading`."""

    hidden: Tensor = field(init=False)  # (M, D), by `reading` alone
    scores: Tensor = field(init=False)  # (M,) fp32
    loss: Tensor = field(init=False)  # () or (N,), by `fitting` alone


class RewardHead(nn.Linear):
    """The scalar head of a reward model: `nn.Linear(D, 1)` with fp32 scores.

    Inside ``with head.fitting(batch) as result:`` its forward is the fused loss over the
    candidates' rows instead, and the model's own forward, wrapped in whatever way, carries the loss
    out as its logits. So the head never runs over all tokens and no model needs code of its own.
    Where a batch takes several forwards (`fastrm.packing.run`), the last one brings the loss.
    """

    _instead: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def fitting(
        self, batch: Mapping[str, Tensor], before: Tensor | None = None, *,
        loss: str = "listwise", **options: Any,
    ) -> Iterator[HeadResult]:  # fmt: skip
        """Inside, a forward gives a tensor full of the loss of `batch`, and fills the result.

        Args:
            batch: offsets, target, and where there are any rows, ranks, margin, group_weight.
            before: hidden states of the first candidates, where the forward has only the others.
            loss: one of `LOSSES`.
            options: further arguments of that loss.
        """
        result = HeadResult()
        function = getattr(functional, f"{loss}_loss")

        def fit(hidden: Tensor, rows: Tensor | None) -> Tensor:
            if before is not None:
                hidden, rows = torch.cat([before, _chosen(hidden, rows)]), None
            result.loss, result.scores = function(
                hidden, self.weight, self.bias, rows=rows, return_scores=True,
                **loss_columns(loss, batch), **options,
            )  # fmt: skip
            return result.loss

        with self._replaced_by(fit, batch):
            yield result

    @contextmanager
    def scoring(self, batch: Mapping[str, Tensor]) -> Iterator[HeadResult]:
        """Inside, a forward fills the result's scores; what it returns means nothing."""
        result = HeadResult()

        def scores(hidden: Tensor, rows: Tensor | None) -> Tensor:
            result.scores = functional.score(hidden, self.weight, self.bias, rows=rows)
            return result.scores

        with self._replaced_by(scores, batch):
            yield result

    @contextmanager
    def reading(self, batch: Mapping[str, Tensor]) -> Iterator[HeadResult]:
        """As `scoring`, with the hidden states too."""
        result = HeadResult()

        def read(hidden: Tensor, rows: Tensor | None) -> Tensor:
            result.hidden = _chosen(hidden, rows)
            result.scores = functional.score(result.hidden, self.weight, self.bias)
            return result.hidden

        with self._replaced_by(read, batch):
            yield result

    @contextmanager
    def pulling(self, batch: Mapping[str, Tensor], gradient: Tensor) -> Iterator[None]:
        """Inside, a forward gives a tensor full of the scores' product with their `gradient`.

        It differentiates to the gradient of the backbone alone, not to that of the head.
        """

        def pulled(hidden: Tensor, rows: Tensor | None) -> Tensor:
            return functional.score(hidden, self.weight.detach(), rows=rows) @ gradient

        with self._replaced_by(pulled, batch):
            yield

    @contextmanager
    def _replaced_by(
        self, function: Callable[[Tensor, Tensor | None], Tensor], batch: Mapping[str, Any]
    ) -> Iterator[None]:
        """Call `function` with the hidden states and the candidates' rows among them."""
        parts: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            if "splits" in batch:
                parts.append(_last(hidden, batch, sum(map(len, parts))))
                if len(parts) < len(batch["splits"]):
                    return hidden[..., :1]
                found = function(torch.cat(parts), batch["rows"])
            elif "prompt_ids" in batch and not parts:
                parts.append(hidden)
                return hidden[..., :1]
            else:
                found = function(hidden, _rows(hidden, batch))
            return found.sum().expand(*hidden.shape[:-1], 1)

        self._instead = forward
        try:
            yield
        finally:
            self._instead = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self._instead is not None:
            return self._instead(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype), bias)


def loss_columns(loss: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a loss that a batch brings."""
    return {name: batch[name] for name in LOSSES[loss] if name in batch}


def _chosen(hidden: Tensor, rows: Tensor | None) -> Tensor:
    hidden = hidden.flatten(0, -2)
    return hidden if rows is None else hidden[rows]


def _rows(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    if hidden.dim() == 2:  # the model pooled, one row a candidate
        return None
    if "rows" not in batch:
        raise ValueError("batch must have 'rows': this model's head reads every token")
    return batch["rows"]


def _last(hidden: Tensor, batch: Mapping[str, Tensor], start: int) -> Tensor:
    """The hidden states of the sequences from `start` on, one each."""
    if hidden.dim() == 2:
        return hidden
    i = torch.arange(len(hidden), device=hidden.device)
    return hidden[i, batch["last"][start : start + len(hidden)]]


def attach_head(model: nn.Module) -> RewardHead:
    """Make the model's scalar linear layer a `RewardHead` that has the same parameters, in fp32.

    Raises:
        ValueError: the model has no such layer, or several; or it pools where padding may be.
    """
    pooling: Any = model
    if hasattr(model, "sequence_summary") and not is_encoder(pooling):
        raise ValueError(
            f"{type(model).__name__} reads each row at its last position, which is padding in all "
            "but the longest row: its rewards depend on the batch"
        )
    found = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == 1 and "original_module" not in name
    ]
    if len(found) > 1 and hasattr(model, "base_model"):  # a gate of experts has one output too
        inside = set(backbone(model).modules())
        found = [(name, m) for name, m in found if m not in inside] or found
    if len(found) != 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"model must have one linear layer with a single output (num_labels=1), but this "
            f"{type(model).__name__} has {len(found)} such{': ' * bool(names)}{names}; "
            "fastrm.load_reward_model makes one from a path"
        )
    name, linear = found[0]
    if isinstance(linear, RewardHead):
        return linear
    head = RewardHead(linear.in_features, 1, bias=linear.bias is not None, device="meta")
    head.weight, head.bias = linear.weight, linear.bias
    for p in head.parameters():
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    head.train(linear.training)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return head


def load_reward_model(
    name_or_path: str,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "float32",
    **kwargs: Any,
) -> PreTrainedModel:
    """A pretrained backbone with a scalar head, as an ordinary sequence classifier.

    A checkpoint without a head gets one drawn with standard deviation 1/sqrt(D + 1) and bias 0. The
    head is fp32 whatever the backbone is, and so are the scores.

    Args:
        name_or_path: of a causal model, an encoder or a reward model.
        tokenizer: its tokenizer; None loads the one that lies beside the model. Its padding token
            is set where needed, see `set_pad_token`.
        dtype: of the backbone; "auto" takes the checkpoint's. Training in bf16 without fp32 weights
            loses small updates: prefer fp32 here and autocast (`RewardConfig(bf16=True)`).
        kwargs: for `AutoModelForSequenceClassification.from_pretrained`.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, num_labels=1, dtype=dtype, output_loading_info=True, **kwargs
        )
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise ValueError("its head has several labels, or other weights do not fit its config: to "
                         "train a head on its backbone, save that alone, AutoModel.from_pretrained"
                         "(...).save_pretrained(...)") from None  # fmt: skip
    head = attach_head(model)
    name = next(n for n, p in model.named_parameters() if p is head.weight)
    is_new = name in info["missing_keys"]
    if is_new:
        with torch.no_grad():
            head.weight.normal_(std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                head.bias.zero_()
    elif model.dtype not in (torch.float32, torch.float64):
        where = {k: kwargs[k] for k in _WHERE if k in kwargs}
        _reload_head(head, name.removesuffix("weight"), name_or_path, **where)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(name_or_path)
    set_pad_token(model, tokenizer, keep=not is_new)
    if is_new:
        serve_raw(model.config)
    return model


def serve_raw(config: Any) -> None:
    """Say in a config that rewards are not probabilities: pipelines and CrossEncoder then leave
    out the sigmoid that they apply to one label by default.
    """
    config.problem_type = "regression"
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}


def _reload_head(head: RewardHead, prefix: str, name_or_path: str, **where: Any) -> None:
    """Take the head from the checkpoint again: it was rounded to the backbone's dtype."""
    for name, p in head.named_parameters():
        if (stored := stored_tensor(prefix + name, name_or_path, **where)) is not None:
            with torch.no_grad():
                p.copy_(stored)


def stored_tensor(name: str, name_or_path: str, **where: Any) -> Tensor | None:
    """A tensor as a checkpoint has it, or None if it has none of that name.

    Raises:
        OSError: there is no such checkpoint.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        try:
            index = cached_file(name_or_path, f"{whole}.index.json", **where)
            files = json.loads(Path(str(index)).read_text())["weight_map"]
        except OSError:  # one file
            files = {}
        try:
            file = str(cached_file(name_or_path, files.get(name, whole), **where))
        except OSError:
            continue
        if whole.endswith(".bin"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(name)
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name) if name in tensors.keys() else None
    raise OSError(f"{name_or_path} has neither model.safetensors nor pytorch_model.bin")


def set_pad_token(model: PreTrainedModel, tokenizer: Any, keep: bool = True) -> None:
    """Give model and tokenizer the same padding token, one that no text ends in.

    Hugging Face decoders pool the last token that is not padding, so where padding is EOS they
    would miss an EOS at the end. Here that is another token wherever the vocabulary has one that
    texts do not use; otherwise no EOS is appended (`fastrm.data.tokenize_row`).

    Args:
        model: its config is changed.
        tokenizer: changed too.
        keep: whether a padding token that the model already has stays, as a trained one's must.
    """
    config, text = model.config, model.config.get_text_config()
    known = text.pad_token_id is not None and 0 <= text.pad_token_id < len(tokenizer)
    if keep and known:
        token = tokenizer.convert_ids_to_tokens(text.pad_token_id)
    else:
        token = _unused_token(tokenizer)
    if token is None:
        raise ValueError(f"tokenizer must have a padding, unknown or EOS token; "
                         f"{type(tokenizer).__name__} has none")  # fmt: skip
    if tokenizer.pad_token != token:
        tokenizer.pad_token = token
    config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id


def _unused_token(tokenizer: Any) -> str | None:
    taken = (None, tokenizer.eos_token, tokenizer.bos_token)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    named = [t for word in ("pad", "reserved", "unused") for t in special if word in t.lower()]
    for token in (tokenizer.pad_token, *named, tokenizer.unk_token):
        if token not in taken:
            return token
    return tokenizer.pad_token or tokenizer.eos_token


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether the model pools by itself and reads pairs; a decoder is read at its last token."""
    kind = type(model.config)
    return model.config.is_encoder_decoder or (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_MASKED_LM_MAPPING
    )


def token_limit(model: PreTrainedModel, tokenizer: Any, max_length: int | None) -> int | None:
    """The smallest of `max_length` and what the model and its tokenizer can read."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    padding = padding_position(getattr(model, "base_model", None))
    if positions and padding is not None:
        positions -= padding + 1
    limits = [n for n in (max_length, positions, tokenizer.model_max_length) if n and n > 0]
    return min(limits, default=None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of this model to 0; its config keeps them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
