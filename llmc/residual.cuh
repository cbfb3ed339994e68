// The residual stream: out = a + b. Its gradient passes to both unchanged, so there is no backward kernel.
#pragma once
#include "cuda_common.cuh"

template <class Float>
__global__ void add_forward_kernel(Float* out, const Float* a, const Float* b, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    const Pack<Float> x = load_pack(a + i * Pack<Float>::size), y = load_pack(b + i * Pack<Float>::size);
    Pack<Float> sum;
    for (int k = 0; k < Pack<Float>::size; k++) sum[k] = (Float)((float)x[k] + (float)y[k]);
    store_pack(out + i * Pack<Float>::size, sum);
}

// out, a, b: n elements, n a multiple of 8.
template <class Float>
void add_forward(const Context& ctx, Float* out, const Float* a, const Float* b, size_t n) {
    assert(n % 8 == 0);
    const size_t num_packs = n / Pack<Float>::size;
    add_forward_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, ctx.stream>>>(out, a, b, num_packs);
    CUDA_CHECK(cudaGetLastError());
}
