#!/usr/bin/env bash
# quack-kernels 0.6.5 (matrix products with gated epilogues for Hopper and Blackwell GPUs): whether its epilogues can be
# imported depends on the name of the folder that pip installed into. With `pip install --target FOLDER`, as images of
# serverless jobs are made, the same versions raise a TypeError about a context variable of the CuTe DSL, which reads as
# if the two packages did not go together; in a folder called site-packages they import. No GPU is needed to see it.
# Its fingerprint of a kernel takes functions of other libraries by their names only if their path has a folder
# site-packages or dist-packages; else it follows them down to values that it cannot take. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
packages=(
    quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
    nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops==0.8.2
)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 cuda-bindings==13.5.0 protobuf==7.36.2
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/packages" "${packages[@]}"
mkdir "$folder/elsewhere"
cp -r "$folder/packages" "$folder/elsewhere/site-packages"

try() {  # FOLDER: the second path is what the DSL's own .pth file adds to the first
    PYTHONPATH="$1:$1/nvidia_cutlass_dsl/dsl_packages" "$folder/venv/bin/python" -c "import quack.epilogue.library; print('imported')" 2>&1 | tail -n 1 || true
}
named=$(try "$folder/elsewhere/site-packages")
target=$(try "$folder/packages")
echo "in a folder called site-packages: $named"
echo "in any other folder: $target" | cut -c 1-200
[ "$named" = imported ] && grep -q "^TypeError: epilogue fn depends on <ContextVar" <<< "$target"
