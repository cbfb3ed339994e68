// cuBLASLt's functions for programs that nvcc has compiled, by those of the CPU backend, whose header this
// file includes in NVIDIA's place: descriptors have room for the CPU backend's in the caller's memory. (There
// the functions are C++, so those with the library's names get them as labels.)
#include "../../llmc/cpu/include/cublasLt.h"

#include "machine.h"
#include "runtime.h"

// The last words of the library's struct that the CPU backend's does not have.
struct LibraryHeuristicResult {
    cublasLtMatmulHeuristicResult_t result;
    int reserved[4];
};

#define NAMED(name) __asm__(name)

cublasStatus_t create(cublasLtHandle_t* handle) NAMED("cublasLtCreate");
cublasStatus_t create(cublasLtHandle_t* handle) {
    return cublasLtCreate(handle);
}
size_t version() NAMED("cublasLtGetVersion");
size_t version() {
    return cublasLtGetVersion();
}
const char* status_name(cublasStatus_t status) NAMED("cublasLtGetStatusName");
const char* status_name(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}
cublasStatus_t init_desc(cublasLtMatmulDesc_t desc, size_t bytes, cublasComputeType_t compute,
                         cudaDataType_t scale) NAMED("cublasLtMatmulDescInit_internal");
cublasStatus_t init_desc(cublasLtMatmulDesc_t desc, size_t bytes, cublasComputeType_t compute,
                         cudaDataType_t scale) {
    if (bytes < sizeof *desc) ptx::fail("a matrix product's descriptor has %zu bytes", bytes);
    return cublasLtMatmulDescInit(desc, compute, scale);
}
cublasStatus_t set_desc(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                        const void* value, size_t bytes) NAMED("cublasLtMatmulDescSetAttribute");
cublasStatus_t set_desc(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                        const void* value, size_t bytes) {
    return cublasLtMatmulDescSetAttribute(desc, attribute, value, bytes);
}
cublasStatus_t init_layout(cublasLtMatrixLayout_t layout, size_t bytes, cudaDataType_t type, uint64_t rows,
                           uint64_t cols, int64_t ld) NAMED("cublasLtMatrixLayoutInit_internal");
cublasStatus_t init_layout(cublasLtMatrixLayout_t layout, size_t bytes, cudaDataType_t type, uint64_t rows,
                           uint64_t cols, int64_t ld) {
    if (bytes < sizeof *layout) ptx::fail("a matrix's layout has %zu bytes", bytes);
    return cublasLtMatrixLayoutInit(layout, type, rows, cols, ld);
}
cublasStatus_t init_preference(cublasLtMatmulPreference_t preference, size_t)
    NAMED("cublasLtMatmulPreferenceInit_internal");
cublasStatus_t init_preference(cublasLtMatmulPreference_t preference, size_t) {
    return cublasLtMatmulPreferenceInit(preference);
}
cublasStatus_t set_preference(cublasLtMatmulPreference_t preference,
                              cublasLtMatmulPreferenceAttributes_t attribute, const void* value, size_t bytes)
    NAMED("cublasLtMatmulPreferenceSetAttribute");
cublasStatus_t set_preference(cublasLtMatmulPreference_t preference,
                              cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                              size_t bytes) {
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes);
}
cublasStatus_t get_algorithms(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a,
                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                              cublasLtMatmulPreference_t preference, int requested,
                              LibraryHeuristicResult* results, int* count)
    NAMED("cublasLtMatmulAlgoGetHeuristic");
cublasStatus_t get_algorithms(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a,
                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                              cublasLtMatmulPreference_t preference, int requested,
                              LibraryHeuristicResult* results, int* count) {
    cuda_cpu::matmul_algorithms = 3;  // so that there is a choice to make
    cublasLtMatmulHeuristicResult_t found[3];
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, op, a, b, c, d, preference,
                                                                 std::min(requested, 3), found, count);
    for (int i = 0; i < *count; i++) results[i].result = found[i];
    return status;
}
cublasStatus_t get_config(const cublasLtMatmulAlgo_t* algorithm,
                          cublasLtMatmulAlgoConfigAttributes_t attribute, void* value, size_t bytes,
                          size_t* written) NAMED("cublasLtMatmulAlgoConfigGetAttribute");
cublasStatus_t get_config(const cublasLtMatmulAlgo_t* algorithm,
                          cublasLtMatmulAlgoConfigAttributes_t attribute, void* value, size_t bytes,
                          size_t* written) {
    return cublasLtMatmulAlgoConfigGetAttribute(algorithm, attribute, value, bytes, written);
}

static void check_matrix(const void* p, const cublasLtMatrixLayoutOpaque_t& m) {
    const size_t element = m.type == CUDA_R_32F ? 4 : cuda_cpu::is_fp8(m.type) ? 1 : 2;
    ptx::check_memory((uint64_t)p, ((m.cols - 1) * m.ld + m.rows) * element, "a matrix product");
}
cublasStatus_t matmul(cublasLtHandle_t, cublasLtMatmulDesc_t op, const float* alpha, const void* a,
                      cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                      const float* beta, const void*, cublasLtMatrixLayout_t, void* d,
                      cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*, size_t, void*)
    NAMED("cublasLtMatmul");
cublasStatus_t matmul(cublasLtHandle_t, cublasLtMatmulDesc_t op, const float* alpha, const void* a,
                      cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                      const float* beta, const void*, cublasLtMatrixLayout_t, void* d,
                      cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*, size_t, void*) {
    if (const cublasStatus_t status = cuda_cpu::check_matmul(*op, *a_layout, *b_layout, *d_layout);
        status != CUBLAS_STATUS_SUCCESS)
        return status;
    check_matrix(a, *a_layout);
    check_matrix(b, *b_layout);
    check_matrix(d, *d_layout);
    ptx::give([op = *op, alpha = *alpha, beta = *beta, a, b, d, la = *a_layout, lb = *b_layout,
               ld = *d_layout] { cuda_cpu::run_matmul(op, alpha, a, la, b, lb, beta, d, ld); });
    return CUBLAS_STATUS_SUCCESS;
}
