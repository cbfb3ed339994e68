// The linear layer against the plain loops of reference.h: products, bias, GELU and their gradients, fused
// and in separate kernels, in fp32 and bf16, at sizes that fit no tile; the same in 8 bits, with rounding by
// the definition of FP8; and the choice between cuBLASLt's algorithms, with its file.
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <set>

#include "../llmc/files.h"
#include "../llmc/fp8.cuh"
#include "../llmc/matmul.cuh"

#include "check.h"
#include "reference.h"
#include "temp_folder.h"

using bf16 = __nv_bfloat16;

// No test shall read or write the user's own file of choices.
struct CacheFolder {
    TempFolder folder;
    CacheFolder() { setenv("XDG_CACHE_HOME", folder.path.c_str(), 1); }
};
static const CacheFolder g_cache;

// A context that times several algorithms, on the CPU too, where they are all the same one.
static Context tuned_context() {
    Context ctx = make_context();
    ctx.tune_matmuls = true;
#ifdef CUDA_CPU
    cuda_cpu::matmul_algorithms = 3;
#endif
    return ctx;
}
struct OneAlgorithmAgain {
    ~OneAlgorithmAgain() {
#ifdef CUDA_CPU
        cuda_cpu::matmul_algorithms = 1;
#endif
    }
};

static const std::array<int, 3> kSizes[] = {  // rows, IC, OC
    {1, 8, 8},
    {7, 24, 40},
    {130, 64, 192},
    {65, 768, 256},
    {257, 40, 1032}};

// Every function of matmul.cuh on one set of inputs, and what the references say.
template <class Float>
struct Layer {
    int rows, IC, OC;
    std::vector<Float> inp, w, b, dout, pre;  // pre: the argument of the GELU that inp came from
    std::vector<float> start_w, start_b;
    DeviceArray<Float> d_inp, d_w, d_b, d_dout, d_pre;

    Layer(int rows_, int IC_, int OC_)
        : rows(rows_),
          IC(IC_),
          OC(OC_),
          inp(normal_values<Float>((size_t)rows * IC, 1)),
          w(normal_values<Float>((size_t)OC * IC, 2, 0.1)),
          b(normal_values<Float>(OC, 3)),
          dout(normal_values<Float>((size_t)rows * OC, 4)),
          pre(normal_values<Float>((size_t)rows * IC, 7, 2.0)),
          start_w(normal_values<float>((size_t)OC * IC, 5)),
          start_b(normal_values<float>(OC, 6)),
          d_inp(inp),
          d_w(w),
          d_b(b),
          d_dout(dout),
          d_pre(pre) {}

    ref::Vec want_forward(bool bias) const {
        const auto w64 = to_double(w), b64 = to_double(b);
        return ref::matmul_forward(to_double(inp), w64.data(), bias ? b64.data() : nullptr, rows, IC, OC);
    }

    struct Gradients {
        std::vector<Float> dinp;
        std::vector<float> dw, db;

        bool operator==(const Gradients& o) const {
            return same_bits(dinp, o.dinp) && same_bits(dw, o.dw) && same_bits(db, o.db);
        }
        template <class T>
        static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
            return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(T));
        }
    };
    // times: how often the parameters' gradients are added
    Gradients backward(const Context& ctx, bool bias, bool gelu, int times = 1) {
        DeviceArray<Float> dinp((size_t)rows * IC);
        DeviceArray<float> dw(start_w), db(start_b), scratch(column_sum_scratch(ctx, OC));
        for (int i = 0; i < times; i++)
            if (gelu)
                matmul_gelu_backward<Float>(ctx, dinp, dw, bias ? (float*)db : nullptr,
                                            bias ? (float*)scratch : nullptr, d_dout, d_inp, d_pre, d_w, rows,
                                            IC, OC);
            else
                matmul_backward<Float>(ctx, dinp, dw, bias ? (float*)db : nullptr,
                                       bias ? (float*)scratch : nullptr, d_dout, d_inp, d_w, rows, IC, OC);
        return {dinp.get(), dw.get(), db.get()};
    }

    void check_backward(const Context& ctx, bool bias, bool gelu, int times = 1) {
        const Gradients got = backward(ctx, bias, gelu, times);
        auto want_w = to_double(start_w), want_b = to_double(start_b);
        const auto w64 = to_double(w);
        ref::Vec want;
        for (int i = 0; i < times; i++)
            want = ref::matmul_backward(want_w.data(), bias ? want_b.data() : nullptr, to_double(dout),
                                        to_double(inp), w64.data(), rows, IC, OC);
        for (size_t i = 0; gelu && i < want.size(); i++) want[i] *= ref::gelu_slope((double)(float)pre[i]);
        CHECK(relative_error(got.dinp, want) < tolerance<Float>());
        CHECK(relative_error(got.dw, want_w) < tolerance<float>());
        CHECK(relative_error(got.db, want_b) < (bias ? tolerance<float>() : 1e-12));
    }

    void check_forward(const Context& ctx, bool bias) {
        DeviceArray<Float> out((size_t)rows * OC);
        matmul_forward<Float>(ctx, out, d_inp, d_w, bias ? (Float*)d_b : nullptr, rows, IC, OC);
        CHECK(relative_error(out.get(), want_forward(bias)) < tolerance<Float>());
    }

    void check_gelu_forward(const Context& ctx, bool bias) {
        DeviceArray<Float> out((size_t)rows * OC), x((size_t)rows * OC);
        matmul_gelu_forward<Float>(ctx, out, x, d_inp, d_w, bias ? (Float*)d_b : nullptr, rows, IC, OC);
        ref::Vec want = want_forward(bias);
        CHECK(relative_error(x.get(), want) < tolerance<Float>());
        for (double& v : want) v = ref::gelu(v);
        // GELU of an x that may have been rounded: left of zero that rounding counts more than once
        CHECK(relative_error(out.get(), want) < 2 * tolerance<Float>());
    }

    void check_all(const Context& ctx) {
        for (bool bias : {true, false}) {
            CAPTURE(bias);
            check_forward(ctx, bias);
            check_gelu_forward(ctx, bias);
            for (bool gelu : {true, false}) {
                CAPTURE(gelu);
                check_backward(ctx, bias, gelu);
            }
        }
    }
};

TEST_CASE_TEMPLATE("products, bias, GELU and their gradients, fused and in separate kernels", Float, float,
                   bf16) {
    Context ctx = make_context();
    for (bool fuse : {true, false}) {
        ctx.fuse_matmuls = fuse;
        CAPTURE(fuse);
        for (auto [rows, IC, OC] : kSizes) {
            if (kFewer && IC > 64) continue;
            CAPTURE(rows);
            Layer<Float>(rows, IC, OC).check_all(ctx);
        }
    }
}

static double norm(const std::vector<double>& v) {
    return std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
}

TEST_CASE_TEMPLATE("fused and separate kernels agree", Float, float, bf16) {
    Context fused = make_context(), separate = make_context();
    separate.fuse_matmuls = false;
    for (auto [rows, IC, OC] : kSizes) {
        CAPTURE(rows);
        Layer<Float> layer(rows, IC, OC);
        const auto a = layer.backward(fused, true, true), b = layer.backward(separate, true, true);
        // Both round to Float (u: by how much at most, where that is bf16), but epilogues work on the sum in
        // float, separate kernels on what it was rounded to: dinp is off by u and 2 u of itself. For gelu(x),
        // whose slope is below 1.13, it is u and u + 1.13 u |x| / |gelu(x)|, and x itself is off by u twice.
        const bool is_bf16 = sizeof(Float) == 2;
        const double u = tolerance<Float>();
        CHECK(relative_error(a.dinp, to_double(b.dinp)) < (is_bf16 ? 3 : 1) * u);
        CHECK(relative_error(a.dw, to_double(b.dw)) < tolerance<float>());
        CHECK(relative_error(a.db, to_double(b.db)) < tolerance<float>());
        const size_t n = (size_t)rows * OC;
        DeviceArray<Float> out(n), x(n), out2(n), x2(n);
        matmul_gelu_forward<Float>(fused, out, x, layer.d_inp, layer.d_w, layer.d_b, rows, IC, OC);
        matmul_gelu_forward<Float>(separate, out2, x2, layer.d_inp, layer.d_w, layer.d_b, rows, IC, OC);
        const auto want_x = to_double(x2.get()), want = to_double(out2.get());
        CHECK(relative_error(x.get(), want_x) < (is_bf16 ? 2 : 1) * u);
        CHECK(relative_error(out.get(), want) < (is_bf16 ? 2 + 1.13 * norm(want_x) / norm(want) : 1) * u);
    }
}

TEST_CASE_TEMPLATE("GELU's tails pass through the fused kernels", Float, float, bf16) {
    // inp = a row of extreme values times a unit matrix
    const Context ctx = make_context();
    const int n = 8;
    const std::vector<float> extreme = {-80, -10, -3, -0.5, 0, 0.5, 10, 80};
    std::vector<Float> x, unit(n * n, (Float)0.0f);
    for (float v : extreme) x.push_back((Float)v);
    for (int i = 0; i < n; i++) unit[i * n + i] = (Float)1.0f;
    DeviceArray<Float> d_x(x), d_unit(unit), out(n), pre(n), dinp(n);
    matmul_gelu_forward<Float>(ctx, out, pre, d_x, d_unit, nullptr, 1, n, n);
    const std::vector<Float> ones(n, (Float)1.0f);
    DeviceArray<Float> d_ones(ones);
    DeviceArray<float> dw(std::vector<float>(n * n, 0.0f));
    matmul_gelu_backward<Float>(ctx, dinp, dw, nullptr, nullptr, d_ones, out, d_x, d_unit, 1, n, n);
    const auto y = out.get(), slope = dinp.get();
    CHECK(largest_error(pre.get(), to_double(x)) == 0.0);
    const double unit_error = sizeof(Float) == 2 ? 1.0 / 128 : 1e-5;
    for (int i = 0; i < n; i++) {
        const double v = extreme[i], want = ref::gelu(v), want_slope = ref::gelu_slope(v);
        // cuBLASLt may compute x / 2 (1 + tanh u), of which little is left where tanh u is near -1. CUDA's
        // tanhf is good to 2 units in the last place, 2^-23 near 1 (there is no more to lose where |x| is 10:
        // |u| > 9 makes it 1), and the slope's 1 - tanh^2 to twice that.
        const double tanh_error = std::fabs(v) < 10 ? 0x1p-23 : 0, du = 0.798 * (1 + 3 * 0.044715 * v * v);
        CHECK(std::fabs((float)y[i] - want) <=
              unit_error * (std::fabs(want) + 0.01) + std::fabs(v) / 2 * tanh_error);
        CHECK(std::fabs((float)slope[i] - want_slope) <=
              unit_error * (std::fabs(want_slope) + 0.01) + (0.5 + std::fabs(v) * du) * tanh_error);
    }
}

TEST_CASE_TEMPLATE("the same product twice gives the same bits", Float, float, bf16) {
    Context ctx = make_context(), other = make_context();
    ctx.tune_matmuls = other.tune_matmuls = false;
    for (auto [rows, IC, OC] : kSizes) {
        Layer<Float> layer(rows, IC, OC);
        const auto first = layer.backward(ctx, true, true);
        for (int i = 0; i < 3; i++) CHECK(layer.backward(ctx, true, true) == first);
        CHECK(layer.backward(other, true, true) == first);
    }
}

TEST_CASE_TEMPLATE("gradients of several micro-batches are added up", Float, float, bf16) {
    const Context ctx = make_context();
    Layer<Float>(130, 64, 192).check_backward(ctx, true, false, 4);
    Layer<Float>(130, 64, 192).check_backward(ctx, true, true, 4);
}

// ---------------------------------------------------------------------------------------------------------
// 8 bits

// FP8 by its definition: the numbers that are not negative, at the places of their codes.
static std::vector<double> fp8_numbers(__nv_fp8_interpretation_t format) {
    const int mantissa_bits = format == __NV_E4M3 ? 3 : 2, bias = format == __NV_E4M3 ? 7 : 15;
    const int count = format == __NV_E4M3 ? 0x7f : 0x7c;  // E4M3 has one NaN at the end, E5M2 infinity first
    std::vector<double> numbers;
    for (int code = 0; code < count; code++) {
        const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
        numbers.push_back(exponent == 0
                              ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                              : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits));
    }
    return numbers;
}

// What fp8_round() is to make of x [R,C], in double.
struct Rounded {
    std::vector<uint8_t> codes;
    double inverse = 1;  // of the scale
    ref::Vec values;     // codes times that

    template <class T>
    Rounded(__nv_fp8_interpretation_t format, const std::vector<T>& x) {
        const std::vector<double> numbers = fp8_numbers(format);
        double most = 0;
        for (const T& v : x) most = std::max(most, std::fabs((double)(float)v));
        double scale = 1;
        while (most > 0 && most * scale > numbers.back()) scale /= 2;
        while (most > 0 && most * scale * 2 <= numbers.back()) scale *= 2;
        inverse = 1 / scale;
        for (const T& v : x) {
            const double magnitude = std::fabs((double)(float)v) * scale;
            size_t code = std::upper_bound(numbers.begin(), numbers.end(), magnitude) - numbers.begin() - 1;
            if (code + 1 < numbers.size()) {
                const double below = magnitude - numbers[code], above = numbers[code + 1] - magnitude;
                if (above < below || (above == below && code % 2 == 1)) code++;
            }
            codes.push_back((uint8_t)(code | (std::signbit((float)v) ? 0x80 : 0)));
            values.push_back(std::copysign(numbers[code], (double)(float)v) * inverse);
        }
    }
};

// Device memory of the operands in 8 bits.
struct Fp8Memory {
    DeviceArray<uint8_t> a, b, b_t;
    DeviceArray<Fp8Scale> scales{3};
    explicit Fp8Memory(size_t n) : a(n), b(n), b_t(n) {}
    operator Fp8Buffers() { return {a, b, b_t, scales}; }
};

template <__nv_fp8_interpretation_t FORMAT>
static void check_rounding(const std::vector<bf16>& x, int R, int C) {
    const Rounded want(FORMAT, x);
    DeviceArray<bf16> d_x(x);
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(ctx.row_lanes);
        DeviceArray<uint8_t> q(x.size()), q_t(x.size()), only_t(x.size());
        DeviceArray<Fp8Scale> scale(1), scale_t(1);
        fp8_round<FORMAT>(ctx, q, q_t, scale, d_x, R, C);
        fp8_round<FORMAT>(ctx, nullptr, only_t, scale_t, d_x, R, C);
        const std::vector<uint8_t> got = q.get(), got_t = q_t.get();
        CHECK(got == want.codes);
        CHECK(only_t.get() == got_t);
        CHECK(scale.get()[0].inverse == want.inverse);
        size_t wrong = 0;
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) wrong += got_t[(size_t)c * R + r] != got[(size_t)r * C + c];
        CHECK(wrong == 0);
    }
}

TEST_CASE("more rows are rounded than a grid's second dimension has tiles") {
    if (kFewer) return;  // 67 million numbers
    const int C = 16, R = 65536 * kFp8Tile;
    const Context ctx = make_context();
    std::vector<bf16> x((size_t)R * C, (bf16)1.0f);
    x.back() = (bf16)-2.0f;
    DeviceArray<bf16> d_x(x);
    DeviceArray<uint8_t> q(x.size());
    DeviceArray<Fp8Scale> scale(1);
    fp8_round<__NV_E4M3>(ctx, q, nullptr, scale, d_x, R, C);
    const std::vector<uint8_t> got = q.get();
    CHECK(scale.get()[0].inverse == 0x1p-7f);  // 2 becomes 256, the largest power of two that there is
    CHECK((size_t)std::count(got.begin(), got.end(), 0x70) == got.size() - 1);
    CHECK(got.back() == 0xf8);
}

TEST_CASE("every bf16 number is rounded to the nearest of 8 bits, a tie to the even one") {
    // All of them up to the format's largest number, which makes the scale 1, or 2^-20, 2^20 and so on; more
    // than half of the places hold numbers that round to zero.
    for (int shift : {0, 20, -20, 90}) {
        CAPTURE(shift);
        for (const double largest : {448.0, 57344.0}) {
            std::vector<bf16> x;
            for (unsigned bits = 0; bits < 1u << 16; bits++) {
                const auto v = std::bit_cast<float>(bits << 16);
                const bool fits = std::fabs(v) <= largest && std::fabs(v) >= 0x1p-100f;
                x.push_back((bf16)(fits ? std::ldexp(v, shift) : 0.0f));
            }
            if (largest == 448.0)
                check_rounding<__NV_E4M3>(x, 256, 256);
            else
                check_rounding<__NV_E5M2>(x, 256, 256);
        }
    }
}

TEST_CASE("the scale is the largest power of two that the format has room for") {
    for (const auto& [most, inverse] : std::initializer_list<std::pair<float, float>>{
             {448.0f, 1.0f}, {450.0f, 2.0f}, {224.0f, 0.5f}, {1.0f, 0x1p-8f}, {0x1p100f, 0x1p92f}}) {
        CAPTURE(most);
        std::vector<bf16> x(256, (bf16)0.0f);
        x[100] = (bf16)-most;
        CHECK(Rounded(__NV_E4M3, x).inverse == inverse);
        check_rounding<__NV_E4M3>(x, 16, 16);
        check_rounding<__NV_E5M2>(x, 16, 16);
    }
}

TEST_CASE("matrices of all shapes, and their transposes") {
    for (auto [R, C] :
         std::initializer_list<std::array<int, 2>>{{16, 16}, {16, 208}, {80, 48}, {144, 64}, {64, 192}}) {
        CAPTURE(R);
        check_rounding<__NV_E4M3>(normal_values<bf16>((size_t)R * C, 1, 0.02), R, C);
        check_rounding<__NV_E5M2>(normal_values<bf16>((size_t)R * C, 2, 1e-6), R, C);
    }
}

static const std::array<int, 3> kFp8Sizes[] = {{16, 16, 16}, {48, 80, 32}, {144, 64, 208}};

TEST_CASE("a linear layer in 8 bits is the product of what its operands were rounded to") {
    const Context ctx = make_context();
    for (auto [rows, IC, OC] : kFp8Sizes) {
        CAPTURE(rows);
        Layer<bf16> l(rows, IC, OC);
        Fp8Memory f(std::max({(size_t)rows * IC, (size_t)rows * OC, (size_t)IC * OC}));
        const Rounded inp(__NV_E4M3, l.inp), w(__NV_E4M3, l.w), dout(__NV_E5M2, l.dout);
        const auto b64 = to_double(l.b);
        const ref::Vec want = ref::matmul_forward(inp.values, w.values.data(), b64.data(), rows, IC, OC);

        DeviceArray<bf16> out((size_t)rows * OC), x((size_t)rows * OC);
        linear_forward<bf16>(ctx, f, out, l.d_inp, l.d_w, l.d_b, rows, IC, OC);
        CHECK(relative_error(out.get(), want) < tolerance<bf16>());
        // and it is 8 bits that were multiplied: the error against the layer itself is that of 4 of them
        const double error = relative_error(out.get(), l.want_forward(true));
        CHECK(error > 1.0 / 256);
        CHECK(error < 1.0 / 16);
        linear_gelu_forward<bf16>(ctx, f, out, x, l.d_inp, l.d_w, l.d_b, rows, IC, OC);
        ref::Vec after = want;
        for (double& v : after) v = ref::gelu(v);
        CHECK(relative_error(x.get(), want) < tolerance<bf16>());
        CHECK(relative_error(out.get(), after) < 2 * tolerance<bf16>());

        for (bool gelu : {false, true}) {
            CAPTURE(gelu);
            DeviceArray<bf16> dinp((size_t)rows * IC);
            DeviceArray<float> dw(l.start_w), db(l.start_b), scratch(column_sum_scratch(ctx, OC));
            auto want_w = to_double(l.start_w), want_b = to_double(l.start_b), unrounded_b = want_b;
            ref::Vec want_inp;
            for (int i = 0; i < 2; i++) {  // two micro-batches: parameters' gradients are added up
                if (gelu)
                    linear_gelu_backward<bf16>(ctx, f, dinp, dw, db, scratch, l.d_dout, l.d_inp, l.d_pre,
                                               l.d_w, rows, IC, OC);
                else
                    linear_backward<bf16>(ctx, f, dinp, dw, db, scratch, l.d_dout, l.d_inp, l.d_w, rows, IC,
                                          OC);
                want_inp = ref::matmul_backward(want_w.data(), want_b.data(), dout.values, inp.values,
                                                w.values.data(), rows, IC, OC);
                ref::Vec dw_again(want_w.size());
                ref::matmul_backward(dw_again.data(), unrounded_b.data(), to_double(l.dout), inp.values,
                                     w.values.data(), rows, IC, OC);
            }
            for (size_t i = 0; gelu && i < want_inp.size(); i++)
                want_inp[i] *= ref::gelu_slope((double)(float)l.pre[i]);
            // with GELU the gradient is rounded once more on the way
            CHECK(relative_error(dinp.get(), want_inp) < (gelu ? 2 : 1) * tolerance<bf16>());
            // A tensor core keeps 14 bits of its sums, which it cuts off: 2^-13 for each of the (at most
            // five) times that 32 products come to a sum.
            CHECK(relative_error(dw.get(), want_w) < (kOnCpu ? tolerance<float>() : 5 * 0x1p-13));
            CHECK(relative_error(db.get(), unrounded_b) < tolerance<float>());
        }
    }
}

TEST_CASE("8 bits: each layer's backward uses the scales that its own forward found") {
    const Context ctx = make_context();
    const int rows = 48, IC = 80, OC = 32;
    Layer<bf16> first(rows, IC, OC);
    Fp8Memory memory((size_t)rows * IC + (size_t)IC * OC);
    DeviceArray<Fp8Scale> scales(1 + 2 * 2);
    Fp8Buffers two = memory;
    two.scales = scales;
    std::vector<bf16> larger_inp, larger_w;
    for (bf16 x : first.inp) larger_inp.push_back((bf16)(1024.0f * (float)x));
    for (bf16 x : first.w) larger_w.push_back((bf16)(64.0f * (float)x));
    DeviceArray<bf16> d_larger_inp(larger_inp), d_larger_w(larger_w), out((size_t)rows * OC);
    const auto forward = [&](const Fp8Buffers& f, bool larger) {
        linear_forward<bf16>(ctx, f, out, larger ? d_larger_inp : first.d_inp,
                             larger ? d_larger_w : first.d_w, first.d_b, rows, IC, OC);
    };
    const auto backward = [&](const Fp8Buffers& f) {
        DeviceArray<bf16> dinp((size_t)rows * IC);
        DeviceArray<float> dw(first.start_w), db(first.start_b), scratch(column_sum_scratch(ctx, OC));
        linear_backward<bf16>(ctx, f, dinp, dw, db, scratch, first.d_dout, first.d_inp, first.d_w, rows, IC,
                              OC);
        return std::pair(dinp.get(), dw.get());
    };
    forward(memory, false);
    const auto alone = backward(memory);
    forward(two.of_layer(0), false);
    forward(two.of_layer(1), true);
    const auto after_another = backward(two.of_layer(0));
    CHECK(same_bits(after_another.first, alone.first));
    CHECK(same_bits(after_another.second, alone.second));
}

TEST_CASE("8 bits: the same product twice gives the same bits") {
    const Context ctx = make_context();
    const auto [rows, IC, OC] = kFp8Sizes[2];
    Layer<bf16> l(rows, IC, OC);
    Fp8Memory f((size_t)rows * OC);
    std::vector<bf16> first;
    for (int i = 0; i < 3; i++) {
        DeviceArray<bf16> out((size_t)rows * OC);
        linear_forward<bf16>(ctx, f, out, l.d_inp, l.d_w, l.d_b, rows, IC, OC);
        if (i == 0) first = out.get();
        CHECK(same_bits(out.get(), first));
    }
}

TEST_CASE("8 bits: without buffers, or with rows that do not fit, the layer is matmul.cuh's") {
    const Context ctx = make_context();
    for (const int rows : {48, 47}) {
        CAPTURE(rows);
        const int IC = 80, OC = 32;
        Layer<bf16> l(rows, IC, OC);
        Fp8Memory memory((size_t)rows * IC + (size_t)IC * OC);
        const Fp8Buffers f = rows == 48 ? Fp8Buffers{} : (Fp8Buffers)memory;
        DeviceArray<bf16> out((size_t)rows * OC), plain((size_t)rows * OC);
        linear_forward<bf16>(ctx, f, out, l.d_inp, l.d_w, l.d_b, rows, IC, OC);
        matmul_forward<bf16>(ctx, plain, l.d_inp, l.d_w, l.d_b, rows, IC, OC);
        CHECK(same_bits(out.get(), plain.get()));
        DeviceArray<bf16> dinp((size_t)rows * IC);
        DeviceArray<float> dw(l.start_w), db(l.start_b), scratch(column_sum_scratch(ctx, OC));
        linear_backward<bf16>(ctx, f, dinp, dw, db, scratch, l.d_dout, l.d_inp, l.d_w, rows, IC, OC);
        const auto want = l.backward(ctx, true, false);
        CHECK(same_bits(dinp.get(), want.dinp));
        CHECK(same_bits(dw.get(), want.dw));
        CHECK(same_bits(db.get(), want.db));
    }
}

TEST_CASE("8 bits: nothing but zeros, and numbers that are none") {
    const Context ctx = make_context();
    const int n = 16;
    const std::vector<bf16> zeros(n * n, (bf16)0.0f), b = normal_values<bf16>(n, 1);
    DeviceArray<bf16> d_w(normal_values<bf16>(n * n, 2)), d_b(b), out(n * n);
    Fp8Memory f(n * n);
    {
        DeviceArray<bf16> d_zeros(zeros);
        linear_forward<bf16>(ctx, f, out, d_zeros, d_w, d_b, n, n, n);
        const auto got = out.get();
        for (int i = 0; i < n * n; i++) CHECK((float)got[i] == (float)b[i % n]);
    }
    for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
        CAPTURE(bad);
        std::vector<bf16> x = normal_values<bf16>(n * n, 3);
        x[77] = (bf16)bad;
        DeviceArray<bf16> d_x(x);
        linear_forward<bf16>(ctx, f, out, d_x, d_w, d_b, n, n, n);
        bool all = true;
        for (const bf16& v : out.get()) all = all && std::isnan((float)v);
        CHECK(all);  // a training run sees it whatever it does to the rest
    }
}

// ---------------------------------------------------------------------------------------------------------
// the choice of an algorithm

TEST_CASE_TEMPLATE("timing the algorithms changes no result, and its choices last", Float, float, bf16) {
    const OneAlgorithmAgain at_the_end;
    const TempFolder folder;
    setenv("XDG_CACHE_HOME", folder.path.c_str(), 1);
    const Context ctx = tuned_context();
    for (auto [rows, IC, OC] : {kSizes[1], kSizes[2]}) {
        CAPTURE(rows);
        Layer<Float> layer(rows, IC, OC);
        layer.check_all(ctx);  // the first product of each kind is timed
        layer.check_all(ctx);
    }
    const std::string made_on = matmul_timings_made_on(), path = matmul_choices_path(made_on);
    REQUIRE(is_file(path));
    const std::string file = read_text(path);

    // another run takes the same algorithms from the file, and computes the same bits
    const Context again = tuned_context();
    for (auto [rows, IC, OC] : {kSizes[1], kSizes[2]}) {
        Layer<Float> layer(rows, IC, OC);
        layer.check_all(again);
        CHECK(layer.backward(again, true, true) == layer.backward(ctx, true, true));
    }
    CHECK(matmul_report(again) == matmul_report(ctx));
    CHECK(read_text(path) == file);  // nothing was timed

    // a file that names algorithms that do not exist, or is no file of choices, costs timing anew
    MatmulChoices wrong = read_matmul_choices(path, made_on);
    CHECK(wrong.size() > 8);
    for (auto& [product, choice] : wrong) choice.algorithm.fill(12345);
    write_matmul_choices(path, made_on, wrong);
    for (const std::string& text : {read_text(path), std::string(), file.substr(0, file.size() / 2)}) {
        write_text(path, text);
        const Context third = tuned_context();
        Layer<Float>(7, 24, 40).check_all(third);
        const MatmulChoices now = read_matmul_choices(path, made_on);
        for (const auto& [product, plan] : third.matmuls->plans) {
            CHECK(plan.choice.us > 0);
            CHECK(plan.choice.algorithm[0] != 12345);
            REQUIRE(now.contains(describe(product)));
            CHECK(now.at(describe(product)).algorithm == plan.choice.algorithm);
        }
    }
    setenv("XDG_CACHE_HOME", g_cache.folder.path.c_str(), 1);
}

TEST_CASE_TEMPLATE("separate kernels where they were measured to be faster", Float, float, bf16) {
    const OneAlgorithmAgain at_the_end;
    const TempFolder folder;
    setenv("XDG_CACHE_HOME", folder.path.c_str(), 1);
    Layer<Float>(130, 64, 192).check_all(tuned_context());
    const std::string made_on = matmul_timings_made_on(), path = matmul_choices_path(made_on);
    for (bool separate : {true, false}) {
        MatmulChoices choices = read_matmul_choices(path, made_on);
        for (auto& [product, choice] : choices)
            if (choice.separate_us > 0) choice.separate_us = separate ? choice.us / 2 : choice.us * 2;
        write_matmul_choices(path, made_on, choices);
        const Context ctx = tuned_context();
        Layer<Float>(130, 64, 192).check_all(ctx);
        size_t fused = 0, in_steps = 0;
        for (const auto& [product, plan] : ctx.matmuls->plans) {
            if (product.epilogue == CUBLASLT_EPILOGUE_DEFAULT || product.epilogue == CUBLASLT_EPILOGUE_BIAS)
                continue;
            (plan.separate ? in_steps : fused)++;
        }
        CHECK((separate ? in_steps : fused + in_steps) >= 4);  // 2 GELU forward, GELU backward, bias gradient
        CHECK((separate ? fused : 0) == 0);
        CHECK((matmul_report(ctx).find("separate kernels, ") != std::string::npos) == (in_steps > 0));
    }
    setenv("XDG_CACHE_HOME", g_cache.folder.path.c_str(), 1);
}

TEST_CASE("a cache folder that cannot be written, and none at all, are no errors") {
    const OneAlgorithmAgain at_the_end;
    const TempFolder folder;
    write_text(folder / "file", "in the way");
    setenv("XDG_CACHE_HOME", (folder / "file").c_str(), 1);
    Layer<float>(7, 24, 40).check_all(tuned_context());
    CHECK(read_text(folder / "file") == "in the way");
    setenv("XDG_CACHE_HOME", "not/absolute", 1);
    const std::string home = getenv("HOME") ? getenv("HOME") : "";
    unsetenv("HOME");
    Layer<float>(7, 24, 40).check_all(tuned_context());
    if (!home.empty()) setenv("HOME", home.c_str(), 1);
    setenv("XDG_CACHE_HOME", g_cache.folder.path.c_str(), 1);
}

TEST_CASE("where the file of choices lies") {
    setenv("XDG_CACHE_HOME", "/x", 1);
    const std::string path = matmul_choices_path("device 1");
    CHECK(path.starts_with("/x/condensed_gpt2/matmul_"));
    CHECK(path.ends_with(".json"));
    CHECK(path == matmul_choices_path("device 1"));
    CHECK(path != matmul_choices_path("device 2"));
    const std::string home = getenv("HOME") ? getenv("HOME") : "";
    setenv("HOME", "/h", 1);
    for (const char* ignored : {"", "relative"}) {
        setenv("XDG_CACHE_HOME", ignored, 1);
        CHECK(matmul_choices_path("device 1").starts_with("/h/.cache/condensed_gpt2/"));
    }
    unsetenv("HOME");
    CHECK(matmul_choices_path("device 1") == "");
    if (!home.empty()) setenv("HOME", home.c_str(), 1);
    setenv("XDG_CACHE_HOME", g_cache.folder.path.c_str(), 1);
}

TEST_CASE("choices are read as they were written, and nothing else is taken for one") {
    const TempFolder folder;
    const std::string path = folder / "new/folder/choices.json";
    MatmulChoices choices;
    choices["fast"] = {{66, 20, 36, 2, 4, 1, 0, 3, 65535}, 12.5f, 13.25f, 0};
    choices["cut"] = {{11, 0, 0, -1, 2, 0, 1, 0, 0}, 3.25f, 3.5f, 0};
    choices["slow"] = {{0, 0, 0, 0, 0, 0, 0, 0, 0}, 900.0f, 0, 800.0f};
    write_matmul_choices(path, "GPU 1", choices);
    const auto same = [](const MatmulChoices& a, const MatmulChoices& b) {
        return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](auto& x, auto& y) {
                   return x.first == y.first && x.second.algorithm == y.second.algorithm &&
                          x.second.us == y.second.us && x.second.guess_us == y.second.guess_us &&
                          x.second.separate_us == y.second.separate_us;
               });
    };
    const MatmulChoices back = read_matmul_choices(path, "GPU 1");
    CHECK(same(back, choices));
    CHECK(back.at("slow").separate());
    CHECK_FALSE(back.at("fast").separate());
    CHECK(read_matmul_choices(path, "GPU 2").empty());
    CHECK(read_matmul_choices(folder / "none.json", "GPU 1").empty());
    CHECK(read_matmul_choices(folder.path, "GPU 1").empty());

    const std::string good = read_text(path);
    for (size_t size = 0; size + 2 < good.size(); size++) {  // the last two: the brace and the newline
        write_text(path, good.substr(0, size));
        CHECK(read_matmul_choices(path, "GPU 1").empty());
    }
    const std::string one =
        R"({"algorithm": [1, 2, 3, 4, 5, 6, 7, 8, 9], "us": 1, "guess_us": 1, "separate_us": 0})";
    const auto read = [&](const std::string& entry) {
        write_text(path, R"({"made_on": "GPU 1", "products": {"p": )" + entry + ", \"q\": " + one + "}}");
        const MatmulChoices found = read_matmul_choices(path, "GPU 1");
        CHECK(found.contains("q"));  // the rest is still good
        return found.contains("p");
    };
    CHECK(read(one));
    const std::pair<const char*, const char*> changes[] = {{"9]", "-2147483649]"},
                                                           {"9]", "18446744073709551615]"},
                                                           {"9]", "9, 10]"},
                                                           {", 9]", "]"},
                                                           {"9]", "4294967296]"},
                                                           {"9]", "0.5]"},
                                                           {"9]", "\"9\"]"},
                                                           {"9]", "null]"},
                                                           {"algorithm", "logarithm"},
                                                           {"\"us\": 1", "\"us\": 0"},
                                                           {"\"us\": 1", "\"us\": -1"},
                                                           {"\"us\": 1", "\"us\": 1e300"},
                                                           {"\"us\": 1", "\"us\": true"},
                                                           {"\"guess_us\": 1", "\"guess_us\": null"},
                                                           {"\"separate_us\": 0", "\"separate_us\": -1"},
                                                           {"\"separate_us\": 0", "\"x\": 0"}};
    for (const auto& [from, to] : changes) {
        std::string bad = one;
        bad.replace(bad.find(from), strlen(from), to);
        CAPTURE(bad);
        CHECK_FALSE(read(bad));
    }
    for (const char* bad : {"null", "[]", "7", "\"text\"", "{}"}) CHECK_FALSE(read(bad));
    for (const char* text : {R"({"made_on": "GPU 1"})", R"({"made_on": "GPU 1", "products": []})",
                             R"({"made_on": ["GPU 1"], "products": {}})", R"({"products": {}})"}) {
        write_text(path, text);
        CHECK(read_matmul_choices(path, "GPU 1").empty());
    }
}

TEST_CASE("the fastest, and of equals the first") {
    CHECK(fastest({3.0f}) == 0);
    CHECK(fastest({3.0f, 2.0f, 1.0f, 2.0f}) == 2);
    CHECK(fastest({1.005f, 1.0f}) == 0);
    CHECK(fastest({INFINITY, 1.005f, 1.0f}) == 1);
    CHECK(fastest({1.02f, 1.0f}) == 1);
}

TEST_CASE("a candidate that cannot run is not chosen, and each is timed") {
    const Context ctx = make_context();
    std::array<int, 3> calls{};
    const auto us = least_us(ctx, 3, [&](size_t i) {
        calls[i]++;
        return i != 1;
    });
    CHECK(std::isinf(us[1]));
    CHECK(calls[1] == 1);
    CHECK(calls[0] > 2);
    CHECK(fastest(us) != 1);
    CHECK(us[fastest(us)] < 1e6f);
    for (float none : least_us(ctx, 2, [](size_t) { return false; })) CHECK(std::isinf(none));
}

TEST_CASE("every product has its own name in the file") {
    std::set<std::string> names;
    size_t count = 0;
    for (auto type : {CUDA_R_32F, CUDA_R_16BF, CUDA_R_8F_E4M3, CUDA_R_8F_E5M2})
        for (auto out : {CUDA_R_32F, CUDA_R_16BF})
            for (auto op : {CUBLAS_OP_N, CUBLAS_OP_T})
                for (bool accumulate : {false, true})
                    for (auto epilogue :
                         {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
                          CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_BGRADB})
                        for (auto [m, n, k] : std::initializer_list<std::array<int, 3>>{
                                 {8, 16, 24}, {16, 8, 24}, {8, 24, 16}, {8, 162, 4}}) {
                            names.insert(
                                describe({type, type, out, op, CUBLAS_OP_N, m, n, k, accumulate, epilogue}));
                            names.insert(
                                describe({type, type, out, op, CUBLAS_OP_T, m, n, k, accumulate, epilogue}));
                            count += 2;
                        }
    CHECK(names.size() == count);
}
