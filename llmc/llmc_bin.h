// llm.c's model files (gpt2_124M.bin, gpt2_124M_bf16.bin, model_00019560.bin), read. The format:
//
//     256 int32      20240326, version, maxT, V, L, NH, C, Vp, zeros
//     the tensors    of version 3 in float32, of version 5 in bf16, without gaps: wte [Vp,C], wpe [maxT,C],
//                    then each kind of a layer's tensors for all layers ([L,C] of ln_1's weights, [L,C] of
//                    its biases, [L,3C,C], ...), then ln_f's two: the order of the table in params.h,
//                    matrices as [out,in]
//
// What its vocabulary's padding (rows V to Vp) holds is not taken over. Older versions had no padding, or
// mixed types, and can be written anew by llm.c's train_gpt2.py.
#pragma once
#include <cstddef>
#include <map>
#include <string>

#include "files.h"
#include "params.h"

constexpr int32_t kLlmcModelMagic = 20240326;

class LlmcBinReader {
  public:
    explicit LlmcBinReader(const std::string& path);

    const std::string& path() const { return file_.path(); }
    const GPT2Config& config() const { return config_; }

    // The first p.size_on_disk() elements of the tensor, which lie as they do in memory, as float32.
    void read_f32(const ParamTensor& p, float* out) const;

  private:
    MappedFile file_;
    GPT2Config config_;
    size_t element_size_ = 4;
    std::map<std::string, size_t> offsets_;  // bytes, by the table's names
};
