#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most nine minutes, on a machine with torch, Triton and nvcc.
# It builds the extension in place, runs tests/gpu and compute-sanitizer, then measures, without network or
# package index. Steps are independent: a failed step is reported, and the others still run.
#
#   benchmarks/gpu_check.sh [--dry-run] [--commit ID] [--only STEP,...]
#
#   --dry-run   every command on the CPU: Triton interpreted, tiny sizes, no build, no sanitizer
#   --commit    recorded in the results where this copy of the sources has no git
#   --only      steps of the list printed at the end: those that a first call had no time for
#
# GPU_CHECK_TESTS is an expression for pytest -k in a dry run.
# Results, one JSON per suite, and log.txt go to $OUT, or to benchmarks/results/<GPU>. PYTHON names the
# interpreter (python3). Other libraries are measured if they can be imported (PYTHONPATH). The exit status is
# 0 if every correctness step passed.
set -uo pipefail
cd "$(dirname "$0")/.."

DRY_RUN= COMMIT= ONLY=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --commit) COMMIT=$2; shift ;;
    --only) ONLY=$2; shift ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done

SECONDS=0
MOST=530                                      # seconds in all, which leaves ten for the summary
PYTHON=${PYTHON:-python3}
DEVICE=cuda
[ -n "$DRY_RUN" ] && DEVICE=cpu
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
OUT=${OUT:-benchmarks/results/${gpu#nvidia-}}
[ -n "$DRY_RUN" ] && OUT=$(mktemp -d)         # a dry run has no results
[ -z "${gpu}${DRY_RUN}" ] && { echo "gpu_check: nvidia-smi names no GPU (--dry-run needs none)" >&2; exit 2; }
WORK=$(mktemp -d)                             # one log per step, then one for all
trap 'rm -rf "$WORK"; [ -n "$DRY_RUN" ] && rm -rf "$OUT"' EXIT
mkdir -p "$OUT"; touch "$WORK/began"

export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ -n "$DRY_RUN" ] && export OPSD_GPU_TESTS=interpret OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} COLUMNS=160
unset OPSD_BACKEND OPSD_WORKSPACE_BYTES

names=() failed=() missed=() commit=()
[ -n "$COMMIT" ] && commit=(--commit "$COMMIT")
wanted() { [ -z "$ONLY" ] || [[ ",$ONLY," == *",$1,"* ]]; }
say() { printf '%s\n' "$*"; }
left() { echo $((MOST - SECONDS)); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }

# begin NAME SECONDS COMMAND...: run in the background, with a log of its own
begin() {
  local name=$1 limit; limit=$(smaller "$2" "$(left)"); shift 2
  wanted "$name" || return 0
  names+=("$name")
  [ "$limit" -lt 5 ] && { echo 125 >"$WORK/$name.status"; echo "no time left" >"$WORK/$name.log"; echo 0 >"$WORK/$name.seconds"; return 0; }
  say "==> $name (at most $limit s): $*"
  (
    start=$SECONDS
    timeout --kill-after=5 "$limit" "$@" >"$WORK/$name.log" 2>&1 </dev/null
    echo $? >"$WORK/$name.status"; echo $((SECONDS - start)) >"$WORK/$name.seconds"
  ) &
  echo $! >"$WORK/$name.pid"
}

# end KIND NAME...: wait for steps; KIND is correctness or measurement
end() {
  local kind=$1 name status; shift
  for name in "$@"; do
    wanted "$name" || continue
    [ -f "$WORK/$name.pid" ] && wait "$(cat "$WORK/$name.pid")"
    status=$(cat "$WORK/$name.status" 2>/dev/null || echo 1)
    [ "$status" = 0 ] && { say "    $name: ok, $(cat "$WORK/$name.seconds") s"; continue; }
    if [ "$kind" = correctness ]; then failed+=("$name"); else missed+=("$name"); fi
    say "    $name: status $status after $(cat "$WORK/$name.seconds") s"
    tail -n 15 "$WORK/$name.log" | cut -c1-300 | sed 's/^/      /'
  done
}
step() { local kind=$1; shift; begin "$@"; end "$kind" "$1"; }
clocks() {
  [ -n "$DRY_RUN" ] && return 0
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw --format=csv,noheader | sed 's/^/    /'
}

# ---------------------------------------------------------------- build

say "==> $($PYTHON --version), $(nvcc --version 2>/dev/null | sed -n 's/^Cuda.*release \([^,]*\).*/nvcc \1/p'), results in $OUT"
clocks
if [ -n "$DRY_RUN" ]; then
  step correctness build 60 "$PYTHON" setup.py --name    # a build would replace an extension in use
else
  OPSD_BUILD_CUDA=1 step correctness build 170 "$PYTHON" setup.py build_ext --inplace
fi
step correctness doctor 60 "$PYTHON" -m opsd_kernels doctor
wanted doctor && cat "$WORK/doctor.log" | sed -n '1,60p'
backend=$([ -n "$DRY_RUN" ] && echo torch || echo cuda)
step correctness serves 60 "$PYTHON" -c "
import sys, torch
from opsd_kernels._rows import backends
backends.select('$backend', torch.device('$DEVICE'))
print(backends.explain('$DEVICE'))"

# ---------------------------------------------------------------- correctness, side by side

workers=$("$PYTHON" -c 'import xdist, os; print(f"-n{max(1, min(10, os.cpu_count() - 4))}")' 2>/dev/null)
tests=(env CUBLAS_WORKSPACE_CONFIG=:4096:8 "$PYTHON" -m pytest tests/gpu -q -ra -p no:cacheprovider --maxfail=60 --durations=8 --tb=short)
if [ -n "$DRY_RUN" ]; then tests+=(-k "${GPU_CHECK_TESTS:-test}"); else tests+=($workers); fi
begin tests $([ -n "$DRY_RUN" ] && echo 500 || echo 200) "${tests[@]}"
if [ -n "$DRY_RUN" ]; then
  begin memcheck 200 "$PYTHON" tests/gpu/sanitize.py torch
  end correctness tests memcheck
else
  begin memcheck 150 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 "$PYTHON" tests/gpu/sanitize.py cuda
  begin racecheck 200 compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 20 "$PYTHON" tests/gpu/sanitize.py cuda
  end correctness tests memcheck racecheck
fi

# ---------------------------------------------------------------- measurements, one at a time

clocks
# Heads of Qwen3-8B, Qwen3-0.6B and Gemma 2; `latency` adds modes and the third divergence. A suite that runs
# out of time keeps its finished rows, so the most important suites come first.
if [ -n "$DRY_RUN" ]; then
  bench() { step measurement "$1" 120 "$PYTHON" -m opsd_kernels bench --device cpu --quick --shape tiny --provider opsd --provider torch --suite "$1" --json "$OUT/$1.json" "${commit[@]}"; }
  for suite in ratios sweeps memory accuracy latency; do bench "$suite"; done
else
  bench() { local limit=$1 suite=$2; shift 2; step measurement "$suite" "$limit" "$PYTHON" -m opsd_kernels bench --device cuda --suite "$suite" --json "$OUT/$suite.json" "${commit[@]}" "$@"; }
  bench 150 ratios --quick --shape qwen3-8b --shape qwen3-0.6b --shape gemma2-2b
  bench 60 sweeps --quick --shape qwen3-8b --dtype bfloat16
  bench 90 memory --shape qwen3-8b --provider opsd --provider torch --provider trl --provider liger-chunked
  bench 60 accuracy --quick
  bench 150 latency --quick --shape qwen3-8b
fi

# ---------------------------------------------------------------- summary

clocks
{
  for name in "${names[@]}"; do
    printf '\n===== %s: status %s, %s s\n' "$name" "$(cat "$WORK/$name.status")" "$(cat "$WORK/$name.seconds")"
    cat "$WORK/$name.log"
  done
} | tail -c 8000000 >"$OUT/log.txt"
say "==> measured"
find "$OUT" -name '*.json' -newer "$WORK/began" -exec timeout 30 "$PYTHON" benchmarks/gpu_summary.py {} + | cut -c1-150 | head -c 7000
if wanted tests; then
  grep -E '^(FAILED|ERROR)' "$WORK/tests.log" | cut -c1-160 | head -15
fi
say "==> summary, $SECONDS s; all output in $OUT/log.txt"
for name in "${names[@]}"; do
  status=$(cat "$WORK/$name.status")
  case $status in 0) word=ok ;; 124 | 137) word="out of time" ;; 125) word="no time left" ;; *) word="failed, status $status" ;; esac
  printf '    %-10s %-18s %4s s  %s\n' "$name" "$word" "$(cat "$WORK/$name.seconds")" \
    "$(grep -E '[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY|chunks of rows' "$WORK/$name.log" | tail -1 | cut -c1-100)"
done
say "correctness: ${failed[*]:-every step passed}; measurements without a result: ${missed[*]:-none}"
[ "${#failed[@]}" = 0 ]
