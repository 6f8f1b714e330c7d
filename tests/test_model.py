import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fastrm.data import RaggedCollator, tokenize_rows
from fastrm.model import (
    RewardHead,
    attach_head,
    disable_dropout,
    is_encoder,
    load_reward_model,
    set_pad_token,
    stored_tensor,
    token_limit,
)

from .conftest import make_decoder, make_rows, make_tokenizer

DECODERS = ["llama", "qwen2", "gpt2"]


def collated(model, tokenizer, rows, limit=None):
    pairs = is_encoder(model)
    examples = tokenize_rows(tokenizer, rows, limit, pairs)
    return RaggedCollator(tokenizer.pad_token_id, last_token=not pairs)(examples)


def model_inputs(batch):
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {k: v for k, v in batch.items() if k in names}


def saved_decoder(folder, kind="llama", pad="<pad>", bos=None, **options):
    make_decoder(kind, **options).save_pretrained(folder)
    make_tokenizer(pad, bos).save_pretrained(folder)
    return str(folder)


def plain_loss(rewards, batch):
    """The loss in a loop, on the rewards of a model that knows nothing of fastrm."""
    sizes = batch["offsets"].diff().tolist()
    parts = [
        torch.log_softmax(r.double(), 0)[b]
        for r, b in zip(rewards.split(sizes), batch["target"], strict=True)
    ]
    return -torch.stack(parts).mean()


@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_the_loss_inside_the_model_is_the_loss_outside(kind, minilm):
    if kind == "bert":
        model, tokenizer = load_reward_model(minilm), AutoTokenizer.from_pretrained(minilm)
        plain = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=1)
    else:
        model, tokenizer, plain = make_decoder(kind), make_tokenizer(), make_decoder(kind)
    head = attach_head(model)
    set_pad_token(model, tokenizer)
    set_pad_token(plain, tokenizer)
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    batch = collated(model, tokenizer, make_rows(5))
    rewards = plain(**model_inputs(batch)).logits[:, 0]
    expected = plain_loss(rewards, batch)
    expected.backward()
    with head.fitting(batch) as result:
        loss = model(**model_inputs(batch)).logits.flatten()[0]
    loss.backward()
    torch.testing.assert_close(result.scores, rewards.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=0)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name.endswith(("score.weight", "classifier.weight")) or "layer" in name:
            assert p.grad.norm() > 0 or "k_proj.bias" in name or "key.bias" in name, name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=2e-6, rtol=1e-4, msg=name)
    if head.bias is not None:
        assert head.bias.grad.item() == 0.0
    with head.scoring(batch) as result:
        model(**model_inputs(batch))
    torch.testing.assert_close(result.scores, rewards, atol=1e-5, rtol=0)
    after = model(**model_inputs(batch)).logits[:, 0]  # outside: an ordinary classifier again
    torch.testing.assert_close(after, rewards, atol=1e-5, rtol=0)


def test_the_head_reads_only_the_candidates_rows():
    head = RewardHead(4, 1)
    hidden = torch.full((2, 3, 4), torch.nan)
    hidden.view(-1, 4)[[1, 5]] = torch.randn(2, 4)
    batch = {"offsets": torch.tensor([0, 2]), "target": torch.tensor([0])}
    with head.fitting(batch | {"rows": torch.tensor([1, 5])}) as result:
        out = head(hidden)
    assert out.shape == (2, 3, 1) and out.isfinite().all() and result.scores.shape == (2,)
    with pytest.raises(ValueError, match="rows"), head.fitting(batch):
        head(hidden)
    with pytest.raises(RuntimeError, match="boom"), head.fitting(batch):
        raise RuntimeError("boom")
    assert head(hidden).isnan().any()  # an error inside leaves no loss behind


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("kind", DECODERS)
def test_plain_transformers_gives_the_same_rewards(tmp_path, kind, pad):
    source = saved_decoder(tmp_path / "a", kind, pad)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = load_reward_model(source, tokenizer=tokenizer).eval()
    same_in_transformers(model, tokenizer, tmp_path / "b", kind)


def same_in_transformers(model, tokenizer, folder, kind, rtol=0.0):
    """Save, read back with transformers alone; padded at either side, alone and in a batch."""
    rows = make_rows(4)
    batch = collated(model, tokenizer, rows)
    with torch.no_grad(), attach_head(model).scoring(batch) as result:
        model(**model_inputs(batch))
    assert result.scores.std() > 1e-2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not any(isinstance(m, RewardHead) for m in plain.modules())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [i.tolist() for e in tokenize_rows(tokenizer, rows, None, False) for i in e["input_ids"]]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        if kind == "gpt2":  # it counts padding as positions unless told
            mask = padded["attention_mask"]
            padded["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        padded.pop("token_type_ids", None)
        with torch.no_grad():
            rewards = plain(**padded).logits[:, 0]
        torch.testing.assert_close(rewards, result.scores, atol=1e-5, rtol=rtol)
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([i])).logits[:, 0] for i in ids])
    torch.testing.assert_close(alone, result.scores, atol=1e-5, rtol=rtol)


@pytest.mark.slow
def test_smollm2_in_plain_transformers(tmp_path, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token == tokenizer.eos_token
    torch.manual_seed(0)
    model = load_reward_model(smollm2, tokenizer=tokenizer).eval()
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    # Over 30 layers, rounding differs with the batch's shape: 1e-5 of the reward's size on top.
    same_in_transformers(model, tokenizer, tmp_path, "llama", rtol=1e-5)


def test_a_new_head_is_drawn_sensibly_and_a_trained_one_kept(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=300, hidden_size=1024, intermediate_size=8,
                                  num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    from transformers import AutoModel, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "causal")
    make_tokenizer().save_pretrained(tmp_path / "causal")
    model = load_reward_model(str(tmp_path / "causal"))
    w = attach_head(model).weight
    assert w.shape == (1, 1024) and 0.9 < w.std() * 1025**0.5 < 1.1
    assert isinstance(model.score, RewardHead) and model.score.bias is None
    assert not torch.equal(load_reward_model(str(tmp_path / "causal")).score.weight, w)
    model.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    assert torch.equal(load_reward_model(str(tmp_path / "reward")).score.weight, w)
    backbone = AutoModel.from_pretrained(tmp_path / "reward")
    assert torch.equal(backbone.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_encoders_head_has_a_zero_bias(minilm):
    model = load_reward_model(minilm)
    assert isinstance(model.classifier, RewardHead) and model.classifier.bias.item() == 0
    assert 0.9 < model.classifier.weight.std() * 385**0.5 < 1.1


def test_the_head_stays_fp32_on_a_bf16_backbone(tmp_path):
    source = saved_decoder(tmp_path / "a")
    model = load_reward_model(source, dtype="bfloat16")
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    with torch.no_grad():  # a value that bf16 does not have
        model.score.weight.fill_(1.00390625)
    model.save_pretrained(tmp_path / "b")
    make_tokenizer().save_pretrained(tmp_path / "b")
    again = load_reward_model(str(tmp_path / "b"), dtype="auto")
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(again.score.weight, model.score.weight)
    tokenizer = make_tokenizer()
    batch = collated(model, tokenizer, make_rows(3))
    hidden = again.model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)[batch["rows"]]
    exact = hidden.double() @ again.score.weight.double()[0]
    with again.score.scoring(batch) as result:
        logits = again(**model_inputs(batch)).logits
    assert result.scores.dtype == torch.float32 and logits.shape == (len(exact), 1)
    torch.testing.assert_close(result.scores.double(), exact, atol=1e-5, rtol=1e-6)
    logits = again(**model_inputs(batch)).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 0].double(), exact, atol=1e-5, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(again.score(hidden), logits, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("shards", [False, True])
def test_the_head_of_a_checkpoint_that_is_no_safetensors(tmp_path, shards):
    model = make_decoder()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: p.detach() for name, p in model.state_dict().items()}
    if shards:
        names = {name: f"pytorch_model-{k % 2}.bin" for k, name in enumerate(state)}
        for file in set(names.values()):
            torch.save({n: x for n, x in state.items() if names[n] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_reward_model(str(tmp_path), dtype="bfloat16")
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, model.score.weight)
    with pytest.raises(OSError, match="neither model.safetensors nor pytorch_model.bin"):
        stored_tensor("score.weight", str(tmp_path / "nowhere"))


def test_attach_head():
    model = make_decoder()
    weight = model.score.weight
    head = attach_head(model)
    assert model.score is head and head.weight is weight and attach_head(model) is head
    assert set(model.state_dict()) == set(make_decoder().state_dict())
    with pytest.raises(ValueError, match="num_labels=1.* Linear has 0 such"):
        attach_head(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="Sequential has 2 such"):
        attach_head(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)))
    experts = make_decoder(
        "qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    assert attach_head(experts) is experts.score  # whose layers have gates with one output
    size = dict(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48, num_labels=1)
    pools_padding = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("xlnet", **size)
    )
    with pytest.raises(ValueError, match="XLNet.* reads each row at its last position, which is"):
        attach_head(pools_padding)


@pytest.mark.parametrize(
    "tokenizer, keep, had, expected",
    [
        (dict(pad="<pad>"), False, None, "<pad>"),
        (dict(pad="<eos>"), False, 0, "<eos>"),  # nothing else to choose
        (dict(pad=None), False, None, "<eos>"),
        (dict(pad="<eos>", unk="<unk>"), False, 0, "<unk>"),
        (dict(pad=None, unk="<|reserved_1|>", bos="<bos>"), False, None, "<|reserved_1|>"),
        (dict(pad="<eos>", unk="<eos>", bos="<bos>"), False, 0, "<eos>"),  # never BOS
        (dict(pad="<pad>"), True, 0, "<eos>"),  # what a trained model has stays
        (dict(pad="<pad>"), True, None, "<pad>"),
        (dict(pad="<pad>"), True, -1, "<pad>"),  # as old Llama configs have it
        (dict(pad="<pad>"), True, 10**6, "<pad>"),
    ],
)
def test_padding_token(tokenizer, keep, had, expected):
    tokenizer, model = make_tokenizer(**tokenizer), make_decoder()
    model.config.pad_token_id = had
    set_pad_token(model, tokenizer, keep=keep)
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == tokenizer.convert_tokens_to_ids(expected)


def test_who_pools():
    kinds = {
        "llama": False, "qwen2": False, "qwen3": False, "mistral": False, "gemma2": False,
        "gpt2": False, "gpt_neox": False, "phi3": False, "opt": False, "bloom": False,
        "bert": True, "roberta": True, "deberta-v2": True, "modernbert": True, "electra": True,
        "distilbert": True, "xlm-roberta": True, "t5": True, "bart": True,
    }  # fmt: skip

    class Model:
        def __init__(self, kind):
            self.config = AutoConfig.for_model(kind)

    assert {kind: is_encoder(Model(kind)) for kind in kinds} == kinds


def test_token_limit_and_dropout():
    model, tokenizer = make_decoder("gpt2", dropout=0.5), make_tokenizer()
    assert token_limit(model, tokenizer, None) == 128
    assert token_limit(model, tokenizer, 50) == 50
    config = AutoConfig.for_model(
        "roberta", hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=50,
        num_hidden_layers=1, num_labels=1, pad_token_id=1, max_position_embeddings=66,
    )  # fmt: skip
    roberta = AutoModelForSequenceClassification.from_config(config)  # its positions begin with 2
    assert token_limit(roberta, tokenizer, None) == 64
    tokenizer.model_max_length = 20
    assert token_limit(model, tokenizer, 50) == 20
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    disable_dropout(model)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    llama = make_decoder("llama", dropout=0.5).train()
    llama.config.pad_token_id = 1
    assert not torch.equal(llama(**inputs).logits, llama(**inputs).logits)
    disable_dropout(llama)
    assert torch.equal(llama(**inputs).logits, llama(**inputs).logits)
