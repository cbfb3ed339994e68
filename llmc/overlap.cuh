// Kernels that begin before the one in front of them has ended.
//
// Between two kernels of a stream a GPU is idle for about as long as a small kernel works: the last blocks
// end, the next grid starts, and its first loads have the whole way to the memory before them. Where a token
// takes sixty kernels, that is most of its time. Hopper can start a grid early ("programmatic dependent
// launch"): its blocks take what room is left, fetch what does not depend on the kernels before it, such as
// weights, and then wait.
//
// What makes that correct:
//
//   - Every thread of such a kernel calls wait_for_previous_kernel() before it touches anything that an
//     earlier kernel writes or reads. It returns when the kernel in front has ended and its results can be
//     seen. That kernel has waited as well before it ended, so everything further in front has ended, too:
//     buffers may be reused from one kernel to the next as in any stream.
//   - start_next_kernel() says that the next kernel may start; it does when all blocks of this one have said
//     so, or ended. Nothing is promised to it, for it waits; called first of all, it lets the next kernel,
//     and the one behind that, fetch while this one waits. Called only after waiting, it also promises that
//     whatever was there before this kernel may be read without waiting.
//
// On other devices, and in kernels that were launched as usual, both do nothing.
#pragma once
#include "cuda_common.cuh"

__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel in clusters of `cluster` blocks (1: without), and early if the device can.
template <class... Params, class... Args>
void launch_with_attributes(const Context& ctx, void (*kernel)(Params...), dim3 grid, int cluster,
                            int threads, size_t shared, Args... args) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = ctx.stream;
    config.attrs = attributes;
    if (cluster > 1) {
        cudaLaunchAttribute& clusters = attributes[config.numAttrs++];
        clusters.id = cudaLaunchAttributeClusterDimension;
        clusters.val.clusterDim = {(unsigned)cluster, 1, 1};
    }
    if (ctx.overlap_kernels) {
        cudaLaunchAttribute& early = attributes[config.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, (Params)args...));
}

// Launches a kernel that keeps to these rules. A stream that is captured turns the permission to start early
// into an edge of the graph.
template <class... Params, class... Args>
void launch_early(const Context& ctx, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                  Args... args) {
    if (ctx.overlap_kernels) {
        launch_with_attributes(ctx, kernel, grid, 1, threads, shared, args...);
        return;
    }
    kernel<<<grid, threads, shared, ctx.stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}
