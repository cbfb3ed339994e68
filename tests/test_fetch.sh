#!/usr/bin/env bash
# data/fetch and data/prepare in a folder of their own, with a manifest of their own: tests/test_fetch.sh [PROGRAM],
# PROGRAM being build/tokenize otherwise.
# Needs no network: the addresses are on this machine, or lead nowhere.
set -u
tokenize=$(readlink -f "${1:-$(dirname "$0")/../build/tokenize}")
[[ -x $tokenize ]] || { echo "there is no $tokenize: make build/tokenize"; exit 1; }
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
server=
trap '[[ -n $server ]] && kill $server 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
unset DATA_MIRROR
passed=0 failed=0

check() { # $1: what; the other arguments: a command that must succeed
    local what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED: %s\n' "$what"
        sed 's/^/    /' out err 2>/dev/null | head -n 8
    fi
}
said() { grep -qF -- "$1" out err; }
fetch() { data/fetch "$@" >out 2>err; }
fails() { ! "$@"; }
# Nothing but these files is in data/ (the script's own and the cache's lock left out).
only() { [[ $(cd data && find . -type f ! -name fetch ! -name prepare ! -name manifest.tsv ! -path ./cache/lock | sort | xargs) == "$*" ]]; }
sha() { sha256sum <"$1" | cut -d' ' -f1; }

mkdir -p data public mirror/deep/er mirror/a
cp "$repository/data/fetch" "$repository/data/prepare" data/
for i in $(seq 3000); do echo "line $i of a text that somebody wants"; done >public/text.txt
size=$(stat -c %s public/text.txt)
hash=$(sha public/text.txt)
shard() { # $1: the file, $2: the magic as octal bytes, $3: tokens
    { printf "$2"; printf '\1\0\0\0'; printf "\\$(printf '%03o' "$3")\\0\\0\\0"; head -c 1012 /dev/zero; head -c $((2 * $3)) /dev/zero; } >"$1"
}
magic='\210\330\064\001' # 20240520, little-endian
shard public/shard_01.bin "$magic" 100
shard public/shard_02.bin "$magic" 100
truncate -s -2 public/shard_02.bin
shard public/shard_03.bin '\211\330\064\001' 100
manifest() { # $1: the source of the text
    printf '#name\tfile\tkind\tbytes\tsha256\tsources\n'
    printf 'text\tsub/text.txt\tfile\t%s\t%s\t%s\n' "$size" "$hash" "$1"
    printf 'shards\tshard_[01-03].bin\tshard\t-\t-\tfile://%s/public/shard_[01-03].bin\n' "$work"
} >data/manifest.tsv
url=file://$work/public/text.txt
nowhere=file://$work/public/nothing.txt

# --- names and flags
manifest "$url"
check "--help" data/fetch --help >out 2>err
check "no name" fails fetch
check "no such flag" fails fetch --bogus
check "no such flag, said" said "--bogus"
check "no such name" fails fetch nonsense
check "no such name, said" said "nonsense"
check "--list" fetch --list
check "--list shows files" said "sub/text.txt"
check "--list expands ranges" said "shard_02.bin"
check "nothing yet" only

# --- public address
check "from its address" fetch text
check "the bytes" cmp -s data/sub/text.txt public/text.txt
check "the source is named" said "$url"
check "the hash is named" said "SHA-256 checked"
check "again" fetch text
check "again, it is there" said "is there"
echo more >>data/sub/text.txt
check "a spoilt file" fetch sub/text.txt
check "a spoilt file is got anew" cmp -s data/sub/text.txt public/text.txt
check "nothing else is left" only ./sub/text.txt

# --- sources in order, wrong bytes, no source
rm -rf data/sub
sed 's/wants/wanted/' public/text.txt >public/other.txt
head -c "$size" /dev/urandom >public/noise.txt
manifest "$nowhere file://$work/public/other.txt file://$work/public/noise.txt $url"
check "the right one of several sources" fetch text.txt
check "the right one of several sources: the bytes" cmp -s data/sub/text.txt public/text.txt
check "the wrong ones are named: missing" said "$nowhere: "
check "the wrong ones are named: size" said "bytes instead of $size"
check "the wrong ones are named: hash" said "SHA-256 is another"
rm -rf data/sub
manifest "$nowhere file://$work/public/other.txt file://$work/public/noise.txt"
check "no source" fails fetch text
check "no source: one sentence" said "cannot get sub/text.txt; tried: $nowhere, file://$work/public/other.txt, file://$work/public/noise.txt"
check "no source: nothing is left" only

# --- mirrors
manifest "$nowhere"
cp public/other.txt mirror/a/text.txt
cp public/text.txt mirror/deep/er/text.txt
check "a mirror folder, at any depth" env DATA_MIRROR=mirror data/fetch text >out 2>err
check "a mirror folder: the bytes" cmp -s data/sub/text.txt public/text.txt
check "a mirror folder: the wrong file is named" said "mirror/a/text.txt: it has"
rm -rf data/sub
rm mirror/deep/er/text.txt
check "a mirror with the wrong file" fails env DATA_MIRROR=mirror data/fetch text >out 2>err
check "a mirror that is not there" fails env DATA_MIRROR=none data/fetch text >out 2>err
check "a mirror that is not there, said" said "none: it is no folder"
manifest "$url"
check "a mirror without the file, then the address" env DATA_MIRROR=data/cache data/fetch text >out 2>err
rm -rf data/sub
manifest "$nowhere"
mkdir -p mirror/sub
cp public/text.txt mirror/sub/
check "a mirror URL" env DATA_MIRROR="file://$work/mirror" data/fetch text >out 2>err
rm -rf data/sub
check "a mirror URL with the file at its top" env DATA_MIRROR="file://$work/public/" data/fetch text >out 2>err
rm -rf data/sub

# --- going on with a part
manifest "$url"
head -c 50000 public/text.txt >data/cache/sub_text.txt.part
check "a part is gone on with" fetch text
check "a part is gone on with: said" said "going on with 50000 bytes"
check "a part is gone on with: the bytes" cmp -s data/sub/text.txt public/text.txt
for bad in "head -c 50000 /dev/urandom" "cat public/noise.txt" "cat public/text.txt public/text.txt" "cat public/text.txt"; do
    rm -rf data/sub
    $bad >data/cache/sub_text.txt.part
    check "a part: $bad" fetch text
    check "a part: $bad: the bytes" cmp -s data/sub/text.txt public/text.txt
    check "a part: $bad: nothing else is left" only ./sub/text.txt
done

# --- a server that breaks off in the middle
if command -v python3 >/dev/null; then
    rm -rf data/sub
    cat >server.py <<'END'
import http.server, os
content = open("public/text.txt", "rb").read()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) if first else 40000
        self.wfile.write(content[first:end])
        open("requests", "a").write(f"{first}\n")
    def log_message(self, *arguments):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
open("port.new", "w").write(str(server.server_port))
os.rename("port.new", "port")
server.serve_forever()
END
    python3 server.py &
    server=$!
    for _ in $(seq 100); do [[ -f port ]] && break; sleep 0.1; done
    manifest "http://127.0.0.1:$(cat port)/text.txt"
    check "a broken connection" fails fetch text
    check "a broken connection leaves the part" test "$(stat -c %s data/cache/sub_text.txt.part)" = 40000
    check "a broken connection leaves no file" test ! -e data/sub/text.txt
    check "the next time" fetch text
    check "the next time: the bytes" cmp -s data/sub/text.txt public/text.txt
    check "the next time: only the rest was asked for" test "$(xargs <requests)" = "0 40000"
    kill $server
    wait $server 2>/dev/null
    server=
    rm -rf data/sub
    check "a server that is not there" fails fetch text
    check "a server that is not there leaves nothing" only
fi

# --- files without a hash: their format is checked, and the output says so
check "a shard" fetch shard_01.bin
check "a shard: said" said "no hash of it is known"
check "a shard cut short" fails fetch shard_02.bin
check "a shard cut short: said" said "but a shard of its 100 tokens has 1224"
check "a shard with another magic" fails fetch shard_03.bin
check "a shard with another magic: said" said "it is not a token shard"
rm -f data/shard_01.bin
check "a group fails if one file does" fails fetch shards
check "and has the others" only ./shard_01.bin
rm -f data/shard_01.bin

# --- the manifest of the repository itself
cp "$repository/data/manifest.tsv" data/
check "the manifest: --list" fetch --list
check "the manifest: 103 training shards" test "$(grep -c fineweb_train_ out)" = 103
check "the manifest: six columns" awk -F'\t' 'NF != 6 {exit 1}' data/manifest.tsv
check "the manifest: hashes and sizes" awk -F'\t' '!/^#/ && !($4 ~ /^([0-9]+|-)$/ && $5 ~ /^([0-9a-f]+|-)$/ && length($5) ~ /^(1|64)$/) {exit 1}' data/manifest.tsv

# --- prepare: tinyshakespeare's stand-in here is the text above
prepare() { TOKENIZE=$tokenize data/prepare "$@" >out 2>err; }
tiny() { printf 'tinyshakespeare\ttinyshakespeare.txt\tfile\t%s\t%s\t%s\n' "$size" "$hash" "$1" >data/manifest.tsv; }
tiny "$url"
check "prepare" prepare
check "prepare: shards" test -s data/tinyshakespeare_bytes_train_000000.bin -a -s data/tinyshakespeare_bytes_val_000000.bin
check "prepare: the default" test "$(cat data/default_dataset)" = tinyshakespeare
check "prepare: all bytes are there" test $(($(stat -c %s data/tinyshakespeare_bytes_train_000000.bin) + $(stat -c %s data/tinyshakespeare_bytes_val_000000.bin))) = $((2048 + 2 * size))
check "prepare: no vocabulary, no such shards" test ! -e data/tinyshakespeare_gpt2_train_000000.bin
stamp=$(stat -c %Y.%i data/tinyshakespeare_bytes_train_000000.bin)
check "prepare again" prepare
check "prepare again does nothing" test "$(stat -c %Y.%i data/tinyshakespeare_bytes_train_000000.bin)" = "$stamp"
rm -f data/tinyshakespeare_bytes_val_000000.bin
check "prepare mends what is missing" prepare
check "prepare mends what is missing: it is there" test -s data/tinyshakespeare_bytes_val_000000.bin
check "prepare without a tokenizer" fails env TOKENIZE=nowhere data/prepare >out 2>err
check "prepare without a tokenizer: said" said "there is no nowhere"
check "prepare something else" fails prepare nonsense

# --- prepare without any source: text of this machine, if it has enough
rm -rf data/tinyshakespeare* data/default_dataset data/cache
tiny "$nowhere"
if prepare; then
    check "local text: shards" test -s data/localtext_bytes_train_000000.bin -a -s data/localtext_bytes_val_000000.bin
    check "local text: the default" test "$(cat data/default_dataset)" = localtext
    check "local text: said" said "this is "
    check "local text: enough" test "$(stat -c %s data/localtext_bytes_train_000000.bin)" -gt 300000
    check "local text: English" grep -q ' the ' <(tail -c +1025 data/localtext_bytes_train_000000.bin | od -An -v -t u2 -w2 | awk '{printf "%c", $1 + 0}')
    check "local text: once" prepare
    check "local text: once, nothing to say" test ! -s out
    mkdir -p again
    cp public/text.txt again/tinyshakespeare.txt
    check "with a mirror after all" env DATA_MIRROR=again TOKENIZE="$tokenize" data/prepare >out 2>err
    check "with a mirror after all: the default" test "$(cat data/default_dataset)" = tinyshakespeare
else
    echo "this machine has too little English text: $(cat err)"
    check "too little local text: said" said "DATA_MIRROR"
fi
check "no work folder is left" test -z "$(ls -d data/cache/work.* 2>/dev/null)"
printf '%d passed, %d failed\n' $passed $failed
((failed == 0))
