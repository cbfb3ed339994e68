// Attention for one new token of each sequence: its query against the keys and values of all tokens so far,
// which lie in a cache. Three ways to read the cache of n tokens, for one head with scores s_j = q . k_j /
// sqrt(hs) and p = softmax(s):
//
//   dense   all keys, all values:                 o = sum_j p_j v_j
//   topk    all keys, the values of the k largest scores S:   o = sum over S of p_j v_j / M,  M = sum over S
//   of p_j pages   keys and values page by page (16 tokens), the most promising page first, until what has
//   not been
//           read provably holds at most a share epsilon of the mass; o is renormalized over what was read
//
// topk reads half of what dense reads at best; only bounds on unread keys can do better. For each page the
// cache keeps the smallest and the largest value of each channel (Quest, arXiv 2406.10774), so that for every
// key of the page
//
//   s_j <= bound = sum over channels d of max(q_d low_d, q_d high_d) / sqrt(hs)
//
// With L = sum of e^s_j over the keys read, and U = sum over unread pages of (its tokens) e^bound,
//
//   tau = (mass not read) <= U / (L + U)
//
// in whatever order pages are read, because the unread e^s_j sum to at most U. That is the certificate: pages
// are read in order of their bounds until it is at most epsilon. Where attention is not condensed this reads
// all pages, which is dense attention. The bound holds for the scores as computed, too: two sums of hs
// products of the same factors in different orders differ by at most 2 (hs + 1) u sum |q_d x_d|, u = 2^-24,
// and that much is added.
//
// Bytes for one head at n tokens, bf16: dense 4 n hs; topk 2 n hs + 2 k hs; pages n hs / 4 for the bounds
// plus 64 hs a page read.
#pragma once
#include "attention_plain.cuh"

inline constexpr int kPageTokens = 16;
inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeChunk = 256;  // keys of one block of the dense and the scores kernel
inline constexpr int kPagesPerRound = 2;  // pages read between two looks at the certificate

// One layer's cache. A sequence's tokens lie at their positions 0 ... n - 1.
template <class Float>
struct KvCache {
    Float *k, *v;       // [B,NH,capacity,hs]
    Float *low, *high;  // [B,NH,capacity/16,hs] smallest and largest of each channel over a page's keys
    int capacity;       // a multiple of kPageTokens
};

// What one head of one sequence read, summed over tokens.
struct DecodeStats {
    float tokens;     // queries: the counts and shares below are sums over them
    float visible;    // keys in the cache
    float keys;       // keys read
    float pages;      // pages of keys read
    float tau;        // mass that was not kept
    float certified;  // upper bound on it that was known without reading the rest
    float worst;      // the largest tau of a query, not a sum

    __host__ __device__ void add(const DecodeStats& x) {
        tokens += x.tokens;
        visible += x.visible;
        keys += x.keys;
        pages += x.pages;
        tau += x.tau;
        certified += x.certified;
        worst = fmaxf(worst, x.worst);
    }
};

// ---------------------------------------------------------------------------------------------------------
// a head's numbers in the registers of LANES threads

// Lane l of the LANES threads that share a head's hs numbers (HS, rounded up to 32, 64 or 128) holds packs l,
// l + LANES, ...: with HS / pack lanes a single one, so that a warp reads several keys at once, in order.
template <class Float, int HS, int LANES>
struct HeadSlice {
    static constexpr int N = Pack<Float>::size, PACKS = HS / N / LANES;
    float x[PACKS][N];

    static __device__ int dimension(int pack, int lane) { return (pack * LANES + lane) * N; }

    __device__ void clear() {
        for (int p = 0; p < PACKS; p++)
            for (int i = 0; i < N; i++) x[p][i] = 0.0f;
    }
    __device__ void load(const Float* from, int lane, int hs, float factor) {
        for (int p = 0; p < PACKS; p++) {
            const int d = dimension(p, lane);
            const Pack<Float> pack = load_pack_if(d < hs, from + d);
            for (int i = 0; i < N; i++) x[p][i] = factor * (float)pack[i];
        }
    }
    // The lanes' product with a vector, summed up in every lane; 0 if not `inside`. All threads of the warp
    // must come here.
    __device__ float dot(bool inside, const Float* with, int lane, int hs) const {
        float sum[N] = {};
        for (int p = 0; p < PACKS; p++) {
            const int d = dimension(p, lane);
            const Pack<Float> pack = load_pack_if(inside && d < hs, with + d);
            for (int i = 0; i < N; i++) sum[i] = fmaf(x[p][i], (float)pack[i], sum[i]);
        }
        for (int n = N / 2; n > 0; n /= 2)
            for (int i = 0; i < n; i++) sum[i] += sum[i + n];
        return row_sum<LANES>(sum[0]);
    }
    // An upper bound on dot() with any vector between low and high, as it is computed.
    __device__ float bound(bool inside, const Float* low, const Float* high, int lane, int hs) const {
        float sum = 0.0f, size = 0.0f;
        for (int p = 0; p < PACKS; p++) {
            const int d = dimension(p, lane);
            const Pack<Float> a = load_pack_if(inside && d < hs, low + d);
            const Pack<Float> b = load_pack_if(inside && d < hs, high + d);
            for (int i = 0; i < N; i++) {
                const float with_low = x[p][i] * (float)a[i], with_high = x[p][i] * (float)b[i];
                sum += fmaxf(with_low, with_high);
                size += fmaxf(fabsf(with_low), fabsf(with_high));
            }
        }
        return row_sum<LANES>(sum) + 2.5f * (HS + 1) * 0x1p-24f * row_sum<LANES>(size);
    }
    // x += weight * from
    __device__ void add(bool inside, float weight, const Float* from, int lane, int hs) {
        for (int p = 0; p < PACKS; p++) {
            const int d = dimension(p, lane);
            const Pack<Float> pack = load_pack_if(inside && d < hs, from + d);
            for (int i = 0; i < N; i++) x[p][i] = fmaf(weight, (float)pack[i], x[p][i]);
        }
    }
};

// The threads of a block in groups of LANES.
template <int LANES>
struct Groups {
    int lane = threadIdx.x % LANES, index = threadIdx.x / LANES, count = (int)blockDim.x / LANES;
};

// Sum over the block's groups of their slices, into sum[HS] of shared memory; parts [groups][HS].
template <class Float, int HS, int LANES>
__device__ void sum_slices(float* sum, float* parts, const HeadSlice<Float, HS, LANES>& slice) {
    using Slice = HeadSlice<Float, HS, LANES>;
    const Groups<LANES> g;
    for (int p = 0; p < Slice::PACKS; p++)
        for (int i = 0; i < Slice::N; i++)
            parts[g.index * HS + Slice::dimension(p, g.lane) + i] = slice.x[p][i];
    __syncthreads();
    for (int d = threadIdx.x; d < HS; d += blockDim.x) {
        float total = 0.0f;
        for (int group = 0; group < g.count; group++) total += parts[group * HS + d];
        sum[d] = total;
    }
    __syncthreads();
}

// Where block (., head of sequence) finds its query, its keys, and how many there are.
template <class Float>
struct DecodeHead {
    const Float *q, *k, *v, *low, *high;
    int n;

    __device__ DecodeHead(const Float* qkv, const KvCache<Float>& cache, const int* positions, int bh,
                          int num_heads, int hs) {
        const int b = bh / num_heads, head = bh % num_heads;
        const size_t keys = (size_t)bh * cache.capacity * hs;
        const size_t pages = keys / kPageTokens;
        q = qkv + (size_t)b * 3 * num_heads * hs + head * hs;
        k = cache.k + keys;
        v = cache.v + keys;
        low = cache.low + pages;
        high = cache.high + pages;
        n = positions[b] + 1;
    }
};

// ---------------------------------------------------------------------------------------------------------
// the cache

// Puts the keys and values of `count[b]` new tokens (T if count is null) of each sequence, qkv [B,T,3C], at
// positions start[b] ... (0 if start is null), and renews the bounds of the pages they lie in. One block a
// page and head; a thread has its dimensions to itself.
template <class Float>
__global__ void kv_append_kernel(KvCache<Float> cache, const Float* qkv, int T, int num_heads, int hs,
                                 const int* start, const int* count) {
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads, C = num_heads * hs;
    const int first = start ? start[b] : 0, end = first + (count ? count[b] : T);
    const int page = first / kPageTokens + blockIdx.x;
    const int begin = page * kPageTokens, page_end = min(begin + kPageTokens, end);
    const Float* source = qkv + (size_t)b * T * 3 * C + head * hs;
    const size_t keys = (size_t)blockIdx.y * cache.capacity * hs;
    if (begin >= end) return;
    for (int d = threadIdx.x; d < hs; d += blockDim.x) {
        float low = INFINITY, high = -INFINITY;
        for (int j = begin; j < page_end; j++) {
            const size_t at = keys + (size_t)j * hs + d;
            if (j >= first) {
                const Float* token = source + (size_t)(j - first) * 3 * C + d;
                cache.k[at] = token[C];
                cache.v[at] = token[2 * C];
            }
            low = fminf(low, (float)cache.k[at]);
            high = fmaxf(high, (float)cache.k[at]);
        }
        cache.low[keys / kPageTokens + (size_t)page * hs + d] = (Float)low;
        cache.high[keys / kPageTokens + (size_t)page * hs + d] = (Float)high;
    }
}

// ---------------------------------------------------------------------------------------------------------
// dense: chunks of keys in parallel, then their sum (at batch 1, twelve heads would not fill a GPU)

inline constexpr int kPartialExtra = 2;  // behind a chunk's hs outputs: its maximum, its sum of exponentials

template <class Float, int HS, int LANES>
__global__ void decode_dense_kernel(float* partial, const Float* qkv, KvCache<Float> cache,
                                    const int* positions, int num_heads, int hs) {
    using Slice = HeadSlice<Float, HS, LANES>;
    __shared__ float s[kDecodeChunk], parts[kDecodeThreads * Slice::N], sum[HS], scratch[2][32];
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.y, num_heads, hs);
    const int first = blockIdx.x * kDecodeChunk, count = min(kDecodeChunk, h.n - first);
    if (count <= 0) return;
    const Groups<LANES> g;
    Slice q, o;
    q.load(h.q, g.lane, hs, 1.0f / sqrtf((float)hs));
    for (int j0 = 0; j0 < count; j0 += g.count) {
        const int j = j0 + g.index;
        const float score = q.dot(j < count, h.k + (size_t)(first + j) * hs, g.lane, hs);
        if (g.lane == 0 && j < count) s[j] = score;
    }
    __syncthreads();
    float max = -INFINITY, total = 0.0f;
    for (int j = threadIdx.x; j < count; j += blockDim.x) max = fmaxf(max, s[j]);
    max = block_max(max, scratch[0]);
    for (int j = threadIdx.x; j < count; j += blockDim.x) total += s[j] = expf(s[j] - max);
    total = block_sum(total, scratch[1]);  // its barrier also is the one between writing s and reading it
    o.clear();
    for (int j0 = 0; j0 < count; j0 += g.count) {
        const int j = j0 + g.index;
        o.add(j < count, j < count ? s[j] : 0.0f, h.v + (size_t)(first + j) * hs, g.lane, hs);
    }
    sum_slices(sum, parts, o);
    float* out = partial + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * (hs + kPartialExtra);
    for (int d = threadIdx.x; d < hs; d += blockDim.x) out[d] = sum[d];
    if (threadIdx.x == 0) {
        out[hs] = max;
        out[hs + 1] = total;
    }
}

// out [B,C]: the chunks of a head, in order. One block a head.
template <class Float>
__global__ void decode_combine_kernel(Float* out, DecodeStats* stats, const float* partial,
                                      const int* positions, int most_chunks, int num_heads, int hs) {
    const int n = positions[blockIdx.x / num_heads] + 1, chunks = ceil_div(n, kDecodeChunk);
    const float* part = partial + (size_t)blockIdx.x * most_chunks * (hs + kPartialExtra);
    float max = -INFINITY, total = 0.0f;
    for (int c = 0; c < chunks; c++) max = fmaxf(max, part[c * (hs + kPartialExtra) + hs]);
    for (int c = 0; c < chunks; c++) {
        const float* chunk = part + c * (hs + kPartialExtra);
        total += chunk[hs + 1] * expf(chunk[hs] - max);
    }
    for (int d = threadIdx.x; d < hs; d += blockDim.x) {
        float sum = 0.0f;
        for (int c = 0; c < chunks; c++) {
            const float* chunk = part + c * (hs + kPartialExtra);
            sum += chunk[d] * expf(chunk[hs] - max);
        }
        out[(size_t)blockIdx.x * hs + d] = (Float)(sum / total);
    }
    if (stats && threadIdx.x == 0)
        stats[blockIdx.x].add({1.0f, (float)n, (float)n, (float)ceil_div(n, kPageTokens), 0.0f, 0.0f, 0.0f});
}

// ---------------------------------------------------------------------------------------------------------
// topk: all scores, then the values of the k largest

// scores [B*NH,capacity]
template <class Float, int HS, int LANES>
__global__ void decode_scores_kernel(float* scores, const Float* qkv, KvCache<Float> cache,
                                     const int* positions, int num_heads, int hs) {
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.y, num_heads, hs);
    const int first = blockIdx.x * kDecodeChunk, end = min(first + kDecodeChunk, h.n);
    const Groups<LANES> g;
    HeadSlice<Float, HS, LANES> q;
    q.load(h.q, g.lane, hs, 1.0f / sqrtf((float)hs));
    for (int j0 = first; j0 < end; j0 += g.count) {
        const int j = j0 + g.index;
        const float score = q.dot(j < end, h.k + (size_t)j * hs, g.lane, hs);
        if (g.lane == 0 && j < end) scores[(size_t)blockIdx.y * cache.capacity + j] = score;
    }
}

// Which of a row's n > k scores are its k largest: those whose ordered bits reach `key`, of which `spare` too
// many may equal it exactly; of those the earliest positions stay. The bits of the key are decided from the
// top, counting the scores that reach it, until exactly k do: no more bits than it takes to tell them apart.
struct TopSet {
    unsigned key;
    int reach;  // scores that reach the key; more than k only if the last of them are equal
};
[[maybe_unused]] static __device__ TopSet find_top(const float* s, int n, int k, int (*scratch)[32]) {
    TopSet top = {0, n};
    int turn = 0;  // block_sum's scratch is free for the next use only after a barrier: take turns
    for (int bit = 31; bit >= 0 && top.reach > k; bit--) {
        const unsigned candidate = top.key | 1u << bit;
        int count = 0;
        for (int j = threadIdx.x; j < n; j += blockDim.x) count += ordered_bits(s[j]) >= candidate ? 1 : 0;
        count = block_sum(count, scratch[turn ^= 1]);
        if (count >= k) top = {candidate, count};
    }
    return top;
}

// One block a head. Shared memory: the scores [n], then list [k] of positions and their weights [k].
template <class Float, int HS, int LANES>
__global__ void decode_topk_kernel(Float* out, DecodeStats* stats, const float* scores, const Float* qkv,
                                   KvCache<Float> cache, const int* positions, int num_heads, int hs,
                                   int topk) {
    using Slice = HeadSlice<Float, HS, LANES>;
    extern __shared__ float decode_shared[];
    __shared__ float parts[kDecodeThreads * Slice::N], sum[HS], scratch[3][32];
    __shared__ int int_scratch[2][32], above[kDecodeThreads], equal[kDecodeThreads];
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.x, num_heads, hs);
    const int n = h.n, k = min(topk, n), tid = threadIdx.x, threads = blockDim.x;
    float* s = decode_shared;
    float* weight = s + cache.capacity;
    int* list = (int*)(weight + min(topk, cache.capacity));

    float max = -INFINITY, total = 0.0f;
    for (int j = tid; j < n; j += threads) {
        s[j] = scores[(size_t)blockIdx.x * cache.capacity + j];
        max = fmaxf(max, s[j]);
    }
    max = block_max(max, scratch[0]);
    for (int j = tid; j < n; j += threads) total += expf(s[j] - max);
    total = block_sum(total, scratch[1]);
    const TopSet top = find_top(s, n, k, int_scratch);

    // The list in order of position. Every thread counts its part of the row, then knows where to write.
    const int share = ceil_div(n, threads), begin = min(tid * share, n), end = min(begin + share, n);
    int my_above = 0, my_equal = 0;
    for (int j = begin; j < end; j++) {
        my_above += ordered_bits(s[j]) > top.key ? 1 : 0;
        my_equal += ordered_bits(s[j]) == top.key ? 1 : 0;
    }
    above[tid] = my_above;
    equal[tid] = my_equal;
    __syncthreads();
    int all_above = 0, before_above = 0, before_equal = 0;
    for (int t = 0; t < threads; t++) {
        if (t < tid) before_above += above[t], before_equal += equal[t];
        all_above += above[t];
    }
    const int places = k - all_above;  // for the scores that equal the key
    for (int j = begin; j < end; j++) {
        const unsigned bits = ordered_bits(s[j]);
        if (bits > top.key || (bits == top.key && before_equal < places)) {
            const int at = before_above + min(before_equal, places);
            list[at] = j;
            weight[at] = expf(s[j] - max);
        }
        before_above += bits > top.key ? 1 : 0;
        before_equal += bits == top.key ? 1 : 0;
    }
    __syncthreads();

    const Groups<LANES> g;
    Slice o;
    o.clear();
    float kept = 0.0f;
    for (int i = tid; i < k; i += threads) kept += weight[i];
    kept = block_sum(kept, scratch[2]);
    for (int i0 = 0; i0 < k; i0 += g.count) {
        const int i = i0 + g.index;
        o.add(i < k, i < k ? weight[i] : 0.0f, h.v + (size_t)(i < k ? list[i] : 0) * hs, g.lane, hs);
    }
    sum_slices(sum, parts, o);
    for (int d = tid; d < hs; d += threads) out[(size_t)blockIdx.x * hs + d] = (Float)(sum[d] / kept);
    if (stats && tid == 0) {
        const float tau = k < n ? fmaxf(1.0f - kept / total, 0.0f) : 0.0f;
        stats[blockIdx.x].add({1.0f, (float)n, (float)n, (float)ceil_div(n, kPageTokens), tau, tau, tau});
    }
}

// ---------------------------------------------------------------------------------------------------------
// pages: in order of their bounds, until the certificate holds

// The tokens of a page that are there.
__device__ inline int page_tokens(int page, int n) {
    return min(kPageTokens, n - page * kPageTokens);
}

// One block a head. Shared memory: bounds and numbers of the pages, [padded] each, padded: a power of two.
// measure: also reads the rest, only to know the mass that was left out (for the statistics).
template <class Float, int HS, int LANES>
__global__ void decode_pages_kernel(Float* out, DecodeStats* stats, const Float* qkv, KvCache<Float> cache,
                                    const int* positions, int num_heads, int hs, float epsilon) {
    using Slice = HeadSlice<Float, HS, LANES>;
    constexpr int ROUND = kPagesPerRound * kPageTokens;
    extern __shared__ float decode_shared[];
    __shared__ float s[ROUND], parts[kDecodeThreads * Slice::N], sum[HS], scratch[4][32];
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.x, num_heads, hs);
    const int n = h.n, pages = ceil_div(n, kPageTokens), tid = threadIdx.x, threads = blockDim.x;
    int padded = 1;
    while (padded < pages) padded *= 2;
    float* bound = decode_shared;
    int* order = (int*)(bound + padded);
    const Groups<LANES> g;
    Slice q, o;
    q.load(h.q, g.lane, hs, 1.0f / sqrtf((float)hs));

    for (int p0 = 0; p0 < padded; p0 += g.count) {
        const int p = p0 + g.index;
        const float b = q.bound(p < pages, h.low + (size_t)p * hs, h.high + (size_t)p * hs, g.lane, hs);
        if (g.lane == 0 && p < padded) {
            bound[p] = p < pages ? b : -INFINITY;
            order[p] = p;
        }
    }
    // Bitonic sort, largest bound first, the earlier page where they are equal.
    for (int size = 2; size <= padded; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = tid; i < padded; i += threads) {
                const int other = i ^ step;
                if (other < i) continue;
                const bool first =
                    bound[i] > bound[other] || (bound[i] == bound[other] && order[i] < order[other]);
                if (first == ((i & size) == 0)) continue;
                const float b = bound[i];
                const int p = order[i];
                bound[i] = bound[other], order[i] = order[other];
                bound[other] = b, order[other] = p;
            }
        }
    __syncthreads();

    // Scores of the pages at places `from` ... of the order, into s; -infinity where there is no token.
    const auto score_round = [&](int from) {
        for (int j0 = 0; j0 < ROUND; j0 += g.count) {
            const int j = j0 + g.index, place = from + j / kPageTokens;
            const int page = place < pages ? order[place] : 0;
            const bool inside = j < ROUND && place < pages && j % kPageTokens < page_tokens(page, n);
            const float score =
                q.dot(inside, h.k + (size_t)(page * kPageTokens + j % kPageTokens) * hs, g.lane, hs);
            if (g.lane == 0 && j < ROUND) s[j] = inside ? score : -INFINITY;
        }
        __syncthreads();
    };
    // sum of e^(s - max) over the pages at places `from` ... to the end, at most.
    const auto most_left = [&](int from, float max, float* sums) {
        float left = 0.0f;
        for (int i = from + tid; i < pages; i += threads)
            left += (float)page_tokens(order[i], n) * expf(bound[i] - max);
        return block_sum(left, sums) * 1.001f;  // more than the rounding of this sum and of kept
    };

    o.clear();
    float max = -INFINITY, kept = 0.0f, certified = 1.0f;
    int read = 0;
    // One round at least: an output needs a key, even where epsilon is 1.
    for (; read < pages && (read == 0 || certified > epsilon); read = min(read + kPagesPerRound, pages)) {
        score_round(read);
        float new_max = max;
        for (int j = 0; j < ROUND; j++) new_max = fmaxf(new_max, s[j]);
        const float rescale = expf(max - new_max);
        kept *= rescale;
        for (int p = 0; p < Slice::PACKS; p++)
            for (int i = 0; i < Slice::N; i++) o.x[p][i] *= rescale;
        float round = 0.0f;
        for (int j = 0; j < ROUND; j++) round += expf(s[j] - new_max);
        kept += round;
        for (int j0 = 0; j0 < ROUND; j0 += g.count) {
            const int j = j0 + g.index, place = read + j / kPageTokens;
            const int page = place < pages ? order[place] : 0;
            const bool inside = j < ROUND && s[j] > -INFINITY;
            o.add(inside, inside ? expf(s[j] - new_max) : 0.0f,
                  h.v + (size_t)(page * kPageTokens + j % kPageTokens) * hs, g.lane, hs);
        }
        max = new_max;
        const float left = most_left(min(read + kPagesPerRound, pages), max, scratch[0]);
        certified = left > 0.0f ? left / (kept + left) : 0.0f;
        if (left == INFINITY) certified = 1.0f;
        __syncthreads();  // before the next round's scores, and the next use of scratch
    }
    sum_slices(sum, parts, o);
    for (int d = tid; d < hs; d += threads) out[(size_t)blockIdx.x * hs + d] = (Float)(sum[d] / kept);
    if (!stats) return;

    float rest = 0.0f, tokens = 0.0f;
    for (int from = read; from < pages; from += kPagesPerRound) {
        score_round(from);
        for (int j = 0; j < ROUND; j++) rest += expf(s[j] - max);
        __syncthreads();
    }
    for (int i = 0; i < read; i++) tokens += (float)page_tokens(order[i], n);
    const float tau = rest / (kept + rest);
    if (tid == 0) stats[blockIdx.x].add({1.0f, (float)n, tokens, (float)read, tau, certified, tau});
}

// ---------------------------------------------------------------------------------------------------------
// launchers

enum class DecodeMode { dense, topk, pages };

// How the cache is read: k for topk, epsilon for pages.
struct DecodeHow {
    DecodeMode mode = DecodeMode::dense;
    int topk = 0;
    float epsilon = 0.01f;
};

// Calls body(head size, lanes) as compile-time constants: a lane a pack on a GPU, one thread on the CPU
// backend.
template <class Float, class Body>
void with_decode_lanes(const Context& ctx, int hs, Body body) {
    with_head_size(hs, [&](auto size) {
        constexpr int HS = size;
        if (ctx.row_lanes == 1)
            body(size, std::integral_constant<int, 1>());
        else
            body(size, std::integral_constant<int, HS / Pack<Float>::size>());
    });
}

inline int padded_pages(int capacity) {
    int padded = 1;
    while (padded < capacity / kPageTokens) padded *= 2;
    return padded;
}

// Bytes of shared memory that decoding takes.
inline size_t decode_shared_bytes(DecodeHow how, int capacity) {
    if (how.mode == DecodeMode::topk)
        return capacity * sizeof(float) +
               (size_t)std::min(how.topk, capacity) * (sizeof(float) + sizeof(int));
    return how.mode == DecodeMode::pages ? padded_pages(capacity) * (sizeof(float) + sizeof(int)) : 0;
}

// Floats of scratch for attention_decode.
inline size_t decode_scratch(int B, int num_heads, int hs, int capacity) {
    const size_t chunks = ceil_div(capacity, kDecodeChunk);
    return (size_t)B * num_heads * std::max((size_t)capacity, chunks * (hs + kPartialExtra));
}

// Adds T new tokens of each sequence to the cache: qkv [B,T,3C]; start, count [B] on the device, or null for
// 0 and T. Nothing may reach beyond the capacity.
template <class Float>
void kv_append(const Context& ctx, const KvCache<Float>& cache, const Float* qkv, int B, int T, int num_heads,
               int hs, const int* start, const int* count) {
    assert(cache.capacity % kPageTokens == 0 && T <= cache.capacity && B * num_heads <= 65535);
    const int pages = T == 1 ? 1 : ceil_div(T, kPageTokens) + (start ? 1 : 0);
    kv_append_kernel<<<dim3(pages, B * num_heads), ctx.row_lanes == 1 ? 1 : 64, 0, ctx.stream>>>(
        cache, qkv, T, num_heads, hs, start, count);
    CUDA_CHECK(cudaGetLastError());
}

// out [B,C]; qkv [B,3C] of the new tokens, whose keys and values are in the cache already, at positions [B]
// on the device. stats [B*NH] or null; with pages, statistics read all keys to know what was left out.
// scratch: decode_scratch() floats.
template <class Float>
void attention_decode(const Context& ctx, Float* out, DecodeStats* stats, float* scratch, const Float* qkv,
                      const KvCache<Float>& cache, const int* positions, int B, int num_heads, int hs,
                      DecodeHow how) {
    assert(B > 0 && B * num_heads <= 65535 && cache.capacity % kPageTokens == 0);
    assert(how.mode != DecodeMode::topk || how.topk > 0);
    const int heads = B * num_heads, chunks = ceil_div(cache.capacity, kDecodeChunk);
    const int threads = ctx.row_lanes == 1 ? 1 : kDecodeThreads;
    const size_t shared = decode_shared_bytes(how, cache.capacity);
    with_decode_lanes<Float>(ctx, hs, [&](auto size, auto lanes) {
        constexpr int HS = size, LANES = lanes;
        if (how.mode == DecodeMode::dense) {
            launch_attention(ctx, decode_dense_kernel<Float, HS, LANES>, dim3(chunks, heads), threads, 0,
                             scratch, qkv, cache, positions, num_heads, hs);
            launch_attention(ctx, decode_combine_kernel<Float>, heads, ctx.row_lanes == 1 ? 1 : HS, 0, out,
                             stats, (const float*)scratch, positions, chunks, num_heads, hs);
        } else if (how.mode == DecodeMode::topk) {
            launch_attention(ctx, decode_scores_kernel<Float, HS, LANES>, dim3(chunks, heads), threads, 0,
                             scratch, qkv, cache, positions, num_heads, hs);
            launch_attention(ctx, decode_topk_kernel<Float, HS, LANES>, heads, threads, shared, out, stats,
                             (const float*)scratch, qkv, cache, positions, num_heads, hs, how.topk);
        } else {
            launch_attention(ctx, decode_pages_kernel<Float, HS, LANES>, heads, threads, shared, out, stats,
                             qkv, cache, positions, num_heads, hs, how.epsilon);
        }
    });
}
