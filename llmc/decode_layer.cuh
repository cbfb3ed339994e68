// One token of one sequence through a layer in two kernels, for GPUs whose blocks can work in clusters. No
// program uses this yet (Context::use_decode_halves): tests and dev/bench's `decode` run it, beside the five
// kernels that a layer takes otherwise.
//
//   attention half:  x += attproj attention(qkv layernorm(x)) + bias
//   MLP half:        x += fcproj gelu(fc layernorm(x) + bias) + bias
//
// With five kernels a layer (matvec.cuh, attention_decode.cuh) a token of GPT-2 124M took 0.243 ms on an
// H100, three times what it takes to read the weights: the rest are the ends of sixty kernels, at each of
// which everything waits for the slowest block, the memory and the next start. A half needs no such end
// inside, for it falls apart: into heads, and into slices of the MLP's 4C channels. A cluster of 8 blocks
// takes one head, or one of 16 slices, from x to what it contributes to the output: a "part" [C]. The parts
// are added up by the next half, by every cluster for itself, each block C / 8 columns.
//
// Between blocks go, through shared memory: the sum x [C]; q, k, v [3 hs] of the head, or the slice [C / 4];
// and of attention, whose keys are dealt to the blocks, each block's share. A mailbox for each (cluster.cuh).
//
// What a block multiplies with, bf16 of GPT-2 124M: 3 hs / 8 rows of qkv and C / 8 rows of hs columns of
// attproj, 37 + 12 KB; C / 32 rows of fc and C / 8 rows of C / 4 columns of fcproj, 37 + 37 KB. All of it is
// on its way to shared memory before the kernel in front has ended (overlap.cuh), keys and values, too.
//
// The kernels are compiled for the channels of GPT-2 124M and 355M and of `tiny`, heads of 64: with sizes
// that are only known when they run, they would be twice as long, and instructions that run once have to be
// fetched as well.
//
// All sums have a fixed order. The residual stream is rounded as it is everywhere; q, k and v are rounded as
// the cache holds them; what else stays inside a half is not rounded.
#pragma once
#include "attention_decode.cuh"
#include "cluster.cuh"
#include "matvec.cuh"
#include "params.h"

inline constexpr int kClusterBlocks = 8;
inline constexpr int kHalfThreads = 128;  // of a block
inline constexpr int kHalfWarps = kHalfThreads / 32;
inline constexpr int kMlpSlices = 16;
inline constexpr int kHalfHeadSize = 64;
inline constexpr int kHalfKeysAhead = 8;  // that a group of lanes fetches at once

// Parts that a half of C channels makes, at most: one a head or slice.
constexpr __host__ __device__ int most_half_parts(int C) {
    return C / kHalfHeadSize > kMlpSlices ? C / kHalfHeadSize : kMlpSlices;
}

// How a model of C channels is shared by a cluster's blocks, threads and lanes.
template <int C>
struct HalfShape {
    static constexpr int heads = C / kHalfHeadSize;
    static constexpr int columns = C / kClusterBlocks;  // of the stream, that a block adds up and puts out
    static constexpr int hidden = 4 * C / kMlpSlices;   // channels of a slice
    static constexpr int qkv_rows = 3 * kHalfHeadSize / kClusterBlocks, fc_rows = hidden / kClusterBlocks;
    static constexpr int eights = ceil_div(C, 256);  // of a row's columns, that a lane holds
    // A block's columns by four, the threads that share the parts of such four, and how many parts each has.
    static constexpr int quads = columns / 4;
    static constexpr int groups = kHalfThreads / quads < 8 ? kHalfThreads / quads : 8;
    static constexpr int parts_each = ceil_div(most_half_parts(C), groups);
    static_assert(C % 32 == 0 && C % kHalfHeadSize == 0);
};

// The residual stream between two kernels: x, and what the kernel in front found to add to it.
template <class Float>
struct Stream {
    const Float* x;      // [C]
    const float* parts;  // [count,C]
    int count;           // at most C / 64 or 16, whichever is more
    const Float* bias;   // [C], of the layer that the parts are the output of; null if there are none
};

// ---------------------------------------------------------------------------------------------------------
// eight neighbouring columns

template <class Float>
__device__ void copy_eight(Float* shared, const Float* from) {
    for (int k = 0; k < 8; k += Pack<Float>::size) cp_async_16(shared_address(shared + k), from + k);
}
template <class Float>
__device__ void load_eight(float (&x)[8], const Float* from) {
    constexpr int N = Pack<Float>::size;
    for (int k = 0; k < 8; k += N) {
        float part[N];
        unpack<Float>(part, load_pack(from + k));
        for (int i = 0; i < N; i++) x[k + i] = part[i];
    }
}
// sum += a . b
__device__ inline void add_dot(float& sum, const float (&a)[8], const float (&b)[8]) {
    for (int k = 0; k < 8; k++) sum = fmaf(a[k], b[k], sum);
}

// ---------------------------------------------------------------------------------------------------------
// what both halves do

// The four columns of the stream that this thread adds up, and their bias, which no kernel makes: it is asked
// for early, and not looked at before the wait for the kernel in front, which would have to wait for it.
template <class Float, int C>
struct StreamQuad {
    using Shape = HalfShape<C>;
    int group = (int)threadIdx.x / Shape::quads;
    int column = cluster_rank() * Shape::columns + (int)threadIdx.x % Shape::quads * 4;
    Float bias[4] = {};

    __device__ explicit StreamQuad(const Stream<Float>& s) {
        if (s.bias && group == 0)
            for (int k = 0; k < 4; k++) bias[k] = s.bias[column + k];
    }
};

// A load that stays behind wait_for_previous_kernel(). Of a bf16, __ldcg is not volatile: a compiler may do
// it before the wait.
inline __device__ float load_behind(const float* p) {
    return __ldcg(p);
}
inline __device__ float load_behind(const __nv_bfloat16* p) {
    return (float)__ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(p)));
}

// x [C] = the stream's sum, sent to all blocks of the cluster; kept [C]: where the first cluster leaves it.
// sums [groups][C / 8]: shared memory.
template <class Float, int C>
__device__ void gather_stream(float* x, Mailbox* box, float* sums, Float* kept, const Stream<Float>& s,
                              const StreamQuad<Float, C>& mine) {
    using Shape = HalfShape<C>;
    if (mine.group < Shape::groups) {
        float sum[4] = {};
        if (mine.group == 0)
            for (int k = 0; k < 4; k++) sum[k] = load_behind(s.x + mine.column + k) + (float)mine.bias[k];
#pragma unroll
        for (int i = 0; i < Shape::parts_each; i++) {
            const int p = mine.group + i * Shape::groups;
            float4 part = {0.0f, 0.0f, 0.0f, 0.0f};
            if (p < s.count) part = __ldcg(reinterpret_cast<const float4*>(s.parts + p * C + mine.column));
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
        store_floats(sums + threadIdx.x * 4, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::quads * kClusterBlocks; i += kHalfThreads) {
        const int quad = i % Shape::quads, to = i / Shape::quads;
        float sum[4] = {};
        for (int g = 0; g < Shape::groups; g++) {
            const Pack<float> of_group = load_pack(sums + (g * Shape::quads + quad) * 4);
            for (int k = 0; k < 4; k++) sum[k] += of_group[k];
        }
        for (int k = 0; k < 4; k++) sum[k] = (float)(Float)sum[k];
        const int column = cluster_rank() * Shape::columns + quad * 4;
        send(reinterpret_cast<float4*>(x + column), to, make_float4(sum[0], sum[1], sum[2], sum[3]), box);
        if (to == 0 && (int)blockIdx.x < kClusterBlocks)
            for (int k = 0; k < 4; k++) kept[column + k] = (Float)sum[k];
    }
    wait_for(box);
}

// A layernorm's parameters, or a row, as the lanes of a warp hold it: lane l has columns 8 l ... 8 l + 7, and
// those 256, 512, 768 further.
template <class Float, int C>
struct LaneNorm {
    static constexpr int N = Pack<Float>::size, EIGHTS = HalfShape<C>::eights;
    Pack<Float> gain[EIGHTS][8 / N], shift[EIGHTS][8 / N];

    static __device__ int column(int u) { return (u * 32 + (int)threadIdx.x % 32) * 8; }

    __device__ LaneNorm(const Float* weight, const Float* bias) {
#pragma unroll
        for (int u = 0; u < EIGHTS; u++)
            for (int i = 0; i < 8 / N; i++) {
                gain[u][i] = load_pack_if(column(u) < C, weight + column(u) + i * N);
                shift[u][i] = load_pack_if(column(u) < C, bias + column(u) + i * N);
            }
    }
    // y = layernorm(x), x [C] in shared memory, by each warp for itself.
    __device__ void apply(float (&y)[EIGHTS][8], const float* x) const {
        float sum = 0.0f, square = 0.0f;
#pragma unroll
        for (int u = 0; u < EIGHTS; u++) {
            for (int k = 0; k < 8; k++) y[u][k] = 0.0f;
            if (column(u) < C) load_eight(y[u], x + column(u));
            for (int k = 0; k < 8; k++) sum += y[u][k];
        }
        const float mean = row_sum<32>(sum) * (1.0f / C);
#pragma unroll
        for (int u = 0; u < EIGHTS; u++)
            if (column(u) < C)
                for (int k = 0; k < 8; k++) square += (y[u][k] - mean) * (y[u][k] - mean);
        const float rstd = rsqrtf(row_sum<32>(square) * (1.0f / C) + kLayerNormEpsilon);
#pragma unroll
        for (int u = 0; u < EIGHTS; u++)
            for (int i = 0; i < 8 / N; i++) {
                float w[N], b[N];
                unpack<Float>(w, gain[u][i]);
                unpack<Float>(b, shift[u][i]);
                for (int k = 0; k < N; k++) y[u][i * N + k] = (y[u][i * N + k] - mean) * rstd * w[k] + b[k];
            }
    }
};

// The first product: ROWS rows of C columns, dealt to the warps. row_of(r): row r of the block in the weights
// and the bias. A lane reads what it has copied itself, so no barrier is needed for that.
template <int ROWS>
struct RowShare {
    static constexpr int EACH = ceil_div(ROWS, kHalfWarps);
    int first = min((int)threadIdx.x / 32 * EACH, ROWS);  // of this warp's rows
    int count = min(EACH, ROWS - first);
};
template <int ROWS, int C, class Float, class RowOf>
__device__ void copy_rows(Float* shared, const Float* weight, RowOf row_of) {
    const RowShare<ROWS> mine{};
    for (int r = mine.first; r < mine.first + mine.count; r++)
        for (int column = threadIdx.x % 32 * 8; column < C; column += 256)
            copy_eight(shared + r * C + column, weight + (size_t)row_of(r) * C + column);
}
// take(r, y, l): y = row r times x; each row is taken by four lanes, l = 0 ... 3.
template <int ROWS, int C, class Float, class Take>
__device__ void multiply_rows(const float (&x)[HalfShape<C>::eights][8], const Float* shared, Take take) {
    static_assert(RowShare<ROWS>::EACH <= 8);
    const RowShare<ROWS> mine{};
    const int lane = threadIdx.x % 32;
    float sum[8] = {};
#pragma unroll
    for (int u = 0; u < HalfShape<C>::eights; u++) {
        const int column = (u * 32 + lane) * 8;
        if (column >= C) break;
#pragma unroll
        for (int o = 0; o < RowShare<ROWS>::EACH; o++) {
            if (o >= mine.count) break;
            float weights[8];
            load_eight(weights, shared + (mine.first + o) * C + column);
            add_dot(sum[o], weights, x[u]);
        }
    }
    const float y = sum_each(sum);
    if (lane / 4 < mine.count) take(mine.first + lane / 4, y, lane % 4);
}

// The second product: C / 8 rows of COLS columns, those that belong to the cluster of a matrix whose rows
// have `stride`. 8 lanes share a row.
template <int C, int COLS, class Float>
__device__ void copy_columns(Float* shared, const Float* weight, size_t stride) {
    for (int row = threadIdx.x / 8; row < HalfShape<C>::columns; row += kHalfThreads / 8)
        for (int column = threadIdx.x % 8 * 8; column < COLS; column += 64)
            copy_eight(shared + row * COLS + column, weight + row * stride + column);
}
// part[row] = shared[row] . x, x [COLS] in shared memory.
template <int C, int COLS, class Float>
__device__ void multiply_columns(float* part, const Float* shared, const float* x) {
    constexpr int EIGHTS = ceil_div(COLS, 64);
    const int lane = threadIdx.x % 8;
    float in[EIGHTS][8] = {};
#pragma unroll
    for (int u = 0; u < EIGHTS; u++)
        if ((u * 8 + lane) * 8 < COLS) load_eight(in[u], x + (u * 8 + lane) * 8);
#pragma unroll 2
    for (int row = threadIdx.x / 8; row < HalfShape<C>::columns; row += kHalfThreads / 8) {
        float sum = 0.0f;
#pragma unroll
        for (int u = 0; u < EIGHTS; u++) {
            const int column = (u * 8 + lane) * 8;
            if (column >= COLS) break;
            float weights[8];
            load_eight(weights, shared + row * COLS + column);
            add_dot(sum, weights, in[u]);
        }
        for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) part[row] = sum;
    }
}

// A block's shared memory: weights, rows [ROWS][C] and columns [C / 8][COLS], then floats: the stream's sum
// and what it is made of, the bias of the rows, and what lies between the two products [MIDDLE].
template <class Float, int C, int ROWS, int COLS, int MIDDLE>
struct HalfMemory {
    static_assert(ROWS <= kHalfThreads);
    alignas(16) Float rows[ROWS * C];
    alignas(16) Float columns[C / kClusterBlocks * COLS];
    alignas(16) float x[C];
    alignas(16) float sums[4 * kHalfThreads];
    alignas(16) float bias[ROWS];
    alignas(16) float middle[MIDDLE];
    Mailbox x_box, middle_box;
};

// y = layernorm(the stream's sum), each lane's part of it. Waits for the kernel in front. row_bias: of the
// block's row threadIdx.x, for memory.bias.
template <class Float, int C, class Memory>
__device__ void normalize_stream(float (&y)[HalfShape<C>::eights][8], Memory& memory, Float* kept,
                                 const Stream<Float>& in, const Float* weight, const Float* bias,
                                 Float row_bias) {
    const LaneNorm<Float, C> norm(weight, bias);
    const StreamQuad<Float, C> quad(in);
    cluster_wait();
    wait_for_previous_kernel();
    if (threadIdx.x < sizeof memory.bias / sizeof *memory.bias) memory.bias[threadIdx.x] = (float)row_bias;
    gather_stream(memory.x, &memory.x_box, memory.sums, kept, in, quad);
    norm.apply(y, memory.x);
}

// ---------------------------------------------------------------------------------------------------------
// the MLP half

template <class Float, int C>
using MlpMemory = HalfMemory<Float, C, HalfShape<C>::fc_rows, HalfShape<C>::hidden, HalfShape<C>::hidden>;

// parts [16,C], kept [C]: what this kernel makes; in: what the kernel in front has made.
template <class Float, int C>
__global__ void __launch_bounds__(kHalfThreads, 3)
    decode_mlp_half_kernel(float* parts, Float* kept, Stream<Float> in, LayerParams<Float> p) {
    using Shape = HalfShape<C>;
    constexpr int HIDDEN = Shape::hidden, ROWS = Shape::fc_rows;
    extern __shared__ __align__(16) char half_shared[];
    auto& memory = *reinterpret_cast<MlpMemory<Float, C>*>(half_shared);
    start_next_kernel();
    const int slice = blockIdx.x / kClusterBlocks, rank = cluster_rank(), tid = threadIdx.x;
    if (tid == 0) {
        open_mailbox(&memory.x_box, sizeof memory.x);
        open_mailbox(&memory.middle_box, sizeof memory.middle);
    }
    cluster_arrive();
    const int out = rank * Shape::columns;  // the first column that this block puts out
    const auto row_of = [&](int r) { return slice * HIDDEN + rank * ROWS + r; };
    copy_rows<ROWS, C>(memory.rows, p.fc_w, row_of);
    cp_async_commit();
    copy_columns<C, HIDDEN>(memory.columns, p.fcproj_w + (size_t)out * 4 * C + slice * HIDDEN, 4 * C);
    cp_async_commit();
    const Float row_bias = tid < ROWS ? p.fc_b[row_of(tid)] : (Float)0.0f;
    float y[Shape::eights][8];
    normalize_stream<Float, C>(y, memory, kept, in, p.ln2_w, p.ln2_b, row_bias);
    cp_async_wait<1>();
    multiply_rows<ROWS, C>(y, memory.rows, [&](int r, float sum, int l) {
        const float h = sum + memory.bias[r], gelu = h * gelu_sigmoid(h);
        for (int to = l; to < kClusterBlocks; to += 4)
            send(memory.middle + rank * ROWS + r, to, gelu, &memory.middle_box);
    });
    cp_async_wait<0>();
    wait_for(&memory.middle_box);
    multiply_columns<C, HIDDEN>(parts + slice * C + out, memory.columns, memory.middle);
}

// ---------------------------------------------------------------------------------------------------------
// the attention half

// A head's keys and values as a group of lanes holds them, one at a time.
template <class Float>
inline constexpr int kHalfLanes = kHalfHeadSize / Pack<Float>::size;
template <class Float>
using HalfSlice = HeadSlice<Float, kHalfHeadSize, kHalfLanes<Float>>;

// Keys that a cluster has at once: of so many, the attention half can find the k largest scores.
template <class Float>
inline constexpr int kHalfKeys = kHalfKeysAhead*(kHalfThreads / kHalfLanes<Float>)*kClusterBlocks;

// Of scores s [n] in shared memory, n <= MOST, the k largest are those whose ordered bits are above `key`, or
// equal to it at a position up to `last`: what find_top (attention_decode.cuh) finds, by one warp.
struct WarpTop {
    unsigned key;
    int last;
    __device__ bool keeps(float score, int position) const {
        const unsigned bits = ordered_bits(score);
        return bits > key || (bits == key && position <= last);
    }
};
template <int MOST>
__device__ WarpTop find_top_by_warp(const float* s, int n, int k) {
    constexpr int EACH = MOST / 32;
    const int lane = threadIdx.x % 32;
    unsigned bits[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) bits[i] = i * 32 + lane < n ? ordered_bits(s[i * 32 + lane]) : 0;
    WarpTop top = {0, n};
    int reach = n;  // scores that reach the key
#pragma unroll 1
    for (int bit = 31; bit >= 0 && reach > k; bit--) {
        const unsigned candidate = top.key | 1u << bit;
        int count = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) count += bits[i] >= candidate ? 1 : 0;
        count = __reduce_add_sync(0xffffffffu, count);
        if (count >= k) top.key = candidate, reach = count;
    }
    if (reach <= k) return top;
    // The last of them are equal: of those the earliest stay.
    int above = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) above += bits[i] > top.key ? 1 : 0;
    int places = k - __reduce_add_sync(0xffffffffu, above);
#pragma unroll 1
    for (int first = 0; places > 0; first += 32) {
        unsigned equal =
            __ballot_sync(0xffffffffu, first + lane < n && ordered_bits(s[first + lane]) == top.key);
        const int count = __popc(equal);
        if (places <= count) {
            for (int skip = places - 1; skip > 0; skip--) equal &= equal - 1;
            top.last = first + __ffs((int)equal) - 1;
        }
        places -= count;
    }
    return top;
}

// Between the products: q, k, v of the head. Then attention: the shares of the cluster's blocks and of this
// block's warps, the output, and of top k all scores.
template <class Float, int C>
struct AttentionMemory : HalfMemory<Float, C, HalfShape<C>::qkv_rows, kHalfHeadSize, 3 * kHalfHeadSize> {
    Share<kHalfHeadSize> shares[kClusterBlocks], of_warps[kHalfWarps];
    alignas(16) float att[kHalfHeadSize];
    Mailbox shares_box, scores_box;
};
template <class Float, int C>
struct TopAttentionMemory : AttentionMemory<Float, C> {
    float scores[kHalfKeys<Float>];
};

// parts [NH,C], kept [C]: what this kernel makes. The newest token's key and value go into the cache.
template <class Float, int C, bool TOPK>
__global__ void __launch_bounds__(kHalfThreads, 2)
    decode_attention_half_kernel(float* parts, Float* kept, Stream<Float> in, LayerParams<Float> p,
                                 KvCache<Float> cache, const int* positions, int topk) {
    using Shape = HalfShape<C>;
    using Slice = HalfSlice<Float>;
    using Packed = typename Slice::Packed;
    constexpr int HS = kHalfHeadSize, ROWS = Shape::qkv_rows, LANES = kHalfLanes<Float>;
    constexpr int KEYS = kHalfKeysAhead, BLOCK_GROUPS = kHalfThreads / LANES;
    extern __shared__ __align__(16) char half_shared[];
    auto& memory = *reinterpret_cast<AttentionMemory<Float, C>*>(half_shared);
    float *q = memory.middle, *newest_k = q + HS, *newest_v = newest_k + HS;
    start_next_kernel();
    const int head = blockIdx.x / kClusterBlocks, rank = cluster_rank(), tid = threadIdx.x;
    const int out = rank * Shape::columns;  // the first column that this block puts out
    const int n = __ldcg(positions) + 1, newest = n - 1;
    if (tid == 0) {
        open_mailbox(&memory.x_box, sizeof memory.x);
        open_mailbox(&memory.middle_box, sizeof memory.middle);
        open_mailbox(&memory.shares_box, sizeof memory.shares);
        if (TOPK) open_mailbox(&memory.scores_box, n * (int)sizeof(float));
    }
    cluster_arrive();
    const auto row_of = [&](int r) {
        const int i = rank * ROWS + r;
        return i / HS * C + head * HS + i % HS;
    };
    copy_rows<ROWS, C>(memory.rows, p.qkv_w, row_of);
    cp_async_commit();
    copy_columns<C, HS>(memory.columns, p.attproj_w + (size_t)out * C + head * HS, C);
    cp_async_commit();

    // The newest token is not in the cache yet; of all others, keys and values.
    const size_t place = (size_t)head * cache.capacity * HS;
    const int lane = tid % LANES, group = rank * BLOCK_GROUPS + tid / LANES;
    const auto key_of = [&](int first, int i) { return first + i * BLOCK_GROUPS * kClusterBlocks + group; };
    Packed k[KEYS], v[KEYS];
    const auto fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int j = key_of(first, i);
            k[i] = Slice::fetch(j < newest, cache.k + place + (size_t)j * HS, lane, HS);
            v[i] = Slice::fetch(j < newest, cache.v + place + (size_t)j * HS, lane, HS);
        }
    };
    fetch(0);
    const Float row_bias = tid < ROWS ? p.qkv_b[row_of(tid)] : (Float)0.0f;
    float y[Shape::eights][8];
    normalize_stream<Float, C>(y, memory, kept, in, p.ln1_w, p.ln1_b, row_bias);
    cp_async_wait<1>();
    multiply_rows<ROWS, C>(y, memory.rows, [&](int r, float sum, int l) {
        const float rounded = (float)(Float)(sum + memory.bias[r]);
        for (int to = l; to < kClusterBlocks; to += 4)
            send(memory.middle + rank * ROWS + r, to, rounded, &memory.middle_box);
    });
    wait_for(&memory.middle_box);

    Slice query;
    query.set(Slice::pack(q, lane, HS), 0.125f);  // 1 / sqrt(HS)
    static_assert(HS == 64);
    const Packed key = Slice::pack(newest_k, lane, HS), value = Slice::pack(newest_v, lane, HS);
    WarpShare<Float, HS, LANES> mine;
#pragma unroll 1
    for (int first = 0; first < n; first += kHalfKeys<Float>) {
        if (first > 0) fetch(first);
        float score[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int j = key_of(first, i);
            if (j == newest) k[i] = key, v[i] = value;
            const float product = query.dot(k[i]);
            score[i] = j < n ? product : -INFINITY;
        }
        if constexpr (TOPK) {  // all keys are here at once
            float* scores = static_cast<TopAttentionMemory<Float, C>&>(memory).scores;
#pragma unroll
            for (int i = 0; i < KEYS; i++)
                if (lane < kClusterBlocks && key_of(0, i) < n)
                    send(scores + key_of(0, i), lane, score[i], &memory.scores_box);
            wait_for(&memory.scores_box);
            if (topk < n) {
                const WarpTop top = find_top_by_warp<kHalfKeys<Float>>(scores, n, topk);
#pragma unroll
                for (int i = 0; i < KEYS; i++)
                    if (!top.keeps(score[i], key_of(0, i))) score[i] = -INFINITY;
            }
        }
        mine.take(score, [&](int i) { return v[i]; });
    }
    mine.store(memory.of_warps[tid / 32]);
    __syncthreads();
    for (int i = tid; i < kClusterBlocks * HS; i += kHalfThreads) {
        const int d = i % HS, to = i / HS;
        const Merged all = merge_shares(memory.of_warps, kHalfWarps, d);
        Share<HS>& share = memory.shares[rank];
        send(&share.o[d], to, all.o, &memory.shares_box);
        if (d == 0) {
            send(&share.max, to, all.max, &memory.shares_box);
            send(&share.total, to, all.total, &memory.shares_box);
        }
    }
    cp_async_wait<0>();
    wait_for(&memory.shares_box);
    for (int d = tid; d < HS; d += kHalfThreads) {
        const Merged all = merge_shares(memory.shares, kClusterBlocks, d);
        memory.att[d] = all.o / all.total;
    }
    __syncthreads();
    multiply_columns<C, HS>(parts + head * C + out, memory.columns, memory.att);

    // The page's bounds are those of the tokens before, which other kernels have put there.
    if (rank < kClusterBlocks - 1) return;
    for (int d = tid; d < HS; d += kHalfThreads) {
        const Float x = (Float)newest_k[d];
        cache.k[place + (size_t)newest * HS + d] = x;
        cache.v[place + (size_t)newest * HS + d] = (Float)newest_v[d];
        const size_t page = place / kPageTokens + (size_t)(newest / kPageTokens) * HS + d;
        const bool begins = newest % kPageTokens == 0;
        if (begins || (float)x < (float)cache.low[page]) cache.low[page] = x;
        if (begins || (float)x > (float)cache.high[page]) cache.high[page] = x;
    }
}

// out [C] = the sum of a stream.
template <class Float>
__global__ void finish_stream_kernel(Float* out, Stream<Float> in, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    start_next_kernel();
    const float bias = c < C ? (float)in.bias[c] : 0.0f;
    wait_for_previous_kernel();
    if (c >= C) return;
    float sum = load_behind(in.x + c) + bias;
#pragma unroll 8
    for (int i = 0; i < in.count; i++) sum += __ldcg(in.parts + (size_t)i * C + c);
    out[c] = (Float)sum;
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Calls body(C) with C as a compile-time constant, if the kernels are compiled for so many channels.
template <class Float, class Body>
bool with_half_channels(int C, Body body) {
    switch (C) {
        case 128:
            return body(std::integral_constant<int, 128>()), true;
        case 768:
            return body(std::integral_constant<int, 768>()), true;
        case 1024:
            if constexpr (sizeof(Float) == 2)  // twice as much does not fit into shared memory
                return body(std::integral_constant<int, 1024>()), true;
    }
    return false;
}

// Whether a token's layers can be done in halves. capacity: of the cache.
template <class Float>
bool takes_decode_halves(const Context& ctx, int C, int hs, int capacity, DecodeHow how) {
    if (!ctx.use_decode_halves || ctx.row_lanes == 1 || hs != kHalfHeadSize) return false;
    if (how.mode == DecodeMode::pages) return false;
    if (how.mode == DecodeMode::topk && capacity > kHalfKeys<Float>) return false;
    return with_half_channels<Float>(C, [](auto) {});
}

// Floats of the parts that a half makes, at most.
inline size_t decode_parts(int C) {
    return (size_t)C * most_half_parts(C);
}

template <class Memory, class... Params, class... Args>
void launch_half(const Context& ctx, void (*kernel)(Params...), int clusters, Args... args) {
    static_assert(sizeof(Memory) < (227 << 10));  // what a block of a GPU with clusters can have
    allow_shared(kernel, sizeof(Memory));
    // A block of the next half comes to a multiprocessor beside one of this half, which is not divided anew
    // between L1 cache and shared memory as long as a block is there: so all of it from the beginning.
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
    launch_clusters(ctx, kernel, clusters, kClusterBlocks, kHalfThreads, sizeof(Memory), args...);
}

// The attention half of a layer of C channels: parts [C/64,C] and kept [C] make the next half's stream, with
// the bias of attproj. The cache's older tokens and the position [1] must have been there before a kernel
// that lets the next one start only after its own wait, as the encoder does. parts and kept are not those of
// `in`.
template <class Float>
void decode_attention_half(const Context& ctx, float* parts, Float* kept, Stream<Float> in,
                           const LayerParams<Float>& p, const KvCache<Float>& cache, const int* position,
                           int channels, DecodeHow how) {
    assert(takes_decode_halves<Float>(ctx, channels, kHalfHeadSize, cache.capacity, how));
    assert(kept != in.x && parts != in.parts);
    with_half_channels<Float>(channels, [&](auto constant) {
        constexpr int C = constant;
        const auto launch = [&](auto kernel, auto* memory) {
            launch_half<std::remove_pointer_t<decltype(memory)>>(ctx, kernel, HalfShape<C>::heads, parts,
                                                                 kept, in, p, cache, position, how.topk);
        };
        if (how.mode == DecodeMode::topk)
            launch(decode_attention_half_kernel<Float, C, true>, (TopAttentionMemory<Float, C>*)nullptr);
        else
            launch(decode_attention_half_kernel<Float, C, false>, (AttentionMemory<Float, C>*)nullptr);
    });
}

// The MLP half: parts [16,C] and kept [C] make the next half's stream, with the bias of fcproj.
template <class Float>
void decode_mlp_half(const Context& ctx, float* parts, Float* kept, Stream<Float> in,
                     const LayerParams<Float>& p, int channels) {
    assert(takes_decode_halves<Float>(ctx, channels, kHalfHeadSize, 0, {}));
    assert(kept != in.x && parts != in.parts);
    with_half_channels<Float>(channels, [&](auto constant) {
        constexpr int C = constant;
        launch_half<MlpMemory<Float, C>>(ctx, decode_mlp_half_kernel<Float, C>, kMlpSlices, parts, kept, in,
                                         p);
    });
}

// out [C] = the stream's sum; it may be the stream's x.
template <class Float>
void finish_stream(const Context& ctx, Float* out, Stream<Float> in, int C) {
    launch_early(ctx, finish_stream_kernel<Float>, ceil_div(C, 128), 128, 0, out, in, C);
}
