// Attention with the top-k regularizer, forward and backward, against the plain loops of reference.h: fp32
// and bf16, T off every tile, head sizes on and off 32, 64 and 128, k from 1 to beyond T, equal scores.
#include "../llmc/attention.cuh"
#include "check.h"
#include "reference.h"
#ifdef USE_CUDNN
#include "attention_cudnn_cases.h"
#endif

using bf16 = __nv_bfloat16;

struct Shape {
    int B, T, NH, hs, k;
};

// What there is: in bf16 the kernels for Hopper, too, which the CPU backend can run as any Hopper can.
template <class Float>
std::vector<Context> contexts() {
    std::vector<Context> variants = {make_context()};
    if (sizeof(Float) == 2 && (kOnCpu || variants[0].use_wgmma)) {
        variants.push_back(variants[0]);
        variants[0].use_wgmma = false;
        variants[1].use_wgmma = true;
    }
    return variants;
}

template <class Float>
struct Run {
    std::vector<Float> out, dqkv;
    std::vector<float> dbias, lse, theta, mass, tie, mean_score;

    double entropy(size_t row) const { return (double)lse[row] - (double)mean_score[row]; }
};

// What the gradient of qkv's bias is before the backward adds to it.
std::vector<float> bias_gradient_before(Shape s) {
    return normal_values<float>((size_t)3 * s.NH * s.hs, 98);
}

template <class Float>
Run<Float> run(const Context& ctx, const std::vector<Float>& qkv, const std::vector<Float>& dout, Shape s,
               Reg reg, float weight) {
    const int C = s.NH * s.hs, rows = s.B * s.NH * s.T;
    DeviceArray<Float> d_qkv(qkv), d_dout(dout), out((size_t)s.B * s.T * C), dqkv((size_t)s.B * s.T * 3 * C);
    DeviceArray<float> lse(rows), theta(rows), mass(rows), tie(rows), mean_score(rows);
    DeviceArray<float> scratch(attention_backward_scratch<Float>(ctx, s.B, s.T, s.NH, s.hs));
    DeviceArray<float> d_weight(std::vector<float>{weight}), dbias(bias_gradient_before(s));
    const AttentionRows saved{lse, theta, mass, tie, mean_score};
    attention_forward<Float>(ctx, out, saved, d_qkv, s.B, s.T, s.NH, s.hs, s.k);
    if (reg == Reg::entropy) attention_mean_scores<Float>(ctx, saved, d_qkv, s.B, s.T, s.NH, s.hs);
    attention_backward<Float>(ctx, dqkv, dbias, scratch, d_dout, out, d_qkv, saved, reg,
                              weight != 0.0f ? (float*)d_weight : nullptr, s.B, s.T, s.NH, s.hs, s.k);
    return {out.get(),   dqkv.get(), dbias.get(), lse.get(),
            theta.get(), mass.get(), tie.get(),   mean_score.get()};
}

template <class Float>
void check_against_reference(const Context& ctx, const std::vector<Float>& qkv, Shape s, Reg reg,
                             float weight) {
    CAPTURE(ctx.use_wgmma);
    CAPTURE(s.T);
    CAPTURE(s.hs);
    CAPTURE(s.k);
    const int C = s.NH * s.hs;
    const auto dout = normal_values<Float>((size_t)s.B * s.T * C, 99);
    const Run<Float> got = run(ctx, qkv, dout, s, reg, weight);
    const ref::Attention want = ref::attention_forward(to_double(qkv), s.B, s.T, s.NH, s.hs, s.k, reg);
    CHECK(relative_error(got.out, want.out) < tolerance<Float>());
    CHECK(relative_error(got.lse, want.lse) < tolerance<float>());
    if (reg == Reg::entropy) {
        std::vector<double> entropy;
        for (size_t row = 0; row < got.lse.size(); row++) entropy.push_back(got.entropy(row));
        CHECK(relative_error(entropy, want.entropy) < tolerance<float>());
    }
    if (s.k > 0) {
        CHECK(relative_error(got.mass, want.mass) < tolerance<float>());
        for (size_t row = 0; row < got.theta.size(); row++) {
            const bool short_row = (int)row % s.T + 1 <= s.k;
            if (short_row) {
                CHECK(got.theta[row] == -INFINITY);
                CHECK(got.mass[row] == 1.0f);
            } else {  // theta lies between the two scores, and a little rounding above or below them
                const double slack = 1e-5 * (1 + std::fabs(want.kth[row]));
                CHECK((double)got.theta[row] <= want.kth[row] + slack);
                CHECK((double)got.theta[row] >= want.next[row] - slack);
            }
        }
    }
    const std::vector<double> out = to_double(got.out);
    const auto want_d = ref::attention_backward(to_double(dout), to_double(qkv), s.B, s.T, s.NH, s.hs, s.k,
                                                reg, weight, sizeof(Float) == 2 ? &out : nullptr);
    for (int which : {0, 1, 2}) {
        CAPTURE(which);
        CHECK(relative_error(part(got.dqkv, which, C), part(want_d, which, C)) < tolerance<Float>());
    }
    // Not for each of q, k and v: that of k is zero, for a row's ds add up to zero.
    std::vector<double> dbias = to_double(bias_gradient_before(s));
    for (size_t i = 0; i < want_d.size(); i++) dbias[i % (3 * C)] += want_d[i];
    CHECK(relative_error(got.dbias, dbias) < tolerance<Float>());
}

TEST_CASE_TEMPLATE("awkward sizes, all kinds of regularizer", Float, float, bf16) {
    const std::vector<Context> variants = contexts<Float>();
    const Shape shapes[] = {{1, 1, 1, 64, 1},    {1, 2, 1, 64, 1},    {2, 3, 2, 64, 2},
                            {1, 63, 2, 64, 8},   {1, 64, 1, 64, 8},   {2, 65, 2, 64, 8},
                            {1, 129, 1, 64, 1},  {1, 200, 2, 64, 64}, {2, 70, 3, 8, 4},
                            {1, 100, 2, 32, 16}, {1, 90, 2, 40, 5},   {1, 77, 1, 96, 8},
                            {1, 130, 2, 128, 8}, {1, 33, 1, 128, 33}, {1, 40, 1, 64, 1000}};
    for (const Shape& s : shapes)
        for (Reg reg : {Reg::tail, Reg::kl, Reg::entropy}) {
            // but for a factor kl is tail; several tiles and a head of each padded size remain
            if (kFewer && (reg == Reg::kl || s.T > 129 || s.B > 1)) continue;
            if (kFewer && reg == Reg::entropy && s.T != 129) continue;
            // weight 0.5: as large as dout's part, so that neither hides the other
            const auto qkv = normal_values<Float>((size_t)s.B * s.T * 3 * s.NH * s.hs, 7);
            for (const Context& ctx : variants)
                if (!ctx.use_wgmma || s.hs == 64) check_against_reference<Float>(ctx, qkv, s, reg, 0.5f);
        }
}

TEST_CASE_TEMPLATE("with 99 KB of shared memory, as compute capability 8.6, 8.9 and 12.x have it", Float,
                   float, bf16) {
    Context ctx = make_context();
    ctx.use_wgmma = false;
    ctx.max_shared = std::min<size_t>(ctx.max_shared, 99 << 10);
    for (int hs : {8, 32, 40, 64, 72, 128}) {
        CAPTURE(hs);
        for (const Shape& s : {Shape{1, 70, 1, hs, 8}, Shape{2, 300, 2, hs, 8}})
            if (!kFewer || s.T == 70)
                check_against_reference<Float>(
                    ctx, normal_values<Float>((size_t)s.B * s.T * 3 * s.NH * hs, 17), s, Reg::tail, 0.5f);
    }
}

TEST_CASE_TEMPLATE("without the regularizer, and without tracking", Float, float, bf16) {
    for (const Context& ctx : contexts<Float>())
        for (int k : {0, 8})
            check_against_reference<Float>(ctx, normal_values<Float>(100 * 3 * 128, 3), {1, 100, 2, 64, k},
                                           Reg::tail, 0.0f);
}

TEST_CASE("entropy: from one key that takes all to all scores equal, where its gradient is zero") {
    const Context ctx = make_context();
    const int T = 140, hs = 64;
    const Shape s{1, T, 1, hs, 8};
    for (float scale : {0.0f, 1e-3f, 3.0f, 30.0f}) {
        CAPTURE(scale);
        auto qkv = normal_values<float>(T * 3 * hs, 51);
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) qkv[t * 3 * hs + d] *= scale;
        const auto got = run<float>(ctx, qkv, std::vector<float>(T * hs, 0.0f), s, Reg::entropy, 1.0f);
        const auto want = ref::attention_forward(to_double(qkv), 1, T, 1, hs, 8, Reg::entropy);
        // a score of size S carries a rounding error of about S 6e-8, and exp turns it into a relative one
        const double largest = *std::max_element(want.lse.begin(), want.lse.end());
        const double bound = tolerance<float>() * (1 + largest / 10);
        for (int i = 0; i < T; i++) {
            CHECK(std::fabs(got.entropy(i) - want.entropy[i]) < bound * (1 + want.entropy[i]));
            if (scale == 0.0f) CHECK(got.mean_score[i] == 0.0f);
        }
        const auto want_d = ref::attention_backward(std::vector<double>(T * hs, 0.0), to_double(qkv), 1, T, 1,
                                                    hs, 8, Reg::entropy, 1.0);
        if (scale > 0.0f)
            CHECK(relative_error(got.dqkv, want_d) < bound);
        else  // each key's share of p (log p + H): zero but for rounding, against terms of about log(n) / n
            CHECK(largest_error(got.dqkv, want_d) < 1e-5);
    }
}

TEST_CASE_TEMPLATE("k beyond the list that a thread keeps: selected by a kernel of its own", Float, float,
                   bf16) {
    for (const Context& ctx : contexts<Float>())
        for (int k : {65, 99, 149, 150, 151}) {
            if (kFewer && k != 150) continue;
            check_against_reference<Float>(ctx, normal_values<Float>(2 * 150 * 3 * 64, 4), {2, 150, 1, 64, k},
                                           Reg::kl, 0.5f);
        }
}

TEST_CASE("the list and the selection agree on theta, mass and ties, bit for bit where they must") {
    const Context ctx = make_context();
    const int T = 200, hs = 64, rows = T;
    const auto qkv = normal_values<float>(T * 3 * hs, 5);
    DeviceArray<float> d_qkv(qkv), out(T * hs);
    for (int k : {1, 7, 64}) {
        DeviceArray<float> lse(rows), theta(rows), mass(rows), tie(rows), theta2(rows), mass2(rows),
            tie2(rows);
        attention_forward<float>(ctx, out, {lse, theta, mass, tie}, d_qkv, 1, T, 1, hs, k);
        launch_attention(ctx, attention_select_kernel<float>, dim3(T, 1), 128, T * sizeof(float),
                         AttentionRows{lse, theta2, mass2, tie2}, (const float*)d_qkv, T, 1, hs, k);
        CHECK(theta.get() == theta2.get());
        CHECK(tie.get() == tie2.get());
        CHECK(relative_error(mass.get(), to_double(mass2.get())) < 1e-6);
    }
}

// Keys drawn from a few, so that scores repeat exactly; the products of small integers are exact in fp32 and
// bf16.
template <class Float>
std::vector<Float> tied_qkv(int T, int hs, int distinct) {
    auto qkv = normal_values<Float>((size_t)T * 3 * hs, 11);
    const auto small = random_ints((size_t)T * hs, 3, 12);
    for (int t = 0; t < T; t++)
        for (int d = 0; d < hs; d++) {
            qkv[(size_t)t * 3 * hs + d] = (Float)(float)(small[t * hs + d] - 1);
            qkv[(size_t)t * 3 * hs + hs + d] = (Float)(float)(small[(t % distinct) * hs + d] - 1);
        }
    return qkv;
}

TEST_CASE_TEMPLATE("equal scores: tied keys share the places that are left", Float, float, bf16) {
    for (const Context& ctx : contexts<Float>())
        for (int distinct : {2, 5, 30})
            for (int k : {1, 3, 8, 64, 70}) {
                if (kFewer && (distinct != 5 || (k != 3 && k != 70))) continue;
                check_against_reference<Float>(ctx, tied_qkv<Float>(100, 64, distinct), {1, 100, 1, 64, k},
                                               Reg::kl, 0.5f);
            }
}

TEST_CASE("all scores of a row equal: M = k / n, and the regularizer pulls nowhere") {
    const Context ctx = make_context();
    const auto qkv = tied_qkv<float>(100, 64, 1);
    for (int k : {1, 3, 64, 70}) {
        const auto got =
            run<float>(ctx, qkv, std::vector<float>(100 * 64, 0.0f), {1, 100, 1, 64, k}, Reg::kl, 1.0f);
        for (int i = k; i < 100; i++)
            CHECK(got.mass[i] == doctest::Approx((double)k / (i + 1)).epsilon(1e-6));
        // each key's share of c_i p_ij (k/n - M): zero but for rounding, against terms of about 1/n
        CHECK(largest_error(got.dqkv, std::vector<double>(got.dqkv.size(), 0.0)) < 1e-5);
    }
}

TEST_CASE("huge, tiny and recency-ordered scores") {
    const Context ctx = make_context();
    const int T = 140, hs = 64;
    for (double scale : {1e-12, 1e-3, 6.0, 1e3}) {  // 1e3: one key takes all, the others' exponents underflow
        auto qkv = normal_values<float>(T * 3 * hs, 21);
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) qkv[t * 3 * hs + d] *= (float)scale;
        CAPTURE(scale);
        const auto dout = normal_values<float>(T * hs, 22);
        const Shape s{1, T, 1, hs, 8};
        const auto got = run<float>(ctx, qkv, dout, s, Reg::tail, 0.5f);
        const auto want = ref::attention_forward(to_double(qkv), 1, T, 1, hs, 8, Reg::tail);
        // a score of size S carries a rounding error of about S 6e-8, and exp turns it into a relative one
        const double largest = *std::max_element(want.lse.begin(), want.lse.end());
        const double bound = tolerance<float>() * (1 + largest / 10);
        CHECK(relative_error(got.out, want.out) < bound);
        CHECK(relative_error(got.mass, want.mass) < bound);
        const auto want_d =
            ref::attention_backward(to_double(dout), to_double(qkv), 1, T, 1, hs, 8, Reg::tail, 0.5);
        CHECK(relative_error(got.dqkv, want_d) < bound);
    }
    // scores that grow (every key is inserted) and fall (no key is, after the first) along the row
    for (float direction : {1.0f, -1.0f}) {
        std::vector<float> qkv = normal_values<float>(T * 3 * hs, 23);
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) {
                qkv[t * 3 * hs + d] = 0.125f;
                qkv[t * 3 * hs + hs + d] = direction * (float)t / 32.0f;
            }
        check_against_reference<float>(ctx, qkv, {1, T, 1, hs, 8}, Reg::tail, 0.5f);
    }
}

TEST_CASE("bf16: scores that grow from tile to tile until exp of their difference would overflow") {
    // Small integers, so that scores are exact: up to 2 (T - 1), 128 more in each tile of 64 keys. Gradients
    // are not compared: they are differences of neighbouring keys and queries, which the rounding of ds to
    // bf16 drowns.
    const int T = 200, hs = 64;
    auto qkv = normal_values<bf16>(T * 3 * hs, 24);
    const auto dout = normal_values<bf16>(T * hs, 25);
    for (float direction : {1.0f, -1.0f}) {
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) {
                qkv[t * 3 * hs + d] = (bf16)(d == 0 ? 16.0f : 0.0f);
                qkv[t * 3 * hs + hs + d] = (bf16)(d == 0 ? direction * (float)t : 0.0f);
            }
        const auto want = ref::attention_forward(to_double(qkv), 1, T, 1, hs, 8, Reg::tail);
        for (const Context& ctx : contexts<bf16>()) {
            CAPTURE(ctx.use_wgmma);
            const auto got = run<bf16>(ctx, qkv, dout, {1, T, 1, hs, 8}, Reg::tail, 0.5f);
            CHECK(relative_error(got.out, want.out) < tolerance<bf16>());
            CHECK(relative_error(got.lse, want.lse) < tolerance<float>());
            CHECK(relative_error(got.mass, want.mass) < tolerance<float>());
        }
    }
}

TEST_CASE("the set that the backward rebuilds is the forward's") {
    // With dout = 0 and weight 1, ds_ij = -p_ij ([j in S] - M) for `tail`: its sign is the set. Keys are
    // one-hot over hs, so dq's d-th component is ds of key d alone.
    const Context ctx = make_context();
    const int T = 64, hs = 64;
    for (int trial = 0; trial < (kFewer ? 4 : 20); trial++) {
        std::vector<float> qkv = normal_values<float>(T * 3 * hs, 100 + trial);
        const int kind = trial % 4;
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) {
                float& q = qkv[t * 3 * hs + d];
                if (kind == 1) q *= 1e-6f;                                     // near-ties everywhere
                if (kind == 2) q = std::nextafter(1.0f, q > 0 ? 2.0f : 0.0f);  // neighbouring floats and ties
                if (kind == 3) q *= 30.0f;
                qkv[t * 3 * hs + hs + d] = t == d ? 8.0f : 0.0f;  // scores are q's components, exactly
            }
        for (int k : {1, 5, 20}) {
            const std::vector<float> dout(T * hs, 0.0f);
            const auto got = run<float>(ctx, qkv, dout, {1, T, 1, hs, k}, Reg::tail, 1.0f);
            int rows_checked = 0;
            for (int i = k; i < T; i++) {
                const ref::AttentionRow row = ref::attention_row(to_double(qkv).data(), i, 0, hs, hs, k);
                if (row.kth == row.next) continue;  // ties are tested above
                for (int j = 0; j <= i; j++) {
                    const double ds = (double)got.dqkv[i * 3 * hs + j];
                    const double expected = -row.p[j] * (row.member[j] - row.mass);
                    if (std::fabs(expected) > 1e-6) CHECK((ds > 0) == (expected > 0));
                }
                rows_checked++;
            }
            if (kind != 2) CHECK(rows_checked == T - k);
        }
    }
}

// x y^T of 64 x 64 in every way in which the kernels multiply, with four warps: 0 by mma, 1 by
// wgmma, x and y exchanged and the result transposed if `transposed`; and x y: 2 by mma, 3 by wgmma.
__global__ void product_kernel(float* product, const bf16* x, const bf16* y, int way, bool transposed) {
    __shared__ __align__(kWgmmaAlignment) bf16 x_tile[64 * 64];
    __shared__ __align__(kWgmmaAlignment) bf16 y_tile[64 * 64];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = threadIdx.x; i < 64 * 64; i += 128) {
        const int at = swizzled<64>(i / 64, i % 64 / 8) + i % 8;
        x_tile[at] = transposed ? y[i] : x[i];
        y_tile[at] = transposed ? x[i] : y[i];
    }
    fence_tiles();
    __syncthreads();
    Accumulator d = {};
    AFragment a[4];
    for (int kk = 0; kk < 4; kk++) load_a<64>(a[kk], first_piece<64, Order::rows>(x_tile), 16 * warp, kk);
    if (way == 1 || way == 3) {
        begin_products(d, a);
        if (way == 1)
            set_product_transposed(d, describe_tile(x_tile), describe_tile(y_tile));
        else
            add_product(d, a, describe_tile(y_tile));
        commit_products();
        wait_products(d);
    } else {
        for (int kk = 0; kk < 4; kk++)
            for (int n = 0; n < 4; n++) {
                uint32_t b0[2], b1[2];
                if (way == 0)
                    load_b_transposed<64>(b0, b1, first_piece<64, Order::columns>(y_tile), 16 * n, kk);
                else
                    load_b<64>(b0, b1, first_piece<64, Order::rows>(y_tile), 16 * kk, n);
                mma_m16n8k16_bf16(d[2 * n], a[kk], b0);
                mma_m16n8k16_bf16(d[2 * n + 1], a[kk], b1);
            }
    }
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) {
            const int row = 16 * warp + g + e / 2 * 8, column = 8 * n + 2 * t + e % 2;
            product[transposed ? column * 64 + row : row * 64 + column] = d[n][e];
        }
}

TEST_CASE("a score is the same bits in every kernel: q k^T or (k q^T)^T, by mma or by wgmma") {
    const Context ctx = contexts<bf16>().back();
    for (double scale : {1e-3, 1.0, 50.0}) {
        DeviceArray<bf16> x(normal_values<bf16>(64 * 64, 1, scale)),
            y(normal_values<bf16>(64 * 64, 2, scale));
        const auto product = [&](int way, bool transposed) {
            DeviceArray<float> result(64 * 64);
            product_kernel<<<1, 128, 0, ctx.stream>>>(result, x, y, way, transposed);
            CUDA_CHECK(cudaGetLastError());
            CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
            return result.get();
        };
        const std::vector<float> score = product(0, false);
        const auto x64 = to_double(x.get()), y64 = to_double(y.get());
        std::vector<double> want(64 * 64), want_straight(64 * 64);
        for (int i = 0; i < 64 * 64; i++)
            for (int k = 0; k < 64; k++) {
                want[i] += x64[i / 64 * 64 + k] * y64[i % 64 * 64 + k];
                want_straight[i] += x64[i / 64 * 64 + k] * y64[k * 64 + i % 64];
            }
        CHECK(relative_error(score, want) < 1e-6);
        CHECK(relative_error(product(2, false), want_straight) < 1e-6);
        CHECK(product(0, true) == score);
        if (!ctx.use_wgmma) continue;
        for (bool transposed : {false, true}) CHECK(product(1, transposed) == score);
        CHECK(product(3, false) == product(2, false));
    }
}

TEST_CASE(
    "bf16: what the lists find is what selection from all scores finds, also where the lists do not suffice") {
    const std::vector<Context> variants = contexts<bf16>();
    const int T = 100, hs = 64, rows = T;
    for (int kind = 0; kind < 5; kind++) {
        CAPTURE(kind);
        auto qkv = normal_values<bf16>(T * 3 * hs, 50 + kind);
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) {
                bf16 &q = qkv[t * 3 * hs + d], &key = qkv[t * 3 * hs + hs + d];
                if (kind == 1 && t % 8 / 2 == 1)
                    key = (bf16)(8.0f * (float)key);  // one thread of four has the top
                if (kind == 2) q = (bf16)0.25f, key = (bf16)((float)t / 64.0f);  // rising: always the newest
                if (kind == 3) q = (bf16)0.25f, key = (bf16)((float)-t / 64.0f);
                if (kind == 4) q = (bf16)0.0f;  // every score is 0
            }
        DeviceArray<bf16> d_qkv(qkv), out(T * hs);
        for (const Context& ctx : variants)
            for (int k : {1, 8, 33}) {
                if (kFewer && kind > 0 && k != 8) continue;
                CAPTURE(ctx.use_wgmma);
                CAPTURE(k);
                DeviceArray<float> lse(rows), theta(rows), mass(rows), tie(rows), theta2(rows), mass2(rows),
                    tie2(rows);
                attention_forward<bf16>(ctx, out, {lse, theta, mass, tie}, d_qkv, 1, T, 1, hs, k);
                attention_select_bf16(ctx, {lse, theta2, mass2, tie2}, d_qkv, 1, T, 1, hs, k, true);
                CHECK(theta.get() == theta2.get());
                CHECK(tie.get() == tie2.get());
                CHECK(relative_error(mass.get(), to_double(mass2.get())) < 1e-6);
            }
    }
}

TEST_CASE("bf16: most rows need no second look") {
    // The list is exact unless one thread of four holds 8 of a row's 9 largest: 4e-4 of the rows in random
    // order.
    const Context ctx = make_context();
    const int T = 500, hs = 64, k = 8;
    DeviceArray<bf16> qkv(normal_values<bf16>(T * 3 * hs, 61)), out(T * hs);
    DeviceArray<float> lse(T), theta(T), mass(T), tie(T);
    launch_attention_forward_bf16<8>(ctx, out, {lse, theta, mass, tie}, qkv, 1, T, 1, hs, k);
    const std::vector<float> marks = tie.get();
    CHECK(std::count(marks.begin(), marks.end(), kRowMarked) <= 5);
}

TEST_CASE("the bf16 backward rebuilds the forward's set") {
    // As above: dout = 0, weight 1, keys one-hot, so dq's components are ds of one key each. Scores are q's
    // components, exactly; theta and the neighbours of the k-th score are bf16 numbers next to one another.
    const std::vector<Context> variants = contexts<bf16>();
    const int T = 64, hs = 64;
    const int trials = kFewer ? 3 : 12;
    for (int trial = 0; trial < trials * (int)variants.size(); trial++) {
        const Context& ctx = variants[trial / trials];
        std::vector<bf16> qkv = normal_values<bf16>(T * 3 * hs, 300 + trial);
        for (int t = 0; t < T; t++)
            for (int d = 0; d < hs; d++) {
                bf16& q = qkv[t * 3 * hs + d];
                if (trial % 3 == 1) q = (bf16)(1.0f + (float)(d * 37 % 64) / 128.0f);  // neighbouring numbers
                if (trial % 3 == 2) q = (bf16)(30.0f * (float)q);
                qkv[t * 3 * hs + hs + d] = (bf16)(t == d ? 8.0f : 0.0f);
            }
        for (int k : {1, 5, 20}) {
            const std::vector<bf16> dout(T * hs, (bf16)0.0f);
            const auto got = run<bf16>(ctx, qkv, dout, {1, T, 1, hs, k}, Reg::tail, 1.0f);
            for (int i = k; i < T; i++) {
                const ref::AttentionRow row = ref::attention_row(to_double(qkv).data(), i, 0, hs, hs, k);
                if (row.kth == row.next) continue;
                for (int j = 0; j <= i; j++) {
                    const double ds = (double)(float)got.dqkv[i * 3 * hs + j];
                    const double expected = -row.p[j] * (row.member[j] - row.mass);
                    if (std::fabs(expected) > 1e-4) CHECK((ds > 0) == (expected > 0));
                }
            }
        }
    }
}

TEST_CASE("bf16: the sums are in one order, whatever the order in which blocks run") {
    const std::vector<Context> variants = contexts<bf16>();
    for (int hs : {64, 128}) {
        // without wgmma, three blocks of keys (or two) add to a head's dq
        const Shape s{1, kFewer ? 150 : 300, 2, hs, 8};
        const int C = s.NH * hs;
        const auto qkv = normal_values<bf16>((size_t)s.B * s.T * 3 * C, 71),
                   dout = normal_values<bf16>((size_t)s.B * s.T * C, 72);
        for (const Context& ctx : variants) {
            if (ctx.use_wgmma && hs != 64) continue;
            const auto first = run<bf16>(ctx, qkv, dout, s, Reg::tail, 0.3f);
            for (int again = 0; again < (kFewer ? 0 : 2); again++) {
                const auto got = run<bf16>(ctx, qkv, dout, s, Reg::tail, 0.3f);
                CHECK(memcmp(got.dqkv.data(), first.dqkv.data(), got.dqkv.size() * sizeof(bf16)) == 0);
            }
            check_against_reference<bf16>(ctx, qkv, s, Reg::tail, 0.3f);
        }
    }
}

TEST_CASE("sums for the metrics: mass, f(M), and where the mass goes") {
    const int B = 2, T = 75, NH = 2, hs = 64, C = NH * hs, rows = B * NH * T;
    const auto qkv = normal_values<float>(B * T * 3 * C, 31);
    const auto qkv64 = to_double(qkv);
    DeviceArray<float> d_qkv(qkv), out(B * T * C), lse(rows), theta(rows), mass(rows), tie(rows),
        mean_score(rows);
    for (const Context& ctx : both_lane_counts())
        for (int k : {1, 8, 80}) {
            CAPTURE(ctx.row_lanes);
            CAPTURE(k);
            const AttentionRows saved{lse, theta, mass, tie, mean_score};
            attention_forward<float>(ctx, out, saved, d_qkv, B, T, NH, hs, k);
            attention_mean_scores<float>(ctx, saved, d_qkv, B, T, NH, hs);
            for (Reg reg : {Reg::tail, Reg::kl, Reg::entropy}) {
                DeviceArray<float> sums(B * NH * 2), sinks(B * NH * 4);
                attention_mass_sums(ctx, sums, saved, reg, B, T, NH, k);
                attention_sink_sums<float>(ctx, sinks, saved, d_qkv, B, T, NH, hs, k);
                std::vector<double> want(B * NH * 2), want_sinks(B * NH * 4);
                for (int bh = 0; bh < B * NH; bh++)
                    for (int i = k; i < T; i++) {
                        const double* base = &qkv64[(size_t)(bh / NH) * T * 3 * C];
                        const auto row = ref::attention_row(base, i, bh % NH, C, hs, k);
                        want[bh * 2] += row.mass;
                        want[bh * 2 + 1] += ref::reg_value(reg, row);
                        want_sinks[bh * 4] += row.p[0];
                        want_sinks[bh * 4 + 1] += row.p[i];
                        want_sinks[bh * 4 + 2] += row.mass - row.member[0] * row.p[0];
                        want_sinks[bh * 4 + 3] += 1 - row.p[0];
                    }
                CHECK(relative_error(sums.get(), want) < tolerance<float>());
                CHECK(relative_error(sinks.get(), want_sinks) < tolerance<float>());
            }
        }
}

TEST_CASE("where position 0 gets all attention, no sum is negative or too large by rounding") {
    const Context ctx = make_context();
    const int T = 3, hs = 4, k = 1;
    std::vector<float> qkv(T * 3 * hs);
    for (int i = 0; i < T; i++) qkv[i * 3 * hs] = 1.0f;
    qkv[hs] = 40000.0f;  // a score of 20000, where floats are 0.002 apart
    const float lse_below = std::nextafter(20000.0f, 0.0f), mass_below = std::nextafter(1.0f, 0.0f);
    DeviceArray<float> d_qkv(qkv), lse({lse_below, lse_below, lse_below}), theta({0.0f, 1.0f, 1.0f}),
        mass({mass_below, mass_below, mass_below}), tie(T), sinks(4);
    attention_sink_sums<float>(ctx, sinks, {lse, theta, mass, tie}, d_qkv, 1, T, 1, hs, k);
    CHECK(sinks.get() == std::vector<float>{2, 0, 0, 0});
}

TEST_CASE("the same input twice gives the same bits") {
    const Context ctx = make_context();
    const Shape s{2, 150, 2, 64, 8};
    const auto qkv = normal_values<bf16>(2 * 150 * 3 * 128, 41),
               dout = normal_values<bf16>(2 * 150 * 128, 42);
    const auto a = run<bf16>(ctx, qkv, dout, s, Reg::kl, 0.3f),
               b = run<bf16>(ctx, qkv, dout, s, Reg::kl, 0.3f);
    CHECK(memcmp(a.dqkv.data(), b.dqkv.data(), a.dqkv.size() * sizeof(bf16)) == 0);
    CHECK(a.mass == b.mass);
}
