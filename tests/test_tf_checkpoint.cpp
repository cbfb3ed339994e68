// TensorFlow's checkpoints: what TensorFlow writes reads, and no file is believed.
#include "../llmc/tf_checkpoint.h"

#include <doctest/doctest.h>
#include <snappy-c.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "../llmc/crc32c.h"
#include "../llmc/safetensors.h"
#include "../llmc/weights.h"
#include "errors.h"
#include "temp_folder.h"

namespace {

const std::string kFixtures = folder_of(__FILE__) + "/fixtures";

std::vector<float> floats(const TfCheckpointReader& file, const std::string& name,
                          std::vector<int64_t> shape) {
    std::vector<float> values(file.at(name).elements);
    file.read_f32(name, shape, values.data());
    return values;
}

// ---- A writer of such tables, for those that TensorFlow does not write ----

std::string varint(uint64_t value) {
    std::string bytes;
    for (; value > 127; value >>= 7) bytes += static_cast<char>(value | 128);
    return bytes + static_cast<char>(value);
}

std::string little_endian(uint64_t value, int size) {
    std::string bytes(static_cast<size_t>(size), '\0');
    memcpy(bytes.data(), &value, bytes.size());
    return bytes;
}

// Fields of protobuf messages.
std::string number(uint64_t field, uint64_t value) {
    return varint(field << 3) + varint(value);
}
std::string bytes(uint64_t field, const std::string& value) {
    return varint(field << 3 | 2) + varint(value.size()) + value;
}
std::string four_bytes(uint64_t field, uint32_t value) {
    return varint(field << 3 | 5) + little_endian(value, 4);
}

std::string shape_message(const std::vector<int64_t>& shape) {
    std::string message;
    for (int64_t n : shape) message += bytes(2, number(1, static_cast<uint64_t>(n)));
    return message;
}

struct Spec {
    uint64_t type = 1;
    std::vector<int64_t> shape = {1};
    uint64_t shard = 0, offset = 0, size = 4;
    uint32_t crc = 0;
};
std::string entry_message(const Spec& t) {
    return number(1, t.type) + bytes(2, shape_message(t.shape)) + number(3, t.shard) + number(4, t.offset) +
           number(5, t.size) + four_bytes(6, mask_crc(t.crc));
}

const std::string kHeader = number(1, 1) + number(2, 0) + bytes(3, number(1, 1));

std::string block_entry(size_t shared, const std::string& rest, const std::string& value) {
    return varint(shared) + varint(rest.size()) + varint(value.size()) + rest + value;
}

std::string with_restarts(const std::string& entries, const std::vector<uint32_t>& restarts) {
    std::string block = entries;
    for (uint32_t at : restarts) block += little_endian(at, 4);
    return block + little_endian(restarts.size(), 4);
}

using Entries = std::vector<std::pair<std::string, std::string>>;

std::string block_of(const Entries& entries, size_t restart_every = 16) {
    std::string block, before;
    std::vector<uint32_t> restarts;
    for (size_t i = 0; i < entries.size(); i++) {
        const std::string& key = entries[i].first;
        size_t shared = 0;
        if (i % restart_every == 0)
            restarts.push_back(static_cast<uint32_t>(block.size()));
        else
            while (shared < std::min(before.size(), key.size()) && before[shared] == key[shared]) shared++;
        block += block_entry(shared, key.substr(shared), entries[i].second);
        before = key;
    }
    if (entries.empty()) restarts.push_back(0);
    return with_restarts(block, restarts);
}

std::string snappy(const std::string& block) {
    std::string out(snappy_max_compressed_length(block.size()), '\0');
    size_t size = out.size();
    REQUIRE(snappy_compress(block.data(), block.size(), out.data(), &size) == SNAPPY_OK);
    return out.substr(0, size);
}

// A block with its trailer, whatever its bytes are.
std::string stored(const std::string& block, char kind = 0) {
    const std::string with_kind = block + kind;
    return with_kind + little_endian(mask_crc(crc32c(with_kind.data(), with_kind.size())), 4);
}

std::string handle(size_t offset, size_t size) {
    return varint(offset) + varint(size);
}

std::string footer(const std::string& handles) {
    std::string bytes = handles;
    bytes.resize(40);
    return bytes + little_endian(0xdb4775248b80fb57, 8);
}

// A table that ends with this index block, behind `before`.
std::string close_table(const std::string& before, const std::string& index_block, char kind = 0) {
    const std::string metaindex = stored(block_of({}));
    return before + metaindex + stored(index_block, kind) +
           footer(handle(before.size(), metaindex.size() - 5) +
                  handle(before.size() + metaindex.size(), index_block.size()));
}

// A table of these data blocks, each with the key that stands for it in the index block.
struct Block {
    std::string key, bytes;
    char kind = 0;
};
std::string table_of(const std::vector<Block>& blocks) {
    std::string file;
    Entries index;
    for (const Block& block : blocks) {
        index.push_back({block.key, handle(file.size(), block.bytes.size())});
        file += stored(block.bytes, block.kind);
    }
    return close_table(file, block_of(index, 1));
}

std::string index_of(Entries tensors, const std::string& header = kHeader) {
    tensors.insert(tensors.begin(), {"", header});
    return table_of({{"z", block_of(tensors)}});
}

// A checkpoint of one data file in a folder of its own.
struct Checkpoint {
    TempFolder folder;
    explicit Checkpoint(const std::string& index, const std::string& data = std::string(8, '\1')) {
        write_text(folder / "a.index", index);
        write_text(folder / "a.data-00000-of-00001", data);
    }
    std::string prefix() const { return folder / "a"; }
    std::string error() const {
        return error_of([&] { TfCheckpointReader{prefix()}; });
    }
};

std::string error_of_index(const std::string& index) {
    return Checkpoint(index).error();
}
std::string error_of_entry(const std::string& message) {
    return error_of_index(index_of({{"w", message}}));
}

bool same_tensors(const TfCheckpointReader& a, const TfCheckpointReader& b) {
    const auto same = [](const auto& x, const auto& y) {
        const TfTensor &s = x.second, &t = y.second;
        return x.first == y.first && s.dtype == t.dtype && s.shape == t.shape && s.bytes == t.bytes &&
               s.elements == t.elements && s.crc == t.crc && s.file == t.file &&
               (s.bytes == 0 || memcmp(s.data, t.data, s.bytes) == 0);
    };
    return std::equal(a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(), same);
}

// OpenAI's name of a parameter of Hugging Face's.
std::string openai_name(std::string name) {
    for (const auto& [theirs, ours] :
         std::vector<std::pair<std::string, std::string>>{{"transformer.", "model/"},
                                                          {"wte.weight", "wte"},
                                                          {"wpe.weight", "wpe"},
                                                          {"h.0.", "h0/"},
                                                          {"ln_1.weight", "ln_1/g"},
                                                          {"ln_2.weight", "ln_2/g"},
                                                          {"ln_f.weight", "ln_f/g"},
                                                          {"weight", "w"},
                                                          {"bias", "b"},
                                                          {".", "/"},
                                                          {".", "/"}})
        if (size_t at = name.find(theirs); at != std::string::npos) name.replace(at, theirs.size(), ours);
    return name;
}

}  // namespace

// ---- Checksums ----

TEST_CASE("CRC32C is the one of RFC 3720, at once and in pieces, with and without the instruction") {
    std::string ascending(32, '\0');
    std::iota(ascending.begin(), ascending.end(), '\0');
    const std::pair<std::string, uint32_t> vectors[] = {
        {std::string(32, '\0'), 0x8a9136aa},
        {std::string(32, '\xff'), 0x62a8ab43},
        {ascending, 0x46dd794e},
        {std::string(ascending.rbegin(), ascending.rend()), 0x113fdb5c},
        {"123456789", 0xe3069283},
        {"", 0}};
    for (const auto& [text, crc] : vectors) {
        CHECK(crc32c(text.data(), text.size()) == crc);
        CHECK(crc32c_portable(text.data(), text.size()) == crc);
    }
    std::mt19937 random(1);
    std::string text(300, '\0');
    for (char& c : text) c = static_cast<char>(random());
    for (size_t from = 0; from < 16; from++)
        for (size_t size = 0; size + from <= text.size(); size += 1 + size / 8) {
            const uint32_t whole = crc32c(text.data() + from, size),
                           piece = crc32c(text.data() + from, size / 3);
            if (crc32c_portable(text.data() + from, size) == whole &&
                crc32c(text.data() + from + size / 3, size - size / 3, piece) == whole &&
                crc32c_portable(text.data() + from + size / 3, size - size / 3, piece) == whole)
                continue;
            FAIL("bytes " << from << " to " << from + size);
        }
}

TEST_CASE("a masked checksum is another one, and can be unmasked") {
    CHECK(mask_crc(0) == 0xa282ead8);
    CHECK(mask_crc(0x8000) == 0xa282ead9);
    for (uint32_t crc : {0u, 1u, 0x8a9136aau, UINT32_MAX}) {
        CHECK(mask_crc(crc) != crc);
        CHECK(mask_crc(mask_crc(crc)) != crc);
        CHECK(unmask_crc(mask_crc(crc)) == crc);
    }
}

// ---- What TensorFlow writes ----

TEST_CASE("a model under OpenAI's names has the values of the same model in safetensors") {
    const TfCheckpointReader file(tf_prefix(kFixtures + "/tensorflow/gpt2"));
    CHECK(file.path() == kFixtures + "/tensorflow/gpt2/model.ckpt.index");
    const SafetensorsReader same(kFixtures + "/gpt2");
    REQUIRE(same.tensors().size() == 16);
    CHECK(file.tensors().size() == 16);
    for (const auto& [name, tensor] : same.tensors()) {
        INFO(name);
        std::vector<float> values(tensor.elements);
        same.read_f32(name, tensor.shape, values.data());
        std::vector<int64_t> shape = tensor.shape;
        if (name.find(".c_") != std::string::npos && shape.size() == 2) shape.insert(shape.begin(), 1);
        CHECK(file.at(openai_name(name)).dtype == "F32");
        CHECK(floats(file, openai_name(name), shape) == values);
    }
}

TEST_CASE("what fine-tuning leaves reads too: other types, other tensors, several data files") {
    const TfCheckpointReader file(tf_prefix(kFixtures + "/tensorflow/finetuned"));
    CHECK(file.path() == kFixtures + "/tensorflow/finetuned/model.ckpt-500.index");
    CHECK(file.tensors().size() == 3 * 16 + 5);
    CHECK(file.at("model/wte").file.ends_with(".data-00000-of-00002"));
    CHECK(file.at("model/wte/Adam_1").file.ends_with(".data-00001-of-00002"));

    const TfCheckpointReader exact(kFixtures + "/tensorflow/gpt2/model.ckpt");
    const auto as_bf16 = [](float x) {  // to nearest, ties to even
        const uint32_t bits = std::bit_cast<uint32_t>(x);
        return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
    };
    for (const auto& [name, tensor] : exact.tensors()) {
        INFO(name);
        const bool f16 = name == "model/h0/mlp/c_fc/w", bf16 = name == "model/h0/attn/c_attn/w";
        CHECK(file.at(name).dtype == (f16 ? "F16" : bf16 ? "BF16" : "F32"));
        std::vector<float> expected = floats(exact, name, tensor.shape);
        if (bf16) std::transform(expected.begin(), expected.end(), expected.begin(), as_bf16);
        CHECK(floats(file, name, tensor.shape) == expected);
        for (const char* slot : {"/Adam", "/Adam_1"})
            CHECK(floats(file, name + slot, tensor.shape) == std::vector<float>(tensor.elements, 1.0f));
    }

    CHECK(floats(file, "beta1_power", {}) == std::vector<float>{0.9f});
    CHECK(floats(file, "no_elements", {0, 3}).empty());
    CHECK(file.at("global_step").dtype == "I64");
    int64_t step;
    REQUIRE(file.at("global_step").bytes == 8);
    memcpy(&step, file.at("global_step").data, 8);
    CHECK(step == 500);
    // A text is there, and its size is whatever it is.
    CHECK(file.at("note").dtype == "type 7");
    CHECK(file.at("note").shape == std::vector<int64_t>{2});
    check_mentions(error_of([&] { floats(file, "note", {2}); }),
                   "tensor note holds type 7, but F32, F16 or BF16 is expected");
}

TEST_CASE("an index may take several blocks") {
    TempFolder folder;
    for (const std::string name : {"/model.ckpt.index", "/model.ckpt.data-00000-of-00001"})
        REQUIRE(std::system(("gunzip -c '" + kFixtures + "/tensorflow/many" + name + ".gz' > '" +
                             folder.path + name + "'")
                                .c_str()) == 0);
    const TfCheckpointReader file(tf_prefix(folder.path));
    CHECK(read_text(file.path()).size() > 262'144);  // TensorFlow's size of a block
    REQUIRE(file.tensors().size() == 2500);
    for (int i = 0; i < 2500; i++) {
        const std::string name =
            format("scope_%04d/a_module_whose_name_is_long/and_another_one_inside_of_it/", i) +
            "and_yet_another_one/the_variable";
        REQUIRE(floats(file, name, {2}) ==
                std::vector<float>{static_cast<float>(i), static_cast<float>(i) / 8});
    }
}

// ---- What others may write ----

TEST_CASE("blocks may be compressed, keys shortened, restart points anywhere, unknown fields present") {
    std::string data(4 * 200, '\0');
    Entries tensors;
    for (int i = 0; i < 200; i++) {
        const float value = 0.5f * static_cast<float>(i);
        memcpy(data.data() + 4 * i, &value, 4);
        const std::string unknown = number(15, UINT64_MAX) + bytes(1000, "text") + four_bytes(16, 1) +
                                    varint(17 << 3 | 1) + std::string(8, '\xff');
        const Spec spec = {.shape = {1, 1}, .offset = 4 * static_cast<uint64_t>(i), .crc = crc32c(&value, 4)};
        tensors.push_back({format("layer_%03d/weight", i), unknown + entry_message(spec) + unknown});
    }
    tensors.insert(tensors.begin(), {"", kHeader});
    for (size_t restart_every : {1, 2, 16, 1000})
        for (size_t per_block : {1, 7, 201}) {
            std::vector<Block> raw, compressed;
            for (size_t i = 0; i < tensors.size(); i += per_block) {
                const size_t end = std::min(i + per_block, tensors.size());
                const std::string block = block_of({tensors.begin() + static_cast<ptrdiff_t>(i),
                                                    tensors.begin() + static_cast<ptrdiff_t>(end)},
                                                   restart_every);
                const std::string key = tensors[end - 1].first + "!";
                raw.push_back({key, block});
                compressed.push_back({key, snappy(block), 1});
            }
            for (const auto& blocks : {raw, compressed}) {
                const Checkpoint checkpoint(table_of(blocks), data);
                const TfCheckpointReader file(checkpoint.prefix());
                REQUIRE(file.tensors().size() == 200);
                CHECK(floats(file, "layer_131/weight", {1, 1}) == std::vector<float>{65.5f});
            }
        }
    CHECK(table_of({{"z", snappy(block_of(tensors)), 1}}).size() <
          table_of({{"z", block_of(tensors)}}).size() / 2);
}

TEST_CASE("the index block may be compressed too") {
    const std::string block = block_of({{"", kHeader}, {"w", entry_message({})}});
    const std::string index = snappy(block_of({{"z", handle(0, block.size())}}, 1));
    CHECK(error_of_index(close_table(stored(block), index, 1)) == "");
}

TEST_CASE("tensors without elements, scalars and gaps between tensors are fine") {
    const Checkpoint checkpoint(
        index_of({{"a", entry_message({.shape = {0}, .offset = 8, .size = 0})},
                  {"b", entry_message({.shape = {5, 0, 3}, .offset = 2, .size = 0})},
                  {"c", entry_message({.shape = {}, .offset = 4, .crc = crc32c("\1\1\1\1", 4)})},
                  {"d", number(1, 1) + number(5, 4)}}));  // what is zero is left out: a scalar at byte 0
    const TfCheckpointReader file(checkpoint.prefix());
    CHECK(floats(file, "a", {0}).empty());
    CHECK(floats(file, "b", {5, 0, 3}).empty());
    CHECK(floats(file, "c", {}) == std::vector<float>{std::bit_cast<float>(0x01010101)});
    CHECK(file.at("d").shape.empty());
    CHECK(file.at("d").elements == 1);
}

TEST_CASE("types are named as in safetensors, where those have them") {
    const std::pair<uint64_t, const char*> types[] = {
        {1, "F32"},  {2, "F64"},    {3, "I32"},    {4, "U8"},        {5, "I16"},  {6, "I8"},
        {9, "I64"},  {10, "BOOL"},  {14, "BF16"},  {17, "U16"},      {19, "F16"}, {22, "U32"},
        {23, "U64"}, {0, "type 0"}, {8, "type 8"}, {101, "type 101"}};
    for (const auto& [type, name] : types) {
        const size_t size = std::max<size_t>(safetensors_dtype_size(name), 1);
        const Checkpoint checkpoint(index_of({{"w", entry_message({.type = type, .size = size})}}));
        CHECK(TfCheckpointReader(checkpoint.prefix()).at("w").dtype == name);
        const std::string message = error_of_entry(entry_message({.type = type, .size = size + 1}));
        if (safetensors_dtype_size(name))
            check_mentions(message,
                           std::string("tensor w of type ") + name + " and shape [1] does not fit its");
        else
            CHECK(message == "");  // its size cannot be known
    }
}

// ---- Reading a tensor ----

TEST_CASE("a tensor is asked for by name and shape") {
    const TfCheckpointReader file(kFixtures + "/tensorflow/gpt2/model.ckpt");
    CHECK(file.contains("model/wte"));
    CHECK(!file.contains("model/wte/Adam"));
    check_mentions(error_of([&] { file.at("wte"); }), "gpt2/model.ckpt.index has no tensor wte");
    check_mentions(error_of([&] {
                       floats(file, "model/wte", {8, 5});
                   }),
                   "model.ckpt.index: tensor model/wte has shape [5, 8], but [8, 5] is expected");
    CHECK(error_of([&] { floats(file, "model/wte", {40}); }) != "");
    const TfCheckpointReader other(kFixtures + "/tensorflow/finetuned/model.ckpt-500");
    check_mentions(error_of([&] { floats(other, "global_step", {}); }), "tensor global_step holds I64");
}

TEST_CASE("every bit of a data file is under a checksum") {
    const TfCheckpointReader good(kFixtures + "/tensorflow/gpt2/model.ckpt");
    const std::string index = read_text(good.path()), data = read_text(good.at("model/wte").file);
    for (size_t i = 0; i < data.size(); i += 7) {
        std::string damaged = data;
        damaged[i] = static_cast<char>(damaged[i] ^ 1 << i % 8);
        const Checkpoint checkpoint(index, damaged);
        const TfCheckpointReader file(checkpoint.prefix());
        int refused = 0;
        for (const auto& [name, tensor] : file.tensors()) {
            const std::string message = error_of([&] { floats(file, name, tensor.shape); });
            if (message.empty()) continue;
            refused++;
            check_mentions(message, "a.data-00000-of-00001 is damaged: the checksum of tensor " + name);
        }
        CHECK(refused == 1);
    }
}

TEST_CASE(
    "as a model: an optimizer's tensors are passed over, those of a layer that it should not have are not") {
    const std::string from = kFixtures + "/tensorflow/gpt2";
    const TfCheckpointReader good(from + "/model.ckpt");
    const std::string data = read_text(good.at("model/wte").file);
    const unsigned char* base = good.at("model/wte").data;
    for (const auto& [name, t] : good.tensors()) base = std::min(base, t.data);
    const auto error_with = [&](const std::string& another) {
        Entries tensors = {{another, entry_message({.offset = data.size()})}};
        for (const auto& [name, t] : good.tensors())
            tensors.push_back({name, entry_message({.shape = t.shape,
                                                    .offset = static_cast<uint64_t>(t.data - base),
                                                    .size = t.bytes,
                                                    .crc = t.crc})});
        std::sort(tensors.begin(), tensors.end());
        const Checkpoint checkpoint(index_of(tensors), data + "1234");
        std::filesystem::copy_file(from + "/hparams.json", checkpoint.folder / "hparams.json");
        return error_of([&] { config_for_weights(find_weights_of_file(checkpoint.prefix() + ".index")); });
    };
    CHECK(error_with("model/h0/ln_1/g/Adam_1") == "");
    CHECK(error_with("global_step") == "");
    check_mentions(error_with("model/h1/ln_1/g"),
                   "has a tensor model/h1/ln_1/g that a GPT-2 with 1 layers does not have");
}

// ---- Which checkpoint a folder holds ----

TEST_CASE("the list of checkpoints names the latest one") {
    TempFolder folder;
    const auto prefix_of = [&](const std::string& text) {
        write_text(folder / "checkpoint", text);
        return tf_prefix(folder.path);
    };
    const auto error_of_list = [&](const std::string& text) {
        const std::string message = error_of([&] { prefix_of(text); });
        check_mentions(message, folder / "checkpoint ");
        CHECK(message.find_first_of("\n\r\x1b") == std::string::npos);
        return message;
    };
    CHECK(prefix_of("model_checkpoint_path: \"model.ckpt\"\n") == folder / "model.ckpt");
    CHECK(prefix_of("model_checkpoint_path: \"model.ckpt\"") == folder / "model.ckpt");
    CHECK(prefix_of("all_model_checkpoint_paths: \"a\"\nmodel_checkpoint_path: \"b\"\r\n") == folder / "b");
    CHECK(prefix_of("model_checkpoint_path:\"/home/me/run 1/model-7\"\n") == folder / "model-7");
    CHECK(prefix_of("model_checkpoint_path: \"../../" + std::string(200, 'x') + "\"\n") ==
          folder / std::string(200, 'x'));

    for (const char* text :
         {"", "\n", "model_checkpoint_path", "all_model_checkpoint_paths: \"a\"\n", "\xff\xfe"})
        check_mentions(error_of_list(text), "does not name the latest checkpoint");
    for (const char* text : {"", "\"", "\"\"", "\"model.ckpt", "model.ckpt", "'model.ckpt'",
                             "\"model.ckpt/\"", "\".\"", "\"a/..\"", "\"caf\\303\\251\"", "\"caf\xc3\xa9\"",
                             "\"a\\\"b\"", "\"C:\\\\a\"", "\"a\x1b[2J\"", "\n\"a\""})
        check_mentions(error_of_list(std::string("model_checkpoint_path: ") + text),
                       "names no checkpoint that can be read");
    check_mentions(error_of_list(std::string(2 << 20, ' ')), "too large");

    prefix_of("model_checkpoint_path: \"gone\"\n");
    check_mentions(error_of([&] { TfCheckpointReader(tf_prefix(folder.path)); }),
                   "cannot open " + (folder / "gone.index") + ": No such file");
}

TEST_CASE("without a list it is the only one") {
    TempFolder folder;
    const auto message = [&] { return error_of([&] { tf_prefix(folder.path); }); };
    check_mentions(message(), "holds no TensorFlow checkpoint");
    write_text(folder / "book.index", "apple 1, banana 2");
    write_text(folder / "empty.index", "");
    std::filesystem::create_directory(folder / "folder.index");
    check_mentions(message(), "holds no TensorFlow checkpoint");
    write_text(folder / "one.index", index_of({}));
    CHECK(tf_prefix(folder.path) == folder / "one");
    write_text(folder / "a\x1b[2J.index", index_of({}));
    check_mentions(message(), "holds several TensorFlow checkpoints (a?[2J.index, one.index, ...)");
    check_mentions(error_of([&] { tf_prefix(folder / "none"); }), "cannot list");
}

// ---- Damage ----

TEST_CASE("an index is known by its end") {
    const std::string index = read_text(kFixtures + "/tensorflow/gpt2/model.ckpt.index");
    const auto is_index = [](const std::string& bytes) {
        return is_tf_index(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
    };
    CHECK(is_index(index));
    CHECK(!is_index(index + "x"));
    CHECK(!is_index(index.substr(index.size() - 47)));
    CHECK(is_index(index.substr(index.size() - 48)));
    CHECK(!is_tf_index(nullptr, 0));
    check_mentions(error_of_index(""), "a.index is no TensorFlow checkpoint's index, or cut off");
    check_mentions(error_of_index(index + "x"), "a.index is no TensorFlow checkpoint's index, or cut off");
}

TEST_CASE("an index cut off anywhere is an Error, and so is a data file") {
    const std::string from = kFixtures + "/tensorflow/finetuned/model.ckpt-500";
    const std::string ends[] = {".index", ".data-00000-of-00002", ".data-00001-of-00002"};
    TempFolder folder;
    for (const std::string& end : ends) write_text(folder / "a" + end, read_text(from + end));
    const auto message = [&] { return error_of([&] { TfCheckpointReader{folder / "a"}; }); };
    REQUIRE(message() == "");
    for (const std::string& end : ends) {
        const std::string whole = read_text(from + end);
        for (size_t size = 0; size < whole.size(); size += end == ".index" ? 1 : 13) {
            INFO(end << " cut to " << size);
            write_text(folder / "a" + end, whole.substr(0, size));
            check_mentions(message(), "cut off");
        }
        std::filesystem::remove(folder / "a" + end);
        check_mentions(message(), "cannot open " + (folder / "a") + end + ": No such file");
        REQUIRE(mkfifo((folder / "a" + end).c_str(), 0600) == 0);
        check_mentions(message(), end + " is not a file");
        std::filesystem::remove(folder / "a" + end);
        write_text(folder / "a" + end, whole);
    }
}

TEST_CASE("a flipped bit of an index is an Error, or changes nothing") {
    for (const std::string name : {"gpt2/model.ckpt", "finetuned/model.ckpt-500"}) {
        const std::string from = kFixtures + "/tensorflow/" + name;
        TempFolder folder;
        for (const auto& item : std::filesystem::directory_iterator(folder_of(from))) {
            const std::string file = item.path().filename();
            if (const size_t at = file.find(".data-"); at != std::string::npos)
                write_text(folder / "a" + file.substr(at), read_text(item.path()));
        }
        const std::string index = read_text(from + ".index");
        write_text(folder / "a.index", index);
        const TfCheckpointReader good(folder / "a");
        size_t harmless = 0;
        for (size_t bit = 0; bit < 8 * index.size(); bit++) {
            std::string flipped = index;
            flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ 1 << bit % 8);
            write_text(folder / "a.index", flipped);
            const std::string message = error_of([&] {
                const TfCheckpointReader file(folder / "a");
                harmless++;
                if (!same_tensors(file, good)) FAIL("bit " << bit << " makes a difference");
            });
            if (!message.empty() && message.find("a.index") == std::string::npos) FAIL(message);
        }
        // In the metaindex block of 13 bytes, its handle, and the zeros in the footer.
        CHECK(harmless > 0);
        CHECK(harmless < 8 * (13 + 40));
    }
}

TEST_CASE("a table that is not valid is an Error that says so") {
    const std::string ok = entry_message({}), header = block_entry(0, "", kHeader),
                      w = block_entry(0, "w", ok);
    const std::string two = header + w;
    const auto at_w = static_cast<uint32_t>(header.size());
    const auto block = [](const std::string& bytes) { return table_of({{"z", bytes}}); };
    const std::string good = block_of({{"", kHeader}, {"w", ok}});
    const auto with_handles = [&](const std::string& handles) { return stored(good) + footer(handles); };
    const auto with_index = [&](const std::string& index_block) {
        return close_table(stored(good), index_block);
    };
    const std::string not_varint(10, '\xff'), entry = "a block holds an entry that is not valid",
                                              restart = "restart points";
    REQUIRE(error_of_index(block(good)) == "");
    REQUIRE(error_of_index(block(with_restarts(two, {0, at_w}))) == "");
    struct Case {
        std::string what, index, says;
    };
    const Case cases[] = {
        {"handles that end too late", with_handles(std::string(40, '\xff')), "where its index block lies"},
        {"no second handle", with_handles(handle(0, 0) + not_varint), "where its index block lies"},
        {"index block behind the end", with_handles(handle(0, 0) + handle(good.size() + 5, 10)),
         "outside the file"},
        {"index block at the far end", with_handles(handle(0, 0) + handle(UINT64_MAX, 10)),
         "outside the file"},
        {"index block of any size", with_handles(handle(0, 0) + handle(0, UINT64_MAX)), "outside the file"},
        {"no room for the trailer", with_handles(handle(0, 0) + handle(0, good.size() + 1)),
         "outside the file"},
        {"a handle off by one", with_handles(handle(0, 0) + handle(0, good.size() - 1)),
         "checksum of the block"},
        {"unknown compression", table_of({{"z", good, 2}}), "compressed in a way that is not known (2)"},
        {"compressed with nothing", table_of({{"z", "", 1}}), "not valid Snappy data"},
        {"not compressed at all", table_of({{"z", good, 1}}), "not valid Snappy data"},
        {"a size somewhat false", table_of({{"z", varint(good.size() + 1) + snappy(good).substr(1), 1}}),
         "not valid Snappy data"},
        {"compressed and cut", table_of({{"z", snappy(good).substr(0, 20), 1}}), "not valid Snappy data"},
        {"an empty block", block(""), restart},
        {"three bytes", block("abc"), restart},
        {"only the number of restart points", block(little_endian(1, 4)), restart},
        {"no restart points", block(with_restarts(two, {})), restart},
        {"too many restart points", block(two + little_endian(1000, 4)), restart},
        {"any number of restart points", block(two + little_endian(0xffffffff, 4)), restart},
        {"a restart point inside an entry", block(with_restarts(two, {0, at_w + 1})), restart},
        {"a restart point behind the end", block(with_restarts(two, {0, 0xffffffff})), restart},
        {"a restart point twice", block(with_restarts(two, {0, 0})), restart},
        {"restart points out of order", block(with_restarts(two, {at_w, 0})), restart},
        {"no restart point at the start", block(with_restarts(two, {at_w})), restart},
        {"a restart point in an empty block", block(with_restarts("", {1})), restart},
        {"a shortened key at a restart point",
         block(with_restarts(header + w + block_entry(1, "x", ok), {0, static_cast<uint32_t>(two.size())})),
         entry},
        {"a key longer than the one before", block(with_restarts(header + block_entry(1, "w", ok), {0})),
         entry},
        {"any shared length",
         block(with_restarts(header + varint(UINT64_MAX) + varint(1) + varint(1) + "wx", {0})), entry},
        {"any length of a key",
         block(with_restarts(header + varint(0) + varint(UINT64_MAX) + varint(1) + "w", {0})), entry},
        {"any length of a value",
         block(with_restarts(header + varint(0) + varint(1) + varint(UINT64_MAX) + "w", {0})), entry},
        {"a varint of 11 bytes", block(with_restarts(header + not_varint + w, {0})), entry},
        {"a varint without end", block(with_restarts(header + "\xff", {0})), entry},
        {"a value cut off", block(with_restarts(two.substr(0, two.size() - 1), {0})), entry},
        {"a name twice", index_of({{"w", ok}, {"w", ok}}), "tensor w is not in its place"},
        {"names out of order", index_of({{"w", ok}, {"v", ok}}), "tensor v is not in its place"},
        {"names out of order, by unsigned bytes", index_of({{"\xc3", ok}, {"a", ok}}),
         "tensor a is not in its place"},
        {"names out of order in two blocks",
         table_of({{"w", good}, {"z", block_of({{"v", entry_message({.offset = 4})}})}}),
         "tensor v is not in"},
        {"a header that is not the first", table_of({{"z", block_of({{"v", kHeader}, {"w", ok}})}}),
         "no valid header"},
        {"a header twice", index_of({{"", kHeader}}), "is not in its place"},
        {"a long name", index_of({{std::string(1001, 'x'), ok}}), "longer than 1000 bytes"},
        {"no block", table_of({}), "has no entries"},
        {"a block of no entries", table_of({{"z", block_of({})}}), "has no entries"},
        {"a block twice",
         with_index(block_of({{"w", handle(0, good.size())}, {"z", handle(0, good.size())}}, 1)),
         "blocks are not in order"},
        {"blocks that overlap", with_index(block_of({{"w", handle(0, good.size())}, {"z", handle(1, 1)}}, 1)),
         "blocks are not in order"},
        {"a block outside", with_index(block_of({{"w", handle(1000000, 5)}}, 1)), "lies outside the file"},
        {"half a handle", with_index(block_of({{"w", varint(0)}}, 1)), "where a block lies"},
        {"more than a handle", with_index(block_of({{"w", handle(0, good.size()) + "x"}}, 1)),
         "where a block lies"},
        {"index keys out of order",
         with_index(block_of({{"x", handle(0, good.size())}, {"w", handle(good.size() + 5, 8)}}, 1)),
         "tensor w is not in its place"},
        {"an index key before the block's last", table_of({{"v", good}}), "names another key"},
    };
    for (const Case& c : cases) {
        INFO(c.what);
        const std::string message = error_of_index(c.index);
        check_mentions(message, "a.index");
        check_mentions(message, c.says);
        CHECK(message.find('\n') == std::string::npos);
    }
}

TEST_CASE("a header that is not valid, or asks for what is not supported, is an Error that says so") {
    REQUIRE(error_of_index(index_of({})) == "");
    REQUIRE(error_of_index(index_of({}, number(1, 1))) == "");
    const std::pair<std::string, const char*> cases[] = {
        {"", "there are 0 data files"},
        {number(1, 0), "there are 0 data files"},
        {number(1, 100'000), "there are 100000 data files"},
        {number(1, UINT64_MAX), "there are 18446744073709551615 data files"},
        {number(1, 2), "a.data-00000-of-00002: No such file"},
        {number(1, 99'999), "a.data-00000-of-99999: No such file"},
        {number(1, 1) + number(2, 1), "is of a big-endian machine"},
        {number(1, 1) + number(2, 2), "is of a big-endian machine"},
        {number(1, 1) + bytes(3, number(2, 2)), "asks for version 2 of the format, and 1 is known here"},
        {number(1, 1) + bytes(3, "\xff"), "no valid header"},
        {number(1, 1) + number(3, 1), "no valid header"},
        {number(1, 1) + number(1, 1), "no valid header"},
        {bytes(1, "1"), "no valid header"},
        {"\xff", "no valid header"},
        {number(1, 1) + varint(9 << 3 | 3) + varint(9 << 3 | 4), "no valid header"},  // a group
    };
    for (const auto& [header, says] : cases) {
        INFO(says);
        const std::string message = error_of_index(index_of({}, header));
        check_mentions(message, "a.");
        check_mentions(message, says);
        CHECK(message.find('\n') == std::string::npos);
    }
}

TEST_CASE(
    "an entry that is not valid, or asks for what is not supported, is an Error that names the tensor") {
    const std::string ok = entry_message({}), invalid = "is damaged: the entry of tensor w is not valid";
    const std::string rest = number(5, 4) + four_bytes(6, 0);
    const auto with_shape = [&](const std::string& shape) { return number(1, 1) + bytes(2, shape) + rest; };
    REQUIRE(error_of_entry(ok) == "");
    REQUIRE(error_of_entry(with_shape("")) == "");
    std::string rank_32, rank_33;
    for (int i = 0; i < 32; i++) rank_32 += bytes(2, number(1, 1));
    rank_33 = rank_32 + bytes(2, number(1, 1));
    REQUIRE(error_of_entry(with_shape(rank_32)) == "");
    const int64_t large = int64_t{1} << 62;
    const std::pair<std::string, std::string> cases[] = {
        {"\xff", invalid},
        {std::string(11, '\xff'), invalid},
        {ok + std::string(2, '\0'), invalid},                            // field 0
        {ok + varint(9 << 3) + std::string(9, '\xff') + '\2', invalid},  // a number beyond 64 bits
        {ok + varint(uint64_t{1} << 35) + varint(0), invalid},           // a field beyond 32 bits
        {ok + varint(9 << 3), invalid},                                  // nothing behind the tag
        {ok + varint(9 << 3 | 1) + "1234567", invalid},                  // eight bytes
        {ok + varint(9 << 3 | 5) + "123", invalid},                      // four bytes
        {ok + varint(9 << 3 | 2) + varint(2) + "1", invalid},            // any bytes
        {ok + varint(9 << 3 | 2) + varint(UINT64_MAX) + "1", invalid},   // very many
        {ok + varint(9 << 3 | 3), invalid},                              // a group
        {ok + varint(9 << 3 | 4), invalid},                              // its end
        {ok + varint(9 << 3 | 6), invalid},                              // no kind at all
        {ok + varint(9 << 3 | 7), invalid},
        {bytes(1, "1") + rest, invalid},  // known fields of another kind
        {number(1, 1) + number(2, 1) + rest, invalid},
        {ok + bytes(4, "1"), invalid},
        {number(1, 1) + number(6, 1), invalid},
        {ok + number(7, 1), invalid},
        {ok + number(1, 1), invalid},  // twice
        {ok + bytes(2, ""), invalid},
        {ok + four_bytes(6, 0), invalid},
        {with_shape("\xff"), invalid},
        {with_shape(number(2, 1)), invalid},
        {with_shape(bytes(2, "\xff")), invalid},
        {with_shape(bytes(2, bytes(1, "1"))), invalid},
        {with_shape(bytes(2, number(1, 1) + number(1, 1))), invalid},
        {with_shape(rank_33), invalid},
        {with_shape(number(3, 1)), "tensor w has no definite shape"},
        {ok + bytes(7, ""), "tensor w is stored in slices, which is not supported"},
        {number(1, 1) + bytes(7, "a") + bytes(7, "b"), "tensor w is stored in slices"},
        {entry_message({.shape = {-1}}), "tensor w has an impossible shape, [-1]"},
        {entry_message({.shape = {INT64_MIN}}), "tensor w has an impossible shape"},
        {entry_message({.shape = {large, 4}}), "tensor w has an impossible shape"},
        {entry_message({.type = 7, .shape = {large, 4}}), "tensor w has an impossible shape"},
        {entry_message({.shape = {large, 1}, .size = 0}),
         "shape [4611686018427387904, 1] does not fit its 0 bytes"},
        {entry_message({.shape = {2}}), "of type F32 and shape [2] does not fit its 4 bytes"},
        {entry_message({.type = 19}), "of type F16 and shape [1] does not fit its 4 bytes"},
        {entry_message({.size = UINT64_MAX}), "does not fit its 18446744073709551615 bytes"},
        {entry_message({.shard = 1}), "tensor w lies in data file 1, but there are 1 of them"},
        {entry_message({.shard = UINT64_MAX}), "tensor w lies in data file 18446744073709551615"},
        {entry_message({.offset = 5}), "tensor w lies at byte 5 and has 4 bytes, but "},
        {entry_message({.offset = UINT64_MAX - 3}),
         "tensor w lies at byte 18446744073709551612 and has 4 bytes"},
        {entry_message({.shape = {0}, .offset = 9, .size = 0}), "tensor w lies at byte 9 and has 0 bytes"},
        {entry_message({.type = 7, .size = 9}), "a.data-00000-of-00001 has only 8 (is it cut off?)"},
        {entry_message({.type = 7, .size = UINT64_MAX}),
         "tensor w lies at byte 0 and has 18446744073709551615 bytes"},
    };
    for (size_t i = 0; i < std::size(cases); i++) {
        const auto& [entry, says] = cases[i];
        INFO("case " << i);
        const std::string message = error_of_entry(entry);
        check_mentions(message, "a.index");
        check_mentions(message, says);
        CHECK(message.find('\n') == std::string::npos);
    }
}

TEST_CASE("no byte belongs to two tensors") {
    const auto overlap = [](Spec a, Spec b, Spec c) {
        return error_of_index(
            index_of({{"a", entry_message(a)}, {"b", entry_message(b)}, {"c", entry_message(c)}}));
    };
    const Spec text = {.type = 7, .shape = {}, .offset = 0, .size = 8};
    CHECK(overlap({.offset = 4}, {.offset = 0}, {.shape = {0}, .offset = 2, .size = 0}) == "");
    check_mentions(overlap({.offset = 0}, {.offset = 4}, {.offset = 4}),
                   "a.index: tensor c overlaps tensor b");
    check_mentions(overlap({.offset = 3}, {.offset = 0}, {.shape = {0}, .size = 0}),
                   "tensor a overlaps tensor b");
    check_mentions(overlap({.offset = 0}, {.offset = 4}, text), "overlaps");
    check_mentions(overlap({.type = 6, .offset = 3, .size = 1}, {.type = 6, .offset = 5, .size = 1}, text),
                   "overlaps");

    // In two files they do not.
    TempFolder folder;
    write_text(folder / "a.index",
               index_of({{"a", entry_message({})}, {"b", entry_message({.shard = 1})}}, number(1, 2)));
    for (const char* end : {".data-00000-of-00002", ".data-00001-of-00002"})
        write_text(folder / "a" + end, "1234");
    CHECK(TfCheckpointReader(folder / "a").tensors().size() == 2);
}

TEST_CASE("a name from a file cannot garble the message") {
    const std::string name = "\x1b[2J\n" + std::string(900, 'x');
    const std::string message = error_of_index(index_of({{name, "\xff"}}));
    check_mentions(message, "the entry of tensor ?[2J?xxx");
    CHECK(message.find('\x1b') == std::string::npos);
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 300);
}

TEST_CASE("a small file cannot take much memory") {
    const auto peak = [] {  // kB
        rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        return usage.ru_maxrss;
    };
    const long before = peak();
    // The size that compressed data claims to have.
    const std::string lie = varint(0xffffffff) + snappy(block_of({{"", kHeader}}));
    check_mentions(error_of_index(table_of({{"z", lie, 1}})), "not valid Snappy data");
    CHECK(peak() - before < 100'000);

    // Names that share all but four of their 1000 bytes, in one block that compresses well.
    std::string entries = block_entry(0, "", kHeader) + block_entry(0, std::string(996, 'a'), "");
    for (uint32_t i = 0; i < 300'000; i++)
        entries += block_entry(996, little_endian(__builtin_bswap32(i), 4), "");
    const std::string block = with_restarts(entries, {0});
    check_mentions(error_of_index(table_of({{"z", snappy(block), 1}})), "more than 200000 tensors");
    CHECK(peak() - before < 1'000'000);
}
