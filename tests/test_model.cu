// The whole model: its gradients, tensor by tensor and with the regularizer, against the plain-loop
// reference; what must give the same bits; and what a training run relies on (initialization, clipping, bad
// numbers, overfitting).
#include <omp.h>
#define NO_MAIN
#include "../train_gpt2.cu"

#include "../llmc/json_file.h"
#include "check.h"
#include "errors.h"
#include "reference.h"
#include "small_model.h"
#include "temp_folder.h"

using bf16 = __nv_bfloat16;

static TrainConfig small_run(int B, int T, int topk, Reg reg) {
    TrainConfig c;
    c.B = B;
    c.T = T;
    c.topk = topk;
    c.reg = reg;
    c.tokens_per_update = B * T;
    c.layer_lambda = {0.5f, 1.0f, 2.0f};
    return c;
}

struct Batch {
    std::vector<int> x, y;
};
static Batch random_batch(int n, int V, uint64_t seed) {
    return {random_ints(n, V, seed), random_ints(n, V, seed + 1)};
}

template <class Float>
static GPT2<Float> model_with(const Context& ctx, const ModelSpec& spec, const std::vector<float>& params) {
    return create_model<Float>(ctx, spec, [&] { return params; });
}

template <class Float>
static std::vector<float> gradients(const Context& ctx, const GPT2<Float>& model, const Batch& batch,
                                    const TrainConfig& c, float lambda, float share = 1.0f, bool zero = true,
                                    StepStats* stats = nullptr) {
    if (zero) CUDA_CHECK(cudaMemset(model.grads_base, 0, model.num_params * sizeof(float)));
    reset_stats(ctx, model);
    micro_step(ctx, model, batch.x.data(), batch.y.data(), c, lambda, share, c.topk > 0 ? 1.0f : 0.0f);
    if (stats) *stats = to_host(ctx, model.acts.stats, 1)[0];
    return to_host(ctx, model.grads_base, model.num_params);
}

// Each tensor's relative error.
static void compare_tensors(const GPT2Config& config, const std::vector<float>& got,
                            const std::vector<double>& want, double bound) {
    for (const ParamTensor& p : gpt2_params(config)) {
        CAPTURE(p.name);
        const std::vector<float> g(got.begin() + p.offset, got.begin() + p.offset + p.size());
        const std::vector<double> w(want.begin() + p.offset, want.begin() + p.offset + p.size());
        CHECK(relative_error(g, w) < bound);
    }
}

TEST_CASE("fp32: loss, R, mass and every tensor's gradient") {
    const Context ctx = make_context();
    const int B = 2, T = 37;
    const std::vector<float> params = busy_params<float>(kSmall);
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 5);
    for (Reg reg : {Reg::tail, Reg::kl, Reg::entropy}) {
        GPT2<float> model = model_with<float>(ctx, {kSmall, B, T, 0, reg}, params);
        for (int k : {1, 4, 36, 37, 100}) {
            CAPTURE(k);
            const TrainConfig c = small_run(B, T, k, reg);
            StepStats stats;
            const auto got = gradients(ctx, model, batch, c, 3.0f, 1.0f, true, &stats);
            std::vector<double> want;
            const ref::Loss loss =
                ref::gpt2(kSmall, to_double(params), batch.x, batch.y, B, T, k, reg, {1.5, 3.0, 6.0}, &want);
            CHECK(stats.ce == doctest::Approx(loss.ce).epsilon(1e-6));
            CHECK(3.0 * stats.reg == doctest::Approx(loss.total - loss.ce).epsilon(1e-5));
            CHECK(stats.mass == doctest::Approx(loss.mass).epsilon(1e-6));
            compare_tensors(kSmall, got, want, 2e-5);
        }
    }
}

TEST_CASE("fp32: the regularizer's part alone, as the difference of two gradients") {
    // so that a wrong regularizer cannot hide behind a large cross-entropy gradient
    const Context ctx = make_context();
    const int B = 2, T = 33;
    const std::vector<float> params = busy_params<float>(kSmall);
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 6);
    for (Reg reg : {Reg::kl, Reg::entropy}) {
        CAPTURE(reg_name(reg));
        GPT2<float> model = model_with<float>(ctx, {kSmall, B, T, 0, reg}, params);
        const TrainConfig c = small_run(B, T, 5, reg);
        const float lambda = 100.0f;
        const auto with = gradients(ctx, model, batch, c, lambda),
                   without = gradients(ctx, model, batch, c, 0.0f);
        std::vector<double> want_with, want_without;
        ref::gpt2(kSmall, to_double(params), batch.x, batch.y, B, T, 5, reg, {50, 100, 200}, &want_with);
        ref::gpt2(kSmall, to_double(params), batch.x, batch.y, B, T, 5, reg, {0, 0, 0}, &want_without);
        for (const ParamTensor& p : gpt2_params(kSmall)) {
            if (p.name.starts_with("ln_f") || p.name.starts_with("h.2.mlp") ||
                p.name.starts_with("h.2.ln_2") || p.name.starts_with("h.2.attn.c_proj"))
                continue;  // behind the last attention: R does not depend on them
            CAPTURE(p.name);
            std::vector<double> got, want;
            for (size_t i = p.offset; i < p.offset + p.size(); i++) {
                got.push_back((double)with[i] - (double)without[i]);
                want.push_back(want_with[i] - want_without[i]);
            }
            CHECK(relative_error(got, want) < 1e-4);
        }
    }
}

TEST_CASE("bf16: gradients of the same bf16 weights, as good as the problem's conditioning allows") {
    // How much does a rounding error of bf16 (2^-9 relative, in every weight once) move each tensor's true
    // gradient? The model rounds about as often in its activations, forward and backward, three to four times
    // a layer each: the square root of some 10 independent roundings, so 4 times that movement, plus a
    // rounding of the result itself.
    const Context ctx = make_context();
    const int B = 2, T = 37;
    const std::vector<float> params = busy_params<bf16>(kSmall);
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 5);
    for (Reg reg : {Reg::kl, Reg::entropy}) {
        CAPTURE(reg_name(reg));
        GPT2<bf16> model = model_with<bf16>(ctx, {kSmall, B, T, 0, reg}, params);
        const TrainConfig c = small_run(B, T, 4, reg);
        StepStats stats;
        const auto got = gradients(ctx, model, batch, c, 3.0f, 1.0f, true, &stats);
        std::vector<double> want, moved_grads;
        const auto reference = [&](const std::vector<double>& w, std::vector<double>& grads) {
            return ref::gpt2(kSmall, w, batch.x, batch.y, B, T, 4, reg, {1.5, 3.0, 6.0}, &grads);
        };
        std::vector<double> moved = to_double(params);
        const ref::Loss loss = reference(moved, want);
        for (size_t i = 0; i < moved.size(); i++) moved[i] *= 1 + (2 * random_uniform(1, 2, i) - 1) / 512;
        const ref::Loss moved_loss = reference(moved, moved_grads);
        CHECK(std::fabs(stats.ce - loss.ce) < 4 * std::fabs(moved_loss.ce - loss.ce) + loss.ce / 256);
        CHECK(std::fabs(stats.mass - loss.mass) <
              4 * std::fabs(moved_loss.mass - loss.mass) + loss.mass / 256);
        for (const ParamTensor& p : gpt2_params(kSmall)) {
            CAPTURE(p.name);
            const std::vector<double> w(want.begin() + p.offset, want.begin() + p.offset + p.size());
            const std::vector<double> m(moved_grads.begin() + p.offset,
                                        moved_grads.begin() + p.offset + p.size());
            const std::vector<float> g(got.begin() + p.offset, got.begin() + p.offset + p.size());
            CHECK(relative_error(g, w) < 4 * relative_error(m, w) + 1.0 / 256);
        }
    }
}

TEST_CASE_TEMPLATE("recomputing activations: layers to the same bits, GELU to rounding", Float, float, bf16) {
    // With -r 1 GELU is taken of the stored, rounded activations; the matmul's epilogue takes it before they
    // are rounded.
    const Context ctx = make_context();
    const int B = 2, T = 40;
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 8);
    const TrainConfig c = small_run(B, T, 6, Reg::tail);
    std::vector<float> first;
    size_t bytes = SIZE_MAX;
    for (int recompute : {0, 1, 2}) {
        CAPTURE(recompute);
        GPT2<Float> model = model_with<Float>(ctx, {kSmall, B, T, recompute}, busy_params<Float>(kSmall));
        const auto grads = gradients(ctx, model, batch, c, 1.0f);
        if (recompute == 0) first = grads;
        if (recompute == 1)
            CHECK(relative_error(grads, to_double(first)) < tolerance<Float>());
        else
            CHECK(grads == first);
        const size_t now = model_bytes<Float>(ctx, {kSmall, B, T, recompute});
        CHECK(now < bytes);
        bytes = now;
    }
}

TEST_CASE_TEMPLATE("the same step twice gives the same bits", Float, float, bf16) {
    const Context ctx = make_context();
    const int B = 3, T = 40;
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 9);
    GPT2<Float> model = model_with<Float>(ctx, {kSmall, B, T}, busy_params<Float>(kSmall));
    const TrainConfig c = small_run(B, T, 6, Reg::kl);
    const auto a = gradients(ctx, model, batch, c, 1.0f), b = gradients(ctx, model, batch, c, 1.0f);
    CHECK(a == b);
}

TEST_CASE_TEMPLATE("replayed micro-steps give the bits of those that run as written", Float, float, bf16) {
    // Three updates in which lambda changes, then two that only measure the mass, in the first micro-step; in
    // between the model is used for something else. The other model forgets its recordings before each use.
    const Context ctx = make_context();
    const int B = 2, T = 24, micro_steps = 4;
    TrainConfig c = small_run(B, T, 5, Reg::kl);
    c.layer_lambda = {0.0f, 1.0f, 0.5f};  // and one layer is not regularized
    c.sample_tokens = 3;
    const float share = 1.0f / micro_steps;
    for (int recompute : {0, 2}) {
        CAPTURE(recompute);
        const std::vector<float> params = busy_params<Float>(kSmall);
        GPT2<Float> replayed = model_with<Float>(ctx, {kSmall, B, T, recompute}, params);
        GPT2<Float> plain = model_with<Float>(ctx, {kSmall, B, T, recompute}, params);
        int64_t t = 0;
        for (float lambda : {1e-4f, 0.5f, 2.0f, 0.0f, 0.0f}) {
            t++;
            for (GPT2<Float>* model : {&replayed, &plain}) {
                CUDA_CHECK(cudaMemset(model->grads_base, 0, model->num_params * sizeof(float)));
                reset_stats(ctx, *model);
                for (int i = 0; i < micro_steps; i++) {
                    const Batch batch = random_batch(B * T, kSmall.vocab_size, (uint64_t)(10 * t + i));
                    const float mass_share = lambda > 0 ? share : i == 0 ? 1.0f : 0.0f;
                    if (model == &plain) model->micro_steps->clear();
                    micro_step(ctx, *model, batch.x.data(), batch.y.data(), c, lambda, share, mass_share);
                }
            }
            CAPTURE(t);
            CHECK(same_bits(to_host(ctx, replayed.grads_base, replayed.num_params),
                            to_host(ctx, plain.grads_base, plain.num_params)));
            for (GPT2<Float>* model : {&replayed, &plain}) optimizer_step(ctx, *model, c, 1e-3f, t);
            CHECK(same_bits(to_host(ctx, replayed.acts.stats, 1), to_host(ctx, plain.acts.stats, 1)));
            CHECK(same_bits(to_host(ctx, replayed.master, replayed.num_params),
                            to_host(ctx, plain.master, plain.num_params)));
            CHECK(generate(ctx, replayed, {1, 2, 3}, c, t).size() == 3);
        }
        // regularized; at lambda = 0 measured and not
        CHECK(replayed.micro_steps->size() == 3);
        for (const auto& [kind, graph] : *replayed.micro_steps) CHECK(graph.recorded());
    }
}

TEST_CASE("a lambda that begins to rise is not replayed without its gradient, where all else is the same") {
    const Context ctx = make_context();
    const int B = 2, T = 24;
    const TrainConfig c = small_run(B, T, 5, Reg::tail);
    const std::vector<float> params = busy_params<float>(kSmall);
    GPT2<float> replayed = model_with<float>(ctx, {kSmall, B, T}, params);
    GPT2<float> plain = model_with<float>(ctx, {kSmall, B, T}, params);
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 15);
    for (float lambda : {0.0f, 0.0f, 0.0f, 2.0f, 2.0f, 2.0f, 0.0f}) {
        const auto got = gradients(ctx, replayed, batch, c, lambda);
        plain.micro_steps->clear();
        CHECK(same_bits(got, gradients(ctx, plain, batch, c, lambda)));
    }
}

TEST_CASE("the scratch that layers share has room for each of them") {
    // Many positions of few columns need the most for the embedding where there are few multiprocessors.
    Context ctx = make_context();
    const int B = 8, T = 1024;
    GPT2Config config = kSmall;
    config.max_seq_len = T;
    for (int num_sms : {1, 132}) {
        ctx.num_sms = num_sms;
        alignas(256) static char base[1];  // places are counted from here, and nothing is written
        Arena arena{.base = base, .used = 0};
        const Acts<float> a = lay_out_acts<float>(arena, ctx, {config, B, T});
        const auto room = (size_t)((char*)a.stats - (char*)a.scratch) / sizeof(float);
        CHECK(room >= column_sum_scratch(ctx, 4 * config.channels));
        CHECK(room >= encoder_backward_scratch(B * T, config.channels));
        CHECK(room >= (size_t)kGradNormBlocks);
        const auto attention = (size_t)((char*)a.scratch - (char*)a.att_scratch) / sizeof(float);
        CHECK(attention >= (size_t)B * T * 4 * config.channels);
        CHECK(attention >=
              attention_backward_scratch<float>(ctx, B, T, config.num_heads, config.head_size()));
    }
}

TEST_CASE("a recording that fails leaves the stream as it was, and what waits cannot be recorded") {
    const Context ctx = make_context();
    DeviceArray<float> x(std::vector<float>(4, 1.0f));
    const auto clear = [&] { CUDA_CHECK(cudaMemsetAsync((float*)x, 0, 4 * sizeof(float), ctx.stream)); };
    Graph graph;
    graph.run(ctx, clear);
    CHECK(x.get() == std::vector<float>(4, 0.0f));
    x.set(std::vector<float>(4, 1.0f));
    CHECK_THROWS_AS(graph.run(ctx, [&] { to_host(ctx, (float*)x, 4); }), Error);
    cudaGetLastError();
    CHECK_FALSE(graph.recorded());
    CHECK(x.get() == std::vector<float>(4, 1.0f));
    for (int i = 0; i < 3; i++) {  // recorded and launched, then only launched
        x.set(std::vector<float>(4, 1.0f));
        graph.run(ctx, clear);
        CHECK(graph.recorded());
        CHECK(x.get() == std::vector<float>(4, 0.0f));
    }
}

TEST_CASE_TEMPLATE("entropy: recomputed layers and replayed micro-steps give the same bits", Float, float,
                   bf16) {
    const Context ctx = make_context();
    const int B = 2, T = 40;
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 8);
    const TrainConfig c = small_run(B, T, 6, Reg::entropy);
    std::vector<float> first;
    for (int recompute : {0, 2}) {
        CAPTURE(recompute);
        GPT2<Float> model =
            model_with<Float>(ctx, {kSmall, B, T, recompute, Reg::entropy}, busy_params<Float>(kSmall));
        for (int i = 0; i < 3; i++) {  // as written, recorded, replayed
            const auto grads = gradients(ctx, model, batch, c, 1.0f);
            if (first.empty()) first = grads;
            CHECK(same_bits(grads, first));
        }
    }
}

TEST_CASE("measuring the mass at lambda = 0 changes no bit of plain GPT-2") {
    const Context ctx = make_context();
    const int B = 2, T = 40;
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 10);
    GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, busy_params<float>(kSmall));
    const auto off = gradients(ctx, model, batch, small_run(B, T, 0, Reg::tail), 0.0f);
    const auto measured = gradients(ctx, model, batch, small_run(B, T, 8, Reg::tail), 0.0f);
    CHECK(off == measured);
}

TEST_CASE("accumulated micro-steps are one large step") {
    const Context ctx = make_context();
    const int B = 2, T = 35;
    const Batch batch = random_batch(2 * B * T, kSmall.vocab_size, 11);
    const std::vector<float> params = busy_params<float>(kSmall);
    GPT2<float> large = model_with<float>(ctx, {kSmall, 2 * B, T}, params);
    const auto want = gradients(ctx, large, batch, small_run(2 * B, T, 4, Reg::kl), 2.0f);

    GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, params);
    const TrainConfig c = small_run(B, T, 4, Reg::kl);
    const int half = B * T;
    const Batch first{{batch.x.begin(), batch.x.begin() + half}, {batch.y.begin(), batch.y.begin() + half}};
    const Batch second{{batch.x.begin() + half, batch.x.end()}, {batch.y.begin() + half, batch.y.end()}};
    gradients(ctx, model, first, c, 2.0f, 0.5f);
    const auto got = gradients(ctx, model, second, c, 2.0f, 0.5f, false);
    compare_tensors(kSmall, got, to_double(want), 1e-5);
}

// A shard of random tokens: `windows` windows of T tokens, and one more for the last target.
static std::string random_shard(const TempFolder& folder, int windows, int T, uint64_t seed) {
    const std::string path = folder / "random.bin";
    const std::vector<int> drawn = random_ints(windows * T + 1, kSmall.vocab_size, seed);
    ShardWriter shard(path, (int64_t)drawn.size(), kSmall.vocab_size);
    shard.append(std::vector<uint16_t>(drawn.begin(), drawn.end()));
    shard.finish();
    return path;
}

// Two updates, as the training loop makes them, in micro-batches of B rows.
struct TwoUpdates {
    std::vector<float> before, first_m, first_v, first, m, v, second;  // parameters, moments
    StepStats first_stats, second_stats;
    TwoUpdates(const Context& ctx, int B, float lambda, float lr) {
        const TempFolder folder;
        const int T = 24, rows = 4;
        TrainConfig c = small_run(B, T, 4, Reg::tail);
        c.tokens_per_update = rows * T;
        c.clip = 0;
        c.weight_decay = 0.5f;
        GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, busy_params<float>(kSmall));
        DataLoader data(random_shard(folder, 3 * rows, T, 3), B, T, true, 5);
        const auto get = [&](const float* from) { return to_host(ctx, from, model.num_params); };
        before = get(model.master);
        train_step(ctx, model, data, c, lr, lambda, 0);
        first_stats = to_host(ctx, model.acts.stats, 1)[0];
        first = get(model.master), first_m = get(model.m), first_v = get(model.v);
        train_step(ctx, model, data, c, lr, lambda, 1);
        second_stats = to_host(ctx, model.acts.stats, 1)[0];
        second = get(model.master), m = get(model.m), v = get(model.v);
    }
};

TEST_CASE("an update's tokens give the same update in micro-batches of any size") {
    const Context ctx = make_context();
    const TwoUpdates want(ctx, 4, 2.0f, 1e-3f);
    for (int B : {1, 2}) {
        CAPTURE(B);
        const TwoUpdates got(ctx, B, 2.0f, 1e-3f);
        CHECK(relative_error(got.first_m, to_double(want.first_m)) < 1e-5);
        CHECK(relative_error(got.m, to_double(want.m)) < 1e-4);
        CHECK(relative_error(got.v, to_double(want.v)) < 1e-4);
        for (const auto& [a, b] :
             {std::pair(got.first_stats, want.first_stats), std::pair(got.second_stats, want.second_stats)}) {
            CHECK(a.ce == doctest::Approx(b.ce).epsilon(1e-5));
            CHECK(a.reg == doctest::Approx(b.reg).epsilon(1e-4));
            CHECK(a.mass == doctest::Approx(b.mass).epsilon(1e-4));
            CHECK(a.norm.norm == doctest::Approx(b.norm.norm).epsilon(1e-4));
        }
    }
    CHECK(want.first_stats.ce != doctest::Approx(want.second_stats.ce).epsilon(1e-5));  // other tokens
    // Plain GPT-2 measures its mass on an update's first micro-batch: here it is all of it, there a part.
    const TwoUpdates whole(ctx, 4, 0, 1e-3f), part(ctx, 1, 0, 1e-3f);
    CHECK(part.first_stats.ce == doctest::Approx(whole.first_stats.ce).epsilon(1e-5));
    CHECK(part.first_stats.mass == doctest::Approx(whole.first_stats.mass).epsilon(0.1));
    CHECK(part.first_stats.mass != doctest::Approx(whole.first_stats.mass).epsilon(1e-5));
}

TEST_CASE("an update is AdamW's, with the betas of GPT-3 and the correction of its number") {
    const Context ctx = make_context();
    const float lr = 1e-3f;
    const TwoUpdates u(ctx, 2, 2.0f, lr);
    std::vector<double> v, first, second;
    for (const ParamTensor& p : gpt2_params(kSmall))
        for (size_t i = p.offset; i < p.offset + p.size(); i++) {
            const double g = u.first_m[i] / 0.1, decay = p.is_vector ? 0.0 : 0.5;
            v.push_back(0.05 * g * g);
            const auto step = [&](double from, double m, double v, int t) {
                const double mean = m / (1 - std::pow(0.9, t)), square = v / (1 - std::pow(0.95, t));
                return -lr * (mean / (std::sqrt(square) + 1e-8) + decay * from);
            };
            first.push_back(step(u.before[i], u.first_m[i], u.first_v[i], 1));
            second.push_back(step(u.first[i], u.m[i], u.v[i], 2));
        }
    std::vector<float> moved_first, moved_second;
    for (size_t i = 0; i < u.before.size(); i++) {
        moved_first.push_back(u.first[i] - u.before[i]);
        moved_second.push_back(u.second[i] - u.first[i]);
    }
    CHECK(relative_error(u.first_v, v) < 1e-5);
    CHECK(relative_error(moved_first, first) < 1e-3);  // differences of floats near 1
    CHECK(relative_error(moved_second, second) < 1e-3);
}

TEST_CASE("reports, one update late, have the rates and the numbers of their own update") {
    const Context ctx = make_context();
    const TempFolder folder;
    TrainConfig c = small_run(1, 24, 4, Reg::tail);
    std::FILE* const nothing = fopen("/dev/null", "w");
    DeviceArray<StepStats> stats(1);
    {
        MetricsLog metrics(folder.path, "{}");
        Progress progress(3, 0, terminal_of(nothing));
        UpdateReports reports(0, c, kSmall, nullptr, metrics, progress);
        for (int t = 1; t <= 3; t++) {
            StepStats s{};
            s.ce = 10 * t, s.reg = 0.25, s.mass = 0.75, s.norm = {0.5 * t, 1.0f, 1};
            to_device<StepStats>(stats, &s, 1);
            reports.record(ctx, stats, 0.125f * (float)t, (float)t);
            reports.report_until(t - 1);
        }
        reports.report_until(3);
    }
    fclose(nothing);
    std::ifstream file(folder / "metrics.jsonl");
    std::string line;
    std::getline(file, line);
    for (int t = 1; t <= 3; t++) {
        CAPTURE(t);
        REQUIRE(std::getline(file, line));
        const nlohmann::json m = parse_json(line);
        CHECK(m["step"] == t);
        CHECK(m["ce"] == 10.0 * t);
        CHECK(m["loss"] == 10.0 * t + t * 0.25);
        CHECK(m["lambda"] == (double)t);
        CHECK(m["lr"] == 0.125 * t);
        CHECK(m["norm"] == 0.5 * t);
    }
    CHECK_FALSE(std::getline(file, line));
}

TEST_CASE("a sample: each token is drawn behind the last T, by a number of its own") {
    const Context ctx = make_context();
    const int T = 24, V = kSmall.vocab_size, Vp = kSmall.padded_vocab_size;
    const GPT2<float> model = model_with<float>(ctx, {kSmall, 1, T}, busy_params<float>(kSmall));
    TrainConfig c = small_run(1, T, 4, Reg::tail);
    c.sample_tokens = 40;
    c.seed = 7;
    const std::vector<uint16_t> prompt = {3, 1, 4, 1, 5};
    const std::vector<uint16_t> made = generate(ctx, model, prompt, c, 9);
    REQUIRE(made.size() == 40);
    std::vector<int> text(prompt.begin(), prompt.end());
    for (uint64_t i = 0; i < made.size(); i++) {
        const int n = std::min((int)text.size(), T);
        to_device(model.acts.inputs, text.data() + text.size() - n, n);
        forward(ctx, model, 1, n, 0);
        logits_forward(ctx, model, 0, n);
        const std::vector<float> logits = to_host(ctx, model.acts.logits, (size_t)n * Vp);
        CHECK(made[i] ==
              sample_token(logits.data() + (size_t)(n - 1) * Vp, V, 1.0f, random_uniform(7, ~9ull, i)));
        text.push_back(made[i]);
    }
    CHECK(generate(ctx, model, prompt, c, 10) != made);
}

TEST_CASE("--debug-state: lambda in full, its gradient, and thresholds between the k-th score and the next") {
    const Context ctx = make_context();
    const TempFolder folder;
    const int B = 2, T = 24, k = 4, C = kSmall.channels, NH = kSmall.num_heads, L = kSmall.num_layers;
    TrainConfig c = small_run(B, T, k, Reg::tail);
    c.lambda = 3.0f;
    c.lambda_warmup_updates = 100;
    c.debug_state = folder / "state.safetensors";
    GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, busy_params<float>(kSmall));
    DataLoader data(random_shard(folder, B + 1, T, 4), B, T, false, 0);
    write_first_step(ctx, model, data, c);

    const SafetensorsReader file(c.debug_state);
    const auto read = [&](const std::string& name) {
        std::vector<float> values(file.at(name).elements);
        file.read_f32(name, file.at(name).shape, values.data());
        return values;
    };
    const float ce = read("loss.ce")[0], reg = read("loss.reg")[0];
    CHECK(read("loss.total")[0] == doctest::Approx(ce + 3.0f * reg).epsilon(1e-6));
    const std::vector<float> mass = read("topk.mass"), threshold = read("topk.threshold");
    size_t at = 0;
    for (int l = 0; l < L; l++) {
        const std::vector<double> qkv =
            to_double(to_host(ctx, model.acts.layers[l].qkv, (size_t)B * T * 3 * C));
        for (int b = 0; b < B; b++)
            for (int h = 0; h < NH; h++)
                for (int i = 0; i < T; i++, at++) {
                    const ref::AttentionRow row =
                        ref::attention_row(qkv.data() + (size_t)b * T * 3 * C, i, h, C, C / NH, k);
                    CHECK(mass[at] == doctest::Approx(row.mass).epsilon(1e-5));
                    if (i < k) continue;
                    const double half = (row.kth + row.next) / 2, gap = row.kth - row.next;
                    CHECK(std::abs(threshold[at] - half) < 0.25 * gap + 1e-5);
                }
    }
    const Batch batch{{data.inputs(), data.inputs() + B * T}, {data.targets(), data.targets() + B * T}};
    const std::vector<float> want = gradients(ctx, model, batch, c, 3.0f);
    const std::vector<float> params = busy_params<float>(kSmall);
    for (const ParamTensor& p : gpt2_params(kSmall)) {
        CAPTURE(p.name);
        const auto on_disk = [&](const std::vector<float>& all) {  // without the padding, and transposed
            std::vector<double> part(p.size_on_disk());
            for (int r = 0; r < p.rows_on_disk; r++)
                for (int i = 0; i < p.cols; i++)
                    part[p.transposed ? (size_t)i * p.rows_on_disk + r : (size_t)r * p.cols + i] =
                        all[p.offset + (size_t)r * p.cols + i];
            return part;
        };
        CHECK(file.at("grad." + p.name).shape == p.shape_on_disk());
        CHECK(relative_error(read("grad." + p.name), on_disk(want)) < 1e-6);
        CHECK(to_double(read("param." + p.name)) == on_disk(params));
    }
    const auto tokens = [&](const char* name) {
        const SafeTensor& t = file.at(name);
        std::vector<int> values(t.elements);
        memcpy(values.data(), t.data, t.bytes);
        return values;
    };
    CHECK(tokens("x") == batch.x);
    CHECK(tokens("y") == batch.y);
    const ref::Loss loss =
        ref::gpt2(kSmall, to_double(params), batch.x, batch.y, B, T, k, Reg::tail, {1.5, 3.0, 6.0}, nullptr);
    CHECK(ce == doctest::Approx(loss.ce).epsilon(1e-6));
    std::vector<double> logits;  // without the padding
    for (int row = 0; row < B * T; row++)
        for (int v = 0; v < kSmall.vocab_size; v++)
            logits.push_back(loss.logits[(size_t)row * kSmall.padded_vocab_size + v]);
    CHECK(file.at("logits").shape == std::vector<int64_t>{B, T, kSmall.vocab_size});
    CHECK(relative_error(read("logits"), logits) < 1e-5);
    for (const auto& [name, value] :
         {std::pair("topk", "4"), std::pair("lambda", "3"), std::pair("reg", "tail"),
          std::pair("n_layer", "3"), std::pair("n_head", "2")})
        CHECK(file.metadata().at(name) == value);
}

TEST_CASE("a shorter batch than the activations have room for") {
    const Context ctx = make_context();
    const std::vector<float> params = busy_params<float>(kSmall);
    GPT2<float> model = model_with<float>(ctx, {kSmall, 4, 40}, params);
    const Batch batch = random_batch(7, kSmall.vocab_size, 12);
    const auto got = gradients(ctx, model, batch, small_run(1, 7, 3, Reg::tail), 1.0f);
    std::vector<double> want;
    ref::gpt2(kSmall, to_double(params), batch.x, batch.y, 1, 7, 3, Reg::tail, {0.5, 1.0, 2.0}, &want);
    compare_tensors(kSmall, got, want, 2e-5);
}

TEST_CASE("initialization: GPT-2's deviations, zero padding, the same numbers from any number of threads") {
    GPT2Config config{.max_seq_len = 64,
                      .vocab_size = 300,
                      .padded_vocab_size = 384,
                      .num_layers = 2,
                      .num_heads = 2,
                      .channels = 128};
    const std::vector<float> params = init_params(config, 42);
    omp_set_num_threads(1);
    CHECK(init_params(config, 42) == params);
    omp_set_num_threads(omp_get_num_procs());
    CHECK(init_params(config, 43) != params);
    for (const ParamTensor& p : gpt2_params(config)) {
        CAPTURE(p.name);
        double sum = 0, square = 0;
        for (size_t i = 0; i < p.size_on_disk(); i++) {
            sum += params[p.offset + i];
            square += (double)params[p.offset + i] * params[p.offset + i];
        }
        const double n = (double)p.size_on_disk(), mean = sum / n, std = sqrt(square / n - mean * mean);
        const double want = p.init == Init::normal     ? 0.02
                            : p.init == Init::residual ? 0.01
                                                       : 0.0;  // 0.02 / sqrt(4)
        CHECK(mean == doctest::Approx(p.init == Init::ones ? 1.0 : 0.0).epsilon(6 * (want + 1e-9) / sqrt(n)));
        CHECK(std::fabs(std - want) < 6 * (want + 1e-9) / sqrt(2 * n));
        for (size_t i = p.size_on_disk(); i < p.size(); i++) CHECK(params[p.offset + i] == 0.0f);
    }
}

TEST_CASE("a validation sees every window once, in micro-batches of any size") {
    const Context ctx = make_context();
    const TempFolder folder;
    const int T = 24, windows = 7;
    const std::vector<int> drawn = random_ints(windows * T + 5, kSmall.vocab_size, 3);
    {
        ShardWriter shard(folder / "val.bin", (int64_t)drawn.size(), kSmall.vocab_size);
        shard.append(std::vector<uint16_t>(drawn.begin(), drawn.end()));
        shard.finish();
    }
    const auto validation = [&](int B, int64_t batches) {
        TrainConfig c = small_run(B, T, 4, Reg::tail);
        c.val_batches = batches;
        c.layer_lambda = {1.0f, 1.0f, 1.0f};
        GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, busy_params<float>(kSmall));
        DataLoader data(folder / "val.bin", B, T, false, 0);
        return validate(ctx, model, data, c).value();
    };
    const Validation one_by_one = validation(1, windows), first = validation(1, 6);
    for (const auto& [B, batches, want] : {std::tuple(7, 20, one_by_one), std::tuple(3, 20, one_by_one),
                                           std::tuple(10, 1, one_by_one), std::tuple(3, 2, first)}) {
        CAPTURE(B);
        const Validation v = validation(B, batches);
        CHECK(v.ce == doctest::Approx(want.ce).epsilon(1e-6));
        CHECK(v.mass == doctest::Approx(want.mass).epsilon(1e-6));
        CHECK(v.mass_nosink == doctest::Approx(want.mass_nosink).epsilon(1e-6));
        CHECK(v.sink == doctest::Approx(want.sink).epsilon(1e-6));
        CHECK(v.self == doctest::Approx(want.self).epsilon(1e-6));
    }
    CHECK(one_by_one.ce != doctest::Approx(first.ce).epsilon(1e-6));
}

TEST_CASE("what a validation measures: the loss and the mass of the reference, and where rows look") {
    const Context ctx = make_context();
    const TempFolder folder;
    const int B = 3, T = 24, k = 4, C = kSmall.channels, NH = kSmall.num_heads, hs = C / NH;
    TrainConfig c = small_run(B, T, k, Reg::tail);
    c.layer_lambda = {1.0f, 1.0f, 1.0f};
    const std::vector<float> params = busy_params<float>(kSmall);
    GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, params);
    DataLoader data(random_shard(folder, B, T, 4), B, T, false, 0);
    const Validation got = validate(ctx, model, data, c).value();

    const std::vector<int> x(data.inputs(), data.inputs() + B * T), y(data.targets(), data.targets() + B * T);
    const ref::Loss loss = ref::gpt2(kSmall, to_double(params), x, y, B, T, k, Reg::tail, {1, 1, 1}, nullptr);
    CHECK(got.ce == doctest::Approx(loss.ce).epsilon(1e-6));
    CHECK(got.mass == doctest::Approx(loss.mass).epsilon(1e-6));

    double rows = 0, first = 0, self = 0, kept = 0, all = 0;  // the last two without position 0
    for (const LayerActs<float>& layer : model.acts.layers) {
        const std::vector<double> qkv = to_double(to_host(ctx, layer.qkv, (size_t)B * T * 3 * C));
        for (int b = 0; b < B; b++)
            for (int h = 0; h < NH; h++)
                for (int i = k; i < T; i++) {
                    const ref::AttentionRow row =
                        ref::attention_row(qkv.data() + (size_t)b * T * 3 * C, i, h, C, hs, k);
                    rows++;
                    first += row.p[0];
                    self += row.p[i];
                    kept += row.mass - row.member[0] * row.p[0];
                    all += 1 - row.p[0];
                }
    }
    CHECK(got.sink == doctest::Approx(first / rows).epsilon(1e-5));
    CHECK(got.self == doctest::Approx(self / rows).epsilon(1e-5));
    CHECK(got.mass_nosink == doctest::Approx(kept / all).epsilon(1e-5));
}

TEST_CASE(
    "tokens of an update on a GPU, where -d does not say: whole micro-batches, of many rows if possible") {
    for (int T : {1, 96, 256, 300, 384, 768, 1000, 1024, 1536, 2048, 4096, 5000, 32768, 65536}) {
        CAPTURE(T);
        const int64_t open = default_update_tokens(-1, T), rows = open / T;
        CHECK(open % T == 0);
        CHECK(open >= 65536);
        CHECK(open < 65536 + 64 * T);
        int B = 64;  // the largest that choose_batch() tries, which divides the update
        while (rows % B != 0) B /= 2;
        CHECK((B == 64 || 4 * B > rows));
        for (int given : {1, 5, 12, 64, 100}) {
            const int64_t tokens = default_update_tokens(given, T);
            CHECK(tokens % ((int64_t)given * T) == 0);
            CHECK(tokens >= 65536);
            CHECK(tokens < 65536 + ((int64_t)given + 1) * T);
        }
    }
    CHECK(default_update_tokens(-1, 1024) == 65536);
    CHECK(default_update_tokens(-1, 384) == 192 * 384);
    CHECK(default_update_tokens(12, 1024) == 72 * 1024);
}

TEST_CASE(
    "updates on a GPU, where -x does not say: 500, but no more than 20 readings of the data, at least 100") {
    CHECK(default_updates(1'000'000'000, 65536) == 500);
    CHECK(default_updates(25 * 65536, 65536) == 500);
    CHECK(default_updates(24 * 65536, 65536) == 480);
    CHECK(default_updates(304'222, 65536) == 100);  // tinyshakespeare
    CHECK(default_updates(304'222, 16384) == 371);
    CHECK(default_updates(1, int64_t{1} << 32) == 100);
}

TEST_CASE("GPT-2's sizes") {
    const std::pair<const char*, size_t> sizes[] = {
        {"d12", 124439808}, {"d24", 354823168}, {"d36", 774030080}, {"d48", 1557611200}};
    for (const auto& [name, count] : sizes) {
        GPT2Config config;
        REQUIRE(preset_config(name, config));
        size_t n = 0;
        for (const ParamTensor& p : gpt2_params(config)) n += p.size_on_disk();
        CHECK(n == count);
    }
    GPT2Config config;
    for (int depth = 6; depth <= 48; depth++) {
        REQUIRE(preset_config("d" + std::to_string(depth), config));
        CHECK(config_problem(config) == "");
    }
    for (const auto& [name, heads] : {std::pair("d6", 6), std::pair("d9", 9), std::pair("d14", 13),
                                      std::pair("d18", 14), std::pair("d47", 25)}) {
        preset_config(name, config);
        CHECK(config.num_heads == heads);  // to the nearest: 12 + 4 * 2 / 12 for d14
    }
    CHECK_THROWS_AS(preset_config("d5", config), Error);
    CHECK_THROWS_AS(preset_config("d49", config), Error);
    CHECK_FALSE(preset_config("d", config));
    CHECK_FALSE(preset_config("d12x", config));
    CHECK_FALSE(preset_config("gpt2", config));
}

TEST_CASE("a gradient that is not finite stops the update, names the tensor and leaves the weights") {
    const Context ctx = make_context();
    GPT2<float> model = model_with<float>(ctx, {kSmall, 1, 8}, busy_params<float>(kSmall));
    const TrainConfig c = small_run(1, 8, 4, Reg::tail);
    gradients(ctx, model, random_batch(8, kSmall.vocab_size, 1), c, 1.0f);
    const auto before = to_host(ctx, model.master, model.num_params);
    const float bad = NAN;
    to_device(model.grads.layers[1].fc_b + 5, &bad, 1);
    reset_stats(ctx, model);
    optimizer_step(ctx, model, c, 1e-3f, 17);
    check_mentions(error_of([&] { check_stats(to_host(ctx, model.acts.stats, 1)[0], kSmall, 17); }),
                   "update 17: grad.h.1.mlp.c_fc.bias");
    CHECK(to_host(ctx, model.master, model.num_params) == before);
    // of several, the first; and losses before gradients
    to_device(model.grads.layers[0].ln1_b + 2, &bad, 1);
    reset_stats(ctx, model);
    optimizer_step(ctx, model, c, 1e-3f, 18);
    StepStats stats = to_host(ctx, model.acts.stats, 1)[0];
    const auto message = [&] { return error_of([&] { check_stats(stats, kSmall, 18); }); };
    check_mentions(message(), "grad.h.0.ln_1.bias");
    stats.ce = INFINITY;
    check_mentions(message(), "loss.ce");
    for (const auto measured : {&StepStats::reg, &StepStats::mass}) {
        stats = StepStats();
        stats.norm = {1.0, 1.0f, 1};
        stats.*measured = NAN;
        check_mentions(message(), "loss.reg");
    }
    stats = StepStats();
    stats.norm = {INFINITY, 1.0f, 0};  // of gradients that are finite
    check_mentions(message(), "the gradient norm");
    stats = StepStats();
    stats.norm = {1.0, 1.0f, 1};
    CHECK(message() == "");
}

TEST_CASE("clipping scales the gradient to the norm that is asked for, and decay touches matrices only") {
    const Context ctx = make_context();
    const std::vector<float> params = busy_params<float>(kSmall);
    const Batch batch = random_batch(16, kSmall.vocab_size, 2);
    // AdamW's first step is lr * sign(g) whatever the gradient's scale: look at the first moment instead
    for (float clip : {0.0f, 0.01f}) {
        GPT2<float> model = model_with<float>(ctx, {kSmall, 1, 16}, params);
        TrainConfig c = small_run(1, 16, 4, Reg::tail);
        c.clip = clip;
        const auto grads = gradients(ctx, model, batch, c, 1.0f);
        double norm = 0;
        for (float g : grads) norm += (double)g * g;
        norm = sqrt(norm);
        optimizer_step(ctx, model, c, 1e-3f, 1);
        CHECK(to_host(ctx, model.acts.stats, 1)[0].norm.norm == doctest::Approx(norm).epsilon(1e-5));
        std::vector<double> want;
        for (float g : grads) want.push_back(0.1 * g * (clip > 0 ? clip / norm : 1.0));
        CHECK(relative_error(to_host(ctx, model.m, model.num_params), want) < 1e-5);
    }
    GPT2<float> model = model_with<float>(ctx, {kSmall, 1, 16}, params);
    TrainConfig c = small_run(1, 16, 4, Reg::tail);
    c.weight_decay = 0.5f;
    CUDA_CHECK(cudaMemset(model.grads_base, 0, model.num_params * sizeof(float)));
    optimizer_step(ctx, model, c, 0.1f, 1);  // no gradient: what moves is the decay
    const auto after = to_host(ctx, model.master, model.num_params);
    for (const ParamTensor& p : gpt2_params(kSmall))
        for (size_t i = p.offset; i < p.offset + p.size(); i++)
            CHECK(after[i] == doctest::Approx(p.is_vector ? params[i] : params[i] * 0.95).epsilon(1e-6));
}

TEST_CASE("one batch is learned by heart, and its attention condenses") {
    const Context ctx = make_context();
    const int B = 2, T = 24;
    GPT2<float> model = model_with<float>(ctx, {kSmall, B, T}, init_params(kSmall, 1));
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 20);
    TrainConfig c = small_run(B, T, 4, Reg::tail);
    c.layer_lambda = {1, 1, 1};
    double ce = 0, mass = 0;
    for (int t = 1; t <= 200; t++) {
        StepStats stats;
        gradients(ctx, model, batch, c, 0.3f, 1.0f, true, &stats);
        optimizer_step(ctx, model, c, 3e-3f, t);
        ce = stats.ce;
        mass = stats.mass;
    }
    CHECK(ce < 0.05);
    CHECK(mass > 0.9);
}

// What rounding the linear layers' operands to 8 bits may change is judged as bf16's rounding is above: by
// what weights do that are off by as much as half a place of E4M3, 1 / 16.
TEST_CASE("in 8 bits: the loss, and gradients within the rounding of their operands") {
    const Context ctx = make_context();
    const int B = 2, T = 40;
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 21);
    const TrainConfig c = small_run(B, T, 4, Reg::tail);
    const std::vector<float> params = busy_params<bf16>(kSmall);
    GPT2<bf16> model = model_with<bf16>(ctx, {kSmall, B, T, 0, Reg::tail, true}, params);
    GPT2<bf16> plain = model_with<bf16>(ctx, {kSmall, B, T}, params);
    StepStats stats;
    std::vector<float> got;
    for (int i = 0; i < 4; i++) {  // eagerly, then recorded and replayed: the same bits
        const auto now = gradients(ctx, model, batch, c, 3.0f, 1.0f, true, &stats);
        if (i == 0) got = now;
        CHECK(now == got);
    }
    std::vector<double> want, moved_grads, moved = to_double(params);
    const auto reference = [&](const std::vector<double>& w, std::vector<double>& grads) {
        return ref::gpt2(kSmall, w, batch.x, batch.y, B, T, 4, Reg::tail, {1.5, 3.0, 6.0}, &grads);
    };
    const ref::Loss loss = reference(moved, want);
    for (const ParamTensor& p : gpt2_params(kSmall))
        for (size_t i = p.offset; !p.is_vector && i < p.offset + p.size(); i++)
            moved[i] *= 1 + (2 * random_uniform(1, 2, i) - 1) / 16;
    const ref::Loss moved_loss = reference(moved, moved_grads);
    CHECK(std::fabs(stats.ce - loss.ce) < 4 * std::fabs(moved_loss.ce - loss.ce) + loss.ce / 32);
    const std::vector<float> in_bf16 = gradients(ctx, plain, batch, c, 3.0f);
    for (const ParamTensor& p : gpt2_params(kSmall)) {
        CAPTURE(p.name);
        const auto part = [&](const auto& all) {
            return std::vector(all.begin() + p.offset, all.begin() + p.offset + p.size());
        };
        const double error = relative_error(part(got), part(want));
        CHECK(error < 2 * relative_error(part(moved_grads), part(want)) + 1.0 / 16);
        CHECK(error > relative_error(part(in_bf16), part(want)));  // it is 8 bits that were multiplied
    }
}

TEST_CASE("in 8 bits: each linear layer has scales of its own, from its own operands, forward and backward") {
    const Context ctx = make_context();
    const int B = 2, T = 40, BT = B * T, C = kSmall.channels, L = kSmall.num_layers;
    const Batch batch = random_batch(BT, kSmall.vocab_size, 21);
    const TrainConfig c = small_run(B, T, 4, Reg::tail);
    GPT2<bf16> model = model_with<bf16>(ctx, {kSmall, B, T, 0, Reg::tail, true}, busy_params<bf16>(kSmall));
    const auto grads = gradients(ctx, model, batch, c, 3.0f);
    for (int recompute : {1, 2}) {
        GPT2<bf16> again =
            model_with<bf16>(ctx, {kSmall, B, T, recompute, Reg::tail, true}, busy_params<bf16>(kSmall));
        CHECK(same_bits(gradients(ctx, again, batch, c, 3.0f), grads));
    }
    const auto largest = [&](const bf16* x, size_t n) {
        float most = 0;
        for (const bf16 value : to_host(ctx, x, n)) most = std::max(most, std::fabs((float)value));
        return most;
    };
    for (int l = 0; l < L; l++) {
        const LayerParams<bf16>& p = model.params.layers[l];
        const LayerActs<bf16>& a = model.acts.layers[l];
        const LayerParams<float>& g = model.grads.layers[l];
        const struct {
            LinearLayer which;
            const bf16 *weight, *inp;
            float* grad;
            size_t weights, inputs;
        } layers[] = {{kQkv, p.qkv_w, a.ln1, g.qkv_w, (size_t)3 * C * C, (size_t)BT * C},
                      {kAttproj, p.attproj_w, a.att, g.attproj_w, (size_t)C * C, (size_t)BT * C},
                      {kFc, p.fc_w, a.ln2, g.fc_w, (size_t)4 * C * C, (size_t)BT * C},
                      {kFcproj, p.fcproj_w, a.fch_gelu, g.fcproj_w, (size_t)4 * C * C, (size_t)BT * 4 * C}};
        for (const auto& layer : layers) {
            CAPTURE(l);
            CAPTURE(layer.which);
            const Fp8Buffers f = model.acts.fp8_of(l, layer.which);
            const auto most = [&](const Fp8Scale* scale) {
                return std::bit_cast<float>(to_host(ctx, scale, 1)[0].max_bits);
            };
            CHECK(most(f.weight_scale()) == largest(layer.weight, layer.weights));
            CHECK(most(f.inp_scale()) == largest(layer.inp, layer.inputs));
            // The backward's products take these: without one there is no gradient of this weight, and there
            // is one with it.
            const Fp8Scale right = to_host(ctx, f.inp_scale(), 1)[0];
            for (const unsigned max_bits : {std::bit_cast<unsigned>(INFINITY), right.max_bits}) {
                const Fp8Scale scale{right.inverse, max_bits};
                to_device(f.inp_scale(), &scale, 1);
                CUDA_CHECK(cudaMemset(model.grads_base, 0, model.num_params * sizeof(float)));
                backward(ctx, model, B, T, c.topk, {true, true, true});
                const std::vector<float> got = to_host(ctx, layer.grad, layer.weights);
                CHECK(std::isfinite(got[0]) == (max_bits == right.max_bits));
            }
        }
    }
    CHECK(same_bits(to_host(ctx, model.grads_base, model.num_params), grads));
}

TEST_CASE("in 8 bits, too, one batch is learned by heart, and its attention condenses") {
    const Context ctx = make_context();
    const int B = 2, T = 24;
    GPT2<bf16> model = model_with<bf16>(ctx, {kSmall, B, T, 1, Reg::tail, true}, init_params(kSmall, 1));
    const Batch batch = random_batch(B * T, kSmall.vocab_size, 20);
    TrainConfig c = small_run(B, T, 4, Reg::tail);
    c.layer_lambda = {1, 1, 1};
    StepStats stats;
    for (int t = 1; t <= 120; t++) {
        gradients(ctx, model, batch, c, 0.3f, 1.0f, true, &stats);
        optimizer_step(ctx, model, c, 3e-3f, t);
    }
    CHECK(stats.ce < 0.05);
    CHECK(stats.mass > 0.9);
}

TEST_CASE("GPT-2 124M trains in bf16 with 64 x 1024 tokens a micro-step in less than 40 GB") {
    const Context ctx = make_context();
    GPT2Config config;
    preset_config("d12", config);
    const size_t bytes = model_bytes<bf16>(ctx, {config, 64, 1024});
    CHECK(bytes < size_t{40'000'000'000});
    // entropy's number a row has room only where it is the regularizer, and is a small part
    const size_t with_entropy = model_bytes<bf16>(ctx, {config, 64, 1024, 0, Reg::entropy});
    CHECK(with_entropy > bytes);
    CHECK((double)with_entropy < 1.005 * (double)bytes);
}

TEST_CASE(
    "what the flags leave open: a learning rate for the model's width, and for weights that are trained") {
    const Context ctx = make_context();
    const auto defaults = [&](const char* preset, bool from_scratch) {
        GPT2Config config;
        REQUIRE(preset_config(preset, config));
        TrainConfig c;
        c.from = preset;
        c.B = 2;
        resolve_defaults<float>(c, config, from_scratch, 1'000'000, ctx);
        return c;
    };
    CHECK(defaults("tiny", true).lr == 2e-3f);
    CHECK(defaults("d6", true).lr == 6e-4f);
    CHECK(defaults("d12", true).lr == 6e-4f);
    CHECK(defaults("tiny", false).lr == 5e-5f);
    CHECK(defaults("d12", false).lr == 5e-5f);
    CHECK(defaults("d12", true).T == 1024);
    CHECK(defaults("tiny", true).T == 128);
    const TrainConfig c = defaults("tiny", true);
    const auto share = [&](double percent) { return std::llround(percent / 100 * (double)c.updates); };
    CHECK(c.warmup_updates == share(5));
    CHECK(c.lambda_start_updates == 0);
    CHECK(c.lambda_warmup_updates == share(70));
    CHECK(c.layer_lambda == std::vector<float>(4, 1.0f));
}

TEST_CASE("settings that do not go together are refused, in a sentence that names the flag to change") {
    Context ctx = make_context();
    ctx.max_shared = 99 << 10;  // scores of 24,832 positions beside 2 KB
    GPT2Config config = kSmall;
    config.max_seq_len = 1 << 20;
    const auto refusal = [&](auto change) {
        TrainConfig c = small_run(2, 24, 4, Reg::tail);
        CHECK_NOTHROW(check_settings_fit(c, config, ctx));
        change(c);
        return error_of([&] { check_settings_fit(c, config, ctx); });
    };
    const auto resize = [](TrainConfig& c, int B, int T) {
        c.B = B;
        c.T = T;
        c.tokens_per_update = (int64_t)B * T;
    };
    check_mentions(refusal([&](TrainConfig& c) { resize(c, 1, 24833); }), "-t 24832");
    CHECK_NOTHROW([&] {
        TrainConfig c = small_run(1, 24832, 4, Reg::tail);
        check_settings_fit(c, config, ctx);
        resize(c, 1, 24833);
        c.topk = 0;  // plain attention has no such limit
        c.lambda = 0;
        check_settings_fit(c, config, ctx);
    }());
    const int heads = kMaxGridY / config.num_heads;
    check_mentions(refusal([&](TrainConfig& c) { resize(c, heads + 1, 1); }), "-b (--batch)");
    check_mentions(refusal([&](TrainConfig& c) { resize(c, heads, 2048); }),
                   "lower -b (" + std::to_string(heads) + ") or -t (2048)");
    check_mentions(refusal([&](TrainConfig& c) { c.tokens_per_update = 47; }),
                   "multiple of -b times -t (2 * 24 = 48)");
    check_mentions(refusal([&](TrainConfig& c) {
                       c.lambda_start_updates = 7;
                       c.lambda_warmup_updates = 6;
                   }),
                   "--lambda-start (update 7)");
    check_mentions(refusal([&](TrainConfig& c) {
                       c.lambda = 0;
                       c.target_loss.path = "run";
                   }),
                   "give an -l greater than 0");
    check_mentions(refusal([&](TrainConfig& c) { c.topk = 0; }), "-k 0 measures nothing");
    check_mentions(refusal([&](TrainConfig& c) {
                       c.precision = Precision::fp8;
                       resize(c, 1, 24);
                   }),
                   "--precision fp8");
}

TEST_CASE("a model that cannot fit says how much it needs and what to lower") {
    const Context ctx = make_context();
    GPT2Config config;
    preset_config("d48", config);
    bool drawn = false;
    const auto weights = [&] {
        drawn = true;
        return init_params(config, 1);
    };
    const std::string message = error_of([&] { create_model<float>(ctx, {config, 4096, 1024}, weights); });
    check_mentions(message, "TB");
    check_mentions(message, "-b (4096)");
    CHECK(!drawn);  // which would have taken long
}
