// The tokenizer against tiktoken's tokens (fixtures/tiny_bpe/golden.jsonl, made by the script beside it),
// against a plain quadratic merge, and against bad vocabulary files. The cases that need GPT-2's own
// vocabulary look for it in $DATA_MIRROR, at any depth, and then in data/, and say so when they are skipped.
#include "../llmc/tokenizer.h"
#include "../llmc/vocabulary.h"

#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "errors.h"
#include "temp_folder.h"

namespace fs = std::filesystem;
using Tokens = std::vector<uint16_t>;

static const fs::path kTests = fs::path(__FILE__).parent_path();
static const std::string kTiny = (kTests / "fixtures/tiny_bpe").string();
static constexpr int kTinySize = 568;

static Tokenizer tiny() {
    return Tokenizer::gpt2(kTiny, kTinySize);
}

// The folder of GPT-2's vocabulary; "" where there is none.
static std::string gpt2_folder() {
    const char* mirror = std::getenv("DATA_MIRROR");
    std::error_code error;
    if (mirror != nullptr && fs::is_directory(mirror, error)) {
        for (const auto& entry : fs::recursive_directory_iterator(mirror, error)) {
            const fs::path folder = entry.path().parent_path();
            if (entry.path().filename() == "vocab.bpe" && fs::exists(folder / "encoder.json", error))
                return folder;
        }
    }
    const fs::path own = kTests.parent_path() / "data/gpt2";
    return fs::exists(own / "vocab.bpe", error) ? own.string() : "";
}

static std::vector<nlohmann::json> golden() {
    std::ifstream file(kTiny + "/golden.jsonl");
    std::vector<nlohmann::json> rows;
    for (std::string line; std::getline(file, line);) rows.push_back(nlohmann::json::parse(line));
    REQUIRE(rows.size() > 80);
    return rows;
}

static void check_golden(const Tokenizer& tokenizer, const std::string& name) {
    for (const auto& row : golden()) {
        const std::string text = row["text"];
        INFO("text: ", row["text"].dump());
        CHECK(tokenizer.encode(text) == row[name].get<Tokens>());
        CHECK(tokenizer.encode_special(text) == row[name + "_special"].get<Tokens>());
        CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
    }
}

// What the merges mean, with neither pieces, hash tables nor heaps: `text` is one piece.
static Tokens merge_plainly(const Tokenizer& tokenizer, const std::string& text) {
    std::map<std::string, uint16_t> rank;
    for (int id = 0; id + 1 < tokenizer.vocab_size(); id++) {
        const auto token = static_cast<uint16_t>(id);
        rank[tokenizer.decode({&token, 1})] = token;
    }
    std::vector<std::string> parts;
    for (const char c : text) parts.emplace_back(1, c);
    for (;;) {
        size_t best = parts.size();
        for (size_t i = 0; i + 1 < parts.size(); i++) {
            const auto found = rank.find(parts[i] + parts[i + 1]);
            if (found == rank.end()) continue;
            if (best == parts.size() || found->second < rank[parts[best] + parts[best + 1]]) best = i;
        }
        if (best == parts.size()) break;
        parts[best] += parts[best + 1];
        parts.erase(parts.begin() + static_cast<ptrdiff_t>(best) + 1);
    }
    Tokens tokens;
    for (const std::string& part : parts) tokens.push_back(rank[part]);
    return tokens;
}

static std::string random_bytes(std::mt19937_64& rng, size_t size) {
    std::string text(size, '\0');
    for (char& c : text) c = static_cast<char>(rng());
    return text;
}

// Bytes that often make long pieces, nearly valid UTF-8 and the pattern's special cases.
static std::string random_mixture(std::mt19937_64& rng, size_t parts) {
    static const std::vector<std::string> kParts = {"a",
                                                    "the",
                                                    " ",
                                                    "  ",
                                                    "\n",
                                                    "'s",
                                                    "'ll",
                                                    "'",
                                                    "1984",
                                                    "!?",
                                                    "\t",
                                                    "\xE9",
                                                    "\xC3\xA9",
                                                    "\xE4\xBD",
                                                    "\xE4\xBD\xA0",
                                                    "\xF0\x9F\x98\x80",
                                                    "\xF0\x9F",
                                                    "\xED\xA0\x80",
                                                    "\xC0\x80",
                                                    "\xFF",
                                                    "\xE1\xA0\x8E",
                                                    "\xC2\xA0",
                                                    "\xC2\xA0 ",
                                                    "\xC2\x85",
                                                    "\xE2\x80\xA8 ",
                                                    "\xE3\x80\x80 ",
                                                    "<|endoftext|>"};
    std::string text;
    for (size_t i = 0; i < parts; i++) text += kParts[rng() % kParts.size()];
    return text;
}

TEST_CASE("bytes") {
    const Tokenizer tokenizer = Tokenizer::bytes();
    CHECK(tokenizer.vocab_size() == 257);
    CHECK(tokenizer.eot() == 256);
    CHECK(std::string(tokenizer.name()) == "bytes");
    std::string all;
    Tokens ids;
    for (int b = 0; b < 256; b++) {
        all += static_cast<char>(b);
        ids.push_back(static_cast<uint16_t>(b));
    }
    CHECK(tokenizer.encode(all) == ids);
    CHECK(tokenizer.decode(ids) == all);
    CHECK(tokenizer.encode("<|endoftext|>").size() == 13);
    CHECK(tokenizer.encode_special("a<|endoftext|>b") == Tokens{'a', 256, 'b'});
    CHECK(tokenizer.decode(Tokens{'a', 256, 'b'}) == "a<|endoftext|>b");
    CHECK_THROWS_WITH_AS(tokenizer.decode(Tokens{257}), "token 257 is outside the bytes vocabulary of 257",
                         Error);
}

TEST_CASE("tiny vocabulary: tiktoken's tokens") {
    CHECK(tiny().vocab_size() == kTinySize);
    CHECK(tiny().eot() == kTinySize - 1);
    check_golden(tiny(), "tiny");
    CHECK_THROWS_AS(tiny().decode(Tokens{kTinySize}), Error);
}

TEST_CASE("GPT-2's vocabulary: tiktoken's tokens") {
    const std::string folder = gpt2_folder();
    if (folder.empty()) {
        MESSAGE("skipped: GPT-2's vocabulary is neither in $DATA_MIRROR nor in data/");
        return;
    }
    const Tokenizer tokenizer = Tokenizer::for_vocab(50257, folder);
    CHECK(tokenizer.vocab_size() == 50257);
    CHECK(tokenizer.eot() == 50256);
    CHECK(std::string(tokenizer.name()) == "gpt2");
    check_golden(tokenizer, "gpt2");
    // Published examples of GPT-2's tokens.
    CHECK(tokenizer.encode("Hello world") == Tokens{15496, 995});
    CHECK(tokenizer.encode_special("<|endoftext|>") == Tokens{50256});
    std::mt19937_64 rng(1);
    for (int i = 0; i < 300; i++) {
        const std::string text = i % 2 ? random_bytes(rng, rng() % 200) : random_mixture(rng, rng() % 100);
        CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
        CHECK(tokenizer.decode(tokenizer.encode_special(text)) == text);
    }
}

TEST_CASE("decode(encode(x)) == x for any bytes") {
    const Tokenizer tokenizer = tiny();
    std::mt19937_64 rng(2);
    for (int i = 0; i < 3000; i++) {
        const std::string text = i % 2 ? random_bytes(rng, rng() % 200) : random_mixture(rng, rng() % 100);
        CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
        CHECK(tokenizer.decode(tokenizer.encode_special(text)) == text);
    }
}

// Against the set of all code points' encodings.
TEST_CASE("utf8_length") {
    std::set<std::string> valid;
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xD800 && c < 0xE000) continue;
        std::string text;
        if (c < 0x80) {
            text = {static_cast<char>(c)};
        } else if (c < 0x800) {
            text = {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
        } else if (c < 0x10000) {
            text = {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
                    static_cast<char>(0x80 | (c & 63))};
        } else {
            if (c % 7 != 0) continue;
            text = {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 63)),
                    static_cast<char>(0x80 | (c >> 6 & 63)), static_cast<char>(0x80 | (c & 63))};
        }
        valid.insert(text);
    }
    const auto length = [](const std::string& text) {
        return bpe::utf8_length(text.data(), text.data() + text.size());
    };
    int wrong = 0;
    for (const std::string& text : valid) {
        wrong += length(text) != static_cast<int>(text.size());
        wrong += bpe::valid_prefix(text) != text.size();
        wrong += length(text.substr(0, text.size() - 1)) != 0;
    }
    for (int a = 0x80; a < 256; a++) {
        for (int b = 0; b < 256; b++) {
            const std::string two = {static_cast<char>(a), static_cast<char>(b)};
            wrong += (length(two) == 2) != (valid.count(two) == 1);
            for (int c = 0x70; c < 0xD0; c++) {
                const std::string three = two + static_cast<char>(c);
                if (length(two) == 0) wrong += (length(three) == 3) != (valid.count(three) == 1);
                // Of four bytes: every first two, with third and fourth bytes at the edges.
                const std::string four = three + '\x80', other = three + '\x7F';
                if (length(three) == 0 && a >= 0xF0) {
                    const bool follows = c >= 0x80 && c < 0xC0 && b >= 0x80 && b < 0xC0;
                    const uint32_t code =
                        static_cast<uint32_t>((a & 7) << 18 | (b & 63) << 12 | (c & 63) << 6);
                    wrong +=
                        (length(four) == 4) != (follows && a < 0xF8 && code >= 0x10000 && code < 0x110000);
                    wrong += length(other) != 0;
                }
            }
        }
    }
    CHECK(wrong == 0);
}

// In this vocabulary a space merges with the first byte of each: where the two are in one piece.
TEST_CASE("white space is what Unicode calls so, and nothing else") {
    TempFolder folder;
    nlohmann::json words;
    std::string merges;
    const nlohmann::json tiny_words = nlohmann::json::parse(read_text(kTiny + "/encoder.json"));
    for (const auto& [word, id] : tiny_words.items())
        if (id < 256) words[word] = id;
    int next = 256;
    for (const std::string lead : {"\u00c2", "\u00e1", "\u00e2", "\u00e3", "\u00ef"}) {
        words["\u0120" + lead] = next++;
        merges += "\u0120 " + lead + "\n";
    }
    words["<|endoftext|>"] = next++;
    write_text(folder / "encoder.json", words.dump());
    write_text(folder / "vocab.bpe", merges);
    const Tokenizer tokenizer = Tokenizer::gpt2(folder.path, next);
    const auto joined = [&](const std::string& c) {
        return tokenizer.encode("x " + c + "y").size() < c.size() + 3;
    };
    for (const char* space :
         {"\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
          "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"}) {
        INFO(space);
        CHECK(!joined(space));
    }
    for (const char* other :
         {"\u0084", "\u00a1", "\u180e", "\u200b", "\u2027", "\u202a", "\u2060", "\u3001", "\ufeff"}) {
        INFO(other);
        CHECK(joined(other));
    }
}

TEST_CASE("bytes that are not valid UTF-8 are a piece of their own") {
    const Tokenizer tokenizer = tiny();
    for (const std::string bad : {"\xFF", "\xC3", "\xE4\xBD", "\xF0\x9F\x98", "\xED\xA0\x80", "\xC0\xAF",
                                  "\xF4\x90\x80\x80", "\x80\x80"}) {
        for (const std::string before : {"", "dog", "dog ", "it'"}) {
            for (const std::string after : {"", "lazy", " lazy", "s"}) {
                Tokens expected = tokenizer.encode(before);
                const Tokens middle = merge_plainly(tokenizer, bad), end = tokenizer.encode(after);
                expected.insert(expected.end(), middle.begin(), middle.end());
                expected.insert(expected.end(), end.begin(), end.end());
                CHECK(tokenizer.encode(before + bad + after) == expected);
            }
        }
    }
}

TEST_CASE("text may be cut where may_cut says so") {
    const Tokenizer tokenizer = tiny();
    std::mt19937_64 rng(5);
    int cuts = 0;
    for (int i = 0; i < 1000; i++) {
        const std::string text = random_mixture(rng, rng() % 30) + random_bytes(rng, rng() % 5);
        const Tokens whole = tokenizer.encode(text);
        for (size_t at = 0; at <= text.size(); at++) {
            if (!Tokenizer::may_cut(text, at)) continue;
            cuts++;
            Tokens parts = tokenizer.encode(std::string_view(text).substr(0, at));
            tokenizer.append(std::string_view(text).substr(at), parts);
            CHECK(parts == whole);
        }
    }
    CHECK(cuts > 3000);
}

TEST_CASE("merging, short and long, is the plain merging") {
    const Tokenizer tokenizer = tiny();
    std::mt19937_64 rng(3);
    for (int i = 0; i < 200; i++) {
        std::string word;  // letters only: one piece
        const size_t size = i < 150 ? 1 + rng() % 80 : 300;
        const bool repetitive = i % 3 == 0;
        while (word.size() < size) word += repetitive ? 'a' : "thequickbrownfox"[rng() % 16];
        CHECK(tokenizer.encode(word) == merge_plainly(tokenizer, word));
    }
}

TEST_CASE("long pieces take no quadratic time") {
    const Tokenizer tokenizer = tiny();
    for (const std::string unit : {"a", " ", "\n", "-", "1", "th", "\xFF"}) {
        std::string text;
        while (text.size() < (size_t{1} << 20)) text += unit;
        text += 'x';
        const auto start = std::chrono::steady_clock::now();
        const Tokens tokens = tokenizer.encode(text);
        const double seconds =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        CHECK(tokenizer.decode(tokens) == text);
        // 0.1 to 0.2 s; 20 times slower under sanitizers. A quadratic merge takes an hour.
        CHECK(seconds < 30);
    }
}

TEST_CASE("threads and several vocabularies at once") {
    const Tokenizer a = tiny(), b = Tokenizer::bytes();
    std::mt19937_64 rng(4);
    std::vector<std::string> texts;
    std::vector<Tokens> expected;
    for (int i = 0; i < 200; i++) {
        texts.push_back(random_mixture(rng, 50));
        expected.push_back(a.encode(texts.back()));
    }
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 4; t++) {
        threads.emplace_back([&] {
            const Tokenizer own = tiny();  // used in turn with a: their caches must not mix
            for (size_t i = 0; i < texts.size(); i++) {
                wrong += a.encode(texts[i]) != expected[i];
                wrong += own.encode(texts[i]) != expected[i];
                wrong += b.decode(b.encode(texts[i])) != texts[i];
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

TEST_CASE("for_vocab") {
    CHECK(std::string(Tokenizer::for_vocab(257, "nowhere").name()) == "bytes");
    CHECK_THROWS_WITH_AS(
        Tokenizer::for_vocab(1000, kTiny),
        "there is no tokenizer for a vocabulary of 1000 tokens: 257 is bytes, 50257 is GPT-2's", Error);
    CHECK_THROWS_AS(Tokenizer::for_vocab(50257, "nowhere"), Error);
}

// A copy of the tiny vocabulary whose files a test may spoil.
struct Copy {
    fs::path folder = fs::temp_directory_path() / ("tokenizer_test_" + std::to_string(getpid()));
    std::string encoder, merges;

    Copy() {
        fs::create_directories(folder);
        encoder = read("encoder.json");
        merges = read("vocab.bpe");
        write();
    }
    ~Copy() { fs::remove_all(folder); }

    static std::string read(const char* name) {
        std::ifstream file(kTiny + "/" + name, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    void write() const {
        std::ofstream(folder / "encoder.json", std::ios::binary) << encoder;
        std::ofstream(folder / "vocab.bpe", std::ios::binary) << merges;
    }
    // The message of the Error that loading gives; "" where it loads.
    std::string problem(int size = kTinySize) const {
        write();
        return error_of([&] { Tokenizer::gpt2(folder.string(), size); });
    }
};

static std::string replaced(std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    return text.replace(at, from.size(), to);
}

#define CHECK_PROBLEM(copy, file, what)                 \
    do {                                                \
        const std::string problem = (copy).problem();   \
        INFO("message: ", problem);                     \
        CHECK(problem.find(file) != std::string::npos); \
        CHECK(problem.find(what) != std::string::npos); \
    } while (false)

TEST_CASE("bad vocabulary files are refused by name") {
    Copy copy;
    CHECK(copy.problem() == "");
    const std::string encoder = copy.encoder, merges = copy.merges;
    const std::string last = merges.substr(merges.rfind('\n', merges.size() - 2) + 1);

    SUBCASE("another size") {
        CHECK(copy.problem(567).find("more than the 310 merges") != std::string::npos);
    }
    SUBCASE("another size") {
        CHECK(copy.problem(569).find("has 311 merges") != std::string::npos);
    }
    SUBCASE("an impossible size") {
        CHECK(copy.problem(100000).find("not 100000") != std::string::npos);
    }
    SUBCASE("no version line") {
        copy.merges = merges.substr(merges.find('\n') + 1);
        CHECK(copy.problem() == "");
    }
    SUBCASE("no newline at the end") {
        copy.merges.pop_back();
        CHECK(copy.problem() == "");
    }
    SUBCASE("cut short") {
        copy.merges = merges.substr(0, merges.size() - last.size());
        CHECK_PROBLEM(copy, "vocab.bpe", "has 310 merges");
    }
    SUBCASE("a merge too many") {
        copy.merges += "z z\n";
        CHECK_PROBLEM(copy, "vocab.bpe", "more than the 311 merges");
    }
    SUBCASE("a merge twice") {
        copy.merges = merges + last;
        CHECK_PROBLEM(copy, "vocab.bpe", "exists already");
    }
    SUBCASE("a merge of unknown tokens") {
        copy.merges = replaced(merges, last, "zqzq z\n");
        CHECK_PROBLEM(copy, "vocab.bpe", "no line before it makes");
    }
    SUBCASE("no merge") {
        copy.merges = replaced(merges, last, "zz\n");
        CHECK_PROBLEM(copy, "vocab.bpe", "is not a merge");
    }
    SUBCASE("an empty line") {
        copy.merges = replaced(merges, "\n", "\n\n");
        CHECK_PROBLEM(copy, "vocab.bpe", "line 2");
    }
    SUBCASE("a character that is no byte") {
        copy.merges = replaced(merges, last, "\xE4\xBD\xA0 z\n");
        CHECK_PROBLEM(copy, "vocab.bpe", "is not a merge");
    }
    SUBCASE("a character of two bytes that is no byte") {
        copy.merges = replaced(merges, last, "\xDF\xBF z\n");
        CHECK_PROBLEM(copy, "vocab.bpe", "is not a merge");
    }
    SUBCASE("merges in another order") {
        copy.merges = replaced(merges, last, "z z\n");
        CHECK_PROBLEM(copy, "encoder.json", "vocab.bpe");
    }
    SUBCASE("a word missing") {
        copy.encoder = replaced(encoder, "\"!\": 0, ", "");
        CHECK_PROBLEM(copy, "encoder.json", "has 567 tokens");
    }
    SUBCASE("a word twice") {
        copy.encoder = replaced(encoder, "\"!\": 0, ", "\"!\": 0, \"!\": 0, ");
        CHECK_PROBLEM(copy, "encoder.json", "twice");
    }
    SUBCASE("an id wrong") {
        copy.encoder = replaced(encoder, "\"!\": 0,", "\"!\": 1,");
        CHECK_PROBLEM(copy, "encoder.json", "gives \"!\" the id 1, but");
    }
    SUBCASE("another special token") {
        copy.encoder = replaced(encoder, "<|endoftext|>", "<|other|>");
        CHECK_PROBLEM(copy, "encoder.json", "no token");
    }
    for (const char* value :
         {"-1", "1.5", "\"x\"", "null", "true", "[0]", "{\"x\": 0}", "70000", "99999999999999999999"}) {
        SUBCASE(value) {
            copy.encoder = replaced(encoder, "\"!\": 0,", std::string("\"!\": ") + value + ",");
            CHECK_PROBLEM(copy, "encoder.json", "");
        }
    }
    for (const char* text : {"", "{", "[]", "7", "{\"!\": 0", "not JSON", "{}x"}) {
        SUBCASE(text) {
            copy.encoder = text;
            CHECK_PROBLEM(copy, "encoder.json", "");
        }
    }
    SUBCASE("deep nesting") {
        copy.encoder.assign(1 << 20, '[');
        CHECK_PROBLEM(copy, "encoder.json", "");
    }
    SUBCASE("cut short") {
        copy.encoder.resize(encoder.size() / 2);
        CHECK_PROBLEM(copy, "encoder.json", "not valid JSON");
    }
    SUBCASE("not there") {
        fs::remove(copy.folder / "vocab.bpe");
        check_mentions(error_of([&] { Tokenizer::gpt2(copy.folder.string(), kTinySize); }),
                       "there is no GPT-2 vocabulary");
    }
    SUBCASE("Hugging Face's names") {
        fs::rename(copy.folder / "vocab.bpe", copy.folder / "merges.txt");
        fs::rename(copy.folder / "encoder.json", copy.folder / "vocab.json");
        CHECK(Tokenizer::gpt2(copy.folder.string(), kTinySize).encode("the dog").size() < 7);
    }
}

// ---- tokenizer.json and added tokens; fixtures/tiny_hf was written by transformers ----

static const std::string kHf = (kTests / "fixtures/tiny_hf").string();
static constexpr int kHfSize = 574;  // the tiny vocabulary and six tokens more

static nlohmann::json hf_json() {
    return nlohmann::json::parse(read_text(kHf + "/tokenizer.json"));
}

static void check_hf_golden(const std::string& folder) {
    const Tokenizer tokenizer = Tokenizer::gpt2(folder, kHfSize);
    CHECK(tokenizer.vocab_size() == kHfSize);
    CHECK(tokenizer.eot() == kTinySize - 1);
    std::ifstream file(kHf + "/golden.jsonl");
    int rows = 0;
    for (std::string line; std::getline(file, line); rows++) {
        INFO(line);
        const nlohmann::json row = nlohmann::json::parse(line);
        const std::string text = row["text"];
        CHECK(tokenizer.encode_special(text) == row["tokens"].get<Tokens>());
        CHECK(tokenizer.decode(row["tokens"].get<Tokens>()) == text);
        CHECK(tokenizer.encode(text) == tiny().encode(text));  // where special tokens are plain text
    }
    CHECK(rows == 29);
    CHECK_THROWS_AS(tokenizer.decode(Tokens{kHfSize}), Error);
}

// As the first versions of the library wrote it: merges in one string each, and less said of the rest.
static nlohmann::json as_of_old(nlohmann::json json) {
    for (nlohmann::json& merge : json["model"]["merges"])
        merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    for (const char* key : {"type", "byte_fallback", "ignore_merges"}) json["model"].erase(key);
    json["pre_tokenizer"].erase("use_regex");
    return json;
}

TEST_CASE("tokenizer.json alone is the vocabulary") {
    check_hf_golden(kHf);
    TempFolder folder;
    const std::string path = folder / "tokenizer.json";
    write_text(path, as_of_old(hf_json()).dump());
    check_hf_golden(folder.path);

    nlohmann::json json = hf_json();
    SUBCASE("nothing is added") {
        json["added_tokens"] = nlohmann::json::array({json["added_tokens"][0]});
    }
    SUBCASE("no list of added tokens") {
        json.erase("added_tokens");
    }
    SUBCASE("<|endoftext|> is among the added tokens only") {
        json["model"]["vocab"].erase("<|endoftext|>");
    }
    SUBCASE("a model that was not enlarged has no use for what was added") {}
    write_text(path, json.dump());
    check_golden(Tokenizer::gpt2(folder.path, kTinySize), "tiny");
    CHECK(has_vocabulary(folder.path));
}

TEST_CASE(
    "the two files are of one kind of names, and a tokenizer.json counts where they are not both there") {
    Copy copy;
    const std::string openai = copy.folder / "encoder.json", merges = copy.folder / "vocab.bpe";
    const auto move = [&](const std::string& from, const char* to) {
        std::filesystem::rename(from, copy.folder / to);
    };
    CHECK(has_vocabulary(copy.folder.string()));
    move(merges, "merges.txt");
    CHECK(!has_vocabulary(copy.folder.string()));
    check_mentions(error_of([&] { Tokenizer::gpt2(copy.folder.string(), kTinySize); }),
                   "there is no GPT-2 vocabulary in " + copy.folder.string());
    move(openai, "vocab.json");
    CHECK(has_vocabulary(copy.folder.string()));
    write_text(openai, "{}");  // alone: not read
    check_golden(Tokenizer::gpt2(copy.folder.string(), kTinySize), "tiny");
}

TEST_CASE("tokens added beside the two files") {
    Copy copy;
    const auto added = [&](const nlohmann::json& tokens) {
        write_text(copy.folder / "added_tokens.json", tokens.dump());
    };
    const nlohmann::json six = {{"<|pad|>", 568}, {"<mask>", 569},     {"<sep>", 570},
                                {"foo bar", 571}, {"<sep><sep>", 572}, {"\xC3\xA9\xE2\x9C\x93", 573}};
    SUBCASE("in added_tokens.json") {
        added(six);
        check_hf_golden(copy.folder);
    }
    SUBCASE("in added_tokens.json, with <|endoftext|>") {
        nlohmann::json seven = six;
        seven["<|endoftext|>"] = 567;
        added(seven);
        check_hf_golden(copy.folder);
    }
    SUBCASE("in tokenizer.json") {
        fs::copy_file(kHf + "/tokenizer.json", copy.folder / "tokenizer.json");
        check_hf_golden(copy.folder);
    }
    SUBCASE("in both, and among the words too") {
        added(six);
        fs::copy_file(kHf + "/tokenizer.json", copy.folder / "tokenizer.json");
        nlohmann::json words = nlohmann::json::parse(copy.encoder);
        words.update(six);
        copy.encoder = words.dump();
        copy.write();
        check_hf_golden(copy.folder);
        // but a word that nobody added is a mistake
        words["<other>"] = 574;
        copy.encoder = words.dump();
        CHECK(copy.problem(kHfSize).find("gives \"<other>\" the id 574, but by ") != std::string::npos);
    }
    SUBCASE("half in one, half in the other") {
        nlohmann::json json = hf_json(), half = six;
        while (json["added_tokens"].size() > 4) json["added_tokens"].erase(4);
        write_text(copy.folder / "tokenizer.json", json.dump());
        half.erase("<mask>");
        added(half);
        check_hf_golden(copy.folder);
    }
    SUBCASE("merges without the line of the version, or without a last newline") {
        added(six);
        copy.merges = copy.merges.substr(copy.merges.find('\n') + 1);
        copy.merges.pop_back();
        copy.write();
        check_hf_golden(copy.folder);
    }
    SUBCASE("one token") {
        added({{"<x>", 568}});
        CHECK(copy.problem(569) == "");
        const Tokenizer tokenizer = Tokenizer::gpt2(copy.folder, 569);
        CHECK(tokenizer.encode_special("<x>the") ==
              Tokens{568, tokenizer.encode("the")[0], tokenizer.encode("the")[1]});
    }
    SUBCASE("a model that was not enlarged does not look at them") {
        write_text(copy.folder / "added_tokens.json", "not JSON");
        write_text(copy.folder / "tokenizer.json", "not JSON");
        CHECK(copy.problem() == "");
    }
}

TEST_CASE("special tokens: the leftmost, of those the longest; wherever one begins inside another") {
    Copy copy;
    write_text(copy.folder / "added_tokens.json",
               R"({"ab": 568, "abab": 569, "b": 570, "ba!": 571, "\u00ff": 572, " ": 573})");
    const Tokenizer tokenizer = Tokenizer::gpt2(copy.folder, kHfSize);
    CHECK(tokenizer.encode_special("ababab") == Tokens{569, 568});
    CHECK(tokenizer.encode_special("aba!") ==
          Tokens{568, tokenizer.encode("a")[0], tokenizer.encode("!")[0]});
    CHECK(tokenizer.encode_special("ba!b") == Tokens{571, 570});
    CHECK(tokenizer.encode_special("\xC3\xBF \xC3") == Tokens{572, 573, tokenizer.encode("\xC3")[0]});
    CHECK(tokenizer.decode(Tokens{569, 573, 567, 572}) == "abab <|endoftext|>\xC3\xBF");
}

TEST_CASE("bad added tokens are refused in one sentence") {
    Copy copy;
    const std::string path = copy.folder / "added_tokens.json";
    const auto problem_of = [&](const std::string& text, int size = 570) {
        write_text(path, text);
        const std::string problem = copy.problem(size);
        CHECK(problem.find(copy.folder.string()) != std::string::npos);
        return problem;
    };
    const auto mentions = [](const std::string& problem, const std::string& what) {
        INFO("message: ", problem);
        CHECK(problem.find(what) != std::string::npos);
    };
    mentions(copy.problem(570), "has 311 merges, but a vocabulary of 570 tokens has 313, or added tokens");
    mentions(problem_of("{}"), "or added tokens beside them");
    mentions(problem_of(R"({"<|endoftext|>": 567})"), "or added tokens beside them");
    mentions(problem_of(R"({"<x>": 568})"), "end at 568, but a vocabulary of 570 tokens has them to 569");
    mentions(problem_of(R"({"<x>": 569})"),
             "must be those from 568 to 569, without a gap, and 569 is \"<x>\"");
    mentions(problem_of(R"({"<x>": 568, "<y>": 569, "<z>": 570})"), "and 570 is \"<z>\"");
    mentions(problem_of(R"({"<x>": 5, "<y>": 568, "<z>": 569})"), "and 5 is \"<x>\"");
    mentions(problem_of(R"({"<x>": 568, "<y>": 568})"), "the id 568, which another added token has");
    mentions(problem_of(R"({"<x>": 568, "<x>": 569})"), "has the word \"<x>\" twice");
    mentions(problem_of(R"({"<|endoftext|>": 568, "<y>": 569})"), "the id 568, but by");
    mentions(problem_of(R"({"": 568, "<y>": 569})"), "a token of 0 bytes");
    mentions(problem_of("{\"" + std::string(513, 'x') + "\": 568, \"<y>\": 569}"), "a token of 513 bytes");
    mentions(problem_of(R"({"<x>": "568"})"), "holds something else than words and their ids");
    mentions(problem_of(R"({"<x>": 70000})"), "an id above 65535");
    mentions(problem_of(R"([568])"), "holds something else");
    mentions(problem_of(""), "not valid JSON");
    CHECK(problem_of(R"({"<x>": 568, "<y>": 569})", 569) != "");

    // the same in tokenizer.json, and where the two contradict each other
    const auto problem_of_list = [&](const std::string& list) {
        write_text(copy.folder / "tokenizer.json", "{\"added_tokens\": " + list + "}");
        return copy.problem(570);
    };
    fs::remove(path);
    CHECK(problem_of_list(
              R"([{"id": 568, "content": "<x>"}, {"id": 569, "content": "<y>", "lstrip": false}])") == "");
    mentions(
        problem_of_list(R"([{"id": 568, "content": "<x>"}, {"id": 569, "content": "<y>", "lstrip": true}])"),
        "the added token \"<y>\" has lstrip, which is not known here");
    for (const std::string flag : {"rstrip", "single_word"})
        mentions(problem_of_list(R"([{"id": 568, "content": "<x>"}, {"id": 569, "content": "<y>", ")" + flag +
                                 "\": true}]"),
                 "the added token \"<y>\" has " + flag);
    mentions(problem_of_list(R"([{"id": 568, "content": "<x>"}, {"id": 569, "content": "<x>"}])"),
             "gives \"<x>\" the id 569, but it has another already");
    for (const char* list : {"7", "{}", "[7]", "[{}]", R"([{"id": 568}])", R"([{"content": "<x>"}])",
                             R"([{"id": -1, "content": "<x>"}])", R"([{"id": 65536, "content": "<x>"}])",
                             R"([{"id": 1.5, "content": "<x>"}])", R"([{"id": 568, "content": 7}])"}) {
        INFO(list);
        mentions(problem_of_list(list), "added_tokens must");
    }
    write_text(path, R"({"<x>": 568})");
    mentions(problem_of_list(R"([{"id": 568, "content": "<other>"}])"), "which another added token has");
    mentions(problem_of_list(R"([{"id": 569, "content": "<x>"}])"), "has another already");
    write_text(copy.folder / "tokenizer.json", "{");
    mentions(copy.problem(570), "tokenizer.json is not valid JSON");
}

TEST_CASE("bad tokenizer.json, and such as are not of GPT-2's kind") {
    TempFolder folder;
    const std::string path = folder / "tokenizer.json";
    const nlohmann::json good = hf_json();
    const auto problem_of = [&](const std::string& text) {
        write_text(path, text);
        return error_of([&] { Tokenizer::gpt2(folder.path, kHfSize); });
    };
    const auto mentions = [&](const std::string& problem, const std::string& what) {
        INFO("message: ", problem);
        CHECK(problem.find(path) != std::string::npos);
        CHECK(problem.find(what) != std::string::npos);
    };
    CHECK(problem_of(good.dump()) == "");
    CHECK(has_vocabulary(folder.path));
    CHECK(foreign_tokenizer(folder.path) == "");
    CHECK(foreign_tokenizer(folder / "nowhere") == "");
    mentions(problem_of("{\"model\": " + std::string(17, '[') + std::string(17, ']') + "}"),
             "nested more than 16 levels deep");

    // another kind is no mistake, but no vocabulary either
    for (const auto& [object, key, value] : std::vector<std::tuple<const char*, const char*, nlohmann::json>>{
             {"model", "type", "Unigram"},
             {"model", "type", 7},
             {"model", "dropout", 0.1},
             {"model", "continuing_subword_prefix", "##"},
             {"model", "end_of_word_suffix", "</w>"},
             {"pre_tokenizer", "type", "Whitespace"},
             {"pre_tokenizer", "add_prefix_space", true},
             {"pre_tokenizer", "use_regex", false}}) {
        nlohmann::json json = good;
        json[object][key] = value;
        mentions(problem_of(json.dump()),
                 "is not of GPT-2's kind: its " + std::string(object) + " has " + key);
        CHECK(!has_vocabulary(folder.path));
        CHECK(foreign_tokenizer(folder.path).find(key) != std::string::npos);
    }
    for (const char* object : {"model", "pre_tokenizer"}) {
        nlohmann::json json = good;
        json.erase(object);
        mentions(problem_of(json.dump()), "is not of GPT-2's kind");
        json[object] = 7;
        mentions(problem_of(json.dump()), "is not of GPT-2's kind");
    }
    nlohmann::json json = good;
    json["normalizer"] = {{"type", "NFC"}};
    mentions(problem_of(json.dump()), "is not of GPT-2's kind: it has a normalizer");

    const auto problem_with = [&](const std::function<void(nlohmann::json&)>& spoil) {
        nlohmann::json spoilt = good;
        spoil(spoilt["model"]);
        return problem_of(spoilt.dump());
    };
    using Json = nlohmann::json;
    for (const Json& merge : {Json(7), Json(""), Json::array({"a"}), Json::array({"a", "b", "c"}),
                              Json::array({"a", 7}), Json("a b\nc d"), Json::object()})
        mentions(problem_with([&](Json& model) { model["merges"][3] = merge; }),
                 "the list of merges in " + path + " holds something else than");
    mentions(problem_with([](Json& model) { model["merges"][3] = "zq"; }), "is not a merge of two tokens");
    mentions(problem_with([](Json& model) {
                 model["merges"][3] = Json::array({"a b", "c"});
             }),
             "line 5 of the list of merges in " + path + " is not a merge");
    mentions(problem_with([](Json& model) { model["merges"].erase(310); }), "it is 566");
    mentions(problem_with([](Json& model) { model["merges"].push_back("z z"); }), "it is 568");
    mentions(problem_with([](Json& model) { model.erase("merges"); }), "its model has no list of merges");
    mentions(problem_with([](Json& model) { model["vocab"] = Json::array(); }), "its model must have vocab");
    mentions(problem_with([](Json& model) { model["vocab"] = Json::object(); }), "has 1 tokens, but 568");
    mentions(problem_with([](Json& model) { model["vocab"]["!"] = 1; }), "gives \"!\" the id 1, but");
    mentions(problem_with([](Json& model) { model["vocab"].erase("!"); }), "has 567 tokens, but 568");
    for (const Json& id : {Json(-1), Json(65536), Json(1.5), Json("0"), Json(nullptr), Json::array()})
        mentions(problem_with([&](Json& model) { model["vocab"]["!"] = id; }),
                 "gives \"!\" an id that is none from 0 to 65535");

    // what is no JSON of this kind at all is a mistake for whoever looks for a vocabulary too
    const std::string text = good.dump();
    for (const std::string& bad :
         {std::string(), std::string("{"), std::string("[]"), text.substr(0, text.size() / 2), text + "x",
          text + std::string(1, '\0'), std::string(1 << 20, '['), std::string(9 << 20, ' '),
          replaced(text, "\"!\":0", "\"!\":0,\"!\":0"),
          replaced(text, "\"normalizer\":null", "\"model\":null"),
          replaced(text, "\"!\":0", "\"!\":1e999")}) {
        INFO(bad.substr(0, 60));
        mentions(problem_of(bad), "");
        CHECK_THROWS_AS(has_vocabulary(folder.path), Error);
    }
}
