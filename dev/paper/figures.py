#!/usr/bin/env python3
"""Draws the figures of a folder of the paper's runs, from its results.json, metrics and reports: figures.py DIR writes
DIR/*.png. Needs matplotlib; paper.py starts it with a Python that has it. Colours and parts are dev/report's."""
import math
import os
import sys

from common import ROOT, read_json, read_metrics, write_file

sys.path.insert(0, os.path.join(ROOT, "dev/report"))
import pictures
import report

import tables
from plan import K, KS, LAMBDAS, LAYER0, REGS, RISE, SEEDS, start_of
from shapes import RESULTS

REG_STYLE = {"tail": (pictures.BLUE, "o"), "kl": (pictures.VERMILION, "s")}
MODEL_COLOURS = ("black", pictures.BLUE, pictures.VERMILION, pictures.GREEN, pictures.PURPLE, pictures.ORANGE,
                 pictures.SKY, "#7F5539")
MAP_FONT = 6.5
LEAST = "least condensed"  # a reason for which a report has a map
CUT_STYLE = {"topk": {"marker": "o"}, "recent": {"linestyle": "--", "linewidth": 1},
             "first_recent": {"linestyle": "-.", "linewidth": 1}, "random": {"linestyle": ":", "linewidth": 1}}
FLOOR = 1e-4  # the cost of a cut is drawn down to here; on these few tokens it is hardly more exact than 1e-3
SCHEDULE_COLOURS = {("0", ""): pictures.BLUE, ("50%", ""): pictures.SKY, ("70%", ""): pictures.GREEN,
                    ("90%", ""): pictures.ORANGE,
                    **{("70%", name): colour for name, colour in zip(LAYER0, (pictures.PURPLE, pictures.VERMILION))}}


def series(folder):
    """(steps, top-k mass) of a run's updates, about 200 points: means over neighbours, for a batch is noise."""
    _, updates, _ = read_metrics(folder)
    width = max(1, len(updates) // 200)
    points = []
    for i in range(0, len(updates), width):
        some = [u for u in updates[i:i + width] if u["mass"] is not None]
        if some:
            points.append((sum(u["step"] for u in some) / len(some), sum(u["mass"] for u in some) / len(some)))
    return [p[0] for p in points], [p[1] for p in points]


def shade(lam):
    """A colour for lambda: from pale to dark over its range, alike in every figure."""
    place = 1 + LAMBDAS.index(lam) if lam in LAMBDAS else 0
    return pictures.LAYERS(1 - place / len(LAMBDAS))


def logarithmic_x(axis):
    axis.set_xscale("log")
    pictures.plain_numbers(axis.xaxis)


def pareto(results, out):
    """Dense loss, and loss cut to the top k, against the mass outside the top k: a panel for each k."""
    plain = tables.done(results, family="scratch", group="plain", seed=SEEDS[0])
    panels = {k: {reg: [c for lam in LAMBDAS for c in tables.done(results, family="scratch", reg=reg, k=k, rise=RISE,
                                                                  layers="", seed=SEEDS[0], **{"lambda": lam})
                        if c["group"] in ("column", "other k")] for reg in REGS} for k in KS}
    panels = {k: found for k, found in panels.items() if any(found.values())}
    if not plain or not panels:
        return None
    figure, axes = pictures.panels(pictures.FULL, 3.1 * ((len(panels) + 1) // 2) + 0.5, (len(panels) + 1) // 2,
                                   min(2, len(panels)), sharex=True, sharey=True)
    flat = list(axes.flat)
    beyond = []  # plain's cost of a cut, which may lie above the axis
    for axis, (k, found) in zip(flat, panels.items()):
        base = plain[0]["loss"]["dense"]
        axis.axhline(0, color=pictures.GREY, linewidth=0.8)
        for reg, cells in found.items():
            colour, marker = REG_STYLE[reg]
            x = [tables.outside(c, k) for c in cells]
            for values, style, fill in (([c["loss"]["dense"] - base for c in cells], "-", colour),
                                        ([tables.cut_loss(c, k) - base for c in cells], ":", "white")):
                axis.plot(x, values, style, color=colour, marker=marker, markersize=5.5, markerfacecolor=fill,
                          linewidth=1)
            for place, c in zip(x, cells):
                axis.annotate(f"{c['lambda']:g}", (place, c["loss"]["dense"] - base), textcoords="offset points",
                              xytext=(0, -10 if reg == "tail" else 6), ha="center", fontsize=6.5, color=colour)
        x = tables.outside(plain[0], k)
        if x is not None:
            axis.plot([x], [0], "*", color="black", markersize=8)
            axis.plot([x], [tables.cut_loss(plain[0], k) - base], "*", color="black", markersize=8,
                      markerfacecolor="white")
            beyond.append((axis, x, tables.cut_loss(plain[0], k) - base))
        logarithmic_x(axis)
        axis.set_title(f"k = {k}", loc="left")
    # What a cut costs the plain run may be many times all else: the other points set the scale.
    every = [(k, c) for k, found in panels.items() for cells in found.values() for c in cells]
    high = max(max(c["loss"]["dense"], tables.cut_loss(c, k)) for k, c in every) - plain[0]["loss"]["dense"]
    low = min(0, min(c["loss"]["dense"] for _, c in every) - plain[0]["loss"]["dense"])
    high = max(high, low + 0.01)
    top = high + 0.12 * (high - low)
    flat[0].set_ylim(low - 0.12 * (high - low), top)
    for axis, x, cost in beyond:
        if cost > top:
            axis.annotate(f"☆ {cost:.2f}", (x, top), (x, top - 0.22 * (high - low)), ha="center", fontsize=7.5,
                          arrowprops={"arrowstyle": "->", "linewidth": 0.8})
    for axis in flat[len(panels):]:
        axis.set_visible(False)
    figure.supxlabel("mass outside the top k (dense attention, validation)", fontsize=9)
    figure.supylabel("loss above the plain run, nats a token", fontsize=9)
    line = pictures.Line2D
    handles = [line([], [], color=REG_STYLE[reg][0], marker=REG_STYLE[reg][1], label=f"{reg} (numbers: λ)")
               for reg in REGS]
    handles += [line([], [], color="black", marker="*", linestyle="", label="plain"),
                line([], [], color=pictures.GREY, marker="o", label="dense"),
                line([], [], color=pictures.GREY, marker="o", markerfacecolor="white", linestyle=":",
                     label="cut to the top k")]
    figure.legend(handles=handles, loc="upper center", ncols=len(handles))
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def cuts(results, out):
    """Loss against the k of inference: plain and chosen, the mean over seeds and the range; the controls of both."""
    found = tables.on_shared_seeds(tables.models(results, "scratch"))
    if not found:
        return None
    figure, axes = pictures.panels(pictures.FULL, 4, 1, 2)
    left, right = axes[0]
    ks = sorted({c["k"] for _, cells in found for cell in cells for c in cell["loss"]["cuts"]})
    drawn = set()  # kinds of cuts
    for (label, cells), colour in zip(found, MODEL_COLOURS):
        dense = tables.mean([c["loss"]["dense"] for c in cells])
        losses = [[tables.cut_loss(c, k) for c in cells] for k in ks]
        shown = label if len(cells) == 1 else f"{label} ({len(cells)} seeds)"
        left.plot(ks, [tables.mean(row) for row in losses], color=colour, marker="o", label=shown)
        left.fill_between(ks, [min(row) for row in losses], [max(row) for row in losses], color=colour, alpha=0.2,
                          linewidth=0)
        left.axhline(dense, color=colour, linestyle=(0, (1, 2)), linewidth=1)
        for cut, style in CUT_STYLE.items():
            losses = [[tables.cut_loss(c, k, cut) for c in cells] for k in ks]
            if all(loss is not None for row in losses for loss in row):
                drawn.add(cut)
                right.plot(ks, [max(FLOOR, tables.mean(row) - dense) for row in losses], color=colour, **style)
    for axis in (left, right):
        pictures.powers_of_two(axis, ks)
        axis.set_xlabel("keys that every row keeps at inference")
    left.set_ylabel("validation loss, nats a token")
    left.set_title("Loss when cut to the top k (dotted: dense; band: the seeds' range)", loc="left")
    left.legend()
    right.set_yscale("log")
    right.set_ylim(0.7 * FLOOR, 100)  # the legend's place
    right.set_ylabel("nats a token (lowest: 10⁻⁴ or less)")
    right.axhline(0.01, color=pictures.GREY, linewidth=0.8)
    right.set_title("Cost of the cut: loss above the same model's dense loss", loc="left")
    line = pictures.Line2D
    handles = [line([], [], color="black", label=tables.CUT_NAMES[cut], **style) for cut, style in CUT_STYLE.items()
               if cut in drawn]
    handles.append(line([], [], color=pictures.GREY, linewidth=0.8, label="0.01"))
    right.legend(loc="upper right", ncols=2, handles=handles)
    return figure


def repeats(results, out):
    """Of what --seeds repeats: the loss above plain, dense and cut to the top K, against the mass outside."""
    if not tables.done(results, family="scratch", group="repeat"):
        return None
    found = tables.models(results, "scratch")
    plain = tables.plain_by_seed(results)
    few = max(len(cells) for _, cells in found) < 4  # of whose mean an interval would be wider than the picture
    figure, axes = pictures.panels(pictures.FULL, 4.6, 1, 1)
    axis = axes[0][0]
    axis.axhline(0, color=pictures.GREY, linewidth=0.8)
    for (label, cells), colour in zip(found, MODEL_COLOURS):
        cells = [c for c in cells if c["seed"] in plain]
        x = [tables.outside(c, K, "mass_nosink") for c in cells]
        for value, fill in ((lambda c: c["loss"]["dense"], colour), (lambda c: tables.cut_loss(c, K), "white")):
            above = [value(c) - plain[c["seed"]]["loss"]["dense"] for c in cells]
            style = {"color": colour, "marker": "*" if label == "plain" else "o", "markerfacecolor": fill,
                     "markersize": 6, "linestyle": "", "label": label if fill == colour else None}
            if few:
                axis.plot(x, above, **style)
            else:
                axis.errorbar(tables.mean(x), tables.mean(above), tables.half_interval(above), tables.half_interval(x),
                              elinewidth=1, **style)
    axis.axhline(tables.LOSS_BAR, color=pictures.GREY, linewidth=0.8, linestyle=":")
    axis.axvline(tables.NOSINK_BAR, color=pictures.GREY, linewidth=0.8, linestyle=":")
    logarithmic_x(axis)
    axis.set_xlabel(f"mass outside the top {K}, without position 0")
    axis.set_ylabel("loss above plain dense, nats a token")
    what = "Each seed" if few else "Means over the seeds, 95% intervals"
    axis.set_title(f"Filled: dense; open: cut to the top {K}. {what}; dotted: the bars", loc="left")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def reports_of(results, out, kind):
    """The reports of the plain run and of the chosen one that loses least, of the first seed, ready for dev/report's
    pictures."""
    found = []
    for label, cells in tables.models(results, "scratch"):
        folder = os.path.join(out, kind, cells[0]["name"])
        if os.path.exists(os.path.join(folder, "report.json")):
            above = tables.mean([c.get("above_plain") for c in cells]) if label != "plain" else -math.inf
            found.append((above, dict(report.read(folder), label=cells[0]["name"])))
    found.sort(key=lambda one: one[0])
    return [shown for _, shown in found[:2]] if len(found) > 1 else None


def mass_by_head(results, out):
    pair = reports_of(results, out, "reports")
    return pair and pictures.mass_heatmap(pair)


def maps(results, out):
    """On maps.txt, side by side: the head of the plain run whose rows hold least in their top k, and the same head of
    the chosen run; then the head of the chosen run that holds least. A report of a model with very many heads has maps
    of a few only: then each model's own."""
    pair = reports_of(results, out, "maps")
    if not pair:
        return None
    least = [next(m for m in r["maps"] if m["why"] and LEAST in m["why"]) for r in pair]
    same = lambda m, shown: (m["layer"], m["head"]) == (shown["layer"], shown["head"])
    rows = [[next((m for m in r["maps"] if same(m, shown)), own) for r, own in zip(pair, least)] for shown in least]
    tokens = [report.visible(t) for t in pair[0]["maps"][0]["tokens"]]
    label = max(pictures.width_of(t, MAP_FONT) for t in tokens) + 0.08
    left, top, bottom, gap = label + 0.3, 0.34, label + 0.2, 0.95
    side = (pictures.FULL - gap) / 2 - left
    width, height = pictures.FULL, top + side + bottom
    figure = pictures.plt.figure(figsize=(width, height * len(rows)))
    norm = pictures.PowerNorm(0.5, 0, 1)
    for row, both in enumerate(rows):
        for column, (m, r) in enumerate(zip(both, pair)):
            x, y = left + column * (side + left), (len(rows) - row) * height - top - side
            axis = figure.add_axes([x / width, y / height / len(rows), side / width, side / height / len(rows)])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            n = len(m["tokens"])
            image = pictures.np.full((n, n), pictures.np.nan)
            for i, values in enumerate(m["rows"]):
                image[i, :i + 1] = values
            axis.imshow(image, cmap="viridis", norm=norm, interpolation="nearest", aspect="auto")
            axis.set_xticks(range(n), tokens, rotation=90, fontsize=MAP_FONT)
            axis.set_yticks(range(n), tokens, fontsize=MAP_FONT, va="center_baseline")
            axis.tick_params(length=0, pad=2)
            why = f" (its {LEAST})" if m is least[column] else ""
            axis.set_title(f"{pictures.name_of(r)}: layer {m['layer']}, head {m['head']}{why}", loc="left")
            if column == 0:
                axis.set_ylabel("query")
            axis.set_xlabel("key")
    bar = figure.colorbar(pictures.ScalarMappable(norm, "viridis"), ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1],
                          cax=figure.add_axes([(width - gap + 0.15) / width, 0.3, 0.12 / width, 0.4]),
                          format=lambda value, _: f"{value:g}")
    bar.set_label("attention (square-root scale)", size=8)
    bar.outline.set_visible(False)
    return figure


def mass_in_training(results, out):
    """Top-8 mass of the training batches: lambda's column for both regularizers, and kl's schedules."""
    plain = tables.done(results, family="scratch", group="plain", seed=SEEDS[0])
    column = {reg: found for reg in REGS if (found := tables.done(results, family="scratch", group="column", reg=reg))}
    same = [c for c in tables.done(results, family="scratch", reg="kl", k=K, seed=SEEDS[0], **{"lambda": 0.3})
            if c["group"] in ("column", "schedule")]
    if not plain or not column:
        return None
    panels = len(column) + (len(same) > 1)
    figure, axes = pictures.panels(pictures.FULL, 3.6, 1, panels, sharey=True)
    draw_run = lambda axis, c, **style: axis.plot(*series(os.path.join(out, "runs", c["name"])), **style)
    for axis, reg in zip(axes[0], column):
        draw_run(axis, plain[0], color="black", linestyle="--", label="plain", linewidth=1.2)
        for c in sorted(column[reg], key=lambda c: c["lambda"]):
            draw_run(axis, c, color=shade(c["lambda"]), label=f"λ = {c['lambda']:g}", linewidth=1.2)
        axis.set_title(f"{reg}, k = {K}, λ rising over {RISE}", loc="left")
        axis.legend(loc="lower right")
    if len(same) > 1:
        last = axes[0][-1]
        draw_run(last, plain[0], color="black", linestyle="--", label="plain", linewidth=1.2)
        for c in sorted(same, key=tables.schedule_order):
            late = {"linestyle": ":"} if start_of(c) != "0" else {}
            draw_run(last, c, color=SCHEDULE_COLOURS[(c["rise"], c["layers"])], label=tables.schedule(c), linewidth=1.2,
                     **late)
        last.set_title(f"kl, k = {K}, λ = 0.3: schedules", loc="left")
        last.legend(loc="lower right")
    axes[0][0].set_ylabel(f"top-{K} mass of the training batch")
    for axis in axes[0]:
        axis.set_xlabel("update")
    return figure


FIGURES = {"pareto": pareto, "repeats": repeats, "cuts": cuts, "mass_by_head": mass_by_head,
           "mass_in_training": mass_in_training, "maps": maps}


def main():
    out = sys.argv[1]
    results = read_json(os.path.join(out, "results.json"), RESULTS)
    pictures.set_style()
    pictures.plt.rcParams["figure.dpi"] = 140  # a page on GitHub is about 900 pixels wide
    for name, figure in FIGURES.items():
        drawn = figure(results, out)
        if drawn is not None:
            write_file(os.path.join(out, name + ".png"), pictures.png(drawn))


if __name__ == "__main__":
    main()
