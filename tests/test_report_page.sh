#!/usr/bin/env bash
# The page of pictures that dev/report/page.py makes of a report of attention: of one model and of two, with figures
# that were not measured, of the largest size and with tokens that would break a page; and a bad report is one sentence
# that names the file and the key. The reports are made up by dev/report/sample.py. Where matplotlib is not installed,
# what needs it is skipped, and not counted.
set -u
report=$(cd "$(dirname "$0")/../dev/report" && pwd)
source "$report/../../tests/script.sh"
cd "$work" || exit 1
export PYTHONDONTWRITEBYTECODE=1

sample() { python3 "$report/sample.py" "$@"; }
page() { "$report/page.py" "$@" >out 2>err; }
# A page without a word on stderr: no warning of a glyph, of an empty mean, of a deprecated function.
fails_to_find() { ! grep -q "$@"; }
quiet() { page "$@" && [[ ! -s err ]]; }
# Exit status 1, nothing on stdout, and on stderr one line that has every one of the words.
refuses() { # $1: words, separated by |; the other arguments: page.py's
    local words=$1 word
    shift
    page "$@"
    [[ $? == 1 && ! -s out && $(wc -l <err) == 1 ]] || return 1
    while read -r word; do grep -qF -- "$word" err || return 1; done < <(tr '|' '\n' <<<"$words")
}
# A copy of the report in one/, changed by a statement on d, the whole of it.
changed() { # $1: the folder, $2: the statement
    mkdir -p "$1" && python3 - "$1/report.json" "$2" <<'END'
import json, sys
d = json.load(open("one/report.json"))
exec(sys.argv[2])
json.dump(d, open(sys.argv[1], "w"))
END
}

# ---- bad input: read before matplotlib is looked for, so that these need none
sample one && sample two --seed 2 --condensed || { echo "dev/report/sample.py failed"; failed=1; finish; }
check "no file" refuses "nowhere/report.json" nowhere
check "no folder given: usage" test "$(page; echo $?)" = 2
changed bad 'd["version"] = 2'
check "refused: a version that is not known" refuses "bad/report.json|version is 2" bad
# What else is wrong with a report: each line is a statement that spoils it and words of the message, which page.py says
# as it does that one. One process reads them all, and says at the end that it did.
cat >spoiled.txt <<'END'
del d["version"] # version is missing
d["model"]["layers"] = None # model.layers is not an integer
d["model"]["layers"] = 0 # model.layers is not an integer
d["model"]["layers"] = 7 # heads has 36 entries instead of 42
del d["heads"][7]["tau"]["q99"] # heads[7].tau.q99 is missing
d["heads"][7]["entropy"] = "high" # heads[7].entropy is not a number
d["heads"][7]["entropy"] = True # heads[7].entropy is not a number
d["heads"][7]["mass"].pop() # heads[7].mass has 6 entries instead of 7
d["heads"][3]["head"] = 4 # heads[3] is layer 0, head 4 instead of layer 0, head 3
d["heads"][0]["entropy"] = 10**400 # heads[0].entropy is too large
d["ks"][1] = 1 # ks is not a list of rising numbers
d["mass_by_position"]["mass"][2].pop() # mass_by_position.mass[2] has 15 entries instead of 16
del d["loss"] # loss is missing
d["loss"]["cuts"][0]["cut"] = "best" # loss.cuts[0].cut is none of topk, recent
d["loss"]["cuts"][0]["renormalized"] = 1 # loss.cuts[0].renormalized is neither
d["maps"][1]["rows"][2].pop() # maps[1].rows[2] has 2 entries instead of 3
d["maps"][1]["tokens"] = ["a"] * 65 # maps[1].tokens has 65 entries
d["maps"][1]["tokens"] = [] # maps[1].tokens has 0 entries
d["maps"][1]["layer"] = 6 # maps[1].layer is 6, but the model has 6
del d["probes"]["recall"]["topk"]["loss"] # probes.recall.topk.loss is missing
d["probes"]["needle"]["dense"].pop() # probes.needle.dense has 10 entries instead of 11
d = [d] # the whole is not an object
END
last=
while read -r verdict what; do
    check "refused: $what" test "$verdict" = refused
    last=$what
done < <(python3 - "$report" <<'END'
import json, sys
sys.path.insert(0, sys.argv[1])
import report
good = open("one/report.json").read()
for line in open("spoiled.txt"):
    statement, words = line.rstrip("\n").split(" # ")
    names = {"d": json.loads(good)}
    exec(statement, names)
    json.dump(names["d"], open("bad/report.json", "w"))
    try:
        report.read("bad")
        message = ""
    except report.Bad as error:
        message = str(error)
    one_sentence = message.startswith("bad/report.json: ") and "\n" not in message and words in message
    print("refused" if one_sentence else "taken", statement)
print("refused and no statement left out")
END
)
check "refused: all of them were tried" test "$last" = "and no statement left out"
mkdir -p broken
spoiled() { # $1: words; the file from stdin
    cat >broken/report.json
    check "refused: $1" refuses "broken/report.json|$1" broken
}
spoiled "not JSON" < <(head -c 5000 one/report.json)
spoiled "not JSON" </dev/null
spoiled "it has NaN, which is not JSON" < <(sed 's/"entropy": [0-9.]*/"entropy": NaN/' one/report.json)
spoiled "not UTF-8" < <(sed 's/MADE UP/MADE \xff UP/' one/report.json)
spoiled "not JSON that can be read" < <(head -c 100000 /dev/zero | tr '\0' '[')
changed other 'd["k"] = 4'
check "two with different k" refuses "other/report.json|k is 4|one/report.json it is 8" one other
changed other 'd["ks"][-1] = 65'
check "two with different ks" refuses "other/report.json|ks is|one/report.json" one other
check "three" refuses "3 folders" one two one
check "a label too few" refuses "--labels has 1 names for 2" one two --labels plain
check "a bad report leaves no page" test -z "$(find . -name '*.html' -o -name '*.png')"

# Whatever stands in place of a value, reading ends in a report or in a message of its own.
check "any value replaced or left out" python3 - "$report" 2>err <<'END'
import copy, json, sys
sys.path.insert(0, sys.argv[1])
import report
whole = json.load(open("one/report.json"))
whole["heads"], whole["model"]["layers"], whole["model"]["heads"] = whole["heads"][:2], 1, 2
whole["mass_by_position"]["mass"] = whole["mass_by_position"]["mass"][:1]
for m in whole["maps"]:
    m.update(layer=0, head=0, tokens=m["tokens"][:2], rows=m["rows"][:2])
for name in ("maps", "heads"):  # one of each kind will do
    whole[name] = whole[name][:2]
whole["loss"]["cuts"] = whole["loss"]["cuts"][:2]
report.check_report(copy.deepcopy(whole))

def places(value):
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])

tried = refused = 0
def read():
    global tried, refused
    tried += 1
    try:
        report.check_report(whole)
    except report.Bad:
        refused += 1

for value, key in list(places(whole)):
    kept = value[key]
    for other in (None, True, -1, 10**30, 0.5, 1e308, "", "x", [], [None], [[]], {}, {"x": 1}):
        value[key] = other
        read()
    value[key] = kept
    if isinstance(value, dict):
        del value[key]
        read()
        value[key] = kept
sys.exit(not (tried > 1000 and tried / 4 < refused < tried))
END

# ---- matplotlib is missing: without its site-packages no Python has it
system=/usr/bin/python3
[[ -x $system ]] || system=python3
without() { env -u PYTHONPATH "$system" -S "$report/page.py" one >out 2>err; }
check "without matplotlib: exit status 1" test "$(without; echo $?)" = 1
check "without matplotlib: one sentence" test "$(wc -l <err)" = 1
check "without matplotlib: what to install" grep -q "python3-matplotlib" err
quiet one
drawn=$?
if grep -q "install python3-matplotlib" err; then
    echo "matplotlib is not installed here: the pages were not made (apt-get install python3-matplotlib)"
    finish
fi

# ---- pages
cat >look.py <<'END'
"""look.py PAGE FACT...: PAGE is well-formed HTML that loads nothing, its pictures are PNG files that lie beside it too,
no token has become an element, and its text has each FACT."""
import base64, glob, html.parser, struct, sys

VOID = {"meta", "img", "input", "br"}
KNOWN = VOID | set("html head title style body h1 h2 p i sub div table caption thead tbody tr th td figure figcaption "
                   "label details summary span".split())

class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.pictures = [], "", []

    def handle_starttag(self, tag, attributes):
        assert tag in KNOWN, f"an element {tag}"
        for name, value in attributes:
            assert name in {"lang", "charset", "name", "content", "class", "scope", "id", "type", "aria-label", "alt",
                            "src"}, f"an attribute {name}"
            if name == "src":
                kind, data = value.split(",", 1)
                assert kind == "data:image/png;base64"
                self.pictures.append(base64.b64decode(data, validate=True))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

path = sys.argv[1]
reader = Reader()
source = open(path, encoding="utf-8").read()
assert "url(" not in source and "@import" not in source
assert not any(ord(c) < 32 and c != "\n" for c in source), "a control character"
reader.feed(source)
reader.close()
assert not reader.open, reader.open
for picture in reader.pictures:
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", picture[16:24])) > 300
beside = sorted(open(name, "rb").read() for name in glob.glob(glob.escape(path[:-5]) + "_*.png"))
assert beside == sorted(reader.pictures), (len(beside), len(reader.pictures))
for fact in sys.argv[2:]:
    assert fact in reader.text, f"no {fact!r} in it"
END
look() { python3 look.py "$@" >out 2>err; }
pictures() { grep -o 'data:image/png' "$1" | wc -l; }

check "one model" test $drawn = 0
check "one model: the page is named" grep -qx one/page.html out
# The same figures, computed here from the file: the means of what the heads have.
mapfile -t facts < <(python3 - <<'END'
import json
d = json.load(open("one/report.json"))
i, h = d["ks"].index(d["k"]), d["heads"]
mean = lambda values: sum(values) / len(values)
print(f"{mean([x['mass'][i] for x in h]):.4f}")
print(f"{mean([x['mass_nosink'][i] for x in h]):.4f}")
print(f"{mean([x['keys95'] for x in h]):.2f}")
print(f"{max(x['tau']['max'] for x in h):.4f}")
print(f"{d['loss']['dense']['loss']:.4f}")
top = [c["loss"] for c in d["loss"]["cuts"] if c["cut"] == "topk" and c["k"] == 8][0]
print(f"{top:.4f} (+{top - d['loss']['dense']['loss']:.4f})")
END
)
check "one model: the page and its figures" look one/page.html "MADE UP" "${facts[@]}"
check "one model: thirteen pictures" test "$(pictures one/page.html)" = 13
check "one model: all was measured" fails_to_find "not measured" one/page.html

check "two models" quiet one two --labels plain "conden<b>sed" -o both.html
check "two models: the page" look both.html "MADE UP, seed 1 and MADE UP, seed 2" "plain is dashed" "conden<b>sed"
heads=$(python3 -c 'import json
print(len({(m["layer"], m["head"]) for f in ("one", "two") for m in json.load(open(f + "/report.json"))["maps"]}))')
check "two models: nine pictures, and one of each head that either chose" test "$(pictures both.html)" = $((9 + heads))
changed other 'd["maps"] = d["maps"][:2]; d["maps"][0]["why"] = "another"; d["maps"][1]["why"] = ""
for h in d["heads"]: h.update({s: dict.fromkeys(h[s], 0.0) for s in ("tau", "error", "error_relative")})'
check "another choice of maps, and nothing cut off on a logarithmic axis" quiet one other -o other.html
check "another choice of maps: one of each head, with both reasons" test "$(ls other_map_*.png | wc -l)" = 4
check "another choice of maps: both reasons" look other.html "another (MADE UP"
check "a head that was not chosen is no picture of one report" python3 - "$report" 2>err <<'END'
import sys
sys.path.insert(0, sys.argv[1])
import page, report
maps = page.paired_maps([report.read("other")])
sys.exit([why for why, _ in maps] != ["another"])
END

sample nulls --nulls
check "nothing measured" quiet nulls
check "nothing measured: the page says so" look nulls/page.html "not measured"
check "nothing measured: no picture but the maps of the heads" test "$(pictures nulls/page.html)" = 4
changed less 'del d["probes"]; d["maps"] = []; d["loss"]["cuts"] = []; d["k"] = 5'
check "no probes, no maps, no cuts, a k without a mass" quiet less
check "no probes, no maps, no cuts, a k without a mass: the page" look less/page.html "top-5 mass" "not measured"

# What does not need a large report is seen on the smallest, whose page is made in less time.
sample small --layers 1 --heads 1 --context 16 -k 2 --rows 10
changed point 'd = json.load(open("small/report.json")); d["ks"] = [2]; d["mass_by_position"] = {"begin": [0], "mass": [[0.5]]}
for h in d["heads"]: h["mass"] = h["mass_nosink"] = [0.5]
d["maps"] = [{"layer": 0, "head": 0, "why": None, "tokens": ["$"], "rows": [[1]]}]'
check "one layer, one head, one k, one position, one token" quiet point
check "one layer, one head, one k, one position, one token: the page" look point/page.html
cp point/page.html first.html
check "again" quiet point
check "again: the same bytes" cmp -s first.html point/page.html
check "a model with itself" quiet point point
check "a model with itself: told apart" look point/compare.html "MADE UP, seed 1 (first)" "MADE UP, seed 1 (second) is solid"
check "a model with itself: its own page is untouched" cmp -s first.html point/page.html
changed sections 'd = json.load(open("small/report.json"))
d.update(mass_by_position=None, loss=None, maps=None, probes=None, text=None, device=None)'
check "whole sections not measured in one of two" quiet small sections -o half.html
check "whole sections not measured in one of two: said" look half.html "not measured" "not measured on the same text"
sample large --layers 48 --heads 25 --rows 3 --tokens long
check "48 layers of 25 heads, 64 tokens" quiet large
check "48 layers of 25 heads, 64 tokens: the page" look large/page.html "48 × 25"

sample bytes --tokens bytes --layers 1 --heads 1 --context 128 --rows 10
check "bytes" quiet bytes
check "bytes: the page" look bytes/page.html "256" "⏎" "␣"
sample one --tokens weird
changed weird 'd["model"]["name"] = "<img src=x>$a$\0\ud800"; d["commit"] = "</style><b>"; d["maps"][0]["why"] = "\"><i>"'
check "names and tokens that would break a page" quiet weird
check "names and tokens that would break a page: it is whole" look weird/page.html "<script>alert('x')</script>" \
    "&amp;" '\x00' '\u{d800}' '(empty)' '-->' '<img src=x>$a$\x00\u{d800}' '</style><b>' '"><i>'

# ---- what is drawn and what the tables say, against the file: of a small report whose cuts are in no order, and of it
# with another
with_it=python3
"$with_it" -c 'import matplotlib, numpy' 2>/dev/null || with_it=/usr/bin/python3
last=
while read -r verdict what; do
    check "as in the file: $what" test "$verdict" = same
    last=$what
done < <("$with_it" - "$report" 2>err <<'END'
import json, re, sys, warnings
sys.path.insert(0, sys.argv[1])
import page, pictures, report, sample
import numpy as np

figures = {}  # of the last page, by their names
add = page.Page.add
def recorded(self, name, title, how, figure, *rest):
    figures[name] = figure
    return add(self, name, title, how, figure, *rest)
page.Page.add = recorded
pictures.png = lambda figure: pictures.plt.close(figure) or b""
warnings.filterwarnings("ignore", "Mean of empty slice")  # what was measured nowhere
pictures.set_style()

def write(folder, d):
    json.dump(d, open(folder + "/report.json", "w"))
    return d

def read(*folders):
    reports = [report.read(folder) for folder in folders]
    for r, folder in zip(reports, folders):
        r["label"] = folder
    return reports

def close(got, want):
    np.testing.assert_allclose(np.array(got, dtype=float), np.array(want, dtype=float), rtol=1e-9)

def equal(got, want):
    assert got == want, (got, want)

files = {}
for seed, folder, more in ((5, "drawn", []), (6, "beside", ["--condensed"])):
    sys.argv = ["sample.py", folder, "--seed", str(seed), "--layers", "3", "--heads", "2", "--context", "128",
                "--rows", "12", *more]
    sample.main()
    d = json.load(open(folder + "/report.json"))
    d["loss"]["cuts"].sort(key=lambda c: (c["k"] * 5) % 7)  # k = 2, 16, 1, 8, 64, 4, 32
    d["loss"]["cuts"].append({"cut": "topk", "renormalized": False, "k": 4, "loss": 5.5, "perplexity": 244.69, "kept": 0.625})
    d["loss"]["tokens"] += seed
    d["text"].update(sequences=seed, rows=1000 + seed)
    d["probes"]["induction"]["topk"]["score"] = 0.25 + seed / 100
    files[folder] = write(folder, d)
pages = {}
for folders in (("drawn",), ("drawn", "beside")):
    figures.clear()
    text = page.make_page(read(*folders), "drawn.html")
    pages[folders] = folders, [files[f] for f in folders], dict(figures), text

def of_heads(d, value):
    return [[value(h) for h in d["heads"] if h["layer"] == l] for l in range(d["model"]["layers"])]

def mean(values, axis=1):
    return np.nanmean(np.array(values, dtype=float), axis)

def same(what, test, *given):
    try:
        test(*given)
        print("same", what)
    except Exception as error:
        print("another", what)
        print(what, repr(error)[:1000], file=sys.stderr)

def of_pages(what, test):
    """test(names, reports, figures, page) of the page of one and of the page of two."""
    for given in pages.values():
        same(f"{what}, {' and '.join(given[0])}", test, *given)

def heatmap(names, reports, figures, _):
    axes = figures["mass_heatmap"].axes
    for i, d in enumerate(reports):
        for j, key in enumerate(("mass", "mass_nosink")):
            axis = axes[j * len(reports) + i]
            equal("without position 0" in axis.get_title(loc="left"), key == "mass_nosink")
            close(axis.images[0].get_array().filled(np.nan), of_heads(d, lambda h: h[key][d["ks"].index(d["k"])]))

def curves(name, values):
    def test(names, reports, figures, _):
        axes = figures[name].axes
        for i, d in enumerate(reports):
            x, y = values(d)
            *layers, all_layers = axes[i].get_lines()
            close([line.get_ydata() for line in layers], y)
            for line in axes[i].get_lines():
                close(line.get_xdata(), x)
            close(all_layers.get_ydata(), mean(y, 0))
            if len(reports) > 1:
                close(axes[2].get_lines()[i].get_ydata(), mean(y, 0))
                equal(axes[2].get_lines()[i].get_label(), names[i])
    return test

def layers(name, series, log=False):
    """series: the label of a line, what it has of a head, and what makes a layer's value of its heads."""
    def test(names, reports, figures, _):
        axis = figures[name].axes[0]
        legend = {t.get_text(): h.get_color() for t, h in zip(axis.get_legend().get_texts(), axis.get_legend().get_lines())}
        at_least = lambda v: np.maximum(np.array(v, dtype=float), 1e-8 if log else 0)
        for label, value, reduce in series:
            drawn = [line for line in axis.get_lines() if line.get_color() == legend[label]]
            dots = drawn.pop(0) if len(reports) == 1 else None
            equal([line.get_label() for line in drawn], [label] * len(reports))
            for i, (line, d) in enumerate(zip(drawn, reports)):
                v = of_heads(d, value)
                close(line.get_xdata(), range(len(v)))
                close(line.get_ydata(), at_least(reduce(v)))
                equal(line.get_linestyle(), "-" if len(reports) == 1 or i else "--")
            if dots:
                close(dots.get_xdata(), np.repeat(range(len(v)), len(v[0])))
                close(dots.get_ydata(), at_least(v).ravel())
    return test

def quantiles(key):
    return [("median", lambda h: h[key]["q50"], mean), ("90%", lambda h: h[key]["q90"], mean),
            ("99%", lambda h: h[key]["q99"], mean),
            ("largest", lambda h: h[key]["max"], lambda v: np.array(v, dtype=float).max(1))]

def cut_lines(names, reports, figures, _):
    axes = figures["loss_under_cuts"].axes
    def wanted(d, cut, renormalized):
        return sorted((c["k"], c["loss"]) for c in d["loss"]["cuts"] if (c["cut"], c["renormalized"]) == (cut, renormalized))
    def dense_of(axis):  # a line across, which has no k
        return [list(line.get_ydata()) for line in axis.get_lines() if list(line.get_xdata()) == [0, 1]]
    for axis, d in zip(axes, reports):
        drawn = {line.get_label(): line.get_xydata() for line in axis.get_lines()}
        for cut, label in (("topk", "top k"), ("first_recent", "position 0 and the most recent"),
                           ("recent", "the most recent"), ("random", "random")):
            close(drawn[label], wanted(d, cut, True))
        close(drawn["top k, not renormalized"], wanted(d, "topk", False))
        close(dense_of(axis), [[d["loss"]["dense"]["loss"]] * 2])
    shown = [text.get_text() for text in axes[0].get_legend().get_texts()]
    equal(shown, ["top k", "position 0 and the most recent", "the most recent", "random", "not renormalized", "dense (nothing cut)"])
    axis = axes[len(reports)]
    close(dense_of(axis), [[d["loss"]["dense"]["loss"]] * 2 for d in reports])
    close([line.get_xydata() for line in axis.get_lines() if len(line.get_xdata()) > 2],
          [wanted(d, "topk", True) for d in reports])
    if len(reports) > 1:
        equal([line.get_label() for line in axis.get_lines()],
              [f"{name}, {what}" for name in names for what in ("top k", "dense")])

def maps(names, reports, figures, _):
    drawn = set()
    for name, figure in figures.items():
        for axis in figure.axes if name.startswith("map_") else []:
            title = axis.get_title(loc="left")
            for name, d in zip(names, reports):
                rows = {f"layer {m['layer']}, head {m['head']}": m["rows"] for m in d["maps"]}
                of = name + ": " if len(names) > 1 else ""
                if title.startswith(of) and title[len(of):] in rows:
                    rows, n = rows[title[len(of):]], axis.images[-1].get_array().shape[0]
                    equal(n, len(rows))
                    close(axis.images[-1].get_array().filled(np.nan), [row + [np.nan] * (n - len(row)) for row in rows])
                    drawn.add(title)
    equal(len(drawn), sum(len({(m["layer"], m["head"]) for m in d["maps"]}) for d in reports))

def probe_bars(names, reports, figures, _):
    left, right = figures["probes"].axes
    equal([c.get_label() for c in left.containers], ["dense", "cut to the top 8"])
    equal([t.get_text().split("\n") for t in left.get_xticklabels()],
          [[kind, *([name] if len(names) > 1 else [])] for kind in ("induction", "recall") for name in names])
    lines = iter(right.get_lines())
    for way, bars in zip(("dense", "topk"), left.containers):
        close([bar.get_height() for bar in bars],
              [d["probes"][kind][way]["accuracy"] for kind in ("induction", "recall") for d in reports])
        close([round(bar.get_x() + bar.get_width() / 2) for bar in bars], range(2 * len(reports)))
    legend = right.get_legend()
    colours = {t.get_text(): h.get_color() for t, h in zip(legend.get_texts(), legend.get_lines())}
    for d in reports:
        for way, bars in zip(("dense", "topk"), left.containers):
            line = next(lines)
            close(line.get_xydata(), list(zip(d["probes"]["needle"]["depths"], d["probes"]["needle"][way])))
            equal(line.get_color(), colours[bars.get_label()])
            equal(pictures.matplotlib.colors.to_hex(bars[0].get_facecolor()).upper(), line.get_color())

def rows_of(text, column):
    """{the row's name, and with it the cells before `column`: the cells from there on} of the table that has `text`."""
    found = [t for t in re.findall("<table.*?</table>", text[1], re.S) if text[0] in t]
    equal(len(found), 1)
    rows = {}
    for row in re.findall("<tr>(<th scope=\"row\">.*?)</tr>", found[0], re.S):
        cells = [c.replace("−", "-") for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        assert tuple(cells[:column]) not in rows
        rows[tuple(cells[:column])] = cells[column:]
    return rows

def has(rows, want):
    for key, cells in want.items():
        equal((key, rows[key]), (key, cells))

def facts(names, reports, _, text):
    each = lambda value: [f"{value(d):,}" for d in reports]
    has(rows_of(("What was measured", text), 1), {
        ("channels",): each(lambda d: d["model"]["channels"]), ("parameters",): each(lambda d: d["model"]["parameters"]),
        ("vocabulary",): each(lambda d: d["model"]["vocabulary"]), ("sequences",): each(lambda d: d["text"]["sequences"]),
        ("context",): each(lambda d: d["text"]["context"]), ("rows a head",): each(lambda d: d["text"]["rows"]),
        ("tokens of the loss",): each(lambda d: d["loss"]["tokens"])})

def summary(names, reports, _, text):
    of_all = lambda key, digits: [f"{mean([h[key] for h in d['heads']], 0):.{digits}f}" for d in reports]
    top = lambda d, k: next(c["loss"] for c in d["loss"]["cuts"] if (c["cut"], c["renormalized"], c["k"]) == ("topk", True, k))
    dense = lambda d: d["loss"]["dense"]["loss"]
    has(rows_of(("Summary", text), 1), {
        ("loss, dense (nats a token)",): [f"{dense(d):.4f}" for d in reports],
        **{(f"loss, cut to the top {k}",): [f"{top(d, k):.4f} ({top(d, k) - dense(d):+.4f})" for d in reports]
           for k in reports[0]["ks"]},
        ("mean top-8 mass",): [f"{mean([h['mass_k'] for h in d['heads']], 0):.4f}" for d in reports],
        ("mean top-8 mass, without position 0",): of_all("mass_nosink_k", 4),
        **{(f"mean keys that hold {s}%",): of_all(f"keys{s}", 2) for s in (90, 95, 99)},
        ("mean entropy (nats)",): of_all("entropy", 3)})

def cut_figures(names, reports, _, text):
    kinds = {"topk": "top k", "recent": "the most recent", "first_recent": "position 0 and the most recent",
             "random": "random"}
    want = {}
    for d in reports:
        for c in d["loss"]["cuts"]:
            key = kinds[c["cut"]] + ", not renormalized" * (not c["renormalized"]), str(c["k"])
            want.setdefault(key, []).extend([f"{c['loss']:.4f}", f"{c['perplexity']:.2f}", f"{c['kept']:.4f}"])
    rows = rows_of(("keys kept", text), 2)
    equal(len(rows), len(want))
    has(rows, want)

def probe_figures(names, reports, _, text):
    has(rows_of(("Probes in figures", text), 1), {
        (f"{kind}, {shown}" + (f", {name}" if len(names) > 1 else ""),):
            [f"{d['probes'][kind][way][key]:.4f}" if key in d["probes"][kind][way] else ""
             for key in ("accuracy", "loss", "score")]
        for name, d in zip(names, reports) for kind in ("induction", "recall")
        for way, shown in (("dense", "dense"), ("topk", "cut to the top 8"))})

of_pages("the top-k mass of every head", heatmap)
of_pages("the mass by k", curves("mass_by_k", lambda d: (
    d["ks"], [mean([h["mass"] for h in d["heads"] if h["layer"] == l], 0) for l in range(3)])))
of_pages("the mass by position", curves("mass_by_position", lambda d: (
    d["mass_by_position"]["begin"], d["mass_by_position"]["mass"])))
of_pages("the losses under cuts", cut_lines)
of_pages("the quantiles of tau", layers("tau_by_layer", quantiles("tau"), log=True))
of_pages("the quantiles of the error", layers("error_by_layer", quantiles("error_relative"), log=True))
of_pages("the keys that hold a share", layers("keys_by_layer", [
    ("90%", lambda h: h["keys90"], mean), ("95%", lambda h: h["keys95"], mean), ("99%", lambda h: h["keys99"], mean)]))
of_pages("where attention goes", layers("where_by_layer", [
    ("position 0", lambda h: h["first"], mean), ("itself", lambda h: h["self"], mean),
    ("the token before", lambda h: h["previous"], mean)]))
of_pages("the maps, a row a query", maps)
of_pages("the probes", probe_bars)
of_pages("the table of what was measured", facts)
of_pages("the summary", summary)
of_pages("the table of cuts", cut_figures)
of_pages("the table of probes", probe_figures)

# A report of a k whose mass is not among those of ks: heads have it apart, or in older versions only as tau.
d = files["drawn"]
d["k"] = 5
for h in d["heads"]:
    h["mass_k"], h["mass_nosink_k"] = h["entropy"] / 10, h["first"]
def drawn():
    write("drawn", d)
    return [axis.images[0].get_array().filled(np.nan) for axis in pictures.mass_heatmap(read("drawn")).axes[:2]]
def apart():
    close(drawn(), [of_heads(d, lambda h: h["entropy"] / 10), of_heads(d, lambda h: h["first"])])
def older():
    for h in d["heads"]:
        h.pop("mass_k", 0), h.pop("mass_nosink_k", 0)
    close(drawn(), [of_heads(d, lambda h: 1 - h["tau"]["mean"]), of_heads(d, lambda h: np.nan)])
same("the mass at a k that is not among the ks", apart)
same("the mass of an older report at such a k", older)
print("same all of it was compared")
END
)
check "as in the file: no comparison left out" test "$last" = "all of it was compared"

# ---- where it cannot write
check "-o in a folder that is not there" refuses "cannot write|nowhere" one -o nowhere/page.html
finish
