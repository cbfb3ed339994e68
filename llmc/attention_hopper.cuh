// Attention in bf16 on Hopper's wgmma (wgmma.cuh), for heads of 64; the mathematics is in attention.cuh, and
// what a row saves and how its top k are found in attention_bf16.cuh, whose kernels these take the place of.
//
// A block is one warpgroup and owns 64 queries or 64 keys; three or four blocks share a multiprocessor, and
// one's exponentials run beside the others' products.
//
// The backward is two kernels: one owns keys and sums dk and dv over the queries, the other owns queries and
// sums dq over the keys. Scores and dp are computed in both, 7 products in place of 5; but every sum stays in
// one block's registers, so there is nothing to add up in memory, and no order to wait for. While they are
// there, the block also adds up its rows of them, for the gradient of qkv's bias.
//
// Scores stay unscaled: 1/sqrt(64) is a power of two, which changes no bit but the exponent, so it goes into
// the constants that scores are multiplied by or compared with.
#pragma once
#include "attention_bf16.cuh"
#include "wgmma.cuh"

inline constexpr float kHopperScale = 0.125f;  // of a head of 64
inline constexpr int kTileElements = 64 * 64;
inline constexpr size_t kTileBytes = kTileElements * sizeof(__nv_bfloat16);

// Where a block's head lies.
struct HeadPlace {
    int C, b, head;
    size_t stride;                   // from one row of q, k or v to the next
    const __nv_bfloat16 *q, *k, *v;  // row 0

    __device__ __forceinline__ HeadPlace(const __nv_bfloat16* qkv, int T, int num_heads)
        : C(num_heads * 64),
          b(blockIdx.y / num_heads),
          head(blockIdx.y % num_heads),
          stride(3 * (size_t)C),
          q(qkv + (size_t)b * T * stride + head * 64),
          k(q + C),
          v(k + C) {}
    // Where this head's columns of q begin in sums over tiles of rows, [B][tiles][3C].
    __device__ __forceinline__ size_t tile_columns(int tile) const {
        return ((size_t)b * gridDim.x + tile) * 3 * C + head * 64;
    }
    // Row i of this head in x [B,T,C].
    template <class X>
    __device__ __forceinline__ X* row(X* x, int T, int i) const {
        return x + ((size_t)b * T + i) * C + head * 64;
    }
};

// Starts the copy of 64 rows of x, from row first on, to a tile; rows from T on become zero.
__device__ __forceinline__ void copy_tile_async(__nv_bfloat16* tile, const __nv_bfloat16* x, size_t stride,
                                                int first, int T) {
    copy_rows_async<64, 64, 128>(tile, x + first * stride, stride, T - first, 64);
}

// x = value where a row of the tile on the diagonal does not see the column.
__device__ __forceinline__ void hide_later_keys(Accumulator& x, float value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++)
            if (8 * n + 2 * t + e % 2 > 16 * warp + g + e / 2 * 8) x[n][e] = value;
}

// The A fragments of a product with P or dS: its sums, rounded to bf16.
__device__ __forceinline__ void round_to_fragments(AFragment (&a)[4], const Accumulator& x) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[j][i] = pack_bf16(x[2 * j + i / 2][i % 2 * 2], x[2 * j + i / 2][i % 2 * 2 + 1]);
}

// ---------------------------------------------------------------------------------------------------------
// forward

// Blocks that should share a multiprocessor: 128 or 168 registers a thread, 255 for the longest list.
constexpr int hopper_forward_blocks(int LIST) {
    return LIST <= 8 ? 4 : LIST <= 16 ? 3 : 2;
}

// One block: 64 queries of one head. LIST = 0: no top-k.
template <int LIST>
__global__ void __launch_bounds__(128, hopper_forward_blocks(LIST))
    attention_forward_hopper_kernel(__nv_bfloat16* out, AttentionRows rows, const __nv_bfloat16* qkv, int T,
                                    int num_heads, int topk) {
    constexpr int HS = 64, TILE = 64;
    extern __shared__ __align__(kWgmmaAlignment) unsigned char hopper_tiles[];
    __nv_bfloat16* q_tile = (__nv_bfloat16*)hopper_tiles;  // [TILE][HS]
    __nv_bfloat16* k_tiles = q_tile + kTileElements;       // [2][TILE][HS]
    __nv_bfloat16* v_tiles = k_tiles + 2 * kTileElements;  // [2][TILE][HS]

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const HeadPlace at(qkv, T, num_heads);
    const int last_tile = gridDim.x - 1 - blockIdx.x;  // the longest rows start first
    const int first_query = last_tile * TILE, warp_query = first_query + 16 * warp;

    copy_tile_async(q_tile, at.q, at.stride, first_query, T);
    const auto copy_keys = [&](int tile) {
        copy_tile_async(k_tiles + tile % 2 * kTileElements, at.k, at.stride, tile * TILE, T);
        copy_tile_async(v_tiles + tile % 2 * kTileElements, at.v, at.stride, tile * TILE, T);
        cp_async_commit();
    };
    copy_keys(0);

    Accumulator o = {};
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float list[2][LIST > 0 ? LIST : 1];
    if constexpr (LIST > 0)
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < LIST; i++) list[h][i] = -INFINITY;

    for (int tile = 0; tile <= last_tile; tile++) {
        cp_async_wait<0>();
        fence_tiles();
        __syncthreads();  // this tile is there, and everybody is done with the one before
        if (tile < last_tile) copy_keys(tile + 1);
        const int buffer = tile % 2 * kTileElements;

        Accumulator s;
        begin_products();
        set_product_transposed(s, describe_tile(q_tile), describe_tile(k_tiles + buffer));
        commit_products();
        wait_products(s);
        if (tile == last_tile) hide_later_keys(s, -INFINITY);

        constexpr float unit = kHopperScale * kLog2e;
#pragma unroll
        for (int h = 0; h < 2; h++) {  // rows g and g + 8
            if constexpr (LIST > 0) merge_into_list(list[h], s, h);
            float tile_max = LIST > 0 ? list[h][0] : s[0][2 * h];
            if constexpr (LIST == 0) {
#pragma unroll
                for (int i = 1; i < 16; i++) tile_max = fmaxf(tile_max, s[i / 2][2 * h + i % 2]);
            }

            // The maximum that scores are taken relative to only has to be near: it moves when exp2 could
            // come to 2^8, which after the first tile is rare.
            const float new_max = quad_max(tile_max);
            if (__any_sync(0xffffffffu, (new_max - max[h]) * unit > 8.0f)) {
                const float larger = fmaxf(max[h], new_max), rescale = fast_exp2((max[h] - larger) * unit);
                max[h] = larger;
                sum[h] *= rescale;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    o[n][2 * h] *= rescale;
                    o[n][2 * h + 1] *= rescale;
                }
            }
            const float max2 = max[h] * unit;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float& x = s[i / 2][2 * h + i % 2];
                x = fast_exp2(fmaf(x, unit, -max2));
                sum[h] += x;
            }
        }
        AFragment p[4];
        round_to_fragments(p, s);
        begin_products(o, p);
        add_product(o, p, describe_tile(v_tiles + buffer));
        commit_products();
        wait_products(o);
    }

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float total = quad_sum(sum[h]);
        inverse[h] = 1.0f / total;
        const float lse = max[h] * kHopperScale + logf(total);
        const int i = warp_query + g + 8 * h;
        const size_t row = (size_t)blockIdx.y * T + i;
        const bool writes = t == 0 && i < T;
        if (writes) rows.lse[row] = lse;
        if constexpr (LIST > 0) {
#pragma unroll
            for (int x = 0; x < LIST; x++) list[h][x] *= kHopperScale;
            finish_row(rows, row, writes, i + 1, topk, list[h], lse);
        }
    }
    __syncthreads();  // all four warps' products have read q_tile
    store_rows<HS>(at.row(out, T, warp_query), at.C, T - warp_query, HS, q_tile, 16 * warp, o, inverse[0],
                   inverse[1]);
}

// ---------------------------------------------------------------------------------------------------------
// backward

// p and ds of one score s, with gradient dp: p to s, ds to dp.
template <Pull PULL>
__device__ __forceinline__ void score_gradient(float& s, float& dp, const RowNumbers& r) {
    const float p = fast_exp2(fmaf(s, kHopperScale * kLog2e, -r.lse2));
    float gradient = dp - r.delta;
    if (PULL == Pull::topk && s > r.theta) gradient += r.slope;
    if (PULL == Pull::entropy) gradient = fmaf(r.slope, s, gradient);
    s = p;
    dp = p * gradient;
}

// sums[c] = the sum of column c of the tile's first `valid` rows, times factor; shared: [4][64] floats that
// nobody else uses.
__device__ __forceinline__ void store_column_sums(float* sums, float* shared, const Accumulator& x, int valid,
                                                  float factor) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool upper = 16 * warp + g < valid, lower = 16 * warp + g + 8 < valid;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = (upper ? x[n][e] : 0.0f) + (lower ? x[n][2 + e] : 0.0f);
            for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (g == 0) shared[warp * 64 + 8 * n + 2 * t + e] = sum;
        }
    __syncthreads();
    if (threadIdx.x >= 64) return;
    const float* column = shared + threadIdx.x;
    sums[threadIdx.x] = (column[0] + column[64] + column[128] + column[192]) * factor;
}

inline constexpr size_t kHopperKeysShared = 6 * kTileBytes + 2 * 64 * sizeof(RowNumbers);

// One block: dk and dv of 64 keys of one head, over the queries that see them.
template <Pull PULL>
__global__ void __launch_bounds__(128, 3)
    attention_backward_keys_hopper_kernel(__nv_bfloat16* dqkv, float* bias_sums, const __nv_bfloat16* dout,
                                          const __nv_bfloat16* qkv, const RowNumbers* numbers,
                                          const float* tie, int T, int num_heads) {
    constexpr int HS = 64, TILE = 64;
    extern __shared__ __align__(kWgmmaAlignment) unsigned char hopper_tiles[];
    __nv_bfloat16* k_tile = (__nv_bfloat16*)hopper_tiles;                 // [TILE][HS]
    __nv_bfloat16* v_tile = k_tile + kTileElements;                       // [TILE][HS]
    __nv_bfloat16* q_tiles = v_tile + kTileElements;                      // [2][TILE][HS]
    __nv_bfloat16* do_tiles = q_tiles + 2 * kTileElements;                // [2][TILE][HS]
    RowNumbers* row_tiles = (RowNumbers*)(do_tiles + 2 * kTileElements);  // [2][TILE]

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const HeadPlace at(qkv, T, num_heads);
    const int first_tile = blockIdx.x, first_key = first_tile * TILE;  // the most queries start first
    const int num_tiles = gridDim.x;
    const size_t head_rows = (size_t)blockIdx.y * T;
    const __nv_bfloat16* dout_head = at.row(dout, T, 0);

    copy_tile_async(k_tile, at.k, at.stride, first_key, T);
    copy_tile_async(v_tile, at.v, at.stride, first_key, T);
    const auto copy_queries = [&](int tile) {
        const int first = tile * TILE, buffer = tile % 2;
        copy_tile_async(q_tiles + buffer * kTileElements, at.q, at.stride, first, T);
        copy_tile_async(do_tiles + buffer * kTileElements, dout_head, at.C, first, T);
        // Rows from T on are zero throughout: p = 1, but dout = 0 and delta = 0, so they add nothing.
        if (threadIdx.x < TILE) {
            const int i = first + threadIdx.x;
            cp_async_16(shared_address(row_tiles + buffer * TILE + threadIdx.x),
                        numbers + head_rows + min(i, T - 1), i < T);
        }
        cp_async_commit();
    };
    copy_queries(first_tile);

    Accumulator dk = {}, dv = {};
    for (int tile = first_tile; tile < num_tiles; tile++) {
        cp_async_wait<0>();
        fence_tiles();
        __syncthreads();  // the tile is there, and everybody is done with the one before
        if (tile + 1 < num_tiles) copy_queries(tile + 1);
        const __nv_bfloat16* q_tile = q_tiles + tile % 2 * kTileElements;
        const __nv_bfloat16* do_tile = do_tiles + tile % 2 * kTileElements;
        const RowNumbers* row_tile = row_tiles + tile % 2 * TILE;

        // transposed: [keys][queries]
        Accumulator s, dp;
        begin_products();
        set_product_transposed(s, describe_tile(k_tile), describe_tile(q_tile));
        set_product_transposed(dp, describe_tile(v_tile), describe_tile(do_tile));
        commit_products();
        // Rows whose k-th score is tied are rare: only a tile that has one looks for the keys.
        const bool ties = PULL == Pull::topk &&
                          __any_sync(0xffffffffu, is_tied(row_tile[lane]) || is_tied(row_tile[lane + 32]));
        wait_products(s, dp);
        if (ties) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++) {
                    const int i = 8 * n + 2 * t + e % 2;
                    if (s[n][e] == row_tile[i].theta)
                        dp[n][e] += row_tile[i].slope * tie[head_rows + min(tile * TILE + i, T - 1)];
                }
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const RowNumbers r = row_tile[8 * n + 2 * t + x];
                score_gradient<PULL>(s[n][x], dp[n][x], r);
                score_gradient<PULL>(s[n][2 + x], dp[n][2 + x], r);
            }
        if (tile == first_tile) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++)
                    if (16 * warp + g + e / 2 * 8 > 8 * n + 2 * t + e % 2) s[n][e] = dp[n][e] = 0.0f;
        }

        AFragment p[4], ds[4];
        round_to_fragments(p, s);
        round_to_fragments(ds, dp);
        begin_products(dv, p, dk, ds);
        add_product(dv, p, describe_tile(do_tile));
        add_product(dk, ds, describe_tile(q_tile));
        commit_products();
        wait_products(dv, dk);
    }

    __syncthreads();  // all four warps' products have read the keys and values
    const int warp_key = first_key + 16 * warp;
    __nv_bfloat16* dk_rows = dqkv + (at.k - qkv) + warp_key * at.stride;  // dqkv is laid out as qkv is
    store_rows<HS>(dk_rows, at.stride, T - warp_key, HS, k_tile, 16 * warp, dk, kHopperScale, kHopperScale);
    store_rows<HS>(dk_rows + at.C, at.stride, T - warp_key, HS, v_tile, 16 * warp, dv, 1.0f, 1.0f);
    float* dk_sums = bias_sums + at.tile_columns(blockIdx.x) + at.C;
    store_column_sums(dk_sums, (float*)q_tiles, dk, T - first_key, kHopperScale);
    store_column_sums(dk_sums + at.C, (float*)do_tiles, dv, T - first_key, 1.0f);
}

inline constexpr size_t kHopperQueriesShared = 6 * kTileBytes;

// One block: dq of 64 queries of one head, over the keys that they see.
template <Pull PULL>
__global__ void __launch_bounds__(128, 4)
    attention_backward_queries_hopper_kernel(__nv_bfloat16* dqkv, float* bias_sums, const __nv_bfloat16* dout,
                                             const __nv_bfloat16* qkv, const RowNumbers* numbers,
                                             const float* tie, int T, int num_heads) {
    constexpr int HS = 64, TILE = 64;
    extern __shared__ __align__(kWgmmaAlignment) unsigned char hopper_tiles[];
    __nv_bfloat16* q_tile = (__nv_bfloat16*)hopper_tiles;  // [TILE][HS]
    __nv_bfloat16* do_tile = q_tile + kTileElements;       // [TILE][HS]
    __nv_bfloat16* k_tiles = do_tile + kTileElements;      // [2][TILE][HS]
    __nv_bfloat16* v_tiles = k_tiles + 2 * kTileElements;  // [2][TILE][HS]

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const HeadPlace at(qkv, T, num_heads);
    const int last_tile = gridDim.x - 1 - blockIdx.x;  // the longest rows start first
    const int first_query = last_tile * TILE, warp_query = first_query + 16 * warp;
    const size_t head_rows = (size_t)blockIdx.y * T;
    const __nv_bfloat16* dout_head = at.row(dout, T, 0);

    copy_tile_async(q_tile, at.q, at.stride, first_query, T);
    copy_tile_async(do_tile, dout_head, at.C, first_query, T);
    const auto copy_keys = [&](int tile) {
        copy_tile_async(k_tiles + tile % 2 * kTileElements, at.k, at.stride, tile * TILE, T);
        copy_tile_async(v_tiles + tile % 2 * kTileElements, at.v, at.stride, tile * TILE, T);
        cp_async_commit();
    };
    copy_keys(0);

    RowNumbers r[2];
#pragma unroll
    for (int h = 0; h < 2; h++) r[h] = numbers[head_rows + min(warp_query + g + 8 * h, T - 1)];
    const bool ties = PULL == Pull::topk && __any_sync(0xffffffffu, is_tied(r[0]) || is_tied(r[1]));
    Accumulator dq = {};
    for (int tile = 0; tile <= last_tile; tile++) {
        cp_async_wait<0>();
        fence_tiles();
        __syncthreads();  // this tile is there, and everybody is done with the one before
        if (tile < last_tile) copy_keys(tile + 1);
        const __nv_bfloat16* k_tile = k_tiles + tile % 2 * kTileElements;
        const __nv_bfloat16* v_tile = v_tiles + tile % 2 * kTileElements;

        Accumulator s, dp;
        begin_products();
        set_product_transposed(s, describe_tile(q_tile), describe_tile(k_tile));
        set_product_transposed(dp, describe_tile(do_tile), describe_tile(v_tile));
        commit_products();
        wait_products(s, dp);
        if (ties) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++)
                    if (s[n][e] == r[e / 2].theta)
                        dp[n][e] += r[e / 2].slope * tie[head_rows + min(warp_query + g + e / 2 * 8, T - 1)];
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) score_gradient<PULL>(s[n][e], dp[n][e], r[e / 2]);
        if (tile == last_tile) hide_later_keys(dp, 0.0f);
        AFragment ds[4];
        round_to_fragments(ds, dp);
        begin_products(dq, ds);
        add_product(dq, ds, describe_tile(k_tile));
        commit_products();
        wait_products(dq);
    }

    __syncthreads();  // all four warps' products have read q_tile
    store_rows<HS>(dqkv + (at.q - qkv) + warp_query * at.stride, at.stride, T - warp_query, HS, q_tile,
                   16 * warp, dq, kHopperScale, kHopperScale);
    store_column_sums(bias_sums + at.tile_columns(last_tile), (float*)k_tiles, dq, T - first_query,
                      kHopperScale);
}

// ---------------------------------------------------------------------------------------------------------
// launchers; their contracts are in attention.cuh

inline bool use_hopper(const Context& ctx, int hs) {
    return ctx.use_wgmma && hs == 64;
}

template <class Topk>
void attention_forward_hopper(const Context& ctx, __nv_bfloat16* out, AttentionRows rows,
                              const __nv_bfloat16* qkv, int B, int T, int num_heads, Topk topk) {
    with_list(topk, [&](auto list) {
        launch_attention(ctx, attention_forward_hopper_kernel<list>, dim3(ceil_div(T, 64), B * num_heads),
                         128, 5 * kTileBytes, out, rows, qkv, T, num_heads, (int)topk);
    });
    if (topk > 0) attention_select_bf16(ctx, rows, qkv, B, T, num_heads, 64, topk, topk > kMaxListed);
}

// Floats of scratch: the rows' numbers, then sums over tiles.
inline size_t attention_backward_hopper_scratch(int B, int T, int num_heads) {
    return (size_t)B * num_heads * (4 * T + ceil_div(T, 64) * 3 * 64);
}

template <class Float>
void attention_backward_hopper(const Context& ctx, Float* dqkv, float* dbias, float* scratch,
                               const __nv_bfloat16* dout, const __nv_bfloat16* out, const __nv_bfloat16* qkv,
                               AttentionRows rows, Reg reg, const float* weight, int B, int T, int num_heads,
                               int topk) {
    RowNumbers* numbers = (RowNumbers*)scratch;
    float* bias_sums = scratch + (size_t)B * num_heads * T * 4;
    attention_row_numbers(ctx, numbers, dout, out, rows, reg, weight, B, T, num_heads, 64, topk,
                          1.0f / kHopperScale);
    const auto launch = [&](auto kernel, size_t shared) {
        launch_attention(ctx, kernel, dim3(ceil_div(T, 64), B * num_heads), 128, shared, dqkv, bias_sums,
                         dout, qkv, (const RowNumbers*)numbers, (const float*)rows.tie, T, num_heads);
    };
    with_pull(reg, weight, [&](auto pull) {
        launch(attention_backward_keys_hopper_kernel<pull>, kHopperKeysShared);
        launch(attention_backward_queries_hopper_kernel<pull>, kHopperQueriesShared);
    });
    add_partial_sums(ctx, dbias, bias_sums, B * ceil_div(T, 64), (size_t)3 * num_heads * 64);
}
