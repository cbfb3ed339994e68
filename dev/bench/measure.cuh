// How the benchmarks measure: random data on the device, times by CUDA events, the bandwidth of a large copy,
// and measurements that are skipped when time is short or noted when they fail.
#pragma once
#include <chrono>
#include <cmath>
#include <memory>

#include "../../llmc/device_memory.cuh"
#include "../../llmc/flags.h"
#include "../../llmc/program.h"
#include "report.h"

// ---------------------------------------------------------------------------------------------------------
// device memory and its contents

// Device memory that is freed with its scope.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t n) : size_(n) { CUDA_CHECK(cudaMalloc(&data_, n * sizeof(T))); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data_); }
    operator T*() const { return data_; }
    size_t size() const { return size_; }

  private:
    T* data_ = nullptr;
    size_t size_;
};

// A number of about the normal distribution, the sum of four uniform ones, for place i of the array `seed`.
__device__ inline float noise(uint64_t seed, size_t i) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15 + seed * 0xd1b54a32d192ed03;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    x ^= x >> 31;
    const int sum = (int)((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    return (float)(sum - 131070) * (1.7320508f / 65536.0f);
}

template <class T>
__global__ void fill_kernel(T* out, size_t n, uint64_t seed, float mean, float std) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (T)(mean + std * noise(seed, i));
}

// Random data everywhere: zeros can run faster than what training computes with.
template <class T>
void fill(const Context& ctx, T* out, size_t n, uint64_t seed, float mean, float std) {
    if (n == 0) return;
    fill_kernel<<<(unsigned)ceil_div(n, 256), 256, 0, ctx.stream>>>(out, n, seed, mean, std);
    CUDA_CHECK(cudaGetLastError());
}
template <class T>
void fill(const Context& ctx, const DeviceArray<T>& out, uint64_t seed, float std = 1.0f) {
    fill<T>(ctx, out, out.size(), seed, 0.0f, std);
}

// GPT-2's initial weights, made on the device: for a large model that is much faster. params:
// num_parameters() elements; the vocabulary's padding is left as it is.
template <class T>
void fill_weights(const Context& ctx, T* params, const GPT2Config& config) {
    const float residual_std = 0.02f / sqrtf(2.0f * (float)config.num_layers);
    uint64_t seed = 1;
    for (const ParamTensor& p : gpt2_params(config)) {
        const float std = p.init == Init::normal ? 0.02f : p.init == Init::residual ? residual_std : 0.0f;
        fill(ctx, params + p.offset, p.size_on_disk(), seed++, p.init == Init::ones ? 1.0f : 0.0f, std);
    }
}

// ---------------------------------------------------------------------------------------------------------
// timing

// Reads a buffer that is larger than the L2 cache, so that the next kernel finds nothing of its own there.
// Reading, because lines that were written would have to go to memory while the kernel is timed.
static __global__ void read_kernel(unsigned* sink, const unsigned* in, size_t num_packs) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_packs) return;
    const Pack<unsigned> x = load_pack(in + i * 4);
    if ((x[0] | x[1] | x[2] | x[3]) != 0) *sink = x[0];  // the buffer is all zeros
}

class Event {
  public:
    Event() { CUDA_CHECK(cudaEventCreate(&event_)); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { cudaEventDestroy(event_); }
    void record(const Context& ctx) { CUDA_CHECK(cudaEventRecord(event_, ctx.stream)); }
    void wait() { CUDA_CHECK(cudaEventSynchronize(event_)); }
    // Milliseconds from `begin` to this; both must have happened.
    double since(const Event& begin) const {
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin.event_, event_));
        return ms;
    }

  private:
    cudaEvent_t event_;
};

struct Timing {
    double ms = 0, least_ms = 0;  // median, least
    int runs = 0;
};

inline Timing summarize(std::vector<double> ms) {
    std::sort(ms.begin(), ms.end());
    const size_t n = ms.size();
    return {(ms[(n - 1) / 2] + ms[n / 2]) / 2, ms[0], (int)n};
}

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What every measurement needs.
struct Measuring {
    Context ctx;
    Report report;
    bool brief = kOnCpu;  // few repetitions
    double budget = 0;    // seconds; 0: no limit
    double begin = seconds_now();
    int failures = 0;
    std::unique_ptr<DeviceArray<unsigned>> flush;  // larger than L2, and one element more

    double seconds_left() const { return budget > 0 ? budget - (seconds_now() - begin) : INFINITY; }
};

inline void make_flush(Measuring& b) {
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
    const size_t flushed = kOnCpu ? 4096 : 3 * (size_t)std::max(prop.l2CacheSize, 1 << 20);
    b.flush = std::make_unique<DeviceArray<unsigned>>(flushed / 16 * 4 + 4);
    CUDA_CHECK(cudaMemset(*b.flush, 0, b.flush->size() * sizeof(unsigned)));
}

inline void flush_l2(const Measuring& b) {
    const size_t num_packs = b.flush->size() / 4 - 1;
    read_kernel<<<(unsigned)ceil_div(num_packs, 256), 256, 0, b.ctx.stream>>>(*b.flush + num_packs * 4,
                                                                              *b.flush, num_packs);
    CUDA_CHECK(cudaGetLastError());
}

// The time of work() on the device, L2 flushed before each run. prepare() restores before each run, untimed,
// what work() overwrites. The first run, which loads code and chooses cuBLASLt's algorithms, does not count.
// Runs are queued one behind the other, so that the GPU does not wait for the host.
template <class Prepare, class Work>
Timing time_work(const Measuring& b, Prepare prepare, Work work) {
    double one = 0;
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
        const double start = seconds_now();
        prepare();
        flush_l2(b);
        work();
        CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
        one = seconds_now() - start;
    }
    const int runs = (int)std::clamp((kOnCpu    ? 0.01
                                      : b.brief ? 0.1
                                                : 0.4) /
                                         one,
                                     b.brief ? 3.0 : 9.0, b.brief ? 11.0 : 101.0);
    std::vector<Event> begins(runs), ends(runs);
    for (int i = 0; i < runs; i++) {
        prepare();
        flush_l2(b);
        begins[i].record(b.ctx);
        work();
        ends[i].record(b.ctx);
    }
    CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
    std::vector<double> ms;
    for (int i = 0; i < runs; i++) ms.push_back(std::max(ends[i].since(begins[i]), 1e-4));
    return summarize(ms);
}
template <class Work>
Timing time_work(const Measuring& b, Work work) {
    return time_work(
        b, [] {}, work);
}

// Runs one measurement. What goes wrong in it is a row of its own, and the next one gets its chance; only a
// device that no longer answers ends the program.
template <class Measure>
void attempt(Measuring& b, Table& table, const std::string& name, nlohmann::ordered_json& rows,
             double seconds, Measure measure) {
    const auto note = [&](const std::string& why) {
        table.note(name, why);
        rows.push_back({{"name", name}, {"not_measured", why}});
    };
    if (b.seconds_left() < seconds) {
        note("skipped: the time budget is used up");
    } else {
        try {
            measure();
        } catch (const Error& e) {
            b.failures++;
            note(format("not measured: %s", e.what()));
            cudaGetLastError();
            if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess)
                fail("the GPU cannot be used any more after this (%s): %s", name.c_str(),
                     cudaGetErrorString(error));
        }
    }
    b.report.save();
}

// Calls measure(), and writes what came of it to a report in the folder `out`, if empty build, or dev/bench
// where the figures are a GPU's; also if measuring stops with an error. prefix, subject: open_report().
template <class Measure>
void report_on(Measuring& b, const std::string& out, const std::string& prefix, const std::string& subject,
               Measure measure) {
    open_report(b.report, b.ctx, !out.empty() ? out : kOnCpu ? "build" : "dev/bench", prefix, subject);
    try {
        make_flush(b);
        measure();
    } catch (const Error& e) {
        b.report.print(format("\nStopped: %s\n", e.what()));
        b.report.json["stopped"] = e.what();
        b.report.save();
        throw;
    }
    const double seconds = seconds_now() - b.begin;
    b.report.print(format("\n%.0f s in all%s\n", seconds,
                          b.failures ? format("; %d measurements failed", b.failures).c_str() : ""));
    b.report.json["seconds"] = seconds;
    b.report.save();
    printf("written: %s.md and .json\n", b.report.path.c_str());
    if (b.failures) fail("%d measurements failed: see the rows that say why", b.failures);
}

// A benchmark's main(): run() with the configuration that flags_of() describes.
template <class Config, class Flags>
int bench_main(int argc, char** argv, Flags flags_of, void (*run)(const Config&)) {
    return run_program("error", [&] {
        Config config;
        parse_flags(argc, argv, flags_of(config));
        run(config);
    });
}

// ---------------------------------------------------------------------------------------------------------
// the bandwidth of memory

// Each thread copies four packs that lie a block apart: coalesced, with four loads in flight.
static __global__ void copy_kernel(float* out, const float* in, size_t num_packs) {
    const size_t first = (size_t)blockIdx.x * blockDim.x * 4 + threadIdx.x;
    Pack<float> x[4];
    for (int k = 0; k < 4; k++) {
        const size_t i = first + k * blockDim.x;
        if (i < num_packs) x[k] = load_pack(in + i * 4);
    }
    for (int k = 0; k < 4; k++) {
        const size_t i = first + k * blockDim.x;
        if (i < num_packs) store_pack(out + i * 4, x[k]);
    }
}

// Bytes a second of a large copy, read and written ones together: the better of a kernel of ours and
// cudaMemcpy, at its best. Goes into the report as "The machine".
inline double measure_copy(Measuring& b) {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    const size_t bytes = kOnCpu ? 128 << 20 : std::min((size_t)1 << 30, free_bytes / 4 / 4096 * 4096);
    const DeviceArray<float> from(bytes / 4), to(bytes / 4);
    fill(b.ctx, from, 3);
    const size_t num_packs = bytes / 16;
    const auto copy = [&] {
        copy_kernel<<<(unsigned)ceil_div(num_packs, 1024), 256, 0, b.ctx.stream>>>(to, from, num_packs);
        CUDA_CHECK(cudaGetLastError());
    };
    for (const double start = seconds_now(); seconds_now() - start < (kOnCpu ? 0.01 : 0.3);) {
        copy();  // brings the clocks up
        CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
    }
    const Timing kernel = time_work(b, copy);
    const Timing library = time_work(
        b, [&] { CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, b.ctx.stream)); });
    const auto rate = [&](double ms) { return 2e3 * (double)bytes / ms; };
    const double best = rate(std::min(kernel.least_ms, library.least_ms));
    b.report.print(format(
        "\n## The machine\n\n- copy of %s: %.0f GB/s read and written (best; our kernel %.0f, cudaMemcpy %.0f; medians %.0f and %.0f)\n",
        pretty_bytes((double)bytes).c_str(), best * 1e-9, rate(kernel.least_ms) * 1e-9,
        rate(library.least_ms) * 1e-9, rate(kernel.ms) * 1e-9, rate(library.ms) * 1e-9));
    b.report.json["machine"] = {{"copy_bytes_per_s", best},
                                {"copy_kernel_median_ms", kernel.ms},
                                {"copy_memcpy_median_ms", library.ms},
                                {"copy_buffer_bytes", bytes}};
    b.report.save();
    return best;
}
