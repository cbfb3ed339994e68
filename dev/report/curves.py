#!/usr/bin/env python3
"""Draws how training went, of one run or of several on the same axes: curves.py [RUN ...] [-o FILE.png].

    dev/report/curves.py                                     the last of log/run1, log/run2, ..., into its folder
    dev/report/curves.py log/run1 log/run2 -o both.png
    dev/report/curves.py log/plain log/condensed --labels plain condensed

RUN is a run folder or its metrics.jsonl; the run may still be under way. Updates are drawn as means over neighbours, at
most 100 points a line (a single batch is noise), validations as they are, with a mark each. Where several runs are
drawn, their loss above the first one's takes the learning rate's place: runs with the same data in the same order have
their noise in common, and differ by less than it. Others are not compared so, and a note says why. Exit status 1 and
one sentence if a run cannot be read.
"""
import argparse
import glob
import json
import math
import os
import sys

from report import Bad, find_matplotlib, say, write_file

POINTS = 100
# What gives two runs the same tokens at the same update, by the trainer's settings.
SAME_TOKENS = ("training data", "data-digest", "seed", "tokens-per-update", "batch", "context", "overfit")


def is_number(value):
    """Whether it can be drawn; null, what was not measured, is None."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def newest_run():
    """The last of log/run1, log/run2, ..., by the number in its name, as the trainer counts."""
    runs = [(int(path[len("log/run"):]), path) for path in glob.glob("log/run*")
            if path[len("log/run"):].isdigit() and os.path.exists(os.path.join(path, "metrics.jsonl"))]
    if not runs:
        raise Bad("there is no log/run1, log/run2, ... here: name a run's folder (before --labels)")
    return max(runs)[1]


def read_run(name):
    """{"path", "settings", "updates", "validations"}: each of the last two a list of lines with a "step"."""
    path = os.path.join(name, "metrics.jsonl") if os.path.isdir(name) else name
    run = {"path": path, "settings": {}, "updates": [], "validations": []}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise Bad(f"{path} cannot be read: {error.strerror}") from None
    for i, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if i + 1 < len(lines):
                raise Bad(f"line {i + 1} of {path} is not JSON: is it a run's metrics.jsonl?") from None
            continue  # the end of the file, or the line that is being written
        if not isinstance(value, dict) or i > 0 and not (is_number(value.get("step")) and value["step"] >= 0):
            raise Bad(f"line {i + 1} of {path} is not as the trainer writes it: is it a run's metrics.jsonl?")
        if i == 0:
            run["settings"] = value["settings"] if isinstance(value.get("settings"), dict) else {}
        elif "val_ce" in value:
            run["validations"].append(value)
        else:
            run["updates"].append(value)
    if not run["updates"] and not run["validations"]:
        raise Bad(f"{path} has no update and no validation yet")
    return run


def setting(run, name):
    """A whole number of the run's settings, or None."""
    text = run["settings"].get(name)
    return int(text) if isinstance(text, str) and text.isdigit() else None


def points(lines, key, most=None):
    """(steps, values) of what was measured; with `most`, means over so many neighbours that no more remain."""
    known = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    width = math.ceil(len(known) / most) if most and known else 1
    groups = [known[i:i + width] for i in range(0, len(known), width)]
    return [[sum(pair[i] for pair in group) / len(group) for group in groups] for i in (0, 1)]


# Panels: what a line of an update calls it and what one of a validation does, the title, how many points make a line.
LOSS = ("ce", "val_ce", "cross-entropy (marks: validation)", POINTS)
RATE = ("lr", None, "learning rate", POINTS)
NORM = ("norm", None, "norm of the gradient, before clipping", POINTS)
MASS = ("mass", "val_mass", "top-k mass (marks: validation)", POINTS)
ABOVE = ("above", "val_above", "cross-entropy above the first run's", POINTS // 2)
OTHERS = [("lambda", None, "lambda", POINTS), NORM, ("tok_s", None, "tokens a second", POINTS)]


def compare_with_first(runs):
    """Adds to the lines of the runs that saw the first one's tokens how much their cross-entropy exceeds its at the same
    step. Returns whether there is such a run, and a sentence about each other."""
    notes, first = [], runs[0]
    for run in runs[1:]:
        name = next((name for name in SAME_TOKENS if run["settings"].get(name) != first["settings"].get(name)), None)
        if name:
            theirs, ours = (r["settings"].get(name, "not recorded") for r in (run, first))
            notes.append(f"note: {run['label']} is not compared with {first['label']}: its {name} is {theirs}, not {ours}")
            continue
        for lines, key, above in (("updates", "ce", "above"), ("validations", "val_ce", "val_above")):
            known = {line["step"]: line[key] for line in first[lines] if is_number(line.get(key))}
            for line in run[lines]:
                if line["step"] in known and is_number(line.get(key)):
                    line[above] = line[key] - known[line["step"]]
    return len(notes) < len(runs) - 1, notes


def leave_out_the_fall(axis):
    """A loss falls so far in the first tenth of a run that of the rest, which is what runs differ in, nothing would be
    seen: the scale is the rest's. The tenth is of what there is of each run: none is left out altogether."""
    rest = []
    for line in axis.get_lines():
        known = line.get_xydata()
        rest += [y for x, y in known if x >= known[-1][0] / 10]
    if rest and max(rest) > min(rest):
        margin = 0.05 * (max(rest) - min(rest))
        axis.set_ylim(min(rest) - margin, max(rest) + margin)


def tell_apart(names):
    """Labels for runs: their paths without the folders that all have in common; equal ones are numbered."""
    folders = [os.path.dirname(os.path.abspath(name)) for name in names]
    common = os.path.commonpath(folders)
    labels = [os.path.relpath(os.path.abspath(name), common) for name in names] if len(names) > 1 else names
    return numbered(labels)


def numbered(labels):
    return [label if labels.count(label) == 1 else f"{label} ({labels[:i + 1].count(label)})"
            for i, label in enumerate(labels)]


def draw(runs):
    import pictures
    pictures.set_style()
    colours = (pictures.BLUE, pictures.VERMILION, pictures.GREEN, pictures.PURPLE, pictures.ORANGE, pictures.SKY, "black")
    for i, run in enumerate(runs):
        run["style"] = {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":")[i // len(colours) % 3]}
    # Runs with updates of different size are compared by the tokens that they have seen.
    sizes = [setting(run, "tokens-per-update") for run in runs]
    by_tokens = len(set(sizes)) > 1 and all(sizes)
    compared, notes = compare_with_first(runs)
    second = ABOVE if compared else RATE
    ks = {setting(run, "topk") for run in runs}
    figure, axes = pictures.panels(pictures.FULL, 8.6, 3, 2, sharex=True)
    for axis, panel in zip(axes.flat, (LOSS, second, MASS, *OTHERS)):
        of_updates, of_validations, title, most = panel
        for run, size in zip(runs, sizes):
            scale = size / 1e6 if by_tokens else 1
            steps, values = points(run["updates"], of_updates, most)
            if values:
                axis.plot([s * scale for s in steps], values, marker=pictures.dot(values), **run["style"])
            steps, values = points(run["validations"], of_validations)
            if values:
                axis.plot([s * scale for s in steps], values, "o", color=run["style"]["color"])
        drawn = [y for line in axis.get_lines() for y in line.get_ydata()]
        if not drawn:
            pictures.say_empty(axis)
        elif panel is NORM and min(drawn) > 0:
            axis.set_yscale("log")
            pictures.plain_numbers(axis.yaxis)
        elif panel in (LOSS, ABOVE):
            leave_out_the_fall(axis)
        elif panel is MASS and len(ks) > 1:
            title = "top-k mass, each run's of its own k (marks: validation)"
        axis.set_title(title, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("million tokens" if by_tokens else "updates")
    if len(runs) > 1:
        handles = [pictures.Line2D([], [], label=pictures.shown(run["label"]), **run["style"]) for run in runs]
        axes[0, 0].legend(handles=handles, loc="upper right")  # where a falling loss leaves room
    return pictures.png(figure), notes


def summary(run):
    """A line for the terminal: how far it is, and its last validation."""
    updates = int(max((line["step"] for line in run["updates"]), default=0))
    of = setting(run, "updates")
    text = f"{run['label']}: {updates} of {of} updates" if of else f"{run['label']}: {updates} updates"
    for line in run["validations"][-1:]:
        if is_number(line.get("val_ce")):
            text += f"; validation after {line['step']}: loss {line['val_ce']:.4f}"
        if is_number(line.get("val_mass")):
            k = setting(run, "topk")
            text += f", top-{k} mass {line['val_mass']:.4f}" if k else f", top-k mass {line['val_mass']:.4f}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="*",
                        help="a run folder or its metrics.jsonl (the last of log/run1, log/run2, ...)")
    parser.add_argument("-o", dest="picture", metavar="FILE.png", help="the picture (curves.png beside the first metrics)")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what the runs are called")
    args = parser.parse_args()
    try:
        names = args.runs or [newest_run()]
        if args.labels and len(args.labels) != len(names):
            raise Bad(f"--labels has {len(args.labels)} names for {len(names)} runs: give each its own, behind the runs")
        runs = [read_run(name) for name in names]
        for run, label in zip(runs, numbered(args.labels) if args.labels else tell_apart(names)):
            run["label"] = label
        find_matplotlib(__file__)
        path = args.picture or os.path.join(os.path.dirname(runs[0]["path"]), "curves.png")
        if not path.endswith(".png"):
            raise Bad(f"-o {path}: the picture is a PNG, so name it .png")
        picture, notes = draw(runs)
        write_file(path, picture)
        say(*map(summary, runs), *notes, path)
    except Bad as error:
        sys.exit(f"curves.py: {error}")


if __name__ == "__main__":
    main()
