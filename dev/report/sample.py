#!/usr/bin/env python3
"""Writes a made-up report.json, for the tests of the page: sample.py DIR [flags]. Its name says that it is made up.

Every figure is computed from rows p = softmax of random scores, so that the figures agree with one another (mass with
tau, entropy with keys) as those of a model do; no model is behind them.
"""
import argparse
import json
import math
import os
import random

KS = [1, 2, 4, 8, 16, 32, 64]
WORDS = ["The", " king", ",", " who", " had", " slept", " little", " that", " night", ",", " said", ":", "\n", "\n",
         "\"",
         "Bring", " me", " the", " letter", ".\"", " And", " the", " messenger", " went", " down", " to", " the",
         " harbour", ",", " where", " the", " ships"]
WEIRD = ["<script>alert('x')</script>", "&amp;", "\"><img src=x onerror=alert(1)>", "\x00", "\x1b[31m", "\ufffd", "$x$",
         "$", "\\$", "\u200b", "\u202e", "\u4e2d\u6587", "\U0001f600", "\u0301", "", "  ", "\r\n", "\t", "\ud800",
         "a" * 200, "\u00a0", "</td>", "_{", "%s", "\u05e9", "\ue000", "\n", "'", "\\n", "]]>", "<!--", "-->"]


def softmax(scores):
    top = max(scores)
    e = [math.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def row(rng, n, sharpness, sink, previous):
    scores = [sharpness * rng.gauss(0, 1) for _ in range(n)]
    scores[0] += sink
    if n > 1:
        scores[-2] += previous
    return softmax(scores)


def average(values):
    return sum(values) / len(values) if values else None


def quantiles(values):
    v = sorted(values)
    at = lambda q: v[min(len(v) - 1, int(q * len(v)))] if v else None
    return {"mean": average(v), "q50": at(0.5), "q90": at(0.9), "q99": at(0.99), "max": v[-1] if v else None}


def keys_for(p, share):
    held = 0
    for i, x in enumerate(sorted(p, reverse=True)):
        held += x
        if held >= share:
            return i + 1
    return len(p)


def head(rng, layer, index, shape, context, n_rows, k, by_position, width):
    rows = [row(rng, rng.randrange(1, context + 1), *shape) for _ in range(n_rows)]
    entry = {"layer": layer, "head": index, "mass": [], "mass_nosink": []}

    def masses(kk):
        long = [p for p in rows if len(p) > kk]
        return (average([sum(sorted(p)[-kk:]) for p in long]),
                average([(sum(sorted(p)[-kk:]) - (p[0] if p[0] >= sorted(p)[-kk] else 0)) / (1 - p[0]) for p in long]))

    for kk in KS:
        for key, mass in zip(("mass", "mass_nosink"), masses(kk)):
            entry[key].append(mass)
    entry["mass_k"], entry["mass_nosink_k"] = masses(k)
    for share in (90, 95, 99):
        entry[f"keys{share}"] = average([keys_for(p, share / 100) for p in rows])
    entry["entropy"] = average([-sum(x * math.log(x) for x in p) for p in rows])
    entry["participation"] = average([1 / sum(x * x for x in p) for p in rows])
    later = [p for p in rows if len(p) > 2]
    entry["first"] = average([p[0] for p in later])
    entry["self"] = average([p[-1] for p in later])
    entry["previous"] = average([p[-2] for p in later])
    long = [p for p in rows if len(p) > k]
    tau = [sum(sorted(p)[:-k]) for p in long]
    for p, t in zip(long, tau):
        by_position[(len(p) - 1) // width].append(1 - t)
    relative = [t * rng.uniform(0.5, 1.5) for t in tau]
    entry["tau"], entry["error_relative"] = quantiles(tau), quantiles(relative)
    entry["error"] = quantiles([e * rng.uniform(1, 3) for e in relative])
    return entry


def made_up(args):
    rng = random.Random(args.seed)
    context, width = args.context, max(1, args.context // 16)
    more = 1.6 if args.condensed else 1
    shapes = [[(more * rng.uniform(1, 3.2) * (0.5 if l == 0 else 1), rng.uniform(0, 5) if l else 0,
                rng.choice([0, 0, 0, 4])) for _ in range(args.heads)] for l in range(args.layers)]
    heads, by_position = [], []
    for l in range(args.layers):
        buckets = [[] for _ in range((context + width - 1) // width)]
        heads += [head(rng, l, h, shapes[l][h], context, args.rows, args.k, buckets, width) for h in range(args.heads)]
        by_position.append([average(b) for b in buckets])
    dense = 3.3 + 0.01 * args.condensed
    cuts = []
    for cut, worse in (("topk", 0.4 / more ** 3), ("random", 3), ("recent", 1.3), ("first_recent", 0.7)):
        for k in KS:
            loss = dense + worse * 2 / k ** 0.7
            cuts.append({"cut": cut, "renormalized": True, "k": k, "loss": loss, "perplexity": math.exp(loss),
                         "kept": max(0, 1 - worse / (k + 2))})
    tokens = {"weird": WEIRD, "words": WORDS, "long": (WORDS * 2)[:64],
              "bytes": list("First Citizen:\nBefore we proceed any further, hear me speak.\n\n")}[args.tokens]
    maps = []
    for i, why in enumerate(["most condensed", "least condensed", "largest share on position 0",
                             "most on the previous token"]):
        l, h = rng.randrange(args.layers), rng.randrange(args.heads)
        shape = [(5, 0, 0), (0.6, 0, 0), (2, 5, 0), (1.5, 0, 6)][i]
        maps.append({"layer": l, "head": h, "why": why, "tokens": tokens,
                     "rows": [row(rng, n + 1, *shape) for n in range(len(tokens))]})
    report = {
        "version": 1,
        "model": {"name": f"MADE UP, seed {args.seed}{', condensed' * args.condensed}", "layers": args.layers,
                  "heads": args.heads, "channels": 64 * args.heads,
                  "vocabulary": 256 if args.tokens == "bytes" else 50257,
                  "parameters": 12 * args.layers * (64 * args.heads) ** 2},
        "device": "made up", "precision": "fp32", "commit": "made up", "date": "2000-01-01",
        "text": {"source": "made up", "sequences": 4, "context": context, "rows": 4 * context},
        "ks": KS, "k": args.k, "heads": heads,
        "mass_by_position": {"begin": list(range(0, context, width)), "mass": by_position},
        "loss": {"tokens": 4 * context, "dense": {"loss": dense, "perplexity": math.exp(dense)}, "cuts": cuts},
        "maps": maps}
    if not args.no_probes:
        lost = 0.05 if args.condensed else 0.2
        depths = [i / 10 for i in range(11)]
        needle = [0.9 - (0.3 + lost) * math.sin(math.pi * d) for d in depths]
        report["probes"] = {
            "induction": {"dense": {"accuracy": 0.8, "loss": 0.9, "score": 0.6},
                          "topk": {"accuracy": 0.8 - lost, "loss": 0.9 + lost, "score": 0.6}},
            "recall": {"dense": {"accuracy": 0.6, "loss": 1.4}, "topk": {"accuracy": 0.6 - lost, "loss": 1.4 + lost}},
            "needle": {"depths": depths, "dense": needle, "topk": [a - lost for a in needle]}}
    return report


def without_numbers(value, key=None):
    """The same with null for every number that may be null (the places of heads, and which k, may not)."""
    if isinstance(value, dict):
        return {k: v if k in ("layer", "layers", "head", "k", "ks", "begin", "version", "renormalized") or
                (k == "heads" and not isinstance(v, list)) else without_numbers(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_numbers(v, key) for v in value]
    return value if isinstance(value, str) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, default=40, help="rows that a head's figures are computed from")
    parser.add_argument("-k", type=int, default=8)
    parser.add_argument("--condensed", action="store_true", help="sharper rows, smaller losses under cuts")
    parser.add_argument("--tokens", choices=["words", "long", "bytes", "weird"], default="words")
    parser.add_argument("--no-probes", action="store_true")
    parser.add_argument("--nulls", action="store_true", help="nothing was measured")
    args = parser.parse_args()
    report = made_up(args)
    if args.nulls:
        report = without_numbers(report)
    os.makedirs(args.folder, exist_ok=True)
    with open(os.path.join(args.folder, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, allow_nan=False)


if __name__ == "__main__":
    main()
