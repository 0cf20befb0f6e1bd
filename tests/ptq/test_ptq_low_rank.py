"""The truncated SVD against the exact one."""

import numpy as np
import pytest
import scipy.linalg
import torch

from svdquant.ptq.low_rank import dense_svd, truncated_svd

SPECTRA = {
    "decaying": lambda r: np.exp(-np.arange(r) / 6.0) + 1e-3,
    "slow": lambda r: 1 / np.sqrt(1 + np.arange(r)),
    "flat": lambda r: np.ones(r),
    "few outliers": lambda r: np.where(np.arange(r) < 5, 40.0, 1.0),
}
SHAPES = [(96, 96), (240, 80), (80, 240), (33, 129)]


def matrix(n, k, spectrum, seed=0):
    rng = np.random.default_rng(seed)
    r = min(n, k)
    u, _ = np.linalg.qr(rng.standard_normal((n, r)))
    v, _ = np.linalg.qr(rng.standard_normal((k, r)))
    return torch.from_numpy(u * SPECTRA[spectrum](r) @ v.T).float()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lost(a, up, down):
    return float(np.linalg.norm(a.double().numpy() - up.double().numpy() @ down.double().numpy()))


def best(a, rank):
    """The least that any rank-r matrix loses (Eckart-Young)."""
    return float(np.linalg.norm(scipy.linalg.svdvals(a.double().numpy())[rank:]))


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_one_percent_of_the_optimum(spectrum, n, k, rank):
    a = matrix(n, k, spectrum)
    up, down = truncated_svd(a, rank, generator())
    assert up.shape == (n, rank) and down.shape == (rank, k)
    optimum = best(a, rank)
    assert optimum - 1e-5 <= lost(a, up, down) <= 1.01 * optimum + 1e-5
    assert torch.allclose(down @ down.T, torch.eye(rank), atol=1e-4)
    sigma = up.norm(dim=0)
    assert bool((sigma[:-1] >= sigma[1:] * (1 - 1e-5)).all())
    assert float(sigma[0]) == pytest.approx(SPECTRA[spectrum](min(n, k))[0], rel=0.05)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_random_weight(n, k):
    a = torch.randn(n, k, generator=generator(1))
    assert lost(a, *truncated_svd(a, 16, generator())) <= 1.01 * best(a, 16)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rank_zero_and_full_rank(n, k):
    a = matrix(n, k, "slow")
    up, down = truncated_svd(a, 0, generator())
    assert up.shape == (n, 0) and down.shape == (0, k)
    assert lost(a, *truncated_svd(a, min(n, k), generator())) < 1e-5 * float(a.norm())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("true_rank", [1, 3, 20])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rank_deficient(n, k, true_rank, scale):
    g = generator(true_rank)
    a = torch.randn(n, true_rank, generator=g) @ torch.randn(true_rank, k, generator=g) * scale
    up, down = truncated_svd(a, 32, generator())
    assert lost(a, up, down) < 2e-6 * float(a.norm())
    # Both are stored in 16 bits, so neither may be large where nothing is left to explain.
    assert float(down.abs().max()) < 2 and float(up.norm()) < 1.001 * float(a.norm())


def test_zero_matrix():
    up, down = truncated_svd(torch.zeros(40, 50), 8, generator())
    assert not up.any() and bool(torch.isfinite(down).all())


def test_repeated_rows_and_zero_columns():
    a = torch.randn(4, 64, generator=generator(2)).repeat(20, 1)
    a[:, 10:30] = 0
    up, down = truncated_svd(a, 16, generator())
    assert lost(a, up, down) < 1e-5 * float(a.norm()) and bool(torch.isfinite(down).all())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_start_saves_iterations(spectrum):
    a = matrix(120, 90, spectrum)
    near = a + 0.02 * matrix(120, 90, "flat", seed=5)
    _, down = truncated_svd(near, 16, generator())
    assert lost(a, *truncated_svd(a, 16, generator(), down, iterations=1)) <= 1.01 * best(a, 16)


def test_deterministic():
    a = matrix(100, 60, "slow")
    first, second = truncated_svd(a, 8, generator(3)), truncated_svd(a, 8, generator(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dense_svd_is_the_optimum(n, k):
    a = matrix(n, k, "slow")
    assert lost(a, *dense_svd(a, 8)) == pytest.approx(best(a, 8), rel=1e-5)
