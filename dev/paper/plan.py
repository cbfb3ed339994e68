"""The plan: which cells there are, in which order, and how many updates of each fit into the time.

A cell is one training run and what is measured of it. It has a name, which is its folder's, and these settings:

    family   scratch, or continued: from OpenAI's weights
    group    plain, column, schedule, chosen, baseline, target, other k; repeat, of cells that --seeds repeats
    wave     1: what every table needs; 2: what fills the tables if there is time
    reg k lambda start rise seed     as the trainer's flags have them: --lambda-start, --lambda-warmup
    layers   the factor on lambda in layer 0, beside 1 in the others: a name of LAYER0; "": 1

What is run first answers the main question: plain, then lambda at k = 8, then lambda's schedules, the chosen cells'
other seeds, the baselines, a few cells at other k; the second wave is the rest of the grid.
"""
import fnmatch

from common import Bad

LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1)
KS = (4, 8, 16, 32)
REGS = ("tail", "kl")
SEEDS = (1337, 1338, 1339)
RISE = "70%"
START = "35%"  # of the schedule in which lambda begins late
K = 8  # the k of the column, the schedules, the chosen cells and the bars
SCHEDULE_LAMBDAS = (0.3, 0.1)  # the first in wave 1
# Layer 0 condenses least: other factors on lambda there, by name, and what tables and figures call them.
LAYER0 = {"no0": (0, "not layer 0"), "0x10": (10, "layer 0 tenfold")}
ENTROPY_LAMBDAS = (0.01, 0.03, 0.1)
TARGET_MARGINS = (0.01, 0.02)
TARGET_START = 0.03  # what lambda is adjusted from: too much of it early cannot be taken back
COST_BAR = 0.01

RULE = (f"Of the cells of seed {SEEDS[0]} with k = {K}, whatever lambda and its schedule (but those whose lambda "
        "--target-loss adjusts), for each regularizer: the smallest dense validation loss among those that lose less "
        f"than {COST_BAR} when every row is cut to its top {K}; where none does, the smallest loss when cut. The rule "
        "stood before the runs; the other seeds then confirm the choice or do not.")


def choose(candidates):
    """RULE: [(cell, dense loss, loss cut to the top K)] -> {reg: cell}."""
    found = {}
    for c, dense, cut in candidates:
        rank = (0, dense) if cut - dense < COST_BAR else (1, cut)
        if c["reg"] not in found or rank < found[c["reg"]][0]:
            found[c["reg"]] = (rank, c)
    return {reg: c for reg, (_, c) in found.items()}


# updates: at least, usual, at most; limit: questions of each probe
SIZES = {
    "tiny": {"layers": 4, "tokens": "bytes", "eval_tokens": 32256, "updates": (300, 1000, 3000), "limit": 40},
    "d6": {"layers": 6, "tokens": "gpt2", "eval_tokens": 131072, "updates": (300, 1000, 10000), "limit": 200},
    "d12": {"layers": 12, "tokens": "gpt2", "eval_tokens": 262144, "updates": (500, 2000, 20000), "limit": 400},
}


def name_of(cell):
    """The run folder's name, which says all settings."""
    start = "124M-" if cell["family"] == "continued" else ""
    seed = f"-s{cell['seed']}"
    if cell["group"] == "untrained":
        return "124M-untrained"
    if cell.get("pick"):
        return f"{start}chosen-{cell['pick']}{seed}"
    if cell["lambda"] == 0:
        return f"{start}plain{seed}"
    if cell["reg"] == "entropy":
        return f"{start}entropy-l{cell['lambda']:g}-{rise_name(cell)}{seed}"
    what = f"target{cell['margin']:g}" if "margin" in cell else f"l{cell['lambda']:g}-{rise_name(cell)}"
    return f"{start}k{cell['k']}-{cell['reg']}-{what}{seed}"


def start_of(cell):
    return cell.get("start", "0")  # plans from before there was a choice do not have it


def rise_name(cell):
    rise = "const" if cell["rise"] == "0" else "rise" + cell["rise"].rstrip("%")
    if start_of(cell) != "0":
        rise = f"rise{start_of(cell).rstrip('%')}to{cell['rise'].rstrip('%')}"
    return rise + (f"-{cell['layers']}" if cell["layers"] else "")


def with_seed(chosen, planned):
    """The cell that repeats a chosen one with the seed of a planned one."""
    made = {**chosen, "group": "chosen", "seed": planned["seed"], "wave": planned["wave"]}
    return {**made, "name": name_of(made)}


def cell(group, wave, lam, reg="tail", k=K, rise=RISE, layers="", seed=SEEDS[0], family="scratch", **more):
    made = {"family": family, "group": group, "wave": wave, "lambda": lam, "reg": reg, "k": k, "rise": rise,
            "layers": layers, "seed": seed, **more}
    made["name"] = name_of(made)
    return made


def all_cells(can, continued):
    """Every cell, in the order in which they are run. `can` says which flags the trainer has: "entropy", "target"."""
    cells = [cell("plain", 1, 0, seed=s) for s in SEEDS]
    # from the middle outwards, so that a column that is cut short has its most telling part
    column = sorted(LAMBDAS, key=lambda x: (x < 0.03, -x if x < 0.03 else x))
    cells += [cell("column", 1, lam, reg) for lam in column for reg in REGS]
    for wave, lam in enumerate(SCHEDULE_LAMBDAS, 1):
        for reg in REGS:
            cells += [cell("schedule", wave, lam, reg, rise=rise) for rise in ("0", "50%", "90%")]
            cells += [cell("schedule", wave, lam, reg, layers=layers) for layers in LAYER0]
            cells.append(cell("schedule", wave, lam, reg, start=START))
    cells += [cell("chosen", 1, 1, seed=s, pick=reg) for reg in REGS for s in SEEDS[1:]]
    if "entropy" in can:
        cells += [cell("baseline", 1, lam, "entropy") for lam in ENTROPY_LAMBDAS]
        cells += [cell("baseline", 2, lam, "entropy", start=START) for lam in ENTROPY_LAMBDAS[1:]]
    if "target" in can:
        cells += [cell("target", 1 if s == SEEDS[0] else 2, TARGET_START, reg, margin=margin, seed=s)
                  for s in SEEDS for margin in TARGET_MARGINS for reg in REGS]
    cells += [cell("other k", 1 if lam == 0.3 else 2, lam, reg, k)
              for lam in (0.3, 0.1, 1, 0.03, 0.01, 0.003) for k in KS if k != K for reg in REGS]
    if continued:
        more = [cell("untrained", 1, 0, family="continued"), cell("plain", 1, 0, family="continued")]
        more += [cell("column", 1 if lam in (0.1, 0.3, 1) else 2, lam, reg, family="continued")
                 for lam in (0.1, 0.3, 1, 0.03) for reg in REGS]
        more += [cell("plain", 2, 0, seed=s, family="continued") for s in SEEDS[1:]]
        more += [cell("chosen", 2, 1, seed=s, pick=reg, family="continued") for reg in REGS for s in SEEDS[1:]]
        cells += more
    return sorted(cells, key=lambda c: c["wave"])  # stable: the order within a wave stays


def candidates(cells, family):
    """Those that the chosen ones are chosen from."""
    return [c for c in cells if c["family"] == family and c["group"] in ("column", "schedule")]


def select(cells, patterns):
    if not patterns:
        return cells
    for p in patterns:
        if not any(fnmatch.fnmatch(c["name"], p) for c in cells):
            raise Bad(f"no cell has a name like {p}: see the names in the plan of --dry-run without --cells")
    selected = [c for c in cells if any(fnmatch.fnmatch(c["name"], p) for p in patterns)]
    for c in selected:
        if c.get("pick") and not any(other["reg"] == c["pick"] for other in candidates(selected, c["family"])):
            raise Bad(f"{c['name']} repeats the best cell with {c['pick']} and k = {K}, and --cells has none to choose from: "
                      f"name some, such as k{K}-{c['pick']}-*, too")
    return selected


def stem_of(name):
    """A cell's name without its seed, by which the repeats of one setting belong together."""
    return name.rsplit("-s", 1)[0]


def repeats(cells, patterns, seeds):
    """The cells whose names, without their seeds, are like these, plain among them, each with all of these seeds: seed
    by seed, so that a plan that is cut short has whole pairs."""
    once = [dict(c, name=stem_of(c["name"])) for c in cells
            if c["family"] == "scratch" and c["seed"] == SEEDS[0] and not c.get("pick")]
    chosen = select(once, patterns)
    if not any(c["group"] == "plain" for c in chosen):
        raise Bad("--seeds compares each run with the plain one of its seed: name plain among the --cells, too")
    others = [c["name"] for c in chosen if c["k"] != K]
    if others:
        raise Bad(f"--seeds compares runs by what they lose with their top {K}: leave {', '.join(others)} out")
    made = [{**c, "group": "plain" if c["group"] == "plain" else "repeat", "wave": 1, "seed": seed}
            for seed in seeds for c in chosen]
    return [{**c, "name": name_of(c)} for c in made]


def training_seconds(updates, measured):
    """Of one cell, as it runs beside the others; three validations."""
    return updates * measured["update_s"] + 3 * measured["validation_s"] + measured["start_s"]


def cell_seconds(c, updates, measured):
    return (0 if c["group"] == "untrained" else training_seconds(updates, measured)) + measured["eval_s"]


def final_seconds(cells, measured):
    """After the cells: reports, tasks and speeds, one by one, and the tables and figures; of repeats these alone."""
    if any(c["group"] == "repeat" for c in cells):
        return measured["figures_s"]
    shown = sum(1 for c in cells if c["group"] in ("plain", "chosen")) + 2
    return shown * measured["report_s"] + measured["speed_s"] + measured["figures_s"]


PLANNED = 0.95  # of a budget; the rest is left for what no measurement foresees


def least_seconds(cells, updates, measured, workers):
    """The shortest budget into which these cells fit."""
    return (sum(cell_seconds(c, updates, measured) for c in cells) / workers + final_seconds(cells, measured)) / PLANNED


def choose_updates(cells, limits, measured, seconds, workers):
    """(updates of every cell, how many of the cells fit): as many updates as let wave 1 fit, if that is at least the
    least number; beyond the usual number only if everything fits."""
    least, usual, most = limits
    first = [c for c in cells if c["wave"] == 1]

    def left(some):
        return (PLANNED * seconds - final_seconds(some, measured)) * workers

    def updates_for(some):
        fixed = sum(cell_seconds(c, 0, measured) for c in some)
        trained = sum(c["group"] != "untrained" for c in some)
        return int((left(some) - fixed) / (trained * measured["update_s"])) if trained else least

    everything = updates_for(cells)
    updates = min(everything, most) if everything >= usual else min(updates_for(first or cells), usual)
    updates = max(least, updates)
    updates -= updates % (50 if updates >= 200 and least < most else 1)  # a number that was given stays
    fit, used = 0, 0.0
    for c in cells:
        used += cell_seconds(c, updates, measured)
        if used > left(cells[:fit + 1]):
            break
        fit += 1
    return updates, fit
