// Inference against the whole-sequence forward and against the plain-loop reference: token by token or all at
// once, dense or cut to k keys, one sequence or many, and what generating relies on (a full context, the end
// of a text).
#define NO_MAIN
#include "../infer_gpt2.cu"
#include "check.h"
#include "reference.h"
#include "small_infer.h"
#include "temp_folder.h"

// Logits of every position of one sequence by the forward over whole sequences.
template <class Float>
static std::vector<std::vector<float>> all_logits(const Context& ctx, const Model<Float>& m,
                                                  const Tokens& text, SequenceAttention how) {
    const int T = (int)text.size(), V = m.config.vocab_size, Vp = m.config.padded_vocab_size;
    const Bench<Float> bench(ctx, m, 1, T);
    const std::vector<int> x(text.begin(), text.end());
    to_device(bench.a.inputs, x.data(), x.size());
    forward(ctx, m, bench.a, 1, T, nullptr, [&](int l) { attend_sequences(ctx, m, bench.a, l, 1, T, how); });
    matmul_forward<Float>(ctx, bench.a.logits, bench.a.normed, m.params.wte, nullptr, T, m.config.channels,
                          Vp);
    const std::vector<Float> stored = to_host(ctx, bench.a.logits, (size_t)T * Vp);
    std::vector<std::vector<float>> logits;
    for (int t = 0; t < T; t++)
        logits.emplace_back(stored.begin() + (size_t)t * Vp, stored.begin() + (size_t)t * Vp + V);
    return logits;
}

// The same by decoding: the first `prompt` tokens in one pass, the rest one by one, the tokens given.
template <class Float>
static void check_decoding(const Context& ctx, const Model<Float>& m, int B, DecodeHow how,
                           SequenceAttention same, double bound, int T = 33) {
    const GPT2Config& config = m.config;
    const int V = config.vocab_size;
    CAPTURE(B);
    CAPTURE((int)how.mode);
    std::vector<Tokens> texts;
    std::vector<int> lengths;
    for (int b = 0; b < B; b++) {
        texts.push_back(random_tokens(T, 50 + b));
        lengths.push_back((b * 7 + 4) % 20);  // tokens of different numbers in the cache
    }
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    Acts<Float> a, one;
    Decoding<Float> d;
    const DeviceMemory memory(ctx, "test", "", [&](Arena& arena) {
        a = lay_out_acts<Float>(arena, config, B, longest);
        one = lay_out_acts<Float>(arena, config, B, 1);
        d = lay_out_decoding<Float>(arena, config, B, 48, 40, !ctx.use_decode_halves);
    });
    memory.zero();
    std::vector<int> inputs((size_t)B * longest), filled, filled_lengths, positions = lengths;
    for (int b = B - 1; b >= 0; b--) {  // in any order
        std::copy(texts[b].begin(), texts[b].begin() + lengths[b], inputs.begin() + filled.size() * longest);
        filled.push_back(b);
        filled_lengths.push_back(lengths[b]);
    }
    to_device(a.inputs, inputs.data(), inputs.size());
    to_device(d.filled, filled.data(), filled.size());
    to_device(d.lengths, filled_lengths.data(), filled_lengths.size());
    to_device(d.positions, positions.data(), positions.size());
    std::vector<std::vector<std::vector<float>>> want;
    for (int b = 0; b < B; b++) want.push_back(all_logits(ctx, m, texts[b], same));

    const auto compare = [&] {
        const std::vector<Float> got = to_host(ctx, d.logits, (size_t)B * config.padded_vocab_size);
        for (int b = 0; b < B; b++) {
            CAPTURE(b);
            const std::vector<Float> row(got.begin() + (size_t)b * config.padded_vocab_size,
                                         got.begin() + (size_t)b * config.padded_vocab_size + V);
            const std::vector<float>& w = want[b][positions[b]];
            CHECK(relative_error(row, std::vector<double>(w.begin(), w.end())) < bound);
        }
    };
    prefill(ctx, m, a, d, B, longest, how);
    Graph graph;
    for (int step = 0; step < T - longest; step++) {
        std::vector<int> next;
        for (int b = 0; b < B; b++) next.push_back(texts[b][positions[b]]);
        CHECK(to_host(ctx, d.positions, B) == positions);
        to_device(d.tokens, next.data(), next.size());  // the text's tokens, not those that were drawn
        graph.run(ctx, [&] { decode_step(ctx, m, one, d, how, {}); });
        compare();
        for (int& position : positions) position++;
    }
    CHECK(graph.recorded());
}

TEST_CASE_TEMPLATE("token by token gives the logits of the forward over the whole text", Float, float, bf16) {
    const Context ctx = make_context();
    Model<Float> m = make_model<Float>(kSmall);
    const double bound = sizeof(Float) == 4 ? 1e-5 : 2e-2;
    for (const int B : {1, 3, 11}) {  // 11: more than the matrix-vector kernels take
        check_decoding(ctx, m, B, {DecodeMode::dense}, {}, bound);
        check_decoding(ctx, m, B, {DecodeMode::pages, 0, 0.0f}, {}, bound);
    }
    // In bf16 a rounding can exchange two keys of nearly the same score, and with them the output.
    if (sizeof(Float) == 4)
        for (const int k : {1, 4, 100})
            for (const int B : {1, 11})
                check_decoding(ctx, m, B, {DecodeMode::topk, k}, {Cut::topk, k}, bound);
}

TEST_CASE("token by token with the kernels of a GPU: few rows and more, bf16") {
    Context ctx = make_context();
    ctx.row_lanes = 32;
    GPT2Config config = kSmall;
    config.channels = 64;  // of which tensor cores take all products
    Model<bf16> m = make_model<bf16>(config);
    REQUIRE(is_few<bf16>(ctx, 11, config.channels));
    for (const int B : {1, 11}) {
        check_decoding(ctx, m, B, {DecodeMode::dense}, {}, 2e-2);
        check_decoding(ctx, m, B, {DecodeMode::pages, 0, 0.0f}, {}, 2e-2);
    }
}

TEST_CASE_TEMPLATE("token by token in halves of a layer, by clusters", Float, float, bf16) {
    Context ctx = make_context();
    ctx.row_lanes = 32;
    ctx.use_decode_halves = ctx.has_clusters;
    if (!ctx.has_clusters) return;
    GPT2Config config = kSmall;
    config.channels = 128;
    Model<Float> m = make_model<Float>(config);
    REQUIRE(takes_decode_halves<Float>(ctx, config.channels, m.config.head_size(), 48, {}));
    const int T = kOnCpu ? 18 : 33;  // 32 threads a row, and a fiber for each
    check_decoding(ctx, m, 1, {DecodeMode::dense}, {}, sizeof(Float) == 4 ? 1e-5 : 2e-2, T);
    if (sizeof(Float) == 4) check_decoding(ctx, m, 1, {DecodeMode::topk, 4}, {Cut::topk, 4}, 1e-5, T);
}

TEST_CASE("losses are the reference's") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    const int B = 3, T = 29;
    Bench<float> bench(ctx, m, B, T);
    bench.a.logit_rows = 17;  // several rounds, the last of which is shorter
    const std::vector<int> x = random_ints(B * T, kEot, 1), y = random_ints(B * T, kEot, 2);
    const std::vector<float> losses = sequence_losses(bench, x.data(), y.data(), B, T, {}, nullptr, nullptr);
    std::vector<double> gradient;
    const ref::Loss want = ref::gpt2(kSmall, to_double(busy_params<float>(kSmall)), x, y, B, T, 4, Reg::tail,
                                     {0, 0, 0}, &gradient);
    CHECK(std::accumulate(losses.begin(), losses.end(), 0.0) / (B * T) ==
          doctest::Approx(want.ce).epsilon(1e-6));
    // rows that keep all their keys lose nothing
    const auto all = sequence_losses(bench, x.data(), y.data(), B, T, {Cut::topk, T}, nullptr, nullptr);
    CHECK(relative_error(all, to_double(losses)) < 1e-5);
}

TEST_CASE("the mass that the top k keep is the regularizer's M, in the layer that no cut has reached") {
    const Context ctx = make_context();
    GPT2Config config = kSmall;
    config.num_layers = 1;
    Model<float> m = make_model<float>(config);
    const int B = 3, T = 29;
    const Bench<float> bench(ctx, m, B, T);
    const std::vector<int> x = random_ints(B * T, kEot, 1), y = random_ints(B * T, kEot, 2);
    for (const int k : {1, 4, 20}) {
        double kept = 0;
        sequence_losses(bench, x.data(), y.data(), B, T, {Cut::topk, k, false}, nullptr, &kept);
        std::vector<double> gradient;
        const ref::Loss want = ref::gpt2(config, to_double(busy_params<float>(config)), x, y, B, T, k,
                                         Reg::tail, {0}, &gradient);
        CHECK(kept == doctest::Approx(want.mass).epsilon(1e-5));
    }
}

TEST_CASE("scoring: log-probabilities and hits of the tokens asked for, whatever the batch") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    std::vector<Scored> items;
    for (int i = 0; i < 9; i++)
        items.push_back({random_tokens(5 + 3 * (i * 5 % 9), 90 + i), 2 + i % 3, i, 0, true, 1.0});
    for (int i = 0; i < 3; i++)  // and questions whose answers are one token behind the same text
        for (int answer = 0; answer < 4; answer++) {
            items.push_back({random_tokens(6 + 5 * i, 80 + i), 6 + 5 * i, 9 + i, answer, answer == 1, 1.0});
            items.back().tokens.push_back((uint16_t)(7 * answer + i));
        }
    Bench<float> bench(ctx, m, 4, 32);
    bench.a.logit_rows = 17;  // several rounds, the last of which is shorter
    const std::vector<Result> got = score(bench, items, {}, "test");
    for (size_t i = 0; i < items.size(); i++) {
        const Tokens& text = items[i].tokens;
        const auto logits = all_logits(ctx, m, text, {});
        double sum = 0;
        int hits = 0;
        for (size_t t = items[i].first; t < text.size(); t++) {
            const std::vector<float>& row = logits[t - 1];
            double total = 0;
            for (const float z : row) total += std::exp((double)z);
            sum += (double)row[text[t]] - std::log(total);
            hits += std::max_element(row.begin(), row.end()) - row.begin() == text[t];
        }
        CHECK(got[i].sum_logp == doctest::Approx(sum).epsilon(1e-5));
        CHECK(got[i].num_argmax == hits);
        CHECK(got[i].all_argmax == (hits == (int)text.size() - items[i].first));
    }
}

// Greedy decoding the slow way: a whole forward for each token, over the text since the last slide.
static Tokens greedy_reference(const Context& ctx, const Model<float>& m, Tokens text, int n, bool slide,
                               SequenceAttention how) {
    const int context = m.config.max_seq_len;
    const size_t prompt = text.size();
    const size_t half = std::max(1, context / 2);
    size_t window = slide && (int)prompt >= context ? half : prompt;
    for (int i = 0; i < n; i++) {
        if (i > 0 && slide && (int)window > context) window = half;
        const auto logits = all_logits(ctx, m, Tokens(text.end() - (ptrdiff_t)window, text.end()), how);
        const auto& last = logits.back();
        const auto next = (uint16_t)(std::max_element(last.begin(), last.end()) - last.begin());
        if (next == kEot) break;
        text.push_back(next);
        window++;
        if (!slide && (int)text.size() > context) break;
    }
    return Tokens(text.begin() + (ptrdiff_t)prompt, text.end());
}

TEST_CASE("greedy generation, alone and side by side, through full contexts and to the end of the text") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    InferConfig c;
    c.sampling.temperature = 0;
    c.tokens = 75;  // a context of 40 is full several times
    for (const bool slide : {true, false})
        for (const DecodeMode attention : {DecodeMode::dense, DecodeMode::topk, DecodeMode::pages}) {
            CAPTURE(slide);
            CAPTURE(kDecodeWords[(int)attention]);
            c.slide = slide;
            c.attention = attention;
            c.topk = 3;
            c.epsilon = 0;
            const SequenceAttention how =
                c.how().mode == DecodeMode::topk ? SequenceAttention{Cut::topk, 3} : SequenceAttention{};
            std::vector<Tokens> prompts = {random_tokens(3, 1), random_tokens(17, 2), random_tokens(40, 3)};
            if (slide) prompts.push_back(random_tokens(61, 4));
            // side by side, each is what it is alone
            const Generation together = generate(ctx, m, prompts, c, kEot, [](const Tokens&) {});
            int slides = 0;
            for (size_t b = 0; b < prompts.size(); b++) {
                const Tokens want = greedy_reference(ctx, m, prompts[b], (int)c.tokens, slide, how);
                Tokens shown;
                const Generation alone = generate(ctx, m, {prompts[b]}, c, kEot,
                                                  [&](const Tokens& made) { shown.push_back(made.back()); });
                CHECK(alone.made[0] == want);
                CHECK(shown == want);
                CHECK(together.made[b] == want);
                slides += alone.slides;
            }
            CHECK(together.slides == slides);  // nobody is read anew because another is full
        }
}

TEST_CASE("contexts of one to three tokens, which are full again at once") {
    const Context ctx = make_context();
    for (const int context : {1, 2, 3}) {
        CAPTURE(context);
        GPT2Config config = kSmall;
        config.max_seq_len = context;
        Model<float> m = make_model<float>(config);
        InferConfig c;
        c.sampling.temperature = 0;
        c.tokens = 9;
        c.attention = DecodeMode::dense;
        const std::vector<Tokens> prompts = {random_tokens(1, 1), random_tokens(2, 2), random_tokens(7, 3)};
        const Generation g = generate(ctx, m, prompts, c, kEot, [](const Tokens&) {});
        for (size_t b = 0; b < prompts.size(); b++)
            CHECK(g.made[b] == greedy_reference(ctx, m, prompts[b], (int)c.tokens, true, {}));
    }
}

TEST_CASE("prompts that do not fit into one pass are read in several") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    InferConfig c;
    c.attention = DecodeMode::dense;
    c.sampling.temperature = 0;
    c.tokens = 2;
    const int B = 300;
    std::vector<Tokens> prompts;
    for (int b = 0; b < B; b++) prompts.push_back(random_tokens(b % 5 == 0 ? 1 : 38 - b % 3, 100 + b));
    const auto made = [&](const std::vector<Tokens>& texts) {
        return generate(ctx, m, texts, c, -1, [](const Tokens&) {}).made;
    };
    REQUIRE(B * 4 / 5 * 35 > kPrefillTokens);  // those of more than one token
    const std::vector<Tokens> together = made(prompts);
    int different = 0;
    for (int b = 0; b < B; b++) different += together[b] != made({prompts[b]})[0];
    CHECK(different == 0);
}

TEST_CASE(
    "samples: the same for the same seed, others for another; a prompt's own whoever stands beside it") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    InferConfig c;
    c.attention = DecodeMode::dense;
    c.tokens = 20;
    const auto sample = [&](const std::vector<Tokens>& prompts, uint64_t seed) {
        c.sampling.seed = seed;
        return generate(ctx, m, prompts, c, kEot, [](const Tokens&) {}).made;
    };
    const Tokens p = random_tokens(5, 1), q = random_tokens(9, 2);
    CHECK(sample({p}, 1) == sample({p}, 1));
    CHECK(sample({p}, 1) != sample({p}, 2));
    CHECK(sample({p, q}, 1)[0] == sample({p}, 1)[0]);
    CHECK(sample({p, p}, 1)[0] != sample({p, p}, 1)[1]);
}

TEST_CASE("every token is drawn with a random number of its own, also behind a full context") {
    const Context ctx = make_context();
    // All logits are equal, so that a token is its random number.
    Model<float> m = make_model<float>(kSmall);
    m.memory->zero();
    const std::vector<float> equal(kSmall.vocab_size, 0.0f);
    InferConfig c;
    c.attention = DecodeMode::dense;
    c.tokens = 90;  // a context of 40 is full three times
    c.sampling.top_p = 1;
    c.sampling.seed = 3;
    const std::vector<Tokens> prompts = {random_tokens(3, 1), random_tokens(25, 2), random_tokens(60, 3)};
    const Generation g = generate(ctx, m, prompts, c, -1, [](const Tokens&) {});
    CHECK(g.slides >= 3);
    for (size_t b = 0; b < prompts.size(); b++) {
        Tokens want;
        for (int i = 0; i < (int)c.tokens; i++)
            want.push_back((uint16_t)sample_token(equal.data(), kSmall.vocab_size, 1.0f,
                                                  random_uniform(3, b, prompts[b].size() - 1 + i)));
        CHECK(g.made[b] == want);
    }
}

TEST_CASE("what is counted and read is a sequence's own, not what goes on after its end") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    InferConfig c;
    c.stats = true;
    c.attention = DecodeMode::topk;
    c.topk = 2;
    c.slide = false;
    c.tokens = 20;
    c.sampling.temperature = 0;
    const Tokens full = random_tokens(kSmall.max_seq_len, 6), other = random_tokens(12, 7);
    const auto run = [&](const std::vector<Tokens>& prompts) {
        return generate(ctx, m, prompts, c, -1, [](const Tokens&) {});
    };
    const Generation both = run({full, other}), alone = run({other});
    CHECK(run({full}).drawn == 1);  // there is no room for more
    CHECK(both.drawn == alone.drawn + 1);
    CHECK(both.drawn_first == 2);
    const Generation ended = run({full});
    for (size_t i = 0; i < alone.stats.size(); i++) {
        DecodeStats sum = alone.stats[i];
        sum.add(ended.stats[i]);
        CHECK(both.stats[i].tokens == sum.tokens);
        CHECK(both.stats[i].visible == sum.visible);
        CHECK(both.stats[i].tau == doctest::Approx(sum.tau).epsilon(1e-4));
    }
}

TEST_CASE("statistics of decoding: what was read of what there was") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    InferConfig c;
    c.stats = true;
    c.tokens = 20;
    c.sampling.temperature = 0;
    for (const DecodeMode attention : {DecodeMode::dense, DecodeMode::topk, DecodeMode::pages}) {
        c.attention = attention;
        c.topk = 2;
        c.epsilon = 0.05f;
        const Generation g = generate(ctx, m, {random_tokens(12, 6)}, c, -1, [](const Tokens&) {});
        REQUIRE(g.stats.size() == (size_t)kSmall.num_layers * kSmall.num_heads);
        for (const DecodeStats& s : g.stats) {
            CHECK(s.tokens == (float)g.drawn);
            CHECK(s.visible == (float)(g.drawn * 12 + g.drawn * (g.drawn - 1) / 2));
            CHECK(s.keys <= s.visible);
            CHECK(s.tau <= s.certified + 1e-6f * s.tokens);
            if (c.how().mode == DecodeMode::dense) CHECK(s.tau == 0.0f);
            if (c.how().mode == DecodeMode::topk) CHECK(s.tau > 0.0f);
            if (c.how().mode == DecodeMode::pages) CHECK(s.certified <= 0.05f * s.tokens);
        }
    }
}

TEST_CASE("random cuts: every layer and every batch has keys of its own") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    const int T = 29;
    const Bench<float> bench(ctx, m, 1, T);
    const std::vector<int> x = random_ints(T, kEot, 1), y = random_ints(T, kEot, 2);
    const SequenceAttention how{Cut::random, 3, true, 5};
    to_device(bench.a.inputs, x.data(), T);
    const auto kept_of = [&](int layer) {  // of the same queries and keys, whichever layer they stand for
        attend_sequences(ctx, m, bench.a, layer, 1, T, how);
        return to_host(ctx, bench.a.kept, (size_t)kSmall.num_heads * T);
    };
    forward(ctx, m, bench.a, 1, T, nullptr, [&](int l) {
        const std::vector<float> kept = kept_of(l);
        CHECK(kept == kept_of(l));
        CHECK(kept != kept_of(l + 1));
    });

    Windows once{"test", 1, T};
    once.add(x.data(), y.data());
    Windows twice = once;
    twice.add(x.data(), y.data());
    REQUIRE(twice.inputs.size() == 2);
    InferConfig c;
    c.cuts = std::vector<int>{3};
    c.cut_kinds = {Cut::topk, Cut::random};
    c.cut_as_they_are = false;
    const std::vector<CutLoss> a = cut_losses(bench, once, c), b = cut_losses(bench, twice, c);
    for (const size_t same : {0, 1}) CHECK(b[same].loss == doctest::Approx(a[same].loss).epsilon(1e-9));
    CHECK(std::abs(b[2].loss - a[2].loss) > 1e-6);
    CHECK(std::abs(b[2].kept - a[2].kept) > 1e-6);
}

TEST_CASE("a prompt may hold <|endoftext|>, and a text out of nothing begins with it") {
    const Tokenizer bytes = Tokenizer::bytes();
    const GPT2Config config{.max_seq_len = 8, .vocab_size = kByteVocab};
    const auto eot = (uint16_t)bytes.eot();
    CHECK(prompt_tokens(&bytes, "a<|endoftext|>", config, true) == Tokens{'a', eot});
    CHECK(prompt_tokens(&bytes, "<|endoftext|>b", config, true) == Tokens{eot, 'b'});
    CHECK(prompt_tokens(&bytes, "", config, true) == Tokens{eot});
}

TEST_CASE("logits that are no numbers are found in every sequence, and not behind the vocabulary") {
    const Context ctx = make_context();
    Model<float> m = make_model<float>(kSmall);
    const int B = 3, V = kSmall.vocab_size, Vp = kSmall.padded_vocab_size;
    Decoding<float> d;
    const DeviceMemory memory(
        ctx, "test", "", [&](Arena& arena) { d = lay_out_decoding<float>(arena, kSmall, B, 48, 40, false); });
    memory.zero();
    const auto with = [&](int b, int token, float logit) {
        std::vector<float> logits((size_t)B * Vp, 0.5f);
        logits[(size_t)b * Vp + token] = logit;
        to_device(d.logits, logits.data(), logits.size());
    };
    for (int b = 0; b < B; b++) {
        CAPTURE(b);
        for (const float bad : {NAN, INFINITY, -INFINITY})
            for (const int token : {0, V - 1}) {
                with(b, token, bad);
                CHECK_THROWS_AS(check_logits(ctx, m, d), Error);
            }
        with(b, V, NAN);
        CHECK_NOTHROW(check_logits(ctx, m, d));
    }
}

TEST_CASE("a token's label: its text, or its bytes where that is no whole character") {
    const Tokenizer bytes = Tokenizer::bytes();
    CHECK(token_label(&bytes, 'x') == "x");
    CHECK(token_label(&bytes, 0xC3) == "<c3>");
    CHECK(token_label(&bytes, 0x80) == "<80>");
    CHECK(token_label(nullptr, 0xC3) == "195");
}

TEST_CASE("the speed is of the tokens behind the first ones") {
    Generation g;
    g.drawn = 33;
    g.drawn_first = 3;
    g.first_seconds = 1;
    g.seconds = 4;
    InferConfig c;
    c.attention = DecodeMode::dense;
    CHECK(speed_line(g, c) == "33 tokens, dense attention: the first after 1.000 s, then 10.0 tokens/s");
    g.drawn = 3;  // there are none
    CHECK(speed_line(g, c) == "3 tokens, dense attention: the first after 1.000 s");
    g.drawn = g.drawn_first = 0;  // interrupted
    CHECK(speed_line(g, c) == "0 tokens, dense attention");
}

TEST_CASE("probes: sizes that fit the context and the alphabet, tokens that the text has, the seed's") {
    const int eot = 256, T = 40;
    const auto windows = [&](int tokens) {  // a text of so many tokens, from 'A' on, again and again
        Windows w{"test", 4, T};
        std::vector<uint16_t> x;
        for (int i = 0; i < 4 * T + 1; i++) x.push_back((uint16_t)('A' + i * i % tokens));
        for (int i = 0; i < 4; i++) w.add(x.data() + i * T, x.data() + i * T + 1);
        return w;
    };
    const auto groups = [](const std::vector<Scored>& items) { return items.back().group + 1; };
    InferConfig c;
    c.limit = 12;
    const Windows w = windows(53);
    const Probes p = make_probes(c, w, T, eot);
    CHECK(groups(p.recall) == 12);
    CHECK(groups(p.induction) == 3);
    CHECK(groups(p.needle) == 3 * kNeedleDepths);
    CHECK(p.repeated == 20);
    CHECK(p.candidates == 10);
    c.limit = 0;
    CHECK(groups(make_probes(c, w, T, eot).recall) == 100);
    CHECK(groups(make_probes(c, w, T, eot).induction) == 25);
    c.limit = 1;
    CHECK(groups(make_probes(c, w, T, eot).induction) == 1);
    c.limit = 12;

    const Tokens text = w.text();
    const Tokens alphabet = occurring_tokens(text, eot);
    CHECK(p.pairs == std::min(16, (int)alphabet.size() / 2));
    for (const auto* items : {&p.induction, &p.recall, &p.needle})
        for (const Scored& item : *items)
            for (const uint16_t token : item.tokens)
                REQUIRE(std::find(alphabet.begin(), alphabet.end(), token) != alphabet.end());
    const ChoiceSummary recall =
        choice_summary(p.recall, std::vector<Result>(p.recall.size(), {-1.0, false, 0}));
    CHECK(recall.questions == 12);
    CHECK(recall.chance == doctest::Approx(1.0 / p.pairs));
    CHECK(make_probes(c, w, 21, eot).pairs == 10);  // as many as fit the context

    const auto same = [](const std::vector<Scored>& a, const std::vector<Scored>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                          [](const Scored& x, const Scored& y) { return x.tokens == y.tokens; });
    };
    const Probes again = make_probes(c, w, T, eot);
    c.sampling.seed = 5;
    const Probes other = make_probes(c, w, T, eot);
    for (const auto& [a, b, o] : {std::tuple(&p.induction, &again.induction, &other.induction),
                                  std::tuple(&p.recall, &again.recall, &other.recall),
                                  std::tuple(&p.needle, &again.needle, &other.needle)}) {
        CHECK(same(*a, *b));
        CHECK_FALSE(same(*a, *o));
    }
}

TEST_CASE("text to measure on is read until there are enough tokens, however long they are") {
    const TempFolder folder;
    // A vocabulary of the 256 bytes and of runs of 2, 4 ... 64 times the letter a. (GPT-2 spells bytes that
    // are no printable character as those from U+0100 on, behind the others.)
    nlohmann::json encoder;
    int spelled = 256;
    for (const bool printable : {true, false})
        for (int byte = 0; byte < 256; byte++) {
            if (((byte > 32 && byte < 127) || (byte > 160 && byte != 173)) != printable) continue;
            const int c = printable ? byte : spelled++;
            const char two[] = {(char)(0xc0 | c >> 6), (char)(0x80 | (c & 63))};
            const int id = (int)encoder.size();
            encoder[c < 128 ? std::string(1, (char)c) : std::string(two, 2)] = id;
        }
    std::string merges = "#version: 0.2\n", run = "a";
    for (int i = 0; i < 6; i++) {
        merges += run + " " + run + "\n";
        run += run;
        encoder[run] = 256 + i;
    }
    encoder["<|endoftext|>"] = 262;
    write_text(folder / "encoder.json", encoder.dump());
    write_text(folder / "vocab.bpe", merges);
    const Tokenizer tokenizer = Tokenizer::gpt2(folder.path, 263);
    std::string text;
    for (int i = 0; i < 20000; i++) text += run + (i % 7 ? "\n" : ".");  // 2 tokens of 65 bytes
    write_text(folder / "text", text);
    const Tokens tokens = tokenizer.encode(text);
    REQUIRE(tokens.size() == 40000);
    const int B = 4, T = 32;
    for (const int64_t batches : {1, 40, 312, 1000}) {
        CAPTURE(batches);
        const Windows w = read_windows(folder / "text", &tokenizer, 263, B, T, batches);
        REQUIRE(w.count() == std::min<int64_t>(batches * B, (40000 - 1) / T));
        const Tokens got = w.text();
        CHECK(std::equal(got.begin(), got.end(), tokens.begin()));
        CHECK(w.targets.back().back() == tokens[got.size()]);
    }
}
