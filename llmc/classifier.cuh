// Softmax, cross-entropy and its gradient in one kernel, over the logits of one position at a time.
//
//   loss[n] = log(sum_v exp(logit[n,v])) - logit[n, target[n]]
//   dlogit[n,v] = (exp(logit[n,v]) / sum - [v = target[n]]) dloss
//
// The gradient takes the logits' place: the [rows, Vp] array is the largest of the model, and a second copy
// would double it. Columns V ... Vp-1 are the vocabulary's padding: not read, and their gradient is zero.
//
// A row is read once and written once, 201,216 bytes for GPT-2's 50,304 bf16. Between the two it stays on the
// chip, half of it in the block's registers and half in shared memory: that way two blocks fit on an SM, also
// on one of an A100, and one of them can load or store while the other computes. (With the SM's 16
// exponentials a clock, the 100,000 of a row take 40% of the time that its bytes do.)
#pragma once
#include "cuda_common.cuh"
#include "mma.cuh"

// e^(x - max), on a GPU by its special-function unit. The difference comes first: x log2(e) - max log2(e)
// would be a multiply-add less, and off by what max log2(e) was rounded by, 3e-5 where max is 500.
__device__ inline float exp_below(float x, float max) {
    if constexpr (kOnCpu)
        return __expf(x - max);
    else
        return fast_exp2((x - max) * 1.44269504f);
}

inline constexpr int kClassifierThreads = 512;

// One block a row. The pack that thread t takes in its i-th turn is pack i blockDim.x + t: the first KEPT of
// them stay in its registers, then as many as fit in shared_packs of shared memory, and what is left, in wide
// rows and on the CPU backend, is read again. A running maximum keeps every exponent at or below zero; the
// sum is rescaled when it moves.
template <class Float, bool BACKWARD, int KEPT>
__global__ void __launch_bounds__(kClassifierThreads, 2)
    classifier_kernel(float* loss, Float* logits, const int* targets, float dloss, int V, int Vp,
                      int shared_packs) {
    constexpr int N = Pack<Float>::size;
    extern __shared__ __align__(16) char classifier_shared[];
    __shared__ float warp_max[32], warp_sum[32];
    Pack<Float>* shared = reinterpret_cast<Pack<Float>*>(classifier_shared);
    Float* row = logits + (size_t)blockIdx.x * Vp;
    const int packs = Vp / N, block = blockDim.x, first_shared = KEPT * block + threadIdx.x;
    const int end_shared = KEPT * block + shared_packs < packs ? KEPT * block + shared_packs : packs;

    // the whole row is asked for before anything is used
    Pack<Float> kept[KEPT > 0 ? KEPT : 1];
    if constexpr (KEPT > 0) {
        for (int p = first_shared; p < end_shared; p += block)
            cp_async_16(shared_address(shared + p - KEPT * block), row + (size_t)p * N);
        cp_async_commit();
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const int p = i * block + threadIdx.x;
            if (p < packs) kept[i] = load_pack(row + (size_t)p * N);
        }
    }
    const int target = targets[blockIdx.x];
    const float target_logit = (float)row[target];

    float max = -INFINITY, sum = 0.0f;
    auto add = [&](const Pack<Float>& x, int c) {
        float value[N], pack_max = max;
        for (int k = 0; k < N; k++) value[k] = (float)x[k];
        if (c + N > V)
            for (int k = 0; k < N; k++)
                if (c + k >= V) value[k] = -INFINITY;
        for (int k = 0; k < N; k++) pack_max = fmaxf(pack_max, value[k]);
        if (pack_max > max) {
            sum *= exp_below(max, pack_max);
            max = pack_max;
        }
        for (int k = 0; k < N; k++) sum += exp_below(value[k], max);
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const int c = (i * block + threadIdx.x) * N;
            if (c < V) add(kept[i], c);
        }
        cp_async_wait<0>();  // what the thread itself copied is all that it uses
    }
    for (int p = first_shared; p * N < V; p += block)
        add(p < end_shared ? shared[p - KEPT * block] : load_pack(row + (size_t)p * N), p * N);

    if (block > 1) {
        auto merge = [&] {  // the warp's maximum, and its sum relative to that
            const float m = row_max<32>(max);
            sum = row_sum<32>(sum == 0.0f ? 0.0f
                                          : sum * exp_below(max, m));  // of no elements, max is -infinity
            max = m;
        };
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        merge();
        if (lane == 0) {
            warp_max[warp] = max;
            warp_sum[warp] = sum;
        }
        __syncthreads();  // from here on the target's logit has been read, too: the row may be overwritten
        max = lane < block / 32 ? warp_max[lane] : -INFINITY;
        sum = lane < block / 32 ? warp_sum[lane] : 0.0f;
        merge();
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = max - target_logit + logf(sum);
    if (!BACKWARD) return;

    const float scale = dloss / sum;
    auto store_gradient = [&](const Pack<Float>& x, int c) {
        float d[N];
        for (int k = 0; k < N; k++) d[k] = exp_below((float)x[k], max) * scale;
        if (c <= target && target < c + N)
            for (int k = 0; k < N; k++)
                if (c + k == target) d[k] -= dloss;
        if (c + N > V)
            for (int k = 0; k < N; k++)
                if (c + k >= V) d[k] = 0.0f;
        Pack<Float> rounded;
        for (int k = 0; k < N; k++) rounded[k] = (Float)d[k];
        store_pack(row + c, rounded);
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const int p = i * block + threadIdx.x;
            if (p >= packs) continue;
            stay_packed(kept[i]);
            store_gradient(kept[i], p * N);
        }
    }
    for (int p = first_shared; p < packs; p += block)
        store_gradient(p < end_shared ? shared[p - KEPT * block] : load_pack(row + (size_t)p * N), p * N);
}

// loss [rows]; logits [rows,Vp]; targets [rows], each below V. Vp is a multiple of 8. With backward, the
// logits are replaced by their gradient times dloss (1 / rows for a mean).
template <class Float>
void classifier(const Context& ctx, float* loss, Float* logits, const int* targets, float dloss, int rows,
                int V, int Vp, bool backward) {
    assert(Vp % 8 == 0 && V <= Vp);
    with_row_lanes(ctx, [&](auto lanes) {
        // of the 13 packs of a thread in GPT-2's rows: 24 of its 64 registers
        constexpr int kept = lanes == 1 ? 0 : 6;
        const int block = lanes == 1 ? 1 : Vp < 8192 ? 128 : kClassifierThreads;
        const int left = Vp / Pack<Float>::size - kept * block;
        const int most = ((int)ctx.max_shared - 1024) / 16;
        const int shared_packs = lanes == 1 || left < 0 ? 0 : left < most ? left : most;
        const size_t shared = shared_packs * sizeof(Pack<Float>);
        const auto launch = [&](auto kernel) {
            allow_shared(kernel, shared);
            kernel<<<rows, block, shared, ctx.stream>>>(loss, logits, targets, dloss, V, Vp, shared_packs);
            CUDA_CHECK(cudaGetLastError());
        };
        backward ? launch(classifier_kernel<Float, true, kept>)
                 : launch(classifier_kernel<Float, false, kept>);
    });
}
