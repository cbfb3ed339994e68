#!/usr/bin/env python3
"""Checks what infer_gpt2cpu computes against transformers and a float64 model that is written here.

    make infer_gpt2cpu train_gpt2cpu
    python3 dev/check_infer.py                         # four small random GPT-2s that transformers writes
    python3 dev/check_infer.py -e log/run1             # any model that our -e takes

The random models have head sizes of 16, 40, 64 and 128, scores and logits with a standard deviation above 1, so that
attention has something to choose and the next token is no coin toss, and a vocabulary of bytes and frequent pairs of
bytes. The text is README.md. Everything runs on the CPU, ours and transformers' in fp32.

    losses      --eval: dense against GPT2LMHeadModel; top k, recent, and first + recent, renormalized and not, against
                the float64 model, which takes torch.topk of whole rows. Random keys are others in each program: the
                mean kept mass against the mean of k / n, in standard errors, and the loss against 24 draws made here,
                in their standard deviations
    text        --greedy: dense against transformers' generate(), -k K and a context that is full against the float64
                model; pages with epsilon 0, which is dense attention; prompts alone and side by side. Texts
                are compared up to the first token whose logit is within 1e-4 of the next one's
    LAMBADA     lines whose last word is the text's or, where it is a word, the model's most likely token: the summed
                log-probability (the log of the perplexity) and the number of right words. A word counts as unsure if a
                logit within 1e-4 of its own decides
    report      --report: each number of each head; counts of keys against those for a share 1e-5 more and less

Relative differences of a head's numbers are of the number itself or of a thousandth of the largest head's, whichever is
larger. One line a comparison; exit status 1 if one is over its bound. Installs its libraries as compare_formats.py
does, into the same environment. -e needs train_gpt2cpu as well, for transformers opens what it exports; the float64
model takes 8 bytes a parameter.
"""
import argparse
import collections
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile

from compare_formats import (HERE, SEED, Failed, default_environment, enter_environment, quiet_transformers, run_ours,
                             write_tokens)

MODELS = [(2, 4, 64, 128), (3, 3, 120, 160), (4, 2, 128, 192), (2, 1, 128, 128)]  # L, NH, C, context
CUTS = [1, 2, 5, 16, 50]
REPORT_KS = [1, 2, 4, 8, 16, 32, 64]
BOUND = 1e-4
UNSURE = 1e-4  # of logits
NEW_TOKENS = 64


# ---- Models and vocabularies ----

def byte_alphabet():
    """GPT-2's character for each byte, in the order of its token ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_vocabulary(folder, text):
    """A vocabulary of bytes and the 243 most frequent pairs of bytes within a word; its size."""
    alphabet = byte_alphabet()
    words = re.findall(r" ?[A-Za-z]+", text)
    pairs = collections.Counter(word[i:i + 2] for word in words for i in range(len(word) - 1))
    merges = [tuple(alphabet[ord(c)] for c in pair) for pair, _ in pairs.most_common(243)]
    tokens = [*alphabet.values(), *map("".join, merges), "<|endoftext|>"]
    with open(f"{folder}/vocab.json", "w", encoding="utf-8") as file:
        json.dump({token: i for i, token in enumerate(tokens)}, file)
    with open(f"{folder}/merges.txt", "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return len(tokens)


def make_model(folder, sizes, text):
    """transformers' GPT-2 with random weights: see the head of this file."""
    import torch
    transformers = quiet_transformers()
    layers, heads, channels, context = sizes
    os.mkdir(folder)
    vocabulary = write_vocabulary(folder, text)
    torch.manual_seed(SEED)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=layers, n_head=heads, n_embd=channels, n_positions=context, vocab_size=vocabulary,
        bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.normal_(std=2 / channels**0.5)
            else:
                parameter.normal_(std=1 / parameter.shape[0]**0.5)
            if name.endswith("c_attn.weight"):
                parameter[:, :2 * channels] *= 1.5
    model.save_pretrained(folder)


class Vocabulary:
    """Text to tokens with transformers' tokenizer, and tokens to bytes."""

    def __init__(self, folder, size):
        self.tokenizer = None
        if os.path.exists(f"{folder}/vocab.json"):
            self.tokenizer = quiet_transformers().GPT2Tokenizer.from_pretrained(folder)
            self.end = self.tokenizer.eos_token_id
            with open(f"{folder}/vocab.json", encoding="utf-8") as file:
                self.words = {i: word for word, i in json.load(file).items()}
            self.bytes_of = {character: byte for byte, character in byte_alphabet().items()}
        elif size == 257:
            self.end = 256
        else:
            sys.exit("There is no vocabulary beside the model: data/fetch gpt2 gets GPT-2's.")

    def encode(self, text):
        return self.tokenizer.encode(text) if self.tokenizer else list(text.encode())

    def decode(self, tokens):
        if not self.tokenizer:
            return bytes(token for token in tokens if token < 256)
        return b"".join(bytes(self.bytes_of[c] for c in self.words[token]) for token in tokens)


class Reference:
    """GPT-2 from its definition in float64, with the rows of attention cut."""

    def __init__(self, folder):
        from safetensors import safe_open
        with open(f"{folder}/config.json") as file:
            config = json.load(file)
        self.layers, self.heads = config["n_layer"], config["n_head"]
        self.context, self.vocabulary = config["n_positions"], config["vocab_size"]
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            self.weights = {name.removeprefix("transformer."): file.get_tensor(name).double() for name in file.keys()}

    def logits(self, x, cut="dense", k=0, renormalize=True, kept=None, look=None):
        """[B,T,V] of x [B,T]. kept: a list for each layer's kept mass [B,NH,T]; look(scores, p, v) sees each layer."""
        import torch
        from torch.nn import functional
        w, (B, T) = self.weights, x.shape
        C = w["wte.weight"].shape[1]

        def norm(h, name):
            return functional.layer_norm(h, (C,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        def linear(h, name):
            return h @ w[f"{name}.weight"] + w[f"{name}.bias"]

        i, j = torch.arange(T)[:, None], torch.arange(T)
        h = w["wte.weight"][x] + w["wpe.weight"][:T]
        for layer in range(self.layers):
            q, key, v = (linear(norm(h, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
                         .view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4))
            scores = (q @ key.transpose(-1, -2) / (C // self.heads)**0.5).masked_fill(j > i, -math.inf)
            p = scores.softmax(-1)
            if look:
                look(scores, p, v)
            if cut != "dense":
                if cut == "recent":
                    keep = j > i - k
                elif cut == "first_recent":
                    keep = (j == 0) | (j > i - k + 1)
                else:
                    ranks = scores if cut == "topk" else torch.rand_like(scores).masked_fill(j > i, -1)
                    best = ranks.topk(min(k, T), -1).indices
                    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
                keep = (keep & (j <= i)).expand_as(scores)
                mass = torch.where(keep, p, 0).sum(-1)
                if kept is not None:
                    kept.append(mass)
                # the softmax of the kept scores: kept keys with next to no mass would be divided by it
                p = scores.masked_fill(~keep, -math.inf).softmax(-1) * (1 if renormalize else mass[..., None])
            h = h + linear((p @ v).transpose(1, 2).reshape(B, T, C), f"h.{layer}.attn.c_proj")
            a = functional.gelu(linear(norm(h, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), approximate="tanh")
            h = h + linear(a, f"h.{layer}.mlp.c_proj")
        return norm(h, "ln_f") @ w["wte.weight"].T

    def loss(self, batches, *how):
        """The mean over batches of the cross-entropy and of the mass kept by rows with more than k keys."""
        from torch.nn import functional
        losses, masses = [], []
        for x, y in batches:
            kept = []
            losses.append(functional.cross_entropy(self.logits(x, *how, kept=kept).flatten(0, 1), y.flatten()).item())
            if kept:
                rows = [mass[..., how[1]:].mean().item() for mass in kept]
                masses.append(sum(rows) / len(rows))
        return mean(losses), mean(masses) if masses else 1.0

    def greedy(self, prompt, count, end, *how):
        """Up to `count` tokens, and how many of them are sure. A full context goes on with its second half."""
        import torch
        text, begin, made, sure = list(prompt), 0, [], None
        for _ in range(count):
            if len(text) - begin > self.context:
                begin = len(text) - self.context // 2
            (first, second), (token, _) = self.logits(torch.tensor([text[begin:]]), *how)[0, -1].topk(2)
            if first - second < UNSURE and sure is None:
                sure = len(made)
            if token == end:
                break
            made.append(token.item())
            text.append(token.item())
        return made, sure


def mean(numbers):
    return sum(numbers) / len(numbers)


# ---- Our program ----

def ours(*command):
    """What our program prints."""
    process = subprocess.run([*command, "--device", "cpu", "--precision", "fp32"], stdin=subprocess.DEVNULL,
                             capture_output=True)
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip() or "nothing"
        raise Failed(f"our program ended with status {process.returncode} and said: {said.splitlines()[-1]}")
    return process.stdout


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ---- Comparisons ----

class Table:
    def __init__(self):
        self.failed = 0
        print(f"{'what':44} {'compared':>22} {'difference':>10} {'bound':>8}  result", flush=True)

    def row(self, what, compared, difference, bound):
        failed = not difference <= bound  # a NaN fails
        self.failed += failed
        print(f"{what:44} {compared:>22} {difference:10.2g} {bound:8.2g}  {'FAIL' if failed else 'pass'}", flush=True)


def relative(a, b):
    return abs(a - b) / abs(b)


class Check:
    """One model: its folder for transformers, and what our program calls it."""

    def __init__(self, table, args, name, folder, work, text):
        import torch
        self.table, self.args, self.name, self.work, self.text = table, args, name, work, text
        self.reference = Reference(folder)
        if self.reference.weights["wte.weight"].shape[1] < 512:
            torch.set_num_threads(1)  # with small matrices threads mostly wait for one another
        self.vocabulary = Vocabulary(folder, self.reference.vocabulary)
        self.theirs = quiet_transformers().GPT2LMHeadModel.from_pretrained(folder).eval()
        self.T = min(args.context, self.reference.context)
        self.tokens = self.vocabulary.encode(text)

    def batches(self):
        """[(x, y)]: the first windows of the shard, as --eval and --report read them."""
        import torch
        B, T, m = self.args.batch, self.T, self.args.batches
        if len(self.tokens) <= m * B * T:
            raise Failed(f"the text has {len(self.tokens)} tokens, too few for {m} batches of {B} x {T}")
        shape = (m, B, T)
        x = torch.tensor(self.tokens[:m * B * T]).view(shape)
        y = torch.tensor(self.tokens[1:m * B * T + 1]).view(shape)
        return list(zip(x, y))

    def measure(self, *flags):
        ours(self.args.program, "-e", self.name, "-b", str(self.args.batch), "-t", str(self.T), "-m",
             str(self.args.batches), *flags)

    def shard(self):
        """The text's tokens as a shard; write_tokens fills in the header."""
        path = f"{self.work}/text.bin"
        write_tokens(path, self.reference.vocabulary, len(self.tokens))
        with open(path, "r+b") as file:
            file.seek(1024)
            file.write(b"".join(token.to_bytes(2, "little") for token in self.tokens))
        return path

    def losses(self):
        import torch
        from torch.nn import functional
        batches = self.batches()
        cuts = [k for k in CUTS if k < self.T]
        self.measure("--eval", self.shard(), "--cuts", ",".join(map(str, cuts)), "--json", f"{self.work}/eval.json")
        got = read_json(f"{self.work}/eval.json")["eval"]
        tokens = f"{sum(x.numel() for x, _ in batches)} tokens"

        logits, dense = 0.0, []
        for x, y in batches:
            theirs = self.theirs(x).logits
            wanted = self.reference.logits(x)
            logits = max(logits, ((theirs - wanted).abs().max() / wanted.abs().max()).item())
            dense.append(functional.cross_entropy(theirs.flatten(0, 1), y.flatten()).item())
        self.table.row("logits: transformers and the float64 model", tokens, logits, BOUND)
        self.table.row("dense loss", tokens, relative(got["dense"]["loss"], mean(dense)), BOUND)

        found = {(cut["cut"], cut["renormalized"], cut["k"]): cut for cut in got["cuts"]}
        for cut in ("topk", "recent", "first_recent"):
            for renormalize in (True, False):
                loss, kept = 0.0, 0.0
                for k in cuts:
                    wanted_loss, wanted_kept = self.reference.loss(batches, cut, k, renormalize)
                    loss = max(loss, relative(found[cut, renormalize, k]["loss"], wanted_loss))
                    kept = max(kept, abs(found[cut, renormalize, k]["kept"] - wanted_kept))
                label = f"{cut}, {'renormalized' if renormalize else 'as they are'}"
                self.table.row(f"{label}: loss", f"k = {','.join(map(str, cuts))}", loss, BOUND)
                self.table.row(f"{label}: kept mass", f"k = {','.join(map(str, cuts))}", kept, BOUND)

        torch.manual_seed(SEED)
        errors = 0.0
        for renormalize in (True, False):
            for k in cuts:
                # a row keeps k / n on average, of k keys out of n without replacement, with this variance
                n, squares = torch.arange(k + 1, self.T + 1), []
                share = k / n
                for x, _ in batches:
                    self.reference.logits(x, "random", k, renormalize,
                                          look=lambda scores, p, v: squares.append(p.square().sum(-1)[..., k:]))
                variance = share * (1 - share) * n / (n - 1) * (torch.stack(squares) - 1 / n)
                error = found["random", renormalize, k]["kept"] - share.mean()
                errors = max(errors, (error.abs() / (variance.mean() / variance.numel()).sqrt()).item())
        self.table.row("random: kept mass, in standard errors", f"k = {','.join(map(str, cuts))}", errors, 5)
        k, errors = cuts[len(cuts) // 2], 0.0
        for renormalize in (True, False):
            draws = torch.tensor([self.reference.loss(batches, "random", k, renormalize)[0] for _ in range(24)])
            errors = max(errors, abs(found["random", renormalize, k]["loss"] - draws.mean()) / draws.std())
        self.table.row("random: loss, in standard deviations", f"k = {k}, 24 draws", float(errors), 6)

    def prompts(self):
        words = [word for word in self.text.split() if re.fullmatch("[A-Za-z]+", word)]
        return [" ".join(words[20 * i:20 * i + 2 + i]) for i in range(12)]

    def generate(self, prompt, count, *flags):
        """The bytes that our program continues a prompt with."""
        text = ours(self.args.program, "-e", self.name, "-p", prompt, "-n", str(count), "--greedy", *flags)
        if not (text.startswith(prompt.encode()) and text.endswith(b"\n")):
            raise Failed(f"our program does not print the prompt {prompt!r} and what follows it")
        return text[len(prompt):-1]

    def generate_together(self, prompts, *flags):
        """The same, for prompts in a file."""
        with open(f"{self.work}/prompts.txt", "w") as file:
            file.write("\n".join(prompts))
        rest = ours(self.args.program, "-e", self.name, "-f", f"{self.work}/prompts.txt", "-n", str(NEW_TOKENS),
                    "--greedy", *flags)
        texts = []
        for prompt, after in zip(prompts, [f"\n\n[{prompt}]" for prompt in prompts[1:]] + ["\n"]):
            begin = len(prompt) + 2
            end = rest.index(after.encode(), begin) if after != "\n" else len(rest) - 1
            texts.append(rest[begin:end])
            rest = rest[end + 2:]
        return texts

    def same(self, what, got, wanted):
        """One row for texts: how many are others than wanted [(tokens, how many are sure)]."""
        wrong = []
        for text, (tokens, sure) in zip(got, wanted):
            want = self.vocabulary.decode(tokens[:sure])
            if text[:len(want)] != want or (sure is None and text != want):
                at = len(os.path.commonprefix([text, want]))
                wrong.append(f"    after {at} bytes ours goes on {text[at:at + 20]}, and should {want[at:at + 20]}")
        tokens = sum(len(tokens[:sure]) for tokens, sure in wanted)
        kinds = len({token for tokens, _ in wanted for token in tokens})
        self.table.row(what, f"{tokens} tokens, {kinds} kinds", len(wrong), 0)
        print("".join(f"{line}\n" for line in wrong), end="", flush=True)

    def texts(self):
        import torch
        prompts, end = self.prompts(), self.vocabulary.end
        ids = [self.vocabulary.encode(prompt) for prompt in prompts]
        dense = []
        for prompt in ids:
            x = torch.tensor([prompt])
            out = self.theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=NEW_TOKENS, do_sample=False,
                                       eos_token_id=end, pad_token_id=end, output_logits=True,
                                       return_dict_in_generate=True)
            gaps = [(two[0] - two[1]).item() for two in (logits[0].topk(2).values for logits in out.logits)]
            sure = next((i for i, gap in enumerate(gaps) if gap < UNSURE), None)
            dense.append(([token for token in out.sequences[0, len(prompt):].tolist() if token != end], sure))
        self.same("greedy: 12 prompts alone", [self.generate(prompt, NEW_TOKENS) for prompt in prompts], dense)
        self.same("greedy: 3 prompts side by side", self.generate_together(prompts[:3]), dense[:3])
        self.same("greedy: 12 prompts side by side", self.generate_together(prompts), dense)
        self.same("greedy: pages, epsilon 0",
                  [self.generate(prompt, NEW_TOKENS, "--attention", "pages", "--epsilon", "0")
                   for prompt in prompts[:3]], dense[:3])
        for k in (1, 4, 16):
            wanted = [self.reference.greedy(prompt, NEW_TOKENS, end, "topk", k) for prompt in ids[:3]]
            self.same(f"greedy, -k {k}: 3 prompts alone",
                      [self.generate(prompt, NEW_TOKENS, "-k", str(k)) for prompt in prompts[:3]], wanted)
            self.same(f"greedy, -k {k}: 3 prompts side by side",
                      self.generate_together(prompts[:3], "-k", str(k)), wanted)
        if self.reference.context <= 256:
            count = self.reference.context + 40
            for label, flags, how in (("greedy", [], []), ("greedy, -k 4", ["-k", "4"], ["topk", 4])):
                self.same(f"{label}: more than the context holds", [self.generate(prompts[0], count, *flags)],
                          [self.reference.greedy(ids[0], count, end, *how)])

    def lambada_lines(self):
        """Texts and how many of them end in the model's most likely token."""
        import torch
        words = [word for word in self.text.split() if re.fullmatch("[A-Za-z]+", word)]
        usual, favourites = [], []
        for i in range(300):
            begin, count = 7 * i % (len(words) - 90), 3 + i * 5 % 80
            context, word = " ".join(words[begin:begin + count]), " " + words[begin + count]
            if len(usual) < 30:
                usual.append(context + ("  " if i % 7 == 3 else "") + word)
                continue
            ids = self.vocabulary.encode(context)
            token = self.theirs(torch.tensor([ids[-self.T:]])).logits[0, -1].argmax().item()
            word = self.vocabulary.decode([token]).decode(errors="replace")
            if re.fullmatch(" [A-Za-z]+", word) and self.vocabulary.encode(context + word) == ids + [token]:
                favourites.append(context + word)
            if len(favourites) == 20:
                break
        return usual + favourites

    def lambada(self):
        import torch
        lines, k = self.lambada_lines(), 4
        with open(f"{self.work}/lambada.jsonl", "w") as file:
            file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
        self.measure("--lambada", f"{self.work}/lambada.jsonl", "-k", str(k), "--json", f"{self.work}/lambada.json")
        got = read_json(f"{self.work}/lambada.json")["lambada"]
        for name, label, logits in (("dense", "dense", lambda x: self.theirs(x).logits.double()),
                                    ("topk", f"top {k}", lambda x: self.reference.logits(x, "topk", k))):
            total, right, unsure = 0.0, 0, 0
            for line in lines:
                before = line[:line.rindex(" ")].rstrip()
                tokens = self.vocabulary.encode(line)
                scored = len(tokens) - len(self.vocabulary.encode(before))
                tokens = torch.tensor(tokens[-(self.T + 1):])
                rows, targets = logits(tokens[None, :-1])[0, -scored:], tokens[-scored:, None]
                total += rows.log_softmax(-1).gather(-1, targets).sum().item()
                others = rows.scatter(-1, targets, -math.inf).max(-1).values
                lead = (rows.gather(-1, targets)[:, 0] - others).min().item()
                right += lead > 0
                unsure += abs(lead) < UNSURE
            n = len(lines)
            self.table.row(f"LAMBADA, {label}: log-probability", f"{n} texts",
                           relative(math.log(got[name]["perplexity"]), -total / n), BOUND)
            self.table.row(f"LAMBADA, {label}: right words", f"{right} of {n}",
                           abs(round(got[name]["accuracy"] * n) - right), unsure)

    def report(self):
        import torch
        batches, k = self.batches(), 4
        self.measure("--report", f"{self.work}/report", "-j", self.shard(), "-k", str(k), "--cuts", "1")
        got = read_json(f"{self.work}/report/report.json")
        L, NH, T = self.reference.layers, self.reference.heads, self.T
        layers = [[] for _ in range(L)]
        for x, _ in batches:
            seen = iter(layers)
            self.reference.logits(x, look=lambda *layer: next(seen).append(row_numbers(*layer, k)))
        wanted, bands, positions = [], [], []
        for parts in layers:
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            for head in range(NH):
                of_head = {name: values[:, head] for name, values in rows.items()}
                wanted.append(head_numbers(of_head, k))
                bands.append({f"keys{share}": [of_head[f"{edge}{share}"].mean().item() for edge in ("least", "most")]
                              for share in (90, 95, 99)})
            for begin in range(0, T, 16):
                mass = rows["mass_k"][..., max(begin, k):begin + 16]
                positions.append(mass.mean().item() if mass.numel() else None)

        def flat(head):
            numbers = dict(head)
            for name in ("mass", "mass_nosink"):
                numbers |= {f"{name}{x}": value for x, value in enumerate(numbers.pop(name))}
            for name in ("tau", "error", "error_relative"):
                numbers |= {f"{name} {key}": value for key, value in numbers.pop(name).items()}
            return numbers

        heads = [flat(head) for head in got["heads"]]
        assert [(head["layer"], head["head"]) for head in heads] == [(l, h) for l in range(L) for h in range(NH)]

        def compare(names):
            largest = 0.0
            for name in names:
                pairs = [(head[name], want[name]) for head, want in zip(heads, wanted)]
                if any((a is None) != (b is None) for a, b in pairs):
                    return math.inf
                pairs = [pair for pair in pairs if pair[1] is not None]
                floor = 1e-3 * max((abs(b) for _, b in pairs), default=1)
                largest = max([largest, *(abs(a - b) / max(abs(b), floor) for a, b in pairs)])
            return largest

        compared = f"{L * NH} heads, k = {k}"
        for label, names in (("mass", [f"mass{x}" for x in range(7)]),
                             ("mass without key 0", [f"mass_nosink{x}" for x in range(7)]),
                             ("entropy, participation", ["entropy", "participation"]),
                             ("first, self, previous", ["first", "self", "previous"]),
                             ("largest score", ["max_score"]),
                             *((name, [f"{name} {q}" for q in ("mean", "q50", "q90", "q99", "max")])
                               for name in ("tau", "error", "error_relative"))):
            self.table.row(f"report: {label}", compared, compare(names), BOUND)
        outside = max(max(least - head[name], head[name] - most, 0)
                      for head, band in zip(heads, bands) for name, (least, most) in band.items())
        self.table.row("report: keys90, keys95, keys99", compared, outside, 1e-6)
        pairs = list(zip([mass for layer in got["mass_by_position"]["mass"] for mass in layer], positions, strict=True))
        different = any((a is None) != (b is None) for a, b in pairs)
        self.table.row("report: mass by position", f"{len(pairs)} means", math.inf if different else max(
            abs(a - b) for a, b in pairs if b is not None), BOUND)

        shown, maps = batches[0][0][:1, :len(got["maps"][0]["rows"])], []  # the pictures are of the first tokens
        self.reference.logits(shown, look=lambda scores, p, v: maps.append(p[0]))
        difference = max(abs(a - b) for drawn in got["maps"]
                         for i, (row, want) in enumerate(zip(drawn["rows"], maps[drawn["layer"]][drawn["head"]],
                                                             strict=True))
                         for a, b in zip(row, want[:i + 1].tolist(), strict=True))
        self.table.row("report: the rows of the pictures", f"{len(got['maps'])} heads", difference, BOUND)


def row_numbers(scores, p, v, k):
    """What the report says of each row: name -> [B,NH,T]."""
    import torch
    T = p.shape[-1]
    order = scores.argsort(-1, descending=True)
    largest = p.gather(-1, order)
    others = torch.where(order == 0, 0, largest)  # without key 0
    sums, other_sums = largest.cumsum(-1), others.cumsum(-1)
    numbers = {"nosink": p[..., 1:].sum(-1), "first": p[..., 0], "self": p.diagonal(dim1=-2, dim2=-1),
               "previous": torch.nn.functional.pad(p[..., 1:, :].diagonal(dim1=-2, dim2=-1), (1, 0)),
               "entropy": -torch.special.xlogy(p, p).sum(-1), "participation": 1 / p.square().sum(-1),
               "max_score": scores.max(-1).values}
    for x in {*REPORT_KS, k}:
        numbers[f"mass{x}"], numbers[f"mass_nosink{x}"] = sums[..., min(x, T) - 1], other_sums[..., min(x, T) - 1]
    numbers["mass_k"] = numbers[f"mass{k}"]
    visible = torch.arange(1, T + 1)
    for share in (90, 95, 99):
        for edge, threshold in (("keys", 0), ("least", -1e-5), ("most", 1e-5)):
            numbers[f"{edge}{share}"] = ((sums < share / 100 + threshold).sum(-1) + 1).minimum(visible).double()
    head = torch.zeros_like(p).scatter(-1, order[..., :k], largest[..., :k])
    tail = p.scatter(-1, order[..., :k], 0)
    tau, whole = tail.sum(-1), p @ v
    between = tail @ v / tau.clamp_min(1e-300)[..., None] - head @ v / head.sum(-1)[..., None]
    numbers["tau"], numbers["error"] = tau, tau * between.norm(dim=-1)
    numbers["error_relative"] = numbers["error"] / whole.norm(dim=-1)
    return numbers


def head_numbers(rows, k):
    """The report's numbers of one head; rows: name -> [sequences,T]. Null where no row has more than k keys."""
    T = rows["tau"].shape[-1]
    numbers = {}
    for x, K in enumerate(REPORT_KS):
        mass, nosink, whole = (rows[name][:, K:] for name in (f"mass{K}", f"mass_nosink{K}", "nosink"))
        numbers[f"mass{x}"] = mass.mean().item() if K < T else None
        numbers[f"mass_nosink{x}"] = (nosink.sum() / whole.sum()).item() if K < T else None
    for name in ("entropy", "participation"):
        numbers[name] = rows[name].mean().item()
    for name in ("first", "self", "previous"):
        numbers[name] = rows[name][:, 2:].mean().item()
    numbers["max_score"] = rows["max_score"].max().item()
    for name in ("tau", "error", "error_relative"):
        values = rows[name][:, k:].flatten().sort().values
        numbers[f"{name} mean"] = values.mean().item()
        for q in (50, 90, 99, 100):
            at = -(-len(values) * q // 100) - 1
            numbers[f"{name} {'max' if q == 100 else f'q{q}'}"] = values[at].item()
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-e", "--from", dest="model", help="a model's folder or file")
    parser.add_argument("-b", "--batch", type=int, default=2, help="sequences at a time, of what is measured (2)")
    parser.add_argument("-t", "--context", type=int, default=128, help="their tokens; no more than the context (128)")
    parser.add_argument("-m", "--batches", type=int, default=2, help="batches for losses and the report (2)")
    parser.add_argument("--program", default=os.path.join(HERE, "../infer_gpt2cpu"))
    parser.add_argument("--work", default=os.path.join(HERE, "../build"), help="folder for the large files (build/)")
    parser.add_argument("--venv", default=default_environment(), help="the virtual environment (%(default)s)")
    args = parser.parse_args()
    args.program = os.path.abspath(args.program)
    if args.batch < 1 or args.batches < 1 or args.context < 8:
        sys.exit("-b and -m are at least 1, -t at least 8.")
    exporter = os.path.join(os.path.dirname(args.program), "train_gpt2cpu")
    for program in [args.program, *([exporter] if args.model else [])]:
        if not os.path.exists(program):
            sys.exit(f"There is no {program}: build it with make {os.path.basename(program)}.")
    enter_environment(args.venv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # so that the models go
    import torch
    torch.set_grad_enabled(False)

    with open(os.path.join(HERE, "../README.md"), encoding="utf-8") as file:
        text = file.read()
    table = Table()
    os.makedirs(args.work, exist_ok=True)
    for sizes in [None] if args.model else MODELS:
        with tempfile.TemporaryDirectory(prefix="check_infer-", dir=args.work) as work:
            folder = os.path.join(work, "model")
            try:
                if args.model:
                    run_ours(exporter, "-e", args.model, "--export", folder)
                else:
                    make_model(folder, sizes, text)
                check = Check(table, args, args.model or folder, folder, work, text)
                r = check.reference
                print(f"--- {r.layers} layers, heads {r.heads} x {r.weights['wte.weight'].shape[1] // r.heads}, "
                      f"context {r.context}, vocabulary {r.vocabulary}", flush=True)
                for part in (check.losses, check.texts, check.lambada, check.report):
                    part()
            except Failed as error:
                sys.exit(str(error)[0].upper() + str(error)[1:])
    return table.failed > 0


if __name__ == "__main__":
    sys.exit(main())
