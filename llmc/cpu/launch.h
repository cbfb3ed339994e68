// Kernel launches: what launch.pl turns K<<<grid, block, shared, stream>>>(args) into. A launch returns when
// the grid is done, or when it is recorded, if the stream captures.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "graphs.h"
#include "scheduler.h"
#include "symbols.h"
#include "types.h"

namespace cuda_cpu {
inline constexpr size_t kSharedLimit = 48 << 10;        // of a kernel that did not ask for more
inline constexpr size_t kSharedOptInLimit = 227 << 10;  // an H100's

struct Config {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    unsigned cluster = 1;  // blocks, along x
    Config(dim3 grid_, dim3 block_, size_t shared_ = 0, cudaStream_t stream_ = nullptr)
        : grid(grid_), block(block_), shared(shared_), stream(stream_) {}
};

// The dynamic shared memory that each kernel asked for with cudaFuncSetAttribute, by the kernel's address.
struct SharedOptIns {
    std::mutex mutex;
    std::map<const void*, size_t> bytes;
};
inline SharedOptIns shared_opt_ins;

inline size_t shared_limit(const void* kernel) {
    std::lock_guard lock(shared_opt_ins.mutex);
    auto it = shared_opt_ins.bytes.find(kernel);
    return it == shared_opt_ins.bytes.end() ? kSharedLimit : std::max(kSharedLimit, it->second);
}

struct Profile {  // time by kernel
    struct Row {
        double seconds = 0;
        long calls = 0;
    };
    bool on = getenv("CUDA_CPU_PROFILE") && strcmp(getenv("CUDA_CPU_PROFILE"), "0");
    std::mutex mutex;
    std::map<std::pair<const void*, std::string>, Row> rows;  // by address, if known, and name at the launch

    void add(const void* kernel, const char* name, double seconds) {
        std::lock_guard lock(mutex);
        Row& row = rows[{kernel, name}];
        row.seconds += seconds;
        row.calls++;
    }
    ~Profile() {
        std::vector<std::pair<std::string, Row>> sorted;
        for (const auto& [which, row] : rows) {
            const std::string name = which.first ? function_at(which.first) : "";
            sorted.emplace_back(name.empty() ? which.second : name, row);
        }
        std::sort(sorted.begin(), sorted.end(),
                  [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
        for (const auto& [kernel, row] : sorted)
            fprintf(stderr, "%10.1f ms %8ld calls  %s\n", row.seconds * 1e3, row.calls, kernel.c_str());
    }
};
inline Profile profile;

// This OS thread's worker, made ready for blocks of this shape.
inline Worker& begin_worker(const Config& config) {
    if (!worker) {
        static thread_local std::unique_ptr<Worker> owner;
        owner = std::make_unique<Worker>();
        worker = owner.get();
    }
    Worker& w = *worker;
    blockDim = config.block;
    gridDim = config.grid;
    const dim3& block = config.block;
    const int cluster = static_cast<int>(config.cluster);
    w.block_threads = static_cast<int>(block.x * block.y * block.z);
    w.num_threads = w.block_threads * cluster;
    if (w.shape.x != block.x || w.shape.y != block.y || w.shape.z != block.z || w.cluster != cluster) {
        w.shape = block;
        w.cluster = cluster;
        int t = 0;
        for (int b = 0; b < cluster; b++)
            for (unsigned z = 0; z < block.z; z++)
                for (unsigned y = 0; y < block.y; y++)
                    for (unsigned x = 0; x < block.x; x++) w.index[t++] = {x, y, z};
    }
    // Exactly as large as asked for, so that ASan sees an overrun; a cluster's blocks at multiples of 1024.
    const size_t stride = cluster == 1 ? config.shared : (config.shared + 1023) / 1024 * 1024;
    const size_t bytes = stride * static_cast<size_t>(cluster - 1) + config.shared;
    if (w.shared_bytes != bytes) {
        free(w.shared);
        void* p = nullptr;
        if (bytes && posix_memalign(&p, 1024, bytes)) {
            fprintf(stderr, "CUDA on the CPU: no memory for %zu bytes of shared memory\n", bytes);
            abort();
        }
        w.shared = static_cast<char*>(p);
        w.shared_bytes = bytes;
    }
    w.block_shared_bytes = stride;
    return w;
}

// What `extern __shared__ T name[];` becomes a pointer to.
inline void* dynamic_shared() {
    const Worker& w = *worker;
    return w.shared + static_cast<size_t>(block_of(w, w.current)) * w.block_shared_bytes;
}

// What of a launch does not depend on the kernel's type, so that it is compiled once for all kernels.
struct Grid {
    Config config;
    const char* name;
    const void* kernel;  // its address, if known

    cudaError_t error() const;
    void run(void* thread, void (*run_threads)(void*)) const;
};

[[gnu::noinline]] inline cudaError_t Grid::error() const {
    const auto& [grid, block, shared, stream, cluster] = config;
    uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
    if (!blocks || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (!threads || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024)
        return cudaErrorInvalidConfiguration;
    if (!cluster || cluster > kMaxCluster || grid.x % cluster ||
        (cluster > 1 && (threads % 32 || threads * cluster > 1024)))
        return cudaErrorInvalidConfiguration;
    if (shared > kSharedLimit && shared > (kernel ? shared_limit(kernel) : kSharedOptInLimit))
        return cudaErrorInvalidValue;
    return cudaSuccess;
}

// run_threads(thread) runs the kernel for threads of a block, one after another, as long as none has to wait.
[[gnu::noinline]] inline void Grid::run(void* thread, void (*run_threads)(void*)) const {
    const dim3 grid = config.grid;
    const unsigned clusters_x = grid.x / config.cluster;  // a cluster is run as one block here
    int64_t blocks = int64_t{clusters_x} * grid.y * grid.z;
    int64_t threads = blocks * config.cluster * config.block.x * config.block.y * config.block.z;
    // Waking the other OS threads costs microseconds: as much as a few hundred short CUDA threads.
    bool serial = race || (blocks < 8 && threads < 512);
    int workers = serial ? 1 : static_cast<int>(std::min<int64_t>(blocks, omp_get_max_threads()));
    int chunk = static_cast<int>(std::clamp<int64_t>(blocks / (workers * 16), 1, 64));
    double start = profile.on ? omp_get_wtime() : 0;
#pragma omp parallel num_threads(workers) if (workers > 1)
    {
        Worker& w = begin_worker(config);
        w.run = run_threads;
        w.kernel = thread;
        race_launch(true);  // not before: what is set up above is not the kernel's
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t b = schedule == Schedule::backward ? blocks - 1 - i : i;
            blockIdx = {static_cast<unsigned>(b % clusters_x) * config.cluster,
                        static_cast<unsigned>(b / clusters_x % grid.y),
                        static_cast<unsigned>(b / clusters_x / grid.y)};
            run_block(w, static_cast<uint64_t>(b));
        }
    }
    race_launch(false);
    if (profile.on) profile.add(kernel, name, omp_get_wtime() - start);
}

template <class Call>
struct Launch {
    Grid grid;
    Call call;  // calls the kernel for one thread

  protected:
    template <class... A>
    void run(const A&... args) const {
        if (cudaError_t error = grid.error(); error != cudaSuccess) {
            result(error);
            return;
        }
        submit(grid.config.stream, [launch = *this, ... copies = args] {
            // Of a graph's launch once more: the shared memory that the kernel may have can be less by now.
            if (cudaError_t error = launch.grid.error(); error != cudaSuccess) {
                result(error);
                return;
            }
            auto thread = [&] { launch.call(copies...); };
            launch.grid.run(&thread, run_threads<decltype(thread)>);
        });
    }
};

// Arguments are converted to the kernel's parameters once, as a GPU launch does.
template <class Call, class... P>
struct TypedLaunch : Launch<Call> {
    void operator()(P... args) const { this->run(args...); }

    // Fewer arguments: the kernel has default ones.
    template <class... A, std::enable_if_t<(sizeof...(A) < sizeof...(P)), int> = 0>
    void operator()(A... args) const {
        this->run(args...);
    }
};

// Of a kernel template whose arguments the call deduces, neither the parameters nor the address are known.
template <class Call>
struct UntypedLaunch : Launch<Call> {
    template <class... A>
    void operator()(A... args) const {
        this->run(args...);
    }
};

template <class Call>
struct MakeTypedLaunch {
    Config config;
    const char* name;
    Call call;
    template <class... P>
    TypedLaunch<Call, P...> operator()(void (*kernel)(P...)) const {
        return {{{config, name, reinterpret_cast<const void*>(kernel)}, call}};
    }
};

// `give_kernel` calls what it is given with the kernel as the argument, which does not compile for a template
// whose arguments are not known.
template <class GiveKernel, class Call>
auto launch(Config config, const char* name, GiveKernel give_kernel, Call call) {
    MakeTypedLaunch<Call> typed{config, name, call};
    if constexpr (requires { give_kernel(typed); })
        return give_kernel(typed);
    else
        return UntypedLaunch<Call>{{{config, name, nullptr}, call}};
}
}  // namespace cuda_cpu

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
template <class... A>
cudaError_t cudaFuncSetAttribute(void (*kernel)(A...), cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > cuda_cpu::kSharedOptInLimit)
        return cuda_cpu::result(cudaErrorInvalidValue);
    std::lock_guard lock(cuda_cpu::shared_opt_ins.mutex);
    cuda_cpu::shared_opt_ins.bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    return cudaSuccess;
}

struct cudaFuncAttributes {
    int maxDynamicSharedSizeBytes;
};
template <class... A>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(A...)) {
    const size_t limit = cuda_cpu::shared_limit(reinterpret_cast<const void*>(kernel));
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(limit);
    return cudaSuccess;
}

// ---------------------------------------------------------------- launches with attributes

enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6,  // no effect: here a grid ends before the next
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        uint3 clusterDim;
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(P...), A&&... args) {
    cuda_cpu::Config config(launch->gridDim, launch->blockDim, launch->dynamicSmemBytes, launch->stream);
    for (unsigned i = 0; i < launch->numAttrs; i++) {
        const cudaLaunchAttribute& attribute = launch->attrs[i];
        if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
        const uint3& cluster = attribute.val.clusterDim;
        if (cluster.y != 1 || cluster.z != 1) return cuda_cpu::result(cudaErrorInvalidConfiguration);
        config.cluster = cluster.x;
    }
    const auto call = [kernel](P... copies) { kernel(copies...); };
    const cudaError_t before = std::exchange(cuda_cpu::last_error, cudaSuccess);
    cuda_cpu::TypedLaunch<std::remove_const_t<decltype(call)>, P...>{
        {{config, "a launch with attributes", reinterpret_cast<const void*>(kernel)}, call}}(
        static_cast<P>(args)...);
    const cudaError_t error = cuda_cpu::last_error;  // of this launch
    if (error == cudaSuccess) cuda_cpu::last_error = before;
    return error;
}
