"""The producer of a generator that carries state: it makes the next state beside the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from onnx import ModelProto

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session
from ..graph.surgery import extract, rename_values
from .split import SplitModels

__all__ = ["check_state", "with_state"]


def with_state(
    model: ModelProto, parts: SplitModels, outputs: Sequence[str], feeds: Mapping[str, Array]
) -> SplitModels:
    """The halves with a producer that also gives the next state, checked bit for bit against the whole.

    Args:
        model: The whole, with the state's outputs (`frames.state.carried`).
        parts: Its halves, split without them.
        outputs: The state's outputs; none: `parts` as they are.
        feeds: One frame's inputs, state among them.

    Raises:
        ExportError: If the producer's next state differs from the whole's.
    """
    if not outputs:
        return parts
    names = {origin: cache for cache, origin in parts.origins.items()}
    index = GraphIndex(model)
    made = index.closure([*names, *outputs])
    inputs = [name for name in index.inputs if any(reader in made for reader in index.consumers.get(name, ()))]
    producer = rename_values(extract(model, inputs, [*names, *outputs]), names)
    producer.metadata_props.extend(parts.producer.metadata_props)
    check_state(model, producer, outputs, feeds)
    return dataclasses.replace(parts, producer=producer)


def check_state(model: ModelProto, producer: ModelProto, outputs: Sequence[str], feeds: Mapping[str, Array]) -> None:
    """Check that a producer gives the next state as the whole does, bit for bit; arguments as for `with_state`.

    Raises:
        ExportError: If it differs.
    """
    if not outputs:
        return
    expected = run_session(open_session(model), feeds, outputs)
    given = run_session(open_session(producer), feeds, outputs)
    for name in outputs:
        if expected[name].tobytes() != given[name].tobytes():
            raise ExportError(
                f"the producer's state {name!r} differs from the whole generator's; choose another cut, for this one "
                "lies inside what ONNX Runtime fuses"
            )
