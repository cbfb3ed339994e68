#include "weights.h"

#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "dataloader.h"  // kShardMagic
#include "error.h"
#include "files.h"
#include "json_file.h"
#include "llmc_bin.h"
#include "tf_checkpoint.h"
#include "tokenizer.h"  // kGpt2Vocab
#include "vocabulary.h"

// ---- What is where ----

const char* format_name(WeightFormat format) {
    constexpr const char* names[] = {"safetensors", "a TensorFlow checkpoint", "llm.c's .bin"};
    return names[static_cast<int>(format)];
}

namespace {

bool starts_with_int(const MappedFile& file, int32_t magic) {
    return file.size() >= 4 && memcmp(file.data(), &magic, 4) == 0;
}

// The name without what follows `mark`, "" if it has none.
std::string cut_at(const std::string& name, const char* mark) {
    const size_t at = name.rfind(mark);
    return at == std::string::npos ? "" : name.substr(0, at);
}

// The files in a folder whose names end with `end`, in alphabetical order.
std::vector<std::string> files_ending(const std::string& folder, const std::string& end) {
    std::vector<std::string> found;
    std::error_code error;
    for (std::filesystem::directory_iterator it(folder, error), last; !error && it != last;
         it.increment(error))
        if (const std::string name = it->path().filename().string();
            name.ends_with(end) && is_file(folder + "/" + name))
            found.push_back(name);
    std::sort(found.begin(), found.end());
    return found;
}

// llm.c's file in a folder, "" if there is none: of a run's (model_00000500.bin, finished where DONE_00000500
// is) the newest, otherwise the only one.
std::string llmc_file(const std::string& folder) {
    std::string latest, finished;
    std::vector<std::string> models;
    for (const std::string& name : files_ending(folder, ".bin")) {
        if (!starts_with_int(MappedFile(folder + "/" + name), kLlmcModelMagic)) continue;
        models.push_back(name);
        if (!name.starts_with("model_")) continue;
        latest = name;
        const std::string step = name.substr(6, name.size() - 6 - 4);
        if (is_file(folder + "/DONE_" + step)) finished = name;
    }
    if (models.empty()) return "";
    if (!finished.empty()) return folder + "/" + finished;
    if (!latest.empty()) return folder + "/" + latest;
    if (models.size() > 1)
        fail("%s holds several llm.c models (%s, %s, ...): name one of them", folder.c_str(),
             printable(models[0]).c_str(), printable(models[1]).c_str());
    return folder + "/" + models[0];
}

}  // namespace

bool find_weights_in_folder(const std::string& folder, WeightFiles& found) {
    for (const char* name : {"/model.safetensors", "/model.safetensors.index.json"})
        if (is_file(folder + name)) {
            found = {WeightFormat::safetensors, folder + name, folder};
            return true;
        }
    if (is_file(folder + "/checkpoint") || !files_ending(folder, ".index").empty()) {
        found = {WeightFormat::tensorflow, tf_prefix(folder), folder};
        return true;
    }
    if (const std::string file = llmc_file(folder); !file.empty()) {
        found = {WeightFormat::llmc_bin, file, folder};
        return true;
    }
    const std::vector<std::string> others = files_ending(folder, ".safetensors");
    if (others.size() == 1 && others[0] != "optimizer.safetensors") {
        found = {WeightFormat::safetensors, folder + "/" + others[0], folder};
        return true;
    }
    return false;
}

WeightFiles find_weights_of_file(const std::string& path) {
    const std::string folder = folder_of(path), name = path.substr(path.rfind('/') + 1);
    // Of a TensorFlow checkpoint only the index says what it is.
    for (const char* mark : {".data-", ".meta"})
        if (const std::string prefix = cut_at(path, mark); !prefix.empty() && is_file(prefix + ".index"))
            return {WeightFormat::tensorflow, prefix, folder};
    if (name == "checkpoint" || name == "config.json" || name == "hparams.json") {
        WeightFiles found;
        if (!find_weights_in_folder(folder, found)) fail("there are no weights beside %s", path.c_str());
        return found;
    }
    const MappedFile file(path);
    const unsigned char* data = file.data();
    if (is_tf_index(data, file.size())) {
        if (!name.ends_with(".index"))
            fail(
                "%s is the index of a TensorFlow checkpoint, and must be named NAME.index, beside NAME.data-...",
                path.c_str());
        return {WeightFormat::tensorflow, cut_at(path, ".index"), folder};
    }
    if (starts_with_int(file, kLlmcModelMagic)) return {WeightFormat::llmc_bin, path, folder};
    if (starts_with_int(file, kShardMagic))
        fail("%s is a token shard, not a model: data goes with -j (the trainer's with -i, too)",
             path.c_str());
    if (file.size() >= 4 && memcmp(data, "PK\3\4", 4) == 0) fail(kPytorchArchive, path.c_str());
    if (name.ends_with(".safetensors") || (file.size() > 8 && data[8] == '{'))
        return {WeightFormat::safetensors, path, folder};
    if (name.ends_with(".json") && read_json_object(path).contains("weight_map"))
        return {WeightFormat::safetensors, path, folder};
    fail(
        "%s is not a model that is known here: safetensors, a TensorFlow checkpoint (NAME.index) or llm.c's .bin",
        path.c_str());
}

// ---- The model's sizes ----

namespace {

GPT2Config checked_config(GPT2Config c, const std::string& path) {
    if (std::string problem = config_problem(c); !problem.empty())
        fail("%s: %s", path.c_str(), problem.c_str());
    c.padded_vocab_size = pad_vocab(c.vocab_size);
    return c;
}

}  // namespace

GPT2Config config_from_shapes(const std::string& path, const ShapeOf& shape_of) {
    const std::vector<int64_t> wte = shape_of("wte.weight"), wpe = shape_of("wpe.weight");
    int layers = 0;
    while (layers <= kMaxLayers && !shape_of("h." + std::to_string(layers) + ".ln_1.weight").empty())
        layers++;
    if (wte.size() == 2 && wpe.size() == 2)
        for (const ModelSize& size : kPublishedSizes)
            if (layers == size.layers && wte[1] == size.channels() && wpe[1] == size.channels()) {
                GPT2Config c{.num_layers = size.layers, .num_heads = size.heads, .channels = size.channels()};
                c.max_seq_len = static_cast<int>(std::min<int64_t>(wpe[0], INT32_MAX));
                c.vocab_size = static_cast<int>(std::min<int64_t>(wte[0], INT32_MAX));
                return checked_config(c, path);
            }
    fail("%s is none of GPT-2's four sizes, so its config.json (or hparams.json) must lie beside it",
         path.c_str());
}

namespace {

// A whole number of a JSON file's object.
int json_integer(const nlohmann::json& root, const std::string& path, const char* key) {
    if (!root.contains(key) || root[key].is_null()) fail("%s has no %s", path.c_str(), key);
    const nlohmann::json& value = root[key];
    // Unsigned values beyond INT64_MAX must not wrap.
    if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > 1'000'000'000) ||
        value.get<int64_t>() < 0)
        fail("%s: %s must be a whole number from 0 to 1000000000", path.c_str(), key);
    return static_cast<int>(value.get<int64_t>());
}

// OpenAI's hparams.json, beside a TensorFlow checkpoint.
GPT2Config read_hparams(const std::string& folder) {
    const std::string path = folder + "/hparams.json";
    const nlohmann::json root = read_json_object(path);
    auto integer = [&](const char* key) { return json_integer(root, path, key); };
    GPT2Config c;
    c.vocab_size = integer("n_vocab");
    c.max_seq_len = integer("n_ctx");
    c.channels = integer("n_embd");
    c.num_heads = integer("n_head");
    c.num_layers = integer("n_layer");
    return checked_config(c, path);
}

}  // namespace

GPT2Config read_gpt2_config(const std::string& folder) {
    const std::string path = folder + "/config.json";
    const nlohmann::json root = read_json_object(path);
    auto given = [&](const char* key) { return root.contains(key) && !root[key].is_null(); };
    auto integer = [&](const char* key) { return json_integer(root, path, key); };
    auto must_be = [&](const char* key, const nlohmann::json& wanted) {
        if (given(key) && root[key] != wanted)
            fail("%s: %s is %s, but this engine knows only %s", path.c_str(), key,
                 printable(json_text(root[key])).c_str(), json_text(wanted).c_str());
    };
    must_be("model_type", "gpt2");
    GPT2Config c;
    c.vocab_size = integer("vocab_size");
    c.num_layers = integer("n_layer");
    c.num_heads = integer("n_head");
    c.channels = integer("n_embd");
    c.max_seq_len = integer(given("n_positions") || !given("n_ctx") ? "n_positions" : "n_ctx");
    c = checked_config(c, path);
    // "gelu_pytorch_tanh" is another name of the same function.
    if (!given("activation_function") || root["activation_function"] != "gelu_pytorch_tanh")
        must_be("activation_function", "gelu_new");
    must_be("layer_norm_epsilon", 1e-5);
    must_be("n_inner", 4 * c.channels);
    must_be("scale_attn_weights", true);
    must_be("scale_attn_by_inverse_layer_idx", false);
    must_be("tie_word_embeddings", true);
    must_be("add_cross_attention", false);
    return c;
}

// ---- Parameters, and arrays laid out like them, in and out of files ----

void transpose(const float* in, int rows, int cols, float* out) {
    constexpr int block = 32;
    for (int r0 = 0; r0 < rows; r0 += block)
        for (int c0 = 0; c0 < cols; c0 += block)
            for (int c = c0; c < std::min(cols, c0 + block); c++)
                for (int r = r0; r < std::min(rows, r0 + block); r++)
                    out[static_cast<size_t>(c) * rows + r] = in[static_cast<size_t>(r) * cols + c];
}

namespace {

bool all_finite(const float* values, size_t n) {
    constexpr uint32_t exponent = 0x7f800000;
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite &= (std::bit_cast<uint32_t>(values[i]) & exponent) != exponent;
    return finite;
}

}  // namespace

void declare_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix) {
    for (const ParamTensor& p : gpt2_params(config)) file.declare(prefix + p.name, "F32", p.shape_on_disk());
}

void write_param(SafetensorsWriter& file, const ParamTensor& p, const std::string& prefix,
                 const float* data) {
    std::vector<float> transposed;
    if (p.transposed) {
        transposed.resize(p.size());
        transpose(data, p.rows, p.cols, transposed.data());
        data = transposed.data();
    }
    file.write(prefix + p.name, data, p.size_on_disk() * sizeof(float));
}

void write_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix,
                  const float* values) {
    for (const ParamTensor& p : gpt2_params(config)) {
        if (!all_finite(values + p.offset, p.size_on_disk()))
            fail("%s%s holds NaN or infinity and is not saved: the last checkpoint stays", prefix.c_str(),
                 p.name.c_str());
        write_param(file, p, prefix, values + p.offset);
    }
}

void read_params(const std::string& path, const GPT2Config& config, float* values,
                 const std::function<void(const ParamTensor& p, float* on_disk)>& read) {
    std::vector<float> transposed;
    for (const ParamTensor& p : gpt2_params(config)) {
        float* data = values + p.offset;
        const size_t n = p.size_on_disk();
        if (p.transposed) {
            transposed.resize(n);
            read(p, transposed.data());
            transpose(transposed.data(), p.cols, p.rows, data);
        } else {
            read(p, data);
            std::fill(data + n, data + p.size(), 0.0f);
        }
        if (!all_finite(data, n)) fail("%s: tensor %s holds NaN or infinity", path.c_str(), p.name.c_str());
    }
}

void read_params(const SafetensorsReader& file, const GPT2Config& config, const std::string& prefix,
                 float* values) {
    read_params(file.path(), config, values, [&](const ParamTensor& p, float* out) {
        file.read_f32(prefix + p.name, p.shape_on_disk(), out);
    });
}

// ---- safetensors ----

namespace {

// Throws unless a tensor, of either reader's kind, is one of floats and has the shape that the model makes
// it.
template <class Tensor>
void check_tensor(const Tensor& tensor, const std::string& file, const std::string& name,
                  const std::vector<int64_t>& shape) {
    if (tensor.shape != shape)
        fail("%s: tensor %s has shape %s, but the model's configuration makes it %s", file.c_str(),
             name.c_str(), shape_text(tensor.shape).c_str(), shape_text(shape).c_str());
    if (!is_float_dtype(tensor.dtype))
        fail("%s: tensor %s is of type %s, but F32, F16 or BF16 is expected", file.c_str(), name.c_str(),
             tensor.dtype.c_str());
}

// The name that a tensor of the table has in a file: Hugging Face's, with or without "transformer.". Of two
// that are tied safetensors' save_model() stores one, lm_head.weight.
std::string safetensors_name(const SafetensorsReader& file, const std::string& name) {
    const std::string full = (file.contains("transformer.wpe.weight") ? "transformer." : "") + name;
    const bool is_tied = name == "wte.weight" && !file.contains(full) && file.contains("lm_head.weight");
    return is_tied ? "lm_head.weight" : full;
}

}  // namespace

void check_safetensors(const SafetensorsReader& file, const GPT2Config& config) {
    std::set<std::string> known;
    for (const ParamTensor& p : gpt2_params(config)) {
        const std::string name = safetensors_name(file, p.name);
        const SafeTensor& tensor = file.at(name);
        check_tensor(tensor, tensor.file, name, p.shape_on_disk());
        known.insert(name);
    }
    for (const auto& [name, tensor] : file.tensors()) {
        if (known.count(name)) continue;
        if (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")) continue;
        if (name != "lm_head.weight")
            fail("%s has a tensor %s that a GPT-2 with %d layers does not have", tensor.file.c_str(),
                 printable(name).c_str(), config.num_layers);
        const SafeTensor& wte = file.at(safetensors_name(file, "wte.weight"));
        if (tensor.dtype != wte.dtype || tensor.shape != wte.shape ||
            memcmp(tensor.data, wte.data, wte.bytes) != 0)
            fail("%s: lm_head.weight is not the same as wte.weight, and this engine ties the two",
                 tensor.file.c_str());
    }
}

// ---- TensorFlow ----

namespace {

// "h.3.attn.c_attn.weight" is "model/h3/attn/c_attn/w" there, of shape [1, C, 3C] (a convolution of width 1);
// a layernorm's weights are "g".
std::string tf_name(std::string name) {
    const bool weight = name.ends_with(".weight"), layernorm = name.find("ln_") != std::string::npos;
    name.resize(name.rfind('.'));
    if (name.starts_with("h.")) name.erase(1, 1);
    std::replace(name.begin(), name.end(), '.', '/');
    if (name == "wte" || name == "wpe") return "model/" + name;
    return "model/" + name + (!weight ? "/b" : layernorm ? "/g" : "/w");
}

std::vector<int64_t> tf_shape(const ParamTensor& p) {
    std::vector<int64_t> shape = p.shape_on_disk();
    if (p.transposed) shape.insert(shape.begin(), 1);
    return shape;
}

// Throws unless the checkpoint holds this model's tensors in their shapes. Others under "model/" must be an
// optimizer's; whatever training left elsewhere (global_step, beta1_power) is passed over.
void check_tf(const TfCheckpointReader& file, const GPT2Config& config) {
    std::set<std::string> known;
    for (const ParamTensor& p : gpt2_params(config)) {
        const std::string name = tf_name(p.name);
        const TfTensor& tensor = file.at(name);
        check_tensor(tensor, file.path(), name, tf_shape(p));
        known.insert(name);
    }
    for (const auto& [name, tensor] : file.tensors())
        if (name.starts_with("model/") && !known.count(name) && !known.count(name.substr(0, name.rfind('/'))))
            fail("%s has a tensor %s that a GPT-2 with %d layers does not have", file.path().c_str(),
                 printable(name).c_str(), config.num_layers);
}

// ---- Any of them ----

// config.json or hparams.json of the folder, otherwise what the shapes say.
GPT2Config config_beside(const WeightFiles& files, const ShapeOf& shape_of) {
    const bool tensorflow = files.format == WeightFormat::tensorflow;
    const bool config = is_file(files.folder + "/config.json"),
               hparams = is_file(files.folder + "/hparams.json");
    if (hparams && (tensorflow || !config)) return read_hparams(files.folder);
    if (config) return read_gpt2_config(files.folder);
    return config_from_shapes(files.path, shape_of);
}

}  // namespace

GPT2Config config_for_weights(const WeightFiles& files) {
    if (files.format == WeightFormat::llmc_bin) return LlmcBinReader(files.path).config();
    if (files.format == WeightFormat::tensorflow) {
        const TfCheckpointReader file(files.path);
        const GPT2Config config = config_beside(files, [&](const std::string& name) {
            const std::string tf = tf_name(name);
            return file.contains(tf) ? file.at(tf).shape : std::vector<int64_t>{};
        });
        check_tf(file, config);
        return config;
    }
    const SafetensorsReader file(files.path);
    const GPT2Config config = config_beside(files, [&](const std::string& name) {
        const std::string full = safetensors_name(file, name);
        return file.contains(full) ? file.at(full).shape : std::vector<int64_t>{};
    });
    check_safetensors(file, config);
    return config;
}

void load_weights(const WeightFiles& files, const GPT2Config& config, float* params) {
    if (files.format == WeightFormat::llmc_bin) {
        const LlmcBinReader file(files.path);
        if (!(file.config() == config)) fail("%s changed while it was read", files.path.c_str());
        for (const ParamTensor& p : gpt2_params(config)) {
            file.read_f32(p, params + p.offset);
            std::fill(params + p.offset + p.size_on_disk(), params + p.offset + p.size(), 0.0f);
            if (!all_finite(params + p.offset, p.size()))
                fail("%s: tensor %s holds NaN or infinity", files.path.c_str(), p.name.c_str());
        }
    } else if (files.format == WeightFormat::tensorflow) {
        const TfCheckpointReader file(files.path);
        check_tf(file, config);
        read_params(file.path(), config, params, [&](const ParamTensor& p, float* out) {
            file.read_f32(tf_name(p.name), tf_shape(p), out);
        });
    } else {
        const SafetensorsReader file(files.path);
        check_safetensors(file, config);
        read_params(file.path(), config, params, [&](const ParamTensor& p, float* out) {
            file.read_f32(safetensors_name(file, p.name), p.shape_on_disk(), out);
        });
    }
}

// ---- Out ----

int end_of_text(const GPT2Config& c) {
    return std::min(c.vocab_size, kGpt2Vocab) - 1;
}

void write_gpt2_config(const std::string& folder, const GPT2Config& c) {
    nlohmann::ordered_json root = {
        {"architectures", nlohmann::ordered_json::array({"GPT2LMHeadModel"})},
        {"model_type", "gpt2"},
        {"activation_function", "gelu_new"},
        {"vocab_size", c.vocab_size},
        {"n_positions", c.max_seq_len},
        {"n_ctx", c.max_seq_len},
        {"n_embd", c.channels},
        {"n_layer", c.num_layers},
        {"n_head", c.num_heads},
        {"n_inner", nullptr},
        {"layer_norm_epsilon", 1e-5},
        {"initializer_range", 0.02},
        {"resid_pdrop", 0.0},  // we train without dropout, and who goes on training should not get it unasked
        {"embd_pdrop", 0.0},
        {"attn_pdrop", 0.0},
        {"scale_attn_weights", true},
        {"scale_attn_by_inverse_layer_idx", false},
        {"tie_word_embeddings", true},
        {"use_cache", true},
        {"bos_token_id", end_of_text(c)},
        {"eos_token_id", end_of_text(c)},
        {"torch_dtype", "float32"},
    };
    write_file(folder + "/config.json", json_text(root, 2) + "\n");
    root = {{"_from_model_config", true}, {"bos_token_id", end_of_text(c)}, {"eos_token_id", end_of_text(c)}};
    write_file(folder + "/generation_config.json", json_text(root, 2) + "\n");
}

void write_model(const std::string& folder, const GPT2Config& config, const float* params) {
    write_gpt2_config(folder, config);
    // Without "format" transformers refuses the file.
    SafetensorsWriter file(folder + "/model.safetensors", {{"format", "pt"}});
    declare_params(file, config, "transformer.");
    write_params(file, config, "transformer.", params);
    file.finish();
}

void export_model(const std::string& to, const GPT2Config& config, const float* params,
                  const std::string& vocabulary_folder) {
    std::string folder = to;
    while (folder.size() > 1 && folder.ends_with('/')) folder.pop_back();
    std::error_code error;
    const bool there = std::filesystem::exists(std::filesystem::symlink_status(folder, error));
    if (there && !(is_folder(folder) && std::filesystem::is_empty(folder, error)))
        fail("%s is there already: --export writes a new folder", folder.c_str());
    make_folder(folder_of(folder));
    std::string temporary = temporary_name(folder);
    if (!mkdtemp(temporary.data())) fail("cannot create the folder %s: %s", folder.c_str(), strerror(errno));
    try {
        set_usual_mode(temporary, 0777);
        write_model(temporary, config, params);
        if (!vocabulary_folder.empty() && has_vocabulary(vocabulary_folder))
            write_vocabulary(temporary, read_vocabulary(vocabulary_folder, config.vocab_size));
        sync_folder(temporary);
        if (rename(temporary.c_str(), folder.c_str()) != 0)
            fail("cannot rename %s to %s: %s", temporary.c_str(), folder.c_str(), strerror(errno));
    } catch (...) {
        std::filesystem::remove_all(temporary, error);
        throw;
    }
    sync_folder(folder_of(folder));
}
