"""State: what a generator hands from one frame to the next, checked, and unrolled over a stream.

The compiler works on frames that know their own state: `unroll` runs the generator over a stream once, in order, and
gives the state that every frame starts with as one more array with time as its leading axis. From there on a state is
an input like any other, with the very bits that the loop would have, and every stage may take frames in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from onnx import ModelProto

from ...engine.bundle.manifest import StateRecord
from ...engine.errors import ExportError, InputError
from ...engine.spec import Array, TensorSpec
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session
from ..graph.surgery import copy_model
from .clip import Clip
from .streams import frame_at

__all__ = ["STATE_FILE", "State", "apart", "carried", "first_values", "state_of", "unroll"]

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
        InputError: If the generator has no such output or input, the two differ in dtype or shape, a first value fits
            neither, or no output is left that is an answer.
    """
    index = GraphIndex(model)
    found = []
    for output, name in wanted.items():
        for what, known, named in (("output", index.outputs, output), ("input", index.inputs, name)):
            if named not in known:
                raise InputError(f"the generator has no {what} {named!r} to carry as state; it has {', '.join(known)}")
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
    return tuple(found)


def carried(model: ModelProto, state: tuple[State, ...]) -> ModelProto:
    """The same generator with an Identity at either end of every state.

    So a cut may keep the state as it was read, or what it becomes, under names of their own: a value cannot be an
    input or output of the graph and a cache tensor too.

    Raises:
        ExportError: If a state output is the state input itself, which then never changes.
    """
    model = copy_model(model)
    graph = model.graph
    infos = {value.name: value for value in (*graph.input, *graph.output)}
    for one in state:
        name, output = one.input.name, one.output
        maker = next((node for node in graph.node if output in node.output), None)
        if maker is None:
            raise ExportError(f"state output {output!r} is made by no node, so the state never changes; leave it out")
        for node in graph.node:
            for names in (node.input, node.output):
                for k, value in enumerate(names):
                    if value in (name, output):
                        names[k] = value + _INNER
        begin = type(maker)(op_type="Identity", name=f"node_{name}{_INNER}", input=[name], output=[name + _INNER])
        end = type(maker)(op_type="Identity", name=f"node_{output}{_INNER}", input=[output + _INNER], output=[output])
        nodes = [begin, *(_copied(node) for node in graph.node), end]
        del graph.node[:]
        graph.node.extend(nodes)
        for value in (name, output):
            info = graph.value_info.add()
            info.CopyFrom(infos[value])
            info.name = value + _INNER
    return model


def unroll(model: ModelProto, state: tuple[State, ...], clip: Clip) -> Clip:
    """The clip with the state that every frame starts with as arrays [T, ...], the first value first."""
    if not state:
        return clip
    session = open_session(model)
    current = {one.input.name: one.initial for one in state}
    kept: dict[str, list[Array]] = {name: [] for name in current}
    outputs = [one.output for one in state]
    for t in range(clip.frames):
        for name, array in current.items():
            kept[name].append(array)
        if t + 1 < clip.frames:
            made = run_session(session, {**frame_at(clip.arrays, t), **current}, outputs)
            current = {one.input.name: made[one.output] for one in state}
    arrays = {**clip.arrays, **{name: np.concatenate(values) for name, values in kept.items()}}
    return Clip(arrays, clip.frames, clip.fps, clip.truth)


def first_values(state: tuple[State, ...]) -> bytes | None:
    """The content of `STATE_FILE`; None where every first value is zeros."""
    arrays = {one.input.name: one.initial for one in state if one.initial.any()}
    if not arrays:
        return None
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _copied(node: object) -> object:
    fresh = type(node)()
    fresh.CopyFrom(node)  # type: ignore[attr-defined]
    return fresh
