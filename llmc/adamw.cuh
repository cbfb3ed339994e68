// AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with the weight decay apart from the gradient.
//
//   g = grad * scale                                         (global-norm clipping, grad_norm.cuh)
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w -= lr (mhat / (sqrt(vhat) + eps) + decay w),   mhat = m / (1 - beta1^t),  vhat = v / (1 - beta2^t)
//
// w is the float master copy. In bf16 the weights that the model computes with are its rounded copy, made
// here; in fp32 the two are the same array. Updates of a bf16 weight alone would be lost: at 1e-4 of the
// weight's size they are below its last bit.
//
// One launch for all parameters: master, m and v are read and written and grad is read, 28 bytes a parameter,
// and 2 more are written in bf16.
#pragma once
#include <cmath>
#include <vector>

#include "cuda_common.cuh"
#include "grad_norm.cuh"
#include "params.h"

struct AdamW {
    float lr, beta1, beta2, eps, decay;
};

// To which parameters weight decay applies: one bit for every 8 elements of the flat arrays, of which every
// tensor takes a multiple. (A table of tensors would have to be searched by each block, or each thread.)
inline std::vector<uint32_t> decay_bits(const std::vector<ParamTensor>& params) {
    const size_t n = params.back().offset + params.back().size();
    std::vector<uint32_t> bits(ceil_div(n, size_t{256}), 0);
    for (const ParamTensor& p : params) {
        assert(p.offset % 8 == 0 && p.size() % 8 == 0);
        if (!p.decay) continue;
        for (size_t i = p.offset / 8; i < (p.offset + p.size()) / 8; i++) bits[i / 32] |= 1u << i % 32;
    }
    return bits;
}

template <class Float>
struct alignas(4 * sizeof(Float)) Rounded {  // a pack of four floats, stored at once
    Float v[4];
};

// A pack of four a thread: with four loads under way in each of an SM's 2,048 threads there is no need for
// more.
template <class Float>
__global__ void adamw_kernel(Float* weight, float* master, float* m, float* v, const float* grad,
                             const uint32_t* decay_bits, const GradNorm* norm, size_t n, AdamW a,
                             float inv_correction1, float inv_correction2) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const Pack<float> g = load_pack(grad + i);
    Pack<float> w = load_pack(master + i), m1 = load_pack(m + i), v1 = load_pack(v + i);
    const float decay = decay_bits[i / 256] >> (i / 8 % 32) & 1 ? a.decay : 0.0f;
    const float scale = norm->scale;
    if (!norm->finite) return;
    for (int k = 0; k < 4; k++) {
        const float gk = g[k] * scale;
        m1[k] = a.beta1 * m1[k] + (1.0f - a.beta1) * gk;
        v1[k] = a.beta2 * v1[k] + (1.0f - a.beta2) * gk * gk;
        const float step = m1[k] * inv_correction1 / (sqrtf(v1[k] * inv_correction2) + a.eps);
        w[k] -= a.lr * (step + decay * w[k]);
    }
    store_pack(master + i, w);
    store_pack(m + i, m1);
    store_pack(v + i, v1);
    if constexpr (sizeof(Float) == 2) {
        Rounded<Float> rounded;
        for (int k = 0; k < 4; k++) rounded.v[k] = (Float)w[k];
        *reinterpret_cast<Rounded<Float>*>(weight + i) = rounded;
    }
}

// weight, master, m, v, grad: n elements each, n a multiple of 8; master == weight in fp32. decay_bits: see
// above, on the device; norm: what grad_norm() left there. If the norm is not finite, nothing is changed.
// t: the number of this update, from 1.
template <class Float>
void adamw_update(const Context& ctx, Float* weight, float* master, float* m, float* v, const float* grad,
                  const uint32_t* decay_bits, const GradNorm* norm, size_t n, AdamW a, int64_t t) {
    assert(n % 8 == 0 && t >= 1);
    const double correction1 = 1.0 - std::pow((double)a.beta1, (double)t);
    const double correction2 = 1.0 - std::pow((double)a.beta2, (double)t);
    adamw_kernel<<<(unsigned)ceil_div(n, size_t{1024}), 256, 0, ctx.stream>>>(
        weight, master, m, v, grad, decay_bits, norm, n, a, (float)(1.0 / correction1),
        (float)(1.0 / correction2));
    CUDA_CHECK(cudaGetLastError());
}
