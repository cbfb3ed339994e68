// Trains GPT-2 with the attention top-k regularizer. This file holds the model and its training loop, read
// from top to bottom: configuration, parameters, activations, forward, loss, backward, update, then
// validation, samples, checkpoints, setting up, and the loop itself. Each layer's formula and kernels are in
// its header under llmc/.
//
// Shapes: B micro-batch rows, T positions, C channels, NH heads, hs = C / NH, L layers, V vocabulary, Vp the
// vocabulary padded to a multiple of 128. Float is bf16 or float: weights, activations and their gradients;
// weight gradients, AdamW's moments and the master weights are always float.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llmc/adamw.cuh"
#include "llmc/attention.cuh"
#include "llmc/checkpoint.h"
#include "llmc/classifier.cuh"
#include "llmc/context.h"
#include "llmc/dataloader.h"
#include "llmc/device_memory.cuh"
#include "llmc/encoder.cuh"
#include "llmc/flags.h"
#include "llmc/fp8.cuh"
#include "llmc/gelu.cuh"
#include "llmc/grad_norm.cuh"
#include "llmc/graph.h"
#include "llmc/layernorm.cuh"
#include "llmc/matmul.cuh"
#include "llmc/metrics.h"
#include "llmc/params.h"
#include "llmc/sampler.h"
#include "llmc/schedule.h"
#include "llmc/startup.h"
#include "llmc/step_stats.cuh"
#include "llmc/target_loss.h"
#include "llmc/text_stream.h"
#include "llmc/tokenizer.h"
#include "llmc/topk.h"

extern const char* const kGitCommit;  // written by make

// ---------------------------------------------------------------------------------------------------------
// configuration

// What the flags set. What they leave open (-1, or an empty text) is filled in where it is known: `from` by
// find_start(), the data by choose_data(), numbers by resolve_defaults(), and `out` by train(), or with -y by
// take_flags_of_run().
struct TrainConfig {
    float lambda = 0.1f;
    int topk = 8;
    Reg reg = Reg::tail;
    std::string lambda_start = "0", lambda_warmup = "70%";
    std::string lambda_layers = "1";
    TargetLossFlag target_loss;

    std::string from;  // -e
    std::string train_data, val_data;
    std::string out;
    int64_t checkpoint_every = 500;
    bool resume = false;

    int B = -1, T = -1;
    int64_t tokens_per_update = -1, updates = -1;
    float lr = -1;
    Schedule schedule = Schedule::cosine;
    std::string warmup = "5%";
    float final_lr = 0.1f, weight_decay = 0.1f, clip = 1.0f;

    int64_t validate_every = 250, val_batches = 20, sample_every = 500, sample_tokens = 160;
    bool overfit = false;
    int recompute = 0;
    uint64_t seed = 1337;
    Device device = Device::automatic;
    Precision precision = Precision::automatic;
    std::string debug_state, export_to;
    GivenFlags given;  // flags as given, with -y those of the run, too; keep_decisions() adds to them

    // filled in by resolve_defaults()
    int64_t warmup_updates = 0, lambda_start_updates = 0, lambda_warmup_updates = 0;
    std::vector<float> layer_lambda;  // each layer's factor on lambda

    int64_t micro_steps() const { return tokens_per_update / ((int64_t)B * T); }  // of an update
};

// The one table of flags.
std::vector<Flag> train_flags(TrainConfig& c) {
    return {
        {'l', "lambda", "X", setting_text(c.lambda),
         "weight of the attention top-k regularizer; 0 is plain GPT-2",
         [&c](auto& flag, auto& v) { c.lambda = parse_float(flag, v, 0, 1e6); }},
        {'k', "topk", "K", std::to_string(c.topk),
         "keys that each attention row should put its mass on; 0 (with -l 0): do not even measure",
         [&c](auto& flag, auto& v) {
             for (const char* word : kScheduleWords)
                 if (v == word)
                     fail(
                         "-k takes the number of keys, not '%s': the learning-rate schedule, which is -k in llm.c, is --schedule here",
                         word);
             c.topk = (int)parse_int(flag, v, 0, 65536);
         }},
        choice_flag(
            "reg", kRegWords, c.reg,
            "the regularizer: 1 - M (tail mass) or -log M, M being a row's top-k mass; or, as a baseline, the row's entropy"),
        {0, "lambda-start", "N|P%", c.lambda_start,
         "updates, or share of the run, before lambda begins to rise",
         [&c](auto& flag, auto& v) { parse_updates(flag, c.lambda_start = v, 1); }},
        {0, "lambda-warmup", "N|P%", c.lambda_warmup,
         "updates, or share of the run, after which lambda, rising linearly from 0, is full",
         [&c](auto& flag, auto& v) { parse_updates(flag, c.lambda_warmup = v, 1); }},
        {0, "lambda-layers", "X[,X...]", c.lambda_layers,
         "factor on lambda for all layers, or one for each (0,1,1,1 leaves layer 0 alone)",
         [&c](auto&, auto& v) { c.lambda_layers = v; }},
        {0, "target-loss", "RUN:MARGIN", "",
         "lambda adjusts itself, from -l on, so that the training loss stays within MARGIN nats of that plain run's (folder or metrics.jsonl)",
         [&c](auto&, auto& v) { c.target_loss = parse_target_loss(v); }},
        {'i', "train-data", "GLOB", "what make prepared", "token shards to train on",
         [&c](auto& flag, auto& v) { c.train_data = parse_name(flag, v); }},
        {'j', "val-data", "GLOB", "what make prepared", "token shards to validate on",
         [&c](auto& flag, auto& v) { c.val_data = parse_name(flag, v); }},
        {'e', "from", "WHAT",
         "tiny on a CPU; on a GPU 124M if data/fetch got it, else d12 (GPT-2 124M from scratch)",
         "start from scratch (tiny, d6 ... d48: the depth), from OpenAI's weights that data/fetch got (124M, 355M, 774M, 1558M), or from a folder or file: a checkpoint or run of ours, Hugging Face's safetensors, a TensorFlow checkpoint, llm.c's .bin",
         [&c](auto& flag, auto& v) { c.from = parse_name(flag, v); }},
        {'o', "out", "DIR", "log/run1, log/run2, ...", "run folder: metrics.jsonl and checkpoints",
         [&c](auto& flag, auto& v) { c.out = parse_name(flag, v); }},
        {'n', "checkpoint-every", "N", std::to_string(c.checkpoint_every),
         "updates between checkpoints, one more at the end; 0 = never",
         [&c](auto& flag, auto& v) { c.checkpoint_every = parse_int(flag, v, 0, INT64_MAX); }},
        {'y', "resume", "", "",
         "go on from the latest checkpoint in the run folder (-o, or the last of log/run1, log/run2, ...), with the flags that the run had; a run that was stopped before its first checkpoint begins anew",
         [&c](auto&, auto&) { c.resume = true; }},
        {'b', "batch", "N", "up to 12 on a CPU, what fits (up to 64) on a GPU",
         "micro-batch: rows of a forward and backward pass",
         [&c](auto& flag, auto& v) { c.B = (int)parse_int(flag, v, 1, 4096); }},
        {'t', "context", "N", "128 for tiny, else 1024; from weights at most their positions",
         "context length T in tokens",
         [&c](auto& flag, auto& v) { c.T = (int)parse_int(flag, v, 1, 65536); }},
        {'d', "tokens-per-update", "N",
         "one micro-batch on a CPU, 65536 (rounded up to micro-batches) on a GPU",
         "tokens of an update, a multiple of batch times context; more than one micro-batch accumulates gradients",
         [&c](auto& flag, auto& v) { c.tokens_per_update = parse_int(flag, v, 1, int64_t{1} << 32); }},
        {'x', "updates", "N",
         "1000 on a CPU; on a GPU 500, or as many as read the data 20 times, but at least 100",
         "updates of the whole run",
         [&c](auto& flag, auto& v) { c.updates = parse_int(flag, v, 1, int64_t{1} << 40); }},
        {0, "lr", "X", "2e-3 for tiny, 6e-4 from scratch, 5e-5 from weights", "peak learning rate",
         [&c](auto& flag, auto& v) { c.lr = parse_float(flag, v, 0, 100); }},
        choice_flag("schedule", kScheduleWords, c.schedule,
                    "shape of the learning rate; wsd: stable, then down over the last fifth"),
        {'u', "warmup", "N|P%", c.warmup, "updates, or share of the run, over which the learning rate rises",
         [&c](auto& flag, auto& v) { parse_updates(flag, c.warmup = v, 1); }},
        {'q', "final-lr", "X", setting_text(c.final_lr),
         "learning rate at the end, as a fraction of the peak",
         [&c](auto& flag, auto& v) { c.final_lr = parse_float(flag, v, 0, 1); }},
        {'c', "weight-decay", "X", setting_text(c.weight_decay), "AdamW's weight decay, on matrices only",
         [&c](auto& flag, auto& v) { c.weight_decay = parse_float(flag, v, 0, 100); }},
        {0, "clip", "X", setting_text(c.clip), "largest global gradient norm; 0 = no clipping",
         [&c](auto& flag, auto& v) { c.clip = parse_float(flag, v, 0, 1e30); }},
        {'v', "validate-every", "N", std::to_string(c.validate_every),
         "updates between validations, also before the first and after the last; 0 = never",
         [&c](auto& flag, auto& v) { c.validate_every = parse_int(flag, v, 0, INT64_MAX); }},
        {'m', "val-batches", "N", std::to_string(c.val_batches),
         "micro-batches of a validation; all of the data where it has fewer",
         [&c](auto& flag, auto& v) { c.val_batches = parse_int(flag, v, 1, INT64_MAX); }},
        {'s', "sample-every", "N", std::to_string(c.sample_every),
         "updates between samples, one more at the end; 0 = never",
         [&c](auto& flag, auto& v) { c.sample_every = parse_int(flag, v, 0, INT64_MAX); }},
        {'g', "sample-tokens", "N", std::to_string(c.sample_tokens), "tokens of a sample",
         [&c](auto& flag, auto& v) { c.sample_tokens = parse_int(flag, v, 1, 1 << 20); }},
        {'a', "overfit", "", "", "train on the first batch alone: the loss must go to nearly zero",
         [&c](auto&, auto&) { c.overfit = true; }},
        {'r', "recompute", "0|1|2", std::to_string(c.recompute),
         "activations made again in the backward to save memory: 1 layernorms and GELU, 2 whole layers",
         [&c](auto& flag, auto& v) { c.recompute = (int)parse_int(flag, v, 0, 2); }},
        {0, "seed", "N", std::to_string(c.seed), "for initialization, data order and samples",
         [&c](auto& flag, auto& v) { c.seed = (uint64_t)parse_int(flag, v, 0, INT64_MAX); }},
        choice_flag("device", kDeviceWords, c.device, "auto is cuda where there is an NVIDIA GPU, else cpu"),
        choice_flag(
            "precision", kPrecisionWords, c.precision,
            "auto is bf16 on a GPU (sums, moments and master weights in fp32), fp32 on a CPU; fp8 is bf16 with the layers' matrix products in 8 bits"),
        {0, "debug-state", "FILE", "",
         "write the first micro-step's tensors and gradients as safetensors, then exit",
         [&c](auto& flag, auto& v) { c.debug_state = parse_name(flag, v); }},
        {0, "export", "DIR", "",
         "write the model that -e names into a new folder that Hugging Face's transformers opens, then exit",
         [&c](auto& flag, auto& v) { c.export_to = parse_name(flag, v); }},
        help_flag(
            "Trains GPT-2 with the attention top-k regularizer.\n\n    ./train_gpt2cu -l 0.1 -k 8        lambda 0.1, k = 8\n\n",
            [] {
                TrainConfig defaults;
                return train_flags(defaults);
            },
            "show this table and exit; --help-markdown: as Markdown"),
    };
}

// What -e names when it is not a file: "tiny", or "dN" for a depth of N. False if it is neither, or a depth
// outside of 6 to 48 while there is a file or folder of that name. Between GPT-2's own depths (12, 24, 36,
// 48) and d6, the number of heads of 64 channels is interpolated.
bool preset_config(const std::string& name, GPT2Config& config) {
    if (name == "tiny") {
        config.max_seq_len = 128;
        config.num_layers = 4;
        config.num_heads = 2;
        config.channels = 128;
        return true;
    }
    if (name.size() < 2 || name.size() > 3 || name[0] != 'd' ||
        name.find_first_not_of("0123456789", 1) != name.npos)
        return false;
    const int depth = std::stoi(name.substr(1));
    ModelSize below = {"d6", 6, 6};
    for (const ModelSize& size : kPublishedSizes) {
        if (depth >= below.layers && depth <= size.layers) {
            const int layers = size.layers - below.layers, heads = size.heads - below.heads;
            config.num_layers = depth;
            config.num_heads = below.heads + (heads * (depth - below.layers) + layers / 2) / layers;
            config.channels = 64 * config.num_heads;
            return true;
        }
        below = size;
    }
    if (is_file(name) || is_folder(name)) return false;
    fail("-e (--from) takes depths from d6 to d48, not '%s'", name.c_str());
}

// ---------------------------------------------------------------------------------------------------------
// parameters

// GPT-2's initialization, on the host, by the table. The same seed gives the same model on every machine
// whose library computes the same log and cos.
std::vector<float> init_params(const GPT2Config& config, uint64_t seed) {
    std::vector<float> params(num_parameters(config), 0.0f);
    const std::vector<ParamTensor> table = gpt2_params(config);
    const double residual_std = 0.02 / sqrt(2.0 * config.num_layers);
    for (size_t t = 0; t < table.size(); t++) {
        const ParamTensor& p = table[t];
        float* out = params.data() + p.offset;
        if (p.init == Init::ones) std::fill(out, out + p.size(), 1.0f);
        if (p.init != Init::normal && p.init != Init::residual) continue;
        const double std = p.init == Init::residual ? residual_std : 0.02;
#pragma omp parallel for
        for (int64_t i = 0; i < (int64_t)p.size_on_disk(); i++)  // the vocabulary's padding stays zero
            out[i] = (float)(std * random_normal(seed, t, (uint64_t)i));
    }
    return params;
}

// ---------------------------------------------------------------------------------------------------------
// activations

// What a model's memory depends on.
struct ModelSpec {
    GPT2Config config;
    int B = 0, T = 0;  // what the activations have room for
    int recompute = 0;
    Reg reg = Reg::tail;    // entropy: attention's rows have room for their mean scores
    bool fp8 = false;       // the layers' products in 8 bits
    bool optimizer = true;  // false: no moments, for --debug-state
};

enum LinearLayer { kQkv, kAttproj, kFc, kFcproj, kLinearLayers };  // of one layer

// What a layer's forward leaves for its backward. With -r 1 the pieces marked [1] are shared by all layers
// and made again in the backward; with -r 2 all are but the layer's output and the attention rows.
template <class Float>
struct LayerActs {
    Float* ln1;                  // [B,T,C] [1]
    float *ln1_mean, *ln1_rstd;  // [B,T]
    Float* qkv;                  // [B,T,3C]
    Float* att;                  // [B,T,C]
    AttentionRows rows;          // [B,NH,T] each
    Float* residual_mid;         // [B,T,C] residual stream after attention
    Float* ln2;                  // [B,T,C] [1]
    float *ln2_mean, *ln2_rstd;  // [B,T]
    Float* fch;                  // [B,T,4C] before GELU
    Float* fch_gelu;             // [B,T,4C] [1]
    Float* residual;             // [B,T,C] residual stream after the layer
};

template <class Float>
struct Acts {
    int *inputs, *targets;  // [B,T]
    int* token_plan;        // plan_tokens() of the inputs
    Float* encoded;         // [B,T,C]
    std::vector<LayerActs<Float>> layers;
    Float* lnf;                  // [B,T,C]
    float *lnf_mean, *lnf_rstd;  // [B,T]
    Float* logits;               // [B,T,Vp], then their gradient
    float* losses;               // [B,T]
    float* mass_sums;            // [L,B*NH,2]
    float* sink_sums;            // [L,B*NH,4]
    float* reg_weight;           // [L] see reg_weights()
    Float* branch;               // [B,T,C] what attention or MLP adds to the residual stream
    // gradients
    Float* dresidual;    // [B,T,C]
    Float* dbranch;      // [B,T,C] of a layernorm's or the attention's output
    Float* dqkv;         // [B,T,3C]
    Fp8Buffers fp8;      // operands of a product in 8 bits, scales of [L,LinearLayer]; empty unless asked for
    Float* dfch;         // [B,T,4C]
    float* att_scratch;  // where dfch is: by the time of the attention's backward it has been used up
    float* scratch;      // column sums, the sums of frequent tokens, the gradient norm's parts
    StepStats* stats;
    size_t* tensor_begin;  // [tensors + 1] offsets of the parameters

    Fp8Buffers fp8_of(int l, LinearLayer which) const { return fp8.of_layer(kLinearLayers * l + which); }
};

template <class Float>
Acts<Float> lay_out_acts(Arena& arena, const Context& ctx, const ModelSpec& spec) {
    const GPT2Config& config = spec.config;
    const int B = spec.B, T = spec.T;
    const size_t BT = (size_t)B * T, C = config.channels, rows = BT * config.num_heads;
    const size_t BNH = (size_t)B * config.num_heads, L = config.num_layers;
    Acts<Float> acts;
    acts.inputs = arena.take<int>(BT);
    acts.targets = arena.take<int>(BT);
    acts.token_plan = arena.take<int>(TokenPlan::most_ints((int)BT, config.vocab_size));
    acts.encoded = arena.take<Float>(BT * C);
    acts.layers.resize(L);
    for (size_t l = 0; l < L; l++) {
        LayerActs<Float>& a = acts.layers[l];
        if (l > 0) a = acts.layers[0];  // shares all of them, but for those that it gets below
        if (l == 0 || spec.recompute < 1) {
            a.ln1 = arena.take<Float>(BT * C);
            a.ln2 = arena.take<Float>(BT * C);
            a.fch_gelu = arena.take<Float>(BT * 4 * C);
        }
        if (l == 0 || spec.recompute < 2) {
            a.ln1_mean = arena.take<float>(BT);
            a.ln1_rstd = arena.take<float>(BT);
            a.qkv = arena.take<Float>(BT * 3 * C);
            a.att = arena.take<Float>(BT * C);
            a.residual_mid = arena.take<Float>(BT * C);
            a.ln2_mean = arena.take<float>(BT);
            a.ln2_rstd = arena.take<float>(BT);
            a.fch = arena.take<Float>(BT * 4 * C);
        }
        a.rows = {arena.take<float>(rows), arena.take<float>(rows), arena.take<float>(rows),
                  arena.take<float>(rows)};
        if (spec.reg == Reg::entropy) a.rows.mean_score = arena.take<float>(rows);
        a.residual = arena.take<Float>(BT * C);
    }
    acts.lnf = arena.take<Float>(BT * C);
    acts.lnf_mean = arena.take<float>(BT);
    acts.lnf_rstd = arena.take<float>(BT);
    acts.logits = arena.take<Float>(BT * config.padded_vocab_size);
    acts.losses = arena.take<float>(BT);
    acts.mass_sums = arena.take<float>(L * BNH * 2);
    acts.sink_sums = arena.take<float>(L * BNH * 4);
    acts.reg_weight = arena.take<float>(L);
    acts.branch = arena.take<Float>(BT * C);
    acts.dresidual = arena.take<Float>(BT * C);
    acts.dbranch = arena.take<Float>(BT * C);
    acts.dqkv = arena.take<Float>(BT * 3 * C);
    const int hs = config.head_size();
    size_t att_scratch = attention_backward_scratch<Float>(ctx, B, T, config.num_heads, hs);
    if constexpr (sizeof(Float) == 2 && kUseCudnn)
        att_scratch = std::max(att_scratch, prepare_attention_cudnn(ctx, B, T, config.num_heads, hs));
    acts.att_scratch =
        arena.take<float>(std::max(att_scratch, ceil_div(BT * 4 * C * sizeof(Float), sizeof(float))));
    acts.dfch = reinterpret_cast<Float*>(acts.att_scratch);
    acts.scratch =
        arena.take<float>(std::max({column_sum_scratch(ctx, 4 * C), encoder_backward_scratch((int)BT, (int)C),
                                    (size_t)kGradNormBlocks}));
    if (spec.fp8) acts.fp8 = lay_out_fp8(arena, BT, C, kLinearLayers * L);
    acts.stats = arena.take<StepStats>(1);
    acts.tensor_begin = arena.take<size_t>(gpt2_params(config).size() + 1);
    return acts;
}

// ---------------------------------------------------------------------------------------------------------
// the model

// What changes from one micro-step to the next, on its way to the device: the copy of one is under way while
// the host prepares the next.
struct BatchQueue {
    BufferPair<int> buffers;
    int64_t sent = 0;
};

// Which micro-step it is: all that its recording as a graph has fixed. What else changes is in device memory.
struct MicroStepKind {
    int B, T;
    int topk;                       // 0: no mass is measured
    std::vector<bool> regularized;  // which layers are
    float share, mass_share;        // see micro_step()
    std::vector<float> layer_lambda;

    auto operator<=>(const MicroStepKind&) const = default;
};

// What the pointers lead to changes also where the model is const: weights, moments, activations. So do the
// queue and the recordings, which are reached by pointers, too.
template <class Float>
struct GPT2 : ModelSpec {
    size_t num_params = 0;
    std::unique_ptr<DeviceMemory> memory = nullptr;  // everything below lies in this one allocation
    Params<Float> params = {};
    Params<float> grads = {};
    Float* params_base = nullptr;                             // [num_params]
    float* master = nullptr;                                  // [num_params]; in fp32 params_base itself
    float *grads_base = nullptr, *m = nullptr, *v = nullptr;  // [num_params]
    uint32_t* decay_bits = nullptr;                           // see adamw.cuh
    Acts<Float> acts = {};
    std::unique_ptr<BatchQueue> batches = nullptr;
    std::unique_ptr<std::map<MicroStepKind, Graph>> micro_steps = nullptr;
};

template <class Float>
void lay_out_model(GPT2<Float>& model, Arena& arena, const Context& ctx) {
    model.num_params = num_parameters(model.config);
    model.params_base = arena.take<Float>(model.num_params);
    if constexpr (sizeof(Float) == 4)
        model.master = model.params_base;
    else
        model.master = arena.take<float>(model.num_params);
    model.grads_base = arena.take<float>(model.num_params);
    if (model.optimizer) {
        model.m = arena.take<float>(model.num_params);
        model.v = arena.take<float>(model.num_params);
        model.decay_bits = arena.take<uint32_t>(ceil_div(model.num_params, size_t{256}));
    }
    model.acts = lay_out_acts<Float>(arena, ctx, model);
}

// Bytes that a model and its training take.
template <class Float>
size_t model_bytes(const Context& ctx, const ModelSpec& spec) {
    GPT2<Float> model{spec};
    return DeviceMemory::size_of([&](Arena& arena) { lay_out_model(model, arena, ctx); });
}

// Master weights, and in bf16 their rounded copy.
template <class Float>
void upload_params(GPT2<Float>& model, const std::vector<float>& host) {
    assert(host.size() == model.num_params);
    to_device(model.master, host.data(), host.size());
    if constexpr (sizeof(Float) == 2) to_device_as(model.params_base, host);
}

// first_params() gives the weights to begin with, once it is known that the device has room for the run: to
// draw or to read them takes long.
template <class Float, class FirstParams>
GPT2<Float> create_model(const Context& ctx, const ModelSpec& spec, const FirstParams& first_params) {
    GPT2<Float> model{spec};
    const GPT2Config& config = spec.config;
    model.memory = std::make_unique<DeviceMemory>(
        ctx, "this run", format("lower -b (%d) or -t (%d), or raise -r (%d)", spec.B, spec.T, spec.recompute),
        [&](Arena& arena) { lay_out_model(model, arena, ctx); });
    model.params = point_to_params(model.params_base, config);
    model.grads = point_to_params(model.grads_base, config);
    upload_params(model, first_params());  // and freed, before gradients touch as much memory
    if (spec.optimizer) {
        CUDA_CHECK(cudaMemset(model.m, 0, model.num_params * sizeof(float)));
        CUDA_CHECK(cudaMemset(model.v, 0, model.num_params * sizeof(float)));
        const std::vector<uint32_t> bits = decay_bits(gpt2_params(config));
        to_device(model.decay_bits, bits.data(), bits.size());
    }
    const size_t micro_step_ints = 2 * (size_t)spec.B * spec.T +
                                   TokenPlan::most_ints(spec.B * spec.T, config.vocab_size) +
                                   config.num_layers;
    model.batches.reset(new BatchQueue{BufferPair<int>(micro_step_ints)});
    model.micro_steps = std::make_unique<std::map<MicroStepKind, Graph>>();
    std::vector<size_t> tensor_begin;
    for (const ParamTensor& p : gpt2_params(config)) tensor_begin.push_back(p.offset);
    tensor_begin.push_back(model.num_params);
    to_device(model.acts.tensor_begin, tensor_begin.data(), tensor_begin.size());
    CUDA_CHECK(cudaMemset(model.grads_base, 0, model.num_params * sizeof(float)));
    return model;
}

// ---------------------------------------------------------------------------------------------------------
// forward

// out = layernorm of the residual stream in front of layer l (l = L: behind the last one). Here the stream is
// also completed: what the MLP of the layer before left in acts.branch is added to residual_mid, and the sum
// is stored as that layer's residual, all in one pass over the data.
template <class Float>
void stream_layernorm_forward(const Context& ctx, const GPT2<Float>& model, int l, Float* out, float* mean,
                              float* rstd, const Float* weight, const Float* bias, int BT) {
    const Acts<Float>& acts = model.acts;
    const int C = model.config.channels;
    if (l == 0)
        layernorm_forward<Float>(ctx, out, mean, rstd, nullptr, nullptr, acts.encoded, weight, bias, BT, C);
    else
        layernorm_forward<Float>(ctx, out, mean, rstd, acts.layers[l - 1].residual,
                                 acts.layers[l - 1].residual_mid, acts.branch, weight, bias, BT, C);
}

// One layer behind its first layernorm, up to the input of its last product: all that its backward needs, and
// with -r 2 makes again. inp: the stream that the layer reads. topk > 0 also finds each row's threshold and
// mass.
//   mid = inp + attproj(attention(qkv(ln1(inp))))          out = mid + fcproj(gelu(fc(ln2(mid))))
template <class Float>
void layer_forward(const Context& ctx, const GPT2<Float>& model, int l, const Float* inp, int B, int T,
                   int topk) {
    const LayerParams<Float>& p = model.params.layers[l];
    const LayerActs<Float>& a = model.acts.layers[l];
    const Acts<Float>& acts = model.acts;
    const int BT = B * T, C = model.config.channels, NH = model.config.num_heads,
              hs = model.config.head_size();

    linear_forward(ctx, acts.fp8_of(l, kQkv), a.qkv, a.ln1, p.qkv_w, p.qkv_b, BT, C, 3 * C);
    attention_forward(ctx, a.att, a.rows, a.qkv, B, T, NH, hs, topk);
    linear_forward(ctx, acts.fp8_of(l, kAttproj), acts.branch, a.att, p.attproj_w, p.attproj_b, BT, C, C);
    layernorm_forward<Float>(ctx, a.ln2, a.ln2_mean, a.ln2_rstd, a.residual_mid, inp, acts.branch, p.ln2_w,
                             p.ln2_b, BT, C);
    linear_gelu_forward(ctx, acts.fp8_of(l, kFc), a.fch_gelu, a.fch, a.ln2, p.fc_w, p.fc_b, BT, C, 4 * C);
}

// The residual stream that layer l reads: [B,T,C].
template <class Float>
const Float* layer_input(const GPT2<Float>& model, int l) {
    return l == 0 ? model.acts.encoded : model.acts.layers[l - 1].residual;
}

// Everything up to the last layernorm, acts.lnf [B,T,C], of the tokens in acts.inputs [B,T]. topk > 0
// measures each layer's mass; sinks also measures where it lies.
template <class Float>
void forward(const Context& ctx, const GPT2<Float>& model, int B, int T, int topk, bool sinks = false) {
    const Acts<Float>& acts = model.acts;
    const int C = model.config.channels, NH = model.config.num_heads, hs = model.config.head_size(),
              L = model.config.num_layers;
    encoder_forward(ctx, acts.encoded, acts.inputs, model.params.wte, model.params.wpe, B, T, C);
    for (int l = 0; l < L; l++) {
        const LayerParams<Float>& p = model.params.layers[l];
        const LayerActs<Float>& a = acts.layers[l];
        stream_layernorm_forward(ctx, model, l, a.ln1, a.ln1_mean, a.ln1_rstd, p.ln1_w, p.ln1_b, B * T);
        layer_forward(ctx, model, l, layer_input(model, l), B, T, topk);
        linear_forward(ctx, acts.fp8_of(l, kFcproj), acts.branch, a.fch_gelu, p.fcproj_w, p.fcproj_b, B * T,
                       4 * C, C);
        if (topk > 0 && model.reg == Reg::entropy) attention_mean_scores(ctx, a.rows, a.qkv, B, T, NH, hs);
        if (topk > 0)
            attention_mass_sums(ctx, acts.mass_sums + (size_t)l * B * NH * 2, a.rows, model.reg, B, T, NH,
                                topk);
        if (topk > 0 && sinks)
            attention_sink_sums(ctx, acts.sink_sums + (size_t)l * B * NH * 4, a.rows, a.qkv, B, T, NH, hs,
                                topk);
    }
    stream_layernorm_forward(ctx, model, L, acts.lnf, acts.lnf_mean, acts.lnf_rstd, model.params.lnf_w,
                             model.params.lnf_b, B * T);
}

// Logits of `rows` rows of acts.lnf, from `first` on, into acts.logits.
template <class Float>
void logits_forward(const Context& ctx, const GPT2<Float>& model, int first, int rows) {
    const int C = model.config.channels;
    matmul_forward<Float>(ctx, model.acts.logits, model.acts.lnf + (size_t)first * C, model.params.wte,
                          nullptr, rows, C, model.config.padded_vocab_size);
}

// ---------------------------------------------------------------------------------------------------------
// loss

// What the gradient of each layer's rows is weighted with: share * lambda * the layer's factor / N, where N
// are all the rows that R averages and `share` is the micro-step's of the update. 0: not regularized.
std::vector<float> reg_weights(const TrainConfig& c, const GPT2Config& config, int B, int T, float lambda,
                               float share) {
    const int64_t rows = regularized_rows(B, T, config.num_heads, c.topk) * config.num_layers;
    std::vector<float> weights(config.num_layers, 0.0f);
    if (rows > 0 && c.topk > 0)
        for (int l = 0; l < config.num_layers; l++)
            weights[l] = share * lambda * c.layer_lambda[l] / (float)rows;
    return weights;
}
// Which layers are: they run other kernels.
std::vector<bool> are_regularized(const std::vector<float>& reg_weight) {
    std::vector<bool> regularized;
    for (float weight : reg_weight) regularized.push_back(weight != 0.0f);
    return regularized;
}

// Adds what a forward left in acts.losses and acts.mass_sums to acts.stats: the loss with weight `share`,
// masses with weight mass_share (0: none were measured).
template <class Float>
void add_stats(const Context& ctx, const GPT2<Float>& model, int B, int T, const TrainConfig& c, double share,
               double mass_share) {
    const double rows =
        (double)regularized_rows(B, T, model.config.num_heads, c.topk) * (double)model.config.num_layers;
    add_step_stats(ctx, model.acts.stats, model.acts.losses, B * T, share, model.acts.mass_sums,
                   B * model.config.num_heads, rows, mass_share, c.layer_lambda);
}

template <class Float>
void reset_stats(const Context& ctx, const GPT2<Float>& model) {
    CUDA_CHECK(cudaMemsetAsync(model.acts.stats, 0, sizeof(StepStats), ctx.stream));
}

// ---------------------------------------------------------------------------------------------------------
// backward

// The gradient of the bias that was the last to be added to the stream in front of layer l, fcproj's of the
// layer below it; null if that is the embedding. Like attproj's it is the sum of dresidual's rows, which the
// layernorm adds up when it writes them.
template <class Float>
float* fcproj_bias_below(const GPT2<Float>& model, int l) {
    return l == 0 ? nullptr : model.grads.layers[l - 1].fcproj_b;
}

// dresidual holds the gradient of the layer's output and leaves with that of its input. Adds to the gradients
// of the layer's parameters; of fcproj's biases to that of the layer below, as the call before has added to
// this layer's. reg_weight: this layer's of reg_weights(), on the device; null: it is not regularized.
template <class Float>
void layer_backward(const Context& ctx, const GPT2<Float>& model, int l, const Float* inp, int B, int T,
                    int topk, const float* reg_weight) {
    const LayerParams<Float>& p = model.params.layers[l];
    const LayerParams<float>& g = model.grads.layers[l];
    const LayerActs<Float>& a = model.acts.layers[l];
    const Acts<Float>& acts = model.acts;
    const int BT = B * T, C = model.config.channels, NH = model.config.num_heads,
              hs = model.config.head_size();

    if (model.recompute >= 1)
        layernorm_forward<Float>(ctx, a.ln1, a.ln1_mean, a.ln1_rstd, nullptr, nullptr, inp, p.ln1_w, p.ln1_b,
                                 BT, C);
    if (model.recompute == 1) {
        layernorm_forward<Float>(ctx, a.ln2, a.ln2_mean, a.ln2_rstd, nullptr, nullptr, a.residual_mid,
                                 p.ln2_w, p.ln2_b, BT, C);
        gelu_forward(ctx, a.fch_gelu, a.fch, (size_t)BT * 4 * C);
    } else if (model.recompute == 2) {
        layer_forward(ctx, model, l, inp, B, T, topk);
    }

    // A bias's gradient is the sum of the rows of its output's. Where another kernel writes these rows, it
    // adds them up as well: attproj's and fcproj's (of the layer below) the layernorm, qkv's attention.
    float* const elsewhere = nullptr;

    // out = mid + fcproj(gelu(fc(ln2(mid)))): dresidual passes to mid as it is, plus what comes through the
    // MLP
    linear_gelu_backward(ctx, acts.fp8_of(l, kFcproj), acts.dfch, g.fcproj_w, elsewhere, acts.scratch,
                         acts.dresidual, a.fch_gelu, a.fch, p.fcproj_w, BT, 4 * C, C);
    linear_backward(ctx, acts.fp8_of(l, kFc), acts.dbranch, g.fc_w, g.fc_b, acts.scratch, acts.dfch, a.ln2,
                    p.fc_w, BT, C, 4 * C);
    layernorm_backward(ctx, acts.dresidual, g.ln2_w, g.ln2_b, g.attproj_b, acts.scratch, acts.dbranch,
                       a.residual_mid, p.ln2_w, a.ln2_mean, a.ln2_rstd, BT, C);
    // mid = inp + attproj(attention(qkv(ln1(inp))))
    linear_backward(ctx, acts.fp8_of(l, kAttproj), acts.dbranch, g.attproj_w, elsewhere, acts.scratch,
                    acts.dresidual, a.att, p.attproj_w, BT, C, C);
    attention_backward(ctx, acts.dqkv, g.qkv_b, acts.att_scratch, acts.dbranch, a.att, a.qkv, a.rows,
                       model.reg, reg_weight, B, T, NH, hs, topk);
    linear_backward(ctx, acts.fp8_of(l, kQkv), acts.dbranch, g.qkv_w, elsewhere, acts.scratch, acts.dqkv,
                    a.ln1, p.qkv_w, BT, C, 3 * C);
    layernorm_backward(ctx, acts.dresidual, g.ln1_w, g.ln1_b, fcproj_bias_below(model, l), acts.scratch,
                       acts.dbranch, inp, p.ln1_w, a.ln1_mean, a.ln1_rstd, BT, C);
}

// From acts.logits, which hold their gradient, to every parameter's gradient, which is added to. Layers that
// are not regularized run kernels without the regularizer's code: so that is said here, not by a weight of 0
// in acts.reg_weight.
template <class Float>
void backward(const Context& ctx, const GPT2<Float>& model, int B, int T, int topk,
              const std::vector<bool>& regularized) {
    const Acts<Float>& acts = model.acts;
    const int C = model.config.channels, L = model.config.num_layers, BT = B * T;
    matmul_backward<Float>(ctx, acts.dbranch, model.grads.wte, nullptr, nullptr, acts.logits, acts.lnf,
                           model.params.wte, BT, C, model.config.padded_vocab_size);
    layernorm_backward(ctx, acts.dresidual, model.grads.lnf_w, model.grads.lnf_b, fcproj_bias_below(model, L),
                       acts.scratch, acts.dbranch, acts.layers[L - 1].residual, model.params.lnf_w,
                       acts.lnf_mean, acts.lnf_rstd, BT, C, false);
    for (int l = L - 1; l >= 0; l--)
        layer_backward(ctx, model, l, layer_input(model, l), B, T, topk,
                       regularized[l] ? acts.reg_weight + l : nullptr);
    encoder_backward(ctx, model.grads.wte, model.grads.wpe, acts.scratch, acts.dresidual, acts.token_plan, B,
                     T, C);
}

// ---------------------------------------------------------------------------------------------------------
// update: micro-steps, then the optimizer's step

// Sends x, y [B,T] to acts.inputs and acts.targets, and for a backward (unless reg_weight is null) the plan
// of the embedding's gradient and each layer's reg_weight. Returns while the copies are under way.
template <class Float>
void send_batch(const Context& ctx, const GPT2<Float>& model, const int* x, const int* y, int BT,
                const std::vector<float>* reg_weight) {
    BufferPair<int>& buffers = model.batches->buffers;
    const int64_t number = model.batches->sent++;
    buffers.wait(number);  // what this one held last has arrived
    int* at = buffers[number];
    const auto send = [&](auto* to, const auto* from, size_t n) {
        static_assert(sizeof *to == sizeof(int) && sizeof *from == sizeof(int));
        memcpy(at, from, n * sizeof(int));
        CUDA_CHECK(cudaMemcpyAsync(to, at, n * sizeof(int), cudaMemcpyHostToDevice, ctx.stream));
        at += n;
    };
    send(model.acts.inputs, x, BT);
    send(model.acts.targets, y, BT);
    if (reg_weight) {
        const std::vector<int> plan = plan_tokens(x, BT, model.config.vocab_size);
        send(model.acts.token_plan, plan.data(), plan.size());
        send(model.acts.reg_weight, reg_weight->data(), reg_weight->size());
    }
    buffers.launched(ctx, number);
}

// One micro-step: forward, loss, backward of x, y [B,T]. Its gradient is added to, times `share` (1 / the
// number of micro-steps of an update), and what it measured to acts.stats: masses with weight mass_share, and
// not at all if that is 0 and lambda too. Nothing here waits for the device, and from the third micro-step of
// a kind on it replays a recording: what is behind send_batch() is the same every time.
template <class Float>
void micro_step(const Context& ctx, const GPT2<Float>& model, const int* x, const int* y,
                const TrainConfig& c, float lambda, float share, float mass_share) {
    const int B = c.B, T = c.T, BT = B * T, topk = mass_share > 0 || lambda > 0 ? c.topk : 0;
    if (topk == 0) mass_share = 0.0f;
    const std::vector<float> reg_weight = reg_weights(c, model.config, B, T, lambda, share);
    const std::vector<bool> regularized = are_regularized(reg_weight);
    send_batch(ctx, model, x, y, BT, &reg_weight);
    Graph& graph = (*model.micro_steps)[{B, T, topk, regularized, share, mass_share, c.layer_lambda}];
    graph.run(ctx, [&] {
        forward(ctx, model, B, T, topk);
        logits_forward(ctx, model, 0, BT);
        classifier(ctx, model.acts.losses, model.acts.logits, model.acts.targets, share / (float)BT, BT,
                   model.config.vocab_size, model.config.padded_vocab_size, true);
        backward(ctx, model, B, T, topk, regularized);
        add_stats(ctx, model, B, T, c, share, mass_share);
    });
}

// Clips the gradient to norm c.clip and takes AdamW's step number t (from 1); the norm before clipping goes
// to acts.stats. If it is not finite nothing is changed, and check_stats() will say so. Nothing here waits
// either.
template <class Float>
void optimizer_step(const Context& ctx, const GPT2<Float>& model, const TrainConfig& c, float lr, int64_t t) {
    const Acts<Float>& acts = model.acts;
    grad_norm(ctx, &acts.stats->norm, acts.scratch, model.grads_base, model.num_params, c.clip);
    find_bad_tensor(ctx, acts.stats, model.grads_base, acts.tensor_begin,
                    (int)gpt2_params(model.config).size());
    const AdamW adamw{.lr = lr, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = c.weight_decay};
    adamw_update(ctx, model.params_base, model.master, model.m, model.v, model.grads_base, model.decay_bits,
                 &acts.stats->norm, model.num_params, adamw, t);
}

// Throws, with the tensor's name, if what update t measured is not finite.
void check_stats(const StepStats& stats, const GPT2Config& config, int64_t t) {
    std::string what;
    if (!std::isfinite(stats.ce))
        what = "loss.ce";
    else if (!std::isfinite(stats.reg) || !std::isfinite(stats.mass))
        what = "loss.reg";
    else if (!stats.norm.finite && stats.bad_tensor > 0)
        what = "grad." + gpt2_params(config)[gpt2_params(config).size() - stats.bad_tensor].name;
    else if (!stats.norm.finite)
        what = "the gradient norm, which overflows,";
    else
        return;
    fail("update %lld: %s is not finite; training stops, checkpoints stay as they are (lower --lr or -l?)",
         (long long)t, what.c_str());
}

// Update number step + 1, launched: the gradient of c.tokens_per_update tokens, micro-batch by micro-batch,
// then AdamW's step. What it measures is in acts.stats when the device is done.
template <class Float>
void train_step(const Context& ctx, const GPT2<Float>& model, DataLoader& data, const TrainConfig& c,
                float lr, float lambda, int64_t step) {
    const int64_t micro_steps = c.micro_steps();
    const float share = 1.0f / (float)micro_steps;
    CUDA_CHECK(cudaMemsetAsync(model.grads_base, 0, model.num_params * sizeof(float), ctx.stream));
    reset_stats(ctx, model);
    for (int64_t i = 0; i < micro_steps; i++) {
        if (!c.overfit) data.next_batch();
        // plain GPT-2 measures its mass on the first micro-step only: the others cost nothing extra
        const float mass_share = lambda > 0 ? share : i == 0 ? 1.0f : 0.0f;
        micro_step(ctx, model, data.inputs(), data.targets(), c, lambda, share, mass_share);
    }
    optimizer_step(ctx, model, c, lr, step + 1);
}

// ---------------------------------------------------------------------------------------------------------
// validation and samples

struct Validation {
    double ce = 0;
    double mass = NAN;         // top-k mass, mean over the rows with more than k keys
    double mass_nosink = NAN;  // of the attention that does not go to position 0, the share within the top k
    double sink = NAN;         // mean attention to position 0
    double self = NAN;         // and to the query's own position
};

// The mean over the first c.val_batches micro-batches of `data`, or all of it where it has fewer; nothing if
// it is interrupted. Overwrites acts.stats, leaves `data` behind its last batch, and waits for the device.
template <class Float>
std::optional<Validation> validate(const Context& ctx, const GPT2<Float>& model, DataLoader& data,
                                   const TrainConfig& c) {
    const int T = c.T, L = model.config.num_layers, NH = model.config.num_heads;
    const int64_t all = data.windows();
    const int64_t windows = c.val_batches > all / c.B ? all : c.val_batches * c.B;
    const Context quick = without_tuning(ctx);
    Validation v;
    double sinks[4] = {};  // p_i0, p_ii, top-k mass without key 0, mass without key 0
    reset_stats(ctx, model);
    data.reset();
    for (int64_t done = 0; done < windows; done += c.B) {
        if (g_interrupted) return std::nullopt;
        const int B = (int)std::min<int64_t>(c.B, windows - done);  // the last batch has what is left
        const double share = (double)B / (double)windows;
        const Context& here = B == c.B ? ctx : quick;
        data.next_batch(B);
        send_batch(here, model, data.inputs(), data.targets(), B * T, nullptr);
        forward(here, model, B, T, c.topk, true);
        logits_forward(here, model, 0, B * T);
        classifier(here, model.acts.losses, model.acts.logits, model.acts.targets, 0.0f, B * T,
                   model.config.vocab_size, model.config.padded_vocab_size, false);
        add_stats(here, model, B, T, c, share, c.topk > 0 ? share : 0.0);
        if (c.topk == 0) continue;
        const std::vector<float> sums = to_host(here, model.acts.sink_sums, (size_t)L * B * NH * 4);
        for (size_t s = 0; s < sums.size(); s++) sinks[s % 4] += sums[s];
    }
    const StepStats stats = to_host(ctx, model.acts.stats, 1)[0];
    v.ce = stats.ce;
    if (c.topk == 0) return v;
    const double rows = (double)regularized_rows(1, T, NH, c.topk) * L * (double)windows;
    v.mass = stats.mass;
    v.mass_nosink = sinks[3] > 0 ? sinks[2] / sinks[3] : 1.0;
    v.sink = rows > 0 ? sinks[0] / rows : NAN;
    v.self = rows > 0 ? sinks[1] / rows : NAN;
    return v;
}

// Continues `prompt` by c.sample_tokens tokens, or fewer if it is interrupted. Each token is a forward over
// all before it; what lies more than T tokens back is forgotten.
template <class Float>
std::vector<uint16_t> generate(const Context& ctx, const GPT2<Float>& model,
                               const std::vector<uint16_t>& prompt, const TrainConfig& c, int64_t step) {
    const Context quick = without_tuning(ctx);
    std::vector<uint16_t> tokens = prompt;
    for (int64_t i = 0; i < c.sample_tokens && !g_interrupted; i++) {
        const int n = (int)std::min<size_t>(tokens.size(), c.T);
        const std::vector<int> window(tokens.end() - n, tokens.end());
        to_device(model.acts.inputs, window.data(), window.size());
        forward(quick, model, 1, n, 0);
        logits_forward(quick, model, n - 1, 1);
        const std::vector<Float> last = to_host(quick, model.acts.logits, model.config.vocab_size);
        const std::vector<float> logits(last.begin(), last.end());
        const double uniform = random_uniform(c.seed, ~(uint64_t)step, (uint64_t)i);
        tokens.push_back((uint16_t)sample_token(logits.data(), model.config.vocab_size, 1.0f, uniform));
    }
    return std::vector<uint16_t>(tokens.begin() + prompt.size(), tokens.end());
}

// The first tokens of a validation window as the prompt, and what the model makes of them.
template <class Float>
std::string sample_text(const Context& ctx, const GPT2<Float>& model, DataLoader& data,
                        const Tokenizer* tokenizer, const TrainConfig& c, int64_t step) {
    data.reset();
    data.next_batch(1);
    const int prompt_tokens = std::max(1, std::min(32, c.T / 4));
    const std::vector<uint16_t> prompt(data.inputs(), data.inputs() + prompt_tokens);
    const std::vector<uint16_t> made = generate(ctx, model, prompt, c, step);
    const auto text = [&](const std::vector<uint16_t>& tokens) {
        if (tokenizer) return tokenizer->decode(tokens);
        std::string numbers;
        for (uint16_t t : tokens) numbers += (numbers.empty() ? "" : " ") + std::to_string(t);
        return numbers;
    };
    return "sample after " + updates_text(step) + " (the prompt is in brackets):\n" +
           terminal_text("[" + text(prompt) + "]" + (tokenizer ? "" : " ") + text(made)) + "\n";
}

// ---------------------------------------------------------------------------------------------------------
// checkpoints

// lambda's rise in words: for the table at the start, and as a setting. Checkpoints have the latter, so it
// must not change.
struct LambdaRise {
    std::string table, setting;
};
LambdaRise lambda_rise(const TrainConfig& c) {
    const std::string start = std::to_string(c.lambda_start_updates);
    const std::string end = std::to_string(c.lambda_warmup_updates);
    const char* early = c.lambda_warmup_updates >= c.updates ? ", and the run ends before it is full" : "";
    if (c.lambda_start_updates > 0)
        return {" (rising from update " + start + " to " + end + early + ")",
                start + " to " + end + " updates"};
    return {c.lambda_warmup_updates > 0
                ? " (rising over " + updates_text(c.lambda_warmup_updates) + early + ")"
                : "",
            end + " updates"};
}

// The layers' factors on lambda: "0,1,1,1".
std::string factors_text(const TrainConfig& c) {
    std::string text;
    for (float factor : c.layer_lambda) text += (text.empty() ? "" : ",") + setting_text(factor);
    return text;
}

// The settings that change the mathematics of a run: a resumed run must have the same ones.
std::map<std::string, std::string> run_settings(const TrainConfig& c, const GPT2Config& config,
                                                const DataLoader& train, const DataLoader* val,
                                                const char* precision) {
    std::map<std::string, std::string> settings = {
        {"model", format("%d layers, %d heads, %d channels, %d tokens", config.num_layers, config.num_heads,
                         config.channels, config.vocab_size)},
        {"training data",
         format("%lld tokens in %d shards", (long long)train.num_tokens(), train.num_shards())},
        {kDataDigest, format("%016llx", (unsigned long long)train.digest())},
        {"lambda", setting_text(c.lambda)},
        {"topk", std::to_string(c.topk)},
        {"reg", reg_name(c.reg)},
        {"lambda-warmup", lambda_rise(c).setting},
        {"lambda-layers", factors_text(c)},
        {"batch", std::to_string(c.B)},
        {"context", std::to_string(c.T)},
        {"tokens-per-update", std::to_string(c.tokens_per_update)},
        {"updates", std::to_string(c.updates)},
        {"lr", setting_text(c.lr)},
        {"schedule", schedule_name(c.schedule)},
        {"warmup", std::to_string(c.warmup_updates) + " updates"},
        {"final-lr", setting_text(c.final_lr)},
        {"weight-decay", setting_text(c.weight_decay)},
        {"clip", setting_text(c.clip)},
        {"overfit", c.overfit ? "yes" : "no"},
        {"seed", std::to_string(c.seed)},
        {"precision", precision}};
    if (val) settings[kValDigest] = format("%016llx", (unsigned long long)val->digest());
    return settings;
}

// A run: what its updates work on, and how many are done.
template <class Float>
struct Run {
    const TrainConfig& c;
    DataLoader train_data;
    std::unique_ptr<DataLoader> val_data;  // null where nothing is validated or sampled
    GPT2<Float> model;
    std::unique_ptr<Tokenizer> tokenizer = nullptr;    // null: tokens stay numbers
    std::map<std::string, std::string> settings = {};  // run_settings()
    std::unique_ptr<TargetLoss> target = nullptr;      // null without --target-loss
    int64_t step = 0;                                  // updates done
};

template <class Float>
void save(const Context& ctx, const Run<Float>& run) {
    const GPT2<Float>& model = run.model;
    const std::vector<float> params = to_host(ctx, model.master, model.num_params);
    const std::vector<float> m = to_host(ctx, model.m, model.num_params),
                             v = to_host(ctx, model.v, model.num_params);
    RunState state;
    state.step = run.step;
    state.seed = run.c.seed;
    state.epoch = run.train_data.state().epoch;
    state.position = run.train_data.state().position;
    state.settings = run.settings;
    if (run.target) state.extra["target-loss"] = run.target->state();
    save_checkpoint(run.c.out, model.config, params.data(), m.data(), v.data(), state);
}

// Goes on from a checkpoint, whose settings must be the run's.
template <class Float>
void resume(Run<Float>& run, const std::string& folder) {
    RunState state = load_run_state(folder);
    check_settings(folder, state.settings, run.settings);
    if (run.target) run.target->restore(state.extra["target-loss"], state.step);
    GPT2<Float>& model = run.model;
    std::vector<float> host(model.num_params), other(model.num_params);
    load_weights(find_model(folder), model.config, host.data());
    upload_params(model, host);
    load_optimizer(folder, model.config, host.data(), other.data());
    to_device(model.m, host.data(), host.size());
    to_device(model.v, other.data(), other.size());
    run.train_data.restore({state.epoch, state.position});
    run.step = state.step;
}

// ---------------------------------------------------------------------------------------------------------
// setting up

// log/run1, log/run2, ...: one behind the last that is there; to resume, that one.
std::string default_run_folder(bool resume) {
    const std::vector<int64_t> runs = numbered_runs("log");
    if (!resume) return "log/" + run_folder_name(runs.empty() ? 1 : runs.back() + 1);
    if (runs.empty()) fail("there is no log/run1, log/run2, ... to resume: name the run folder with -o");
    return "log/" + run_folder_name(runs.back());
}

// Factors on lambda: one for all layers, or one for each.
std::vector<float> parse_layer_lambda(const std::string& text, int num_layers) {
    std::vector<float> factors;
    for (const std::string& factor : split_list(text))
        factors.push_back(parse_float("--lambda-layers", factor, 0, 1e6));
    if (factors.size() == 1) factors.resize(num_layers, factors[0]);
    if ((int)factors.size() != num_layers)
        fail(
            "--lambda-layers has %zu factors, and the model has %d layers: give one for all, or one for each",
            factors.size(), num_layers);
    return factors;
}

// What the run starts from, before its vocabulary and context are known.
struct Start {
    GPT2Config config;
    bool from_scratch;
    WeightFiles weights;  // unless from scratch

    const WeightFiles* files() const { return from_scratch ? nullptr : &weights; }
};

Start find_start(TrainConfig& c) {
    if (c.from.empty()) c.from = kOnCpu ? "tiny" : is_folder(public_weights("124M")) ? "124M" : "d12";
    Start start{{}, true, {}};
    if (preset_config(c.from, start.config)) return start;
    try {
        start.weights =
            find_named_model(c.from, "tiny, d6 ... d48, 124M ... 1558M, or a model's folder or file");
    } catch (const Error&) {
        // What a run began with may be gone: its checkpoint has all that it needs.
        const std::string checkpoint = c.resume ? latest_checkpoint(c.out) : "";
        if (checkpoint.empty()) throw;
        start.weights = find_model(checkpoint);
    }
    start.config = config_for_weights(start.weights);
    start.from_scratch = false;
    return start;
}

std::vector<float> first_params(const Start& start, const GPT2Config& config, uint64_t seed) {
    if (start.from_scratch) return init_params(config, seed);
    std::vector<float> params(num_parameters(config));
    load_weights(start.weights, config, params.data());
    return params;
}

// --export: whatever -e names, as the folder that transformers opens.
void export_weights(TrainConfig& c) {
    const Start start = find_start(c);
    if (start.from_scratch)
        fail("--export writes weights that are there: name them with -e, not %s", c.from.c_str());
    const GPT2Config& config = start.config;
    const std::unique_ptr<Tokenizer> tokenizer = find_tokenizer(start.files(), config.vocab_size);
    const std::string vocabulary =
        tokenizer && config.vocab_size != kByteVocab ? vocabulary_folder(start.files()) : "";
    std::vector<float> params(num_parameters(config));
    load_weights(start.weights, config, params.data());
    export_model(c.export_to, config, params.data(), vocabulary);
    printf("wrote %s (%s: %d layers, %d heads, %d channels, vocabulary %d) to %s%s\n",
           start.weights.path.c_str(), format_name(start.weights.format), config.num_layers, config.num_heads,
           config.channels, config.vocab_size, c.export_to.c_str(),
           vocabulary.empty() ? ", without a tokenizer" : "");
}

// The vocabulary of the default data that suits the model: bytes for tiny, GPT-2's for the rest. Where that
// could not be got, a model from scratch can learn bytes, too.
void choose_data(TrainConfig& c, const Start& start) {
    const bool bytes = start.from_scratch ? c.from == "tiny" : start.config.vocab_size == kByteVocab;
    const char* tokens = bytes ? "bytes" : "gpt2";
    if (c.train_data.empty()) {
        if (!c.val_data.empty())
            fail("-j (--val-data) is given without -i (--train-data): give both, or neither");
        if (!bytes && !any_shards(default_data(tokens, "train"))) {
            constexpr const char* missing =
                "the default data has no GPT-2 tokens (data/fetch gpt2 gets the vocabulary, then make)";
            if (!start.from_scratch) fail("%s: get it, or name token shards with -i and -j", missing);
            printf("%s: training on bytes\n", missing);
            tokens = "bytes";
        }
        c.train_data = default_data(tokens, "train");
        c.val_data = default_data(tokens, "val");
    }
    if (c.val_data.empty() && (c.validate_every > 0 || c.sample_every > 0))
        fail("-i (--train-data) is given without -j (--val-data): give validation shards, or -v 0 -s 0");
}

ModelSpec model_spec(const TrainConfig& c, const GPT2Config& config, int B) {
    return {config, B, c.T, c.recompute, c.reg, c.precision == Precision::fp8, c.debug_state.empty()};
}

// The tokens of an update on a GPU where -d does not say: 65,536, or the next number above it that whole
// micro-batches make: of B rows, or where that is open (-1) of a power of two up to 64, so that
// choose_batch() may take any smaller one.
int64_t default_update_tokens(int B, int T) {
    const int64_t rows = ceil_div(65536, T);
    if (B < 0)
        for (B = 64; B > rows;) B /= 2;
    return ceil_div(rows, (int64_t)B) * B * T;
}

// The updates of a run on a GPU where -x does not say. 500 would read the default data, 300,000 tokens, a
// hundred times: GPT-2 learns that by heart, and its loss on other text rises again.
int64_t default_updates(int64_t data_tokens, int64_t tokens_per_update) {
    return std::clamp<int64_t>(20 * data_tokens / tokens_per_update, 100, 500);
}

// The micro-batch: on a CPU the largest of up to 12 rows that divides an update's tokens, if those are given;
// on a GPU the largest of 64, 32, ..., 2 that divides them and fits into its free memory. Otherwise 1: where
// that does not divide them, check_settings_fit() says so, where it does not fit, create_model().
template <class Float>
int choose_batch(const Context& ctx, const GPT2Config& config, const TrainConfig& c) {
    const auto divides = [&](int B) { return c.tokens_per_update % ((int64_t)B * c.T) == 0; };
    if (kOnCpu) {
        int B = 12;
        while (c.tokens_per_update > 0 && B > 1 && !divides(B)) B--;
        return B;
    }
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    for (int B = 64; B > 1; B /= 2)
        if (divides(B) &&
            // a tenth for what is not laid out here: kernels that are loaded, recordings
            (double)model_bytes<Float>(ctx, model_spec(c, config, B)) < 0.9 * (double)free_bytes)
            return B;
    return 1;
}

// The vocabulary of a model from scratch is that of the data; weights must share it.
void match_vocabulary(GPT2Config& config, const Start& start, const TrainConfig& c, int vocab_size) {
    if (start.from_scratch) {
        config.vocab_size = vocab_size;
        config.padded_vocab_size = pad_vocab(vocab_size);
    } else if (vocab_size != config.vocab_size) {
        fail("%s has a vocabulary of %d tokens, and the shards of %s one of %d: they do not belong together",
             c.from.c_str(), config.vocab_size, c.train_data.c_str(), vocab_size);
    }
}

// Null if there is nothing to validate on.
std::unique_ptr<DataLoader> open_val_data(const TrainConfig& c, const GPT2Config& config) {
    if (c.val_data.empty()) return nullptr;
    auto data = std::make_unique<DataLoader>(c.val_data, c.B, c.T, false, 0);
    if (data->vocab_size() != config.vocab_size)
        fail("the shards of %s have a vocabulary of %d tokens, and those of %s one of %d", c.val_data.c_str(),
             data->vocab_size(), c.train_data.c_str(), config.vocab_size);
    return data;
}

// What the flags left open, and shares of the run in updates. data_tokens: what there is to train on.
template <class Float>
void resolve_defaults(TrainConfig& c, GPT2Config& config, bool from_scratch, int64_t data_tokens,
                      const Context& ctx) {
    if (c.T < 0) c.T = from_scratch ? config.max_seq_len : std::min(1024, config.max_seq_len);
    if (from_scratch) config.max_seq_len = c.T;
    if (c.T > config.max_seq_len)
        fail("-t (--context) is %d, and %s has %d positions: give at most that", c.T, c.from.c_str(),
             config.max_seq_len);
    if (!kOnCpu && c.tokens_per_update < 0) c.tokens_per_update = default_update_tokens(c.B, c.T);
    if (c.B < 0) c.B = choose_batch<Float>(ctx, config, c);
    if (c.tokens_per_update < 0) c.tokens_per_update = (int64_t)c.B * c.T;
    if (c.updates < 0) c.updates = kOnCpu ? 1000 : default_updates(data_tokens, c.tokens_per_update);
    if (c.lr < 0) c.lr = !from_scratch ? 5e-5f : config.channels <= 128 ? 2e-3f : 6e-4f;
    c.warmup_updates = parse_updates("-u (--warmup)", c.warmup, c.updates);
    c.lambda_warmup_updates = parse_updates("--lambda-warmup", c.lambda_warmup, c.updates);
    c.lambda_start_updates = parse_updates("--lambda-start", c.lambda_start, c.updates);
    c.layer_lambda = parse_layer_lambda(c.lambda_layers, config.num_layers);
    if (const std::string problem = config_problem(config); !problem.empty())
        fail("this model cannot be trained: %s", problem.c_str());
}

// Settings that do not go together, or not with this model or device.
void check_settings_fit(const TrainConfig& c, const GPT2Config& config, const Context& ctx) {
    check_batch_fits(c.B, c.T, config.num_heads);
    const int64_t micro = (int64_t)c.B * c.T;
    if (c.tokens_per_update % micro)
        fail("-d (--tokens-per-update) is %lld, which is not a multiple of -b times -t (%d * %d = %lld)",
             (long long)c.tokens_per_update, c.B, c.T, (long long)micro);
    if (c.precision == Precision::fp8) {
        if (!ctx.has_fp8)
            fail("--precision fp8 needs a GPU of compute capability 8.9 or newer, and %s is older: use bf16",
                 ctx.device_name.c_str());
        if (micro % kFp8Multiple || config.channels % kFp8Multiple)
            fail("--precision fp8 needs -b times -t (%lld) and the channels (%d) to be multiples of %d",
                 (long long)micro, config.channels, kFp8Multiple);
    }
    if (c.lambda_start_updates > c.lambda_warmup_updates)
        fail(
            "--lambda-start (update %lld) lies behind the end of lambda's rise, --lambda-warmup (%lld): give an earlier one",
            (long long)c.lambda_start_updates, (long long)c.lambda_warmup_updates);
    if (!c.target_loss.path.empty() && c.lambda == 0)
        fail("--target-loss adjusts lambda from -l on: give an -l greater than 0");
    if (c.topk == 0 && c.lambda > 0)
        fail("-k 0 measures nothing, so it goes with -l 0 only: give -k 1 or more");
    if (c.topk > 0 && c.T > max_topk_context(ctx))
        fail("-k (--topk) works up to -t %d here: lower -t (%d), or give -l 0 -k 0", max_topk_context(ctx),
             c.T);
}

// -e as it means the same in another folder, whatever lies beside the run: a preset's or size's name stays.
std::string name_elsewhere(const std::string& from) {
    GPT2Config config;
    return preset_config(from, config) || !public_weights(from).empty() ? from : absolute_path(from);
}

// What the machine decided where no flag did (files, free memory), as if it had been given: with -y it must
// be the same. And names that mean the same in another folder.
void keep_decisions(TrainConfig& c) {
    c.given.insert({{"batch", std::to_string(c.B)},
                    {"context", std::to_string(c.T)},
                    {"tokens-per-update", std::to_string(c.tokens_per_update)},
                    {"updates", std::to_string(c.updates)}});
    c.given["from"] = name_elsewhere(c.from);
    c.given["train-data"] = absolute_pattern(c.train_data);
    if (!c.val_data.empty()) c.given["val-data"] = absolute_pattern(c.val_data);
    if (!c.target_loss.path.empty())
        c.given["target-loss"] = absolute_path(c.target_loss.path) + ":" + setting_text(c.target_loss.margin);
}

// ---------------------------------------------------------------------------------------------------------
// --debug-state

// The first micro-step with lambda in full, and everything an outsider needs to check it.
template <class Float>
void write_first_step(const Context& ctx, const GPT2<Float>& model, DataLoader& train, const TrainConfig& c) {
    const int B = c.B, T = c.T, BT = B * T, Vp = model.config.padded_vocab_size;
    train.next_batch();
    // The logits first: in a micro-step their gradient takes their place.
    send_batch(ctx, model, train.inputs(), train.targets(), BT, nullptr);
    forward(ctx, model, B, T, 0);
    logits_forward(ctx, model, 0, BT);
    const std::vector<Float> stored_logits = to_host(ctx, model.acts.logits, (size_t)BT * Vp);
    const std::vector<float> logits(stored_logits.begin(), stored_logits.end());

    reset_stats(ctx, model);
    micro_step(ctx, model, train.inputs(), train.targets(), c, c.lambda, 1.0f, 1.0f);
    const StepStats stats = to_host(ctx, model.acts.stats, 1)[0];
    std::vector<float> mass, theta;
    const size_t rows = (size_t)BT * model.config.num_heads;
    for (const LayerActs<Float>& a : model.acts.layers) {
        const auto layer_mass = c.topk > 0 ? to_host(ctx, a.rows.mass, rows) : std::vector<float>(rows, 1.0f);
        const auto layer_theta =
            c.topk > 0 ? to_host(ctx, a.rows.theta, rows) : std::vector<float>(rows, -INFINITY);
        mass.insert(mass.end(), layer_mass.begin(), layer_mass.end());
        theta.insert(theta.end(), layer_theta.begin(), layer_theta.end());
    }

    DebugState s;
    s.B = B;
    s.T = T;
    s.x = train.inputs();
    s.y = train.targets();
    s.ce = (float)stats.ce;
    s.reg = (float)stats.reg;
    s.total = (float)(stats.ce + c.lambda * stats.reg);
    s.logits = logits.data();
    s.logits_stride = Vp;
    s.topk_mass = mass.data();
    s.topk_threshold = theta.data();
    s.param = [&](const ParamTensor& p) {
        const std::vector<Float> stored = to_host(ctx, model.params_base + p.offset, p.size());
        return std::vector<float>(stored.begin(), stored.end());
    };
    s.grad = [&](const ParamTensor& p) { return to_host(ctx, model.grads_base + p.offset, p.size()); };
    s.metadata = {
        {"topk", std::to_string(c.topk)}, {"lambda", format("%.9g", c.lambda)}, {"reg", reg_name(c.reg)}};
    write_debug_state(c.debug_state, model.config, s);
    printf("wrote the first micro-step to %s: loss %.6f = %.6f + %g * %.6f\n", c.debug_state.c_str(), s.total,
           s.ce, c.lambda, s.reg);
}

// ---------------------------------------------------------------------------------------------------------
// the loop

// Why a lambda greater than 0 regularizes nothing; "" where it does.
std::string why_not_regularized(const TrainConfig& c) {
    if (c.topk >= c.T) return "no row has more, so there is nothing to regularize";
    if (c.lambda_start_updates >= c.updates)
        return "lambda begins to rise behind the end of the run, so nothing is regularized";
    if (*std::max_element(c.layer_lambda.begin(), c.layer_lambda.end()) == 0)
        return "all --lambda-layers are 0, so nothing is regularized";
    return "";
}

template <class Float>
std::vector<std::pair<std::string, std::string>> settings_rows(const Run<Float>& run, const Context& ctx,
                                                               const char* precision) {
    const TrainConfig& c = run.c;
    const GPT2Config& config = run.model.config;
    const int64_t train_tokens = run.train_data.num_tokens();
    const std::string micro = format("%d x %d", c.B, c.T);
    bool cudnn = false;
    if constexpr (kUseCudnn) cudnn = has_attention_cudnn(ctx, c.B, c.T, config.num_heads, config.head_size());
    const std::string rise = c.lambda > 0 ? lambda_rise(c).table : "";
    const bool all_one = std::count(c.layer_lambda.begin(), c.layer_lambda.end(), 1.0f) == config.num_layers;
    const std::string factors =
        c.lambda == 0 || all_one ? "" : " times " + factors_text(c) + " in the layers";
    std::string idle = c.lambda == 0 ? "" : why_not_regularized(c);
    if (!idle.empty()) idle = ": " + idle;
    const std::string decay =
        c.schedule == Schedule::constant ? "" : format(", down to %g of it", c.final_lr);
    std::string limit;
    if (!c.target_loss.path.empty())
        limit = format(" (to begin with; loss within %g of %s)", c.target_loss.margin,
                       c.target_loss.path.c_str());
    return {
        {"device", ctx.device_name + ", " + precision +
                       (cudnn ? ", cuDNN's attention where lambda is 0 and masses are not measured" : "")},
        {"model", format("%s: %d layers, %d heads, %d channels, vocabulary %d, %s parameters", c.from.c_str(),
                         config.num_layers, config.num_heads, config.channels, config.vocab_size,
                         pretty_count((double)num_weights(config)).c_str())},
        {"regularizer", c.topk == 0 ? "off, and not measured"
                                    : format("%s, lambda %g%s%s, top %d keys%s", reg_name(c.reg), c.lambda,
                                             factors.c_str(), (rise + limit).c_str(), c.topk, idle.c_str())},
        {"data", format("%s (%s tokens)", c.train_data.c_str(), pretty_count((double)train_tokens).c_str())},
        {"update", format("%lld tokens: %lld micro-batch%s of %s", (long long)c.tokens_per_update,
                          (long long)c.micro_steps(), c.micro_steps() == 1 ? "" : "es", micro.c_str())},
        {"run", format("%s, %s tokens, %.2f epochs", updates_text(c.updates).c_str(),
                       pretty_count((double)c.updates * (double)c.tokens_per_update).c_str(),
                       (double)c.updates * (double)c.tokens_per_update / (double)train_tokens)},
        {"learning rate", format("%g, %s, warm-up %s%s%s; weight decay %g, clip %g", c.lr,
                                 schedule_name(c.schedule), updates_text(c.warmup_updates).c_str(),
                                 c.warmup_updates > c.updates ? " (the run ends before it is reached)" : "",
                                 decay.c_str(), c.weight_decay, c.clip)},
        {"memory",
         format("%s, recompute %d", pretty_bytes((double)run.model.memory->bytes).c_str(), c.recompute)},
        {"run folder", c.out + (run.step > 0 ? " (resumed after " + updates_text(run.step) + ")" : "")},
    };
}

// What updates measured, on its way from the device to the log. The numbers of an update are read while the
// next one runs: the device never waits for the host to print. (On the CPU backend an update is over when its
// launch returns.)
class UpdateReports {
  public:
    UpdateReports(int64_t step, const TrainConfig& c, const GPT2Config& config, TargetLoss* target,
                  MetricsLog& metrics, Progress& progress)
        : c_(c),
          config_(config),
          target_(target),
          metrics_(metrics),
          progress_(progress),
          recorded_(step),
          reported_(step) {}

    // Sends for the stats of the update that was launched last.
    void record(const Context& ctx, const StepStats* stats, float lr, float lambda) {
        CUDA_CHECK(
            cudaMemcpyAsync(stats_[recorded_], stats, sizeof(StepStats), cudaMemcpyDeviceToHost, ctx.stream));
        stats_.launched(ctx, recorded_);
        rates_[recorded_++ % 2] = {lr, lambda};
    }

    // Logs and shows the updates up to number `last`, in order. Throws where one is not finite.
    void report_until(int64_t last) {
        while (reported_ < last) report_next();
    }

    // The time since the last report went into something else than updates.
    void restart_clock() { begin_ = std::chrono::steady_clock::now(); }

  private:
    struct Rates {
        float lr, lambda;
    };

    void report_next() {
        stats_.wait(reported_);
        const StepStats& stats = *stats_[reported_];
        const auto [lr, lambda] = rates_[reported_ % 2];
        reported_++;
        check_stats(stats, config_, reported_);
        const auto now = std::chrono::steady_clock::now();
        const double seconds = std::chrono::duration<double>(now - begin_).count();
        begin_ = now;
        if (target_) target_->observe((float)stats.ce);
        const bool measured = c_.topk > 0;
        const UpdateMetrics m{
            .step = reported_,
            .loss = (float)(stats.ce + (measured ? lambda * stats.reg : 0.0)),
            .ce = (float)stats.ce,
            .reg = measured ? (float)stats.reg : NAN,
            .mass = measured ? (float)stats.mass : NAN,
            .lambda = lambda,
            .lr = lr,
            .norm = (float)stats.norm.norm,
            .tok_s = (float)((double)c_.tokens_per_update / seconds),
            .ms = (float)(seconds * 1e3),
        };
        metrics_.update(m);
        progress_.update(m);
    }

    const TrainConfig& c_;
    const GPT2Config& config_;
    TargetLoss* target_;
    MetricsLog& metrics_;
    Progress& progress_;
    BufferPair<StepStats> stats_{1};
    Rates rates_[2] = {};          // of the updates whose stats these are
    int64_t recorded_, reported_;  // updates
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

std::string validation_text(const Validation& v, const TrainConfig& c, int64_t step) {
    std::string text = format("validation after %s: loss %.4f", updates_text(step).c_str(), v.ce);
    if (std::isfinite(v.mass))
        text += format(", top-%d mass %.4f (%.4f without position 0)", c.topk, v.mass, v.mass_nosink);
    if (std::isfinite(v.sink))
        text += format("\n    attention to position 0: %.3f, to the query itself: %.3f", v.sink, v.self);
    return text;
}

// A signal lets the update be finished and saved. Who has pressed Ctrl-C is told so: an update may take long.
void stop_when_told() {
    const auto stop = [](int sig) {
        const bool again = g_interrupted;
        on_interrupt(sig);
        if (again || !isatty(STDERR_FILENO)) return;
        constexpr char kText[] = "\nstopping after this update; once more: at once\n";
        [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kText, sizeof(kText) - 1);
    };
    signal(SIGINT, stop);
    signal(SIGTERM, stop);
    signal(SIGPIPE, stop);                                         // as when Ctrl-C has ended tee
    if (signal(SIGHUP, stop) == SIG_IGN) signal(SIGHUP, SIG_IGN);  // nohup
}

// The updates that are left, until all are done or the run is interrupted.
template <class Float>
void train_loop(const Context& ctx, Run<Float>& run, MetricsLog& metrics) {
    const TrainConfig& c = run.c;
    int64_t& step = run.step;
    Progress progress(c.updates, step);
    const auto due = [&](int64_t every) { return every > 0 && (step % every == 0 || step == c.updates); };
    bool all_validated = true;
    const auto validate_if_due = [&] {
        if (!due(c.validate_every)) return;
        const std::optional<Validation> v = validate(ctx, run.model, *run.val_data, c);
        all_validated = v.has_value();
        if (!v) return;
        metrics.validation(step, (float)v->ce, (float)v->mass, (float)v->mass_nosink);
        progress.message(validation_text(*v, c, step));
    };

    if (!metrics.validated()) validate_if_due();  // before the first update, and where one was interrupted
    if (c.overfit) {  // the first batch, also where the run goes on from a checkpoint
        run.train_data.reset();
        run.train_data.next_batch();
    }
    UpdateReports reports(step, c, run.model.config, run.target.get(), metrics, progress);
    int64_t saved = step;
    for (bool stop = g_interrupted; step < c.updates && !stop;) {
        const float lr = learning_rate(c.schedule, c.lr, step, c.warmup_updates, c.updates, c.final_lr);
        const float lambda = lambda_at(step, c.lambda, c.lambda_start_updates, c.lambda_warmup_updates) *
                             (run.target ? run.target->factor(step + 1) : 1.0f);
        train_step(ctx, run.model, run.train_data, c, lr, lambda, step);
        reports.record(ctx, run.model.acts.stats, lr, lambda);
        step++;

        const bool pause = due(c.validate_every) || due(c.sample_every) || due(c.checkpoint_every);
        reports.report_until(kOnCpu || pause ? step : step - 1);
        validate_if_due();
        if (due(c.sample_every))
            progress.message(sample_text(ctx, run.model, *run.val_data, run.tokenizer.get(), c, step));
        stop = g_interrupted;  // once, and behind all that takes long: what stops the loop is also saved
        if (stop) reports.report_until(step);
        if (due(c.checkpoint_every) || (stop && c.checkpoint_every > 0)) {
            metrics.sync();
            save(ctx, run);
            saved = step;
        }
        if (pause) reports.restart_clock();
    }
    reports.report_until(step);
    progress.finish();
    const std::string end = step == c.updates && all_validated
                                ? format("done: %s; metrics%s are in %s\n", updates_text(step).c_str(),
                                         c.checkpoint_every > 0 ? " and checkpoints" : "", c.out.c_str())
                            : step == saved ? format("stopped after %s: go on with -y -o %s\n",
                                                     updates_text(step).c_str(), shell_word(c.out).c_str())
                                            : format("stopped after %s\n", updates_text(step).c_str());
    fputs(end.c_str(), stdout);
    if (fflush(stdout) != 0 || ferror(stdout)) fputs(end.c_str(), stderr);  // Ctrl-C has ended tee, say
}

// ---------------------------------------------------------------------------------------------------------
// a run from beginning to end

template <class Float>
void train(TrainConfig c) {
    const Context ctx = make_context();
    const char* precision = c.precision == Precision::fp8 ? "fp8" : sizeof(Float) == 2 ? "bf16" : "fp32";

    // model and data
    Start start = find_start(c);
    choose_data(c, start);
    GPT2Config& config = start.config;
    {
        const DataLoader data(c.train_data, 1, 1, false, 0);  // batch and context are not known yet
        match_vocabulary(config, start, c, data.vocab_size());
        resolve_defaults<Float>(c, config, start.from_scratch, data.num_tokens(), ctx);
    }
    check_settings_fit(c, config, ctx);
    keep_decisions(c);
    Run<Float> run{.c = c,
                   .train_data = DataLoader(c.train_data, c.B, c.T, true, c.seed),
                   .val_data = open_val_data(c, config),
                   .model = create_model<Float>(ctx, model_spec(c, config, c.B),
                                                [&] { return first_params(start, config, c.seed); })};
    const std::string shared = run.val_data ? run.val_data->shared_file(run.train_data) : "";
    if (!shared.empty()) printf("note: %s is trained on as well as validated on\n", shared.c_str());
    if (!c.debug_state.empty()) {
        write_first_step(ctx, run.model, run.train_data, c);
        return;
    }
    run.tokenizer = find_tokenizer(start.files(), config.vocab_size);

    // run folder, and where to begin
    if (c.out.empty()) c.out = default_run_folder(false);
    run.settings = run_settings(c, config, run.train_data, run.val_data.get(), precision);
    if (!c.target_loss.path.empty()) {
        run.target = std::make_unique<TargetLoss>(
            read_plain_losses(c.target_loss.path, c.given.at("from"), run.settings, c.updates),
            c.target_loss.margin, c.lambda_warmup_updates);
        run.settings["target-loss"] = run.target->setting();
    }
    const std::string checkpoint = open_run_folder(c.out, c.resume, run.settings, c.given.at("from"));
    if (!checkpoint.empty()) resume(run, checkpoint);
    const std::map<std::string, std::string> facts = {
        {"commit", kGitCommit}, {"device", ctx.device_name}, {"from", c.given.at("from")}};
    MetricsLog metrics(c.out, line_of_settings(facts, run.settings, c.given),
                       checkpoint.empty() ? -1 : run.step);
    stop_when_told();
    fputs(settings_table(settings_rows(run, ctx, precision)).c_str(), stdout);
    if (!metrics.gap().empty())
        printf("note: %s/metrics.jsonl lacks %s of those that are done\n", c.out.c_str(),
               metrics.gap().c_str());
    fflush(stdout);
    train_loop(ctx, run, metrics);
}

// ---------------------------------------------------------------------------------------------------------
// main

// With -y, the flags that the run was started with, but for those that are given now. Which of them must not
// have changed is for check_settings() to say. Returns what is to be said about it, once.
std::string take_flags_of_run(TrainConfig& c, const std::vector<Flag>& flags) {
    if (c.out.empty()) c.out = default_run_folder(true);
    const GivenFlags then = flags_of_run(c.out);
    const bool none_given = std::all_of(c.given.begin(), c.given.end(), [](const auto& flag) {
        return flag.first == "out" || flag.first == "resume";
    });
    std::string note;
    if (then.empty() && !latest_checkpoint(c.out).empty())
        note = format(
            "note: %s/metrics.jsonl does not have the flags of the run (it is missing, damaged or old): those that are not given again have their defaults\n",
            c.out.c_str());
    else if (then.empty() && none_given && !is_file(c.out + "/metrics.jsonl"))
        fail("there is no run in %s to go on with: name its folder with -o, or give the flags of a new one",
             c.out.c_str());
    if (c.given.contains("from") && then.contains("from") &&
        name_elsewhere(c.from) != name_elsewhere(then.at("from")))
        fail("the run in %s began with -e %s, and goes on from its own checkpoint: leave -e %s out",
             c.out.c_str(), then.at("from").c_str(), c.from.c_str());
    // The rest is compared when the run's folder is opened, but these would be blamed on -d before that.
    for (const auto& [name, now] : {std::pair{"batch", c.B}, std::pair{"context", c.T}})
        if (c.given.contains(name) && then.contains(name) && then.at(name) != std::to_string(now))
            fail("cannot resume %s with other settings (%s was %s and is now %d): leave --%s out",
                 c.out.c_str(), name, then.at(name).c_str(), now, name);
    for (const auto& [name, value] : then)
        if (c.given.emplace(name, value).second) set_flag(flags, name, value);
    return note;
}

#ifndef NO_MAIN
int main(int argc, char** argv) {
    return run_program("error", [&] {
        TrainConfig config;
        const std::vector<Flag> flags = train_flags(config);
        if (argc == 2 && !strcmp(argv[1], "--help-markdown")) {
            fputs(flags_markdown(flags).c_str(), stdout);
            return;
        }
        config.given = parse_flags(argc, argv, flags);
        if (config.resume && !(config.export_to.empty() && config.debug_state.empty()))
            fail(
                "-y goes on with a run, and --export and --debug-state take what -e names: give the run's folder as -e instead");
        const std::string note = config.resume ? take_flags_of_run(config, flags) : "";
        if (!config.debug_state.empty()) config.validate_every = config.sample_every = 0;
        for (const char* name : {"out", "resume"}) config.given.erase(name);  // not of the run itself
        if (!config.export_to.empty()) {
            for (const auto& [name, value] : config.given)
                if (name != "export" && name != "from" && name != "device")
                    fail("--%s is for training, and --export writes what -e names as it is: leave it out",
                         name.c_str());
            if (config.from.empty()) fail("--export writes the model that -e names: give it");
            return export_weights(config);
        }
        choose_device(config.device, "train_gpt2", argv);  // may start another program, or this one again
        fputs(note.c_str(), stdout);
        if (wants_bf16(config.precision))
            train<__nv_bfloat16>(config);
        else
            train<float>(config);
    });
}
#endif
