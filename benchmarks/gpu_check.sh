#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, Triton and nvcc, without network or package index: five
# minutes of build, correctness and headline numbers, and longer steps by name. Steps are independent: a failed
# step is reported, and the others still run.
#
#   benchmarks/gpu_check.sh [--dry-run] [--commit ID] [--only STEP,...]
#
#   --dry-run   every command on the CPU: Triton interpreted, tiny sizes, no build, no sanitizer
#   --commit    recorded in the results where this copy of the sources has no git
#   --only      these steps alone, in at most nine minutes
#
#   build       the extension in place, with the code that serves this GPU in a release       2 minutes at most
#   doctor      what serves here
#   smoke       every kernel of the CUDA library, and a share of tests/gpu on each backend    60 s
#   ratios      forward and backward against the bare GEMMs, TRL, Liger and unsloth: heads of Qwen3-8B and 0.6B
#   sweeps      row sweeps against the copy bandwidth and the time that opsd plan predicts
#   by name     tests memcheck racecheck chunked gemma memory accuracy latency
#
# GPU_CHECK_TESTS is an expression for pytest -k in a dry run.
# Results go to $OUT, or to benchmarks/results/<GPU>, as steps finish: steps.json, one JSON per suite, log.txt. Where
# all correctness steps of a run passed, opsd_kernels/gpu_checks.json gets a record, by which calls take the CUDA
# kernels: commit it. PYTHON names the interpreter (python3). Other libraries are measured if they can be imported
# (PYTHONPATH). The exit status is 0 if every correctness step passed.
set -uo pipefail
cd "$(dirname "$0")/.."

DRY_RUN= COMMIT= ONLY=
STEPS=(build doctor smoke tests memcheck racecheck ratios sweeps chunked gemma memory accuracy latency)
usage() { sed -n '2,25s/^# \{0,1\}//p' "$0"; }
refuse() { echo "gpu_check: $1" >&2; usage >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --commit) COMMIT=${2-}; shift ;;
    --only)
      ONLY=${2-}; shift
      [ -n "$ONLY" ] || refuse "--only: expected steps"
      for name in ${ONLY//,/ }; do     # a misspelt step would pass by running nothing
        [[ " ${STEPS[*]} " == *" $name "* ]] || refuse "--only: expected steps of: ${STEPS[*]}; got $name"
      done ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "unknown argument $1" ;;
  esac
  shift || true
done

SECONDS=0
DEFAULT=build,doctor,smoke,ratios,sweeps
MOST=290                                      # seconds in all, which leaves ten for the summary
[ -n "$ONLY" ] && MOST=530
PYTHON=${PYTHON:-python3}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
OUT=${OUT:-benchmarks/results/${gpu#nvidia-}}
[ -n "$DRY_RUN" ] && OUT=$(mktemp -d)         # a dry run has no results
[ -z "${gpu}${DRY_RUN}" ] && { echo "gpu_check: nvidia-smi names no GPU (--dry-run needs none)" >&2; exit 2; }
WORK=$(mktemp -d)                             # one log per step, then one for all
trap 'rm -rf "$WORK"; [ -n "$DRY_RUN" ] && rm -rf "$OUT"' EXIT
mkdir -p "$OUT"; : >"$OUT/log.txt"; : >"$WORK/steps"

export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ -n "$DRY_RUN" ] && export OPSD_GPU_TESTS=interpret OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} COLUMNS=160
unset OPSD_BACKEND OPSD_WORKSPACE_BYTES
if [ -z "$COMMIT" ]; then                     # now, before the record changes a file of the package
  COMMIT=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  [ -n "$(git status --porcelain --untracked-files=no -- opsd_kernels csrc 2>/dev/null)" ] && COMMIT+=-dirty
fi

names=() failed=() missed=() passed=() suites=()
wanted() { [[ ",${ONLY:-$DEFAULT}," == *",$1,"* ]]; }
say() { printf '%s\n' "$*"; }
left() { echo $((MOST - SECONDS)); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }
result() { grep -aE '[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY|chunks of rows' "$WORK/$1.log" | tail -1 | tr -d '"\\=[:cntrl:]' | sed 's/^ *//;s/ *$//' | cut -c1-100; }

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

# end KIND NAME...: wait for steps, and write down their results; KIND is correctness or measurement
end() {
  local kind=$1 name status; shift
  for name in "$@"; do
    wanted "$name" || continue
    [ -f "$WORK/$name.pid" ] && wait "$(cat "$WORK/$name.pid")"
    status=$(cat "$WORK/$name.status" 2>/dev/null || echo 1)
    printf '{"step": "%s", "kind": "%s", "status": %d, "seconds": %d, "result": "%s"}\n' \
      "$name" "$kind" "$status" "$(cat "$WORK/$name.seconds")" "$(result "$name")" >>"$WORK/steps"
    printf '{\n "commit": "%s",\n "gpu": "%s",\n "steps": [\n  %s\n ]\n}\n' "$COMMIT" "$gpu" "$(sed '$!s/$/,/;2,$s/^/  /' "$WORK/steps")" >"$OUT/steps.json"
    { printf '\n===== %s: status %s, %s s\n' "$name" "$status" "$(cat "$WORK/$name.seconds")"; tail -c 2000000 "$WORK/$name.log"; } >>"$OUT/log.txt"
    [ "$status" = 0 ] && { passed+=("$name=$(result "$name")"); say "    $name: ok, $(cat "$WORK/$name.seconds") s"; continue; }
    if [ "$kind" = correctness ]; then failed+=("$name=$status"); else missed+=("$name"); fi
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
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  case $capability in                                    # the machine code of setup.py for this GPU, and no other
    80) ;;
    90 | 100) capability+=a ;;
    *) capability= ;;                                    # code of an older GPU or PTX serves there: all is built
  esac
  wanted build && rm -f opsd_kernels/_cuda.abi3.so       # may be of other architectures; its objects are kept
  OPSD_BUILD_CUDA=1 OPSD_CUDA_ARCHITECTURES=$capability step correctness build 120 "$PYTHON" setup.py build_ext --inplace
fi
step measurement doctor 40 "$PYTHON" -m opsd_kernels doctor
wanted doctor && sed -n '1,60p' "$WORK/doctor.log"

# ---------------------------------------------------------------- correctness

workers=$("$PYTHON" -c 'import xdist, os; print(f"-n{max(1, min(12, os.cpu_count() - 4))}")' 2>/dev/null)
tests=(env CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests/gpu -q -ra -p no:cacheprovider --maxfail=60 --durations=8 --tb=short)
if [ -n "$DRY_RUN" ]; then
  tests+=(-k "${GPU_CHECK_TESTS:-test}")
  step correctness smoke 200 "${tests[@]}"
  step correctness tests 500 "${tests[@]}"
  step correctness memcheck 200 "$PYTHON" tests/gpu/sanitize.py torch
else
  tests+=($workers)
  OPSD_GPU_TESTS=smoke step correctness smoke 80 "${tests[@]}"
  begin tests 260 "${tests[@]}"
  begin memcheck 200 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 "$PYTHON" tests/gpu/sanitize.py cuda
  begin racecheck 260 compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 20 "$PYTHON" tests/gpu/sanitize.py cuda
  end correctness tests memcheck racecheck
  timeout 40 "$PYTHON" benchmarks/gpu_record.py --commit "$COMMIT" --passed "${passed[@]}" --failed "${failed[@]}" 2>&1 | tail -3
  cp opsd_kernels/gpu_checks.json "$OUT"
fi

# ---------------------------------------------------------------- measurements, one at a time

clocks
# bench NAME SECONDS OPTION...: a suite that runs out of time keeps its finished rows
bench() {
  local name=$1 limit=$2; shift 2
  local where=(--quick --device cuda "$@")
  [ -n "$DRY_RUN" ] && where=(--quick --device cpu "$@" --shape tiny --provider opsd --provider torch)
  wanted "$name" && suites+=("$OUT/$name.json")
  step measurement "$name" "$limit" "$PYTHON" -m opsd_kernels bench --json "$OUT/$name.json" --commit "$COMMIT" "${where[@]}"
}
big=(--shape qwen3-8b) heads=(--shape qwen3-8b --shape qwen3-0.6b) gemma=(--shape gemma2-2b)
headline=(--provider opsd --provider opsd-cuda --provider opsd-triton --provider trl --provider liger-triton --provider unsloth)
[ -n "$DRY_RUN" ] && big=() heads=() gemma=() headline=()
bench ratios 110 --suite ratios "${heads[@]}" "${headline[@]}"
bench sweeps 60 --suite sweeps --dtype bfloat16 "${big[@]}"
bench chunked 200 --suite ratios "${heads[@]}" --provider opsd --provider liger-chunked    # compiles for each setting
bench gemma 120 --suite ratios "${gemma[@]}" "${headline[@]}"
bench memory 90 --suite memory "${big[@]}" --provider opsd --provider torch --provider trl --provider liger-triton
bench accuracy 90 --suite accuracy
bench latency 200 --suite latency "${big[@]}"

# ---------------------------------------------------------------- summary

clocks
say "==> measured"
for suite in "${suites[@]}"; do
  [ -f "$suite" ] && timeout 30 "$PYTHON" benchmarks/gpu_summary.py "$suite"
done | cut -c1-150 | head -c 7000
wanted tests && grep -hE '^(FAILED|ERROR)' "$WORK/tests.log" | cut -c1-160 | head -15
wanted smoke && grep -hE '^(FAILED|ERROR)' "$WORK/smoke.log" | cut -c1-160 | head -15
say "==> summary, $SECONDS s; results and all output in $OUT"
for name in "${names[@]}"; do
  status=$(cat "$WORK/$name.status")
  case $status in 0) word=ok ;; 124 | 137) word="out of time" ;; 125) word="no time left" ;; *) word="failed, status $status" ;; esac
  printf '    %-10s %-18s %4s s  %s\n' "$name" "$word" "$(cat "$WORK/$name.seconds")" "$(result "$name")"
done
failed=("${failed[@]%%=*}")
say "correctness: ${failed[*]:-every step passed}; measurements without a result: ${missed[*]:-none}"
[ "${#failed[@]}" = 0 ]
