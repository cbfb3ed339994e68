#!/usr/bin/env python3
"""Trains GPT-2 in PyTorch for a few updates and prints how long they took, for dev/bench/compare.

    python3 dev/bench/torch_gpt2.py --data train.bin --compile                              plain GPT-2
    python3 dev/bench/torch_gpt2.py --data train.bin --attention matrix -l 0.1 -k 8         with the regularizer

Written from the definition of GPT-2 and of the regularizer, as one would for research: bf16 autocast, fused AdamW,
scaled_dot_product_attention; and since no fused attention gives the top-k mass, `--attention matrix` makes the matrix
of probabilities, takes torch.topk of it and leaves the gradient to autograd. Where the batch does not fit, it is cut
in halves and gradients are accumulated. The last line of the output is a JSON object.
"""
import argparse
import gc
import json
import math
import statistics
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError as error:
    sys.exit(f"error: {error}: pip install torch")


class Attention(nn.Module):
    def __init__(self, channels, heads, kind, topk, reg):
        super().__init__()
        self.heads, self.kind, self.topk, self.reg = heads, kind, topk, reg
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        """The attention's output, and the mean of f(M) over the rows with more than topk keys."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        value = x.new_zeros((), dtype=torch.float32)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)
            causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            p = scores.masked_fill(~causal, float("-inf")).softmax(-1)
            if 0 < self.topk < T:
                mass = p.topk(self.topk, dim=-1).values.sum(-1)[..., self.topk:].float()
                value = (1 - mass).mean() if self.reg == "tail" else -mass.log().mean()
            y = p.to(v.dtype) @ v
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), value


class Block(nn.Module):
    def __init__(self, channels, heads, kind, topk, reg):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, kind, topk, reg)
        self.fc, self.fcproj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        y, value = self.attention(self.ln_1(x))
        x = x + y
        return x + self.fcproj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")), value


class GPT2(nn.Module):
    """Cross-entropy + weight * R of a batch. The vocabulary is padded to 50304, a multiple of 128."""

    def __init__(self, layers, heads, channels, context, kind, weight, topk, reg, vocab=50304):
        super().__init__()
        self.weight = weight
        self.wte, self.wpe = nn.Embedding(vocab, channels), nn.Embedding(context, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, kind, topk, reg) for _ in range(layers))
        self.ln_f = nn.LayerNorm(channels)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        total = 0.0
        for block in self.blocks:
            h, value = block(h)
            total = total + value
        logits = F.linear(self.ln_f(h), self.wte.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        return loss + self.weight * total / len(self.blocks)


def read_tokens(path):
    """The tokens of a shard: 256 int32 of header, then uint16."""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    header = torch.frombuffer(data, dtype=torch.int32, count=256)
    if header[0] != 20240520 or header[1] != 1 or len(data) != 1024 + 2 * int(header[2]):
        sys.exit(f"error: {path} is not a token shard")
    return torch.frombuffer(data, dtype=torch.int16, offset=1024).long() & 0xffff


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def run_updates(args, tokens, micro):
    """Milliseconds and loss of each update, with micro-batches of `micro` rows."""
    device, n = args.device, args.batch * args.context
    torch.manual_seed(1337)
    model = GPT2(args.layers, args.heads, args.channels, args.context, args.attention, args.weight, args.topk,
                 args.reg).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    step = torch.compile(model) if args.compile else model
    accumulate = args.batch // micro
    ms, losses = [], []
    for update in range(args.steps):
        first = update * n % (len(tokens) - n)
        batch = tokens[first:first + n + 1]
        synchronize(device)
        start = time.perf_counter()
        batch = (batch.pin_memory() if device == "cuda" else batch).to(device, non_blocking=True)
        x, y = batch[:-1].view(accumulate, micro, args.context), batch[1:].view(accumulate, micro, args.context)
        total = torch.zeros((), device=device)
        for i in range(accumulate):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = step(x[i], y[i]) / accumulate
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        synchronize(device)
        ms.append((time.perf_counter() - start) * 1e3)
    return ms, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token shard")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="updates, the first --warmup of which do not count (20)")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--attention", choices=["sdpa", "matrix"], default="sdpa")
    parser.add_argument("-l", "--lambda", dest="weight", type=float, default=0.0)
    parser.add_argument("-k", "--topk", type=int, default=8)
    parser.add_argument("--reg", choices=["tail", "kl"], default="tail")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.weight > 0 and args.attention == "sdpa":
        sys.exit("error: lambda > 0 needs the probabilities: give --attention matrix")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here")
    if args.steps <= args.warmup:
        sys.exit("error: --steps must be more than --warmup")
    torch.set_float32_matmul_precision("high")
    if args.weight == 0:
        args.topk = 0
    tokens = read_tokens(args.data)
    if len(tokens) <= args.batch * args.context:
        sys.exit(f"error: {args.data} has {len(tokens)} tokens, which is less than one batch")

    micro = args.batch
    while True:
        try:
            ms, losses = run_updates(args, tokens, micro)
            break
        except torch.OutOfMemoryError:
            if micro % 2:
                sys.exit(f"error: out of memory with micro-batches of {micro}")
            print(f"out of memory with micro-batches of {micro}", flush=True)
        micro //= 2
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
    counted = ms[args.warmup:]
    median = statistics.median(counted)
    print(json.dumps({
        "ms": median,
        "least_ms": min(counted),
        "tokens_per_s": args.batch * args.context / median * 1e3,
        "micro_batch": micro,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if args.device == "cuda" else None,
        "losses": [losses[0], losses[-1]],
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
