// What a run says while it runs: RUN/metrics.jsonl, and the progress on the terminal.
//
// metrics.jsonl holds one JSON object a line. The first line is the configuration of the run, as the caller
// gives it. Then, in the order in which they happened:
//
//     {"step":1,"loss":..,"ce":..,"reg":..,"mass":..,"lambda":..,"lr":..,"norm":..,"tok_s":..,"ms":..}
//     {"step":1,"val_ce":..,"val_mass":..,"val_mass_nosink":..}
//
// `step` counts the updates that are done: an update's line has the count after it, a validation's the count
// when it was made (0 before the first). A number is printed with the digits that give the same float32 back;
// one that is not finite is null.
//
// A run resumed from the checkpoint of step S drops every line with a greater step and goes on. The file then
// equals that of a straight run, but for tok_s and ms, if each step is logged in full before it is
// saved: update, validation if one is due, then checkpoint.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "files.h"

struct UpdateMetrics {
    int64_t step = 0;  // updates done, this one included
    float loss = 0;    // ce + lambda * reg
    float ce = 0;
    float reg = 0;   // R, without lambda
    float mass = 0;  // mean top-k mass
    float lambda = 0;
    float lr = 0;
    float norm = 0;  // of the gradient, before clipping
    float tok_s = 0;
    float ms = 0;
};

// ---- metrics.jsonl ----

// The shortest text that reads back as the same float32; "null" for NaN and infinity, which JSON lacks.
std::string json_number(float value);

// The first line of a run's metrics.jsonl: one JSON object with `facts` (the commit, the device, what the run
// starts "from"), the run's "settings", and the "flags" that it was given.
std::string line_of_settings(const std::map<std::string, std::string>& facts,
                             const std::map<std::string, std::string>& settings,
                             const std::map<std::string, std::string>& flags);
// And back: the settings, and "from"; empty if the line has none.
std::map<std::string, std::string> settings_of_line(const nlohmann::json& line);

// The first line of a metrics.jsonl; a discarded value if it is none.
nlohmann::json first_line(const std::string& path);
// The flags in that of a run folder; none if there is no such file or line, or if an older version wrote it.
std::map<std::string, std::string> flags_of_run(const std::string& run_folder);
// The last update in a metrics.jsonl; 0: there is none.
int64_t last_update(const std::string& path);

class MetricsLog {
  public:
    // resume_step: the step of the checkpoint that the run goes on from, or -1 for a run that starts new.
    // `config` is the first line of a new file, as JSON; a resumed file keeps its own but for "flags", which
    // are then those that it goes on with.
    MetricsLog(const std::string& run_folder, const std::string& config, int64_t resume_step = -1);
    MetricsLog(const MetricsLog&) = delete;
    MetricsLog& operator=(const MetricsLog&) = delete;
    ~MetricsLog();

    // Whether the file has a validation of resume_step.
    bool validated() const { return validated_; }

    // The first updates, of those before resume_step, that the file lacks ("updates 7 to 10"); "": none.
    const std::string& gap() const { return gap_; }

    void update(const UpdateMetrics& m);

    void validation(int64_t step, float val_ce, float val_mass, float val_mass_nosink);

    // Onto the disk: before a checkpoint is saved, so that a power cut cannot keep the one without the other.
    void sync();

  private:
    // The configuration, with the flags of `config`, and the lines up to `step`. A last line that a kill cut
    // short is dropped with the rest.
    std::string kept_lines(const std::string& config, int64_t step);

    void append(const std::string& line);

    FolderLock lock_;
    std::string path_, gap_;
    bool validated_ = false;
    int fd_ = -1;
};

// ---- Numbers for people ----

// 950, 1.20k, 12.3k, 812k, 1.24M: three digits are enough to watch.
std::string pretty_count(double n);

// "1 update", "2 updates"
std::string updates_text(int64_t n);

// 7s, 3m12s, 2h05m, 3d04h
std::string pretty_seconds(double seconds);

// 512 B, 1.5 kB, 31.2 GB: powers of ten.
std::string pretty_bytes(double bytes);

// Two aligned columns; a row with an empty second column is a heading.
std::string settings_table(const std::vector<std::pair<std::string, std::string>>& rows);

// ---- Progress on the terminal ----

// Where progress goes and what it can show; terminal_of() fills it in for a real stream.
struct Terminal {
    FILE* out = stdout;
    bool interactive = false;      // one line can be rewritten
    bool utf8 = false;             // block characters will show
    std::function<int()> columns;  // asked for each line, for a window that changes its size
    std::function<double()> now;   // seconds
};

Terminal terminal_of(FILE* out);

// A bar of `width` columns of which `fraction` is filled.
std::string progress_bar(double fraction, int width, bool utf8);

// One line about an update, at most `columns` wide: "|███  | 120/2000  loss 3.412  mass 0.912  812k tok/s
// 3m12s left". What does not fit goes: the bar first, then the time left, the speed, the mass, the count of
// updates, the loss. columns = 0 is for plain lines: no limit and no bar.
std::string progress_line(const UpdateMetrics& m, int64_t total, double seconds_left, int columns, bool utf8);

// The progress of a run. On a terminal one line that is rewritten, at most ten times a second; elsewhere
// plain lines: every update of a short run, otherwise one about every two seconds, and fewer as hours go by.
// The first and the last update always show.
class Progress {
  public:
    // total: updates of the whole run; done: those done before this process.
    explicit Progress(int64_t total, int64_t done = 0, Terminal terminal = terminal_of(stdout));
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    ~Progress() { finish(); }

    void update(const UpdateMetrics& m);

    // Something else to say (a validation, a sample): above the progress line, whole lines.
    void message(const std::string& text);

    // Shows the last update, if it is not there yet, and leaves the line.
    void finish();

  private:
    double interval(double now) const;

    double seconds_left(double now) const;

    void show(double now);

    int64_t total_, done_;
    Terminal terminal_;
    double start_, first_end_ = 0, last_shown_ = -1e300;
    int64_t first_step_ = 0;
    UpdateMetrics latest_;
    bool any_ = false, shown_ = false, line_on_screen_ = false, finished_ = false;
};
