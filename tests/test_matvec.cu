// The linear layer for few rows with all that is fused into it, against plain loops: every size of a row's
// sum, every number of rows, both kernels.
#include "../llmc/matvec.cuh"

#include "../llmc/graph.h"
#include "../llmc/matvec_mma.cuh"

#include "check.h"
#include "reference.h"

using bf16 = __nv_bfloat16;

enum class Before { nothing, layernorm };
enum class After { nothing, gelu, residual };

// Everything that one call reads.
template <class Float>
struct Layer {
    int rows, IC, OC;
    bool by_mma = false;  // by tensor cores
    std::vector<Float> inp, weight, bias, norm_weight, norm_bias, residual;

    Layer(int rows_, int IC_, int OC_, double spread = 1.0)
        : rows(rows_),
          IC(IC_),
          OC(OC_),
          // a mean, so that what cancels in the variance is seen
          inp(normal_values<Float>((size_t)rows * IC, 1, spread, spread / 2)),
          weight(normal_values<Float>((size_t)OC * IC, 2, 1 / std::sqrt(IC))),
          bias(normal_values<Float>(OC, 3)),
          norm_weight(normal_values<Float>(IC, 4, 0.5, 1.0)),
          norm_bias(normal_values<Float>(IC, 5)),
          residual(normal_values<Float>((size_t)rows * OC, 6)) {}

    std::vector<double> want(Before before, After after, bool with_bias) const {
        ref::Vec x = to_double(inp);
        const ref::Vec gain = to_double(norm_weight), shift = to_double(norm_bias);
        if (before == Before::layernorm) x = ref::layernorm_forward(x, gain.data(), shift.data(), rows, IC);
        const ref::Vec w = to_double(weight), b = to_double(bias);
        ref::Vec y = ref::matmul_forward(x, w.data(), with_bias ? b.data() : nullptr, rows, IC, OC);
        for (size_t i = 0; i < y.size(); i++) {
            if (after == After::gelu) y[i] = ref::gelu(y[i]);
            if (after == After::residual) y[i] += (double)(float)residual[i];
        }
        return y;
    }

    // the first `some` rows; the sum with the residual takes the residual's place
    std::vector<Float> got(const Context& ctx, Before before, After after, bool with_bias, int some) const {
        DeviceArray<Float> d_inp(std::vector<Float>(inp.begin(), inp.begin() + (size_t)some * IC));
        DeviceArray<Float> d_weight(weight), d_bias(bias), d_gain(norm_weight), d_shift(norm_bias);
        DeviceArray<Float> out((size_t)some * OC);
        if (after == After::residual)
            out.set(std::vector<Float>(residual.begin(), residual.begin() + (size_t)some * OC));
        const bool norm = before == Before::layernorm;
        const Normalize<Float> normalize = {norm ? (Float*)d_gain : nullptr,
                                            norm ? (Float*)d_shift : nullptr};
        const Float* b = with_bias ? (Float*)d_bias : nullptr;
        const Float* r = after == After::residual ? (Float*)out : nullptr;
        if constexpr (sizeof(Float) == 2)
            if (by_mma) {
                matvec_mma_forward(ctx, out, d_inp, d_weight, b, normalize, r, after == After::gelu, some, IC,
                                   OC);
                return out.get();
            }
        matvec_forward<Float>(ctx, out, d_inp, d_weight, b, normalize, r, after == After::gelu, some, IC, OC);
        return out.get();
    }
};

TEST_CASE_TEMPLATE("few rows times a matrix: what is fused before and after", Float, float, bf16) {
    for (const Context& ctx : both_lane_counts())
        for (const auto& [rows, IC, OC] :
             std::initializer_list<std::array<int, 3>>{{1, 8, 8}, {3, 24, 40}, {4, 768, 136}, {8, 264, 24}}) {
            const Layer<Float> layer(rows, IC, OC);
            for (Before before : {Before::nothing, Before::layernorm})
                for (After after : {After::nothing, After::gelu, After::residual})
                    for (bool with_bias : {false, true}) {
                        CAPTURE(ctx.row_lanes);
                        CAPTURE(rows);
                        CAPTURE(IC);
                        CAPTURE((int)before);
                        CAPTURE((int)after);
                        CAPTURE(with_bias);
                        CHECK(relative_error(layer.got(ctx, before, after, with_bias, rows),
                                             layer.want(before, after, with_bias)) < tolerance<Float>());
                    }
        }
}

// The widths at which 1, 2, 4 and 8 warps share an output, wider ones than these read at once, and such as
// leave lanes, warps or blocks without work; GPT-2's own; on one SM, so that blocks take several turns.
TEST_CASE_TEMPLATE("few rows times a matrix: sizes", Float, float, bf16) {
    for (Context ctx : both_lane_counts()) {
        ctx.num_sms = 1;
        for (const auto& [rows, IC, OC] : std::initializer_list<std::array<int, 3>>{{1, 768, 2304},
                                                                                    {2, 1032, 72},
                                                                                    {1, 1600, 200},
                                                                                    {5, 3072, 64},
                                                                                    {2, 4104, 40},
                                                                                    {1, 16384, 8},
                                                                                    {8, 8200, 8},
                                                                                    {7, 16, 1000}}) {
            CAPTURE(ctx.row_lanes);
            CAPTURE(rows);
            CAPTURE(IC);
            if (!matvec_rows<Float>(ctx, IC, true)) continue;  // for the widest, an A100's block is too small
            const Layer<Float> layer(rows, IC, OC);
            for (After after : {After::gelu, After::residual})
                CHECK(relative_error(layer.got(ctx, Before::layernorm, after, true, rows),
                                     layer.want(Before::layernorm, after, true)) < tolerance<Float>());
        }
    }
}

TEST_CASE_TEMPLATE("few rows times a matrix: a variance as small as layernorm's epsilon", Float, float,
                   bf16) {
    for (const Context& ctx : both_lane_counts()) {
        const Layer<Float> layer(3, 72, 16, 0.003);
        CHECK(relative_error(layer.got(ctx, Before::layernorm, After::nothing, false, 3),
                             layer.want(Before::layernorm, After::nothing, false)) < tolerance<Float>());
    }
}

TEST_CASE_TEMPLATE("few rows times a matrix: a row has the same bits, however many there are", Float, float,
                   bf16) {
    for (const Context& ctx : both_lane_counts())
        for (const auto& [IC, OC] :
             {std::pair{768, 72}, std::pair{1600, 24}, std::pair{8, 16}, std::pair{8200, 8}}) {
            CAPTURE(ctx.row_lanes);
            CAPTURE(IC);
            if (!matvec_rows<Float>(ctx, IC, true)) continue;
            const Layer<Float> layer(kMaxMatvecRows, IC, OC);
            for (Before before : {Before::nothing, Before::layernorm}) {
                const auto all = layer.got(ctx, before, After::residual, true, kMaxMatvecRows);
                for (int some : {1, 2, 3, 5}) {  // one in each kernel
                    CAPTURE(some);
                    CHECK(same_bits(layer.got(ctx, before, After::residual, true, some),
                                    std::vector<Float>(all.begin(), all.begin() + (size_t)some * OC)));
                }
            }
        }
}

// One row to all, a group of rows that is not full; a sum shorter than the warps that share it, and longer
// than they have under way; outputs that are no whole tile; several turns of a block, on one SM.
TEST_CASE("rows of bf16 times a matrix by tensor cores: sizes, and what is fused before and after") {
    const Context all = both_lane_counts()[0];
    Context one = all;
    one.num_sms = 1;
    Context little = one;  // shared memory, as compute capability 8.6 has it
    little.max_shared = std::min<size_t>(little.max_shared, 99 << 10);
    std::vector<Context> contexts = {all, one};
    if (!kFewer) contexts.push_back(little);
    for (const Context& ctx : contexts)
        for (const auto& [rows, IC, OC] : std::initializer_list<std::array<int, 3>>{
                 {1, 32, 8}, {11, 96, 40}, {16, 768, 72}, {32, 256, 136}, {33, 288, 24}, {64, 3104, 16}}) {
            Layer<bf16> layer(rows, IC, OC);
            layer.by_mma = true;
            for (Before before : {Before::nothing, Before::layernorm}) {
                if (mma_pieces(ctx, 2, IC, before == Before::layernorm) == 0) continue;
                for (After after : {After::nothing, After::gelu, After::residual})
                    for (bool with_bias : {false, true}) {
                        CAPTURE(ctx.num_sms);
                        CAPTURE(ctx.max_shared);
                        CAPTURE(rows);
                        CAPTURE(IC);
                        CAPTURE((int)before);
                        CAPTURE((int)after);
                        CHECK(relative_error(layer.got(ctx, before, after, with_bias, rows),
                                             layer.want(before, after, with_bias)) < tolerance<bf16>());
                    }
            }
        }
}

TEST_CASE("rows of bf16 times a matrix by tensor cores: a row has the same bits, however many there are") {
    Context ctx = both_lane_counts()[0];
    for (const int num_sms : {1, ctx.num_sms}) {
        ctx.num_sms = num_sms;
        Layer<bf16> layer(kMaxMmaRows, 768, 24);
        layer.by_mma = true;
        for (Before before : {Before::nothing, Before::layernorm}) {
            const auto all = layer.got(ctx, before, After::residual, true, kMaxMmaRows);
            for (int some : {1, 9, 17, 40})
                CHECK(same_bits(layer.got(ctx, before, After::residual, true, some),
                                std::vector<bf16>(all.begin(), all.begin() + (size_t)some * 24)));
            Context little = ctx;  // fewer weights under way, and fewer rows a block
            const bool normalize = before == Before::layernorm;
            little.max_shared = (normalize ? 60 : 40) << 10;
            CHECK(mma_pieces(little, 4, 768, normalize) < mma_pieces(ctx, 4, 768, normalize));
            CHECK(same_bits(layer.got(little, before, After::residual, true, kMaxMmaRows), all));
        }
    }
}

// fcproj of 124M has 3072 columns, and 99 KB do not hold all that a block would have under way.
TEST_CASE("GPT-2's sizes are multiplied by tensor cores on every GPU from compute capability 8.0 on") {
    Context ctx = both_lane_counts()[0];
    for (int kilobytes : {99, 163, 227})
        for (int C : {768, 1024, 1280, 1600}) {
            ctx.max_shared = (size_t)kilobytes << 10;
            CAPTURE(kilobytes);
            CAPTURE(C);
            CHECK(takes_matvec_mma<bf16>(ctx, 32, C));
        }
    CHECK(mma_pieces(ctx, 2, 3072, false) == kMmaPieces);
    ctx.max_shared = 99 << 10;
    CHECK(mma_pieces(ctx, 2, 3072, false) == kMmaPieces - 1);
    CHECK(!takes_matvec_mma<bf16>(ctx, 32, 16384));
}

TEST_CASE("a row that is too long for shared memory is not taken, and one of GPT-2's never is") {
    Context ctx = both_lane_counts().back();
    for (int kilobytes : {99, 163, 227}) {
        ctx.max_shared = (size_t)kilobytes << 10;
        CAPTURE(kilobytes);
        for (int C : {768, 1024, 1280, 1600}) CHECK(matvec_rows<float>(ctx, 4 * C, false) >= 2);
        CHECK(matvec_rows<float>(ctx, 65536, false) == 0);
        for (int IC = 8; IC <= 65536; IC += 8) {
            const int rows = matvec_rows<float>(ctx, IC, true);
            if (rows > 0) REQUIRE(matvec_shared<float>(ctx, rows, 1, IC, true) <= ctx.max_shared - 1024);
            if (rows < kMaxMatvecRows)
                REQUIRE(matvec_shared<float>(ctx, rows > 0 ? 2 * rows : 1, 1, IC, true) >
                        ctx.max_shared - 1024);
        }
    }
}

TEST_CASE("a recorded product has its shared memory where smaller ones of the same kernel came behind it") {
    Context ctx = make_context();
    const int long_row = 16384, short_row = 13000, OC = 8;  // both take more than 48 KB
    DeviceArray<float> inp(normal_values<float>(long_row, 1)),
        weight(normal_values<float>((size_t)long_row * OC, 2)), bias(normal_values<float>(OC, 3));
    DeviceArray<float> first(OC), second(OC);
    Graph graph;
    for (int run = 0; run < 3; run++) {
        graph.run(ctx, [&] {
            matvec_forward<float>(ctx, first, inp, weight, bias, {}, nullptr, false, 1, long_row, OC);
            matvec_forward<float>(ctx, second, inp, weight, bias, {}, nullptr, false, 1, short_row, OC);
        });
        CUDA_CHECK(cudaGetLastError());
        CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
    }
    CHECK(graph.recorded());
    const std::vector<double> x = to_double(inp.get()), w = to_double(weight.get()),
                              b = to_double(bias.get());
    CHECK(relative_error(first.get(), ref::matmul_forward(x, w.data(), b.data(), 1, long_row, OC)) < 1e-5);
    CHECK(relative_error(second.get(), ref::matmul_forward(ref::Vec(x.begin(), x.begin() + short_row),
                                                           w.data(), b.data(), 1, short_row, OC)) < 1e-5);
}
