// Attention for one new token of each sequence: its query against the keys and values of all tokens so far,
// which lie in a cache. Three ways to read the cache of n tokens, for one head with scores s_j = q . k_j /
// sqrt(hs) and p = softmax(s):
//
//   dense   all keys, all values:                 o = sum_j p_j v_j
//   topk    all keys, the values of the k largest scores S:   o = sum over S of p_j v_j / M,
//                                                             M = sum over S of p_j
//   pages   keys and values page by page (16 tokens), the most promising page first, until what has not been
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
//
// At batch 1 a layer's keys and values are 3 MB at 1024 tokens, a microsecond's worth, so time is counted in
// waits for memory. A head's keys are dealt to blocks, 64 each; a thread asks for all of its share of the
// keys and values at once, and before the query is there: only the newest token is not in the cache by then,
// and is taken from where the query is. What the blocks found is put together by the last of them to end,
// always in the same order. The newest token gets into the cache by a block that nobody waits for.
#pragma once
#include "attention_plain.cuh"
#include "mma.cuh"
#include "overlap.cuh"

inline constexpr int kPageTokens = 16;
inline constexpr int kDecodeThreads = 256;
inline constexpr int kDecodeChunk = 64;   // keys of one block, dense and top k
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

    // A vector as it lies in memory, 32 bits a register. (Numbers of 16 bits that are loaded under a
    // condition would each get a register of their own as soon as they arrive, and a thread waits for them
    // there: it could not ask for the next keys, nor let the kernel in front end meanwhile.)
    struct Packed {
        PackWords words[PACKS];

        __device__ void unpack_to(float (&numbers)[N], int p) const {
            Pack<Float> pack;
            memcpy(&pack, &words[p], sizeof pack);
            unpack<Float>(numbers, pack);
        }
    };

    static __device__ int dimension(int pack, int lane) { return (pack * LANES + lane) * N; }

    // Zeros if not `inside`.
    static __device__ Packed fetch(bool inside, const Float* from, int lane, int hs) {
        Packed packed;
        for (int p = 0; p < PACKS; p++) {
            const int d = dimension(p, lane);
            packed.words[p] = load_words_if(inside && d < hs, from + d);
        }
        return packed;
    }
    __device__ void clear() {
        for (int p = 0; p < PACKS; p++)
            for (int i = 0; i < N; i++) x[p][i] = 0.0f;
    }
    // A vector of floats, rounded.
    static __device__ Packed pack(const float* from, int lane, int hs) {
        Packed packed;
        for (int p = 0; p < PACKS; p++) {
            float numbers[N];
            for (int i = 0; i < N; i++) {
                const int d = dimension(p, lane) + i;
                numbers[i] = d < hs ? from[d] : 0.0f;
            }
            const Pack<Float> pack = pack_floats<Float>(numbers);
            memcpy(&packed.words[p], &pack, sizeof pack);
        }
        return packed;
    }
    __device__ void set(const Packed& packed, float factor) {
        for (int p = 0; p < PACKS; p++) {
            packed.unpack_to(x[p], p);
            for (int i = 0; i < N; i++) x[p][i] *= factor;
        }
    }
    // The lanes' product with a vector, summed up in every lane. All threads of the warp must come here.
    __device__ float dot(const Packed& with) const {
        float sum[N] = {};
        for (int p = 0; p < PACKS; p++) {
            float y[N];
            with.unpack_to(y, p);
            for (int i = 0; i < N; i++) sum[i] = fmaf(x[p][i], y[i], sum[i]);
        }
        for (int n = N / 2; n > 0; n /= 2)
            for (int i = 0; i < n; i++) sum[i] += sum[i + n];
        return row_sum<LANES>(sum[0]);
    }
    // An upper bound on dot() with any vector between low and high, as it is computed.
    __device__ float bound(const Packed& low, const Packed& high) const {
        float sum = 0.0f, size = 0.0f;
        for (int p = 0; p < PACKS; p++) {
            float a[N], b[N];
            low.unpack_to(a, p);
            high.unpack_to(b, p);
            for (int i = 0; i < N; i++) {
                const float with_low = x[p][i] * a[i], with_high = x[p][i] * b[i];
                sum += fmaxf(with_low, with_high);
                size += fmaxf(fabsf(with_low), fabsf(with_high));
            }
        }
        return row_sum<LANES>(sum) + 2.5f * (HS + 1) * 0x1p-24f * row_sum<LANES>(size);
    }
    __device__ void scale(float factor) {
        for (int p = 0; p < PACKS; p++)
            for (int i = 0; i < N; i++) x[p][i] *= factor;
    }
    // x += weight * from
    __device__ void add(float weight, const Packed& from) {
        for (int p = 0; p < PACKS; p++) {
            float y[N];
            from.unpack_to(y, p);
            for (int i = 0; i < N; i++) x[p][i] = fmaf(weight, y[i], x[p][i]);
        }
    }
};

// The threads of a block in groups of LANES.
template <int LANES>
struct Groups {
    static constexpr int THREADS = LANES == 1 ? 1 : kDecodeThreads, COUNT = THREADS / LANES;
    static constexpr int OF_WARP = LANES == 1 ? 1 : 32 / LANES, WARPS = COUNT / OF_WARP;
    int lane = threadIdx.x % LANES, index = threadIdx.x / LANES;
};

// The maximum over a warp's groups of x, which is the same in all lanes of a group. All groups must call it.
template <int LANES>
__device__ float max_of_groups(float x) {
    for (int step = LANES; step < LANES * Groups<LANES>::OF_WARP; step *= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
template <int LANES>
__device__ float sum_of_groups(float x) {
    for (int step = LANES; step < LANES * Groups<LANES>::OF_WARP; step *= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// A share of a head's keys: the largest score, the sum of e^(score - max), and of e^(score - max) v.
template <int HS>
struct Share {
    float max, total, o[HS];
};

// Dimension d of all of them.
struct Merged {
    float o, max, total;
};
template <int HS>
__device__ Merged merge_shares(const Share<HS>* shares, int count, int d) {
    Merged all = {0.0f, -INFINITY, 0.0f};
    for (int i = 0; i < count; i++) all.max = fmaxf(all.max, shares[i].max);
    for (int i = 0; i < count; i++) {
        const bool empty = shares[i].max == -INFINITY && shares[i].total == 0.0f;
        const float factor = empty ? 0.0f : expf(shares[i].max - all.max);
        all.o = fmaf(shares[i].o[d], factor, all.o);
        all.total = fmaf(shares[i].total, factor, all.total);
    }
    return all;
}

// The share of a warp, each of its groups with keys of its own.
template <class Float, int HS, int LANES>
struct WarpShare {
    using Slice = HeadSlice<Float, HS, LANES>;
    float max = -INFINITY, total = 0.0f;  // total: of the group
    Slice o;

    __device__ WarpShare() { o.clear(); }

    // KEYS more of each group: their scores, -infinity where there is none, and value(i) fetches the i-th.
    template <int KEYS, class Value>
    __device__ void take(const float (&score)[KEYS], Value value) {
        float new_max = max;
        for (int i = 0; i < KEYS; i++) new_max = fmaxf(new_max, score[i]);
        new_max = max_of_groups<LANES>(new_max);
        if (new_max == -INFINITY) {  // nothing, or nothing but what is no number: the sum says which
            for (int i = 0; i < KEYS; i++)
                if (score[i] != score[i]) total = score[i];
            return;
        }
        const float rescale = expf(max - new_max);
        total *= rescale;
        o.scale(rescale);
#pragma unroll(LANES == 1 ? 1 : KEYS)
        for (int i = 0; i < KEYS; i++) {
            const float weight = expf(score[i] - new_max);
            total += weight;
            o.add(weight, value(i));
        }
        max = new_max;
    }

    // All threads of the warp must come here.
    __device__ void store(Share<HS>& share) {
        const Groups<LANES> g{};
        const bool first = g.index % g.OF_WARP == 0;
        for (int p = 0; p < Slice::PACKS; p++)
            for (int i = 0; i < Slice::N; i++) {
                const float sum = sum_of_groups<LANES>(o.x[p][i]);
                if (first) share.o[Slice::dimension(p, g.lane) + i] = sum;
            }
        total = sum_of_groups<LANES>(total);
        if (first && g.lane == 0) share.max = max, share.total = total;
    }
};

// Where block (., head of sequence) finds its query, its keys, and how many there are. Those of the newest
// token may be in the cache or not: it is for one block to put them there.
template <class Float>
struct DecodeHead {
    const Float *q, *new_k, *new_v;  // the kernel in front makes them
    Float *k, *v, *low, *high;
    int n;

    __device__ DecodeHead(const Float* qkv, const KvCache<Float>& cache, const int* positions, int bh,
                          int num_heads, int hs) {
        const int b = bh / num_heads, head = bh % num_heads;
        const size_t keys = (size_t)bh * cache.capacity * hs;
        const size_t pages = keys / kPageTokens;
        q = qkv + (size_t)b * 3 * num_heads * hs + head * hs;
        new_k = q + num_heads * hs;
        new_v = new_k + num_heads * hs;
        k = cache.k + keys;
        v = cache.v + keys;
        low = cache.low + pages;
        high = cache.high + pages;
        n = __ldcg(positions + b) + 1;  // which the kernel before last may have counted up
    }
};

// ---------------------------------------------------------------------------------------------------------
// the cache

// Puts the keys and values of `count[b]` new tokens (T if count is null) of each row b, qkv [B,T,3C], into
// sequence sequences[b] (b if null) of the cache at positions start[b] ... (0 if start is null), and renews
// the bounds of the pages they lie in. One block a page and head; a thread has its dimensions to itself.
template <class Float>
__global__ void kv_append_kernel(KvCache<Float> cache, const Float* qkv, int T, int num_heads, int hs,
                                 const int* sequences, const int* start, const int* count) {
    const int b = blockIdx.y / num_heads, head = blockIdx.y % num_heads, C = num_heads * hs;
    const int first = start ? start[b] : 0, end = first + (count ? count[b] : T);
    const int page = first / kPageTokens + blockIdx.x;
    const int begin = page * kPageTokens, page_end = min(begin + kPageTokens, end);
    const Float* source = qkv + (size_t)b * T * 3 * C + head * hs;
    const size_t sequence = sequences ? sequences[b] : b;
    const size_t keys = (sequence * num_heads + head) * cache.capacity * hs;
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

// The same for the newest token of a head, by the block.
template <class Float>
__device__ void append_newest(const DecodeHead<Float>& h, int hs) {
    const int newest = h.n - 1, page = newest / kPageTokens;
    for (int d = threadIdx.x; d < hs; d += blockDim.x) {
        const Float key = h.new_k[d];
        h.v[(size_t)newest * hs + d] = h.new_v[d];
        h.k[(size_t)newest * hs + d] = key;
        Float low = key, high = key;
#pragma unroll
        for (int i = 0; i < kPageTokens - 1; i++) {
            const int j = page * kPageTokens + i;
            if (j >= newest) continue;
            const Float old = h.k[(size_t)j * hs + d];
            low = (float)old < (float)low ? old : low;
            high = (float)old > (float)high ? old : high;
        }
        h.low[(size_t)page * hs + d] = low;
        h.high[(size_t)page * hs + d] = high;
    }
}

// Whether the block is the last of `count` to come here, whose threads then see what all others wrote before.
// arrived: 0, and 0 again afterwards.
[[maybe_unused]] static __device__ bool last_to_arrive(int* arrived, int count) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = arrive(arrived) == count - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    return last;
}

// ---------------------------------------------------------------------------------------------------------
// dense and top k: chunks of keys in parallel (at batch 1, twelve heads would not fill a GPU)

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

// The sum of x over the threads before this one. scratch: as for block_sum.
[[maybe_unused]] static __device__ uint64_t sum_before(uint64_t x, uint64_t* scratch) {
    if (blockDim.x == 1) return 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = x;
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += scratch[w];
    return sum - x;
}

// list = the positions of the k largest of the scores s [n], k <= n, in order.
[[maybe_unused]] static __device__ void list_top(int* list, const float* s, int n, int k) {
    __shared__ int counts[2][32];
    __shared__ uint64_t sums[32];
    const TopSet top = find_top(s, n, k, counts);
    const int share = ceil_div(n, (int)blockDim.x);
    const int begin = min((int)threadIdx.x * share, n), end = min(begin + share, n);
    // Every thread counts what its part of the row has above the key, and at it: two numbers in one.
    uint64_t mine = 0;
    for (int j = begin; j < end; j++) {
        const unsigned bits = ordered_bits(s[j]);
        mine += bits > top.key ? (uint64_t)1 << 32 : bits == top.key ? 1 : 0;
    }
    uint64_t before = sum_before(mine, sums);
    const int all_above = block_sum((int)(mine >> 32), counts[0]);
    const int places = k - all_above;  // for the scores that equal the key
    for (int j = begin; j < end; j++) {
        const unsigned bits = ordered_bits(s[j]);
        const int before_above = (int)(before >> 32), before_equal = (int)before;
        if (bits > top.key || (bits == top.key && before_equal < places))
            list[before_above + min(before_equal, places)] = j;
        before += bits > top.key ? (uint64_t)1 << 32 : bits == top.key ? 1 : 0;
    }
    __syncthreads();
}

// What the blocks of a head leave for the last of them: of dense attention their shares, of top k the scores.
template <int HS>
struct DecodeScratch {
    int* arrived;       // [B*NH]
    Share<HS>* shares;  // [B*NH,chunks]
    float* scores;      // [B*NH,capacity]
};

// Block (chunk, head of sequence); the last chunk's number is that of the block that appends. The shared
// memory is that of the last block of a head, of top k: scores [capacity], list [k].
template <class Float, int HS, int LANES, bool TOPK>
__global__ void __launch_bounds__(Groups<LANES>::THREADS)
    decode_chunks_kernel(Float* out, DecodeStats* stats, DecodeScratch<HS> scratch, const Float* qkv,
                         KvCache<Float> cache, const int* positions, int num_heads, int hs, int topk) {
    using Slice = HeadSlice<Float, HS, LANES>;
    using Packed = typename Slice::Packed;
    constexpr int COUNT = Groups<LANES>::COUNT, THREADS = Groups<LANES>::THREADS;
    constexpr int KEYS = kDecodeChunk / COUNT;              // of a group
    constexpr int AHEAD = LANES == 1 ? 1 : KEYS;            // that it fetches before it needs them
    constexpr int PARTS = THREADS < HS ? 1 : THREADS / HS;  // the last block's threads of a dimension
    extern __shared__ float decode_shared[];
    __shared__ Share<HS> shares[Groups<LANES>::WARPS > PARTS ? Groups<LANES>::WARPS : PARTS];
    start_next_kernel();
    const Groups<LANES> g{};
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.y, num_heads, hs);
    const int tid = threadIdx.x, n = h.n, chunks = ceil_div(n, kDecodeChunk);
    const int first = blockIdx.x * kDecodeChunk;
    if (blockIdx.x == gridDim.x - 1 || first >= n) {
        wait_for_previous_kernel();
        if (blockIdx.x == gridDim.x - 1) append_newest(h, hs);
        return;
    }

    const auto key_of = [&](int i) { return first + i * COUNT + g.index; };
    Packed k[AHEAD], v[AHEAD];
    if constexpr (LANES > 1) {
#pragma unroll(LANES == 1 ? 1 : KEYS)
        for (int i = 0; i < KEYS; i++)
            k[i] = Slice::fetch(key_of(i) < n - 1, h.k + (size_t)key_of(i) * hs, g.lane, hs);
        if constexpr (!TOPK)
#pragma unroll(LANES == 1 ? 1 : KEYS)
            for (int i = 0; i < KEYS; i++)
                v[i] = Slice::fetch(key_of(i) < n - 1, h.v + (size_t)key_of(i) * hs, g.lane, hs);
    }
    const float scale = 1.0f / sqrtf((float)hs);
    wait_for_previous_kernel();
    Slice q;
    q.set(Slice::fetch(true, h.q, g.lane, hs), scale);
    // A key or value of a token that is there.
    const auto fetch_of = [&](const Float* old, const Float* newest, int j) {
        return Slice::fetch(j < n, j < n - 1 ? old + (size_t)j * hs : newest, g.lane, hs);
    };
    if constexpr (LANES > 1)
#pragma unroll(LANES == 1 ? 1 : KEYS)
        for (int i = 0; i < KEYS; i++)
            if (key_of(i) == n - 1) {
                k[i] = Slice::fetch(true, h.new_k, g.lane, hs);
                if constexpr (!TOPK) v[i] = Slice::fetch(true, h.new_v, g.lane, hs);
            }
    float score[KEYS];
#pragma unroll(LANES == 1 ? 1 : KEYS)
    for (int i = 0; i < KEYS; i++) {
        if constexpr (LANES == 1) k[0] = fetch_of(h.k, h.new_k, key_of(i));
        const float product = q.dot(k[LANES == 1 ? 0 : i]);
        score[i] = key_of(i) < n ? product : -INFINITY;
    }

    if constexpr (TOPK) {
        float* all = scratch.scores + (size_t)blockIdx.y * cache.capacity;
        for (int i = 0; i < KEYS; i++)
            if (g.lane == 0 && key_of(i) < n) all[key_of(i)] = score[i];
        if (!last_to_arrive(scratch.arrived + blockIdx.y, chunks)) return;
        float* s = decode_shared;
        int* list = (int*)(s + cache.capacity);
        const int kept = min(topk, n);
        for (int j = tid; j < n; j += THREADS) s[j] = __ldcg(all + j);
        __syncthreads();
        list_top(list, s, n, kept);
        WarpShare<Float, HS, LANES> mine;
        for (int i0 = 0; i0 < kept; i0 += COUNT) {
            const int i = i0 + g.index, j = i < kept ? list[i] : n;
            const float one[1] = {i < kept ? s[j] : -INFINITY};
            mine.take(one, [&](int) { return fetch_of(h.v, h.new_v, j); });
        }
        mine.store(shares[tid / 32]);
    } else {
        WarpShare<Float, HS, LANES> mine;
        mine.take(score, [&](int i) {
            if constexpr (LANES == 1)
                return fetch_of(h.v, h.new_v, key_of(i));
            else
                return v[i];
        });
        mine.store(shares[tid / 32]);
    }
    __syncthreads();

    int count = Groups<LANES>::WARPS;  // of shares to put together
    if constexpr (!TOPK)
        if (chunks > 1) {
            Share<HS>* of_head = scratch.shares + (size_t)blockIdx.y * (gridDim.x - 1);
            for (int d = tid; d < HS; d += THREADS) {
                const Merged all = merge_shares(shares, count, d);
                Share<HS>& of_chunk = of_head[blockIdx.x];
                of_chunk.o[d] = all.o;
                if (d == 0) of_chunk.max = all.max, of_chunk.total = all.total;
            }
            if (!last_to_arrive(scratch.arrived + blockIdx.y, chunks)) return;
            // A dimension's threads take turns at the chunks.
            count = PARTS;
            for (int i = tid; i < PARTS * HS; i += THREADS) {
                const int part = i / HS, d = i % HS;
                Merged mine = {0.0f, -INFINITY, 0.0f};
#pragma unroll 4
                for (int c = part; c < chunks; c += PARTS) {
                    const float max = __ldcg(&of_head[c].max), total = __ldcg(&of_head[c].total);
                    const float o = __ldcg(&of_head[c].o[d]), new_max = fmaxf(mine.max, max);
                    const float old = expf(mine.max - new_max), factor = expf(max - new_max);
                    mine = {mine.o * old + o * factor, new_max, mine.total * old + total * factor};
                }
                shares[part].o[d] = mine.o;
                if (d == 0) shares[part].max = mine.max, shares[part].total = mine.total;
            }
            __syncthreads();
        }
    Merged all = {};
    for (int d = tid; d < HS; d += THREADS) {
        all = merge_shares(shares, count, d);
        if (d < hs) out[(size_t)blockIdx.y * hs + d] = (Float)(all.o / all.total);
    }
    if (!stats) return;
    float tau = 0.0f;
    if constexpr (TOPK)
        if (topk < n) {
            __shared__ float sums[32];
            __shared__ float max;
            if (tid == 0) max = all.max;
            __syncthreads();
            float total = 0.0f;
            for (int j = tid; j < n; j += THREADS) total += expf(decode_shared[j] - max);
            total = block_sum(total, sums);
            tau = fmaxf(1.0f - all.total / total, 0.0f);  // thread 0 has the totals
        }
    if (tid == 0)
        stats[blockIdx.y].add({1.0f, (float)n, (float)n, (float)ceil_div(n, kPageTokens), tau, tau, tau});
}

// ---------------------------------------------------------------------------------------------------------
// pages: in order of their bounds, until the certificate holds

// The tokens of a page that are there.
__device__ inline int page_tokens(int page, int n) {
    return min(kPageTokens, n - page * kPageTokens);
}

// One block a head. Shared memory: bounds and numbers of the pages, [padded] each, padded: a power of two.
// With stats also the rest is read, only to know the mass that was left out.
template <class Float, int HS, int LANES>
__global__ void __launch_bounds__(Groups<LANES>::THREADS)
    decode_pages_kernel(Float* out, DecodeStats* stats, const Float* qkv, KvCache<Float> cache,
                        const int* positions, int num_heads, int hs, float epsilon) {
    using Slice = HeadSlice<Float, HS, LANES>;
    using Packed = typename Slice::Packed;
    constexpr int ROUND = kPagesPerRound * kPageTokens, COUNT = Groups<LANES>::COUNT;
    constexpr int THREADS = Groups<LANES>::THREADS;
    constexpr int KEYS = ceil_div(ROUND, COUNT);  // of a group, in a round
    constexpr int AHEAD = LANES == 1 ? 1 : KEYS;  // that it fetches at once
    extern __shared__ float decode_shared[];
    __shared__ float s[ROUND], scratch[32];
    __shared__ Share<HS> shares[Groups<LANES>::WARPS];
    start_next_kernel();
    const DecodeHead<Float> h(qkv, cache, positions, blockIdx.x, num_heads, hs);
    const int n = h.n, pages = ceil_div(n, kPageTokens), tid = threadIdx.x;
    int padded = 1;
    while (padded < pages) padded *= 2;
    float* bound = decode_shared;
    int* order = (int*)(bound + padded);
    const Groups<LANES> g{};
    wait_for_previous_kernel();
    append_newest(h, hs);
    Slice q;
    q.set(Slice::fetch(true, h.q, g.lane, hs), 1.0f / sqrtf((float)hs));
    __syncthreads();

    for (int p0 = 0; p0 < padded; p0 += COUNT) {
        const int p = p0 + g.index;
        const float b = q.bound(Slice::fetch(p < pages, h.low + (size_t)p * hs, g.lane, hs),
                                Slice::fetch(p < pages, h.high + (size_t)p * hs, g.lane, hs));
        if (g.lane == 0 && p < padded) {
            bound[p] = p >= pages ? -INFINITY : b == b ? b : INFINITY;  // no number bounds nothing
            order[p] = p;
        }
    }
    // Bitonic sort, largest bound first, the earlier page where they are equal.
    for (int size = 2; size <= padded; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = tid; i < padded; i += THREADS) {
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

    // The token in place j of the pages at places `from` ... of the order; n if there is none.
    const auto token_at = [&](int from, int j) {
        const int place = from + j / kPageTokens;
        if (j >= ROUND || place >= pages) return n;
        return min(order[place] * kPageTokens + j % kPageTokens, n);
    };
    const auto fetch = [&](const Float* from, int token) {
        return Slice::fetch(token < n, from + (size_t)token * hs, g.lane, hs);
    };
    // Scores of the round at `from`, into s, -infinity where there is no token. Its values, which are fetched
    // at the same time, into v, unless they are not wanted.
    const auto score_round = [&](int from, Packed* v) {
        Packed k[AHEAD];
        const auto score = [&](int i) {
            const int j = i * COUNT + g.index;
            const float product = q.dot(k[LANES == 1 ? 0 : i]);
            if (g.lane == 0 && j < ROUND) s[j] = token_at(from, j) < n ? product : -INFINITY;
        };
        if constexpr (LANES > 1) {
#pragma unroll(LANES == 1 ? 1 : KEYS)
            for (int i = 0; i < KEYS; i++) {
                const int token = token_at(from, i * COUNT + g.index);
                k[i] = fetch(h.k, token);
                if (v) v[i] = fetch(h.v, token);
            }
#pragma unroll(LANES == 1 ? 1 : KEYS)
            for (int i = 0; i < KEYS; i++) score(i);
        } else {
            for (int i = 0; i < KEYS; i++) k[0] = fetch(h.k, token_at(from, i)), score(i);
        }
        __syncthreads();
    };
    // Over the round's scores, the same in every thread, all of which come here.
    const auto round_max = [&] {
        if constexpr (LANES > 1) return row_max<32>(s[tid % 32]);
        float max = -INFINITY;
        for (int j = 0; j < ROUND; j++) max = fmaxf(max, s[j]);
        return max;
    };
    const auto round_sum = [&](float max) {
        if constexpr (LANES > 1) return row_sum<32>(expf(s[tid % 32] - max));
        float sum = 0.0f;
        for (int j = 0; j < ROUND; j++) sum += expf(s[j] - max);
        return sum;
    };
    static_assert(ROUND == 32);  // a score a lane
    // sum of e^(s - max) over the pages at places `from` ... to the end, at most.
    const auto most_left = [&](int from, float max) {
        float left = 0.0f;
        for (int i = from + tid; i < pages; i += THREADS)
            left += (float)page_tokens(order[i], n) * expf(bound[i] - max);
        return block_sum(left, scratch) * 1.001f;  // more than the rounding of this sum and of kept
    };

    Slice o;
    o.clear();
    float max = -INFINITY, kept = 0.0f, certified = 1.0f;
    int read = 0;
    // One round at least: an output needs a key, even where epsilon is 1.
    for (; read < pages && (read == 0 || certified > epsilon); read = min(read + kPagesPerRound, pages)) {
        Packed v[AHEAD];
        score_round(read, v);
        const float new_max = fmaxf(max, round_max()), rescale = expf(max - new_max);
        kept = kept * rescale + round_sum(new_max);
        o.scale(rescale);
#pragma unroll(LANES == 1 ? 1 : KEYS)
        for (int i = 0; i < KEYS; i++) {
            const int j = i * COUNT + g.index;
            if constexpr (LANES == 1) v[0] = fetch(h.v, token_at(read, j));
            o.add(j < ROUND ? expf(s[j] - new_max) : 0.0f, v[LANES == 1 ? 0 : i]);
        }
        max = new_max;
        const float left = most_left(min(read + kPagesPerRound, pages), max);
        const float share = left / (kept + left);
        certified = left == 0.0f ? 0.0f : share < 1.0f ? share : 1.0f;  // no number: nothing is known
        __syncthreads();  // before the next round's scores, and the next use of scratch
    }
    WarpShare<Float, HS, LANES> mine;
    mine.o = o;
    mine.max = max;
    mine.store(shares[tid / 32]);
    __syncthreads();
    for (int d = tid; d < hs; d += THREADS)
        out[(size_t)blockIdx.x * hs + d] = (Float)(merge_shares(shares, Groups<LANES>::WARPS, d).o / kept);
    if (!stats) return;

    float rest = 0.0f, tokens = 0.0f;
    for (int from = read; from < pages; from += kPagesPerRound) {
        score_round(from, nullptr);
        rest += round_sum(max);
        __syncthreads();
    }
    for (int i = 0; i < read; i++) tokens += (float)page_tokens(order[i], n);
    const float tau = rest / (kept + rest);
    if (tid == 0) stats[blockIdx.x].add({1.0f, (float)n, tokens, (float)read, tau, certified, tau});
}

// ---------------------------------------------------------------------------------------------------------
// launchers

enum class DecodeMode { dense, topk, pages };
inline constexpr const char* kDecodeWords[] = {"dense", "topk", "pages"};

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
        with_row_lanes(ctx, [&](auto lanes) {
            body(size, std::integral_constant<int, (lanes == 1 ? 1 : HS / Pack<Float>::size)>());
        });
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
        return capacity * sizeof(float) + (size_t)std::min(how.topk, capacity) * sizeof(int);
    return how.mode == DecodeMode::pages ? padded_pages(capacity) * (sizeof(float) + sizeof(int)) : 0;
}

// Floats of scratch for attention_decode, zeros before its first use.
inline size_t decode_scratch(int B, int num_heads, int hs, int capacity) {
    size_t share = 0;
    with_head_size(hs, [&](auto size) { share = sizeof(Share<size>) / sizeof(float); });
    return (size_t)B * num_heads * (1 + std::max((size_t)capacity, ceil_div(capacity, kDecodeChunk) * share));
}

// Adds T new tokens of B sequences to the cache: qkv [B,T,3C]; sequences, start, count [B] on the device, or
// null for 0 ... B - 1, for 0, and for T. Nothing may reach beyond the capacity.
template <class Float>
void kv_append(const Context& ctx, const KvCache<Float>& cache, const Float* qkv, int B, int T, int num_heads,
               int hs, const int* sequences, const int* start, const int* count) {
    assert(cache.capacity % kPageTokens == 0 && T <= cache.capacity && B * num_heads <= kMaxGridY);
    const int pages = T == 1 ? 1 : ceil_div(T, kPageTokens) + (start ? 1 : 0);
    kv_append_kernel<<<dim3(pages, B * num_heads), ctx.row_lanes == 1 ? 1 : 64, 0, ctx.stream>>>(
        cache, qkv, T, num_heads, hs, sequences, start, count);
    CUDA_CHECK(cudaGetLastError());
}

// out [B,C]; qkv [B,3C] of the new tokens, at positions [B] on the device, where their keys and values are
// put in the cache. The kernel in front may make qkv; the positions and what the cache holds of older tokens
// must have been there before a kernel that lets the next one start only after its own wait, as the encoder
// does. stats [B*NH] or null; with pages, statistics read all keys to know what was left out. scratch:
// decode_scratch() floats, the same from call to call, or zeros.
template <class Float>
void attention_decode(const Context& ctx, Float* out, DecodeStats* stats, float* scratch, const Float* qkv,
                      const KvCache<Float>& cache, const int* positions, int B, int num_heads, int hs,
                      DecodeHow how) {
    assert(B > 0 && B * num_heads <= kMaxGridY && cache.capacity % kPageTokens == 0);
    assert(how.mode != DecodeMode::topk || how.topk > 0);
    const int heads = B * num_heads, chunks = ceil_div(cache.capacity, kDecodeChunk);
    const size_t shared = decode_shared_bytes(how, cache.capacity);
    if (shared > ctx.max_shared - 8192)  // the kernels have up to 4.8 KB of their own
        fail(
            "the scores of %d positions do not fit into the shared memory of %s: use --attention dense, or a model with a shorter context",
            cache.capacity, ctx.device_name.c_str());
    with_decode_lanes<Float>(ctx, hs, [&](auto size, auto lanes) {
        constexpr int HS = size, LANES = lanes, THREADS = Groups<LANES>::THREADS;
        const auto launch = [&](auto kernel, dim3 grid, auto... args) {
            allow_shared(kernel, shared);
            launch_early(ctx, kernel, grid, THREADS, shared, args...);
        };
        // Behind the counters, one of the two: top k has scores and no shares, dense attention the opposite.
        float* rest = scratch + heads;
        const DecodeScratch<HS> between = {(int*)scratch, (Share<HS>*)rest, rest};
        if (how.mode == DecodeMode::pages)
            launch(decode_pages_kernel<Float, HS, LANES>, heads, out, stats, qkv, cache, positions, num_heads,
                   hs, how.epsilon);
        else
            launch(how.mode == DecodeMode::topk ? decode_chunks_kernel<Float, HS, LANES, true>
                                                : decode_chunks_kernel<Float, HS, LANES, false>,
                   dim3(chunks + 1, heads), out, stats, between, qkv, cache, positions, num_heads, hs,
                   how.topk);
    });
}
