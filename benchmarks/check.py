"""No timing without it: loss and gradients of the timed problem against float64.

Letters: N groups, M candidates, T rows of hidden, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastrm_benchmarks.problems import Problem
from torch import Tensor

from fastrm.reference import bradley_terry_loss_ref, listwise_loss_ref, plackett_luce_loss_ref

CHUNK = 2**23  # elements that are float64 at a time
REFERENCES = {"plackett_luce": plackett_luce_loss_ref, "bradley_terry": bradley_terry_loss_ref}
# Errors relative to the norm. fastrm: fp32 inside, one rounding of a gradient at the store.
# The others round scores, and so probabilities, to the type of hidden.
FASTRM = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 5e-3}
OTHERS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}


@dataclass
class Exact:
    loss: Tensor  # ()
    coefficients: Tensor  # (M, E): dhidden is coefficients @ weight, E = 1 but for an ensemble
    dweight: Tensor  # (E, D)


@torch.no_grad()
def exact(problem: Problem) -> Exact:
    """In float64 from the inputs as they are, hidden a piece at a time."""
    hidden = problem.hidden.flatten(0, -2)
    M, D = problem.point.candidates, problem.point.hidden_size
    rows = torch.arange(M, device=hidden.device) if problem.rows is None else problem.rows
    pieces = rows.split(max(1, CHUNK // D))
    weight, bias = problem.weight.double().view(-1, D), problem.bias.double()
    scores = torch.cat([hidden[i].double() @ weight.T for i in pieces]) + bias  # (M, E)
    reference = REFERENCES.get(problem.point.loss, listwise_loss_ref)
    with torch.enable_grad():
        scores.requires_grad_()
        losses = [reference(s, problem.offsets, problem.target) for s in scores.unbind(1)]
        loss = torch.stack(losses).mean()
        (coefficients,) = torch.autograd.grad(loss, scores, problem.grad.double())
    dweight = torch.zeros_like(weight)
    for i, c in zip(pieces, coefficients.split(len(pieces[0])), strict=True):
        dweight += c.T @ hidden[i].double()
    return Exact(loss.detach(), coefficients, dweight)


@torch.no_grad()
def errors(problem: Problem, loss: Tensor, exact: Exact) -> dict[str, float]:
    """Relative errors of the loss and of the gradients that lie in the leaves.

    Of a large dhidden some thousand rows are compared: candidates and others, first to last.
    """
    T, M, D = problem.point.num_rows, problem.point.candidates, problem.point.hidden_size
    dhidden, dweight = problem.hidden.grad, problem.weight.grad
    if dhidden is None or dweight is None:
        raise RuntimeError("backward left no gradient")
    coefficients = exact.coefficients
    some = _spread(M, max(1, CHUNK // (4 * D)), dhidden.device)
    if problem.rows is not None:
        spread = coefficients.new_zeros(T, coefficients.shape[1])
        coefficients = spread.index_copy(0, problem.rows, coefficients)
        some = torch.cat([problem.rows[some], _spread(T, len(some), dhidden.device)])
    return {
        "loss": _error(loss, exact.loss),
        "dhidden": _error(
            dhidden.flatten(0, -2)[some],
            coefficients[some] @ problem.weight.double().view(-1, D),
        ),
        "dweight": _error(dweight.view(-1, D), exact.dweight),
    }


def verdict(name: str, dtype: str, found: dict[str, float]) -> str | None:
    """What is wrong with a provider that has these errors; None if nothing is."""
    fastrm = name.startswith("fastrm-")
    gradient = FASTRM[dtype] if fastrm else OTHERS[dtype]
    for what, error in found.items():
        limit = FASTRM["fp32"] if fastrm and what == "loss" else gradient
        if not error <= limit:  # NaN is wrong too
            return f"{what} is off by {error:.1e} of its norm, limit {limit:.0e}"
    return None


def _spread(n: int, count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64, device=device).long()


def _error(got: Tensor, exact: Tensor) -> float:
    # Below the smallest subnormal, which is what fp16 gradients come to, nothing can be told.
    step = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    gap = ((got.double() - exact).abs() - step).clamp(min=0)
    return float(gap.norm() / exact.norm().clamp(min=1e-300))
