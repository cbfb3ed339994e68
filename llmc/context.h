// The one struct that travels: stream, library handle, and the facts about the device that launchers ask for.
#pragma once
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <string>

#include "error.h"

// Every CUDA and cuBLAS call goes through one of these; what fails becomes an Error that names the call.
#define CUDA_CHECK(call)                                                                                    \
    do {                                                                                                    \
        const cudaError_t cuda_check_status = (call);                                                       \
        if (cuda_check_status != cudaSuccess)                                                               \
            fail("%s:%d: %s failed: %s", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_check_status)); \
    } while (0)
#define CUBLAS_CHECK(call)                                                                                   \
    do {                                                                                                     \
        const cublasStatus_t cublas_check_status = (call);                                                   \
        if (cublas_check_status != CUBLAS_STATUS_SUCCESS)                                                    \
            fail("%s:%d: %s failed: cuBLAS status %d", __FILE__, __LINE__, #call, (int)cublas_check_status); \
    } while (0)

#ifdef CUDA_CPU
inline constexpr bool kOnCpu = true;
#else
inline constexpr bool kOnCpu = false;
#endif

struct Context {
    cudaStream_t stream = nullptr;
    cublasHandle_t cublas = nullptr;
    void* cublas_workspace = nullptr;
    std::string device_name;
    int num_sms = 1;        // multiprocessors; on the CPU backend, OS threads
    size_t max_shared = 0;  // bytes of shared memory that one block may ask for
    // Threads that share one row in the row-wise kernels (layernorm, classifier). A warp on a GPU, so that
    // its loads coalesce; one thread on the CPU backend, where a shuffle costs a fiber switch (13-21 ns).
    int row_lanes = 32;
};

inline Context make_context(int device = 0) {
    Context ctx;
    CUDA_CHECK(cudaSetDevice(device));
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, device));
    ctx.device_name = prop.name;
    ctx.num_sms = prop.multiProcessorCount;
    ctx.max_shared = prop.sharedMemPerBlockOptin;
    ctx.row_lanes = kOnCpu ? 1 : 32;
    if (!kOnCpu && prop.major < 8)
        fail("%s has compute capability %d.%d, this program needs 8.0 or newer: use --device cpu", prop.name,
             prop.major, prop.minor);
    CUDA_CHECK(cudaStreamCreate(&ctx.stream));
    CUBLAS_CHECK(cublasCreate(&ctx.cublas));
    CUBLAS_CHECK(cublasSetStream(ctx.cublas, ctx.stream));
    // cuBLAS repeats its results bit for bit on one stream with a workspace that stays the same.
    const size_t workspace_bytes = 32 << 20;
    CUDA_CHECK(cudaMalloc(&ctx.cublas_workspace, workspace_bytes));
    CUBLAS_CHECK(cublasSetWorkspace(ctx.cublas, ctx.cublas_workspace, workspace_bytes));
    return ctx;
}

inline void free_context(Context& ctx) {
    cublasDestroy(ctx.cublas);
    cudaFree(ctx.cublas_workspace);
    cudaStreamDestroy(ctx.stream);
    ctx = Context();
}
