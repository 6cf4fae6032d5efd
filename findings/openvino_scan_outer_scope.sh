#!/usr/bin/env bash
# OpenVINO 2026.4.1 does not read an ONNX Scan whose body uses a value of the outer graph, which the standard allows
# and onnx's checker, onnxruntime 1.32.0 and ONNX's reference evaluator all accept; the message counts Scan's inputs.
# Passing the value as one more state that never changes makes the same model run. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper


def info(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def decaying_sum(captured):
    """state = state * rate + x at each step, with the rate captured from outside or handed on as a state."""
    more = ([], []) if captured else ([info("rate_in", 2)], [info("rate_out", 2)])
    nodes = [
        helper.make_node("Mul", ["state", "rate" if captured else "rate_in"], ["decayed"]),
        helper.make_node("Add", ["decayed", "x"], ["sum"]),
        helper.make_node("Identity", ["sum"], ["y"]),
    ]
    if not captured:
        nodes.append(helper.make_node("Identity", ["rate_in"], ["rate_out"]))
    body = helper.make_graph(
        nodes, "body", [info("state", 2), *more[0], info("x", 2)], [info("sum", 2), *more[1], info("y", 2)]
    )
    names = ([], []) if captured else (["rate"], ["rate_last"])
    node = helper.make_node(
        "Scan", ["start", *names[0], "steps"], ["last", *names[1], "sums"], body=body, num_scan_inputs=1
    )
    inputs = [info("start", 2), info("rate", 2), info("steps", 3, 2)]
    graph = helper.make_graph([node], "decaying sum", inputs, [info("sums", 3, 2)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


inputs = {
    "start": np.zeros(2, np.float32),
    "rate": np.array([0.5, 0.25], np.float32),
    "steps": np.arange(6, dtype=np.float32).reshape(3, 2),
}
for captured in (False, True):
    model = decaying_sum(captured)
    onnx.save(model, "model.onnx")
    right = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"]).run(["sums"], inputs)[0]
    try:
        compiled = openvino.compile_model("model.onnx", "CPU")
        values = compiled([inputs[port.any_name] for port in compiled.inputs])[0]
        said = "runs, equal" if np.allclose(values, right) else "runs, other values"
    except Exception as error:
        said = "refused: " + next((line.strip() for line in str(error).splitlines() if "Scan" in line), str(error)[-200:])
    print("captured value" if captured else "value as a state", "->", said)
    if said.startswith("refused") != captured or "other" in said:
        raise SystemExit("the behaviour has changed")
PYTHON
