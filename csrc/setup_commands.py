"""Setuptools commands that put a prebuilt kernel library in the wheel, where that makes sense.

Only a build that sees the torch it will run with can make one: pip --no-build-isolation, and a
compiler. Any other build skips it with one line, and the library is built at first use.
FASTRM_BUILD_CPP=1 makes a failure an error, 0 skips.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_py import build_py as _build_py

log = logging.getLogger(__name__)


def _builder() -> ModuleType:
    # fastrm_csrc is not importable yet: the package is being built.
    spec = importlib.util.spec_from_file_location(
        "fastrm_csrc_build", Path(__file__).with_name("build.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # ImportError where the build environment has no torch
    return module


class build_py(_build_py):
    """Copies the sources, then adds the library beside them."""

    library: str | None = None

    def run(self) -> None:
        super().run()
        mode = os.environ.get("FASTRM_BUILD_CPP", "auto")
        # An editable install has no build_lib of its own: it builds at first use, cached.
        if mode == "0" or self.editable_mode:
            return
        try:
            builder = _builder()
            path = builder.build(Path(self.build_lib).resolve() / "fastrm_csrc")
        except (ImportError, RuntimeError) as error:  # BuildError is a RuntimeError
            if mode == "1":
                raise
            reason = str(error).splitlines()[0]
            log.warning("C++ kernels not prebuilt, they are built at first use: %s", reason)
            return
        for leftover in path.parent.glob(".fastrm_cpp-*"):
            leftover.unlink()
        self.library = str(Path(self.build_lib) / "fastrm_csrc" / path.name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, self.library] if self.library else outputs


class bdist_wheel(_bdist_wheel):
    """Tags the wheel for the platform (any Python 3: no Python ABI) if it holds the library."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.get_finalized_command("build_py").library:
            platform = self.plat_name.replace("-", "_").replace(".", "_")
        return python, abi, platform
