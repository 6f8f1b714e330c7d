"""What the examples share, so that they run without a download: rows, a tokenizer, a tiny decoder.

With real ones: `AutoTokenizer.from_pretrained` and `fastrm.load_reward_model`.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = "the a cat dog bird sat ran sang on under near mat tree house so please".split()


def make_rows(n: int, seed: int = 0) -> list[dict]:
    """Ragged groups of 2 to 5 candidates; the best one says "please"."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(WORDS[:-1], k=rng.randint(2, 6)))

    rows = []
    for _ in range(n):
        candidates = [words() for _ in range(rng.randint(2, 5))]
        best = rng.randrange(len(candidates))
        candidates[best] += " please"
        rows.append({"prompt": words(), "candidates": candidates, "best": best})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        sep_token="[SEP]", model_max_length=128,
    )


def make_model(seed: int = 0) -> LlamaForSequenceClassification:
    """Random, 2 layers, one score: what `fastrm.load_reward_model` gives for a real decoder."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_labels=1, pad_token_id=0, max_position_embeddings=128,
        )
    )
