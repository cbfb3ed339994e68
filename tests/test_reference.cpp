// The plain-loop references of reference.h against finite differences, in double precision. A central
// difference with step h = 1e-5 is off by about h^2 = 1e-10 (truncation) and 1e-16 / h = 1e-11 (rounding),
// times the function's higher derivatives: 1e-7 relative is asked for.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "reference.h"

using ref::Vec;

static Vec normal(size_t n, int seed, double scale = 1) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> d(0, scale);
    Vec v(n);
    for (double& x : v) x = d(rng);
    return v;
}
static double dot(const Vec& a, const Vec& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
    return sum;
}
// The derivative of f at x along direction d, against the gradient's claim.
static void check_gradient(const char* what, const std::function<double(const Vec&)>& f, const Vec& x,
                           const Vec& grad) {
    for (int seed = 0; seed < 4; seed++) {
        const double h = 1e-5;
        const Vec d = normal(x.size(), 1000 + seed);
        Vec plus = x, minus = x;
        for (size_t i = 0; i < x.size(); i++) {
            plus[i] += h * d[i];
            minus[i] -= h * d[i];
        }
        const double numeric = (f(plus) - f(minus)) / (2 * h), claimed = dot(grad, d);
        CHECK_MESSAGE(std::fabs(numeric - claimed) <= 1e-7 * (std::fabs(claimed) + 1),
                      what << ": finite difference " << numeric << ", gradient says " << claimed);
    }
}

// The same for the input, weight and bias of a layer f.
static void check_layer(const std::function<double(const Vec&, const Vec&, const Vec&)>& f, const Vec& x,
                        const Vec& w, const Vec& b, const Vec& dx, const Vec& dw, const Vec& db) {
    check_gradient(
        "x", [&](const Vec& v) { return f(v, w, b); }, x, dx);
    check_gradient(
        "weight", [&](const Vec& v) { return f(x, v, b); }, w, dw);
    check_gradient(
        "bias", [&](const Vec& v) { return f(x, w, v); }, b, db);
}

TEST_CASE("layernorm: input, weight and bias") {
    const int rows = 3, C = 7;
    const Vec x = normal(rows * C, 1), w = normal(C, 2), b = normal(C, 3), dout = normal(rows * C, 4);
    Vec dx(x.size()), dw(C), db(C);
    ref::layernorm_backward(dx, dw.data(), db.data(), dout, x, w.data(), rows, C);
    check_layer(
        [&](const Vec& x, const Vec& w, const Vec& b) {
            return dot(dout, ref::layernorm_forward(x, w.data(), b.data(), rows, C));
        },
        x, w, b, dx, dw, db);
}

TEST_CASE("matmul: input, weight and bias") {
    const int rows = 3, IC = 5, OC = 4;
    const Vec x = normal(rows * IC, 1), w = normal(OC * IC, 2), b = normal(OC, 3),
              dout = normal(rows * OC, 4);
    Vec dw(w.size()), db(OC);
    const Vec dx = ref::matmul_backward(dw.data(), db.data(), dout, x, w.data(), rows, IC, OC);
    check_layer(
        [&](const Vec& x, const Vec& w, const Vec& b) {
            return dot(dout, ref::matmul_forward(x, w.data(), b.data(), rows, IC, OC));
        },
        x, w, b, dx, dw, db);
}

TEST_CASE("gelu") {
    const Vec x = normal(50, 1, 2.0);
    Vec slope = x;
    for (double& v : slope) v = ref::gelu_slope(v);
    check_gradient(
        "x",
        [](const Vec& v) {
            double s = 0;
            for (double e : v) s += ref::gelu(e);
            return s;
        },
        x, slope);
}

TEST_CASE("classifier") {
    const int rows = 3, V = 11, Vp = 16;
    const Vec logits = normal(rows * Vp, 1, 2.0);
    const std::vector<int> targets = {0, 10, 5};
    const auto c = ref::classifier(logits, targets, 0.25, rows, V, Vp);
    check_gradient(
        "logits",
        [&](const Vec& v) {
            double s = 0;
            for (double l : ref::classifier(v, targets, 0, rows, V, Vp).loss) s += 0.25 * l;
            return s;
        },
        logits, c.dlogits);
}

TEST_CASE("attention with the regularizer, all kinds, several k") {
    const int B = 2, T = 9, NH = 2, hs = 4, C = NH * hs;
    const Vec qkv = normal(B * T * 3 * C, 1), dout = normal(B * T * C, 2);
    for (Reg reg : {Reg::tail, Reg::kl, Reg::entropy})
        for (int k : {1, 2, 5, 8, 9, 100})
            for (double weight : {0.0, 0.7}) {
                CAPTURE(k);
                const Vec d = ref::attention_backward(dout, qkv, B, T, NH, hs, k, reg, weight);
                check_gradient(
                    reg_name(reg),
                    [&](const Vec& v) {
                        const auto a = ref::attention_forward(v, B, T, NH, hs, k, reg);
                        return dot(dout, a.out) + weight * a.reg_sum;
                    },
                    qkv, d);
            }
}

TEST_CASE("attention: the mass is the sum of the k largest probabilities, ties or not") {
    const int T = 12, hs = 4;
    Vec qkv = normal(T * 3 * hs, 1);
    for (int j = 0; j < T; j++)  // only three different keys, so that most rows tie
        for (int d = 0; d < hs; d++) qkv[j * 3 * hs + hs + d] = qkv[(j % 3) * 3 * hs + hs + d];
    for (int k : {1, 2, 3, 7}) {
        for (int i = 0; i < T; i++) {
            const auto row = ref::attention_row(qkv.data(), i, 0, hs, hs, k);
            Vec p = row.p;
            std::sort(p.rbegin(), p.rend());
            double top = 0, members = 0;
            for (int j = 0; j < std::min(k, i + 1); j++) top += p[j];
            for (double m : row.member) members += m;
            CHECK(row.mass == doctest::Approx(top).epsilon(1e-12));
            CHECK(members == doctest::Approx(std::min(k, i + 1)).epsilon(1e-12));
        }
    }
}

TEST_CASE("the whole model, regularizer included") {
    GPT2Config config{.max_seq_len = 8,
                      .vocab_size = 13,
                      .padded_vocab_size = 128,
                      .num_layers = 2,
                      .num_heads = 2,
                      .channels = 16};
    const int B = 2, T = 7;
    Vec params = normal(num_parameters(config), 1, 0.3);
    std::vector<int> x(B * T), y(B * T);
    std::mt19937_64 rng(5);
    for (int i = 0; i < B * T; i++) x[i] = (int)(rng() % 13), y[i] = (int)(rng() % 13);
    for (Reg reg : {Reg::tail, Reg::kl, Reg::entropy}) {
        const Vec lambda = {0.5, 1.5};
        Vec grads;
        const auto loss = ref::gpt2(config, params, x, y, B, T, 3, reg, lambda, &grads);
        CHECK(loss.mass > 0.3);
        CHECK(loss.mass < 1.0);
        const double weighted = loss.total - loss.ce;
        CHECK(weighted > 0.5 * loss.reg * 0.5);
        for (const ParamTensor& p :
             gpt2_params(config)) {  // one tensor at a time, so that none hides behind another
            const Vec part(params.begin() + p.offset, params.begin() + p.offset + p.size());
            const Vec grad(grads.begin() + p.offset, grads.begin() + p.offset + p.size());
            check_gradient(
                p.name.c_str(),
                [&](const Vec& v) {
                    Vec moved = params;
                    std::copy(v.begin(), v.end(), moved.begin() + p.offset);
                    return ref::gpt2(config, moved, x, y, B, T, 3, reg, lambda).total;
                },
                part, grad);
        }
    }
}
