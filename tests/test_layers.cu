// Every layer but attention and the linear one, forward and backward, against the plain loops of reference.h:
// in fp32 and bf16, with a row shared by a warp and by one thread, at sizes that fit no tile.
#include <algorithm>
#include <array>
#include "../llmc/adamw.cuh"
#include "../llmc/classifier.cuh"
#include "../llmc/encoder.cuh"
#include "../llmc/gelu.cuh"
#include "../llmc/grad_norm.cuh"
#include "../llmc/layernorm.cuh"
#include "../llmc/step_stats.cuh"

#include "check.h"
#include "reference.h"

using bf16 = __nv_bfloat16;

// Tokens of which `counts[v]` are v, in an order that looks random.
static std::vector<int> tokens_of_counts(const std::vector<int>& counts) {
    std::vector<int> tokens;
    for (size_t v = 0; v < counts.size(); v++) tokens.insert(tokens.end(), counts[v], (int)v);
    std::shuffle(tokens.begin(), tokens.end(), std::mt19937_64(7));
    return tokens;
}

// Counts around the limits of one and two segments, and one that takes several; 778 in all.
static const std::vector<int> kAwkwardCounts = {1,
                                                0,
                                                kSegmentPositions - 1,
                                                kSegmentPositions,
                                                kSegmentPositions + 1,
                                                2 * kSegmentPositions,
                                                0,
                                                2 * kSegmentPositions + 1,
                                                5 * kSegmentPositions - 3,
                                                1};

TEST_CASE_TEMPLATE("encoder", Float, float, bf16) {
    struct Case {
        int B, T, C, V;
        std::vector<int> tokens;
    };
    auto random_case = [](int B, int T, int C, int V) { return Case{B, T, C, V, random_ints(B * T, V, 1)}; };
    const auto awkward = tokens_of_counts(kAwkwardCounts);
    const int n = (int)awkward.size(), V_awkward = (int)kAwkwardCounts.size();
    for (const Context& ctx : both_lane_counts())
        for (const auto& [B, T, C, V, tokens] :
             {random_case(1, 1, 8, 3), random_case(2, 5, 24, 7), random_case(3, 33, 768, 300),
              random_case(2, 3, 2568, 5),  // more channels than a block has threads for
              Case{1, n, 24, V_awkward, awkward}, Case{2, n / 2, 136, V_awkward, awkward}}) {
            CAPTURE(ctx.row_lanes);
            CAPTURE(T);
            CAPTURE(C);
            const int rows = B * T;
            REQUIRE(rows == (int)tokens.size());
            const auto wte = normal_values<Float>(V * C, 2), wpe = normal_values<Float>((T + 3) * C, 3);
            const auto dout = normal_values<Float>(rows * C, 4);
            DeviceArray<int> d_tokens(tokens);
            DeviceArray<Float> d_wte(wte), d_wpe(wpe), out(rows * C), d_dout(dout);
            encoder_forward<Float>(ctx, out, d_tokens, d_wte, d_wpe, B, T, C);
            CHECK(relative_error(out.get(), ref::encoder_forward(tokens, to_double(wte), to_double(wpe), B, T,
                                                                 C)) < tolerance<Float>());

            const auto start_wte = normal_values<float>(V * C, 5),
                       start_wpe = normal_values<float>((T + 3) * C, 6);
            std::vector<double> want_wte = to_double(start_wte), want_wpe = to_double(start_wpe);
            ref::encoder_backward(want_wte.data(), want_wpe.data(), to_double(dout), tokens, B, T, C);
            DeviceArray<int> plan(plan_tokens(tokens.data(), rows, V));
            DeviceArray<float> scratch(encoder_backward_scratch(rows, C));
            std::vector<float> first;
            for (int repeat = 0; repeat < 2; repeat++) {
                DeviceArray<float> dwte(start_wte), dwpe(start_wpe);
                encoder_backward<Float>(ctx, dwte, dwpe, scratch, d_dout, plan, B, T, C);
                CHECK(relative_error(dwte.get(), want_wte) < tolerance<float>());
                CHECK(relative_error(dwpe.get(), want_wpe) < tolerance<float>());
                if (repeat) CHECK(same_bits(dwte.get(), first));
                first = dwte.get();
            }
        }
}

TEST_CASE("token plan: every position once, by token, then by position; long tokens in segments") {
    const auto awkward = tokens_of_counts(kAwkwardCounts);
    for (const auto& [tokens, V] :
         {std::pair{random_ints(500, 17, 3), 50}, std::pair{std::vector<int>(1, 4), 5},
          std::pair{std::vector<int>(300, 2), 3}, std::pair{awkward, (int)kAwkwardCounts.size()}}) {
        const int n = (int)tokens.size();
        CAPTURE(n);
        const std::vector<int> plan = plan_tokens(tokens.data(), n, V);
        const int num_segments = plan[0], num_long = plan[1];
        const int* order = plan.data() + TokenPlan::kHeader;
        const int* segment = plan.data() + TokenPlan::segments_begin(n);
        const int* long_token = segment + 4 * num_segments;
        CHECK(TokenPlan::segments_begin(n) % 4 == 0);
        REQUIRE(plan.size() == TokenPlan::segments_begin(n) + 4 * (num_segments + num_long));
        CHECK(plan.size() <= TokenPlan::most_ints(n, V));
        CHECK((size_t)num_long <= TokenPlan::most_long_tokens(n));

        std::vector<int> seen(n, 0);
        int begin = 0, slots = 0, longs = 0;
        for (int s = 0; s < num_segments; s++, segment += 4) {
            CHECK(segment[0] == begin);
            begin = segment[1];
            CHECK(begin > segment[0]);
            CHECK(begin - segment[0] <= kSegmentPositions);
            for (int i = segment[0]; i < begin; i++) {
                CHECK(tokens[order[i]] == segment[2]);
                if (i > 0)
                    CHECK(std::pair(tokens[order[i - 1]], order[i - 1]) < std::pair(segment[2], order[i]));
                seen[order[i]]++;
            }
            if (std::count(tokens.begin(), tokens.end(), segment[2]) <= kSegmentPositions) {
                CHECK(segment[3] == kNoSlot);
                continue;
            }
            CHECK(segment[3] == slots++);
            if (s > 0 && segment[2] == segment[-2]) continue;
            REQUIRE(longs < num_long);  // the first segment of a long token
            CHECK(long_token[4 * longs] == segment[2]);
            CHECK(long_token[4 * longs + 1] == segment[3]);
            const int count = (int)std::count(tokens.begin(), tokens.end(), segment[2]);
            CHECK(long_token[4 * longs++ + 2] == ceil_div(count, kSegmentPositions));
        }
        CHECK(begin == n);
        CHECK(longs == num_long);
        CHECK((size_t)slots <= TokenPlan::most_slots(n));
        CHECK(std::count(seen.begin(), seen.end(), 1) == n);
    }
}

TEST_CASE("sums of partial results") {
    for (const Context& ctx : both_lane_counts())
        for (int count : {1, 7, 8, 33, 264})
            for (int n : {4, 31, 33, 300}) {
                CAPTURE(count);
                CAPTURE(n);
                const auto start = normal_values<float>(n, 1), partial = normal_values<float>(count * n, 2);
                auto want = to_double(start);
                for (int i = 0; i < count * n; i++) want[i % n] += partial[i];
                DeviceArray<float> out(start), d_partial(partial);
                add_partial_sums(ctx, out, d_partial, count, n);
                CHECK(relative_error(out.get(), want) < tolerance<float>());
            }
}

TEST_CASE_TEMPLATE("layernorm, with and without the residual", Float, float, bf16) {
    std::vector<Context> contexts = both_lane_counts();
    contexts.push_back(contexts[0]);
    contexts.back().max_shared = 99 << 10;  // as GPUs of compute capability 8.6 and 8.9 have it: fewer warps
    for (const Context& ctx : contexts)
        for (auto [rows, C] : std::initializer_list<std::array<int, 2>>{{1, 8},
                                                                        {5, 24},
                                                                        {130, 128},
                                                                        {67, 768},
                                                                        {33, 776},
                                                                        {25, 1024},
                                                                        {40, 1280},
                                                                        {50, 1600},
                                                                        {3, 1608},
                                                                        {50, 2048}}) {
            if (kFewer && C > 768 && C < 1600) continue;
            CAPTURE(ctx.row_lanes);
            CAPTURE(ctx.max_shared);
            CAPTURE(C);
            // a mean far from zero: a variance computed as E[x^2] - E[x]^2 would lose its digits
            const auto inp = normal_values<Float>(rows * C, 1, 1.0, 3.0),
                       res = normal_values<Float>(rows * C, 2);
            const auto w = normal_values<Float>(C, 3), b = normal_values<Float>(C, 4);
            DeviceArray<Float> d_inp(inp), d_res(res), d_w(w), d_b(b), out(rows * C), sum(rows * C);
            DeviceArray<float> mean(rows), rstd(rows);
            const auto w64 = to_double(w), b64 = to_double(b);

            layernorm_forward<Float>(ctx, out, mean, rstd, nullptr, nullptr, d_inp, d_w, d_b, rows, C);
            CHECK(relative_error(out.get(), ref::layernorm_forward(to_double(inp), w64.data(), b64.data(),
                                                                   rows, C)) < tolerance<Float>());

            layernorm_forward<Float>(ctx, out, mean, rstd, sum, d_res, d_inp, d_w, d_b, rows, C);
            std::vector<Float> want_sum(rows * C);
            for (int i = 0; i < rows * C; i++) want_sum[i] = (Float)((float)res[i] + (float)inp[i]);
            CHECK(largest_error(sum.get(), to_double(want_sum)) == 0.0);
            CHECK(relative_error(out.get(), ref::layernorm_forward(to_double(want_sum), w64.data(),
                                                                   b64.data(), rows, C)) <
                  tolerance<Float>());

            const auto dout = normal_values<Float>(rows * C, 5);
            const auto start_params = normal_values<float>(2 * C, 7), start_rows = normal_values<float>(C, 8);
            DeviceArray<Float> d_dout(dout);
            std::vector<float> first;
            for (auto [add, row_sum] : {std::pair(true, true), std::pair(false, true), std::pair(true, false),
                                        std::pair(true, true)}) {
                CAPTURE(add);
                CAPTURE(row_sum);
                const auto start = normal_values<Float>(rows * C, 6);
                auto want = add ? to_double(start) : std::vector<double>(rows * C, 0.0);
                auto want_params = to_double(start_params);
                ref::layernorm_backward(want, want_params.data(), want_params.data() + C, to_double(dout),
                                        to_double(want_sum), w64.data(), rows, C);
                DeviceArray<Float> dinp(start);
                DeviceArray<float> dparams(start_params), dinp_sum(start_rows),
                    scratch(column_sum_scratch(ctx, 2 * C));
                layernorm_backward<Float>(ctx, dinp, dparams, dparams + C,
                                          row_sum ? (float*)dinp_sum : nullptr, scratch, d_dout, sum, d_w,
                                          mean, rstd, rows, C, add);
                CHECK(relative_error(dinp.get(), want) < tolerance<Float>());
                auto want_rows = to_double(start_rows);
                if (row_sum)
                    for (int i = 0; i < rows * C; i++) want_rows[i % C] += want[i];
                CHECK(relative_error(dinp_sum.get(), want_rows) < tolerance<Float>());
                CHECK(relative_error(dparams.get(), want_params) < tolerance<float>());
                if (!first.empty()) CHECK(same_bits(dparams.get(), first));
                first = dparams.get();
            }
        }
}

TEST_CASE_TEMPLATE("gelu, from the flat tail to the straight part", Float, float, bf16) {
    const Context ctx = make_context();
    for (size_t n : {8, 24, 4096}) {
        auto inp = normal_values<Float>(n, 1, 3.0);
        inp[0] = (Float)-80.0f;  // exp(2u) overflows on the way: the result must still be 0
        inp[1] = (Float)80.0f;
        inp[2] = (Float)0.0f;
        const auto dout = normal_values<Float>(n, 2);
        DeviceArray<Float> d_inp(inp), out(n), d_dout(dout);
        gelu_forward<Float>(ctx, out, d_inp, n);
        auto want = to_double(inp);
        for (double& v : want) v = ref::gelu(v);
        CHECK(relative_error(out.get(), want) < tolerance<Float>());

        for (size_t i = 0; i < n; i++)
            want[i] = (double)(float)dout[i] * ref::gelu_slope((double)(float)inp[i]);
        gelu_backward<Float>(ctx, d_dout, d_dout, d_inp, n);  // in place, as the model calls it
        CHECK(relative_error(d_dout.get(), want) < tolerance<Float>());
    }
}

TEST_CASE_TEMPLATE("classifier: loss and gradient, in the logits' place", Float, float, bf16) {
    std::vector<Context> contexts = both_lane_counts();
    contexts.push_back(contexts[0]);
    contexts.back().max_shared = 20 << 10;  // the row fits neither in registers nor in shared memory
    for (const Context& ctx : contexts)
        for (auto [rows, V, Vp] : std::initializer_list<std::array<int, 3>>{{1, 2, 128},
                                                                            {3, 257, 384},
                                                                            {5, 128, 128},
                                                                            {2, 5003, 5120},
                                                                            {3, 8064, 8064},
                                                                            {2, 30001, 30080},
                                                                            {2, 50257, 50304}}) {
            if (ctx.max_shared < 48 << 10 && V < 30000) continue;
            CAPTURE(ctx.row_lanes);
            CAPTURE(ctx.max_shared);
            CAPTURE(V);
            auto logits = normal_values<Float>((size_t)rows * Vp, 1, 4.0, 20.0);
            logits[1] = (Float)500.0f;      // exp(500) overflows: the maximum must be taken out first
            for (int n = 0; n < rows; n++)  // what lies in the padding must not matter
                for (int v = V; v < Vp; v++) logits[(size_t)n * Vp + v] = (Float)1e4f;
            auto targets = random_ints(rows, V, 2);
            targets[rows - 1] = V - 1;
            const auto want = ref::classifier(to_double(logits), targets, 0.125, rows, V, Vp);
            DeviceArray<Float> d_logits(logits);
            DeviceArray<int> d_targets(targets);
            DeviceArray<float> loss(rows);
            classifier<Float>(ctx, loss, d_logits, d_targets, 0.125f, rows, V, Vp, false);
            CHECK(relative_error(loss.get(), want.loss) < tolerance<float>());
            CHECK(largest_error(d_logits.get(), to_double(logits)) ==
                  0.0);  // validation leaves the logits alone
            std::vector<Float> first;
            for (int repeat = 0; repeat < 2; repeat++) {
                d_logits.set(logits);
                classifier<Float>(ctx, loss, d_logits, d_targets, 0.125f, rows, V, Vp, true);
                CHECK(relative_error(loss.get(), want.loss) < tolerance<float>());
                CHECK(relative_error(d_logits.get(), want.dlogits) < tolerance<Float>());
                if (repeat) CHECK(same_bits(d_logits.get(), first));
                first = d_logits.get();
            }

            for (int v : {0, V / 2, V - 1}) {  // a bad number anywhere in a row makes its loss one, too
                auto bad = logits;
                bad[v] = (Float)NAN;
                d_logits.set(bad);
                classifier<Float>(ctx, loss, d_logits, d_targets, 0.125f, rows, V, Vp, true);
                CHECK(std::isnan(loss.get()[0]));
                if (rows > 1) CHECK(loss.get()[1] == doctest::Approx(want.loss[1]).epsilon(1e-5));
            }
        }
}

// Tensors of all kinds, of sizes that end in the middle of a warp and of a block.
static const GPT2Config kSmall{.max_seq_len = 5,
                               .vocab_size = 37,
                               .padded_vocab_size = 128,
                               .num_layers = 2,
                               .num_heads = 3,
                               .channels = 24};

TEST_CASE("decay bits: the matrices' elements, no others") {
    const auto table = gpt2_params(kSmall);
    const auto bits = decay_bits(table);
    REQUIRE(bits.size() == ceil_div(num_parameters(kSmall), size_t{256}));
    for (const ParamTensor& p : table) {
        CAPTURE(p.name);
        CHECK(p.decay != p.is_vector);
        for (size_t i = p.offset; i < p.offset + p.size(); i++)
            if ((bits[i / 256] >> (i / 8 % 32) & 1) != p.decay) {
                FAIL_CHECK("wrong bit");
                break;
            }
    }
}

TEST_CASE_TEMPLATE("AdamW: five updates of all tensors, with clipping and decay", Float, float, bf16) {
    const Context ctx = make_context();
    const auto table = gpt2_params(kSmall);
    const size_t n = num_parameters(kSmall);
    std::vector<float> decay(n);
    for (const ParamTensor& p : table)
        std::fill_n(decay.begin() + (long)p.offset, p.size(), p.decay ? 0.1f : 0.0f);
    const AdamW a{.lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f};
    const auto start = normal_values<float>(n, 1);
    DeviceArray<float> master(start), m(std::vector<float>(n, 0.0f)), v(std::vector<float>(n, 0.0f));
    DeviceArray<Float> weight(n);
    DeviceArray<uint32_t> bits(decay_bits(table));
    DeviceArray<GradNorm> norm(1);
    auto update = [&](float* grad, int64_t t) {
        if constexpr (sizeof(Float) == 4)
            adamw_update<float>(ctx, master, master, m, v, grad, bits, norm, n, a, t);
        else
            adamw_update<Float>(ctx, weight, master, m, v, grad, bits, norm, n, a, t);
    };
    std::vector<double> w = to_double(start), m64(n), v64(n);
    for (int t = 1; t <= 5; t++) {
        const auto grad = normal_values<float>(n, 10 + t);
        DeviceArray<float> d_grad(grad);
        norm.set({{.norm = 2.0, .scale = 0.5f, .finite = 1}});
        update(d_grad, t);
        for (size_t i = 0; i < n; i++) {
            const double g = 0.5 * (double)grad[i];
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.95 * v64[i] + 0.05 * g * g;
            const double mhat = m64[i] / (1 - std::pow(0.9, t)), vhat = v64[i] / (1 - std::pow(0.95, t));
            w[i] -= 0.01 * (mhat / (std::sqrt(vhat) + 1e-8) + (double)decay[i] * w[i]);
        }
    }
    CHECK(relative_error(master.get(), w) < 1e-6);
    CHECK(relative_error(m.get(), m64) < 1e-6);
    CHECK(relative_error(v.get(), v64) < 1e-6);
    if constexpr (sizeof(Float) == 2) {  // the model's weights are the master copy, rounded once
        const auto rounded = weight.get();
        const auto master_now = master.get();
        for (size_t i = 0; i < n; i++) CHECK((float)rounded[i] == (float)(Float)master_now[i]);
    }

    // a gradient that is not finite changes nothing
    const auto w0 = master.get(), m0 = m.get(), v0 = v.get();
    const auto rounded0 = weight.get();
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        auto grad = normal_values<float>(n, 30);
        grad[n - 5] = bad;
        DeviceArray<float> d_grad(grad), scratch(kGradNormBlocks);
        grad_norm(ctx, norm, scratch, d_grad, n, 1.0f);
        CHECK(norm.get()[0].finite == 0);
        update(d_grad, 6);
        CHECK(same_bits(master.get(), w0));
        CHECK(same_bits(m.get(), m0));
        CHECK(same_bits(v.get(), v0));
        if (sizeof(Float) == 2) CHECK(same_bits(weight.get(), rounded0));
    }
}

TEST_CASE("gradient norm of more numbers than there are blocks for") {
    const size_t n = (size_t)kGradNormBlocks * 256 * 32 * 4 + 40000;
    const Context ctx = make_context();
    DeviceArray<float> grad(std::vector<float>(n, 0.5f)),
        scratch(std::vector<float>(kGradNormBlocks + 64, 7.0f));
    DeviceArray<GradNorm> result(1);
    grad_norm(ctx, result, scratch, grad, n, 0);
    CHECK(result.get()[0].norm == doctest::Approx(0.5 * std::sqrt((double)n)).epsilon(1e-6));
    const auto after = scratch.get();
    CHECK(std::count(after.end() - 64, after.end(), 7.0f) == 64);  // nothing behind what it may use
}

TEST_CASE("gradient norm, and what is to be clipped") {
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(ctx.row_lanes);
        DeviceArray<float> scratch(kGradNormBlocks);
        DeviceArray<GradNorm> result(1);
        for (size_t n : {4, 1020, 4096, 40004, 300000, 1200000}) {
            const auto grad = normal_values<float>(n, 1);
            double want = 0;
            for (float g : grad) want += (double)g * (double)g;
            want = std::sqrt(want);
            DeviceArray<float> d_grad(grad);
            for (float clip : {0.0f, 1.0f, (float)want * 0.99f, (float)want * 1.01f}) {
                grad_norm(ctx, result, scratch, d_grad, n, clip);
                const GradNorm got = result.get()[0];
                CHECK(got.norm == doctest::Approx(want).epsilon(1e-6));
                CHECK(got.finite == 1);
                const double scale = clip > 0 && clip < want ? clip / want : 1;
                CHECK(got.scale == doctest::Approx(scale).epsilon(1e-6));
            }
        }
        for (float bad : {NAN, INFINITY, 1e30f}) {
            std::vector<float> grad(1024, 1.0f);
            grad[700] = bad;
            DeviceArray<float> d_grad(grad);
            grad_norm(ctx, result, scratch, d_grad, grad.size(), 1.0f);
            CHECK(result.get()[0].finite == 0);
            CHECK(std::isnan(result.get()[0].norm) == std::isnan(bad));
        }
    }
}

TEST_CASE_TEMPLATE("layernorm: epsilon counts where the variance is no larger", Float, float, bf16) {
    const int rows = 5, C = 136;
    const auto inp = normal_values<Float>(rows * C, 1, 3e-3), res = normal_values<Float>(rows * C, 2, 3e-3);
    const std::vector<Float> w(C, (Float)1.0f), b(C, (Float)0.0f);
    const std::vector<double> w64(C, 1.0), b64(C, 0.0);
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(ctx.row_lanes);
        DeviceArray<Float> d_inp(inp), d_res(res), d_w(w), d_b(b), out(rows * C), sum(rows * C);
        DeviceArray<float> mean(rows), rstd(rows);
        layernorm_forward<Float>(ctx, out, mean, rstd, nullptr, nullptr, d_inp, d_w, d_b, rows, C);
        CHECK(relative_error(out.get(), ref::layernorm_forward(to_double(inp), w64.data(), b64.data(), rows,
                                                               C)) < tolerance<Float>());
        layernorm_forward<Float>(ctx, out, mean, rstd, sum, d_res, d_inp, d_w, d_b, rows, C);
        CHECK(relative_error(out.get(), ref::layernorm_forward(to_double(sum.get()), w64.data(), b64.data(),
                                                               rows, C)) < tolerance<Float>());
    }
}

TEST_CASE(
    "what an update has measured: means, each layer's factor, and the first tensor that is not finite") {
    const int rows = 2500, L = 3, heads = 700;  // more than a block has threads for
    const std::vector<float> losses = normal_values<float>(rows, 1, 5.0, 1.0),
                             sums = normal_values<float>(L * heads * 2, 2, 3.0, 1.0);
    const std::vector<float> factors = {0.5f, 0.0f, 2.0f};
    const double mass_rows = 5000, share = 0.25, mass_share = 0.5;
    double ce = 0, mass = 0, reg = 0;
    for (const float loss : losses) ce += loss;
    for (int i = 0; i < L * heads; i++) {
        mass += sums[2 * i];
        reg += (double)factors[i / heads] * sums[2 * i + 1];
    }
    const std::vector<size_t> begin = {0, 3, 1200, 1201, 2000};
    const int tensors = (int)begin.size() - 1;
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(ctx.row_lanes);
        StepStats before = {};
        before.ce = 1, before.mass = 2, before.reg = 3;
        DeviceArray<StepStats> stats(std::vector<StepStats>{before});
        DeviceArray<float> d_losses(losses), d_sums(sums);
        const auto add = [&](double of_masses) {
            add_step_stats(ctx, stats, d_losses, rows, share, d_sums, heads, mass_rows, of_masses, factors);
            return stats.get()[0];
        };
        StepStats got = add(mass_share);
        CHECK(got.ce == doctest::Approx(1 + share * ce / rows).epsilon(1e-12));
        CHECK(got.mass == doctest::Approx(2 + mass_share * mass / mass_rows).epsilon(1e-12));
        CHECK(got.reg == doctest::Approx(3 + mass_share * reg / mass_rows).epsilon(1e-12));
        const StepStats unmeasured = add(0.0);  // masses stay
        CHECK(unmeasured.ce > got.ce);
        CHECK(unmeasured.mass == got.mass);
        CHECK(unmeasured.reg == got.reg);

        DeviceArray<size_t> d_begin(begin);
        for (const size_t bad : {size_t{2}, size_t{3}, size_t{1199}, size_t{1200}, size_t{1999}}) {
            CAPTURE(bad);
            std::vector<float> grads(begin.back(), 1.0f);
            grads[bad] = INFINITY;
            grads[1999] = NAN;  // the first counts
            DeviceArray<float> d_grads(grads);
            for (const int finite : {1, 0}) {
                StepStats s = {};
                s.norm.finite = finite;
                stats.set({s});
                find_bad_tensor(ctx, stats, d_grads, d_begin, tensors);
                const int first =
                    (int)(std::upper_bound(begin.begin(), begin.end(), bad) - begin.begin()) - 1;
                CHECK(stats.get()[0].bad_tensor == (finite ? 0 : tensors - first));
            }
        }
    }
}
