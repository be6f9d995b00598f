"""State: what a generator hands from one frame to the next, checked, and unrolled over a stream.

The compiler works on frames that know their own state: `unroll` runs the generator over a stream once, in order, and
gives the state that every frame starts with as one more array with time as its leading axis. From there on a state is
an input like any other, with the very bits that the loop would have, and every stage may take frames in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnxruntime import InferenceSession

from ...engine.bundle.manifest import StateRecord
from ...engine.errors import InputError
from ...engine.spec import Array, TensorSpec
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session
from ..graph.surgery import rename_values
from .clip import Clip
from .streams import frame_at

__all__ = ["STATE_FILE", "State", "apart", "carried", "first_values", "state_of", "unroll", "unrolled"]

STATE_FILE = "state.npz"
"""The file of a bundle that holds first values other than zeros."""

_INNER = ".carried"


@dataclass(frozen=True)
class State:
    """One tensor that a generator carries.

    Attributes:
        output: What frame t writes.
        input: What frame t + 1 reads.
        initial: What the first frame reads.
    """

    output: str
    input: TensorSpec
    initial: Array

    @property
    def record(self) -> StateRecord:
        """What the manifest says of it; a first value of zeros needs no file."""
        return StateRecord(self.input, self.output, STATE_FILE if self.initial.any() else None)


def apart(wanted: Mapping[str, str], arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """A stream's arrays without the first values of state, and these.

    Raises:
        InputError: If an input is fed by two outputs, or a first value has more than one frame.
    """
    inputs = list(wanted.values())
    for name in inputs:
        if inputs.count(name) > 1:
            raise InputError(f"state input {name!r} is named twice; a state has one output that is its next value")
        if name in arrays and len(arrays[name]) != 1:
            raise InputError(
                f"the inputs hold {len(arrays[name])} frames of state {name!r}; give its first value alone, with a "
                "leading axis of 1, or leave it out for zeros"
            )
    frames = {name: array for name, array in arrays.items() if name not in inputs}
    return frames, {name: arrays[name] for name in inputs if name in arrays}


def state_of(model: ModelProto, wanted: Mapping[str, str], first: Mapping[str, Array]) -> tuple[State, ...]:
    """The state that a user declares of a generator, checked against its graph.

    Args:
        model: The generator, in normal form.
        wanted: Output -> input.
        first: First values by input; zeros where there is none.

    Raises:
        InputError: If the generator has no such output or input, the two differ in dtype or shape or have none that is
            fixed, a first value fits neither, no input is left for frames, or no output or picture for answers.
    """
    index = GraphIndex(model)
    found = []
    for output, name in wanted.items():
        for what, known, named in (("output", index.outputs, output), ("input", index.inputs, name)):
            if named not in known:
                raise InputError(f"the generator has no {what} {named!r} to carry as state; it has {', '.join(known)}")
        unknown = [end for end in (name, output) if end not in index.specs]
        if unknown:
            raise InputError(
                f"state {unknown[0]!r} has no fixed shape in the generator; add its first value to the inputs, an "
                f"array {name!r} with a leading axis of 1"
            )
        given, spec = index.specs[output], index.specs[name]
        if (given.dtype, given.shape) != (spec.dtype, spec.shape):
            raise InputError(
                f"state output {output!r} is {given.dtype} {list(given.shape)}, but input {name!r} is {spec.dtype} "
                f"{list(spec.shape)}; they must be alike"
            )
        initial = first.get(name, np.zeros(spec.shape, spec.dtype))
        if (str(initial.dtype), initial.shape) != (spec.dtype, spec.shape):
            raise InputError(
                f"the first value of state {name!r} is {initial.dtype} {list(initial.shape)}, but the generator reads "
                f"{spec.dtype} {list(spec.shape)}; make them alike"
            )
        found.append(State(output, spec, np.ascontiguousarray(initial)))
    if found and not set(index.outputs) - set(wanted):
        raise InputError(f"every output of the generator ({', '.join(index.outputs)}) is state; none is left to show")
    if found and not set(index.inputs) - set(wanted.values()):
        raise InputError(f"every input of the generator ({', '.join(index.inputs)}) is state; none is left for frames")
    pictures = [name for name in index.outputs if name in index.specs and is_picture(index.specs[name])]
    if pictures and not set(pictures) - set(wanted):
        raise InputError(
            f"output {pictures[0]!r} is a picture, but it is state only, which no session gives out; let the generator "
            "return it a second time, under another name"
        )
    return tuple(found)


def carried(model: ModelProto, state: tuple[State, ...]) -> ModelProto:
    """The same generator with an Identity at either end of every state.

    So a cut may keep the state as it was read, or what it becomes, under names of their own: a value cannot be an
    input or output of the graph and a cache tensor too.
    """
    inner = {name: name + _INNER for one in state for name in (one.input.name, one.output)}
    outer = {value: name for name, value in inner.items()}
    model = rename_values(model, inner)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.name in outer:
            graph.value_info.add().CopyFrom(value)
            value.name = outer[value.name]
    nodes = [_identity(one.input.name, inner[one.input.name]) for one in state]
    nodes += [*graph.node, *(_identity(inner[one.output], one.output) for one in state)]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return model


def unroll(model: ModelProto, state: tuple[State, ...], clip: Clip) -> Clip:
    """The clip with the state that every frame starts with as arrays [T, ...], the first value first."""
    return replace(clip, arrays=unrolled(open_session(model), state, clip.arrays)) if state else clip


def unrolled(session: InferenceSession, state: tuple[State, ...], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A stream's arrays with the state that every frame starts with where `session` carries it over them in order.

    Args:
        session: What makes the next state: the whole, or a producer.
        state: What it carries.
        arrays: The stream, name -> [T, ...]; what it holds of state is replaced.
    """
    current = {one.input.name: one.initial for one in state}
    frames = max(len(array) for name, array in arrays.items() if name not in current)
    kept = {name: np.empty((frames, *array.shape[1:]), array.dtype) for name, array in current.items()}
    for t in range(frames):
        for name, array in current.items():
            kept[name][t] = array[0]
        if t + 1 < frames:
            made = run_session(session, {**frame_at(arrays, t), **current}, [one.output for one in state])
            current = {one.input.name: made[one.output] for one in state}
    return {**arrays, **kept}


def first_values(state: tuple[State, ...]) -> bytes | None:
    """The content of `STATE_FILE`; None where every first value is zeros."""
    arrays = {one.input.name: one.initial for one in state if one.initial.any()}
    if not arrays:
        return None
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def is_picture(spec: TensorSpec) -> bool:
    """Whether an output can be shown: one image of 1 or 3 channels, [1, C, H, W]."""
    shape = spec.shape
    return spec.dtype == "float32" and len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) > 1


def _identity(source: str, target: str) -> NodeProto:
    return helper.make_node("Identity", [source], [target], name=f"node_{target}")
