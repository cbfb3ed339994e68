// How many threads the host's code and the CPU backend use: OpenMP takes one for each processor that it may
// run on, and does not know that a container may use only as much time as so many processors have (docker run
// --cpus 2). Threads beyond that make each other wait: all stand still until the next period begins, 100 ms
// say, once they have used up their share.
#pragma once
#include <string>

// Processors' worth of time that the control groups of this process leave it, rounded up; 0: no limit is
// known. `mounted` is where they are mounted, and `groups` the file that names those of this process; the
// kernel's cgroup-v2.rst and sched-bwc.rst describe both.
int cpu_quota(const std::string& mounted = "/sys/fs/cgroup", const std::string& groups = "/proc/self/cgroup");

// No more OpenMP threads than that, unless OMP_NUM_THREADS says how many. And as many as are announced: where
// OMP_THREAD_LIMIT, OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS would have parallel regions begin with fewer,
// OpenBLAS waits for the others for ever.
void limit_threads();
