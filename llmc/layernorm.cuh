// Layer normalization, with the residual addition before it fused in.
//
//   x = inp (or: x = residual + inp, which is also stored)        one row of C channels
//   mean = sum(x) / C,  rstd = 1 / sqrt(sum((x - mean)^2) / C + 1e-5)
//   xhat = (x - mean) rstd,  out = xhat weight + bias
//
//   With g = dout weight:   dx = rstd (g - mean_c(g) - xhat mean_c(g xhat))
//   dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
//
// The forward saves mean and rstd, one float a row each.
//
// All of it is limited by memory: the forward has to read x and write out (with the residual: read two, write
// two), the backward to read dout, x and dinp and to write dinp. In bf16 that is 2C bytes each. So up to 1600
// channels a warp keeps its row, in registers forward, in shared memory backward; wider rows, and rows on the
// CPU backend, are read again.
#pragma once
#include <type_traits>

#include "bias.cuh"
#include "mma.cuh"

inline constexpr float kLayerNormEpsilon = 1e-5f;

// Calls f with the number of packs that each lane of a warp keeps of a row of C channels, one of those that
// GPT-2's four sizes need, as a std::integral_constant. False if the row is too wide for registers.
template <class Float, class F>
bool with_packs_per_lane(int C, F f) {
    constexpr int N = 32 * Pack<Float>::size;
    if (C <= 768)
        f(std::integral_constant<int, ceil_div(768, N)>());
    else if (C <= 1024)
        f(std::integral_constant<int, ceil_div(1024, N)>());
    else if (C <= 1280)
        f(std::integral_constant<int, ceil_div(1280, N)>());
    else if (C <= 1600)
        f(std::integral_constant<int, ceil_div(1600, N)>());
    else
        return false;
    return true;
}

// A warp a row, PACKS packs a lane. Everything is asked for before anything is used: the 36 warps of an SM
// that wait for 3 KB each are several times what it takes to hide the latency of memory. (A lane's packs
// beyond C are zeros, and are summed like the others: g++ 12 makes wrong code of sums that a condition
// guards, at -O3 with AVX2.)
template <class Float, int PACKS, bool RESIDUAL>
__global__ void layernorm_forward_kernel(Float* out, float* mean, float* rstd, Float* sum_out,
                                         const Float* residual, const Float* inp, const Float* weight,
                                         const Float* bias, int rows, int C) {
    constexpr int N = Pack<Float>::size;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t base = (size_t)row * C;

    Pack<Float> x[PACKS], r[RESIDUAL ? PACKS : 1];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int c = (p * 32 + lane) * N;
        x[p] = load_pack_if(c < C, inp + base + c);
        if constexpr (RESIDUAL) r[p] = load_pack_if(c < C, residual + base + c);
    }
    if constexpr (RESIDUAL) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * 32 + lane) * N;
            for (int k = 0; k < N; k++) x[p][k] = (Float)((float)r[p][k] + (float)x[p][k]);
            if (c < C) store_pack(sum_out + base + c, x[p]);
        }
    }
    // Mean and variance are those of the rounded values that were stored. One partial sum for each place in a
    // pack: independent additions, and less rounding.
    float sum[N] = {};
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        for (int k = 0; k < N; k++) sum[k] += (float)x[p][k];
    float total = 0.0f;
    for (int k = 0; k < N; k++) total += sum[k];
    const float m = row_sum<32>(total) / C;

    float square[N] = {};
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const float center = (p * 32 + lane) * N < C ? m : 0.0f;
        for (int k = 0; k < N; k++) square[k] += ((float)x[p][k] - center) * ((float)x[p][k] - center);
    }
    total = 0.0f;
    for (int k = 0; k < N; k++) total += square[k];
    const float s = rsqrtf(row_sum<32>(total) / C + kLayerNormEpsilon);

#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int c = (p * 32 + lane) * N;
        if (c >= C) continue;
        const Pack<Float> w = load_pack(weight + c), b = load_pack(bias + c);
        for (int k = 0; k < N; k++) x[p][k] = (Float)(((float)x[p][k] - m) * s * (float)w[k] + (float)b[k]);
        store_pack(out + base + c, x[p]);
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// For rows of any width, shared by LANES threads, which read back what they wrote to sum_out themselves.
template <class Float, int LANES, bool RESIDUAL>
__global__ void layernorm_forward_wide_kernel(Float* out, float* mean, float* rstd, Float* sum_out,
                                              const Float* residual, const Float* inp, const Float* weight,
                                              const Float* bias, int rows, int C) {
    constexpr int N = Pack<Float>::size;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    if (row >= rows) return;
    const size_t base = (size_t)row * C;
    const Float* x_row = RESIDUAL ? sum_out + base : inp + base;

    float sum[N] = {};
    for (int c = lane * N; c < C; c += LANES * N) {
        Pack<Float> x = load_pack(inp + base + c);
        if (RESIDUAL) {
            const Pack<Float> r = load_pack(residual + base + c);
            for (int k = 0; k < N; k++) x[k] = (Float)((float)r[k] + (float)x[k]);
            store_pack(sum_out + base + c, x);
        }
        for (int k = 0; k < N; k++) sum[k] += (float)x[k];
    }
    float total = 0.0f;
    for (int k = 0; k < N; k++) total += sum[k];
    const float m = row_sum<LANES>(total) / C;

    float square[N] = {};
    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> x = load_pack(x_row + c);
        for (int k = 0; k < N; k++) square[k] += ((float)x[k] - m) * ((float)x[k] - m);
    }
    total = 0.0f;
    for (int k = 0; k < N; k++) total += square[k];
    const float s = rsqrtf(row_sum<LANES>(total) / C + kLayerNormEpsilon);

    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> x = load_pack(x_row + c), w = load_pack(weight + c), b = load_pack(bias + c);
        Pack<Float> y;
        for (int k = 0; k < N; k++) y[k] = (Float)(((float)x[k] - m) * s * (float)w[k] + (float)b[k]);
        store_pack(out + base + c, y);
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// Warps of a block of the backward below: with 12 PACKS Pack::size bytes of sums to a lane, these many have
// room in an SM's registers.
template <class Float, int PACKS>
constexpr __host__ __device__ int layernorm_backward_warps() {
    constexpr int channels = PACKS * Pack<Float>::size;
    return channels <= 24 ? 16 : channels <= 32 ? 12 : 8;
}

// Shared memory of a block: the weight, and for each warp a row of dout, x and dinp, and the next row's,
// which are on their way meanwhile.
inline constexpr int kLayerNormStages = 2;
template <class Float, int PACKS>
constexpr size_t layernorm_backward_shared(int warps) {
    return (1 + warps * kLayerNormStages * 3) * PACKS * 32 * sizeof(Pack<Float>);
}

// One block to an SM, which goes through the rows in strides of the grid, a warp a row. A lane has the same
// channels in all of its warp's rows and adds up their dweight and dbias (SUM: and dinp) in registers; at the
// end the block's sums go to partial[block][2][C], dweight, then dbias, and behind them all, dinp's to
// [block][C]. Every row is always in the same warp's turn, so the sums repeat bit for bit.
template <class Float, int PACKS, bool SUM>
__global__ void __launch_bounds__(32 * layernorm_backward_warps<Float, PACKS>(), 1)
    layernorm_backward_kernel(Float* dinp, float* partial, const Float* dout, const Float* inp,
                              const Float* weight, const float* mean, const float* rstd, int rows, int C,
                              bool add) {
    constexpr int N = Pack<Float>::size, ROW = PACKS * 32 * N, STAGE = 3 * ROW;
    extern __shared__ __align__(16) unsigned char layernorm_rows[];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int step = gridDim.x * warps, first = blockIdx.x * warps + warp;
    const int own = lane * N;  // first of the lane's channels; 32 N further on are the next
    Float* const weights = (Float*)layernorm_rows;                                  // [ROW]
    Float* const stages = weights + ROW + warp * (kLayerNormStages * STAGE) + own;  // [stages][3][ROW]

    // A lane copies what it reads itself, so that it waits for nothing but its own copies. Channels from C on
    // are zeros, which add nothing to any sum; behind the last row there are only those.
    const auto copy_row = [&](int row, int turn) {
        const SharedAddress to = shared_address(stages + turn * STAGE);
        const size_t from = (size_t)row * C + own;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const bool inside = row < rows && own + p * 32 * N < C;
            const auto copy = [&](int which, const Float* x, bool wanted) {
                cp_async_16(to + (which * ROW + p * 32 * N) * (int)sizeof(Float), x + from + p * 32 * N,
                            wanted);
            };
            copy(0, dout, inside);
            copy(1, inp, inside);
            copy(2, dinp, inside && add);
        }
        cp_async_commit();
    };
    copy_row(first, 0);
    float next_mean = first < rows ? mean[first] : 0.0f, next_rstd = first < rows ? rstd[first] : 0.0f;
    for (int c = threadIdx.x * N; c < ROW; c += blockDim.x * N)
        store_pack(weights + c, load_pack_if(c < C, weight + c));
    __syncthreads();
    const float inverse_C = 1.0f / C;

    float dw[PACKS][N] = {}, db[PACKS][N] = {}, sum[SUM ? PACKS : 1][N] = {};
    int turn = 0;
    for (int row = first; row < rows; row += step, turn ^= 1) {
        const Float* d_row = stages + turn * STAGE;
        copy_row(row + step, turn ^ 1);
        const float m = next_mean, s = next_rstd;
        if (row + step < rows) {
            next_mean = mean[row + step];
            next_rstd = rstd[row + step];
        }
        cp_async_wait<1>();

        float mean_g = 0.0f, mean_gx = 0.0f, d[N], x[N], w[N], dx[N];
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            unpack(d, load_pack(d_row + p * 32 * N));
            unpack(x, load_pack(d_row + ROW + p * 32 * N));
            unpack(w, load_pack(weights + own + p * 32 * N));
            float sum_g = 0.0f, sum_gx = 0.0f;
            for (int k = 0; k < N; k++) {
                const float g = d[k] * w[k], xhat = (x[k] - m) * s;
                sum_g += g;
                sum_gx = fmaf(g, xhat, sum_gx);
                dw[p][k] = fmaf(d[k], xhat, dw[p][k]);
                db[p][k] += d[k];
            }
            mean_g += sum_g;
            mean_gx += sum_gx;
        }
        mean_g = row_sum<32>(mean_g) * inverse_C;
        mean_gx = row_sum<32>(mean_gx) * inverse_C;
        __syncwarp();  // so that the compiler reads the row again, for which it has no registers
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            unpack(d, load_pack(d_row + p * 32 * N));
            unpack(x, load_pack(d_row + ROW + p * 32 * N));
            unpack(dx, load_pack(d_row + 2 * ROW + p * 32 * N));
            unpack(w, load_pack(weights + own + p * 32 * N));
            for (int k = 0; k < N; k++) {
                const float xhat = (x[k] - m) * s;
                dx[k] = fmaf(s, fmaf(-mean_gx, xhat, fmaf(d[k], w[k], -mean_g)), dx[k]);
            }
            if constexpr (SUM)
                for (int k = 0; k < N; k++) sum[p][k] += dx[k];
            if (own + p * 32 * N < C)
                store_pack(dinp + (size_t)row * C + own + p * 32 * N, pack_floats<Float>(dx));
        }
    }

    cp_async_wait<0>();  // the row after a warp's last is copied, too, as zeros

    float* warp_sums = (float*)layernorm_rows;  // [warps][C]
#pragma unroll
    for (int part = 0; part < (SUM ? 3 : 2); part++) {
        __syncthreads();  // nobody uses any longer what was there
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * 32 + lane) * N;
            if (c < C)
                store_floats(warp_sums + warp * C + c, part == 0   ? dw[p]
                                                       : part == 1 ? db[p]
                                                                   : sum[SUM ? p : 0]);
        }
        __syncthreads();
        float* out = part < 2 ? partial + ((size_t)blockIdx.x * 2 + part) * C
                              : partial + ((size_t)gridDim.x * 2 + blockIdx.x) * C;
        for (int c = threadIdx.x; c < C; c += blockDim.x) {
            float total = 0.0f;
            for (int w = 0; w < warps; w++) total += warp_sums[w * C + c];
            out[c] = total;
        }
    }
}

// The same for rows of any width, in two kernels. LANES threads share a row.
template <class Float, int LANES, bool ADD>
__global__ void layernorm_backward_wide_input_kernel(Float* dinp, const Float* dout, const Float* inp,
                                                     const Float* weight, const float* mean,
                                                     const float* rstd, int rows, int C) {
    constexpr int N = Pack<Float>::size;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    if (row >= rows) return;
    const size_t base = (size_t)row * C;
    const float m = mean[row], s = rstd[row];

    float sum_g[N] = {}, sum_gx[N] = {};
    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> d = load_pack(dout + base + c), x = load_pack(inp + base + c),
                          w = load_pack(weight + c);
        for (int k = 0; k < N; k++) {
            const float g = (float)d[k] * (float)w[k];
            sum_g[k] += g;
            sum_gx[k] += g * ((float)x[k] - m) * s;
        }
    }
    float mean_g = 0.0f, mean_gx = 0.0f;
    for (int k = 0; k < N; k++) {
        mean_g += sum_g[k];
        mean_gx += sum_gx[k];
    }
    mean_g = row_sum<LANES>(mean_g) / C;
    mean_gx = row_sum<LANES>(mean_gx) / C;

    for (int c = lane * N; c < C; c += LANES * N) {
        const Pack<Float> d = load_pack(dout + base + c), x = load_pack(inp + base + c),
                          w = load_pack(weight + c);
        Pack<Float> dx = ADD ? load_pack(dinp + base + c) : Pack<Float>{};
        for (int k = 0; k < N; k++) {
            const float xhat = ((float)x[k] - m) * s;
            dx[k] = (Float)((float)dx[k] + s * ((float)d[k] * (float)w[k] - mean_g - xhat * mean_gx));
        }
        store_pack(dinp + base + c, dx);
    }
}

// blockIdx.y: a chunk of rows; threads: packs of columns. Writes the chunk's sums to
// partial[chunk][2][C]: dweight, then dbias.
template <class Float>
__global__ void layernorm_backward_wide_params_kernel(float* partial, const Float* dout, const Float* inp,
                                                      const float* mean, const float* rstd, int rows, int C,
                                                      int rows_per_chunk) {
    constexpr int N = Pack<Float>::size;
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (c >= C) return;
    const int begin = blockIdx.y * rows_per_chunk;
    const int end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    float dw[N] = {}, db[N] = {};
    for (int row = begin; row < end; row++) {
        const Pack<Float> d = load_pack(dout + (size_t)row * C + c), x = load_pack(inp + (size_t)row * C + c);
        const float m = mean[row], s = rstd[row];
        for (int k = 0; k < N; k++) {
            dw[k] += (float)d[k] * ((float)x[k] - m) * s;
            db[k] += (float)d[k];
        }
    }
    float* out = partial + (size_t)blockIdx.y * 2 * C + c;
    store_floats(out, dw);
    store_floats(out + C, db);
}

// out [rows,C]; mean, rstd [rows]; weight, bias [C]. If residual is given, sum_out [rows,C] = residual + inp
// is stored and normalized, otherwise inp [rows,C] is. C is a multiple of 8.
template <class Float>
void layernorm_forward(const Context& ctx, Float* out, float* mean, float* rstd, Float* sum_out,
                       const Float* residual, const Float* inp, const Float* weight, const Float* bias,
                       int rows, int C) {
    assert(C % 8 == 0 && (residual == nullptr) == (sum_out == nullptr));
    const int block = 128;
    const unsigned grid = ceil_div((size_t)rows * ctx.row_lanes, block);
    auto launch_kernel = [&](auto kernel) {
        kernel<<<grid, block, 0, ctx.stream>>>(out, mean, rstd, sum_out, residual, inp, weight, bias, rows,
                                               C);
    };
    auto launch_warps = [&](auto packs) {
        residual ? launch_kernel(layernorm_forward_kernel<Float, packs(), true>)
                 : launch_kernel(layernorm_forward_kernel<Float, packs(), false>);
    };
    with_row_lanes(ctx, [&](auto lanes) {
        if constexpr (lanes > 1)
            if (with_packs_per_lane<Float>(C, launch_warps)) return;
        residual ? launch_kernel(layernorm_forward_wide_kernel<Float, lanes, true>)
                 : launch_kernel(layernorm_forward_wide_kernel<Float, lanes, false>);
    });
    CUDA_CHECK(cudaGetLastError());
}

// dinp [rows,C] is added to (the residual stream's gradient passes around the layer), or overwritten if !add;
// dweight, dbias [C] are neighbours, dbias = dweight + C, and are added to. inp: the x that was normalized.
// dinp_sum [C], unless it is null, is added the sum of dinp's rows as they are then: the bias gradient of the
// linear layer whose output was the last to be added to x. scratch: column_sum_scratch(ctx, 2 * C) floats.
template <class Float>
void layernorm_backward(const Context& ctx, Float* dinp, float* dweight, float* dbias, float* dinp_sum,
                        float* scratch, const Float* dout, const Float* inp, const Float* weight,
                        const float* mean, const float* rstd, int rows, int C, bool add = true) {
    assert(C % 8 == 0 && dbias == dweight + C);
    (void)dbias;
    int chunks = 0;
    auto launch_warps = [&](auto packs) {
        int warps = layernorm_backward_warps<Float, packs()>();
        while (layernorm_backward_shared<Float, packs()>(warps) > ctx.max_shared) warps--;
        const size_t shared = layernorm_backward_shared<Float, packs()>(warps);
        const int wanted = ceil_div(rows, warps);
        chunks = ctx.num_sms < wanted ? ctx.num_sms : wanted;
        const auto launch = [&](auto kernel) {
            allow_shared(kernel, shared);
            kernel<<<chunks, 32 * warps, shared, ctx.stream>>>(dinp, scratch, dout, inp, weight, mean, rstd,
                                                               rows, C, add);
        };
        dinp_sum ? launch(layernorm_backward_kernel<Float, packs(), true>)
                 : launch(layernorm_backward_kernel<Float, packs(), false>);
        if (dinp_sum) add_partial_sums(ctx, dinp_sum, scratch + (size_t)chunks * 2 * C, chunks, C);
    };
    with_row_lanes(ctx, [&](auto lanes) {
        if constexpr (lanes > 1)
            if (with_packs_per_lane<Float>(C, launch_warps)) return;
        const int block = 128, packs = C / Pack<Float>::size;
        auto launch_input = [&](auto kernel) {
            kernel<<<(unsigned)ceil_div((size_t)rows * lanes, block), block, 0, ctx.stream>>>(
                dinp, dout, inp, weight, mean, rstd, rows, C);
        };
        add ? launch_input(layernorm_backward_wide_input_kernel<Float, lanes, true>)
            : launch_input(layernorm_backward_wide_input_kernel<Float, lanes, false>);
        CUDA_CHECK(cudaGetLastError());
        if (dinp_sum) bias_backward(ctx, dinp_sum, scratch, dinp, rows, C);
        chunks = column_sum_chunks(ctx, rows, packs, block);
        layernorm_backward_wide_params_kernel<<<dim3(ceil_div(packs, block), chunks), block, 0, ctx.stream>>>(
            scratch, dout, inp, mean, rstd, rows, C, ceil_div(rows, chunks));
    });
    CUDA_CHECK(cudaGetLastError());
    add_partial_sums(ctx, dweight, scratch, chunks, 2 * (size_t)C);
}
