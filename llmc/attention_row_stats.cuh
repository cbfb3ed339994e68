// The statistics of attention rows: RowStats (attention_row_stats.h) for every row of a layer, and the rows
// themselves for a head to be drawn. Built like attention_cut.cuh: a block computes the scores of 8 queries,
// then a row belongs to one warp, or to the one thread of a block on the CPU backend.
#pragma once
#include "attention_cut.cuh"
#include "attention_row_stats.h"

// ---------------------------------------------------------------------------------------------------------
// one row, shared by LANES threads

// The least power of two that is not below n.
__host__ __device__ inline int power_of_two(int n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}

// Sorts n numbers, none negative, in descending order, by the bitonic network (Batcher, AFIPS 1968), which
// compares the same places whatever the numbers: runs of 2, 4, 8, ... are merged, the second half of each
// being read backwards. They are compared as integers, which are in the same order, and of which g++ takes
// the larger without a branch. a has room for power_of_two(n); what is behind n is overwritten. Begins and
// ends with a barrier.
template <int LANES>
__device__ void sort_descending(int lane, int n, float* a) {
    const int padded = power_of_two(n);
    for (int j = n + lane; j < padded; j += LANES) a[j] = -1.0f;
    row_barrier<LANES>();
    for (int run = 2; run <= padded; run *= 2)
        for (int step = run / 2; step > 0; step /= 2) {
            const int partner = step == run / 2 ? run - 1 : step;
            for (int x = lane; x < padded / 2; x += LANES) {
                const int at = 2 * x - (x & (step - 1));
                const int one = __float_as_int(a[at]), other = __float_as_int(a[at ^ partner]);
                a[at] = __int_as_float(max(one, other));
                a[at ^ partner] = __int_as_float(min(one, other));
            }
            row_barrier<LANES>();
        }
}

// The root of the sum of f(x)^2 over the dimensions of a head.
template <int LANES, class F>
__device__ float norm_over_head(int lane, int hs, F f) {
    float sum = 0.0f;
    for_owned_dimensions<LANES>(lane, hs, [&](int, int x) { sum = fmaf(f(x), f(x), sum); });
    return sqrtf(row_sum<LANES>(sum));
}

// Fills in what depends on the largest probabilities of a row, as one thread: `others` are those of all n - 1
// keys but key 0, in descending order, and key 0, which has probability `first`, comes after `before_first`
// of them. Adds up in double, so that keys are counted right where thousands are about equal. Needs
// stats.nosink.
__device__ inline void sum_largest(RowStats& stats, const float* others, int n, float first, int before_first,
                                   int k) {
    stats.mass_k = 1.0f;
    stats.mass_nosink_k = stats.nosink;
    for (int x = 0; x < kNumReportKs; x++) {
        stats.mass[x] = 1.0f;
        stats.mass_nosink[x] = stats.nosink;
    }
    stats.keys90 = stats.keys95 = stats.keys99 = (float)n;
    constexpr int largest = kReportKs[kNumReportKs - 1];
    static_assert(largest == 1 << (kNumReportKs - 1));  // they are the powers of two
    const int most = k > largest ? k : largest;
    double sum = 0.0, sum_others = 0.0;
    for (int taken = 1, next = 0; taken < n && (taken <= most || sum < 0.99); taken++) {
        const double before = sum;
        if (taken == before_first + 1) {
            sum += first;
        } else {
            sum += others[next];
            sum_others += others[next++];
        }
        const float mass = fminf((float)sum, 1.0f), nosink = (float)sum_others;
        for (int x = 0; x < kNumReportKs; x++)
            if (taken == 1 << x) stats.mass[x] = mass, stats.mass_nosink[x] = nosink;
        if (taken == k) stats.mass_k = mass, stats.mass_nosink_k = nosink;
        if (before < 0.90 && sum >= 0.90) stats.keys90 = (float)taken;
        if (before < 0.95 && sum >= 0.95) stats.keys95 = (float)taken;
        if (before < 0.99 && sum >= 0.99) stats.keys99 = (float)taken;
    }
}

// ---------------------------------------------------------------------------------------------------------
// kernels

// Grid: (groups of `rows` queries, B * NH). row_floats: see row_stats_floats.
template <class Float, int LANES>
__global__ void attention_row_stats_kernel(RowStats* stats, const Float* qkv, int T, int num_heads, int hs,
                                           int rows, int row_floats, int k) {
    constexpr int D = kMaxCutHeadSize / LANES;
    extern __shared__ float4 shared[];
    float* q_transposed = (float*)shared;          // [hs][kCutRows]
    float* scores = q_transposed + hs * kCutRows;  // [rows][row_floats]
    const BlockQueries<Float> block(qkv, blockIdx.y / num_heads, blockIdx.y % num_heads, T, num_heads, hs,
                                    rows);
    block_scores<Float, LANES>(scores, row_floats, q_transposed, block, hs);

    const int lane = threadIdx.x % LANES;
    for (int r = threadIdx.x / LANES; r < block.rows; r += blockDim.x / LANES) {
        const int i = block.first + r, n = i + 1;
        const float* s = scores + r * row_floats;
        float* p = scores + r * row_floats + T;
        RowStats row;
        const float max = max_over_row<LANES>(lane, n, s, [](int) { return true; });
        const float total = sum_over_row<LANES>(lane, n, [&](int j) { return p[j] = __expf(s[j] - max); });
        for (int j = lane; j < n; j += LANES) p[j] /= total;
        row_barrier<LANES>();

        row.max_score = max;
        // -sum p log p = log total - sum p (s - max): neither part is negative, so nothing cancels
        row.entropy = logf(total) - sum_over_row<LANES>(lane, n, [&](int j) {
                          return p[j] > 0.0f ? p[j] * (s[j] - max) : 0.0f;
                      });
        row.sum_squares = sum_over_row<LANES>(lane, n, [&](int j) { return p[j] * p[j]; });
        row.first = p[0];
        row.self = p[i];
        row.previous = i > 0 ? p[i - 1] : 0.0f;
        row.nosink = sum_over_row<LANES>(lane, n - 1, [&](int j) { return p[j + 1]; });

        // the outputs of the whole row, of its top k and of the rest
        auto rank = [&](int j) { return score_rank(s[j]); };
        const Chosen chosen = choose_highest<LANES>(lane, n, k, rank);
        auto in_head = [&](int j) { return chosen.has(rank(j), j) ? p[j] : 0.0f; };
        auto in_tail = [&](int j) { return chosen.has(rank(j), j) ? 0.0f : p[j]; };
        const float head_mass = sum_over_row<LANES>(lane, n, in_head);
        row.tau = sum_over_row<LANES>(lane, n, in_tail);
        float whole[D] = {}, head[D] = {}, tail[D] = {};
        add_values<LANES>(whole, lane, n, hs, block.v, block.stride, [&](int j) { return p[j]; });
        add_values<LANES>(head, lane, n, hs, block.v, block.stride, in_head);
        add_values<LANES>(tail, lane, n, hs, block.v, block.stride, in_tail);
        row.norm = norm_over_head<LANES>(lane, hs, [&](int x) { return whole[x]; });
        row.error = row.error_direct = 0.0f;
        if (row.tau > 0.0f) {
            row.error = row.tau * norm_over_head<LANES>(lane, hs, [&](int x) {
                            return tail[x] / row.tau - head[x] / head_mass;
                        });
            row.error_direct =
                norm_over_head<LANES>(lane, hs, [&](int x) { return whole[x] - head[x] / head_mass; });
        }

        const unsigned first_rank = rank(0);
        int before_first = 0;
        for (int j = lane; j < n; j += LANES) before_first += rank(j) > first_rank ? 1 : 0;
        before_first = row_count<LANES>(before_first);
        sort_descending<LANES>(lane, n - 1, p + 1);
        if (lane == 0) {
            sum_largest(row, p + 1, n, row.first, before_first, k);
            stats[(size_t)blockIdx.y * T + i] = row;
        }
    }
}

// p [T,T] of one head: row i is its softmax, 0 where it does not see. Grid: groups of `rows` queries.
template <class Float, int LANES>
__global__ void attention_map_kernel(float* p, const Float* qkv, int b, int head, int T, int num_heads,
                                     int hs, int rows) {
    extern __shared__ float4 shared[];
    float* q_transposed = (float*)shared;          // [hs][kCutRows]
    float* scores = q_transposed + hs * kCutRows;  // [rows][T]
    const BlockQueries<Float> block(qkv, b, head, T, num_heads, hs, rows);
    block_scores<Float, LANES>(scores, T, q_transposed, block, hs);

    const int lane = threadIdx.x % LANES;
    for (int r = threadIdx.x / LANES; r < block.rows; r += blockDim.x / LANES) {
        const int i = block.first + r, n = i + 1;
        const float* s = scores + r * T;
        const float max = max_over_row<LANES>(lane, n, s, [](int) { return true; });
        const float total = sum_over_row<LANES>(lane, n, [&](int j) { return __expf(s[j] - max); });
        for (int j = lane; j < T; j += LANES)
            p[(size_t)i * T + j] = j < n ? __expf(s[j] - max) / total : 0.0f;
    }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Shared memory of a row: its scores, then its probabilities, of which all but the first are sorted.
inline size_t row_stats_floats(int T) {
    return (size_t)T + 1 + power_of_two(T - 1);
}

// The longest context of which a block can hold a row.
inline int max_row_stats_context(const Context& ctx) {
    int T = 1;
    while (row_stats_floats(T + 1) <= (size_t)max_cut_context(ctx)) T++;
    return T;
}

// stats [B,NH,T]; qkv [B,T,3C], with C = num_heads * hs, as for attention_forward; k is at least 1. Throws
// where T is above max_row_stats_context.
template <class Float>
void attention_row_stats(const Context& ctx, RowStats* stats, const Float* qkv, int B, int T, int num_heads,
                         int hs, int k) {
    assert(k >= 1);
    if (T > max_cut_context(ctx) || row_stats_floats(T) > (size_t)max_cut_context(ctx))
        fail(
            "a context of %d tokens is too long to measure attention rows on %s: use one of at most %d tokens",
            T, ctx.device_name.c_str(), max_row_stats_context(ctx));
    const int row_floats = (int)row_stats_floats(T);
    with_cut_rows(ctx, B * num_heads, T, hs, row_floats,
                  [&](auto lanes, dim3 grid, int threads, size_t shared, int rows) {
                      launch_attention(ctx, attention_row_stats_kernel<Float, lanes>, grid, threads, shared,
                                       stats, qkv, T, num_heads, hs, rows, row_floats, k);
                  });
}

// p [T,T] of head `head` in batch row b of qkv [B,T,3C], zero above the diagonal. Throws where T is above
// max_cut_context.
template <class Float>
void attention_map(const Context& ctx, float* p, const Float* qkv, int b, int head, int T, int num_heads,
                   int hs) {
    assert(b >= 0 && head >= 0 && head < num_heads);
    if (T > max_cut_context(ctx))
        fail("a context of %d tokens is too long to draw attention on %s: use one of at most %d tokens", T,
             ctx.device_name.c_str(), max_cut_context(ctx));
    with_cut_rows(ctx, 1, T, hs, T, [&](auto lanes, dim3 grid, int threads, size_t shared, int rows) {
        launch_attention(ctx, attention_map_kernel<Float, lanes>, grid, threads, shared, p, qkv, b, head, T,
                         num_heads, hs, rows);
    });
}
