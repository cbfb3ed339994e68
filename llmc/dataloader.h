// Token shards on disk, and the batches that training and validation draw from them.
//
// A shard is llm.c's: a header of 256 int32 (20240520, 1, the number of tokens, and a word of our own: the
// vocabulary's size, where 0 means GPT-2's 50257), then uint16 tokens. Little-endian, as every machine here.
//
// An epoch cuts every shard into windows of T+1 tokens that lie T apart, so that each token but the first is
// a target once; what is left behind the last whole window, less than T tokens, is not. Sequential order
// (validation) takes them as they lie. Shuffled order (training) starts each shard at a random offset of less
// than T, before which its tokens are left out, new in each epoch so that the boundaries move, and visits all
// windows of all shards in a random order. Both follow from (seed, epoch) alone, without state and without a
// table: the whole state of a loader is an epoch and a position in it. The windows form one sequence; the
// batch size only says how many of them a batch takes.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "files.h"
#include "random.h"

inline constexpr int kShardMagic = 20240520;
inline constexpr int kShardVersion = 1;
inline constexpr int kShardHeaderInts = 256;
inline constexpr int64_t kShardHeaderBytes = kShardHeaderInts * 4;
inline constexpr int64_t kMaxShardTokens = INT32_MAX;  // the header's count is an int32
// The tokens of larger corpora are checked as they are read.
inline constexpr int64_t kCheckAtOpenBytes = int64_t{256} << 20;

// The place of the first token that is outside the vocabulary; -1 where there is none.
int64_t find_bad_token(std::span<const uint16_t> tokens, int vocab_size);

// Whether a file begins as a shard does.
bool is_shard(const std::string& path);

// A shard, memory-mapped read-only. The constructor checks everything but the tokens themselves.
class TokenShard {
  public:
    explicit TokenShard(const std::string& path);

    const std::string& path() const { return file_.path(); }
    int64_t num_tokens() const { return num_tokens_; }
    int vocab_size() const { return vocab_size_; }
    const uint16_t* tokens() const;

    // Fails where one of the `count` tokens from `first` on is outside the vocabulary.
    void check_tokens(int64_t first, int64_t count) const;

  private:
    void check_header(int64_t size);

    MappedFile file_;
    int64_t num_tokens_ = 0;
    int vocab_size_ = 0;
};

// Writes a shard of a known number of tokens; it appears under its name, complete, in finish().
class ShardWriter {
  public:
    ShardWriter(const std::string& path, int64_t num_tokens, int vocab_size);

    void append(std::span<const uint16_t> tokens);

    // All tokens are there, and on the disk.
    void close();
    void finish();

  private:
    OutputFile file_;
    int64_t missing_;  // tokens still to be appended
    int vocab_size_;
};

// Every bit of the result depends on every bit of x.
inline uint64_t mix_bits(uint64_t x) {
    return splitmix64(x, 0);
}

// A random permutation of 0..n-1 with no table: a Feistel network permutes the smallest domain of 4^h values
// that holds n, and a value outside 0..n-1 goes through again until it lands inside (fewer than 4 rounds on
// average).
class Permutation {
  public:
    Permutation(int64_t n, uint64_t key);

    int64_t operator()(int64_t index) const;

  private:
    uint64_t scramble(uint64_t x) const;

    uint64_t n_, key_;
    int half_bits_ = 1;
};

// The glob that matches a name and nothing else, as find_shards() reads it; a comma, which would end it
// there, is matched by any character.
std::string glob_of(const std::string& name);

// A pattern of find_shards() that means the same in another folder.
std::string absolute_pattern(const std::string& pattern);

// The files that a comma list of globs names: sorted, each once, whatever its names. Every glob must match
// something.
std::vector<std::string> find_shards(const std::string& pattern);

bool any_shards(const std::string& pattern);

class DataLoader {
  public:
    // Position counts windows within the epoch and is always below windows() of that epoch.
    struct State {
        int64_t epoch = 0;
        int64_t position = 0;
        bool operator==(const State&) const = default;
    };

    // pattern: a comma list of globs. A batch is B windows of T tokens and their T targets.
    DataLoader(const std::string& pattern, int B, int T, bool shuffle, uint64_t seed);

    int vocab_size() const { return shards_[0].vocab_size(); }
    int num_shards() const { return static_cast<int>(shards_.size()); }
    int64_t num_tokens() const { return num_tokens_; }
    // Of the epoch that the next batch begins in: a shuffled epoch's offsets can cost a shard one window.
    int64_t windows() const { return first_window_.back(); }

    // Fills inputs and targets, both [B,T], with the next B windows, going on into the next epoch where this
    // one ends.
    void next_batch() { next_batch(B_); }
    // The same for the first `rows` rows.
    void next_batch(int rows);
    // Of the shards' lengths and of 16 places in each: other data of the same size has another digest, but
    // for small changes in it.
    uint64_t digest() const;
    // A file that both read, or "".
    std::string shared_file(const DataLoader& other) const;

    const int* inputs() const { return inputs_.data(); }
    const int* targets() const { return targets_.data(); }

    State state() const { return state_; }
    void restore(const State& state);
    void reset() { enter_epoch(0); }

  private:
    uint64_t random(int64_t epoch, uint64_t what) const;

    void enter_epoch(int64_t epoch);

    void copy_window(int64_t window, size_t row);

    int B_, T_;
    bool shuffle_;
    uint64_t seed_;
    std::vector<TokenShard> shards_;
    int64_t num_tokens_ = 0;
    State state_;
    std::vector<int64_t> offset_;        // of each shard's first window, in this epoch
    std::vector<int64_t> first_window_;  // the number of windows before each shard, and at the end of all
    Permutation order_{1, 0};
    std::vector<int> inputs_, targets_;
};
