// Stands in for CUDA's header of this name: the part of cuBLASLt that matmul_plans.h uses, on OpenBLAS. Sums
// are in float; bf16 and FP8 operands are widened first and a bf16 result is rounded once, as a GPU does it.
// There is one algorithm, and the epilogues are passes over the result.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../cuda_cpu.h"
#include "../openblas.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cudaDataType_t {
    CUDA_R_32F = 0,
    CUDA_R_16F = 2,
    CUDA_R_16BF = 14,
    CUDA_R_8F_E4M3 = 28,
    CUDA_R_8F_E5M2 = 29,
};
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_RELU = 2,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_AUX = 160,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_BGRADB = 512,
};
enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4,
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 18,
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
enum cublasLtMatmulAlgoConfigAttributes_t {
    CUBLASLT_ALGO_CONFIG_ID = 0,
    CUBLASLT_ALGO_CONFIG_TILE_ID = 1,
    CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 2,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME = 3,
    CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING = 4,
    CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION = 5,
    CUBLASLT_ALGO_CONFIG_STAGES_ID = 6,
    CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID = 7,
    CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID = 8,
};

struct cublasLtContext {};
typedef cublasLtContext* cublasLtHandle_t;

struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
};
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;

struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    int32_t transa, transb;
    uint32_t epilogue;
    void *bias, *aux;
    int64_t aux_ld;
    const float *a_scale, *b_scale;  // of FP8 operands, on the device; null: 1
};
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;

struct cublasLtMatmulPreferenceOpaque_t {};
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;

struct cublasLtMatmulAlgo_t {
    uint64_t data[8];  // its number; 1 for a product of operands with scales
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
};

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown cuBLAS status";
}
inline size_t cublasLtGetVersion() {
    return 0;
}
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    static cublasLtContext only;
    *handle = &only;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
    return CUBLAS_STATUS_SUCCESS;
}

// ---------------------------------------------------------------- descriptors

namespace cuda_cpu {
// What every attribute's setter does: the caller says how large it takes the value to be.
template <class T>
cublasStatus_t copy_attribute(T& to, const void* from, size_t bytes) {
    if (!from || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace cuda_cpu

inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType_t type,
                                               uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = {type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t desc, cublasComputeType_t compute,
                                             cudaDataType_t) {
    *desc = {compute, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr,
             0,       nullptr,     nullptr};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return cuda_cpu::copy_attribute(desc->transa, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return cuda_cpu::copy_attribute(desc->transb, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return cuda_cpu::copy_attribute(desc->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return cuda_cpu::copy_attribute(desc->bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return cuda_cpu::copy_attribute(desc->aux, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return cuda_cpu::copy_attribute(desc->aux_ld, value, bytes);
        case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
            return cuda_cpu::copy_attribute(desc->a_scale, value, bytes);
        case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
            return cuda_cpu::copy_attribute(desc->b_scale, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void*, size_t bytes) {
    const size_t want =
        attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? sizeof(uint64_t) : sizeof(uint32_t);
    return bytes == want ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

// ---------------------------------------------------------------- the product

namespace cuda_cpu {
inline int matmul_algorithms =
    1;  // how many a caller is offered: a test of the choice between them sets more

inline constexpr size_t kWorthThreads = 100000;  // elements: a smaller pass ends before threads wake

inline bool float_or_bf16(cudaDataType_t type) {
    return type == CUDA_R_32F || type == CUDA_R_16BF;
}
inline bool is_fp8(cudaDataType_t type) {
    return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

// What is wrong with the request, as cuBLASLt would answer it.
inline cublasStatus_t check_matmul(const cublasLtMatmulDescOpaque_t& op,
                                   const cublasLtMatrixLayoutOpaque_t& a,
                                   const cublasLtMatrixLayoutOpaque_t& b,
                                   const cublasLtMatrixLayoutOpaque_t& d) {
    const uint64_t k = op.transa ? a.rows : a.cols;
    if (!k || !d.rows || !d.cols || (op.transa ? a.cols : a.rows) != d.rows ||
        (op.transb ? b.rows : b.cols) != d.cols || (op.transb ? b.cols : b.rows) != k ||
        a.ld < (int64_t)a.rows || b.ld < (int64_t)b.rows || d.ld < (int64_t)d.rows)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (is_fp8(a.type) && is_fp8(b.type)) {
        // The summed index along memory, sides that fill 16 bytes, and not both operands E5M2. (cuBLASLt has
        // GELU for FP8, too, with an FP8 result.)
        const bool fits = op.transa && !op.transb && !(k % 16 || d.rows % 16 || d.cols % 16);
        const bool plain = op.epilogue == CUBLASLT_EPILOGUE_DEFAULT || op.epilogue == CUBLASLT_EPILOGUE_BIAS;
        return op.compute == CUBLAS_COMPUTE_32F && fits && plain && float_or_bf16(d.type) &&
                       !(op.epilogue == CUBLASLT_EPILOGUE_BIAS && d.type != CUDA_R_16BF) &&
                       !(a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2)
                   ? CUBLAS_STATUS_SUCCESS
                   : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (op.compute != CUBLAS_COMPUTE_32F || op.a_scale || op.b_scale || !float_or_bf16(a.type) ||
        a.type != b.type || !float_or_bf16(d.type) || (a.type == CUDA_R_32F && d.type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    switch (op.epilogue) {
        case CUBLASLT_EPILOGUE_DEFAULT:
        case CUBLASLT_EPILOGUE_BIAS:
            return CUBLAS_STATUS_SUCCESS;
        case CUBLASLT_EPILOGUE_GELU_AUX:
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
        case CUBLASLT_EPILOGUE_DGELU:
            if (op.aux_ld < (int64_t)d.rows || op.aux_ld % 8) return CUBLAS_STATUS_INVALID_VALUE;
            return CUBLAS_STATUS_SUCCESS;
        case CUBLASLT_EPILOGUE_BGRADB:
            return op.transb && d.type == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
        default:
            return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

// The matrix as floats: itself, or a copy in `buffer`. scale: of FP8, or null.
inline const float* as_float(const void* data, const cublasLtMatrixLayoutOpaque_t& layout, const float* scale,
                             std::vector<float>& buffer) {
    if (layout.type == CUDA_R_32F) return static_cast<const float*>(data);
    const size_t n = layout.ld * (layout.cols - 1) + layout.rows;
    if (buffer.size() < n) buffer.resize(n);
    float* to = buffer.data();
    if (is_fp8(layout.type)) {
        float value[256];
        const auto format = layout.type == CUDA_R_8F_E4M3 ? __NV_E4M3 : __NV_E5M2;
        for (int code = 0; code < 256; code++)
            value[code] = fp8_to_float((uint8_t)code, format) * (scale ? *scale : 1.0f);
        const auto* from = static_cast<const uint8_t*>(data);
#pragma omp parallel for if (n > kWorthThreads)
        for (size_t i = 0; i < n; i++) to[i] = value[from[i]];
        return to;
    }
    const auto* from = static_cast<const __nv_bfloat16*>(data);
#pragma omp parallel for if (n > kWorthThreads)
    for (size_t i = 0; i < n; i++) to[i] = from[i];
    return to;
}

// GELU's two functions as gelu.cuh has them.
inline float gelu_sigmoid(float x) {
    return 1.0f / (1.0f + __expf(-2.0f * 0.7978845608f * x * (1.0f + 0.044715f * x * x)));
}
inline float gelu(float x) {
    return x * gelu_sigmoid(x);
}
inline float gelu_slope(float x) {
    const float s = gelu_sigmoid(x);
    return s + x * s * (1.0f - s) * 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
}

// The epilogue of one column, from the product's floats x to the result d and to aux; x may be d or aux. It
// goes by blocks in arrays of its own, with conversions in loops of their own: only so does g++ 12 vectorize
// all of them.
template <class T>
void finish_column(uint32_t epilogue, const float* x, T* d, T* aux, int m) {
    constexpr int kBlock = 256;
    for (int begin = 0; begin < m; begin += kBlock) {
        const int n = std::min(kBlock, m - begin);
        float y[kBlock], z[kBlock];
        if (epilogue & CUBLASLT_EPILOGUE_GELU) {
            for (int i = 0; i < n; i++) y[i] = x[begin + i];
            for (int i = 0; i < n; i++) aux[begin + i] = y[i];
            for (int i = 0; i < n; i++) z[i] = aux[begin + i];  // rounded: what a later look at aux finds
            for (int i = 0; i < n; i++) y[i] = gelu(z[i]);
        } else if (epilogue == CUBLASLT_EPILOGUE_DGELU) {
            for (int i = 0; i < n; i++) z[i] = aux[begin + i];
            for (int i = 0; i < n; i++) y[i] = x[begin + i] * gelu_slope(z[i]);
        } else {
            for (int i = 0; i < n; i++) y[i] = x[begin + i];
        }
        for (int i = 0; i < n; i++) d[begin + i] = y[i];
    }
}

// out[i] = the sum over the n columns of b (m rows), in blocks of 64 so that rounding errors stay small.
inline void sum_columns(float* out, const float* b, int64_t ldb, int m, int n) {
    constexpr int kStrip = 64, kBlock = 64;
#pragma omp parallel for if ((size_t)m * n > kWorthThreads)
    for (int first = 0; first < m; first += kStrip) {
        const int rows = std::min(kStrip, m - first);
        float total[kStrip] = {};
        for (int begin = 0; begin < n; begin += kBlock) {
            float part[kStrip] = {};
            for (int j = begin; j < std::min(begin + kBlock, n); j++)
                for (int i = 0; i < rows; i++) part[i] += b[j * ldb + first + i];
            for (int i = 0; i < rows; i++) total[i] += part[i];
        }
        for (int i = 0; i < rows; i++) out[first + i] = total[i];
    }
}

// The product of two float matrices into d, of either type; k is what is summed over.
template <class T>
void matmul(const cublasLtMatmulDescOpaque_t& op, float alpha, const float* a, int64_t lda, const float* b,
            int64_t ldb, float beta, T* d, const cublasLtMatrixLayoutOpaque_t& layout, int k) {
    static thread_local std::vector<float> buffer;  // kept: filling new pages costs more
    const int m = (int)layout.rows, n = (int)layout.cols;
    const int64_t ldd = layout.ld;
    const bool parallel = (size_t)m * n > kWorthThreads, with_gelu = op.epilogue & CUBLASLT_EPILOGUE_GELU,
               with_bias = op.epilogue & CUBLASLT_EPILOGUE_BIAS;
    T* aux = static_cast<T*>(op.aux);

    float* x;  // where sgemm writes to: a place that the result or aux will need anyway, if they are floats
    int64_t ldx = ldd;
    if constexpr (sizeof(T) == 4) {
        x = with_gelu ? aux : d;
        if (with_gelu) ldx = op.aux_ld;
    } else {
        if (buffer.size() < (size_t)ldx * n) buffer.resize((size_t)ldx * n);
        x = buffer.data();
    }
    // sgemm adds to the bias: with beta = 0 it would clear the place first, so this is free.
    if (with_bias || (beta != 0 && sizeof(T) == 2)) {
#pragma omp parallel for if (parallel)
        for (int j = 0; j < n; j++) {
            const T* from = with_bias ? static_cast<const T*>(op.bias) : d + j * ldd;
            for (int i = 0; i < m; i++) x[j * ldx + i] = from[i];
        }
    }
    cblas_sgemm(kColumnMajor, kNoTranspose + op.transa, kNoTranspose + op.transb, m, n, k, alpha, a, (int)lda,
                b, (int)ldb, with_bias ? 1.0f : beta, x, (int)ldx);
    if (sizeof(T) == 2 || with_gelu || op.epilogue == CUBLASLT_EPILOGUE_DGELU) {
#pragma omp parallel for if (parallel)
        for (int j = 0; j < n; j++)
            finish_column(op.epilogue, x + j * ldx, d + j * ldd, aux + j * op.aux_ld, m);
    }
    for (int j = 0; j < n; j++) race_initialized(d + j * ldd, m * sizeof(T));
    for (int j = 0; j < n && with_gelu; j++) race_initialized(aux + j * op.aux_ld, m * sizeof(T));
}

// d = op(a) op(b) with its epilogue, of a request that is known to be right.
inline void run_matmul(const cublasLtMatmulDescOpaque_t& op, float alpha, const void* a,
                       const cublasLtMatrixLayoutOpaque_t& a_layout, const void* b,
                       const cublasLtMatrixLayoutOpaque_t& b_layout, float beta, void* d,
                       const cublasLtMatrixLayoutOpaque_t& d_layout) {
    static thread_local std::vector<float> a_buffer, b_buffer;
    const float *fa = as_float(a, a_layout, op.a_scale, a_buffer),
                *fb = as_float(b, b_layout, op.b_scale, b_buffer);
    const int k = (int)(op.transa ? a_layout.rows : a_layout.cols);
    if (d_layout.type == CUDA_R_32F)
        matmul(op, alpha, fa, a_layout.ld, fb, b_layout.ld, beta, static_cast<float*>(d), d_layout, k);
    else
        matmul(op, alpha, fa, a_layout.ld, fb, b_layout.ld, beta, static_cast<__nv_bfloat16*>(d), d_layout,
               k);
    if (op.epilogue == CUBLASLT_EPILOGUE_BGRADB) {
        auto* out = static_cast<float*>(op.bias);
        sum_columns(out, fb, b_layout.ld, (int)b_layout.rows, k);
        race_initialized(out, b_layout.rows * sizeof(float));
    }
}
}  // namespace cuda_cpu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t op,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t, int requested,
                                                     cublasLtMatmulHeuristicResult_t* results, int* count) {
    *count = 0;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    const cublasStatus_t status = cuda_cpu::check_matmul(*op, *a, *b, *d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    for (; *count < std::min(requested, cuda_cpu::matmul_algorithms); ++*count)
        results[*count] = {{{(uint64_t)*count, op->a_scale || op->b_scale}}, 0, CUBLAS_STATUS_SUCCESS, 1.0f};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                           cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                           void* value, size_t bytes, size_t* written) {
    const bool half = attribute == CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID ||
                      attribute == CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID;
    if (bytes != (half ? 2 : 4)) return CUBLAS_STATUS_INVALID_VALUE;
    memset(value, 0, bytes);
    if (attribute == CUBLASLT_ALGO_CONFIG_ID) memcpy(value, algo->data, bytes);
    *written = bytes;
    return CUBLAS_STATUS_SUCCESS;
}

// c must be d.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, const void* alpha,
                                     const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                     cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                                     cublasLtMatrixLayout_t, void* d, cublasLtMatrixLayout_t d_layout,
                                     const cublasLtMatmulAlgo_t* algo, void*, size_t, cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    const cublasStatus_t status = cuda_cpu::check_matmul(*op, *a_layout, *b_layout, *d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    const bool with_aux = op->epilogue & (CUBLASLT_EPILOGUE_GELU_AUX | CUBLASLT_EPILOGUE_DGELU),
               bias_gradient = op->epilogue == CUBLASLT_EPILOGUE_BGRADB;
    if ((with_aux && !op->aux) || ((bias_gradient || op->epilogue & CUBLASLT_EPILOGUE_BIAS) && !op->bias))
        return CUBLAS_STATUS_INVALID_VALUE;
    // what is offered for operands without scales need not take them
    if (algo && algo->data[1] == 0 && (op->a_scale || op->b_scale)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (c != d || (keep != 0 && op->epilogue != CUBLASLT_EPILOGUE_DEFAULT && !bias_gradient))
        return CUBLAS_STATUS_NOT_SUPPORTED;

    const cudaError_t error = cuda_cpu::submit(stream, [op = *op, factor, a, a_layout = *a_layout, b,
                                                        b_layout = *b_layout, keep, d, d_layout = *d_layout] {
        cuda_cpu::run_matmul(op, factor, a, a_layout, b, b_layout, keep, d, d_layout);
    });
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
