"""Training recipes: pretraining, finetuning and the quickstart; run from a checkout, not part of the wheel."""

import os

# Before torch is loaded: OpenMP threads that wait sleep instead of spinning. With the short operations of small models
# one other busy process on the machine otherwise makes training on the CPU several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
