// The one struct that travels: stream, library handle, and the facts about the device that launchers ask for.
#pragma once
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <type_traits>

#include "error.h"

// Every CUDA and cuBLAS call goes through one of these; what fails becomes an Error that names the call.
#define CHECK_STATUS(call, success, describe)                                                \
    do {                                                                                     \
        const auto check_status = (call);                                                    \
        if (check_status != (success))                                                       \
            fail("%s:%d: %s failed: %s", __FILE__, __LINE__, #call, describe(check_status)); \
    } while (0)
#define CUDA_CHECK(call) CHECK_STATUS(call, cudaSuccess, cudaGetErrorString)
#define CUBLAS_CHECK(call) CHECK_STATUS(call, CUBLAS_STATUS_SUCCESS, cublasLtGetStatusName)

#ifdef CUDA_CPU
inline constexpr bool kOnCpu = true;
#else
inline constexpr bool kOnCpu = false;
#endif

// Some kernels have a form for a GPU and one for the CPU backend. A program compiles its own alone; tests and
// benchmarks, with EVERY_KERNEL, choose as they run. Where a program for the CPU has no choice, the members
// that say which form are constants. (For a GPU a Context has the same members in either case:
// attention_cudnn.o serves both.)
#if defined(CUDA_CPU) && !defined(EVERY_KERNEL)
#define CHOICE static constexpr
#else
#define CHOICE
#endif

struct MatmulPlans;     // matmul_plans.h
struct CudnnAttention;  // attention_cudnn.h

struct Context {
    cudaStream_t stream = nullptr;
    cublasLtHandle_t cublaslt = nullptr;
    // cuBLASLt repeats its results bit for bit with a workspace that stays the same. A matrix product that is
    // cut into pieces along the sum keeps the pieces there: 64 MB hold sixteen of GPT-2's 1024 x 1024.
    static constexpr size_t matmul_workspace_bytes = kOnCpu ? 0 : 64 << 20;
    void* matmul_workspace = nullptr;
    mutable std::shared_ptr<MatmulPlans> matmuls;   // made at the first product
    mutable std::shared_ptr<CudnnAttention> cudnn;  // made when a shape is prepared
    bool tune_matmuls = !kOnCpu;  // time the algorithms that cuBLASLt offers, or take its first?
    bool fuse_matmuls = true;     // false: no GELU and no bias gradients in products, to compare with
    std::string device_name;
    int num_sms = 1;               // multiprocessors; on the CPU backend, OS threads
    size_t max_shared = 0;         // bytes of shared memory that one block may ask for
    bool has_fp8 = false;          // can it multiply 8-bit floats?
    bool has_clusters = false;     // can blocks run in clusters? (cluster.cuh)
    bool overlap_kernels = false;  // may a kernel start before the one in front has ended? (overlap.cuh)
    // Attention by Hopper's own instructions; the CPU backend can, but is slower so.
    CHOICE bool use_wgmma = false;
    CHOICE bool use_decode_halves = false;  // decode one sequence by clusters? Until timed on a GPU: no
    // Threads that share one row in the row-wise kernels (layernorm, classifier). A warp on a GPU, so that
    // its loads coalesce; one thread on the CPU backend, where a shuffle costs a fiber switch (13-21 ns).
    CHOICE int row_lanes = kOnCpu ? 1 : 32;
};
#undef CHOICE

// Calls launch(lanes), a compile-time constant of 1 or 32: Context::row_lanes.
template <class Launch>
void with_row_lanes(const Context& ctx, const Launch& launch) {
#ifdef EVERY_KERNEL
    if (ctx.row_lanes == 1)
        launch(std::integral_constant<int, 1>());
    else
        launch(std::integral_constant<int, 32>());
#else
    (void)ctx;
    launch(std::integral_constant<int, (kOnCpu ? 1 : 32)>());
#endif
}

// A program makes one, for GPU 0 (which one that is, CUDA_VISIBLE_DEVICES may say), and has it until it ends.
inline Context make_context() {
    Context ctx;
    CUDA_CHECK(cudaSetDevice(0));
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
    ctx.device_name = prop.name;
    ctx.num_sms = prop.multiProcessorCount;
    ctx.max_shared = prop.sharedMemPerBlockOptin;
    ctx.has_fp8 = kOnCpu || prop.major * 10 + prop.minor >= 89;
    ctx.has_clusters = kOnCpu;
#ifdef COMPILED_FOR_SM_90A
    ctx.has_clusters = prop.major >= 9 && CUDART_VERSION >= 12010;  // see mma.cuh
    ctx.use_wgmma = prop.major == 9 && prop.minor == 0;
#endif
    // A graph can record an early start since CUDA 12.3; the driver may be older than the toolkit, so it is
    // asked, too. Code that was compiled for older devices has no instruction to wait with.
#if defined(COMPILED_FOR_SM_90A) && CUDART_VERSION >= 12030
    int driver = 0;
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    ctx.overlap_kernels = prop.major >= 9 && driver >= 12030;
#endif
    CUDA_CHECK(cudaStreamCreate(&ctx.stream));
    CUBLAS_CHECK(cublasLtCreate(&ctx.cublaslt));
    if (ctx.matmul_workspace_bytes > 0)
        CUDA_CHECK(cudaMalloc(&ctx.matmul_workspace, ctx.matmul_workspace_bytes));
    return ctx;
}

// For shapes that come up a few times only: timing algorithms would take longer than the products.
inline Context without_tuning(Context ctx) {
    ctx.tune_matmuls = false;
    return ctx;
}
