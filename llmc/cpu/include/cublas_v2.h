// Stands in for CUDA's header of this name: the GEMM entry points on OpenBLAS. Sums are in float; bf16
// operands are widened first and a bf16 result is rounded once, which is what cuBLAS does too.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "../cuda_cpu.h"

// Declared here, not by cblas.h, whose place differs between distributions.
extern "C" void cblas_sgemm(int order, int transa, int transb, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_FAST_16BF = 75,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
};
enum cublasMath_t { CUBLAS_DEFAULT_MATH = 0, CUBLAS_PEDANTIC_MATH = 2, CUBLAS_TF32_TENSOR_OP_MATH = 3 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };

struct cublasContext {};
typedef cublasContext* cublasHandle_t;

inline const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown cuBLAS status";
}
inline cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    static cublasContext only;
    *handle = &only;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

namespace cuda_cpu {
inline constexpr size_t kWorthThreads = 100000;  // elements: a smaller conversion ends before threads wake

struct Matrix {  // column-major, in either type
    const void* data;
    cudaDataType_t type;
    int rows, cols, ld;
};

// The matrix as floats: itself, or a copy in `buffer`.
inline const float* as_float(const Matrix& m, std::vector<float>& buffer) {
    if (m.type == CUDA_R_32F) return static_cast<const float*>(m.data);
    size_t n = static_cast<size_t>(m.ld) * (m.cols - 1) + m.rows;
    if (buffer.size() < n) buffer.resize(n);
    const auto* from = static_cast<const __nv_bfloat16*>(m.data);
    float* to = buffer.data();
#pragma omp parallel for if (n > kWorthThreads)
    for (size_t i = 0; i < n; i++) to[i] = from[i];
    return to;
}

inline bool float_or_bf16(cudaDataType_t type) {
    return type == CUDA_R_32F || type == CUDA_R_16BF;
}

inline cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m,
                           int n, int k, float alpha, const void* a, cudaDataType_t a_type, int lda,
                           const void* b, cudaDataType_t b_type, int ldb, float beta, void* c,
                           cudaDataType_t c_type, int ldc) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!float_or_bf16(a_type) || !float_or_bf16(b_type) || !float_or_bf16(c_type))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    Matrix ma{a, a_type, transa ? k : m, transa ? m : k, lda},
        mb{b, b_type, transb ? n : k, transb ? k : n, ldb};
    if (m < 0 || n < 0 || k < 0 || lda < std::max(1, ma.rows) || ldb < std::max(1, mb.rows) ||
        ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!m || !n) return CUBLAS_STATUS_SUCCESS;

    static thread_local std::vector<float> a_buffer, b_buffer,
        c_buffer;  // kept: filling new pages costs more
    const float* fa = k ? as_float(ma, a_buffer) : nullptr;
    const float* fb = k ? as_float(mb, b_buffer) : nullptr;
    size_t c_size = static_cast<size_t>(ldc) * (n - 1) + m;
    float* fc = static_cast<float*>(c);
    if (c_type == CUDA_R_16BF) {
        if (c_buffer.size() < c_size) c_buffer.resize(c_size);
        if (beta != 0) as_float({c, c_type, m, n, ldc}, c_buffer);
        fc = c_buffer.data();
    }
    constexpr int kColumnMajor = 102, kNoTranspose = 111;
    cblas_sgemm(kColumnMajor, kNoTranspose + transa, kNoTranspose + transb, m, n, k, alpha, fa, lda, fb, ldb,
                beta, fc, ldc);
    if (c_type == CUDA_R_16BF) {
        auto* out = static_cast<__nv_bfloat16*>(c);
#pragma omp parallel for if (c_size > kWorthThreads)
        for (int j = 0; j < n; j++)
            for (size_t i = static_cast<size_t>(j) * ldc; i < static_cast<size_t>(j) * ldc + m; i++)
                out[i] = fc[i];
    }
    size_t element = c_type == CUDA_R_16BF ? 2 : 4;
    for (int j = 0; j < n; j++) race_initialized(static_cast<char*>(c) + element * ldc * j, element * m);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace cuda_cpu

inline cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                  int m, int n, int k, const float* alpha, const float* a, int lda,
                                  const float* b, int ldb, const float* beta, float* c, int ldc) {
    return cuda_cpu::gemm(handle, transa, transb, m, n, k, *alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb,
                          *beta, c, CUDA_R_32F, ldc);
}

inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void* alpha, const void* a, cudaDataType_t a_type, int lda, long long stride_a, const void* b,
    cudaDataType_t b_type, int ldb, long long stride_b, const void* beta, void* c, cudaDataType_t c_type,
    int ldc, long long stride_c, int count, cublasComputeType_t, cublasGemmAlgo_t) {
    auto bytes = [](cudaDataType_t type) -> long long { return type == CUDA_R_32F ? 4 : 2; };
    for (int i = 0; i < count; i++) {
        cublasStatus_t status =
            cuda_cpu::gemm(handle, transa, transb, m, n, k, *static_cast<const float*>(alpha),
                           static_cast<const char*>(a) + i * stride_a * bytes(a_type), a_type, lda,
                           static_cast<const char*>(b) + i * stride_b * bytes(b_type), b_type, ldb,
                           *static_cast<const float*>(beta),
                           static_cast<char*>(c) + i * stride_c * bytes(c_type), c_type, ldc);
        if (status != CUBLAS_STATUS_SUCCESS) return status;
    }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                   int m, int n, int k, const void* alpha, const void* a,
                                   cudaDataType_t a_type, int lda, const void* b, cudaDataType_t b_type,
                                   int ldb, const void* beta, void* c, cudaDataType_t c_type, int ldc,
                                   cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, a_type, lda, 0, b, b_type,
                                      ldb, 0, beta, c, c_type, ldc, 0, 1, compute, algo);
}

inline cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t transa,
                                                cublasOperation_t transb, int m, int n, int k,
                                                const float* alpha, const float* a, int lda,
                                                long long stride_a, const float* b, int ldb,
                                                long long stride_b, const float* beta, float* c, int ldc,
                                                long long stride_c, int count) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, CUDA_R_32F, lda, stride_a, b,
                                      CUDA_R_32F, ldb, stride_b, beta, c, CUDA_R_32F, ldc, stride_c, count,
                                      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
