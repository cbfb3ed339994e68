// One allocation cut into tensors, and copies between host and device that the host waits for.
#pragma once
#include <vector>

#include "cuda_common.cuh"

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

template <class T>
void to_device(T* device, const T* host, size_t n) {
    CUDA_CHECK(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
}
template <class T>
std::vector<T> to_host(const Context& ctx, const T* device, size_t n) {
    std::vector<T> host(n);
    CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
    CUDA_CHECK(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}
