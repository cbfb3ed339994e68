#include "attention_report.h"

#include <algorithm>
#include <cassert>
#include <cfloat>
#include <cmath>
#include <nlohmann/json.hpp>

#include "error.h"

AttentionReport::AttentionReport(int layers, int heads, int T, int k)
    : layers_(layers),
      heads_(heads),
      T_(T),
      k_(k),
      summaries_((size_t)layers * heads),
      buckets_((size_t)layers * num_buckets()) {
    assert(layers > 0 && heads > 0 && T > 0 && k > 0);
}

void AttentionReport::add(int layer, const RowStats* stats, int B) {
    assert(layer >= 0 && layer < layers_);
    for (int b = 0; b < B; b++)
        for (int head = 0; head < heads_; head++)
            for (int i = 0; i < T_; i++) add_row(layer, head, i, *stats++);
}

nlohmann::json AttentionReport::heads() const {
    nlohmann::json list = nlohmann::json::array();
    for (int layer = 0; layer < layers_; layer++)
        for (int head = 0; head < heads_; head++) list.push_back(head_json(layer, head));
    return list;
}

nlohmann::json AttentionReport::mass_by_position() const {
    nlohmann::json begin = nlohmann::json::array(), mass = nlohmann::json::array();
    for (int x = 0; x < num_buckets(); x++) begin.push_back(x * kBucket);
    for (int layer = 0; layer < layers_; layer++) {
        nlohmann::json row = nlohmann::json::array();
        for (int x = 0; x < num_buckets(); x++) row.push_back(mean(buckets_[layer * num_buckets() + x]));
        mass.push_back(row);
    }
    return {{"begin", begin}, {"mass", mass}};
}

nlohmann::json AttentionReport::mean_mass() const {
    return mean(overall().mass_k);
}

nlohmann::json AttentionReport::mean_mass_nosink() const {
    const Summary total = overall();
    return ratio(total.mass_nosink_k, total.nosink_k);
}

std::vector<AttentionReport::Choice> AttentionReport::heads_to_show() const {
    std::vector<Choice> choices;
    auto choose = [&](const std::string& why, auto value) {
        int best = -1;
        for (int x = 0; x < layers_ * heads_; x++)
            if (summaries_[x].mass_k.count > 0 &&
                (best < 0 || value(summaries_[x]) > value(summaries_[best])))
                best = x;
        if (best < 0) return;
        for (Choice& c : choices)
            if (c.layer * heads_ + c.head == best) {
                c.why += ", " + why;
                return;
            }
        choices.push_back({best / heads_, best % heads_, why});
    };
    choose("most condensed", [](const Summary& s) { return s.mass_k.sum; });
    choose("least condensed", [](const Summary& s) { return -s.mass_k.sum; });
    choose("largest share on position 0", [](const Summary& s) { return s.first.sum; });
    choose("most on the previous token", [](const Summary& s) { return s.previous.sum; });
    return choices;
}

void AttentionReport::add_row(int layer, int head, int i, const RowStats& row) {
    static_assert(sizeof(RowStats) % sizeof(float) == 0);
    const float* numbers = reinterpret_cast<const float*>(&row);
    for (size_t x = 0; x < sizeof(RowStats) / sizeof(float); x++)
        if (!std::isfinite(numbers[x]))
            fail(
                "attention is not finite in layer %d, head %d at position %d: the model's weights have "
                "diverged or are damaged",
                layer, head, i);

    const int n = i + 1;
    Summary& s = summaries_[(size_t)layer * heads_ + head];
    for (int x = 0; x < kNumReportKs; x++)
        if (n > kReportKs[x]) {
            s.mass[x].add(row.mass[x]);
            s.mass_nosink[x].add(row.mass_nosink[x]);
            s.nosink[x].add(row.nosink);
        }
    if (n > k_) {
        s.mass_k.add(row.mass_k);
        s.mass_nosink_k.add(row.mass_nosink_k);
        s.nosink_k.add(row.nosink);
        buckets_[layer * num_buckets() + i / kBucket].add(row.mass_k);
        s.tau.push_back(row.tau);
        s.error.push_back(row.error);
        s.error_relative.push_back(row.error > 0 ? row.error / std::max(row.norm, FLT_MIN) : 0.0f);
    }
    s.keys90.add(row.keys90);
    s.keys95.add(row.keys95);
    s.keys99.add(row.keys99);
    s.entropy.add(row.entropy);
    s.participation.add(1.0 / (double)row.sum_squares);
    if (i >= 2) {  // before, "first", "previous" and "self" are the same or nearly all there is
        s.first.add(row.first);
        s.self.add(row.self);
        s.previous.add(row.previous);
    }
    s.max_score = std::max(s.max_score, row.max_score);
}

nlohmann::json AttentionReport::ratio(const Sum& part, const Sum& whole) {
    return whole.sum > 0 ? nlohmann::json(part.sum / whole.sum) : nlohmann::json();
}

nlohmann::json AttentionReport::mean(const Sum& s) {
    return s.count > 0 ? nlohmann::json(s.sum / (double)s.count) : nlohmann::json();
}

nlohmann::json AttentionReport::spread(std::vector<float> values) {
    if (values.empty())
        return {{"mean", nullptr}, {"q50", nullptr}, {"q90", nullptr}, {"q99", nullptr}, {"max", nullptr}};
    std::sort(values.begin(), values.end());
    Sum sum;
    for (float x : values) sum.add(x);
    auto quantile = [&](int percent) { return values[(values.size() * percent + 99) / 100 - 1]; };
    return {{"mean", mean(sum)},
            {"q50", quantile(50)},
            {"q90", quantile(90)},
            {"q99", quantile(99)},
            {"max", values.back()}};
}

nlohmann::json AttentionReport::head_json(int layer, int head) const {
    const Summary& s = summaries_[(size_t)layer * heads_ + head];
    nlohmann::json mass = nlohmann::json::array(), nosink = nlohmann::json::array();
    for (int x = 0; x < kNumReportKs; x++) {
        mass.push_back(mean(s.mass[x]));
        nosink.push_back(ratio(s.mass_nosink[x], s.nosink[x]));
    }
    return {{"layer", layer},
            {"head", head},
            {"mass", mass},
            {"mass_nosink", nosink},
            {"mass_k", mean(s.mass_k)},
            {"mass_nosink_k", ratio(s.mass_nosink_k, s.nosink_k)},
            {"keys90", mean(s.keys90)},
            {"keys95", mean(s.keys95)},
            {"keys99", mean(s.keys99)},
            {"entropy", mean(s.entropy)},
            {"participation", mean(s.participation)},
            {"first", mean(s.first)},
            {"self", mean(s.self)},
            {"previous", mean(s.previous)},
            {"tau", spread(s.tau)},
            {"error", spread(s.error)},
            {"error_relative", spread(s.error_relative)},
            {"max_score", s.entropy.count > 0 ? nlohmann::json(s.max_score) : nlohmann::json()}};
}

AttentionReport::Summary AttentionReport::overall() const {
    Summary total;
    for (const Summary& s : summaries_) {
        total.mass_k.add(s.mass_k);
        total.mass_nosink_k.add(s.mass_nosink_k);
        total.nosink_k.add(s.nosink_k);
    }
    return total;
}
