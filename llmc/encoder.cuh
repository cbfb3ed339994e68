// Token and position embedding.
//
//   out[b,t,:] = wte[token[b,t],:] + wpe[t,:]
//   dwte[v,:] += sum over (b,t) with token[b,t] = v of dout[b,t,:]
//   dwpe[t,:] += sum over b of dout[b,t,:]
//
// The scatter into dwte must not depend on the order in which blocks run, so there are no atomics: the host
// sorts the positions by token (TokenBuckets, a counting sort), and each token's rows are added in order.
#pragma once
#include <vector>

#include "cuda_common.cuh"

template <class Float>
__global__ void encoder_forward_kernel(Float* out, const int* tokens, const Float* wte, const Float* wpe,
                                       int T, int C, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    const size_t row = i * Pack<Float>::size / C, c = i * Pack<Float>::size % C;
    const Pack<Float> token = load_pack(wte + (size_t)tokens[row] * C + c);
    const Pack<Float> position = load_pack(wpe + row % T * C + c);
    Pack<Float> sum;
    for (int k = 0; k < Pack<Float>::size; k++) sum[k] = (Float)((float)token[k] + (float)position[k]);
    store_pack(out + i * Pack<Float>::size, sum);
}

template <class Float>
__global__ void wpe_backward_kernel(float* dwpe, const Float* dout, int B, int T, int C) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * Pack<Float>::size;
    if (i >= T * C) return;
    float sum[Pack<Float>::size] = {};
    for (int b = 0; b < B; b++) {
        const Pack<Float> d = load_pack(dout + (size_t)b * T * C + i);
        for (int k = 0; k < Pack<Float>::size; k++) sum[k] += (float)d[k];
    }
    for (int k = 0; k < Pack<Float>::size; k++) dwpe[i + k] += sum[k];
}

// blockIdx.y: one distinct token; threads: packs of its channels.
template <class Float>
__global__ void wte_backward_kernel(float* dwte, const Float* dout, const int* order, const int* bucket_token,
                                    const int* bucket_begin, int C) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * Pack<Float>::size;
    if (c >= C) return;
    const int bucket = blockIdx.y;
    float sum[Pack<Float>::size] = {};
    for (int i = bucket_begin[bucket]; i < bucket_begin[bucket + 1]; i++) {
        const Pack<Float> d = load_pack(dout + (size_t)order[i] * C + c);
        for (int k = 0; k < Pack<Float>::size; k++) sum[k] += (float)d[k];
    }
    float* out = dwte + (size_t)bucket_token[bucket] * C + c;
    for (int k = 0; k < Pack<Float>::size; k++) out[k] += sum[k];
}

// The positions 0 ... n-1 of a micro-batch, sorted by their token and, within a token, by position.
struct TokenBuckets {
    std::vector<int> order;  // [n]
    std::vector<int> token;  // [buckets], ascending
    std::vector<int> begin;  // [buckets + 1], indices into order
};

inline TokenBuckets bucket_tokens(const int* tokens, int n, int vocab_size) {
    std::vector<int> start(vocab_size + 1, 0);
    for (int i = 0; i < n; i++) start[tokens[i] + 1]++;
    TokenBuckets buckets;
    for (int v = 0; v < vocab_size; v++) {
        if (start[v + 1]) {
            buckets.token.push_back(v);
            buckets.begin.push_back(start[v]);
        }
        start[v + 1] += start[v];
    }
    buckets.begin.push_back(n);
    buckets.order.resize(n);
    for (int i = 0; i < n; i++) buckets.order[start[tokens[i]]++] = i;
    return buckets;
}

// out [B,T,C]; tokens [B,T], each below wte's rows; wte [Vp,C]; wpe [maxT,C]. C is a multiple of 8.
template <class Float>
void encoder_forward(const Context& ctx, Float* out, const int* tokens, const Float* wte, const Float* wpe,
                     int B, int T, int C) {
    assert(C % 8 == 0);
    const size_t num_packs = (size_t)B * T * C / Pack<Float>::size;
    encoder_forward_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, ctx.stream>>>(out, tokens, wte, wpe,
                                                                                       T, C, num_packs);
    CUDA_CHECK(cudaGetLastError());
}

// dwte [Vp,C] and dwpe [maxT,C] are added to; dout [B,T,C]. order, bucket_token, bucket_begin: TokenBuckets'
// arrays, on the device; num_buckets at most 65535.
template <class Float>
void encoder_backward(const Context& ctx, float* dwte, float* dwpe, const Float* dout, const int* order,
                      const int* bucket_token, const int* bucket_begin, int num_buckets, int B, int T,
                      int C) {
    assert(C % 8 == 0 && num_buckets > 0 && num_buckets <= 65535);
    constexpr int size = Pack<Float>::size;
    wpe_backward_kernel<<<ceil_div(T * C / size, 256), 256, 0, ctx.stream>>>(dwpe, dout, B, T, C);
    CUDA_CHECK(cudaGetLastError());
    const dim3 grid(ceil_div(C / size, 64), num_buckets);
    wte_backward_kernel<<<grid, 64, 0, ctx.stream>>>(dwte, dout, order, bucket_token, bucket_begin, C);
    CUDA_CHECK(cudaGetLastError());
}
