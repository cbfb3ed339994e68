#!/usr/bin/env bash
# gpu_session.sh: everything that a machine with a GPU is needed for, in one unattended run: the tests, the benchmarks,
# a short training run and text from it, and the kernels' tests again under compute-sanitizer for as long as time is
# left. The programs come from pack.sh. Each step has its own time limit; what every step came to stands in summary.txt
# and at the end of the output.
#
#   BIN=FOLDER           what pack.sh made (default: where this script is)
#   LINES_SHOWN=40       lines of each step's output that are shown; all of it is in session.log
#   RESULTS=FOLDER       where the log and tables go (default: gpu_results)
#   PARTS="tests bench decode train infer sanitizer"   what to do, in this order; infer needs train
#   TOTAL=520            seconds for all of it
#   JOBS=                test programs at a time (default: one for each processor)
#   TEST_LIMIT=75        seconds for each test program
#   BENCH_BUDGET=170     the benchmark's own budget; it is stopped 30 seconds later
#   BENCH_FLAGS=         further flags of the benchmark
#   DECODE_BUDGET=60     the same for the benchmark of decoding
#   DECODE_FLAGS=
#   TRAIN_UPDATES=60     updates of the training run, and of the same in 8 bits
#   TRAIN_LIMIT=75       seconds for each
#   INFER_LIMIT=30       seconds for each text, and for the losses with attention cut to k keys
#   SANITIZER_LIMIT=75   seconds for each test program under each tool of compute-sanitizer; 0: none
#   SANITIZER_TESTS=     the programs (default: all kernels' tests)
#   SANITIZER_JOBS=4     of them at a time: more slow each other down, and tests beside them
#   CUDA_HOME            where the CUDA Toolkit is, if not /usr/local/cuda
#
# PASS and FAIL mean what they say: a test that does not end within its limit has failed, too. STOPPED is for
# compute-sanitizer alone: the time limit came first, and nothing bad had been seen until then.
set -u
bin=$(cd "${BIN:-$(dirname "${BASH_SOURCE[0]}")}" && pwd) || exit 1
if [ -f "$bin/programs.tar.xz" ]; then xz -dc "$bin/programs.tar.xz" | tar -x --no-same-owner -C "$bin" || exit 1; fi
results=${RESULTS:-gpu_results}
total=${TOTAL:-520}
lines=${LINES_SHOWN:-40}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
summary=$results/summary.txt log=$results/session.log
: >"$summary"
: >"$log"
parts=${PARTS-tests bench decode train infer sanitizer}
for part in $parts; do
    case $part in
        tests | bench | decode | train | infer | sanitizer) ;;
        *) echo "FAIL: PARTS takes tests, bench, decode, train, infer and sanitizer, not '$part'" >&2; exit 1 ;;
    esac
done
jobs=${JOBS:-$(nproc)}
SECONDS=0

say() { printf '%s\n' "$1" | tee -a "$summary"; }
outcome() { # outcome WHAT NAME SECONDS [REMARK]
    say "$(printf '%-7s  %-40s %4d s  %s' "$1" "$2" "$3" "${4:-}")"
}

wanted() { [[ " $parts " == *" $1 "* ]]; }

# step NAME LIMIT COMMAND...: runs it within its limit and what is left of the total, and appends its output to the log.
step() {
    local name=$1 limit=$2 left=$((total - SECONDS)) begin=$SECONDS status output remark took
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        outcome SKIPPED "$name" 0 "no time is left"
        return
    fi
    output=$(mktemp "$work/output.XXXXXX") || return
    timeout -k 5 "$limit" "$@" >"$output" 2>&1 </dev/null
    status=$? took=$((SECONDS - begin))
    exec 9>"$work/lock"
    flock 9
    printf '\n==== %s: %s\n' "$name" "$*" | tee -a "$log"
    cat "$output" >>"$log"
    tail -n "$lines" "$output"
    remark=$(grep -aE '^\[doctest\] (test cases|assertions):|^error: |^[0-9]+ tokens, |^dense attention: loss|ERROR SUMMARY|RACECHECK SUMMARY' "$output" |
        sed -E 's/^(\[doctest\]|=+) *//; s/ +/ /g' | paste -sd ';' | cut -c1-160)
    if ((status == 0)); then
        outcome PASS "$name" $took "$remark"
    elif ((status != 124 && status != 137)); then
        outcome FAIL "$name" $took "exit status $status; ${remark:-see session.log}"
    elif [[ $name != *check,* ]]; then
        outcome FAIL "$name" $took "did not end within $limit s"
    elif grep -aqE '^=+ +(Invalid|Error|Race reported|Barrier error)|ERROR: CHECK' "$output"; then
        outcome FAIL "$name" $took "stopped after $limit s, with errors before: see session.log"
    else
        outcome STOPPED "$name" $took "after $limit s"
    fi
    exec 9>&-
}
# The same beside others: a test program waits for one processor most of the time, and shares the GPU. `wait` ends it.
together() {
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    step "$@" &
}

# ---- the machine ----

if ! nvidia-smi -L >"$work/gpus" 2>&1; then
    say "FAIL: there is no NVIDIA GPU here: nvidia-smi says: $(head -n 1 "$work/gpus")"
    exit 1
fi
say "$(head -n 1 "$work/gpus"); $(date -u +%Y-%m-%dT%H:%M:%SZ)"
state() { nvidia-smi -i 0 --query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used --format=csv,noheader; }
say "driver, clocks, temperature, power, memory used: $(state)"

# Our libraries travel with the programs; CUDA's are sought where the toolkit, or else PyTorch's packages, have them.
export LD_LIBRARY_PATH=$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
places=("${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib)
for python in python3 python; do
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null) &&
        places+=("$site"/nvidia/*/lib)
done
for program in "$bin"/{bench,decode,train_gpt2cu,infer_gpt2cu,test_model,bench_cudnn}; do
    for library in $(ldd "$program" 2>/dev/null | awk '/not found/ {print $1}'); do
        for place in "${places[@]}"; do
            [ -e "$place/$library" ] && { LD_LIBRARY_PATH+=:$place; break; }
        done
    done
    lacking=$(ldd "$program" 2>/dev/null | awk '/not found/ {print $1}' | xargs)
    [ -z "$lacking" ] || say "$(basename "$program") lacks shared libraries that were found nowhere: $lacking"
done

# ---- the steps; the sanitizers come last, because they take whatever time there is ----

kernel_tests=(test_attention_decode test_attention_cut test_matvec test_decode_layer test_sampler test_layers test_attention)
if wanted tests; then
    for test in "${kernel_tests[@]}" test_matmul test_decode_step test_infer test_model; do
        together "$test" "${TEST_LIMIT:-75}" "$bin/$test"
    done
    if [ -x "$bin/test_attention_cudnn" ]; then
        together test_attention_cudnn "${TEST_LIMIT:-75}" "$bin/test_attention_cudnn" --test-case="cuDNN*"
    fi
    wait
fi

# shellcheck disable=SC2086
if wanted bench; then
    budget=${BENCH_BUDGET:-170}
    step "benchmark" $((budget + 30)) "$bin/bench" --budget "$budget" -o "$results" ${BENCH_FLAGS:-}
    if [ -x "$bin/bench_cudnn" ]; then
        step "benchmark of attention, with cuDNN's" 60 "$bin/bench_cudnn" --budget 40 --quick --only attention \
            -o "$results/cudnn"
    fi
    step "attention's ladder" 30 "$bin/attention_ladder"
    say "driver, clocks, temperature, power, memory used: $(state)"
fi
# shellcheck disable=SC2086
if wanted decode; then
    budget=${DECODE_BUDGET:-60}
    step "benchmark of decoding" $((budget + 30)) "$bin/decode" --budget "$budget" -o "$results" ${DECODE_FLAGS:-}
    say "driver, clocks, temperature, power, memory used: $(state)"
fi

run=$work/run
if wanted train; then
    updates=${TRAIN_UPDATES:-60}
    step "training, $updates updates" "${TRAIN_LIMIT:-75}" "$bin/train_gpt2cu" --device cuda -l 0.1 -k 8 -x "$updates" \
        -v $((updates / 2 > 0 ? updates / 2 : 1)) -m 5 -s "$updates" -g 64 -n "$updates" -o "$run"
    if [ -f "$run/metrics.jsonl" ]; then cp "$run/metrics.jsonl" "$results/train_metrics.jsonl"; fi
    step "training in 8 bits, $updates updates" "${TRAIN_LIMIT:-75}" "$bin/train_gpt2cu" --device cuda --precision fp8 \
        -l 0.1 -k 8 -x "$updates" -v $((updates / 2 > 0 ? updates / 2 : 1)) -m 5 -s 0 -n 0 -o "$run.fp8"
    if [ -f "$run.fp8/metrics.jsonl" ]; then cp "$run.fp8/metrics.jsonl" "$results/train_fp8_metrics.jsonl"; fi
fi

# Without a checkpoint these fail, which is what they should do.
if wanted infer; then
    infer=("$bin/infer_gpt2cu" --device cuda -e "$run")
    text=("${infer[@]}" -p "The king said to" -n 200 --stats)
    limit=${INFER_LIMIT:-30}
    step "text, dense" "$limit" "${text[@]}"
    step "text, top 8" "$limit" "${text[@]}" --attention topk -k 8
    step "text, pages" "$limit" "${text[@]}" --attention pages --epsilon 0.01
    step "text past the context" "$limit" "${infer[@]}" -n 1200 --greedy
    printf '%s\n' "The king" "A ship" "In the" "She said" "We had" "No one" >"$results/prompts.txt"
    step "six texts side by side" "$limit" "${infer[@]}" -f "$results/prompts.txt" -n 100
    step "losses with k keys" "$limit" "${infer[@]}" --eval "$bin/data/$(cat "$bin/data/default_dataset")_gpt2_val_*.bin" \
        -b 4 -m 4 --cuts 1,8,64 --json "$results/infer_eval.json"
fi

sanitizer=$(command -v compute-sanitizer)
for place in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda*; do
    [ -n "$sanitizer" ] || [ ! -x "$place/bin/compute-sanitizer" ] || sanitizer=$place/bin/compute-sanitizer
done
if wanted sanitizer; then
    limit=${SANITIZER_LIMIT:-75} jobs=${SANITIZER_JOBS:-4}
    read -ra sanitized <<<"${SANITIZER_TESTS:-${kernel_tests[*]}}"
    for tool in memcheck racecheck; do
        for test in "${sanitized[@]}"; do
            if [ "$limit" = 0 ]; then
                outcome SKIPPED "$tool, $test" 0 "SANITIZER_LIMIT is 0"
            elif [ -z "$sanitizer" ]; then
                outcome SKIPPED "$tool, $test" 0 "compute-sanitizer is not installed here"
            else
                together "$tool, $test" "$limit" "$sanitizer" --tool $tool --error-exitcode 99 --print-limit 20 "$bin/$test"
            fi
        done
    done
    wait
fi

echo
echo "==== summary ($SECONDS s in all; the log and tables are in $results)"
cat "$summary"
failed=$(grep -c '^FAIL ' "$summary")
if ((failed > 0)); then echo "FAIL: $failed steps failed"; exit 1; fi
echo "PASS: no step failed"
