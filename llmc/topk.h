// The attention top-k regularizer: what it measures, and how its weight lambda moves through a run. Host
// mathematics only; the kernels are in attention.cuh.
//
// For one query i with n = i + 1 visible keys, p = softmax of its scores and S the k largest of them,
//
//   M_i = sum of p_ij over j in S          top-k mass
//   R   = mean of f(M_i) over all layers, heads, batch rows and queries with n > k
//   loss = cross-entropy + lambda R
//
//   tail: f(M) = 1 - M     the total variation distance between p and its top k, renormalized
//   kl:   f(M) = -log M    KL(top k, renormalized; p)
//
// f depends on M alone, and M's gradient in the scores is p_ij ([j in S] - M), so with S held fixed
//
//   d(lambda R) / ds_ij = c_i p_ij ([j in S_i] - M_i),   c_i = lambda f'(M_i) / N,   N = rows averaged.
//
// A baseline beside them averages, over the same rows, the entropy H_i in the place of f(M_i); its
// mathematics is in attention_entropy.cuh.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "error.h"

#ifdef __CUDACC__
#define TOPK_HOST_DEVICE __host__ __device__
#else
#define TOPK_HOST_DEVICE
#endif

enum class Reg { tail, kl, entropy };

inline const char* reg_name(Reg reg) {
    return reg == Reg::tail ? "tail" : reg == Reg::kl ? "kl" : "entropy";
}

// f and f' of tail and kl.
TOPK_HOST_DEVICE inline float reg_value(Reg reg, float mass) {
    return reg == Reg::tail ? 1.0f - mass : -logf(mass);
}
TOPK_HOST_DEVICE inline float reg_slope(Reg reg, float mass) {
    return reg == Reg::tail ? -1.0f : -1.0f / mass;
}

// Rows of one layer that the regularizer averages: B * NH * (queries with more than k keys).
inline int64_t regularized_rows(int B, int T, int num_heads, int k) {
    return static_cast<int64_t>(B) * num_heads * std::max(0, T - k);
}

// A length given as a number of updates ("200") or as a share of the run ("70%"), in updates.
inline int64_t parse_updates(const std::string& flag, const std::string& text, int64_t run_updates) {
    size_t used = 0;
    double value = 0.0;
    try {
        value = std::stod(text, &used);
    } catch (const std::exception&) {
        used = 0;
    }
    const std::string rest = text.substr(used);
    const bool percent = rest == "%";
    if (!used || !(rest.empty() || percent) || !(value >= 0.0) || value > 1e15 ||
        (percent && value > 100.0) || (!percent && value != std::floor(value)))
        fail("%s takes a number of updates (200) or a share of the run (70%%), not '%s'", flag.c_str(),
             text.c_str());
    return percent ? std::llround(value / 100.0 * static_cast<double>(run_updates))
                   : static_cast<int64_t>(value);
}

// lambda at update `step` (from 0): 0 in the first `start` updates, then rising linearly to its full value,
// which it has from update `warmup` on. Learn first, condense later: a model that is pressed from the first
// update pays for it in loss.
inline float lambda_at(int64_t step, float lambda, int64_t start, int64_t warmup) {
    if (step >= warmup) return lambda;
    if (step < start) return 0.0f;
    return lambda * static_cast<float>(step + 1 - start) / static_cast<float>(warmup + 1 - start);
}
