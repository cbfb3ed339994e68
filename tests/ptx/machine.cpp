// Memory that is checked, and the run of a kernel: blocks side by side, warps in turns, lanes by what they
// are at.
#include "machine.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace ptx {

int most_shared = 227 << 10;
bool copies_are_late = true;

namespace {

// Where a failure is.
struct Place {
    const Instruction* in = nullptr;
    const Block* block = nullptr;
    const Warp* warp = nullptr;
} here;

// Start and bytes of each allocation. (As a function: programs allocate before this file's variables are
// made.)
std::map<uint64_t, size_t>& allocations() {
    static std::map<uint64_t, size_t> all;
    return all;
}
// The last one that was looked into.
uint64_t last_begin = 1, last_end = 0;

}  // namespace

void set_place(const Instruction* in) {
    here.in = in;
}

void fail(const char* format, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, format);
    fprintf(stderr, "\nptx: ");
    vfprintf(stderr, format, args);
    va_end(args);
    if (here.block)
        fprintf(stderr, "\n  kernel %s, block %u, %u, %u", here.block->kernel->name.c_str(),
                here.block->index.x, here.block->index.y, here.block->index.z);
    if (here.warp) fprintf(stderr, ", warp %d", here.warp->number);
    if (here.in) fprintf(stderr, "\n  line %d: %s", here.in->line, here.in->text.c_str());
    fprintf(stderr, "\n");
    _Exit(1);
}

// ---- memory

void add_memory(const void* p, size_t bytes) {
    allocations()[(uint64_t)p] = bytes;
}
void remove_memory(const void* p) {
    allocations().erase((uint64_t)p);
    last_begin = 1;
    last_end = 0;
}
void check_memory(uint64_t address, size_t bytes, const char* what) {
    if (bytes == 0 || (address >= last_begin && address + bytes <= last_end)) return;
    auto it = allocations().upper_bound(address);
    if (it == allocations().begin() || address >= (--it)->first + it->second)
        fail("%s: there is no memory at %llx", what, (unsigned long long)address);
    if (address + bytes > it->first + it->second)
        fail("%s: %zu bytes end %llu beyond an allocation of %zu", what, bytes,
             (unsigned long long)(address + bytes - it->first - it->second), it->second);
    last_begin = it->first;
    last_end = last_begin + it->second;
}

std::pair<uint64_t, size_t> memory_at(uint64_t address) {
    check_memory(address, 1, "an access");
    return {last_begin, last_end - last_begin};
}
bool is_global(Space space, uint64_t address) {
    return space == Space::global || (space == Space::generic && address - kSharedWindow >= kWindowBytes &&
                                      address - kLocalWindow >= kWindowBytes);
}

uint8_t* locate(Block& block, Warp& warp, int lane, Space space, uint64_t address, int bytes) {
    if (space == Space::generic) {
        space = Space::global;
        if (address - kSharedWindow < kWindowBytes) {
            space = Space::shared;
            address -= kSharedWindow;
        } else if (address - kLocalWindow < kWindowBytes) {
            space = Space::local;
            address -= kLocalWindow;
        }
    }
    if (address % bytes)
        fail("lane %d: %llx is not aligned to %d bytes", lane, (unsigned long long)address, bytes);
    const auto within = [&](size_t size, const char* what) {
        if (address + bytes > size)
            fail("lane %d: %d bytes at %lld of %zu of %s memory", lane, bytes, (long long)address, size,
                 what);
    };
    switch (space) {
        case Space::shared:
            address -= kSharedStart;
            within(block.shared.size(), "shared");
            return block.shared.data() + address;
        case Space::local:
            within(block.kernel->local_bytes, "local");
            return warp.local.data() + (size_t)lane * block.kernel->local_bytes + address;
        case Space::param:
            within(block.kernel->param_bytes, "parameter");
            return const_cast<uint8_t*>(block.params) + address;
        default:
            check_memory(address, bytes, "an access");
            return reinterpret_cast<uint8_t*>(address);
    }
}

// ---- barriers

namespace {

// Lets the waiting lanes of a barrier go on if all have come. Threads that have ended are not waited for.
void settle_barrier(Block& b, int number) {
    Block::Barrier& barrier = b.barriers[number];
    const int expected = barrier.expected ? barrier.expected : b.num_threads - b.exited;
    if (barrier.arrived == 0 || barrier.arrived < expected) return;
    for (const auto& w : b.warps)
        for (int lane = 0; lane < 32; lane++)
            if ((w->at_barrier >> lane & 1) && w->barrier[lane] == number) {
                const Instruction& in = b.kernel->code[w->pc[lane]];
                if (in.op == "bar.red.or.pred") w->reg(in.o[0].slot)[lane] = barrier.any;
                w->at_barrier &= ~(1u << lane);
                w->pc[lane]++;
            }
    barrier = {};
}
void leave_cluster_barrier(Block& b, Warp& w) {
    for (int lane = 0; lane < 32; lane++)
        if ((w.at_cluster >> lane & 1) && b.cluster->phase != w.phase[lane]) {
            w.at_cluster &= ~(1u << lane);
            w.arrived[lane] = false;
            w.pc[lane]++;
        }
}

// ---- a warp's turn

class Turn {
  public:
    Turn(Block& block, Warp& warp) : b_(block), w_(warp), code_(block.kernel->code) {}

    // Runs up to so many instructions. False if all lanes wait, and still do.
    bool run(int instructions) {
        leave_cluster_barrier(b_, w_);
        left_ = instructions;
        bool progress = false;
        while (left_ > 0 && w_.runnable()) {
            progress = true;
            choose_lanes();
            while (lanes_ && left_-- > 0 && step()) {
            }
            put_back(lanes_, pc_);
        }
        return progress;
    }

  private:
    // The lanes that are furthest behind go first, so that those that have parted meet again.
    void choose_lanes() {
        pc_ = limit_ = INT_MAX;
        lanes_ = 0;
        for (int lane = 0; lane < 32; lane++)
            if (w_.runnable() >> lane & 1) pc_ = std::min(pc_, w_.pc[lane]);
        for (int lane = 0; lane < 32; lane++)
            if (w_.runnable() >> lane & 1) {
                if (w_.pc[lane] == pc_)
                    lanes_ |= 1u << lane;
                else
                    limit_ = std::min(limit_, w_.pc[lane]);
            }
    }
    void put_back(uint32_t lanes, int pc) {
        for (int lane = 0; lane < 32; lane++)
            if (lanes >> lane & 1) w_.pc[lane] = pc;
    }
    // On to the next instruction with all lanes; false where others wait to go along.
    bool next() { return ++pc_ < limit_; }

    // One instruction. False when the lanes have to be chosen anew.
    bool step() {
        const Instruction& in = code_[pc_];
        here.in = &in;
        if (b_.kernel->has_products) check_registers(w_, in);
        uint32_t active = lanes_;
        if (in.guard >= 0) {
            const uint64_t* p = w_.reg(in.guard);
            for (int lane = 0; lane < 32; lane++)
                if ((p[lane] != 0) == in.guard_negated) active &= ~(1u << lane);
        }
        switch (in.flow) {
            case Flow::next:
                if (active) in.action(b_, w_, in, active);
                if (in.yields) left_ -= 200;
                return next();
            case Flow::branch:
                if (active && active != lanes_) {
                    put_back(active, in.target);
                    put_back(lanes_ & ~active, pc_ + 1);
                    lanes_ = 0;
                    return false;
                }
                if (!active) return next();
                pc_ = in.target;
                return pc_ < limit_;
            default:
                break;
        }
        if (!active) return next();
        put_back(lanes_ & ~active, pc_ + 1);
        put_back(active, pc_);
        lanes_ = 0;
        switch (in.flow) {
            case Flow::exit:
                end(active);
                break;
            case Flow::block_barrier:
                arrive(in, active);
                break;
            case Flow::cluster_wait:
                for (int lane = 0; lane < 32; lane++)
                    if ((active >> lane & 1) && !w_.arrived[lane])
                        fail("lane %d waits without having arrived", lane);
                w_.at_cluster |= active;
                leave_cluster_barrier(b_, w_);
                break;
            default:
                whole_warp(in, active);
                if (in.yields) left_ = 0;
        }
        return false;
    }

    void end(uint32_t active) {
        for (int lane = 0; lane < 32; lane++)
            if ((active >> lane & 1) && !w_.open[lane].empty())
                fail("lane %d ends with copies in no group", lane);
        if (w_.products.under_way) fail("it ends with products that it has not waited for");
        if (const uint32_t early = active & ~w_.waited)
            fail("lanes %08x end and have not waited for the kernel in front", early);
        w_.alive &= ~active;
        b_.exited += std::popcount(active);
        for (int number = 0; number < 16; number++) settle_barrier(b_, number);
        b_.cluster->settle();
    }

    void arrive(const Instruction& in, uint32_t active) {
        const int first = std::countr_zero(active);
        const bool reduces = in.op == "bar.red.or.pred";  // p, number, [threads,] q
        const auto number = (int)w_.source(in.o[reduces ? 1 : 0])[first];
        Block::Barrier& barrier = b_.barriers[number];
        if (!reduces && in.o.size() > 1) barrier.expected = (int)w_.source(in.o[1])[first];
        for (int lane = 0; lane < 32; lane++)
            if (active >> lane & 1) {
                if (reduces) barrier.any |= (w_.source(in.o.back())[lane] != 0) != in.o.back().negated;
                w_.barrier[lane] = number;
            }
        w_.at_barrier |= active;
        barrier.arrived += std::popcount(active);
        settle_barrier(b_, number);
    }

    // Waits until all lanes that take part have come to this instruction.
    void whole_warp(const Instruction& in, uint32_t active) {
        uint32_t members = w_.alive;
        if (in.members >= 0) {
            members = (uint32_t)w_.source(in.o[in.members])[std::countr_zero(active)];
            if (active & ~members)
                fail("lanes %08x are not all among those that take part, %08x", active, members);
            members &= w_.alive;
        } else if (members != ~0u) {
            fail("this is for whole warps, and of this one lanes %08x are left", members);
        }
        uint32_t there = active;
        for (int lane = 0; lane < 32; lane++)
            if ((w_.at_whole_warp >> lane & 1) && w_.pc[lane] == pc_) there |= 1u << lane;
        if ((there & members) != members) {
            w_.at_whole_warp |= active;
            return;
        }
        in.action(b_, w_, in, members);
        w_.at_whole_warp &= ~members;
        put_back(members, pc_ + 1);
    }

    Block& b_;
    Warp& w_;
    const std::vector<Instruction>& code_;
    uint32_t lanes_ = 0;
    int pc_ = 0, limit_ = 0;  // limit: where the next lanes wait to go along
    int left_ = 0;            // instructions of this turn
};

// ---- a kernel

// Warps of blocks that have ended: their registers are much memory to ask for anew.
std::vector<std::unique_ptr<Warp>>& spare_warps() {
    static std::vector<std::unique_ptr<Warp>> all;
    return all;
}

class Launch {
  public:
    Launch(Kernel& kernel, Dim grid, Dim threads, int cluster, size_t shared_bytes,
           const std::vector<uint8_t>& params)
        : kernel_(kernel),
          grid_(grid),
          threads_(threads),
          cluster_(cluster),
          shared_bytes_(shared_bytes),
          params_(params) {}

    void run() {
        while (begun_ < grid_.count() || !clusters_.empty()) {
            while (begun_ < grid_.count() &&
                   (clusters_.empty() || (clusters_.size() + 1) * cluster_ <= kResident))
                begin_cluster();
            if (!give_turns()) fail_waiting();
            std::erase_if(clusters_, [](const auto& c) { return has_ended(*c); });
        }
    }

  private:
    static constexpr size_t kResident = 12;  // blocks at once: enough for those that wait for others

    void begin_cluster() {
        auto cluster = std::make_unique<Cluster>();
        cluster->threads = (int)threads_.count() * cluster_;
        for (int rank = 0; rank < cluster_; rank++, begun_++) {
            cluster->blocks.push_back(std::make_unique<Block>());
            Block& b = *cluster->blocks.back();
            b.kernel = &kernel_;
            b.cluster = cluster.get();
            b.grid = grid_;
            b.threads = threads_;
            b.index = {(uint32_t)(begun_ % grid_.x), (uint32_t)(begun_ / grid_.x % grid_.y),
                       (uint32_t)(begun_ / grid_.x / grid_.y)};
            b.rank = rank;
            b.params = params_.data();
            b.shared.assign(shared_bytes_, 0xff);
            b.num_threads = (int)threads_.count();
            prepare_products(b);
            for (int w = 0; w * 32 < b.num_threads; w++) b.warps.push_back(begin_warp(b, w));
        }
        clusters_.push_back(std::move(cluster));
    }

    std::unique_ptr<Warp> begin_warp(const Block& b, int number) {
        auto& spare = spare_warps();
        std::unique_ptr<Warp> w = std::make_unique<Warp>();
        if (!spare.empty()) {
            w->registers.swap(spare.back()->registers);
            spare.pop_back();
        }
        w->number = number;
        w->registers.assign((size_t)kernel_.registers * 32, 0xfff0dead);  // as a float no number
        w->local.assign((size_t)kernel_.local_bytes * 32, 0xff);
        prepare_products(*w, kernel_);
        const int threads = std::min(32, b.num_threads - 32 * number);
        w->alive = threads == 32 ? ~0u : (1u << threads) - 1;
        w->waited = begins_early() ? 0 : ~0u;
        for (int lane = 0; lane < 32; lane++) {
            const auto thread = (uint32_t)(32 * number + lane);
            const uint32_t values[kSpecials] = {thread % b.threads.x,
                                                thread / b.threads.x % b.threads.y,
                                                thread / b.threads.x / b.threads.y,
                                                b.threads.x,
                                                b.threads.y,
                                                b.threads.z,
                                                b.index.x,
                                                b.index.y,
                                                b.index.z,
                                                b.grid.x,
                                                b.grid.y,
                                                b.grid.z,
                                                (uint32_t)lane,
                                                (uint32_t)b.rank,
                                                (uint32_t)number};
            for (int s = 0; s < kSpecials; s++) w->reg(kernel_.first_special + s)[lane] = values[s];
        }
        return w;
    }

    // A turn for each warp, in their order or a random one. False if all wait.
    bool give_turns() {
        static const bool in_random_order =
            getenv("CUDA_CPU_SCHEDULE") && !strcmp(getenv("CUDA_CPU_SCHEDULE"), "random");
        static std::mt19937 random(1);
        std::vector<std::pair<Block*, Warp*>> turns;
        for (const auto& c : clusters_)
            for (const auto& b : c->blocks)
                for (const auto& w : b->warps)
                    if (w->alive) turns.push_back({b.get(), w.get()});
        if (in_random_order) {
            std::shuffle(turns.begin(), turns.end(), random);
            copies_are_late = random() % 2;
        }
        bool progress = false;
        for (const auto& [block, warp] : turns) {
            here = {nullptr, block, warp};
            progress |= Turn(*block, *warp).run(in_random_order ? 1 + (int)(random() % 400) : 2000);
        }
        return progress;
    }

    static bool has_ended(Cluster& c) {
        for (const auto& b : c.blocks)
            if (!b->done()) return false;
        for (const auto& b : c.blocks)
            for (auto& w : b->warps) spare_warps().push_back(std::move(w));
        return true;
    }

    [[noreturn]] void fail_waiting() {
        for (const auto& c : clusters_)
            for (const auto& b : c->blocks)
                for (const auto& w : b->warps) {
                    if (!w->alive) continue;
                    const Instruction& in = kernel_.code[w->pc[std::countr_zero(w->alive)]];
                    fprintf(
                        stderr,
                        "\nblock %u, warp %d: lanes %08x wait at a barrier, %08x for the warp, %08x for the cluster; the "
                        "first at line %d: %s",
                        b->index.x, w->number, w->at_barrier, w->at_whole_warp, w->at_cluster, in.line,
                        in.text.c_str());
                }
        here.in = nullptr;
        fail("all threads wait");
    }

    const Kernel& kernel_;
    const Dim grid_, threads_;
    const int cluster_;
    const size_t shared_bytes_;
    const std::vector<uint8_t>& params_;
    uint64_t begun_ = 0;  // blocks
    std::vector<std::unique_ptr<Cluster>> clusters_ = {};
};

}  // namespace

void launch(Kernel& kernel, Dim grid, Dim threads, int cluster, bool early, size_t dynamic_shared,
            const std::vector<uint8_t>& params) {
    begin_kernel(kernel.name, early);
    Launch(kernel, grid, threads, cluster, kernel.dynamic_start + dynamic_shared, params).run();
    here = {};
}

}  // namespace ptx
