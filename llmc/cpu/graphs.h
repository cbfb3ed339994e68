// Streams, and what they record: CUDA graphs. Work that is given to a stream is done at once, unless the
// stream captures: then it is kept, arguments and all, and cudaGraphLaunch does it, as often as it is called.
//
// While a stream captures, much of the runtime API is out of bounds on a GPU (CUDA Programming Guide,
// "Prohibited and Unhandled Operations"), and so it is here, with the same errors. What is refused also makes
// the capture invalid: nothing more is recorded, and cudaStreamEndCapture fails. Not supported: a capture
// that forks into several streams, and memory that a graph allocates.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "types.h"

enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2,
};
enum cudaStreamCaptureMode {  // who may not call what is unsafe: any thread, the one that captures, no one
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2,
};

namespace cuda_cpu {
using Works = std::vector<std::function<void()>>;

struct Capture {
    cudaStreamCaptureMode mode;
    std::thread::id thread = std::this_thread::get_id();
    bool valid = true;
    Works works = {};
};
}  // namespace cuda_cpu

struct CUstream_st {
    bool blocking;  // the legacy default stream waits for it
    std::unique_ptr<cuda_cpu::Capture> capture;
};
struct CUgraph_st {
    std::shared_ptr<const cuda_cpu::Works> works;
};
struct CUgraphExec_st {
    std::shared_ptr<const cuda_cpu::Works> works;
};
typedef CUgraph_st* cudaGraph_t;
typedef CUgraphExec_st* cudaGraphExec_t;

namespace cuda_cpu {
struct Streams {
    std::mutex mutex;  // of all captures
    std::set<cudaStream_t> all;
    std::atomic<int> capturing = 0;  // how many do: mostly none, and then there is nothing to lock
};
inline Streams& streams() {
    static Streams* s = new Streams;  // never destroyed: a stream need not be, either
    return *s;
}

// Refuses a call with `error` if a stream captures that it `concerns`.
template <class Concerns>
cudaError_t refuse(cudaError_t error, Concerns concerns) {
    Streams& s = streams();
    if (s.capturing == 0) return cudaSuccess;
    std::lock_guard lock(s.mutex);
    bool refused = false;
    for (cudaStream_t stream : s.all) {
        if (!stream->capture || !concerns(*stream)) continue;
        stream->capture->valid = false;
        refused = true;
    }
    return refused ? result(error) : cudaSuccess;
}

inline bool any_stream(const CUstream_st&) {
    return true;
}
// Use of the legacy default stream, which waits for all others but those that were created not to block it.
inline cudaError_t use_legacy_stream() {
    return refuse(cudaErrorStreamCaptureImplicit, [](const CUstream_st& s) { return s.blocking; });
}
// Waiting for a stream's work, or asking whether it is done: what is captured never will be.
inline cudaError_t wait_for_stream(cudaStream_t stream) {
    if (!stream) return use_legacy_stream();
    return refuse(cudaErrorStreamCaptureUnsupported, [&](const CUstream_st& s) { return &s == stream; });
}
// What a capture would not notice although the captured work may depend on it, such as cudaMalloc.
inline cudaError_t use_unsafe_call() {
    return refuse(cudaErrorStreamCaptureUnsupported, [](const CUstream_st& s) {
        return s.capture->mode == cudaStreamCaptureModeGlobal ||
               (s.capture->mode == cudaStreamCaptureModeThreadLocal &&
                s.capture->thread == std::this_thread::get_id());
    });
}

// Gives work to a stream: calls it, or keeps it.
[[gnu::noinline]] inline cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
    if (!stream) {
        if (cudaError_t error = use_legacy_stream(); error != cudaSuccess) return error;
    } else if (Streams& s = streams(); s.capturing > 0) {
        std::lock_guard lock(s.mutex);
        if (Capture* capture = stream->capture.get()) {
            if (!capture->valid) return result(cudaErrorStreamCaptureInvalidated);
            capture->works.push_back(std::move(work));
            return cudaSuccess;
        }
    }
    work();
    return cudaSuccess;
}

inline bool is_capturing(cudaStream_t stream) {
    if (!stream) return false;
    std::lock_guard lock(streams().mutex);
    return stream->capture && stream->capture->valid;
}
}  // namespace cuda_cpu

// ---------------------------------------------------------------- streams

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    cuda_cpu::Streams& s = cuda_cpu::streams();
    std::lock_guard lock(s.mutex);
    *stream = new CUstream_st{flags != cudaStreamNonBlocking, nullptr};
    s.all.insert(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cuda_cpu::Streams& s = cuda_cpu::streams();
    std::lock_guard lock(s.mutex);
    if (!s.all.erase(stream)) return cuda_cpu::result(cudaErrorInvalidResourceHandle);
    if (stream->capture) s.capturing--;
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return cuda_cpu::wait_for_stream(stream);
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return cuda_cpu::wait_for_stream(stream);
}

// ---------------------------------------------------------------- captures and graphs

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (!stream) return cuda_cpu::result(cudaErrorStreamCaptureUnsupported);
    cuda_cpu::Streams& s = cuda_cpu::streams();
    std::lock_guard lock(s.mutex);
    if (stream->capture) return cuda_cpu::result(cudaErrorIllegalState);
    stream->capture = std::make_unique<cuda_cpu::Capture>(cuda_cpu::Capture{mode});
    s.capturing++;
    return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!stream) return cuda_cpu::result(cudaErrorIllegalState);
    cuda_cpu::Streams& s = cuda_cpu::streams();
    std::lock_guard lock(s.mutex);
    if (!stream->capture) return cuda_cpu::result(cudaErrorIllegalState);
    cuda_cpu::Capture& capture = *stream->capture;
    if (capture.mode != cudaStreamCaptureModeRelaxed && capture.thread != std::this_thread::get_id()) {
        capture.valid = false;
        return cuda_cpu::result(cudaErrorStreamCaptureWrongThread);
    }
    if (capture.valid)
        *graph = new CUgraph_st{std::make_shared<const cuda_cpu::Works>(std::move(capture.works))};
    stream->capture = nullptr;
    s.capturing--;
    return *graph ? cudaSuccess : cuda_cpu::result(cudaErrorStreamCaptureInvalidated);
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    if (!stream) {
        *status = cudaStreamCaptureStatusNone;
        return cuda_cpu::use_legacy_stream();
    }
    std::lock_guard lock(cuda_cpu::streams().mutex);
    *status = !stream->capture         ? cudaStreamCaptureStatusNone
              : stream->capture->valid ? cudaStreamCaptureStatusActive
                                       : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long = 0) {
    if (!graph) return cuda_cpu::result(cudaErrorInvalidValue);
    *exec = new CUgraphExec_st{graph->works};
    return cudaSuccess;
}
// In a stream that captures, the graph becomes a part of the graph that is made.
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (!exec) return cuda_cpu::result(cudaErrorInvalidValue);
    return cuda_cpu::submit(stream, [works = exec->works] {
        for (const std::function<void()>& work : *works) work();
    });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    if (!graph) return cuda_cpu::result(cudaErrorInvalidValue);
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    if (!exec) return cuda_cpu::result(cudaErrorInvalidValue);
    delete exec;
    return cudaSuccess;
}
