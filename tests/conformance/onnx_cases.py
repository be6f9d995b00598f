"""ONNX's own node cases, as an exporter would write them: which are tried, in which types, and which are left out.

A case is one node with inputs and the outputs that ONNX expects. Three things are changed before a backend sees it, as
no image generator has them otherwise: shapes, axes, sizes, pads and quantisation parameters become constants; outputs
that only training reads are dropped; and a model above operator set 22 is brought down to it where the operator is
there already. Every float32 case is tried in float16 as well.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET = 22
LEFT_OUT_OPERATORS = {
    "trains networks": "Adagrad Adam Momentum NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "works on text": "LabelEncoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    "works on sequences and optionals": "OptionalGetElement OptionalHasElement SequenceInsert SequenceMap "
    "SplitToSequence",
    "is control flow": "If Loop Scan",
    "stands in function bodies, not in graphs": "CastLike",
    "is random": "Bernoulli",
    "has outputs whose size depends on values": "Compress NonMaxSuppression NonZero Unique",
    "works on sound": "BlackmanWindow HammingWindow HannWindow MelWeightMatrix STFT",
    "is recurrent": "GRU LSTM RNN ReverseSequence",
    "finds objects or decodes files": "ImageDecoder RoiAlign",
    "is for tables and trees": "ArrayFeatureExtractor Binarizer TreeEnsemble",
    "works on integers only": "BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor ConvInteger MatMulInteger "
    "QLinearConv QLinearMatMul",
    "is newer than operator set 22 and not for images": "BitCast CausalConvWithState CumProd FlexAttention "
    "LinearAttention SwiGLU TensorScatter",
}
OPERATORS = {
    "Convolutions and matrix products": "Conv ConvTranspose DeformConv Einsum Gemm MatMul",
    "Normalisation": "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization "
    "LRN MeanVarianceNormalization RMSNormalization",
    "Attention": "Attention LogSoftmax RotaryEmbedding Softmax",
    "Sampling and borders": "AffineGrid CenterCropPad Col2Im DepthToSpace GridSample Pad Resize SpaceToDepth Upsample",
    "Pooling": "AveragePool GlobalAveragePool GlobalMaxPool LpPool MaxPool MaxUnpool",
    "Activations": "Celu Clip Elu Gelu HardSigmoid HardSwish Hardmax LeakyRelu Mish PRelu Relu Selu Shrink Sigmoid "
    "Softplus Softsign Swish Tanh ThresholdedRelu",
    "Elementwise": "Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Cos Cosh Div Erf Exp Floor Log Max Mean Min Mod Mul "
    "Neg Pow Reciprocal Round Sign Sin Sinh Sqrt Sub Sum Tan",
    "Comparison and choice": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor",
    "Reduction": "ArgMax ArgMin CumSum DFT Det ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean "
    "ReduceMin ReduceProd ReduceSum ReduceSumSquare TopK",
    "Shape and place": "Cast Concat Constant ConstantOfShape Dropout Expand EyeLike Flatten Gather "
    "GatherElements GatherND Identity OneHot Range Reshape Scatter ScatterElements ScatterND Shape Size Slice Split "
    "Squeeze Tile Transpose Trilu Unsqueeze",
    "Quantisation": "DequantizeLinear DynamicQuantizeLinear QuantizeLinear",
}
# By the operator's own name for an input. Weights stay inputs: a modulated convolution computes them.
_CONSTANT_INPUTS = (
    "K axes axis block_shape constant_value delta depth dft_length ends image_shape k limit output_shape pads ratio "
    "repeats roi scales shape size sizes split start starts steps training_mode x_scale x_zero_point y_scale "
    "y_zero_point"
)
# Of these only training reads the further outputs.
_ONE_OUTPUT = frozenset({"BatchNormalization", "Dropout", "LayerNormalization"})
_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BOOL,
        TensorProto.INT32,
        TensorProto.INT64,
    }
)
_BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})
# Derived float16 cases of these would be another case's, or mean nothing: their types are an attribute or an input.
_TYPED_BY_ATTRIBUTE = frozenset(
    {"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Range", "Shape", "Size"}
)


@dataclass(frozen=True)
class NodeCase:
    """One node, its inputs and what it must give.

    Attributes:
        name: ONNX's name; a derived float16 case has ``"@float16"`` added.
        operator: The node's operator.
        dtype: ``"float16"`` where a tensor is, else ``"float32"`` (also where all are integers or truth values).
        model: The case as an exporter would write it.
        inputs: Input name -> array.
        outputs: Output name -> expected array.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        derived_from: For a derived case the name of the float32 one, whose expected arrays hold for other inputs; its
            own are None then, see `reference_model`.
        reference_model: For a derived case the float32 model: what it makes of the (rounded) inputs is expected.
    """

    name: str
    operator: str
    dtype: str
    model: ModelProto
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray] | None
    rtol: float
    atol: float
    derived_from: str | None = None
    reference_model: ModelProto | None = None


@dataclass(frozen=True)
class Collection:
    """All node cases.

    Attributes:
        tried: Cases that both backends are given.
        left_out: Reason -> number of cases; those of operators that are left out whole are under the operator's reason.
        unknown: Operators that are neither tried nor left out: somebody has to decide.
    """

    tried: tuple[NodeCase, ...]
    left_out: Counter[str]
    unknown: frozenset[str]


def group_of() -> dict[str, str]:
    """Operator -> heading it stands under."""
    return {name: group for group, names in OPERATORS.items() for name in names.split()}


def all_node_cases() -> list[onnx.backend.test.case.test_case.TestCase]:
    """ONNX's node cases, the expanded ones (several nodes) included; their random numbers are seeded by ONNX."""
    with warnings.catch_warnings():
        # Expected values of overflow and of division by zero are computed on purpose.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return sorted(collect_testcases(None), key=lambda case: case.name)


def collect() -> Collection:
    """The single-node cases of the operators that image generators use."""
    groups = group_of()
    reasons = {name: reason for reason, names in LEFT_OUT_OPERATORS.items() for name in names.split()}
    tried: list[NodeCase] = []
    left_out: Counter[str] = Counter()
    unknown: set[str] = set()
    for case in all_node_cases():
        if re.search(r"_expanded(_ver\d+)?$", case.name):
            left_out["an operator's function body: cut in many places instead (tests of the splitter)"] += 1
            continue
        (node,) = case.model.graph.node
        if node.op_type not in groups:
            left_out["the operator " + reasons.get(node.op_type, "is unknown")] += 1
            if node.op_type not in reasons:
                unknown.add(node.op_type)
            continue
        _narrow(case)
        values = [*case.model.graph.input, *case.model.graph.output]
        types = _TYPES | _BYTES if groups[node.op_type] == "Quantisation" else _TYPES
        if any(value.type.tensor_type.elem_type not in types for value in values):
            left_out["a type that image generators do not compute in (float64, bfloat16, 8-bit integers, ...)"] += 1
            continue
        if case.name.startswith("test_training_") or any(a.name == "training_mode" and a.i for a in node.attribute):
            left_out["training mode"] += 1
            continue
        made = _as_exported(case)
        assert made.outputs is not None
        if any(array.size == 0 for array in (*made.inputs.values(), *made.outputs.values())):
            left_out["a tensor without elements"] += 1
            continue
        tried.append(made)
        half = _float16(made)
        if half is not None:
            tried.append(half)
    tried += _own_cases()
    return Collection(tuple(tried), left_out, frozenset(unknown))


def _narrow(case: onnx.backend.test.case.test_case.TestCase) -> None:
    """Make a float64 case a float32 one: of some operators ONNX has no others."""
    (node,) = case.model.graph.node
    values = [*case.model.graph.input, *case.model.graph.output]
    kinds = {value.type.tensor_type.elem_type for value in values}
    if TensorProto.DOUBLE not in kinds or TensorProto.FLOAT in kinds or node.op_type in _TYPED_BY_ATTRIBUTE:
        return
    for value in values:
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    case.data_sets[0] = tuple(
        [a.astype(np.float32) if a.dtype == np.float64 else a for a in map(array_of, arrays)]
        for arrays in case.data_sets[0]
    )


def _as_exported(case: onnx.backend.test.case.test_case.TestCase) -> NodeCase:
    model = lowered(case.model, OPSET)
    graph = model.graph
    (node,) = graph.node
    (data,) = case.data_sets
    inputs = {value.name: array_of(array) for value, array in zip(graph.input, data[0], strict=True)}
    outputs = {value.name: array_of(array) for value, array in zip(graph.output, data[1], strict=True)}
    if node.op_type in _ONE_OUTPUT:
        del node.output[1:]
        del graph.output[1:]
        outputs = {graph.output[0].name: outputs[graph.output[0].name]}
    schema = _schema(model)
    constant_inputs = _CONSTANT_INPUTS.split()
    constants = {
        name
        for position, name in enumerate(node.input)
        if name and (_formal(schema, position).name in constant_inputs or node.op_type == "ConstantOfShape")
    }
    for name in sorted(constants):
        graph.initializer.append(numpy_helper.from_array(inputs.pop(name), name))
    kept = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)
    types = {value.type.tensor_type.elem_type for value in (*case.model.graph.input, *case.model.graph.output)}
    dtype = "float16" if TensorProto.FLOAT16 in types else "float32"
    return NodeCase(case.name, node.op_type, dtype, model, inputs, outputs, case.rtol, case.atol)


def array_of(value: np.ndarray | np.generic | TensorProto) -> np.ndarray:
    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    # Unlike np.ascontiguousarray this keeps a scalar a scalar.
    return np.array(array, order="C", copy=True)


def lowered(model: ModelProto, opset: int) -> ModelProto:
    """A copy in operator set `opset` where it is newer and valid there; expected outputs show if it means the same.

    The version of the file format becomes the oldest that fits: ONNX stamps its cases with its own newest one, which
    executors refuse.
    """
    found = ModelProto()
    found.CopyFrom(model)
    for entry in found.opset_import:
        if entry.domain != "" or entry.version <= opset:
            continue
        for node in found.graph.node:
            if node.domain == "":
                newer = onnx.defs.get_schema(node.op_type, entry.version, "").attributes
                # What is written out though it is the default would be an unknown attribute there.
                kept = [a for a in node.attribute if not _is_default(a, newer[a.name].default_value)]
                del node.attribute[:]
                node.attribute.extend(kept)
        entry.version = opset
        try:
            onnx.checker.check_model(found, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            found.CopyFrom(model)
        break
    found.ir_version = helper.find_min_ir_version_for(found.opset_import, ignore_unknown=True)
    return found


def _is_default(attribute: onnx.AttributeProto, default: onnx.AttributeProto) -> bool:
    return bool(default.type) and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)


def _schema(model: ModelProto) -> onnx.defs.OpSchema:
    (node,) = model.graph.node
    (version,) = [entry.version for entry in model.opset_import if entry.domain == node.domain]
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def _formal(schema: onnx.defs.OpSchema, position: int) -> onnx.defs.OpSchema.FormalParameter:
    # The last one may be variadic.
    return schema.inputs[min(position, len(schema.inputs) - 1)]


def _float16(case: NodeCase) -> NodeCase | None:
    """The case with every float32 tensor that may be float16 made so; None where there is none."""
    if case.dtype != "float32" or case.operator in _TYPED_BY_ATTRIBUTE:
        return None
    model = ModelProto()
    model.CopyFrom(case.model)
    graph = model.graph
    (node,) = graph.node
    schema = _schema(model)
    halves = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if "tensor(float16)" in constraint.allowed_type_strs
    }
    convertible = {
        name for position, name in enumerate(node.input) if name and _formal(schema, position).type_str in halves
    }
    inputs = dict(case.inputs)
    changed = False
    for value in graph.input:
        if value.name in convertible and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            inputs[value.name] = _halved(inputs[value.name])
            changed = True
    if not changed:
        return None
    for tensor in graph.initializer:
        if tensor.name in convertible and tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(_halved(numpy_helper.to_array(tensor)), tensor.name))
    reference = ModelProto()
    reference.CopyFrom(case.model)
    for tensor in reference.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in convertible:
            rounded = _halved(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    dims = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.output}
    for value in graph.output:
        value.type.Clear()
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
        for value in inferred.graph.output:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, dims[value.name]))
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError):
        return None
    return NodeCase(
        name=f"{case.name}@float16",
        operator=case.operator,
        dtype="float16",
        model=inferred,
        inputs=inputs,
        outputs=None,
        rtol=0.0,
        atol=0.0,
        derived_from=case.name,
        reference_model=reference,
    )


def _halved(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def _own_cases() -> list[NodeCase]:
    """What ONNX has no case for: int8 without a zero point, wide attention heads, attention of one tensor to itself."""
    rng = np.random.default_rng(5)
    x = rng.uniform(-2, 2, (1, 4, 3, 5)).astype(np.float32)
    found = []
    for layout, scale in (("tensor", np.float32(0.02)), ("channel", np.array([0.01, 0.02, 0.015, 0.03], np.float32))):
        wide = scale if layout == "tensor" else scale.reshape(1, 4, 1, 1)
        zero = np.zeros(np.shape(scale), np.int8)
        quantised = np.clip(np.rint(x / wide), -128, 127).astype(np.int8)
        constants = {"scale": np.asarray(scale), "zero": zero}
        for operator, given, want in (
            ("QuantizeLinear", x, quantised),
            ("DequantizeLinear", quantised, quantised.astype(np.float32) * wide),
        ):
            node = helper.make_node(operator, ["x", "scale", "zero"], ["y"], axis=1)
            name = f"{operator.lower()}_int8_symmetric_per_{layout}"
            found.append(_own_case(name, node, {"x": given}, constants, {"y": want}, opset=20))
    q, k, v = rng.standard_normal((3, 1, 2, 8, 64)).astype(np.float32)
    for name, inputs in (("heads_of_64", {"q": q, "k": k, "v": v}), ("of_one_tensor", {"q": q})):
        node = helper.make_node("Attention", [*inputs, "q", "q"][:3], ["y"])
        want = _attention(*list(inputs.values()) * (3 // len(inputs)))
        found.append(_own_case(f"attention_{name}", node, inputs, {}, {"y": want}, opset=23))
    halves = [half for case in found if (half := _float16(case)) is not None]
    return [*found, *halves]


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Scaled dot-product attention in float64: float32 [N, heads, length, width] three times -> the same shape."""
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v, np.float32)


def _own_case(
    name: str,
    node: onnx.NodeProto,
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    opset: int,
) -> NodeCase:
    def infos(arrays: dict[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for key, array in arrays.items()
        ]

    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph([node], name, infos(inputs), infos(outputs), tensors)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))
    onnx.checker.check_model(model, full_check=True)
    return NodeCase(f"own_{name}", node.op_type, "float32", model, inputs, outputs, 1e-3, 1e-7)
