"""The pictures of the report: each function takes one report, or two to set side by side, and returns a figure, or None
where nothing was measured. A report is what report.read gives, with a "label" added.

Colours are Okabe and Ito's, which people with any colour vision tell apart; whatever is a share of attention or a
sequence of layers is in viridis, which is uniform to the eye and falls to the same greys in print. Of two models the
first is dashed, the second solid, and axes and colour scales are shared.
"""
import io
import itertools
import logging
import math

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a font cache that is being built is not the reader's matter
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize, PowerNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from report import cuts, grid, mass_at_k, readable, visible

FULL, HALF = 11.2, 5.5  # inches; the page shows an inch as 100 pixels
DPI = 200
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
GREY, MISSING = "#6b6b6b", "#c9c9c9"
MODELS = [(BLUE, "--"), (VERMILION, "-")]
VIRIDIS = matplotlib.colormaps["viridis"].with_extremes(bad=MISSING)
LAYERS = ListedColormap(VIRIDIS(np.linspace(0, 0.93, 256)))  # its last yellows are too faint for a line on white
LEAST, LEAST_TEXT = 1e-8, "10⁻⁸"  # of tau in pictures: what is smaller is drawn as this


def set_style():
    matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
    plt.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
        "legend.handlelength": 2.4, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
        "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": "black", "ytick.labelcolor": "black",
        "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "axes.axisbelow": True,
        "lines.linewidth": 1.6, "lines.markersize": 4, "savefig.facecolor": "white", "figure.dpi": DPI,
        "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08})


def png(figure):
    """The bytes of the picture; the same for the same figure, wherever it is drawn with the same matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


# ---- parts ----

def the_font():
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def width_of(text, points):
    """In inches."""
    font = the_font()
    font.set_size(points, 72)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 72


def shown(text, most=40):
    """Foreign text, made visible before, for a picture: what the font lacks becomes its code, and $ does not begin
    mathematics."""
    font = the_font()
    text = "".join(c if font.get_char_index(ord(c)) else f"\\u{{{ord(c):x}}}" for c in text)
    if len(text) > most:
        text = text[:most - 1] + "…"
    return text.replace("$", r"\$")


def name_of(report, most=32):
    return shown(readable(report["label"]), most)


def say_empty(axis):
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=GREY)


def panels(width, height, rows=1, columns=1, **options):
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    return figure, axes


def anything_in(arrays):
    return any(np.isfinite(a).any() for a in arrays)


def mean_of(array, axis):
    """The mean of what is not NaN, and NaN, without numpy's warning, where all is."""
    known = np.isfinite(array)
    n = known.sum(axis)
    return np.where(n > 0, np.where(known, array, 0).sum(axis) / np.maximum(n, 1), np.nan)


def largest_of(array, axis):
    top = np.where(np.isfinite(array), array, -np.inf).max(axis)
    return np.where(np.isfinite(top), top, np.nan)


def powers_of_two(axis, ks):
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()


def plain_numbers(axis):
    """Of a logarithmic x or y axis: 1, 2 and 5 times powers of ten, and 0.2, not 2 x 10^-1."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")


def layer_ticks(axis, n, most=12):
    """Whole numbers only: every layer, or every second, fourth ... where they are many."""
    step = 1
    while n > most * step:
        step *= 2
    axis.set_ticks(range(0, n, step))


def dot(x):
    """A line through one point would not be seen."""
    return "o" if len(x) == 1 else None


def legend_above(axis, handles=None, columns=4):
    handles = handles or axis.get_legend_handles_labels()[0]
    axis.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=columns, borderaxespad=0.2,
                columnspacing=1.4)


def model_handles(reports):
    """What tells two models apart where colour means something else."""
    return [Line2D([], [], color=GREY, linestyle=MODELS[i][1], label=name_of(r, 16))
            for i, r in enumerate(reports)] if len(reports) > 1 else []


# ---- pictures ----

def mass_heatmap(reports):
    """Layer by head: the top-k mass at k, with and without position 0."""
    kinds = [("mass", ""), ("mass_nosink", ", without position 0")]
    images = {(i, key): np.array(mass_at_k(r, key)) for i, r in enumerate(reports) for key, _ in kinds}
    if not anything_in(images.values()):
        return None
    most = max(r["model"]["layers"] for r in reports)
    height = max(2.8, 0.9 + min(most, 48) * 0.24 if most <= 16 else 0.9 + most * 0.13)
    two = len(reports) > 1
    figure, axes = panels(FULL, height * len(reports), len(reports), 2)
    for (i, r), (j, (key, title)) in itertools.product(enumerate(reports), enumerate(kinds)):
        axis, image = axes[j, i] if two else axes[0, j], images[i, key]
        axis.imshow(image, cmap=VIRIDIS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title((name_of(r) + ": " if two else "") + f"top-{r['k']} mass{title}", loc="left")
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        layer_ticks(axis.xaxis, image.shape[1], 16)
        layer_ticks(axis.yaxis, image.shape[0], 16)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        if image.shape[0] <= 24 and image.shape[1] <= 16:
            axis.hlines(np.arange(0.5, image.shape[0] - 1), -0.5, image.shape[1] - 0.5, color="white", linewidth=1)
            axis.vlines(np.arange(0.5, image.shape[1] - 1), -0.5, image.shape[0] - 0.5, color="white", linewidth=1)
            for (y, x), value in np.ndenumerate(image):
                axis.text(x, y, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value < 0.55 else "black")
    figure.colorbar(ScalarMappable(Normalize(0, 1), VIRIDIS), ax=axes, label="share of the attention", aspect=30,
                    fraction=0.03, pad=0.01).outline.set_visible(False)
    return figure


def curves_by_layer(reports, curves, label, scale):
    """A panel a model with one curve a layer and their mean, and of two models a third panel with both means.
    curves: for each report its x and [L, len(x)]; scale(axis) sets the x axis."""
    if not anything_in(y for _, y in curves):
        return None
    two = len(reports) > 1
    figure, axes = panels(FULL if two else HALF, 3.5, 1, 3 if two else 1, sharex=True, sharey=True)
    axes = axes[0]
    most = max(len(y) for _, y in curves)
    for axis, r, (x, y) in zip(axes, reports, curves):
        for layer, row in enumerate(y):
            axis.plot(x, row, color=LAYERS(layer / max(1, most - 1)), linewidth=1, marker=dot(x))
        axis.plot(x, mean_of(y, 0), color="black", linewidth=2.4, marker=dot(x), label="mean of the layers")
        axis.set_xlabel(label)
        axis.set_title(name_of(r) if two else "", loc="left")
        scale(axis)
        if not np.isfinite(y).any():
            say_empty(axis)
    if two:
        for i, (x, y) in enumerate(curves):
            axes[2].plot(x, mean_of(y, 0), color=MODELS[i][0], linestyle=MODELS[i][1], linewidth=2,
                         marker=dot(x), label=name_of(reports[i], 24))
        axes[2].set_title("means of the layers", loc="left")
        axes[2].set_xlabel(label)
        axes[2].legend(loc="lower right")
    axes[0].legend(loc="best")
    axes[0].set_ylabel("top-k mass")
    least = min(np.nanmin(y) for _, y in curves if np.isfinite(y).any())
    axes[0].set_ylim(math.floor(max(0, least - 1e-9) * 10) / 10, 1.005)
    if most > 1:
        bar = figure.colorbar(ScalarMappable(BoundaryNorm(np.arange(-0.5, most), 256), LAYERS),
                              ax=axes[1 if two else 0], label="layer", aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        layer_ticks(bar.ax.yaxis, most)
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
    return figure


def mass_by_k(reports):
    curves = [(r["ks"], mean_of(np.array(grid(r, lambda h: h["mass"])), 1)) for r in reports]
    return curves_by_layer(reports, curves, "k, the keys that are counted",
                           lambda axis: powers_of_two(axis, reports[0]["ks"]))


def mass_by_position(reports):
    curves = [(np.array(r["mass_by_position"]["begin"]),
               np.array(r["mass_by_position"]["mass"]).reshape(r["model"]["layers"], -1)) for r in reports]
    return curves_by_layer(reports, curves, "position of the query (where its bucket begins)",
                           lambda axis: axis.xaxis.set_major_locator(MaxNLocator(integer=True)))


def loss_under_cuts(reports):
    """A panel a model with every kind of cut, and one with the top k alone, in which small differences show."""
    known = [v for r in reports for v in [r["loss"]["dense"]["loss"]] + [c["loss"] for c in r["loss"]["cuts"]]]
    if not anything_in([np.array(known)]):
        return None
    kinds = [("topk", "top k", BLUE, "o"), ("first_recent", "position 0 and the most recent", GREEN, "s"),
             ("recent", "the most recent", ORANGE, "^"), ("random", "random", PURPLE, "D")]
    ks = sorted({c["k"] for r in reports for c in r["loss"]["cuts"]}) or [1]
    columns = len(reports) + 1
    figure, axes = panels(FULL, 3.9, 1, columns, sharex=True)
    axes = axes[0]

    def draw(axis, r, cut, renormalized, **look):
        points = cuts(r, cut, renormalized)
        axis.plot([c["k"] for c in points], [c["loss"] for c in points], **look)
        return bool(points)

    handles, raw = {}, None
    for axis, r in zip(axes, reports):
        for (cut, name, colour, marker), renormalized in itertools.product(kinds, (True, False)):
            look = dict(color=colour, marker=marker, linestyle="-" if renormalized else ":",
                        markerfacecolor=colour if renormalized else "white",
                        label=name if renormalized else name + ", not renormalized")
            if draw(axis, r, cut, renormalized, **look):
                handles[name] = Line2D([], [], color=colour, marker=marker, label=name)
                if not renormalized:  # in the legend once for all kinds
                    raw = Line2D([], [], **{**look, "color": GREY, "label": "not renormalized"})
        axis.axhline(r["loss"]["dense"]["loss"], color="black", linestyle="--", linewidth=1.2)
        axis.set_title(name_of(r) if len(reports) > 1 else "every kind of cut", loc="left")
        if not any(np.isfinite(line.get_ydata()).any() for line in axis.lines):
            say_empty(axis)
    dense = Line2D([], [], color="black", linestyle="--", linewidth=1.2, label="dense (nothing cut)")
    axes[0].legend(handles=[*handles.values(), *([raw] if raw else []), dense], loc="upper right")
    for axis in axes[1:-1]:
        axis.sharey(axes[0])
        axis.tick_params(labelleft=False)
    for i, r in enumerate(reports):
        colour, dash = MODELS[i] if len(reports) > 1 else (BLUE, "-")
        draw(axes[-1], r, "topk", True, color=colour, linestyle=dash, marker="o",
             label=f"{name_of(r, 24)}, top k" if len(reports) > 1 else "top k")
        axes[-1].axhline(r["loss"]["dense"]["loss"], color=colour if len(reports) > 1 else "black", linestyle=dash
                         if len(reports) > 1 else "--", linewidth=1,
                         label=f"{name_of(r, 24)}, dense" if len(reports) > 1 else None)
    axes[-1].set_title("top k alone, on a scale of its own", loc="left")
    if len(reports) > 1:
        axes[-1].legend(loc="upper right")
    for axis in axes:
        powers_of_two(axis, ks)
        axis.set_xlabel("k, the keys that are kept")
    axes[0].set_ylabel("validation loss (nats a token)")
    return figure


def lines_by_layer(reports, series, label, log=False):
    """One line for each of series = (name, colour, marker, value of a head, what makes a layer's value of its heads),
    and of a single model a faint dot for each head."""
    values = [[np.array(grid(r, value)) for _, _, _, value, _ in series] for r in reports]
    if not anything_in(itertools.chain(*values)):
        return None
    figure, axes = panels(HALF, 3.6)
    axis = axes[0, 0]
    lowest = LEAST if log else -np.inf
    for i, r in enumerate(reports):
        for (name, colour, marker, _, reduce), v in zip(series, values[i]):
            layers = np.arange(len(v))
            if len(reports) == 1:
                axis.plot(np.repeat(layers, v.shape[1]), np.maximum(v, lowest).ravel(), ".", color=colour, alpha=0.35,
                          markersize=5 if len(v) <= 24 else 3.5, markeredgewidth=0)
            axis.plot(layers, np.maximum(reduce(v, 1), lowest), color=colour, marker=marker,
                      markersize=4.5 if len(v) <= 24 else 2.5,
                      linestyle=MODELS[i][1] if len(reports) > 1 else "-", label=name)
    if log:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0.8 * LEAST), high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(0, 1.05 * axis.dataLim.y1)
    layer_ticks(axis.xaxis, max(r["model"]["layers"] for r in reports))
    axis.set_xlabel("layer")
    axis.set_ylabel(label)
    handles = [Line2D([], [], color=c, marker=m, label=name) for name, c, m, _, _ in series]
    legend_above(axis, handles + model_handles(reports), 4 if len(reports) == 1 else 3)
    return figure


def quantile_series(key):
    looks = [("q50", "median", SKY, "o"), ("q90", "90%", BLUE, "s"), ("q99", "99%", ORANGE, "^"),
             ("max", "largest", VERMILION, "D")]
    return [(name, colour, marker, lambda h, q=q: h[key][q], largest_of if q == "max" else mean_of)
            for q, name, colour, marker in looks]


def tau_by_layer(reports):
    return lines_by_layer(reports, quantile_series("tau"), "τ = 1 − top-k mass", log=True)


def error_by_layer(reports):
    return lines_by_layer(reports, quantile_series("error_relative"), "‖o − oₖ‖ / ‖o‖", log=True)


def keys_by_layer(reports):
    series = [(f"{share}%", colour, marker, lambda h, s=share: h[f"keys{s}"], mean_of)
              for share, colour, marker in ((90, SKY, "o"), (95, BLUE, "s"), (99, VERMILION, "D"))]
    return lines_by_layer(reports, series, "largest keys that hold this share")


def where_by_layer(reports):
    series = [(name, colour, marker, lambda h, k=key: h[k], mean_of)
              for key, name, colour, marker in (("first", "position 0", BLUE, "o"), ("self", "itself", ORANGE, "s"),
                                                ("previous", "the token before", GREEN, "^"))]
    return lines_by_layer(reports, series, "share of the attention")


def maps_wide(maps):
    """Whether the maps have so many tokens that each needs the page's width for its labels."""
    return max(len(m["tokens"]) for m in maps if m) > 40


def attention_maps(reports, maps):
    """The same head of one model or two, side by side, or one below the other if the tokens are many. A map may be
    None: the report has none of this head. The axes are placed by hand: constrained layout takes the labels of
    a square that does not fill its place for space that is free, and cuts them off."""
    wide = maps_wide(maps)
    columns = 1 if wide else len(maps)
    rows = len(maps) // columns
    width = 9 if wide else FULL if columns > 1 else HALF
    most = max(len(m["tokens"]) for m in maps if m)
    size = min(8, 0.9 * 72 * (width / columns - 1.3) / most)
    names = [[shown(visible(token), 14) for token in m["tokens"]] if m else [] for m in maps]
    label = max(width_of(name, size) for name in sum(names, [])) + 0.08
    left, top, bottom = label + 0.26, 0.34, label + 0.26
    side = width / columns - left - 0.12
    height = top + side + bottom
    figure = plt.figure(figsize=(width, height * rows))
    for place, (m, r) in enumerate(zip(maps, reports)):
        row, column = divmod(place, columns)
        x, y = left + column * width / columns, (rows - row) * height - top - side

        def axes_at(dx, dy, w, h):
            return figure.add_axes([(x + dx) / width, (y + dy) / (height * rows), w / width, h / (height * rows)])

        axis = axes_at(0, 0, side, side)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        if m is None:
            axis.set_axis_off()
            axis.set_title(f"{name_of(r)}: no such map", loc="left")
            continue
        n = len(m["tokens"])
        image = np.full((n, n), np.nan)
        for i, values in enumerate(m["rows"]):
            image[i, :i + 1] = values
        unknown = np.where(np.isnan(image) & np.tri(n, dtype=bool), 1.0, np.nan)
        axis.imshow(unknown, cmap=ListedColormap([MISSING]), interpolation="nearest", aspect="auto")
        axis.imshow(image, cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="auto")
        axis.set_xticks(range(n), names[place], rotation=90, fontsize=size)
        axis.set_yticks(range(n), names[place], fontsize=size, va="center_baseline")
        axis.tick_params(length=0, pad=2)
        axis.set_title((f"{name_of(r)}: " if len(maps) > 1 else "") + f"layer {m['layer']}, head {m['head']}",
                       loc="left")
        figure.text((x - left + 0.15) / width, (y + side / 2) / (height * rows), "query", rotation=90, ha="center",
                    va="center")
        figure.text((x + side / 2) / width, (y - bottom + 0.14) / (height * rows), "key", ha="center", va="center")
        if n > 1:  # then the corner above the diagonal is free
            bar = figure.colorbar(ScalarMappable(PowerNorm(0.5, 0, 1), "viridis"),
                                  cax=axes_at(0.8 * side, 0.53 * side, 0.11, 0.44 * side),
                                  ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], format=lambda value, _: f"{value:g}")
            bar.set_label("attention (square-root scale)", size=8)
            bar.outline.set_visible(False)
    return figure


def probes(reports):
    """Accuracy with dense attention and with its top k: induction and recall as bars, the needle by depth."""
    have = [r["probes"] for r in reports if r["probes"]]
    if not have:
        return None
    bars = [(f"{name}\n{name_of(r, 16)}" if len(reports) > 1 else name,
             [r["probes"][name][way]["accuracy"] for way in ("dense", "topk")])
            for name in ("induction", "recall") for r in reports if r["probes"]]
    needles = [p["needle"][way] for p in have for way in ("dense", "topk")]
    if not anything_in([np.array(v) for _, v in bars] + [np.array(v) for v in needles]):
        return None
    figure, axes = panels(FULL, 3.5, 1, 2, sharey=True)
    left, right = axes[0]
    ways = [("dense", BLUE, "o"), (f"cut to the top {reports[0]['k']}", VERMILION, "s")]
    for j, (name, colour, _) in enumerate(ways):
        heights = [v[j] for _, v in bars]
        places = np.arange(len(bars)) + (j - 0.5) * 0.36
        left.bar(places, heights, 0.34, color=colour, label=name)
        for x, y in zip(places, heights):
            left.text(x, 0.01 if np.isnan(y) else y + 0.01, "not\nmeasured" if np.isnan(y) else f"{y:.2f}", ha="center",
                      va="bottom", fontsize=7.5)
    left.set_xticks(range(len(bars)), [name for name, _ in bars])
    left.tick_params(axis="x", length=0)
    left.grid(False, axis="x")
    left.set_ylabel("accuracy")
    left.set_ylim(0, 1.09)
    left.set_yticks(np.linspace(0, 1, 6))
    legend_above(left)
    for i, r in enumerate(reports):
        needle = r["probes"] and r["probes"]["needle"]
        if needle:
            for (name, colour, marker), key in zip(ways, ("dense", "topk")):
                right.plot(needle["depths"], needle[key], color=colour, marker=marker,
                           linestyle=MODELS[i][1] if len(reports) > 1 else "-")
    right.set_xlabel("needle: its depth in the context (0 is the beginning)")
    right.set_xlim(-0.03, 1.03)
    legend_above(right, [Line2D([], [], color=c, marker=m, label=n) for n, c, m in ways] + model_handles(reports), 2)
    return figure
