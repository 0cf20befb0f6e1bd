"""The low-rank branch: truncated SVD by randomised subspace iteration (Halko, Martinsson, Tropp 2011, alg. 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLE = 10
ITERATIONS = 4


def truncated_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, start: Tensor | None = None, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of a float32 matrix [N, K], nearly: (up [N, r], down [r, K]).

    `up` carries the singular values, `down` has orthonormal rows. start: [r', K], a subspace to begin from, such as
    that of a similar matrix; then one iteration does the work of several.
    """
    n, k = matrix.shape
    width = min(rank + OVERSAMPLE, n, k)
    if rank == 0:
        return matrix.new_zeros(n, 0), matrix.new_zeros(0, k)
    test = torch.randn(width, k, generator=generator).to(matrix)
    if start is not None:
        kept = min(start.shape[0], width)
        test[:kept] = start[:kept]
    basis = _orthonormal(matrix @ test.T)
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    small = basis.T @ matrix
    # The eigenvectors of a small Gram matrix cost less than an SVD of [width, K], and float64 keeps them accurate.
    values, vectors = torch.linalg.eigh((small @ small.T).double())
    top = vectors[:, -rank:].flip(1).to(matrix.dtype)
    sigma = values[-rank:].flip(0).clamp_min(0).sqrt().to(matrix.dtype)
    down = (top.T @ small) / sigma.clamp_min(torch.finfo(matrix.dtype).tiny)[:, None]
    return basis @ top * sigma, down


def dense_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The exact truncation, in float64: a check of `truncated_svd`, and what it replaces."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(matrix.dtype), v[:rank].to(matrix.dtype)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns spanning those of a tall matrix.

    Cholesky QR, twice: products instead of column by column; falls back to Householder where columns nearly coincide.
    """
    for _ in range(2):
        gram = (matrix.T @ matrix).double()
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) != 0 or float(factor.diagonal().min()) < 1e-6 * float(factor.diagonal().max()):
            return torch.linalg.qr(matrix).Q
        inverse = torch.linalg.solve_triangular(
            factor, torch.eye(len(factor), dtype=factor.dtype, device=factor.device), upper=False
        )
        matrix = matrix @ inverse.T.to(matrix.dtype)
    return matrix
