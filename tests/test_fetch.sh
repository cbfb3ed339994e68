#!/usr/bin/env bash
# data/fetch and data/prepare in a folder of their own, with a manifest of their own: tests/test_fetch.sh [PROGRAM],
# PROGRAM being build/tokenize otherwise.
# Needs no network: the addresses are on this machine, or lead nowhere.
set -u
tokenize=$(readlink -f "${1:-$(dirname "$0")/../build/tokenize}")
[[ -x $tokenize ]] || { echo "there is no $tokenize: make build/tokenize"; exit 1; }
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
server=
trap '[[ -n $server ]] && kill $server 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
unset DATA_MIRROR
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
mv data/manifest.tsv data/away
check "no manifest" fails fetch --list
check "no manifest, said" said "data/manifest.tsv cannot be read"
check "no manifest, in one line" test "$(cat out err | wc -l)" = 1
mv data/away data/manifest.tsv
check "no such name" fails fetch nonsense
check "no such name, said" said "nonsense"
check "--list" fetch --list
check "--list shows files" said "sub/text.txt"
check "--list has a line for a range" grep -q 'shard_\[01-03\].bin  *-  0 of 3$' out
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
cp -r mirror ./-m4
rm -rf data/sub
check "a mirror with a name like a flag" env DATA_MIRROR=-m4 data/fetch text >out 2>err
check "a mirror with a name like a flag: said" said "from ./-m4/"
rm -rf data/sub && mkdir -p data/sub/text.txt
check "a folder with a file's name" fails env DATA_MIRROR=mirror data/fetch text >out 2>err
check "a folder with a file's name: said" said "is to be a file, and is none: move it away"
check "a folder with a file's name: nothing is put into it" test -z "$(ls -A data/sub/text.txt)"
rm -rf data/sub ./-m4
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

# --- an archive of which nothing but its form is known
tar -cf public/whole.tar -C public text.txt noise.txt
head -c $((512 + (size + 511) / 512 * 512)) public/whole.tar >public/cut.tar # behind its first file
archive() { printf 'archive\tarchive.tar\ttar\t-\t-\tfile://%s/public/%s.tar\n' "$work" "$1" >data/manifest.tsv; }
archive cut
check "an archive that lacks files at its end" fails fetch archive
check "an archive that lacks files at its end: said" said "it is not a whole tar archive"
archive whole
check "a whole archive" fetch archive
check "a whole archive: it is there" cmp -s data/archive.tar public/whole.tar
rm -f data/archive.tar

# --- sets: a model's files, of which one kind or the other will do
mkdir -p public/hf public/openai
model() { # $1 layers, $2 heads, $3 channels
    printf '{\n  "n_ctx": 1024,\n  "n_embd": %d,\n  "n_head": %d,\n  "n_layer": %d,\n' "$3" "$2" "$1"
    printf '  "task": {"text": {"do_sample": true}},\n  "vocab_size": 50257\n}\n'
}
model 2 4 64 >public/hf/config.json
cat public/text.txt public/noise.txt >public/hf/weights.bin
sed 's/vocab_size/n_vocab/' public/hf/config.json >public/openai/hparams.json
printf 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n' >public/openai/checkpoint
printf 'a table\127\373\200\213\044\165\107\333' >public/openai/tiny.index
head -c 5000 /dev/urandom >public/openai/tiny.data
openai_files="./tiny/checkpoint ./tiny/hparams.json ./tiny/tiny.data ./tiny/tiny.index"
set_lines() { # $1: the address of Hugging Face's set, $2: of OpenAI's, $3: the folder
    printf '%s\t%s-hf %s-openai\tany\t-\t-\t-\n' "$3" "$3" "$3"
    printf '%s-hf\t%s/config.json\tgpt2:2:4:64\t~130\t-\t%s/config.json\n' "$3" "$3" "$1"
    printf '%s-hf\t%s/weights.bin\tfile\t%s\t%s\t%s/weights.bin\n' "$3" "$3" \
        "$(stat -c %s public/hf/weights.bin)" "$(sha public/hf/weights.bin)" "$1"
    printf '%s-openai\t%s/checkpoint\ttfstate\t~77\t-\t%s/checkpoint\n' "$3" "$3" "$2"
    printf '%s-openai\t%s/hparams.json\tgpt2:2:4:64\t~130\t-\t%s/hparams.json\n' "$3" "$3" "$2"
    printf '%s-openai\t%s/tiny.index\ttfindex\t15\t-\t%s/tiny.index\n' "$3" "$3" "$2"
    printf '%s-openai\t%s/tiny.data\ttfdata\t5000\t-\t%s/tiny.data\n' "$3" "$3" "$2"
}
sets() { set_lines "$1" "$2" tiny >data/manifest.tsv; }
hf=file://$work/public/hf openai=file://$work/public/openai none=file://$work/public/none
rm -rf data/sub data/cache/*.part
sets "$hf" "$openai"
check "a set" fetch tiny
check "a set: the first that can be had" only ./tiny/config.json ./tiny/weights.bin
check "a set: the content is checked" said "config.json from $hf/config.json, its content checked (2 layers, 4 heads, 64 channels)"
check "a set: the hash is checked" said "weights.bin, SHA-256 checked"
check "a set: nothing else to say" test ! -s err
check "a set again" fetch tiny
check "a set again: it is there" test "$(grep -c 'is there$' out)" = 2
echo more >>data/tiny/weights.bin
check "a spoilt set" fetch tiny
check "a spoilt set: said" said "tiny/weights.bin is there, but it has"
check "a spoilt set: the bytes" cmp -s data/tiny/weights.bin public/hf/weights.bin
rm -f data/tiny/weights.bin
check "half a set" fetch tiny
check "half a set: what is there stays" said "tiny/config.json is there"
check "half a set: it is whole" cmp -s data/tiny/weights.bin public/hf/weights.bin
check "the other set" fetch tiny-openai
check "the other set: said of the index" said "tiny.index, its format checked (no hash of it is known)"
check "the other set: said of the data" said "each tensor's CRC-32C is checked when it is loaded"
check "--list of sets" fetch --list
check "--list of sets: one of them is here" grep -q 'the first of: tiny-hf tiny-openai  *-  yes$' out
for file in $(cd data && echo tiny/*); do : >"data/$file"; done
check "--list of sets, empty files" fetch --list
check "--list of sets, empty files: none is here" grep -q 'the first of: tiny-hf tiny-openai  *-  no$' out
rm -rf data/tiny
mv public/hf/weights.bin public/hf/away
check "the second set where the first is not whole" fetch tiny
check "the second set, and nothing of the first" only $openai_files
check "the second set: why" said "$hf/weights.bin: "
rm -rf data/tiny
check "one of two sets" fails fetch tiny-hf
check "one of two sets: nothing of it" only
mv public/hf/away public/hf/weights.bin
sets "$hf" "$none"
check "a set that cannot be had" fails fetch tiny-openai
sets "$none" "$none"
check "no set" fails fetch tiny
check "no set: one sentence" said "fetch: cannot get tiny/config.json; tried: $none/config.json; cannot get tiny/checkpoint; tried: $none/checkpoint. Put it"
check "no set: nothing is left" only
sets "$hf" "$openai"
head -c 3000 public/openai/tiny.data >data/cache/tiny_tiny.data.part
check "the set that was begun" fetch tiny
check "the set that was begun goes on" said "going on with 3000 bytes"
check "the set that was begun is whole" only $openai_files
rm -rf data/tiny
cp public/hf/weights.bin public/openai/tiny.data data/cache
mv data/cache/weights.bin data/cache/tiny_weights.bin.part
mv data/cache/tiny.data data/cache/tiny_tiny.data.part
check "parts of two sets" fetch tiny
check "parts of two sets: one is taken" said "weights.bin from an earlier download, SHA-256 checked"
check "parts of two sets: the other is gone" only ./tiny/config.json ./tiny/weights.bin
rm -rf data/tiny

# what is wrong with a file without a hash
wrong() { # $1: the set, $2: the file, $3: what must be said; the content from stdin
    mv "public/$2" public/right
    cat >"public/$2"
    check "$2: $3" fails fetch "$1"
    check "$2: $3: said" said "$2: $3"
    mv public/right "public/$2"
}
wrong tiny-hf hf/config.json "its n_embd is not 64" < <(model 2 4 128)
wrong tiny-hf hf/config.json "its n_layer is not 2" < <(model 12 4 64)
wrong tiny-hf hf/config.json "its n_vocab is not 50257" < <(model 2 4 64 | sed s/50257/50304/)
wrong tiny-hf hf/config.json "it is not a JSON object" < <(model 2 4 64 | head -c -3)
wrong tiny-openai openai/hparams.json "it is not a JSON object" < <(echo '<html>{"n_layer": 2}</html>')
wrong tiny-openai openai/checkpoint "it does not name model.ckpt" < <(echo 'model_checkpoint_path: "other.ckpt"')
wrong tiny-openai openai/tiny.index "it is not the index of a TensorFlow checkpoint" < <(head -c 15 public/text.txt)
wrong tiny-openai openai/tiny.data "it has 4999 bytes instead of 5000" < <(head -c 4999 public/text.txt)
check "wrong files leave nothing" only

# mirrors: of many files of these names, the right ones; and whichever set there is, without a word on the other
mkdir -p many/a many/b many/models--x--tiny/snapshots/c
model 12 12 768 >many/a/config.json
sed 's/true/false/' public/hf/config.json >many/b/config.json
cp public/hf/config.json many/models--x--tiny/snapshots/c/
tac public/hf/weights.bin | head -c "$(stat -c %s public/hf/weights.bin)" >many/a/weights.bin
cp public/hf/weights.bin many/b/
sets "$none" "$openai"
check "a mirror with many models" env DATA_MIRROR=many/ data/fetch tiny >out 2>err
check "a mirror with many models: the one that is called so" cmp -s data/tiny/config.json public/hf/config.json
check "a mirror with many models: the hash decides" cmp -s data/tiny/weights.bin public/hf/weights.bin
check "a mirror with many models: no word on the others" test ! -s err
rm -rf data/tiny many/models*
check "a mirror that calls it otherwise" env DATA_MIRROR=many data/fetch tiny >out 2>err
check "a mirror that calls it otherwise: the one that fits" cmp -s data/tiny/config.json many/b/config.json
rm -rf data/tiny many
mkdir -p many/x
cp public/openai/* many/x/
cp public/hf/config.json many/x/
sets "$hf" "$openai"
check "a mirror with one set" env DATA_MIRROR=many data/fetch tiny >out 2>err
check "a mirror with one set: before the addresses" only $openai_files
check "a mirror with one set: no word on the other" test ! -s err
rm -rf data/tiny many/x/tiny.data
check "a mirror with half a set" env DATA_MIRROR=many data/fetch tiny >out 2>err
check "a mirror with half a set: then the addresses" only ./tiny/config.json ./tiny/weights.bin
check "a mirror with half a set: said" said "many: there is no weights.bin in it"
rm -rf data/tiny many
mkdir -p many/some/where
cp public/hf/* many/some/where/
sets "http://127.0.0.1:1/some/where" "$none"
check "a mirror URL with an address's paths" env DATA_MIRROR="file://$work/many" data/fetch tiny >out 2>err
check "a mirror URL with an address's paths: it is whole" only ./tiny/config.json ./tiny/weights.bin
rm -rf data/tiny many

# names that several files have
{ set_lines "$hf" "$openai" tiny; set_lines "$hf" "$openai" small; } >data/manifest.tsv
check "a file of several sets" fails fetch config.json
check "a file of several sets: which" said "several files are called config.json: name one with its folder (tiny/config.json small/config.json)"
check "a file of several sets, with its folder" fetch small/config.json
check "a file of several sets, with its folder: only it" only ./small/config.json
rm -rf data/small

# --- the disk is too small
printf 'big\tbig.bin\tfile\t9000000000000000\t-\t%s\n' "$url" >data/manifest.tsv
check "too large a file" fails fetch big
check "too large a file: said" said "big.bin needs 9000000000 MB more, and the disk of "
check "too large a file: not begun" only
printf 'any\tbig\tany\t-\t-\t-\n' >>data/manifest.tsv
check "too large a set" fails fetch any
check "too large a set: said" grep -q "big.bin needs .* MB left$" err

# --- two at once
if command -v flock >/dev/null; then
    sets "$hf" "$openai"
    flock data/cache/lock sleep 0.5 &
    sleep 0.1
    check "two at once" fetch tiny-openai
    check "two at once: said" said "another data/fetch is at work"
    wait
    rm -rf data/tiny
fi

# --- a server that breaks off in the middle
if command -v python3 >/dev/null; then
    rm -rf data/sub
    cat >server.py <<'END'
import http.server, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if not os.path.isfile("public" + self.path):
            return self.send_error(404)
        content = open("public" + self.path, "rb").read()
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if first and first >= len(content):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) - ("twice" in self.path) * 41600 if first == 40000 else len(content) if first else 40000
        if "slow" in self.path:
            self.wfile.write(content[first:200])
            self.wfile.flush()
            time.sleep(1.8)
            first = 200
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
    rm -rf data/sub
    cat public/text.txt public/noise.txt >data/cache/sub_text.txt.part
    check "a part beyond the end" fails fetch text
    check "a part beyond the end is begun anew" test "$(stat -c %s data/cache/sub_text.txt.part)" = 40000
    sed -i 's/text.txt$/gone.txt/' data/manifest.tsv
    check "a file that is gone" fails fetch text
    check "a file that is gone leaves the part" test "$(stat -c %s data/cache/sub_text.txt.part)" = 40000
    sed -i 's/gone.txt$/text.txt/' data/manifest.tsv
    cp public/text.txt public/twice.txt
    rm -f requests data/cache/*.part
    sed -i 's/text.txt$/twice.txt/' data/manifest.tsv
    check "a connection that breaks twice" fails fetch text
    check "a connection that breaks twice, the second time" fails fetch text
    check "a connection that breaks twice, with 41600 bytes to come: they alone are left" \
        test "$(stat -c %s data/cache/sub_text.txt.part)" = $((size - 41600))
    check "a connection that breaks twice, the third time" fetch text
    check "a connection that breaks twice: the bytes" cmp -s data/sub/text.txt public/text.txt
    rm -rf data/sub
    : >public/empty.txt
    rm -f requests data/cache/*.part
    manifest "http://127.0.0.1:$(cat port)/empty.txt"
    check "an empty answer" fails fetch text
    check "an empty answer: said" said "empty.txt: nothing came"
    if python3 -m pip --version >/dev/null 2>&1; then
        mkdir wheels
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=$work/wheels
        manifest "http://127.0.0.1:$(cat port)/text.txt pypi:gift==1.0:gift/text.txt"
        check "a broken connection, and no package" fails fetch text
        check "a broken connection, and no package: the part stays" test "$(stat -c %s data/cache/sub_text.txt.part)" = 40000
        python3 - <<'END'
import zipfile
with zipfile.ZipFile("wheels/gift-1.0-py3-none-any.whl", "w") as wheel:
    wheel.write("public/text.txt", "gift/text.txt")
    wheel.writestr("gift-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: gift\nVersion: 1.0\n")
    wheel.writestr("gift-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("gift-1.0.dist-info/RECORD", "")
END
        manifest "http://127.0.0.1:$(cat port)/empty.txt pypi:gift==1.0:gift/text.txt"
        check "an empty answer, and then a package, beside a part" fetch text
        check "an empty answer, and then a package: the bytes" cmp -s data/sub/text.txt public/text.txt
        check "an empty answer, and then a package: no part is left" test ! -e data/cache/sub_text.txt.part
        unset PIP_NO_INDEX PIP_FIND_LINKS
        rm -rf data/sub
    fi
    manifest "http://127.0.0.1:$(cat port)/text.txt"
    cp public/shard_01.bin public/slow_shard.bin
    printf 'slow\tslow.bin\tshard\t-\t-\thttp://127.0.0.1:%s/slow_shard.bin\n' "$(cat port)" >>data/manifest.tsv
    if command -v script >/dev/null; then
        check "a terminal" script -qec "data/fetch slow" /dev/null >out 2>err
        check "a terminal: progress" said "  slow.bin: 0 MB, 0 MB/s"
        check "a terminal: the result" said "slow.bin from http"
        rm -f data/slow.bin
    fi

    # A set (see below) whose weights break off: nothing of it is named, nor is another begun; then it goes on.
    sets "http://127.0.0.1:$(cat port)/hf" "file://$work/public/openai"
    rm -f requests data/cache/*.part
    check "a broken set" fails fetch tiny
    check "a broken set: said" said "40000 bytes of it have come: run this again, and it goes on."
    check "a broken set: only its parts are there" only ./cache/tiny_config.json.part ./cache/tiny_weights.bin.part
    check "a broken set: the next time" fetch tiny
    check "a broken set: it is whole" only ./tiny/config.json ./tiny/weights.bin
    check "a broken set: the bytes" cmp -s data/tiny/weights.bin public/hf/weights.bin
    check "a broken set: only the rest was asked for" test "$(xargs <requests)" = "0 0 40000"
    rm -rf data/tiny
    check "a broken set again" fails fetch tiny
    kill $server
    wait $server 2>/dev/null
    server=
    check "the other set where the first cannot be reached" fetch tiny
    check "the other set, and no part of the first" only $openai_files
    rm -rf data/tiny data/sub
    manifest "http://127.0.0.1:$(cat port)/text.txt"
    check "a server that is not there" fails fetch text
    check "a server that is not there leaves nothing" only
    head -c 50000 public/text.txt >data/cache/sub_text.txt.part
    check "a server that is not there, and a part" fails fetch text
    check "a server that is not there leaves the part" only ./cache/sub_text.txt.part
    rm -f data/cache/*.part
fi

# --- files without a hash: their format is checked, and the output says so
manifest "$url"
check "a shard" fetch shard_01.bin
check "a shard: said" said "no hash of it is known"
check "a shard cut short" fails fetch shard_02.bin
check "a shard cut short: said" said "but a shard of its 100 tokens has 1224"
check "a shard with another magic" fails fetch shard_03.bin
check "a shard with another magic: said" said "it is not a token shard"
rm -f data/shard_01.bin
check "a group fails if one file does" fails fetch shards
check "and has the others" only ./shard_01.bin
check "--list then" fetch --list
check "--list counts those of a range that are here" grep -q 'shard_\[01-03\].bin  *-  1 of 3$' out
rm -f data/shard_01.bin

# --- the manifest of the repository itself
cp "$repository/data/manifest.tsv" data/
check "the manifest: --list" fetch --list
check "the manifest: 103 training shards" grep -q 'fineweb_train_\[000001-000103\].bin  *-  0 of 103$' out
check "the manifest: --list fits 80 columns" awk 'length > 80 {exit 1}' out
check "the manifest: six columns" awk -F'\t' 'NF != 6 {exit 1}' data/manifest.tsv
check "the manifest: hashes and sizes" awk -F'\t' '!/^#/ && !($4 ~ /^(~?[0-9]+|-)$/ && $5 ~ /^([0-9a-f]+|-)$/ && length($5) ~ /^(1|64)$/) {exit 1}' data/manifest.tsv
check "the manifest: four models in two sets" test "$(awk -F'\t' '$3 == "any" {print $2}' data/manifest.tsv | xargs -n 1 | while read -r name; do grep -q "^$name	" data/manifest.tsv && echo .; done | wc -l)" = 8
# TensorFlow's data are 4 bytes for each parameter of the size that hparams.json must have.
check "the manifest: the weights' sizes" awk -F'\t' '
    $2 ~ /hparams/ {split($3, k, ":"); l = k[2]; c = k[4]; n[$1] = (50257 + 1024) * c + l * (12 * c * c + 13 * c) + 2 * c}
    $3 == "tfdata" {checked += $4 == 4 * n[$1]}
    END {exit checked != 4}' data/manifest.tsv

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
    DATA_MIRROR=again prepare
    check "with a mirror that has nothing: the default stays" test "$(cat data/default_dataset)" = localtext
    sleep 0.01
    cp public/text.txt again/tinyshakespeare.txt
    check "with a mirror after all" env DATA_MIRROR=again TOKENIZE="$tokenize" data/prepare >out 2>err
    check "with a mirror after all: the default" test "$(cat data/default_dataset)" = tinyshakespeare
    rm -rf data/tinyshakespeare* data/default_dataset
    prepare
    cp public/text.txt data/tinyshakespeare.txt
    check "with the text there by hand, after it could not be got" prepare
    check "with the text there by hand: the default" test "$(cat data/default_dataset)" = tinyshakespeare
else
    echo "this machine has too little English text: $(cat err)"
    check "too little local text: said" said "DATA_MIRROR"
fi
check "no work folder is left" test -z "$(ls -d data/cache/work.* 2>/dev/null)"
finish
