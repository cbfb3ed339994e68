// Runs the threads of one block, or of the few blocks of a cluster, on one OS thread.
//
// Fibers are made lazily. A block starts as one fiber that runs its threads one after another; a thread that
// never waits costs 1-2 ns. Only when the first thread waits does the block become a set of fibers (about
// 42 ns a thread, once a block); each further barrier or shuffle is a switch (13-21 ns a thread).
//
// A warp collective is one mechanism for shuffles, votes, reductions, ldmatrix and mma: every lane posts a
// pointer to its operands and waits; the last lane of the mask to arrive runs one function over all posts.
//
// When no thread can run, the block is deadlocked, which costs nothing to notice. The three schedules are for
// tests: a missing barrier gives a wrong result when threads run in another order.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "fibers.h"
#include "types.h"

namespace cuda_cpu {
enum class Schedule { forward, backward, random };

inline Schedule schedule_from_environment() {
    const char* name = getenv("CUDA_CPU_SCHEDULE");
    if (!name || !strcmp(name, "forward")) return Schedule::forward;
    if (!strcmp(name, "backward")) return Schedule::backward;
    if (!strcmp(name, "random")) return Schedule::random;
    fprintf(stderr, "CUDA_CPU_SCHEDULE must be forward, backward or random, not \"%s\"\n", name);
    exit(1);
}
inline Schedule schedule = schedule_from_environment();

struct Where {  // a place in a source file
    const char* file = "";
    int line = 0;
    bool operator==(const Where& o) const { return line == o.line && file == o.file; }
};
// The last parameter of every function that waits: where it was called.
#define CUDA_CPU_WHERE ::cuda_cpu::Where where = {__builtin_FILE(), __builtin_LINE()}

// What the race checker is told; race_check.cpp has the bodies.
#ifdef CUDA_CPU_RACE
inline constexpr bool race = true;
void race_launch(bool begins);
void race_block();
void race_barrier(int block);
void race_syncwarp(int warp);
void race_send(const void* mailbox, const void* p, size_t bytes);
void race_receive(const void* mailbox);
void race_release(const void* flag);
void race_acquire(const void* flag);
void* race_malloc(size_t bytes);
void race_free(void* p, size_t bytes);
void race_initialized(void* p, size_t bytes);
#else
inline constexpr bool race = false;
inline void race_launch(bool) {}
inline void race_block() {}
inline void race_barrier(int) {}
inline void race_syncwarp(int) {}
inline void race_send(const void*, const void*, size_t) {}
inline void race_receive(const void*) {}
inline void race_release(const void*) {}
inline void race_acquire(const void*) {}
inline void* race_malloc(size_t) {
    return nullptr;
}
inline void race_free(void*, size_t) {}
inline void race_initialized(void*, size_t) {}
#endif

using CollectiveFn = void (*)(void** posts, uint32_t lanes);

struct Group {  // a warp collective under way
    uint32_t mask = 0, arrived = 0;
    CollectiveFn fn = nullptr;
};

struct Warp {
    uint32_t alive, ready, at_barrier;  // sets of lanes
    Group group[4];                     // a divergent warp may have several under way
    void* post[32];
};

struct BarrierVotes {  // of __syncthreads_or, _and, _count
    int any = 0, all = 1, count = 0;
};

inline constexpr int kMaxCluster = 8;  // blocks that run together; their threads are 1024 at most here

struct Block {  // its threads, of which those of a cluster's blocks have numbers one after another
    int alive = 0, at_barrier = 0;
    Where barrier;  // the one that at_barrier threads wait in
    BarrierVotes votes, result;
};

struct ClusterBarrier {  // a thread arrives, and may wait later
    int arrived = 0;
    bool complete = false;                            // all have arrived: it is used once in a kernel
    uint32_t has_arrived[32] = {}, waiting[32] = {};  // sets of lanes
};

struct Mailbox {  // of a block of a cluster, in its shared memory
    static constexpr int kOpened = 0x6d61696c;
    int opened, bytes_to_come;
};

struct AsyncCopies {  // cp.async copies that a check build has yet to make (mma_cpu.h)
    struct Copy {
        void* to;
        const void* from;
        int group;
    };
    std::vector<Copy> copies;
    int groups = 0;      // committed so far
    uint64_t block = 0;  // that the above belongs to
};

struct Worker {  // one for an OS thread: the block, or the cluster, that it runs
    int current = 0, num_threads = 0;
    bool straight = true;  // no thread of this block has waited yet
    int alive = 0;
    uint32_t warps_ready = 0;
    uint64_t block = 0;                  // counts the blocks and clusters that this worker has run
    int cluster = 1, block_threads = 0;  // blocks that run together, threads of each
    unsigned first_block = 0;            // blockIdx.x of the first of them
    Block blocks[kMaxCluster];
    ClusterBarrier cluster_barrier;
    std::vector<std::pair<const Mailbox*, int>> waiting_for_mail;  // and the thread

    void (*run)(void*) = nullptr;  // runs the kernel for the current thread and those that follow it straight
    void* kernel = nullptr;
    Fiber host;  // the OS thread's own stack
    Fiber* self = nullptr;
    Fiber* idle = nullptr;
    int num_fibers = 0;

    char* shared = nullptr;  // dynamic shared memory of all blocks that run together
    size_t shared_bytes = 0, block_shared_bytes = 0;
    uint64_t random = 0;

    dim3 shape{0, 0, 0};  // the block shape that `index` was filled for
    uint3 index[1024];
    Fiber* fiber[1024];
    Where where[1024];  // where each thread waits or waited last
    Warp warp[32];
    std::vector<AsyncCopies> async;

    Worker() = default;
    Worker(const Worker&) = delete;
    ~Worker();
};
inline constinit thread_local Worker* worker = nullptr;
inline Worker::~Worker() {
    worker = nullptr;
    free(shared);
    while (Fiber* f = idle) {
        idle = f->next;
        destroy_fiber(f);
    }
}

[[noreturn, gnu::noinline]] inline void fail(const char* what, Where where) {
    fprintf(stderr, "CUDA on the CPU: %s at %s:%d in block (%u,%u,%u) thread (%u,%u,%u)\n", what, where.file,
            where.line, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    abort();
}

inline int block_of(const Worker& w, int thread) {
    return w.cluster == 1 ? 0 : thread / w.block_threads;
}
inline Block& current_block() {
    return worker->blocks[block_of(*worker, worker->current)];
}

[[noreturn, gnu::noinline]] inline void fail_deadlock(Worker& w) {
    int at_barrier = 0;
    for (int b = 0; b < w.cluster; b++) at_barrier += w.blocks[b].at_barrier;
    fprintf(stderr, "CUDA on the CPU: deadlock in block (%u,%u,%u): %d live threads, %d in __syncthreads\n",
            blockIdx.x, blockIdx.y, blockIdx.z, w.alive, at_barrier);
    const auto for_cluster = [&](int t) {
        return (!w.cluster_barrier.complete && w.cluster_barrier.waiting[t / 32] >> t % 32 & 1) ||
               std::any_of(w.waiting_for_mail.begin(), w.waiting_for_mail.end(),
                           [t](const auto& waiting) { return waiting.second == t; });
    };
    int shown = 0;
    for (int t = 0; t < w.num_threads; t++) {
        const Warp& warp = w.warp[t / 32];
        if (!(warp.alive >> t % 32 & 1)) continue;
        if (++shown > 8 && t < w.num_threads - 1) continue;
        fprintf(stderr, "  thread (%u,%u,%u) waits in %s at %s:%d\n", w.index[t].x, w.index[t].y,
                w.index[t].z,
                warp.at_barrier >> t % 32 & 1 ? "__syncthreads"
                : for_cluster(t)              ? "a wait for its cluster"
                                              : "a warp collective",
                w.where[t].file, w.where[t].line);
    }
    abort();
}

// ---------------------------------------------------------------- which thread runs next

inline void enter_thread(Worker& w, int t) {
    w.current = t;
    threadIdx = w.index[t];
    if (w.cluster > 1) [[unlikely]]
        blockIdx.x = w.first_block + static_cast<unsigned>(block_of(w, t));
}

inline void set_running(Worker& w, int t) {
    Warp& warp = w.warp[t / 32];
    warp.ready &= ~(1u << t % 32);
    if (!warp.ready) w.warps_ready &= ~(1u << t / 32);
}

inline void set_ready(Worker& w, int warp, uint32_t lanes) {
    w.warp[warp].ready |= lanes;
    if (w.warp[warp].ready) w.warps_ready |= 1u << warp;
}

inline int lowest(uint32_t set) {
    return std::countr_zero(set);
}
inline int highest(uint32_t set) {
    return 31 - std::countl_zero(set);
}
inline int random_member(Worker& w, uint32_t set) {
    w.random ^= w.random << 13;  // xorshift
    w.random ^= w.random >> 7;
    w.random ^= w.random << 17;
    for (int skip = static_cast<int>((w.random >> 32) % std::popcount(set)); skip > 0; skip--) set &= set - 1;
    return lowest(set);
}

// The next thread that can run, in the order of the schedule, starting after the current one: a lane of the
// same warp if there is one, so that a warp meets soon. -1 if there is none.
inline int next_ready(Worker& w) {
    int c = w.current / 32, lane = w.current % 32;
    if (!w.warps_ready) return -1;
    uint32_t lanes = w.warp[c].ready;
    if (schedule == Schedule::forward) [[likely]] {
        if (lanes) {
            uint32_t above = lanes & (~1u << lane);
            return c * 32 + lowest(above ? above : lanes);
        }
        uint32_t above = w.warps_ready & (~1u << c);
        c = lowest(above ? above : w.warps_ready);
        return c * 32 + lowest(w.warp[c].ready);
    }
    if (schedule == Schedule::backward) {
        if (lanes) {
            uint32_t below = lanes & ((1u << lane) - 1);
            return c * 32 + highest(below ? below : lanes);
        }
        uint32_t below = w.warps_ready & ((1u << c) - 1);
        c = highest(below ? below : w.warps_ready);
        return c * 32 + highest(w.warp[c].ready);
    }
    c = random_member(w, w.warps_ready);
    return c * 32 + random_member(w, w.warp[c].ready);
}

// The thread that runs first after a barrier, whoever arrived last. Going on in order means that forward and
// backward run each pair of threads in both orders.
inline int first_after_barrier(Worker& w) {
    if (schedule == Schedule::random) return next_ready(w);
    bool forward = schedule == Schedule::forward;
    int c = forward ? lowest(w.warps_ready) : highest(w.warps_ready);
    return c * 32 + (forward ? lowest(w.warp[c].ready) : highest(w.warp[c].ready));
}
inline int first_after_collective(Worker& w, int c) {
    if (schedule == Schedule::random) return next_ready(w);
    return c * 32 + (schedule == Schedule::forward ? lowest(w.warp[c].ready) : highest(w.warp[c].ready));
}

// ---------------------------------------------------------------- waiting

// The first wait of a block: from here on there is a fiber for every thread, made when it first runs.
[[gnu::noinline]] inline void stop_running_straight(Worker& w) {
    w.straight = false;
    w.alive = 0;
    w.warps_ready = 0;
    for (int b = 0; b < w.cluster; b++) w.blocks[b].alive = 0;
    for (int c = 0; c * 32 < w.num_threads; c++) {
        uint32_t unfinished = 0;
        for (int t = c * 32; t < std::min(c * 32 + 32, w.num_threads); t++) {
            w.fiber[t] = nullptr;
            bool done = schedule == Schedule::forward    ? t < w.current
                        : schedule == Schedule::backward ? t > w.current
                                                         : false;
            if (!done) unfinished |= 1u << t % 32;
        }
        Warp& warp = w.warp[c];
        warp.alive = warp.ready = unfinished;
        warp.at_barrier = 0;
        for (Group& g : warp.group) g = Group();
        w.alive += std::popcount(unfinished);
        w.blocks[block_of(w, c * 32)].alive += std::popcount(unfinished);
        if (unfinished) w.warps_ready |= 1u << c;
    }
    set_running(w, w.current);
    w.fiber[w.current] = w.self;
}

void fiber_main();

inline Fiber* take_fiber(Worker& w) {
    if (Fiber* f = w.idle) {
        w.idle = f->next;
        return f;
    }
    return make_fiber(fiber_main, w.num_fibers++);
}
inline void put_fiber(Worker& w, Fiber* f) {
    f->next = w.idle;
    w.idle = f;
}
inline void resume(Worker& w, Fiber* from, Fiber* to) {
    w.self = to;
    switch_fiber(from, to);
}

// The current thread waits and thread `next` runs.
[[gnu::noinline]] inline void wait_while_runs(Worker& w, int next) {
    Fiber* mine = w.self;
    if (next < 0) fail_deadlock(w);
    set_running(w, next);
    if (next == w.current) return;
    Fiber*& theirs = w.fiber[next];
    if (!theirs) theirs = take_fiber(w);
    enter_thread(w, next);
    resume(w, mine, theirs);
}

inline void release_barrier(Worker& w, Block& block) {
    block.result = block.votes;
    block.votes = BarrierVotes();
    block.at_barrier = 0;
    const int b = static_cast<int>(&block - w.blocks);
    for (int t = b * w.block_threads; t < (b + 1) * w.block_threads; t += 32) {
        set_ready(w, t / 32, w.warp[t / 32].at_barrier);
        w.warp[t / 32].at_barrier = 0;
    }
    race_barrier(b);
}

[[gnu::noinline]] inline void block_barrier(Where where) {
    Worker& w = *worker;
    if (w.straight) stop_running_straight(w);
    Block& block = current_block();
    w.where[w.current] = where;
    // A GPU would let exited threads count as arrived, but which threads have exited is seldom what was
    // meant.
    if (check && block.alive != w.block_threads)
        fail("__syncthreads after some threads of the block have exited", where);
    if (check && block.at_barrier && !(block.barrier == where))
        fail("threads of a block meet in two different __syncthreads, the second", where);
    block.barrier = where;
    w.warp[w.current / 32].at_barrier |= 1u << w.current % 32;
    if (++block.at_barrier < block.alive) {
        wait_while_runs(w, next_ready(w));
    } else {
        release_barrier(w, block);
        wait_while_runs(w, first_after_barrier(w));
    }
}

inline ClusterBarrier& cluster_barrier(Where where) {
    if (worker->cluster == 1) fail("a cluster's barrier in a kernel launched without clusters", where);
    return worker->cluster_barrier;
}

[[gnu::noinline]] inline void cluster_arrive(Where where) {
    Worker& w = *worker;
    ClusterBarrier& barrier = cluster_barrier(where);
    if (w.straight) stop_running_straight(w);
    uint32_t& arrived = barrier.has_arrived[w.current / 32];
    if (arrived >> w.current % 32 & 1) fail("a thread arrives twice at the cluster's barrier", where);
    arrived |= 1u << w.current % 32;
    if (++barrier.arrived < w.num_threads) return;
    barrier.complete = true;
    for (int c = 0; c * 32 < w.num_threads; c++) set_ready(w, c, barrier.waiting[c]);
}

[[gnu::noinline]] inline void cluster_wait(Where where) {
    Worker& w = *worker;
    ClusterBarrier& barrier = cluster_barrier(where);
    if (!(barrier.has_arrived[w.current / 32] >> w.current % 32 & 1))
        fail("a thread waits at the cluster's barrier without having arrived", where);
    if (barrier.complete) return;
    w.where[w.current] = where;
    barrier.waiting[w.current / 32] |= 1u << w.current % 32;
    wait_while_runs(w, next_ready(w));
}

inline void check_opened(const Mailbox* box, Where where) {
    if (__atomic_load_n(&box->opened, __ATOMIC_RELAXED) != Mailbox::kOpened)
        fail("a mailbox that nobody has opened", where);
}
inline void open_mailbox(Mailbox* box, int bytes, Where where) {
    if (bytes <= 0) fail("a mailbox for nothing", where);
    __atomic_store_n(&box->bytes_to_come, bytes, __ATOMIC_RELAXED);
    __atomic_store_n(&box->opened, Mailbox::kOpened, __ATOMIC_RELAXED);
}

// `bytes` at p have come to the mailbox.
[[gnu::noinline]] inline void deliver(Mailbox* box, const void* p, size_t bytes, Where where) {
    Worker& w = *worker;
    if (!w.cluster_barrier.complete) fail("a block sends before all of its cluster have begun", where);
    check_opened(box, where);
    race_send(box, p, bytes);
    const int left = __atomic_sub_fetch(&box->bytes_to_come, static_cast<int>(bytes), __ATOMIC_RELAXED);
    if (left < 0) fail("more was sent to a mailbox than it was opened for", where);
    if (left > 0) return;
    for (const auto& [waited_for, thread] : w.waiting_for_mail)
        if (waited_for == box) set_ready(w, thread / 32, 1u << thread % 32);
    std::erase_if(w.waiting_for_mail, [box](const auto& waiting) { return waiting.first == box; });
}

[[gnu::noinline]] inline void wait_for_mail(Mailbox* box, Where where) {
    Worker& w = *worker;
    check_opened(box, where);
    if (__atomic_load_n(&box->bytes_to_come, __ATOMIC_RELAXED) > 0) {
        if (w.straight) stop_running_straight(w);
        w.where[w.current] = where;
        w.waiting_for_mail.push_back({box, w.current});
        wait_while_runs(w, next_ready(w));
    }
    race_receive(box);
}

inline void meet(void**, uint32_t) {}  // the whole of __syncwarp

inline void complete(Worker& w, int c, Group& g) {
    uint32_t lanes = g.arrived;
    g.mask = g.arrived = 0;
    g.fn(w.warp[c].post, lanes);
    set_ready(w, c, lanes);
    if (g.fn == meet) race_syncwarp(c);  // shuffles and votes order no memory
}

// The lanes of `mask` meet; the last to arrive runs `fn` over what all posted; then all go on.
[[gnu::noinline]] inline void collective(uint32_t mask, void* post, CollectiveFn fn, Where where) {
    Worker& w = *worker;
    if (w.straight) stop_running_straight(w);
    int c = w.current / 32, lane = w.current % 32;
    Warp& warp = w.warp[c];
    warp.post[lane] = post;
    w.where[w.current] = where;
    Group* g = warp.group;  // the one under way for this mask, or else a free one
    Group* end = warp.group + 4;
    if (g->mask != mask) {
        g = std::find_if(warp.group, end, [&](const Group& o) { return o.mask == mask; });
        if (g == end) g = std::find_if(warp.group, end, [](const Group& o) { return !o.mask; });
        if (g == end) fail("more than 4 masks under way in one warp", where);
    }
    if (check) {
        int lanes = std::min(32, w.num_threads - c * 32);
        uint32_t exited = ~warp.alive & (lanes == 32 ? ~0u : (1u << lanes) - 1);
        if (!(mask >> lane & 1)) fail("a lane calls a warp collective that its mask leaves out", where);
        if (mask & exited) fail("a warp collective names lanes that have exited", where);
        if (g->arrived && (g->fn != fn || !(w.where[c * 32 + lowest(g->arrived)] == where)))
            fail("lanes of a warp meet in two different collectives, the second", where);
    }
    g->mask = mask;
    g->fn = fn;
    g->arrived |= 1u << lane;
    if (g->arrived != (mask & warp.alive)) {
        wait_while_runs(w, next_ready(w));
    } else {
        complete(w, c, *g);
        wait_while_runs(w, first_after_collective(w, c));
    }
}

// ---------------------------------------------------------------- running

// A thread that ends leaves every set it belonged to, and so may complete what others wait for.
inline void exit_thread(Worker& w) {
    int c = w.current / 32, lane = w.current % 32;
    Warp& warp = w.warp[c];
    Block& block = current_block();
    warp.alive &= ~(1u << lane);
    w.alive--;
    block.alive--;
    for (Group& g : warp.group) {
        if (!g.arrived) continue;
        if (check && (g.mask >> lane & 1))
            fail("a thread exits while its warp waits for it in a collective",
                 w.where[c * 32 + lowest(g.arrived)]);
        if (g.arrived == (g.mask & warp.alive)) complete(w, c, g);
    }
    if (!block.at_barrier) return;
    if (check) fail("a thread exits while others wait in __syncthreads", block.barrier);
    if (block.at_barrier == block.alive) release_barrier(w, block);
}

// While no thread has waited, one fiber runs the block's threads as a plain loop.
inline bool next_straight(Worker& w) {
    if (!w.straight) return false;
    int t = schedule == Schedule::backward ? w.current - 1 : w.current + 1;
    if (t < 0 || t >= w.num_threads) return false;
    enter_thread(w, t);
    return true;
}
template <class F>
void run_threads(void* kernel) {
    F& f = *static_cast<F*>(kernel);
    Worker& w = *worker;
    do f();
    while (next_straight(w));
}

// A fiber runs one thread after another, and between blocks waits here, idle.
inline void fiber_main() {
    Worker& w = *worker;
    enter_fiber(&w.host);
    for (;;) {
        Fiber* me = w.self;
        w.run(w.kernel);
        if (!w.straight) exit_thread(w);
        if (w.straight || !w.alive) {  // the block is done
            put_fiber(w, me);
            resume(w, me, &w.host);
            continue;
        }
        int next = next_ready(w);
        if (next < 0) fail_deadlock(w);
        set_running(w, next);
        enter_thread(w, next);
        if (!w.fiber[next]) {  // not begun: this fiber takes it
            w.fiber[next] = me;
            continue;
        }
        put_fiber(w, me);
        resume(w, me, w.fiber[next]);
    }
}

// The block blockIdx, or the cluster that begins with it.
inline void run_block(Worker& w, uint64_t block_index) {
    w.block++;
    w.straight = true;
    for (int b = 0; b < w.cluster; b++) w.blocks[b] = Block();
    if (w.cluster > 1) w.cluster_barrier = ClusterBarrier(), w.waiting_for_mail.clear();
    w.first_block = blockIdx.x;
    if (check && w.shared_bytes) memset(w.shared, 0xff, w.shared_bytes);  // reads as NaN
    race_block();
    Fiber* f = take_fiber(w);
    w.self = f;
    if (schedule == Schedule::random) {
        w.random = (block_index + 1) * 0x9e3779b97f4a7c15ull;  // the same order in every run
        enter_thread(w, static_cast<int>((w.random >> 32) % w.num_threads));
        stop_running_straight(w);
    } else {
        enter_thread(w, schedule == Schedule::backward ? w.num_threads - 1 : 0);
    }
    resume(w, &w.host, f);
}

// Called where a static __shared__ variable is declared (launch.pl adds it): the first thread of a block to
// come by makes it read as NaN, not as what the last block left there. `Declaration` is a different type at
// every declaration. The race checker sees uninitialised reads itself.
template <class T, class Declaration>
inline void poison_once([[maybe_unused]] T& variable, Declaration) {
    if constexpr (check && !race) {
        if (worker->cluster > 1)
            fail("static __shared__ memory in a cluster, whose blocks would share it here", {});
        static thread_local uint64_t poisoned = 0;
        if (poisoned == worker->block) return;
        poisoned = worker->block;
        memset((void*)&variable, 0xff, sizeof(T));
    }
}
}  // namespace cuda_cpu
