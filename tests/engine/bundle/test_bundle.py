"""Bundles: what is read back is what was written, and whatever is wrong is refused before anything is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from warpcache.engine.bundle import write as write_module
from warpcache.engine.bundle.bundle import FORMAT, Bundle, Manifest
from warpcache.engine.bundle.manifest import MAX_EXTENT
from warpcache.engine.bundle.roles import Role
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.errors import BundleError, InputError

FILES = ["generator.onnx", "producer.onnx", "plain.onnx", "warp.onnx", "weights.safetensors"]
# The folder of a test outlives one example of a property; each example works on a copy of its own.
COPIES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.fixture
def bundle(make_bundle: Callable[[], Path]) -> Path:
    """A bundle that the test may damage."""
    return make_bundle()


def document(bundle: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return read


def reseal(bundle: Path, **changes: Any) -> None:
    """Write a manifest that vouches for the files as they are now, as somebody with bad intentions would."""
    written = document(bundle) | changes
    written["files"] = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(bundle.iterdir())
        if path.name != "manifest.json"
    }
    (bundle / "manifest.json").write_text(json.dumps(written))


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


# Reading what was written


def test_a_written_bundle_reads_back_the_same(tiny_bundle):
    opened = Bundle.open(tiny_bundle)
    manifest = opened.manifest
    assert opened.path == tiny_bundle
    assert manifest.name == "tiny"
    assert [spec.name for spec in manifest.generator_inputs] == ["x"]
    assert manifest.motion_inputs == ()
    assert manifest.exit("plain").module == "plain"
    assert sorted(manifest.files) == sorted(FILES)
    for name in FILES:
        assert opened.file(name).read_bytes() == (tiny_bundle / name).read_bytes()
        assert manifest.files[name].sha256 == hashlib.sha256(opened.file(name).read_bytes()).hexdigest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_manifest_is_the_documented_json(tiny_bundle):
    written = document(tiny_bundle)
    assert list(written) == [
        *("format", "name", "created", "inputs", "outputs", "image_output", "fps", "cut", "cache"),
        *("modules", "exits", "exact_exit", "state", "calibration", "files"),
    ]
    assert written["format"] == FORMAT == 2
    assert written["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 3, 16, 16], "role": "generator"}]
    assert written["exits"][2] == {"name": "warp", "modules": ["warp"], "cost_ratio": 0.1}
    assert set(written["modules"]["warp"]) == {"role", "kind", "file", "inputs", "outputs"}
    assert {name: module["role"] for name, module in written["modules"].items()} == {
        "generator": "whole",
        "producer": "producer",
        "plain": "plain",
        "warp": "warp",
    }
    assert written["exact_exit"] == "whole"
    assert written["state"] == []


def test_a_bundle_may_be_opened_through_a_link_to_it(tiny_bundle, tmp_path):
    (tmp_path / "current.warp").symlink_to(tiny_bundle)
    assert Bundle.open(tmp_path / "current.warp").manifest.name == "tiny"
    assert Bundle.open(str(tiny_bundle)).manifest.name == "tiny"


def test_what_the_bundle_does_not_have_is_refused_by_name(tiny_bundle):
    opened = Bundle.open(tiny_bundle)
    with pytest.raises(BundleError, match=r"^bundle .*tiny.warp has no file 'other.onnx'; it has: generator.onnx, "):
        opened.file("other.onnx")
    with pytest.raises(InputError, match=r"^bundle 'tiny' has no exit 'deep'; it has: whole, plain, warp"):
        opened.manifest.exit("deep")


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(
    name=names,
    fps=st.none() | st.floats(0.01, 1000),
    created=st.dictionaries(names, json_values, max_size=3),
    calibration=st.none() | st.dictionaries(names, json_values, max_size=3),
    cost_ratio=st.floats(1e-6, 10),
)
def test_json_keeps_every_value(tiny_bundle, name, fps, created, calibration, cost_ratio):
    manifest = Bundle.open(tiny_bundle).manifest
    exits = tuple(replace(record, cost_ratio=cost_ratio) for record in manifest.exits)
    changed = replace(manifest, name=name, fps=fps, created=created, calibration=calibration, exits=exits)
    assert Manifest.from_json(changed.to_json()) == changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_refused_when_writing(tiny_bundle, value):
    manifest = replace(Bundle.open(tiny_bundle).manifest, calibration={"psnr_db": value})
    with pytest.raises(BundleError, match=r"^the manifest of 'tiny' cannot be written as JSON"):
        manifest.to_json()


# Damage


@COPIES
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_in_a_file_is_found(tiny_bundle, tmp_path, name, where, bit):
    copy = tmp_path / "flipped.warp"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tiny_bundle, copy)
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"^bundle .*: file '{name}' has been altered"):
        Bundle.open(copy)


@settings(deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=0, max_size=2))
def test_a_damaged_manifest_is_refused_or_a_manifest(tiny_bundle, where, value):
    """Nothing vouches for the manifest itself; but whatever is in it, nothing but a BundleError comes out."""
    data = (tiny_bundle / "manifest.json").read_bytes()
    at = int(where * len(data))
    try:
        manifest = Manifest.from_json(data[:at] + value + data[at + 1 :])
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"^bundle .*tiny.warp: file '{name}' is missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "other.onnx", ".hidden", "manifest.json.bak", "Weights.safetensors"])
def test_a_file_too_many_is_named(bundle, name):
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match=rf"^bundle .*: file '{name}' is not listed in manifest.json"):
        Bundle.open(bundle)


def test_a_folder_in_a_bundle_is_refused(bundle):
    (bundle / "more").mkdir()
    (bundle / "more" / "extra.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"^bundle .*: 'more' is a folder"):
        Bundle.open(bundle)


@pytest.mark.parametrize("data", [b"", b"x"])
def test_a_file_of_another_size_is_refused_without_reading_it(bundle, data, monkeypatch):
    with (bundle / "weights.safetensors").open("wb") as file:
        file.write(data)
    read: list[str] = []

    def digest(file: Any, kind: str) -> Any:
        read.append(Path(file.name if isinstance(file.name, str) else os.readlink(f"/proc/self/fd/{file.name}")).name)
        return real(file, kind)

    real = hashlib.file_digest
    if sys.platform.startswith("linux"):
        monkeypatch.setattr(hashlib, "file_digest", digest)
    with pytest.raises(BundleError, match=rf"^bundle .*: file 'weights.safetensors' has {len(data)} bytes"):
        Bundle.open(bundle)
    assert "weights.safetensors" not in read


def test_a_link_in_place_of_a_file_is_refused(bundle, tmp_path):
    # The very same bytes, so that size and hash are right.
    shutil.move(bundle / "plain.onnx", tmp_path / "plain.onnx")
    (bundle / "plain.onnx").symlink_to(tmp_path / "plain.onnx")
    with pytest.raises(BundleError, match=r"^bundle .*: 'plain.onnx' is a symbolic link"):
        Bundle.open(bundle)


def test_a_link_is_refused_whatever_it_is_called(bundle, tmp_path):
    (bundle / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(BundleError, match=r"^bundle .*: 'elsewhere' is a symbolic link"):
        Bundle.open(bundle)


def test_a_linked_manifest_is_refused(bundle, tmp_path):
    shutil.move(bundle / "manifest.json", tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"^bundle .*: 'manifest.json' is a symbolic link"):
        Bundle.open(bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "plain.onnx"])
def test_a_pipe_is_refused_rather_than_waited_for(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match=rf"^bundle .*: '{name}' is not a regular file"):
        Bundle.open(bundle)


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(BundleError, match=r"^bundle .*absent.warp: there is no such folder"):
        Bundle.open(tmp_path / "absent.warp")
    (tmp_path / "file.warp").write_bytes(b"")
    with pytest.raises(BundleError, match=r"^bundle .*file.warp: it is not a folder"):
        Bundle.open(tmp_path / "file.warp")
    (tmp_path / "empty.warp").mkdir()
    with pytest.raises(BundleError, match=r"^bundle .*empty.warp: manifest.json is missing"):
        Bundle.open(tmp_path / "empty.warp")


def test_an_oversized_manifest_is_refused(bundle):
    with (bundle / "manifest.json").open("ab") as file:
        file.write(b" " * (8 * 2**20))
    with pytest.raises(BundleError, match=r"^bundle .*: manifest.json is larger than 8388608 bytes"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"manifest.json is not valid JSON"),
        ("{", r"manifest.json is not valid JSON"),
        ("\xff", r"manifest.json is not valid JSON"),
        ("[" * 100_000, r"manifest.json is not valid JSON"),
        ("[]", r"manifest.json: key '\(the document\)' must be an object, not \[\]"),
        ('{"format": 1, "format": 1}', r"manifest.json: 'format' occurs twice"),
        ('{"format": NaN}', r"manifest.json holds NaN"),
        ('{"format": 1}', r"manifest.json: key 'name' is missing"),
        ('{"format": true}', r"manifest.json: key 'format' must be an integer, not True"),
        ('{"format": 3}', r"manifest.json is of format 3, this library reads formats 1 and 2"),
    ],
)
def test_what_is_no_manifest_is_refused(bundle, text, message):
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=rf"^bundle .*tiny.warp: {message}"):
        Bundle.open(bundle)


# A consistent manifest that says something absurd


def edited(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one key, named by its path: ``modules.plain.inputs.0.name``."""
    *parents, last = path.split(".")

    def edit(target: Any) -> None:
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        target[int(last) if isinstance(target, list) else last] = value

    return edit


def removed(path: str) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def edit(target: Any) -> None:
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        del target[last]

    return edit


def duplicated(path: str) -> Callable[[dict[str, Any]], None]:
    def edit(target: dict[str, Any]) -> None:
        items: Any = target
        for key in path.split("."):
            items = items[key]
        items.append(items[0])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("surprise", 1), "key 'surprise' is unknown; the bundle was written by another version"),
        (edited("inputs.0.layout", "NCHW"), r"key 'inputs\[0\].layout' is unknown"),
        (edited("modules.plain.threads", 2), r"key 'modules.plain.threads' is unknown"),
        (removed("cut"), "key 'cut' is missing"),
        (removed("modules.warp.file"), "key 'modules.warp.file' is missing"),
        (edited("name", 5), "key 'name' must be a string, not 5"),
        (edited("name", ""), "key 'name' must be a name of 1 to 500 printable characters"),
        (edited("name", "a\ud800"), "key 'name' must be a name of 1 to 500 printable characters"),
        (edited("name", "a\x1b[31m"), "key 'name' must be a name of 1 to 500 printable characters"),
        (edited("created", []), "key 'created' must be an object"),
        (edited("fps", 0), "key 'fps' must be a number above 0"),
        (edited("fps", 10**400), "key 'fps' must be a finite number"),
        (edited("fps", "30"), "key 'fps' must be a number, not '30'"),
        (edited("calibration", 3), "key 'calibration' must be an object"),
        (edited("cut.tensors", "h"), "key 'cut.tensors' must be a list"),
        (edited("cut.candidates", [1]), r"key 'cut.candidates\[0\]' must be an object"),
        (edited("inputs.0.role", "pose"), r"key 'inputs\[0\].role' must be 'generator' or 'motion'"),
        (edited("inputs.0.dtype", "object"), r"key 'inputs\[0\].dtype' must be one of bool, "),
        (edited("cache.0.dtype", ">f4"), r"key 'cache\[0\].dtype' must be one of"),
        (edited("cache.0.shape", [1] * 9), r"key 'cache\[0\].shape' must be at most 8 extents"),
        (edited("cache.0.shape", [0, 8]), r"key 'cache\[0\].shape' must be at most 8 extents"),
        (edited("cache.0.shape", [-1]), r"key 'cache\[0\].shape' must be at most 8 extents"),
        (edited("cache.0.shape", [MAX_EXTENT + 1]), r"key 'cache\[0\].shape' must be at most 8 extents"),
        (edited("cache.0.shape", [MAX_EXTENT] * 2), r"key 'cache\[0\].shape' must be a tensor of at most 4294967296"),
        (edited("cache.0.shape", [1.0]), r"key 'cache\[0\].shape\[0\]' must be an integer, not 1.0"),
        (edited("cache.0.shape", [True]), r"key 'cache\[0\].shape\[0\]' must be an integer, not True"),
        (edited("cache.0.name", "h"), "cache tensor 'h' does not start with 'cache.'"),
        (edited("inputs.0.name", "cache.x"), "input 'cache.x' starts with 'cache.'"),
        (edited("inputs", []), "inputs is empty"),
        (duplicated("inputs"), "'x' occurs twice in inputs"),
        (duplicated("cache"), "'cache.h' occurs twice in cache"),
        (duplicated("exits"), "'whole' occurs twice in exits"),
        (duplicated("cut.tensors"), "'h' occurs twice in cut.tensors"),
        (duplicated("modules.plain.inputs"), "'cache.h' occurs twice in modules.plain.inputs"),
        (edited("image_output", "picture"), "image_output 'picture' is not one of the outputs"),
        (removed("modules.plain"), "exit 'plain' refers to module 'plain', which is not one that answers frames"),
        (removed("modules.producer"), "there is a cache and no module of role 'producer' that makes it"),
        (removed("modules.warp.role"), "key 'modules.warp.role' is missing"),
        (edited("modules.warp.role", "deep"), "key 'modules.warp.role' must be one of whole, producer, plain, warp"),
        (edited("modules.warp.role", "producer"), "modules 'producer', 'warp' are of role 'producer', which a bundle"),
        (edited("modules.warp.kind", "kernel"), "module 'warp' is of kind 'kernel'; this library runs 'onnx'"),
        (edited("exits.2.name", "plain"), "'plain' occurs twice in exits"),
        (edited("exits.2.modules", []), r"key 'exits\[2\].modules' must be a list of one or more different modules"),
        (
            edited("exits.2.modules", ["warp", "plain"]),
            "exit 'warp' refers to module 'warp', which is not a first part",
        ),
        (edited("exits", []), "exits is empty"),
        (edited("exact_exit", None), "exact_exit is None, but the exit that is the whole generator is 'whole'"),
        (edited("exact_exit", "plain"), "exact_exit is 'plain', but the exit that is the whole generator is 'whole'"),
        (edited("modules.plain.inputs.0.name", "cache.q"), "module 'plain' takes 'cache.q', which is neither a cache"),
        (edited("modules.generator.inputs.0.name", "cache.h"), "module 'generator' takes 'cache.h', which is not an"),
        (
            edited("modules.plain.inputs.0.shape", [1, 8, 16, 8]),
            r"module 'plain' takes 'cache.h' \(float32, \[1, 8, 16, 8",
        ),
        (
            edited("modules.producer.outputs.0.dtype", "float16"),
            "the outputs of module 'producer' are .* bundle's cache",
        ),
        (
            edited("modules.warp.outputs.0.name", "y"),
            "the outputs of module 'warp' are 'y' .* match the bundle's outputs",
        ),
        (edited("modules.warp.outputs", []), "the outputs of module 'warp' are none"),
        (edited("exits.1.modules", ["deep"]), "exit 'plain' refers to module 'deep'"),
        (edited("exits.1.modules", ["producer"]), "exit 'plain' refers to module 'producer'"),
        (edited("exits.1.modules", ["plain", "plain"]), r"key 'exits\[1\].modules' must be a list of one or more"),
        (edited("exits.1.cost_ratio", -0.5), r"key 'exits\[1\].cost_ratio' must be a number above 0"),
        (edited("modules.warp.file", "lost.onnx"), "module 'warp' refers to 'lost.onnx', which files does not list"),
        (edited("modules.warp.file", "weights.safetensors"), "module 'warp' refers to .*, which is no .onnx file"),
    ],
)
def test_a_manifest_that_says_something_absurd_is_refused(bundle, edit, message):
    written = document(bundle)
    edit(written)
    (bundle / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(BundleError, match=rf"^bundle .*tiny.warp: manifest.json: {message}"):
        Bundle.open(bundle)


FORMAT_1 = Path(__file__).parents[2] / "data" / "format1.warp"
STATE = {"input": {"name": "h", "dtype": "float32", "shape": [1, 4]}, "output": "h_next", "initial": None}


def with_state(change: Callable[[dict[str, Any]], None] | None = None) -> Callable[[dict[str, Any]], None]:
    """The tiny bundle's manifest as if its generator and producer carried a state, and then changed."""

    def edit(written: dict[str, Any]) -> None:
        written["state"] = [json.loads(json.dumps(STATE))]
        for name in ("generator", "producer"):
            module = written["modules"][name]
            module["inputs"].append(dict(STATE["input"]))
            module["outputs"].append({**STATE["input"], "name": "h_next"})
        if change is not None:
            change(written)

    return edit


def test_state_is_read(bundle):
    written = document(bundle)
    with_state()(written)
    manifest = Manifest.from_json(json.dumps(written))
    (state,) = manifest.state
    assert (state.input.name, state.output, state.initial, state.written.name) == ("h", "h_next", None, "h_next")
    assert [spec.name for spec in manifest.generator_inputs] == ["x"]
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (duplicated("state"), "'h' occurs twice in state inputs"),
        (
            lambda w: w["state"].append({**STATE, "input": {**STATE["input"], "name": "g"}}),
            "'h_next' occurs twice in state outputs",
        ),
        (
            edited("state.0.input.shape", [1, 5]),
            r"module 'generator' takes 'h' \(float32, \[1, 4\]\), but the bundle has",
        ),
        (
            edited("modules.generator.outputs.1.shape", [1, 5]),
            r"state 'h_next' is written by module 'generator' as .*\[1, 5\]\), but read as 'h' .*\[1, 4\]",
        ),
        (
            edited("modules.producer.outputs.2.dtype", "float16"),
            "state 'h_next' is written by module 'producer' as .*float16",
        ),
        (edited("modules.producer.outputs.2.name", "other"), "module 'producer' does not write the state 'h_next'"),
        (edited("state.0.output", "image"), r"state 'h' \(written as 'image'\) is an input or output of the frame too"),
        (
            edited("state.0.initial", "state.npz"),
            "the first value of state 'h' is in 'state.npz', which files does not",
        ),
        (edited("modules.plain.inputs.0", dict(STATE["input"])), "module 'plain' takes 'h', which is neither a cache"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(bundle, change, message):
    written = document(bundle)
    with_state(change)(written)
    with pytest.raises(BundleError, match=rf"^manifest.json: {message}"):
        Manifest.from_json(json.dumps(written))


def test_an_exit_may_run_modules_that_others_share(bundle):
    written = document(bundle)
    middle = {"name": "middle", "dtype": "float32", "shape": [1, 8, 16, 16]}
    written["modules"]["first"] = {
        "role": "part",
        "kind": "onnx",
        "file": "plain.onnx",
        "inputs": [dict(written["cache"][0])],
        "outputs": [middle],
    }
    written["modules"]["second"] = {
        "role": "warp",
        "kind": "onnx",
        "file": "warp.onnx",
        "inputs": [middle],
        "outputs": [dict(written["outputs"][0])],
    }
    written["exits"].append({"name": "short", "modules": ["first", "second"], "cost_ratio": 0.2})
    manifest = Manifest.from_json(json.dumps(written))
    assert manifest.role_of("short") is Role.WARP
    assert manifest.reads_cache("short")
    assert [spec.name for spec in manifest.exit_inputs("short")] == ["cache.h"]
    written["exits"][-1]["modules"] = ["second"]
    with pytest.raises(BundleError, match=r"^manifest.json: module 'second' takes 'middle', which is neither"):
        Manifest.from_json(json.dumps(written))


def test_a_bundle_without_cut_and_without_an_exact_exit(bundle):
    written = document(bundle)
    written["modules"] = {"student": {**written["modules"]["generator"], "role": "branch"}}
    written["exits"] = [{"name": "student", "modules": ["student"], "cost_ratio": 0.1}]
    written |= {"cut": None, "cache": [], "exact_exit": None}
    manifest = Manifest.from_json(json.dumps(written))
    assert manifest.exact_exit is None
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_bundle_of_format_1_is_read_and_written_as_format_2(tmp_path):
    """A bundle as version 0.1.0 wrote it, kept under tests/data: its modules' roles follow from their names."""
    assert json.loads((FORMAT_1 / "manifest.json").read_text())["format"] == 1
    opened = Bundle.open(FORMAT_1)
    assert {name: str(module.role) for name, module in opened.manifest.modules.items()} == {
        "generator": "whole",
        "producer": "producer",
        "plain": "plain",
        "warp": "warp",
        "warp2": "warp",
        "branch1": "branch",
        "predictor": "predictor",
        "predictor_cold": "predictor_cold",
    }
    again = write_bundle(
        tmp_path / "new.warp", opened.manifest, {name: opened.file(name) for name in opened.manifest.files}
    )
    assert json.loads((again.path / "manifest.json").read_text())["format"] == FORMAT
    assert Bundle.open(again.path).manifest == opened.manifest


def test_predictors_and_exits_of_any_name_are_read(routed_bundle):
    manifest = Bundle.open(routed_bundle).manifest
    assert [record.name for record in manifest.exits] == ["whole", "plain", "warp2", "warp", "branch1"]
    assert [spec.name for spec in manifest.modules["predictor"].inputs] == ["x", "cache.thumbnail", "age"]
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("exits.2.modules", ["predictor"]), "exit 'warp2' refers to module 'predictor', which is not one that"),
        (edited("exits.2.name", "producer"), "an exit is called 'producer'; that is kept for what answers no frame"),
        (edited("exits.2.name", "predictor2"), "an exit is called 'predictor2'; that is kept for what answers no"),
        (
            edited("modules.predictor.inputs.2.shape", [1]),
            r"module 'predictor' takes 'age' \(float32, \[1\]\), but the",
        ),
        (
            edited("modules.predictor.inputs.0.name", "pose"),
            "module 'predictor' takes 'pose', which is neither a cache",
        ),
        (
            edited("modules.predictor_cold.inputs.0.name", "cache.thumbnail"),
            "module 'predictor_cold' takes 'cache.thumbnail', which is not an input",
        ),
        (edited("modules.warp.inputs.0.name", "age"), "module 'warp' takes 'age', which is neither a cache tensor nor"),
        (duplicated("modules.predictor.outputs"), "'predicted' occurs twice in modules.predictor.outputs"),
        (edited("modules.predictor.outputs", []), "the outputs of module 'predictor' are none, but a predictor gives"),
        (edited("modules.predictor.outputs.0.shape", [1, 2]), "the outputs of module 'predictor' are 'predicted'"),
        (edited("modules.predictor.outputs.1.dtype", "float16"), "the outputs of module 'predictor' are 'predicted'"),
        (edited("modules.predictor.outputs.0.shape", [3]), "the outputs of module 'predictor' are 'predicted'"),
        (
            edited("modules.predictor_cold.outputs.2.name", "change"),
            "the outputs of module 'predictor_cold' are 'predicted'",
        ),
    ],
)
def test_a_predictor_that_does_not_fit_is_refused(routed_bundle, tmp_path, edit, message):
    bundle = shutil.copytree(routed_bundle, tmp_path / "routed.warp")
    written = document(bundle)
    edit(written)
    (bundle / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(BundleError, match=rf"^bundle .*routed.warp: manifest.json: {message}"):
        Bundle.open(bundle)


def test_an_input_that_is_called_as_the_predictors_age_is_refused(routed_bundle, tmp_path):
    bundle = shutil.copytree(routed_bundle, tmp_path / "routed.warp")
    written = document(bundle)
    for specs in (written["inputs"], *(module["inputs"] for module in written["modules"].values())):
        specs[:] = [spec | {"name": "age"} if spec["name"] == "x" else spec for spec in specs if spec["name"] != "age"]
    (bundle / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(BundleError, match=r"^bundle .*: manifest.json: an input is called 'age', which is what a"):
        Bundle.open(bundle)


def test_a_predictor_of_another_name_is_refused_in_format_1():
    written = json.loads((FORMAT_1 / "manifest.json").read_text())
    written["modules"]["predictor_warm"] = written["modules"].pop("predictor")
    with pytest.raises(BundleError, match=r"^manifest.json: module 'predictor_warm' is unknown; a predictor"):
        Manifest.from_json(json.dumps(written))


@pytest.mark.parametrize("change", [{"size_bytes": -1}, {"sha256": "0" * 63}, {"sha256": "G" * 64}, {"mode": 7}])
def test_a_file_record_is_read_strictly(bundle, change):
    written = document(bundle)
    written["files"]["warp.onnx"] |= change
    (bundle / "manifest.json").write_text(json.dumps(written))
    key = next(iter(change))
    with pytest.raises(BundleError, match=rf"^bundle .*: manifest.json: key 'files.warp.onnx.{key}'"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.onnx", "/etc/passwd", "/etc/secret.onnx", "a/b.onnx", "a\\b.onnx", "C:evil.onnx", "..", ".onnx"),
        *(
            "model.pkl",
            "model.pt",
            "manifest.json",
            "warp.onnx\n",
            "wärp.onnx",
            "warp.onnx.exe",
            "",
            "a" * 200 + ".onnx",
        ),
    ],
)
@pytest.mark.parametrize("place", ["files", "module"])
def test_a_file_name_that_leaves_the_folder_or_is_of_another_kind_is_refused(bundle, name, place):
    written = document(bundle)
    if place == "files":
        written["files"][name] = written["files"].pop("warp.onnx")
    else:
        written["modules"]["warp"]["file"] = name
    (bundle / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(BundleError, match=r"^bundle .*: manifest.json: .* holds the file name"):
        Bundle.open(bundle)


def test_names_that_differ_in_case_only_are_refused(bundle):
    # Two files here, one file on systems that ignore case.
    shutil.copy(bundle / "warp.onnx", bundle / "WARP.onnx")
    reseal(bundle)
    with pytest.raises(BundleError, match=r"^bundle .*: manifest.json: 'warp.onnx' occurs twice in files"):
        Bundle.open(bundle)


# Writing


def parts(bundle: Path) -> tuple[Manifest, dict[str, Path | bytes]]:
    opened = Bundle.open(bundle)
    return replace(opened.manifest, files={}), {name: opened.file(name) for name in opened.manifest.files}


def test_content_may_be_bytes_or_a_file(tiny_bundle, tmp_path):
    manifest, files = parts(tiny_bundle)
    files["plain.onnx"] = (tiny_bundle / "plain.onnx").read_bytes()
    written = write_bundle(tmp_path / "deep" / "er" / "b.warp", manifest, files)
    assert written == Bundle.open(tmp_path / "deep" / "er" / "b.warp")
    assert contents(written.path) == contents(tiny_bundle)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_bundle_is_as_readable_as_the_umask_says(tiny_bundle, tmp_path):
    before = os.umask(0o027)
    try:
        path = write_bundle(tmp_path / "b.warp", *parts(tiny_bundle)).path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["head", "head.zip", ".warp"])
def test_a_bundle_is_called_warp(tiny_bundle, tmp_path, name):
    with pytest.raises(BundleError, match=r"^a bundle's name ends in .warp, but "):
        write_bundle(tmp_path / name, *parts(tiny_bundle))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_where_asked(bundle, tmp_path):
    manifest, files = parts(bundle)
    with pytest.raises(BundleError, match=r"^.*tiny.warp exists already"):
        write_bundle(bundle, manifest, files)
    assert Bundle.open(bundle).manifest.name == "tiny"
    # From the very bundle that is being replaced: its files are copied before it goes.
    write_bundle(bundle, replace(manifest, name="second"), files, overwrite=True)
    assert Bundle.open(bundle).manifest.name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.warp"]


def test_what_is_no_bundle_is_never_overwritten(tiny_bundle, tmp_path):
    path = tmp_path / "thesis.warp"
    path.mkdir()
    (path / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match=r"^.*thesis.warp exists and is not a bundle"):
        write_bundle(path, *parts(tiny_bundle), overwrite=True)
    assert contents(path) == {"chapter.txt": b"years of work"}


def test_files_that_do_not_fit_the_manifest_are_refused(tiny_bundle, tmp_path):
    manifest, files = parts(tiny_bundle)
    del files["warp.onnx"]
    with pytest.raises(BundleError, match=r"^bundle .*b.warp: manifest.json: module 'warp' refers to 'warp.onnx'"):
        write_bundle(tmp_path / "b.warp", manifest, files)
    files["../warp.onnx"] = b""
    with pytest.raises(BundleError, match=r"^a bundle cannot hold a file called '../warp.onnx'"):
        write_bundle(tmp_path / "b.warp", manifest, files)
    files = {"lost.onnx": tmp_path / "lost.onnx"}
    with pytest.raises(BundleError, match=r"^bundle .*b.warp cannot be written: .*lost.onnx"):
        write_bundle(tmp_path / "b.warp", manifest, files)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            BundleError,
            r"^the disk is full: bundle .* needs \d+ bytes",
        ),
        (OSError(errno.EIO, "Input/output error"), BundleError, r"^bundle .* cannot be written: .*Input/output error"),
    ],
)
def test_whatever_stops_the_writing_leaves_everything_as_it_was(
    tiny_bundle, tmp_path, monkeypatch, overwrite, error, raised, message
):
    manifest, files = parts(tiny_bundle)
    target = tmp_path / "b.warp"
    if overwrite:
        write_bundle(target, manifest, files)
    before = contents(target) if overwrite else None
    real, steps = os.fsync, 0

    def fail_at(step: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                raise error
            real(descriptor)

        return fsync

    # Every file, the manifest and the unfinished folder itself: each is a place where the writing can stop.
    for step in range(1, len(files) + 3):
        steps = 0
        monkeypatch.setattr(os, "fsync", fail_at(step))
        with pytest.raises(raised, match=message):
            write_bundle(target, replace(manifest, name="new"), files, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == (["b.warp"] if overwrite else [])
        if overwrite:
            assert contents(target) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("step", [1, 2])
def test_a_swap_that_stops_half_way_puts_the_old_bundle_back(bundle, tmp_path, monkeypatch, error, step):
    manifest, files = parts(bundle)
    before = contents(bundle)
    real, steps = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal steps
        steps += 1
        if steps == step:
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((KeyboardInterrupt, BundleError)):
        write_bundle(bundle, replace(manifest, name="new"), files, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.warp"]
    assert contents(bundle) == before


def test_the_disk_full_message_says_what_is_needed(tiny_bundle, tmp_path, monkeypatch):
    manifest, files = parts(tiny_bundle)
    needed = sum((tiny_bundle / name).stat().st_size for name in FILES)

    def write(target: Path, content: Path | bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_module, "_write", write)
    with pytest.raises(BundleError, match=rf"^the disk is full: bundle .*b.warp needs {needed} bytes .* \d+ are free"):
        write_bundle(tmp_path / "b.warp", manifest, files)
