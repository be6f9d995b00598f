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
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ...engine.errors import ExportError, InputError
from .index import SCOPES_KEY, GraphIndex, _first_line, _reads, _subgraphs, node_names, tensor_spec

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
        _strip_metadata(model)
        _lift_constants(model.graph)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as exc:
        raise ExportError(f"the graph is not valid ONNX: {_first_line(exc)}; export it again") from exc
    graph = model.graph
    _fold_shapes(model)
    made = {name for node in graph.node for name in node.output}
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for output in graph.output:
        if output.name in given and output.name not in made:
            _give_output_a_node(graph, output)
    _remove_dead(graph)
    for node, name in zip(graph.node, node_names(model), strict=True):
        node.name = name
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


def extract(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    """Cut out the part that computes `outputs` from `inputs`.

    Args:
        model: The model to take from.
        inputs: Graph inputs or inner values; all become inputs of the result, in this order, used or not.
        outputs: Values that the part makes, in the order of the result's outputs.

    Raises:
        ExportError: If the outputs need a graph input that is not in `inputs`, or a value has no known type.
    """
    index = GraphIndex(model)
    keep = index.closure(outputs, stop=inputs)
    unmade = [name for name in outputs if index.producer.get(name) not in keep]
    if unmade:
        raise ExportError(
            f"{unmade[0]!r} is made by no node between the inputs and outputs asked for; name another value"
        )
    needed = {name for i in keep for name in index.reads[i]}
    missing = [name for name in index.inputs if name in needed and name not in inputs]
    if missing:
        raise ExportError(f"the outputs {list(outputs)} also need the inputs {missing}; add them to the inputs")
    infos: dict[str, ValueInfoProto] = {
        v.name: v for v in itertools.chain(model.graph.value_info, model.graph.input, model.graph.output)
    }

    def info(name: str) -> ValueInfoProto:
        if name not in infos:
            raise ExportError(
                f"value {name!r} has no known dtype and shape, so no model can begin or end there; cut elsewhere"
            )
        return infos[name]

    part = GraphProto(name=model.graph.name)
    part.node.extend(index.nodes[i] for i in sorted(keep))
    # Where one output of a node is given and another is computed anew, the node would make the given one again.
    taken = {*index.producer, *index.inputs, *index.initializers}
    for node in part.node:
        for k, name in enumerate(node.output):
            if name in inputs:
                fresh = next(n for c in itertools.count(1) if (n := f"{name}.again{c}") not in taken)
                taken.add(fresh)
                node.output[k] = fresh
    part.initializer.extend(t for t in model.graph.initializer if t.name in needed and t.name not in inputs)
    part.input.extend(info(name) for name in inputs)
    part.output.extend(info(name) for name in outputs)
    made = {name for i in keep for name in index.nodes[i].output}
    described = {*inputs, *outputs}
    part.value_info.extend(v for v in model.graph.value_info if v.name in made and v.name not in described)
    return _wrap(part, model)


def rename_values(model: ModelProto, names: Mapping[str, str]) -> ModelProto:
    """Give values new names everywhere they are made, read, captured or described; others keep theirs."""
    model = copy_model(model)
    _rename(model.graph, names)
    return model


def rename_reads(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let `node` (changed in place) read other values, in its subgraphs too; what it makes keeps its name."""
    for k, name in enumerate(node.input):
        node.input[k] = names.get(name, name)
    for subgraph in _subgraphs(node):
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
    renames = dict(links)
    taken = values | set(two.outputs)
    # Unlinked inputs keep their names: they are what callers bind by.
    inner = [*two.producer, *two.initializers, *(name for name in two.inputs if name not in links)]
    for name in inner:
        if name in two.outputs or name in renames:
            continue
        fresh = name if name not in taken else next(n for k in itertools.count(2) if (n := f"{name}.{k}") not in taken)
        if name in two.inputs and fresh != name:
            raise ExportError(
                f"input {name!r} of the second model is an inner value of the first; rename it in one of them first"
            )
        renames[name] = fresh
        taken.add(fresh)
    tail = rename_values(second, renames)
    merged = copy_model(first)
    _merge_opsets(merged, tail)
    merged.ir_version = max(first.ir_version, second.ir_version)
    graph = merged.graph
    used = {node.name for node in graph.node}
    for node in tail.graph.node:
        fresh = next(
            n for k in itertools.count(1) if (n := node.name if k == 1 else f"{node.name}.{k}") not in used or not n
        )
        used.add(fresh)
        node.name = fresh
        graph.node.append(node)
    graph.initializer.extend(tail.graph.initializer)
    known = {v.name for v in itertools.chain(graph.value_info, graph.input, graph.output)}
    graph.value_info.extend(v for v in tail.graph.value_info if v.name not in known)
    graph.input.extend(v for v in tail.graph.input if v.name not in values)
    infos = {v.name: v for v in itertools.chain(graph.value_info, graph.input, graph.output, tail.graph.output)}
    wanted = list(outputs) if outputs is not None else [*one.outputs, *two.outputs]
    unknown = [name for name in wanted if name not in infos]
    if unknown:
        raise InputError(f"the merged model has no value {unknown[0]!r} of known shape to give out")
    chosen = [infos[name] for name in wanted]
    spare = [infos[name] for name in (*one.outputs, *two.outputs) if name not in wanted]
    del graph.output[:]
    graph.output.extend(chosen)
    graph.value_info.extend(spare)
    _remove_dead(graph)
    return merged


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
    model = copy_model(model)
    left = [value for value in model.graph.output if value.name not in names]
    del model.graph.output[:]
    model.graph.output.extend(left)
    _remove_dead(model.graph)
    return model


def copy_model(model: ModelProto) -> ModelProto:
    """A copy that can be changed."""
    fresh = ModelProto()
    fresh.CopyFrom(model)
    return fresh


def _wrap(graph: GraphProto, like: ModelProto) -> ModelProto:
    """A model around `graph` with the versions and producer of `like`."""
    model = ModelProto(
        ir_version=like.ir_version, producer_name=like.producer_name, producer_version=like.producer_version
    )
    model.graph.CopyFrom(graph)
    model.opset_import.extend(like.opset_import)
    model.functions.extend(like.functions)
    return model


def _strip_metadata(model: ModelProto) -> None:
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
            kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key == SCOPES_KEY]
            del node.metadata_props[:]
            for key, value in kept:
                node.metadata_props.add(key=key, value=value)
            for inner in _subgraphs(node):
                strip(inner)

    strip(model.graph)


def _lift_constants(graph: GraphProto) -> None:
    kept = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
    _set_nodes(graph, kept)
    # Old models list initializers as inputs too, where they are defaults that a caller may replace: none of ours does.
    names = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    attribute = node.attribute[0]
    name = node.output[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        return numpy_helper.from_array(np.asarray(value, np.float32), name)
    if attribute.name in ("value_int", "value_ints"):
        value = attribute.i if attribute.name == "value_int" else list(attribute.ints)
        return numpy_helper.from_array(np.asarray(value, np.int64), name)
    return None


def _fold_shapes(model: ModelProto) -> None:
    graph = model.graph
    shapes = {
        v.name: spec.shape
        for v in itertools.chain(graph.value_info, graph.input, graph.output)
        if (spec := tensor_spec(v)) is not None
    }
    shapes.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    kept = []
    for node in graph.node:
        shape = shapes.get(node.input[0]) if node.op_type in ("Shape", "Size") and node.input else None
        if shape is None:
            kept.append(node)
        elif node.op_type == "Size":
            graph.initializer.append(numpy_helper.from_array(np.array(np.prod(shape), np.int64), node.output[0]))
        else:
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            part = np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)
            graph.initializer.append(numpy_helper.from_array(part, node.output[0]))
    _set_nodes(graph, kept)


def _set_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    kept = []
    for node in nodes:
        fresh = NodeProto()
        fresh.CopyFrom(node)
        kept.append(fresh)
    del graph.node[:]
    graph.node.extend(kept)


def _give_output_a_node(graph: GraphProto, output: ValueInfoProto) -> None:
    """Let a node make an output that is an initializer; one that is an input cannot be told from it by name."""
    if any(value.name == output.name for value in graph.input):
        raise ExportError(f"output {output.name!r} is also an input of that name; rename it or add an Identity")
    inner = f"{output.name}.value"
    for tensor in graph.initializer:
        if tensor.name == output.name:
            tensor.name = inner
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name == output.name:
                node.input[k] = inner
        for subgraph in _subgraphs(node):
            _rename(subgraph, {output.name: inner})
    graph.node.append(helper.make_node("Identity", [inner], [output.name], name=f"node_output_{output.name}"))


def _remove_dead(graph: GraphProto) -> None:
    wanted = {value.name for value in graph.output}
    alive = []
    for node in reversed(graph.node):
        if any(name in wanted for name in node.output):
            alive.append(node)
            wanted.update(_reads(node))
    if len(alive) < len(graph.node):
        _set_nodes(graph, reversed(alive))
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    if len(initializers) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)
    made = {name for node in graph.node for name in node.output}
    infos = [value for value in graph.value_info if value.name in made]
    if len(infos) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(infos)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    for value in itertools.chain(graph.input, graph.output, graph.value_info, graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
        for k, name in enumerate(node.output):
            node.output[k] = names.get(name, name)
        for subgraph in _subgraphs(node):
            # A subgraph may define a name of its own that hides ours; ONNX forbids it, so plain renaming is right.
            _rename(subgraph, names)


def _merge_opsets(model: ModelProto, other: ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for entry in other.opset_import:
        if versions.setdefault(entry.domain, entry.version) != entry.version:
            raise ExportError(
                f"the models use versions {versions[entry.domain]} and {entry.version} of operator set "
                f"{entry.domain or 'ai.onnx'!r}; export both with the same one"
            )
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
