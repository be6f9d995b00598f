"""The warp adapter: what it does before any training, its shapes, and its graphs against the torch modules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from warpcache.engine.errors import ExportError
from warpcache.export.adapter import graphs as adapter_graph
from warpcache.export.adapter.graphs import LADDER, choose_config, consumer_graph, producer_graph
from warpcache.export.adapter.layout import AdapterConfig, AdapterLayout, ImageInput, VectorInput, layout_of
from warpcache.export.adapter.network import CacheEncoder, WarpConsumer, _sample, _sample_cubic, image_planes
from warpcache.export.adapter.recording import working_tap
from warpcache.export.cut.split import split
from warpcache.export.frames.surface import Surface
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.profile import Timing
from warpcache.export.graph.run import run_model
from warpcache.export.graph.trace import export_module
from warpcache.models.rasterizer import Mesh, SurfaceAtlas, condition_raster, rasterize

SMALL = AdapterConfig(stride=4, width=8, blocks=1, features=8, encoder_width=12)
SURFACE = Surface("atlas", ("condition", 0, 2), ("condition", 5))
CONDITION = ImageInput("condition", 6, 32, 48)

LAYOUTS = {
    "one image": AdapterLayout(32, 32, (("image", 3),), (ImageInput("x", 3, 32, 32),), (), (("h", 5, 8, 8),)),
    "surface": AdapterLayout(32, 48, (("image", 3),), (CONDITION,), (), (("h", 5, 16, 24),), SURFACE, (24, 16)),
    "two outputs, a vector, an id, a switch": AdapterLayout(
        32,
        48,
        (("image", 3), ("matte", 1)),
        (ImageInput("labels", 2, 32, 48, torch.int64), ImageInput("crop", 3, 6, 5)),
        (
            VectorInput("pose", (1, 6)),
            VectorInput("id", (1,), torch.int64),
            VectorInput("on", (1, 1, 1, 1), torch.bool),
        ),
        (("h", 5, 8, 12), ("tokens", 7, 0, 0), ("style", 9, 0, 0)),
    ),
    "inputs and tensors of other sizes": AdapterLayout(
        32,
        48,
        (("image", 1),),
        (ImageInput("large", 1, 128, 192), ImageInput("small", 2, 6, 5), ImageInput("narrow", 1, 100, 3)),
        (),
        (("fine", 2, 64, 96), ("odd", 3, 10, 14), ("coarse", 4, 2, 3)),
    ),
    "vectors only": AdapterLayout(32, 32, (("image", 3),), (), (VectorInput("latent", (1, 4, 5)),), (("w", 9, 0, 0),)),
}


def random_inputs(layout: AdapterLayout, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Generator inputs of `batch` frames, of the layout's dtypes; float ones in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {i.name: ((batch, i.channels, i.height, i.width), i.dtype) for i in layout.images}
    shapes |= {v.name: ((batch, *v.shape[1:]), v.dtype) for v in layout.vectors}
    return {
        name: torch.rand(shape, generator=rng)
        if dtype == torch.float32
        else torch.randint(0, 2, shape, generator=rng).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }


def random_taps(layout: AdapterLayout, batch: int) -> list[Tensor]:
    """Cut tensors as the encoder takes them: at the working resolution, or vectors."""
    grid = (layout.height // SMALL.stride, layout.width // SMALL.stride)
    return [
        torch.randn(batch, channels, *grid) if rows else torch.randn(batch, channels)
        for _, channels, rows, _ in layout.taps
    ]


def random_weights(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights that hide nothing: what begins at zero is drawn too, so that every path takes part."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.7 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
    return module.eval()


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_shapes(name: str) -> None:
    layout, batch = LAYOUTS[name], 3
    inputs, image = random_inputs(layout, batch), torch.rand(batch, layout.channels, layout.height, layout.width)
    encoder, consumer = random_weights(CacheEncoder(layout, SMALL)), random_weights(WarpConsumer(layout, SMALL))
    taps = random_taps(layout, batch)
    features = encoder(taps, inputs, image)
    assert features.shape == (batch, 8, layout.height // 4, layout.width // 4)
    atlas = None if layout.surface is None else torch.rand(batch, 3, *layout.atlas_size) * 2 - 1
    planes = image_planes(image)
    answer = consumer(features, planes, atlas, inputs)
    assert answer.shape == image.shape
    # Everything it is given matters: another value of any of it changes the answer.
    for tap in taps:
        assert not torch.equal(encoder([t + 1 if t is tap else t for t in taps], inputs, image), features)
    assert not torch.equal(encoder(taps, inputs, image + 1), features)
    assert not torch.equal(consumer(features, image_planes(image + 1), atlas, inputs), answer)
    assert not torch.equal(consumer(features + 1, planes, atlas, inputs), answer)
    for key, value in inputs.items():
        other = {**inputs, key: ~value if value.dtype == torch.bool else value + 1}
        assert not torch.equal(consumer(features, planes, atlas, other), answer), key
    if atlas is not None:
        assert not torch.equal(consumer(features, planes, atlas * 0.9, inputs), answer)


@torch.no_grad()
def test_frames_of_a_batch_do_not_mix() -> None:
    layout = LAYOUTS["surface"]
    consumer = random_weights(WarpConsumer(layout, SMALL))
    inputs, image = random_inputs(layout, 2), torch.rand(2, 3, 32, 48)
    features, atlas = torch.randn(2, 8, 8, 12), torch.rand(2, 3, *layout.atlas_size) * 2 - 1
    planes = image_planes(image)
    both = consumer(features, planes, atlas, inputs)
    for k in range(2):
        only = {name: value[k : k + 1] for name, value in inputs.items()}
        one = consumer(features[k : k + 1], planes[k : k + 1], atlas[k : k + 1], only)
        # Convolutions of one and of two frames may add up in another order: 500 products in float32.
        torch.testing.assert_close(one[0], both[k], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "surface"])
@torch.no_grad()
def test_untrained_it_shows_the_last_image(name: str) -> None:
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    image = torch.rand(1, layout.channels, layout.height, layout.width) * 2 - 1
    features = torch.randn(1, 8, layout.height // 4, layout.width // 4)
    answer = WarpConsumer(layout, SMALL)(features, image_planes(image), None, random_inputs(layout, 1))
    # Almost: it begins by doubting the moved image by 2 %.
    assert (answer - image).abs().max() < 0.021


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 9), (5, 2)])
def test_sample_clamps_to_the_border(rows: int, columns: int) -> None:
    rng = torch.Generator().manual_seed(2)
    image = torch.rand(2, 3, rows, columns, generator=rng)
    grid = torch.rand(2, 7, 11, 2, generator=rng) * 3 - 1.5
    expected = functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Coordinates of up to 9 pixels are rounded at 2^-23 each on other ways to the same place.
    torch.testing.assert_close(_sample(image, grid), expected, atol=5e-6, rtol=0)


def catmull_rom(image: Tensor, fraction: float, axis: int) -> Tensor:
    """The image moved by `fraction` of a sample along an axis, by the four weights of Catmull and Rom's cubic."""
    f, count = fraction, image.shape[axis]
    weights = (-f / 2 + f**2 - f**3 / 2, 1 - 2.5 * f**2 + 1.5 * f**3, f / 2 + 2 * f**2 - 1.5 * f**3, (f**3 - f**2) / 2)
    places = [(torch.arange(count) + k).clamp(0, count - 1) for k in (-1, 0, 1, 2)]
    return sum((w * image.index_select(axis, at) for w, at in zip(weights, places, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("moved_px", [(0.0, 0.0), (1.0, -2.0), (0.5, 0.0), (0.0, 0.3), (0.7, 0.4)])
def test_sample_cubic_is_catmull_and_roms(moved_px: tuple[float, float]) -> None:
    rng = torch.Generator().manual_seed(5)
    rows, columns = 40, 48
    # Smooth over some pixels, as pictures are: cubic beats linear by far there.
    image = functional.interpolate(torch.randn(1, 3, 10, 12, generator=rng), size=(rows, columns), mode="bicubic")
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    position = torch.stack([(x + moved_px[0]) * 2 / columns - 1, (y + moved_px[1]) * 2 / rows - 1])[None]
    inner = (slice(None), slice(None), slice(5, -5), slice(5, -5))
    got = _sample_cubic(image_planes(image), position)[inner]
    whole = [math.floor(moved) for moved in moved_px]
    expected = torch.roll(image, (-whole[0], -whole[1]), (3, 2))
    for axis, moved, floor in ((3, moved_px[0], whole[0]), (2, moved_px[1], whole[1])):
        expected = catmull_rom(expected, moved - floor, axis)
    # Along one axis the two are the same polynomial, to rounding of positions; along both, all but a mixed term.
    mixed = all(moved % 1 for moved in moved_px)
    assert (got - expected[inner]).abs().max() < (5e-3 if mixed else 2e-5)
    if any(moved % 1 for moved in moved_px):
        assert (_sample(image, position.permute(0, 2, 3, 1))[inner] - expected[inner]).abs().max() > 0.05


class Sheet:
    """A flat square of 24 pixels in a picture of 48x48, textured by UV, that can be shifted."""

    def __init__(self) -> None:
        y, x = np.meshgrid(np.linspace(0, 24, 5), np.linspace(0, 24, 5), indexing="ij")
        number = np.arange(25).reshape(5, 5)
        first = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
        second = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
        uv = (np.stack([x, y], -1).reshape(-1, 2) / 24 * 0.8 + 0.1).astype(np.float32)
        self.points = np.stack([x, y, 0 * x], -1).reshape(-1, 3).astype(np.float32)
        self.mesh = Mesh(np.concatenate([first, second]).astype(np.int32), uv)
        self.atlas = SurfaceAtlas(self.mesh, 32)
        self.layout = AdapterLayout(
            48, 48, (("image", 3),), (ImageInput("condition", 6, 48, 48),), (), (("h", 4, 12, 12),), SURFACE, (32, 32)
        )

    def at(self, x: float, y: float) -> tuple[Tensor, Tensor]:
        """Condition [1, 6, 48, 48] and atlas [1, 3, 32, 32] with the corner at (x, y) pixels."""
        vertices = self.points + np.float32([x, y, 0])
        fragments = rasterize(vertices, self.mesh.triangles, 48, 48)
        condition = condition_raster(vertices, self.mesh, 48, 48, fragments)
        return torch.from_numpy(condition[None]), torch.from_numpy(self.atlas.positions(vertices, fragments)[None])


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-5, 4), (8, 8)])
@torch.no_grad()
def test_a_moved_surface_moves_the_image_before_any_training(shift: tuple[int, int]) -> None:
    sheet = Sheet()
    torch.manual_seed(3)
    consumer = WarpConsumer(sheet.layout, SMALL)
    image, features = torch.rand(1, 3, 48, 48) * 2 - 1, torch.randn(1, 8, 12, 12)
    still, atlas = sheet.at(12, 12)
    moved, _ = sheet.at(12 + shift[0], 12 + shift[1])
    at_rest = consumer(features, image_planes(image), atlas, {"condition": still})
    answer = consumer(features, image_planes(image), atlas, {"condition": moved})
    assert (at_rest - image).abs().max() < 0.07  # 2 % of doubt, and what positions rounded at 2^-23 leave
    # Motion is made at a quarter of the resolution: 6 pixels from the silhouette only the surface's own takes part.
    interior = (slice(None), slice(None), slice(18 + shift[1], 30 + shift[1]), slice(18 + shift[0], 30 + shift[0]))
    shifted = torch.roll(at_rest, (shift[1], shift[0]), (2, 3))
    # Positions in grid units are rounded at 2^-23 some ten times, 24 px * 1e-6; neighbours differ by at most 2.
    torch.testing.assert_close(answer[interior], shifted[interior], atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_surroundings_of_a_surface_follow_it() -> None:
    sheet = Sheet()
    torch.manual_seed(3)
    consumer = WarpConsumer(sheet.layout, SMALL)
    ramp = torch.linspace(-1, 1, 48).expand(1, 3, 48, 48).contiguous()
    still, atlas = sheet.at(12, 12)
    moved, _ = sheet.at(16, 12)
    at_rest = consumer(torch.zeros(1, 8, 12, 12), image_planes(ramp), atlas, {"condition": still})
    answer = consumer(torch.zeros(1, 8, 12, 12), image_planes(ramp), atlas, {"condition": moved})
    # A ramp reads as the place that was looked at, in pixels; in the row of the sheet's middle.
    moved_px = ((at_rest - answer) / (at_rest[0, 0, 24, 24] - at_rest[0, 0, 24, 23]))[0, 0, 24]
    assert float(moved_px[28]) == pytest.approx(4, abs=0.01)  # on the sheet
    assert 1 < float(moved_px[11]) <= 4.01  # just beside it
    assert moved_px.min() > -0.01  # nothing moves the other way


def test_a_size_that_is_no_multiple_is_refused() -> None:
    layout = AdapterLayout(30, 32, (("image", 3),), (), (), (("h", 5, 8, 8),))
    for make in (CacheEncoder, WarpConsumer):
        with pytest.raises(ExportError, match=r"^the output is 30x32, the warp adapter needs multiples of 4"):
            make(layout, SMALL)


@pytest.mark.parametrize("name", ["surface", "two outputs, a vector, an id, a switch"])
@torch.no_grad()
def test_consumer_graph_is_the_module_clamped(name: str) -> None:
    layout = LAYOUTS[name]
    consumer = random_weights(WarpConsumer(layout, SMALL))
    low, high = -0.1, 0.4
    graph = consumer_graph(consumer, layout, (low, high))
    inputs, image = random_inputs(layout, 1), torch.rand(1, layout.channels, 32, 48) * 2 - 1
    feeds = {"cache.features": torch.randn(1, 8, 8, 12), "cache.image": image_planes(image)}
    atlas = None
    if layout.surface is not None:
        feeds["cache.atlas"] = atlas = torch.rand(1, 3, *layout.atlas_size) * 2 - 1
    answer = consumer(feeds["cache.features"], feeds["cache.image"], atlas, inputs)
    index = GraphIndex(graph)
    assert index.inputs == (*feeds, *inputs)
    assert index.outputs == tuple(name for name, _ in layout.outputs)
    got = run_model(graph, {key: value.numpy() for key, value in {**feeds, **inputs}.items()})
    first = 0
    for output, channels in layout.outputs:
        expected = answer[:, first : first + channels].clamp(low, high).numpy()
        # Sums of some hundred float32 products in another order differ by 1e-6; as flow, in units of half the
        # picture, that is 24 px * 1e-6 on images whose neighbours differ by up to 2.
        np.testing.assert_allclose(got[output], expected, atol=1e-4)
        assert expected.min() == np.float32(low)  # both limits were reached, so that they were tested
        assert expected.max() == np.float32(high)
        first += channels


@pytest.mark.parametrize(("cut", "surface"), [(("mix", "style"), True), (("deep", "style"), False)])
@torch.no_grad()
def test_producer_graph_is_the_cut_and_the_encoder(portrait: Any, cut: tuple[str, ...], surface: bool) -> None:
    model, module = portrait.model, portrait.module
    index = GraphIndex(model)
    names = [index.module_outputs(path)[0] for path in cut]
    stream = portrait.stream
    layout = layout_of(model, names, module.surface if surface else None, stream["atlas"].shape)
    assert [tap[0] for tap in layout.taps] == names
    encoder = random_weights(CacheEncoder(layout, SMALL))
    parts = split(model, names)
    producer = producer_graph(model, parts, encoder, layout)
    frame = portrait.frame(2)
    got = run_model(producer, frame)
    warp_cache = ["cache.features", "cache.image"] + (["cache.atlas"] if surface else [])
    assert list(got) == [*parts.origins, *warp_cache]

    # What the torch generator has at those places, brought to the encoder's form by hand.
    seen: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: seen.__setitem__(path, out))
        for path in cut
    ]
    inputs = {name: torch.from_numpy(frame[name]) for name in ("condition", "pose", "person")}
    outputs = module(**inputs)
    for hook in hooks:
        hook.remove()
    taps = [seen[path].mean(1) if seen[path].ndim == 3 else seen[path] for path in cut]
    image = torch.cat([outputs["image"], outputs["matte"]], 1)
    # ONNX Runtime and torch add up in other orders, through normalised layers: as the trace's own check, 1e-4.
    np.testing.assert_allclose(got["cache.features"], encoder(taps, inputs, image).numpy(), atol=1e-4)
    np.testing.assert_allclose(got["cache.image"], image_planes(image).numpy(), atol=4e-4)  # four values each
    if surface:
        np.testing.assert_array_equal(got["cache.atlas"], frame["atlas"])
    # The plain consumer's cache comes with the same bits as from the producer that does nothing else.
    for name, array in run_model(parts.producer, frame).items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("size", [(16, 24), (10, 14), (4, 4), (16, 6)])
def test_cut_tensors_reach_the_working_resolution(size: tuple[int, int]) -> None:
    tap = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    got = working_tap(tap, (8, 12))
    assert got.shape == (1, 3, 8, 12)
    if size == (16, 24):  # area average
        expected = tap.reshape(1, 3, 8, 2, 12, 2).mean((3, 5))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)

    class ToGrid(nn.Module):
        def forward(self, tap: Tensor) -> Tensor:
            return working_tap(tap, (8, 12)) * 1.0

    graph = export_module(ToGrid(), (tap,), ["tap"], ["out"])
    # A weighted mean of a few numbers.
    np.testing.assert_allclose(run_model(graph, {"tap": tap.numpy()})["out"], got.numpy(), atol=2e-6)


def test_tokens_and_vectors_become_vectors() -> None:
    tokens = torch.randn(1, 5, 7)
    torch.testing.assert_close(working_tap(tokens, (8, 8)), tokens[0].sum(0)[None] / 5, atol=1e-6, rtol=0)
    for shape in ((1, 6), (1, 6, 1, 1), (1, 2, 1, 3)):
        values = torch.arange(6.0).reshape(shape)
        assert working_tap(values, (8, 8)).tolist() == [[0, 1, 2, 3, 4, 5]]


class FakeTimes:
    """Measured costs, given: of the ladder's sizes as fractions of the whole; the number of measurements is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ratios: list[float]) -> None:
        self.ratios, self.measured = ratios, 0
        monkeypatch.setattr(adapter_graph, "consumer_graph", self.graph)
        monkeypatch.setattr(adapter_graph, "time_model", self.time)

    def graph(self, consumer: WarpConsumer, layout: AdapterLayout, limits: tuple[float, float]) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph([], str(LADDER.index(consumer.config)), [], []))

    def time(self, models: dict[str, onnx.ModelProto], feeds: object, **options: object) -> dict[str, Timing]:
        self.measured += 1
        return {
            "whole": Timing((20.0, 10.0)),
            "consumer": Timing((50.0, 10.0 * self.ratios[int(models["consumer"].graph.name)])),
        }


RATIOS = [0.64, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.12, 0.1, 0.08, 0.05]


@pytest.mark.parametrize("budget", [0.06, 0.1, 0.11, 0.2, 0.3, 0.5, 0.9])
def test_the_largest_adapter_within_the_budget_is_chosen(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    times = FakeTimes(monkeypatch, RATIOS)
    told: list[tuple[int, int]] = []
    config = choose_config(
        onnx.ModelProto(), LAYOUTS["one image"], budget, {}, progress=lambda _, done, total: told.append((done, total))
    )
    # The promise is kept with some room for the noise of measuring, and no larger one would have kept it.
    chosen = LADDER.index(config)
    assert RATIOS[chosen] <= budget
    assert chosen == 0 or RATIOS[chosen - 1] > 0.9 * budget
    assert times.measured <= 5
    assert [done for done, _ in told] == list(range(1, times.measured + 1))
    assert all(done <= total for done, total in told)


def test_a_budget_that_nothing_meets_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["one image"]
    FakeTimes(monkeypatch, RATIOS)
    with pytest.raises(
        ExportError, match=r"^the smallest warp adapter costs 5\.0% of this generator, over the"
    ) as info:
        choose_config(onnx.ModelProto(), layout, 0.04, {}, progress=lambda *_: None)
    least = float(str(info.value).partition("--budget ")[2].split()[0])
    # And with that budget it works.
    assert choose_config(onnx.ModelProto(), layout, least, {}, progress=lambda *_: None) == LADDER[-1]
    FakeTimes(monkeypatch, [3.0] * len(LADDER))
    with pytest.raises(ExportError, match=r"^the smallest warp adapter costs 300\.0%.*; compile with --steps 0"):
        choose_config(onnx.ModelProto(), layout, 1.0, {}, progress=lambda *_: None)


def test_the_cost_is_measured_on_real_graphs(portrait: Any) -> None:
    layout = layout_of(portrait.model, ["silu_1"], portrait.module.surface, portrait.stream["atlas"].shape)
    feeds = {name: portrait.frame(0)[name] for name in ("condition", "pose", "person")}
    ladder = (AdapterConfig(width=8, blocks=1, features=8), AdapterConfig(width=8, blocks=0, features=8))
    assert choose_config(portrait.model, layout, 1e6, feeds, ladder=ladder, progress=lambda *_: None) == ladder[0]
