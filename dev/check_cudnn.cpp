// Does cuDNN take our graphs? Asks the library itself, on a machine that need not have a GPU: cuDNN plans for
// a device that is only described to it, here an H100. Nothing is computed; tests/attention_cudnn_cases.h
// does that.
//
//   make cudnn-check
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstring>
#include <vector>

#include "../llmc/attention_cudnn.cpp"

static const char kDevice[] = R"({"deviceName": "NVIDIA H100 80GB HBM3", "deviceVer": 900, "driverVer": 13000,
    "cudaDeviceId": 0, "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 85000000000,
    "multiProcessorCount": 132, "warpSize": 32, "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "maxCtasPerSM": 32,
    "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "l2CacheSize": 52428800,
    "smClockRateKHz": 1980000, "memClockRateKHz": 2619000})";

// What cudnn_frontend asks the CUDA runtime for on its own: these are found before the runtime's.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
    memset(prop, 0, sizeof *prop);
    strcpy(prop->name, "NVIDIA H100 80GB HBM3");
    prop->major = 9;
    prop->multiProcessorCount = 132;
    prop->sharedMemPerBlockOptin = 232448;
    return cudaSuccess;
}
}

int main() {
    if (!dlopen("libcuda.so.1", RTLD_LAZY)) {
        fprintf(stderr,
                "%s: cuDNN needs the driver's library; install it, or name its folder in LD_LIBRARY_PATH\n",
                dlerror());
        return 1;
    }
    auto device = std::make_shared<fe::DeviceProperties>();
    if (auto status = device->deserialize({std::begin(kDevice), std::end(kDevice) - 1}); status.is_bad()) {
        fprintf(stderr, "cuDNN %zu does not take the description of the device: %s\n", cudnnGetVersion(),
                status.get_message().c_str());
        return 1;
    }
    printf("cuDNN %zu for an H100: bytes of workspace, forward and backward\n", cudnnGetVersion());
    int refused = 0;
    const CudnnShape shapes[] = {{64, 1024, 12, 64}, {4, 1024, 12, 64}, {4, 1024, 25, 64}, {1, 4096, 12, 64},
                                 {2, 1000, 12, 64},  {3, 333, 2, 64},   {1, 65, 2, 64},    {2, 3, 2, 64},
                                 {1, 1, 1, 64},      {8, 128, 2, 64},   {2, 512, 6, 128},  {2, 256, 4, 96},
                                 {2, 256, 4, 40},    {2, 70, 3, 8}};
    for (const CudnnShape& s : shapes) {
        printf("B %2d, T %4d, heads %2d of %3d:", s.B, s.T, s.num_heads, s.hs);
        for (const Graph& graph : {forward_graph(s), backward_graph(s)}) {
            graph->set_device_properties(device);
            if (auto status = graph->build({fe::HeurMode_t::A}); status.is_bad()) {
                const std::string message = status.get_message();
                printf(" refused (%s)", message.substr(0, message.find('\n')).c_str());
                refused++;
            } else {
                printf(" %lld", (long long)graph->get_workspace_size());
            }
        }
        printf("\n");
    }
    return refused > 0;
}
