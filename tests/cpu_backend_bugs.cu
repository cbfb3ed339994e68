// Kernels with one mistake each, and the same without it, for test_cpu_backend_checks.sh:
//
//   cpu_backend_bugs NAME bug|correct
//
// runs one of them on 64 floats and prints the sum of what they are afterwards.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../llmc/cluster.cuh"

// ---------------------------------------------------------------- barriers and collectives

template <bool BUG>
__global__ void barrier_after_exit(float* out) {
    if (BUG && threadIdx.x >= 32) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}

template <bool BUG>
__global__ void exit_during_barrier(float* out) {
    if (!BUG || threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = 1;
}

template <bool BUG>
__global__ void two_barriers_meet(float* out) {
    if (threadIdx.x < 32) {
        out[threadIdx.x] = 1;
        if (BUG) __syncthreads();
    } else {
        out[threadIdx.x] = 2;
        if (BUG) __syncthreads();
    }
    if (!BUG) __syncthreads();
}

static __device__ void wait_for_all() {
    __syncthreads();
}
template <bool BUG>
__global__ void barrier_meets_shuffle(float* out) {
    float x = 1;
    if (!BUG || threadIdx.x >= 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
    wait_for_all();
    out[threadIdx.x] = x;
}

template <bool BUG>
__global__ void lanes_never_come(float* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(BUG ? 0xffffffffu : 0xffffu, 1.0f, 8);
}

template <bool BUG>
__global__ void lanes_have_exited(float* out) {
    if (threadIdx.x % 32 < 16) return;
    out[threadIdx.x] = __shfl_xor_sync(BUG ? 0xffffffffu : 0xffff0000u, 1.0f, 8);
}

template <bool BUG>
__global__ void mask_without_caller(float* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(BUG ? 0xfffeu : 0xffffu, 1.0f, 8);
}

template <bool BUG>
__global__ void two_collectives_meet(float* out) {
    float x = 1;
    if (BUG && threadIdx.x % 32 < 16)
        x = __shfl_xor_sync(0xffffffffu, x, 1);
    else
        x = __shfl_xor_sync(0xffffffffu, x, 2);
    out[threadIdx.x] = x;
}

template <bool BUG>
__global__ void misaligned_ldmatrix(float* out) {
    __shared__ __align__(16) uint16_t s[33 * 8];
    for (int i = threadIdx.x; i < 33 * 8; i += 64) s[i] = 0;
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, s + threadIdx.x % 32 * 8 + (BUG ? 2 : 0));
    out[threadIdx.x] = (float)r[0];
}

template <bool BUG>
__global__ void misaligned_copy(float* out) {
    __shared__ float4 s[65];
    cp_async_16(reinterpret_cast<float*>(s + threadIdx.x) + (BUG ? 1 : 0), out + threadIdx.x / 4 * 4);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x].x;
}

static __device__ int deep(volatile int* depth) {  // 256 bytes of stack a call
    volatile char frame[256];
    frame[0] = (char)*depth;
    *depth = *depth - 1;
    return *depth > 0 ? deep(depth) + frame[0] : 0;
}
template <bool BUG>
__global__ void stack_overrun(float* out) {
    volatile int depth = BUG ? 10000 : 50;
    __syncthreads();
    out[threadIdx.x] = deep(&depth) * 0.0f;
}

// ---------------------------------------------------------------- memory that nobody wrote

template <bool BUG>
__global__ void unwritten_static(float* out) {
    __shared__ float a[2][32], s[64];
    a[threadIdx.x / 32][threadIdx.x % 32] = 1;
    if (!BUG || threadIdx.x < 32) s[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x] + a[1][3];
}

template <bool BUG>
__global__ void unwritten_dynamic(float* out) {
    extern __shared__ float s[];
    if (!BUG || threadIdx.x < 32) s[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void add(float* out, const float* in) {
    out[threadIdx.x] += in[threadIdx.x];
}
template <bool BUG>
void unwritten_global(float* out) {
    float* in;
    cudaMalloc(&in, 256);
    cudaMemset(in, 0, BUG ? 252 : 256);
    add<<<1, 64>>>(out, in);
    cudaFree(in);
}

// Another block's values in static shared memory must not look like this block's.
template <bool BUG>
__global__ void left_by_another_block(float* out) {
    __shared__ float s;
    if (threadIdx.x == 0 && (!BUG || blockIdx.x == 0)) s = 1;
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = s;
}

template <bool BUG>
__global__ void missing_wait(float* out) {
    __shared__ float4 s[64];
    cp_async_16(s + threadIdx.x, out + threadIdx.x / 4 * 4);
    cp_async_commit();
    cp_async_wait<BUG ? 1 : 0>();
    __syncthreads();
    const float x = s[63 - threadIdx.x].x;
    __syncthreads();
    out[threadIdx.x] = x;
}

// ---------------------------------------------------------------- races

template <bool BUG>
__global__ void missing_barrier(float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = 7;
    __syncthreads();
    s[threadIdx.x] = (float)threadIdx.x;
    if (!BUG) __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x] * (float)threadIdx.x;
}

template <bool BUG>
__global__ void missing_second_barrier(float* out) {
    extern __shared__ float s[];
    for (int i = 0; i < 2; i++) {
        s[threadIdx.x] = (float)threadIdx.x + (float)i;
        __syncthreads();
        out[threadIdx.x] += s[63 - threadIdx.x];
        if (!BUG) __syncthreads();
    }
}

template <bool BUG>
__global__ void missing_syncwarp(float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = (float)threadIdx.x;
    if (BUG)
        __shfl_sync(0xffffffffu, 1, 0);  // the lanes meet, but it orders no memory
    else
        __syncwarp();
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}

template <bool BUG>
__global__ void missing_syncwarp_before_ldmatrix(float* out) {
    __shared__ __align__(16) uint16_t s[32][8];
    if (threadIdx.x < 32) {
        for (int i = 0; i < 8; i++) s[i * 4 + threadIdx.x / 8][threadIdx.x % 8] = (uint16_t)i;
        if (!BUG) __syncwarp();
        uint32_t r[4];
        ldmatrix_x4(r, s[threadIdx.x]);
        out[threadIdx.x] = (float)r[0];
    }
}

template <bool BUG>
__global__ void missing_barrier_after_wait(float* out) {
    __shared__ float4 s[64];
    cp_async_16(s + threadIdx.x, out + threadIdx.x / 4 * 4);
    cp_async_commit();
    cp_async_wait<0>();
    if (!BUG) __syncthreads();
    const float x = s[63 - threadIdx.x].x;
    __syncthreads();
    out[threadIdx.x] = x;
}

template <bool BUG>
__global__ void blocks_race(float* out) {
    if (threadIdx.x != 0) return;
    if (BUG)
        out[0] += 1;
    else
        atomicAdd(&out[0], 1.0f);
}

template <bool BUG>
__global__ void atomic_meets_plain(float* out) {
    atomicAdd(&out[0], 1.0f);
    if (!BUG) __syncthreads();
    if (threadIdx.x == 40) out[1] = out[0];
}

// ---------------------------------------------------------------- overruns

template <bool BUG>
__global__ void global_overrun(float* out) {
    out[threadIdx.x + (BUG ? 1 : 0)] = 1;
}

template <bool BUG>
__global__ void dynamic_overrun(float* out) {
    extern __shared__ float s[];
    s[threadIdx.x + (BUG ? 1 : 0)] = 1;
    __syncthreads();
    out[threadIdx.x] = s[1];
}

template <bool BUG>
__global__ void static_overrun(float* out) {
    __shared__ float s[64];
    s[threadIdx.x + (BUG ? 1 : 0)] = 1;
    __syncthreads();
    out[threadIdx.x] = s[1];
}

template <bool BUG>
__global__ void local_overrun(float* out) {
    float a[8];
    float* p = a;
    for (int i = 0; i < 8 + (BUG ? 1 : 0); i++) p[i] = (float)i;
    __syncthreads();
    out[threadIdx.x] = p[threadIdx.x % 8];
}

template <bool BUG>
__global__ void misaligned_load(float* out) {
    const float4 v = *reinterpret_cast<const float4*>(out + threadIdx.x / 4 * 4 % 60 + (BUG ? 1 : 0));
    __syncthreads();
    out[threadIdx.x] = v.x;
}

template <bool BUG>
void copy_overrun(float* out) {
    float host[65] = {};
    cudaMemcpy(out, host, BUG ? 260 : 256, cudaMemcpyHostToDevice);
}

template <bool BUG>
void use_after_free(float* out) {
    float* in;
    cudaMalloc(&in, 256);
    cudaMemset(in, 0, 256);
    if (BUG) cudaFree(in);
    add<<<1, 64>>>(out, in);
    if (!BUG) cudaFree(in);
}

// ---------------------------------------------------------------- main

// ---------------------------------------------------------------- clusters

struct PairMemory {
    Mailbox box;
    float mail[64];
};
static __device__ PairMemory& pair_memory() {
    extern __shared__ float4 pair_shared[];
    return *reinterpret_cast<PairMemory*>(pair_shared);
}
static __device__ void begin_pair(PairMemory& memory, bool opens = true, int bytes = 256) {
    if (opens && threadIdx.x == 0) open_mailbox(&memory.box, bytes);
    cluster_arrive();
    cluster_wait();
}

// Each block's threads write to the other's memory.
template <bool BUG>
__global__ void mail_not_waited_for(float* out) {
    PairMemory& memory = pair_memory();
    begin_pair(memory);
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    if (!BUG) wait_for(&memory.box);
    __syncthreads();
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[63 - threadIdx.x];
    if (BUG) wait_for(&memory.box);
}

// One thread waits for all of its block: a barrier must follow.
template <bool BUG>
__global__ void mail_of_another_thread(float* out) {
    PairMemory& memory = pair_memory();
    begin_pair(memory);
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    if (threadIdx.x == 0) wait_for(&memory.box);
    if (!BUG) __syncthreads();
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[threadIdx.x];
}

// Sends over what the other may still read.
template <bool BUG>
__global__ void mail_over_what_is_read(float* out) {
    PairMemory& memory = pair_memory();
    float* own = memory.mail + (BUG ? 0 : 64);
    own[threadIdx.x] = 1;
    __syncthreads();
    begin_pair(memory);
    const float x = own[63 - threadIdx.x];
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 2.0f, &memory.box);
    wait_for(&memory.box);
    if (cluster_rank() == 0) out[threadIdx.x] = x;
}

template <bool BUG>
__global__ void sends_before_all_have_begun(float* out) {
    PairMemory& memory = pair_memory();
    if (threadIdx.x == 0) open_mailbox(&memory.box, 256);
    cluster_arrive();
    if (!BUG) cluster_wait();
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    wait_for(&memory.box);
    if (BUG) cluster_wait();
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[threadIdx.x];
}

template <bool BUG>
__global__ void mailbox_not_opened(float* out) {
    PairMemory& memory = pair_memory();
    begin_pair(memory, !BUG);
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    wait_for(&memory.box);
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[threadIdx.x];
}

template <bool BUG>
__global__ void more_mail_than_expected(float* out) {
    PairMemory& memory = pair_memory();
    begin_pair(memory, true, BUG ? 252 : 256);
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    wait_for(&memory.box);
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[threadIdx.x];
}

template <bool BUG>
__global__ void less_mail_than_expected(float* out) {
    PairMemory& memory = pair_memory();
    begin_pair(memory, true, BUG ? 260 : 256);
    send(memory.mail + threadIdx.x, 1 - cluster_rank(), 1.0f, &memory.box);
    wait_for(&memory.box);
    if (cluster_rank() == 0) out[threadIdx.x] = memory.mail[threadIdx.x];
}

template <bool BUG>
__global__ void wait_without_arriving(float* out) {
    if (!BUG || threadIdx.x < 32) cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 0) out[threadIdx.x] = 1;
}

template <bool BUG>
__global__ void arrives_twice(float* out) {
    cluster_arrive();
    if (BUG) cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 0) out[threadIdx.x] = 1;
}

template <bool BUG>
__global__ void static_in_cluster(float* out) {
    if (BUG) {
        __shared__ float s[64];
        s[threadIdx.x] = 1;
        out[threadIdx.x] = s[threadIdx.x];
    } else {
        if (cluster_rank() == 0) out[threadIdx.x] = 1;
    }
}

template <bool BUG>
__global__ void cluster_barrier_without_cluster(float* out) {
    if (BUG) cluster_arrive();
    out[threadIdx.x] = 1;
}

// How a function below is called: as a kernel of so many blocks of 64 threads, of a pair of blocks in a
// cluster, or on the host.
enum { kPair = -1, kHost = 0 };

struct Case {
    const char* name;
    void (*bug)(float*);
    void (*correct)(float*);
    int blocks;
    size_t shared;  // bytes of a kernel's dynamic shared memory; a pair's blocks have a PairMemory each
};
#define CASE(name, blocks, shared) \
    { #name, name < true>, name < false>, blocks, shared }
static const Case cases[] = {
    CASE(barrier_after_exit, 1, 0),
    CASE(exit_during_barrier, 1, 0),
    CASE(two_barriers_meet, 1, 0),
    CASE(barrier_meets_shuffle, 1, 0),
    CASE(lanes_never_come, 1, 0),
    CASE(lanes_have_exited, 1, 0),
    CASE(mask_without_caller, 1, 0),
    CASE(two_collectives_meet, 1, 0),
    CASE(misaligned_ldmatrix, 1, 0),
    CASE(misaligned_copy, 1, 0),
    CASE(stack_overrun, 1, 0),
    CASE(unwritten_static, 1, 0),
    CASE(unwritten_dynamic, 1, 256),
    CASE(unwritten_global, kHost, 0),
    CASE(left_by_another_block, 64, 0),
    CASE(missing_wait, 1, 0),
    CASE(missing_barrier, 1, 0),
    CASE(missing_second_barrier, 1, 256),
    CASE(missing_syncwarp, 1, 0),
    CASE(missing_syncwarp_before_ldmatrix, 1, 0),
    CASE(missing_barrier_after_wait, 1, 0),
    CASE(blocks_race, 64, 0),
    CASE(atomic_meets_plain, 1, 0),
    CASE(mail_not_waited_for, kPair, 0),
    CASE(mail_of_another_thread, kPair, 0),
    CASE(mail_over_what_is_read, kPair, 0),
    CASE(sends_before_all_have_begun, kPair, 0),
    CASE(mailbox_not_opened, kPair, 0),
    CASE(more_mail_than_expected, kPair, 0),
    CASE(less_mail_than_expected, kPair, 0),
    CASE(wait_without_arriving, kPair, 0),
    CASE(arrives_twice, kPair, 0),
    CASE(static_in_cluster, kPair, 0),
    CASE(cluster_barrier_without_cluster, 1, 0),
    CASE(global_overrun, 1, 0),
    CASE(dynamic_overrun, 1, 256),
    CASE(static_overrun, 1, 0),
    CASE(local_overrun, 1, 0),
    CASE(misaligned_load, 1, 0),
    CASE(copy_overrun, kHost, 0),
    CASE(use_after_free, kHost, 0),
};

static void call(const Case& c, void (*function)(float*), float* out) {
    if (c.blocks == kHost)
        function(out);
    else if (c.blocks == kPair)
        launch_clusters(Context(), function, 1, 2, 64, 2 * sizeof(PairMemory), out);
    else
        (function)<<<c.blocks, 64, c.shared>>>(out);
}

int main(int argc, char** argv) {
    if (argc == 1)
        for (const Case& c : cases) puts(c.name);
    if (argc != 3) return argc == 1 ? 0 : 2;
    for (const Case& c : cases) {
        if (strcmp(c.name, argv[1])) continue;
        float *out, host[64], sum = 0;
        cudaMalloc(&out, sizeof host);
        cudaMemset(out, 0, sizeof host);
        call(c, strcmp(argv[2], "bug") ? c.correct : c.bug, out);
        if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
            fprintf(stderr, "%s\n", cudaGetErrorString(error));
            return 1;
        }
        cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
        for (float x : host) sum += x;
        printf("sum %g\n", sum);
        cudaFree(out);
        return 0;
    }
    return 2;
}
