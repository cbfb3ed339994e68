#!/usr/bin/env python3
"""Makes a page of pictures out of a report of attention, or out of two: page.py DIR [DIR2].

    ./infer_gpt2cu ... --report DIR          writes DIR/report.json, and then runs this
    dev/report/page.py DIR                   DIR/page.html, and its pictures as DIR/page_*.png
    dev/report/page.py PLAIN CONDENSED --labels plain condensed -o compare.html

The page holds its pictures and needs nothing else. Exit status 1 and one sentence if a report cannot be read.
"""
import argparse
import base64
import html
import math
import os
import sys

from report import (Bad, cuts, find_matplotlib, grid, mass_at_k, mass_of_all, mean, read, readable, say, visible,
                    write_file)

NOT_MEASURED = "not measured"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d9; --back: #fff; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --soft: #a8a5a0; --line: #3d3d3d; --back: #181818; --paper: #ededed; }
  .picture img { filter: brightness(0.93); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 1180px; background: var(--back); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.05rem; margin: 0 0 0.2rem; }
p { margin: 0 0 0.6rem; }
sub { font-size: 0.72em; line-height: 0; }
.introduction { columns: 2 24rem; column-gap: 2.5rem; }
.introduction p { break-inside: avoid; }
i { font-family: Georgia, "DejaVu Serif", serif; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2.5rem;
          align-items: start; margin: 1.5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { text-align: left; padding: 0.22rem 0.9rem 0.22rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { font-weight: 400; color: var(--soft); white-space: nowrap; }
thead th { color: var(--ink); font-weight: 600; vertical-align: bottom; white-space: normal; }
.number td { white-space: nowrap; }
.number td, .number thead th + th { text-align: right; padding-right: 0; padding-left: 0.9rem;
                                    font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem 1.5rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; display: flex; flex-direction: column; }
figure.full { grid-column: 1 / -1; }
figcaption { font-size: 0.9rem; color: var(--soft); max-width: 46rem; margin-bottom: 0.5rem; }
figcaption h2 { color: var(--ink); }
.picture { display: block; margin-top: auto; overflow-x: auto; background: var(--paper); border-radius: 4px;
           cursor: zoom-in; }
.picture img { display: block; width: 100%; height: auto; }
.map .picture { max-width: 900px; }
.picture input { position: absolute; opacity: 0; }
.picture input:focus-visible + img { outline: 2px solid #0072B2; outline-offset: -2px; }
.picture input:checked + img { width: auto; max-width: none; }
.picture:has(:checked) { cursor: zoom-out; max-width: none; }
.missing { border: 1px dashed var(--line); border-radius: 4px; padding: 1rem; color: var(--soft); }
.tokens { grid-column: 1 / -1; font-size: 0.85rem; line-height: 1.9; margin: 0; }
.tokens span { border: 1px solid var(--line); border-radius: 3px; padding: 0 0.2rem; margin-right: 1px; }
details { margin-top: 0.5rem; }
summary { cursor: pointer; font-size: 0.9rem; color: var(--soft); }
@media screen and (max-width: 760px) {
  .pictures { grid-template-columns: minmax(0, 1fr); }
  .full .picture img { min-width: 820px; }
  .half .picture img { min-width: 430px; }
  .number td, .number th { white-space: normal; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --paper: #fff; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  .pictures { gap: 1.2rem 1rem; }
  .picture img { filter: none; }
  details { display: none; }
}
"""


# ---- figures as text ----

def escaped(text):
    """Any text of a report, as HTML."""
    return html.escape(readable(text))


def or_not(text):
    return NOT_MEASURED if text is None else escaped(text)


def figure_of(value, digits=4):
    return NOT_MEASURED if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def whole(value):
    return NOT_MEASURED if math.isnan(value) else f"{value:,.0f}"


def table(caption, head, rows, kind=""):
    """Cells are HTML already."""
    top = "<thead><tr>" + "".join(f'<th scope="col">{c}</th>' for c in head) + "</tr></thead>" if head else ""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>\n"
                   for row in rows)
    return (f'<div class="scroll"><table class="{kind}"><caption>{caption}</caption>{top}<tbody>\n{body}'
            "</tbody></table></div>\n")


def labels_of(reports):
    return [escaped(r["label"]) for r in reports]


def facts(reports):
    """The model, the machine and the text that the figures are about."""
    rows = [
        ("model", lambda r: or_not(r["model"]["name"])),
        ("layers × heads", lambda r: f"{r['model']['layers']} × {r['model']['heads']}"),
        ("channels", lambda r: whole(r["model"]["channels"])),
        ("parameters", lambda r: whole(r["model"]["parameters"])),
        ("vocabulary", lambda r: whole(r["model"]["vocabulary"])),
        ("device", lambda r: or_not(r["device"])),
        ("precision", lambda r: or_not(r["precision"])),
        ("text", lambda r: or_not(r["text"]["source"])),
        ("sequences", lambda r: whole(r["text"]["sequences"])),
        ("context", lambda r: whole(r["text"]["context"])),
        ("rows a head", lambda r: whole(r["text"]["rows"])),
        ("tokens of the loss", lambda r: whole(r["loss"]["tokens"])),
        ("commit", lambda r: or_not(r["commit"])),
        ("date", lambda r: or_not(r["date"])),
    ]
    head = ["", *labels_of(reports)] if len(reports) > 1 else None
    return table("What was measured", head, [[name, *map(value, reports)] for name, value in rows])


def overall(report, value):
    return mean([v for row in grid(report, value) for v in row])


def summary(reports):
    k = reports[0]["k"]
    every = lambda key: lambda r: figure_of(mass_of_all(r, key))
    rows = [("loss, dense (nats a token)", lambda r: figure_of(r["loss"]["dense"]["loss"])),
            ("perplexity, dense", lambda r: figure_of(r["loss"]["dense"]["perplexity"], 2))]

    def cut_at(kk):
        def value(r):
            found = [c["loss"] for c in cuts(r, "topk") if c["k"] == kk]
            if not found or math.isnan(found[0]):
                return NOT_MEASURED
            above = found[0] - r["loss"]["dense"]["loss"]
            return figure_of(found[0]) + ("" if math.isnan(above) else f" ({above:+.4f})".replace("-", "−"))
        return value

    rows += [(f"loss, cut to the top {kk}", cut_at(kk))
             for kk in sorted({c["k"] for r in reports for c in cuts(r, "topk")})]
    rows += [(f"mean top-{k} mass", every("mass")),
             (f"mean top-{k} mass, without position 0", every("mass_nosink"))]
    rows += [(f"mean keys that hold {s}%", lambda r, s=s: figure_of(overall(r, lambda h: h[f"keys{s}"]), 2))
             for s in (90, 95, 99)]
    rows += [("mean entropy (nats)", lambda r: figure_of(overall(r, lambda h: h["entropy"]), 3)),
             ("mean participation 1 / Σ <i>p</i>²", lambda r: figure_of(overall(r, lambda h: h["participation"]), 2)),
             ("largest τ of any row", lambda r: figure_of(max((h["tau"]["max"] for h in r["heads"]
                                                              if not math.isnan(h["tau"]["max"])), default=math.nan)))]
    head = ["", *labels_of(reports)] if len(reports) > 1 else None
    return table("Summary (in parentheses: above the dense loss)", head,
                 [[name, *map(value, reports)] for name, value in rows], "number")


def cuts_table(reports):
    """Every cut in figures, folded away."""
    names = {"topk": "top k", "recent": "the most recent", "first_recent": "position 0 and the most recent",
             "random": "random"}
    head, rows = ["keys kept", "k"], []
    for label in labels_of(reports):
        of = f", {label}" if len(reports) > 1 else ""
        head += [f"loss{of}", f"perplexity{of}", f"mass kept{of}"]
    found = [{(c["cut"], c["renormalized"], c["k"]): c for c in r["loss"]["cuts"]} for r in reports]
    for key in sorted(set().union(*found), key=lambda key: (list(names).index(key[0]), not key[1], key[2])):
        row = [names[key[0]] + ("" if key[1] else ", not renormalized"), str(key[2])]
        for of in found:
            c = of.get(key, {"loss": math.nan, "perplexity": math.nan, "kept": math.nan})
            row += [figure_of(c["loss"]), figure_of(c["perplexity"], 2), figure_of(c["kept"])]
        rows.append(row)
    return f"<details><summary>All cuts in figures (mass kept: of each row as the model computes it that is cut in all layers)</summary>{table('', head, rows, 'number')}</details>" if rows else ""


def probes_table(reports):
    """Every figure of induction and recall, for those are more than the picture shows."""
    rows = []
    for r in reports:
        for name in ("induction", "recall"):
            for way, shown in (("dense", "dense"), ("topk", f"cut to the top {r['k']}")):
                p = r["probes"][name][way] if r["probes"] else {}
                rows.append([f"{name}, {shown}" + (f", {escaped(r['label'])}" if len(reports) > 1 else ""),
                             *(figure_of(p[key]) if key in p else "" for key in ("accuracy", "loss", "score"))])
    return table("Probes in figures", ["", "accuracy", "loss", "score"], rows, "number")


# ---- the page ----

def introduction(reports):
    k, p_k, o_k = reports[0]["k"], "<i>p<sub>k</sub></i>", "<i>o<sub>k</sub></i>"
    tail, head = "μ<sub>tail</sub>", "μ<sub>head</sub>"
    text = (f"<p>For one head and one query, <i>p</i> is its attention over the keys that it may see, and the top-k "
            f"mass <i>M</i> is the sum of the <i>k</i> largest entries of <i>p</i>; τ = 1 − <i>M</i> is what the "
            f"others hold. Here <i>k</i> = {k}, unless an axis says otherwise. A row that is cut keeps those entries alone, "
            f"renormalized: {p_k}, with the output {o_k} in place of <i>o</i>.</p>"
            f"<p>For each row, exactly in real arithmetic: TV(<i>p</i>, {p_k}) = τ, and "
            f"‖<i>o</i> − {o_k}‖ = τ ‖{tail} − {head}‖, where μ is the mean value of each part, weighted by "
            f"<i>p</i>. Both hold for one row of one head in one layer. They do not compose to a bound on the logits; "
            f"what cutting every row of every layer does to the loss is measured by itself.</p>"
            f"<p>Mass, τ and errors are over the rows with more keys than <i>k</i>, since a shorter row loses "
            f"nothing; keys, entropy and participation are over all rows. “Without position 0” is, of the attention "
            f"that goes elsewhere, the share within the top <i>k</i>. A mean over heads weighs each head the same.</p>")
    if len(reports) > 1:
        first, second = labels_of(reports)
        text += f"<p>Where both models share a picture, {first} is dashed and {second} is solid.</p>"
        if any(reports[0]["text"][key] != reports[1]["text"][key] for key in ("source", "sequences", "context")):
            text += "<p>The two models were not measured on the same text: see the table.</p>"
    return text


def paired_maps(reports):
    """The heads that some report chose, in the order of the reports: (why, the head's map or None for each report). A
    report also holds maps of heads that it did not choose, with an empty why, for another one that did."""
    by_head = [{(m["layer"], m["head"]): m for m in r["maps"]} for r in reports]
    chosen = {}
    for report, maps in zip(reports, by_head):
        for head, m in maps.items():
            if m["why"] != "":
                of = f" ({escaped(report['label'])})" if len(reports) > 1 else ""
                chosen.setdefault(head, []).append(or_not(m["why"]) + of)
    return [("; ".join(why), [maps.get(head) for maps in by_head]) for head, why in chosen.items()]


def tokens_of(maps):
    """The text of the maps, token by token, to be read and copied."""
    texts = []
    for m in maps:
        if m["tokens"] not in texts:
            texts.append(m["tokens"])
    return "".join('<p class="tokens">Tokens: ' + " ".join(f"<span>{html.escape(visible(t))}</span>" for t in tokens) +
                   "</p>\n" for tokens in texts)


def grey_if(values):
    return "; grey was not measured" if any(map(math.isnan, values)) else ""


class Page:
    """Collects figures, and writes each picture beside the page as well."""

    def __init__(self, path):
        self.stem = os.path.splitext(path)[0]
        self.parts = []

    def add(self, name, title, how, figure, png, kind="full", after=""):
        caption = f"<figcaption><h2>{title}</h2>{how}</figcaption>"
        if figure is None:
            content = f'<div class="missing">{NOT_MEASURED}</div>'
        else:
            picture = png(figure)
            write_file(f"{self.stem}_{name}.png", picture)
            content = (f'<label class="picture"><input type="checkbox" aria-label="full size">'
                       f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></label>')
        self.parts.append(f'<figure class="{kind}" id="{name}">{caption}{content}{after}</figure>\n')


def make_page(reports, path):
    import pictures
    pictures.set_style()
    two, k = len(reports) > 1, reports[0]["k"]
    page = Page(path)

    def add(name, title, how, kind, after=""):
        page.add(name, title, how, getattr(pictures, name)(reports), pictures.png, kind, after)

    curves = "full" if two else "half"
    add("mass_heatmap", "Top-k mass by layer and head",
        f"Each cell is one head: the mean mass of its {k} largest keys, of all attention "
        f"{'above' if two else 'on the left'} and of the attention that does not go to position 0 "
        f"{'below' if two else 'on the right'}"
        f"{grey_if(v for r in reports for key in ('mass', 'mass_nosink') for row in mass_at_k(r, key) for v in row)}.",
        "full")
    add("mass_by_k", "Top-k mass against k",
        "How much of a row its k largest keys hold, on average over the heads of a layer; black is the mean "
        "of the layers.", curves)
    add("mass_by_position", "Top-k mass by position",
        f"Mean mass of the {k} largest keys by the query's position, over the heads of a layer; black is the "
        f"mean of the layers.", curves)
    add("loss_under_cuts", "Validation loss under cuts",
        "Every row of every head and layer keeps k keys, chosen as the legend says, and is renormalized unless that "
        "says otherwise; the dashed line is the loss when nothing is cut.", "full", cuts_table(reports))
    dots = "" if two else ", with a dot for each head"
    quantiles = (f"A line is the mean of the quantiles of a layer's heads, “largest” the largest of all their "
                 f"rows{dots}; less than {pictures.LEAST_TEXT} is drawn as that.")
    add("tau_by_layer", "τ by layer", f"What is outside the top {k}. {quantiles}", "half")
    add("error_by_layer", "Relative error of the output by layer",
        f"‖<i>o</i> − <i>o<sub>k</sub></i>‖ / ‖<i>o</i>‖ when a row is cut to its top {k}. {quantiles}", "half")
    add("keys_by_layer", "Keys that hold 90, 95 and 99% of the mass",
        f"The number of largest keys that are needed, mean over the rows and heads of a layer{dots}.", "half")
    add("where_by_layer", "Where attention goes",
        f"Mean attention to position 0, to the query itself and to the token before it, from the third "
        f"query on{dots}.", "half")
    pairs = paired_maps(reports)
    for i, (why, maps) in enumerate(pairs):
        wide = pictures.maps_wide(maps)
        page.add(f"map_{i}", f"Attention map: {why}",
                 "A row is a query, a column a key; ␣ is a space, ⏎ the end of a line"
                 f"{grey_if(v for m in maps if m for row in m['rows'] for v in row)}.",
                 pictures.attention_maps(reports, maps), pictures.png,
                 "full map" if wide else "full" if two else "half")
    if pairs:
        page.parts.append(tokens_of(m for _, maps in pairs for m in maps if m))
    else:
        page.add("map", "Attention maps", "", None, None)
    if any(r["probes"] for r in reports):
        add("probes", "Probes",
            f"Accuracy with dense attention and with every row cut to its top {k}: a repeated sequence (induction), a "
            f"recalled pair (recall), and a needle at each depth of the context.", "full",
            probes_table(reports))

    names = [r["model"]["name"] or "a model without a name" for r in reports]
    title = "Attention of " + " and ".join(escaped(name) for name in names)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
            f'<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n'
            f'<div class="introduction">{introduction(reports)}</div>\n'
            f'<div class="tables">{facts(reports)}{summary(reports)}</div>\n'
            f'<div class="pictures">\n{"".join(page.parts)}</div>\n</body>\n</html>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="a folder with a report.json; two are compared")
    parser.add_argument("-o", dest="page", metavar="PAGE.html",
                        help="the page (DIR/page.html, of two DIR/compare.html); pictures lie beside it")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what the models are called in pictures and tables")
    args = parser.parse_args()
    try:
        n = len(args.folders)
        if n > 2:
            raise Bad(f"{n} folders were given: one report, or two to compare, make a page")
        if args.labels and len(args.labels) != n:
            raise Bad(f"--labels has {len(args.labels)} names for {n} of DIR: give each its own")
        reports = [read(folder) for folder in args.folders]
        labels = args.labels or [r["model"]["name"] or "no name" for r in reports]
        if n == 2:
            for key in ("k", "ks"):
                if reports[0][key] != reports[1][key]:
                    raise Bad(f"{reports[1]['path']}: {key} is {reports[1][key]}, but in {reports[0]['path']} it is "
                              f"{reports[0][key]}: measure both with the same -k")
            if labels[0] == labels[1]:
                labels = [f"{label} ({which})" for label, which in zip(labels, ("first", "second"))]
        for r, label in zip(reports, labels):
            r["label"] = label
        path = args.page or os.path.join(args.folders[0], "page.html" if n == 1 else "compare.html")
        if not path.endswith(".html"):
            raise Bad(f"-o {path}: the page is HTML, so name it .html")
        find_matplotlib(__file__)
        page = make_page(reports, path)
        write_file(path, page)
        say(path)
    except Bad as error:
        sys.exit(f"page.py: {error}")


if __name__ == "__main__":
    main()
