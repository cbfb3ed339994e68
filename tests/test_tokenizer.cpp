// The tokenizer against tiktoken's tokens (fixtures/tiny_bpe/golden.jsonl, made by the script beside it),
// against a plain quadratic merge, and against bad vocabulary files. The cases that need GPT-2's own
// vocabulary look for it in $DATA_MIRROR, at any depth, and then in data/, and say so when they are skipped.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "../llmc/tokenizer.h"

#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <thread>

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
        try {
            Tokenizer::gpt2(folder.string(), size);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
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
        std::string problem;
        try {
            Tokenizer::gpt2(copy.folder.string(), kTinySize);
        } catch (const Error& error) {
            problem = error.what();
        }
        CHECK(problem.find("there is no vocab.bpe") != std::string::npos);
    }
    SUBCASE("Hugging Face's names") {
        fs::rename(copy.folder / "vocab.bpe", copy.folder / "merges.txt");
        fs::rename(copy.folder / "encoder.json", copy.folder / "vocab.json");
        CHECK(Tokenizer::gpt2(copy.folder.string(), kTinySize).encode("the dog").size() < 7);
    }
}
