#include "target_loss.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "checkpoint.h"
#include "error.h"
#include "files.h"
#include "flags.h"
#include "json_file.h"
#include "metrics.h"
#include "sampler.h"

TargetLossFlag parse_target_loss(const std::string& text) {
    const size_t colon = text.rfind(':');
    if (colon == text.npos || colon == 0)
        fail("--target-loss takes a plain run and a margin in nats, as in log/run1:0.02, not '%s'",
             printable(text).c_str());
    // An excess of less than 1e-4 nats would be noise: the loop divides by it.
    return {text.substr(0, colon),
            parse_float("--target-loss RUN:MARGIN", text.substr(colon + 1), 1e-4, 100)};
}

std::vector<float> read_plain_losses(std::string path, const std::string& from,
                                     const std::map<std::string, std::string>& settings, int64_t updates) {
    if (is_folder(path)) path += "/metrics.jsonl";
    if (!is_file(path))
        fail(
            "--target-loss: there is no %s: give the plain run's folder or metrics.jsonl (with -y, too, where "
            "they have moved)",
            path.c_str());
    const MappedFile file(path);
    const std::string text(reinterpret_cast<const char*>(file.data()), file.size());
    std::vector<float> losses;
    size_t begin = 0;
    for (int number = 1; begin < text.size(); number++) {
        const size_t end = text.find('\n', begin);
        if (end == text.npos) break;  // of a run that is writing it
        const auto object = parse_json(std::string_view(text).substr(begin, end - begin));
        begin = end + 1;
        const auto bad_line = [&] {
            fail("--target-loss: line %d of %s is not one that a run writes", number, path.c_str());
        };
        if (!object.is_object()) bad_line();
        if (number == 1) {
            const std::map<std::string, std::string> was = settings_of_line(object);
            const auto recorded = [&](const std::string& key) {
                return was.contains(key) ? was.at(key) : std::string("not recorded");
            };
            if (recorded("lambda") != "0")
                fail("--target-loss: %s is not of a plain run (-l 0): its lambda is %s", path.c_str(),
                     printable(recorded("lambda")).c_str());
            const auto compare = [&](const std::string& name, const std::string& theirs,
                                     const std::string& ours) {
                if (!same_setting(theirs, ours, !was.contains(kDataDigest)))
                    fail(
                        "--target-loss: %s is of a run whose %s is %s, and here it is %s: give them the same",
                        path.c_str(), name.c_str(), printable(theirs).c_str(), printable(ours).c_str());
            };
            compare("start (-e)", absolute_path(recorded("from")), absolute_path(from));
            for (const auto& [name, value] : settings)
                if (name != "lambda" && name != "topk" && name != "reg" && name != "lambda-warmup" &&
                    name != "lambda-layers" && name != kValDigest &&
                    (name != kDataDigest || was.contains(name)))
                    compare(name, recorded(name), value);
        } else if (object.contains("ce")) {
            if (!object.contains("step") || object["step"] != losses.size() + 1 || !object["ce"].is_number())
                bad_line();
            losses.push_back(object["ce"].get<float>());
            if (!std::isfinite(losses.back())) bad_line();
        }
    }
    if ((int64_t)losses.size() != updates)
        fail("--target-loss: %s holds %zu updates of a run of %lld: let that run finish first", path.c_str(),
             losses.size(), (long long)updates);
    return losses;
}

TargetLoss::TargetLoss(std::vector<float> plain, float margin, int64_t warmup)
    : plain_(std::move(plain)), margin_(margin), warmup_(warmup) {}

float TargetLoss::factor(int64_t t) const {
    assert(t >= 1 && (observed_ == t - 1 || observed_ == std::max<int64_t>(0, t - 2)));
    return static_cast<float>(std::exp(observed_ == t - 1 ? log_before_ : log_factor()));
}

void TargetLoss::observe(float ce) {
    assert(observed_ < static_cast<int64_t>(plain_.size()));
    const double before = log_factor();
    const double excess = static_cast<double>(ce) - static_cast<double>(plain_[observed_++]);
    excess_ = kSmoothing * excess_ + (1 - kSmoothing) * excess;
    log_before_ = before;
    const double most = observed_ <= warmup_ ? 0.0 : std::log(kMostFactor);
    log_integral_ = std::clamp(log_integral_ + kRate * (1.0 - violation()), -std::log(kMostFactor), most);
}

std::string TargetLoss::state() const {
    return format("%lld %a %a %a", static_cast<long long>(observed_), excess_, log_integral_, log_before_);
}

void TargetLoss::restore(const std::string& text, int64_t updates_done) {
    long long observed = -1;
    int used = 0;
    if (sscanf(text.c_str(), "%lld %la %la %la%n", &observed, &excess_, &log_integral_, &log_before_,
               &used) != 4 ||
        used != static_cast<int>(text.size()) || observed != updates_done ||
        observed > static_cast<int64_t>(plain_.size()) || !std::isfinite(excess_) ||
        !std::isfinite(log_integral_) || !std::isfinite(log_before_))
        fail("the checkpoint's state of --target-loss is damaged ('%s'): resume an earlier one",
             printable(text).c_str());
    observed_ = observed;
}

std::string TargetLoss::setting() const {
    uint64_t digest = plain_.size();
    for (float ce : plain_) {
        uint32_t bits;
        memcpy(&bits, &ce, sizeof bits);
        digest = random_bits(digest, 0, bits);
    }
    return setting_text(static_cast<float>(margin_)) +
           format(" over losses %016llx", static_cast<unsigned long long>(digest));
}
