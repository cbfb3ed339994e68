// The attention top-k regularizer: what it measures, for the host and for kernels (attention.cuh has the
// gradient), and how its weight lambda moves through a run.
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
// A baseline beside them averages, over the same rows, the entropy H_i in the place of f(M_i); its
// mathematics is in attention_entropy.cuh.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host_device.h"

enum class Reg { tail, kl, entropy };
inline constexpr const char* kRegWords[] = {"tail", "kl", "entropy"};

inline const char* reg_name(Reg reg) {
    return kRegWords[static_cast<int>(reg)];
}

// f and f' of tail and kl.
HOST_DEVICE inline float reg_value(Reg reg, float mass) {
    return reg == Reg::tail ? 1.0f - mass : -logf(mass);
}
HOST_DEVICE inline float reg_slope(Reg reg, float mass) {
    return reg == Reg::tail ? -1.0f : -1.0f / mass;
}

// Rows of one layer that the regularizer averages: B * NH * (queries with more than k keys).
inline int64_t regularized_rows(int B, int T, int num_heads, int k) {
    return static_cast<int64_t>(B) * num_heads * std::max(0, T - k);
}

// lambda at update `step` (from 0): 0 in the first `start` updates, then rising linearly to its full value,
// which it has from update `warmup` on (one later than a learning rate has its own: schedule.h). Learn first,
// condense later: a model that is pressed from the first update pays for it in loss.
inline float lambda_at(int64_t step, float lambda, int64_t start, int64_t warmup) {
    if (step >= warmup) return lambda;
    if (step < start) return 0.0f;
    return lambda * static_cast<float>(step + 1 - start) / static_cast<float>(warmup + 1 - start);
}
