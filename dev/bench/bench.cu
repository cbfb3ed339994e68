// Measures the training engine on the machine at hand: what the machine can do, each kernel against that,
// attention over k and T, and whole training steps, the trainer's own. README.md beside this says how to run
// it and how each figure is counted.
//
// A kernel's floor is the larger of two times: the bytes that it cannot avoid to move (each input read once,
// each output written once) at the bandwidth of a large copy, and its FLOPs at the rate of a large matrix
// product, both measured in the same run. Every result is written to the files as soon as it is there, so a
// run that is cut off leaves what it had.
#define NO_MAIN
#include <set>

#include "../../train_gpt2.cu"
#include "measure.cuh"

using bf16 = __nv_bfloat16;

// ---------------------------------------------------------------------------------------------------------
// settings

enum class Only { everything, kernels, attention, steps };
constexpr const char* kOnlyWords[] = {"everything", "kernels", "attention", "steps"};

struct BenchConfig {
    std::string size = kOnCpu ? "tiny" : "124M";
    int B = -1, T = -1;
    std::string out;
    double budget = 0;  // seconds; 0: no limit
    Only only = Only::everything;
    bool quick = false;
};

std::vector<Flag> bench_flags(BenchConfig& c) {
    return {
        {'e', "size", "SIZE", c.size, "model: 124M, 355M, 774M, 1558M; for the CPU tiny or small",
         [&c](auto&, auto& v) { c.size = v; }},
        {'b', "batch", "B", kOnCpu ? "4" : "64",
         "batch rows; fewer where memory is short, and at other T so many that B times T stays",
         [&c](auto& flag, auto& v) { c.B = (int)parse_int(flag, v, 1, 4096); }},
        {'t', "context", "T", kOnCpu ? "64" : "1024", "context length",
         [&c](auto& flag, auto& v) { c.T = (int)parse_int(flag, v, 4, 16384); }},
        {'o', "out", "DIR", kOnCpu ? "build" : "dev/bench",
         "folder for the two files, DEVICE_DATE.md and DEVICE_DATE.json; made if it is not there",
         [&c](auto&, auto& v) { c.out = v; }},
        {0, "budget", "SECONDS", "none", "skip what would not end within this time, and say so",
         [&c](auto& flag, auto& v) { c.budget = parse_float(flag, v, 1, 1e6); }},
        choice_flag("only", kOnlyWords, c.only, "the part that is measured"),
        {0, "quick", "", "", "fewer repetitions; attention with k = 0 and 8, steps of one size and one T",
         [&c](auto&, auto&) { c.quick = true; }},
        help_flag(
            "Measures the machine, each kernel, attention and whole training steps.\n\n    make bench BENCH=\"--quick\"\n\n",
            [] {
                BenchConfig defaults;
                return bench_flags(defaults);
            }),
    };
}

// ---------------------------------------------------------------------------------------------------------
// data

// Queries, keys and values whose scores rise with the key's position, from about 0 to 8, with noise: nearly
// every new key then belongs to the top k, the most work that tracking can have.
__global__ void fill_rising_kernel(bf16* qkv, size_t n, int T, int C, uint64_t seed) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int part = (int)(i % (3 * (size_t)C) / C), t = (int)(i / (3 * (size_t)C) % T);
    const float mean = part == 0 ? 1.0f : part == 1 ? (float)t / (float)T : 0.0f;
    qkv[i] = (bf16)(mean + 0.25f * noise(seed, i));
}

__global__ void round_kernel(bf16* out, const float* in, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (bf16)in[i];
}

// Tokens whose frequencies fall as 1 / rank, about as in text: the embedding's backward depends on them.
std::vector<int> text_like_tokens(size_t n, int vocab_size, uint64_t seed) {
    std::vector<int> tokens(n);
    for (size_t i = 0; i < n; i++) {
        const double rank = std::exp(random_uniform(seed, 0, i) * std::log((double)vocab_size));
        tokens[i] = std::min((int)rank, vocab_size) - 1;
    }
    return tokens;
}

// ---------------------------------------------------------------------------------------------------------
// a run of the benchmark

// What the machine can do, measured.
struct Machine {
    double copy = 0;    // bytes a second, read and written ones together
    double matmul = 0;  // FLOPs a second

    double floor_ms(double bytes, double flops) const { return 1e3 * std::max(bytes / copy, flops / matmul); }
};

struct Bench : Measuring {
    BenchConfig config;
    Machine machine;
    double nominal_peak = 0;  // bf16 FLOPs a second by the data sheet; 0: not known

    bool runs(Only part) const { return config.only == Only::everything || config.only == part; }
};

// ---------------------------------------------------------------------------------------------------------
// the machine

void measure_machine(Bench& b) {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));

    // First the product: it also brings the clocks up.
    const int n = kOnCpu ? 128 : free_bytes > (size_t)1 << 30 ? 8192 : 4096;
    Timing product;
    {
        const DeviceArray<bf16> inp((size_t)n * n), weight((size_t)n * n), out((size_t)n * n);
        fill(b.ctx, inp, 1);
        fill(b.ctx, weight, 2);
        const auto multiply = [&] { matmul_forward<bf16>(b.ctx, out, inp, weight, nullptr, n, n, n); };
        multiply();
        for (const double start = seconds_now(); seconds_now() - start < (kOnCpu ? 0.01 : 0.5);) {
            multiply();
            CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
        }
        product = time_work(b, multiply);
    }
    const double flops = 2.0 * n * n * n;
    b.machine.matmul = flops / product.least_ms * 1e3;

    b.machine.copy = measure_copy(b);
    b.report.print(
        format("- bf16 product of %d x %d x %d random numbers: %.1f TFLOP/s (best of %d; median %.1f)\n", n,
               n, n, b.machine.matmul * 1e-12, product.runs, flops / product.ms * 1e-9));
    if (b.nominal_peak > 0)
        b.report.print(format("- bf16 by the data sheet: %.1f TFLOP/s\n", b.nominal_peak * 1e-12));
    b.report.json["machine"].update({{"matmul_flops_per_s", b.machine.matmul},
                                     {"matmul_size", n},
                                     {"matmul_median_ms", product.ms},
                                     {"nominal_flops_per_s", b.nominal_peak}});
    b.report.save();
}

// Dense bf16 with sums in float, from the makers' data sheets, at boost clock. Longer names come first.
double nominal_bf16_flops(const std::string& device) {
    constexpr std::pair<const char*, double> known[] = {
        {"H100 PCIe", 756.5e12}, {"H100 80GB HBM3", 989.4e12}, {"H200", 989.4e12},
        {"A100", 312e12},        {"RTX 4090", 165.2e12},       {"RTX 3090", 71e12},
    };
    for (const auto& [name, flops] : known)
        if (device.find(name) != device.npos) return flops;
    return 0;
}

// ---------------------------------------------------------------------------------------------------------
// kernels

struct Cost {
    double bytes, flops;
};

// The table of kernels and the sum of what they take in one step.
struct KernelTable {
    Bench& b;
    Table table;
    nlohmann::ordered_json& rows;
    double step_ms = 0, step_floor_ms = 0;

    // calls: how often one micro-step and update runs it; 0: it is part of another row.
    template <class Prepare, class Work>
    void row(const std::string& name, int calls, Cost cost, Prepare prepare, Work work) {
        const Timing t = time_work(b, prepare, work);
        const double floor = b.machine.floor_ms(cost.bytes, cost.flops);
        step_ms += calls * t.ms;
        step_floor_ms += calls * floor;
        table.row({name, format("%.4f", t.ms), format("%.4f", floor), format("%.2f", t.ms / floor),
                   format("%.0f", cost.bytes / t.ms * 1e-6),
                   cost.flops > 0 ? format("%.1f", cost.flops / t.ms * 1e-9) : "",
                   calls > 0 ? std::to_string(calls) : "", calls > 0 ? format("%.3f", calls * t.ms) : ""});
        rows.push_back({{"name", name},
                        {"ms", t.ms},
                        {"least_ms", t.least_ms},
                        {"runs", t.runs},
                        {"bytes", cost.bytes},
                        {"flops", cost.flops},
                        {"floor_ms", floor},
                        {"ratio", t.ms / floor},
                        {"calls", calls}});
    }
    template <class Work>
    void row(const std::string& name, int calls, Cost cost, Work work) {
        row(
            name, calls, cost, [] {}, work);
    }
    template <class Measure>
    void attempt(const std::string& name, Measure measure) {
        ::attempt(b, table, name, rows, 2, measure);
    }
};

void bench_encoder(KernelTable& k, const GPT2Config& config, int B, int T) {
    const Context& ctx = k.b.ctx;
    const size_t BT = (size_t)B * T, C = config.channels;
    const std::vector<int> tokens = text_like_tokens(BT, config.vocab_size, 5);
    const std::vector<int> plan = plan_tokens(tokens.data(), (int)BT, config.vocab_size);
    const double distinct = (double)std::set<int>(tokens.begin(), tokens.end()).size();
    const DeviceArray<int> inputs(BT), device_plan(plan.size());
    to_device<int>(inputs, tokens.data(), BT);
    to_device<int>(device_plan, plan.data(), plan.size());
    const DeviceArray<bf16> wte((size_t)config.padded_vocab_size * C), wpe((size_t)T * C), out(BT * C);
    const DeviceArray<float> dwte(wte.size()), dwpe(wpe.size()),
        scratch(encoder_backward_scratch((int)BT, (int)C));
    fill(ctx, wte, 1, 0.02f);
    fill(ctx, wpe, 2, 0.02f);
    fill(ctx, dwte, 3);
    fill(ctx, dwpe, 4);

    // tokens, the distinct tokens' rows of wte, wpe; out
    k.row("encoder forward", 1, {4.0 * BT + 2.0 * C * (distinct + T) + 2.0 * BT * C, 0},
          [&] { encoder_forward<bf16>(ctx, out, inputs, wte, wpe, B, T, (int)C); });
    // dout, the positions in order; the distinct tokens' rows of dwte, and dwpe, read and written
    k.row("encoder backward", 1, {2.0 * BT * C + 4.0 * BT + 8.0 * C * (distinct + T), 0},
          [&] { encoder_backward<bf16>(ctx, dwte, dwpe, scratch, out, device_plan, B, T, (int)C); });
}

void bench_layernorm(KernelTable& k, const GPT2Config& config, int B, int T) {
    const Context& ctx = k.b.ctx;
    const int rows = B * T, C = config.channels, L = config.num_layers;
    const double row_bytes = 2.0 * rows * C;
    const DeviceArray<bf16> inp((size_t)rows * C), residual(inp.size()), sum(inp.size()), out(inp.size()),
        weight(C), bias(C);
    const DeviceArray<float> mean(rows), rstd(rows), dweight(3 * C), scratch(column_sum_scratch(ctx, 4 * C));
    fill(ctx, inp, 1);
    fill(ctx, residual, 2);
    fill(ctx, weight, 3);
    fill(ctx, bias, 4);
    fill(ctx, dweight, 5);

    // in, out; mean and rstd
    k.row("layernorm forward", 1, {2 * row_bytes + 8.0 * rows, 0}, [&] {
        layernorm_forward<bf16>(ctx, out, mean, rstd, nullptr, nullptr, inp, weight, bias, rows, C);
    });
    // residual, in, sum, out; mean and rstd
    k.row("residual + layernorm forward", 2 * L, {4 * row_bytes + 8.0 * rows, 0},
          [&] { layernorm_forward<bf16>(ctx, out, mean, rstd, sum, residual, inp, weight, bias, rows, C); });
    // dout, in, dinp read and written; mean and rstd. With the gradient of the bias in front of it.
    k.row("layernorm backward, bias", 2 * L + 1, {4 * row_bytes + 8.0 * rows, 0}, [&] {
        layernorm_backward<bf16>(ctx, out, dweight, dweight + C, dweight + 2 * C, scratch, residual, inp,
                                 weight, mean, rstd, rows, C);
    });
}

// One linear layer of the model. gelu_after: fc, whose forward takes GELU; gelu_before: fcproj, whose
// backward goes on through it.
struct Linear {
    const char* name;
    int IC, OC, calls;
    bool bias, gelu_after, gelu_before;
};

void bench_linear(KernelTable& k, const Linear& l, int B, int T) {
    const Context& ctx = k.b.ctx;
    const int rows = B * T;
    const double inp_bytes = 2.0 * rows * l.IC, out_bytes = 2.0 * rows * l.OC, weights = (double)l.IC * l.OC;
    const double flops = 2.0 * rows * weights;
    const DeviceArray<bf16> inp((size_t)rows * l.IC), out((size_t)rows * l.OC), weight((size_t)l.IC * l.OC),
        bias(l.OC);
    const DeviceArray<bf16> other((size_t)rows * (l.gelu_after ? l.OC : l.IC));  // before GELU, or dinp
    const DeviceArray<bf16> pre_gelu(l.gelu_before ? (size_t)rows * l.IC : 8);
    const DeviceArray<float> dweight(weight.size()), dbias(l.OC), scratch(column_sum_scratch(ctx, l.OC));
    fill(ctx, inp, 1);
    fill(ctx, out, 2);
    fill(ctx, weight, 3, 0.02f);
    fill(ctx, bias, 4, 0.02f);
    fill(ctx, pre_gelu, 5);
    fill(ctx, dweight, 6);
    fill(ctx, dbias, 7);
    bf16* const bias_or_none = l.bias ? (bf16*)bias : nullptr;
    // the other layers' come from layernorm's and attention's backward
    float* const dbias_or_none = l.gelu_after ? (float*)dbias : nullptr;
    const std::string name = l.name;

    // in, weight; out, and with GELU its argument
    if (l.gelu_after)
        k.row(name + " forward, bias, GELU", l.calls, {inp_bytes + 2 * weights + 2 * out_bytes, flops}, [&] {
            matmul_gelu_forward<bf16>(ctx, out, other, inp, weight, bias_or_none, rows, l.IC, l.OC);
        });
    else
        k.row(name + (l.bias ? " forward, bias" : " forward"), l.calls,
              {inp_bytes + 2 * weights + out_bytes, flops},
              [&] { matmul_forward<bf16>(ctx, out, inp, weight, bias_or_none, rows, l.IC, l.OC); });

    // dout, in; dweight, a float, read and written
    const Cost parameters{out_bytes + inp_bytes + 8 * weights, flops};
    const char* parameters_name = dbias_or_none ? " backward, weights and bias" : " backward, weights";
    if (l.gelu_before) {
        // dout, weight, GELU's argument; dinp; and the weights' part
        k.row(name + " backward, all, with GELU's", l.calls,
              {parameters.bytes + out_bytes + 2 * weights + 2 * inp_bytes, 2 * flops}, [&] {
                  matmul_gelu_backward<bf16>(ctx, other, dweight, dbias_or_none, scratch, out, inp, pre_gelu,
                                             weight, rows, l.IC, l.OC);
              });
    } else {
        const DeviceArray<bf16> dinp((size_t)rows * l.IC);
        // dout, weight; dinp
        k.row(name + " backward, data", l.calls, {out_bytes + 2 * weights + inp_bytes, flops},
              [&] { matmul_input_backward<bf16>(ctx, dinp, out, weight, rows, l.IC, l.OC); });
    }
    k.row(name + parameters_name, l.gelu_before ? 0 : l.calls, parameters, [&] {
        matmul_parameters_backward<bf16>(ctx, dweight, dbias_or_none, scratch, out, inp, rows, l.IC, l.OC);
    });

    // --precision fp8: the product and all that rounding its operands takes. Bytes as if that took none,
    // FLOPs against the rate of bf16.
    if (!ctx.has_fp8 || !l.bias || rows % kFp8Multiple) return;
    const DeviceArray<uint8_t> a(std::max(inp.size(), weight.size())), b(std::max(inp.size(), out.size())),
        b_t(out.size());
    const DeviceArray<Fp8Scale> scales(3);
    const DeviceArray<bf16> dinp(inp.size());
    const Fp8Buffers f{a, b, b_t, scales};
    k.row(name + " forward, bias, fp8", 0, {inp_bytes + 2 * weights + out_bytes, flops},
          [&] { linear_forward<bf16>(ctx, f, out, inp, weight, bias, rows, l.IC, l.OC); });
    k.row(name + " backward, all, fp8", 0, {2 * out_bytes + 2 * inp_bytes + 10 * weights, 2 * flops}, [&] {
        linear_backward<bf16>(ctx, f, dinp, dweight, dbias_or_none, scratch, out, inp, weight, rows, l.IC,
                              l.OC);
    });
}

void bench_classifier(KernelTable& k, const GPT2Config& config, int B, int T) {
    const Context& ctx = k.b.ctx;
    const int rows = B * T, V = config.vocab_size, Vp = config.padded_vocab_size;
    const std::vector<int> tokens = text_like_tokens(rows, V, 6);
    const DeviceArray<int> targets(rows);
    to_device<int>(targets, tokens.data(), tokens.size());
    const DeviceArray<bf16> logits((size_t)rows * Vp);
    const DeviceArray<float> losses(rows);
    // logits read and written; targets, losses
    k.row(
        "classifier, loss and gradient", 1, {4.0 * rows * Vp + 8.0 * rows, 0}, [&] { fill(ctx, logits, 1); },
        [&] { classifier<bf16>(ctx, losses, logits, targets, 1.0f / (float)rows, rows, V, Vp, true); });
}

void bench_optimizer(KernelTable& k, const GPT2Config& config) {
    const Context& ctx = k.b.ctx;
    const size_t n = num_parameters(config);
    const DeviceArray<bf16> weight(n);
    const DeviceArray<float> master(n), m(n), v(n), grad(n), scratch(kGradNormBlocks);
    const std::vector<uint32_t> bits = decay_bits(gpt2_params(config));
    const DeviceArray<uint32_t> device_bits(bits.size());
    to_device<uint32_t>(device_bits, bits.data(), bits.size());
    const DeviceArray<GradNorm> norm(1);
    fill(ctx, master, 1, 0.02f);
    fill(ctx, grad, 2, 1e-3f);
    fill<float>(ctx, m, n, 3, 0.0f, 1e-3f);
    fill<float>(ctx, v, n, 4, 1e-6f, 0.0f);
    const AdamW a{.lr = 0, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f};
    // the gradient
    k.row("gradient norm", 1, {4.0 * n, 0}, [&] { grad_norm(ctx, norm, scratch, grad, n, 1.0f); });
    // master, m, v read and written, the gradient read, the bf16 weight written
    k.row("AdamW", 1, {30.0 * n, 0},
          [&] { adamw_update<bf16>(ctx, weight, master, m, v, grad, device_bits, norm, n, a, 10); });
}

// What attention computes with, and its results; T is the context, the rows are B times T.
struct AttentionBuffers {
    DeviceArray<bf16> qkv, out, dout, dqkv;
    DeviceArray<float> row_values, scratch, weight, dbias;

    AttentionBuffers(const Context& ctx, const GPT2Config& c, int B, int T, size_t least_scratch = 0)
        : qkv((size_t)B * T * 3 * c.channels),
          out((size_t)B * T * c.channels),
          dout(out.size()),
          dqkv(qkv.size()),
          row_values(4 * (size_t)B * T * c.num_heads),
          scratch(std::max(attention_backward_scratch<bf16>(ctx, B, T, c.num_heads, c.head_size()),
                           least_scratch)),
          weight(1),
          dbias(3 * c.channels) {
        const float lambda_over_rows =
            0.1f / ((float)B * (float)T * (float)c.num_heads * (float)c.num_layers);
        to_device<float>(weight, &lambda_over_rows, 1);
    }
    AttentionRows rows() const {
        const size_t n = row_values.size() / 4;
        return {row_values, row_values + n, row_values + 2 * n, row_values + 3 * n};
    }
};

// FLOPs of the products over the causal half of the T x T scores: two forward, five backward (the scores are
// computed again). Bytes: qkv, out and lse forward; qkv, out, dout, dqkv and lse backward; with k three more
// floats a row.
struct AttentionCost {
    Cost forward, backward;
};
AttentionCost attention_cost(const GPT2Config& c, int B, int T, int topk) {
    const double BT = (double)B * T, C = c.channels, rows = BT * c.num_heads * 4 * (topk > 0 ? 4 : 1);
    const double product = 2.0 * BT * T * C / 2;
    return {{BT * C * 2 * 4 + rows, 2 * product}, {BT * C * 2 * 8 + rows, 5 * product}};
}

void run_attention_forward(const Context& ctx, const AttentionBuffers& a, const GPT2Config& c, int B, int T,
                           int topk) {
    attention_forward<bf16>(ctx, a.out, a.rows(), a.qkv, B, T, c.num_heads, c.head_size(), topk);
}
void run_attention_backward(const Context& ctx, const AttentionBuffers& a, const GPT2Config& c, int B, int T,
                            int topk) {
    const bool regularized = topk > 0 && topk < T;
    attention_backward<bf16>(ctx, a.dqkv, a.dbias, a.scratch, a.dout, a.out, a.qkv, a.rows(), Reg::tail,
                             regularized ? (const float*)a.weight : nullptr, B, T, c.num_heads, c.head_size(),
                             topk);
}

void bench_kernels(Bench& b, int B, int T) {
    const GPT2Config config = size_config(b.config.size, T);
    const int C = config.channels, L = config.num_layers;
    b.report.print(format(
        "\n## Kernels: %s, B = %d, T = %d, bf16\n\nThe floor is the larger of bytes over the copy bandwidth and FLOPs over the product's rate. "
        "Times are medians, each run with a cold L2.\n\n",
        b.config.size.c_str(), B, T));
    nlohmann::ordered_json& json = b.report.json["kernels"];
    json = {{"size", b.config.size}, {"B", B}, {"T", T}, {"rows", nlohmann::ordered_json::array()}};
    KernelTable k{b,
                  Table(b.report, {{"kernel", 36},
                                   {"ms", 9},
                                   {"floor ms", 9},
                                   {"ratio", 6},
                                   {"GB/s", 6},
                                   {"TFLOP/s", 7},
                                   {"calls", 5},
                                   {"ms a step", 9}}),
                  json["rows"]};
    k.attempt("encoder", [&] { bench_encoder(k, config, B, T); });
    k.attempt("layernorm", [&] { bench_layernorm(k, config, B, T); });
    for (const Linear& l :
         std::initializer_list<Linear>{{"qkv", C, 3 * C, L, true, false, false},
                                       {"attproj", C, C, L, true, false, false},
                                       {"fc", C, 4 * C, L, true, true, false},
                                       {"fcproj", 4 * C, C, L, true, false, true},
                                       {"logits", C, config.padded_vocab_size, 1, false, false, false}})
        k.attempt(l.name, [&] { bench_linear(k, l, B, T); });
    k.attempt("attention", [&] {
        const AttentionBuffers a(b.ctx, config, B, T);
        fill(b.ctx, a.qkv, 1);
        fill(b.ctx, a.dout, 2);
        const AttentionCost cost = attention_cost(config, B, T, 0);
        k.row("attention forward, lambda = 0", L, cost.forward,
              [&] { run_attention_forward(b.ctx, a, config, B, T, 0); });
        k.row("attention backward, lambda = 0", L, cost.backward,
              [&] { run_attention_backward(b.ctx, a, config, B, T, 0); });
    });
    k.attempt("classifier", [&] { bench_classifier(k, config, B, T); });
    k.attempt("optimizer", [&] { bench_optimizer(k, config); });
    b.report.print(format("\nSum over a step of the kernels above: %.2f ms, of their floors: %.2f ms.\n",
                          k.step_ms, k.step_floor_ms));
    json["step_ms"] = k.step_ms;
    json["step_floor_ms"] = k.step_floor_ms;

    const std::string chosen = matmul_report(b.ctx);
    b.report.markdown +=
        "\nWho computes each product (all that this run has met so far):\n\n```\n" + chosen + "```\n";
    json["products"] = chosen;
    b.report.save();
}

// ---------------------------------------------------------------------------------------------------------
// attention

// Throws where attention takes no such batch or context, so that a row says so.
void check_case(const Context& ctx, const GPT2Config& config, int B, int T, int topk) {
    check_batch_fits(B, T, config.num_heads);
    if (topk > 0 && T > max_topk_context(ctx))
        fail("the top k can be found in contexts of up to %d here", max_topk_context(ctx));
}

void bench_attention(Bench& b, int B, int T) {
    const std::vector<int> all_k = b.config.quick ? std::vector{0, 8} : std::vector{0, 1, 8, 16, 32, 64};
    struct Case {
        int B, T, topk;
        bool rising, cudnn = false;
    };
    std::vector<Case> cases;
    for (int topk : all_k) cases.push_back({B, T, topk, false});
    if (!b.config.quick) {
        for (int topk : {8, 64}) cases.push_back({B, T, topk, true});
        for (int other : {T / 4, T / 2, 2 * T, 4 * T})
            for (int topk : {0, 8}) cases.push_back({std::max(1, B * T / other), other, topk, false});
    }
    if (kUseCudnn) cases.push_back({B, T, 0, false, true});  // last: what is prepared for it stays
    b.report.print(format(
        "\n## Attention: %s, head size %d, bf16\n\nk = 0 is plain attention; otherwise the forward finds the top k and the backward adds the regularizer's gradient. "
        "TFLOP/s count the causal half: 2 products forward, 5 backward. Scores: normal, or rising with the key's position, the hardest for the top k%s.\n\n",
        b.config.size.c_str(), size_config(b.config.size, T).head_size(),
        kUseCudnn ? "; cuDNN: normal ones, by its kernels" : ""));
    Table table(b.report, {{"k", 3},
                           {"T", 5},
                           {"B", 4},
                           {"scores", 6},
                           {"forward ms", 10},
                           {"TFLOP/s", 7},
                           {"ratio", 6},
                           {"over k = 0", 10},
                           {"backward ms", 11},
                           {"TFLOP/s", 7},
                           {"ratio", 6},
                           {"over k = 0", 10},
                           {"both TFLOP/s", 12}});
    nlohmann::ordered_json& rows = b.report.json["attention"] = nlohmann::ordered_json::array();
    std::map<int, std::pair<double, double>> plain;  // by T: k = 0, forward and backward
    for (const Case& c : cases)
        attempt(b, table, std::to_string(c.topk), rows, 2, [&] {
            const GPT2Config config = size_config(b.config.size, c.T);
            check_case(b.ctx, config, c.B, c.T, c.topk);
            size_t cudnn_scratch = 0;
            if constexpr (kUseCudnn)
                if (c.cudnn)
                    cudnn_scratch =
                        prepare_attention_cudnn(b.ctx, c.B, c.T, config.num_heads, config.head_size());
            if (c.cudnn && cudnn_scratch == 0) return;  // it has said why
            const AttentionBuffers a(b.ctx, config, c.B, c.T, cudnn_scratch);
            if (c.rising) {
                fill_rising_kernel<<<(unsigned)ceil_div(a.qkv.size(), 256), 256, 0, b.ctx.stream>>>(
                    a.qkv, a.qkv.size(), c.T, config.channels, 1);
                CUDA_CHECK(cudaGetLastError());
            } else {
                fill(b.ctx, a.qkv, 1);
            }
            fill(b.ctx, a.dout, 2);
            const Timing f = time_work(b, [&] { run_attention_forward(b.ctx, a, config, c.B, c.T, c.topk); });
            const Timing r =
                time_work(b, [&] { run_attention_backward(b.ctx, a, config, c.B, c.T, c.topk); });
            const AttentionCost cost = attention_cost(config, c.B, c.T, c.topk);
            const auto ratio = [&](const Timing& t, const Cost& of) {
                return t.ms / b.machine.floor_ms(of.bytes, of.flops);
            };
            if (c.topk == 0 && !c.cudnn) plain[c.T] = {f.ms, r.ms};
            const auto over = [&](const Timing& t, double base) {
                return (c.topk > 0 || c.cudnn) && base > 0 ? format("%+.1f%%", 100 * (t.ms / base - 1))
                                                           : std::string();
            };
            const auto [plain_forward, plain_backward] = plain[c.T];
            table.row({std::to_string(c.topk), std::to_string(c.T), std::to_string(c.B),
                       c.cudnn    ? "cuDNN"
                       : c.rising ? "rising"
                                  : "normal",
                       format("%.4f", f.ms), format("%.1f", cost.forward.flops / f.ms * 1e-9),
                       format("%.2f", ratio(f, cost.forward)), over(f, plain_forward), format("%.4f", r.ms),
                       format("%.1f", cost.backward.flops / r.ms * 1e-9),
                       format("%.2f", ratio(r, cost.backward)), over(r, plain_backward),
                       format("%.1f", (cost.forward.flops + cost.backward.flops) / (f.ms + r.ms) * 1e-9)});
            rows.push_back({{"k", c.topk},
                            {"T", c.T},
                            {"B", c.B},
                            {"scores", c.rising ? "rising" : "normal"},
                            {"cudnn", c.cudnn},
                            {"forward_ms", f.ms},
                            {"forward_least_ms", f.least_ms},
                            {"forward_flops", cost.forward.flops},
                            {"backward_ms", r.ms},
                            {"backward_least_ms", r.least_ms},
                            {"backward_flops", cost.backward.flops}});
        });
}

// ---------------------------------------------------------------------------------------------------------
// whole steps

ModelSpec step_spec(const GPT2Config& config, int B, int T, bool fp8) {
    return {.config = config, .B = B, .T = T, .recompute = 0, .reg = Reg::tail, .fp8 = fp8};
}

GPT2<bf16> make_model(const Context& ctx, const GPT2Config& config, int B, int T, bool fp8) {
    GPT2<bf16> model = create_model<bf16>(ctx, step_spec(config, B, T, fp8),
                                          [&] { return std::vector<float>(num_parameters(config)); });
    fill_weights(ctx, model.master, config);
    const size_t n = model.num_params;
    round_kernel<<<(unsigned)ceil_div(n, 256), 256, 0, ctx.stream>>>(model.params_base, model.master, n);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
    return model;
}

// FLOPs of a forward and backward, nothing that is computed twice counted twice: for each token 6 for every
// weight of a matrix product (2 forward, 4 backward), and per layer 6 products over T / 2 keys (the causal
// half) of C channels, 2 of them forward.
double step_flops(const GPT2Config& c, int B, int T) {
    const double L = c.num_layers, C = c.channels, tokens = (double)B * T;
    const double weights = 12.0 * L * C * C + (double)c.padded_vocab_size * C;
    return tokens * (6.0 * weights + L * 6.0 * 2.0 * C * (T / 2.0));
}

struct StepCase {
    float lambda;
    int topk;  // with lambda = 0: the mass is measured; 0: it is not
};
struct StepGroup {
    std::string size;
    int B, T;  // at most so many rows
    std::vector<StepCase> cases;
    bool fp8 = false;
};

// The largest batch, up to `most`, whose model leaves 1 GiB free for cuBLASLt's choice among algorithms,
// which saves what it writes to; 0 if none does.
int largest_batch(const Context& ctx, const GPT2Config& config, int most, int T, bool fp8) {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    const size_t reserve = kOnCpu ? 0 : (size_t)1 << 30;
    for (int B = most; B > 0; B = B > 32 ? B - 8 : B > 8 ? B - 4 : B - 1)
        if ((int64_t)B * config.num_heads <= kMaxGridY &&
            model_bytes<bf16>(ctx, step_spec(config, B, T, fp8)) + reserve <= free_bytes)
            return B;
    return 0;
}

// Memory of the host that the device writes to by itself.
struct PinnedStats {
    StepStats* data = nullptr;
    PinnedStats() { CUDA_CHECK(cudaMallocHost(&data, sizeof(StepStats))); }
    PinnedStats(const PinnedStats&) = delete;
    PinnedStats& operator=(const PinnedStats&) = delete;
    ~PinnedStats() { cudaFreeHost(data); }
};

// Updates of one micro-batch each, as the trainer's loop makes and times them: what one measured is read
// while the next is under way, and its time is that from one reading to the next.
Timing time_steps(const Bench& b, GPT2<bf16>& model, const std::vector<std::vector<int>>& batches,
                  const TrainConfig& c, const StepCase& k, int64_t& updates) {
    const bool brief = b.config.quick || kOnCpu;
    const int warm_up = brief ? 2 : 3, least = brief ? 3 : 7, most = brief ? 10 : 25;
    const cudaStream_t stream = b.ctx.stream;
    PinnedStats measured[2];
    Event ready[2];
    std::vector<double> ms;
    double total = 0, last = 0;
    for (int i = 0; i <= warm_up + most && ((int)ms.size() < least || total < (kOnCpu ? 100 : 4000)); i++) {
        const std::vector<int>& tokens = batches[i % batches.size()];
        CUDA_CHECK(cudaMemsetAsync(model.grads_base, 0, model.num_params * sizeof(float), stream));
        reset_stats(b.ctx, model);
        micro_step(b.ctx, model, tokens.data(), tokens.data() + 1, c, k.lambda, 1.0f, 1.0f);
        optimizer_step(b.ctx, model, c, c.lr, ++updates);
        CUDA_CHECK(cudaMemcpyAsync(measured[i % 2].data, model.acts.stats, sizeof(StepStats),
                                   cudaMemcpyDeviceToHost, stream));
        ready[i % 2].record(b.ctx);
        if (i == 0) continue;
        ready[(i - 1) % 2].wait();
        check_stats(*measured[(i - 1) % 2].data, model.config, updates - 1);
        const double now = seconds_now() * 1e3;
        if (i > warm_up) {
            ms.push_back(now - last);
            total += ms.back();
        }
        last = now;
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    return summarize(ms);
}

void bench_steps(Bench& b, int B, int T) {
    const bool brief = b.config.quick;
    std::vector<StepGroup> groups;
    if (brief) {
        groups.push_back({b.config.size, B, T, {{0, 0}, {0.1f, 8}}});
    } else {
        groups.push_back({b.config.size,
                          B,
                          T,
                          {{0, 0}, {0, 8}, {0.1f, 1}, {0.1f, 8}, {0.1f, 16}, {0.1f, 32}, {0.1f, 64}}});
        for (int other : {T / 4, T / 2, 2 * T, 4 * T})
            groups.push_back({b.config.size, std::max(1, B * T / other), other, {{0, 0}, {0.1f, 8}}});
        for (const char* size : kOnCpu ? std::vector{"small"} : std::vector{"124M", "355M", "774M", "1558M"})
            if (size != b.config.size) groups.push_back({size, B, T, {{0, 0}, {0.1f, 8}}});
    }
    if (b.ctx.has_fp8 && B * T % kFp8Multiple == 0)
        groups.push_back({b.config.size, B, T, {{0, 0}, {0.1f, 8}}, true});
    b.report.print(
        "\n## Training steps: one micro-step and the update, bf16\n\n"
        "fp8: the layers' products in 8 bits; FLOPs as before, against the rate of bf16. "
        "lambda = 0 with a k measures the top-k mass without training on it. MFU: the step's FLOPs over its time, "
        "against the product measured above / the data sheet. Memory: what the model's one allocation takes, and "
        "all that is in use on the device.\n\n");
    Table table(b.report, {{"model", 9},
                           {"B", 4},
                           {"T", 5},
                           {"lambda", 6},
                           {"k", 3},
                           {"ms", 9},
                           {"least", 9},
                           {"tokens/s", 9},
                           {"over lambda = 0", 15},
                           {"MFU", 13},
                           {"memory", 21}});
    nlohmann::ordered_json& rows = b.report.json["steps"] = nlohmann::ordered_json::array();
    for (const StepGroup& g : groups) {
        // A group's model is made once. Enough time: its making, warm-up and choice of algorithms, and the
        // least number of steps at a quarter of the product's rate.
        const GPT2Config config = size_config(g.size, g.T);
        const int rows_B = largest_batch(b.ctx, config, g.B, g.T, g.fp8);
        const std::string model_name = g.size + (g.fp8 ? " fp8" : "");
        if (rows_B == 0) {
            table.note(format("%s, T = %d", model_name.c_str(), g.T),
                       "does not fit into the memory that is free");
            rows.push_back({{"name", g.size}, {"T", g.T}, {"not_measured", "does not fit"}});
            continue;
        }
        const double flops = step_flops(config, rows_B, g.T);
        const double seconds = kOnCpu ? 5 : 3 + 10 * flops / (0.25 * b.machine.matmul);
        const std::string name = format("%s, B = %d, T = %d", model_name.c_str(), rows_B, g.T);
        attempt(b, table, name, rows, seconds, [&] {
            size_t free_before = 0, free_after = 0, total = 0;
            CUDA_CHECK(cudaMemGetInfo(&free_before, &total));
            GPT2<bf16> model = make_model(b.ctx, config, rows_B, g.T, g.fp8);
            TrainConfig c;
            c.B = rows_B;
            c.T = g.T;
            c.tokens_per_update = (int64_t)rows_B * g.T;
            c.lr = 1e-5f;
            c.layer_lambda.assign(config.num_layers, 1.0f);
            std::vector<std::vector<int>> batches;
            for (int i = 0; i < 4; i++)
                batches.push_back(text_like_tokens((size_t)rows_B * g.T + 1, config.vocab_size, 10 + i));
            double plain = 0;
            int64_t updates = 0;
            for (const StepCase& k : g.cases) {
                const std::string case_name =
                    format("%s, lambda = %g, k = %d", name.c_str(), k.lambda, k.topk);
                attempt(b, table, case_name, rows, seconds, [&] {
                    check_case(b.ctx, config, rows_B, g.T, k.topk);
                    c.lambda = k.lambda;
                    c.topk = k.topk;
                    const Timing t = time_steps(b, model, batches, c, k, updates);
                    CUDA_CHECK(cudaMemGetInfo(&free_after, &total));
                    const double bytes = (double)model.memory->bytes;
                    if (k.topk == 0) plain = t.ms;
                    const double rate = flops / t.ms * 1e3, mfu = rate / b.machine.matmul;
                    const double nominal = b.nominal_peak > 0 ? rate / b.nominal_peak : 0;
                    table.row({model_name, std::to_string(rows_B), std::to_string(g.T),
                               format("%g", k.lambda), k.topk > 0 ? std::to_string(k.topk) : "",
                               format("%.2f", t.ms), format("%.2f", t.least_ms),
                               format("%.0f", (double)rows_B * g.T / t.ms * 1e3),
                               k.topk > 0 && plain > 0 ? format("%+.1f%%", 100 * (t.ms / plain - 1)) : "",
                               nominal > 0 ? format("%.1f%% / %.1f%%", 100 * mfu, 100 * nominal)
                                           : format("%.1f%%", 100 * mfu),
                               pretty_bytes(bytes) + " / " + pretty_bytes((double)(total - free_after))});
                    rows.push_back({{"size", g.size},
                                    {"fp8", g.fp8},
                                    {"B", rows_B},
                                    {"T", g.T},
                                    {"lambda", k.lambda},
                                    {"k", k.topk},
                                    {"ms", t.ms},
                                    {"least_ms", t.least_ms},
                                    {"runs", t.runs},
                                    {"tokens_per_s", (double)rows_B * g.T / t.ms * 1e3},
                                    {"flops", flops},
                                    {"mfu_measured", mfu},
                                    {"mfu_nominal", nominal},
                                    {"model_bytes", bytes},
                                    {"allocated_bytes", (double)free_before - (double)free_after},
                                    {"in_use_bytes", total - free_after}});
                });
            }
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// main

// The largest batch up to `most` for which the kernels' buffers fit: the largest need is that of the logits'
// product, or of the optimizer.
int kernels_batch(const GPT2Config& config, int most, int T) {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    const double weights = (double)config.padded_vocab_size * config.channels;
    const auto bytes = [&](int B) {
        const double rows = (double)B * T;
        return std::max(rows * (2.0 * config.padded_vocab_size + 8.0 * config.channels) + 10.0 * weights,
                        rows * 40.0 * config.channels);
    };
    int B = most;
    while (B > 1 && (bytes(B) > 0.8 * (double)free_bytes || (int64_t)B * config.num_heads > kMaxGridY))
        B /= 2;
    return B;
}

void run(const BenchConfig& config) {
    Bench b;
    b.config = config;
    b.brief = kOnCpu || config.quick;
    b.budget = config.budget;
    b.ctx = make_context();
    b.nominal_peak = kOnCpu ? 0 : nominal_bf16_flops(b.ctx.device_name);
    const int T = config.T > 0 ? config.T : kOnCpu ? 64 : 1024;
    const int most = config.B > 0 ? config.B : kOnCpu ? 4 : 64;
    const GPT2Config model = size_config(config.size, T);
    report_on(b, config.out, "", "", [&] {
        measure_machine(b);
        const int B = kernels_batch(model, most, T);
        if (b.runs(Only::kernels)) bench_kernels(b, B, T);
        if (b.runs(Only::attention)) bench_attention(b, B, T);
        if (b.runs(Only::steps)) bench_steps(b, most, T);
    });
}

int main(int argc, char** argv) {
    return bench_main(argc, argv, bench_flags, run);
}
