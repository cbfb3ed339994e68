#!/usr/bin/env bash
# run.sh: the paper's runs as one command that may be killed at any time and goes on when it is called again.
#
#   dev/paper/run.sh                                  GPT-2 124M where there is a GPU (8 hours), else tiny (50 minutes)
#   dev/paper/run.sh --budget 20m                     the same tables from smaller runs
#   dev/paper/run.sh --size d6 --data data/books      shards data/books_train_*.bin and data/books_val_*.bin
#   dev/paper/run.sh --dry-run                        only the plan; --help shows all flags
#
# What it does stands in README.md beside it.
set -eu
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
for program in train_gpt2 infer_gpt2; do
    [[ " $* " != *" --help "* && " $* " != *" -h "* ]] || break # which needs neither
    # The program without a GPU is enough where there is none.
    [ -x "$root/${program}cu" ] || { [ -x "$root/${program}cpu" ] && ! nvidia-smi -L >/dev/null 2>&1; } ||
        make -C "$root" "${program}cu"
done
export PYTHONDONTWRITEBYTECODE=1
exec python3 "$root/dev/paper/paper.py" "$@"
