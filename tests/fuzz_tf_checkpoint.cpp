// Fuzzes TensorFlow's checkpoints. Tensors that are read must not share bytes.
//
// Fuzzed: the index as bytes, as a block of entries, as entries, and as the fields of an entry, each with the
// checksums made right in what is written, or without; with its block compressed or not; the data files; and
// the list of checkpoints.
#include <snappy-c.h>

#include <algorithm>
#include <map>

#include "../llmc/crc32c.h"
#include "../llmc/tf_checkpoint.h"
#include "../llmc/tf_format.h"
#include "fuzz.h"

namespace {

using Entries = std::vector<std::pair<std::string, std::string>>;

// Numbers at the edges of what is allowed.
uint64_t some_number(Random& random) {
    const uint64_t choices[] = {0,
                                1,
                                UINT64_MAX,
                                INT64_MAX,
                                below(random, 30),
                                below(random, 10'000),
                                uint64_t{1} << below(random, 64),
                                random() >> below(random, 64)};
    return choices[below(random, std::size(choices))];
}

// ---- Writing tables ----

std::string varint(uint64_t value) {
    std::string bytes;
    for (; value > 127; value >>= 7) bytes += static_cast<char>(value | 128);
    return bytes + static_cast<char>(value);
}

std::string four_bytes(size_t value) {
    const auto number = static_cast<uint32_t>(value);
    return {reinterpret_cast<const char*>(&number), 4};
}

std::string stored(const std::string& block, char kind) {
    const std::string with_kind = block + kind;
    return with_kind + four_bytes(mask_crc(crc32c(with_kind.data(), with_kind.size())));
}

std::string compressed(const std::string& block) {
    std::string out(snappy_max_compressed_length(block.size()), '\0');
    size_t size = out.size();
    snappy_compress(block.data(), block.size(), out.data(), &size);
    return out.substr(0, size);
}

std::string block_of(const Entries& entries, size_t restart_every) {
    std::string block, restarts, before;
    for (size_t i = 0; i < entries.size(); i++) {
        const auto& [key, value] = entries[i];
        size_t shared = 0;
        if (i % restart_every == 0)
            restarts += four_bytes(block.size());
        else
            while (shared < std::min(before.size(), key.size()) && before[shared] == key[shared]) shared++;
        block +=
            varint(shared) + varint(key.size() - shared) + varint(value.size()) + key.substr(shared) + value;
        before = key;
    }
    if (entries.empty()) restarts = four_bytes(0);
    return block + restarts + four_bytes(restarts.size() / 4);
}

// ---- Mutations ----

void mutate_bytes(std::string& bytes, Random& random) {
    const size_t at = below(random, bytes.size());
    switch (random() % 7) {
        case 0:
            replace_byte(bytes, at, random);
            break;
        case 1:
            flip_bit(bytes, at, random);
            break;
        case 2:
            bytes.resize(at);
            break;
        case 3:
            bytes.erase(at, below(random, 20));
            break;
        case 4:
            bytes.insert(at, bytes.substr(below(random, bytes.size()), below(random, 100)));
            break;
        case 5:
            bytes.insert(at, varint(some_number(random)));
            break;
        default:
            if (bytes.size() - at >= 4) bytes.replace(at, 4, four_bytes(some_number(random)));
    }
}

// Another number in one of the message's fields, or of the messages in it, or one field more or less.
std::string mutate_fields(std::string_view message, Random& random) {
    std::vector<std::string> fields;
    std::vector<tf_format::Field> parsed;
    while (!message.empty()) {
        const std::string_view before = message;
        tf_format::Field field;
        if (!tf_format::take_field(message, field)) return std::string(before);
        parsed.push_back(field);
        fields.emplace_back(before.substr(0, before.size() - message.size()));
    }
    const size_t which = below(random, fields.size());
    switch (fields.empty() ? 0 : random() % 8) {
        case 0:
            fields.push_back(varint((1 + below(random, 9)) << 3 |
                                    (random() % 2 ? tf_format::kBytes : tf_format::kVarint)) +
                             varint(random() % 2 ? 0 : some_number(random)));
            break;
        case 1:
            fields.erase(fields.begin() + static_cast<ptrdiff_t>(which));
            break;
        case 2:
            fields.push_back(fields[which]);
            break;
        default: {
            const tf_format::Field& f = parsed[which];
            fields[which] = varint(f.number << 3 | f.kind);
            if (f.kind == tf_format::kVarint) fields[which] += varint(some_number(random));
            if (f.kind == tf_format::kFourBytes) fields[which] += four_bytes(some_number(random));
            if (f.kind == tf_format::kBytes) {
                const std::string inner = mutate_fields(f.bytes, random);
                fields[which] += varint(inner.size()) + inner;
            }
        }
    }
    std::string result;
    for (const std::string& field : fields) result += field;
    return result;
}

void mutate_entries(Entries& entries, Random& random) {
    const size_t which = below(random, entries.size());
    if (entries.empty()) return;
    auto& [key, value] = entries[which];
    switch (random() % 10) {
        case 0:
            mutate_bytes(key, random);
            if (random() % 8 == 0) key += std::string(below(random, 2000), 'x');
            break;
        case 1:
            mutate_bytes(value, random);
            break;
        case 2:
            value = entries[below(random, entries.size())].second;
            break;
        case 3:
            entries.erase(entries.begin() + static_cast<ptrdiff_t>(which));
            break;
        case 4:
            entries.push_back({key + static_cast<char>(random()), value});
            break;
        default:
            value = mutate_fields(value, random);
    }
    if (random() % 4) std::sort(entries.begin(), entries.end());
}

// An index in its parts, so that a change to one leaves the others right.
struct Index {
    std::string bytes;
    Entries entries;

    explicit Index(const std::string& path) : bytes(read_text(path)) {
        const MappedFile file(path);
        std::string_view handles(bytes.data() + bytes.size() - tf_format::kFooter, 40);
        tf_format::Handle handle;
        std::string scratch, other_scratch, key, index_key;
        tf_format::take_handle(handles, handle);
        tf_format::take_handle(handles, handle);
        tf_format::for_each_entry(path, tf_format::read_block(file, handle, scratch), index_key, true,
                                  [&](const std::string&, std::string_view value) {
                                      tf_format::take_handle(value, handle);
                                      tf_format::for_each_entry(
                                          path, tf_format::read_block(file, handle, other_scratch), key,
                                          entries.empty(),
                                          [&](const std::string& name, std::string_view entry) {
                                              entries.emplace_back(name, entry);
                                          });
                                  });
    }

    std::string mutated(Random& random) const {
        if (random() % 8 == 0) {  // as bytes, which the checksums guard
            std::string changed = bytes;
            for (size_t n = 1 + below(random, 3); n > 0; n--) mutate_bytes(changed, random);
            return changed;
        }
        // One to three changes to the parts, some of them to each when it has been written.
        Entries changed = entries;
        const size_t target = random() % 9;
        const auto change = [&](size_t part, std::string& part_bytes) {
            if (target == part)
                for (size_t n = 1 + below(random, 3); n > 0; n--) mutate_bytes(part_bytes, random);
        };
        if (target >= 5)
            for (size_t n = 1 + below(random, 3); n > 0; n--) mutate_entries(changed, random);
        const size_t cut = random() % 2 ? changed.size() : below(random, changed.size() + 1);
        std::string file;
        Entries handles;
        for (size_t part = 0; part < 2; part++) {  // in one block or in two
            const auto middle = changed.begin() + static_cast<ptrdiff_t>(cut);
            const Entries own(part ? middle : changed.begin(), part ? changed.end() : middle);
            if (own.empty()) continue;
            std::string block = block_of(own, 1 + below(random, 20));
            change(0, block);
            const char kind = random() % 20 ? random() % 2 : 2;
            if (kind == 1) block = compressed(block);
            change(1, block);
            handles.push_back({own.back().first, varint(file.size()) + varint(block.size())});
            file += stored(block, kind);
        }
        if (target == 2) mutate_entries(handles, random);
        std::string index_block = block_of(handles, 1 + below(random, 2));
        change(3, index_block);
        const size_t index_at = file.size();
        file += stored(index_block, 0);
        std::string footer = varint(0) + varint(8) + varint(index_at) + varint(index_block.size());
        change(4, footer);
        footer.resize(40);
        file += footer + std::string(reinterpret_cast<const char*>(&tf_format::kMagic), 8);
        // Without right checksums, too.
        if (random() % 4 == 0) file[below(random, file.size())] ^= static_cast<char>(1 << random() % 8);
        return file;
    }
};

// Pieces that the list of checkpoints is made of.
const char* const kPieces[] = {"model_checkpoint_path: ",
                               "all_",
                               "\"",
                               "\"model.ckpt\"",
                               "\n",
                               "/",
                               "..",
                               "\\",
                               ":",
                               "\\303\\251",
                               "\xff",
                               "model.ckpt",
                               "model.ckpt-500",
                               " ",
                               "'",
                               "\r"};

std::string mutate_list(std::string text, Random& random) {
    for (size_t n = 1 + below(random, 4); n > 0; n--) {
        if (random() % 2)
            mutate_bytes(text, random);
        else
            text.insert(below(random, text.size() + 1), kPieces[below(random, std::size(kPieces))]);
    }
    return text;
}

// ---- Reading ----

struct Folder {
    std::string path;
    std::vector<std::string> files;
};

// Reads every byte of every tensor; false if one of them has another checksum. Throws std::logic_error if the
// reader gives what it must not.
bool read_everything(const Folder& folder) {
    const std::string prefix = tf_prefix(folder.path);
    if (!prefix.starts_with(folder.path + "/") ||
        prefix.find('/', folder.path.size() + 1) != std::string::npos)
        throw std::logic_error("the prefix leaves its folder");
    const TfCheckpointReader file(prefix);
    size_t bytes = 0, room = 0;
    for (const std::string& name : folder.files)
        if (name.find(".data-") != std::string::npos) room += std::filesystem::file_size(name);
    bool good = true;
    for (const auto& [name, tensor] : file.tensors()) {
        bytes += tensor.bytes;
        if (tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16") {
            good &= crc32c(tensor.data, tensor.bytes) == tensor.crc || tensor.dtype.starts_with("type ");
            continue;
        }
        std::vector<float> values(tensor.elements);
        try {
            file.read_f32(name, tensor.shape, values.data());
        } catch (const Error&) {
            good = false;
        }
    }
    if (bytes > room) throw std::logic_error("the tensors share bytes");
    return good;
}

}  // namespace

int main(int argc, char** argv) {
    Fuzzer fuzzer(argc, argv);
    Random& random = fuzzer.rng;
    std::vector<Folder> folders;
    std::vector<Index> indices;
    std::map<std::string, std::string> good;  // by path
    for (const char* name : {"gpt2", "finetuned"}) {
        Folder folder = {fuzzer.folder() + "/" + name, {}};
        std::filesystem::copy(folder_of(__FILE__) + "/fixtures/tensorflow/" + name, folder.path);
        for (const auto& item : std::filesystem::directory_iterator(folder.path))
            if (item.path().extension() != ".json") folder.files.push_back(item.path());
        std::sort(folder.files.begin(), folder.files.end());
        for (const std::string& path : folder.files) good[path] = read_text(path);
        indices.emplace_back(tf_prefix(folder.path) + ".index");
        folders.push_back(folder);
        if (!read_everything(folder)) return 1;
    }

    long damaged = 0;
    fuzzer.run([&] {
        const size_t which = below(random, folders.size());
        const Folder& folder = folders[which];
        // Mostly the index.
        std::string target = folder.files[below(random, folder.files.size())];
        for (const std::string& file : folder.files)
            if (file.ends_with(".index") && random() % 4) target = file;
        std::string changed = good[target];
        if (target.ends_with(".index"))
            changed = indices[which].mutated(random);
        else if (target.ends_with("/checkpoint"))
            changed = mutate_list(changed, random);
        else
            mutate_bytes(changed, random);
        write_text(target, changed);
        if (random() % 8 == 0) std::filesystem::remove(folder.path + "/checkpoint");
        fuzzer.attempt(target, [&] { damaged += !read_everything(folder); });
        write_text(target, good[target]);
        write_text(folder.path + "/checkpoint", good[folder.path + "/checkpoint"]);
    });
    printf("%ld of those taken have damaged tensors\n", damaged);
    return fuzzer.finish(damaged > 0 && damaged < fuzzer.taken);
}
