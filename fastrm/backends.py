"""Which backend runs, and why the others do not.

Once installed, this is the only file of the losses that reads the environment:

FASTRM_BACKEND    triton | cpp | torch: the backend when a call names none (read at import)
FASTRM_BUILD_CPP  auto | 1 | 0: build the C++ kernels when missing (1: an error if that fails)
XDG_CACHE_HOME    where they are kept once built, in fastrm/ (default ~/.cache)
FASTRM_CHECK      1: check values on CUDA too, at the price of a synchronisation
TRITON_INTERPRET  1: Triton's own switch; its kernels then run on the CPU, slowly, for tests
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger("fastrm")
NAMES = ("triton", "cpp", "torch")
_ASKED = os.environ.get("FASTRM_BACKEND")
_CHECK_DEVICE_VALUES = os.environ.get("FASTRM_CHECK", "0") == "1"


class Status(NamedTuple):
    name: str
    runs: bool
    note: str


FUSED: dict[str, Any] = {}  # the fused backends that are loaded
CPU_IS_CPP: list[str | None] = []  # what a call may name and get the C++ kernels, once loaded
_REFUSED: dict[str, str] = {}  # those that cannot be, and why


def choose(device_type: str, requested: str | None = None) -> str:
    """The backend for tensors on `device_type`, loaded; an error if the one asked for cannot run.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run here, or not on this device.
    """
    name = _ASKED if requested is None else requested
    if name is None:
        name = "triton" if device_type == "cuda" else "cpp" if device_type == "cpu" else "torch"
        return name if _load(name) else "torch"
    if name not in NAMES:
        raise ValueError(f'backend must be "triton", "cpp", "torch" or None, got {name!r}')
    if name == "torch":
        return name
    if name == "cpp" and device_type != "cpu":
        raise RuntimeError(f"backend 'cpp' runs on CPU tensors, got tensors on {device_type}")
    if name == "triton" and device_type == "cpu" and not _triton_interprets():
        raise RuntimeError(
            "backend 'triton' needs CUDA tensors, got tensors on cpu (TRITON_INTERPRET=1, set "
            "before Python starts, runs its kernels on the CPU for tests)"
        )
    if not _load(name):
        raise RuntimeError(f"backend {name!r} cannot run: {_REFUSED[name]}")
    return name


# What torch.compiler.assume_constant_result sets; calling that imports all of torch._dynamo.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_values(device_type: str, backend: str) -> bool:
    """Whether the caller checks values: the C++ kernels do it alone, CUDA would have to wait."""
    if device_type == "cpu":
        return backend != "cpp" and not torch.compiler.is_compiling()
    return _CHECK_DEVICE_VALUES and not torch.compiler.is_compiling()


def statuses() -> list[Status]:
    """One line for each backend, for `fastrm env`."""
    cuda = torch.cuda.is_available()
    found = []
    for name in ("triton", "cpp"):
        if name == "triton" and not cuda:
            note = "no CUDA device"
            if _triton_interprets():
                note += "; TRITON_INTERPRET=1 runs it on the CPU when asked for by name"
            found.append(Status(name, False, note))
        elif _load(name):
            found.append(Status(name, True, "CUDA tensors" if name == "triton" else "CPU tensors"))
        else:
            found.append(Status(name, False, _REFUSED[name]))
    return [*found, Status("torch", True, "every device; the reference")]


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _load(name: str) -> bool:
    if name in FUSED:
        return True
    if name not in _REFUSED:
        try:
            FUSED[name] = _load_triton() if name == "triton" else _load_cpp()
            if name == "cpp":
                CPU_IS_CPP.extend(["cpp", None] if _ASKED in (None, "cpp") else ["cpp"])
        except (ImportError, RuntimeError, OSError) as e:
            if name == "cpp" and _build_mode() == "1":
                raise
            _REFUSED[name] = str(e).strip().splitlines()[0]
            log.warning("backend %r cannot run, falling back to 'torch': %s", name, _REFUSED[name])
    return name in FUSED


def _build_mode() -> str:
    mode = os.environ.get("FASTRM_BUILD_CPP", "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"FASTRM_BUILD_CPP must be auto, 1 or 0, got {mode!r}")
    return mode


def _load_triton() -> Any:
    from fastrm_kernels.backend import TritonBackend

    if torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            raise RuntimeError(f"needs compute capability 8.0, this device has {major}.{minor}")
    return TritonBackend()


def _load_cpp() -> Any:
    from fastrm_csrc.backend import CppBackend

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrm"
    return CppBackend(_build_mode(), cache)
