#include "tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <queue>
#include <set>
#include <unordered_map>

#include "error.h"
#include "files.h"
#include "vocabulary.h"

namespace bpe {

namespace {

constexpr size_t kMaxTokenBytes = 512;  // GPT-2's longest is 128; bounds the work of loading
constexpr uint32_t kNoToken = UINT32_MAX;
constexpr size_t kLinearPiece = 48;  // longer pieces are merged with a heap

}  // namespace

// ---------------------------------------------------------------------------------------------------------
// UTF-8

int utf8_length(const char* p, const char* end) {
    auto u = [&](int i) { return static_cast<unsigned char>(p[i]); };
    auto follows = [&](int i) { return p + i < end && (u(i) & 0xC0) == 0x80; };
    if (p >= end) return 0;
    const unsigned char c = u(0);
    if (c < 0x80) return 1;
    if (c < 0xC2 || c > 0xF4 || !follows(1)) return 0;
    if (c < 0xE0) return 2;
    if ((c == 0xE0 && u(1) < 0xA0) || (c == 0xED && u(1) > 0x9F) || !follows(2)) return 0;
    if (c < 0xF0) return 3;
    if ((c == 0xF0 && u(1) < 0x90) || (c == 0xF4 && u(1) > 0x8F) || !follows(3)) return 0;
    return 4;
}

size_t valid_prefix(std::string_view text) {
    const char *p = text.data(), *end = p + text.size();
    while (p < end) {
        uint64_t eight;
        if (end - p >= 8 && (std::memcpy(&eight, p, 8), (eight & 0x8080808080808080u) == 0)) {
            p += 8;
            continue;
        }
        const int n = utf8_length(p, end);
        if (n == 0) break;
        p += n;
    }
    return static_cast<size_t>(p - text.data());
}

// ---------------------------------------------------------------------------------------------------------
// The vocabulary

namespace {

// The vocabulary's files write each byte as a printable character: the printable ones of Latin-1 stand for
// themselves, the other 68 are U+0100, U+0101, ... in order. Ids 0..255 are the bytes in the order of these
// characters.
struct ByteAlphabet {
    uint8_t byte_of_id[256];
    static constexpr int kChars = 324;  // U+0143 is the last of the 68
    int byte_of_char[kChars];           // -1 where the character stands for no byte

    ByteAlphabet() {
        std::fill(std::begin(byte_of_char), std::end(byte_of_char), -1);
        auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b != 173); };
        int id = 0;
        for (int b = 0; b < 256; b++) {
            if (!printable(b)) continue;
            byte_of_char[b] = b;
            byte_of_id[id++] = static_cast<uint8_t>(b);
        }
        for (int b = 0, c = 256; b < 256; b++) {
            if (printable(b)) continue;
            byte_of_char[c++] = b;
            byte_of_id[id++] = static_cast<uint8_t>(b);
        }
    }

    // The bytes that a word of the files stands for; false where a character stands for none.
    bool to_bytes(std::string_view word, std::string& out) const {
        out.clear();
        for (size_t i = 0; i < word.size();) {
            const auto c = static_cast<unsigned char>(word[i]);
            const int n = utf8_length(word.data() + i, word.data() + word.size());
            const int code = n == 1 ? c : n == 2 ? (c & 31) << 6 | (word[i + 1] & 63) : kChars;
            if (n == 0 || code >= kChars || byte_of_char[code] < 0) return false;
            out += static_cast<char>(byte_of_char[code]);
            i += static_cast<size_t>(n);
        }
        return true;
    }
};

}  // namespace

class Vocabulary {
  public:
    Vocabulary(const VocabularyText& text, int expected) : serial(next_serial()) {
        bytes_.reserve(static_cast<size_t>(expected));  // so that views of its strings stay valid
        load_merges(text, expected);
        end_of_text_ = static_cast<uint32_t>(size());
        bytes_.emplace_back(kEndOfText);  // not in ids_: in text it is plain text
        add_special(end_of_text_);
        load_added(text, expected);
        check_words(text);
        index_pairs();
        compile_pattern();
    }

    int size() const { return static_cast<int>(bytes_.size()); }
    uint32_t end_of_text() const { return end_of_text_; }
    const std::string& bytes(uint32_t id) const { return bytes_[id]; }
    uint32_t id_of(std::string_view piece) const {
        const auto found = ids_.find(piece);
        return found == ids_.end() ? kNoToken : found->second;
    }

    // The special token (<|endoftext|> or an added one) that a text begins with, the longest if there are
    // several, or kNoToken.
    uint32_t special_at(std::string_view text) const {
        if (!special_first_[static_cast<unsigned char>(text[0])]) return kNoToken;
        for (const size_t length : special_lengths_) {
            if (length > text.size()) continue;
            if (const auto found = specials_.find(text.substr(0, length)); found != specials_.end())
                return found->second;
        }
        return kNoToken;
    }

    // The token that two adjacent tokens merge into, which is also the rank of that merge.
    uint32_t merged(uint32_t left, uint32_t right) const {
        const uint32_t key = left << 16 | right;
        for (uint32_t slot = hash(key);; slot = (slot + 1) & mask_) {
            if (pairs_[slot].token == kNoToken || pairs_[slot].key == key) return pairs_[slot].token;
        }
    }

    const pcre2_code* pattern() const { return pattern_.get(); }

    const uint64_t serial;  // distinguishes vocabularies in the per-thread caches

  private:
    struct Pair {
        uint32_t key = 0;
        uint32_t token = kNoToken;
    };

    static uint64_t next_serial() {
        static std::atomic<uint64_t> count{0};
        return ++count;
    }

    uint32_t hash(uint32_t key) const { return (key * 0x9E3779B1u) >> shift_; }

    void add(const std::string& token) {
        bytes_.push_back(token);
        ids_.emplace(bytes_.back(), static_cast<uint32_t>(bytes_.size() - 1));
    }

    void add_special(uint32_t id) {
        const std::string& token = bytes_[id];
        specials_.emplace(token, id);
        special_lengths_.insert(token.size());
        special_first_[static_cast<unsigned char>(token[0])] = true;
    }

    // vocab.bpe: a "#version" line, then the merges, "left right", in order of rank. The merge on line i
    // makes token 256 + i.
    void load_merges(const VocabularyText& files, int expected) {
        const std::string_view text = files.merges;
        const std::string& path = files.merges_name;
        const ByteAlphabet alphabet;
        ids_.reserve(static_cast<size_t>(expected));
        for (int id = 0; id < 256; id++) add(std::string(1, static_cast<char>(alphabet.byte_of_id[id])));

        std::string left, right;
        int line_number = 0;
        for (size_t at = 0; at < text.size();) {
            const size_t newline = std::min(text.find('\n', at), text.size());
            const std::string_view line = text.substr(at, newline - at);
            at = newline + 1;
            if (++line_number == 1 && line.starts_with("#version")) continue;
            const size_t space = line.find(' ');
            if (space == std::string_view::npos || !alphabet.to_bytes(line.substr(0, space), left) ||
                !alphabet.to_bytes(line.substr(space + 1), right) || left.empty() || right.empty()) {
                fail("line %d of %s is not a merge of two tokens", line_number, path.c_str());
            }
            if (!ids_.contains(left) || !ids_.contains(right)) {
                fail("line %d of %s merges a token that no line before it makes", line_number, path.c_str());
            }
            const std::string token = left + right;
            if (ids_.contains(token)) {
                fail("line %d of %s makes a token that exists already", line_number, path.c_str());
            }
            if (token.size() > kMaxTokenBytes) {
                fail("line %d of %s makes a token of %zu bytes; %zu is the limit", line_number, path.c_str(),
                     token.size(), kMaxTokenBytes);
            }
            if (size() + 1 >= expected) {
                fail("%s has more than the %d merges of a vocabulary of %d tokens", path.c_str(),
                     expected - 257, expected);
            }
            add(token);
        }
    }

    // The added tokens, which must fill the ids from the merges' last to the end.
    void load_added(const VocabularyText& text, int expected) {
        const int first = size();
        if (first < expected && (text.added.empty() || text.added.rbegin()->first <= end_of_text_)) {
            fail("%s has %d merges, but a vocabulary of %d tokens has %d, or added tokens beside them",
                 text.merges_name.c_str(), first - 257, expected, expected - 257);
        }
        for (const auto& [id, token] : text.added) {
            if (token == kEndOfText) {
                if (id == end_of_text_) continue;
                fail("the tokens added in %s give \"%s\" the id %u, but by %s it is %u", text.folder.c_str(),
                     token.c_str(), id, text.merges_name.c_str(), end_of_text_);
            }
            if (id != static_cast<uint32_t>(size()) || size() == expected) {
                fail("the tokens added in %s must be those from %d to %d, without a gap, and %u is \"%s\"",
                     text.folder.c_str(), first, expected - 1, id, printable(token).c_str());
            }
            bytes_.push_back(token);
            add_special(id);
        }
        if (size() < expected) {
            fail("the tokens added in %s end at %d, but a vocabulary of %d tokens has them to %d",
                 text.folder.c_str(), size() - 1, expected, expected - 1);
        }
    }

    // encoder.json must hold the same tokens under the ids that the merges' order gives them. Added tokens
    // may stand among them.
    void check_words(const VocabularyText& text) {
        const std::string& path = text.words_name;
        const ByteAlphabet alphabet;
        std::string token;
        size_t ordinary = 0;
        for (const auto& [word, id] : read_words(text.words, path)) {
            if (id > end_of_text_ && id < bytes_.size() && bytes_[id] == word) continue;
            ordinary++;
            const bool special = word == kEndOfText;
            if (!special && !alphabet.to_bytes(word, token)) {
                fail("the word \"%s\" of %s holds a character that stands for no byte",
                     printable(word).c_str(), path.c_str());
            }
            const uint32_t expected = special ? end_of_text_ : id_of(token);
            if (id != expected) {
                fail("%s gives \"%s\" the id %u, but by %s it is %s", path.c_str(), printable(word).c_str(),
                     id, text.merges_name.c_str(),
                     expected == kNoToken ? "no token" : std::to_string(expected).c_str());
            }
        }
        if (ordinary != end_of_text_ + 1)
            fail("%s has %zu tokens, but %u are expected", path.c_str(), ordinary, end_of_text_ + 1);
    }

    // tiktoken merges two tokens whenever their bytes together are a token, whichever pair first made that
    // token: so every way of cutting a token in two is a pair.
    void index_pairs() {
        std::vector<Pair> found;
        for (uint32_t id = 256; id < end_of_text_; id++) {
            const std::string_view token = bytes_[id];
            for (size_t cut = 1; cut < token.size(); cut++) {
                const uint32_t left = id_of(token.substr(0, cut));
                if (left == kNoToken) continue;
                const uint32_t right = id_of(token.substr(cut));
                if (right != kNoToken) found.push_back({left << 16 | right, id});
            }
        }
        int bits = 4;
        while ((size_t{1} << bits) < 2 * found.size()) bits++;
        shift_ = 32 - bits;
        mask_ = (uint32_t{1} << bits) - 1;
        pairs_.resize(size_t{1} << bits);
        for (const Pair& pair : found) {
            uint32_t slot = hash(pair.key);
            while (pairs_[slot].token != kNoToken) slot = (slot + 1) & mask_;
            pairs_[slot] = pair;
        }
    }

    void compile_pattern() {
        const std::string space =
            "\\t-\\r \\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
        const std::string letter =
            "\\p{L}\\x{1C89}\\x{1C8A}\\x{A7CB}-\\x{A7CD}\\x{A7DA}-\\x{A7DC}\\x{105C0}-\\x{105F3}\\x{10D4A}-"
            "\\x{10D65}"
            "\\x{10D6F}-\\x{10D85}\\x{10EC2}-\\x{10EC4}\\x{1123F}\\x{11240}\\x{11380}-\\x{11389}\\x{1138B}"
            "\\x{1138E}"
            "\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}\\x{113D3}\\x{11BC0}-\\x{11BE0}\\x{11F02}\\x{11F04}-"
            "\\x{11F10}"
            "\\x{11F12}-\\x{11F33}\\x{1342F}\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}\\x{16100}-\\x{1611D}"
            "\\x{16D40}-\\x{16D6C}\\x{18CFF}\\x{1B132}\\x{1B155}\\x{1DF25}-\\x{1DF2A}\\x{1E030}-\\x{1E06D}"
            "\\x{1E4D0}-\\x{1E4EB}\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}\\x{2B739}\\x{2EBF0}-\\x{2EE5D}\\x{31350}-"
            "\\x{323AF}";
        const std::string number =
            "\\p{N}\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}\\x{11F50}-\\x{11F59}"
            "\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}\\x{1CCF0}-\\x{1CCF9}\\x{1D2C0}-\\x{1D2D3}\\x{1E4F0}-"
            "\\x{1E4F9}"
            "\\x{1E5F1}-\\x{1E5FA}";
        const std::string text = "'(?:[sdmt]|ll|ve|re)| ?[" + letter + "]+| ?[" + number + "]+| ?[^" + space +
                                 letter + number + "]+|[" + space + "]+(?![^" + space + "])|[" + space + "]+";
        int error = 0;
        PCRE2_SIZE offset = 0;
        pattern_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                     PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
        if (!pattern_) fail("the PCRE2 library cannot compile GPT-2's pattern (its error %d)", error);
        pcre2_jit_compile(pattern_.get(), PCRE2_JIT_COMPLETE);  // without JIT, matching is only slower
    }

    std::vector<std::string> bytes_;                      // of each id
    std::unordered_map<std::string_view, uint32_t> ids_;  // of the bytes and what merges make
    uint32_t end_of_text_ = 0;
    std::unordered_map<std::string_view, uint32_t> specials_;  // <|endoftext|> and the added tokens
    std::set<size_t, std::greater<>> special_lengths_;
    bool special_first_[256] = {};  // whether a special token begins with this byte
    std::vector<Pair> pairs_;       // open addressing, at most half full
    uint32_t mask_ = 0;
    int shift_ = 0;
    std::unique_ptr<pcre2_code, void (*)(pcre2_code*)> pattern_{nullptr, pcre2_code_free};
};

// ---------------------------------------------------------------------------------------------------------
// Encoding

namespace {

// What a thread keeps between pieces: match data, and a direct-mapped cache of short pieces (2 MB).
class Encoder {
  public:
    static Encoder& of(const Vocabulary& vocabulary) {
        static thread_local Encoder encoder;
        if (encoder.serial_ != vocabulary.serial) {
            encoder.cache_.assign(kSlots, Slot{});
            encoder.serial_ = vocabulary.serial;
        }
        return encoder;
    }

    void encode(const Vocabulary& v, std::string_view text, std::vector<uint16_t>& out) {
        while (!text.empty()) {
            const size_t valid = valid_prefix(text);
            encode_valid(v, text.substr(0, valid), out);
            text.remove_prefix(valid);
            size_t invalid = 0;
            while (invalid < text.size() &&
                   utf8_length(text.data() + invalid, text.data() + text.size()) == 0) {
                invalid++;
            }
            if (invalid > 0) encode_piece(v, text.substr(0, invalid), out);
            text.remove_prefix(invalid);
        }
    }

  private:
    static constexpr size_t kSlots = size_t{1} << 15;
    struct Slot {
        uint8_t length = 0;  // of the piece; 0 is an empty slot
        uint8_t count = 0;   // of its tokens
        char piece[30] = {};
        uint16_t tokens[16] = {};
    };

    void encode_valid(const Vocabulary& v, std::string_view text, std::vector<uint16_t>& out) {
        const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
        for (size_t at = 0; at < text.size();) {
            const int rc =
                pcre2_match(v.pattern(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, match_.get(), nullptr);
            if (rc < 0) fail("the PCRE2 library failed on a text (its error %d)", rc);
            // Every character is in one of the pattern's classes, so the pieces leave no gap.
            const size_t end = pcre2_get_ovector_pointer(match_.get())[1];
            encode_piece(v, text.substr(at, end - at), out);
            at = end;
        }
    }

    void encode_piece(const Vocabulary& v, std::string_view piece, std::vector<uint16_t>& out) {
        if (piece.size() > sizeof(Slot::piece)) {
            merge(v, piece, out);
            return;
        }
        Slot& slot = cache_[slot_of(piece)];
        if (slot.length == piece.size() && std::memcmp(slot.piece, piece.data(), piece.size()) == 0) {
            out.insert(out.end(), slot.tokens, slot.tokens + slot.count);
            return;
        }
        const size_t before = out.size();
        merge(v, piece, out);
        const size_t count = out.size() - before;
        if (count > std::size(slot.tokens)) return;
        slot.length = static_cast<uint8_t>(piece.size());
        slot.count = static_cast<uint8_t>(count);
        std::memcpy(slot.piece, piece.data(), piece.size());
        std::copy(out.end() - static_cast<ptrdiff_t>(count), out.end(), slot.tokens);
    }

    static size_t slot_of(std::string_view piece) {
        uint64_t h = piece.size();
        for (size_t i = 0; i < piece.size(); i += 8) {
            uint64_t word = 0;
            std::memcpy(&word, piece.data() + i, std::min<size_t>(8, piece.size() - i));
            h = (h ^ word) * 0x9E3779B97F4A7C15u;
            h ^= h >> 29;
        }
        return static_cast<size_t>((h * 0x9E3779B97F4A7C15u) >> 49);
    }

    void merge(const Vocabulary& v, std::string_view piece, std::vector<uint16_t>& out) {
        const uint32_t whole = v.id_of(piece);
        if (whole != kNoToken) {
            out.push_back(static_cast<uint16_t>(whole));
        } else if (piece.size() <= kLinearPiece) {
            merge_linear(v, piece, out);
        } else {
            merge_heap(v, piece, out);
        }
    }

    // Looks at every pair before each merge: the fastest way for a word.
    void merge_linear(const Vocabulary& v, std::string_view piece, std::vector<uint16_t>& out) {
        uint32_t id[kLinearPiece], rank[kLinearPiece];  // rank[i]: of the pair (i, i+1)
        size_t n = piece.size();
        for (size_t i = 0; i < n; i++) id[i] = v.id_of(piece.substr(i, 1));
        for (size_t i = 0; i + 1 < n; i++) rank[i] = v.merged(id[i], id[i + 1]);
        while (n > 1) {
            const size_t i = static_cast<size_t>(std::min_element(rank, rank + n - 1) - rank);
            if (rank[i] == kNoToken) break;
            id[i] = rank[i];
            std::copy(id + i + 2, id + n, id + i + 1);
            std::copy(rank + i + 1, rank + n - 1, rank + i);
            n--;
            if (i > 0) rank[i - 1] = v.merged(id[i - 1], id[i]);
            if (i + 1 < n) rank[i] = v.merged(id[i], id[i + 1]);
        }
        for (size_t i = 0; i < n; i++) out.push_back(static_cast<uint16_t>(id[i]));
    }

    // The same merges in n log n: a heap of pairs by (rank, position) over a linked list. A pair that a merge
    // has changed stays in the heap and is skipped when it comes up.
    void merge_heap(const Vocabulary& v, std::string_view piece, std::vector<uint16_t>& out) {
        if (piece.size() >= UINT32_MAX) fail("a text holds a run of 4 GiB that no rule cuts into pieces");
        const auto n = static_cast<uint32_t>(piece.size());
        std::vector<uint32_t> id(n), next(n), previous(n);
        std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap;
        const auto rank_at = [&](uint32_t i) {
            return next[i] < n ? v.merged(id[i], id[next[i]]) : kNoToken;
        };
        const auto push = [&](uint32_t i) {
            const uint32_t rank = rank_at(i);
            if (rank != kNoToken) heap.push(uint64_t{rank} << 32 | i);
        };
        for (uint32_t i = 0; i < n; i++) {
            id[i] = v.id_of(piece.substr(i, 1));
            next[i] = i + 1;
            previous[i] = i - 1;  // wraps for the first, which is never asked
        }
        for (uint32_t i = 0; i + 1 < n; i++) push(i);
        while (!heap.empty()) {
            const uint64_t top = heap.top();
            heap.pop();
            const auto i = static_cast<uint32_t>(top);
            if (id[i] == kNoToken || rank_at(i) != top >> 32) continue;
            const uint32_t gone = next[i];
            id[i] = static_cast<uint32_t>(top >> 32);
            id[gone] = kNoToken;
            next[i] = next[gone];
            if (next[i] < n) previous[next[i]] = i;
            push(i);
            if (i > 0) push(previous[i]);
        }
        for (uint32_t i = 0; i < n; i = next[i]) out.push_back(static_cast<uint16_t>(id[i]));
    }

    uint64_t serial_ = 0;
    std::vector<Slot> cache_;
    std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match_{pcre2_match_data_create(1, nullptr),
                                                                          pcre2_match_data_free};
};

}  // namespace

}  // namespace bpe

int Tokenizer::vocab_size() const {
    return bpe_ ? bpe_->size() : kByteVocab;
}

int Tokenizer::eot() const {
    return bpe_ ? static_cast<int>(bpe_->end_of_text()) : kByteVocab - 1;
}

Tokenizer Tokenizer::gpt2(const std::string& folder, int vocab_size) {
    if (vocab_size < 257 || vocab_size > 65536)
        fail("a vocabulary has 257 to 65536 tokens, not %d", vocab_size);
    return Tokenizer(
        std::make_shared<const bpe::Vocabulary>(read_vocabulary(folder, vocab_size), vocab_size));
}

Tokenizer Tokenizer::for_vocab(int vocab_size, const std::string& gpt2_folder) {
    if (vocab_size == kByteVocab) return bytes();
    if (vocab_size == kGpt2Vocab) return gpt2(gpt2_folder);
    fail("there is no tokenizer for a vocabulary of %d tokens: %d is bytes, %d is GPT-2's", vocab_size,
         kByteVocab, kGpt2Vocab);
}

std::vector<uint16_t> Tokenizer::encode(std::string_view text) const {
    std::vector<uint16_t> tokens;
    append(text, tokens);
    return tokens;
}

std::vector<uint16_t> Tokenizer::encode_special(std::string_view text) const {
    std::vector<uint16_t> tokens;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        const uint32_t token = special_at(text.substr(at));
        if (token == bpe::kNoToken) {
            at++;
            continue;
        }
        append(text.substr(begin, at - begin), tokens);
        tokens.push_back(static_cast<uint16_t>(token));
        begin = at += bpe_ ? bpe_->bytes(token).size() : kEndOfText.size();
    }
    append(text.substr(begin), tokens);
    return tokens;
}

void Tokenizer::append(std::string_view text, std::vector<uint16_t>& tokens) const {
    if (bpe_) {
        bpe::Encoder::of(*bpe_).encode(*bpe_, text, tokens);
    } else {
        for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    }
}

bool Tokenizer::may_cut(std::string_view text, size_t at) {
    if (at == 0 || at >= text.size()) return true;
    const auto is_space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
    if (!is_space(text[at]) || is_space(text[at - 1])) return false;
    const auto last = static_cast<unsigned char>(text[at - 1]);
    if (last < 0x80) return true;
    // Other white space ends in these bytes, as other characters do too: those places are passed over.
    if (last == 0x85 || last == 0xA0) return false;
    for (const std::string_view lead : {"\xE1\x9A", "\xE2\x80", "\xE2\x81", "\xE3\x80"}) {
        if (at >= 3 && text.substr(at - 3, 2) == lead) return false;
    }
    return true;
}

std::string Tokenizer::decode(std::span<const uint16_t> tokens) const {
    std::string text;
    for (const uint16_t token : tokens) {
        if (token >= vocab_size()) {
            fail("token %d is outside the %s vocabulary of %d", token, name(), vocab_size());
        }
        if (bpe_) {
            text += bpe_->bytes(token);
        } else if (token == eot()) {
            text += kEndOfText;
        } else {
            text += static_cast<char>(token);
        }
    }
    return text;
}

uint32_t Tokenizer::special_at(std::string_view text) const {
    if (bpe_) return bpe_->special_at(text);
    return text.starts_with(kEndOfText) ? static_cast<uint32_t>(eot()) : bpe::kNoToken;
}
