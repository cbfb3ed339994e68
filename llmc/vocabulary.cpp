#include "vocabulary.h"

#include <algorithm>
#include <set>
#include <unordered_set>
#include <utility>
#include <vector>

#include "error.h"
#include "files.h"
#include "json_file.h"

namespace {

constexpr size_t kMaxFileBytes = 64u << 20;      // GPT-2's encoder.json is 1 MB
constexpr size_t kMaxTokenizerBytes = 8u << 20;  // 65536 tokens take 5 MB of tokenizer.json
constexpr size_t kMaxAddedBytes = 512;           // of one token

// The text of a vocabulary file.
std::string read_text_file(const std::string& path, size_t max_bytes = kMaxFileBytes) {
    const MappedFile file(path);
    if (file.size() > max_bytes)
        fail("%s has %zu bytes, too many for a GPT-2 vocabulary file", path.c_str(), file.size());
    return {reinterpret_cast<const char*>(file.data()), file.size()};
}

// encoder.json: one flat object, word -> id. Reading it as events finds duplicate words (a DOM would keep the
// last) and never builds what an unexpected file might hold.
class WordsReader : public nlohmann::json_sax<nlohmann::json> {
  public:
    std::unordered_map<std::string, uint32_t> ids;
    std::string problem;

    bool key(string_t& word) override {
        word_ = word;
        return true;
    }
    bool number_unsigned(number_unsigned_t id) override {
        if (!inside_) return wrong("is not an object");
        if (id > UINT16_MAX)
            return wrong(format("gives an id above 65535 (%ju)", static_cast<uintmax_t>(id)));
        if (!ids.emplace(word_, static_cast<uint32_t>(id)).second) {
            return wrong(format("has the word \"%s\" twice", printable(word_).c_str()));
        }
        return true;
    }
    bool start_object(size_t) override {
        if (inside_) return wrong("has an object inside its object");
        return inside_ = true;
    }
    bool end_object() override { return true; }
    bool null() override { return not_an_id(); }
    bool boolean(bool) override { return not_an_id(); }
    bool number_integer(number_integer_t) override { return not_an_id(); }
    bool number_float(number_float_t, const string_t&) override { return not_an_id(); }
    bool string(string_t&) override { return not_an_id(); }
    bool binary(binary_t&) override { return not_an_id(); }
    bool start_array(size_t) override { return not_an_id(); }
    bool end_array() override { return not_an_id(); }
    bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
        return wrong(format("is not valid JSON at byte %zu", position));
    }

  private:
    bool wrong(const std::string& what) {
        problem = what;
        return false;
    }
    bool not_an_id() { return wrong("holds something else than words and their ids"); }

    std::string word_;
    bool inside_ = false;
};

// tokenizer.json. What is not looked at here is dropped while it is read, and a key that an object has twice
// is an error, for then two readers might take two different values.
nlohmann::json read_tokenizer_json(const std::string& path) {
    using Event = nlohmann::json::parse_event_t;
    const std::string text = read_text_file(path, kMaxTokenizerBytes);
    static const std::set<std::string> wanted = {"added_tokens", "normalizer", "pre_tokenizer", "model"};
    std::vector<std::unordered_set<std::string>> keys;  // by depth, of the objects that are open
    return parse_json_object(path, text, 16, [&](int depth, Event event, const nlohmann::json& parsed) {
        const auto level = static_cast<size_t>(depth);
        if (event == Event::object_start) {
            keys.resize(std::max(keys.size(), level + 1));
            keys[level].clear();
        }
        if (event != Event::key) return true;
        const std::string& key = parsed.get_ref<const std::string&>();
        if (!keys[level - 1].insert(key).second)
            fail("%s has \"%s\" twice in one object", path.c_str(), printable(key).c_str());
        return depth > 1 || wanted.contains(key);
    });
}

// The lines of vocab.bpe but the first, "#version: 0.2", which may be missing.
int64_t count_merges(const std::string& merges) {
    const int64_t lines = std::count(merges.begin(), merges.end(), '\n');
    return lines + (!merges.empty() && !merges.ends_with('\n')) - merges.starts_with("#version");
}

// A member of a member, null where there is none.
const nlohmann::json& member(const nlohmann::json& root, const char* object, const char* key) {
    static const nlohmann::json none;
    const auto outer = root.find(object);
    if (outer == root.end() || !outer->is_object()) return none;
    const auto inner = outer->find(key);
    return inner == outer->end() ? none : *inner;
}

// Why a tokenizer.json does not make GPT-2's tokens (byte-level BPE, text cut by GPT-2's pattern), or "". A
// model whose type is not named is BPE if it has merges, as for the library itself.
std::string tokenizer_kind_problem(const nlohmann::json& root) {
    const auto is = [&](const char* object, const char* key, std::initializer_list<nlohmann::json> allowed) {
        const nlohmann::json& value = member(root, object, key);
        if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return std::string();
        return format("its %s has %s %s", object, key, printable(json_text(value)).c_str());
    };
    if (root.contains("normalizer") && !root["normalizer"].is_null()) return "it has a normalizer";
    if (!member(root, "model", "merges").is_array()) return "its model has no list of merges";
    for (const std::string& problem :
         {is("model", "type", {nullptr, "BPE"}), is("pre_tokenizer", "type", {"ByteLevel"}),
          is("pre_tokenizer", "add_prefix_space", {nullptr, false}),
          is("pre_tokenizer", "use_regex", {nullptr, true}), is("model", "dropout", {nullptr, 0.0}),
          is("model", "continuing_subword_prefix", {nullptr, ""}),
          is("model", "end_of_word_suffix", {nullptr, ""})})
        if (!problem.empty()) return problem;
    return "";
}

// The tokens of tokenizer.json's "added_tokens", which may be none.
std::vector<std::pair<uint32_t, std::string>> added_tokens_of(const nlohmann::json& root,
                                                              const std::string& path) {
    std::vector<std::pair<uint32_t, std::string>> tokens;
    const auto list = root.find("added_tokens");
    if (list == root.end() || list->is_null()) return tokens;
    if (!list->is_array()) fail("%s: added_tokens must be a list", path.c_str());
    for (const nlohmann::json& entry : *list) {
        if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_unsigned() ||
            entry["id"].get<uint64_t>() > UINT16_MAX || !entry.contains("content") ||
            !entry["content"].is_string())
            fail("%s: each of added_tokens must have an id, from 0 to 65535, and its content", path.c_str());
        const std::string content = entry["content"].get<std::string>();
        // With these, encoding would swallow the white space around a token, or depend on what is there.
        for (const char* flag : {"lstrip", "rstrip", "single_word"})
            if (entry.contains(flag) && entry[flag] != false)
                fail("%s: the added token \"%s\" has %s, which is not known here", path.c_str(),
                     printable(content).c_str(), flag);
        tokens.emplace_back(entry["id"].get<uint32_t>(), content);
    }
    return tokens;
}

// The two files that a tokenizer.json stands for.
VocabularyText vocabulary_of(const nlohmann::json& root, const std::string& path) {
    if (const std::string problem = tokenizer_kind_problem(root); !problem.empty())
        fail("%s is not of GPT-2's kind: %s", path.c_str(), problem.c_str());
    const nlohmann::json &words = member(root, "model", "vocab"), &merges = member(root, "model", "merges");
    if (!words.is_object()) fail("%s: its model must have vocab, an object", path.c_str());
    VocabularyText text;
    text.words_name = "the vocab in " + path;
    text.merges_name = "the list of merges in " + path;

    std::vector<std::pair<uint32_t, std::string>> sorted;
    for (const auto& [word, id] : words.items()) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() > UINT16_MAX)
            fail("%s gives \"%s\" an id that is none from 0 to 65535", text.words_name.c_str(),
                 printable(word).c_str());
        sorted.emplace_back(id.get<uint32_t>(), word);
    }
    // <|endoftext|> may stand among the added tokens only.
    if (!words.contains(kEndOfText))
        for (const auto& [id, token] : added_tokens_of(root, path))
            if (token == kEndOfText) sorted.emplace_back(id, token);
    std::sort(sorted.begin(), sorted.end());
    for (const auto& [id, word] : sorted)
        text.words +=
            (text.words.empty() ? "{" : ", ") + json_text(nlohmann::json(word)) + ": " + std::to_string(id);
    text.words += text.words.empty() ? "{}" : "}";

    text.merges = "#version: 0.2\n";
    for (const nlohmann::json& merge : merges) {
        std::string line;
        if (merge.is_string())
            line = merge.get<std::string>();
        else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
            line = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
        if (line.empty() || line.find('\n') != std::string::npos)
            fail("%s holds something else than \"LEFT RIGHT\" and [\"LEFT\", \"RIGHT\"]",
                 text.merges_name.c_str());
        text.merges += line + "\n";
    }
    return text;
}

// The tokens that tokenizer.json and added_tokens.json of a folder add.
std::map<uint32_t, std::string> read_added_tokens(const std::string& folder) {
    std::map<uint32_t, std::string> added;
    std::map<std::string, uint32_t> id_of;
    const auto add = [&](uint32_t id, const std::string& token, const std::string& path) {
        if (token.empty() || token.size() > kMaxAddedBytes)
            fail("%s adds a token of %zu bytes; 1 to %zu are allowed", path.c_str(), token.size(),
                 kMaxAddedBytes);
        if (added.emplace(id, token).first->second != token)
            fail("%s gives \"%s\" the id %u, which another added token has", path.c_str(),
                 printable(token).c_str(), id);
        if (id_of.emplace(token, id).first->second != id)
            fail("%s gives \"%s\" the id %u, but it has another already", path.c_str(),
                 printable(token).c_str(), id);
    };
    if (const std::string path = folder + "/tokenizer.json"; is_file(path))
        for (const auto& [id, token] : added_tokens_of(read_tokenizer_json(path), path)) add(id, token, path);
    if (const std::string path = folder + "/added_tokens.json"; is_file(path))
        for (const auto& [token, id] : read_words(read_text_file(path), path)) add(id, token, path);
    return added;
}

}  // namespace

std::string foreign_tokenizer(const std::string& folder) {
    const std::string path = folder + "/tokenizer.json";
    return is_file(path) ? tokenizer_kind_problem(read_tokenizer_json(path)) : "";
}

// The two files in a folder, of one kind of names; false if no pair is complete.
static bool find_pair(const std::string& folder, std::string& words, std::string& merges) {
    for (const auto& [w, m] :
         {std::pair{"/encoder.json", "/vocab.bpe"}, std::pair{"/vocab.json", "/merges.txt"}}) {
        words = folder + w;
        merges = folder + m;
        if (is_file(words) && is_file(merges)) return true;
    }
    return false;
}

bool has_vocabulary(const std::string& folder) {
    std::string words, merges;
    return find_pair(folder, words, merges) ||
           (is_file(folder + "/tokenizer.json") && foreign_tokenizer(folder).empty());
}

VocabularyText read_vocabulary(const std::string& folder, int vocab_size) {
    VocabularyText text;
    const std::string tokenizer = folder + "/tokenizer.json";
    if (find_pair(folder, text.words_name, text.merges_name)) {
        text.words = read_text_file(text.words_name);
        text.merges = read_text_file(text.merges_name);
    } else if (is_file(tokenizer)) {
        text = vocabulary_of(read_tokenizer_json(tokenizer), tokenizer);
    } else {
        fail(
            "there is no GPT-2 vocabulary in %s (encoder.json and vocab.bpe, or vocab.json and merges.txt, or "
            "tokenizer.json): data/fetch gpt2 gets it",
            folder.c_str());
    }
    text.folder = folder;
    if (257 + count_merges(text.merges) < vocab_size) text.added = read_added_tokens(folder);
    return text;
}

std::unordered_map<std::string, uint32_t> read_words(const std::string& text, const std::string& name) {
    WordsReader reader;
    if (!scan_json(text, reader)) fail("%s %s", name.c_str(), reader.problem.c_str());
    return std::move(reader.ids);
}

void write_vocabulary(const std::string& folder, const VocabularyText& text) {
    write_file(folder + "/vocab.json", text.words);
    write_file(folder + "/merges.txt", text.merges);
    nlohmann::json added = nlohmann::json::object();
    for (const auto& [id, token] : text.added)
        if (token != kEndOfText) added[token] = id;
    if (!added.empty()) write_file(folder + "/added_tokens.json", json_text(added, 2) + "\n");
}
