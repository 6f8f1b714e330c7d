"""The same groups in every format and every kind of file are the same batches."""

import csv
import json
import sys

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fastrm
from fastrm.data import DataError, RaggedCollator, check_rows, read_rows, tokenize_rows
from fastrm.formats import FORMATS, recognise

from .conftest import make_decoder, make_tokenizer

# A group: a prompt, candidates of which the first `positives` are best, and numbers for each.
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@st.composite
def groups(draw):
    candidates = draw(st.lists(TEXT, min_size=1, max_size=5))
    K = len(candidates)
    return {
        "prompt": draw(TEXT),
        "candidates": candidates,
        "positives": draw(st.integers(1, K)),
        "scores": draw(st.lists(st.floats(-9, 9, width=32), min_size=K, max_size=K)),
        "ranks": draw(st.permutations(range(K))),
        "weight": draw(st.sampled_from([None, 2, 0.5])),
    }


def ours(g, *columns):
    row = {"prompt": g["prompt"], "candidates": g["candidates"], "weight": g["weight"]}
    labels = [float(k < g["positives"]) for k in range(len(g["candidates"]))]
    row |= {"best": 0} if g["positives"] == 1 else {"labels": labels}
    return row | {column: g[column] for column in columns if column in g}


def trl(g):
    chosen, rejected = g["candidates"][:2]
    both = {"prompt": g["prompt"], "margin": g["scores"][0], "weight": g["weight"]}
    row = {"chosen": chosen, "rejected": rejected}
    return row | both, {"candidates": [chosen, rejected], "best": 0} | both


def nemo_rl(g):
    said = [[{"role": "assistant", "content": c}] for c in g["candidates"]]
    asked = [{"role": "user", "content": g["prompt"]}]
    ranked = zip(g["ranks"], said, strict=True)
    completions = [{"rank": rank, "completion": c} for rank, c in ranked]
    expected = {"prompt": asked, "candidates": said, "ranks": list(g["ranks"])}
    row = {"context": asked, "completions": completions}
    weight = {"weight": g["weight"]}
    return row | weight, expected | weight


def flag_embedding(g):
    P, c, s = g["positives"], g["candidates"], g["scores"]
    row = {"query": g["prompt"], "pos": c[:P], "neg": c[P:], "weight": g["weight"]}
    row |= {"pos_scores": s[:P], "neg_scores": s[P:]}
    return row, ours(g) | {"teacher_scores": s}


def tevatron(g):
    P, c = g["positives"], g["candidates"]
    passages = [{"docid": str(k), "title": "", "text": x} for k, x in enumerate(c)]
    row = {"query": g["prompt"], "positive_passages": passages[:P], "weight": g["weight"]}
    return row | {"negative_passages": passages[P:]}, ours(g)


def sentence_transformers(g):
    labels = [float(k < g["positives"]) for k in range(len(g["candidates"]))]
    row = {"question": g["prompt"], "passages": g["candidates"], "labels": labels}
    return row | {"weight": g["weight"]}, ours(g)


def triplet(g):
    negatives = {f"negative_{k}": c for k, c in enumerate(g["candidates"][1:], 1)}
    row = {"anchor": g["prompt"], "positive": g["candidates"][0], **negatives}
    return row | {"weight": g["weight"]}, ours(g) | {"best": 0, "labels": None}


WRITERS = {
    "fastrm": lambda g: (ours(g, "ranks"), ours(g, "ranks")),
    "TRL": trl,
    "NeMo-RL": nemo_rl,
    "FlagEmbedding": flag_embedding,
    "Tevatron": tevatron,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers triplet": triplet,
}
assert list(WRITERS) == [f.name for f in FORMATS]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")


def write_csv(rows, path):
    with path.open("w", encoding="utf-8", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(by_column(rows)), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({c: v if isinstance(v, str) or v is None else json.dumps(v)
                             for c, v in row.items()})  # fmt: skip


def write_parquet(rows, path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is missing")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(by_column(rows)), path)


def by_column(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def write_json(rows, path):
    path.write_text(json.dumps(rows, indent=1), "utf-8")


FILES = {
    ".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".tsv": write_csv,
    ".parquet": write_parquet,
}  # fmt: skip


def read_all(rows, folder):
    """The rows by every way in."""
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    yield "list", check_rows(rows)
    yield "dataset", check_rows(datasets.Dataset.from_dict(by_column(rows)))
    for suffix, write in FILES.items():
        write(rows, folder / f"rows{suffix}")
        yield suffix, read_rows(folder / f"rows{suffix}")


def batch_of(rows, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer(template=CHAT)
    examples = tokenize_rows(tokenizer, rows, None, pairs=False)
    return RaggedCollator(tokenizer.pad_token_id, last_token=True)(examples)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(template=CHAT)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(found=st.lists(groups(), min_size=1, max_size=4))
def test_the_same_groups_are_the_same_batches(name, tokenizer, tmp_path_factory, found):
    if name in ("TRL", "sentence-transformers triplet"):
        found = [g for g in found if len(g["candidates"]) > 1]
        if name != "TRL":  # where an empty negative is none
            found = [g for g in found if all(g["candidates"])]
        assume(found)
    written, expected = zip(*map(WRITERS[name], found), strict=True)
    assert {recognise(row).name for row in written} == {name}
    wanted = batch_of(expected, tokenizer)
    for source, rows in read_all(list(written), tmp_path_factory.mktemp("formats")):
        assert same(batch_of(rows, tokenizer), wanted), source


GROUPS = [
    {"prompt": f"How many legs has {who}?", "candidates": answers, "positives": 1,
     "scores": [0.5 * k for k in range(len(answers))], "ranks": list(range(len(answers))),
     "weight": weight}
    for who, weight, answers in [
        ("a spider", 1.0, ["eight", "six, and two more", "none", "a snake"]),
        ("a beetle", 2.0, ["six", "eight"]),
        ("a \"snake\",\n[1] and", 0.5, ["none", "[1, 2]", "one;\ttwo"]),
    ]
]  # fmt: skip


def loss_of(batch):
    model = make_decoder()
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    columns = {k: batch[k] for k in ("offsets", "target", "rows", "group_weight")}
    loss = fastrm.listwise_loss(hidden, model.score.weight, **columns)
    loss.backward()
    return loss.detach(), model.score.weight.grad


def test_a_positive_and_its_negatives_in_columns_of_their_own(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    expected = [
        {"prompt": "two legs?", "candidates": ["a hen", "a snake", "a cat"], "best": 0},
        {"prompt": "six legs?", "candidates": ["[1] a beetle", "[8]"], "best": 0},
    ]
    columns = ("query", "positive", "negative_1", "negative_2")
    rows = [dict(zip(columns, [e["prompt"], *e["candidates"], None], strict=False))
            for e in expected]  # fmt: skip
    assert check_rows(rows) == check_rows(datasets.Dataset.from_list(rows)) == expected
    (tmp_path / "rows.csv").write_text(
        ",".join(columns) + "\ntwo legs?,a hen,a snake,a cat\nsix legs?,[1] a beetle,[8],\n"
    )
    assert read_rows(tmp_path / "rows.csv") == expected
    triplet = {"weight": 2.0, "anchor": "x", "positive": "y", "negative": "z"}
    assert check_rows([triplet]) == [
        {"weight": 2.0, "prompt": "x", "candidates": ["y", "z"], "best": 0}
    ]
    with pytest.raises(DataError, match="triplet row: column 'negative': expected text"):
        check_rows([{"anchor": "x", "positive": "y"}])
    with pytest.raises(DataError, match="column 'anchor': expected text"):
        check_rows([{"positive": "y", "negative": "z"}])


@pytest.mark.parametrize("name", ["FlagEmbedding", "Tevatron", "sentence-transformers", "NeMo-RL"])
def test_the_same_groups_have_the_same_loss(name, tokenizer, tmp_path):
    """Ragged groups in one format and our own: loss and gradient agree to the bit."""
    plain = [ours(g) for g in GROUPS]
    if name == "NeMo-RL":
        plain = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in plain]
    loss, gradient = loss_of(batch_of(plain, tokenizer))
    assert loss > 0 and gradient.abs().max() > 0
    for source, rows in read_all([WRITERS[name](g)[0] for g in GROUPS], tmp_path):
        theirs, their_gradient = loss_of(batch_of(rows, tokenizer))
        assert torch.equal(theirs, loss) and torch.equal(their_gradient, gradient), source


def test_one_file_may_hold_every_format(tmp_path):
    written, expected = zip(*(write(GROUPS[0]) for write in WRITERS.values()), strict=True)
    for source, rows in read_all(list(written), tmp_path):
        for row, wanted in zip(rows, expected, strict=True):
            found = {name: row.get(name) for name in wanted}
            assert found == wanted, source


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]),
                           "content": st.sampled_from(["a", "b"])}),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pair=st.tuples(MESSAGES, MESSAGES) | st.tuples(*[st.text("ab ", min_size=1)] * 2))
@example(pair=("What is it? It is red.", "What is it? It is blue."))
@example(pair=("the same", "the same"))
@example(pair=("long", "longer"))
def test_an_implicit_prompt_is_what_trl_extracts(pair):
    data_utils = pytest.importorskip("trl.data_utils", reason="trl is missing")
    chosen, rejected = pair
    # There TRL takes all but the last character of 'chosen' for the prompt.
    assume(not (chosen[0] != rejected[0] and chosen[-1] == " "))
    wanted = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    if wanted["prompt"] == []:
        with pytest.raises(DataError, match="begin as those of 'rejected' do"):
            check_rows([{"chosen": chosen, "rejected": rejected}])
        return
    (row,) = check_rows([{"chosen": chosen, "rejected": rejected}])
    assert row["prompt"] == wanted["prompt"] and row["best"] == 0
    assert row["candidates"] == [wanted["chosen"], wanted["rejected"]]


def test_several_rejected_are_the_rows_of_our_trl_trainer():
    row = {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "margin": [1.0, 2.0]}
    implicit = {"chosen": "see this", "rejected": ["see that", "see it"]}
    said = {"chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [[{"role": "assistant", "content": "b"}]]}  # fmt: skip
    asked = [{"role": "user", "content": "p"}]
    found = check_rows([row, implicit, {**said, "prompt": asked}, {**row, "margin": 0.5}])
    assert found[0] == {"prompt": "p", "candidates": ["a", "b", "c"], "best": 0,
                        "margin": [0.0, 1.0, 2.0]}  # fmt: skip
    assert found[1]["prompt"] == "see" and found[1]["candidates"] == [" this", " that", " it"]
    assert found[2]["prompt"] == asked and len(found[2]["candidates"]) == 2
    assert found[3]["margin"] == 0.5
    with pytest.raises(DataError, match="column 'rejected': expected text, as 'chosen' is, got 3"):
        check_rows([{**row, "rejected": ["b", 3]}])
    with pytest.raises(DataError, match="column 'margin': expected 2 finite numbers"):
        check_rows([{**row, "margin": [1.0]}])


def test_nothing_in_common_is_an_empty_prompt():
    (row,) = check_rows([{"chosen": "yes ", "rejected": "no"}])
    assert row == {"prompt": "", "candidates": ["yes ", "no"], "best": 0}


def test_a_prompt_as_text_beside_messages():
    user, yes, no = (
        {"role": role, "content": content}
        for role, content in [("user", "Is it?"), ("assistant", "Yes."), ("assistant", "No.")]
    )
    repeated = {"prompt": "Is it?", "chosen": [user, yes], "rejected": [user, no]}
    alone = {"prompt": "Is it?", "chosen": [yes], "rejected": [no]}
    rows = check_rows([repeated, alone])
    assert rows[0]["prompt"] == [user] and rows[1]["prompt"] == "Is it?"
    assert rows[0]["candidates"] == rows[1]["candidates"] == [[yes], [no]]
    tokenizer = make_tokenizer(template=CHAT)
    assert same(batch_of(rows[:1], tokenizer), batch_of(rows[1:], tokenizer))


def test_titles_and_other_columns():
    row = {"query_id": "7", "query": "q", "positive_passages": [{"title": "T", "text": "x"}],
           "negative_passages": [{"title": None, "text": "y"}, {"text": "z"}]}  # fmt: skip
    (found,) = check_rows([row])
    assert found == {"query_id": "7", "prompt": "q", "candidates": ["T x", "y", "z"], "best": 0}
    row = {"query": "q", "pos": ["a"], "neg": [], "prompt": "an instruction", "type": "normal"}
    assert check_rows([row]) == [
        {"prompt": "q", "candidates": ["a"], "best": 0, "type": "normal"}
    ]
    row = {"chosen": "ab", "rejected": "ac", "labels": "helpful", "ranks": "high", "id": 7}
    assert check_rows([row]) == [{"prompt": "a", "candidates": ["b", "c"], "best": 0, "id": 7}]


@pytest.mark.parametrize("columns", ["query docs labels", "anchor label texts", "a scores b"])
def test_columns_of_lists_go_by_order_and_labels_by_name(columns):
    values = {"label": [0, 3, 1], "labels": [0, 3, 1], "scores": [0, 3, 1]}
    first, *rest = columns.split()
    row = {first: "q"} | {c: values.get(c, ["x", "y", "z"]) for c in rest}
    expected = {"prompt": "q", "candidates": ["x", "y", "z"], "labels": [0, 3, 1]}
    assert check_rows([row]) == [expected]
    more = {"source": "web", "id": 7}
    assert check_rows([row | more]) == [expected | more]


@pytest.mark.parametrize("labels", ["labels", "grades"])
def test_weight_and_margin_are_none_of_the_columns_that_go_by_order(labels):
    both = {"weight": 2.0, "margin": [0.5, 0.0]}
    expected = both | {"prompt": "q", "candidates": ["x", "y"], "labels": [3, 1]}
    assert check_rows([both | {"query": "q", "docs": ["x", "y"], labels: [3, 1]}]) == [expected]


def test_scores_of_positives_alone_where_there_are_no_negatives():
    row = {"query": "q", "pos": ["a", "b"], "neg": [], "pos_scores": [0.5, 2]}
    expected = {"prompt": "q", "candidates": ["a", "b"], "labels": [1, 1],
                "teacher_scores": [0.5, 2]}  # fmt: skip
    assert check_rows([row]) == [expected]
    assert check_rows([{k: x for k, x in row.items() if k != "neg"}]) == [expected]


USER = [{"role": "user", "content": "u"}]
TEVATRON = {"query": "q", "positive_passages": [{"text": "a"}], "negative_passages": []}
BAD = [
    ({"a": 1, "b": 2}, "expected the columns of one of the formats fastrm: prompt, candidates",
     "NeMo-RL: context, completions", "got the columns 'a', 'b'"),
    ({}, "one of the formats", "columns none"),
    ({"prompt": "p"}, "got the columns 'prompt'"),
    ({f"c{i}": 1 for i in range(30)}, "'c19', ..."),
    ({"query": "q", "docs": ["a"], "labels": "x"}, "got the columns 'query', 'docs', 'labels'"),
    ({"prompt": "p", "chosen": "a"}, "TRL row: column 'rejected': expected text", "got nothing"),
    ({"chosen": 7, "rejected": "a"}, "TRL row: column 'chosen': expected text", "got 7"),
    ({"prompt": 7, "chosen": "b", "rejected": "a"}, "TRL row: column 'prompt'", "got 7"),
    ({"prompt": "p", "chosen": USER, "rejected": "a"}, "'rejected': expected messages, as"),
    ({"prompt": "p", "chosen": "a", "rejected": USER}, "'rejected': expected text, as"),
    ({"chosen": USER, "rejected": [{"role": "user", "content": "v"}]}, "TRL row: column 'chosen'",
     "begin as those of 'rejected' do"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "column 'margin'", "got 'x'"),
    ({"completions": []}, "NeMo-RL row: column 'context': expected text", "got nothing"),
    ({"context": USER, "completions": []}, "NeMo-RL row: column 'completions'", "got []"),
    ({"context": USER, "completions": [{"rank": 0, "completion": USER}, {"rank": 1}]},
     "column 'completions'", "got {'rank': 1} as completion 1"),
    ({"context": USER, "completions": [{"rank": 0.5, "completion": USER}]}, "as completion 0"),
    ({"context": USER, "completions": [{"rank": 0, "completion": USER},
                                       {"rank": -1, "completion": USER}]}, "as completion 1"),
    ({"pos": ["a"], "neg": ["b"]}, "FlagEmbedding row: column 'query'", "got nothing"),
    ({"query": "q", "pos": [], "neg": ["b"]}, "'pos': expected a list of at least one", "got []"),
    ({"query": "q", "pos": ["a"], "neg": ["b", 7]}, "'neg': expected a list of texts",
     "got 7 as text 1"),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]},
     "column 'neg_scores': expected 1 finite numbers", "got nothing"),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1, 2], "neg_scores": [1]},
     "column 'pos_scores': expected 1 finite numbers", "got [1, 2]"),
    (TEVATRON | {"query": None}, "Tevatron row: column 'query'", "got nothing"),
    (TEVATRON | {"positive_passages": []}, "'positive_passages'", "at least one", "got []"),
    (TEVATRON | {"negative_passages": [{"text": 7}]}, "'negative_passages'", "as passage 0"),
    (TEVATRON | {"negative_passages": ["x"]}, "{'title': text", "got 'x' as passage 0"),
    ({"query": "q", "docs": ["a", "b"], "labels": [1]},
     "sentence-transformers row: column 'labels': expected 2 finite numbers of at least 0"),
    ({"query": "q", "docs": ["a", "b"], "labels": [0, 0]}, "'labels': expected at least one",
     "got [0, 0]"),
    ({"query": "q", "docs": ["a", []], "labels": [1, 0]}, "'docs': expected a list of texts"),
    ({"query": "q", "docs": [], "labels": []}, "'docs': expected a list of at least one text"),
    ({"prompt": "p", "candidates": ["a"], "best": 0, "teacher_scores": [1, 2]},
     "column 'teacher_scores': expected 1 finite numbers", "got [1, 2]"),
    ({"prompt": "p", "candidates": ["a"], "ranks": [2**63]}, "column 'ranks': expected 1 integers"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_malformed_row_is_named(tmp_path, bad):
    row, *says = bad
    path = tmp_path / "x.jsonl"
    write_jsonl([{"chosen": "ab", "rejected": "ac"}, row], path)
    with pytest.raises(DataError) as e:
        read_rows(path)
    assert str(e.value).startswith(f"{path}:2: ") and "\n" not in str(e.value)
    with pytest.raises(DataError) as of_list:
        check_rows([row], "train_dataset")
    assert str(of_list.value) == str(e.value).replace(f"{path}:2", "train_dataset row 0")
    for part in says:
        assert part in str(e.value)


@pytest.mark.parametrize("name, content, says", [
    ("x.json", b'[{"prompt": "p", "candidates": ["a"], "best": 1}]',
     r"x\.json: row 0: column 'best'.* got 1"),
    ("x.json", b'[\n{"prompt": "p"\n', r"x\.json: expected a JSON list .* broken JSON: .* line 3"),
    ("x.json", b'{"prompt": "p"}', r"x\.json:1: expected the columns"),  # JSON lines
    ("x.json", b"[]", r"x\.json: expected at least one row, got an empty file"),
    ("x.csv", b"", r"x\.csv: expected at least one row"),
    ("x.csv", b"chosen,rejected\na,b\n\nc\n", r"x\.csv:4: expected 2 cells, .* got 1"),
    ("x.csv", b'prompt,candidates,best\n"p\nq","[""a""]",0\np,"[\'a\']",0\n',
     r"x\.csv:4: column 'candidates': expected JSON, got broken JSON"),
    ("x.csv", b"prompt,candidates,best\np,,0\n", r"x\.csv:2: column 'candidates'.* got nothing"),
    ("x.csv", b'chosen,rejected\n"a"b,c\n', r"x\.csv:2: expected CSV, got: "),
    ("x.csv", b"chosen,rejected\n\xff,b\n", r"x\.csv: expected UTF-8 text, got byte 0xff"),
    ("x.parquet", b"PAR", r"x\.parquet: expected a Parquet file, got: "),
])  # fmt: skip
def test_broken_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name, kind", [("x.csv", "CSV"), ("x.json", "JSON"),
                                        ("x.parquet", "Parquet")])  # fmt: skip
def test_missing_files_are_named(tmp_path, name, kind):
    with pytest.raises(DataError, match=f"{name}: expected a {kind} file, got: .*[Nn]o such file"):
        read_rows(tmp_path / name)


def test_a_file_goes_by_its_name_in_any_case_and_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "p", "candidates": ["a", "b"], "best": 0}
    write_csv([row], tmp_path / "ROWS.CSV")
    write_jsonl([row], tmp_path / "rows")
    assert read_rows("ROWS.CSV") == read_rows("rows") == [row]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_belongs_to_no_column(tmp_path, suffix):
    row = {"prompt": "p", "candidates": ["a", "b"], "best": 0}
    FILES[suffix]([row], file := tmp_path / f"rows{suffix}")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Excel writes it
    assert read_rows(file) == [row]


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(DataError) as e:
        check_rows([{"prompt": "p", "candidates": ["a", ["long"] * 1000], "best": 0}])
    assert "got ['long', 'long'" in str(e.value) and len(str(e.value)) < 200


def test_a_json_file_of_lines_is_read_as_such(tmp_path):
    write_jsonl([{"chosen": "ab", "rejected": "ac"}], tmp_path / "x.json")
    assert read_rows(tmp_path / "x.json") == [
        {"prompt": "a", "candidates": ["b", "c"], "best": 0}
    ]


def test_cells_that_begin_like_a_list(tmp_path):
    messages = [{"role": "assistant", "content": "d"}]
    for rejected, margin, expected in (
        (["b", "c"], [0.5, 1.0], ["b", "c"]), ("[b] c", 1.0, ["[b] c"]), ("[1, 2]", 1.0, ["[1, 2]"])
    ):  # fmt: skip
        row = {"prompt": "p", "chosen": "a", "rejected": rejected, "margin": margin}
        write_csv([row], tmp_path / "x.csv")
        found = read_rows(tmp_path / "x.csv")
        assert found == check_rows([row]) and found[0]["candidates"] == ["a", *expected]
    row = {"prompt": "p", "chosen": messages, "rejected": [messages, messages]}
    write_csv([row], tmp_path / "x.csv")
    assert read_rows(tmp_path / "x.csv")[0]["candidates"] == [messages] * 3


def test_large_cells_of_csv(tmp_path):
    row = {"prompt": "p", "candidates": ["a" * 300_000, "b"], "best": 0}
    write_csv([row], tmp_path / "x.csv")
    before = csv.field_size_limit()
    assert read_rows(tmp_path / "x.csv") == [row]
    assert csv.field_size_limit() == before


def test_a_split_of_a_dataset(tmp_path, monkeypatch):
    """A folder stands for the hub: the datasets library loads it by the same call."""
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team" / "pairs").mkdir(parents=True)
    for split, text in (("train", "b"), ("test", "c")):
        write_jsonl(
            [{"prompt": "p", "chosen": text, "rejected": "d"}] * 2,
            tmp_path / "team" / "pairs" / f"{split}.jsonl",
        )
    rows = read_rows("team/pairs:test")
    assert rows == [{"prompt": "p", "candidates": ["c", "d"], "best": 0}] * 2
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{}])
    with pytest.raises(DataError, match="team/other: row 0: expected the columns"):
        read_rows("team/other")
    assert asked == [(("team/other",), {"split": "train"})]


def test_datasets_that_cannot_be_loaded(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^team/pairs:test: no such file, and no dataset that "
                       r"could be loaded: .*team/pairs.*Offline"):  # fmt: skip
        read_rows("team/pairs:test")
    for name in ("a/b/c", "./rows", str(tmp_path / "none")):  # no name of a dataset
        with pytest.raises(DataError, match="expected a JSONL file, got: No such file"):
            read_rows(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets library, .* pip install datasets"):
        read_rows("team/pairs")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="x.parquet: a Parquet file needs pyarrow"):
        read_rows("x.parquet")
