// Text to token ids and back. Two tokenizers: "bytes" (a token is a byte; needs no files) and "gpt2" (GPT-2's
// byte-level BPE, from the files of vocabulary.h), which gives the tokens that tiktoken's "gpt2"
// encoding gives on any valid UTF-8. Text is cut into pieces by GPT-2's pattern (PCRE2) and the byte pairs of
// each piece are merged, lowest rank first, leftmost on a tie. A maximal run of bytes that are not valid
// UTF-8 is a piece of its own, and the text on either side of it is cut as if it ended there;
// decode(encode(x)) == x for any bytes.
//
// The pattern's character classes are those of Unicode 16, as in tiktoken 0.14 (checked on every code point):
// the letters and numbers newer than Unicode 14 (PCRE2 10.42) are spelled out below, and so is white space,
// where PCRE2 counts U+180E and tiktoken does not. A PCRE2 newer than Unicode 16 may count as letters code
// points that had no meaning in Unicode 16.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

inline constexpr int kByteVocab = 257;    // 256 bytes and <|endoftext|>
inline constexpr int kGpt2Vocab = 50257;  // 256 bytes, 50000 merges and <|endoftext|>

namespace bpe {

class Vocabulary;  // what the files of a GPT-2 vocabulary mean

// The length of the character at p, or 0 where the bytes are not valid UTF-8 (overlong forms, surrogates and
// code points past U+10FFFF are not, as in Rust's and Python's strings).
int utf8_length(const char* p, const char* end);

// The length of the valid UTF-8 that text begins with.
size_t valid_prefix(std::string_view text);

}  // namespace bpe

// Cheap to copy; every member may be called from several threads at once.
class Tokenizer {
  public:
    static Tokenizer bytes() { return Tokenizer(nullptr); }

    // folder holds a vocabulary in any of the forms of vocabulary.h. vocab_size is the model's: GPT-2's, or
    // more where tokens were added. (The tests have merges of their own.)
    static Tokenizer gpt2(const std::string& folder, int vocab_size = kGpt2Vocab);

    static Tokenizer for_vocab(int vocab_size, const std::string& gpt2_folder);

    int vocab_size() const;
    int eot() const;  // the id of <|endoftext|>
    const char* name() const { return bpe_ ? "gpt2" : "bytes"; }

    // "<|endoftext|>" in the text is plain text, and so are added tokens, as in tiktoken's encode_ordinary.
    std::vector<uint16_t> encode(std::string_view text) const;

    // "<|endoftext|>" in the text is the one token, and so are added tokens, as with tiktoken's
    // allowed_special and in Hugging Face's tokenizers: the leftmost first, and of those the longest.
    std::vector<uint16_t> encode_special(std::string_view text) const;

    // encode(), at the end of a vector that is there already.
    void append(std::string_view text, std::vector<uint16_t>& tokens) const;

    // Whether encode(text) is encode(text before `at`) and encode(the rest), with either tokenizer: so it is
    // before ASCII white space that follows something else. The pattern ends a piece there whatever comes
    // before or after, and has no piece whose end depends on what follows but white space.
    static bool may_cut(std::string_view text, size_t at);

    std::string decode(std::span<const uint16_t> tokens) const;

  private:
    explicit Tokenizer(std::shared_ptr<const bpe::Vocabulary> vocabulary) : bpe_(std::move(vocabulary)) {}

    uint32_t special_at(std::string_view text) const;  // bpe::kNoToken where there is none

    std::shared_ptr<const bpe::Vocabulary> bpe_;  // null: bytes
};
