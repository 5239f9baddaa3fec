"""What the ONNX parser of TensorRT 10.3 (JetPack 6.1 and 6.2) takes: the portable level's limits.

Sources, in https://github.com/onnx/onnx-tensorrt:
- docs/operators.md at 6d0ab7be (TensorRT 8.5): the operators marked "Y"; none was taken out since;
- docs/Changelog.md: operators added up to 10.3; INT4 quantisation came with 10.0, uint8 inputs with
  8.5, int64 and bfloat16 with 9.0;
- onnxOpImporters.cpp of 9.x: what an importer does not read (`UNREAD_ATTRIBUTES`, `UNREAD_INPUTS`).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

_SINCE_8_5 = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GridSample GRU HardSwish HardSigmoid Identity If ImageScaler
    InstanceNormalization IsNaN LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg
    NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu QuantizeLinear
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan
    Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
"""
_ADDED = (
    "GroupNormalization LayerNormalization IsInf Hardmax DeformConv"  # 8.6, 8.6, 8.6, 9.2, 10.1
)

OPERATORS = frozenset(f"{_SINCE_8_5} {_ADDED}".split())
#: The newest opset its documentation names.
OPSET = 20
#: What opset 21 is allowed for: INT4, which that version defines, in blocks.
INT4_OPSET = 21
#: Attributes that would be passed over without a word.
UNREAD_ATTRIBUTES = {"Shape": {"start", "end"}}
#: Inputs that would be: opset 18 made the axes of these an input, of ReduceSum opset 13 did.
UNREAD_INPUTS = dict.fromkeys(
    ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"), 1
)


def refusals(model: onnx.ModelProto) -> Iterator[str]:
    """One line for each thing in a graph that the parser would refuse or misread."""
    int4 = {w.name for w in model.graph.initializer if w.data_type == TensorProto.INT4}
    for opset in model.opset_import:
        if opset.domain:
            yield f"operators of {opset.domain}"
        elif opset.version > (INT4_OPSET if int4 else OPSET):
            yield f"opset {opset.version}"
    for node in model.graph.node:
        if node.domain or node.op_type not in OPERATORS:
            yield f"{node.name}: operator {node.domain} {node.op_type}"
        unread = UNREAD_ATTRIBUTES.get(node.op_type, set())
        yield from (f"{node.name}: {a.name} unread" for a in node.attribute if a.name in unread)
        if len(node.input) > UNREAD_INPUTS.get(node.op_type, len(node.input)):
            yield f"{node.name}: axes unread"
        blocked = any(a.name == "block_size" and a.i for a in node.attribute)
        if blocked and node.input[0] not in int4:
            yield f"{node.name}: blocks of {node.op_type} that are not INT4"
        if int4.intersection(node.input) and node.op_type != "DequantizeLinear":
            yield f"{node.name}: INT4 in {node.op_type}"
