// Fuzzes the files of the tasks. What is read must be items that a model of the context and the vocabulary
// can score.
#include <filesystem>

#include "../llmc/tasks.h"
#include "fuzz.h"

namespace fs = std::filesystem;

// A few random edits: bytes, blocks removed, repeated or moved, and words of JSON and of the tasks put in.
static std::string mutate(std::string text, Random& rng) {
    static const std::vector<std::string> kWords = {"\"",
                                                    "\\",
                                                    "{",
                                                    "}",
                                                    "[",
                                                    "]",
                                                    ",",
                                                    ":",
                                                    " ",
                                                    "  ",
                                                    "\n",
                                                    "\\n",
                                                    "\\u0000",
                                                    "\\ud800",
                                                    "\\ud83d\\ude00",
                                                    "null",
                                                    "-1",
                                                    "4",
                                                    "1e99",
                                                    "99999999999999999999",
                                                    "\"text\": ",
                                                    "\"label\": ",
                                                    "\"ctx_b\": \"\"",
                                                    "\"endings\": []",
                                                    " [title]",
                                                    "[step]",
                                                    "\xC2\xA0",
                                                    "\\u3000",
                                                    "\xE2\x80\x94",
                                                    "\xFF",
                                                    "\xED\xA0\x80",
                                                    "<|endoftext|>",
                                                    std::string(1, '\0'),
                                                    std::string(100, '['),
                                                    std::string(300, 'a'),
                                                    std::string(300, ' ')};
    const auto place = [&] { return rng() % (text.size() + 1); };
    for (size_t edits = rng() % 4 + 1; edits > 0; edits--) {
        const size_t at = place(), length = std::min(text.size() - at, rng() % 60);
        switch (rng() % 7) {
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
                text.insert(place(), text.substr(at, length));
                break;
            case 4:
                if (rng() % 8 == 0) text.resize(at);
                break;
            default:
                text.insert(at, kWords[rng() % kWords.size()]);
        }
    }
    return text;
}

// What every reader promises.
static void check_items(const std::vector<Scored>& items, int T, int vocab_size, int choices) {
    if (items.empty() || items.size() % static_cast<size_t>(choices) != 0)
        throw std::logic_error("not a whole number of questions");
    for (size_t i = 0; i < items.size(); i++) {
        const Scored& item = items[i];
        const int size = static_cast<int>(item.tokens.size()), n = static_cast<int>(i);
        if (item.first < 1 || item.first >= size || size > T + 1)
            throw std::logic_error("an item does not fit into the context");
        for (const uint16_t token : item.tokens)
            if (token >= vocab_size) throw std::logic_error("a token outside the vocabulary came through");
        if (item.group != n / choices || item.choice != n % choices || !(item.norm >= 1))
            throw std::logic_error("an item is not where it says it is");
    }
    for (size_t i = 0; i < items.size(); i += static_cast<size_t>(choices)) {
        int right = 0;
        for (int c = 0; c < choices; c++) right += items[i + static_cast<size_t>(c)].right;
        if (right != 1) throw std::logic_error("a question has not one right answer");
    }
}

int main(int argc, char** argv) {
    Fuzzer fuzzer(argc, argv);
    Random& rng = fuzzer.rng;
    const fs::path fixtures = fs::path(__FILE__).parent_path() / "fixtures";
    const std::string files[] = {read_text(fixtures / "tasks/lambada.jsonl"),
                                 read_text(fixtures / "tasks/hellaswag.jsonl")};
    const std::string path = fuzzer.folder() + "/task.jsonl";
    const Tokenizer tokenizers[] = {Tokenizer::bytes(),
                                    Tokenizer::gpt2((fixtures / "tiny_bpe").string(), 568)};
    fuzzer.run([&] {
        const bool hellaswag = rng() % 2;
        const Tokenizer& tokenizer = tokenizers[rng() % 2];
        const int T = rng() % 2 ? 1024 : 1 + static_cast<int>(rng() % 80);
        write_text(path, mutate(files[hellaswag], rng));
        fuzzer.attempt(path, [&] {
            const auto items =
                hellaswag ? read_hellaswag(path, tokenizer, T) : read_lambada(path, tokenizer, T);
            check_items(items, T, tokenizer.vocab_size(), hellaswag ? 4 : 1);
        });
    });
    return fuzzer.finish();
}
