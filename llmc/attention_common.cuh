// What both implementations of attention share: what a row saves, the threshold, and the selection of a row's
// top k from its scores by counting. The mathematics is in attention.cuh.
#pragma once
#include "cuda_common.cuh"
#include "topk.h"

// The forward finds the top k on its way up to this k; above, they are selected by a kernel of its own.
inline constexpr int kMaxListed = 64;

// What the forward saves for each row of each head: [B,NH,T] each.
struct AttentionRows {
    float* lse;
    float* theta;
    float* mass;
    float* tie;
    float* mean_score = nullptr;  // only where the regularizer is entropy: see attention_entropy.cuh
};

// What the regularizer adds to a score's gradient: nothing; c_i if the key is in the top k; c_i s_ij.
enum class Pull { none, topk, entropy };
inline Pull pull_of(Reg reg, bool regularized) {
    return !regularized ? Pull::none : reg == Reg::entropy ? Pull::entropy : Pull::topk;
}

// Halfway between the k-th and the (k+1)-th largest score, kth > next: the result is in [next, kth).
__device__ inline float threshold_between(float kth, float next) {
    const float middle = next + (kth - next) * 0.5f;
    return middle < kth ? middle : next;
}

// Floats as unsigned integers in the same order.
__device__ inline unsigned ordered_bits(float x) {
    const unsigned u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ inline float from_ordered_bits(unsigned u) {
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

// Writes theta, mass and tie of one row whose n scores lie in shared memory, with the whole block: the k-th
// largest is found by deciding the bits of its ordered integer from the top, counting the scores that reach
// it each time. Call it between barriers.
[[maybe_unused]] static __device__ void select_top(const AttentionRows& rows, size_t row, const float* s,
                                                   int n, int topk) {
    __shared__ float float_scratch[2][32];
    __shared__ int int_scratch[2][32];
    const int tid = threadIdx.x;
    if (n <= topk) {
        if (tid == 0) {
            rows.theta[row] = -INFINITY;
            rows.mass[row] = 1.0f;
            rows.tie[row] = 0.0f;
        }
        return;
    }
    int turn = 0;  // block_sum's scratch is free for the next use only after a barrier: take turns
    auto count = [&](auto wanted) {
        int c = 0;
        for (int j = tid; j < n; j += blockDim.x) c += wanted(s[j]) ? 1 : 0;
        turn ^= 1;
        c = block_sum(c, int_scratch[turn]);
        return c;
    };
    unsigned key = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned candidate = key | 1u << bit;
        if (count([&](float x) { return ordered_bits(x) >= candidate; }) >= topk) key = candidate;
    }
    const float kth = from_ordered_bits(key);
    const int above = count([&](float x) { return x > kth; });
    const int ties = count([&](float x) { return x == kth; });

    // the largest score and the largest one below kth; -infinity sorts below every score
    unsigned top = 0, below = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned t = top | 1u << bit, u = below | 1u << bit;
        if (count([&](float x) { return ordered_bits(x) >= t; }) > 0) top = t;
        if (count([&](float x) { return x < kth && ordered_bits(x) >= u; }) > 0) below = u;
    }
    const float max = from_ordered_bits(top);
    float theta = kth, tie = (float)(topk - above) / (float)ties;
    if (above + ties == topk) {
        theta = threshold_between(kth, from_ordered_bits(below));
        tie = 0.0f;
    }
    float head = 0.0f, total = 0.0f;
    for (int j = tid; j < n; j += blockDim.x) {
        const float e = expf(s[j] - max);
        total += e;
        head += s[j] > theta ? e : s[j] == theta ? tie * e : 0.0f;
    }
    total = block_sum(total, float_scratch[0]);
    head = block_sum(head, float_scratch[1]);
    if (tid == 0) {
        rows.theta[row] = theta;
        rows.mass[row] = fminf(head / total, 1.0f);
        rows.tie[row] = tie;
    }
}

template <class Kernel, class... Args>
void launch_attention(const Context& ctx, Kernel kernel, dim3 grid, int threads, size_t shared,
                      Args... args) {
    assert(shared <= ctx.max_shared);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<grid, threads, shared, ctx.stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}

// The longest context whose scores the selection can hold in shared memory.
inline int max_select_context(const Context& ctx) {
    return (int)((ctx.max_shared - 1024) / sizeof(float));
}
