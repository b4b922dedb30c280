#!/usr/bin/env bash
# All that needs a GPU, or tells more on one, by one command and without a network:
#
#     benchmarks/gpu.sh [out]
#
# Tests that are marked `gpu`, with the one in which nothing may wait but what says so
# (torch.cuda.set_sync_debug_mode("error")), and every benchmark of time and memory, at
# its own sizes and at Llama-8B's. (Those of quality say the same on any device, and
# need data.) Tables and logs go to the folder `out`, gpu-out by default; a step that
# fails is named at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-gpu-out}
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "there is no GPU"' || exit 1
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' |
  tee "$OUT/machine.txt"

failed=()
step() { # name, command...
  local name=$1
  shift
  echo "== $name"
  "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
  tail -n 3 "$OUT/$name.log"
}

step tests "$PYTHON" -m pytest -m gpu -rA
step gpu_ready "$PYTHON" -m benchmarks.gpu_ready --out "$OUT"
for name in main_job laplace svgd lifting generate language_model memory distributed \
  wide; do
  step "$name" "$PYTHON" -m "benchmarks.$name" --device cuda --out "$OUT"
done
# The factors of Llama-8B: one of its layers, multiplied.
step laplace_memory "$PYTHON" -m benchmarks.laplace_memory --hidden 4096 --layers 32

if ((${#failed[@]})); then
  echo "Failed: ${failed[*]}; see $OUT/*.log"
  exit 1
fi
echo "All went well: tables are in $OUT"
