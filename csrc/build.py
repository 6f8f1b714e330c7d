"""Builds and loads the C++ CPU kernels: ninja and a compiler, no Python ABI in the result.

Reads no environment variable: the caller decides where and whether to build.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).resolve().parent
CACHE_DIR = Path.home() / ".cache" / "fastrm"  # what a caller uses that knows no better
AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
ISA_FLAGS = {
    "avx512bf16": f"{AVX512_FLAGS} -mavx512bf16",
    "avx512": AVX512_FLAGS,
    "avx2": "-mavx2 -mfma -mf16c",
    "base": "",
}
# -fopenmp compiles the pragmas of at::parallel_for; it is not given to the linker, so that GOMP_*
# resolves to the runtime torch has already loaded and no second one comes in.
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fopenmp -ffp-contract=fast -fvisibility=hidden -Wall -Wextra"
# gcc's own AVX-512 header trips maybe-uninitialized; psabi notes concern no exported function.
CXX_FLAGS += " -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-pragmas"


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def _isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["base"]


def library_name() -> str:
    """A name that changes with anything the binary depends on: torch, its ABI, the sources."""
    digest = hashlib.sha256()
    digest.update(f"{CXX_FLAGS} {ISA_FLAGS} {torch.compiled_with_cxx11_abi()}".encode())
    for path in sorted([*SOURCE_DIR.glob("*.h"), *SOURCE_DIR.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = torch.__version__.replace("+", "_")
    return f"fastrm_cpp-torch{version}-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def _ninja() -> str:
    try:
        import ninja  # the PyPI package, which ships the binary
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("the C++ kernels need ninja to build: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def _compiler(cxx: str | None) -> str:
    for name in [cxx] if cxx else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler to build the CPU kernels: {cxx or 'g++, c++, clang++'}")


def _ninja_file(compiler: str, name: str) -> str:
    torch_dir = Path(torch.__file__).resolve().parent
    include = f"-isystem {torch_dir}/include"
    lines = [
        "rule cxx",
        f"  command = {compiler} {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {compiler} -shared $in -L{torch_dir}/lib -ltorch_cpu -lc10 -o $out",
    ]
    for source in ("ops", "autograd"):
        lines += [f"build {source}.o: cxx {SOURCE_DIR}/{source}.cpp", f"  flags = {include}"]
    for isa in _isas():
        lines.append(f"build kernels_{isa}.o: cxx {SOURCE_DIR}/kernels.cpp")
        lines.append(f"  flags = -DFASTRM_ISA={isa} {ISA_FLAGS[isa]}")
    objects = " ".join(f"kernels_{isa}.o" for isa in _isas())
    lines.append(f"build {name}: link ops.o autograd.o {objects}")
    return "\n".join(lines) + "\n"


def build(out_dir: Path, cxx: str | None = None) -> Path:
    """Makes the library in out_dir unless it is there; safe among processes, atomic."""
    target = out_dir / library_name()
    if target.exists():
        return target
    ninja, compiler = _ninja(), _compiler(cxx)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        # The kernel drops a flock when its holder dies: a killed build never blocks the next.
        with open(out_dir / f".{target.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                logger.info("building %s with %s", target, compiler)
                _run_ninja(ninja, compiler, out_dir / f".{target.stem}.build", target)
    except OSError as error:
        raise BuildError(f"cannot build the CPU kernels in {out_dir}: {error}") from error
    return target


def _run_ninja(ninja: str, compiler: str, work: Path, target: Path) -> None:
    work.mkdir(exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(compiler, target.name))
    done = subprocess.run(
        [ninja, "-C", str(work)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise BuildError(f"building the CPU kernels failed:\n{done.stdout}")
    (work / target.name).replace(target)
    shutil.rmtree(work)


def library_path(build_mode: str, cache_dir: Path, cxx: str | None = None) -> Path:
    """The library for the present torch: beside the sources, in the cache, or built there.

    build_mode "0" never builds; "auto" and "1" build when none is found. BuildError if none.
    """
    if build_mode not in ("auto", "0", "1"):
        raise ValueError(f"build mode must be 'auto', '1' or '0', got {build_mode!r}")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the C++ kernels are built on Linux only, not on {sys.platform}")
    for directory in (SOURCE_DIR, cache_dir):
        if (path := directory / library_name()).exists():
            return path
    if build_mode == "0":
        raise BuildError(f"no prebuilt {library_name()}, and building is switched off")
    return build(cache_dir, cxx)


def load(build_mode: str, cache_dir: Path, cxx: str | None = None) -> Path:
    """Registers torch.ops.fastrm_cpp; returns the library it came from."""
    path = library_path(build_mode, cache_dir, cxx)
    torch.ops.load_library(str(path))
    return path
