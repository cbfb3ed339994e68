// A CUDA graph: what a function has the device do, recorded once and then launched as a whole.
//
// A micro-step of GPT-2 124M gives the device some 350 things to do, and each costs the host a few
// microseconds. Where the device is done with most of them in less (few rows, a small model, one token at a
// time), it waits for the host. A graph costs the host one launch.
//
// A recording is frozen: its kernels, their arguments, the addresses they work at. What changes from one
// launch to the next must lie in device memory, or be another graph.
#pragma once
#include "context.h"

class Graph {
  public:
    Graph() = default;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        if (exec_) cudaGraphExecDestroy(exec_);
    }

    // Has the device do what work() gives to ctx.stream; work() must do the same every time, and neither wait
    // for the device nor allocate. The first time it runs as it is, so that whatever happens once only
    // (matrix products choose their algorithms by timing them, the driver loads kernels) has happened; the
    // second time it is recorded; from then on it is not called any more.
    template <class Work>
    void run(const Context& ctx, Work work) {
        if (!warm_) {
            work();
            warm_ = true;
            return;
        }
        if (!exec_) record(ctx, work);
        CUDA_CHECK(cudaGraphLaunch(exec_, ctx.stream));
    }

    bool recorded() const { return exec_ != nullptr; }

  private:
    bool warm_ = false;
    cudaGraphExec_t exec_ = nullptr;

    template <class Work>
    void record(const Context& ctx, Work work) {
        cudaGraph_t graph = nullptr;
        CUDA_CHECK(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeGlobal));
        try {
            work();
        } catch (...) {  // the stream must not stay as it is
            if (cudaStreamEndCapture(ctx.stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
            throw;
        }
        CUDA_CHECK(cudaStreamEndCapture(ctx.stream, &graph));
        const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
        cudaGraphDestroy(graph);
        CUDA_CHECK(status);
    }
};
