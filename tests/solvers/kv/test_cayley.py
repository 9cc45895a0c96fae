"""The Cayley map: orthogonal, inverse, awkward bases, differentiable."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CacheError
from effllm.solvers.kv.cayley import parameters, rotation


def orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_round_trip() -> None:
    u = orthogonal(5, 3, 32, 32)
    x, signs = parameters(u)
    assert torch.equal(x, x.tril(-1)) and torch.equal(signs.abs(), torch.ones(5, 3, 1, 32).double())
    torch.testing.assert_close(rotation(x), u * signs, rtol=0, atol=1e-11)


AWKWARD = (lambda d: -torch.eye(d), torch.eye, lambda d: torch.eye(d).flip(0), lambda d: torch.diag(torch.tensor([-1.0] * 3 + [1.0] * (d - 3))))


@pytest.mark.parametrize("make", AWKWARD)
@pytest.mark.parametrize("d", [4, 7, 16])
def test_bases_with_eigenvalue_minus_one(make, d: int) -> None:  # type: ignore[no-untyped-def]
    u = make(d).double()
    x, signs = parameters(u)
    assert x.isfinite().all()
    torch.testing.assert_close(rotation(x), u * signs, rtol=0, atol=1e-10)


def test_any_parameters_give_an_orthogonal_matrix_of_determinant_one() -> None:
    x = 10 * torch.randn(4, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = rotation(x)
    torch.testing.assert_close(u.mT @ u, torch.eye(24, dtype=torch.float64).expand(4, 24, 24), rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.linalg.det(u), torch.ones(4, dtype=torch.float64))


def test_gradient() -> None:
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation, (x,))


def test_refuses_what_is_not_orthogonal() -> None:
    with pytest.raises(CacheError, match="E-KVC-BASIS"):
        parameters(torch.ones(4, 4))
