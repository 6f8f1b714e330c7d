from contextlib import nullcontext
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GraniteConfig,
    LlamaForSequenceClassification,
)
from transformers.integrations import flex_attention as flex
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.granite.modeling_granite import GranitePreTrainedModel

from fastrm import packing
from fastrm.data import RaggedCollator
from fastrm.evaluate import score_rows
from fastrm.model import attach_head, disable_dropout, is_encoder, load_reward_model
from fastrm.packing import Cost, plan
from fastrm.trainer import RewardTrainer

from .conftest import VOCABULARY, make_decoder, make_rows, make_tokenizer
from .test_trainer import assert_same_weights, config, trained

WINDOW = 5  # shorter than the sequences
SLIDING = ["sliding_attention", "full_attention"]
KINDS = {
    "llama": {},
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": dict(head_dim=8),
    "mistral": dict(sliding_window=WINDOW),
    "gemma2": dict(sliding_window=WINDOW, head_dim=8),
    "gemma3_text": dict(sliding_window=WINDOW, head_dim=8, layer_types=SLIDING),
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
}
ATTENTIONS = [
    (kind, a) for kind in KINDS for a in ("sdpa", "eager") if (kind, a) != ("gemma2", "sdpa")
]
ALIBI = {
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
}


class GraniteReward(GenericForSequenceClassification, GranitePreTrainedModel):
    """Granite has no sequence classifier of its own."""


class Float64(TorchFunctionMode):
    """Where a model's code asks for float32, whatever its weights are, float64 in its place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


def make(kind, attention="sdpa", seed=0, **options):
    options = dict(pad_token_id=0, use_cache=False) | KINDS.get(kind, {}) | options
    if kind == "granite":
        model = GraniteReward(GraniteConfig(**make_decoder().config.to_dict() | options))
        model.load_state_dict(make_decoder(seed=seed).state_dict())  # it has llama's layers
    elif kind in ALIBI:
        model = make_decoder(kind, seed, **options, **ALIBI[kind])
    else:
        model = make_decoder(kind, seed, attn_implementation=attention, **options)
    disable_dropout(model)
    return model.double().eval()


def groups(shapes, seed=0):
    """Examples from (tokens of the prompt, tokens of each answer)."""
    rng = np.random.default_rng(seed)
    found = []
    for P, answers in shapes:
        prompt = rng.integers(1, VOCABULARY, P)
        found.append({
            "input_ids": [np.append(prompt, rng.integers(1, VOCABULARY, n)) for n in answers],
            "token_type_ids": None, "prompt_length": P, "margin": None, "weight": None,
            "target": int(rng.integers(len(answers))), "cut": False,
        })  # fmt: skip
    return found


RAGGED = groups([(4, (3, 9, 1)), (0, (2, 5)), (7, (4,)), (1, (2, 0, 1, 3, 4, 5, 6)), (9, (8, 8))])


def alone(model, examples):
    """Hidden states and gradients with plain transformers, one sequence at a time."""
    hidden, loss = [], 0.0
    for e in examples:
        ids = [torch.as_tensor(i)[None] for i in e["input_ids"]]
        states = [model.base_model(input_ids=i).last_hidden_state[0, -1] for i in ids]
        scores = model.score(torch.stack(states))[:, 0]
        loss = loss - torch.log_softmax(scores, 0)[e["target"]] / len(examples)
        hidden += states
    loss.backward()
    return torch.stack(hidden).detach(), gradients(model)


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_layout(model, examples, layout, cost=None):
    head = attach_head(model)
    batch = RaggedCollator(0, not is_encoder(model), [layout], cost)(examples)
    batch = packing.to_device(batch, model.device)
    with torch.no_grad(), head.reading(batch) as result:
        packing.run(model, batch, model.config)
    with head.fitting(batch):
        loss = packing.run(model, batch, model.config).logits.flatten()[0]
    loss.backward()
    return result.hidden, gradients(model)


def difference(expected, found):
    (h, g), (h2, g2) = expected, found
    assert g.keys() == g2.keys()
    return max(float((a - b).abs().max()) for a, b in [(h, h2), *((g[n], g2[n]) for n in g)])


@pytest.fixture(autouse=True)
def one_thread():
    """What is this small runs faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind, attention", ATTENTIONS)
def test_hidden_states_and_gradients_are_those_of_one_by_one(kind, attention):
    model = make(kind, attention)
    with Float64():
        expected = alone(model, RAGGED)
        assert all(g.norm() > 0 or ".k_proj.bias" in n for n, g in expected[1].items())
        for layout in ("split", "packed", "shared"):
            assert difference(expected, in_layout(model, RAGGED, layout)) <= 1e-10, layout
        model.train()
        both = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Float64())}
        model.gradient_checkpointing_enable(both)
        for layout in ("packed", "shared"):
            assert difference(expected, in_layout(model, RAGGED, layout)) <= 1e-10, layout


@pytest.mark.parametrize("kind", ALIBI)
def test_models_without_positions_share_prompts_through_their_cache(kind):
    model = make(kind)
    with Float64():
        expected = alone(model, RAGGED)
        for layout in ("split", "cached"):
            assert difference(expected, in_layout(model, RAGGED, layout)) <= 1e-10, layout


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=7)),
        min_size=1, max_size=4,
    ),
    st.sampled_from(["split", "packed", "shared", "cached"]),
    st.sampled_from([0.0, 0.05, 1.0]),
)  # fmt: skip
def test_any_groups_in_any_number_of_rows(shapes, layout, pair):
    model, examples = make("bloom" if layout == "cached" else "mistral"), groups(shapes)
    with Float64():
        expected = in_layout(model, examples, "padded")
        found = in_layout(model, examples, layout, Cost(pair))
    assert difference(expected, found) <= 1e-10


def no_mask(*args):
    return None


def causal(begins, ends, positions, window):
    return packing._bool_mask(begins, torch.full_like(ends, ends.shape[1]), positions, window)


def nothing(*args):
    return torch.full_like(packing._bool_mask(*args), -torch.inf, dtype=torch.float32)


BROKEN = {
    "no mask": lambda m: m.setitem(packing._MASKS, "sdpa", no_mask),
    "causal mask": lambda m: m.setitem(packing._MASKS, "sdpa", causal),
    "bool mask under eager": lambda m: m.setitem(packing._MASKS, "eager", packing._bool_mask),
    "no key under eager": lambda m: m.setitem(packing._MASKS, "eager", nothing),  # NaN
    "positions of the row": lambda m: m.setattr(packing, "run", without_positions),
}


def without_positions(model, batch, config):
    batch = {k: x for k, x in batch.items() if k != "attention_mask"}
    if "ends" in batch:
        B, L = batch["ends"].shape
        batch["position_ids"] = torch.arange(L).expand(B, L)
    return RUN(model, batch, config)


RUN = packing.run


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("what", BROKEN)
def test_the_check_sees_what_is_broken(monkeypatch, caplog, what, layout):
    attention = "eager" if "eager" in what else "sdpa"
    model = make_decoder("gpt2", attn_implementation=attention, pad_token_id=0)
    head = attach_head(model)
    assert packing.disagreement(model, head, layout) is None
    BROKEN[what](monkeypatch)
    assert "has other hidden states" in packing.disagreement(model, head, layout)
    layouts, whys = packing.usable(model, head, False)
    assert layout not in layouts and layout in whys and "padded" in layouts
    assert f"layout {layout} is not used: in it GPT2ForSequenceClassification" in caplog.text
    with pytest.raises(ValueError, match=f"layout {layout} cannot be used: GPT2.* other hidden"):
        packing.usable(model, head, False, layout)


class Deaf(LlamaForSequenceClassification):
    """Ignores any mask but one of padding."""

    def forward(self, attention_mask=None, **inputs):
        mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
        return super().forward(attention_mask=mask, **inputs)


def test_a_model_that_ignores_masks_trains_without_them(tmp_path, caplog):
    rows = make_rows(8)
    plain = trained(tmp_path, rows)
    model = Deaf(plain.model.config)
    model.load_state_dict(make_decoder().state_dict())
    caplog.set_level("INFO", logger="fastrm")
    deaf = trained(tmp_path, rows, model)
    assert "layout shared is not used: in it Deaf has other hidden states (by " in caplog.text
    (line,) = [r.getMessage() for r in caplog.records if "training Deaf" in r.getMessage()]
    assert "not shared: the model has other hidden states" in line
    assert_same_weights(deaf.model, plain.model)
    with pytest.raises(ValueError, match="layout shared cannot be used: Deaf has other hidden"):
        RewardTrainer(model, config(tmp_path, layout="shared"), rows, None, make_tokenizer())


@pytest.mark.parametrize("kind, layouts", [("gpt2", ["split", "packed", "shared"]),
                                           ("bloom", ["split", "cached"])])  # fmt: skip
def test_three_steps_give_the_same_weights(tmp_path, kind, layouts):
    rows = make_rows(24)
    with Float64():
        plain = trained(tmp_path, rows, make(kind), layout="padded")
        assert plain.state.global_step == 3
        for layout in layouts:
            model = make(kind)
            again = trained(tmp_path, rows, model, layout=layout)
            assert_same_weights(again.model, plain.model, atol=1e-10)
    assert not torch.equal(plain.model.score.weight, make(kind).score.weight)


def test_there_is_no_cache_under_gradient_checkpointing(tmp_path):
    args = config(tmp_path, layout="cached")
    RewardTrainer(make_decoder("bloom", **ALIBI["bloom"]), args, make_rows(4), None,
                  make_tokenizer())  # fmt: skip
    args.gradient_checkpointing = True
    with pytest.raises(ValueError, match="layout cached cannot be used: .* keeps no cache under"):
        RewardTrainer(make_decoder("bloom", **ALIBI["bloom"]), args, make_rows(4), None,
                      make_tokenizer())  # fmt: skip


def test_the_check_leaves_the_model_as_it_was():
    model = make_decoder("gpt2", dropout=0.5, pad_token_id=0).train()
    before, state = {k: p.clone() for k, p in model.state_dict().items()}, torch.get_rng_state()
    head = attach_head(model)
    layouts, whys = packing.usable(model, head, False)
    assert layouts == ["padded", "split", "packed", "shared"] and not whys
    assert model.training and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items())


class Stale(LlamaForSequenceClassification):
    """The right hidden states, but no gradients below its first layer, with a mask of its own."""

    def forward(self, attention_mask=None, **inputs):
        detached = attention_mask is not None and attention_mask.dim() == 4
        hook = self.model.layers[0].register_forward_hook(
            lambda module, args, out: out.detach() if detached else None
        )
        try:
            return super().forward(attention_mask=attention_mask, **inputs)
        finally:
            hook.remove()


def test_the_check_compares_gradients():
    model = Stale(make_decoder(pad_token_id=0).config)
    model.load_state_dict(make_decoder().state_dict())
    head = attach_head(model)
    assert "has other gradients" in packing.disagreement(model, head, "shared")
    assert packing.disagreement(model, head, "shared", gradients=False) is None


@pytest.mark.parametrize(
    "kind, options, layout, why",
    [
        ("bloom", {}, "shared", "takes no position_ids"),
        ("bloom", {}, "cached", None),
        ("llama", {}, "cached", None),
        ("mistral", {"sliding_window": 4}, "cached", "keeps no cache of a whole prompt"),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, "packed",
         "reads by window_size"),
        ("qwen3_next", {}, "shared", "has layers of kind linear_attention"),
        ("bert", {}, "shared", "reads both ways"),
        ("bert", {}, "packed", None),
        ("modernbert", {}, "packed", "reads by local_attention"),
    ],
)  # fmt: skip
def test_refusals(kind, options, layout, why):
    model = make_decoder(kind, pad_token_id=0, **options)
    found = packing.refusals(model, pools=is_encoder(model)).get(layout)
    assert found is None if why is None else why in found


def test_flash_attention_packs_and_does_not_share(monkeypatch):
    """With a stand-in for the kernel, which no CPU runs."""
    calls = []

    def varlen(module, q, k, v, mask, cu_seq_lens_q=None, **kwargs):
        calls.append(cu_seq_lens_q)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        starts = [0, q.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        parts = [[x[:, :, a:b] for x in (q, k, v)] for a, b in pairwise(starts)]
        out = [scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat(out, 2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    model = make("llama")
    expected = alone(model, RAGGED)
    model.config._attn_implementation = "flash_attention_2"
    cost = Cost.of(model)
    assert cost.varlen and difference(expected, in_layout(model, RAGGED, "packed", cost)) <= 1e-10
    assert calls[-1].tolist()[:4] == [0, 7, 20, 25]
    assert packing.refusals(model, False)["shared"].startswith("takes no mask with flash_attention")
    assert packing.disagreement(model, attach_head(model), "packed") is None


# FlexAttention wants heads of 16 on a GPU.
FLEX = {"llama": dict(head_dim=16)} | {
    kind: KINDS[kind] | dict(head_dim=16) for kind in ("mistral", "gemma2", "gemma3_text")
}
LONG = groups([(90, (30, 7, 1)), (0, (100, 3)), (40, (5,) * 9), (70, (50, 50)), (3, (2, 1))])


@given(
    st.lists(st.tuples(st.integers(0, 300), st.lists(st.integers(1, 200), min_size=1, max_size=4)),
             min_size=1, max_size=6),
    st.sampled_from(["packed", "shared"]),
    st.sampled_from([None, 1, 40, 128, 200]),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_blocks_of_flex_attention_hold_the_same_mask(shapes, layout, window, pair, both_ways):
    batch = plan(groups(shapes), [layout], Cost(pair)).build(0)
    ends, positions = batch["ends"], batch["position_ids"]
    B, L = ends.shape
    b, i = torch.arange(B), torch.arange(L)
    begins = i - positions if both_ways and layout == "packed" else i.expand(B, L)
    expected = packing._bool_mask(begins, ends, positions, window)
    found = packing._block_mask(begins, ends, positions, window)
    assert torch.equal(found.mask_mod(b[:, None, None, None], 0, i[:, None], i), expected)

    n = -(-L // 128)
    size = n * 128 - L
    tiles = [
        pad(expected, (0, size, 0, size), value=value).unflatten(3, (n, 128)).unflatten(2, (n, 128))
        for value in (False, True)
    ]
    read, whole = tiles[0].any(5).any(3), tiles[1].all(5).all(3)
    partial = _blocks(found.kv_num_blocks, found.kv_indices)
    full = _blocks(found.full_kv_num_blocks, found.full_kv_indices)
    assert not (partial & full).any() and not (full & ~whole).any()
    assert not (read & ~(partial | full)).any()
    if window is None:
        theirs = create_block_mask(found.mask_mod, B, None, L, L, device="cpu")
        assert torch.equal(full, _blocks(theirs.full_kv_num_blocks, theirs.full_kv_indices))
        assert torch.equal(partial, _blocks(theirs.kv_num_blocks, theirs.kv_indices))


def _blocks(count, which):
    """(B, 1, Q, K) bool from the first `count` of each list of blocks."""
    listed = torch.arange(which.shape[-1]) < count[..., None]
    return torch.zeros_like(listed).scatter(-1, which.long(), listed)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", FLEX)
def test_hidden_states_with_flex_attention_are_those_of_one_by_one(kind, monkeypatch):
    """Without compilation, and without gradients, which it has on a GPU alone."""
    from torch.nn.attention import flex_attention as torch_flex

    def uncompiled(query, key, value, training=False, **kwargs):
        # Without it a GPU takes a kernel that does not compile for short rows of changing length.
        assert kwargs["kernel_options"] == {"BACKEND": "TRITON"}
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", uncompiled)
    one_by_one, model = (make(kind, a, **FLEX[kind]) for a in ("eager", "flex_attention"))
    with Float64():
        expected, _ = alone(one_by_one, LONG)
    for layout in ("packed", "shared"):
        head, batch = attach_head(model), RaggedCollator(0, True, [layout], Cost(1e-3))(LONG)
        with torch.no_grad(), Float64(), head.reading(batch) as found:
            packing.run(model, batch, model.config)
        assert float((found.hidden - expected).abs().max()) <= 1e-10, layout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "kind, attention", [*ATTENTIONS, *((kind, "flex_attention") for kind in FLEX)]
)
def test_layouts_on_a_gpu_are_as_near_to_one_by_one_as_padded_is(kind, attention):
    """In fp32 there, against fp64 on the CPU."""
    flexible = attention == "flex_attention"
    options, examples = (FLEX[kind], LONG) if flexible else ({}, RAGGED)
    expected = alone(make(kind, "eager", **options), examples)
    model = make(kind, attention, **options).float().cuda()
    errors = {}
    for layout in ("padded", "packed", "shared"):
        hidden, found = in_layout(model, examples, layout)
        found = hidden.cpu(), {name: g.cpu() for name, g in found.items()}
        errors[layout] = difference(expected, found)
    assert max(errors.values()) <= 3 * errors["padded"], errors


def test_adapters_train_in_every_layout():
    peft = pytest.importorskip("peft")
    found = {}
    for layout in ("padded", "split", "packed", "shared"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
        model = peft.get_peft_model(make("qwen3"), lora).eval()
        head = attach_head(model)
        assert packing.usable(model, head, False, layout) == ([layout], {})
        with Float64():
            found[layout] = in_layout(model, RAGGED, layout)
        names = found[layout][1]
        assert any("lora" in n for n in names) and any("score" in n for n in names)
        assert not any("embed" in n for n in names)
        assert difference(found["padded"], found[layout]) <= 1e-10, layout


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet")


def make_encoder(kind, **options):
    """A tiny one; with RoBERTa's 1 as its padding token."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if kind == "distilbert":
        shape = dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    encoder = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_labels=1, pad_token_id=1, max_position_embeddings=64,
        **shape, **options,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(encoder)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    return model.double().eval()


def pairs(examples):
    """The same with token types, and with the padding token inside some texts."""
    found = []
    for e in examples:
        ids = [np.where(np.arange(len(i)) % 4 == 2, 1, i) for i in e["input_ids"]]
        types = [(np.arange(len(i)) >= e["prompt_length"]).astype(np.int64) for i in ids]
        found.append({**e, "input_ids": ids, "token_type_ids": types})
    return found


@pytest.mark.parametrize("kind, attention", [
    (kind, a) for kind in ENCODERS for a in ("sdpa", "eager") if (kind, a) != ("mpnet", "sdpa")
])  # fmt: skip
def test_packed_encoders_pool_what_they_would_one_by_one(kind, attention):
    model = make_encoder(kind)
    model.config._attn_implementation = attention
    examples = pairs(RAGGED)
    takes_types = kind in ("bert", "electra")
    sequences = [(i, t) for e in examples
                 for i, t in zip(e["input_ids"], e["token_type_ids"], strict=True)]  # fmt: skip
    scores = [
        model(input_ids=torch.as_tensor(i)[None],
              **({"token_type_ids": torch.as_tensor(t)[None]} if takes_types else {})).logits[0, 0]
        for i, t in sequences
    ]  # fmt: skip
    sizes = [len(e["input_ids"]) for e in examples]
    targets = [e["target"] for e in examples]
    loss = sum(-s.log_softmax(0)[t] for s, t in
               zip(torch.stack(scores).split(sizes), targets, strict=True))  # fmt: skip
    (loss / len(sizes)).backward()
    expected = torch.stack(scores).detach(), gradients(model)

    head = attach_head(model)
    if not takes_types:
        examples = [{**e, "token_type_ids": None} for e in examples]
    for layout, cost in (("packed", Cost()), ("packed", Cost(0.1)), ("split", Cost())):
        batch = RaggedCollator(1, False, [layout], cost)(examples)
        with head.fitting(batch) as found:
            packing.run(model, batch, model.config).logits.flatten()[0].backward()
        assert difference(expected, (found.scores, gradients(model))) <= 1e-10
    assert packing.disagreement(model, head, "packed", pools=True) is None
    assert packing.disagreement(model.bfloat16(), head, "packed", pools=True) is None


@pytest.mark.parametrize(
    "kind, options, why",
    [
        ("albert", dict(embedding_size=16), "fails with RuntimeError"),  # pools in one expression
        ("deberta-v2", dict(relative_attention=True), "fails with RuntimeError"),  # no mask of ours
        ("nystromformer", {}, "has other hidden states"),  # approximates its attention
    ],
)
def test_encoders_that_cannot_be_packed_are_found_out(kind, options, why):
    model = make_encoder(kind, **options)
    assert why in packing.disagreement(model, attach_head(model), "packed", pools=True)


@pytest.mark.parametrize("trains", [True, False])
def test_an_encoders_word_vectors_are_looked_up_once_where_they_train(trains):
    """Each look-up has a gradient as large as the vocabulary; frozen ones have none."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_labels=1,
                 num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    bert = AutoConfig.for_model("bert", **shape)
    model = AutoModelForSequenceClassification.from_config(bert).double().eval()
    table, calls = model.get_input_embeddings(), []
    table.weight.requires_grad_(trains)
    expected = in_layout(model, RAGGED, "padded")
    assert packing.disagreement(model, attach_head(model), "split", pools=True) is None
    table.register_forward_hook(lambda module, args, found: calls.append(args[0].numel()))
    batch = RaggedCollator(0, False, ["split"])(RAGGED)
    ends, lengths = zip(*batch["splits"], strict=True)
    with attach_head(model).fitting(batch):
        packing.run(model, batch, model.config).logits.flatten()[0].backward()
    assert difference(expected, (expected[0], gradients(model))) <= 1e-10
    assert len(ends) > 1 and len(calls) == (1 if trains else len(ends))
    assert sum(calls) == np.diff([0, *ends]) @ lengths


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
def test_data_parallel_models_take_several_forwards(one_process):
    model = make("gpt2")
    expected = alone(model, RAGGED)
    head, config = attach_head(model), model.config
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True, broadcast_buffers=False
    )
    for layout in ("split", "packed", "shared"):
        batch = RaggedCollator(0, True, [layout])(RAGGED)
        with head.fitting(batch):
            loss = packing.run(wrapped, batch, config).logits.flatten()[0]
        loss.backward()
        assert difference(expected, (expected[0], gradients(model))) <= 1e-10


def test_scores_are_the_same_in_every_layout(minilm):
    rows = make_rows(20)
    decoder, tokenizer = make_decoder(), make_tokenizer()
    decoder.config.pad_token_id = tokenizer.pad_token_id
    encoder, pieces = load_reward_model(minilm), AutoTokenizer.from_pretrained(minilm)
    for model, tok, layouts in (
        (decoder, tokenizer, ["auto", "split", "packed", "shared"]),
        (encoder, pieces, ["auto", "split", "packed"]),
    ):
        plain = score_rows(model, tok, rows, layout="padded", batch_size=7)
        for layout in layouts:
            found = score_rows(model, tok, rows, layout=layout, batch_size=7)
            for a, b in zip(plain, found, strict=True):
                assert a == pytest.approx(b, abs=1e-5), layout
    with pytest.raises(ValueError, match="layout shared cannot be used: BertFor.* both ways"):
        score_rows(encoder, pieces, rows, layout="shared")


def test_split_cuts_where_it_costs_least():
    rng, cost = np.random.default_rng(0), Cost(0.01, 10.0)
    for _ in range(20):
        lengths = sorted(rng.integers(1, 40, rng.integers(1, 9)).tolist())
        M = len(lengths)
        most = range(min(packing.SPLITS, M))
        every = [(0, *c, M) for k in most for c in combinations(range(1, M), k)]
        totals = {
            cuts: sum(cost.rows(b - a, lengths[b - 1]) + cost.forward for a, b in pairwise(cuts))
            for cuts in every
        }
        cuts, found = packing._cut(lengths, cost)
        assert found == pytest.approx(min(totals.values())) == pytest.approx(totals[0, *cuts])


def test_costs_by_hand():
    """Tokens, and for each the keys in its row, which for an answer after a cache are two rows."""
    examples, cost = groups([(8, (4, 2)), (6, (3,))]), Cost(0.01, 10.0, varlen=True)
    expected = {
        "padded": (3 * 12, 3 * 12 * 1.12 + 10),
        "packed": (31, 12 * 1.12 + 10 * 1.1 + 9 * 1.09 + 10),  # each reads its own sequence alone
        "cached": (2 * 8 + 3 * 4, 16 * 1.08 + 12 * 1.12 + 20),
    }
    for name, found in expected.items():
        p = plan(examples, [name], cost)
        assert (p.tokens, p.cost) == (found[0], pytest.approx(found[1])), name
    model = make_decoder()
    D = model.config.hidden_size
    # A key takes 4·D operations and a token 24·D², of which attention does half as many a second.
    assert Cost.of(model).pair == pytest.approx(2 * 4 * D / (24 * D**2))


def test_rows_are_as_many_as_cost_least():
    def tokens(lengths, pair):
        return plan(groups([(0, lengths)]), ["packed"], Cost(pair)).tokens

    assert tokens((8, 5), 0.0) == 13 and tokens((8, 5), 1.0) == 16  # one row of 13, or two of 8
    assert tokens((1, 1, 2), 1.0) == 4  # the two short ones beside the long one


def test_the_tokens_of_an_epoch_are_those_of_all_groups():
    said = packing.describe(groups([(3, (2, 2))] * 2000), 8, ["shared"], Cost(), True)
    assert said == "layout shared: 14000 tokens computed an epoch, padded 20000"


def test_auto_takes_the_cheapest():
    cost = Cost(1e-3, 8.0)

    def chosen(shapes, *layouts, cost=cost):
        return plan(groups(shapes), layouts or packing.LAYOUTS, cost).layout

    assert chosen([(0, (6, 6))] * 4) == "padded"
    assert chosen([(8, (4, 4))] * 4, "padded", "packed") == "padded"
    assert chosen([(8, (4, 4))] * 4) == "shared"
    assert chosen([(0, (2, 40)), (0, (3, 4, 2))], "padded", "split", "packed") == "packed"
    # In one row, attention would cost more than the prompt saves.
    assert chosen([(2, (9,) * 60)], "padded", "shared", cost=Cost(0.1)) == "padded"
    for shapes in ([(5, (1, 2))], [(3, (4,))] * 9, [(2, (7,) * 9), (30, (1,))]):
        every = [plan(groups(shapes), [name], cost) for name in packing.LAYOUTS]
        assert plan(groups(shapes), packing.LAYOUTS, cost).cost <= every[0].cost
        assert every[3].tokens <= every[0].tokens
