"""From the run folders to results.json, and from that alone to tables.md: a number in a table is one of the JSON's."""
import itertools
import math
import os
import statistics
import textwrap

from common import Bad, finished_metrics, median, read_json, write_file, write_json
from plan import COST_BAR, K, KS, LAMBDAS, LAYER0, REGS, RISE, SEEDS, candidates, choose, start_of, stem_of, with_seed
from shapes import CHOSEN, DECODE, DONE, EVAL, FAILED, PROBES, REPORT, RESULTS, SPEED, TASKS

CUT_NAMES = {"topk": "top k", "first_recent": "position 0 and the most recent", "recent": "the most recent",
             "random": "random"}
LOSS_BAR, NOSINK_BAR = 0.02, 0.05
# Student's t for 95% of both sides, by the degrees of freedom: of 2 to 16 seeds.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
MOST_SEEDS = len(STUDENT_T) + 1
LAST_UPDATES = 50  # of a run, over which its training loss is compared with another run's


# ---- gathering ----

def chosen_cells(out, plan, family):
    """{reg: settings}: what chosen.json has; before that is written, the choice among what is done so far."""
    fixed = (read_json(os.path.join(out, "chosen.json"), CHOSEN) or {}).get(family)
    if fixed is not None:
        return fixed
    measured = []
    for cell in candidates(plan["cells"], family):
        folder = os.path.join(out, "runs", cell["name"])
        if os.path.exists(os.path.join(folder, "cell.json")):
            loss = read_eval(folder)["eval"]
            measured.append((cell, loss["dense"]["loss"], top_loss(loss, K)))
    return choose(measured)


def read_eval(folder):
    """eval.json of a cell, which has at least the cut that cells are compared by."""
    path = os.path.join(folder, "eval.json")
    measured = read_json(path, EVAL)
    if measured is None:
        raise Bad(f"{path} is missing: the same command without --tables makes it again")
    if not any((c["cut"], c["renormalized"], c["k"]) == ("topk", True, K) for c in measured["eval"]["cuts"]):
        raise Bad(f"{path} has no loss when cut to the top {K}: delete it, and it is made again")
    return measured


def top_loss(loss, k):
    """The loss when cut to the top k, renormalized, of what --eval has measured."""
    return next(c["loss"] for c in loss["cuts"] if (c["cut"], c["renormalized"], c["k"]) == ("topk", True, k))


def gather(out, plan):
    cells = []
    for planned in folders(out, plan):
        folder = os.path.join(out, "runs", planned["name"])
        made = read_json(os.path.join(folder, "cell.json"), DONE)
        failed = read_json(os.path.join(folder, "failed.json"), FAILED)
        if made:
            cells.append(gather_cell(out, folder, made, plan))
        elif failed:
            cells.append({**planned, "error": failed["error"]})
    plain = {(c["family"], c["seed"]): c for c in cells if c["group"] == "plain" and "loss" in c}
    for c in cells:
        pair = plain.get((c["family"], c["seed"]))
        if "loss" in c and pair and c is not pair:
            c["above_plain"] = c["loss"]["dense"] - pair["loss"]["dense"]
            if c.get("last_ce") and pair.get("last_ce"):
                c["last_ce_above_plain"] = c["last_ce"] - pair["last_ce"]
    keep = ("size", "model", "train_data", "data_tokens", "val_data", "device", "precision", "updates",
            "tokens_per_update", "batch", "context", "eval_tokens", "workers", "threads", "why_workers", "rule",
            "left_out", "budget_s", "seeds")
    return {"version": 1, "plan": {key: plan.get(key) for key in keep}, "planned": len(plan["cells"]),
            "chosen": {family: {reg: c["name"] for reg, c in chosen_cells(out, plan, family).items()}
                       for family in sorted({c["family"] for c in plan["cells"]}, reverse=True)},
            "cells": cells, "training": read_json(os.path.join(out, "speed.json"), SPEED) or [],
            "decoding": read_json(os.path.join(out, "decode.json"), DECODE) or []}


def folders(out, plan):
    """The settings of every cell that there is a folder of, in the plan's order; the chosen under their own names."""
    for cell in plan["cells"]:
        if cell.get("pick"):
            found = chosen_cells(out, plan, cell["family"]).get(cell["pick"])
            if not found:
                continue
            cell = with_seed(found, cell)
        yield cell


def gather_cell(out, folder, made, plan):
    cell = dict(made["settings"])
    result = read_eval(folder)["eval"]
    head, updates, validations = finished_metrics(folder, cell, plan["updates"])
    cuts = [{key: c[key] for key in ("cut", "k", "loss", "kept")} for c in result["cuts"] if c["renormalized"]]
    cell.update({key: made[key] for key in ("commands", "commit", "device", "date", "training_s")})
    for key in ("data-digest", "val-digest"):
        cell[key.replace("-", "_")] = head.get("settings", {}).get(key)
    cell["loss"] = {"dense": result["dense"]["loss"], "tokens": result["tokens"], "cuts": cuts}
    cell["cost"] = {str(c["k"]): c["loss"] - result["dense"]["loss"] for c in cuts if c["cut"] == "topk"}
    if validations:
        cell["mass"], cell["mass_nosink"] = validations[-1]["val_mass"], validations[-1]["val_mass_nosink"]
    if updates:
        cell["tok_s"] = median([u["tok_s"] for u in updates])
        cell["largest_norm"] = max(u["norm"] for u in updates)
        cell["last_lambda"] = updates[-1]["lambda"]
        cell["last_ce"] = mean([u["ce"] for u in updates[-LAST_UPDATES:]])
    report = read_report(os.path.join(out, "reports", cell["name"], "report.json"))
    if report:
        cell["attention"] = attention(report)
    probes = read_json(os.path.join(folder, "probes.json"), PROBES)
    if probes:
        cell["probes"] = probes["probes"]
    tasks = read_json(os.path.join(folder, "tasks.json"), TASKS) or {}
    for task in ("lambada", "hellaswag"):
        if task in tasks:
            cell[task] = tasks[task]
    return cell


def read_report(path):
    report = read_json(path, REPORT)
    masses = [h[key] for h in report["heads"] for key in ("mass", "mass_nosink")] if report else []
    if report and (K not in report["ks"] or any(len(mass) != len(report["ks"]) for mass in masses)):
        raise Bad(f"{path} does not have the mass of every head at every k, {K} among them: delete it, and it is made "
                  "again")
    return report


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def attention(report):
    """Means over a layer's heads, from a report."""
    layers = range(report["model"]["layers"])
    of = lambda layer, value: mean([value(h) for h in report["heads"] if h["layer"] == layer])
    ks = report["ks"]
    return {"rows": report["text"]["rows"], "ks": ks,
            "mass": [[of(l, lambda h: h["mass"][i]) for i in range(len(ks))] for l in layers],
            "mass_nosink": [[of(l, lambda h: h["mass_nosink"][i]) for i in range(len(ks))] for l in layers],
            **{key: [of(l, lambda h: h[key]) for l in layers]
               for key in ("keys90", "keys95", "keys99", "entropy", "first", "self", "previous")},
            "tau_largest": [max((h["tau"]["max"] for h in report["heads"]
                                 if h["layer"] == l and h["tau"]["max"] is not None), default=None) for l in layers],
            "largest_score": max((h["max_score"] for h in report["heads"] if h.get("max_score") is not None),
                                 default=None)}


# ---- what tables ask of the results ----

def done(results, **want):
    return [c for c in results["cells"] if "loss" in c and all(c.get(key) == value for key, value in want.items())]


def families(results):
    return [f for f in ("scratch", "continued") if done(results, family=f)]


def models(results, family):
    """The models that are compared closely: [(label, cells of its seeds)]: plain, then the chosen ones, or those that
    --seeds repeats."""
    found = [("plain", done(results, family=family, group="plain"))]
    for reg, name in results["chosen"].get(family, {}).items():
        first = done(results, name=name)
        if first:
            stem = stem_of(name)
            others = [c for c in done(results, family=family, group="chosen") if stem_of(c["name"]) == stem]
            found.append((stem, first + others))
    repeats = {}
    for c in done(results, family=family, group="repeat"):
        repeats.setdefault(stem_of(c["name"]), []).append(c)
    found += repeats.items()
    return [(label, cells) for label, cells in found if cells]


def plain_by_seed(results):
    return {c["seed"]: c for c in done(results, family="scratch", group="plain")}


def on_shared_seeds(found):
    """The same of models(), with the seeds that all of them have, if there are any: means over other seeds would differ
    by these."""
    shared = set.intersection(*({c["seed"] for c in cells} for _, cells in found)) if found else set()
    return [(label, [c for c in cells if c["seed"] in shared]) for label, cells in found] if shared else found


def cut_loss(cell, k, cut="topk"):
    return next((c["loss"] for c in cell["loss"]["cuts"] if (c["cut"], c["k"]) == (cut, k)), None)


def at_k(rows, ks, k):
    """The mean over the layers of what a report has at k."""
    return mean([row[ks.index(k)] for row in rows]) if k in ks else None


def outside(cell, k, key="mass"):
    """1 - the mean top-k mass of dense attention (or, with "mass_nosink", of what does not go to position 0): of the
    trainer's last validation where that measured this k, else of the report."""
    if cell["k"] == k and cell.get(key) is not None:
        return 1 - cell[key]
    look = cell.get("attention")
    mass = at_k(look[key], look["ks"], k) if look else None
    return None if mass is None else 1 - mass


def number(value, digits=4, sign=False):
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def spread(values, digits=4, sign=False):
    """The mean, and behind it the smallest and the largest, and of how many seeds where not all have a value."""
    there = [v for v in values if v is not None]
    if not there:
        return "–"
    text = number(mean(there), digits, sign)
    if len(there) > 1:
        text += f" ({number(min(there), digits, sign)} .. {number(max(there), digits, sign)})"
    return text + of_how_many(values)


def half_interval(values):
    """Half of the 95% interval of the mean over the seeds, by Student's t; of one seed there is none."""
    return STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def p_value(differences):
    """Of Student's t-test that their mean is 0, both sides (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    freedom = len(differences) - 1
    deviation = statistics.stdev(differences)
    if deviation == 0:
        return 0.0 if differences[0] else 1.0
    angle = math.atan(abs(statistics.mean(differences)) / deviation * math.sqrt(len(differences) / freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for i in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine * cosine * i / (i + 1)
    return 1 - (2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total)


def holm(ps):
    """Each of the p of a family of comparisons, corrected for their number (Holm 1979)."""
    ps = list(ps)
    corrected, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def interval(values, digits=4, sign=True):
    """The mean over the seeds, and half of its 95% interval."""
    text, half = number(mean(values), digits, sign), half_interval(values)
    return text if half is None else f"{text} ± {number(half, digits)}"


def largest(values):
    return number(max((v for v in values if v is not None), default=None), 0) + of_how_many(values)


def of_how_many(values):
    """"" if all are there and if none is."""
    there = sum(v is not None for v in values)
    return f" [{there} of {len(values)}]" if 0 < there < len(values) else ""


def names(cells):
    """Run folders, the seeds of one setting together."""
    stems = {}
    for c in cells:
        stem, seed = c["name"].rsplit("-s", 1) if "-s" in c["name"] else (c["name"], "")
        stems.setdefault(stem, []).append(seed)
    return ", ".join(f"`{stem}`" if seeds == [""] else
                     f"`{stem}-s{seeds[0]}`" + "".join(f", `-s{seed}`" for seed in seeds[1:])
                     for stem, seeds in stems.items())


def table(head, rows):
    if not rows:
        return "Nothing of this was run.\n"
    words = ("run", "runs", "keys kept", "schedule", "reg", "what", "attention", "commit")
    align = ["---"] + ["---" if h in words else "---:" for h in head[1:]]
    lines = [head, align, *rows]
    return "".join("| " + " | ".join(str(c) for c in line) + " |\n" for line in lines)


# ---- the tables ----

def summary_table(results, family):
    rows = []
    for label, cells in models(results, family):
        look = [c.get("attention") for c in cells]
        rows.append([label, spread([c["loss"]["dense"] for c in cells]),
                     "" if label == "plain" else spread([c.get("above_plain") for c in cells], sign=True),
                     spread([c["cost"].get(str(K)) for c in cells], sign=True),
                     spread([cut_loss(c, K) for c in cells]), spread([c.get("mass") for c in cells]),
                     spread([outside(c, K, "mass_nosink") for c in cells]),
                     spread([a and mean(a["keys95"]) for a in look], 2),
                     largest([a and a.get("largest_score") for a in look]),
                     names(cells)])
    return table(["model", "validation loss", "above plain", f"cost of the cut to the top {K}", "loss when cut",
                  f"top-{K} mass", "outside of it, without position 0", "keys for 95%", "largest score", "runs"], rows)


def bars_of(results, cell):
    """The three bars that were set before the runs, for one cell with k = K: each true, false, or None."""
    plain = [c for c in done(results, family=cell["family"], group="plain") if c["seed"] == cell["seed"]]
    if not plain or cell.get("above_plain") is None:
        return None
    cost, plain_cost = cell["cost"].get(str(K)), plain[0]["cost"].get(str(K))
    return {"loss": cell["above_plain"] <= LOSS_BAR, "cost": cost < COST_BAR < plain_cost,
            "outside": outside(cell, K, "mass_nosink") < NOSINK_BAR}


def bars_row(name, above_plain, cost, out, bars):
    mark = lambda key: "yes" if bars[key] else "no"
    return [name, number(above_plain, sign=True), mark("loss"), number(cost, sign=True), mark("cost"), number(out),
            mark("outside")]


def bars_table(results, family):
    rows, met = [], 0
    for c in done(results, family=family):
        if c["k"] != K or c["group"] in ("plain", "untrained"):
            continue
        bars = bars_of(results, c)
        if bars is None:
            continue
        met += all(bars.values())
        if sum(bars.values()) >= 2:
            rows.append(bars_row(f"`{c['name']}`", c["above_plain"], c["cost"][str(K)], outside(c, K, "mass_nosink"),
                                 bars))
    # the chosen ones again, by their means over the seeds
    plain = done(results, family=family, group="plain")
    for label, cells in models(results, family):
        if label == "plain" or len(cells) < 2 or any(bars_of(results, c) is None for c in cells):
            continue
        above, cost = mean([c["above_plain"] for c in cells]), mean([c["cost"][str(K)] for c in cells])
        out = mean([outside(c, K, "mass_nosink") for c in cells])
        plain_cost = mean([c["cost"][str(K)] for c in plain if c["seed"] in {x["seed"] for x in cells}])
        rows.append(bars_row(f"mean of `{label}`, {len(cells)} seeds", above, cost, out,
                             {"loss": above <= LOSS_BAR, "cost": cost < COST_BAR < plain_cost,
                              "outside": out < NOSINK_BAR}))
    if not plain:
        return "There is no plain run yet to compare with.\n"
    if not rows:
        return f"No cell with k = {K} meets two of the three bars.\n"
    text = (f"All three bars are met by {met} of the cells with k = {K}; the table has those that meet two or more, and "
            "the chosen ones' means over their seeds.\n\n")
    return text + table(["run", "above plain", f"≤ {LOSS_BAR}", f"cost of the cut to the top {K}",
                         f"< {COST_BAR}, and plain's is more", "outside, without position 0", f"< {NOSINK_BAR}"], rows)


def cell_row(c, k):
    held = outside(c, k)
    return [number(c["loss"]["dense"]), number(c.get("above_plain"), sign=True),
            number(None if held is None else 1 - held), number(outside(c, k, "mass_nosink")), number(cut_loss(c, k)),
            number(c["cost"].get(str(k)), sign=True), number(c.get("largest_norm"), 1), f"`{c['name']}`"]


def cell_head(k):
    return ["validation loss", "above plain", f"top-{k} mass", "outside, without position 0",
            f"loss cut to the top {k}", "cost of the cut", "largest gradient norm", "run"]


def column_table(results, family):
    rows = [["plain", "0", *cell_row(c, K)] for c in done(results, family=family, group="plain", seed=SEEDS[0])]
    rows += [["untrained", "", *cell_row(c, K)] for c in done(results, family=family, group="untrained")]
    rows += [[reg, f"{lam:g}", *cell_row(c, K)] for reg in REGS for lam in LAMBDAS
             for c in done(results, family=family, group="column", reg=reg, **{"lambda": lam})]
    return table(["reg", "lambda", *cell_head(K)], rows)


def schedule(cell):
    rise = "constant" if cell["rise"] == "0" else f"rising over {cell['rise']}"
    if start_of(cell) != "0":
        rise = f"rising from {start_of(cell)} to {cell['rise']}"
    if cell["layers"]:
        _, words = LAYER0[cell["layers"]]
        rise += f", {words}"
    return rise


def lambda_of(cell):
    """Where other schedules stand beside it, the usual one goes without saying."""
    usual = start_of(cell) == "0" and cell["rise"] == RISE and not cell["layers"]
    return f"{cell['lambda']:g}" + ("" if usual else f", {schedule(cell)}")


def schedule_order(cell):
    return cell["layers"], int(start_of(cell).rstrip("%")), int(cell["rise"].rstrip("%"))


def schedule_table(results):
    rows = []
    found = done(results, family="scratch", group="schedule")
    for reg, lam in sorted({(c["reg"], c["lambda"]) for c in found}, key=lambda x: (REGS.index(x[0]), x[1])):
        same = [c for c in done(results, family="scratch", reg=reg, k=K, seed=SEEDS[0], **{"lambda": lam})
                if c["group"] in ("column", "schedule")]
        rows += [[reg, f"{lam:g}", schedule(c), *cell_row(c, K)] for c in sorted(same, key=schedule_order)]
    return table(["reg", "lambda", "schedule", *cell_head(K)], rows)


def grid_table(results):
    rows = []
    plain = done(results, family="scratch", group="plain", seed=SEEDS[0])
    for k in KS:
        rows += [[k, "plain", "0", *cell_row(c, k)] for c in plain]
        rows += [[k, reg, f"{lam:g}", *cell_row(c, k)] for reg in REGS for lam in LAMBDAS
                 for c in done(results, family="scratch", reg=reg, k=k, seed=SEEDS[0], **{"lambda": lam})
                 if c["group"] in ("column", "other k")]
    return table(["k", "reg", "lambda", *cell_head("k")], rows)


def repeats_table(results):
    """Every model beside plain, seed by seed: means with their 95% intervals."""
    plain = plain_by_seed(results)
    rows = []
    for label, cells in models(results, "scratch"):
        cells = [c for c in cells if c["seed"] in plain]
        if not cells:
            continue
        pairs = [(c, plain[c["seed"]]) for c in cells]
        of = lambda value: interval([value(c) - value(p) for c, p in pairs])
        above = ["", "", ""] if label == "plain" else [
            of(lambda c: c["loss"]["dense"]), of(lambda c: cut_loss(c, K)),
            f"{sum(all(bars_of(results, c).values()) for c in cells)} of {len(cells)}"]
        rows.append([label, len(cells), number(mean([c["loss"]["dense"] for c in cells])), above[0],
                     interval([c["cost"][str(K)] for c in cells]), number(mean([cut_loss(c, K) for c in cells])), above[1],
                     interval([outside(c, K, "mass_nosink") for c in cells], sign=False), above[2]])
    return table(["model", "seeds", "validation loss", "above plain", f"cost of the cut to the top {K}", "loss when cut",
                  "above plain when cut", "outside, without position 0", "meet all bars"], rows)


def pairs_table(results):
    """Every two of the models that are not plain, on the seeds that both have; with Holm's p of each column."""
    values = (lambda c: c["loss"]["dense"], lambda c: cut_loss(c, K), lambda c: outside(c, K, "mass_nosink"))
    heads, columns = [], [[] for _ in values]  # of each row: what it is, and the differences
    found = [model for model in models(results, "scratch") if model[0] != "plain"]
    for (label, cells), (other, others) in itertools.combinations(found, 2):
        by_seed = {c["seed"]: c for c in others}
        pairs = [(c, by_seed[c["seed"]]) for c in cells if c["seed"] in by_seed]
        if len(pairs) > 1:
            heads.append([f"{label} less {other}", len(pairs)])
            for column, value in zip(columns, values):
                column.append([value(a) - value(b) for a, b in pairs])
    shown = [[f"{interval(differences)} ({'< 0.001' if p < 0.0005 else number(p, 3)})" for differences, p in zip(column, holm(map(p_value, column)))]
             for column in columns]
    rows = [head + list(row) for head, row in zip(heads, zip(*shown))]
    return table(["run", "seeds", "validation loss", f"loss when cut to the top {K}", "outside, without position 0"],
                 rows)


def matrix_table(results, family, shown=spread):
    """Loss when every row of every layer keeps k keys: the models, and the controls, each on the seeds for which all
    models were cut so."""
    found = models(results, family)
    untrained = [("untrained", [c]) for c in done(results, family=family, group="untrained")]
    ks = sorted({c["k"] for _, cells in found + untrained for cell in cells for c in cell["loss"]["cuts"]})
    rows = []
    for cut, cut_name in CUT_NAMES.items():
        cut_so = lambda cell: any(c["cut"] == cut for c in cell["loss"]["cuts"])
        with_cut = lambda these: [(label, some) for label, cells in these if (some := [*filter(cut_so, cells)])]
        for label, cells in on_shared_seeds(with_cut(found)) + with_cut(untrained):
            rows.append([label, cut_name, shown([c["loss"]["dense"] for c in cells]),
                         *[shown([cut_loss(c, k, cut) for c in cells]) for k in ks], len(cells)])
    return table(["model", "keys kept", "all", *[f"k = {k}" for k in ks], "seeds"], rows)


def mean_of(values):
    return number(mean(values)) + of_how_many(values)


def layers_table(results, family):
    rows = []
    for label, cells in models(results, family):
        look = [c["attention"] for c in cells if "attention" in c]
        if not look:
            continue
        for layer in range(len(look[0]["keys95"])):
            one = lambda key: mean([a[key][layer] for a in look])
            mass = lambda key: mean([a[key][layer][a["ks"].index(K)] for a in look])
            rows.append([label, layer, number(mass("mass")), number(mass("mass_nosink")), number(one("keys90"), 2),
                         spread([a["keys95"][layer] for a in look], 2), number(one("keys99"), 2),
                         number(one("entropy"), 3), number(one("first"), 3), number(one("self"), 3),
                         number(one("previous"), 3),
                         number(max(a["tau_largest"][layer] for a in look)), len(look)])
    return table(["model", "layer", f"top-{K} mass", "without position 0", "keys for 90%", "95%", "99%", "entropy",
                  "on position 0", "on itself", "on the previous", "largest τ of a row", "seeds"], rows)


def probes_table(results, family):
    rows = []
    for label, cells in models(results, family):
        probed = [c["probes"] for c in cells if "probes" in c]
        for way, shown in (("dense", "all"), ("topk", f"top {K}")):
            if probed:
                rows.append([label, shown, spread([p["induction"][way]["accuracy"] for p in probed], 3),
                             spread([p["induction"][way]["score"] for p in probed], 3, sign=True),
                             spread([p["recall"][way]["accuracy"] for p in probed], 3),
                             number(probed[0]["recall"][way]["chance"], 3),
                             spread([mean(p["needle"][way]) for p in probed], 3),
                             number(1 / probed[0]["needle"]["candidates"], 3), len(probed)])
    return table(["model", "keys kept", "induction: accuracy", "loss saved by the repetition", "recall: accuracy",
                  "chance", "needle: accuracy over depths", "chance", "seeds"], rows)


def tasks_table(results, family):
    rows = []
    for label, cells in models(results, family) + [("untrained", done(results, family=family, group="untrained"))]:
        for way, shown in (("dense", "all"), ("topk", f"top {K}")):
            lambada = [c["lambada"] for c in cells if "lambada" in c]
            hella = [c["hellaswag"] for c in cells if "hellaswag" in c]
            if lambada or hella:
                rows.append([label, shown, spread([t[way]["accuracy"] for t in lambada]),
                             number(mean([t[way]["stderr"] for t in lambada])),
                             spread([t[way]["perplexity"] and math.log(t[way]["perplexity"]) for t in lambada], 2),
                             mean([t["items"] for t in lambada]) and int(lambada[0]["items"]),
                             spread([t[way]["accuracy_norm"] for t in hella]),
                             number(mean([t[way]["stderr_norm"] for t in hella])), len(cells)])
    return table(["model", "keys kept", "LAMBADA accuracy", "standard error", "loss of the last word", "texts",
                  "HellaSwag accuracy by length", "standard error", "seeds"], rows)


def training_table(results):
    rows = [[r["name"], number(median(r["ms"]), 1), f"{number(min(r['ms']), 1)} .. {number(max(r['ms']), 1)}",
             number(median(r["tok_s"]), 0), r.get("memory") or "–"] for r in results["training"]]
    return table(["training", "ms an update", "smallest .. largest", "tokens/s", "memory"], rows)


def decoding_table(results):
    rows = [[f"`{r['run']}`", r["attention"], r["batch"], number(median(r["tok_s"]), 0),
             f"{number(min(r['tok_s']), 0)} .. {number(max(r['tok_s']), 0)}"] for r in results["decoding"]]
    return table(["run", "attention", "sequences", "tokens/s", "smallest .. largest"], rows)


def baselines_table(results):
    rows = [["plain, cut at inference", "", *cell_row(c, K)]
            for c in done(results, family="scratch", group="plain", seed=SEEDS[0])]
    rows += [["entropy penalty", lambda_of(c), *cell_row(c, K)] for c in done(results, group="baseline")]
    for reg, name in results["chosen"].get("scratch", {}).items():
        rows += [[f"chosen, {reg}", lambda_of(c), *cell_row(c, K)] for c in done(results, name=name)]
    return table(["training", "lambda at the end", *cell_head(K)], rows)


def targets_table(results):
    rows = [[c["reg"], f"{c['margin']:g}", c["seed"], number(c.get("last_ce_above_plain"), sign=True),
             number(c.get("last_lambda")), *cell_row(c, K)]
            for c in sorted(done(results, group="target"), key=lambda c: (c["margin"], REGS.index(c["reg"]), c["seed"]))]
    return table(["reg", "margin", "seed", f"training loss above plain, last {LAST_UPDATES} updates", "lambda at the end",
                  *cell_head(K)], rows)


def seeds_table(results, family):
    rows = [[label, c["seed"], *cell_row(c, K)] for label, cells in models(results, family) for c in cells]
    return table(["model", "seed", *cell_head(K)], rows)


def runs_table(results):
    rows = []
    for c in results["cells"]:
        if "error" in c:
            rows.append([f"`{c['name']}`", c["group"], "failed: " + c["error"].replace("|", "/"), "", "", ""])
        else:
            rows.append([f"`{c['name']}`", c["group"], c["commit"], c["date"], number(c["training_s"], 0),
                         number(c.get("tok_s"), 0)])
    return table(["run", "what", "commit", "date", "seconds of training", "tokens/s"], rows)


def about(results, brief=False):
    """brief: without the names of the cells that do not fit, of which there may be dozens."""
    p = results["plan"]
    finished, failed = len(done(results)), sum("error" in c for c in results["cells"])
    tokens = int(p["data_tokens"].split()[0])
    epochs = f" ({p['updates'] * p['tokens_per_update'] / tokens:.2f} epochs)"
    commits = sorted({c["commit"] for c in done(results)})
    text = (f"Model: {p['size']} ({p['model']}, context {p['context']}, {p['precision']}). "
            f"Data: `{p['train_data']}` ({p['data_tokens']}). "
            f"Every run: {p['updates']} updates of {p['tokens_per_update']} tokens{epochs}. "
            f"Losses are in nats a token, on the same {p['eval_tokens']} tokens of `{p['val_data']}`. "
            f"Device: {p['device']}; {p['workers']} at a time ({p['why_workers']}). "
            f"Commits: {', '.join(commits)}. Cells: {finished} of {results['planned']} planned are done"
            + (f", {failed} failed" if failed else "") + ".\n")
    for line in p["left_out"]:
        what, _, names = line.partition(": ")
        if brief and " cells do not fit" in what:
            line = f"{what} ({names.count(',') + 1} names in tables.md)"
        text += f"\nLeft out: {line}.\n"
    return text


def chosen_text(results):
    failed = [f"`{c['name']}`" for c in results["cells"] if "error" in c and c["group"] in ("column", "schedule")]
    named = "; ".join(f"{reg}: `{name}`" for found in results["chosen"].values() for reg, name in found.items())
    without = f" Not among them, for they failed: {', '.join(failed)}." if failed else ""
    return f"{results['plan']['rule']} {'Chosen: ' + named if named else 'Nothing was chosen'}.{without}\n"


NOTES = f"""A number with two in parentheses is the mean over the seeds, with the smallest and the largest;
"[1 of 2]" behind it: not all of the seeds have it.
"Above plain" is the difference from the plain run of the same seed, which has seen the same tokens in the same order.
The cost of a cut is the loss when every row of every head and layer keeps its k largest entries, renormalized, less the
dense loss of the same model on the same tokens. "Outside, without position 0": of the attention that does not go to
position 0, the share that is not within the top k. Masses are those of dense attention in the validation that ends a
run; the plain run's at other k than {K} are from its report of attention, on the first quarter of the same tokens, and
means over the heads of each head's share, where the others' is the share of all heads' attention. From the report are
also keys, entropies (in nats), scores and τ, the mass outside a row's top {K}; keys and entropies are means over all
rows, also those that have no more than {K} keys. The largest gradient norm is of the whole run, and most often one of
its first updates'.
"""


def write(out, plan):
    results = gather(out, plan)
    write_json(os.path.join(out, "results.json"), results)
    write_file(os.path.join(out, "tables.md"), markdown(read_json(os.path.join(out, "results.json"), RESULTS)))


REPEATS_NOTE = """A number behind ± is half of the 95% interval (Student's t) of the mean over the seeds. Differences
are between runs of the same seed, which have seen the same tokens in the same order. The intervals are of the seeds
alone: all losses are on the same validation tokens, and others would differ. Between the models, in parentheses: the p
of no difference, corrected for the number of comparisons in the column (Holm).
"""


def repeats_parts(results):
    """Of the tables, those of a plan with --seeds."""
    return ["Made by `dev/paper/run.sh` with `--seeds`: the models are those that `--cells` named.\n", REPEATS_NOTE,
            repeats_table(results), "Between the models:\n", pairs_table(results),
            "Loss when every row keeps k keys, mean over the seeds:\n", matrix_table(results, "scratch", mean_of)]


def markdown(results):
    if results["plan"].get("seeds"):
        return "\n".join(["# Tables\n", about(results), NOTES, "## Repeats\n", *repeats_parts(results), "## Each seed\n",
                          seeds_table(results, "scratch"), "## Runs\n", runs_table(results)])
    parts = ["# Tables\n", "Made by `dev/paper/run.sh`; every number is also in results.json, every run is a folder of "
             "that name.\n", about(results), NOTES, "## Plain and chosen\n", chosen_text(results)]
    for family in families(results):
        of = "" if family == "scratch" else ", continued from OpenAI's weights"
        parts += [summary_table(results, family), f"### Each seed{of}\n", seeds_table(results, family),
                  f"### The bars{of}\n", bars_table(results, family),
                  f"## Lambda at k = {K}{of}\n", column_table(results, family)]
        if family == "scratch":
            parts += [f"## Schedules of lambda at k = {K}\n", schedule_table(results), "## Baselines\n",
                      baselines_table(results), "## A limit on the training loss\n", targets_table(results),
                      "## Lambda and k\n", grid_table(results)]
        parts += [f"## Loss when every row keeps k keys{of}\n", matrix_table(results, family),
                  f"## Attention by layer{of}\n", layers_table(results, family),
                  f"## Probes{of}\n", probes_table(results, family), f"## Tasks{of}\n", tasks_table(results, family)]
    parts += ["## Speed and memory of training\n",
              "Alone on the machine, all threads, in turns; the median of the rounds.\n", training_table(results),
              "## Speed of decoding\n", "Generating until the context is nearly full, alone on the machine; the median of the "
              "rounds.\n", decoding_table(results), "## Runs\n", runs_table(results)]
    return "\n".join(parts)


def wrapped(text):
    """At the README's width, but for tables."""
    return "\n".join(line if line.startswith("|") else
                     textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)
                     for line in text.split("\n"))


def heart(results):
    """What goes into the README."""
    return wrapped(heart_parts(results))


def heart_parts(results):
    if results["plan"].get("seeds"):
        return "\n".join([about(results, brief=True), *repeats_parts(results)])
    parts = [about(results, brief=True), "**Plain and chosen.** " + chosen_text(results)]
    for family in families(results):
        of = "" if family == "scratch" else ", continued from OpenAI's weights"
        parts += [f"Mean over the seeds (smallest .. largest){of}:\n", summary_table(results, family),
                  f"**The bars**, which were set before the runs{of}.\n", bars_table(results, family),
                  f"**Loss when every row keeps k keys**, mean over the seeds{of}.\n",
                  matrix_table(results, family, mean_of)]
    return "\n".join([*parts, f"**Schedules of lambda** at k = {K}.\n", schedule_table(results), "**Baselines.**\n",
                      baselines_table(results), "**A limit on the training loss.**\n", targets_table(results)])
