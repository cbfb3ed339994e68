// Attention in bf16 on tensor cores (mma.sync, compute capability 8.0 and newer); the mathematics is in
// attention.cuh.
//
// Forward: one warp owns 16 queries and walks over the keys in tiles of 64, with scores, probabilities and
// outputs in registers all the way (FlashAttention-2, arXiv 2307.08691). The top k are found on the way: each
// thread sees a quarter of its rows' scores and keeps the LIST largest of them, sorted; per tile it sorts its
// 16 new scores and merges, in networks of max and min without a branch. At the end of a row its four threads
// merge. The result is exact whenever each thread's smallest kept score is below the (k+1)-th largest of the
// row: nothing that was dropped can then matter. A row for which that does not hold, or whose k-th and
// (k+1)-th score are equal, is marked and done again by attention_select_bf16_kernel.
//
// Backward: one block owns 128 keys, 16 a warp, whose dk and dv stay in registers while the queries pass by
// in tiles: five products a tile. dq is a sum over blocks. It is added to in the L2 cache, in one fixed
// order, from the last keys to the first: block j may add to a tile of queries when block j + 1 has. Since
// each block starts at its own diagonal, block j + 1 is always two tiles ahead, and nobody waits for long.
//
// Scores are the same bits wherever they are computed: always the same mma over 16 dimensions at a time, in
// order, with the scale multiplied in at the same place.
#pragma once
#include "attention_common.cuh"
#include "mma.cuh"

inline constexpr float kLog2e = 1.44269504f;

// Head sizes are padded to HS = 32, 64 or 128. 64 means exactly that: its scale, 1/8, is a power of two and
// can be multiplied into the fragments of q (or k) without rounding; for the others each score is multiplied.
template <int HS>
inline constexpr bool kScaleFirst = HS == 64;

template <class Body>
void with_mma_head_size(int hs, Body body) {
    assert(hs % 8 == 0 && hs <= 128);
    if (hs <= 32)
        body(std::integral_constant<int, 32>());
    else if (hs == 64)
        body(std::integral_constant<int, 64>());
    else
        body(std::integral_constant<int, 128>());
}

// Starts the copy of ROWS rows of x to a swizzled tile; rows from `valid` on and columns from hs on become
// zero. A thread copies the same chunk of every STEP-th row: STEP is a multiple of 8, so the chunk's place in
// the row is too.
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows_async(__nv_bfloat16* tile, const __nv_bfloat16* x, size_t stride,
                                                int valid, int hs) {
    constexpr int chunks = HS / 8, STEP = THREADS / chunks;
    static_assert(STEP % 8 == 0);
    const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
    const SharedAddress to = shared_address(tile + swizzled<HS>(row, chunk));
    const __nv_bfloat16* from = x + row * stride + chunk * 8;
    const bool column = HS == 64 || chunk * 8 < hs;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP) {
        if (ROWS % STEP && row + r >= ROWS) break;
        const bool inside = column && row + r < valid;
        cp_async_16(to + r * HS * (int)sizeof(__nv_bfloat16), inside ? from + r * stride : x, inside);
    }
}

// Writes a warp's 16 rows of accumulators, times `factor[half]` for rows g and g + 8, to global memory as
// bf16, by way of its own rows of a swizzled tile, so that whole rows leave 16 bytes at a time.
template <int HS>
__device__ __forceinline__ void store_rows(__nv_bfloat16* out, size_t stride, int valid, int hs,
                                           __nv_bfloat16* tile, int row0, const float (&x)[HS / 8][4],
                                           float factor0, float factor1) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        const uint32_t upper = pack_bf16(x[n][0] * factor0, x[n][1] * factor0);
        const uint32_t lower = pack_bf16(x[n][2] * factor1, x[n][3] * factor1);
        memcpy(tile + swizzled<HS>(row0 + g, n) + 2 * t, &upper, sizeof upper);
        memcpy(tile + swizzled<HS>(row0 + g + 8, n) + 2 * t, &lower, sizeof lower);
    }
    __syncwarp();
    constexpr int chunks = HS / 8;
#pragma unroll
    for (int i = lane; i < 16 * chunks; i += 32) {
        const int row = i / chunks, chunk = i % chunks;
        if (row < valid && (HS == 64 || chunk * 8 < hs))
            store_pack(out + row * stride + chunk * 8, load_pack(tile + swizzled<HS>(row0 + row, chunk)));
    }
}

// a times a power of two, which is exact.
__device__ __forceinline__ void scale_fragment(uint32_t (&a)[4], float factor) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low, high;
        unpack_bf16(a[i], low, high);
        a[i] = pack_bf16(low * factor, high * factor);
    }
}

// Largest and sum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---------------------------------------------------------------------------------------------------------
// sorting networks

struct Comparators {
    int count = 0;
    int first[192] = {}, second[192] = {};
};

// Batcher's odd-even merge sort of N (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M).
template <int N>
constexpr Comparators sort_comparators() {
    Comparators c;
    for (int p = 1; p < N; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < N; j += 2 * k)
                for (int i = 0; i < k && i + j + k < N; i++)
                    if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) {
                        c.first[c.count] = i + j;
                        c.second[c.count++] = i + j + k;
                    }
    return c;
}
// What sorts a bitonic sequence of N (one that rises, then falls, wherever it starts).
template <int N>
constexpr Comparators bitonic_comparators() {
    Comparators c;
    for (int k = N / 2; k >= 1; k /= 2)
        for (int i = 0; i < N; i++)
            if (!(i & k)) {
                c.first[c.count] = i;
                c.second[c.count++] = i + k;
            }
    return c;
}

// The larger to the front. Template arguments, so that the array's elements are registers.
template <int I, int J>
__device__ __forceinline__ void exchange(float* x) {
    const float larger = fmaxf(x[I], x[J]);
    x[J] = fminf(x[I], x[J]);
    x[I] = larger;
}
template <int N, bool SORT>
inline constexpr Comparators kNetwork = SORT ? sort_comparators<N>() : bitonic_comparators<N>();

template <int N, bool SORT, int... I>
__device__ __forceinline__ void run_network(float* x, std::integer_sequence<int, I...>) {
    (exchange<kNetwork<N, SORT>.first[I], kNetwork<N, SORT>.second[I]>(x), ...);
}
template <int N>
__device__ __forceinline__ void sort_registers(float* x) {
    run_network<N, true>(x, std::make_integer_sequence<int, kNetwork<N, true>.count>());
}
template <int N>
__device__ __forceinline__ void sort_bitonic(float* x) {
    run_network<N, false>(x, std::make_integer_sequence<int, kNetwork<N, false>.count>());
}

// Merges 16 scores in any order into the descending list of the LIST largest so far. Of two descending lists
// a and b of n, max(a[i], b[n-1-i]) are the n largest, as a bitonic sequence.
template <int LIST>
__device__ __forceinline__ void merge_into_list(float (&list)[LIST], float (&fresh)[16]) {
    if constexpr (LIST == 8) {
        sort_registers<8>(fresh);
        sort_registers<8>(fresh + 8);
#pragma unroll
        for (int i = 0; i < 8; i++) fresh[i] = fmaxf(fresh[i], fresh[15 - i]);
        sort_bitonic<8>(fresh);
#pragma unroll
        for (int i = 0; i < 8; i++) list[i] = fmaxf(list[i], fresh[7 - i]);
    } else {
        sort_registers<16>(fresh);
#pragma unroll
        for (int i = 0; i < 16; i++) list[LIST - 16 + i] = fmaxf(list[LIST - 16 + i], fresh[15 - i]);
    }
    sort_bitonic<LIST>(list);
}
// The same with what a thread has of row g + 8 h of the scores for 64 keys.
template <int LIST>
__device__ __forceinline__ void merge_into_list(float (&list)[LIST], const float (&s)[8][4], int h) {
    float fresh[16];
#pragma unroll
    for (int i = 0; i < 16; i++) fresh[i] = s[i / 2][2 * h + i % 2];
    merge_into_list(list, fresh);
}

// ---------------------------------------------------------------------------------------------------------
// forward

// rows.tie of a row that the select kernel must do again.
inline constexpr float kRowMarked = -1.0f;

// Merges the descending lists of the four lanes that share a row: the LIST largest of all, descending, in
// each lane. Returns the largest of the others.
template <int LIST>
__device__ __forceinline__ float merge_lists(float (&list)[LIST]) {
    float dropped = -INFINITY;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        dropped = fmaxf(dropped, __shfl_xor_sync(0xffffffffu, dropped, step));
        float other[LIST];
#pragma unroll
        for (int i = 0; i < LIST; i++) other[i] = __shfl_xor_sync(0xffffffffu, list[LIST - 1 - i], step);
#pragma unroll
        for (int i = 0; i < LIST; i++) {
            dropped = fmaxf(dropped, fminf(list[i], other[i]));
            list[i] = fmaxf(list[i], other[i]);
        }
        sort_bitonic<LIST>(list);
    }
    return dropped;
}

// The end of a row: the four lists' k largest, their mass, the threshold behind them. `lists` are used up.
template <int LIST>
__device__ __forceinline__ void finish_row(const AttentionRows& rows, size_t row, bool writes, int n,
                                           int topk, float (&list)[LIST], float lse) {
    const int lane = threadIdx.x % 32;
    const unsigned quad = 0xfu << (lane & ~3);
    const float last = list[LIST - 1];
    float kth = -INFINITY, next = -INFINITY, mass = 0.0f;
    if (topk <= LIST) {
        next = merge_lists(list);
        kth = INFINITY;
#pragma unroll
        for (int i = 0; i < LIST; i++) {
            kth = fminf(kth, i < topk ? list[i] : INFINITY);
            next = fmaxf(next, i < topk ? -INFINITY : list[i]);
            mass += i < topk ? fast_exp2((list[i] - lse) * kLog2e) : 0.0f;
        }
    } else {  // one after another: of the lanes that have the largest, the first gives it up
#pragma unroll 1
        for (int place = 0; place < topk; place++) {
            kth = quad_max(list[0]);
            mass += fast_exp2((kth - lse) * kLog2e);
            const unsigned holders = __ballot_sync(0xffffffffu, list[0] == kth) & quad;
            const bool mine = __ffs(holders) - 1 == lane;
#pragma unroll
            for (int i = 0; i < LIST - 1; i++) list[i] = mine ? list[i + 1] : list[i];
            list[LIST - 1] = mine ? -INFINITY : list[LIST - 1];
        }
        next = quad_max(list[0]);
    }
    const bool proven = (__ballot_sync(0xffffffffu, last >= next) & quad) == 0 && kth > next;
    if (!writes) return;
    const bool all = n <= topk;
    rows.theta[row] = all ? -INFINITY : threshold_between(kth, next);
    rows.mass[row] = all ? 1.0f : fminf(mass, 1.0f);
    rows.tie[row] = all || proven ? 0.0f : kRowMarked;
}

// Blocks of 4 warps that should share a multiprocessor: what the registers allow when the compiler is held to
// it (128, 168 or 255 a thread).
constexpr int forward_blocks(int HS, int LIST) {
    return HS == 128 ? (LIST <= 8 ? 2 : 1) : LIST == 0 ? 4 : LIST <= 16 ? 3 : 2;
}

// One block: 16 WARPS queries of one head. LIST = 0: no top-k.
template <int HS, int WARPS, int LIST>
__global__ void __launch_bounds__(WARPS * 32, forward_blocks(HS, LIST))
    attention_forward_bf16_kernel(__nv_bfloat16* out, AttentionRows rows, const __nv_bfloat16* qkv, int T,
                                  int num_heads, int hs, int topk) {
    constexpr int QUERIES = 16 * WARPS, KEYS = 64;
    constexpr bool q_in_registers = HS <= 64;
    extern __shared__ __align__(kTileAlignment) unsigned char tiles[];
    __nv_bfloat16* q_tile = (__nv_bfloat16*)tiles;   // [QUERIES][HS]
    __nv_bfloat16* k_tiles = q_tile + QUERIES * HS;  // [2][KEYS][HS]
    __nv_bfloat16* v_tiles = k_tiles + 2 * KEYS * HS;

    const int C = num_heads * hs, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
              t = lane % 4;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;  // the longest rows start first
    const int warp_query = first_query + 16 * warp;
    const size_t stride = 3 * (size_t)C;
    const __nv_bfloat16* q = qkv + (size_t)b * T * stride + head * hs;
    const __nv_bfloat16 *k = q + C, *v = q + 2 * C;
    const float scale = 1.0f / sqrtf((float)hs);
    const int num_tiles = (min(first_query + QUERIES, T) - 1) / KEYS + 1;

    copy_rows_async<HS, QUERIES, WARPS * 32>(q_tile, q + first_query * stride, stride, T - first_query, hs);
    cp_async_commit();
    const auto copy_keys = [&](int tile) {
        const size_t first = (size_t)tile * KEYS * stride;
        const int valid = T - tile * KEYS, at = tile % 2 * KEYS * HS;
        copy_rows_async<HS, KEYS, WARPS * 32>(k_tiles + at, k + first, stride, valid, hs);
        copy_rows_async<HS, KEYS, WARPS * 32>(v_tiles + at, v + first, stride, valid, hs);
        cp_async_commit();
    };
    copy_keys(0);

    const SharedAddress q_piece = first_piece<HS, Order::rows>(q_tile);
    const SharedAddress k_piece = first_piece<HS, Order::columns>(k_tiles);
    const SharedAddress v_piece = first_piece<HS, Order::rows>(v_tiles);
    uint32_t q_fragment[q_in_registers ? HS / 16 : 1][4];
    if (q_in_registers) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < HS / 16; kk++) {
            load_a<HS>(q_fragment[q_in_registers ? kk : 0], q_piece, 16 * warp, kk);
            if (kScaleFirst<HS>) scale_fragment(q_fragment[q_in_registers ? kk : 0], scale);
        }
    }
    float o[HS / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float list[2][LIST > 0 ? LIST : 1];
    if constexpr (LIST > 0)
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < LIST; i++) list[h][i] = -INFINITY;

    for (int tile = 0; tile < num_tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and everybody is done with the one before
        if (tile + 1 < num_tiles) copy_keys(tile + 1);
        const int first_key = tile * KEYS;
        const int buffer = tile % 2 * KEYS * HS * (int)sizeof(__nv_bfloat16);
        if (first_key > warp_query + 15) continue;  // keys that none of this warp's queries sees

        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < HS / 16; kk++) {
            if (!q_in_registers) load_a<HS>(q_fragment[0], q_piece, 16 * warp, kk);
            const uint32_t(&a)[4] = q_fragment[q_in_registers ? kk : 0];
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b0[2], b1[2];
                load_b_transposed<HS>(b0, b1, k_piece + buffer, 16 * n, kk);
                mma_m16n8k16_bf16(s[2 * n], a, b0);
                mma_m16n8k16_bf16(s[2 * n + 1], a, b1);
            }
        }
        if (!kScaleFirst<HS>) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 0; e < 4; e++) s[n][e] *= scale;
        }
        if (first_key + KEYS - 1 > warp_query) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 0; e < 4; e++)
                    if (first_key + 8 * n + 2 * t + e % 2 > warp_query + g + e / 2 * 8) s[n][e] = -INFINITY;
        }

#pragma unroll
        for (int h = 0; h < 2; h++) {  // rows g and g + 8
            if constexpr (LIST > 0) merge_into_list(list[h], s, h);
            float tile_max = s[0][2 * h];
#pragma unroll
            for (int i = 1; i < 16; i++) tile_max = fmaxf(tile_max, s[i / 2][2 * h + i % 2]);
            const float new_max = fmaxf(max[h], quad_max(tile_max));
            const float rescale = fast_exp2((max[h] - new_max) * kLog2e), max2 = new_max * kLog2e;
            max[h] = new_max;
            sum[h] *= rescale;
#pragma unroll
            for (int n = 0; n < HS / 8; n++) {
                o[n][2 * h] *= rescale;
                o[n][2 * h + 1] *= rescale;
            }
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float& x = s[i / 2][2 * h + i % 2];
                x = fast_exp2(fmaf(x, kLog2e, -max2));
                sum[h] += x;
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            const uint32_t p[4] = {pack_bf16(s[2 * j][0], s[2 * j][1]), pack_bf16(s[2 * j][2], s[2 * j][3]),
                                   pack_bf16(s[2 * j + 1][0], s[2 * j + 1][1]),
                                   pack_bf16(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < HS / 16; n++) {
                uint32_t b0[2], b1[2];
                load_b<HS>(b0, b1, v_piece + buffer, 16 * j, n);
                mma_m16n8k16_bf16(o[2 * n], p, b0);
                mma_m16n8k16_bf16(o[2 * n + 1], p, b1);
            }
        }
    }

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float total = quad_sum(sum[h]);
        inverse[h] = 1.0f / total;
        const float lse = max[h] + logf(total);
        const int i = warp_query + g + 8 * h;
        const size_t row = (size_t)blockIdx.y * T + i;
        const bool writes = t == 0 && i < T;
        if (writes) rows.lse[row] = lse;
        if constexpr (LIST > 0) finish_row(rows, row, writes, i + 1, topk, list[h], lse);
    }
    __syncwarp();  // q_tile's rows are this warp's alone, and it has read them
    store_rows<HS>(out + ((size_t)b * T + warp_query) * C + head * hs, C, T - warp_query, hs, q_tile,
                   16 * warp, o, inverse[0], inverse[1]);
}

// The scores of one query, as the forward computed them, to s[0 ... i]: mma with that query as the only row
// of A.
template <int HS>
__device__ void score_row(float* s, const __nv_bfloat16* q, const __nv_bfloat16* k, size_t stride, int i,
                          int hs) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const float scale = 1.0f / sqrtf((float)hs);
    const auto pair = [&](const __nv_bfloat16* x, size_t row, int d) {
        return d < hs ? *reinterpret_cast<const uint32_t*>(x + row * stride + d) : 0u;
    };
    uint32_t a[HS / 16][4];
    for (int kk = 0; kk < HS / 16; kk++) {
        a[kk][0] = g == 0 ? pair(q, i, 16 * kk + 2 * t) : 0;
        a[kk][2] = g == 0 ? pair(q, i, 16 * kk + 8 + 2 * t) : 0;
        a[kk][1] = a[kk][3] = 0;
        if (kScaleFirst<HS>) scale_fragment(a[kk], scale);
    }
#pragma unroll 2
    for (int first = 8 * warp; first <= i; first += 8 * (blockDim.x / 32)) {
        const int key = min(first + g, i);
        float d[4] = {};
        for (int kk = 0; kk < HS / 16; kk++) {
            const uint32_t b[2] = {pair(k, key, 16 * kk + 2 * t), pair(k, key, 16 * kk + 8 + 2 * t)};
            mma_m16n8k16_bf16(d, a[kk], b);
        }
        for (int e = 0; e < 2; e++)
            if (g == 0 && first + 2 * t + e <= i)
                s[first + 2 * t + e] = kScaleFirst<HS> ? d[e] : d[e] * scale;
    }
}

// One block: kSelectRows of all rows, of which it does those that the forward marked, or all. Marked rows
// come in crowds: where the largest scores of a head belong to the same few keys in most rows, and these keys
// are one thread's, most of its rows are marked, in this sequence and maybe in others of the batch. So a
// block's rows are far apart, in different heads.
inline constexpr int kSelectRows = 128;  // and threads
template <int HS>
__global__ void attention_select_bf16_kernel(AttentionRows rows, const __nv_bfloat16* qkv, int T,
                                             int num_heads, int hs, int topk, bool all, int num_rows) {
    extern __shared__ float4 shared[];
    float* s = (float*)shared;  // [T]
    __shared__ unsigned char todo[kSelectRows];
    const int own_row = blockIdx.x + threadIdx.x * gridDim.x;
    const bool own = own_row < num_rows && (all || rows.tie[own_row] == kRowMarked);
    if (!__syncthreads_or(own)) return;  // as most blocks do
    todo[threadIdx.x] = own;
    __syncthreads();
    const int C = num_heads * hs;
    const size_t stride = 3 * (size_t)C;
    for (int r = 0; r < kSelectRows; r++) {
        if (!todo[r]) continue;
        const int row = blockIdx.x + r * gridDim.x, head = row / T, n = row % T + 1;
        const __nv_bfloat16* q = qkv + (size_t)(head / num_heads) * T * stride + head % num_heads * hs;
        if (n > topk) score_row<HS>(s, q, q + C, stride, n - 1, hs);
        __syncthreads();
        select_top(rows, row, s, n, topk);
        __syncthreads();
    }
}

// Selects the top k of the rows that the forward marked, or of all. T is at most max_select_context.
inline void attention_select_bf16(const Context& ctx, AttentionRows rows, const __nv_bfloat16* qkv, int B,
                                  int T, int num_heads, int hs, int topk, bool all) {
    assert(T <= max_select_context(ctx));
    const int num_rows = B * num_heads * T;
    with_mma_head_size(hs, [&](auto size) {
        // from one of a block's rows to the next: a head further than a 128th of them
        const int blocks = std::min(num_rows, ceil_div(num_rows, kSelectRows) + T + 1);
        launch_attention(ctx, attention_select_bf16_kernel<size>, dim3(blocks), kSelectRows,
                         T * sizeof(float), rows, qkv, T, num_heads, hs, topk, all, num_rows);
    });
}

// ---------------------------------------------------------------------------------------------------------
// backward

// What the backward needs of a row, in one 16-byte load.
struct __align__(16) RowNumbers {
    float lse2;   // lse / ln 2
    float delta;  // D + c M; for entropy D + c E
    float theta;  // as the forward saved it, in the unit in which the kernel has its scores
    float slope;  // c, 0 where the row is not regularized; its last bit says whether the row's k-th score is
                  // tied. For entropy c for a score in the kernel's unit
};
__device__ __forceinline__ bool is_tied(const RowNumbers& r) {
    return __float_as_uint(r.slope) & 1;
}

// Eight threads a row. unit: what a score of 1 is in the kernel's scores, a power of two.
[[maybe_unused]] static __global__ void attention_row_numbers_kernel(
    RowNumbers* numbers, const __nv_bfloat16* dout, const __nv_bfloat16* out, AttentionRows rows, Reg reg,
    const float* weight, int T, int num_heads, int hs, int topk, int num_rows, float unit) {
    constexpr int N = Pack<__nv_bfloat16>::size;
    const int row = min((int)(blockIdx.x * blockDim.x + threadIdx.x) / 8, num_rows - 1),
              lane = threadIdx.x % 8;
    const int i = row % T, head = row / T % num_heads, b = row / T / num_heads;
    const size_t offset = ((size_t)b * T + i) * num_heads * hs + head * hs;
    float D = 0.0f;
    for (int d = lane * N; d < hs; d += 8 * N) {
        const Pack<__nv_bfloat16> x = load_pack(dout + offset + d), y = load_pack(out + offset + d);
        for (int e = 0; e < N; e++) D += (float)x[e] * (float)y[e];
    }
    for (int step = 4; step > 0; step /= 2) D += __shfl_xor_sync(0xffffffffu, D, step);
    if (lane != 0 || (int)(blockIdx.x * blockDim.x + threadIdx.x) / 8 != row) return;
    RowNumbers r = {rows.lse[row] * kLog2e, D, INFINITY, 0.0f};
    if (weight && i + 1 > topk && reg == Reg::entropy) {
        r.slope = -*weight / unit;
        r.delta -= *weight * rows.mean_score[row];
    } else if (weight && i + 1 > topk) {
        r.slope = *weight * reg_slope(reg, rows.mass[row]);
        r.delta += r.slope * rows.mass[row];
        r.theta = rows.theta[row] * unit;
        const unsigned tied = rows.tie[row] != 0.0f ? 1 : 0;
        r.slope = __uint_as_float((__float_as_uint(r.slope) & ~1u) | tied);
    }
    numbers[row] = r;
}

inline constexpr int kBackwardKeys = 128, kBackwardWarps = 8;

// Bytes of shared memory of a block of the backward.
template <int HS, int QUERIES>
inline constexpr size_t kBackwardShared = (2 * kBackwardKeys * HS + 4 * QUERIES * HS +
                                           kBackwardKeys * QUERIES) *
                                              sizeof(__nv_bfloat16) +
                                          2 * QUERIES * sizeof(RowNumbers);

// Calls body(HS, QUERIES), compile-time constants: the padded head size, and the queries of a tile, as many
// as there is room for. With 128 dimensions 32 take 105 KB, and a block has 99 where the compute capability
// is 8.6, 8.9 or 12.x.
template <class Body>
void with_backward_tile(const Context& ctx, int hs, Body body) {
    with_mma_head_size(hs, [&](auto size) {
        if constexpr (size <= 64)
            body(size, std::integral_constant<int, 64>());
        else if (kBackwardShared<size, 32> <= ctx.max_shared)
            body(size, std::integral_constant<int, 32>());
        else
            body(size, std::integral_constant<int, 16>());
    });
}

// Flags of the backward: a ticket counter, then one for each tile of queries and each warp. In ints.
inline size_t attention_backward_flags(int B, int T, int num_heads, int queries) {
    return 1 + (size_t)B * num_heads * ceil_div(T, queries) * kBackwardWarps;
}

// One block: kBackwardKeys keys of one head, over the tiles of queries that see them. dq_sum [B*NH,T,HS] and
// flags (zero) are scratch.
template <int HS, int QUERIES, Pull PULL>
__global__ void __launch_bounds__(kBackwardWarps * 32, 1)
    attention_backward_bf16_kernel(__nv_bfloat16* dqkv, float* dq_sum, int* flags, const __nv_bfloat16* dout,
                                   const __nv_bfloat16* qkv, const RowNumbers* numbers, const float* tie,
                                   int T, int num_heads, int hs) {
    constexpr int KEYS = kBackwardKeys, THREADS = kBackwardWarps * 32;
    constexpr bool keys_in_registers = HS <= 64;  // the values' fragments would not fit besides
    extern __shared__ __align__(kTileAlignment) unsigned char tiles[];
    __nv_bfloat16* k_tile = (__nv_bfloat16*)tiles;                    // [KEYS][HS]
    __nv_bfloat16* v_tile = k_tile + KEYS * HS;                       // [KEYS][HS]
    __nv_bfloat16* q_tiles = v_tile + KEYS * HS;                      // [2][QUERIES][HS]
    __nv_bfloat16* do_tiles = q_tiles + 2 * QUERIES * HS;             // [2][QUERIES][HS]
    __nv_bfloat16* ds_tile = do_tiles + 2 * QUERIES * HS;             // [KEYS][QUERIES]
    RowNumbers* row_tiles = (RowNumbers*)(ds_tile + KEYS * QUERIES);  // [2][QUERIES]
    __shared__ int ticket;

    // Work is handed out in the order in which blocks start, the last keys of a head first: whoever waits for
    // a flag waits for a block that is running already.
    if (threadIdx.x == 0) ticket = atomicAdd(flags, 1);
    __syncthreads();
    const int num_key_tiles = ceil_div(T, KEYS), num_query_tiles = ceil_div(T, QUERIES);
    const int bh = ticket / num_key_tiles, key_tile = num_key_tiles - 1 - ticket % num_key_tiles;
    const int C = num_heads * hs, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
              t = lane % 4;
    const int b = bh / num_heads, head = bh % num_heads, first_key = key_tile * KEYS;
    const int warp_key = first_key + 16 * warp;
    const size_t stride = 3 * (size_t)C;
    const __nv_bfloat16* q = qkv + (size_t)b * T * stride + head * hs;
    const __nv_bfloat16 *k = q + C, *v = q + 2 * C;
    const __nv_bfloat16* dout_head = dout + (size_t)b * T * C + head * hs;
    const float scale = 1.0f / sqrtf((float)hs);
    int* const tile_flags = flags + 1 + (size_t)bh * num_query_tiles * kBackwardWarps + warp;

    copy_rows_async<HS, KEYS, THREADS>(k_tile, k + first_key * stride, stride, T - first_key, hs);
    copy_rows_async<HS, KEYS, THREADS>(v_tile, v + first_key * stride, stride, T - first_key, hs);
    cp_async_commit();
    const auto copy_queries = [&](int tile) {
        const int first = tile * QUERIES, at = tile % 2 * QUERIES;
        copy_rows_async<HS, QUERIES, THREADS>(q_tiles + at * HS, q + first * stride, stride, T - first, hs);
        copy_rows_async<HS, QUERIES, THREADS>(do_tiles + at * HS, dout_head + (size_t)first * C, C, T - first,
                                              hs);
        // Rows from T on are zero throughout: p = 1, but dout = 0 and delta = 0, so they add nothing.
        if (threadIdx.x < QUERIES) {
            const int i = first + threadIdx.x;
            cp_async_16(shared_address(row_tiles + at + threadIdx.x),
                        numbers + (size_t)bh * T + min(i, T - 1), i < T);
        }
        cp_async_commit();
    };
    const int first_tile = first_key / QUERIES;
    copy_queries(first_tile);

    // dq of 16 queries and COLUMNS of the head's dimensions, a warp
    constexpr int row_groups = QUERIES / 16, COLUMNS = HS * row_groups / kBackwardWarps;
    const int dq_row = warp % row_groups * 16, dq_column = warp / row_groups * COLUMNS;
    const SharedAddress k_rows = first_piece<HS, Order::rows>(k_tile),
                        v_rows = first_piece<HS, Order::rows>(v_tile);
    const SharedAddress q_rows = first_piece<HS, Order::rows>(q_tiles),
                        do_rows = first_piece<HS, Order::rows>(do_tiles);
    const SharedAddress q_columns = first_piece<HS, Order::columns>(q_tiles);
    const SharedAddress do_columns = first_piece<HS, Order::columns>(do_tiles);
    const SharedAddress ds_columns = first_piece<QUERIES, Order::columns>(ds_tile);

    uint32_t k_fragment[keys_in_registers ? HS / 16 : 1][4], v_fragment[4];
    if (keys_in_registers) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < HS / 16; kk++) {
            load_a<HS>(k_fragment[keys_in_registers ? kk : 0], k_rows, 16 * warp, kk);
            if (kScaleFirst<HS>) scale_fragment(k_fragment[keys_in_registers ? kk : 0], scale);
        }
    }
    float dk[HS / 8][4] = {}, dv[HS / 8][4] = {};
    for (int tile = first_tile; tile < num_query_tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and everybody is done with the one before
        if (tile + 1 < num_query_tiles) copy_queries(tile + 1);
        const int buffer = tile % 2 * QUERIES * HS * (int)sizeof(__nv_bfloat16);
        const RowNumbers* row_tile = row_tiles + tile % 2 * QUERIES;
        const int first_query = tile * QUERIES;

        // s and dp, transposed: [16 keys][QUERIES]
        float s[QUERIES / 8][4] = {}, dp[QUERIES / 8][4] = {};
        if (warp_key < first_query + QUERIES) {
#pragma unroll
            for (int kk = 0; kk < HS / 16; kk++) {
                if (!keys_in_registers) load_a<HS>(k_fragment[0], k_rows, 16 * warp, kk);
                load_a<HS>(v_fragment, v_rows, 16 * warp, kk);
                const int at = keys_in_registers ? kk : 0;
#pragma unroll
                for (int n = 0; n < QUERIES / 16; n++) {
                    uint32_t b0[2], b1[2];
                    load_b_transposed<HS>(b0, b1, q_columns + buffer, 16 * n, kk);
                    mma_m16n8k16_bf16(s[2 * n], k_fragment[at], b0);
                    mma_m16n8k16_bf16(s[2 * n + 1], k_fragment[at], b1);
                    load_b_transposed<HS>(b0, b1, do_columns + buffer, 16 * n, kk);
                    mma_m16n8k16_bf16(dp[2 * n], v_fragment, b0);
                    mma_m16n8k16_bf16(dp[2 * n + 1], v_fragment, b1);
                }
            }
            // Rows whose k-th score is tied are rare: only a tile that has one looks for the keys.
            if (PULL == Pull::topk) {
                bool ties = false;
                for (int i = lane; i < QUERIES; i += 32) ties |= is_tied(row_tile[i]);
                if (__any_sync(0xffffffffu, ties))
#pragma unroll
                    for (int n = 0; n < QUERIES / 8; n++)
                        for (int e = 0; e < 4; e++) {
                            const int i = 8 * n + 2 * t + e % 2;
                            const float score = kScaleFirst<HS> ? s[n][e] : s[n][e] * scale;
                            if (score == row_tile[i].theta)
                                dp[n][e] +=
                                    row_tile[i].slope * tie[(size_t)bh * T + min(first_query + i, T - 1)];
                        }
            }
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const RowNumbers row[2] = {row_tile[8 * n + 2 * t], row_tile[8 * n + 2 * t + 1]};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const RowNumbers& r = row[e % 2];
                    const float score = kScaleFirst<HS> ? s[n][e] : s[n][e] * scale;
                    const float p = fast_exp2(fmaf(score, kLog2e, -r.lse2));
                    float gradient = dp[n][e] - r.delta;
                    if (PULL == Pull::topk) gradient += score > r.theta ? r.slope : 0.0f;
                    if (PULL == Pull::entropy) gradient = fmaf(r.slope, score, gradient);
                    s[n][e] = p;
                    dp[n][e] = p * gradient;
                }
            }
            if (warp_key + 15 > first_query) {
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++)
                    for (int e = 0; e < 4; e++)
                        if (warp_key + g + e / 2 * 8 > first_query + 8 * n + 2 * t + e % 2)
                            s[n][e] = dp[n][e] = 0.0f;
            }
        }

        // dv += p^T dout, dk += ds^T q; ds also goes to shared memory, for dq
#pragma unroll
        for (int j = 0; j < QUERIES / 16; j++) {
            const uint32_t p[4] = {pack_bf16(s[2 * j][0], s[2 * j][1]), pack_bf16(s[2 * j][2], s[2 * j][3]),
                                   pack_bf16(s[2 * j + 1][0], s[2 * j + 1][1]),
                                   pack_bf16(s[2 * j + 1][2], s[2 * j + 1][3])};
            const uint32_t ds[4] = {
                pack_bf16(dp[2 * j][0], dp[2 * j][1]), pack_bf16(dp[2 * j][2], dp[2 * j][3]),
                pack_bf16(dp[2 * j + 1][0], dp[2 * j + 1][1]), pack_bf16(dp[2 * j + 1][2], dp[2 * j + 1][3])};
#pragma unroll
            for (int e = 0; e < 4; e++)
                memcpy(ds_tile + swizzled<QUERIES>(16 * warp + g + e % 2 * 8, 2 * j + e / 2) + 2 * t, &ds[e],
                       sizeof ds[e]);
#pragma unroll
            for (int n = 0; n < HS / 16; n++) {
                uint32_t b0[2], b1[2];
                load_b<HS>(b0, b1, do_rows + buffer, 16 * j, n);
                mma_m16n8k16_bf16(dv[2 * n], p, b0);
                mma_m16n8k16_bf16(dv[2 * n + 1], p, b1);
                load_b<HS>(b0, b1, q_rows + buffer, 16 * j, n);
                mma_m16n8k16_bf16(dk[2 * n], ds, b0);
                mma_m16n8k16_bf16(dk[2 * n + 1], ds, b1);
            }
        }
        __syncthreads();  // ds is there

        const int key_chunks = min(KEYS, first_query + QUERIES - first_key) / 16;
        float dq[COLUMNS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            if (kk >= key_chunks) break;
            uint32_t a[4];
            load_a_transposed<QUERIES>(a, ds_columns, 16 * kk, dq_row / 16);
#pragma unroll
            for (int n = 0; n < COLUMNS / 16; n++) {
                uint32_t b0[2], b1[2];
                load_b<HS>(b0, b1, k_rows, 16 * kk, dq_column / 16 + n);
                mma_m16n8k16_bf16(dq[2 * n], a, b0);
                mma_m16n8k16_bf16(dq[2 * n + 1], a, b1);
            }
        }
        const int last_key_tile = min(first_query + QUERIES - 1, T - 1) / KEYS;  // whose block adds first
        int* const flag = tile_flags + (size_t)tile * kBackwardWarps;
        if (key_tile < last_key_tile) {
            if (lane == 0)
                while (acquire_load(flag) != last_key_tile - key_tile) {
                }
            __syncwarp();
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = first_query + dq_row + g + 8 * h;
            if (i >= T) continue;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                const int d = dq_column + 8 * n + 2 * t;
                float x = dq[n][2 * h], y = dq[n][2 * h + 1];
                float* sum = dq_sum + ((size_t)bh * T + i) * HS + d;
                if (key_tile > 0) {
                    if (key_tile == last_key_tile) {
                        __stcg(sum, x);
                        __stcg(sum + 1, y);
                    } else {
                        add_pair_in_l2(sum, x, y);
                    }
                    continue;
                }
                if (last_key_tile > 0) {
                    x += __ldcg(sum);
                    y += __ldcg(sum + 1);
                }
                if (HS == 64 || d < hs) {
                    const uint32_t pair = pack_bf16(x * scale, y * scale);
                    memcpy(dqkv + ((size_t)b * T + i) * stride + head * hs + d, &pair, sizeof pair);
                }
            }
        }
        if (key_tile > 0) {
            __threadfence();
            __syncwarp();
            if (lane == 0) release_store(flag, last_key_tile - key_tile + 1);
        }
    }

    __syncthreads();  // the keys' and values' tiles are free
    __nv_bfloat16* dk_head = dqkv + ((size_t)b * T + warp_key) * stride + C + head * hs;
    store_rows<HS>(dk_head, stride, T - warp_key, hs, k_tile, 16 * warp, dk, scale, scale);
    store_rows<HS>(dk_head + C, stride, T - warp_key, hs, v_tile, 16 * warp, dv, 1.0f, 1.0f);
}

// ---------------------------------------------------------------------------------------------------------
// launchers; their contracts are in attention.cuh

template <int LIST>
void launch_attention_forward_bf16(const Context& ctx, __nv_bfloat16* out, AttentionRows rows,
                                   const __nv_bfloat16* qkv, int B, int T, int num_heads, int hs, int topk) {
    constexpr int WARPS = 4;
    with_mma_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        const size_t shared = (16 * WARPS + 4 * 64) * HS * sizeof(__nv_bfloat16);
        launch_attention(ctx, attention_forward_bf16_kernel<HS, WARPS, LIST>,
                         dim3(ceil_div(T, 16 * WARPS), B * num_heads), WARPS * 32, shared, out, rows, qkv, T,
                         num_heads, hs, topk);
    });
}

template <class Topk>
void attention_forward_bf16(const Context& ctx, __nv_bfloat16* out, AttentionRows rows,
                            const __nv_bfloat16* qkv, int B, int T, int num_heads, int hs, Topk topk) {
    with_list(topk, [&](auto list) {
        launch_attention_forward_bf16<list>(ctx, out, rows, qkv, B, T, num_heads, hs, topk);
    });
    if (topk > 0) attention_select_bf16(ctx, rows, qkv, B, T, num_heads, hs, topk, topk > kMaxListed);
}

// unit: see the kernel.
inline void attention_row_numbers(const Context& ctx, RowNumbers* numbers, const __nv_bfloat16* dout,
                                  const __nv_bfloat16* out, AttentionRows rows, Reg reg, const float* weight,
                                  int B, int T, int num_heads, int hs, int topk, float unit) {
    const int num_rows = B * num_heads * T;
    attention_row_numbers_kernel<<<ceil_div(num_rows, 16), 128, 0, ctx.stream>>>(
        numbers, dout, out, rows, reg, weight, T, num_heads, hs, topk, num_rows, unit);
    CUDA_CHECK(cudaGetLastError());
}

// A template, as the one of attention_hopper.cuh is, so that a program that does not train has none of its
// kernels.
template <class Float>
void attention_backward_bf16(const Context& ctx, Float* dqkv, float* scratch, const __nv_bfloat16* dout,
                             const __nv_bfloat16* out, const __nv_bfloat16* qkv, AttentionRows rows, Reg reg,
                             const float* weight, int B, int T, int num_heads, int hs, int topk) {
    const int num_rows = B * num_heads * T;
    with_backward_tile(ctx, hs, [&](auto size, auto queries) {
        constexpr int HS = size, QUERIES = queries;
        RowNumbers* numbers = (RowNumbers*)scratch;
        float* dq_sum = scratch + 4 * (size_t)num_rows;
        int* flags = (int*)(dq_sum + (size_t)num_rows * HS);
        attention_row_numbers(ctx, numbers, dout, out, rows, reg, weight, B, T, num_heads, hs, topk, 1.0f);
        CUDA_CHECK(cudaMemsetAsync(flags, 0, attention_backward_flags(B, T, num_heads, QUERIES) * sizeof(int),
                                   ctx.stream));
        const auto launch = [&](auto kernel) {
            launch_attention(ctx, kernel, dim3(ceil_div(T, kBackwardKeys) * B * num_heads),
                             kBackwardWarps * 32, kBackwardShared<HS, QUERIES>, dqkv, dq_sum, flags, dout,
                             qkv, (const RowNumbers*)numbers, (const float*)rows.tie, T, num_heads, hs);
        };
        with_pull(reg, weight, [&](auto pull) { launch(attention_backward_bf16_kernel<HS, QUERIES, pull>); });
    });
}
