"""The engine cache: what is a hit and what a miss, damage, two processes at once, and disks that refuse."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from warpcache.engine.errors import BackendError, InputError
from warpcache.engine.spec import TensorSpec
from warpcache.engine.tensorrt import engine_cache
from warpcache.engine.tensorrt.engine_cache import EngineCache, EngineKey, default_folder, graph_digest

LOGGER = "warpcache.engine.tensorrt.engine_cache"
ENGINE = bytes(range(256)) * 2


def key(**changes) -> EngineKey:
    fields = {
        "graph": "ab" * 32,
        "inputs": (TensorSpec("x", "float32", (1, 3, 8, 8)), TensorSpec("cache.h", "float16", (1, 4, 8, 8))),
        "outputs": (TensorSpec("image", "float32", (1, 3, 8, 8)),),
        "precision": "fp16",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "targets": ("sm_86", "sm_89"),
        "options": {"level": "3", "profile": "fixed"},
    }
    return EngineKey(**(fields | changes))


names = st.text("abc.", min_size=1, max_size=3)
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
specs = st.builds(TensorSpec, names, st.sampled_from(["float16", "float32", "uint8"]), shapes)
spec_tuples = st.lists(specs, max_size=2, unique_by=lambda spec: spec.name).map(tuple)
words = st.sampled_from(["fp16", "fp32", "1.7", "17", "tensorrt"])
FIELDS = {
    "graph": st.sampled_from(["ab" * 32, "ba" * 32, "0" * 64]),
    "inputs": spec_tuples,
    "outputs": spec_tuples,
    "precision": words,
    "flavour": words,
    "version": words,
    "targets": st.lists(st.sampled_from(["sm_86", "sm_89", "sm_120"]), min_size=1, max_size=3).map(tuple),
    "options": st.dictionaries(names, st.text('ab,:"{}', max_size=3), max_size=3),
}
keys = st.builds(EngineKey, **FIELDS)
property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@property_test
@given(base=keys, name=st.sampled_from(sorted(set(FIELDS) - {"targets"})), data=st.data())
def test_any_change_of_any_field_is_a_miss(tmp_path, base, name, data):
    other = dataclasses.replace(base, **{name: data.draw(FIELDS[name])})
    same = getattr(other, name) == getattr(base, name)
    if name in ("inputs", "outputs"):
        same = set(getattr(other, name)) == set(getattr(base, name))
    assert (other.digest == base.digest) == same
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    cache = EngineCache(folder)
    cache.store(base, ENGINE)
    assert cache.find(other) == (ENGINE if same else None)
    assert cache.find(base) == ENGINE


@property_test
@given(base=keys, data=st.data())
def test_order_is_nothing(tmp_path, base, data):
    other = dataclasses.replace(
        base,
        inputs=tuple(data.draw(st.permutations(base.inputs))),
        outputs=tuple(data.draw(st.permutations(base.outputs))),
        targets=tuple(data.draw(st.permutations([*base.targets, base.targets[0]]))),
        options=dict(data.draw(st.permutations(list(base.options.items())))),
    )
    assert other.digest == base.digest
    assert other.file_name == base.file_name
    assert other.targets == base.targets
    assert list(other.options) == sorted(other.options)


@property_test
@given(stored=FIELDS["targets"], wanted=FIELDS["targets"])
def test_an_engine_serves_the_targets_it_was_built_for(tmp_path, stored, wanted):
    cache = EngineCache(tmp_path / "-".join(sorted(set(stored))))
    cache.store(key(targets=stored), ENGINE)
    assert cache.find(key(targets=wanted)) == (ENGINE if set(wanted) <= set(stored) else None)


def test_fields_do_not_run_into_each_other():
    assert key(options={"a": "b", "c": "d"}).digest != key(options={"a": 'b","c":"d'}).digest
    assert key(inputs=(), outputs=key().inputs).digest != key(inputs=key().inputs, outputs=()).digest
    assert key(precision="a", flavour="bc").digest != key(precision="ab", flavour="c").digest


def test_equal_keys_are_one_dictionary_entry():
    assert len({key(), key(targets=("sm_89", "sm_86", "sm_89")), key(precision="fp32")}) == 2


def test_a_bundle_in_another_folder_is_a_hit(tiny_bundle, tmp_path):
    rest = {name: value for name, value in vars(key()).items() if name != "graph" and name in FIELDS}
    cache = EngineCache(tmp_path / "cache")
    cache.store(EngineKey(graph_digest(tiny_bundle / "plain.onnx"), **rest), ENGINE)
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy.warp")
    assert cache.find(EngineKey(graph_digest(copy / "plain.onnx"), **rest)) == ENGINE
    assert cache.find(EngineKey(graph_digest(copy / "warp.onnx"), **rest)) is None
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    assert EngineCache(moved).find(EngineKey(graph_digest(copy / "plain.onnx"), **rest)) == ENGINE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "abc"}, "^'abc' is no graph's hash"),
        ({"graph": "AB" * 32}, "^'ABAB"),
        ({"version": ""}, "^the engine's version is empty"),
        ({"targets": ()}, r"^the engine's targets are \(\); name at least one"),
        ({"targets": "sm_89"}, "^the engine's targets are 'sm_89'; name at least one"),
        ({"targets": ("../x",)}, r"^the engine's target '\.\./x' is no name of a GPU"),
        ({"targets": ("sm_86+sm_89",)}, "^the engine's target 'sm_86"),
        ({"options": {"level": 3}}, "^the engine's option 'level' is 3; options are texts"),
    ],
)
def test_a_key_that_says_nothing_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        key(**changes)


# -- damage


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.engine")
    return path


def test_any_flipped_byte_is_a_miss_and_is_mended_by_the_rebuild(tmp_path):
    """Every byte of the file in turn: magic, sizes, header, hashes and engine."""
    cache = EngineCache(tmp_path)
    path = cache.store(key(), ENGINE)
    content = path.read_bytes()
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 1 << index % 8
        path.write_bytes(flipped)
        assert cache.find(key()) is None, f"byte {index} was flipped, and the engine was loaded"
        assert not path.exists()
    assert cache.get_or_build(key(), lambda: b"new") == (b"new", True)
    assert cache.get_or_build(key(), lambda: b"unused") == (b"new", False)


def test_any_other_length_is_a_miss(tmp_path):
    cache = EngineCache(tmp_path)
    path = cache.store(key(), ENGINE)
    content = path.read_bytes()
    for other in [*(content[:size] for size in range(len(content))), content + b"\0", content + content]:
        path.write_bytes(other)
        assert cache.find(key()) is None, f"{len(other)} of {len(content)} bytes were loaded"
        assert not path.exists()


@property_test
@given(base=keys, other=keys)
def test_another_engine_under_this_name_is_never_loaded(tmp_path, base, other):
    """Whole and with right hashes, but built from something else: somebody renamed it."""
    assume(base.file_name != other.file_name)
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    cache = EngineCache(folder)
    cache.store(other, b"foreign").rename(folder / base.file_name)
    assert cache.find(base) is None
    assert not (folder / base.file_name).exists()


def test_a_removed_file_is_logged_with_its_reason(tmp_path, caplog):
    cache = EngineCache(tmp_path)
    path = cache.store(key(), ENGINE)
    path.write_bytes(b"something else altogether")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert cache.find(key()) is None
    assert f"the engine {path} was removed: it is no engine of this cache; it is built again" in caplog.text


def test_a_file_of_an_unknown_schema_is_left_alone_and_replaced_by_the_rebuild(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)
    digest = key().digest
    monkeypatch.setattr(engine_cache, "_SCHEMA", 2)
    newer = cache.store(key(), b"newer")
    monkeypatch.undo()
    # A schema has digests of its own; here the name collides all the same.
    path = newer.rename(tmp_path / key().file_name)
    assert digest in path.name
    content = path.read_bytes()
    assert cache.find(key()) is None
    assert path.read_bytes() == content
    assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)
    assert cache.find(key()) == ENGINE


def test_a_file_that_was_replaced_while_it_was_read_is_not_removed(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)
    path = cache.store(key(), ENGINE)
    path.write_bytes(b"torn")
    read = engine_cache._read

    def read_then_replaced(*args):
        try:
            return read(*args)
        finally:
            monkeypatch.undo()
            EngineCache(tmp_path).store(key(), b"good")

    monkeypatch.setattr(engine_cache, "_read", read_then_replaced)
    assert cache.find(key()) is None
    assert cache.find(key()) == b"good"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_folder_in_the_place_of_an_engine_is_no_engine_and_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / key().file_name)
    (tmp_path / key(precision="int8").file_name).mkdir()
    cache = EngineCache(tmp_path)
    assert cache.find(key()) is None
    assert cache.find(key(precision="int8")) is None
    assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)
    assert cache.find(key()) == ENGINE
    with pytest.raises(InputError, match=r"^the engine .* cannot be stored in "):
        cache.store(key(precision="int8"), ENGINE)


def test_a_second_file_serves_where_the_first_is_torn(tmp_path):
    cache = EngineCache(tmp_path)
    narrow = cache.store(key(targets=("sm_86",)), b"narrow")
    cache.store(key(targets=("sm_86", "sm_89")), b"wide")
    assert cache.find(key(targets=("sm_86",))) == b"narrow"
    narrow.write_bytes(b"")
    assert cache.find(key(targets=("sm_86",))) == b"wide"


# -- building


def test_what_a_build_raises_passes_through_and_leaves_nothing(tmp_path):
    cache = EngineCache(tmp_path)
    for error in (KeyboardInterrupt(), BackendError("no"), MemoryError()):

        def build(error=error):
            raise error

        with pytest.raises(type(error)):
            cache.get_or_build(key(), build)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.get_or_build(key(), lambda: ENGINE)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)


def test_an_empty_engine_is_refused(tmp_path):
    with pytest.raises(BackendError, match=r"^an empty engine was to be stored"):
        EngineCache(tmp_path).get_or_build(key(), lambda: b"")
    assert not list(tmp_path.glob("*.engine"))


def test_several_are_built_in_one_go(tmp_path):
    cache = EngineCache(tmp_path)
    wanted = [key(precision=name) for name in ("fp32", "fp16", "int8")]
    cache.store(wanted[1], b"there")
    with cache.locked() as held:
        assert held
        missing = cache.missing([*wanted, wanted[0]])
        assert missing == [wanted[0], wanted[2]]
        for each in missing:
            cache.store(each, each.precision.encode())
        assert cache.get_or_build(wanted[0], lambda: b"unused") == (b"fp32", False)
    assert [cache.find(each) for each in wanted] == [b"fp32", b"there", b"int8"]
    assert cache.missing(wanted) == []


CHILD = """
import logging, sys
from pathlib import Path
from warpcache.engine.tensorrt.engine_cache import EngineCache, EngineKey

def say(word):
    print(word, flush=True)

class Waiting(logging.Handler):
    def emit(self, record):
        if "another process is building engines" in record.getMessage():
            say("waiting")

logging.getLogger("warpcache").setLevel(logging.INFO)
logging.getLogger("warpcache").addHandler(Waiting())
key = EngineKey("ab" * 32, (), (), "fp32", "tensorrt", "11", ("sm_90",), {})

def build():
    say("building")
    sys.stdin.readline()
    return sys.argv[2].encode()

engine, built = EngineCache(Path(sys.argv[1])).get_or_build(key, build)
say(f"{engine.decode()} {built}")
"""
CHILD_KEY = EngineKey("ab" * 32, (), (), "fp32", "tensorrt", "11", ("sm_90",), {})


class Child:
    """A process that asks the cache for an engine and builds it when it is told to."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(folder), engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.end()


def test_two_processes_at_once_build_once(tmp_path, children):
    folder = tmp_path / "not there yet"
    children.append(Child(folder, "first"))
    assert children[0].says() == "building"
    children.append(Child(folder, "second"))
    # The second has come to the lock that the first holds while it builds.
    assert children[1].says() == "waiting"
    children[0].go_on()
    assert children[0].says() == "first True"
    assert children[1].says() == "first False"
    assert EngineCache(folder).find(CHILD_KEY) == b"first"


def test_a_process_killed_while_building_blocks_nobody(tmp_path, children):
    children.append(Child(tmp_path, "first"))
    assert children[0].says() == "building"
    children.append(Child(tmp_path, "second"))
    assert children[1].says() == "waiting"
    (tmp_path / ".partial-0123-x.engine").write_bytes(b"what a process leaves that is killed while it writes")
    children[0].end()
    assert children[1].says() == "building"
    children[1].go_on()
    assert children[1].says() == "second True"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", CHILD_KEY.file_name]


def test_two_threads_at_once_build_once(tmp_path):
    """Through two objects: the lock is between open files, not between processes."""
    building, go_on, waiting = threading.Event(), threading.Event(), threading.Event()
    results: list[tuple[bytes, bool]] = []

    def build() -> bytes:
        building.set()
        assert go_on.wait(30)
        return ENGINE

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waiting.set()

    logger, handler = logging.getLogger("warpcache.engine.files.lock"), Waiting()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        threads = [
            threading.Thread(target=lambda: results.append(EngineCache(tmp_path).get_or_build(key(), build)))
            for _ in range(2)
        ]
        threads[0].start()
        assert building.wait(30)
        threads[1].start()
        assert waiting.wait(30)
        go_on.set()
        for thread in threads:
            thread.join(30)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert sorted(results) == [(ENGINE, False), (ENGINE, True)]


# -- disks that refuse


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"^the engine .* of 512 bytes cannot be stored: the disk of .* is full; make room"),
        (errno.EROFS, r"^the engine .* cannot be stored in .*: Read-only file system; set WARPCACHE_CACHE"),
        (errno.EACCES, r"^the engine .* cannot be stored in .*: Permission denied; set WARPCACHE_CACHE"),
    ],
)
def test_a_disk_that_refuses_is_one_sentence_and_the_engine_is_used(tmp_path, monkeypatch, caplog, code, message):
    cache = EngineCache(tmp_path)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=message) as caught:
        cache.store(key(), ENGINE)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)
    assert "the engine serves this process only" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = EngineCache(tmp_path / "file" / "engines")
    assert cache.find(key()) is None
    assert cache.get_or_build(key(), lambda: ENGINE) == (ENGINE, True)
    assert "set WARPCACHE_CACHE to a folder that can be written" in caplog.text


def test_a_folder_without_write_permission_still_serves(tmp_path, monkeypatch):
    """A deployment's engines may lie on a read-only disk: found without a lock, and a damaged one is not loaded."""
    EngineCache(tmp_path).store(key(), ENGINE)
    (tmp_path / ".lock").unlink()
    cache = EngineCache(tmp_path)
    opened = os.open

    def read_only(path, flags, *args, **options):
        if flags & (os.O_RDWR | os.O_CREAT | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **options)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "unlink", refuse)
    with cache.locked() as held:
        assert not held
        assert cache.find(key()) == ENGINE
    monkeypatch.setattr(engine_cache.Path, "unlink", refuse)
    monkeypatch.setattr(engine_cache.Path, "open", refuse)
    path = only_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(engine_cache, "_MAGIC", b"WARPCACHE.engine")
        assert cache.get_or_build(key(), lambda: b"built") == (b"built", True)
    assert path.exists()


# -- where it lies


def test_engines_beside_the_bundle_come_first_then_the_variable_then_the_users_folder(tmp_path, monkeypatch):
    bundle = tmp_path / "b.warp"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WARPCACHE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder(bundle) == tmp_path / "home" / ".cache" / "warpcache" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder(bundle) == tmp_path / "xdg" / "warpcache" / "engines"
    monkeypatch.setenv("WARPCACHE_CACHE", str(tmp_path / "chosen"))
    assert default_folder(bundle) == tmp_path / "chosen" / "engines"
    (tmp_path / "engines").mkdir()
    assert default_folder(bundle) == tmp_path / "engines"
    assert default_folder() == tmp_path / "chosen" / "engines"


def test_without_a_home_folder_the_variable_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("WARPCACHE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(engine_cache.Path, "home", no_home)
    with pytest.raises(InputError, match=r"^there is no home folder to keep engines in; set WARPCACHE_CACHE"):
        default_folder(tmp_path / "b.warp")
