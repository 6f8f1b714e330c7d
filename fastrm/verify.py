"""Train = serve: whether every reader of a saved model gives the rewards that fastrm gives.

The same texts go through fastrm, `AutoModelForSequenceClassification`, `transformers.pipeline` and
sentence-transformers' `CrossEncoder`. Letters: N groups, M candidates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from fastrm.data import DataError, row_texts, tokenize_row
from fastrm.evaluate import score_rows
from fastrm.model import (
    attach_head,
    is_encoder,
    load_reward_model,
    stored_tensor,
    token_limit,
)

Row = Mapping[str, Any]
TOLERANCE = 1e-5  # times the largest reward where that is above 1
DTYPES = ("float32", "bfloat16")
PADDINGS = (("none", 1), ("right", 8), ("left", 8))  # and the batch size
GROUPS = 32
ROWS: tuple[Row, ...] = (  # candidates of very different lengths, so that a batch has padding
    {"prompt": "What is 2 + 2?", "candidates": [" 4", " 22", " It is five, I think."]},
    {
        "prompt": "Name the capital of France.",
        "candidates": [
            " Paris.",
            " The capital of France is Paris, which lies on the Seine.",
            " No.",
            " It might be Lyon.",
        ],
    },
    {"prompt": "Hello!", "candidates": [" Hello! How can I help?", " Hi."]},
)


@dataclass(frozen=True)
class Form:
    """How a prompt and a candidate go, as a pair of texts, to a reader that tokenises by itself."""

    special: bool  # whether the tokenizer adds its special tokens
    begin: str  # what the tokenizer would leave out before a pair, such as BOS
    eos: str  # what ends a candidate that the tokenizer would leave without

    def inputs(self, prompt: str, candidate: str) -> dict[str, str]:
        """The tokenizer's arguments."""
        end = "" if self.eos and candidate.endswith(self.eos) else self.eos
        return {"text": self.begin + prompt, "text_pair": candidate + end}

    def __str__(self) -> str:
        begin = f"{self.begin!r} + " if self.begin else ""
        end = f" + {self.eos!r}" if self.eos else ""
        text = f"({begin}prompt, candidate{end})"
        return text if self.special else f"{text} with add_special_tokens=False"


def serving_form(tokenizer: Any, rows: Sequence[Row], pairs: bool) -> tuple[Form, int]:
    """The first form that gives the tokens of training most often, and for how many candidates.

    Args:
        tokenizer: of the model.
        rows: rows that fit the model.
        pairs: whether the model is an encoder, see `fastrm.data.tokenize_row`.
    """
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    ends = ["", eos] if not pairs and eos and eos != pad else [""]
    begins = ["", tokenizer.bos_token] if not pairs and tokenizer.bos_token else [""]
    forms = [
        Form(special, begin, end) for special in (True, False) for begin in begins for end in ends
    ]
    wanted = texts(tokenizer, rows, pairs)

    def same(form: Form) -> int:
        return sum(
            tokenizer(**form.inputs(t.prompt, t.candidate), add_special_tokens=form.special)[
                "input_ids"
            ] == t.ids
            for t in wanted
        )  # fmt: skip

    best = max(forms, key=same)
    return best, same(best)


class Text(NamedTuple):
    """A prompt with one candidate, and the tokens of it in training."""

    prompt: str
    candidate: str
    ids: list[int]
    types: list[int] | None


def texts(tokenizer: Any, rows: Sequence[Row], pairs: bool) -> list[Text]:
    """Each of the M candidates of the rows."""
    found = []
    for row in rows:
        example = tokenize_row(tokenizer, dict(row), None, pairs)
        assert example is not None  # without a limit every row fits
        prompt, candidates, _ = row_texts(tokenizer, dict(row))
        types = example["token_type_ids"]
        for k, candidate in enumerate(candidates):
            ids = example["input_ids"][k].tolist()
            found.append(Text(prompt, candidate, ids, None if types is None else types[k].tolist()))
    return found


def verify(path: str, rows: Sequence[Row] | None = None) -> dict[str, Any]:
    """Compare the readers of a saved model.

    Args:
        path: folder or hub name of a sequence classifier with one label.
        rows: rows, see `fastrm.data`; they need no `best`. The first 32 that fit the model without
            a cut are read. None: a few of our own.

    Returns:
        model, groups, candidates, form (how a text goes to readers that tokenise by themselves),
        tolerance, agree, and
        readers: dicts of reader, dtype, padding, batch_size, and difference, the largest from the
            rewards of fastrm in fp32 one group at a time; ties, the share of pairs of candidates of
            one group that differ there and tie here; best_changed, the share of groups with another
            highest candidate; or error in place of these three. counts says whether the entry
            counts for `agree`: those in fp32 that pad on the tokenizer's own side.
        findings: dicts of name, error (or it is a note), difference (None if not measured), what
            and do.

    Raises:
        ValueError: the model has several labels.
        DataError: no row fits.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    ours = AutoTokenizer.from_pretrained(path)  # padded as the model's config says
    model = load_reward_model(path, tokenizer=ours)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type]
    pairs = is_encoder(model)
    rows = _fitting(ours, rows or ROWS, token_limit(model, ours, None), pairs)
    form, same = serving_form(ours, rows, pairs)
    data = _Data(rows, texts(ours, rows, pairs), form)
    exact = score_rows(model, ours, rows, batch_size=1, layout="padded")
    data.rewards = np.concatenate([np.asarray(s, np.float64) for s in exact])
    scale = max(1.0, float(np.abs(data.rewards).max()))
    tolerance = TOLERANCE * scale

    readers: list[dict[str, Any]] = []
    sigmoid: dict[str, float] = {}
    raw = None
    for dtype in DTYPES:
        plain = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype)
        ).eval().to(device)  # fmt: skip
        raw = raw or plain
        ran: list[tuple[str, Callable[[str, int], Any]]] = [
            ("fastrm", _fastrm(path, ours, dtype, device, data)),
            ("AutoModel", _direct(plain, tokenizer, data)),
            ("pipeline", _pipeline(plain, tokenizer, data, sigmoid)),
        ]
        if importlib.util.find_spec("sentence_transformers") is not None:
            ran.append(("CrossEncoder", _cross_encoder(path, dtype, device, data, sigmoid)))
        for reader, read in ran:
            for side, size in PADDINGS:
                if reader == "fastrm" and side == "left":
                    continue  # it pads right, always
                counts = dtype == "float32" and (
                    reader == "fastrm" or side in ("none", tokenizer.padding_side)
                )
                entry = {"reader": reader, "dtype": dtype, "padding": side,
                         "batch_size": size, "counts": counts}  # fmt: skip
                try:
                    entry |= data.compare(np.asarray(read(side, size), np.float64))
                except Exception as e:  # a reader that cannot read is a result
                    entry["error"] = " ".join(f"{type(e).__name__}: {e}".split())
                readers.append(entry)
    if importlib.util.find_spec("sentence_transformers") is None:
        readers.append({"reader": "CrossEncoder", "counts": False, "error":
                        "not installed: pip install 'fastrm[integrations]'"})  # fmt: skip

    def wrong(entry: Mapping[str, Any]) -> bool:
        return "error" in entry or not entry["difference"] <= tolerance

    bad = [e for e in readers if e["counts"] and wrong(e)]
    left = [
        e for e in readers
        if e.get("dtype") == "float32" and not e["counts"] and wrong(e) and e not in bad
    ]  # fmt: skip
    findings = _findings(path, model, raw, tokenizer, data, same, sigmoid, tolerance)
    if left and not bad:
        findings.append(_note(
            f"{_other(tokenizer.padding_side)}-padding",
            f"padded on the {_other(tokenizer.padding_side)}, the model gives other rewards (its "
            "positions count the padding)",
            f"pad on the {tokenizer.padding_side}, as the tokenizer says",
            max((e.get("difference", float("nan")) for e in left), default=None),
        ))  # fmt: skip
    ties = max((e.get("ties", 0) for e in readers if e.get("dtype") == "bfloat16"), default=0)
    if ties:
        findings.append(_note(
            "bf16-ties", f"in bfloat16 up to {ties:.1%} of the pairs of a group tie that differ in "
            "fp32", "serve the head in fp32, as fastrm does, or the model in fp32",
        ))  # fmt: skip
    if bad and not any(f["error"] for f in findings):
        findings.append({
            "name": "unexplained", "error": True,
            "difference": max((e.get("difference", float("nan")) for e in bad), default=None),
            "what": "readers disagree for none of the reasons that are looked for",
            "do": "compare the tokens and the last hidden states of one text",
        })  # fmt: skip
    return {
        "model": path, "groups": len(rows), "candidates": len(data.texts), "form": str(form),
        "tolerance": tolerance, "agree": not bad, "readers": readers, "findings": findings,
    }  # fmt: skip


class _Data:
    """What all readers read, and the rewards that they should give."""

    rewards: np.ndarray  # (M,) fp32 by fastrm, in double

    def __init__(self, rows: Sequence[Row], texts: list[Text], form: Form) -> None:
        self.rows, self.texts, self.form = rows, texts, form
        self.inputs = [form.inputs(t.prompt, t.candidate) for t in texts]
        sizes = [len(row["candidates"]) for row in rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.groups = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    def compare(self, found: np.ndarray) -> dict[str, float]:
        """Against the rewards of fastrm; `found` is (M,)."""
        differ = ties = changed = 0
        for group in self.groups:
            exact, got = self.rewards[group], found[group]
            changed += exact.argmax() != got.argmax()
            for i, j in combinations(range(len(exact)), 2):
                differ += exact[i] != exact[j]
                ties += exact[i] != exact[j] and got[i] == got[j]
        return {
            "difference": float(np.abs(found - self.rewards).max()),
            "ties": ties / max(differ, 1),
            "best_changed": changed / len(self.groups),
        }


def _fitting(tokenizer: Any, rows: Sequence[Row], limit: int | None, pairs: bool) -> list[Row]:
    found = []
    for row in rows:
        example = tokenize_row(tokenizer, dict(row), limit, pairs)
        if example is not None and not example["cut"]:
            found.append(row)
        if len(found) == GROUPS:
            break
    if not found:
        raise DataError(f"no group is left, all have more than the {limit} tokens of the model")
    return found


def _fastrm(path: str, tokenizer: Any, dtype: str, device: str, data: _Data) -> Any:
    model = load_reward_model(path, tokenizer=tokenizer, dtype=dtype).to(device)  # type: ignore[arg-type]

    def read(side: str, size: int) -> Any:
        found = score_rows(model, tokenizer, data.rows, batch_size=size)
        return [x for s in found for x in s or ()]

    return read


def _direct(model: Any, tokenizer: Any, data: _Data) -> Any:
    """The tokens of training, padded by the tokenizer."""

    def read(side: str, size: int) -> Any:
        return _rewards(model, tokenizer, data.texts, size, side)

    return read


def _rewards(
    model: Any, tokenizer: Any, texts: Sequence[Text], size: int = 1, side: str = "right"
) -> list[float]:
    found: list[float] = []
    for i in range(0, len(texts), size):
        batch = texts[i : i + size]
        inputs: dict[str, Any] = {"input_ids": [t.ids for t in batch]}
        if batch[0].types is not None:
            inputs["token_type_ids"] = [t.types for t in batch]
        if len(batch) > 1:
            inputs = tokenizer.pad(inputs, padding_side=side, return_tensors="pt")
        tensors = {k: torch.as_tensor(v, device=model.device) for k, v in inputs.items()}
        with torch.inference_mode():
            found += model(**tensors).logits[:, 0].float().tolist()
    return found


def _pipeline(model: Any, tokenizer: Any, data: _Data, sigmoid: dict[str, float]) -> Any:
    def read(side: str, size: int) -> Any:
        kwargs = {} if data.form.special else {"add_special_tokens": False}
        pipe: Any = pipeline("text-classification", model=model, tokenizer=tokenizer)
        before = tokenizer.padding_side
        tokenizer.padding_side = before if side == "none" else side
        try:
            found = pipe(list(data.inputs), batch_size=size, function_to_apply="none", **kwargs)
        finally:
            tokenizer.padding_side = before
        raw = [x["score"] for x in found]
        if model.dtype == torch.float32 and size == 1:
            sigmoid["pipeline"] = abs(raw[0] - pipe(data.inputs[:1], **kwargs)[0]["score"])
        return raw

    return read


def _cross_encoder(
    path: str, dtype: str, device: str, data: _Data, sigmoid: dict[str, float]
) -> Any:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(path, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
    model[0].modality_config.pop("message", None)  # the texts are rendered already
    inputs = [tuple(x.values()) for x in data.inputs]
    kwargs: dict[str, Any] = {"show_progress_bar": False}
    if not data.form.special:
        kwargs["processing_kwargs"] = {"text": {"add_special_tokens": False}}

    def read(side: str, size: int) -> Any:
        if side != "none":
            model.tokenizer.padding_side = side
        identity = torch.nn.Identity()
        raw = model.predict(inputs, batch_size=size, activation_fn=identity, **kwargs)
        if dtype == "float32" and size == 1:
            sigmoid["CrossEncoder"] = abs(float(raw[0] - model.predict(inputs[:1], **kwargs)[0]))
        return raw

    return read


def _other(side: str) -> str:
    return "left" if side == "right" else "right"


def _note(name: str, what: str, do: str, difference: float | None = None) -> dict[str, Any]:
    return {"name": name, "error": False, "difference": difference, "what": what, "do": do}


def _findings(
    path: str, model: Any, plain: Any, tokenizer: Any, data: _Data, same: int,
    sigmoid: Mapping[str, float], tolerance: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """What of a model makes readers differ, or would."""
    found: list[dict[str, Any]] = []

    def error(name: str, what: str, do: str, difference: float | None = None) -> None:
        found.append({**_note(name, what, do, difference), "error": True})

    head = attach_head(model)
    weight = next(n for n, p in model.named_parameters() if p is head.weight)
    try:
        stored = stored_tensor(weight, path)
        bias = stored_tensor(weight.removesuffix("weight") + "bias", path)
    except OSError:  # an adapter, or weights of another format
        pass
    else:
        if stored is None:
            error("head-missing", f"the checkpoint has no {weight}: its rewards are random",
                  "train it first (fastrm train)")  # fmt: skip
        elif stored.dtype not in (torch.float32, torch.float64):
            found.append(_note(
                "head-dtype", f"the head is stored in {str(stored.dtype)[6:]}: whoever wrote it "
                "rounded it, and rewards with it", "save the head in fp32, as fastrm does",
            ))  # fmt: skip
        if bias is not None and head.bias is None:
            error("bias", f"the checkpoint has a bias of {bias.item():.4g} that "
                  f"{type(plain).__name__} does not read: rewards are off by it",
                  "subtract nothing and compare rewards only with each other, or train without a "
                  "bias", abs(bias.item()))  # fmt: skip

    config: Any = plain.config.get_text_config()
    eos = tokenizer.eos_token_id
    pads = not is_encoder(model)
    pad = config.pad_token_id
    if pads and pad is None:
        error("pad-missing", "config.json has no pad_token_id: decoders refuse batches of several",
              f"set it to the tokenizer's, {tokenizer.pad_token_id}")  # fmt: skip
    elif pads and tokenizer.pad_token_id is not None and pad != tokenizer.pad_token_id:
        own = _rewards(plain, tokenizer, data.texts, len(data.texts))
        error("pad-wrong", f"config.json has pad_token_id {pad}, and the tokenizer pads with "
              f"{tokenizer.pad_token_id} ({tokenizer.pad_token!r}): in a batch the reward is read "
              "at padding", f"set pad_token_id in config.json to {tokenizer.pad_token_id}",
              float(np.abs(own - data.rewards).max()))  # fmt: skip
    if pads and pad is not None and pad == eos:
        found.append(_note(
            "pad-eos", f"the padding token is EOS ({tokenizer.eos_token!r}): Hugging Face reads "
            "the reward at the token before a final EOS, vLLM at EOS itself",
            "end no text in EOS; training with this padding token did not",
        ))  # fmt: skip

    if pads and data.form.eos:
        cut = [t._replace(ids=t.ids[:-1]) if t.ids[-1] == eos else t for t in data.texts]
        shorter = _rewards(plain, tokenizer, cut)
        found.append(_note(
            "eos", f"training ended each candidate in {data.form.eos!r}, which the tokenizer does "
            "not append", f"end texts in it: {data.form}; chat templates bring their own",
            float(np.abs(shorter - data.rewards).max()),
        ))  # fmt: skip
    if pads and eos is None and isinstance(config.eos_token_id, int) and (
        0 <= config.eos_token_id < config.vocab_size
    ):
        ended = [t._replace(ids=[*t.ids, config.eos_token_id]) for t in data.texts]
        longer = _rewards(plain, tokenizer, ended)
        found.append(_note(
            "eos-missing", f"the tokenizer has no EOS token, and config.json says it is "
            f"{config.eos_token_id}: if training ended candidates in it, rewards are now wrong",
            "set eos_token in tokenizer_config.json to what training had",
            float(np.abs(longer - data.rewards).max()),
        ))  # fmt: skip
    if same < len(data.texts):
        error("tokens", f"of {len(data.texts)} texts {len(data.texts) - same} have other tokens "
              f"than in training when a tokenizer is given {data.form}",
              "give readers the token ids")  # fmt: skip
    joined = sum(tokenizer("".join(x.values()), add_special_tokens=data.form.special)["input_ids"]
                 != t.ids for x, t in zip(data.inputs, data.texts, strict=True))  # fmt: skip
    if pads and joined and not data.form.begin:
        found.append(_note(
            "joined", f"as one text, prompt + candidate, {joined} of {len(data.texts)} have other "
            "tokens than in training, where prompt and candidate are tokenised apart",
            "give readers the pair, or let candidates begin with a space or a newline",
        ))  # fmt: skip
    if tokenizer.chat_template and "CrossEncoder" in sigmoid:
        found.append(_note(
            "chat-template", "CrossEncoder puts pairs of texts through the chat template itself, "
            "with roles of its own", "after loading, `reader[0].modality_config.pop('message', "
            "None)`, and give it texts that are rendered, as was done here",
        ))  # fmt: skip
    applied = {name: x for name, x in sigmoid.items() if x > tolerance}
    if applied:
        found.append(_note(
            "sigmoid", f"{' and '.join(applied)} by default apply a sigmoid, because there is one "
            "label", 'say function_to_apply="none" to pipelines and activation_fn=torch.nn.'
            "Identity() to CrossEncoder, or fastrm.model.serve_raw(model.config) before saving",
            max(applied.values()),
        ))  # fmt: skip
    return found


def report(found: Mapping[str, Any]) -> str:
    """What `verify` found, as lines to read."""
    lines = [
        f"{found['model']}: {found['groups']} groups, {found['candidates']} candidates, read as "
        f"{found['form']}",
        "largest difference from fastrm in fp32 one group at a time; ties, pairs that tie here "
        "alone",
        f"{'reader':<13} {'dtype':<9} {'padding':<8} {'batch':>5} {'difference':>11} {'ties':>7} "
        f"{'best changed':>13}",
    ]
    for e in found["readers"]:
        line = f"{e['reader']:<13} "
        if "dtype" in e:
            line += f"{e['dtype']:<9} {e['padding']:<8} {e['batch_size']:>5} "
        if "error" in e:
            line += e["error"]
        else:
            line += f"{e['difference']:>11.2e} {e['ties']:>7.1%} {e['best_changed']:>13.1%}"
            if e["counts"] and not e["difference"] <= found["tolerance"]:
                line += "  disagrees"
        lines.append(line)
    for f in found["findings"]:
        size = "" if f["difference"] is None else f" (up to {f['difference']:.2e})"
        lines.append(f"{'error' if f['error'] else 'note'}  {f['name']}: {f['what']}{size}")
        lines.append(f"       {f['do']}")
    verdict = "agree" if found["agree"] else "do NOT agree"
    lines.append(f"in fp32 the readers {verdict} to {found['tolerance']:.1e}")
    return "\n".join(lines)
