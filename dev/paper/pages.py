#!/usr/bin/env python3
"""How many keys a certificate makes models read. Each passage of a text fills most of a model's context; then
the model goes on with it for STEPS tokens, and reads the cache in pages until what is unread provably holds less than
epsilon of a row's mass (infer_gpt2cu --attention pages). So nearly all of the keys are of a real text, which is the same
for all models. With -o also writes DIR/pages.md and DIR/pages.json."""
import argparse
import glob
import os
import subprocess
import sys
import tempfile

from common import ROOT, Bad, NUMBER, read_json, write_file, write_json
from tables import mean, number, table

STEPS = 8
BYTES = 257  # the vocabulary of a model of bytes; others have GPT-2's, of 3 characters a token or more
STATS = {"layer": int, "head": int, "keys": NUMBER, "read": NUMBER, "pages": NUMBER, "tau": NUMBER, "worst": NUMBER,
         "certified": NUMBER}
MADE = {"commit": str, "device": str, "precision": str, "date": str,
        "generation": {"epsilon": NUMBER, "drawn": int, "stats": [STATS, ...]}}
CONFIG = {"n_positions": int, "vocab_size": int}


def read_text(path):
    """A file, or all *.txt of a folder, on one line."""
    files = sorted(glob.glob(os.path.join(path, "**", "*.txt"), recursive=True)) if os.path.isdir(path) else [path]
    whole = ""
    for name in files:
        with open(name, encoding="utf-8") as file:
            whole += " ".join(file.read().encode("ascii", "ignore").decode().split()) + " "
    return whole


def passages(whole, count, context, vocabulary):
    """`count` pieces of a text, evenly apart, of as many tokens as leave room for STEPS, or with GPT-2's vocabulary, where
    a token is 3 characters long or longer, fewer."""
    size = context - 2 * STEPS if vocabulary == BYTES else 3 * context
    if size < 1 or len(whole) < size:
        raise Bad(f"the text has {len(whole)} characters, and a passage is to have {size}: name a longer text or a model of "
                  "another context")
    places = [i * (len(whole) - size) // max(1, count - 1) for i in range(count)]
    return [whole[at:at + size].strip() for at in places]


def measure(infer, model, whole, count, epsilons):
    """{epsilon: what --json has}"""
    configs = sorted(glob.glob(os.path.join(model, "step_*", "config.json"))) or [os.path.join(model, "config.json")]
    config = read_json(configs[-1], CONFIG)
    if config is None:
        raise Bad(f"{model} is no model's folder: it has neither step_.../config.json nor config.json")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts, result = os.path.join(folder, "prompts"), os.path.join(folder, "made.json")
        write_file(prompts, "\n".join(passages(whole, count, config["n_positions"], config["vocab_size"])) + "\n")
        for epsilon in epsilons:
            command = [infer, "-e", model, "-f", prompts, "-n", str(STEPS + 1), "--attention", "pages", "--epsilon",
                       f"{epsilon:g}", "--stats", "--json", result]
            made = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            if made.returncode != 0:
                raise Bad(f"{' '.join(command)}: {made.stderr.decode().strip().splitlines()[-1]}")
            found[epsilon] = read_json(result, MADE)
    return found


def row(model, epsilon, made):
    stats = made["generation"]["stats"]
    of = lambda key, rows: mean([s[key] for s in rows])
    layers = [[s for s in stats if s["layer"] == layer] for layer in range(1 + max(s["layer"] for s in stats))]
    return [model, f"{epsilon:g}", number(of("keys", stats), 0),
            f"{100 * of('read', stats) / of('keys', stats):.0f}%",
            ", ".join(f"{100 * of('read', rows) / of('keys', rows):.0f}%" for rows in layers),
            number(of("tau", stats), 5), number(max(s["worst"] for s in stats)), number(of("certified", stats))]


def markdown(found, text, count):
    facts = next(iter(next(iter(found.values())).values()))
    head = ["model", "epsilon", "keys in the cache", "read", "by layer", "τ, mean", "τ, largest", "certified, mean"]
    return (f"# Keys read under a certificate\n\n{count} passages of `{text}`, each continued by {STEPS} tokens. "
            f"{facts['device']}, {facts['precision']}, {facts['date']}, commit {facts['commit']}.\n\n"
            "Means over layers, heads and tokens; τ is the mass of a row that was not read, and certified is the bound on it\n"
            "that was known without reading it.\n\n"
            + table(head, [row(model, epsilon, made) for model, one in found.items() for epsilon, made in one.items()]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a run's or model's folder")
    parser.add_argument("--text", required=True, help="a text file, or a folder of *.txt")
    parser.add_argument("--passages", type=int, default=32, metavar="N", help="(32)")
    parser.add_argument("--epsilon", default="0.01,0.1", metavar="X[,X...]", help="(0.01,0.1)")
    parser.add_argument("-o", "--out", metavar="DIR")
    args = parser.parse_args()
    programs = [os.path.join(ROOT, name) for name in ("infer_gpt2cu", "infer_gpt2cpu")]
    infer = next((path for path in programs if os.access(path, os.X_OK)), None)
    if infer is None:
        raise Bad("there is no infer_gpt2cu: make infer_gpt2cu builds it")
    try:
        epsilons = [float(x) for x in args.epsilon.split(",")]
    except ValueError:
        raise Bad(f"--epsilon takes numbers, such as 0.01,0.1, not {args.epsilon}") from None
    if args.passages < 1:
        raise Bad("--passages takes a number from 1")
    found, whole = {}, read_text(args.text)
    for model in args.models:
        found[os.path.basename(os.path.abspath(model))] = measure(infer, model, whole, args.passages, epsilons)
    page = markdown(found, args.text, args.passages)
    print(page)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        write_file(os.path.join(args.out, "pages.md"), page)
        for one in found.values():
            for made in one.values():
                del made["generation"]["texts"], made["model"]  # a path of this machine
        kept = {model: {f"{epsilon:g}": made for epsilon, made in one.items()} for model, one in found.items()}
        write_json(os.path.join(args.out, "pages.json"), {"text": args.text, "passages": args.passages, "models": kept})


if __name__ == "__main__":
    try:
        main()
    except (Bad, OSError) as problem:
        sys.exit(f"pages: {problem}")
