// llm.c's model files (gpt2_124M.bin, gpt2_124M_bf16.bin, model_00019560.bin), read. The format:
//
//     256 int32      20240326, version, maxT, V, L, NH, C, Vp, zeros
//     the tensors    of version 3 in float32, of version 5 in bf16, without gaps: wte [Vp,C], wpe [maxT,C],
//     then
//                    each kind of a layer's tensors for all layers ([L,C] of ln_1's weights, [L,C] of its
//                    biases, [L,3C,C], ...), then ln_f's two: the order of the table in params.h, matrices as
//                    [out,in]
//
// What its vocabulary's padding (rows V to Vp) holds is not taken over. Older versions had no padding, or
// mixed types, and can be written anew by llm.c's train_gpt2.py.
#pragma once
#include <map>
#include <string>

#include "error.h"
#include "files.h"
#include "params.h"
#include "safetensors.h"  // bf16_bits_to_float

constexpr int32_t kLlmcModelMagic = 20240326;

class LlmcBinReader {
  public:
    explicit LlmcBinReader(const std::string& path) : file_(path) {
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

    const std::string& path() const { return file_.path(); }
    const GPT2Config& config() const { return config_; }

    // The first p.size_on_disk() elements of the tensor, which lie as they do in memory, as float32.
    void read_f32(const ParamTensor& p, float* out) const {
        const unsigned char* data = file_.data() + offsets_.at(p.name);
        if (element_size_ == 4) {
            memcpy(out, data, p.size_on_disk() * sizeof(float));
            return;
        }
        for (size_t i = 0; i < p.size_on_disk(); i++) {
            uint16_t bits;
            memcpy(&bits, data + 2 * i, 2);
            out[i] = bf16_bits_to_float(bits);
        }
    }

  private:
    MappedFile file_;
    GPT2Config config_;
    size_t element_size_ = 4;
    std::map<std::string, size_t> offsets_;  // bytes, by the table's names
};
