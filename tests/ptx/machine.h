// A GPU to test on where there is none: runs the PTX that nvcc makes of the kernels, on a CPU, one lane after
// another. The CPU backend (llmc/cpu) compiles a kernel's source with g++ and has its own bodies of what is
// inline PTX; here it is the compiler's output itself that runs, inline PTX and the forms for a GPU included,
// under host code that nvcc compiled. What a GPU would not say is an error: an address outside of every
// allocation or not aligned to its access, a warp that is not whole where it must be, a barrier that not all
// threads reach, more shared memory than was asked for, a copy that nobody waited for (it arrives as late as
// it may), sums and tiles of a wgmma that are touched before it was waited for, in a kernel that begins early
// what the one in front may still write. Shared memory, registers and cudaMalloc's memory begin with what is
// no number.
//
// It is slow, knows the instructions that the kernels here use and names any other, has one memory for all
// (so it says nothing on caches or on the order in which other blocks see writes), and rounds the approximate
// functions correctly. A kernel ends before the next one begins.
//
//   parser.cpp        PTX text to kernels             runtime.cpp   the CUDA runtime's functions
//   instructions.cpp  what an instruction does        cublas.cpp    cuBLASLt's, by the CPU backend's
//   machine.cpp       memory, barriers, launches      products.cpp  the rules of wgmma
//                                                     overlap.cpp   those of kernels that begin early
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

// The generic address of a block's shared and a lane's local memory; all other addresses are the host's own.
// Within its window shared memory does not begin at 0, which is no valid address of anything.
inline constexpr uint64_t kSharedWindow = 0x700000000000, kLocalWindow = 0x710000000000;
inline constexpr uint64_t kWindowBytes = 1 << 24;
inline constexpr uint32_t kSharedStart = 1024;

struct Block;
struct Cluster;
struct Warp;
struct Instruction;

// Does an instruction for these lanes of the warp.
using Action = void (*)(Block&, Warp&, const Instruction&, uint32_t lanes);

// How an instruction moves a lane on.
enum class Flow { next, branch, exit, block_barrier, cluster_wait, whole_warp };
enum class Space { generic, global, shared, local, param };

struct Operand {
    enum Kind { none, reg, immediate, list, sink, label } kind = none;
    int slot = -1;                    // of a register, or of an address's base
    uint64_t value = 0;               // an immediate, or an address without a register
    const uint64_t* all = nullptr;    // the value, once for each lane
    int64_t offset = 0;               // of an address
    int predicate = -1;               // b in a|b
    bool negated = false;             // !a
    std::vector<Operand> parts = {};  // {a, b, ..}
    std::string name = {};
};

struct Instruction {
    Action action = nullptr;
    Flow flow = Flow::next;
    std::string op, text;
    int line = 0;
    int guard = -1;  // @p
    bool guard_negated = false;
    std::vector<Operand> o = {};
    int target = -1;  // of a branch
    // what the words of the opcode say
    Space space = Space::generic;
    int bytes = 0, elements = 1;  // of an access: of each of its elements
    bool sign = false;            // extended; of a cvt: saturated
    int from = 0, to = 0;         // a cvt's types; a shuffle's kind
    int mode = 0;                 // a cvt's rounding
    int members = -1;             // the operand that names a whole_warp instruction's lanes; -1: all
    bool yields = false;          // others should get a turn: it may be one of a loop that waits for them
    std::vector<int> reads = {}, writes = {};  // registers; of a kernel with products alone
};

struct Kernel {
    std::string name;
    std::vector<Instruction> code = {};
    int registers = 0, first_special = 0;
    int shared_bytes = 0, local_bytes = 0, param_bytes = 0;
    int dynamic_start = 0;                         // where in shared memory begins what is dynamic
    std::vector<std::pair<int, int>> params = {};  // offset, bytes
    int max_threads = 1024;
    int max_dynamic = 48 << 10;  // bytes of dynamic shared memory,
    bool asked = false;          // and whether they were asked for
    bool has_products = false;   // wgmma
};

struct Dim {
    uint32_t x = 1, y = 1, z = 1;
    uint64_t count() const { return (uint64_t)x * y * z; }
};

inline constexpr int kSpecials = 15;  // registers: %tid.x ..., as kSpecialNames has them (parser.cpp)

struct AsyncCopy {
    uint64_t to, from;
    int bytes;
    bool zeros;
};

// A wgmma that is under way: it reads these words of shared memory and registers, and writes those.
struct Product {
    std::vector<uint32_t> words;
    std::vector<int> fragments, sums;
};

// What a warp's products under way and the rules for the next ones are about: products.cpp.
struct Products {
    std::vector<Product> open = {};  // of no group yet
    std::deque<std::vector<Product>> groups = {};
    int under_way = 0;
    std::vector<uint8_t> reading = {}, writing = {};  // [register]: products that do so
    std::vector<int> touched = {};                    // [register]: the fences before its last use
    int fences = 0;
    std::vector<uint32_t> unfenced[32] = {};  // words that a lane wrote since its last fence.proxy.async
};

struct Warp {
    int number = 0;
    std::vector<uint64_t> registers = {};  // [register][lane]
    std::vector<uint8_t> local = {};       // [lane][bytes]
    uint32_t alive = 0;
    uint32_t waited = 0;                                         // lanes that have for the kernel in front
    uint32_t at_barrier = 0, at_whole_warp = 0, at_cluster = 0;  // lanes that wait
    int pc[32] = {}, barrier[32] = {};
    bool arrived[32] = {};                 // at the cluster's barrier,
    int phase[32] = {};                    // in this phase of it
    std::vector<AsyncCopy> open[32] = {};  // cp.async: copies of no group yet, and groups
    std::deque<std::vector<AsyncCopy>> groups[32] = {};
    Products products = {};

    uint32_t runnable() const { return alive & ~(at_barrier | at_whole_warp | at_cluster); }
    uint64_t* reg(int slot) { return registers.data() + (size_t)slot * 32; }
    const uint64_t* source(const Operand& o) { return o.slot >= 0 ? reg(o.slot) : o.all; }
};

// An mbarrier: arrivals and bytes that are still to come.
struct Mailbox {
    int64_t count = 0, pending = 0, bytes = 0;
    int phase = 0;

    void settle() {
        if (pending > 0 || bytes != 0) return;
        phase ^= 1;
        pending = count;
    }
};

struct Block {
    struct Barrier {
        int arrived = 0, expected = 0;  // 0: all threads
        bool any = false;               // of bar.red.or
    };
    const Kernel* kernel = nullptr;
    Dim index = {}, grid = {}, threads = {};
    const uint8_t* params = nullptr;
    std::vector<uint8_t> shared = {};
    std::vector<std::unique_ptr<Warp>> warps = {};
    int num_threads = 0, exited = 0;
    int rank = 0;  // in the cluster
    Barrier barriers[16] = {};
    std::map<uint32_t, Mailbox> mailboxes = {};  // by their address
    Cluster* cluster = nullptr;
    // of each word of shared memory: products that read it now; the thread, + 1, that wrote it without a
    // fence
    std::vector<uint16_t> being_read = {}, unfenced = {};

    bool done() const { return exited == num_threads; }
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks = {};
    int threads = 0, arrived = 0, phase = 0;

    // Begins the next phase of its barrier if all have come. Threads that have ended are not waited for.
    void settle() {
        int exited = 0;
        for (const auto& b : blocks) exited += b->exited;
        if (arrived == 0 || arrived + exited < threads) return;
        arrived = 0;
        phase++;
    }
};

// ---- parser.cpp, instructions.cpp

// Adds the kernels of a PTX module to those that find_kernel() knows.
void parse_module(const std::string& text);
Kernel* find_kernel(const std::string& name);

// Finds the action of in.op and sets what the opcode's words say; false: there is no such instruction here.
bool decode(Instruction& in);

// ---- products.cpp

// Says which registers an instruction of a kernel with products reads and writes.
void note_registers(Instruction& in);
void prepare_products(Block& block);
void prepare_products(Warp& warp, const Kernel& kernel);
// Before another instruction than those below.
void check_registers(Warp& warp, const Instruction& in);
// Of wgmma: p's words are those that it reads.
void begin_product(Block& block, Warp& warp, Product p);
void commit_products(Warp& warp);
void wait_products(Block& block, Warp& warp, size_t groups_left);
void fence_registers(Warp& warp);
// Of shared memory: a lane has written to it, makes its writes known to products, and a product reads it.
void note_write(Block& block, Warp& warp, int lane, const uint8_t* p, int bytes);
void fence_writes(Block& block, Warp& warp, uint32_t lanes);
void check_fenced(const Block& block, uint32_t word);

// ---- overlap.cpp

// What comes next is a kernel, one of cuBLASLt's included.
void begin_kernel(const std::string& name, bool early);
// What comes next begins when everything in front has ended.
void end_kernels();
bool begins_early();
// Of the kernel that runs: lanes let the next one begin; a lane reads memory of the device; it was written
// to.
void start_next_kernel(const Warp& warp, uint32_t lanes);
void check_early_read(const Warp& warp, int lane, uint64_t address, size_t bytes);
void note_kernel_write(const void* p, size_t bytes);

// ---- machine.cpp

// Says what went wrong and where, and ends the program.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void set_place(const Instruction* in);  // where a failure is, until it is set anew

void add_memory(const void* p, size_t bytes);
void remove_memory(const void* p);
// Fails unless all of it lies in one allocation.
void check_memory(uint64_t address, size_t bytes, const char* what);
// The start and the bytes of the allocation that an address is in.
std::pair<uint64_t, size_t> memory_at(uint64_t address);
bool is_global(Space space, uint64_t address);

// The host's address of `bytes` bytes that a lane reads or writes, aligned to their number.
uint8_t* locate(Block& block, Warp& warp, int lane, Space space, uint64_t address, int bytes);

// Runs a kernel from beginning to end. cluster: blocks of a cluster, along x; early: it may begin before the
// one in front has ended.
void launch(Kernel& kernel, Dim grid, Dim threads, int cluster, bool early, size_t dynamic_shared,
            const std::vector<uint8_t>& params);

extern int most_shared;       // bytes of shared memory that a block may have
extern bool copies_are_late;  // cp.async's arrive when they are waited for, otherwise at once

}  // namespace ptx
