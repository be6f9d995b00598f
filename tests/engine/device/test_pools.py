"""Output memory: it belongs to the caller until the last reference is gone, then it is used again."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from warpcache.engine.device.pools import OutputPool
from warpcache.engine.spec import Array, TensorSpec

SPECS = (TensorSpec("image", "float32", (1, 3, 8, 8)), TensorSpec("score", "int64", (2,)))


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def test_arrays_fit_their_specs() -> None:
    taken = OutputPool(SPECS).take()
    assert list(taken) == ["image", "score"]
    for spec in SPECS:
        spec.check(taken[spec.name], finite=False)
        assert taken[spec.name].flags.c_contiguous
        assert taken[spec.name].flags.writeable
        assert type(taken[spec.name]) is np.ndarray


@pytest.mark.parametrize(
    "hold", [lambda a: a, lambda a: a[0, 1:, ::2], memoryview, lambda a: a[0].T.reshape(8, 8, 3)[2:]]
)
def test_memory_in_use_is_never_handed_out_again(hold: object) -> None:
    pool = OutputPool(SPECS)
    image = pool.take()["image"]
    place = address(image)
    image.fill(3.0)
    held = hold(image)  # type: ignore[operator]
    del image
    for _ in range(8):
        other = pool.take()["image"]
        assert address(other) != place
        other.fill(7.0)
    assert np.asarray(held).max() == np.asarray(held).min() == 3.0


def test_memory_comes_back_when_the_last_reference_is_gone() -> None:
    pool = OutputPool(SPECS)
    first = pool.take()
    view = first["image"][0]
    place = address(first["image"])
    del first
    gc.collect()
    assert address(pool.take()["image"]) != place
    del view
    assert place in {address(array) for array in (pool.take()["image"], pool.take()["image"])}


def test_what_was_reserved_is_handed_out_and_only_a_few_are_kept() -> None:
    pool = OutputPool(SPECS)
    pool.reserve()
    pool.reserve()
    kept = pool._free["image"]
    assert len(kept) == 1
    place = address(kept[0])
    assert address(pool.take()["image"]) == place
    many = [pool.take() for _ in range(20)]
    many.clear()
    assert len(kept) == 4
