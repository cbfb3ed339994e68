#!/usr/bin/env bash
# The paper's runs in miniature, on the CPU backend: a plan that stands once it is made, a kill in the middle of it after
# which the same command goes on, and tables whose numbers are those of the JSON and of the run folders. Bad input is one
# sentence. Where matplotlib is not installed, the figures are not looked for, and not counted.
set -u
cd "$(dirname "$0")/.."
root=$PWD
source tests/script.sh
export PYTHONDONTWRITEBYTECODE=1
paper() { dev/paper/run.sh --device cpu "$@" >"$work/out" 2>"$work/err"; }
json() { python3 -c "import json,sys; d = json.load(open(sys.argv[1])); print($2)" "$1"; }

# ---- the planner, which needs no program
planner() { (cd dev/paper && python3 -c "
from plan import *
measured = dict(update_s=0.1, start_s=1, eval_s=5, validation_s=1, report_s=10, speed_s=60, figures_s=30)
limits = SIZES['tiny']['updates']
cells = all_cells(['entropy', 'target'], False)
$1"); }
check "the grid is whole: every lambda, k and regularizer, and lambda 0 once a seed" '[ "$(planner "
grid = {(c[\"reg\"], c[\"k\"], c[\"lambda\"]) for c in cells if c[\"group\"] in (\"column\", \"other k\")}
print(len(grid), len(grid) == len(REGS) * len(KS) * len(LAMBDAS), sum(c[\"group\"] == \"plain\" for c in cells) == len(SEEDS))")" = "48 True True" ]'
check "no two cells share a name, whatever the trainer can" '[ "$(planner "
for can in ([], [\"entropy\"], [\"entropy\", \"target\"]):
    for continued in (False, True):
        names = [c[\"name\"] for c in all_cells(can, continued)]
        assert len(set(names)) == len(names)
print(1)")" = 1 ]'
check "what answers the question comes first: plain, then k = 8" '[ "$(planner "print([c[\"group\"] for c in cells[:15]] == [\"plain\"] * 3 + [\"column\"] * 12)")" = True ]'
check "more time never means fewer updates or fewer cells of the first wave, and the plan fits" '[ "$(planner "
last = (0, 0)
for minutes in (5, 10, 20, 50, 100, 200, 400, 800, 1600, 3200):
    updates, fit = choose_updates(cells, limits, measured, 60 * minutes, 2)
    assert limits[0] <= updates <= limits[2]
    needed = sum(cell_seconds(c, updates, measured) for c in cells[:fit]) / 2 + (final_seconds(cells[:fit], measured) if fit else 0)
    assert needed <= 60 * minutes, (minutes, needed)
    wave1 = sum(c[\"wave\"] == 1 for c in cells[:fit])
    assert updates >= last[0] and wave1 >= last[1], (minutes, updates, wave1, last)
    last = (updates, wave1)
print(last[0] == limits[2] and fit == len(cells))")" = True ]'
check "the least budget that is named is enough, and nine tenths of it are not" '[ "$(planner "
least = least_seconds(cells[:2], limits[0], measured, 2)
print(choose_updates(cells, limits, measured, least, 2)[1] >= 2, choose_updates(cells, limits, measured, 0.9 * least, 2)[1] < 2)")" = "True True" ]'
check "the rule: the smallest dense loss of those that lose little when cut, else the smallest loss when cut" '[ "$(planner "
a, b, c = (cell(\"column\", 1, lam) for lam in (0.1, 0.3, 1))
print(choose([(a, 2.0, 2.0101), (b, 2.2, 2.205), (c, 2.1, 2.109)])[\"tail\"][\"lambda\"], choose([(a, 2.0, 2.2), (b, 2.1, 2.15)])[\"tail\"][\"lambda\"], choose([]))")" = "1 0.3 {}" ]'
check "repeats: every named cell with every seed, seed by seed, plain first" '[ "$(planner "
print(*(c[\"name\"] for c in repeats(cells, [\"k8-tail-l0.3-rise35to70\", \"plain\", \"entropy-l0.1-*\"], [7, 8]) if c[\"seed\"] == 7))")" = "plain-s7 k8-tail-l0.3-rise35to70-s7 entropy-l0.1-rise70-s7 entropy-l0.1-rise35to70-s7" ]'

mkdir -p "$work/fresh/dev" && cp -r dev/paper "$work/fresh/dev"
check "--help needs no program, and builds none" '"$work/fresh/dev/paper/run.sh" --help >"$work/out" 2>"$work/err" && grep -q -- --budget "$work/out" && [ ! -s "$work/err" ]'

# ---- bad input
refuse() { # words that the sentence must hold, then arguments
    local words=$1
    shift
    paper --out "$work/refused" "$@"
    check "refused: $*" '[ $? = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -qF -- "$words" "$work/err"'
}
refuse "--budget takes a time" --budget soon
refuse "nothing was run there yet" --tables
refuse "no cell has a name like nothing" --data "$work/nothing" --cells nothing
refuse "no token shard matches" --data "$work/nothing" --cells 'plain-*'
refuse "chosen-tail-s1338 repeats the best cell with tail and k = 8, and --cells has none to choose from: name some, such as k8-tail-*, too" --data "$work/nothing" --cells 'plain-*,k8-kl-l0.1-rise70-*,chosen-tail-*'
refuse "name them with --cells" --seeds 7,8
refuse "name plain among the --cells" --data "$work/nothing" --seeds 7,8 --cells 'k8-tail-l1-rise70'
refuse "with their top 8: leave k16-tail-l0.3-rise70 out" --data "$work/nothing" --seeds 7,8 --cells 'plain,k16-tail-l0.3-rise70'

# ---- a miniature
build/tokenize --tokenizer bytes -o "$work/text" tests/fixtures/plays.txt >"$work/out" 2>&1 || bad "tokenizing"
mini=(--out "$work/mini" --data "$work/text" --context 32 --batch 2 --updates 20 --eval-tokens 256
    --cells 'plain-s133[78],k8-tail-l1-rise70-*,k8-tail-l0.003-*,chosen-tail-s1338')
paper "${mini[@]}" --dry-run
check "--dry-run shows the plan and leaves none" '[ $? = 0 ] && grep -q "  plain-s1337 " "$work/out" && [ ! -e "$work/mini/plan.json" ]'
# A background job ignores SIGINT, and what is started where it is ignored does so, too: not so this.
heeding_signals() { exec python3 -c 'import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "$@"; }
stopped() { # by a signal to the whole group, as Ctrl-C's is, while the time of an update is measured
    set -m # a group of its own
    heeding_signals dev/paper/run.sh --device cpu "${mini[@]}" --out "$work/stopped" >"$work/out" 2>"$work/err" &
    pid=$!
    set +m
    killed=
    for _ in $(seq 1200); do
        [ ! -d "$work/stopped/calibration" ] || for p in $(cat /proc/$pid/task/$pid/children); do
            [[ $(readlink /proc/$p/exe) != *gpt2cpu ]] || killed=$p
        done
        [ -z "$killed" ] || break
        sleep 0.05
    done
    kill "-$1" -- "-$pid"
    wait $pid
}
gone() { for p in $killed; do [ ! -e "/proc/$p" ] || grep -q "^State:.Z" "/proc/$p/status" || return 1; done; }
for signal in INT TERM; do
    stopped $signal
    check "SIG$signal while the time of an update is measured: a sentence, and no traceback" '[ $? = 130 ] && [ ! -s "$work/err" ] &&
        [ "$(tail -n 1 "$work/out")" = "stopped: the same command goes on" ]'
    check "SIG$signal takes the programs along" '[ -n "$killed" ] && gone'
    rm -rf "$work/stopped"
done
dev/paper/run.sh --device cpu --out "$work/long" --data "$work/text" --context 32 --batch 2 --updates 1000000 --eval-tokens 64 \
    --budget 1000h --cells plain-s1337 >"$work/out" 2>"$work/err" &
pid=$!
waits_for 'grep -q "\"step\":9," "$work/long/runs/plain-s1337/metrics.jsonl" 2>/dev/null'
killed=$(cat /proc/$pid/task/$pid/children) begin=$SECONDS
kill -TERM $pid
wait $pid
check "SIGTERM while a cell is trained: the trainer saves, and both are gone soon" '[ $? = 130 ] && [ $((SECONDS - begin)) -lt 30 ] &&
    [ -n "$killed" ] && gone && grep -q "^stopped after .*: go on with -y" "$work/long/runs/plain-s1337/train.log"'
rm -rf "$work/long"
stops_at_once() { # programs that ignore Ctrl-C, as in the background of a script
    PYTHONPATH=dev/paper timeout 30 python3 - <<'END'
import signal
import subprocess
from runner import Runner
signal.signal(signal.SIGINT, signal.SIG_IGN)
runner = object.__new__(Runner)
runner.processes = [subprocess.Popen(["sleep", "100"])]
runner.stop()
END
}
check "so are programs that ignore Ctrl-C" stops_at_once
dev/paper/run.sh --device cpu "${mini[@]}" >"$work/out" 2>"$work/err" &
pid=$!
killed= # run.sh becomes Python, and its children are the programs
waits_for '[ -n "$(find "$work/mini/runs" -name cell.json 2>/dev/null)" ] && killed=$(cat /proc/$pid/task/$pid/children) && [ -n "$killed" ]'
paper "${mini[@]}"
check "two calls do not work in one folder" '[ $? = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q "another run.sh" "$work/err"'
kill -KILL $pid
wait $pid 2>/dev/null
sleep 0.3
check "a kill takes the programs along" '[ -n "$killed" ] && gone'
cp "$work/mini/plan.json" "$work/plan.json"
check "some cells are done then, and others are not" '[ "$(ls "$work"/mini/runs/*/cell.json | wc -l)" -lt 5 ]'
before=$(ls --full-time "$work"/mini/runs/*/cell.json)
paper --out "$work/mini" --publish "$work/published"
check "the same folder goes on" '[ $? = 0 ] && grep -q "of 5 cells are done" "$work/out"'
check "with the same plan" 'cmp -s "$work/mini/plan.json" "$work/plan.json"'
check "what was done is not done again" '[ "$(ls --full-time $(awk "{print \$NF}" <<<"$before"))" = "$before" ]'
paper --out "$work/mini"
check "who calls it again reads that all cells are done, the chosen one too" '[ $? = 0 ] && grep -q "^5 of 5 cells are done" "$work/out"'
check "every cell is done" '[ "$(ls "$work"/mini/runs/*/cell.json | wc -l)" = 5 ]'
mkdir -p "$work/half/runs" && cp "$work/mini/plan.json" "$work/half/" && cp -r "$work/mini/runs/plain-s1337" "$work/half/runs/" && rm "$work/half/runs/plain-s1337/eval.json"
next_program() { # that run.sh would start for that cell
    PYTHONPATH=dev/paper python3 - "$work/half" <<'END'
import sys
from common import read_json
from runner import Programs, Runner
runner = object.__new__(Runner)
runner.out, runner.plan, runner.programs, runner.kinds = sys.argv[1], read_json(sys.argv[1] + "/plan.json", {}), Programs(False), True
print(next(runner.steps(runner.plan["cells"][0]))[0][0])
END
}
check "a run that is trained is measured" '[ "$(next_program)" = ./infer_gpt2cpu ]'
sed -i '$d' "$work/half/runs/plain-s1337/metrics.jsonl"
check "but first trained on, where its last validation was interrupted" '[ "$(next_program)" = ./train_gpt2cpu ]'
check "a killed run has all its updates, once each" '[ "$(cat "$work"/mini/runs/*/metrics.jsonl | grep -c "\"loss\"")" = 100 ]'
check "the optimizer and the earlier checkpoints of what is done are gone" '[ "$(find "$work/mini/runs" -name model.safetensors | wc -l)" = 5 ] &&
    [ -z "$(find "$work/mini/runs" -name optimizer.safetensors)" ]'
check "nothing is left half" '[ -z "$(find "$work/mini" -name "*.part")" ]'
check "the chosen cell is that of the rule with another seed" '[ "$(json "$work/mini/chosen.json" "d[\"scratch\"][\"tail\"][\"name\"].replace(\"s1337\", \"s1338\")")" = "$(cd "$work/mini/runs" && ls -d k8-tail-*-s1338)" ]'

results=$work/mini/results.json
check "--publish copies the tables, the JSON and the figures" '
    [ "$(cd "$work/mini" && sha256sum tables.md results.json $(ls | grep png))" = "$(cd "$work/published" && sha256sum tables.md results.json $(ls | grep png))" ]'
cat >"$work/compare.py" <<'END'
"""compare.py DIR trainer|tables: how many cells agree; stops at the first that does not."""
import json
import sys

out, what = sys.argv[1:]
results = json.load(open(out + "/results.json"))
cells = results["cells"]


def trainer(cell):
    lines = [json.loads(line) for line in open(f"{out}/runs/{cell['name']}/metrics.jsonl")]
    last = [line["val_ce"] for line in lines if "val_ce" in line][-1]
    assert abs(last - cell["loss"]["dense"]) < 1e-5 * last, (cell["name"], last, cell["loss"]["dense"])


def tables(cell):
    text = open(out + "/tables.md").read().split("## Lambda at k = 8\n")[1].split("\n## ")[0]
    rows = {line.split("|")[-2].strip(" `"): line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")}
    row = [x.strip().replace("−", "-") for x in rows[cell["name"]]]
    plain = next(c for c in cells if c["name"] == "plain-s1337")
    dense = cell["loss"]["dense"]
    cut = next(c["loss"] for c in cell["loss"]["cuts"] if (c["cut"], c["k"]) == ("topk", 8))
    wanted = (dense, dense - plain["loss"]["dense"], cell["mass"], 1 - cell["mass_nosink"], cut, cut - dense)
    for text, want in zip(row[2:8], wanted):
        assert abs(float(text) - want) <= 0.50001e-4, (cell["name"], text, want)
    norms = [line["norm"] for line in map(json.loads, open(f"{out}/runs/{cell['name']}/metrics.jsonl")) if "norm" in line]
    assert abs(float(row[8]) - max(norms)) <= 0.050001, (cell["name"], row[8], max(norms))


some = [c for c in cells if what == "trainer" or c["group"] == "column"]
for cell in some:
    {"trainer": trainer, "tables": tables}[what](cell)
print(len(some))
END
agree() { python3 "$work/compare.py" "$work/mini" "$1" 2>"$work/err"; }
check "a dense loss is that of the trainer's last validation, on the same tokens" '[ "$(agree trainer)" = 5 ]'
check "numbers of the tables are those of the JSON" '[ "$(agree tables)" = 2 ]'
cat >"$work/closely.py" <<'END'
"""closely.py DIR: the tables of the models that are compared closely, against the run folders and the reports; what no
run is sure to show is asked of the tables' own functions, of results that are changed for that."""
import copy
import json
import re
import sys

import tables

out = sys.argv[1]
page = open(out + "/tables.md").read()
stem = json.load(open(out + "/chosen.json"))["scratch"]["tail"]["name"].rsplit("-s", 1)[0]
seeds = (1337, 1338)
MODELS = {model: [f"{model}-s{seed}" for seed in seeds] for model in ("plain", stem)}
runs = [name for names in MODELS.values() for name in names]
from_json = lambda name: json.load(open(f"{out}/{name}"))
losses = {name: from_json(f"runs/{name}/eval.json")["eval"] for name in runs}
reports = {name: from_json(f"reports/{name}/report.json") for name in runs}
probes = {name: from_json(f"runs/{name}/probes.json")["probes"] for name in runs}
last = {name: [line for line in map(json.loads, open(f"{out}/runs/{name}/metrics.jsonl")) if "val_mass" in line][-1]
        for name in runs}


def rows_of(text):
    """The first table of the text: each row as {head: cell}."""
    lines = [[x.strip(" `") for x in line.split("|")[1:-1]] for line in text.replace("−", "-").splitlines()
             if line.startswith("| ")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def section(title):
    return re.split("\n##", page.split(f"## {title}\n")[1])[0]


def mean(values):
    return sum(values) / len(values)


def agree(shown, want, digits=4):
    numbers = [float(x) for x in re.findall(r"[-+]?[0-9.]*[0-9]", shown)]
    assert len(numbers) == len(want) and all(abs(a - b) <= 0.50001 * 10 ** -digits for a, b in zip(numbers, want)), \
        (shown, want)


def spread(shown, values, digits=4):
    """Of both seeds: mean (smallest .. largest)."""
    agree(shown, [mean(values), min(values), max(values)], digits)


def dense(name):
    return losses[name]["dense"]["loss"]


def cut(name, kind, k):
    return next(c["loss"] for c in losses[name]["cuts"] if (c["cut"], c["k"], c["renormalized"]) == (kind, k, True))


def summary():
    rows = {row["model"]: row for row in rows_of(section("Plain and chosen"))}
    assert set(rows) == set(MODELS)
    for model, names in MODELS.items():
        row = rows[model]
        spread(row["validation loss"], [dense(name) for name in names])
        if model == "plain":
            assert row["above plain"] == ""
        else:
            spread(row["above plain"], [dense(name) - dense(plain) for name, plain in zip(names, MODELS["plain"])])
        spread(row["cost of the cut to the top 8"], [cut(name, "topk", 8) - dense(name) for name in names])
        spread(row["loss when cut"], [cut(name, "topk", 8) for name in names])
        spread(row["top-8 mass"], [last[name]["val_mass"] for name in names])
        spread(row["outside of it, without position 0"], [1 - last[name]["val_mass_nosink"] for name in names])
        spread(row["keys for 95%"], [mean([h["keys95"] for h in reports[name]["heads"]]) for name in names], 2)


def matrix():
    kinds = {"topk": "top k", "first_recent": "position 0 and the most recent", "recent": "the most recent",
             "random": "random"}
    rows = {(row["model"], row["keys kept"]): row for row in rows_of(section("Loss when every row keeps k keys"))}
    assert set(rows) == {(model, kind) for model in MODELS for kind in kinds.values()}
    for model, names in MODELS.items():
        for kind, words in kinds.items():
            spread(rows[model, words]["all"], [dense(name) for name in names])
            for k in (1, 2, 4, 8, 16):
                spread(rows[model, words][f"k = {k}"], [cut(name, kind, k) for name in names])


def layers():
    rows = {(row["model"], int(row["layer"])): row for row in rows_of(section("Attention by layer"))}
    assert set(rows) == {(model, layer) for model in MODELS for layer in range(reports[runs[0]]["model"]["layers"])}
    for (model, layer), row in rows.items():
        heads = [[h for h in reports[name]["heads"] if h["layer"] == layer] for name in MODELS[model]]
        of = lambda value: [mean([value(h) for h in one]) for one in heads]
        for head, value, digits in (
                ("top-8 mass", lambda h: h["mass_k"], 4), ("without position 0", lambda h: h["mass_nosink_k"], 4),
                ("keys for 90%", lambda h: h["keys90"], 2), ("99%", lambda h: h["keys99"], 2),
                ("entropy", lambda h: h["entropy"], 3), ("on position 0", lambda h: h["first"], 3),
                ("on itself", lambda h: h["self"], 3), ("on the previous", lambda h: h["previous"], 3)):
            agree(row[head], [mean(of(value))], digits)
        spread(row["95%"], of(lambda h: h["keys95"]), 2)
        agree(row["largest τ of a row"], [max(h["tau"]["max"] for one in heads for h in one)])


def probes_in(text, probes):
    rows = {(row["model"], row["keys kept"]): row for row in rows_of(text)}
    assert set(rows) == {(model, kept) for model in MODELS for kept in ("all", "top 8")}
    for model, names in MODELS.items():
        for way, kept in (("dense", "all"), ("topk", "top 8")):
            row, of = rows[model, kept], [probes[name] for name in names]
            spread(row["induction: accuracy"], [p["induction"][way]["accuracy"] for p in of], 3)
            spread(row["loss saved by the repetition"], [p["induction"][way]["score"] for p in of], 3)
            spread(row["recall: accuracy"], [p["recall"][way]["accuracy"] for p in of], 3)
            spread(row["needle: accuracy over depths"], [mean(p["needle"][way]) for p in of], 3)


def made_up_probes():
    """Every accuracy is another: those of the miniature are mostly 0."""
    results, made_up = from_json("results.json"), {}
    for i, c in enumerate(c for c in results["cells"] if "probes" in c):
        for j, way in enumerate(("dense", "topk")):
            at = 0.01 * (2 * i + j)
            c["probes"]["induction"][way].update(accuracy=0.1 + at, score=0.2 + at)
            c["probes"]["recall"][way]["accuracy"] = 0.3 + at
            c["probes"]["needle"][way] = [at + 0.1 * x for x in range(len(c["probes"]["needle"][way]))]
        made_up[c["name"]] = c["probes"]
    probes_in(tables.probes_table(results, "scratch"), made_up)


def bars():
    """Which bars are met by cells of made-up costs, one by one and by their mean."""
    results = from_json("results.json")
    for above, cost, plain_cost, out_of_it, want in (
            (0.015, 0.005, 0.02, 0.04, ["yes", "yes", "yes"]), (0.025, 0.005, 0.02, 0.04, ["no", "yes", "yes"]),
            (0.015, 0.015, 0.02, 0.04, ["yes", "no", "yes"]), (0.015, 0.005, 0.02, 0.06, ["yes", "yes", "no"]),
            (0.02, 0.0099, 0.0101, 0.0499, ["yes", "yes", "yes"]), (0.0201, 0.01, 0.02, 0.05, ["no", "no", "no"]),
            (0.015, 0.005, 0.008, 0.04, ["yes", "no", "yes"])):  # plain costs nothing either
        d = copy.deepcopy(results)
        for c in d["cells"]:
            plain = c["group"] == "plain"
            c["cost"]["8"] = plain_cost if plain else cost
            if not plain:
                c["above_plain"], c["mass_nosink"] = above, 1 - out_of_it
        rows = {row["run"]: row for row in rows_of(tables.bars_table(d, "scratch"))}
        for name in (f"{stem}-s1337", f"mean of `{stem}`, 2 seeds") if want.count("yes") > 1 else ():
            row = list(rows[name].values())
            assert row[2::2] == want, (row, want)
            for shown, value in zip(row[1::2], (above, cost, out_of_it)):
                agree(shown, [value])
        cell = next(c for c in d["cells"] if c["name"] == f"{stem}-s1338")
        assert ["yes" if met else "no" for met in tables.bars_of(d, cell).values()] == want


def last_losses():
    """Of the last updates of a run, and no others."""
    tables.LAST_UPDATES = 5
    cell = tables.gather_cell(out, f"{out}/runs/{runs[0]}", from_json(f"runs/{runs[0]}/cell.json"), from_json("plan.json"))
    ce = [line["ce"] for line in map(json.loads, open(f"{out}/runs/{runs[0]}/metrics.jsonl")) if "ce" in line]
    assert abs(cell["last_ce"] - mean(ce[-5:])) < 1e-6, (cell["last_ce"], ce)


def shared_seeds():
    """Means of several models are over the seeds that all of them have."""
    found = [("a", [{"seed": s} for s in (1, 2, 3)]), ("b", [{"seed": s} for s in (2, 3, 4)])]
    assert [[c["seed"] for c in cells] for _, cells in tables.on_shared_seeds(found)] == [[2, 3], [2, 3]]


def shared_cuts():
    """Of a cut that one model has for some of its seeds alone, the others' and the dense losses are of those seeds, too."""
    results = from_json("results.json")
    two = [c for c in results["cells"] if c["name"] in MODELS["plain"]][:2]
    top = [cut for cut in two[1]["loss"]["cuts"] if cut["cut"] == "topk"]
    results.update(chosen={}, cells=[*two, dict(two[0], name="x-s1", group="repeat"),
                                     dict(two[1], name="x-s2", group="repeat", loss=dict(two[1]["loss"], cuts=top))])
    rows = {(row["model"], row["keys kept"]): row for row in rows_of(tables.matrix_table(results, "scratch"))}
    for model in ("plain", "x"):
        assert (rows[model, "top k"]["seeds"], rows[model, "the most recent"]["seeds"]) == ("2", "1")
        assert rows[model, "the most recent"]["all"] == f'{two[0]["loss"]["dense"]:.4f}', rows[model, "the most recent"]


def schedules():
    """In the table by layers, beginning and end, whatever the order they were run in."""
    results = from_json("results.json")
    cell = next(c for c in results["cells"] if c["group"] == "column" and c["seed"] == 1337)
    ways = [("90%", "0", ""), ("70%", "35%", ""), ("0", "0", ""), ("70%", "0", "0x10"), ("50%", "0", "")]
    results["cells"] = [dict(cell, name=f"x{i}", group="schedule", rise=rise, start=start, layers=layers)
                        for i, (rise, start, layers) in enumerate(ways)]
    assert [row["run"] for row in rows_of(tables.schedule_table(results))] == ["x2", "x4", "x0", "x1", "x3"]


for what, test in (("plain and chosen", summary), ("the last updates' losses", last_losses),
                   ("means over the seeds that are shared", shared_seeds), ("cuts of some seeds alone", shared_cuts), ("the schedules' order", schedules), ("loss when every row keeps k keys", matrix),
                   ("attention by layer", layers), ("probes", lambda: probes_in(section("Probes"), probes)),
                   ("probes of made-up accuracies", made_up_probes), ("the bars, of made-up costs", bars)):
    try:
        test()
        print(True, what)
    except Exception as problem:
        print(False, what)
        print(what, repr(problem), file=sys.stderr)
print(True, "all of them were compared")
END
last=
while read -r verdict what; do
    check "tables against the files: $what" [ "$verdict" = True ]
    last=$what
done < <(PYTHONPATH=dev/paper python3 "$work/closely.py" "$work/mini" 2>"$work/err")
check "tables against the files: no table left out" [ "$last" = "all of them were compared" ]
check "every run has its commit and its command" '[ "$(json "$results" "all(c[\"commit\"] and c[\"commands\"][0].startswith(\"./train_gpt2\") for c in d[\"cells\"])")" = True ] &&
    [ "$(sed -n "/^## Runs/,\$p" "$work/mini/tables.md" | grep -c "^| .[pk]")" = 5 ]'
check "speed of training and of decoding" '[ "$(json "$results" "len(d[\"training\"]) == 4 and {(r[\"run\"], r[\"attention\"]) for r in d[\"decoding\"]} == {(r[\"run\"], a) for r in d[\"decoding\"] for a in (\"dense\", \"topk\", \"pages\")} and len(d[\"decoding\"]) > 0 and all(r[\"tok_s\"] for r in d[\"training\"] + d[\"decoding\"])")" = True ]'
if python3 -c "import matplotlib" 2>/dev/null || /usr/bin/python3 -c "import matplotlib" 2>/dev/null; then
    check "the figures" '[ "$(ls "$work"/mini/*.png | wc -l)" = 5 ] && [ -z "$(find "$work/mini" -name "*.png" -size +300k)" ]'
else
    check "without matplotlib a sentence says so" 'grep -q "no figures, for they need matplotlib" "$work/out"'
fi
check "it has what was left out" 'grep -q "^Left out: " "$work/mini/tables.md" || "$root/train_gpt2cpu" --help | grep -q -- --target-loss'

# ---- files of it that are lost or damaged
rm "$work/mini/reports/plain-s1337/report.json"
(cd dev/paper && python3 -c '
import json, sys
from runner import Programs, Runner, lock
out = sys.argv[1]
plan = json.load(open(out + "/plan.json"))
Runner(out, plan, Programs(False), 60, lock(out)).report(plan["cells"][0])
' "$work/mini") >"$work/out" 2>"$work/err"
check "a report that is missing is made again, and nothing else" '[ -s "$work/mini/reports/plain-s1337/report.json" ] && [ "$(wc -l <"$work/out")" = 1 ]'
cp "$work/mini/runs/plain-s1337/eval.json" "$work/kept"
echo '[]' >"$work/mini/runs/plain-s1337/eval.json"
paper --out "$work/mini" --tables
check "JSON of another shape: one sentence, which names the file" '[ $? = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] &&
    grep -qF "plain-s1337/eval.json is not as it was written (it is not an object): delete it" "$work/err"'
cp "$work/kept" "$work/mini/runs/plain-s1337/eval.json"
cat >"$work/damaged.py" <<'END'
"""damaged.py DIR: the same of other files, in one process: each is damaged, and the sentence must have the words."""
import json
import os
import sys

import common
import tables
from shapes import PLAN

out = sys.argv[1]


def gather():
    try:
        plan = common.read_json(out + "/plan.json", PLAN)
        tables.gather(out, plan)
    except common.Bad as problem:
        return str(problem)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was said"


def changed(statement):
    def change(text):
        d = json.loads(text)
        exec(statement, {"d": d})
        return json.dumps(d)
    return change


lines = lambda begin, end: lambda text: "".join(text.splitlines(True)[begin:end])
for name, words, change in (
        ("plan.json", "(size is missing): delete it", lambda _: '{"a": 1}'),
        ("plan.json", "cells[1].k is not a whole number", changed("d['cells'][1]['k'] = True")),
        ("plan.json", "cells is empty", changed("d['cells'] = []")),
        ("chosen.json", "scratch.tail.name is missing", changed("del d['scratch']['tail']['name']")),
        ("speed.json", "[0].ms is empty", changed("d[0]['ms'] = []")),
        ("reports/plain-s1337/report.json", "at every k", changed("d['heads'][1]['mass'].pop()")),
        ("runs/plain-s1337/cell.json", "settings.family is none of", changed("d['settings']['family'] = 'x'")),
        ("runs/plain-s1337/eval.json", "no loss when cut to the top 8", changed("d['eval']['cuts'] = []")),
        ("runs/plain-s1337/eval.json", "makes it again", None),
        ("runs/plain-s1337/metrics.jsonl", "is missing: put it back", None),
        ("runs/plain-s1337/metrics.jsonl", "it has 7 of 20 updates", lines(0, 9)),
        ("runs/plain-s1337/metrics.jsonl", "the last validation is missing", lines(0, -1)),
        ("runs/plain-s1337/metrics.jsonl", "line 3 of", lambda text: lines(0, 2)(text) + '{"loss": 1}\n')):
    path = os.path.join(out, name)
    text = open(path).read()
    os.remove(path)
    if change:
        open(path, "w").write(change(text))
    said = gather()
    print(path in said and words in said and "\n" not in said, name, words)
    open(path, "w").write(text)
print(gather() == "nothing was said", "not at all: nothing is said, and all of them were tried")
END
last=
while read -r verdict what; do
    check "damaged: $what" [ "$verdict" = True ]
    last=$what
done < <(PYTHONPATH=dev/paper python3 "$work/damaged.py" "$work/mini" 2>&1)
check "damaged: no file left out" grep -q "all of them were tried" <<<"$last"

# ---- repeats
paper --out "$work/repeats" --data "$work/text" --context 32 --batch 2 --updates 4 --eval-tokens 64 --seeds 7-9 \
    --cells 'plain,k8-tail-l1-rise70,entropy-l0.1-rise70'
check "repeats: nine runs, tables, and nothing that is not asked for" '[ $? = 0 ] && [ "$(ls "$work"/repeats/runs/*/cell.json | wc -l)" = 9 ] &&
    [ ! -e "$work/repeats/reports" ] && [ ! -e "$work/repeats/speed.json" ] && [ ! -e "$work/repeats/chosen.json" ]'
cat >"$work/interval.py" <<'END'
"""The repeats' table against the run folders: mean and 95% interval of the difference from plain, by their definition."""
import json
import statistics
import sys

out = sys.argv[1]
dense = lambda name, seed: json.load(open(f"{out}/runs/{name}-s{seed}/eval.json"))["eval"]["dense"]["loss"]
seeds = (7, 8, 9)
text = open(out + "/tables.md").read().split("## Repeats\n")[1].split("Loss when every row")[0].replace("−", "-")
rows = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in text.splitlines() if "|" in line}


def agrees(shown, differences):
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = 4.303 * error  # of a table: t of 2 degrees of freedom
    t = abs(statistics.mean(differences)) / error
    p = 1 - t / (2 + t * t) ** 0.5  # for 2 degrees of freedom
    mean, interval, *of_one = map(float, shown.replace(" ± ", " ").replace("(", "").replace(")", "").split())
    return abs(mean - statistics.mean(differences)) < 1e-4 and abs(interval - half) < 1e-4 and all(
        abs(shown_p - p) < 6e-4 for shown_p in of_one) and len(of_one)


tail, entropy = "k8-tail-l1-rise70", "entropy-l0.1-rise70"
print(agrees(rows[tail][2], [dense(tail, s) - dense("plain", s) for s in seeds]),  # no p here
      agrees(rows[f"{tail} less {entropy}"][1], [dense(tail, s) - dense(entropy, s) for s in seeds]), rows[tail][0])
END
check "a figure of them, where there is matplotlib" '[ -s "$work/repeats/repeats.png" ] || grep -q "no figures" "$work/out"'
check "their means and intervals are those of the pairs" '[ "$(python3 "$work/interval.py" "$work/repeats" 2>"$work/err")" = "0 1 3" ]'
cat >"$work/seven.py" <<'END'
"""Tables of seven made-up seeds against the definitions: each number has its own place, and no two are alike."""
import statistics

import tables

SEEDS = range(7)


def cell(group, name, seed, dense, cut, outside, with_first):
    cuts = [{"cut": "topk", "k": 8, "loss": dense + cut, "kept": 0.9}]
    return {"group": group, "family": "scratch", "name": f"{name}-s{seed}", "seed": seed, "k": 8, "mass": 1 - with_first,
            "mass_nosink": 1 - outside, "loss": {"dense": dense, "cuts": cuts}, "cost": {"8": cut}}


def noise(i, scale):
    return scale * ((i * 37 + 11) % 17 - 8)


models = {"plain": [cell("plain", "plain", s, 2 + noise(s, 0.01), 0.03, 0.5, 0.6) for s in SEEDS]}
for n, name in enumerate(("a", "b", "c"), 1):
    models[name] = [cell("repeat", name, s, 2.001 * n ** 0.001 + noise(s, 0.01) + noise(s * n + n, 0.001), 0.004 + noise(s + n, 0.0009),
                         0.04 + noise(s * n, 0.002), 0.2 + noise(s + 2 * n, 0.01)) for s in SEEDS]
for name in "abc":
    for c, p in zip(models[name], models["plain"]):
        c["above_plain"] = c["loss"]["dense"] - p["loss"]["dense"]
results = {"cells": [c for s in SEEDS for cells in models.values() for c in cells if c["seed"] == s][::-1], "chosen": {}}


def rows_of(text):
    return {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in text.replace("−", "-").splitlines()}


def agrees(shown, values):
    mean, half = map(float, shown.split(" (")[0].split(" ± "))
    want = 2.447 * statistics.stdev(values) / 7 ** 0.5  # of a table: t of 6 degrees of freedom
    assert abs(mean - statistics.mean(values)) < 1e-4 and abs(half - want) < 1e-4, (shown, statistics.mean(values), want)


dense, cut = lambda c: c["loss"]["dense"], lambda c: c["loss"]["cuts"][0]["loss"]
outside = lambda c: 1 - c["mass_nosink"]
rows = rows_of(tables.repeats_table(results))
for name in "abc":
    pairs = list(zip(models[name], models["plain"]))
    agrees(rows[name][2], [dense(c) - dense(p) for c, p in pairs])
    agrees(rows[name][3], [c["cost"]["8"] for c in models[name]])
    agrees(rows[name][5], [cut(c) - cut(p) for c, p in pairs])
    agrees(rows[name][6], [outside(c) for c in models[name]])
    met = sum(dense(c) - dense(p) <= 0.02 and c["cost"]["8"] < 0.01 < p["cost"]["8"] and outside(c) < 0.05 for c, p in pairs)
    assert 0 < met < 7 and rows[name][7] == f"{met} of 7", (rows[name], met)
rows = rows_of(tables.pairs_table(results))
for name, other in ("cb", "ca", "ba"):  # in the order of the cells
    pairs = list(zip(models[name], models[other]))
    for shown, value in zip(rows[f"{name} less {other}"][1:], (dense, cut, outside)):
        agrees(shown, [value(c) - value(o) for c, o in pairs])
# of a table of t: 3.707 is the 1% point for 6 degrees of freedom, 2.353 the 10% point for 3
for t, n, p in ((2.447, 7, 0.05), (3.707, 7, 0.01), (2.353, 4, 0.1), (12.706, 2, 0.05)):
    values = [(-1) ** i for i in range(n)]
    error = statistics.stdev(values) / n ** 0.5
    values = [v - statistics.mean(values) + t * error for v in values]
    assert abs(tables.p_value(values) - p) < 1e-4, (t, n, tables.p_value(values))
near = lambda a, b: all(abs(x - y) < 1e-12 for x, y in zip(a, b))
assert near(tables.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]) and near(tables.holm([0.6, 0.7]), [1, 1])
print("agrees")
END
check "tables of seven seeds, by the definitions" '[ "$(PYTHONPATH=dev/paper python3 "$work/seven.py" 2>"$work/err")" = agrees ]'

# ---- a cell that fails, and other data
short=(--out "$work/failing" --data "$work/others" --context 32 --batch 2 --updates 4 --eval-tokens 64
    --cells 'plain-s1337,k8-tail-l1-rise70-s1337,k8-tail-l0.3-rise70-s1337,chosen-tail-s1338')
for part in train val; do cp "$work/text_${part}_000000.bin" "$work/others_${part}_000000.bin"; done
mkdir -p "$work/failing/runs/k8-tail-l1-rise70-s1337/metrics.jsonl"
paper "${short[@]}"
check "a cell that fails is named, the others are made, and the exit status says that one failed" '[ $? = 1 ] && grep -q "k8-tail-l1-rise70-s1337 .*FAILED: " "$work/out" &&
    [ "$(json "$work/failing/results.json" "*(c[\"name\"] for c in d[\"cells\"] if \"error\" in c)")" = k8-tail-l1-rise70-s1337 ] &&
    grep -q "done, 1 failed\..*Not among them, for they failed: .k8-tail-l1-rise70-s1337" <(tr "\n" " " <"$work/failing/tables.md") && [ ! -e "$work/failing/chosen.json" ]'
rmdir "$work/failing/runs/k8-tail-l1-rise70-s1337/metrics.jsonl"
paper --out "$work/failing"
check "the next call tries it again, and only then the choice stands" '[ $? = 0 ] && [ ! -e "$work/failing/runs/k8-tail-l1-rise70-s1337/failed.json" ] &&
    [ -s "$work/failing/chosen.json" ] && ! grep -q "Not among them" "$work/failing/tables.md"'
for part in val train; do
    cp "$work/text_${part}_000000.bin" "$work/kept"
    python3 - "$work/others_${part}_000000.bin" <<'END'
import sys
shard = open(sys.argv[1], "rb").read()
with open(sys.argv[1], "wb") as file:
    file.write(shard[:1024] + shard[1024:].replace(b"e", b"a"))
END
    rm -r "$work/failing/runs/k8-tail-l1-rise70-s1337"
    [ $part = val ] && verb=validated || verb=trained
    paper --out "$work/failing"
    check "other data of the same name are found out: $part" '[ $? = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q "k8-tail-l1-rise70-s1337 was $verb on other tokens than\|was $verb on other tokens than k8-tail-l1-rise70-s1337" "$work/err"'
    cp "$work/kept" "$work/others_${part}_000000.bin"
    rm -r "$work/failing/runs/k8-tail-l1-rise70-s1337"
    paper --out "$work/failing"
done
check "with the data back it goes on" [ $? = 0 ]

# ---- keys read under a certificate
pages() { dev/paper/pages.py "$@" >"$work/out" 2>"$work/err"; }
pages --text tests/fixtures/plays.txt --passages 3 --epsilon 0.01,0.5 -o "$work/pages" "$work/mini/runs/plain-s1337" "$work/mini/runs/plain-s1338"
check "pages: a row for each model and epsilon, whose numbers are those of the JSON" '[ $? = 0 ] && cmp -s "$work/out" <(cat "$work/pages/pages.md"; echo) && python3 - "$work/pages" 2>"$work/err" <<"END"
import json, sys
mean = lambda values: sum(values) / len(values)
models = json.load(open(sys.argv[1] + "/pages.json"))["models"]
rows = [[x.strip() for x in line.split("|")[1:-1]] for line in open(sys.argv[1] + "/pages.md") if line.startswith("| plain")]
assert [row[:2] for row in rows] == [[f"plain-s{seed}", x] for seed in (1337, 1338) for x in ("0.01", "0.5")]
for name, epsilon, keys, read, layers, tau, worst, certified in rows:
    made = models[name][epsilon]["generation"]
    stats, share = made["stats"], lambda some: 100 * sum(s["read"] for s in some) / sum(s["keys"] for s in some)
    assert made["epsilon"] == float(epsilon) and made["drawn"] == 3 * 9 and len(stats) == 8 and 17 <= float(keys) <= 32
    assert abs(float(read[:-1]) - share(stats)) <= 0.51 and 0 < share(stats) <= 100
    assert all(abs(float(a[:-1]) - share([s for s in stats if s["layer"] == l])) <= 0.51 for l, a in enumerate(layers.split(", ")))
    assert abs(float(tau) - mean([s["tau"] for s in stats])) < 1e-5 and abs(float(certified) - mean([s["certified"] for s in stats])) < 1e-4
    assert float(worst) <= float(epsilon) + 1e-4 and float(certified) <= float(epsilon) and mean([s["tau"] for s in stats]) <= float(epsilon)
END'
for bad in "is no model:--text tests/fixtures/plays.txt $work/mini" "is to have 16:--text $work/kept_text $work/mini/runs/plain-s1337" "--epsilon takes:--text tests/fixtures/plays.txt --epsilon x $work/mini/runs/plain-s1337"; do
    echo short >"$work/kept_text"
    pages ${bad#*:}
    check "pages refuses: ${bad#*:}" '[ $? = 1 ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -qF -- "${bad%%:*}" "$work/err"'
done

for bad in "--seeds 7" "--seeds 7-" "--seeds x" "--seeds 1-99" "--updates 0" "--updates -5" "--batch 0" "--eval-tokens -1" "--budget infm"; do
    paper --out "$work/none" $bad
    check "refused: $bad" '[ $? != 0 ] && ! grep -q Traceback "$work/err" && [ ! -e "$work/none/plan.json" ]'
done
paper --out "$work/none" --dry-run --data "$work/nothing" --cells "plain-s1337, k8-nothing"
check "one of several names that is no cell's is refused" '[ $? = 1 ] && grep -q "no cell has a name like k8-nothing" "$work/err"'
paper --out "$work/mini" --updates 31
check "another plan for the same folder is refused" '[ $? = 1 ] && grep -q "was made with --updates 20, not 31" "$work/err"'
finish
