#!/usr/bin/env bash
# dev/bench/compare on a CPU: this engine as it is, and in llm.c's place a script that takes and says what llm.c's
# program for the CPU does. PyTorch is not there.
set -u
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
cd "$work" || exit 1
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
python3 - <<'END'
import array
array.array("i", [20240520, 1, 3000] + [0] * 253).tofile(open("tokens.bin", "wb"))
array.array("H", [i * i % 50257 for i in range(3000)]).tofile(open("tokens.bin", "ab"))
END

# llm.c's program has no flags, looks for its files where it runs, and goes on for longer than it is needed.
mkdir llm.c
cat >llm.c/train_gpt2 <<END
#!/bin/sh
echo \$\$ >$work/pid
cp gpt2_124M.bin $work/model.bin
cmp dev/data/tinyshakespeare/tiny_shakespeare_train.bin dev/data/tinyshakespeare/tiny_shakespeare_val.bin || exit 1
echo "val loss 11.0"
for step in 0 1 2 3; do echo "step \$step: train loss 9.\$step (took \${step}00.5 ms)"; done
sleep 1000
END
chmod +x llm.c/train_gpt2

# compare's main(), with a model that takes no time in the place of 124M.
cat >compare.py <<END
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.SourceFileLoader("compare", "$repository/dev/bench/compare")
compare = importlib.util.module_from_spec(importlib.util.spec_from_loader("compare", loader))
loader.exec_module(compare)
compare.SIZES["124M"] = ("tiny", 4, 2, 128)
sys.exit(compare.main())
END
compare() { timeout 100 python3 -B compare.py --device cpu --steps 4 --warmup 1 --data tokens.bin -o "$1" "${@:2}" >out 2>&1; }
table() { cat "$1"/compare_*.md; }
row() { table "$1" | grep -F "| $2 |" | head -1 | cut -d'|' -f"$3" | tr -d ' '; }

compare both --llmc llm.c --only ours,llmc --python /nonexistent
check "runs" '[ $? = 0 ]'
check "llm.c: the median of what it took, without the first" test "$(row both llm.c 5)" = 200.50
check "llm.c: tokens a second, of 4 x 64" test "$(row both llm.c 6)" = 1277
check "llm.c is stopped when it has done enough" '! kill -0 "$(cat pid)" 2>/dev/null'
check "llm.c begins with a model that our reader takes for its format" \
    "'$repository/train_gpt2cpu' -e model.bin --export exported | grep -q 'llm.c.*4 layers, 2 heads, 128 channels, vocabulary 50257'"
check "this engine: first and last, with and without lambda" '[ "$(table both | grep -c "^| this engine")" = 4 ]'
check "how much faster" 'table both | grep -q "^| llm.c | 0 |  | 200.50 | 1277 | [0-9.]* | 1.00 | [0-9.]* GB |"'
check "says what processor it is" 'table both | head -1 | grep -q "core.*fp32"'
check "the same as JSON" python3 -c '
import glob, json
rows = json.load(open(glob.glob("both/*.json")[0]))["rows"]
assert [r["program"] for r in rows] == ["this engine", "llm.c", "this engine", "this engine, again", "this engine, again"]
assert all(r["ms"] > 0 and r["peak_bytes"] > 1e6 for r in rows)'

compare other --llmc llm.c --only llmc -b 2
check "another batch: llm.c is not run, and the table says why" 'table other | grep -q "not run: its program for the CPU knows 124M with 4 x 64 tokens only"'
compare missing --only llmc,torch --python /nonexistent
check "nothing there: fails" '[ $? = 1 ]'
check "nothing there: says what is missing" 'table missing | grep -q "no --llmc was given" && table missing | grep -q "cannot start /nonexistent"'
printf '#!/bin/sh\necho "Error: this cannot be read"\nexit 3\n' >llm.c/train_gpt2
compare broken --llmc llm.c --only llmc
check "llm.c fails: its words" 'table broken | grep -q "exit status 3: Error: this cannot be read"'
finish
