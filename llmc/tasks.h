// What a language model understands, as sequences to score: LAMBADA, HellaSwag, and three probes of what
// attention is for (induction, associative recall, a needle in a haystack).
//
// Every task is a list of `Scored`: tokens, of which those from `first` on are scored given all that precede
// them. The program that has a model gives a `Result` for each, in the same order, and the task's summary
// makes numbers of them. With p the model's probabilities (natural logarithms throughout),
//
//     sum_logp = sum over t in [first, tokens.size()) of log p(tokens[t] | tokens[0..t))
//
// A model of context T reads T tokens and so predicts the one after them: a sequence has at most T + 1
// tokens, and the last of them is predicted but never read. A longer one loses its beginning.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer.h"

struct Scored {
    std::vector<uint16_t> tokens;
    int first;    // 1 <= first < tokens.size()
    int group;    // the question, from 0 on and in order
    int choice;   // which of the question's answers, from 0 on; their contexts may be one and the same
    bool right;   // whether it is the right answer
    double norm;  // what accuracy_norm divides sum_logp by: the characters of the answer, 1 for a token
};

struct Result {
    double sum_logp;  // of the scored tokens
    bool all_argmax;  // each of them is the most likely token where it stands
    int num_argmax;   // how many of them are
};

// ---------------------------------------------------------------------------------------------------------
// Text, as Python's str has it: what the tasks' texts are defined by

namespace tasks {

std::string_view rstrip(std::string_view text);

std::string_view strip(std::string_view text);

// Once over the text from left to right, as str.replace.
std::string replace(std::string_view text, std::string_view from, std::string_view to);

// The characters (code points) of valid UTF-8.
int characters(std::string_view text);

}  // namespace tasks

// ---------------------------------------------------------------------------------------------------------
// LAMBADA (Paperno et al., arXiv 1606.06031): the last word of a passage, which people guess from the passage
// but not from its last sentence. The file is the one that OpenAI published for GPT-2 (lambada_test.jsonl: in
// each line, the passage in "text").
//
// The split is lm-evaluation-harness's task lambada_openai: the word is what follows the last space (U+0020),
// with that space; the context is all that precedes, without an <|endoftext|> before it. The GPT-2 paper's
// own accuracies are higher: it leaves stop words out of the guesses, which is not done here or there.

// One item a line of the file. Throws Error on a line that is not such a passage.
std::vector<Scored> read_lambada(const std::string& path, const Tokenizer& tokenizer, int T);

// ---------------------------------------------------------------------------------------------------------
// HellaSwag (Zellers et al., arXiv 1905.07830): which of four endings a description goes on with. The file is
// the authors' hellaswag_val.jsonl, of which "activity_label", "ctx_a", "ctx_b", "endings" and "label" (0 to
// 3, the right one) are read.
//
// As lm-evaluation-harness's task hellaswag:
//
//     context      clean(activity_label + ": " + ctx_a + " " + capitalize(ctx_b))
//     continuation " " + clean(ending)
//     norm         the characters (code points, not bytes) of clean(ending)
//
// clean() strips white space, makes ". " of " [title]", removes everything in brackets, and makes one space
// of two, in this order. capitalize() makes the first letter upper case and all others lower case; only
// ASCII's letters here, where the harness has Unicode's.

namespace tasks {

std::string capitalize(std::string text);

// Removes each '[' up to the next ']' of the same line.
std::string without_brackets(std::string_view text);

std::string clean(std::string_view text);

}  // namespace tasks

// Four items a line of the file, one for each ending. Throws Error on a line that is not such a question.
std::vector<Scored> read_hellaswag(const std::string& path, const Tokenizer& tokenizer, int T);

// ---------------------------------------------------------------------------------------------------------
// Summaries. All throw Error where the model gave no number (a model that diverged gives none).

struct LambadaSummary {
    int items;
    double accuracy, accuracy_error;  // the share of words whose every token is the most likely, its error
    double perplexity;                // exp(-mean over the words of sum_logp), of words and not of tokens
};

LambadaSummary lambada_summary(std::span<const Scored> items, std::span<const Result> results);

// Of questions with several answers, of which one is right (HellaSwag, recall, needle). An answer is the
// model's where its sum_logp, or sum_logp / norm, is the largest; the first of those that are.
struct ChoiceSummary {
    int questions;
    double chance;  // the accuracy of guessing: the mean of 1 / answers
    double accuracy, accuracy_error;
    double accuracy_norm, accuracy_norm_error;
    double exact;  // the share of questions whose right answer's every token is the most likely of all
    double loss;   // the mean of -sum_logp of the right answers, nats
};

// items: any run of whole questions.
ChoiceSummary choice_summary(std::span<const Scored> items, std::span<const Result> results);

// ---------------------------------------------------------------------------------------------------------
// Probes: made of random tokens, so that nothing but the sequence itself can tell what comes next. They draw
// from an alphabet, which must hold no token twice. A model of text is at a loss with tokens that its text
// never had: for one of bytes, take those that occur in the validation data.

// The tokens that text is made of: all before <|endoftext|>, of which eot is the id (Tokenizer::eot()).
// Tokens that were added to a vocabulary come after it.
std::vector<uint16_t> ordinary_tokens(int eot);

// Those of them that occur in the text, in order.
std::vector<uint16_t> occurring_tokens(std::span<const uint16_t> text, int eot);

namespace tasks {

enum class Probe : uint64_t { induction = 1, recall, needle };

// The random numbers of one question, which depend on nothing but the seed, the probe and the question: more
// questions begin with the same ones.
class Draw {
  public:
    Draw(uint64_t seed, Probe probe, int question);

    // Uniform in [0, n), n > 0; the remainder's bias is below n / 2^64.
    size_t below(size_t n);

    // `count` tokens, distinct as long as the alphabet has that many: one random order of it after another.
    std::vector<uint16_t> tokens(std::span<const uint16_t> alphabet, size_t count);

  private:
    uint64_t seed_, stream_, count_ = 0;
};

}  // namespace tasks

// Induction (Elhage et al. 2021, Olsson et al., arXiv 2209.11895): n random tokens, and the same again. In
// the second half each token follows from what followed its predecessor in the first, which takes a head that
// finds the predecessor and one that copies. Two items a sequence, both about its tokens 1 .. n - 1 given
// those before: choice 0 in the first half (tokens 1 .. n - 1 of the sequence), choice 1 in the second (n + 1
// .. 2n - 1; token n, where the repetition begins, nothing foretells). Up to as many tokens as the alphabet
// has, no token occurs twice in a half. Throws Error where 2n - 1 tokens do not fit into T.
std::vector<Scored> induction_probe(std::span<const uint16_t> alphabet, int T, int n, int sequences,
                                    uint64_t seed);

struct InductionSummary {
    int sequences;
    double first_loss, second_loss;          // the mean of -log p of a token in each half, nats
    double score;                            // first_loss - second_loss: what the repetition is worth
    double first_accuracy, second_accuracy;  // the share of tokens that are the most likely where they stand
};

InductionSummary induction_summary(std::span<const Scored> items, std::span<const Result> results);

// Associative recall (Ba et al., arXiv 1610.06258; Arora et al., arXiv 2312.04927): key value pairs
// k1 v1 k2 v2 ..., then one of the keys, each with the same chance, whose value is asked for. All 2 * pairs
// tokens are distinct. The answers are the values, in their order; chance is 1 / pairs. choice_summary sums
// it up. Throws Error where the pairs do not fit into T or the alphabet is too small.
std::vector<Scored> recall_probe(std::span<const uint16_t> alphabet, int T, int pairs, int questions,
                                 uint64_t seed);

// A needle in a haystack: real text, into which at depth d (the share of the text that precedes it) a key of
// `key_length` random tokens and a value are put; at the end the key is repeated, and the value asked for:
//
//     text[0..dL)  key value  text[dL..L)  key  [value]        T + 1 tokens in all, L = T - 1 - 2 key_length
//
// The answers are the value and candidates - 1 others that were drawn like it, in random order; chance is
// 1 / candidates. Key and answers are distinct, and the key does not occur in the text. The same questions
// (stretch of text, key, answers) are asked at every depth, 0 to 0.9; all of depth 0 come first. text: tokens
// of the model's vocabulary, L or more; a stretch of it may hold <|endoftext|>.
inline constexpr int kNeedleDepths = 10;

std::vector<Scored> needle_probe(std::span<const uint16_t> alphabet, std::span<const uint16_t> text, int T,
                                 int key_length, int candidates, int questions, uint64_t seed);

// Of each depth d / 10, d = 0 .. 9.
std::array<ChoiceSummary, kNeedleDepths> needle_summary(std::span<const Scored> items,
                                                        std::span<const Result> results);
