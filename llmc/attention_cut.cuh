// Attention over whole sequences with every row cut to k of its keys: what a model that reads only k keys
// would compute. For evaluation: no gradients, and the scores of a row lie in shared memory.
//
//   s_ij = q_i . k_j / sqrt(hs) for j <= i,  p = softmax(s)
//   S_i: min(k, i + 1) of the keys that row i sees, see Cut
//   kept_i = sum of p_ij over S_i
//   o_i = sum over S_i of p_ij v_j, divided by kept_i if renormalized
//
// A block takes 8 queries of one head, so that a key that is read serves 8 rows: all threads compute scores,
// a thread a key; then a warp has one row to itself. On the CPU backend a block is one thread, which has
// nobody to wait for. Scores are the same chain of fmaf as in attention_plain.cuh, so in fp32 they have the
// same bits.
//
// Reads of keys, from L2: T^2 / 16 * hs elements a head (T = 1024, hs = 64, fp32: 17 MB), T^2 * hs FLOPs for
// the scores; values: each row reads those of its S_i.
#pragma once
#include "attention_common.cuh"
#include "random.h"

// Which keys a row keeps. `topk`: the k largest scores, of equal ones the earliest. `random`: k keys drawn
// uniformly without replacement. `recent`: the last k, the query's own included. `first_recent`: key 0 and
// the last k - 1.
enum class Cut { dense, topk, random, recent, first_recent };
inline constexpr const char* kCutWords[] = {"dense", "topk", "random", "recent", "first_recent"};

inline constexpr int kCutRows = 8;  // of a block
inline constexpr int kMaxCutHeadSize = 128;

// ---------------------------------------------------------------------------------------------------------
// one row, shared by LANES threads: 32 or 1, see Context::row_lanes

template <int LANES>
__device__ void row_barrier() {
    if (LANES > 1) __syncwarp();
}
template <int LANES>
__device__ int row_count(int x) {
    return LANES > 1 ? __reduce_add_sync(0xffffffffu, x) : x;
}

// The sum of f(j) over j < n, the same in every lane. A single thread adds up 16 sums side by side, which fit
// a vector register.
template <int LANES, class F>
__device__ float sum_over_row(int lane, int n, F f) {
    constexpr int N = LANES == 1 ? 16 : 1;
    float sum[N] = {};
    int j = lane;
    if (N > 1)
        for (; j + N <= n; j += N)
            for (int u = 0; u < N; u++) sum[u] += f(j + u);
    for (; j < n; j += LANES) sum[0] += f(j);
    for (int u = 1; u < N; u++) sum[0] += sum[u];
    return row_sum<LANES>(sum[0]);
}

// The largest of the s[j] with keep(j), one at least. As integers, since g++ reduces those in vector
// registers.
template <int LANES, class Keep>
__device__ float max_over_row(int lane, int n, const float* s, Keep keep) {
    unsigned top = 0;
    for (int j = lane; j < n; j += LANES) {
        const unsigned bits = keep(j) ? ordered_bits(s[j]) : 0;
        top = top < bits ? bits : top;
    }
    return from_ordered_bits(LANES > 1 ? __reduce_max_sync(0xffffffffu, top) : top);
}

// k of a row's keys by their rank, an unsigned integer: all of a higher rank than `rank`, and those of this
// rank up to position `last`.
struct Chosen {
    unsigned rank;
    int last;
    __device__ bool has(unsigned r, int j) const { return r > rank || (r == rank && j <= last); }
};

// The k keys of highest rank(j) among j < n, of equal ones the earliest. The bits of the k-th highest rank
// are decided from the top, by counting the keys that reach it; it ends early once k keys are told from the
// rest.
template <int LANES, class Rank>
__device__ Chosen choose_highest(int lane, int n, int k, Rank rank) {
    if (n <= k) return {0, n};
    auto count = [&](auto wanted) {
        int c = 0;
        for (int j = lane; j < n; j += LANES) c += wanted(j) ? 1 : 0;
        return row_count<LANES>(c);
    };
    unsigned kth = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned candidate = kth | 1u << bit;
        const int reach = count([&](int j) { return rank(j) >= candidate; });
        if (reach == k) return {candidate, n};
        if (reach > k) kth = candidate;
    }
    // More than k keys reach the k-th rank: the first `places` of those that tie get in.
    const int places = k - count([&](int j) { return rank(j) > kth; });
    int last = 0;
    for (int bit = 30; bit >= 0; bit--) {
        const int candidate = last | 1 << bit;
        if (candidate < n && count([&](int j) { return rank(j) == kth && j < candidate; }) < places)
            last = candidate;
    }
    return {kth, last};
}

// The rank of a score. + 0 makes the two zeros one.
__device__ inline unsigned score_rank(float score) {
    return ordered_bits(score + 0.0f);
}

// Calls body(d, x) for each dimension d = lane + x LANES of a head that this lane owns.
template <int LANES, class Body>
__device__ __forceinline__ void for_owned_dimensions(int lane, int hs, Body body) {
    const int owned = LANES == 1 ? hs : kMaxCutHeadSize / LANES;
#pragma unroll
    for (int x = 0; x < owned; x++)
        if (LANES == 1 || lane + x * LANES < hs) body(lane + x * LANES, x);
}

// sum[x] += weight(j) v[j][d] over j < n for the dimensions d that this lane owns; the values of keys with
// weight 0 are not read.
template <int LANES, class Float, class Weight>
__device__ __forceinline__ void add_values(float (&sum)[kMaxCutHeadSize / LANES], int lane, int n, int hs,
                                           const Float* v, size_t stride, Weight weight) {
    for (int j = 0; j < n; j++) {
        const float w = weight(j);
        if (w == 0.0f) continue;
        const Float* value = v + j * stride;
        for_owned_dimensions<LANES>(lane, hs,
                                    [&](int d, int x) { sum[x] = fmaf(w, (float)value[d], sum[x]); });
    }
}

// ---------------------------------------------------------------------------------------------------------
// kernels

// The queries of a block: `rows` from `first` on, at most `most` of them. Block 0 takes the last ones, so
// that the longest rows start first.
template <class Float>
struct BlockQueries {
    int first, rows;
    size_t stride;           // from one position to the next
    const Float *q, *k, *v;  // of this head at position 0

    __device__ BlockQueries(const Float* qkv, int b, int head, int T, int num_heads, int hs, int most)
        : first((gridDim.x - 1 - blockIdx.x) * most),
          rows(min(most, T - first)),
          stride(3 * (size_t)num_heads * hs),
          q(qkv + (size_t)b * T * stride + head * hs),
          k(q + num_heads * hs),
          v(k + num_heads * hs) {}
};

// s[r row_floats + j] = q_i . k_j / sqrt(hs) for every query i = first + r of the block and every key j that
// the last of them sees. q_transposed: [hs][kCutRows] of shared memory. For the whole block; ends with a
// barrier.
template <class Float, int LANES>
__device__ void block_scores(float* s, int row_floats, float* q_transposed, const BlockQueries<Float>& block,
                             int hs) {
    constexpr int N = Pack<Float>::size, R = kCutRows;
    constexpr int KEYS = LANES == 1 ? 8 : 1;  // at once, so that a single thread need not wait for each fmaf
    const Float* q = block.q + block.first * block.stride;
    for (int i = threadIdx.x; i < R * hs; i += blockDim.x)
        q_transposed[i] = i % R < block.rows ? (float)q[i % R * block.stride + i / R] : 0.0f;
    __syncthreads();
    const int n = block.first + block.rows;
    const float scale = 1.0f / sqrtf((float)hs);
    for (int j = threadIdx.x * KEYS; j < n; j += blockDim.x * KEYS) {
        float dot[KEYS][R] = {};
        for (int d = 0; d < hs; d += N) {
            Pack<Float> key[KEYS];
            for (int c = 0; c < KEYS; c++) key[c] = load_pack(block.k + min(j + c, n - 1) * block.stride + d);
            for (int u = 0; u < N; u++)
                for (int c = 0; c < KEYS; c++)
#pragma omp simd  // a row in each lane of a vector register, on the CPU backend
                    for (int r = 0; r < R; r++)
                        dot[c][r] = fmaf(q_transposed[(d + u) * R + r], (float)key[c][u], dot[c][r]);
        }
        for (int r = 0; r < block.rows; r++)
            for (int c = 0; c < KEYS; c++)
                if (j + c < n) s[r * row_floats + j + c] = dot[c][r] * scale;
    }
    __syncthreads();
}

// Grid: (groups of `rows` queries, B * NH).
template <class Float, int LANES>
__global__ void attention_cut_kernel(Float* out, float* kept, const Float* qkv, int T, int num_heads, int hs,
                                     int rows, Cut cut, int k, bool renormalize, uint64_t seed) {
    extern __shared__ float4 shared[];
    float* q_transposed = (float*)shared;          // [hs][kCutRows]
    float* scores = q_transposed + hs * kCutRows;  // [rows][T]
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads;
    const BlockQueries<Float> block(qkv, b, head, T, num_heads, hs, rows);
    block_scores<Float, LANES>(scores, T, q_transposed, block, hs);

    const int lane = threadIdx.x % LANES;
    for (int r = threadIdx.x / LANES; r < block.rows; r += blockDim.x / LANES) {
        const int i = block.first + r, n = i + 1;
        const size_t row = (size_t)blockIdx.y * T + i;
        float* s = scores + r * T;
        const float max = max_over_row<LANES>(lane, n, s, [](int) { return true; });
        const float total = sum_over_row<LANES>(lane, n, [&](int j) { return __expf(s[j] - max); });

        // Replaces the scores by weights, exp(s_ij - max over S_i) or 0. The maximum is that of S_i, so that
        // a row whose kept keys are all far below the largest still has an output to be renormalized.
        float kept_sum = 0.0f, kept_mass = 0.0f;
        auto weigh = [&](auto keep) {
            const float kept_max = max_over_row<LANES>(lane, n, s, keep);
            kept_sum = sum_over_row<LANES>(lane, n, [&](int j) {
                const float w = keep(j) ? __expf(s[j] - kept_max) : 0.0f;
                s[j] = w;
                return w;
            });
            kept_mass = fminf(__expf(kept_max - max) * (kept_sum / total), 1.0f);
        };
        if (cut == Cut::topk) {
            auto rank = [&](int j) { return score_rank(s[j]); };
            const Chosen chosen = choose_highest<LANES>(lane, n, k, rank);
            weigh([&](int j) { return chosen.has(rank(j), j); });
        } else if (cut == Cut::random) {
            const uint64_t row_seed = splitmix64(seed, row);
            auto rank = [&](int j) { return (unsigned)(splitmix64(row_seed, j) >> 32); };
            const Chosen chosen = choose_highest<LANES>(lane, n, k, rank);
            weigh([&](int j) { return chosen.has(rank(j), j); });
        } else if (cut == Cut::recent) {
            weigh([&](int j) { return j >= n - k; });
        } else if (cut == Cut::first_recent) {
            weigh([&](int j) { return j == 0 || j > n - k; });
        } else {
            weigh([](int) { return true; });
        }
        row_barrier<LANES>();

        float o[kMaxCutHeadSize / LANES] = {};
        add_values<LANES>(o, lane, n, hs, block.v, block.stride, [&](int j) { return s[j]; });
        const float factor = (renormalize ? 1.0f : kept_mass) / kept_sum;
        Float* o_row = out + (((size_t)b * T + i) * num_heads + head) * hs;
        for_owned_dimensions<LANES>(lane, hs, [&](int d, int x) { o_row[d] = (Float)(o[x] * factor); });
        if (kept && lane == 0) kept[row] = kept_mass;
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Calls launch(lanes of a row, as a compile-time constant; grid; threads, bytes of shared memory and rows of
// a block) for a kernel whose rows take row_floats floats of shared memory each.
template <class Launch>
void with_cut_rows(const Context& ctx, int heads, int T, int hs, int row_floats, Launch launch) {
    assert(T > 0 && hs % 8 == 0 && hs <= kMaxCutHeadSize && heads > 0 && heads <= kMaxGridY);
    const int fit = (int)(ctx.max_shared / sizeof(float) - hs * kCutRows) / row_floats;
    const int rows = fit < kCutRows ? fit : kCutRows;
    const size_t shared = sizeof(float) * (hs * kCutRows + (size_t)rows * row_floats);
    with_row_lanes(ctx, [&](auto lanes) {
        launch(lanes, dim3(ceil_div(T, rows), heads), lanes == 1 ? 1 : 32 * kCutRows, shared, rows);
    });
}

// The longest context of which a block can hold a row of scores.
inline int max_cut_context(const Context& ctx) {
    return (int)(ctx.max_shared / sizeof(float)) - kMaxCutHeadSize * kCutRows;
}

// out [B,T,C], with C = num_heads * hs; kept [B,NH,T], may be null; qkv [B,T,3C] as for attention_forward. k
// is at least 1 (not looked at where cut is dense). seed is for Cut::random alone: the same seed draws the
// same keys, so a caller gives each layer its own. Throws where T is above max_cut_context.
template <class Float>
void attention_cut_forward(const Context& ctx, Float* out, float* kept, const Float* qkv, int B, int T,
                           int num_heads, int hs, Cut cut, int k, bool renormalize, uint64_t seed) {
    assert(cut == Cut::dense || k >= 1);
    if (T > max_cut_context(ctx))
        fail("a context of %d tokens is too long to cut attention rows on %s: use one of at most %d tokens",
             T, ctx.device_name.c_str(), max_cut_context(ctx));
    with_cut_rows(ctx, B * num_heads, T, hs, T,
                  [&](auto lanes, dim3 grid, int threads, size_t shared, int rows) {
                      launch_attention(ctx, attention_cut_kernel<Float, lanes>, grid, threads, shared, out,
                                       kept, qkv, T, num_heads, hs, rows, cut, k, renormalize, seed);
                  });
}
