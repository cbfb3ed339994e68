// Barriers and warp collectives under their CUDA names.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "scheduler.h"

inline void __syncthreads(CUDA_CPU_WHERE) {
    cuda_cpu::block_barrier(where);
}
inline int __syncthreads_or(int predicate, CUDA_CPU_WHERE) {
    cuda_cpu::current_block().votes.any |= predicate != 0;
    cuda_cpu::block_barrier(where);
    return cuda_cpu::current_block().result.any;
}
inline int __syncthreads_and(int predicate, CUDA_CPU_WHERE) {
    cuda_cpu::current_block().votes.all &= predicate != 0;
    cuda_cpu::block_barrier(where);
    return cuda_cpu::current_block().result.all;
}
inline int __syncthreads_count(int predicate, CUDA_CPU_WHERE) {
    cuda_cpu::current_block().votes.count += predicate != 0;
    cuda_cpu::block_barrier(where);
    return cuda_cpu::current_block().result.count;
}
inline void __syncwarp(uint32_t mask = ~0u, CUDA_CPU_WHERE) {
    cuda_cpu::collective(mask, nullptr, cuda_cpu::meet, where);
}

namespace cuda_cpu {
// Calls f(lane) for every lane of a set.
template <class F>
void for_lanes(uint32_t lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(lowest(lanes));
}

inline int lane() {
    return worker->current % 32;
}

template <class T>
struct Shuffle {
    T in, out;
    int source;
};
// A lane that the mask leaves out has no defined value to give: it gives all ones, NaN in a float.
template <class T>
void shuffle_all(void** posts, uint32_t lanes) {
    for_lanes(lanes, [&](int l) {
        auto* mine = static_cast<Shuffle<T>*>(posts[l]);
        if (lanes >> mine->source & 1)
            mine->out = static_cast<Shuffle<T>*>(posts[mine->source])->in;
        else
            memset(static_cast<void*>(&mine->out), 0xff, sizeof(T));
    });
}
template <class T>
T shuffle(uint32_t mask, T value, int source, Where where) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    Shuffle<T> s{value, value, source};
    collective(mask, &s, shuffle_all<T>, where);
    return s.out;
}

// Combines the lanes' values in the order of the lanes and gives all of them the result.
template <class T, class Op>
struct Reduction {
    T value;
    static void all(void** posts, uint32_t lanes) {
        T total = static_cast<Reduction*>(posts[lowest(lanes)])->value;
        for_lanes(lanes & (lanes - 1),
                  [&](int l) { total = Op()(total, static_cast<Reduction*>(posts[l])->value); });
        for_lanes(lanes, [&](int l) { static_cast<Reduction*>(posts[l])->value = total; });
    }
};
template <class T, class Op>
T reduce(uint32_t mask, T value, Op, Where where) {
    Reduction<T, Op> r{value};
    collective(mask, &r, Reduction<T, Op>::all, where);
    return r.value;
}
inline uint32_t ballot(uint32_t mask, bool predicate, Where where) {
    return reduce(mask, predicate ? 1u << lane() : 0u, std::bit_or<>(), where);
}
}  // namespace cuda_cpu

// A shuffle from outside the segment of `width` lanes gives the lane its own value, as on a GPU.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CUDA_CPU_WHERE) {
    int segment = cuda_cpu::lane() & ~(width - 1);
    return cuda_cpu::shuffle(mask, value, segment | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, CUDA_CPU_WHERE) {
    int lane = cuda_cpu::lane(), source = lane ^ lane_mask;
    return cuda_cpu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, CUDA_CPU_WHERE) {
    int lane = cuda_cpu::lane(), source = lane - static_cast<int>(delta);
    return cuda_cpu::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, CUDA_CPU_WHERE) {
    int lane = cuda_cpu::lane(), source = lane + static_cast<int>(delta);
    return cuda_cpu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUDA_CPU_WHERE) {
    return cuda_cpu::ballot(mask, predicate != 0, where);
}
inline int __any_sync(uint32_t mask, int predicate, CUDA_CPU_WHERE) {
    return cuda_cpu::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, CUDA_CPU_WHERE) {
    return cuda_cpu::ballot(mask, predicate == 0, where) == 0;
}

namespace cuda_cpu {
struct Min {
    template <class T>
    T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};
}  // namespace cuda_cpu

inline unsigned __reduce_add_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, std::plus<>(), where);
}
inline int __reduce_add_sync(uint32_t mask, int value, CUDA_CPU_WHERE) {  // wraps around, as on a GPU
    return static_cast<int>(cuda_cpu::reduce(mask, static_cast<unsigned>(value), std::plus<>(), where));
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, cuda_cpu::Min(), where);
}
inline int __reduce_min_sync(uint32_t mask, int value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, cuda_cpu::Min(), where);
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, cuda_cpu::Max(), where);
}
inline int __reduce_max_sync(uint32_t mask, int value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, cuda_cpu::Max(), where);
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, std::bit_and<>(), where);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, std::bit_or<>(), where);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value, CUDA_CPU_WHERE) {
    return cuda_cpu::reduce(mask, value, std::bit_xor<>(), where);
}
