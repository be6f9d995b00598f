"""Products in tiles: equal to NumPy's, and no tile as large as what BLAS hands to its threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from warpcache.engine.metrics import images as quality
from warpcache.engine.metrics import lpips, products
from warpcache.engine.metrics.products import SINGLE_THREAD_LIMIT, product


def matrix(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply-adds of every product that NumPy hands to BLAS."""
    seen: list[int] = []
    real = np.matmul

    def spy(a: NDArray[Any], b: NDArray[Any], **rest: Any) -> NDArray[Any]:
        seen.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        result: NDArray[Any] = real(a, b, **rest)
        return result

    monkeypatch.setattr(np, "matmul", spy)
    return seen


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (5, 7, 3), (32, 64, 128), (33, 64, 129), (64, 27, 4000), (70, 576, 225), (3, 9000, 5), (40, 10, 0)],
)
def test_a_product_in_tiles_is_the_product(rows: int, depth: int, columns: int, sizes: list[int]) -> None:
    a, b = matrix(rows, depth), matrix(depth, columns, 1)
    result = product(a, b)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    # `depth` roundings of partial sums as large as sqrt(depth), eps / 2 each, add up as a random walk: depth * eps / 2.
    np.testing.assert_allclose(result, expected, rtol=0, atol=16 * depth * np.finfo(np.float32).eps / 2)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert max(sizes, default=0) <= SINGLE_THREAD_LIMIT


def test_a_single_long_row_and_column_is_not_split() -> None:
    a, b = matrix(1, SINGLE_THREAD_LIMIT + 5), matrix(SINGLE_THREAD_LIMIT + 5, 2, 1)
    assert product(a, b).shape == (1, 2)


@pytest.mark.parametrize("shape", [(3, 161, 900), (1, 900, 161)])
def test_similarity_never_makes_a_product_that_blas_would_share_out(
    shape: tuple[int, int, int], sizes: list[int]
) -> None:
    a, b = (np.clip(matrix(shape[0] * shape[1], shape[2], seed), -1, 1).reshape(shape) for seed in (0, 1))
    quality.measure(a, b, ["ssim", "ms_ssim"])
    assert sizes
    assert max(sizes) <= SINGLE_THREAD_LIMIT


def test_the_convolutions_of_lpips_go_through_these_products() -> None:
    assert lpips.product is products.product
