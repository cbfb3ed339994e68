// The learning rate at each update: a linear warm-up, then one of four shapes down to a fraction of the peak.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

enum class Schedule { cosine, linear, constant, wsd };
inline constexpr const char* kScheduleWords[] = {"cosine", "linear", "constant", "wsd"};

inline const char* schedule_name(Schedule s) {
    return kScheduleWords[static_cast<int>(s)];
}

// step: from 0, of `updates`. The warm-up reaches peak at its last update; the decay reaches final_fraction *
// peak at the run's last one, unless that is still the warm-up's or the first. wsd (warm-up, stable, decay)
// stays at the peak until the last fifth of the run, rounded down, but for one update at least.
inline float learning_rate(Schedule schedule, float peak, int64_t step, int64_t warmup, int64_t updates,
                           float final_fraction) {
    if (step < warmup) return peak * static_cast<float>(step + 1) / static_cast<float>(warmup);
    if (schedule == Schedule::constant) return peak;
    int64_t begin = warmup > 0 ? warmup - 1 : 0;  // the last update at the peak
    if (schedule == Schedule::wsd) {
        const int64_t stable_end = updates - std::max<int64_t>(1, updates / 5) - 1;
        if (stable_end > begin) begin = stable_end;
    }
    if (step <= begin) return peak;
    const int64_t end = updates - 1;
    const double progress =
        step >= end ? 1.0 : static_cast<double>(step - begin) / static_cast<double>(end - begin);
    const double share =
        schedule == Schedule::cosine ? 0.5 * (1.0 + std::cos(M_PI * progress)) : 1.0 - progress;
    return static_cast<float>(peak * (final_fraction + (1.0 - final_fraction) * share));
}
