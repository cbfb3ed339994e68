"""What every part of the paper's runs needs: where things are, files that are whole or not there, and errors that are
one sentence."""
import json
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Bad(Exception):
    """Its text is one sentence: what is wrong, and what to do."""


# ---- what JSON must look like. A shape is
#    a type, or a tuple of types      whose values fit, where true and false are no numbers
#    {"key": shape, "key?": shape}    an object that has at least these keys; "?": or has it not
#    {str: shape}                     an object of any keys
#    [shape], [shape, ...]            a list of any length; of one entry at least
#    {"a", "b"}                       one of these texts

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, type(None))
MAYBE_TEXT = (str, type(None))
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list",
         dict: "an object", type(None): "null"}


def wrong(value, shape, place=""):
    """What of a value is not as the shape says, as a part of a sentence; "" if all is. `place` is the value's."""
    what = place or "it"
    if isinstance(shape, set):
        fits = isinstance(value, str) and value in shape
        return "" if fits else f"{what} is none of {', '.join(repr(word) for word in sorted(shape))}"
    if isinstance(shape, tuple) or isinstance(shape, type):
        types = shape if isinstance(shape, tuple) else (shape,)
        if isinstance(value, types) and (not isinstance(value, bool) or bool in types):
            return ""
        return f"{what} is not " + " or ".join(NAMES[t] for t in types if t is not int or float not in types)
    if not isinstance(value, type(shape)):
        return f"{what} is not {NAMES[type(shape)]}"
    if isinstance(shape, list):
        if not value and shape[-1] is ...:
            return f"{what} is empty"
        parts = [(f"{place}[{i}]", part, shape[0]) for i, part in enumerate(value)]
    else:
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        of = lambda key: f"{place}.{key}" if place else key
        missing = [key for key in wanted if not key.endswith("?") and key not in value]
        if missing:
            return f"{of(missing[0])} is missing"
        parts = [(of(key), value[key], part) for key, part in ((k.rstrip("?"), p) for k, p in wanted.items())
                 if key in value]
    return next((found for inner, part, kind in parts if (found := wrong(part, kind, inner))), "")


# Lines of metrics.jsonl: the first, an update's, a validation's.
HEAD = {"settings?": {"data-digest?": str, "val-digest?": str}}
UPDATE = {"step": int, "ce": MAYBE_NUMBER, "mass": MAYBE_NUMBER, "lambda": MAYBE_NUMBER, "norm": NUMBER,
          "tok_s": NUMBER, "ms": NUMBER}
VALIDATION = {"step": int, "val_ce": MAYBE_NUMBER, "val_mass": MAYBE_NUMBER, "val_mass_nosink": MAYBE_NUMBER}


# ---- files

def read_json(path, shape):
    """The value in a file, which is as shapes.py says, or None where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Bad(f"{path} cannot be read as JSON ({error}): delete it, and it is made again") from None
    found = wrong(value, shape)
    if found:
        raise Bad(f"{path} is not as it was written ({found}): delete it, and it is made again")
    return value


def write_file(path, content):
    """Under another name, synced and renamed: a kill at any instant leaves the old file or the new one."""
    part = path + ".part"
    with open(part, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def from_root(path):
    """A path as commands and tables show it: relative to the repository where it lies in it."""
    full = os.path.abspath(path)
    return os.path.relpath(full, ROOT) if full.startswith(ROOT + os.sep) else full


def read_metrics(folder):
    """(the settings, the updates' lines, the validations' lines) of a run folder, in order."""
    head, updates, validations = {}, [], []
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for i, line in enumerate(file):
                try:
                    value = json.loads(line)
                except ValueError:  # the line that a kill broke off; the trainer drops it when it resumes
                    continue
                found = wrong(value, {})
                if i == 0:
                    head, found = value, wrong(value, HEAD)
                elif not found and "loss" in value:
                    updates.append(value)
                    found = wrong(value, UPDATE)
                elif not found and "val_ce" in value:
                    validations.append(value)
                    found = wrong(value, VALIDATION)
                if found:
                    raise Bad(f"line {i + 1} of {path} is not as the trainer writes it ({found}): delete {folder}, and "
                              "the same command trains it again")
    except FileNotFoundError:
        pass
    return head, updates, validations


def finished_metrics(folder, cell, updates):
    """The same of a cell that is done, of which all must be there: tables would have empty columns, or an earlier
    validation in place of the last."""
    found = _, trained, validations = read_metrics(folder)
    path = os.path.join(folder, "metrics.jsonl")
    what = None
    if not os.path.exists(path):
        what = "is missing"
    elif len(trained) < updates:
        what = f"is cut off (it has {len(trained)} of {updates} updates)"
    elif not validations or validations[-1]["step"] != updates:
        what = "is cut off (the last validation is missing)"
    if what and cell["group"] != "untrained":
        raise Bad(f"{path} {what}: put it back, or delete {folder}, and the same command trains it again")
    return found


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def duration(seconds):
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
