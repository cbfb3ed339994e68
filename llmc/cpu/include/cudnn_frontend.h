// Stands in for the header of this name: the part of cuDNN's graphs that attention_cudnn.cpp uses, two graphs
// of one node each, attention forward and attention backward. As on a GPU: sums in float; the probabilities
// and their gradient are rounded to bf16 before they are multiplied by anything; the backward keeps what it
// needs in its workspace. What cuDNN does not support is refused when a graph is built, and what its
// documentation asks for is checked.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cuda_cpu.h"
#include "cuda_bf16.h"

// ---------------------------------------------------------------- the library

enum cudnnStatus_t { CUDNN_STATUS_SUCCESS = 0, CUDNN_STATUS_BAD_PARAM = 2000 };
struct cudnnContext {
    cudaStream_t stream = nullptr;
};
typedef cudnnContext* cudnnHandle_t;

inline cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
    *handle = new cudnnContext;
    return CUDNN_STATUS_SUCCESS;
}
inline cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
    delete handle;
    return CUDNN_STATUS_SUCCESS;
}
inline cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    if (!handle) return CUDNN_STATUS_BAD_PARAM;
    handle->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}
inline const char* cudnnGetErrorString(cudnnStatus_t status) {
    return status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_BAD_PARAM";
}
inline size_t cudnnGetVersion() {
    return 0;  // none: this is not cuDNN
}

namespace cudnn_frontend {

enum class DataType_t { NOT_SET, FLOAT, BFLOAT16 };
enum class HeurMode_t { A, B, FALLBACK };

struct error_object {
    std::string message;

    bool is_good() const { return message.empty(); }
    bool is_bad() const { return !is_good(); }
    std::string get_message() { return message; }
};

namespace graph {

// ---------------------------------------------------------------- tensors and nodes

struct Tensor_attributes {
    int64_t uid = 0;
    std::string name;
    std::vector<int64_t> dim, stride;
    DataType_t type = DataType_t::NOT_SET;
    bool output = false;

    Tensor_attributes& set_uid(int64_t value) { return uid = value, *this; }
    Tensor_attributes& set_name(const std::string& value) { return name = value, *this; }
    Tensor_attributes& set_dim(const std::vector<int64_t>& value) { return dim = value, *this; }
    Tensor_attributes& set_stride(const std::vector<int64_t>& value) { return stride = value, *this; }
    Tensor_attributes& set_data_type(DataType_t value) { return type = value, *this; }
    Tensor_attributes& set_output(bool value) { return output = value, *this; }
    int64_t get_uid() const { return uid; }
    std::vector<int64_t> get_dim() const { return dim; }
    std::vector<int64_t> get_stride() const { return stride; }
};
using Tensor = std::shared_ptr<Tensor_attributes>;

template <class Self>
struct Attention_attributes {
    float scale = 1.0f;
    bool causal = false, stats = false;

    Self& set_name(const std::string&) { return self(); }
    Self& set_causal_mask(bool value) { return causal = value, self(); }
    Self& set_attn_scale(float value) { return scale = value, self(); }
    Self& self() { return static_cast<Self&>(*this); }
};
struct SDPA_attributes : Attention_attributes<SDPA_attributes> {
    SDPA_attributes& set_generate_stats(bool value) { return stats = value, *this; }
};
struct SDPA_backward_attributes : Attention_attributes<SDPA_backward_attributes> {
    // The one order in which it sums here is always the same.
    SDPA_backward_attributes& set_deterministic_algorithm(bool) { return *this; }
};

// ---------------------------------------------------------------- a graph

class Graph {
  public:
    Graph& set_io_data_type(DataType_t type) { return io_type_ = type, *this; }
    Graph& set_intermediate_data_type(DataType_t type) { return intermediate_type_ = type, *this; }
    Graph& set_compute_data_type(DataType_t type) { return compute_type_ = type, *this; }

    Tensor tensor(const Tensor_attributes& attributes) {
        tensors_.push_back(std::make_shared<Tensor_attributes>(attributes));
        return tensors_.back();
    }
    std::tuple<Tensor, Tensor> sdpa(Tensor q, Tensor k, Tensor v, const SDPA_attributes& node) {
        const Tensor out = tensor({}), stats = tensor({});
        stats->dim = {q->dim[0], q->dim[1], q->dim[2], 1};
        stats->stride = {q->dim[1] * q->dim[2], q->dim[2], 1, 1};
        set_node(node.scale, node.causal && node.stats, {q, k, v, out}, stats);
        return {out, stats};
    }
    std::tuple<Tensor, Tensor, Tensor> sdpa_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor dout,
                                                     Tensor stats, const SDPA_backward_attributes& node) {
        const Tensor dq = tensor({}), dk = tensor({}), dv = tensor({});
        set_node(node.scale, node.causal, {q, k, v, out, dout, dq, dk, dv}, stats);
        return {dq, dk, dv};
    }

    error_object build(cudnnHandle_t handle, const std::vector<HeurMode_t>&) {
        if (!handle) return {"the handle is null"};
        if (halves_.empty()) return {"the graph is empty"};
        if (!supported_) return {"only causal attention is emulated, with statistics in the forward"};
        if (io_type_ != DataType_t::BFLOAT16 || intermediate_type_ != DataType_t::FLOAT ||
            compute_type_ != DataType_t::FLOAT)
            return {"only bf16 with sums in float is emulated"};
        const std::vector<int64_t>& dim = halves_[0]->dim;
        if (dim.size() != 4 || dim[3] % 8 != 0 || dim[3] > 128)
            return {"No valid engine configs: the head size is no multiple of 8 up to 128"};
        for (const Tensor& t : halves_)
            if (t->dim != dim || t->stride.size() != 4 || t->stride[3] != 1 || t->stride[2] % 8 != 0 ||
                t->type != DataType_t::NOT_SET)
                return {"the tensor " + t->name + " has other dimensions or strides than attention's"};
        if (stats_->type != DataType_t::FLOAT ||
            stats_->dim != std::vector<int64_t>{dim[0], dim[1], dim[2], 1} ||
            stats_->stride != std::vector<int64_t>{dim[1] * dim[2], dim[2], 1, 1})
            return {"the statistics are no float for each row"};
        for (const Tensor& t : results())
            if (!t->output) return {"a result is not said to be one"};
        built_ = true;
        return {};
    }

    int64_t get_workspace_size() const { return is_backward() ? rows() * (int64_t)sizeof(float) : 0; }

    error_object execute(cudnnHandle_t handle, std::unordered_map<int64_t, void*>& places,
                         void* workspace) const {
        if (!built_) return {"the graph was not built"};
        if (get_workspace_size() > 0 && !workspace) return {"the workspace is null"};
        std::vector<Tensor> all = halves_;
        all.push_back(stats_);
        for (const Tensor& t : all) {
            if (!places.count(t->uid) || !places[t->uid]) return {"no place was given for a tensor"};
            if ((uintptr_t)places[t->uid] % 16 != 0) return {"a tensor is at no multiple of 16 bytes"};
        }
        const cudaError_t error = cuda_cpu::submit(handle->stream, [graph = *this, places, workspace] {
            const int64_t heads = graph.halves_[0]->dim[0] * graph.halves_[0]->dim[1];
#pragma omp parallel for
            for (int64_t head = 0; head < heads; head++)
                graph.is_backward() ? graph.backward(places, (float*)workspace, head)
                                    : graph.forward(places, head);
        });
        if (error != cudaSuccess) return {cudaGetErrorString(error)};
        return {};
    }

  private:
    DataType_t io_type_ = DataType_t::NOT_SET, intermediate_type_ = io_type_, compute_type_ = io_type_;
    std::vector<Tensor> tensors_;
    std::vector<Tensor> halves_;  // the tensors in bf16: q, k, v, out; of a backward also dout, dq, dk, dv
    Tensor stats_;
    float scale_ = 1.0f;
    bool supported_ = false, built_ = false;

    void set_node(float scale, bool supported, const std::vector<Tensor>& halves, const Tensor& stats) {
        supported_ = supported && halves_.empty();
        scale_ = scale;
        halves_ = halves;
        stats_ = stats;
    }
    bool is_backward() const {
        return halves_.size() > 4;
    }
    int64_t rows() const {
        return halves_[0]->dim[0] * halves_[0]->dim[1] * halves_[0]->dim[2];
    }
    std::vector<Tensor> results() const {
        return is_backward() ? std::vector<Tensor>{halves_[5], halves_[6], halves_[7]}
                             : std::vector<Tensor>{halves_[3], stats_};
    }

    using Places = std::unordered_map<int64_t, void*>;

    // Row i of a head of the n-th tensor.
    __nv_bfloat16* row(const Places& places, int n, int64_t head, int64_t i) const {
        const Tensor_attributes& t = *halves_[n];
        return (__nv_bfloat16*)places.at(t.uid) + head / t.dim[1] * t.stride[0] +
               head % t.dim[1] * t.stride[1] + i * t.stride[2];
    }
    static float dot(const __nv_bfloat16* a, const __nv_bfloat16* b, int64_t n) {
        float sum = 0.0f;
        for (int64_t d = 0; d < n; d++) sum += (float)a[d] * (float)b[d];
        return sum;
    }
    static float rounded(float x) {
        return (float)(__nv_bfloat16)x;
    }

    void forward(const Places& places, int64_t head) const {
        const int64_t T = halves_[0]->dim[2], hs = halves_[0]->dim[3];
        std::vector<float> s(T), sum(hs);
        for (int64_t i = 0; i < T; i++) {
            float largest = -INFINITY, total = 0.0f;
            for (int64_t j = 0; j <= i; j++) {
                s[j] = scale_ * dot(row(places, 0, head, i), row(places, 1, head, j), hs);
                largest = std::fmax(largest, s[j]);
            }
            for (int64_t j = 0; j <= i; j++) total += s[j] = std::exp(s[j] - largest);
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t j = 0; j <= i; j++)
                for (int64_t d = 0; d < hs; d++) sum[d] += rounded(s[j]) * (float)row(places, 2, head, j)[d];
            for (int64_t d = 0; d < hs; d++) row(places, 3, head, i)[d] = (__nv_bfloat16)(sum[d] / total);
            ((float*)places.at(stats_->uid))[head * T + i] = largest + std::log(total);
        }
    }

    void backward(const Places& places, float* workspace, int64_t head) const {
        const int64_t T = halves_[0]->dim[2], hs = halves_[0]->dim[3];
        const float* lse = (const float*)places.at(stats_->uid) + head * T;
        float* D = workspace + head * T;  // do . o
        std::vector<float> dq(T * hs), dk(T * hs), dv(T * hs);
        for (int64_t i = 0; i < T; i++) D[i] = dot(row(places, 4, head, i), row(places, 3, head, i), hs);
        for (int64_t i = 0; i < T; i++)
            for (int64_t j = 0; j <= i; j++) {
                const float p =
                    std::exp(scale_ * dot(row(places, 0, head, i), row(places, 1, head, j), hs) - lse[i]);
                const float ds =
                    rounded(scale_ * p * (dot(row(places, 4, head, i), row(places, 2, head, j), hs) - D[i]));
                for (int64_t d = 0; d < hs; d++) {
                    dq[i * hs + d] += ds * (float)row(places, 1, head, j)[d];
                    dk[j * hs + d] += ds * (float)row(places, 0, head, i)[d];
                    dv[j * hs + d] += rounded(p) * (float)row(places, 4, head, i)[d];
                }
            }
        for (int64_t i = 0; i < T; i++)
            for (int64_t d = 0; d < hs; d++) {
                row(places, 5, head, i)[d] = (__nv_bfloat16)dq[i * hs + d];
                row(places, 6, head, i)[d] = (__nv_bfloat16)dk[i * hs + d];
                row(places, 7, head, i)[d] = (__nv_bfloat16)dv[i * hs + d];
            }
    }
};

}  // namespace graph
}  // namespace cudnn_frontend
