"""A bundle whose generator carries state, small enough to be checked by hand, and the loop that it must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.manifest import Cut, ExitRecord, InputRecord, Manifest, StateRecord, module_record
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.spec import Array, TensorSpec

SIZE = 16
X = TensorSpec("x", "float32", (1, 3, SIZE, SIZE))
IMAGE = TensorSpec("image", "float32", (1, 3, SIZE, SIZE))
HIDDEN = TensorSpec("h", "float32", (1, 4, SIZE, SIZE))
COUNT = TensorSpec("n", "float32", (1, 1))
CACHE = TensorSpec("cache.h", "float32", HIDDEN.shape)


def frames_of(frames: int, seed: int = 0) -> Array:
    """Inputs, float32 [T, 3, 16, 16]."""
    return np.random.default_rng(seed).uniform(-1, 1, (frames, *X.shape[1:])).astype(np.float32)


def first_values() -> dict[str, Array]:
    """The first frame's state; the count starts at nothing."""
    return {"h": np.random.default_rng(5).uniform(-1, 1, HIDDEN.shape).astype(np.float32), "n": np.zeros((1, 1), "f4")}


def make_stateful_bundle(folder: Path, name: str = "stateful.warp", *, initial: bytes | None = None) -> Path:
    """h' = tanh(conv(x) + h / 2), n' = n + 1, image = tanh(conv(h') + n'); warp: image = tanh(conv(cache.h)) + x / 10.

    Two state tensors of different sizes: ``h``, whose first value lies in the bundle, and ``n``, which starts at zero.

    Args:
        folder: Where the bundle goes.
        name: Its folder's name.
        initial: The content of ``state.npz``, in place of the right one.
    """
    rng = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.4, (4, 3, 3, 3)).astype(np.float32), "w1"),
        numpy_helper.from_array(rng.normal(0, 0.4, (3, 4, 3, 3)).astype(np.float32), "w2"),
        numpy_helper.from_array(np.float32(0.5), "half"),
        numpy_helper.from_array(np.float32(1.0), "one"),
        numpy_helper.from_array(np.float32(0.1), "tenth"),
    ]
    deep = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["h", "half"], ["faded"]),
        helper.make_node("Add", ["c1", "faded"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_next"]),
        helper.make_node("Add", ["n", "one"], ["n_next"]),
    ]

    def drawn(hidden: str, image: str) -> list:
        return [
            helper.make_node("Conv", [hidden, "w2"], ["c2"], pads=[1, 1, 1, 1]),
            helper.make_node("Tanh", ["c2"], [image]),
        ]

    state, following = (
        (HIDDEN, COUNT),
        (TensorSpec("h_next", "float32", HIDDEN.shape), TensorSpec("n_next", "float32", (1, 1))),
    )
    graphs = {
        "generator": ([*deep, *drawn("h_next", "image")], (X, *state), (IMAGE, *following)),
        "producer": (
            [*deep, helper.make_node("Identity", ["h_next"], ["cache.h"])],
            (X, *state),
            (CACHE, *following),
        ),
        "plain": (drawn("cache.h", "image"), (CACHE,), (IMAGE,)),
        "warp": (
            [
                *drawn("cache.h", "still"),
                helper.make_node("Mul", ["x", "tenth"], ["step"]),
                helper.make_node("Add", ["still", "step"], ["image"]),
            ],
            (CACHE, X),
            (IMAGE,),
        ),
    }
    if initial is None:
        buffer = BytesIO()
        np.savez(buffer, h=first_values()["h"])
        initial = buffer.getvalue()
    manifest = Manifest(
        name="stateful",
        created={"by": "tests"},
        inputs=(InputRecord(X),),
        outputs=(IMAGE,),
        image_output="image",
        fps=None,
        cut=Cut(("h_next",)),
        cache=(CACHE,),
        modules={module: module_record(module, takes, gives) for module, (_, takes, gives) in graphs.items()},
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.1),
        ),
        calibration=None,
        state=(StateRecord(HIDDEN, "h_next", "state.npz"), StateRecord(COUNT, "n_next")),
    )
    files: dict[str, Path | bytes] = {
        f"{module}.onnx": _model(nodes, takes, gives, weights).SerializeToString()
        for module, (nodes, takes, gives) in graphs.items()
    }
    return write_bundle(folder / name, manifest, {**files, "state.npz": initial}).path


class Loop:
    """The generator run frame by frame by ONNX Runtime, without engine and session: what policies must agree with."""

    def __init__(self, bundle: Path) -> None:
        self._manifest = Bundle.open(bundle).manifest
        self._sessions = {
            name: onnxruntime.InferenceSession(bundle / record.file, providers=["CPUExecutionProvider"])
            for name, record in self._manifest.modules.items()
        }

    def states(self, x: Array) -> Iterator[dict[str, Array]]:
        """The state that each frame starts with, and what the generator makes of it: names of inputs and outputs."""
        state = first_values()
        for frame in x:
            given = {"x": frame[None], **state}
            made = self.run("generator", given)
            yield {**given, **made}
            state = {"h": made["h_next"], "n": made["n_next"]}

    def images(self, x: Array) -> list[Array]:
        """The generator's own answers."""
        return [made["image"] for made in self.states(x)]

    def aged(self, x: Array, age: int, exit_: str) -> list[Array]:
        """Answers of an exit where frame t reads the cache of frame max(0, t - age)."""
        caches = [self.run("producer", made)["cache.h"] for made in self.states(x)]
        return [
            self.run(exit_, {"x": frame[None], "cache.h": caches[max(0, t - age)]})["image"]
            for t, frame in enumerate(x)
        ]

    def run(self, module: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One module on one frame."""
        session = self._sessions[module]
        names = [value.name for value in session.get_outputs()]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip(names, session.run(names, taken), strict=True))


def _model(nodes: list, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], weights: list) -> ModelProto:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "stateful",
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in inputs],
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in outputs],
        [weight for weight in weights if weight.name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
