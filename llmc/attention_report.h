// The statistics of attention rows, summed up: what a report says of each head, of each layer by position,
// and of the model. It is fed with the RowStats of whole sequences, layer by layer and batch by batch.
//
// Means are taken in double. What depends on k is a mean over the rows that see more than k keys, for the
// others have nothing to discard. Quantiles are exact: the q-quantile of n numbers is the least of them that
// at least q n of them do not exceed. For that every such row's tau and errors are kept: 12 bytes a row and
// head, for GPT-2 124M (144 heads) 1.8 MB for each sequence of 1024.
//
// mass_nosink is a ratio of sums, as in the trainer's validation: of all attention that does not go to key 0,
// the share that goes to keys in the top k.
#pragma once
#include <cmath>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "attention_row_stats.h"

class AttentionReport {
  public:
    static constexpr int kBucket = 16;  // positions that mass_by_position puts together

    // A head, and what is remarkable about it.
    struct Choice {
        int layer, head;
        std::string why;
    };

    // T: tokens of a sequence; k: the k that the RowStats were made for.
    AttentionReport(int layers, int heads, int T, int k);

    // stats [B,NH,T] of one layer. Throws where a number is not finite, since nothing can be said of such a
    // model.
    void add(int layer, const RowStats* stats, int B);

    // "heads" of the report: L * NH objects, layer-major.
    nlohmann::json heads() const;

    // "mass_by_position": the mean top-k mass of each layer's queries by position, kBucket positions
    // together.
    nlohmann::json mass_by_position() const;

    // The mean top-k mass of all heads, and the same of the attention that does not go to key 0; null where
    // no row has more than k keys.
    nlohmann::json mean_mass() const;
    nlohmann::json mean_mass_nosink() const;

    // Rows of each head so far.
    int64_t rows_per_head() const { return summaries_[0].entropy.count; }

    // The heads that are worth a picture, up to 4: a head that is first in two respects is named once. Empty
    // before the first row with more than k keys.
    std::vector<Choice> heads_to_show() const;

  private:
    struct Sum {
        double sum = 0;
        int64_t count = 0;
        void add(double x) {
            sum += x;
            count++;
        }
        void add(const Sum& other) {
            sum += other.sum;
            count += other.count;
        }
    };
    struct Summary {
        Sum mass[kNumReportKs], mass_nosink[kNumReportKs], nosink[kNumReportKs];
        Sum mass_k, mass_nosink_k, nosink_k;
        Sum keys90, keys95, keys99, entropy, participation, first, self, previous;
        std::vector<float> tau, error, error_relative;
        float max_score = -INFINITY;
    };

    int num_buckets() const { return (T_ + kBucket - 1) / kBucket; }

    void add_row(int layer, int head, int i, const RowStats& row);

    static nlohmann::json ratio(const Sum& part, const Sum& whole);
    static nlohmann::json mean(const Sum& s);
    static nlohmann::json spread(std::vector<float> values);

    nlohmann::json head_json(int layer, int head) const;

    Summary overall() const;

    int layers_, heads_, T_, k_;
    std::vector<Summary> summaries_;  // [L,NH]
    std::vector<Sum> buckets_;        // [L, buckets]
};
