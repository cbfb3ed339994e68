// Denormals, the floats below 2^-126, count as zeros on x86-64: an operation with one takes it a hundred
// cycles and more, in OpenBLAS as well, where a GPU does not care. A model with condensed attention has many,
// in the probabilities of keys far from the largest and in all gradients that pass there: 300 updates of tiny
// with -l 1 --lambda-warmup 30 took 43 s with them, and take 26. (What is lost is no part of a sum with any
// normal float of usual size in it.) With CUDA_CPU_DENORMALS they stay.
#pragma once

#if defined(__x86_64__) && !defined(CUDA_CPU_DENORMALS)
#include <xmmintrin.h>

// A thread begins with the setting of the one that makes it, so this is to be done before any library makes
// its own: what is named in .preinit_array is.
static void take_denormals_for_zeros() {
    constexpr unsigned kFlushResults = 0x8000, kIgnoreOperands = 0x0040;  // of the MXCSR
    _mm_setcsr(_mm_getcsr() | kFlushResults | kIgnoreOperands);
}
__attribute__((section(".preinit_array"),
               used)) static void (*const before_threads)() = take_denormals_for_zeros;
#endif
