// GPT-2's weights, in the formats in which people have them, and out in the one that everybody reads.
//
//     safetensors    model.safetensors, or several with model.safetensors.index.json; beside: config.json
//     TensorFlow     OpenAI's: model.ckpt.index, model.ckpt.data-00000-of-00001; beside: hparams.json
//     llm.c          gpt2_124M.bin, model_00019560.bin; the sizes are in the file
//
// A file is known by its content, a folder by the files in it. What a name such as wte means, and how its
// tensor lies in memory, is in params.h; here is what the same tensor is called, and how it lies, in each
// format. Every file is distrusted: memory for a model is taken only after its tensors were found in their
// shapes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "params.h"
#include "safetensors.h"

// ---- What is where ----

enum class WeightFormat { safetensors, tensorflow, llmc_bin };

// A model on the disk.
struct WeightFiles {
    WeightFormat format;
    std::string path;    // the .safetensors file or its index, TensorFlow's prefix, the .bin file
    std::string folder;  // where they lie, with config.json or hparams.json, and perhaps the vocabulary
};

const char* format_name(WeightFormat format);

// What model a folder holds; false if it holds none.
bool find_weights_in_folder(const std::string& folder, WeightFiles& found);

inline constexpr char kPytorchArchive[] =
    "%s is a PyTorch archive, which is a program as much as data: save the model as safetensors "
    "(save_pretrained(DIR, safe_serialization=True))";

// What model a file is, or is part of.
WeightFiles find_weights_of_file(const std::string& path);

// ---- The model's sizes ----

// The shape of a tensor by the table's name ("wte.weight"), empty if there is none of that name.
using ShapeOf = std::function<std::vector<int64_t>(const std::string&)>;

// For weights without config.json or hparams.json: OpenAI's four sizes are known by layers and channels. Of
// others the number of heads could only be guessed.
GPT2Config config_from_shapes(const std::string& path, const ShapeOf& shape_of);

// Reads and checks config.json of a folder. What it asks for must be what this engine computes.
GPT2Config read_gpt2_config(const std::string& folder);

// ---- Parameters, and arrays laid out like them, in and out of files ----

// out[c][r] = in[r][c], for in of [rows, cols]. In square blocks, so that both sides stay in the cache.
void transpose(const float* in, int rows, int cols, float* out);

void declare_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix);

// One tensor, from `data` in the table's layout.
void write_param(SafetensorsWriter& file, const ParamTensor& p, const std::string& prefix, const float* data);

// `values` is laid out by gpt2_params(). A NaN or infinity is an Error that names it.
void write_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix,
                  const float* values);

// Fills `values`, laid out by gpt2_params(), from what `read` gives: each tensor as it lies on disk, in the
// shape p.shape_on_disk().
void read_params(const std::string& path, const GPT2Config& config, float* values,
                 const std::function<void(const ParamTensor& p, float* on_disk)>& read);
void read_params(const SafetensorsReader& file, const GPT2Config& config, const std::string& prefix,
                 float* values);

// ---- safetensors ----

// Throws unless the file holds this model's tensors, in their shapes, and no others that matter. Hugging
// Face's buffers (attn.bias, attn.masked_bias: the causal mask) are passed over.
void check_safetensors(const SafetensorsReader& file, const GPT2Config& config);

// ---- Any of them ----

// The configuration of a model, whose weights have been found to be of that size.
GPT2Config config_for_weights(const WeightFiles& files);

// Fills params, num_parameters(config) floats laid out by gpt2_params().
void load_weights(const WeightFiles& files, const GPT2Config& config, float* params);

// ---- Out ----

// <|endoftext|> of a model whose vocabulary is not at hand: the last entry, as in GPT-2's, to which others
// may have been added behind it.
int end_of_text(const GPT2Config& c);

// config.json and generation_config.json.
void write_gpt2_config(const std::string& folder, const GPT2Config& c);

// What transformers.GPT2LMHeadModel.from_pretrained opens: config.json, generation_config.json and
// model.safetensors, in float32, into a folder that is there.
void write_model(const std::string& folder, const GPT2Config& config, const float* params);

// --export: write_model() into a folder that is not there yet, with the vocabulary of vocabulary_folder ("":
// none) under the names that transformers.GPT2Tokenizer looks for.
void export_model(const std::string& to, const GPT2Config& config, const float* params,
                  const std::string& vocabulary_folder);
