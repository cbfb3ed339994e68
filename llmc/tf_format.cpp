#include "tf_format.h"

#include <snappy-c.h>

#include <cstring>
#include <map>

#include "crc32c.h"
#include "error.h"

namespace tf_format {

bool take_varint(std::string_view& in, uint64_t& value) {
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

bool take_bytes(std::string_view& in, uint64_t size, std::string_view& bytes) {
    if (size > in.size()) return false;
    bytes = in.substr(0, size);
    in.remove_prefix(size);
    return true;
}

uint32_t uint32_at(const void* at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

bool take_field(std::string_view& in, Field& field) {
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

bool take_handle(std::string_view& in, Handle& handle) {
    return take_varint(in, handle.offset) && take_varint(in, handle.size);
}

std::string_view read_block(const MappedFile& file, Handle handle, std::string& scratch) {
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

std::pair<std::string, size_t> dtype_of(uint64_t type) {
    static const std::map<uint64_t, std::pair<std::string, size_t>> known = {
        {1, {"F32", 4}},  {2, {"F64", 8}},  {3, {"I32", 4}},   {4, {"U8", 1}},    {5, {"I16", 2}},
        {6, {"I8", 1}},   {9, {"I64", 8}},  {10, {"BOOL", 1}}, {14, {"BF16", 2}}, {17, {"U16", 2}},
        {19, {"F16", 2}}, {22, {"U32", 4}}, {23, {"U64", 8}}};
    auto found = known.find(type);
    if (found != known.end()) return found->second;
    return {"type " + std::to_string(type), 0};
}

}  // namespace tf_format
