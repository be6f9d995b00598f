"""What a model costs: milliseconds per node, and of whole models measured side by side.

Costs are only compared within one call: the models take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from ...engine.errors import InputError
from ...engine.spec import Array
from .fusion import PROFILE_LEVEL, fused_group
from .index import GraphIndex, node_names
from .run import open_session, run_session
from .surgery import copy_model

__all__ = ["Timing", "profile_nodes", "time_model"]

_HEAVY = frozenset(
    {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "InstanceNormalization", "GridSample"}
)
_KERNEL_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one model's runs, one sample a round.

    Attributes:
        samples_ms: Milliseconds of every measured run, in order.
    """

    samples_ms: tuple[float, ...]

    @property
    def min_ms(self) -> float:
        """Fastest run: what the model costs when nothing disturbs it."""
        return min(self.samples_ms)


def profile_nodes(
    model: ModelProto, feeds: Mapping[str, Array], *, threads: int = 1, repeats: int = 5
) -> dict[str, float]:
    """Measure every node.

    Each node's time is its fastest of `repeats` runs (after one that warms up). What ONNX Runtime fuses or inserts is
    put down to the heaviest node that it stands for: the group between the fused node's inputs and outputs.

    Args:
        model: The model; nodes of equal name are told apart as `node_names` does.
        feeds: Input name -> array.
        threads: Threads of one operator.
        repeats: Measured runs.

    Returns:
        Node name -> milliseconds, for every node; 0 for those that ONNX Runtime folds away.

    Raises:
        InputError: If `feeds` lacks an input or `repeats` is below 1.
        ExportError: If ONNX Runtime refuses the model.
    """
    _check_repeats(repeats)
    named = copy_model(model)
    for node, name in zip(named.graph.node, node_names(model), strict=True):
        node.name = name
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = open_session(
            named,
            threads=threads,
            level=PROFILE_LEVEL,
            profile_prefix=str(Path(folder) / "p"),
            optimized_path=optimized,
        )
        for _ in range(repeats + 1):
            run_session(session, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        del session
        fused = onnx.load(optimized, load_external_data=False)
    runs: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX):
            runs.setdefault(event["name"].removesuffix(_KERNEL_SUFFIX), []).append(event["dur"] / 1000.0)
    index = GraphIndex(named)
    owner = _owners(index, GraphIndex(fused))
    costs = dict.fromkeys(index.names, 0.0)
    for name, times in runs.items():
        # A node inside a subgraph may run several times a run; its owner is the node that holds the subgraph.
        if name in owner:
            costs[owner[name]] += min(times[1:] or times)
    return costs


def time_model(
    models: Mapping[str, ModelProto | bytes],
    feeds: Mapping[str, Array],
    *,
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Measure whole models in turns, each round in another order, at ONNX Runtime's default optimisation.

    Args:
        models: Name -> model.
        feeds: Arrays for the inputs of all of them, by name.
        threads: Threads of one operator; with one, the time is that of the thread, else of the clock.
        repeats: Measured runs of each model.
        warmup: Runs of each model that are not counted.

    Returns:
        Name -> timing. Only ratios within one result mean something on a shared machine.

    Raises:
        InputError: If `feeds` lacks an input or `repeats` is below 1.
        ExportError: If ONNX Runtime refuses a model.
    """
    _check_repeats(repeats)
    sessions = {name: open_session(model, threads=threads) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}

    # On one thread ONNX Runtime works on the caller's: its own time leaves out what other processes took from it, which
    # would hit a long model in every run and a short one in few.
    clock = time.thread_time if threads == 1 else time.perf_counter

    def run(name: str) -> float:
        begin = clock()
        run_session(sessions[name], feeds)
        return (clock() - begin) * 1000.0

    names = list(sessions)
    for name in names:
        for _ in range(warmup):
            run(name)
    for turn in range(repeats):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            samples[name].append(run(name))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; at least 1 run must be measured")


def _owners(index: GraphIndex, fused: GraphIndex) -> dict[str, str]:
    """For every node of the optimised graph: the node of the original that its time belongs to."""
    owner: dict[str, str] = {}
    own_names = set(index.names)
    # From the last node back: an inserted node (a transpose, say) makes no value of the original graph and goes to
    # whoever reads it.
    for position in reversed(range(len(fused.nodes))):
        node, name = fused.nodes[position], fused.nodes[position].name
        made = [index.producer[value] for value in node.output if value in index.producer]
        if name in own_names and (not made or name in {index.names[i] for i in made}):
            owner[name] = name
        elif made:
            group = fused_group(index, fused, position)
            heavy = [i for i in sorted(group) if index.nodes[i].op_type in _HEAVY]
            owner[name] = index.names[heavy[0] if heavy else max(made)]
        else:
            readers = [r for value in node.output for r in fused.consumers.get(value, ())]
            heirs = [owner[fused.nodes[r].name] for r in readers if fused.nodes[r].name in owner]
            if heirs:
                owner[name] = heirs[0]
    return owner
