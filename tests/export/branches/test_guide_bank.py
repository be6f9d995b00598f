"""The guide bank: coverage of what k-centre chooses, the look-up in torch, ONNX Runtime and plain NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from warpcache.engine.errors import ExportError
from warpcache.export.branches.guide_bank import (
    _FADE,
    NEAREST,
    GuideBank,
    GuideLookup,
    cover_radius,
    fit_keys,
    guide_value,
    make_bank,
    pool_features,
)
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import run_model
from warpcache.export.graph.trace import export_module
from warpcache.export.training.k_centres import k_centres


def look_up(bank: GuideBank, features: np.ndarray) -> np.ndarray:
    """The slow reference of `GuideLookup`: of pooled features [N, F], in NumPy and float64, float32 [N, C, h, w]."""
    found = []
    for feature in features.astype(np.float64):
        key = feature @ bank.projection.astype(np.float64) + bank.offset
        squared = ((bank.keys - key) ** 2).sum(1)
        nearest = np.argsort(squared, kind="stable")[:NEAREST]
        weights = np.exp(squared[nearest[0]] - squared[nearest])
        weights /= weights.sum() * (1.0 + np.exp(min(squared[nearest[0]] - _FADE, 700.0)))
        found.append(np.tensordot(weights, bank.values[nearest].astype(np.float64), 1))
    return np.stack(found).astype(np.float32)


def least_radius(points: np.ndarray, count: int) -> float:
    """The best that `count` centres among the points can do, by trying all."""
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))
    return min(
        float(distances[:, list(some)].min(1).max()) for some in itertools.combinations(range(len(points)), count)
    )


# Whole numbers: ties, repeated points and points on a line all happen.
POINTS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=80)
@given(points=POINTS, count=st.integers(1, 8), order=st.randoms(use_true_random=False))
def test_no_point_is_farther_than_twice_the_best(points: list[tuple[int, int]], count: int, order: object) -> None:
    cloud = np.array(points, np.float64)
    best = least_radius(cloud, min(count, len(cloud)))
    shuffled = cloud.copy()
    order.shuffle(indices := list(range(len(cloud))))  # type: ignore[attr-defined]
    shuffled = cloud[indices]
    for some in (cloud, shuffled):
        chosen, radius = k_centres(some, count)
        # Rounding of one square root and of sums of two squares of small whole numbers: a few units in the last place.
        assert radius <= 2.0 * best * (1.0 + 1e-12)
        assert radius == pytest.approx(cover_radius(some, some[chosen]), rel=1e-12)
        assert len(set(chosen.tolist())) == len(chosen) == min(count, len(np.unique(some, axis=0)))
        again, _ = k_centres(some, count)
        assert chosen.tolist() == again.tolist()


def test_the_farthest_point_is_next() -> None:
    points = np.array([[0.0], [1.0], [2.0], [10.0], [-7.0]])
    chosen, radius = k_centres(points, 3)
    # The mean is 1.2; then 10 is 9 away, then -7 is 8 away; 0 and 2 are 1 from the point at 1.
    assert chosen.tolist() == [1, 3, 4]
    assert radius == 1.0
    for bad in (lambda: k_centres(points, 0), lambda: k_centres(points[:0], 1)):
        with pytest.raises(ExportError, match=r"^\d centres cannot be chosen among \d points"):
            bad()


def test_features_are_pooled_to_cells() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((2, 3, 8, 12)).astype(np.float32))
    tokens = torch.from_numpy(rng.standard_normal((2, 5, 4)).astype(np.float32))
    vector = torch.from_numpy(rng.standard_normal((2, 6)).astype(np.float32))
    pooled = pool_features([image, tokens, vector]).numpy()
    cells = image.numpy().reshape(2, 3, 4, 2, 4, 3).mean((3, 5)).reshape(2, -1)
    expected = np.concatenate([cells, tokens.numpy().mean(1), vector.numpy()], 1)
    # Means of at most 6 numbers of size 1: a few units in the last place of float32.
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_keys_are_standardised_and_keep_distances() -> None:
    rng = np.random.default_rng(1)
    # Ten directions vary, each at a scale of its own; one feature never changes.
    features = np.concatenate([rng.standard_normal((90, 10)) * np.logspace(-2, 2, 10), np.full((90, 1), 5.0)], 1)
    projection, offset = fit_keys(features.astype(np.float32))
    keys = features @ projection + offset
    standard = (features[:, :10] - features[:, :10].mean(0)) / features[:, :10].std(0)

    def distances(x: np.ndarray) -> np.ndarray:
        return np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))

    # Nothing is dropped among 10 features, so distances are those of the standardised features up to one factor.
    there, here = distances(standard), distances(keys)
    off = ~np.eye(90, dtype=bool)
    # The projection is rounded to float32, 6e-8 of values up to 100 standard deviations large, over 10 sums.
    np.testing.assert_allclose(here[off] / there[off], np.median(here[off] / there[off]), rtol=1e-4)
    here[~off] = np.inf
    assert np.median(here.min(1)) == pytest.approx(1.0, rel=1e-4)
    # A feature that was constant says nothing, however far it goes later.
    moved = features.copy()
    moved[:, 10] += 100.0
    np.testing.assert_array_equal(projection[10], 0.0)
    np.testing.assert_allclose(moved @ projection + offset, keys, atol=1e-9)


@pytest.mark.parametrize(("frames", "features"), [(1, 4), (5, 300), (200, 100)])
def test_keys_are_short(frames: int, features: int) -> None:
    wide = np.random.default_rng(2).standard_normal((frames, features)).astype(np.float32)
    projection, offset = fit_keys(wide)
    assert projection.shape == (features, min(64, frames, features))
    assert offset.shape == (projection.shape[1],)
    assert np.isfinite(wide @ projection + offset).all()


def test_frames_nearby_are_no_measure_of_distance() -> None:
    walk = np.cumsum(np.random.default_rng(3).standard_normal((120, 4)), 0).astype(np.float32)
    close, far = fit_keys(walk)[0], fit_keys(walk, near=10)[0]
    # Distances to frames ten steps away and more are longer, so keys are scaled down further.
    assert np.abs(far).max() < 0.8 * np.abs(close).max()


def bank(entries: int = 20, channels: int = 3, frames: int = 40, side: int = 8) -> tuple[GuideBank, Tensor]:
    """A bank over a random clip of maps [T, channels, side, side], which is returned too."""
    rng = np.random.default_rng(4)
    maps = torch.from_numpy(rng.standard_normal((frames, channels, side, side)).astype(np.float32))
    features = pool_features([maps]).numpy()
    projection, offset = fit_keys(features)
    chosen, _ = k_centres(features @ projection + offset, entries)
    guides = rng.standard_normal((len(chosen), 5, 4, 4)).astype(np.float32)
    return make_bank(features, projection, offset, chosen, guides), maps


class Found(torch.nn.Module):
    """Gives out what was looked up, beside the value that it is added to."""

    def __init__(self, lookup: GuideLookup) -> None:
        super().__init__()
        self.lookup = lookup

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        return self.lookup.find(values), self.lookup(*values)


def trained(entries: GuideBank, shapes: list[tuple[int, ...]]) -> GuideLookup:
    """A look-up whose convolution is not zero any more."""
    lookup = GuideLookup(entries, shapes).eval()
    torch.manual_seed(5)
    torch.nn.init.normal_(lookup.spread.weight)
    torch.nn.init.normal_(lookup.spread.bias)
    return lookup


def test_torch_onnx_and_numpy_find_the_same() -> None:
    entries, maps = bank()
    lookup = trained(entries, [(1, 3, 8, 8)])
    exported = export_module(Found(lookup), (maps[:1],), ["value"], ["guide", "sum"])
    operators = {node.op_type for node in exported.graph.node}
    assert {"TopK", "Gather", "Softmax", "Resize"} <= operators
    assert operators & {"MatMul", "Gemm"}
    for t in (0, 7, 23, 39):
        value = maps[t : t + 1]
        expected = look_up(entries, pool_features([value]).numpy())
        with torch.no_grad():
            found, whole = Found(lookup)(value)
        got = run_model(exported, {"value": value.numpy()})
        # Keys are a few units long and squared distances up to 100; float32 keeps them to about 1e-5, the weights too.
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(got["guide"], expected, atol=1e-4)
        np.testing.assert_allclose(got["sum"], whole.numpy(), atol=1e-4)
        guide = torch.from_numpy(expected)
        spread = torch.einsum("oc,nchw->nohw", lookup.spread.weight[:, :, 0, 0], guide)
        spread = spread + lookup.spread.bias[:, None, None]
        resized = torch.nn.functional.interpolate(spread, size=(8, 8), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(whole.numpy(), (value + resized).detach().numpy(), atol=1e-4)


def test_an_entry_finds_itself_and_weighs_by_distance() -> None:
    entries, maps = bank(frames=40, entries=40)
    one = look_up(entries, pool_features([maps[entries.frames[6]][None]]).numpy())
    squared = np.sort(((entries.keys - entries.keys[6]) ** 2).sum(1))[:NEAREST]
    order = np.argsort(((entries.keys - entries.keys[6]) ** 2).sum(1))[:NEAREST]
    weights = np.exp(-squared) / np.exp(-squared).sum()
    assert order[0] == 6
    assert squared[0] < 1e-6
    assert weights[0] > 1 / 3
    # At no distance a guide counts nearly whole: 1 / (1 + exp(-4)).
    by_hand = sum(w * entries.values[k] for w, k in zip(weights * 0.98201379, order, strict=True))
    np.testing.assert_allclose(one[0], by_hand, atol=1e-4)


def test_excluded_entries_are_not_found() -> None:
    entries, maps = bank(frames=40, entries=40)
    lookup = GuideLookup(entries, [(1, 3, 8, 8)])
    frames = torch.tensor([3, 30])
    excluded = torch.from_numpy(np.abs(entries.frames[None] - frames.numpy()[:, None]) <= 2)
    found = lookup.find([maps[frames]], excluded)
    for row, t in enumerate(frames.tolist()):
        left = np.abs(entries.frames - t) > 2
        others = GuideBank(
            entries.frames[left], 0.0, entries.projection, entries.offset, entries.keys[left], entries.values[left]
        )
        expected = look_up(others, pool_features([maps[t : t + 1]]).numpy())
        # As in the comparison of torch and NumPy above.
        np.testing.assert_allclose(found[row : row + 1].numpy(), expected, atol=1e-4)
    # Where nothing is left there is no guide: zeros, not NaN.
    assert (lookup.find([maps[frames]], torch.ones(2, 40, dtype=torch.bool)) == 0).all()


def test_what_is_far_from_all_entries_has_no_guide() -> None:
    entries, maps = bank()
    lookup = GuideLookup(entries, [(1, 3, 8, 8)])
    sizes = []
    for factor in (1.0, 4.0, 30.0):
        value = maps[:3] * factor
        found = lookup.find([value])
        # Squared distances of some thousands, to within a few units in the last place of float32 over 64 sums.
        np.testing.assert_allclose(found.numpy(), look_up(entries, pool_features([value]).numpy()), atol=2e-3)
        sizes.append(float(found.abs().max()))
    assert sizes[0] > sizes[1] > 1e3 * sizes[2]
    assert sizes[2] < 1e-6


def test_a_look_up_begins_as_none() -> None:
    entries, maps = bank()
    lookup = GuideLookup(entries, [(1, 3, 8, 8)])
    assert torch.equal(lookup(maps[:2]), maps[:2])
    assert {name for name, _ in lookup.named_parameters()} == {"spread.weight", "spread.bias"}


def test_the_guide_goes_where_it_is_cheapest() -> None:
    rng = np.random.default_rng(6)
    values = [
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for shape in ((9, 4), (9, 2, 16, 16), (9, 3, 4, 4), (9, 6, 5))
    ]

    def of(chosen: list[Tensor]) -> GuideLookup:
        features = pool_features(chosen).numpy()
        projection, offset = fit_keys(features)
        guides = rng.standard_normal((5, 5, 4, 4)).astype(np.float32)
        made = make_bank(features, projection, offset, np.arange(5), guides)
        return trained(made, [(1, *value.shape[1:]) for value in chosen])

    assert of(values).target == 2
    vector, tokens = of([values[0]]), of([values[3]])
    for lookup, value in ((vector, values[0]), (tokens, values[3])):
        difference = lookup(value) - value
        assert difference.shape == value.shape
        assert (difference != 0).all()
    # One and the same for every token.
    shared = tokens(values[3]) - values[3]
    # Differences of sums of size 1 in float32.
    np.testing.assert_allclose(shared.detach().numpy(), shared[:, :1].expand(-1, 6, -1).detach().numpy(), atol=1e-6)
    scalar = torch.zeros(1)
    with pytest.raises(ExportError, match=r"^no value at the branch's depth can take a guide"):
        GuideLookup(bank()[0], [tuple(scalar.shape)])


def test_values_are_few_and_small() -> None:
    rng = np.random.default_rng(7)
    # Two directions of 40 channels at 37x37 hold everything.
    sources = rng.standard_normal((9, 2, 37, 37))
    mixing = rng.standard_normal((40, 2))
    guides = np.einsum("cs,kshw->kchw", mixing, sources).astype(np.float32)
    features = rng.standard_normal((9, 6)).astype(np.float32)
    made = make_bank(features, *fit_keys(features), np.arange(9), guides)
    assert made.values.shape == (9, 32, 13, 13)
    assert made.values.dtype == np.float32
    assert made.to_record() == {"entries": 9, "key": 6, "value": [32, 13, 13], "radius": 0.0}
    assert made.values.std() == pytest.approx(1.0, rel=1e-3)
    energy = (made.values.astype(np.float64) ** 2).sum((0, 2, 3))
    # What is beyond two directions is rounding of float32, squared.
    assert energy[2:].sum() < 1e-9 * energy[:2].sum()
    # Distances between guides are kept: the reduction is a rotation and one scale.
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(guides), 3, ceil_mode=True, count_include_pad=False)
    before = ((pooled[:, None] - pooled[None]) ** 2).sum((2, 3, 4)).numpy()
    after = ((made.values[:, None] - made.values[None]) ** 2).sum((2, 3, 4))
    off = ~np.eye(9, dtype=bool)
    np.testing.assert_allclose(after[off] / before[off], (after[off] / before[off])[0], rtol=1e-3)


def test_new_keys_are_those_of_a_new_bank() -> None:
    entries, maps = bank()
    lookup = GuideLookup(entries, [(1, 3, 8, 8)])
    other = np.random.default_rng(8).standard_normal(entries.keys.shape).astype(np.float32)
    lookup.rekey(torch.from_numpy(other))
    fresh = GuideBank(entries.frames, 0.0, entries.projection, entries.offset, other, entries.values)
    expected = look_up(fresh, pool_features([maps[:4]]).numpy())
    np.testing.assert_allclose(lookup.find([maps[:4]]).numpy(), expected, atol=1e-4)


def test_the_guide_is_the_last_value_of_low_resolution(trace: Callable[..., object]) -> None:
    for name, size in (("unet", 16), ("residual", 16), ("latent", 16), ("attention", 8)):
        model = trace(name).model  # type: ignore[attr-defined]
        index = GraphIndex(model)
        value = guide_value(model)
        assert index.specs[value].shape[2] == size, name
        assert value not in index.outputs
        # Every later map is larger.
        later = [
            spec.shape[2]
            for other, spec in index.specs.items()
            if len(spec.shape) == 4 and index.producer.get(other, -1) > index.producer[value] and other != value
        ]
        assert all(side > size for side in later), name


def test_without_a_feature_map_there_is_no_guide() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x).reshape(1, 1, 4, 4)

    model = export_module(Flat(), (torch.zeros(1, 16),), ["x"], ["image"])
    with pytest.raises(ExportError, match=r"^the generator has no feature map to guide branches with"):
        guide_value(model)
