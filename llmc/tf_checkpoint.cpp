#include "tf_checkpoint.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string_view>
#include <utility>

#include "crc32c.h"
#include "error.h"
#include "safetensors.h"  // copy_as_f32, is_float_dtype, shape_text
#include "tf_format.h"

static_assert(std::endian::native == std::endian::little,
              "these checkpoints are little-endian, as this code is");

bool is_tf_index(const unsigned char* data, size_t size) {
    return size >= tf_format::kFooter && memcmp(data + size - 8, &tf_format::kMagic, 8) == 0;
}

TfCheckpointReader::TfCheckpointReader(const std::string& prefix)
    : prefix_(prefix), path_(prefix + ".index") {
    using namespace tf_format;
    const MappedFile file(path_);
    const char* name = path_.c_str();
    if (!is_tf_index(file.data(), file.size()))
        fail("%s is no TensorFlow checkpoint's index, or cut off: it does not end as one does", name);
    std::string_view footer(reinterpret_cast<const char*>(file.data()) + file.size() - kFooter, kFooter - 8);
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

const TfTensor& TfCheckpointReader::at(const std::string& name) const {
    auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("%s has no tensor %s", path_.c_str(), printable(name).c_str());
    return found->second;
}

void TfCheckpointReader::read_f32(const std::string& name, const std::vector<int64_t>& expected_shape,
                                  float* out) const {
    const TfTensor& t = at(name);
    const std::string shown = printable(name);
    if (t.shape != expected_shape)
        fail("%s: tensor %s has shape %s, but %s is expected", path_.c_str(), shown.c_str(),
             shape_text(t.shape).c_str(), shape_text(expected_shape).c_str());
    if (!is_float_dtype(t.dtype))
        fail("%s: tensor %s holds %s, but F32, F16 or BF16 is expected", path_.c_str(), shown.c_str(),
             t.dtype.c_str());
    if (crc32c(t.data, t.bytes) != t.crc)
        fail("%s is damaged: the checksum of tensor %s does not match", t.file.c_str(), shown.c_str());
    copy_as_f32(t.dtype, t.data, t.elements, out);
}

void TfCheckpointReader::read_header(const std::string& key, std::string_view message) {
    using namespace tf_format;
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
        fail("%s is of a newer TensorFlow: it asks for version %llu of the format, and %llu is known here",
             name, static_cast<unsigned long long>(least_version), static_cast<unsigned long long>(kVersion));
    if (shards == 0 || shards > kMaxShards)
        fail("%s is damaged: it says that there are %llu data files", name,
             static_cast<unsigned long long>(shards));
    for (uint64_t i = 0; i < shards; i++)
        shards_.emplace_back(
            prefix_ + format(".data-%05u-of-%05u", static_cast<unsigned>(i), static_cast<unsigned>(shards)));
}

void TfCheckpointReader::read_entry(const std::string& key, std::string_view message) {
    using namespace tf_format;
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
        fail("%s: tensor %s of type %s and shape %s does not fit its %llu bytes", name, tensor, dtype.c_str(),
             shape_text(t.shape).c_str(), static_cast<unsigned long long>(size));
    if (shard >= shards_.size())
        fail("%s: tensor %s lies in data file %llu, but there are %zu of them, from 0 on", name, tensor,
             static_cast<unsigned long long>(shard), shards_.size());
    const MappedFile& file = shards_[shard];
    if (offset > file.size() || size > file.size() - offset)
        fail("%s: tensor %s lies at byte %llu and has %llu bytes, but %s has only %zu (is it cut off?)", name,
             tensor, static_cast<unsigned long long>(offset), static_cast<unsigned long long>(size),
             file.path().c_str(), file.size());
    t.dtype = dtype;
    t.data = file.data() + offset;
    t.bytes = size;
    t.elements = elements;
    t.crc = unmask_crc(crc);
    t.file = file.path();
    tensors_.emplace_hint(tensors_.end(), key, std::move(t));
}

void TfCheckpointReader::check_overlaps() const {
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

std::string tf_prefix(const std::string& folder) {
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
