// safetensors: what is written reads back, what the real library writes reads, and no file is believed.
#include <cmath>
#include <cstring>
#include <map>

#include "../llmc/safetensors.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <limits>

#include "errors.h"
#include "temp_folder.h"

namespace {

const std::string kFixtures = folder_of(__FILE__) + "/fixtures";

// The bytes of a safetensors file with this header and so many bytes of data.
std::string file_of(const std::string& header, size_t data_bytes) {
    uint64_t size = header.size();
    std::string bytes(8, '\0');
    memcpy(bytes.data(), &size, 8);
    return bytes + header + std::string(data_bytes, '\1');
}

std::string error_of_file(const std::string& bytes) {
    TempFolder folder;
    write_text(folder / "a.safetensors", bytes);
    return error_of([&] { SafetensorsReader(folder / "a.safetensors"); });
}

std::vector<float> floats(const SafetensorsReader& file, const std::string& name,
                          std::vector<int64_t> shape) {
    std::vector<float> values(file.at(name).elements);
    file.read_f32(name, shape, values.data());
    return values;
}

}  // namespace

TEST_CASE("what is written reads back, bit for bit") {
    TempFolder folder;
    const std::string path = folder / "model.safetensors";
    const float weights[6] = {1.5f,     -0.0f,     std::numeric_limits<float>::denorm_min(),
                              INFINITY, -INFINITY, 3e38f};
    const int32_t tokens[3] = {0, -1, 50256};
    {
        SafetensorsWriter file(path, {{"format", "pt"}, {"note", "a \"quoted\" line\nand another"}});
        file.declare("weights", "F32", {2, 3});
        file.declare("nothing", "F32", {0, 7});
        file.declare("tokens", "I32", {3});
        file.declare("scalar", "F32", {});
        file.write("weights", weights, sizeof(float));  // in pieces
        file.write("weights", weights + 1, 5 * sizeof(float));
        file.write("tokens", tokens, sizeof(tokens));
        file.write("scalar", weights, sizeof(float));
        file.finish();
    }
    const SafetensorsReader file(path);
    CHECK(file.tensors().size() == 4);
    CHECK(file.metadata() ==
          std::map<std::string, std::string>{{"format", "pt"}, {"note", "a \"quoted\" line\nand another"}});
    CHECK(file.at("weights").shape == std::vector<int64_t>{2, 3});
    CHECK(memcmp(floats(file, "weights", {2, 3}).data(), weights, sizeof(weights)) == 0);
    CHECK(file.at("tokens").dtype == "I32");
    REQUIRE(file.at("tokens").bytes == sizeof(tokens));
    CHECK(memcmp(file.at("tokens").data, tokens, sizeof(tokens)) == 0);
    CHECK(floats(file, "scalar", {}) == std::vector<float>{1.5f});
    CHECK(floats(file, "nothing", {0, 7}).empty());

    const std::string bytes = read_text(path);
    uint64_t header;
    memcpy(&header, bytes.data(), 8);
    CHECK(header % 8 == 0);  // the data is aligned
    CHECK(bytes.size() == 8 + header + 24 + 12 + 4);
    CHECK(!has_unfinished(folder.path));
}

TEST_CASE("a file with no tensors at all is a file") {
    TempFolder folder;
    SafetensorsWriter(folder / "a.safetensors").finish();
    CHECK(SafetensorsReader(folder / "a.safetensors").tensors().empty());
    CHECK(error_of_file(file_of("{}", 0)) == "");
    CHECK(error_of_file(file_of("{}      ", 0)) == "");
}

TEST_CASE("a file written by the real library reads") {
    const SafetensorsReader file(kFixtures + "/kinds.safetensors");
    CHECK(file.tensors().size() == 7);
    CHECK(file.metadata().at("note") == "caf\u00e9");
    CHECK(floats(file, "f32", {2, 3}) == std::vector<float>{0, 0.125, 0.25, 0.375, 0.5, 0.625});
    CHECK(floats(file, "f16", {6}) == std::vector<float>{1.5, -0.0f, 65504, 0x1p-24f, INFINITY, -INFINITY});
    CHECK(std::signbit(floats(file, "f16", {6})[1]));
    CHECK(floats(file, "bf16", {4}) == std::vector<float>{1, -2.5, 0x3p100f, INFINITY});
    CHECK(file.at("empty").shape == std::vector<int64_t>{0, 4});
    CHECK(file.at("scalar").shape.empty());
    CHECK(file.at("scalar").data[0] == 7);
    int64_t large;
    memcpy(&large, file.at("i64").data + 8, 8);
    CHECK(large == int64_t{1} << 40);
    check_mentions(error_of([&] { floats(file, "i64", {2}); }), "tensor i64 is of type I64");
}

TEST_CASE("every float16 and bfloat16 converts to its value") {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const int sign = bits >> 15 ? -1 : 1;
        const auto value = [&](int exponent_bits, int mantissa_bits) -> double {
            const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
            const int mantissa = bits & ((1 << mantissa_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
            if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
            if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
            return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
        };
        const auto same = [](float got, double want) {
            if (std::isnan(want)) return std::isnan(got);
            return got == want && std::signbit(got) == std::signbit(want);
        };
        const bool f16 = same(f16_bits_to_float(static_cast<uint16_t>(bits)), value(5, 10));
        const bool bf16 = same(bf16_bits_to_float(static_cast<uint16_t>(bits)), value(8, 7));
        if (f16 && bf16) continue;
        FAIL("bits " << bits);
    }
}

TEST_CASE("a tensor is asked for by name and shape") {
    const SafetensorsReader file(kFixtures + "/kinds.safetensors");
    check_mentions(error_of([&] { file.at("wte.weight"); }), "kinds.safetensors has no tensor wte.weight");
    check_mentions(error_of([&] {
                       floats(file, "f32", {3, 2});
                   }),
                   "kinds.safetensors: tensor f32 has shape [2, 3], but [3, 2] is expected");
    CHECK(error_of([&] { floats(file, "f32", {6}); }) != "");
}

TEST_CASE("a malformed file is an Error that says what is wrong") {
    const std::string f32 = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
    const std::string deep(50'000'000, '[');
    struct Case {
        std::string header;
        size_t data;
        const char* says;
    };
    const Case cases[] = {
        {"", 0, "does not start with '{'"},
        {"[]", 0, "does not start with '{'"},
        {"{", 0, "not valid JSON"},
        {"{} x", 0, "not valid JSON"},
        {std::string("{}\0\0", 4), 0, "not valid JSON"},
        {R"({"a":{)" + f32 + R"(},})", 4, "not valid JSON"},
        {"{\"a\xff\":{" + f32 + "}}", 4, "not valid JSON"},
        {R"({"a":)" + deep, 0, "an array where there should be none"},
        {R"({"a":{"shape":)" + deep, 0, "an array where there should be none"},
        {R"({"a":{"b":{}}})", 0, "unknown field 'b'"},
        {R"({"a":{"shape":{}}})", 0, "an object where there should be none"},
        {R"({"a":1})", 0, "a number where there should be none"},
        {R"({"a":null})", 0, "a null where there should be none"},
        {R"({"a":"b"})", 0, "a string where there should be none"},
        {R"({"a":{}})", 0, "lacks the dtype, shape or data_offsets of tensor 'a'"},
        {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "lacks the dtype, shape or data_offsets of tensor 'a'"},
        {R"({"a":{)" + f32 + R"(,"more":1}})", 4, "unknown field 'more' in tensor 'a'"},
        {R"({"a":{)" + f32 + R"(,"dtype":"F32"}})", 4, "gives dtype of tensor 'a' twice"},
        {R"({"a":{)" + f32 + R"(},"a":{)" + f32 + "}}", 4, "names 'a' twice"},
        {R"({"a":{)" + f32 + R"(},"b":{)" + f32 + "}}", 4, "overlaps"},
        {R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4, "dtype 'F33'"},
        {R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,4]}})", 4, "a number where there should be none"},
        {R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", 4, "a number where there should be none"},
        {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "a negative number"},
        {R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4, "a fraction"},
        {R"({"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}})", 4, "not valid JSON"},
        {R"({"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}})", 4, "a boolean"},
        {R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4, "an array where"},
        {R"({"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]}})", 4,
         "impossible shape"},
        {R"({"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4, "a fraction"},
        {R"({"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}})", 4,
         "does not fit its 4"},
        {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
         "does not fit its 0"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "does not fit its 4 bytes"},
        {R"({"a":{"dtype":"F64","shape":[1],"data_offsets":[0,4]}})", 4, "does not fit its 4 bytes"},
        {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],)"
         R"("data_offsets":[0,4]}})",
         4, "too many numbers in tensor 'a'"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 4, "outside the 4 bytes of data"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "lies at bytes 4 to 0"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,0]}})", 4,
         "outside the 4 bytes"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "two data_offsets"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4, "two data_offsets"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "leaves a gap before it"},
        {R"({"a":{)" + f32 + "}}", 5, "1 bytes after its last tensor"},
        {R"({"__metadata__":{"a":1}})", 0, "a number where there should be none"},
        {R"({"__metadata__":{"a":{}}})", 0, "an object where there should be none"},
        {R"({"__metadata__":[]})", 0, "an array where there should be none"},
        {R"({"__metadata__":{"a":"1","a":"2"}})", 0, "'a' twice in its metadata"},
        {R"({"__metadata__":{},"__metadata__":{}})", 0, "'__metadata__' twice"},
    };
    for (const Case& c : cases) {
        INFO("header: " << c.header.substr(0, 100));
        const std::string message = error_of_file(file_of(c.header, c.data));
        check_mentions(message, "a.safetensors");
        check_mentions(message, c.says);
        CHECK(message.find('\n') == std::string::npos);
    }
}

TEST_CASE("a name from a file cannot garble the message") {
    const std::string name = R"(\u001b[2J\n)" + std::string(1000, 'x');
    const std::string message = error_of_file(file_of("{\"" + name + "\":{}}", 0));
    CHECK(message.find('\x1b') == std::string::npos);
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 300);
}

TEST_CASE("a file cut off anywhere is an Error") {
    const std::string whole = read_text(kFixtures + "/kinds.safetensors");
    REQUIRE(whole.size() > 500);
    for (size_t size = 0; size < whole.size(); size++) {
        INFO("cut to " << size);
        CHECK(error_of_file(whole.substr(0, size)) != "");
    }
    CHECK(error_of_file(whole) == "");
    CHECK(error_of_file(whole + "x") != "");
}

TEST_CASE("the length of the header is not believed") {
    for (uint64_t size : {uint64_t{3}, uint64_t{1} << 32, uint64_t{1} << 63, UINT64_MAX, UINT64_MAX - 7}) {
        std::string bytes(8, '\0');
        memcpy(bytes.data(), &size, 8);
        check_mentions(error_of_file(bytes + "{}"), "cut off");
    }
}

TEST_CASE("what is no file is refused, not waited for") {
    TempFolder folder;
    check_mentions(error_of([&] { SafetensorsReader(folder / "none"); }), "No such file");
    check_mentions(error_of([&] { SafetensorsReader(folder.path); }), "model.safetensors: No such file");
    REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
    check_mentions(error_of([&] { SafetensorsReader(folder / "pipe"); }), "is not a file");
}

TEST_CASE("a model in several files is read through its index") {
    const SafetensorsReader one(kFixtures + "/gpt2"), several(kFixtures + "/gpt2_sharded");
    CHECK(several.path() == kFixtures + "/gpt2_sharded/model.safetensors.index.json");
    REQUIRE(one.tensors().size() == several.tensors().size());
    for (const auto& [name, tensor] : one.tensors()) {
        const SafeTensor& other = several.at(name);
        CHECK(other.shape == tensor.shape);
        REQUIRE(other.bytes == tensor.bytes);
        CHECK(memcmp(other.data, tensor.data, tensor.bytes) == 0);
    }

    TempFolder folder;
    const std::string index = folder / "model.safetensors.index.json";
    std::filesystem::copy(kFixtures + "/kinds.safetensors", folder / "a.safetensors");
    auto error_of_index = [&](const std::string& text) {
        write_text(index, text);
        return error_of([&] { SafetensorsReader{folder.path}; });
    };
    CHECK(error_of_index(R"({"weight_map":{"f32":"a.safetensors"}})") == "");
    check_mentions(error_of_index(R"({"weight_map":{"g32":"a.safetensors"}})"), "has no tensor g32");
    check_mentions(error_of_index(R"({"weight_map":{"f32":"b.safetensors"}})"),
                   "b.safetensors: No such file");
    check_mentions(error_of_index(R"({"weight_map":{"f32":"../a.safetensors"}})"), "not the name of a");
    check_mentions(error_of_index(R"({"weight_map":{"f32":"a.bin"}})"), "not the name of a");
    check_mentions(error_of_index(R"({"weight_map":{"f32":1}})"), "no file for tensor f32");
    check_mentions(error_of_index(R"({"weight_map":[]})"), "has no weight_map");
    check_mentions(error_of_index("{}"), "has no weight_map");
    check_mentions(error_of_index("[]"), "must hold a JSON object");
    check_mentions(error_of_index(""), "not valid JSON");
    check_mentions(error_of_index(std::string("{}\0junk", 7)), "not valid JSON (at byte 3)");
    check_mentions(error_of_index(R"({"weight_map":)" + std::string(1'000'000, '[')), "levels deep");
    check_mentions(error_of_index(std::string(5'000'000, ' ')), "too large");
}

TEST_CASE("a file that is not finished leaves nothing behind, and what was there stays") {
    TempFolder folder;
    const std::string path = folder / "a.safetensors";
    write_text(path, "old");
    {
        SafetensorsWriter file(path);
        file.declare("a", "F32", {2});
        file.declare("b", "F32", {2});
        const float values[2] = {1, 2};
        file.write("a", values, sizeof(values));
        file.write("b", values, sizeof(float));
        check_mentions(error_of([&] { file.finish(); }), "tensor b was not written in full");
    }
    CHECK(read_text(path) == "old");
    CHECK(!has_unfinished(folder.path));
    CHECK(error_of([&] { SafetensorsWriter(folder / "no/such/folder/a.safetensors"); }) != "");
}

TEST_CASE("a full disk is an Error that names the file, and what was there stays") {
    TempFolder folder;
    const std::string path = folder / "a.safetensors";
    write_text(path, "old");
    const std::vector<float> values(100'000);
    signal(SIGXFSZ, SIG_IGN);
    rlimit before, limit;
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 100'000;
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const std::string message = error_of([&] {
        SafetensorsWriter file(path);
        file.declare("a", "F32", {100'000});
        file.write("a", values.data(), values.size() * sizeof(float));
        file.finish();
    });
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
    check_mentions(message, "cannot write " + path + ": File too large");
    CHECK(read_text(path) == "old");
    CHECK(!has_unfinished(folder.path));
}
