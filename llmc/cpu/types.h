// CUDA's built-in types and variables, and its error codes. Sizes and alignments are CUDA's, so that a
// misaligned vector access is an error under UBSan as it is on a GPU.
#pragma once

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

#define CUDA_CPU_VECTOR2(T, NAME)             \
    struct alignas(2 * sizeof(T)) NAME##2 {   \
        T x, y;                               \
    };                                        \
    inline NAME##2 make_##NAME##2(T x, T y) { \
        return {x, y};                        \
    }
#define CUDA_CPU_VECTOR4(T, NAME)                                     \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { \
        T x, y, z, w;                                                 \
    };                                                                \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) {               \
        return {x, y, z, w};                                          \
    }
CUDA_CPU_VECTOR2(unsigned char, uchar)
CUDA_CPU_VECTOR4(unsigned char, uchar)
CUDA_CPU_VECTOR2(unsigned short, ushort)
CUDA_CPU_VECTOR4(unsigned short, ushort)
CUDA_CPU_VECTOR2(int, int)
CUDA_CPU_VECTOR4(int, int)
CUDA_CPU_VECTOR2(unsigned, uint)
CUDA_CPU_VECTOR4(unsigned, uint)
CUDA_CPU_VECTOR2(float, float)
CUDA_CPU_VECTOR4(float, float)
CUDA_CPU_VECTOR2(double, double)
CUDA_CPU_VECTOR2(long long, longlong)
CUDA_CPU_VECTOR2(unsigned long long, ulonglong)

// constinit: without it every use in another file would first ask whether the variable is initialized.
inline constinit thread_local uint3 threadIdx{0, 0, 0};
inline constinit thread_local uint3 blockIdx{0, 0, 0};
inline constinit thread_local dim3 blockDim{1, 1, 1};
inline constinit thread_local dim3 gridDim{1, 1, 1};
inline constexpr int warpSize = 32;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorIllegalState = 401,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorCapturedEvent = 907,
    cudaErrorStreamCaptureWrongThread = 908,
};
typedef cudaError_t cudaError;
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

namespace cuda_cpu {
template <class T>
struct NotDeduced {
    using type = T;
};
template <class T>  // for a parameter that converts to the T of another
using Same = typename NotDeduced<T>::type;

inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t error) {  // what a runtime call returns: cudaGetLastError sees it too
    if (error != cudaSuccess) last_error = error;
    return error;
}
}  // namespace cuda_cpu
