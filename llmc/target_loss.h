// --target-loss: lambda as the multiplier of a constraint. "No degradation" is a limit on the loss and not a
// weight, so this solves
//
//   minimize R  subject to  CE <= CE_plain + margin
//
// CE_plain being the training loss of a plain run with the same start, data order and number of updates. Its
// Lagrangian, R + mu (CE - CE_plain - margin) with mu >= 0, has the same minimizers as CE + lambda R with
// lambda = 1 / mu. Dual ascent raises mu while the limit is exceeded and lowers it while there is room, so
// lambda falls and rises. The step is taken in log mu = -log lambda, since useful values lie decades apart
// and must stay positive:
//
//   e <- 0.98 e + 0.02 (CE - CE_plain)         the excess over the plain run, smoothed
//   v  = e / margin, within 0 and 3            1 at the limit
//   I <- I exp(0.01 (1 - v))                   dual ascent; I = 1 at first, and I <= 1 during the warm-up
//   lambda = l I exp(-2 v)                     l: what -l says, times the share that --lambda-warmup is up to
//
// During the warm-up I may not rise above 1. Early in a run no lambda costs anything yet, for the plain
// run's loss is high, too; what I gained then would be in lambda when the plain run has learned to do better,
// and what attention that has condensed too early costs is not won back within the run, whatever lambda does.
// In three runs of 700 updates of `tiny`, from l = 0.1 with margins of 0.01 and 0.02, lambda was at 2.5 to 5
// times its schedule after 250 updates without that rule, and the loss ended 2.6 to 4.7 margins over the
// plain run's, though lambda had fallen to nothing. With it, two of these ended 3.0 and 1.6 margins over, and
// from l = 0.03 the same two 1.0 and 1.2: so begin with a small l. From there 10 of 12 runs kept the limit
// (three seeds, two margins, tail and kl); the other two, of one seed, ended 2.3 and 1.2 margins over plain.
//
// The last factor is a brake. The loss answers lambda late, so that dual ascent alone runs past the limit and
// swings around it; exp(-2 v) answers at once, as the penalty of an augmented Lagrangian does (it makes a PI
// controller of the loop: arXiv 2007.03964), and moves no solution, for I settles only where v = 1.
//
// The two losses are of the same batch, so their difference is far less noisy than either; smoothing is
// linear, so the smoothed difference is the difference of the two smoothed curves; and it starts at 0, where
// both runs do. Dividing by the margin makes the loop alike for all margins: where the excess grows as a
// power n of lambda, dv / d log lambda at the limit is n, whatever the margin.
//
// An update's loss is known on the host while the next one runs on a GPU already. So that no bit depends on
// that timing, lambda of update t follows from the losses up to that of update t - 2, on every device.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

// What --target-loss takes.
struct TargetLossFlag {
    std::string path;  // a run folder or its metrics.jsonl; empty: the flag was not given
    float margin = 0;  // nats a token
};

// RUN:MARGIN, cut at the last colon. Throws Error on anything else.
TargetLossFlag parse_target_loss(const std::string& text);

// The training losses, update by update, of the plain run whose folder or metrics.jsonl `path` names. Throws
// Error unless that run is plain, complete, and alike in every entry of `settings` that is not the
// regularizer's; from: what it must have started from.
std::vector<float> read_plain_losses(std::string path, const std::string& from,
                                     const std::map<std::string, std::string>& settings, int64_t updates);

// The controller. Updates are numbered from 1; a run calls factor(t) before update t and observe(ce) once
// for each update, in order, at the latest before factor() of the next but one.
class TargetLoss {
  public:
    static constexpr double kSmoothing = 0.98;     // a memory of 50 updates: single batches even out
    static constexpr double kRate = 0.01;          // with room to spare, lambda grows e-fold in 100 updates
    static constexpr double kBrake = 2.0;          // at the limit, lambda is l I / e^2
    static constexpr double kMostViolation = 3.0;  // beyond, an excess does not say how far lambda is off
    static constexpr double kMostFactor = 1000.0;  // neither I nor its inverse is larger

    // warmup: the update at which lambda's rise by its schedule ends.
    TargetLoss(std::vector<float> plain, float margin, int64_t warmup = 0);

    // What lambda of update t is multiplied by.
    float factor(int64_t t) const;

    // The loss of the next update, which must be finite.
    void observe(float ce);

    double excess() const { return excess_; }  // smoothed, nats a token

    // For a checkpoint, and back from it: bit for bit. Throws Error on a text of another making.
    std::string state() const;
    void restore(const std::string& text, int64_t updates_done);

    // The setting that a resumed run must share: the margin and a digest of the plain run's losses.
    std::string setting() const;

  private:
    double violation() const { return std::clamp(excess_ / margin_, 0.0, kMostViolation); }
    double log_factor() const { return log_integral_ - kBrake * violation(); }

    std::vector<float> plain_;
    double margin_;
    int64_t warmup_;
    int64_t observed_ = 0;
    double excess_ = 0;
    double log_integral_ = 0;
    double log_before_ = 0;  // log_factor() before the last update that was observed
};
