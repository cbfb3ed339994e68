// The rules of kernels that begin before the one in front has ended (llmc/overlap.cuh). Here a kernel ends
// before the next one begins; what one that was launched so may do before it has waited is found out:
//
//   - it writes nothing, and reads nothing that a kernel may not have written yet
//   - each of its threads waits before it ends, so that who waits for it has waited for all in front
//
// A kernel begins early when the one in front says so, or ends. If that one had waited by then, all that was
// in front of it has ended; otherwise no more than what had when it began itself.
#include <map>

#include "machine.h"

namespace ptx {
namespace {

struct Run {
    uint32_t number = 0;  // of all kernels
    uint32_t ended = 0;   // kernels up to this one have, when it begins
    bool early = false;
    bool hurried = false;  // let the next one begin before it had waited itself
} run;
bool all_have_ended = true;  // when the next one begins
bool tracks = false;         // since there is a kernel that begins early
std::vector<std::string> names = {"copies"};

// The number of the kernel that last wrote each word of an allocation.
uint32_t* writers(uint64_t address) {
    static std::map<uint64_t, std::vector<uint32_t>> all;
    static uint64_t begin = 1, end = 0;
    static uint32_t* words = nullptr;
    if (address < begin || address >= end) {
        const auto [first, bytes] = memory_at(address);
        std::vector<uint32_t>& of_it = all[first];
        of_it.resize(bytes / 4 + 1);
        begin = first;
        end = first + bytes;
        words = of_it.data();
    }
    return words + (address - begin) / 4;
}
// Words that these bytes are in.
size_t count_words(uint64_t address, size_t bytes) {
    return bytes == 0 ? 0 : (address % 4 + bytes + 3) / 4;
}

}  // namespace

void begin_kernel(const std::string& name, bool early) {
    Run next;
    next.number = run.number + 1;
    next.early = early && !all_have_ended;
    next.ended = !next.early ? run.number : run.hurried ? run.ended : run.number - 1;
    run = next;
    all_have_ended = false;
    tracks |= early;
    if (!tracks) return;
    names.resize(run.number);
    names.push_back(name);
}
void end_kernels() {
    all_have_ended = true;
}
bool begins_early() {
    return run.early;
}

void start_next_kernel(const Warp& w, uint32_t lanes) {
    if (lanes & ~w.waited) run.hurried = true;
}
void check_early_read(const Warp& w, int lane, uint64_t address, size_t bytes) {
    if (w.waited >> lane & 1) return;
    const uint32_t* writer = writers(address);
    for (size_t i = 0; i < count_words(address, bytes); i++)
        if (writer[i] > run.ended)
            fail("lane %d reads, and has not waited for it, what this kernel may still write: %s", lane,
                 names[writer[i]].c_str());
}
void note_kernel_write(const void* p, size_t bytes) {
    if (!tracks) return;
    uint32_t* writer = writers((uint64_t)p);
    std::fill(writer, writer + count_words((uint64_t)p, bytes), run.number);
}

}  // namespace ptx
