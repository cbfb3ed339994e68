// GELU in GPT-2's tanh form (Hendrycks and Gimpel, arXiv 1606.08415), written with the logistic function
// since (1 + tanh u) / 2 = sigmoid(2u):
//
//   u = sqrt(2/pi) (x + 0.044715 x^3),  s = sigmoid(2u),  gelu(x) = x s
//   gelu'(x) = s + x s (1 - s) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
#pragma once
#include "cuda_common.cuh"

__device__ inline float gelu_sigmoid(float x) {
    return 1.0f / (1.0f + __expf(-2.0f * 0.7978845608f * x * (1.0f + 0.044715f * x * x)));
}

template <class Float>
__global__ void gelu_forward_kernel(Float* out, const Float* inp, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    const Pack<Float> x = load_pack(inp + i * Pack<Float>::size);
    Pack<Float> y;
    for (int k = 0; k < Pack<Float>::size; k++) y[k] = (Float)((float)x[k] * gelu_sigmoid((float)x[k]));
    store_pack(out + i * Pack<Float>::size, y);
}

template <class Float>
__global__ void gelu_backward_kernel(Float* dinp, const Float* dout, const Float* inp, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    const Pack<Float> x = load_pack(inp + i * Pack<Float>::size), d = load_pack(dout + i * Pack<Float>::size);
    Pack<Float> dx;
    for (int k = 0; k < Pack<Float>::size; k++) {
        const float v = (float)x[k], s = gelu_sigmoid(v);
        const float slope = s + v * s * (1.0f - s) * 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * v * v);
        dx[k] = (Float)((float)d[k] * slope);
    }
    store_pack(dinp + i * Pack<Float>::size, dx);
}

// out, inp: n elements, n a multiple of 8.
template <class Float>
void gelu_forward(const Context& ctx, Float* out, const Float* inp, size_t n) {
    assert(n % 8 == 0);
    const size_t num_packs = n / Pack<Float>::size;
    gelu_forward_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, ctx.stream>>>(out, inp, num_packs);
    CUDA_CHECK(cudaGetLastError());
}

// dinp = dout gelu'(inp); dinp may be dout.
template <class Float>
void gelu_backward(const Context& ctx, Float* dinp, const Float* dout, const Float* inp, size_t n) {
    assert(n % 8 == 0);
    const size_t num_packs = n / Pack<Float>::size;
    gelu_backward_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, ctx.stream>>>(dinp, dout, inp,
                                                                                     num_packs);
    CUDA_CHECK(cudaGetLastError());
}
