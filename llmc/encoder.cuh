// Token and position embedding.
//
//   out[b,t,:] = wte[token[b,t],:] + wpe[t,:]
//   dwte[v,:] += sum over (b,t) with token[b,t] = v of dout[b,t,:]
//   dwpe[t,:] += sum over b of dout[b,t,:]
//
// The scatter into dwte must not depend on the order in which blocks run, so there are no atomics: the host
// sorts the positions by token (a counting sort), and each token's rows are added in order. Of 65,536 tokens
// of English 2,000 may be commas, and one block that adds 2,000 rows one after another takes longer than all
// others together: the positions of a frequent token are cut into segments, and a second kernel adds the
// segments' sums. That is still one read of dout for dwte (and one for dwpe).
#pragma once
#include <vector>

#include "overlap.cuh"

// LANES threads a row. Row r is at position r % T, or positions[r] where these are given.
template <class Float, int LANES>
__global__ void encoder_forward_kernel(Float* out, const int* tokens, const Float* wte, const Float* wpe,
                                       int rows, int T, int C, const int* positions) {
    constexpr int N = Pack<Float>::size;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    wait_for_previous_kernel();
    start_next_kernel();  // not before: the layers rely on it that the token's position is there
    if (row >= rows) return;
    const Float* token = wte + (size_t)tokens[row] * C;
    const Float* position = wpe + (size_t)(positions ? positions[row] : row % T) * C;
    constexpr int STEP = LANES * N, AT_ONCE = LANES == 32 ? 4 : 1;  // loads before the first store
    for (int first = lane * N; first < C; first += AT_ONCE * STEP) {
        Pack<Float> a[AT_ONCE], b[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            a[i] = load_pack_if(first + i * STEP < C, token + first + i * STEP);
            b[i] = load_pack_if(first + i * STEP < C, position + first + i * STEP);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            Pack<Float> sum;
            for (int k = 0; k < N; k++) sum[k] = (Float)((float)a[i][k] + (float)b[i][k]);
            if (first + i * STEP < C) store_pack(out + (size_t)row * C + first + i * STEP, sum);
        }
    }
}

template <class Float>
__global__ void wpe_backward_kernel(float* dwpe, const Float* dout, int B, int T, int C) {
    constexpr int N = Pack<Float>::size;
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= T * C) return;
    float sum[N] = {};
    for (int b = 0; b < B; b++) {
        const Pack<Float> d = load_pack(dout + (size_t)b * T * C + i);
        for (int k = 0; k < N; k++) sum[k] += (float)d[k];
    }
    add_floats(dwpe + i, sum);
}

inline constexpr int kSegmentPositions = 64;  // at most, of a segment
inline constexpr int kNoSlot = -1;

struct alignas(16) TokenSegment {  // of the positions of one token
    int begin, end;                // indices into the sorted positions
    int token;
    int slot;  // where its sum goes; kNoSlot: it is the token's only segment, its sum goes to dwte
};
struct alignas(16) LongToken {  // a token of several segments
    int token, first_slot, num_slots, unused;
};

// The positions of a micro-batch by token, as one array that is copied to the device as it is:
//   4 ints:                  number of segments S, of long tokens L, 0, 0
//   n ints, padded to 4s:    the positions, sorted by token and, within a token, by position
//   S TokenSegments, then L LongTokens, in the order of their tokens
struct TokenPlan {
    static constexpr size_t kHeader = 4;
    static constexpr __host__ __device__ size_t segments_begin(int n) {
        return kHeader + ceil_div((size_t)n, size_t{4}) * 4;
    }
    // A long token has c > kSegmentPositions positions and ceil(c / kSegmentPositions) segments, less than
    // twice c / kSegmentPositions.
    static size_t most_long_tokens(int n) { return n / (kSegmentPositions + 1); }
    static size_t most_slots(int n) { return 2 * (size_t)n / kSegmentPositions; }
    static size_t most_segments(int n, int vocab_size) {
        return (size_t)(n < vocab_size ? n : vocab_size) + most_slots(n);
    }
    static size_t most_ints(int n, int vocab_size) {
        return segments_begin(n) + 4 * (most_segments(n, vocab_size) + most_long_tokens(n));
    }
};

inline std::vector<int> plan_tokens(const int* tokens, int n, int vocab_size) {
    std::vector<int> start(vocab_size + 1, 0);
    for (int i = 0; i < n; i++) start[tokens[i] + 1]++;
    std::vector<int> plan(TokenPlan::segments_begin(n), 0), long_tokens;
    plan.reserve(TokenPlan::most_ints(n, vocab_size));
    int slots = 0;
    for (int v = 0; v < vocab_size; v++) {
        const int count = start[v + 1], begin = start[v], end = begin + count;
        start[v + 1] = end;
        const bool split = count > kSegmentPositions;
        if (split) long_tokens.insert(long_tokens.end(), {v, slots, ceil_div(count, kSegmentPositions), 0});
        for (int i = begin; i < end; i += kSegmentPositions) {
            const int last = i + kSegmentPositions < end ? i + kSegmentPositions : end;
            plan.insert(plan.end(), {i, last, v, split ? slots++ : kNoSlot});
        }
    }
    plan[0] = (int)(plan.size() - TokenPlan::segments_begin(n)) / 4;
    plan[1] = (int)long_tokens.size() / 4;
    plan.insert(plan.end(), long_tokens.begin(), long_tokens.end());
    for (int i = 0; i < n; i++) plan[TokenPlan::kHeader + start[tokens[i]]++] = i;
    return plan;
}

// blockIdx.y: a strip of channels, a pack a thread; blockIdx.x: which segments. Most tokens occur once or
// twice, so that a block is done with a segment as soon as it is there, and the way to it is four loads long:
// the segment, the position, the row, and what it is added to. The first two are made one segment ahead, the
// last beside the row.
template <class Float>
__global__ void wte_backward_kernel(float* dwte, float* slots, const Float* dout, const int* plan, int n,
                                    int C) {
    constexpr int N = Pack<Float>::size, AT_ONCE = 4;  // rows
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= C) return;
    const int num_segments = plan[0];
    const int* order = plan + TokenPlan::kHeader;
    const TokenSegment* segments = reinterpret_cast<const TokenSegment*>(plan + TokenPlan::segments_begin(n));
    int s = blockIdx.x;
    if (s >= num_segments) return;
    TokenSegment segment = segments[s];
    int position = order[segment.begin];  // of its first row
    for (;;) {
        s += gridDim.x;
        const bool more = s < num_segments;
        const TokenSegment next = more ? segments[s] : segment;
        const bool to_dwte = segment.slot == kNoSlot;
        float* to = to_dwte ? dwte + (size_t)segment.token * C + c : slots + (size_t)segment.slot * C + c;
        Pack<float> before[N / 4];
        for (int i = 0; i < N / 4; i++) before[i] = load_pack_if(to_dwte, to + 4 * i);
        float sum[N];
        unpack<Float>(sum, load_pack(dout + (size_t)position * C + c));
        position = order[next.begin];
        for (int first = segment.begin + 1; first < segment.end; first += AT_ONCE) {
            int at[AT_ONCE];
            Pack<Float> d[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) at[i] = first + i < segment.end ? order[first + i] : 0;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                d[i] = load_pack_if(first + i < segment.end, dout + (size_t)at[i] * C + c);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                for (int k = 0; k < N; k++) sum[k] += (float)d[i][k];
        }
        for (int k = 0; k < N; k++) sum[k] += before[k / 4][k % 4];
        store_floats(to, sum);
        if (!more) return;
        segment = next;
    }
}

// blockIdx.y: a strip of channels; blockIdx.x: a long token, if there are so many.
[[maybe_unused]] static __global__ void long_tokens_kernel(float* dwte, const float* slots, const int* plan,
                                                           int n, int C) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (c >= C || (int)blockIdx.x >= plan[1]) return;
    const LongToken token =
        reinterpret_cast<const LongToken*>(plan + TokenPlan::segments_begin(n) + 4 * plan[0])[blockIdx.x];
    float sum[4] = {};
    for (int s = 0; s < token.num_slots; s++) {
        const Pack<float> x = load_pack(slots + (size_t)(token.first_slot + s) * C + c);
        for (int k = 0; k < 4; k++) sum[k] += x[k];
    }
    add_floats(dwte + (size_t)token.token * C + c, sum);
}

// out [B,T,C]; tokens [B,T], each below wte's rows; wte [Vp,C]; wpe [maxT,C]. C is a multiple of 8.
// positions [B,T] on the device, each below maxT; null: 0 ... T - 1 in each of the B rows.
template <class Float>
void encoder_forward(const Context& ctx, Float* out, const int* tokens, const Float* wte, const Float* wpe,
                     int B, int T, int C, const int* positions = nullptr) {
    assert(C % 8 == 0);
    constexpr int kBlock = 256;
    const int rows = B * T;
    const auto launch = [&](auto kernel, int lanes) {
        launch_early(ctx, kernel, (unsigned)ceil_div((size_t)rows * lanes, kBlock), kBlock, 0, out, tokens,
                     wte, wpe, rows, T, C, positions);
    };
    with_row_lanes(ctx, [&](auto lanes) {
        // a token of each of a few sequences: every thread has one load to wait for
        if constexpr (lanes > 1)
            if (rows <= ctx.num_sms) return launch(encoder_forward_kernel<Float, kBlock>, kBlock);
        launch(encoder_forward_kernel<Float, lanes>, lanes);
    });
}

// Floats of scratch for encoder_backward of n positions.
inline size_t encoder_backward_scratch(int n, int C) {
    return TokenPlan::most_slots(n) * C;
}

// dwte [Vp,C] and dwpe [maxT,C] are added to; dout [B,T,C]. plan: plan_tokens() of the B * T tokens, on the
// device; its size does not determine the launches, so that they may be recorded once.
template <class Float>
void encoder_backward(const Context& ctx, float* dwte, float* dwpe, float* scratch, const Float* dout,
                      const int* plan, int B, int T, int C) {
    assert(C % 8 == 0);
    constexpr int N = Pack<Float>::size;
    const int n = B * T;
    wpe_backward_kernel<<<ceil_div(T * C / N, 256), 256, 0, ctx.stream>>>(dwpe, dout, B, T, C);
    CUDA_CHECK(cudaGetLastError());

    // A row is one strip where it fits into a block. 4,096 blocks are more than an H100 holds at a time.
    auto strips_of = [&](int packs) { return ceil_div(packs, 256); };
    auto block_of = [&](int packs) { return ceil_div(ceil_div(packs, strips_of(packs)), 32) * 32; };
    const int packs = C / N, most = ctx.row_lanes == 1 ? 16 * ctx.num_sms : 4096,
              blocks = n < most ? n : most;
    wte_backward_kernel<<<dim3(blocks, strips_of(packs)), block_of(packs), 0, ctx.stream>>>(dwte, scratch,
                                                                                            dout, plan, n, C);
    CUDA_CHECK(cudaGetLastError());
    if (const unsigned most = (unsigned)TokenPlan::most_long_tokens(n); most > 0) {
        long_tokens_kernel<<<dim3(most, strips_of(C / 4)), block_of(C / 4), 0, ctx.stream>>>(dwte, scratch,
                                                                                             plan, n, C);
        CUDA_CHECK(cudaGetLastError());
    }
}
