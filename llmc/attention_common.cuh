// What the implementations of attention share: what a row saves, the threshold, and the selection of a row's
// top k from its scores by counting. The mathematics is in attention.cuh.
#pragma once
#include "cuda_common.cuh"
#include "topk.h"

// The forward finds the top k on its way up to this k; above, they are selected by a kernel of its own.
inline constexpr int kMaxListed = 64;

// k = 0 as a type, for programs that have no use for the top k: its forward kernels, which take long to
// compile, are then left out. The launchers take this or an int.
struct NoTopk {
    constexpr operator int() const { return 0; }
};

// Calls body with the length of a thread's lists for this k, as a compile-time constant; 0: no lists. In
// attention_bf16.cuh four threads share a row, so a list may be shorter than k; attention_plain.cuh only asks
// whether there is one.
template <class Body>
void with_list(int topk, Body body) {
    if (topk == 0 || topk > kMaxListed)
        body(std::integral_constant<int, 0>());
    else if (topk <= 8)
        body(std::integral_constant<int, 8>());
    else if (topk <= 32)
        body(std::integral_constant<int, 16>());
    else
        body(std::integral_constant<int, 32>());
}
template <class Body>
void with_list(NoTopk, Body body) {
    body(std::integral_constant<int, 0>());
}

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
// Calls body with the one that a layer's kernels need, as a compile-time constant.
template <class Body>
void with_pull(Reg reg, bool regularized, Body body) {
    if (!regularized)
        body(std::integral_constant<Pull, Pull::none>());
    else if (reg == Reg::entropy)
        body(std::integral_constant<Pull, Pull::entropy>());
    else
        body(std::integral_constant<Pull, Pull::topk>());
}

// Halfway between the k-th and the (k+1)-th largest score, kth > next: the result is in [next, kth).
__device__ inline float threshold_between(float kth, float next) {
    const float middle = next + (kth - next) * 0.5f;
    return middle < kth ? middle : next;
}

// Of `left` places, how many remain after the bins above the one in which they run out, and which that is:
// counts [256], from the last bin down. One warp; the result is the same in all lanes.
struct Bin {
    int bin, left;
};
[[maybe_unused]] static __device__ Bin find_bin(const int* counts, int left) {
    const int lane = threadIdx.x % 32, last = 255 - 8 * lane;  // eight bins a lane
    int own = 0;
#pragma unroll 1
    for (int i = 0; i < 8; i++) own += counts[last - i];
    int through = own;  // with the lanes before
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
        const int x = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += x;
    }
    const int lane_found = __ffs(__ballot_sync(0xffffffffu, through >= left)) - 1;
    Bin found = {last, left - (through - own)};
    while (found.left > counts[found.bin] && found.bin > last - 7) found.left -= counts[found.bin--];
    return {__shfl_sync(0xffffffffu, found.bin, lane_found),
            __shfl_sync(0xffffffffu, found.left, lane_found)};
}

// Writes theta, mass and tie of one row whose n scores lie in shared memory, with the whole block of at least
// a warp: the bytes of the k-th largest's ordered integer are decided from the first, each by a histogram of
// the scores that agree with it so far. Call it between barriers. Most blocks do one row, with nothing in the
// instruction cache, so what counts is how little code there is.
//
// The k-th largest is found so, or bit by bit, wherever rows lie in shared memory: by the lanes of a row in
// attention_cut.cuh, by a block or a warp where a token is decoded (attention_decode.cuh, decode_layer.cuh).
[[maybe_unused]] static __device__ void select_top(const AttentionRows& rows, size_t row, const float* s,
                                                   int n, int topk) {
    __shared__ int counts[256];
    __shared__ Bin found;
    const int tid = threadIdx.x;
    if (n <= topk) {
        if (tid == 0) {
            rows.theta[row] = -INFINITY;
            rows.mass[row] = 1.0f;
            rows.tie[row] = 0.0f;
        }
        return;
    }
    unsigned key = 0;
    int left = topk, ties = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
#pragma unroll 1
        for (int i = tid; i < 256; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        const unsigned decided = shift == 24 ? 0 : ~0u << (shift + 8);
#pragma unroll 1
        for (int j = tid; j < n; j += blockDim.x) {
            const unsigned u = ordered_bits(s[j] + 0.0f);  // -0 is 0
            if ((u & decided) == key) atomicAdd(&counts[u >> shift & 255], 1);
        }
        __syncthreads();
        if (tid < 32) {
            const Bin bin = find_bin(counts, left);
            if (tid == 0) found = bin;
        }
        __syncthreads();
        key |= (unsigned)found.bin << shift;
        left = found.left;
        ties = counts[found.bin];
        __syncthreads();
    }
    if (tid >= 32)
        return;  // the rest is a warp's: the code of sums over the block would take longer to fetch
    const float kth = from_ordered_bits(key);
    float max = -INFINITY, below = -INFINITY;
#pragma unroll 1
    for (int j = tid; j < n; j += 32) {
        max = fmaxf(max, s[j]);
        if (s[j] < kth) below = fmaxf(below, s[j]);
    }
    max = row_max<32>(max);
    below = row_max<32>(below);
    const bool all = left == ties;  // the scores that equal the k-th all have a place
    const float theta = all ? threshold_between(kth, below) : kth,
                tie = all ? 0.0f : (float)left / (float)ties;
    float head = 0.0f, total = 0.0f;
#pragma unroll 1
    for (int j = tid; j < n; j += 32) {
        const float e = expf(s[j] - max);
        total += e;
        head += s[j] > theta ? e : s[j] == theta ? tie * e : 0.0f;
    }
    total = row_sum<32>(total);
    head = row_sum<32>(head);
    if (tid == 0) {
        rows.theta[row] = theta;
        rows.mass[row] = head / total;  // at most 1: rounding keeps the order of two sums, term by term
        rows.tie[row] = tie;
    }
}

template <class Kernel, class... Args>
void launch_attention(const Context& ctx, Kernel kernel, dim3 grid, int threads, size_t shared,
                      Args... args) {
    assert(shared <= ctx.max_shared);
    allow_shared(kernel, shared);
    kernel<<<grid, threads, shared, ctx.stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}

// The longest context whose scores the selection can hold in shared memory, beside a little of its own.
inline int max_select_context(const Context& ctx) {
    return (int)((ctx.max_shared - 2048) / sizeof(float));
}
