#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_dynamic(per_channel=True) writes a file for a MatMul whose constant weights have three
# axes (stacked matrices, as of several heads or scan directions), and says nothing; the file then fails when it is run.
# Without per_channel the same model is quantised and runs. Seen: the session is built, run() raises from
# DynamicQuantizeMatMul. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

rng = np.random.default_rng(0)
weight = numpy_helper.from_array(rng.standard_normal((2, 8, 4), dtype=np.float32), "weight")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "weight"], ["y"])],
    "stacked product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4])],
    initializer=[weight],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "plain.onnx")
x = {"x": rng.standard_normal((2, 3, 8), dtype=np.float32)}


def run(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, x)[0]


quantize_dynamic("plain.onnx", "tensor.onnx")
print("one scale a tensor: written and run, result of shape", run("tensor.onnx").shape)
quantize_dynamic("plain.onnx", "channel.onnx", per_channel=True)
print("one scale a channel: written,", {node.op_type for node in onnx.load("channel.onnx").graph.node})
try:
    run("channel.onnx")
except Exception as error:
    print("run:", type(error).__name__, str(error)[:200])
else:
    raise SystemExit("the behaviour has changed: the file runs")
PYTHON
