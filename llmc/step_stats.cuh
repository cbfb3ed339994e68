// What an update measured, summed up on the device: losses and masses over its micro-steps, the gradient's
// norm, and which tensor's gradient went wrong if one did. The host reads it when the update is over, or one
// update later, and never waits inside one.
#pragma once
#include <vector>

#include "grad_norm.cuh"
#include "params.h"

struct StepStats {
    double ce;       // cross-entropy a token, nats
    double reg;      // R, without lambda
    double mass;     // top-k mass
    GradNorm norm;   // as grad_norm() left it
    int bad_tensor;  // number of tensors - index in gpt2_params() of the first whose gradient is not finite;
                     // 0: none
};

struct LayerFactors {
    float factor[kMaxLayers];
};

// One block: stats->ce += share * mean of losses[rows]; stats->mass and ->reg += mass_share * the means of
// mass_sums[L,heads,2] over mass_rows rows, reg with the layers' factors.
[[maybe_unused]] static __global__ void step_stats_kernel(StepStats* stats, const float* losses, int rows,
                                                          double share, const float* mass_sums, int L,
                                                          int heads, double mass_rows, double mass_share,
                                                          LayerFactors layers) {
    __shared__ double scratch[3][32];
    double ce = 0.0, mass = 0.0, reg = 0.0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) ce += (double)losses[i];
    if (mass_share != 0.0 && mass_rows > 0.0)
        for (int i = threadIdx.x; i < L * heads; i += blockDim.x) {
            mass += (double)mass_sums[2 * i];
            reg += (double)layers.factor[i / heads] * (double)mass_sums[2 * i + 1];
        }
    ce = block_sum(ce, scratch[0]);
    mass = block_sum(mass, scratch[1]);
    reg = block_sum(reg, scratch[2]);
    if (threadIdx.x > 0) return;
    stats->ce += share * ce / rows;
    // Where no row has more than k keys, all of the mass is within the top k.
    stats->mass += mass_rows > 0.0 ? mass_share * mass / mass_rows : mass_share;
    if (mass_rows > 0.0) stats->reg += mass_share * reg / mass_rows;
}

// losses [rows]; mass_sums [L,heads,2], see attention_mass_sums; mass_rows: the rows that they sum over.
// mass_share 0: nothing was measured.
inline void add_step_stats(const Context& ctx, StepStats* stats, const float* losses, int rows, double share,
                           const float* mass_sums, int heads, double mass_rows, double mass_share,
                           const std::vector<float>& layer_factors) {
    assert(layer_factors.size() <= kMaxLayers);
    LayerFactors layers = {};
    for (size_t l = 0; l < layer_factors.size(); l++) layers.factor[l] = layer_factors[l];
    step_stats_kernel<<<1, ctx.row_lanes == 1 ? 1 : 1024, 0, ctx.stream>>>(
        stats, losses, rows, share, mass_sums, (int)layer_factors.size(), heads, mass_rows, mass_share,
        layers);
    CUDA_CHECK(cudaGetLastError());
}

// One block a tensor, which ends at once while all is well.
[[maybe_unused]] static __global__ void bad_tensor_kernel(StepStats* stats, const float* grads,
                                                          const size_t* begin, int tensors) {
    if (stats->norm.finite) return;
    __shared__ int scratch[32];
    int bad = 0;
    for (size_t i = begin[blockIdx.x] + threadIdx.x; i < begin[blockIdx.x + 1]; i += blockDim.x)
        bad |= !isfinite(grads[i]);
    bad = block_sum(bad, scratch);
    // The largest of what is larger the earlier the tensor.
    if (bad && threadIdx.x == 0) atomicMax(&stats->bad_tensor, tensors - (int)blockIdx.x);
}

// Sets stats->bad_tensor, which must be 0, to tensors - index. begin: tensors + 1 offsets into grads.
inline void find_bad_tensor(const Context& ctx, StepStats* stats, const float* grads, const size_t* begin,
                            int tensors) {
    bad_tensor_kernel<<<tensors, ctx.row_lanes == 1 ? 1 : 256, 0, ctx.stream>>>(stats, grads, begin, tensors);
    CUDA_CHECK(cudaGetLastError());
}
