// Weights as people have them: every format gives the same numbers, a name says what it is by its content,
// and what is exported is what was read.
#include "../llmc/llmc_bin.h"
#include "../llmc/weights.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../llmc/checkpoint.h"
#include "../llmc/tokenizer.h"
#include "errors.h"
#include "temp_folder.h"

namespace fs = std::filesystem;

namespace {

const std::string kFixtures = std::string(__FILE__).substr(0, std::string(__FILE__).rfind('/')) + "/fixtures";

// The values that the scripts in fixtures/ give: element j, as on Hugging Face's disk, of the i-th tensor in
// alphabetical order.
std::vector<float> fixture_values(const GPT2Config& config) {
    std::vector<float> values(num_parameters(config), 0.0f);
    std::vector<ParamTensor> tensors = gpt2_params(config);
    std::sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) { return a.name < b.name; });
    for (size_t i = 0; i < tensors.size(); i++) {
        const ParamTensor& p = tensors[i];
        for (size_t r = 0; r < (size_t)p.rows_on_disk; r++)
            for (size_t c = 0; c < (size_t)p.cols; c++) {
                const size_t j = p.transposed ? c * p.rows + r : r * p.cols + c;
                values[p.offset + r * p.cols + c] = (float)((37 * i + j) % 256) / 64.0f - 2;
            }
    }
    return values;
}

struct Loaded {
    WeightFiles files;
    GPT2Config config;
    std::vector<float> params;
};

Loaded load(const std::string& path) {
    Loaded model{find_model(path), {}, {}};
    model.config = config_for_weights(model.files);
    model.params.assign(num_parameters(model.config), NAN);
    load_weights(model.files, model.config, model.params.data());
    return model;
}

void gunzip(const std::string& from, const std::string& to) {
    REQUIRE(std::system(("gunzip -c '" + from + "' > '" + to + "'").c_str()) == 0);
}

// A small llm.c file, written here so that it can be damaged.
struct LlmcFile {
    int32_t header[256] = {kLlmcModelMagic, 3, 4, 5, 2, 1, 8, 128};
    std::vector<float> values;

    LlmcFile() : values(128 * 8 + 4 * 8 + 2 * (12 * 64 + 13 * 8) + 2 * 8) {
        for (size_t i = 0; i < values.size(); i++) values[i] = (float)i;
    }
    std::string bytes() const {
        return std::string((const char*)header, sizeof header) +
               std::string((const char*)values.data(), values.size() * sizeof(float));
    }
};

}  // namespace

TEST_CASE("the fixtures of transformers, TensorFlow and llm.c load to the same numbers") {
    TempFolder folder;
    gunzip(kFixtures + "/llmc/gpt2.bin.gz", folder / "gpt2.bin");
    gunzip(kFixtures + "/llmc/gpt2_bf16.bin.gz", folder / "gpt2_bf16.bin");
    for (const std::string& path :
         {kFixtures + "/gpt2", kFixtures + "/gpt2_sharded", kFixtures + "/tensorflow/gpt2",
          folder / "gpt2.bin", folder / "gpt2_bf16.bin"}) {
        INFO("from " << path);
        const Loaded model = load(path);
        CHECK(model.config.num_layers == 1);
        CHECK(model.config.num_heads == 1);
        CHECK(model.config.channels == 8);
        CHECK(model.config.max_seq_len == 4);
        CHECK(model.config.vocab_size == (path.ends_with(".bin") ? 50257 : 5));
        CHECK(model.config.padded_vocab_size == (path.ends_with(".bin") ? 50304 : 128));
        CHECK(model.params == fixture_values(model.config));
    }
}

TEST_CASE("a model is known by its content, whatever it is called and whichever of its files is named") {
    TempFolder folder;
    gunzip(kFixtures + "/llmc/gpt2_bf16.bin.gz", folder / "weights");
    CHECK(find_model(folder / "weights").format == WeightFormat::llmc_bin);
    fs::copy_file(kFixtures + "/gpt2/model.safetensors", folder / "other.bin");
    CHECK(find_model(folder / "other.bin").format == WeightFormat::safetensors);

    const std::string tf = kFixtures + "/tensorflow/gpt2";
    for (const char* name : {"", "/", "/checkpoint", "/model.ckpt", "/model.ckpt.index",
                             "/model.ckpt.data-00000-of-00001", "/hparams.json"}) {
        INFO("from " << tf << name);
        const WeightFiles found = find_model(tf + name);
        CHECK(found.format == WeightFormat::tensorflow);
        CHECK(config_for_weights(found).channels == 8);
    }
    CHECK(find_model(kFixtures + "/gpt2/config.json").format == WeightFormat::safetensors);
    fs::copy_file(tf + "/model.ckpt.index", folder / "m.ckpt.index");
    write_text(folder / "m.ckpt.meta", "a graph");
    CHECK(find_model(folder / "m.ckpt.meta").path == folder / "m.ckpt");
    fs::rename(folder / "m.ckpt.index", folder / "renamed");
    check_mentions(error_of([&] { find_model(folder / "renamed"); }), "must be named NAME.index");

    // what is not a model says what it is
    int32_t shard[256] = {20240520, 1, 0};
    write_text(folder / "tokens.bin", std::string((const char*)shard, sizeof shard));
    check_mentions(error_of([&] { find_model(folder / "tokens.bin"); }), "is a token shard, not a model");
    write_text(folder / "pytorch_model.bin", std::string("PK\3\4") + "data.pkl");
    check_mentions(error_of([&] { find_model(folder / "pytorch_model.bin"); }),
                   "save the model as safetensors");
    write_text(folder / "notes.txt", "some text");
    check_mentions(error_of([&] { find_model(folder / "notes.txt"); }), "not a model that is known here");
    write_text(folder / "empty", "");
    check_mentions(error_of([&] { find_model(folder / "empty"); }), "not a model that is known here");
}

TEST_CASE("of several llm.c files in a folder the newest finished one is meant, or the only one") {
    TempFolder folder;
    LlmcFile file;
    const auto bin = [&](const std::string& name) { write_text(folder / name, file.bytes()); };
    bin("gpt2.bin");
    CHECK(find_model(folder.path).path == folder / "gpt2.bin");
    bin("gpt2_bf16.bin");
    check_mentions(error_of([&] { find_model(folder.path); }), "holds several llm.c models");
    bin("model_00000100.bin");
    bin("model_00000200.bin");
    CHECK(find_model(folder.path).path == folder / "model_00000200.bin");
    write_text(folder / "DONE_00000100", "");
    CHECK(find_model(folder.path).path == folder / "model_00000100.bin");
}

TEST_CASE("llm.c's file: the layout, the padding, and what is wrong with it") {
    TempFolder folder;
    const std::string path = folder / "gpt2.bin";
    LlmcFile file;
    write_text(path, file.bytes());
    const Loaded model = load(path);
    CHECK(model.config == GPT2Config{.max_seq_len = 4,
                                     .vocab_size = 5,
                                     .padded_vocab_size = 128,
                                     .num_layers = 2,
                                     .num_heads = 1,
                                     .channels = 8});
    // wte's rows, zeros instead of its padding, then wpe after the padding
    for (int i = 0; i < 128 * 8; i++) CHECK(model.params[i] == (i < 5 * 8 ? (float)i : 0.0f));
    for (int i = 0; i < 4 * 8; i++) CHECK(model.params[128 * 8 + i] == (float)(128 * 8 + i));
    // ln_1's weights of both layers, then ln_1's biases of both: in memory a layer's lie together
    for (const ParamTensor& p : gpt2_params(model.config)) {
        if (p.name == "h.1.ln_1.weight") CHECK(model.params[p.offset] == (float)(132 * 8 + 8));
        if (p.name == "h.0.ln_1.bias") CHECK(model.params[p.offset] == (float)(132 * 8 + 16));
        if (p.name == "ln_f.bias") CHECK(model.params[p.offset + 7] == (float)(file.values.size() - 1));
    }

    const auto error_with = [&](int at, int32_t value) {
        LlmcFile bad;
        bad.header[at] = value;
        write_text(path, bad.bytes());
        return error_of([&] { load(path); });
    };
    check_mentions(error_with(1, 2), "of version 2");
    check_mentions(error_with(2, 5), "takes");
    check_mentions(error_with(2, -1), "context length");
    check_mentions(error_with(3, 1 << 30), "vocabulary");
    check_mentions(error_with(3, 129), "cannot be padded to 128");
    check_mentions(error_with(4, 3), "cut off");
    check_mentions(error_with(4, 0), "layers");
    check_mentions(error_with(5, 3), "divide evenly");
    check_mentions(error_with(6, 1 << 20), "channels");
    check_mentions(error_with(7, 4), "cannot be padded to 4");
    check_mentions(error_with(7, INT32_MAX), "cannot be padded");
    write_text(path, file.bytes() + "x");
    check_mentions(error_of([&] { load(path); }), "bytes, but a model of its 2 layers and 8 channels takes");
    write_text(path, file.bytes().substr(0, 100));
    check_mentions(error_of([&] { load(path); }), "only 100 bytes");
    file.values[200 * 8] = NAN;
    write_text(path, file.bytes());
    check_mentions(error_of([&] { load(path); }), "holds NaN or infinity");
}

TEST_CASE("hparams.json and the TensorFlow names must agree") {
    TempFolder folder;
    fs::copy(kFixtures + "/tensorflow/gpt2", folder / "m", fs::copy_options::recursive);
    const std::string hparams = folder / "m/hparams.json";
    const nlohmann::json good = nlohmann::json::parse(read_text(hparams));
    const auto error_with = [&](const char* key, const nlohmann::json& value) {
        nlohmann::json changed = good;
        changed[key] = value;
        write_text(hparams, changed.dump());
        return error_of([&] { load(folder / "m"); });
    };
    CHECK(error_with("n_layer", 1) == "");
    check_mentions(error_with("n_layer", 2), "has no tensor model/h1/ln_1/g");
    check_mentions(error_with("n_vocab", 6),
                   "tensor model/wte has shape [5, 8], but the model's configuration");
    check_mentions(error_with("n_ctx", 5), "tensor model/wpe has shape [4, 8]");
    check_mentions(error_with("n_embd", 16), "has shape");
    check_mentions(error_with("n_head", 3), "divide evenly");
    check_mentions(error_with("n_head", "x"), "n_head must be a whole number");
    check_mentions(error_with("n_embd", nullptr), "has no n_embd");
    fs::remove(hparams);
    check_mentions(error_of([&] { load(folder / "m"); }), "must lie beside it");
}

TEST_CASE("OpenAI's four sizes are known without a configuration beside them") {
    const auto sized = [](int layers, int channels) {
        return config_from_shapes("x", [=](const std::string& name) -> std::vector<int64_t> {
            if (name == "wte.weight") return {50257, channels};
            if (name == "wpe.weight") return {1024, channels};
            for (int l = 0; l < layers; l++)
                if (name == "h." + std::to_string(l) + ".ln_1.weight") return {channels};
            return {};
        });
    };
    const auto config = [](int layers, int heads, int channels) {
        return GPT2Config{.num_layers = layers, .num_heads = heads, .channels = channels};
    };
    CHECK(sized(12, 768) == config(12, 12, 768));
    CHECK(sized(24, 1024) == config(24, 16, 1024));
    CHECK(sized(36, 1280) == config(36, 20, 1280));
    CHECK(sized(48, 1600) == config(48, 25, 1600));
    check_mentions(error_of([&] { sized(12, 1024); }), "none of GPT-2's four sizes");
    check_mentions(error_of([&] { sized(0, 768); }), "none of GPT-2's four sizes");
}

TEST_CASE(
    "GPT-2's safetensors need no configuration beside them, whatever they are called and however long") {
    TempFolder folder;
    GPT2Config config = {
        .max_seq_len = 512, .vocab_size = 50300, .num_layers = 12, .num_heads = 12, .channels = 768};
    config.padded_vocab_size = pad_vocab(config.vocab_size);
    nlohmann::json header;
    size_t end = 0;
    for (const ParamTensor& p : gpt2_params(config)) {
        const size_t begin = end;
        end += 2 * p.size_on_disk();
        header["transformer." + p.name] = {
            {"dtype", "BF16"}, {"shape", p.shape_on_disk()}, {"data_offsets", {begin, end}}};
    }
    const std::string text = header.dump();
    const uint64_t size = text.size();
    write_text(folder / "mine.safetensors", std::string((const char*)&size, 8) + text);
    fs::resize_file(folder / "mine.safetensors", 8 + size + end);  // zeros that take no room
    CHECK(config_for_weights(find_model(folder.path)) == config);
    fs::rename(folder / "mine.safetensors", folder / "optimizer.safetensors");
    check_mentions(error_of([&] { find_model(folder.path); }), "holds no model");
}

TEST_CASE("what is exported is what was read, from every format, and the padding is gone") {
    const mode_t mask = umask(0);
    umask(mask);
    TempFolder folder;
    gunzip(kFixtures + "/llmc/gpt2.bin.gz", folder / "gpt2.bin");
    int n = 0;
    for (const std::string& path :
         {kFixtures + "/gpt2", kFixtures + "/tensorflow/gpt2", folder / "gpt2.bin"}) {
        const Loaded model = load(path);
        const std::string out = folder / ("deep/er/" + std::to_string(n++));
        export_model(out, model.config, model.params.data(), "");
        const Loaded again = load(out);
        CHECK(again.files.format == WeightFormat::safetensors);
        CHECK(again.config == model.config);
        CHECK(again.params == model.params);
        const SafetensorsReader file(out + "/model.safetensors");
        CHECK(file.at("transformer.wte.weight").shape == std::vector<int64_t>{model.config.vocab_size, 8});
        CHECK(!has_unfinished(folder / "deep/er"));
        CHECK(static_cast<mode_t>(fs::status(out).permissions()) == (0777 & ~mask));
        // a folder that holds something stays as it is
        check_mentions(error_of([&] { export_model(out, model.config, model.params.data(), ""); }),
                       "is there already");
    }
}

TEST_CASE("the vocabulary goes along under the names that transformers looks for") {
    TempFolder folder;
    const Loaded model = load(kFixtures + "/gpt2");
    fs::create_directory(folder / "empty");
    export_model(folder / "empty/", model.config, model.params.data(), kFixtures + "/tiny_bpe");
    CHECK(read_text(folder / "empty/vocab.json") == read_text(kFixtures + "/tiny_bpe/encoder.json"));
    CHECK(read_text(folder / "empty/merges.txt") == read_text(kFixtures + "/tiny_bpe/vocab.bpe"));
    // what has a similar name is the user's
    fs::create_directory(folder / "out.tmp");
    write_text(folder / "out.tmp/thesis", "all of it");
    export_model(folder / "out", model.config, model.params.data(), "");
    CHECK(read_text(folder / "out.tmp/thesis") == "all of it");
    // a folder that cannot be written leaves nothing behind
    write_text(folder / "file", "");
    CHECK(error_of([&] { export_model(folder / "file/x", model.config, model.params.data(), ""); }) != "");
    std::vector<float> bad = model.params;
    bad.back() = NAN;
    check_mentions(error_of([&] { export_model(folder / "bad", model.config, bad.data(), ""); }),
                   "ln_f.bias");
    CHECK(!fs::exists(folder / "bad"));
    CHECK(!has_unfinished(folder.path));
}

TEST_CASE("from tokenizer.json the two files are written, and one for the tokens that were added") {
    TempFolder folder;
    const Loaded model = load(kFixtures + "/gpt2");
    const std::string plain = folder / "plain", enlarged = folder / "enlarged", again = folder / "again";
    export_model(plain, model.config, model.params.data(), kFixtures + "/tiny_hf");
    CHECK(nlohmann::json::parse(read_text(plain + "/vocab.json")) ==
          nlohmann::json::parse(read_text(kFixtures + "/tiny_bpe/encoder.json")));
    CHECK(read_text(plain + "/merges.txt") == read_text(kFixtures + "/tiny_bpe/vocab.bpe"));
    CHECK(!fs::exists(plain + "/added_tokens.json"));
    CHECK(!fs::exists(plain + "/tokenizer.json"));

    const GPT2Config config = {.max_seq_len = 4,
                               .vocab_size = 574,
                               .padded_vocab_size = pad_vocab(574),
                               .num_layers = 1,
                               .num_heads = 1,
                               .channels = 8};
    const std::vector<float> params(num_parameters(config));
    export_model(enlarged, config, params.data(), kFixtures + "/tiny_hf");
    CHECK(read_text(enlarged + "/vocab.json") == read_text(plain + "/vocab.json"));
    CHECK(read_text(enlarged + "/merges.txt") == read_text(plain + "/merges.txt"));
    CHECK(nlohmann::json::parse(read_text(enlarged + "/added_tokens.json")) ==
          nlohmann::json{{"<|pad|>", 568},
                         {"<mask>", 569},
                         {"<sep>", 570},
                         {"foo bar", 571},
                         {"<sep><sep>", 572},
                         {"\xC3\xA9\xE2\x9C\x93", 573}});
    const std::string text = "the foo bar<sep><sep><sep> dog<|endoftext|>";
    CHECK(Tokenizer::gpt2(enlarged, 574).encode_special(text) ==
          Tokenizer::gpt2(kFixtures + "/tiny_hf", 574).encode_special(text));
    // and what was written is read and written again, byte for byte
    export_model(again, config, params.data(), enlarged);
    for (const char* name : {"/vocab.json", "/merges.txt", "/added_tokens.json"})
        CHECK(read_text(again + name) == read_text(enlarged + name));
}

TEST_CASE("of tied weights safetensors' save_model() keeps lm_head.weight") {
    TempFolder folder;
    const Loaded model = load(kFixtures + "/gpt2");
    write_gpt2_config(folder.path, model.config);
    {
        SafetensorsWriter file(folder / "model.safetensors", {{"format", "pt"}});
        const auto name_of = [](const ParamTensor& p) {
            return p.name == "wte.weight" ? "lm_head.weight" : "transformer." + p.name;
        };
        for (const ParamTensor& p : gpt2_params(model.config))
            file.declare(name_of(p), "F32", p.shape_on_disk());
        std::vector<float> transposed;
        for (const ParamTensor& p : gpt2_params(model.config)) {
            const float* data = model.params.data() + p.offset;
            transposed.assign(data, data + p.size_on_disk());
            if (p.transposed) transpose(data, p.rows, p.cols, transposed.data());
            file.write(name_of(p), transposed.data(), transposed.size() * sizeof(float));
        }
        file.finish();
    }
    CHECK(load(folder.path).params == model.params);
}

TEST_CASE("a folder with PyTorch's archive alone says how to save the model") {
    TempFolder folder;
    write_gpt2_config(folder.path, {.vocab_size = 257});
    write_text(folder / "pytorch_model.bin", "PK");
    check_mentions(error_of([&] { find_model(folder.path); }), "pytorch_model.bin is a PyTorch archive");
}

TEST_CASE("a tokenizer of another kind than GPT-2's stays behind") {
    TempFolder folder;
    const Loaded model = load(kFixtures + "/gpt2");
    fs::create_directory(folder / "other");
    write_text(folder / "other/tokenizer.json", R"({"model": {"type": "WordLevel", "vocab": {"a": 0}}})");
    export_model(folder / "out", model.config, model.params.data(), folder / "other");
    CHECK(fs::exists(folder / "out/model.safetensors"));
    CHECK(!fs::exists(folder / "out/vocab.json"));
    write_text(folder / "other/tokenizer.json", "{");
    check_mentions(
        error_of([&] { export_model(folder / "bad", model.config, model.params.data(), folder / "other"); }),
        "tokenizer.json is not valid JSON");
    CHECK(!fs::exists(folder / "bad"));
    CHECK(!has_unfinished(folder.path));
}

TEST_CASE("<|endoftext|> stays GPT-2's where tokens were added behind it") {
    TempFolder folder;
    for (const auto& [vocab, end] : {std::pair{257, 256}, {50257, 50256}, {50300, 50256}}) {
        write_gpt2_config(folder.path, {.vocab_size = vocab});
        CHECK(nlohmann::json::parse(read_text(folder / "config.json"))["eos_token_id"] == end);
    }
}
