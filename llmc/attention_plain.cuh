// Attention, plain: tiles in shared memory, a few scores a thread in registers, fmaf. fp32 runs on it, on
// both backends, and it is the readable counterpart of attention_bf16.cuh; the mathematics is in
// attention.cuh.
//
// Scores are computed by the same chain of fmaf (over the head's dimensions in order) in every kernel here,
// so they agree bit for bit. The backward is cut into two kernels, one by queries for dq and one by keys for
// dk and dv: two products more than needed, but no sum over blocks.
#pragma once
#include "attention_common.cuh"

// A tile's scores and outputs are dealt to groups of rows x groups of columns, a thread each. On the CPU
// fewer threads have more columns: as many as its widest registers, and less to switch between at a barrier.
// There a thread's scores of a row lie side by side, on a GPU those of the neighbouring threads' rows do.
// kTransposedRows: rows that a thread loads at once where it transposes a tile.
#ifdef CUDA_CPU
inline constexpr int kRowGroups = 16, kColumnGroups = 4, kTransposedRows = 4;
inline constexpr bool kRowsLieTogether = true;
#if defined(__AVX512F__)
inline constexpr int kVectorLanes = 16;  // floats of a vector register
#elif defined(__AVX__)
inline constexpr int kVectorLanes = 8;
#else
inline constexpr int kVectorLanes = 4;
#endif
#else
inline constexpr int kRowGroups = 16, kColumnGroups = 8, kTransposedRows = 1;
inline constexpr bool kRowsLieTogether = false;
#endif
inline constexpr int kAttentionThreads = kRowGroups * kColumnGroups;

// Queries and keys are cut into tiles; HS is the head size rounded up to one of 32, 64, 128 (the rest is
// zero).
template <int HS>
inline constexpr int kTile = HS <= 64 ? 64 : 32;

// tile[d][row] = x[row][d], rows x HS; rows from `valid` on and dimensions from hs on are zero.
template <class Float, int HS, int TILE>
__device__ void load_tile_transposed(float* tile, const Float* x, size_t stride, int valid, int hs) {
    constexpr int N = Pack<Float>::size, ROWS = kTransposedRows, GROUPS = TILE / ROWS;
    for (int i = threadIdx.x; i < GROUPS * (HS / N); i += kAttentionThreads) {
        const int row = i % GROUPS * ROWS, d = i / GROUPS * N;
        Pack<Float> p[ROWS] = {};  // in registers, if g++ is told to unroll what is around it
#pragma unroll 4
        for (int r = 0; r < ROWS; r++)
            if (row + r < valid && d < hs) p[r] = load_pack(x + (row + r) * stride + d);
#pragma unroll 8
        for (int k = 0; k < N; k++)
#pragma unroll 4
            for (int r = 0; r < ROWS; r++) tile[(d + k) * TILE + row + r] = (float)p[r][k];
    }
}

// tile[row][d] = x[row][d]
template <class Float, int HS, int TILE>
__device__ void load_tile(float* tile, const Float* x, size_t stride, int valid, int hs) {
    constexpr int N = Pack<Float>::size;
    for (int i = threadIdx.x; i < TILE * (HS / N); i += kAttentionThreads) {
        const int row = i / (HS / N), d = i % (HS / N) * N;
        Pack<Float> p = {};
        if (row < valid && d < hs) p = load_pack(x + row * stride + d);
        for (int k = 0; k < N; k++) tile[row * HS + d + k] = (float)p[k];
    }
}

// Where the score of a row and a column of a tile lies in shared memory.
template <int TILE>
__device__ constexpr int score_at(int row, int column) {
    return kRowsLieTogether ? row * TILE + column : column * TILE + row;
}

// out[r][c] += sum over x of a[x][r] b[x][c], each a chain of fmaf over x in order: every product of tiles
// below, in registers. a has a step from x to x and one from row to row. The CPU body holds out in the
// processor's own vector registers, which g++ does not find by itself; wider vectors it would keep in memory.
template <int R, int C>
__device__ __forceinline__ void accumulate_tile(float (&out)[R][C], const float* a, int a_step, int a_row,
                                                const float* b, int b_stride, int n) {
#ifdef CUDA_CPU
    constexpr int LANES = C < kVectorLanes ? C : kVectorLanes, N = C / LANES;
    typedef float Lanes
        __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
    Lanes sum[R][N];
    memcpy(sum, out, sizeof sum);
    for (int x = 0; x < n; x++) {
        const Lanes* bx = (const Lanes*)(b + x * b_stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Lanes ax = a[x * a_step + r * a_row] - Lanes{};  // in every lane
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[r][v] = cuda_cpu::fma_lanes<LANES>(ax, bx[v], sum[r][v]);
        }
    }
    memcpy(out, sum, sizeof sum);
#else
    for (int x = 0; x < n; x++) {
        float ax[R], bx[C];
#pragma unroll
        for (int r = 0; r < R; r++) ax[r] = a[x * a_step + r * a_row];
#pragma unroll
        for (int c = 0; c < C; c++) bx[c] = b[x * b_stride + c];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int c = 0; c < C; c++) out[r][c] = fmaf(ax[r], bx[c], out[r][c]);
    }
#endif
}

// The k + 1 largest scores of a row in descending order, and how many more there were that equal the
// smallest.
struct TopList {
    float score[kMaxListed + 1];
    int more_ties;

    __device__ void clear(int k) {
        for (int i = 0; i <= k; i++) score[i] = -INFINITY;
        more_ties = 0;
    }
    __device__ void insert(float s, int k) {
        const float last = score[k];
        if (s < last) return;
        if (s == last) {
            more_ties++;
            return;
        }
        int i = k;
        for (; i > 0 && score[i - 1] < s; i--) score[i] = score[i - 1];
        score[i] = s;
        more_ties = score[k] == last ? more_ties + 1 : 0;
    }
};

// One block: TILE queries of one head. Thread (row group, column group) owns the scores of R queries and K
// keys of a tile, and D dimensions of those queries' outputs; in between, thread r < TILE owns row r.
template <class Float, int HS, bool TOPK>
__global__ void attention_forward_kernel(Float* out, AttentionRows rows, const Float* qkv, int T,
                                         int num_heads, int hs, int topk) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, K = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* q_transposed = (float*)shared;  // [HS][TILE]
    float* kv = q_transposed + HS * TILE;  // keys [HS][TILE], then values [TILE][HS]
    float* p = kv + HS * TILE;             // by score_at(query, key): scores, then probabilities
    float* row_max_ = p + TILE * TILE;     // [TILE]
    float* row_scale = row_max_ + TILE;    // [TILE]: what the row's sums so far are multiplied by
    float* row_sum_ = row_scale + TILE;    // [TILE]

    const int C = num_heads * hs, tid = threadIdx.x;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * TILE;  // the longest rows start first
    const int r0 = tid / kColumnGroups * R, c0 = tid % kColumnGroups * K, d0 = tid % kColumnGroups * D;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)b * T * stride + head * hs;
    const Float *k = q + C, *v = q + 2 * C;
    const float scale = 1.0f / sqrtf((float)hs);
    constexpr auto at = score_at<TILE>;

    load_tile_transposed<Float, HS, TILE>(q_transposed, q + first_query * stride, stride, T - first_query,
                                          hs);
    float o[R][D] = {}, sum[R] = {};
    TopList list;
    float max = -INFINITY;
    if (TOPK) list.clear(topk);

    for (int first_key = 0; first_key <= first_query; first_key += TILE) {
        __syncthreads();  // everybody is done with the last tile
        load_tile_transposed<Float, HS, TILE>(kv, k + first_key * stride, stride, T - first_key, hs);
        __syncthreads();
        float s[R][K] = {};
        accumulate_tile(s, q_transposed + r0, TILE, 1, kv + c0, TILE, HS);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < K; c++) {
                const bool visible = first_key + c0 + c <= first_query + r0 + r;
                s[r][c] = visible ? s[r][c] * scale : -INFINITY;
                p[at(r0 + r, c0 + c)] = s[r][c];
            }
        __syncthreads();

        load_tile<Float, HS, TILE>(kv, v + first_key * stride, stride, T - first_key, hs);
        if (tid < TILE) {  // row tid: its new maximum, and its largest scores
            const int visible = min(TILE, first_query + tid - first_key + 1);
            float new_max = max;
            for (int j = 0; j < visible; j++) {
                if (TOPK)
                    list.insert(p[at(tid, j)], topk);
                else
                    new_max = fmaxf(new_max, p[at(tid, j)]);
            }
            if (TOPK) new_max = list.score[0];
            row_max_[tid] = new_max;
            row_scale[tid] = __expf(max - new_max);
            max = new_max;
        }
        __syncthreads();

        for (int r = 0; r < R; r++) {
            const float m = row_max_[r0 + r], rescale = row_scale[r0 + r];
            for (int c = 0; c < K; c++) p[at(r0 + r, c0 + c)] = __expf(s[r][c] - m);
            for (int d = 0; d < D; d++) o[r][d] *= rescale;
            sum[r] *= rescale;
        }
        __syncthreads();
        accumulate_tile(o, p + at(r0, 0), at(0, 1), at(1, 0), kv + d0, HS, TILE);
        for (int j = 0; j < TILE; j++)  // the same sum in all threads of a row: cheaper than sharing it
            for (int r = 0; r < R; r++) sum[r] += p[at(r0 + r, j)];
    }

    for (int r = 0; r < R; r++) {
        const int i = first_query + r0 + r;
        if (i >= T) break;
        Float* o_row = out + ((size_t)b * T + i) * C + head * hs;
        for (int d = 0; d < D; d++)
            if (d0 + d < hs) o_row[d0 + d] = (Float)(o[r][d] / sum[r]);
        if (d0 == 0) row_sum_[r0 + r] = sum[r];
    }
    __syncthreads();
    const int i = first_query + tid;
    if (tid >= TILE || i >= T) return;
    const size_t row = (size_t)blockIdx.y * T + i;
    const float lse = max + logf(row_sum_[tid]);
    rows.lse[row] = lse;
    if (!TOPK) return;
    float theta = -INFINITY, mass = 1.0f, tie = 0.0f;
    if (i + 1 > topk) {
        mass = 0.0f;
        for (int j = 0; j < topk; j++) mass += expf(list.score[j] - lse);
        mass = fminf(mass, 1.0f);
        const float kth = list.score[topk - 1], next = list.score[topk];
        if (kth > next) {
            theta = threshold_between(kth, next);
        } else {
            theta = kth;
            int above = 0;
            while (list.score[above] > theta) above++;
            tie = (float)(topk - above) / (float)(topk + 1 - above + list.more_ties);
        }
    }
    rows.theta[row] = theta;
    rows.mass[row] = mass;
    rows.tie[row] = tie;
}

// Any k: one block a row.
template <class Float>
__global__ void attention_select_kernel(AttentionRows rows, const Float* qkv, int T, int num_heads, int hs,
                                        int topk) {
    extern __shared__ float4 shared[];
    float* s = (float*)shared;  // [T]
    const int C = num_heads * hs, i = blockIdx.x, n = i + 1, tid = threadIdx.x;
    const size_t row = (size_t)blockIdx.y * T + i, stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)(blockIdx.y / num_heads) * T * stride + blockIdx.y % num_heads * hs;
    const Float* k = q + C;
    const float scale = 1.0f / sqrtf((float)hs);
    for (int j = tid; j < n; j += blockDim.x) {
        float dot = 0.0f;
        for (int d = 0; d < hs; d++) dot = fmaf((float)q[i * stride + d], (float)k[j * stride + d], dot);
        s[j] = dot * scale;
    }
    __syncthreads();
    select_top(rows, row, s, n, topk);
}

// What the backward needs of a row: delta = D + c M, and c (0 where the row is not regularized); for entropy
// delta = D + c E. [B,NH,T] each.
template <class Float>
__global__ void attention_delta_kernel(float* delta, float* slope, const Float* dout, const Float* out,
                                       AttentionRows rows, Reg reg, const float* weight, int T, int num_heads,
                                       int hs, int topk, int num_rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= num_rows) return;
    const int i = row % T, head = row / T % num_heads, b = row / T / num_heads;
    const size_t offset = ((size_t)b * T + i) * num_heads * hs + head * hs;
    float sum[Pack<Float>::size] = {};
    for (int d = 0; d < hs; d += Pack<Float>::size) {
        const Pack<Float> x = load_pack(dout + offset + d), y = load_pack(out + offset + d);
        for (int k = 0; k < Pack<Float>::size; k++) sum[k] += (float)x[k] * (float)y[k];
    }
    float D = 0.0f;
    for (int k = 0; k < Pack<Float>::size; k++) D += sum[k];
    const bool regularized = weight && i + 1 > topk;
    if (reg == Reg::entropy) {
        const float c = regularized ? -*weight : 0.0f;
        slope[row] = c;
        delta[row] = regularized ? D + c * rows.mean_score[row] : D;
        return;
    }
    const float c = regularized ? *weight * reg_slope(reg, rows.mass[row]) : 0.0f;
    slope[row] = c;
    delta[row] = c != 0.0f ? D + c * rows.mass[row] : D;
}

// What the gradients of a row's scores depend on.
struct PlainRow {
    float lse, theta, tie, delta, slope;

    // ds for one score s, from its probability p and dp.
    template <Pull PULL>
    __device__ float score_gradient(float s, float p, float dp) const {
        float g = dp - delta;
        if (PULL == Pull::topk) g += slope * (s > theta ? 1.0f : s == theta ? tie : 0.0f);
        if (PULL == Pull::entropy) g = fmaf(slope, s, g);
        return p * g;
    }
};

// The same of a tile's rows, in shared memory.
template <int TILE>
struct RowTile {
    float lse[TILE], theta[TILE], tie[TILE], delta[TILE], slope[TILE];

    template <Pull PULL>
    __device__ void load(const AttentionRows& rows, const float* delta_, const float* slope_, size_t row,
                         int valid) {
        const int r = threadIdx.x;
        if (r >= TILE) return;
        const bool in = r < valid;
        lse[r] = in ? rows.lse[row + r] : 0.0f;
        delta[r] = in ? delta_[row + r] : 0.0f;
        if (PULL == Pull::none) return;
        theta[r] = in ? rows.theta[row + r] : 0.0f;
        tie[r] = in ? rows.tie[row + r] : 0.0f;
        slope[r] = in ? slope_[row + r] : 0.0f;
    }
    template <Pull PULL>
    __device__ PlainRow row(int r) const {
        if (PULL == Pull::none) return {lse[r], 0.0f, 0.0f, delta[r], 0.0f};
        return {lse[r], theta[r], tie[r], delta[r], slope[r]};
    }
};

// dq. One block: TILE queries of one head, over the tiles of keys that they see.
template <class Float, int HS, Pull PULL>
__global__ void attention_backward_query_kernel(Float* dqkv, const Float* dout, const Float* qkv,
                                                AttentionRows rows, const float* delta, const float* slope,
                                                int T, int num_heads, int hs) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, K = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* q_transposed = (float*)shared;             // [HS][TILE]
    float* do_transposed = q_transposed + HS * TILE;  // [HS][TILE]
    float* k_tile = do_transposed + HS * TILE;        // keys [HS][TILE], then [TILE][HS]
    float* v_transposed = k_tile + HS * TILE;         // [HS][TILE]
    float* ds = v_transposed + HS * TILE;             // by score_at(query, key)
    RowTile<TILE>& tile = *(RowTile<TILE>*)(ds + TILE * TILE);

    const int C = num_heads * hs, tid = threadIdx.x;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * TILE;
    const int r0 = tid / kColumnGroups * R, c0 = tid % kColumnGroups * K, d0 = tid % kColumnGroups * D;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)b * T * stride + head * hs;
    const Float *k = q + C, *v = q + 2 * C;
    const float scale = 1.0f / sqrtf((float)hs);
    constexpr auto at = score_at<TILE>;

    load_tile_transposed<Float, HS, TILE>(q_transposed, q + first_query * stride, stride, T - first_query,
                                          hs);
    load_tile_transposed<Float, HS, TILE>(do_transposed, dout + ((size_t)b * T + first_query) * C + head * hs,
                                          C, T - first_query, hs);
    tile.template load<PULL>(rows, delta, slope, (size_t)blockIdx.y * T + first_query, T - first_query);
    float dq[R][D] = {};

    for (int first_key = 0; first_key <= first_query; first_key += TILE) {
        __syncthreads();
        load_tile_transposed<Float, HS, TILE>(k_tile, k + first_key * stride, stride, T - first_key, hs);
        load_tile_transposed<Float, HS, TILE>(v_transposed, v + first_key * stride, stride, T - first_key,
                                              hs);
        __syncthreads();
        float s[R][K] = {}, dp[R][K] = {};
        accumulate_tile(s, q_transposed + r0, TILE, 1, k_tile + c0, TILE, HS);
        accumulate_tile(dp, do_transposed + r0, TILE, 1, v_transposed + c0, TILE, HS);
        for (int r = 0; r < R; r++) {
            const PlainRow row = tile.template row<PULL>(r0 + r);
            for (int c = 0; c < K; c++) {
                const bool visible = first_key + c0 + c <= first_query + r0 + r;
                const float score = s[r][c] * scale;
                const float p = visible ? __expf(score - row.lse) : 0.0f;
                ds[at(r0 + r, c0 + c)] = row.score_gradient<PULL>(score, p, dp[r][c]);
            }
        }
        __syncthreads();
        load_tile<Float, HS, TILE>(k_tile, k + first_key * stride, stride, T - first_key, hs);
        __syncthreads();
        accumulate_tile(dq, ds + at(r0, 0), at(0, 1), at(1, 0), k_tile + d0, HS, TILE);
    }
    for (int r = 0; r < R; r++) {
        const int i = first_query + r0 + r;
        if (i >= T) break;
        Float* dq_row = dqkv + ((size_t)b * T + i) * stride + head * hs;
        for (int d = 0; d < D; d++)
            if (d0 + d < hs) dq_row[d0 + d] = (Float)(dq[r][d] * scale);
    }
}

// dk and dv. One block: TILE keys of one head, over the tiles of queries that see them.
template <class Float, int HS, Pull PULL>
__global__ void attention_backward_key_kernel(Float* dqkv, const Float* dout, const Float* qkv,
                                              AttentionRows rows, const float* delta, const float* slope,
                                              int T, int num_heads, int hs) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, Q = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* k_transposed = (float*)shared;            // [HS][TILE]
    float* v_transposed = k_transposed + HS * TILE;  // [HS][TILE]
    float* q_tile = v_transposed + HS * TILE;        // queries [HS][TILE], then [TILE][HS]
    float* do_tile = q_tile + HS * TILE;             // the same of dout
    float* p = do_tile + HS * TILE;                  // by score_at(key, query)
    float* ds = p + TILE * TILE;                     // by score_at(key, query)
    RowTile<TILE>& tile = *(RowTile<TILE>*)(ds + TILE * TILE);

    const int C = num_heads * hs, tid = threadIdx.x;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_key = blockIdx.x * TILE;
    const int r0 = tid / kColumnGroups * R, c0 = tid % kColumnGroups * Q, d0 = tid % kColumnGroups * D;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)b * T * stride + head * hs;
    const Float *k = q + C, *v = q + 2 * C;
    const Float* dout_head = dout + (size_t)b * T * C + head * hs;
    const float scale = 1.0f / sqrtf((float)hs);
    constexpr auto at = score_at<TILE>;

    load_tile_transposed<Float, HS, TILE>(k_transposed, k + first_key * stride, stride, T - first_key, hs);
    load_tile_transposed<Float, HS, TILE>(v_transposed, v + first_key * stride, stride, T - first_key, hs);
    float dk[R][D] = {}, dv[R][D] = {};

    for (int first_query = first_key; first_query < T; first_query += TILE) {
        __syncthreads();
        load_tile_transposed<Float, HS, TILE>(q_tile, q + first_query * stride, stride, T - first_query, hs);
        load_tile_transposed<Float, HS, TILE>(do_tile, dout_head + (size_t)first_query * C, C,
                                              T - first_query, hs);
        tile.template load<PULL>(rows, delta, slope, (size_t)blockIdx.y * T + first_query, T - first_query);
        __syncthreads();
        float s[R][Q] = {}, dp[R][Q] = {};  // [key][query]
        accumulate_tile(s, k_transposed + r0, TILE, 1, q_tile + c0, TILE, HS);
        accumulate_tile(dp, v_transposed + r0, TILE, 1, do_tile + c0, TILE, HS);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < Q; c++) {
                const int i = first_query + c0 + c;
                const bool visible = first_key + r0 + r <= i && i < T;
                const PlainRow row = tile.template row<PULL>(c0 + c);
                const float score = s[r][c] * scale;
                const float prob = visible ? __expf(score - row.lse) : 0.0f;
                p[at(r0 + r, c0 + c)] = prob;
                ds[at(r0 + r, c0 + c)] = row.score_gradient<PULL>(score, prob, dp[r][c]);
            }
        __syncthreads();
        load_tile<Float, HS, TILE>(q_tile, q + first_query * stride, stride, T - first_query, hs);
        load_tile<Float, HS, TILE>(do_tile, dout_head + (size_t)first_query * C, C, T - first_query, hs);
        __syncthreads();
        accumulate_tile(dv, p + at(r0, 0), at(0, 1), at(1, 0), do_tile + d0, HS, TILE);
        accumulate_tile(dk, ds + at(r0, 0), at(0, 1), at(1, 0), q_tile + d0, HS, TILE);
    }
    for (int r = 0; r < R; r++) {
        const int j = first_key + r0 + r;
        if (j >= T) break;
        Float* dk_row = dqkv + ((size_t)b * T + j) * stride + C + head * hs;
        Float* dv_row = dk_row + C;
        for (int d = 0; d < D; d++)
            if (d0 + d < hs) {
                dk_row[d0 + d] = (Float)(dk[r][d] * scale);
                dv_row[d0 + d] = (Float)dv[r][d];
            }
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Calls body with the padded head size as a compile-time constant.
template <class Body>
void with_head_size(int hs, Body body) {
    assert(hs % 8 == 0 && hs <= 128);
    if (hs <= 32)
        body(std::integral_constant<int, 32>());
    else if (hs <= 64)
        body(std::integral_constant<int, 64>());
    else
        body(std::integral_constant<int, 128>());
}

// Bytes of shared memory: `tiles` tiles of [HS][TILE], `squares` of [TILE][TILE], `vectors` of [TILE].
template <int HS>
constexpr size_t attention_shared(int tiles, int squares, int vectors) {
    constexpr int TILE = kTile<HS>;
    return sizeof(float) * TILE * (tiles * HS + squares * TILE + vectors);
}

template <class Float, class Topk>
void attention_forward_plain(const Context& ctx, Float* out, AttentionRows rows, const Float* qkv, int B,
                             int T, int num_heads, int hs, Topk topk) {
    with_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        with_list(topk, [&](auto list) {
            launch_attention(ctx, attention_forward_kernel<Float, HS, (list > 0)>,
                             dim3(ceil_div(T, kTile<HS>), B * num_heads), kAttentionThreads,
                             attention_shared<HS>(2, 1, 3), out, rows, qkv, T, num_heads, hs, (int)topk);
        });
    });
    if (topk > kMaxListed) {
        assert(T <= max_select_context(ctx));
        launch_attention(ctx, attention_select_kernel<Float>, dim3(T, B * num_heads), kAttentionThreads,
                         T * sizeof(float), rows, qkv, T, num_heads, hs, topk);
    }
}

template <class Float>
void attention_backward_plain(const Context& ctx, Float* dqkv, float* scratch, const Float* dout,
                              const Float* out, const Float* qkv, AttentionRows rows, Reg reg,
                              const float* weight, int B, int T, int num_heads, int hs, int topk) {
    const int num_rows = B * num_heads * T;
    float *delta = scratch, *slope = scratch + num_rows;
    attention_delta_kernel<<<ceil_div(num_rows, 128), 128, 0, ctx.stream>>>(
        delta, slope, dout, out, rows, reg, weight, T, num_heads, hs, topk, num_rows);
    CUDA_CHECK(cudaGetLastError());
    with_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        const dim3 grid(ceil_div(T, kTile<HS>), B * num_heads);
        auto launch_both = [&](auto query_kernel, auto key_kernel) {
            launch_attention(ctx, query_kernel, grid, kAttentionThreads, attention_shared<HS>(4, 1, 5), dqkv,
                             dout, qkv, rows, delta, slope, T, num_heads, hs);
            launch_attention(ctx, key_kernel, grid, kAttentionThreads, attention_shared<HS>(4, 2, 5), dqkv,
                             dout, qkv, rows, delta, slope, T, num_heads, hs);
        };
        with_pull(reg, weight, [&](auto pull) {
            launch_both(attention_backward_query_kernel<Float, HS, pull>,
                        attention_backward_key_kernel<Float, HS, pull>);
        });
    });
}
