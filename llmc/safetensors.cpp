#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "error.h"
#include "json_file.h"

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian, as this code is");

size_t safetensors_dtype_size(const std::string& dtype) {
    static const std::map<std::string, size_t> sizes = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1},
        {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
        {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
    auto found = sizes.find(dtype);
    return found == sizes.end() ? 0 : found->second;
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

float bf16_bits_to_float(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float f16_bits_to_float(uint16_t bits) {
    uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 0) {  // zero and the subnormals: mantissa * 2^-24
        float value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -value : value;
    }
    uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

namespace {

template <class ToFloat>
void convert(const unsigned char* data, size_t n, float* out, ToFloat to_float) {
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, data + 2 * i, 2);
        out[i] = to_float(bits);
    }
}

}  // namespace

bool is_float_dtype(const std::string& dtype) {
    return dtype == "F32" || dtype == "F16" || dtype == "BF16";
}

void copy_as_f32(const std::string& dtype, const unsigned char* data, size_t n, float* out) {
    assert(is_float_dtype(dtype));
    if (dtype == "BF16") return convert(data, n, out, bf16_bits_to_float);
    if (dtype == "F16") return convert(data, n, out, f16_bits_to_float);
    if (n > 0) memcpy(out, data, n * sizeof(float));
}

namespace {

constexpr size_t kMaxHeader = 100'000'000;  // the reference implementation's
constexpr size_t kMaxRank = 32;

struct Entry {
    SafeTensor tensor;
    uint64_t begin = 0, end = 0;
    bool has_dtype = false, has_shape = false, has_offsets = false;
};

// Takes the header as it is parsed: no tree is built, so nesting and size cost nothing beyond the tensors
// themselves. The first thing wrong ends up in `problem` and stops the parser.
class HeaderParser : public nlohmann::json_sax<nlohmann::json> {
  public:
    std::map<std::string, Entry> entries;
    std::map<std::string, std::string> metadata;
    std::string problem;

    bool start_object(size_t) override {
        if (depth_ == 0 || (depth_ == 1 && expecting_ == Expecting::entry)) {
            depth_++;
            expecting_ = Expecting::key;
            return true;
        }
        return misplaced("an object");
    }
    bool key(std::string& name) override {
        if (depth_ == 1) {
            in_metadata_ = name == "__metadata__";
            if (in_metadata_ ? seen_metadata_ : entries.count(name) > 0)
                return say("names " + quoted(name) + " twice");
            if (in_metadata_)
                seen_metadata_ = true;
            else
                entry_ = &entries[name];
            name_ = name;
            expecting_ = Expecting::entry;
            return true;
        }
        if (in_metadata_) {
            if (metadata.count(name)) return say("names " + quoted(name) + " twice in its metadata");
            metadata_key_ = name;
            expecting_ = Expecting::text;
            return true;
        }
        bool* seen = name == "dtype"          ? &entry_->has_dtype
                     : name == "shape"        ? &entry_->has_shape
                     : name == "data_offsets" ? &entry_->has_offsets
                                              : nullptr;
        if (!seen) return say("has an unknown field " + quoted(name) + " in tensor " + quoted(name_));
        if (*seen) return say("gives " + name + " of tensor " + quoted(name_) + " twice");
        *seen = true;
        expecting_ = name == "dtype"   ? Expecting::dtype
                     : name == "shape" ? Expecting::shape
                                       : Expecting::offsets;
        return true;
    }
    bool string(std::string& text) override {
        if (expecting_ == Expecting::text) {
            metadata[metadata_key_] = text;
        } else if (expecting_ == Expecting::dtype) {
            if (!safetensors_dtype_size(text))
                return say("gives tensor " + quoted(name_) + " the dtype " + quoted(text) +
                           ", which is not one we know");
            entry_->tensor.dtype = text;
        } else {
            return misplaced("a string");
        }
        expecting_ = Expecting::key;
        return true;
    }
    bool start_array(size_t) override {
        if (depth_ != 2 || (expecting_ != Expecting::shape && expecting_ != Expecting::offsets))
            return misplaced("an array");
        depth_++;
        numbers_.clear();
        return true;
    }
    bool number_unsigned(uint64_t value) override {
        if (depth_ != 3) return misplaced("a number");
        if (numbers_.size() == kMaxRank) return say("has too many numbers in tensor " + quoted(name_));
        numbers_.push_back(value);
        return true;
    }
    bool end_array() override {
        depth_--;
        if (expecting_ == Expecting::shape) {
            for (uint64_t n : numbers_) {
                if (n > INT64_MAX) return say("has an impossible shape for tensor " + quoted(name_));
                entry_->tensor.shape.push_back(static_cast<int64_t>(n));
            }
        } else {
            if (numbers_.size() != 2) return say("must give tensor " + quoted(name_) + " two data_offsets");
            entry_->begin = numbers_[0];
            entry_->end = numbers_[1];
        }
        expecting_ = Expecting::key;
        return true;
    }
    bool end_object() override {
        depth_--;
        if (depth_ == 1 && !in_metadata_ && !(entry_->has_dtype && entry_->has_shape && entry_->has_offsets))
            return say("lacks the dtype, shape or data_offsets of tensor " + quoted(name_));
        expecting_ = Expecting::key;
        return true;
    }
    bool number_integer(int64_t) override { return misplaced("a negative number"); }
    bool number_float(double, const std::string&) override { return misplaced("a fraction"); }
    bool boolean(bool) override { return misplaced("a boolean"); }
    bool null() override { return misplaced("a null"); }
    bool binary(binary_t&) override { return misplaced("binary data"); }
    bool parse_error(size_t at, const std::string&, const nlohmann::json::exception&) override {
        return say("is not valid JSON (at byte " + std::to_string(at) + " of the header)");
    }

    static std::string quoted(const std::string& name) { return "'" + printable(name) + "'"; }

  private:
    enum class Expecting { key, entry, text, dtype, shape, offsets };

    bool say(const std::string& what) {
        problem = what;
        return false;
    }
    bool misplaced(const char* what) {
        return say(std::string("has ") + what + " where there should be none" +
                   (depth_ > 0 ? ", at " + quoted(name_) : ""));
    }

    int depth_ = 0;
    Expecting expecting_ = Expecting::key;
    bool in_metadata_ = false, seen_metadata_ = false;
    std::string name_, metadata_key_;
    Entry* entry_ = nullptr;
    std::vector<uint64_t> numbers_;
};

}  // namespace

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
    if (is_folder(path)) {
        path_ = path + "/model.safetensors";
        if (!is_file(path_) && is_file(path_ + ".index.json")) path_ += ".index.json";
    }
    if (path_.ends_with(".json"))
        read_index();
    else
        tensors_ = read_one(path_, &metadata_);
}

const SafeTensor& SafetensorsReader::at(const std::string& name) const {
    auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("%s has no tensor %s", path_.c_str(), printable(name).c_str());
    return found->second;
}

void SafetensorsReader::read_f32(const std::string& name, const std::vector<int64_t>& expected_shape,
                                 float* out) const {
    const SafeTensor& t = at(name);
    if (t.shape != expected_shape)
        fail("%s: tensor %s has shape %s, but %s is expected", t.file.c_str(), printable(name).c_str(),
             shape_text(t.shape).c_str(), shape_text(expected_shape).c_str());
    if (!is_float_dtype(t.dtype))
        fail("%s: tensor %s is of type %s, but F32, F16 or BF16 is expected", t.file.c_str(),
             printable(name).c_str(), t.dtype.c_str());
    copy_as_f32(t.dtype, t.data, t.elements, out);
}

std::map<std::string, SafeTensor> SafetensorsReader::read_one(const std::string& path,
                                                              std::map<std::string, std::string>* metadata) {
    const char* name = path.c_str();
    files_.push_back(std::make_unique<MappedFile>(path));
    const MappedFile& file = *files_.back();

    uint64_t header_size = 0;
    if (file.size() < 8) fail("%s is no safetensors file: it has only %zu bytes", name, file.size());
    memcpy(&header_size, file.data(), 8);
    if (header_size > file.size() - 8)
        fail("%s is no safetensors file, or cut off: its header should have %llu bytes, the file has %zu",
             name, static_cast<unsigned long long>(header_size), file.size());
    if (header_size > kMaxHeader)
        fail("%s: a header of %llu bytes is more than safetensors allow", name,
             static_cast<unsigned long long>(header_size));
    const char* header = reinterpret_cast<const char*>(file.data()) + 8;
    if (header_size == 0 || header[0] != '{')
        fail("%s is no safetensors file: its header does not start with '{'", name);

    HeaderParser parser;
    if (!scan_json({header, header_size}, parser)) fail("%s: the header %s", name, parser.problem.c_str());

    const unsigned char* data = file.data() + 8 + header_size;
    const uint64_t data_size = file.size() - 8 - header_size;
    std::map<std::string, SafeTensor> tensors;
    std::vector<std::pair<std::pair<uint64_t, uint64_t>, std::string>> spans;
    for (auto& [key, entry] : parser.entries) {
        SafeTensor& t = entry.tensor;
        const std::string shown = printable(key);
        if (entry.begin > entry.end || entry.end > data_size)
            fail(
                "%s: tensor %s lies at bytes %llu to %llu, outside the %llu bytes of data (is the file "
                "cut off?)",
                name, shown.c_str(), static_cast<unsigned long long>(entry.begin),
                static_cast<unsigned long long>(entry.end), static_cast<unsigned long long>(data_size));
        uint64_t elements = 1, bytes = 0;
        bool overflow = false;
        for (int64_t n : t.shape)
            overflow |= __builtin_mul_overflow(elements, static_cast<uint64_t>(n), &elements);
        overflow |= __builtin_mul_overflow(elements, safetensors_dtype_size(t.dtype), &bytes);
        if (overflow || bytes != entry.end - entry.begin)
            fail("%s: tensor %s of type %s and shape %s does not fit its %llu bytes", name, shown.c_str(),
                 t.dtype.c_str(), shape_text(t.shape).c_str(),
                 static_cast<unsigned long long>(entry.end - entry.begin));
        t.data = data + entry.begin;
        t.bytes = bytes;
        t.elements = elements;
        t.file = path;
        spans.push_back({{entry.begin, entry.end}, key});
        tensors[key] = std::move(t);
    }
    std::sort(spans.begin(), spans.end());
    uint64_t covered = 0;
    for (const auto& [span, key] : spans) {
        if (span.first != covered)
            fail("%s: tensor %s %s", name, printable(key).c_str(),
                 span.first < covered ? "overlaps another tensor" : "leaves a gap before it");
        covered = span.second;
    }
    if (covered != data_size)
        fail("%s has %llu bytes after its last tensor", name,
             static_cast<unsigned long long>(data_size - covered));
    *metadata = std::move(parser.metadata);
    return tensors;
}

void SafetensorsReader::read_index() {
    const nlohmann::json root = read_json_object(path_);
    auto map = root.find("weight_map");
    if (map == root.end() || !map->is_object()) fail("%s has no weight_map", path_.c_str());
    std::map<std::string, std::map<std::string, SafeTensor>> shards;
    std::map<std::string, std::string> unused;
    for (const auto& [name, value] : map->items()) {
        if (!value.is_string())
            fail("%s gives no file for tensor %s", path_.c_str(), printable(name).c_str());
        const std::string shard = value.get<std::string>();
        // The files lie beside the index: a path could lead anywhere.
        if (shard.find('/') != std::string::npos || !shard.ends_with(".safetensors"))
            fail("%s: '%s' is not the name of a .safetensors file beside it", path_.c_str(),
                 printable(shard).c_str());
        if (!shards.count(shard)) shards[shard] = read_one(folder_of(path_) + "/" + shard, &unused);
        auto& tensors = shards[shard];
        auto found = tensors.find(name);
        if (found == tensors.end())
            fail("%s/%s has no tensor %s, though %s says so", folder_of(path_).c_str(),
                 printable(shard).c_str(), printable(name).c_str(), path_.c_str());
        tensors_[name] = std::move(found->second);
    }
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::map<std::string, std::string> metadata)
    : file_(path), metadata_(std::move(metadata)) {}

void SafetensorsWriter::declare(const std::string& name, const std::string& dtype,
                                const std::vector<int64_t>& shape) {
    assert(!started_ && safetensors_dtype_size(dtype) && name != "__metadata__");
    size_t bytes = safetensors_dtype_size(dtype);
    for (int64_t n : shape) bytes *= static_cast<size_t>(n);
    tensors_.push_back({name, dtype, shape, bytes});
}

void SafetensorsWriter::write(const std::string& name, const void* data, size_t bytes) {
    if (!started_) write_header();
    while (next_ < tensors_.size() && tensors_[next_].name != name && written_ == tensors_[next_].bytes)
        advance();
    assert(next_ < tensors_.size() && tensors_[next_].name == name);
    assert(bytes <= tensors_[next_].bytes - written_);
    file_.write(data, bytes);
    written_ += bytes;
}

void SafetensorsWriter::finish() {
    if (!started_) write_header();
    while (next_ < tensors_.size() && written_ == tensors_[next_].bytes) advance();
    if (next_ != tensors_.size())
        fail("%s cannot be finished: tensor %s was not written in full", file_.path().c_str(),
             tensors_[next_].name.c_str());
    file_.commit();
}

void SafetensorsWriter::advance() {
    next_++;
    written_ = 0;
}

void SafetensorsWriter::write_header() {
    started_ = true;
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata_.empty()) header["__metadata__"] = metadata_;
    size_t offset = 0;
    for (const Declared& t : tensors_) {
        header[t.name] = {
            {"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {offset, offset + t.bytes}}};
        offset += t.bytes;
    }
    assert(header.size() == tensors_.size() + !metadata_.empty());
    std::string text = json_text(header);
    text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
    const uint64_t size = text.size();
    file_.write(&size, 8);
    file_.write(text.data(), text.size());
}
