// The report of attention rows: every number against plain sums over the rows, on rows whose numbers are made
// up.
#include "../llmc/attention_report.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "errors.h"

namespace {

constexpr int kLayers = 2, kHeads = 3, kT = 40, kK = 20;

// Rows with random numbers, [B,NH,T].
std::vector<RowStats> random_rows(int B, int T, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::uniform_real_distribution<float> uniform(0.01f, 1.0f);
    std::vector<RowStats> rows((size_t)B * kHeads * T);
    for (RowStats& row : rows) {
        float* numbers = reinterpret_cast<float*>(&row);
        for (size_t x = 0; x < sizeof(RowStats) / sizeof(float); x++) numbers[x] = uniform(rng);
    }
    return rows;
}

// A report of three batches, of different sizes, and the rows that went into each layer and head with their
// i.
struct Fed {
    AttentionReport report{kLayers, kHeads, kT, kK};
    std::vector<std::pair<int, RowStats>> rows[kLayers][kHeads];

    explicit Fed(const std::vector<int>& batches = {1, 3, 2}) {
        for (size_t batch = 0; batch < batches.size(); batch++)
            for (int layer = 0; layer < kLayers; layer++) {
                const auto stats = random_rows(batches[batch], kT, 10 * batch + layer);
                report.add(layer, stats.data(), batches[batch]);
                for (size_t row = 0; row < stats.size(); row++)
                    rows[layer][row / kT % kHeads].push_back({(int)(row % kT), stats[row]});
            }
    }
};

// The mean over the rows of more than `more_than` keys.
template <class F>
double mean_of(const std::vector<std::pair<int, RowStats>>& rows, int more_than, F value) {
    double sum = 0, count = 0;
    for (const auto& [i, row] : rows)
        if (i + 1 > more_than) {
            sum += (double)value(row);
            count++;
        }
    return sum / count;
}

// By the definition: the least number that at least q of all do not exceed.
double quantile_of(const std::vector<float>& values, int percent) {
    float best = INFINITY;
    for (float candidate : values) {
        size_t reach = 0;
        for (float x : values) reach += x <= candidate;
        if (100 * reach >= percent * values.size()) best = std::min(best, candidate);
    }
    return best;
}

void check_spread(const nlohmann::json& spread, const std::vector<float>& values) {
    double sum = 0, max = 0;
    for (float x : values) {
        sum += (double)x;
        max = std::max(max, (double)x);
    }
    CHECK(spread.size() == 5);
    CHECK(spread["mean"].get<double>() == doctest::Approx(sum / (double)values.size()).epsilon(1e-12));
    CHECK(spread["q50"] == quantile_of(values, 50));
    CHECK(spread["q90"] == quantile_of(values, 90));
    CHECK(spread["q99"] == quantile_of(values, 99));
    CHECK(spread["max"] == max);
}

// One row of each head, whose numbers the caller then sets.
std::vector<RowStats> plain_rows(int T) {
    RowStats row = {};
    row.sum_squares = row.norm = 1.0f;
    return std::vector<RowStats>((size_t)kHeads * T, row);
}

}  // namespace

TEST_CASE("each head's numbers are means over the rows that they are about") {
    const Fed fed;
    const nlohmann::json heads = fed.report.heads();
    REQUIRE(heads.size() == kLayers * kHeads);
    CHECK(fed.report.rows_per_head() == 6 * kT);
    for (int layer = 0; layer < kLayers; layer++)
        for (int head = 0; head < kHeads; head++) {
            const nlohmann::json& got = heads[layer * kHeads + head];
            const auto& rows = fed.rows[layer][head];
            CHECK(got["layer"] == layer);
            CHECK(got["head"] == head);
            auto check = [&](const nlohmann::json& number, int more_than, auto value) {
                CHECK(number.get<double>() ==
                      doctest::Approx(mean_of(rows, more_than, value)).epsilon(1e-12));
            };
            for (int x = 0; x < kNumReportKs; x++) {
                if (kReportKs[x] >= kT) {  // no row has so many keys
                    CHECK(got["mass"][x].is_null());
                    CHECK(got["mass_nosink"][x].is_null());
                    continue;
                }
                check(got["mass"][x], kReportKs[x], [&](const RowStats& r) { return r.mass[x]; });
                const double part =
                    mean_of(rows, kReportKs[x], [&](const RowStats& r) { return r.mass_nosink[x]; });
                const double whole = mean_of(rows, kReportKs[x], [](const RowStats& r) { return r.nosink; });
                CHECK(got["mass_nosink"][x].get<double>() == doctest::Approx(part / whole).epsilon(1e-12));
            }
            check(got["mass_k"], kK, [](const RowStats& r) { return r.mass_k; });
            const double part = mean_of(rows, kK, [](const RowStats& r) { return r.mass_nosink_k; });
            const double whole = mean_of(rows, kK, [](const RowStats& r) { return r.nosink; });
            CHECK(got["mass_nosink_k"].get<double>() == doctest::Approx(part / whole).epsilon(1e-12));
            check(got["keys90"], 0, [](const RowStats& r) { return r.keys90; });
            check(got["keys95"], 0, [](const RowStats& r) { return r.keys95; });
            check(got["keys99"], 0, [](const RowStats& r) { return r.keys99; });
            check(got["entropy"], 0, [](const RowStats& r) { return r.entropy; });
            check(got["participation"], 0, [](const RowStats& r) { return 1.0 / (double)r.sum_squares; });
            check(got["first"], 2, [](const RowStats& r) { return r.first; });
            check(got["self"], 2, [](const RowStats& r) { return r.self; });
            check(got["previous"], 2, [](const RowStats& r) { return r.previous; });
            std::vector<float> tau, error, relative;
            float max_score = 0;
            for (const auto& [i, row] : rows) {
                max_score = std::max(max_score, row.max_score);
                if (i + 1 <= kK) continue;
                tau.push_back(row.tau);
                error.push_back(row.error);
                relative.push_back(row.error / row.norm);
            }
            check_spread(got["tau"], tau);
            check_spread(got["error"], error);
            check_spread(got["error_relative"], relative);
            CHECK(got["max_score"] == max_score);
        }
}

TEST_CASE("quantiles of few rows, and of equal ones") {
    for (int rows : {1, 2, 3, 10, 11, 99, 100, 101}) {
        CAPTURE(rows);
        AttentionReport report(1, kHeads, 1 + rows, 1);  // k = 1: all rows but the first
        auto stats = plain_rows(1 + rows);
        std::vector<float> tau;
        for (int i = 1; i <= rows; i++) {
            stats[i].tau = (float)(i * 7 % rows / 2);  // shuffled, and every number twice
            tau.push_back(stats[i].tau);
        }
        report.add(0, stats.data(), 1);
        check_spread(report.heads()[0]["tau"], tau);
    }
}

TEST_CASE("mass by position, layer by layer: buckets of 16, null below k keys") {
    const Fed fed;
    const nlohmann::json got = fed.report.mass_by_position();
    CHECK(got["begin"] == nlohmann::json({0, 16, 32}));
    CHECK(AttentionReport(1, 1, 32, 1).mass_by_position()["begin"] == nlohmann::json({0, 16}));
    REQUIRE(got["mass"].size() == kLayers);
    for (int layer = 0; layer < kLayers; layer++) {
        REQUIRE(got["mass"][layer].size() == 3);
        CHECK(got["mass"][layer][0].is_null());
        for (int bucket : {1, 2}) {
            double sum = 0, count = 0;
            for (int head = 0; head < kHeads; head++)
                for (const auto& [i, row] : fed.rows[layer][head])
                    if (i + 1 > kK && i / 16 == bucket) {
                        sum += (double)row.mass_k;
                        count++;
                    }
            CHECK(got["mass"][layer][bucket].get<double>() == doctest::Approx(sum / count).epsilon(1e-12));
        }
    }
}

TEST_CASE("the whole model's mass, with and without position 0") {
    const Fed fed;
    double mass = 0, part = 0, whole = 0;
    for (const auto& layer : fed.rows)
        for (const auto& head : layer) {
            mass += mean_of(head, kK, [](const RowStats& r) { return r.mass_k; }) / (kLayers * kHeads);
            part += mean_of(head, kK, [](const RowStats& r) { return r.mass_nosink_k; });
            whole += mean_of(head, kK, [](const RowStats& r) { return r.nosink; });
        }
    CHECK(fed.report.mean_mass().get<double>() == doctest::Approx(mass).epsilon(1e-12));
    CHECK(fed.report.mean_mass_nosink().get<double>() == doctest::Approx(part / whole).epsilon(1e-12));
}

TEST_CASE("nothing measured is null, not a number") {
    const AttentionReport empty(kLayers, kHeads, kT, kK);
    CHECK(empty.rows_per_head() == 0);
    CHECK(empty.mean_mass().is_null());
    CHECK(empty.mean_mass_nosink().is_null());
    CHECK(empty.heads_to_show().empty());
    const nlohmann::json head = empty.heads()[0];
    for (const char* name : {"keys90", "entropy", "participation", "first", "max_score"})
        CHECK(head[name].is_null());
    CHECK(head["tau"]["q99"].is_null());

    // two tokens: no row has more than k keys, none is far enough from position 0
    AttentionReport two(1, kHeads, 2, kK);
    two.add(0, plain_rows(2).data(), 1);
    CHECK(two.heads()[0]["entropy"] == 0.0);
    CHECK(two.heads()[0]["first"].is_null());
    CHECK(two.heads()[0]["tau"]["mean"].is_null());
    CHECK(two.mean_mass().is_null());

    // all attention on position 0: without it there is nothing to take a share of
    AttentionReport sink(1, kHeads, kT, kK);
    sink.add(0, plain_rows(kT).data(), 1);
    CHECK(sink.heads()[0]["mass_nosink"][0].is_null());
    CHECK(sink.mean_mass_nosink().is_null());
}

TEST_CASE("an output of length 0 has no relative error of NaN") {
    AttentionReport report(1, kHeads, 3, 1);
    auto stats = plain_rows(3);
    for (RowStats& row : stats) row.norm = 0.0f;
    for (RowStats& row : stats) row.max_score = -3.0f;
    report.add(0, stats.data(), 1);
    CHECK(report.heads()[0]["error_relative"]["max"] == 0.0);
    CHECK(report.heads()[0]["max_score"] == -3.0f);
}

TEST_CASE("numbers that are not finite are refused, by layer, head and position") {
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        AttentionReport report(kLayers, kHeads, 4, 1);
        auto stats = plain_rows(4);
        stats[2 * 4 + 3].entropy = bad;
        check_mentions(error_of([&] { report.add(1, stats.data(), 1); }),
                       "not finite in layer 1, head 2 at position 3");
    }
}

TEST_CASE("heads worth a picture: the first in each respect, a head that is it twice only once") {
    AttentionReport report(2, kHeads, 4, 1);
    auto stats = plain_rows(4);
    auto set = [&](int head, float mass, float first, float previous) {
        for (int i = 0; i < 4; i++) {
            stats[head * 4 + i].mass_k = mass;
            stats[head * 4 + i].first = first;
            stats[head * 4 + i].previous = previous;
        }
    };
    set(0, 0.5f, 0.2f, 0.1f);
    set(1, 0.9f, 0.8f, 0.0f);
    set(2, 0.6f, 0.1f, 0.3f);
    report.add(0, stats.data(), 1);
    set(0, 0.3f, 0.0f, 0.1f);
    set(1, 0.7f, 0.3f, 0.1f);
    set(2, 0.4f, 0.1f, 0.6f);
    report.add(1, stats.data(), 1);
    const auto choices = report.heads_to_show();
    REQUIRE(choices.size() == 3);
    CHECK(choices[0].layer == 0);
    CHECK(choices[0].head == 1);
    CHECK(choices[0].why == "most condensed, largest share on position 0");
    CHECK(choices[1].layer == 1);
    CHECK(choices[1].head == 0);
    CHECK(choices[1].why == "least condensed");
    CHECK(choices[2].layer == 1);
    CHECK(choices[2].head == 2);
    CHECK(choices[2].why == "most on the previous token");
}
