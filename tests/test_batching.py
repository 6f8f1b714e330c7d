import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrm.batching import ChunkingCollator, GroupBatchSampler, group_tokens
from fastrm.data import RaggedCollator, tokenize_rows

from .conftest import make_decoder, make_rows, make_tokenizer
from .test_trainer import config, logged, trained

TOKENS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
CUT = st.fixed_dictionaries({
    "groups": st.integers(1, 9), "max_tokens": st.none() | st.integers(1, 150),
    "ranks": st.integers(1, 4), "seed": st.integers(0, 2**32 - 1), "shuffle": st.booleans(),
})  # fmt: skip


def epoch(tokens, cut, number=0):
    """The micro-batches of each device."""
    found = []
    for rank in range(cut.get("ranks", 1)):
        sampler = GroupBatchSampler(tokens, rank=rank, **cut)
        sampler.set_epoch(number)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@settings(deadline=None, max_examples=200)
@given(TOKENS, CUT, st.integers(0, 3))
def test_every_group_once_within_the_limit_and_as_many_batches_everywhere(tokens, cut, number):
    found = epoch(tokens, cut, number)
    assert len({len(batches) for batches in found}) == 1
    batches = list(itertools.chain(*found))
    assert sorted(itertools.chain(*batches)) == list(range(len(tokens)))
    for batch in batches:
        if cut["max_tokens"] is None:
            assert len(batch) <= cut["groups"]
        else:
            assert len(batch) <= 1 or sum(tokens[i] for i in batch) <= cut["max_tokens"]
    turns = list(zip(*found, strict=True))
    if cut["max_tokens"] and cut["shuffle"]:
        assert all(batches) or all(len(batch) <= 1 for batch in batches)
    else:
        assert all(map(all, turns[:-1])) and any(turns[-1])
    assert epoch(tokens, cut, number) == found


@settings(deadline=None, max_examples=100)
@given(TOKENS, CUT)
def test_epochs_have_as_many_batches_and_another_order(tokens, cut):
    first, second = epoch(tokens, cut), epoch(tokens, cut, 1)
    assert len(first[0]) == len(second[0])
    assert cut["shuffle"] or first == second


def test_the_order_is_random_and_follows_the_seed():
    tokens = np.random.default_rng(0).integers(50, 500, 400).tolist()
    for limit in (None, 4000):
        epochs = [epoch(tokens, dict(groups=8, max_tokens=limit, seed=s), n)[0]
                  for s, n in ((0, 0), (0, 1), (7, 0))]  # fmt: skip
        together = [{frozenset(p) for b in e for p in itertools.combinations(b, 2)} for e in epochs]
        for a, b in itertools.combinations(together, 2):
            assert len(a & b) < 0.1 * len(a)
        assert epochs[0] != sorted(epochs[0])


def test_batches_are_full_and_devices_wait_little():
    tokens = np.random.default_rng(0).lognormal(6, 0.6, 3000).astype(int).tolist()
    cut = dict(groups=8, max_tokens=8192, ranks=4)
    turns = [[sum(tokens[i] for i in b) for b in turn]
             for turn in zip(*epoch(tokens, cut), strict=True)]  # fmt: skip
    assert sum(map(sum, turns)) > 0.95 * 8192 * 4 * len(turns)
    assert sum(max(turn) for turn in turns) < 1.01 * sum(map(sum, turns)) / 4
    in_order = [[sum(tokens[i] for i in b) for b in turn]
                for turn in zip(*epoch(tokens, cut | {"shuffle": False}), strict=True)]  # fmt: skip
    assert sum(max(turn) for turn in in_order) < 1.1 * sum(map(sum, in_order)) / 4


def test_without_shuffling_groups_stay_in_order():
    tokens = [5, 5, 5, 20, 1, 1, 9, 3]
    assert epoch(tokens, dict(groups=3, shuffle=False)) == [[[0, 1, 2], [3, 4, 5], [6, 7]]]
    assert epoch(tokens, dict(groups=2, ranks=2, shuffle=False)) == [
        [[0, 1], [4, 5]], [[2, 3], [6, 7]]
    ]  # fmt: skip
    limited = dict(groups=1, max_tokens=10, shuffle=False)
    assert epoch(tokens, limited) == [[[0, 1], [2], [3], [4, 5], [6], [7]]]
    assert epoch(tokens, dict(groups=3, drop_last=True, shuffle=False)) == [[[0, 1, 2], [3, 4, 5]]]


def examples(rows):
    return tokenize_rows(make_tokenizer(), rows, None, pairs=False)


def test_tokens_of_a_group():
    (example,) = examples([{"prompt": "How many legs", "candidates": ["six", "eight"], "best": 1}])
    P, lengths = example["prompt_length"], [len(ids) for ids in example["input_ids"]]
    assert group_tokens(example, shared=False) == sum(lengths)
    assert group_tokens(example, shared=True) == P + sum(n - P for n in lengths)


@pytest.mark.parametrize("shared", [False, True])
def test_chunks_are_consecutive_candidates_within_the_limit(shared):
    row = make_rows(1, seed=2, sizes=(14,))[0] | {"margin": [0.1 * k for k in range(14)]}
    (example,) = examples([row | {"weight": 2.0}])
    collate = RaggedCollator(0, last_token=True, layouts=("shared" if shared else "packed",))
    limit = 100
    batch = ChunkingCollator(collate, [example], limit, shared)([example])
    assert batch["offsets"].tolist() == [0, 14] and batch["target"].tolist() == [row["best"]]
    assert batch["group_weight"].tolist() == [2.0] and len(batch["margin"]) == 14
    assert "input_ids" not in batch and len(batch["chunks"]) > 2
    assert all(c["input_ids"].numel() <= limit for c in batch["chunks"])
    last = [c["input_ids"].flatten()[c["rows"]] for c in batch["chunks"]]
    assert torch.cat(last).tolist() == [ids[-1] for ids in example["input_ids"]]
    sizes = [len(c["rows"]) for c in batch["chunks"]]
    assert sum(sizes) == 14
    for first, n, after in zip(np.cumsum([0, *sizes]), sizes, sizes[1:], strict=False):
        assert after and group_tokens(
            {**example, "input_ids": example["input_ids"][first : first + n + 1]}, shared
        ) > limit  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_whole_groups_fill_chunks(shared):
    """As many as fit; one that fits is never cut."""
    row = {"prompt": "How many legs", "candidates": ["six", "eight"], "best": 1}
    found = examples([row] * 5)
    limit = 2 * group_tokens(found[0], shared)
    collate = RaggedCollator(0, last_token=True, layouts=("shared" if shared else "packed",))
    batch = ChunkingCollator(collate, (), limit, shared)(found)
    assert [c["offsets"].tolist() for c in batch["chunks"]] == [[0, 2, 4], [0, 2, 4], [0, 2]]
    assert [c["input_ids"].numel() for c in batch["chunks"]] == [limit, limit, limit // 2]
    assert "chunks" not in ChunkingCollator(collate, (), limit, shared)(found[:2])


def test_chunks_have_the_token_types_of_their_own_candidates():
    (example,) = examples(make_rows(1, sizes=(4,)))
    example["token_type_ids"] = types = [k + np.arange(len(ids)) for k, ids in
                                         enumerate(example["input_ids"])]  # fmt: skip
    batch = ChunkingCollator(RaggedCollator(0, last_token=False), (), 1, False)([example])
    assert [c["token_type_ids"].tolist() for c in batch["chunks"]] == [[t.tolist()] for t in types]


def test_an_empty_batch_is_a_group_that_is_left_out():
    found = examples(make_rows(3))
    batch = ChunkingCollator(RaggedCollator(0, last_token=True), found, None, False)([])
    assert batch["target"].tolist() == [-100] and batch["offsets"].tolist() == [0, 1]


@pytest.mark.parametrize("limit", [None, 150])
def test_resumes_in_the_middle_of_an_epoch(tmp_path, limit):
    options = dict(
        per_device_train_batch_size=3, max_tokens_per_batch=limit, gradient_accumulation_steps=2,
        train_sampling_strategy="random", num_train_epochs=2, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    rows = make_rows(31)
    whole = trained(tmp_path, rows, **options)
    steps = whole.state.global_step
    B = len(whole._batches)
    assert B > 4 and steps == 2 * -(-B // 2)
    epochs = [entry["epoch"] for entry in whole.state.log_history if "loss" in entry]
    ends = [min(i, B) / B for i in range(2, B + 2, 2)]  # a last one of an odd number is shorter
    assert epochs == pytest.approx([e + number for number in (0, 1) for e in ends])
    resumed = trained(tmp_path, rows, make_decoder(seed=1),
                      resume=str(tmp_path / f"checkpoint-{steps // 2 + 1}"), **options)  # fmt: skip
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert logged(resumed) == logged(whole)


def test_the_loader_of_the_trainer_skips_what_was_done(tmp_path):
    trainer = trained(tmp_path, make_rows(20), max_tokens_per_batch=150,
                      train_sampling_strategy="random", max_steps=1)  # fmt: skip
    loader = trainer.get_train_dataloader()
    batches = [b["target"].tolist() for b in loader]
    assert len(loader) == len(batches) and sum(map(len, batches)) == 20
    skipped = skip_first_batches(trainer.get_train_dataloader(), 2)
    assert [b["target"].tolist() for b in skipped] == batches[2:]


def test_what_was_too_long_is_counted(tmp_path, caplog):
    rows, other = make_rows(9), make_rows(6, seed=1)
    rows[2]["prompt"] = other[3]["prompt"] = other[4]["prompt"] = "word " * 300
    rows[5]["candidates"][rows[5]["best"]] = "word " * 300
    with caplog.at_level("INFO", logger="fastrm"):
        trainer = trained(tmp_path, rows, eval_rows=other, max_tokens_per_batch=100)
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert "1 prompts cut at the left to 128 tokens, 1 groups left out as too long" in said
    assert "eval_dataset: 6 groups; 2 prompts cut at the left" in said
    assert "batches of at most 100 tokens an epoch on each of 1 devices" in said
    for name, value in (("train_prompts_cut", 1), ("train_left_out", 1),
                        ("eval_prompts_cut", 2), ("eval_left_out", 0)):  # fmt: skip
        assert logged(trainer, name) == [value], name


def test_logs_count_groups_not_batches(tmp_path):
    trainer = trained(tmp_path, make_rows(40), max_tokens_per_batch=200, max_steps=6,
                      gradient_accumulation_steps=2, train_sampling_strategy="random")  # fmt: skip
    per_step = 2 * 40 / len(trainer._batches)
    speeds = trainer.state.log_history[-1]
    assert speeds["train_samples_per_second"] / speeds["train_steps_per_second"] == pytest.approx(
        per_step, abs=0.6
    )


@pytest.mark.parametrize("options, says", [
    (dict(max_tokens_per_batch=0), "max_tokens_per_batch must be above 0, got 0"),
    (dict(max_tokens_per_batch=9, dataloader_drop_last=True), "dataloader_drop_last must be False"),
    (dict(accelerator_config={"split_batches": True}), "split_batches must not be set"),
])  # fmt: skip
def test_config_refuses_what_cannot_work(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **options)
