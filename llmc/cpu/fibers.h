// Fibers: stacks that one OS thread switches between, by saving the registers that a call preserves and
// loading another stack's. Every wait of a CUDA thread is one switch, so its cost is what emulated barriers
// and shuffles cost: 10-14 ns with 1024 fibers, against 17-22 for boost.context and 540 for swapcontext,
// which makes a system call.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

#if defined(__has_feature)  // clang says so in its own way
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
#endif

// Saves the running fiber's registers on its stack, its stack pointer in *save, and goes on at `load`.
extern "C" void cuda_cpu_switch(void** save, void* load);

// Weak, because every file that includes this header defines it. On x86-64 it ends in a jump: the processor
// predicts that a "ret" goes back to the caller, which a switch never does, and each misprediction then waits
// for a load from a cold stack (46-63 ns with 1024 fibers, against 10-14). On aarch64 with branch target
// identification, which Ubuntu's g++ asks for, a jump to behind a call is an illegal instruction.
#if defined(__x86_64__)
asm(R"(
    .pushsection .text
    .weak cuda_cpu_switch
    .type cuda_cpu_switch, @function
cuda_cpu_switch:
    leaq -48(%rsp), %rsp
    movq %rbp, (%rsp)
    movq %rbx, 8(%rsp)
    movq %r12, 16(%rsp)
    movq %r13, 24(%rsp)
    movq %r14, 32(%rsp)
    movq %r15, 40(%rsp)
    movq %rsp, (%rdi)
    movq (%rsi), %rbp
    movq 8(%rsi), %rbx
    movq 16(%rsi), %r12
    movq 24(%rsi), %r13
    movq 32(%rsi), %r14
    movq 40(%rsi), %r15
    movq 48(%rsi), %rax
    leaq 56(%rsi), %rsp
    jmpq *%rax
    .size cuda_cpu_switch, .-cuda_cpu_switch
    .popsection
)");
#elif defined(__aarch64__)
asm(R"(
    .pushsection .text
    .weak cuda_cpu_switch
    .type cuda_cpu_switch, %function
cuda_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_cpu_switch, .-cuda_cpu_switch
    .popsection
)");
#else
#error "CUDA on the CPU: cuda_cpu_switch is written for x86-64 and aarch64 only"
#endif

namespace cuda_cpu {
#if defined(CUDA_CPU_CHECK) || defined(CUDA_CPU_RACE)
inline constexpr bool check = true;
#else
inline constexpr bool check = false;
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(CUDA_CPU_RACE)
inline constexpr size_t kStackBytes = 256 << 10;  // sanitizers widen every frame
#else
inline constexpr size_t kStackBytes = 64 << 10;
#endif

struct Fiber {
    void* sp = nullptr;     // while it does not run
    char* stack = nullptr;  // its lowest byte; the first fiber of an OS thread is that thread's own stack
    size_t size = 0;
    Fiber* next = nullptr;            // in the list of idle fibers
    void* sanitizer_state = nullptr;  // ASan's record of this stack while another runs
};

// Lets `to` run until something switches back to `from`.
inline void switch_fiber(Fiber* from, Fiber* to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->sanitizer_state, to->stack, to->size);
#endif
    cuda_cpu_switch(&from->sp, to->sp);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->sanitizer_state, nullptr, nullptr);
#endif
}

// The first thing that a new fiber does. `host` learns where the OS thread's own stack lies.
inline void enter_fiber([[maybe_unused]] Fiber* host) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (host->stack) return;
    host->stack = static_cast<char*>(const_cast<void*>(bottom));
    host->size = size;
#endif
}

// A fiber that will run `entry`, which must not return. `index` counts the fibers of one OS thread.
inline Fiber* make_fiber(void (*entry)(), int index) {
    static std::atomic<int> guards{0};
    Fiber* f = new Fiber;
    f->size = kStackBytes;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
        fflush(stdout);
        fputs(
            "error: there is not enough memory for the stacks of CUDA threads: raise the limit (ulimit -v), or set OMP_NUM_THREADS lower\n",
            stderr);
        _exit(1);
    }
    f->stack = static_cast<char*>(stack);
    // An overrun stops at the lowest page. Each such page splits a mapping in two, and Linux allows a process
    // 65530 mappings, so on machines with very many cores the last fibers go without.
    if (check && guards++ < 16384) mprotect(stack, 4096, PROT_NONE);
    // Stacks that all start at the same offset in a page would share a few sets of the cache: spread them.
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes - (index % 61) * 64) & ~uintptr_t{63};
#if defined(__x86_64__)
    constexpr int words = 8, entry_word = 6;  // the registers, the entry, the null that ends a backtrace
#else
    constexpr int words = 20, entry_word = 11;  // x30, the link register, is the twelfth
#endif
    void** frame = reinterpret_cast<void**>(top) - words;
    memset(frame, 0, words * sizeof(void*));
    frame[entry_word] = reinterpret_cast<void*>(entry);
    f->sp = frame;
    return f;
}

inline void destroy_fiber(Fiber* f) {
    munmap(f->stack, f->size);
    delete f;
}
}  // namespace cuda_cpu
