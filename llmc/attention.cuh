// Causal self-attention with the top-k regularizer, forward and backward, without ever storing a T x T matrix
// (FlashAttention, arXiv 2205.14135; the backward is cut into two passes so that no atomics are needed).
//
//   s_ij = q_i . k_j / sqrt(hs) for j <= i,  p = softmax(s),  o_i = sum_j p_ij v_j
//   S_i: the k largest scores of row i,  M_i = sum of p_ij over S_i
//
// The forward saves, per row: lse_i = log sum_j exp(s_ij); theta_i, halfway between the k-th and the (k+1)-th
// largest score; M_i. With these the backward rebuilds p_ij = exp(s_ij - lse_i) and [j in S_i] = [s_ij >
// theta_i]:
//
//   dp_ij = do_i . v_j,   D_i = sum_j p_ij dp_ij = do_i . o_i,   c_i = dR/dM_i
//   ds_ij = p_ij (dp_ij + c_i [j in S_i] - D_i - c_i M_i)
//   dq_i = sum_j ds_ij k_j / sqrt(hs),  dk_j = sum_i ds_ij q_i / sqrt(hs),  dv_j = sum_i p_ij do_i
//
// The regularizer is one compare and one add a score. Halfway means that rounding cannot move a key across
// the threshold unless the gap itself is that small; scores are still computed by the same chain of fmaf
// (over the head's dimensions in order) in every kernel here, so they agree bit for bit.
//
// Equal scores: if the k-th and the (k+1)-th are equal there is no gap. Then theta is their value, and the
// keys that tie share the places that are left: each counts with weight tie = places / ties, in M and in ds.
// M is then still the sum of the k largest probabilities, and no position is preferred over another.
//
// Rows with n <= k keys have M = 1, theta = -infinity and no gradient from the regularizer.
#pragma once
#include "cuda_common.cuh"
#include "topk.h"

// A thread keeps the largest kMaxListed + 1 scores of its row; larger k are selected by a kernel of their
// own.
inline constexpr int kMaxListed = 64;
inline constexpr int kAttentionThreads = 128;  // 16 groups of rows x 8 groups of columns of a tile
inline constexpr int kRowGroups = 16, kColumnGroups = 8;

// What the forward saves for each row of each head: [B,NH,T] each.
struct AttentionRows {
    float* lse;
    float* theta;
    float* mass;
    float* tie;
};

// Queries and keys are cut into tiles; HS is the head size rounded up to one of 32, 64, 128 (the rest is
// zero).
template <int HS>
inline constexpr int kTile = HS <= 64 ? 64 : 32;

// tile[d][row] = x[row][d], rows x HS; rows from `valid` on and dimensions from hs on are zero.
template <class Float, int HS, int TILE>
__device__ void load_tile_turned(float* tile, const Float* x, size_t stride, int valid, int hs) {
    constexpr int N = Pack<Float>::size;
    for (int i = threadIdx.x; i < TILE * (HS / N); i += kAttentionThreads) {
        const int row = i % TILE, d = i / TILE * N;
        Pack<Float> p = {};
        if (row < valid && d < hs) p = load_pack(x + row * stride + d);
        for (int k = 0; k < N; k++) tile[(d + k) * TILE + row] = (float)p[k];
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

// out[r][c] += sum over x of a[x][r] b[x][c], each a chain of fmaf over x in order: every product of tiles
// below, in registers. The CPU body holds a row of out in one vector register, which g++ does not find by
// itself.
template <int R, int C>
__device__ __forceinline__ void accumulate_tile(float (&out)[R][C], const float* a, int a_stride,
                                                const float* b, int b_stride, int n) {
#ifdef CUDA_CPU
    typedef float Row __attribute__((vector_size(C * sizeof(float)), aligned(sizeof(float)), may_alias));
    Row sum[R];
    for (int r = 0; r < R; r++) sum[r] = *(const Row*)out[r];
    for (int x = 0; x < n; x++) {
        const Row bx = *(const Row*)(b + x * b_stride);
        for (int r = 0; r < R; r++) sum[r] += a[x * a_stride + r] * bx;  // g++ contracts this to fma
    }
    for (int r = 0; r < R; r++) *(Row*)out[r] = sum[r];
#else
    for (int x = 0; x < n; x++) {
        float ax[R], bx[C];
#pragma unroll
        for (int r = 0; r < R; r++) ax[r] = a[x * a_stride + r];
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

// Halfway between the k-th and the (k+1)-th largest score, kth > next: the result is in [next, kth).
__device__ inline float threshold_between(float kth, float next) {
    const float middle = next + (kth - next) * 0.5f;
    return middle < kth ? middle : next;
}

// One block: TILE queries of one head. Thread (rg, cg) of the 16 x 8 owns the scores of R queries and K keys
// of a tile, and D dimensions of those queries' outputs; in between, thread r < TILE owns row r.
template <class Float, int HS, bool TOPK>
__global__ void attention_forward_kernel(Float* out, AttentionRows rows, const Float* qkv, int T,
                                         int num_heads, int hs, int topk) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, K = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* q_turned = (float*)shared;          // [HS][TILE]
    float* kv = q_turned + HS * TILE;          // keys [HS][TILE], then values [TILE][HS]
    float* p_turned = kv + HS * TILE;          // [key][query]: scores, then probabilities
    float* row_max_ = p_turned + TILE * TILE;  // [TILE]
    float* row_scale = row_max_ + TILE;        // [TILE]: what the row's sums so far are multiplied by
    float* row_sum_ = row_scale + TILE;        // [TILE]

    const int C = num_heads * hs, tid = threadIdx.x;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * TILE;  // the longest rows start first
    const int r0 = tid / kColumnGroups * R, c0 = tid % kColumnGroups * K, d0 = tid % kColumnGroups * D;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)b * T * stride + head * hs;
    const Float *k = q + C, *v = q + 2 * C;
    const float scale = 1.0f / sqrtf((float)hs);

    load_tile_turned<Float, HS, TILE>(q_turned, q + first_query * stride, stride, T - first_query, hs);
    float o[R][D] = {}, sum[R] = {};
    TopList list;
    float max = -INFINITY;
    if (TOPK) list.clear(topk);

    for (int first_key = 0; first_key <= first_query; first_key += TILE) {
        __syncthreads();  // everybody is done with the last tile
        load_tile_turned<Float, HS, TILE>(kv, k + first_key * stride, stride, T - first_key, hs);
        __syncthreads();
        float s[R][K] = {};
        accumulate_tile(s, q_turned + r0, TILE, kv + c0, TILE, HS);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < K; c++) {
                const bool visible = first_key + c0 + c <= first_query + r0 + r;
                s[r][c] = visible ? s[r][c] * scale : -INFINITY;
                p_turned[(c0 + c) * TILE + r0 + r] = s[r][c];
            }
        __syncthreads();

        load_tile<Float, HS, TILE>(kv, v + first_key * stride, stride, T - first_key, hs);
        if (tid < TILE) {  // row tid: its new maximum, and its largest scores
            const int visible = min(TILE, first_query + tid - first_key + 1);
            float new_max = max;
            for (int j = 0; j < visible; j++) new_max = fmaxf(new_max, p_turned[j * TILE + tid]);
            if (TOPK)
                for (int j = 0; j < visible; j++) list.insert(p_turned[j * TILE + tid], topk);
            row_max_[tid] = new_max;
            row_scale[tid] = __expf(max - new_max);
            max = new_max;
        }
        __syncthreads();

        for (int r = 0; r < R; r++) {
            const float m = row_max_[r0 + r], rescale = row_scale[r0 + r];
            for (int c = 0; c < K; c++) p_turned[(c0 + c) * TILE + r0 + r] = __expf(s[r][c] - m);
            for (int d = 0; d < D; d++) o[r][d] *= rescale;
            sum[r] *= rescale;
        }
        __syncthreads();
        accumulate_tile(o, p_turned + r0, TILE, kv + d0, HS, TILE);
        for (int j = 0; j < TILE; j++)  // the same sum in all 8 threads of a row: cheaper than sharing it
            for (int r = 0; r < R; r++) sum[r] += p_turned[j * TILE + r0 + r];
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

// Floats as unsigned integers in the same order.
__device__ inline unsigned ordered_bits(float x) {
    const unsigned u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ inline float from_ordered_bits(unsigned u) {
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

// Any k: one block a row. The row's scores are held in shared memory, and the k-th largest is found by
// deciding the bits of its ordered integer from the top, counting the scores that reach it each time.
template <class Float>
__global__ void attention_select_kernel(AttentionRows rows, const Float* qkv, int T, int num_heads, int hs,
                                        int topk) {
    extern __shared__ float4 shared[];
    float* s = (float*)shared;  // [T]
    __shared__ float float_scratch[2][32];
    __shared__ int int_scratch[2][32];
    const int C = num_heads * hs, i = blockIdx.x, n = i + 1, tid = threadIdx.x;
    const size_t row = (size_t)blockIdx.y * T + i, stride = 3 * (size_t)C;
    if (n <= topk) {
        if (tid == 0) {
            rows.theta[row] = -INFINITY;
            rows.mass[row] = 1.0f;
            rows.tie[row] = 0.0f;
        }
        return;
    }
    const Float* q = qkv + (size_t)(blockIdx.y / num_heads) * T * stride + blockIdx.y % num_heads * hs;
    const Float* k = q + C;
    const float scale = 1.0f / sqrtf((float)hs);
    for (int j = tid; j < n; j += blockDim.x) {
        float dot = 0.0f;
        for (int d = 0; d < hs; d++) dot = fmaf((float)q[i * stride + d], (float)k[j * stride + d], dot);
        s[j] = dot * scale;
    }
    __syncthreads();

    int turn = 0;  // block_sum's scratch is free for the next use only after a barrier: take turns
    auto count = [&](auto wanted) {
        int c = 0;
        for (int j = tid; j < n; j += blockDim.x) c += wanted(s[j]) ? 1 : 0;
        turn ^= 1;
        c = block_sum(c, int_scratch[turn]);
        return c;
    };
    unsigned key = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned candidate = key | 1u << bit;
        if (count([&](float x) { return ordered_bits(x) >= candidate; }) >= topk) key = candidate;
    }
    const float kth = from_ordered_bits(key);
    const int above = count([&](float x) { return x > kth; });
    const int ties = count([&](float x) { return x == kth; });

    // the largest score and the largest one below kth; -infinity sorts below every score
    unsigned top = 0, below = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned t = top | 1u << bit, u = below | 1u << bit;
        if (count([&](float x) { return ordered_bits(x) >= t; }) > 0) top = t;
        if (count([&](float x) { return x < kth && ordered_bits(x) >= u; }) > 0) below = u;
    }
    const float max = from_ordered_bits(top);
    float theta = kth, tie = (float)(topk - above) / (float)ties;
    if (above + ties == topk) {
        theta = threshold_between(kth, from_ordered_bits(below));
        tie = 0.0f;
    }
    float head = 0.0f, total = 0.0f;
    for (int j = tid; j < n; j += blockDim.x) {
        const float e = expf(s[j] - max);
        total += e;
        head += s[j] > theta ? e : s[j] == theta ? tie * e : 0.0f;
    }
    total = block_sum(total, float_scratch[0]);
    head = block_sum(head, float_scratch[1]);
    if (tid == 0) {
        rows.theta[row] = theta;
        rows.mass[row] = fminf(head / total, 1.0f);
        rows.tie[row] = tie;
    }
}

// What the backward needs of a row: delta = D + c M, and c (0 where the row is not regularized). [B,NH,T]
// each.
template <class Float>
__global__ void attention_delta_kernel(float* delta, float* slope, const Float* dout, const Float* out,
                                       const float* mass, Reg reg, float weight, int T, int num_heads, int hs,
                                       int topk, int num_rows) {
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
    const float c = weight != 0.0f && i + 1 > topk ? weight * reg_slope(reg, mass[row]) : 0.0f;
    slope[row] = c;
    delta[row] = c != 0.0f ? D + c * mass[row] : D;
}

// The row's numbers as the two kernels below hold them in shared memory: [TILE] each.
template <int TILE>
struct RowTile {
    float lse[TILE], theta[TILE], tie[TILE], delta[TILE], slope[TILE];

    template <bool TOPK>
    __device__ void load(const AttentionRows& rows, const float* delta_, const float* slope_, size_t row,
                         int valid) {
        const int r = threadIdx.x;
        if (r >= TILE) return;
        const bool in = r < valid;
        lse[r] = in ? rows.lse[row + r] : 0.0f;
        delta[r] = in ? delta_[row + r] : 0.0f;
        if (!TOPK) return;
        theta[r] = in ? rows.theta[row + r] : 0.0f;
        tie[r] = in ? rows.tie[row + r] : 0.0f;
        slope[r] = in ? slope_[row + r] : 0.0f;
    }

    // ds for one score s of row r, from its probability p and dp.
    template <bool TOPK>
    __device__ float score_gradient(int r, float s, float p, float dp) const {
        float g = dp - delta[r];
        if (TOPK) g += slope[r] * (s > theta[r] ? 1.0f : s == theta[r] ? tie[r] : 0.0f);
        return p * g;
    }
};

// dq. One block: TILE queries of one head, over the tiles of keys that they see.
template <class Float, int HS, bool TOPK>
__global__ void attention_backward_query_kernel(Float* dqkv, const Float* dout, const Float* qkv,
                                                AttentionRows rows, const float* delta, const float* slope,
                                                int T, int num_heads, int hs) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, K = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* q_turned = (float*)shared;         // [HS][TILE]
    float* do_turned = q_turned + HS * TILE;  // [HS][TILE]
    float* k_tile = do_turned + HS * TILE;    // keys [HS][TILE], then [TILE][HS]
    float* v_turned = k_tile + HS * TILE;     // [HS][TILE]
    float* ds_turned = v_turned + HS * TILE;  // [key][query]
    RowTile<TILE>& tile = *(RowTile<TILE>*)(ds_turned + TILE * TILE);

    const int C = num_heads * hs, tid = threadIdx.x;
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * TILE;
    const int r0 = tid / kColumnGroups * R, c0 = tid % kColumnGroups * K, d0 = tid % kColumnGroups * D;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)b * T * stride + head * hs;
    const Float *k = q + C, *v = q + 2 * C;
    const float scale = 1.0f / sqrtf((float)hs);

    load_tile_turned<Float, HS, TILE>(q_turned, q + first_query * stride, stride, T - first_query, hs);
    load_tile_turned<Float, HS, TILE>(do_turned, dout + ((size_t)b * T + first_query) * C + head * hs, C,
                                      T - first_query, hs);
    tile.template load<TOPK>(rows, delta, slope, (size_t)blockIdx.y * T + first_query, T - first_query);
    float dq[R][D] = {};

    for (int first_key = 0; first_key <= first_query; first_key += TILE) {
        __syncthreads();
        load_tile_turned<Float, HS, TILE>(k_tile, k + first_key * stride, stride, T - first_key, hs);
        load_tile_turned<Float, HS, TILE>(v_turned, v + first_key * stride, stride, T - first_key, hs);
        __syncthreads();
        float s[R][K] = {}, dp[R][K] = {};
        accumulate_tile(s, q_turned + r0, TILE, k_tile + c0, TILE, HS);
        accumulate_tile(dp, do_turned + r0, TILE, v_turned + c0, TILE, HS);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < K; c++) {
                const bool visible = first_key + c0 + c <= first_query + r0 + r;
                const float score = s[r][c] * scale;
                const float p = visible ? __expf(score - tile.lse[r0 + r]) : 0.0f;
                ds_turned[(c0 + c) * TILE + r0 + r] =
                    tile.template score_gradient<TOPK>(r0 + r, score, p, dp[r][c]);
            }
        __syncthreads();
        load_tile<Float, HS, TILE>(k_tile, k + first_key * stride, stride, T - first_key, hs);
        __syncthreads();
        accumulate_tile(dq, ds_turned + r0, TILE, k_tile + d0, HS, TILE);
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
template <class Float, int HS, bool TOPK>
__global__ void attention_backward_key_kernel(Float* dqkv, const Float* dout, const Float* qkv,
                                              AttentionRows rows, const float* delta, const float* slope,
                                              int T, int num_heads, int hs) {
    constexpr int TILE = kTile<HS>;
    constexpr int R = TILE / kRowGroups, Q = TILE / kColumnGroups, D = HS / kColumnGroups;
    extern __shared__ float4 shared[];
    float* k_turned = (float*)shared;        // [HS][TILE]
    float* v_turned = k_turned + HS * TILE;  // [HS][TILE]
    float* q_tile = v_turned + HS * TILE;    // queries [HS][TILE], then [TILE][HS]
    float* do_tile = q_tile + HS * TILE;     // the same of dout
    float* p = do_tile + HS * TILE;          // [query][key]
    float* ds = p + TILE * TILE;             // [query][key]
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

    load_tile_turned<Float, HS, TILE>(k_turned, k + first_key * stride, stride, T - first_key, hs);
    load_tile_turned<Float, HS, TILE>(v_turned, v + first_key * stride, stride, T - first_key, hs);
    float dk[R][D] = {}, dv[R][D] = {};

    for (int first_query = first_key; first_query < T; first_query += TILE) {
        __syncthreads();
        load_tile_turned<Float, HS, TILE>(q_tile, q + first_query * stride, stride, T - first_query, hs);
        load_tile_turned<Float, HS, TILE>(do_tile, dout_head + (size_t)first_query * C, C, T - first_query,
                                          hs);
        tile.template load<TOPK>(rows, delta, slope, (size_t)blockIdx.y * T + first_query, T - first_query);
        __syncthreads();
        float s[R][Q] = {}, dp[R][Q] = {};  // [key][query]
        accumulate_tile(s, k_turned + r0, TILE, q_tile + c0, TILE, HS);
        accumulate_tile(dp, v_turned + r0, TILE, do_tile + c0, TILE, HS);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < Q; c++) {
                const int i = first_query + c0 + c;
                const bool visible = first_key + r0 + r <= i && i < T;
                const float score = s[r][c] * scale;
                const float prob = visible ? __expf(score - tile.lse[c0 + c]) : 0.0f;
                p[(c0 + c) * TILE + r0 + r] = prob;
                ds[(c0 + c) * TILE + r0 + r] =
                    tile.template score_gradient<TOPK>(c0 + c, score, prob, dp[r][c]);
            }
        __syncthreads();
        load_tile<Float, HS, TILE>(q_tile, q + first_query * stride, stride, T - first_query, hs);
        load_tile<Float, HS, TILE>(do_tile, dout_head + (size_t)first_query * C, C, T - first_query, hs);
        __syncthreads();
        accumulate_tile(dv, p + r0, TILE, do_tile + d0, HS, TILE);
        accumulate_tile(dk, ds + r0, TILE, q_tile + d0, HS, TILE);
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

// What a layer's heads did, summed over the rows of one (batch row, head) each: sums[B*NH][2] = {M, f(M)}
// over the queries with more than k keys.
[[maybe_unused]] static __global__ void attention_mass_sums_kernel(float* sums, const float* mass, Reg reg,
                                                                   int T, int topk) {
    __shared__ float scratch[2][32];
    const float* row = mass + (size_t)blockIdx.x * T;
    float m = 0.0f, f = 0.0f;
    for (int i = topk + threadIdx.x; i < T; i += blockDim.x) {
        m += row[i];
        f += reg_value(reg, row[i]);
    }
    m = block_sum(m, scratch[0]);
    f = block_sum(f, scratch[1]);
    if (threadIdx.x == 0) {
        sums[blockIdx.x * 2] = m;
        sums[blockIdx.x * 2 + 1] = f;
    }
}

// Where the mass goes, for validation: sums[B*NH][4], over the queries with more than k keys, of
// {p_i0, p_ii, top-k mass without key 0, all mass without key 0}.
template <class Float>
__global__ void attention_sink_sums_kernel(float* sums, AttentionRows rows, const Float* qkv, int T,
                                           int num_heads, int hs, int topk) {
    __shared__ float scratch[4][32];
    const int C = num_heads * hs;
    const size_t stride = 3 * (size_t)C;
    const Float* q = qkv + (size_t)(blockIdx.x / num_heads) * T * stride + blockIdx.x % num_heads * hs;
    const Float* k = q + C;
    const float scale = 1.0f / sqrtf((float)hs);
    float sum[4] = {};
    for (int i = topk + threadIdx.x; i < T; i += blockDim.x) {
        const size_t row = (size_t)blockIdx.x * T + i;
        float first = 0.0f, self = 0.0f;
        for (int d = 0; d < hs; d++) {
            first = fmaf((float)q[i * stride + d], (float)k[d], first);
            self = fmaf((float)q[i * stride + d], (float)k[i * stride + d], self);
        }
        first *= scale;
        const float p0 = fminf(expf(first - rows.lse[row]), 1.0f), theta = rows.theta[row];
        const float member = first > theta ? 1.0f : first == theta ? rows.tie[row] : 0.0f;
        sum[0] += p0;
        sum[1] += expf(self * scale - rows.lse[row]);
        sum[2] += fmaxf(rows.mass[row] - member * p0, 0.0f);
        sum[3] += 1.0f - p0;
    }
    for (int s = 0; s < 4; s++) {
        const float total = block_sum(sum[s], scratch[s]);
        if (threadIdx.x == 0) sums[blockIdx.x * 4 + s] = total;
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

template <class Kernel, class... Args>
void launch_attention(const Context& ctx, Kernel kernel, dim3 grid, size_t shared, Args... args) {
    assert(shared <= ctx.max_shared);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<grid, kAttentionThreads, shared, ctx.stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}

// The longest context that top-k selection beyond kMaxListed can hold in shared memory.
inline int max_select_context(const Context& ctx) {
    return (int)((ctx.max_shared - 1024) / sizeof(float));
}

// out [B,T,C]; qkv [B,T,3C]: queries, keys and values of all heads, C = num_heads * hs. rows.lse is written;
// with topk > 0 also theta, mass and tie, for that k (above kMaxListed, T is at most max_select_context).
template <class Float>
void attention_forward(const Context& ctx, Float* out, AttentionRows rows, const Float* qkv, int B, int T,
                       int num_heads, int hs, int topk) {
    assert(B > 0 && T > 0 && topk >= 0 && B * num_heads <= 65535);
    const bool listed = topk > 0 && topk <= kMaxListed;
    with_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        const dim3 grid(ceil_div(T, kTile<HS>), B * num_heads);
        const size_t shared = attention_shared<HS>(2, 1, 3);
        if (listed)
            launch_attention(ctx, attention_forward_kernel<Float, HS, true>, grid, shared, out, rows, qkv, T,
                             num_heads, hs, topk);
        else
            launch_attention(ctx, attention_forward_kernel<Float, HS, false>, grid, shared, out, rows, qkv, T,
                             num_heads, hs, topk);
    });
    if (topk > kMaxListed) {
        assert(T <= max_select_context(ctx));
        launch_attention(ctx, attention_select_kernel<Float>, dim3(T, B * num_heads), T * sizeof(float), rows,
                         qkv, T, num_heads, hs, topk);
    }
}

// dqkv [B,T,3C] is overwritten. dout, out [B,T,C]; rows as the forward saved them for the same topk.
// weight: lambda / N of this layer (0: no regularizer). scratch: 2 * B * num_heads * T floats.
template <class Float>
void attention_backward(const Context& ctx, Float* dqkv, float* scratch, const Float* dout, const Float* out,
                        const Float* qkv, AttentionRows rows, Reg reg, float weight, int B, int T,
                        int num_heads, int hs, int topk) {
    assert(B > 0 && T > 0 && (weight == 0.0f || topk > 0) && B * num_heads <= 65535);
    const int num_rows = B * num_heads * T;
    float *delta = scratch, *slope = scratch + num_rows;
    attention_delta_kernel<<<ceil_div(num_rows, 128), 128, 0, ctx.stream>>>(
        delta, slope, dout, out, rows.mass, reg, weight, T, num_heads, hs, topk, num_rows);
    CUDA_CHECK(cudaGetLastError());
    with_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        const dim3 grid(ceil_div(T, kTile<HS>), B * num_heads);
        auto launch_both = [&](auto query_kernel, auto key_kernel) {
            launch_attention(ctx, query_kernel, grid, attention_shared<HS>(4, 1, 5), dqkv, dout, qkv, rows,
                             delta, slope, T, num_heads, hs);
            launch_attention(ctx, key_kernel, grid, attention_shared<HS>(4, 2, 5), dqkv, dout, qkv, rows,
                             delta, slope, T, num_heads, hs);
        };
        if (weight != 0.0f)
            launch_both(attention_backward_query_kernel<Float, HS, true>,
                        attention_backward_key_kernel<Float, HS, true>);
        else
            launch_both(attention_backward_query_kernel<Float, HS, false>,
                        attention_backward_key_kernel<Float, HS, false>);
    });
}

// sums [B*NH][2], see attention_mass_sums_kernel; mass [B,NH,T].
inline void attention_mass_sums(const Context& ctx, float* sums, const float* mass, Reg reg, int B, int T,
                                int num_heads, int topk) {
    attention_mass_sums_kernel<<<B * num_heads, 64, 0, ctx.stream>>>(sums, mass, reg, T, topk);
    CUDA_CHECK(cudaGetLastError());
}

// sums [B*NH][4], see attention_sink_sums_kernel.
template <class Float>
void attention_sink_sums(const Context& ctx, float* sums, AttentionRows rows, const Float* qkv, int B, int T,
                         int num_heads, int hs, int topk) {
    attention_sink_sums_kernel<<<B * num_heads, 64, 0, ctx.stream>>>(sums, rows, qkv, T, num_heads, hs, topk);
    CUDA_CHECK(cudaGetLastError());
}
