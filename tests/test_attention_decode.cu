// One new token against the cache, in the three ways of attention_decode.cuh, against plain loops in double:
// dense, the exact top k, and pages, whose certificates must hold on a million rows.
#include "../llmc/attention_decode.cuh"
#include "check.h"
#include "errors.h"

using bf16 = __nv_bfloat16;

struct Shape {
    int B, NH, hs, capacity;

    int C() const { return NH * hs; }
    size_t keys() const { return (size_t)B * NH * capacity * hs; }
};

// A cache in device memory, and the tokens that were put there: tokens [B,capacity,3C].
template <class Float>
struct Cache {
    Shape s;
    DeviceArray<Float> k, v, low, high;

    explicit Cache(Shape shape)
        : s(shape), k(s.keys()), v(s.keys()), low(s.keys() / kPageTokens), high(s.keys() / kPageTokens) {}
    KvCache<Float> get() { return {k, v, low, high, s.capacity}; }
};

// The rows [B,3C] of the tokens at positions[b].
template <class Float>
std::vector<Float> rows_at(const std::vector<Float>& tokens, Shape s, const std::vector<int>& positions) {
    std::vector<Float> rows;
    for (int b = 0; b < s.B; b++) {
        const auto row = tokens.begin() + ((size_t)b * s.capacity + positions[b]) * 3 * s.C();
        rows.insert(rows.end(), row, row + 3 * s.C());
    }
    return rows;
}

// The definition: out [B,C] and the discarded mass tau [B*NH] if each row keeps its k largest scores (all if
// k = 0), of equal ones the earliest.
struct Rows {
    std::vector<double> out, tau;
};
template <class Float>
Rows reference(const std::vector<Float>& tokens, Shape s, const std::vector<int>& positions, int k) {
    const int C = s.C();
    Rows r;
    for (int b = 0; b < s.B; b++)
        for (int head = 0; head < s.NH; head++) {
            const int n = positions[b] + 1;
            const auto at = [&](int t, int part, int d) {
                return (
                    double)(float)tokens[((size_t)b * s.capacity + t) * 3 * C + part * C + head * s.hs + d];
            };
            std::vector<double> score(n), kept_output(s.hs);
            std::vector<int> order(n);
            for (int j = 0; j < n; j++) {
                for (int d = 0; d < s.hs; d++) score[j] += at(n - 1, 0, d) * at(j, 1, d);
                score[j] /= std::sqrt((double)s.hs);
                order[j] = j;
            }
            std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return score[i] > score[j]; });
            double all = 0, kept = 0;
            for (int place = 0; place < n; place++) {
                const int j = order[place];
                const double e = std::exp(score[j] - score[order[0]]);
                all += e;
                if (k > 0 && place >= k) continue;
                kept += e;
                for (int d = 0; d < s.hs; d++) kept_output[d] += e * at(j, 2, d);
            }
            for (int d = 0; d < s.hs; d++) r.out.push_back(kept_output[d] / kept);
            r.tau.push_back(1 - kept / all);
        }
    return r;
}

template <class Float>
struct Decoded {
    std::vector<Float> out;
    std::vector<DecodeStats> stats;
};
template <class Float>
Decoded<Float> decode(const Context& ctx, Cache<Float>& cache, const std::vector<Float>& tokens,
                      const std::vector<int>& positions, DecodeHow how) {
    const Shape s = cache.s;
    DeviceArray<Float> row(rows_at(tokens, s, positions)), out((size_t)s.B * s.C());
    DeviceArray<int> where(positions);
    DeviceArray<DecodeStats> stats(std::vector<DecodeStats>(s.B * s.NH));
    DeviceArray<float> scratch(std::vector<float>(decode_scratch(s.B, s.NH, s.hs, s.capacity)));
    attention_decode<Float>(ctx, out, stats, scratch, row, cache.get(), where, s.B, s.NH, s.hs, how);
    return {out.get(), stats.get()};
}

TEST_CASE_TEMPLATE("dense, top k and pages at awkward lengths", Float, float, bf16) {
    for (const Context& ctx : both_lane_counts())
        for (const Shape s : std::initializer_list<Shape>{
                 {2, 3, 64, 768}, {1, 2, 8, 48}, {2, 1, 40, 272}, {1, 2, 128, 528}}) {
            const auto tokens = normal_values<Float>((size_t)s.B * s.capacity * 3 * s.C(), 11, 1.5);
            Cache<Float> cache(s);
            DeviceArray<Float> all(tokens);
            for (int n : {1, 2, 15, 16, 17, 47, 63, 64, 65, 255, 256, 257, 513, 700}) {
                if (n > s.capacity || (kFewer && n != 2 && n != 64 && n != 257 && n != 700)) continue;
                // anew: the page of the newest token knows of none behind it
                kv_append<Float>(ctx, cache.get(), all, s.B, s.capacity, s.NH, s.hs, nullptr, nullptr,
                                 nullptr);
                CAPTURE(n);
                CAPTURE(s.hs);
                std::vector<int> positions(s.B, n - 1);
                if (s.B > 1) positions[1] = std::max(0, n - 5);  // sequences of different lengths
                const Rows dense = reference(tokens, s, positions, 0);
                const auto got = decode(ctx, cache, tokens, positions, {DecodeMode::dense});
                CHECK(relative_error(got.out, dense.out) < tolerance<Float>());
                // epsilon 0: every page is read
                const auto paged = decode(ctx, cache, tokens, positions, {DecodeMode::pages, 0, 0.0f});
                CHECK(relative_error(paged.out, dense.out) < tolerance<Float>());
                CHECK(paged.stats[0].keys == (float)n);
                CHECK(paged.stats[0].tau == 0.0f);
                // epsilon 1: the two pages of the highest bounds, whatever they hold
                const auto least = decode(ctx, cache, tokens, positions, {DecodeMode::pages, 0, 1.0f});
                CHECK(least.stats[0].pages == (float)std::min(kPagesPerRound, ceil_div(n, kPageTokens)));
                CHECK(least.stats[0].tau <= least.stats[0].certified);
                if (n <= kPagesPerRound * kPageTokens)
                    CHECK(relative_error(least.out, dense.out) < tolerance<Float>());
                for (int k : {1, 8, 100, 5000}) {
                    CAPTURE(k);
                    const Rows cut = reference(tokens, s, positions, k);
                    const auto top = decode(ctx, cache, tokens, positions, {DecodeMode::topk, k});
                    CHECK(relative_error(top.out, cut.out) < tolerance<Float>());
                    for (size_t i = 0; i < cut.tau.size(); i++)
                        CHECK(top.stats[i].tau == doctest::Approx(cut.tau[i]).epsilon(1e-4));
                }
            }
        }
}

TEST_CASE_TEMPLATE("a key that is no number shows in what is read, however the keys are dealt out", Float,
                   float, bf16) {
    const Shape s{1, 2, 64, 320};
    for (const Context& ctx : both_lane_counts())
        for (const auto& [first, end] :
             std::initializer_list<std::pair<int, int>>{{0, 1}, {70, 72}, {64, 128}, {0, 199}}) {
            auto tokens = normal_values<Float>((size_t)s.capacity * 3 * s.C(), 5);
            for (int t = first; t < end; t++) tokens[((size_t)t * 3 + 1) * s.C() + t % s.hs] = (Float)NAN;
            Cache<Float> cache(s);
            DeviceArray<Float> all(tokens);
            kv_append<Float>(ctx, cache.get(), all, 1, s.capacity, s.NH, s.hs, nullptr, nullptr, nullptr);
            for (const DecodeHow how :
                 {DecodeHow{DecodeMode::dense}, DecodeHow{DecodeMode::pages, 0, 0.0f}}) {
                CAPTURE(end);
                const auto got = decode(ctx, cache, tokens, {199}, how);
                for (int c = 0; c < s.C(); c++) REQUIRE(std::isnan((float)got.out[c]) == (c < s.hs));
            }
        }
}

TEST_CASE("equal scores: exactly k keys, the earliest of those that tie") {
    const Shape s{1, 2, 64, 320};
    auto tokens = normal_values<float>((size_t)s.capacity * 3 * s.C(), 5);
    for (int t = 0; t < s.capacity; t++)
        for (int c = 0; c < s.C(); c++)  // head 0: one of three keys; head 1: always the same
            tokens[((size_t)t * 3 + 1) * s.C() + c] = c < s.hs ? (float)((t * 7 % 3) * (c % 5)) : 0.25f;
    for (const Context& ctx : both_lane_counts()) {
        Cache<float> cache(s);
        DeviceArray<float> all(tokens);
        kv_append<float>(ctx, cache.get(), all, 1, s.capacity, s.NH, s.hs, nullptr, nullptr, nullptr);
        for (int n : {20, 130, 300})
            for (int k : {1, 5, 19, 129}) {
                const Rows want = reference(tokens, s, {n - 1}, k);
                const auto got = decode(ctx, cache, tokens, {n - 1}, {DecodeMode::topk, k});
                CHECK(relative_error(got.out, want.out) < 1e-5);
            }
    }
}

TEST_CASE("pages: where scores are no numbers all are read") {
    const Shape s{1, 2, 64, 160};
    const int n = 150;
    auto tokens = normal_values<float>((size_t)s.capacity * 3 * s.C(), 6);
    for (int t = 0; t < n; t++)  // head 1 is nearly flat, and has no part in what happens to head 0
        for (int d = 0; d < s.hs; d++) tokens[((size_t)t * 3 + 1) * s.C() + s.hs + d] *= 1e-3f;
    tokens[(size_t)(n - 1) * 3 * s.C()] = NAN;  // of head 0's query
    for (const Context& ctx : both_lane_counts()) {
        Cache<float> cache(s);
        DeviceArray<float> all(tokens);
        kv_append<float>(ctx, cache.get(), all, 1, s.capacity, s.NH, s.hs, nullptr, nullptr, nullptr);
        const auto got = decode(ctx, cache, tokens, {n - 1}, {DecodeMode::pages, 0, 0.9f});
        CHECK(got.stats[0].pages == (float)ceil_div(n, kPageTokens));
        CHECK(got.stats[0].keys == (float)n);
        CHECK(std::isnan(got.stats[0].tau));
        CHECK(std::isnan(got.out[0]));
        CHECK(got.stats[1].pages == 2);
        CHECK(got.stats[1].certified <= 0.9f);
        CHECK(std::isfinite(got.out[s.hs]));
    }
}

TEST_CASE_TEMPLATE("token by token or all at once: the same cache, bounds included", Float, float, bf16) {
    const Context ctx = make_context();
    const Shape s{2, 2, 40, 64};
    const auto tokens = normal_values<Float>((size_t)s.B * s.capacity * 3 * s.C(), 3);
    const std::vector<int> lengths = {37, 16};
    Cache<Float> whole(s), stepwise(s);
    for (auto* array : {&whole.k, &whole.v, &stepwise.k, &stepwise.v})
        array->set(std::vector<Float>(s.keys(), (Float)0.0f));
    for (auto* array : {&whole.low, &whole.high, &stepwise.low, &stepwise.high})
        array->set(std::vector<Float>(s.keys() / kPageTokens, (Float)0.0f));
    DeviceArray<Float> all(tokens);
    DeviceArray<int> counts(lengths);
    kv_append<Float>(ctx, whole.get(), all, s.B, s.capacity, s.NH, s.hs, nullptr, nullptr, counts);
    // a first part at once, at different lengths, then one by one; sequences that have ended repeat
    // themselves
    DeviceArray<int> first(std::vector<int>{20, 3});
    kv_append<Float>(ctx, stepwise.get(), all, s.B, s.capacity, s.NH, s.hs, nullptr, nullptr, first);
    for (int step = 0; step < 17; step++) {
        const std::vector<int> at = {20 + step, std::min(3 + step, 15)};
        DeviceArray<Float> row(rows_at(tokens, s, at));
        DeviceArray<int> start(at);
        kv_append<Float>(ctx, stepwise.get(), row, s.B, 1, s.NH, s.hs, nullptr, start, nullptr);
    }
    const auto same = [](const std::vector<Float>& a, const std::vector<Float>& b) {
        return memcmp(a.data(), b.data(), a.size() * sizeof(Float)) == 0;
    };
    CHECK(same(whole.k.get(), stepwise.k.get()));
    CHECK(same(whole.v.get(), stepwise.v.get()));
    CHECK(same(whole.low.get(), stepwise.low.get()));
    CHECK(same(whole.high.get(), stepwise.high.get()));
    // a start that is given, and several tokens
    DeviceArray<int> begin(std::vector<int>{0, 0});
    Cache<Float> again(s);
    kv_append<Float>(ctx, again.get(), all, s.B, s.capacity, s.NH, s.hs, nullptr, begin, counts);
    const auto first_pages = [&](DeviceArray<Float>& bounds) {
        const std::vector<Float> values = bounds.get();
        return std::vector<Float>(values.begin(), values.begin() + 3 * s.hs);  // of 37 tokens
    };
    CHECK(same(first_pages(again.low), first_pages(whole.low)));
    CHECK(same(first_pages(again.high), first_pages(whole.high)));
}

// How many tokens the rows of a call below have.
int certified_tokens(uint64_t seed) {
    return 1 + (int)(seed * 37 % 128);
}

// The share of its pages that a row of n equal scores reads: all bounds are equal, so it takes the pages in
// order, a round at a time, until the tokens behind them are at most a share epsilon. (No n up to 128 comes
// nearer than 1% to any epsilon used here.)
double flat_share_read(int n, float epsilon) {
    const int pages = ceil_div(n, kPageTokens);
    int read = 0;
    do read = std::min(read + kPagesPerRound, pages);
    while (std::max(0, n - read * kPageTokens) > (double)epsilon * n);
    return (double)read / pages;
}

// Each cache below is read by so many queries, one after another: to fill it takes longer than to read it.
constexpr int kQueries = 4;

float certified_epsilon(int call, int query) {
    constexpr float epsilons[] = {0.1f, 0.01f, 1e-4f};
    return epsilons[(call + query) % 3];
}

// The certificate, row by row, from outside: the values mark their page (page p has 1 in dimension p, and
// nothing else), so that the output tells which pages were read, and the mass of the others is summed up here
// in double. Adds the share of the pages that were read to share_read.
template <class Float>
void check_certificates(const Context& ctx, int kind, int call, int heads, double& share_read) {
    const uint64_t seed = 1000 + call;
    const int n = certified_tokens(seed), pages = ceil_div(n, kPageTokens);
    const Shape s{1, heads, 8, pages * kPageTokens};
    const int C = s.C();
    // Normal numbers from a pool, each time at another place: drawing hundreds of millions would take longer
    // than all else.
    static const std::vector<float> pool = normal_values<float>((1 << 20) + 7, 1);
    const auto fill = [](Float* to, size_t count, size_t place) {
        for (size_t i = 0; i < count; i++) to[i] = (Float)pool[(place + i) % pool.size()];
    };
    std::vector<Float> tokens((size_t)s.capacity * 3 * C);
    fill(tokens.data(), (size_t)n * 3 * C, seed * 7919);
    for (int t = 0; t < n; t++)
        for (int head = 0; head < heads; head++) {
            Float* key = &tokens[((size_t)t * 3 + 1) * C + head * s.hs];
            for (int d = 0; d < s.hs; d++) {
                const float x = (float)key[d];
                if (kind == 0) key[d] = (Float)(x * (float)(1 << head % 6));        // from flat to peaked
                if (kind == 1) key[d] = (Float)0.5f;                                // all equal
                if (kind == 2) key[d] = (Float)(t == (head * 7) % n ? 30 * x : x);  // one key stands out
                if (kind == 3) key[d] = (Float)((t + d) % 2 ? 3.0f : -3.0f);        // bounds far too high
                if (kind == 4) key[d] = (Float)(x * 0.1f + (float)t * 0.05f);       // rising with time
                if (kind == 5) key[d] = (Float)(x * 1e-3f);                         // nearly flat
                if (kind == 6) key[d] = (Float)(x * 300.0f);                        // all mass on one key
                if (kind == 7) key[d] = (Float)(t / kPageTokens % 2 ? x * 4.0f : 0.0f);  // dead pages
            }
            for (int d = 0; d < s.hs; d++)
                tokens[((size_t)t * 3 + 2) * C + head * s.hs + d] =
                    (Float)(d == t / kPageTokens ? 1.0f : 0.0f);
        }
    Cache<Float> cache(s);
    DeviceArray<Float> all(tokens);
    kv_append<Float>(ctx, cache.get(), all, 1, s.capacity, s.NH, s.hs, nullptr, nullptr, nullptr);
    Float* queries = &tokens[(size_t)(n - 1) * 3 * C];  // [heads, hs]
    for (int query = 0; query < kQueries; query++) {
        fill(queries, C, seed * 104729 + (size_t)query * 15485863);
        const float epsilon = certified_epsilon(call, query);
        const auto got = decode(ctx, cache, tokens, {n - 1}, {DecodeMode::pages, 0, epsilon});
        int bad = 0, wrong_stats = 0;
        for (int head = 0; head < heads; head++) {
            double max = -INFINITY, read = 0, unread = 0, score[128];
            int seen = 0;
            for (int j = 0; j < n; j++) {
                const Float* key = &tokens[((size_t)j * 3 + 1) * C + head * s.hs];
                score[j] = 0;
                for (int d = 0; d < s.hs; d++)
                    score[j] += (double)(float)queries[head * s.hs + d] * (double)(float)key[d];
                score[j] /= std::sqrt((double)s.hs);
                max = std::max(max, score[j]);
            }
            for (int p = 0; p < pages; p++) seen += (float)got.out[head * s.hs + p] > 0.0f ? 1 : 0;
            for (int j = 0; j < n; j++)
                ((float)got.out[head * s.hs + j / kPageTokens] > 0.0f ? read : unread) +=
                    std::exp(score[j] - max);
            const double tau = unread / (read + unread);
            const DecodeStats& stats = got.stats[head];
            // what was computed in float may be off by the scores' rounding, e^(8 u |s|)
            const double slack = 1e-5 * (1 + std::fabs(max)) * tau + 1e-7;
            bad += !(tau <= stats.certified + slack && stats.certified <= epsilon);
            wrong_stats += !(std::fabs(stats.tau - tau) <= slack && stats.pages >= (float)seen);
            share_read += (double)stats.pages / pages / heads;
        }
        CAPTURE(kind);
        CAPTURE(seed);
        CAPTURE(query);
        CHECK(bad == 0);
        CHECK(wrong_stats == 0);
    }
}

TEST_CASE("a million rows, random and adversarial: what was left out is never more than certified") {
    const std::vector<Context> lanes = both_lane_counts();
    // Whole warps, whose lanes are slow on the CPU backend, have fewer rows there.
    const int calls = kFewer ? 16 : 120, heads = kFewer ? 128 : 2090;
    const int calls_by_warps = kFewer ? 8 : kOnCpu ? 16 : 120;
    const int heads_by_warps = kFewer ? 8 : kOnCpu ? 64 : 2090;
    int64_t rows = 0;
    double read[8] = {}, read_by_warps[8] = {}, flat = 0.0;
    const auto check = [&](const Context& ctx, int call, int heads, double* share) {
        const int kind = call % 8;
        if (call / 8 % 4 == 1)
            check_certificates<bf16>(ctx, kind, call, heads, share[kind]);
        else
            check_certificates<float>(ctx, kind, call, heads, share[kind]);
        rows += kQueries * heads;
    };
    for (int call = 0; call < calls_by_warps; call++) check(lanes[0], call, heads_by_warps, read_by_warps);
    for (int call = 0; call < calls; call++) check(lanes[1], call, heads, read);
    MESSAGE(rows << " rows");
    for (int call = 1; call < calls; call += 8)
        for (int query = 0; query < kQueries; query++)
            flat += flat_share_read(certified_tokens(1000 + call), certified_epsilon(call, query));
    const int each = kQueries * calls / 8;
    for (double& share : read) share /= each;
    for (int kind = 0; kind < 8; kind++)
        MESSAGE("kind " << kind << ": share of the pages read " << read[kind]);
    // Of flat rows nothing is read in vain, and nothing is left out that must be read; where pages differ,
    // some are left out.
    CHECK(read[1] == doctest::Approx(flat / each).epsilon(1e-6));
    CHECK(read[2] < 0.9);
    CHECK(read[7] < 0.9);
}

// Where a page's keys are all the same its bound is their score, so that nothing but what the kernel adds for
// rounding keeps the certificate above the mass that is left out. Both masses here are exact: the first two
// pages are read, with 32 of 128 keys.
TEST_CASE_TEMPLATE("where bounds are tight the certificate holds to the last bit", Float, float, bf16) {
    const int heads = 96, n = 128;
    const float epsilon = 0.9999f;
    for (const Context& ctx : both_lane_counts())
        for (const int hs : {16, 64}) {
            const Shape s{1, heads, hs, n};
            const int C = s.C();
            const auto numbers = normal_values<Float>((size_t)2 * C, 21);
            const auto check = [&](const char* what, const std::vector<Float>& tokens, auto left_out) {
                CAPTURE(what);
                Cache<Float> cache(s);
                DeviceArray<Float> all(tokens);
                kv_append<Float>(ctx, cache.get(), all, 1, n, heads, hs, nullptr, nullptr, nullptr);
                const auto got = decode(ctx, cache, tokens, {n - 1}, {DecodeMode::pages, 0, epsilon});
                int read_two = 0, holds = 0;
                for (int head = 0; head < heads; head++) {
                    read_two += got.stats[head].pages == 2.0f;
                    holds += left_out(head) <= (double)got.stats[head].certified;
                }
                CHECK(read_two == heads);
                CHECK(holds == heads);
            };
            // All keys are equal. The products are in the thousands, and cancel: what a score is rounded by
            // depends on the order of the sum.
            std::vector<Float> tokens((size_t)n * 3 * C, (Float)0.0f);
            for (int t = 0; t < n; t++)
                for (int c = 0; c < C; c++) {
                    tokens[(size_t)t * 3 * C + c] = (Float)(100.0f * (float)numbers[c]);
                    tokens[((size_t)t * 3 + 1) * C + c] = (Float)(100.0f * (float)numbers[C + c]);
                }
            check("cancelling products", tokens, [](int) { return 0.75; });
            // One product a score, which is exact, for q is the square root of hs. What is left is the
            // rounding of the exponentials and of their sum.
            std::fill(tokens.begin(), tokens.end(), (Float)0.0f);
            for (int head = 0; head < heads; head++) {
                for (int t = 0; t < n; t++)
                    tokens[(size_t)t * 3 * C + head * hs] = (Float)std::sqrt((float)hs);
                for (int t = 0; t < 2 * kPageTokens; t++)
                    tokens[((size_t)t * 3 + 1) * C + head * hs] = (Float)std::fabs((float)numbers[head]);
            }
            const auto left_out = [&](int head) {
                return 0.75 / (0.75 + 0.25 * std::exp(std::fabs((double)(float)numbers[head])));
            };
            check("exact products", tokens, left_out);
        }
}

TEST_CASE("what was read adds up, and the worst of all stays") {
    DecodeStats all = {1, 10, 5, 2, 0.125f, 0.25f, 0.5f};
    all.add({2, 20, 7, 3, 0.25f, 0.5f, 0.375f});
    const DecodeStats want = {3, 30, 12, 5, 0.375f, 0.75f, 0.5f};
    CHECK(memcmp(&all, &want, sizeof(want)) == 0);
}

TEST_CASE("a context whose scores do not fit into shared memory is refused in words") {
    Context ctx = make_context();
    ctx.max_shared = 99 << 10;
    KvCache<float> cache{};
    cache.capacity = 32768;
    const std::string message = error_of([&] {
        attention_decode<float>(ctx, nullptr, nullptr, nullptr, nullptr, cache, nullptr, 1, 1, 64,
                                {DecodeMode::topk, 8});
    });
    check_mentions(message, "32768 positions");
    check_mentions(message, "--attention dense");
}
