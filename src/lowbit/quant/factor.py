"""Matrix work on Gram matrices that touches only their upper half: factorising them and measuring errors with them."""

from __future__ import annotations

import torch

__all__ = ["invert_upper", "quadratic_form", "reverse_cholesky_"]

_BLOCK = 256


def reverse_cholesky_(matrix: torch.Tensor) -> bool:
    """Overwrite the upper triangle of positive definite ``matrix`` ``H`` with the upper ``R`` for which ``H = R Rᵀ``.

    This is the Cholesky factor of the matrix read backwards; ``R⁻¹`` is the upper Cholesky factor of ``H⁻¹``. It
    works from the last block of columns to the first, reads nothing below the diagonal blocks (256 wide), needs no
    second matrix, and leaves rubbish below the diagonal blocks. Returns False, with ``matrix`` spoilt, when it is
    not positive definite in its dtype.
    """
    size = matrix.shape[0]
    for start in reversed(range(0, size, _BLOCK)):
        end = min(start + _BLOCK, size)
        panel = matrix[:end, start:end]
        if end < size:
            panel.addmm_(matrix[:end, end:], matrix[start:end, end:].T, alpha=-1)
        backwards, info = torch.linalg.cholesky_ex(panel[start:].double().flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(backwards).all()):
            return False
        corner = backwards.flip(0, 1)
        if start:
            panel[:start] = panel[:start] @ invert_upper(corner).T.to(matrix.dtype)
        panel[start:] = corner
    return True


def invert_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix, float64."""
    identity = torch.eye(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(matrix.double(), identity, upper=True)
    return inverse


def quadratic_form(rows: torch.Tensor, upper_gram: torch.Tensor, block: int = 512) -> torch.Tensor:
    """``d G dᵀ`` for each row ``d`` of ``rows`` ``[n, in]``: float64 ``[n]``.

    ``G`` is symmetric; only its upper triangle and its diagonal blocks of width ``block`` are read: half the work.
    ``block`` must divide 512, the width of the diagonal blocks that statistics keep.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    size = upper_gram.shape[0]
    for start in range(0, size, block):
        end = min(start + block, size)
        here = rows[:, start:end]
        product = here @ upper_gram[start:end, start:end]
        if end < size:
            product.addmm_(rows[:, end:], upper_gram[start:end, end:].T, alpha=2)
        total += product.mul_(here).sum(dim=1, dtype=torch.float64)
    return total
