// Token shards and the data loader: bad files, what an epoch covers, orders, resuming.
#include "../llmc/dataloader.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "../llmc/tokenizer.h"
#include "errors.h"

namespace fs = std::filesystem;

// A folder of its own for each test case, gone afterwards.
struct Folder {
    fs::path path = fs::temp_directory_path() / ("dataloader_test_" + std::to_string(getpid()));
    Folder() {
        fs::remove_all(path);
        fs::create_directories(path);
    }
    ~Folder() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return (path / name).string(); }
};

static void write_shard(const std::string& path, const std::vector<uint16_t>& tokens,
                        int vocab_size = 65536) {
    ShardWriter writer(path, static_cast<int64_t>(tokens.size()), vocab_size);
    writer.append(tokens);
    writer.finish();
}

// Shards whose tokens count on from shard to shard, so that a token says where it comes from.
static std::string write_counting(const Folder& folder, const std::vector<int>& sizes) {
    int next = 0;
    for (size_t i = 0; i < sizes.size(); i++) {
        std::vector<uint16_t> tokens(static_cast<size_t>(sizes[i]));
        for (uint16_t& token : tokens) token = static_cast<uint16_t>(next++);
        write_shard(folder / ("c_" + std::to_string(i) + ".bin"), tokens);
    }
    REQUIRE(next <= 65536);
    return folder / "c_*.bin";
}

// The first tokens of the next n windows; checks each window's tokens and targets on the way.
static std::vector<int> take(DataLoader& loader, int64_t n, int B, int T) {
    std::vector<int> firsts;
    REQUIRE(n % B == 0);
    for (int64_t i = 0; i < n; i += B) {
        loader.next_batch();
        for (int b = 0; b < B; b++) {
            const int *inputs = loader.inputs() + b * T, *targets = loader.targets() + b * T;
            for (int t = 0; t < T; t++) {
                CHECK(inputs[t] == inputs[0] + t);
                CHECK(targets[t] == inputs[t] + 1);
            }
            firsts.push_back(inputs[0]);
        }
    }
    return firsts;
}

TEST_CASE("a shard is what was written") {
    const Folder folder;
    write_shard(folder / "a.bin", {5, 6, 7}, 257);
    const TokenShard shard(folder / "a.bin");
    CHECK(shard.num_tokens() == 3);
    CHECK(shard.vocab_size() == 257);
    CHECK(std::vector<int>(shard.tokens(), shard.tokens() + 3) == std::vector<int>{5, 6, 7});
    CHECK(fs::file_size(folder / "a.bin") == 1024 + 6);
    CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
    // The bytes, as llm.c reads them.
    std::ifstream file(folder / "a.bin", std::ios::binary);
    int32_t header[256];
    file.read(reinterpret_cast<char*>(header), sizeof(header));
    CHECK(header[0] == 20240520);
    CHECK(header[1] == 1);
    CHECK(header[2] == 3);
    CHECK(header[3] == 257);
    CHECK(std::all_of(header + 4, header + 256, [](int32_t word) { return word == 0; }));
}

TEST_CASE("a shard that is not finished leaves nothing") {
    const Folder folder;
    {
        ShardWriter writer(folder / "a.bin", 2, 257);
        writer.append(std::vector<uint16_t>{1});
        check_mentions(error_of([&] { writer.append(std::vector<uint16_t>{257}); }), "token 257 is outside");
    }
    CHECK(fs::is_empty(folder.path));
    check_mentions(error_of([&] { ShardWriter(folder / "none/a.bin", 1, 257); }), "none/a.bin");
}

TEST_CASE("bad shards are refused by name") {
    const Folder folder;
    const std::string path = folder / "a.bin";
    write_shard(path, {5, 6, 7}, 257);
    const auto patch = [&](int64_t offset, int32_t value) {
        std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
        file.seekp(offset);
        file.write(reinterpret_cast<const char*>(&value), 4);
    };
    std::string what;
    SUBCASE("magic") {
        patch(0, 20240521),
            what = "begins with 20240521 instead of 20240520: make shards of text with build/tokenize";
    }
    SUBCASE("version") {
        patch(4, 2), what = "version 2";
    }
    SUBCASE("negative count") {
        patch(8, -1), what = "negative number of tokens";
    }
    SUBCASE("count too large") {
        patch(8, 4), what = "cut short";
    }
    SUBCASE("count far too large") {
        patch(8, INT32_MAX), what = "cut short";
    }
    SUBCASE("count too small") {
        patch(8, 2), what = "too long";
    }
    SUBCASE("negative vocabulary") {
        patch(12, -5), what = "vocabulary of -5";
    }
    SUBCASE("vocabulary too large") {
        patch(12, 65537), what = "vocabulary of 65537";
    }
    SUBCASE("truncated") {
        fs::resize_file(path, 1029), what = "cut short";
    }
    SUBCASE("trailing byte") {
        fs::resize_file(path, 1031), what = "too long";
    }
    SUBCASE("header cut") {
        fs::resize_file(path, 1023), what = "1023 bytes";
    }
    SUBCASE("empty") {
        fs::resize_file(path, 0),
            what = "0 bytes, fewer than the header of a token shard (1024): make shards";
    }
    SUBCASE("missing") {
        fs::remove(path), what = "No such file";
    }
    SUBCASE("a folder") {
        fs::remove(path), fs::create_directory(path), what = "is not a file";
    }
    SUBCASE("a pipe") {
        fs::remove(path), what = mkfifo(path.c_str(), 0600) == 0 ? "is not a file" : "";
    }
    REQUIRE(!what.empty());
    check_mentions(error_of([&] { TokenShard shard(path); }), what);
    check_mentions(error_of([&] { TokenShard shard(path); }), "a.bin");
    check_mentions(error_of([&] { DataLoader loader(path, 1, 1, true, 1); }), what);
}

TEST_CASE("of data that is too large to be looked through at the start, each window is, to its last target") {
    const Folder folder;
    const std::string path = folder / "large.bin";
    const int T = 8;
    write_shard(path, {}, 257);
    {
        std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
        const int32_t num_tokens = kCheckAtOpenBytes / 2 + 1;
        file.seekp(8);
        file.write(reinterpret_cast<const char*>(&num_tokens), 4);
        const uint16_t bad = 257;
        file.seekp(1024 + 2 * T);
        file.write(reinterpret_cast<const char*>(&bad), 2);
        file.close();
        fs::resize_file(path, 1024 + 2 * static_cast<uintmax_t>(num_tokens));  // zeros that take no room
    }
    DataLoader loader(path, 1, T, false, 0);
    check_mentions(error_of([&] { loader.next_batch(); }), "token 8 of");
}

TEST_CASE("vocabulary 0 in the header is GPT-2's, and an empty shard is a shard") {
    const Folder folder;
    write_shard(folder / "a.bin", {}, 0);
    CHECK(TokenShard(folder / "a.bin").vocab_size() == 50257);
    CHECK(TokenShard(folder / "a.bin").num_tokens() == 0);
    check_mentions(error_of([&] { DataLoader(folder / "a.bin", 1, 1, false, 0); }),
                   "hold no tokens to learn from");
}

TEST_CASE("tokens outside the vocabulary") {
    const Folder folder;
    std::vector<uint16_t> tokens(10000, 1);
    tokens[9000] = 300;
    write_shard(folder / "a.bin", tokens, 65536);
    std::fstream file(folder / "a.bin", std::ios::binary | std::ios::in | std::ios::out);
    const int32_t vocab_size = 257;
    file.seekp(12);
    file.write(reinterpret_cast<const char*>(&vocab_size), 4);
    file.close();
    check_mentions(error_of([&] { DataLoader loader(folder / "a.bin", 1, 8, true, 1); }),
                   "token 9000 of " + (folder / "a.bin") + " is 300, outside its vocabulary of 257");
    write_shard(folder / "0.bin", std::vector<uint16_t>(100, 1), 257);  // and not only in the first shard
    check_mentions(error_of([&] { DataLoader loader(folder / "*.bin", 1, 8, true, 1); }), "token 9000 of");
    const TokenShard shard(folder / "a.bin");
    shard.check_tokens(0, 9000);
    check_mentions(error_of([&] { shard.check_tokens(8999, 2); }), "token 9000");
}

TEST_CASE("find_bad_token finds the first, wherever it is") {
    for (const size_t size : {1, 2, 4095, 4096, 4097, 10000}) {
        std::vector<uint16_t> tokens(size, 256);
        CHECK(find_bad_token(tokens, 257) == -1);
        for (const size_t at : {size_t{0}, size / 2, size - 1}) {
            tokens.assign(size, 256);
            tokens[at] = 257;
            tokens[size - 1] = 257;
            CHECK(find_bad_token(tokens, 257) == static_cast<int64_t>(at));
        }
    }
}

TEST_CASE("patterns of files") {
    const Folder folder;
    for (const char* name : {"b_1.bin", "b_0.bin", "a.bin", "odd[1].bin", "x*?\\[a],_0.bin", "xy_0.bin"})
        write_shard(folder / name, {1, 2, 3}, 257);
    const auto names = [&](const std::string& pattern) {
        std::vector<std::string> found;
        for (const std::string& file : find_shards(pattern)) found.push_back(fs::path(file).filename());
        return found;
    };
    CHECK(names(folder / "b_*.bin") == std::vector<std::string>{"b_0.bin", "b_1.bin"});
    CHECK(names((folder / "b_*.bin") + "," + (folder / "a.bin") + "," + (folder / "b_1.bin")) ==
          std::vector<std::string>{"a.bin", "b_0.bin", "b_1.bin"});
    CHECK(names(folder / "odd[1].bin") == std::vector<std::string>{"odd[1].bin"});
    CHECK(names(glob_of(folder / "x*?\\[a],") + "_*.bin") == std::vector<std::string>{"x*?\\[a],_0.bin"});
    CHECK(any_shards(folder / "b_*.bin"));
    CHECK(!any_shards(folder / "c_*.bin"));
    check_mentions(error_of([&] { find_shards(folder / "none*.bin"); }), "none*.bin");
    const std::string home = getenv("HOME") ? getenv("HOME") : "";
    setenv("HOME", folder.path.c_str(), 1);
    CHECK(names("~/b_*.bin") == std::vector<std::string>{"b_0.bin", "b_1.bin"});
    home.empty() ? unsetenv("HOME") : setenv("HOME", home.c_str(), 1);
    // under another name it is the same file; and a name may have a comma
    fs::create_symlink(folder / "a.bin", folder / "link.bin");
    CHECK(find_shards((folder / "link.bin") + "," + (folder / "a.bin") + "," + (folder / "./a.bin")).size() ==
          1);
    const DataLoader train(folder / "a.bin", 1, 1, true, 1), linked(folder / "link.bin", 1, 1, false, 1),
        others(folder / "b_*.bin", 1, 1, false, 1);
    CHECK(linked.shared_file(train) == folder / "link.bin");
    CHECK(others.shared_file(train) == "");
    fs::remove(folder / "link.bin");
    write_shard(folder / "with,comma.bin", {1, 2, 3}, 257);
    CHECK(find_shards(folder / "with,comma.bin") == std::vector<std::string>{folder / "with,comma.bin"});
    check_mentions(error_of([&] { find_shards((folder / "a.bin") + "," + (folder / "none*.bin")); }),
                   "none*.bin");
    check_mentions(error_of([] { find_shards(""); }), "no token shard matches \"\"");
    check_mentions(error_of([&] { find_shards((folder / "a.bin") + ","); }), "no token shard matches \"\"");
}

TEST_CASE("what cannot be loaded") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {10, 20});
    check_mentions(error_of([&] { DataLoader loader(pattern, 0, 4, true, 1); }), "-b");
    check_mentions(error_of([&] { DataLoader loader(pattern, -1, 4, true, 1); }), "-b");
    check_mentions(error_of([&] { DataLoader loader(pattern, 1, 0, true, 1); }), "-t");
    check_mentions(error_of([&] { DataLoader loader(pattern, INT32_MAX, INT32_MAX, true, 1); }), "-b");
    check_mentions(error_of([&] { DataLoader loader(pattern, 1, 20, true, 1); }), "-t 20 needs 21 tokens");
    check_mentions(error_of([&] { DataLoader loader(pattern, 1, INT32_MAX, true, 1); }),
                   "-t 2147483647 needs 2147483648");
    CHECK(error_of([&] { DataLoader loader(pattern, 1, 19, true, 1); }) == "");
    write_shard(folder / "c_9.bin", {1, 2, 3}, 257);
    check_mentions(error_of([&] { DataLoader loader(pattern, 1, 4, true, 1); }),
                   "disagree on the vocabulary");
    check_mentions(error_of([&] { DataLoader loader(pattern, 1, 4, true, 1); }), "c_9.bin");
}

TEST_CASE("sequential order takes the windows as they lie, each target once, but for what fills no window") {
    const Folder folder;
    const int T = 7;
    // Unequal shards: of many windows, of exactly one, one token short of one, of one token, of none.
    const std::vector<int> sizes = {100, T + 1, T, 1, 0, 2 * T + 1, 33};
    const std::string pattern = write_counting(folder, sizes);
    DataLoader loader(pattern, 1, T, false, 1);
    CHECK(loader.num_shards() == 7);
    CHECK(loader.num_tokens() == 100 + 8 + 7 + 1 + 0 + 15 + 33);
    std::vector<int> expected;
    int base = 0;
    for (const int size : sizes) {
        for (int at = 0; at + T < size; at += T) expected.push_back(base + at);
        base += size;
    }
    CHECK(loader.windows() == static_cast<int64_t>(expected.size()));
    CHECK(take(loader, loader.windows(), 1, T) == expected);
    CHECK(loader.state() == DataLoader::State{1, 0});
    CHECK(take(loader, 3, 1, T) == std::vector<int>(expected.begin(), expected.begin() + 3));
    loader.reset();
    CHECK(loader.state() == DataLoader::State{0, 0});
    CHECK(take(loader, 3, 1, T) == std::vector<int>(expected.begin(), expected.begin() + 3));
}

TEST_CASE("a shuffled epoch covers each window once") {
    const Folder folder;
    for (const int T : {1, 2, 7, 32}) {
        const std::vector<int> sizes = {1000, T + 1, T, 2 * T + 1, 333, 3 * T};
        const std::string pattern = write_counting(folder, sizes);
        DataLoader loader(pattern, 1, T, true, 42);
        std::set<std::vector<int>> orders;
        std::set<int> offsets;
        for (int epoch = 0; epoch < 20; epoch++) {
            CHECK(loader.state() == DataLoader::State{epoch, 0});
            const std::vector<int> order = take(loader, loader.windows(), 1, T);
            orders.insert(order);
            // Of each shard: windows T apart from some offset below T on, as many as fit, none twice.
            std::vector<int> sorted = order;
            std::sort(sorted.begin(), sorted.end());
            size_t i = 0;
            int base = 0;
            for (const int size : sizes) {
                const int end = base + size;
                if (size > T) {
                    REQUIRE(i < sorted.size());
                    const int offset = sorted[i] - base;
                    if (base == 0) offsets.insert(offset);
                    CHECK(offset >= 0);
                    CHECK(offset < T);
                    for (int at = base + offset; at + T < end; at += T) {
                        REQUIRE(i < sorted.size());
                        CHECK(sorted[i++] == at);
                    }
                }
                base = end;
            }
            CHECK(i == sorted.size());
        }
        CHECK(orders.size() == 20);
        if (T > 1) CHECK(offsets.size() > 1);
        fs::remove_all(folder.path);
        fs::create_directories(folder.path);
    }
}

TEST_CASE("the seed decides the order") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {1000, 500});
    std::set<std::vector<int>> orders;
    for (uint64_t seed = 0; seed < 20; seed++) {
        DataLoader a(pattern, 1, 10, true, seed), b(pattern, 1, 10, true, seed);
        const std::vector<int> order = take(a, 100, 1, 10);
        CHECK(order == take(b, 100, 1, 10));
        orders.insert(order);
    }
    CHECK(orders.size() == 20);
}

TEST_CASE("other data has another digest") {
    const Folder folder;
    std::vector<uint16_t> tokens(1000);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<uint16_t>(i * i % 250);
    const auto digest = [&](const std::vector<std::vector<uint16_t>>& shards) {
        for (const auto& entry : fs::directory_iterator(folder.path)) fs::remove(entry);
        for (size_t i = 0; i < shards.size(); i++)
            write_shard(folder / ("s_" + std::to_string(i) + ".bin"), shards[i]);
        return DataLoader(folder / "s_*.bin", 2, 8, true, 1).digest();
    };
    const uint64_t first = digest({tokens});
    CHECK(digest({tokens}) == first);
    const std::vector<uint16_t> backwards(tokens.rbegin(), tokens.rend()),
        half(tokens.begin() + 500, tokens.end());
    std::vector<uint16_t> other_end = tokens;
    other_end.back()++;
    std::vector<uint16_t> other_middle = tokens;
    for (size_t i = 300; i < 400; i++) other_middle[i]++;
    std::set<uint64_t> digests = {first,
                                  digest({backwards}),
                                  digest({half}),
                                  digest({half, half}),
                                  digest({other_end}),
                                  digest({other_middle}),
                                  digest({tokens, half}),
                                  digest({half, tokens})};
    CHECK(digests.size() == 8);
    CHECK(digest({{1, 2, 3, 4, 5, 6, 7, 8, 9}}) !=
          digest({{1, 2, 3, 4, 5, 6, 7, 8, 10}}));  // shorter than a place
    CHECK(digest({{}, tokens}) != first);
}

TEST_CASE("the batch size only groups") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {1000, 57, 8, 500});
    const int64_t n = 720;  // several epochs of about 220 windows
    DataLoader one(pattern, 1, 7, true, 3);
    const std::vector<int> expected = take(one, n, 1, 7);
    for (const int B : {2, 3, 5, 16, 240}) {
        DataLoader loader(pattern, B, 7, true, 3);
        CHECK(take(loader, n, B, 7) == expected);
    }
}

TEST_CASE("fewer windows than a batch has rows") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {20});
    DataLoader loader(pattern, 64, 8, true, 3);
    const std::vector<int> firsts = take(loader, 64, 64, 8);
    CHECK(std::set<int>(firsts.begin(), firsts.end()).size() > 2);
}

TEST_CASE("resuming from any state gives the same batches") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {400, 57, 8, 3, 100});
    const int B = 3, T = 7;
    for (const bool shuffle : {true, false}) {
        DataLoader straight(pattern, B, T, shuffle, 5);
        for (int i = 0; i < 80; i++) {
            const DataLoader::State state = straight.state();
            straight.next_batch();
            DataLoader resumed(pattern, B, T, shuffle, 5);
            if (i % 2) resumed.next_batch();  // also from a loader that has run
            resumed.restore(state);
            CHECK(resumed.state() == state);
            resumed.next_batch();
            CHECK(std::equal(straight.inputs(), straight.inputs() + B * T, resumed.inputs()));
            CHECK(std::equal(straight.targets(), straight.targets() + B * T, resumed.targets()));
            CHECK(resumed.state() == straight.state());
        }
        CHECK(straight.state().epoch > 1);
    }
}

TEST_CASE(
    "two that write the same shard: the last one's is there, whole, and what has a similar name stays") {
    const Folder folder;
    const std::string path = folder / "a.bin", mine = path + ".tmp";
    std::ofstream(mine) << "mine";
    {
        ShardWriter one(path, 2, 257), other(path, 3, 257);
        one.append(std::vector<uint16_t>{1, 1});
        other.append(std::vector<uint16_t>{2, 2, 2});
        other.finish();
        one.finish();
    }
    const TokenShard shard(path);
    CHECK(std::vector<int>(shard.tokens(), shard.tokens() + shard.num_tokens()) == std::vector<int>{1, 1});
    CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 2);
    CHECK(fs::file_size(mine) == 4);
    const mode_t mask = umask(0);
    umask(mask);
    CHECK(static_cast<mode_t>(fs::status(path).permissions()) == (0666 & ~mask));
}

TEST_CASE("states that cannot be") {
    const Folder folder;
    const std::string pattern = write_counting(folder, {100});
    DataLoader loader(pattern, 1, 7, false, 5);
    loader.next_batch();
    const DataLoader::State before = loader.state();
    for (const DataLoader::State bad :
         {DataLoader::State{-1, 0}, {0, -1}, {0, 14}, {3, INT64_MAX}, {INT64_MAX, 0}}) {
        CHECK(error_of([&] { loader.restore(bad); }) != "");
        CHECK(loader.state() == before);
        loader.next_batch();
        CHECK(loader.inputs()[0] == 7);
        loader.restore(before);
    }
    loader.restore({0, 13});
    loader.next_batch();
    CHECK(loader.inputs()[0] == 13 * 7);
}

TEST_CASE("permutations") {
    for (const int64_t n : {1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097}) {
        for (uint64_t key = 0; key < 5; key++) {
            const Permutation permutation(n, key);
            std::vector<int64_t> seen;
            for (int64_t i = 0; i < n; i++) seen.push_back(permutation(i));
            std::sort(seen.begin(), seen.end());
            std::vector<int64_t> all(static_cast<size_t>(n));
            std::iota(all.begin(), all.end(), 0);
            CHECK(seen == all);
        }
    }
    const Permutation large(int64_t{3} << 40, 7);
    std::set<int64_t> images;
    for (int64_t i = 0; i < 1000; i++) images.insert(large(i));
    CHECK(images.size() == 1000);
    CHECK(*images.rbegin() < int64_t{3} << 40);
}

// Where the 24 orders of 4 windows come up equally often, as they should, chi-squared with 23 degrees of
// freedom is below 60 with probability 1 - 4e-5; and where a window goes is as likely any place as any other.
TEST_CASE("permutations are random") {
    std::map<std::vector<int64_t>, int> orders;
    std::vector<int> places(64 * 64);
    const int n = 24000;
    for (uint64_t key = 0; key < n; key++) {
        const Permutation four(4, mix_bits(key)), many(64, mix_bits(key));
        orders[{four(0), four(1), four(2), four(3)}]++;
        for (int64_t i = 0; i < 64; i++) places[static_cast<size_t>(i * 64 + many(i))]++;
    }
    double chi_squared = 0;
    for (const auto& [order, count] : orders) chi_squared += (count - 1000.0) * (count - 1000.0) / 1000;
    CHECK(orders.size() == 24);
    CHECK(chi_squared < 60);
    double chi_places = 0;  // 63 * 63 degrees of freedom: mean 3969, standard deviation 89
    for (const int count : places) chi_places += (count - n / 64.0) * (count - n / 64.0) / (n / 64.0);
    CHECK(chi_places < 3969 + 5 * 89);
    CHECK(chi_places > 3969 - 5 * 89);
}

TEST_CASE("a shard of more than 2 GiB") {
    const Folder folder;
    const std::string path = folder / "large.bin";
    const int64_t n = 1'500'000'000;
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT, 0600);
    REQUIRE(fd >= 0);
    const int32_t header[4] = {20240520, 1, static_cast<int32_t>(n), 257};
    const uint16_t last[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const bool written = pwrite(fd, header, sizeof(header), 0) == sizeof(header) &&
                         pwrite(fd, last, sizeof(last), 1024 + 2 * (n - 9)) == sizeof(last);
    close(fd);
    REQUIRE(written);  // a sparse file: it takes two blocks of the disk
    DataLoader loader(path, 1, 8, false, 1);
    CHECK(loader.num_tokens() == n);
    CHECK(loader.windows() == (n - 1) / 8);
    loader.restore({0, loader.windows() - 1});
    loader.next_batch();
    const int64_t first = (loader.windows() - 1) * 8;
    for (int64_t t = 0; t < 8; t++) {
        CHECK(loader.inputs()[t] == std::max<int64_t>(0, first + t - (n - 10)));
        CHECK(loader.targets()[t] == std::max<int64_t>(0, first + t + 1 - (n - 10)));
    }
    DataLoader shuffled(path, 4, 1024, true, 1);
    for (int i = 0; i < 50; i++) shuffled.next_batch();
}

TEST_CASE("a pattern that means the same in another folder") {
    const Folder folder;
    const std::filesystem::path before = std::filesystem::current_path();
    std::filesystem::create_directory(folder / "a [1]* folder");
    std::filesystem::current_path(folder / "a [1]* folder");
    write_shard("a_0.bin", {1, 2, 3}, 257);
    write_shard("a_1.bin", {1, 2, 3}, 257);
    write_shard("b.bin", {1, 2, 3}, 257);
    const std::string list = absolute_pattern("a_*.bin,b.bin"), one = absolute_pattern("b.bin");
    const std::string absolute = absolute_pattern(folder / "a*"), home = absolute_pattern("~/x*");
    std::filesystem::current_path(before);
    CHECK(find_shards(list).size() == 3);
    CHECK(find_shards(one).size() == 1);
    CHECK(absolute == folder / "a*");
    CHECK(home == "~/x*");
}

TEST_CASE("a pattern that is remembered is UTF-8, whatever the folder's name is") {
    const Folder folder;
    const std::filesystem::path before = std::filesystem::current_path();
    const std::string latin = folder / "lat\xe9in \xff[1] \u00fc";
    std::filesystem::create_directory(latin);
    std::filesystem::current_path(latin);
    write_shard("a_0.bin", {1, 2, 3}, 257);
    write_shard("b\xe9.bin", {1, 2, 3}, 257);
    const std::string list = absolute_pattern("a_*.bin"), one = absolute_pattern("b\xe9.bin");
    std::filesystem::current_path(before);
    CHECK(find_shards(list) == std::vector<std::string>{latin + "/a_0.bin"});
    CHECK(find_shards(one) == std::vector<std::string>{latin + "/b\xe9.bin"});
    for (const std::string& pattern : {list, one}) CHECK(bpe::valid_prefix(pattern) == pattern.size());
    CHECK(list.ends_with("/lat?in ?\\[1\\] \u00fc/a_*.bin"));
}
