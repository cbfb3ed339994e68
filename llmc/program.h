// Where this program lies: what belongs to it is found from there, wherever it is called from.
#pragma once
#include <filesystem>
#include <string>

inline std::filesystem::path program_path() {
    std::error_code error;
    const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
    return error ? "./program" : self;
}
inline std::string program_folder() {
    return program_path().parent_path().string();
}
