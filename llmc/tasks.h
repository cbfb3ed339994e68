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
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "files.h"
#include "sampler.h"
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

namespace tasks {

inline constexpr size_t kMaxFileBytes = 64u << 20;  // HellaSwag's validation set has 12 MB
inline constexpr size_t kMaxLineBytes = 1u << 20;

// ---------------------------------------------------------------------------------------------------------
// Files of one JSON object a line

class JsonLine {
  public:
    JsonLine(const std::string& path, int number, std::string_view text) : path_(path), number_(number) {
        if (text.size() > kMaxLineBytes) bad("has %zu bytes; %zu is the limit", text.size(), kMaxLineBytes);
        const size_t valid = bpe::valid_prefix(text);
        if (valid < text.size()) bad("is not valid UTF-8 (at byte %zu)", valid + 1);
        root_ = parse_json_object(format("%s:%d", path.c_str(), number), text);
    }

    // Throws Error: "FILE:LINE " and what is wrong.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void bad(const char* fmt, ...) const {
        va_list args;
        va_start(args, fmt);
        const std::string what = vformat(fmt, args);
        va_end(args);
        fail("%s:%d %s", path_.c_str(), number_, what.c_str());
    }

    const nlohmann::json& value(const char* key) const {
        const auto found = root_.find(key);
        if (found == root_.end()) bad("has no \"%s\"", key);
        return *found;
    }
    const std::string& string(const char* key) const {
        const nlohmann::json& v = value(key);
        if (!v.is_string()) bad("has a \"%s\" that is not a string", key);
        return v.get_ref<const std::string&>();
    }

  private:
    const std::string& path_;
    int number_;
    nlohmann::json root_;
};

// Calls visit(JsonLine) for each line of the file, of which there is at least one. Blank ones at the end do
// not count.
template <class Visit>
void read_json_lines(const std::string& path, Visit visit) {
    const MappedFile file(path);
    if (file.size() > kMaxFileBytes)
        fail("%s has %zu bytes, too many for a file of questions", path.c_str(), file.size());
    std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    text = text.substr(0, text.find_last_not_of(" \t\r\n") + 1);
    if (text.empty()) fail("%s is empty: there are no questions in it", path.c_str());
    int number = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t newline = std::min(text.find('\n', at), text.size());
        visit(JsonLine(path, ++number, text.substr(at, newline - at)));
        at = newline + 1;
    }
}

// ---------------------------------------------------------------------------------------------------------
// Text, as Python's str has it: what the tasks' texts are defined by

// The characters that str.isspace counts as white space.
inline constexpr std::string_view kSpaces[] = {" ",
                                               "\n",
                                               "\t",
                                               "\v",
                                               "\f",
                                               "\r",
                                               "\x1C",
                                               "\x1D",
                                               "\x1E",
                                               "\x1F",
                                               "\xC2\x85",
                                               "\xC2\xA0",
                                               "\xE1\x9A\x80",
                                               "\xE2\x80\x80",
                                               "\xE2\x80\x81",
                                               "\xE2\x80\x82",
                                               "\xE2\x80\x83",
                                               "\xE2\x80\x84",
                                               "\xE2\x80\x85",
                                               "\xE2\x80\x86",
                                               "\xE2\x80\x87",
                                               "\xE2\x80\x88",
                                               "\xE2\x80\x89",
                                               "\xE2\x80\x8A",
                                               "\xE2\x80\xA8",
                                               "\xE2\x80\xA9",
                                               "\xE2\x80\xAF",
                                               "\xE2\x81\x9F",
                                               "\xE3\x80\x80"};

inline std::string_view rstrip(std::string_view text) {
    for (;;) {
        const auto* space = std::find_if(std::begin(kSpaces), std::end(kSpaces),
                                         [&](std::string_view s) { return text.ends_with(s); });
        if (space == std::end(kSpaces)) return text;
        text.remove_suffix(space->size());
    }
}

inline std::string_view strip(std::string_view text) {
    for (;;) {
        const auto* space = std::find_if(std::begin(kSpaces), std::end(kSpaces),
                                         [&](std::string_view s) { return text.starts_with(s); });
        if (space == std::end(kSpaces)) return rstrip(text);
        text.remove_prefix(space->size());
    }
}

// Once over the text from left to right, as str.replace.
inline std::string replace(std::string_view text, std::string_view from, std::string_view to) {
    std::string out;
    for (size_t at; (at = text.find(from)) != std::string_view::npos; text.remove_prefix(at + from.size())) {
        out += text.substr(0, at);
        out += to;
    }
    return out += text;
}

// The characters (code points) of valid UTF-8.
inline int characters(std::string_view text) {
    return static_cast<int>(
        std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// ---------------------------------------------------------------------------------------------------------
// A text and how it goes on, as tokens

// Scores `continuation` after `context`. White space at the context's end is the continuation's, since
// GPT-2's tokens have it before a word; then the two have the same tokens apart as together
// (Tokenizer::may_cut), and they are those that lm-evaluation-harness scores. Throws Error where nothing
// precedes the continuation, or where it has more than the T tokens that follow another; `what` is its name
// in these messages.
inline Scored continue_text(const JsonLine& line, const Tokenizer& tokenizer, int T, std::string_view context,
                            std::string continuation, const char* what) {
    assert(T >= 1);
    const std::string_view before = rstrip(context);
    continuation.insert(0, context.substr(before.size()));
    if (before.empty()) line.bad("has no text before %s", what);
    Scored item = {tokenizer.encode(before), 0, 0, 0, true, 1.0};
    item.first = static_cast<int>(item.tokens.size());
    tokenizer.append(continuation, item.tokens);
    const int size = static_cast<int>(item.tokens.size()), scored = size - item.first;
    if (scored > T)
        line.bad("has %d tokens in %s, but the model's context is %d: use a model with a longer one", scored,
                 what, T);
    const int dropped = std::max(0, size - (T + 1));
    item.tokens.erase(item.tokens.begin(), item.tokens.begin() + dropped);
    item.first -= dropped;
    return item;
}

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
inline std::vector<Scored> read_lambada(const std::string& path, const Tokenizer& tokenizer, int T) {
    std::vector<Scored> items;
    tasks::read_json_lines(path, [&](const tasks::JsonLine& line) {
        const std::string& text = line.string("text");
        if (text.empty()) line.bad("has an empty \"text\"");
        const size_t space = text.rfind(' ');
        const size_t cut = space == std::string::npos ? 0 : space;
        if (tasks::strip(text.substr(cut)).empty()) line.bad("has a \"text\" that does not end in a word");
        items.push_back(
            tasks::continue_text(line, tokenizer, T, text.substr(0, cut), text.substr(cut), "the last word"));
        items.back().group = static_cast<int>(items.size()) - 1;
    });
    return items;
}

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

inline std::string capitalize(std::string text) {
    for (size_t i = 0; i < text.size(); i++) {
        char& c = text[i];
        if (i == 0 && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
        if (i > 0 && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    return text;
}

// Removes each '[' up to the next ']' of the same line.
inline std::string without_brackets(std::string_view text) {
    std::string out;
    for (;;) {
        const size_t open = text.find('['), stop = text.find_first_of("]\n", open);
        if (open == std::string_view::npos || stop == std::string_view::npos) return out += text;
        out += text.substr(0, text[stop] == ']' ? open : stop + 1);
        text.remove_prefix(stop + 1);
    }
}

inline std::string clean(std::string_view text) {
    return replace(without_brackets(replace(strip(text), " [title]", ". ")), "  ", " ");
}

}  // namespace tasks

// Four items a line of the file, one for each ending. Throws Error on a line that is not such a question.
inline std::vector<Scored> read_hellaswag(const std::string& path, const Tokenizer& tokenizer, int T) {
    constexpr size_t kEndings = 4;
    std::vector<Scored> items;
    tasks::read_json_lines(path, [&](const tasks::JsonLine& line) {
        const std::string& activity = line.string("activity_label");
        const std::string& ctx_a = line.string("ctx_a");
        const std::string& ctx_b = line.string("ctx_b");
        const std::string context = tasks::clean(activity + ": " + ctx_a + " " + tasks::capitalize(ctx_b));
        const nlohmann::json& endings = line.value("endings");
        if (!endings.is_array() || endings.size() != kEndings)
            line.bad("has \"endings\" that are not an array of %zu", kEndings);
        const nlohmann::json& label = line.value("label");
        if (!label.is_number_unsigned() || label.get<uint64_t>() >= kEndings)
            line.bad("has a \"label\" that is not a number from 0 to %zu", kEndings - 1);
        for (size_t i = 0; i < kEndings; i++) {
            if (!endings[i].is_string()) line.bad("has an ending that is not a string");
            const std::string ending = tasks::clean(endings[i].get_ref<const std::string&>());
            if (tasks::strip(ending).empty()) line.bad("has an ending without text");
            Scored item = tasks::continue_text(line, tokenizer, T, context, " " + ending, "an ending");
            item.group = static_cast<int>(items.size() / kEndings);
            item.choice = static_cast<int>(i);
            item.right = label.get<uint64_t>() == i;
            item.norm = tasks::characters(ending);
            items.push_back(std::move(item));
        }
    });
    return items;
}

// ---------------------------------------------------------------------------------------------------------
// Summaries. All throw Error where the model gave no number (a model that diverged gives none).

namespace tasks {

inline void check_results(std::span<const Scored> items, std::span<const Result> results) {
    assert(!items.empty() && items.size() == results.size());
    for (size_t i = 0; i < items.size(); i++) {
        assert(results[i].all_argmax ==
               (results[i].num_argmax == static_cast<int>(items[i].tokens.size()) - items[i].first));
        if (std::isnan(results[i].sum_logp))
            fail(
                "the model gives item %zu of the task no probability (NaN): its weights or activations are "
                "not finite",
                i);
    }
}

// The standard error of a share of n yes-or-no answers, sqrt(share (1 - share) / (n - 1)), as the harness has
// it; of one answer there is none (NaN).
inline double share_error(double share, int n) {
    return n > 1 ? std::sqrt(share * (1 - share) / (n - 1)) : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace tasks

struct LambadaSummary {
    int items;
    double accuracy,
        accuracy_error;  // the share of words whose every token is the most likely, and its error
    double perplexity;   // exp(-mean over the words of sum_logp), of words and not of tokens
};

inline LambadaSummary lambada_summary(std::span<const Scored> items, std::span<const Result> results) {
    tasks::check_results(items, results);
    const int n = static_cast<int>(items.size());
    int right = 0;
    double sum = 0;
    for (const Result& r : results) {
        right += r.all_argmax;
        sum += r.sum_logp;
    }
    const double accuracy = static_cast<double>(right) / n;
    return {n, accuracy, tasks::share_error(accuracy, n), std::exp(-sum / n)};
}

// Of questions with several answers, of which one is right (HellaSwag, recall, needle). An answer is the
// model's where its sum_logp, or sum_logp / norm, is the largest; the first of those that are.
struct ChoiceSummary {
    int questions;
    double chance;  // the accuracy of guessing: the mean of 1 / answers
    double accuracy, accuracy_error;
    double accuracy_norm, accuracy_norm_error;
    double exact;  // the share of questions where the right answer is the most likely of all texts, token by
                   // token
    double loss;   // the mean of -sum_logp of the right answers, nats
};

// items: any run of whole questions.
inline ChoiceSummary choice_summary(std::span<const Scored> items, std::span<const Result> results) {
    tasks::check_results(items, results);
    ChoiceSummary s = {};
    int right = 0, right_norm = 0, exact = 0;
    for (size_t begin = 0, end; begin < items.size(); begin = end) {
        size_t best = begin, best_norm = begin;
        for (end = begin; end < items.size() && items[end].group == items[begin].group; end++) {
            if (results[end].sum_logp > results[best].sum_logp) best = end;
            if (results[end].sum_logp / items[end].norm > results[best_norm].sum_logp / items[best_norm].norm)
                best_norm = end;
            if (!items[end].right) continue;
            exact += results[end].all_argmax;
            s.loss -= results[end].sum_logp;
        }
        right += items[best].right;
        right_norm += items[best_norm].right;
        s.chance += 1.0 / static_cast<double>(end - begin);
        s.questions++;
    }
    s.chance /= s.questions;
    s.accuracy = static_cast<double>(right) / s.questions;
    s.accuracy_error = tasks::share_error(s.accuracy, s.questions);
    s.accuracy_norm = static_cast<double>(right_norm) / s.questions;
    s.accuracy_norm_error = tasks::share_error(s.accuracy_norm, s.questions);
    s.exact = static_cast<double>(exact) / s.questions;
    s.loss /= s.questions;
    return s;
}

// ---------------------------------------------------------------------------------------------------------
// Probes: made of random tokens, so that nothing but the sequence itself can tell what comes next. They draw
// from an alphabet, which must hold no token twice. A model of text is at a loss with tokens that its text
// never had: for one of bytes, take those that occur in the validation data.

// The tokens that text is made of: all before <|endoftext|>, of which eot is the id (Tokenizer::eot()).
// Tokens that were added to a vocabulary come after it.
inline std::vector<uint16_t> ordinary_tokens(int eot) {
    assert(eot >= 1 && eot <= 65535);
    std::vector<uint16_t> tokens(static_cast<size_t>(eot));
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<uint16_t>(i);
    return tokens;
}

// Those of them that occur in the text, in order.
inline std::vector<uint16_t> occurring_tokens(std::span<const uint16_t> text, int eot) {
    std::vector<char> occurs(65536);
    for (const uint16_t token : text) occurs[token] = 1;
    std::vector<uint16_t> tokens = ordinary_tokens(eot);
    std::erase_if(tokens, [&](uint16_t token) { return !occurs[token]; });
    return tokens;
}

namespace tasks {

enum class Probe : uint64_t { induction = 1, recall, needle };

// The random numbers of one question, which depend on nothing but the seed, the probe and the question: more
// questions begin with the same ones.
class Draw {
  public:
    Draw(uint64_t seed, Probe probe, int question)
        : seed_(seed), stream_(static_cast<uint64_t>(probe) << 32 | static_cast<uint32_t>(question)) {}

    // Uniform in [0, n), n > 0; the remainder's bias is below n / 2^64.
    size_t below(size_t n) { return random_bits(seed_, stream_, count_++) % n; }

    // `count` tokens, distinct as long as the alphabet has that many: one random order of it after another.
    std::vector<uint16_t> tokens(std::span<const uint16_t> alphabet, size_t count) {
        std::vector<uint16_t> order(alphabet.begin(), alphabet.end()), drawn;
        for (size_t i = 0; drawn.size() < count; i = (i + 1) % order.size()) {
            std::swap(order[i], order[i + below(order.size() - i)]);
            drawn.push_back(order[i]);
        }
        return drawn;
    }

  private:
    uint64_t seed_, stream_, count_ = 0;
};

inline void append(std::vector<uint16_t>& to, std::span<const uint16_t> tokens) {
    to.insert(to.end(), tokens.begin(), tokens.end());
}

}  // namespace tasks

// Induction (Elhage et al. 2021, Olsson et al., arXiv 2209.11895): n random tokens, and the same again. In
// the second half each token follows from what followed its predecessor in the first, which takes a head that
// finds the predecessor and one that copies. Two items a sequence, both about its tokens 1 .. n - 1 given
// those before: choice 0 in the first half (tokens 1 .. n - 1 of the sequence), choice 1 in the second (n + 1
// .. 2n - 1; token n, where the repetition begins, nothing foretells). Up to as many tokens as the alphabet
// has, no token occurs twice in a half. Throws Error where 2n - 1 tokens do not fit into T.
inline std::vector<Scored> induction_probe(std::span<const uint16_t> alphabet, int T, int n, int sequences,
                                           uint64_t seed) {
    assert(sequences >= 1);
    if (n < 2 || n > (T + 1) / 2)
        fail("the induction probe repeats 2 to %d tokens in a context of %d, not %d", (T + 1) / 2, T, n);
    if (alphabet.size() < 2) fail("the induction probe needs an alphabet of 2 tokens or more");
    std::vector<Scored> items;
    for (int s = 0; s < sequences; s++) {
        std::vector<uint16_t> tokens =
            tasks::Draw(seed, tasks::Probe::induction, s).tokens(alphabet, static_cast<size_t>(n));
        items.push_back({tokens, 1, s, 0, true, 1.0});
        tasks::append(tokens, items.back().tokens);
        items.push_back({std::move(tokens), n + 1, s, 1, true, 1.0});
    }
    return items;
}

struct InductionSummary {
    int sequences;
    double first_loss, second_loss;          // the mean of -log p of a token in each half, nats
    double score;                            // first_loss - second_loss: what the repetition is worth
    double first_accuracy, second_accuracy;  // the share of tokens that are the most likely where they stand
};

inline InductionSummary induction_summary(std::span<const Scored> items, std::span<const Result> results) {
    tasks::check_results(items, results);
    double loss[2] = {}, hits[2] = {}, tokens[2] = {};
    for (size_t i = 0; i < items.size(); i++) {
        const int half = items[i].choice;
        loss[half] -= results[i].sum_logp;
        hits[half] += results[i].num_argmax;
        tokens[half] += static_cast<double>(items[i].tokens.size()) - items[i].first;
    }
    const double first = loss[0] / tokens[0], second = loss[1] / tokens[1];
    return {static_cast<int>(items.size() / 2),
            first,
            second,
            first - second,
            hits[0] / tokens[0],
            hits[1] / tokens[1]};
}

// Associative recall (Ba et al., arXiv 1610.06258; Arora et al., arXiv 2312.04927): key value pairs
// k1 v1 k2 v2 ..., then one of the keys, each with the same chance, whose value is asked for. All 2 * pairs
// tokens are distinct. The answers are the values, in their order; chance is 1 / pairs. choice_summary sums
// it up. Throws Error where the pairs do not fit into T or the alphabet is too small.
inline std::vector<Scored> recall_probe(std::span<const uint16_t> alphabet, int T, int pairs, int questions,
                                        uint64_t seed) {
    assert(questions >= 1);
    if (pairs < 2 || pairs > (T - 1) / 2)
        fail("the recall probe has 2 to %d pairs in a context of %d, not %d", (T - 1) / 2, T, pairs);
    const size_t n = static_cast<size_t>(pairs);
    if (alphabet.size() < 2 * n)
        fail("the recall probe of %d pairs needs an alphabet of %zu tokens, not %zu", pairs, 2 * n,
             alphabet.size());
    std::vector<Scored> items;
    for (int q = 0; q < questions; q++) {
        tasks::Draw draw(seed, tasks::Probe::recall, q);
        std::vector<uint16_t> tokens = draw.tokens(alphabet, 2 * n);
        const size_t asked = draw.below(n);
        tokens.push_back(tokens[2 * asked]);
        const int first = 2 * pairs + 1;
        for (size_t c = 0; c < n; c++) {
            items.push_back({tokens, first, q, static_cast<int>(c), c == asked, 1.0});
            items.back().tokens.push_back(tokens[2 * c + 1]);
        }
    }
    return items;
}

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

inline std::vector<Scored> needle_probe(std::span<const uint16_t> alphabet, std::span<const uint16_t> text,
                                        int T, int key_length, int candidates, int questions, uint64_t seed) {
    assert(questions >= 1 && key_length >= 1 && candidates >= 2);
    const size_t key_size = static_cast<size_t>(key_length), values = static_cast<size_t>(candidates);
    if (T < kNeedleDepths + 1 + 2 * key_length)
        fail("the needle probe with a key of %d tokens needs a context of %d or more, not %d", key_length,
             kNeedleDepths + 1 + 2 * key_length, T);
    const size_t L = static_cast<size_t>(T - 1 - 2 * key_length);
    if (text.size() < L)
        fail("the needle probe needs %zu tokens of text in a context of %d; there are %zu", L, T,
             text.size());
    if (alphabet.size() < key_size + values)
        fail("the needle probe needs an alphabet of %zu tokens, not %zu", key_size + values, alphabet.size());

    struct Question {
        std::span<const uint16_t> text;
        std::vector<uint16_t> drawn;  // the key, then the answers
        size_t right;                 // which answer
    };
    std::vector<Question> asked;
    for (int q = 0; q < questions; q++) {
        constexpr int kAttempts = 100;
        tasks::Draw draw(seed, tasks::Probe::needle, q);
        Question question = {text.subspan(draw.below(text.size() - L + 1), L), {}, draw.below(values)};
        for (int attempt = 0;; attempt++) {
            question.drawn = draw.tokens(alphabet, key_size + values);
            const auto key_end = question.drawn.begin() + key_length;
            if (std::search(question.text.begin(), question.text.end(), question.drawn.begin(), key_end) ==
                question.text.end())
                break;
            if (attempt == kAttempts)
                fail(
                    "the needle probe finds no key of %d tokens that its text does not hold: use a longer one",
                    key_length);
        }
        asked.push_back(std::move(question));
    }

    std::vector<Scored> items;
    for (int d = 0; d < kNeedleDepths; d++) {
        const size_t depth = L * static_cast<size_t>(d) / kNeedleDepths;
        for (int q = 0; q < questions; q++) {
            const Question& question = asked[static_cast<size_t>(q)];
            const std::span<const uint16_t> key(question.drawn.data(), key_size);
            const std::span<const uint16_t> answers(question.drawn.data() + key_size, values);
            std::vector<uint16_t> tokens;
            tasks::append(tokens, question.text.first(depth));
            tasks::append(tokens, key);
            tokens.push_back(answers[question.right]);
            tasks::append(tokens, question.text.subspan(depth));
            tasks::append(tokens, key);
            for (size_t c = 0; c < values; c++) {
                items.push_back(
                    {tokens, T, d * questions + q, static_cast<int>(c), c == question.right, 1.0});
                items.back().tokens.push_back(answers[c]);
            }
        }
    }
    return items;
}

// Of each depth d / 10, d = 0 .. 9.
inline std::array<ChoiceSummary, kNeedleDepths> needle_summary(std::span<const Scored> items,
                                                               std::span<const Result> results) {
    assert(items.size() % kNeedleDepths == 0 && items.size() == results.size());
    const size_t n = items.size() / kNeedleDepths;
    std::array<ChoiceSummary, kNeedleDepths> depths;
    for (size_t d = 0; d < kNeedleDepths; d++)
        depths[d] = choice_summary(items.subspan(d * n, n), results.subspan(d * n, n));
    return depths;
}
