// The entropy of attention rows, for the regularizer --reg entropy, a baseline for the top-k ones: it knows
// no k and pushes each row towards a single key.
//
//   H_i = -sum_j p_ij log p_ij = lse_i - E_i,   E_i = sum_j p_ij s_ij, the row's mean score
//
// since log p_ij = s_ij - lse_i. Its gradient: p_ij changes by p_ij ([j = m] - p_im) with s_im, and
// sum_j p_ij d log p_ij / ds_im = sum_j dp_ij / ds_im = 0, so
//
//   dH_i / ds_im = -sum_j log p_ij p_ij ([j = m] - p_im) = -p_im (log p_im + H_i) = -p_im (s_im - E_i)
//
// With weight w of H_i in the loss, the backward of attention.cuh becomes
//
//   ds_ij = p_ij (dp_ij + c_i s_ij - D_i - c_i E_i),   c_i = -w
//
// which is one multiply-add a score where the top-k regularizers have a compare and an add. E is saved and
// not H: where attention is nearly uniform, s and E are small, and as lse - H the digits of E would be lost.
//
// The forward kernels are left alone: E is computed here from the scores once more, by plain loops. It is a
// baseline, and its speed is not the point.
#pragma once
#include "attention_common.cuh"

// H of one row; not negative, whatever the rounding.
__device__ inline float row_entropy(const AttentionRows& rows, size_t row) {
    return fmaxf(rows.lse[row] - rows.mean_score[row], 0.0f);
}

// rows.mean_score of one row a block, from rows.lse. Grid: (T, B * NH).
template <class Float>
__global__ void attention_mean_scores_kernel(AttentionRows rows, const Float* qkv, int T, int num_heads,
                                             int hs) {
    constexpr int N = Pack<Float>::size;
    __shared__ float scratch[2][32];
    const int C = num_heads * hs, i = blockIdx.x;
    const size_t row = (size_t)blockIdx.y * T + i, stride = 3 * (size_t)C;
    const Float* head = qkv + (size_t)(blockIdx.y / num_heads) * T * stride + blockIdx.y % num_heads * hs;
    const Float *q = head + i * stride, *k = head + C;
    const float scale = 1.0f / sqrtf((float)hs), lse = rows.lse[row];
    float weighted = 0.0f, total = 0.0f;
    for (int j = threadIdx.x; j <= i; j += blockDim.x) {
        float sum[N] = {};
        for (int d = 0; d < hs; d += N) {
            const Pack<Float> x = load_pack(q + d), y = load_pack(k + j * stride + d);
            for (int e = 0; e < N; e++) sum[e] = fmaf((float)x[e], (float)y[e], sum[e]);
        }
        float dot = 0.0f;
        for (int e = 0; e < N; e++) dot += sum[e];
        const float score = dot * scale;
        const float p = expf(score - lse);
        weighted = fmaf(p, score, weighted);
        total += p;
    }
    weighted = block_sum(weighted, scratch[0]);
    total = block_sum(total, scratch[1]);
    // total is 1 but for the rounding of lse, which large scores would multiply
    if (threadIdx.x == 0) rows.mean_score[row] = weighted / total;
}

// Writes rows.mean_score [B,NH,T] from rows.lse as the forward left it; qkv [B,T,3C].
template <class Float>
void attention_mean_scores(const Context& ctx, AttentionRows rows, const Float* qkv, int B, int T,
                           int num_heads, int hs) {
    assert(rows.mean_score && B > 0 && T > 0 && hs % 8 == 0 && B * num_heads <= kMaxGridY);
    attention_mean_scores_kernel<<<dim3(T, B * num_heads), ctx.row_lanes == 1 ? 1 : 128, 0, ctx.stream>>>(
        rows, qkv, T, num_heads, hs);
    CUDA_CHECK(cudaGetLastError());
}
