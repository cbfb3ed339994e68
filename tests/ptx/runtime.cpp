// The CUDA runtime's functions that host code here calls, for programs that nvcc has compiled. There is one
// device, with one stream: what it is given is done at once, or while the stream is captured, recorded.
//
//   PTX_CC=80        the compute capability that it says it has (90)
//   PTX_SHARED=99    KB of shared memory that a block may have (227)
//   CUDA_CPU_SCHEDULE=random   warps and blocks in a random order, cp.async's copies early or late
#include "runtime.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <stdexcept>
#include <unordered_map>

#include <cuda_runtime_api.h>

#include "machine.h"

namespace ptx {
namespace {

struct Work {
    std::vector<std::function<void()>> steps = {};
};
std::unique_ptr<Work> recording;  // while the stream is captured
cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

// Kernels by the host functions that stand for them. (As functions: what nvcc registers before main() comes
// before this file's variables are made.)
std::unordered_map<const void*, std::string>& names() {
    static std::unordered_map<const void*, std::string> all;
    return all;
}
Kernel& kernel_of(const void* function) {
    const auto name = names().find(function);
    if (name == names().end()) fail("the function of a launch is no kernel");
    Kernel* kernel = find_kernel(name->second);
    if (!kernel) fail("the PTX has no kernel %s", name->second.c_str());
    return *kernel;
}

Dim dim(dim3 d) {
    return {d.x, d.y, d.z};
}

cudaError_t launch_function(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                            int cluster, bool early) {
    Kernel& kernel = kernel_of(function);
    const Dim blocks = dim(grid), threads = dim(block);
    const size_t all_shared = kernel.dynamic_start + shared;
    if (threads.count() < 1 || threads.count() > (uint64_t)kernel.max_threads || block.z > 64 ||
        blocks.count() < 1 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || grid.x % cluster ||
        cluster > 8 || shared > (size_t)kernel.max_dynamic ||
        all_shared > (size_t)(kernel.asked ? most_shared : 48 << 10)) {
        fprintf(
            stderr,
            "ptx: %s cannot be launched: %u x %u x %u blocks of %u x %u x %u threads, %zu bytes of shared memory\n",
            kernel.name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, all_shared);
        return result(cudaErrorInvalidConfiguration);
    }
    std::vector<uint8_t> params(kernel.param_bytes);
    for (size_t i = 0; i < kernel.params.size(); i++)
        memcpy(params.data() + kernel.params[i].first, args[i], kernel.params[i].second);
    give([&kernel, blocks, threads, cluster, early, shared, params] {
        ptx::launch(kernel, blocks, threads, cluster, early, shared, params);
    });
    return cudaSuccess;
}

// Between two pages that nobody may touch, for the host's sake.
void* allocate(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t whole = (bytes + kPage - 1) / kPage * kPage + 2 * kPage;
    auto* p = static_cast<uint8_t*>(
        mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED) return nullptr;
    mprotect(p, kPage, PROT_NONE);
    mprotect(p + whole - kPage, kPage, PROT_NONE);
    memset(p + kPage, 0xff, bytes);  // no numbers
    add_memory(p + kPage, bytes);
    return p + kPage;
}

bool on_device(cudaMemcpyKind kind, bool source) {
    return kind == cudaMemcpyDeviceToDevice ||
           kind == (source ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice);
}
void check_copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (on_device(kind, false)) check_memory((uint64_t)to, bytes, "a copy");
    if (on_device(kind, true)) check_memory((uint64_t)from, bytes, "a copy");
}

double now_ms() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

}  // namespace

void give(std::function<void()> step) {
    if (recording)
        recording->steps.push_back(std::move(step));
    else
        step();
}

}  // namespace ptx

using namespace ptx;

extern "C" {

// ---- what nvcc's host code calls by itself

struct Registration {  // of a module: `data` is a header (whose last 8 of 16 bytes are the size of the rest),
                       // and entries
    int magic, version;
    const char* data;
    void* file;
};
void** __cudaRegisterFatBinary(void* registration) {
    static void* handle;
    const char* data = static_cast<Registration*>(registration)->data;
    uint64_t bytes;
    memcpy(&bytes, data + 8, sizeof bytes);
    const std::string_view all(data, 16 + bytes);
    const size_t begin = all.find(".version ");
    if (begin == all.npos) ptx::fail("the program has no PTX, or compressed: compile it with --no-compress");
    parse_module(std::string(all.substr(begin, all.find('\0', begin) - begin)));
    most_shared = setting("PTX_SHARED", most_shared >> 10) << 10;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
    names()[function] = name;
}
struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static Configuration configuration;  // of kernel<<<...>>>
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t) {
    return launch_function(kernel, grid, block, args, shared, 1, false);
}

// ---- launches and kernels

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t) {
    return launch_function(function, grid, block, args, shared, 1, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
    int cluster = 1;
    bool early = false;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = (int)attribute.val.clusterDim.x;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            early = attribute.val.programmaticStreamSerializationAllowed;
    }
    return launch_function(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes,
                           cluster, early);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    Kernel& kernel = kernel_of(function);
    if (kernel.shared_bytes + value > most_shared) return result(cudaErrorInvalidValue);
    kernel.max_dynamic = value;
    kernel.asked = true;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    const Kernel& kernel = kernel_of(function);
    *attributes = {};
    attributes->sharedSizeBytes = kernel.shared_bytes;
    attributes->localSizeBytes = kernel.local_bytes;
    attributes->maxThreadsPerBlock = kernel.max_threads;
    attributes->maxDynamicSharedSizeBytes = kernel.max_dynamic;
    return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
    *p = bytes <= (size_t)8 << 30 ? allocate(bytes) : nullptr;
    return result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* p) {
    if (p) remove_memory(p);  // the pages stay, so that nothing else comes to lie where it was
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    return cudaMalloc(p, bytes);
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
    return cudaMalloc(p, bytes);
}
cudaError_t cudaFreeHost(void* p) {
    return cudaFree(p);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = *total = (size_t)8 << 30;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (recording) return result(cudaErrorStreamCaptureUnsupported);
    check_copy(to, from, bytes, kind);
    end_kernels();
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    check_copy(to, from, bytes, kind);
    give([=] {
        end_kernels();
        memcpy(to, from, bytes);
    });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    check_memory((uint64_t)p, bytes, "memset");
    give([=] {
        end_kernels();
        memset(p, value, bytes);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    return cudaMemsetAsync(p, value, bytes, nullptr);
}

// ---- the device

cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    const int capability = setting("PTX_CC", 90);
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "PTX on a CPU");
    properties->major = capability / 10;
    properties->minor = capability % 10;
    properties->multiProcessorCount = 12;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = most_shared;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    if (!recording) end_kernels();
    return result(recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
    static char text[32];
    snprintf(text, sizeof text, "CUDA error %d", (int)error);
    return text;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

// ---- the stream, events, graphs

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = reinterpret_cast<cudaStream_t>(1);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaDeviceSynchronize();
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    recording = std::make_unique<Work>();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = reinterpret_cast<cudaGraph_t>(recording.release());
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = reinterpret_cast<cudaGraphExec_t>(new Work(*reinterpret_cast<Work*>(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    end_kernels();
    for (const auto& step : reinterpret_cast<Work*>(exec)->steps) step();
    end_kernels();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete reinterpret_cast<Work*>(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete reinterpret_cast<Work*>(exec);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = reinterpret_cast<cudaEvent_t>(new double(0));
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return cudaEventCreate(event);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    give([event] { *reinterpret_cast<double*>(event) = now_ms(); });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = (float)(*reinterpret_cast<double*>(end) - *reinterpret_cast<double*>(begin));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<double*>(event);
    return cudaSuccess;
}

}  // extern "C"
