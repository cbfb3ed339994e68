// Drawing tokens: the host's sample_token against the distribution that it is defined by, in double
// precision, and the kernel against sample_token, token for token.
#include "../llmc/sampler.cuh"

#include "check.h"

using bf16 = __nv_bfloat16;

static const int kDraws = kFewer ? 1000 : 20000, kWide = kFewer ? 9001 : 50257, kRounds = kFewer ? 1 : 10;

// The definition, in double precision: softmax, the top k with all that tie with the last, of these the
// fewest that reach top_p, again with ties.
static std::vector<double> distribution(const std::vector<float>& logits, const Sampling& how) {
    const int V = (int)logits.size();
    const double max = *std::max_element(logits.begin(), logits.end());
    std::vector<double> p(V);
    for (int v = 0; v < V; v++) p[v] = std::exp((logits[v] - max) / how.temperature);
    auto keep = [&](float least) {
        for (int v = 0; v < V; v++)
            if (logits[v] < least) p[v] = 0;
    };
    auto normalize = [&] {
        double sum = 0;
        for (double x : p) sum += x;
        for (double& x : p) x /= sum;
    };
    std::vector<int> order(V);
    for (int v = 0; v < V; v++) order[v] = v;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    if (how.top_k > 0 && how.top_k < V) keep(logits[order[how.top_k - 1]]);
    normalize();
    if (how.top_p < 1) {
        double sum = 0;
        int i = 0;
        while (i < V - 1 && (sum += p[order[i]]) < (double)how.top_p) i++;
        keep(logits[order[i]]);
    }
    normalize();
    return p;
}

// Are these counts a likely outcome of drawing from p? Chi-square, rare tokens taken together; exceeded once
// in 10,000 seeds (Wilson and Hilferty's approximation), and the seeds here are fixed.
static bool likely(const std::vector<int>& count, const std::vector<double>& p) {
    double draws = 0, chi = 0, rare = 0, rare_expected = 0;
    for (int c : count) draws += c;
    int bins = 0;
    auto add = [&](double got, double expected) {
        chi += (got - expected) * (got - expected) / expected;
        bins++;
    };
    for (size_t v = 0; v < p.size(); v++) {
        if (p[v] == 0 && count[v] > 0) return false;
        if (draws * p[v] >= 5) {
            add(count[v], draws * p[v]);
        } else {
            rare += count[v];
            rare_expected += draws * p[v];
        }
    }
    if (rare_expected >= 1) add(rare, rare_expected);
    if (bins < 2) return true;
    const double d = 2.0 / (9.0 * (bins - 1));
    return chi < (bins - 1) * std::pow(1 - d + 3.72 * std::sqrt(d), 3);
}

// `rounds` times B tokens from the kernel: row b of the logits is stream 10 + b, the round is the position.
template <class Float>
static std::vector<int> draw(const Context& ctx, const std::vector<Float>& logits, int B, int V, Sampling how,
                             int rounds = 1) {
    const int Vp = (int)logits.size() / B;
    DeviceArray<Float> d_logits(logits);
    DeviceArray<float> scratch(sampler_scratch(B, V));
    DeviceArray<int> tokens(B), streams(B), positions(B);
    std::vector<int> stream(B), position(B), out;
    for (int b = 0; b < B; b++) stream[b] = 10 + b;
    streams.set(stream);
    for (int round = 0; round < rounds; round++) {
        for (int b = 0; b < B; b++) position[b] = round + 3 * b;
        positions.set(position);
        sample_tokens<Float>(ctx, tokens, d_logits, scratch, B, V, Vp, how, streams, positions);
        for (int token : tokens.get()) out.push_back(token);
    }
    return out;
}

// The same from the host.
template <class Float>
static std::vector<int> draw_on_host(const std::vector<Float>& logits, int B, int V, Sampling how,
                                     int rounds = 1) {
    const int Vp = (int)logits.size() / B;
    std::vector<int> out;
    for (int round = 0; round < rounds; round++)
        for (int b = 0; b < B; b++) {
            const std::vector<float> row(logits.begin() + (size_t)b * Vp,
                                         logits.begin() + (size_t)b * Vp + V);
            out.push_back(sample_token(row.data(), V, how.temperature,
                                       random_uniform(how.seed, 10 + b, round + 3 * b), how.top_k,
                                       how.top_p));
        }
    return out;
}

// B copies of a row, padded with logits that would win.
template <class Float = float>
static std::vector<Float> rows_of(const std::vector<float>& row, int B) {
    const size_t Vp = ceil_div(row.size(), 8) * 8;
    std::vector<Float> out(B * Vp, (Float)1e30f);
    for (int b = 0; b < B; b++) std::copy(row.begin(), row.end(), out.begin() + b * Vp);
    return out;
}

static std::vector<int> counts(const std::vector<int>& tokens, int V) {
    std::vector<int> count(V);
    for (int t : tokens) {
        if (t < 0 || t >= V) FAIL("no token: ", t);
        count[t]++;
    }
    return count;
}

TEST_CASE("sampling: weights are exponentials, keys are in the logits' order") {
    for (float temperature : {0.05f, 0.7f, 1.0f, 1.5f, 20.0f}) {
        const float scale = weight_scale(temperature);
        CHECK(token_weight(0.0f, scale) == 1.0f);
        double worst = 0;  // as a multiple of what is allowed
        for (double x = 0; x < 27.7; x += 0.00137) {
            const float below = (float)(-x * temperature);
            const double want = std::exp((double)below / temperature);
            worst = std::fmax(worst, std::fabs(token_weight(below, scale) / want - 1) / (2e-7 + 1.2e-7 * x));
        }
        CHECK(worst < 1);
        CHECK(token_weight(-28 * temperature, scale) == 0.0f);
        CHECK(token_weight(-INFINITY, scale) == 0.0f);
        CHECK(token_weight(NAN, scale) == 0.0f);
    }
    CHECK(token_weight(0.0f, weight_scale(1e-40f)) == 1.0f);
    CHECK(token_weight(-1e-29f, weight_scale(1e-40f)) == 0.0f);

    const float rising[] = {NAN,  -INFINITY, -1e30f, -2.0f, -1.0f,   -0x1p-126f,
                            0.0f, 0x1p-126f, 1.0f,   2.0f,  INFINITY};
    for (size_t i = 1; i < std::size(rising); i++) CHECK(logit_key(rising[i - 1]) < logit_key(rising[i]));
    CHECK(logit_key(-0.0f) == logit_key(0.0f));
    CHECK(logit_key(-NAN) == logit_key(NAN));
}

TEST_CASE("sampling: the host draws from the distribution (chi-square)") {
    const auto logits = normal_values<float>(50, 1, 2.0, -30.0);
    for (float temperature : {0.7f, 1.0f, 1.5f})
        for (int top_k : {0, 1, 5, 50, 49})
            for (float top_p : {0.1f, 0.9f, 1.0f}) {
                CAPTURE(temperature);
                CAPTURE(top_k);
                CAPTURE(top_p);
                const Sampling how{temperature, top_k, top_p, 3};
                CHECK(
                    likely(counts(draw_on_host(logits, 1, 50, how, kDraws), 50), distribution(logits, how)));
            }
}

// Fewer draws: the tests below show that each is the host's.
TEST_CASE("sampling: the kernel draws from the distribution (chi-square)") {
    const Context ctx = make_context();
    struct Case {
        int V, B, rounds;
        std::vector<Sampling> hows;
    };
    const Sampling all{1.0f, 0, 1.0f, 1}, top_k{0.7f, 50, 1.0f, 2}, top_p{1.5f, 0, 0.9f, 3},
        both{1.5f, 50, 0.1f, 5}, few{1.0f, 5, 0.9f, 4}, one{0.7f, 1, 0.9f, 6};
    for (const auto& [V, B, rounds, hows] :
         {Case{50, kDraws / 10, 2, {all, top_k, top_p, both, few, one}},
          Case{1000, kDraws / 100, 4, {all, top_p, few}}, Case{kWide, kDraws / 400, 4, {top_k, both}}})
        for (const Sampling& how : hows) {
            CAPTURE(V);
            CAPTURE(how.temperature);
            CAPTURE(how.top_k);
            CAPTURE(how.top_p);
            const auto logits = normal_values<float>(V, 1, 2.0, -30.0);
            CHECK(likely(counts(draw(ctx, rows_of(logits, B), B, V, how, rounds), V),
                         distribution(logits, how)));
        }
}

// In the narrow rows everything is a candidate; in the widest row top_k is cut from the list of candidates
// (50, 300) or from the whole row (9000); of the flat row no list reaches top_p.
TEST_CASE_TEMPLATE("sampling: the kernel draws what the host draws", Float, float, bf16) {
    for (const Context& ctx : both_lane_counts())
        for (const auto& [V, scale] : std::initializer_list<std::pair<int, double>>{
                 {1, 1.0}, {7, 1.0}, {50, 3.0}, {2047, 2.0}, {kWide / 2 + 1, 0.1}, {kWide, 3.0}})
            for (const Sampling& how : std::initializer_list<Sampling>{{0.0f, 0, 1.0f, 9},
                                                                       {1.0f, 0, 1.0f, 9},
                                                                       {1.0f, 0, 0.9f, 9},
                                                                       {1.0f, 1, 0.9f, 9},
                                                                       {0.9f, 50, 1.0f, 9},
                                                                       {1.1f, 50, 0.9f, 9},
                                                                       {2.0f, 300, 0.1f, 9},
                                                                       {1.0f, 9000, 0.9f, 9},
                                                                       {5.0f, 9000, 1.0f, 9}}) {
                if (kFewer && V > 50 && V < kWide) continue;
                CAPTURE(ctx.row_lanes);
                CAPTURE(V);
                CAPTURE(how.temperature);
                CAPTURE(how.top_k);
                CAPTURE(how.top_p);
                const int B = 2, Vp = ceil_div(V, 8) * 8;
                const int rounds = ctx.row_lanes == 1 || kFewer ? kRounds : 2;
                const auto logits = normal_values<Float>((size_t)B * Vp, 5, scale, -30.0);
                CHECK(draw(ctx, logits, B, V, how, rounds) == draw_on_host(logits, B, V, how, rounds));
            }
}

TEST_CASE("sampling: equal logits") {
    const Sampling greedy{0.0f, 0, 1.0f, 1};
    CHECK(sample_token(std::vector<float>{-2, -1, -1}.data(), 3, 0.0f, 0.9) == 1);
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(ctx.row_lanes);
        CHECK(draw(ctx, rows_of({1, 5, 3, 5, 5}, 2), 2, 5, greedy) == std::vector<int>{1, 1});

        // all tie with the k-th, and with the one that reaches top_p: all may be drawn, each as often
        const std::vector<float> row(10, -3.0f);
        for (const Sampling& how :
             std::initializer_list<Sampling>{{1.0f, 1, 1.0f, 1}, {1.0f, 4, 0.1f, 1}, {0.5f, 0, 0.1f, 1}}) {
            const int B = kFewer ? 3 : 20;
            CHECK(draw(ctx, rows_of(row, B), B, 10, how) == draw_on_host(rows_of(row, B), B, 10, how));
            CHECK(likely(counts(draw_on_host(row, 1, 10, how, 1000), 10), std::vector<double>(10, 0.1)));
        }
        // more ties than the list of candidates holds
        const int kMany = kFewer ? 1 : 2;
        const auto many = rows_of(std::vector<float>(5000, 2.0f), kMany);
        for (const Sampling& how :
             std::initializer_list<Sampling>{{1.0f, 5, 0.5f, 1}, greedy, {1.0f, 0, 0.5f, 1}}) {
            CHECK(draw(ctx, many, kMany, 5000, how) == draw_on_host(many, kMany, 5000, how));
            if (kFewer) break;
        }
    }
}

template <int LANES>
__global__ void find_place_kernel(int* index, uint64_t* left, const uint64_t* units, int n, uint64_t number) {
    Place place;
    if (find_place<LANES>(place, units, n, number)) {
        *index = place.index;
        *left = place.left;
    }
}

// Every number, so that each step of the running sum is met from both sides.
TEST_CASE("sampling: a place in a running sum") {
    for (const std::vector<uint64_t>& units : std::initializer_list<std::vector<uint64_t>>{
             {3}, {0, 2, 0, 0, 1, 0}, std::vector<uint64_t>(100, 1)}) {
        DeviceArray<uint64_t> d_units(units), left(1);
        DeviceArray<int> index(1);
        uint64_t sum = 0;
        for (int want = 0; want < (int)units.size(); want++)
            for (uint64_t want_left = 0; want_left < units[want]; want_left++, sum++)
                for (bool warp : {false, true}) {
                    index.set({-1});
                    if (warp)
                        find_place_kernel<32><<<1, 32>>>((int*)index, (uint64_t*)left, (uint64_t*)d_units,
                                                         (int)units.size(), sum);
                    else
                        find_place_kernel<1><<<1, 1>>>((int*)index, (uint64_t*)left, (uint64_t*)d_units,
                                                       (int)units.size(), sum);
                    CHECK(index.get()[0] == want);
                    CHECK(left.get()[0] == want_left);
                }
    }
}

TEST_CASE("sampling: the ends of the interval") {
    const std::vector<float> row = {-INFINITY, 1, -100, 2, -INFINITY};
    const double most = 0x1.fffffffffffffp-1;
    CHECK(sample_token(row.data(), 5, 1.0f, 0.0) == 1);
    CHECK(sample_token(row.data(), 5, 1.0f, most) == 3);
    for (int bit = 0; bit < 63; bit++)
        for (uint64_t offset = 0; offset < 100; offset++)
            for (const uint64_t total :
                 {(uint64_t{1} << bit) + offset, (uint64_t{1} << bit) * 2 - 1 - offset})
                if (total > 0 && total < uint64_t{1} << 63 && units_before(most, total) >= total)
                    FAIL("drawn beyond the total of ", total);
    CHECK(units_to_keep(1e-30f, 5) == 1);
    CHECK(units_to_keep(0.5f, 5) == 3);
}

TEST_CASE("sampling: logits that are no numbers") {
    const float inf = INFINITY, nan = NAN;
    for (const Context& ctx : both_lane_counts())
        for (const Sampling& how : std::initializer_list<Sampling>{{0.0f, 0, 1.0f, 1},
                                                                   {1.0f, 0, 1.0f, 1},
                                                                   {0.7f, 2, 1.0f, 1},
                                                                   {1.0f, 0, 0.5f, 1},
                                                                   {1.0f, 3, 0.9f, 1}}) {
            CAPTURE(ctx.row_lanes);
            CAPTURE(how.temperature);
            CAPTURE(how.top_k);
            CAPTURE(how.top_p);
            // those with a probability of zero are never drawn
            for (const auto& [row, possible] :
                 std::initializer_list<std::pair<std::vector<float>, std::vector<int>>>{
                     {{-inf, -inf, 3, -inf}, {2}},
                     {{nan, 4, nan, nan, 4.5, -inf}, {1, 4}},
                     {{-inf, -inf}, {0}},
                     {{nan, nan, nan}, {0}},
                     {{nan, -inf, -inf}, {1}},
                     {{1, inf, 2, inf}, {1}}}) {
                const int V = (int)row.size(), B = kFewer ? 2 : 5;
                const auto tokens = draw(ctx, rows_of(row, B), B, V, how);
                CHECK(tokens == draw_on_host(rows_of(row, B), B, V, how));
                for (int t : tokens) CHECK(std::count(possible.begin(), possible.end(), t) == 1);
            }
            // nothing but a few numbers in a large vocabulary: the list of candidates is of no use
            const int V = kFewer ? 2000 : 6000;
            std::vector<float> sparse(V, -inf);
            sparse[17] = -2, sparse[V - 1] = -1;
            CHECK(draw(ctx, rows_of(sparse, 2), 2, V, how) == draw_on_host(rows_of(sparse, 2), 2, V, how));
        }
}
