"""The Triton kernels compile for GPUs that are not here, and stay within their registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from problems import HIDDEN_SIZES

SOME = (96, 4096, 5120)
EVERY_OPTION = [f"{k}=True" for k in (
    "SOFT", "CENTER", "HAS_ROWS", "HAS_MARGIN", "HAS_GROUP_WEIGHT", "HAS_NUM_ITEMS", "INVERSE",
)]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "dtype", "sizes", "flags"),
    [
        ("sm_90", "bf16", HIDDEN_SIZES, []),
        ("sm_90", "fp32", (384, 4096), []),
        ("sm_90", "fp64", (384,), []),
        ("sm_90", "bf16", (1000,), [*EVERY_OPTION, "DWEIGHT=False", "COEF=True", "REDUCTION=none"]),
        ("sm_80", "bf16", SOME, []),
        ("sm_100", "bf16", SOME, []),
        ("gfx942", "bf16", SOME, []),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_ahead_of_time(
    target: str, dtype: str, sizes: tuple[int, ...], flags: list[str]
) -> None:
    # In a process of its own: this one may run the kernels in the interpreter instead.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), target, dtype,
         ",".join(map(str, sizes)), *flags],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(reports) == 2 * len(sizes)
    for report in reports:
        if target.startswith("sm_"):
            assert 0 < report["registers"] <= 255, report
            if dtype != "fp64" and report["D"] <= 4096:
                assert report["spills"] <= 32, report  # bytes: a few words where it is not 0
            assert report["shared"] <= 48 * 1024, report
        else:
            assert report["binary"] > 0
