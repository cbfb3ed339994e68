// Attention cut to k keys a row, and the statistics of attention rows, against plain loops in double: fp32
// and bf16, T off every tile, equal scores, rows that keep next to nothing, k from 1 to beyond T.
#include "../llmc/attention.cuh"
#include "../llmc/attention_cut.cuh"
#include "../llmc/attention_row_stats.cuh"
#include "check.h"
#include "errors.h"
#include "reference.h"

using bf16 = __nv_bfloat16;

namespace {

struct Shape {
    int B, T, NH, hs;
    int C() const { return NH * hs; }
    size_t rows() const { return (size_t)B * NH * T; }
    size_t qkv() const { return (size_t)B * T * 3 * C(); }
};

const Cut kCuts[] = {Cut::dense, Cut::topk, Cut::random, Cut::recent, Cut::first_recent};

// ---------------------------------------------------------------------------------------------------------
// the definition

// The n-th number of SplitMix64 from a seed.
uint64_t splitmix(uint64_t seed, uint64_t n) {
    uint64_t z = seed + (n + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// The keys that a row with these scores keeps: all keys sorted by what the cut goes by, the first k of them.
std::vector<bool> kept_keys(const std::vector<float>& score, Cut cut, int k, uint64_t seed, size_t row) {
    const int n = (int)score.size();
    const uint64_t row_seed = splitmix(seed, row);
    std::vector<double> rank(n);  // what is larger is kept first
    for (int j = 0; j < n; j++) {
        if (cut == Cut::dense) rank[j] = 0;
        if (cut == Cut::topk) rank[j] = (double)score[j];
        if (cut == Cut::random) rank[j] = (double)(splitmix(row_seed, j) >> 32);
        if (cut == Cut::recent) rank[j] = j;
        if (cut == Cut::first_recent) rank[j] = j == 0 ? n : j;
    }
    std::vector<int> order(n);
    for (int j = 0; j < n; j++) order[j] = j;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rank[a] > rank[b]; });
    std::vector<bool> kept(n, false);
    for (int x = 0; x < (cut == Cut::dense ? n : std::min(k, n)); x++) kept[order[x]] = true;
    return kept;
}

// The scores of query i as the kernels promise them, bit for bit: fmaf over d in order, times 1 / sqrt(hs).
// Which of two keys is larger is decided by these bits; all else is computed from them in double.
template <class Float>
std::vector<float> row_scores(const std::vector<Float>& qkv, Shape s, int b, int head, int i) {
    const Float* q = &qkv[((size_t)b * s.T + i) * 3 * s.C() + head * s.hs];
    std::vector<float> score;
    for (int j = 0; j <= i; j++) {
        const Float* key = &qkv[((size_t)b * s.T + j) * 3 * s.C() + s.C() + head * s.hs];
        float dot = 0.0f;
        for (int d = 0; d < s.hs; d++) dot = std::fma((float)q[d], (float)key[d], dot);
        score.push_back(dot * (1.0f / std::sqrt((float)s.hs)));
    }
    return score;
}

std::vector<double> softmax(const std::vector<float>& score) {
    const double max = (double)*std::max_element(score.begin(), score.end());
    std::vector<double> p;
    double sum = 0;
    for (float x : score) {
        p.push_back(std::exp((double)x - max));
        sum += p.back();
    }
    for (double& x : p) x /= sum;
    return p;
}

// The same, over the keys with keep[j] alone; 0 elsewhere.
std::vector<double> softmax_of(const std::vector<float>& score, const std::vector<bool>& keep) {
    std::vector<float> masked = score;
    for (size_t j = 0; j < score.size(); j++)
        if (!keep[j]) masked[j] = -INFINITY;
    return softmax(masked);
}

// sum over j of w[j] v_j
template <class Float>
std::vector<double> mix_values(const std::vector<double>& w, const std::vector<Float>& qkv, Shape s, int b,
                               int head) {
    std::vector<double> o(s.hs);
    for (size_t j = 0; j < w.size(); j++)
        for (int d = 0; d < s.hs; d++)
            o[d] +=
                w[j] * (double)(float)qkv[((size_t)b * s.T + j) * 3 * s.C() + 2 * s.C() + head * s.hs + d];
    return o;
}

struct Result {
    std::vector<double> out;   // [B,T,C]
    std::vector<double> kept;  // [B,NH,T]
};

template <class Float>
Result cut_by_definition(const std::vector<Float>& qkv, Shape s, Cut cut, int k, bool renormalize,
                         uint64_t seed) {
    Result result{std::vector<double>((size_t)s.B * s.T * s.C()), std::vector<double>(s.rows())};
    for (int b = 0; b < s.B; b++)
        for (int head = 0; head < s.NH; head++)
            for (int i = 0; i < s.T; i++) {
                const size_t row = ((size_t)b * s.NH + head) * s.T + i;
                const auto score = row_scores(qkv, s, b, head, i);
                const auto keep = kept_keys(score, cut, k, seed, row);
                const auto p = softmax(score);
                for (int j = 0; j <= i; j++) result.kept[row] += keep[j] ? p[j] : 0;
                const auto o = mix_values(softmax_of(score, keep), qkv, s, b, head);
                for (int d = 0; d < s.hs; d++)
                    result.out[((size_t)b * s.T + i) * s.C() + head * s.hs + d] =
                        o[d] * (renormalize ? 1 : result.kept[row]);
            }
    return result;
}

// ---------------------------------------------------------------------------------------------------------
// what the kernels give

template <class Float>
struct Run {
    std::vector<Float> out;
    std::vector<float> kept;
};
template <class Float>
Run<Float> run_cut(const Context& ctx, const std::vector<Float>& qkv, Shape s, Cut cut, int k,
                   bool renormalize, uint64_t seed) {
    DeviceArray<Float> d_qkv(qkv), out((size_t)s.B * s.T * s.C());
    DeviceArray<float> kept(s.rows());
    attention_cut_forward<Float>(ctx, out, kept, d_qkv, s.B, s.T, s.NH, s.hs, cut, k, renormalize, seed);
    return {out.get(), kept.get()};
}

template <class Float>
void check_cut(const std::vector<Float>& qkv, Shape s, Cut cut, int k, bool renormalize) {
    const auto want = cut_by_definition(qkv, s, cut, k, renormalize, 17);
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(s.T);
        CAPTURE(s.hs);
        CAPTURE((int)cut);
        CAPTURE(k);
        CAPTURE(renormalize);
        CAPTURE(ctx.row_lanes);
        const auto got = run_cut(ctx, qkv, s, cut, k, renormalize, 17);
        CHECK(relative_error(got.out, want.out) < tolerance<Float>());
        CHECK(largest_error(got.kept, want.kept) < tolerance<float>());
    }
}

// Rows that are hard on a selection: see the cases.
enum class Rows { normal, few_distinct, all_equal, two_zeros, huge, tiny, rising, falling, first_takes_all };
const Rows kHardRows[] = {Rows::few_distinct, Rows::all_equal, Rows::two_zeros, Rows::huge,
                          Rows::tiny,         Rows::rising,    Rows::falling,   Rows::first_takes_all};

template <class Float>
std::vector<Float> make_qkv(Shape s, Rows kind, uint64_t seed = 7) {
    auto qkv = normal_values<Float>(s.qkv(), seed);
    const auto small = random_ints(s.qkv(), 3, seed + 1);
    for (size_t at = 0; at < qkv.size(); at++) {
        const int C = s.C(), part = (int)(at / C % 3), d = (int)(at % C) % s.hs,
                  t = (int)(at / (3 * (size_t)C) % s.T);
        if (part == 2) continue;  // the values stay random
        const bool query = part == 0;
        float x = (float)qkv[at];
        switch (kind) {
            case Rows::normal:
                break;
            case Rows::few_distinct:  // three different keys; products of small integers are exact
                x = (float)((query ? small[at] : small[(size_t)(t % 3) * s.hs + d]) - 1);
                break;
            case Rows::all_equal:
                x = query ? x : 0.25f;
                break;
            case Rows::two_zeros:  // the last product underflows to +0 or -0, which are equal
                x = d < s.hs - 1 ? 0.0f : query ? 1e-30f : (t % 3 == 1 ? -1e-30f : 1e-30f);
                break;
            case Rows::huge:
                x *= 30.0f;
                break;
            case Rows::tiny:
                x *= 1e-12f;
                break;
            case Rows::rising:
            case Rows::falling:
                x = query ? 0.125f : (float)t / (kind == Rows::rising ? 32.0f : -32.0f);
                break;
            case Rows::first_takes_all:  // what other cuts keep underflows
                x = query ? 8.0f : t == 0 ? 64.0f : x;
                break;
        }
        qkv[at] = (Float)x;
    }
    return qkv;
}

}  // namespace

TEST_CASE_TEMPLATE("every cut is its definition: awkward sizes", Float, float, bf16) {
    const Shape shapes[] = {{1, 1, 1, 64}, {1, 2, 1, 8},    {2, 3, 2, 40},
                            {2, 33, 3, 8}, {1, 41, 1, 128}, {1, 66, 2, 64}};
    for (const Shape& s : shapes)
        for (Cut cut : kCuts)
            for (int k : {1, 2, 8, 33, 1000})
                if (!kFewer || k == 2 || k == 33)
                    check_cut(make_qkv<Float>(s, Rows::normal), s, cut, k, k % 2 == 0);
}

TEST_CASE_TEMPLATE("every cut is its definition: hard rows, renormalized or not", Float, float, bf16) {
    const Shape s{1, 45, 1, 40};
    for (Rows kind : kHardRows) {
        CAPTURE((int)kind);
        const auto qkv = make_qkv<Float>(s, kind);
        for (Cut cut : kCuts)
            for (int k : {1, 5, 32})
                for (bool renormalize : {false, true})
                    if (!kFewer || (k == 5 && renormalize)) check_cut(qkv, s, cut, k, renormalize);
    }
}

TEST_CASE("k may be as large as an int, and the kept mass need not be asked for") {
    const Shape s{1, 20, 1, 8};
    const auto qkv = make_qkv<float>(s, Rows::normal);
    DeviceArray<float> d_qkv(qkv), out(s.T * s.hs);
    for (const Context& ctx : both_lane_counts()) {
        const auto dense = run_cut(ctx, qkv, s, Cut::dense, 1, false, 0);
        for (float mass : dense.kept) CHECK(mass == 1.0f);
        for (Cut cut : kCuts) {
            attention_cut_forward<float>(ctx, out, nullptr, d_qkv, s.B, s.T, s.NH, s.hs, cut, INT32_MAX,
                                         false, 0);
            CHECK(out.get() == dense.out);
        }
    }
}

TEST_CASE("more tokens than a block can hold 8 rows of, and more than it can hold one of") {
    const Shape s{1, 150, 1, 8};
    const auto qkv = make_qkv<float>(s, Rows::normal);
    for (Context ctx : both_lane_counts()) {
        const auto want = run_cut(ctx, qkv, s, Cut::topk, 8, true, 0);
        ctx.max_shared = sizeof(float) * (kMaxCutHeadSize * kCutRows + 3 * 150);
        CHECK(same_bits(run_cut(ctx, qkv, s, Cut::topk, 8, true, 0).out, want.out));
        ctx.max_shared = sizeof(float) * (kMaxCutHeadSize * kCutRows + 150);
        CHECK(max_cut_context(ctx) == 150);
        CHECK(same_bits(run_cut(ctx, qkv, s, Cut::topk, 8, true, 0).out, want.out));
        ctx.max_shared -= sizeof(float);
        check_mentions(error_of([&] { run_cut(ctx, qkv, s, Cut::topk, 8, true, 0); }),
                       "use one of at most 149 tokens");
    }
}

TEST_CASE(
    "uncut, it is the training forward; cut to the top k, it keeps the mass that the training forward reports") {
    const Context ctx = make_context();
    const Shape s{2, 80, 1, 64};
    const auto qkv = make_qkv<float>(s, Rows::normal);
    DeviceArray<float> d_qkv(qkv), out((size_t)s.B * s.T * s.C());
    DeviceArray<float> lse(s.rows()), theta(s.rows()), mass(s.rows()), tie(s.rows());
    for (int k : {1, 8, 70}) {
        attention_forward<float>(ctx, out, {lse, theta, mass, tie}, d_qkv, s.B, s.T, s.NH, s.hs, k);
        const auto dense = run_cut(ctx, qkv, s, Cut::dense, k, false, 0);
        const auto top = run_cut(ctx, qkv, s, Cut::topk, k, false, 0);
        CHECK(relative_error(dense.out, to_double(out.get())) < tolerance<float>());
        CHECK(relative_error(top.kept, to_double(mass.get())) < tolerance<float>());
    }
}

// The sets of Cut::random, seen through values that are one-hot and scores that are 0: out_i[j] is 1 / n
// where j is kept.
std::vector<std::vector<int>> random_sets(const Context& ctx, Shape s, int k, uint64_t seed) {
    std::vector<float> qkv(s.qkv(), 0.0f);
    for (int bt = 0; bt < s.B * s.T; bt++)
        for (int head = 0; head < s.NH; head++)
            qkv[(size_t)bt * 3 * s.C() + 2 * s.C() + head * s.hs + bt % s.T] = 1.0f;
    const auto got = run_cut(ctx, qkv, s, Cut::random, k, false, seed);
    std::vector<std::vector<int>> sets(s.rows());
    for (int b = 0; b < s.B; b++)
        for (int head = 0; head < s.NH; head++)
            for (int i = 0; i < s.T; i++)
                for (int d = 0; d < s.hs; d++)
                    if (got.out[((size_t)b * s.T + i) * s.C() + head * s.hs + d] > 0.0f)
                        sets[((size_t)b * s.NH + head) * s.T + i].push_back(d);
    return sets;
}

TEST_CASE("random keys: exactly k, none that is not visible, every position as often as any other") {
    const Context ctx = make_context();
    const Shape s{64, 64, 4, 64};
    const int k = 8, n = 48;  // the row looked at sees 48 keys
    const auto sets = random_sets(ctx, s, k, 5);
    for (size_t row = 0; row < sets.size(); row++) {
        const int i = (int)row % s.T;
        if ((int)sets[row].size() != std::min(k, i + 1) || sets[row].back() > i) {
            CAPTURE(row);
            CHECK((int)sets[row].size() == std::min(k, i + 1));
            CHECK(sets[row].back() <= i);
        }
    }

    const int draws = s.B * s.NH;
    std::vector<double> count(n), pairs(n * n);
    double shared_with_next = 0;
    for (int bh = 0; bh < draws; bh++) {
        const auto &set = sets[(size_t)bh * s.T + n - 1], &next = sets[(size_t)bh * s.T + n];
        for (int a : set) {
            count[a]++;
            shared_with_next += (double)std::count(next.begin(), next.end(), a);
            for (int b : set) pairs[a * n + b]++;
        }
    }
    // sum (count - mean)^2 / mean is (1 - k/n) n/(n-1) times a chi-square of n - 1 degrees of freedom, which
    // has mean n - 1 and variance 2 (n - 1): five standard deviations either way
    const double mean = (double)draws * k / n, factor = (1 - (double)k / n) * n / (n - 1);
    double chi2 = 0;
    for (double c : count) chi2 += (c - mean) * (c - mean) / mean / factor;
    CHECK(std::fabs(chi2 - (n - 1)) < 5 * std::sqrt(2.0 * (n - 1)));
    // two positions together: k (k - 1) / (n (n - 1)), five standard deviations of a Poisson count of the
    // busiest pair's size are enough for all of the n^2 pairs
    const double pair_mean = (double)draws * k * (k - 1) / (n * (n - 1.0));
    for (int a = 0; a < n; a++)
        for (int b = 0; b < a; b++) CHECK(pairs[a * n + b] < pair_mean + 7 * std::sqrt(pair_mean));
    // neighbouring rows are drawn independently: k k / (n + 1) keys in common
    const double common = (double)draws * k * k / (n + 1);
    CHECK(std::fabs(shared_with_next - common) < 5 * std::sqrt(common));
}

TEST_CASE("random keys: a seed gives the same keys again, another seed others") {
    const Context ctx = make_context();
    const Shape s{1, 64, 2, 64};
    const auto first = random_sets(ctx, s, 8, 5);
    CHECK(random_sets(ctx, s, 8, 5) == first);
    const auto other = random_sets(ctx, s, 8, 6);
    int same = 0;
    for (size_t row = 0; row < first.size(); row++)
        if ((int)row % s.T >= 32) same += first[row] == other[row];
    CHECK(same == 0);
}

TEST_CASE_TEMPLATE("the same input twice gives the same bits", Float, float, bf16) {
    const Shape s{2, 100, 2, 64};
    const auto qkv = make_qkv<Float>(s, Rows::normal);
    for (const Context& ctx : both_lane_counts())
        for (Cut cut : kCuts) {
            const auto a = run_cut(ctx, qkv, s, cut, 8, true, 3), b = run_cut(ctx, qkv, s, cut, 8, true, 3);
            CHECK(same_bits(a.out, b.out));
            CHECK(same_bits(a.kept, b.kept));
        }
}

// ---------------------------------------------------------------------------------------------------------
// the statistics of rows

namespace {

double norm(const std::vector<double>& x) {
    double sum = 0;
    for (double d : x) sum += d * d;
    return std::sqrt(sum);
}
std::vector<double> difference(std::vector<double> a, const std::vector<double>& b) {
    for (size_t d = 0; d < a.size(); d++) a[d] -= b[d];
    return a;
}

template <class Float>
std::vector<RowStats> run_stats(const Context& ctx, const std::vector<Float>& qkv, Shape s, int k) {
    DeviceArray<Float> d_qkv(qkv);
    DeviceArray<RowStats> stats(s.rows());
    attention_row_stats<Float>(ctx, stats, d_qkv, s.B, s.T, s.NH, s.hs, k);
    return stats.get();
}

// |got - want| within 1e-5 of `size`, and a little for what underflows.
void check_near(float got, double want, double size) {
    CHECK(std::fabs((double)got - want) <= tolerance<float>() * size + 1e-30);
}
void check_near(float got, double want) {
    check_near(got, want, want);
}

// The fewest keys that hold a share of the mass: which they are is open where a sum is the share but for
// rounding.
void check_keys(float got, const std::vector<double>& sorted, double share) {
    REQUIRE(got >= 1.0f);
    REQUIRE(got <= (float)sorted.size());
    const int keys = (int)got;
    CHECK((float)keys == got);
    double with = 0;
    for (int x = 0; x < keys; x++) with += sorted[x];
    CHECK(with > share - 1e-6);
    CHECK(with - sorted[keys - 1] < share + 1e-6);
}

template <class Float>
void check_row(const RowStats& got, const std::vector<Float>& qkv, Shape s, int b, int head, int i, int k) {
    CAPTURE(i);
    const int n = i + 1;
    const auto score = row_scores(qkv, s, b, head, i);
    const auto p = softmax(score);
    auto sorted = p;
    std::sort(sorted.rbegin(), sorted.rend());

    auto check_mass = [&](float mass, float mass_nosink, int keys) {
        const auto kept = kept_keys(score, Cut::topk, keys, 0, 0);
        double want = 0, want_nosink = 0;
        for (int x = 0; x < std::min(keys, n); x++) want += sorted[x];
        for (int j = 1; j < n; j++) want_nosink += kept[j] ? p[j] : 0;
        check_near(mass, want);
        check_near(mass_nosink, want_nosink);
    };
    for (int x = 0; x < kNumReportKs; x++) check_mass(got.mass[x], got.mass_nosink[x], kReportKs[x]);
    check_mass(got.mass_k, got.mass_nosink_k, k);

    double entropy = 0, squares = 0, nosink = 0;
    for (int j = 0; j < n; j++) {
        entropy -= p[j] > 0 ? p[j] * std::log(p[j]) : 0;
        squares += p[j] * p[j];
        nosink += j > 0 ? p[j] : 0;
    }
    check_near(got.entropy, entropy, 1 + entropy);
    check_near(got.sum_squares, squares);
    check_near(got.nosink, nosink);
    check_near(got.first, p[0]);
    check_near(got.self, p[i]);
    check_near(got.previous, i > 0 ? p[i - 1] : 0);
    CHECK(got.max_score == *std::max_element(score.begin(), score.end()));
    check_keys(got.keys90, sorted, 0.90);
    check_keys(got.keys95, sorted, 0.95);
    check_keys(got.keys99, sorted, 0.99);

    const auto kept = kept_keys(score, Cut::topk, k, 0, 0);
    std::vector<bool> left(n);
    for (int j = 0; j < n; j++) left[j] = !kept[j];
    const auto cut = softmax_of(score, kept);
    double tau = 0, total_variation = 0, longest = 0;
    for (int j = 0; j < n; j++) {
        tau += left[j] ? p[j] : 0;
        total_variation += std::fabs(p[j] - cut[j]) / 2;
        std::vector<double> one(n);
        one[j] = 1;
        longest = std::max(longest, norm(mix_values(one, qkv, s, b, head)));
    }
    check_near(got.tau, tau);
    check_near(got.tau, total_variation, 1);
    const auto o = mix_values(p, qkv, s, b, head), o_k = mix_values(cut, qkv, s, b, head);
    check_near(got.norm, norm(o), longest);
    check_near(got.error_direct, norm(difference(o, o_k)), longest);
    check_near(got.error, (double)got.error_direct, longest);
    if (n <= k) {
        CHECK(got.tau == 0.0f);
        CHECK(got.error == 0.0f);
    } else {
        const auto o_tail = mix_values(softmax_of(score, left), qkv, s, b, head);
        check_near(got.error, tau * norm(difference(o_tail, o_k)), tau * longest);
    }
}

template <class Float>
void check_stats(Shape s, Rows kind, int k) {
    const auto qkv = make_qkv<Float>(s, kind);
    for (const Context& ctx : both_lane_counts()) {
        CAPTURE(s.T);
        CAPTURE(s.hs);
        CAPTURE((int)kind);
        CAPTURE(k);
        CAPTURE(ctx.row_lanes);
        const auto got = run_stats(ctx, qkv, s, k);
        for (int b = 0; b < s.B; b++)
            for (int head = 0; head < s.NH; head++)
                for (int i = 0; i < s.T; i++)
                    check_row(got[((size_t)b * s.NH + head) * s.T + i], qkv, s, b, head, i, k);
    }
}

}  // namespace

TEST_CASE_TEMPLATE("row statistics: awkward sizes, k from 1 to beyond T", Float, float, bf16) {
    for (int k : {1, 8, 1000}) check_stats<Float>({1, 3, 2, 64}, Rows::normal, k);
    check_stats<Float>({1, 1, 1, 8}, Rows::normal, 1);
    check_stats<Float>({2, 34, 2, 40}, Rows::normal, 5);
    check_stats<Float>({1, 70, 1, 128}, Rows::normal, 3);
    check_stats<Float>({1, 130, 1, 8}, Rows::normal, 100);
}

TEST_CASE_TEMPLATE("row statistics: equal scores, one key with all the mass, underflow", Float, float, bf16) {
    for (Rows kind : kHardRows) check_stats<Float>({1, 67, 1, 16}, kind, 8);
}

TEST_CASE("row statistics and cut attention agree, and with what the trainer's validation sums up") {
    const Context ctx = make_context();
    const Shape s{2, 80, 2, 64};
    const int k = 8;
    const auto qkv = make_qkv<float>(s, Rows::normal);
    const auto stats = run_stats(ctx, qkv, s, k);
    const auto cut = run_cut(ctx, qkv, s, Cut::topk, k, true, 0);
    for (size_t row = 0; row < s.rows(); row++) check_near(stats[row].mass_k, (double)cut.kept[row]);

    DeviceArray<float> d_qkv(qkv), out((size_t)s.B * s.T * s.C());
    DeviceArray<float> lse(s.rows()), theta(s.rows()), mass(s.rows()), tie(s.rows()), sums(s.B * s.NH * 4);
    const AttentionRows saved{lse, theta, mass, tie};
    attention_forward<float>(ctx, out, saved, d_qkv, s.B, s.T, s.NH, s.hs, k);
    attention_sink_sums<float>(ctx, sums, saved, d_qkv, s.B, s.T, s.NH, s.hs, k);
    std::vector<double> want(s.B * s.NH * 4);
    for (size_t row = 0; row < s.rows(); row++) {
        if ((int)row % s.T < k) continue;
        double* w = &want[row / s.T * 4];
        w[0] += stats[row].first;
        w[1] += stats[row].self;
        w[2] += stats[row].mass_nosink_k;
        w[3] += stats[row].nosink;
    }
    CHECK(relative_error(sums.get(), want) < tolerance<float>());
}

TEST_CASE("row statistics: few rows in a block, and a context that is too long for one") {
    const Shape s{1, 70, 1, 8};
    const auto qkv = make_qkv<float>(s, Rows::normal);
    for (Context ctx : both_lane_counts()) {
        const auto want = run_stats(ctx, qkv, s, 8);
        const size_t row = 70 + 1 + 128;
        ctx.max_shared = sizeof(float) * (kMaxCutHeadSize * kCutRows + row);
        CHECK(max_row_stats_context(ctx) == 70);
        CHECK(same_bits(run_stats(ctx, qkv, s, 8), want));
        ctx.max_shared -= sizeof(float);
        check_mentions(error_of([&] { run_stats(ctx, qkv, s, 8); }), "use one of at most 69 tokens");
    }
}

TEST_CASE_TEMPLATE("the map of a head: softmax below the diagonal, zero above", Float, float, bf16) {
    const Shape s{2, 37, 3, 16};
    const auto qkv = make_qkv<Float>(s, Rows::normal);
    DeviceArray<Float> d_qkv(qkv);
    for (const Context& ctx : both_lane_counts())
        for (int head : {0, 2}) {
            DeviceArray<float> p(s.T * s.T);
            attention_map<Float>(ctx, p, d_qkv, 1, head, s.T, s.NH, s.hs);
            const std::vector<float> got = p.get();
            for (int i = 0; i < s.T; i++) {
                const auto want = softmax(row_scores(qkv, s, 1, head, i));
                for (int j = 0; j < s.T; j++)
                    if (j > i)
                        CHECK(got[i * s.T + j] == 0.0f);
                    else
                        check_near(got[i * s.T + j], want[j]);
            }
        }
}
