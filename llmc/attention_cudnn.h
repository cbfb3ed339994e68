// Attention without the regularizer by cuDNN, for whom NVIDIA's kernels are faster than ours: make
// USE_CUDNN=1. It is chosen where lambda is 0 and masses are not measured: cuDNN has no top-k. The two can
// take turns: a row's log-sum-exp is all that the backward needs of the forward, whoever ran it.
//
// Formulas: attention.cuh. The backward is the one whose sums are always taken in the same order.
#pragma once
#include <cuda_bf16.h>

#include <cstddef>

#include "context.h"

#ifdef USE_CUDNN
inline constexpr bool kUseCudnn = true;
#else
inline constexpr bool kUseCudnn = false;
#endif

// Finds cuDNN's kernels for a shape, which may take a second, so that attention_*_cudnn() run them from now
// on. Returns the floats of scratch that the backward needs; 0, and a line on stderr that says why, where
// cuDNN has no kernels.
size_t prepare_attention_cudnn(const Context& ctx, int B, int T, int num_heads, int hs);

// Was this shape prepared, with kernels found?
bool has_attention_cudnn(const Context& ctx, int B, int T, int num_heads, int hs);

// out [B,T,C], lse [B,NH,T], qkv [B,T,3C] with C = num_heads * hs; each at a multiple of 16 bytes. False, and
// nothing done, if this shape was not prepared.
bool attention_forward_cudnn(const Context& ctx, __nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv,
                             int B, int T, int num_heads, int hs);

// dqkv [B,T,3C] is overwritten; dout, out [B,T,C]; lse as either forward saved it; scratch as prepared.
bool attention_backward_cudnn(const Context& ctx, __nv_bfloat16* dqkv, float* scratch,
                              const __nv_bfloat16* dout, const __nv_bfloat16* out, const __nv_bfloat16* qkv,
                              const float* lse, int B, int T, int num_heads, int hs);
