"""The losses against the peers' own code, run as it is installed, and against torch's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrm

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**20)
SCALES = st.sampled_from([0.0, 1.0, 30.0])


def ragged(sizes: list[int], seed: int, scale: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """Scores with ties, a list of grades for each group with ties, and offsets."""
    g = torch.Generator().manual_seed(seed)
    scores = (torch.randn(sum(sizes), generator=g) * scale).round(decimals=1).requires_grad_()
    grades = torch.randint(0, 4, (sum(sizes),), generator=g).float()
    return scores, list(grades.split(sizes)), fastrm.offsets_from_sizes(sizes)


def assert_same(ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
    """Within 1e-6; of large scores within two fp32 roundings of them, which theirs are made of."""
    atol = max(1e-6, 2 * torch.finfo(torch.float32).eps * float(scores.detach().abs().max()))
    gradients = [torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol)
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)


class Scored(torch.nn.Module):
    """In place of a CrossEncoder: the "document" i scores `scores[i]`."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"rows": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.scores[features["rows"]]}


def sentence_transformers_loss(
    name: str, scores: Tensor, labels: list[Tensor], **kwargs: Any
) -> Tensor:
    losses = pytest.importorskip(
        "sentence_transformers.cross_encoder.losses", reason="sentence-transformers is missing"
    )
    first = torch.tensor([0, *map(len, labels)]).cumsum(0).tolist()
    documents = [[str(i) for i in range(a, b)] for a, b in zip(first, first[1:], strict=False)]
    loss = getattr(losses, name)(Scored(scores), **kwargs)
    return loss([["query"] * len(labels), documents], labels)


@settings(max_examples=60, deadline=None, database=None)
@given(SIZES, SEEDS, SCALES)
def test_sentence_transformers_listnet(sizes: list[int], seed: int, scale: float) -> None:
    scores, labels, offsets = ragged(sizes, seed, scale)
    target = fastrm.target_from_scores(torch.cat(labels), offsets)
    ours = fastrm.listwise_loss_from_scores(scores, offsets=offsets, target=target)
    assert_same(ours, sentence_transformers_loss("ListNetLoss", scores, labels), scores)


@pytest.mark.parametrize("name", ["ListMLELoss", "PListMLELoss"])
@pytest.mark.parametrize("sort", [False, True])
def test_sentence_transformers_listmle(name: str, sort: bool) -> None:
    """In the order given, their default, or sorted by label, where they break ties by position."""

    @settings(max_examples=60, deadline=None, database=None)
    @given(SIZES, SEEDS, SCALES)
    def check(sizes: list[int], seed: int, scale: float) -> None:
        scores, labels, offsets = ragged(sizes, seed, scale)
        if max(sizes) == 1 and name == "PListMLELoss":
            return  # theirs is a constant then, without a gradient
        if sort:  # distinct labels: which of two equals comes first is not theirs to say
            labels = [x + torch.linspace(0, 0.5, len(x)) for x in labels]
            ranks = torch.cat([x.argsort(descending=True).argsort() for x in labels])
        else:
            ranks = torch.cat([torch.arange(k) for k in sizes])
        weight = None
        if name == "PListMLELoss":
            weight = fastrm.position_weight_from_ranks(ranks, offsets)
        ours = fastrm.plackett_luce_loss_from_scores(
            scores, offsets=offsets, ranks=ranks, position_weight=weight
        )
        theirs = sentence_transformers_loss(name, scores, labels, respect_input_order=not sort)
        if theirs.is_leaf:  # made anew where every query's loss is 0
            assert ours.item() == pytest.approx(0, abs=1e-6)
        else:
            assert_same(ours, theirs, scores)

    check()


@settings(max_examples=60, deadline=None, database=None)
@given(SIZES, SEEDS, SCALES)
def test_sentence_transformers_ranknet(sizes: list[int], seed: int, scale: float) -> None:
    """Theirs is the mean over the pairs of the batch, in bits: here each group has its share."""
    scores, labels, offsets = ragged(sizes, seed, scale)
    pairs = [int((x[:, None] > x).sum()) for x in labels]
    if not sum(pairs):
        return
    ranks = torch.cat([(3 - x).long() for x in labels])
    ours = fastrm.bradley_terry_loss_from_scores(
        scores, offsets=offsets, ranks=ranks, reduction="sum",
        group_weight=torch.tensor(pairs) / (sum(pairs) * math.log(2)),
    )  # fmt: skip
    assert_same(ours, sentence_transformers_loss("RankNetLoss", scores, labels), scores)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_trl_reward_loss(margin: bool, center: float | None) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.integers(1, 9), SEEDS, SCALES)
    def check(N: int, seed: int, scale: float) -> None:
        scores, _, offsets = ragged([2] * N, seed, scale)
        m = torch.rand(N, generator=torch.Generator().manual_seed(seed)) * 3
        chosen, rejected = scores.view(N, 2).T
        inputs = {"attention_mask": torch.ones(2 * N, 3), **({"margin": m} if margin else {})}
        out = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        whole = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        names = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
        metrics: Any = {"train": {name: [] for name in names}}
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=whole, _total_train_tokens=0,
            _tp_size=1, _metrics=metrics, args=SimpleNamespace(center_rewards_coefficient=center),
        )  # fmt: skip
        theirs = trl.RewardTrainer.compute_loss(trainer, lambda **kwargs: out, inputs)
        each = torch.stack([torch.zeros(N), m], 1).flatten() if margin else None
        options: dict[str, Any] = dict(offsets=offsets, margin=each, center_coef=center or 0.0)
        first = torch.zeros(N, dtype=torch.int64)
        for ours in (
            fastrm.listwise_loss_from_scores(scores, target=first, **options),
            fastrm.bradley_terry_loss_from_scores(
                scores, ranks=torch.tensor([0, 1]).repeat(N), **options
            ),
            fastrm.bradley_terry_loss_from_scores(
                scores, pairs=torch.arange(2 * N).view(N, 2),
                **options | {"margin": m if margin else None},
            ),
        ):  # fmt: skip
            assert_same(ours, theirs, scores)

    check()


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(2, 6), st.integers(1, 5), SEEDS, SCALES)
def test_flagembedding_reranker(K: int, N: int, seed: int, scale: float) -> None:
    """Its loss as published: cross entropy of the first of each group of K, and distillation."""
    scores, _, offsets = ragged([K] * N, seed, scale)
    teacher = torch.randn(N * K, generator=torch.Generator().manual_seed(seed + 1))
    grouped = scores.view(N, K)
    first = torch.zeros(N, dtype=torch.int64)
    theirs = F.cross_entropy(grouped, first)
    plain = fastrm.listwise_loss_from_scores(scores, offsets=offsets, target=first)
    assert_same(plain, theirs, scores)
    student, taught = grouped.log_softmax(1), teacher.view(N, K).softmax(1)
    theirs = F.cross_entropy(grouped, first) - (taught * student).sum(1).mean()
    ours = fastrm.listwise_loss_from_scores(
        scores, offsets=offsets, target=first, teacher_scores=teacher
    )
    assert_same(ours, theirs, scores)


@settings(max_examples=60, deadline=None, database=None)
@given(SIZES, SEEDS, SCALES)
def test_torch_cross_entropy_and_kl(sizes: list[int], seed: int, scale: float) -> None:
    """In fp64 to 1e-12, padded as torch needs it; KL less the entropy, which has no gradient."""
    rounded, labels, offsets = ragged(sizes, seed, scale)
    scores = rounded.detach().double().requires_grad_()
    parts = list(scores.split(sizes))
    padded = torch.nn.utils.rnn.pad_sequence(parts, True, -torch.inf)
    best = torch.tensor([int(x.argmax()) for x in labels])
    target = fastrm.target_from_scores(torch.cat(labels).double(), offsets)
    q = list(target.split(sizes))
    entropy = sum(float(-(x * x.log()).sum()) for x in q) / len(sizes)
    kl = torch.stack([
        F.kl_div(s.log_softmax(0), x, reduction="sum") for s, x in zip(parts, q, strict=True)
    ])  # fmt: skip
    for labelled, theirs, shift in ((best, F.cross_entropy(padded, best), 0.0),
                                    (target, kl.mean(), entropy)):  # fmt: skip
        ours = fastrm.listwise_loss_from_scores(scores, offsets=offsets, target=labelled)
        gradients = [torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(ours - shift, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
