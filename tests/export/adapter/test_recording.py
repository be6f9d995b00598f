"""What a recording holds, against the torch generator run frame by frame; and layouts that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.adapter.layout import AdapterConfig, ImageInput, VectorInput, layout_of
from warpcache.export.adapter.recording import Recording, record
from warpcache.export.frames.streams import frames_of, spec_of
from warpcache.export.frames.surface import Surface
from warpcache.export.graph.index import GraphIndex

CONFIG = AdapterConfig(stride=4, width=8, blocks=0, features=8)
FRAMES = 6


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def cut_of(portrait: Any, *paths: str) -> list[str]:
    index = GraphIndex(portrait.model)
    return [index.module_outputs(path)[0] for path in paths]


def torch_frame(portrait: Any, t: int, *paths: str) -> tuple[Tensor, list[Tensor]]:
    """The torch generator's images of frame t, channels together, and the outputs of the modules named."""
    seen: dict[str, Tensor] = {}
    hooks = [
        portrait.module.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: seen.__setitem__(path, out)
        )
        for path in paths
    ]
    with torch.no_grad():
        frame = portrait.frame(t)
        out = portrait.module(**{n: torch.from_numpy(frame[n]) for n in ("condition", "pose", "person")})
    for hook in hooks:
        hook.remove()
    return torch.cat([out["image"], out["matte"]], 1), [seen[path] for path in paths]


def test_layout_of_a_generator(portrait: Any) -> None:
    names = cut_of(portrait, "start", "mix", "style")
    layout = layout_of(portrait.model, names, portrait.module.surface, portrait.stream["atlas"].shape)
    assert (layout.height, layout.width, layout.channels) == (32, 48, 4)
    assert layout.outputs == (("image", 3), ("matte", 1))
    assert layout.images == (ImageInput("condition", 6, 32, 48),)
    assert layout.vectors == (VectorInput("pose", (1, 5)), VectorInput("person", (1,), torch.int64))
    assert [vector.elements for vector in layout.vectors] == [5, 1]
    # A feature map keeps its size; tokens and vectors are known by their channels alone.
    assert layout.taps == ((names[0], 8, 32, 48), (names[1], 8, 0, 0), (names[2], 8, 0, 0))
    assert (layout.surface, layout.atlas_size) == (portrait.module.surface, (24, 24))
    without = layout_of(portrait.model, names, None, None)
    assert without == dataclasses.replace(layout, surface=None, atlas_size=(0, 0))


@pytest.mark.parametrize("name", ["latent", "unet"])
def test_layout_of_other_generators(trace: Any, name: str) -> None:
    layout = layout_of(trace(name).model, (), None, None)
    if name == "latent":
        assert (layout.images, layout.vectors) == ((), (VectorInput("latent", (1, 12)),))
    else:
        assert (layout.images, layout.vectors) == ((ImageInput("condition", 3, 32, 32),), ())


def test_outputs_that_are_no_images_are_refused(trace: Any) -> None:
    with pytest.raises(
        ExportError, match=r"^output 'feature' is float32 \(1, 8, 8, 8\); the warp adapter needs"
    ) as info:
        layout_of(trace("many").model, (), None, None)
    assert "--steps 0" in str(info.value)


@pytest.mark.parametrize(
    ("surface", "atlas_shape", "opening"),
    [
        (Surface("atlas", ("condition", 0, 2), ("condition", 5)), None, "the generator declares a surface, but the"),
        (
            Surface("atlas", ("condition", 0, 2), ("condition", 5)),
            (6, 2, 24, 24),
            r"the atlas 'atlas' has shape \(6, 2",
        ),
        (Surface("atlas", ("condition", 0, 2), ("condition", 5)), (6, 3, 24), r"the atlas 'atlas' has shape \(6, 3"),
        (Surface("atlas", ("raster", 0, 2), ("condition", 5)), (6, 3, 24, 24), "the generator's surface says that uv"),
        (Surface("atlas", ("pose", 0, 2), ("condition", 5)), (6, 3, 24, 24), "the generator's surface says that uv"),
        (Surface("atlas", ("condition", 5, 7), ("condition", 5)), (6, 3, 24, 24), "the generator's surface says that"),
        (Surface("atlas", ("condition", 0, 3), ("condition", 5)), (6, 3, 24, 24), "the generator's surface says that"),
        (
            Surface("atlas", ("condition", 0, 2), ("condition", 6)),
            (6, 3, 24, 24),
            "the generator's surface says that m",
        ),
    ],
)
def test_surfaces_that_do_not_fit_are_refused(
    portrait: Any, surface: Surface, atlas_shape: tuple[int, ...] | None, opening: str
) -> None:
    with pytest.raises(ExportError, match="^" + opening):
        layout_of(portrait.model, (), surface, atlas_shape)


def test_a_surface_of_another_size_than_the_images_is_refused(trace: Any) -> None:
    # The latent decoder with one more input: a raster of half its picture's size.
    model = trace("latent").model
    index = GraphIndex(model)
    assert index.specs[index.outputs[0]].shape == (1, 3, 32, 32)
    wide = type(model)()
    wide.CopyFrom(model)
    entry = wide.graph.input.add()
    entry.CopyFrom(wide.graph.input[0])
    entry.name = "raster"
    del entry.type.tensor_type.shape.dim[:]
    for extent in (1, 3, 16, 16):
        entry.type.tensor_type.shape.dim.add(dim_value=extent)
    with pytest.raises(ExportError, match=r"^the generator's surface has its uv in input 'raster' of 16x16, but its"):
        layout_of(wide, (), Surface("atlas", ("raster", 0, 2), ("raster", 2)), (6, 3, 8, 8))


def test_a_recording_is_what_the_generator_does(portrait: Any) -> None:
    paths = ("start", "mix", "style")
    layout = layout_of(portrait.model, cut_of(portrait, *paths), portrait.module.surface, (FRAMES, 3, 24, 24))
    told: list[tuple[str, int, int]] = []
    recording = record(portrait.model, layout, CONFIG, portrait.stream, progress=lambda *report: told.append(report))
    assert told == [("recording the generator", t + 1, FRAMES) for t in range(FRAMES)]
    assert recording.images.shape == (FRAMES, 4, 32, 48)
    assert [tuple(tap.shape) for tap in recording.taps] == [(FRAMES, 8, 8, 12), (FRAMES, 8), (FRAMES, 8)]
    assert {tap.dtype for tap in recording.taps} == {torch.bfloat16}
    for t in range(FRAMES):
        image, (start, tokens, style) = torch_frame(portrait, t, *paths)
        # ONNX Runtime and torch add up in other orders, through normalised layers.
        torch.testing.assert_close(recording.images[t], image[0], atol=1e-4, rtol=0)
        # bfloat16 keeps 8 bits: half a step is 2^-9 of the value.
        expected = (functional.avg_pool2d(start, 4), tokens.mean(1), style)
        for tap, value in zip(recording.taps, expected, strict=True):
            torch.testing.assert_close(tap[t].float(), value[0], atol=1e-4, rtol=2**-8)
    assert recording.atlas is not None
    np.testing.assert_array_equal(recording.atlas.numpy(), portrait.stream["atlas"])
    assert recording.truth is None


def test_inputs_of_frames_and_inputs_that_never_change(portrait: Any) -> None:
    layout = layout_of(portrait.model, (), None, None)
    recording = record(portrait.model, layout, CONFIG, portrait.stream, progress=silent)
    assert set(recording.inputs) == {"condition", "pose", "person"}
    assert recording.atlas is None
    chosen = torch.tensor([4, 0, 4])
    np.testing.assert_array_equal(recording.at("pose", chosen).numpy(), portrait.stream["pose"][[4, 0, 4]])
    assert recording.at("person", chosen).tolist() == [3, 3, 3]


def test_an_atlas_that_never_changes_serves_every_frame(portrait: Any) -> None:
    layout = layout_of(portrait.model, (), portrait.module.surface, (1, 3, 24, 24))
    stream = {**portrait.stream, "atlas": portrait.stream["atlas"][:1]}
    atlas = record(portrait.model, layout, CONFIG, stream, progress=silent).atlas
    assert atlas is not None
    np.testing.assert_array_equal(atlas[torch.tensor([3, 5])].numpy(), np.repeat(stream["atlas"], 2, 0))


def test_truth_of_one_output_stands_beside_the_generators_own_others(portrait: Any) -> None:
    layout = layout_of(portrait.model, (), None, None)
    rng = np.random.default_rng(1)

    def recorded(truth: np.ndarray) -> Recording:
        return record(portrait.model, layout, CONFIG, portrait.stream, truth=truth, progress=silent)

    rgb, matte = (rng.uniform(-1, 1, (FRAMES, channels, 32, 48)).astype(np.float32) for channels in (3, 1))
    of_image, of_matte = recorded(rgb), recorded(matte)
    assert of_image.truth is not None
    assert of_matte.truth is not None
    images = of_image.images.numpy()
    np.testing.assert_array_equal(of_image.truth.numpy(), np.concatenate([rgb, images[:, 3:]], 1))
    np.testing.assert_array_equal(of_matte.truth.numpy(), np.concatenate([images[:, :3], matte], 1))
    for wrong in (rgb[:4], rgb[..., :24], rgb[:, :2]):
        with pytest.raises(InputError, match=r"^the truth has shape \("):
            recorded(wrong)


def test_a_generator_that_gives_nan_is_refused(portrait: Any) -> None:
    layout = layout_of(portrait.model, (), None, None)
    pose = portrait.stream["pose"].copy()
    pose[4, 0] = np.inf
    with pytest.raises(ExportError, match=r"^the generator gives NaN or Inf for frame 4"):
        record(portrait.model, layout, CONFIG, {**portrait.stream, "pose": pose}, progress=silent)


def test_frames_of_a_stream() -> None:
    arrays = {"a": np.arange(3), "b": np.array([7]), "c": np.zeros((3, 2))}
    frames = list(frames_of(arrays, ["b", "a"]))
    assert [(int(f["a"][0]), int(f["b"][0])) for f in frames] == [(0, 7), (1, 7), (2, 7)]
    assert all(set(frame) == {"a", "b"} for frame in frames)
    spec = spec_of("c", arrays["c"])
    assert (spec.name, spec.dtype, spec.shape) == ("c", "float64", (1, 2))
