"""Node cases through our own ONNX Runtime module, compared with what ONNX expects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx_cases import NodeCase

from warpcache.engine.device.stream import InlineStream
from warpcache.engine.errors import BackendError
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.spec import TensorSpec
from warpcache.export.graph.index import tensor_spec
from warpcache.export.graph.run import run_model

# Relative error of one rounding.
_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}
# Roundings that a result may have seen, of the size of its largest element: ONNX's absolute tolerance of 1e-7 forgets
# sums that cancel. Measured: at most 11 in float32 (DFT), 2 in float16.
_ROUNDINGS = 16


def run(case: NodeCase, path: Path, before: Mapping[str, str | None]) -> str | None:
    """Run a case.

    Args:
        case: The case; its model is the file `path`.
        path: The model as a file.
        before: What this gave for the cases before; a derived case is compared through the one it comes from.

    Returns:
        None where it gives what is expected, else what went wrong.
    """
    expected = case.outputs
    if expected is None:
        assert case.derived_from is not None
        assert case.reference_model is not None
        if before[case.derived_from] is not None:
            return "not compared: its float32 case fails"
        feeds = {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in case.inputs.items()}
        expected = run_model(case.reference_model, feeds, threads=1)
    inputs = tuple(TensorSpec(name, array.dtype.name, array.shape) for name, array in case.inputs.items())
    outputs = tuple(spec for value in case.model.graph.output if (spec := tensor_spec(value)) is not None)
    try:
        module = OnnxRuntimeModule(path, name="case", inputs=inputs, outputs=outputs, threads=1, spinning=False)
    except BackendError as exc:
        return str(exc)
    # Filled with what no case gives: a value that was not written cannot pass for a result.
    got = {spec.name: np.full(spec.shape, 113, spec.dtype) for spec in outputs}
    try:
        module.enqueue({**case.inputs, **got}, InlineStream()).wait()
    except BackendError as exc:
        return str(exc)
    finally:
        module.close()
    for name, want in expected.items():
        if case.derived_from is not None:
            with np.errstate(over="ignore"):
                want = want.astype(got[name].dtype)
        problem = difference(got[name], want, rtol=case.rtol, atol=case.atol)
        if problem:
            return problem
    return None


def difference(got: np.ndarray, want: np.ndarray, *, rtol: float, atol: float) -> str | None:
    """What tells `got` from the expected array: None for nothing."""
    if got.shape != want.shape:
        return "gives another shape"
    if got.dtype != want.dtype:
        return "gives another type"
    if got.dtype.name not in _UNIT_ROUNDOFF:
        return None if np.array_equal(got, want) else "gives other values"
    exact = want.astype(np.float64)
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    atol = max(atol, _ROUNDINGS * _UNIT_ROUNDOFF[got.dtype.name] * largest)
    close = np.allclose(got.astype(np.float64), exact, rtol=rtol, atol=atol, equal_nan=True)
    return None if close else "gives other values"
