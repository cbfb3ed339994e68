// Clusters: a few blocks of a grid that run at the same time, on neighbouring SMs, and write into each
// other's shared memory (compute capability 9.0 and up): they can exchange what else would have to go through
// the L2 cache and into another kernel.
//
// What is written goes into a mailbox of the block that it is for: a place in its shared memory that counts
// the bytes that are still to come. Who waits for the mailbox sees all that was sent to it. This is what the
// hardware has for it (mbarrier and st.async); a barrier that makes ordinary stores seen, which compiles to a
// fence over all of memory, is not needed. The rules:
//
//   1. One thread opens each of its block's mailboxes, with the number of bytes, before anything else.
//   2. Then all threads come to cluster_arrive(), and to cluster_wait() before they send: from there on all
//      blocks of the cluster run and have opened their mailboxes. Nothing else is ordered by that.
//   3. A mailbox is used once, and every block waits for all of its own before it ends, for nothing may be
//      sent to a block that has ended.
//
// On the CPU backend a cluster's blocks are run by one OS thread, so its kernels may only have dynamic shared
// memory.
#pragma once
#include "mma.cuh"
#include "overlap.cuh"

#ifdef CUDA_CPU

using Mailbox = cuda_cpu::Mailbox;

inline void open_mailbox(Mailbox* box, int bytes, CUDA_CPU_WHERE) {
    cuda_cpu::open_mailbox(box, bytes, where);
}
inline void cluster_arrive(CUDA_CPU_WHERE) {
    cuda_cpu::cluster_arrive(where);
}
inline void cluster_wait(CUDA_CPU_WHERE) {
    cuda_cpu::cluster_wait(where);
}
inline int cluster_rank() {
    return cuda_cpu::block_of(*cuda_cpu::worker, cuda_cpu::worker->current);
}
template <class T>
void send(T* p, int rank, T x, Mailbox* box, CUDA_CPU_WHERE) {
    static_assert(sizeof(T) == sizeof(float) || sizeof(T) == sizeof(float4));
    cuda_cpu::Worker& w = *cuda_cpu::worker;
    assert(rank >= 0 && rank < w.cluster);
    const ptrdiff_t away = (rank - cluster_rank()) * (ptrdiff_t)w.block_shared_bytes;
    T* there = reinterpret_cast<T*>(reinterpret_cast<char*>(p) + away);
    *there = x;
    cuda_cpu::deliver(reinterpret_cast<Mailbox*>(reinterpret_cast<char*>(box) + away), there, sizeof(T),
                      where);
}
inline void wait_for(Mailbox* box, CUDA_CPU_WHERE) {
    cuda_cpu::wait_for_mail(box, where);
}

#else

struct Mailbox {
    uint64_t barrier;
};

// In other code than HAS_PTX_81_OF_SM_90 (mma.cuh) these functions do nothing, and no kernel that calls them
// is launched: see Context::has_clusters.

// By one thread.
__device__ __forceinline__ void open_mailbox(Mailbox* box, int bytes) {
#ifdef HAS_PTX_81_OF_SM_90
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)),
                 "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By all threads of the block, as cluster_wait().
__device__ __forceinline__ void cluster_arrive() {
#ifdef HAS_PTX_81_OF_SM_90
    __syncwarp();  // the two instructions are for whole warps
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef HAS_PTX_81_OF_SM_90
    __syncwarp();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank = 0;
#ifdef HAS_PTX_81_OF_SM_90
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

// *p = x in block `rank` of the cluster, this one or another; its mailbox `box` counts it. p and box point
// into this block's dynamic shared memory, where that block has its own.
__device__ __forceinline__ void send(float* p, int rank, float x, Mailbox* box) {
#ifdef HAS_PTX_81_OF_SM_90
    asm volatile(
        "{ .reg .b32 there, box;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 box, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [box]; }"
        :
        : "r"(shared_address(p)), "r"(shared_address(box)), "r"(rank), "f"(x)
        : "memory");
#endif
}
__device__ __forceinline__ void send(float4* p, int rank, float4 x, Mailbox* box) {
#ifdef HAS_PTX_81_OF_SM_90
    asm volatile(
        "{ .reg .b32 there, box;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 box, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3,%4,%5,%6}, [box]; }"
        :
        : "r"(shared_address(p)), "r"(shared_address(box)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
#endif
}

// Returns when everything that the mailbox was opened for is there, and may be read by this thread.
__device__ __forceinline__ void wait_for(Mailbox* box) {
#ifdef HAS_PTX_81_OF_SM_90
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
            "selp.u32 %0, 1, 0, done; }"
            : "=r"(done)
            : "r"(shared_address(box))
            : "memory");
#endif
}

#endif

// Launches a kernel of clusters of `cluster` blocks, which may begin before the kernel in front has ended, as
// launch_early (overlap.cuh).
template <class... Params, class... Args>
void launch_clusters(const Context& ctx, void (*kernel)(Params...), int clusters, int cluster, int threads,
                     size_t shared, Args... args) {
    launch_with_attributes(ctx, kernel, clusters * cluster, cluster, threads, shared, args...);
}
