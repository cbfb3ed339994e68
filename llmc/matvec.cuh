// The linear layer for the few rows of token-by-token decoding, with what comes before and after it fused in:
//
//   out[n,o] = f(sum_i x[n,i] weight[o,i] + bias[o])
//   x = inp, or layernorm(inp) (the formula is in layernorm.cuh);  f(y) = y, gelu(y) or y + residual[n,o]
//
// With up to 8 rows, reading the OC IC weights once is all there is to do. GPT-2 124M has 249 MB of them in
// bf16, which an H100 reads in 83 us at 3 TB/s, and decoding a token launches 49 of these kernels: 1.7 us for
// each, so what counts is that every launch asks for its weights at once and early. (Measured on an H200, all
// launches of a token: 420 us.)
//
// By Little's law 3 TB/s with 0.7 us of latency means 2.1 MB under way, 16 KB for each of 132 SMs. A warp
// asks for up to 4 packs a lane (2 KB) at a time, and two or three blocks of 8 warps fit on an SM: 32 or 48
// KB. A matrix too small for so many blocks has all of its weights under way at once: in a 768 x 3072 matrix
// of bf16 four warps share an output, and each lane has 3 packs to load.
//
// A row's result does not depend on the number of rows, to the bit: the order of its sums depends on IC
// alone.
#pragma once
#include "gelu.cuh"
#include "layernorm.cuh"
#include "mma.cuh"

inline constexpr int kMaxMatvecRows = 8;
inline constexpr int kMatvecWarps = 8;  // of a block
inline constexpr int kMatvecPacks = 4;  // that a lane has under way for one output

// Parameters [IC] of the layernorm before the product; without one, null.
template <class Float>
struct Normalize {
    const Float* weight;
    const Float* bias;
};

// x[row] = layernorm(x[row]) in shared memory, by the LANES threads of its row. gain, shift: shared memory.
template <int LANES, class Float>
__device__ void normalize_row(Float* x, const Float* gain, const Float* shift, int C, int lane) {
    constexpr int N = Pack<Float>::size;
    float sum[N] = {}, square[N] = {};
    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> p = load_pack(x + c);
        for (int k = 0; k < N; k++) sum[k] += (float)p[k];
    }
    float total = 0.0f;
    for (int k = 0; k < N; k++) total += sum[k];
    const float m = row_sum<LANES>(total) / C;

    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> p = load_pack(x + c);
        for (int k = 0; k < N; k++) square[k] += ((float)p[k] - m) * ((float)p[k] - m);
    }
    total = 0.0f;
    for (int k = 0; k < N; k++) total += square[k];
    const float s = rsqrtf(row_sum<LANES>(total) / C + kLayerNormEpsilon);

    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> w = load_pack(gain + c), b = load_pack(shift + c);
        Pack<Float> p = load_pack(x + c);
        for (int k = 0; k < N; k++) p[k] = (Float)(((float)p[k] - m) * s * (float)w[k] + (float)b[k]);
        store_pack(x + c, p);
    }
}

// x [ROWS][IC] = what the weights are multiplied with, in shared memory, followed by 2 IC elements for the
// layernorm's parameters, if there is one. Rows that are not there are zeros. Everything is on its way before
// anything is waited for, also the parameters: they come from memory, where a row that the last kernel wrote
// is in the L2 cache. LANES: 32, or 1 for a block of one thread.
template <int LANES, int ROWS, class Float>
__device__ void stage_inputs(Float* x, const Float* inp, Normalize<Float> norm, int rows, int IC) {
    constexpr int N = Pack<Float>::size;
    const int row_packs = IC / N, threads = LANES == 1 ? 1 : blockDim.x;
    Float *gain = x + ROWS * IC, *shift = gain + IC;
    for (int i = threadIdx.x; i < ROWS * row_packs; i += threads)
        cp_async_16(shared_address(x + i * N), i < rows * row_packs ? inp + i * N : inp,
                    i < rows * row_packs);
    if (norm.weight)
        for (int i = threadIdx.x; i < row_packs; i += threads) {
            cp_async_16(shared_address(gain + i * N), norm.weight + i * N);
            cp_async_16(shared_address(shift + i * N), norm.bias + i * N);
        }
    cp_async_commit();
    cp_async_wait<0>();
    if constexpr (LANES > 1) __syncthreads();
    if (!norm.weight) return;
    for (int row = threadIdx.x / LANES; row < rows; row += threads / LANES)
        normalize_row<LANES>(x + row * IC, gain, shift, IC, threadIdx.x % LANES);
    if constexpr (LANES > 1) __syncthreads();
}

// Lane l of the warp returns the sum over all lanes of x[l / (32 / N)]; N is a power of two up to 32. Each
// step halves the values that a lane still holds, so 16 values take 16 shuffles instead of 80, and each is
// summed in the order of row_sum<32>, whatever N.
template <int N>
__device__ float sum_each(const float (&x)[N], int offset = 16) {
    if constexpr (N == 1) {
        float sum = x[0];
        for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        return sum;
    } else {
        const bool upper = threadIdx.x & offset;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float keep = upper ? x[i + N / 2] : x[i], give = upper ? x[i] : x[i + N / 2];
            half[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
        }
        return sum_each(half, offset / 2);
    }
}

// f of above.
__device__ inline float finish_output(float y, float bias, bool gelu, float residual) {
    y += bias;
    return (gelu ? y * gelu_sigmoid(y) : y) + residual;
}

// Outputs that a warp computes at once: two use what was read from shared memory, and unpacked, twice.
template <int ROWS>
inline constexpr int kMatvecOutputs = ROWS >= 4 ? 2 : 1;
template <int ROWS>
inline constexpr int kMatvecBlocks = ROWS >= 4 ? 2 : 3;  // that fit into an SM's registers

// `slices` warps share an output; the blocks go through the outputs in strides of the grid. A warp asks for
// its next weights as soon as it has used up the last, before it adds up its sums. ROWS: the number of rows
// rounded up to a power of two.
template <class Float, int ROWS>
__global__ void __launch_bounds__(32 * kMatvecWarps, kMatvecBlocks<ROWS>)
    matvec_kernel(Float* out, const Float* inp, const Float* weight, const Float* bias, Normalize<Float> norm,
                  const Float* residual, bool gelu, int rows, int IC, int OC, int slices) {
    constexpr int N = Pack<Float>::size;
    constexpr int OUTS = kMatvecOutputs<ROWS>, P = kMatvecPacks / OUTS, VALUES = OUTS * ROWS;
    extern __shared__ __align__(16) char matvec_shared[];
    __shared__ float partial[2][kMatvecWarps][VALUES];
    Float* x = reinterpret_cast<Float*>(matvec_shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int step = 32 * slices * N, first_column = (warp % slices * 32 + lane) * N;
    const int turn_outputs = kMatvecWarps / slices * OUTS;

    Pack<Float> w[OUTS][P];
    auto load = [&](int first, int column) {  // of outputs that are OC or more, nothing
        const int output = first + warp / slices * OUTS;
        const Float* from = weight + (size_t)output * IC + column;
#pragma unroll
        for (int i = 0; i < P; i++)
#pragma unroll
            for (int o = 0; o < OUTS; o++)
                w[o][i] = load_pack_if(output < OC && column + i * step < IC, from + o * IC + i * step);
    };
    int first = blockIdx.x * turn_outputs;
    load(first, first_column);
    stage_inputs<32, ROWS>(x, inp, norm, rows, IC);

#pragma unroll 1
    for (int turn = 0; first < OC; turn ^= 1) {
        // the output that this thread will finish; what it needs for that is asked for now
        const int row = tid / turn_outputs, output = first + tid % turn_outputs;
        const bool finishes = row < rows && output < OC;
        const size_t place = (size_t)row * OC + output;
        const float b = finishes && bias ? (float)bias[output] : 0.0f;
        const float r = finishes && residual ? (float)residual[place] : 0.0f;

        float sum[VALUES] = {};
#pragma unroll 1
        for (int column = first_column; column < IC;) {
#pragma unroll
            for (int i = 0; i < P; i++) {
                if (column + i * step >= IC) break;
#pragma unroll
                for (int n = 0; n < ROWS; n++) {
                    const Pack<Float> xn = load_pack(x + n * IC + column + i * step);
#pragma unroll
                    for (int o = 0; o < OUTS; o++)
#pragma unroll
                        for (int k = 0; k < N; k++)
                            sum[o * ROWS + n] = fmaf((float)w[o][i][k], (float)xn[k], sum[o * ROWS + n]);
                }
            }
            column += P * step;
            if (column < IC) load(first, column);
        }
        first += gridDim.x * turn_outputs;
        load(first, first_column);

        const float total = sum_each(sum);
        if (lane % (32 / VALUES) == 0) partial[turn][warp][lane / (32 / VALUES)] = total;
        __syncthreads();  // the next turn writes to the other half, so one barrier a turn is enough
        if (!finishes) continue;
        const int o = tid % turn_outputs, first_warp = o / OUTS * slices;
        float y = 0.0f;
        for (int s = 0; s < slices; s++) y += partial[turn][first_warp + s][o % OUTS * ROWS + row];
        out[place] = (Float)finish_output(y, b, gelu, r);
    }
}

// out[o][n] = sum over i of weight[o][i] x[n][i], for one thread, in eight partial sums. The CPU body holds
// them in a vector register, which g++ does not find by itself. It also asks for the next outputs' weights,
// into the second-level cache: a processor prefetches along a row, but at its end starts again, which can
// take half of the bandwidth; and the first-level cache is for x.
template <int OUTS, int ROWS, class Float>
__device__ __forceinline__ void dot_rows(float (&out)[OUTS][ROWS], const Float* weight, const Float* x,
                                         int IC) {
#ifdef CUDA_CPU
    typedef float Eight __attribute__((vector_size(32), aligned(sizeof(float)), may_alias));
    typedef uint32_t EightBits __attribute__((vector_size(32)));
    typedef uint16_t EightHalves __attribute__((vector_size(16), aligned(2), may_alias));
    auto eight = [](const Float* p) {
        if constexpr (sizeof(Float) == 4)
            return *(const Eight*)p;
        else
            return (Eight)(__builtin_convertvector(*(const EightHalves*)p, EightBits) << 16);
    };
    Eight sum[OUTS][ROWS] = {};
    for (int i = 0; i < IC; i += 8) {
        for (int o = 0; o < OUTS; o++) __builtin_prefetch(weight + (size_t)(OUTS + o) * IC + i, 0, 2);
        Eight w[OUTS];
        for (int o = 0; o < OUTS; o++) w[o] = eight(weight + (size_t)o * IC + i);
        for (int n = 0; n < ROWS; n++) {
            const Eight xn = eight(x + n * IC + i);
            for (int o = 0; o < OUTS; o++) sum[o][n] += w[o] * xn;  // g++ contracts this to fma
        }
    }
#else
    float sum[OUTS][ROWS][8] = {};
    for (int i = 0; i < IC; i++)
        for (int o = 0; o < OUTS; o++)
            for (int n = 0; n < ROWS; n++)
                sum[o][n][i % 8] =
                    fmaf((float)weight[(size_t)o * IC + i], (float)x[n * IC + i], sum[o][n][i % 8]);
#endif
    for (int o = 0; o < OUTS; o++)
        for (int n = 0; n < ROWS; n++) {
            out[o][n] = 0.0f;
            for (int k = 0; k < 8; k++) out[o][n] += sum[o][n][k];
        }
}

// The same for blocks of one thread: each has `chunk` outputs that are neighbours.
template <class Float, int ROWS>
__global__ void matvec_single_kernel(Float* out, const Float* inp, const Float* weight, const Float* bias,
                                     Normalize<Float> norm, const Float* residual, bool gelu, int rows,
                                     int IC, int OC, int chunk) {
    constexpr int OUTS = ROWS <= 2 ? 4 : 2;
    extern __shared__ __align__(16) char matvec_shared[];
    Float* x = reinterpret_cast<Float*>(matvec_shared);
    stage_inputs<1, ROWS>(x, inp, norm, rows, IC);
    const int begin = blockIdx.x * chunk, end = begin + chunk < OC ? begin + chunk : OC;
    for (int first = begin; first < end; first += OUTS) {
        float sum[OUTS][ROWS];
        dot_rows(sum, weight + (size_t)first * IC, x, IC);
        for (int o = 0; o < OUTS; o++)
            for (int n = 0; n < rows; n++) {
                const size_t place = (size_t)n * OC + first + o;
                out[place] = (Float)finish_output(sum[o][n], bias ? (float)bias[first + o] : 0.0f, gelu,
                                                  residual ? (float)residual[place] : 0.0f);
            }
    }
}

// out [rows,OC], inp [rows,IC], weight [OC,IC], bias [OC] or null, norm: [IC] each or null, residual
// [rows,OC] or null; out may be residual. rows: 1 to kMaxMatvecRows; IC and OC are multiples of 8; not both
// gelu and a residual. Rows are staged in shared memory: of fp32 rows with more than 7000 elements 8 take two
// passes over the weights.
template <class Float>
void matvec_forward(const Context& ctx, Float* out, const Float* inp, const Float* weight, const Float* bias,
                    Normalize<Float> norm, const Float* residual, bool gelu, int rows, int IC, int OC) {
    assert(rows >= 1 && rows <= kMaxMatvecRows && IC % 8 == 0 && OC % 8 == 0 && !(gelu && residual));
    assert(!norm.weight == !norm.bias);
    const size_t row_bytes = IC * sizeof(Float), most_shared = ctx.max_shared - 1024;
    auto shared_bytes = [&](int n) { return (n + (norm.weight ? 2 : 0)) * row_bytes; };
    auto launch = [&](auto padded_rows) {
        constexpr int ROWS = padded_rows;
        const size_t shared = shared_bytes(ROWS);
        auto launch_kernel = [&](auto kernel, int blocks, int threads, int last) {
            CUDA_CHECK(
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
            kernel<<<blocks, threads, shared, ctx.stream>>>(out, inp, weight, bias, norm, residual, gelu,
                                                            rows, IC, OC, last);
            CUDA_CHECK(cudaGetLastError());
        };
        if (ctx.row_lanes == 1) {
            // blocks enough to share among the threads, few enough that staging is nothing
            const int chunk = ceil_div(OC / 8, 4 * ctx.num_sms < 8 ? 8 : 4 * ctx.num_sms) * 8;
            launch_kernel(matvec_single_kernel<Float, ROWS>, ceil_div(OC, chunk), 1, chunk);
            return;
        }
        int slices = 1;
        while (slices < kMatvecWarps && ceil_div(IC / Pack<Float>::size, 32) > slices * kMatvecPacks)
            slices *= 2;
        const int turn_outputs = kMatvecWarps / slices * kMatvecOutputs<ROWS>;
        const int turns = ceil_div(OC, turn_outputs), most = ctx.num_sms * kMatvecBlocks<ROWS>;
        launch_kernel(matvec_kernel<Float, ROWS>, turns < most ? turns : most, 32 * kMatvecWarps, slices);
    };
    int most_rows = kMaxMatvecRows;
    while (shared_bytes(most_rows) > most_shared) most_rows /= 2;
    assert(most_rows >= 1);
    if (rows > most_rows) {
        matvec_forward(ctx, out, inp, weight, bias, norm, residual, gelu, most_rows, IC, OC);
        matvec_forward(ctx, out + (size_t)most_rows * OC, inp + (size_t)most_rows * IC, weight, bias, norm,
                       residual ? residual + (size_t)most_rows * OC : nullptr, gelu, rows - most_rows, IC,
                       OC);
    } else if (rows == 1)
        launch(std::integral_constant<int, 1>());
    else if (rows == 2)
        launch(std::integral_constant<int, 2>());
    else if (rows <= 4)
        launch(std::integral_constant<int, 4>());
    else
        launch(std::integral_constant<int, 8>());
}
