"""ONNX's models of several nodes, and every place where the splitter may cut a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import ort_runs
from onnx import ModelProto, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx_cases import all_node_cases, array_of, lowered

from warpcache.engine.errors import ExportError
from warpcache.export.cut.candidate import CutCandidate
from warpcache.export.cut.enumerate import _Finder
from warpcache.export.cut.split import check_exact, split
from warpcache.export.graph.index import node_names
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.graph.surgery import normalise

# The newest that ONNX Runtime takes, and the oldest that it has all kernels for.
_NEWEST, _OLDEST = 26, 7
# As many cached tensors as the product looks for by default.
_MOST_TENSORS = 4


@dataclass(frozen=True)
class SeveralNodes:
    """A model of several nodes with one set of inputs.

    Attributes:
        name: Where it comes from.
        model: The model.
        inputs: Input name -> array; None where one is no tensor.
        outputs: Output name -> expected array; None where one is no tensor.
        rtol: Relative tolerance of the expected arrays.
        atol: Absolute one.
    """

    name: str
    model: ModelProto
    inputs: dict[str, np.ndarray] | None
    outputs: dict[str, np.ndarray] | None
    rtol: float
    atol: float


@dataclass
class Ledger:
    """What became of all models.

    Attributes:
        cuts: Model -> number of legal cuts.
        wrong: Cuts that are not exact: model, tensors, outputs.
        refused: Reason -> number of cuts that the product's rules refuse.
        uncut: Reason -> models that cannot be cut at all.
        unexpected: Models whose whole, in normal form, does not give what ONNX expects.
    """

    cuts: dict[str, int] = field(default_factory=dict)
    wrong: list[tuple[str, tuple[str, ...], list[str]]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    uncut: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def cut_share(k: int, shares: int) -> Ledger:
    """Cut every model whose number is `k` modulo `shares` at every legal place."""
    found = Ledger()
    for case in itertools.islice(models(), k, None, shares):
        reason = _cut_everywhere(case, found)
        if reason is not None:
            found.uncut.setdefault(reason, []).append(case.name)
    return found


def merged(parts: Iterable[Ledger]) -> Ledger:
    """One ledger of several."""
    found = Ledger()
    for part in parts:
        found.cuts |= part.cuts
        found.wrong += part.wrong
        found.refused.update(part.refused)
        for reason, names in part.uncut.items():
            found.uncut.setdefault(reason, []).extend(names)
        found.unexpected += part.unexpected
    return found


def models() -> Iterator[SeveralNodes]:
    """Function bodies of ONNX's operators, its simple models, and what an old PyTorch exported."""
    for case in all_node_cases():
        if len(case.model.graph.node) > 1:
            graph = case.model.graph
            (data,) = case.data_sets
            inputs = [array_of(a) for a in data[0]] if _tensors(graph.input) else None
            outputs = [array_of(a) for a in data[1]] if _tensors(graph.output) else None
            yield _several(case.name, lowered(case.model, _NEWEST), inputs, outputs, case.rtol, case.atol)
    for kind in ("simple", "pytorch-operator", "pytorch-converted"):
        for case in sorted(load_model_tests(kind=kind), key=lambda case: case.name):
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            if len(model.graph.node) < 2:
                continue
            inputs = _stored(folder, "input") if _tensors(model.graph.input) else None
            outputs = _stored(folder, "output") if _tensors(model.graph.output) else None
            versions = [entry.version for entry in model.opset_import if entry.domain == ""]
            if versions and versions[0] < _OLDEST:
                model = onnx.version_converter.convert_version(model, _OLDEST)
            yield _several(f"{kind}/{case.name}", model, inputs, outputs, case.rtol, case.atol)


def legal_cuts(model: ModelProto) -> tuple[list[CutCandidate], Counter[str]]:
    """Every cut that the product's rules call exact, and how many they refuse, by reason.

    Tried are: every single value that is computed from inputs; all values that are live at any position of the orders
    that the product walks; and every choice of them that it would try, each with what is not needed left out.

    Args:
        model: The model in normal form.
    """
    finder = _Finder(model, dict.fromkeys(node_names(model), 1.0))
    index = finder.index
    # The product caches floating-point tensors only, but can split anywhere.
    floats = finder.cacheable()
    values = [name for i in finder.alive for name in index.nodes[i].output if name in index.specs]
    others = {name for name in values if index.specs[name].dtype[:5] != "float" and name in finder.fusions.survivors}
    able = floats | others
    frontiers = list(finder.frontiers())
    sets = [frozenset({name}) for name in values]
    sets += [frozenset(name for name in live if name in index.specs) for live in frontiers]
    # A consumer that is there already is not tried again for the outputs that it would hand through.
    consumers = {index.closure(index.outputs, stop=names) for names in sets}
    for names in (names for live in frontiers for names in finder.choices(live, floats, _MOST_TENSORS)):
        rest = index.closure(index.outputs, stop=names)
        if rest not in consumers:
            consumers.add(rest)
            sets.append(names)
    found: dict[frozenset[str], CutCandidate] = {}
    refused: dict[frozenset[str], str] = {}
    for names in dict.fromkeys(sets):
        used = finder.used(names, index.closure(index.outputs, stop=names))
        rest = index.closure(index.outputs, stop=used)
        if not used:
            refused[names] = "the consumer needs none of it"
        elif not finder.computes_an_output(rest):
            refused[used] = "nothing is left for the consumer"
        elif not used <= able:
            refused[used] = "inside a kernel"
        elif not finder.stays_exact(used, rest):
            refused[used] = "a half would have other kernels"
        else:
            found[used] = finder.candidate(used)
    return list(found.values()), Counter(refused.values())


def inexact(
    model: ModelProto, cut: CutCandidate, feeds: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> list[str]:
    """Outputs that producer and consumer do not give as the whole does, bit for bit.

    ONNX Runtime's default settings, as the product uses them, but one thread: starting threads takes longer than
    running such a model.
    """
    parts = split(model, cut.names, anchors=cut.anchors)
    cache = run_session(open_session(parts.producer, threads=1), feeds)
    got = run_session(open_session(parts.plain, threads=1), {**feeds, **cache})
    assert list(got) == list(want)
    return [name for name in want if _bits(got[name]) != _bits(want[name])]


def _cut_everywhere(case: SeveralNodes, found: Ledger) -> str | None:
    if case.inputs is None or case.outputs is None:
        return "takes or gives sequences"
    if any(entry.domain == "ai.onnx.preview.training" for entry in case.model.opset_import):
        return "trains"
    try:
        model = normalise(case.model)
        whole = open_session(model, threads=1)
    except ExportError as exc:
        if "NOT_IMPLEMENTED" in str(exc):
            return "ONNX Runtime has no kernel"
        if "Input to 'Range' op should be scalars" in str(exc):
            return "ONNX Runtime refuses a vector as a limit of Range, which ONNX's own function body has"
        raise
    if any(array.dtype.name == "bfloat16" for array in case.inputs.values()):
        return "ONNX Runtime's Python API takes no bfloat16"
    want = run_session(whole, case.inputs)
    if any(
        ort_runs.difference(want[name], array, rtol=case.rtol, atol=case.atol) for name, array in case.outputs.items()
    ):
        found.unexpected.append(case.name)
    cuts, refused = legal_cuts(model)
    found.refused.update(refused)
    if not cuts:
        return "no place is legal: the executor makes one kernel of it, or has nothing left for a consumer"
    found.cuts[case.name] = len(cuts)
    for cut in cuts:
        wrong = inexact(model, cut, case.inputs, want)
        if wrong:
            found.wrong.append((case.name, cut.names, wrong))
    # The product's own check agrees; one cut a model, as it runs the whole anew.
    middle = cuts[len(cuts) // 2]
    check_exact(model, split(model, middle.names, anchors=middle.anchors), case.inputs)
    return None


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def _several(
    name: str,
    model: ModelProto,
    inputs: list[np.ndarray] | None,
    outputs: list[np.ndarray] | None,
    rtol: float,
    atol: float,
) -> SeveralNodes:
    fixed = {tensor.name for tensor in model.graph.initializer}
    takes = [value.name for value in model.graph.input if value.name not in fixed]
    gives = [value.name for value in model.graph.output]
    return SeveralNodes(
        name,
        model,
        None if inputs is None else dict(zip(takes, inputs, strict=True)),
        None if outputs is None else dict(zip(gives, outputs, strict=True)),
        rtol,
        atol,
    )


def _tensors(values: object) -> bool:
    return all(value.type.HasField("tensor_type") for value in values)


def _stored(folder: Path, kind: str) -> list[np.ndarray]:
    files = sorted(folder.glob(f"test_data_set_0/{kind}_*.pb"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())) for file in files]
