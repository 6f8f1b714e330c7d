import json

import numpy as np
import pytest
import torch

from fastrm.batching import ChunkingCollator
from fastrm.data import (
    DataError,
    RaggedCollator,
    check_rows,
    read_rows,
    row_target,
    tokenize_row,
    tokenize_rows,
)

from .conftest import make_rows, make_tokenizer

GOOD = {"prompt": "p", "candidates": ["a", "b", "c"], "best": 1}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def without(column):
    return {k: v for k, v in GOOD.items() if k != column}


def test_a_best_that_pandas_wrote():
    (row,) = check_rows([GOOD | {"best": 1.0}])
    assert row["best"] == 1 and type(row["best"]) is int


def test_labels_and_best_must_agree():
    row = {"prompt": "p", "candidates": ["a", "b", "c"], "labels": [1, 3, 3]}
    check_rows([{**row, "best": 1}, {**row, "best": 2}])
    with pytest.raises(DataError, match="row 0: column 'best': expected a candidate of the larg"):
        check_rows([{**row, "best": 0}])


BAD = [
    (without("prompt"), "column 'prompt': expected text", "got nothing"),
    (without("candidates"), "column 'candidates': expected a list", "got nothing"),
    (without("best"), "column 'best': expected an integer from 0 to 2", "got nothing"),
    (GOOD | {"best": None}, "column 'best'", "got nothing"),
    (GOOD | {"best": 3}, "column 'best': expected an integer from 0 to 2", "got 3"),
    (GOOD | {"best": -1}, "column 'best'", "got -1"),
    (GOOD | {"best": True}, "column 'best'", "got True"),
    (GOOD | {"best": 1.5}, "column 'best'", "got 1.5"),
    (GOOD | {"best": "1"}, "column 'best'", "got '1'"),
    (GOOD | {"candidates": []}, "column 'candidates': expected a list of at least one", "got []"),
    (GOOD | {"candidates": "abc"}, "column 'candidates'", "got 'abc'"),
    (GOOD | {"candidates": ["a", 7, "c"]}, "column 'candidates'", "candidate 1, got 7"),
    (GOOD | {"candidates": ["a", [], "c"]}, "column 'candidates'", "candidate 1, got []"),
    (GOOD | {"prompt": 5}, "column 'prompt'", "got 5"),
    (GOOD | {"prompt": [{"role": "user"}]}, "column 'prompt'", "messages"),
    (GOOD | {"labels": [1, 2]}, "column 'labels': expected 3 finite numbers", "got [1, 2]"),
    (GOOD | {"labels": [1, -2, 0]}, "column 'labels'", "at least 0"),
    (GOOD | {"labels": [0, 0, 0]}, "column 'labels'", "above 0"),
    (GOOD | {"labels": 3}, "column 'labels'", "got 3"),
    (GOOD | {"ranks": [1.5, 2, 3]}, "column 'ranks': expected 3 integers", "got [1.5, 2, 3]"),
    (GOOD | {"ranks": [-1, -1, -1]}, "column 'ranks'", "0 or more"),
    (GOOD | {"teacher_scores": [1, None, 2]}, "'teacher_scores': expected 3 finite", "got [1, N"),
    (GOOD | {"weight": -1}, "column 'weight': expected a finite number of at least 0", "got -1"),
    (GOOD | {"weight": float("nan")}, "column 'weight'", "got nan"),
    (GOOD | {"margin": [1, 2]}, "column 'margin': expected 3 finite numbers", "got [1, 2]"),
    (GOOD | {"margin": "x"}, "column 'margin'", "got 'x'"),
    (GOOD | {"weight": 1e39}, "column 'weight'", "got 1e+39"),
    (GOOD | {"labels": [1e308, 1e308, 10**400]}, "column 'labels'", "got [1e+308"),
    ([1, 2], "expected a JSON object", "got list"),
]


@pytest.mark.parametrize("row, says, got", BAD, ids=[f"{b[1][:24]}-{b[2][:12]}" for b in BAD])
def test_a_malformed_row_is_named(tmp_path, row, says, got):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DataError) as e:
        read_rows(file)
    assert str(e.value).startswith(f"{file}:3: ") and says in str(e.value) and got in str(e.value)
    with pytest.raises(DataError) as e:
        check_rows([GOOD, GOOD, row])
    assert str(e.value).startswith("row 2: ") and says in str(e.value)


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"prompt": "p", \n')
    with pytest.raises(DataError, match=r"x.jsonl:2: expected a JSON object .* broken JSON"):
        read_rows(file)
    file.write_text("\n\n")
    with pytest.raises(DataError, match=r"x.jsonl: expected at least one row, got an empty file"):
        read_rows(file)
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"x.jsonl: expected UTF-8 text, got byte 0xff"):
        read_rows(file)
    with pytest.raises(DataError, match=r"none.jsonl: expected a JSONL file, got: No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"expected a JSONL file, got: Is a directory"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="train_dataset rows: expected at least one row"):
        check_rows([], "train_dataset")
    for rows in ("text", GOOD, iter([GOOD])):
        with pytest.raises(DataError, match="expected a list of rows"):
            check_rows(rows)


def test_what_json_allows_and_nobody_can_read(tmp_path):
    file = tmp_path / "x.jsonl"
    cut = '{"prompt": "cut \\ud83d", "candidates": ["a"], "best": 0}'  # half of an emoji
    for line in ("1" * 5000, "[" * 100_000, cut):
        file.write_text(line)
        with pytest.raises(DataError, match="x.jsonl:1: "):
            read_rows(file)


def test_whole_numbers_are_weights_too():
    rows = [GOOD | {"weight": 2}, GOOD | {"weight": 0}]
    tokenizer = make_tokenizer()
    examples = [tokenize_row(tokenizer, row, None, pairs=False) for row in rows]
    batch = RaggedCollator(tokenizer.pad_token_id, last_token=True)(examples)
    assert batch["group_weight"].dtype == torch.float32
    assert batch["group_weight"].tolist() == [2.0, 0.0]


def test_good_rows_come_back_whole(tmp_path):
    rows = [
        GOOD | {"id": 7},
        {"prompt": [{"role": "user", "content": "p"}], "candidates": ["a"], "labels": [2.0]},
        {"prompt": "p\u2028q", "candidates": ["", "b"], "ranks": [0, -1], "weight": 0, "margin": 1},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\ufeff" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    assert read_rows(file) == rows
    assert check_rows(rows) == rows
    assert check_rows([without("best")], labelled=False) == [without("best")]


def test_a_dataset_gives_the_same_rows():
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, GOOD | {"best": 2}]
    assert check_rows(datasets.Dataset.from_list(rows)) == rows


def test_row_target():
    assert row_target(GOOD) == 1
    assert row_target({"ranks": [3, 1, -1]}) == 1
    assert row_target(without("best")) is None
    np.testing.assert_array_equal(row_target({"ranks": [0, 1, 0, -1]}), [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(row_target({"labels": [1, 3, 0], "best": 0}), [0.25, 0.75, 0])


@pytest.mark.parametrize("bos", [None, "<bos>", "<eos>"])
def test_decoder_reads_prompt_then_candidate_then_eos(bos):
    tokenizer = make_tokenizer(bos=bos)
    example = tokenize_row(tokenizer, GOOD | {"prompt": "How many legs?"}, None, pairs=False)
    head = [] if bos is None else [tokenizer.convert_tokens_to_ids(bos)]
    head += tokenizer.encode("How many legs?", add_special_tokens=False)
    assert example["prompt_length"] == len(head)
    for ids, text in zip(example["input_ids"], "abc", strict=True):
        answer = tokenizer.encode(text, add_special_tokens=False)
        assert ids.tolist() == [*head, *answer, tokenizer.eos_token_id]


def test_no_sequence_ends_in_padding():
    tokenizer = make_tokenizer(pad="<eos>")  # padding is EOS: none is appended, and none stays
    row = {"prompt": "p", "candidates": ["a", "b<eos>", "<eos><eos>"], "best": 0}
    example = tokenize_row(tokenizer, row, None, pairs=False)
    assert [tokenizer.decode(ids) for ids in example["input_ids"]] == ["pa", "pb", "p"]
    row = {"prompt": "p<eos>", "candidates": ["a", ""], "best": 0}  # a prompt may, before an answer
    example = tokenize_row(tokenizer, row, None, pairs=False)
    assert [tokenizer.decode(ids) for ids in example["input_ids"]] == ["pa", "p"]
    with pytest.raises(DataError, match="at least one token"):
        tokenize_row(tokenizer, {"prompt": "", "candidates": [""], "best": 0}, None, pairs=False)


def test_a_candidate_that_ends_in_eos_gets_no_second_one():
    tokenizer = make_tokenizer()
    row = {"prompt": "p", "candidates": ["a<eos>", "a", ""], "best": 0}
    ended, plain, empty = tokenize_row(tokenizer, row, None, pairs=False)["input_ids"]
    assert ended.tolist() == plain.tolist() and tokenizer.decode(empty) == "p<eos>"


def test_only_the_prompt_is_cut_and_only_at_its_left():
    tokenizer = make_tokenizer(bos="<bos>")
    row = {"prompt": "abcdefghijkl" * 2, "candidates": ["zz yy xx ww", "q"], "best": 0}
    whole = tokenize_row(tokenizer, row, None, pairs=False)
    longest = max(len(ids) for ids in whole["input_ids"])
    fits = tokenize_row(tokenizer, row, longest, pairs=False)
    assert not whole["cut"] and not fits["cut"]
    for a, b in zip(whole["input_ids"], fits["input_ids"], strict=True):
        np.testing.assert_array_equal(a, b)
    cut = tokenize_row(tokenizer, row, longest - 5, pairs=False)
    assert cut["cut"]
    for a, b in zip(whole["input_ids"], cut["input_ids"], strict=True):
        np.testing.assert_array_equal(b, [a[0], *a[6:]])  # BOS stays
    shortest = 1 + longest - whole["prompt_length"]  # BOS and the longest answer
    assert tokenize_row(tokenizer, row, shortest, pairs=False)["prompt_length"] == 1
    assert tokenize_row(tokenizer, row, shortest - 1, pairs=False) is None
    counted = tokenize_rows(tokenizer, [row, GOOD, row], shortest - 1, pairs=False)
    assert len(counted) == 1 and counted.dropped == 2


def test_encoder_reads_pairs(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    row = {"prompt": "one two three four", "candidates": ["five six", "seven"], "best": 0}
    example = tokenize_row(tokenizer, row, None, pairs=True)
    texts = [tokenizer.decode(ids) for ids in example["input_ids"]]
    assert texts == [
        "[CLS] one two three four [SEP] five six [SEP]",
        "[CLS] one two three four [SEP] seven [SEP]",
    ]
    assert example["token_type_ids"][1].tolist() == [0] * 6 + [1] * 2
    cut = tokenize_row(tokenizer, row, 7, pairs=True)
    assert [tokenizer.decode(ids) for ids in cut["input_ids"]] == [
        "[CLS] three four [SEP] five six [SEP]",
        "[CLS] three four [SEP] seven [SEP]",
    ]
    assert cut["cut"] and cut["token_type_ids"][1].tolist() == [0] * 4 + [1] * 2
    bare = tokenize_row(tokenizer, row, 5, pairs=True)  # all of the prompt, and no more
    assert tokenizer.decode(bare["input_ids"][0]) == "[CLS] [SEP] five six [SEP]"
    assert tokenize_row(tokenizer, row, 4, pairs=True) is None


def test_messages_go_through_the_chat_template_once():
    tokenizer = make_tokenizer(template=CHAT, bos="<bos>")
    said = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "yes"}]
    example = tokenize_row(
        tokenizer, {"prompt": said, "candidates": ["no", answer], "best": 0}, None, pairs=False
    )
    texts = [tokenizer.decode(ids) for ids in example["input_ids"]]
    assert texts == ["<user>hi\n<assistant>no\n", "<user>hi\n<assistant>yes\n"]
    shared = tokenizer.decode(example["input_ids"][0][: example["prompt_length"]])
    assert shared == "<user>hi\n<assistant>"
    with pytest.raises(DataError, match="chat template"):
        tokenize_row(make_tokenizer(), {"prompt": said, "candidates": ["a"]}, None, pairs=False)


@pytest.mark.parametrize("template, shared", [
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
     "{% if add_generation_prompt %}<assistant><think>{% endif %}", "<user>hi\n"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last }}\n{% endfor %}", ""),
], ids=["a generation prompt that answers lack", "earlier turns are rewritten"])  # fmt: skip
def test_the_shared_start_is_what_all_texts_begin_with(template, shared):
    tokenizer = make_tokenizer(template=template)
    said = [{"role": "user", "content": "hi"}]
    row = {"prompt": said, "candidates": ["no", "yes"], "best": 0}
    example = tokenize_row(tokenizer, row, None, pairs=False)
    for ids, text in zip(example["input_ids"], row["candidates"], strict=True):
        whole = [*said, {"role": "assistant", "content": text}]
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(whole, tokenize=False)
    assert tokenizer.decode(example["input_ids"][0][: example["prompt_length"]]) == shared


def test_collator_by_hand():
    examples = [
        {"input_ids": [[1, 2, 3], [4]], "target": 1, "margin": None, "weight": None},
        {"input_ids": [[5, 6]], "target": 0, "margin": np.array([2.0]), "weight": 0.5},
    ]
    for e in examples:
        e["input_ids"] = [np.array(i) for i in e["input_ids"]]
        e["token_type_ids"] = [np.ones_like(i) for i in e["input_ids"]]
    batch = RaggedCollator(pad_token_id=9, last_token=True)(examples)
    expected = {
        "input_ids": [[1, 2, 3], [4, 9, 9], [5, 6, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "token_type_ids": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "offsets": [0, 2, 3],
        "target": [1, 0],
        "ranks": [-1, 0, 0],
        "rows": [2, 3, 7],
        "margin": [0.0, 0.0, 2.0],
        "group_weight": [1.0, 0.5],
    }
    assert {k: v.tolist() for k, v in batch.items()} == expected
    assert "rows" not in RaggedCollator(9, last_token=False)(examples)
    examples[0]["target"] = np.array([0.25, 0.75], np.float32)
    soft = RaggedCollator(9, last_token=True)(examples)["target"]
    assert soft.dtype == torch.float32 and soft.tolist() == [0.25, 0.75, 1.0]


def test_ranks_and_teacher_scores_in_the_batch():
    rows = [
        GOOD | {"ranks": [2, 0, -1], "teacher_scores": [0.5, 7, -3]},
        {"prompt": "p", "candidates": ["a", "b"], "ranks": [1, 0], "teacher_scores": [1, 2.25]},
    ]
    tokenizer = make_tokenizer()
    examples = tokenize_rows(tokenizer, check_rows(rows), None, pairs=False)
    collate = RaggedCollator(tokenizer.pad_token_id, last_token=True)
    batch = collate(examples)
    assert batch["ranks"].dtype == torch.int64
    assert batch["ranks"].tolist() == [2, 0, -1, 1, 0]
    assert batch["teacher_scores"].dtype == torch.float32
    assert batch["teacher_scores"].tolist() == [0.5, 7, -3, 1, 2.25]
    assert batch["target"].tolist() == [1, 1]
    zero = without("best") | {"labels": [1, 0, 3]}  # a share of 0 is unranked
    (example,) = tokenize_rows(tokenizer, [zero], None, pairs=False)
    assert collate([example])["ranks"].tolist() == [1, -1, 0]
    others = [GOOD, without("best") | {"labels": [1, 3, 1]}, without("best")]
    plain = tokenize_rows(tokenizer, others, None, pairs=False)
    assert collate(plain)["ranks"].tolist() == [-1, 0, -1, 1, 0, 1, -1, -1, -1]
    assert "teacher_scores" not in collate(plain)
    mixed = collate([examples[0], *plain])
    assert "teacher_scores" not in mixed and mixed["ranks"].dtype == torch.int64
    assert mixed["ranks"].tolist() == [2, 0, -1, -1, 0, -1, 1, 0, 1, -1, -1, -1]


def test_ranks_and_teacher_scores_of_a_group_in_chunks():
    row = GOOD | {"ranks": [2, 0, -1], "teacher_scores": [0.5, 7, -3]}
    examples = tokenize_rows(make_tokenizer(), [row], None, pairs=False)
    collate = RaggedCollator(0, last_token=True)
    batch = ChunkingCollator(collate, examples, 1, shared=False)(examples)
    assert batch["ranks"].tolist() == row["ranks"]
    assert [chunk["ranks"].tolist() for chunk in batch["chunks"]] == [[2], [0], [-1]]
    assert [chunk["teacher_scores"].item() for chunk in batch["chunks"]] == [0.5, 7, -3]


def test_rows_to_score_may_be_labelled_or_not():
    rows = [GOOD, without("best"), without("best") | {"labels": [1, 3, 0]}]
    examples = tokenize_rows(make_tokenizer(), check_rows(rows, labelled=False), None, pairs=False)
    batch = RaggedCollator(0, last_token=True)(examples)
    assert batch["target"].tolist() == [0, 1, 0, 0, 0, 0, 0.25, 0.75, 0]


def test_last_token_does_not_depend_on_padding_ids():
    tokenizer = make_tokenizer(pad="<eos>")
    examples = tokenize_rows(tokenizer, make_rows(6), None, pairs=False)
    for pad in (0, 5, 17):  # ids that occur in the text too
        batch = RaggedCollator(pad, last_token=True)(examples)
        last = batch["input_ids"].flatten()[batch["rows"]]
        assert last.tolist() == [ids[-1] for e in examples for ids in e["input_ids"]]
