// Attention by cuDNN, which stands in for ours where there is no regularizer: the same results, from the same
// calls. A part of test_attention.cu wherever that is built with USE_CUDNN: for the CPU backend always,
// against its emulation of cuDNN; for a GPU with make USE_CUDNN=1 test, against cuDNN.
#pragma once
#include "../llmc/attention.cuh"
#include "../llmc/graph.h"
#include "check.h"
#include "reference.h"

namespace with_cudnn {

using bf16 = __nv_bfloat16;

struct Shape {
    int B, T, NH, hs;

    int C() const { return NH * hs; }
    size_t tokens() const { return (size_t)B * T; }
    size_t rows() const { return (size_t)B * NH * T; }
};

// Arrays of one shape, and attention on them as the trainer calls it.
struct Attention {
    Shape s;
    std::vector<bf16> dout;
    DeviceArray<bf16> qkv, d_dout, out, dqkv;
    DeviceArray<float> lse, theta, mass, tie, weight, dbias;
    AttentionRows rows{lse, theta, mass, tie};

    Attention(Shape shape, double scale = 1.0)
        : s(shape),
          dout(normal_values<bf16>(s.tokens() * s.C(), 2)),
          qkv(normal_values<bf16>(s.tokens() * 3 * s.C(), 1, scale)),
          d_dout(dout),
          out(s.tokens() * s.C()),
          dqkv(s.tokens() * 3 * s.C()),
          lse(s.rows()),
          theta(s.rows()),
          mass(s.rows()),
          tie(s.rows()),
          weight(std::vector<float>{0.5f}),
          dbias(3 * s.C()) {}

    void forward(const Context& ctx, int topk = 0) {
        attention_forward<bf16>(ctx, out, rows, qkv, s.B, s.T, s.NH, s.hs, topk);
    }
    void backward(const Context& ctx, float* scratch, int topk = 0, bool regularized = false) {
        attention_backward<bf16>(ctx, dqkv, dbias, scratch, d_dout, out, qkv, rows, Reg::tail,
                                 regularized ? (const float*)weight : nullptr, s.B, s.T, s.NH, s.hs, topk);
    }
    size_t scratch(const Context& ctx) const {
        return std::max(prepare_attention_cudnn(ctx, s.B, s.T, s.NH, s.hs),
                        attention_backward_scratch<bf16>(ctx, s.B, s.T, s.NH, s.hs));
    }
    void check() {
        CAPTURE(s.T);
        CAPTURE(s.hs);
        const auto want = ref::attention_forward(to_double(qkv.get()), s.B, s.T, s.NH, s.hs, 0, Reg::tail);
        const std::vector<double> got_out = to_double(out.get());
        const auto want_d = ref::attention_backward(to_double(dout), to_double(qkv.get()), s.B, s.T, s.NH,
                                                    s.hs, 0, Reg::tail, 0.0, &got_out);
        CHECK(relative_error(out.get(), want.out) < tolerance<bf16>());
        CHECK(relative_error(lse.get(), want.lse) < tolerance<float>());
        for (int which : {0, 1, 2}) {
            CAPTURE(which);
            CHECK(relative_error(part(dqkv.get(), which, s.C()), part(want_d, which, s.C())) <
                  tolerance<bf16>());
        }
    }
};

TEST_CASE("cuDNN: forward and backward against the plain loops") {
    const Context ctx = make_context();
    for (Shape s : std::initializer_list<Shape>{{1, 1, 1, 64},
                                                {2, 3, 2, 64},
                                                {1, 63, 2, 64},
                                                {2, 65, 3, 64},
                                                {1, 200, 2, 64},
                                                {2, 70, 3, 8},
                                                {1, 130, 2, 128}})
        for (double scale : {1.0, 4.0}) {
            Attention a(s, scale);
            DeviceArray<float> scratch(a.scratch(ctx));
            CHECK(attention_forward_cudnn(ctx, a.out, a.lse, a.qkv, s.B, s.T, s.NH, s.hs));
            CHECK(attention_backward_cudnn(ctx, a.dqkv, scratch, a.d_dout, a.out, a.qkv, a.lse, s.B, s.T,
                                           s.NH, s.hs));
            a.check();
            const auto out = a.out.get(), dqkv = a.dqkv.get();
            a.forward(ctx);  // prepared: attention's own calls come to the same
            a.backward(ctx, scratch);
            CHECK(same_bits(a.out.get(), out));
            CHECK(same_bits(a.dqkv.get(), dqkv));
        }
}

TEST_CASE("cuDNN: only shapes that were prepared, and only without the regularizer") {
    const Context ctx = make_context();
    const Shape s{2, 100, 2, 64};
    Attention ours(s), cudnn(s);
    DeviceArray<float> own_scratch(attention_backward_scratch<bf16>(ctx, s.B, s.T, s.NH, s.hs));
    const auto results = [](Attention& a) { return std::tuple(a.out.get(), a.dqkv.get(), a.lse.get()); };
    const auto run = [&](Attention& a, float* scratch, int topk, bool regularized) {
        a.forward(ctx, topk);
        a.backward(ctx, scratch, topk, regularized);
        return results(a);
    };
    CHECK_FALSE(attention_forward_cudnn(ctx, cudnn.out, cudnn.lse, cudnn.qkv, s.B, s.T, s.NH, s.hs));
    CHECK_FALSE(attention_backward_cudnn(ctx, cudnn.dqkv, own_scratch, cudnn.d_dout, cudnn.out, cudnn.qkv,
                                         cudnn.lse, s.B, s.T, s.NH, s.hs));
    const auto plain = run(ours, own_scratch, 0, false), regularized = run(ours, own_scratch, 8, true);
    const std::vector<float> mass = ours.mass.get();

    DeviceArray<float> scratch(cudnn.scratch(ctx));
    CHECK(run(cudnn, scratch, 8, true) == regularized);  // to the bit
    CHECK(same_bits(cudnn.mass.get(), mass));
    CHECK(run(cudnn, scratch, 0, false) != plain);  // other sums
    cudnn.check();
    // masses measured, lambda 0: our forward, cuDNN's backward
    CHECK(run(cudnn, scratch, 8, false) != plain);
    CHECK(same_bits(cudnn.out.get(), std::get<0>(plain)));
    CHECK(same_bits(cudnn.mass.get(), mass));
    cudnn.check();
    // another context: nothing is prepared there
    const Context other = make_context();
    CHECK_FALSE(attention_forward_cudnn(other, cudnn.out, cudnn.lse, cudnn.qkv, s.B, s.T, s.NH, s.hs));
}

TEST_CASE("cuDNN: a shape that it has no kernels for is not done, and not asked for again") {
    const Context ctx = make_context();
    const Shape s{1, 70, 2, 12};
    Attention a(s);
    for (int i = 0; i < 2; i++) {
        CHECK(prepare_attention_cudnn(ctx, s.B, s.T, s.NH, s.hs) == 0);
        CHECK_FALSE(has_attention_cudnn(ctx, s.B, s.T, s.NH, s.hs));
        CHECK_FALSE(attention_forward_cudnn(ctx, a.out, a.lse, a.qkv, s.B, s.T, s.NH, s.hs));
    }
    CHECK(prepare_attention_cudnn(ctx, s.B, s.T, s.NH, 16) > 0);  // what comes after it is
    CHECK(has_attention_cudnn(ctx, s.B, s.T, s.NH, 16));
}

TEST_CASE("cuDNN: in a recorded launch, with the bits of a direct one") {
    const Context ctx = make_context();
    const Shape s{1, 96, 2, 64};
    Attention a(s);
    DeviceArray<float> scratch(a.scratch(ctx));
    Graph graph;
    std::vector<bf16> out, dqkv;
    for (int i = 0; i < 4; i++) {
        a.out.set(std::vector<bf16>(s.tokens() * s.C(), (bf16)0.0f));
        a.dqkv.set(std::vector<bf16>(s.tokens() * 3 * s.C(), (bf16)0.0f));
        graph.run(ctx, [&] {
            a.forward(ctx);
            a.backward(ctx, scratch);
        });
        if (i == 0) {
            out = a.out.get();
            dqkv = a.dqkv.get();
            a.check();
        }
        CHECK(same_bits(a.out.get(), out));
        CHECK(same_bits(a.dqkv.get(), dqkv));
    }
}

}  // namespace with_cudnn
