#!/usr/bin/env bash
# onnxscript 0.7.2: its optimiser, which torch.onnx.export runs, drops the reshapes around a product if the product's
# shape stays the same by broadcasting, though its values do not: (K, B, L, N) reshaped to (K, B * L, N) times
# (K, N, M) has a matrix for each k, without the reshapes one for each b. Where B = K nothing fails.
# Seen: after optimisation the reference evaluator computes other numbers. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxscript==0.7.2
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxscript.optimizer
from onnx.reference import ReferenceEvaluator

model = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[2, 2, 3, 4] a, float[2, 4, 5] b) => (float[2, 2, 3, 5] c)
<int64[3] rows = {2, 6, 4}, int64[4] whole = {2, 2, 3, 5}>
{
    flat = Reshape(a, rows)
    product = MatMul(flat, b)
    c = Reshape(product, whole)
}
""")
generator = np.random.default_rng(0)
a, b = (generator.standard_normal(shape, dtype=np.float32) for shape in ((2, 2, 3, 4), (2, 4, 5)))
before, after = (
    ReferenceEvaluator(each).run(None, {"a": a, "b": b})[0] for each in (model, onnxscript.optimizer.optimize(model))
)
print("largest difference by optimisation:", abs(before - after).max())
if not np.allclose(before, a @ b[:, None], atol=1e-5):
    raise SystemExit("the reference evaluator's result has changed")
if np.allclose(before, after, atol=1e-5):
    raise SystemExit("the behaviour has changed: the optimiser keeps the values")
PYTHON
