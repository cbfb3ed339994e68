// cuBLASLt's functions for programs that nvcc has compiled, by those of the CPU backend, whose header this
// file includes in NVIDIA's place: descriptors have room for the CPU backend's in the caller's memory. (There
// the functions are C++, so those with the library's names get them as labels.)
#define CUDA_CPU_DENORMALS  // a GPU has them
#include "../../llmc/cpu/include/cublasLt.h"

#include "machine.h"
#include "runtime.h"

// The last words of the library's struct that the CPU backend's does not have.
struct LibraryHeuristicResult {
    cublasLtMatmulHeuristicResult_t result;
    int reserved[4];
};

// Defines a function of the library.
#define LIBRARY_FUNCTION(result, name, parameters)   \
    result library_##name parameters __asm__(#name); \
    result library_##name parameters

LIBRARY_FUNCTION(cublasStatus_t, cublasLtCreate, (cublasLtHandle_t * handle)) {
    return cublasLtCreate(handle);
}
LIBRARY_FUNCTION(size_t, cublasLtGetVersion, ()) {
    return cublasLtGetVersion();
}
LIBRARY_FUNCTION(const char*, cublasLtGetStatusName, (cublasStatus_t status)) {
    return cublasLtGetStatusName(status);
}

// ---- descriptors, of `bytes` bytes in the caller's memory

LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulDescInit_internal,
                 (cublasLtMatmulDesc_t desc, size_t bytes, cublasComputeType_t compute,
                  cudaDataType_t scale)) {
    if (bytes < sizeof *desc) ptx::fail("a matrix product's descriptor has %zu bytes", bytes);
    return cublasLtMatmulDescInit(desc, compute, scale);
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulDescSetAttribute,
                 (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void* value,
                  size_t bytes)) {
    return cublasLtMatmulDescSetAttribute(desc, attribute, value, bytes);
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatrixLayoutInit_internal,
                 (cublasLtMatrixLayout_t layout, size_t bytes, cudaDataType_t type, uint64_t rows,
                  uint64_t cols, int64_t ld)) {
    if (bytes < sizeof *layout) ptx::fail("a matrix's layout has %zu bytes", bytes);
    return cublasLtMatrixLayoutInit(layout, type, rows, cols, ld);
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulPreferenceInit_internal,
                 (cublasLtMatmulPreference_t preference, size_t)) {
    return cublasLtMatmulPreferenceInit(preference);
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulPreferenceSetAttribute,
                 (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
                  const void* value, size_t bytes)) {
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes);
}

// ---- algorithms

LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulAlgoGetHeuristic,
                 (cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a,
                  cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                  cublasLtMatmulPreference_t preference, int requested, LibraryHeuristicResult* results,
                  int* count)) {
    cuda_cpu::matmul_algorithms = 3;  // so that there is a choice to make
    cublasLtMatmulHeuristicResult_t found[3];
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, op, a, b, c, d, preference,
                                                                 std::min(requested, 3), found, count);
    for (int i = 0; i < *count; i++) results[i].result = found[i];
    return status;
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmulAlgoConfigGetAttribute,
                 (const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute,
                  void* value, size_t bytes, size_t* written)) {
    return cublasLtMatmulAlgoConfigGetAttribute(algorithm, attribute, value, bytes, written);
}

// ---- the product

static size_t bytes_of(const cublasLtMatrixLayoutOpaque_t& m) {
    const size_t element = m.type == CUDA_R_32F ? 4 : cuda_cpu::is_fp8(m.type) ? 1 : 2;
    return ((m.cols - 1) * m.ld + m.rows) * element;
}
static void check_matrix(const void* p, const cublasLtMatrixLayoutOpaque_t& m) {
    ptx::check_memory((uint64_t)p, bytes_of(m), "a matrix product");
}
LIBRARY_FUNCTION(cublasStatus_t, cublasLtMatmul,
                 (cublasLtHandle_t, cublasLtMatmulDesc_t op, const float* alpha, const void* a,
                  cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                  const float* beta, const void*, cublasLtMatrixLayout_t, void* d,
                  cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*, size_t, void*)) {
    const cublasStatus_t status = cuda_cpu::check_matmul(*op, *a_layout, *b_layout, *d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    check_matrix(a, *a_layout);
    check_matrix(b, *b_layout);
    check_matrix(d, *d_layout);
    ptx::give([op = *op, alpha = *alpha, beta = *beta, a, b, d, a_layout = *a_layout, b_layout = *b_layout,
               d_layout = *d_layout] {
        ptx::begin_kernel("a matrix product", false);
        cuda_cpu::run_matmul(op, alpha, a, a_layout, b, b_layout, beta, d, d_layout);
        ptx::note_kernel_write(d, bytes_of(d_layout));
    });
    return CUBLAS_STATUS_SUCCESS;
}
