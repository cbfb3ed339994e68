// What every kernel file uses: 128-bit packs, reductions over a row's lanes and over a block, and the sum of
// partial results. No floating-point atomics anywhere: every sum has a fixed order, so a run repeats bit for
// bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "context.h"

template <class A, class B>
constexpr __host__ __device__ auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// Lets a kernel have so many bytes of dynamic shared memory. What it may have is only ever raised: it belongs
// to the kernel, and a launch that a graph has recorded needs it whenever it is replayed, whatever else the
// kernel was launched with since. It is set even where it seems to be enough already: whether what a kernel
// has without asking counts its static part is not documented.
template <class... Params>
void allow_shared(void (*kernel)(Params...), size_t bytes) {
    cudaFuncAttributes now;
    CUDA_CHECK(cudaFuncGetAttributes(&now, kernel));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    std::max((int)bytes, now.maxDynamicSharedSizeBytes)));
}

// The most blocks that a grid may have along y and z.
inline constexpr int kMaxGridY = 65535;

// The most rows of attention, B * T * NH: the kernels number their threads, up to 32 a row, in 32 bits.
inline constexpr int64_t kMaxRows = INT32_MAX / 32;

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

// Zeros where there is nothing to load.
template <class T>
__device__ Pack<T> load_pack_if(bool inside, const T* p) {
    Pack<T> x = {};
    if (inside) x = load_pack(p);
    return x;
}

// 16 bytes of another type as they lie in memory, 32 bits a register; zeros where there is nothing to load.
using PackWords = Pack<uint32_t>;
__device__ __forceinline__ PackWords load_words_if(bool inside, const void* p) {
    PackWords words = {};
#ifdef CUDA_CPU
    if (inside) memcpy(&words, p, sizeof words);  // g++ assumes that nothing is read as another type
#else
    if (inside) words = *static_cast<const PackWords*>(p);
#endif
    return words;
}

// Two floats rounded to bf16 in one register, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

__device__ __forceinline__ void unpack_bf16(uint32_t pair, float& low, float& high) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}

// A pack as floats, and floats as a pack: two of bf16 at a time, in half the instructions that one by one
// take.
template <class T>
__device__ __forceinline__ void unpack(float (&x)[Pack<T>::size], const Pack<T>& pack) {
    if constexpr (sizeof(T) == 2) {
        uint32_t pairs[4];
        memcpy(pairs, &pack, sizeof pairs);
        for (int i = 0; i < 4; i++) unpack_bf16(pairs[i], x[2 * i], x[2 * i + 1]);
    } else {
        for (int k = 0; k < Pack<T>::size; k++) x[k] = (float)pack[k];
    }
}
template <class T>
__device__ __forceinline__ Pack<T> pack_floats(const float (&x)[Pack<T>::size]) {
    Pack<T> pack;
    if constexpr (sizeof(T) == 2) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; i++) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        memcpy(&pack, pairs, sizeof pack);
    } else {
        for (int k = 0; k < Pack<T>::size; k++) pack[k] = (T)x[k];
    }
    return pack;
}

// Floats as unsigned integers in the same order.
__device__ inline unsigned ordered_bits(float x) {
    const unsigned u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ inline float from_ordered_bits(unsigned u) {
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

// Where a pack of bf16 is used twice with much in between, a compiler may unpack it once and hold it as
// floats, in twice the registers. This makes it unpack it again.
template <class T>
__device__ void stay_packed(Pack<T>& x) {
#ifdef CUDA_CPU
    (void)x;
#else
    uint32_t(&r)[4] = reinterpret_cast<uint32_t(&)[4]>(x);
    if constexpr (sizeof(T) == 2) asm volatile("" : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]));
#endif
}

// p[0 ... N-1] = x, or += x; N is a multiple of 4.
template <int N>
__device__ void store_floats(float* p, const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        Pack<float> y;
        for (int k = 0; k < 4; k++) y[k] = x[i + k];
        store_pack(p + i, y);
    }
}
template <int N>
__device__ void add_floats(float* p, const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        Pack<float> y = load_pack(p + i);
        for (int k = 0; k < 4; k++) y[k] += x[i + k];
        store_pack(p + i, y);
    }
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

// out[i] += the sum over the `count` rows of partial[count][n]: the second half of every column sum. Each of
// a column's blockDim.y threads adds up every blockDim.y-th row, and the first one their sums, in order.
[[maybe_unused]] static __global__ void add_partial_sums_kernel(float* out, const float* partial, int count,
                                                                size_t n) {
    __shared__ float sums[32][32];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    if (i < n)
        for (int k = threadIdx.y; k < count; k += blockDim.y) sum += partial[k * n + i];
    if (blockDim.y > 1) {
        sums[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y > 0) return;
        sum = 0.0f;
        for (int y = 0; y < (int)blockDim.y; y++) sum += sums[y][threadIdx.x];
    }
    if (i < n) out[i] += sum;
}

// 32 threads a column, where there is something to share: the partial sums lie in the L2 cache, and one
// thread that fetches the hundreds of a column one after another would take as long as a whole layernorm.
inline void add_partial_sums(const Context& ctx, float* out, const float* partial, int count, size_t n) {
    const dim3 block = ctx.row_lanes == 1 || count < 8 ? dim3(256, 1) : dim3(32, 32);
    add_partial_sums_kernel<<<(unsigned)ceil_div(n, (size_t)block.x), block, 0, ctx.stream>>>(out, partial,
                                                                                              count, n);
    CUDA_CHECK(cudaGetLastError());
}

// How many chunks of rows a column sum is cut into: about 8 blocks a multiprocessor in all, and about 16 rows
// or more to a chunk.
inline int column_sum_chunks(const Context& ctx, int rows, int packs_per_row, int block) {
    const int strips = ceil_div(packs_per_row, block);
    const int wanted = ceil_div(8 * ctx.num_sms, strips);
    const int most = ceil_div(rows, 16);
    return wanted < most ? wanted : most;
}

// Floats of scratch that is enough for the column sums of any matrix with `columns` columns.
inline size_t column_sum_scratch(const Context& ctx, size_t columns) {
    return columns * 8 * ctx.num_sms;
}
