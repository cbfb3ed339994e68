#include "metrics.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "error.h"
#include "files.h"
#include "json_file.h"

// ---- metrics.jsonl ----

std::string json_number(float value) {
    if (!std::isfinite(value)) return "null";
    char text[32];
    return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

// "updates 7 to 10"
static std::string updates_range(int64_t first, int64_t last) {
    if (first == last) return format("update %lld", (long long)first);
    return format("updates %lld to %lld", (long long)first, (long long)last);
}

std::string line_of_settings(const std::map<std::string, std::string>& facts,
                             const std::map<std::string, std::string>& settings,
                             const std::map<std::string, std::string>& flags) {
    nlohmann::json line = facts;
    line["settings"] = settings;
    line["flags"] = flags;
    return json_text(line);
}

// The texts of an object in a line; empty if it has none of that name.
static std::map<std::string, std::string> texts_of_line(const nlohmann::json& line, const char* key) {
    std::map<std::string, std::string> texts;
    if (!line.is_object() || !line.contains(key) || !line[key].is_object()) return texts;
    for (const auto& [name, value] : line[key].items())
        if (value.is_string()) texts[name] = value.get<std::string>();
    return texts;
}

std::map<std::string, std::string> settings_of_line(const nlohmann::json& line) {
    std::map<std::string, std::string> settings = texts_of_line(line, "settings");
    if (settings.empty()) return settings;
    if (line.contains("from") && line["from"].is_string()) settings["from"] = line["from"].get<std::string>();
    return settings;
}

nlohmann::json first_line(const std::string& path) {
    const MappedFile file(path);
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    return parse_json(text.substr(0, text.find('\n')));
}

std::map<std::string, std::string> flags_of_run(const std::string& run_folder) {
    const std::string metrics = run_folder + "/metrics.jsonl";
    return is_file(metrics) ? texts_of_line(first_line(metrics), "flags")
                            : std::map<std::string, std::string>();
}

int64_t last_update(const std::string& path) {
    const MappedFile file(path);
    std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    text = text.substr(0, text.rfind('\n') + 1);  // a line that is not complete is none
    const size_t at = text.rfind("\"loss\":");
    if (at == text.npos) return 0;
    const size_t begin = text.rfind('\n', at) + 1;
    const nlohmann::json line = parse_json(text.substr(begin, text.find('\n', at) - begin));
    const bool has_step = line.is_object() && line.contains("step") && line["step"].is_number_unsigned();
    return has_step ? line["step"].get<int64_t>() : 0;
}

MetricsLog::MetricsLog(const std::string& run_folder, const std::string& config, int64_t resume_step)
    : lock_(run_folder), path_(run_folder + "/metrics.jsonl") {
    const bool resume = resume_step >= 0 && is_file(path_);
    if (!resume && resume_step > 0) gap_ = updates_range(1, resume_step);
    write_file(path_, resume ? kept_lines(config, resume_step) : config + "\n");
    fd_ = open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd_ < 0) fail("cannot open %s: %s", path_.c_str(), strerror(errno));
}

MetricsLog::~MetricsLog() {
    close(fd_);
}

void MetricsLog::update(const UpdateMetrics& m) {
    std::string line = "{\"step\":" + std::to_string(m.step);
    const std::pair<const char*, float> fields[] = {{"loss", m.loss}, {"ce", m.ce},         {"reg", m.reg},
                                                    {"mass", m.mass}, {"lambda", m.lambda}, {"lr", m.lr},
                                                    {"norm", m.norm}, {"tok_s", m.tok_s},   {"ms", m.ms}};
    for (const auto& [key, value] : fields) line += std::string(",\"") + key + "\":" + json_number(value);
    append(line + "}\n");
}

void MetricsLog::validation(int64_t step, float val_ce, float val_mass, float val_mass_nosink) {
    append("{\"step\":" + std::to_string(step) + ",\"val_ce\":" + json_number(val_ce) + ",\"val_mass\":" +
           json_number(val_mass) + ",\"val_mass_nosink\":" + json_number(val_mass_nosink) + "}\n");
}

void MetricsLog::sync() {
    if (fsync(fd_) != 0) fail("cannot write %s to the disk: %s", path_.c_str(), strerror(errno));
}

// The first line of a resumed run. With -y a flag that is given anew, such as where the data are now, holds
// for the times after, too. (A line of old has no flags: with some of them it would seem to have them all.)
static std::string line_with_flags(const std::string& line, const std::string& config) {
    nlohmann::json object = parse_json(line);
    const nlohmann::json now = parse_json(config);
    if (!object.contains("flags") || !now.contains("flags") || object["flags"] == now["flags"]) return line;
    object["flags"] = now["flags"];
    return json_text(object) + "\n";
}

std::string MetricsLog::kept_lines(const std::string& config, int64_t step) {
    const MappedFile file(path_);
    const std::string text(reinterpret_cast<const char*>(file.data()), file.size());
    std::string kept;
    size_t begin = 0;
    int64_t last = 0;  // update
    const auto missing = [&](int64_t until) {
        if (until > last && gap_.empty()) gap_ = updates_range(last + 1, until);
    };
    for (int number = 1; begin < text.size(); number++) {
        const size_t end = text.find('\n', begin);
        if (end == std::string::npos) break;
        const std::string line = text.substr(begin, end + 1 - begin);
        begin = end + 1;
        const nlohmann::json object = parse_json(line);
        const bool is_config = number == 1;
        if (!object.is_object() ||
            (!is_config && !(object.contains("step") && object["step"].is_number_unsigned())))
            fail("%s: line %d is not one that a run writes; remove it, or start a new run with another -o",
                 path_.c_str(), number);
        if (!is_config && object["step"].get<uint64_t>() > static_cast<uint64_t>(step)) continue;
        kept += is_config ? line_with_flags(line, config) : line;
        if (is_config) continue;
        const auto update = object["step"].get<int64_t>();
        if (!object.contains("loss")) {
            validated_ |= update == step;
            continue;
        }
        missing(update - 1);
        last = update;
    }
    missing(step);
    if (kept.empty()) fail("%s has no first line with the configuration of the run", path_.c_str());
    return kept;
}

void MetricsLog::append(const std::string& line) {
    // One write() for a line, so that a kill cannot leave half of one behind.
    ssize_t n;
    do n = write(fd_, line.data(), line.size());
    while (n < 0 && errno == EINTR);
    if (n != static_cast<ssize_t>(line.size()))
        fail("cannot write %s: %s", path_.c_str(), n < 0 ? strerror(errno) : "the disk is full");
}

// ---- Numbers for people ----

std::string pretty_count(double n) {
    const char* unit = "";
    for (const char* next : {"k", "M", "G", "T"}) {
        if (std::fabs(n) < 999.5) break;
        n /= 1000;
        unit = next;
    }
    if (!*unit) return format("%.0f", n);
    return format("%.*f%s", std::fabs(n) < 9.995 ? 2 : std::fabs(n) < 99.95 ? 1 : 0, n, unit);
}

std::string updates_text(int64_t n) {
    return std::to_string(n) + (n == 1 ? " update" : " updates");
}

std::string pretty_seconds(double seconds) {
    if (!(seconds < 1e9)) return "?";
    const long long s = std::llround(std::fmax(seconds, 0));
    if (s < 60) return format("%llds", s);
    if (s < 3600) return format("%lldm%02llds", s / 60, s % 60);
    if (s < 86400) return format("%lldh%02lldm", s / 3600, s / 60 % 60);
    return format("%lldd%02lldh", s / 86400, s / 3600 % 24);
}

std::string pretty_bytes(double bytes) {
    const char* unit = "B";
    for (const char* next : {"kB", "MB", "GB", "TB"}) {
        if (bytes < 999.95) break;
        bytes /= 1000;
        unit = next;
    }
    return format(*unit == 'B' ? "%.0f %s" : "%.1f %s", bytes, unit);
}

std::string settings_table(const std::vector<std::pair<std::string, std::string>>& rows) {
    size_t width = 0;
    for (const auto& [name, value] : rows)
        if (!value.empty()) width = std::max(width, name.size());
    std::string text;
    for (const auto& [name, value] : rows)
        text += value.empty() ? name + "\n"
                              : "  " + name + std::string(width - name.size() + 2, ' ') + value + "\n";
    return text;
}

// ---- Progress on the terminal ----

Terminal terminal_of(FILE* out) {
    Terminal t;
    t.out = out;
    const int fd = fileno(out);
    const char* term = getenv("TERM");
    t.interactive = isatty(fd) && term && strcmp(term, "dumb") != 0;
    for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"})
        if (const char* value = getenv(name); value && *value) {
            t.utf8 = strcasestr(value, "utf-8") || strcasestr(value, "utf8");
            break;
        }
    t.columns = [fd] {
        winsize size{};
        return ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
    };
    t.now = [] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
    return t;
}

std::string progress_bar(double fraction, int width, bool utf8) {
    fraction = std::fmin(std::fmax(fraction, 0), 1);
    const int parts = utf8 ? 8 : 1;  // of a column
    const int filled = static_cast<int>(fraction * width * parts);
    static const char* const eighths[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    std::string bar;
    for (int i = 0; i < filled / parts; i++) bar += utf8 ? "█" : "#";
    bar += utf8 ? eighths[filled % parts] : "";
    for (int i = (filled + parts - 1) / parts; i < width; i++) bar += utf8 ? " " : ".";
    return bar;
}

std::string progress_line(const UpdateMetrics& m, int64_t total, double seconds_left, int columns,
                          bool utf8) {
    const std::string of_total = std::to_string(total), step = std::to_string(m.step);
    std::string line =
        std::string(of_total.size() - std::min(of_total.size(), step.size()), ' ') + step + "/" + of_total;
    std::vector<std::string> parts = {format("loss %.4f", m.loss)};
    if (std::isfinite(m.mass)) parts.push_back(format("mass %.4f", m.mass));
    parts.push_back(pretty_count(m.tok_s) + " tok/s");
    if (seconds_left >= 0) parts.push_back(pretty_seconds(seconds_left) + " left");
    const size_t count = line.size();
    for (const std::string& part : parts) {
        if (columns > 0 && line.size() + 2 + part.size() > static_cast<size_t>(columns)) break;
        line += "  " + part;
    }
    if (columns == 0) return line;
    if (line.size() == count && parts[0].size() <= static_cast<size_t>(columns)) return parts[0];
    if (line.size() > static_cast<size_t>(columns)) return line.substr(0, columns);
    const int bar = std::min<int>(30, columns - static_cast<int>(line.size()) - 3);
    if (bar < 8) return line;
    return "|" + progress_bar(total > 0 ? static_cast<double>(m.step) / total : 1, bar, utf8) + "| " + line;
}

Progress::Progress(int64_t total, int64_t done, Terminal terminal)
    : total_(total), done_(done), terminal_(std::move(terminal)), start_(terminal_.now()) {}

void Progress::update(const UpdateMetrics& m) {
    const double now = terminal_.now();
    const bool first = !any_;
    if (first) {
        // The first update pays for the warm-up of everything, so time left is counted from its end.
        first_step_ = m.step;
        first_end_ = now;
        any_ = true;
    }
    latest_ = m;
    shown_ = false;
    const bool due = now - last_shown_ >= interval(now);
    if (first || m.step >= total_ || due) show(now);
}

void Progress::message(const std::string& text) {
    if (terminal_.interactive && line_on_screen_) fputs("\r\033[K", terminal_.out);
    line_on_screen_ = false;
    fputs(text.c_str(), terminal_.out);
    if (text.empty() || text.back() != '\n') fputc('\n', terminal_.out);
    if (terminal_.interactive && any_ && !finished_)
        show(terminal_.now());
    else
        fflush(terminal_.out);
}

void Progress::finish() {
    if (finished_) return;
    finished_ = true;
    if (any_ && !shown_) show(terminal_.now());
    if (line_on_screen_) fputc('\n', terminal_.out);
    line_on_screen_ = false;
    fflush(terminal_.out);
}

double Progress::interval(double now) const {
    if (terminal_.interactive) return 0.1;
    if (total_ - done_ <= 50) return 0;
    return std::fmin(30, std::fmax(2, (now - start_) / 100));
}

double Progress::seconds_left(double now) const {
    const double left = static_cast<double>(total_ - latest_.step);
    if (latest_.step > first_step_)
        return left * (now - first_end_) / static_cast<double>(latest_.step - first_step_);
    return left * latest_.ms / 1000;
}

void Progress::show(double now) {
    // A column is left free: a terminal wraps when the last one is written.
    const int columns = terminal_.interactive ? std::max(1, terminal_.columns() - 1) : 0;
    const std::string line = progress_line(latest_, total_, seconds_left(now), columns, terminal_.utf8);
    if (terminal_.interactive) {
        fprintf(terminal_.out, "\r%s\033[K", line.c_str());
        line_on_screen_ = true;
    } else {
        fprintf(terminal_.out, "%s\n", line.c_str());
    }
    fflush(terminal_.out);
    last_shown_ = now;
    shown_ = true;
}
