"""What only a CUDA device can show: no synchronisation, graphs, streams, big sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem, error, make, ragged_sizes

import fastrm

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


def test_no_synchronisation() -> None:
    p = cuda(zipf(5000, 256, gathered=True, margin=True))
    p.run("triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gathered", [False, True])
def test_one_launch_forward_one_backward(gathered: bool) -> None:
    p = cuda(zipf(5000, 256, gathered=gathered))
    leaves = p._leaves()

    def step() -> None:
        loss = fastrm.listwise_loss(*leaves, offsets=p.offsets, target=p.target, **p.options)
        loss.backward()
        for x in leaves:
            if x is not None:
                x.grad = None

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("listwise_fwd" in n for n in names) == 1, names
    assert sum("listwise_bwd" in n for n in names) == 1, names


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
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got[k], expected[k]) for k in expected)


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
    for got in results:
        assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("kind", ["pairs", "giant", "zipf"])
def test_the_combine_path(kind: str) -> None:
    sizes = ragged_sizes(kind, 30_000, torch.Generator().manual_seed(0))
    p = cuda(make(sizes, 64, gathered=True, margin=True), torch.float32)
    exact, got = p.run("torch"), p.run("triton")
    assert all(error(got[k], exact[k]) < 1e-4 for k in ("loss", "dhidden", "dweight"))


def test_more_than_2_31_elements() -> None:
    M, D = 2**31 // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 6 * M * D:
        pytest.skip("needs 13 GB of free GPU memory")
    hidden = torch.randn(M, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(D, device="cuda", dtype=torch.bfloat16) / 64
    offsets = torch.tensor([0, M - 5, M], device="cuda")
    target = torch.tensor([M - 6, 4], device="cuda")
    hidden.requires_grad_()
    loss, scores = fastrm.listwise_loss(
        hidden, weight, offsets=offsets, target=target, return_scores=True
    )
    loss.backward()
    tail = hidden.detach()[-5:].double() @ weight.double()
    assert error(scores[-5:], tail) < 1e-5
    expected = torch.outer((tail.softmax(0) - torch.eye(5, device="cuda").double()[4]) / 2,
                           weight.double())  # fmt: skip
    assert hidden.grad is not None and error(hidden.grad[-5:], expected) < 5e-3
