"""Compiles the Triton kernels ahead of time, for GPUs that need not be here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from fastrm_kernels import listwise, rows, score
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "offsets_ptr": "*i64", "target_ptr": "*i64", "rows_ptr": "*i64", "marks_ptr": "*i32",
    "inverse_ptr": "*i32", "arrived_ptr": "*i32", "num_items_ptr": "*i64",
}  # fmt: skip
FLOATS = {"temperature": "fp64", "label_smoothing": "fp64", "center_coef": "fp64"}


def compile_kernel(name: str, D: int, dtype: str, target: str, **flags: Any) -> Any:
    """Compiled kernel `name` for hidden size D and dtype ("bf16", "fp16", "fp32", "fp64")."""
    kernel: Any = getattr(listwise, name, None) or getattr(score, name)
    size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[dtype]
    t = rows.tile(D, size)
    acc = triton.language.float64 if dtype == "fp64" else triton.language.float32
    meta = dict(
        D=D, D0=t.D0, D1=t.D1, BLOCK_M=t.BLOCK_M, BLOCK_C=64, BLOCK_P=32, ACC=acc,
        ONE_PROGRAM=False,
        SOFT=False, CENTER=False, HAS_BIAS=True, HAS_ROWS=False, HAS_MARGIN=False,
        HAS_GROUP_WEIGHT=False, HAS_NUM_ITEMS=False, REDUCTION="mean", DWEIGHT=True,
        INVERSE=False, DHIDDEN=True, COEF=False,
    )  # fmt: skip
    meta.update(flags)
    wide = "fp64" if dtype == "fp64" else "fp32"
    absent = {
        "margin_ptr": meta["HAS_MARGIN"], "group_weight_ptr": meta["HAS_GROUP_WEIGHT"],
        "rows_ptr": meta["HAS_ROWS"], "bias_ptr": meta["HAS_BIAS"],
        "num_items_ptr": meta["HAS_NUM_ITEMS"], "inverse_ptr": meta["HAS_ROWS"],
        "coef_ptr": meta["COEF"] or "listwise" not in name,
        "partial_ptr": meta["DWEIGHT"] or "listwise_bwd" in name,
    }  # fmt: skip
    signature, constants, attrs = {}, {}, {}
    for at, arg in enumerate(kernel.arg_names):
        if arg in meta:
            signature[arg], constants[(at,)] = "constexpr", meta[arg]
        elif not absent.get(arg, True):
            signature[arg], constants[(at,)] = "constexpr", None
        elif arg in FLOATS:
            signature[arg] = FLOATS[arg]
        elif arg.endswith("_ptr"):
            stored = arg in ("hidden_ptr", "weight_ptr", "bias_ptr", "dhidden_ptr", "dweight_ptr")
            signature[arg] = POINTERS.get(arg) or f"*{dtype if stored else wide}"
            if arg == "target_ptr" and meta["SOFT"]:
                signature[arg] = f"*{wide}"
            attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[arg] = "i32"
            if arg in ("stride_b", "stride_s") and D % 16 == 0:
                attrs[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": t.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers, stack bytes, spilled bytes and static shared memory, as ptxas reports them."""
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (\w+)", ptx)
    assert arch
    with tempfile.TemporaryDirectory() as d:
        source = Path(d) / "kernel.ptx"
        source.write_text(ptx)
        run = subprocess.run(
            [get_ptxas(TARGETS[target].arch).path, "-v", f"--gpu-name={arch[1]}", str(source),
             "-o", f"{d}/kernel.cubin"],
            capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = {k: 0 for k in ("registers", "stack", "spills")}
    for line in run.stderr.splitlines():
        if m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            found["stack"] = int(m[1])
            found["spills"] = int(m[2]) + int(m[3])
        if m := re.search(r"Used (\d+) registers", line):
            found["registers"] = int(m[1])
    found["shared"] = compiled.metadata.shared
    return found


def main() -> None:
    """One JSON line for each kernel asked for: target dtype D[,D...] [flag=value...]."""
    target, dtype, sizes, *flags = sys.argv[1:]
    words = {"True": True, "False": False}
    options = {k: words.get(v, v) for k, v in (f.split("=") for f in flags)}
    for D in map(int, sizes.split(",")):
        for name in ("_listwise_fwd_kernel", "_listwise_bwd_kernel"):
            compiled = compile_kernel(name, D, dtype, target, **options)
            line: dict[str, Any] = {"kernel": name, "target": target, "dtype": dtype, "D": D}
            if target.startswith("sm_"):
                line |= resources(compiled, target)
            else:
                line["binary"] = len(compiled.asm["hsaco"])
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
