#!/usr/bin/env bash
# The picture of training curves that dev/report/curves.py draws of one run or several, and what it says when it cannot.
# Where matplotlib is not installed, what needs it is skipped, and not counted.
set -u
curves=$(cd "$(dirname "$0")/../dev/report" && pwd)/curves.py
source "$(dirname "$0")/script.sh"
cd "$work" || exit 1
export PYTHONDONTWRITEBYTECODE=1

# A run as the trainer writes it: $1 its folder, $2 the updates that are there of 60, $3 how much more loss it has than
# 5 - step / 100, $4 tokens of an update. Validations every 20.
make_run() {
    mkdir -p "$1" && python3 - "$@" >"$1/metrics.jsonl" <<'END'
import json, sys
done, more, tokens = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
print(json.dumps({"commit": "0", "settings": {"updates": "60", "topk": "8", "tokens-per-update": tokens}}))
for step in range(done + 1):
    ce = 5 - step / 100 + more
    if step:
        print(json.dumps({"step": step, "loss": ce + 0.1, "ce": ce, "reg": 0.5, "mass": 0.5, "lambda": 0.1, "lr": 1e-3,
                          "norm": 1.5, "tok_s": 1000.0, "ms": 10.0}))
    if step % 20 == 0:
        print(json.dumps({"step": step, "val_ce": ce + 0.25, "val_mass": 0.75, "val_mass_nosink": None}))
END
}
draw() { "$curves" "$@" >out 2>err; }
quiet() { draw "$@" && [ ! -s err ]; }
is_png() { [ "$(head -c 8 "$1" | od -An -tx1 | tr -d ' ')" = 89504e470d0a1a0a ]; }
refuses() { # $1: words; the other arguments: curves.py's. One line, and no picture.
    local words=$1
    shift
    rm -f x.png
    draw "$@" -o x.png
    [ $? = 1 ] && [ ! -s out ] && [ "$(wc -l <err)" = 1 ] && grep -qF -- "$words" err && [ ! -e x.png ]
}

make_run log/run2 60 0 1000
make_run log/run10 45 0.125 1000
make_run other 60 0.5 4000
make_run begun 3 3 1000


# ---- bad input, read before matplotlib is looked for
mkdir empty_folder && (cd empty_folder && refuses "there is no log/run1, log/run2, ... here") && ok "no run in log/" || bad "no run in log/"
check "no such folder" refuses "nowhere cannot be read: No such file" nowhere
check "a folder without metrics" refuses "empty_folder/metrics.jsonl cannot be read" empty_folder
check "a label too few" refuses "--labels has 1 names for 2 runs" log/run2 log/run10 --labels one
spoiled() { # $1: words; the file from stdin
    cat >bad.jsonl
    check "refused: $1" refuses "$1" bad.jsonl
}
spoiled "no update and no validation yet" </dev/null
spoiled "no update and no validation yet" < <(head -1 log/run2/metrics.jsonl)
spoiled "line 2 of bad.jsonl is not JSON" < <(head -1 log/run2/metrics.jsonl; echo '{"step":'; tail -1 log/run2/metrics.jsonl)
spoiled "line 1 of bad.jsonl is not JSON" < <(printf '\x89PNG\r\n\x1a\n\0\0\n')
spoiled "line 2 of bad.jsonl is not as the trainer writes it" < <(echo '{}'; echo '[1]')
spoiled "line 2 of bad.jsonl is not as the trainer writes it" < <(echo '{}'; echo '{"step": -1, "ce": 1}')
spoiled "line 2 of bad.jsonl is not as the trainer writes it" < <(echo '{}'; echo '{"step": true, "ce": 1}')

with_it=python3
"$with_it" -c 'import matplotlib, numpy' 2>/dev/null || with_it=/usr/bin/python3
if ! "$with_it" -c 'import matplotlib, numpy' 2>/dev/null; then
    draw log/run2
    check "without matplotlib: one sentence" '[ "$(wc -l <err)" = 1 ] && grep -q "python3-matplotlib" err'
    echo "matplotlib is not installed here: the curves were not drawn (apt-get install python3-matplotlib)"
    finish
fi

# ---- pictures
check "the newest run, by its number" quiet
check "the newest run: its folder has the picture" is_png log/run10/curves.png
check "the newest run: how far it is" grep -qx "log/run10: 45 of 60 updates; validation after 40: loss 4.9750, top-8 mass 0.7500" out
check "the newest run: where the picture is" grep -qx log/run10/curves.png out
cp log/run10/curves.png first.png
check "again: the same bytes" 'quiet && cmp -s first.png log/run10/curves.png'
check "whatever the user's windows are" 'MPLBACKEND=nonsense quiet'
cp log/run10/curves.png good.png
check "a picture that cannot be written leaves the one that was there" '! (ulimit -f 10 && draw log/run2 -o good.png) && cmp -s good.png log/run10/curves.png &&
    [ "$(cat err)" = "curves.py: cannot write good.png: File too large" ] && [ ! -e good.png.part ]'
"$curves" log/run10 >/dev/full 2>err
check "output that cannot be written is one sentence" '[ $? = 1 ] && [ "$(cat err)" = "curves.py: cannot write to the standard output: No space left on device" ]'
check "files, and names that would be mathematics" 'quiet log/run2/metrics.jsonl log/run10/metrics.jsonl --labels "a \$x" "<b>" -o file.png && is_png file.png'
check "a run that is under way: its last line is not whole" \
    'cp -r log/run2 now && printf "{\"step\":61,\"lo" >>now/metrics.jsonl && quiet now && grep -q "^now: 60 of 60" out'
printf '%s\n' '{}' '{"step":0,"val_ce":null,"val_mass":null,"val_mass_nosink":null}' >nothing.jsonl
printf '%s\n' '{"settings":[]}' '{"step":1,"ce":1e999,"mass":true,"lambda":"x","norm":0,"tok_s":'"$(printf '9%.0s' {1..400})"'}' >odd.jsonl
check "nothing was measured, and values that cannot be drawn" 'quiet nothing.jsonl odd.jsonl -o odd.png && is_png odd.png && grep -qx "nothing.jsonl: 0 updates" out'
check "no PNG" 'draw log/run2 -o x.pdf; [ $? = 1 ] && grep -q "so name it .png" err && [ ! -e x.pdf ]'
check "runs with other tokens: said; equal labels: numbered" 'quiet log/run2 other log/run10 --labels a b a -o apart.png &&
    grep -qx "note: b is not compared with a (1): its tokens-per-update is 4000, not 1000" out &&
    grep -q "^a (1): 60" out && grep -q "^a (2): 45" out'
check "a folder that is not there" '! draw log/run2 -o no/x.png && [ ! -s out ] && grep -qx "curves.py: cannot write no/x.png: No such file or directory" err'

# What is drawn, from the figure before it becomes a picture.
check "the lines are the run's" "$with_it" - "$(dirname "$curves")" 2>err <<'END'
import sys
sys.path.insert(0, sys.argv[1])
import curves, pictures
figures = []
pictures.png = figures.append

def drawn(*names):
    """Of each panel its title, its x label, and of each line the points and the colour."""
    runs = [curves.read_run(name) for name in names]
    for run, name in zip(runs, names):
        run["label"] = name
    _, notes = curves.draw(runs)
    assert len(notes) == sum("other" in name for name in names), notes
    return {axis.get_title(loc="left"): ([(line.get_xydata().tolist(), line.get_color()) for line in axis.get_lines()], axis)
            for axis in figures.pop().axes}

def close(got, want):
    assert len(got) == len(want) and all(abs(a - b) < 1e-9 for p, q in zip(got, want) for a, b in zip(p, q)), (got, want)

one = drawn("log/run2")
(updates, blue), (validations, also_blue) = one["cross-entropy (marks: validation)"][0]
close(updates, [[step, 5 - step / 100] for step in range(1, 61)])
close(validations, [[step, 5.25 - step / 100] for step in (0, 20, 40, 60)])
assert blue == also_blue
close(one["learning rate"][0][0][0], [[step, 1e-3] for step in range(1, 61)])
low, high = one["cross-entropy (marks: validation)"][1].get_ylim()
assert low < 4.4 and 5.05 < high < 5.25  # the validation before the first update is not seen, all others are

two = drawn("log/run2", "log/run10")
above, axis = two["cross-entropy above the first run's"]
lines = [(points, colour) for points, colour in above if points]
assert len(lines) == 2 and {colour for _, colour in lines} == {two["lambda"][0][1][1]} != {blue}
close(lines[0][0], [[step, 0.125] for step in range(1, 46)])
close(lines[1][0], [[step, 0.125] for step in (0, 20, 40)])
assert axis.get_shared_x_axes().joined(axis, two["tokens a second"][1]) and two["tokens a second"][1].get_xlabel() == "updates"

apart = drawn("log/run2", "other")  # updates of 1000 tokens and of 4000
assert "learning rate" in apart and apart["tokens a second"][1].get_xlabel() == "million tokens"
close(apart["lambda"][0][1][0], [[step * 0.004, 0.1] for step in range(1, 61)])

# Of a run that has just begun what there is of it is seen, beside one that is done.
low, high = drawn("log/run2", "begun")["cross-entropy (marks: validation)"][1].get_ylim()
assert low < 4.4 and high > 7.9

assert curves.tell_apart(["a/b/log/x", "a/b/y", "a/b/y"]) == ["log/x", "y (1)", "y (2)"]
assert curves.tell_apart(["a/b/log/x"]) == ["a/b/log/x"]
sevens = drawn(*["log/run2"] * 8)["lambda"][1].get_lines()
assert sevens[7].get_color() == sevens[0].get_color() and sevens[7].get_linestyle() != sevens[0].get_linestyle()

many = [{"step": step, "ce": float(step % 2)} for step in range(2000)]
steps, values = curves.points(many, "ce", 200)
assert len(steps) == 200 and set(values) == {0.5} and steps[:2] == [4.5, 14.5]
END
finish
