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

# ---- where it cannot write
check "-o in a folder that is not there" refuses "cannot write|nowhere" one -o nowhere/page.html
finish
