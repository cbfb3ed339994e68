// The global gradient norm, sqrt(sum over every parameter of g^2), for clipping: Pascanu et al., arXiv
// 1211.5063. Two stages in a fixed order: each block sums one contiguous chunk, one block adds up the blocks'
// sums in double. What AdamW needs of it stays on the device, so that the host does not have to wait.
//
// The gradients are read once, 4 bytes a parameter: four loads under way in each of 2,048 threads of an SM.
#pragma once
#include "cuda_common.cuh"

struct GradNorm {
    double norm;  // before clipping
    float scale;  // what the gradients are to be multiplied by: min(1, clip / norm)
    int finite;   // 0: no update should be made
};

inline constexpr int kGradNormBlocks = 1024;

[[maybe_unused]] static __global__ void sum_of_squares_kernel(float* partial, const float* grad,
                                                              size_t num_packs) {
    __shared__ float scratch[32];
    const size_t chunk = ceil_div(num_packs, (size_t)gridDim.x);
    const size_t begin = blockIdx.x * chunk;
    const size_t end = begin + chunk < num_packs ? begin + chunk : num_packs;
    float sum[4][4] = {};
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x * 4) {
        Pack<float> g[4] = {};
        for (int j = 0; j < 4; j++)
            if (i + j * blockDim.x < end) g[j] = load_pack(grad + (i + j * blockDim.x) * 4);
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 4; k++) sum[j][k] += g[j][k] * g[j][k];
    }
    float total = 0.0f;
    for (int j = 0; j < 4; j++) total += (sum[j][0] + sum[j][1]) + (sum[j][2] + sum[j][3]);
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

[[maybe_unused]] static __global__ void norm_kernel(GradNorm* result, const float* partial, int count,
                                                    float clip) {
    __shared__ double scratch[32];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += (double)partial[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x > 0) return;
    const double norm = sqrt(sum);
    result->norm = norm;
    result->scale = clip > 0.0f && norm > clip ? (float)(clip / norm) : 1.0f;
    result->finite = isfinite(norm);
}

// result: on the device; scratch: kGradNormBlocks floats; grad: n floats, n a multiple of 4; clip: the
// largest norm that is left as it is, 0 for any.
inline void grad_norm(const Context& ctx, GradNorm* result, float* scratch, const float* grad, size_t n,
                      float clip) {
    assert(n % 4 == 0);
    const size_t num_packs = n / 4;
    const size_t packs_per_block = 256 * 32;  // enough work for each thread to pay for the block's reduction
    const size_t wanted = ceil_div(num_packs, packs_per_block);
    const int blocks = (int)(wanted < kGradNormBlocks ? wanted : kGradNormBlocks);
    const bool single = ctx.row_lanes == 1;
    sum_of_squares_kernel<<<blocks, single ? 1 : 256, 0, ctx.stream>>>(scratch, grad, num_packs);
    CUDA_CHECK(cudaGetLastError());
    norm_kernel<<<1, single ? 1 : 256, 0, ctx.stream>>>(result, scratch, blocks, clip);
    CUDA_CHECK(cudaGetLastError());
}
