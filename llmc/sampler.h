// Drawing the next token.
//
// A token's probability is weight / total, weight = e^((logit - largest logit) / temperature). The weights
// are added up as integers, in units of 2^-40, and computed by operations that every machine rounds alike. So
// sums are the same in any order, and this host code and the kernel in sampler.cuh draw the same token.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "host_device.h"
#include "random.h"

// How the next token is drawn. Of softmax(logits / temperature) the top_k most probable tokens are kept (0:
// all), of these the fewest whose share of the kept probability reaches top_p, and one is drawn from what is
// left. Tokens that tie with the last one kept are kept, too. Temperature 0 takes the largest logit, the
// first of equal ones.
struct Sampling {
    float temperature = 1.0f;
    int top_k = 0;
    float top_p = 1.0f;
    uint64_t seed = 0;
};

// Logits as integers in the same order, ordered_bits() on the host as well. NaN comes before all numbers, and
// -0 equals 0.
HOST_DEVICE inline uint32_t logit_key(float x) {
    if (x != x) return 0;
    x += 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What token_weight multiplies with: log2(e) / temperature, in units of 2^-24.
inline float weight_scale(float temperature) {
    const double scale = 0x1p24 * M_LOG2E / temperature;
    return static_cast<float>(std::min(scale, 3e38));
}

// e^(below / temperature), 0 to 1, where `below` is a logit minus the largest one; 0 beneath 2^-40 or if it
// is not a number. The relative error is 2e-7, and 1.2e-7 for each unit of the exponent, which is rounded
// twice. The exponent is cut to an integer, and every sum is an explicit fmaf: there is nothing left that a
// compiler could contract on one machine and not on another. The polynomial is, of those that are 1 at f = 0,
// the one with the least largest relative error for 2^f, 0 <= f < 1 (Remez: 8e-8).
HOST_DEVICE inline float token_weight(float below, float scale) {
    const float exponent = below * scale;
    if (!(exponent > -40.0f * 0x1p24f)) return 0.0f;
    const int fixed = static_cast<int>(exponent), whole = fixed >> 24;
    const float f = static_cast<float>(fixed & 0xffffff) * 0x1p-24f;
    float power = 0.00186713018f;
    power = fmaf(power, f, 0.00901703022f);
    power = fmaf(power, f, 0.0557999130f);
    power = fmaf(power, f, 0.240164450f);
    power = fmaf(power, f, 0.693151312f);
    power = fmaf(power, f, 1.0f);
    const int32_t bits = (127 + whole) << 23;
    float two_to_whole;
    memcpy(&two_to_whole, &bits, sizeof bits);
    return power * two_to_whole;
}
HOST_DEVICE inline uint64_t weight_units(float weight) {
    return static_cast<uint64_t>(static_cast<int64_t>(weight * 0x1p40f));
}

// The least sum of weights that top_p is content with; at least 1, so that one token is kept.
HOST_DEVICE inline uint64_t units_to_keep(float top_p, uint64_t total) {
    const double units = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    return units > 1.0 ? static_cast<uint64_t>(units) : 1;
}
// The token is the first one up to which the kept weights sum to more than this. It is less than the total:
// with 1 - 2^-53, the largest that `uniform` can be, the product rounds to the next smaller double.
HOST_DEVICE inline uint64_t units_before(double uniform, uint64_t total) {
    return static_cast<uint64_t>(uniform * static_cast<double>(total));
}

// A token drawn as Sampling says, by inverting the cumulative distribution at `uniform` in [0, 1). Where the
// largest logit is infinite, or no logit is a number, it is the first of the largest.
inline int sample_token(const float* logits, int vocab_size, float temperature, double uniform, int top_k = 0,
                        float top_p = 1.0f) {
    std::vector<uint32_t> key(vocab_size);
    for (int v = 0; v < vocab_size; v++) key[v] = logit_key(logits[v]);
    const int largest = static_cast<int>(std::max_element(key.begin(), key.end()) - key.begin());
    if (temperature == 0.0f || !std::isfinite(logits[largest])) return largest;

    uint32_t threshold = 0;  // tokens with this key or a larger one are kept
    std::vector<int> order;  // from the most probable on
    if (top_k > 0 || top_p < 1.0f) {
        order.resize(vocab_size);
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int a, int b) { return key[a] > key[b]; });
    }
    if (top_k > 0 && top_k < vocab_size) threshold = key[order[top_k - 1]];

    const float scale = weight_scale(temperature);
    std::vector<uint64_t> weight(vocab_size);
    auto total_kept = [&] {
        uint64_t total = 0;
        for (int v = 0; v < vocab_size; v++) total += key[v] >= threshold ? weight[v] : 0;
        return total;
    };
    for (int v = 0; v < vocab_size; v++)
        weight[v] = weight_units(token_weight(logits[v] - logits[largest], scale));
    if (top_p < 1.0f) {
        const uint64_t enough = units_to_keep(top_p, total_kept());
        uint64_t sum = 0;
        for (int i = 0; sum < enough; i++) {
            sum += weight[order[i]];
            threshold = key[order[i]];
        }
    }
    const uint64_t before = units_before(uniform, total_kept());
    uint64_t sum = 0;
    for (int v = 0;; v++) {
        if (key[v] >= threshold) sum += weight[v];
        if (sum > before) return v;
    }
}
