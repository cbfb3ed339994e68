// What the CPU backend uses of OpenBLAS, which multiplies its matrices.
#pragma once
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../error.h"

// Declared here, not by cblas.h, whose place differs between distributions.
extern "C" void cblas_sgemm(int order, int transa, int transb, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
inline constexpr int kColumnMajor = 102, kNoTranspose = 111;  // its order and transa, transb; 112: transposed
extern "C" char* openblas_get_corename();

// Which of its kernels OpenBLAS should take in place of those for `core`; "" where these will do. It knows
// processors by their numbers, and for one that came out after it takes kernels that use SSE alone, whatever
// the processor can do.
inline std::string better_openblas_core(const std::string& core, bool avx2, bool avx512) {
    for (const char* without_avx2 : {"Prescott", "Core2", "Nehalem", "Barcelona", "Sandybridge"})
        if (core == without_avx2) return avx512 ? "SkylakeX" : avx2 ? "Haswell" : "";
    return "";
}

// Has this program, started again, use OpenBLAS's kernels for the processor at hand. False if it does
// already, or if the user has chosen: OPENBLAS_CORETYPE is read before main().
inline bool choose_openblas_core() {
#ifdef __x86_64__
    if (getenv("OPENBLAS_CORETYPE")) return false;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const std::string better = better_openblas_core(openblas_get_corename(), avx2, avx512);
    return !better.empty() && setenv("OPENBLAS_CORETYPE", better.c_str(), 0) == 0;
#else
    return false;
#endif
}

// OpenBLAS works in buffers of 128 MB of address space each, and where it is refused one, as by ulimit -v, it
// asks again for ever. It takes two before main(), and one for each thread but the first, or one, with the
// first product.
inline constexpr size_t kOpenblasBuffer = 128 << 20;
inline constexpr char kNoOpenblasBuffer[] =
    "OpenBLAS needs more address space than there is: raise the limit (ulimit -v), or use fewer threads "
    "(OMP_NUM_THREADS)";

// Whether there is room for so many, beside 8 MB for what else is taken meanwhile. Each is asked for by
// itself and as OpenBLAS does: a system may refuse the sum at once.
inline bool has_openblas_buffers(int buffers) {
    const size_t bytes = buffers > 0 ? kOpenblasBuffer : 8 << 20;
    void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return false;
    const bool others = buffers == 0 || has_openblas_buffers(buffers - 1);
    munmap(room, bytes);
    return others;
}

// The first two: what is named in .preinit_array runs before any library's own beginning.
static void check_openblas_begins() {
    if (has_openblas_buffers(2)) return;
    for (const char* text : {"error: ", kNoOpenblasBuffer, "\n"})
        if (write(STDERR_FILENO, text, strlen(text)) < 0) break;
    _exit(1);
}
__attribute__((section(".preinit_array"),
               used)) static void (*const before_libraries)() = check_openblas_begins;

// The others, while there is nothing else yet to need the room.
inline void take_openblas_buffers() {
    if (!has_openblas_buffers(std::max(1, omp_get_max_threads() - 1))) fail("%s", kNoOpenblasBuffer);
    constexpr int n = 128;  // small products go without a buffer
    const std::vector<float> ones(n * n, 1.0f);
    std::vector<float> product(n * n);
    cblas_sgemm(kColumnMajor, kNoTranspose, kNoTranspose, n, n, n, 1.0f, ones.data(), n, ones.data(), n, 0.0f,
                product.data(), n);
}
