// What a function is called, by its address: from the program's own table of symbols, which has every
// function unless it was stripped. For a kernel that is launched through a pointer, its source says no name.
#pragma once
#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

namespace cuda_cpu {
// Where the program lies in memory: what its addresses on disk are offset by.
inline uintptr_t program_base() {
    uintptr_t base = 0;
    dl_iterate_phdr(  // the program comes first
        [](dl_phdr_info* info, size_t, void* to) {
            *static_cast<uintptr_t*>(to) = info->dlpi_addr;
            return 1;
        },
        &base);
    return base;
}

// "f<int>(float*)" -> "f<int>"; a template's result type, which comes first, goes as well.
inline std::string without_parameters(std::string name) {
    int depth = 0;
    size_t begin = 0;
    for (size_t i = 0; i < name.size(); i++) {
        if (name[i] == '<') depth++;
        if (name[i] == '>') depth--;
        if (depth == 0 && name[i] == ' ') begin = i + 1;
        if (depth == 0 && name[i] == '(') return name.substr(begin, i - begin);
    }
    return name;
}

// The name of the function at `address`, with its template's arguments; "" if it is not to be found.
inline std::string function_at(const void* address) {
    std::ifstream file("/proc/self/exe", std::ios::binary);
    const std::string elf((std::istreambuf_iterator<char>(file)), {});
    ElfW(Ehdr) head;
    if (elf.copy(reinterpret_cast<char*>(&head), sizeof head) != sizeof head) return "";
    const uintptr_t wanted = reinterpret_cast<uintptr_t>(address) - program_base();
    const auto section = [&](size_t i) {
        ElfW(Shdr) s = {};
        elf.copy(reinterpret_cast<char*>(&s), sizeof s, head.e_shoff + i * sizeof s);
        return s;
    };
    for (size_t i = 0; i < head.e_shnum; i++) {
        const ElfW(Shdr) table = section(i);
        if (table.sh_type != SHT_SYMTAB) continue;
        const ElfW(Shdr) names = section(table.sh_link);
        for (size_t at = 0; at < table.sh_size; at += sizeof(ElfW(Sym))) {
            ElfW(Sym) symbol;
            elf.copy(reinterpret_cast<char*>(&symbol), sizeof symbol, table.sh_offset + at);
            if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_value != wanted) continue;
            const char* mangled = elf.c_str() + names.sh_offset + symbol.st_name;
            int status = 0;
            char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
            const std::string name = plain ? without_parameters(plain) : mangled;
            free(plain);
            return name;
        }
    }
    return "";
}
}  // namespace cuda_cpu
