// --target-loss: the controller against its definition and on a problem whose solution is known, its state,
// and the plain run's file.
#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "../llmc/target_loss.h"
#include "errors.h"
#include "temp_folder.h"

TEST_CASE("lambda rises while the loss is under the limit, falls while it is over, and follows the formula") {
    const std::vector<float> plain(400, 3.0f);
    TargetLoss under(plain, 0.02f), over(plain, 0.02f), at(plain, 0.02f);
    double e = 0, log_integral = 0, over_300 = 1;
    for (int t = 1; t <= 400; t++) {
        const float ce = t % 3 ? 3.014f : 3.03f;
        under.observe(3.0f);
        over.observe(3.1f);
        if (t == 300) over_300 = over.factor(302);
        at.observe(ce);
        e = 0.98 * e + 0.02 * ((double)ce - 3.0);
        const double v = std::min(3.0, std::max(0.0, e / (double)0.02f));
        log_integral += 0.01 * (1 - v);
        CHECK(at.excess() == doctest::Approx(e).epsilon(1e-12));
        if (t < 400) CHECK(at.factor(t + 2) == doctest::Approx(std::exp(log_integral - 2 * v)).epsilon(1e-6));
    }
    CHECK(under.factor(402) == doctest::Approx(std::exp(4.0)));
    // 0.1 over is 5 margins: v = 3 after 46 updates, and then I falls by 2% an update, down to 1 / 1000
    CHECK(over_300 < std::exp(-6.0 - 0.02 * 254));
    CHECK(std::log(over.factor(402)) == doctest::Approx(-6 - std::log(1000.0)));
    TargetLoss long_run(std::vector<float>(2000, 3.0f), 0.02f);
    for (int t = 0; t < 2000; t++) long_run.observe(3.0f);
    CHECK(long_run.factor(2002) == doctest::Approx(1000));
}

TEST_CASE("during the warm-up lambda may fall below its schedule, but not rise above it") {
    TargetLoss under(std::vector<float>(300, 3.0f), 0.02f, 100), over = under, both = under;
    for (int t = 1; t <= 100; t++) {
        under.observe(3.0f);
        over.observe(3.1f);
        both.observe(t <= 40 ? 3.1f : 2.5f);
        CHECK(under.factor(t + 2) == 1.0f);
        if (t == 45) CHECK(both.factor(47) < 1.0f);
    }
    CHECK(over.factor(102) < std::exp(-6.0 - 0.02 * 54));
    CHECK(both.factor(102) == 1.0f);  // what fell comes back, up to the schedule
    for (int t = 101; t <= 200; t++) under.observe(3.0f);
    CHECK(under.factor(202) == doctest::Approx(std::exp(1.0)));
}

TEST_CASE("lambda of an update does not depend on when the loss of the one before it is known") {
    TargetLoss early(std::vector<float>(100, 1.0f), 0.05f), late(std::vector<float>(100, 1.0f), 0.05f);
    const auto loss = [](int t) { return 1.0f + 0.1f * std::sin((float)t); };
    for (int t = 1; t <= 100; t++) {
        if (t > 2) late.observe(loss(t - 2));
        CHECK(early.factor(t) == late.factor(t));
        early.observe(loss(t));
    }
    CHECK(early.factor(3 + 98) != 1.0f);
}

TEST_CASE("a problem with a known solution: the loss ends at the limit, from whatever lambda it starts") {
    // CE = x^2 / 2 and R = (x - 1)^2 / 2, minimized by gradient descent. Plain is x = 0; for a given lambda
    // x = lambda / (1 + lambda), and the constraint x^2 / 2 <= margin binds at x = sqrt(2 margin).
    for (double margin : {0.005, 0.02, 0.1})
        for (double start : {0.01, 0.3, 10.0}) {
            CAPTURE(margin);
            CAPTURE(start);
            const int updates = 4000;
            TargetLoss target(std::vector<float>(updates, 0.0f), (float)margin);
            double x = 0, lambda = 0;
            for (int t = 1; t <= updates; t++) {
                lambda = start * target.factor(t);
                x -= 0.05 * (x + lambda * (x - 1)) / (1 + lambda);
                target.observe((float)(x * x / 2));
            }
            const double solution = std::sqrt(2 * margin);
            CHECK(x == doctest::Approx(solution).epsilon(1e-3));
            CHECK(lambda == doctest::Approx(solution / (1 - solution)).epsilon(2e-3));
        }
}

TEST_CASE("a restored controller goes on bit for bit, and refuses a state that is not its own") {
    std::vector<float> plain;
    for (int t = 0; t < 60; t++) plain.push_back(4.0f - 0.01f * (float)t);
    TargetLoss straight(plain, 0.013f), before(plain, 0.013f), after(plain, 0.013f);
    const auto loss = [&](int t) { return plain[t - 1] + 0.02f * std::cos(0.7f * (float)t); };
    for (int t = 1; t <= 60; t++) {
        CHECK(straight.factor(t) == (t <= 23 ? before : after).factor(t));
        straight.observe(loss(t));
        (t <= 23 ? before : after).observe(loss(t));
        if (t == 23) after.restore(before.state(), 23);
    }
    CHECK(straight.state() == after.state());
    for (const std::string& bad : {std::string(), std::string("23"), before.state() + " 1",
                                   std::string("23 nan 0x0p+0 0x0p+0"), std::string("61 0 0 0")}) {
        CAPTURE(bad);
        TargetLoss other(plain, 0.013f);
        CHECK_THROWS_AS(other.restore(bad, bad.starts_with("61") ? 61 : 23), Error);
    }
    CHECK_THROWS_AS(after.restore(before.state(), 24), Error);

    CHECK(straight.setting() == TargetLoss(plain, 0.013f).setting());
    CHECK(straight.setting() != TargetLoss(plain, 0.014f).setting());
    CHECK(straight.setting() != TargetLoss(plain, std::nextafter(0.013f, 1.0f)).setting());
    plain[59] = std::nextafter(plain[59], 0.0f);
    CHECK(straight.setting() != TargetLoss(plain, 0.013f).setting());
}

TEST_CASE("the flag: a path, which may hold colons, and a margin") {
    CHECK(parse_target_loss("log/run1:0.02").path == "log/run1");
    CHECK(parse_target_loss("a:b/metrics.jsonl:1").path == "a:b/metrics.jsonl");
    CHECK(parse_target_loss("a:b:1e-2").margin == 0.01f);
    for (const char* bad :
         {"", ":", "log/run1", ":0.1", "log/run1:", "log/run1:x", "log/run1:0", "a:9e-5", "a:-1", "a:nan"})
        CHECK_THROWS_AS(parse_target_loss(bad), Error);
}

TEST_CASE("the plain run's losses, and what is refused by name") {
    const TempFolder folder;
    const std::map<std::string, std::string> settings = {
        {"lambda", "0.1"}, {"reg", "kl"},    {"topk", "8"}, {"lambda-warmup", "2 updates"},
        {"batch", "12"},   {"updates", "3"}, {"seed", "1"}, {"lambda-layers", "1,1"}};
    const auto file = [&](const char* lambda, const char* batch, const std::string& lines) {
        write_text(folder / "metrics.jsonl",
                   format(R"({"commit":"x","from":"tiny","settings":{"lambda":"%s","reg":"tail","topk":"0",)"
                          R"("batch":"%s","updates":"3","seed":"1"}})",
                          lambda, batch) +
                       "\n" + lines);
    };
    const auto message = [&](const std::string& from = "tiny") {
        return error_of([&] { read_plain_losses(folder.path, from, settings, 3); });
    };
    const std::string two =
        "{\"step\":0,\"val_ce\":9}\n{\"step\":1,\"ce\":5.25}\n{\"step\":2,\"ce\":4.5,\"reg\":null}\n";
    const std::string three = two + "{\"step\":3,\"ce\":4.25}\n";
    file("0", "12", three + "{\"step\":3,\"val_ce\":4}\n");
    for (const std::string& path : {folder.path, folder / "metrics.jsonl"})
        CHECK(read_plain_losses(path, "tiny", settings, 3) == std::vector<float>{5.25f, 4.5f, 4.25f});

    const auto with_lr = [&](const std::string& more) {
        write_text(folder / "metrics.jsonl",
                   R"({"from":"tiny","settings":{"lambda":"0","lr":"0.333333")" + more + "}}\n" + three);
        return error_of([&] { read_plain_losses(folder.path, "tiny", {{"lr", "0.333333343"}}, 3); });
    };
    CHECK(with_lr("") == "");  // numbers had fewer digits once
    check_mentions(with_lr(R"(,"data-digest":"1")"), "lr is 0.333333, and here it is 0.333333343");
    file("0", "12", three);
    check_mentions(message("d6"), "start (-e) is tiny");
    std::map<std::string, std::string> digest = settings;
    digest["data-digest"] = "1";  // which older runs did not record
    CHECK(read_plain_losses(folder.path, "tiny", digest, 3).size() == 3);
    const auto with_digests = [&](const char* data, const char* val) {
        write_text(folder / "metrics.jsonl",
                   format(R"({"from":"tiny","settings":{"lambda":"0","batch":"12","updates":"3","seed":"1",)"
                          R"("lambda-layers":"1,1","data-digest":"%s","val-digest":"%s"}})",
                          data, val) +
                       "\n" + three);
        std::map<std::string, std::string> ours = settings;
        ours["data-digest"] = "1", ours["val-digest"] = "1";
        return error_of([&] { read_plain_losses(folder.path, "tiny", ours, 3); });
    };
    CHECK(with_digests("1", "1") == "");
    CHECK(with_digests("1", "2") == "");  // what it was validated on does not matter
    check_mentions(with_digests("2", "1"), "data-digest is 2, and here it is 1");
    file("0", "12", two + "{\"step\":3,\"ce\":1e300}\n");
    check_mentions(message(), "line 5 of");
    file("0", "12", two);
    check_mentions(message(), "holds 2 updates of a run of 3");
    file("0", "12", two + "{\"step\":3,\"ce\":4.2");  // a line that is being written
    check_mentions(message(), "holds 2 updates of a run of 3");
    file("0", "8", three);
    check_mentions(message(), "batch is 8, and here it is 12");
    file("0.1", "12", three);
    check_mentions(message(), "its lambda is 0.1");
    file("0", "12", three + "x\n");
    check_mentions(message(), "line 6");
    file("0", "12", two + "{\"step\":4,\"ce\":4.25}\n");
    check_mentions(message(), "line 5");
    file("0", "12", two + "{\"step\":3,\"ce\":null}\n");
    check_mentions(message(), "line 5");
    write_text(folder / "metrics.jsonl", "[]\n");
    check_mentions(message(), "line 1");
    write_text(folder / "metrics.jsonl", "{}\n");
    check_mentions(message(), "its lambda is not recorded");
    write_text(folder / "metrics.jsonl", "");
    check_mentions(message(), "holds 0 updates");
    std::filesystem::remove(folder / "metrics.jsonl");
    check_mentions(message(), "metrics.jsonl");
}
