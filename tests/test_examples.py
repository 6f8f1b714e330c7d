"""The examples, as a reader runs them: each trains, and prints a loss that falls."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "accelerate_loop": ["accelerate"],
    "lightning_module": ["lightning"],
    "peft_lora": ["peft"],
    "pytorch_loop": [],
    "qlora": ["peft", "bitsandbytes"],
    "sentence_transformers_reranker": ["sentence_transformers", "datasets"],
    "transformers_trainer": [],
    "trl_reward_trainer": ["trl", "datasets"],
}


def losses(printed):
    return [float(x) for x in re.findall(r"^(?:step|epoch).* loss ([\d.]+)", printed, re.MULTILINE)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What an example prints, each run once; in this process, where the libraries are loaded."""
    folder, printed = tmp_path_factory.mktemp("examples"), {}

    def run(name, capsys, monkeypatch):
        for module in NEEDS[name]:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        if name not in printed:
            monkeypatch.chdir(folder)
            monkeypatch.syspath_prepend(EXAMPLES)
            capsys.readouterr()
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            printed[name] = capsys.readouterr().out
        return printed[name]

    return run


def test_every_example_is_here():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {"toy", *NEEDS}


@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(name, run, capsys, monkeypatch):
    found = losses(run(name, capsys, monkeypatch))
    assert len(found) >= 5 and found[-1] < 0.1 * found[0], found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pytorch_loop", "lightning_module"),  # batch by batch the same
        ("transformers_trainer", "trl_reward_trainer"),  # where one accumulates two micro-batches
    ],
)
def test_the_same_training_in_two_trainers(one, other, run, capsys, monkeypatch):
    a, b = (losses(run(name, capsys, monkeypatch)) for name in (one, other))
    n = min(len(a), len(b))
    assert n >= 5 and a[:n] == pytest.approx(b[:n], abs=1e-4)


def test_lora_example_loads_and_merges_to_the_same_rewards(run, capsys, monkeypatch):
    printed = run("peft_lora", capsys, monkeypatch)
    rewards = re.findall(r"^(?:trained|loaded|merged) +(.*)$", printed, re.MULTILINE)
    assert len(rewards) == 3 and len(set(rewards)) == 1


def test_reranker_example_reranks_better(run, capsys, monkeypatch):
    printed = run("sentence_transformers_reranker", capsys, monkeypatch)
    before, after = map(float, re.search(r"queries: ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after > before
