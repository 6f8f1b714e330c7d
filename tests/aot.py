"""The Triton kernels for GPUs that need not be here: compiled ahead of time, launched on a fake.

    python tests/aot.py sm_90,sm_80 bf16,fp32 384,4096 [FLAG=value ...] [+ another such line ...]
    python tests/aot.py sm_90 fp16 384,4096 kernels=heads E=8          (kernels=dot: those of bf16;
                                                          kernels=small: those of scores alone)
    python tests/aot.py launches
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from fastrm_kernels import backend, bradley_terry, groups, listwise, plackett_luce, rows, score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, LazyDict

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
KERNELS = {
    "listwise": ("_listwise_fwd_kernel", "_listwise_bwd_kernel"),
    "heads": ("_score_heads_fwd_kernel", "_outer_heads_kernel", "_weighted_sum_heads_kernel"),
    "dot": ("_score_dot_fwd_kernel", "_outer_heads_kernel", "_weighted_sum_dot_kernel"),
    "small": (
        "_inverse_kernel", "_plackett_luce_below_kernel", "_plackett_luce_finish_kernel",
        "_group_loss_kernel", "_bradley_terry_pairs_kernel", "_bradley_terry_finish_kernel",
    ),
}  # fmt: skip
MODULES = (listwise, score, groups, plackett_luce, bradley_terry)
POINTERS = {
    "offsets_ptr": "*i64", "target_ptr": "*i64", "rows_ptr": "*i64", "index_ptr": "*i32",
    "arrived_ptr": "*i32", "num_items_ptr": "*i64", "inverse_ptr": "*i32", "ranks_ptr": "*i64",
    "order_ptr": "*i64", "pairs_ptr": "*i32",
} | dict.fromkeys(
    ("terms_ptr", "slopes_ptr", "stats_ptr", "below_ptr", "after_ptr", "before_ptr"), "*fp64"
)  # fmt: skip
FLOATS = {"temperature": "fp64", "label_smoothing": "fp64", "center_coef": "fp64"}


def compile_kernel(name: str, D: int, dtype: str, target: str, **flags: Any) -> tuple[Any, str]:
    """Kernel `name` for hidden size D and dtype ("bf16", "fp32", ...), and what ptxas said."""
    kernel: Any = next(vars(x)[name] for x in MODULES if name in vars(x))
    t = tile(name, D, dtype, flags)
    acc = triton.language.float64 if dtype == "fp64" else triton.language.float32
    meta = dict(
        D=D, D0=t.D0, D1=t.D1, BLOCK_M=t.BLOCK_M, BLOCK_C=32, BLOCK_P=max(4 * t.num_warps, 8),
        ACC=acc, ONE_PROGRAM=False, SOFT=False, SMOOTH=False, CENTER=False, HAS_BIAS=True,
        HAS_ROWS=False, BATCHED=False, ALIGN=math.gcd(D, 16), HAS_MARGIN=False,
        HAS_GROUP_WEIGHT=False, HAS_NUM_ITEMS=False, REDUCTION="mean", DWEIGHT=True,
        INVERSE=False, DHIDDEN=True, PARTIAL=True, SLICED=True, ZERO=True, ROWS=t.ROWS,
    )  # fmt: skip
    if name in KERNELS["heads"] + KERNELS["dot"]:
        heads = flags.get("E", 4)
        meta |= dict(
            E=heads, BLOCK_E=t.D1, BLOCK_D=t.D0, HELD=min(heads, t.D1),
            PIECES=3 if flags.get("WEIGHT") == "fp32" else 1,
        )  # fmt: skip
    if name in KERNELS["small"]:
        meta |= dict(
            BLOCK=backend.BLOCK_G, FAN=128, BLOCK_I=backend.BLOCK_I, BLOCK_J=backend.BLOCK_J,
            FINAL=True, COEF=True, CENTER=True, PAIRS=True, HAS_POSITION_WEIGHT=True,
            HAS_MARGIN=True, HAS_GROUP_WEIGHT=True, HAS_NUM_ITEMS=True, HAS_ROWS=True,
        )  # fmt: skip
    meta.update(flags)
    meta["HAS_ROWS"] |= name.startswith("_weighted_sum_")  # those of heads
    wide = "fp64" if dtype == "fp64" else "fp32"
    absent = {
        "margin_ptr": meta["HAS_MARGIN"], "group_weight_ptr": meta["HAS_GROUP_WEIGHT"],
        "rows_ptr": meta["HAS_ROWS"], "bias_ptr": meta["HAS_BIAS"], "dbias_ptr": meta["ZERO"],
        "num_items_ptr": meta["HAS_NUM_ITEMS"],
        "position_weight_ptr": meta.get("HAS_POSITION_WEIGHT"),
        "sums_ptr": meta["SLICED"],
    }  # fmt: skip
    signature, constants, attrs = {}, {}, {}
    for at, param in enumerate(kernel.params):
        arg = param.name
        if param.is_constexpr:
            signature[arg], constants[(at,)] = "constexpr", meta[arg]
        elif not absent.get(arg, True):
            signature[arg], constants[(at,)] = "constexpr", None
        elif arg in FLOATS:
            signature[arg] = FLOATS[arg]
        elif arg.endswith("_ptr"):
            stored = arg in ("hidden_ptr", "weight_ptr", "bias_ptr", "dhidden_ptr", "dweight_ptr")
            signature[arg] = POINTERS.get(arg) or f"*{dtype if stored else wide}"
            if arg == "weight_ptr":
                signature[arg] = f"*{flags.get('WEIGHT', dtype)}"
            if arg == "target_ptr" and meta["SOFT"]:
                signature[arg] = f"*{wide}"
            if not param.do_not_specialize_on_alignment:
                attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[arg] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = rows.options(t, cuda=target.startswith("sm_"))
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    return compiled, log.getvalue()


def tile(name: str, D: int, dtype: str, flags: dict[str, Any]) -> rows.Tile:
    """How kernel `name` is launched."""
    if name == "_bradley_terry_pairs_kernel":
        return backend.PAIRS
    if name in KERNELS["small"]:
        return backend.SMALL
    if name == "_weighted_sum_heads_kernel":
        return rows.heads_tile(D, flags.get("E", 4))
    if name == "_outer_heads_kernel":
        return rows.outer_tile(D, SIZES[dtype])
    if name == "_score_dot_fwd_kernel":
        return rows.score_dot_tile(flags.get("E", 4))
    if name == "_weighted_sum_dot_kernel":
        return rows.sum_dot_tile(flags.get("E", 4))
    if name == "_listwise_fwd_kernel":
        return rows.forward_tile(D, SIZES[dtype])
    if name == "_listwise_bwd_kernel":
        return rows.write_tile(D, not flags.get("SOFT") and not flags.get("CENTER"))
    return rows.tile(D, SIZES[dtype])


def resources(compiled: Any, log: str) -> dict[str, int]:
    """Registers, stack bytes, spilled bytes and static shared memory, as ptxas reported them."""
    found = {}
    for name, pattern in (
        ("registers", r"Used (\d+) registers"), ("stack", r"(\d+) bytes stack frame"),
        ("stores", r"(\d+) bytes spill stores"), ("loads", r"(\d+) bytes spill loads"),
    ):  # fmt: skip
        match = re.search(pattern, log)
        assert match, log
        found[name] = int(match[1])
    found["spills"] = found.pop("stores") + found.pop("loads")
    return found | {"shared": compiled.metadata.shared}


def report(targets: str, dtypes: str, sizes: str, *flags: str) -> None:
    """One JSON line for each target, dtype, hidden size and kernel."""
    words = {"True": True, "False": False}
    options: dict[str, Any] = {
        k: int(v) if v.isdigit() else words.get(v, v) for k, v in (f.split("=") for f in flags)
    }
    names = KERNELS[options.pop("kernels", "listwise")]
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # from its cache Triton gives no log
    wanted = itertools.product(targets.split(","), dtypes.split(","), sizes.split(","), names)
    for target, dtype, D, name in wanted:
        compiled, log = compile_kernel(name, int(D), dtype, target, **options)
        line: dict[str, Any] = {"kernel": name, "target": target, "dtype": dtype, "D": int(D)}
        if target.startswith("sm_"):
            line |= resources(compiled, log)
        else:
            line["binary"] = len(compiled.asm["hsaco"])
        t = tile(name, int(D), dtype, options)
        print(json.dumps(line | {"warps": t.num_warps, "programs": t.programs_per_sm}), flush=True)


class _FakeGPU:
    """A Triton driver for an H100 that is not there: launches are noted, nothing runs."""

    calls: list[tuple[Any, ...]] = []
    loaded = itertools.count()

    class launcher_cls:  # noqa: N801
        def __init__(self, src: Any, metadata: Any) -> None: ...

        def __call__(self, *args: Any) -> None:
            _FakeGPU.calls.append(args)

    class utils:  # noqa: N801
        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return "module", (name, next(_FakeGPU.loaded)), 0, 0, 1024

        @staticmethod
        def unload_module(module: str) -> None: ...

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


class _Forgetful(dict[Any, Any]):
    """Of a launch that asks Triton every time."""

    def get(self, key: Any, default: Any = None) -> Any:
        return default


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def _problem(
    M: int = 64, D: int = 128, *, shift: int = 0, gap: int = 0, gathered: bool = False,
    soft: bool = False, dtype: torch.dtype = torch.bfloat16, reduction: str = "mean",
    smoothing: float = 0.0, center: float = 0.0, margin: bool = False, bias: bool = True,
    items: Tensor | None = None, needs_grad: bool = True, trained: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Forward and backward of M candidates in pairs; hidden `shift` elements into its memory.
    Without `needs_grad` forward alone; the head may not be `trained`."""
    memory = torch.zeros(4 * M * (D + gap) + shift, dtype=dtype)
    hidden = memory[shift:].view(4 * M, D + gap)[:, :D][: None if gathered else M]
    weight, b = torch.zeros(1, D, dtype=dtype), torch.zeros(1, dtype=dtype) if bias else None
    offsets = torch.arange(0, M + 1, 2)
    target = torch.full((M,), 0.5) if soft else torch.zeros(M // 2, dtype=torch.int64)
    chosen = torch.arange(0, 4 * M, 4) if gathered else None
    extra = torch.zeros(M) if margin else None
    grad = torch.ones(M // 2) if reduction == "none" else torch.ones(())
    options = (1.0, smoothing, center, reduction)
    triton_backend = backend.TritonBackend()

    def forward() -> tuple[Tensor, ...]:
        return triton_backend.listwise_fwd(
            hidden, weight, b, offsets, target, chosen, extra, None, items, *options, needs_grad,
            needs_grad and trained,
        )[2]  # fmt: skip

    def backward(state: tuple[Tensor, ...]) -> None:
        triton_backend.listwise_bwd(
            grad, weight, chosen, state, hidden, hidden.shape, dtype, options, True, trained, bias
        )

    def both() -> None:
        state = forward()
        if needs_grad:
            backward(state)

    both.forward, both.backward = forward, backward  # type: ignore[attr-defined]
    return both


def _head_problem(
    gathered: bool = False, M: int = 64, D: int = 128, E: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """Forward and backward of the scores of E heads."""
    hidden, weight = torch.zeros(4 * M, D, dtype=dtype), torch.zeros(E, D)
    chosen = torch.arange(0, 4 * M, 4) if gathered else None
    heads, grad = backend.TritonBackend(), torch.ones(M if gathered else 4 * M, E)

    def both() -> None:
        heads.score_fwd(hidden, weight, torch.zeros(E), chosen)
        heads.score_bwd(grad, hidden, weight, chosen, True, True, True)

    return both


def _ranking_problem(
    name: str, M: int = 64, extra: bool = False, center: float = 0.0, reduction: str = "mean",
    needs_coef: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """A loss of the scores of M candidates in pairs."""
    forward = getattr(backend.TritonBackend(), f"{name}_fwd")
    scores, offsets, ranks = torch.zeros(M), torch.arange(0, M + 1, 2), torch.arange(M)
    more = torch.zeros(M) if extra else None

    def run() -> None:
        forward(scores, offsets, ranks, more, None, None, 1.0, center, reduction, needs_coef)

    return run


def _noted(run: Callable[[], None]) -> list[Any]:
    """What the launches of `run` hand to the launcher; of tensors, what a kernel sees of them."""

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.shape, x.stride(), x.data_ptr() % 16
        return x.get() if isinstance(x, LazyDict) else x

    _FakeGPU.calls.clear()
    run()
    return [[plain(x) for x in call] for call in _FakeGPU.calls]


def _microseconds(run: Callable[[], Any], calls: int = 300) -> float:
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - begin)
    return round(1e6 * best / calls, 1)


def launches() -> None:
    """Every cached launch hands over what Triton's own would; one JSON line of what that costs."""
    triton.runtime.driver.set_active(_FakeGPU())
    rows.sm_count = lambda device: 132
    rows.scan_blocks = lambda device: (512, 128)
    plain = _problem()
    runs = {
        "plain": plain, "unaligned": _problem(shift=1), "again": plain, "strided": _problem(gap=8),
        "other stride": _problem(gap=1), "more rows": _problem(5000), "one program": _problem(2),
        "gathered": _problem(gathered=True), "soft": _problem(soft=True, margin=True),
        "fp32": _problem(dtype=torch.float32), "none": _problem(reduction="none"),
        "smoothed": _problem(smoothing=0.1), "centred": _problem(center=0.1),
        "no bias": _problem(bias=False), "wider": _problem(D=256),
        "alone": _problem(needs_grad=False),
        "gathered alone": _problem(gathered=True, needs_grad=False),
        "gathered for a fixed head": _problem(gathered=True, trained=False),
        "centred alone": _problem(center=0.1, needs_grad=False),
        "counted": _problem(items=torch.ones((), dtype=torch.int64)),
        "counted in fp32": _problem(items=torch.ones(())),
        "heads": _head_problem(), "heads gathered": _head_problem(True),
        "more heads": _head_problem(E=5), "heads in bf16": _head_problem(dtype=torch.bfloat16),
        "ranking": _ranking_problem("plackett_luce"),
        "longer ranking": _ranking_problem("plackett_luce", 5000, True, 0.1, "none"),
        "long ranking": _ranking_problem("plackett_luce", 5000),
        "ranking alone": _ranking_problem("plackett_luce", needs_coef=False),
        "ranking centred": _ranking_problem("plackett_luce", center=0.1),
        "pairs": _ranking_problem("bradley_terry"),
        "more pairs": _ranking_problem("bradley_terry", 5000, True, 0.1, "none"),
        "pairs alone": _ranking_problem("bradley_terry", needs_coef=False),
        "pairs centred": _ranking_problem("bradley_terry", center=0.1),
        "more heads in bf16": _head_problem(E=5, dtype=torch.bfloat16),
    }  # fmt: skip
    cached = [x for x in vars(backend).values() if isinstance(x, backend._Launch)]
    for run in runs.values():
        run()
    compiled = sum(len(x.compiled) for x in cached)
    ours = {name: _noted(run) for name, run in runs.items()}
    assert sum(len(x.compiled) for x in cached) == compiled
    kept = [x.compiled for x in cached]
    for x in cached:
        x.compiled = _Forgetful()
    for name, run in runs.items():
        assert _noted(run) == ours[name], name
    for x, found in zip(cached, kept, strict=True):
        x.compiled = found
    functions = [ours[name][0][4] for name in ("plain", "unaligned", "other stride", "wider")]
    assert len(set(functions)) == len(functions)
    assert ours["more rows"][0][4] == ours["plain"][0][4]  # another M compiles nothing

    line: dict[str, Any] = {"triton": triton.__version__}
    for name in ("heads", "heads gathered", "heads in bf16", "ranking", "longer ranking", "pairs",
                 "pairs alone"):  # fmt: skip
        line[name] = [call[4][0] for call in ours[name]]
    for name in ("plain", "gathered"):
        with _Operators() as operators:
            noted = _noted(runs[name])
        line[name] = {
            "launches": [call[4][0] for call in noted], "operators": sorted(operators.seen)
        }
        forward, backward = runs[name].forward, runs[name].backward  # type: ignore[attr-defined]
        state = forward()
        line[name]["forward_us"] = _microseconds(forward)
        line[name]["backward_us"] = _microseconds(lambda: backward(state))  # noqa: B023
    print(json.dumps(line))


if __name__ == "__main__":
    if sys.argv[1:] == ["launches"]:
        launches()
    else:
        if any("gfx" in word for word in sys.argv):
            rows.HAS_PTX = triton.language.constexpr(False)  # as torch for ROCm decides by itself
        for plus, words in itertools.groupby(sys.argv[1:], lambda word: word == "+"):
            if not plus:
                report(*words)
