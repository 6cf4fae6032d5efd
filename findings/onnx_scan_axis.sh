#!/usr/bin/env bash
# onnx 1.23.2: the checker accepts a Scan whose scan_input_axes is not 0, and so does onnxruntime, but ONNX's own
# reference evaluator, which is meant to define the standard, refuses it when the model is run.
# Seen: the checker passes, onnxruntime 1.32.0 computes the running sum along axis 1, the reference evaluator raises
# "Scan is not implemented for other input axes than 0". The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

real = TensorProto.FLOAT
body = helper.make_graph(
    [helper.make_node("Add", ["state", "x"], ["sum"]), helper.make_node("Identity", ["sum"], ["y"])],
    "body",
    [helper.make_tensor_value_info(name, real, [2]) for name in ("state", "x")],
    [helper.make_tensor_value_info(name, real, [2]) for name in ("sum", "y")],
)
node = helper.make_node(
    "Scan", ["start", "steps"], ["last", "sums"], body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1]
)
graph = helper.make_graph(
    [node],
    "running sum along axis 1",
    [helper.make_tensor_value_info("start", real, [2]), helper.make_tensor_value_info("steps", real, [2, 3])],
    [helper.make_tensor_value_info("last", real, [2]), helper.make_tensor_value_info("sums", real, [2, 3])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
inputs = {"start": np.zeros(2, np.float32), "steps": np.arange(6, dtype=np.float32).reshape(2, 3)}
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
sums = session.run(["sums"], inputs)[0]
print("onnxruntime:", sums.tolist())
if not np.array_equal(sums, inputs["steps"].cumsum(axis=1)):
    raise SystemExit("onnxruntime's result has changed")
try:
    ReferenceEvaluator(model).run(["sums"], inputs)
except RuntimeError as error:
    print("reference evaluator:", error)
    if "other input axes than 0" not in str(error):
        raise SystemExit("the message has changed") from error
else:
    raise SystemExit("the behaviour has changed: the reference evaluator runs it")
PYTHON
