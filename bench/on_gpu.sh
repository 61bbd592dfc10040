#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command, on a machine with torch and triton and without a network.
#
#   bench/on_gpu.sh [--minutes N] [--parts "NAME..."] [--pack DIR] RESULTS_DIR
#
# The parts, in the order of their value, each with a share of the time that is left: ceilings (what is installed, what a copy
# and torch's products reach), tests (what only a GPU can answer, and every layer in every dtype), specialized (a kernel that may
# wait for ever), picks (every way to compute a product or a convolution beside the one that is picked, and torch's), speed (the
# benchmark, the most telling rows first), models (whole ones), self-check, suite (the other tests); by name alone, sanitizer.
#
# Several processes first compile what a part is going to time. Every part writes into RESULTS_DIR as it goes, and
# RESULTS_DIR/summary.txt says what came of it. With the same RESULTS_DIR, a second run goes on where the first one stopped:
# parts that are done are left out, and tests, jobs and rows that are there aren't repeated. With --pack, DIR gets the summary
# and all results in one archive after each part, without compiled kernels. The exit status is 1 if a test failed, or if a part
# could not do its work. FASTLAYERS_COMMIT names the commit in the results where the copy has no git history.
set -uo pipefail

minutes=20 parts="ceilings tests specialized picks speed models self-check suite" pack=
while [[ $# -gt 0 ]]; do
    case $1 in
        --minutes) minutes=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --parts) parts=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --pack) pack=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "on_gpu.sh: unknown option $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
declare -A weight=([ceilings]=1 [tests]=10 [specialized]=2 [picks]=6 [speed]=4 [models]=4 [self-check]=1 [suite]=4 [sanitizer]=4)
known=1
for part in $parts; do [[ -n ${weight[$part]:-} ]] || known=; done
if [[ $# -ne 1 || ! $minutes =~ ^[0-9]+(\.[0-9]+)?$ || $minutes =~ ^0+(\.0+)?$ || -z $known ]]; then
    echo "usage: bench/on_gpu.sh [--minutes N] [--parts \"${!weight[*]}\"] [--pack DIR] RESULTS_DIR" >&2
    exit 2
fi
end=$((SECONDS + $(awk "BEGIN { print int(60 * $minutes) }")))
mkdir -p "$1/done" "$1/warm" ${pack:+"$pack"}
results=$(cd "$1" && pwd)
[[ -z $pack ]] || pack=$(cd "$pack" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
status=0
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
# The checkout itself is what runs: nothing to install, and no other fastlayers can come before it.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# All processes compile into one cache. Inductor would begin one of its own compilers for each core in each process.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$results/triton-cache} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$results/inductor-cache}
export FASTLAYERS_TEST_SEED=${FASTLAYERS_TEST_SEED:-$RANDOM}
MORE=75 # the status of a part that did its work, but of which there is more to do
cores=$(nproc)
processes=$((cores > 3 ? (cores > 16 ? 14 : cores - 2) : 2))

left() { echo $((end - SECONDS)); }

note() { echo "$*" | tee -a "$results/summary.txt"; }

limited() { # SECONDS COMMAND...: without its end it is stopped, and killed if that doesn't help
    local seconds=$1
    shift
    [[ $seconds -gt 0 ]] || return 124
    timeout --kill-after=5 "$seconds" "$@"
}

pack_results() {
    [[ -n $pack ]] || return 0
    cp "$results/summary.txt" "$pack/summary.txt"
    tar -C "$results" --exclude=./triton-cache --exclude=./inductor-cache --exclude=./warm -czf "$pack/results.tar.gz.new" . &&
        mv "$pack/results.tar.gz.new" "$pack/results.tar.gz"
}

minutes_of() { awk "BEGIN { print $1 / 60 }"; }

warm() { # SECONDS COMMAND...: as many processes as there are cores compile a share each; what they measure counts for nothing
    local until=$((SECONDS + $1)) i pids=()
    shift
    for ((i = 0; i < processes; i++)); do
        limited $((until - SECONDS)) "$python" -m bench "$@" --share "$i/$processes" --minutes "$(minutes_of $((until - SECONDS - 2)))" \
            --out "$results/warm/$1-$i$([[ $1 != picks ]] || echo .jsonl)" >"$results/warm/$1-$i.log" 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
}

bench() { # NAME SECONDS ARGUMENT...: a command of bench, begun again where a kernel cost its process the GPU
    local name=$1 until=$((SECONDS + $2)) code=3 attempt
    shift 2
    for ((attempt = 0; attempt < 5 && code == 3; attempt++)); do
        # It keeps to its own time, and needs a moment more to write its tables; timeout is for what hangs.
        limited $((until - SECONDS)) "$python" -m bench "$@" --minutes "$(minutes_of $((until - SECONDS - 15)))" >>"$results/$name.log" 2>&1
        code=$?
        [[ $code -ne 3 ]] || note "$name: a kernel cost the process the GPU ($name.log)"
    done
    [[ $code -eq 0 ]] || { note "$name: ended with status $code ($name.log)"; status=1; }
    return $code
}

share_of_tests() { # NAME I UNTIL ARGUMENT...: one of the processes; a test may cost it the GPU, or hang
    local record=$results/$1/$2.jsonl log=$results/$1/$2.log until=$3 share=$2/$processes before code
    shift 3
    touch "$record"
    while true; do
        before=$(wc -l <"$record")
        limited $((until - SECONDS)) "$python" -m pytest -q -W default -p no:cacheprovider -m "not long and not exam" \
            --continue-on-collection-errors --record "$record" --share "$share" "$@" >>"$log" 2>&1
        code=$?
        if [[ $code -eq 124 || $code -eq 137 ]]; then
            printf '\n{"stopped": true}\n' >>"$record"
            return 1
        fi
        tail -n 1 "$record" | grep -q '"finished"' && return 0
        # Nothing but that a process began: it isn't a test that ends it.
        [[ $(wc -l <"$record") -gt $((before + 1)) ]] || return 1
    done
}

run_tests() { # NAME SECONDS ARGUMENT...
    local name=$1 until=$((SECONDS + $2)) i pids=() all=0
    shift 2
    mkdir -p "$results/$name"
    for ((i = 0; i < processes; i++)); do
        # Plugins that happen to be installed have no part in this.
        PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 TORCHINDUCTOR_COMPILE_THREADS=1 share_of_tests "$name" "$i" "$until" "$@" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i" || all=$MORE; done
    [[ $all -eq 0 ]] || note "$name: not all were run"
    "$python" tests/recorded.py "$results/$name"/*.jsonl >"$results/$name.txt" 2>&1 || status=1
    note "$(sed "1s/^tests:/$name:/" "$results/$name.txt")"
    return $all
}

part_ceilings() {
    limited "$1" "$python" -m bench ceilings --out "$results/ceilings.json" >"$results/ceilings.log" 2>&1
    local code=$?
    note "$(if [[ $code -eq 0 ]]; then cat "$results/ceilings.log"; else echo "ceilings: FAILED with status $code, $(tail -n 1 "$results/ceilings.log")"; fi)"
    return $code
}

part_tests() { run_tests tests "$1" tests/test_gpu.py tests/test_contract.py -k "(test_gpu and not specialized) or forward_and_gradients"; }

part_suite() { run_tests suite "$1" tests --ignore=tests/test_gpu.py -k "not forward_and_gradients"; }

part_specialized() {
    local processes=4 code
    run_tests specialized "$1" tests/test_gpu.py -k specialized --hang 40
    code=$?
    [[ $code -ne 0 ]] || ! grep -q ' 0 failed, 0 died' "$results/specialized.txt" || touch "$results/specialized-is-right"
    return $code
}

part_picks() {
    [[ ! -e $results/specialized-is-right ]] || export FASTLAYERS_SPECIALIZED=1
    local until=$((SECONDS + $1)) code all
    warm $(($1 * 2 / 5)) picks --once
    bench picks $((until - SECONDS)) picks --out "$results/picks.jsonl"
    code=$?
    all=$(grep -E '^[0-9]+ of [0-9]+ jobs' "$results/picks.log" | tail -n 1)
    note "picks: ${all:-nothing was measured}"
    note "$(grep -E '^(linear|conv2d|tf32|float32): ' "$results/picks.log" | tail -n 12 | sed 's/^/picks: /')"
    [[ $code -ne 0 || $(awk '{ print ($1 < $3) }' <<<"$all") -eq 0 ]] || code=$MORE
    return $code
}

part_speed() {
    local until=$((SECONDS + $1)) code file=$results/bench/results.json
    warm $(($1 / 3)) run --providers eager ours --seconds 0
    bench speed $((until - SECONDS)) run --out "$results/bench"
    code=$?
    [[ -s $file && $code -eq 0 ]] || file=$results/bench/rows.jsonl
    if [[ -s $file ]]; then
        "$python" -m bench report "$file" --markdown "$results/bench/results.md" >"$results/report.txt" 2>&1
        note "$(sed 's/^/speed: /' "$results/report.txt" | tail -n 60)"
    fi
    return $((code == 0 ? MORE : code))
}

part_models() {
    local until=$((SECONDS + $1)) code processes=$((processes > 4 ? 4 : processes))
    warm $(($1 / 4)) models --seconds 0 --match '[|] (accelerate|fuse)$'
    # Without transformers and timm, those of torch alone. What torch compiles comes after all models have been run without it.
    bench models $(((until - SECONDS) * 2 / 3)) models --out "$results/models" --seconds 0.5 --match '[|] (eager|accelerate|fuse)$'
    code=$?
    if [[ $code -le 1 ]]; then
        bench models $((until - SECONDS)) models --out "$results/models" --seconds 0.5
        code=$?
    fi
    [[ ! -s $results/models/models.md ]] || note "$(sed 's/^/models: /' "$results/models/models.md")"
    return $((code == 0 ? MORE : code))
}

part_self-check() {
    limited "$1" "$python" -m fastlayers >"$results/self-check.log" 2>&1
    local code=$?
    note "self-check: $([[ $code -eq 0 ]] && echo passed || echo "FAILED with status $code (self-check.log)")"
    return $code
}

part_sanitizer() {
    command -v compute-sanitizer >/dev/null || { note "compute-sanitizer: not on this machine"; return 0; }
    # torch's caching allocator hides what lies between tensors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$1" compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$python" -m pytest -q -x -W default -p no:cacheprovider tests/test_contract.py \
        -k "forward_and_gradients and (float16 or float32)" >"$results/memcheck.log" 2>&1
    local code=$? log=$results/memcheck.log
    if grep -q "Device not supported" "$log"; then
        note "compute-sanitizer: doesn't work on this machine"
    elif [[ $code -eq 124 ]]; then
        note "compute-sanitizer memcheck: stopped for time, $(grep -c '========= Invalid' "$log") invalid accesses seen"
    else
        note "compute-sanitizer memcheck: $(grep -h 'ERROR SUMMARY' "$log" | tail -n 1) (memcheck.log)"
        return $code
    fi
}

commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo "${FASTLAYERS_COMMIT:-unknown}")
note "fastlayers on a GPU: $(date -u +%Y-%m-%dT%H:%MZ), commit $commit, $minutes minutes, FASTLAYERS_TEST_SEED=$FASTLAYERS_TEST_SEED"
# One process, and what is asked of it, for each takes seconds to begin.
where=$(limited 120 "$python" -c '
import fastlayers, torch, triton
print(fastlayers.__file__)
print("GPU:", *([torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__] if torch.cuda.is_available() else ["none"]))
' 2>"$results/import.log") || {
    note "import: FAILED, $(tail -n 1 "$results/import.log")"
    pack_results
    exit 1
}
note "$where"
if [[ $where == *"GPU: none"* ]]; then
    note "so nothing is run"
    pack_results
    exit 1
fi

for part in $parts; do
    [[ ! -e $results/done/$part ]] || continue
    sum=0
    for other in $parts; do [[ -e $results/done/$other ]] || sum=$((sum + ${weight[$other]})); done
    # 10 seconds for the tables and archives that follow; none has time for less than 40.
    seconds=$((($(left) - 10) * ${weight[$part]} / sum))
    [[ $seconds -ge 40 ]] || seconds=40
    [[ $seconds -le $(($(left) - 10)) ]] || seconds=$(($(left) - 10))
    if [[ $seconds -lt 15 ]]; then
        note "$part: left out, too little time"
        continue
    fi
    begin=$SECONDS
    "part_$part" "$seconds"
    code=$?
    if [[ $code -eq 0 ]]; then touch "$results/done/$part"; elif [[ $code -ne $MORE ]]; then status=1; fi
    note "$part: $((SECONDS - begin)) of $seconds seconds"
    weight[$part]=0
    pack_results
done
! compgen -G "$results/*/[0-9]*.jsonl" >/dev/null || note "$("$python" tests/recorded.py --kernels "$results"/*/[0-9]*.jsonl 2>&1)"
pack_results
echo
cat "$results/summary.txt"
exit "$status"
