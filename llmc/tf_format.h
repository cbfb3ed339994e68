// What the index of a TensorFlow checkpoint is made of, as tf_checkpoint.h describes it: varints, the fields
// of messages, blocks and their entries. Only the reader of the checkpoint, and its tests, need this.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "error.h"
#include "files.h"

namespace tf_format {

constexpr uint64_t kMagic = 0xdb4775248b80fb57;
constexpr size_t kFooter = 48, kTrailer = 5;
// A long key takes few bytes in the file if the one before was similar, and all of it may be compressed.
// These keep what a small file can make us hold to some hundred megabytes.
constexpr size_t kMaxName = 1000, kMaxTensors = 200'000, kMaxRank = 32;
constexpr uint64_t kMaxShards = 99'999;  // the files' names have five digits
constexpr uint64_t kVersion = 1;         // of the bundle, that this reader knows

// What stands at the front of `in`, which loses it; false if there is no such thing.
bool take_varint(std::string_view& in, uint64_t& value);
bool take_bytes(std::string_view& in, uint64_t size, std::string_view& bytes);

uint32_t uint32_at(const void* at);

enum : uint64_t { kVarint = 0, kEightBytes = 1, kBytes = 2, kFourBytes = 5 };

struct Field {
    uint64_t number = 0, kind = 0;
    uint64_t value = 0;      // of a varint or four bytes
    std::string_view bytes;  // of the other kinds
};
bool take_field(std::string_view& in, Field& field);

// Calls field(f) for each field; false if the bytes are no message. kinds[n] is what field n must be, where
// it is known; the others are passed over. A known field may come once, or as often as it likes if kRepeated
// is added.
constexpr uint64_t kRepeated = 8, kUnknown = 16;
template <size_t N, class F>
bool for_each_field(std::string_view message, const uint64_t (&kinds)[N], F field) {
    static_assert(N <= 64);
    uint64_t seen = 0;
    while (!message.empty()) {
        Field f;
        if (!take_field(message, f)) return false;
        if (f.number >= N || kinds[f.number] == kUnknown) continue;
        if (f.kind != (kinds[f.number] & 7)) return false;
        if (seen >> f.number & 1 && !(kinds[f.number] & kRepeated)) return false;
        seen |= uint64_t{1} << f.number;
        if (!field(f)) return false;
    }
    return true;
}

struct Handle {
    uint64_t offset = 0, size = 0;
};
bool take_handle(std::string_view& in, Handle& handle);

// A block without its trailer, its checksum verified; in `scratch` if it had to be decompressed.
std::string_view read_block(const MappedFile& file, Handle handle, std::string& scratch);

// Calls entry(key, value) for each entry of a block. The keys must rise from `key`, the one before the block
// (none if `first`), which becomes the block's last.
template <class F>
void for_each_entry(const std::string& path, std::string_view block, std::string& key, bool first, F entry) {
    const char* name = path.c_str();
    const uint32_t restarts = block.size() < 4 ? 0 : uint32_at(block.data() + block.size() - 4);
    if (restarts == 0 || restarts > block.size() / 4 - 1)
        fail("%s is damaged: a block's restart points do not fit into it", name);
    const size_t end = block.size() - 4 - size_t{4} * restarts;
    std::string_view in = block.substr(0, end);
    std::string before;  // within the block
    const auto restart_at = [&](size_t i) { return uint32_at(block.data() + end + 4 * i); };
    size_t restart = in.empty() ? 1 : 0;  // the next one; a block of no entries has one all the same
    while (!in.empty()) {
        const bool at_restart = restart < restarts && restart_at(restart) == end - in.size();
        restart += at_restart;
        uint64_t shared, own, size;
        std::string_view rest, value;
        if (!take_varint(in, shared) || !take_varint(in, own) || !take_varint(in, size) ||
            !take_bytes(in, own, rest) || !take_bytes(in, size, value) ||
            shared > (at_restart ? 0 : before.size()))
            fail("%s is damaged: a block holds an entry that is not valid", name);
        if (shared + own > kMaxName)
            fail("%s: the name of a tensor is longer than %zu bytes", name, kMaxName);
        before.resize(shared);
        before += rest;
        if (!first && before <= key)
            fail("%s is damaged: tensor %s is not in its place, in alphabetical order", name,
                 printable(before).c_str());
        first = false;
        key = before;
        entry(std::as_const(key), value);
    }
    if (restart_at(0) != 0 || restart != restarts)
        fail("%s is damaged: a block's restart points are not where entries begin", name);
}

// Name and bytes of an element for TensorFlow's types; those unknown, and those of no fixed size (7 are
// strings, 20 resources, 21 variants), have 0 bytes.
std::pair<std::string, size_t> dtype_of(uint64_t type);

}  // namespace tf_format
