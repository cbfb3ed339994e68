// safetensors, read and written. The format (github.com/huggingface/safetensors):
//
//     8 bytes    N, the length of the header, little-endian
//     N bytes    JSON: {"__metadata__": {"key": "text", ...},
//                       "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
//                padded with spaces; offsets count from the end of the header
//     the rest   the tensors' bytes, little-endian, row-major, with neither gaps nor overlaps
//
// A model may also lie in several such files, with an index beside them:
//
//     model.safetensors.index.json    {"weight_map": {"NAME": "model-00001-of-00002.safetensors", ...}, ...}
//
// The reader maps the files and believes nothing in them: when its constructor returns, every tensor's bytes
// lie inside the file, fit its shape, and are nobody else's. The writer streams: the tensors are declared,
// then their bytes follow in the same order, in pieces of any size, so that no second copy of a model exists.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "files.h"

// Bytes an element takes, or 0 for a dtype that we do not know.
size_t safetensors_dtype_size(const std::string& dtype);

// "[2, 3]"
std::string shape_text(const std::vector<int64_t>& shape);

float bf16_bits_to_float(uint16_t bits);
float f16_bits_to_float(uint16_t bits);

// Whether elements of this dtype can be read as float32: F32, F16 or BF16.
bool is_float_dtype(const std::string& dtype);

// out[n] = data[n], of such a dtype and aligned as it may be, as float32.
void copy_as_f32(const std::string& dtype, const unsigned char* data, size_t n, float* out);

// One tensor of a file that is being read. `data` is as aligned as the file happens to make it.
struct SafeTensor {
    std::string dtype;
    std::vector<int64_t> shape;
    const unsigned char* data = nullptr;
    size_t bytes = 0;
    size_t elements = 0;
    std::string file;
};

// Tensors by name, from a .safetensors file, a model.safetensors.index.json, or a folder that holds one of
// the two (model.safetensors first). The pointers live as long as the reader.
class SafetensorsReader {
  public:
    explicit SafetensorsReader(const std::string& path);

    // The file that was read, or the index.
    const std::string& path() const { return path_; }
    const std::map<std::string, SafeTensor>& tensors() const { return tensors_; }
    // Of a single file; several files have none that is common.
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    bool contains(const std::string& name) const { return tensors_.count(name) > 0; }

    const SafeTensor& at(const std::string& name) const;

    // Copies a tensor of F32, F16 or BF16 to out, as float32. Its shape must be the one expected.
    void read_f32(const std::string& name, const std::vector<int64_t>& expected_shape, float* out) const;

  private:
    std::map<std::string, SafeTensor> read_one(const std::string& path,
                                               std::map<std::string, std::string>* metadata);

    void read_index();

    std::string path_;
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::map<std::string, SafeTensor> tensors_;
    std::map<std::string, std::string> metadata_;
};

// Writes PATH: declare() every tensor, then write() their bytes in the same order, then finish(). PATH
// appears in finish(), complete and synced; without it nothing is left behind.
class SafetensorsWriter {
  public:
    explicit SafetensorsWriter(const std::string& path, std::map<std::string, std::string> metadata = {});

    void declare(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape);

    // The next bytes of tensor `name`, which says only whose turn the caller thinks it is.
    void write(const std::string& name, const void* data, size_t bytes);

    void finish();

  private:
    struct Declared {
        std::string name, dtype;
        std::vector<int64_t> shape;
        size_t bytes;
    };

    void advance();

    void write_header();

    OutputFile file_;
    std::map<std::string, std::string> metadata_;
    std::vector<Declared> tensors_;
    size_t next_ = 0, written_ = 0;
    bool started_ = false;
};
