// The race checker. g++ -fsanitize=thread puts a call to __tsan_read4 and the like before every load and
// store; the sanitizer's library would look for races between OS threads, and this file, linked in its place,
// looks for races between CUDA threads: two accesses to the same memory, one of them a write, with no barrier
// between them; and for reads of memory that nobody wrote. Only what kernels do to memory from cudaMalloc and
// to shared memory counts. Compile this file without -fsanitize=thread.
//
// For each 2 bytes of such memory a Cell remembers the last write and the last read: of several readers only
// the last is named, and of threads that share a cell by writing single bytes only the last is seen. Barriers
// and warp barriers order accesses; shuffles and votes do not, as on a GPU. The blocks of a grid are ordered
// only by release_store and acquire_load of a flag: what a block acquires makes all of the releasing block's
// accesses, and of those that it was ordered after, earlier ones (which thread did either is not followed).
// The blocks of a cluster count as one block whose parts only mailboxes order: what was sent to one, before
// what a thread does that has waited for it, or has met such a thread at a barrier.
#ifndef CUDA_CPU_RACE
#error "race_check.cpp must be compiled with -DCUDA_CPU_RACE"
#endif
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace cuda_cpu {
namespace {

struct Access {
    uint32_t block = 0;       // or cluster, counted over the whole run; 0 is no access
    uint32_t epoch = 0;       // barriers of the block before it
    uint16_t warp_epoch = 0;  // and, since the last of them, warp barriers of the warp
    uint16_t thread = 0;
    uint8_t others = 0;  // for reads: who else read since the last barrier; then atomic means that all were
    bool atomic = false;
    uint8_t bytes = 3;    // of the cell: 1, 2 or both
    uint8_t mailbox = 0;  // that a write was sent to: its number, from 1
    void* pc = nullptr;   // the code's address
};
enum Others : uint8_t { kSameWarp = 1, kOtherWarps = 2, kOtherBlocks = 4, kOtherOfCluster = 8 };

struct Cell {
    Access write, read;
};
constexpr size_t kCellBytes = 2;

// cudaMalloc takes from one large range of addresses, never twice the same, so that an address leads to its
// cell by arithmetic and memory that was freed reads as uninitialised. Untouched pages cost nothing.
constexpr size_t kArenaBytes = size_t{1} << 36;
char *arena = nullptr, *arena_top = nullptr;
Cell* arena_cells = nullptr;

char *static_begin = nullptr,
     *static_end = nullptr;  // static shared memory: the program's thread-local block
std::vector<Cell> static_cells, dynamic_cells;

uint32_t block = 1, first_block_of_grid = 1;
uint32_t epochs[kMaxCluster];  // of each block of the cluster
uint16_t warp_epoch[32];
std::vector<const void*> mailboxes;  // of the cluster, by number - 1
uint64_t received[1024];             // of each thread: whose mail it has waited for
bool in_kernel = false;
int reports = 0;

std::set<uint32_t> earlier_blocks;                        // those that this block is ordered after
std::map<const void*, std::set<uint32_t>> blocks_behind;  // a flag: who is ordered before its acquirer

void* reserve(size_t bytes) {
    void* p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("CUDA on the CPU: no address space for the race checker");
        abort();
    }
    return p;
}

void reserve_arena() {
    if (arena) return;
    arena = arena_top = static_cast<char*>(reserve(kArenaBytes));
    arena_cells = static_cast<Cell*>(reserve(kArenaBytes / kCellBytes * sizeof(Cell)));
}

int find_static_shared(dl_phdr_info* program, size_t, void*) {
    for (int i = 0; i < program->dlpi_phnum; i++) {
        if (program->dlpi_phdr[i].p_type != PT_TLS || !program->dlpi_tls_data) continue;
        static_begin = static_cast<char*>(program->dlpi_tls_data);
        static_end = static_begin + program->dlpi_phdr[i].p_memsz;
    }
    return 1;  // the first object is the program: stop there
}

// The emulator's own variables lie among the static shared ones.
bool is_own_variable(const char* p) {
    auto within = [p](const auto& v) {
        const char* begin = reinterpret_cast<const char*>(&v);
        return p >= begin && p < begin + sizeof v;
    };
    return within(threadIdx) || within(blockIdx) || within(blockDim) || within(gridDim) || within(worker) ||
           within(last_error);
}

// ---------------------------------------------------------------- reports

void print_place(void* pc) {
    Dl_info object;
    if (!dladdr(pc, &object)) return;
    size_t offset = static_cast<size_t>(static_cast<char*>(pc) - static_cast<char*>(object.dli_fbase)) - 1;
    char command[600];  // the inlined functions too, innermost first
    snprintf(command, sizeof command,
             "addr2line -s -f -C -p -i -e '%s' %#zx | grep -v -e ' at launch.h:' -e ' at scheduler.h:' | sed "
             "'s/^/    /' >&2",
             object.dli_fname, offset);
    if (system(command) != 0) fprintf(stderr, "    %s+%#zx\n", object.dli_fname, offset);
}

void exit_with_failure() {
    fprintf(stderr, "CUDA on the CPU: the race checker reported %d errors\n", reports);
    fflush(nullptr);
    _exit(1);
}

[[gnu::noinline]] void report(const char* what, const char* space, int thread, void* pc,
                              const Access* other) {
    static std::set<std::pair<void*, void*>> reported;  // a pair of places once
    if (!reports++) atexit(exit_with_failure);
    if (reported.size() == 20 || !reported.insert({pc, other ? other->pc : nullptr}).second) return;
    uint3 t = worker->index[thread];
    fprintf(stderr, "CUDA on the CPU: %s in %s memory by thread (%u,%u,%u) of block (%u,%u,%u)\n", what,
            space, t.x, t.y, t.z, blockIdx.x, blockIdx.y, blockIdx.z);
    print_place(pc);
    if (!other) return;
    t = worker->index[other->thread];
    const bool same = other->block == block && block_of(*worker, other->thread) == block_of(*worker, thread);
    fprintf(stderr, "  the other access was by thread (%u,%u,%u) of %s\n", t.x, t.y, t.z,
            same                    ? "the same block"
            : other->block == block ? "another block of the cluster"
                                    : "another block");
    print_place(other->pc);
}

// ---------------------------------------------------------------- accesses

// The block of the cluster that a thread belongs to.
int part_of(int thread) {
    return block_of(*worker, thread);
}

// Whether nothing orders an earlier access to a cell and the one now. The first two answers are by far the
// most frequent.
inline bool unordered(const Access& earlier, const Access& now, bool shared) {
    const int thread = now.thread;
    if (earlier.block < (shared ? block : first_block_of_grid)) return false;
    if (earlier.thread == thread && earlier.block == block && !earlier.others && !earlier.mailbox)
        return false;
    if (!(earlier.bytes & now.bytes)) return false;
    if (earlier.block != block && !(earlier.others & kOtherBlocks) && earlier_blocks.count(earlier.block))
        return false;
    if (now.atomic && earlier.atomic) return false;
    if (earlier.block != block || (earlier.others & kOtherBlocks)) return true;
    if (earlier.mailbox) return !(received[thread] >> (earlier.mailbox - 1) & 1);
    if (part_of(earlier.thread) != part_of(thread) || (earlier.others & kOtherOfCluster)) return true;
    if (earlier.epoch != now.epoch) return false;
    if ((earlier.others & kOtherWarps) || earlier.thread / 32 != thread / 32) return true;
    return earlier.warp_epoch == warp_epoch[thread / 32];
}

void remember_read(Cell& cell, Access now, bool shared) {
    const Access& last = cell.read;
    bool same_grid = !shared && last.block >= first_block_of_grid && !earlier_blocks.count(last.block);
    if (same_grid && (last.others & kOtherBlocks)) return;  // any later write conflicts already
    if (same_grid && last.block != block) {
        now.others = kOtherBlocks;
        now.atomic = now.atomic && last.atomic;
    } else if (last.block == block &&
               (part_of(last.thread) != part_of(now.thread) || (last.others & kOtherOfCluster))) {
        now.others = static_cast<uint8_t>(last.others | kOtherOfCluster);
        now.bytes |= last.bytes;
        now.atomic = now.atomic && last.atomic;
    } else if (last.block == block && last.epoch == now.epoch && (last.bytes & now.bytes)) {
        now.others = last.others;
        // what the warp's other threads read before its last barrier is over
        if (last.warp_epoch != now.warp_epoch) now.others &= static_cast<uint8_t>(~kSameWarp);
        now.bytes |= last.bytes;
        if (last.thread / 32 != now.thread / 32)
            now.others |= kOtherWarps;
        else if (last.thread != now.thread && last.warp_epoch == now.warp_epoch)
            now.others |= kSameWarp;
        if (now.atomic && !last.atomic) {  // more conflicts with the plain read: that is the one to name
            uint8_t others = now.others;
            now = last;
            now.others = others;
        }
    }
    cell.read = now;
}

[[gnu::noinline]] void check_access(Cell* cell, const char* space, const char* p, size_t bytes, bool write,
                                    bool atomic, void* pc) {
    const bool shared = *space != 'g';
    const int thread = worker->current;
    const auto part = static_cast<uint8_t>(bytes > 1 ? 3 : 1 << reinterpret_cast<uintptr_t>(p) % 2);
    Access now;
    now.block = block;
    now.epoch = epochs[part_of(thread)];
    now.warp_epoch = warp_epoch[thread / 32];
    now.thread = static_cast<uint16_t>(thread);
    now.atomic = atomic;
    now.bytes = part;
    now.pc = pc;
    for (Cell* end = cell + (bytes + kCellBytes - 1) / kCellBytes; cell < end; cell++) {
        bool written = shared ? cell->write.block == block : cell->write.block != 0;
        if (!write && !written) {
            report("a read of what nobody wrote", space, thread, pc, nullptr);
            cell->write = now;  // one report is enough
            return;
        }
        if (unordered(cell->write, now, shared)) {
            report(write ? "two writes with no barrier between them" : "a read with no barrier after a write",
                   space, thread, pc, &cell->write);
            cell->write = now;
            return;
        }
        if (!write) {
            remember_read(*cell, now, shared);
            continue;
        }
        if (unordered(cell->read, now, shared)) {
            report("a write with no barrier after a read", space, thread, pc, &cell->read);
            cell->read = Access();
        }
        cell->write = now;
    }
}

// Of the accesses that are instrumented, most are to a thread's own stack: they leave at the first lines.
inline void access(const volatile void* address, size_t bytes, bool write, bool atomic, void* pc) {
    if (!in_kernel || !worker) return;
    char* p = const_cast<char*>(static_cast<const volatile char*>(address));
    const Worker& w = *worker;
    if (p >= arena && p < arena_top)
        check_access(arena_cells + (p - arena) / kCellBytes, "global", p, bytes, write, atomic, pc);
    else if (p >= w.shared && p < w.shared + w.shared_bytes)
        check_access(&dynamic_cells[static_cast<size_t>(p - w.shared) / kCellBytes], "dynamic shared", p,
                     bytes, write, atomic, pc);
    else if (p >= static_begin && p < static_end && !is_own_variable(p))
        check_access(&static_cells[static_cast<size_t>(p - static_begin) / kCellBytes], "static shared", p,
                     bytes, write, atomic, pc);
}

}  // namespace

// ---------------------------------------------------------------- what the emulator tells

void race_launch(bool begins) {
    in_kernel = begins;
    if (!begins) return;
    first_block_of_grid = block + 1;
    blocks_behind.clear();
    dl_iterate_phdr(find_static_shared, nullptr);  // at every launch: each OS thread has its own
    static_cells.resize(static_cast<size_t>(static_end - static_begin) / kCellBytes + 1);
}
void race_block() {
    block++;
    earlier_blocks.clear();
    std::fill(epochs, epochs + kMaxCluster, 0u);
    mailboxes.clear();
    if (worker->cluster > 1) std::fill(received, received + 1024, uint64_t{0});
    std::fill(warp_epoch, warp_epoch + 32, uint16_t{0});
    if (size_t cells = worker->shared_bytes / kCellBytes + 1; dynamic_cells.size() < cells)
        dynamic_cells.resize(cells);
}
// What one of these threads has received, all have.
static void share_mail(int first, int count) {
    if (mailboxes.empty()) return;
    uint64_t all = 0;
    for (int t = first; t < first + count; t++) all |= received[t];
    std::fill_n(received + first, count, all);
}
void race_barrier(int of_cluster) {
    epochs[of_cluster]++;
    const int threads = worker->block_threads, warps = (threads + 31) / 32;
    std::fill_n(warp_epoch + of_cluster * warps, warps, uint16_t{0});
    share_mail(of_cluster * threads, threads);
}
void race_syncwarp(int warp) {
    warp_epoch[warp]++;
    share_mail(warp * 32, 32);
}
static int number_of(const void* mailbox) {
    const auto at = std::find(mailboxes.begin(), mailboxes.end(), mailbox);
    const auto number = static_cast<int>(at - mailboxes.begin());
    if (at == mailboxes.end()) mailboxes.push_back(mailbox);
    if (number >= 64) fail("more than 64 mailboxes in a cluster", {});
    return number;
}
void race_send(const void* mailbox, const void* p, size_t bytes) {
    if (!in_kernel) return;
    const int number = number_of(mailbox);
    Cell* cell =
        &dynamic_cells[static_cast<size_t>(static_cast<const char*>(p) - worker->shared) / kCellBytes];
    for (size_t i = 0; i < bytes / kCellBytes; i++) cell[i].write.mailbox = static_cast<uint8_t>(number + 1);
}
void race_receive(const void* mailbox) {
    if (in_kernel) received[worker->current] |= uint64_t{1} << number_of(mailbox);
}
void race_release(const void* flag) {
    if (!in_kernel) return;
    std::set<uint32_t>& behind = blocks_behind[flag];
    behind.insert(earlier_blocks.begin(), earlier_blocks.end());
    behind.insert(block);
}
void race_acquire(const void* flag) {
    if (in_kernel) earlier_blocks.insert(blocks_behind[flag].begin(), blocks_behind[flag].end());
}
void* race_malloc(size_t bytes) {
    reserve_arena();
    constexpr size_t kPage = 4096;
    size_t taken = (bytes + kPage) / kPage * kPage;  // a whole page, to give back, and a gap to the next
    if (taken > kArenaBytes - static_cast<size_t>(arena_top - arena)) return nullptr;
    return std::exchange(arena_top, arena_top + taken);
}
void race_free(void* p, size_t bytes) {
    Cell* cells = arena_cells + (static_cast<char*>(p) - arena) / kCellBytes;
    madvise(p, bytes, MADV_DONTNEED);
    madvise(cells, bytes / kCellBytes * sizeof(Cell), MADV_DONTNEED);
}
void race_initialized(void* p, size_t bytes) {
    char* begin = static_cast<char*>(p);
    if (!bytes || begin < arena || begin >= arena_top) return;
    Cell* cell = arena_cells + (begin - arena) / kCellBytes;
    for (Cell* end = arena_cells + (begin + bytes - 1 - arena) / kCellBytes; cell <= end; cell++)
        if (!cell->write.block) cell->write.block = 1;
}
}  // namespace cuda_cpu

// ---------------------------------------------------------------- what the compiler calls

#define PC __builtin_return_address(0)
#define READ_AND_WRITE(FUNCTION, BYTES)               \
    void __tsan_##FUNCTION##read##BYTES(void* p) {    \
        cuda_cpu::access(p, BYTES, false, false, PC); \
    }                                                 \
    void __tsan_##FUNCTION##write##BYTES(void* p) {   \
        cuda_cpu::access(p, BYTES, true, false, PC);  \
    }
#define OF_ALL_SIZES(FUNCTION)  \
    READ_AND_WRITE(FUNCTION, 1) \
    READ_AND_WRITE(FUNCTION, 2) \
    READ_AND_WRITE(FUNCTION, 4) \
    READ_AND_WRITE(FUNCTION, 8) \
    READ_AND_WRITE(FUNCTION, 16)

#define ATOMIC_UPDATE(BITS, T, NAME)                          \
    T __tsan_atomic##BITS##_##NAME(volatile T* p, T v, int) { \
        cuda_cpu::access(p, sizeof(T), true, true, PC);       \
        return __atomic_##NAME(p, v, __ATOMIC_SEQ_CST);       \
    }
#define ATOMIC_COMPARE_EXCHANGE(BITS, T, NAME, WEAK)                                                  \
    int __tsan_atomic##BITS##_compare_exchange_##NAME(volatile T* p, T* expected, T v, int, int) {    \
        cuda_cpu::access(p, sizeof(T), true, true, PC);                                               \
        return __atomic_compare_exchange_n(p, expected, v, WEAK, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }
#define ATOMICS(BITS, T)                                        \
    T __tsan_atomic##BITS##_load(const volatile T* p, int) {    \
        cuda_cpu::access(p, sizeof(T), false, true, PC);        \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);            \
    }                                                           \
    void __tsan_atomic##BITS##_store(volatile T* p, T v, int) { \
        cuda_cpu::access(p, sizeof(T), true, true, PC);         \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);               \
    }                                                           \
    T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) { \
        cuda_cpu::access(p, sizeof(T), true, true, PC);         \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);     \
    }                                                           \
    ATOMIC_UPDATE(BITS, T, fetch_add)                           \
    ATOMIC_UPDATE(BITS, T, fetch_sub)                           \
    ATOMIC_UPDATE(BITS, T, fetch_and)                           \
    ATOMIC_UPDATE(BITS, T, fetch_or)                            \
    ATOMIC_UPDATE(BITS, T, fetch_xor)                           \
    ATOMIC_COMPARE_EXCHANGE(BITS, T, strong, false)             \
    ATOMIC_COMPARE_EXCHANGE(BITS, T, weak, true)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
void __tsan_read_range(void* p, size_t bytes) {
    cuda_cpu::access(p, bytes, false, false, PC);
}
void __tsan_write_range(void* p, size_t bytes) {
    cuda_cpu::access(p, bytes, true, false, PC);
}
OF_ALL_SIZES()
OF_ALL_SIZES(unaligned_)
OF_ALL_SIZES(volatile_)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
