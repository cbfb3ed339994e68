// The global gradient norm, sqrt(sum over every parameter of g^2), for clipping: Pascanu et al., arXiv
// 1211.5063. Two stages in a fixed order: each block sums one contiguous chunk, one thread adds the blocks in
// double.
#pragma once
#include "cuda_common.cuh"

inline constexpr int kGradNormBlocks = 1024;

[[maybe_unused]] static __global__ void sum_of_squares_kernel(float* partial, const float* grad,
                                                              size_t num_packs) {
    __shared__ float scratch[32];
    const size_t chunk = ceil_div(num_packs, (size_t)gridDim.x);
    const size_t begin = blockIdx.x * chunk;
    const size_t end = begin + chunk < num_packs ? begin + chunk : num_packs;
    float sum[4] = {};
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const Pack<float> g = load_pack(grad + i * 4);
        for (int k = 0; k < 4; k++) sum[k] += g[k] * g[k];
    }
    const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

[[maybe_unused]] static __global__ void norm_kernel(double* norm, const float* partial, int count) {
    double sum = 0.0;
    for (int i = 0; i < count; i++) sum += (double)partial[i];
    *norm = sqrt(sum);
}

// norm: one double on the device; scratch: kGradNormBlocks floats; grad: n floats, n a multiple of 4.
inline void grad_norm(const Context& ctx, double* norm, float* scratch, const float* grad, size_t n) {
    assert(n % 4 == 0);
    const size_t num_packs = n / 4;
    const size_t packs_per_block = 256 * 32;  // enough work for each thread to pay for the block's reduction
    const size_t wanted = ceil_div(num_packs, packs_per_block);
    const int blocks = (int)(wanted < kGradNormBlocks ? wanted : kGradNormBlocks);
    sum_of_squares_kernel<<<blocks, 256, 0, ctx.stream>>>(scratch, grad, num_packs);
    CUDA_CHECK(cudaGetLastError());
    norm_kernel<<<1, 1, 0, ctx.stream>>>(norm, scratch, blocks);
    CUDA_CHECK(cudaGetLastError());
}
