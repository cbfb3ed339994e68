// Runs GPT-2 from any weights that the trainer loads, and shows what condensed attention buys. Read from top
// to bottom: configuration, the model, a forward over whole sequences, one token at a time with a KV cache,
// texts side by side and on the terminal; then what is measured: losses with attention cut to k keys, tasks
// and probes, and the report of where attention goes. Each kernel's formula is in its header under llmc/.
//
// Shapes: B sequences, T tokens of each, C channels, NH heads, hs = C / NH, L layers, V vocabulary, Vp the
// vocabulary padded to a multiple of 128. Float is bf16 or float.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "llmc/attention.cuh"
#include "llmc/attention_cut.cuh"
#include "llmc/attention_decode.cuh"
#include "llmc/attention_report.h"
#include "llmc/attention_row_stats.cuh"
#include "llmc/classifier.cuh"
#include "llmc/context.h"
#include "llmc/dataloader.h"
#include "llmc/decode_layer.cuh"
#include "llmc/device_memory.cuh"
#include "llmc/encoder.cuh"
#include "llmc/flags.h"
#include "llmc/graph.h"
#include "llmc/json_file.h"
#include "llmc/layernorm.cuh"
#include "llmc/matmul.cuh"
#include "llmc/matvec.cuh"
#include "llmc/matvec_mma.cuh"
#include "llmc/metrics.h"
#include "llmc/overlap.cuh"
#include "llmc/params.h"
#include "llmc/sampler.cuh"
#include "llmc/startup.h"
#include "llmc/tasks.h"
#include "llmc/text_stream.h"

extern const char* const kGitCommit;  // written by make

using Json = nlohmann::ordered_json;

// ---------------------------------------------------------------------------------------------------------
// configuration

constexpr const char* kContextFullWords[] = {"stop", "slide"};

struct InferConfig {
    std::string from;  // -e

    // generation
    std::string prompt, prompt_file;
    bool prompt_given = false, interactive = false;
    int64_t tokens = 128;
    DecodeMode attention = DecodeMode::dense;
    int topk = 8;
    float epsilon = 0.01f;
    Sampling sampling = {.temperature = 1.0f, .top_k = 0, .top_p = 0.95f, .seed = 1337};
    bool greedy = false;
    bool slide = true;  // when the context is full; false: stop
    bool stats = false;

    // measuring
    std::string eval, data, lambada, hellaswag, report;
    bool probes = false;
    std::vector<int> cuts = {1, 2, 4, 8, 16, 32, 64};
    std::vector<Cut> cut_kinds = {Cut::topk, Cut::random, Cut::recent, Cut::first_recent};
    bool cut_as_they_are = true;
    bool page = true;
    int B = -1, T = -1;
    int64_t batches = 8, limit = 0;

    std::string json;
    Device device = Device::automatic;
    Precision precision = Precision::automatic;

    DecodeHow how() const { return {attention, topk, epsilon}; }
    bool measures() const {
        return !eval.empty() || !lambada.empty() || !hellaswag.empty() || !report.empty() || probes;
    }
};

void parse_cut_kinds(InferConfig& c, const std::string& text) {
    std::vector<const char*> words(std::begin(kCutWords) + 1, std::end(kCutWords));
    words.push_back("raw");
    c.cut_kinds.clear();
    c.cut_as_they_are = false;
    for (const std::string& part : split_list(text)) {
        const int word = parse_choice("--cut-kinds", part, words);
        if (word + 1 == (int)words.size())
            c.cut_as_they_are = true;
        else if (const Cut cut = (Cut)(1 + word);
                 std::find(c.cut_kinds.begin(), c.cut_kinds.end(), cut) == c.cut_kinds.end())
            c.cut_kinds.push_back(cut);
    }
    if (c.cut_kinds.empty()) fail("--cut-kinds names no kind of cut, only 'raw'");
}

// The one table of flags.
std::vector<Flag> infer_flags(InferConfig& c) {
    return {
        {'e', "from", "WHAT", "the last of log/run1, log/run2, ... that has a checkpoint",
         "the model: a run or checkpoint of ours, OpenAI's weights that data/fetch got (124M, 355M, 774M, 1558M), Hugging Face's safetensors, a TensorFlow checkpoint, llm.c's .bin",
         [&c](auto& flag, auto& v) { c.from = parse_name(flag, v); }},
        {'p', "prompt", "TEXT", "",
         "what the text begins with; without one the model begins a text of its own",
         [&c](auto&, auto& v) {
             c.prompt = v;
             c.prompt_given = true;
         }},
        {'f', "prompts", "FILE", "",
         "prompts, one a line (empty lines are skipped), continued side by side, each with random numbers of its own",
         [&c](auto& flag, auto& v) { c.prompt_file = parse_name(flag, v); }},
        {0, "interactive", "", "",
         "read lines, and continue the text after each; an empty line begins a new text",
         [&c](auto&, auto&) { c.interactive = true; }},
        {'n', "tokens", "N", std::to_string(c.tokens), "tokens to generate",
         [&c](auto& flag, auto& v) { c.tokens = parse_int(flag, v, 1, 1 << 24); }},
        {'k', "topk", "K", std::to_string(c.topk),
         "keys that an attention row keeps; for generation it implies --attention topk",
         [&c](auto& flag, auto& v) { c.topk = (int)parse_int(flag, v, 1, 65536); }},
        choice_flag(
            "attention", kDecodeWords, c.attention,
            "how the cache is read: all of it; all keys, and the values of the k best; pages of 16 keys, best first, until what is unread provably holds less than epsilon of the mass"),
        {0, "epsilon", "X", setting_text(c.epsilon),
         "with --attention pages: the mass of a row that may stay unread",
         [&c](auto& flag, auto& v) { c.epsilon = parse_float(flag, v, 0, 1); }},
        {0, "temperature", "X", setting_text(c.sampling.temperature),
         "divides the logits; 0 takes the most likely token",
         [&c](auto& flag, auto& v) { c.sampling.temperature = parse_float(flag, v, 0, 1000); }},
        {0, "top-p", "X", setting_text(c.sampling.top_p),
         "draw from the most likely tokens that together reach this probability",
         [&c](auto& flag, auto& v) { c.sampling.top_p = parse_float(flag, v, 1e-6, 1); }},
        {0, "top-tokens", "N", std::to_string(c.sampling.top_k),
         "draw from the N most likely tokens; 0 = all",
         [&c](auto& flag, auto& v) { c.sampling.top_k = (int)parse_int(flag, v, 0, 65536); }},
        {0, "greedy", "", "", "always the most likely token, whatever --temperature says",
         [&c](auto&, auto&) { c.greedy = true; }},
        {0, "seed", "N", std::to_string(c.sampling.seed),
         "for samples, probes and the random keys of --eval and --report",
         [&c](auto& flag, auto& v) { c.sampling.seed = (uint64_t)parse_int(flag, v, 0, INT64_MAX); }},
        choice_flag("context-full", kContextFullWords, c.slide,
                    "at the end of the context: stop, or go on with its second half"),
        {0, "stats", "", "", "after generating, show what each layer and head has read",
         [&c](auto&, auto&) { c.stats = true; }},
        {0, "eval", "WHAT", "",
         "loss on token shards (a glob) or a text file, dense and with every row cut to k keys",
         [&c](auto& flag, auto& v) { c.eval = parse_name(flag, v); }},
        {0, "cuts", "K[,K...]", "1,2,4,8,16,32,64", "the k of --eval and of --report's losses",
         [&c](auto& flag, auto& v) {
             c.cuts.clear();
             for (const std::string& part : split_list(v)) {
                 const int k = (int)parse_int(flag, part, 1, 65536);
                 if (std::find(c.cuts.begin(), c.cuts.end(), k) == c.cuts.end()) c.cuts.push_back(k);
             }
         }},
        {0, "cut-kinds", "KIND[,KIND...]", "topk,random,recent,first_recent,raw",
         "which keys the rows of --eval, and of --report's losses, keep; raw: also without renormalizing",
         [&c](auto&, auto& v) { parse_cut_kinds(c, v); }},
        {0, "lambada", "FILE", "", "LAMBADA (data/fetch lambada): the last word, dense and with k keys",
         [&c](auto& flag, auto& v) { c.lambada = parse_name(flag, v); }},
        {0, "hellaswag", "FILE", "", "HellaSwag (data/fetch hellaswag), dense and with k keys",
         [&c](auto& flag, auto& v) { c.hellaswag = parse_name(flag, v); }},
        {0, "probes", "", "",
         "induction, associative recall and a needle in the context, dense and with k keys",
         [&c](auto&, auto&) { c.probes = true; }},
        {0, "report", "DIR", "", "where attention goes, by layer and head: report.json, pictures and a page",
         [&c](auto& flag, auto& v) { c.report = parse_name(flag, v); }},
        {0, "no-page", "", "", "--report writes its JSON only", [&c](auto&, auto&) { c.page = false; }},
        {'j', "data", "WHAT", "what make prepared", "token shards or a text file for --report and --probes",
         [&c](auto& flag, auto& v) { c.data = parse_name(flag, v); }},
        {'b', "batch", "N", "4 on a CPU, 16 on a GPU", "sequences at a time, of what is measured",
         [&c](auto& flag, auto& v) { c.B = (int)parse_int(flag, v, 1, 4096); }},
        {'t', "context", "N", "the model's", "tokens of a sequence of what is measured",
         [&c](auto& flag, auto& v) { c.T = (int)parse_int(flag, v, 2, 65536); }},
        {'m', "batches", "N", std::to_string(c.batches),
         "batches of --eval and --report, and of the text that --probes are made of",
         [&c](auto& flag, auto& v) { c.batches = parse_int(flag, v, 1, INT32_MAX); }},
        {0, "limit", "N", std::to_string(c.limit),
         "questions of each task (0 = all) and of recall (0 = 100); a quarter of them of induction, and of the needle at each depth",
         [&c](auto& flag, auto& v) { c.limit = parse_int(flag, v, 0, INT32_MAX); }},
        {0, "json", "FILE", "", "write everything that was generated or measured here as well",
         [&c](auto& flag, auto& v) { c.json = parse_name(flag, v); }},
        choice_flag("device", kDeviceWords, c.device, "auto is cuda where there is an NVIDIA GPU, else cpu"),
        choice_flag("precision", Words(kPrecisionWords).first(3), c.precision,
                    "auto is bf16 on a GPU, fp32 on a CPU"),
        help_flag(
            "Runs GPT-2, dense or with condensed attention.\n\n    ./infer_gpt2cu -p \"In the beginning\" -n 128 -k 8\n\nreads the top 8 of each attention row.\n\n",
            [] {
                InferConfig defaults;
                return infer_flags(defaults);
            },
            "show this table and exit; --help-markdown: as Markdown"),
    };
}

// ---------------------------------------------------------------------------------------------------------
// the model

template <class Float>
struct Model {
    GPT2Config config;
    std::unique_ptr<DeviceMemory> memory = nullptr;  // of the weights
    Params<Float> params = {};
};

template <class Float>
Model<Float> load_model(const Context& ctx, const WeightFiles& files, const GPT2Config& config) {
    Model<Float> m{.config = config};
    Float* params = nullptr;
    m.memory = std::make_unique<DeviceMemory>(ctx, "the weights", "take a smaller model", [&](Arena& arena) {
        params = arena.take<Float>(num_parameters(config));
    });
    std::vector<float> host(num_parameters(config));
    load_weights(files, config, host.data());
    to_device_as(params, host);
    m.params = point_to_params(params, config);
    return m;
}

// Activations of one forward over B * T tokens; nothing is kept for a backward, so layers share them.
template <class Float>
struct Acts {
    int *inputs, *targets;  // [B,T]
    Float* residual;        // [B,T,C]
    Float* normed;          // [B,T,C] layernorm's output
    Float* qkv;             // [B,T,3C]
    Float* att;             // [B,T,C]
    Float* branch;          // [B,T,C] what attention or MLP adds to the residual stream
    Float *fch, *fch_gelu;  // [B,T,4C] before and after GELU
    float *mean, *rstd;     // [B,T]
    AttentionRows rows;     // [B,NH,T] each
    float* kept;            // [B,NH,T] mass that a cut row keeps
    Float* logits;          // [logit_rows,Vp]
    float* losses;          // [logit_rows]
    int* best;              // [logit_rows] the most likely tokens
    int* zeros;             // [logit_rows] greedy sampling looks at no stream and no position
    int logit_rows;
};

template <class Float>
Acts<Float> lay_out_acts(Arena& arena, const GPT2Config& config, int B, int T) {
    const size_t BT = (size_t)B * T, C = config.channels, rows = BT * config.num_heads;
    Acts<Float> a;
    a.inputs = arena.take<int>(BT);
    a.targets = arena.take<int>(BT);
    a.residual = arena.take<Float>(BT * C);
    a.normed = arena.take<Float>(BT * C);
    a.qkv = arena.take<Float>(BT * 3 * C);
    a.att = arena.take<Float>(BT * C);
    a.branch = arena.take<Float>(BT * C);
    a.fch = arena.take<Float>(BT * 4 * C);
    a.fch_gelu = arena.take<Float>(BT * 4 * C);
    a.mean = arena.take<float>(BT);
    a.rstd = arena.take<float>(BT);
    a.rows = {arena.take<float>(rows), arena.take<float>(rows), arena.take<float>(rows),
              arena.take<float>(rows)};
    a.kept = arena.take<float>(rows);
    // The logits of a GPT-2 token are 200 kB in fp32: a thousand at a time, not all.
    a.logit_rows = (int)std::min<size_t>(BT, 1024);
    a.logits = arena.take<Float>((size_t)a.logit_rows * config.padded_vocab_size);
    a.losses = arena.take<float>(a.logit_rows);
    a.best = arena.take<int>(a.logit_rows);
    a.zeros = arena.take<int>(a.logit_rows);
    return a;
}

// ---------------------------------------------------------------------------------------------------------
// forward over whole sequences

// From the tokens in a.inputs [B,T] to the last layernorm, a.normed [B,T,C]. attend(l) makes a.att of a.qkv,
// both of layer l. positions [B,T] on the device, or null for 0 ... T - 1.
template <class Float, class Attend>
void forward(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, int B, int T,
             const int* positions, Attend attend) {
    const int C = m.config.channels, L = m.config.num_layers, BT = B * T;
    encoder_forward(ctx, a.residual, a.inputs, m.params.wte, m.params.wpe, B, T, C, positions);
    // residual += branch (but for the first), normed = layernorm(residual), in one pass over the data
    const auto layernorm = [&](const Float* weight, const Float* bias, bool add) {
        layernorm_forward<Float>(ctx, a.normed, a.mean, a.rstd, add ? a.residual : nullptr,
                                 add ? a.residual : nullptr, add ? a.branch : a.residual, weight, bias, BT,
                                 C);
    };
    for (int l = 0; l < L; l++) {
        const LayerParams<Float>& p = m.params.layers[l];
        layernorm(p.ln1_w, p.ln1_b, l > 0);
        matmul_forward(ctx, a.qkv, a.normed, p.qkv_w, p.qkv_b, BT, C, 3 * C);
        attend(l);
        matmul_forward(ctx, a.branch, a.att, p.attproj_w, p.attproj_b, BT, C, C);
        layernorm(p.ln2_w, p.ln2_b, true);
        matmul_gelu_forward(ctx, a.fch_gelu, a.fch, a.normed, p.fc_w, p.fc_b, BT, C, 4 * C);
        matmul_forward(ctx, a.branch, a.fch_gelu, p.fcproj_w, p.fcproj_b, BT, 4 * C, C);
    }
    layernorm(m.params.lnf_w, m.params.lnf_b, true);
}

// Which keys the rows of a whole sequence keep.
struct SequenceAttention {
    Cut cut = Cut::dense;
    int k = 0;
    bool renormalize = true;
    uint64_t seed = 0;  // of Cut::random
};

// a.att of a.qkv; unless dense, also a.kept.
template <class Float>
void attend_sequences(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, int l, int B, int T,
                      SequenceAttention how) {
    const int NH = m.config.num_heads;
    if (how.cut == Cut::dense)
        attention_forward(ctx, a.att, a.rows, a.qkv, B, T, NH, m.config.head_size(), NoTopk());
    else
        attention_cut_forward(ctx, a.att, a.kept, a.qkv, B, T, NH, m.config.head_size(), how.cut, how.k,
                              how.renormalize, random_bits(how.seed, 0, (uint64_t)l));
}

// ---------------------------------------------------------------------------------------------------------
// one token at a time

// What decoding keeps of B sequences. All of it is on the device, so that a step needs nothing from the host
// and can be recorded once as a graph.
template <class Float>
struct Decoding {
    int B, capacity;
    int most_used;   // tokens of a sequence, at most the capacity and the model's context
    int* tokens;     // [B] the newest token of each sequence, not yet in the cache
    int* positions;  // [B] and its position
    int* streams;    // [B] numbers of the sequences, for their random numbers:
    int* counts;     // [B] and where the newest tokens were if no context had ever been full
    int* filled;     // [B] the sequences that a prefill is of,
    int* lengths;    // [B] and how many of its tokens are each one's
    std::vector<KvCache<Float>> cache;
    Float* logits;       // [B,Vp]
    float* attention;    // scratch
    float* sampler;      // scratch
    float* parts[2];     // of one sequence, what the halves of a layer find to add (decode_layer.cuh)
    DecodeStats* stats;  // [L,B,NH]; null unless asked for
};

template <class Float>
Decoding<Float> lay_out_decoding(Arena& arena, const GPT2Config& config, int B, int capacity, int most_used,
                                 bool stats) {
    const size_t C = config.channels, keys = (size_t)B * capacity * C;
    Decoding<Float> d;
    d.B = B;
    d.capacity = capacity;
    d.most_used = most_used;
    d.tokens = arena.take<int>(B);
    d.positions = arena.take<int>(B);
    d.streams = arena.take<int>(B);
    d.counts = arena.take<int>(B);
    d.filled = arena.take<int>(B);
    d.lengths = arena.take<int>(B);
    for (int l = 0; l < config.num_layers; l++)
        d.cache.push_back({arena.take<Float>(keys), arena.take<Float>(keys),
                           arena.take<Float>(keys / kPageTokens), arena.take<Float>(keys / kPageTokens),
                           capacity});
    d.logits = arena.take<Float>((size_t)B * config.padded_vocab_size);
    d.attention = arena.take<float>(decode_scratch(B, config.num_heads, config.head_size(), capacity));
    d.sampler = arena.take<float>(sampler_scratch(B, config.vocab_size));
    for (float*& parts : d.parts) parts = arena.take<float>(decode_parts(config.channels));
    d.stats = stats ? arena.take<DecodeStats>((size_t)config.num_layers * B * config.num_heads) : nullptr;
    return d;
}

// The token that was drawn takes its place; a sequence that has come to the end stays there.
static __global__ void advance_kernel(int* positions, int* counts, int B, int most_used) {
    wait_for_previous_kernel();
    for (int b = threadIdx.x; b < B; b += blockDim.x) {
        positions[b] = min(positions[b] + 1, most_used - 1);
        counts[b]++;
    }
}

// d.logits to the next token of each sequence.
template <class Float>
void draw_tokens(const Context& ctx, const Model<Float>& m, const Decoding<Float>& d, Sampling how) {
    sample_tokens(ctx, d.tokens, d.logits, d.sampler, d.B, m.config.vocab_size, m.config.padded_vocab_size,
                  how, d.streams, d.counts);
    launch_early(ctx, advance_kernel, 1, 32, 0, d.positions, d.counts, d.B, d.most_used);
}

// Fills the cache of n sequences in one pass, d.filled, with all but the newest token of each: a.inputs
// [n,T], of which the first d.lengths count. The newest ones are a step's. With top-k attention a prompt's
// rows are cut like all others; pages are a way to read a cache, and a prompt is read densely.
template <class Float>
void prefill(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, const Decoding<Float>& d, int n,
             int T, DecodeHow how) {
    forward(ctx, m, a, n, T, nullptr, [&](int l) {
        kv_append(ctx, d.cache[l], a.qkv, n, T, m.config.num_heads, m.config.head_size(), d.filled, nullptr,
                  d.lengths);
        attend_sequences(
            ctx, m, a, l, n, T,
            how.mode == DecodeMode::topk ? SequenceAttention{Cut::topk, how.topk} : SequenceAttention{});
    });
}

// The sampler draws from any logits, even where none is a number: that the model is no longer one is said
// here.
template <class Float>
void check_logits(const Context& ctx, const Model<Float>& m, const Decoding<Float>& d) {
    for (int b = 0; b < d.B; b++)
        for (const Float logit :
             to_host(ctx, d.logits + (size_t)b * m.config.padded_vocab_size, m.config.vocab_size))
            if (!std::isfinite((float)logit))
                fail("the logits are not finite: the model's weights have diverged or are damaged");
}

// Whether B sequences are few enough for the linear layers whose time is that of reading the weights, and a
// row of the widest, fcproj's 4C, is not too long for them.
template <class Float>
bool is_few(const Context& ctx, int B, int C) {
    return B <= kMaxMatvecRows ? matvec_rows<Float>(ctx, 4 * C, false) > 0
                               : takes_matvec_mma<Float>(ctx, B, C);
}
// Such a layer, with what comes before and after it: see matvec_forward.
template <class Float>
void linear_of_few(const Context& ctx, Float* out, const Float* inp, const Float* weight, const Float* bias,
                   Normalize<Float> norm, const Float* residual, bool gelu, int B, int IC, int OC) {
    if constexpr (sizeof(Float) == 2)
        if (B > kMaxMatvecRows) {
            matvec_mma_forward(ctx, out, inp, weight, bias, norm, residual, gelu, B, IC, OC);
            return;
        }
    matvec_forward(ctx, out, inp, weight, bias, norm, residual, gelu, B, IC, OC);
}

// a.att of a.qkv, both of layer l and of each sequence's newest token, which gets into the cache.
template <class Float>
void attend_newest(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, const Decoding<Float>& d,
                   int l, DecodeHow how) {
    const int NH = m.config.num_heads;
    attention_decode(ctx, a.att, d.stats ? d.stats + (size_t)l * d.B * NH : nullptr, d.attention, a.qkv,
                     d.cache[l], d.positions, d.B, NH, m.config.head_size(), how);
}

// The layers of a step for few sequences: a.residual [B,C], the embeddings, becomes what the last layernorm
// reads. The step is as long as it takes to read the weights once, so each of a layer's five launches fetches
// its weights while those in front of it work.
template <class Float>
void decode_layers(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, const Decoding<Float>& d,
                   DecodeHow how) {
    const int B = d.B, C = m.config.channels;
    const auto linear = [&](Float* out, const Float* inp, const Float* weight, const Float* bias,
                            Normalize<Float> norm, const Float* residual, bool gelu, int IC, int OC) {
        linear_of_few(ctx, out, inp, weight, bias, norm, residual, gelu, B, IC, OC);
    };
    const Normalize<Float> as_it_is = {nullptr, nullptr};
    Float* x = a.residual;
    for (int l = 0; l < m.config.num_layers; l++) {
        const LayerParams<Float>& p = m.params.layers[l];
        linear(a.qkv, x, p.qkv_w, p.qkv_b, {p.ln1_w, p.ln1_b}, nullptr, false, C, 3 * C);
        attend_newest(ctx, m, a, d, l, how);
        linear(x, a.att, p.attproj_w, p.attproj_b, as_it_is, x, false, C, C);
        linear(a.fch_gelu, x, p.fc_w, p.fc_b, {p.ln2_w, p.ln2_b}, nullptr, true, C, 4 * C);
        linear(x, a.fch_gelu, p.fcproj_w, p.fcproj_b, as_it_is, x, false, 4 * C, C);
    }
}

// The same for one sequence, two launches a layer (decode_layer.cuh).
template <class Float>
void decode_layers_in_halves(const Context& ctx, const Model<Float>& m, const Acts<Float>& a,
                             const Decoding<Float>& d, DecodeHow how) {
    const int C = m.config.channels, NH = m.config.num_heads;
    const auto& [of_attention, of_mlp] = d.parts;
    Stream<Float> x = {a.residual, nullptr, 0, nullptr};
    for (int l = 0; l < m.config.num_layers; l++) {
        const LayerParams<Float>& p = m.params.layers[l];
        decode_attention_half(ctx, of_attention, a.branch, x, p, d.cache[l], d.positions, C, how);
        x = {a.branch, of_attention, NH, p.attproj_b};
        decode_mlp_half(ctx, of_mlp, a.residual, x, p, C);
        x = {a.residual, of_mlp, kMlpSlices, p.fcproj_b};
    }
    finish_stream(ctx, a.residual, x, C);
}

// One step for all sequences: d.tokens at d.positions to the next ones. a has room for B tokens. With many
// sequences it is the forward above, for one token of each.
template <class Float>
void decode_step(const Context& ctx, const Model<Float>& m, const Acts<Float>& a, const Decoding<Float>& d,
                 DecodeHow how, Sampling sampling) {
    const int B = d.B, C = m.config.channels, Vp = m.config.padded_vocab_size;
    if (is_few<Float>(ctx, B, C)) {
        encoder_forward(ctx, a.residual, d.tokens, m.params.wte, m.params.wpe, B, 1, C, d.positions);
        if (B == 1 && !d.stats && takes_decode_halves<Float>(ctx, C, m.config.head_size(), d.capacity, how))
            decode_layers_in_halves(ctx, m, a, d, how);
        else
            decode_layers(ctx, m, a, d, how);
        linear_of_few<Float>(ctx, d.logits, a.residual, m.params.wte, nullptr,
                             {m.params.lnf_w, m.params.lnf_b}, nullptr, false, B, C, Vp);
    } else {
        CUDA_CHECK(
            cudaMemcpyAsync(a.inputs, d.tokens, B * sizeof(int), cudaMemcpyDeviceToDevice, ctx.stream));
        forward(ctx, m, a, B, 1, d.positions, [&](int l) { attend_newest(ctx, m, a, d, l, how); });
        matmul_forward<Float>(ctx, d.logits, a.normed, m.params.wte, nullptr, B, C, Vp);
    }
    draw_tokens(ctx, m, d, sampling);
}

// ---------------------------------------------------------------------------------------------------------
// generation

using Tokens = std::vector<uint16_t>;

struct Generation {
    std::vector<Tokens> made;               // of each prompt, without <|endoftext|>
    int64_t drawn = 0, drawn_first = 0;     // tokens drawn, of all sequences; of these, first ones
    double first_seconds = 0, seconds = 0;  // to the first tokens; all of it
    int slides = 0;                         // how often a text's context was full
    std::vector<DecodeStats> stats;         // [L,NH], if asked for
};

static double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a full context goes on with: its second half. So does a text that leaves it no room.
int half_of(int context) {
    return std::max(1, context / 2);
}

// The tokens of prompts that are read in one pass, unless a single prompt has more: enough for a large GPU,
// and their activations are 0.2 GB for 124M in bf16.
constexpr int64_t kPrefillTokens = 8192;

// Texts that are continued side by side, and where each of them is in the cache. A step draws a token of
// each, for as long as any of them goes on.
template <class Float>
struct Continuation {
    const Context& ctx;
    const Model<Float>& m;
    const InferConfig& c;
    const int eot;                       // <|endoftext|>, or -1: nothing ends a text
    const int B, context;                // texts; positions that the model has
    std::vector<Tokens> text;            // [B] prompts, and what was drawn
    std::vector<int> used;               // [B] tokens of each that are in the cache: all but the newest
    std::vector<bool> ended;             // [B]
    int most_used;                       // tokens that any of them will have in the cache in the end
    int64_t prefill_tokens;              // that one pass fills the cache with, at most
    Acts<Float> prompt_acts, step_acts;  // for such a pass, and for one token of each
    Decoding<Float> d;
    std::unique_ptr<DeviceMemory> memory;
    BufferPair<int> mail;  // [B] tokens on their way to the host, which reads those of one step while the
                           // device makes those of the next
    Graph graph;
    Generation result;

    Continuation(const Context& ctx, const Model<Float>& m, const std::vector<Tokens>& prompts,
                 const InferConfig& c, int eot)
        : ctx(ctx),
          m(m),
          c(c),
          eot(eot),
          B((int)prompts.size()),
          context(m.config.max_seq_len),
          text(prompts),
          ended(B, false),
          mail(B) {
        for (const Tokens& p : prompts)
            used.push_back((c.slide && (int64_t)p.size() >= context ? half_of(context) : (int)p.size()) - 1);
        int most_filled = *std::max_element(used.begin(), used.end());
        most_used = (int)std::min<int64_t>(context, most_filled + c.tokens);
        if (c.slide && most_used == context) most_filled = std::max(most_filled, half_of(context) - 1);
        const int capacity = ceil_div(most_used, kPageTokens) * kPageTokens;
        prefill_tokens =
            std::max<int64_t>({1, most_filled, std::min((int64_t)B * most_filled, kPrefillTokens)});
        const auto lay_out = [&](Arena& arena) {
            prompt_acts = lay_out_acts<Float>(arena, m.config, 1, (int)prefill_tokens);
            step_acts = lay_out_acts<Float>(arena, m.config, B, 1);
            d = lay_out_decoding<Float>(arena, m.config, B, capacity, most_used, c.stats);
        };
        memory = std::make_unique<DeviceMemory>(ctx, "the prompts and their cache",
                                                "lower -n, or give fewer or shorter prompts", lay_out);
        memory->zero();
        std::vector<int> numbers(B), counts;
        std::iota(numbers.begin(), numbers.end(), 0);
        to_device(d.streams, numbers.data(), numbers.size());
        for (const Tokens& p : prompts) counts.push_back((int)p.size() - 1);
        to_device(d.counts, counts.data(), counts.size());
        result.made.resize(B);
    }

    // Draws token 0 of each text: the one behind its prompt.
    void begin() {
        std::vector<int> all(B);
        std::iota(all.begin(), all.end(), 0);
        fill_cache(all);
        step(0);
        check_logits(ctx, m, d);
    }

    // Draws token i of each from token i - 1, which the host need not have seen.
    void step(int64_t i) {
        graph.run(ctx, [&] { decode_step(ctx, m, step_acts, d, c.how(), c.sampling); });
        CUDA_CHECK(cudaMemcpyAsync(mail[i], d.tokens, B * sizeof(int), cudaMemcpyDeviceToHost, ctx.stream));
        mail.launched(ctx, i);
        for (int& tokens : used) tokens = std::min(tokens + 1, most_used);
    }

    // Makes room where a context is full: it goes on with its second half, read like a prompt. All tokens
    // that were drawn have been taken.
    void slide() {
        std::vector<int> full;
        for (int b = 0; b < B; b++) {
            if (!is_full(b)) continue;
            full.push_back(b);
            used[b] = half_of(context) - 1;
        }
        fill_cache(full);
        result.slides += (int)full.size();
    }

    // Token i of each joins its text, or ends it; show(made) is called for each that joins, with what was
    // made of its text until now.
    template <class Show>
    void take(int64_t i, Show show) {
        mail.wait(i);
        const int* drawn = mail[i];
        std::vector<int> ending;
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;
            const auto token = (uint16_t)drawn[b];
            result.drawn++;
            if (i == 0) result.drawn_first++;
            ended[b] = token == eot;
            if (!ended[b]) {
                text[b].push_back(token);
                result.made[b].push_back(token);
                show(result.made[b]);
                ended[b] = !c.slide && (int64_t)text[b].size() > context;
            }
            if (ended[b]) ending.push_back(b);
        }
        add_stats(ending);
    }

    bool is_full(int b) const { return c.slide && !ended[b] && used[b] >= context; }
    bool any_full() const {
        for (int b = 0; b < B; b++)
            if (is_full(b)) return true;
        return false;
    }
    bool all_ended() const { return std::find(ended.begin(), ended.end(), false) == ended.end(); }

    // Waits for the device, and closes the statistics of the texts that were still going on.
    void finish() {
        CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
        std::vector<int> going_on;
        for (int b = 0; b < B; b++)
            if (!ended[b]) going_on.push_back(b);
        add_stats(going_on);
    }

  private:
    // Of each of these texts the last used[b] tokens before its newest one. All texts of a pass are padded to
    // the longest, so it takes as many as there is room for, and have at least half that length.
    void fill_cache(std::vector<int> texts) {
        std::stable_sort(texts.begin(), texts.end(), [&](int a, int b) { return used[a] > used[b]; });
        for (size_t begin = 0; begin < texts.size();) {
            const int T = used[texts[begin]];
            if (T == 0 || g_interrupted) break;  // texts of one token have nothing to be read
            int n = 1;
            while (begin + n < texts.size() && (int64_t)(n + 1) * T <= prefill_tokens &&
                   2 * used[texts[begin + n]] >= T)
                n++;
            const std::vector<int> filled(texts.begin() + begin, texts.begin() + begin + n);
            begin += n;
            std::vector<int> inputs((size_t)n * T, 0), lengths;
            for (int i = 0; i < n; i++) {
                const Tokens& t = text[filled[i]];
                lengths.push_back(used[filled[i]]);
                std::copy(t.end() - 1 - lengths[i], t.end() - 1, inputs.begin() + (size_t)i * T);
            }
            CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
            to_device(prompt_acts.inputs, inputs.data(), inputs.size());
            to_device(d.filled, filled.data(), n);
            to_device(d.lengths, lengths.data(), n);
            prefill(ctx, m, prompt_acts, d, n, T, c.how());
        }
        std::vector<int> newest, positions;
        for (int b = 0; b < B; b++) {
            newest.push_back(text[b].back());
            positions.push_back(std::min(used[b], most_used - 1));
        }
        CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
        to_device(d.tokens, newest.data(), B);
        to_device(d.positions, positions.data(), B);
    }

    // What these texts have read until now: of each once, when it ends.
    void add_stats(const std::vector<int>& texts) {
        if (!c.stats || texts.empty()) return;
        const int L = m.config.num_layers, NH = m.config.num_heads;
        const std::vector<DecodeStats> all = to_host(ctx, d.stats, (size_t)L * B * NH);
        result.stats.resize((size_t)L * NH);
        for (int l = 0; l < L; l++)
            for (const int b : texts)
                for (int head = 0; head < NH; head++)
                    result.stats[(size_t)l * NH + head].add(all[((size_t)l * B + b) * NH + head]);
    }
};

// Continues each prompt by up to c.tokens tokens, to <|endoftext|> (eot) or, unless c.slide, to the end of
// the context. show(made) is called for each token as it comes, the last of what was made of its text. A
// prompt has at least one token.
template <class Float, class Show>
Generation generate(const Context& ctx, const Model<Float>& m, const std::vector<Tokens>& prompts,
                    const InferConfig& c, int eot, Show show) {
    Continuation<Float> texts(ctx, m, prompts, c, eot);
    const double begin = now_seconds();
    texts.begin();
    for (int64_t i = 0; i < c.tokens && !g_interrupted; i++) {
        const auto draw_next = [&] {
            if (i + 1 == c.tokens) return;
            if (texts.any_full()) texts.slide();
            texts.step(i + 1);
        };
        // The device works ahead of the host, except where a full context needs the token that is on its way,
        // the time to the first token is taken, statistics are to end with a text, or (on the CPU backend)
        // there is nobody to work ahead.
        const bool ahead = !kOnCpu && !texts.any_full() && i > 0 && !c.stats;
        if (ahead) draw_next();
        texts.take(i, show);
        if (i == 0) texts.result.first_seconds = now_seconds() - begin;
        if (texts.all_ended()) break;
        if (!ahead) draw_next();
    }
    texts.finish();
    texts.result.seconds = now_seconds() - begin;
    return texts.result;
}

int end_of_text(const Tokenizer* tokenizer, const GPT2Config& config) {
    return tokenizer ? tokenizer->eot() : end_of_text(config);
}

// ---------------------------------------------------------------------------------------------------------
// generation on the terminal

// A line on the terminal that is written over, for what takes minutes, and cleared when it is done.
void say_progress(const std::string& what, int64_t done, int64_t total) {
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r\033[K");
    if (done < total) fprintf(stderr, "%s %lld/%lld", what.c_str(), (long long)done, (long long)total);
    fflush(stderr);
}

std::string today() {
    const time_t now = time(nullptr);
    char text[16];
    strftime(text, sizeof(text), "%Y-%m-%d", localtime(&now));
    return text;
}

// What the file of --json begins with: the model, and where it runs.
template <class Float>
Json json_facts(const Context& ctx, const InferConfig& c, const GPT2Config& config) {
    return {{"model", c.from},
            {"layers", config.num_layers},
            {"heads", config.num_heads},
            {"channels", config.channels},
            {"vocabulary", config.vocab_size},
            {"parameters", num_weights(config)},
            {"device", ctx.device_name},
            {"precision", sizeof(Float) == 2 ? "bf16" : "fp32"},
            {"commit", kGitCommit},
            {"date", today()}};
}

// All of a text, zero bytes included: they are tokens like others.
void write_text(const std::string& text) {
    const std::string shown = terminal_text(text);
    fwrite(shown.data(), 1, shown.size(), stdout);
}

std::string tokens_text(const Tokenizer* tokenizer, const Tokens& tokens) {
    if (tokenizer) return tokenizer->decode(tokens);
    std::string text;
    for (const uint16_t t : tokens) text += std::to_string(t) + " ";
    return text;
}

[[noreturn]] void fail_without_vocabulary(const char* what, const GPT2Config& config) {
    fail("%s needs a vocabulary, and none is known for this model%s", what,
         config.vocab_size == kGpt2Vocab ? ": data/fetch gpt2 gets GPT-2's" : "");
}

// A prompt's tokens; <|endoftext|> begins a text out of nothing.
Tokens prompt_tokens(const Tokenizer* tokenizer, const std::string& text, const GPT2Config& config,
                     bool slide, const std::string& name = "the prompt") {
    if (text.empty()) return {(uint16_t)end_of_text(tokenizer, config)};
    if (!tokenizer) fail_without_vocabulary("a prompt", config);
    Tokens tokens = tokenizer->encode_special(text);
    if (!slide && (int64_t)tokens.size() > config.max_seq_len)
        fail("%s has %zu tokens, and the context %d: shorten it, or give --context-full slide", name.c_str(),
             tokens.size(), config.max_seq_len);
    return tokens;
}

// Says of texts that fill the context that only their ends are read.
void say_cut(const std::vector<Tokens>& texts, const char* what, const GPT2Config& config) {
    const int context = config.max_seq_len, half = half_of(context);
    const auto fills = [&](const Tokens& text) { return (int64_t)text.size() >= context; };
    const auto count = std::count_if(texts.begin(), texts.end(), fills);
    if (count > 0 && texts.size() == 1)
        fprintf(stderr, "%s has %zu tokens, and the context %d: its last %d are read\n", what,
                texts[0].size(), context, half);
    else if (count > 0)
        fprintf(stderr,
                "%d of %zu prompts have %d tokens, the context, or more: of each the last %d are read\n",
                (int)count, texts.size(), context, half);
}

// A line without its end, which may be CRLF.
bool next_line(std::istream& in, std::string& line) {
    if (!std::getline(in, line)) return false;
    if (line.ends_with('\r')) line.pop_back();
    return true;
}

// The sums as means over the tokens.
DecodeStats means(const DecodeStats& s) {
    return {1,
            s.visible / s.tokens,
            s.keys / s.tokens,
            s.pages / s.tokens,
            s.tau / s.tokens,
            s.certified / s.tokens,
            s.worst};
}

void print_decode_stats(const Generation& g, const GPT2Config& config, DecodeHow how) {
    const int NH = config.num_heads;
    fprintf(stderr, "\nmeans over the tokens made from the cache, by layer and head%s\n",
            how.mode == DecodeMode::topk ? format(" (of each row %d values are read)", how.topk).c_str()
            : how.mode == DecodeMode::pages
                ? " (certified: the bound on tau that was proven without the rest)"
                : "");
    fprintf(stderr, "%5s %5s %9s %9s %8s %8s %9s %9s %9s\n", "layer", "head", "keys", "read", "share",
            "pages", "tau", "worst", "certified");
    DecodeStats all = {};
    const auto line = [](const std::string& layer, const std::string& head, const DecodeStats& sums) {
        const DecodeStats s = means(sums);
        fprintf(stderr, "%5s %5s %9.1f %9.1f %7.1f%% %8.1f %9.2e %9.2e %9.2e\n", layer.c_str(), head.c_str(),
                s.visible, s.keys, 100 * s.keys / s.visible, s.pages, s.tau, s.worst, s.certified);
    };
    for (size_t i = 0; i < g.stats.size(); i++)
        if (g.stats[i].tokens > 0) {
            line(std::to_string(i / NH), std::to_string(i % NH), g.stats[i]);
            all.add(g.stats[i]);
        }
    if (all.tokens > 0) line("all", "", all);
}

std::string speed_line(const Generation& g, const InferConfig& c) {
    const DecodeHow how = c.how();
    const std::string attention = how.mode == DecodeMode::topk    ? format("top-%d attention", how.topk)
                                  : how.mode == DecodeMode::pages ? format("pages, epsilon %g", how.epsilon)
                                                                  : "dense attention";
    std::string text =
        format("%lld token%s, %s", (long long)g.drawn, g.drawn == 1 ? "" : "s", attention.c_str());
    if (g.drawn > 0) text += format(": the first after %.3f s", g.first_seconds);
    if (g.drawn > g.drawn_first)
        text += format(", then %.1f tokens/s",
                       (double)(g.drawn - g.drawn_first) / std::max(1e-9, g.seconds - g.first_seconds));
    if (g.slides > 0)
        text += format("; the context was full %d time%s, and went on with its second half", g.slides,
                       g.slides == 1 ? "" : "s");
    return text;
}

// The prompts and what became of them; with --stats, the means over the tokens generated, by layer and head.
Json generation_json(const Generation& g, const std::vector<Tokens>& prompts, const InferConfig& c,
                     const Tokenizer* tokenizer, int num_heads) {
    const auto number = [](float x) { return parse_json(json_number(x)); };  // 0.1 stays 0.1
    Json json = {{"attention", kDecodeWords[(int)c.attention]},
                 {"temperature", number(c.sampling.temperature)},
                 {"top_p", number(c.sampling.top_p)},
                 {"top_tokens", c.sampling.top_k},
                 {"seed", c.sampling.seed},
                 {"drawn", g.drawn},
                 {"seconds", g.seconds},
                 {"first_seconds", g.first_seconds},
                 {"slides", g.slides}};
    if (c.attention == DecodeMode::topk) json["k"] = c.topk;
    if (c.attention == DecodeMode::pages) json["epsilon"] = number(c.epsilon);
    for (size_t b = 0; b < prompts.size(); b++)
        json["texts"].push_back({{"prompt", tokens_text(tokenizer, prompts[b])},
                                 {"prompt_tokens", prompts[b]},
                                 {"text", tokens_text(tokenizer, g.made[b])},
                                 {"tokens", g.made[b]}});
    for (size_t i = 0; i < g.stats.size(); i++) {
        const DecodeStats s = means(g.stats[i]);
        if (g.stats[i].tokens > 0)
            json["stats"].push_back({{"layer", i / num_heads},
                                     {"head", i % num_heads},
                                     {"keys", number(s.visible)},
                                     {"read", number(s.keys)},
                                     {"pages", number(s.pages)},
                                     {"tau", number(s.tau)},
                                     {"worst", number(s.worst)},
                                     {"certified", number(s.certified)}});
    }
    return json;
}

// What generating text on the terminal works with, of one program.
template <class Float>
struct Writer {
    const Context& ctx;
    const Model<Float>& m;
    const InferConfig& c;
    const Tokenizer* tokenizer;  // null: tokens are shown as numbers

    int eot() const { return end_of_text(tokenizer, m.config); }
    Tokens tokens_of(const std::string& text, bool slide, const std::string& name = "the prompt") const {
        return prompt_tokens(tokenizer, text, m.config, slide, name);
    }
};

// Continues a text, whose new tokens are written as they come.
template <class Float>
Generation write_on(const Writer<Float>& w, const Tokens& prompt) {
    TextStream text;
    const Generation g = generate(w.ctx, w.m, {prompt}, w.c, w.eot(), [&](const Tokens& made) {
        write_text(text.push(tokens_text(w.tokenizer, {made.back()})));
        fflush(stdout);
    });
    write_text(text.finish() + "\n");
    return g;
}

// What was read and how fast it went, and the file of --json.
template <class Float>
void report_generation(const Writer<Float>& w, const Generation& g, const std::vector<Tokens>& prompts) {
    const GPT2Config& config = w.m.config;
    fflush(stdout);
    if (w.c.stats) print_decode_stats(g, config, w.c.how());
    fprintf(stderr, "%s\n", speed_line(g, w.c).c_str());
    if (w.c.json.empty()) return;
    Json json = json_facts<Float>(w.ctx, w.c, config);
    json["generation"] = generation_json(g, prompts, w.c, w.tokenizer, config.num_heads);
    write_file(w.c.json, json_text(json, 1) + "\n");
    fprintf(stderr, "wrote %s\n", w.c.json.c_str());
}

// -p: one prompt, or a text out of nothing.
template <class Float>
void continue_prompt(const Writer<Float>& w) {
    const Tokens prompt = w.tokens_of(w.c.prompt, w.c.slide);
    if (w.c.slide) say_cut({prompt}, "the prompt", w.m.config);
    write_text(w.c.prompt);
    report_generation(w, write_on(w, prompt), {prompt});
}

// -f: a file's lines side by side, written when all of them are done.
template <class Float>
void continue_file(const Writer<Float>& w) {
    const std::string& name = w.c.prompt_file;
    const int NH = w.m.config.num_heads;
    std::ifstream file(name);
    if (!file || is_folder(name)) fail("cannot read the prompts in %s", name.c_str());
    std::vector<std::string> lines;
    for (std::string line; next_line(file, line);)
        if (!line.empty()) lines.push_back(line);
    if (lines.empty()) fail("%s has no prompts: one a line", name.c_str());
    if ((int64_t)lines.size() * NH > kMaxGridY)
        fail("%s has %zu prompts; at most %d can be continued side by side", name.c_str(), lines.size(),
             kMaxGridY / NH);
    std::vector<Tokens> prompts;
    for (const std::string& line : lines)
        prompts.push_back(
            w.tokens_of(line, w.c.slide, format("prompt %zu of %zu", prompts.size() + 1, lines.size())));
    if (w.c.slide) say_cut(prompts, "the prompt", w.m.config);
    size_t longest = 0;
    const Generation g = generate(w.ctx, w.m, prompts, w.c, w.eot(), [&](const Tokens& made) {
        if (made.size() <= longest) return;
        longest = made.size();
        say_progress("tokens of each text", (int64_t)longest, w.c.tokens);
    });
    say_progress("", 0, 0);
    for (size_t b = 0; b < lines.size(); b++)
        write_text((b > 0 ? "\n[" : "[") + lines[b] + "]" + tokens_text(w.tokenizer, g.made[b]) + "\n");
    report_generation(w, g, prompts);
}

// --interactive: the text so far is the context of what follows; an empty line begins a new text.
template <class Float>
void continue_lines(const Writer<Float>& w) {
    const int context = w.m.config.max_seq_len;
    if (!w.tokenizer) fail_without_vocabulary("--interactive", w.m.config);
    Tokens text;
    const bool asked = isatty(STDIN_FILENO);
    // At the prompt, Ctrl-C ends the program; while a text is made, it ends the text.
    signal(SIGINT, SIG_DFL);
    for (std::string line; fputs(asked ? "> " : "", stderr), next_line(std::cin, line);) {
        if (line.empty()) {
            text.clear();
            continue;
        }
        const Tokens more = w.tokens_of(line, true);
        if (!w.c.slide && (int64_t)(text.size() + more.size()) > context) {
            fprintf(stderr, "%s %zu tokens, and the context %d: %s\n",
                    text.empty() ? "this line has" : "with this line the text has", text.size() + more.size(),
                    context,
                    text.empty() ? "shorten it, or give --context-full slide"
                                 : "an empty line begins a new text");
            continue;
        }
        text.insert(text.end(), more.begin(), more.end());
        if (w.c.slide) say_cut({text}, "with this line the text", w.m.config);
        signal(SIGINT, on_interrupt);
        const Generation g = write_on(w, text);
        signal(SIGINT, SIG_DFL);
        signal(SIGPIPE, SIG_DFL);
        g_interrupted = 0;
        text.insert(text.end(), g.made[0].begin(), g.made[0].end());
        report_generation(w, g, {});
    }
    if (asked) fputs("\n", stderr);
}

template <class Float>
void generate_text(const Context& ctx, const Model<Float>& m, const InferConfig& c,
                   const Tokenizer* tokenizer) {
    const Writer<Float> writer = {ctx, m, c, tokenizer};
    if (!c.json.empty()) output_target(c.json);
    signal(SIGINT, on_interrupt);
    if (!c.prompt_file.empty())
        continue_file(writer);
    else if (c.interactive)
        continue_lines(writer);
    else
        continue_prompt(writer);
}

// ---------------------------------------------------------------------------------------------------------
// data to measure on

// Windows of T tokens and the T that follow them, in batches of up to B: [batches][rows,T] each. The last one
// has what is left.
struct Windows {
    std::string source;
    int B, T;
    std::vector<std::vector<int>> inputs = {}, targets = {};

    int rows(size_t batch) const { return (int)inputs[batch].size() / T; }
    int64_t count() const {
        int64_t sum = 0;
        for (size_t i = 0; i < inputs.size(); i++) sum += rows(i);
        return sum;
    }
    int64_t tokens() const { return count() * T; }

    // The next window: x [T] and the tokens that follow, y [T].
    template <class Token>
    void add(const Token* x, const Token* y) {
        if (inputs.empty() || rows(inputs.size() - 1) == B) {
            inputs.emplace_back();
            targets.emplace_back();
        }
        inputs.back().insert(inputs.back().end(), x, x + T);
        targets.back().insert(targets.back().end(), y, y + T);
    }
    Tokens text() const {
        Tokens all;
        for (const auto& batch : inputs) all.insert(all.end(), batch.begin(), batch.end());
        return all;
    }
};

// The first windows of token shards (globs) or of a text file. A text shorter than T shortens T.
Windows read_windows(const std::string& what, const Tokenizer* tokenizer, int vocab_size, int B, int T,
                     int64_t batches) {
    if (!is_file(what) || is_shard(what)) {
        DataLoader data(what, 1, T, false, 0);
        if (data.vocab_size() != vocab_size)
            fail("the shards of %s have a vocabulary of %d tokens, and the model one of %d", what.c_str(),
                 data.vocab_size(), vocab_size);
        Windows w{what, B, T};
        for (int64_t i = 0; i < std::min(batches * B, data.windows()); i++) {
            data.next_batch();
            w.add(data.inputs(), data.targets());
        }
        return w;
    }
    if (!tokenizer)
        fail("%s is text, and this model's vocabulary is not known: give token shards", what.c_str());
    const MappedFile file(what);
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    if (text.substr(0, 8192).find('\0') != text.npos)
        fail("%s is neither text nor a token shard: it has zero bytes, but no shard's header", what.c_str());
    // As much of it as is wanted, and some more, for where it is cut its last tokens may be others. A token
    // of GPT-2 has 4 bytes on average.
    const int64_t wanted = batches * B * T;
    size_t bytes = (size_t)wanted * 8 + 4096;
    Tokens tokens = tokenizer->encode(text.substr(0, bytes));
    while ((int64_t)tokens.size() < wanted + 100 && bytes < text.size())
        tokens = tokenizer->encode(text.substr(0, bytes *= 2));
    if (tokens.size() < 2)
        fail("%s has %zu tokens: there is nothing to predict", what.c_str(), tokens.size());
    if ((size_t)T >= tokens.size()) T = (int)tokens.size() - 1;
    Windows w{what, B, T};
    const int64_t count = std::min(batches * B, ((int64_t)tokens.size() - 1) / T);
    for (const uint16_t* x = tokens.data(); x < tokens.data() + count * T; x += T) w.add(x, x + 1);
    return w;
}

// What is measured runs in here: activations for B x T tokens, and the jobs' common arguments.
template <class Float>
struct Bench {
    const Context& ctx;
    const Model<Float>& m;
    int B, T;
    Acts<Float> a = {};
    std::unique_ptr<DeviceMemory> memory = nullptr;

    Bench(const Context& context, const Model<Float>& model, int batch, int tokens)
        : ctx(context), m(model), B(batch), T(tokens) {
        check_batch_fits(B, T, m.config.num_heads);
        memory = std::make_unique<DeviceMemory>(ctx, "the activations", "lower -b or -t", [&](Arena& arena) {
            a = lay_out_acts<Float>(arena, m.config, B, T);
        });
        memory->zero();
    }
};

// Losses of x, y [rows,T]; with `best`, the most likely token at each position too; with `kept`, the mean
// over all rows with more than k keys of the mass that they keep. look(first, count) is called while
// bench.a.logits holds the logits of these positions out of rows times T.
template <class Float>
std::vector<float> sequence_losses(const Bench<Float>& bench, const int* x, const int* y, int rows, int T,
                                   SequenceAttention how, std::vector<int>* best, double* kept,
                                   const std::function<void(int, int)>& look = nullptr) {
    const Context& ctx = bench.ctx;
    const Model<Float>& m = bench.m;
    const Acts<Float>& a = bench.a;
    const int n = rows * T, C = m.config.channels, NH = m.config.num_heads, V = m.config.vocab_size;
    to_device(a.inputs, x, n);
    to_device(a.targets, y, n);
    double kept_sum = 0;
    int64_t kept_rows = 0;
    forward(ctx, m, a, rows, T, nullptr, [&](int l) {
        attend_sequences(ctx, m, a, l, rows, T, how);
        if (!kept || how.cut == Cut::dense) return;
        const std::vector<float> mass = to_host(ctx, a.kept, (size_t)rows * NH * T);
        for (size_t i = 0; i < mass.size(); i++)
            if ((int)(i % T) >= how.k) kept_sum += mass[i], kept_rows++;
    });
    if (kept) *kept = kept_rows ? kept_sum / (double)kept_rows : 1.0;
    std::vector<float> losses;
    for (int first = 0; first < n; first += a.logit_rows) {
        const int count = std::min(a.logit_rows, n - first);
        matmul_forward<Float>(ctx, a.logits, a.normed + (size_t)first * C, m.params.wte, nullptr, count, C,
                              m.config.padded_vocab_size);
        if (look) look(first, count);
        if (best) {
            sample_tokens(ctx, a.best, a.logits, (float*)nullptr, count, V, m.config.padded_vocab_size,
                          Sampling{.temperature = 0.0f}, a.zeros, a.zeros);
            const std::vector<int> tokens = to_host(ctx, a.best, count);
            best->insert(best->end(), tokens.begin(), tokens.end());
        }
        classifier(ctx, a.losses, a.logits, a.targets + first, 0.0f, count, V, m.config.padded_vocab_size,
                   false);
        const std::vector<float> some = to_host(ctx, a.losses, count);
        losses.insert(losses.end(), some.begin(), some.end());
    }
    return losses;
}

// ---------------------------------------------------------------------------------------------------------
// --eval: losses, dense and cut

struct CutLoss {
    SequenceAttention how;
    double loss = 0, kept = 0;
};

// One pass over the data: each batch dense, then with every way to cut and every k. The first is dense.
template <class Float>
std::vector<CutLoss> cut_losses(const Bench<Float>& bench, const Windows& w, const InferConfig& c) {
    std::vector<CutLoss> all = {{}};
    for (const bool renormalize : {true, false})
        for (const int k : c.cuts)
            for (const Cut cut : c.cut_kinds)
                if (renormalize || c.cut_as_they_are) all.push_back({{cut, k, renormalize}});
    const size_t total = w.inputs.size() * all.size();
    for (size_t i = 0; i < w.inputs.size(); i++) {
        const double share = (double)w.rows(i) / (double)w.count();
        for (size_t v = 0; v < all.size(); v++) {
            double kept = 1;
            SequenceAttention how = all[v].how;
            how.seed = random_bits(c.sampling.seed, 1, i);
            const std::vector<float> losses = sequence_losses(bench, w.inputs[i].data(), w.targets[i].data(),
                                                              w.rows(i), w.T, how, nullptr, &kept);
            const double loss = std::accumulate(losses.begin(), losses.end(), 0.0) / (double)losses.size();
            if (!std::isfinite(loss))
                fail("the loss is not finite: the model's weights have diverged or are damaged");
            all[v].loss += share * loss;
            all[v].kept += share * kept;
            say_progress("losses", (int64_t)(i * all.size() + v + 1), (int64_t)total);
        }
    }
    return all;
}

Json cut_losses_json(const Windows& w, const std::vector<CutLoss>& all) {
    Json json = {{"source", w.source},
                 {"tokens", w.tokens()},
                 {"context", w.T},
                 {"dense", {{"loss", all[0].loss}, {"perplexity", std::exp(all[0].loss)}}}};
    for (size_t v = 1; v < all.size(); v++)
        json["cuts"].push_back({{"cut", kCutWords[(int)all[v].how.cut]},
                                {"renormalized", all[v].how.renormalize},
                                {"k", all[v].how.k},
                                {"loss", all[v].loss},
                                {"perplexity", std::exp(all[v].loss)},
                                {"kept", all[v].kept}});
    return json;
}

void print_cut_losses(const Windows& w, const std::vector<CutLoss>& all, const InferConfig& c) {
    printf("%s: %lld tokens in sequences of %d\n", w.source.c_str(), (long long)w.tokens(), w.T);
    printf("dense attention: loss %.4f, perplexity %.2f\n", all[0].loss, std::exp(all[0].loss));
    const size_t kinds = c.cut_kinds.size();
    for (size_t v = 1; v < all.size(); v++) {
        const SequenceAttention& how = all[v].how;
        const size_t column = (v - 1) % kinds, row = (v - 1) / kinds % c.cuts.size();
        if (column == 0 && row == 0) {
            printf("\nloss if every row of every layer keeps k keys, %s\n%6s",
                   how.renormalize ? "renormalized" : "as they are", "k");
            for (const Cut cut : c.cut_kinds) printf(" %12s", kCutWords[(int)cut]);
            printf(" %18s\n", format("mass kept (%s)", kCutWords[(int)c.cut_kinds[0]]).c_str());
        }
        if (column == 0) printf("%6d", how.k);
        printf(" %12.4f", all[v].loss);
        if (column + 1 == kinds) printf(" %18.4f\n", all[v - column].kept);
    }
}

// ---------------------------------------------------------------------------------------------------------
// tasks and probes: everything is the probability of some tokens given those before

template <class Float>
std::vector<Result> score(const Bench<Float>& bench, const std::vector<Scored>& items, SequenceAttention how,
                          const std::string& what) {
    // Answers of one token to the same question share all tokens before it: one text with several ends, whose
    // probabilities are all in one row.
    std::vector<std::vector<size_t>> texts;
    const auto same_text = [](const Scored& a, const Scored& b) {
        return a.tokens.size() == b.tokens.size() && a.first + 1 == (int)a.tokens.size() &&
               a.first == b.first && std::equal(a.tokens.begin(), a.tokens.end() - 1, b.tokens.begin());
    };
    for (size_t i = 0; i < items.size(); i++) {
        if (i == 0 || !same_text(items[i - 1], items[i])) texts.emplace_back();
        texts.back().push_back(i);
    }
    // Texts of about the same length go together; shorter ones are filled up behind their end, which no
    // earlier row sees.
    const auto length = [&](const std::vector<size_t>& text) { return items[text[0]].tokens.size() - 1; };
    std::stable_sort(texts.begin(), texts.end(),
                     [&](const auto& a, const auto& b) { return length(a) < length(b); });
    std::vector<Result> results(items.size(), {.sum_logp = 0.0, .all_argmax = true, .num_argmax = 0});
    const int V = bench.m.config.vocab_size, Vp = bench.m.config.padded_vocab_size;
    for (size_t begin = 0; begin < texts.size(); begin += bench.B) {
        const int rows = (int)std::min<size_t>(bench.B, texts.size() - begin);
        const int T = (int)length(texts[begin + rows - 1]);
        std::vector<int> x((size_t)rows * T, 0), y((size_t)rows * T, 0), best;
        for (int r = 0; r < rows; r++) {
            const auto& tokens = items[texts[begin + r][0]].tokens;
            std::copy(tokens.begin(), tokens.end() - 1, x.begin() + (size_t)r * T);
            std::copy(tokens.begin() + 1, tokens.end(), y.begin() + (size_t)r * T);
        }
        const auto score_ends = [&](int first, int count) {
            for (int r = 0; r < rows; r++) {
                const std::vector<size_t>& text = texts[begin + r];
                const int at = r * T + (int)length(text) - 1;
                if (text.size() == 1 || at < first || at >= first + count) continue;
                const std::vector<Float> row =
                    to_host(bench.ctx, bench.a.logits + (size_t)(at - first) * Vp, V);
                const std::vector<double> logits(row.begin(), row.end());
                const double most = *std::max_element(logits.begin(), logits.end());
                double sum = 0;
                for (const double logit : logits) sum += std::exp(logit - most);
                for (const size_t i : text)
                    results[i].sum_logp = logits[items[i].tokens.back()] - most - std::log(sum);
            }
        };
        const std::vector<float> losses =
            sequence_losses(bench, x.data(), y.data(), rows, T, how, &best, nullptr, score_ends);
        for (int r = 0; r < rows; r++)
            for (const size_t i : texts[begin + r]) {
                const std::vector<uint16_t>& tokens = items[i].tokens;
                const bool alone = texts[begin + r].size() == 1;
                Result& result = results[i];
                for (size_t t = items[i].first - 1; t + 1 < tokens.size(); t++) {
                    const size_t at = (size_t)r * T + t;
                    const bool hit = best[at] == tokens[t + 1];
                    if (alone) result.sum_logp -= losses[at];
                    result.num_argmax += hit ? 1 : 0;
                    result.all_argmax = result.all_argmax && hit;
                }
            }
        say_progress(what, (int64_t)(begin + rows), (int64_t)texts.size());
    }
    return results;
}

// The two columns of every task: as the JSON has them, and as they are printed.
struct TaskAttention {
    const char* name;
    std::string label;
    SequenceAttention how;
};
std::vector<TaskAttention> task_attentions(int topk) {
    return {{"dense", "dense", {}}, {"topk", format("top %d", topk), {Cut::topk, topk}}};
}

// Of one text alone, which has no standard error, the share.
std::string share_text(double share, double error) {
    return std::isnan(error) ? format("%.4f", share) : format("%.4f +- %.4f", share, error);
}

template <class Float>
Json run_lambada(const Bench<Float>& bench, const InferConfig& c, const std::vector<Scored>& items) {
    Json json = {{"file", c.lambada}, {"items", items.size()}, {"k", c.topk}};
    printf("\nLAMBADA, %zu texts: the last word\n", items.size());
    for (const auto& [name, label, how] : task_attentions(c.topk)) {
        const LambadaSummary s = lambada_summary(items, score(bench, items, how, "LAMBADA"));
        printf("%8s  accuracy %s, perplexity %.2f\n", label.c_str(),
               share_text(s.accuracy, s.accuracy_error).c_str(), s.perplexity);
        json[name] = {{"accuracy", s.accuracy}, {"stderr", s.accuracy_error}, {"perplexity", s.perplexity}};
    }
    return json;
}

Json choice_json(const ChoiceSummary& s) {
    return {{"questions", s.questions},
            {"chance", s.chance},
            {"accuracy", s.accuracy},
            {"stderr", s.accuracy_error},
            {"accuracy_norm", s.accuracy_norm},
            {"stderr_norm", s.accuracy_norm_error},
            {"exact", s.exact},
            {"loss", s.loss}};
}

template <class Float>
Json run_hellaswag(const Bench<Float>& bench, const InferConfig& c, const std::vector<Scored>& items) {
    Json json = {{"file", c.hellaswag}, {"k", c.topk}};
    printf("\nHellaSwag, %zu questions of four endings\n", items.size() / 4);
    for (const auto& [name, label, how] : task_attentions(c.topk)) {
        const ChoiceSummary s = choice_summary(items, score(bench, items, how, "HellaSwag"));
        printf("%8s  accuracy %s, by length %s\n", label.c_str(),
               share_text(s.accuracy, s.accuracy_error).c_str(),
               share_text(s.accuracy_norm, s.accuracy_norm_error).c_str());
        json[name] = choice_json(s);
    }
    return json;
}

// Probes of random tokens, of those that the model's text has; sizes that fit its context.
struct Probes {
    int repeated, pairs, candidates;
    std::vector<Scored> induction, recall, needle;
};
Probes make_probes(const InferConfig& c, const Windows& w, int T, int eot) {
    const Tokens text = w.text();
    const Tokens alphabet = occurring_tokens(text, eot);
    const int questions = c.limit > 0 ? (int)c.limit : 100, some = std::max(1, questions / 4);
    const uint64_t seed = c.sampling.seed;
    const int key = 3;
    Probes p;
    p.repeated = std::min((T + 1) / 2, 256);
    p.pairs = std::max(2, std::min({16, (T - 1) / 2, (int)alphabet.size() / 2}));
    p.candidates = std::max(2, std::min(10, (int)alphabet.size() - key));
    // The needle first: what it says of a context that is too short holds for the others.
    p.needle = needle_probe(alphabet, text, T, key, p.candidates, some, seed);
    p.induction = induction_probe(alphabet, T, p.repeated, some, seed);
    p.recall = recall_probe(alphabet, T, p.pairs, questions, seed);
    return p;
}

template <class Float>
Json run_probes(const Bench<Float>& bench, const InferConfig& c, const Probes& p) {
    Json json = {{"k", c.topk}};
    printf("\nprobes (context %d)\n", bench.T);
    for (const auto& [name, label, how] : task_attentions(c.topk)) {
        const InductionSummary i =
            induction_summary(p.induction, score(bench, p.induction, how, "induction"));
        const ChoiceSummary r = choice_summary(p.recall, score(bench, p.recall, how, "recall"));
        const auto depths = needle_summary(p.needle, score(bench, p.needle, how, "needle"));
        printf("%8s  induction: loss %.3f, then %.3f when %d tokens repeat (accuracy %.3f)\n", label.c_str(),
               i.first_loss, i.second_loss, p.repeated, i.second_accuracy);
        printf("%8s  recall of %d pairs: accuracy %.3f (chance %.3f)\n", "", p.pairs, r.accuracy, r.chance);
        printf("%8s  needle by depth:", "");
        for (const ChoiceSummary& s : depths) printf(" %.2f", s.accuracy);
        printf(" (chance %.2f)\n", depths[0].chance);
        json["induction"][name] = {{"accuracy", i.second_accuracy},
                                   {"loss", i.second_loss},
                                   {"first_loss", i.first_loss},
                                   {"score", i.score}};
        json["recall"][name] = choice_json(r);
        for (const ChoiceSummary& s : depths) json["needle"][name].push_back(s.accuracy);
    }
    json["induction"]["tokens"] = p.repeated;
    json["recall"]["pairs"] = p.pairs;
    for (int d = 0; d < kNeedleDepths; d++) json["needle"]["depths"].push_back(d / (double)kNeedleDepths);
    json["needle"]["candidates"] = p.candidates;
    return json;
}

// ---------------------------------------------------------------------------------------------------------
// --report: where attention goes

// A token as it can stand in a picture: bytes that are no whole character are spelled out.
std::string token_label(const Tokenizer* tokenizer, uint16_t token) {
    if (!tokenizer) return std::to_string(token);
    const std::string text = tokenizer->decode({&token, 1});
    if (bpe::valid_prefix(text) == text.size()) return text;
    std::string spelled;
    for (const unsigned char byte : text)
        spelled += byte < 0x80 ? std::string(1, (char)byte) : format("<%02x>", byte);
    return spelled;
}

// The rows of heads on the first tokens of the text: of all heads where they are few enough, so that a page
// can set two models' side by side, but only the chosen ones have a reason to be drawn.
template <class Float>
Json attention_maps(const Bench<Float>& bench, const Windows& w, const Tokenizer* tokenizer,
                    const std::vector<AttentionReport::Choice>& choices) {
    const Context& ctx = bench.ctx;
    const std::vector<int>& text = w.inputs[0];
    const int T = std::min(40, w.T), NH = bench.m.config.num_heads;
    const bool all_heads = bench.m.config.num_layers * NH <= 200;
    Json tokens, maps = Json::array();
    for (int t = 0; t < T; t++) tokens.push_back(token_label(tokenizer, (uint16_t)text[t]));
    float* p = nullptr;
    const DeviceMemory memory(ctx, "the maps", "lower -b or -t",
                              [&](Arena& arena) { p = arena.take<float>((size_t)T * T); });
    to_device(bench.a.inputs, text.data(), T);
    forward(ctx, bench.m, bench.a, 1, T, nullptr, [&](int l) {
        attend_sequences(ctx, bench.m, bench.a, l, 1, T, {});
        for (int head = 0; head < NH; head++) {
            const auto choice = std::find_if(choices.begin(), choices.end(),
                                             [&](const auto& c) { return c.layer == l && c.head == head; });
            if (choice == choices.end() && !all_heads) continue;
            attention_map(ctx, p, bench.a.qkv, 0, head, T, NH, bench.m.config.head_size());
            const std::vector<float> map = to_host(ctx, p, (size_t)T * T);
            Json rows;
            for (int i = 0; i < T; i++)
                rows.push_back(std::vector<float>(map.begin() + i * T, map.begin() + i * T + i + 1));
            maps.push_back({{"layer", l},
                            {"head", head},
                            {"why", choice == choices.end() ? "" : choice->why},
                            {"tokens", tokens},
                            {"rows", rows}});
        }
    });
    return maps;
}

// Runs dev/report/page.py on a report; false, with the reason on the terminal, if that cannot be.
bool make_page(const std::string& folder) {
    const std::string script = program_folder() + "/dev/report/page.py";
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        execlp("python3", "python3", script.c_str(), "--", folder.c_str(), (char*)nullptr);
        _exit(127);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Removes what page.py made of an earlier report: page.html, and the pictures that it shows, DIR/page_ID.png
// of each <figure id="ID">. A page that is not of this report misleads, and whether there will be another is
// not known yet.
void remove_page(const std::string& folder) {
    std::ifstream file(folder + "/page.html");
    const std::string page{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    std::error_code ignored;
    for (size_t at = 0; (at = page.find("<figure class=", at)) != page.npos; at++) {
        const size_t id = page.find(" id=\"", at);
        if (id == page.npos) break;
        const std::string name = page.substr(id + 5, page.find('"', id + 5) - id - 5);
        if (name.find('/') == name.npos) std::filesystem::remove(folder + "/page_" + name + ".png", ignored);
    }
    std::filesystem::remove(folder + "/page.html", ignored);
}

// Everything about each head's rows on the given text into DIR/report.json, and from that pictures and a
// page.
template <class Float>
Json run_report(const Bench<Float>& bench, const InferConfig& c, const Windows& w, const Tokenizer* tokenizer,
                Json facts, const Json& probes) {
    const Context& ctx = bench.ctx;
    const int L = bench.m.config.num_layers, NH = bench.m.config.num_heads;
    AttentionReport report(L, NH, w.T, c.topk);
    const size_t rows_of_one = (size_t)NH * w.T;
    RowStats* stats = nullptr;
    const DeviceMemory memory(ctx, "the statistics", "lower -b or -t",
                              [&](Arena& arena) { stats = arena.take<RowStats>(w.rows(0) * rows_of_one); });
    for (size_t i = 0; i < w.inputs.size(); i++) {
        const int B = w.rows(i);
        to_device(bench.a.inputs, w.inputs[i].data(), w.inputs[i].size());
        forward(ctx, bench.m, bench.a, B, w.T, nullptr, [&](int l) {
            attend_sequences(ctx, bench.m, bench.a, l, B, w.T, {});
            attention_row_stats(ctx, stats, bench.a.qkv, B, w.T, NH, bench.m.config.head_size(), c.topk);
            report.add(l, to_host(ctx, stats, B * rows_of_one).data(), B);
        });
        say_progress("attention rows", (int64_t)i + 1, (int64_t)w.inputs.size());
    }
    const std::vector<CutLoss> losses = cut_losses(bench, w, c);

    Json json = {{"version", 1},
                 {"model",
                  {{"name", facts["model"]},
                   {"layers", L},
                   {"heads", NH},
                   {"channels", facts["channels"]},
                   {"vocabulary", facts["vocabulary"]},
                   {"parameters", facts["parameters"]}}}};
    for (const char* key : {"device", "precision", "commit", "date"}) json[key] = facts[key];
    json["text"] = {
        {"source", w.source}, {"sequences", w.count()}, {"context", w.T}, {"rows", report.rows_per_head()}};
    json["ks"] = kReportKs;
    json["k"] = c.topk;
    json["mass"] = {{"mean", report.mean_mass()}, {"nosink", report.mean_mass_nosink()}};
    json["heads"] = report.heads();
    json["mass_by_position"] = report.mass_by_position();
    json["loss"] = cut_losses_json(w, losses);
    json["maps"] = attention_maps(bench, w, tokenizer, report.heads_to_show());
    if (!probes.is_null()) json["probes"] = probes;
    remove_page(c.report);
    write_file(c.report + "/report.json", json_text(json) + "\n");

    print_cut_losses(w, losses, c);
    const auto number = [](const nlohmann::json& x) {
        return x.is_null() ? std::string("not measured") : format("%.4f", x.get<double>());
    };
    printf("\nmean top-%d mass %s (without position 0: %s)\n", c.topk, number(report.mean_mass()).c_str(),
           number(report.mean_mass_nosink()).c_str());
    if (!c.page)
        printf("wrote %s/report.json\n", c.report.c_str());
    else if (make_page(c.report))
        printf("wrote %s/report.json, its pictures and page.html\n", c.report.c_str());
    else
        printf(
            "wrote %s/report.json; its page was not made, for which python3 with matplotlib is needed: dev/report/page.py %s\n",
            c.report.c_str(), c.report.c_str());
    return json;
}

// ---------------------------------------------------------------------------------------------------------
// main

// The last of log/run1, log/run2, ... that has a checkpoint.
std::string newest_run() {
    std::vector<int64_t> runs = numbered_runs("log");
    for (; !runs.empty(); runs.pop_back())
        if (const std::string run = "log/" + run_folder_name(runs.back());
            !latest_checkpoint(run, false).empty())
            return run;
    fail(
        "no log/run1, log/run2, ... has a checkpoint yet: train one with ./train_gpt2cu, or name a model with -e");
}

// Everything but generating: what was asked for, on the terminal and as one JSON object.
template <class Float>
void measure(const Context& ctx, const Model<Float>& m, const InferConfig& c, const Tokenizer* tokenizer) {
    const GPT2Config& config = m.config;
    const int B = c.B > 0 ? c.B : kOnCpu ? 4 : 16, T = c.T > 0 ? c.T : config.max_seq_len;
    if (T > config.max_seq_len)
        fail("-t (--context) is %d, and the model has %d positions: give at most that", T,
             config.max_seq_len);
    if (!tokenizer && !(c.lambada.empty() && c.hellaswag.empty()))
        fail("LAMBADA and HellaSwag are text, and this model's vocabulary is not known");
    if (!c.report.empty()) {
        make_folder(c.report);
        output_target(c.report + "/report.json");
    }
    if (!c.json.empty()) output_target(c.json);
    if (std::error_code none; !c.report.empty() && !c.json.empty() &&
                              std::filesystem::weakly_canonical(c.json, none) ==
                                  std::filesystem::weakly_canonical(c.report + "/report.json", none))
        fail("--json %s is where --report writes the report alone: give it another name", c.json.c_str());
    // All input is read first: a name that is wrong must not cost what was measured before it came up.
    const auto limited = [&](std::vector<Scored> items, int64_t items_of_one) {
        if (c.limit > 0 && (int64_t)items.size() > c.limit * items_of_one)
            items.resize(c.limit * items_of_one);
        return items;
    };
    const auto windows = [&](const std::string& what) {
        return read_windows(what, tokenizer, config.vocab_size, B, T, c.batches);
    };
    std::optional<Windows> shard, text;  // of --eval, and of what has no data of its own
    std::vector<Scored> lambada, hellaswag;
    if (!c.eval.empty()) shard = windows(c.eval);
    if (!c.lambada.empty()) lambada = limited(read_lambada(c.lambada, *tokenizer, T), 1);
    if (!c.hellaswag.empty()) hellaswag = limited(read_hellaswag(c.hellaswag, *tokenizer, T), 4);
    if (c.probes || !c.report.empty()) {
        const char* tokens = config.vocab_size == kByteVocab ? "bytes" : "gpt2";
        text = windows(c.data.empty() ? default_data(tokens, "val") : c.data);
    }
    std::optional<Probes> probes;
    if (c.probes) probes = make_probes(c, *text, T, end_of_text(tokenizer, config));
    const Bench<Float> bench(ctx, m, B, T);
    Json json = json_facts<Float>(ctx, c, config);
    if (shard) {
        const std::vector<CutLoss> all = cut_losses(bench, *shard, c);
        print_cut_losses(*shard, all, c);
        json["eval"] = cut_losses_json(*shard, all);
    }
    if (!c.lambada.empty()) json["lambada"] = run_lambada(bench, c, lambada);
    if (!c.hellaswag.empty()) json["hellaswag"] = run_hellaswag(bench, c, hellaswag);
    if (probes) json["probes"] = run_probes(bench, c, *probes);
    if (!c.report.empty())
        json["report"] = run_report(bench, c, *text, tokenizer, json, c.probes ? json["probes"] : Json());
    if (!c.json.empty()) {
        write_file(c.json, json_text(json, 1) + "\n");
        printf("\nwrote %s\n", c.json.c_str());
    }
}

// Flags that do not go together: also those that nothing would read.
void check_flags(InferConfig& c, const GivenFlags& given) {
    const int prompts = c.prompt_given + !c.prompt_file.empty() + c.interactive;
    if (prompts > 1) fail("-p, -f and --interactive are three ways to give prompts: choose one");
    if (c.measures() && prompts > 0)
        fail("-p, -f and --interactive generate text, and the other flags measure: run one after the other");
    for (const char* name : {"tokens", "attention", "epsilon", "temperature", "top-p", "top-tokens", "greedy",
                             "context-full", "stats"})
        if (c.measures() && given.contains(name))
            fail(
                "--%s is for generating text; --eval, --lambada, --hellaswag, --probes and --report measure without it: leave it out",
                name);
    const bool eval = !c.eval.empty(), tasks = !c.lambada.empty() || !c.hellaswag.empty(),
               report = !c.report.empty();
    const struct {
        const char *flag, *readers;
        bool is_read;
    } measuring[] = {{"cuts", "--eval and --report", eval || report},
                     {"cut-kinds", "--eval and --report", eval || report},
                     {"no-page", "--report", report},
                     {"data", "--report and --probes", report || c.probes},
                     {"batches", "--eval, --report and --probes", eval || report || c.probes},
                     {"limit", "--lambada, --hellaswag and --probes", tasks || c.probes},
                     {"batch", "--eval, --lambada, --hellaswag, --probes and --report", c.measures()},
                     {"context", "--eval, --lambada, --hellaswag, --probes and --report", c.measures()}};
    for (const auto& [flag, readers, is_read] : measuring)
        if (given.contains(flag) && !is_read)
            fail("--%s is for %s: give one of these, or leave it out", flag, readers);
    if (given.contains("topk") && c.measures() && !(tasks || report || c.probes))
        fail(
            "-k is for --lambada, --hellaswag, --probes, --report and generating text: for --eval give --cuts");
    if (c.interactive && !c.json.empty())
        fail("--json keeps one generation, and --interactive makes many: give the prompts with -p or -f");
    if (given.contains("epsilon") && c.attention != DecodeMode::pages)
        fail("--epsilon is for --attention pages: give both");
    if (given.contains("topk") && !c.measures()) {
        if (!given.contains("attention")) c.attention = DecodeMode::topk;
        if (c.attention != DecodeMode::topk)
            fail("-k goes with --attention topk, not %s", kDecodeWords[(int)c.attention]);
    }
    if (c.greedy) c.sampling.temperature = 0;
}

template <class Float>
void infer(InferConfig c) {
    const Context ctx = without_tuning(make_context());  // prompts have any length
    if (c.from.empty()) c.from = newest_run();
    const WeightFiles files = find_named_model(
        c.from, "124M ... 1558M, or a run's, checkpoint's or model's folder or file", stderr);
    const GPT2Config config = config_for_weights(files);
    const std::unique_ptr<Tokenizer> tokenizer = find_tokenizer(&files, config.vocab_size, stderr);
    Model<Float> m = load_model<Float>(ctx, files, config);
    fprintf(stderr, "%s: %d layers, %d heads, %d channels, vocabulary %d, context %d; %s, %s\n",
            c.from.c_str(), config.num_layers, config.num_heads, config.channels, config.vocab_size,
            config.max_seq_len, ctx.device_name.c_str(), sizeof(Float) == 2 ? "bf16" : "fp32");
    if (c.measures())
        measure(ctx, m, c, tokenizer.get());
    else
        generate_text(ctx, m, c, tokenizer.get());
}

#ifndef NO_MAIN
int main(int argc, char** argv) {
    return run_program("error", [&] {
        InferConfig config;
        const std::vector<Flag> flags = infer_flags(config);
        if (argc == 2 && !strcmp(argv[1], "--help-markdown")) {
            fputs(flags_markdown(flags).c_str(), stdout);
            return;
        }
        check_flags(config, parse_flags(argc, argv, flags));
        choose_device(config.device, "infer_gpt2", argv, stderr);
        if (wants_bf16(config.precision))
            infer<__nv_bfloat16>(config);
        else
            infer<float>(config);
    });
}
#endif
