"""Reads DIR/report.json, the figures that `infer_gpt2cu --report DIR` writes about a model's attention.

read(DIR) gives the report as nested dictionaries and lists in which every key is there and every list has its length:
a number that was not measured (null) is NaN, so that it can be drawn and averaged around without asking, and a string
that was not measured is None. Raises Bad, whose text is one sentence that names the file and the key. Needs nothing
but Python itself, so that a bad file is named before matplotlib is looked for.
"""
import json
import math
import os
import sys
import unicodedata

NAN = float("nan")
QUANTILES = ("mean", "q50", "q90", "q99", "max")
CUTS = ("topk", "recent", "first_recent", "random")
MOST_TOKENS = 64


class Bad(Exception):
    pass


def write_file(path, content):
    """Under another name, and renamed: what stops it on the way leaves the file that was there."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise Bad(f"cannot write {path}: {error.strerror}") from None


def say(*lines):
    """Prints lines; a reader that is gone, or a full disk, is one sentence. What the output's encoding lacks is escaped."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        raise Bad(f"cannot write to the standard output: {error.strerror}") from None


def find_matplotlib(program):
    """The distribution's packages are those of the distribution's Python, which need not be the first in PATH: where
    this one lacks matplotlib, that one starts `program`, the file that runs, in this one's place."""
    os.environ["MPLBACKEND"] = "Agg"  # the user's own may need a window, and files are all that is drawn
    try:
        import matplotlib, numpy  # noqa: F401
    except ImportError as error:
        other = "/usr/bin/python3"
        if os.path.exists(other) and os.path.realpath(sys.executable) != os.path.realpath(other):
            os.execv(other, [other, os.path.abspath(program), *sys.argv[1:]])
        raise Bad(f"the pictures need {error.name}: install python3-matplotlib and python3-numpy "
                  "(apt-get install python3-matplotlib python3-numpy)") from None


# ---- what a value may be: each takes the value and its place in the file, and returns what the rest works with ----

def number(value, where):
    if value is None:
        return NAN
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Bad(f"{where} is not a number")
    if abs(value) > 1e300:  # an infinity, or an integer that no float holds
        raise Bad(f"{where} is too large for a number")
    return float(value)


def count(least):
    def check(value, where):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 53:
            raise Bad(f"{where} is not an integer of at least {least}")
        return value
    return check


def string(value, where):
    if value is not None and not isinstance(value, str):
        raise Bad(f"{where} is not a string")
    return value


def boolean(value, where):
    if not isinstance(value, bool):
        raise Bad(f"{where} is neither true nor false")
    return value


def word(value, where):
    if not isinstance(value, str):
        raise Bad(f"{where} is not a string")
    return value


def one_of(*names):
    def check(value, where):
        if value not in names:
            raise Bad(f"{where} is none of {', '.join(names)}")
        return value
    return check


def array(kind, length=None):
    """A list; null is a list of nulls, or an empty one where the length is not known beforehand."""
    def check(value, where):
        if value is None:
            value = [None] * (length or 0)
        if not isinstance(value, list):
            raise Bad(f"{where} is not a list")
        if length is not None and len(value) != length:
            raise Bad(f"{where} has {len(value)} entries instead of {length}")
        return [kind(v, f"{where}[{i}]") for i, v in enumerate(value)]
    return check


def optional(kind):
    """What a record need not have, for reports of older versions: as if it were null."""
    def check(value, where):
        return kind(value, where)
    check.optional = True
    return check


def record(**fields):
    """An object with these keys, others being left out; null is an object of nulls."""
    def check(value, where):
        if value is None:
            value = dict.fromkeys(fields)
        if not isinstance(value, dict):
            raise Bad(f"{where or 'the whole'} is not an object")
        result = {}
        for key, kind in fields.items():
            place = f"{where}.{key}" if where else key
            if key not in value and not hasattr(kind, "optional"):
                raise Bad(f"{place} is missing")
            result[key] = kind(value.get(key), place)
        return result
    return check


def anything(value, where):
    return value


def rising(values, where):
    if not values or any(a >= b for a, b in zip(values, values[1:])):
        raise Bad(f"{where} is not a list of rising numbers")
    return values


# ---- the report ----

def attention_map(layers, heads):
    frame = record(layer=count(0), head=count(0), why=string, tokens=array(word), rows=anything)

    def check(value, where):
        if not isinstance(value, dict):
            raise Bad(f"{where} is not an object")
        result = frame(value, where)
        for key, end in (("layer", layers), ("head", heads)):
            if result[key] >= end:
                raise Bad(f"{where}.{key} is {result[key]}, but the model has {end}")
        n = len(result["tokens"])
        if not 1 <= n <= MOST_TOKENS:
            raise Bad(f"{where}.tokens has {n} entries instead of 1 to {MOST_TOKENS}")
        rows = array(anything, n)(result["rows"], f"{where}.rows")
        result["rows"] = [array(number, i + 1)(row, f"{where}.rows[{i}]") for i, row in enumerate(rows)]
        return result
    return check


def check_probes(value, where):
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Bad(f"{where} is not an object")
    both = {key: record(accuracy=number, loss=number) for key in ("dense", "topk")}
    scored = {key: record(accuracy=number, loss=number, score=number) for key in ("dense", "topk")}
    depths = value["needle"].get("depths") if isinstance(value.get("needle"), dict) else None
    n = len(depths) if isinstance(depths, list) else 0
    kinds = {"induction": record(**scored), "recall": record(**both),
             "needle": record(depths=array(number, n), dense=array(number, n), topk=array(number, n))}
    return {key: kinds[key](value.get(key), f"{where}.{key}") for key in kinds}


def check_report(value):
    head = record(version=anything)(value, "")
    if head["version"] != 1:
        raise Bad(f"version is {head['version']!r}, and only 1 is known here")
    report = record(
        model=record(name=string, layers=count(1), heads=count(1), channels=number, vocabulary=number,
                     parameters=number),
        device=string, precision=string, commit=string, date=string,
        text=record(source=string, sequences=number, context=number, rows=number),
        ks=array(count(1)), k=count(1), mass=optional(record(mean=number, nosink=number)), heads=anything,
        mass_by_position=anything,
        loss=record(tokens=number, dense=record(loss=number, perplexity=number),
                    cuts=array(record(cut=one_of(*CUTS), renormalized=boolean, k=count(1), loss=number,
                                      perplexity=number, kept=number))),
        maps=anything)(value, "")
    ks = rising(report["ks"], "ks")
    layers, heads = report["model"]["layers"], report["model"]["heads"]
    quantiles = record(**dict.fromkeys(QUANTILES, number))
    report["heads"] = array(record(
        layer=count(0), head=count(0), mass=array(number, len(ks)), mass_nosink=array(number, len(ks)),
        mass_k=optional(number), mass_nosink_k=optional(number), keys90=number, keys95=number, keys99=number,
        entropy=number, participation=number, first=number, self=number, previous=number, tau=quantiles,
        error=quantiles, error_relative=quantiles), layers * heads)(
            report["heads"] if report["heads"] is not None else [], "heads")
    for i, h in enumerate(report["heads"]):
        if (h["layer"], h["head"]) != divmod(i, heads):
            raise Bad(f"heads[{i}] is layer {h['layer']}, head {h['head']} instead of layer {i // heads}, head "
                      f"{i % heads}")
    frame = record(begin=array(count(0)), mass=anything)(report["mass_by_position"], "mass_by_position")
    if frame["begin"]:
        rising(frame["begin"], "mass_by_position.begin")
    frame["mass"] = array(array(number, len(frame["begin"])), layers)(frame["mass"], "mass_by_position.mass")
    report["mass_by_position"] = frame
    report["maps"] = array(attention_map(layers, heads))(report["maps"], "maps")
    report["probes"] = check_probes(value.get("probes"), "probes")
    return report


def read(folder):
    """The checked report of a folder; report["path"] is where it came from."""
    path = os.path.join(folder, "report.json")

    def not_json(name):
        raise Bad(f"it has {name}, which is not JSON (a number that was not measured is null)")

    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file, parse_constant=not_json)
        report = check_report(value)
    except OSError as error:
        raise Bad(f"{path}: {error.strerror}: infer_gpt2cu --report writes it") from None
    except UnicodeDecodeError as error:
        raise Bad(f"{path}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Bad(f"{path}: it is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nesting, or digits, beyond what Python's reader takes
        raise Bad(f"{path}: it is not JSON that can be read: {error}") from None
    except Bad as error:
        raise Bad(f"{path}: {error}") from None
    report["path"] = path
    return report


# ---- what the page and the pictures ask of a report ----

def mean(values):
    """The mean of what was measured; NaN if nothing was."""
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else NAN


def grid(report, value):
    """value(head) of every head, as L lists of NH."""
    n = report["model"]["heads"]
    flat = [value(h) for h in report["heads"]]
    return [flat[i:i + n] for i in range(0, len(flat), n)]


def mass_at_k(report, key):
    """The top-k mass at the report's own k, as L lists of NH: key is "mass" or "mass_nosink"."""
    if report["k"] in report["ks"]:
        i = report["ks"].index(report["k"])
        return grid(report, lambda h: h[key][i])
    # Reports of older versions have only this of it, which is of the same rows.
    fallback = lambda h: 1 - h["tau"]["mean"] if key == "mass" else NAN
    return grid(report, lambda h: fallback(h) if math.isnan(h[key + "_k"]) else h[key + "_k"])


def mass_of_all(report, key):
    """The same of all heads together: of all attention, and of all that does not go to position 0; where a report
    does not have it, the mean of the heads."""
    whole = report["mass"]["mean" if key == "mass" else "nosink"]
    return whole if not math.isnan(whole) else mean([v for row in mass_at_k(report, key) for v in row])


def cuts(report, cut, renormalized=True):
    """The measured cuts of one kind, by rising k."""
    found = [c for c in report["loss"]["cuts"] if c["cut"] == cut and c["renormalized"] == renormalized]
    return sorted(found, key=lambda c: c["k"])


def visible(text):
    """The text with spaces, ends of lines and all that has no glyph of its own made visible."""
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥"}

    def one(c):
        if c in shown:
            return shown[c]
        if unicodedata.category(c)[0] in "CZ":  # control, format, surrogate, private, unassigned; other spaces
            return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{{{ord(c):x}}}"
        return c
    return "".join(map(one, text)) or "(empty)"


def readable(text):
    """The same for a name rather than a token: spaces stay spaces."""
    return visible(text).replace("␣", " ") if text.strip() else visible(text)
