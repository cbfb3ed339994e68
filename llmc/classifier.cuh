// Softmax, cross-entropy and its gradient in one kernel, over the logits of one position at a time.
//
//   loss[n] = log(sum_v exp(logit[n,v])) - logit[n, target[n]]
//   dlogit[n,v] = (exp(logit[n,v]) / sum - [v = target[n]]) dloss
//
// The gradient takes the logits' place: the [rows, Vp] array is the largest of the model, and a second copy
// would double it. Columns V ... Vp-1 are the vocabulary's padding: not read, and their gradient is zero.
#pragma once
#include "cuda_common.cuh"

// One block a row. A running maximum keeps every exponent at or below zero; the sum is rescaled when it
// moves.
template <class Float, bool BACKWARD>
__global__ void classifier_kernel(float* loss, Float* logits, const int* targets, float dloss, int V,
                                  int Vp) {
    constexpr int N = Pack<Float>::size;
    __shared__ float scratch[2][32];
    Float* row = logits + (size_t)blockIdx.x * Vp;

    float max = -INFINITY, sum = 0.0f;
    for (int c = threadIdx.x * N; c < V; c += blockDim.x * N) {
        const Pack<Float> x = load_pack(row + c);
        float value[N], pack_max = max;
        for (int k = 0; k < N; k++) {
            value[k] = c + k < V ? (float)x[k] : -INFINITY;
            pack_max = fmaxf(pack_max, value[k]);
        }
        if (pack_max > max) {
            sum *= __expf(max - pack_max);
            max = pack_max;
        }
        for (int k = 0; k < N; k++) sum += __expf(value[k] - max);
    }
    if (blockDim.x > 1) {  // the block's maximum, then its sum relative to that
        float warp_max = row_max<32>(max);
        if (threadIdx.x % 32 == 0) scratch[0][threadIdx.x / 32] = warp_max;
        __syncthreads();
        float block_max = -INFINITY;
        for (int w = 0; w < (int)blockDim.x / 32; w++) block_max = fmaxf(block_max, scratch[0][w]);
        sum = block_sum(max == -INFINITY ? 0.0f : sum * __expf(max - block_max), scratch[1]);
        max = block_max;
    }

    const int target = targets[blockIdx.x];
    if (threadIdx.x == 0) loss[blockIdx.x] = max + logf(sum) - (float)row[target];
    if (!BACKWARD) return;
    __syncthreads();  // the target's logit has been read: the row may be overwritten

    const float scale = dloss / sum;
    for (int c = threadIdx.x * N; c < Vp; c += blockDim.x * N) {
        const Pack<Float> x = load_pack(row + c);
        Pack<Float> d;
        for (int k = 0; k < N; k++) {
            const float p = c + k < V ? __expf((float)x[k] - max) * scale : 0.0f;
            d[k] = (Float)(c + k == target ? p - dloss : p);
        }
        store_pack(row + c, d);
    }
}

// loss [rows]; logits [rows,Vp]; targets [rows], each below V. Vp is a multiple of 8. With backward, the
// logits are replaced by their gradient times dloss (1 / rows for a mean).
template <class Float>
void classifier(const Context& ctx, float* loss, Float* logits, const int* targets, float dloss, int rows,
                int V, int Vp, bool backward) {
    assert(Vp % 8 == 0 && V <= Vp);
    const int block = ctx.row_lanes == 1 ? 1 : Vp < 8192 ? 128 : 1024;
    if (backward)
        classifier_kernel<Float, true><<<rows, block, 0, ctx.stream>>>(loss, logits, targets, dloss, V, Vp);
    else
        classifier_kernel<Float, false><<<rows, block, 0, ctx.stream>>>(loss, logits, targets, dloss, V, Vp);
    CUDA_CHECK(cudaGetLastError());
}
