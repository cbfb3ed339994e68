#include "matmul_choices.h"

#include <cstdint>
#include <cstdlib>
#include <filesystem>

#include "error.h"
#include "files.h"
#include "json_file.h"

std::string matmul_choices_path(const std::string& made_on) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    std::string folder;
    if (cache && cache[0] == '/')  // the XDG specification: a relative path is to be ignored
        folder = cache;
    else if (home && home[0] == '/')
        folder = std::string(home) + "/.cache";
    else
        return "";
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (unsigned char c : made_on) hash = (hash ^ c) * 0x100000001b3;
    return folder + format("/condensed_gpt2/matmul_%016llx.json", (unsigned long long)hash);
}

MatmulChoices read_matmul_choices(const std::string& path, const std::string& made_on) {
    MatmulChoices choices;
    nlohmann::json root;
    try {
        root = read_json_object(path);
    } catch (const Error&) {
        return choices;
    }
    if (root.value("made_on", nlohmann::json()) != made_on || !root["products"].is_object()) return choices;
    const auto time = [](const nlohmann::json& entry, const char* name) {
        const auto at = entry.find(name);
        const float us = at != entry.end() && at->is_number() ? at->get<float>() : -1.0f;
        return us >= 0 && us < 1e9f ? us : -1.0f;
    };
    for (const auto& [product, entry] : root["products"].items()) {
        if (!entry.is_object()) continue;
        MatmulChoice choice;
        choice.us = time(entry, "us");
        choice.guess_us = time(entry, "guess_us");
        choice.separate_us = time(entry, "separate_us");
        const auto algorithm = entry.find("algorithm");
        bool good = choice.us > 0 && choice.guess_us >= 0 && choice.separate_us >= 0 &&
                    algorithm != entry.end() && algorithm->is_array() &&
                    algorithm->size() == choice.algorithm.size();
        for (size_t i = 0; good && i < choice.algorithm.size(); i++) {
            const nlohmann::json& value = (*algorithm)[i];
            // any int: some algorithms of cuBLASLt 13.1 give the number of their pieces along the sum as -1
            good = value.is_number_unsigned()
                       ? value.get<uint64_t>() <= INT32_MAX
                       : value.is_number_integer() && value.get<int64_t>() >= INT32_MIN;
            if (good) choice.algorithm[i] = value.get<int>();
        }
        if (good) choices[product] = choice;
    }
    return choices;
}

void write_matmul_choices(const std::string& path, const std::string& made_on, const MatmulChoices& choices) {
    nlohmann::json root = {{"made_on", made_on}, {"products", nlohmann::json::object()}};
    for (const auto& [product, choice] : choices)
        root["products"][product] = {{"algorithm", choice.algorithm},
                                     {"us", choice.us},
                                     {"guess_us", choice.guess_us},
                                     {"separate_us", choice.separate_us}};
    try {
        std::filesystem::create_directories(folder_of(path));
        write_file(path, json_text(root, 1) + "\n");
    } catch (const Error&) {
    } catch (const std::filesystem::filesystem_error&) {
    }
}
