"""Engines are built by the real TensorRT-RTX, which needs no GPU for it: what they are of, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests_software_tensorrt import failing, software_flavour

import warpcache
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import BackendError, DeviceError, InputError
from warpcache.engine.spec import TensorSpec
from warpcache.engine.tensorrt import builder as tensorrt_builder
from warpcache.engine.tensorrt import flavour as tensorrt_flavour
from warpcache.engine.tensorrt import network as tensorrt_network
from warpcache.engine.tensorrt.builder import (
    BuildOptions,
    BuildRequest,
    ShapeProfile,
    build_engine,
    build_engine_isolated,
    build_engines_isolated,
)
from warpcache.engine.tensorrt.flavour import Flavour

TARGETS = ("sm_86", "sm_89", "sm_120")
X = TensorSpec("x", "float32", (1, 3))
Y = TensorSpec("y", "float32", (1, 3))


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return Flavour.load("tensorrt-rtx")


def request_of(bundle: Path, module: str, **changes: Any) -> BuildRequest:
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[module]
    made = BuildRequest(opened.file(record.file), module, record.inputs, record.outputs, ("sm_86",))
    return dataclasses.replace(made, **changes)


def build(request: BuildRequest, flavour: Flavour) -> bytes:
    """In this process."""
    return build_engine(request, flavour=flavour)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    dtype: int = TensorProto.FLOAT,
    shape: tuple[int | str, ...] = (1, 3),
    out_dtype: int | None = None,
    opset: int = 20,
) -> Path:
    """A graph from x to y, both of one shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype if out_dtype is None else out_dtype, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


@pytest.fixture
def relu(tmp_path: Path) -> BuildRequest:
    path = save_graph(tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    return BuildRequest(path, "m", (X,), (Y,), ("sm_86",))


def diagnostics(flavour: Flavour, engine: bytes) -> int:
    """What the real runtime finds wrong with an engine's header; it can tell so much without a GPU."""
    runtime = flavour.module.Runtime(flavour.trt_logger)
    return int(runtime.get_engine_validity(engine)[1])


def test_every_module_of_the_demo_is_built_for_three_gpus_in_one_call(rtx):
    bundle = Path(warpcache.__file__).parent / "data" / "demo.warp"
    names = sorted(Bundle.open(bundle).manifest.modules)
    engines = build_engines_isolated([request_of(bundle, name, targets=TARGETS) for name in names], flavour=rtx)
    malformed = int(rtx.module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    weights = (bundle / "weights.safetensors").stat().st_size
    sizes = {}
    for name, engine in zip(names, engines, strict=True):
        assert isinstance(engine, bytes), engine
        assert not diagnostics(rtx, engine) & malformed
        sizes[name] = len(engine)
    # The file's weights are those of all modules: it was found beside the graph and read.
    assert sizes["generator"] > weights / 2
    assert diagnostics(rtx, bytes(len(engines[0]))) & malformed  # type: ignore[arg-type]


def test_the_same_engine_is_the_same_bytes_in_whichever_process_and_order(tiny_bundle, rtx):
    names = ("generator", "producer", "plain", "warp")
    requests = [request_of(tiny_bundle, name, targets=TARGETS) for name in names]
    shuffled = [dataclasses.replace(request, targets=TARGETS[::-1] + TARGETS) for request in reversed(requests)]
    first = build_engines_isolated(requests, flavour=rtx)
    second = build_engines_isolated(shuffled, flavour=rtx)
    assert first == second[::-1]
    assert [build(request, rtx) for request in requests] == first
    assert len(set(first)) == len(names)


def test_weights_beside_the_graph_are_in_the_engine(make_bundle, rtx):
    bundle = make_bundle()
    before = build(request_of(bundle, "plain"), rtx)
    request = request_of(bundle, "plain")
    # Past the bundle's hashes, which would refuse this: the last bytes of the file are a weight.
    weights = bytearray((bundle / "weights.safetensors").read_bytes())
    weights[-4:] = b"\0\0\0\0"
    (bundle / "weights.safetensors").write_bytes(weights)
    assert build(request, rtx) != before


@pytest.mark.parametrize(
    "options",
    [BuildOptions(tf32=True), BuildOptions(workspace_mib=16)],
    ids=["tf32", "workspace"],
)
def test_options_reach_the_builder(tiny_bundle, rtx, options):
    request = request_of(tiny_bundle, "plain")
    assert build(request, rtx) != build(dataclasses.replace(request, options=options), rtx)


@pytest.mark.parametrize("option", ["optimization_level", "workspace_mib", "tf32", "profiles"])
def test_every_option_is_in_the_engine_of_the_double_and_in_the_key(option, tmp_path):
    values = {
        "optimization_level": 5,
        "workspace_mib": 64,
        "tf32": True,
        "profiles": (ShapeProfile("x", (1, 3), (1, 3), (4, 3)),),
    }
    path = save_graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape=("n", 3))
    plain = BuildRequest(path, "m", (X,), (Y,), ("sm_86",))
    changed = dataclasses.replace(plain, options=BuildOptions(**{option: values[option]}))
    assert build(plain, software_flavour()) != build(changed, software_flavour())
    assert plain.options.as_key() != changed.options.as_key()


OPTIONS = st.builds(
    BuildOptions,
    optimization_level=st.none() | st.integers(0, 5),
    workspace_mib=st.none() | st.integers(1, 4),
    tf32=st.booleans(),
    profiles=st.lists(
        st.builds(
            lambda name, low, more: ShapeProfile(name, (low, 1), (low, 1), (low + more, 1)),
            st.sampled_from(["a", "b"]),
            st.integers(1, 3),
            st.integers(0, 2),
        ),
        unique_by=lambda profile: profile.name,
        max_size=2,
    ).map(tuple),
)


@settings(deadline=None)
@given(one=OPTIONS, two=OPTIONS)
def test_keys_differ_exactly_where_options_do(one, two):
    def said(options: BuildOptions) -> Any:
        # The order of profiles means nothing.
        return dataclasses.replace(options, profiles=tuple(sorted(options.profiles, key=str)))

    assert (one.as_key() == two.as_key()) == (said(one) == said(two))
    assert all(isinstance(value, str) for value in one.as_key().values())


# What is announced and what the graph has


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": (TensorSpec("image", "float32", (1, 3)),)},
            r"^module 'm' \(relu.onnx\): the graph's inputs are 'x', but 'image' were announced; compile the bundle",
        ),
        ({"outputs": ()}, r"^module 'm' \(relu.onnx\): the graph's outputs are 'y', but none were announced"),
        (
            {"inputs": (TensorSpec("x", "float16", (1, 3)),)},
            r"^module 'm' \(relu.onnx\): input 'x' is float32 in the graph, but float16 was announced",
        ),
        (
            {"outputs": (TensorSpec("y", "float32", (1, 4)),)},
            r"^module 'm' \(relu.onnx\): output 'y' is \[1, 3\] in the graph, but \[1, 4\] was announced",
        ),
        ({"outputs": (TensorSpec("y", "float32", (3,)),)}, r"^module 'm' \(relu.onnx\): output 'y' is \[1, 3\] in the"),
    ],
)
def test_a_graph_that_is_not_what_was_announced_is_refused(relu, rtx, changes, message):
    with pytest.raises(BackendError, match=message):
        build(dataclasses.replace(relu, **changes), rtx)


def test_a_type_that_numpy_lacks_is_named(tmp_path, rtx):
    path = save_graph(
        tmp_path / "bf16.onnx",
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
        out_dtype=TensorProto.BFLOAT16,
    )
    with pytest.raises(BackendError, match=r"^module 'm' \(bf16.onnx\): output 'y' is bf16 in the graph, but float32"):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), rtx)


# What the parser and the builder refuse


def scoped(node: onnx.NodeProto, scopes: str) -> onnx.NodeProto:
    """The node as torch's exporter would have marked it."""
    node.metadata_props.add(key="namespace", value=": unet.UNet/mid: unet.Block")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    return node


def nonzero_graph(path: Path, scopes: str) -> Path:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="node_relu"),
        scoped(helper.make_node("NonZero", ["r"], ["found"], name="node_nonzero"), scopes),
        helper.make_node("Cast", ["found"], ["y"], to=TensorProto.FLOAT, name="node_cast"),
    ]
    return save_graph(path, nodes)


def test_an_operator_that_is_refused_is_named_with_its_place_in_the_users_model(tmp_path, rtx):
    path = nonzero_graph(tmp_path / "m.onnx", "['', 'mid', 'mid.select', 'nonzero']")
    with pytest.raises(
        BackendError,
        match=r"^module 'm' \(m.onnx\) is refused by TensorRT-RTX because of node 'node_nonzero' \(NonZero\) at "
        r"mid.select.nonzero, which makes 'found': .*; use the backend 'onnxruntime', or a model without this oper",
    ):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), rtx)


@pytest.mark.parametrize("scopes", ["", "nonsense(", "{'a': 1}", "[1, 2]"])
def test_a_node_without_a_place_is_named_by_what_it_makes(tmp_path, rtx, scopes):
    path = nonzero_graph(tmp_path / "m.onnx", scopes)
    with pytest.raises(BackendError, match=r"because of node 'node_nonzero' \(NonZero\), which makes 'found': "):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), rtx)


def test_a_node_without_a_name_is_found_by_its_number(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        scoped(helper.make_node("Tanh", ["r"], ["y"]), "['', 'head', 'head.act', 'tanh']"),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes)
    with (
        failing(refused_operators={"Tanh"}),
        pytest.raises(BackendError, match=r"because of node '' \(Tanh\) at head.act.tanh, which makes 'y': Plugin not"),
    ):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), software_flavour())


def test_further_refused_nodes_are_counted(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["r"], name="a"), helper.make_node("Relu", ["r"], ["y"], name="b")]
    path = save_graph(tmp_path / "m.onnx", nodes)
    with (
        failing(refused_operators={"Relu"}),
        pytest.raises(BackendError, match=r"because of node 'a' \(Relu\), .* found \(and 1 more\); use the backend"),
    ):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), software_flavour())


def test_a_file_that_is_no_model_is_refused(tmp_path, rtx):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(BackendError, match=r"^module 'm' \(m.onnx\) is refused by TensorRT-RTX: .*Failed to parse the"):
        build(BuildRequest(path, "m", (X,), (Y,), ("sm_86",)), rtx)


def test_a_missing_file_is_named(tmp_path, rtx):
    with pytest.raises(BackendError, match=r"^module 'm': there is no file .*m.onnx; open the bundle again"):
        build(BuildRequest(tmp_path / "m.onnx", "m", (X,), (Y,), ("sm_86",)), rtx)


def test_what_the_builder_says_is_in_the_error(relu):
    with (
        failing(refuses_build="no tactic for\n layer 7"),
        pytest.raises(
            BackendError,
            match=r"^module 'm' \(relu.onnx\): TensorRT-RTX cannot build it: .*no tactic for layer 7; try the backend",
        ),
    ):
        build(relu, software_flavour())


def test_a_library_without_a_builder_says_so(relu):
    with failing(no_builder=True), pytest.raises(BackendError, match=r"^TensorRT-RTX gives no builder \(pybind11.*doc"):
        build(relu, software_flavour())


def test_an_unknown_target_is_refused_before_anything_is_read(relu, rtx):
    with pytest.raises(BackendError, match=r"^TensorRT-RTX .* does not build for 'sm_61'; it knows sm_75"):
        build(dataclasses.replace(relu, targets=("sm_61",)), rtx)


def test_full_tensorrt_builds_on_the_gpu_that_is_current(relu, monkeypatch):
    calls: list[str] = []

    def context(ordinal: int) -> Any:
        return SimpleNamespace(
            architecture="sm_90",
            make_current=lambda: calls.append(f"current {ordinal}"),
            close=lambda: calls.append(f"close {ordinal}"),
        )

    for module in (tensorrt_flavour, tensorrt_network):
        monkeypatch.setattr(module, "Context", context)
    request = dataclasses.replace(relu, targets=("current",))
    engine = build_engine(request, flavour=software_flavour("tensorrt"), device=1)
    assert engine.startswith(b"ftrt")
    assert calls == ["close 1", "current 1", "close 1"]


# Shapes


DYNAMIC: tuple[int | str, ...] = ("n", 3)


@pytest.fixture
def dynamic(tmp_path: Path) -> BuildRequest:
    path = save_graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape=DYNAMIC)
    return BuildRequest(path, "m", (X,), (Y,), ("sm_86",))


def profiled(request: BuildRequest, *profiles: ShapeProfile) -> BuildRequest:
    return dataclasses.replace(request, options=BuildOptions(profiles=profiles))


def test_open_extents_are_built_for_the_spec_or_for_a_profile(dynamic, rtx):
    fixed = build(dynamic, rtx)
    same = build(profiled(dynamic, ShapeProfile("x", (1, 3), (1, 3), (1, 3))), rtx)
    wide = build(profiled(dynamic, ShapeProfile("x", (1, 3), (2, 3), (8, 3))), rtx)
    assert fixed == same
    assert fixed != wide


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (
            ShapeProfile("x", (2, 3), (2, 3), (8, 3)),
            r"^module 'm' \(m.onnx\): the shape profile of 'x', \[2, 3\] to \[8, 3\], does not fit its shape \[1, 3\], "
            r"in the graph \[-1, 3\]",
        ),
        (ShapeProfile("x", (1, 1), (1, 3), (8, 3)), r"^module 'm' \(m.onnx\): the shape profile of 'x', \[1, 1\]"),
        (ShapeProfile("x", (1,), (1,), (8,)), r"^module 'm' \(m.onnx\): the shape profile of 'x', \[1\]"),
        (
            ShapeProfile("z", (1,), (1,), (8,)),
            r"^module 'm' \(m.onnx\): there are shape profiles for 'z', but its inputs are 'x'; name those",
        ),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(dynamic, rtx, profile, message):
    with pytest.raises(BackendError, match=message):
        build(profiled(dynamic, profile), rtx)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShapeProfile("x", (1, 3), (1, 3), (1,)),
        lambda: ShapeProfile("x", (2,), (1,), (3,)),
        lambda: ShapeProfile("x", (0,), (1,), (3,)),
        lambda: BuildOptions(optimization_level=6),
        lambda: BuildOptions(workspace_mib=0),
        lambda: BuildOptions(profiles=(ShapeProfile("x", (1,), (1,), (1,)), ShapeProfile("x", (1,), (1,), (2,)))),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], object]):
    with pytest.raises(InputError, match=r"^(the shape profile|the optimization level|the builder's|an input has two)"):
        make()


# A process of its own


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made in the test, to see whether they are left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_crash_of_the_builder_costs_its_module_and_no_other(tmp_path, relu, rtx, temporary):
    """ONNX's Attention with heads of 64 ends TensorRT-RTX 1.7's builder with a segmentation fault."""
    shape = (1, 4, 64, 64)
    path = tmp_path / "attention.onnx"
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "q", "q"], ["y"])],
        "g",
        [helper.make_tensor_value_info("q", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    crashing = BuildRequest(
        path, "attention", (TensorSpec("q", "float32", shape),), (TensorSpec("y", "float32", shape),), ("sm_86",)
    )
    first, crashed, last = build_engines_isolated([relu, crashing, relu], flavour=rtx)
    assert isinstance(crashed, BackendError)
    assert str(crashed).startswith("module 'attention' (attention.onnx): TensorRT-RTX crashed while building it (SIG")
    assert first == last == build(relu, rtx)
    assert list(temporary.iterdir()) == []


def test_errors_come_back_as_what_they_are(relu, rtx, temporary):
    requests = [
        dataclasses.replace(relu, targets=("sm_61",)),
        relu,
        dataclasses.replace(relu, outputs=()),
    ]
    unknown, built, announced = build_engines_isolated(requests, flavour=rtx)
    assert type(unknown) is BackendError
    assert str(unknown).startswith("TensorRT-RTX 1.7")
    assert isinstance(built, bytes)
    assert type(announced) is BackendError
    with pytest.raises(BackendError, match=r"^module 'm' \(relu.onnx\): the graph's outputs are 'y', but none were"):
        build_engine_isolated(requests[2], flavour=rtx)
    assert list(temporary.iterdir()) == []


def test_options_and_profiles_reach_the_other_process(dynamic):
    request = dataclasses.replace(
        dynamic,
        options=BuildOptions(
            optimization_level=1,
            workspace_mib=8,
            tf32=True,
            profiles=(ShapeProfile("x", (1, 3), (2, 3), (8, 3)),),
        ),
    )
    assert build_engine_isolated(request, flavour=software_flavour()) == build(request, software_flavour())


def test_what_the_other_process_logs_is_logged_here(relu, caplog):
    with caplog.at_level(logging.INFO):
        build_engine_isolated(relu, flavour=software_flavour())
    assert any(record.message.startswith("built module 'm' with TensorRT-RTX") for record in caplog.records)


def test_what_a_library_says_for_every_module_is_logged_once(relu, caplog, monkeypatch):
    answered = tensorrt_builder._answer

    def repeating(folder, index, said):
        path = folder / f"{index}.json"
        answer = json.loads(path.read_text())
        answer["log"] = [[logging.WARNING, "TensorRT-RTX: scales are converted"]] * 3 + answer["log"]
        path.write_text(json.dumps(answer))
        return answered(folder, index, said)

    monkeypatch.setattr(tensorrt_builder, "_answer", repeating)
    with caplog.at_level(logging.INFO):
        build_engines_isolated([relu, dataclasses.replace(relu, name="n")], flavour=software_flavour())
    said = [record.message for record in caplog.records]
    assert said.count("TensorRT-RTX: scales are converted") == 1
    # Not the same line: another module's.
    assert sum(line.startswith("built module") for line in said) == 2


def test_a_process_that_cannot_begin_says_its_last_words(relu, temporary):
    """The library is gone by the time the other process imports it."""
    flavour = dataclasses.replace(software_flavour(), module=SimpleNamespace(__name__="no_such_library"))
    with pytest.raises(
        BackendError,
        match=r"^module 'm' \(relu.onnx\): TensorRT-RTX crashed while building it \(exit status 1; last words: "
        r"ModuleNotFoundError: No module named 'no_such_library'\)",
    ):
        build_engine_isolated(relu, flavour=flavour)
    assert list(temporary.iterdir()) == []


def test_a_crash_after_the_work_is_a_warning(relu, monkeypatch, caplog):
    run = tensorrt_builder._run
    monkeypatch.setattr(tensorrt_builder, "_run", lambda folder: run(folder) or -signal.SIGABRT)
    assert build_engine_isolated(relu, flavour=software_flavour()) == build(relu, software_flavour())
    assert "the process that built engines ended with SIGABRT after its work" in caplog.text


def test_a_process_killed_for_want_of_memory_says_so(relu, monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "_run", lambda folder: (folder / "output.txt").touch() or -signal.SIGKILL)
    with pytest.raises(BackendError, match=r"\(SIGKILL, perhaps sent by the system for want of memory; last words: it"):
        build_engine_isolated(relu, flavour=software_flavour())


def test_python_that_does_not_know_itself_says_so(relu, monkeypatch):
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(BackendError, match=r"^engines are built by a second Python process, and this one does not kno"):
        build_engine_isolated(relu, flavour=software_flavour())


def test_ctrl_c_ends_the_other_process_and_leaves_nothing(relu, monkeypatch, temporary):
    processes = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        """Its first wait is where Ctrl-C arrives."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            processes.append(self)
            self.interrupted = False

        def wait(self, timeout: float | None = None) -> int:
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine_isolated(relu, flavour=software_flavour())
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert list(temporary.iterdir()) == []


def test_ctrl_c_in_this_process_ends_the_build_at_its_next_step(tiny_bundle, rtx, caplog):
    """The signal arrives while the library calls back, which is nearly always."""
    lines = []

    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if len(lines) == 3:
                signal.raise_signal(signal.SIGINT)

    handler = Interrupting()
    logger = logging.getLogger(tensorrt_flavour.__name__)
    logger.addHandler(handler)
    before = signal.getsignal(signal.SIGINT)
    try:
        with caplog.at_level(logging.DEBUG), pytest.raises(KeyboardInterrupt):
            build(request_of(tiny_bundle, "generator"), rtx)
    finally:
        logger.removeHandler(handler)
    assert any("Build canceled by user" in line for line in lines)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_gpu_that_is_missing_is_a_device_error_from_the_other_process_too(relu, monkeypatch):
    def missing(ordinal: int) -> None:
        raise DeviceError("no NVIDIA driver was found; install it")

    answers = iter([None])

    def run(folder: Path) -> int:
        next(answers)
        monkeypatch.setattr(tensorrt_flavour, "Context", missing)
        tensorrt_builder.main(folder)
        return 0

    # The other process' work, done here: whether it has a GPU must not depend on where the test runs.
    monkeypatch.setattr(tensorrt_builder, "_run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(DeviceError, match=r"^TensorRT-RTX cannot build for the GPU that is here: no NVIDIA driver was"):
        build_engine_isolated(dataclasses.replace(relu, targets=("current",)), flavour=software_flavour())
