#!/usr/bin/env python3
"""Lets the real libraries write GPT-2 files, our program read them, and the real libraries check what it read.

    make train_gpt2cpu
    python3 dev/compare_formats.py                                # 124M in every format
    python3 dev/compare_formats.py --llmc ../llm.c                # with the .bin files that llm.c writes
    python3 dev/compare_formats.py --sizes all --llmc ../llm.c    # up to 1558M: hours, 24 GB of memory, 40 GB of disk

Needs nothing but Python: on its first run it installs torch, safetensors, transformers, tensorflow and tiktoken into a
virtual environment of its own (--venv; 8 GB, for PyPI's torch for Linux brings CUDA along; less with
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment). llm.c is not in any registry: name a
checkout of it with --llmc, otherwise its rows are skipped.

For each size, transformers makes a GPT-2 with random weights (its own initialization from a fixed seed, then noise on
biases and layernorms, so that no tensor is constant) and writes it with save_pretrained. From that one model:

    safetensors   transformers' save_pretrained, one file; names like transformer.h.0.ln_1.weight
    sharded       save_pretrained(max_shard_size = a quarter of the model)
    bare          safetensors' save_file; names as in the first upload of gpt2, h.0.ln_1.weight, and its buffers
                  attn.bias and attn.masked_bias
    tensorflow    tf.compat.v1.train.Saver; OpenAI's names, shapes and hparams.json
    llm.c         write_model() of llm.c's train_gpt2.py: versions 3 (float32) and 5 (bfloat16). It pads the
                  vocabulary to 50304 rows; the padding is then overwritten with 1000, for nothing may depend on it

Our program loads each with -e and does two things: --export writes a folder for transformers, --debug-state the logits.

    difference    of the exported tensors from the original ones, rounded as the format rounds: must be 0 everywhere
    logits        our program's and those of transformers' GPT2LMHeadModel, which opens the exported folder as it is:
                  largest difference over largest logit, fp32, 64 random tokens; at most 1e-4
    loss          the same of the mean cross-entropy
    GB, s         our program's peak memory; the row's time

A row also fails if from_pretrained finds a tensor missing or too many, if the vocabulary is anywhere other than 50257,
or if the exported tokenizer differs from tiktoken's on a sample. Exit status 1 if a row fails.
"""
import argparse
import array
import concurrent.futures
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ["torch", "safetensors", "transformers", "tensorflow", "tiktoken"]
SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}  # L, NH, C
FORMATS = {
    "safetensors": ["float32", "float16", "bfloat16"],
    "sharded": ["float32", "float16"],
    "bare": ["float32", "float16", "bfloat16"],
    "tensorflow": ["float32"],
    "llm.c": ["float32", "bfloat16"],
}
DTYPES = ["float32", "float16", "bfloat16"]
VOCABULARY = 50257
BOUND = 1e-4
SEED = 1


class Failed(Exception):
    """A sentence for the table."""


# ---- The environment ----

def enter_environment(folder):
    """Goes on in the virtual environment, which is made if it is not there."""
    folder = os.path.abspath(folder)
    if os.path.realpath(sys.prefix) == os.path.realpath(folder):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may come from anywhere else
        return
    python = os.path.join(folder, "bin", "python")
    marker = os.path.join(folder, "packages-installed")
    wanted = " ".join(PACKAGES)
    if not os.path.exists(marker) or open(marker).read() != wanted:
        print(f"installing {', '.join(PACKAGES)} into {folder} (8 GB, once)", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *PACKAGES], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"The environment in {folder} could not be made: '{' '.join(error.cmd[:4])} ...' failed, see "
                     f"above. It needs Python's venv module, a package index, and a Python for which there is a "
                     f"TensorFlow.")
        with open(marker, "w") as file:
            file.write(wanted)
    os.execv(python, [python, *sys.argv])


def default_environment():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "condensed_gpt2", "venv")


def print_into(path):
    """Sends what this process and its libraries print, on either stream, into a file."""
    file = os.open(path, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)


def in_a_process(function, *arguments):
    """Calls the function in a new process: its memory is given back, and TensorFlow and torch, which abort when they
    meet in one process, never do."""
    spawn = multiprocessing.get_context("spawn")
    with (tempfile.NamedTemporaryFile() as log,
          concurrent.futures.ProcessPoolExecutor(1, spawn, print_into, [log.name]) as pool):
        try:
            return pool.submit(function, *arguments).result()
        except Failed:
            raise
        except concurrent.futures.process.BrokenProcessPool:
            last = (log.read().decode(errors="replace").strip() or "nothing").splitlines()[-1]
            raise Failed(f"{function.__name__} ended before its end (out of memory?); its last words: {last}") from None
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise Failed(f"{function.__name__}: {type(error).__name__}: {first}") from error


def quiet_transformers():
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


# ---- What the real libraries write ----

def make_model(folder, sizes, vocabulary):
    """transformers' GPT-2 with random weights, and its tokenizer if there is a vocabulary; F32, one file."""
    import torch
    from safetensors import safe_open
    transformers = quiet_transformers()
    torch.manual_seed(SEED)
    n_layer, n_head, n_embd = sizes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="100GB")
    # From here on the file stands for the model.
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        parameters = dict(model.named_parameters())
        assert sorted(parameters) == sorted(file.keys())
        assert all(torch.equal(file.get_tensor(name), parameter) for name, parameter in parameters.items())
    if vocabulary:
        transformers.GPT2Tokenizer(f"{vocabulary}/encoder.json", f"{vocabulary}/vocab.bpe").save_pretrained(folder)


def write_safetensors(original, folder, dtype):
    if dtype == "float32":
        return original
    import torch
    transformers = quiet_transformers()
    model = transformers.GPT2LMHeadModel.from_pretrained(original).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="100GB")
    return folder


def write_sharded(original, folder, dtype):
    import torch
    transformers = quiet_transformers()
    model = transformers.GPT2LMHeadModel.from_pretrained(original).to(getattr(torch, dtype))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4)
    assert os.path.exists(f"{folder}/model.safetensors.index.json")
    assert not os.path.exists(f"{folder}/model.safetensors")
    return folder


def write_bare(original, folder, dtype):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    with open(f"{original}/config.json") as file:
        config = json.load(file)
    tensors = {}
    with safe_open(f"{original}/model.safetensors", "pt") as file:
        for name in file.keys():
            tensors[name.removeprefix("transformer.")] = file.get_tensor(name).to(getattr(torch, dtype))
    for layer in range(config["n_layer"]):
        mask = torch.ones(1, 1, 1024, 1024).tril()
        tensors[f"h.{layer}.attn.bias"] = mask.to(getattr(torch, dtype))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4, dtype=getattr(torch, dtype))
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    shutil.copy(f"{original}/config.json", folder)
    return folder


def write_tensorflow(original, folder, dtype, vocabulary):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow
    from safetensors import safe_open
    tf = tensorflow.compat.v1
    tf.logging.set_verbosity(tf.logging.ERROR)
    with open(f"{original}/config.json") as file:
        config = json.load(file)
    matrices = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")

    def openai_name(name):  # transformer.h.0.attn.c_attn.weight is model/h0/attn/c_attn/w
        name = name.replace("transformer.", "model/").replace("h.", "h").replace(".", "/")
        if name in ("model/wte/weight", "model/wpe/weight"):
            return name.removesuffix("/weight")
        if name.endswith("/bias"):
            return name.removesuffix("/bias") + "/b"
        return name.removesuffix("/weight") + ("/w" if name.removesuffix("/weight").endswith(matrices) else "/g")

    with safe_open(f"{original}/model.safetensors", "np") as file, tf.Graph().as_default(), tf.Session() as session:
        for name in file.keys():
            value = file.get_tensor(name)
            name = openai_name(name)
            if name.endswith("/w"):
                value = value[None]  # OpenAI's matrices are convolutions of width 1
            variable = tf.get_variable(name, value.shape, tf.float32)
            placeholder = tf.placeholder(tf.float32, value.shape)
            session.run(tf.assign(variable, placeholder), {placeholder: value})
        tf.train.Saver(save_relative_paths=True).save(session, f"{folder}/model.ckpt")
    with open(f"{folder}/hparams.json", "w") as file:
        json.dump({"n_vocab": VOCABULARY, "n_ctx": 1024, "n_embd": config["n_embd"], "n_head": config["n_head"],
                   "n_layer": config["n_layer"]}, file)
    if vocabulary:
        shutil.copy(f"{vocabulary}/encoder.json", folder)
        shutil.copy(f"{vocabulary}/vocab.bpe", folder)
    return folder


def write_llmc(original, folder, dtype, llmc):
    import torch
    from safetensors import safe_open
    sys.path.insert(0, llmc)
    import train_gpt2
    with open(f"{original}/config.json") as file:
        config = json.load(file)
    sizes = {key: config[key] for key in ("n_layer", "n_head", "n_embd")}
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**sizes))
    parameters = dict(model.named_parameters())
    with safe_open(f"{original}/model.safetensors", "pt") as file, torch.no_grad():
        assert sorted(parameters) == sorted(file.keys())
        for name, parameter in parameters.items():
            value = file.get_tensor(name)
            is_turned = parameter.dim() == 2 and name.startswith("transformer.h.")  # its matrices are [out, in]
            parameter.copy_(value.T if is_turned else value)
    path = f"{folder}/model.bin"
    train_gpt2.write_model(model, path, dtype)
    padding = torch.full((50304 - VOCABULARY, config["n_embd"]), 1000.0, dtype=getattr(torch, dtype))
    with open(path, "r+b") as file:
        file.seek(1024 + VOCABULARY * config["n_embd"] * padding.element_size())
        file.write(padding.view(torch.uint8).numpy().tobytes())
    return path


def write_tokens(path, vocabulary, count):
    """A token shard of random tokens."""
    rng = random.Random(SEED)
    with open(path, "wb") as file:
        array.array("i", [20240520, 1, count, 0 if vocabulary == VOCABULARY else vocabulary] + [0] * 252).tofile(file)
        array.array("H", (rng.randrange(vocabulary) for _ in range(count))).tofile(file)


# ---- What our program makes of it ----

def run_ours(*command):
    """Runs our program and returns its peak memory in GB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        raise Failed(f"our program was killed by signal {-process.returncode} (out of memory?)")
    if process.returncode > 0:
        raise Failed(f"our program said: {(output.strip() or 'nothing').splitlines()[-1]}")
    return usage.ru_maxrss / 1e6


def compare(original, exported, state, dtype, vocabulary):
    """Number of tensors, their largest difference, that of the logits, that of the loss, what is wrong besides."""
    import torch
    from safetensors import safe_open
    transformers = quiet_transformers()
    problems = []

    tensors, difference = 0, 0.0
    with (safe_open(f"{original}/model.safetensors", "pt") as want,
          safe_open(f"{exported}/model.safetensors", "pt") as got):
        if others := set(want.keys()) ^ set(got.keys()):
            problems.append(f"{len(others)} tensors are missing or too many, {min(others)} among them")
        for name in set(want.keys()) & set(got.keys()):
            a, b = want.get_tensor(name).to(getattr(torch, dtype)).float(), got.get_tensor(name)
            if a.shape != b.shape or b.dtype != torch.float32:
                problems.append(f"{name} is {b.dtype} {list(b.shape)}")
                continue
            tensors += 1
            difference = max(difference, (a - b).abs().nan_to_num(nan=float("inf")).max().item())
    if difference != 0:
        problems.append("the exported tensors differ")

    model, info = transformers.GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    problems += [f"from_pretrained reports {what}: {found}" for what, found in info.items() if found]
    if model.dtype != torch.float32:
        problems.append(f"from_pretrained opens it as {model.dtype}")
    if model.config.vocab_size != VOCABULARY:
        problems.append(f"the vocabulary in config.json is {model.config.vocab_size}")
    with safe_open(state, "pt") as file:
        x, y, ours, loss = (file.get_tensor(name) for name in ("x", "y", "logits", "loss.ce"))
    with torch.no_grad():
        theirs = model.eval()(x.long()).logits
    if ours.shape != (*x.shape, VOCABULARY) or ours.shape != theirs.shape:
        raise Failed(f"the logits are {list(ours.shape)}, transformers' are {list(theirs.shape)}")
    logits = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), y.long().flatten())
    loss = ((loss - expected).abs() / expected).item()
    if not logits <= BOUND:
        problems.append(f"the logits differ by more than {BOUND:g}")
    if not loss <= BOUND:
        problems.append(f"the loss differs by more than {BOUND:g}")

    if vocabulary:
        problems += compare_tokenizers(exported, vocabulary)
    return tensors, difference, logits, loss, problems


def compare_tokenizers(exported, vocabulary):
    """What is wrong with the tokenizer in the exported folder; tiktoken, on the same vocabulary, is the judge."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    transformers = quiet_transformers()
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read the files given, not an earlier copy of them
    ranks = data_gym_to_mergeable_bpe_ranks(f"{vocabulary}/vocab.bpe", f"{vocabulary}/encoder.json")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    judge = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": VOCABULARY - 1})
    with open(__file__, encoding="utf-8") as file:
        text = file.read()  # this script, and what it lacks
    text += ("It's 1984, they'll say:   'No!'\n\n\tna\u00efve \u0391\u03b8\u03ae\u03bd\u03b1 \u6771\u4eac "
             "\ud55c\uad6d \U0001f600 x=[3.14];  \r\n<|endoftext|> Don't.")
    wanted = judge.encode(text, allowed_special="all")
    problems = []
    for kind in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        try:
            tokenizer = kind.from_pretrained(exported)
        except Exception as error:
            problems.append(f"{kind.__name__} does not open the exported folder: {str(error).splitlines()[0]}")
            continue
        if len(tokenizer) != VOCABULARY:
            problems.append(f"{kind.__name__} has {len(tokenizer)} tokens")
        if tokenizer.encode(text) != wanted:
            problems.append(f"{kind.__name__} encodes a sample otherwise than tiktoken")
        elif tokenizer.decode(wanted, clean_up_tokenization_spaces=False) != text:
            problems.append(f"{kind.__name__} does not decode a sample")
        if tokenizer.eos_token_id != VOCABULARY - 1:
            problems.append(f"{kind.__name__} ends texts with token {tokenizer.eos_token_id}")
    return problems


# ---- The table ----

def one_row(args, original, format, dtype, work):
    """Writes, loads, compares: the row's figures, and what is wrong."""
    source, exported, state = (os.path.join(work, name) for name in ("source", "exported", "state.safetensors"))
    os.mkdir(source)
    try:
        writer = {"safetensors": write_safetensors, "sharded": write_sharded, "bare": write_bare,
                  "tensorflow": write_tensorflow, "llm.c": write_llmc}[format]
        extra = {"tensorflow": [args.vocabulary], "llm.c": [args.llmc]}.get(format, [])
        path = in_a_process(writer, original, source, dtype, *extra)
        tokens = os.path.join(work, "tokens.bin")
        memory = run_ours(args.program, "-e", path, "--export", exported)
        memory = max(memory, run_ours(args.program, "-e", path, "-i", tokens, "-j", tokens, "-b", "1", "-t", "64",
                                      "-l", "0", "-k", "0", "--precision", "fp32", "--debug-state", state))
        tensors, difference, logits, loss, problems = in_a_process(compare, original, exported, state, dtype,
                                                                   args.vocabulary)
        return f"{tensors:7} {difference:10.3g} {logits:9.1e} {loss:9.1e} {memory:6.1f}", problems
    except Failed as error:
        return f"{'-':>7} {'-':>10} {'-':>9} {'-':>9} {'-':>6}", [str(error)]
    finally:
        shutil.rmtree(source)
        shutil.rmtree(exported, ignore_errors=True)
        if os.path.exists(state):
            os.remove(state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small", help="of 124M,355M,774M,1558M; small is 124M, all is all")
    parser.add_argument("--formats", default="all", help="of " + ",".join(FORMATS))
    parser.add_argument("--dtypes", default="all", help="of " + ",".join(DTYPES))
    parser.add_argument("--llmc", help="a checkout of llm.c")
    parser.add_argument("--program", default=os.path.join(HERE, "../train_gpt2cpu"))
    parser.add_argument("--vocabulary", default=os.path.join(HERE, "../data/gpt2"),
                        help="folder with encoder.json and vocab.bpe (data/gpt2, where data/fetch puts them)")
    parser.add_argument("--work", default=os.path.join(HERE, "../build"), help="folder for the large files (build/)")
    parser.add_argument("--venv", default=default_environment(), help="the virtual environment (%(default)s)")
    args = parser.parse_args()
    sizes = {"small": ["124M"], "all": list(SIZES)}.get(args.sizes, args.sizes.split(","))
    formats = list(FORMATS) if args.formats == "all" else args.formats.split(",")
    dtypes = DTYPES if args.dtypes == "all" else args.dtypes.split(",")
    for what, names, known in (("--sizes", sizes, SIZES), ("--formats", formats, FORMATS), ("--dtypes", dtypes, DTYPES)):
        if unknown := set(names) - set(known):
            sys.exit(f"{what} takes {','.join(known)} or all, not {','.join(unknown)}.")
    args.program = os.path.abspath(args.program)
    if not os.path.exists(args.program):
        sys.exit(f"There is no {args.program}: build it with make train_gpt2cpu.")
    if args.llmc and not os.path.exists(os.path.join(args.llmc, "train_gpt2.py")):
        sys.exit(f"{args.llmc} is no checkout of llm.c: there is no train_gpt2.py in it.")
    args.llmc = args.llmc and os.path.abspath(args.llmc)
    enter_environment(args.venv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # so that the large files go
    if not os.path.exists(os.path.join(args.vocabulary, "encoder.json")):
        print(f"There is no vocabulary in {args.vocabulary} (run data/fetch), so the tokenizer is not checked.")
        args.vocabulary = None

    from importlib.metadata import version
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    print(f"{'format':11} {'size':>5} {'dtype':8} {'tensors':>7} {'difference':>10} {'logits':>9} {'loss':>9} "
          f"{'GB':>6} {'s':>5}  result", flush=True)
    passed, failed, skipped = 0, 0, 0
    begin = time.time()
    os.makedirs(args.work, exist_ok=True)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="compare_formats-", dir=args.work) as work:
            layers, _, channels = SIZES[size]
            needed = 5.5 * 4 * (12 * layers * channels**2 + VOCABULARY * channels) / 1e9
            free = shutil.disk_usage(work).free / 1e9
            if free < needed:
                sys.exit(f"{size} takes {needed:.0f} GB of disk, and {args.work} has {free:.0f} GB free: name another "
                         f"folder with --work.")
            original = os.path.join(work, "original")
            write_tokens(os.path.join(work, "tokens.bin"), VOCABULARY, 1000)
            try:
                in_a_process(make_model, original, SIZES[size], args.vocabulary)
            except Failed as error:
                sys.exit(f"transformers could not make a model of {size}: {error}")
            for format in formats:
                for dtype in (d for d in FORMATS[format] if d in dtypes):
                    print(f"{format:11} {size:>5} {dtype:8} ", end="", flush=True)
                    if format == "llm.c" and not args.llmc:
                        skipped += 1
                        print(f"{'':51}skipped: name a checkout of llm.c with --llmc", flush=True)
                        continue
                    row_begin = time.time()
                    figures, problems = one_row(args, original, format, dtype, work)
                    result = "FAIL: " + "; ".join(problems) if problems else "pass"
                    print(f"{figures} {time.time() - row_begin:5.0f}  {result}", flush=True)
                    passed += not problems
                    failed += bool(problems)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{passed} passed, {failed} failed, {skipped} skipped; {(time.time() - begin) / 60:.0f} minutes; the largest "
          f"process, a library's or ours, took {memory:.1f} GB")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
