#!/usr/bin/env python3
"""The paper's runs: plans them to fit the time, trains and measures what is not done yet, and writes tables and
figures. Killed at any time, it goes on when it is called again with the same --out."""
import argparse
import glob
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import tables
from common import ROOT, Bad, duration, from_root, read_json, write_file, write_json
from plan import (K, RULE, SIZES, all_cells, cell_seconds, choose_updates, final_seconds, least_seconds, repeats,
                  select)
from runner import Programs, Runner, calibrate, lock
from shapes import PLAN, RESULTS
from tables import MOST_SEEDS

DEFAULT_BUDGET = {"gpu": "8h", "cpu": "50m"}


def seconds_of(text):
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        if text and text[-1] in units and 0 < float(text[:-1]) < 1e9:
            return float(text[:-1]) * units[text[-1]]
    except ValueError:
        pass
    raise Bad(f"--budget takes a time like 20m, 8h or 90s, not '{text}'")


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is wanted, not '{text}'")
    return int(text)


def seeds_of(text):
    """1337,1338 or 2001-2008"""
    parts = [re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"whole numbers are wanted, such as 1337,1338 or 2001-2008, not '{text}'")
    seeds = set()
    for part in parts:
        first, last = int(part[1]), int(part[2] or part[1])
        seeds.update(range(first, min(last, first + MOST_SEEDS) + 1))  # no longer than it takes to be too many
    if max(seeds) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"seeds are less than 2 to the 63rd, not '{text}'")
    if not 1 < len(seeds) <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"2 to {MOST_SEEDS} seeds are wanted, not '{text}'")
    return sorted(seeds)


def has_gpu():
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        return any(float(capability) >= 8 for capability in found.stdout.split())  # as the Makefile
    except (OSError, ValueError):
        return False


def default_data(tokens):
    """The prefix of shards that are there: FineWeb's for GPT-2's tokens, else what make prepared."""
    fineweb = "data/fineweb10B/fineweb"
    if tokens == "gpt2" and os.path.exists(os.path.join(ROOT, fineweb + "_train_000001.bin")):
        return fineweb
    try:
        with open(os.path.join(ROOT, "data/default_dataset"), encoding="utf-8") as file:
            return f"data/{file.read().strip()}_{tokens}"
    except OSError:
        raise Bad("there is no data yet: run make, or name shards with --data PREFIX") from None


def arguments():
    parser = argparse.ArgumentParser(prog="dev/paper/run.sh", description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, help="the model: d12 (GPT-2 124M) where there is a GPU, else tiny")
    add("--budget", metavar="TIME", help="plan to fit it: 20m, 8h (8h on a GPU, 50m on a CPU)")
    add("--out", metavar="DIR", help="where the runs go (log/paper-SIZE)")
    add("--data", metavar="PREFIX", help="shards PREFIX_train_*.bin and PREFIX_val_*.bin (what make prepared; FineWeb "
                                         "if it is there)")
    add("--dry-run", action="store_true", help="measure the time of an update, print the plan, and stop")
    add("--tables", action="store_true", help="only write the tables and figures of what is done")
    add("--publish", metavar="DIR", help="copy tables and figures there as well, and the tables' heart into README.md")
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu: even where there is a GPU")
    add("--updates", type=at_least_one, metavar="N", help="updates of every run, instead of what fits")
    add("--cells", metavar="NAMES", help="plan only the cells with these names (patterns like 'k8-*,plain-*')")
    add("--seeds", type=seeds_of, metavar="N,N-N", help="repeat the --cells, named without a seed and plain among them, "
                                                        "with each of these seeds, and compare them pair by pair")
    add("--batch", type=at_least_one, metavar="N", help="rows of a micro-batch (the trainer's default)")
    add("--context", type=at_least_one, metavar="N", help="tokens of a row (the trainer's default)")
    add("--eval-tokens", type=at_least_one, metavar="N", help="validation tokens that every loss is measured on")
    return parser.parse_args()


def make_plan(args, out, programs, gpu):
    size = args.size or ("d12" if gpu else "tiny")
    facts = SIZES[size]
    prefix = from_root(args.data) if args.data else default_data(facts["tokens"])
    continued = size == "d12" and gpu and os.path.isdir(os.path.join(ROOT, "data/gpt2-124M"))
    can = programs.can()
    patterns = [p.strip() for p in args.cells.split(",")] if args.cells is not None else None
    if args.seeds:
        cells = repeats(all_cells(can, False), patterns, args.seeds)
    else:
        cells = select(all_cells(can, continued), patterns)
    left_out = []  # what the tables will lack, and why
    if "entropy" not in can:
        left_out.append("entropy penalty: the trainer has no --reg entropy")
    if "target" not in can:
        left_out.append("constrained lambda: the trainer has no --target-loss")
    if size == "d12" and not continued and not args.seeds:
        left_out.append("continued from pretrained weights: needs a GPU and data/gpt2-124M (data/fetch 124M)")
    plan = {"version": 1, "size": size, "train_data": prefix + "_train_*.bin", "val_data": prefix + "_val_*.bin",
            "gpu": gpu, "rule": RULE, "left_out": left_out, "cells_option": args.cells, "seeds": args.seeds,
            "data_option": args.data, "layers": facts["layers"], "limit": facts["limit"], "rounds": 3}
    if args.updates and args.updates < facts["updates"][0]:
        plan.update({"limit": 4, "rounds": 1})
        left_out.append(f"results: {args.updates} updates are fewer than the {facts['updates'][0]} that a result needs "
                        "at least; this is a trial")
    options = {"batch": args.batch, "context": args.context, "eval_tokens": args.eval_tokens or facts["eval_tokens"]}
    plan["options"] = options
    print("measuring the time of an update", flush=True)
    plan.update(calibrate(out, plan, programs))
    budget = seconds_of(args.budget or DEFAULT_BUDGET["gpu" if gpu else "cpu"])
    limits = (args.updates,) * 3 if args.updates else facts["updates"]
    updates, fit = choose_updates(cells, limits, plan["measured"], budget, plan["workers"])
    least = cells[:2]
    if fit < len(least):
        seconds = least_seconds(least, updates, plan["measured"], plan["workers"])
        raise Bad(f"{duration(budget)} is too short for {len(least)} cells of {updates} updates, "
                  f"{duration(cell_seconds(cells[0], updates, plan['measured']))} each, and what is measured of them: "
                  f"give a --budget of {math.ceil(seconds / 60)}m or more")
    if fit < len(cells):
        left_out.append(f"{len(cells) - fit} of {len(cells)} cells do not fit into {duration(budget)}: "
                        + ", ".join(c["name"] for c in cells[fit:]))
    needed = fit * plan["model_bytes"] + 3 * plan["workers"] * plan["checkpoint_bytes"]
    free = shutil.disk_usage(out).free
    if needed > free:
        raise Bad(f"{fit} trained models need {needed / 1e9:.1f} GB, and the disk of {from_root(out)} has "
                  f"{free / 1e9:.1f} GB: name a folder on another with --out, or fewer cells with --cells")
    plan.update({"updates": updates, "budget_s": budget, "disk_bytes": needed, "cells": cells[:fit]})
    return plan


def show_plan(plan):
    measured, updates = plan["measured"], plan["updates"]
    print(f"\nsize {plan['size']}, data {plan['train_data']} ({plan['data_tokens']}), {plan['device']}")
    print(f"{updates} updates of {plan['tokens_per_update']} tokens; {plan['eval_tokens']} validation tokens; "
          f"{plan['workers']} at a time ({plan['why_workers']})")
    print(f"on the disk: {plan['disk_bytes'] / 1e6:.0f} MB")
    print(f"\n{'':>3}  {'cell':34} {'group':10} {'wave':>4} {'estimate':>9} {'ends after':>10}")
    used = 0.0
    for i, c in enumerate(plan["cells"], 1):
        seconds = cell_seconds(c, updates, measured)
        used += seconds / plan["workers"]
        print(f"{i:3}  {c['name']:34} {c['group']:10} {c['wave']:4} {duration(seconds):>9} {duration(used):>10}")
    last = final_seconds(plan["cells"], measured)
    print(f"{'':3}  {'reports, tasks, speeds, figures':34} {'':10} {'':4} {duration(last):>9} "
          f"{duration(used + last):>10}")
    for line in plan["left_out"]:
        print(f"left out: {line}")
    if not plan.get("seeds"):
        print(f"how the chosen cells are chosen: {plan['rule']}")
    sys.stdout.flush()


def check_same(args, gpu, plan, out):
    """A plan is made once; what would change it is refused."""
    if gpu != plan["gpu"]:
        raise Bad(f"{from_root(out)}/plan.json was made {'for a GPU' if plan['gpu'] else 'without a GPU'}: go on with it "
                  "there, or name another folder with --out" + (" (or say --device cpu)" if gpu else ""))
    for flag, given, planned in (("--size", args.size, plan["size"]), ("--updates", args.updates, plan["updates"]),
                                 ("--cells", args.cells, plan["cells_option"]),
                                 ("--seeds", args.seeds, plan.get("seeds")),
                                 ("--data", args.data, plan["data_option"]),
                                 ("--batch", args.batch, plan["batch"]), ("--context", args.context, plan["context"]),
                                 ("--eval-tokens", args.eval_tokens, plan["options"]["eval_tokens"])):
        if given is not None and given != planned:
            raise Bad(f"{from_root(out)}/plan.json was made with {flag} {planned}, not {given}: leave the flag out to "
                      "go on with that plan, or name another folder with --out")


def figures(out):
    return sorted(name for name in os.listdir(out) if name.endswith(".png"))


def draw(out):
    """Has the figures drawn by a Python that has matplotlib, which the distribution's has and the first in PATH need
    not have; returns the sentence to print."""
    script = os.path.join(ROOT, "dev/paper/figures.py")
    os.environ["MPLBACKEND"] = "Agg"  # the user's own may need a window, and files are all that is drawn
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([python, "-c", "import matplotlib, numpy"], stderr=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        for name in figures(out):  # of what the tables may no longer have
            os.remove(os.path.join(out, name))
        made = subprocess.run([python, script, out], stderr=subprocess.PIPE, check=False)
        if made.returncode != 0:
            return f"the figures were not drawn: {made.stderr.decode().strip().splitlines()[-1]}"
        return f"figures: {', '.join(figures(out)) or 'none, for no run is done'}"
    return "no figures, for they need matplotlib (apt-get install python3-matplotlib); run.sh --tables draws them then"


CAPTIONS = {"cuts": "Loss against the keys that every row keeps at inference, and what the cut costs",
            "maps": "Attention of plain and of a condensed model on the same text, in heads that stand out",
            "mass_by_head": f"The mass in the top {K}, by layer and head",
            "mass_in_training": f"The mass in the top {K} through training",
            "pareto": "Loss above plain against the mass outside the top k, over lambda and k",
            "repeats": f"Loss above plain against the mass outside the top {K}, means over the seeds"}


def pictures(place, names):
    """The figures in a README, each behind its caption."""
    text = ""
    for name in names:
        caption = CAPTIONS[os.path.splitext(name)[0]]
        text += f"\n{caption}:\n\n![{caption}]({place}/{name})\n"
    return text


def publish(out, target):
    os.makedirs(target, exist_ok=True)
    for name in ("tables.md", "results.json", *figures(out)):
        shutil.copyfile(os.path.join(out, name), os.path.join(target, name))
    readme = os.path.join(ROOT, "dev/paper/README.md")
    mark = os.path.basename(os.path.abspath(target))
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    with open(readme, encoding="utf-8") as file:
        text = file.read()
    if begin in text and end in text and os.path.abspath(target).startswith(os.path.dirname(readme) + os.sep):
        heart = tables.heart(read_json(os.path.join(out, "results.json"), RESULTS))
        place = os.path.relpath(target, os.path.dirname(readme))
        heart += f"\nAll tables are in [tables.md]({place}/tables.md), and as JSON in [results.json]({place}/results.json).\n"
        heart += pictures(place, figures(out))
        write_file(readme, text[:text.index(begin)] + begin + heart + text[text.index(end):])
    print(f"published in {from_root(target)}")


def write_results(out, plan):
    tables.write(out, plan)
    print(f"tables: {from_root(out)}/tables.md, and as JSON {from_root(out)}/results.json", flush=True)
    print(draw(out), flush=True)


def main():
    args = arguments()
    if args.seeds and not args.cells:
        raise Bad("--seeds repeats some of the cells: name them with --cells, such as 'plain,k8-tail-l0.1-rise70'")
    gpu = args.device == "auto" and has_gpu()
    size = args.size or ("d12" if gpu else "tiny")
    out = os.path.abspath(args.out or os.path.join(ROOT, "log", f"paper-{size}"))
    if args.budget:
        seconds_of(args.budget)
    os.makedirs(out, exist_ok=True)
    held = lock(out)
    programs = Programs(gpu)
    plan = read_json(os.path.join(out, "plan.json"), PLAN)
    if plan is None:
        if args.tables:
            raise Bad(f"{from_root(out)} has no plan.json: nothing was run there yet")
        plan = make_plan(args, out, programs, gpu)
        if not args.dry_run:
            write_json(os.path.join(out, "plan.json"), plan)
    else:
        check_same(args, plan["gpu"] if args.tables else gpu, plan, out)
    if not args.tables:
        show_plan(plan)
    if args.dry_run:
        return 0
    if not args.tables:
        budget = seconds_of(args.budget) if args.budget else plan["budget_s"]
        runner = Runner(out, plan, programs, budget, held)
        try:
            runner.run()
        except KeyboardInterrupt:
            runner.stop()
            raise
    write_results(out, plan)
    if args.publish:
        publish(out, args.publish)
    return 1 if glob.glob(os.path.join(glob.escape(out), "runs", "*", "failed.json")) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", flush=True)
        sys.exit(130)
    except Bad as problem:
        sys.exit(f"paper: {problem}")
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        sys.exit(f"paper: {problem.filename or 'cannot write'}: {problem.strerror}")
