// The small model of the tests of training and of inference.
#pragma once
#include <vector>

#include "../llmc/params.h"
#include "../llmc/sampler.h"

inline const GPT2Config kSmall{.max_seq_len = 40,
                               .vocab_size = 37,
                               .padded_vocab_size = 128,
                               .num_layers = 3,
                               .num_heads = 2,
                               .channels = 48};

// Weights large enough that attention is not uniform and every tensor's gradient is of some size. Values are
// rounded to Float, so that the reference sees the model's own.
template <class Float>
std::vector<float> busy_params(const GPT2Config& config) {
    std::vector<float> params(num_parameters(config), 0.0f);
    for (const ParamTensor& p : gpt2_params(config))
        for (size_t i = 0; i < p.size_on_disk(); i++) {
            const float x = (float)random_normal(4, p.offset, i);
            const float w = p.init == Init::ones ? 1.0f + 0.1f * x : p.is_vector ? 0.1f * x : 0.16f * x;
            params[p.offset + i] = (float)(Float)w;
        }
    return params;
}
