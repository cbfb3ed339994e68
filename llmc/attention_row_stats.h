// What is measured of one attention row. attention_row_stats.cuh measures it, attention_report.h sums it up.
//
// p is the row's softmax over the n = i + 1 keys that query i sees, S its k largest (of equal scores the
// earliest), M the mass of S and tau = 1 - M. mu_head and mu_tail are the p-weighted mean values of S and of
// the rest; o is the output of the whole row, o_k = mu_head that of the row cut to S and renormalized. Then
// exactly
//
//   o - o_k = tau (mu_tail - mu_head)        TV(p, p cut to S) = tau
//
// (arXiv 2512.07647). In floats the right side keeps its digits where tau is small, and the left side does
// not.
#pragma once

// Rows are cut to each of these k, besides the one that the caller gives.
inline constexpr int kReportKs[] = {1, 2, 4, 8, 16, 32, 64};
inline constexpr int kNumReportKs = sizeof(kReportKs) / sizeof(kReportKs[0]);

// All floats. Where n <= k, M is 1, and tau and the errors are 0.
struct RowStats {
    float mass[kNumReportKs];         // M for each of kReportKs
    float mass_nosink[kNumReportKs];  // the mass of S without key 0
    float mass_k, mass_nosink_k;      // the same for the caller's k
    float tau;                        // of the caller's k, as are the errors; summed over the tail
    float error;                      // tau |mu_tail - mu_head|
    float error_direct;               // |o - o_k|
    float norm;                       // |o|
    float nosink;                     // the mass of all keys but key 0
    float first, self, previous;      // p of key 0, of key i, of key i - 1 (0 where there is none)
    float keys90, keys95, keys99;     // the fewest keys that hold 90, 95 and 99% of the mass
    float entropy;                    // in nats
    float sum_squares;                // of p; 1 / this is an effective number of keys
    float max_score;
};
