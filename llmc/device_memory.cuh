// One allocation cut into tensors; copies between host and device that the host waits for, and the buffers of
// those that it does not.
#pragma once
#include <string>
#include <vector>

#include "cuda_common.cuh"
#include "metrics.h"

// Hands out pieces of one allocation. Everything is laid out twice: first without memory, to learn the size.
struct Arena {
    char* base = nullptr;
    size_t used = 0;

    template <class T>
    T* take(size_t n) {
        used = ceil_div(used, size_t{256}) * 256;
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += n * sizeof(T);
        return piece;
    }
};

// Device memory that is cut up by `layout(Arena&)`, which runs twice. Where the device has no room for it, an
// Error says so, with what it is for and what to do.
class DeviceMemory {
  public:
    const size_t bytes;

    template <class Layout>
    DeviceMemory(const Context& ctx, const char* what, const std::string& remedy, Layout layout)
        : bytes(size_of(layout)) {
        size_t free_bytes = 0, total_bytes = 0;
        CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
        if (bytes > free_bytes || cudaMalloc(&memory_, bytes) != cudaSuccess)
            fail("%s has no room for %s (%s, and %s is free): %s", ctx.device_name.c_str(), what,
                 pretty_bytes((double)bytes).c_str(), pretty_bytes((double)free_bytes).c_str(),
                 remedy.c_str());
        Arena arena{.base = static_cast<char*>(memory_), .used = 0};
        layout(arena);
    }
    DeviceMemory(const DeviceMemory&) = delete;
    ~DeviceMemory() { cudaFree(memory_); }

    template <class Layout>
    static size_t size_of(Layout layout) {
        Arena arena;
        layout(arena);
        return arena.used;
    }
    void zero() const { CUDA_CHECK(cudaMemset(memory_, 0, bytes)); }

  private:
    void* memory_ = nullptr;
};

// Two buffers of n T each that the device reads and writes by itself, taken in turns: while one is under way
// the host has the other. Buffer i is that of i - 2.
template <class T>
class BufferPair {
  public:
    explicit BufferPair(size_t n) {
        for (int i = 0; i < 2; i++) {
            CUDA_CHECK(cudaMallocHost(&buffer_[i], n * sizeof(T)));
            CUDA_CHECK(cudaEventCreateWithFlags(&done_[i], cudaEventDisableTiming));
        }
    }
    BufferPair(const BufferPair&) = delete;
    ~BufferPair() {
        for (int i = 0; i < 2; i++) {
            cudaFreeHost(buffer_[i]);
            cudaEventDestroy(done_[i]);
        }
    }

    T* operator[](int64_t i) const { return buffer_[i % 2]; }
    // The copies from or to buffer i have been launched.
    void launched(const Context& ctx, int64_t i) { CUDA_CHECK(cudaEventRecord(done_[i % 2], ctx.stream)); }
    // Waits until they are done; at once where there were none.
    void wait(int64_t i) const { CUDA_CHECK(cudaEventSynchronize(done_[i % 2])); }

  private:
    T* buffer_[2];
    cudaEvent_t done_[2];
};

template <class T>
void to_device(T* device, const T* host, size_t n) {
    CUDA_CHECK(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
}
// Rounded to Float on the way.
template <class Float>
void to_device_as(Float* device, const std::vector<float>& host) {
    if constexpr (sizeof(Float) == sizeof(float)) {
        to_device(device, host.data(), host.size());
    } else {
        const std::vector<Float> rounded(host.begin(), host.end());
        to_device(device, rounded.data(), rounded.size());
    }
}
template <class T>
std::vector<T> to_host(const Context& ctx, const T* device, size_t n) {
    std::vector<T> host(n);
    CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
    CUDA_CHECK(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}
