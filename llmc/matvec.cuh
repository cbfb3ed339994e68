// The linear layer for the few rows of token-by-token decoding, with what comes before and after it fused in:
//
//   out[n,o] = f(sum_i x[n,i] weight[o,i] + bias[o])
//   x = inp, or layernorm(inp) (the formula is in layernorm.cuh);  f(y) = y, gelu(y) or y + residual[n,o]
//
// With up to 8 rows, reading the OC IC weights once is all there is to do. GPT-2 124M has 247 MB of them in
// bf16, which an H100 reads in 82 us at 3 TB/s, and decoding a token launches 49 of these kernels: 1.7 us for
// each, so what counts is that weights are always on their way. They do not depend on the kernel in front, so
// a kernel asks for its first ones before it waits for that (overlap.cuh).
//
// By Little's law 3 TB/s with 0.7 us of latency means 2.1 MB under way, 16 KB for each of 132 SMs. A block of
// 8 warps asks for up to 3 outputs of 4 packs a lane (48 KB) at a time: what GPT-2 124M's layers have for
// each SM is one block's, 27, 9, 36 and 36 KB. They go to shared memory, where two more such blocks have room
// beside it, of the next kernels; in registers there would be no room for a second. From there the input's
// way to the output is as short as can be: it comes from the L2 cache, a warp normalizes it on the way to
// shared memory, and what is left is a sum over 3 packs a lane.
//
// A row's result does not depend on the number of rows, to the bit: the order of its sums depends on IC
// alone.
#pragma once
#include "gelu.cuh"
#include "layernorm.cuh"
#include "mma.cuh"
#include "overlap.cuh"

inline constexpr int kMaxMatvecRows = 8;
inline constexpr int kMatvecWarps = 8;  // of a block
inline constexpr int kMatvecPacks = 4;  // that a lane has under way for one output, at most

// Parameters [IC] of the layernorm before the product; without one, null.
template <class Float>
struct Normalize {
    const Float* weight;
    const Float* bias;
};

// x = layernorm(inp), by the LANES threads of a row. x, gain, shift: shared memory; inverse_C: 1 / C. The
// first of three passes over the row brings it into the first-level cache, with several loads under way.
template <int LANES, class Float>
__device__ void normalize_row(Float* x, const Float* inp, const Float* gain, const Float* shift, int C,
                              float inverse_C, int lane) {
    constexpr int N = Pack<Float>::size, STEP = LANES * N, AT_ONCE = 4;
    const auto for_packs = [&](auto work) {
        for (int first = lane * N; first < C; first += AT_ONCE * STEP) {
            Pack<Float> p[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                p[i] = load_pack_if(first + i * STEP < C, inp + first + i * STEP);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (first + i * STEP < C) work(p[i], first + i * STEP);
        }
    };
    float sum[N] = {}, square[N] = {};
    for_packs([&](const Pack<Float>& p, int) {
        for (int k = 0; k < N; k++) sum[k] += (float)p[k];
    });
    float total = 0.0f;
    for (int k = 0; k < N; k++) total += sum[k];
    const float m = row_sum<LANES>(total) * inverse_C;

    for_packs([&](const Pack<Float>& p, int) {
        for (int k = 0; k < N; k++) square[k] += ((float)p[k] - m) * ((float)p[k] - m);
    });
    total = 0.0f;
    for (int k = 0; k < N; k++) total += square[k];
    const float s = rsqrtf(row_sum<LANES>(total) * inverse_C + kLayerNormEpsilon);

    for_packs([&](const Pack<Float>& p, int c) {
        const Pack<Float> w = load_pack(gain + c), b = load_pack(shift + c);
        Pack<Float> y;
        for (int k = 0; k < N; k++) y[k] = (Float)(((float)p[k] - m) * s * (float)w[k] + (float)b[k]);
        store_pack(x + c, y);
    });
}

// x [ROWS][IC] = what the weights are multiplied with, in shared memory, followed by 2 IC elements for the
// layernorm's parameters, if there is one. Rows that are not there are zeros. Waits for the kernel in front,
// with the parameters and the weights on their way: they come from memory, where its rows are in the L2
// cache. load_weights() is one group of asynchronous copies, or none; load_residual() is called when the rows
// have been asked for, so that what it loads, which the kernel in front made, is on its way beside them.
// LANES: 32, or 1 for a block of one thread.
template <int LANES, int ROWS, class Float, class LoadWeights, class LoadResidual>
__device__ void stage_inputs(Float* x, const Float* inp, Normalize<Float> norm, int rows, int IC,
                             LoadWeights load_weights, LoadResidual load_residual) {
    constexpr int N = Pack<Float>::size;
    const int row_packs = IC / N, threads = LANES == 1 ? 1 : blockDim.x;
    if (!norm.weight) {
        load_weights();
        wait_for_previous_kernel();
        for (int i = threadIdx.x; i < ROWS * row_packs; i += threads)
            cp_async_16(shared_address(x + i * N), i < rows * row_packs ? inp + i * N : inp,
                        i < rows * row_packs);
        cp_async_commit();
        load_residual();
        cp_async_wait<0>();
        if constexpr (LANES > 1) __syncthreads();
        return;
    }
    Float *gain = x + ROWS * IC, *shift = gain + IC;
    for (int i = threadIdx.x; i < row_packs; i += threads) {
        cp_async_16(shared_address(gain + i * N), norm.weight + i * N);
        cp_async_16(shared_address(shift + i * N), norm.bias + i * N);
    }
    cp_async_commit();
    load_weights();
    const float inverse_C = 1.0f / IC;
    cp_async_wait<1>();  // all but the weights
    if constexpr (LANES > 1) __syncthreads();
    wait_for_previous_kernel();
    load_residual();
#pragma unroll 1
    for (int row = threadIdx.x / LANES; row < ROWS; row += threads / LANES)
        if (row < rows)
            normalize_row<LANES>(x + row * IC, inp + (size_t)row * IC, gain, shift, IC, inverse_C,
                                 threadIdx.x % LANES);
        else
#pragma unroll 1
            for (int i = threadIdx.x % LANES; i < row_packs; i += LANES)
                store_pack(x + row * IC + i * N, Pack<Float>{});
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

// Outputs that a warp computes at once, at most.
template <int ROWS>
inline constexpr int kMatvecOutputs = ROWS == 1 ? 3 : 2;
template <int ROWS>
inline constexpr int kMatvecBlocks = ROWS <= 2 ? 3 : 2;  // that fit into an SM's registers

// Packs that a lane has to load for an output, at once.
template <class Float>
constexpr __host__ __device__ int matvec_packs(int IC, int slices) {
    const int all = ceil_div(IC / Pack<Float>::size, 32 * slices);
    return all < kMatvecPacks ? all : kMatvecPacks;
}

// `slices` warps share `outs` outputs; the blocks go through the outputs in strides of the grid. A warp asks
// for its next weights as soon as it has used up the last, before it adds up its sums. Lanes read only what
// they have copied to shared memory themselves, so no barrier is needed for that. ROWS: the number of rows
// rounded up to a power of two. Dynamic shared memory: the weights, then the inputs as stage_inputs has them.
template <class Float, int ROWS>
__global__ void __launch_bounds__(32 * kMatvecWarps, kMatvecBlocks<ROWS>)
    matvec_kernel(Float* out, const Float* inp, const Float* weight, const Float* bias, Normalize<Float> norm,
                  const Float* residual, bool gelu, int rows, int IC, int OC, int slices, int outs) {
    constexpr int N = Pack<Float>::size;
    constexpr int OUTS = kMatvecOutputs<ROWS>, P = kMatvecPacks;
    constexpr int VALUES = OUTS == 3 ? 4 * ROWS : OUTS * ROWS;  // a power of two
    extern __shared__ __align__(16) char matvec_shared[];
    __shared__ float partial[2][kMatvecWarps][VALUES];
    start_next_kernel();
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int step = 32 * slices * N, first_column = (warp % slices * 32 + lane) * N;
    const int turn_outputs = kMatvecWarps / slices * outs, packs = matvec_packs<Float>(IC, slices);
    Float* weights = reinterpret_cast<Float*>(matvec_shared);
    Float* x = weights + kMatvecWarps * outs * packs * 32 * N;
    Float* w = weights + (warp * outs * packs * 32 + lane) * N;  // pack i of output o: o * packs + i further

    const auto load = [&](int first, int column) {  // of outputs that are not there, zeros
        const int output = first + warp / slices * outs;
        const Float* from = weight + (size_t)output * IC + column;
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            if (o >= outs) break;
#pragma unroll
            for (int i = 0; i < P; i++)
                if (column + i * step < IC) {
                    const bool there = output + o < OC;
                    cp_async_16(shared_address(w + (o * packs + i) * 32 * N),
                                there ? from + o * IC + i * step : weight, there);
                }
        }
        cp_async_commit();
    };
    // the output that this thread will finish in a turn, and what it needs for that
    const int row = tid / turn_outputs, own = tid % turn_outputs;
    const auto finishes = [&](int first) { return row < rows && first + own < OC; };
    const auto bias_of = [&](int first) { return finishes(first) && bias ? (float)bias[first + own] : 0.0f; };
    const auto residual_of = [&](int first) {
        return finishes(first) && residual ? (float)residual[(size_t)row * OC + first + own] : 0.0f;
    };
    int first = blockIdx.x * turn_outputs;
    // Weights before the bias: where it is 16 bits, a thread waits for it before it can do anything else.
    float b, r;
    stage_inputs<32, ROWS>(
        x, inp, norm, rows, IC,
        [&] {
            load(first, first_column);
            b = bias_of(first);
        },
        [&] { r = residual_of(first); });

#pragma unroll 1
    for (int turn = 0; first < OC; turn ^= 1) {
        float sum[VALUES] = {};
#pragma unroll 1
        for (int column = first_column; column < IC;) {
            cp_async_wait<0>();
#pragma unroll
            for (int i = 0; i < P; i++) {
                if (column + i * step >= IC) break;
                Pack<Float> wi[OUTS];
#pragma unroll
                for (int o = 0; o < OUTS; o++) wi[o] = load_pack_if(o < outs, w + (o * packs + i) * 32 * N);
#pragma unroll
                for (int n = 0; n < ROWS; n++) {
                    const Pack<Float> xn = load_pack(x + n * IC + column + i * step);
#pragma unroll
                    for (int o = 0; o < OUTS; o++) {
                        if (o >= outs) break;
#pragma unroll
                        for (int k = 0; k < N; k++)
                            sum[o * ROWS + n] = fmaf((float)wi[o][k], (float)xn[k], sum[o * ROWS + n]);
                    }
                }
            }
            column += P * step;
            if (column < IC) load(first, column);
        }
        const int next = first + gridDim.x * turn_outputs;
        if (next < OC) load(next, first_column);

        const float total = sum_each(sum);
        if (lane % (32 / VALUES) == 0) partial[turn][warp][lane / (32 / VALUES)] = total;
        __syncthreads();  // the next turn writes to the other half, so one barrier a turn is enough
        if (finishes(first)) {
            const int first_warp = own / outs * slices;
            float y = 0.0f;
            for (int s = 0; s < slices; s++) y += partial[turn][first_warp + s][own % outs * ROWS + row];
            out[(size_t)row * OC + first + own] = (Float)finish_output(y, b, gelu, r);
        }
        first = next;
        b = bias_of(first);
        r = residual_of(first);
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
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++) w[o] = eight(weight + (size_t)o * IC + i);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            const Eight xn = eight(x + n * IC + i);
#pragma GCC unroll 8
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
    start_next_kernel();
    Float* x = reinterpret_cast<Float*>(matvec_shared);
    stage_inputs<1, ROWS>(x, inp, norm, rows, IC, cp_async_commit, [] {});
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

// Into how many slices the columns are cut, so that no lane has more than kMatvecPacks packs of an output.
template <class Float>
int matvec_slices(int IC) {
    int slices = 1;
    while (slices < kMatvecWarps && ceil_div(IC / Pack<Float>::size, 32) > slices * kMatvecPacks) slices *= 2;
    return slices;
}

// Bytes of dynamic shared memory of a block: `outs` outputs' weights under way, the rows, and what they are
// normalized with.
template <class Float>
size_t matvec_shared(const Context& ctx, int rows, int outs, int IC, bool normalize) {
    const int packs = matvec_packs<Float>(IC, matvec_slices<Float>(IC));
    const size_t weights = ctx.row_lanes == 1 ? 0 : kMatvecWarps * outs * packs;
    return weights * 32 * sizeof(Pack<Float>) + (rows + (normalize ? 2 : 0)) * IC * sizeof(Float);
}

// How many rows of IC elements a pass can take, a power of two; 0: not even one.
template <class Float>
int matvec_rows(const Context& ctx, int IC, bool normalize) {
    int rows = kMaxMatvecRows;
    while (rows > 0 && matvec_shared<Float>(ctx, rows, 1, IC, normalize) > ctx.max_shared - 1024) rows /= 2;
    return rows;
}

// out [rows,OC], inp [rows,IC], weight [OC,IC], bias [OC] or null, norm: [IC] each or null, residual
// [rows,OC] or null; out may be residual. The kernel in front may make inp and residual, but not weight, bias
// and norm, which are read without waiting for it. rows: 1 to kMaxMatvecRows; IC and OC are multiples of 8;
// not both gelu and a residual. Rows are staged in shared memory: of fp32 rows with more than 7000 elements 8
// take two passes over the weights, and of one matvec_rows() must have room.
template <class Float>
void matvec_forward(const Context& ctx, Float* out, const Float* inp, const Float* weight, const Float* bias,
                    Normalize<Float> norm, const Float* residual, bool gelu, int rows, int IC, int OC) {
    assert(rows >= 1 && rows <= kMaxMatvecRows && IC % 8 == 0 && OC % 8 == 0 && !(gelu && residual));
    assert(!norm.weight == !norm.bias);
    const int slices = matvec_slices<Float>(IC);
    const auto shared_bytes = [&](int n, int outs) {
        return matvec_shared<Float>(ctx, n, outs, IC, norm.weight);
    };
    auto launch = [&](auto padded_rows) {
        constexpr int ROWS = padded_rows;
        auto launch_kernel = [&](auto kernel, int blocks, int threads, size_t shared, auto... last) {
            allow_shared(kernel, shared);
            launch_early(ctx, kernel, blocks, threads, shared, out, inp, weight, bias, norm, residual, gelu,
                         rows, IC, OC, last...);
        };
        with_row_lanes(ctx, [&](auto lanes) {
            if constexpr (lanes == 1) {
                // blocks enough to share among the threads, few enough that staging is nothing
                const int chunk = ceil_div(OC / 8, 4 * ctx.num_sms < 8 ? 8 : 4 * ctx.num_sms) * 8;
                launch_kernel(matvec_single_kernel<Float, ROWS>, ceil_div(OC, chunk), 1,
                              shared_bytes(ROWS, 0), chunk);
            } else {
                // as many outputs at once as it takes to be done in one turn with a block on each SM
                int outs = 1;
                const auto turns = [&] { return ceil_div(OC, kMatvecWarps / slices * outs); };
                while (outs < kMatvecOutputs<ROWS> && turns() > ctx.num_sms &&
                       shared_bytes(ROWS, outs + 1) <= ctx.max_shared - 1024)
                    outs++;
                const int most = ctx.num_sms * kMatvecBlocks<ROWS>;
                launch_kernel(matvec_kernel<Float, ROWS>, turns() < most ? turns() : most, 32 * kMatvecWarps,
                              shared_bytes(ROWS, outs), slices, outs);
            }
        });
    };
    const int most_rows = matvec_rows<Float>(ctx, IC, norm.weight);
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
