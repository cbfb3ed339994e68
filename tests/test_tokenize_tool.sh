#!/usr/bin/env bash
# The tokenize program from outside: tests/test_tokenize_tool.sh [PROGRAM], which is build/tokenize otherwise.
set -u
tokenize=$(readlink -f "${1:-$(dirname "$0")/../build/tokenize}")
[[ -x $tokenize ]] || { echo "there is no $tokenize: make build/tokenize"; exit 1; }
fixtures=$(cd "$(dirname "$0")" && pwd)/fixtures
source "$fixtures/../script.sh"
cd "$work" || exit 1
exec >/dev/null 2>&1 # what the commands say

# The command fails with exit code 1 and one line that contains $2.
refuses() {
    local what=$1 sentence=$2 rc
    shift 2
    "$@" >stdout 2>stderr </dev/null
    rc=$?
    if ((rc == 1)) && (($(wc -l <stderr) == 1)) && grep -qF -- "$sentence" stderr; then
        ok "$what"
    else
        bad "$what: exit $rc, $(head -n 3 stderr)"
    fi
}

same() { # $1: what, $2: is, $3: should be
    if [[ $2 == "$3" ]]; then ok "$1"; else bad "$1: \"${2:0:200}\" instead of \"${3:0:200}\""; fi
}

bytes() { "$tokenize" --tokenizer bytes "$@" >stdout 2>stderr; }
# The tokens of shards, one a line, and word $2 of a shard's header.
tokens() { local f; for f in "$@"; do tail -c +1025 "$f" | od -An -v -t u2 -w2 | tr -d ' '; done; }
header() { od -An -t d4 -j $((4 * $2)) -N 4 "$1" | tr -d ' '; }
# The text of byte shards, with | for <|endoftext|>.
text() { tokens "$@" | awk '{printf "%c", $1 == 256 ? "|" : $1 + 0}'; }
eots() { tokens "$@" | grep -cx 256; }

# --- help and bad flags
check "--help works" "$tokenize" --help
for flag in --output --tokenizer --gpt2-dir --val-fraction --shard-tokens --lines --jsonl --delimiter --threads; do
    check "--help names $flag" grep -q -- "$flag" <("$tokenize" --help)
done
check "--help says that hidden files are not read" grep -q 'hidden' <("$tokenize" --help)
echo hello >a.txt
refuses "no input" "no text was given" "$tokenize" -o x
refuses "no output" "-o PREFIX is missing" "$tokenize" a.txt
refuses "no such flag" "--bogus" "$tokenize" --bogus -o x a.txt
refuses "a flag without its value" "-o needs a value" "$tokenize" a.txt -o
refuses "a value for a flag that takes none" "--lines takes no value" "$tokenize" --lines=1 -o x a.txt
refuses "a tokenizer that does not exist" "--tokenizer" "$tokenize" --tokenizer words -o x a.txt
for value in -0.1 1 2 nan abc "" 0.1x; do refuses "--val-fraction $value" "--val-fraction" bash -c '"$0" --tokenizer bytes --val-fraction "$1" -o x a.txt' "$tokenize" "$value"; done
for value in 0 -1 1.5 x "" 3G 99999999999999999999 10T; do refuses "--shard-tokens $value" "--shard-tokens" "$tokenize" --shard-tokens "$value" -o x a.txt; done
for value in -1 x 5000; do refuses "--threads $value" "--threads" "$tokenize" --threads "$value" -o x a.txt; done
refuses "an empty --delimiter" "--delimiter" "$tokenize" --delimiter "" -o x a.txt
refuses "an empty --jsonl" "--jsonl" "$tokenize" --jsonl "" -o x a.txt
refuses "--lines with --jsonl" "exclude one another" "$tokenize" --lines --jsonl text -o x a.txt
refuses "a missing file" "missing.txt" "$tokenize" --tokenizer bytes -o x missing.txt
refuses "a missing vocabulary" "nowhere" "$tokenize" --gpt2-dir nowhere -o x a.txt
refuses "an output folder that cannot be created" "cannot create the folder of -o, a.txt/new: " "$tokenize" --tokenizer bytes -o a.txt/new/x a.txt
refuses "an output folder that is a file" "cannot create the folder of -o, a.txt: " "$tokenize" --tokenizer bytes -o a.txt/x a.txt
refuses "no input, and an output folder that is missing" "missing.txt" "$tokenize" --tokenizer bytes -o nowhere/x missing.txt
refuses "a vocabulary that is not GPT-2's" "vocab.bpe" "$tokenize" --gpt2-dir "$fixtures/tiny_bpe" -o x a.txt
mkdir empty
refuses "a folder without text" "no text file in the folder empty" "$tokenize" --tokenizer bytes -o x empty
: >empty.txt
refuses "no text at all" "no text" "$tokenize" --tokenizer bytes -o x empty.txt
printf a >one.txt
refuses "one token to split" "--val-fraction 0" "$tokenize" --tokenizer bytes -o x one.txt
same "failures leave nothing behind" "$(ls)" "$(printf '%s\n' a.txt empty empty.txt one.txt stderr stdout)"

# --- one document: split inside
printf '%s' 0123456789abcdefghij >digits.txt
check "one document" bytes -o one digits.txt
same "train is the beginning" "$(text one_train_000000.bin)" 0123456789abcdefgh
same "validation is the end" "$(text one_val_000000.bin)" ij
same "magic" "$(header one_train_000000.bin 0)" 20240520
same "version" "$(header one_train_000000.bin 1)" 1
same "count" "$(header one_train_000000.bin 2)" 18
same "vocabulary" "$(header one_train_000000.bin 3)" 257
same "size" "$(stat -c %s one_train_000000.bin)" $((1024 + 36))
check "the summary counts documents" grep -qx 'documents   1' stdout
check "the summary counts bytes" grep -qx 'bytes       20' stdout
check "the summary counts tokens" grep -q '^tokens      20,' stdout
check "a validation fraction" bytes --val-fraction 0.5 -o half digits.txt
same "half of it" "$(text half_val_000000.bin)" abcdefghij
check "no validation" bytes --val-fraction 0 -o all digits.txt
check "no validation: nothing to say" '! grep -q note stdout'
same "all of it" "$(text all_train_000000.bin)" 0123456789abcdefghij
check "no validation shard" test ! -e all_val_000000.bin
cp half_val_000000.bin all_val_000000.bin
check "no validation, and an earlier run's is there" bytes --val-fraction 0 -o all digits.txt
check "no validation, and an earlier run's is there: it is told" 'grep -q "note.*all_val_000000.bin is there from before" stdout'

check "an output folder that is missing" bytes -o new/deep/one digits.txt
check "an output folder that is missing is created" cmp one_train_000000.bin new/deep/one_train_000000.bin
check "an output folder that is missing: with a slash at its end" bytes -o new/slash/ digits.txt
check "an output folder that is missing: with a slash at its end" cmp one_val_000000.bin new/slash/_val_000000.bin
ln -s new linked
check "an output folder behind a link" bytes -o linked/one digits.txt
check "--help says that the folder is created" grep -q 'is created' <("$tokenize" --help)

# --- several documents: one <|endoftext|> between two, split between them
mkdir -p docs/sub
for i in 1 2 3 4 5 6 7 8 9; do printf 'document %d.' $i >docs/$i.txt; done
printf 'the last one' >docs/sub/z.txt
: >docs/empty.txt
head -c 100 /dev/zero >docs/binary.dat
check "a folder" bytes -o docs_ docs
same "all documents, in order" "$(text docs__train_000000.bin docs__val_000000.bin)" \
    "document 1.|document 2.|document 3.|document 4.|document 5.|document 6.|document 7.|document 8.|document 9.|the last one"
same "the split is between documents" "$(text docs__val_000000.bin)" "the last one"
same "N documents, N-1 <|endoftext|>" "$(eots docs__train_000000.bin docs__val_000000.bin)" 9
check "skipped files are noted" grep -q 'skipped 2 files' stderr
check "skipped files are named" grep -q 'docs/binary.dat' stderr
check "no hidden files, nothing said of them" '! grep -q hidden stderr'
mkdir -p hidden/.git/deep hidden/sub/.cache
printf shown | tee hidden/a.txt hidden/sub/b.txt >/dev/null
printf secret | tee hidden/.env hidden/.git/config hidden/.git/deep/c.txt hidden/sub/.cache/d.txt >/dev/null
check "hidden files in folders" bytes --val-fraction 0 -o hide hidden
same "hidden files in folders are not read, nor what is below hidden folders" "$(text hide_train_000000.bin)" "shown|shown"
check "hidden files are counted" grep -qx 'skipped 3 hidden files or folders' stderr
check "hidden ones that are named" bytes --val-fraction 0 -o hide hidden/.env hidden/.git
same "hidden ones that are named are read" "$(text hide_train_000000.bin)" "secret|secret|secret"
check "a folder named ." '(cd hidden && "$tokenize" --tokenizer bytes --val-fraction 0 -o ../hide .)'
same "a folder named . is read" "$(text hide_train_000000.bin)" "shown|shown"
mkdir -p only_hidden/.git
printf secret >only_hidden/.git/config
refuses "a folder with hidden files only" "no text file in the folder only_hidden, but for hidden ones" "$tokenize" --tokenizer bytes -o x only_hidden
check "files in the order given" bytes --val-fraction 0 -o order docs/2.txt docs/1.txt
same "files in the order given" "$(text order_train_000000.bin)" "document 2.|document 1."
printf 'x\0y' >zero.dat
check "a file that is named is taken as it is" bytes --val-fraction 0 -o zero zero.dat
same "a file that is named is taken as it is" "$(tokens zero_train_000000.bin | xargs)" "120 0 121"

# --- the split of a few long documents: between them where that gives half to twice the share, otherwise inside one
letters() { printf "%$2s" '' | tr ' ' "$1"; } # $2 times the letter $1
# Text of which the last document has $1 of 200 tokens: what is held out of it.
held_out() {
    letters a $((199 - $1)) >first.txt
    letters b "$1" >last.txt
    bytes "${@:2}" -o few first.txt last.txt && text few_val_000000.bin
}
same "a long last document is split inside" "$(held_out 150)" "$(letters b 20)"
same "two files of a size: the second is split inside" "$(held_out 100)" "$(letters b 20)"
check "two files of a size: the summary says how much" grep -q '^tokens      200, 10.00% of them' stdout
same "a short last document is not all that is held out" "$(held_out 9)" "$(letters a 10)|$(letters b 9)"
same "half the share: between documents" "$(held_out 10)" "$(letters b 10)"
same "twice the share: between documents" "$(held_out 40)" "$(letters b 40)"
same "more than twice the share: inside" "$(held_out 41)" "$(letters b 20)"
same "a split inside loses nothing" "$(text few_train_000000.bin few_val_000000.bin)" "$(letters a 158)|$(letters b 41)"
same "another share: between documents" "$(held_out 80 --val-fraction 0.5)" "$(letters b 80)"
same "another share: inside" "$(held_out 40 --val-fraction 0.5)" "$(letters a 59)|$(letters b 40)"
same "a share of less than a token" "$(held_out 3 --val-fraction 0.001)" b
same "nearly everything for validation" "$(held_out 3 --val-fraction 0.999 | wc -c)" 199
letters a 79 >1.txt
letters b 18 >2.txt
printf c >3.txt
check "the nearest boundary gives too little, the next one twice the share" bytes -o few 1.txt 2.txt 3.txt
same "the nearest boundary gives too little, the next one twice the share" "$(text few_val_000000.bin)" "$(letters b 18)|c"

# --- lines, JSON lines, delimiters
printf 'one\n\ntwo\r\nthree' >lines.txt
check "--lines" bytes --lines --val-fraction 0 -o lines lines.txt lines.txt
same "--lines" "$(text lines_train_000000.bin)" "one|two|three|one|two|three"
printf '{"id": 1, "text": "a\\nb"}\n\n{"text": ""}\n{"text": "\\u00e9<|endoftext|>"}\n' >j.jsonl
check "--jsonl" bytes --jsonl text --val-fraction 0 -o json j.jsonl
same "--jsonl" "$(tokens json_train_000000.bin | xargs)" "97 10 98 256 195 169 60 124 101 110 100 111 102 116 101 120 116 124 62"
# As Python's json.dumps("x\ud83dy"), which tiktoken reads as U+FFFD, writes it; a pair; and what is none of these.
cat >surrogates.jsonl <<'END'
{"text": "x\ud83dy"}
{"text": "\uDE00\ud83d\uDe00"}
{"text": "\ud83d\ud83d\n\\ud83d \\\uD83D"}
END
check "--jsonl: surrogates" bytes --jsonl text --val-fraction 0 -o surrogates surrogates.jsonl
same "half a surrogate pair is U+FFFD" "$(tokens surrogates_train_000000.bin | xargs)" "120 239 191 189 121 256 239 191 189 240 159 152 128 256 239 191 189 239 191 189 10 92 117 100 56 51 100 32 92 239 191 189"
printf '{"text": "a", "score": 1e999}\n' >bad.jsonl
refuses "a number that is too large" "line 1 of bad.jsonl is not valid JSON (a number is out of range)" "$tokenize" --tokenizer bytes --jsonl text -o x bad.jsonl
printf '{"text": "a", "score": NaN}\n' >bad.jsonl
refuses "NaN, and where" "line 1 of bad.jsonl is not valid JSON (at byte 24)" "$tokenize" --tokenizer bytes --jsonl text -o x bad.jsonl
printf '{"text": "fine"}\n{"text": 7}\n' >bad.jsonl
refuses "a field of another type" "line 2 of bad.jsonl has a field" "$tokenize" --tokenizer bytes --jsonl text -o x bad.jsonl
refuses "a missing field" "line 1 of bad.jsonl has no field \"body\"" "$tokenize" --tokenizer bytes --jsonl body -o x bad.jsonl
printf '{"text": "a"}\0 and more\n' >bad.jsonl
refuses "a zero byte behind the object" "line 1 of bad.jsonl is not valid JSON" "$tokenize" --tokenizer bytes --jsonl text -o x bad.jsonl
for line in '{"text": "cut' '["text"]' 'text'; do
    printf '%s\n' "$line" >bad.jsonl
    refuses "JSON: $line" "line 1 of bad.jsonl" "$tokenize" --tokenizer bytes --jsonl text -o x bad.jsonl
done
printf 'a=-=b=-=-=c=-==-=' >d.txt
check "--delimiter" bytes --delimiter '=-=' --val-fraction 0 -o delimited d.txt
same "--delimiter" "$(text delimited_train_000000.bin)" "a|b|-=c"
# Blocks of the file end inside delimiters.
awk 'BEGIN {for (i = 0; i < 100000; i++) printf "%d<|endoftext|>", i}' >many.txt
check "many delimiters" bytes --delimiter '<|endoftext|>' --val-fraction 0 -o many many.txt
same "many documents" "$(text many_train_000000.bin | md5sum)" "$(seq 0 99999 | paste -sd'|' | tr -d '\n' | md5sum)"

# --- shards
check "--shard-tokens" bytes --shard-tokens 7 -o s docs
same "shards in a row are the whole" "$(text s_train_*.bin s_val_*.bin)" "$(text docs__train_000000.bin docs__val_000000.bin)"
same "shards have their size" "$(for f in s_train_0000{00,01}.bin s_val_000000.bin; do header $f 2; done | xargs)" "7 7 7"
check "a second run" bytes --shard-tokens 50 -o s docs
same "shards of an earlier run are gone" "$(text s_train_*.bin s_val_*.bin)" "$(text docs__train_000000.bin docs__val_000000.bin)"
check "a second run says what it removed" grep -q '^removed ' stdout
cp s_train_000000.bin s_train_000003.bin && cp s_train_000000.bin s_train_000005.bin && touch s_train_x.bin s_train_000007.txt s_train_7.bin
check "left shards with a gap before them" bytes --shard-tokens 50 -o s docs
same "they are gone as well, and no other file" "$(echo s_train_*)" "s_train_000000.bin s_train_000001.bin s_train_000002.bin s_train_000007.txt s_train_7.bin s_train_x.bin"
check "how many they were is said" grep -q '^removed     2 shards' stdout
rm s_train_x.bin s_train_000007.txt s_train_7.bin
refuses "tokens as text" "s_train_000000.bin is a token shard already" "$tokenize" --tokenizer bytes -o s s_train_000000.bin
before=$(cat s_*.bin | md5sum)
mkdir s_train_000003.bin
refuses_set() { ! bytes --shard-tokens 400K -o s many.txt && grep -q 's_train_000003.bin: there is a folder of that name' stderr; }
check "a set that cannot be written whole" refuses_set
rmdir s_train_000003.bin
same "a set that cannot be written whole: the one that was there stays" "$(cat s_*.bin | md5sum)" "$before"
check "--shard-tokens with a unit" bytes --shard-tokens 1K -o unit many.txt
same "1K is 1000" "$(header unit_train_000000.bin 2)" 1000

# --- output that nobody reads, or that is closed
yes 'a line of text' | head -n 1000000 >long.txt
"$tokenize" --tokenizer bytes --threads 1 -o closed long.txt >/dev/null 2>&- &
while kill -0 $! 2>/dev/null; do place=$(readlink /proc/$!/fd/2) && last=$place; done
same "a closed standard error: what is printed goes nowhere, and into no shard" "${last:-}" /dev/null
wait
bytes --shard-tokens 5K -o piped many.txt
before=$(text piped_train_*.bin piped_val_*.bin | md5sum)
{ "$tokenize" --tokenizer bytes --shard-tokens 4K -o piped many.txt; echo $? >status; } 2>/dev/null | true
same "a reader that is gone: the set is whole, and nothing else is left" "$(text piped_train_*.bin piped_val_*.bin | md5sum) $(ls | grep -c tmp)" "$before 0"
rm -f long.txt closed_* piped_*
check "a full disk below standard output is an error" bash -c '! "$0" --tokenizer bytes -o full one.txt digits.txt >/dev/full 2>stderr' "$tokenize"
rm -f full_*
mkdir -p linked && ln -s ../docs linked/docs && echo text >linked/a.txt
check "a linked folder is not followed" bytes -o linked_out --val-fraction 0 linked
check "a linked folder: that is said" grep -q 'skipped 1 link to folders' stderr
rm -rf linked linked_out_*
refuses "the standard input" "the standard input is not read" "$tokenize" --tokenizer bytes -o x -

# --- the same whatever the threads and wherever a long text is cut on its way (batches are of about 1 MB)
for i in 1 2 3; do awk -v i=$i 'BEGIN {srand(i); for (n = 0; n < 300000; n++) printf "%s%s", substr("thequickbrownfoxjumps1984!?", 1 + int(rand() * 20), 1 + int(rand() * 7)), substr(" \n\t  \n\n", 1 + int(rand() * 6), 1 + int(rand() * 2))}' >big$i.txt; done
for threads in 1 2 5; do
    check "$threads threads" bytes --threads $threads -o t$threads big1.txt big2.txt big3.txt
    check "$threads threads: the same training tokens" cmp t1_train_000000.bin t${threads}_train_000000.bin
    check "$threads threads: the same validation tokens" cmp t1_val_000000.bin t${threads}_val_000000.bin
done
same "big documents arrive whole" "$(tail -c +1025 t1_train_000000.bin | cat - <(tail -c +1025 t1_val_000000.bin) | od -An -v -t u2 -w2 | awk '$1 != 256 {printf "%c", $1 + 0}' | md5sum)" "$(cat big?.txt | md5sum)"
gpt2=
for folder in "${DATA_MIRROR:-}" "$fixtures/../../data"; do
    [[ -d $folder && -z $gpt2 ]] && gpt2=$(find -L "$folder" -name vocab.bpe -size +400k -printf '%h\n' 2>/dev/null | head -n 1)
done
if [[ -n $gpt2 ]]; then
    for threads in 1 3; do check "gpt2, $threads threads" "$tokenize" --gpt2-dir "$gpt2" --threads $threads --val-fraction 0 -o g$threads big1.txt big2.txt; done
    check "gpt2: threads change nothing" cmp g1_train_000000.bin g3_train_000000.bin
    same "gpt2: the header's vocabulary" "$(header g1_train_000000.bin 3)" 50257
    # Other text in front, of a token a word, moves the places where the rest is cut: its tokens must not notice.
    moved() {
        { yes word | head -n "$1" | paste -sd' ' | tr -d '\n' && printf '\n' && cat big1.txt; } >moved.txt
        "$tokenize" --gpt2-dir "$gpt2" --val-fraction 0 -o moved moved.txt >stdout 2>stderr
        tail -c +$((1025 + 2 * $1)) moved_train_000000.bin | md5sum
    }
    reference=$(moved 1)
    for words in 3000 50001 100003; do same "gpt2: $words words in front" "$(moved $words)" "$reference"; done
else
    echo "skipped: GPT-2's vocabulary is neither in \$DATA_MIRROR nor in data/" >&3
fi
# --- GPT-2's vocabulary without --gpt2-dir: beside the program's folder, otherwise in the working directory
mkdir -p tree/build tree/data away
cp "$tokenize" tree/build/tokenize
tree=$(readlink -f tree)
by_default() { (cd "$1" && "$tree/build/tokenize" --val-fraction 0 -o "$work/default" "$work/digits.txt"); }
check "--help says where the vocabulary is by default" grep -q 'data/gpt2 beside the program' <("$tokenize" --help)
refuses "no vocabulary anywhere: both places are named" "no GPT-2 vocabulary in $tree/data/gpt2, nor in data/gpt2 here" by_default away
# The vocabulary of the tests is refused for its size, in a sentence that says where it is.
mkdir -p away/data && cp -r "$fixtures/tiny_bpe" away/data/gpt2
refuses "a vocabulary in the working directory only: that one" " data/gpt2/vocab.bpe" by_default away
cp -r "$fixtures/tiny_bpe" tree/data/gpt2
refuses "a vocabulary beside the program: that one" "$tree/data/gpt2/vocab.bpe" by_default away
refuses "--gpt2-dir comes before both" "nowhere" "$tree/build/tokenize" --gpt2-dir nowhere -o x a.txt
if [[ -n $gpt2 ]]; then
    rm -r tree/data/gpt2
    ln -s "$(readlink -f "$gpt2")" tree/data/gpt2
    check "GPT-2's vocabulary beside the program, called from elsewhere" by_default /
    same "GPT-2's vocabulary beside the program, called from elsewhere" "$(header default_train_000000.bin 3)" 50257
fi
check "no temporary file is left" test -z "$(ls | grep -E '_tokens|\.tmp')"
finish
