"""The benchmarks that make something: engines ahead of time, and the bundle that speed is measured with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import build_time, demo_bundle, reference_bundle
from benchmarks.reference_bundle import PURPOSE, draw_clip, generator, make_reference_bundle
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.engine import Engine
from warpcache.media.inputs import load_inputs


def test_the_time_of_building_ahead(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = tmp_path / "b.json"
    before = sorted(tiny_bundle.parent.iterdir())
    arguments = ["--bundle", str(tiny_bundle), "--runs", "1", "--part", "engines", "--part", "command"]
    result = CliRunner().invoke(build_time.main, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    engines, command = document["parts"]
    assert engines["figures"][0]["name"] == "4 modules, fp16, 3 targets, build_engines, median"
    assert [figure["target"] for figure in engines["figures"]] == [10.0, None]
    assert engines["details"]["targets"] == ["sm_86", "sm_89", "sm_120"]
    # The command builds the same, and starts an interpreter for it.
    assert command["details"]["seconds"][0] > 0
    assert "no GPU used" in result.stdout
    # Nothing is written beside the bundle.
    assert sorted(tiny_bundle.parent.iterdir()) == before


def test_a_build_that_fails_is_told_by_its_last_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(build_time, "TARGETS", ("sm_1",))
    path = tmp_path / "b.json"
    result = CliRunner().invoke(
        build_time.main, ["--bundle", str(tiny_bundle), "--runs", "1", "--part", "convert", "--json", str(path)]
    )
    assert result.exit_code == 1
    (part,) = json.loads(path.read_text())["parts"]
    assert part["error"].startswith("`warpcache build` failed: TensorRT-RTX")
    assert "'sm_1'" in part["error"]


def test_the_promise_is_on_the_median() -> None:
    found = build_time._summarised("building", [3.0, 30.0, 4.0])
    assert [(figure.value, figure.reached) for figure in found.figures] == [(4.0, True), (30.0, None)]


def test_the_reference_generator_is_the_same_every_time() -> None:
    import torch

    before = torch.random.get_rng_state()
    first, second = generator(32).state_dict(), generator(32).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_reference_bundle_runs_and_says_what_it_is_not(tmp_path: Path) -> None:
    bundle = make_reference_bundle(tmp_path / "R.warp", size=32)
    assert bundle.manifest.created["options"]["purpose"] == PURPOSE
    assert bundle.manifest.created["precision"]["precision"] == "fp16"
    assert bundle.manifest.cache[0].dtype == "float16"
    assert [record.name for record in bundle.manifest.exits] == ["whole", "plain", "warp"]
    np.savez(tmp_path / "R.npz", fps=np.float64(30), **draw_clip(32, 3))  # type: ignore[arg-type]
    stream = load_inputs(tmp_path / "R.npz", bundle.manifest.inputs)
    with Engine(Bundle.open(bundle.path), threads=1, age=1) as engine, engine.session() as session:
        routes = [frame.route for frame in session.render(stream.arrays)]
    assert routes == ["plain", "warp", "warp"]


def test_frames_are_written_for_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        reference_bundle.main, ["--size", "32", "--clip", str(tmp_path / "c.npz"), "--clip-frames", "2"]
    )
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "c.npz") as clip:
        assert {name: clip[name].shape for name in clip} == {
            "fps": (),
            "condition": (2, 6, 32, 32),
            "atlas": (2, 3, 64, 64),
        }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing is to be made; give --out, --clip or both"),
        (["--out", "R.warp", "--size", "40"], "a size of 40 is not a multiple of 16"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(reference_bundle.main, arguments)
    assert result.exit_code == 2
    assert sentence in result.output


def test_a_bundle_is_written_again_in_its_place(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "t.warp"))
    manifest = path / "manifest.json"
    written = manifest.read_bytes()
    # Another layout of the same content, which a bundle that is only left alone would keep.
    manifest.write_text(json.dumps(json.loads(written)))
    result = CliRunner().invoke(demo_bundle.main, ["--rewrite", str(path)])
    assert result.exit_code == 0, result.output
    assert f"wrote {path} again: {len(list(path.iterdir())) - 1} files" in result.output
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in tiny_bundle.iterdir()
    }
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "nothing is to be made"), (["--rewrite", "a.warp", "--out", "b.warp"], "leave out --out")],
)
def test_a_demo_bundle_is_made_or_rewritten(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(demo_bundle.main, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_no_bundle_is_not_rewritten(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo_bundle.main, ["--rewrite", str(tmp_path / "none.warp")])
    assert result.exit_code == 1
    assert "none.warp" in result.output
