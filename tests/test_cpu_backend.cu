// What CUDA code may expect of CUDA on the CPU: indices, barriers, warp collectives, shared memory, launches,
// bf16, fast maths, tensor-core wrappers, cuBLASLt, graphs and the runtime API. Most of it says what a GPU
// does too, and would pass there; what only the CPU backend has is inside #ifdef CUDA_CPU.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <thread>

#include "../llmc/cluster.cuh"
#include "check.h"
#ifdef CUDA_CPU
#include <sys/resource.h>
#endif

using bf16 = __nv_bfloat16;

// Runs a test under every order of threads that the backend has.
static void for_all_schedules(const std::function<void()>& test) {
#ifdef CUDA_CPU
    const cuda_cpu::Schedule before = cuda_cpu::schedule;
    for (auto schedule :
         {cuda_cpu::Schedule::forward, cuda_cpu::Schedule::backward, cuda_cpu::Schedule::random}) {
        cuda_cpu::schedule = schedule;
        CAPTURE((int)schedule);
        test();
    }
    cuda_cpu::schedule = before;
#else
    test();
#endif
}

#if defined(CUDA_CPU) && defined(__x86_64__)
// ---------------------------------------------------------------- denormals

__global__ void product_of_small_kernel(float* products, float x, float y) {
    products[blockIdx.x] = x * y;
}

TEST_CASE("what is below the smallest normal float is zero, in every thread and in matrix products") {
    const float smallest = 0x1p-126f, tiny = std::bit_cast<float>(5u);
    DeviceArray<float> products(1000);  // blocks, for all OS threads
    for (const auto& [x, y] : {std::pair{smallest, 0.5f}, std::pair{tiny, 0x1p100f}}) {
        product_of_small_kernel<<<1000, 1>>>(products, x, y);
        CHECK(cudaDeviceSynchronize() == cudaSuccess);
        for (const float product : products.get()) CHECK(product == 0.0f);
    }
    constexpr int n = 300;
    const std::vector<float> a(n * n, smallest), b(n * n, 0x1p-10f);
    std::vector<float> c(n * n, 1.0f);
    cblas_sgemm(kColumnMajor, kNoTranspose, kNoTranspose, n, n, n, 1.0f, a.data(), n, b.data(), n, 0.0f,
                c.data(), n);
    CHECK(std::count(c.begin(), c.end(), 0.0f) == n * n);
}
#endif

// ---------------------------------------------------------------- indices

struct Place {
    uint3 block, thread;
    dim3 block_dim, grid_dim;
};

static __device__ size_t linear(uint3 index, dim3 size) {
    return index.x + size.x * (index.y + (size_t)size.y * index.z);
}

__global__ void indices_kernel(Place* places, int* visits) {
    const size_t threads = blockDim.x * blockDim.y * blockDim.z;
    const size_t i = linear(blockIdx, gridDim) * threads + linear(threadIdx, blockDim);
    places[i] = {blockIdx, threadIdx, blockDim, gridDim};
    atomicAdd(&visits[i], 1);
}

TEST_CASE("every thread of every block runs once and knows its place") {
    for_all_schedules([] {
        for (auto [grid, block] : {std::pair{dim3(1), dim3(1)},
                                   {dim3(7), dim3(33)},
                                   {dim3(3, 4, 5), dim3(4, 3, 2)},
                                   {dim3(2, 1, 3), dim3(16, 16, 4)}}) {
            const size_t blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
            DeviceArray<Place> places(blocks * threads);
            DeviceArray<int> visits(std::vector<int>(blocks * threads, 0));
            indices_kernel<<<grid, block>>>(places, visits);
            REQUIRE(cudaGetLastError() == cudaSuccess);
            CHECK(visits.get() == std::vector<int>(blocks * threads, 1));
            const std::vector<Place> got = places.get();
            size_t wrong = 0;
            for (size_t i = 0; i < got.size(); i++) {
                const size_t t = i % threads, b = i / threads;
                const unsigned want[12] = {(unsigned)(b % grid.x),
                                           (unsigned)(b / grid.x % grid.y),
                                           (unsigned)(b / grid.x / grid.y),
                                           (unsigned)(t % block.x),
                                           (unsigned)(t / block.x % block.y),
                                           (unsigned)(t / block.x / block.y),
                                           block.x,
                                           block.y,
                                           block.z,
                                           grid.x,
                                           grid.y,
                                           grid.z};
                wrong += memcmp(want, &got[i], sizeof want) != 0;
            }
            CHECK(wrong == 0);
        }
    });
}

__global__ void unrolled_kernel(int* out) {
    int sum = 0;
#pragma unroll 4
    for (int i = 0; i < 8; i++) sum += i;
#pragma unroll
    for (int i = 0; i < 3; i++) sum += 10 * i;
#pragma unroll(2)
    for (int i = 0; i < 4; i++) sum += 100 * i;
    out[threadIdx.x] = sum;
}

TEST_CASE("#pragma unroll, with and without a number, leaves the code around it as it is") {
    DeviceArray<int> out(2);
    unrolled_kernel<<<1, 2>>>(out);
    CHECK(out.get() == std::vector<int>(2, 28 + 30 + 600));
}

TEST_CASE("vector types have CUDA's sizes and alignments") {
    CHECK((sizeof(float2) == 8 && alignof(float2) == 8));
    CHECK((sizeof(float4) == 16 && alignof(float4) == 16));
    CHECK((sizeof(uint4) == 16 && alignof(uint4) == 16));
    CHECK((sizeof(double2) == 16 && alignof(double2) == 16));
    CHECK((sizeof(ushort4) == 8 && alignof(ushort4) == 8));
    CHECK((sizeof(bf16) == 2 && alignof(bf16) == 2));
    CHECK((sizeof(__nv_bfloat162) == 4 && alignof(__nv_bfloat162) == 4));
    CHECK(make_float4(1, 2, 3, 4).w == 4.0f);
    CHECK(dim3(5).y == 1);
}

// ---------------------------------------------------------------- barriers

// Sums of neighbours, then of neighbours' sums, ...: every round needs its barriers.
__global__ void tree_sum_kernel(int* out, const int* in) {
    __shared__ int s[1024];
    const int t = threadIdx.x;
    s[t] = in[blockIdx.x * blockDim.x + t];
    for (int n = blockDim.x / 2; n > 0; n /= 2) {
        __syncthreads();
        const int sum = t < n ? s[2 * t] + s[2 * t + 1] : 0;
        __syncthreads();
        if (t < n) s[t] = sum;
    }
    if (t == 0) out[blockIdx.x] = s[0];
}

TEST_CASE("__syncthreads makes what all threads wrote visible to all") {
    for_all_schedules([] {
        for (int threads : {1, 2, 32, 64, 256, 1024}) {
            const int blocks = 50;
            const std::vector<int> in = random_ints((size_t)blocks * threads, 1000, 1);
            DeviceArray<int> d_in(in), out(blocks);
            tree_sum_kernel<<<blocks, threads>>>(out, d_in);
            const std::vector<int> got = out.get();
            for (int b = 0; b < blocks; b++)
                CHECK(got[b] == std::accumulate(&in[b * threads], &in[b * threads] + threads, 0));
        }
    });
}

__global__ void barrier_votes_kernel(int* out, int rounds) {
    const int t = threadIdx.x, n = blockDim.x;
    for (int r = 0; r < rounds; r++) {
        const int any = __syncthreads_or(t == r), none = __syncthreads_or(t > n);
        const int all = __syncthreads_and(t < n), not_all = __syncthreads_and(t != r);
        const int count = __syncthreads_count(t <= r);
        if (any == 0 || none != 0 || all == 0 || not_all != 0 || count != r + 1) atomicAdd(out, 1);
    }
}

TEST_CASE("__syncthreads_or, _and and _count give every thread the block's vote, round after round") {
    for_all_schedules([] {
        DeviceArray<int> wrong(std::vector<int>{0});
        barrier_votes_kernel<<<3, 70>>>(wrong, 50);
        CHECK(wrong.get()[0] == 0);
    });
}

__global__ void half_block_waits_kernel(int* out) {
    if (threadIdx.x >= 64) return;  // whole warps that never wait
    const int sum = __reduce_add_sync(0xffffffffu, 1);
    out[threadIdx.x] = sum;
}

TEST_CASE("a warp that exits does not stop the others") {
    for_all_schedules([] {
        DeviceArray<int> out(std::vector<int>(128, 0));
        half_block_waits_kernel<<<1, 128>>>(out);
        std::vector<int> want(128, 0);
        std::fill(want.begin(), want.begin() + 64, 32);
        CHECK(out.get() == want);
    });
}

// ---------------------------------------------------------------- warp collectives

template <class T>
__global__ void shuffles_kernel(T* out, const T* in, int width) {
    const int t = threadIdx.x, n = blockDim.x;
    const T x = in[t];
    out[t] = __shfl_sync(0xffffffffu, x, t * 7 + 3, width);
    out[n + t] = __shfl_xor_sync(0xffffffffu, x, 5, width);
    out[2 * n + t] = __shfl_up_sync(0xffffffffu, x, 3, width);
    out[3 * n + t] = __shfl_down_sync(0xffffffffu, x, 6, width);
}

TEST_CASE_TEMPLATE("shuffles", T, int, unsigned, float, double, bf16, long long, unsigned long long) {
    for_all_schedules([] {
        const int n = 96;
        std::vector<T> in(n);
        for (int i = 0; i < n; i++) in[i] = T((float)(i * 2 + 1));
        for (int width : {32, 16, 8}) {
            DeviceArray<T> d_in(in), out(4 * n);
            shuffles_kernel<<<1, n>>>((T*)out, (const T*)(T*)d_in, width);
            const std::vector<T> got = out.get();
            int wrong = 0;
            for (int t = 0; t < n; t++) {
                const int lane = t % 32, segment = lane / width * width, warp = t - lane;
                const int any = segment + (t * 7 + 3) % width;
                // Upwards of one's own segment a lane keeps its value; downwards it may look.
                const int other = (lane ^ 5) >= segment + width ? lane : lane ^ 5;
                const int up = lane - 3 < segment ? lane : lane - 3;
                const int down = lane + 6 >= segment + width ? lane : lane + 6;
                wrong += (float)got[t] != (float)in[warp + any];
                wrong += (float)got[n + t] != (float)in[warp + other];
                wrong += (float)got[2 * n + t] != (float)in[warp + up];
                wrong += (float)got[3 * n + t] != (float)in[warp + down];
            }
            CHECK(wrong == 0);
        }
    });
}

__global__ void shuffle_64_bits_kernel(unsigned long long* out) {
    const unsigned long long x = 0x0123456789abcdefull + ((unsigned long long)threadIdx.x << 56);
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x, 1);
}

TEST_CASE("a 64-bit shuffle carries all its bits") {
    DeviceArray<unsigned long long> out(32);
    shuffle_64_bits_kernel<<<1, 32>>>(out);
    const auto got = out.get();
    for (unsigned long long t = 0; t < 32; t++) CHECK(got[t] == 0x0123456789abcdefull + ((t ^ 1) << 56));
}

__global__ void votes_kernel(unsigned* out, unsigned pattern) {
    const int lane = threadIdx.x % 32;
    const int mine = pattern >> lane & 1;
    unsigned* o = out + threadIdx.x * 10;
    o[0] = __ballot_sync(0xffffffffu, mine);
    o[1] = __any_sync(0xffffffffu, mine);
    o[2] = __all_sync(0xffffffffu, mine);
    const unsigned value = lane * 2654435761u ^ pattern;
    o[3] = __reduce_add_sync(0xffffffffu, value);
    o[4] = __reduce_min_sync(0xffffffffu, value);
    o[5] = __reduce_max_sync(0xffffffffu, value);
    o[6] = (unsigned)__reduce_min_sync(0xffffffffu, (int)value);
    o[7] = (unsigned)__reduce_max_sync(0xffffffffu, (int)value);
    o[8] = __reduce_xor_sync(0xffffffffu, value);
    o[9] = __reduce_or_sync(0xffffffffu, value) ^ __reduce_and_sync(0xffffffffu, value | 1);
}

TEST_CASE("votes and reductions give every lane the warp's result") {
    for_all_schedules([] {
        for (unsigned pattern : {0u, 1u, 0x80000000u, 0x12345678u, 0xffffffffu}) {
            CAPTURE(pattern);
            DeviceArray<unsigned> out(64 * 10);
            votes_kernel<<<1, 64>>>(out, pattern);
            unsigned sum = 0, least = ~0u, most = 0, bits_xor = 0, bits_or = 0, bits_and = ~0u;
            int least_int = INT32_MAX, most_int = INT32_MIN;
            for (unsigned lane = 0; lane < 32; lane++) {
                const unsigned value = lane * 2654435761u ^ pattern;
                sum += value, bits_xor ^= value, bits_or |= value, bits_and &= value | 1;
                least = std::min(least, value), most = std::max(most, value);
                least_int = std::min(least_int, (int)value), most_int = std::max(most_int, (int)value);
            }
            const std::vector<unsigned> want = {
                pattern, pattern != 0,        pattern == ~0u,     sum,      least,
                most,    (unsigned)least_int, (unsigned)most_int, bits_xor, bits_or ^ bits_and};
            const std::vector<unsigned> got = out.get();
            for (int t = 0; t < 64; t++) CHECK(std::equal(want.begin(), want.end(), got.begin() + t * 10));
        }
    });
}

// The lower lanes sum with one mask while the upper lanes, on another path, find a maximum with another.
__global__ void divergent_kernel(int* out) {
    const int lane = threadIdx.x % 32;
    if (lane < 12) {
        int x = lane;
        for (int round = 0; round < 5; round++) x = __reduce_add_sync(0x00000fffu, x) % 1000 + lane;
        out[threadIdx.x] = x;
    } else {
        int x = lane * 37 % 32;
        for (int offset = 16; offset > 0; offset /= 2) {
            const int other = __shfl_sync(0xfffff000u, x, 12 + (lane - 12 + offset) % 20);
            x = x > other ? x : other;
            __syncwarp(0xfffff000u);
        }
        out[threadIdx.x] = x;
    }
    __syncwarp();
    const int sum = __reduce_add_sync(0xffffffffu, 1);
    if (sum != 32) out[threadIdx.x] = -1;
}

TEST_CASE("lanes on different paths meet under their own masks, then all meet again") {
    std::vector<int> low(12), want(32);
    std::iota(low.begin(), low.end(), 0);
    for (int round = 0; round < 5; round++) {
        const int sum = std::accumulate(low.begin(), low.end(), 0);
        for (int lane = 0; lane < 12; lane++) low[lane] = sum % 1000 + lane;
    }
    std::vector<int> high(20);
    for (int i = 0; i < 20; i++) high[i] = (i + 12) * 37 % 32;
    for (int offset = 16; offset > 0; offset /= 2) {
        const std::vector<int> before = high;
        for (int i = 0; i < 20; i++) high[i] = std::max(before[i], before[(i + offset) % 20]);
    }
    std::copy(low.begin(), low.end(), want.begin());
    std::copy(high.begin(), high.end(), want.begin() + 12);
    for_all_schedules([&] {
        DeviceArray<int> out(32);
        divergent_kernel<<<1, 32>>>(out);
        CHECK(out.get() == want);
    });
}

// __syncwarp orders memory within the warp.
__global__ void syncwarp_kernel(int* out) {
    __shared__ int s[64];
    for (int round = 0; round < 20; round++) {
        s[threadIdx.x] = (int)threadIdx.x + round;
        __syncwarp();
        out[threadIdx.x] += s[threadIdx.x ^ 31];
        __syncwarp();
    }
}

TEST_CASE("__syncwarp makes what a warp's lanes wrote visible to them") {
    for_all_schedules([] {
        DeviceArray<int> out(std::vector<int>(64, 0));
        syncwarp_kernel<<<1, 64>>>(out);
        const auto got = out.get();
        for (int t = 0; t < 64; t++) CHECK(got[t] == 20 * (t ^ 31) + 190);
    });
}

// ---------------------------------------------------------------- atomics

struct Counters {
    int i;
    unsigned u, inc, bits_or, bits_and;
    unsigned long long ull;
    float f;
    double d;
    int least, most, exchanged, cas;
};

__global__ void atomics_kernel(Counters* c) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&c->i, -1);
    atomicAdd(&c->u, 3u);
    atomicAdd(&c->ull, 1ull << 33);
    atomicAdd(&c->f, 1.0f);
    atomicAdd(&c->d, 0.5);
    atomicMin(&c->least, -i);
    atomicMax(&c->most, i);
    atomicInc(&c->inc, 9u);
    atomicOr(&c->bits_or, 1u << i % 32);
    atomicAnd(&c->bits_and, ~(1u << i % 16));
    atomicExch(&c->exchanged, i);
    int old = atomicAdd(&c->cas, 0), seen;
    while ((seen = atomicCAS(&c->cas, old, old + 2)) != old) old = seen;
}

TEST_CASE("atomics of all blocks and threads add up") {
    const int n = 40 * 64;
    DeviceArray<Counters> c(1);
    Counters zero = {};
    zero.bits_and = ~0u;
    c.set({zero});
    atomics_kernel<<<40, 64>>>(c);
    const Counters got = c.get()[0];
    CHECK(got.i == -n);
    CHECK(got.u == 3u * n);
    CHECK(got.ull == (unsigned long long)n << 33);
    CHECK(got.f == (float)n);
    CHECK(got.d == n / 2.0);
    CHECK(got.least == -(n - 1));
    CHECK(got.most == n - 1);
    CHECK(got.inc == n % 10);
    CHECK(got.bits_or == ~0u);
    CHECK(got.bits_and == 0xffff0000u);
    CHECK((got.exchanged >= 0 && got.exchanged < n));
    CHECK(got.cas == 2 * n);
}

// ---------------------------------------------------------------- shared memory

template <class T>
__global__ void dynamic_shared_kernel(float* out, int n) {
    extern __shared__ float4 packs[];
    __shared__ float fixed[2][33], one;
    float* s = reinterpret_cast<float*>(packs);
    for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = (float)(i + blockIdx.x);
    fixed[threadIdx.x % 2][threadIdx.x / 2] = (float)threadIdx.x;
    if (threadIdx.x == 0) one = (float)blockIdx.x;
    __syncthreads();
    float sum = one + fixed[1][3] + (float)(reinterpret_cast<size_t>(packs) % 16);
    for (int i = 0; i < n; i++) sum += s[i];
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void aligned_shared_kernel(int* out) {
    extern __shared__ __align__(16) unsigned char bytes[];
    bytes[threadIdx.x] = (unsigned char)(threadIdx.x * 3);
    __syncthreads();
    out[threadIdx.x] = bytes[blockDim.x - 1 - threadIdx.x];
}

TEST_CASE("static and dynamic shared memory belong to a block") {
    for_all_schedules([] {
        for (int n : {4, 1000, 12288}) {
            DeviceArray<float> out(300);
            dynamic_shared_kernel<int><<<300, 64, n * sizeof(float)>>>(out, n);
            REQUIRE(cudaGetLastError() == cudaSuccess);
            const auto got = out.get();
            for (int b = 0; b < 300; b += 37) {
                float want = (float)b + 7;
                for (int i = 0; i < n; i++) want += (float)(i + b);
                CHECK(got[b] == want);
            }
        }
        DeviceArray<int> out(64);
        aligned_shared_kernel<<<1, 64, 64>>>(out);
        const auto got = out.get();
        for (int t = 0; t < 64; t++) CHECK(got[t] == (63 - t) * 3);
    });
}

TEST_CASE("a grid may have very many blocks") {
    DeviceArray<int> visits(std::vector<int>(100000, 0));
    DeviceArray<Place> places(100000);
    indices_kernel<<<100000, 1>>>(places, visits);
    CHECK(visits.get() == std::vector<int>(100000, 1));
}

__constant__ float table[4];
__global__ void constant_kernel(float* out) {
    out[threadIdx.x] = table[threadIdx.x % 4];
}

TEST_CASE("constant memory is filled with cudaMemcpyToSymbol") {
    const float values[4] = {1, 2, 3, 4};
    REQUIRE(cudaMemcpyToSymbol(table, values, sizeof values) == cudaSuccess);
    REQUIRE(cudaMemcpyToSymbol(table, values, 4, 12) == cudaSuccess);
    DeviceArray<float> out(8);
    constant_kernel<<<1, 8>>>(out);
    CHECK(out.get() == std::vector<float>{1, 2, 3, 1, 1, 2, 3, 1});
}

// ---------------------------------------------------------------- clusters

// Each block tells all blocks of its cluster kRounds numbers, one a round, and sums up what it is told:
// out[block] = sum over rounds and blocks b of the cluster of (b + 1) (round + 1), b counted over the grid.
// Meanwhile block r of a cluster meets in r barriers of its own, so that no block waits for another's.
constexpr int kRounds = 3;
struct Told {
    Mailbox box[kRounds];
    float4 vectors[kRounds][8];
    float numbers[kRounds][8];
};
__global__ void tell_cluster_kernel(float* out, int cluster) {
    extern __shared__ float4 told_shared[];
    Told& told = *reinterpret_cast<Told*>(told_shared);
    const int rank = cluster_rank(), tid = threadIdx.x;
    if (tid == 0)
        for (Mailbox& box : told.box) open_mailbox(&box, cluster * (int)(sizeof(float4) + sizeof(float)));
    cluster_arrive();
    for (int i = 0; i < rank; i++) __syncthreads();
    float sum = 0;
    cluster_wait();
    for (int round = 0; round < kRounds; round++) {
        if (tid < cluster) {
            const float x = (float)((blockIdx.x + 1) * (round + 1));
            send(&told.vectors[round][rank], tid, make_float4(x, 0, 0, 1), &told.box[round]);
            send(&told.numbers[round][rank], tid, 2 * x, &told.box[round]);
        }
        for (int i = 0; i < rank; i++) __syncthreads();
        wait_for(&told.box[round]);
        for (int b = 0; b < cluster; b++)
            sum += told.vectors[round][b].x * told.vectors[round][b].w + told.numbers[round][b];
    }
    if (tid == 0) out[blockIdx.x] = sum;
}

TEST_CASE("the blocks of a cluster run together and write to each other's shared memory") {
    const Context ctx = make_context();
    if (!ctx.has_clusters) return;
    for_all_schedules([&] {
        for (const auto [clusters, cluster, threads] : {std::array{1, 2, 32}, {5, 8, 128}, {3, 4, 96}}) {
            DeviceArray<float> out(clusters * cluster);
            launch_clusters(ctx, tell_cluster_kernel, clusters, cluster, threads, sizeof(Told), (float*)out,
                            cluster);
            const std::vector<float> got = out.get();
            for (int b = 0; b < clusters * cluster; b++) {
                const int first = b / cluster * cluster;  // of its cluster
                float of_blocks = 0;
                for (int i = 0; i < cluster; i++) of_blocks += (float)(first + i + 1);
                CHECK(got[b] == 3 * of_blocks * kRounds * (kRounds + 1) / 2);
            }
        }
    });
}

#ifdef CUDA_CPU
TEST_CASE("clusters that cannot be launched") {
    const Context ctx = make_context();
    DeviceArray<float> out(8);
    cudaLaunchAttribute attribute = {cudaLaunchAttributeClusterDimension, {{4, 1, 1}, 0}};
    cudaLaunchConfig_t config;
    config.attrs = &attribute;
    config.numAttrs = 1;
    config.dynamicSmemBytes = 1024;
    const auto launch = [&](dim3 grid, dim3 block, uint3 cluster) {
        config.gridDim = grid;
        config.blockDim = block;
        attribute.val.clusterDim = cluster;
        const cudaError_t error =
            cudaLaunchKernelEx(&config, tell_cluster_kernel, (float*)out, (int)cluster.x);
        CHECK(cudaGetLastError() == error);
        return error;
    };
    CHECK(launch(8, 32, {4, 1, 1}) == cudaSuccess);
    CHECK(launch(6, 32, {4, 1, 1}) == cudaErrorInvalidConfiguration);   // no whole clusters
    CHECK(launch(8, 48, {4, 1, 1}) == cudaErrorInvalidConfiguration);   // no whole warps
    CHECK(launch(8, 512, {4, 1, 1}) == cudaErrorInvalidConfiguration);  // more than 1024 threads
    CHECK(launch(16, 32, {16, 1, 1}) == cudaErrorInvalidConfiguration);
    CHECK(launch(8, 32, {4, 2, 1}) == cudaErrorInvalidConfiguration);
}
#endif

// ---------------------------------------------------------------- ways to write a launch

namespace outer {
namespace inner {
template <class T, int N, int M>
__global__ void add_kernel(int* o) {
    if (threadIdx.x == 0) atomicAdd(o, N + M);
}
template <class T, int N>
struct Launcher {
    static void go(int* o) {
        add_kernel<T, N, 3><<<1, 1>>>(o);
        inner::add_kernel<T, N + 1, 1><<<1, 1>>>(o);
    }
};
}  // namespace inner
}  // namespace outer

template <bool B, class T = std::vector<std::vector<int>>>
__global__ void defaulted_kernel(int* o, T* = nullptr) {
    if (threadIdx.x == 0) atomicAdd(o, B ? 100 : 200);
}
__global__ void plain_kernel(int* o, int v) {
    if (threadIdx.x + blockIdx.x == 0) atomicAdd(o, v);
}
template <class T>
__global__ void deduced_kernel(T* o, float x, const char* s) {
    if (threadIdx.x == 0) atomicAdd(o, (int)x + (s[0] == ')'));
}
__global__ void every_block_kernel(int* o, int v) {
    if (threadIdx.x == 0) atomicAdd(o, v);
}
template <class T, int BLOCK>
void launch_in_template(T* o) {
    constexpr int block = BLOCK * 2;
    defaulted_kernel<(BLOCK > 3), T><<<dim3(1, 1), dim3(block)>>>(o);
}
#define LAUNCH_IN_MACRO(kernel, n, ...) kernel<<<1, n>>>(__VA_ARGS__)

static int calls = 0;
static int count_calls() {
    return ++calls;
}

// What one launch adds to a counter.
template <class F>
static int added(F launch) {
    DeviceArray<int> counter(std::vector<int>{0});
    launch((int*)counter);
    REQUIRE(cudaGetLastError() == cudaSuccess);
    return counter.get()[0];
}

TEST_CASE("launches can be written in every way that CUDA allows") {
    cudaStream_t st = nullptr;
    const int n = 5;
    using Kernel = void (*)(int*, int);
    CHECK(added([](int* o) { outer::inner::Launcher<int, 10>::go(o); }) == 25);
    CHECK(added([](int* o) { outer::inner::add_kernel<std::vector<int>, 10, 7><<<1, 32>>>(o); }) == 17);
    CHECK(added([&](int* o) {
              ::outer::inner::add_kernel<int, (2 > 1 ? 4 : 5), 1>
                  <<<(n >> 1), (n > 3 ? 32 : 64), sizeof(std::vector<std::vector<int>>), st>>>(o);
          }) == 10);
    CHECK(added([](int* o) { defaulted_kernel<true><<<1, 32>>>(o); }) == 100);
    CHECK(added([](int* o) {
              defaulted_kernel<(3 < 2), std::vector<std::vector<std::vector<int>>>><<<1, 32>>>(o, nullptr);
          }) == 200);
    // clang-format off
    CHECK(added([](int* o) {
        plain_kernel<<<
            dim3(2,
                 2),
            32
        >>>(
            o,  // a comment with <<< and >>>
            5);
    }) == 10);  // two of the four blocks have blockIdx.x == 0
    // clang-format on
    calls = 0;
    CHECK(added([](int* o) { every_block_kernel<<<4, 64>>>(o, count_calls()); }) == 4);
    CHECK(calls == 1);
    CHECK(added([](int* o) { deduced_kernel<<<1, 32>>>(o, 7.9f, ")"); }) == 8);
    CHECK(added([](int* o) { LAUNCH_IN_MACRO(plain_kernel, 32, o, 1000); }) == 1000);
    CHECK(added([](int* o) { launch_in_template<int, 4>(o), launch_in_template<int, 2>(o); }) == 300);
    Kernel pointer = n > 3 ? plain_kernel : every_block_kernel;
    CHECK(added([&](int* o) { pointer<<<1, 32>>>(o, 1); }) == 1);
    Kernel pointers[2] = {plain_kernel, every_block_kernel};
    CHECK(added([&](int* o) { (pointers[1])<<<2, 32>>>(o, 1); }) == 2);
    CHECK(added([&](int* o) {
              if (n)
                  plain_kernel<<<1, 1>>>(o, 1);
              else
                  plain_kernel<<<1, 1>>>(o, 5);
          }) == 1);
    CHECK(added([](int* o) {
              for (int i = 0; i < 3; i++) plain_kernel<<<1, 1>>>(o, i);
          }) == 3);
    const std::string text =
        std::string("not a launch <<<1, 2>>>(x) ") + R"(nor <<<this>>>, __shared__ int i;)" + '<';
    CHECK(text.size() == 61);
    CHECK(text.find("cuda") == std::string::npos);
    CHECK((n << 3 >> 1) == 20);
}

__global__ void first_thread_kernel(int* o) {
    const uint3 b = blockIdx, t = threadIdx;
    if (b.x + b.y + b.z + t.x + t.y + t.z == 0) atomicAdd(o, 1);
}

TEST_CASE("a launch that no GPU could run is an error and runs nothing") {
    auto launch = [](dim3 grid, dim3 block) {
        DeviceArray<int> o(std::vector<int>{0});
        first_thread_kernel<<<grid, block>>>(o);
        const cudaError_t error = cudaPeekAtLastError();
        CHECK(cudaGetLastError() == error);
        CHECK(cudaGetLastError() == cudaSuccess);  // reading it has cleared it
        CHECK(o.get()[0] == (error == cudaSuccess ? 1 : 0));
        return error;
    };
    CHECK(launch(dim3(1), dim3(1024)) == cudaSuccess);
    CHECK(launch(dim3(1, 65535), dim3(1, 1, 64)) == cudaSuccess);
    CHECK(launch(dim3(0), dim3(1)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1), dim3(0)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1), dim3(1025)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1), dim3(32, 33)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1), dim3(1, 1, 65)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1, 65536), dim3(1)) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1, 1, 65536), dim3(1)) == cudaErrorInvalidConfiguration);
}

template <int N>
__global__ void large_shared_kernel(int* o) {
    extern __shared__ int s[];
    s[threadIdx.x] = N;
    if (threadIdx.x == 0) o[0] = s[0];
}

template <int N>
static cudaError_t launch_large_shared(size_t bytes) {
    DeviceArray<int> o(std::vector<int>{-1});
    large_shared_kernel<N><<<1, 32, bytes>>>(o);
    const cudaError_t error = cudaGetLastError();
    CHECK(o.get()[0] == (error == cudaSuccess ? N : -1));
    return error;
}

TEST_CASE("a kernel gets more than 48 KB of dynamic shared memory only if it has asked for it") {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CHECK(launch_large_shared<1>(48 << 10) == cudaSuccess);
    CHECK(launch_large_shared<1>((48 << 10) + 16) == cudaErrorInvalidValue);
    REQUIRE(cudaFuncSetAttribute(large_shared_kernel<1>, attribute, 96 << 10) == cudaSuccess);
    CHECK(launch_large_shared<1>(96 << 10) == cudaSuccess);
    CHECK(launch_large_shared<1>((96 << 10) + 16) == cudaErrorInvalidValue);
    CHECK(launch_large_shared<2>(96 << 10) == cudaErrorInvalidValue);  // another kernel
    void (*pointer)(int*) = large_shared_kernel<2>;
    REQUIRE(cudaFuncSetAttribute(pointer, attribute, 64 << 10) == cudaSuccess);
    CHECK(launch_large_shared<2>(64 << 10) == cudaSuccess);
    CHECK(cudaFuncSetAttribute(pointer, attribute, 1 << 20) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, pointer) == cudaSuccess);
    CHECK(attributes.maxDynamicSharedSizeBytes == 64 << 10);
}

TEST_CASE("a graph's launch needs its shared memory again when it is replayed") {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    DeviceArray<int> o(std::vector<int>{-1});
    cudaStream_t stream;
    REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
    REQUIRE(cudaFuncSetAttribute(large_shared_kernel<3>, attribute, 96 << 10) == cudaSuccess);
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    large_shared_kernel<3><<<1, 32, 96 << 10, stream>>>(o);
    cudaGraph_t graph;
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    cudaGraphExec_t exec = nullptr;
    REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    REQUIRE(cudaFuncSetAttribute(large_shared_kernel<3>, attribute, 64 << 10) == cudaSuccess);
    cudaGraphLaunch(exec, stream);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(o.get()[0] == -1);
    REQUIRE(cudaFuncSetAttribute(large_shared_kernel<3>, attribute, 96 << 10) == cudaSuccess);
    REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(o.get()[0] == 3);
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess);
    CHECK(cudaGraphDestroy(graph) == cudaSuccess);
    CHECK(cudaStreamDestroy(stream) == cudaSuccess);
}

// ---------------------------------------------------------------- bf16

// The bf16 nearest to x, found among the candidates by exact arithmetic: a float less a bf16 near it is exact
// in double, and what lies beyond the largest bf16 rounds as if the exponents went on.
static uint16_t nearest_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    if (std::isinf(x)) return (uint16_t)(bits >> 16);
    auto value = [](uint32_t magnitude) {  // by whole numbers: denormals may count as zeros
        const uint32_t exponent = magnitude >> 23, digits = magnitude & 0x7fffff;
        return std::ldexp(exponent ? digits + 0x1p23 : digits, (int)std::max(exponent, 1u) - 150);
    };
    const uint32_t below = bits >> 16 & 0x7fff;
    const double magnitude = value(bits & 0x7fffffff);
    const double down = magnitude - value(below << 16), up = value((below + 1) << 16) - magnitude;
    const uint32_t nearest = down < up || (down == up && below % 2 == 0) ? below : below + 1;
    return (uint16_t)(nearest | (bits >> 31 << 15));
}

TEST_CASE("float to bf16 rounds to nearest even, bit for bit") {
    std::vector<uint32_t> inputs;
    std::mt19937 rng(1);
    for (int i = 0; i < 2000000; i++) inputs.push_back(rng());
    for (uint32_t upper = 0; upper < 65536; upper++)  // every bf16, its neighbours and the ties around it
        for (uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
            inputs.push_back(upper << 16 | lower);
    size_t wrong = 0;
    for (uint32_t bits : inputs) {
        float x;
        memcpy(&x, &bits, 4);
        wrong += __bfloat16_as_ushort(__float2bfloat16_rn(x)) != nearest_bf16(x);
    }
    CHECK(wrong == 0);
}

TEST_CASE("bf16 to float is exact, and there and back gives every bf16 again") {
    size_t wrong = 0;
    for (uint32_t upper = 0; upper < 65536; upper++) {
        const float x = __bfloat162float(__ushort_as_bfloat16((unsigned short)upper));
        uint32_t bits;
        memcpy(&bits, &x, 4);
        wrong += bits != upper << 16;
        const uint16_t back = __bfloat16_as_ushort(__float2bfloat16(x));
        wrong += back != (std::isnan(x) ? 0x7fff : upper);
    }
    CHECK(wrong == 0);
}

TEST_CASE("arithmetic on two bf16 rounds every result to bf16") {
    std::mt19937 rng(2);
    size_t wrong = 0;
    for (int i = 0; i < 100000; i++) {
        const bf16 a = __ushort_as_bfloat16((unsigned short)rng()),
                   b = __ushort_as_bfloat16((unsigned short)rng());
        const float fa = __bfloat162float(a), fb = __bfloat162float(b);
        wrong += __bfloat16_as_ushort(a + b) != nearest_bf16(fa + fb);
        wrong += __bfloat16_as_ushort(a - b) != nearest_bf16(fa - fb);
        wrong += __bfloat16_as_ushort(a * b) != nearest_bf16(fa * fb);
        wrong += __bfloat16_as_ushort(a / b) != nearest_bf16(fa / fb);
    }
    CHECK(wrong == 0);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, -2.5f);
    CHECK(__low2float(pair) == 1.0f);
    CHECK(__high2float(pair) == -2.5f);
    CHECK(__bfloat1622float2(__halves2bfloat162(pair.y, pair.x)).x == -2.5f);
}

// ---------------------------------------------------------------- maths

__global__ void expf_kernel(float* out, const float* in, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = __expf(in[i]);
}
static std::vector<float> fast_exp(const std::vector<float>& x) {
    DeviceArray<float> in(x), out(x.size());
    expf_kernel<<<1, 1>>>(out, in, (int)x.size());
    return out.get();
}

TEST_CASE("__expf at the ends of its range") {
    const float inf = INFINITY, nan = NAN;
    const std::vector<float> got =
        fast_exp({0.0f, -0.0f, inf, -inf, nan, -nan, 89.0f, 1e30f, -104.0f, -1e30f, 1e-40f});
    CHECK(got[0] == 1.0f);
    CHECK(got[1] == 1.0f);
    CHECK(got[2] == inf);
    CHECK((got[3] == 0.0f && !std::signbit(got[3])));
    CHECK(std::isnan(got[4]));
    CHECK(std::isnan(got[5]));
    CHECK(got[6] == inf);
    CHECK(got[7] == inf);
    CHECK(got[8] == 0.0f);
    CHECK(got[9] == 0.0f);
    CHECK(got[10] == 1.0f);
}

#ifdef CUDA_CPU  // a GPU's is a faster approximation
TEST_CASE(
    "__expf is within 1.02 units in the last place everywhere; denormals are zeros where they count as such") {
    std::vector<float> x;
    for (uint32_t magnitude = 0x30000000; magnitude < 0x42d20000; magnitude += 307)  // 4.7e-10 to 105
        for (uint32_t sign : {0u, 0x80000000u}) x.push_back(__uint_as_float(magnitude | sign));
    const std::vector<float> got = fast_exp(x);
    double worst = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const double want = std::exp((double)x[i]);
        if (std::isinf((float)want)) {
            worst = got[i] == INFINITY ? worst : INFINITY;
            continue;
        }
#ifdef __x86_64__
        if (want < 0x1p-126 && got[i] == 0.0f) continue;
#endif
        const double unit = std::max(std::ldexp(1.0, std::ilogb(want) - 23), std::ldexp(1.0, -149));
        worst = std::max(worst, std::fabs(got[i] - want) / unit);
    }
    MESSAGE("largest error: " << worst << " units in the last place");
    CHECK(worst <= 1.02);
}
#endif

TEST_CASE("small functions") {
    CHECK(fmaxf(1.0f, 2.0f) == 2.0f);
    CHECK(fmaxf(NAN, 2.0f) == 2.0f);
    CHECK(fmaxf(2.0f, NAN) == 2.0f);
    CHECK(fminf(NAN, 2.0f) == 2.0f);
    CHECK(fminf(2.0f, -INFINITY) == -INFINITY);
#ifdef CUDA_CPU  // device functions, called here on the host
    CHECK(max(3, 5u) == 5u);
    CHECK(min(1, 2.5f) == 1.0f);
    CHECK(max(NAN, 1.0f) == 1.0f);
    CHECK(__float_as_uint(1.0f) == 0x3f800000u);
    CHECK(__int_as_float(0x40000000) == 2.0f);
    CHECK(__popc(0xf0f0u) == 8);
    CHECK(__clz(0) == 32);
    CHECK(__clz(1) == 31);
    CHECK(__ffs(0) == 0);
    CHECK(__ffs(8) == 4);
    CHECK(__brev(1u) == 0x80000000u);
    CHECK(__brev(0x12345678u) == 0x1e6a2c48u);
    CHECK(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu);
    CHECK(rsqrtf(4.0f) == 0.5f);
#endif
}

// ---------------------------------------------------------------- tensor-core wrappers

#ifdef CUDA_CPU
// One 16x8 tile of A(16xK) B(Kx8) a warp, A row-major, B stored as its columns; both through ldmatrix.
__global__ void mma_kernel(float* out, const bf16* a, const bf16* b, int K) {
    __shared__ __align__(16) bf16 as[16 * 16], bs[8 * 16], bt[16 * 8];
    const int lane = threadIdx.x;
    float acc[4] = {}, acc_trans[4] = {};
    for (int k0 = 0; k0 < K; k0 += 16) {
        cp_async_16(&as[lane / 2 * 16 + lane % 2 * 8], a + lane / 2 * K + k0 + lane % 2 * 8);
        if (lane < 16) cp_async_16(&bs[lane / 2 * 16 + lane % 2 * 8], b + lane / 2 * K + k0 + lane % 2 * 8);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        for (int i = lane; i < 128; i += 32) bt[i % 16 * 8 + i / 16] = bs[i];  // as rows of B
        __syncwarp();
        uint32_t fa[4], fb[4], ft[4];
        ldmatrix_x4(fa, &as[lane % 16 * 16 + lane / 16 * 8]);
        ldmatrix_x4(fb, &bs[lane % 8 * 16 + lane / 8 % 2 * 8]);
        ldmatrix_x4_trans(ft, &bt[lane % 16 * 8]);
        const uint32_t b2[2] = {fb[0], fb[1]}, t2[2] = {ft[0], ft[1]};
        mma_m16n8k16_bf16(acc, fa, b2);
        mma_m16n8k16_bf16(acc_trans, fa, t2);
        __syncwarp();
    }
    for (int i = 0; i < 4; i++) {  // c0 c1 in row lane / 4, c2 c3 eight rows below
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        out[row * 8 + col] = acc[i];
        out[128 + row * 8 + col] = acc_trans[i];
    }
}

TEST_CASE("mma with fragments from ldmatrix is a matrix product") {
    for_all_schedules([] {
        for (int K : {16, 64}) {
            std::vector<bf16> a(16 * K), b(8 * K);  // small integers: every sum is exact
            const auto ia = random_ints(a.size(), 33, 1), ib = random_ints(b.size(), 33, 2);
            for (size_t i = 0; i < a.size(); i++) a[i] = (float)(ia[i] - 16);
            for (size_t i = 0; i < b.size(); i++) b[i] = (float)(ib[i] - 16);
            DeviceArray<bf16> d_a(a), d_b(b);
            DeviceArray<float> out(256);
            mma_kernel<<<1, 32>>>(out, d_a, d_b, K);
            std::vector<float> want(256, 0.0f);
            for (int r = 0; r < 16; r++)
                for (int c = 0; c < 8; c++)
                    for (int k = 0; k < K; k++)
                        want[r * 8 + c] += (float)((ia[r * K + k] - 16) * (ib[c * K + k] - 16));
            std::copy(want.begin(), want.begin() + 128, want.begin() + 128);
            CHECK(out.get() == want);
        }
    });
}

// The manual: lane l receives elements (l / 4, l % 4 * 2) and the next of each 8x8 matrix; transposed, those
// of the transposed matrix. Lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
__global__ void ldmatrix_kernel(uint32_t* out) {
    __shared__ __align__(16) uint16_t s[4][8][8];
    for (int i = threadIdx.x; i < 256; i += 32) s[i / 64][i / 8 % 8][i % 8] = (uint16_t)(i * 3);
    __syncwarp();
    uint32_t r[4], t[4];
    ldmatrix_x4(r, s[threadIdx.x / 8][threadIdx.x % 8]);
    ldmatrix_x4_trans(t, s[threadIdx.x / 8][threadIdx.x % 8]);
    for (int i = 0; i < 4; i++) {
        out[threadIdx.x * 8 + i] = r[i];
        out[threadIdx.x * 8 + 4 + i] = t[i];
    }
}

TEST_CASE("ldmatrix deals out four matrices, plain and transposed") {
    for_all_schedules([] {
        DeviceArray<uint32_t> out(256);
        ldmatrix_kernel<<<1, 32>>>(out);
        const auto got = out.get();
        for (uint32_t l = 0; l < 32; l++)
            for (uint32_t m = 0; m < 4; m++) {
                auto at = [m](uint32_t row, uint32_t col) { return (m * 64 + row * 8 + col) * 3; };
                CHECK(got[l * 8 + m] == (at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16));
                CHECK(got[l * 8 + 4 + m] == (at(l % 4 * 2, l / 4) | at(l % 4 * 2 + 1, l / 4) << 16));
            }
    });
}

// A ring of three buffers, two copies under way.
__global__ void pipeline_kernel(float* out, const float4* in, int steps) {
    __shared__ float4 ring[3][32];
    const int t = threadIdx.x;
    for (int i = 0; i < 2; i++) {
        if (i < steps) cp_async_16(&ring[i][t], in + i * 32 + t);
        cp_async_commit();
    }
    float sum = 0;
    for (int i = 0; i < steps; i++) {
        cp_async_wait<1>();
        __syncthreads();
        if (i + 2 < steps) cp_async_16(&ring[(i + 2) % 3][t], in + (i + 2) * 32 + t);
        cp_async_commit();
        const float4 v = ring[i % 3][31 - t];
        sum += v.x + 2 * v.y + 3 * v.z + 4 * v.w;
    }
    out[t] = sum;
}

TEST_CASE("cp.async copies are there after the wait that covers them") {
    for_all_schedules([] {
        const int steps = 7;
        std::vector<float4> in(steps * 32);
        for (size_t i = 0; i < in.size(); i++) in[i] = make_float4((float)i, 1, 2, 3);
        DeviceArray<float4> d_in(in);
        DeviceArray<float> out(32);
        pipeline_kernel<<<1, 32>>>(out, d_in, steps);
        const auto got = out.get();
        for (int t = 0; t < 32; t++) {
            float want = 0;
            for (int i = 0; i < steps; i++) want += (float)(i * 32 + 31 - t) + 20;
            CHECK(got[t] == want);
        }
    });
}
#endif

// ---------------------------------------------------------------- cuBLASLt

// C = alpha op(A) op(B) + beta C on small integers, so that every result is exact in float, whatever the
// order.
struct Gemm {
    int m, n, k, lda, ldb, ldc;
    bool ta, tb;
    float alpha, beta;
    std::vector<int> a, b, c;

    Gemm(int m_, int n_, int k_, bool ta_, bool tb_, float alpha_, float beta_, uint64_t seed)
        : m(m_),
          n(n_),
          k(k_),
          lda((ta_ ? k_ : m_) + 3),
          ldb((tb_ ? n_ : k_) + 1),
          ldc(m_ + 2),
          ta(ta_),
          tb(tb_),
          alpha(alpha_),
          beta(beta_) {
        a = random_ints((size_t)lda * (ta ? m : k), 9, seed);
        b = random_ints((size_t)ldb * (tb ? k : n), 9, seed + 1);
        c = random_ints((size_t)ldc * n, 9, seed + 2);
    }

    // With beta = 0, C may hold anything: give NaN.
    template <class T>
    std::vector<T> start() const {
        std::vector<T> values;
        for (int x : c) values.push_back(T(beta == 0 ? NAN : (float)x));
        return values;
    }
    template <class T>
    static std::vector<T> as(const std::vector<int>& v) {
        std::vector<T> values;
        for (int x : v) values.push_back(T((float)x));
        return values;
    }

    // How many elements of C are wrong; the padding below each column must not change.
    template <class T>
    int wrong(const T* got) const {
        const std::vector<T> before = start<T>();
        int wrong = 0;
        for (int j = 0; j < n; j++)
            for (int i = 0; i < ldc; i++) {
                const size_t at = (size_t)j * ldc + i;
                if (i >= m) {
                    wrong += memcmp(&got[at], &before[at], sizeof(T)) != 0;
                    continue;
                }
                double sum = 0;
                for (int l = 0; l < k; l++)
                    sum += (double)a[ta ? i * lda + l : l * lda + i] * b[tb ? l * ldb + j : j * ldb + l];
                const double want = alpha * sum + (beta == 0 ? 0 : beta * c[at]);
                wrong += (float)got[at] != (float)T((float)want);
            }
        return wrong;
    }
};

static cublasOperation_t op(bool transposed) {
    return transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
}

template <class T>
constexpr cudaDataType_t data_type = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;

// A product through cuBLASLt: the descriptors, the first algorithm that is offered, and the call.
struct LtMatmul {
    cublasLtHandle_t handle;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, d;

    LtMatmul(const Gemm& g, cudaDataType_t in, cudaDataType_t out,
             cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT) {
        REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatrixLayoutInit(&a, in, g.ta ? g.k : g.m, g.ta ? g.m : g.k, g.lda) ==
                CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatrixLayoutInit(&b, in, g.tb ? g.n : g.k, g.tb ? g.k : g.n, g.ldb) ==
                CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatrixLayoutInit(&d, out, g.m, g.n, g.ldc) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatmulDescInit(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
        set(CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)op(g.ta));
        set(CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)op(g.tb));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)epilogue);
    }
    LtMatmul(const LtMatmul&) = delete;
    ~LtMatmul() { cublasLtDestroy(handle); }

    template <class T>
    void set(cublasLtMatmulDescAttributes_t attribute, T value) {
        REQUIRE(cublasLtMatmulDescSetAttribute(&desc, attribute, &value, sizeof value) ==
                CUBLAS_STATUS_SUCCESS);
    }
    // Offers an algorithm?
    cublasStatus_t offer(cublasLtMatmulAlgo_t* algorithm) {
        cublasLtMatmulPreferenceOpaque_t preference;
        REQUIRE(cublasLtMatmulPreferenceInit(&preference) == CUBLAS_STATUS_SUCCESS);
        const uint32_t alignment = 4;
        for (auto matrix :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            REQUIRE(cublasLtMatmulPreferenceSetAttribute(&preference, matrix, &alignment, sizeof alignment) ==
                    CUBLAS_STATUS_SUCCESS);
        cublasLtMatmulHeuristicResult_t result;
        int count = 0;
        const cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(handle, &desc, &a, &b, &d, &d, &preference, 1, &result, &count);
        CHECK(count == (status == CUBLAS_STATUS_SUCCESS));
        if (count == 1) *algorithm = result.algo;
        return status;
    }
    cublasStatus_t run(float alpha, const void* a_data, const void* b_data, float beta, void* d_data,
                       cudaStream_t stream = nullptr) {
        cublasLtMatmulAlgo_t algorithm{};
        const cublasStatus_t status = offer(&algorithm);
        if (status != CUBLAS_STATUS_SUCCESS) return status;
        return cublasLtMatmul(handle, &desc, &alpha, a_data, &a, b_data, &b, &beta, d_data, &d, d_data, &d,
                              &algorithm, nullptr, 0, stream);
    }
};

template <class A, class C>
struct GemmTypes {
    using Operand = A;
    using Result = C;
};
using FloatGemm = GemmTypes<float, float>;
using Bf16Gemm = GemmTypes<bf16, bf16>;
using MixedGemm = GemmTypes<bf16, float>;
TYPE_TO_STRING(FloatGemm);
TYPE_TO_STRING(Bf16Gemm);
TYPE_TO_STRING(MixedGemm);

TEST_CASE_TEMPLATE("cublasLtMatmul equals plain loops", Types, FloatGemm, Bf16Gemm, MixedGemm) {
    using A = typename Types::Operand;
    using C = typename Types::Result;
    for (bool ta : {false, true})
        for (bool tb : {false, true})
            for (auto [alpha, beta] : {std::pair{1.0f, 0.0f}, {1.0f, 1.0f}, {0.5f, -2.0f}}) {
                const Gemm g(13, 7, 21, ta, tb, alpha, beta, 5);
                DeviceArray<A> a(Gemm::as<A>(g.a)), b(Gemm::as<A>(g.b));
                DeviceArray<C> c(g.start<C>());
                LtMatmul matmul(g, data_type<A>, data_type<C>);
                REQUIRE(matmul.run(alpha, (A*)a, (A*)b, beta, (C*)c) == CUBLAS_STATUS_SUCCESS);
                CHECK(g.wrong(c.get().data()) == 0);
            }
}

TEST_CASE("a bf16 product large enough to convert in parallel") {
    const Gemm g(420, 260, 300, true, false, 1.0f, 1.0f, 40);
    DeviceArray<bf16> a(Gemm::as<bf16>(g.a)), b(Gemm::as<bf16>(g.b)), c(g.start<bf16>());
    LtMatmul matmul(g, CUDA_R_16BF, CUDA_R_16BF);
    REQUIRE(matmul.run(1, (bf16*)a, (bf16*)b, 1, (bf16*)c) == CUBLAS_STATUS_SUCCESS);
    CHECK(g.wrong(c.get().data()) == 0);
}

#ifdef CUDA_CPU
// Epilogues on matrices with gaps, which a linear layer does not have; test_matmul.cu has the rest.
TEST_CASE_TEMPLATE("cublasLtMatmul's epilogues leave the gaps between columns alone", T, float, bf16) {
    const Gemm g(13, 7, 21, false, true, 1.0f, 0.0f, 5);
    const int aux_ld = 24;
    for (auto epilogue : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                          CUBLASLT_EPILOGUE_DGELU}) {
        CAPTURE((int)epilogue);
        const auto bias = normal_values<T>(g.m, 1), aux_before = normal_values<T>(aux_ld * g.n, 2);
        auto small = [](const std::vector<int>& v) {  // results where GELU is neither 0 nor straight
            std::vector<T> values;
            for (int x : v) values.push_back(T((float)(x - 4) / 16));
            return values;
        };
        const auto a = small(g.a), b = small(g.b);
        DeviceArray<T> d_a(a), d_b(b), d_bias(bias), aux(aux_before), d(g.start<T>());
        LtMatmul matmul(g, data_type<T>, data_type<T>, epilogue);
        matmul.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (T*)d_bias);
        matmul.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (T*)aux);
        matmul.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)aux_ld);
        REQUIRE(matmul.run(1, (T*)d_a, (T*)d_b, 0, (T*)d) == CUBLAS_STATUS_SUCCESS);
        const auto got = d.get(), got_aux = aux.get();
        const double unit = sizeof(T) == 2 ? 1.0 / 128 : 1e-5;
        for (int j = 0; j < g.n; j++) {
            for (int i = 0; i < g.m; i++) {
                double x = 0;
                for (int l = 0; l < g.k; l++)
                    x += (double)(float)a[l * g.lda + i] * (double)(float)b[l * g.ldb + j];
                const auto sigmoid = [](double v) {
                    return 1 / (1 + std::exp(-2 * 0.7978845608 * v * (1 + 0.044715 * v * v)));
                };
                if (epilogue & CUBLASLT_EPILOGUE_BIAS) x += (double)(float)bias[i];
                double want = x;
                if (epilogue & CUBLASLT_EPILOGUE_GELU) {
                    CHECK(std::fabs((float)got_aux[j * aux_ld + i] - x) < unit * (1 + std::fabs(x)));
                    want = x * sigmoid(x);
                } else if (epilogue == CUBLASLT_EPILOGUE_DGELU) {
                    const double v = (float)aux_before[j * aux_ld + i], e = 1e-5;
                    want *= ((v + e) * sigmoid(v + e) - (v - e) * sigmoid(v - e)) / (2 * e);
                }
                CHECK(std::fabs((float)got[j * g.ldc + i] - want) < unit * (1 + std::fabs(want)));
            }
            for (int i = g.m; i < g.ldc; i++) CHECK(std::isnan((float)got[j * g.ldc + i]));
            for (int i = g.m; i < aux_ld; i++)
                CHECK((float)got_aux[j * aux_ld + i] == (float)aux_before[j * aux_ld + i]);
        }
    }
}

TEST_CASE("a bias gradient is the sum over B, whatever is added to D") {
    const Gemm g(13, 70, 150, false, true, 1.0f, 1.0f, 5);
    DeviceArray<bf16> a(Gemm::as<bf16>(g.a)), b(Gemm::as<bf16>(g.b));
    DeviceArray<float> c(g.start<float>()), gradient(g.n);
    LtMatmul matmul(g, CUDA_R_16BF, CUDA_R_32F, CUBLASLT_EPILOGUE_BGRADB);
    matmul.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (float*)gradient);
    REQUIRE(matmul.run(1, (bf16*)a, (bf16*)b, 1, (float*)c) == CUBLAS_STATUS_SUCCESS);
    CHECK(g.wrong(c.get().data()) == 0);
    const auto got = gradient.get();
    for (int j = 0; j < g.n; j++) {
        int want = 0;
        for (int l = 0; l < g.k; l++) want += g.b[(size_t)l * g.ldb + j];
        CHECK(got[j] == (float)want);
    }
}
#endif

TEST_CASE("cuBLASLt refuses what makes no sense") {
    const Gemm g(8, 8, 8, false, false, 1.0f, 0.0f, 1);
    DeviceArray<float> x(std::vector<float>(256, 1.0f)), y(std::vector<float>(256, 1.0f));
    const auto refusal = [&](auto damage, cudaDataType_t in = CUDA_R_32F, cudaDataType_t out = CUDA_R_32F) {
        LtMatmul matmul(g, in, out);
        damage(matmul);
        return matmul.run(1, (float*)x, (float*)x, 0, (float*)y);
    };
    CHECK(refusal([](LtMatmul&) {}) == CUBLAS_STATUS_SUCCESS);
    y.set(std::vector<float>(256, 1.0f));
    CHECK(refusal([](LtMatmul&) {}, CUDA_R_32F, CUDA_R_16BF) != CUBLAS_STATUS_SUCCESS);
    CHECK(refusal([](LtMatmul& m) {
              REQUIRE(cublasLtMatrixLayoutInit(&m.a, CUDA_R_32F, 9, 8, 11) == CUBLAS_STATUS_SUCCESS);
          }) != CUBLAS_STATUS_SUCCESS);
    CHECK(refusal([](LtMatmul& m) { m.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{1 << 30}); }) !=
          CUBLAS_STATUS_SUCCESS);
    LtMatmul matmul(g, CUDA_R_32F, CUDA_R_32F);
    const int64_t wide = CUBLAS_OP_T;
    CHECK(cublasLtMatmulDescSetAttribute(&matmul.desc, CUBLASLT_MATMUL_DESC_TRANSA, &wide, sizeof wide) ==
          CUBLAS_STATUS_INVALID_VALUE);
#ifdef CUDA_CPU
    const auto with_ld = [](auto layout) { return [=](LtMatmul& m) { layout(m)->ld = 7; }; };
    CHECK(refusal(with_ld([](LtMatmul& m) { return &m.a; })) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(refusal(with_ld([](LtMatmul& m) { return &m.b; })) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(refusal(with_ld([](LtMatmul& m) { return &m.d; })) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(refusal([](LtMatmul& m) { m.d.rows = m.a.rows = 0; }) == CUBLAS_STATUS_INVALID_VALUE);
    for (auto epilogue : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_DGELU})
        CHECK(refusal([&](LtMatmul& m) {  // no pointer for it
                  m.set(CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)epilogue);
                  m.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{8});
              }) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(refusal([](LtMatmul& m) {  // only of a transposed B
              m.set(CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)CUBLASLT_EPILOGUE_BGRADB);
          }) == CUBLAS_STATUS_NOT_SUPPORTED);
#endif
    CHECK(y.get() == std::vector<float>(256, 1.0f));
    CHECK(std::string(cublasLtGetStatusName(CUBLAS_STATUS_INVALID_VALUE)) == "CUBLAS_STATUS_INVALID_VALUE");
}

#ifdef CUDA_CPU
TEST_CASE("OpenBLAS's kernels are others than its own choice only where those would leave AVX2 unused") {
    for (const char* core : {"Prescott", "Barcelona", "Core2", "Nehalem", "Sandybridge"}) {
        CHECK(better_openblas_core(core, true, true) == "SkylakeX");
        CHECK(better_openblas_core(core, true, false) == "Haswell");
        CHECK(better_openblas_core(core, false, false) == "");
    }
    for (const char* core : {"Haswell", "Zen", "SkylakeX", "SapphireRapids", "of a later version"})
        CHECK(better_openblas_core(core, true, true) == "");
}
#endif

// ---------------------------------------------------------------- the runtime API

TEST_CASE("memory is allocated, copied, set and freed") {
    float* p = nullptr;
    REQUIRE(cudaMalloc(&p, 1000 * sizeof(float)) == cudaSuccess);
    CHECK(reinterpret_cast<size_t>(p) % 256 == 0);
    std::vector<float> in(1000), out(1000);
    std::iota(in.begin(), in.end(), 0.0f);
    cudaStream_t stream = nullptr;
    REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
    CHECK(cudaMemcpyAsync(p, in.data(), 4000, cudaMemcpyHostToDevice, stream) == cudaSuccess);
    CHECK(cudaMemsetAsync(p, 0, 40, stream) == cudaSuccess);
    CHECK(cudaMemcpyAsync(out.data(), p, 4000, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    std::fill(in.begin(), in.begin() + 10, 0.0f);
    CHECK(in == out);
    CHECK(cudaStreamDestroy(stream) == cudaSuccess);
    CHECK(cudaFree(p) == cudaSuccess);
    CHECK(cudaFree(nullptr) == cudaSuccess);
    REQUIRE(cudaMalloc(&p, 0) == cudaSuccess);
    CHECK(p == nullptr);

    for (auto allocate : {+[](float** q) { return cudaMallocHost(q, 4000); },
                          +[](float** q) { return cudaHostAlloc(q, 4000, cudaHostAllocDefault); }}) {
        REQUIRE(allocate(&p) == cudaSuccess);
        std::fill(p, p + 1000, 1.0f);
        CHECK(cudaFreeHost(p) == cudaSuccess);
    }
}

TEST_CASE("a request for more memory than there is fails cleanly") {
    size_t available, total;
    REQUIRE(cudaMemGetInfo(&available, &total) == cudaSuccess);
    CHECK((available > 0 && available <= total));
    char* p = reinterpret_cast<char*>(1);
    CHECK(cudaMalloc(&p, total + (1 << 20)) == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(cudaMalloc(&p, SIZE_MAX / 2) == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(std::string(cudaGetErrorName(cudaErrorMemoryAllocation)) == "cudaErrorMemoryAllocation");
    CHECK(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
}

#if defined(CUDA_CPU) && !defined(CUDA_CPU_CHECK) && !defined(CUDA_CPU_RACE)
// A check build would touch the memory to poison it.
TEST_CASE("memory that was handed out but not touched counts as taken") {
    size_t before, after, total;
    REQUIRE(cudaMemGetInfo(&before, &total) == cudaSuccess);
    std::vector<char*> taken;
    const size_t piece = before / 8;
    char* p = nullptr;
    while (cudaMalloc(&p, piece) == cudaSuccess && taken.size() < 20) taken.push_back(p);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK((taken.size() >= 5 && taken.size() <= 8));  // other programs may take or free some meanwhile
    REQUIRE(cudaMemGetInfo(&after, &total) == cudaSuccess);
    CHECK(after < piece);
    for (char* q : taken) CHECK(cudaFree(q) == cudaSuccess);
    REQUIRE(cudaMemGetInfo(&after, &total) == cudaSuccess);
    CHECK(after > before / 2);
}
#endif

#if defined(CUDA_CPU) && !defined(__SANITIZE_ADDRESS__) && !defined(CUDA_CPU_RACE)
// The sanitizers map terabytes of addresses.
TEST_CASE("a limit on the address space is a limit on device memory") {
    rlimit old, low;
    REQUIRE(getrlimit(RLIMIT_AS, &old) == 0);
    low = old;
    low.rlim_cur = 4ull << 30;
    REQUIRE(setrlimit(RLIMIT_AS, &low) == 0);
    size_t available, total;
    const cudaError_t info = cudaMemGetInfo(&available, &total);
    char* p = nullptr;
    const cudaError_t error = cudaMalloc(&p, 4ull << 30);
    REQUIRE(setrlimit(RLIMIT_AS, &old) == 0);
    CHECK(info == cudaSuccess);
    CHECK(available < 4ull << 30);
    CHECK(error == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
}
#endif

TEST_CASE("events measure time") {
    cudaEvent_t begin = nullptr, end = nullptr;
    REQUIRE(cudaEventCreate(&begin) == cudaSuccess);
    REQUIRE(cudaEventCreate(&end) == cudaSuccess);
    REQUIRE(cudaEventRecord(begin) == cudaSuccess);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    REQUIRE(cudaEventRecord(end) == cudaSuccess);
    REQUIRE(cudaEventSynchronize(end) == cudaSuccess);
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end) == cudaSuccess);
    CHECK(milliseconds >= 0);
#ifdef CUDA_CPU  // a GPU's clock does not run while it has nothing to do
    CHECK(milliseconds >= 3);
#endif
    CHECK(cudaEventDestroy(begin) == cudaSuccess);
    CHECK(cudaEventDestroy(end) == cudaSuccess);
}

// ---------------------------------------------------------------- graphs

struct Stream {
    cudaStream_t stream = nullptr;
    explicit Stream(unsigned flags = cudaStreamDefault) {
        REQUIRE(cudaStreamCreateWithFlags(&stream, flags) == cudaSuccess);
    }
    Stream(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream); }
    operator cudaStream_t() const { return stream; }

    void begin(cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
        REQUIRE(cudaStreamBeginCapture(stream, mode) == cudaSuccess);
    }
    // Ends the capture and makes an executable graph of it.
    cudaGraphExec_t end() {
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t exec = nullptr;
        REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
        REQUIRE(cudaGraphInstantiate(&exec, graph) == cudaSuccess);
        CHECK(cudaGraphDestroy(graph) == cudaSuccess);
        return exec;
    }
    cudaStreamCaptureStatus status() {
        cudaStreamCaptureStatus status;
        REQUIRE(cudaStreamIsCapturing(stream, &status) == cudaSuccess);
        return status;
    }
    void launch(cudaGraphExec_t exec) {
        REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
        REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    }
};

__global__ void add_multiple_kernel(int* sum, const int* x, int factor, float ignored = 0) {
    sum[threadIdx.x] += factor * x[threadIdx.x] + (int)ignored;
}
template <class T>
__global__ void double_kernel(T* x) {
    x[threadIdx.x] *= 2;
}
// The kernel and its factor are locals that are gone when the graph is launched.
static void launch_by_pointer(cudaStream_t stream, int* sum, const int* x) {
    void (*kernel)(int*, const int*, int, float) = add_multiple_kernel;
    const int factor = 10;
    kernel<<<1, 4, 0, stream>>>(sum, x, factor, 0.0f);
}

TEST_CASE(
    "a graph does what was recorded, in order, with the arguments of then, as often as it is launched") {
    Stream stream;
    int* source = nullptr;
    REQUIRE(cudaMallocHost(&source, 4 * sizeof(int)) == cudaSuccess);
    std::fill(source, source + 4, 1);
    DeviceArray<int> sum(std::vector<int>(4, 7)), x(std::vector<int>(4, 100)), copy(std::vector<int>(4, 0));
    int factor = 3;
    CHECK(stream.status() == cudaStreamCaptureStatusNone);
    stream.begin();
    CHECK(stream.status() == cudaStreamCaptureStatusActive);
    CHECK(cudaMemsetAsync((int*)sum, 0, 4 * sizeof(int), stream) == cudaSuccess);
    CHECK(cudaMemcpyAsync((int*)x, source, 4 * sizeof(int), cudaMemcpyHostToDevice, stream) == cudaSuccess);
    add_multiple_kernel<<<1, 4, 0, stream>>>((int*)sum, (int*)x, factor);
    double_kernel<<<1, dim3(4), 0, stream>>>((int*)sum);
    launch_by_pointer(stream, sum, x);
    CHECK(cudaMemcpyAsync((int*)copy, (int*)sum, 4 * sizeof(int), cudaMemcpyDeviceToDevice, stream) ==
          cudaSuccess);
    CHECK(cudaGetLastError() == cudaSuccess);
    cudaGraphExec_t exec = stream.end();
    factor = 1000;
    CHECK(stream.status() == cudaStreamCaptureStatusNone);
    CHECK(sum.get() == std::vector<int>(4, 7));
    CHECK(x.get() == std::vector<int>(4, 100));
    for (int value : {1, 5, 2}) {
        std::fill(source, source + 4, value);
        stream.launch(exec);
        CHECK(sum.get() == std::vector<int>(4, 2 * 3 * value + 10 * value));
        CHECK(copy.get() == sum.get());
    }
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess);
    CHECK(cudaFreeHost(source) == cudaSuccess);
}

TEST_CASE("a matrix product in a graph keeps its shapes, factors and pointers") {
    Stream stream;
    const Gemm g(5, 4, 3, false, false, 2.0f, 0.0f, 1);
    DeviceArray<float> a(std::vector<float>(g.a.begin(), g.a.end()));
    DeviceArray<float> b(std::vector<float>(g.b.begin(), g.b.end()));
    DeviceArray<float> now(g.c.size()), replayed(g.c.size());
    LtMatmul matmul(g, CUDA_R_32F, CUDA_R_32F);
    const std::vector<float> start(g.c.begin(), g.c.end());
    now.set(start), replayed.set(start);
    REQUIRE(matmul.run(g.alpha, (float*)a, (float*)b, g.beta, (float*)now) == CUBLAS_STATUS_SUCCESS);
    stream.begin();
    REQUIRE(matmul.run(g.alpha, (float*)a, (float*)b, g.beta, (float*)replayed, stream) ==
            CUBLAS_STATUS_SUCCESS);
    cudaGraphExec_t exec = stream.end();
    matmul.set(CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T);
    CHECK(replayed.get() == start);
    stream.launch(exec);
    CHECK(replayed.get() == now.get());
    CHECK(now.get() != start);
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess);
}

TEST_CASE("a graph launched in a capture becomes part of the new graph, and may then be destroyed") {
    Stream stream;
    DeviceArray<int> x(std::vector<int>(4, 1));
    stream.begin();
    double_kernel<<<1, 4, 0, stream>>>((int*)x);
    cudaGraphExec_t inner = stream.end();
    stream.begin();
    for (int i = 0; i < 3; i++) CHECK(cudaGraphLaunch(inner, stream) == cudaSuccess);
    cudaGraphExec_t outer = stream.end();
    CHECK(cudaGraphExecDestroy(inner) == cudaSuccess);
    CHECK(x.get() == std::vector<int>(4, 1));
    stream.launch(outer);
    CHECK(x.get() == std::vector<int>(4, 8));
    CHECK(cudaGraphExecDestroy(outer) == cudaSuccess);
}

TEST_CASE("what a stream that captures cannot do fails, and makes the capture invalid") {
    Stream stream, other;
    DeviceArray<int> x(std::vector<int>(4, 1));
    cudaEvent_t event = nullptr, captured = nullptr;
    REQUIRE(cudaEventCreate(&event) == cudaSuccess);
    REQUIRE(cudaEventCreate(&captured) == cudaSuccess);
    REQUIRE(cudaEventRecord(event, other) == cudaSuccess);
    int host[4], *p = nullptr, *allocated = nullptr, *pinned = nullptr;
    REQUIRE(cudaMalloc(&allocated, 4) == cudaSuccess);
    REQUIRE(cudaMallocHost(&pinned, 4) == cudaSuccess);
    const struct {
        const char* name;
        cudaError_t want;
        std::function<cudaError_t()> call;
    } calls[] = {
        {"cudaMalloc", cudaErrorStreamCaptureUnsupported, [&] { return cudaMalloc(&p, 16); }},
        {"cudaFree", cudaErrorStreamCaptureUnsupported, [&] { return cudaFree(allocated); }},
        {"cudaMallocHost", cudaErrorStreamCaptureUnsupported, [&] { return cudaMallocHost(&p, 16); }},
        {"cudaFreeHost", cudaErrorStreamCaptureUnsupported, [&] { return cudaFreeHost(pinned); }},
        {"cudaStreamSynchronize", cudaErrorStreamCaptureUnsupported,
         [&] { return cudaStreamSynchronize(stream); }},
        {"cudaStreamQuery", cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamQuery(stream); }},
        {"cudaDeviceSynchronize", cudaErrorStreamCaptureUnsupported, [] { return cudaDeviceSynchronize(); }},
        {"cudaEventSynchronize", cudaErrorCapturedEvent, [&] { return cudaEventSynchronize(captured); }},
        {"cudaEventQuery of a captured event", cudaErrorCapturedEvent,
         [&] { return cudaEventQuery(captured); }},
        {"cudaEventQuery", cudaErrorStreamCaptureUnsupported, [&] { return cudaEventQuery(event); }},
        {"cudaStreamWaitEvent of work outside", cudaErrorStreamCaptureIsolation,
         [&] { return cudaStreamWaitEvent(stream, event, 0); }},
        {"cudaMemcpy", cudaErrorStreamCaptureImplicit,
         [&] { return cudaMemcpy(host, (int*)x, sizeof host, cudaMemcpyDeviceToHost); }},
        {"cudaMemset", cudaErrorStreamCaptureImplicit, [&] { return cudaMemset((int*)x, 0, sizeof host); }},
        {"cudaMemcpyAsync on the legacy stream", cudaErrorStreamCaptureImplicit,
         [&] { return cudaMemcpyAsync(host, (int*)x, sizeof host, cudaMemcpyDeviceToHost, nullptr); }},
        {"cudaStreamSynchronize of the legacy stream", cudaErrorStreamCaptureImplicit,
         [&] { return cudaStreamSynchronize(nullptr); }},
        {"a launch on the legacy stream", cudaErrorStreamCaptureImplicit, [&] {
             double_kernel<<<1, 4>>>((int*)x);
             return cudaPeekAtLastError();
         }}};
    for (const auto& [name, want, call] : calls) {
        CAPTURE(name);
        stream.begin();
        double_kernel<<<1, 4, 0, stream>>>((int*)x);
        REQUIRE(cudaEventRecord(captured, stream) == cudaSuccess);
        CHECK(cudaGetLastError() == cudaSuccess);
        CHECK(call() == want);
        CHECK(cudaGetLastError() == want);
        CHECK(stream.status() == cudaStreamCaptureStatusInvalidated);
        double_kernel<<<1, 4, 0, stream>>>((int*)x);
        CHECK(cudaGetLastError() == cudaErrorStreamCaptureInvalidated);
        CHECK(cudaMemsetAsync((int*)x, 0, sizeof host, stream) == cudaErrorStreamCaptureInvalidated);
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
        CHECK(graph == nullptr);
        cudaGetLastError();
        CHECK(stream.status() == cudaStreamCaptureStatusNone);
        CHECK(x.get() == std::vector<int>(4, 1));
    }
    // What concerns another stream only is no one's business.
    stream.begin();
    double_kernel<<<1, 4, 0, other>>>((int*)x);
    CHECK(cudaStreamSynchronize(other) == cudaSuccess);
    CHECK(cudaEventRecord(event, other) == cudaSuccess);
    CHECK(cudaGraphExecDestroy(stream.end()) == cudaSuccess);
    CHECK(x.get() == std::vector<int>(4, 2));
    CHECK(cudaEventDestroy(event) == cudaSuccess);
    CHECK(cudaEventDestroy(captured) == cudaSuccess);
    CHECK(cudaFree(allocated) == cudaSuccess);
    CHECK(cudaFreeHost(pinned) == cudaSuccess);
}

TEST_CASE("a capture begins and ends once, in one thread, and not on the legacy stream") {
    Stream stream;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorIllegalState);
    stream.begin();
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaErrorIllegalState);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(cudaGraphDestroy(graph) == cudaSuccess);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorIllegalState);
    stream.begin();
    std::thread([&] {
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureWrongThread);
    }).join();
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK(cudaGraphInstantiate(&exec, nullptr) == cudaErrorInvalidValue);
    cudaGetLastError();
}

TEST_CASE("the capture's mode says whom it keeps from unsafe calls") {
    const auto malloc_and_free = [] {
        int* p = nullptr;
        const cudaError_t error = cudaMalloc(&p, 16);
        if (error == cudaSuccess) CHECK(cudaFree(p) == cudaSuccess);
        return error;
    };
    const auto in_another_thread = [&] {
        cudaError_t error;
        std::thread([&] { error = malloc_and_free(); }).join();
        return error;
    };
    const cudaError_t refused = cudaErrorStreamCaptureUnsupported;
    const struct {
        cudaStreamCaptureMode mode;
        cudaError_t there, here;
    } modes[] = {{cudaStreamCaptureModeRelaxed, cudaSuccess, cudaSuccess},
                 {cudaStreamCaptureModeThreadLocal, cudaSuccess, refused},
                 {cudaStreamCaptureModeGlobal, refused, refused}};
    for (const auto& [mode, there, here] : modes) {
        CAPTURE((int)mode);
        Stream stream(cudaStreamNonBlocking);
        stream.begin(mode);
        CHECK(in_another_thread() == there);
        CHECK(malloc_and_free() == here);
        cudaGraph_t graph = nullptr;
        const bool valid = cudaStreamEndCapture(stream, &graph) == cudaSuccess;
        CHECK(valid == (here == cudaSuccess));
        if (valid) CHECK(cudaGraphDestroy(graph) == cudaSuccess);
    }
    cudaGetLastError();
    // The legacy stream does not wait for a stream that was created not to block it.
    Stream stream(cudaStreamNonBlocking);
    DeviceArray<int> x(std::vector<int>(4, 1));
    stream.begin();
    double_kernel<<<1, 4>>>((int*)x);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(cudaGraphExecDestroy(stream.end()) == cudaSuccess);
    CHECK(x.get() == std::vector<int>(4, 2));
}

// ---------------------------------------------------------------- the device

TEST_CASE("there is a device") {
    int count = 0, device = -1, value = 0;
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
    CHECK(count >= 1);
    CHECK(cudaSetDevice(0) == cudaSuccess);
    CHECK(cudaGetDevice(&device) == cudaSuccess);
    CHECK(device == 0);
    CHECK(cudaSetDevice(count) == cudaErrorInvalidDevice);
    CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
    cudaDeviceProp prop;
    REQUIRE(cudaGetDeviceProperties(&prop, 0) == cudaSuccess);
    CHECK(prop.name[0] != 0);
    CHECK(prop.warpSize == 32);
    CHECK(prop.sharedMemPerBlock == 48 << 10);
    CHECK(prop.multiProcessorCount >= 1);
    CHECK(prop.major >= 8);
    for (auto [attribute, want] :
         {std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)prop.sharedMemPerBlockOptin},
          {cudaDevAttrMultiProcessorCount, prop.multiProcessorCount},
          {cudaDevAttrComputeCapabilityMajor, prop.major}}) {
        CHECK(cudaDeviceGetAttribute(&value, attribute, 0) == cudaSuccess);
        CHECK(value == want);
    }
    CHECK(cudaRuntimeGetVersion(&value) == cudaSuccess);
    CHECK(value >= 11000);
    CHECK(cudaDriverGetVersion(&value) == cudaSuccess);
}

// ---------------------------------------------------------------- only on the CPU: schedules, OS threads

#ifdef CUDA_CPU
__global__ void order_kernel(int* order, int* next, bool wait) {
    if (wait) __syncthreads();
    order[atomicAdd(next, 1)] = (int)threadIdx.x;
}

static std::vector<int> thread_order(cuda_cpu::Schedule schedule, bool wait) {
    const cuda_cpu::Schedule before = std::exchange(cuda_cpu::schedule, schedule);
    DeviceArray<int> order(100), next(std::vector<int>{0});
    order_kernel<<<1, 100>>>(order, next, wait);
    cuda_cpu::schedule = before;
    return order.get();
}

TEST_CASE("the schedules run the threads of a block in the order that they promise") {
    std::vector<int> forward(100);
    std::iota(forward.begin(), forward.end(), 0);
    const std::vector<int> backward(forward.rbegin(), forward.rend());
    for (bool wait : {false, true}) {
        CHECK(thread_order(cuda_cpu::Schedule::forward, wait) == forward);
        CHECK(thread_order(cuda_cpu::Schedule::backward, wait) == backward);
        const std::vector<int> random = thread_order(cuda_cpu::Schedule::random, wait);
        CHECK(std::set<int>(random.begin(), random.end()).size() == 100);
        CHECK(random != forward);
        CHECK(random != backward);
        CHECK(thread_order(cuda_cpu::Schedule::random, wait) == random);  // repeatable
    }
}

#ifndef CUDA_CPU_RACE
__global__ void missing_barrier_kernel(int* out) {
    __shared__ int s[64];
    s[threadIdx.x] = -1;
    __syncthreads();
    s[threadIdx.x] = (int)threadIdx.x;
    out[threadIdx.x] = s[(threadIdx.x + 1) % 64];  // one barrier too few
}

TEST_CASE("under some schedule a missing barrier gives a wrong result") {
    std::vector<int> want(64);
    for (int t = 0; t < 64; t++) want[t] = (t + 1) % 64;
    int wrong = 0;
    for_all_schedules([&] {
        DeviceArray<int> out(64);
        missing_barrier_kernel<<<1, 64>>>(out);
        wrong += out.get() != want;
    });
    CHECK(wrong >= 2);
}

TEST_CASE("several OS threads may launch at once") {
    std::vector<std::vector<int>> got(3);
    std::vector<std::thread> threads;
    const std::vector<int> in = random_ints(50 * 256, 1000, 1);
    for (auto& result : got)
        threads.emplace_back([&] {
            int *out, *d_in;
            cudaMalloc(&out, 50 * sizeof(int));
            cudaMalloc(&d_in, in.size() * sizeof(int));
            cudaMemcpy(d_in, in.data(), in.size() * sizeof(int), cudaMemcpyHostToDevice);
            for (int repeat = 0; repeat < 20; repeat++) tree_sum_kernel<<<50, 256>>>(out, d_in);
            result.resize(50);
            cudaMemcpy(result.data(), out, 50 * sizeof(int), cudaMemcpyDeviceToHost);
            cudaFree(out);
            cudaFree(d_in);
        });
    for (std::thread& t : threads) t.join();
    for (int b = 0; b < 50; b++) CHECK(got[0][b] == std::accumulate(&in[b * 256], &in[b * 256] + 256, 0));
    CHECK(got[1] == got[0]);
    CHECK(got[2] == got[0]);
}
#endif
#endif
