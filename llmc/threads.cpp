#include "threads.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <optional>

// The limit of one group, in processors; none if it has none, or is not there.
static std::optional<double> quota_of_group(const std::string& folder, bool version2) {
    std::string quota;  // "max" in version 2, -1 in version 1: none
    double period = 0;  // both in microseconds
    if (version2) {
        std::ifstream(folder + "/cpu.max") >> quota >> period;
    } else {
        std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(folder + "/cpu.cfs_period_us") >> period;
    }
    const double time = atof(quota.c_str());
    if (time > 0 && period > 0) return time / period;
    return std::nullopt;
}

int cpu_quota(const std::string& mounted, const std::string& groups) {
    std::optional<double> least;
    std::ifstream file(groups);
    for (std::string line; std::getline(file, line);) {
        // "0::/a/b" is the group of version 2, "4:cpu,cpuacct:/a/b" that of version 1
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        const bool version2 = controllers == ",,";
        if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
        // Every group above has a limit of its own, up to the one that is mounted, which in a container is
        // the container's, while the path may be the host's.
        const std::string root = mounted + (version2 ? "" : "/cpu");
        for (std::string path = line.substr(second + 1) + "/"; path.find('/') != std::string::npos;) {
            path.resize(path.rfind('/'));
            if (const auto quota = quota_of_group(root + path, version2))
                least = std::min(least.value_or(*quota), *quota);
        }
    }
    return least ? (int)std::ceil(*least) : 0;
}

void limit_threads() {
    omp_set_dynamic(0);
    omp_set_max_active_levels(std::max(1, omp_get_max_active_levels()));
    int threads = std::min(omp_get_max_threads(), omp_get_thread_limit());
    const int quota = getenv("OMP_NUM_THREADS") ? 0 : cpu_quota();
    if (quota > 0) threads = std::min(threads, quota);
    omp_set_num_threads(threads);
}
