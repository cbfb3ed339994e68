// The runtime API: memory, events, the device. Everything is synchronous: when a call returns, its work is
// done (or recorded, if it is for a stream that captures: graphs.h). "Device memory" is what this process may
// still have of the machine's memory.
#pragma once
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "graphs.h"
#include "launch.h"
#include "scheduler.h"
#include "types.h"

#define CUDART_VERSION 12000

// ---------------------------------------------------------------- errors

namespace cuda_cpu {
struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
inline constexpr ErrorText kErrorTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
};
inline const ErrorText& error_text(cudaError_t error) {
    static constexpr ErrorText unknown = {cudaSuccess, "unrecognized error code", "unrecognized error code"};
    for (const ErrorText& e : kErrorTexts)
        if (e.error == error) return e;
    return unknown;
}
}  // namespace cuda_cpu

inline const char* cudaGetErrorName(cudaError_t error) {
    return cuda_cpu::error_text(error).name;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return cuda_cpu::error_text(error).text;
}
inline cudaError_t cudaPeekAtLastError() {
    return cuda_cpu::last_error;
}
inline cudaError_t cudaGetLastError() {
    return std::exchange(cuda_cpu::last_error, cudaSuccess);
}

// ---------------------------------------------------------------- memory

namespace cuda_cpu {
// The number that follows `key` in a file of the kernel's, or, without a key, that it begins with.
inline bool read_number(const std::string& path, const std::string& key, size_t& value) {
    std::ifstream in(path);
    for (std::string word; in >> word;) {
        if (key.empty()) {
            char* end;
            value = strtoull(word.c_str(), &end, 10);
            return !*end;  // "max" means no limit
        }
        if (word == key) return static_cast<bool>(in >> value);
    }
    return false;
}

// What is left under the limits of one memory control group. Its cached files count as used, but the kernel
// gives them up before it runs out.
inline size_t cgroup_available(const std::string& dir, bool version2) {
    size_t limit, used, cached = 0;
    if (!read_number(dir + (version2 ? "/memory.max" : "/memory.limit_in_bytes"), "", limit)) return SIZE_MAX;
    if (!read_number(dir + (version2 ? "/memory.current" : "/memory.usage_in_bytes"), "", used))
        return SIZE_MAX;
    read_number(dir + "/memory.stat", version2 ? "inactive_file" : "total_inactive_file", cached);
    used -= std::min(used, cached);
    return limit - std::min(limit, used);
}

// How much memory this process can still get before the kernel kills something.
inline size_t memory_available() {
    size_t available = SIZE_MAX, kilobytes;
    if (read_number("/proc/meminfo", "MemAvailable:", kilobytes)) available = kilobytes * 1024;

    std::ifstream groups(
        "/proc/self/cgroup");  // lines of id:controllers:path; version 2 names no controllers
    for (std::string line; std::getline(groups, line);) {
        size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        bool version2 = controllers.empty();
        if (!version2 && controllers != "memory") continue;
        std::string root = version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
        for (;;) {  // this group, then those around it: in a container only the root may be visible
            available = std::min(available, cgroup_available(root + path, version2));
            if (path.empty()) break;
            path.resize(path.rfind('/'));
        }
    }

    rlimit address_space;
    size_t pages;
    if (!getrlimit(RLIMIT_AS, &address_space) && address_space.rlim_cur != RLIM_INFINITY &&
        read_number("/proc/self/statm", "", pages)) {
        size_t used = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
        available = std::min<size_t>(available,
                                     address_space.rlim_cur - std::min<size_t>(address_space.rlim_cur, used));
    }
    return available;
}

// Linux hands out more memory than there is and kills a process once it is used, so the sum is kept here.
struct Allocations {
    std::mutex mutex;
    std::unordered_map<void*, size_t> bytes;
    size_t total = 0;
    size_t available_at_start = memory_available();

    size_t not_handed_out() const { return available_at_start - std::min(available_at_start, total); }
    size_t available() const { return std::min(memory_available(), not_handed_out()); }
    bool fits(size_t bytes_wanted) const {  // memory_available takes 100 us: not for every small request
        return bytes_wanted <= (bytes_wanted < 1 << 20 ? not_handed_out() : available());
    }
};
inline Allocations& allocations() {
    static Allocations* a = new Allocations;  // never destroyed: static destructors may still call cudaFree
    return *a;
}

inline cudaError_t allocate(void** p, size_t bytes, bool device) {
    *p = nullptr;
    if (cudaError_t error = use_unsafe_call(); error != cudaSuccess) return error;
    if (!bytes) return cudaSuccess;
    Allocations& a = allocations();
    std::lock_guard lock(a.mutex);
    if (!a.fits(bytes)) return result(cudaErrorMemoryAllocation);
    if (race && device)
        *p = race_malloc(bytes);
    else if (posix_memalign(p, 256, bytes))
        *p = nullptr;
    if (!*p) return result(cudaErrorMemoryAllocation);
    a.bytes[*p] = bytes;
    a.total += bytes;
    if (check && !race && device) memset(*p, 0xff, bytes);  // reads as NaN
    return cudaSuccess;
}

inline cudaError_t release(void* p, bool device) {
    if (!p) return cudaSuccess;
    if (cudaError_t error = use_unsafe_call(); error != cudaSuccess) return error;
    Allocations& a = allocations();
    std::lock_guard lock(a.mutex);
    auto it = a.bytes.find(p);
    if (it == a.bytes.end()) return result(cudaErrorInvalidValue);
    if (race && device)
        race_free(p, it->second);
    else
        free(p);
    a.total -= it->second;
    a.bytes.erase(it);
    return cudaSuccess;
}
}  // namespace cuda_cpu

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum {
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1,
    cudaHostAllocMapped = 2,
    cudaHostAllocWriteCombined = 4
};

template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cuda_cpu::allocate(reinterpret_cast<void**>(p), bytes, true);
}
inline cudaError_t cudaFree(void* p) {
    return cuda_cpu::release(p, true);
}
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) {
    return cuda_cpu::allocate(reinterpret_cast<void**>(p), bytes, false);
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned flags = 0) {
    return cudaHostAlloc(p, bytes, flags);
}
inline cudaError_t cudaFreeHost(void* p) {
    return cuda_cpu::release(p, false);
}
inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    cuda_cpu::Allocations& a = cuda_cpu::allocations();
    std::lock_guard lock(a.mutex);
    *available = a.available();
    *total = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream = nullptr) {
    return cuda_cpu::submit(stream, [=] {
        if (bytes) memmove(to, from, bytes);
        cuda_cpu::race_initialized(to, bytes);
    });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr) {
    return cuda_cpu::submit(stream, [=] {
        if (bytes) memset(p, value, bytes);
        cuda_cpu::race_initialized(p, bytes);
    });
}
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    return cudaMemsetAsync(p, value, bytes);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
    if (offset + bytes > sizeof(T)) return cuda_cpu::result(cudaErrorInvalidValue);
    return cudaMemcpy(reinterpret_cast<char*>(&symbol) + offset, from, bytes, kind);
}

// ---------------------------------------------------------------- events

struct CUevent_st {
    std::chrono::steady_clock::time_point time;
    bool recorded = false;
    bool captured = false;  // recorded last in a capture: there is no time when it happens
};
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new CUevent_st;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return cudaEventCreate(event);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
// In a capture, an event only marks a place that other streams may wait for: a replay does not record it.
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    const bool captured = cuda_cpu::is_capturing(stream);
    event->captured = captured;
    return cuda_cpu::submit(stream, [event, captured] {
        if (captured) return;
        event->time = std::chrono::steady_clock::now();
        event->recorded = true;
    });
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!event->captured) return cuda_cpu::use_unsafe_call();
    cuda_cpu::refuse(cudaErrorCapturedEvent, cuda_cpu::any_stream);
    return cuda_cpu::result(cudaErrorCapturedEvent);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return cudaEventQuery(event);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    if (event->captured == cuda_cpu::is_capturing(stream)) return cuda_cpu::submit(stream, [] {});
    cuda_cpu::refuse(cudaErrorStreamCaptureIsolation, cuda_cpu::any_stream);
    return cuda_cpu::result(event->captured ? cudaErrorStreamCaptureUnsupported
                                            : cudaErrorStreamCaptureIsolation);
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (!begin->recorded || !end->recorded) return cuda_cpu::result(cudaErrorInvalidValue);
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
    return cudaSuccess;
}

// ---------------------------------------------------------------- the device

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, multiProcessorCount;
    int major, minor, l2CacheSize, memoryBusWidth, integrated;
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device ? cuda_cpu::result(cudaErrorInvalidDevice) : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cuda_cpu::refuse(cudaErrorStreamCaptureUnsupported, cuda_cpu::any_stream);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;  // what CUDA says where there is no driver
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

// An OpenMP thread is a multiprocessor that runs one block at a time. Compute capability 8.0: what the
// wrappers in mma_cpu.h need.
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int device) {
    if (device) return cuda_cpu::result(cudaErrorInvalidDevice);
    *prop = {};
    std::string model = "CPU";
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);) {
        size_t colon = line.find(": ");
        if (!line.starts_with("model name") || colon == std::string::npos) continue;
        model = line.substr(colon + 2);
        break;
    }
    prop->multiProcessorCount = omp_get_max_threads();
    snprintf(prop->name, sizeof prop->name, "%.200s (%d threads)", model.c_str(), prop->multiProcessorCount);
    size_t available;
    cudaMemGetInfo(&available, &prop->totalGlobalMem);
    prop->sharedMemPerBlock = cuda_cpu::kSharedLimit;
    prop->sharedMemPerBlockOptin = cuda_cpu::kSharedOptInLimit;
    prop->sharedMemPerMultiprocessor = cuda_cpu::kSharedOptInLimit + 1024;
    prop->regsPerBlock = 65536;
    prop->warpSize = warpSize;
    prop->maxThreadsPerBlock = prop->maxThreadsPerMultiProcessor = 1024;
    prop->major = 8;
    prop->l2CacheSize = static_cast<int>(std::clamp<long>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0, INT32_MAX));
    prop->integrated = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp prop;
    if (cudaError_t error = cudaGetDeviceProperties(&prop, device); error != cudaSuccess) return error;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = prop.maxThreadsPerBlock;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = static_cast<int>(prop.sharedMemPerBlock);
            break;
        case cudaDevAttrWarpSize:
            *value = prop.warpSize;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = prop.multiProcessorCount;
            break;
        case cudaDevAttrL2CacheSize:
            *value = prop.l2CacheSize;
            break;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = prop.maxThreadsPerMultiProcessor;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = prop.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = prop.minor;
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = static_cast<int>(prop.sharedMemPerMultiprocessor);
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(prop.sharedMemPerBlockOptin);
            break;
        default:
            return cuda_cpu::result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
