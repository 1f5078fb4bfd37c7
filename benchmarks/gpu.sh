#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth, each step with a limit of its own.
#
#   benchmarks/gpu.sh [FOLDER] [STEP ...]     steps: look tests device compiled table; all by default
#
# FOLDER (default: gpu-out) gets a log of each step and JSON of the figures. PYTHON names the
# interpreter, by default .venv/bin/python or else python3. Together under 25 minutes:
#
#   look      which GPU, driver, torch; whether the package can be imported         under 1 minute
#   tests     tests/test_cuda.py, tests/test_engines.py, tests/test_conveyor.py     at most 6
#   device    ResNet-9 at 512 in bf16: matrix product, every batch, host to host    at most 5
#   compiled  the same after torch.compile, at two sizes of batch                   at most 4
#   table     every network of the table in docs/PERFORMANCE.md at 256 and 512      at most 9
#
# The script goes on after a step that fails, and ends with 1 if one did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-gpu-out}
mkdir -p "$out"
steps=("${@:2}")
[ ${#steps[@]} -gt 0 ] || steps=(look tests device compiled table)
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() { # name, seconds, command ...
    local name=$1 seconds=$2 code
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { failed=1; echo "== $name: ended with $code"; }
}

look() {
    nvidia-smi || true
    "$python" - <<'PYTHON'
import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
from benchmarks import inference, on_device  # noqa: F401: can they be imported here?
PYTHON
}
export -f look
export python

bench=("$python" -m benchmarks.on_device --network resnet_9 --side 512 --precision bf16)
for name in "${steps[@]}"; do
    case $name in
    look) step look 60 bash -c look ;;
    tests) step tests 360 "$python" -m pytest -p no:cacheprovider -q -rA --timeout 120 \
        tests/test_cuda.py tests/test_engines.py tests/test_conveyor.py ;;
    device) step device 300 "${bench[@]}" --json "$out/device.json" ;;
    compiled) step compiled 240 "${bench[@]}" --batches 4 16 --slices 64 --compile \
        --json "$out/compiled.json" ;;
    table) step table 540 "$python" -m benchmarks.inference --device cuda --seconds 0.5 \
        --json "$out/table.json" ;;
    *) echo "no step named $name"; failed=1 ;;
    esac
done
exit "$failed"
