// Measures decoding: how long one token takes for B sequences with T tokens in the cache, with each way of
// reading the cache, against the bytes that cannot be avoided; attention alone; each of the other kernels
// alone; and drawing the token.
// README.md beside this says how to run it and how each figure is counted.
//
// The step is infer_gpt2's own, recorded as a graph as there. Weights and caches are random, so no files are
// needed; contexts beyond GPT-2's 1024 have random position embeddings. How many pages a text needs depends
// on the model and the text, so pages are measured at both extremes: stopping after the first round, which
// reads the least, and never before the end. Real texts lie in between.
#define NO_MAIN
#include "../../infer_gpt2.cu"
#include "measure.cuh"

// What infer_gpt2cu computes in unless told otherwise.
using Float = std::conditional_t<kOnCpu, float, __nv_bfloat16>;

// ---------------------------------------------------------------------------------------------------------
// settings

struct DecodeBenchConfig {
    std::string size = kOnCpu ? "tiny" : "124M";
    int B = -1, T = -1;
    int topk = 8;
    std::string out;
    double budget = 0;  // seconds; 0: no limit
    bool quick = false, serial = false, halves = false;
};

std::vector<Flag> decode_flags(DecodeBenchConfig& c) {
    return {
        {'e', "size", "SIZE", c.size, "model: 124M, 355M, 774M, 1558M; for the CPU also tiny or small",
         [&c](auto&, auto& v) { c.size = v; }},
        {'b', "batch", "B", "a list", "sequences side by side; with -t (1024 unless given) the only case",
         [&c](auto& flag, auto& v) { c.B = (int)parse_int(flag, v, 1, 4096); }},
        {'t', "context", "T", "a list", "tokens in the cache; with -b (1 unless given) the only case",
         [&c](auto& flag, auto& v) { c.T = (int)parse_int(flag, v, 16, 16384); }},
        {'k', "topk", "K", "8", "keys that top-k attention keeps",
         [&c](auto& flag, auto& v) { c.topk = (int)parse_int(flag, v, 1, 1024); }},
        {'o', "out", "DIR", kOnCpu ? "build" : "dev/bench",
         "folder for the two files, decode_DEVICE_DATE.md and .json; made if it is not there",
         [&c](auto&, auto& v) { c.out = v; }},
        {0, "budget", "SECONDS", "none", "skip what would not end within this time, and say so",
         [&c](auto& flag, auto& v) { c.budget = parse_float(flag, v, 1, 1e6); }},
        {0, "quick", "", "", "fewer repetitions, and only the cases of one and of many sequences at 1024",
         [&c](auto&, auto&) { c.quick = true; }},
        {0, "serial", "", "", "let no kernel start before the one in front has ended",
         [&c](auto&, auto&) { c.serial = true; }},
        {0, "halves", "", "",
         "the CPU backend, too: one sequence by two kernels a layer, which are written for clusters of a GPU",
         [&c](auto&, auto&) { c.halves = true; }},
        help_flag(
            "Measures decoding: a step, its attention, and drawing a token.\n\n    make decode-bench DECODE=\"--quick\"\n\n",
            [] {
                DecodeBenchConfig defaults;
                return decode_flags(defaults);
            }),
    };
}

struct Shape {
    int B, T;
};

std::vector<Shape> shapes_of(const DecodeBenchConfig& c) {
    if (c.B > 0 || c.T > 0) return {{std::max(c.B, 1), c.T > 0 ? c.T : 1024}};
    if (kOnCpu && size_config(c.size, 1).channels >= 768) return {{1, 64}};
    // More than a chunk of keys, and more sequences than the kernels for few rows take.
    if (kOnCpu) return {{1, 64}, {2, kDecodeChunk + 30}, {kMaxMatvecRows + 1, 64}};
    if (c.quick) return {{1, 1024}, {32, 1024}};
    return {{1, 64}, {1, 1024}, {32, 1024}, {1, 8192}, {32, 8192}};
}

struct DecodeBench : Measuring {
    DecodeBenchConfig config;
    std::unique_ptr<DeviceArray<Float>> weights;
    Model<Float> model;       // of these weights
    double copy = 0;          // bytes a second
    double weight_bytes = 0;  // that every step reads

    int L() const { return model.config.num_layers; }
    int NH() const { return model.config.num_heads; }
    double floor_ms(double bytes) const { return 1e3 * bytes / copy; }

    // The context that decodes by halves of layers, and whether it does so.
    Context with_halves() const {
        Context with = ctx;
        with.use_decode_halves = ctx.has_clusters;
        with.row_lanes = 32;
        return with;
    }
    bool takes_halves(int B, int capacity, DecodeHow how) const {
        const int C = model.config.channels;
        return (config.halves || !kOnCpu) && B == 1 &&
               takes_decode_halves<Float>(with_halves(), C, model.config.head_size(), capacity, how);
    }
};

// ---------------------------------------------------------------------------------------------------------
// a model and sequences

void make_model(DecodeBench& b, int longest) {
    Model<Float>& m = b.model;
    m.config = size_config(b.config.size, longest);
    const size_t n = num_parameters(m.config);
    b.weights = std::make_unique<DeviceArray<Float>>(n);
    Float* params = *b.weights;
    CUDA_CHECK(cudaMemset(params, 0, n * sizeof(Float)));
    fill_weights(b.ctx, params, m.config);
    m.params = point_to_params(params, m.config);
    // Everything but the position embeddings, of which a token reads one row.
    b.weight_bytes = (double)(n - (size_t)longest * m.config.channels) * sizeof(Float);
}

// B sequences whose caches hold T tokens. The newest token is at position T - 1 and, the context being T,
// stays there, so every step does the same work.
struct Sequences {
    int B, T;
    Acts<Float> one;
    Decoding<Float> d;
    DecodeStats* stats;  // [L,B,NH]
    DeviceMemory memory;

    Sequences(const DecodeBench& b, Shape shape)
        : B(shape.B),
          T(shape.T),
          memory(b.ctx, "the sequences", "", [&](Arena& arena) { lay_out(arena, b); }) {
        memory.zero();
        const Context& ctx = b.ctx;
        const std::vector<int> positions(B, T - 1);
        std::vector<int> tokens(B), streams(B);
        std::iota(streams.begin(), streams.end(), 0);
        for (int i = 0; i < B; i++)
            tokens[i] = (int)(random_bits(1, 0, i) % (uint64_t)b.model.config.vocab_size);
        to_device(d.tokens, tokens.data(), tokens.size());
        to_device(d.streams, streams.data(), streams.size());
        to_device(d.positions, positions.data(), positions.size());

        // Keys and values of about the size that these weights make, and the pages' bounds with them.
        const int C = b.model.config.channels, piece = std::min(T, 1024);
        const DeviceArray<Float> qkv((size_t)B * piece * 3 * C);
        const DeviceArray<int> start(B);
        for (int first = 0; first < T; first += piece) {
            const int count = std::min(piece, T - first);
            const std::vector<int> starts(B, first);
            to_device<int>(start, starts.data(), starts.size());
            for (int l = 0; l < b.L(); l++) {
                fill(ctx, qkv, random_bits(2, first, l), 0.5f);
                kv_append<Float>(ctx, d.cache[l], qkv, B, count, b.NH(), b.model.config.head_size(), nullptr,
                                 start, nullptr);
            }
            CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
        }
    }

    // Whether so much memory is free.
    static bool fit(const DecodeBench& b, Shape shape) {
        const GPT2Config& config = b.model.config;
        Arena sizes;
        lay_out_acts<Float>(sizes, config, shape.B, 1);
        lay_out_decoding<Float>(sizes, config, shape.B, padded(shape.T), shape.T, true);
        const size_t filling =
            (size_t)shape.B * std::min(shape.T, 1024) * 3 * config.channels * sizeof(Float);
        size_t free_bytes = 0, total_bytes = 0;
        CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
        return sizes.used + filling + ((size_t)64 << 20) <= free_bytes;
    }

  private:
    static int padded(int T) { return ceil_div(T, kPageTokens) * kPageTokens; }
    void lay_out(Arena& arena, const DecodeBench& b) {
        one = lay_out_acts<Float>(arena, b.model.config, B, 1);
        d = lay_out_decoding<Float>(arena, b.model.config, B, padded(T), T, false);
        stats = arena.take<DecodeStats>((size_t)b.L() * B * b.NH());
    }
};

// ---------------------------------------------------------------------------------------------------------
// time and bytes

// The time of work() as part of a graph that is launched again and again, as decoding does.
template <class Work>
Timing time_replays(const Measuring& b, Work work) {
    Graph graph;
    double one = 0;
    for (int i = 0; i < 3; i++) {  // as it is, recorded, replayed
        const double start = seconds_now();
        graph.run(b.ctx, work);
        CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
        one = seconds_now() - start;
    }
    const int replays = kOnCpu ? 1 : (int)std::clamp(0.02 / one, 3.0, 200.0), runs = b.brief ? 5 : 15;
    std::vector<Event> begins(runs), ends(runs);
    for (int i = 0; i < runs; i++) {
        begins[i].record(b.ctx);
        for (int r = 0; r < replays; r++) graph.run(b.ctx, work);
        ends[i].record(b.ctx);
    }
    CUDA_CHECK(cudaStreamSynchronize(b.ctx.stream));
    std::vector<double> ms;
    for (int i = 0; i < runs; i++) ms.push_back(std::max(ends[i].since(begins[i]) / replays, 1e-4));
    return summarize(ms);
}

// What attention reads in one step, all layers, heads and sequences together.
struct Reads {
    double keys = 0, pages = 0;  // of pages attention: keys and pages read
    double bytes = 0;
};

// work(stats) runs all layers' attention once.
template <class Work>
Reads count_reads(const DecodeBench& b, const Sequences& s, DecodeHow how, Work work) {
    const size_t heads = (size_t)b.L() * s.B * b.NH();
    CUDA_CHECK(cudaMemsetAsync(s.stats, 0, heads * sizeof(DecodeStats), b.ctx.stream));
    work(s.stats);
    Reads r;
    for (const DecodeStats& x : to_host(b.ctx, s.stats, heads)) {
        r.keys += x.keys;
        r.pages += x.pages;
    }
    const double row = (double)b.model.config.head_size() * sizeof(Float), n = s.T;
    if (how.mode == DecodeMode::dense)
        r.bytes = (double)heads * 2 * n * row;
    else if (how.mode == DecodeMode::topk)
        r.bytes = (double)heads * (n + std::min(how.topk, s.T)) * row;
    else
        r.bytes = (double)heads * 2 * ceil_div(s.T, kPageTokens) * row + 2 * r.keys * row;
    return r;
}

// ---------------------------------------------------------------------------------------------------------
// steps

struct Reading {
    std::string name;
    DecodeHow how;
    bool halves = false;  // of layers, by clusters
};

std::vector<Reading> readings(int topk) {
    // The certificate is less than 1 after the first round already, and reaches 0 after the last page alone.
    return {{"dense", {DecodeMode::dense}},
            {"dense, halves", {DecodeMode::dense}, true},
            {format("top-%d", topk), {DecodeMode::topk, topk}},
            {format("top-%d, halves", topk), {DecodeMode::topk, topk}, true},
            {"pages, first round", {DecodeMode::pages, 0, 1.0f}},
            {"pages, all", {DecodeMode::pages, 0, 0.0f}}};
}

// Greedy: other ways to draw have a table of their own, because they depend on how the logits are
// distributed.
constexpr Sampling kGreedy = {.temperature = 0.0f};

struct StepTable {
    DecodeBench& b;
    Table table;
    nlohmann::ordered_json& rows;

    // One row; returns the step's time. dense_ms: that of dense attention, 0 if this is it.
    double row(const Sequences& s, const Reading& reading, double dense_ms) {
        const Context ctx = reading.halves ? b.with_halves() : b.ctx;
        const Model<Float>& m = b.model;
        const DecodeHow how = reading.how;
        const int B = s.B, T = s.T;
        const Timing step = time_replays(b, [&] { decode_step<Float>(ctx, m, s.one, s.d, how, kGreedy); });
        for (const Float x : to_host(ctx, s.d.logits, m.config.vocab_size))
            if (!std::isfinite((float)x)) fail("the step computed logits that are not finite");
        const Reads step_reads = count_reads(b, s, how, [&](DecodeStats* stats) {
            Decoding<Float> counted = s.d;
            counted.stats = stats;
            decode_step<Float>(ctx, m, s.one, counted, how, kGreedy);
        });
        const double bytes = b.weight_bytes + step_reads.bytes, floor = b.floor_ms(bytes);

        // Attention alone, with queries of the size that the weights make, and nothing in the L2 cache.
        fill(ctx, s.one.qkv, (size_t)B * 3 * m.config.channels, 3, 0.0f, 0.5f);
        const auto attend = [&](DecodeStats* stats) {
            for (int l = 0; l < b.L(); l++)
                attention_decode(ctx, s.one.att, stats ? stats + (size_t)l * B * b.NH() : nullptr,
                                 s.d.attention, s.one.qkv, s.d.cache[l], s.d.positions, B, b.NH(),
                                 m.config.head_size(), how);
        };
        Graph graph;
        const Timing attention = time_work(b, [&] { graph.run(ctx, [&] { attend(nullptr); }); });
        const Reads reads = count_reads(b, s, how, attend);
        const double layer_ms = attention.ms / b.L(), layer_floor = b.floor_ms(reads.bytes / b.L());

        const double all_pages = (double)b.L() * B * b.NH() * ceil_div(T, kPageTokens);
        const bool paged = how.mode == DecodeMode::pages;
        table.row({reading.name, std::to_string(B), std::to_string(T), format("%.4f", step.ms),
                   format("%.4f", step.least_ms), format("%.1f", B / step.ms * 1e3),
                   dense_ms > 0 ? format("%.2fx", dense_ms / step.ms) : "", format("%.1f", bytes * 1e-6),
                   format("%.4f", floor), format("%.2f", step.ms / floor), format("%.4f", layer_ms),
                   format("%.4f", layer_floor), format("%.2f", layer_ms / layer_floor),
                   paged ? format("%.1f%%", 100 * step_reads.pages / all_pages) : ""});
        rows.push_back({{"attention", reading.name},
                        {"B", B},
                        {"T", T},
                        {"ms", step.ms},
                        {"least_ms", step.least_ms},
                        {"runs", step.runs},
                        {"tokens_per_s", B / step.ms * 1e3},
                        {"bytes", bytes},
                        {"floor_ms", floor},
                        {"ratio", step.ms / floor},
                        {"attention_layer_ms", layer_ms},
                        {"attention_layer_least_ms", attention.least_ms / b.L()},
                        {"attention_layer_bytes", reads.bytes / b.L()},
                        {"attention_layer_floor_ms", layer_floor},
                        {"attention_ratio", layer_ms / layer_floor}});
        if (dense_ms > 0) rows.back()["speedup_over_dense"] = dense_ms / step.ms;
        if (paged) {
            rows.back()["share_of_pages_in_step"] = step_reads.pages / all_pages;
            rows.back()["share_of_pages_in_attention"] = reads.pages / all_pages;
        }
        return step.ms;
    }

    // Several rows for one shape. What does not fit is a row that says so.
    void shape(const std::string& name, Shape shape, const std::vector<Reading>& all) {
        if (!Sequences::fit(b, shape)) {
            table.note(name, "does not fit into the memory that is free");
            rows.push_back(
                {{"name", name}, {"B", shape.B}, {"T", shape.T}, {"not_measured", "does not fit"}});
            return;
        }
        attempt(b, table, name, rows, kOnCpu ? 1 : 6, [&] {
            const Sequences s(b, shape);
            double dense_ms = 0;
            for (const Reading& reading : all) {
                if (reading.halves && !b.takes_halves(shape.B, s.d.capacity, reading.how)) continue;
                attempt(b, table, name + ", " + reading.name, rows, kOnCpu ? 0.5 : 2, [&] {
                    const double ms = row(s, reading, dense_ms);
                    if (dense_ms == 0) dense_ms = ms;
                });
            }
        });
    }
};

void bench_decode_steps(DecodeBench& b, const std::vector<Shape>& shapes, const std::vector<int>& batches) {
    b.report.print(format(
        "\n## Steps: one token for each of B sequences with T tokens in the cache\n\n"
        "Floor: the weights once (%.1f MB) and what attention must read, at the bandwidth of the copy. T = 16: the "
        "weights almost alone. Pages: after the first round, %d pages a head, and all of them; real texts lie in "
        "between. Attention: its kernels alone, one layer. Positions from 1024 on have random embeddings.\n\n",
        b.weight_bytes * 1e-6, kPagesPerRound));
    StepTable t{b,
                Table(b.report, {{"attention", 18},
                                 {"B", 3},
                                 {"T", 5},
                                 {"step ms", 8},
                                 {"least", 8},
                                 {"tokens/s", 9},
                                 {"against dense", 8},
                                 {"MB read", 8},
                                 {"floor ms", 8},
                                 {"ratio", 6},
                                 {"attention ms", 8},
                                 {"its floor", 8},
                                 {"its ratio", 6},
                                 {"pages read", 6}}),
                b.report.json["steps"] = nlohmann::ordered_json::array()};
    const std::vector<Reading> all = readings(b.config.topk);
    for (const int B : batches) t.shape(format("B = %d, T = 16", B), {B, 16}, {all[0]});
    for (const Shape& s : shapes) t.shape(format("B = %d, T = %d", s.B, s.T), s, all);
}

// ---------------------------------------------------------------------------------------------------------
// the kernels of a step, each kind alone

void bench_kernels(DecodeBench& b, const std::vector<int>& batches) {
    const Context& ctx = b.ctx;
    const Model<Float>& m = b.model;
    const int C = m.config.channels, Vp = m.config.padded_vocab_size, L = b.L();
    b.report.print(
        "\n## Kernels of a step, each kind alone\n\n"
        "All layers' launches of a kind as one graph, nothing in the L2 cache before it, divided by their number: "
        "between two launches of a graph of its own the device is idle, so that a kind with one launch takes longer "
        "here than in a step. Floor: the weights.\n\n");
    Table table(b.report,
                {{"kernel", 14}, {"B", 3}, {"launches", 8}, {"us", 7}, {"floor us", 8}, {"ratio", 6}});
    nlohmann::ordered_json& rows = b.report.json["kernels"] = nlohmann::ordered_json::array();
    const Normalize<Float> as_it_is = {nullptr, nullptr};
    for (const int B : batches) {
        if (!is_few<Float>(ctx, B, C)) continue;  // of many sequences the products are cuBLASLt's
        const Sequences s(b, {B, 16});
        const Acts<Float>& a = s.one;
        fill(ctx, a.residual, (size_t)B * C, 5, 0.0f, 1.0f);
        fill(ctx, a.att, (size_t)B * C, 6, 0.0f, 0.1f);
        fill(ctx, a.fch_gelu, (size_t)B * 4 * C, 7, 0.0f, 0.1f);
        // launch(l) for all layers, or once; weights: that one launch reads
        const auto kind = [&](const char* name, int launches, double weights, auto launch) {
            attempt(b, table, format("%s, B = %d", name, B), rows, kOnCpu ? 0.2 : 0.5, [&] {
                Graph graph;
                const Timing t = time_work(b, [&] {
                    graph.run(ctx, [&] {
                        for (int l = 0; l < launches; l++) launch(l);
                    });
                });
                const double ms = t.ms / launches, floor = b.floor_ms(weights * sizeof(Float));
                table.row({name, std::to_string(B), std::to_string(launches), format("%.2f", 1e3 * ms),
                           format("%.2f", 1e3 * floor), floor > 0 ? format("%.2f", ms / floor) : ""});
                rows.push_back({{"name", name},
                                {"B", B},
                                {"launches", launches},
                                {"ms", ms},
                                {"least_ms", t.least_ms / launches},
                                {"runs", t.runs},
                                {"floor_ms", floor}});
            });
        };
        const auto linear = [&](Float* out, const Float* inp, const Float* weight, const Float* bias,
                                Normalize<Float> norm, const Float* residual, bool gelu, int IC, int OC) {
            linear_of_few(ctx, out, inp, weight, bias, norm, residual, gelu, B, IC, OC);
        };
        const std::vector<LayerParams<Float>>& layers = m.params.layers;
        kind("embedding", 1, 0, [&](int) {
            encoder_forward(ctx, a.normed, s.d.tokens, m.params.wte, m.params.wpe, B, 1, C, s.d.positions);
        });
        kind("qkv", L, 3.0 * C * C, [&](int l) {
            const LayerParams<Float>& p = layers[l];
            linear(a.qkv, a.residual, p.qkv_w, p.qkv_b, {p.ln1_w, p.ln1_b}, nullptr, false, C, 3 * C);
        });
        kind("attproj", L, 1.0 * C * C, [&](int l) {
            const LayerParams<Float>& p = layers[l];
            linear(a.branch, a.att, p.attproj_w, p.attproj_b, as_it_is, a.residual, false, C, C);
        });
        kind("fc", L, 4.0 * C * C, [&](int l) {
            const LayerParams<Float>& p = layers[l];
            linear(a.fch, a.residual, p.fc_w, p.fc_b, {p.ln2_w, p.ln2_b}, nullptr, true, C, 4 * C);
        });
        kind("fcproj", L, 4.0 * C * C, [&](int l) {
            const LayerParams<Float>& p = layers[l];
            linear(a.branch, a.fch_gelu, p.fcproj_w, p.fcproj_b, as_it_is, a.residual, false, 4 * C, C);
        });
        if (b.takes_halves(B, s.d.capacity, {})) {
            const Context with = b.with_halves();
            const auto& [of_attention, of_mlp] = s.d.parts;
            const Stream<Float> x = {a.residual, of_mlp, kMlpSlices, layers[0].fcproj_b},
                                y = {a.residual, of_attention, b.NH(), layers[0].attproj_b};
            kind("attention half", L, 4.0 * C * C, [&](int l) {
                decode_attention_half<Float>(with, of_attention, a.branch, x, layers[l], s.d.cache[l],
                                             s.d.positions, C, {});
            });
            kind("MLP half", L, 8.0 * C * C,
                 [&](int l) { decode_mlp_half<Float>(with, of_mlp, a.branch, y, layers[l], C); });
        }
        kind("logits", 1, 1.0 * Vp * C, [&](int) {
            linear(s.d.logits, a.residual, m.params.wte, nullptr, {m.params.lnf_w, m.params.lnf_b}, nullptr,
                   false, C, Vp);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// drawing tokens

// How many of a row's most likely tokens reach probability p together.
int tokens_to_reach(std::vector<Float> logits, double p) {
    std::vector<double> weights;
    for (const Float x : logits) weights.push_back(std::exp((double)(float)x));
    std::sort(weights.rbegin(), weights.rend());
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double sum = 0;
    for (size_t i = 0; i < weights.size(); i++)
        if ((sum += weights[i]) >= p * total) return (int)i + 1;
    return (int)weights.size();
}

void bench_sampling(DecodeBench& b, const std::vector<int>& batches) {
    const int V = b.model.config.vocab_size, Vp = b.model.config.padded_vocab_size;
    b.report.print(
        "\n## Drawing a token\n\n"
        "Zipf: probabilities fall as 1 / rank^1.5, about as a text's next token; flat: logits of a standard deviation "
        "of 0.5, as random weights make them, the most that top-p can have to do. Kept: tokens that top-p draws "
        "from.\n\n");
    Table table(b.report, {{"drawn", 24}, {"B", 3}, {"us", 8}, {"least", 8}, {"kept", 6}});
    nlohmann::ordered_json& rows = b.report.json["sampling"] = nlohmann::ordered_json::array();
    struct Case {
        const char* name;
        bool zipf;
        Sampling how;
    };
    const Case cases[] = {{"greedy, Zipf", true, kGreedy},
                          {"of all, Zipf", true, {}},
                          {"top-p 0.95, Zipf", true, {.top_p = 0.95f}},
                          {"top-p 0.95, flat", false, {.top_p = 0.95f}}};
    for (const int B : batches) {
        const DeviceArray<Float> logits((size_t)B * Vp);
        const DeviceArray<float> scratch(sampler_scratch(B, V));
        const DeviceArray<int> tokens(B), streams(B), positions(B);
        CUDA_CHECK(cudaMemset(streams, 0, B * sizeof(int)));
        CUDA_CHECK(cudaMemset(positions, 0, B * sizeof(int)));
        for (const Case& c : cases) {
            const std::string name = format("%s, B = %d", c.name, B);
            attempt(b, table, name, rows, kOnCpu ? 0.1 : 1, [&] {
                std::vector<Float> host((size_t)B * Vp, (Float)0.0f);
                for (int row = 0; row < B; row++)
                    for (int v = 0; v < V; v++) {
                        // 7919 is prime, and no vocabulary here a multiple of it: every rank occurs once
                        const int rank = 1 + (int)((int64_t)v * 7919 % V);
                        host[(size_t)row * Vp + v] = (Float)(float)(c.zipf ? -1.5 * std::log((double)rank)
                                                                           : 0.5 * random_normal(4, row, v));
                    }
                to_device<Float>(logits, host.data(), host.size());
                const Timing t = time_replays(b, [&] {
                    sample_tokens<Float>(b.ctx, tokens, logits, scratch, B, V, Vp, c.how, streams, positions);
                });
                const int kept =
                    c.how.top_p < 1.0f ? tokens_to_reach({host.begin(), host.begin() + V}, c.how.top_p) : 0;
                table.row({c.name, std::to_string(B), format("%.2f", 1e3 * t.ms),
                           format("%.2f", 1e3 * t.least_ms), kept > 0 ? std::to_string(kept) : ""});
                rows.push_back(
                    {{"name", c.name}, {"B", B}, {"ms", t.ms}, {"least_ms", t.least_ms}, {"runs", t.runs}});
                if (kept > 0) rows.back()["kept"] = kept;
            });
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// main

void run(const DecodeBenchConfig& config) {
    DecodeBench b;
    b.config = config;
    b.brief = kOnCpu || config.quick;
    b.budget = config.budget;
    b.ctx = make_context();
    b.ctx.tune_matmuls = false;  // as infer_gpt2cu
    if (config.serial) b.ctx.overlap_kernels = false;
    const std::vector<Shape> shapes = shapes_of(config);
    int longest = 16;
    std::vector<int> batches;
    for (const Shape& s : shapes) {
        longest = std::max(longest, s.T);
        if (std::find(batches.begin(), batches.end(), s.B) == batches.end()) batches.push_back(s.B);
        const int heads = size_config(config.size, s.T).num_heads;
        if ((int64_t)s.B * heads > 65535)
            fail("-b (--batch) is %d, and %d sequences of %d heads are the most", s.B, 65535 / heads, heads);
    }
    report_on(b, config.out, "decode_", "decoding, GPT-2 " + config.size, [&] {
        b.copy = measure_copy(b);
        make_model(b, longest);
        b.report.json["size"] = config.size;
        b.report.json["precision"] = kOnCpu ? "fp32" : "bf16";
        b.report.json["weight_bytes"] = b.weight_bytes;
        b.report.json["overlap_kernels"] = b.ctx.overlap_kernels;
        bench_decode_steps(b, shapes, batches);
        bench_kernels(b, batches);
        bench_sampling(b, batches);
    });
}

int main(int argc, char** argv) {
    return bench_main(argc, argv, decode_flags, run);
}
