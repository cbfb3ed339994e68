#!/usr/bin/env bash
# The trainer as a user runs it, on the CPU backend: training condenses attention at little cost, a killed run resumes
# bit for bit, bad input is one sentence, and what is written can be read again.
set -u
cd "$(dirname "$0")/.."
root=$PWD
train=$root/train_gpt2cpu
source tests/script.sh
run() { "$train" "$@" >"$work/log" 2>&1; }
# The number that a key has in the first, the last line of a metrics file that has that key.
updates_in() { grep -c '"loss"' "$1/metrics.jsonl" 2>/dev/null; true; }
wait_for_updates() { # so many of them, in that folder
    local updates=$1 folder=$2
    waits_for '[ "0$(updates_in "$folder")" -ge "$updates" ]'
}
first() { grep -oE "\"$2\":[0-9][-0-9.e]*" "$1/metrics.jsonl" | head -n 1 | cut -d: -f2; }
last() { grep -o "\"$2\":[-0-9.e]*" "$1/metrics.jsonl" | tail -n 1 | cut -d: -f2; }
less() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }

text=$root/tests/fixtures/plays.txt
"$root/build/tokenize" --tokenizer bytes -o "$work/text" "$text" >"$work/log" 2>&1 || bad "tokenizing"
data=(-i "$work/text_train_*.bin" -j "$work/text_val_*.bin")
small=("${data[@]}" -e d6 -b 2 -t 32 -s 0 -v 0 -m 1)
quick=("${data[@]}" -e tiny -b 2 -t 64 -s 0 -v 0 -m 2)

# ---- the device it runs on: one line, and true of this program
says_device() { # what, a pattern; then the program
    env -u GPT2_DEVICE_SAID CUDA_VISIBLE_DEVICES= "$2" -i "no/such*.bin" -v 0 -s 0 >"$work/log" 2>&1
    [ "$(grep -c "^running on the CPU: " "$work/log")" = 1 ] && grep -qE "^running on the CPU: $1" "$work/log"
}
cp "$train" "$work/train_gpt2cu"
check "the CPU program says that it is one, and nothing of what else was built" says_device "this is the CPU program$" "$train"
check "the copy of it that make gives the other's name where there is no nvcc says that" says_device "this program was built without the CUDA Toolkit$" "$work/train_gpt2cu"
[ ! -e "$root/train_gpt2cu" ] || check "the program for the GPU, where there is none" says_device "(no NVIDIA GPU can be used \(|this program was built without )" "$root/train_gpt2cu"

# ---- OpenBLAS's kernels, which it names where it has a choice
blas_core() { # the user's choice, or nothing
    env -u OPENBLAS_CORETYPE OPENBLAS_VERBOSE=2 ${1:+OPENBLAS_CORETYPE=$1} "$train" -i "no/such*.bin" -v 0 -s 0 2>&1 | sed -n 's/^Core: //p' | tail -n 1
}
old=$(blas_core Nehalem)
if [ -n "$old" ]; then
    check "the user chooses OpenBLAS's kernels" '[ "$old" = Nehalem ]'
    ! grep -qw avx2 /proc/cpuinfo || check "otherwise they use the vectors that this processor has" '[[ "$(blas_core)" =~ ^(Haswell|Zen|SkylakeX|Cooperlake|SapphireRapids)$ ]]'
fi

# ---- OpenMP may give fewer threads than it announces, for which OpenBLAS would wait
for fewer in OMP_THREAD_LIMIT=1 OMP_DYNAMIC=true OMP_MAX_ACTIVE_LEVELS=0 "OMP_NUM_THREADS=8 OMP_THREAD_LIMIT=2"; do
    # shellcheck disable=SC2086  # settings are words
    env $fewer timeout -s KILL 60 "$train" "${quick[@]}" -x 1 -n 0 -o "$work/fewer" >"$work/log" 2>&1
    check "it runs with $fewer" '[ $? = 0 ]'
    rm -rf "$work/fewer"
done

# ---- a limit on the address space: less than a run has at its peak, by less and by more than a buffer of OpenBLAS
limited() { # with so many threads
    export OMP_NUM_THREADS=$1
    rm -rf "$work/peak"
    "$train" "${quick[@]}" -x 100000 -n 0 -o "$work/peak" >"$work/log" 2>&1 &
    wait_for_updates 1 "$work/peak"
    peak=$(awk '/^VmPeak/ { print $2 }' "/proc/$!/status")
    kill -KILL $! && wait $! 2>/dev/null
    refused=0
    for less in 30000 70000 110000 150000 190000 280000 410000; do
        [ "$peak" -gt "$less" ] || continue
        : >"$work/log"
        (ulimit -v $((peak - less)) && timeout -s KILL 60 "$train" "${quick[@]}" -x 1 -n 0 -o "$work/in_limit" >"$work/log" 2>&1)
        status=$?
        check "with $less kB less address space than a run has used, $1 threads: it runs, or ends with a sentence" '
            [ $status = 0 ] || [ "$(grep -cE "^error: .*: (raise|lower)|^libgomp: Thread creation failed|error while loading shared libraries" "$work/log")" = 1 ]'
        [ $status = 0 ] || refused=1
        rm -rf "$work/in_limit"
    done
    check "and by the most it does not" '[ $refused = 1 ]'
}
threads=${OMP_NUM_THREADS-}
for n in 1 2 4; do limited $n; done
[ -n "$threads" ] && export OMP_NUM_THREADS=$threads || unset OMP_NUM_THREADS

# ---- plain GPT-2, its masses measured or not
for topk in 0 8; do run "${quick[@]}" -x 4 -v 2 -l 0 -k $topk -o "$work/plain$topk" || bad "-l 0 -k $topk"; done
losses() { grep -oE '"(loss|val_ce)":[^,}]*' "$work/$1/metrics.jsonl"; }
check "-k 0 measures no mass, and has the losses of -l 0" '[ "$(losses plain0)" = "$(losses plain8)" ] && [ "$(losses plain0 | wc -l)" = 7 ] &&
    [ "$(grep -cE "\"(mass|val_mass)\":null" "$work/plain0/metrics.jsonl")" = 7 ] && ! grep -q "null" <(grep "\"loss\"" "$work/plain8/metrics.jsonl")'

# ---- the regularizer does what it is for
run "${data[@]}" -e tiny -b 4 -x 100 -v 100 -s 0 -n 0 -m 10 -l 0 -k 8 -o "$work/plain"
check "plain GPT-2 trains" '[ $? = 0 ] && less "$(last "$work/plain" val_ce)" 3.2'
run "${data[@]}" -e tiny -b 4 -x 100 -v 100 -s 100 -g 20 -n 0 -m 10 -l 0.1 -k 8 -o "$work/reg"
check "condensed GPT-2 trains and samples" '[ $? = 0 ] && grep -q "sample after 100 updates" "$work/log"'
plain_mass=$(last "$work/plain" val_mass) reg_mass=$(last "$work/reg" val_mass)
plain_ce=$(last "$work/plain" val_ce) reg_ce=$(last "$work/reg" val_ce)
echo "      validation: plain loss $plain_ce mass $plain_mass, lambda 0.1 loss $reg_ce mass $reg_mass"
check "its top-8 mass is clearly higher" 'less "$(awk "BEGIN { print $plain_mass + 0.1 }")" "$reg_mass"'
check "its loss is close" 'less "$reg_ce" "$(awk "BEGIN { print $plain_ce + 0.1 }")"'
check "every line of the metrics is an object with the keys it should have" '
    [ "$(grep -c "^{\"step\":[0-9]*,\"loss\":[^,]*,\"ce\":[^,]*,\"reg\":[^,]*,\"mass\":[^,]*,\"lambda\":[^,]*,\"lr\":[^,]*,\"norm\":[^,]*,\"tok_s\":[^,]*,\"ms\":[^,]*}$" "$work/reg/metrics.jsonl")" = 100 ] &&
    [ "$(grep -c "^{\"step\":[0-9]*,\"val_ce\":[^,]*,\"val_mass\":[^,]*,\"val_mass_nosink\":[^,]*}$" "$work/reg/metrics.jsonl")" = 2 ] &&
    [ "$(wc -l <"$work/reg/metrics.jsonl")" = 103 ]'
check "what is printed of a validation is what is logged" 'grep "validation after 100" "$work/log" | grep -qF "loss $(printf %.4f "$reg_ce"), top-8 mass $(printf %.4f "$reg_mass") ($(printf %.4f "$(last "$work/reg" val_mass_nosink)") without position 0)"'
check "a sample goes on with the validation text" 'python3 - "$work/log" "$text" <<END
import re, sys
log, text = (open(path, encoding="utf-8", errors="replace").read() for path in sys.argv[1:])
prompt = re.search(r"sample after 100 updates[^\n]*\n\[(.*?)\]", log, re.S).group(1)
sys.exit(not (len(prompt) > 10 and prompt in text))
END'
# Each update's line, by the formulas: 2 micro-batches, all that moves the rates, a gradient that is clipped; and
# validations that take as long as many updates.
run "${quick[@]}" -x 20 -d 256 -u 5 --schedule linear --lr 0.01 -q 0.5 -l 0.3 --lambda-start 3 --lambda-warmup 10 --clip 0.01 -v 2 -m 100 -n 0 -o "$work/rates"
check "each line of the metrics has the rates of its update, and numbers that go together" 'python3 - "$work/rates/metrics.jsonl" <<END
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
updates = [line for line in lines[1:] if "loss" in line]
assert [line["step"] for line in updates] == list(range(1, 21))
close = lambda a, b, bound=1e-5: abs(a - b) <= bound * max(abs(a), abs(b))
for line in updates:
    step = line["step"] - 1
    lr = 0.01 * (step + 1) / 5 if step < 5 else 0.01 * (1 - 0.5 * (step - 4) / 15)
    rise = 0 if step < 3 else 0.3 * (step - 2) / 8 if step < 10 else 0.3
    assert close(line["lr"], lr) and close(line["lambda"], rise), (line, lr, rise)
    assert close(line["loss"], line["ce"] + line["lambda"] * line["reg"]), line
    assert close(line["tok_s"] * line["ms"], 256e3, 1e-3), line
    assert line["norm"] > 0.1, line
    assert close(line["reg"], 1 - line["mass"], 1e-4), line
END'
check "an update's time has no validation in it" 'python3 - "$work/rates/metrics.jsonl" <<END
import json, statistics, sys
ms = {line["step"]: line["ms"] for line in map(json.loads, open(sys.argv[1])) if "ms" in line}
behind, others = (statistics.median(ms[step] for step in range(first, 21, 2)) for first in (3, 4))
assert behind < 3 * others, (behind, others)
END'
run "${quick[@]}" -x 5 -n 2 -v 2 -o "$work/odd"
check "the last update is saved and validated, whatever -n and -v divide" '[ $? = 0 ] && [ -f "$work/odd/step_00000005/model.safetensors" ] &&
    [ "$(grep -c val_ce "$work/odd/metrics.jsonl")" = 4 ] && tail -n 1 "$work/odd/metrics.jsonl" | grep -q "\"step\":5,\"val_ce\""'
run "${quick[@]}" -x 40 -n 0 -l 0.3 --lambda-warmup 0 --reg entropy -o "$work/entropy"
check "--reg entropy: a row's entropy falls, and its top-8 mass rises" '[ $? = 0 ] &&
    less "$(last "$work/entropy" reg)" "$(first "$work/entropy" reg)" &&
    less "$(first "$work/entropy" mass)" "$(last "$work/entropy" mass)"'
run "${quick[@]}" -x 150 -n 0 -a -l 0.1 -b 1 -u 10 --lr 3e-3 -o "$work/overfit"
check "-a: one batch is learned by heart" '[ $? = 0 ] && less "$(last "$work/overfit" ce)" 0.1'

# ---- data that gets shorter while it is read
cp "$work"/text_train_000000.bin "$work/live.bin"
"$train" "${quick[@]}" -i "$work/live.bin" -x 100000 -n 0 -l 0 -o "$work/live" >"$work/log" 2>&1 &
wait_for_updates 3 "$work/live"
: >"$work/live.bin"
wait $!
check "a shard that is cut short in use: one sentence" '[ $? = 1 ] && [ "$(grep -c "^error: a file that is being read .* was cut short" "$work/log")" = 1 ]'

# ---- resuming
common=("${quick[@]}" -x 30 -n 10 -d 256 -v 10 --reg kl)
run "${common[@]}" -o "$work/straight" || bad "a straight run"
untimed() { sed -E 's/"(tok_s|ms)":[^,}]*,?//g' "$1/metrics.jsonl"; }
same_metrics() { cmp -s <(untimed "$1") <(untimed "$2"); } # of two runs
# About when, the straight run, its arguments; what it is doing then is left to chance. Behind the first checkpoint, at
# 10, it must have gone on from one: a run that begins again ends in the same bits.
same_when_killed() {
    local moment=$1 straight=$2
    shift 2
    rm -rf "$work/killed"
    "$train" "$@" -o "$work/killed" >"$work/log" 2>&1 &
    pid=$!
    wait_for_updates "$moment" "$work/killed"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    run "$@" -y -o "$work/killed" && { [ "$moment" -le 10 ] || grep -q "resumed after [12]0 updates" "$work/log"; } &&
        cmp -s "$straight/step_00000030/model.safetensors" "$work/killed/step_00000030/model.safetensors" &&
        cmp -s "$straight/step_00000030/optimizer.safetensors" "$work/killed/step_00000030/optimizer.safetensors" &&
        same_metrics "$straight" "$work/killed"
}
for moment in 3 8 14; do
    check "killed after about $moment of 30 updates and resumed: the same bits" 'same_when_killed $moment "$work/straight" "${common[@]}"'
done
head -c 5000 "$text" >"$work/short.txt" && "$root/build/tokenize" --tokenizer bytes -o "$work/short" "$work/short.txt" >"$work/log" 2>&1
epochs=(-e tiny -b 2 -t 64 -i "$work/short_train_*.bin" -v 0 -s 0 -x 30 -n 10 -d 256 --precision bf16)
run "${epochs[@]}" -o "$work/epochs" || bad "a straight run in bf16"
check "killed and resumed in bf16, over a text that 30 updates read twice: the same bits" 'same_when_killed 24 "$work/epochs" "${epochs[@]}"'
stopped="$work/it's stopped" hint="go on with -y -o '$work/it'\\''s stopped'"
"$train" "${common[@]}" -x 3000 -o "$stopped" >"$work/log" 2>&1 &
pid=$!
wait_for_updates 3 "$stopped"
kill -INT $pid
wait $pid
check "Ctrl-C finishes the update, saves, says how to go on, and ends what the run is part of" '[ $? = 130 ] && grep -qF "$hint" "$work/log" &&
    [ -f "$stopped/step_$(printf %08d "$(last "$stopped" step)")/model.safetensors" ]'
# timeout signals a program, and then the group that it is in. And an update that takes long is not waited for twice.
"$train" "${common[@]}" -d 12800 -x 3000 -o "$work/twice" >"$work/log" 2>&1 &
pid=$!
wait_for_updates 1 "$work/twice"
kill -TERM $pid
sleep 0.05
kill -TERM $pid
wait $pid
check "a signal that comes twice at once is one" '[ $? = 143 ] && [ -f "$work/twice/step_$(printf %08d "$(last "$work/twice" step)")/model.safetensors" ]'
: >"$work/log" # or what is in it from before would be taken for it
"$train" "${quick[@]}" -d 1280000 -x 3 -n 1 -o "$work/long" >"$work/log" 2>&1 &
pid=$!
waits_for 'grep -q "run folder" "$work/log"' # which it says when it listens
kill -INT $pid
sleep 1.5
begin=$SECONDS
kill -INT $pid
wait $pid
check "a second Ctrl-C ends an update that takes long at once" '[ $? = 130 ] && [ $((SECONDS - begin)) -le 3 ] && [ "$(updates_in "$work/long")" = 0 ] &&
    [ "$(ls "$work/long")" = metrics.jsonl ]'
# Ctrl-C in "train | tee log" ends tee, too.
mkfifo "$work/teed_pipe"
cat "$work/teed_pipe" >"$work/log" &
reader=$!
"$train" "${common[@]}" -x 3000 -o "$work/teed" >"$work/teed_pipe" 2>"$work/err" &
pid=$!
wait_for_updates 3 "$work/teed"
kill -KILL $reader && wait $reader 2>/dev/null
kill -INT $pid
wait $pid
check "Ctrl-C that also ends the reader of the output: saved, and how to go on is said" '[ $? = 130 ] && [ "$(cat "$work/err")" = "stopped after $(last "$work/teed" step) updates: go on with -y -o $work/teed" ] &&
    [ -f "$work/teed/step_$(printf %08d "$(last "$work/teed" step)")/model.safetensors" ]'
if unshare -rpf true 2>/dev/null; then # as in a container, whose first process is not killed by its own signals
    unshare -rpf "$train" "${common[@]}" -x 3000 -o "$work/first" >"$work/log" 2>&1 &
    pid=$!
    wait_for_updates 3 "$work/first"
    kill -TERM "$(cat /proc/$pid/task/$pid/children)"
    wait $pid
    check "the first process of a container ends by the signal, too" '[ $? = 143 ] && grep -q "go on with -y" "$work/log"'
fi
# A sample that takes long: Ctrl-C while it is being made keeps the updates before it.
"$train" "${quick[@]}" -x 3000 -s 3 -g 100000 -o "$work/sampling" >"$work/log" 2>&1 &
pid=$!
wait_for_updates 3 "$work/sampling"
sleep 0.2
kill -INT $pid
wait $pid
check "Ctrl-C in a sample ends it, and saves" '[ $? = 130 ] && [ -f "$work/sampling/step_00000003/model.safetensors" ] &&
    grep -q "sample after 3" "$work/log" && grep -q "go on with -y" "$work/log"'
# Validations that take long: Ctrl-C ends one, and the resumed run makes it up, at its place.
validating=("${quick[@]}" -j "$work/text_train_*.bin" -x 4 -n 2 -v 2 -m 1000000)
run "${validating[@]}" -o "$work/validated" || bad "a run that validates"
interrupted() { # when it has so many updates, and begins to validate
    "$train" "${validating[@]}" -y -o "$work/validating" >"$work/log" 2>&1 &
    pid=$!
    local updates=$1
    waits_for '[ "$(updates_in "$work/validating")" = "$updates" ]'
    sleep 0.1
    kill -INT $pid
    wait $pid
}
interrupted 0
check "Ctrl-C in the validation before the first update ends it" '[ $? = 130 ] && grep -q "^stopped after 0 updates: go on with -y" "$work/log" &&
    [ "$(wc -l <"$work/validating/metrics.jsonl")" = 1 ]'
interrupted 2
check "and in a later one" '[ $? = 130 ] && grep -q "^stopped after 2 updates: go on with -y" "$work/log" && [ "$(grep -c val_ce "$work/validating/metrics.jsonl")" = 1 ]'
interrupted 4
check "and in the last: it is not done then" '[ $? = 130 ] && grep -q "^stopped after 4 updates: go on with -y" "$work/log" && [ "$(grep -c val_ce "$work/validating/metrics.jsonl")" = 2 ]'
run "${validating[@]}" -y -o "$work/validating"
check "which the resumed run makes up at their places" '[ $? = 0 ] && grep -q "resumed after 4 updates" "$work/log" && grep -q "^done: 4 updates" "$work/log" &&
    same_metrics "$work/validated" "$work/validating"'
run "${quick[@]}" -x 6 -n 3 -a -o "$work/batch" && cp -r "$work/batch" "$work/batch_again" && rm -r "$work/batch_again/step_00000006"
run "${quick[@]}" -x 6 -n 3 -a -y -o "$work/batch_again"
check "-a resumes on its batch" 'grep -q "resumed after 3 updates" "$work/log" &&
    cmp -s "$work/batch/step_00000006/model.safetensors" "$work/batch_again/step_00000006/model.safetensors"'
head -c 50000 "$text" >"$work/one.txt" && tail -c 50000 "$text" >"$work/other.txt"
for half in one other; do "$root/build/tokenize" --tokenizer bytes -o "$work/$half" "$work/$half.txt" >"$work/log" 2>&1; done
on() { run -e tiny -b 2 -t 64 -s 0 -v 0 -x 4 -n 2 -i "$work/$1_train_*.bin" -j "$work/$1_val_*.bin" "${@:2}"; }
on one -o "$work/same_size" && rm -r "$work/same_size/step_00000004"
while read -r name flags; do
    on one -y -o "$work/same_size" $flags
    check "resuming with $flags is refused by name" '[ $? = 1 ] && grep -q "$name was" "$work/log"'
done <<'END'
clip --clip 0.5
weight-decay -c 0.2
final-lr -q 0.3
warmup -u 3
overfit -a
lambda-warmup --lambda-start 1
schedule --schedule linear
lr --lr 1e-3
seed --seed 5
topk -k 4
reg --reg kl
lambda -l 0.2
lambda-warmup --lambda-warmup 1
lambda-layers --lambda-layers 2
context -t 32 -d 128
context -t 48
batch -b 1 -d 128
batch -b 3
tokens-per-update -d 256
updates -x 6
precision --precision bf16
END
on other -y -o "$work/same_size"
check "resuming with other data of the same size is refused" '[ $? = 1 ] && grep -q "data-digest was" "$work/log"'
on one -y -o "$work/same_size" -j "$work/other_val_*.bin"
check "so is validating on other data" '[ $? = 1 ] && grep -q "val-digest was" "$work/log"'
on one -y -o "$work/same_size"
check "and with the same data it is not" '[ $? = 0 ] && ! grep -q "^note" "$work/log"'
on one -x 1 -n 0 -k 64 -j "$work/one_*.bin" -o "$work/shared"
check "what is both trained and validated on is named, and a k that leaves nothing to regularize" '[ $? = 0 ] &&
    grep -q "^note: $work/one_train_000000.bin is trained on as well" "$work/log" && grep -q "top 64 keys: no row has more" "$work/log"'
on one -x 1 -n 0 --lambda-start 7 --lambda-warmup 10 -o "$work/never"
check "so is a lambda that never begins to rise" '[ $? = 0 ] && grep -q "so nothing is regularized" "$work/log"'
on one -x 1 -n 0 --lambda-warmup 100% -o "$work/slow"
check "and one that is not full when the run ends" '[ $? = 0 ] && grep -q "rising over 1 update, and the run ends before it is full" "$work/log"'
on one -x 1 -n 0 -u 5 -o "$work/warm"
check "and a warm-up that is longer than the run" '[ $? = 0 ] && grep -q "warm-up 5 updates (the run ends before it is reached)" "$work/log"'
on one -x 1 -n 0 --lambda-layers 0 -o "$work/no_layer"
check "and one for no layer" '[ $? = 0 ] && grep -q "all --lambda-layers are 0" "$work/log"'
run "${quick[@]}" -x 3 -n 0 -l 0 -o "$work/plain_only"
run "${quick[@]}" -x 3 -n 0 -l 0.5 -y -o "$work/plain_only"
check "-y does not take the place of a run that has no checkpoint" '[ $? = 1 ] && grep -q "lambda was 0 and is now 0.5" "$work/log" &&
    [ "$(updates_in "$work/plain_only")" = 3 ]'
cp "$work/plain_only/metrics.jsonl" "$work/before"
run -y -o "$work/plain_only"
check "nor of one that is done" '[ $? = 1 ] && grep -q "is done, and has no checkpoint" "$work/log" && cmp -s "$work/before" "$work/plain_only/metrics.jsonl"'
run -y -o "$work"
check "-y alone where there is no run is refused, and nothing begins" '[ $? = 1 ] && grep -q "there is no run in $work to go on with" "$work/log" && [ ! -e "$work/metrics.jsonl" ]'
# What a run began with by names of its own folder, resumed from another one when the weights are gone.
mkdir "$work/place1" "$work/place2" && cp -r "$work/straight" "$work/place1/began" && cp "$work"/text_*.bin "$work/place1/"
(cd "$work/place1" && run -e began -i 'text_train_*.bin' -j 'text_val_*.bin' -b 2 -t 64 -x 4 -n 2 -v 2 -s 0 -o run)
cp -r "$work/place1/run" "$work/place1/young" && rm -r "$work/place1/young"/step_*
sed -i 4,\$d "$work/place1/young/metrics.jsonl" # killed before its first checkpoint
(cd "$work/place2" && run -y -o ../place1/young)
check "-y from another folder, where there was no checkpoint yet: the same run" '[ $? = 0 ] && [ "$(updates_in "$work/place1/young")" = 4 ]'
rm -r "$work/place1/run/step_00000004" "$work/place1/began"
(cd "$work/place2" && run -y -o ../place1/run)
check "-y from another folder, without the weights that the run began with" '[ $? = 0 ] && grep -q "resumed after 2 updates" "$work/log" &&
    [ "$(updates_in "$work/place1/run")" = 4 ]'
# A folder with a preset's name beside the run: it is not the preset.
mkdir "$work/names" && cp "$work"/text_*.bin "$work/names/"
(cd "$work/names" && run -e tiny -i 'text_train_*.bin' -j 'text_val_*.bin' -b 2 -t 64 -x 4 -n 2 -v 2 -s 0 -o tiny &&
    rm -r tiny/step_00000004 && run -y -o tiny && grep -q "resumed after 2 updates" "$work/log" &&
    rm -r tiny/step_00000004 && run -y -o tiny)
check "a run in a folder that is named like what it began from is resumed, twice" '[ $? = 0 ] && grep -q "resumed after 2 updates" "$work/log" &&
    [ "$(updates_in "$work/names/tiny")" = 4 ]'
run -y -e tiny -o "$work/place1/run"
check "-y with another -e is refused" '[ $? = 1 ] && grep -q "goes on from its own checkpoint: leave -e tiny out" "$work/log"'
cp -r "$work/straight" "$work/gap" && rm -r "$work/gap/step_00000030" && sed -i 9,12d "$work/gap/metrics.jsonl"
run -y -o "$work/gap"
check "updates that are missing from the metrics are named" '[ $? = 0 ] && grep -q "^note: $work/gap/metrics.jsonl lacks updates 7 to 10" "$work/log"'
rm -r "$work/gap/step_00000030" "$work/gap/metrics.jsonl"
(unset OMP_WAIT_POLICY && run -y -o "$work/gap") # so that the program starts itself anew
check "so is a metrics.jsonl, with the flags of the run, once" '[ "$(grep -c "^note: $work/gap/metrics.jsonl does not have the flags of the run" "$work/log")" = 1 ]'
{ "$train" "${quick[@]}" -x 3000 -n 1000 -o "$work/unread"; echo $? >"$work/status"; } 2>/dev/null | grep -m 1 "^ *1/3000" >/dev/null
check "when nobody reads its output any more it saves and ends" '[ "$(cat "$work/status")" = 141 ] && less "$(updates_in "$work/unread")" 1000 &&
    [ -f "$work/unread/step_$(printf %08d "$(last "$work/unread" step)")/model.safetensors" ]'
{ "$train" "${quick[@]}" -x 3000 -n 1000 -o "$work/unheard"; echo $? >"$work/status"; } 2>/dev/null | head -n 1 >/dev/null
check "or before it begins, soon after" '[ "$(cat "$work/status")" = 141 ] && less "$(updates_in "$work/unheard")" 1000'
run --lr 1e-5 -y -o "$work/straight"
check "resuming with another setting is refused by name, and no other" '[ $? = 1 ] && grep -q "(lr was [0-9.]* and is now 1e-05)" "$work/log"'
cp -r "$work/straight" "$work/again" && rm -r "$work/again/step_00000030"
run -y -v 0 -o "$work/again"
check "-y alone goes on with the flags that the run had; those that are given come before them" '[ $? = 0 ] &&
    grep -q "resumed after 20 updates" "$work/log" && ! grep -q "^validation" "$work/log" &&
    cmp -s "$work/straight/step_00000030/optimizer.safetensors" "$work/again/step_00000030/optimizer.safetensors"'
rm -r "$work/again/step_00000030"
run -y -o "$work/again"
check "and hold for the next time, too" '[ $? = 0 ] && grep -q "resumed after 20 updates" "$work/log" && ! grep -q "^validation" "$work/log"'
run "${quick[@]}" -x 2 -n 0 -y -o "$work/no_such_run"
check "-y where there is no run says so, and begins one" '[ $? = 0 ] && grep -q "there is no run in $work/no_such_run: it begins here" "$work/log" &&
    grep -q "metrics are in" "$work/log"'
"$train" "${common[@]}" -x 3000 -o "$work/hung_up" >"$work/log" 2>&1 &
pid=$!
wait_for_updates 3 "$work/hung_up"
"$train" -y -o "$work/hung_up" >"$work/second" 2>&1
check "a second process does not say that it begins the run anew" '[ $? = 1 ] && grep -q "^error: another process is training in" "$work/second" &&
    ! grep -q "begins anew" "$work/second"'
kill -HUP $pid
wait $pid
check "a terminal that is closed: as Ctrl-C" '[ $? = 129 ] && [ -f "$work/hung_up/step_$(printf %08d "$(last "$work/hung_up" step)")/model.safetensors" ]'
updates=$(updates_in "$work/hung_up")
"$train" -y -o "$work/hung_up" >"$work/log" 2>&1 &
pid=$!
wait_for_updates $((updates + 3)) "$work/hung_up"
"$train" -y -o "$work/hung_up" >"$work/second" 2>&1
check "a second process is refused before it says what it would train" '[ $? = 1 ] && grep -q "^error: another process is training in" "$work/second" &&
    ! grep -q "learning rate" "$work/second"'
kill -TERM $pid
wait $pid
check "SIGTERM: as well, in a run that has been resumed" '[ $? = 143 ] && grep -q "resumed after $updates updates" "$work/log" &&
    grep -q "go on with -y" "$work/log" && [ -f "$work/hung_up/step_$(printf %08d "$(last "$work/hung_up" step)")/model.safetensors" ]'
(ulimit -f 1000 && run "${quick[@]}" -x 4 -n 2 -o "$work/limited")
check "a checkpoint that may not get so large: one sentence, and nothing half" '[ $? = 1 ] && grep -q "^error: cannot write .*: File too large" "$work/log" &&
    [ "$(ls -A "$work/limited")" = metrics.jsonl ]'
run "${common[@]}" -o "$work/straight"
check "a run folder is not overwritten" '[ $? = 1 ] && grep -q -- "-y" "$work/log"'
run "${quick[@]}" -x 2 -n 0 -e "$work/straight" -o "$work/from_run"
check "-e takes a run folder, and trains on with the rate for that" '[ $? = 0 ] && grep -q "learning rate *5e-05" "$work/log"'

# ---- --target-loss
constrained=("${common[@]}" --lambda-warmup 0)
run "${constrained[@]}" -l 0 -o "$work/limit" || bad "a plain run"
lambdas() { grep -oE '"lambda":[0-9][0-9.e-]*' "$1/metrics.jsonl" | cut -d: -f2; }
# The margin is so wide that the brake, 2 x 0.02 x (the loss's change) / margin, makes less than 0.001 of it, either way.
run "${constrained[@]}" -l 0.001 --target-loss "$work/limit/metrics.jsonl:100" -o "$work/room"
check "with room to spare, lambda rises by 1% an update, from the third on" '[ $? = 0 ] &&
    [ "$(lambdas "$work/room" | head -n 2 | sort -u)" = 0.001 ] &&
    lambdas "$work/room" | tail -n +2 | awk "NR > 1 && !(\$1 > last * 1.009 && \$1 < last * 1.011) { exit 1 } { last = \$1 }"'
run "${constrained[@]}" -l 100 --target-loss "$work/limit:0.001" -o "$work/over"
check "over the limit, it falls" '[ $? = 0 ] && less "$(last "$work/over" lambda)" 85'
cp -r "$work/over" "$work/over_again" && rm -r "$work/over_again/step_00000030"
run "${constrained[@]}" -l 100 --target-loss "$work/limit:0.001" -y -o "$work/over_again"
check "resumed, it goes on from the lambda that it had" '[ $? = 0 ] && grep -q "resumed after 20 updates" "$work/log" &&
    cmp -s <(lambdas "$work/over") <(lambdas "$work/over_again") &&
    cmp -s "$work/over/step_00000030/optimizer.safetensors" "$work/over_again/step_00000030/optimizer.safetensors"'
check "killed and resumed: the same bits" 'same_when_killed 13 "$work/over" "${constrained[@]}" -l 100 --target-loss "$work/limit:0.001"'
run "${common[@]}" --lambda-warmup 12 -l 0.3 --target-loss "$work/limit:0.1" -o "$work/rising"
check "while lambda rises and behind that, each update has the lambda of the formulas" 'python3 - "$work/limit/metrics.jsonl" "$work/rising/metrics.jsonl" <<END
import json, math, sys
plain, limited = ([line for line in map(json.loads, open(path)) if "loss" in line] for path in sys.argv[1:])
factors, excess, integral = [1.0, 1.0], 0.0, 0.0  # of an update: as the losses up to the last but one have left it
for step, (line, beside) in enumerate(zip(limited, plain, strict=True), 1):
    want = 0.3 * min(1, step / 13) * factors[step - 1]
    assert abs(line["lambda"] / want - 1) < 1e-3, (line, want)
    excess = 0.98 * excess + 0.02 * (line["ce"] - beside["ce"])
    v = min(max(excess / 0.1, 0), 3)
    integral = min(integral + 0.01 * (1 - v), 0 if step <= 12 else math.log(1000))
    factors.append(math.exp(integral - 2 * v))
assert step == 30 and integral > 0.05, (step, integral)
END'
run "${constrained[@]}" -l 100 --target-loss "$work/limit:0.002" -y -o "$work/over"
check "resuming with another margin is refused by name" '[ $? = 1 ] && grep -q "target-loss was 0.001 over" "$work/log"'

# ---- the same bits
run "${quick[@]}" -x 5 -n 5 -o "$work/a" && run "${quick[@]}" -x 5 -n 5 -o "$work/b"
check "the same seed twice: the same bits" 'cmp -s "$work/a/step_00000005/model.safetensors" "$work/b/step_00000005/model.safetensors"'
run "${quick[@]}" -x 5 -n 5 -r 2 -o "$work/c"
check "-r 2: the same bits" 'cmp -s "$work/a/step_00000005/model.safetensors" "$work/c/step_00000005/model.safetensors"'
run "${quick[@]}" -x 5 -n 5 --seed 7 -o "$work/d"
check "another seed: other bits" '! cmp -s "$work/a/step_00000005/model.safetensors" "$work/d/step_00000005/model.safetensors"'
run "${small[@]}" -x 2 -n 2 --precision bf16 -o "$work/bf16"
check "bf16 trains" '[ $? = 0 ] && grep -q bf16 "$work/log"'
run "${small[@]}" -x 2 -n 2 --precision fp8 -o "$work/fp8"
check "fp8 trains, and to other bits than bf16" '[ $? = 0 ] && grep -q "fp8" "$work/log" && [ "$(last "$work/fp8" ce)" != "$(last "$work/bf16" ce)" ]'

# ---- where it finds itself
mkdir -p "$work/here/log/run1" "$work/here/log/run3"
(cd "$work/here" && run "${quick[@]}" -x 2 -n 2)
check "a run of no name comes behind the last, whatever is missing before it" '[ $? = 0 ] && [ -d "$work/here/log/run4/step_00000002" ]'
(cd "$work/here" && run "${quick[@]}" -x 2 -n 2 -y)
check "and -y goes on with that one" '[ $? = 0 ] && grep -q "log/run4 (resumed after 2 updates)" "$work/log"'
("$train" "${quick[@]}" -x 2 -n 2 -o "$work/closed" <&- >&- 2>&-)
check "with closed standard streams nothing else gets what is printed" '[ $? = 0 ] && [ "$(grep -cv "^{" "$work/closed/metrics.jsonl")" = 0 ]'
# A copy of it in a folder whose name is also a glob, with bytes to train on, but no GPT-2 tokens.
place="$work/a [1], place"
mkdir -p "$place/data" && cp "$train" "$place/" && cp "$work"/one_*.bin "$place/data/" && echo one >"$place/data/default_dataset"
for part in train val; do mv "$place/data/one_${part}_000000.bin" "$place/data/one_bytes_${part}_000000.bin"; done
"$place/train_gpt2cpu" -e d6 -b 1 -t 16 -x 1 -n 0 -s 0 -v 0 -o "$work/of_bytes" >"$work/log" 2>&1
check "without GPT-2 tokens a model from scratch learns bytes, and that is said" '[ $? = 0 ] &&
    grep -q "has no GPT-2 tokens.*training on bytes" "$work/log" && grep -q "vocabulary 257" "$work/log"'

# What the machine decided where no flag did, -y must find again: the data, and the tokens of an update.
again() { (cd "$work" && "$place/train_gpt2cpu" "$@" -o "$work/of_default" >"$work/log" 2>&1); }
again -e tiny -b 2 -x 4 -n 2 -s 0 -v 0 && rm -r "$work/of_default/step_00000004"
for part in train val; do cp "$work/other_${part}_000000.bin" "$place/data/other_bytes_${part}_000000.bin"; done
echo other >"$place/data/default_dataset"
check "what the machine decided is written down" 'head -n 1 "$work/of_default/metrics.jsonl" | grep -q "\"tokens-per-update\":\"256\"" &&
    head -n 1 "$work/of_default/metrics.jsonl" | grep -q "one_bytes_val"'
again -y -t 100
check "a context that no flag gave is not blamed on another flag" '[ $? = 1 ] && grep -q "context was 128 and is now 100" "$work/log"'
again -y
check "-y goes on with the default data of the first day, whatever it is now" '[ $? = 0 ] &&
    grep -q "one_bytes_train" "$work/log" && grep -q "resumed after 2 updates" "$work/log"'

# ---- --debug-state
mkfifo "$work/pipe"
cat "$work/pipe" >"$work/piped" &
run "${quick[@]}" --debug-state "$work/pipe"
check "--debug-state writes to what is no file" '[ $? = 0 ] && wait $! && [ -p "$work/pipe" ] && [ -s "$work/piped" ]'
run "${quick[@]}" --debug-state "$work/state.safetensors" -o "$work/none"
check "--debug-state writes its file, exits with 0 and leaves no run" '[ $? = 0 ] && [ -s "$work/state.safetensors" ] && [ ! -e "$work/none" ]'

run -i "$work/text_train_*.bin" -e tiny -b 2 -t 64 --debug-state "$work/state.safetensors"
check "nor does it need data to validate on" '[ $? = 0 ]'

# ---- bad input: one sentence, exit status 1, no crash
refuse() { # words that the sentence must hold, then arguments
    local words=$1
    shift
    case " $* " in *" --export "*) timeout 60 "$train" "$@" ;; *) timeout 60 "$train" -o "$work/refused" "$@" ;; esac >"$work/log" 2>&1
    check "refused: $*" '[ $? = 1 ] && [ "$(grep -c "^error: " "$work/log")" = 1 ] && grep -qF -- "$words" "$work/log" && [ ! -e "$work/refused/metrics.jsonl" ]'
}
refuse "--schedule" -k cosine
refuse "multiples of 16" "${data[@]}" -e tiny -b 1 -t 24 --precision fp8
refuse "not 'abc'" -b abc
refuse "-b (--batch) takes" -b 0
refuse "not 'x'" -bx 8
refuse "needs a value" -b
refuse "-l (--lambda)" -l -1
refuse "-l (--lambda)" -l nan
refuse "--reg takes tail, kl or entropy" --reg sum
refuse "--lambda-warmup" "${quick[@]}" --lambda-warmup 700%
refuse "--lambda-start" "${quick[@]}" --lambda-start -1
refuse "behind the end of lambda's rise" "${quick[@]}" --lambda-start 80%
refuse "--target-loss takes a plain run" --target-loss log/run1
refuse "no/such: give the plain run's folder or metrics.jsonl" "${common[@]}" --target-loss no/such:0.1
refuse "its lambda is 0.1" "${common[@]}" --target-loss "$work/straight:0.1"
refuse "updates is 30, and here it is 40" "${common[@]}" -x 40 --target-loss "$work/limit:0.1"
refuse "seed is 1337" "${common[@]}" --seed 7 --target-loss "$work/limit:0.1"
head -n 20 "$work/limit/metrics.jsonl" >"$work/unfinished.jsonl"
refuse "let that run finish" "${common[@]}" --target-loss "$work/unfinished.jsonl:0.1"
refuse "greater than 0" "${common[@]}" -l 0 --target-loss "$work/limit:0.1"
refuse "has 2 factors" "${quick[@]}" --lambda-layers 1,0
refuse "not a multiple of -b times -t" "${quick[@]}" -d 100
run "${data[@]}" -e tiny -t 64 -d 1024 -x 1 -n 0 -v 0 -s 0 --schedule constant -o "$work/constant"
check "without -b a micro-batch that divides -d; a constant rate does not go down" '[ $? = 0 ] && grep -q "1024 tokens: 2 micro-batches of 8 x 64$" "$work/log" &&
    grep -q "learning rate *0.002, constant, warm-up 0 updates; weight decay" "$work/log"'
python3 -c "
import struct, sys
sys.stdout.buffer.write(struct.pack('<256i', 20240520, 1, 500, 1, *[0] * 252) + bytes(1000))" >"$work/one_token.bin"
refuse "cannot be trained: the vocabulary must have 2 to 65536 entries" -i "$work/one_token.bin" -e tiny -b 2 -t 64 -x 1 -v 0 -s 0
python3 -c "
import struct, sys
sys.stdout.buffer.write(struct.pack('<256i', 20240520, 1, 500, 300, *[0] * 252) + bytes(1000))" >"$work/other_vocabulary.bin"
refuse "do not belong together" -i "$work/other_vocabulary.bin" -e "$work/straight" -b 2 -t 64 -x 1 -v 0 -s 0
refuse "have a vocabulary of 300 tokens" -i "$work/text_train_*.bin" -j "$work/other_vocabulary.bin" -e tiny -b 2 -t 64 -x 1
refuse "has 64 positions: give at most that" "${data[@]}" -e "$work/straight" -b 2 -t 128 -x 1
refuse "no/such" -i "no/such*.bin" -v 0 -s 0
refuse "without -j" -i "$work/text_train_*.bin"
refuse "takes tiny, d6" -e nothing
refuse "d6 to d48" -e d5
refuse "belongs to no flag" stray
refuse "there is no flag" --unknown
refuse "--lambda is for training" -e "$work/straight" -l 0.3 --export "$work/exported"
refuse "-e names: give it" --export "$work/exported"
touch "$work/a_file"
refuse "$work/a_file is there already" -e "$work/straight" --export "$work/a_file"
refuse "-e (--from) takes a name" -e ""
refuse "-i (--train-data) takes a name" -i ""
refuse "give the run's folder as -e" -y --export "$work/exported"
refuse "give the run's folder as -e" -y --debug-state "$work/state"
refuse "--device cuda goes with train_gpt2cu" --device cuda
refuse "goes with -l 0 only" "${quick[@]}" -k 0
refuse "lower -b" "${data[@]}" -e d48 -b 4096 -t 1024 -d 4194304
head -c 100000 "$work/text_train_000000.bin" >"$work/cut.bin"
refuse "cut.bin" -i "$work/cut.bin" -v 0 -s 0
cp -r "$work/straight/step_00000030" "$work/broken" && truncate -s -100 "$work/broken/model.safetensors"
refuse "model.safetensors" "${quick[@]}" -e "$work/broken"
run "${quick[@]}" -x 40 -n 1 --lr 100 --clip 0 -u 0 -l 0 -c 50 -o "$work/nan"
status=$?
check "a run that diverges names step and tensor, and its last checkpoint is good" '[ $status = 1 ] &&
    grep -qE "^error: update [0-9]+: .* not finite" "$work/log" &&
    run "${quick[@]}" -x 1 -n 0 -l 0 -e "$work/nan" --debug-state "$work/after.safetensors"'

# ---- the README's table is the program's
check "the README's table of flags is the program's (make readme)" '"$train" --help-markdown | dev/put_table README.md flags --check'
"$train" --help >"$work/log" 2>&1
check "--help shows every flag, in 80 columns" '[ $? = 0 ] && ! grep -qE ".{81}" "$work/log" && [ "$(grep -cE "^  (-|    --)" "$work/log")" = "$("$train" --help-markdown | grep -c "^| .-")" ]'

"$train" --help >/dev/full 2>"$work/log"
check "a --help that cannot be printed is an error" '[ $? = 1 ] && grep -q "^error: the standard output could not be written" "$work/log"'

finish
