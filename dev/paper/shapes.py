"""What the JSON files of a folder of runs hold, of what is read here, for read_json() of common.py."""
from common import MAYBE_NUMBER, MAYBE_TEXT, NUMBER
from plan import LAYER0, SIZES

CELL = {"name": str, "family": {"scratch", "continued"}, "group": str, "wave": int, "lambda": NUMBER, "reg": str,
        "k": int, "rise": str, "layers": {"", *LAYER0}, "seed": int, "start?": str, "margin?": NUMBER, "pick?": str}
PLAN = {"size": {*SIZES}, "gpu": bool, "left_out": [str], "cells_option": MAYBE_TEXT, "data_option": MAYBE_TEXT,
        "seeds?": (list, type(None)), "options": {"eval_tokens": int}, "budget_s": NUMBER, "disk_bytes": NUMBER,
        "cells": [CELL, ...],
        **dict.fromkeys(("layers", "limit", "rounds", "batch", "context", "tokens_per_update", "eval_tokens", "workers",
                         "threads", "updates"), int),
        **dict.fromkeys(("train_data", "val_data", "data_tokens", "rule", "why_workers", "device", "precision",
                         "model"), str),
        "measured": dict.fromkeys(("update_s", "start_s", "eval_s", "validation_s", "report_s", "figures_s", "speed_s"),
                                  NUMBER)}
CHOSEN = {str: {str: CELL}}
DONE = {"settings": CELL, "commands": [str], "commit": str, "device": str, "date": str, "training_s": NUMBER}
FAILED = {"error": str}
EVAL = {"commit": str, "device": str,
        "eval": {"tokens": int, "dense": {"loss": NUMBER},
                 "cuts": [{"cut": str, "k": int, "renormalized": bool, "loss": NUMBER, "kept": MAYBE_NUMBER}]}}


def both(*figures):
    return {way: dict.fromkeys(figures, MAYBE_NUMBER) for way in ("dense", "topk")}


PROBES = {"probes": {"induction": both("accuracy", "score"),
                     "recall": both("accuracy", "chance"),
                     "needle": {"dense": [MAYBE_NUMBER], "topk": [MAYBE_NUMBER], "candidates": int}}}
TASKS = {"lambada?": {"items": int, **both("accuracy", "stderr", "perplexity")},
         "hellaswag?": both("accuracy_norm", "stderr_norm")}
REPORT = {"model": {"layers": int}, "text": {"rows": int}, "ks": [int],
          "heads": [{"layer": int, "mass": [MAYBE_NUMBER], "mass_nosink": [MAYBE_NUMBER], "tau": {"max": MAYBE_NUMBER},
                     "max_score?": MAYBE_NUMBER,
                     **dict.fromkeys(("keys90", "keys95", "keys99", "entropy", "first", "self", "previous"),
                                     MAYBE_NUMBER)}]}
SPEED = [{"name": str, "ms": [NUMBER, ...], "tok_s": [NUMBER, ...], "memory?": MAYBE_TEXT}]
DECODE = [{"run": str, "attention": str, "batch": int, "tok_s": [NUMBER, ...]}]
RESULTS = {"plan": {}, "cells": [{}]}
