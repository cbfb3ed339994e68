// The linear layer: cuBLAS for the products, two small kernels for the bias.
//
//   out[n,:] = weight inp[n,:] + bias               weight [OC,IC], n over the rows of the batch
//   dinp = dout weight,  dweight += dout^T inp,  dbias += sum over n of dout[n,:]
//
// cuBLAS is column-major: a row-major [R,C] matrix is to it a C x R one, so each product is asked for
// transposed. Activations and weights are Float, weight gradients always float: they are sums over many
// micro-batches.
#pragma once
#include "cuda_common.cuh"

template <class T>
constexpr cudaDataType_t cublas_type() {
    return sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;
}

// c (m x n) = op(a) op(b) + beta c, all column-major, sums in float.
template <class In, class Out>
void gemm(const Context& ctx, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
          const In* a, int lda, const In* b, int ldb, float beta, Out* c, int ldc) {
    const float alpha = 1.0f;
    CUBLAS_CHECK(cublasGemmEx(ctx.cublas, op_a, op_b, m, n, k, &alpha, a, cublas_type<In>(), lda, b,
                              cublas_type<In>(), ldb, &beta, c, cublas_type<Out>(), ldc, CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
}

template <class Float>
__global__ void add_bias_kernel(Float* out, const Float* bias, int OC, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    Pack<Float> x = load_pack(out + i * Pack<Float>::size);
    const Pack<Float> b = load_pack(bias + i * Pack<Float>::size % OC);
    for (int k = 0; k < Pack<Float>::size; k++) x[k] = (Float)((float)x[k] + (float)b[k]);
    store_pack(out + i * Pack<Float>::size, x);
}

// blockIdx.y: a chunk of rows; threads: packs of columns. Writes the chunk's sums to partial[chunk][OC].
template <class Float>
__global__ void bias_backward_kernel(float* partial, const Float* dout, int rows, int OC,
                                     int rows_per_chunk) {
    constexpr int N = Pack<Float>::size;
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (c >= OC) return;
    const int begin = blockIdx.y * rows_per_chunk;
    const int end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    float sum[N] = {};
    for (int row = begin; row < end; row++) {
        const Pack<Float> d = load_pack(dout + (size_t)row * OC + c);
        for (int k = 0; k < N; k++) sum[k] += (float)d[k];
    }
    for (int k = 0; k < N; k++) partial[(size_t)blockIdx.y * OC + c + k] = sum[k];
}

// out [rows,OC] = inp [rows,IC] weight^T + bias; bias may be null. IC and OC are multiples of 8.
template <class Float>
void matmul_forward(const Context& ctx, Float* out, const Float* inp, const Float* weight, const Float* bias,
                    int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    gemm(ctx, CUBLAS_OP_T, CUBLAS_OP_N, OC, rows, IC, weight, IC, inp, IC, 0.0f, out, OC);
    if (!bias) return;
    const size_t num_packs = (size_t)rows * OC / Pack<Float>::size;
    add_bias_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, ctx.stream>>>(out, bias, OC, num_packs);
    CUDA_CHECK(cudaGetLastError());
}

// dinp [rows,IC] is overwritten; dweight [OC,IC] and dbias [OC] (may be null) are added to.
// scratch: column_sum_scratch(ctx, OC) floats, unless dbias is null.
template <class Float>
void matmul_backward(const Context& ctx, Float* dinp, float* dweight, float* dbias, float* scratch,
                     const Float* dout, const Float* inp, const Float* weight, int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    gemm(ctx, CUBLAS_OP_N, CUBLAS_OP_N, IC, rows, OC, weight, IC, dout, OC, 0.0f, dinp, IC);
    gemm(ctx, CUBLAS_OP_N, CUBLAS_OP_T, IC, OC, rows, inp, IC, dout, OC, 1.0f, dweight, IC);
    if (!dbias) return;
    const int block = 128, packs = OC / Pack<Float>::size;
    const int chunks = column_sum_chunks(ctx, rows, packs, block), rows_per_chunk = ceil_div(rows, chunks);
    bias_backward_kernel<<<dim3(ceil_div(packs, block), chunks), block, 0, ctx.stream>>>(scratch, dout, rows,
                                                                                         OC, rows_per_chunk);
    CUDA_CHECK(cudaGetLastError());
    add_partial_sums(ctx, dbias, scratch, chunks, OC);
}
