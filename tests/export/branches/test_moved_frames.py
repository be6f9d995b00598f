"""Frames that branches are trained on beside the stream's: moved at random, and answered by the generator itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from warpcache.engine.errors import InputError
from warpcache.export.branches.branches import BranchOptions
from warpcache.export.branches.training import BranchNetwork, BranchTraining, Lesson, TrainOptions, _placements
from warpcache.export.frames.streams import frame_at
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.torch_graph.module import GraphModule


def training_of(traced: Any, *, moved: float, whole: bool = True) -> tuple[BranchTraining, Any]:
    """A training of the generator itself as its own branch."""
    session = open_session(traced.model)
    names = GraphIndex(traced.model).outputs
    frames = max(len(array) for array in traced.stream.values())
    images = [np.concatenate([run_session(session, traced.frame(t))[n] for n in names], 1) for t in range(frames)]
    module = GraphModule(traced.model, train="all")
    training = BranchTraining(
        [BranchNetwork(module, names)],
        [None],
        Lesson(
            {
                name: torch.from_numpy(np.ascontiguousarray(traced.stream[name]))
                for name in GraphIndex(traced.model).inputs
            },
            torch.from_numpy(np.concatenate(images)),
            whole=GraphModule(traced.model) if whole else None,
        ),
        TrainOptions(steps=2, batch=4, moved=moved),
    )
    return training, session


def test_the_generator_says_what_a_moved_frame_looks_like(trace: Callable[[str], Any]) -> None:
    traced = trace("unet")
    training, session = training_of(traced, moved=0.5)
    frames = torch.tensor([3, 0, 2, 1])
    inputs, target = training._moved(frames, np.random.default_rng(0))
    names = GraphIndex(traced.model).outputs
    for n in range(4):
        feeds = {name: array[n : n + 1].numpy() for name, array in inputs.items()}
        wanted = np.concatenate([run_session(session, feeds)[name] for name in names], 1)
        # float32 sums in another order, through some twenty layers.
        np.testing.assert_allclose(target[n].numpy(), wanted[0], atol=2e-4)
    for name, array in inputs.items():
        kept = np.stack([frame_at(traced.stream, int(t))[name][0] for t in frames])
        # The first half was moved, the other was not.
        np.testing.assert_array_equal(array[2:].numpy(), kept[2:])
        if name in training.moving:
            assert np.abs(array[:2].numpy() - kept[:2]).max() > 1e-3
    assert training.moving


@pytest.mark.parametrize(("moved", "whole"), [(0.0, True), (0.5, False)])
def test_frames_stay_where_they_are_when_asked_to(trace: Callable[[str], Any], moved: float, whole: bool) -> None:
    training, _ = training_of(trace("unet"), moved=moved, whole=whole)
    frames = torch.tensor([1, 2])
    inputs, target = training._moved(frames, np.random.default_rng(0))
    torch.testing.assert_close(target, training.lesson.images[frames], rtol=0, atol=0)
    for name, array in training._inputs(frames).items():
        torch.testing.assert_close(inputs[name], array, rtol=0, atol=0)


def test_placements_are_small_and_differ() -> None:
    drawn = _placements(200, np.random.default_rng(0))
    assert drawn.shape == (200, 2, 3)
    size = np.sqrt(np.linalg.det(drawn[:, :, :2].astype(np.float64)))
    assert 0.92 <= size.min() < 0.94
    assert 1.06 < size.max() <= 1.08
    assert np.abs(drawn[:, :, 2]).max() <= 0.12
    assert len(np.unique(drawn, axis=0)) == 200


@pytest.mark.parametrize("moved", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(moved: float) -> None:
    with pytest.raises(InputError, match=r"^moved is"):
        BranchOptions(moved=moved)
