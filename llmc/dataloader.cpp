#include "dataloader.h"

#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "error.h"
#include "flags.h"
#include "tokenizer.h"  // kGpt2Vocab

int64_t find_bad_token(std::span<const uint16_t> tokens, int vocab_size) {
    // The maximum of a block vectorizes, a search with an early exit does not.
    constexpr size_t kBlock = 4096;
    for (size_t at = 0; at < tokens.size(); at += kBlock) {
        const auto block = tokens.subspan(at, std::min(kBlock, tokens.size() - at));
        int largest = 0;
        for (const uint16_t token : block) largest = std::max<int>(largest, token);
        if (largest < vocab_size) continue;
        for (size_t i = 0; i < block.size(); i++) {
            if (block[i] >= vocab_size) return static_cast<int64_t>(at + i);
        }
    }
    return -1;
}

static constexpr const char* kMakeShards = "make shards of text with build/tokenize -o PREFIX FILE";

bool is_shard(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    int32_t magic = 0;
    return file.read(reinterpret_cast<char*>(&magic), sizeof(magic)) && magic == kShardMagic;
}

TokenShard::TokenShard(const std::string& path) : file_(path) {
    const auto size = static_cast<int64_t>(file_.size());
    if (size < kShardHeaderBytes) {
        fail("%s has %lld bytes, fewer than the header of a token shard (%lld): %s", path.c_str(),
             static_cast<long long>(size), static_cast<long long>(kShardHeaderBytes), kMakeShards);
    }
    check_header(size);
}

const uint16_t* TokenShard::tokens() const {
    return reinterpret_cast<const uint16_t*>(file_.data() + kShardHeaderBytes);
}

void TokenShard::check_tokens(int64_t first, int64_t count) const {
    const int64_t bad = find_bad_token({tokens() + first, static_cast<size_t>(count)}, vocab_size_);
    if (bad < 0) return;
    fail("token %lld of %s is %d, outside its vocabulary of %d", static_cast<long long>(first + bad),
         path().c_str(), tokens()[first + bad], vocab_size_);
}

void TokenShard::check_header(int64_t size) {
    int32_t header[4];
    std::memcpy(header, file_.data(), sizeof(header));
    if (header[0] != kShardMagic) {
        fail("%s is not a token shard, for it begins with %d instead of %d: %s", path().c_str(), header[0],
             kShardMagic, kMakeShards);
    }
    if (header[1] != kShardVersion) {
        fail("%s is a token shard of version %d; this program reads version %d", path().c_str(), header[1],
             kShardVersion);
    }
    num_tokens_ = header[2];
    if (num_tokens_ < 0) {
        fail("the header of %s gives a negative number of tokens (%d)", path().c_str(), header[2]);
    }
    const int64_t expected = kShardHeaderBytes + 2 * num_tokens_;
    if (size != expected) {
        fail("%s is %s: its header gives %d tokens, %lld bytes in all, but it has %lld", path().c_str(),
             size < expected ? "cut short" : "too long", header[2], static_cast<long long>(expected),
             static_cast<long long>(size));
    }
    vocab_size_ = header[3] == 0 ? kGpt2Vocab : header[3];
    if (vocab_size_ < 1 || vocab_size_ > 65536) {
        fail("the header of %s gives a vocabulary of %d tokens, which is not 1 to 65536", path().c_str(),
             header[3]);
    }
}

ShardWriter::ShardWriter(const std::string& path, int64_t num_tokens, int vocab_size)
    : file_(path), missing_(num_tokens), vocab_size_(vocab_size) {
    if (num_tokens > kMaxShardTokens) fail("%s would have more tokens than a shard holds", path.c_str());
    const int32_t header[kShardHeaderInts] = {kShardMagic, kShardVersion, static_cast<int32_t>(num_tokens),
                                              vocab_size};
    file_.write(header, sizeof(header));
}

void ShardWriter::append(std::span<const uint16_t> tokens) {
    const int64_t bad = find_bad_token(tokens, vocab_size_);
    if (bad >= 0)
        fail("token %d is outside the vocabulary of %d", tokens[static_cast<size_t>(bad)], vocab_size_);
    file_.write(tokens.data(), tokens.size_bytes());
    missing_ -= static_cast<int64_t>(tokens.size());
}

void ShardWriter::close() {
    assert(missing_ == 0);
    file_.close();
}

void ShardWriter::finish() {
    assert(missing_ == 0);
    file_.commit();
    sync_folder(file_.folder());
}

Permutation::Permutation(int64_t n, uint64_t key) : n_(static_cast<uint64_t>(n)), key_(key) {
    while (half_bits_ < 31 && (uint64_t{1} << (2 * half_bits_)) < n_) half_bits_++;
}

int64_t Permutation::operator()(int64_t index) const {
    auto x = static_cast<uint64_t>(index);
    do x = scramble(x);
    while (x >= n_);
    return static_cast<int64_t>(x);
}

uint64_t Permutation::scramble(uint64_t x) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t round = 0; round < 8; round++) {
        left ^= mix_bits(key_ ^ mix_bits(right << 8 | round)) & mask;
        std::swap(left, right);
    }
    return left << half_bits_ | right;
}

std::string glob_of(const std::string& name) {
    std::string glob;
    for (const char c : name) {
        if (c == '*' || c == '?' || c == '[' || c == ']' || c == '\\') glob += '\\';
        glob += c == ',' ? '?' : c;
    }
    return glob;
}

// A run remembers the pattern as JSON, which holds UTF-8 alone: other bytes are matched by any.
static std::string as_utf8(std::string pattern) {
    for (size_t at = bpe::valid_prefix(pattern); at < pattern.size();
         at += bpe::valid_prefix(std::string_view(pattern).substr(at)))
        pattern[at] = '?';
    return pattern;
}

std::string absolute_pattern(const std::string& pattern) {
    if (is_file(pattern)) {
        const std::string path = absolute_path(pattern);
        return bpe::valid_prefix(path) == path.size() ? path : as_utf8(glob_of(path));
    }
    std::error_code error;
    const std::string here = glob_of(std::filesystem::current_path(error).string() + "/");
    std::string all;
    for (const std::string& one : split_list(pattern))
        all += (all.empty() ? "" : ",") + (one.starts_with('/') || one.starts_with('~') ? "" : here) + one;
    return error ? pattern : as_utf8(all);
}

std::vector<std::string> find_shards(const std::string& pattern) {
    if (is_file(pattern)) return {pattern};  // also one whose name has commas
    std::vector<std::string> files;
    for (const std::string& one : split_list(pattern)) {
        glob_t found = {};
        const int rc = glob(one.c_str(), GLOB_TILDE | GLOB_NOMAGIC, nullptr, &found);
        for (size_t i = 0; rc == 0 && i < found.gl_pathc; i++) files.emplace_back(found.gl_pathv[i]);
        globfree(&found);
        if (rc == GLOB_NOMATCH && access(one.c_str(), F_OK) == 0) {
            files.push_back(one);  // a name that holds a glob's characters
            continue;
        }
        if (rc == GLOB_NOMATCH || one.empty()) fail("no token shard matches \"%s\"", one.c_str());
        if (rc != 0) fail("cannot search for token shards that match \"%s\"", one.c_str());
    }
    std::sort(files.begin(), files.end());
    std::set<std::filesystem::path> seen;
    std::erase_if(files, [&](const std::string& file) {
        std::error_code error;
        const std::filesystem::path real = std::filesystem::canonical(file, error);
        return !seen.insert(error ? std::filesystem::path(file) : real).second;
    });
    return files;
}

bool any_shards(const std::string& pattern) {
    try {
        return !find_shards(pattern).empty();
    } catch (const Error&) {
        return false;
    }
}

DataLoader::DataLoader(const std::string& pattern, int B, int T, bool shuffle, uint64_t seed)
    : B_(B), T_(T), shuffle_(shuffle), seed_(seed) {
    if (B < 1) fail("the micro-batch (-b) must be at least 1, not %d", B);
    if (T < 1) fail("the context (-t) must be at least 1, not %d", T);
    if (int64_t{B} * T > INT32_MAX) fail("a micro-batch of %d x %d tokens is too large: lower -b", B, T);
    for (const std::string& path : find_shards(pattern)) shards_.emplace_back(path);
    int64_t longest = 0;
    for (const TokenShard& shard : shards_) {
        if (shard.vocab_size() != vocab_size()) {
            fail("the shards disagree on the vocabulary: %d tokens in %s, %d in %s", vocab_size(),
                 shards_[0].path().c_str(), shard.vocab_size(), shard.path().c_str());
        }
        num_tokens_ += shard.num_tokens();
        longest = std::max(longest, shard.num_tokens());
    }
    if (longest < 2) fail("the shards of \"%s\" hold no tokens to learn from", pattern.c_str());
    if (longest < int64_t{T} + 1) {
        fail("-t %d needs %lld tokens in a row, but the longest shard of \"%s\" has %lld: lower -t", T,
             T + 1LL, pattern.c_str(), static_cast<long long>(longest));
    }
    if (num_tokens_ * 2 <= kCheckAtOpenBytes) {
        for (const TokenShard& shard : shards_) shard.check_tokens(0, shard.num_tokens());
    }
    inputs_.resize(static_cast<size_t>(B) * static_cast<size_t>(T));
    targets_.resize(inputs_.size());
    enter_epoch(0);
}

void DataLoader::next_batch(int rows) {
    assert(rows <= B_);
    for (int b = 0; b < rows; b++) {
        copy_window(shuffle_ ? order_(state_.position) : state_.position, static_cast<size_t>(b));
        if (++state_.position == windows()) enter_epoch(state_.epoch + 1);
    }
}

uint64_t DataLoader::digest() const {
    constexpr int64_t kPlaces = 16, kTokens = 32;
    uint64_t digest = 0;
    for (const TokenShard& shard : shards_) {
        const int64_t n = shard.num_tokens(), some = std::min(n, kTokens);
        digest = mix_bits(digest ^ static_cast<uint64_t>(n));
        for (int64_t place = 0; place < kPlaces; place++) {
            const uint16_t* from = shard.tokens() + (n - some) * place / (kPlaces - 1);
            for (int64_t i = 0; i < some; i++) digest = mix_bits(digest ^ from[i]);
        }
    }
    return digest;
}

std::string DataLoader::shared_file(const DataLoader& other) const {
    std::error_code error;
    for (const TokenShard& mine : shards_)
        for (const TokenShard& theirs : other.shards_)
            if (std::filesystem::equivalent(mine.path(), theirs.path(), error)) return mine.path();
    return "";
}

void DataLoader::restore(const State& state) {
    if (state.epoch < 0 || state.epoch > INT64_MAX / 2 || state.position < 0) {
        fail("there is no window %lld of epoch %lld in any data", static_cast<long long>(state.position),
             static_cast<long long>(state.epoch));
    }
    const State before = state_;
    enter_epoch(state.epoch);
    if (state.position >= windows()) {
        const int64_t count = windows();
        enter_epoch(before.epoch);
        state_ = before;
        fail(
            "the data position to resume from (window %lld of epoch %lld) is past the end of the data, "
            "which "
            "has %lld windows: resume with the same shards and the same -t",
            static_cast<long long>(state.position), static_cast<long long>(state.epoch),
            static_cast<long long>(count));
    }
    state_.position = state.position;
}

uint64_t DataLoader::random(int64_t epoch, uint64_t what) const {
    return mix_bits(mix_bits(mix_bits(seed_) + static_cast<uint64_t>(epoch)) + what);
}

void DataLoader::enter_epoch(int64_t epoch) {
    state_ = {epoch, 0};
    offset_.assign(shards_.size(), 0);
    first_window_.assign(1, 0);
    for (size_t s = 0; s < shards_.size(); s++) {
        const int64_t room = shards_[s].num_tokens() - T_;  // places where a window can begin
        if (room > 0 && shuffle_) {
            offset_[s] = static_cast<int64_t>(random(epoch, s + 1) %
                                              static_cast<uint64_t>(std::min<int64_t>(room, T_)));
        }
        const int64_t count = room > 0 ? (shards_[s].num_tokens() - 1 - offset_[s]) / T_ : 0;
        first_window_.push_back(first_window_.back() + count);
    }
    order_ = Permutation(windows(), random(epoch, 0));
}

void DataLoader::copy_window(int64_t window, size_t row) {
    const auto after = std::upper_bound(first_window_.begin(), first_window_.end(), window);
    const auto s = static_cast<size_t>(after - first_window_.begin()) - 1;
    const int64_t first = offset_[s] + (window - first_window_[s]) * T_;
    shards_[s].check_tokens(first, T_ + 1);
    const uint16_t* from = shards_[s].tokens() + first;
    const size_t T = static_cast<size_t>(T_);
    std::copy(from, from + T, inputs_.begin() + static_cast<ptrdiff_t>(row * T));
    std::copy(from + 1, from + 1 + T, targets_.begin() + static_cast<ptrdiff_t>(row * T));
}
