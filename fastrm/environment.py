"""What a number was measured on: versions, devices, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import fastrm


def environment() -> dict[str, str]:
    """Names and values, in the order `fastrm env` prints them; result files carry them too."""
    found = {"fastrm": fastrm.__version__, "commit": _commit(), "python": platform.python_version()}
    found |= {"platform": platform.platform(), "torch": torch.__version__}
    found |= {p: _version(p) for p in ("triton", "transformers", "accelerate")}
    found["cpu"] = f"{_cpu()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "the CPU only"
        found["cuda"] = f"no device; torch is built for {built}"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout that this package lies in, with + if files were changed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "not a checkout"
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.strip() else "")


def _cpu() -> str:
    """The model's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
