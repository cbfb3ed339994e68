// GPT-2's hyper-parameters and the one table of its parameters. Allocation, initialization, loading,
// saving, weight decay and --debug-state all walk this table, so a tensor is described once. The structs of
// pointers at the end have its order.
//
// Names are Hugging Face's. A matrix is stored here as [out, in] (each output's weights lie together);
// Hugging Face's Conv1D stores [in, out] on disk, which `transposed` marks: it is transposed once, on load.
// The vocabulary is padded to a multiple of 128 rows in memory, for the matmuls; never on disk.
#pragma once
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct GPT2Config {
    int max_seq_len = 1024;         // T at most: rows of wpe
    int vocab_size = 50257;         // V
    int padded_vocab_size = 50304;  // Vp, V rounded up to a multiple of 128
    int num_layers = 12;            // L
    int num_heads = 12;             // NH
    int channels = 768;             // C, a multiple of NH

    int head_size() const { return channels / num_heads; }  // hs
    bool operator==(const GPT2Config&) const = default;
};

// A size by its name. A head has 64 channels.
struct ModelSize {
    const char* name;
    int layers, heads;
    int channels() const { return 64 * heads; }
};
// Those that OpenAI published (Radford et al., 2019).
inline constexpr ModelSize kPublishedSizes[] = {
    {"124M", 12, 12}, {"355M", 24, 16}, {"774M", 36, 20}, {"1558M", 48, 25}};

inline int pad_vocab(int vocab_size) {
    return (vocab_size + 127) / 128 * 128;
}

inline constexpr int kMaxLayers = 256;

// "" if the configuration is one that this engine can train, otherwise a sentence that says what is not.
inline std::string config_problem(const GPT2Config& c) {
    if (c.max_seq_len < 1 || c.max_seq_len > 65536) return "the context length must be 1 to 65536";
    if (c.vocab_size < 2 || c.vocab_size > 65536) return "the vocabulary must have 2 to 65536 entries";
    static_assert(kMaxLayers == 256);
    if (c.num_layers < 1 || c.num_layers > kMaxLayers) return "the number of layers must be 1 to 256";
    if (c.channels < 8 || c.channels > 16384) return "the number of channels must be 8 to 16384";
    if (c.num_heads < 1 || c.channels % c.num_heads) return "the channels must divide evenly among the heads";
    if (c.head_size() % 8 || c.head_size() > 128)
        return "the head size (channels / heads) must be a multiple of 8, at most 128";
    return "";
}

enum class Dim { one, vocab, positions, channels, channels3, channels4 };
// normal: N(0, 0.02). residual: N(0, 0.02 / sqrt(2 L)), for the two matrices that write to the residual
// stream (GPT-2 paper, section 2.3).
enum class Init { zeros, ones, normal, residual };

struct ParamSpec {
    const char* name;  // per layer: what follows "h.<layer>."
    bool per_layer;
    Dim rows, cols;  // as stored here; a vector has rows = one
    Init init;
    bool decay;       // AdamW's weight decay: matrices only
    bool transposed;  // stored on disk as [cols, rows]
};

inline constexpr ParamSpec kGPT2Params[] = {
    {"wte.weight", false, Dim::vocab, Dim::channels, Init::normal, true, false},
    {"wpe.weight", false, Dim::positions, Dim::channels, Init::normal, true, false},
    {"ln_1.weight", true, Dim::one, Dim::channels, Init::ones, false, false},
    {"ln_1.bias", true, Dim::one, Dim::channels, Init::zeros, false, false},
    {"attn.c_attn.weight", true, Dim::channels3, Dim::channels, Init::normal, true, true},
    {"attn.c_attn.bias", true, Dim::one, Dim::channels3, Init::zeros, false, false},
    {"attn.c_proj.weight", true, Dim::channels, Dim::channels, Init::residual, true, true},
    {"attn.c_proj.bias", true, Dim::one, Dim::channels, Init::zeros, false, false},
    {"ln_2.weight", true, Dim::one, Dim::channels, Init::ones, false, false},
    {"ln_2.bias", true, Dim::one, Dim::channels, Init::zeros, false, false},
    {"mlp.c_fc.weight", true, Dim::channels4, Dim::channels, Init::normal, true, true},
    {"mlp.c_fc.bias", true, Dim::one, Dim::channels4, Init::zeros, false, false},
    {"mlp.c_proj.weight", true, Dim::channels, Dim::channels4, Init::residual, true, true},
    {"mlp.c_proj.bias", true, Dim::one, Dim::channels, Init::zeros, false, false},
    {"ln_f.weight", false, Dim::one, Dim::channels, Init::ones, false, false},
    {"ln_f.bias", false, Dim::one, Dim::channels, Init::zeros, false, false},
};

// One tensor of one model: its name and where it lies in a flat array of num_parameters() elements.
struct ParamTensor {
    std::string name;  // "wte.weight", "h.0.ln_1.weight", ...
    size_t offset;     // elements
    int rows, cols;    // as stored here, vocabulary padded
    int rows_on_disk;  // rows without the padding
    bool is_vector;    // shape on disk is [cols]
    bool transposed;   // shape on disk is [cols, rows_on_disk], otherwise [rows_on_disk, cols]
    bool decay;
    Init init;

    size_t size() const { return static_cast<size_t>(rows) * cols; }
    size_t size_on_disk() const { return static_cast<size_t>(rows_on_disk) * cols; }
    std::vector<int64_t> shape_on_disk() const {
        if (is_vector) return {cols};
        if (transposed) return {cols, rows_on_disk};
        return {rows_on_disk, cols};
    }
};

// Every tensor of the model, in the order of the table: wte, wpe, then each layer's twelve, then ln_f.
inline std::vector<ParamTensor> gpt2_params(const GPT2Config& c) {
    auto extent = [&](Dim d, bool padded) {
        switch (d) {
            case Dim::one:
                return 1;
            case Dim::vocab:
                return padded ? c.padded_vocab_size : c.vocab_size;
            case Dim::positions:
                return c.max_seq_len;
            case Dim::channels:
                return c.channels;
            case Dim::channels3:
                return 3 * c.channels;
            case Dim::channels4:
                return 4 * c.channels;
        }
        return 0;
    };
    std::vector<ParamTensor> tensors;
    size_t offset = 0;
    auto add = [&](const ParamSpec& s, const std::string& prefix) {
        tensors.push_back({prefix + s.name, offset, extent(s.rows, true), extent(s.cols, true),
                           extent(s.rows, false), s.rows == Dim::one, s.transposed, s.decay, s.init});
        offset += tensors.back().size();
    };
    constexpr int n = sizeof(kGPT2Params) / sizeof(kGPT2Params[0]);
    for (int i = 0; i < n;) {
        if (!kGPT2Params[i].per_layer) {
            add(kGPT2Params[i++], "");
            continue;
        }
        int end = i;
        while (end < n && kGPT2Params[end].per_layer) end++;
        for (int l = 0; l < c.num_layers; l++)
            for (int j = i; j < end; j++) add(kGPT2Params[j], "h." + std::to_string(l) + ".");
        i = end;
    }
    return tensors;
}

// Elements of the flat array that holds every parameter, padding of the vocabulary included.
inline size_t num_parameters(const GPT2Config& c) {
    const ParamTensor last = gpt2_params(c).back();
    return last.offset + last.size();
}

// The same without the padding: the parameters that the model has.
inline size_t num_weights(const GPT2Config& c) {
    size_t n = 0;
    for (const ParamTensor& p : gpt2_params(c)) n += p.size_on_disk();
    return n;
}

template <class T>
struct LayerParams {
    T *ln1_w, *ln1_b;          // [C]
    T *qkv_w, *qkv_b;          // [3C,C], [3C]
    T *attproj_w, *attproj_b;  // [C,C], [C]
    T *ln2_w, *ln2_b;          // [C]
    T *fc_w, *fc_b;            // [4C,C], [4C]
    T *fcproj_w, *fcproj_b;    // [C,4C], [C]
};
template <class T>
struct Params {
    T *wte, *wpe;  // [Vp,C], [maxT,C]
    std::vector<LayerParams<T>> layers;
    T *lnf_w, *lnf_b;  // [C]
};

// Pointers into one array that is laid out by the table. The table's order is this order.
template <class T>
Params<T> point_to_params(T* base, const GPT2Config& config) {
    const std::vector<ParamTensor> table = gpt2_params(config);
    size_t i = 0;
    auto next = [&] { return base + table[i++].offset; };
    Params<T> p;
    p.wte = next();
    p.wpe = next();
    p.layers.resize(config.num_layers);
    for (LayerParams<T>& l : p.layers)
        for (T** tensor : {&l.ln1_w, &l.ln1_b, &l.qkv_w, &l.qkv_b, &l.attproj_w, &l.attproj_b, &l.ln2_w,
                           &l.ln2_b, &l.fc_w, &l.fc_b, &l.fcproj_w, &l.fcproj_b})
            *tensor = next();
    p.lnf_w = next();
    p.lnf_b = next();
    assert(i == table.size());
    return p;
}
