// Drawing the next token, and the counter-based random numbers that this and the initialization use: the n-th
// number of a stream is a hash of (seed, stream, n), so nothing has to be saved to go on bit for bit, and any
// number of threads gets the same ones.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

// SplitMix64's mixing function (Steele, Lea and Flood, OOPSLA 2014) over the three counters.
inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t n) {
    uint64_t x = seed;
    for (uint64_t word : {stream, n}) {
        x += 0x9e3779b97f4a7c15ull * (word + 1);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x ^= x >> 31;
    }
    return x;
}

// Uniform in [0, 1), 53 bits.
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t n) {
    return static_cast<double>(random_bits(seed, stream, n) >> 11) * 0x1p-53;
}

// Standard normal, by Box and Muller.
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t n) {
    const double u = 1.0 - random_uniform(seed, stream, 2 * n), v = random_uniform(seed, stream, 2 * n + 1);
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * v);
}

// A token from softmax(logits / temperature), by inverting the cumulative distribution at `uniform` in [0,
// 1). The maximum is taken out first, so that no logit overflows.
inline int sample_token(const float* logits, int vocab_size, float temperature, double uniform) {
    float max = logits[0];
    for (int v = 1; v < vocab_size; v++) max = logits[v] > max ? logits[v] : max;
    std::vector<double> cumulative(vocab_size);
    double sum = 0.0;
    for (int v = 0; v < vocab_size; v++) {
        sum += std::exp((static_cast<double>(logits[v]) - max) / temperature);
        cumulative[v] = sum;
    }
    for (int v = 0; v < vocab_size; v++)
        if (uniform * sum < cumulative[v]) return v;
    return vocab_size - 1;
}
