// Every layer but attention, forward and backward, against the plain loops of reference.h: in fp32 and bf16,
// with a row shared by a warp and by one thread, at sizes that fit no tile.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <array>
#include "../llmc/adamw.cuh"
#include "../llmc/classifier.cuh"
#include "../llmc/encoder.cuh"
#include "../llmc/gelu.cuh"
#include "../llmc/grad_norm.cuh"
#include "../llmc/layernorm.cuh"
#include "../llmc/matmul.cuh"

#include "check.h"
#include "reference.h"

using bf16 = __nv_bfloat16;

TEST_CASE_TEMPLATE("encoder", Float, float, bf16) {
    const Context ctx = make_context();
    for (auto [B, T, C, V] : {std::array<int, 4>{1, 1, 8, 3}, {2, 5, 24, 7}, {3, 33, 768, 300}}) {
        CAPTURE(T);
        const int rows = B * T;
        const auto tokens = random_ints(rows, V, 1);
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
        DeviceArray<float> dwte(start_wte), dwpe(start_wpe);
        const TokenBuckets buckets = bucket_tokens(tokens.data(), rows, V);
        DeviceArray<int> order(buckets.order), token(buckets.token), begin(buckets.begin);
        encoder_backward<Float>(ctx, dwte, dwpe, d_dout, order, token, begin, (int)buckets.token.size(), B, T,
                                C);
        CHECK(relative_error(dwte.get(), want_wte) < tolerance<float>());
        CHECK(relative_error(dwpe.get(), want_wpe) < tolerance<float>());
    }
}

TEST_CASE("token buckets: every position once, sorted by token, then by position") {
    const auto tokens = random_ints(500, 17, 3);
    const TokenBuckets b = bucket_tokens(tokens.data(), 500, 50);
    CHECK(b.order.size() == 500);
    CHECK(b.begin.front() == 0);
    CHECK(b.begin.back() == 500);
    std::vector<int> seen(500, 0);
    for (size_t k = 0; k < b.token.size(); k++) {
        CHECK(b.begin[k] < b.begin[k + 1]);
        for (int i = b.begin[k]; i < b.begin[k + 1]; i++) {
            CHECK(tokens[b.order[i]] == b.token[k]);
            if (i > b.begin[k]) CHECK(b.order[i - 1] < b.order[i]);
            seen[b.order[i]]++;
        }
    }
    CHECK(std::count(seen.begin(), seen.end(), 1) == 500);
}

TEST_CASE_TEMPLATE("layernorm, with and without the residual", Float, float, bf16) {
    for (const Context& ctx : both_lane_counts())
        for (auto [rows, C] : {std::array<int, 2>{1, 8}, {5, 24}, {67, 768}, {130, 1600}}) {
            CAPTURE(ctx.row_lanes);
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

            const auto dout = normal_values<Float>(rows * C, 5), start = normal_values<Float>(rows * C, 6);
            const auto start_params = normal_values<float>(2 * C, 7);
            auto want = to_double(start), want_params = to_double(start_params);
            ref::layernorm_backward(want, want_params.data(), want_params.data() + C, to_double(dout),
                                    to_double(want_sum), w64.data(), rows, C);
            DeviceArray<Float> dinp(start), d_dout(dout);
            DeviceArray<float> dparams(start_params), scratch(column_sum_scratch(ctx, 2 * C));
            layernorm_backward<Float>(ctx, dinp, dparams, dparams + C, scratch, d_dout, sum, d_w, mean, rstd,
                                      rows, C);
            CHECK(relative_error(dinp.get(), want) < tolerance<Float>());
            CHECK(relative_error(dparams.get(), want_params) < tolerance<float>());
        }
}

TEST_CASE_TEMPLATE("matmul: product, bias, and their gradients", Float, float, bf16) {
    const Context ctx = make_context();
    for (auto [rows, IC, OC] : {std::array<int, 3>{1, 8, 8}, {7, 24, 40}, {130, 64, 192}, {65, 768, 256}}) {
        CAPTURE(rows);
        const auto inp = normal_values<Float>(rows * IC, 1), w = normal_values<Float>(OC * IC, 2, 0.1);
        const auto b = normal_values<Float>(OC, 3), dout = normal_values<Float>(rows * OC, 4);
        DeviceArray<Float> d_inp(inp), d_w(w), d_b(b), out(rows * OC), d_dout(dout), dinp(rows * IC);
        const auto w64 = to_double(w), b64 = to_double(b);
        matmul_forward<Float>(ctx, out, d_inp, d_w, d_b, rows, IC, OC);
        CHECK(relative_error(out.get(), ref::matmul_forward(to_double(inp), w64.data(), b64.data(), rows, IC,
                                                            OC)) < tolerance<Float>());
        matmul_forward<Float>(ctx, out, d_inp, d_w, nullptr, rows, IC, OC);
        CHECK(relative_error(out.get(), ref::matmul_forward(to_double(inp), w64.data(), nullptr, rows, IC,
                                                            OC)) < tolerance<Float>());

        const auto start_w = normal_values<float>(OC * IC, 5), start_b = normal_values<float>(OC, 6);
        auto want_w = to_double(start_w), want_b = to_double(start_b);
        const auto want = ref::matmul_backward(want_w.data(), want_b.data(), to_double(dout), to_double(inp),
                                               w64.data(), rows, IC, OC);
        DeviceArray<float> dw(start_w), db(start_b), scratch(column_sum_scratch(ctx, OC));
        matmul_backward<Float>(ctx, dinp, dw, db, scratch, d_dout, d_inp, d_w, rows, IC, OC);
        CHECK(relative_error(dinp.get(), want) < tolerance<Float>());
        CHECK(relative_error(dw.get(), want_w) < tolerance<float>());
        CHECK(relative_error(db.get(), want_b) < tolerance<float>());
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
    for (const Context& ctx : both_lane_counts())
        for (auto [rows, V, Vp] :
             {std::array<int, 3>{1, 2, 128}, {3, 257, 384}, {5, 128, 128}, {2, 50257, 50304}}) {
            CAPTURE(ctx.row_lanes);
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
            classifier<Float>(ctx, loss, d_logits, d_targets, 0.125f, rows, V, Vp, true);
            CHECK(relative_error(loss.get(), want.loss) < tolerance<float>());
            CHECK(relative_error(d_logits.get(), want.dlogits) < tolerance<Float>());
        }
}

TEST_CASE_TEMPLATE("AdamW: five updates, with clipping and decay", Float, float, bf16) {
    const Context ctx = make_context();
    const size_t n = 1028;
    const auto start = normal_values<float>(n, 1);
    DeviceArray<float> master(start), m(std::vector<float>(n, 0.0f)), v(std::vector<float>(n, 0.0f));
    DeviceArray<Float> weight(n);
    std::vector<double> w = to_double(start), m64(n), v64(n);
    for (int t = 1; t <= 5; t++) {
        const auto grad = normal_values<float>(n, 10 + t);
        DeviceArray<float> d_grad(grad);
        const AdamW a{.lr = 0.01f,
                      .beta1 = 0.9f,
                      .beta2 = 0.95f,
                      .eps = 1e-8f,
                      .decay = 0.1f,
                      .grad_scale = 0.5f,
                      .correction1 = 0,
                      .correction2 = 0};
        if constexpr (sizeof(Float) == 4)
            adamw_update<float>(ctx, master, master, m, v, d_grad, n, a, t);
        else
            adamw_update<Float>(ctx, weight, master, m, v, d_grad, n, a, t);
        for (size_t i = 0; i < n; i++) {
            const double g = 0.5 * (double)grad[i];
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.95 * v64[i] + 0.05 * g * g;
            const double mhat = m64[i] / (1 - std::pow(0.9, t)), vhat = v64[i] / (1 - std::pow(0.95, t));
            w[i] -= 0.01 * (mhat / (std::sqrt(vhat) + 1e-8) + 0.1 * w[i]);
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
}

TEST_CASE("gradient norm") {
    const Context ctx = make_context();
    for (size_t n : {4, 1020, 300000, 1200000}) {
        const auto grad = normal_values<float>(n, 1);
        double want = 0;
        for (float g : grad) want += (double)g * (double)g;
        DeviceArray<float> d_grad(grad), scratch(kGradNormBlocks);
        DeviceArray<double> norm(1);
        grad_norm(ctx, norm, scratch, d_grad, n);
        CHECK(norm.get()[0] == doctest::Approx(std::sqrt(want)).epsilon(1e-6));
    }
    std::vector<float> bad(1024, 1.0f);
    bad[700] = NAN;
    DeviceArray<float> d_bad(bad), scratch(kGradNormBlocks);
    DeviceArray<double> norm(1);
    grad_norm(ctx, norm, scratch, d_bad, bad.size());
    CHECK(std::isnan(norm.get()[0]));
}
