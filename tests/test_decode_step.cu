// Steps of decoding whose kernels begin before those in front of them have ended (llmc/overlap.cuh): not a
// bit of what comes out may change.
#define NO_MAIN
#include "../infer_gpt2.cu"
#include "check.h"
#include "small_infer.h"

// Where nothing overlaps, this compares equal runs. (Few steps where tests/ptx checks what makes them equal.)
TEST_CASE("kernels that start early compute what they compute one after another") {
    Context ctx = make_context();
    GPT2Config config = kSmall;
    config.channels = 128;
    Model<bf16> m = make_model<bf16>(config);
    const auto logits = [&](int B, DecodeHow how, bool overlap) {
        Context with = ctx;
        with.overlap_kernels = ctx.overlap_kernels && overlap;
        Acts<bf16> a, one;
        Decoding<bf16> d;
        const DeviceMemory memory(with, "test", "", [&](Arena& arena) {
            a = lay_out_acts<bf16>(arena, config, B, 2);
            one = lay_out_acts<bf16>(arena, config, B, 1);
            d = lay_out_decoding<bf16>(arena, config, B, 48, 40, false);
        });
        memory.zero();
        std::vector<int> inputs, numbers(B);
        for (int b = 0; b < B; b++) {
            numbers[b] = b;
            for (const uint16_t token : random_tokens(2, 50 + b)) inputs.push_back(token);
        }
        const std::vector<int> lengths(B, 2);
        to_device(a.inputs, inputs.data(), inputs.size());
        to_device(d.filled, numbers.data(), numbers.size());
        to_device(d.lengths, lengths.data(), lengths.size());
        to_device(d.positions, lengths.data(), lengths.size());
        to_device(d.streams, numbers.data(), numbers.size());
        prefill(with, m, a, d, B, 2, how);
        Graph graph;
        std::vector<bf16> all;
        for (int step = 0; step < (kOnCpu ? 5 : kFewer ? 3 : 37); step++) {
            graph.run(with, [&] { decode_step(with, m, one, d, how, {}); });
            const std::vector<bf16> now = to_host(with, d.logits, (size_t)B * config.padded_vocab_size);
            all.insert(all.end(), now.begin(), now.end());
        }
        return all;
    };
    for (const bool halves : {false, true}) {
        ctx.use_decode_halves = halves && ctx.has_clusters;
        for (const int B : {1, 5, 11})
            for (const DecodeHow how : {DecodeHow{DecodeMode::dense}, DecodeHow{DecodeMode::topk, 4},
                                        DecodeHow{DecodeMode::pages, 0, 0.1f}})
                if (!halves || B == 1) CHECK(same_bits(logits(B, how, true), logits(B, how, false)));
    }
}
