// A layer of one token by clusters, in halves, against plain loops in double: every part of the residual
// stream's sum, the products, attention over the cache and the newest token, dense and the exact top k, what
// is put into the cache, and that what is shared between clusters is written by one of them.
#include "../llmc/decode_layer.cuh"

#include "check.h"
#include "reference.h"

using bf16 = __nv_bfloat16;

static std::vector<Context> contexts() {  // none where the device has no clusters
    Context ctx = both_lane_counts()[0];
    ctx.use_decode_halves = ctx.has_clusters;
    return ctx.has_clusters ? std::vector<Context>{ctx} : std::vector<Context>{};
}

// A layer's parameters, on the device and as doubles.
template <class Float>
struct Layer {
    int C;
    std::vector<std::vector<Float>> host;
    std::vector<std::unique_ptr<DeviceArray<Float>>> device;

    explicit Layer(int channels) : C(channels) {
        const auto add = [&](size_t n, double scale, double mean = 0.0) {
            host.push_back(normal_values<Float>(n, 10 + host.size(), scale, mean));
            device.push_back(std::make_unique<DeviceArray<Float>>(host.back()));
        };
        const size_t c = channels;
        for (const int rows : {3, 4}) {  // qkv and attproj, fc and fcproj, each with the layernorm before it
            add(c, 0.5, 1.0), add(c, 0.3);
            add(rows * c * c, 1.5 / std::sqrt(channels)), add(rows * c, 0.3);
            add(c * c * (rows == 3 ? 1 : 4), 1 / std::sqrt(channels)), add(c, 0.5);
        }
    }
    LayerParams<Float> get() {
        const auto p = [&](int i) { return (Float*)*device[i]; };
        return {p(0), p(1), p(2), p(3), p(4), p(5), p(6), p(7), p(8), p(9), p(10), p(11)};
    }
    ref::Vec at(int i) const { return to_double(host[i]); }
};

// The residual stream before a half: x, and parts of what the kernel in front has added.
template <class Float>
struct Before {
    std::vector<Float> x, bias;
    std::vector<float> parts;
    int count;

    Before(int C, int parts_)
        : x(normal_values<Float>(C, 1, 1.0, 0.5)),
          bias(normal_values<Float>(C, 2)),
          parts(normal_values<float>((size_t)std::max(parts_, 1) * C, 3)),
          count(parts_) {}
    ref::Vec sum() const {
        ref::Vec all = to_double(x);
        const size_t C = x.size();
        for (size_t c = 0; c < C && count > 0; c++) {
            all[c] += (double)(float)bias[c];
            for (int i = 0; i < count; i++) all[c] += parts[i * C + c];
        }
        return all;
    }
};

// What a half leaves: the stream's sum, and its parts [count][C].
template <class Float>
struct After {
    std::vector<Float> kept, finished;
    std::vector<float> parts;

    ref::Vec part(int i) const {
        const size_t C = kept.size();
        return ref::Vec(parts.begin() + i * C, parts.begin() + (i + 1) * C);
    }
};

template <class Float, class Run>
static After<Float> run_half(const Context& ctx, const Before<Float>& before, int C, int parts, Run run) {
    DeviceArray<Float> x(before.x), bias(before.bias), kept(C), finished(C);
    DeviceArray<float> in(before.parts), out((size_t)parts * C);
    const Stream<Float> stream = {x, in, before.count, before.count > 0 ? (Float*)bias : nullptr};
    run((float*)out, (Float*)kept, stream);
    finish_stream<Float>(ctx, finished, {kept, out, parts, bias}, C);
    return {kept.get(), finished.get(), out.get()};
}

// The stream's sum, and that the next reader of the stream adds up what this one has made.
template <class Float>
static void check_stream(const After<Float>& after, const Before<Float>& before, int parts) {
    CHECK(relative_error(after.kept, before.sum()) < tolerance<Float>());
    ref::Vec all = to_double(after.kept);
    for (size_t c = 0; c < all.size(); c++) {
        all[c] += (double)(float)before.bias[c];
        for (int i = 0; i < parts; i++) all[c] += after.part(i)[c];
    }
    CHECK(relative_error(after.finished, all) < tolerance<Float>());
}

TEST_CASE_TEMPLATE("the MLP half: each slice's part", Float, float, bf16) {
    for (const Context& ctx : contexts())
        for (const int C : {128, 768, 1024})
            for (const int count : {0, 1, 12, 16}) {
                if (kFewer && (count % 16 != 0 || C == 1024)) continue;
                if (!takes_decode_halves<Float>(ctx, C, kHalfHeadSize, 16, {})) continue;
                CAPTURE(C);
                CAPTURE(count);
                Layer<Float> layer(C);
                const Before<Float> before(C, count);
                const After<Float> after =
                    run_half<Float>(ctx, before, C, kMlpSlices, [&](float* parts, Float* kept, auto in) {
                        decode_mlp_half(ctx, parts, kept, in, layer.get(), C);
                    });
                check_stream(after, before, kMlpSlices);
                const ref::Vec gain = layer.at(6), shift = layer.at(7), fc = layer.at(8), fc_b = layer.at(9),
                               fcproj = layer.at(10);
                const ref::Vec y =
                    ref::layernorm_forward(to_double(after.kept), gain.data(), shift.data(), 1, C);
                ref::Vec h = ref::matmul_forward(y, fc.data(), fc_b.data(), 1, C, 4 * C);
                for (double& x : h) x = ref::gelu(x);
                for (int slice = 0; slice < kMlpSlices; slice++) {
                    ref::Vec want(C);
                    for (int c = 0; c < C; c++)
                        for (int i = slice * C / 4; i < (slice + 1) * C / 4; i++)
                            want[c] += h[i] * fcproj[(size_t)c * 4 * C + i];
                    CHECK(relative_error(after.part(slice), want) < tolerance<float>());
                }
            }
}

// Keys whose scores are multiples of one number, so that no rounding exchanges two, with equal ones among
// them; or any keys.
enum class Keys { any, levels };

// The attention half with n tokens, the newest of which is not in the cache yet.
template <class Float>
static void check_attention_half(const Context& ctx, int NH, int capacity, int n, int count, int k,
                                 Keys keys) {
    const int hs = kHalfHeadSize, C = NH * hs;
    CAPTURE(NH);
    CAPTURE(n);
    CAPTURE(count);
    CAPTURE(k);
    Layer<Float> layer(C);
    const size_t all = (size_t)C * capacity;
    std::vector<Float> old_k = normal_values<Float>(all, 30), old_v = normal_values<Float>(all, 31);
    if (keys == Keys::levels)
        for (int head = 0; head < NH; head++)
            for (int j = 0; j < capacity; j++)
                for (int d = 0; d < hs; d++)
                    old_k[((size_t)head * capacity + j) * hs + d] =
                        (Float)((d * 5 % 3 - 1.0f) * (float)((j * 7 + head) % 11 - 5) / 8);
    DeviceArray<Float> cache_k(old_k), cache_v(old_v);
    // bounds as the tokens before leave them; of a page that begins now, what must not matter
    std::vector<Float> low(all / kPageTokens, (Float)-100.0f), high(all / kPageTokens, (Float)100.0f);
    const auto bounds = [&](const std::vector<Float>& of, int tokens) {
        for (int head = 0; head < NH; head++)
            for (int page = 0; page * kPageTokens < tokens; page++)
                for (int d = 0; d < hs; d++) {
                    float least = INFINITY, most = -INFINITY;
                    for (int j = page * kPageTokens; j < std::min((page + 1) * kPageTokens, tokens); j++) {
                        const float x = (float)of[((size_t)head * capacity + j) * hs + d];
                        least = std::min(least, x), most = std::max(most, x);
                    }
                    const size_t at = ((size_t)head * (capacity / kPageTokens) + page) * hs + d;
                    low[at] = (Float)least, high[at] = (Float)most;
                }
    };
    bounds(old_k, n - 1);
    DeviceArray<Float> d_low(low), d_high(high);
    const KvCache<Float> cache = {cache_k, cache_v, d_low, d_high, capacity};
    DeviceArray<int> position(std::vector<int>{n - 1});
    const DecodeHow how = k > 0 ? DecodeHow{DecodeMode::topk, k} : DecodeHow{};
    REQUIRE(takes_decode_halves<Float>(ctx, C, hs, capacity, how));
    const Before<Float> before(C, count);
    const After<Float> after = run_half<Float>(ctx, before, C, NH, [&](float* parts, Float* kept, auto in) {
        decode_attention_half(ctx, parts, kept, in, layer.get(), cache, position, C, how);
    });
    check_stream(after, before, NH);

    const ref::Vec gain = layer.at(0), shift = layer.at(1), qkv_w = layer.at(2), qkv_b = layer.at(3),
                   proj = layer.at(4);
    const ref::Vec y = ref::layernorm_forward(to_double(after.kept), gain.data(), shift.data(), 1, C);
    const ref::Vec qkv = ref::matmul_forward(y, qkv_w.data(), qkv_b.data(), 1, C, 3 * C);
    // the newest token is in the cache, and nothing else there has changed
    const std::vector<Float> new_k = cache_k.get(), new_v = cache_v.get();
    std::vector<Float> newest_k, newest_v;
    for (int head = 0; head < NH; head++) {
        const size_t at = ((size_t)head * capacity + n - 1) * hs;
        for (int d = 0; d < hs; d++) {
            newest_k.push_back(new_k[at + d]), newest_v.push_back(new_v[at + d]);
            old_k[at + d] = new_k[at + d], old_v[at + d] = new_v[at + d];
        }
    }
    CHECK(relative_error(newest_k, ref::Vec(qkv.begin() + C, qkv.begin() + 2 * C)) < tolerance<Float>());
    CHECK(relative_error(newest_v, ref::Vec(qkv.begin() + 2 * C, qkv.end())) < tolerance<Float>());
    CHECK(same_bits(new_k, old_k));
    CHECK(same_bits(new_v, old_v));
    bounds(old_k, n);
    CHECK(same_bits(d_low.get(), low));
    CHECK(same_bits(d_high.get(), high));

    for (int head = 0; head < NH; head++) {
        std::vector<double> score(n), out(hs);
        std::vector<int> order(n);
        const auto of_cache = [&](const std::vector<Float>& x, int j, int d) {
            return (double)(float)x[((size_t)head * capacity + j) * hs + d];
        };
        for (int j = 0; j < n; j++) {
            for (int d = 0; d < hs; d++)
                score[j] += (double)(float)(Float)(float)qkv[head * hs + d] * of_cache(new_k, j, d);
            score[j] /= std::sqrt((double)hs);
            order[j] = j;
        }
        std::stable_sort(order.begin(), order.end(),
                         [&](int i, int j) { return score[i] > score[j] + 1e-9; });
        double total = 0;
        for (int place = 0; place < (k > 0 ? std::min(k, n) : n); place++) {
            const double e = std::exp(score[order[place]] - score[order[0]]);
            total += e;
            for (int d = 0; d < hs; d++) out[d] += e * of_cache(new_v, order[place], d);
        }
        ref::Vec want(C);
        for (int c = 0; c < C; c++)
            for (int d = 0; d < hs; d++) want[c] += out[d] / total * proj[(size_t)c * C + head * hs + d];
        CAPTURE(head);
        // In bf16 an element of q may be rounded to the other side.
        CHECK(relative_error(after.part(head), want) < tolerance<Float>());
    }
}

TEST_CASE_TEMPLATE("the attention half: dense, at awkward lengths, and the cache", Float, float, bf16) {
    for (const Context& ctx : contexts()) {
        for (const int n : {1, 2, 15, 16, 17, 100, 128, 129, 300, 1024, 1025, 2177})  // up to five rounds
            if (!kFewer || n > 1024 || n % 16 == 1)
                check_attention_half<Float>(ctx, 2, 2304, n, n % 3 * 8, 0, Keys::any);
        check_attention_half<Float>(ctx, 12, 64, 50, 16, 0, Keys::any);
        if (sizeof(Float) == 2) check_attention_half<Float>(ctx, 16, 64, 17, 16, 0, Keys::any);
    }
}

TEST_CASE_TEMPLATE("the attention half: the k largest scores, of equal ones the earliest", Float, float,
                   bf16) {
    for (const Context& ctx : contexts())
        for (const int n : {1, 2, 31, 32, 33, 200, 401})
            for (const int k : {1, 2, 8, 33, 200, 500})
                if (!kFewer || (n > 32 && k >= 8))
                    check_attention_half<Float>(ctx, 2, 416, n, 0, k, Keys::levels);
}
TEST_CASE("the attention half: the k largest of any scores") {
    for (const Context& ctx : contexts())
        for (const int k : {1, 3, 8, 64}) check_attention_half<float>(ctx, 2, 512, 512, 2, k, Keys::any);
}

TEST_CASE("what decoding in halves takes") {
    for (const Context& ctx : contexts()) {
        const DecodeHow dense = {}, topk = {DecodeMode::topk, 8}, pages = {DecodeMode::pages, 0, 0.1f};
        CHECK(takes_decode_halves<bf16>(ctx, 768, 64, 8192, dense));
        CHECK(takes_decode_halves<bf16>(ctx, 768, 64, 1024, topk));
        CHECK(takes_decode_halves<bf16>(ctx, 1024, 64, 1024, topk));
        CHECK(takes_decode_halves<float>(ctx, 768, 64, 512, topk));
        CHECK_FALSE(takes_decode_halves<float>(ctx, 768, 64, 528, topk));
        CHECK_FALSE(takes_decode_halves<float>(ctx, 1024, 64, 1024, dense));
        CHECK_FALSE(takes_decode_halves<bf16>(ctx, 768, 64, 1040, topk));
        CHECK_FALSE(takes_decode_halves<bf16>(ctx, 768, 64, 1024, pages));
        CHECK_FALSE(takes_decode_halves<bf16>(ctx, 1280, 64, 1024, dense));
        CHECK_FALSE(takes_decode_halves<bf16>(ctx, 768, 96, 1024, dense));
        Context one = ctx, off = ctx;
        one.row_lanes = 1;
        off.use_decode_halves = false;
        CHECK_FALSE(takes_decode_halves<bf16>(one, 768, 64, 1024, dense));
        CHECK_FALSE(takes_decode_halves<bf16>(off, 768, 64, 1024, dense));
    }
}
