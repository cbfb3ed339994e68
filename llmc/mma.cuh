// The instructions that C++ has no name for, a PTX body each here and a CPU body in llmc/cpu/mma_cpu.h:
// tensor-core products, the loads that feed them, asynchronous copies to shared memory, and ordering between
// blocks.
//
// A warp multiplies fragments that are spread over its 32 lanes (PTX manual, "Matrix fragments for
// mma.m16n8k16"). With g = lane / 4 and t = lane % 4:
//
//   A (16 x 16)  a[0]: row g,   columns 2t, 2t+1      a[2]: the same rows, columns 8 further
//                a[1]: row g+8, columns 2t, 2t+1      a[3]
//   B (16 x 8)   b[0]: rows 2t, 2t+1 of column g      b[1]: rows 8 further
//   D (16 x 8)   d[0], d[1]: row g, columns 2t, 2t+1  d[2], d[3]: row g+8
//
// so two neighbouring D tiles, rounded to bf16 in pairs, are the A fragment of the next product as they are.
#pragma once
#include "cuda_common.cuh"

// An address in shared memory: 32 bits on a GPU, which halves the arithmetic on it.
#ifdef CUDA_CPU
#include "cpu/mma_cpu.h"
using SharedAddress = uintptr_t;
#else
using SharedAddress = uint32_t;

// d += a b, bf16 in, float sums.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
    return (SharedAddress)__cvta_generic_to_shared(p);
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8 (16 bytes each); r[i] of lane l gets columns 2t, 2t+1 of row g of matrix i. The second form
// transposes each matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// 16 bytes from global to shared memory, or zeros if !valid, without passing through registers; they are
// there after the cp_async_wait that covers the group of the copy, for the copying thread, and after the next
// barrier for the others.
__device__ __forceinline__ void cp_async_16(SharedAddress shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most N of the thread's newest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x to 2 ulp, one instruction.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A flag between blocks: what a thread wrote before release_store is seen by whoever reads the stored value
// with acquire_load, and by the rest of its warp after __syncwarp().
__device__ __forceinline__ int acquire_load(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void release_store(int* p, int x) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Adds 1 to a counter between blocks and returns what it was: who arrives later sees what the block of an
// earlier one wrote before the barrier that it arrived behind, if it reads it behind such a barrier.
__device__ __forceinline__ int arrive(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// In code for Hopper and newer devices, by a compiler whose PTX has their additions in pairs and st.async:
// since CUDA 12.1.
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
#define HAS_PTX_81_OF_SM_90
#endif

// p[0] += a, p[1] += b in the L2 cache, without reading them here; p is 8-byte aligned.
__device__ __forceinline__ void add_pair_in_l2(float* p, float a, float b) {
#ifdef HAS_PTX_81_OF_SM_90
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(a), "f"(b) : "memory");
#else
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(a) : "memory");
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p + 1), "f"(b) : "memory");
#endif
}

#endif

// A tile of rows of COLS bf16 (16, 32, 64 or 128) in shared memory, as the fragments' loads want it: the
// 16-byte chunks of a row are permuted by the row's number, so that the 8 rows of one column of chunks, which
// an 8 x 8 matrix is, lie in 8 different groups of banks. Element offset of (row, chunk); a tile starts at a
// multiple of kTileAlignment.
inline constexpr int kTileAlignment = 256;  // bytes: the longest row

template <int COLS>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    if constexpr (COLS >= 64)
        return row * COLS + (chunk ^ (row & 7)) * 8;
    else if constexpr (COLS == 32)  // rows of 64 bytes: two to a line of 32 banks
        return row * COLS + (chunk ^ ((row >> 1) & 3)) * 8;
    else  // of 32 bytes: four
        return row * COLS + (chunk ^ ((row >> 2) & 1)) * 8;
}

// Four 8 x 8 matrices make a 16 x 16 piece of a tile: rows row0 ... +15, columns 16 group ... +15. The
// permutation is an exclusive or, so that a lane's address for the piece is its address for the tile's first
// piece, computed once, with the group's bits flipped and the rows added. The four matrices, in the order of
// r[0] ... r[3]:
//
//   by rows first: upper left, lower left, upper right, lower right (the order of an A fragment)
//   by columns first: upper left, upper right, lower left, lower right
enum class Order { rows, columns };

template <int COLS, Order ORDER>
__device__ __forceinline__ SharedAddress first_piece(const __nv_bfloat16* tile) {
    const int lane = threadIdx.x % 32, m = lane / 8;
    const int lower = ORDER == Order::rows ? m % 2 : m / 2, right = ORDER == Order::rows ? m / 2 : m % 2;
    return shared_address(tile + swizzled<COLS>(lower * 8 + lane % 8, right));
}
template <int COLS>
__device__ __forceinline__ SharedAddress piece(SharedAddress first, int row0, int group) {
    return (first ^ (SharedAddress)(group * 32)) + row0 * COLS * (int)sizeof(__nv_bfloat16);
}

// The A fragment of a piece. `first` is in Order::rows.
template <int COLS>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], SharedAddress first, int row0, int group) {
    ldmatrix_x4(a, piece<COLS>(first, row0, group));
}
// The A fragment of the transposed piece: A's rows are the tile's columns. `first` is in Order::columns.
template <int COLS>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], SharedAddress first, int row0,
                                                  int group) {
    ldmatrix_x4_trans(a, piece<COLS>(first, row0, group));
}
// Two B fragments of the transposed piece, for products with tile^T: B's columns are the tile's rows row0 ...
// +7 (b0) and the next 8 (b1). `first` is in Order::columns.
template <int COLS>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b0)[2], uint32_t (&b1)[2], SharedAddress first,
                                                  int row0, int group) {
    uint32_t r[4];
    ldmatrix_x4(r, piece<COLS>(first, row0, group));
    b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
// Two B fragments of the piece, for products with the tile: B's columns are the tile's columns 16 group ...
// +7 (b0) and the next 8 (b1). `first` is in Order::rows.
template <int COLS>
__device__ __forceinline__ void load_b(uint32_t (&b0)[2], uint32_t (&b1)[2], SharedAddress first, int row0,
                                       int group) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, piece<COLS>(first, row0, group));
    b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
