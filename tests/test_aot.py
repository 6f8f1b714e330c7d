"""The Triton kernels compiled for GPUs that are not here, and their launches on a pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

D = "1,7,96,384,576,896,1000,2048,3584,4096,5120,8192,16384"
EVERY_OPTION = [f"{k}=True" for k in (
    "SOFT", "SMOOTH", "CENTER", "HAS_ROWS", "BATCHED", "HAS_MARGIN", "HAS_GROUP_WEIGHT",
    "HAS_NUM_ITEMS", "INVERSE",
)]  # fmt: skip
TWO_PASSES = ["DWEIGHT=False", "PARTIAL=False", "SLICED=False", "REDUCTION=none"]


def aot(*words: str) -> list[dict[str, Any]]:
    """What aot.py prints, from a process that does not run the kernels in the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *words],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_resources() -> None:
    """No spill and no stack, and as many programs resident as the grid is made for."""
    reports = aot(
        "sm_90", "bf16", D,
        "+", "sm_90", "fp32", "384,896,2048,4096,8192,16384",
        "+", "sm_80,sm_100", "bf16", "384,1000,4096,5120,16384",
        "+", "sm_80,sm_100", "fp32", "96,896,3584,16384",
        "+", "sm_80,sm_100", "fp16", "576,8192",
        "+", "sm_90", "bf16", "384,4096,16384", *EVERY_OPTION,
        "+", "sm_90", "bf16", "1000", *EVERY_OPTION, *TWO_PASSES,
    )  # fmt: skip
    assert len(reports) == 2 * (13 + 6 + 10 + 8 + 4 + 3 + 1)
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        threads = 32 * report["warps"] * report["programs"]
        assert threads * -(-report["registers"] // 8) * 8 <= 65536, report
        assert report["programs"] * (report["shared"] + 1024) <= 64 * 1024, report


def test_resources_of_heads_and_rankings() -> None:
    bare = ["HAS_MARGIN=False", "HAS_POSITION_WEIGHT=False", "CENTER=False", "FINAL=False"]
    reports = aot(
        "sm_90", "fp16", "96,1000,4096,5120,16384", "kernels=heads",
        "+", "sm_90", "fp32", "384,16384", "kernels=heads", "E=7", "HAS_ROWS=True",
        "+", "sm_80,sm_100", "fp16", "576", "kernels=heads", "BATCHED=True", "E=16",
        "+", "sm_90", "fp16", "96", "kernels=heads", "E=64",
        "+", "sm_80,sm_90,sm_100", "bf16", "96,4096", "kernels=dot", "E=8", "WEIGHT=fp32",
        "+", "sm_90", "bf16", "576,16384", "kernels=dot", "BATCHED=True", "E=64",
        "+", "sm_80,sm_90", "bf16", "1000", "kernels=dot", "E=30", "WEIGHT=fp16", "HAS_ROWS=True",
        "+", "sm_80,sm_90,sm_100", "fp32", "1", "kernels=small",
        "+", "sm_90", "fp32", "1", "kernels=small", *bare,
    )  # fmt: skip
    assert len(reports) == 3 * (5 + 2 + 2 + 1) + 3 * (6 + 2 + 2) + 6 * (3 + 1)
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        threads = 32 * report["warps"] * report["programs"]
        assert threads * -(-report["registers"] // 8) * 8 <= 65536, report


def test_every_target_compiles() -> None:
    reports = aot("sm_90", "fp64", "384,8192", "+", "gfx942", "bf16", "96,4096,5120",
                  "+", "sm_90", "fp64", "384", "kernels=heads",
                  "+", "gfx942", "fp16", "384", "kernels=heads",
                  "+", "gfx942", "bf16", "384", "kernels=dot",
                  "+", "gfx942", "fp32", "1", "kernels=small")  # fmt: skip
    assert [r.get("binary", r.get("registers")) > 0 for r in reports] == [True] * (10 + 6 + 3 + 6)


def test_a_cached_launch_is_tritons_own() -> None:
    (report,) = aot("launches")  # which compares every argument
    for name in ("plain", "gathered"):
        kernels = ["_listwise_fwd_kernel", "_listwise_bwd_kernel"]
        assert report[name]["launches"] == kernels
        assert report[name]["operators"] == ["aten.new_empty.default"]
    heads = ["_outer_heads_kernel", "_weighted_sum_heads_kernel", "_sum_partials_kernel"]
    assert report["heads"] == ["_score_heads_fwd_kernel", *heads]
    assert report["heads gathered"] == ["_score_heads_fwd_kernel", "_inverse_kernel", *heads]
    outer, _, combine = heads
    dot = ["_score_dot_fwd_kernel", outer, "_weighted_sum_dot_kernel", combine]
    assert report["heads in bf16"] == dot
    below, finish = "_plackett_luce_below_kernel", "_plackett_luce_finish_kernel"
    assert report["ranking"] == [below, "_group_loss_kernel", finish]
    assert report["longer ranking"] == [below, below, "_group_loss_kernel", finish]
    assert report["pairs"] == [
        "_bradley_terry_pairs_kernel", "_group_loss_kernel", "_bradley_terry_finish_kernel"
    ]  # fmt: skip
