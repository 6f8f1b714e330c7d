"""One gradient however a step is cut: micro-batches, chunks of a group, layouts, processes.

Two processes on the CPU talk over gloo. A launch takes seconds, so what can share one does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import fastrm
from fastrm import packing
from fastrm.cli import main
from fastrm.evaluate import evaluate_rows
from fastrm.trainer import RewardTrainer

from .conftest import VOCABULARY, make_decoder, make_rows, make_tokenizer
from .test_trainer import config, logged, trained

METRICS = ("loss", "accuracy", "margin", "reward", "p_best", "grad_norm")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-6}


def make_groups():
    """8 groups, one of them with a third of all tokens, with weights and margins."""
    rows = make_rows(8, seed=1, sizes=(2, 3, 4))
    rows[3] = make_rows(1, seed=2, sizes=(14,))[0]
    rows[1] |= {"weight": 2.5, "margin": 0.7}
    rows[6]["weight"] = 0.0
    return rows


def three_steps(folder, rows, dtype=torch.float64, **options):
    """Weights and logged metrics."""
    model = make_decoder(options.pop("kind", "gpt2")).to(dtype)
    trainer = trained(folder, rows, model, max_steps=3, num_train_epochs=3, **options)
    assert trainer.state.global_step == 3
    model = trainer.accelerator.unwrap_model(trainer.model)
    history = {name: logged(trainer, name) for name in METRICS}
    return {n: p.detach().clone() for n, p in model.named_parameters()}, history


def assert_same(found, expected, dtype=torch.float64):
    for name, p in expected[0].items():
        torch.testing.assert_close(found[0][name], p, atol=LIMITS[dtype], rtol=0,
                                   msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, abs=1e-4 if dtype is torch.float32 else 1e-9)


CUTS = {
    "a limit that nothing reaches": dict(max_tokens_per_batch=10_000),
    "4 micro-batches of unequal counts": dict(max_tokens_per_batch=290, layout="padded"),
    "one group in chunks": dict(max_tokens_per_batch=150),
    "every candidate alone": dict(max_tokens_per_batch=1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that all others must equal: the 8 groups padded in one batch."""
    runs = {}

    def run(dtype, kind="gpt2"):
        if (dtype, kind) not in runs:
            folder = tmp_path_factory.mktemp("whole")
            found = three_steps(folder, make_groups(), dtype, layout="padded", kind=kind)
            runs[dtype, kind] = found
        return runs[dtype, kind]

    return run


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("strategy", ["sequential", "random"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, whole, cut, strategy, dtype):
    found = three_steps(tmp_path, make_groups(), dtype, gradient_accumulation_steps=50,
                        train_sampling_strategy=strategy, **CUTS[cut])  # fmt: skip
    assert_same(found, whole(dtype), dtype)


KINDS = {"cached": "bloom"}  # a model that takes that layout, if not in float64


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("limit", [None, 300, 90])
def test_nor_on_the_layout(tmp_path, whole, layout, limit):
    kind, dtype = KINDS.get(layout, "gpt2"), torch.float32 if layout in KINDS else torch.float64
    found = three_steps(tmp_path, make_groups(), dtype, max_tokens_per_batch=limit, layout=layout,
                        kind=kind, gradient_accumulation_steps=50)  # fmt: skip
    assert_same(found, whole(dtype, kind), dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_in_chunks_leaves_its_bias_exactly_alone(tmp_path, checkpointing):
    runs = []
    for limit in (None, 100):
        torch.manual_seed(0)
        shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_labels=1,
                     num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
        bert = AutoConfig.for_model("bert", **shape)
        model = AutoModelForSequenceClassification.from_config(bert)
        trainer = trained(tmp_path, make_groups(), model.double(), max_tokens_per_batch=limit,
                          gradient_accumulation_steps=50, num_train_epochs=3,
                          gradient_checkpointing=checkpointing)  # fmt: skip
        assert trainer.model.classifier.bias.item() == 0
        history = {name: logged(trainer, name) for name in METRICS}
        runs.append((dict(trainer.model.named_parameters()), history))
    assert any("chunks" in batch for batch in trainer.get_train_dataloader())
    assert_same(runs[1], runs[0])


def test_chunks_train_a_head_alone(tmp_path):
    heads = []
    for limit in (None, 100):
        model = make_decoder("gpt2").double()
        model.transformer.requires_grad_(False)
        heads.append(trained(tmp_path, make_groups(), model, max_tokens_per_batch=limit,
                             gradient_accumulation_steps=50).model.score.weight)  # fmt: skip
    torch.testing.assert_close(*heads, atol=1e-10, rtol=0)
    assert (heads[0] - make_decoder("gpt2").score.weight).abs().max() > 1e-3


def test_chunks_bound_a_forward_and_see_the_same_dropout_twice(tmp_path):
    limit, calls = 100, []

    def spy(module, args, output):
        calls.append((torch.is_grad_enabled(), output.last_hidden_state.detach()))

    model = make_decoder("gpt2", dropout=0.2)
    args = config(tmp_path, disable_dropout=False, max_tokens_per_batch=limit, layout="shared")
    row = make_rows(1, seed=2, sizes=(14,))
    trainer = RewardTrainer(model, args, row, None, make_tokenizer())
    model.transformer.register_forward_hook(spy)
    trainer.train()
    half = len(calls) // 2
    assert half > 2 and [c[0] for c in calls] == [False] * half + [True] * half
    assert all(hidden.shape[:-1].numel() <= limit for _, hidden in calls)
    for (_, first), (_, second) in zip(calls[:half], calls[half:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(calls[0][1][:, :4], calls[1][1][:, :4])  # the same prompt


GROUPS = {  # two processes: whose groups, what cuts them; one process does the same without cuts
    "unequal counts": (make_groups, dict(max_tokens_per_batch=10_000)),
    "accumulation": (make_groups, dict(max_tokens_per_batch=290, gradient_accumulation_steps=50)),
    "one group in chunks": (
        make_groups, dict(max_tokens_per_batch=150, gradient_accumulation_steps=50)
    ),
    "every candidate alone": (
        make_groups, dict(max_tokens_per_batch=1, gradient_accumulation_steps=50)
    ),
    "a device without groups": (lambda: make_groups()[:1], dict()),
    "chunks and a device without groups": (
        lambda: make_groups()[3:4], dict(max_tokens_per_batch=100)
    ),
    "an end that is shorter": (lambda: make_rows(21), dict(per_device_train_batch_size=4)),
    **{layout: (make_groups, dict(layout=layout, kind=KINDS.get(layout, "gpt2"),
                                  max_tokens_per_batch=150, gradient_accumulation_steps=50))
       for layout in packing.LAYOUTS},
}  # fmt: skip


RUNS = [(name, dtype) for name in GROUPS for dtype in LIMITS
        if not (name in KINDS and dtype is torch.float64)]  # fmt: skip


def equal_worker(folder):
    """What each of two processes runs."""
    runs = {}
    for name, dtype in RUNS:
        rows, options = GROUPS[name]
        runs[name, dtype] = three_steps(folder / "out", rows(), dtype, **options)
    if int(os.environ["RANK"]) == 0:
        torch.save(runs, folder / "runs.pt")


def command_line_worker(folder):
    """A run with a checkpoint, and another that begins elsewhere and goes on from there."""
    options = [
        "--train-file", f"{folder}/train.jsonl", "--eval-file", f"{folder}/eval.jsonl",
        "--num-train-epochs", "2", "--gradient-accumulation-steps", "2", "--save-steps", "1",
        "--max-tokens-per-batch", "150", "--learning-rate", "0.02", "--optim", "sgd",
    ]  # fmt: skip
    assert main(["train", "--model", f"{folder}/a", "--output-dir", f"{folder}/whole",
                 *options]) == 0  # fmt: skip
    steps = len(list(folder.glob("whole/checkpoint-*")))
    middle = f"{folder}/whole/checkpoint-{steps // 2 + 1}"  # of the second epoch
    assert main(["train", "--model", f"{folder}/b", "--output-dir", f"{folder}/resumed",
                 "--resume-from-checkpoint", middle, *options]) == 0  # fmt: skip


class ShardedConfig(fastrm.RewardConfig):
    def __post_init__(self):
        super().__post_init__()
        # Accelerate shards on accelerators alone, though torch does so on the CPU too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class ShardedTrainer(fastrm.RewardTrainer):
    def training_step(self, *args):
        assert any(isinstance(p, DTensor) for p in self.model.parameters())
        return super().training_step(*args)


def sharded_worker(folder):
    fastrm.RewardConfig, fastrm.RewardTrainer = ShardedConfig, ShardedTrainer
    if os.environ["RANK"] != "0":
        packing.usable = None  # one process decides for all
    command_line_worker(folder)


def launch(folder, launcher, worker):
    script = folder / "worker.py"
    # Without the end of Python, during which gloo's threads now and then abort it.
    script.write_text(
        f"import os, sys\nfrom pathlib import Path\nfrom tests.test_distributed import {worker}\n"
        f"{worker}(Path({str(folder)!r}))\nsys.stdout.flush()\nos._exit(0)\n"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, script]
    with subprocess.Popen(command, env=environment, cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: torchrun then stops its workers
            output, _ = process.communicate()
    assert process.returncode == 0, output[-5000:]


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no")  # fmt: skip
LAUNCHERS = {
    "torchrun": (TORCHRUN, "command_line_worker"),
    "accelerate launch, DDP": ((*ACCELERATE, "--multi_gpu"), "command_line_worker"),
    "accelerate launch, FSDP2": (
        (*ACCELERATE, "--use_fsdp", "--fsdp_version=2",
         "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"), "sharded_worker"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(folder, TORCHRUN, "equal_worker")
    return torch.load(folder / "runs.pt", weights_only=False)


@pytest.mark.parametrize("name, dtype", RUNS, ids=str)
def test_nor_on_the_number_of_processes(tmp_path, whole, two_processes, name, dtype):
    rows, options = GROUPS[name]
    if rows is make_groups:
        expected = whole(dtype, options.get("kind", "gpt2"))
    else:
        expected = three_steps(tmp_path, rows(), dtype, layout="padded")
    assert_same(two_processes[name, dtype], expected, dtype)


@pytest.fixture(scope="module")
def launched():
    """The weights that each launcher trained."""
    return {}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line_trains_checkpoints_and_resumes(tmp_path, launcher, launched):
    for name, seed in (("a", 0), ("b", 1)):
        make_decoder(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for name, rows in (("train", [*make_groups(), *make_rows(9)]), ("eval", make_rows(7, seed=5))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    launch(tmp_path, *LAUNCHERS[launcher])
    weights, metrics = [], []
    for run in ("whole", "resumed"):
        weights.append(load_file(tmp_path / run / "model.safetensors"))
        metrics.append(json.loads((tmp_path / run / "metrics.json").read_text()))
    assert metrics[0]["train"]["steps"] == 6 and metrics[0]["train"]["epochs"] == 2
    assert metrics[0]["eval"] == metrics[1]["eval"]
    model = fastrm.load_reward_model(str(tmp_path / "whole"), tokenizer=make_tokenizer())
    alone = evaluate_rows(model, make_tokenizer(), make_rows(7, seed=5))
    logged = {k: x for k, x in metrics[0]["eval"].items() if k in alone}
    assert {"loss", "accuracy", "margin"} <= logged.keys()
    assert logged == pytest.approx({k: alone[k] for k in logged}, abs=1e-5)
    start = load_file(tmp_path / "a" / "model.safetensors")
    for name, p in weights[0].items():
        assert torch.equal(weights[1][name], p) and not torch.equal(start[name], p), name
        for other in launched.values():
            torch.testing.assert_close(p, other[name], atol=1e-6, rtol=0)
    launched[launcher] = weights[0]
