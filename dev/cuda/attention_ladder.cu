// Causal attention with the top-k threshold, from the kernel that one would write first to the one that the
// trainer runs: a ladder of eight steps, each of which adds one idea. Every step computes the same four
// things (output, lse, theta, mass), is checked against plain loops in double precision, and is timed.
//
//     make ladder && build/attention_ladder            # on a GPU: B 4, T 1024, 12 heads of 64, k = 8
//     build/attention_ladder -b 1 -t 200 -n 2 -k 8     # anywhere
//
// Steps 1 to 4 are in this file, to be read in order. The last four are the trainer's own, in
// llmc/attention_*.cuh.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>

#include "../../llmc/attention.cuh"
#include "../../tests/reference.h"

using bf16 = __nv_bfloat16;

struct Shape {
    int B, T, NH, hs, k;
};

constexpr int kMaxHeadSize = 128, kLadderTop = 64;

// Where the queries, keys and values of one head are: qkv [B,T,3C].
struct Head {
    const bf16 *q, *k, *v;
    size_t stride;
};
__device__ inline Head head_of(const bf16* qkv, int bh, int T, int num_heads, int hs) {
    const size_t C = (size_t)num_heads * hs;
    const bf16* q = qkv + (size_t)(bh / num_heads) * T * 3 * C + bh % num_heads * hs;
    return {q, q + C, q + 2 * C, 3 * C};
}
// Where query i's output goes: out [B,T,C].
__device__ inline bf16* output_of(bf16* out, int bh, int i, int T, int num_heads, int hs) {
    return out + ((size_t)(bh / num_heads) * T + i) * num_heads * hs + bh % num_heads * hs;
}
__device__ inline float score(const Head& h, int i, int j, int hs, float scale) {
    float dot = 0.0f;
    for (int d = 0; d < hs; d++) dot = fmaf((float)h.q[i * h.stride + d], (float)h.k[j * h.stride + d], dot);
    return dot * scale;
}

// ---- Step 1: one thread a query, the definition word by word.
//
// Four passes over the keys, each of which computes the scores anew: the maximum, the sum, the output, and,
// for the top k, for each place in turn the largest score below the one found last. Every score is computed k
// + 4 times, and neighbouring threads read the same keys at different times: this is what the later steps
// save.
__global__ void step1_naive(bf16* out, AttentionRows rows, const bf16* qkv, int T, int num_heads, int hs,
                            int k) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= T) return;
    const Head h = head_of(qkv, blockIdx.y, T, num_heads, hs);
    const float scale = 1.0f / sqrtf((float)hs);
    float max = -INFINITY, sum = 0.0f;
    for (int j = 0; j <= i; j++) max = fmaxf(max, score(h, i, j, hs, scale));
    for (int j = 0; j <= i; j++) sum += expf(score(h, i, j, hs, scale) - max);
    const float lse = max + logf(sum);
    bf16* o = output_of(out, blockIdx.y, i, T, num_heads, hs);
    for (int d = 0; d < hs; d++) {
        float x = 0.0f;
        for (int j = 0; j <= i; j++)
            x += expf(score(h, i, j, hs, scale) - lse) * (float)h.v[j * h.stride + d];
        o[d] = (bf16)x;
    }
    // The place of a score is decided by its value and, among equals, by its position.
    float mass = 0.0f, kth = INFINITY, next = INFINITY;
    int last = -1;
    for (int place = 0; place <= k && place <= i; place++) {
        float best = -INFINITY;
        int at = -1;
        for (int j = 0; j <= i; j++) {
            const float s = score(h, i, j, hs, scale);
            if ((s < next || (s == next && j > last)) && s > best) best = s, at = j;
        }
        if (place < k) kth = best, mass += expf(best - lse);
        next = best;
        last = at;
    }
    const size_t row = (size_t)blockIdx.y * T + i;
    rows.lse[row] = lse;
    rows.mass[row] = i < k ? 1.0f : mass;
    rows.theta[row] = i < k ? -INFINITY : threshold_between(kth, next);
}

// ---- Step 2: one pass.
//
// A running maximum: when it moves, what was summed up so far is multiplied by exp(old - new) (online
// softmax, Milakov and Gimelshein, arXiv 1805.02867). So each score is computed once, used for sum, output
// and top k, and forgotten. The top k + 1 are a sorted list into which a score is inserted if it is larger
// than the last.
struct SortedList {
    float score[kLadderTop + 1];
    int k;
    __device__ void clear(int top) {
        k = top;
        for (int i = 0; i <= k; i++) score[i] = -INFINITY;
    }
    __device__ void insert(float s) {
        if (s <= score[k]) return;
        int i = k;
        for (; i > 0 && score[i - 1] < s; i--) score[i] = score[i - 1];
        score[i] = s;
    }
};
// The end of query i: o and sum have their exponentials relative to max.
__device__ inline void save_row(bf16* out, AttentionRows rows, int i, int T, int num_heads, int hs,
                                const float* o, float max, float sum, const SortedList& list) {
    bf16* to = output_of(out, blockIdx.y, i, T, num_heads, hs);
    for (int d = 0; d < hs; d++) to[d] = (bf16)(o[d] / sum);
    const size_t row = (size_t)blockIdx.y * T + i;
    const float lse = max + logf(sum);
    float mass = 0.0f;
    for (int place = 0; place < list.k; place++) mass += expf(list.score[place] - lse);
    rows.lse[row] = lse;
    rows.mass[row] = i < list.k ? 1.0f : mass;
    rows.theta[row] = i < list.k ? -INFINITY : threshold_between(list.score[list.k - 1], list.score[list.k]);
}
__global__ void step2_online(bf16* out, AttentionRows rows, const bf16* qkv, int T, int num_heads, int hs,
                             int k) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= T) return;
    const Head h = head_of(qkv, blockIdx.y, T, num_heads, hs);
    const float scale = 1.0f / sqrtf((float)hs);
    float max = -INFINITY, sum = 0.0f, o[kMaxHeadSize] = {};
    SortedList list;
    list.clear(k);
    for (int j = 0; j <= i; j++) {
        const float s = score(h, i, j, hs, scale), new_max = fmaxf(max, s);
        const float rescale = expf(max - new_max), p = expf(s - new_max);
        sum = sum * rescale + p;
        for (int d = 0; d < hs; d++) o[d] = o[d] * rescale + p * (float)h.v[j * h.stride + d];
        max = new_max;
        list.insert(s);
    }
    save_row(out, rows, i, T, num_heads, hs, o, max, sum, list);
}

// ---- Step 3: keys and values in shared memory.
//
// The 64 queries of a block need the same keys. They load 64 of them together, each number once, and all read
// them from shared memory: global memory is read 64 times less.
template <int TILE>
__device__ inline void load_keys_and_values(float* keys, float* values, const Head& h, int first, int T,
                                            int hs) {
    for (int x = threadIdx.x; x < TILE * hs; x += TILE) {
        const int j = first + x / hs;
        keys[x] = j < T ? (float)h.k[j * h.stride + x % hs] : 0.0f;
        values[x] = j < T ? (float)h.v[j * h.stride + x % hs] : 0.0f;
    }
}
__global__ void step3_shared(bf16* out, AttentionRows rows, const bf16* qkv, int T, int num_heads, int hs,
                             int k) {
    constexpr int TILE = 64;
    extern __shared__ float4 shared[];
    float *keys = (float*)shared, *values = keys + TILE * hs;  // [TILE][hs] each
    const int first = blockIdx.x * TILE, i = first + threadIdx.x;
    const Head h = head_of(qkv, blockIdx.y, T, num_heads, hs);
    const float scale = 1.0f / sqrtf((float)hs);
    float max = -INFINITY, sum = 0.0f, o[kMaxHeadSize] = {}, q[kMaxHeadSize] = {};
    if (i < T)
        for (int d = 0; d < hs; d++) q[d] = (float)h.q[i * h.stride + d];
    SortedList list;
    list.clear(k);
    for (int tile = 0; tile <= first; tile += TILE) {
        __syncthreads();
        load_keys_and_values<TILE>(keys, values, h, tile, T, hs);
        __syncthreads();
        if (i >= T) continue;
        for (int j = 0; j < TILE && tile + j <= i; j++) {
            float s = 0.0f;
            for (int d = 0; d < hs; d++) s = fmaf(q[d], keys[j * hs + d], s);
            s *= scale;
            const float new_max = fmaxf(max, s), rescale = expf(max - new_max), p = expf(s - new_max);
            sum = sum * rescale + p;
            for (int d = 0; d < hs; d++) o[d] = o[d] * rescale + p * values[j * hs + d];
            max = new_max;
            list.insert(s);
        }
    }
    if (i >= T) return;
    save_row(out, rows, i, T, num_heads, hs, o, max, sum, list);
}

// ---- Step 4: the maximum moves once a tile, not once a key.
//
// Rescaling the output costs hs multiplications a key. With the scores of a whole tile at hand the maximum is
// taken first, and the output rescaled once for 64 keys. The scores need a place to stay: a column of shared
// memory for each thread, next to its neighbours' so that a warp's accesses fall into different banks.
__global__ void step4_tiles(bf16* out, AttentionRows rows, const bf16* qkv, int T, int num_heads, int hs,
                            int k) {
    constexpr int TILE = 64;
    extern __shared__ float4 shared[];
    float *keys = (float*)shared, *values = keys + TILE * hs,
          *scores = values + TILE * hs;  // scores [TILE][TILE]
    const int first = blockIdx.x * TILE, i = first + threadIdx.x;
    const Head h = head_of(qkv, blockIdx.y, T, num_heads, hs);
    const float scale = 1.0f / sqrtf((float)hs);
    float max = -INFINITY, sum = 0.0f, o[kMaxHeadSize] = {}, q[kMaxHeadSize] = {};
    if (i < T)
        for (int d = 0; d < hs; d++) q[d] = (float)h.q[i * h.stride + d];
    SortedList list;
    list.clear(k);
    for (int tile = 0; tile <= first; tile += TILE) {
        __syncthreads();
        load_keys_and_values<TILE>(keys, values, h, tile, T, hs);
        __syncthreads();
        if (i >= T) continue;
        const int visible = min(TILE, i - tile + 1);
        float new_max = max;
        for (int j = 0; j < visible; j++) {
            float s = 0.0f;
            for (int d = 0; d < hs; d++) s = fmaf(q[d], keys[j * hs + d], s);
            s *= scale;
            scores[j * TILE + threadIdx.x] = s;
            new_max = fmaxf(new_max, s);
            list.insert(s);
        }
        const float rescale = expf(max - new_max);
        max = new_max;
        sum *= rescale;
        for (int d = 0; d < hs; d++) o[d] *= rescale;
        for (int j = 0; j < visible; j++) {
            const float p = expf(scores[j * TILE + threadIdx.x] - max);
            sum += p;
            for (int d = 0; d < hs; d++) o[d] = fmaf(p, values[j * hs + d], o[d]);
        }
    }
    if (i >= T) return;
    save_row(out, rows, i, T, num_heads, hs, o, max, sum, list);
}

// ---------------------------------------------------------------------------------------------------------
// checking and timing

template <class T>
T* device_array(size_t n) {
    T* p = nullptr;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(T)));
    CUDA_CHECK(cudaMemset(p, 0, n * sizeof(T)));
    return p;
}
template <class T>
std::vector<double> to_doubles(const T* device, size_t n) {
    std::vector<T> host(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    std::vector<double> out;
    for (const T& x : host) out.push_back((double)(float)x);
    return out;
}
static double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++) {
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    const double error = std::sqrt(difference / size);
    return std::isfinite(error) ? error : INFINITY;
}

struct Step {
    const char *name, *idea;
    std::function<void()> run;
};

int main(int argc, char** argv) {
    try {
        Shape s{4, 1024, 12, 64, 8};
        if (kOnCpu) s = {1, 130, 2, 64, 8};
        for (int a = 1; a < argc; a += 2) {
            int* value = !strcmp(argv[a], "-b")   ? &s.B
                         : !strcmp(argv[a], "-t") ? &s.T
                         : !strcmp(argv[a], "-n") ? &s.NH
                         : !strcmp(argv[a], "-h") ? &s.hs
                         : !strcmp(argv[a], "-k") ? &s.k
                                                  : nullptr;
            if (!value || a + 1 == argc || (*value = atoi(argv[a + 1])) < 1)
                fail(
                    "usage: attention_ladder [-b B] [-t T] [-n heads] [-h head size] [-k top k], numbers from 1");
        }
        if (s.hs % 8 || s.hs > kMaxHeadSize || s.k > kLadderTop)
            fail("-h takes multiples of 8 up to %d, -k numbers up to %d", kMaxHeadSize, kLadderTop);
        const Context ctx = make_context();
        const size_t C = (size_t)s.NH * s.hs, rows = (size_t)s.B * s.NH * s.T;
        std::mt19937_64 random(1);
        std::normal_distribution<float> normal;
        std::vector<bf16> qkv((size_t)s.B * s.T * 3 * C);
        for (bf16& x : qkv) x = (bf16)normal(random);
        bf16* d_qkv = device_array<bf16>(qkv.size());
        CUDA_CHECK(cudaMemcpy(d_qkv, qkv.data(), qkv.size() * sizeof(bf16), cudaMemcpyHostToDevice));
        bf16* out = device_array<bf16>(rows * s.hs);
        const AttentionRows saved{device_array<float>(rows), device_array<float>(rows),
                                  device_array<float>(rows), device_array<float>(rows)};

        const dim3 by_rows(ceil_div(s.T, 64), s.B * s.NH);
        const size_t tiles = 2 * 64 * s.hs * sizeof(float), with_scores = tiles + 64 * 64 * sizeof(float);
        const auto launch = [&](auto kernel, size_t shared) {
            launch_attention(ctx, kernel, by_rows, 64, shared, out, saved, (const bf16*)d_qkv, s.T, s.NH,
                             s.hs, s.k);
        };
        std::vector<Step> steps = {
            {"1 naive", "one thread a query, every score k + 4 times", [&] { launch(step1_naive, 0); }},
            {"2 online", "each score once: running maximum, sorted list", [&] { launch(step2_online, 0); }},
            {"3 shared", "64 queries share the keys they load", [&] { launch(step3_shared, tiles); }},
            {"4 tiles", "rescale once a tile", [&] { launch(step4_tiles, with_scores); }},
            {"5 plain", "a block of scores a thread, in registers",
             [&] {
                 attention_forward_plain(ctx, out, saved, (const bf16*)d_qkv, s.B, s.T, s.NH, s.hs, s.k);
             }},
            {"6 tensor cores", "mma, asynchronous copies; top k by a second kernel",
             [&] {
                 attention_forward_bf16(ctx, out, saved, d_qkv, s.B, s.T, s.NH, s.hs, 0);
                 attention_select_bf16(ctx, saved, d_qkv, s.B, s.T, s.NH, s.hs, s.k, true);
             }},
            {"7 lists", "top k in the same registers, by sorting networks",
             [&] { attention_forward_bf16(ctx, out, saved, d_qkv, s.B, s.T, s.NH, s.hs, s.k); }},
        };
        if (s.hs == 64 && (kOnCpu || ctx.use_wgmma))
            steps.push_back({"8 Hopper", "four warps multiply as one, from shared memory: wgmma",
                             [&] { attention_forward_hopper(ctx, out, saved, d_qkv, s.B, s.T, s.NH, s.k); }});

        printf("%s, B %d, T %d, %d heads of %d, k = %d%s\n", ctx.device_name.c_str(), s.B, s.T, s.NH, s.hs,
               s.k, kOnCpu ? " (CPU backend: these times say nothing about a GPU)" : "");
        std::vector<double> qkv64;
        for (const bf16& x : qkv) qkv64.push_back((double)(float)x);
        const ref::Attention want = ref::attention_forward(qkv64, s.B, s.T, s.NH, s.hs, s.k, Reg::tail);
        printf("%-16s %10s %10s %10s %10s %10s   %s\n", "step", "ms", "TFLOP/s", "x step 1", "out error",
               "mass error", "idea");
        // two products of 2 hs operations for each of the T (T + 1) / 2 visible scores of a head
        const double flops = 2.0 * 2.0 * s.hs * s.T * (s.T + 1.0) / 2.0 * s.B * s.NH;
        int passed = 0, failed = 0;
        double first_ms = 0;
        for (const Step& step : steps) {
            CUDA_CHECK(cudaMemset(out, 0, rows * s.hs * sizeof(bf16)));
            cudaEvent_t begin, end;
            CUDA_CHECK(cudaEventCreate(&begin));
            CUDA_CHECK(cudaEventCreate(&end));
            step.run();  // also the warm-up
            const double out_error = relative_error(to_doubles(out, rows * s.hs), want.out);
            const double mass_error = relative_error(to_doubles(saved.mass, rows), want.mass);
            const std::vector<double> theta = to_doubles(saved.theta, rows);
            bool between = true;
            for (size_t r = 0; r < rows; r++)
                if ((int)(r % s.T) >= s.k)
                    between = between && theta[r] <= want.kth[r] + 1e-4 && theta[r] >= want.next[r] - 1e-4;
            float best = INFINITY;
            for (int repeat = 0; repeat < (kOnCpu ? 1 : 10); repeat++) {
                CUDA_CHECK(cudaEventRecord(begin, ctx.stream));
                step.run();
                CUDA_CHECK(cudaEventRecord(end, ctx.stream));
                CUDA_CHECK(cudaEventSynchronize(end));
                float ms = 0;
                CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
                best = ms < best ? ms : best;
            }
            if (first_ms == 0) first_ms = best;
            // bf16 outputs: rounded once, 2^-9 each; the masses are float sums
            const bool good = out_error < 1.0 / 256 && mass_error < 1e-5 && between;
            (good ? passed : failed)++;
            printf("%-16s %10.3f %10.2f %10.1f %10.1e %10.1e   %s%s\n", step.name, best, flops / best * 1e-9,
                   first_ms / best, out_error, mass_error, step.idea, good ? "" : "   WRONG");
        }
        printf("%d passed, %d failed\n", passed, failed);
        return failed > 0;
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
