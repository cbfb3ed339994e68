// Fuzzes token shards and data positions, vocabulary files, and texts: the kinds are shards, vocabulary and
// texts.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "../llmc/dataloader.h"
#include "../llmc/files.h"
#include "../llmc/tokenizer.h"
#include "../llmc/vocabulary.h"
#include "fuzz.h"

namespace fs = std::filesystem;

static constexpr int kTinySize = 568;  // of the vocabulary in fixtures/tiny_bpe,
static constexpr int kHfSize = 574;    // and in fixtures/tiny_hf, which has added tokens
static const char* const kAdded = R"({"<|pad|>": 568, "<mask>": 569, "<sep>": 570, "foo bar": 571,)"
                                  R"( "<sep><sep>": 572, "\u00e9\u2713": 573})";

// A few random edits: bytes, integers of interest, blocks removed, repeated, moved, or taken from a list of
// words.
static std::string mutate(std::string text, Random& rng, const std::vector<std::string>& words) {
    const auto place = [&] { return text.empty() ? 0 : rng() % (text.size() + 1); };
    for (size_t edits = rng() % 4 + 1; edits > 0; edits--) {
        const size_t at = place(), length = std::min(text.size() - at, rng() % 40);
        switch (rng() % 8) {
            case 0:
                replace_byte(text, at, rng);
                break;
            case 1:
                flip_bit(text, at, rng);
                break;
            case 2:
                text.erase(at, length);
                break;
            case 3:
                text.insert(at, text.substr(at, length));
                break;
            case 4:
                text.insert(place(), text.substr(at, length));
                break;
            case 5:
                text.resize(at);
                break;
            case 6:
                text.insert(at, words[rng() % words.size()]);
                break;
            default: {
                static const int32_t kIntegers[] = {0,     1,     -1,    2,     255,       256,      257,
                                                    50256, 50257, 65535, 65536, INT32_MAX, INT32_MIN};
                const int32_t value = kIntegers[rng() % std::size(kIntegers)];
                const size_t word = rng() % 5 * 4;  // of the header
                if (text.size() >= word + 4) std::memcpy(text.data() + word, &value, 4);
            }
        }
    }
    return text;
}

static std::string shard_bytes(int32_t tokens, int32_t vocab_size, Random& rng) {
    int32_t header[256] = {20240520, 1, tokens, vocab_size};
    std::string text(reinterpret_cast<const char*>(header), sizeof(header));
    for (int32_t i = 0; i < tokens; i++) {
        const auto token =
            static_cast<uint16_t>(rng() % (vocab_size == 0 ? 50257 : static_cast<uint64_t>(vocab_size)));
        text.append(reinterpret_cast<const char*>(&token), 2);
    }
    return text;
}

struct DataFuzzer : Fuzzer {
    using Fuzzer::Fuzzer;
    fs::path in = folder();
    std::string encoder, merges, tokenizer_json, merges_in_strings;  // good files
    std::string added = kAdded;

    void shards() {
        const int count = 1 + static_cast<int>(rng() % 2);
        for (int i = 0; i < 2; i++) fs::remove(in / format("s_%d.bin", i));
        const int vocab_size = rng() % 2 ? 257 : 0;
        for (int i = 0; i < count; i++) {
            std::string text =
                shard_bytes(static_cast<int32_t>(rng() % 300), i == 0 || rng() % 8 ? vocab_size : 0, rng);
            if (rng() % 4 != 0)
                text = mutate(std::move(text), rng,
                              {std::string(2, '\0'), std::string(1, '\xFF'), std::string(1024, '\0')});
            // Half of the time the header's count is made to fit, so that what lies behind it is reached.
            if (rng() % 2 && text.size() >= 1024) {
                const auto tokens = static_cast<int32_t>((text.size() - 1024) / 2);
                std::memcpy(text.data() + 8, &tokens, 4);
                text.resize(1024 + 2 * static_cast<size_t>(tokens));
            }
            write_text(in / format("s_%d.bin", i), text);
        }
        const int B = 1 + static_cast<int>(rng() % 5), T = 1 + static_cast<int>(rng() % 40);
        attempt(folder(), [&] {
            DataLoader loader((in / "s_*.bin").string(), B, T, rng() % 2 == 0, rng());
            for (int i = 0; i < 20; i++) {
                loader.next_batch();
                for (int j = 0; j < B * T; j++) {
                    if (loader.inputs()[j] >= loader.vocab_size() ||
                        loader.targets()[j] >= loader.vocab_size()) {
                        throw std::logic_error("a token outside the vocabulary came through");
                    }
                }
            }
            static const int64_t kPositions[] = {0, 0, 0, 0, 1, 2, 100, -1, INT64_MAX, INT64_MIN};
            loader.restore({kPositions[rng() % 10], kPositions[rng() % 10]});
            loader.next_batch();
        });
    }

    // The files of a vocabulary in one of the ways in which they lie in a folder; one of them is spoilt, or
    // two, or rarely none.
    void vocabulary() {
        static const std::vector<std::string> kWords = {"\"",
                                                        "{",
                                                        "}",
                                                        "[",
                                                        ":",
                                                        ",",
                                                        " ",
                                                        "\n",
                                                        "\"<|endoftext|>\"",
                                                        "\\u0000",
                                                        "\\ud800",
                                                        "\xC4\xA0",
                                                        "\xC4\xA0 t\n",
                                                        "-1",
                                                        "1e99",
                                                        "99999999999999999999",
                                                        "65536",
                                                        "null",
                                                        "true",
                                                        "\"model\": ",
                                                        "\"added_tokens\": [",
                                                        "{\"id\": 574, \"content\": \"<x>\"},",
                                                        "\"BPE\"",
                                                        "[\"a\", \"b\"],",
                                                        "a a\n",
                                                        "aa aa\n",
                                                        "#version\n",
                                                        "\xFF",
                                                        std::string(1000, '['),
                                                        std::string(600, 'a') + " a\n"};
        static const std::vector<std::vector<std::pair<const char*, const std::string*>>> kLayouts = {
            {{"encoder.json", &encoder}, {"vocab.bpe", &merges}},
            {{"vocab.json", &encoder}, {"merges.txt", &merges}, {"added_tokens.json", &added}},
            {{"vocab.json", &encoder}, {"merges.txt", &merges}, {"tokenizer.json", &tokenizer_json}},
            {{"tokenizer.json", &tokenizer_json}},
            {{"tokenizer.json", &merges_in_strings}}};
        for (const auto& entry : fs::directory_iterator(in)) fs::remove(entry);
        const size_t layout = rng() % kLayouts.size();
        for (const auto& [name, good] : kLayouts[layout])
            write_text(in / name, rng() % 3 != 0 ? mutate(*good, rng, kWords) : *good);
        const int size = rng() % 8 == 0                  ? static_cast<int>(rng() % 70000)
                         : layout == 0 || rng() % 4 == 0 ? kTinySize
                                                         : kHfSize;
        attempt(folder(), [&] {
            has_vocabulary(folder());
            const Tokenizer tokenizer = Tokenizer::gpt2(folder(), size);
            round_trip(tokenizer);
        });
    }

    void round_trip(const Tokenizer& tokenizer) {
        static const std::vector<std::string> kWords = {" ",
                                                        "\n",
                                                        "'s",
                                                        "the",
                                                        "\xC3\xA9",
                                                        "\xE4\xBD\xA0",
                                                        "\xF0\x9F\x98\x80",
                                                        "<|endoftext|>",
                                                        "<sep>",
                                                        "foo bar",
                                                        "\xED\xA0\x80",
                                                        "\xFF",
                                                        "\xC2\xA0",
                                                        "12",
                                                        std::string(200, 'a'),
                                                        std::string(200, ' ')};
        std::string text;
        for (size_t i = rng() % 20; i > 0; i--) text += kWords[rng() % kWords.size()];
        text = mutate(std::move(text), rng, kWords);
        if (tokenizer.decode(tokenizer.encode(text)) != text ||
            tokenizer.decode(tokenizer.encode_special(text)) != text) {
            throw std::logic_error("decode(encode(x)) is not x");
        }
        std::vector<uint16_t> tokens(rng() % 20);
        for (uint16_t& token : tokens) token = static_cast<uint16_t>(rng());
        attempt(folder(), [&] { tokenizer.decode(tokens); });
    }
};

int main(int argc, char** argv) {
    DataFuzzer fuzzer(argc, argv, {"shards", "vocabulary", "texts"});
    const fs::path fixtures = fs::path(__FILE__).parent_path() / "fixtures";
    const std::string tiny = fixtures / "tiny_bpe", hf = fixtures / "tiny_hf";
    fuzzer.encoder = read_text(tiny + "/encoder.json");
    fuzzer.merges = read_text(tiny + "/vocab.bpe");
    fuzzer.tokenizer_json = read_text(hf + "/tokenizer.json");
    auto json = nlohmann::json::parse(fuzzer.tokenizer_json);
    for (nlohmann::json& merge : json["model"]["merges"])
        merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    fuzzer.merges_in_strings = json.dump();
    const Tokenizer tokenizers[] = {Tokenizer::gpt2(tiny, kTinySize), Tokenizer::gpt2(hf, kHfSize),
                                    Tokenizer::bytes()};
    fuzzer.run([&] {
        if (fuzzer.wants("shards")) fuzzer.shards();
        if (fuzzer.wants("vocabulary")) fuzzer.vocabulary();
        if (fuzzer.wants("texts"))
            for (const Tokenizer& tokenizer : tokenizers) fuzzer.round_trip(tokenizer);
    });
    return fuzzer.finish();
}
