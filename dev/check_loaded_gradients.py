#!/usr/bin/env python3
"""Checks the gradients of a loaded model against PyTorch's autograd, over the regularizer's settings.

    make train_gpt2cpu
    python3 dev/check_loaded_gradients.py                         # a small random GPT-2 that transformers writes
    python3 dev/check_loaded_gradients.py -e data/gpt2-124M       # any model that our -e takes

For each regularizer, k and lambda our program loads the model and writes its first micro-step with --debug-state, in
fp32, on random tokens; check_debug_state.py computes the same loss in float64 and its gradients with autograd. One line
a setting: the tensor whose relative difference (norm of the difference over norm of the gradient) is largest. Exit
status 1 if one is over the bound. Installs its libraries as compare_formats.py does, into the same environment. The
float64 model takes 24 bytes a parameter.
"""
import argparse
import json
import os
import sys
import tempfile

from compare_formats import (HERE, Failed, default_environment, enter_environment, in_a_process, make_model, run_ours,
                             write_tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-e", "--from", dest="model", help="a model's folder or file")
    parser.add_argument("-b", "--batch", type=int, default=2)
    parser.add_argument("-t", "--context", type=int, default=64)
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative difference of a tensor (1e-4)")
    parser.add_argument("--program", default=os.path.join(HERE, "../train_gpt2cpu"))
    parser.add_argument("--work", default=os.path.join(HERE, "../build"), help="folder for the large files (build/)")
    parser.add_argument("--venv", default=default_environment(), help="the virtual environment (%(default)s)")
    args = parser.parse_args()
    args.program = os.path.abspath(args.program)
    if not os.path.exists(args.program):
        sys.exit(f"There is no {args.program}: build it with make train_gpt2cpu.")
    enter_environment(args.venv)
    from check_debug_state import check

    print(f"{'reg':4} {'k':>3} {'lambda':>6} {'loss':>9} {'R':>9} {'tensors':>7} {'rows with k':>11} "
          f"{'difference':>10}  result, and the tensor that differs most", flush=True)
    failed = 0
    os.makedirs(args.work, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check_loaded_gradients-", dir=args.work) as work:
        try:
            if not args.model:
                args.model = os.path.join(work, "model")
                in_a_process(make_model, args.model, (4, 4, 128), None)
            # The exported copy says how large the vocabulary is, whatever the format.
            run_ours(args.program, "-e", args.model, "--export", f"{work}/exported")
            with open(f"{work}/exported/config.json") as file:
                vocabulary = json.load(file)["vocab_size"]
            write_tokens(f"{work}/tokens.bin", vocabulary, 10 * args.batch * args.context)
            for reg in ("tail", "kl"):
                for k in (1, 8, 32):
                    for lam in (0.1, 1):
                        state = f"{work}/state.safetensors"
                        run_ours(args.program, "-e", args.model, "-i", f"{work}/tokens.bin", "-j", f"{work}/tokens.bin",
                                 "-b", str(args.batch), "-t", str(args.context), "--reg", reg, "-k", str(k), "-l",
                                 str(lam), "--precision", "fp32", "--debug-state", state)
                        r = check(state, args.bound)
                        failed += r["failed"] > 0
                        print(f"{reg:4} {k:3} {lam:6g} {r['loss']:9.5f} {r['R']:9.6f} {r['tensors']:7} "
                              f"{100 * r['rows with k']:10.3f}% {r['difference']:10.1e}  "
                              f"{'FAIL' if r['failed'] else 'pass'}, {r['worst']}", flush=True)
        except Failed as error:
            sys.exit(str(error)[0].upper() + str(error)[1:])
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
