// What the benchmarks write: the same text on the terminal and in a Markdown file, and the numbers,
// unrounded, in a JSON file, with what one must know of the machine to read them. Also the sizes of model
// that they take.
#pragma once
#include <cublasLt.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../../llmc/context.h"
#include "../../llmc/files.h"
#include "../../llmc/json_file.h"
#include "../../llmc/metrics.h"
#include "../../llmc/params.h"

extern const char* const kGitCommit;  // written by make

// ---------------------------------------------------------------------------------------------------------
// sizes of model

// Exist to run every line of a benchmark on the CPU backend in a minute.
inline constexpr ModelSize kSmallSizes[] = {{"tiny", 2, 2}, {"small", 3, 3}};

inline GPT2Config size_config(const std::string& name, int T) {
    const auto config = [&](const ModelSize& size, int V) -> GPT2Config {
        return {.max_seq_len = T,
                .vocab_size = V,
                .padded_vocab_size = pad_vocab(V),
                .num_layers = size.layers,
                .num_heads = size.heads,
                .channels = size.channels()};
    };
    for (const ModelSize& size : kPublishedSizes)
        if (name == size.name) return config(size, 50257);
    for (const ModelSize& size : kSmallSizes)
        if (name == size.name) return config(size, 997);
    fail("-e (--size) takes 124M, 355M, 774M, 1558M, or for the CPU tiny or small, not '%s'", name.c_str());
}

// ---------------------------------------------------------------------------------------------------------
// the report

// The terminal and the Markdown file get the same text; the JSON file gets the numbers, unrounded.
struct Report {
    std::string path;  // of both files, without their endings
    std::string markdown;
    nlohmann::ordered_json json;

    void print(const std::string& text) {
        fputs(text.c_str(), stdout);
        fflush(stdout);
        markdown += text;
    }
    void save() const {
        write_file(path + ".md", markdown);
        write_file(path + ".json", json_text(json, 1) + "\n");
    }
};

// A Markdown table that is printed row by row, with columns wide enough to be read on a terminal.
class Table {
  public:
    Table(Report& report, const std::vector<std::pair<std::string, int>>& columns) : report_(report) {
        std::vector<std::string> names;
        std::string rule = "|";
        for (const auto& [name, width] : columns) {
            widths_.push_back(std::max(width, (int)name.size()));
            names.push_back(name);
            const std::string dashes(widths_.back() + 1, '-');
            rule += names.size() == 1 ? dashes + "-|" : dashes + ":|";
        }
        row(names);
        report_.print(rule + "\n");
    }
    void row(const std::vector<std::string>& cells) {
        std::string line = "|";
        for (size_t i = 0; i < widths_.size(); i++)
            line +=
                format(i == 0 ? " %-*s |" : " %*s |", widths_[i], i < cells.size() ? cells[i].c_str() : "");
        report_.print(line + "\n");
    }
    // Why there is no row of this name; the cells that are left out are empty ones.
    void note(const std::string& name, const std::string& why) {
        report_.print(format("| %-*s | %s |\n", widths_[0], name.c_str(), why.c_str()));
    }

  private:
    Report& report_;
    std::vector<int> widths_;
};

// "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"
inline std::string file_name_of(const std::string& device) {
    std::string name;
    for (unsigned char c : device) {
        if (isalnum(c))
            name += (char)tolower(c);
        else if (!name.empty() && name.back() != '_')
            name += '_';
    }
    while (!name.empty() && name.back() == '_') name.pop_back();
    return name;
}

inline std::string utc_now(const char* pattern) {
    const time_t now = time(nullptr);
    tm parts;
    gmtime_r(&now, &parts);
    char text[64];
    strftime(text, sizeof text, pattern, &parts);
    return text;
}

// What nvidia-smi says of the first GPU, or "unknown".
inline std::string ask_nvidia_smi(const char* fields) {
    std::string text;
    const std::string command =
        format("nvidia-smi -i 0 --query-gpu=%s --format=csv,noheader 2>/dev/null", fields);
    if (FILE* pipe = kOnCpu ? nullptr : popen(command.c_str(), "r")) {
        char line[256];
        if (fgets(line, sizeof line, pipe)) text = line;
        pclose(pipe);
    }
    while (!text.empty() && isspace((unsigned char)text.back())) text.pop_back();
    return text.empty() ? "unknown" : printable(text);
}

// Begins the report on `subject` ("" or what is measured, for the heading) with the facts about the machine,
// in `folder`, which is made if it is not there: PREFIX + DEVICE_DATE.md and .json, or DEVICE_DATE_2 ... if
// there is such a file.
inline void open_report(Report& r, const Context& ctx, const std::string& folder, const std::string& prefix,
                        const std::string& subject) {
    make_folder(folder, "folder of -o,");
    const std::string name = folder + "/" + prefix +
                             (kOnCpu ? "cpu_backend" : file_name_of(ctx.device_name)) + "_" +
                             utc_now("%Y-%m-%d");
    r.path = name;
    for (int i = 2; is_file(r.path + ".md") || is_file(r.path + ".json"); i++)
        r.path = name + "_" + std::to_string(i);

    int driver = 0, runtime = 0;
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    r.json = {{"device", ctx.device_name},
              {"backend", kOnCpu ? "cpu" : "cuda"},
              {"multiprocessors", ctx.num_sms},
              {"memory_bytes", total_bytes},
              {"driver", ask_nvidia_smi("driver_version")},
              {"driver_cuda", driver},
              {"cuda_runtime", runtime},
              {"cublaslt", cublasLtGetVersion()},
              {"clocks_and_power_limit", ask_nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit")},
              {"commit", kGitCommit},
              {"date", utc_now("%Y-%m-%dT%H:%M:%SZ")}};
    r.print(format("# %s%s, %s\n\n", subject.empty() ? "" : (subject + ": ").c_str(), ctx.device_name.c_str(),
                   r.json["date"].get<std::string>().c_str()));
    if (kOnCpu)
        r.print(
            "**CPU backend: these times say nothing about a GPU.** They exist so that this program is tested.\n\n");
    r.print(format(
        "commit %s; driver %s (CUDA %d.%d), CUDA runtime %d.%d, cuBLASLt %zu; %d multiprocessors, %s; largest clocks, power limit: %s\n",
        kGitCommit, r.json["driver"].get<std::string>().c_str(), driver / 1000, driver % 1000 / 10,
        runtime / 1000, runtime % 1000 / 10, cublasLtGetVersion(), ctx.num_sms,
        pretty_bytes((double)total_bytes).c_str(),
        r.json["clocks_and_power_limit"].get<std::string>().c_str()));
    r.save();
}
