// See attention_cudnn.h. cuDNN takes attention as a small graph that names its tensors, their places and what
// is done to them (cudnn_frontend, https://github.com/NVIDIA/cudnn-frontend), and answers with kernels for
// this GPU.
#include "attention_cudnn.h"

#include <cudnn_frontend.h>

#include <cmath>
#include <compare>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

namespace fe = cudnn_frontend;

#define CUDNN_CHECK(call) CHECK_STATUS(call, CUDNN_STATUS_SUCCESS, cudnnGetErrorString)

using Graph = std::shared_ptr<fe::graph::Graph>;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

// The names by which a graph's tensors are given to it.
enum Uid : int64_t { kQ = 1, kK, kV, kOut, kStats, kDout, kDq, kDk, kDv };

struct CudnnShape {
    int B, T, num_heads, hs;

    auto operator<=>(const CudnnShape&) const = default;
};

// One head's rows of a [B,T,width] tensor, `hs` wide, as [B,NH,T,hs]: nothing is copied into an order of its
// own.
static fe::graph::Tensor_attributes heads(Uid uid, const char* name, CudnnShape s, int64_t width) {
    return fe::graph::Tensor_attributes()
        .set_uid(uid)
        .set_name(name)
        .set_dim({s.B, s.num_heads, s.T, s.hs})
        .set_stride({s.T * width, s.hs, width, 1});
}
static int64_t channels(CudnnShape s) {
    return (int64_t)s.num_heads * s.hs;
}
static void set_output(const Tensor& tensor, const fe::graph::Tensor_attributes& like) {
    tensor->set_output(true).set_uid(like.get_uid()).set_dim(like.get_dim()).set_stride(like.get_stride());
}

static Graph empty_graph() {
    Graph graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    return graph;
}

static Graph forward_graph(CudnnShape s) {
    Graph graph = empty_graph();
    const int64_t C = channels(s);
    const auto [out, stats] =
        graph->sdpa(graph->tensor(heads(kQ, "q", s, 3 * C)), graph->tensor(heads(kK, "k", s, 3 * C)),
                    graph->tensor(heads(kV, "v", s, 3 * C)),
                    fe::graph::SDPA_attributes()
                        .set_name("attention forward")
                        .set_generate_stats(true)
                        .set_causal_mask(true)
                        .set_attn_scale(1.0f / std::sqrt((float)s.hs)));
    set_output(out, heads(kOut, "out", s, C));
    stats->set_output(true).set_uid(kStats).set_data_type(fe::DataType_t::FLOAT);
    return graph;
}

static Graph backward_graph(CudnnShape s) {
    Graph graph = empty_graph();
    const int64_t C = channels(s);
    const Tensor stats = graph->tensor(fe::graph::Tensor_attributes()
                                           .set_uid(kStats)
                                           .set_name("lse")
                                           .set_dim({s.B, s.num_heads, s.T, 1})
                                           .set_stride({(int64_t)s.num_heads * s.T, s.T, 1, 1})
                                           .set_data_type(fe::DataType_t::FLOAT));
    const auto [dq, dk, dv] =
        graph->sdpa_backward(graph->tensor(heads(kQ, "q", s, 3 * C)), graph->tensor(heads(kK, "k", s, 3 * C)),
                             graph->tensor(heads(kV, "v", s, 3 * C)), graph->tensor(heads(kOut, "out", s, C)),
                             graph->tensor(heads(kDout, "dout", s, C)), stats,
                             fe::graph::SDPA_backward_attributes()
                                 .set_name("attention backward")
                                 .set_causal_mask(true)
                                 .set_attn_scale(1.0f / std::sqrt((float)s.hs))
                                 .set_deterministic_algorithm(true));
    set_output(dq, heads(kDq, "dq", s, 3 * C));
    set_output(dk, heads(kDk, "dk", s, 3 * C));
    set_output(dv, heads(kDv, "dv", s, 3 * C));
    return graph;
}

// What the context keeps: the library's handle, and the graphs that were built.
struct CudnnAttention {
    struct Plans {
        Graph forward, backward;            // null: cuDNN has no kernels for this shape
        void* forward_workspace = nullptr;  // a few hundred bytes
    };
    cudnnHandle_t handle = nullptr;
    std::map<CudnnShape, Plans> plans;

    ~CudnnAttention() {
        for (auto& [shape, p] : plans) cudaFree(p.forward_workspace);
        if (handle) cudnnDestroy(handle);
    }
};

// What to run for a shape; null: it was not prepared, or there is nothing.
static const CudnnAttention::Plans* find_plans(const Context& ctx, CudnnShape s) {
    if (!ctx.cudnn) return nullptr;
    const auto found = ctx.cudnn->plans.find(s);
    return found == ctx.cudnn->plans.end() || !found->second.backward ? nullptr : &found->second;
}

static CudnnAttention::Plans make_plans(const Context& ctx, CudnnShape s) {
    const Graph forward = forward_graph(s), backward = backward_graph(s);
    for (const Graph& graph : {forward, backward})
        if (auto status = graph->build(ctx.cudnn->handle, {fe::HeurMode_t::A}); status.is_bad()) {
            const std::string message = status.get_message();
            fprintf(
                stderr,
                "cuDNN %zu has no attention for %d x %d tokens and %d heads of %d (%s): this program's own is used\n",
                cudnnGetVersion(), s.B, s.T, s.num_heads, s.hs,
                message.substr(0, message.find('\n')).c_str());
            return {};
        }
    CudnnAttention::Plans plans{forward, backward};
    if (const int64_t bytes = forward->get_workspace_size(); bytes > 0)
        CUDA_CHECK(cudaMalloc(&plans.forward_workspace, (size_t)bytes));
    return plans;
}

size_t prepare_attention_cudnn(const Context& ctx, int B, int T, int num_heads, int hs) {
    if (!ctx.cudnn) {
        ctx.cudnn = std::make_shared<CudnnAttention>();
        CUDNN_CHECK(cudnnCreate(&ctx.cudnn->handle));
        CUDNN_CHECK(cudnnSetStream(ctx.cudnn->handle, ctx.stream));
    }
    const CudnnShape s{B, T, num_heads, hs};
    if (!ctx.cudnn->plans.count(s)) ctx.cudnn->plans[s] = make_plans(ctx, s);
    const CudnnAttention::Plans* plans = find_plans(ctx, s);
    return plans ? ((size_t)plans->backward->get_workspace_size() + sizeof(float) - 1) / sizeof(float) : 0;
}

bool has_attention_cudnn(const Context& ctx, int B, int T, int num_heads, int hs) {
    return find_plans(ctx, {B, T, num_heads, hs}) != nullptr;
}

// Runs a graph whose tensors are at these places.
static void execute(const Context& ctx, const Graph& graph, std::unordered_map<int64_t, void*> places,
                    void* workspace) {
    if (auto status = graph->execute(ctx.cudnn->handle, places, workspace); status.is_bad())
        fail("cuDNN's attention failed: %s (make without USE_CUDNN runs this program's own)",
             status.get_message().c_str());
}

// cuDNN's map of places has no const.
template <class T>
static void* place(const T* pointer) {
    return const_cast<T*>(pointer);
}

bool attention_forward_cudnn(const Context& ctx, __nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv,
                             int B, int T, int num_heads, int hs) {
    const CudnnShape s{B, T, num_heads, hs};
    const CudnnAttention::Plans* plans = find_plans(ctx, s);
    if (!plans) return false;
    const int64_t C = channels(s);
    execute(ctx, plans->forward,
            {{kQ, place(qkv)}, {kK, place(qkv + C)}, {kV, place(qkv + 2 * C)}, {kOut, out}, {kStats, lse}},
            plans->forward_workspace);
    return true;
}

bool attention_backward_cudnn(const Context& ctx, __nv_bfloat16* dqkv, float* scratch,
                              const __nv_bfloat16* dout, const __nv_bfloat16* out, const __nv_bfloat16* qkv,
                              const float* lse, int B, int T, int num_heads, int hs) {
    const CudnnShape s{B, T, num_heads, hs};
    const CudnnAttention::Plans* plans = find_plans(ctx, s);
    if (!plans) return false;
    const int64_t C = channels(s);
    execute(ctx, plans->backward,
            {{kQ, place(qkv)},
             {kK, place(qkv + C)},
             {kV, place(qkv + 2 * C)},
             {kOut, place(out)},
             {kDout, place(dout)},
             {kStats, place(lse)},
             {kDq, dqkv},
             {kDk, dqkv + C},
             {kDv, dqkv + 2 * C}},
            scratch);
    return true;
}
