// Checkpoints: what a run leaves in its folder, and what a run starts from.
//
//     RUN/metrics.jsonl                  see metrics.h
//     RUN/step_00000123/                 after 123 updates
//         config.json                    these three are what transformers.GPT2LMHeadModel.from_pretrained
//         generation_config.json           opens, as they are
//         model.safetensors              float32, "transformer.h.0.attn.c_attn.weight" as [C, 3C], ...
//         optimizer.safetensors          AdamW's moments, float32: "exp_avg.NAME" and "exp_avg_sq.NAME" for
//                                          each parameter, under Hugging Face's bare names ("wte.weight") and
//                                          in the shapes of model.safetensors
//         state.json                     {"format": 1, "step": .., "seed": .., "epoch": .., "position": ..,
//                                          "settings": {"lambda": "0.1", ..}, "extra": {..}}
//
// The padding of the vocabulary is never written; on reading it is zero, which is what training keeps it.
//
// A checkpoint is written as RUN/.tmp-step_00000123, every file synced, and renamed when it is whole, so that
// a crash at any instant leaves the last good one; what a crash left behind goes with the next save. Only the
// newest checkpoints keep their optimizer: it is twice the size of the weights, and only a resume needs it.
#pragma once
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <functional>

#include "error.h"
#include "files.h"
#include "params.h"
#include "safetensors.h"

// ---- The folder's names ----

inline std::string step_folder_name(int64_t step) {
    return format("step_%08lld", static_cast<long long>(step));
}

// The step of a folder named exactly as step_folder_name() does, or -1: "step_12_junk" and "step_12" are not.
inline int64_t step_of_folder(const std::string& name) {
    if (!name.starts_with("step_")) return -1;
    const char *begin = name.data() + 5, *end = name.data() + name.size();
    int64_t step = -1;
    auto [stop, error] = std::from_chars(begin, end, step);
    if (error != std::errc() || stop != end || step < 0) return -1;
    return name == step_folder_name(step) ? step : -1;
}

// The steps of the run folder's checkpoints, complete or not, in ascending order.
inline std::vector<int64_t> checkpoint_steps(const std::string& run_folder) {
    std::vector<int64_t> steps;
    std::error_code error;
    for (std::filesystem::directory_iterator it(run_folder, error), end; !error && it != end;
         it.increment(error))
        if (int64_t step = step_of_folder(it->path().filename().string());
            step >= 0 && is_folder(it->path().string()))
            steps.push_back(step);
    std::sort(steps.begin(), steps.end());
    return steps;
}

// ---- config.json ----

// Reads and checks config.json of a folder. What it asks for must be what this engine computes.
inline GPT2Config read_gpt2_config(const std::string& folder) {
    const std::string path = folder + "/config.json";
    const nlohmann::json root = read_json_object(path);
    auto given = [&](const char* key) { return root.contains(key) && !root[key].is_null(); };
    auto integer = [&](const char* key) {
        if (!given(key)) fail("%s has no %s", path.c_str(), key);
        const nlohmann::json& value = root[key];
        // Unsigned values beyond INT64_MAX must not wrap.
        if (!value.is_number_integer() ||
            (value.is_number_unsigned() && value.get<uint64_t>() > 1'000'000'000) || value.get<int64_t>() < 0)
            fail("%s: %s must be a whole number from 0 to 1000000000", path.c_str(), key);
        return static_cast<int>(value.get<int64_t>());
    };
    auto must_be = [&](const char* key, const nlohmann::json& wanted) {
        if (given(key) && root[key] != wanted)
            fail("%s: %s is %s, but this engine knows only %s", path.c_str(), key,
                 printable(root[key].dump()).c_str(), wanted.dump().c_str());
    };
    must_be("model_type", "gpt2");
    GPT2Config c;
    c.vocab_size = integer("vocab_size");
    c.num_layers = integer("n_layer");
    c.num_heads = integer("n_head");
    c.channels = integer("n_embd");
    c.max_seq_len = integer(given("n_positions") || !given("n_ctx") ? "n_positions" : "n_ctx");
    if (std::string problem = config_problem(c); !problem.empty())
        fail("%s: %s", path.c_str(), problem.c_str());
    c.padded_vocab_size = pad_vocab(c.vocab_size);
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

// config.json and generation_config.json. <|endoftext|> is the last entry of the vocabulary, as in GPT-2's.
inline void write_gpt2_config(const std::string& folder, const GPT2Config& c) {
    const int end_of_text = c.vocab_size - 1;
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
        {"bos_token_id", end_of_text},
        {"eos_token_id", end_of_text},
        {"torch_dtype", "float32"},
    };
    write_file(folder + "/config.json", root.dump(2) + "\n");
    root = {{"_from_model_config", true}, {"bos_token_id", end_of_text}, {"eos_token_id", end_of_text}};
    write_file(folder + "/generation_config.json", root.dump(2) + "\n");
}

// ---- Parameters, and arrays laid out like them, in and out of safetensors ----

// out[c][r] = in[r][c], for in of [rows, cols]. In square blocks, so that both sides stay in the cache.
inline void turn_matrix(const float* in, int rows, int cols, float* out) {
    constexpr int block = 32;
    for (int r0 = 0; r0 < rows; r0 += block)
        for (int c0 = 0; c0 < cols; c0 += block)
            for (int c = c0; c < std::min(cols, c0 + block); c++)
                for (int r = r0; r < std::min(rows, r0 + block); r++)
                    out[static_cast<size_t>(c) * rows + r] = in[static_cast<size_t>(r) * cols + c];
}

namespace checkpoint_detail {

inline bool all_finite(const float* values, size_t n) {
    constexpr uint32_t exponent = 0x7f800000;
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite &= (std::bit_cast<uint32_t>(values[i]) & exponent) != exponent;
    return finite;
}

inline void declare_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix) {
    for (const ParamTensor& p : gpt2_params(config)) file.declare(prefix + p.name, "F32", p.shape_on_disk());
}

// `values` is laid out by gpt2_params(). If must_be_finite, a NaN or infinity is an Error that names it.
inline void write_params(SafetensorsWriter& file, const GPT2Config& config, const std::string& prefix,
                         const float* values, bool must_be_finite) {
    std::vector<float> turned;
    for (const ParamTensor& p : gpt2_params(config)) {
        const float* data = values + p.offset;
        const size_t n = p.size_on_disk();
        if (must_be_finite && !all_finite(data, n))
            fail("%s%s holds NaN or infinity and is not saved: the last checkpoint stays", prefix.c_str(),
                 p.name.c_str());
        if (p.turned) {
            turned.resize(n);
            turn_matrix(data, p.rows, p.cols, turned.data());
            data = turned.data();
        }
        file.write(prefix + p.name, data, n * sizeof(float));
    }
}

inline void read_params(const SafetensorsReader& file, const GPT2Config& config, const std::string& prefix,
                        float* values) {
    std::vector<float> turned;
    for (const ParamTensor& p : gpt2_params(config)) {
        const std::string name = prefix + p.name;
        float* data = values + p.offset;
        const size_t n = p.size_on_disk();
        if (p.turned) {
            turned.resize(n);
            file.read_f32(name, p.shape_on_disk(), turned.data());
            turn_matrix(turned.data(), p.cols, p.rows, data);
        } else {
            file.read_f32(name, p.shape_on_disk(), data);
            std::fill(data + n, data + p.size(), 0.0f);
        }
        if (!all_finite(data, n))
            fail("%s: tensor %s holds NaN or infinity", file.path().c_str(), name.c_str());
    }
}

}  // namespace checkpoint_detail

// ---- The state of a run ----

// What a bit-exact resume needs beside the weights and the moments.
struct RunState {
    int64_t step = 0;      // updates done
    uint64_t seed = 0;     // --seed
    int64_t epoch = 0;     // the data loader: passes over the data completed,
    int64_t position = 0;  //   and where it is in the present one
    // The flags that change the mathematics, as text; a resume must be given the same.
    std::map<std::string, std::string> settings = {};
    // Whatever else must survive, as text; restored, not compared.
    std::map<std::string, std::string> extra = {};

    bool operator==(const RunState&) const = default;
};

inline RunState load_run_state(const std::string& folder) {
    const std::string path = folder + "/state.json";
    const nlohmann::json root = read_json_object(path);
    auto number = [&](const char* key) -> uint64_t {
        if (!root.contains(key) || !root[key].is_number_unsigned())
            fail("%s: %s must be there, and a whole number", path.c_str(), key);
        return root[key].get<uint64_t>();
    };
    auto count = [&](const char* key) {
        uint64_t value = number(key);
        if (value > INT64_MAX) fail("%s: %s is out of range", path.c_str(), key);
        return static_cast<int64_t>(value);
    };
    auto texts = [&](const char* key) {
        std::map<std::string, std::string> map;
        if (!root.contains(key) || !root[key].is_object()) fail("%s has no %s", path.c_str(), key);
        for (const auto& [name, value] : root[key].items()) {
            if (!value.is_string())
                fail("%s: %s in %s must be a string", path.c_str(), printable(name).c_str(), key);
            map[name] = value.get<std::string>();
        }
        return map;
    };
    if (number("format") != 1) fail("%s is of a format that this version does not know", path.c_str());
    RunState state;
    state.step = count("step");
    state.seed = number("seed");
    state.epoch = count("epoch");
    state.position = count("position");
    state.settings = texts("settings");
    state.extra = texts("extra");
    const int64_t named =
        step_of_folder(std::filesystem::path(folder).lexically_normal().filename().string());
    if (named >= 0 && named != state.step)
        fail("%s is of step %lld, which is not what its folder is named", path.c_str(),
             static_cast<long long>(state.step));
    return state;
}

// An Error that names every setting in which the run that is resumed from `folder` differs from `now`.
inline void check_settings(const std::string& folder, const RunState& saved,
                           const std::map<std::string, std::string>& now) {
    std::string differences;
    auto compare = [&](const std::string& name, const std::string& was, const std::string& is) {
        differences +=
            (differences.empty() ? "" : ", ") + printable(name) + " was " + printable(was) + " and is " + is;
    };
    for (const auto& [name, value] : saved.settings) {
        auto found = now.find(name);
        if (found == now.end())
            compare(name, value, "not known now");
        else if (json_text(nlohmann::json(found->second)) != json_text(nlohmann::json(value)))
            compare(name, value, "now " + printable(found->second));
    }
    for (const auto& [name, value] : now)
        if (!saved.settings.count(name)) compare(name, "not recorded", "now " + printable(value));
    if (!differences.empty())
        fail(
            "cannot resume %s with other settings (%s): give the same ones, or start a new run with another "
            "-o",
            folder.c_str(), differences.c_str());
}

// ---- Reading ----

namespace checkpoint_detail {

// Throws unless the file holds this model's tensors, in their shapes, and no others that matter. Returns what
// stands before their names. Takes names with and without "transformer."; Hugging Face's buffers (attn.bias,
// attn.masked_bias: the causal mask) are passed over.
inline std::string check_weights(const SafetensorsReader& file, const GPT2Config& config) {
    const std::string prefix = file.contains("transformer.wte.weight") ? "transformer." : "";
    std::set<std::string> known;
    for (const ParamTensor& p : gpt2_params(config)) {
        const std::string name = prefix + p.name;
        const SafeTensor& tensor = file.at(name);
        if (tensor.shape != p.shape_on_disk())
            fail("%s: tensor %s has shape %s, but the model's config.json makes it %s", tensor.file.c_str(),
                 name.c_str(), shape_text(tensor.shape).c_str(), shape_text(p.shape_on_disk()).c_str());
        if (tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16")
            fail("%s: tensor %s is of type %s, but F32, F16 or BF16 is expected", tensor.file.c_str(),
                 name.c_str(), tensor.dtype.c_str());
        known.insert(name);
    }
    for (const auto& [name, tensor] : file.tensors()) {
        if (known.count(name)) continue;
        if (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")) continue;
        if (name != "lm_head.weight")
            fail("%s has a tensor %s that a GPT-2 with %d layers does not have", tensor.file.c_str(),
                 printable(name).c_str(), config.num_layers);
        const SafeTensor& wte = file.at(prefix + "wte.weight");
        if (tensor.dtype != wte.dtype || tensor.shape != wte.shape ||
            memcmp(tensor.data, wte.data, wte.bytes) != 0)
            fail("%s: lm_head.weight is not the same as wte.weight, and this engine ties the two",
                 tensor.file.c_str());
    }
    return prefix;
}

}  // namespace checkpoint_detail

// What keeps a checkpoint from being used, or "". For a resume the optimizer must be there too.
inline std::string checkpoint_problem(const std::string& folder, bool for_resume) {
    try {
        load_run_state(folder);
        checkpoint_detail::check_weights(SafetensorsReader(folder + "/model.safetensors"),
                                         read_gpt2_config(folder));
        if (for_resume) SafetensorsReader(folder + "/optimizer.safetensors");
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

// The newest complete checkpoint in a run folder, or "". For loading weights alone, pass for_resume = false.
inline std::string latest_checkpoint(const std::string& run_folder, bool for_resume = true) {
    std::vector<int64_t> steps = checkpoint_steps(run_folder);
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
        std::string folder = run_folder + "/" + step_folder_name(*step);
        if (checkpoint_problem(folder, for_resume).empty()) return folder;
    }
    return "";
}

// For what the user names as a model: a checkpoint folder (or Hugging Face's), a run folder (its latest
// checkpoint), a .safetensors file or a .safetensors.index.json with config.json beside it.
struct ModelFiles {
    std::string folder;   // where config.json is
    std::string weights;  // for SafetensorsReader
};

inline ModelFiles find_model(const std::string& path) {
    if (is_file(path)) {
        if (!path.ends_with(".safetensors") && !path.ends_with(".safetensors.index.json"))
            fail("%s is not a .safetensors file", path.c_str());
        return {folder_of(path), path};
    }
    if (!is_folder(path)) fail("%s is neither a file nor a folder", path.c_str());
    if (is_file(path + "/config.json")) return {path, path};
    std::vector<int64_t> steps = checkpoint_steps(path);
    if (steps.empty())
        fail("%s holds no model: there is neither config.json nor a checkpoint (step_...) in it",
             path.c_str());
    std::string latest = latest_checkpoint(path, false);
    if (latest.empty())
        fail("%s has no complete checkpoint: %s", path.c_str(),
             checkpoint_problem(path + "/" + step_folder_name(steps.back()), false).c_str());
    return {latest, latest};
}

// The configuration of a model that find_model() knows. Its weights have been found to be of that size, so
// that memory for num_parameters() is not taken on the word of config.json alone.
inline GPT2Config config_for_weights(const std::string& path) {
    const ModelFiles model = find_model(path);
    const GPT2Config config = read_gpt2_config(model.folder);
    checkpoint_detail::check_weights(SafetensorsReader(model.weights), config);
    return config;
}

// Fills params, num_parameters(config) floats laid out by gpt2_params(), from a model that find_model()
// knows, in F32, F16 or BF16.
inline void load_weights(const std::string& path, const GPT2Config& config, float* params) {
    const SafetensorsReader file(find_model(path).weights);
    const std::string prefix = checkpoint_detail::check_weights(file, config);
    checkpoint_detail::read_params(file, config, prefix, params);
}

// Fills AdamW's moments from a checkpoint folder, in the layout of the parameters.
inline void load_optimizer(const std::string& folder, const GPT2Config& config, float* adam_m,
                           float* adam_v) {
    const std::string path = folder + "/optimizer.safetensors";
    if (!is_file(path))
        fail("%s cannot be resumed: it has no optimizer.safetensors, which only the newest checkpoints keep",
             folder.c_str());
    const SafetensorsReader file(path);
    if (file.tensors().size() != 2 * gpt2_params(config).size())
        fail("%s has %zu tensors where this model has %zu", path.c_str(), file.tensors().size(),
             2 * gpt2_params(config).size());
    checkpoint_detail::read_params(file, config, "exp_avg.", adam_m);
    checkpoint_detail::read_params(file, config, "exp_avg_sq.", adam_v);
}

// ---- Writing ----

// Saves a checkpoint and removes the optimizer of all but the `keep` newest up to this one. The arrays are
// float32, laid out by gpt2_params(): in bf16 training, the master weights. Without moments (nullptr) there
// is no optimizer.safetensors, for weights that are exported and not resumed.
inline void save_checkpoint(const std::string& run_folder, const GPT2Config& config, const float* params,
                            const float* adam_m, const float* adam_v, const RunState& state, int keep = 2) {
    namespace fs = std::filesystem;
    using namespace checkpoint_detail;
    std::error_code error;
    fs::create_directories(run_folder, error);
    if (error) fail("cannot create the folder %s: %s", run_folder.c_str(), error.message().c_str());
    // What a crash left behind.
    for (fs::directory_iterator it(run_folder, error), end; !error && it != end; it.increment(error))
        if (it->path().filename().string().starts_with(".tmp-step_")) {
            std::error_code ignored;
            fs::remove_all(it->path(), ignored);
        }

    assert(state.step >= 0 && keep >= 1);
    const std::string name = step_folder_name(state.step);
    const std::string temporary = run_folder + "/.tmp-" + name, target = run_folder + "/" + name;
    if (mkdir(temporary.c_str(), 0777) != 0)
        fail("cannot create the folder %s: %s", temporary.c_str(), strerror(errno));
    try {
        write_gpt2_config(temporary, config);
        {
            // Without "format" transformers refuses the file.
            SafetensorsWriter file(temporary + "/model.safetensors", {{"format", "pt"}});
            declare_params(file, config, "transformer.");
            write_params(file, config, "transformer.", params, true);
            file.finish();
        }
        if (adam_m) {
            SafetensorsWriter file(temporary + "/optimizer.safetensors");
            declare_params(file, config, "exp_avg.");
            declare_params(file, config, "exp_avg_sq.");
            write_params(file, config, "exp_avg.", adam_m, true);
            write_params(file, config, "exp_avg_sq.", adam_v, true);
            file.finish();
        }
        const nlohmann::ordered_json root = {
            {"format", 1},          {"step", state.step},         {"seed", state.seed},
            {"epoch", state.epoch}, {"position", state.position}, {"settings", state.settings},
            {"extra", state.extra}};
        write_file(temporary + "/state.json", json_text(root, 2) + "\n");
        sync_folder(temporary);
        // A checkpoint of this step that is there already is exchanged in one step where the file system can
        // (the old one is then under the temporary name). Where it cannot, the old one is moved out of the
        // way, and for that instant the one before it is the last.
        if (rename(temporary.c_str(), target.c_str()) != 0) {
            if (errno != EEXIST && errno != ENOTEMPTY)
                fail("cannot rename %s: %s", temporary.c_str(), strerror(errno));
            if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) != 0) {
                const std::string old = run_folder + "/.tmp-step_old";
                if (rename(target.c_str(), old.c_str()) != 0)
                    fail("cannot replace %s: %s", target.c_str(), strerror(errno));
                if (rename(temporary.c_str(), target.c_str()) != 0) {
                    const int reason = errno;
                    rename(old.c_str(), target.c_str());
                    fail("cannot replace %s: %s", target.c_str(), strerror(reason));
                }
                fs::remove_all(old, error);
            }
            fs::remove_all(temporary, error);
        }
    } catch (...) {
        fs::remove_all(temporary, error);  // the disk may be full: give back what we took
        throw;
    }
    sync_folder(run_folder);

    std::vector<int64_t> steps = checkpoint_steps(run_folder);
    std::erase_if(steps, [&](int64_t step) { return step > state.step; });
    for (size_t i = 0; i + keep < steps.size(); i++)
        unlink((run_folder + "/" + step_folder_name(steps[i]) + "/optimizer.safetensors").c_str());
}

// Makes a run folder ready, and returns the checkpoint to resume from, or "" for a run that starts new. A
// folder with a run in it is refused unless `resume`; with `resume`, an empty folder starts a new run.
inline std::string open_run_folder(const std::string& run_folder, bool resume) {
    std::error_code error;
    std::filesystem::create_directories(run_folder, error);
    if (error || !is_folder(run_folder))
        fail("cannot create the run folder %s: %s", run_folder.c_str(),
             error ? error.message().c_str() : "there is a file of that name");
    const std::vector<int64_t> steps = checkpoint_steps(run_folder);
    if (!resume) {
        if (!steps.empty() || is_file(run_folder + "/metrics.jsonl"))
            fail("%s holds a run already: resume it with -y, or choose another folder with -o",
                 run_folder.c_str());
        return "";
    }
    std::string latest = latest_checkpoint(run_folder);
    if (latest.empty() && !steps.empty())
        fail("%s cannot be resumed, none of its checkpoints is complete: %s", run_folder.c_str(),
             checkpoint_problem(run_folder + "/" + step_folder_name(steps.back()), true).c_str());
    return latest;
}

// ---- --debug-state ----

// One micro-step as an outsider needs it to check us. Host arrays.
struct DebugState {
    int B = 0, T = 0;
    const int32_t *x = nullptr, *y = nullptr;                     // [B, T]
    float ce = 0, reg = 0, total = 0;                             // reg is R, without lambda
    const float* logits = nullptr;                                // [B, T, logits_stride]
    int logits_stride = 0;                                        // vocab_size or padded_vocab_size
    const float *topk_mass = nullptr, *topk_threshold = nullptr;  // [L, B, NH, T]
    const float *params = nullptr, *grads = nullptr;              // laid out by gpt2_params()
    std::map<std::string, std::string> metadata = {};  // "topk", "lambda", "reg"; n_layer, n_head are added
};

inline void write_debug_state(const std::string& path, const GPT2Config& config, const DebugState& s) {
    using namespace checkpoint_detail;
    std::map<std::string, std::string> metadata = s.metadata;
    metadata["n_layer"] = std::to_string(config.num_layers);
    metadata["n_head"] = std::to_string(config.num_heads);
    const size_t positions = static_cast<size_t>(s.B) * s.T;
    const size_t rows = positions * config.num_layers * config.num_heads;
    const std::vector<int64_t> rows_shape = {config.num_layers, s.B, config.num_heads, s.T};
    SafetensorsWriter file(path, metadata);
    file.declare("x", "I32", {s.B, s.T});
    file.declare("y", "I32", {s.B, s.T});
    for (const char* name : {"loss.ce", "loss.reg", "loss.total"}) file.declare(name, "F32", {1});
    file.declare("logits", "F32", {s.B, s.T, config.vocab_size});
    file.declare("topk.mass", "F32", rows_shape);
    file.declare("topk.threshold", "F32", rows_shape);
    declare_params(file, config, "param.");
    declare_params(file, config, "grad.");
    file.write("x", s.x, positions * sizeof(int32_t));
    file.write("y", s.y, positions * sizeof(int32_t));
    file.write("loss.ce", &s.ce, sizeof(float));
    file.write("loss.reg", &s.reg, sizeof(float));
    file.write("loss.total", &s.total, sizeof(float));
    for (size_t i = 0; i < positions; i++)
        file.write("logits", s.logits + i * s.logits_stride, config.vocab_size * sizeof(float));
    file.write("topk.mass", s.topk_mass, rows * sizeof(float));
    file.write("topk.threshold", s.topk_threshold, rows * sizeof(float));
    write_params(file, config, "param.", s.params, false);
    write_params(file, config, "grad.", s.grads, false);
    file.finish();
}
