#include "checkpoint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "error.h"
#include "files.h"
#include "flags.h"
#include "json_file.h"
#include "metrics.h"
#include "safetensors.h"

// ---- The folder's names ----

std::string step_folder_name(int64_t step) {
    return format("step_%08lld", static_cast<long long>(step));
}

std::string run_folder_name(int64_t n) {
    return "run" + std::to_string(n);
}

namespace {

// The number of a folder named exactly as name_of() does, or -1: "step_12_junk" and "step_12" have none.
int64_t number_of_folder(const std::string& name, std::string (*name_of)(int64_t)) {
    const size_t digits = std::min(name.find_first_of("0123456789"), name.size());
    int64_t n = -1;
    std::from_chars(name.data() + digits, name.data() + name.size(), n);
    return n >= 0 && name == name_of(n) ? n : -1;
}

// The numbers of the folders in `folder` that have one, in ascending order.
std::vector<int64_t> numbered_folders(const std::string& folder, std::string (*name_of)(int64_t)) {
    std::vector<int64_t> numbers;
    std::error_code error;
    for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
        if (const int64_t n = number_of_folder(it->path().filename().string(), name_of);
            n >= 0 && is_folder(it->path().string()))
            numbers.push_back(n);
    std::sort(numbers.begin(), numbers.end());
    return numbers;
}

}  // namespace

int64_t step_of_folder(const std::string& name) {
    return number_of_folder(name, step_folder_name);
}

std::vector<int64_t> numbered_runs(const std::string& folder) {
    std::vector<int64_t> runs = numbered_folders(folder, run_folder_name);
    std::erase(runs, 0);
    return runs;
}

std::vector<int64_t> checkpoint_steps(const std::string& run_folder) {
    return numbered_folders(run_folder, step_folder_name);
}

// ---- The state of a run ----

RunState load_run_state(const std::string& folder) {
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

bool same_setting(const std::string& was, const std::string& is, bool old) {
    // as JSON, which has replaced what is not UTF-8 in a path
    if (json_text(nlohmann::json(was)) == json_text(nlohmann::json(is))) return true;
    std::string short_is;
    for (const std::string& part : split_list(is))
        short_is += (short_is.empty() ? "" : ",") + format("%g", std::strtof(part.c_str(), nullptr));
    return old && was == short_is;
}

void check_settings(const std::string& folder, const std::map<std::string, std::string>& saved,
                    const std::map<std::string, std::string>& now) {
    std::string differences;
    auto compare = [&](const std::string& name, const std::string& was, const std::string& is) {
        differences +=
            (differences.empty() ? "" : ", ") + printable(name) + " was " + printable(was) + " and is " + is;
    };
    const bool old = !saved.count(kDataDigest);
    for (const auto& [name, value] : saved) {
        auto found = now.find(name);
        if (found == now.end() && name == kValDigest) continue;
        if (found == now.end())
            compare(name, value, "not known now");
        else if (!same_setting(value, found->second, old))
            compare(name, value, "now " + printable(found->second));
    }
    for (const auto& [name, value] : now)
        if (!saved.count(name) && name != kDataDigest && name != kValDigest)
            compare(name, "not recorded", "now " + printable(value));
    if (!differences.empty())
        fail(
            "cannot resume %s with other settings (%s): give the same ones, or start a new run with another "
            "-o",
            folder.c_str(), differences.c_str());
}

// ---- Reading ----

std::string checkpoint_problem(const std::string& folder, bool for_resume) {
    try {
        load_run_state(folder);
        check_safetensors(SafetensorsReader(folder + "/model.safetensors"), read_gpt2_config(folder));
        if (for_resume) SafetensorsReader(folder + "/optimizer.safetensors");
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

std::string latest_checkpoint(const std::string& run_folder, bool for_resume) {
    std::vector<int64_t> steps = checkpoint_steps(run_folder);
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
        std::string folder = run_folder + "/" + step_folder_name(*step);
        if (checkpoint_problem(folder, for_resume).empty()) return folder;
    }
    return "";
}

// The same, where there are checkpoints: says to `say` where it is not the newest, and fails where it is
// none, with `problem` ("RUN has no ...").
static std::string usable_checkpoint(const std::string& run_folder, bool for_resume, const char* problem,
                                     FILE* say) {
    std::string latest = latest_checkpoint(run_folder, for_resume);
    const std::string newest = run_folder + "/" + step_folder_name(checkpoint_steps(run_folder).back());
    if (latest == newest) return latest;
    const std::string why = checkpoint_problem(newest, for_resume);
    if (latest.empty()) fail("%s %s: %s", run_folder.c_str(), problem, why.c_str());
    fprintf(say, "going on from %s, for the newest checkpoint is not complete: %s\n", latest.c_str(),
            why.c_str());
    return latest;
}

WeightFiles find_model(const std::string& path, FILE* say) {
    if (is_file(path)) return find_weights_of_file(path);
    if (!is_folder(path)) {
        if (is_file(path + ".index")) return find_weights_of_file(path + ".index");
        fail("%s is neither a file nor a folder", path.c_str());
    }
    WeightFiles found;
    if (find_weights_in_folder(path, found)) return found;
    std::vector<int64_t> steps = checkpoint_steps(path);
    const std::string archive = path + "/pytorch_model.bin";
    if (steps.empty() && is_file(archive)) fail(kPytorchArchive, archive.c_str());
    if (steps.empty())
        fail(
            "%s holds no model: no safetensors, no TensorFlow checkpoint, no llm.c .bin, no checkpoint of ours "
            "(step_...)",
            path.c_str());
    const std::string latest = usable_checkpoint(path, false, "has no complete checkpoint", say);
    return {WeightFormat::safetensors, latest + "/model.safetensors", latest};
}

void load_optimizer(const std::string& folder, const GPT2Config& config, float* adam_m, float* adam_v) {
    const std::string path = folder + "/optimizer.safetensors";
    if (!is_file(path))
        fail("%s cannot be resumed: it has no optimizer.safetensors, which only the newest checkpoints keep",
             folder.c_str());
    const SafetensorsReader file(path);
    if (file.tensors().size() != 2 * gpt2_params(config).size())
        fail("%s has %zu tensors where this model has %zu", path.c_str(), file.tensors().size(),
             2 * gpt2_params(config).size());
    read_params(file, config, "exp_avg.", adam_m);
    read_params(file, config, "exp_avg_sq.", adam_v);
}

// ---- Writing ----

void save_checkpoint(const std::string& run_folder, const GPT2Config& config, const float* params,
                     const float* adam_m, const float* adam_v, const RunState& state, int keep) {
    namespace fs = std::filesystem;
    make_folder(run_folder, "run folder");
    std::error_code error;
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
        write_model(temporary, config, params);
        SafetensorsWriter optimizer(temporary + "/optimizer.safetensors");
        declare_params(optimizer, config, "exp_avg.");
        declare_params(optimizer, config, "exp_avg_sq.");
        write_params(optimizer, config, "exp_avg.", adam_m);
        write_params(optimizer, config, "exp_avg_sq.", adam_v);
        optimizer.finish();
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
                sync_folder(run_folder);
                fs::remove_all(old, error);
            }
            sync_folder(run_folder);  // only then is the old one not needed
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

std::string open_run_folder(const std::string& run_folder, bool resume,
                            std::map<std::string, std::string> settings, const std::string& from, FILE* say) {
    make_folder(run_folder, "run folder");
    const FolderLock ours(run_folder);  // so that nothing is said, nor blamed, of what another process is at
    const std::vector<int64_t> steps = checkpoint_steps(run_folder);
    if (!resume) {
        if (!steps.empty() || is_file(run_folder + "/metrics.jsonl"))
            fail("%s holds a run already: resume it with -y, or choose another folder with -o",
                 run_folder.c_str());
        return "";
    }
    if (steps.empty()) {
        const std::string metrics = run_folder + "/metrics.jsonl";
        if (!is_file(metrics)) {
            fprintf(say, "there is no run in %s: it begins here\n", run_folder.c_str());
            return "";
        }
        auto was = settings_of_line(first_line(metrics));
        if (was.empty())
            fail("%s has no first line with the configuration of the run: remove it, to begin anew",
                 metrics.c_str());
        was["from"] = absolute_path(was["from"]);
        settings["from"] = absolute_path(from);
        check_settings(run_folder, was, settings);
        if (settings.contains("updates") && last_update(metrics) >= std::stoll(settings.at("updates")))
            fail("the run in %s is done, and has no checkpoint to go on from: choose another folder with -o",
                 run_folder.c_str());
        fprintf(say, "%s has no checkpoint to go on from: the run begins anew\n", run_folder.c_str());
        return "";
    }
    return usable_checkpoint(run_folder, true, "cannot be resumed, none of its checkpoints is complete", say);
}

// ---- --debug-state ----

void write_debug_state(const std::string& path, const GPT2Config& config, const DebugState& s) {
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
    // Tensor by tensor: a copy of all of them would not fit beside a model that just fits.
    for (const ParamTensor& p : gpt2_params(config)) write_param(file, p, "param.", s.param(p).data());
    for (const ParamTensor& p : gpt2_params(config)) write_param(file, p, "grad.", s.grad(p).data());
    file.finish();
}
