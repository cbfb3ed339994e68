// Checkpoints: bit-exact there and back, openable by Hugging Face's names and shapes, and never lost.
//
// To stop a save anywhere, this program defines write(), rename() and the like itself: calls from the code
// under test arrive here, are counted, and at the chosen one the process dies or the disk is full.
#include "../llmc/checkpoint.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "../llmc/dataloader.h"
#include "../llmc/json_file.h"
#include "../llmc/metrics.h"
#include "errors.h"
#include "temp_folder.h"

namespace fs = std::filesystem;

// ---- System calls that can be made to go wrong ----

namespace {

enum class Fault { none, kill, disk_full, one_error };

struct Faults {
    Fault fault = Fault::none;
    int at = 0;     // the call (0-based) at which it happens
    int calls = 0;  // so far
    bool no_exchange = false, no_folder_sync = false, no_locks = false;
    bool record = false;
    std::vector<std::string> log;

    void arm(Fault what, int when) {
        fault = what;
        at = when;
        calls = 0;
    }
    // True when the call that is being made has to fail.
    bool next(const char* name, const std::string& what) {
        if (record) log.push_back(std::string(name) + " " + what);
        const int call = calls++;
        if (fault == Fault::kill && call == at) _exit(42);
        const bool fails =
            (fault == Fault::disk_full && call >= at) || (fault == Fault::one_error && call == at);
        if (!fails) return false;
        errno = ENOSPC;
        return true;
    }
};

Faults faults;

std::string path_of(int fd) {
    char path[4096];
    ssize_t n = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
    return {path, static_cast<size_t>(n < 0 ? 0 : n)};
}

}  // namespace

extern "C" {
ssize_t write(int fd, const void* data, size_t n) {
    // Dies or fails with half of the bytes on the disk.
    const bool here = faults.fault != Fault::none && faults.calls == faults.at;
    if (here && n > 1) syscall(SYS_write, fd, data, n / 2);
    if (faults.next("write", faults.record ? path_of(fd) : "")) return -1;
    return syscall(SYS_write, fd, data, n);
}
int flock(int fd, int operation) noexcept {
    if (!faults.no_locks) return static_cast<int>(syscall(SYS_flock, fd, operation));
    errno = ENOLCK;
    return -1;
}
int fsync(int fd) {
    if (faults.no_folder_sync && fs::is_directory(path_of(fd))) {
        errno = EINVAL;
        return -1;
    }
    return faults.next("fsync", faults.record ? path_of(fd) : "") ? -1
                                                                  : static_cast<int>(syscall(SYS_fsync, fd));
}
int rename(const char* from, const char* to) noexcept {
    return faults.next("rename", to)
               ? -1
               : static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int renameat2(int from_fd, const char* from, int to_fd, const char* to, unsigned flags) noexcept {
    if (faults.no_exchange) {
        errno = EINVAL;
        return -1;
    }
    if (faults.next("exchange", to)) return -1;
    return static_cast<int>(syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}
int mkdir(const char* path, mode_t mode) noexcept {
    return faults.next("mkdir", path) ? -1 : static_cast<int>(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
// What fails here is never deleting: a full disk can still be deleted from.
int unlink(const char* path) noexcept {
    const Fault fault = faults.fault;
    if (fault != Fault::kill) faults.fault = Fault::none;
    faults.next("unlink", path);
    faults.fault = fault;
    return static_cast<int>(syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}
int unlinkat(int fd, const char* path, int flags) noexcept {
    const Fault fault = faults.fault;
    if (fault != Fault::kill) faults.fault = Fault::none;
    faults.next("unlink", path);
    faults.fault = fault;
    return static_cast<int>(syscall(SYS_unlinkat, fd, path, flags));
}
}

// ---- A small model ----

namespace {

const std::string kFixtures = folder_of(__FILE__) + "/fixtures";

GPT2Config small_config() {
    GPT2Config c;
    c.max_seq_len = 3;
    c.vocab_size = 5;
    c.padded_vocab_size = pad_vocab(5);
    c.num_layers = 2;
    c.num_heads = 1;
    c.channels = 8;
    return c;
}

// Any finite bits, subnormals and -0 included; zero in the padding of the vocabulary.
std::vector<float> random_values(const GPT2Config& config, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<float> values(num_parameters(config));
    for (const ParamTensor& p : gpt2_params(config))
        for (size_t i = 0; i < p.size_on_disk(); i++) do {
                values[p.offset + i] = std::bit_cast<float>(static_cast<uint32_t>(random()));
            } while (!std::isfinite(values[p.offset + i]));
    return values;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Snapshot {
    GPT2Config config = small_config();
    std::vector<float> params, m, v;
    RunState state;

    explicit Snapshot(int64_t step, uint64_t variant = 0)
        : params(random_values(config, step * 10 + variant * 100'000)),
          m(random_values(config, step * 10 + 1 + variant * 100'000)),
          v(random_values(config, step * 10 + 2 + variant * 100'000)) {
        state.step = step;
        state.seed = UINT64_MAX;
        state.epoch = 3;
        state.position = INT64_MAX;
        state.settings = {{"--lambda", "0.1"}, {"--reg", "tail"}};
        state.extra = {{"note", "caf\u00e9 \"and\" \n"}};
    }
    void save(const std::string& run, int keep = 2) const {
        save_checkpoint(run, config, params.data(), m.data(), v.data(), state, keep);
    }
    // Everything in the folder, as resuming reads it, is this.
    bool is_in(const std::string& folder) const {
        if (!(config_for_weights(find_model(folder)) == config) || !(load_run_state(folder) == state))
            return false;
        // Not zero, so that padding which is left alone shows.
        std::vector<float> p(params.size(), 7), a(params.size(), 7), b(params.size(), 7);
        load_weights(find_model(folder), config, p.data());
        load_optimizer(folder, config, a.data(), b.data());
        return same_bits(p, params) && same_bits(a, m) && same_bits(b, v);
    }
};

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

// What happens to f() in a process of its own: its exit status, or -1 when it ended otherwise.
template <class F>
int status_in_child(F f) {
    const pid_t pid = fork();
    if (pid == 0) {
        try {
            f();
        } catch (...) {
            _exit(1);
        }
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

// ---- What is in a checkpoint ----

TEST_CASE("a checkpoint reads back bit for bit, the state of the run with it") {
    TempFolder run;
    const Snapshot snapshot(123);
    snapshot.save(run.path);
    CHECK(latest_checkpoint(run.path) == run / "step_00000123");
    CHECK(snapshot.is_in(run / "step_00000123"));
    CHECK(names_in(run.path) == std::vector<std::string>{"step_00000123"});
    CHECK(names_in(run / "step_00000123") == std::vector<std::string>{"config.json", "generation_config.json",
                                                                      "model.safetensors",
                                                                      "optimizer.safetensors", "state.json"});
}

TEST_CASE("a checkpoint is what Hugging Face's GPT-2 expects") {
    TempFolder run;
    const Snapshot snapshot(1);
    snapshot.save(run.path);
    const std::string folder = run / "step_00000001";
    const nlohmann::json config = read_json_object(folder + "/config.json");
    CHECK(config["model_type"] == "gpt2");
    CHECK(config["vocab_size"] == 5);  // not the padded one
    CHECK(config["n_positions"] == 3);
    CHECK(config["eos_token_id"] == 4);
    CHECK(config["activation_function"] == "gelu_new");
    CHECK(config["architectures"] == nlohmann::json{"GPT2LMHeadModel"});
    CHECK(config["n_ctx"] == 3);
    CHECK(config["bos_token_id"] == 4);
    for (const char* name : {"resid_pdrop", "embd_pdrop", "attn_pdrop"}) CHECK(config[name] == 0.0);
    CHECK(read_json_object(folder + "/generation_config.json") ==
          nlohmann::json{{"_from_model_config", true}, {"bos_token_id", 4}, {"eos_token_id", 4}});

    const SafetensorsReader file(folder);
    CHECK(file.metadata().at("format") == "pt");
    CHECK(file.tensors().size() == 4 + 2 * 12);
    const std::map<std::string, std::vector<int64_t>> shapes = {{"wte.weight", {5, 8}},
                                                                {"wpe.weight", {3, 8}},
                                                                {"h.0.ln_1.weight", {8}},
                                                                {"h.0.attn.c_attn.weight", {8, 24}},
                                                                {"h.1.attn.c_attn.bias", {24}},
                                                                {"h.1.attn.c_proj.weight", {8, 8}},
                                                                {"h.1.mlp.c_fc.weight", {8, 32}},
                                                                {"h.1.mlp.c_proj.weight", {32, 8}},
                                                                {"ln_f.bias", {8}}};
    for (const auto& [name, shape] : shapes) {
        const SafeTensor& tensor = file.at("transformer." + name);
        CHECK(tensor.shape == shape);
        CHECK(tensor.dtype == "F32");
    }
    // Conv1D's weight is [in, out]; ours [out, in].
    std::vector<float> disk(8 * 24);
    file.read_f32("transformer.h.1.attn.c_attn.weight", {8, 24}, disk.data());
    for (const ParamTensor& p : gpt2_params(snapshot.config))
        if (p.name == "h.1.attn.c_attn.weight")
            for (int in = 0; in < 8; in++)
                for (int out = 0; out < 24; out++)
                    REQUIRE(std::bit_cast<uint32_t>(disk[in * 24 + out]) ==
                            std::bit_cast<uint32_t>(snapshot.params[p.offset + out * 8 + in]));
}

TEST_CASE("a matrix is transposed, at sizes that no block divides") {
    for (auto [rows, cols] : {std::pair{1, 1}, {1, 100}, {100, 1}, {31, 33}, {32, 32}, {65, 130}}) {
        std::vector<float> in(rows * cols), out(rows * cols, -1);
        for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i);
        transpose(in.data(), rows, cols, out.data());
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) REQUIRE(out[c * rows + r] == in[r * cols + c]);
    }
}

TEST_CASE("models written by transformers load: one file, several, by folder and by file") {
    for (const std::string name : {"/gpt2", "/gpt2/model.safetensors", "/gpt2_sharded",
                                   "/gpt2_sharded/model.safetensors.index.json"}) {
        INFO("from " << name);
        const GPT2Config config = config_for_weights(find_model(kFixtures + name));
        CHECK(config.max_seq_len == 4);
        CHECK(config.vocab_size == 5);
        CHECK(config.padded_vocab_size == 128);
        CHECK(config.num_layers == 1);
        CHECK(config.num_heads == 1);
        CHECK(config.channels == 8);
        std::vector<float> params(num_parameters(config), 7);
        load_weights(find_model(kFixtures + name), config, params.data());

        std::vector<ParamTensor> tensors = gpt2_params(config);
        std::sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) { return a.name < b.name; });
        for (size_t i = 0; i < tensors.size(); i++) {  // as make_safetensors.py filled them
            const ParamTensor& p = tensors[i];
            for (int r = 0; r < p.rows; r++)
                for (int c = 0; c < p.cols; c++) {
                    const size_t j = p.transposed ? c * p.rows + r : r * p.cols + c;
                    const float want = r < p.rows_on_disk ? (37 * i + j) % 256 / 64.0f - 2 : 0;
                    if (params[p.offset + r * p.cols + c] != want)
                        FAIL(p.name << "[" << r << "][" << c << "]");
                }
        }
    }
}

TEST_CASE("weights are found where the user points") {
    TempFolder run;
    Snapshot(1).save(run.path, 1);
    Snapshot(2).save(run.path, 1);
    const Snapshot first(1), second(2);
    std::vector<float> params(first.params.size());
    const auto loads = [&](const std::string& path, const Snapshot& snapshot) {
        load_weights(find_model(path), config_for_weights(find_model(path)), params.data());
        return same_bits(params, snapshot.params);
    };
    CHECK(loads(run.path, second));
    CHECK(loads(run.path + "/", second));
    CHECK(loads(run / "step_00000001", first));  // its optimizer is gone, its weights are not
    CHECK(loads(run / "step_00000001/model.safetensors", first));
    write_text(run / "step_00000002/model.safetensors", "cut off");
    CHECK(loads(run.path, first));
    FILE* said = tmpfile();
    find_model(run.path, said);  // which the weights are is said
    CHECK(ftell(said) > 0);
    fclose(said);

    write_text(run / "step_00000001/model.safetensors", "");
    check_mentions(error_of([&] { config_for_weights(find_model(run.path)); }), "has no complete checkpoint");
    check_mentions(error_of([&] { config_for_weights(find_model(run / "none")); }),
                   "neither a file nor a folder");
    check_mentions(error_of([&] { config_for_weights(find_model(run / "step_00000001/state.json")); }),
                   "not a model that is known here");
    TempFolder empty;
    check_mentions(error_of([&] { config_for_weights(find_model(empty.path)); }), "holds no model");
}

TEST_CASE("names with and without prefix, the causal mask's buffers, the tied head") {
    const Snapshot snapshot(1);
    const GPT2Config& config = snapshot.config;
    TempFolder folder;
    write_gpt2_config(folder.path, config);
    struct Extra {
        std::string name;
        std::vector<int64_t> shape;
        std::vector<float> values;
    };
    const auto write = [&](const std::string& prefix, const std::vector<Extra>& extras) {
        SafetensorsWriter file(folder / "model.safetensors");
        declare_params(file, config, prefix);
        for (const Extra& e : extras) file.declare(e.name, "F32", e.shape);
        write_params(file, config, prefix, snapshot.params.data());
        for (const Extra& e : extras) file.write(e.name, e.values.data(), e.values.size() * sizeof(float));
        file.finish();
    };
    const auto load = [&] {
        std::vector<float> params(snapshot.params.size(), 7);
        load_weights(find_model(folder.path), config_for_weights(find_model(folder.path)), params.data());
        CHECK(same_bits(params, snapshot.params));
    };
    std::vector<float> wte(snapshot.params.begin(), snapshot.params.begin() + 5 * 8);
    for (const std::string prefix : {"", "transformer."}) {
        write(prefix, {});
        load();
        write(prefix, {{prefix + "h.0.attn.bias", {1, 1, 2, 2}, {1, 0, 1, 1}},
                       {prefix + "h.0.attn.masked_bias", {}, {-1e4f}},
                       {"lm_head.weight", {5, 8}, wte}});
        load();
        write(prefix, {{prefix + "h.2.ln_1.weight", {1}, {1}}});
        check_mentions(error_of(load), "h.2.ln_1.weight that a GPT-2 with 2 layers does not have");
    }
    wte[7] += 1;
    write("", {{"lm_head.weight", {5, 8}, wte}});
    check_mentions(error_of(load), "lm_head.weight is not the same as wte.weight");
    wte.resize(8);
    write("", {{"lm_head.weight", {1, 8}, wte}});
    check_mentions(error_of(load), "lm_head.weight is not the same as wte.weight");
}

TEST_CASE("weights that disagree with config.json are an Error that names the tensor") {
    TempFolder run;
    Snapshot(1).save(run.path);
    const std::string folder = run / "step_00000001";
    const std::string config = read_text(folder + "/config.json");
    const auto error_with = [&](const std::string& from, const std::string& to) {
        std::string text = config;
        REQUIRE(text.find(from) != std::string::npos);
        text.replace(text.find(from), from.size(), to);
        write_text(folder + "/config.json", text);
        return error_of([&] { config_for_weights(find_model(folder)); });
    };
    CHECK(error_with("\"n_layer\": 2", "\"n_layer\": 2") == "");
    check_mentions(error_with("\"n_layer\": 2", "\"n_layer\": 3"),
                   "has no tensor transformer.h.2.ln_1.weight");
    check_mentions(error_with("\"n_layer\": 2", "\"n_layer\": 1"), "transformer.h.1.");
    check_mentions(error_with("\"vocab_size\": 5", "\"vocab_size\": 6"),
                   "wte.weight has shape [5, 8], but the model's configuration makes it [6, 8]");
    check_mentions(error_with("\"n_positions\": 3", "\"n_positions\": 4"), "wpe.weight has shape [3, 8]");
    check_mentions(error_with("\"n_embd\": 8", "\"n_embd\": 16"), "has shape");

    TempFolder whole;
    write_gpt2_config(whole.path, small_config());
    {
        SafetensorsWriter file(whole / "model.safetensors");
        for (const ParamTensor& p : gpt2_params(small_config()))
            file.declare(p.name, "I32", p.shape_on_disk());
        const std::vector<int32_t> zeros(1000);
        for (const ParamTensor& p : gpt2_params(small_config()))
            file.write(p.name, zeros.data(), p.size_on_disk() * 4);
        file.finish();
    }
    check_mentions(error_of([&] { config_for_weights(find_model(whole.path)); }),
                   "tensor wte.weight is of type I32");
}

TEST_CASE("a config.json that asks for what we do not compute is an Error that says so") {
    TempFolder folder;
    const std::string good = R"({"vocab_size": 5, "n_positions": 3, "n_embd": 8, "n_layer": 2, "n_head": 1)";
    const auto error_with = [&](const std::string& text) {
        write_text(folder / "config.json", text);
        return error_of([&] { read_gpt2_config(folder.path); });
    };
    CHECK(error_with(good + "}") == "");
    CHECK(read_gpt2_config(folder.path) == small_config());
    CHECK(error_with(good + R"(, "n_inner": null, "activation_function": "gelu_pytorch_tanh"})") == "");
    CHECK(error_with(good + R"(, "n_inner": 32, "layer_norm_epsilon": 1e-05, "model_type": "gpt2"})") == "");
    CHECK(error_with(R"({"vocab_size": 5, "n_ctx": 3, "n_embd": 8, "n_layer": 2, "n_head": 1})") == "");

    const std::pair<const char*, const char*> unknown[] = {
        {"model_type", "\"llama\""},        {"activation_function", "\"gelu\""},
        {"layer_norm_epsilon", "1e-6"},     {"n_inner", "33"},
        {"scale_attn_weights", "false"},    {"scale_attn_by_inverse_layer_idx", "true"},
        {"tie_word_embeddings", "false"},   {"add_cross_attention", "true"},
        {"model_type", "[[[\"\\u0007\"]]]"}};
    for (const auto& [key, value] : unknown) {
        const std::string message = error_with(good + ", \"" + key + "\": " + value + "}");
        check_mentions(message, std::string("config.json: ") + key + " is ");
        CHECK(message.find('\a') == std::string::npos);
    }
    for (const char* key : {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}) {
        nlohmann::json root = nlohmann::json::parse(good + "}");
        root.erase(key);
        check_mentions(error_with(root.dump()), std::string("config.json has no ") + key);
        for (const char* bad :
             {"-1", "1.5", "\"2\"", "true", "[]", "1e3", "4294967298", "18446744073709551615"}) {
            root[key] = nlohmann::json::parse(bad);
            check_mentions(error_with(root.dump()), key);
        }
    }
    for (const auto& [key, value] : {std::pair{"vocab_size", 1},
                                     {"vocab_size", 65537},
                                     {"n_positions", 0},
                                     {"n_embd", 4},
                                     {"n_layer", 0},
                                     {"n_layer", 257},
                                     {"n_head", 0},
                                     {"n_head", 3}}) {
        nlohmann::json root = nlohmann::json::parse(good + "}");
        root[key] = value;
        INFO(key << " = " << value);
        CHECK(error_with(root.dump()) != "");
    }
    check_mentions(error_with("[1]"), "must hold a JSON object");
    check_mentions(error_with(good), "not valid JSON");
    check_mentions(error_with(good + ", \"x\": 1e999}"), "out of range");
    fs::remove(folder / "config.json");
    check_mentions(error_of([&] { read_gpt2_config(folder.path); }), "config.json: No such file");
}

TEST_CASE("a state.json that we did not write is an Error") {
    TempFolder run;
    Snapshot(7).save(run.path);
    const std::string folder = run / "step_00000007";
    const nlohmann::json good = read_json_object(folder + "/state.json");
    const auto error_with = [&](const nlohmann::json& root) {
        write_text(folder + "/state.json", root.dump());
        return error_of([&] { load_run_state(folder); });
    };
    CHECK(error_with(good) == "");
    for (const auto& [key, value] : good.items()) {
        nlohmann::json root = good;
        root.erase(key);
        check_mentions(error_with(root), key);
        root[key] = -1;
        check_mentions(error_with(root), key);
        root[key] = nlohmann::json::array();
        check_mentions(error_with(root), key);
    }
    for (const char* key : {"step", "epoch", "position"}) {
        nlohmann::json root = good;
        root[key] = UINT64_MAX;
        check_mentions(error_with(root), std::string(key) + " is out of range");
    }
    nlohmann::json root = good;
    root["settings"]["--lambda"] = 0.1;
    check_mentions(error_with(root), "--lambda in settings must be a string");
    root = good;
    root["format"] = 2;
    check_mentions(error_with(root), "does not know");
    root = good;
    root["step"] = 8;
    check_mentions(error_with(root), "not what its folder is named");
}

// ---- The run folder ----

TEST_CASE("only folders named exactly like checkpoints are checkpoints") {
    CHECK(step_folder_name(123) == "step_00000123");
    CHECK(step_of_folder("step_00000123") == 123);
    CHECK(step_of_folder("step_123456789") == 123456789);
    for (const char* name : {"step_", "step_123", "step_00000123_junk", "step_000000123", "step_-0000123",
                             "step_+0000123", "step_ 0000123", "step_0000012x", ".tmp-step_00000123",
                             "step_99999999999999999999", "Step_00000123"})
        CHECK(step_of_folder(name) == -1);

    TempFolder run;
    CHECK(latest_checkpoint(run.path) == "");
    CHECK(latest_checkpoint(run / "none") == "");
    Snapshot(5).save(run.path);
    for (const char* name : {"step_00000009_junk", "step_9", ".tmp-step_00000009x"})
        fs::copy(run / "step_00000005", run / name);
    write_text(run / "step_00000010", "a file");
    CHECK(latest_checkpoint(run.path) == run / "step_00000005");
}

TEST_CASE("a checkpoint that lost something is passed over") {
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"}) {
        INFO("without " << name);
        TempFolder run;
        Snapshot(1).save(run.path);
        Snapshot(2).save(run.path);
        const std::string file = run / "step_00000002/" + name, bytes = read_text(file);
        CHECK(latest_checkpoint(run.path) == run / "step_00000002");
        write_text(file, bytes.substr(0, bytes.size() - 3));
        CHECK(latest_checkpoint(run.path) == run / "step_00000001");
        fs::remove(file);
        CHECK(latest_checkpoint(run.path) == run / "step_00000001");
        Snapshot(2).save(run.path);  // and is replaced when the run comes there again
        CHECK(latest_checkpoint(run.path) == run / "step_00000002");
        CHECK(Snapshot(2).is_in(run / "step_00000002"));
    }
}

TEST_CASE("the newest checkpoints keep their optimizer, the others their weights") {
    TempFolder run;
    for (int64_t step : {10, 20, 30, 40}) Snapshot(step).save(run.path, 2);
    CHECK(!is_file(run / "step_00000010/optimizer.safetensors"));
    CHECK(!is_file(run / "step_00000020/optimizer.safetensors"));
    CHECK(Snapshot(30).is_in(run / "step_00000030"));
    CHECK(Snapshot(40).is_in(run / "step_00000040"));
    std::vector<float> values(Snapshot(10).params.size()), other(values);
    load_weights(find_model(run / "step_00000010"), small_config(), values.data());
    CHECK(same_bits(values, Snapshot(10).params));
    check_mentions(
        error_of([&] { load_optimizer(run / "step_00000010", small_config(), values.data(), other.data()); }),
        "step_00000010 cannot be resumed: it has no optimizer.safetensors");
    // A later checkpoint that could not be used is not counted among the newest.
    fs::resize_file(run / "step_00000040/model.safetensors", 100);
    Snapshot(35).save(run.path, 1);
    CHECK(latest_checkpoint(run.path) == run / "step_00000035");
    CHECK(Snapshot(35).is_in(run / "step_00000035"));
    CHECK(!is_file(run / "step_00000030/optimizer.safetensors"));
}

TEST_CASE("an optimizer of another model is an Error that names the tensor") {
    TempFolder run;
    const Snapshot snapshot(1);
    snapshot.save(run.path);
    GPT2Config other = snapshot.config;
    other.channels = 16;
    std::vector<float> m(num_parameters(other)), v(m);
    check_mentions(error_of([&] { load_optimizer(run / "step_00000001", other, m.data(), v.data()); }),
                   "tensor exp_avg.wte.weight has shape [5, 8], but [5, 16] is expected");
    other.num_layers = 3;
    check_mentions(error_of([&] { load_optimizer(run / "step_00000001", other, m.data(), v.data()); }),
                   "has 56 tensors where this model has 80");
}

TEST_CASE("a resume with other settings names each one that differs") {
    RunState saved;
    saved.settings = {{"--lambda", "0.1"}, {"--lr", "3e-4"}, {"--reg", "tail"}, {"--old", "1"}};
    CHECK(error_of([&] { check_settings("run/step_00000001", saved.settings, saved.settings); }) == "");
    const std::string message = error_of([&] {
        check_settings("run/step_00000001", saved.settings,
                       {{"--lambda", "0.2"}, {"--lr", "3e-4"}, {"--reg", "kl"}, {"--new", "2"}});
    });
    for (const char* fragment :
         {"run/step_00000001", "--lambda was 0.1 and is now 0.2", "--reg was tail and is now kl",
          "--old was 1 and is not known now", "--new was not recorded and is now 2", "-o"})
        check_mentions(message, fragment);
    CHECK(message.find("--lr") == std::string::npos);
    // What runs did not always record is compared where they did.
    std::map<std::string, std::string> now = saved.settings;
    now["data-digest"] = "1";
    CHECK(error_of([&] { check_settings("run", saved.settings, now); }) == "");
    now["--lr"] = "0.333333343,2";  // and numbers have more digits now
    saved.settings["--lr"] = "0.333333,2";
    CHECK(error_of([&] { check_settings("run", saved.settings, now); }) == "");
    saved.settings["data-digest"] = "1";  // a run of today recorded them all
    check_mentions(error_of([&] { check_settings("run", saved.settings, now); }),
                   "--lr was 0.333333,2 and is now 0.333333343,2");
    saved.settings["--lr"] = now["--lr"];
    saved.settings["data-digest"] = "2";
    check_mentions(error_of([&] { check_settings("run", saved.settings, now); }),
                   "data-digest was 2 and is now 1");
}

TEST_CASE("a setting that is not UTF-8 (a path, say) survives a resume") {
    TempFolder run;
    Snapshot snapshot(1);
    snapshot.state.settings["-i"] = "/data/\xff\xfe*.bin";
    snapshot.save(run.path);
    const std::string folder = latest_checkpoint(run.path);
    CHECK(folder == run / "step_00000001");
    CHECK(error_of([&] {
              check_settings(folder, load_run_state(folder).settings, snapshot.state.settings);
          }) == "");
}

TEST_CASE("a model with NaN or infinity is neither saved nor loaded") {
    TempFolder run;
    Snapshot(1).save(run.path);
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
        for (std::vector<float> Snapshot::*which : {&Snapshot::params, &Snapshot::m, &Snapshot::v}) {
            Snapshot snapshot(2);
            (snapshot.*which)[snapshot.params.size() - 1] = bad;
            check_mentions(error_of([&] { snapshot.save(run.path); }), "ln_f.bias holds NaN or infinity");
            CHECK(names_in(run.path) == std::vector<std::string>{"step_00000001"});
        }
    }
    CHECK(Snapshot(1).is_in(latest_checkpoint(run.path)));

    const std::string path = run / "step_00000001/model.safetensors";
    std::string bytes = read_text(path);
    const float nan = NAN;
    memcpy(bytes.data() + bytes.size() - 4, &nan, 4);
    write_text(path, bytes);
    std::vector<float> params(Snapshot(1).params.size());
    check_mentions(error_of([&] { load_weights(find_model(run.path), small_config(), params.data()); }),
                   "tensor ln_f.bias holds NaN or infinity");
}

TEST_CASE("the first line of metrics.jsonl holds settings and flags, whatever is in them") {
    TempFolder folder;
    const std::map<std::string, std::string> settings = {{"lr", "1"}},
                                             flags = {{"train-data", "a \"b\"\n,c"}, {"overfit", ""}};
    CHECK(flags_of_run(folder / "nothing").empty());
    const std::string line = line_of_settings({{"from", "tiny"}}, settings, flags);
    write_text(folder / "metrics.jsonl", line + "\n{\"step\":1}\n");
    CHECK(flags_of_run(folder.path) == flags);
    CHECK(settings_of_line(parse_json(line)) ==
          std::map<std::string, std::string>{{"from", "tiny"}, {"lr", "1"}});
    write_text(folder / "metrics.jsonl", "{\"settings\":{\"lr\":\"1\"}}\n");  // of an older version
    CHECK(flags_of_run(folder.path).empty());
    write_text(folder / "metrics.jsonl", "{\"settings\"");
    CHECK(flags_of_run(folder.path).empty());  // what is wrong, the rest of the start says
}

TEST_CASE("a validation that one of two runs has not does not tell them apart, and other data does") {
    std::map<std::string, std::string> with = {{"lr", "1"}, {kValDigest, "a"}}, without = {{"lr", "1"}};
    CHECK(error_of([&] { check_settings("run", with, without); }) == "");
    CHECK(error_of([&] { check_settings("run", without, with); }) == "");
    check_mentions(error_of([&] {
                       check_settings("run", with, {{"lr", "1"}, {kValDigest, "b"}});
                   }),
                   "val-digest was a and is now b");
}

TEST_CASE("a new run does not start in another's folder") {
    TempFolder folder;
    const std::string run = folder / "a/b";
    std::map<std::string, std::string> settings = {{"lr", "1"}};
    FILE* said = tmpfile();
    const auto open_run = [&](bool resume) { return open_run_folder(run, resume, settings, "tiny", said); };
    CHECK(open_run(false) == "");
    CHECK(is_folder(run));
    CHECK(ftell(said) == 0);
    CHECK(open_run(true) == "");  // nothing there: a new run, and says so
    CHECK(ftell(said) > 0);
    const long begun = ftell(said);
    write_text(run + "/metrics.jsonl", "{\"from\":\"tiny\",\"settings\":{\"lr\":\"1\"}}\n{\"step\":1}\n");
    check_mentions(error_of([&] { open_run(false); }), "resume it with -y, or choose another folder with -o");
    CHECK(open_run(true) == "");  // stopped before its first checkpoint: it starts again, and says so
    settings["updates"] = "2";
    const std::string done =
        "{\"from\":\"tiny\",\"settings\":{\"lr\":\"1\",\"updates\":\"2\"}}\n{\"step\":2,\"loss\":1}\n";
    write_text(run + "/metrics.jsonl", done + "{\"step\":3,\"loss\":");  // killed as it was writing
    check_mentions(error_of([&] { open_run(true); }), "is done, and has no checkpoint");
    settings.erase("updates");
    write_text(run + "/metrics.jsonl", "{\"from\":\"tiny\",\"settings\":{\"lr\":\"1\"}}\n{\"step\":1}\n");
    CHECK(ftell(said) > begun);
    CHECK(error_of([&] { open_run_folder(run, true, settings, "d6", said); }) != "");
    settings["lr"] = "2";  // but it does not take the place of another run
    check_mentions(error_of([&] { open_run(true); }), "lr was 1 and is now 2");
    write_text(run + "/metrics.jsonl", "{}\n");
    check_mentions(error_of([&] { open_run(true); }), "no first line with the configuration");
    fs::remove(run + "/metrics.jsonl");
    Snapshot(4).save(run);
    Snapshot(6).save(run);
    check_mentions(error_of([&] { open_run(false); }), "resume it with -y");
    long before = ftell(said);
    CHECK(open_run(true) == run + "/step_00000006");
    CHECK(ftell(said) == before);
    fs::resize_file(run + "/step_00000006/model.safetensors", 9);
    CHECK(open_run(true) == run + "/step_00000004");  // the one before it, and says so
    CHECK(ftell(said) > before);
    fs::resize_file(run + "/step_00000004/model.safetensors", 9);
    check_mentions(error_of([&] { open_run(true); }), "none of its checkpoints is complete");
    fclose(said);
    write_text(folder / "file", "");
    CHECK(error_of([&] { open_run_folder(folder / "file", false, settings, ""); }) != "");
    CHECK(error_of([&] { open_run_folder(folder / "file/run", false, settings, ""); }) != "");
}

TEST_CASE("runs are numbered; gaps and other names do not count") {
    TempFolder folder;
    CHECK(numbered_runs(folder / "none").empty());
    for (const char* name : {"run3", "run10", "run1", "run02", "run", "run5x", "run-4", "runs", "run0"})
        fs::create_directory(folder / name);
    write_text(folder / "run7", "a file");
    CHECK(numbered_runs(folder.path) == std::vector<int64_t>{1, 3, 10});
    CHECK(run_folder_name(10) == "run10");
}

TEST_CASE("a file is written behind a link; what is no file is written to") {
    TempFolder folder;
    write_file(folder / "real", "old");
    fs::create_symlink("real", folder / "link");
    write_file(folder / "link", "new");
    CHECK(fs::is_symlink(folder / "link"));
    CHECK(read_text(folder / "real") == "new");
    REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
    const int reader = open((folder / "pipe").c_str(), O_RDONLY | O_NONBLOCK);
    write_file(folder / "pipe", "through");
    char text[16] = {};
    CHECK(read(reader, text, sizeof text) == 7);
    CHECK(text == std::string("through"));
    close(reader);
    CHECK(fs::is_fifo(folder / "pipe"));
    check_mentions(error_of([&] { write_file(folder.path, ""); }), "there is a folder of that name");
    check_mentions(error_of([&] { output_target(folder / "nowhere/x"); }), "cannot create");
    fs::create_symlink("none", folder / "dangling");
    check_mentions(error_of([&] { write_file(folder / "dangling", ""); }), "is a link to nothing");
    fs::remove(folder / "dangling");
    // what the program prints to is no place for a file of its own
    const int status = status_in_child([&] {
        dup2(open((folder / "real").c_str(), O_WRONLY), STDOUT_FILENO);
        const std::string message = error_of([&] { output_target("/dev/stdout"); });
        _exit(message.find("is the file that the output goes to") == std::string::npos);
    });
    CHECK(status == 0);
    CHECK(names_in(folder.path) == std::vector<std::string>{"link", "pipe", "real"});
}

// ---- Crashes and full disks ----

namespace {

// The sanitizer makes a fork take many times as long, and looks for what would be wrong at any of the calls.
#ifdef __SANITIZE_ADDRESS__
constexpr int kEvery = 7;
#else
constexpr int kEvery = 1;
#endif

// Saves `next` over and over in a run that holds steps 1 and `last`, with a fault at each system call in turn
// (each kEvery-th), and calls check(run, status of the process) after each. Returns the number of faults.
template <class Check>
int save_with_faults(Fault fault, const Snapshot& last, const Snapshot& next, bool no_exchange, Check check) {
    TempFolder before;
    Snapshot(1).save(before.path);
    last.save(before.path);
    for (int at = 0;; at += kEvery) {
        TempFolder run;
        fs::copy(before.path, run.path, fs::copy_options::recursive);
        const int status = status_in_child([&] {
            faults.no_exchange = no_exchange;
            faults.arm(fault, at);
            next.save(run.path);
            if (faults.calls <= at) _exit(2);  // it was not reached
        });
        if (status == 2) {
            CHECK(next.is_in(latest_checkpoint(run.path)));
            return at / kEvery;
        }
        INFO("at system call " << at << ", status " << status);
        check(run.path, status);
        // Life goes on: the next save succeeds and leaves no trace of what happened.
        next.save(run.path);
        CHECK(next.is_in(latest_checkpoint(run.path)));
        for (const std::string& name : names_in(run.path)) CHECK(step_of_folder(name) >= 0);
    }
}

bool holds_one_of(const std::string& run, const Snapshot& a, const Snapshot& b) {
    const std::string latest = latest_checkpoint(run);
    return !latest.empty() && (a.is_in(latest) || b.is_in(latest));
}

}  // namespace

TEST_CASE("killed at any system call of a save, the last good checkpoint is there") {
    const Snapshot last(2), next(3);
    const int tried =
        save_with_faults(Fault::kill, last, next, false, [&](const std::string& run, int status) {
            CHECK(status == 42);
            CHECK(holds_one_of(run, last, next));
        });
    // 28 parameters and twice as many moments, headers, five files: the faults were really in the way.
    CHECK(tried > 84 / kEvery);
}

TEST_CASE("killed while a checkpoint of the same step is replaced, one of the two is there") {
    const Snapshot last(2), next(2, 1);
    REQUIRE(!same_bits(last.params, next.params));
    save_with_faults(Fault::kill, last, next, false, [&](const std::string& run, int status) {
        CHECK(status == 42);
        CHECK(holds_one_of(run, last, next));
    });
}

TEST_CASE("where a file system cannot exchange two folders, a checkpoint is replaced all the same") {
    const Snapshot last(2), next(2, 1);
    save_with_faults(Fault::kill, last, next, true, [&](const std::string& run, int status) {
        CHECK(status == 42);
        // Between two renames there is neither; the checkpoint before it is there.
        CHECK((holds_one_of(run, last, next) || Snapshot(1).is_in(latest_checkpoint(run))));
    });
}

TEST_CASE("a disk that fills up at any system call is an Error, and the last good checkpoint is there") {
    const Snapshot last(2), next(3);
    int errors = 0;
    const int tried =
        save_with_faults(Fault::disk_full, last, next, false, [&](const std::string& run, int status) {
            CHECK((status == 1 || status == 0));  // 0: only the clearing up at the end was left
            errors += status == 1;
            CHECK(holds_one_of(run, last, next));
            for (const std::string& name : names_in(run)) CHECK(step_of_folder(name) >= 0);
        });
    CHECK(errors > 84 / kEvery);
    CHECK(errors >= tried - 4);
}

TEST_CASE("where a file system has no locks and syncs no folders, runs are saved all the same") {
    TempFolder run;
    faults.no_folder_sync = faults.no_locks = true;
    CHECK(error_of([&] { MetricsLog(run.path, "{}"); }) == "");
    CHECK(error_of([&] { Snapshot(1).save(run / "new"); }) == "");
    faults = {};
    CHECK(Snapshot(1).is_in(latest_checkpoint(run / "new")));
}

TEST_CASE("one system call that fails while a checkpoint is replaced costs neither") {
    const Snapshot last(2), next(2, 1);
    for (bool no_exchange : {false, true})
        save_with_faults(Fault::one_error, last, next, no_exchange, [&](const std::string& run, int status) {
            CHECK((status == 1 || status == 0));
            CHECK(holds_one_of(run, last, next));
        });
}

TEST_CASE("a full disk is named with its file") {
    TempFolder run;
    Snapshot(1).save(run.path);
    signal(SIGXFSZ, SIG_IGN);
    rlimit before, limit;
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 3000;
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const std::string message = error_of([&] { Snapshot(2).save(run.path); });
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
    check_mentions(message,
                   "cannot write " + (run / ".tmp-step_00000002/model.safetensors") + ": File too large");
    CHECK(names_in(run.path) == std::vector<std::string>{"step_00000001"});
    CHECK(Snapshot(1).is_in(latest_checkpoint(run.path)));
}

TEST_CASE("everything is on the disk before it gets its name") {
    TempFolder run;
    faults = {};
    faults.record = true;
    Snapshot(1).save(run.path);
    faults.record = false;
    const std::string folder = fs::canonical(run.path), temporary = folder + "/.tmp-step_00000001";
    const auto find_last = [&](const std::string& entry) {  // a temporary name is one whatever its end
        for (size_t i = faults.log.size(); i-- > 0;)
            if (faults.log[i] == entry || (entry.ends_with(".tmp-") && faults.log[i].starts_with(entry)))
                return static_cast<long>(i);
        return -1L;
    };
    const long named = find_last("rename " + run.path + "/step_00000001");
    REQUIRE(named > 0);
    for (const char* name : {"config.json", "generation_config.json", "model.safetensors",
                             "optimizer.safetensors", "state.json"}) {
        INFO(name);
        const std::string file = temporary + "/" + name;
        const long written = find_last("write " + file + ".tmp-"),
                   synced = find_last("fsync " + file + ".tmp-");
        CHECK(written > 0);
        CHECK(written < synced);
        CHECK(synced < named);
        CHECK(find_last("rename " + run.path + "/.tmp-step_00000001/" + name) <
              find_last("fsync " + temporary));
    }
    CHECK(find_last("fsync " + temporary) < named);
    CHECK(find_last("fsync " + folder) > named);

    // the same step once more: the old one is there until the new one's name is on the disk
    faults.log.clear();
    faults.record = true;
    Snapshot(1).save(run.path);
    faults.record = false;
    const long exchanged = find_last("exchange " + run.path + "/step_00000001");
    REQUIRE(exchanged > 0);
    const auto first_after = [&](const char* beginning) {
        for (size_t i = exchanged + 1; i < faults.log.size(); i++)
            if (faults.log[i].starts_with(beginning)) return static_cast<long>(i);
        return -1L;
    };
    CHECK(first_after("fsync") > 0);
    CHECK(first_after("fsync") < first_after("unlink"));
    CHECK(faults.log[first_after("fsync")] == "fsync " + folder);

    // also where the two cannot be exchanged
    faults.log.clear();
    faults.record = faults.no_exchange = true;
    Snapshot(1).save(run.path);
    faults.record = faults.no_exchange = false;
    const long replaced = find_last("rename " + run.path + "/step_00000001");
    long synced = replaced;
    while (faults.log[synced] != "fsync " + folder) REQUIRE(++synced < static_cast<long>(faults.log.size()));
    for (long i = replaced; i < synced; i++) CHECK(!faults.log[i].starts_with("unlink"));

    // the metrics, before a checkpoint that is behind them; a shard and its name; a model that is exported
    faults.log.clear();
    faults.record = true;
    MetricsLog log(run.path, "{}");
    log.update({});
    log.sync();
    CHECK(find_last("fsync " + folder + "/metrics.jsonl") > find_last("write " + folder + "/metrics.jsonl"));
    ShardWriter shard(run / "a.bin", 1, 257);
    shard.append(std::vector<uint16_t>{1});
    shard.finish();
    const Snapshot model(1);
    export_model(run / "out", model.config, model.params.data(), "");
    faults.record = false;
    const long exported = find_last("rename " + run.path + "/out");
    CHECK(faults.log.at(exported + 1) == "fsync " + folder);
    const std::string& synced_last = faults.log[exported - 1];
    CHECK(synced_last.starts_with("fsync " + folder + "/out.tmp-"));
    CHECK(synced_last.rfind('/') == std::string("fsync " + folder).size());
    CHECK(find_last("fsync " + folder) > find_last("rename " + run.path + "/a.bin"));

    // a run folder and those that it is in: each one's name, too
    faults.log.clear();
    faults.record = true;
    Snapshot(1).save(run / "other/one");
    faults.record = false;
    for (const char* made : {"", "/other"}) CHECK(find_last("fsync " + folder + made) > 0);
}

// ---- --debug-state ----

TEST_CASE("the debug state has every tensor under its public name, without padding") {
    TempFolder folder;
    const GPT2Config config = small_config();
    const int B = 2, T = 3, V = config.vocab_size, Vp = config.padded_vocab_size;
    const std::vector<int32_t> x = {0, 1, 2, 3, 4, 0}, y = {1, 2, 3, 4, 0, 1};
    std::vector<float> logits(B * T * Vp), mass(2 * B * 1 * T), threshold(mass.size());
    for (size_t i = 0; i < logits.size(); i++) logits[i] = static_cast<float>(i);
    for (size_t i = 0; i < mass.size(); i++) mass[i] = static_cast<float>(i) / 16;
    threshold[3] = -INFINITY;
    const std::vector<float> params = random_values(config, 1), grads = random_values(config, 2);
    DebugState state;
    state.B = B;
    state.T = T;
    state.x = x.data();
    state.y = y.data();
    state.ce = 1.5f;
    state.reg = 0.25f;
    state.total = 1.75f;
    state.logits = logits.data();
    state.logits_stride = Vp;
    state.topk_mass = mass.data();
    state.topk_threshold = threshold.data();
    const auto tensor_of = [](const std::vector<float>& all) {
        return [&all](const ParamTensor& p) {
            return std::vector<float>(all.begin() + p.offset, all.begin() + p.offset + p.size());
        };
    };
    state.param = tensor_of(params);
    state.grad = tensor_of(grads);
    state.metadata = {{"topk", "8"}, {"lambda", "1"}, {"reg", "tail"}};
    write_debug_state(folder / "debug.safetensors", config, state);

    const SafetensorsReader file(folder / "debug.safetensors");
    CHECK(file.metadata() ==
          std::map<std::string, std::string>{
              {"n_layer", "2"}, {"n_head", "1"}, {"topk", "8"}, {"lambda", "1"}, {"reg", "tail"}});
    CHECK(file.tensors().size() == 8 + 2 * 28);
    CHECK(file.at("x").dtype == "I32");
    CHECK(file.at("x").shape == std::vector<int64_t>{B, T});
    CHECK(memcmp(file.at("y").data, y.data(), 24) == 0);
    float total = 0;
    file.read_f32("loss.total", {1}, &total);
    CHECK(total == 1.75f);
    std::vector<float> read(B * T * V);
    file.read_f32("logits", {B, T, V}, read.data());
    for (int i = 0; i < B * T; i++)
        for (int v = 0; v < V; v++) REQUIRE(read[i * V + v] == logits[i * Vp + v]);
    read.resize(mass.size());
    file.read_f32("topk.mass", {2, B, 1, T}, read.data());
    CHECK(same_bits(read, mass));
    file.read_f32("topk.threshold", {2, B, 1, T}, read.data());
    CHECK(same_bits(read, threshold));
    for (const auto& [prefix, values] :
         {std::pair{std::string("param."), &params}, {std::string("grad."), &grads}})
        for (const ParamTensor& p : gpt2_params(config)) {
            read.resize(p.size_on_disk());
            file.read_f32(prefix + p.name, p.shape_on_disk(), read.data());
            for (int r = 0; r < p.rows_on_disk; r++)
                for (int c = 0; c < p.cols; c++)
                    REQUIRE(read[p.transposed ? c * p.rows + r : r * p.cols + c] ==
                            (*values)[p.offset + r * p.cols + c]);
        }
}
