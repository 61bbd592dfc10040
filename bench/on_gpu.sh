#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command, on a machine with torch and triton and without a network.
#
#   bench/on_gpu.sh [--minutes N] RESULTS_DIR
#
# What only a GPU can answer first (tests/test_gpu.py), then the other tests (together a third of the time at most),
# compute-sanitizer over a few of them, every way to compute a product or a convolution beside the one that is picked (a
# quarter of what is left), whole models (a fifth), then the benchmark, the most telling rows first. Every step writes
# into RESULTS_DIR as it goes: stopped at any minute, what was done is there. The exit status is 1 if a test failed, if
# the sanitizer found something, or if nothing could be measured. FASTLAYERS_COMMIT names the commit in the results where
# the copy has no git history.
set -uo pipefail

minutes=20
while [[ $# -gt 0 ]]; do
    case $1 in
        --minutes) minutes=$2; shift 2 ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "on_gpu.sh: unknown option $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
if [[ $# -ne 1 || ! $minutes =~ ^[0-9]+$ || $minutes -lt 1 ]]; then
    echo "usage: bench/on_gpu.sh [--minutes N] RESULTS_DIR" >&2
    exit 2
fi
mkdir -p "$1"
results=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
begin=$SECONDS
status=0
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
# The checkout itself is what runs: nothing to install, and no other fastlayers can come before it.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

left() { echo $((60 * minutes - (SECONDS - begin))); }

note() {
    echo "$*" | tee -a "$results/summary.txt"
}

: >"$results/summary.txt"
note "fastlayers on a GPU: $(date -u +%Y-%m-%dT%H:%MZ), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo "${FASTLAYERS_COMMIT:-unknown}"), $minutes minutes"

where=$("$python" -c 'import fastlayers; print(fastlayers.__file__)' 2>"$results/import.log") || {
    note "import: FAILED, $(tail -n 1 "$results/import.log")"
    exit 1
}
note "import: $where"
if "$python" -m fastlayers >"$results/self-check.log" 2>&1; then
    note "self-check: passed"
else
    note "self-check: FAILED (self-check.log)"
    status=1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    note "GPU: none, so nothing else is run"
    exit 1
fi
note "GPU: $("$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)')"

# What a plain clone of the suite needs and may be missing here is left out by name, and said so.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
without=()
for pair in sklearn:tests/test_demo.py build:tests/test_house.py; do
    "$python" -c "import ${pair%%:*}" 2>/dev/null || { without+=("--ignore=${pair#*:}"); note "tests: without ${pair#*:}, ${pair%%:*} is not installed"; }
done
limit=$((60 * minutes / 3))

run_tests() { # NAME SECONDS ARGUMENT...
    local name=$1 seconds=$2 log=$results/$1.log code
    shift 2
    # A line for each test, for a run that is stopped prints no summary.
    timeout --kill-after=10 "$seconds" "$python" -m pytest -v -p no:benchmark "${workers[@]}" "$@" >"$log" 2>&1
    code=$?
    if [[ $code -eq 124 ]]; then
        note "$name: stopped after $seconds s: $(grep -c PASSED "$log") passed, $(grep -c FAILED "$log") failed"
        ! grep -q FAILED "$log" || status=1
    else
        note "$name: $(tail -n 1 "$log")"
    fi
    [[ $code -eq 0 || $code -eq 124 ]] || status=1
}

tests_begin=$SECONDS
# Alone and with an end, for it may wait for ever: a protocol between warps that no device has seen yet.
if timeout --kill-after=10 90 "$python" -m pytest -q -p no:benchmark -p no:xdist tests/test_gpu.py -k specialized \
    >"$results/specialized.log" 2>&1; then
    export FASTLAYERS_SPECIALIZED=1
fi
note "specialized products: $(tail -n 1 "$results/specialized.log")"
run_tests tests-of-the-gpu $((limit / 2)) tests/test_gpu.py -k "not specialized"
run_tests tests $((limit - (SECONDS - tests_begin))) --ignore=tests/test_gpu.py "${without[@]}"

if [[ $(left) -lt 120 ]]; then
    note "compute-sanitizer: left out, too little time"
elif ! command -v compute-sanitizer >/dev/null; then
    note "compute-sanitizer: not on this machine"
else
    # torch's caching allocator hides what lies between tensors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $(($(left) / 6)) compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$python" -m pytest -q -x -p no:cacheprovider tests/test_contract.py -k "forward_and_gradients and (float16 or float32)" \
        >"$results/memcheck.log" 2>&1
    code=$?
    case $code in
        0) note "compute-sanitizer memcheck: $(grep -h 'ERROR SUMMARY' "$results/memcheck.log" | tail -n 1)" ;;
        124) note "compute-sanitizer memcheck: stopped for time, $(grep -c '========= Invalid' "$results/memcheck.log") invalid accesses seen" ;;
        *) note "compute-sanitizer memcheck: FAILED (memcheck.log)"; status=1 ;;
    esac
fi

if [[ $(left) -lt 240 ]]; then
    note "picks: left out, too little time"
else
    own=$(($(left) / 4))
    timeout --kill-after=10 $((own + 60)) "$python" -m bench picks --minutes "$((own / 60)).$((own % 60 / 6))" \
        --out "$results/picks.jsonl" >"$results/picks.log" 2>&1
    code=$?
    [[ $code -eq 0 ]] || { note "picks: ended with status $code (picks.log)"; status=1; }
    note "$(grep -E '^(linear|conv2d): ' "$results/picks.log" | sed 's/^/picks: /')"
fi

if [[ $(left) -lt 240 ]]; then
    note "whole models: left out, too little time"
else
    # Without transformers and timm, those of torch alone.
    own=$(($(left) / 5))
    timeout --kill-after=10 $((own + 60)) "$python" -m bench models --minutes "$((own / 60)).$((own % 60 / 6))" \
        --out "$results/models" >"$results/models.log" 2>&1
    code=$?
    [[ $code -eq 0 ]] || { note "whole models: ended with status $code (models.log)"; status=1; }
    [[ ! -s $results/models/models.md ]] || note "$(sed 's/^/whole models: /' "$results/models/models.md")"
fi

seconds=$(($(left) - 15))
if [[ $seconds -lt 45 ]]; then
    note "benchmark: left out, too little time"
    exit 1
fi
# The benchmark keeps to its own time, and needs a moment more to write its tables; timeout is for what hangs.
own=$((seconds - 30))
timeout --kill-after=10 "$seconds" "$python" -m bench --minutes "$((own / 60)).$((own % 60 / 6))" --out "$results/bench" 2>&1 |
    tee "$results/bench.log"
code=${PIPESTATUS[0]}
[[ $code -eq 0 ]] || { note "benchmark: ended with status $code (bench.log)"; status=1; }
file=$results/bench/results.json
[[ -s $file ]] || file=$results/bench/rows.jsonl
if [[ -s $file ]]; then
    echo
    "$python" -m bench report "$file" --markdown "$results/bench/results.md" 2>&1 | tee -a "$results/report.txt"
    "$python" -m bench report "$file" --plots "$results/bench/plots" >/dev/null 2>&1 ||
        note "plots: none without matplotlib; elsewhere: python -m bench report $(basename "$file") --plots DIR"
fi
echo
cat "$results/summary.txt"
exit "$status"
