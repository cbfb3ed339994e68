// AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with the weight decay apart from the gradient.
//
//   g = grad * grad_scale
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w -= lr (mhat / (sqrt(vhat) + eps) + decay w),   mhat = m / (1 - beta1^t),  vhat = v / (1 - beta2^t)
//
// w is the float master copy. In bf16 the weights that the model computes with are its rounded copy, made
// here; in fp32 the two are the same array. Updates of a bf16 weight alone would be lost: at 1e-4 of the
// weight's size they are below its last bit.
#pragma once
#include <cmath>

#include "cuda_common.cuh"

struct AdamW {
    float lr, beta1, beta2, eps, decay;
    float grad_scale;                // global-norm clipping
    float correction1, correction2;  // 1 - beta1^t, 1 - beta2^t
};

template <class Float>
__global__ void adamw_kernel(Float* weight, float* master, float* m, float* v, const float* grad,
                             size_t num_packs, AdamW a) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= num_packs * 4) return;
    const Pack<float> g = load_pack(grad + i);
    Pack<float> w = load_pack(master + i), m1 = load_pack(m + i), v1 = load_pack(v + i);
    for (int k = 0; k < 4; k++) {
        const float gk = g[k] * a.grad_scale;
        m1[k] = a.beta1 * m1[k] + (1.0f - a.beta1) * gk;
        v1[k] = a.beta2 * v1[k] + (1.0f - a.beta2) * gk * gk;
        const float step = m1[k] / a.correction1 / (sqrtf(v1[k] / a.correction2) + a.eps);
        w[k] -= a.lr * (step + a.decay * w[k]);
    }
    store_pack(master + i, w);
    store_pack(m + i, m1);
    store_pack(v + i, v1);
    if constexpr (sizeof(Float) == 2)
        for (int k = 0; k < 4; k++) weight[i + k] = (Float)w[k];
}

// weight, master, m, v, grad: n elements each, n a multiple of 4; master == weight in fp32. t: the number of
// this update, from 1.
template <class Float>
void adamw_update(const Context& ctx, Float* weight, float* master, float* m, float* v, const float* grad,
                  size_t n, AdamW a, int64_t t) {
    assert(n % 4 == 0 && t >= 1);
    a.correction1 = (float)(1.0 - std::pow((double)a.beta1, (double)t));
    a.correction2 = (float)(1.0 - std::pow((double)a.beta2, (double)t));
    adamw_kernel<<<(unsigned)ceil_div(n / 4, 256), 256, 0, ctx.stream>>>(weight, master, m, v, grad, n / 4,
                                                                         a);
    CUDA_CHECK(cudaGetLastError());
}
