// Drawing each sequence's next token on the device, so that decoding never waits for the host. What is drawn
// is defined in sampler.h, and is what sample_token would draw there.
//
// One block a sequence. A row of 50,257 logits of bf16 is 100 KB, which the first pass brings into the first-
// level cache, with several loads under way; three more passes at most find it there.
//
// "The k most probable" and "the fewest that reach top_p" are both: the largest key from which on the tokens
// sum to so much, in number or in weight. It is found by deciding its bits from the top, with a sum each. So
// that these sums are short, they go over a list of candidates: a row's packs are dealt to 256 groups, and
// the smallest of the groups' maxima is reached by 256 tokens at least, and by about 1600 if the row is in no
// particular order (256 times the sum of 1/g over g from 1 to 256). Where these are not enough, or too many
// for the list, the sums go over the whole row.
//
// Weights are integers (sampler.h), so the order of the list and of the sums does not matter.
#pragma once
#include "overlap.cuh"
#include "sampler.h"

inline constexpr int kSamplerThreads = 1024;
inline constexpr int kSamplerGroups = 256;
inline constexpr int kSamplerList = 4096;
inline constexpr int kSamplerPiece = 256;  // tokens; and so many pieces at most: 16 bits number their tokens

// The largest key of the block's threads, the same in all. `scratch`: 32 elements of shared memory.
template <int LANES>
__device__ unsigned block_max_key(unsigned x, unsigned* scratch) {
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

// work(p, x) for every block-th pack of a row of V logits: x[N] are pack p's; what is beyond the row is no
// number. AT_ONCE loads are under way. All lanes of a warp come to it together.
template <int LANES, int AT_ONCE, class Float, class Work>
__device__ void for_packs(const Float* row, int V, Work work) {
    constexpr int N = Pack<Float>::size, BLOCK = LANES == 1 ? 1 : kSamplerThreads;
    for (int p0 = threadIdx.x; (p0 - (int)threadIdx.x % LANES) * N < V; p0 += AT_ONCE * BLOCK) {
        Pack<Float> packs[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            packs[i] = load_pack_if((p0 + i * BLOCK) * N < V, row + (p0 + i * BLOCK) * N);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int p = p0 + i * BLOCK;
            float x[N];
            unpack<Float>(x, packs[i]);
            if ((p + 1) * N > V)
                for (int k = 0; k < N; k++)
                    if (p * N + k >= V) x[k] = __uint_as_float(0x7fffffffu);
            work(p, x);
        }
    }
}

// The largest of the keys: numbers are compared as such, and none is smaller than what is no number.
template <int N>
__device__ unsigned largest_key(const float (&x)[N]) {
    float most = x[0];
    for (int k = 1; k < N; k++) most = fmaxf(most, x[k]);
    return logit_key(most);
}

// Tokens whose keys are large, in shared memory.
struct Candidates {
    int count;  // may be more than the list has room for
    uint16_t token[kSamplerList];
    uint32_t key[kSamplerList];
    float weight[kSamplerList];
};

// LANES: 32, or 1 for a block of one thread. weights: V elements a row, for rows whose candidates do not do.
template <class Float, int LANES>
__global__ void __launch_bounds__(LANES == 1 ? 1 : kSamplerThreads)
    sample_tokens_kernel(int* tokens, const Float* logits, float* weights, int V, int Vp, Sampling how,
                         float scale, const int* streams, const int* positions) {
    constexpr int N = Pack<Float>::size, block = LANES == 1 ? 1 : kSamplerThreads;
    __shared__ unsigned pack_max[kSamplerThreads], max_scratch[3][32];
    __shared__ uint64_t sum_scratch[2][32], units[kSamplerPiece];
    __shared__ Candidates list;
    __shared__ Place shared_place;
    const int tid = threadIdx.x;
    const Float* row = logits + (size_t)blockIdx.x * Vp;
    auto key = [&](int v) { return logit_key((float)row[v]); };
    auto barrier = [] {
        if constexpr (LANES > 1) __syncthreads();
    };

    start_next_kernel();
    wait_for_previous_kernel();
    for (int i = tid; i < kSamplerThreads; i += block) pack_max[i] = 0;
    if (tid == 0) list.count = 0;
    for_packs<LANES, LANES == 1 ? 1 : 4>(row, V, [&](int p, const float(&x)[N]) {
        if (p * N >= V) return;
        unsigned& slot = pack_max[p % kSamplerThreads];  // this thread's own
        slot = max(slot, largest_key(x));
    });
    barrier();
    unsigned most = 0, not_least = 0;
    for (int g = tid; g < kSamplerGroups; g += block) {
        unsigned group_max = 0;
        for (int i = g; i < kSamplerThreads; i += kSamplerGroups) group_max = max(group_max, pack_max[i]);
        most = max(most, group_max);
        not_least = max(not_least, ~group_max);
    }
    most = block_max_key<LANES>(most, max_scratch[0]);                        // the largest key of the row
    const unsigned least = ~block_max_key<LANES>(not_least, max_scratch[1]);  // the candidates' smallest
    const float max_logit = from_ordered_bits(most);

    if (how.temperature == 0.0f || !(fabsf(max_logit) < INFINITY)) {  // the first of the largest
        unsigned not_first = 0;
        for_packs<LANES, 1>(row, V, [&](int p, const float(&x)[N]) {
            if (largest_key(x) < most) return;
            for (int k = N - 1; k >= 0; k--)
                if (p * N + k < V && logit_key(x[k]) == most)
                    not_first = max(not_first, ~(unsigned)(p * N + k));
        });
        not_first = block_max_key<LANES>(not_first, max_scratch[2]);
        if (tid == 0) tokens[blockIdx.x] = (int)~not_first;
        return;
    }

    const bool cut_number = how.top_k > 0 && how.top_k < V, cut_weight = how.top_p < 1.0f;
    if (cut_number || cut_weight)
        for_packs<LANES, 1>(row, V, [&](int p, const float(&x)[N]) {
            if (largest_key(x) < least) return;
            for (int k = 0; k < N; k++) {
                const unsigned key_here = logit_key(x[k]);
                if (p * N + k >= V || key_here < least) continue;
                const int place = atomicAdd(&list.count, 1);
                if (place >= kSamplerList) continue;
                list.token[place] = (uint16_t)(p * N + k);
                list.key[place] = key_here;
                list.weight[place] = token_weight(x[k] - max_logit, scale);
            }
        });
    barrier();
    const int listed = list.count <= kSamplerList ? list.count : 0;

    bool use_list = false;
    unsigned threshold = 0;  // tokens with this key or a larger one are kept
    uint64_t total = 0;      // weight of what is kept
    float* weight = weights + (size_t)blockIdx.x * V;
    const int pieces = ceil_div(V, kSamplerPiece);
    int turn = 0;  // block_sum's scratch is free for the next use only after a barrier: take turns
    auto sum_over = [&](int n, auto f) {
        uint64_t sum = 0;
        for (int i = tid; i < n; i += block) sum += f(i);
        turn ^= 1;
        return block_sum(sum, sum_scratch[turn]);
    };
    // Number or weight of the tokens from a key on.
    auto sum_from = [&](unsigned from, bool of_weights) {
        if (use_list)
            return sum_over(listed, [&](int i) -> uint64_t {
                return list.key[i] < from ? 0 : of_weights ? weight_units(list.weight[i]) : 1;
            });
        return sum_over(V, [&](int v) -> uint64_t {
            return key(v) < from ? 0 : of_weights ? weight_units(weight[v]) : 1;
        });
    };
    // units = the weights of what is kept, by pieces of the row.
    auto add_to_piece = [&](int v, uint64_t x) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&units[v / kSamplerPiece]), (unsigned long long)x);
    };
    static_assert(kSamplerPiece % (32 * N) == 0);  // a warp's packs are of one piece
    auto sum_pieces = [&](bool of_list) {
        for (int i = tid; i < kSamplerPiece; i += block) units[i] = 0;
        barrier();
        if (of_list) {
            for (int i = tid; i < listed; i += block)
                if (list.key[i] >= threshold) add_to_piece(list.token[i], weight_units(list.weight[i]));
        } else {
            for_packs<LANES, 1>(row, V, [&](int p, const float(&x)[N]) {
                uint64_t sum = 0;
                for (int k = 0; k < N; k++)
                    if (threshold == 0 || logit_key(x[k]) >= threshold)
                        sum += weight_units(token_weight(x[k] - max_logit, scale));
                for (int offset = LANES / 2; offset > 0; offset /= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
                if (tid % LANES == 0 && p * N < V) add_to_piece(p * N, sum);
            });
        }
        barrier();
        total = sum_over(pieces, [&](int i) { return units[i]; });
    };

    // What is kept by number, of that what is kept by weight, and then the sums for the draw. A loop, so that
    // each of these passes is there once: instructions have to be fetched, too.
#pragma unroll 1
    for (int cut = 0; cut <= 2; cut++) {
        const bool of_weights = cut == 1;
        if (cut > 0) sum_pieces(cut == 2 && use_list);
        if (cut == 2 || (of_weights && !cut_weight)) break;
        if (cut == 0 && !cut_number) continue;
        uint64_t wanted = how.top_k;
        if (of_weights) wanted = units_to_keep(how.top_p, total);
        if (!use_list) {
            use_list = true;
            use_list = sum_from(max(threshold, least), of_weights) >= wanted;
        }
        if (use_list) threshold = max(threshold, least);
        if (!use_list && of_weights) {
            for (int v = tid; v < V; v += block) weight[v] = token_weight((float)row[v] - max_logit, scale);
            barrier();
        }
        // A key's lower half is that of all keys of its upper half, if logits are bf16.
        constexpr int LAST_BIT = sizeof(Float) == 2 ? 16 : 0;
        unsigned found = 0;
#pragma unroll 1
        for (int bit = 31; bit >= LAST_BIT; bit--) {
            const unsigned candidate = found | 1u << bit;
            if (candidate <= threshold || (candidate <= most && sum_from(candidate, of_weights) >= wanted))
                found = candidate;
        }
        threshold = found;
    }

    // The draw: first the piece of the row, then the token in it.
    Place place;
    if (tid < LANES) {
        const double uniform = random_uniform(how.seed, streams[blockIdx.x], positions[blockIdx.x]);
        if (find_place<LANES>(place, units, pieces, units_before(uniform, total))) shared_place = place;
    }
    barrier();
    const int first = shared_place.index * kSamplerPiece;
    for (int i = tid; i < kSamplerPiece; i += block) {
        const int v = first + i;
        units[i] =
            v < V && key(v) >= threshold ? weight_units(token_weight((float)row[v] - max_logit, scale)) : 0;
    }
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
    with_row_lanes(ctx, [&](auto lanes) {
        launch_early(ctx, sample_tokens_kernel<Float, lanes>, B, lanes == 1 ? 1 : kSamplerThreads, 0, tokens,
                     logits, scratch, V, Vp, how, scale, streams, positions);
    });
}
