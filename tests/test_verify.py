"""A trained model gives the same rewards in every reader, and a planted flaw is called by name."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fastrm import RewardConfig, RewardTrainer, cli
from fastrm import verify as v
from fastrm.model import serve_raw

from .conftest import make_decoder, make_rows, make_tokenizer

HAS_CROSS_ENCODER = importlib.util.find_spec("sentence_transformers") is not None


def train(folder, tokenizer=None, rows=None, **options):
    args = RewardConfig(
        str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[],
        learning_rate=1e-3, max_steps=2, **options,
    )  # fmt: skip
    rows = rows or make_rows(12)
    trainer = RewardTrainer(make_decoder(), args, rows, None, tokenizer or make_tokenizer())
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained model, to plant a flaw in."""
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes(open(f"{trained}/{file}", "rb").read())
    return tmp_path


def edit(file, **changes):
    found = json.loads(file.read_text())
    found = {k: x for k, x in {**found, **changes}.items() if x is not None}
    file.write_text(json.dumps(found))


def names(found, errors=None):
    return {f["name"] for f in found["findings"] if errors in (None, f["error"])}


def finding(found, name):
    return next(f for f in found["findings"] if f["name"] == name)


def worst(found, dtype="float32"):
    return max(e["difference"] for e in found["readers"] if e.get("dtype") == dtype)


def check_all_agree(found):
    assert found["agree"] and not names(found, errors=True)
    assert worst(found) < 1e-5
    readers = {"fastrm", "AutoModel", "pipeline", *["CrossEncoder"] * HAS_CROSS_ENCODER}
    ran = {(e["reader"], e["dtype"], e["padding"], e["batch_size"])
           for e in found["readers"] if "difference" in e}  # fmt: skip
    assert ran == {
        (r, d, side, size) for r in readers for d in v.DTYPES for side, size in v.PADDINGS
        if (r, side) != ("fastrm", "left")
    }  # fmt: skip


def test_readers_agree_on_our_own_texts(trained):
    found = v.verify(trained)
    check_all_agree(found)
    assert found["candidates"] == sum(len(row["candidates"]) for row in v.ROWS)
    assert worst(found, "bfloat16") > 1e-4  # or bf16 was not read at all


@pytest.mark.parametrize("options", [{"bos": "<bos>"}, {"pad": "<eos>"}, {"unk": "<unk>"}], ids=str)
def test_readers_agree_with_other_tokenizers(tmp_path, options):
    found = v.verify(train(tmp_path, make_tokenizer(**options)))
    check_all_agree(found)
    if options == {"pad": "<eos>"}:
        assert "pad-eos" in names(found) and "eos" not in names(found)


def test_readers_agree_on_messages(tmp_path):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in make_rows(6)
    ]
    path = train(tmp_path, make_tokenizer(template=template), rows)
    found = v.verify(path, rows)
    check_all_agree(found)
    assert found["groups"] == 6 and "eos" not in names(found)
    assert ("chat-template" in names(found)) == HAS_CROSS_ENCODER


def test_an_encoder_agrees_padded_on_its_own_side(tmp_path, minilm):
    args = RewardConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no",
                        report_to=[], max_steps=1)  # fmt: skip
    trainer = RewardTrainer(minilm, args, make_rows(8))
    trainer.train()
    trainer.save_model()
    found = v.verify(str(tmp_path))
    assert found["agree"] and not names(found, errors=True)
    assert all(e["difference"] < found["tolerance"] for e in found["readers"] if e["counts"])
    assert finding(found, "left-padding")["difference"] > 1e-3
    assert "sigmoid" not in names(found)  # a new head says that it is raw


def test_a_wrong_pad_token(copy):
    edit(copy / "config.json", pad_token_id=7)
    found = v.verify(str(copy))
    assert not found["agree"] and names(found, errors=True) == {"pad-wrong"}
    problem = finding(found, "pad-wrong")
    assert "pad_token_id 7" in problem["what"] and "set pad_token_id" in problem["do"]
    assert problem["difference"] > 1e-3
    bad = [e for e in found["readers"] if e["counts"] and not e["difference"] < found["tolerance"]]
    assert {(e["padding"], e["batch_size"]) for e in bad} == {("right", 8)}


def test_no_pad_token(copy):
    edit(copy / "config.json", pad_token_id=None)
    found = v.verify(str(copy))
    assert not found["agree"] and names(found, errors=True) == {"pad-missing"}
    assert any("no padding token" in e.get("error", "") for e in found["readers"])


def test_what_a_missing_eos_costs(trained):
    problem = finding(v.verify(trained), "eos")
    assert "'<eos>'" in problem["what"] and "candidate + '<eos>'" in problem["do"]
    tokenizer, model = make_tokenizer(), v.load_reward_model(trained)
    costs = []
    for row in v.ROWS:
        for candidate in row["candidates"]:
            ids = tokenizer(row["prompt"] + candidate, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                costs.append(
                    model(torch.tensor([ids])).logits
                    - model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits
                )
    assert problem["difference"] == pytest.approx(max(abs(float(c)) for c in costs), abs=1e-5)


def test_a_tokenizer_that_lost_its_eos(copy):
    assert json.loads((copy / "config.json").read_text())["eos_token_id"] == 0
    edit(copy / "tokenizer_config.json", eos_token=None)
    problem = finding(v.verify(str(copy)), "eos-missing")
    assert "config.json says it is 0" in problem["what"] and problem["difference"] > 1e-3


def test_a_sigmoid_by_default(copy):
    problem = finding(v.verify(str(copy)), "sigmoid")
    readers = "pipeline and CrossEncoder" if HAS_CROSS_ENCODER else "pipeline"
    assert problem["what"].startswith(readers) and "function_to_apply" in problem["do"]
    config = AutoConfig.from_pretrained(copy)
    serve_raw(config)
    config.save_pretrained(copy)
    assert "sigmoid" not in names(v.verify(str(copy)))


def plant_tensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_in_bf16(copy):
    plant_tensor(copy, lambda t: t.update({"score.weight": t["score.weight"].bfloat16()}))
    found = v.verify(str(copy))
    assert "stored in bfloat16" in finding(found, "head-dtype")["what"]


def test_a_bias_that_the_class_does_not_read(copy):
    plant_tensor(copy, lambda t: t.update({"score.bias": torch.tensor([0.5])}))
    assert "bias of 0.5" in finding(v.verify(str(copy)), "bias")["what"]


def test_large_rewards_agree_to_a_share_of_the_largest(copy):
    plant_tensor(copy, lambda t: t.update({"score.weight": 10 * t["score.weight"]}))
    found = v.verify(str(copy))
    tokenizer = make_tokenizer()
    model = v.load_reward_model(str(copy), tokenizer=tokenizer)
    rewards = v.score_rows(model, tokenizer, v.ROWS)
    largest = max(abs(x) for scores in rewards for x in scores)
    assert largest > 2 and found["tolerance"] == pytest.approx(1e-5 * largest, rel=1e-3)


def test_a_text_that_ends_in_eos_gets_no_second_one():
    form = v.Form(True, "<bos>", "<eos>")
    for candidate in ("a", "a<eos>"):
        assert form.inputs("p", candidate) == {"text": "<bos>p", "text_pair": "a<eos>"}


def test_the_first_groups_that_fit_whole_are_read():
    rows, long = make_rows(v.GROUPS + 2, sizes=(2,)), "word " * 40
    rows[0] = {**rows[0], "prompt": long}  # would be cut
    rows[2] = {**rows[2], "candidates": [long]}
    found = v._fitting(make_tokenizer(), rows, 100, pairs=False)
    assert found == [rows[1], *rows[3:]] and len(found) == v.GROUPS
    assert len(v._fitting(make_tokenizer(), make_rows(40), None, pairs=False)) == 32


def test_no_head(copy):
    plant_tensor(copy, lambda t: t.pop("score.weight"))
    found = v.verify(str(copy))
    assert not found["agree"] and "head-missing" in names(found, errors=True)


def test_tokens_that_span_the_end_of_the_prompt(trained):
    rows = [{"prompt": "A spider has ei", "candidates": ["ght", "x"]}]
    found = v.verify(trained, rows)
    check_all_agree(found)  # as a pair nothing is merged
    problem = finding(found, "joined")
    assert "1 of 2 have other tokens" in problem["what"] and "the pair" in problem["do"]
    assert "joined" not in names(v.verify(trained, [{"prompt": "A", "candidates": [" spider"]}]))


def test_ties_are_counted_against_fp32():
    rows = [{"prompt": "p", "candidates": ["a", "b", "c"]}, {"prompt": "p", "candidates": ["a"]}]
    text = [v.Text("p", c, [1], None) for row in rows for c in row["candidates"]]
    data = v._Data(rows, text, v.Form(True, "", ""))
    data.rewards = torch.tensor([1.0, 2.0, 2.0, 5.0]).double().numpy()
    found = data.compare(torch.tensor([2.0, 2.0, 2.0, 5.5]).double().numpy())
    # Of three pairs one ties in fp32 already; of the two others both tie.
    assert found == {"difference": 1.0, "ties": 1.0, "best_changed": 0.5}


def test_command_line(copy, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out")
    assert cli.main(["verify", "--model", str(copy), "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the readers agree to" in printed and (out / "verify.txt").read_text() == printed
    edit(copy / "config.json", pad_token_id=7)
    assert cli.main(["verify", "--model", str(copy), "--json", str(out / "found.json")]) == 1
    printed = capsys.readouterr().out
    assert "error  pad-wrong: config.json has pad_token_id 7" in printed
    assert "disagrees" in printed and "do NOT agree" in printed
    assert not json.loads((out / "found.json").read_text())["agree"]


def test_command_line_mistakes(tmp_path, capsys):
    assert cli.main(["verify", "--model", str(tmp_path)]) == 2
    assert "expected a directory with config.json" in capsys.readouterr().err


def test_without_sentence_transformers(trained, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        v.importlib.util, "find_spec", lambda n: None if n == "sentence_transformers" else find(n)
    )
    found = v.verify(trained)
    assert found["agree"] and "not installed" in found["readers"][-1]["error"]
    assert "CrossEncoder  not installed" in v.report(found)
