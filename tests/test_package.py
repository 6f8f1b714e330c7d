"""What importing and choosing a backend costs and does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrm
from fastrm import backends

CHILD = """
import json, sys, time
import torch
begin = time.perf_counter()
import fastrm
seconds = time.perf_counter() - begin
print(json.dumps({
    "seconds": seconds, "cuda": torch.cuda.is_initialized(),
    "loaded": [m for m in ("transformers", "triton", "torch._dynamo", "matplotlib")
               if m in sys.modules and m not in BEFORE],
}))
"""


def child(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTRM_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | env, capture_output=True, text=True
    )


def test_import_is_light() -> None:
    before = "import sys, torch\nBEFORE = set(sys.modules)\n"
    runs = [json.loads(child(before + CHILD).stdout) for _ in range(3)]
    assert min(r["seconds"] for r in runs) < 0.2
    assert not runs[0]["cuda"] and runs[0]["loaded"] == []


def test_every_public_name_exists() -> None:
    assert all(getattr(fastrm, name) for name in fastrm.__all__)
    assert set(fastrm.__all__) <= set(dir(fastrm))
    with pytest.raises(AttributeError, match="no attribute 'lossless'"):
        fastrm.lossless  # noqa: B018


def test_the_version_is_the_same_everywhere() -> None:
    import tomllib

    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == fastrm.__version__


LOSS = """
import logging, torch, fastrm
logging.basicConfig(level=logging.WARNING)
h, w = torch.ones(3, 4), torch.ones(4)
for _ in range(2):
    loss = fastrm.listwise_loss(h, w, offsets=torch.tensor([0, 3]), target=torch.tensor([1]))
print(f"{loss:.4f}")
"""


def test_no_compiler_falls_back_and_says_so_once(tmp_path: Path) -> None:
    run = child(LOSS, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert run.stdout == "1.0986\n", run.stderr
    assert run.stderr.count("falling back") == 1 and "no C++ compiler" in run.stderr


def test_an_explicit_backend_runs_or_says_why(tmp_path: Path) -> None:
    asked = LOSS.replace("torch.tensor([1])", 'torch.tensor([1]), backend="cpp"')
    run = child(asked, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert "RuntimeError: backend 'cpp' cannot run: no C++ compiler" in run.stderr
    off = child(asked, FASTRM_BUILD_CPP="0", XDG_CACHE_HOME=str(tmp_path))
    assert "building is switched off" in off.stderr
    wrong = child(LOSS, FASTRM_BACKEND="cudnn")
    assert "backend must be" in wrong.stderr
    if not torch.cuda.is_available():
        run = child(asked.replace('"cpp"', '"triton"'))
        assert "needs CUDA tensors, got tensors on cpu" in run.stderr


def test_statuses_name_every_backend() -> None:
    found = {s.name: s for s in backends.statuses()}
    assert list(found) == list(backends.NAMES)
    assert found["torch"].runs and found["cpp"].runs
    assert found["triton"].runs == torch.cuda.is_available()
