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
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"

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

// Whether these are the bytes of an index: they end as such a table does.
bool is_tf_index(const unsigned char* data, size_t size);

// Tensors by name, from PREFIX.index and its data files. The pointers live as long as the reader.
class TfCheckpointReader {
  public:
    explicit TfCheckpointReader(const std::string& prefix);

    // The .index file.
    const std::string& path() const { return path_; }
    const std::map<std::string, TfTensor>& tensors() const { return tensors_; }

    bool contains(const std::string& name) const { return tensors_.count(name) > 0; }

    const TfTensor& at(const std::string& name) const;

    // Copies a tensor of F32, F16 or BF16 to out, as float32, after its checksum was verified. Its shape must
    // be the one expected.
    void read_f32(const std::string& name, const std::vector<int64_t>& expected_shape, float* out) const;

  private:
    void read_header(const std::string& key, std::string_view message);

    void read_entry(const std::string& key, std::string_view message);

    void check_overlaps() const;

    std::string prefix_, path_;
    std::vector<MappedFile> shards_;
    std::map<std::string, TfTensor> tensors_;
};

// The prefix of the checkpoint in a folder: the one that the file `checkpoint` names, otherwise the only one.
std::string tf_prefix(const std::string& folder);
