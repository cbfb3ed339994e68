#include "flags.h"

#include <getopt.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "error.h"
#include "files.h"

std::string Flag::said() const {
    return letter ? std::string("-") + letter + " (--" + name + ")" : "--" + name;
}

std::string Flag::title() const {
    std::string text = letter ? std::string("-") + letter + ", --" + name : "    --" + name;
    return argument.empty() ? text : text + " " + argument;
}

int64_t parse_int(const std::string& flag, const std::string& text, int64_t lowest, int64_t highest) {
    int64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (text.empty() || stop != end || error != std::errc() || value < lowest || value > highest)
        fail("%s takes a whole number from %lld to %lld, not '%s'", flag.c_str(), (long long)lowest,
             (long long)highest, text.c_str());
    return value;
}

double parse_double(const std::string& flag, const std::string& text, double lowest, double highest) {
    double value = 0.0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (text.empty() || stop != end || error != std::errc() || !(value >= lowest && value <= highest))
        fail("%s takes a number from %g to %g, not '%s'", flag.c_str(), lowest, highest, text.c_str());
    return value;
}

float parse_float(const std::string& flag, const std::string& text, double lowest, double highest) {
    return static_cast<float>(parse_double(flag, text, lowest, highest)) + 0.0f;  // -0 is 0
}

int64_t parse_updates(const std::string& flag, const std::string& text, int64_t run_updates) {
    const bool share = text.ends_with('%');
    double value = 0.0;
    const char* end = text.data() + text.size() - share;
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (stop != end || error != std::errc() || !(value >= 0.0 && value <= (share ? 100.0 : 1e15)) ||
        (!share && value != std::floor(value)))
        fail("%s takes a number of updates (200) or a share of the run (70%%), not '%s'", flag.c_str(),
             text.c_str());
    return share ? std::llround(value / 100.0 * static_cast<double>(run_updates))
                 : static_cast<int64_t>(value);
}

std::string setting_text(float x) {
    const std::string text = format("%g", x);
    return std::strtof(text.c_str(), nullptr) == x ? text : format("%.9g", x);
}

std::string parse_name(const std::string& flag, const std::string& text) {
    if (text.empty()) fail("%s takes a name, and an empty one was given", flag.c_str());
    return text;
}

int parse_choice(const std::string& flag, const std::string& text, Words words) {
    std::string all;
    for (size_t i = 0; i < words.size(); i++) {
        if (text == words[i]) return static_cast<int>(i);
        all += std::string(i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i];
    }
    fail("%s takes %s, not '%s'", flag.c_str(), all.c_str(), text.c_str());
}

Flag choice_flag(const std::string& name, Words words, const std::string& default_word,
                 const std::string& help, const std::function<void(int)>& set) {
    std::string all;
    for (const char* word : words) all += (all.empty() ? "" : "|") + std::string(word);
    return {0,    name,
            all,  default_word,
            help, [words, set](auto& flag, auto& value) {
                set(parse_choice(flag, value, words)); }};
}

std::vector<std::string> split_list(const std::string& text) {
    std::vector<std::string> parts;
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

GivenFlags parse_flags(int argc, char** argv, const std::vector<Flag>& flags,
                       std::vector<std::string>* rest) {
    GivenFlags all;
    constexpr int kLongFlag = 256;  // behind all letters
    std::string letters = ":";
    std::vector<option> options;
    for (const Flag& f : flags) {
        if (f.letter) letters += std::string(1, f.letter) + (f.argument.empty() ? "" : ":");
        // Each with a number of its own: getopt takes an abbreviation of two flags that are alike in all else
        // for the first.
        options.push_back({f.name.c_str(), f.argument.empty() ? no_argument : required_argument, nullptr,
                           kLongFlag + static_cast<int>(options.size())});
    }
    options.push_back({nullptr, 0, nullptr, 0});
    opterr = 0;
    optind = 0;  // so that tests can parse more than once
    for (;;) {
        const int letter = getopt_long(argc, argv, letters.c_str(), options.data(), nullptr);
        if (letter == -1) break;
        // What it stopped at: getopt names a letter, and has just passed a long name.
        const std::string given = optopt > 0 && optopt < kLongFlag ? format("-%c", optopt) : argv[optind - 1];
        if (letter == ':') fail("%s needs a value: see --help", given.c_str());
        if (letter == '?' && optopt >= kLongFlag)
            fail("--%s takes no value: see --help", options[optopt - kLongFlag].name);
        if (letter == '?')
            fail("there is no flag %s, or its short form is ambiguous: see --help", given.c_str());
        for (size_t i = 0; i < flags.size(); i++)
            if (letter == kLongFlag + static_cast<int>(i) || (flags[i].letter && flags[i].letter == letter)) {
                all[flags[i].name] = optarg ? optarg : "";
                flags[i].set(flags[i].said(), all[flags[i].name]);
            }
    }
    if (rest)
        rest->assign(argv + optind, argv + argc);
    else if (optind < argc)
        fail("'%s' belongs to no flag: see --help", argv[optind]);
    return all;
}

void set_flag(const std::vector<Flag>& flags, const std::string& name, const std::string& value) {
    for (const Flag& f : flags)
        if (f.name == name) return f.set(f.said(), value);
    fail("there is no flag --%s: see --help", printable(name).c_str());
}

std::string flags_help(const std::vector<Flag>& flags) {
    const size_t column = 32, width = 80;
    std::string text;
    for (const Flag& f : flags) {
        std::string line = "  " + f.title();
        line += line.size() + 1 < column ? std::string(column - line.size(), ' ')
                                         : "\n" + std::string(column, ' ');
        size_t used = column;
        std::string words = f.help + (f.default_text.empty() ? "" : " [" + f.default_text + "]");
        for (size_t at = 0; at < words.size();) {
            const size_t end = std::min(words.find(' ', at), words.size());
            const bool first = used == column, full = used + 1 + end - at > width;
            line += first ? "" : full ? "\n" + std::string(column, ' ') : " ";
            if (full) used = column;
            line += words.substr(at, end - at);
            used += end - at + (first ? 0 : 1);
            at = end + 1;
        }
        text += line + "\n";
    }
    return text;
}

Flag help_flag(const std::string& about, const std::function<std::vector<Flag>()>& table,
               const std::string& help) {
    return {'h', "help", "", "", help, [about, table](auto&, auto&) {
                fputs((about + flags_help(table())).c_str(), stdout);
                if (fflush(stdout) != 0 || ferror(stdout)) fail("the standard output could not be written");
                exit(0);
            }};
}

std::string flags_markdown(const std::vector<Flag>& flags) {
    std::string text = "| flag | default | meaning |\n|---|---|---|\n";
    const auto cell = [](std::string words) {  // a bar would end the cell
        for (size_t at = 0; (at = words.find('|', at)) != std::string::npos; at += 2) words.insert(at, "\\");
        return words;
    };
    for (const Flag& f : flags) {
        std::string title = f.title();
        title.erase(0, title.find_first_not_of(' '));
        text += "| `" + cell(title) + "` | " + cell(f.default_text) + " | " + cell(f.help) + " |\n";
    }
    return text;
}
