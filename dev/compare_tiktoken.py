#!/usr/bin/env python3
"""Compares build/tokenize with tiktoken, for those who doubt that the tokens are the same.

    pip install tiktoken
    python3 dev/compare_tiktoken.py VOCABULARY [TEXT...] [--tokenize PROGRAM] [--strings N] [--seed S]

VOCABULARY is a folder with GPT-2's encoder.json and vocab.bpe (data/gpt2). TEXT are files and folders: each file
(what is not UTF-8 in it dropped) is tokenized whole by both. Then N seeded random strings of many kinds of Unicode,
and every code point there is, alone, between letters, digits and spaces. Prints one table and exits with 1 if a
token differs.
"""
import argparse
import array
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

try:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
except ImportError as error:
    sys.exit(f"{error}: pip install tiktoken")

os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read the files given, not an earlier copy of them

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOT = 50256


def ours(program, vocabulary, documents):
    """The tokens of each document, from the shards that the program writes of them."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "documents.jsonl")
        with open(source, "w", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
        subprocess.run([program, "--gpt2-dir", vocabulary, "--jsonl", "text", "--val-fraction", "0", "--shard-tokens",
                        "2G", "-o", os.path.join(folder, "out"), source], check=True, capture_output=True)
        tokens = array.array("H")
        with open(os.path.join(folder, "out_train_000000.bin"), "rb") as file:
            file.seek(1024)
            tokens.frombytes(file.read())
    result, current = [], []
    for token in tokens:
        if token == EOT:
            result.append(current)
            current = []
        else:
            current.append(token)
    return result + [current]


def ours_of_file(program, vocabulary, text):
    """The same for a file as it lies, which is cut into blocks on the way."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "text.txt"), "wb") as file:
            file.write(text.encode())
        subprocess.run([program, "--gpt2-dir", vocabulary, "--val-fraction", "0", "--shard-tokens", "2G", "-o",
                        os.path.join(folder, "out"), file.name], check=True, capture_output=True)
        tokens = array.array("H")
        with open(os.path.join(folder, "out_train_000000.bin"), "rb") as file:
            file.seek(1024)
            tokens.frombytes(file.read())
    return tokens.tolist()


def random_strings(count, rng):
    scalar = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    classes = {}
    for c in scalar:
        classes.setdefault(unicodedata.category(chr(c)), []).append(chr(c))
    spaces = [*" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"]
    words = ["the", "The", "dog", "'s", "'ll", "'ve", "'re", "'d", "'m", "'t", "'S", "\u2019s", "1984", "3.14", "\n\n",
             "    ", "<|endoftext|>", "e\u0301", "\U0001f468\u200d\U0001f469", "\ud55c\uad6d", "\u0939\u093f\u0928\u094d", "http://", "==", "..."]
    groups = [*classes.values(), spaces, words]
    kinds = [lambda: chr(rng.choice(scalar)), lambda: rng.choice(rng.choice(groups)), lambda: chr(rng.randrange(128)),
             lambda: rng.choice(words), lambda: rng.choice(spaces), lambda: chr(rng.randrange(0x20, 0x3000)),
             lambda: rng.choice(words) + " "]
    for _ in range(count):
        chosen = rng.sample(kinds, rng.randrange(1, 4))
        length = int(rng.expovariate(1 / 12)) + 1
        if rng.random() < 0.001:
            length *= 50
        repeat = rng.choice([1, 1, 1, 4])
        yield "".join(rng.choice(chosen)() * (rng.randrange(repeat) + 1) for _ in range(length))


def code_points():
    for c in range(0x110000):
        if not 0xD800 <= c < 0xE000:
            c = chr(c)
            yield f"{c}a{c}1{c} {c}{c} a{c}a 1{c}1 !{c}!  {c}\n{c}"


def batches(strings, size):
    strings = iter(strings)
    while batch := list(itertools.islice(strings, size)):
        yield batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary")
    parser.add_argument("text", nargs="*")
    parser.add_argument("--tokenize", default=os.path.join(os.path.dirname(__file__), "../build/tokenize"))
    parser.add_argument("--strings", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    ranks = data_gym_to_mergeable_bpe_ranks(f"{args.vocabulary}/vocab.bpe", f"{args.vocabulary}/encoder.json")
    encoding = tiktoken.Encoding("gpt2", explicit_n_vocab=50257, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": EOT})
    print(f"tiktoken {tiktoken.__version__}")
    print(f"{'what':40} {'bytes':>12} {'tokens':>12} {'texts':>9} {'different':>9}")
    all_different = 0

    def row(what, total_bytes, tokens, texts, different, example=""):
        nonlocal all_different
        all_different += different
        print(f"{what[-40:]:40} {total_bytes:12} {tokens:12} {texts:9} {different:9}  {example}", flush=True)

    files = []
    for text in args.text:
        if os.path.isdir(text):
            files += sorted(os.path.join(folder, name) for folder, _, names in os.walk(text) for name in names)
        else:
            files.append(text)
    for path in files:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "ignore")
        if text:
            tokens = encoding.encode_ordinary(text)
            row(path, len(text.encode()), len(tokens), 1, int(ours_of_file(args.tokenize, args.vocabulary, text) != tokens))

    for what, strings in ((f"random strings, seed {args.seed}", random_strings(args.strings, random.Random(args.seed))),
                          ("every code point", code_points())):
        size = count = texts = different = 0
        example = ""
        for batch in batches(strings, 100_000):
            expected = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count())
            got = ours(args.tokenize, args.vocabulary, batch)
            assert len(got) == len(batch), "the program lost a document"
            for text, a, b in zip(batch, expected, got):
                if a != b:
                    different += 1
                    example = example or repr(text)[:60]
            texts += len(batch)
            count += sum(map(len, expected))
            size += sum(len(text.encode()) for text in batch)
        row(what, size, count, texts, different, example)
    sys.exit(all_different > 0)


if __name__ == "__main__":
    main()
