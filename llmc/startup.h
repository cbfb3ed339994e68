// What the programs here do before they begin: choose between GPU and CPU, and find the model that the user
// named together with its vocabulary. Data and the CPU program are beside the program.
#pragma once
#include <cuda_runtime.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "checkpoint.h"
#include "context.h"
#include "dataloader.h"
#include "program.h"
#include "tokenizer.h"
#include "vocabulary.h"

// ---------------------------------------------------------------------------------------------------------
// device

enum class Device { automatic, cpu, cuda };
inline constexpr const char* kDeviceWords[] = {"auto", "cpu", "cuda"};

enum class Precision { automatic, bf16, fp32, fp8 };
inline constexpr const char* kPrecisionWords[] = {"auto", "bf16", "fp32", "fp8"};

// bf16 where the hardware has it; it is also what FP8 products come from and go to.
inline bool wants_bf16(Precision precision) {
    return precision == Precision::bf16 || precision == Precision::fp8 ||
           (precision == Precision::automatic && !kOnCpu);
}

// Starts another program (or this one again) in this one's place, with the same arguments.
[[noreturn]] inline void become(const std::string& program, char** argv) {
    fflush(stdout);
    // Between two parallel regions OpenMP's threads spin by default, which on a machine that has anything
    // else to do costs whole time slices: with two busy neighbours a step took 15 times as long. Let them
    // sleep.
    setenv("OMP_WAIT_POLICY", "passive", 0);
    execv(program.c_str(), argv);
    const std::string name = std::filesystem::path(program).filename().string();
    fail("cannot start %s (%s): build it with make %s", program.c_str(), strerror(errno), name.c_str());
}

#ifndef CUDA_CPU
// Why no GPU can be used; "" if one can.
inline std::string why_no_gpu() {
    int count = 0;
    cudaDeviceProp prop = {};
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) error = cudaGetDeviceProperties(&prop, 0);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (count == 0) return "there is none";
    if (prop.major < 8)
        return format("%s has compute capability %d.%d, and 8.0 is needed", prop.name, prop.major,
                      prop.minor);
    return "";
}
#endif

// Where there is no GPU, the CPU program that was built beside this one, `program` + "cpu", takes over. What
// is said about it goes to `say`.
inline void choose_device(Device wanted, const std::string& program, char** argv, FILE* say = stdout) {
    constexpr const char* said = "GPT2_DEVICE_SAID";  // so that the second program does not say it again
#ifdef CUDA_CPU
    // Where make finds no nvcc, it copies the CPU program to the name of the one for the GPU. Under its own
    // name it does not know what else was built.
    const bool no_toolkit = program_path().filename() == program + "cu";
    if (wanted == Device::cuda && no_toolkit)
        fail(
            "--device cuda needs a program built with the CUDA Toolkit (nvcc), and this one was built without");
    if (wanted == Device::cuda)
        fail("--device cuda goes with %scu: this is the CPU program", program.c_str());
    if (wanted == Device::automatic && !getenv(said))
        fprintf(say, "running on the CPU: this %s\n",
                no_toolkit ? "program was built without the CUDA Toolkit" : "is the CPU program");
    setenv(said, "1", 1);
    if (choose_openblas_core() || !getenv("OMP_WAIT_POLICY")) become(program_path(), argv);
    take_openblas_buffers();
#else
    const std::string why = wanted == Device::cpu ? "" : why_no_gpu();
    if (wanted == Device::cuda && !why.empty())
        fail("--device cuda needs an NVIDIA GPU, and none can be used: %s", why.c_str());
    if (wanted == Device::automatic && !why.empty())
        fprintf(say, "running on the CPU: no NVIDIA GPU can be used (%s)\n", why.c_str());
    setenv(said, "1", 1);
    if (wanted == Device::cpu || !why.empty()) become(program_folder() + "/" + program + "cpu", argv);
#endif
}

// ---------------------------------------------------------------------------------------------------------
// the model that -e names

// Where data/fetch puts the weights of one of kPublishedSizes; "" for other names.
inline std::string public_weights(const std::string& name) {
    for (const ModelSize& size : kPublishedSizes)
        if (name == size.name) return program_folder() + "/data/gpt2-" + name;
    return "";
}

// The weights that -e names: one of OpenAI's sizes, or a folder or file in any format that weights.h knows.
// `takes`: what -e takes, for the message when there is no such thing. A run's checkpoint that is passed over
// is named to `say`.
inline WeightFiles find_named_model(const std::string& name, const char* takes, FILE* say = stdout) {
    if (const std::string folder = public_weights(name); !folder.empty()) {
        if (!is_folder(folder))
            fail("-e %s: OpenAI's weights are not here yet: run data/fetch %s", name.c_str(), name.c_str());
        return find_model(folder, say);
    }
    std::error_code error;
    if (!std::filesystem::exists(name, error) && !std::filesystem::exists(name + ".index", error))
        fail("-e (--from) takes %s; there is no '%s'", takes, name.c_str());
    return find_model(name, say);
}

// Where the vocabulary's files are: beside the weights, if they have their own, otherwise (and for a model
// from scratch, weights = nullptr) where data/fetch puts GPT-2's.
inline std::string vocabulary_folder(const WeightFiles* weights) {
    if (weights && has_vocabulary(weights->folder)) return weights->folder;
    return program_folder() + "/data/gpt2";
}

// What turns text into tokens and back; nullptr where no vocabulary is known, after saying why to `say`. A
// vocabulary that lies beside the weights must be theirs; one of another kind than GPT-2's is left alone, and
// that is said, too.
inline std::unique_ptr<Tokenizer> find_tokenizer(const WeightFiles* weights, int vocab_size,
                                                 FILE* say = stdout) {
    const std::string folder = vocabulary_folder(weights);
    try {
        if (weights && folder == weights->folder)
            return std::make_unique<Tokenizer>(Tokenizer::gpt2(folder, vocab_size));
    } catch (const Error& e) {
        fail(
            "the weights in %s have a vocabulary of %d tokens, and the vocabulary beside them is another: %s",
            weights->path.c_str(), vocab_size, e.what());
    }
    if (weights)
        if (const std::string why = foreign_tokenizer(weights->folder); !why.empty())
            fprintf(say, "%s/tokenizer.json is not used: it is not of GPT-2's kind (%s)\n",
                    weights->folder.c_str(), why.c_str());
    try {
        return std::make_unique<Tokenizer>(Tokenizer::for_vocab(vocab_size, folder));
    } catch (const Error& e) {
        fprintf(say, "tokens stay numbers: %s\n", e.what());
        return nullptr;
    }
}

// ---------------------------------------------------------------------------------------------------------
// data

// The shards of the default data set that make prepared, as a glob: data/default_dataset holds its name.
inline std::string default_data(const std::string& tokens, const char* part) {
    const std::string folder = program_folder() + "/data/";
    std::ifstream file(folder + "default_dataset");
    std::string name;
    if (!(file >> name))
        fail(
            "there is no data yet: run data/prepare, or name token shards with -j (for the trainer with -i, too)");
    return glob_of(folder + name + "_" + tokens + "_" + part + "_") + "*.bin";
}
