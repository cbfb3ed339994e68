// The command line from one table: parsing, --help and the README's table all read it.
//
// Values are checked as they are parsed, and a bad one is a sentence that names the flag, what it takes and
// what it was given. Numbers must be whole words: "-b 8x" and "-bx 8" are errors, not 8.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

struct Flag {
    char letter;           // 0: only the long name
    std::string name;      // without the dashes
    std::string argument;  // what --help calls the value; "" for a switch
    std::string default_text;
    std::string help;
    // Takes a value; `flag` is said(), for the sentence about a bad one.
    std::function<void(const std::string& flag, const std::string& value)> set;

    std::string said() const;   // "-b (--batch)"
    std::string title() const;  // "-b, --batch N"
};

// A whole number from lowest to highest.
int64_t parse_int(const std::string& flag, const std::string& text, int64_t lowest, int64_t highest);

// A finite number from lowest to highest.
double parse_double(const std::string& flag, const std::string& text, double lowest, double highest);
float parse_float(const std::string& flag, const std::string& text, double lowest, double highest);

// A length given as a number of updates ("200") or as a share of the run ("70%"), in updates.
int64_t parse_updates(const std::string& flag, const std::string& text, int64_t run_updates);

// A number as text that is short, as %g makes it, if that gives the same float back.
std::string setting_text(float x);

// The name of a file or folder; an empty one (a shell variable that is not set, say) is an error.
std::string parse_name(const std::string& flag, const std::string& text);

// The words that an enum's values have on the command line, in files and in tables, in the enum's order.
using Words = std::span<const char* const>;

// One of a few words; returns its index.
int parse_choice(const std::string& flag, const std::string& text, Words words);

// A flag that takes one of an enum's words. What it sets has its default already.
Flag choice_flag(const std::string& name, Words words, const std::string& default_word,
                 const std::string& help, const std::function<void(int)>& set);
template <class Enum>
Flag choice_flag(const std::string& name, Words words, Enum& value, const std::string& help) {
    return choice_flag(name, words, words[static_cast<size_t>(value)], help,
                       [&value](int index) { value = static_cast<Enum>(index); });
}

// The parts of a list with commas; an empty text has one, which is empty.
std::vector<std::string> split_list(const std::string& text);

// Flags as they were given: values by long names, of a flag that was given twice the last.
using GivenFlags = std::map<std::string, std::string>;

// Sets everything that argv names, in order. Words that belong to no flag go to `rest`; where that is null
// they are an Error, like any flag that is not in the table.
GivenFlags parse_flags(int argc, char** argv, const std::vector<Flag>& flags,
                       std::vector<std::string>* rest = nullptr);

// Sets one flag by its long name.
void set_flag(const std::vector<Flag>& flags, const std::string& name, const std::string& value);

// Lines of at most 80 columns, the second column aligned.
std::string flags_help(const std::vector<Flag>& flags);

// -h, --help: prints `about`, then the table with its defaults, and exits. `help` is its own line in the
// table.
Flag help_flag(const std::string& about, const std::function<std::vector<Flag>()>& table,
               const std::string& help = "show this table and exit");

// The same table in Markdown, as it stands in the README.
std::string flags_markdown(const std::vector<Flag>& flags);
