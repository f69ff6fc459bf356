"""Hadamard matrices: rotations that spread outliers over all channels and cost nothing but signs.

A Hadamard matrix has entries of +1 and -1 and orthogonal rows. Orders are built by doubling (Sylvester) from 1, 2 or an
order of Paley: ``q + 1`` for primes ``q = 3 (mod 4)``, ``2 (q + 1)`` for primes ``q = 1 (mod 4)``. Rotating a model's
residual stream by one, signs of the channels drawn at random, is QuaRot's offline part (Ashkboos et al.,
arXiv:2404.00456).
"""

from __future__ import annotations

import torch

from lowbit.errors import UnsupportedError

__all__ = ["hadamard", "random_rotation"]


def hadamard(size: int) -> torch.Tensor:
    """A Hadamard matrix of +1 and -1, float32 ``[size, size]``.

    Raises :class:`UnsupportedError` for a size that none of the constructions makes.
    """
    for order in (size >> shift for shift in range(size.bit_length()) if size % (1 << shift) == 0):
        core = _core(order)
        if core is not None:
            while core.shape[0] < size:
                core = torch.cat((torch.cat((core, core), 1), torch.cat((core, -core), 1)))
            return core
    raise UnsupportedError(f"no Hadamard matrix of order {size} is known here", ["leave --rotate out for this model"])


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix, float32 ``[size, size]``: a Hadamard matrix whose rows have random signs, scaled."""
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    rotation: torch.Tensor = hadamard(size) * signs / size**0.5
    return rotation


def _core(order: int) -> torch.Tensor | None:
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return _paley(order - 1) + torch.eye(order)
    prime = order // 2 - 1
    if order % 2 == 0 and _is_prime(prime) and prime % 4 == 1:
        conference = _paley(prime)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, plus) + torch.kron(torch.eye(prime + 1), minus)
    return None


def _paley(prime: int) -> torch.Tensor:
    """The conference matrix of order ``prime + 1``: zeros on the diagonal, quadratic residues elsewhere."""
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)])
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if prime % 4 == 1 else -1.0
    return matrix


def _is_prime(value: int) -> bool:
    return value > 2 and all(value % factor for factor in range(2, int(value**0.5) + 1))
