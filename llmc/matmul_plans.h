// Which of cuBLASLt's algorithms computes a matrix product, and how that is found out.
//
// For one product cuBLASLt offers some twenty candidates (tile sizes, pipeline depths, pieces along the sum)
// in the order in which it guesses their speed. So at the first product of each kind all are timed, and the
// winner is kept: in memory, and in a file, so that the next run starts at once and computes the same bits. A
// product with an epilogue (GELU, a bias gradient) is timed against the plain product with separate kernels,
// too: it saves memory traffic, but cuBLASLt has fewer kernels for it, sometimes slower ones, on some GPUs
// none.
//
// Timing cannot be part of a CUDA graph: run one step before capturing. A product that is first met inside a
// capture gets the algorithm that cuBLASLt offers first.
#pragma once
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <compare>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "matmul_choices.h"

// ---------------------------------------------------------------------------------------------------------
// a product, as cuBLASLt sees it

// D (m x n) = op(A) op(B), sums in float over k, all column-major without gaps; then the epilogue.
struct Product {
    cudaDataType_t a_type, b_type, d_type;
    cublasOperation_t op_a, op_b;
    int m, n, k;
    bool accumulate;  // added to D, not put in its place
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;

    auto operator<=>(const Product&) const = default;
};

// Where its matrices are. Every pointer is a multiple of 16.
struct Operands {
    const void *a, *b;
    void* d;
    const void* bias = nullptr;  // [m], or the place for a bias gradient, [n]; of D's type
    void* aux = nullptr;         // GELU's argument, like D
    float* dbias = nullptr;      // [n]: what the caller adds a bias gradient to; restored after timing
    const float *a_scale = nullptr, *b_scale = nullptr;  // what FP8 operands are multiplied by
};

// Which of the two pointers an epilogue uses.
inline bool has_bias(cublasLtEpilogue_t epilogue) {
    return epilogue & (CUBLASLT_EPILOGUE_BIAS | CUBLASLT_EPILOGUE_BGRADB);
}
inline bool has_aux(cublasLtEpilogue_t epilogue) {
    constexpr int kAux = CUBLASLT_EPILOGUE_GELU_AUX & CUBLASLT_EPILOGUE_DGELU;
    return epilogue & kAux;
}

// Both operands are, or neither.
inline bool is_fp8(const Product& p) {
    return p.a_type == CUDA_R_8F_E4M3 || p.a_type == CUDA_R_8F_E5M2;
}

// Bytes of a number of this type; not for 8 bits, in which no result is.
inline size_t element_bytes(cudaDataType_t type) {
    return type == CUDA_R_32F ? 4 : 2;
}

inline std::string describe(const Product& p) {
    const auto type = [](cudaDataType_t t) {
        return t == CUDA_R_32F       ? "fp32"
               : t == CUDA_R_16BF    ? "bf16"
               : t == CUDA_R_8F_E4M3 ? "e4m3"
               : t == CUDA_R_8F_E5M2 ? "e5m2"
                                     : "?";
    };
    std::string text =
        format("%s %s %c%c %dx%dx%d to %s", type(p.a_type), type(p.b_type), p.op_a == CUBLAS_OP_T ? 'T' : 'N',
               p.op_b == CUBLAS_OP_T ? 'T' : 'N', p.m, p.n, p.k, type(p.d_type));
    if (p.accumulate) text += ", added";
    switch (p.epilogue) {
        case CUBLASLT_EPILOGUE_BIAS:
            return text + ", bias";
        case CUBLASLT_EPILOGUE_GELU_AUX:
            return text + ", gelu";
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
            return text + ", bias, gelu";
        case CUBLASLT_EPILOGUE_DGELU:
            return text + ", gelu backward";
        case CUBLASLT_EPILOGUE_BGRADB:
            return text + ", bias gradient";
        default:
            return text;
    }
}

// ---------------------------------------------------------------------------------------------------------
// an algorithm, and what its times depend on

// In the order of AlgorithmConfig.
inline constexpr cublasLtMatmulAlgoConfigAttributes_t kConfigAttributes[] = {
    CUBLASLT_ALGO_CONFIG_ID,
    CUBLASLT_ALGO_CONFIG_TILE_ID,
    CUBLASLT_ALGO_CONFIG_STAGES_ID,
    CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
    CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING,
    CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION,
    CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID,
    CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID,
};

inline AlgorithmConfig config_of(const cublasLtMatmulAlgo_t& algorithm) {
    AlgorithmConfig config{};
    for (size_t i = 0; i < config.size(); i++) {
        const cublasLtMatmulAlgoConfigAttributes_t attribute = kConfigAttributes[i];
        const bool is_short = attribute == CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID ||
                              attribute == CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID;
        size_t written = 0;
        uint16_t half = 0;
        const cublasStatus_t status =
            is_short
                ? cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &half, sizeof half, &written)
                : cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &config[i], sizeof config[i],
                                                       &written);
        if (is_short) config[i] = half;
        if (status != CUBLAS_STATUS_SUCCESS) config[i] = 0;  // the algorithm does not have this attribute
    }
    return config;
}

// What times depend on: a file of choices serves this device, and this version of the libraries.
inline std::string matmul_timings_made_on() {
    int device = 0, driver = 0;
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&prop, device));
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    return format("%s, compute capability %d.%d, cuBLASLt %zu, driver %d", prop.name, prop.major, prop.minor,
                  cublasLtGetVersion(), driver);
}

// ---------------------------------------------------------------------------------------------------------
// plans

struct MatmulPlan {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, d;
    cublasLtMatmulAlgo_t algorithm{};
    size_t candidates = 0;  // 0: cuBLASLt cannot do this product
    std::string refusal;    // and what it said
    MatmulChoice choice;
    bool separate = true;  // do it in separate steps
};

// One of cuBLASLt's proposals. (A vector of the bare cublasLtMatmulAlgo_t crashes nvcc 13.)
struct Candidate {
    cublasLtMatmulAlgo_t algorithm;
    AlgorithmConfig config;
};

struct MatmulPlans {
    std::map<Product, MatmulPlan> plans;
    bool choices_read = false;
    std::string made_on, choices_path;
    MatmulChoices choices;
};

inline MatmulPlan describe_to_cublaslt(const Product& p) {
    MatmulPlan plan;
    const auto layout = [](cublasLtMatrixLayoutOpaque_t& to, cudaDataType_t type, int rows, int cols) {
        CUBLAS_CHECK(cublasLtMatrixLayoutInit(&to, type, (uint64_t)rows, (uint64_t)cols, rows));
    };
    const bool transpose_a = p.op_a == CUBLAS_OP_T, transpose_b = p.op_b == CUBLAS_OP_T;
    layout(plan.a, p.a_type, transpose_a ? p.k : p.m, transpose_a ? p.m : p.k);
    layout(plan.b, p.b_type, transpose_b ? p.n : p.k, transpose_b ? p.k : p.n);
    layout(plan.d, p.d_type, p.m, p.n);

    // Sums in float. CUBLAS_COMPUTE_32F also means that float operands are multiplied as floats, not as TF32.
    CUBLAS_CHECK(cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, attribute, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)p.op_a);
    set(CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)p.op_b);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)p.epilogue);
    if (has_aux(p.epilogue)) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)p.m);
    return plan;
}

inline cublasStatus_t launch_product(const Context& ctx, MatmulPlan& plan,
                                     const cublasLtMatmulAlgo_t& algorithm, const Product& p,
                                     const Operands& o) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o.bias,
                                                sizeof o.bias));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                                &o.aux, sizeof o.aux));
    if (is_fp8(p)) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                                    &o.a_scale, sizeof o.a_scale));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                                                    &o.b_scale, sizeof o.b_scale));
    }
    const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
    return cublasLtMatmul(ctx.cublaslt, &plan.operation, &alpha, o.a, &plan.a, o.b, &plan.b, &beta, o.d,
                          &plan.d, o.d, &plan.d, &algorithm, ctx.matmul_workspace, ctx.matmul_workspace_bytes,
                          ctx.stream);
}

// What cuBLASLt offers, its best guess first; none where it cannot do the product.
//
// A product may be cut along the sum (split-K): several blocks each sum a part, which keeps the GPU busy
// where D is small. How the parts come together is the reduction scheme. Allowed are those that keep the
// parts in the workspace and add them in a second step, in a fixed order: COMPUTE_TYPE, and OUTPUT_TYPE where
// D is float too, for bf16 parts would be rounded one by one. INPLACE lets the blocks add to D as they
// finish: the documentation promises that one goes after the other, but not in which order, and each addition
// rounds.
inline std::vector<Candidate> find_candidates(const Context& ctx, MatmulPlan& plan, const Product& p) {
    // The pointers' alignment counts here, not where they point to: 16 bytes is what all callers keep, and as
    // much as any algorithm asks for.
    constexpr uint32_t alignment = 16;
    const uintptr_t bias = has_bias(p.epilogue) ? alignment : 0, aux = has_aux(p.epilogue) ? alignment : 0;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                                sizeof bias));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                                &aux, sizeof aux));
    // What it offers for FP8 operands without scales need not run with them, so it has to know of them.
    if (is_fp8(p))
        for (auto scale : {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER}) {
            const uintptr_t somewhere = alignment;
            CUBLAS_CHECK(
                cublasLtMatmulDescSetAttribute(&plan.operation, scale, &somewhere, sizeof somewhere));
        }

    cublasLtMatmulPreferenceOpaque_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)ctx.matmul_workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           (uint32_t)(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
                      (p.d_type == CUDA_R_32F ? CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE : 0)));
    for (auto matrix :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        prefer(matrix, alignment);

    cublasLtMatmulHeuristicResult_t results[20];
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(ctx.cublaslt, &plan.operation, &plan.a, &plan.b, &plan.d, &plan.d,
                                       &preference, (int)std::size(results), results, &count);
    // the two answers to a combination of types and epilogue that it does not have
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
        count = 0;
    else
        CUBLAS_CHECK(status);
    std::vector<Candidate> candidates;
    for (int i = 0; i < count; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
        const Candidate one{results[i].algo, config_of(results[i].algo)};
        if (std::none_of(candidates.begin(), candidates.end(),
                         [&](const Candidate& other) { return other.config == one.config; }))
            candidates.push_back(one);
    }
    if (candidates.empty()) plan.refusal = format("no algorithm, %s", cublasLtGetStatusName(status));
    return candidates;
}

// ---------------------------------------------------------------------------------------------------------
// timing

// Holds a copy of device memory while the work that adds to it is repeated, and then puts it back. (Timing on
// other memory would need as much.)
class Restored {
  public:
    Restored(const Context& ctx, void* at, size_t bytes) : ctx_(ctx), at_(at), bytes_(bytes) {
        if (bytes == 0) return;
        if (cudaMalloc(&copy_, bytes) != cudaSuccess) {
            cudaGetLastError();
            return;
        }
        CUDA_CHECK(cudaMemcpyAsync(copy_, at_, bytes_, cudaMemcpyDeviceToDevice, ctx_.stream));
    }
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;
    ~Restored() {
        if (!copy_) return;
        cudaMemcpyAsync(at_, copy_, bytes_, cudaMemcpyDeviceToDevice, ctx_.stream);
        cudaStreamSynchronize(ctx_.stream);
        cudaFree(copy_);
    }

    bool possible() const { return bytes_ == 0 || copy_ != nullptr; }

  private:
    const Context& ctx_;
    void *at_, *copy_ = nullptr;
    size_t bytes_;
};

// Microseconds of one work(), as the mean of `repetitions`.
template <class Work>
float mean_us(const Context& ctx, int repetitions, Work work) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CUDA_CHECK(cudaEventRecord(begin, ctx.stream));
    for (int i = 0; i < repetitions; i++) work();
    CUDA_CHECK(cudaEventRecord(end, ctx.stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return std::max(ms * 1e3f / (float)repetitions, 1e-3f);
}

// The least microseconds of each of `count` works, work(i), in three rounds that go through all of them, so
// that a GPU that warms up is not held against the last. A work that returns false cannot be done: INFINITY.
template <class Work>
std::vector<float> least_us(const Context& ctx, size_t count, Work work) {
    std::vector<float> us(count);
    for (size_t i = 0; i < count; i++) us[i] = work(i) ? 1e9f : INFINITY;  // and its code is loaded
    for (int round = 0; round < 3; round++) {
        const float best = count > 0 ? *std::min_element(us.begin(), us.end()) : 0;
        for (size_t i = 0; i < count; i++) {
            if (!std::isfinite(us[i]) || us[i] > 1.3f * best) continue;
            const int repetitions = round == 0 ? 2 : std::clamp((int)(2000.0f / us[i]), 2, 20);
            us[i] = std::min(us[i], mean_us(ctx, repetitions, [&] { work(i); }));
        }
    }
    return us;
}

// The fastest; of several within 1% of it the first, so that noise seldom decides.
inline size_t fastest(const std::vector<float>& us) {
    const float least = *std::min_element(us.begin(), us.end());
    size_t i = 0;
    while (us[i] > 1.01f * least) i++;
    return i;
}

// Times the candidates and, if `comparable`, the same work in separate steps. Returns false where that is not
// possible: in a capture, where there is no memory to save what the work adds to, or if no candidate runs.
template <class Finish, class Separate>
bool time_candidates(const Context& ctx, MatmulPlan& plan, const Product& p, const Operands& o,
                     const std::vector<Candidate>& candidates, bool comparable, Finish finish,
                     Separate separate) {
    cudaStreamCaptureStatus capturing;
    CUDA_CHECK(cudaStreamIsCapturing(ctx.stream, &capturing));
    if (capturing != cudaStreamCaptureStatusNone) return false;
    const Restored d(ctx, o.d, p.accumulate ? (size_t)p.m * p.n * element_bytes(p.d_type) : 0);
    const Restored dbias(ctx, o.dbias, o.dbias ? p.n * sizeof(float) : 0);
    if (!d.possible() || !dbias.possible()) return false;

    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const std::vector<float> us = least_us(ctx, candidates.size(), [&](size_t i) {
        status = launch_product(ctx, plan, candidates[i].algorithm, p, o);
        return status == CUBLAS_STATUS_SUCCESS;
    });
    const size_t best = fastest(us);
    if (!std::isfinite(us[best])) {
        plan.candidates = 0;
        plan.refusal =
            format("none of %zu algorithms runs, %s", candidates.size(), cublasLtGetStatusName(status));
        return false;
    }
    plan.algorithm = candidates[best].algorithm;
    plan.choice = {candidates[best].config, us[best], std::isfinite(us[0]) ? us[0] : 0.0f, 0.0f};
    if (comparable) {
        const std::vector<float> both = least_us(ctx, 2, [&](size_t i) {
            if (i == 1) {
                separate();
                return true;
            }
            const bool done = launch_product(ctx, plan, plan.algorithm, p, o) == CUBLAS_STATUS_SUCCESS;
            finish();
            return done;
        });
        plan.choice.us = both[0];
        plan.choice.separate_us = both[1];
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------
// running a product

// The plan for a product. `separate` does without the epilogue what launch_product() and then `finish` do;
// comparable: there is such a way.
template <class Finish, class Separate>
MatmulPlan& matmul_plan(const Context& ctx, const Product& p, const Operands& o, bool comparable,
                        Finish finish, Separate separate) {
    if (!ctx.matmuls) ctx.matmuls = std::make_shared<MatmulPlans>();
    MatmulPlans& known = *ctx.matmuls;
    if (const auto found = known.plans.find(p); found != known.plans.end()) return found->second;

    MatmulPlan plan = describe_to_cublaslt(p);
    const std::vector<Candidate> candidates = find_candidates(ctx, plan, p);
    plan.candidates = candidates.size();
    if (!candidates.empty()) {
        plan.algorithm = candidates[0].algorithm;
        plan.choice.algorithm = candidates[0].config;
        plan.separate = false;
    }
    if (ctx.tune_matmuls && !candidates.empty() && (candidates.size() > 1 || comparable)) {
        if (!known.choices_read) {
            known.choices_read = true;
            known.made_on = matmul_timings_made_on();
            known.choices_path = matmul_choices_path(known.made_on);
            if (!known.choices_path.empty())
                known.choices = read_matmul_choices(known.choices_path, known.made_on);
        }
        const std::string name = describe(p);
        const auto choice = known.choices.find(name);
        const auto chosen = std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& one) {
            return choice != known.choices.end() && one.config == choice->second.algorithm;
        });
        if (chosen != candidates.end() && (choice->second.separate_us > 0) == comparable) {
            plan.algorithm = chosen->algorithm;
            plan.choice = choice->second;
        } else if (time_candidates(ctx, plan, p, o, candidates, comparable, finish, separate)) {
            known.choices[name] = plan.choice;
            if (!known.choices_path.empty())
                write_matmul_choices(known.choices_path, known.made_on, known.choices);
        }
        plan.separate = plan.candidates == 0 || plan.choice.separate();
    }
    return known.plans[p] = plan;
}

// The product alone, or with an epilogue that every GPU has.
inline void run_product(const Context& ctx, const Product& p, const Operands& o) {
    const auto nothing = [] {};
    MatmulPlan& plan = matmul_plan(ctx, p, o, false, nothing, nothing);
    if (plan.candidates == 0)
        fail("cuBLASLt cannot do the matrix product %s here: %s", describe(p).c_str(), plan.refusal.c_str());
    CUBLAS_CHECK(launch_product(ctx, plan, plan.algorithm, p, o));
}

// The product with its epilogue, and then finish(); or separate(), where cuBLASLt does not have that epilogue
// or is slower with it.
template <class Finish, class Separate>
void run_fused(const Context& ctx, const Product& p, const Operands& o, Finish finish, Separate separate) {
    MatmulPlan* plan = ctx.fuse_matmuls ? &matmul_plan(ctx, p, o, true, finish, separate) : nullptr;
    if (!plan || plan->separate) {
        separate();
    } else {
        CUBLAS_CHECK(launch_product(ctx, *plan, plan->algorithm, p, o));
        finish();
    }
}

// One line for each product that was met: who computes it, and how fast.
inline std::string matmul_report(const Context& ctx) {
    std::string text;
    if (!ctx.matmuls) return text;
    for (const auto& [p, plan] : ctx.matmuls->plans) {
        const MatmulChoice& c = plan.choice;
        text += describe(p) + ": ";
        if (plan.candidates == 0) {
            text += "separate kernels, cuBLASLt does not have it\n";
            continue;
        }
        const auto time = [](float us) { return us > 0 ? format("%.1f us", us) : std::string("not timed"); };
        text += plan.separate ? "separate kernels, " + time(c.separate_us) + "; fused " + time(c.us)
                              : format("algorithm %d, tile %d, stages %d, split %d, ", c.algorithm[0],
                                       c.algorithm[1], c.algorithm[2], c.algorithm[3]) +
                                    time(c.us);
        if (!plan.separate && c.us > 0)
            text += format(" (%.0f TFLOP/s)", 2.0 * p.m * p.n * p.k / (double)c.us * 1e-6);
        if (!plan.separate && c.separate_us > 0) text += "; separate kernels " + time(c.separate_us);
        text += format("; first of %zu offered %s\n", plan.candidates, time(c.guess_us).c_str());
    }
    return text;
}
