// What a run says: metrics.jsonl is always valid and survives a kill; the terminal line fits its terminal.
#include "../llmc/metrics.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "../llmc/json_file.h"
#include "errors.h"
#include "temp_folder.h"

namespace {

void check_shows(const std::string& printed, const std::string& words) {
    INFO("printed: \"" << printed << "\", without: " << words);
    CHECK(printed.find(words) != printed.npos);
}

UpdateMetrics update_of(int64_t step) {
    UpdateMetrics m;
    m.step = step;
    m.loss = 1.0f / 3 + static_cast<float>(step);
    m.ce = 3.3f;
    m.reg = 1e-7f;
    m.mass = 0.1f;
    m.lambda = 0.05f;
    m.lr = 3e-4f;
    m.norm = 12345.678f;
    m.tok_s = 812345.6f;
    m.ms = 80.7f;
    return m;
}

const nlohmann::json kConfig = {{"lambda", 0.1}, {"commit", "abc"}, {"device", "a \"CPU\""}};

std::vector<nlohmann::json> lines_of(const std::string& path) {
    std::vector<nlohmann::json> lines;
    std::ifstream in(path);
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
}

// A run of 20 updates, validated every 5 and saved every 4, that starts after update `from` and is killed
// when `until` are done.
void run_updates(const std::string& folder, int64_t from, int64_t until) {
    MetricsLog log(folder, kConfig.dump(), from > 0 ? from : -1);
    if (from == 0) log.validation(0, 10, 0.5f, 0.4f);
    for (int64_t step = from + 1; step <= until; step++) {
        log.update(update_of(step));
        if (step % 5 == 0) log.validation(step, 4, 0.5f, 0.25f);
    }
}

// Columns that UTF-8 text takes on a terminal, for text without wide or combining characters.
size_t columns_of(const std::string& text) {
    return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

// What a terminal shows after this output, line by line.
std::vector<std::string> screen_of(const std::string& output) {
    std::vector<std::string> lines = {""};
    for (size_t i = 0; i < output.size(); i++) {
        if (output[i] == '\n') {
            lines.push_back("");
        } else if (output[i] == '\r') {
            // Everything here rewrites the line from its start, and erases what was longer.
            REQUIRE(output.find("\033[K", i) != std::string::npos);
            lines.back().clear();
        } else if (output.compare(i, 3, "\033[K") == 0) {
            i += 2;
        } else {
            lines.back() += output[i];
        }
    }
    if (lines.back().empty()) lines.pop_back();
    return lines;
}

// A Progress that writes to memory and whose clock is set by hand.
struct Recorder {
    char* buffer = nullptr;
    size_t size = 0;
    FILE* out = open_memstream(&buffer, &size);
    double time = 1000;
    int columns = 80;

    Recorder() = default;
    Recorder(const Recorder&) = delete;
    Recorder& operator=(const Recorder&) = delete;
    ~Recorder() {
        fclose(out);
        free(buffer);
    }
    Terminal terminal(bool interactive, bool utf8 = false) {
        return {out, interactive, utf8, [this] { return columns; }, [this] { return time; }};
    }
    std::string text() {
        fflush(out);
        return {buffer, size};
    }
};

}  // namespace

// ---- metrics.jsonl ----

TEST_CASE("the log is a configuration, then an object for each update and validation") {
    TempFolder run;
    {
        MetricsLog log(run.path, kConfig.dump());
        log.validation(0, 10.5f, 0.5f, 0.25f);
        log.update(update_of(1));
        // Each line is there as soon as it is written.
        CHECK(lines_of(run / "metrics.jsonl").size() == 3);
        log.sync();
    }
    const std::string text = read_text(run / "metrics.jsonl");
    CHECK(text.substr(text.find('\n') + 1) ==
          "{\"step\":0,\"val_ce\":10.5,\"val_mass\":0.5,\"val_mass_nosink\":0.25}\n"
          "{\"step\":1,\"loss\":1.3333334,\"ce\":3.3,\"reg\":1e-07,\"mass\":0.1,\"lambda\":0.05,\"lr\":3e-04,"
          "\"norm\":12345.678,\"tok_s\":812345.6,\"ms\":80.7}\n");
    CHECK(lines_of(run / "metrics.jsonl")[0] == kConfig);
}

TEST_CASE("a number reads back as the same float32, and is always JSON") {
    std::mt19937_64 random(1);
    for (int i = 0; i < 100'000; i++) {
        const float value = std::bit_cast<float>(static_cast<uint32_t>(random()));
        const nlohmann::json parsed = nlohmann::json::parse(json_number(value));
        if (!std::isfinite(value))
            REQUIRE(parsed.is_null());
        else
            REQUIRE(static_cast<float>(parsed.get<double>()) == value);
    }
    CHECK(json_number(NAN) == "null");
    CHECK(json_number(-INFINITY) == "null");
}

TEST_CASE("JSON: what follows a zero byte is read, too") {
    for (const std::string& text : {std::string("{}\0", 3), std::string("{\"a\":1}\0{}", 10)}) {
        CHECK(parse_json(text).is_discarded());
        CHECK(!parse_json(text.substr(0, text.find('\0'))).is_discarded());
    }
}

TEST_CASE("a run that is killed and resumed logs what a straight run logs") {
    TempFolder straight;
    run_updates(straight.path, 0, 20);
    const std::string want = read_text(straight / "metrics.jsonl");
    for (int64_t killed = 0; killed <= 20; killed++) {
        INFO("killed after update " << killed);
        TempFolder run;
        run_updates(run.path, 0, killed);
        write_text(run / "metrics.jsonl", read_text(run / "metrics.jsonl") + "{\"step\":21,\"lo");  // torn
        run_updates(run.path, killed / 4 * 4, 20);
        CHECK(read_text(run / "metrics.jsonl") == want);
        CHECK(!has_unfinished(run.path));
    }
}

TEST_CASE("updates that a resumed log lacks are named") {
    const auto gap = [](const std::vector<int>& there, int64_t step) {
        TempFolder run;
        std::string text = "{}\n";
        for (int update : there) text += "{\"step\":" + std::to_string(update) + ",\"loss\":1}\n";
        write_text(run / "metrics.jsonl", text);
        return MetricsLog(run.path, "{}", step).gap();
    };
    CHECK(gap({1, 2, 3, 4}, 4) == "");
    CHECK(gap({1, 2, 3, 4, 5, 6}, 4) == "");
    CHECK(gap({}, 0) == "");
    CHECK(gap({3, 4}, 4) == "updates 1 to 2");
    CHECK(gap({1, 4}, 4) == "updates 2 to 3");
    CHECK(gap({1, 2}, 4) == "updates 3 to 4");
    CHECK(gap({}, 4) == "updates 1 to 4");
    CHECK(gap({2, 4}, 4) == "update 1");  // the first gap
}

TEST_CASE("a resumed file keeps its first line, a new run's is new") {
    TempFolder run;
    run_updates(run.path, 0, 4);
    const nlohmann::json other = {{"other", 1}};
    { MetricsLog log(run.path, other.dump(), 4); }
    CHECK(lines_of(run / "metrics.jsonl")[0] == kConfig);
    CHECK(lines_of(run / "metrics.jsonl").size() == 6);
    { MetricsLog log(run.path, other.dump(), -1); }
    CHECK(read_text(run / "metrics.jsonl") == "{\"other\":1}\n");
    std::filesystem::remove(run / "metrics.jsonl");
    {  // somebody removed the log: it starts again
        MetricsLog log(run.path, other.dump(), 4);
        CHECK(log.gap() == "updates 1 to 4");
    }
    CHECK(read_text(run / "metrics.jsonl") == "{\"other\":1}\n");
}

TEST_CASE("a resumed file's first line gets the flags that the run goes on with, if it had any") {
    TempFolder run;
    const auto first_line = [&](const char* was, const char* now) {
        write_text(run / "metrics.jsonl", std::string(was) + "\n{\"step\":1,\"loss\":2}\n");
        { MetricsLog log(run.path, now, 1); }
        const auto lines = lines_of(run / "metrics.jsonl");
        CHECK(lines.size() == 2);
        return lines[0];
    };
    CHECK(first_line(R"({"commit":"a","flags":{"lr":"1","train-data":"old"}})",
                     R"({"commit":"b","flags":{"lr":"1","train-data":"new"}})") ==
          nlohmann::json({{"commit", "a"}, {"flags", {{"lr", "1"}, {"train-data", "new"}}}}));
    CHECK(first_line(R"({"commit":"a"})", R"({"commit":"b","flags":{"lr":"1"}})") ==
          nlohmann::json({{"commit", "a"}}));
}

TEST_CASE("a log that a run did not write is an Error that names the line") {
    TempFolder run;
    const std::string good = "{\"a\":1}\n{\"step\":1,\"loss\":2}\n";
    for (const char* bad :
         {"{\"step\":2,\"lo\n", "[]\n", "{}\n", "{\"step\":-1}\n", "{\"step\":1.5}\n", "\n", "{} x\n"}) {
        write_text(run / "metrics.jsonl", good + bad + "{\"step\":3,\"loss\":2}\n");
        check_mentions(error_of([&] { MetricsLog(run.path, kConfig.dump(), 5); }),
                       "metrics.jsonl: line 3 is not one");
        CHECK(read_text(run / "metrics.jsonl") == good + bad + "{\"step\":3,\"loss\":2}\n");  // untouched
    }
    write_text(run / "metrics.jsonl", "{\"a\"");
    check_mentions(error_of([&] { MetricsLog(run.path, kConfig.dump(), 5); }), "has no first line");
    check_mentions(error_of([&] { MetricsLog(run / "none", kConfig.dump()); }), "cannot open the run folder");
}

TEST_CASE("two processes do not train in one folder") {
    TempFolder run;
    {
        MetricsLog log(run.path, kConfig.dump());
        check_mentions(error_of([&] { MetricsLog(run.path, kConfig.dump()); }),
                       "another process is training in");
    }
    CHECK(error_of([&] { MetricsLog(run.path, kConfig.dump()); }) == "");
}

TEST_CASE("a full disk is an Error that names the log") {
    TempFolder run;
    signal(SIGXFSZ, SIG_IGN);
    rlimit before, limit;
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 1000;
    MetricsLog log(run.path, kConfig.dump());
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    int written = 0;
    const std::string message = error_of([&] {
        for (int64_t step = 1; step <= 100; step++, written++) log.update(update_of(step));
    });
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
    check_mentions(message, "cannot write " + (run / "metrics.jsonl"));
    // A line that is there in part is one that was not written.
    const std::string text = read_text(run / "metrics.jsonl");
    CHECK(std::count(text.begin(), text.end(), '\n') == 1 + written);
    CHECK(text.back() != '\n');
}

// ---- The terminal ----

TEST_CASE("numbers are short") {
    CHECK(pretty_count(0) == "0");
    CHECK(pretty_count(950) == "950");
    CHECK(pretty_count(999.6) == "1.00k");
    CHECK(pretty_count(1234) == "1.23k");
    CHECK(pretty_count(12345) == "12.3k");
    CHECK(pretty_count(99960) == "100k");
    CHECK(pretty_count(812345) == "812k");
    CHECK(pretty_count(999'600) == "1.00M");
    CHECK(pretty_count(124'439'808) == "124M");
    CHECK(pretty_count(1.5e15) == "1500T");
    CHECK(pretty_seconds(0) == "0s");
    CHECK(pretty_seconds(59.4) == "59s");
    CHECK(pretty_seconds(59.6) == "1m00s");
    CHECK(pretty_seconds(192) == "3m12s");
    CHECK(pretty_seconds(7500) == "2h05m");
    CHECK(pretty_seconds(273'600) == "3d04h");
    CHECK(pretty_seconds(NAN) == "?");
    CHECK(pretty_seconds(INFINITY) == "?");
    CHECK(pretty_bytes(512) == "512 B");
    CHECK(pretty_bytes(1500) == "1.5 kB");
    CHECK(pretty_bytes(31.2e9) == "31.2 GB");
    CHECK(pretty_bytes(999.96e6) == "1.0 GB");
}

TEST_CASE("the settings stand in two aligned columns") {
    CHECK(
        settings_table(
            {{"model", ""}, {"layers", "12"}, {"context length", "1024"}, {"data", ""}, {"train", "a b"}}) ==
        "model\n"
        "  layers          12\n"
        "  context length  1024\n"
        "data\n"
        "  train           a b\n");
    CHECK(settings_table({}) == "");
}

TEST_CASE("a bar is as wide as it is told and as full as it should be") {
    CHECK(progress_bar(0, 4, false) == "....");
    CHECK(progress_bar(0.5, 4, false) == "##..");
    CHECK(progress_bar(1, 4, false) == "####");
    CHECK(progress_bar(0.5, 4, true) == "██  ");
    CHECK(progress_bar(0.28125, 4, true) == "█▏  ");
    CHECK(progress_bar(1, 2, true) == "██");
    for (double fraction = -0.1; fraction < 1.2; fraction += 0.003)
        for (int width : {1, 7, 30}) {
            REQUIRE(columns_of(progress_bar(fraction, width, true)) == static_cast<size_t>(width));
            REQUIRE(progress_bar(fraction, width, false).size() == static_cast<size_t>(width));
        }
}

TEST_CASE("the progress line says what there is room for") {
    UpdateMetrics m = update_of(120);
    m.loss = 3.41234f;
    m.mass = 0.9121f;
    CHECK(progress_line(m, 2000, 192, 0, true) ==
          " 120/2000  loss 3.4123  mass 0.9121  812k tok/s  3m12s left");
    CHECK(progress_line(m, 2000, 192, 100, false) ==
          "|#.............................|  120/2000  loss 3.4123  mass 0.9121  812k tok/s  3m12s left");
    CHECK(progress_line(m, 2000, 192, 63, false) ==
          " 120/2000  loss 3.4123  mass 0.9121  812k tok/s  3m12s left");
    CHECK(progress_line(m, 2000, 192, 50, false) == " 120/2000  loss 3.4123  mass 0.9121  812k tok/s");
    CHECK(progress_line(m, 2000, 192, 25, false) == " 120/2000  loss 3.4123");
    CHECK(progress_line(m, 2000, 192, 20, false) == "loss 3.4123");  // what people look at
    CHECK(progress_line(m, 2000, 192, 11, false) == "loss 3.4123");
    CHECK(progress_line(m, 2000, 192, 10, false) == " 120/2000");
    CHECK(progress_line(m, 2000, 192, 6, false) == " 120/2");
    for (int columns = 1; columns < 150; columns++)
        for (bool utf8 : {false, true})
            REQUIRE(columns_of(progress_line(m, 2000, 192, columns, utf8)) <= static_cast<size_t>(columns));
    m.mass = NAN;  // no row is long enough to have one
    CHECK(progress_line(m, 2000, 192, 0, true) == " 120/2000  loss 3.4123  812k tok/s  3m12s left");
    m.loss = NAN;
    check_shows(progress_line(m, 2000, 192, 0, true), "loss nan");
}

TEST_CASE("on a terminal one line is rewritten, and messages stay above it") {
    Recorder recorder;
    {
        Progress progress(100, 0, recorder.terminal(true, true));
        progress.message("starting");
        for (int64_t step = 1; step <= 100; step++) {
            progress.update(update_of(step));
            recorder.time += 0.01;
            if (step == 50) progress.message("validation: 3.2\nsample: to be");
        }
    }
    const std::string text = recorder.text();
    const std::vector<std::string> screen = screen_of(text);
    REQUIRE(screen.size() == 4);
    CHECK(screen[0] == "starting");
    CHECK(screen[1] == "validation: 3.2");
    CHECK(screen[2] == "sample: to be");
    check_shows(screen[3], "100/100  loss 100.3333");
    CHECK(columns_of(screen[3]) < 80);
    CHECK(text.back() == '\n');
    // One second at ten a second, the first, the last and the one after the message: not a hundred.
    CHECK(std::count(text.begin(), text.end(), '/') < 2 * 15);
}

TEST_CASE("the line follows the window's width") {
    Recorder recorder;
    Progress progress(10, 0, recorder.terminal(true));
    for (int64_t step = 1; step <= 10; step++) {
        recorder.columns = static_cast<int>(step * 11);
        recorder.time += 1;
        progress.update(update_of(step));
        const std::string text = recorder.text(), last = text.substr(text.rfind('\r') + 1);
        CHECK(columns_of(last) - strlen("\033[K") < static_cast<size_t>(recorder.columns));
    }
}

TEST_CASE("elsewhere there are plain lines: all of a short run, some of a long one, first and last always") {
    {
        Recorder recorder;
        Progress progress(5, 0, recorder.terminal(false));
        for (int64_t step = 1; step <= 5; step++) progress.update(update_of(step));
        progress.message("done");
        progress.finish();
        const std::vector<std::string> lines = screen_of(recorder.text());
        REQUIRE(lines.size() == 6);
        check_shows(lines[0], "1/5  loss 1.3333");
        check_shows(lines[4], "5/5  loss 5.3333");
        CHECK(lines[5] == "done");
        CHECK(recorder.text().find('\r') == std::string::npos);
        CHECK(recorder.text().find('\033') == std::string::npos);
    }
    {
        Recorder recorder;
        Progress progress(1000, 0, recorder.terminal(false));
        for (int64_t step = 1; step <= 1000; step++) {
            recorder.time += 0.1;
            progress.update(update_of(step));
        }
        progress.finish();
        const std::vector<std::string> lines = screen_of(recorder.text());
        check_shows(lines.front(), "   1/1000");
        check_shows(lines.back(), "1000/1000");
        CHECK(lines.size() >= 100 / 2 - 2);
        CHECK(lines.size() <= 100 / 2 + 2);
    }
    {
        Recorder recorder;  // stopped by Ctrl-C: the last update that was done still shows, once
        Progress progress(1000, 0, recorder.terminal(false));
        for (int64_t step = 1; step <= 7; step++) progress.update(update_of(step));
        progress.finish();
        progress.finish();
        const std::vector<std::string> lines = screen_of(recorder.text());
        REQUIRE(lines.size() == 2);
        check_shows(lines[1], "   7/1000");
    }
}

TEST_CASE(
    "a run that has few updates left shows each, and one that takes long one in half a minute at least") {
    Recorder few, many;
    Progress last(1000, 950, few.terminal(false)), all(1'000'000, 0, many.terminal(false));
    for (int64_t step = 951; step <= 1000; step++) last.update(update_of(step));
    CHECK(screen_of(few.text()).size() == 50);
    many.time += 1e6;
    for (int64_t step = 1; step <= 100; step++, many.time += 10) all.update(update_of(step));
    CHECK(screen_of(many.text()).size() == 34);
}

TEST_CASE("the time left is counted from this process's own updates, without the first") {
    Recorder recorder;
    Progress progress(110, 90, recorder.terminal(false));  // resumed after 90
    recorder.time += 100;                                  // the first one warms everything up
    progress.update(update_of(91));
    check_shows(recorder.text(), " 91/110  loss 91.3333  mass 0.1000  812k tok/s  2s left");  // 19 of 80.7 ms
    recorder.time += 3;
    progress.update(update_of(92));
    recorder.time += 3;
    progress.update(update_of(93));
    check_shows(recorder.text(), " 92/110  loss 92.3333  mass 0.1000  812k tok/s  54s left");
    check_shows(recorder.text(), " 93/110  loss 93.3333  mass 0.1000  812k tok/s  51s left");
}

TEST_CASE("a terminal is one unless it is dumb, and has its width") {
    const int fd = posix_openpt(O_RDWR | O_NOCTTY);
    if (fd < 0 || grantpt(fd) != 0 || unlockpt(fd) != 0) {
        MESSAGE("skipped: there are no terminals");
        return;
    }
    FILE* file = fopen(ptsname(fd), "w");
    REQUIRE(file);
    const winsize size = {.ws_row = 24, .ws_col = 57, .ws_xpixel = 0, .ws_ypixel = 0};
    REQUIRE(ioctl(fileno(file), TIOCSWINSZ, &size) == 0);
    setenv("TERM", "xterm", 1);
    CHECK(terminal_of(file).interactive);
    CHECK(terminal_of(file).columns() == 57);
    for (const char* term : {"dumb", static_cast<const char*>(nullptr)}) {
        term ? setenv("TERM", term, 1) : unsetenv("TERM");
        CHECK(!terminal_of(file).interactive);
    }
    fclose(file);
    close(fd);
}

TEST_CASE("a stream that is no terminal is not treated as one, and the locale decides on the bar") {
    TempFolder folder;
    FILE* file = fopen((folder / "out").c_str(), "w");
    REQUIRE(file);
    setenv("TERM", "xterm", 1);
    setenv("LC_ALL", "en_US.UTF-8", 1);
    CHECK(!terminal_of(file).interactive);
    CHECK(terminal_of(file).utf8);
    CHECK(terminal_of(file).columns() == 80);
    setenv("LC_ALL", "C", 1);
    setenv("LANG", "en_US.UTF-8", 1);  // LC_ALL counts more
    CHECK(!terminal_of(file).utf8);
    setenv("LC_ALL", "", 1);
    setenv("LC_CTYPE", "", 1);
    CHECK(terminal_of(file).utf8);
    const double before = terminal_of(file).now();
    CHECK(terminal_of(file).now() >= before);
    fclose(file);
}
