"""Ways of caching, on the tiny bundle: each row is what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.caching_policies import SHOWN_AGAIN, Footage, compare_policies, frame_reuse, plain_bundle
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.metrics.images import measure
from warpcache.engine.schedule.policy import Policy
from warpcache.tasks.choices import StreamOptions
from warpcache.tasks.stream import Recording, record

FRAMES = 7


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def clip() -> dict[str, NDArray[np.float32]]:
    """Frames that drift, float32 [7, 3, 16, 16]."""
    rng = np.random.default_rng(3)
    start, step = rng.uniform(-1, 1, (2, 3, 16, 16))
    return {"x": np.stack([np.clip(start + 0.05 * t * step, -1, 1) for t in range(FRAMES)]).astype(np.float32)}


def whole(bundle: Bundle, arrays: dict[str, NDArray[np.float32]]) -> Recording:
    return record(bundle, arrays, Policy("full"), StreamOptions(threads=1), keep=lambda index: True)


def test_frame_reuse_shows_the_last_asked_image(bundle: Bundle, clip: dict[str, NDArray[np.float32]]) -> None:
    every = whole(bundle, clip)
    asked = whole(bundle, {"x": clip["x"][::3]})
    reuse = frame_reuse(asked, FRAMES, 3)
    assert reuse.indices == list(range(FRAMES))
    assert reuse.ages == [0, 1, 2, 0, 1, 2, 0]
    for t in range(FRAMES):
        # One graph on equal inputs with one thread: the same bits.
        np.testing.assert_array_equal(reuse.images[t], every.images[t - t % 3])
    assert [latency > 0 for latency in reuse.latency_ms] == [age == 0 for age in reuse.ages]
    assert [latency for latency in reuse.latency_ms if latency] == asked.latency_ms
    assert reuse.routes == ["whole", SHOWN_AGAIN, SHOWN_AGAIN, "whole", SHOWN_AGAIN, SHOWN_AGAIN, "whole"]
    assert reuse.seconds == asked.seconds
    assert reuse.fps == pytest.approx(FRAMES / asked.seconds)


def test_frame_reuse_refuses_answers_to_other_frames(bundle: Bundle, clip: dict[str, NDArray[np.float32]]) -> None:
    with pytest.raises(ValueError, match=r"^every 3 of 7 frames is 3, but 7 were answered"):
        frame_reuse(whole(bundle, clip), FRAMES, 3)


def test_plain_reuse_has_a_bundle_of_its_own_that_does_only_the_deep_part(
    bundle: Bundle, clip: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    plain = plain_bundle(bundle, clip, tmp_path / "plain.warp")
    assert plain.manifest.cut.tensors == ("h",)
    assert {record_.name for record_ in plain.manifest.exits} == {"whole", "plain"}
    assert len(plain.manifest.cache) == 1  # and not the last image, which only the trained consumer takes
    np.testing.assert_array_equal(whole(plain, clip).images[2], whole(bundle, clip).images[2])


def test_plain_reuse_prefers_the_cheapest_cut_that_reads_the_new_inputs(
    bundle: Bundle, clip: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    def candidate(tensor: str, cost_ratio: float, reads_input: bool) -> dict[str, Any]:
        return {"tensors": [tensor], "cost_ratio": cost_ratio, "reads_input": reads_input}

    candidates = (
        candidate("image", 0.05, True),  # cheaper than the consumer (0.1): no fair rival
        candidate("c2", 0.2, False),
        candidate("h", 0.6, True),
        candidate("c1", 0.7, True),
    )
    manifest = replace(bundle.manifest, cut=replace(bundle.manifest.cut, candidates=candidates))
    plain = plain_bundle(Bundle(bundle.path, manifest), clip, tmp_path / "plain.warp")
    assert plain.manifest.cut.tensors == ("h",)


def test_every_way_is_measured_on_the_same_frames(
    bundle: Bundle, clip: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    images = whole(bundle, clip).images
    truth = np.stack([images[t] * np.float32(0.9) for t in range(FRAMES)])
    plain = plain_bundle(bundle, clip, tmp_path / "plain.warp")
    rows: list[dict[str, Any]] = compare_policies(bundle, plain, Footage(clip, truth, 1000.0), every=3, threads=1)
    assert [row["policy"] for row in rows] == [
        "whole generator",
        "frame reuse every 3",
        "plain every 3",
        "warp every 3",
        "warp async",
    ]
    assert [row["frames"] for row in rows[:4]] == [FRAMES] * 4
    for row in rows:
        assert [quality["against"] for quality in row["quality_against"]] == ["whole generator", "truth"]
    assert rows[0]["quality"]["psnr_db"] == 100  # against itself: the stated cap
    for row in rows[1:4]:
        assert row["age"] == {"mean": pytest.approx(6 / 7), "max": 2}
    assert rows[2]["routes"] == {"plain": FRAMES}
    assert rows[3]["routes"] == {"plain": 3, "warp": 4}
    # Independently: the last asked image against each frame's own.
    frozen = np.mean(
        [measure(images[t - t % 3], images[t], ["psnr_db"])["psnr_db"] for t in range(FRAMES)], dtype=np.float64
    )
    assert rows[1]["quality"]["psnr_db"] == pytest.approx(float(frozen))
    against_truth = np.mean([measure(images[t], truth[t], ["psnr_db"])["psnr_db"] for t in range(FRAMES)])
    assert rows[0]["quality_against"][1]["psnr_db"] == pytest.approx(float(against_truth))
