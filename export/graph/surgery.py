"""Small operations on ONNX graphs: index, normal form, extract and merge.

All functions take and give `onnx.ModelProto` and leave their arguments as they are. Value names are the currency: a cut
is a set of them. Subgraphs (If, Loop, Scan) are honoured as readers of the values that they capture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto
from onnx_ir.passes import common as passes

from ...engine.errors import ExportError, InputError
from .index import SCOPES_KEY, GraphIndex, first_line, input_names, node_names, subgraphs, unused_name

__all__ = [
    "copy_model",
    "extract",
    "fix_input_shapes",
    "give_out",
    "merge",
    "normalise",
    "rename_reads",
    "rename_values",
    "without_outputs",
]


def normalise(model: ModelProto) -> ModelProto:
    """Bring a model into the form that cutting relies on; what it computes stays the same.

    Functions are inlined, Constant nodes become initializers, Shape and Size of fixed shapes are folded (shape
    arithmetic must not tie one side of a cut to the other), dead nodes and unused initializers go, every node gets a
    unique name, and an output that is an input, an initializer or given twice gets an Identity of its own. Only the
    torch module paths are kept of the metadata: the rest holds absolute paths and source lines of the machine.

    Args:
        model: Any valid ONNX model below 2 GB.

    Returns:
        A new model with inferred shapes.

    Raises:
        ExportError: If the graph is not valid ONNX.
    """
    try:
        # Inlining first: shape inference and the index do not look into function bodies.
        model = onnx.inliner.inline_local_functions(model) if model.functions else copy_model(model)
        # Before version 4 of the file format an initializer had to be listed as an input as well.
        model.ir_version = max(model.ir_version, 4)
        # There it is a default that a caller may replace: none of ours does, and shape inference would not read it.
        free = set(input_names(model))
        inputs = [value for value in model.graph.input if value.name in free]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        _strip_metadata(model)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        onnx.checker.check_model(model)
        edited = ir.from_proto(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as exc:
        raise ExportError(f"the graph is not valid ONNX: {first_line(exc)}; export it again") from exc
    _fold_shapes(edited.graph)
    _give_outputs_nodes(edited.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(edited)
    _remove_unused(edited)
    model = _proto(edited)
    for made, name in zip(model.graph.node, node_names(model), strict=True):
        made.name = name
    return model


def fix_input_shapes(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> ModelProto:
    """Give named inputs fixed shapes and infer every other shape anew.

    Args:
        model: Model whose inputs may have symbolic dimensions.
        shapes: Input name -> shape.

    Raises:
        InputError: If a name is no input, or a shape contradicts the model's.
    """
    model = copy_model(model)
    by_name = {value.name: value for value in model.graph.input}
    for name, shape in shapes.items():
        if name not in by_name:
            raise InputError(f"the model has no input {name!r}; its inputs are {', '.join(by_name)}")
        dims = by_name[name].type.tensor_type.shape.dim
        if len(dims) != len(shape) or any(
            d.HasField("dim_value") and d.dim_value != n for d, n in zip(dims, shape, strict=False)
        ):
            asked = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]
            raise InputError(f"input {name!r} has shape {tuple(shape)}, but the model expects {tuple(asked)}")
        for dim, extent in zip(dims, shape, strict=True):
            dim.dim_value = extent
    del model.graph.value_info[:]
    for output in model.graph.output:
        # A symbolic output dimension would stop inference from filling in the number.
        for dim in output.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def extract(
    model: ModelProto, inputs: Sequence[str], outputs: Sequence[str], *, renames: Mapping[str, str] | None = None
) -> ModelProto:
    """Cut out the part that computes `outputs` from `inputs`.

    Args:
        model: The model to take from.
        inputs: Graph inputs or inner values; all become inputs of the result, in this order, used or not.
        outputs: Values that the part makes, in the order of the result's outputs.
        renames: Input -> its name in the result. Such an input may be an output as well: an Identity hands it on.

    Raises:
        ExportError: If the outputs need a graph input that is not in `inputs`, or a value has no known type.
    """
    renames = renames or {}
    part = _editable(model)
    graph, values = part.graph, ir.convenience.create_value_mapping(part.graph, include_subgraphs=False)
    for name in outputs:
        if name not in renames and (name in inputs or name not in values or values[name].producer() is None):
            raise ExportError(
                f"{name!r} is made by no node between the inputs and outputs asked for; name another value"
            )
    for name in (*inputs, *outputs):
        if name not in values or values[name].type is None:
            raise ExportError(
                f"value {name!r} has no known dtype and shape, so no model can begin or end there; cut elsewhere"
            )
    before = [value for value in graph.inputs if value.name not in inputs]
    given, taken = {}, set(values)
    for name in inputs:
        inner = values[name]
        given[name] = _value_like(inner, renames.get(name, name))
        inner.replace_all_uses_with(given[name], replace_graph_outputs=True)
        # Where another output of its node is computed anew, the node makes this one again, under another name.
        inner.name = unused_name(f"{name}.again", taken)
    for name in (name for name in outputs if name in given):
        values[name] = _value_like(values[name], name)
        graph.append(ir.node("Identity", [given[name]], name=f"node_cached_{name}", outputs=[values[name]]))
    graph.outputs[:] = [values[name] for name in outputs]
    graph.inputs[:] = given.values()
    _remove_unused(part)
    missing = [value.name for value in before if value.uses()]
    if missing:
        raise ExportError(f"the outputs {list(outputs)} also need the inputs {missing}; add them to the inputs")
    part.metadata_props.clear()
    return _proto(part)


def rename_values(model: ModelProto, names: Mapping[str, str]) -> ModelProto:
    """Give values new names everywhere they are made, read, captured or described; others keep theirs."""
    model = copy_model(model)
    _rename(model.graph, names)
    return model


def rename_reads(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let `node` (changed in place) read other values, in its subgraphs too; what it makes keeps its name."""
    for k, name in enumerate(node.input):
        node.input[k] = names.get(name, name)
    for subgraph in subgraphs(node):
        _rename(subgraph, names)


def merge(
    first: ModelProto, second: ModelProto, links: Mapping[str, str], outputs: Sequence[str] | None = None
) -> ModelProto:
    """Run `second` after `first` in one model.

    Args:
        first: Its names all stay as they are.
        second: Its inner names get a suffix where `first` has the same; its outputs keep their names.
        links: Input of `second` -> any value of `first` (inputs and inner values too). An input that is not linked
            is shared with `first`'s input of the same name, or else becomes a further input of the result.
        outputs: Outputs of the result, in order; by default those of `first`, then those of `second`.

    Raises:
        InputError: If a link or output names nothing, or the dtypes or shapes of a link differ.
        ExportError: If both give out the same name, or they use different versions of an operator set.
    """
    one, two = GraphIndex(first), GraphIndex(second)
    values = set(one.inputs) | set(one.producer) | set(one.initializers)
    links = dict(links)
    for target, source in links.items():
        if target not in two.inputs:
            raise InputError(f"the second model has no input {target!r}; its inputs are {', '.join(two.inputs)}")
        if source not in values:
            raise InputError(f"the first model has no value {source!r} to feed {target!r} with")
    links.update({name: name for name in two.inputs if name not in links and name in one.inputs})
    for target, source in links.items():
        have, want = one.specs.get(source), two.specs.get(target)
        if have and want and (have.dtype, have.shape) != (want.dtype, want.shape):
            raise InputError(
                f"{target!r} expects {want.dtype} {want.shape}, but {source!r} is {have.dtype} {have.shape}"
            )
    clash = sorted(set(two.outputs) & values)
    if clash:
        raise ExportError(f"both models make {clash[0]!r}; rename it in one of them first")
    versions = {entry.domain: entry.version for entry in first.opset_import}
    for entry in second.opset_import:
        if versions.setdefault(entry.domain, entry.version) != entry.version:
            raise ExportError(
                f"the models use versions {versions[entry.domain]} and {entry.version} of operator set "
                f"{entry.domain or 'ai.onnx'!r}; export both with the same one"
            )
    merged, tail = _editable(first), _editable(second)
    graph, known = merged.graph, ir.convenience.create_value_mapping(merged.graph)
    fed = ir.convenience.create_value_mapping(tail.graph)
    for target, source in links.items():
        fed.pop(target).replace_all_uses_with(known[source])
    # Unlinked inputs and outputs keep their names: they are what callers bind by.
    kept = {*two.inputs, *two.outputs}
    shadowed = [name for name in two.inputs if name in fed and name in known]
    if shadowed:
        raise ExportError(
            f"input {shadowed[0]!r} of the second model is an inner value of the first; rename it in one of them first"
        )
    inner, taken = {name: value for name, value in fed.items() if name not in kept}, {*known, *kept}
    ir.convenience.rename_values(list(inner.values()), [unused_name(name, taken) for name in inner])
    inputs, ends = [value for value in tail.graph.inputs if value.name in fed], list(tail.graph.outputs)
    nodes, initializers = list(tail.graph), list(tail.graph.initializers.values())
    for part in (tail.graph.inputs, tail.graph.outputs, tail.graph.initializers):
        part.clear()
    tail.graph.remove(nodes)
    used = {node.name or "" for node in graph}
    for node in nodes:
        node.name = unused_name(node.name or "", used)
    graph.extend(nodes)
    graph.inputs.extend(inputs)
    for value in initializers:
        graph.initializers.add(value)
    graph.opset_imports.update(versions)
    merged.ir_version = max(first.ir_version, second.ir_version)
    known.update((value.name or "", value) for value in (*inner.values(), *inputs, *ends))
    wanted = list(outputs) if outputs is not None else [*one.outputs, *two.outputs]
    unknown = [name for name in wanted if name not in known or known[name].type is None]
    if unknown:
        raise InputError(f"the merged model has no value {unknown[0]!r} of known shape to give out")
    graph.outputs[:] = [known[name] for name in wanted]
    _remove_unused(merged)
    return _proto(merged)


def give_out(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """The same model that also gives out the inner values `names`.

    Raises:
        ExportError: If a value has no known dtype and shape.
    """
    model = copy_model(model)
    infos = {value.name: value for value in model.graph.value_info}
    present = {value.name for value in model.graph.output}
    for name in names:
        if name in present:
            continue
        if name not in infos:
            raise ExportError(f"value {name!r} has no known dtype and shape, so it cannot be given out")
        model.graph.output.append(infos[name])
        present.add(name)
    return model


def without_outputs(model: ModelProto, names: AbstractSet[str]) -> ModelProto:
    """The same model without the outputs `names`, and without the nodes that only they need."""
    if not names:
        return model
    left = _editable(model)
    left.graph.outputs[:] = [value for value in left.graph.outputs if value.name not in names]
    _remove_unused(left)
    return _proto(left)


def copy_model(model: ModelProto) -> ModelProto:
    """A copy that can be changed."""
    fresh = ModelProto()
    fresh.CopyFrom(model)
    return fresh


def _editable(model: ModelProto) -> ir.Model:
    """A copy in the form that is edited by values; a copy, because renaming there would reach `model`'s weights."""
    return ir.from_proto(copy_model(model))


def _remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs."""
    for node in reversed(model.graph):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        # The pass of onnx_ir leaves these reads, and with them the nodes whose values only a removed If captured.
        for attribute in node.attributes.values():
            single, several = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS
            bodies = [attribute.as_graph()] if attribute.type == single else []
            for body in attribute.as_graphs() if attribute.type == several else bodies:
                for inner in body.all_nodes():
                    for k in range(len(inner.inputs)):
                        inner.replace_input_with(k, None)
        model.graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(model)


def _strip_metadata(model: ModelProto) -> None:
    # The pass of onnx_ir leaves the model, the graph's borders and the initializers as they are.
    del model.metadata_props[:]
    model.doc_string = ""

    def strip(graph: GraphProto) -> None:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in itertools.chain(graph.value_info, graph.input, graph.output, graph.initializer):
            value.doc_string = ""
            del value.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            kept = [entry for entry in node.metadata_props if entry.key == SCOPES_KEY]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
            for inner in subgraphs(node):
                strip(inner)

    strip(model.graph)


def _proto(model: ir.Model) -> ModelProto:
    """The model as protobuf, where initializers, which say themselves what they are, are not described again."""
    proto = ir.to_proto(model)
    described = [value for value in proto.graph.value_info if value.name not in model.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    return proto


def _fold_shapes(graph: ir.Graph) -> None:
    for node in graph:
        shape = node.inputs[0].shape if node.op_type in ("Shape", "Size") and node.inputs[0] is not None else None
        if shape is None or not shape.is_static():
            continue
        extents = np.array(shape.numpy(), np.int64)
        first, last = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(extents))
        folded = np.array(extents.prod(), np.int64) if node.op_type == "Size" else extents[first:last]
        constant = ir.node("Constant", [], {"value": ir.tensor(folded)}, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [constant], node.outputs, constant.outputs)


def _give_outputs_nodes(graph: ir.Graph) -> None:
    """Let a node make every output that is constant; one that is an input cannot be told from it by name."""
    for k, output in enumerate(graph.outputs):
        name, maker = output.name or "", output.producer()
        if output.is_graph_input():
            raise ExportError(f"output {name!r} is also an input of that name; rename it or add an Identity")
        if maker is None or maker.op_type == "Constant":
            output.name = f"{name}.value"
            graph.outputs[k] = _value_like(output, name)
            graph.append(ir.node("Identity", [output], name=f"node_output_{name}", outputs=[graph.outputs[k]]))


def _value_like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    for value in itertools.chain(graph.input, graph.output, graph.value_info, graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
        for k, name in enumerate(node.output):
            node.output[k] = names.get(name, name)
        for subgraph in subgraphs(node):
            # A subgraph may define a name of its own that hides ours; ONNX forbids it, so plain renaming is right.
            _rename(subgraph, names)
