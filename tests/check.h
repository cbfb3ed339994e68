// What the kernel tests share: arrays on the device, seeded random numbers, and the two ways to compare.
#pragma once
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../llmc/cuda_common.cuh"

// Sanitizers, the race checker and other orders of threads are there for what is accessed when, for which
// fewer cases, rows and draws do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kInstrumented = true;
#else
inline constexpr bool kInstrumented = false;
#endif
inline const bool kFewer = kInstrumented || getenv("CUDA_CPU_SCHEDULE");

// n elements on the device, with guard bands on both sides so that an overrun by a pack is seen.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t n) : n_(n) {
        CUDA_CHECK(cudaMalloc(&base_, (n + 2 * kGuard) * sizeof(T)));
        CUDA_CHECK(cudaMemset(base_, kGuardByte, (n + 2 * kGuard) * sizeof(T)));
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { set(values); }
    DeviceArray(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(base_); }

    operator T*() { return base_ + kGuard; }
    void set(const std::vector<T>& values) {
        CUDA_CHECK(cudaMemcpy(base_ + kGuard, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() {
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<T> all(n_ + 2 * kGuard);
        CUDA_CHECK(cudaMemcpy(all.data(), base_, all.size() * sizeof(T), cudaMemcpyDeviceToHost));
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(all.data());
        bool intact = true;
        for (size_t i = 0; i < kGuard * sizeof(T); i++)
            intact = intact && bytes[i] == kGuardByte && bytes[(n_ + kGuard) * sizeof(T) + i] == kGuardByte;
        CHECK_MESSAGE(intact, "a kernel wrote outside its array");
        return std::vector<T>(all.begin() + kGuard, all.end() - kGuard);
    }

  private:
    static constexpr size_t kGuard = 64;
    static constexpr int kGuardByte = 0x3b;
    T* base_ = nullptr;
    size_t n_;
};

// Seeded normal numbers, already rounded to Float so that a reference in double sees the same inputs.
template <class Float>
std::vector<Float> normal_values(size_t n, uint64_t seed, double scale = 1.0, double mean = 0.0) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> normal(mean, scale);
    std::vector<Float> values(n);
    for (Float& v : values) v = (Float)(float)normal(rng);
    return values;
}
inline std::vector<int> random_ints(size_t n, int bound, uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::vector<int> values(n);
    for (int& v : values) v = (int)(rng() % (uint64_t)bound);
    return values;
}
template <class T>
std::vector<double> to_double(const std::vector<T>& values) {
    std::vector<double> out;
    for (const T& v : values) out.push_back((double)(float)v);
    return out;
}

// |got - want| / |want| as vectors: the error of a tensor relative to its own size. NaN counts as infinite.
template <class T>
double relative_error(const std::vector<T>& got, const std::vector<double>& want) {
    REQUIRE(got.size() == want.size());
    double difference = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++) {
        difference += ((double)(float)got[i] - want[i]) * ((double)(float)got[i] - want[i]);
        size += want[i] * want[i];
    }
    const double error = std::sqrt(difference / (size > 0 ? size : 1));
    return std::isfinite(error) ? error : INFINITY;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

// Largest |got - want|.
template <class T>
double largest_error(const std::vector<T>& got, const std::vector<double>& want) {
    REQUIRE(got.size() == want.size());
    double largest = 0;
    for (size_t i = 0; i < want.size(); i++) {
        const double error = std::fabs((double)(float)got[i] - want[i]);
        largest = error >= largest || !std::isfinite(error) ? error : largest;
    }
    return std::isfinite(largest) ? largest : INFINITY;
}

// Queries, keys or values, or their gradients, out of [..,3C]: so that an error in dq does not hide behind a
// large dv.
template <class T>
std::vector<T> part(const std::vector<T>& qkv, int which, int C) {
    std::vector<T> out;
    for (size_t i = 0; i < qkv.size(); i++)
        if ((int)(i / C % 3) == which) out.push_back(qkv[i]);
    return out;
}

// The tolerances, as relative errors of a tensor. A float has 24 bits: one operation is good to 6e-8, sums of
// a few thousand terms to about 1e-6; 1e-5 leaves a factor of ten. A result that is rounded to bf16 once (8
// bits) is off by at most 2^-8 of each element, 2^-9 in the mean square; 2^-8 leaves a factor of two for what
// was rounded on the way.
template <class Float>
constexpr double tolerance() {
    return sizeof(Float) == 2 ? 1.0 / 256 : 1e-5;
}

// Contexts to test with: a row shared by a warp (what a GPU runs) and by one thread (what the CPU backend
// runs).
inline std::vector<Context> both_lane_counts() {
    static Context ctx = make_context();
    Context warp = ctx, single = ctx;
    warp.row_lanes = 32;
    single.row_lanes = 1;
    return {warp, single};
}
