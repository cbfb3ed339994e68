#include "tasks.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdarg>
#include <limits>
#include <utility>

#include "error.h"
#include "files.h"
#include "json_file.h"
#include "sampler.h"

// ---------------------------------------------------------------------------------------------------------
// Files of one JSON object a line

namespace tasks {

namespace {

constexpr size_t kMaxFileBytes = 64u << 20;  // HellaSwag's validation set has 12 MB
constexpr size_t kMaxLineBytes = 1u << 20;

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
// Text, as Python's str has it

// The characters that str.isspace counts as white space.
constexpr std::string_view kSpaces[] = {" ",
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

}  // namespace

std::string_view rstrip(std::string_view text) {
    for (;;) {
        const auto* space = std::find_if(std::begin(kSpaces), std::end(kSpaces),
                                         [&](std::string_view s) { return text.ends_with(s); });
        if (space == std::end(kSpaces)) return text;
        text.remove_suffix(space->size());
    }
}

std::string_view strip(std::string_view text) {
    for (;;) {
        const auto* space = std::find_if(std::begin(kSpaces), std::end(kSpaces),
                                         [&](std::string_view s) { return text.starts_with(s); });
        if (space == std::end(kSpaces)) return rstrip(text);
        text.remove_prefix(space->size());
    }
}

std::string replace(std::string_view text, std::string_view from, std::string_view to) {
    std::string out;
    for (size_t at; (at = text.find(from)) != std::string_view::npos; text.remove_prefix(at + from.size())) {
        out += text.substr(0, at);
        out += to;
    }
    return out += text;
}

int characters(std::string_view text) {
    return static_cast<int>(
        std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

namespace {

// Scores `continuation` after `context`. White space at the context's end is the continuation's, since
// GPT-2's tokens have it before a word; then the two have the same tokens apart as together
// (Tokenizer::may_cut), and they are those that lm-evaluation-harness scores. Throws Error where nothing
// precedes the continuation, or where it has more than the T tokens that follow another; `what` is its name
// in these messages.
Scored continue_text(const JsonLine& line, const Tokenizer& tokenizer, int T, std::string_view context,
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

}  // namespace

}  // namespace tasks

// ---------------------------------------------------------------------------------------------------------
// LAMBADA

std::vector<Scored> read_lambada(const std::string& path, const Tokenizer& tokenizer, int T) {
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
// HellaSwag

namespace tasks {

std::string capitalize(std::string text) {
    for (size_t i = 0; i < text.size(); i++) {
        char& c = text[i];
        if (i == 0 && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
        if (i > 0 && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    return text;
}

std::string without_brackets(std::string_view text) {
    std::string out;
    for (;;) {
        const size_t open = text.find('['), stop = text.find_first_of("]\n", open);
        if (open == std::string_view::npos || stop == std::string_view::npos) return out += text;
        out += text.substr(0, text[stop] == ']' ? open : stop + 1);
        text.remove_prefix(stop + 1);
    }
}

std::string clean(std::string_view text) {
    return replace(without_brackets(replace(strip(text), " [title]", ". ")), "  ", " ");
}

}  // namespace tasks

std::vector<Scored> read_hellaswag(const std::string& path, const Tokenizer& tokenizer, int T) {
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
// Summaries

namespace tasks {

namespace {

void check_results(std::span<const Scored> items, std::span<const Result> results) {
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
double share_error(double share, int n) {
    return n > 1 ? std::sqrt(share * (1 - share) / (n - 1)) : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

}  // namespace tasks

LambadaSummary lambada_summary(std::span<const Scored> items, std::span<const Result> results) {
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

ChoiceSummary choice_summary(std::span<const Scored> items, std::span<const Result> results) {
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
// Probes

std::vector<uint16_t> ordinary_tokens(int eot) {
    assert(eot >= 1 && eot <= 65535);
    std::vector<uint16_t> tokens(static_cast<size_t>(eot));
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<uint16_t>(i);
    return tokens;
}

std::vector<uint16_t> occurring_tokens(std::span<const uint16_t> text, int eot) {
    std::vector<char> occurs(65536);
    for (const uint16_t token : text) occurs[token] = 1;
    std::vector<uint16_t> tokens = ordinary_tokens(eot);
    std::erase_if(tokens, [&](uint16_t token) { return !occurs[token]; });
    return tokens;
}

namespace tasks {

Draw::Draw(uint64_t seed, Probe probe, int question)
    : seed_(seed), stream_(static_cast<uint64_t>(probe) << 32 | static_cast<uint32_t>(question)) {}

size_t Draw::below(size_t n) {
    return random_bits(seed_, stream_, count_++) % n;
}

std::vector<uint16_t> Draw::tokens(std::span<const uint16_t> alphabet, size_t count) {
    std::vector<uint16_t> order(alphabet.begin(), alphabet.end()), drawn;
    for (size_t i = 0; drawn.size() < count; i = (i + 1) % order.size()) {
        std::swap(order[i], order[i + below(order.size() - i)]);
        drawn.push_back(order[i]);
    }
    return drawn;
}

namespace {

void append(std::vector<uint16_t>& to, std::span<const uint16_t> tokens) {
    to.insert(to.end(), tokens.begin(), tokens.end());
}

}  // namespace

}  // namespace tasks

std::vector<Scored> induction_probe(std::span<const uint16_t> alphabet, int T, int n, int sequences,
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

InductionSummary induction_summary(std::span<const Scored> items, std::span<const Result> results) {
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

std::vector<Scored> recall_probe(std::span<const uint16_t> alphabet, int T, int pairs, int questions,
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

std::vector<Scored> needle_probe(std::span<const uint16_t> alphabet, std::span<const uint16_t> text, int T,
                                 int key_length, int candidates, int questions, uint64_t seed) {
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

std::array<ChoiceSummary, kNeedleDepths> needle_summary(std::span<const Scored> items,
                                                        std::span<const Result> results) {
    assert(items.size() % kNeedleDepths == 0 && items.size() == results.size());
    const size_t n = items.size() / kNeedleDepths;
    std::array<ChoiceSummary, kNeedleDepths> depths;
    for (size_t d = 0; d < kNeedleDepths; d++)
        depths[d] = choice_summary(items.subspan(d * n, n), results.subspan(d * n, n));
    return depths;
}
