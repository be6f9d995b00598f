"""Weights stored once for several models, against safetensors and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper
from safetensors.numpy import load_file

from warpcache.export.bundle.weights import shared_weights
from warpcache.export.cut.enumerate import enumerate_cuts
from warpcache.export.cut.split import split
from warpcache.export.graph.run import open_session, run_model, run_session

Trace = Callable[[str], Any]
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def _parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def test_weights_are_stored_once_and_results_stay_the_same(trace: Trace, tmp_path: Path) -> None:
    unet = trace("unet")
    cut = next(c for c in enumerate_cuts(unet.model, unet.costs, max_cost_ratio=0.7) if c.recomputed_ms)
    parts = split(unet.model, cut.names, anchors=cut.anchors)
    models = {"generator": unet.model, "producer": parts.producer, "plain": parts.plain}
    files = shared_weights(models, tmp_path)
    for name, data in files.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
    weights = load_file(tmp_path / "weights.safetensors")
    large = {
        numpy_helper.to_array(tensor).tobytes()
        for model in models.values()
        for tensor in model.graph.initializer
        if len(numpy_helper.to_array(tensor).tobytes()) >= 1024
    }
    assert {array.tobytes() for array in weights.values()} == large
    assert len(weights) == len(large)
    # The shared part is in both halves and in the whole, so three times would be the price of not sharing.
    total = sum(len(data) for data in large)
    assert total <= (tmp_path / "weights.safetensors").stat().st_size <= total + 4096
    assert all(len(data) < len(models[name].SerializeToString()) for name, data in files.items())
    feeds = unet.frame(1)
    for name, model in models.items():
        want = run_session(open_session(model), feeds) if name != "plain" else None
        if want is None:
            feeds = {**feeds, **run_model(parts.producer, feeds)}
            want = run_model(model, feeds)
        from_file = ort.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        from_bytes = open_session(files[name], folder=tmp_path)
        for session in (from_file, from_bytes):
            got = run_session(session, feeds)
            for output, array in want.items():
                assert got[output].tobytes() == array.tobytes()


def test_shared_weights_by_content_not_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    same, other = rng.standard_normal((2, 20, 20)).astype(np.float32)

    def model(name: str, weight: np.ndarray) -> onnx.ModelProto:
        result = _parse(
            f"g (float[1,20] x) => (float[1,20] y) <float[20,20] {name} = {{0}}> {{ y = MatMul(x, {name}) }}"
        )
        result.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, name))
        return result

    models = {"a": model("w", same), "b": model("v", same), "c": model("w", other)}
    files = shared_weights(models, tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    assert set(weights) == {"w", "w.2"}
    np.testing.assert_array_equal(weights["w"], same)
    np.testing.assert_array_equal(weights["w.2"], other)
    x = {"x": rng.standard_normal((1, 20)).astype(np.float32)}
    for name, data in files.items():
        got = run_session(open_session(data, folder=tmp_path), x)["y"]
        assert got.tobytes() == run_model(models[name], x)["y"].tobytes()
        for tensor in onnx.load_from_string(data).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "weights.safetensors"
            assert int(place["offset"]) % 64 == 0
