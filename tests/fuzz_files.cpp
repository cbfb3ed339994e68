// Fuzzes the files of models and of runs. The kinds are
//
//     safetensors    a model in one file and in shards, an optimizer
//     llm.c          its .bin
//     json           config.json, state.json, an index, hparams.json
//     metrics        metrics.jsonl
//
// Each goes through everything that reads it. (The TensorFlow checkpoint itself has a fuzzer of its own.)
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "../llmc/checkpoint.h"
#include "../llmc/files.h"
#include "../llmc/llmc_bin.h"
#include "../llmc/metrics.h"
#include "../llmc/weights.h"
#include "fuzz.h"

namespace {

// Pieces that such files are made of, and numbers at the edges of what is allowed.
const char* const kPieces[] = {"{",
                               "}",
                               "[",
                               "]",
                               ",",
                               ":",
                               "\"",
                               "0",
                               "-1",
                               "1e999",
                               "1.5",
                               "null",
                               "true",
                               "4294967296",
                               "9223372036854775807",
                               "9223372036854775808",
                               "18446744073709551615",
                               "99999999999999999999",
                               "\"shape\"",
                               "\"dtype\"",
                               "\"data_offsets\"",
                               "\"__metadata__\"",
                               "\"F32\"",
                               "\"BF16\"",
                               "\"I64\"",
                               "[[[[[[[[[[[[[[[[",
                               "{\"a\":{\"a\":{\"a\":{\"a\":",
                               "\"transformer.wte.weight\"",
                               "65536",
                               "16384",
                               "256",
                               "\"../x.safetensors\"",
                               "\\u0000",
                               "\xff"};

// The digits around a random place become another number: what breaks offsets and shapes without breaking
// JSON.
void change_number(std::string& bytes, Random& random) {
    size_t begin = bytes.find_first_of("0123456789", below(random, bytes.size()));
    if (begin == std::string::npos) return;
    while (begin > 0 && isdigit(static_cast<unsigned char>(bytes[begin - 1]))) begin--;
    size_t end = std::min(bytes.find_first_not_of("0123456789", begin), bytes.size());
    const uint64_t choices[] = {
        0, 1, below(random, 100), below(random, 100'000), UINT64_MAX, uint64_t{1} << below(random, 64)};
    bytes.replace(begin, end - begin, std::to_string(choices[below(random, 6)]));
}

// One to six changes to the first `reach` bytes. A header's length is put right again half of the time, so
// that what lies behind that check is reached.
std::string mutate(std::string bytes, Random& random, const std::string& name) {
    const bool is_safetensors = name.ends_with(".safetensors"), is_bin = name.ends_with(".bin");
    uint64_t header = 0;
    if (is_safetensors) memcpy(&header, bytes.data(), 8);
    const size_t size = bytes.size();
    for (size_t n = 1 + below(random, 6); n > 0; n--) {
        const size_t start = is_bin ? 8 * sizeof(int32_t) : 8 + header;  // where the numbers that matter end
        const size_t reach =
            (is_safetensors || is_bin) && random() % 8 ? std::min<size_t>(bytes.size(), start) : bytes.size();
        const size_t at = below(random, reach);
        switch (random() % 8) {
            case 0:
                replace_byte(bytes, at, random);
                break;
            case 1:
                flip_bit(bytes, at, random);
                break;
            case 2:
                bytes.resize(at);
                break;
            case 3:
                bytes.insert(at, kPieces[below(random, std::size(kPieces))]);
                break;
            case 4:
                bytes.erase(at, below(random, 40));
                break;
            case 5:
                bytes.insert(at, bytes.substr(below(random, reach), below(random, 200)));
                break;
            default:
                change_number(bytes, random);
        }
    }
    if (is_safetensors && bytes.size() >= 8 && random() % 2) {
        const int64_t grown = static_cast<int64_t>(bytes.size()) - static_cast<int64_t>(size);
        header += static_cast<uint64_t>(grown);
        memcpy(bytes.data(), &header, 8);
    }
    return bytes;
}

GPT2Config read_model(const std::string& path) {
    const GPT2Config config = config_for_weights(find_model(path));
    std::vector<float> values(num_parameters(config));
    load_weights(find_model(path), config, values.data());
    return config;
}

// As a model, and as a run that is resumed.
void read_run(const std::string& run) {
    const std::string folder = latest_checkpoint(run, false);
    read_model(run + "/step_00000007");
    const GPT2Config config = read_model(run);
    std::vector<float> m(num_parameters(config)), v(m);
    load_optimizer(folder, config, m.data(), v.data());
    load_run_state(folder);
}

struct Target {
    std::string kind, path;
    std::function<void()> read;
};

}  // namespace

int main(int argc, char** argv) {
    Fuzzer fuzzer(argc, argv, {"safetensors", "llm.c", "json", "metrics"});
    const std::string& run = fuzzer.folder();
    GPT2Config config;
    config.max_seq_len = 3;
    config.vocab_size = 5;
    config.padded_vocab_size = pad_vocab(5);
    config.num_layers = config.num_heads = 1;
    config.channels = 8;
    const std::vector<float> values(num_parameters(config), 0.5f);
    FILE* said = fopen("/dev/null", "w");
    RunState state;
    state.step = 7;
    state.settings = {{"--lambda", "0.1"}};
    std::vector<float> params = values;
    for (size_t i = config.vocab_size * 8; i < static_cast<size_t>(config.padded_vocab_size) * 8; i++)
        params[i] = 0;
    save_checkpoint(run, config, params.data(), params.data(), params.data(), state);
    const std::string step = run + "/step_00000007", sharded = run + "/sharded";
    std::filesystem::create_directories(sharded);
    std::filesystem::copy(step + "/config.json", sharded + "/config.json");
    std::filesystem::copy(step + "/model.safetensors", sharded + "/a.safetensors");
    nlohmann::json index;
    for (const ParamTensor& p : gpt2_params(config))
        index["weight_map"]["transformer." + p.name] = "a.safetensors";
    write_text(sharded + "/model.safetensors.index.json", index.dump(2));
    std::filesystem::create_directories(run + "/llmc");
    int32_t header[256] = {kLlmcModelMagic, 3, 3, 5, 1, 1, 8, 16};
    const std::vector<float> weights((16 + 3) * 8 + 12 * 64 + 13 * 8 + 2 * 8, 0.5f);
    write_text(run + "/llmc/gpt2.bin", std::string(reinterpret_cast<const char*>(header), sizeof header) +
                                           std::string(reinterpret_cast<const char*>(weights.data()),
                                                       weights.size() * sizeof(float)));
    const std::string here = __FILE__;
    std::filesystem::copy(here.substr(0, here.rfind('/')) + "/fixtures/tensorflow/gpt2", run + "/tensorflow");
    const std::map<std::string, std::string> settings = {{"updates", "9"}}, flags = {{"lambda", "0.1"}};
    const std::string first_line = line_of_settings({{"from", "tiny"}}, settings, flags),
                      young = run + "/young/metrics.jsonl";  // of a run without a checkpoint
    {
        MetricsLog log(run, first_line);
        for (int64_t i = 1; i <= 5; i++) {
            UpdateMetrics m;
            m.step = i;
            log.update(m);
            log.validation(i, 1, 1, 1);
        }
    }
    std::filesystem::create_directories(run + "/young");
    std::filesystem::copy(run + "/metrics.jsonl", young);
    const auto resume = [&] { read_run(run); };
    const auto model = [&](const char* name) { return [=] { read_model(run + name); }; };
    std::vector<Target> targets = {
        {"safetensors", step + "/model.safetensors", resume},
        {"safetensors", step + "/optimizer.safetensors", resume},
        {"safetensors", sharded + "/a.safetensors", model("/sharded")},
        {"llm.c", run + "/llmc/gpt2.bin", model("/llmc")},
        {"json", step + "/config.json", resume},
        {"json", step + "/state.json", resume},
        {"json", sharded + "/model.safetensors.index.json", model("/sharded")},
        {"json", run + "/tensorflow/hparams.json", model("/tensorflow")},
        {"metrics", run + "/metrics.jsonl",
         [&] {
             flags_of_run(run);
             MetricsLog(run, line_of_settings({}, {}, {{"lambda", "0.2"}}), 3);
         }},
        {"metrics", young, [&] { open_run_folder(run + "/young", true, settings, "tiny", said); }},
    };
    std::erase_if(targets, [&](const Target& t) { return !fuzzer.wants(t.kind); });
    std::vector<std::string> good;
    for (const Target& target : targets) {
        good.push_back(read_text(target.path));
        target.read();
    }

    fuzzer.run([&] {
        const size_t which = below(fuzzer.rng, targets.size());
        const Target& target = targets[which];
        write_text(target.path, mutate(good[which], fuzzer.rng, target.path));
        fuzzer.attempt(target.path, target.read);
        write_text(target.path, good[which]);
    });
    return fuzzer.finish();
}
