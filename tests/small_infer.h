// The small model of the tests of inference, on the device; behind infer_gpt2.cu.
#pragma once
#include "check.h"
#include "small_model.h"

using bf16 = __nv_bfloat16;

constexpr int kEot = 36;

template <class Float>
static Model<Float> make_model(const GPT2Config& config) {
    const std::vector<float> params = busy_params<Float>(config);
    const std::vector<Float> rounded(params.begin(), params.end());
    Model<Float> m{.config = config};
    Float* base = nullptr;
    m.memory = std::make_unique<DeviceMemory>(
        make_context(), "test", "", [&](Arena& arena) { base = arena.take<Float>(rounded.size()); });
    to_device(base, rounded.data(), rounded.size());
    m.params = point_to_params(base, config);
    return m;
}

static Tokens random_tokens(size_t n, uint64_t seed) {
    Tokens tokens;
    for (const int t : random_ints(n, kEot, seed)) tokens.push_back((uint16_t)t);
    return tokens;
}
