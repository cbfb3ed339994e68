// Which algorithm computes each matrix product, as a file that the next run reads. See matmul_plans.h.
#pragma once
#include <array>
#include <map>
#include <string>

// What tells one algorithm of cuBLASLt from another, in the order of kConfigAttributes.
using AlgorithmConfig = std::array<int, 9>;

struct MatmulChoice {
    AlgorithmConfig algorithm{};  // the fastest, epilogue included
    // Microseconds of that one, of cuBLASLt's first guess, and of the same work in separate steps; 0: not
    // timed.
    float us = 0, guess_us = 0, separate_us = 0;

    bool separate() const { return separate_us > 0 && separate_us < 0.99f * us; }
};
using MatmulChoices = std::map<std::string, MatmulChoice>;  // by describe() of the product

// "" where there is no place for it.
std::string matmul_choices_path(const std::string& made_on);

// The choices in a file, or none. Nothing in it is taken on trust: what does not look like a choice is left
// out, and an algorithm is only ever used if cuBLASLt offers it again, so that a damaged file costs timing
// anew, not a wrong result.
MatmulChoices read_matmul_choices(const std::string& path, const std::string& made_on);

// Where the file cannot be written, the next run times again: no reason to stop this one.
void write_matmul_choices(const std::string& path, const std::string& made_on, const MatmulChoices& choices);
