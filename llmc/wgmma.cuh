// Hopper's tensor-core instruction, wgmma (compute capability 9.0, code for sm_90a): four warps, a warpgroup,
// multiply 64 rows at a time, and read B, and A too if they like, from shared memory by themselves.
//
// Everything here is about tiles of 64 x 64 bf16 in shared memory: rows of 128 bytes, permuted as
// `swizzled<64>` in mma.cuh does it, which is what the hardware calls a 128-byte swizzle; a tile starts at a
// multiple of 1024 bytes. Warp w of the warpgroup has rows 16w ... +15 of the sum d, and of an A in
// registers, laid out as the fragments of mma.m16n8k16 are. Two products:
//
//   set_product_transposed:  d = a b^T    d[i][j] = sum_k a[i][k] b[j][k], a and b tiles
//   add_product:         d += a b     d[i][j] += sum_k a[i][k] b[k][j], a in registers, b a tile
//
// They run while the warps go on. begin_products(d, a) comes before the first, with the sums that are added
// to and the A fragments, which were written until then; commit_products() closes a group of them;
// wait_products(d) waits for all, and only then d may be read, or A's registers and the tiles overwritten.
// What ordinary instructions and cp.async wrote to a tile is seen after fence_tiles() by the thread that
// wrote, and a barrier.
//
// On the CPU backend the same products are made of the emulated mma, at once.
#pragma once
#include "mma.cuh"

inline constexpr int kWgmmaAlignment = 1024;  // bytes

using Accumulator = float[8][4];  // a thread's part of 64 x 64 sums
using AFragment = uint32_t[4];    // of 64 x 16

// Code for other devices than compute capability 9.0 compiles, but is never launched: see Context::use_wgmma.
#if defined(CUDA_CPU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

#ifdef CUDA_CPU

struct Tile {
    const __nv_bfloat16* start;
};
__device__ inline Tile describe_tile(const __nv_bfloat16* tile) {
    assert(reinterpret_cast<uintptr_t>(tile) % kWgmmaAlignment == 0);
    return {tile};
}
template <class... Registers>
void begin_products(Registers&...) {}
inline void commit_products() {}
inline void fence_tiles() {}
template <class... D>
void wait_products(D&...) {}

inline void set_product_transposed(Accumulator& d, Tile a, Tile b) {
    const SharedAddress a_first = first_piece<64, Order::rows>(a.start);
    const SharedAddress b_first = first_piece<64, Order::columns>(b.start);
    memset(d, 0, sizeof d);
    for (int kk = 0; kk < 4; kk++) {
        AFragment fragment;
        load_a<64>(fragment, a_first, threadIdx.x / 32 % 4 * 16, kk);
        for (int n = 0; n < 4; n++) {
            uint32_t b0[2], b1[2];
            load_b_transposed<64>(b0, b1, b_first, 16 * n, kk);
            mma_m16n8k16_bf16(d[2 * n], fragment, b0);
            mma_m16n8k16_bf16(d[2 * n + 1], fragment, b1);
        }
    }
}
inline void add_product(Accumulator& d, const AFragment (&a)[4], Tile b) {
    const SharedAddress first = first_piece<64, Order::rows>(b.start);
    for (int kk = 0; kk < 4; kk++)
        for (int n = 0; n < 4; n++) {
            uint32_t b0[2], b1[2];
            load_b<64>(b0, b1, first, 16 * kk, n);
            mma_m16n8k16_bf16(d[2 * n], a[kk], b0);
            mma_m16n8k16_bf16(d[2 * n + 1], a[kk], b1);
        }
}

#else

// The descriptor of a matrix in shared memory (PTX manual, "Matrix descriptor"): address / 16; 1024 bytes, /
// 16, from 8 rows to the next 8; 128-byte swizzle. The other stride is not used by a tile that is 64 wide.
struct Tile {
    uint64_t bits;
};
__device__ __forceinline__ Tile describe_tile(const __nv_bfloat16* tile) {
    return {(uint64_t)(shared_address(tile) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
            (uint64_t)1 << 62};
}

// Tells the compiler that registers change here, for it knows of no other connection between them and the
// instructions around: what writes to an operand stays in front of the fence, and what reads sums behind the
// wait.
__device__ __forceinline__ void changes_here(Accumulator& d) {
#pragma unroll
    for (int n = 0; n < 8; n++)
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
__device__ __forceinline__ void changes_here(AFragment (&a)[4]) {
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        asm volatile("" : "+r"(a[kk][0]), "+r"(a[kk][1]), "+r"(a[kk][2]), "+r"(a[kk][3])::"memory");
}

template <class... Registers>
__device__ __forceinline__ void begin_products(Registers&... r) {
    (changes_here(r), ...);
    if constexpr (kHasWgmma) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    if constexpr (kHasWgmma) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <class... D>
__device__ __forceinline__ void wait_products(D&... d) {
    if constexpr (kHasWgmma) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    (changes_here(d), ...);
}
__device__ __forceinline__ void fence_tiles() {
    if constexpr (kHasWgmma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define WGMMA_SUMS(how, d)                                                                                \
    how(d[0][0]), how(d[0][1]), how(d[0][2]), how(d[0][3]), how(d[1][0]), how(d[1][1]), how(d[1][2]),     \
        how(d[1][3]), how(d[2][0]), how(d[2][1]), how(d[2][2]), how(d[2][3]), how(d[3][0]), how(d[3][1]), \
        how(d[3][2]), how(d[3][3]), how(d[4][0]), how(d[4][1]), how(d[4][2]), how(d[4][3]), how(d[5][0]), \
        how(d[5][1]), how(d[5][2]), how(d[5][3]), how(d[6][0]), how(d[6][1]), how(d[6][2]), how(d[6][3]), \
        how(d[7][0]), how(d[7][1]), how(d[7][2]), how(d[7][3])
#define WGMMA_64                                                                                               \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14," \
    "%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "

// Four steps of 16 terms. A step is 32 bytes along the rows of a tile, or 16 of its rows. The first
// overwrites d: zeros written to it beforehand would be writes between one product and the next, before which
// the compiler waits.
__device__ __forceinline__ void set_product_transposed(Accumulator& d, Tile a, Tile b) {
    if constexpr (kHasWgmma) {
        asm volatile(WGMMA_64 "%32, %33, 0, 1, 1, 0, 0;" : WGMMA_SUMS("=f", d) : "l"(a.bits), "l"(b.bits));
#pragma unroll
        for (int kk = 1; kk < 4; kk++)
            asm volatile(WGMMA_64 "%32, %33, 1, 1, 1, 0, 0;"
                         : WGMMA_SUMS("+f", d)
                         : "l"(a.bits + 2 * kk), "l"(b.bits + 2 * kk));
    }
}
__device__ __forceinline__ void add_product(Accumulator& d, const AFragment (&a)[4], Tile b) {
    if constexpr (kHasWgmma) {
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            asm volatile(WGMMA_64 "{%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                         : WGMMA_SUMS("+f", d)
                         : "r"(a[kk][0]), "r"(a[kk][1]), "r"(a[kk][2]), "r"(a[kk][3]),
                           "l"(b.bits + 128 * kk));
    }
}

#undef WGMMA_64
#undef WGMMA_SUMS
#endif
