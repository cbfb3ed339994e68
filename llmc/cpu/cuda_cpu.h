// CUDA on the CPU: lets g++ compile CUDA C++ and run its kernels, so that the same kernel source is tested,
// sanitized and used on machines without a GPU. cpu_nvcc includes this file ahead of every source
// and has launch.pl rewrite the syntax that is not C++'s, such as K<<<...>>>(...).
//
// Blocks run in parallel over OpenMP threads. The threads of one block, or of a cluster's blocks, are fibers
// of one OS thread, switched only where they must wait: __syncthreads, the warp collectives, a cluster's
// barrier.
//
//   types.h       dim3, float4, threadIdx, ...         intrinsics.h  atomics, cache hints, fast maths
//   fibers.h      stacks and the switch between them   bf16.h        __nv_bfloat16
//   scheduler.h   runs one block                       runtime.h     cudaMalloc, events, the device, ...
//   launch.h      runs a grid                          graphs.h      streams, captures and graphs
//   warp.h        barriers, shuffles, votes            mma_cpu.h     tensor-core and cp.async wrappers
//   fp8.h         FP8 and its conversions              denormals.h   are zeros
//   race_check.cpp  the race checker
//
// Environment: CUDA_CPU_SCHEDULE=forward|backward|random  the order of threads (scheduler.h)
//              CUDA_CPU_PROFILE=1                         time by kernel, printed at exit (launch.h)
// Macros:      CUDA_CPU_CHECK  stops at misused barriers and collectives; memory nobody wrote reads as NaN
//              CUDA_CPU_RACE   the same, for objects compiled with -fsanitize=thread and linked with
//                              race_check.o in place of the sanitizer's library
//
// Not seen here: registers, bank conflicts, static shared memory in the 48 KB, the PTX of the real wrappers.
// A kernel that spins on a flag of a block that has not started never ends. The order of float atomics
// varies.
#pragma once

#define CUDA_CPU 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// What launch.pl puts in the place of __shared__. Without constinit, g++ asks at every use of an array of
// __nv_bfloat16 whether it is initialized.
#pragma cuda_cpu_shared static constinit thread_local

#include "bf16.h"
#include "denormals.h"
#include "fibers.h"
#include "fp8.h"
#include "graphs.h"
#include "intrinsics.h"
#include "launch.h"
#include "runtime.h"
#include "scheduler.h"
#include "types.h"
#include "warp.h"
