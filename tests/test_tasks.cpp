// The tasks and probes: what is scored after what (the texts below are those that lm-evaluation-harness
// 0.4.13 makes of the same lines), the summaries against their definitions, the probes against oracles that
// know the rule and against a model that knows nothing, and bad files. The whole of LAMBADA is looked for in
// $DATA_MIRROR, at any depth.
#include "../llmc/sampler.h"
#include "../llmc/tasks.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "errors.h"
#include "temp_folder.h"

namespace fs = std::filesystem;
using Tokens = std::vector<uint16_t>;

namespace {

const fs::path kFixtures = fs::path(__FILE__).parent_path() / "fixtures";
const std::string kLambada = kFixtures / "tasks/lambada.jsonl";
const std::string kHellaswag = kFixtures / "tasks/hellaswag.jsonl";
constexpr int kLong = 1024;  // a context that everything fits into

Tokenizer tiny() {
    return Tokenizer::gpt2((kFixtures / "tiny_bpe").string(), 568);
}

std::string context_of(const Scored& item, const Tokenizer& tokenizer) {
    return tokenizer.decode(std::span(item.tokens).first(static_cast<size_t>(item.first)));
}
std::string scored_of(const Scored& item, const Tokenizer& tokenizer) {
    return tokenizer.decode(std::span(item.tokens).subspan(static_cast<size_t>(item.first)));
}

// A result in which `hits` of the item's tokens are the most likely.
Result result_of(const Scored& item, double sum_logp, int hits) {
    return {sum_logp, hits == static_cast<int>(item.tokens.size()) - item.first, hits};
}

// Of a model that gives a token of the vocabulary 1 / V wherever it stands; token 0 wins the ties.
std::vector<Result> uniform_model(const std::vector<Scored>& items, int V) {
    std::vector<Result> results;
    for (const Scored& item : items) {
        const auto scored = std::span(item.tokens).subspan(static_cast<size_t>(item.first));
        results.push_back(result_of(item, -std::log(V) * static_cast<double>(scored.size()),
                                    static_cast<int>(std::count(scored.begin(), scored.end(), 0))));
    }
    return results;
}

// Of a model that knows one rule: after the last `n` tokens comes what came after them the last time. It
// gives that token 1/2 and all others the rest, or where there was no last time, all the same.
std::vector<Result> copying_model(const std::vector<Scored>& items, int V, int n) {
    std::vector<Result> results;
    for (const Scored& item : items) {
        double sum = 0;
        int hits = 0;
        for (size_t t = static_cast<size_t>(item.first); t < item.tokens.size(); t++) {
            const auto last = item.tokens.begin() + static_cast<long>(t) - n;
            const auto found = std::find_end(item.tokens.begin(), last + n - 1, last, last + n);
            const bool known = found != last + n - 1;
            const bool hit = known && found[n] == item.tokens[t];
            sum += std::log(!known ? 1.0 / V : hit ? 0.5 : 0.5 / (V - 1));
            hits += hit;
        }
        results.push_back(result_of(item, sum, hits));
    }
    return results;
}

struct Split {
    std::string context, continuation;
};
const std::vector<Split> kLambadaSplits = {
    {"The kettle had been on the stove since six. \"Who left it there?\" asked Maren, and reached for the",
     " kettle"},
    {"They had carried the piano up three floors.\n\n\"Never again,\" said Tomas, rubbing his back. \"Next time "
     "we buy a flute, not a",
     " piano"},
    {"Ines put the letter down.\n\n\"He writes that he is coming.\"\n\n\"Who?\"\n\n\"Uncle Paulo,\" said Ines. It "
     "had been nine years since anybody had seen",
     " Paulo"},
    {"Two spaces stand before the last", "  word"},
    {"A line ends, a space follows, and the last word comes:", "\n lighthouse"},
    {"\u00c9lodie a servi un caf\u00e9 \u00e0 son fr\u00e8re; il n'a pas touch\u00e9 \u00e0 son",
     " caf\u00e9"},
    {"No-break space before the space", "\u00a0 word"},
    {"The lift stopped between two floors. Somebody laughed; somebody else pressed every button there was, and "
     "a voice asked them to stay in the",
     " lift."},
};

struct Question {
    std::string context;
    std::vector<std::string> endings;  // with the space before them
    std::vector<int> characters;
    int label;
};
const std::vector<Question> kQuestions = {
    {"Mowing a lawn: A woman pulls the cord of a mower. The neighbour",
     {" eats the cord.", " sits down in a boat.", " looks over the fence and waves.",
      " paints the mower on ice."},
     {14, 20, 31, 24},
     2},
    {"Home and Garden: How to store onions. Choose dry ones. Squeeze each of them; a soft one goes into the "
     "soup.",
     {"  Keep them in a net. Hang the net where air moves.", " Boil the net.", "  Plant a wall. Paint it.",
      " Onions do not mind  water."},
     {50, 13, 24, 26},
     0},
    {"Caf\u00e9 work: A waiter carries four cups. A cr\u00e8me br\u00fbl\u00e9e follows. He",
     {" trinkt den Kaffee s\u00fc\u00df.", " na\u00efvely juggles the cups.", " \u2014",
      " puts the cups on the table, one after another."},
     {22, 25, 1, 46},
     3},
    {"Chess: Two players sit at a board",  // what remains of its white space goes to the endings
     {"  The clock is\n.", "  White moves\ta pawn.", "  [one\n three", "  Both leave. the room"},
     {14, 19, 11, 20},
     1},
};

}  // namespace

TEST_CASE("LAMBADA: the last word after all that precedes it") {
    for (const Tokenizer& tokenizer : {Tokenizer::bytes(), tiny()}) {
        const std::vector<Scored> items = read_lambada(kLambada, tokenizer, kLong);
        REQUIRE(items.size() == kLambadaSplits.size());
        for (size_t i = 0; i < items.size(); i++) {
            CHECK(context_of(items[i], tokenizer) == kLambadaSplits[i].context);
            CHECK(scored_of(items[i], tokenizer) == kLambadaSplits[i].continuation);
            CHECK(items[i].tokens ==
                  tokenizer.encode(kLambadaSplits[i].context + kLambadaSplits[i].continuation));
            CHECK(items[i].group == static_cast<int>(i));
            CHECK(items[i].choice == 0);
            CHECK(items[i].right);
        }
    }
}

TEST_CASE("HellaSwag: four endings after a context") {
    for (const Tokenizer& tokenizer : {Tokenizer::bytes(), tiny()}) {
        const std::vector<Scored> items = read_hellaswag(kHellaswag, tokenizer, kLong);
        REQUIRE(items.size() == 4 * kQuestions.size());
        for (size_t i = 0; i < items.size(); i++) {
            const Question& question = kQuestions[i / 4];
            CHECK(context_of(items[i], tokenizer) == question.context);
            CHECK(scored_of(items[i], tokenizer) == question.endings[i % 4]);
            CHECK(items[i].tokens == tokenizer.encode(question.context + question.endings[i % 4]));
            CHECK(items[i].norm == question.characters[i % 4]);
            CHECK(items[i].group == static_cast<int>(i / 4));
            CHECK(items[i].choice == static_cast<int>(i % 4));
            CHECK(items[i].right == (question.label == static_cast<int>(i % 4)));
        }
    }
}

TEST_CASE("Python's strings") {
    CHECK(
        tasks::strip(" \t\n\v\f\r\x1c\x1d\x1e\x1f\u0085\u00a0\u1680\u2000\u2005\u200a\u2028\u2029\u202f\u205f"
                     "\u3000x \u3000y\u2009\u00a0 ") == "x \u3000y");
    CHECK(tasks::strip("\u200bx\ufeff") == "\u200bx\ufeff");  // not white space, in Python
    CHECK(tasks::strip(" \u3000").empty());
    CHECK(tasks::replace("a   b    ", "  ", " ") == "a  b  ");
    CHECK(tasks::without_brackets("[a] b [c [d] e] [\n[f] [g") == " b  e] [\n [g");
    const std::string open(1 << 20, '[');  // a line's worth, which must not take a search of it for each
    CHECK(tasks::without_brackets(open) == open);
    CHECK(tasks::without_brackets(open + "\n]") == open + "\n]");
    CHECK(tasks::capitalize("aB C") == "Ab c");
    CHECK(tasks::capitalize("").empty());
    CHECK(tasks::characters("a\u00e9\u2014\U0001F600") == 4);
}

TEST_CASE("A context keeps its end") {
    const Tokenizer tokenizer = Tokenizer::bytes();
    const auto whole = read_lambada(kLambada, tokenizer, kLong);
    const int longest = static_cast<int>(whole[4].tokens.size()) - whole[4].first;  // "\n lighthouse"
    REQUIRE(longest == 12);
    for (const int T : {longest, 20, 100, static_cast<int>(whole[0].tokens.size()) - 1, kLong}) {
        const auto items = read_lambada(kLambada, tokenizer, T);
        for (size_t i = 0; i < items.size(); i++) {
            const Tokens& all = whole[i].tokens;
            const size_t kept = std::min(all.size(), static_cast<size_t>(T) + 1);
            CHECK(items[i].tokens == Tokens(all.end() - static_cast<long>(kept), all.end()));
            CHECK(scored_of(items[i], tokenizer) == scored_of(whole[i], tokenizer));
            CHECK(items[i].first >= 1);
        }
    }
    check_mentions(error_of([&] { read_lambada(kLambada, tokenizer, longest - 1); }),
                   "lambada.jsonl:5 has 12 tokens in the last word, but the model's context is 11");
    check_mentions(error_of([&] { read_hellaswag(kHellaswag, tokenizer, 40); }),
                   "hellaswag.jsonl:2 has 51 tokens in an ending, but the model's context is 40");
    CHECK(read_hellaswag(kHellaswag, tokenizer, 51)[4].first == 1);
}

TEST_CASE("LAMBADA's summary") {
    const auto items = read_lambada(kLambada, tiny(), kLong);
    std::vector<Result> results;
    double product = 1;
    for (size_t i = 0; i < items.size(); i++) {
        const double p = 1.0 / static_cast<double>(i + 2);
        const int size = static_cast<int>(items[i].tokens.size()) - items[i].first;
        results.push_back(result_of(items[i], std::log(p), i < 3 ? size : size - 1));
        product *= p;
    }
    const LambadaSummary s = lambada_summary(items, results);
    CHECK(s.items == 8);
    CHECK(s.accuracy == 3.0 / 8);
    // The standard deviation of three ones and five zeros, over the root of their number.
    CHECK(s.accuracy_error ==
          doctest::Approx(std::sqrt((3 * 25.0 / 64 + 5 * 9.0 / 64) / 7 / 8)).epsilon(1e-14));
    CHECK(s.perplexity == doctest::Approx(std::pow(product, -1.0 / 8)).epsilon(1e-14));

    const LambadaSummary one = lambada_summary(std::span(items).first(1), std::span(results).first(1));
    CHECK(one.accuracy == 1);
    CHECK(std::isnan(one.accuracy_error));
    CHECK(one.perplexity == doctest::Approx(2).epsilon(1e-14));

    results[6].sum_logp = -INFINITY;
    CHECK(lambada_summary(items, results).perplexity == INFINITY);
    results[6].sum_logp = NAN;
    check_mentions(error_of([&] { lambada_summary(items, results); }), "item 6");
}

TEST_CASE("The summary of choices") {
    const auto item = [](int group, int choice, bool right, double norm) {
        return Scored{{1, 2}, 1, group, choice, right, norm};
    };
    const std::vector<Scored> items = {
        item(0, 0, false, 10), item(0, 1, true, 20),                         // right by norm only
        item(1, 0, true, 5),   item(1, 1, false, 50), item(1, 2, false, 1),  // right without norm only
        item(2, 0, false, 1),  item(2, 1, true, 1),                          // a tie: the first
        item(3, 0, false, 2),  item(3, 1, true, 2),                          // right
    };
    const double logp[] = {-1, -1.5, -2, -3, -2.5, -4, -4, -6, -5};
    std::vector<Result> results;
    for (size_t i = 0; i < items.size(); i++)
        results.push_back(result_of(items[i], logp[i], i == 0 || i == 8 ? 1 : 0));
    const ChoiceSummary s = choice_summary(items, results);
    CHECK(s.questions == 4);
    CHECK(s.chance == doctest::Approx((1.0 / 2 + 1.0 / 3 + 1.0 / 2 + 1.0 / 2) / 4).epsilon(1e-14));
    CHECK(s.accuracy == 0.5);
    CHECK(s.accuracy_norm == 0.5);
    CHECK(s.accuracy_error == doctest::Approx(std::sqrt(0.5 * 0.5 / 3)).epsilon(1e-14));
    CHECK(s.exact == 0.25);  // of the two that are, one is a wrong answer
    CHECK(s.loss == doctest::Approx((1.5 + 2 + 4 + 5) / 4).epsilon(1e-14));
    const ChoiceSummary by_norm = choice_summary(std::span(items).first(2), std::span(results).first(2));
    CHECK(by_norm.accuracy == 0);
    CHECK(by_norm.accuracy_norm == 1);
    const std::vector<Scored> two = {items[0], items[1], items[7], items[8]};
    const ChoiceSummary errors =
        choice_summary(two, std::vector<Result>{results[0], results[1], results[7], results[8]});
    CHECK(errors.accuracy_error == 0.5);     // one of two right,
    CHECK(errors.accuracy_norm_error == 0);  // and by norm both
    results[3].sum_logp = NAN;
    check_mentions(error_of([&] { choice_summary(items, results); }), "item 3");
}

TEST_CASE("Alphabets") {
    const Tokens all = ordinary_tokens(256);
    CHECK(all.size() == 256);
    CHECK(all.front() == 0);
    CHECK(all.back() == 255);
    CHECK(ordinary_tokens(65535).back() == 65534);
    CHECK(occurring_tokens(Tokens{5, 256, 5, 0, 300}, 256) == Tokens{0, 5});
}

TEST_CASE("Drawn tokens are uniform") {
    // 3 of 5 tokens: each at each place with chance 1/5, never twice. The counts of 20000 draws have a
    // standard deviation of 57; 5 of them are allowed.
    const Tokens alphabet = {10, 11, 12, 13, 14};
    int counts[3][5] = {};
    for (int q = 0; q < 20000; q++) {
        const Tokens drawn = tasks::Draw(1, tasks::Probe::recall, q).tokens(alphabet, 3);
        CHECK(std::set<uint16_t>(drawn.begin(), drawn.end()).size() == 3);
        for (size_t i = 0; i < 3; i++) counts[i][drawn[i] - 10]++;
    }
    for (const auto& place : counts)
        for (const int count : place) CHECK(std::abs(count - 4000) < 285);
    // More tokens than the alphabet has: one order of it after another.
    const Tokens drawn = tasks::Draw(1, tasks::Probe::recall, 0).tokens(alphabet, 12);
    CHECK(std::set<uint16_t>(drawn.begin(), drawn.begin() + 5).size() == 5);
    CHECK(std::set<uint16_t>(drawn.begin() + 5, drawn.begin() + 10).size() == 5);
}

TEST_CASE("Induction: a sequence and the same again") {
    for (const int V : {kByteVocab, kGpt2Vocab}) {
        const int n = 100, sequences = 6;
        const auto items = induction_probe(ordinary_tokens(V - 1), 2 * n - 1, n, sequences, 42);
        REQUIRE(items.size() == 2 * sequences);
        for (size_t i = 0; i < items.size(); i += 2) {
            const Scored &first = items[i], &second = items[i + 1];
            CHECK(first.group == static_cast<int>(i / 2));
            CHECK(second.group == first.group);
            CHECK(first.choice == 0);
            CHECK(second.choice == 1);
            CHECK(first.first == 1);
            CHECK(second.first == n + 1);
            Tokens twice = first.tokens;
            twice.insert(twice.end(), first.tokens.begin(), first.tokens.end());
            CHECK(second.tokens == twice);
            CHECK(std::set<uint16_t>(first.tokens.begin(), first.tokens.end()).size() == n);
            CHECK(*std::max_element(twice.begin(), twice.end()) < V - 1);
        }
        CHECK(items[0].tokens != items[2].tokens);

        const InductionSummary blind = induction_summary(items, uniform_model(items, V));
        CHECK(blind.sequences == sequences);
        CHECK(blind.first_loss == doctest::Approx(std::log(V)).epsilon(1e-12));
        CHECK(blind.second_loss == doctest::Approx(std::log(V)).epsilon(1e-12));
        CHECK(std::fabs(blind.score) < 1e-12);

        const InductionSummary copies = induction_summary(items, copying_model(items, V, 1));
        CHECK(copies.first_loss == doctest::Approx(std::log(V)).epsilon(1e-12));
        CHECK(copies.second_loss == doctest::Approx(std::log(2)).epsilon(1e-12));
        CHECK(copies.score == doctest::Approx(std::log(V / 2.0)).epsilon(1e-12));
        CHECK(copies.first_accuracy == 0);
        CHECK(copies.second_accuracy == 1);
    }
    const Tokens alphabet = ordinary_tokens(256);
    check_mentions(error_of([&] { induction_probe(alphabet, 64, 33, 1, 0); }), "repeats 2 to 32 tokens");
    check_mentions(error_of([&] { induction_probe(alphabet, 64, 1, 1, 0); }), "not 1");
    check_mentions(error_of([&] { induction_probe(Tokens{3}, 64, 8, 1, 0); }), "alphabet");
}

TEST_CASE("Recall: a key's value") {
    for (const int V : {kByteVocab, kGpt2Vocab}) {
        const int pairs = 8, questions = 400;
        const auto items = recall_probe(ordinary_tokens(V - 1), 2 * pairs + 1, pairs, questions, 42);
        REQUIRE(items.size() == static_cast<size_t>(pairs * questions));
        std::set<int> asked;
        for (size_t i = 0; i < items.size(); i++) {
            const Tokens& t = items[i].tokens;
            REQUIRE(t.size() == 2 * pairs + 2);
            CHECK(items[i].first == 2 * pairs + 1);
            CHECK(items[i].group == static_cast<int>(i) / pairs);
            CHECK(items[i].choice == static_cast<int>(i) % pairs);
            CHECK(std::set<uint16_t>(t.begin(), t.begin() + 2 * pairs).size() == 2 * pairs);
            CHECK(*std::max_element(t.begin(), t.end()) < V - 1);
            CHECK(t.back() == t[2 * static_cast<size_t>(items[i].choice) + 1]);
            CHECK(items[i].right == (t[2 * pairs] == t[2 * static_cast<size_t>(items[i].choice)]));
            if (items[i].right) asked.insert(items[i].choice);
        }
        CHECK(asked.size() == pairs);

        const ChoiceSummary copies = choice_summary(items, copying_model(items, V, 1));
        CHECK(copies.questions == questions);
        CHECK(copies.chance == 1.0 / pairs);
        CHECK(copies.accuracy == 1);
        CHECK(copies.exact == 1);
        CHECK(copies.loss == doctest::Approx(std::log(2)).epsilon(1e-12));
        // One that always takes the same answer is right by chance: 50 of 400, 6.6 being a standard
        // deviation.
        const ChoiceSummary blind = choice_summary(items, uniform_model(items, V));
        CHECK(std::fabs(blind.accuracy * questions - 50) < 5 * 6.6);
        CHECK(blind.loss == doctest::Approx(std::log(V)).epsilon(1e-12));
    }
    const Tokens alphabet = ordinary_tokens(256);
    check_mentions(error_of([&] { recall_probe(alphabet, 64, 32, 1, 0); }), "2 to 31 pairs");
    check_mentions(error_of([&] { recall_probe(alphabet, 64, 1, 1, 0); }), "not 1");
    check_mentions(error_of([&] { recall_probe(alphabet, 1024, 200, 1, 0); }),
                   "alphabet of 400 tokens, not 256");
}

TEST_CASE("Needle: a key's value at a depth of a text") {
    const int V = kByteVocab, T = 64, key = 3, candidates = 4, questions = 200;
    const size_t L = static_cast<size_t>(T - 1 - 2 * key);
    Tokens text;
    for (int i = 0; i < 2000; i++) text.push_back(static_cast<uint16_t>(random_bits(7, 0, i) % 100));
    const auto items = needle_probe(ordinary_tokens(V - 1), text, T, key, candidates, questions, 42);
    REQUIRE(items.size() == static_cast<size_t>(10 * questions * candidates));
    std::set<size_t> right_places;
    for (size_t i = 0; i < items.size(); i++) {
        const Tokens& t = items[i].tokens;
        const size_t question = i / candidates % questions, depth = i / candidates / questions;
        REQUIRE(t.size() == static_cast<size_t>(T) + 1);
        CHECK(items[i].first == T);
        CHECK(items[i].group == static_cast<int>(i / candidates));
        CHECK(items[i].choice == static_cast<int>(i % candidates));

        const size_t at = L * depth / 10;
        const Tokens asked(t.end() - 1 - key, t.end() - 1);
        const Tokens found(t.begin() + static_cast<long>(at), t.begin() + static_cast<long>(at) + key);
        CHECK(asked == found);
        CHECK(items[i].right == (t.back() == t[at + key]));
        if (items[i].right) right_places.insert(i % candidates);
        Tokens around(t.begin(), t.begin() + static_cast<long>(at));  // the text without needle and question
        around.insert(around.end(), t.begin() + static_cast<long>(at) + key + 1, t.end() - 1 - key);
        CHECK(around.size() == L);
        CHECK(std::search(text.begin(), text.end(), around.begin(), around.end()) != text.end());
        CHECK(std::search(around.begin(), around.end(), asked.begin(), asked.end()) == around.end());
        if (depth > 0) {  // the same question
            const Tokens& before = items[i - static_cast<size_t>(questions * candidates)].tokens;
            CHECK(Tokens(before.end() - 1 - key, before.end()) == Tokens(t.end() - 1 - key, t.end()));
        }
        if (i % candidates == 0) {
            std::set<uint16_t> distinct(asked.begin(), asked.end());
            int right = 0;
            for (size_t c = 0; c < candidates; c++) {
                distinct.insert(items[i + c].tokens.back());
                right += items[i + c].right;
            }
            CHECK(distinct.size() == key + candidates);
            CHECK(right == 1);
            CHECK(items[i].group == static_cast<int>(depth * questions + question));
        }
    }
    CHECK(right_places.size() == candidates);

    const auto copies = needle_summary(items, copying_model(items, V, key));
    const auto blind = needle_summary(items, uniform_model(items, V));
    for (size_t d = 0; d < 10; d++) {
        CHECK(copies[d].questions == questions);
        CHECK(copies[d].chance == 0.25);
        CHECK(copies[d].accuracy == 1);
        CHECK(copies[d].exact == 1);
        // 50 of 200, 6.1 being a standard deviation
        CHECK(std::fabs(blind[d].accuracy * questions - 50) < 5 * 6.1);
    }
    // A model that sees only the last 40 tokens finds what lies within them.
    std::vector<Scored> seen = items;
    for (Scored& item : seen) {
        item.tokens.erase(item.tokens.begin(), item.tokens.end() - 41);
        item.first = 40;
    }
    const auto near = needle_summary(seen, copying_model(seen, V, key));
    for (size_t d = 0; d < 10; d++) {
        const bool whole = L * d / 10 >= static_cast<size_t>(T) - 40;
        CHECK(near[d].exact == (whole ? 1 : 0));
    }

    const Tokens alphabet = ordinary_tokens(V - 1);
    check_mentions(error_of([&] { needle_probe(alphabet, text, 16, 3, 4, 1, 0); }), "context of 17 or more");
    check_mentions(error_of([&] { needle_probe(alphabet, text, 4096, 3, 4, 1, 0); }),
                   "needs 4089 tokens of text in a context of 4096; there are 2000");
    // the least context and the shortest text that will do
    const Tokens shortest(text.begin(), text.begin() + static_cast<long>(L));
    CHECK(needle_probe(alphabet, shortest, T, key, 4, 1, 0).size() == 40);
    CHECK(needle_probe(alphabet, text, 17, 3, 4, 1, 0).size() == 40);
    check_mentions(error_of([&] {
                       needle_probe(Tokens{1, 2, 3}, text, T, 3, 4, 1, 0);
                   }),
                   "alphabet of 7 tokens");
    // Of the keys 1, 2 and 3, the first is in the text.
    for (const Scored& item : needle_probe(Tokens{1, 2, 3}, Tokens(100, 1), T, 1, 2, 40, 0))
        CHECK(item.tokens[static_cast<size_t>(T) - 1] != 1);
    Tokens every;  // a text that holds every key
    for (int i = 0; i < 100; i++) every.push_back(static_cast<uint16_t>(i % 5));
    check_mentions(error_of([&] {
                       needle_probe(Tokens{0, 1, 2, 3, 4}, every, T, 1, 2, 1, 0);
                   }),
                   "use a longer one");
}

TEST_CASE("Probes follow from their seed, and more questions begin with fewer") {
    const Tokens alphabet = ordinary_tokens(256), text(500, 7);
    const auto tokens_of = [](const std::vector<Scored>& items) {
        std::vector<Tokens> all;
        for (const Scored& item : items) all.push_back(item.tokens);
        return all;
    };
    const auto induction = [&](int n, uint64_t seed) {
        return tokens_of(induction_probe(alphabet, 64, 16, n, seed));
    };
    const auto recall = [&](int n, uint64_t seed) {
        return tokens_of(recall_probe(alphabet, 64, 4, n, seed));
    };
    const auto needle = [&](int n, uint64_t seed) {
        return tokens_of(needle_probe(alphabet, text, 64, 2, 3, n, seed));
    };
    CHECK(induction(5, 1) == induction(5, 1));
    CHECK(recall(5, 1) == recall(5, 1));
    CHECK(needle(5, 1) == needle(5, 1));
    CHECK(induction(5, 1) != induction(5, 2));
    CHECK(recall(5, 1) != recall(5, 2));
    CHECK(needle(5, 1) != needle(5, 2));
    const auto begins_with = [](std::vector<Tokens> more, std::vector<Tokens> fewer, size_t first) {
        more.resize(first);
        fewer.resize(first);
        return more == fewer;
    };
    CHECK(begins_with(recall(9, 1), recall(5, 1), 5 * 4));
    CHECK(begins_with(induction(9, 1), induction(5, 1), 5 * 2));
    CHECK(begins_with(needle(9, 1), needle(5, 1), 5 * 3));  // of the first depth
}

TEST_CASE("Bad files") {
    const TempFolder folder;
    const std::string path = folder / "task.jsonl";
    const Tokenizer tokenizer = Tokenizer::bytes();
    const auto lambada = [&](const std::string& text) {
        write_text(path, text);
        return error_of([&] { read_lambada(path, tokenizer, kLong); });
    };
    const auto hellaswag = [&](const std::string& text) {
        write_text(path, text);
        return error_of([&] { read_hellaswag(path, tokenizer, kLong); });
    };
    const std::string good = "{\"text\": \"a b\"}\n";
    CHECK(lambada(good + good) == "");
    CHECK(lambada("{\"text\": \"a b\", \"other\": [1, {}]}") == "");  // no newline at the end
    CHECK(lambada("{\"text\": \"a b\"}\r\n") == "");

    const std::string two = path + ":2 ";
    check_mentions(error_of([&] { read_lambada(folder / "none.jsonl", tokenizer, kLong); }), "cannot open");
    check_mentions(error_of([&] { read_lambada(folder.path, tokenizer, kLong); }), "is not a file");
    CHECK(lambada("") == path + " is empty: there are no questions in it");
    CHECK(lambada(good + "\n" + good) == two + "is not valid JSON (at byte 1)");
    CHECK(lambada(good + "{\"text\": \"a b\"") == two + "is not valid JSON (at byte 15)");
    CHECK(lambada(good + "{\"text\": \"a b\"} {}") == two + "is not valid JSON (at byte 17)");
    CHECK(lambada(good + "{\"text\": \"a \\ud800b\"}") == two + "is not valid JSON (at byte 19)");
    CHECK(lambada(good + "{\"text\": 1e999}") == two + "is not valid JSON (a number is out of range)");
    CHECK(lambada(good + "{\"text\": \"a \xED\xA0\x80\"}") == two + "is not valid UTF-8 (at byte 13)");
    CHECK(lambada(good + std::string("{}\0", 3)) == two + "is not valid JSON (at byte 3)");
    CHECK(lambada(good + std::string(100, '[') + std::string(100, ']')) ==
          two + "is nested more than 64 levels deep");
    CHECK(lambada(good + std::string(1 << 20, ' ') + good) ==
          two + "has 1048591 bytes; 1048576 is the limit");
    CHECK(lambada(good + "[\"text\"]") == two + "must hold a JSON object");
    CHECK(lambada(good + "{\"texts\": \"a b\"}") == two + "has no \"text\"");
    CHECK(lambada(good + "{\"text\": [\"a b\"]}") == two + "has a \"text\" that is not a string");
    CHECK(lambada(good + "{\"text\": null}") == two + "has a \"text\" that is not a string");
    CHECK(lambada(good + "{\"text\": \"\"}") == two + "has an empty \"text\"");
    CHECK(lambada(good + "{\"text\": \"a b \"}") == two + "has a \"text\" that does not end in a word");
    CHECK(lambada(good + "{\"text\": \"a \\n\"}") == two + "has a \"text\" that does not end in a word");
    CHECK(lambada(good + "{\"text\": \"word\"}") == two + "has no text before the last word");
    CHECK(lambada(good + "{\"text\": \" \\n word\"}") == two + "has no text before the last word");

    const auto question = [](const std::string& endings, const std::string& label,
                             const std::string& ctx_a = "\"b\"", const std::string& rest = "") {
        return "{\"activity_label\": \"a\", \"ctx_a\": " + ctx_a +
               ", \"ctx_b\": \"c\", \"endings\": " + endings + ", \"label\": " + label + rest + "}\n";
    };
    const std::string four = "[\"w\", \"x\", \"y\", \"z\"]", fine = question(four, "3");
    CHECK(hellaswag(fine + fine) == "");
    CHECK(hellaswag(fine + question("[\"w\", \"x\", \"y\"]", "0")) ==
          two + "has \"endings\" that are not an array of 4");
    CHECK(hellaswag(fine + question("{}", "0")) == two + "has \"endings\" that are not an array of 4");
    CHECK(hellaswag(fine + question("[\"w\", \"x\", \"y\", 4]", "0")) ==
          two + "has an ending that is not a string");
    CHECK(hellaswag(fine + question("[\"w\", \"x\", \"y\", \"\"]", "0")) ==
          two + "has an ending without text");
    CHECK(hellaswag(fine + question("[\"w\", \"x\", \"y\", \"[step] \"]", "0")) ==
          two + "has an ending without text");
    for (const char* label : {"4", "-1", "1.0", "\"1\"", "null", "18446744073709551615", "[0]"})
        CHECK(hellaswag(fine + question(four, label)) ==
              two + "has a \"label\" that is not a number from 0 to 3");
    CHECK(hellaswag(fine + question(four, "0", "7")) == two + "has a \"ctx_a\" that is not a string");
    CHECK(hellaswag(fine + "{\"activity_label\": \"a\", \"ctx_a\": \"b\"}") == two + "has no \"ctx_b\"");
    CHECK(hellaswag(fine + "{\"activity_label\": \"[\", \"ctx_a\": \"\", \"ctx_b\": \"]\", \"endings\": " +
                    four + ", \"label\": 0}") == two + "has no text before an ending");
    CHECK(hellaswag(good) == path + ":1 has no \"activity_label\"");

    write_text(path, "");
    fs::resize_file(path, (64u << 20) + 1);
    check_mentions(error_of([&] { read_lambada(path, tokenizer, kLong); }),
                   "too many for a file of questions");
}

TEST_CASE("The whole of LAMBADA") {
    const char* mirror = std::getenv("DATA_MIRROR");
    std::string path;
    std::error_code error;
    if (mirror != nullptr && fs::is_directory(mirror, error))
        for (const auto& entry : fs::recursive_directory_iterator(mirror, error))
            if (entry.path().filename() == "lambada_test.jsonl") path = entry.path();
    if (path.empty()) {
        MESSAGE("skipped: there is no lambada_test.jsonl in DATA_MIRROR");
        return;
    }
    const Tokenizer tokenizer = Tokenizer::bytes();
    const auto items = read_lambada(path, tokenizer, kLong);
    CHECK(items.size() == 5153);
    for (const Scored& item : items) {
        const std::string word = scored_of(item, tokenizer);
        CHECK(word.rfind(' ') == 0);
        CHECK(word.size() > 1);
    }
}
