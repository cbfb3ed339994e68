// What the fuzzers share. fuzz_NAME [SECONDS [SEED [KIND]]] makes bad files of good ones and reads them, 3
// seconds from seed 1 if nothing is said, and of every kind where there are kinds. Reading must succeed or
// throw an Error of one sentence; another exception, a crash, a hang or more memory than the limit below is a
// failure, after which the files at fault stay in the folder that is printed.
#pragma once
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../llmc/error.h"
#include "temp_folder.h"

using Random = std::mt19937_64;

inline size_t below(Random& random, size_t n) {
    return n ? random() % n : 0;
}

inline void replace_byte(std::string& bytes, size_t at, Random& random) {
    if (at < bytes.size()) bytes[at] = static_cast<char>(random());
}

inline void flip_bit(std::string& bytes, size_t at, Random& random) {
    if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
}

class Fuzzer {
  public:
    Random rng;
    long taken = 0, refused = 0;

    explicit Fuzzer(int argc, char** argv, const std::vector<std::string>& kinds = {})
        : seconds_(argc > 1 ? atof(argv[1]) : 3),
          seed_(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1),
          kind_(argc > 3 && !kinds.empty() ? argv[3] : "") {
        if (!kind_.empty() && std::find(kinds.begin(), kinds.end(), kind_) == kinds.end()) {
            printf("there is no kind %s: the kinds are", kind_.c_str());
            for (const std::string& kind : kinds)
                printf("%s %s", &kind == &kinds[0] ? "" : ",", kind.c_str());
            printf("\n");
            exit(1);
        }
        rng.seed(seed_);
        folder_ = std::make_unique<TempFolder>();
#if !defined(__SANITIZE_ADDRESS__)
        // The address space of a sanitized program is terabytes of shadow: there the peak of memory in use
        // must do.
        const rlimit limit = {kPeakMiB << 20, kPeakMiB << 20};
        setrlimit(RLIMIT_AS, &limit);
#endif
    }

    const std::string& folder() const {
        return folder_->path;
    }
    bool wants(const std::string& kind) const {
        return kind_.empty() || kind_ == kind;
    }

    // Reads `path`, which may have been spoilt.
    void attempt(const std::string& path, const std::function<void()>& read) {
        try {
            read();
            taken++;
        } catch (const Error& error) {
            const std::string message = error.what();
            if (message.empty() || message.find('\n') != std::string::npos)
                throw std::logic_error("reading " + path + ", this is not one sentence: " + message);
            refused++;
        } catch (const std::exception& error) {
            throw std::logic_error("reading " + path + ": " + error.what());
        }
    }

    // Does `round` again and again until the time is up or it throws.
    void run(const std::function<void()>& round) {
        printf("mutating files in %s from seed %llu\n", folder().c_str(),
               static_cast<unsigned long long>(seed_));
        fflush(stdout);
        const auto start = std::chrono::steady_clock::now();
        try {
            while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds_)) {
                rounds_++;
                alarm(10);  // a hang
                round();
            }
        } catch (const std::exception& error) {
            printf("round %ld: %s\n", rounds_, error.what());
            failed_ = true;
        }
        alarm(0);
    }

    // Says how it went, and gives the exit status. If none or all of the files got through, the mutations
    // missed their target; good_aim: what else shows that they did not.
    int finish(bool good_aim = true) {
        if (failed_) static_cast<void>(folder_.release());  // its files stay
        rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        const long peak = usage.ru_maxrss / 1024;
        printf("%ld rounds, %ld inputs taken, %ld refused, at most %ld MiB of memory\n", rounds_, taken,
               refused, peak);
        const bool passed = !failed_ && good_aim && taken > 0 && refused > 0 && peak <= kPeakMiB;
        printf("%d passed, %d failed\n", passed, !passed);
        return !passed;
    }

  private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr long kPeakMiB = 2048;
#else
    static constexpr long kPeakMiB = 512;
#endif
    std::unique_ptr<TempFolder> folder_;
    double seconds_;
    uint64_t seed_;
    std::string kind_;
    long rounds_ = 0;
    bool failed_ = false;
};
