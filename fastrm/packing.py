"""Layouts: which tokens of a batch lie where in the rows that the backbone reads.

padded: every candidate in a row of its own, as long as the longest.
split:  the same in a few forwards, each of sequences of similar length.
packed: sequences one after another in a row, positions from 0 again, none reads another.
shared: a prompt once and its candidates as branches, each of which reads the prompt and itself.
cached: all prompts, then all answers against the keys and values of their prompts; for models that
        take neither positions nor a mask of their own.

All give the same hidden states. Letters: N groups, M candidates, B rows of L tokens, D hidden size.
"""

from __future__ import annotations

import heapq
import inspect
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

LAYOUTS = ("padded", "split", "packed", "shared", "cached")
SPLITS = 4  # forwards of a batch at most
# Of a batch, for the loss.
GROUP_KEYS = ("offsets", "target", "ranks", "margin", "teacher_scores", "group_weight")
_PLACES = ("rows", "last", "first", "splits", "ends", "prompt_ids", "prompt_mask", "prompt")
_CACHES = ("cache", "past_key_values")  # what models call it since transformers 5.24, and before

log = logging.getLogger("fastrm")


class LayoutError(ValueError):
    """The layout that was asked for cannot be used; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What a batch costs, in tokens: B rows of L tokens take B·L·(1 + pair·L), a forward `forward`.

    The linear layers of a transformer take about 24·D² operations a token, attention 4·D more for
    each token it reads, at a fraction of the speed.
    """

    pair: float = 0.0
    forward: float = 0.0
    varlen: bool = False  # attention reads where sequences begin, not a mask

    @classmethod
    def of(cls, model: Any) -> Cost:
        from transformers.utils.generic import is_flash_attention_requested

        config = model.config.get_text_config()
        slower = 2.0  # than a matrix product, as measured on a CPU for D from 256 to 1024
        # Measured on a CPU only; on a GPU, roughly the tokens that take as long as the launches.
        forward = 48.0 if model.device.type == "cpu" else 4096.0
        varlen = is_flash_attention_requested(config)
        return cls(slower / (6 * config.hidden_size), forward, varlen)

    def rows(self, B: Any, L: Any) -> Any:
        return B * L * (1 + self.pair * L)


@dataclass(frozen=True)
class Plan:
    """A batch in one layout, before it is built."""

    layout: str
    tokens: int  # the backbone computes
    cost: float
    build: Callable[[int], dict[str, Any]]  # from the padding token to the batch


def plan(
    examples: Sequence[Any], layouts: Sequence[str], cost: Cost, last_token: bool = True
) -> Plan:
    """The cheapest of `layouts` for a batch of tokenised groups.

    Its batch has input_ids, what else the model reads, and where the head finds the candidates:
    rows (M,), candidate i is row `rows[i]` of the hidden states, unless the model pools; where it
    does and a row holds several candidates, first (M,), the places of their first tokens.
    """
    makers = {"padded": _padded, "split": _split, "packed": _packed, "shared": _shared,
              "cached": _cached}  # fmt: skip
    plans = [makers[name](examples, cost, last_token) for name in layouts]
    # Padded needs no mask where nothing is padded, so that others must save something.
    return min(plans, key=lambda p: p.cost * (0.97 if p.layout == "padded" else 1))


def _padded(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    sequences, types = _sequences(examples)
    M, S = len(sequences), max(map(len, sequences))

    def build(pad: int) -> dict[str, Any]:
        batch = _pad(sequences, types, pad)
        if last_token:
            batch["rows"] = torch.tensor([i * S + len(s) - 1 for i, s in enumerate(sequences)])
        return batch

    return Plan("padded", M * S, cost.rows(M, S) + cost.forward, build)


def _split(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    sequences, types = _sequences(examples)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    lengths = [len(sequences[i]) for i in order]
    cuts, total = _cut(lengths, cost)
    splits = tuple((cut, lengths[cut - 1]) for cut in cuts)

    def build(pad: int) -> dict[str, Any]:
        batch = _pad([sequences[i] for i in order], types and [types[i] for i in order], pad)
        batch["splits"] = splits
        batch["rows"] = torch.tensor(order).argsort()
        if last_token:
            batch["last"] = torch.tensor(lengths) - 1
        return batch

    starts = (0, *cuts)
    tokens = sum((cut - a) * n for a, (cut, n) in zip(starts, splits, strict=False))
    return Plan("split", tokens, total, build)


def _cut(lengths: Sequence[int], cost: Cost) -> tuple[list[int], float]:
    """Where to cut ascending lengths into at most SPLITS parts so that their sum costs least."""
    ends = [i for i in range(1, len(lengths)) if lengths[i] > lengths[i - 1]] + [len(lengths)]
    end, longest = np.array([0, *ends]), np.array([0, *(lengths[i - 1] for i in ends)])
    # part[j, i]: sequences from end j up to end i in one forward
    part = cost.rows((end[None] - end[:, None]).astype(float), longest[None]) + cost.forward
    part[np.tril_indices(len(end))] = np.inf
    best, came_from = part[0], []
    totals = [best[-1]]
    for _ in range(SPLITS - 1):
        sums = best[:, None] + part
        came_from.append(sums.argmin(0))
        best = sums.min(0)
        totals.append(best[-1])
    parts = int(np.argmin(totals))
    i, cuts = len(end) - 1, [len(lengths)]
    for step in reversed(came_from[:parts]):
        i = int(step[i])
        cuts.append(int(end[i]))
    return cuts[::-1], float(totals[parts])


def _packed(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    if cost.varlen:
        return _one_row(examples, cost, last_token)
    sequences, types = _sequences(examples)
    return _in_rows("packed", [_unit([ids], 0) for ids in sequences], cost, last_token, types)


def _one_row(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    sequences, types = _sequences(examples)
    lengths = np.array([len(ids) for ids in sequences])

    def build(pad: int) -> dict[str, Any]:
        starts = torch.from_numpy(np.append(0, lengths.cumsum()))
        positions = np.concatenate([np.arange(n) for n in lengths])
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(sequences)).long()[None],
            "position_ids": torch.from_numpy(positions)[None],
            **({"rows": starts[1:] - 1} if last_token else {"first": starts[:-1]}),
        }
        if types is not None:
            batch["token_type_ids"] = torch.from_numpy(np.concatenate(types)).long()[None]
        starts, longest = starts.int(), int(lengths.max())
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        return batch | {"max_length_q": longest, "max_length_k": longest}

    total = float(cost.rows(1, lengths).sum()) + cost.forward
    return Plan("packed", int(lengths.sum()), total, build)


def _shared(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    return _in_rows("shared", [_unit(e["input_ids"], e["prompt_length"]) for e in examples], cost)


def _cached(examples: Sequence[Any], cost: Cost, last_token: bool) -> Plan:
    # An answer has at least one token: where one is empty, the prompt's last goes to all answers.
    cuts = [min(e["prompt_length"], *(len(i) - 1 for i in e["input_ids"])) for e in examples]
    prompts = [e["input_ids"][0][:P] for e, P in zip(examples, cuts, strict=True)]
    answers = [ids[P:] for e, P in zip(examples, cuts, strict=True) for ids in e["input_ids"]]
    N, P, M, R = len(prompts), max(1, *cuts), len(answers), max(map(len, answers))

    def build(pad: int) -> dict[str, Any]:
        batch = _pad(answers, None, pad)
        prompt = torch.tensor([n for n, e in enumerate(examples) for _ in e["input_ids"]])
        ids = torch.full((N, P), pad)
        mask = torch.arange(P) >= P - torch.tensor(cuts)[:, None]
        ids[mask] = torch.from_numpy(np.concatenate(prompts)).long()
        batch |= {"prompt_ids": ids, "prompt_mask": mask.long(), "prompt": prompt}
        batch["attention_mask"] = torch.cat([mask[prompt], batch["attention_mask"]], 1)
        batch["rows"] = torch.tensor([i * R + len(a) - 1 for i, a in enumerate(answers)])
        return batch

    total = cost.rows(N, P) + M * R * (1 + cost.pair * (P + R)) + 2 * cost.forward
    return Plan("cached", N * P + M * R, total, build)


@dataclass(frozen=True)
class _Unit:
    """n tokens that lie in one row: a prompt and the branches that read it."""

    ids: np.ndarray  # (n,)
    positions: np.ndarray  # (n,)
    ends: np.ndarray  # (n,) token j is read by the tokens from j up to ends[j], exclusive
    last: np.ndarray  # each candidate's last token


def _unit(sequences: Sequence[np.ndarray], prompt: int) -> _Unit:
    lengths = np.array([len(ids) - prompt for ids in sequences])
    ends = prompt + np.cumsum(lengths)
    return _Unit(
        np.concatenate([sequences[0][:prompt], *(ids[prompt:] for ids in sequences)]),
        np.concatenate([np.arange(prompt), *(np.arange(prompt, prompt + n) for n in lengths)]),
        np.concatenate([np.full(prompt, ends[-1]), np.repeat(ends, lengths)]),
        np.where(lengths > 0, ends, prompt) - 1,
    )


def _in_rows(
    layout: str, units: Sequence[_Unit], cost: Cost, last_token: bool = True,
    types: Sequence[np.ndarray] | None = None,
) -> Plan:  # fmt: skip
    places, B, L = _fill([len(u.ids) for u in units], cost)

    def build(pad: int) -> dict[str, Any]:
        ids = np.full((B, L), pad)
        positions = np.zeros((B, L), dtype=np.int64)
        ends = np.tile(np.arange(1, L + 1), (B, 1))  # what fills a row up reads itself
        token_types = np.zeros((B, L), dtype=np.int64)
        rows = []
        for i, (unit, (b, start)) in enumerate(zip(units, places, strict=True)):
            here = slice(start, start + len(unit.ids))
            ids[b, here], positions[b, here] = unit.ids, unit.positions
            ends[b, here] = unit.ends + start
            if types is not None:
                token_types[b, here] = types[i]
            rows.append((unit.last if last_token else 0) + b * L + start)
        found = {"input_ids": ids, "position_ids": positions, "ends": ends}
        if types is not None:
            found["token_type_ids"] = token_types
        found["rows" if last_token else "first"] = np.hstack(rows)
        return {name: torch.from_numpy(x) for name, x in found.items()}

    return Plan(layout, B * L, cost.rows(B, L) + cost.forward, build)


def _fill(lengths: Sequence[int], cost: Cost) -> tuple[list[tuple[int, int]], int, int]:
    """The row and start of each unit, the number of rows and their length.

    The longest unit first, each to the emptiest row, for several numbers of rows: few waste little
    at the end of rows, many keep attention short.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best, lowest = None, float("inf")
    B = min(len(lengths), 2 * (sum(lengths) // max(lengths)) + 1)
    while B:
        rows = [(0, b) for b in range(B)]
        places = [(0, 0)] * len(lengths)
        for i in order:
            start, b = rows[0]
            places[i] = (b, start)
            heapq.heapreplace(rows, (start + lengths[i], b))
        L = max(rows)[0]
        if cost.rows(B, L) < lowest:
            best, lowest = (places, B, L), cost.rows(B, L)
        B = min(B - 1, int(B / 1.2))
    assert best is not None
    return best


def _sequences(examples: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    ids = [ids for e in examples for ids in e["input_ids"]]
    types = [t for e in examples for t in e["token_type_ids"] or ()]
    return ids, types or None


def _pad(
    sequences: Sequence[np.ndarray], types: Sequence[np.ndarray] | None, pad: int
) -> dict[str, Any]:
    lengths = np.array([len(ids) for ids in sequences])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(real.shape, pad, dtype=np.int64)
    ids[real] = np.concatenate(sequences)
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real).long()}
    if types is not None:
        token_types = np.zeros(real.shape, dtype=np.int64)
        token_types[real] = np.concatenate(types)
        batch["token_type_ids"] = torch.from_numpy(token_types)
    return batch


def to_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def run(model: Any, batch: Mapping[str, Any], config: Any) -> Any:
    """The outputs of the model's forward over a batch; of the last one where there are several.

    Args:
        model: a sequence classifier, wrapped in whatever way.
        batch: of any layout.
        config: the model's.
    """
    inputs = {name: x for name, x in batch.items() if name not in GROUP_KEYS + _PLACES}
    forward = model
    if config.get_text_config()._attn_implementation == "flex_attention":
        # On a GPU its other kernel, for short rows, does not compile where their length changes.
        forward = partial(model, kernel_options={"BACKEND": "TRITON"})
    if "splits" in batch:
        starts = (0, *(end for end, _ in batch["splits"]))
        parts = [
            {name: x[start:end, :length] for name, x in inputs.items()}
            for start, (end, length) in zip(starts, batch["splits"], strict=False)
        ]
        # All at once: the gradient of a look-up is as large as the vocabulary. Decoders want ids.
        if "last" not in batch and (table := _table(model)) is not None:
            ids = [part.pop("input_ids") for part in parts]
            found = table(torch.cat([x.flatten() for x in ids])).split([x.numel() for x in ids])
            padding = padding_position(backbone(model))
            for part, x, embedded in zip(parts, ids, found, strict=True):
                part["inputs_embeds"] = embedded.view(*x.shape, -1)
                if padding is not None:
                    part["position_ids"] = _counted(x, torch.zeros_like(x), padding)
        for part in parts:
            outputs = forward(**part)
        return outputs
    if "prompt_ids" in batch:
        prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
        outputs = forward(**prompts, use_cache=True)
        name = next(name for name in _CACHES if name in outputs)
        outputs[name].batch_select_indices(batch["prompt"])
        inputs |= {name: outputs[name], "use_cache": True}
    base, pools = backbone(model), "first" in batch
    if "ends" in batch:
        inputs["attention_mask"] = tree_mask(
            config, batch["ends"], batch["position_ids"], base.dtype, pools
        )
    if not pools:
        return forward(**inputs)
    if (padding := padding_position(base)) is not None:
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        begins = torch.arange(ids.shape[1], device=ids.device) - positions
        inputs["position_ids"] = _counted(ids, begins, padding)
    with _pooling_at(base, batch["first"]):
        return forward(**inputs)


@contextmanager
def _pooling_at(base: Any, first: Tensor) -> Iterator[None]:
    """Inside, a model that reads the first token of each row reads those at `first` (M,)."""

    def read(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[first][:, None]

    def before(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (read(*args),)

    def after(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state = read(output.last_hidden_state)

    if getattr(base, "pooler", None) is not None:
        hook = base.pooler.register_forward_pre_hook(before)
    else:
        hook = base.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def padding_position(base: Any) -> int | None:
    """Of RoBERTa and its kin: the id and the position of padding, from which positions count on."""
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    return getattr(table, "padding_idx", None)


def _counted(ids: Tensor, begins: Tensor, padding: int) -> Tensor:
    """The positions that those models give: a padding token in a text has padding's, and does not
    count; begins (B, L), where a token's sequence begins.
    """
    real = ids != padding
    before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # of those before a place
    return padding + (before[:, 1:] - before.gather(1, begins)) * real


def _table(model: Any) -> torch.nn.Embedding | None:
    """The model's word vectors, where they train and it takes them looked up."""
    table = getattr(model, "module", model).get_input_embeddings()  # inside of a DDP wrapper
    trains = torch.is_grad_enabled() and type(table) is torch.nn.Embedding
    if not trains or not table.weight.requires_grad or "inputs_embeds" not in _takes(model):
        return None
    return table


def _takes(model: Any) -> Mapping[str, Any]:
    """The arguments of the model's backbone."""
    return inspect.signature(backbone(model).forward).parameters


def backbone(model: Any) -> Any:
    """The model's backbone."""
    model = getattr(model, "module", model)
    return getattr(model, "get_base_model", lambda: model)().base_model  # inside of PEFT's wrapper


def tree_mask(
    config: Any,
    ends: Tensor,  # (B, L)
    positions: Tensor,  # (B, L)
    dtype: torch.dtype = torch.float32,
    both_ways: bool = False,
) -> Any:
    """The mask that the model's attention takes, a dict of them where it has kinds of layers."""
    config = config.get_text_config()
    make = _MASKS[config._attn_implementation]
    places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    begins = places - positions if both_ways else places
    masks = {
        kind: make(begins, ends, positions, window) for kind, window in _windows(config).items()
    }
    if make is _additive_mask:
        masks = {kind: mask.to(dtype) for kind, mask in masks.items()}
    return masks.get(None, masks)


def _windows(config: Any) -> dict[str | None, int | None]:
    """The sliding window of each kind of layer; the only kind is None where layers are alike."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {None: window}
    return {kind: window if kind == "sliding_attention" else None for kind in set(kinds)}


def _reads(
    begins: Tensor, ends: Tensor, positions: Tensor, window: int | None
) -> Callable[..., Tensor]:
    """Whether query q of row b reads key k, as a mask function of FlexAttention."""

    def reads(b: Tensor, head: Any, q: Tensor, k: Tensor) -> Tensor:
        found = (begins[b, k] <= q) & (q < ends[b, k])
        return found if window is None else found & (positions[b, q] - positions[b, k] < window)

    return reads


def _bool_mask(
    begins: Tensor, ends: Tensor, positions: Tensor, window: int | None
) -> Tensor:  # (B, 1, L, L)
    b, q = (torch.arange(n, device=ends.device) for n in ends.shape)
    return _reads(begins, ends, positions, window)(b[:, None, None, None], 0, q[:, None], q)


def _additive_mask(begins: Tensor, ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
    # Eager attention adds its mask to the scores: a bool one would be added as 0 and 1.
    return torch.where(_bool_mask(begins, ends, positions, window), 0.0, -torch.inf)


def _block_mask(begins: Tensor, ends: Tensor, positions: Tensor, window: int | None) -> Any:
    """From what ends where in each block of tokens: (L / 128)² numbers, where a mask takes L²."""
    from torch.nn.attention.flex_attention import BlockMask

    L, size = ends.shape[1], 128  # of a block, as create_block_mask has it
    n = -(-L // size)  # blocks
    inside = torch.arange(n * size, device=ends.device).clamp(max=L - 1)
    blocks = [x[:, inside].unflatten(1, (n, size)) for x in (begins, ends, positions)]
    least, most = ([x.amin(2) for x in blocks], [x.amax(2) for x in blocks])
    first = torch.arange(n, device=ends.device)[:, None] * size  # of a block of queries
    last = (first + size).clamp(max=L) - 1
    some = (least[0][:, None] <= last) & (most[1][:, None] > first)  # (B, Q, K)
    full = (most[0][:, None] <= first) & (least[1][:, None] > last)
    whole = first + size <= L
    full = full & whole & whole[:, 0]
    if window is not None:
        some = some & (least[2][:, :, None] - most[2][:, None] < window)
        full = full & (most[2][:, :, None] - least[2][:, None] < window)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:  # (B, 1, Q) how many, (B, 1, Q, K) which
        order = which.int().argsort(dim=-1, descending=True, stable=True)
        return which.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    reads = _reads(begins, ends, positions, window)
    return BlockMask.from_kv_blocks(*listed(some & ~full), *listed(full), size, reads, (L, L))


# In a config, a window that is not `sliding_window` and that a tiny batch does not fill.
_OTHER_WINDOWS = ("window_size", "chunk_size", "local_attention")
_MASKS = {"sdpa": _bool_mask, "eager": _additive_mask, "flex_attention": _block_mask}


def refusals(model: Any, pools: bool) -> dict[str, str]:
    """The layouts that a model cannot run and why, as far as its config and signature tell.

    Args:
        model: a sequence classifier.
        pools: whether it pools by itself, as encoders do.
    """

    takes, config = _takes(model), model.config.get_text_config()
    attention, windows = config._attn_implementation, _windows(config)
    found: dict[str, str] = {}

    def refuse(why: str, *layouts: str) -> None:
        for layout in layouts:
            found.setdefault(layout, why)

    if pools:
        refuse("reads both ways", "shared", "cached")
    for kind in set(windows) - {None, "full_attention", "sliding_attention"}:
        refuse(f"has layers of kind {kind}", "packed", "shared", "cached")
    for name, value in vars(config).items():
        if name.endswith(_OTHER_WINDOWS) and isinstance(value, int) and value:
            refuse(f"reads by {name}, a distance in the row", "packed", "shared", "cached")
    if "position_ids" not in takes:
        refuse("takes no position_ids", "packed", "shared")
    if attention not in _MASKS:
        why = f"takes no mask with {attention} attention"
        refuse(why, "shared", *(() if Cost.of(model).varlen else ("packed",)))
    if pools and any(windows.values()):
        refuse("reads a window both ways", "packed")
    if any(windows.values()) or takes.keys().isdisjoint(_CACHES):
        refuse("keeps no cache of a whole prompt", "cached")
    return found


def disagreement(
    model: Any, head: Any, layout: str, gradients: bool = True, pools: bool = False
) -> str | None:
    """How a tiny batch differs from the same one padded, if by more than rounding.

    Args:
        model: with its real weights; read in evaluation mode, so without dropout.
        head: its `RewardHead`.
        layout: to compare.
        gradients: whether to compare those of all parameters that train, not only hidden states.
        pools: whether the model pools by itself, as encoders do.
    """
    if layout == "padded" or (layout == "split" and not pools):
        return None  # nothing but the model's own forward on a padded batch
    lengths = ((3, (3, 2)), (2, (1, 4, 2)))  # of each group's prompt and its answers
    pad = getattr(model.config, "pad_token_id", None) or 0
    vocabulary = model.config.get_text_config().vocab_size
    ids = (np.arange(64) * 7919 + 1) % vocabulary
    examples = [
        {"input_ids": [np.append(ids[:P], ids[9 * k :][:n]) for k, n in enumerate(answers, 1)],
         "token_type_ids": None, "prompt_length": P}
        for P, answers in lengths
    ]  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        cost = Cost(varlen=Cost.of(model).varlen)  # all in one row
        expected, found = (
            _probe(model, head, plan(examples, [name], cost, not pools).build(pad), gradients)
            for name in ("padded", layout)
        )
    except Exception as error:  # whatever a model makes of a mask that it does not know
        return f"fails with {type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    kind = model.device.type
    amp = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if amp else expected[0].dtype
    rounding = max(torch.finfo(t).eps for t in (dtype, torch.float32)) ** 0.5
    # SmolLM2 in bf16 (rounding 0.09): 0.02 and 0.07 where all is right, 0.3 and 0.4 without a mask.
    limits = {"hidden states": rounding, "gradients": 3 * rounding}
    for (what, limit), a, b in zip(limits.items(), expected, found, strict=False):
        difference = float((b - a).norm() / a.norm())
        if not difference <= limit:
            return f"has other {what} (by {difference:.1e}, rounding is below {limit:.0e})"
    return None


def _probe(
    model: Any, head: Any, batch: Mapping[str, Any], gradients: bool
) -> tuple[Tensor, ...]:
    """Hidden states of the candidates, and the gradients of a fixed function of them."""
    batch = to_device(batch, model.device)
    with torch.set_grad_enabled(gradients), head.reading(batch) as result:
        run(model, batch, model.config)
    hidden = result.hidden
    if not hidden.requires_grad:
        return (hidden,)
    weights = torch.arange(hidden.numel(), device=hidden.device).cos().to(hidden.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(hidden.flatten() @ weights, trained, materialize_grads=True)
    # Some thousand elements of each are enough, and a second copy of a large model's is too much.
    sample = [g.flatten()[:: max(1, g.numel() // 4096)].float() for g in found]
    return hidden.detach(), torch.cat(sample)


def usable(
    model: Any,
    head: Any,
    pools: bool,
    layout: str = "auto",
    *,
    refused: Mapping[str, str] | None = None,
    gradients: bool = True,
) -> tuple[list[str], dict[str, str]]:
    """The layouts in which a model gives the same results, and why it is not the others.

    Args:
        model: with its real weights.
        head: its `RewardHead`.
        pools: whether the model pools by itself, as encoders do.
        layout: the only one to consider, or auto.
        refused: layouts that cannot be used, and why, for other reasons than the model.
        gradients: whether to compare gradients too.

    Raises:
        LayoutError: the only layout to consider cannot be used.
    """
    if layout not in ("auto", *LAYOUTS):
        raise LayoutError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    name = type(model).__name__
    whys = {**refusals(model, pools), **(refused or {})}
    layouts = []
    for wanted in LAYOUTS if layout == "auto" else [layout]:
        if layout == "auto" and wanted == "cached" and "shared" in layouts:
            continue
        if wanted not in whys and (why := disagreement(model, head, wanted, gradients, pools)):
            whys[wanted] = why
            if layout == "auto":
                log.warning("layout %s is not used: in it %s %s", wanted, name, why)
        if wanted not in whys:
            layouts.append(wanted)
    if not layouts:
        raise LayoutError(f"layout {layout} cannot be used: {name} {whys[layout]}")
    return layouts, whys if layout == "auto" else {}


def describe(
    examples: Sequence[Any], batch_size: int, layouts: Sequence[str], cost: Cost, last_token: bool
) -> str:
    """The layouts that a sample of batches would have, and the tokens of an epoch."""
    sample = random.Random(0).sample(list(examples), min(len(examples), 1024))
    batches = [sample[i : i + batch_size] for i in range(0, len(sample), batch_size)]
    plans = [plan(batch, layouts, cost, last_token) for batch in batches]
    used = Counter(p.layout for p in plans).most_common()
    names = " and ".join(f"{name} in {n} of {len(plans)} batches" for name, n in used)
    padded = sum(plan(batch, ["padded"], cost, last_token).tokens for batch in batches)
    names = used[0][0] if len(used) == 1 else names
    scale = len(examples) / len(sample)
    tokens = sum(p.tokens for p in plans) * scale
    return f"layout {names}: {tokens:.0f} tokens computed an epoch, padded {padded * scale:.0f}"
