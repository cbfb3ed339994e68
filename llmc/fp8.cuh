// The linear layers in 8 bits, for --precision fp8: the three products of matmul.cuh with operands that are
// rounded to FP8 first (Micikevicius et al., arXiv 2209.05433), which tensor cores multiply at twice the rate
// of bf16. Sums stay float (of which Hopper's tensor cores keep some 14 bits while they add, DeepSeek-V3,
// arXiv 2412.19437, section 3.3.2), results bf16 (weight gradients float), everything between the products as
// it is in bf16, and so are the embedding and the logits.
//
//   E4M3   1 sign, 4 exponent, 3 mantissa bits, up to   448   weights and activations
//   E5M2   1 sign, 5 exponent, 2 mantissa bits, up to 57344   gradients, which need range more than precision
//
// Neither has the range for what occurs in training, so each matrix gets a scale of its own, from its largest
// magnitude at this moment, a power of two so that scaling rounds nothing:
//
//   e = the largest with max|x| 2^e <= 448 or 57344,  q = round(x 2^e),  x ~ q 2^-e
//   out = 2^-(e_inp + e_weight) q_inp q_weight^T + bias
//
// The gradient is taken as if nothing had been rounded (straight through), with its own operands rounded:
//
//   dinp = Q(dout) Q(weight),  dweight += Q(dout)^T Q(inp),  dbias += sum over n of dout[n,:], not rounded
//
// Tensor cores take FP8 operands only with the summed index along memory, so what is summed over rows is
// written transposed: weight for dinp, dout and inp for dweight. matmul.cuh's table, with what we ask for:
//
//   out^T     = weight  inp^T            both as they are
//   dinp^T    = (weight^T) dout^T        the transposed weight as operand T
//   dweight^T = (inp^T) dout             the transposed inp as operand T, the transposed dout as N
//
// Bytes an element of an activation beside the product's own, if no cache helps: 2 to find the maximum, 2 to
// read and 1 to write forward, 2 and 1 transposed backward, which has the maximum from the forward; of a
// gradient 2, 2, and 1 for each of its two layouts. For GPT-2 that is 110 C bytes a token and layer, against
// 72 C^2 FLOPs: a matrix has to be large for 8 bits to pay.
#pragma once
#include <cuda_fp8.h>

#include "device_memory.cuh"
#include "matmul.cuh"

// The largest magnitude in bits (a NaN is larger than infinity, which is larger than any number), and 2^-e.
struct alignas(16) Fp8Scale {
    float inverse;  // first: cuBLASLt is given its address
    unsigned max_bits;
};

// Where the operands of one product lie while it is computed; null: the linear layers are in bf16.
struct Fp8Buffers {
    uint8_t* a = nullptr;        // the weight, the transposed weight or the transposed inp
    uint8_t* b = nullptr;        // inp or dout
    uint8_t* b_t = nullptr;      // the transposed dout
    Fp8Scale* scales = nullptr;  // [1 + 2 layers] of dout; of each linear layer's weight and inp
    int layer = 0;               // which of them

    // A layer's forward finds the scales of its weight and inp, and its backward uses them again.
    Fp8Buffers of_layer(int l) const { return {a, b, b_t, scales, l}; }
    Fp8Scale* dout_scale() const { return scales; }
    Fp8Scale* weight_scale() const { return scales + 1 + 2 * layer; }
    Fp8Scale* inp_scale() const { return scales + 2 + 2 * layer; }
};

// Room for the operands of any of `layers` linear layers of a model with C channels and `rows` rows.
inline Fp8Buffers lay_out_fp8(Arena& arena, size_t rows, size_t C, size_t layers) {
    const size_t activation = rows * 4 * C, weight = 4 * C * C;
    Fp8Buffers f;
    f.a = arena.take<uint8_t>(activation > weight ? activation : weight);
    f.b = arena.take<uint8_t>(activation);
    f.b_t = arena.take<uint8_t>(activation);
    f.scales = arena.take<Fp8Scale>(1 + 2 * layers);
    return f;
}

// cuBLASLt's condition on each side of each matrix.
constexpr int kFp8Multiple = 16;

// e above. A largest magnitude that is not finite makes 2^e NaN, and so all that is computed with it: the
// trainer finds it as it finds any other.
template <__nv_fp8_interpretation_t FORMAT>
__host__ __device__ inline int fp8_exponent(unsigned max_bits) {
    constexpr int largest = FORMAT == __NV_E4M3 ? 8 : 15;  // 448 = 1.75 2^8, 57344 = 1.75 2^15
    const int exponent = (int)(max_bits >> 23) - 127;
    const int e = largest - exponent - ((max_bits & 0x7fffff) > 0x600000 ? 1 : 0);
    return e < 126 ? e : 126;  // so that 2^e and 2^-e are both normal floats
}
__host__ __device__ inline bool fp8_finite(unsigned max_bits) {
    return max_bits < 0x7f800000;
}

__device__ inline float float_power_of_2(int e) {
    return __int_as_float((e + 127) << 23);
}

// max_bits = the largest bits of |x| over n / 8 packs; *max_bits is 0 before. The order does not matter to a
// maximum, so this atomic repeats bit for bit.
[[maybe_unused]] static __global__ void fp8_max_kernel(unsigned* max_bits, const __nv_bfloat16* inp,
                                                       size_t num_packs) {
    unsigned most = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < num_packs;
         i += (size_t)gridDim.x * blockDim.x) {
        const Pack<__nv_bfloat16> x = load_pack(inp + i * 8);
        for (int k = 0; k < 8; k++) {
            const unsigned bits = (unsigned)(__bfloat16_as_ushort(x[k]) & 0x7fff) << 16;
            most = bits > most ? bits : most;
        }
    }
    if (blockDim.x > 1)
        for (int offset = 16; offset > 0; offset /= 2) {
            const unsigned other = __shfl_xor_sync(0xffffffffu, most, offset);
            most = other > most ? other : most;
        }
    if (threadIdx.x % 32 == 0) atomicMax(max_bits, most);
}

// q [R,C] and, if not null, q_t [C,R] = inp [R,C] 2^e; either may be null, R and C are multiples of 16. A
// block makes a tile of 64 x 64: each thread rounds two packs of 8, then gathers 16 rows of one column.
constexpr int kFp8Tile = 64;  // tiles are blocks in one dimension, for there can be more than 65,535 of rows
template <__nv_fp8_interpretation_t FORMAT>
__global__ void __launch_bounds__(256)
    fp8_round_kernel(uint8_t* q, uint8_t* q_t, Fp8Scale* scale, const __nv_bfloat16* inp, int R, int C) {
    // rows of 72 bytes: 8-byte stores, and columns that start in different banks
    __shared__ __align__(8) uint8_t tile[kFp8Tile][kFp8Tile + 8];
    const int across = ceil_div(C, kFp8Tile);
    const int first_row = blockIdx.x / across * kFp8Tile, first_column = blockIdx.x % across * kFp8Tile;
    const unsigned max_bits = scale->max_bits;
    const int e = fp8_exponent<FORMAT>(max_bits);
    const float factor = fp8_finite(max_bits) ? float_power_of_2(e) : __int_as_float(0x7fffffff);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        scale->inverse = fp8_finite(max_bits) ? float_power_of_2(-e) : __int_as_float(0x7fffffff);

    for (int i = threadIdx.x; i < kFp8Tile * kFp8Tile / 8; i += blockDim.x) {
        const int r = i / (kFp8Tile / 8), c = i % (kFp8Tile / 8) * 8;
        const int row = first_row + r, column = first_column + c;
        if (row >= R || column >= C) continue;
        const Pack<__nv_bfloat16> x = load_pack(inp + (size_t)row * C + column);
        uint2 bytes;
        for (int half = 0; half < 2; half++) {
            unsigned word = 0;
            for (int k = 0; k < 4; k += 2) {
                const float2 pair =
                    make_float2((float)x[4 * half + k] * factor, (float)x[4 * half + k + 1] * factor);
                word |= (unsigned)__nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, FORMAT) << (8 * k);
            }
            (half == 0 ? bytes.x : bytes.y) = word;
        }
        if (q) *reinterpret_cast<uint2*>(q + (size_t)row * C + column) = bytes;
        if (q_t) *reinterpret_cast<uint2*>(&tile[r][c]) = bytes;
    }
    if (!q_t) return;
    __syncthreads();
    const int c = threadIdx.x % kFp8Tile, r0 = threadIdx.x / kFp8Tile * 16;
    if (first_column + c >= C || first_row + r0 >= R) return;
    Pack<uint8_t> column;
    for (int r = 0; r < 16; r++) column[r] = tile[r0 + r][c];
    store_pack(q_t + (size_t)(first_column + c) * R + first_row + r0, column);
}

// Rounds inp [R,C] to q [R,C] and q_t [C,R] (either may be null) with a scale that was found before.
template <__nv_fp8_interpretation_t FORMAT>
void fp8_round_again(const Context& ctx, uint8_t* q, uint8_t* q_t, Fp8Scale* scale, const __nv_bfloat16* inp,
                     int R, int C) {
    assert(R % kFp8Multiple == 0 && C % kFp8Multiple == 0);
    fp8_round_kernel<FORMAT>
        <<<ceil_div(C, kFp8Tile) * ceil_div(R, kFp8Tile), 256, 0, ctx.stream>>>(q, q_t, scale, inp, R, C);
    CUDA_CHECK(cudaGetLastError());
}

// Finds inp's scale and rounds it, all on the device.
template <__nv_fp8_interpretation_t FORMAT>
void fp8_round(const Context& ctx, uint8_t* q, uint8_t* q_t, Fp8Scale* scale, const __nv_bfloat16* inp, int R,
               int C) {
    CUDA_CHECK(cudaMemsetAsync(scale, 0, sizeof *scale, ctx.stream));
    const size_t num_packs = (size_t)R * C / 8;
    const unsigned block = ctx.row_lanes == 1 ? 1 : 256;
    const size_t wanted = ceil_div(num_packs, (size_t)block * 4), most = 8 * (size_t)ctx.num_sms;
    fp8_max_kernel<<<(unsigned)(wanted < most ? wanted : most), block, 0, ctx.stream>>>(&scale->max_bits, inp,
                                                                                        num_packs);
    CUDA_CHECK(cudaGetLastError());
    fp8_round_again<FORMAT>(ctx, q, q_t, scale, inp, R, C);
}

// D (m x n) = A^T B of FP8 operands that lie with the summed index k along memory.
inline void fp8_product(const Context& ctx, const uint8_t* a, const Fp8Scale* a_scale, cudaDataType_t b_type,
                        const uint8_t* b, const Fp8Scale* b_scale, cudaDataType_t d_type, void* d,
                        const void* bias, int m, int n, int k, bool accumulate) {
    const Product product{CUDA_R_8F_E4M3,
                          b_type,
                          d_type,
                          CUBLAS_OP_T,
                          CUBLAS_OP_N,
                          m,
                          n,
                          k,
                          accumulate,
                          bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT};
    Operands o{a, b, d, bias};
    o.a_scale = &a_scale->inverse;
    o.b_scale = &b_scale->inverse;
    run_product(ctx, product, o);
}

// Whether the products of this many rows are in FP8. (A sample's are not, at most of its lengths.)
template <class Float>
bool in_fp8(const Fp8Buffers& f, int rows) {
    return sizeof(Float) == 2 && f.a && rows % kFp8Multiple == 0;
}

// matmul_forward(), in FP8 where f says so. IC and OC are multiples of 16.
template <class Float>
void linear_forward(const Context& ctx, const Fp8Buffers& f, Float* out, const Float* inp,
                    const Float* weight, const Float* bias, int rows, int IC, int OC) {
    if constexpr (sizeof(Float) == 2) {
        if (in_fp8<Float>(f, rows)) {
            fp8_round<__NV_E4M3>(ctx, f.a, nullptr, f.weight_scale(), weight, OC, IC);
            fp8_round<__NV_E4M3>(ctx, f.b, nullptr, f.inp_scale(), inp, rows, IC);
            return fp8_product(ctx, f.a, f.weight_scale(), CUDA_R_8F_E4M3, f.b, f.inp_scale(), CUDA_R_16BF,
                               out, bias, OC, rows, IC, false);
        }
    }
    matmul_forward(ctx, out, inp, weight, bias, rows, IC, OC);
}

// matmul_gelu_forward(), in FP8 where f says so.
template <class Float>
void linear_gelu_forward(const Context& ctx, const Fp8Buffers& f, Float* out, Float* pre_gelu,
                         const Float* inp, const Float* weight, const Float* bias, int rows, int IC, int OC) {
    if (!in_fp8<Float>(f, rows))
        return matmul_gelu_forward(ctx, out, pre_gelu, inp, weight, bias, rows, IC, OC);
    linear_forward(ctx, f, pre_gelu, inp, weight, bias, rows, IC, OC);
    gelu_forward(ctx, out, pre_gelu, (size_t)rows * OC);
}

// matmul_backward(), in FP8 where f says so; then linear_forward() has had the same inp and weight. dbias may
// be null.
template <class Float>
void linear_backward(const Context& ctx, const Fp8Buffers& f, Float* dinp, float* dweight, float* dbias,
                     float* scratch, const Float* dout, const Float* inp, const Float* weight, int rows,
                     int IC, int OC) {
    if constexpr (sizeof(Float) == 2) {
        if (in_fp8<Float>(f, rows)) {
            fp8_round<__NV_E5M2>(ctx, f.b, f.b_t, f.dout_scale(), dout, rows, OC);
            fp8_round_again<__NV_E4M3>(ctx, nullptr, f.a, f.weight_scale(), weight, OC, IC);
            fp8_product(ctx, f.a, f.weight_scale(), CUDA_R_8F_E5M2, f.b, f.dout_scale(), CUDA_R_16BF, dinp,
                        nullptr, IC, rows, OC, false);
            fp8_round_again<__NV_E4M3>(ctx, nullptr, f.a, f.inp_scale(), inp, rows, IC);
            fp8_product(ctx, f.a, f.inp_scale(), CUDA_R_8F_E5M2, f.b_t, f.dout_scale(), CUDA_R_32F, dweight,
                        nullptr, IC, OC, rows, true);
            if (dbias) bias_backward(ctx, dbias, scratch, dout, rows, OC);
            return;
        }
    }
    matmul_backward(ctx, dinp, dweight, dbias, scratch, dout, inp, weight, rows, IC, OC);
}

// matmul_gelu_backward(), in FP8 where f says so.
template <class Float>
void linear_gelu_backward(const Context& ctx, const Fp8Buffers& f, Float* dinp, float* dweight, float* dbias,
                          float* scratch, const Float* dout, const Float* inp, const Float* pre_gelu,
                          const Float* weight, int rows, int IC, int OC) {
    if (!in_fp8<Float>(f, rows))
        return matmul_gelu_backward(ctx, dinp, dweight, dbias, scratch, dout, inp, pre_gelu, weight, rows, IC,
                                    OC);
    linear_backward(ctx, f, dinp, dweight, dbias, scratch, dout, inp, weight, rows, IC, OC);
    gelu_backward(ctx, dinp, dinp, pre_gelu, (size_t)rows * IC);
}
