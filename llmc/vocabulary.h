// The files of a GPT-2 vocabulary, as people have them:
//
//     encoder.json, vocab.bpe      OpenAI's: words with their ids {"!": 0, ...}; the merges, one a line
//     vocab.json, merges.txt       the same files under Hugging Face's names
//     tokenizer.json               Hugging Face's one file for both, all that transformers 5 writes
//
// A vocabulary that was enlarged has tokens behind <|endoftext|> that no merge makes. They are in the
// "added_tokens" of tokenizer.json, or in added_tokens.json {"<pad>": 50257}, beside any of the above. Here
// is where all this is read and written; what the merges mean, and whether they fit the ids, is
// tokenizer.h's.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>

inline constexpr std::string_view kEndOfText = "<|endoftext|>";

// A vocabulary, wherever it came from, in the form of the two files.
struct VocabularyText {
    std::string words, merges;            // what encoder.json and vocab.bpe hold
    std::string words_name, merges_name;  // what messages call the two
    std::string folder;
    std::map<uint32_t, std::string> added;  // by id, perhaps with <|endoftext|>
};

// Why the tokenizer.json in a folder does not make GPT-2's tokens; "" if it does, or is not there.
std::string foreign_tokenizer(const std::string& folder);

// Whether read_vocabulary() finds one in a folder: two files that belong together, or else a tokenizer.json
// of GPT-2's kind.
bool has_vocabulary(const std::string& folder);

// The vocabulary in a folder, for a model of vocab_size tokens. Throws Error where there is none. Added
// tokens are looked for only if the merges do not make that many: what else lies beside GPT-2's files cannot
// spoil them.
VocabularyText read_vocabulary(const std::string& folder, int vocab_size);

// The ids by word that encoder.json's text holds; `name` is what messages call it. Throws Error where a word
// is there twice, or what is there is no word with an id from 0 to 65535.
std::unordered_map<std::string, uint32_t> read_words(const std::string& text, const std::string& name);

// Writes what transformers' GPT2Tokenizer opens: vocab.json, merges.txt, and added_tokens.json if there are
// any.
void write_vocabulary(const std::string& folder, const VocabularyText& text);
