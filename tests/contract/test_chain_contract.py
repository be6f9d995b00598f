"""Exits that run several modules, on every device: they share a first part, which is loaded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.manifest import ExitRecord, ModuleRecord
from warpcache.engine.bundle.roles import Role
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.device.chain import Chain
from warpcache.engine.device.module import Module, ModuleFile, Site
from warpcache.engine.device.stream import CpuStream, Event, InlineStream
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError
from warpcache.engine.onnxruntime.backend import OnnxRuntimeBackend
from warpcache.engine.spec import TensorSpec

SHAPE = (1, 3, 16, 16)
MIDDLE = TensorSpec("middle", "float32", SHAPE)


def graph(nodes: list, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> bytes:
    made = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in inputs],
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in outputs],
    )
    return bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )


@pytest.fixture(scope="session")
def chained(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle and two exits more: middle = y_s * y_s, ``sum`` = middle + x, ``difference`` = middle - x."""
    tiny = Bundle.open(tiny_bundle)
    manifest = tiny.manifest
    x, image = manifest.inputs[0].spec, manifest.outputs[0]
    last = next(spec for spec in manifest.cache if spec.name == "cache.y_s")
    files: dict[str, Path | bytes] = {name: tiny.file(name) for name in manifest.files}
    modules = dict(manifest.modules)
    for name, operator, inputs, outputs, role in (
        ("square", "Mul", (last,), (MIDDLE,), Role.PART),
        ("add", "Add", (MIDDLE, x), (image,), Role.WARP),
        ("subtract", "Sub", (MIDDLE, x), (image,), Role.WARP),
    ):
        names = [spec.name for spec in inputs] * (2 // len(inputs))
        files[f"{name}.onnx"] = graph([helper.make_node(operator, names, [outputs[0].name])], inputs, outputs)
        modules[name] = ModuleRecord(f"{name}.onnx", inputs, outputs, role)
    exits = (
        *manifest.exits,
        ExitRecord("sum", ("square", "add"), 0.2),
        ExitRecord("difference", ("square", "subtract"), 0.2),
    )
    path = tmp_path_factory.mktemp("chained") / "chained.warp"
    return write_bundle(path, replace(manifest, modules=modules, exits=exits), files).path


@pytest.mark.parametrize(("exit_", "sign"), [("sum", 1), ("difference", -1)])
def test_an_exit_runs_its_modules_in_order(rig: Any, chained: Path, exit_: str, sign: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (4, *SHAPE[1:])).astype(np.float32)
    session = onnxruntime.InferenceSession(chained / "generator.onnx", providers=["CPUExecutionProvider"])
    with rig.engine(chained, age=1, exit=exit_) as engine:
        frames = list(engine.session().render({"x": x}))
    for t, frame in enumerate(frames[1:], 1):
        (before,) = session.run(None, {"x": x[t - 1 : t]})
        # Two roundings of values below 2; on hardware the generator's own convolutions round differently too.
        atol = 1e-5 if rig.name.startswith("cuda") else 2.0**-22
        np.testing.assert_allclose(rig.get(frame.outputs["image"]), before * before + sign * x[t], atol=atol)


class Counting(OnnxRuntimeBackend):
    """Notes what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, module: ModuleFile, site: Site) -> Module:
        self.loaded.append(module.name)
        return super().load(module, site)


def test_a_shared_part_is_loaded_once(chained: Path) -> None:
    backend = Counting()
    x = np.zeros((2, *SHAPE[1:]), np.float32)
    with Engine(chained, age=1, exit="sum", backend=backend) as engine:
        list(engine.session().render({"x": x}))
        placement: Any = engine._placement
        placement._exit("difference")
    assert backend.loaded.count("square") == 1
    assert {"add", "subtract"} < set(backend.loaded)


class Part:
    """A module in Python."""

    capturable = False

    def __init__(self, name: str, takes: str, gives: str, error: BaseException | None = None) -> None:
        self.name, self.error = name, error
        self.inputs, self.outputs = (replace(MIDDLE, name=takes),), (replace(MIDDLE, name=gives),)
        self.ran = 0

    def enqueue(self, bindings: Any, stream: Any) -> Event:
        def work() -> None:
            self.ran += 1
            if self.error is not None:
                raise self.error
            bindings[self.outputs[0].name][:] = bindings[self.inputs[0].name] + 1

        return stream.submit(work)  # type: ignore[no-any-return]

    def launch(self, bindings: Any, stream: Any) -> None:
        self.enqueue(bindings, stream)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("make", [InlineStream, lambda: CpuStream("chain")])
def test_the_first_failure_is_the_chains(make: Any) -> None:
    stream = make()
    first, second = Part("first", "a", "b", BackendError("no")), Part("second", "b", "c")
    chain = Chain("both", [first, second], lambda spec: np.zeros(spec.shape, spec.dtype))
    assert [spec.name for spec in (*chain.inputs, *chain.outputs)] == ["a", "c"]
    bindings = {name: np.zeros(SHAPE, np.float32) for name in ("a", "c")}
    with pytest.raises(BackendError, match="no"):
        chain.enqueue(bindings, stream).wait()
    first.error = None
    chain.enqueue(bindings, stream).wait()
    np.testing.assert_array_equal(bindings["c"], np.full(SHAPE, 2, np.float32))
    stream.close()
