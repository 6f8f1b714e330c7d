"""What only a CUDA device can show: launches, graphs, streams, memory, big sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, error, make, ragged_sizes

import fastrm

RANKINGS = [fastrm.plackett_luce_loss, fastrm.bradley_terry_loss]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def cuda(p: Problem, dtype: torch.dtype = torch.bfloat16) -> Problem:
    p = p.to(dtype)
    move = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    bias = None if p.bias is None else p.bias.cuda()
    return Problem(p.hidden.cuda(), p.weight.cuda(), bias, p.offsets.cuda(), p.target.cuda(), move)


def zipf(M: int, D: int, **options: Any) -> Problem:
    return make(ragged_sizes("zipf", M, torch.Generator().manual_seed(M)), D, **options)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def step(p: Problem) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """A call of the loss, what to differentiate by, and an incoming gradient."""
    leaves = p._leaves()

    def loss() -> torch.Tensor:
        return fastrm.listwise_loss(
            *leaves, offsets=p.offsets, target=p.target, backend="triton", **p.options
        )

    return loss, [x for x in leaves if x is not None], torch.ones((), device="cuda")


@pytest.mark.parametrize("gathered", [False, True])
def test_no_synchronisation(gathered: bool) -> None:
    p = cuda(zipf(5000, 256, gathered=gathered, margin=True, num_items_in_batch=7))
    loss, leaves, grad = step(p)
    torch.autograd.grad(loss(), leaves, grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss(), leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ranking_step(
    function: Any, sizes: list[int], D: int, E: int, dtype: torch.dtype = torch.float32
) -> Callable[[], list[torch.Tensor]]:
    """Loss and gradients of a loss of ranks, with E heads."""
    g = torch.Generator("cuda").manual_seed(D)
    M = sum(sizes)
    offsets = fastrm.offsets_from_sizes(sizes).cuda()
    ranks = torch.randint(-1, 50, (M,), generator=g, device="cuda")
    hidden = torch.randn(M, D, generator=g, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(E, D, generator=g, device="cuda") / D**0.5).to(dtype).requires_grad_()
    grad = torch.ones((), device="cuda")

    def run(backend: str = "triton") -> list[torch.Tensor]:
        loss = function(hidden, weight, offsets=offsets, ranks=ranks, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight], grad)]

    return run


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("function", RANKINGS)
def test_rankings_do_not_synchronise(function: Any, E: int) -> None:
    run = ranking_step(function, ragged_sizes("zipf", 5000, torch.Generator()), 256, E)
    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "E"), [(96, 3), (576, 16), (4096, 4), (5120, 2), (16384, 64)])
def test_heads_as_accurate_as_eager_and_not_spilled(D: int, E: int, dtype: torch.dtype) -> None:
    from fastrm_kernels import backend

    g = torch.Generator("cuda").manual_seed(D)
    hidden = torch.randn(700, D, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(E, D, generator=g, device="cuda") / D**0.5).to(dtype)
    grad = torch.randn(300, E, generator=g, device="cuda", dtype=torch.float64)
    chosen = torch.randperm(700, generator=g, device="cuda")[:300]

    def run(name: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [hidden.to(wide).requires_grad_(), weight.to(wide).requires_grad_()]
        scores = fastrm.score(*leaves, rows=chosen, backend=name)
        return [scores.detach(), *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))]

    exact, eager, ours = run("torch", torch.float64), run("torch", dtype), run("triton", dtype)
    for times, got, theirs, x in zip((2, 3, 3), ours, eager, exact, strict=True):
        unit = torch.finfo(got.dtype).eps
        assert error(got, x) <= max(times * error(theirs, x), unit)
    launches = [backend._launch_outer_heads, *(
        (backend._launch_score_dot_fwd, backend._launch_weighted_sum_dot)
        if dtype == torch.bfloat16 else
        (backend._launch_score_heads_fwd, backend._launch_weighted_sum_heads)
    )]  # fmt: skip
    for launch in launches:
        assert launch.compiled
        assert all(compiled.n_spills == 0 for compiled, _ in launch.compiled.values())


@pytest.mark.parametrize("kind", ["giant", "fours", "zipf"])
def test_big_rankings(kind: str) -> None:
    """One ranking of 10^5, 10^5 rankings of 4, and both kinds together."""
    from fastrm_kernels import backend

    sizes = {"giant": [100_000], "fours": [4] * 100_000}.get(kind)
    sizes = sizes or [50_000, *ragged_sizes("zipf", 50_000, torch.Generator())]
    functions = RANKINGS[:1] if kind == "giant" else RANKINGS  # no time for 10^10 pairs
    for function in functions:
        if function is fastrm.bradley_terry_loss:
            sizes = [min(k, 10_000) for k in sizes]
        run = ranking_step(function, sizes, 8, 1, torch.float64)
        got, exact = run(), run("torch")
        assert all(error(a, b) < 1e-11 for a, b in zip(got, exact, strict=True))
    for launch in (backend._launch_plackett_luce_below, backend._launch_plackett_luce_finish,
                   backend._launch_group_loss, backend._launch_bradley_terry_pairs):  # fmt: skip
        assert all(compiled.n_spills == 0 for compiled, _ in launch.compiled.values())


@pytest.mark.parametrize("function", RANKINGS)
def test_graph_replay_of_rankings_has_eager_bits(function: Any) -> None:
    run = ranking_step(function, ragged_sizes("zipf", 3000, torch.Generator()), 128, 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("M", [64, 5000])
def test_one_launch_forward_one_backward(M: int, gathered: bool) -> None:
    loss, leaves, grad = step(cuda(zipf(M, 256, gathered=gathered)))
    torch.autograd.grad(loss(), leaves, grad)  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(loss(), leaves, grad)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ran = [n for n in names if not any(x in n.lower() for x in ("sync", "buffer request"))]
    assert ran == ["_listwise_fwd_kernel", "_listwise_bwd_kernel"]


def test_same_bits_every_run_and_arrivals_counted_back_to_zero() -> None:
    from fastrm_kernels import backend

    for D in (96, 1024, 5120):
        p = cuda(zipf(min(100_000, 40_000_000 // D), D, gathered=True, margin=True))
        first = p.run("triton")
        for _ in range(5):
            assert same_bits(p.run("triton"), first)
    torch.cuda.synchronize()
    assert backend._counters and not any(x.any() for x in backend._counters.values())


def test_nothing_is_spilled_here() -> None:
    from fastrm_kernels import backend

    launches = (backend._launch_listwise_fwd, backend._launch_listwise_bwd)
    for launch in launches:
        launch.compiled.clear()
    for D in (96, 384, 576, 896, 2048, 4096, 5120, 8192, 16384):
        cuda(zipf(300, D)).run("triton")
    for launch in launches:
        assert len(launch.compiled) >= 9
        assert all(compiled.n_spills == 0 for compiled, _ in launch.compiled.values())


def test_compiled_has_the_bits_of_eager() -> None:
    def loss(hidden: Any, weight: Any, offsets: Any, target: Any) -> torch.Tensor:
        return fastrm.listwise_loss(hidden, weight, offsets=offsets, target=target)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for M in (300, 5000, 70_000):
        p = cuda(zipf(M, 512, bias=False))
        found = []
        for call in (loss, compiled):
            hidden, weight, _ = p._leaves()
            value = call(hidden, weight, p.offsets, p.target)
            found.append([value, *torch.autograd.grad(value, [hidden, weight])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), M


def test_graph_replay_has_eager_bits() -> None:
    p = cuda(zipf(20_000, 512, bias=False))
    expected = p.run("triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        p.run("triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = p.run("triton")
    for _ in range(3):
        for x in got.values():
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(got, expected)
    assert same_bits(p.run("triton"), expected)


def test_streams_do_not_share_a_counter() -> None:
    p = cuda(zipf(50_000, 128))
    expected = p.run("triton")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for s in streams:
            with torch.cuda.stream(s):
                results.append(p.run("triton"))
    torch.cuda.synchronize()
    assert all(same_bits(got, expected) for got in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_current_device_need_not_be_the_tensors() -> None:
    p = cuda(zipf(5000, 128))
    expected = p.run("triton")
    with torch.cuda.device(1):
        assert same_bits(p.run("triton"), expected)


@pytest.mark.parametrize("kind", ["pairs", "giant", "zipf"])
def test_the_combine_path(kind: str) -> None:
    sizes = ragged_sizes(kind, 30_000, torch.Generator().manual_seed(0))
    p = cuda(make(sizes, 64, gathered=True, margin=True), torch.float32)
    exact, got = p.run("torch"), p.run("triton")
    assert all(error(got[k], exact[k]) < 1e-4 for k in ("loss", "dhidden", "dweight"))


@pytest.mark.parametrize("layout", ["unaligned", "padded", "batches"])
def test_layouts_that_compile_differently(layout: str) -> None:
    """Each after the plain one, whose kernel reads 16 bytes at once and must not be used."""
    p = cuda(zipf(3000, 512, bias=False), torch.float32)
    exact = p.run("torch")
    plain = p.run("triton")
    M, D = p.hidden.shape
    if layout == "unaligned":
        memory = torch.empty(M * D + 1, device="cuda")
        other = memory[1:].view(M, D)
    elif layout == "padded":
        other = torch.empty(M, D + 3, device="cuda")[:, :D]
    else:
        other = torch.empty(4, M // 4 + 5, D, device="cuda")[:, 2 : M // 4 + 2]
    p.hidden = other.copy_(p.hidden.view(other.shape))
    for _ in range(2):
        got = p.run("triton")
        for name in ("loss", "scores", "dhidden", "dweight"):
            wanted = exact[name].reshape(got[name].shape)
            assert error(got[name], wanted) <= 2 * error(plain[name], exact[name]) + 1e-6, name


def test_memory_beyond_the_gradient() -> None:
    """At 1 GB of hidden states: less than 2 % beside hidden and its gradient."""
    M, D = 2**17, 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * M * D:
        pytest.skip("needs 3.3 GB of free GPU memory")
    hidden = torch.randn(M, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.arange(0, M + 1, 4, device="cuda")
    target = torch.zeros(M // 4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastrm.listwise_loss(hidden, weight, offsets=offsets, target=target).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    size = hidden.numel() * hidden.element_size()
    assert size <= peak <= 1.02 * size


def test_more_than_2_31_elements() -> None:
    M, D = 2**31 // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 6 * M * D:
        pytest.skip("needs 13 GB of free GPU memory")
    hidden = torch.randn(M, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(D, device="cuda", dtype=torch.bfloat16) / 64
    offsets = torch.tensor([0, M - 5, M], device="cuda")
    target = torch.tensor([M - 6, 4], device="cuda")
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, scores = fastrm.listwise_loss(
        hidden, weight, offsets=offsets, target=target, return_scores=True
    )
    loss.backward()
    h, w = hidden.detach(), weight.detach().double()
    tail = h[-5:].double() @ w
    assert error(scores[-5:], tail) < 1e-5
    p = torch.cat([scores[:-5].double().softmax(0), tail.softmax(0)])
    p[M - 6] -= 1
    p[M - 1] -= 1
    assert hidden.grad is not None and weight.grad is not None
    for rows in (slice(0, 5), slice(M - 10, M)):
        expected = torch.outer(p[rows] / 2, w)
        # The smallest probabilities are beyond bf16's unit of the largest: compare row by row.
        assert all(error(a, b) < 5e-3 for a, b in zip(hidden.grad[rows], expected, strict=True))
    parts = zip(p.split(2**15), h.split(2**15), strict=True)
    dweight = sum((a.float() @ b.float()).double() for a, b in parts) / 2
    assert error(weight.grad, dweight) < 1e-2
