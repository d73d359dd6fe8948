#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, GPU tests, benchmarks, compute-sanitizer. About fifteen minutes.
#
#   bash benchmarks/gpu_check.sh [STEP...]     (in the repository's root; results go to $OUT, default .)
#
# Steps: build facts tests prune operators sweep layer sanitize; all, if none is named.
# Whole models take longer: benchmarks/end_to_end.py.
#
# No network is used. A step that fails is named at the end and makes the exit status 1; later steps still run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${OUT:-.}")
export PYTHONUNBUFFERED=1
failed=()

wanted=" ${*:-build facts tests prune operators sweep layer sanitize} "

# step NAME SECONDS COMMAND...: if it is wanted, run it, show it, keep its output in $out/NAME.txt
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [[ $wanted == *" $name "* ]] || return 0
    echo "=== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    status=${PIPESTATUS[0]}
    echo "=== $name: status $status after $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

build() {
    export PYPRUNE_BUILD_CUDA=1
    if python3 -m pip --version; then
        python3 -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
    else
        # As setup.py's package_dir does it, without an installation.
        python3 setup.py --quiet build_ext --inplace && ln -sfn ../triton_kernels pyprune/triton_kernels
    fi
}

facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv
    nvcc --version | tail -n 2
    python3 - <<'PYTHON'
from pyprune.ops import describe, describe_installation

for key, value in describe_installation().items():
    print(f"{key}: {value}")
for row in describe():
    print(row.operator, row.device, row.dtype, "->", row.backend, row.reasons)
PYTHON
}

# The three tools at once: each spends most of its time on the host.
sanitize() {
    local sanitizer tool status=0
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    # PyTorch's cache would put the tensors into one allocation, where no access is out of bounds.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local logs
    logs=$(mktemp -d)
    declare -A jobs
    for tool in memcheck racecheck synccheck; do
        "$sanitizer" --tool "$tool" --error-exitcode 9 python3 benchmarks/sanitize_core.py >"$logs/$tool" 2>&1 &
        jobs[$tool]=$!
    done
    for tool in memcheck racecheck synccheck; do
        wait "${jobs[$tool]}" || { status=1; echo "$tool FAILED"; }
        echo "--- $tool"
        tail -n 40 "$logs/$tool"
    done
    rm -r "$logs"
    return $status
}

# The whole path on the device, with both kinds of method.
prune() {
    local scratch status=0 method
    scratch=$(mktemp -d)
    for method in flap wanda-sp slimgpt obs; do
        python3 -m pyprune prune models/llama-6m-gqa "$scratch/$method" --method $method --ratio 0.3 --device cuda \
            --calibration self --samples 32 --sequence-length 128 --evaluate self --evaluation-length 64 || status=1
    done
    rm -r "$scratch"
    return $status
}

# So that `timeout` can run them.
export -f build facts prune sanitize
step build 120 bash -c build
step facts 60 bash -c facts
step tests 300 python3 -m pytest -q -m gpu -p no:cacheprovider tests
step prune 120 bash -c prune
step operators 400 python3 -m pyprune benchmark --device cuda --output "$out/operators.json"
step sweep 300 python3 -m pyprune benchmark --device cuda --sweep --output "$out/sweep.json"
step layer 150 python3 benchmarks/layer.py --device cuda --output "$out/layer.json"
step sanitize 180 bash -c sanitize

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all steps passed"
