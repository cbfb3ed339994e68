// The CPU bodies of the tensor-core and cp.async wrappers, whose GPU bodies are inline PTX. Same names, same
// operands, fragments laid out over the lanes as the PTX manual draws them.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace cuda_cpu {
inline void require_full_warp(uint32_t lanes) {
    if (lanes != ~0u) fail("mma and ldmatrix need all 32 lanes of the warp", worker->where[worker->current]);
}

// Two bf16 in a register: the first in the lower half.
inline float low_bf16(uint32_t pair) {
    return std::bit_cast<float>(pair << 16);
}
inline float high_bf16(uint32_t pair) {
    return std::bit_cast<float>(pair & 0xffff0000u);
}

struct MmaOperands {
    float* d;
    const uint32_t *a, *b;
};

// GNU vectors, because the compiler does not vectorize the plain loops over a 16 x 8 x 16 product well.
typedef float Float8 __attribute__((vector_size(32), may_alias));

// D(16x8) += A(16x16) B(16x8): gathers the lanes' fragments, multiplies, hands D back.
inline void mma_all(void** posts, uint32_t lanes) {
    require_full_warp(lanes);
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const MmaOperands& m = *static_cast<MmaOperands*>(posts[l]);
        int g = l / 4, t = l % 4 * 2;
        for (int i = 0; i < 4; i++) {  // A's quarters: upper left, lower left, upper right, lower right
            float* row = a[g + i % 2 * 8] + i / 2 * 8;
            row[t] = low_bf16(m.a[i]);
            row[t + 1] = high_bf16(m.a[i]);
        }
        for (int i = 0; i < 2; i++) {
            b[i * 8 + t][g] = low_bf16(m.b[i]);
            b[i * 8 + t + 1][g] = high_bf16(m.b[i]);
        }
        memcpy(&d[g][t], m.d, 8);
        memcpy(&d[g + 8][t], m.d + 2, 8);
    }
    for (int r = 0; r < 16; r += 4) {
        Float8* rows = reinterpret_cast<Float8*>(d[r]);
        Float8 d0 = rows[0], d1 = rows[1], d2 = rows[2], d3 = rows[3];
        for (int k = 0; k < 16; k++) {
            Float8 bk = *reinterpret_cast<Float8*>(b[k]);
            d0 += a[r][k] * bk;
            d1 += a[r + 1][k] * bk;
            d2 += a[r + 2][k] * bk;
            d3 += a[r + 3][k] * bk;
        }
        rows[0] = d0, rows[1] = d1, rows[2] = d2, rows[3] = d3;
    }
    for (int l = 0; l < 32; l++) {
        const MmaOperands& m = *static_cast<MmaOperands*>(posts[l]);
        int g = l / 4, t = l % 4 * 2;
        memcpy(m.d, &d[g][t], 8);
        memcpy(m.d + 2, &d[g + 8][t], 8);
    }
}

// 16 bytes of any type. Not memcpy, so that the race checker sees one access.
typedef uint32_t Bytes16 __attribute__((vector_size(16), may_alias));

struct MatrixRow {
    alignas(16) uint16_t row[8];  // the one that this lane points to
    uint32_t result[4];           // this lane's two elements of each of the four matrices
};

// Lane l reads row l % 8 of matrix l / 8 itself, so that the checkers see which thread read what.
inline MatrixRow load_matrix_row(const void* row, Where where) {
    if (check && reinterpret_cast<uintptr_t>(row) % 16)
        fail("a row address of ldmatrix is not a multiple of 16 bytes", where);
    MatrixRow m;
    *reinterpret_cast<Bytes16*>(m.row) = *static_cast<const Bytes16*>(row);
    return m;
}

template <bool transposed>
void ldmatrix_all(void** posts, uint32_t lanes) {
    require_full_warp(lanes);
    auto at = [&](int matrix, int row, int col) -> uint32_t {
        if (transposed) std::swap(row, col);
        return static_cast<MatrixRow*>(posts[matrix * 8 + row])->row[col];
    };
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            static_cast<MatrixRow*>(posts[l])->result[i] =
                at(i, l / 4, l % 4 * 2) | at(i, l / 4, l % 4 * 2 + 1) << 16;
}

inline AsyncCopies& async_copies() {  // of this thread in this block
    Worker& w = *worker;
    if (w.async.empty()) w.async.resize(1024);
    AsyncCopies& a = w.async[w.current];
    if (a.block != w.block) {
        a.copies.clear();
        a.groups = 0;
        a.block = w.block;
    }
    return a;
}
}  // namespace cuda_cpu

// Not inlined: kernels unroll around them, and the calls cost nothing beside the fiber switches.

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 with C = D
[[gnu::noinline]] inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                CUDA_CPU_WHERE) {
    cuda_cpu::MmaOperands m{d, a, b};
    cuda_cpu::collective(~0u, &m, cuda_cpu::mma_all, where);
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
[[gnu::noinline]] inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_CPU_WHERE) {
    cuda_cpu::MatrixRow m = cuda_cpu::load_matrix_row(row, where);
    cuda_cpu::collective(~0u, &m, cuda_cpu::ldmatrix_all<false>, where);
    memcpy(r, m.result, 16);
}
[[gnu::noinline]] inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUDA_CPU_WHERE) {
    cuda_cpu::MatrixRow m = cuda_cpu::load_matrix_row(row, where);
    cuda_cpu::collective(~0u, &m, cuda_cpu::ldmatrix_all<true>, where);
    memcpy(r, m.result, 16);
}

// cp.async.cg.shared.global of 16 bytes, or zeros. In a check build the destination reads as NaN until the
// wait that covers the copy, which is when the copy is made.
[[gnu::noinline]] inline void cp_async_16(void* shared, const void* global, bool valid = true,
                                          CUDA_CPU_WHERE) {
    if constexpr (cuda_cpu::check) {
        if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
            cuda_cpu::fail("an address of cp.async is not a multiple of 16 bytes", where);
        *static_cast<cuda_cpu::Bytes16*>(shared) = cuda_cpu::Bytes16{~0u, ~0u, ~0u, ~0u};
        cuda_cpu::AsyncCopies& a = cuda_cpu::async_copies();
        a.copies.push_back({shared, valid ? global : nullptr, a.groups});
    } else {
        *static_cast<cuda_cpu::Bytes16*>(shared) =
            valid ? *static_cast<const cuda_cpu::Bytes16*>(global) : cuda_cpu::Bytes16{};
    }
}
inline void cp_async_commit() {
    if constexpr (cuda_cpu::check) cuda_cpu::async_copies().groups++;
}
// Until at most N of this thread's committed groups are under way. cp_async_wait<0> also covers no copy that
// was not committed.
template <int N>
void cp_async_wait() {
    if constexpr (cuda_cpu::check) {
        cuda_cpu::AsyncCopies& a = cuda_cpu::async_copies();
        size_t waiting = 0;
        for (const cuda_cpu::AsyncCopies::Copy& c : a.copies) {
            if (c.group >= a.groups - N)
                a.copies[waiting++] = c;
            else
                *static_cast<cuda_cpu::Bytes16*>(c.to) =
                    c.from ? *static_cast<const cuda_cpu::Bytes16*>(c.from) : cuda_cpu::Bytes16{};
        }
        a.copies.resize(waiting);
    }
}

// ex2.approx.ftz.f32
inline float fast_exp2(float x) {
    return exp2f(x);
}

// ld.acquire.gpu and st.release.gpu. A thread that waits for another block's flag holds up its OS thread, so
// the blocks that it waits for must have started before its own.
inline int acquire_load(const int* p) {
    const int x = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    cuda_cpu::race_acquire(p);
    return x;
}
inline void release_store(int* p, int x) {
    cuda_cpu::race_release(p);
    __atomic_store_n(p, x, __ATOMIC_RELEASE);
}

// atom.acq_rel.gpu.global.add.s32
inline int arrive(int* counter) {
    cuda_cpu::race_release(counter);
    const int before = __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
    cuda_cpu::race_acquire(counter);
    return before;
}

// red.relaxed.gpu.global.add.v2.f32
inline void add_pair_in_l2(float* p, float a, float b) {
    atomicAdd(p, a);
    atomicAdd(p + 1, b);
}

// The same by address, as mma.cuh computes them: on a GPU a 32-bit number.
inline uintptr_t shared_address(const void* p) {
    return reinterpret_cast<uintptr_t>(p);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uintptr_t row, CUDA_CPU_WHERE) {
    ldmatrix_x4(r, reinterpret_cast<const void*>(row), where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uintptr_t row, CUDA_CPU_WHERE) {
    ldmatrix_x4_trans(r, reinterpret_cast<const void*>(row), where);
}
inline void cp_async_16(uintptr_t shared, const void* global, bool valid = true, CUDA_CPU_WHERE) {
    cp_async_16(reinterpret_cast<void*>(shared), global, valid, where);
}
