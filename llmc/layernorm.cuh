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
#pragma once
#include "cuda_common.cuh"

inline constexpr float kLayerNormEpsilon = 1e-5f;

// LANES threads share a row. With RESIDUAL, x = residual + inp is written to sum_out first; each thread reads
// back only what it wrote itself, so that mean and variance are those of the rounded values that were stored.
template <class Float, int LANES, bool RESIDUAL>
__global__ void layernorm_forward_kernel(Float* out, float* mean, float* rstd, Float* sum_out,
                                         const Float* residual, const Float* inp, const Float* weight,
                                         const Float* bias, int rows, int C) {
    constexpr int N = Pack<Float>::size;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    if (row >= rows) return;
    const size_t base = (size_t)row * C;
    const Float* x_row = RESIDUAL ? sum_out + base : inp + base;

    float sum[N] = {};  // one partial sum for each place in a pack: independent additions, and less rounding
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

template <class Float, int LANES>
__global__ void layernorm_backward_input_kernel(Float* dinp, const Float* dout, const Float* inp,
                                                const Float* weight, const float* mean, const float* rstd,
                                                int rows, int C) {
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
        Pack<Float> dx = load_pack(dinp + base + c);
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
__global__ void layernorm_backward_params_kernel(float* partial, const Float* dout, const Float* inp,
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
    for (int k = 0; k < N; k++) {
        out[k] = dw[k];
        out[C + k] = db[k];
    }
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
    if (residual)
        ctx.row_lanes == 1 ? launch_kernel(layernorm_forward_kernel<Float, 1, true>)
                           : launch_kernel(layernorm_forward_kernel<Float, 32, true>);
    else
        ctx.row_lanes == 1 ? launch_kernel(layernorm_forward_kernel<Float, 1, false>)
                           : launch_kernel(layernorm_forward_kernel<Float, 32, false>);
    CUDA_CHECK(cudaGetLastError());
}

// dinp [rows,C] is added to (the residual stream's gradient passes around the layer); dweight, dbias [C] are
// neighbours, dbias = dweight + C, and are added to. inp: the x that was normalized.
// scratch: column_sum_scratch(ctx, 2 * C) floats.
template <class Float>
void layernorm_backward(const Context& ctx, Float* dinp, float* dweight, float* dbias, float* scratch,
                        const Float* dout, const Float* inp, const Float* weight, const float* mean,
                        const float* rstd, int rows, int C) {
    assert(C % 8 == 0 && dbias == dweight + C);
    (void)dbias;
    const int block = 128;
    auto launch_kernel = [&](auto kernel) {
        kernel<<<(unsigned)ceil_div((size_t)rows * ctx.row_lanes, block), block, 0, ctx.stream>>>(
            dinp, dout, inp, weight, mean, rstd, rows, C);
    };
    ctx.row_lanes == 1 ? launch_kernel(layernorm_backward_input_kernel<Float, 1>)
                       : launch_kernel(layernorm_backward_input_kernel<Float, 32>);
    CUDA_CHECK(cudaGetLastError());

    const int packs = C / Pack<Float>::size;
    const int chunks = column_sum_chunks(ctx, rows, packs, block), rows_per_chunk = ceil_div(rows, chunks);
    layernorm_backward_params_kernel<<<dim3(ceil_div(packs, block), chunks), block, 0, ctx.stream>>>(
        scratch, dout, inp, mean, rstd, rows, C, rows_per_chunk);
    CUDA_CHECK(cudaGetLastError());
    add_partial_sums(ctx, dweight, scratch, chunks, 2 * (size_t)C);
}
