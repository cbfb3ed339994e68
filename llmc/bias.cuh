// The gradient of a linear layer's bias: the sum of its output gradient's rows.
//
//   out[n,:] = ... + bias,  dbias += sum over n of dout[n,:]
//
// To read dout once more only for this costs as much as a layernorm. So where a kernel of ours makes dout, it
// adds up the sums itself, while the numbers are in its registers: layernorm_backward() those of the residual
// stream's gradient, attention_backward() those of dqkv, on Hopper. What is left for the kernel here is the
// gradient that cuBLASLt makes, of fc's output, and what other GPUs' attention leaves.
#pragma once
#include "cuda_common.cuh"

// blockIdx.y: a chunk of rows; threads: packs of columns. Writes the chunk's sums to partial[chunk][OC].
template <class Float>
__global__ void bias_backward_kernel(float* partial, const Float* dout, int rows, int OC,
                                     int rows_per_chunk) {
    constexpr int N = Pack<Float>::size, AHEAD = 8;  // loads that are under way at once
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (c >= OC) return;
    const int begin = blockIdx.y * rows_per_chunk;
    const int end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    float sum[N] = {};
    for (int row = begin; row < end; row += AHEAD) {
        Pack<Float> d[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) d[i] = load_pack_if(row + i < end, dout + (size_t)(row + i) * OC + c);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            for (int k = 0; k < N; k++) sum[k] += (float)d[i][k];
    }
    store_floats(partial + (size_t)blockIdx.y * OC + c, sum);
}

// dbias [OC] += the sum of dout's rows. scratch: column_sum_scratch(ctx, OC) floats.
template <class Float>
void bias_backward(const Context& ctx, float* dbias, float* scratch, const Float* dout, int rows, int OC) {
    const int block = 128, packs = OC / Pack<Float>::size;
    const int chunks = column_sum_chunks(ctx, rows, packs, block), rows_per_chunk = ceil_div(rows, chunks);
    bias_backward_kernel<<<dim3(ceil_div(packs, block), chunks), block, 0, ctx.stream>>>(scratch, dout, rows,
                                                                                         OC, rows_per_chunk);
    CUDA_CHECK(cudaGetLastError());
    add_partial_sums(ctx, dbias, scratch, chunks, OC);
}
