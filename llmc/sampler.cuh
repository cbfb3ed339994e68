// Drawing each sequence's next token on the device, so that decoding never waits for the host. What is drawn
// is defined in sampler.h, and is what sample_token would draw there.
//
// One block a sequence. "The k most probable" and "the fewest that reach top_p" are both: the largest key
// from which on the tokens sum to so much, in number or in weight. It is found by deciding its bits from the
// top, with a sum each. So that these sums are short, they go over a list of candidates: a row's packs are
// dealt to 256 groups, and the smallest of the groups' maxima is reached by 256 tokens at least, and by about
// 1600 if the row is in no particular order (256 times the sum of 1/g over g from 1 to 256). Where these are
// not enough, or too many for the list, the sums go over the whole row.
//
// Weights are integers (sampler.h), so the order of the list and of the sums does not matter.
#pragma once
#include "overlap.cuh"
#include "sampler.h"

inline constexpr int kSamplerThreads = 512;
inline constexpr int kSamplerGroups = 256;
inline constexpr int kSamplerList = 4096;
inline constexpr int kSamplerPiece = 256;  // tokens; and so many pieces at most: 16 bits number their tokens

// Maximum over the block, the same in every thread. `scratch`: 32 elements of shared memory.
template <int LANES>
__device__ unsigned block_max(unsigned x, unsigned* scratch) {
    if constexpr (LANES > 1) {
        x = __reduce_max_sync(0xffffffffu, x);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
        __syncthreads();
        for (int w = 0; w < (int)blockDim.x / 32; w++) x = max(x, scratch[w]);
    }
    return x;
}

// A place in the running sum of units[0 ... n-1]: the first index up to which they sum to more than some
// number, and how much of that number was left there.
struct Place {
    int index;
    uint64_t left;
};

// Finds it with LANES threads, 0 to LANES - 1. True in the one that has it.
template <int LANES>
__device__ bool find_place(Place& place, const uint64_t* units, int n, uint64_t number) {
    const int lane = threadIdx.x, each = ceil_div(n, LANES);
    const int begin = lane * each, end = min(begin + each, n);
    uint64_t mine = 0;
    for (int i = begin; i < end; i++) mine += units[i];
    uint64_t sum = mine;  // of this lane and those before it
    for (int offset = 1; offset < LANES; offset *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (number < sum - mine || number >= sum) return false;
    place = {begin, number - (sum - mine)};
    while (place.left >= units[place.index]) place.left -= units[place.index++];
    return true;
}

// LANES: 32, or 1 for a block of one thread. weights: V elements a row, written for the tokens that top_k
// keeps.
template <class Float, int LANES>
__global__ void __launch_bounds__(kSamplerThreads)
    sample_tokens_kernel(int* tokens, const Float* logits, float* weights, int V, int Vp, Sampling how,
                         float scale, const int* streams, const int* positions) {
    constexpr int N = Pack<Float>::size, block = LANES == 1 ? 1 : kSamplerThreads;
    __shared__ unsigned pack_max[kSamplerThreads], max_scratch[3][32];
    __shared__ uint64_t sum_scratch[2][32], units[kSamplerPiece];
    __shared__ int list[kSamplerList], listed;
    __shared__ Place shared_place;
    const int tid = threadIdx.x;
    const Float* row = logits + (size_t)blockIdx.x * Vp;
    float* weight = weights + (size_t)blockIdx.x * V;
    auto key = [&](int v) { return logit_key((float)row[v]); };
    auto barrier = [] {
        if constexpr (LANES > 1) __syncthreads();
    };

    start_next_kernel();
    wait_for_previous_kernel();
    // The first of the largest, in one pass over the row. Where none is larger than -infinity, see below.
    if (how.temperature == 0.0f) {
        constexpr int AT_ONCE = 4;
        float best = -INFINITY;
        int place = 0;  // of the first pack that has it
        for (int p = tid; p * N < V; p += AT_ONCE * block) {
            Pack<Float> x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                x[i] = load_pack_if((p + i * block) * N < V, row + (p + i * block) * N);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int v = (p + i * block) * N;
                float most = -INFINITY;
                for (int k = 0; k < N; k++)
                    if (v + k < V) most = fmaxf(most, (float)x[i][k]);
                if (most > best) best = most, place = v;
            }
        }
        const unsigned most = block_max<LANES>(logit_key(best), max_scratch[0]);
        unsigned not_first = 0;
        if (logit_key(best) == most) {
            const Pack<Float> x = load_pack(row + place);
            for (int k = N - 1; k >= 0; k--)
                if (place + k < V && (float)x[k] == best) not_first = ~(unsigned)(place + k);
        }
        not_first = block_max<LANES>(not_first, max_scratch[2]);
        if (most > logit_key(-INFINITY)) {
            if (tid == 0) tokens[blockIdx.x] = (int)~not_first;
            return;
        }
        barrier();  // before the next use of max_scratch
    }

    for (int i = tid; i < kSamplerThreads; i += block) pack_max[i] = 0;
    if (tid == 0) listed = 0;
    for (int p = tid; p * N < V; p += block) {  // its slot of pack_max is this thread's own
        const Pack<Float> x = load_pack(row + p * N);
        unsigned most = pack_max[p % kSamplerThreads];
        for (int k = 0; k < N; k++)
            if (p * N + k < V) most = max(most, logit_key((float)x[k]));
        pack_max[p % kSamplerThreads] = most;
    }
    barrier();
    unsigned most = 0, not_least = 0;
    for (int g = tid; g < kSamplerGroups; g += block) {
        const unsigned group_max = max(pack_max[g], pack_max[g + kSamplerGroups]);
        most = max(most, group_max);
        not_least = max(not_least, ~group_max);
    }
    most = block_max<LANES>(most, max_scratch[0]);                        // the largest key of the row
    const unsigned least = ~block_max<LANES>(not_least, max_scratch[1]);  // the candidates' smallest
    const float max_logit = __uint_as_float(most & 0x80000000u ? most & 0x7fffffffu : ~most);

    if (how.temperature == 0.0f || !(fabsf(max_logit) < INFINITY)) {
        unsigned not_first = 0;
        for (int v = tid; v < V; v += block)
            if (key(v) == most) not_first = max(not_first, ~(unsigned)v);
        not_first = block_max<LANES>(not_first, max_scratch[2]);
        if (tid == 0) tokens[blockIdx.x] = (int)~not_first;
        return;
    }

    const bool cut_number = how.top_k > 0 && how.top_k < V, cut_weight = how.top_p < 1.0f;
    if (cut_number || cut_weight)
        for (int p = tid; p * N < V; p += block) {
            const Pack<Float> x = load_pack(row + p * N);
            for (int k = 0; k < N; k++) {
                if (p * N + k >= V || logit_key((float)x[k]) < least) continue;
                const int place = atomicAdd(&listed, 1);
                if (place < kSamplerList) list[place] = p * N + k;
            }
        }
    barrier();
    const int num_listed = listed <= kSamplerList ? listed : 0;

    bool use_list = false;
    unsigned threshold = 0;  // tokens with this key or a larger one are kept
    int turn = 0;            // block_sum's scratch is free for the next use only after a barrier: take turns
    auto sum_candidates = [&](auto f) {
        const int n = use_list ? num_listed : V;
        uint64_t sum = 0;
        for (int i = tid; i < n; i += block) sum += f(use_list ? list[i] : i);
        turn ^= 1;
        return block_sum(sum, sum_scratch[turn]);
    };
    auto sum_from = [&](unsigned from, bool of_weights) {
        return sum_candidates([&](int v) -> uint64_t {
            return key(v) < from ? 0 : of_weights ? weight_units(weight[v]) : 1;
        });
    };
    auto raise_threshold = [&](uint64_t wanted, bool of_weights) {
        unsigned found = 0;
        for (int bit = 31; bit >= 0; bit--) {
            const unsigned candidate = found | 1u << bit;
            if (candidate <= threshold || (candidate <= most && sum_from(candidate, of_weights) >= wanted))
                found = candidate;
        }
        threshold = found;
    };

    if (cut_number) {
        use_list = num_listed >= how.top_k;
        if (use_list) threshold = least;
        raise_threshold(how.top_k, false);
    }
    uint64_t total = sum_candidates([&](int v) -> uint64_t {
        if (key(v) < threshold) return 0;
        weight[v] = token_weight((float)row[v] - max_logit, scale);
        return weight_units(weight[v]);
    });
    if (cut_weight) {
        const uint64_t enough = units_to_keep(how.top_p, total);
        if (!use_list) {
            use_list = true;
            use_list = sum_from(max(threshold, least), true) >= enough;
        }
        if (use_list) threshold = max(threshold, least);
        raise_threshold(enough, true);
        total = sum_from(threshold, true);
    }

    // The draw: first the piece of the row, then the token in it.
    auto kept_units = [&](int v) -> uint64_t {
        return v < V && key(v) >= threshold ? weight_units(weight[v]) : 0;
    };
    const int pieces = ceil_div(V, kSamplerPiece);
    for (int piece = tid / LANES; piece < pieces; piece += block / LANES) {
        uint64_t sum = 0;
        for (int i = tid % LANES; i < kSamplerPiece; i += LANES) sum += kept_units(piece * kSamplerPiece + i);
        for (int offset = LANES / 2; offset > 0; offset /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (tid % LANES == 0) units[piece] = sum;
    }
    barrier();
    Place place;
    if (tid < LANES) {
        const double uniform = random_uniform(how.seed, streams[blockIdx.x], positions[blockIdx.x]);
        if (find_place<LANES>(place, units, pieces, units_before(uniform, total))) shared_place = place;
    }
    barrier();
    const int first = shared_place.index * kSamplerPiece;
    for (int i = tid; i < kSamplerPiece; i += block) units[i] = kept_units(first + i);
    barrier();
    if (tid < LANES && find_place<LANES>(place, units, kSamplerPiece, shared_place.left))
        tokens[blockIdx.x] = first + place.index;
}

// Floats of scratch for B sequences.
inline size_t sampler_scratch(int B, int V) {
    return (size_t)B * V;
}

// tokens [B] = what sample_token(logits, V, ..., random_uniform(how.seed, stream, position), ...) draws; all
// arrays are on the device. logits [B,Vp], of which columns V ... Vp-1 are not looked at; Vp is a multiple of
// 8, V at most 65536. streams, positions [B]: which prompt each sequence is, and which of its tokens is
// drawn. scratch: sampler_scratch(B, V) floats.
template <class Float>
void sample_tokens(const Context& ctx, int* tokens, const Float* logits, float* scratch, int B, int V, int Vp,
                   Sampling how, const int* streams, const int* positions) {
    assert(V >= 1 && V <= Vp && Vp % 8 == 0 && V <= kSamplerPiece * kSamplerPiece);
    assert(how.temperature >= 0.0f && how.top_k >= 0 && how.top_p > 0.0f);
    const float scale = how.temperature > 0.0f ? weight_scale(how.temperature) : 0.0f;
    const bool single = ctx.row_lanes == 1;
    launch_early(ctx, single ? sample_tokens_kernel<Float, 1> : sample_tokens_kernel<Float, 32>, B,
                 single ? 1 : kSamplerThreads, 0, tokens, logits, scratch, V, Vp, how, scale, streams,
                 positions);
}
