// Counter-based random numbers: the n-th number of a stream is a hash of (seed, stream, n), so nothing has to
// be saved to go on bit for bit, and any number of threads gets the same ones.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

// The n-th number of the generator SplitMix64 that starts at `seed` (Steele, Lea and Flood, OOPSLA 2014):
// every bit of it depends on every bit of both.
HOST_DEVICE inline uint64_t splitmix64(uint64_t seed, uint64_t n) {
    uint64_t x = seed + 0x9e3779b97f4a7c15ull * (n + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

HOST_DEVICE inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t n) {
    return splitmix64(splitmix64(seed, stream), n);
}

// Uniform in [0, 1), 53 bits.
HOST_DEVICE inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t n) {
    return static_cast<double>(random_bits(seed, stream, n) >> 11) * 0x1p-53;
}

// Standard normal, by Box and Muller.
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t n) {
    const double u = 1.0 - random_uniform(seed, stream, 2 * n), v = random_uniform(seed, stream, 2 * n + 1);
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * v);
}
