"""Low-rank matrices as two factors: sums, compression and norms without forming the dense product.

Legend: B (out, r) and A (r, in) of a delta B A; k ranks that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[Tensor, Tensor]
"""(B (out, r), A (r, in)): the delta B A. Rank 0 is the zero delta."""

EXACT_SIDE = 2048
"""A dense delta whose smaller side is at most this is compressed exactly, a larger one by a random sketch."""
OVERSAMPLING, NUM_POWER_ITERATIONS = 16, 6
"""Extra columns and power iterations of a sketch."""


def concatenate_ranks(pairs: Sequence[Pair]) -> Pair:
    """Return the sum of the deltas, by concatenating their ranks."""
    return torch.cat([b for b, _ in pairs], dim=1), torch.cat([a for _, a in pairs])


def frobenius_norm(delta: Pair) -> float:
    """Return the Frobenius norm of B A; where terms cancel, the error is about 1e-8 of their norms."""
    b, a = (factor.double() for factor in delta)
    return float(((b.T @ b) * (a @ a.T).T).sum().clamp(min=0).sqrt())


def compress(
    delta: Pair | Tensor, rank: int, metric: Tensor | None = None
) -> tuple[Pair, float, float]:
    """Return the best approximation of rank k, its energy (squared Frobenius norm) and the total energy.

    Each factor gets the square roots of the singular values, so that neither loses digits when it is rounded;
    missing ranks are zeros. With `metric`, the positive definite second moment (in, in) of the inputs x,
    approximation and energy refer to the outputs: the mean |D x|^2.
    """
    if metric is not None:
        root = torch.linalg.cholesky(metric)
        whitened = delta @ root if isinstance(delta, Tensor) else (delta[0], delta[1] @ root)
        (b, a), kept, total = compress(whitened, rank)
        return (b, torch.linalg.solve_triangular(root, a, upper=False, left=False)), kept, total
    left, values, right = (
        _truncated_svd(delta, rank) if isinstance(delta, Tensor) else _svd_of_product(*delta)
    )
    elements = delta if isinstance(delta, Tensor) else values
    total = float(elements.double().square().sum())
    kept = float(values[:rank].square().sum())
    root = values[:rank].clamp(min=0).sqrt()
    b, a = left[:, :rank] * root, root[:, None] * right[:rank]
    padding = rank - len(root)
    return (functional.pad(b, (0, padding)), functional.pad(a, (0, 0, 0, padding))), kept, total


def _svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T of B A, from a small square core (arXiv 0909.4061, section 3)."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, values, vh @ q_a.T


def _truncated_svd(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T of a dense matrix (out, in), truncated to k singular values."""
    if dense.shape[0] > dense.shape[1]:
        left, values, right = _truncated_svd(dense.T, rank)
        return right.T, values, left.T
    if dense.shape[0] > EXACT_SIDE:
        basis = _sketch(dense, rank + OVERSAMPLING).double()
    else:  # the eigenvectors of D D^T are the left singular vectors; half the work of an SVD
        wide = dense.double()
        basis = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    u, values, vh = torch.linalg.svd(basis.T @ dense.double(), full_matrices=False)
    return basis @ u[:, :rank], values[:rank], vh[:rank]


def _sketch(dense: Tensor, columns: int) -> Tensor:
    """Return an orthonormal basis of the leading left singular vectors (arXiv 0909.4061, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(dense.shape[1], columns, generator=generator).to(dense)
    basis: Tensor = torch.linalg.qr(dense @ random)[0]
    for _ in range(NUM_POWER_ITERATIONS):
        basis = torch.linalg.qr(dense @ (dense.T @ basis))[0]
    return basis
