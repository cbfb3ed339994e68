// The linear layer, by cuBLASLt: products whose last step, the epilogue, also adds the bias, takes GELU, or
// sums up the bias gradient while the numbers are still in registers.
//
//   out[n,:] = weight inp[n,:] + bias               weight [OC,IC], n over the rows of the batch
//   dinp = dout weight,  dweight += dout^T inp,  dbias += sum over n of dout[n,:]
//
// cuBLASLt is column-major. The same memory that is a row-major [R,C] matrix X to us is to it a column-major
// C x R matrix, X^T, so we ask for the transposed product, and get our own layout back:
//
//   ours                                what we ask for                  (column-major: rows x columns)
//   out    = inp weight^T   [rows,OC]   out^T    = weight   inp^T        OC x rows = (OC x IC) (IC x rows)
//   dinp   = dout weight    [rows,IC]   dinp^T   = weight^T dout^T       IC x rows = (IC x OC) (OC x rows)
//   dweight = dout^T inp    [OC,IC]     dweight^T = inp^T   dout         IC x OC   = (IC x rows) (rows x OC)
//
// where memory holds weight^T, inp^T and dout^T: an operand that is asked for without the ^T is CUBLAS_OP_T.
//
// What the epilogues save, in bytes a token of GPT-2 124M in bf16 (the H100 moves 3 MB in a microsecond; a
// micro-step of 65,536 tokens takes some 100 ms):
//   GELU_AUX_BIAS  the GELU kernel's read of x and write of gelu(x), 147,456, of which the write remains
//   DGELU          a read and a write of the gradient, 147,456 of 221,184; the read of x remains
//   BGRADB         reading fc's dout once more for its column sums, 73,728 (the other biases: bias.cuh)
//   BIAS           a read and a write of every out, 331,776
// fc's bias gradient is not taken from DGELU_BGRAD, which would save more: that rounds it to bf16.
//
// Activations and weights are Float, weight gradients always float: they are sums over many micro-batches.
// An epilogue that this GPU does not have, or has only slowly, is replaced by separate kernels:
// matmul_plans.h finds that out, and matmul_report() says it.
#pragma once
#include "bias.cuh"
#include "gelu.cuh"
#include "matmul_plans.h"

template <class T>
constexpr cudaDataType_t data_type() {
    return sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;
}

// out [rows,OC] = inp [rows,IC] weight^T + bias; bias may be null. IC and OC are multiples of 8.
template <class Float>
void matmul_forward(const Context& ctx, Float* out, const Float* inp, const Float* weight, const Float* bias,
                    int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    constexpr cudaDataType_t type = data_type<Float>();
    const Product product{
        type, type, type, CUBLAS_OP_T, CUBLAS_OP_N,
        OC,   rows, IC,   false,       bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT};
    run_product(ctx, product, {weight, inp, out, bias});
}

// pre_gelu = inp weight^T + bias, out = gelu(pre_gelu), both [rows,OC]; bias may be null.
template <class Float>
void matmul_gelu_forward(const Context& ctx, Float* out, Float* pre_gelu, const Float* inp,
                         const Float* weight, const Float* bias, int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    constexpr cudaDataType_t type = data_type<Float>();
    const Product product{
        type, type, type, CUBLAS_OP_T, CUBLAS_OP_N,
        OC,   rows, IC,   false,       bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX};
    run_fused(
        ctx, product, {weight, inp, out, bias, pre_gelu}, [] {},
        [&] {
            matmul_forward(ctx, pre_gelu, inp, weight, bias, rows, IC, OC);
            gelu_forward(ctx, out, pre_gelu, (size_t)rows * OC);
        });
}

// dinp [rows,IC] = dout [rows,OC] weight
template <class Float>
void matmul_input_backward(const Context& ctx, Float* dinp, const Float* dout, const Float* weight, int rows,
                           int IC, int OC) {
    constexpr cudaDataType_t type = data_type<Float>();
    run_product(ctx, {type, type, type, CUBLAS_OP_N, CUBLAS_OP_N, IC, rows, OC, false}, {weight, dout, dinp});
}

// dweight [OC,IC] += dout^T inp, dbias [OC] += the sum of dout's rows; dbias may be null.
template <class Float>
void matmul_parameters_backward(const Context& ctx, float* dweight, float* dbias, float* scratch,
                                const Float* dout, const Float* inp, int rows, int IC, int OC) {
    constexpr cudaDataType_t type = data_type<Float>();
    Product product{type, type, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_OP_T, IC, OC, rows, true};
    if (!dbias) return run_product(ctx, product, {inp, dout, dweight});
    // The sum over B's rows comes out in D's type, float, and takes the place of what was there: so it goes
    // to scratch first.
    product.epilogue = CUBLASLT_EPILOGUE_BGRADB;
    run_fused(
        ctx, product, {inp, dout, dweight, scratch, nullptr, dbias},
        [&] { add_partial_sums(ctx, dbias, scratch, 1, OC); },
        [&] {
            matmul_parameters_backward<Float>(ctx, dweight, nullptr, nullptr, dout, inp, rows, IC, OC);
            bias_backward(ctx, dbias, scratch, dout, rows, OC);
        });
}

// dinp [rows,IC] is overwritten; dweight [OC,IC] and dbias [OC] (may be null) are added to.
// scratch: column_sum_scratch(ctx, OC) floats, unless dbias is null.
template <class Float>
void matmul_backward(const Context& ctx, Float* dinp, float* dweight, float* dbias, float* scratch,
                     const Float* dout, const Float* inp, const Float* weight, int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    matmul_input_backward(ctx, dinp, dout, weight, rows, IC, OC);
    matmul_parameters_backward(ctx, dweight, dbias, scratch, dout, inp, rows, IC, OC);
}

// The same where inp is gelu(pre_gelu), and the gradient of pre_gelu is asked for: dinp = (dout weight) times
// gelu'(pre_gelu), element by element.
template <class Float>
void matmul_gelu_backward(const Context& ctx, Float* dinp, float* dweight, float* dbias, float* scratch,
                          const Float* dout, const Float* inp, const Float* pre_gelu, const Float* weight,
                          int rows, int IC, int OC) {
    assert(IC % 8 == 0 && OC % 8 == 0);
    constexpr cudaDataType_t type = data_type<Float>();
    const Product product{type, type, type, CUBLAS_OP_N, CUBLAS_OP_N,
                          IC,   rows, OC,   false,       CUBLASLT_EPILOGUE_DGELU};
    // the epilogue only reads pre_gelu
    run_fused(
        ctx, product, {weight, dout, dinp, nullptr, const_cast<Float*>(pre_gelu)}, [] {},
        [&] {
            matmul_input_backward(ctx, dinp, dout, weight, rows, IC, OC);
            gelu_backward(ctx, dinp, dinp, pre_gelu, (size_t)rows * IC);
        });
    matmul_parameters_backward(ctx, dweight, dbias, scratch, dout, inp, rows, IC, OC);
}
