// Causal self-attention with the top-k regularizer, forward and backward, without ever storing a T x T matrix
// (FlashAttention, arXiv 2205.14135). The formulas are here; the kernels are in attention_bf16.cuh (tensor
// cores), attention_hopper.cuh (Hopper's) and attention_plain.cuh (plain).
//
//   s_ij = q_i . k_j / sqrt(hs) for j <= i,  p = softmax(s),  o_i = sum_j p_ij v_j
//   S_i: the k largest scores of row i,  M_i = sum of p_ij over S_i
//
// The forward saves, per row: lse_i = log sum_j exp(s_ij); theta_i, halfway between the k-th and the (k+1)-th
// largest score; M_i. With these the backward rebuilds p_ij = exp(s_ij - lse_i) and [j in S_i] = [s_ij >
// theta_i]:
//
//   dp_ij = do_i . v_j,   D_i = sum_j p_ij dp_ij = do_i . o_i,   c_i = lambda f'(M_i) / N
//   ds_ij = p_ij (dp_ij + c_i [j in S_i] - D_i - c_i M_i)
//   dq_i = sum_j ds_ij k_j / sqrt(hs),  dk_j = sum_i ds_ij q_i / sqrt(hs),  dv_j = sum_i p_ij do_i
//
// where f is the regularizer's function of M and N the number of rows that it averages (topk.h). In the code
// lambda / N, with the factors that a layer and a micro-step put on it, is `weight`, and c_i `slope`.
//
// The regularizer is one compare and one add a score. Halfway means that rounding cannot move a key across
// the threshold unless the gap itself is that small; scores are still computed by the same operations in the
// same order in forward and backward, so they agree bit for bit.
//
// Equal scores: if the k-th and the (k+1)-th are equal there is no gap. Then theta is their value, and the
// keys that tie share the places that are left: each counts with weight tie = places / ties, in M and in ds.
// M is then still the sum of the k largest probabilities, and no position is preferred over another.
//
// Rows with n <= k keys have M = 1, theta = -infinity and no gradient from the regularizer.
//
// The baseline that penalizes the entropy of the same rows has a gradient of its own: attention_entropy.cuh.
// Without any regularizer cuDNN may do the work, if the user wants it: attention_cudnn.h.
#pragma once
#include "attention_bf16.cuh"
#include "attention_cudnn.h"
#include "attention_entropy.cuh"
#include "attention_hopper.cuh"
#include "attention_plain.cuh"
#include "bias.cuh"

// What a layer's heads did, summed over the rows of one (batch row, head) each: sums[B*NH][2] = {M, f(M)},
// for entropy {M, H}, over the queries with more than k keys.
[[maybe_unused]] static __global__ void attention_mass_sums_kernel(float* sums, AttentionRows rows, Reg reg,
                                                                   int T, int topk) {
    __shared__ float scratch[2][32];
    const size_t first = (size_t)blockIdx.x * T;
    float m = 0.0f, f = 0.0f;
    for (int i = topk + threadIdx.x; i < T; i += blockDim.x) {
        const float mass = rows.mass[first + i];
        m += mass;
        f += reg == Reg::entropy ? row_entropy(rows, first + i) : reg_value(reg, mass);
    }
    m = block_sum(m, scratch[0]);
    f = block_sum(f, scratch[1]);
    if (threadIdx.x == 0) {
        sums[blockIdx.x * 2] = m;
        sums[blockIdx.x * 2 + 1] = f;
    }
}

// Where the mass goes, for validation: sums[B*NH][4], over the queries with more than k keys, of
// {p_i0, p_ii, top-k mass without key 0, all mass without key 0}.
template <class Float>
__global__ void attention_sink_sums_kernel(float* sums, AttentionRows rows, const Float* qkv, int T,
                                           int num_heads, int hs, int topk) {
    __shared__ float scratch[4][32];
    const int C = num_heads * hs;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)(blockIdx.x / num_heads) * T * stride + blockIdx.x % num_heads * hs;
    const Float* k = q + C;
    const float scale = 1.0f / sqrtf((float)hs);
    float sum[4] = {};
    for (int i = topk + threadIdx.x; i < T; i += blockDim.x) {
        const size_t row = (size_t)blockIdx.x * T + i;
        float first = 0.0f, self = 0.0f;
        for (int d = 0; d < hs; d++) {
            first = fmaf((float)q[i * stride + d], (float)k[d], first);
            self = fmaf((float)q[i * stride + d], (float)k[i * stride + d], self);
        }
        first *= scale;
        const float p0 = fminf(expf(first - rows.lse[row]), 1.0f), theta = rows.theta[row];
        const float member = first > theta ? 1.0f : first == theta ? rows.tie[row] : 0.0f;
        sum[0] += p0;
        sum[1] += expf(self * scale - rows.lse[row]);
        sum[2] += fmaxf(rows.mass[row] - member * p0, 0.0f);
        sum[3] += 1.0f - p0;
    }
    for (int s = 0; s < 4; s++) {
        const float total = block_sum(sum[s], scratch[s]);
        if (threadIdx.x == 0) sums[blockIdx.x * 4 + s] = total;
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Throws where a batch of B x T tokens (-b and -t) is more than the launches below can number.
inline void check_batch_fits(int B, int T, int num_heads) {
    const int64_t heads = (int64_t)B * num_heads;
    if (heads > kMaxGridY)
        fail("-b (--batch) times the number of heads is %lld, and a launch takes %d: lower -b",
             (long long)heads, kMaxGridY);
    if (heads * T > kMaxRows) fail("-b times -t is too large: lower -b (%d) or -t (%d)", B, T);
}

// The longest -t with which masses can be measured, whatever -k is: bf16's kernels have that limit, and
// fp32's for k above kMaxListed.
inline int max_topk_context(const Context& ctx) {
    return max_select_context(ctx);
}

// out [B,T,C]; qkv [B,T,3C]: queries, keys and values of all heads, C = num_heads * hs. rows.lse is written;
// with topk > 0 also theta, mass and tie, for that k (above kMaxListed, T is at most max_select_context).
// topk is an int, or NoTopk().
template <class Float, class Topk>
void attention_forward(const Context& ctx, Float* out, AttentionRows rows, const Float* qkv, int B, int T,
                       int num_heads, int hs, Topk topk) {
    assert(B > 0 && T > 0 && topk >= 0 && B * num_heads <= kMaxGridY);
    if constexpr (sizeof(Float) == 2 && kUseCudnn)
        if (topk == 0 && attention_forward_cudnn(ctx, out, rows.lse, qkv, B, T, num_heads, hs)) return;
    if constexpr (sizeof(Float) == 2) {
        if (use_hopper(ctx, hs))
            attention_forward_hopper(ctx, out, rows, qkv, B, T, num_heads, topk);
        else
            attention_forward_bf16(ctx, out, rows, qkv, B, T, num_heads, hs, topk);
    } else
        attention_forward_plain(ctx, out, rows, qkv, B, T, num_heads, hs, topk);
}

// Floats of scratch that attention_backward needs, and more where prepare_attention_cudnn() says so.
template <class Float>
size_t attention_backward_scratch(const Context& ctx, int B, int T, int num_heads, int hs) {
    const size_t rows = (size_t)B * num_heads * T;
    size_t floats = 2 * rows;
    if (sizeof(Float) == 2 && use_hopper(ctx, hs))
        floats = attention_backward_hopper_scratch(B, T, num_heads);
    else if (sizeof(Float) == 2)
        with_backward_tile(ctx, hs, [&](auto size, auto queries) {
            floats = rows * (4 + size) + attention_backward_flags(B, T, num_heads, queries);
        });
    return std::max(floats, column_sum_scratch(ctx, (size_t)3 * num_heads * hs));
}

// dqkv [B,T,3C] is overwritten; dbias [3C] is added the sum of its rows, the gradient of qkv's bias. dout,
// out [B,T,C]; rows as the forward saved them for the same topk, with attention_mean_scores() where the
// regularizer is entropy. weight: lambda / N of this layer, see above, on the device, so that it may change
// under a recorded launch; null: no regularizer, and kernels without its code. scratch:
// attention_backward_scratch floats, 16-byte aligned.
template <class Float>
void attention_backward(const Context& ctx, Float* dqkv, float* dbias, float* scratch, const Float* dout,
                        const Float* out, const Float* qkv, AttentionRows rows, Reg reg, const float* weight,
                        int B, int T, int num_heads, int hs, int topk) {
    assert(B > 0 && T > 0 && (!weight || topk > 0) && B * num_heads <= kMaxGridY);
    assert(!weight || reg != Reg::entropy || rows.mean_score);
    bool done = false;
    if constexpr (sizeof(Float) == 2) {
        if (kUseCudnn && !weight)
            done =
                attention_backward_cudnn(ctx, dqkv, scratch, dout, out, qkv, rows.lse, B, T, num_heads, hs);
        if (!done && use_hopper(ctx, hs))
            return attention_backward_hopper(ctx, dqkv, dbias, scratch, dout, out, qkv, rows, reg, weight, B,
                                             T, num_heads, topk);
        if (!done)
            attention_backward_bf16(ctx, dqkv, scratch, dout, out, qkv, rows, reg, weight, B, T, num_heads,
                                    hs, topk);
    } else
        attention_backward_plain(ctx, dqkv, scratch, dout, out, qkv, rows, reg, weight, B, T, num_heads, hs,
                                 topk);
    bias_backward(ctx, dbias, scratch, dqkv, B * T, 3 * num_heads * hs);
}

// sums [B*NH][2], see attention_mass_sums_kernel; rows as the forward, and for entropy
// attention_mean_scores(), left them.
inline void attention_mass_sums(const Context& ctx, float* sums, AttentionRows rows, Reg reg, int B, int T,
                                int num_heads, int topk) {
    assert(reg != Reg::entropy || rows.mean_score);
    attention_mass_sums_kernel<<<B * num_heads, 64, 0, ctx.stream>>>(sums, rows, reg, T, topk);
    CUDA_CHECK(cudaGetLastError());
}

// sums [B*NH][4], see attention_sink_sums_kernel.
template <class Float>
void attention_sink_sums(const Context& ctx, float* sums, AttentionRows rows, const Float* qkv, int B, int T,
                         int num_heads, int hs, int topk) {
    attention_sink_sums_kernel<<<B * num_heads, 64, 0, ctx.stream>>>(sums, rows, qkv, T, num_heads, hs, topk);
    CUDA_CHECK(cudaGetLastError());
}
