// TensorFlow's checkpoints ("tensor bundles", V2), read. A checkpoint is a prefix with several files:
//
//     model.ckpt.index                   which tensors there are, and where their bytes lie
//     model.ckpt.data-00000-of-00001     their bytes, little-endian, row-major; large models have several
//     checkpoint                         text beside them: model_checkpoint_path: "model.ckpt", the latest
//
// The index is a table of LevelDB's kind, sorted keys with their values in blocks:
//
//     data blocks       the keys and values
//     metaindex block   of no use here
//     index block       for each data block a key not before its last, and its handle
//     48 bytes          handle of the metaindex block, handle of the index block, zeros up to byte 40,
//                       0xdb4775248b80fb57
//
//     handle            varint offset, varint size (without the trailer)
//     block             entries; where some of them begin ("restarts"), uint32 each; their number, uint32
//     trailer           behind each block: a byte, 0 for raw and 1 for compressed with Snappy; uint32 masked
//                       CRC32C of the block as it is stored and this byte
//     entry             varint shared, varint non_shared, varint value_length, bytes of key, bytes of value;
//                       the key begins with `shared` bytes of the one before, none of them at a restart
//
// A varint is 7 bits a byte, low ones first, with the top bit set in all bytes but the last. A masked
// checksum has its bits rotated and a constant added: data that contains its own checksum has a poor one.
//
// The values are protobuf messages, sequences of fields, in which a field that is zero is left out:
//
//     field             varint (number << 3 | kind), then: kind 0 a varint, 1 eight bytes, 5 four bytes,
//                       2 a varint length and so many bytes, a text or another message
//     of key ""         1 number of data files, 2 endianness (0: little), 3 version {2 least reader's}
//     of a name         1 type, 2 shape, 3 data file, 4 offset in it, 5 size, 6 masked CRC32C of the bytes
//                       (four bytes), 7 slices, of tensors that are stored in parts
//     shape             2 dimension {1 size}, once for each; 3 unknown rank
//
// Nothing in the files is believed: when the reader's constructor returns, every tensor's bytes lie inside a
// data file, fit its type and shape, and are nobody else's. Their checksum is verified when they are read.
#pragma once
#include <snappy-c.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#ifdef __SSE4_2__
#include <nmmintrin.h>
#endif

#include "error.h"
#include "files.h"
#include "safetensors.h"  // bf16_bits_to_float, f16_bits_to_float, shape_text

static_assert(std::endian::native == std::endian::little,
              "these checkpoints are little-endian, as this code is");

// ---- CRC32C: the polynomial 0x1edc6f41, bits in reverse ----

namespace crc32c_detail {

// tables[k][b]: what byte b does to the checksum when k more bytes follow it.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        tables[0][b] = crc;
    }
    for (size_t k = 1; k < 8; k++)
        for (size_t b = 0; b < 256; b++)
            tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
    return tables;
}
inline constexpr auto kTables = make_tables();

}  // namespace crc32c_detail

// Without a special instruction. The bytes may come in pieces: `crc` is the result for those before.
inline uint32_t crc32c_portable(const void* data, size_t size, uint32_t crc = 0) {
    const auto& t = crc32c_detail::kTables;
    const unsigned char* at = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; size >= 8; at += 8, size -= 8) {  // eight bytes at once: their tables do not wait for one another
        uint64_t x;
        memcpy(&x, at, 8);
        x ^= crc;
        crc = t[7][x & 255] ^ t[6][x >> 8 & 255] ^ t[5][x >> 16 & 255] ^ t[4][x >> 24 & 255] ^
              t[3][x >> 32 & 255] ^ t[2][x >> 40 & 255] ^ t[1][x >> 48 & 255] ^ t[0][x >> 56];
    }
    for (; size > 0; at++, size--) crc = crc >> 8 ^ t[0][(crc ^ *at) & 255];
    return ~crc;
}

inline uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0) {
#ifdef __SSE4_2__
    const unsigned char* at = static_cast<const unsigned char*>(data);
    uint64_t c = ~crc;
    for (; size >= 8; at += 8, size -= 8) {
        uint64_t x;
        memcpy(&x, at, 8);
        c = _mm_crc32_u64(c, x);
    }
    crc = static_cast<uint32_t>(c);
    for (; size > 0; at++, size--) crc = _mm_crc32_u8(crc, *at);
    return ~crc;
#else
    return crc32c_portable(data, size, crc);
#endif
}

inline uint32_t mask_crc(uint32_t crc) {
    return std::rotr(crc, 15) + 0xa282ead8u;
}
inline uint32_t unmask_crc(uint32_t masked) {
    return std::rotl(masked - 0xa282ead8u, 15);
}

// ---- The files ----

// One tensor of a checkpoint. `data` is as aligned as the file happens to make it.
struct TfTensor {
    std::string dtype;  // as in safetensors where those have it; "type 7" otherwise, by TensorFlow's number
    std::vector<int64_t> shape;
    const unsigned char* data = nullptr;
    size_t bytes = 0;
    size_t elements = 0;
    uint32_t crc = 0;  // CRC32C that the bytes should have, unmasked
    std::string file;  // the data file
};

namespace tf_detail {

constexpr uint64_t kMagic = 0xdb4775248b80fb57;
constexpr size_t kFooter = 48, kTrailer = 5;
// A long key takes few bytes in the file if the one before was similar, and all of it may be compressed.
// These keep what a small file can make us hold to some hundred megabytes.
constexpr size_t kMaxName = 1000, kMaxTensors = 200'000, kMaxRank = 32;
constexpr uint64_t kMaxShards = 99'999;  // the files' names have five digits
constexpr uint64_t kVersion = 1;         // of the bundle, that this reader knows

// What stands at the front of `in`, which loses it; false if there is no such thing.
inline bool take_varint(std::string_view& in, uint64_t& value) {
    value = 0;
    for (size_t i = 0; i < 10 && i < in.size(); i++) {
        const uint64_t byte = static_cast<unsigned char>(in[i]);
        if (i == 9 && byte > 1) return false;  // beyond 64 bits
        value |= (byte & 127) << 7 * i;
        if (byte < 128) {
            in.remove_prefix(i + 1);
            return true;
        }
    }
    return false;
}
inline bool take_bytes(std::string_view& in, uint64_t size, std::string_view& bytes) {
    if (size > in.size()) return false;
    bytes = in.substr(0, size);
    in.remove_prefix(size);
    return true;
}

inline uint32_t uint32_at(const void* at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

enum : uint64_t { kVarint = 0, kEightBytes = 1, kBytes = 2, kFourBytes = 5 };

struct Field {
    uint64_t number = 0, kind = 0;
    uint64_t value = 0;      // of a varint or four bytes
    std::string_view bytes;  // of the other kinds
};
inline bool take_field(std::string_view& in, Field& field) {
    uint64_t tag, size;
    if (!take_varint(in, tag) || tag > UINT32_MAX || tag >> 3 == 0) return false;
    field = {.number = tag >> 3, .kind = tag & 7, .value = 0, .bytes = {}};
    switch (field.kind) {
        case kVarint:
            return take_varint(in, field.value);
        case kEightBytes:
            return take_bytes(in, 8, field.bytes);
        case kBytes:
            return take_varint(in, size) && take_bytes(in, size, field.bytes);
        case kFourBytes:
            if (!take_bytes(in, 4, field.bytes)) return false;
            field.value = uint32_at(field.bytes.data());
            return true;
        default:
            return false;  // the kinds 3 and 4, groups, are not used any more
    }
}

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
inline bool take_handle(std::string_view& in, Handle& handle) {
    return take_varint(in, handle.offset) && take_varint(in, handle.size);
}

// A block without its trailer, its checksum verified; in `scratch` if it had to be decompressed.
inline std::string_view read_block(const MappedFile& file, Handle handle, std::string& scratch) {
    const char* name = file.path().c_str();
    const uint64_t limit = file.size() - kFooter;
    const auto offset = static_cast<unsigned long long>(handle.offset);
    if (handle.offset > limit || handle.size > limit - handle.offset ||
        limit - handle.offset - handle.size < kTrailer)
        fail("%s is damaged: a block of %llu bytes at byte %llu lies outside the file", name,
             static_cast<unsigned long long>(handle.size), offset);
    const char* block = reinterpret_cast<const char*>(file.data()) + handle.offset;
    if (mask_crc(crc32c(block, handle.size + 1)) != uint32_at(block + handle.size + 1))
        fail("%s is damaged: the checksum of the block at byte %llu does not match", name, offset);
    const int kind = static_cast<unsigned char>(block[handle.size]);
    if (kind == 0) return {block, handle.size};
    if (kind != 1)
        fail("%s: the block at byte %llu is compressed in a way that is not known (%d)", name, offset, kind);
    size_t size = 0;
    // Snappy's best is to repeat 64 bytes for 3, so a size beyond that is a lie.
    if (snappy_uncompressed_length(block, handle.size, &size) != SNAPPY_OK || size / 64 > handle.size)
        fail("%s is damaged: the block at byte %llu is not valid Snappy data", name, offset);
    scratch.resize(size);
    if (snappy_uncompress(block, handle.size, scratch.data(), &size) != SNAPPY_OK)
        fail("%s is damaged: the block at byte %llu is not valid Snappy data", name, offset);
    return scratch;
}

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
inline std::pair<std::string, size_t> dtype_of(uint64_t type) {
    static const std::map<uint64_t, std::pair<std::string, size_t>> known = {
        {1, {"F32", 4}},  {2, {"F64", 8}},  {3, {"I32", 4}},   {4, {"U8", 1}},    {5, {"I16", 2}},
        {6, {"I8", 1}},   {9, {"I64", 8}},  {10, {"BOOL", 1}}, {14, {"BF16", 2}}, {17, {"U16", 2}},
        {19, {"F16", 2}}, {22, {"U32", 4}}, {23, {"U64", 8}}};
    auto found = known.find(type);
    if (found != known.end()) return found->second;
    return {"type " + std::to_string(type), 0};
}

}  // namespace tf_detail

// Whether these are the bytes of an index: they end as such a table does.
inline bool is_tf_index(const unsigned char* data, size_t size) {
    return size >= tf_detail::kFooter && memcmp(data + size - 8, &tf_detail::kMagic, 8) == 0;
}

// Tensors by name, from PREFIX.index and its data files. The pointers live as long as the reader.
class TfCheckpointReader {
  public:
    explicit TfCheckpointReader(const std::string& prefix) : prefix_(prefix), path_(prefix + ".index") {
        using namespace tf_detail;
        const MappedFile file(path_);
        const char* name = path_.c_str();
        if (!is_tf_index(file.data(), file.size()))
            fail("%s is no TensorFlow checkpoint's index, or cut off: it does not end as one does", name);
        std::string_view footer(reinterpret_cast<const char*>(file.data()) + file.size() - kFooter,
                                kFooter - 8);
        Handle metaindex, index;
        if (!take_handle(footer, metaindex) || !take_handle(footer, index))
            fail("%s is damaged: it does not say where its index block lies", name);

        std::string index_scratch, scratch, index_key, key;
        uint64_t end = 0;
        bool first = true;
        for_each_entry(path_, read_block(file, index, index_scratch), index_key, true,
                       [&](const std::string& last, std::string_view value) {
                           Handle data;
                           if (!take_handle(value, data) || !value.empty())
                               fail("%s is damaged: it does not say where a block lies", name);
                           // Were they to overlap, a small file could keep us busy for long.
                           if (data.offset < end) fail("%s is damaged: its blocks are not in order", name);
                           for_each_entry(path_, read_block(file, data, scratch), key, first,
                                          [&](const std::string& tensor, std::string_view message) {
                                              if (first)
                                                  read_header(tensor, message);
                                              else
                                                  read_entry(tensor, message);
                                              first = false;
                                          });
                           if (key > last) fail("%s is damaged: its index block names another key", name);
                           end = data.offset + data.size;  // both within the file: the block was read
                       });
        if (first) fail("%s is damaged: it has no entries", name);
        check_overlaps();
    }

    // The .index file.
    const std::string& path() const { return path_; }
    const std::map<std::string, TfTensor>& tensors() const { return tensors_; }

    bool contains(const std::string& name) const { return tensors_.count(name) > 0; }

    const TfTensor& at(const std::string& name) const {
        auto found = tensors_.find(name);
        if (found == tensors_.end()) fail("%s has no tensor %s", path_.c_str(), printable(name).c_str());
        return found->second;
    }

    // Copies a tensor of F32, F16 or BF16 to out, as float32, after its checksum was verified. Its shape must
    // be the one expected.
    void read_f32(const std::string& name, const std::vector<int64_t>& expected_shape, float* out) const {
        const TfTensor& t = at(name);
        const std::string shown = printable(name);
        if (t.shape != expected_shape)
            fail("%s: tensor %s has shape %s, but %s is expected", path_.c_str(), shown.c_str(),
                 shape_text(t.shape).c_str(), shape_text(expected_shape).c_str());
        if (t.dtype != "F32" && t.dtype != "F16" && t.dtype != "BF16")
            fail("%s: tensor %s holds %s, but F32, F16 or BF16 is expected", path_.c_str(), shown.c_str(),
                 t.dtype.c_str());
        if (crc32c(t.data, t.bytes) != t.crc)
            fail("%s is damaged: the checksum of tensor %s does not match", t.file.c_str(), shown.c_str());
        if (t.dtype == "F32") {
            if (t.bytes > 0) memcpy(out, t.data, t.bytes);
        } else {
            const auto to_float = t.dtype == "F16" ? f16_bits_to_float : bf16_bits_to_float;
            for (size_t i = 0; i < t.elements; i++) {
                uint16_t bits;
                memcpy(&bits, t.data + 2 * i, 2);
                out[i] = to_float(bits);
            }
        }
    }

  private:
    void read_header(const std::string& key, std::string_view message) {
        using namespace tf_detail;
        const char* name = path_.c_str();
        uint64_t shards = 0, endianness = 0, least_version = 0;
        const bool valid =
            key.empty() && for_each_field(message, {kUnknown, kVarint, kVarint, kBytes}, [&](const Field& f) {
                if (f.number == 1) shards = f.value;
                if (f.number == 2) endianness = f.value;
                if (f.number != 3) return true;
                return for_each_field(f.bytes, {kUnknown, kUnknown, kVarint}, [&](const Field& version) {
                    least_version = version.value;
                    return true;
                });
            });
        if (!valid) fail("%s is damaged, or no TensorFlow checkpoint's index: it has no valid header", name);
        if (endianness != 0) fail("%s is of a big-endian machine, which is not supported", name);
        if (least_version > kVersion)
            fail(
                "%s is of a newer TensorFlow: it asks for version %llu of the format, and %llu is known here",
                name, static_cast<unsigned long long>(least_version),
                static_cast<unsigned long long>(kVersion));
        if (shards == 0 || shards > kMaxShards)
            fail("%s is damaged: it says that there are %llu data files", name,
                 static_cast<unsigned long long>(shards));
        for (uint64_t i = 0; i < shards; i++)
            shards_.emplace_back(prefix_ + format(".data-%05u-of-%05u", static_cast<unsigned>(i),
                                                  static_cast<unsigned>(shards)));
    }

    void read_entry(const std::string& key, std::string_view message) {
        using namespace tf_detail;
        const std::string shown = printable(key);
        const char *name = path_.c_str(), *tensor = shown.c_str();
        if (tensors_.size() == kMaxTensors) fail("%s has more than %zu tensors", name, kMaxTensors);
        TfTensor t;
        uint64_t type = 0, shard = 0, offset = 0, size = 0, unknown_rank = 0;
        uint32_t crc = 0;
        bool in_slices = false;
        auto dimension = [&](const Field& f) {
            if (f.number == 3) unknown_rank = f.value;
            if (f.number != 2) return true;
            if (t.shape.size() == kMaxRank) return false;
            t.shape.push_back(0);
            return for_each_field(f.bytes, {kUnknown, kVarint}, [&](const Field& length) {
                t.shape.back() = static_cast<int64_t>(length.value);
                return true;
            });
        };
        const bool valid = for_each_field(
            message, {kUnknown, kVarint, kBytes, kVarint, kVarint, kVarint, kFourBytes, kBytes | kRepeated},
            [&](const Field& f) {
                if (f.number == 1) type = f.value;
                if (f.number == 3) shard = f.value;
                if (f.number == 4) offset = f.value;
                if (f.number == 5) size = f.value;
                if (f.number == 6) crc = static_cast<uint32_t>(f.value);
                if (f.number == 7) in_slices = true;
                if (f.number != 2) return true;
                return for_each_field(f.bytes, {kUnknown, kUnknown, kBytes | kRepeated, kVarint}, dimension);
            });
        if (!valid) fail("%s is damaged: the entry of tensor %s is not valid", name, tensor);
        if (in_slices) fail("%s: tensor %s is stored in slices, which is not supported", name, tensor);
        if (unknown_rank) fail("%s: tensor %s has no definite shape", name, tensor);

        const auto [dtype, element_size] = dtype_of(type);
        uint64_t elements = 1, bytes = 0;
        bool possible = true;
        for (int64_t n : t.shape)
            possible &= n >= 0 && !__builtin_mul_overflow(elements, static_cast<uint64_t>(n), &elements);
        if (!possible)
            fail("%s: tensor %s has an impossible shape, %s", name, tensor, shape_text(t.shape).c_str());
        if (element_size > 0 && (__builtin_mul_overflow(elements, element_size, &bytes) || bytes != size))
            fail("%s: tensor %s of type %s and shape %s does not fit its %llu bytes", name, tensor,
                 dtype.c_str(), shape_text(t.shape).c_str(), static_cast<unsigned long long>(size));
        if (shard >= shards_.size())
            fail("%s: tensor %s lies in data file %llu, but there are %zu of them, from 0 on", name, tensor,
                 static_cast<unsigned long long>(shard), shards_.size());
        const MappedFile& file = shards_[shard];
        if (offset > file.size() || size > file.size() - offset)
            fail("%s: tensor %s lies at byte %llu and has %llu bytes, but %s has only %zu (is it cut off?)",
                 name, tensor, static_cast<unsigned long long>(offset), static_cast<unsigned long long>(size),
                 file.path().c_str(), file.size());
        t.dtype = dtype;
        t.data = file.data() + offset;
        t.bytes = size;
        t.elements = elements;
        t.crc = unmask_crc(crc);
        t.file = file.path();
        tensors_.emplace_hint(tensors_.end(), key, std::move(t));
    }

    void check_overlaps() const {
        std::vector<const std::pair<const std::string, TfTensor>*> sorted;
        for (const auto& item : tensors_)
            if (item.second.bytes > 0) sorted.push_back(&item);
        // By address: each data file is mapped once, in one piece, and away from the others.
        std::stable_sort(sorted.begin(), sorted.end(),
                         [](auto* a, auto* b) { return std::less<>()(a->second.data, b->second.data); });
        for (size_t i = 1; i < sorted.size(); i++) {
            const auto& [name, t] = *sorted[i];
            const auto& [name_before, before] = *sorted[i - 1];
            if (std::less<>()(t.data, before.data + before.bytes))
                fail("%s: tensor %s overlaps tensor %s", path_.c_str(), printable(name).c_str(),
                     printable(name_before).c_str());
        }
    }

    std::string prefix_, path_;
    std::vector<MappedFile> shards_;
    std::map<std::string, TfTensor> tensors_;
};

// The prefix of the checkpoint in a folder: the one that the file `checkpoint` names, otherwise the only one.
inline std::string tf_prefix(const std::string& folder) {
    constexpr size_t max_bytes = 1 << 20;
    const std::string list = folder + "/checkpoint";
    if (is_file(list)) {
        const MappedFile file(list);
        if (file.size() > max_bytes)
            fail("%s is too large to be TensorFlow's list of checkpoints (%zu bytes)", list.c_str(),
                 file.size());
        const std::string_view key = "model_checkpoint_path:";
        std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
        while (!text.empty()) {
            std::string_view line = text.substr(0, text.find('\n'));
            text.remove_prefix(std::min(line.size() + 1, text.size()));
            if (!line.starts_with(key)) continue;
            line.remove_prefix(std::min(line.find('"'), line.size()));
            const size_t end = line.find('"', 1);
            const std::string path(end == std::string_view::npos ? "" : line.substr(1, end - 1));
            // Often the path on the machine that wrote it, which is of no use here.
            const std::string name = path.substr(path.rfind('/') + 1);
            // A backslash starts an escape: for a quote, or a byte outside ASCII.
            const bool plain = std::all_of(name.begin(), name.end(),
                                           [](char c) { return c >= 0x20 && c <= 0x7e && c != '\\'; });
            if (name.empty() || name == "." || name == ".." || !plain)
                fail("%s names no checkpoint that can be read, but '%s': give the .index file instead",
                     list.c_str(), printable(path).c_str());
            return folder + "/" + name;
        }
        fail("%s does not name the latest checkpoint (model_checkpoint_path): give the .index file instead",
             list.c_str());
    }
    std::vector<std::string> found;
    std::error_code error;
    std::filesystem::directory_iterator it(folder, error), last;
    for (; !error && it != last; it.increment(error)) {
        const std::string name = it->path().filename().string(), path = folder + "/" + name;
        if (!name.ends_with(".index") || !is_file(path)) continue;
        const MappedFile file(path);
        if (is_tf_index(file.data(), file.size())) found.push_back(name);
    }
    if (error) fail("cannot list %s: %s", folder.c_str(), error.message().c_str());
    if (found.empty()) fail("%s holds no TensorFlow checkpoint (NAME.index)", folder.c_str());
    std::sort(found.begin(), found.end());
    if (found.size() > 1)
        fail("%s holds several TensorFlow checkpoints (%s, %s, ...): name one of them", folder.c_str(),
             printable(found[0]).c_str(), printable(found[1]).c_str());
    return folder + "/" + found[0].substr(0, found[0].size() - std::string_view(".index").size());
}
