// Clusters: a few blocks of a grid that run at the same time, on neighbouring SMs, and reach into each
// other's shared memory (compute capability 9.0 and up): they can exchange what else would have to go through
// the L2 cache and into another kernel.
//
// The barrier has two halves: what a thread did before cluster_arrive() is seen by every thread of the
// cluster behind its cluster_wait(). A block must not write to another before that one has begun to run, nor
// after it has ended: so a kernel arrives first of all and waits before its first write to another block, and
// every such write is followed by a barrier that the written block waits at. A warp's threads come to both
// halves together.
//
// On the CPU backend a cluster's blocks are run by one OS thread, so its kernels may only have dynamic shared
// memory.
#pragma once
#include "mma.cuh"

#ifdef CUDA_CPU

inline void cluster_arrive(CUDA_CPU_WHERE) {
    cuda_cpu::cluster_arrive(where);
}
inline void cluster_wait(CUDA_CPU_WHERE) {
    cuda_cpu::cluster_wait(where);
}
// The number of this block in its cluster.
inline int cluster_rank() {
    return cuda_cpu::block_of(*cuda_cpu::worker, cuda_cpu::worker->current);
}
// p as block `rank` of the cluster has it; p points into this block's dynamic shared memory.
template <class T>
T* in_block(T* p, int rank) {
    const cuda_cpu::Worker& w = *cuda_cpu::worker;
    assert(rank >= 0 && rank < w.cluster);
    return reinterpret_cast<T*>(reinterpret_cast<char*>(p) +
                                (rank - cluster_rank()) * (ptrdiff_t)w.block_shared_bytes);
}
// *p of block `rank` = x.
inline void store_to_block(float* p, int rank, float x) {
    *in_block(p, rank) = x;
}
inline void store_to_block(float4* p, int rank, float4 x) {
    *in_block(p, rank) = x;
}

#else

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}
__device__ __forceinline__ void store_to_block(float* p, int rank, float x) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }"
        :
        : "r"(shared_address(p)), "r"(rank), "f"(x)
        : "memory");
#endif
}
__device__ __forceinline__ void store_to_block(float4* p, int rank, float4 x) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.v4.f32 [there], {%2,%3,%4,%5}; }"
        :
        : "r"(shared_address(p)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
#endif
}

#endif

// Launches a kernel of clusters of `cluster` blocks, which may begin before the kernel in front has ended, as
// launch_early (overlap.cuh).
template <class... Params, class... Args>
void launch_clusters(const Context& ctx, void (*kernel)(Params...), int clusters, int cluster, int threads,
                     size_t shared, Args... args) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {(unsigned)cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters * cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = ctx.stream;
    config.attrs = attributes;
    config.numAttrs = ctx.overlap_kernels ? 2 : 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, (Params)args...));
}
