// What every kernel file uses: 128-bit packs, reductions over a row's lanes and over a block, and the sum of
// partial results. No floating-point atomics anywhere: every sum has a fixed order, so a run repeats bit for
// bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "context.h"

template <class A, class B>
constexpr __host__ __device__ auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// 16 bytes of T, loaded and stored at once (the widest memory instruction of a GPU).
template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
    __device__ T& operator[](int i) { return v[i]; }
    __device__ const T& operator[](int i) const { return v[i]; }
};

template <class T>
__device__ Pack<T> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ void store_pack(T* p, const Pack<T>& x) {
    *reinterpret_cast<Pack<T>*>(p) = x;
}

// Sum (or maximum) over the LANES threads that share a row; LANES is 1 or 32, see Context::row_lanes.
template <int LANES>
__device__ float row_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
template <int LANES>
__device__ float row_max(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Sum over the block, the same in every thread. The block has 1 thread or whole warps. `scratch`: 32 elements
// of shared memory, free for the next use after the next __syncthreads().
template <class T>
__device__ T block_sum(T x, T* scratch) {
    if (blockDim.x == 1) return x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < num_warps; w++) x += scratch[w];
    return x;
}

// out[i] += the sum over the `count` rows of partial[count][n], in order: the second half of every column
// sum.
[[maybe_unused]] static __global__ void add_partial_sums_kernel(float* out, const float* partial, int count,
                                                                size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int k = 0; k < count; k++) sum += partial[k * n + i];
    out[i] += sum;
}

inline void add_partial_sums(const Context& ctx, float* out, const float* partial, int count, size_t n) {
    add_partial_sums_kernel<<<(unsigned)ceil_div(n, 256), 256, 0, ctx.stream>>>(out, partial, count, n);
    CUDA_CHECK(cudaGetLastError());
}

// How many chunks of rows a column sum is cut into: enough to fill the device twice over, at least 16 rows
// each.
inline int column_sum_chunks(const Context& ctx, int rows, int packs_per_row, int block) {
    const int strips = ceil_div(packs_per_row, block);
    const int wanted = ceil_div(8 * ctx.num_sms, strips);
    const int most = ceil_div(rows, 16);
    return wanted < most ? wanted : most;
}

// Floats of scratch that is enough for the column sums of any matrix with `columns` columns.
inline size_t column_sum_scratch(const Context& ctx, size_t columns) {
    return 2 * columns * (8 * ctx.num_sms + 1);
}
