#!/usr/bin/env bash
# The inference program as a user runs it, on the CPU backend, with a small model that is trained here: text from a
# prompt, dense and condensed; losses, probes and the report; bad input is one sentence.
set -u
cd "$(dirname "$0")/.."
root=$PWD
infer=$root/infer_gpt2cpu
source tests/script.sh
run() { "$infer" "$@" >"$work/out" 2>"$work/err"; }
json() { python3 -c "import json,sys; d = json.load(open(sys.argv[1])); print($2)" "$1"; }
# holds FILE CONDITION: of the JSON in the file, d, and of what the program has printed, out.
holds() {
    python3 -c "
import json, math, sys
d, out = json.load(open(sys.argv[1])), open('$work/out').read()
near = lambda a, b, by=1e-6: abs(a - b) <= by * max(1, abs(b))
sys.exit(not ($2))" "$1" 2>"$work/err"
}

text=$root/tests/fixtures/plays.txt
"$root/build/tokenize" --tokenizer bytes -o "$work/text" "$text" >"$work/out" 2>&1 || bad "tokenizing"
"$root/train_gpt2cpu" -i "$work/text_train_*.bin" -j "$work/text_val_*.bin" -e tiny -b 4 -x 120 -v 0 -s 0 -n 120 -l 0.1 -k 8 \
    -o "$work/log/run1" >"$work/out" 2>&1 || bad "training"
model=(-e "$work/log/run1")
val="$work/text_val_*.bin"

# ---- text
run "${model[@]}" -p "Good lord " -n 40
check "a prompt goes on, and the speed is told apart from the text" '[ $? = 0 ] &&
    head -c 10 "$work/out" | grep -q "^Good lord $" && [ "$(wc -c <"$work/out")" -ge 40 ] && grep -q "tokens/s" "$work/err"'
cp "$work/out" "$work/first"
run "${model[@]}" -p "Good lord " -n 40
check "the same seed: the same text" 'cmp -s "$work/out" "$work/first"'
run "${model[@]}" -p "Good lord " -n 40 --seed 5
check "another seed: another text" '! cmp -s "$work/out" "$work/first"'
(cd "$work" && "$infer" -n 5 >"$work/out" 2>"$work/err")
check "without -e the newest run in log/" '[ $? = 0 ] && grep -q "log/run1" "$work/err"'
cp -r "$work/log/run1" "$work/log/run9" && cp -r "$work/log/run1" "$work/log/run10" && mkdir "$work/log/run11"
(cd "$work" && "$infer" -n 5 >"$work/out" 2>"$work/err")
check "of several the last that has a checkpoint" '[ $? = 0 ] && grep -q "^log/run10: " "$work/err"'
cp -r "$work/log/run1/step_00000120" "$work/foreign"
echo '{"model": {"type": "Unigram", "merges": []}}' >"$work/foreign/tokenizer.json"
run -e "$work/foreign" -p "Good lord " -n 40
check "a tokenizer of another kind beside the weights is not used, and that is said" '[ $? = 0 ] &&
    grep -q "tokenizer.json is not used: .*Unigram" "$work/err" && cmp -s "$work/out" "$work/first"'
cp -r "$work/log/run1" "$work/torn" && cp -r "$work/torn/step_00000120" "$work/torn/step_00000130" && : >"$work/torn/step_00000130/model.safetensors"
run -e "$work/torn" -p "Good lord " -n 40
check "where a run's newest checkpoint is damaged, the one before it is used, and that is said" '[ $? = 0 ] &&
    grep -q "^going on from $work/torn/step_00000120, for the newest checkpoint is not complete: " "$work/err" && cmp -s "$work/out" "$work/first"'
: >"$work/out" # or what is in it from before would be taken for the text
"$infer" "${model[@]}" -p "Good lord " -n 10000000 >"$work/out" 2>"$work/err" &
waits_for '[ -s "$work/out" ]'
kill -INT $!
wait $!
check "Ctrl-C ends the text, and what the program is part of" '[ $? = 130 ] && grep -q "dense attention" "$work/err"'
# At --interactive, a Ctrl-C ends what is being made; and when later the reader is gone, the program ends, too.
mkfifo "$work/typed" "$work/shown"
: >"$work/out"
cat "$work/shown" >"$work/out" &
reader=$!
"$infer" "${model[@]}" --interactive -n 100000 <"$work/typed" >"$work/shown" 2>"$work/err" &
pid=$!
exec 5>"$work/typed"
echo "int a" >&5
waits_for '[ -s "$work/out" ]'
kill -INT $pid
waits_for 'grep -q "dense attention" "$work/err"'
kill -KILL $reader && wait $reader 2>/dev/null
echo "int b" >&5
wait $pid
check "interactive: Ctrl-C ends a text; without a reader there is no other" '[ $? = 141 ] && [ "$(grep -c "dense attention" "$work/err")" = 1 ]'
exec 5>&-
run "${model[@]}" -p "Good lord " -n 60 --greedy
cp "$work/out" "$work/greedy"
check "the most likely tokens are not those that are drawn" '! cmp -s <(head -c 50 "$work/first") <(head -c 50 "$work/greedy")'
for flag in "--top-tokens 1" "--top-p 1e-6" "--temperature 0"; do
    run "${model[@]}" -p "Good lord " -n 60 $flag
    check "$flag takes the most likely token" 'cmp -s "$work/out" "$work/greedy"'
done
run "${model[@]}" -p "Good lord " -n 60 --greedy --attention topk -k 128
check "top k of all keys is dense attention" 'cmp -s "$work/out" "$work/greedy"'
run "${model[@]}" -p "Good lord " -n 60 --greedy --attention pages --epsilon 0
check "pages with epsilon 0 are dense attention" 'cmp -s "$work/out" "$work/greedy"'
run "${model[@]}" -p "Good lord " -n 60 --greedy -k 8 --stats
check "-k 8 reads the top 8; --stats shows every head" '[ $? = 0 ] && grep -q "top-8 attention" "$work/err" &&
    [ "$(grep -cE "^ +[0-3] +[01] " "$work/err")" = 8 ]'
run "${model[@]}" -p "Good lord " -n 60 --attention pages --epsilon 0.1 --stats
check "pages say what is certified" '[ $? = 0 ] && grep -q certified "$work/err" && grep -qE "^ +all " "$work/err"'
check "and what share of the keys they read" 'awk "{ sub(/ all /, \" all all \") } \$5 ~ /%\$/ { rows++; off = \$5 - 100 * \$4 / \$3; if (off > 0.4 || off < -0.4) bad++; if (\$1 == \"all\" && \$4 >= \$3) bad++ }
    END { exit !(rows == 9 && !bad) }" "$work/err"'
run "${model[@]}" -p "x" -n 300
check "a full context slides on, and it is said" '[ $? = 0 ] && grep -q "the context was full" "$work/err"'
run "${model[@]}" -p "x" -n 300 --context-full stop
check "or stops" '[ $? = 0 ] && [ "$(wc -c <"$work/out")" -le 131 ]'
run "${model[@]}" -p "$(printf '%0200d' 1)" -n 1
check "of a prompt that is longer than the context only its end is read, and it is said" '[ $? = 0 ] &&
    grep -qx "the prompt has 200 tokens, and the context 128: its last 64 are read" "$work/err"'
printf '%0128d\nx\n' 1 >"$work/prompts"
run "${model[@]}" -f "$work/prompts" -n 1
check "so it is of one among others, that leaves no room" '[ $? = 0 ] &&
    grep -qx "1 of 2 prompts have 128 tokens, the context, or more: of each the last 64 are read" "$work/err"'
printf 'int\nfloat x\n\nreturn\n' >"$work/prompts"
run "${model[@]}" -f "$work/prompts" -n 20
check "prompts from a file, side by side" '[ $? = 0 ] && grep -q "^\[int\]" "$work/out" && grep -q "^\[float x\]" "$work/out" &&
    grep -q "^\[return\]" "$work/out" && grep -q "^60 tokens" "$work/err"'
for how in "-k 8" "--attention pages --epsilon 0.1"; do
    run "${model[@]}" -f "$work/prompts" -n 50 --stats $how --json "$work/made.json"
    check "--json has what was printed, and what each head has read ($how)" '[ $? = 0 ] && python3 - "$work/made.json" "$work/out" "$work/err" <<"END"
import json, sys
made, out, err = json.load(open(sys.argv[1]))["generation"], open(sys.argv[2]).read(), open(sys.argv[3]).read()
assert out == "\n".join("[%s]%s\n" % (t["prompt"], t["text"]) for t in made["texts"])
assert all(bytes(t["tokens"]).decode() == t["text"] and len(t["tokens"]) == 50 for t in made["texts"])
assert made["drawn"] == 150 and (made.get("k"), made.get("epsilon")) in ((8, None), (None, 0.1))
rows = [line.replace("%", "").split() for line in err.split("\n") if line[:5].strip().isdigit() and len(line.split()) == 9]
assert len(rows) == len(made["stats"]) == 8
for row, s in zip(rows, made["stats"]):
    share = 100 * s["read"] / s["keys"]
    names = (s["layer"], s["head"], s["keys"], s["read"], share, s["pages"], s["tau"], s["worst"], s["certified"])
    assert all(abs(float(a) - b) <= 0.051 and abs(float(a) - b) <= 0.006 * abs(b) + 0.051 * (b > 1) for a, b in zip(row, names)), (row, s)
END'
done
if script -qec true /dev/null >"$work/out" 2>&1 </dev/null; then # where there are terminals
    script -qec "$(printf '%q ' "$infer" "${model[@]}" -f "$work/prompts" -n 20)" /dev/null >"$work/out" 2>&1 </dev/null
    check "how far they are is said on a terminal, and the line is cleared in the end" '[ $? = 0 ] &&
        [ "$(grep -o "tokens of each text [0-9]*/20" "$work/out" | wc -l)" = 19 ] &&
        grep -q "$(printf "text 19/20\r\033\[K\r\033\[K\[int\]")" "$work/out"'
fi
run "${model[@]}" -f "$work/prompts" -n 20 --greedy
cp "$work/out" "$work/beside"
for prompt in int "float x" return; do
    run "${model[@]}" -p "$prompt" -n 20 --greedy
    [ "$prompt" = int ] || echo
    printf "[%s]" "$prompt"
    tail -c +$((${#prompt} + 1)) "$work/out"
done >"$work/alone"
check "each goes on as it does alone" 'cmp -s "$work/beside" "$work/alone" && [ "$(wc -c <"$work/alone")" -ge 82 ]'
printf 'a\0b\n' >"$work/zero"
run "${model[@]}" -f "$work/zero" -n 20
check "a zero byte is a byte of the text" '[ $? = 0 ] && head -c 5 "$work/out" | cmp -s - <(printf "[a\0b]") && [ "$(wc -c <"$work/out")" -gt 20 ]'
printf 'int a\nint b\n\nint c\n' | "$infer" "${model[@]}" --interactive -n 10 >"$work/out" 2>"$work/err"
check "interactive: a line, and what the model makes of it" '[ $? = 0 ] && [ "$(grep -c "tokens/s" "$work/err")" = 3 ]'
cp "$work/out" "$work/three"
printf 'int c\n' | "$infer" "${model[@]}" --interactive -n 10 >"$work/out" 2>"$work/err"
check "interactive: behind an empty line a text goes on as it does alone" '[ $? = 0 ] && [ "$(wc -c <"$work/out")" -ge 5 ] &&
    tail -c "$(wc -c <"$work/out")" "$work/three" | cmp -s - "$work/out"'
printf 'int b\n' | "$infer" "${model[@]}" --interactive -n 10 >"$work/out" 2>"$work/err"
check "interactive: behind another line it does not" '[ $? = 0 ] && [ "$(wc -c <"$work/out")" -ge 5 ] &&
    ! tail -c +12 "$work/three" | head -c "$(wc -c <"$work/out")" | cmp -s - "$work/out"'

printf 'int a\r\n%0100d\r\n\r\n%0150d\r\nint b\r\n' 1 1 | "$infer" "${model[@]}" --interactive -n 60 --context-full stop >"$work/out" 2>"$work/err"
check "interactive: a text that becomes too long is said to be, and an empty line begins another; CRLF is an end of line" '[ $? = 0 ] &&
    [ "$(grep -c "tokens/s" "$work/err")" = 2 ] && grep -q "and the context 128: an empty line begins a new text" "$work/err" &&
    grep -qx "this line has 150 tokens, and the context 128: shorten it, or give --context-full slide" "$work/err" &&
    ! grep -q "$(printf "\r")" "$work/out"'
printf 'int a\r\n' >"$work/crlf" && printf 'int a\n' >"$work/lf"
run "${model[@]}" -f "$work/lf" -n 20 && cp "$work/out" "$work/first"
run "${model[@]}" -f "$work/crlf" -n 20
check "a file of prompts with CRLF is the same as without" 'cmp -s "$work/out" "$work/first"'
run "${model[@]}" -p "Good lord " -n 60 --temperature 2 --greedy
check "--greedy is greedy whatever else is said" 'cmp -s "$work/out" "$work/greedy"'

# ---- what is measured
touch "$work/eval.json" && chmod 600 "$work/eval.json"
run "${model[@]}" --eval "$val" -m 2 -b 2 --cuts 2,8,128,8 --json "$work/eval.json"
check "--eval: one table of losses, and the same as JSON" '[ $? = 0 ] && grep -q "first_recent" "$work/out" &&
    [ "$(json "$work/eval.json" "len(d[\"eval\"][\"cuts\"])")" = 24 ]'
check "perplexity is exp(loss), dense and cut" 'holds "$work/eval.json" "all(near(math.log(c[\"perplexity\"]), c[\"loss\"]) for c in d[\"eval\"][\"cuts\"] + [d[\"eval\"][\"dense\"]])"'
# The lines of both tables; in each, k, a loss of every kind of cut, and the mass that the first kind keeps.
check "the tables have the numbers of the JSON" 'holds "$work/eval.json" "
[line.split() for line in out.splitlines() if line.split()[:1] in ([\"2\"], [\"8\"], [\"128\"])] ==
[[str(k)] + [\"%.4f\" % c[\"loss\"] for c in row] + [\"%.4f\" % row[0][\"kept\"]]
 for full in (True, False) for k in (2, 8, 128)
 for row in [[c for c in d[\"eval\"][\"cuts\"] if (c[\"k\"], c[\"renormalized\"]) == (k, full)]]]"'
check "a file that was there keeps its permissions" '[ "$(stat -c %a "$work/eval.json")" = 600 ]'
check "cutting to as many keys as there are changes nothing" '[ "$(json "$work/eval.json" "all(abs(c[\"loss\"] - d[\"eval\"][\"dense\"][\"loss\"]) < 1e-5 for c in d[\"eval\"][\"cuts\"] if c[\"k\"] == 128)")" = True ]'
# By definition; that they also lose less is no more than likely of a model that has hardly been trained.
check "the top k keep more of the mass than any other k keys" '[ "$(json "$work/eval.json" "all(max(c, key=lambda x: x[\"kept\"])[\"cut\"] == \"topk\" for c in [[x for x in d[\"eval\"][\"cuts\"] if x[\"k\"] == k and x[\"renormalized\"]] for k in (2, 8)])")" = True ]'
run "${model[@]}" --eval "$text" -m 1 -b 1 --cuts 8 --cut-kinds topk,recent --json "$work/kinds.json"
check "--eval takes text, too" '[ $? = 0 ] && grep -q "dense attention: loss" "$work/out"'
check "--cut-kinds keeps to some" '[ "$(json "$work/kinds.json" "[(c[\"cut\"], c[\"renormalized\"]) for c in d[\"eval\"][\"cuts\"]] == [(\"topk\", True), (\"recent\", True)]")" = True ]'
of_all() { # rows in a batch, JSON: the losses of 7 sequences
    head -c 1000 "$text" >"$work/short.txt"
    run "${model[@]}" --eval "$work/short.txt" -t 128 -m 8 -b "$1" --cuts 8 --cut-kinds topk,recent,raw --json "$2"
}
of_all 7 "$work/at_once.json" && of_all 3 "$work/some.json"
check "all of the data is measured, also what fills no whole batch" '[ "$(json "$work/some.json" "d[\"eval\"][\"tokens\"]")" = 896 ] &&
    python3 -c "
import json, sys
a, b = (json.load(open(f))[\"eval\"] for f in sys.argv[1:])
numbers = lambda e: [e[\"dense\"][\"loss\"]] + [c[x] for c in e[\"cuts\"] for x in (\"loss\", \"kept\")]
assert a[\"tokens\"] == b[\"tokens\"] and all(abs(x - y) < 1e-5 for x, y in zip(numbers(a), numbers(b)))
" "$work/at_once.json" "$work/some.json"'
check "raw among --cut-kinds: renormalized as well as not" '[ "$(json "$work/some.json" "[(c[\"cut\"], c[\"renormalized\"]) for c in d[\"eval\"][\"cuts\"]] == [(cut, full) for full in (True, False) for cut in (\"topk\", \"recent\")]")" = True ]'
tasks() { run "${model[@]}" --lambada tests/fixtures/tasks/lambada.jsonl --hellaswag tests/fixtures/tasks/hellaswag.jsonl --limit 3 "$@" --json "$work/tasks.json"; }
# How far the two columns are apart, of one.
apart='*[abs(t["topk"][x] / t["dense"][x] - 1) for t, x in ((d["lambada"], "perplexity"), (d["hellaswag"], "loss"))]'
dense='d["lambada"]["dense"], d["hellaswag"]["dense"]'
tasks -k 1
check "LAMBADA and HellaSwag, dense and with k keys, which make a difference" '[ $? = 0 ] && grep -q "LAMBADA, 3 texts" "$work/out" &&
    grep -q "HellaSwag, 3 questions" "$work/out" && [ "$(json "$work/tasks.json" "min($apart) > 1e-3")" = True ]'
check "what is printed of HellaSwag is the JSON" 'holds "$work/tasks.json" "all(
    \"%s  accuracy %.4f +- %.4f, by length %.4f +- %.4f\" % ((label,) + tuple(d[\"hellaswag\"][name][x] for x in (\"accuracy\", \"stderr\", \"accuracy_norm\", \"stderr_norm\")))
    in out for name, label in ((\"dense\", \"dense\"), (\"topk\", \"top 1\")))"'
of_one=$(json "$work/tasks.json" "$dense")
head -n 3 tests/fixtures/tasks/lambada.jsonl >"$work/lambada3.jsonl"
head -n 3 tests/fixtures/tasks/hellaswag.jsonl >"$work/hellaswag3.jsonl"
run "${model[@]}" --lambada "$work/lambada3.jsonl" --hellaswag "$work/hellaswag3.jsonl" -k 1 --json "$work/three.json"
check "--limit 3 takes the first three" '[ "$(json "$work/three.json" "$dense")" = "$of_one" ]'
tasks -k 128
check "but not where there are no more, and never in the dense column" '[ "$(json "$work/tasks.json" "max($apart) < 1e-5")" = True ] &&
    [ "$(json "$work/tasks.json" "$dense")" = "$of_one" ]'
run "${model[@]}" --lambada tests/fixtures/tasks/lambada.jsonl --limit 1 --json "$work/tasks.json"
check "LAMBADA of one text: no standard error" '[ $? = 0 ] && ! grep -q "nan" "$work/out" && grep -q "accuracy [01]\.0000, " "$work/out" &&
    [ "$(json "$work/tasks.json" "d[\"lambada\"][\"dense\"][\"stderr\"]")" = None ]'
run "${model[@]}" --probes --limit 8 -j "$val" --report "$work/report" -m 1 -b 2 --cuts 1,8 -k 4
check "--report writes every head, maps and probes" '[ $? = 0 ] && [ "$(json "$work/report/report.json" "len(d[\"heads\"]) == 8 and d[\"k\"] == 4 and len(d[\"maps\"]) > 0 and \"needle\" in d[\"probes\"] and len(d[\"maps\"][0][\"rows\"][5]) == 6")" = True ]'
run "${model[@]}" --probes --limit 200 -t 20 -j "$val" -k 1 --json "$work/probes.json"
probe() { holds "$work/probes.json" "(lambda induction, recall, needle: $1)(*(d['probes'][x] for x in ('induction', 'recall', 'needle')))"; }
check "each probe is asked with k keys as well" 'probe "induction[\"dense\"][\"loss\"] != induction[\"topk\"][\"loss\"] and recall[\"dense\"][\"loss\"] != recall[\"topk\"][\"loss\"] and needle[\"dense\"] != needle[\"topk\"]"'
check "the score of induction is what the repetition takes off the loss" 'probe "all(near(i[\"score\"], i[\"first_loss\"] - i[\"loss\"]) for i in (induction[\"dense\"], induction[\"topk\"]))"'
check "what is printed of the probes is the JSON" 'probe "all(line in out for x in (\"dense\", \"topk\") for line in (
    \"induction: loss %.3f, then %.3f when %d tokens repeat (accuracy %.3f)\" % (induction[x][\"first_loss\"], induction[x][\"loss\"], induction[\"tokens\"], induction[x][\"accuracy\"]),
    \"recall of %d pairs: accuracy %.3f (chance %.3f)\" % (recall[\"pairs\"], recall[x][\"accuracy\"], recall[x][\"chance\"]),
    \"needle by depth: \" + \" \".join(\"%.2f\" % a for a in needle[x]) + \" (chance %.2f)\" % (1 / needle[\"candidates\"])))"'
mkdir "$work/few"
cp "$work"/report/page* "$work/few" 2>"$work/err"
[ -e "$work/few/page.html" ] || for name in probes map_0; do # as page.py writes them, where there is no matplotlib
    echo "<figure class=\"half\" id=\"$name\">" >>"$work/few/page.html"
    touch "$work/few/page_$name.png"
done
touch "$work"/few/mine.png "$work"/few/page_of_mine.png
run "${model[@]}" -j "$val" --report "$work/few" -t 16 -m 1 -b 3 --cuts 3 -k 3 --no-page --json "$work/few.json"
check "the page and pictures of an earlier report are gone, and no other file" '[ $? = 0 ] && [ "$(cd "$work/few" && echo *)" = "mine.png page_of_mine.png report.json" ]'
check "maps have no more tokens than a sequence has" '[ "$(json "$work/few/report.json" "{len(x[\"tokens\"]) for x in d[\"maps\"]}")" = "{16}" ]'
check "any k is measured head by head" '[ "$(json "$work/few/report.json" "all(0 < h[\"mass_nosink_k\"] <= 1 and h[\"mass\"][1] < h[\"mass_k\"] < h[\"mass\"][2] for h in d[\"heads\"])")" = True ]'
check "the JSON has the report as well, and the mass that is printed" '[ "$(json "$work/few.json" "d[\"report\"] == json.load(open(\"$work/few/report.json\"))")" = True ] &&
    grep -q "mean top-3 mass $(json "$work/few.json" "\"%.4f (without position 0: %.4f)\" % (d[\"report\"][\"mass\"][\"mean\"], d[\"report\"][\"mass\"][\"nosink\"])")" "$work/out"'
run "${model[@]}" -j "$val" --report "$work/one" -t 16 -m 3 -b 1 --cuts 3 -k 3 --no-page --json "$work/one.json"
check "a report is of all its sequences, whatever the batch" 'python3 -c "
import json, sys
a, b = (json.load(open(f))[\"report\"] for f in sys.argv[1:])
assert a[\"text\"][\"sequences\"] == b[\"text\"][\"sequences\"] == 3
for x, y in zip(a[\"heads\"], b[\"heads\"]):
    assert all(abs(p - q) < 1e-5 for p, q in zip(x[\"mass\"][:4] + [x[\"mass_k\"]], y[\"mass\"][:4] + [y[\"mass_k\"]]))
assert abs(a[\"loss\"][\"dense\"][\"loss\"] - b[\"loss\"][\"dense\"][\"loss\"]) < 1e-5
" "$work/few.json" "$work/one.json" 2>"$work/err"'
run "${model[@]}" -j "$val" --report "$work/beyond" -t 16 -m 1 -b 1 --cuts 3 -k 50 --no-page
check "a k that no row exceeds is not measured" '[ $? = 0 ] && grep -q "mean top-50 mass not measured" "$work/out"'
# Its statistics and its maps are of the same 16 rows.
check "a map is of the head that it names" 'holds "$work/beyond/report.json" "len(d[\"maps\"]) == 8 and all(
    near(sum(max(row) for row in x[\"rows\"][1:]) / 15, h[\"mass\"][0], 1e-5) for x in d[\"maps\"]
    for h in d[\"heads\"] if (h[\"layer\"], h[\"head\"]) == (x[\"layer\"], x[\"head\"]))"'
check "and a page, where there is matplotlib" '[ -s "$work/report/page.html" ] || ! python3 -c "import matplotlib" 2>/dev/null'

# ---- bad input: one sentence, exit status 1, no crash
refuse() { # words that the sentence must hold, then arguments
    local words=$1
    shift
    timeout 60 "$infer" "$@" >"$work/out" 2>"$work/err"
    check "refused: $*" '[ $? = 1 ] && [ "$(grep -c "^error: " "$work/err")" = 1 ] && grep -qF -- "$words" "$work/err"'
}
refuse "there is no 'nothing'" -e nothing
refuse "data/fetch 355M" -e 355M
refuse "-k (--topk) takes" -k 0
refuse "--attention takes dense, topk or pages" --attention sparse
refuse "--epsilon takes" --epsilon 2
refuse "--cut-kinds takes" --cut-kinds top
refuse "cannot read the prompts" "${model[@]}" -f "$work/none"
refuse "has 128 positions" "${model[@]}" --eval "$val" -t 4096
refuse "no such" "${model[@]}" --eval "$work/no such*.bin"
refuse "neither text nor a token shard" "${model[@]}" --eval "$work/log/run1/step_00000120/model.safetensors"
printf x >"$work/one.txt"
refuse "there is nothing to predict" "${model[@]}" --eval "$work/one.txt"
refuse "the context 128" "${model[@]}" --context-full stop -p "$(printf '%0200d' 1)"
refuse "lambada.jsonl" "${model[@]}" --lambada "$work/lambada.jsonl"
refuse "belongs to no flag" stray
python3 - "$work/unnamed" <<'END'
import json, os, struct, sys
os.mkdir(sys.argv[1])
C, T = 16, 32
shapes = {"wte.weight": [50257, C], "wpe.weight": [T, C], "h.0.attn.c_attn.weight": [C, 3 * C], "h.0.attn.c_attn.bias": [3 * C],
          "h.0.attn.c_proj.weight": [C, C], "h.0.attn.c_proj.bias": [C], "h.0.mlp.c_fc.weight": [C, 4 * C],
          "h.0.mlp.c_fc.bias": [4 * C], "h.0.mlp.c_proj.weight": [4 * C, C], "h.0.mlp.c_proj.bias": [C],
          **{f"{name}.{part}": [C] for name in ("h.0.ln_1", "h.0.ln_2", "ln_f") for part in ("weight", "bias")}}
tensors, end = {}, 0
for name, shape in shapes.items():
    begin, end = end, end + 4 * shape[0] * (shape + [1])[1]
    tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
header = json.dumps(tensors).encode()
with open(sys.argv[1] + "/model.safetensors", "wb") as f:
    f.write(struct.pack("<Q", len(header)) + header + bytes(end))
with open(sys.argv[1] + "/config.json", "w") as f:
    json.dump({"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": C, "n_positions": T, "vocab_size": 50257}, f)
END
mkdir "$work/elsewhere" # a program looks for GPT-2's vocabulary in its own folder's data/
cp "$infer" "$work/elsewhere/" && infer=$work/elsewhere/infer_gpt2cpu
refuse "a prompt needs a vocabulary, and none is known for this model: data/fetch gpt2 gets GPT-2's" -e "$work/unnamed" -p x
refuse "--interactive needs a vocabulary, and none is known for this model: data/fetch gpt2 gets" -e "$work/unnamed" --interactive
infer=$root/infer_gpt2cpu
python3 -c "
import struct, sys
sys.stdout.buffer.write(struct.pack('<256i', 20240520, 1, 500, 300, *[0] * 252) + bytes(1000))" >"$work/other_vocabulary.bin"
refuse "have a vocabulary of 300 tokens, and the model one of 257" "${model[@]}" --eval "$work/other_vocabulary.bin"
refuse "is where --report writes the report alone" "${model[@]}" -j "$val" --report "$work/few" --json "$work/few/../few/report.json" -t 16 -m 1 --cuts 3
refuse "three ways to give prompts" "${model[@]}" -p x --interactive
refuse "run one after the other" "${model[@]}" -p x --eval "$val"
refuse "--json keeps one generation" "${model[@]}" --interactive --json "$work/text.json"
refuse "cannot create" "${model[@]}" -p x --json "$work/none/text.json"
refuse "--batch is for --eval, --lambada, --hellaswag, --probes and --report: give one" "${model[@]}" -b 2
refuse "--cuts is for --eval and --report: give one" "${model[@]}" --lambada tests/fixtures/tasks/lambada.jsonl --cuts 8
refuse "--no-page is for --report: give" "${model[@]}" --eval "$val" --no-page
refuse "--data is for --report and --probes: give" "${model[@]}" --eval "$val" -j "$val"
refuse "--limit is for --lambada, --hellaswag and --probes: give" "${model[@]}" --eval "$val" --limit 5
refuse "for --eval give --cuts" "${model[@]}" --eval "$val" -k 4
refuse "--attention is for generating text" "${model[@]}" --eval "$val" --attention pages
refuse "--tokens is for generating text" "${model[@]}" --probes -n 5
refuse "needs a context of 17 or more" "${model[@]}" --eval "$val" --probes -j "$val" -t 8
check "refused before anything was measured" '[ ! -s "$work/out" ]'
refuse "-e (--from) takes a name" -e "" -p x
check "text that cannot be written is an error" '! "$infer" "${model[@]}" -p x -n 3 >/dev/full 2>"$work/err" && grep -q "^error: the standard output could not be written" "$work/err"'
refuse "--epsilon is for --attention pages" "${model[@]}" -p x --epsilon 0.1
refuse "no such" "${model[@]}" --lambada tests/fixtures/tasks/lambada.jsonl --limit 1 --hellaswag "$work/no such.jsonl"
check "refused before the other task was measured" '[ ! -s "$work/out" ]'
refuse "-k goes with --attention topk" "${model[@]}" -p x -k 2 --attention dense
refuse "--eval takes a name" "${model[@]}" --eval ""
refuse "cannot read the prompts" "${model[@]}" -f "$work"
refuse "cannot create $work/nowhere/x.json" "${model[@]}" --eval "$val" --json "$work/nowhere/x.json"
check "refused before anything was measured" '[ ! -s "$work/out" ]'
refuse "there is a folder of that name" "${model[@]}" --eval "$val" --json "$work"
printf "\n\n" >"$work/blank.jsonl"
refuse "is empty" "${model[@]}" --lambada "$work/blank.jsonl"
cp -r "$work/log/run1/step_00000120" "$work/diverged"
python3 - "$work/diverged/model.safetensors" <<'END'
import json, struct, sys
with open(sys.argv[1], "r+b") as f:
    n = struct.unpack("<Q", f.read(8))[0]
    tensors = json.loads(f.read(n))
    begin, end = next(t["data_offsets"] for name, t in tensors.items() if name.endswith("h.1.attn.c_attn.weight"))
    f.seek(8 + n + begin)
    weights = struct.unpack(f"<{(end - begin) // 4}f", f.read(end - begin))
    f.seek(8 + n + begin)
    f.write(struct.pack(f"<{len(weights)}f", *(w * 1e25 for w in weights)))
END
refuse "the loss is not finite" -e "$work/diverged" --eval "$val" -m 1 -b 1 --cuts 8
refuse "the logits are not finite" -e "$work/diverged" -p "int a" -n 10
check "no text was made of them" '[ "$(cat "$work/out")" = "int a" ]'

check "the README's table of flags is the program's (make readme)" '"$infer" --help-markdown | dev/put_table README.md infer-flags --check'
"$infer" --help >"$work/out" 2>&1
check "--help shows every flag" '[ $? = 0 ] && [ "$(grep -cE "^  (-|    --)" "$work/out")" = "$("$infer" --help-markdown | grep -c "^| .-")" ]'
check "--help says what becomes of empty lines among prompts" grep -q "empty lines are skipped" "$work/out"

finish
