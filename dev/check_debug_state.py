#!/usr/bin/env python3
"""Checks a file written by --debug-state against PyTorch's autograd of the same loss, regularizer included.

    ./train_gpt2cu --precision fp32 -b 2 -t 64 -l 0.1 -k 8 --reg kl --debug-state state.safetensors
    python3 dev/check_debug_state.py state.safetensors

Needs torch, numpy and safetensors. The model is written here from GPT-2's definition, in float64, with the attention
matrix materialized and torch.topk for the top-k mass, so that it shares nothing with the engine but the parameters in
the file. Prints one line a tensor where it differs by more than the bound, and the largest difference; exit status 1
if any differs. Layer factors on lambda (--lambda-layers) are not in the file: check with the default.
"""
import argparse
import sys

try:
    import torch
    import torch.nn.functional as F
    from safetensors import safe_open
except ImportError as error:
    sys.exit(f"{error}: pip install torch numpy safetensors")


def gpt2(p, x, n_layer, n_head, k, reg):
    """Logits, R and the top-k mass [L,B,NH,T] (1 where a row has no more than k keys)."""
    B, T = x.shape
    C = p["wte.weight"].shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    long_enough = torch.arange(1, T + 1) > k
    h = p["wte.weight"][x] + p["wpe.weight"][:T]
    values, masses, scores = [], [], []
    for l in range(n_layer):
        w = {name[len(f"h.{l}."):]: t for name, t in p.items() if name.startswith(f"h.{l}.")}
        a = F.layer_norm(h, (C,), w["ln_1.weight"], w["ln_1.bias"], 1e-5)
        q, key, v = ((a @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]).view(B, T, 3, n_head, C // n_head)
                     .permute(2, 0, 3, 1, 4))
        s = (q @ key.transpose(-1, -2) / (C // n_head) ** 0.5).masked_fill(~causal, float("-inf"))
        prob = s.softmax(-1)
        mass = prob.topk(min(k, T), -1).values.sum(-1) if k > 0 else torch.ones(B, n_head, T, dtype=h.dtype)
        masses.append(torch.where(long_enough, mass, torch.ones_like(mass)))
        scores.append(s)
        if long_enough.any() and k > 0:
            m = mass[..., long_enough]
            entropy = -(prob * s.log_softmax(-1).masked_fill(~causal, 0)).sum(-1)[..., long_enough]
            values.append({"tail": 1 - m, "kl": -m.log(), "entropy": entropy}[reg].mean())
        a = (prob @ v).transpose(1, 2).reshape(B, T, C)
        h = h + a @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        a = F.layer_norm(h, (C,), w["ln_2.weight"], w["ln_2.bias"], 1e-5)
        a = F.gelu(a @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"], approximate="tanh")
        h = h + a @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    h = F.layer_norm(h, (C,), p["ln_f.weight"], p["ln_f.bias"], 1e-5)
    R = torch.stack(values).mean() if values else torch.zeros((), dtype=h.dtype)
    return h @ p["wte.weight"].T, R, torch.stack(masses), torch.stack(scores)


def check(path, bound):
    """Compares one file. What came out, as a dictionary; prints the tensors that differ by more than the bound."""
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        state = {name: f.get_tensor(name) for name in f.keys()}
    n_layer, n_head, k = (int(meta[name]) for name in ("n_layer", "n_head", "topk"))
    lam = float(meta["lambda"])
    params = {name[6:]: t.double().requires_grad_() for name, t in state.items() if name.startswith("param.")}
    x, y = state["x"].long(), state["y"].long()
    logits, R, mass, scores = gpt2(params, x, n_layer, n_head, k, meta["reg"])
    ce = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    (ce + lam * R).backward()

    want = {"loss.ce": ce, "loss.reg": R, "loss.total": ce + lam * R, "logits": logits, "topk.mass": mass}
    want |= {"grad." + name: p.grad for name, p in params.items()}
    failed, worst = 0, ("", 0.0)
    for name, w in want.items():
        g, w = state[name].double(), w.detach().reshape(state[name].shape)
        error = ((g - w).norm() / w.norm().clamp_min(1e-30)).item() if w.norm() > 0 else g.norm().item()
        worst = max(worst, (name, error), key=lambda item: item[1])
        if not error <= bound:
            failed += 1
            print(f"DIFFERS  {name}: relative difference {error:.2e}")
    # theta lies between the k-th and the (k+1)-th largest score: exactly k scores are above it (but for ties)
    theta = state["topk.threshold"].double()
    rows = torch.arange(x.shape[1]) >= k
    share = 1.0
    if k > 0 and rows.any():
        above = (scores > theta[..., None]).sum(-1)[..., rows]
        share = (above == k).double().mean().item()
        failed += share < 0.999
    return {"k": k, "lambda": lam, "reg": meta["reg"], "tensors": len(want), "worst": worst[0], "difference": worst[1],
            "rows with k": share, "failed": failed, "loss": (ce + lam * R).item(), "R": R.item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest relative difference of a tensor (1e-4)")
    args = parser.parse_args()
    r = check(args.file, args.bound)
    print(f"rows with exactly k = {r['k']} scores above their threshold: {100 * r['rows with k']:.3f}%")
    print(f"{r['tensors']} tensors compared, k = {r['k']}, lambda = {r['lambda']:g}, {r['reg']}: largest relative "
          f"difference {r['difference']:.2e} ({r['worst']}); {r['failed']} differ by more than {args.bound:g}")
    return r["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
