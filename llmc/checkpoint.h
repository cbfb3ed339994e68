// Checkpoints: what a run leaves in its folder, and what a run starts from.
//
//     RUN/metrics.jsonl                  see metrics.h
//     RUN/step_00000123/                 after 123 updates
//         config.json                    these three are what transformers.GPT2LMHeadModel.from_pretrained
//         generation_config.json           opens, as they are
//         model.safetensors              float32, "transformer.h.0.attn.c_attn.weight" as [C, 3C], ...
//         optimizer.safetensors          AdamW's moments, float32: "exp_avg.NAME" and "exp_avg_sq.NAME" for
//                                          each parameter, under Hugging Face's bare names ("wte.weight") and
//                                          in the shapes of model.safetensors
//         state.json                     {"format": 1, "step": .., "seed": .., "epoch": .., "position": ..,
//                                          "settings": {"lambda": "0.1", ..}, "extra": {..}}
//
// The padding of the vocabulary is never written; on reading it is zero, which is what training keeps it.
//
// A checkpoint is written as RUN/.tmp-step_00000123, every file synced, and renamed when it is whole, so that
// a crash at any instant leaves the last good one; what a crash left behind goes with the next save. Only the
// newest checkpoints keep their optimizer: it is twice the size of the weights, and only a resume needs it.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "params.h"
#include "weights.h"

// ---- The folder's names ----

std::string step_folder_name(int64_t step);
// And back; -1 for a name that is not exactly such a one.
int64_t step_of_folder(const std::string& name);

// The folder of a run that has no other name than its number.
std::string run_folder_name(int64_t n);

// Runs without a name, log/run1, log/run2, ...: their numbers, in ascending order.
std::vector<int64_t> numbered_runs(const std::string& folder);

// The steps of the run folder's checkpoints, complete or not, in ascending order.
std::vector<int64_t> checkpoint_steps(const std::string& run_folder);

// ---- The state of a run ----

// What a bit-exact resume needs beside the weights and the moments.
struct RunState {
    int64_t step = 0;      // updates done
    uint64_t seed = 0;     // --seed
    int64_t epoch = 0;     // the data loader: passes over the data completed,
    int64_t position = 0;  //   and where it is in the present one
    // The flags that change the mathematics, as text; a resume must be given the same.
    std::map<std::string, std::string> settings = {};
    // Whatever else must survive, as text; restored, not compared.
    std::map<std::string, std::string> extra = {};

    bool operator==(const RunState&) const = default;
};

RunState load_run_state(const std::string& folder);

// Two settings that runs of older versions did not record; those without the first recorded their numbers
// with six digits only. A run without validation does not have the second: it is compared where both have it.
inline constexpr const char *kDataDigest = "data-digest", *kValDigest = "val-digest";

// Whether a setting is what it was; old: as an older version recorded it.
bool same_setting(const std::string& was, const std::string& is, bool old);

// Throws an Error that names every setting in which the run that is resumed from `folder` differs from `now`.
void check_settings(const std::string& folder, const std::map<std::string, std::string>& saved,
                    const std::map<std::string, std::string>& now);

// ---- Reading ----

// What keeps a checkpoint from being used, or "". For a resume the optimizer must be there too.
std::string checkpoint_problem(const std::string& folder, bool for_resume);

// The newest complete checkpoint in a run folder, or "". For loading weights alone, pass for_resume = false.
std::string latest_checkpoint(const std::string& run_folder, bool for_resume = true);

// For what the user names as a model: a folder or a file in any format that weights.h knows (a TensorFlow
// checkpoint also by its prefix), or a run folder, which means its latest complete checkpoint; where that is
// not its newest, this is said to `say`.
WeightFiles find_model(const std::string& path, FILE* say = stdout);

// Fills AdamW's moments from a checkpoint folder, in the layout of the parameters.
void load_optimizer(const std::string& folder, const GPT2Config& config, float* adam_m, float* adam_v);

// ---- Writing ----

// Saves a checkpoint and removes the optimizer of all but the `keep` newest up to this one. The arrays are
// float32, laid out by gpt2_params(): in bf16 training, the master weights.
void save_checkpoint(const std::string& run_folder, const GPT2Config& config, const float* params,
                     const float* adam_m, const float* adam_v, const RunState& state, int keep = 2);

// Makes a run folder ready, and returns the checkpoint to resume from, or "" for a run that starts new. A
// folder with a run in it is refused unless `resume`. With `resume` a new run starts in an empty folder, and
// where a run with the same settings and start (-e) was stopped before its first checkpoint; what happens is
// said to `say`.
std::string open_run_folder(const std::string& run_folder, bool resume,
                            std::map<std::string, std::string> settings, const std::string& from,
                            FILE* say = stdout);

// ---- --debug-state ----

// One micro-step as an outsider needs it to check us. Host arrays.
struct DebugState {
    int B = 0, T = 0;
    const int32_t *x = nullptr, *y = nullptr;                           // [B, T]
    float ce = 0, reg = 0, total = 0;                                   // reg is R, without lambda
    const float* logits = nullptr;                                      // [B, T, logits_stride]
    int logits_stride = 0;                                              // vocab_size or padded_vocab_size
    const float *topk_mass = nullptr, *topk_threshold = nullptr;        // [L, B, NH, T]
    std::function<std::vector<float>(const ParamTensor&)> param, grad;  // one tensor, in the table's layout
    std::map<std::string, std::string> metadata = {};  // "topk", "lambda", "reg"; n_layer, n_head are added
};

void write_debug_state(const std::string& path, const GPT2Config& config, const DebugState& s);
