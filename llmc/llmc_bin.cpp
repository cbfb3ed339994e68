#include "llmc_bin.h"

#include <cstring>

#include "error.h"
#include "safetensors.h"  // copy_as_f32

LlmcBinReader::LlmcBinReader(const std::string& path) : file_(path) {
    const char* name = path.c_str();
    constexpr size_t header_bytes = 256 * sizeof(int32_t);
    int32_t h[8] = {};
    if (file_.size() < header_bytes)
        fail("%s is no llm.c model, or cut off: it has only %zu bytes", name, file_.size());
    memcpy(h, file_.data(), sizeof h);
    if (h[0] != kLlmcModelMagic)
        fail("%s is no llm.c model: it does not start with %d", name, kLlmcModelMagic);
    if (h[1] != 3 && h[1] != 5)
        fail("%s is an llm.c model of version %d; 3 (float32) and 5 (bf16) can be read", name, h[1]);
    config_ = {.max_seq_len = h[2],
               .vocab_size = h[3],
               .padded_vocab_size = h[7],
               .num_layers = h[4],
               .num_heads = h[5],
               .channels = h[6]};
    if (std::string problem = config_problem(config_); !problem.empty())
        fail("%s: %s", name, problem.c_str());
    if (h[7] < h[3] || h[7] > 2 * 65536)
        fail("%s: a vocabulary of %d tokens cannot be padded to %d", name, h[3], h[7]);
    element_size_ = h[1] == 3 ? 4 : 2;
    std::map<std::string, size_t> bytes;
    for (const ParamTensor& p : gpt2_params(config_))
        bytes[p.name] = p.size() * element_size_;  // padded as there
    size_t at = header_bytes;
    for (const ParamSpec& spec : kGPT2Params)
        for (int l = 0; l < (spec.per_layer ? config_.num_layers : 1); l++) {
            const std::string tensor = (spec.per_layer ? "h." + std::to_string(l) + "." : "") + spec.name;
            offsets_[tensor] = at;
            at += bytes[tensor];
        }
    if (at != file_.size())
        fail(
            "%s has %zu bytes, but a model of its %d layers and %d channels takes %zu (is the file cut off?)",
            name, file_.size(), config_.num_layers, config_.channels, at);
    config_.padded_vocab_size = pad_vocab(config_.vocab_size);
}

void LlmcBinReader::read_f32(const ParamTensor& p, float* out) const {
    copy_as_f32(element_size_ == 4 ? "F32" : "BF16", file_.data() + offsets_.at(p.name), p.size_on_disk(),
                out);
}
