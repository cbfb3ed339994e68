// Turns text files into token shards for training and validation: build/tokenize --help.
//
// The text streams through in batches of about 1 MB, which the threads tokenize in parallel and the main
// thread writes in order, so that memory stays bounded and the result does not depend on the number of
// threads. A long document is cut only before white space that follows something else: GPT-2's pattern ends a
// piece there whatever comes before or after, so the tokens are those of the whole document. (A document
// without any such place is held in memory whole.)
//
// The tokens go to an unnamed temporary file first, because the place of the validation split is known only
// when all are counted. <|endoftext|> stands between documents and nowhere else, so it is also how that place
// is found.
#include <fcntl.h>
#include <omp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../llmc/dataloader.h"
#include "../llmc/error.h"
#include "../llmc/flags.h"
#include "../llmc/json_file.h"
#include "../llmc/program.h"
#include "../llmc/tokenizer.h"
#include "../llmc/vocabulary.h"

namespace fs = std::filesystem;

static constexpr const char* kDefaultGpt2Dir = "data/gpt2";  // where data/fetch puts it

enum class TokenizerKind { bytes, gpt2 };
constexpr const char* kTokenizerWords[] = {"bytes", "gpt2"};

struct Options {
    std::vector<std::string> inputs;
    TokenizerKind tokenizer = TokenizerKind::gpt2;
    std::optional<std::string> gpt2_dir;  // without it: default_gpt2_dir()
    std::string output;
    double val_fraction = 0.1;
    int64_t shard_tokens = 100'000'000;
    bool lines = false;
    std::string jsonl;
    std::string delimiter;
    int threads = 0;
};

// A whole number, with K, M or G behind it for thousands, millions or thousand millions if you like.
static int64_t parse_count(const std::string& flag, const std::string& text, int64_t least, int64_t most) {
    int64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    const std::string unit(stop, end);
    const int64_t times = unit.empty()  ? 1
                          : unit == "K" ? 1'000
                          : unit == "M" ? 1'000'000
                          : unit == "G" ? 1'000'000'000
                                        : 0;
    if (error != std::errc() || times == 0 || value < 0 || value > most / times || value * times < least)
        fail("%s takes a whole number from %lld to %lld, not '%s'", flag.c_str(), (long long)least,
             (long long)most, text.c_str());
    return value * times;
}

// The one table of flags.
static std::vector<Flag> tokenize_flags(Options& o) {
    return {
        {'o', "output", "PREFIX", "", "required: where the shards go, in a folder that is created if need be",
         [&o](auto& flag, auto& v) { o.output = parse_name(flag, v); }},
        choice_flag("tokenizer", kTokenizerWords, o.tokenizer, "what a token is"),
        {0, "gpt2-dir", "FOLDER", std::string(kDefaultGpt2Dir) + " beside the program's folder, or here",
         "GPT-2's encoder.json and vocab.bpe are in it",
         [&o](auto& flag, auto& v) { o.gpt2_dir = parse_name(flag, v); }},
        {0, "val-fraction", "F", format("%g", o.val_fraction),
         "share of the tokens for validation, from the end of the text, split between documents where that gives half to twice as much, otherwise inside one; 0 = no validation shard",
         [&o](auto& flag, auto& v) { o.val_fraction = parse_double(flag, v, 0, 0.999); }},
        {0, "shard-tokens", "N", format("%lldM", (long long)o.shard_tokens / 1'000'000),
         "tokens in a shard, with K, M or G if you like",
         [&o](auto& flag, auto& v) { o.shard_tokens = parse_count(flag, v, 1, kMaxShardTokens); }},
        {0, "lines", "", "", "each line is a document", [&o](auto&, auto&) { o.lines = true; }},
        {0, "jsonl", "FIELD", "", "each line is a JSON object whose FIELD is a document",
         [&o](auto& flag, auto& v) { o.jsonl = parse_name(flag, v); }},
        {0, "delimiter", "TEXT", "", "TEXT separates the documents of a file",
         [&o](auto& flag, auto& v) { o.delimiter = parse_name(flag, v); }},
        {0, "threads", "N", std::to_string(o.threads), "threads; 0 = one for each core",
         [&o](auto& flag, auto& v) { o.threads = (int)parse_count(flag, v, 0, 1024); }},
        help_flag(
            "Usage: tokenize -o PREFIX [flags] FILE|FOLDER...\n"
            "\n"
            "Writes the text of the files, and of the text files in the folders, as token\n"
            "shards PREFIX_train_000000.bin, ... and PREFIX_val_000000.bin. Each file is one\n"
            "document unless a flag below says otherwise; one <|endoftext|> stands between\n"
            "two documents. Empty documents are left out, and so are hidden files and folders\n"
            "(.git, say) and linked folders in those given; what is named is read.\n"
            "\n",
            [] {
                Options defaults;
                return tokenize_flags(defaults);
            },
            "this text"),
    };
}

static Options parse_options(int argc, char** argv) {
    Options o;
    parse_flags(argc, argv, tokenize_flags(o), &o.inputs);
    if (o.lines + !o.jsonl.empty() + !o.delimiter.empty() > 1)
        fail("--lines, --jsonl and --delimiter exclude one another");
    if (o.inputs.empty()) fail("no text was given: name the files or folders to tokenize");
    if (o.output.empty()) fail("-o PREFIX is missing: it says where the shards go");
    return o;
}

// ---------------------------------------------------------------------------------------------------------
// Input files

struct Input {
    std::string path;
    int64_t size;
};

// Binary formats have control characters, and zeros above all, in their first bytes.
static bool looks_like_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot open %s: %s", path.c_str(), strerror(errno));
    char head[8192];
    file.read(head, sizeof(head));
    for (std::streamsize i = 0; i < file.gcount(); i++) {
        const auto c = static_cast<unsigned char>(head[i]);
        const bool control = c < 32 && !(c >= '\b' && c <= '\r') && c != 27;
        if (control || c == 127) return false;
    }
    return file.gcount() > 0;
}

static std::vector<Input> find_inputs(const std::vector<std::string>& names) {
    std::vector<Input> inputs;
    std::vector<std::string> skipped;
    size_t hidden = 0, links = 0;
    for (const std::string& name : names) {
        std::error_code error;
        if (name == "-") fail("the standard input is not read: name a file or a folder");
        const fs::file_status status = fs::status(name, error);
        if (!fs::exists(status)) fail("there is no file or folder %s", name.c_str());
        if (!fs::is_directory(status)) {
            if (!fs::is_regular_file(status)) fail("%s is neither a file nor a folder", name.c_str());
            if (is_shard(name)) fail("%s is a token shard already", name.c_str());
            inputs.push_back({name, static_cast<int64_t>(fs::file_size(name))});
            continue;
        }
        std::vector<std::string> found;
        const size_t hidden_before = hidden;
        auto entry = fs::recursive_directory_iterator(name, error);
        for (; !error && entry != fs::end(entry); entry.increment(error)) {
            if (entry->path().filename().string()[0] == '.') {  // a program's data: .git, .cache
                entry.disable_recursion_pending();
                hidden++;
                continue;
            }
            std::error_code gone;  // a broken link is no regular file
            if (entry->is_regular_file(gone)) found.push_back(entry->path().string());
            if (entry->is_symlink(gone) && entry->is_directory(gone)) links++;
        }
        if (error) fail("cannot read the folder %s or one in it: %s", name.c_str(), error.message().c_str());
        std::sort(found.begin(), found.end());
        const size_t before = inputs.size();
        for (const std::string& path : found) {
            if (looks_like_text(path)) {
                inputs.push_back({path, static_cast<int64_t>(fs::file_size(path))});
            } else {
                skipped.push_back(path);
            }
        }
        if (inputs.size() == before)
            fail("there is no text file in the folder %s%s", name.c_str(),
                 hidden > hidden_before ? ", but for hidden ones, which are not read" : "");
    }
    constexpr size_t kNamed = 5;
    if (!skipped.empty()) {
        fprintf(stderr, "skipped %zu files that are empty or do not look like text:\n", skipped.size());
        for (size_t i = 0; i < std::min(kNamed, skipped.size()); i++)
            fprintf(stderr, "  %s\n", skipped[i].c_str());
        if (skipped.size() > kNamed) fprintf(stderr, "  and %zu more\n", skipped.size() - kNamed);
    }
    if (hidden > 0) fprintf(stderr, "skipped %zu hidden files or folders\n", hidden);
    if (links > 0)
        fprintf(stderr, "skipped %zu link%s to folders: name such a folder to have it read\n", links,
                links == 1 ? "" : "s");
    return inputs;
}

// A bar on a terminal, a line every ten percent elsewhere.
class Progress {
  public:
    explicit Progress(int64_t total) : total_(std::max<int64_t>(total, 1)) {}

    void show(int64_t done) {
        const double share = std::min(1.0, static_cast<double>(done) / static_cast<double>(total_));
        const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
        const double mb = static_cast<double>(done) / 1e6;
        const int step = static_cast<int>(share * (terminal_ ? 1000 : 10));
        if (step == last_ || (!terminal_ && seconds < 1)) return;  // short work needs no lines
        last_ = step;
        if (!terminal_) {
            fprintf(stderr, "%3d%%  %.0f MB  %.1f MB/s\n", step * 10, mb, mb / std::max(seconds, 1e-3));
            return;
        }
        constexpr int kWidth = 40;
        const int filled = static_cast<int>(share * kWidth);
        fprintf(stderr, "\r[%s%s] %5.1f%%  %.0f MB  %.1f MB/s  %.0f s left  ",
                std::string(filled, '#').c_str(), std::string(kWidth - filled, '.').c_str(), 100 * share, mb,
                mb / std::max(seconds, 1e-3), share > 0 ? seconds * (1 - share) / share : 0.0);
        if (share == 1) fputc('\n', stderr);
    }

  private:
    using Clock = std::chrono::steady_clock;
    int64_t total_;
    Clock::time_point start_ = Clock::now();
    bool terminal_ = isatty(STDERR_FILENO) != 0;
    int last_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// Tokens on their way to the shards

// A file of tokens beside the shards that no name leads to: it is gone however the program ends.
class TokenFile {
  public:
    explicit TokenFile(const std::string& prefix) {
        std::string name = prefix + "_tokens.XXXXXX";
        fd_ = mkstemp(name.data());
        if (fd_ < 0) fail("cannot write a temporary file %s: %s", name.c_str(), strerror(errno));
        unlink(name.c_str());
    }
    TokenFile(const TokenFile&) = delete;
    ~TokenFile() { close(fd_); }

    int64_t size() const { return size_; }

    void append(std::span<const uint16_t> tokens) {
        const char* from = reinterpret_cast<const char*>(tokens.data());
        auto left = static_cast<int64_t>(tokens.size_bytes());
        int64_t offset = 2 * size_;
        while (left > 0) {
            const ssize_t n = pwrite(fd_, from, static_cast<size_t>(left), offset);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail("cannot write the temporary file of tokens: %s", strerror(errno));
            from += n;
            left -= n;
            offset += n;
        }
        size_ += static_cast<int64_t>(tokens.size());
    }

    // The tokens from `first` on, up to `count` of them or the end.
    std::span<const uint16_t> read(int64_t first, int64_t count) {
        block_.resize(static_cast<size_t>(std::min(count, size_ - first)));
        char* to = reinterpret_cast<char*>(block_.data());
        auto left = static_cast<int64_t>(block_.size() * 2);
        for (int64_t offset = 2 * first; left > 0;) {
            const ssize_t n = pread(fd_, to, static_cast<size_t>(left), offset);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail("cannot read the temporary file of tokens: %s", strerror(n < 0 ? errno : EIO));
            to += n;
            left -= n;
            offset += n;
        }
        return block_;
    }

  private:
    int fd_;
    int64_t size_ = 0;
    std::vector<uint16_t> block_;
};

// ---------------------------------------------------------------------------------------------------------
// Documents, cut into parts, gathered into batches, tokenized in parallel

class Corpus {
  public:
    Corpus(const Tokenizer& tokenizer, TokenFile& out, Progress& progress)
        : tokenizer_(tokenizer), out_(out), progress_(progress) {}

    int64_t documents() const { return documents_; }
    int64_t bytes() const { return bytes_; }

    // More text of the current document.
    void add(std::string_view text) {
        pending_ += text;
        if (pending_.size() < kBatchBytes) return;
        const size_t cut = last_cut();
        searched_ = pending_.size();
        if (cut == 0) return;
        emit(std::string_view(pending_).substr(0, cut));
        pending_.erase(0, cut);
        searched_ = pending_.size();
    }

    void end_document() {
        if (!pending_.empty()) emit(pending_);
        pending_.clear();
        searched_ = 0;
        inside_document_ = false;
    }

    void finish() {
        batches_.push_back(std::move(batch_));
        encode_batches();
    }

    void count_read(int64_t bytes) { read_ += bytes; }

  private:
    static constexpr size_t kBatchBytes = size_t{1} << 20;
    static constexpr size_t kBatchesPerThread = 4;  // enough that threads rarely wait for the slowest batch

    struct Part {
        size_t begin, size;
        bool after_document;  // its document is not the first: <|endoftext|> comes before it
    };
    struct Batch {
        std::string text;
        std::vector<Part> parts;
        std::vector<uint16_t> tokens;
    };

    // The last place in the pending text where it may be cut, 0 where there is none. What an earlier call
    // searched in vain is not searched again.
    size_t last_cut() const {
        for (size_t at = pending_.size() - 1; at >= std::max<size_t>(searched_, 1); at--) {
            if (Tokenizer::may_cut(pending_, at)) return at;
        }
        return 0;
    }

    void emit(std::string_view text) {
        bool after_document = false;
        if (!inside_document_) {
            after_document = documents_ > 0;
            documents_++;
            inside_document_ = true;
        }
        bytes_ += static_cast<int64_t>(text.size());
        batch_.parts.push_back({batch_.text.size(), text.size(), after_document});
        batch_.text += text;
        if (batch_.text.size() < kBatchBytes) return;
        batches_.push_back(std::move(batch_));
        batch_ = {};
        if (batches_.size() == kBatchesPerThread * static_cast<size_t>(omp_get_max_threads()))
            encode_batches();
    }

    void encode_batches() {
        std::exception_ptr problem;
#pragma omp parallel for schedule(dynamic)
        for (size_t b = 0; b < batches_.size(); b++) {
            try {
                Batch& batch = batches_[b];
                for (const Part& part : batch.parts) {
                    if (part.after_document) batch.tokens.push_back(static_cast<uint16_t>(tokenizer_.eot()));
                    tokenizer_.append(std::string_view(batch.text).substr(part.begin, part.size),
                                      batch.tokens);
                }
            } catch (...) {
#pragma omp critical
                problem = std::current_exception();
            }
        }
        if (problem) std::rethrow_exception(problem);
        for (const Batch& batch : batches_) out_.append(batch.tokens);
        batches_.clear();
        if (g_interrupted) fail("interrupted; nothing was written");
        progress_.show(read_);
    }

    const Tokenizer& tokenizer_;
    TokenFile& out_;
    Progress& progress_;
    std::string pending_;  // text of the current document that no batch has yet
    size_t searched_ = 0;  // bytes of it that have no place to cut
    bool inside_document_ = false;
    Batch batch_;
    std::vector<Batch> batches_;
    int64_t documents_ = 0, bytes_ = 0, read_ = 0;
};

// Calls `more` with the file's text, block after block.
template <typename F>
static void read_blocks(const Input& input, Corpus& corpus, F&& more) {
    std::ifstream file(input.path, std::ios::binary);
    if (!file) fail("cannot open %s: %s", input.path.c_str(), strerror(errno));
    std::string block(size_t{1} << 18, '\0');
    while (file) {
        file.read(block.data(), static_cast<std::streamsize>(block.size()));
        corpus.count_read(file.gcount());
        more(std::string_view(block).substr(0, static_cast<size_t>(file.gcount())));
    }
    if (file.bad()) fail("cannot read %s", input.path.c_str());
}

// Calls `add` with text between separators and `end` at each separator and at the end of the file.
template <typename Add, typename End>
static void read_separated(const Input& input, Corpus& corpus, const std::string& separator, Add&& add,
                           End&& end) {
    std::string text;  // what was read and not yet handed on: it may end in the beginning of a separator
    read_blocks(input, corpus, [&](std::string_view block) {
        text += block;
        size_t at = 0;
        for (size_t found; (found = text.find(separator, at)) != std::string::npos;) {
            add(std::string_view(text).substr(at, found - at));
            end();
            at = found + separator.size();
        }
        const size_t keep = std::min(text.size() - at, separator.size() - 1);
        add(std::string_view(text).substr(at, text.size() - keep - at));
        text.erase(0, text.size() - keep);
    });
    add(text);
    end();
}

// Half a surrogate pair, as Python writes it where a text has it, is no character: like tiktoken's, here it
// becomes U+FFFD.
static std::string without_half_pairs(std::string json) {
    const auto unit = [&](size_t at) -> unsigned {  // of the \uXXXX there; 0: there is none
        unsigned value = 0;
        if (at + 6 > json.size() || json[at] != '\\' || json[at + 1] != 'u') return 0;
        const char* end = &json[at] + 6;
        return std::from_chars(end - 4, end, value, 16).ptr == end ? value : 0;
    };
    size_t length = 0;
    for (size_t at = json.find('\\'); at != json.npos; at = json.find('\\', at + length)) {
        const unsigned first = unit(at) >> 10, second = unit(at + 6) >> 10;  // 0xD800 >> 10 is 0x36
        const bool pair = first == 0x36 && second == 0x37;
        if (!pair && (first == 0x36 || first == 0x37)) json.replace(at + 2, 4, "fffd");
        length = pair ? 12 : 2;
    }
    return json;
}

static std::string json_field(const std::string& line, const std::string& field, const Input& input,
                              int64_t number) {
    constexpr int most_levels = 1000;
    const std::string where = format("line %lld of %s", static_cast<long long>(number), input.path.c_str());
    const auto object = parse_json_object(where, without_half_pairs(line), most_levels);
    const auto found = object.find(field);
    if (found == object.end()) fail("%s has no field \"%s\"", where.c_str(), field.c_str());
    if (!found->is_string()) fail("%s has a field \"%s\" that is not a text", where.c_str(), field.c_str());
    return found->get<std::string>();
}

static void read_documents(const Options& o, const Input& input, Corpus& corpus) {
    const auto add = [&](std::string_view text) { corpus.add(text); };
    const auto end = [&] { corpus.end_document(); };
    if (!o.lines && o.jsonl.empty()) {
        if (o.delimiter.empty()) {
            read_blocks(input, corpus, add);
            end();
        } else {
            read_separated(input, corpus, o.delimiter, add, end);
        }
        return;
    }
    std::string line;
    int64_t number = 0;
    read_separated(
        input, corpus, "\n", [&](std::string_view text) { line += text; },
        [&] {
            number++;
            if (line.ends_with('\r')) line.pop_back();
            if (!line.empty()) corpus.add(o.lines ? line : json_field(line, o.jsonl, input, number));
            end();
            line.clear();
        });
}

// ---------------------------------------------------------------------------------------------------------
// Shards

// Where validation begins: after the <|endoftext|> that comes nearest to its share of the tokens. One that
// gives less than half or more than twice the share does not count, or a long last document would take most
// of the text; without any, the place is that of the share, inside a document.
static int64_t find_split(TokenFile& tokens, double val_fraction, int eot) {
    const int64_t n = tokens.size();
    const double share = static_cast<double>(n) * val_fraction;
    const int64_t ideal = std::clamp<int64_t>(n - std::llround(share), 1, n - 1);
    const auto lowest = std::max<int64_t>(n - static_cast<int64_t>(std::floor(2 * share)), 1);
    const auto highest = n - static_cast<int64_t>(std::ceil(share / 2));
    constexpr int64_t kBlock = int64_t{1} << 20;
    int64_t before = -1, after = -1;  // the nearest splits on either side
    for (int64_t end = ideal; end >= lowest && before < 0; end -= kBlock) {
        const int64_t first = std::max(end - kBlock, lowest - 1);
        const auto block = tokens.read(first, end - first);
        for (size_t i = block.size(); i-- > 0 && before < 0;) {
            if (block[i] == eot) before = first + static_cast<int64_t>(i) + 1;
        }
    }
    for (int64_t first = ideal; first < highest && after < 0; first += kBlock) {
        const auto block = tokens.read(first, std::min(kBlock, highest - first));
        for (size_t i = 0; i < block.size() && after < 0; i++) {
            if (block[i] == eot) after = first + static_cast<int64_t>(i) + 1;
        }
    }
    if (before < 0 && after < 0) return ideal;
    if (before < 0) return after;
    return after < 0 || ideal - before <= after - ideal ? before : after;
}

// Of the shards of one kind ("train" or "val").
static std::string shard_name(const Options& o, const char* kind, int64_t number) {
    return format("%s_%s_%06lld.bin", o.output.c_str(), kind, static_cast<long long>(number));
}

// The number in the name of a shard of this set; -1: it is another file.
static int64_t shard_number(const Options& o, const char* kind, const fs::path& file) {
    const std::string name = file.filename().string();
    const size_t digits = (fs::path(o.output).filename().string() + "_" + kind + "_").size();
    int64_t number = -1;
    if (digits < name.size()) std::from_chars(name.data() + digits, name.data() + name.size(), number);
    return number >= 0 && fs::path(shard_name(o, kind, number)).filename() == name ? number : -1;
}

struct Shard {
    std::string path;
    int64_t tokens;
    std::unique_ptr<ShardWriter> writer;
};

// Writes the tokens from `first` up to `end` as the shards of one kind, which have no names yet.
static std::vector<Shard> write_shards(TokenFile& tokens, int64_t first, int64_t end, const Options& o,
                                       const char* kind, int vocab_size) {
    constexpr int64_t kBlock = int64_t{1} << 20;
    std::vector<Shard> shards;
    while (first < end) {
        const std::string path = shard_name(o, kind, static_cast<int64_t>(shards.size()));
        const int64_t count = std::min(end - first, o.shard_tokens), shard_end = first + count;
        shards.push_back({path, count, std::make_unique<ShardWriter>(path, count, vocab_size)});
        while (first < shard_end) {
            if (g_interrupted) fail("interrupted; nothing was written");
            const auto block = tokens.read(first, std::min(kBlock, shard_end - first));
            shards.back().writer->append(block);
            first += static_cast<int64_t>(block.size());
        }
        shards.back().writer->close();
    }
    return shards;
}

// Gives them their names.
static void publish_shards(const std::vector<Shard>& shards, const Options& o, const char* kind) {
    for (const Shard& shard : shards) shard.writer->finish();
    // An earlier run with the same prefix and more shards would otherwise add its last ones to this set.
    // There may be gaps in what is left of it, where somebody removed some.
    size_t removed = 0;
    std::error_code error, ignored;
    for (fs::directory_iterator it(folder_of(o.output), error), end; !error && it != end; it.increment(error))
        if (shard_number(o, kind, it->path()) >= static_cast<int64_t>(shards.size()))
            removed += fs::remove(it->path(), ignored);
    for (const Shard& shard : shards)
        printf("%-12s%s, %lld tokens\n", &shard == &shards[0] ? kind : "", shard.path.c_str(),
               static_cast<long long>(shard.tokens));
    if (removed > 0)
        printf("removed     %zu shard%s behind them that an earlier run left\n", removed,
               removed == 1 ? "" : "s");
}

static std::string default_gpt2_dir() {
    const std::string beside = (fs::path(program_folder()).parent_path() / kDefaultGpt2Dir).string();
    for (const std::string& folder : {beside, std::string(kDefaultGpt2Dir)})
        if (has_vocabulary(folder)) return folder;
    fail(
        "there is no GPT-2 vocabulary in %s, nor in %s here: data/fetch gpt2 gets it, or name a folder with "
        "--gpt2-dir",
        beside.c_str(), kDefaultGpt2Dir);
}

static void run(const Options& o) {
    if (o.threads > 0) omp_set_num_threads(o.threads);
    const Tokenizer tokenizer = o.tokenizer == TokenizerKind::bytes
                                    ? Tokenizer::bytes()
                                    : Tokenizer::gpt2(o.gpt2_dir ? *o.gpt2_dir : default_gpt2_dir());
    const std::vector<Input> inputs = find_inputs(o.inputs);
    int64_t total = 0;
    for (const Input& input : inputs) total += input.size;

    make_folder(folder_of(o.output), "folder of -o,");
    TokenFile tokens(o.output);
    Progress progress(total);
    Corpus corpus(tokenizer, tokens, progress);
    for (const Input& input : inputs) read_documents(o, input, corpus);
    corpus.finish();

    const int64_t n = tokens.size();
    if (n == 0) fail("there is no text in what was given");
    int64_t split = n;
    if (o.val_fraction > 0) {
        if (n < 2) fail("one token cannot be split into training and validation: use --val-fraction 0");
        split = find_split(tokens, o.val_fraction, tokenizer.eot());
    }
    printf("tokenizer   %s, a vocabulary of %d\n", tokenizer.name(), tokenizer.vocab_size());
    printf("documents   %lld\n", static_cast<long long>(corpus.documents()));
    printf("bytes       %lld\n", static_cast<long long>(corpus.bytes()));
    printf("tokens      %lld, %.2f%% of them for validation\n", static_cast<long long>(n),
           100.0 * static_cast<double>(n - split) / static_cast<double>(n));
    printf("bytes/token %.3f\n", static_cast<double>(corpus.bytes()) / static_cast<double>(n));
    // Names only when all of them are written: what stops this program on the way leaves the set that was
    // there.
    const std::vector<Shard> train = write_shards(tokens, 0, split, o, "train", tokenizer.vocab_size()),
                             held_out = write_shards(tokens, split, n, o, "val", tokenizer.vocab_size());
    publish_shards(train, o, "train");
    if (o.val_fraction > 0)
        publish_shards(held_out, o, "val");
    else if (const std::string val = shard_name(o, "val", 0); is_file(val))
        printf("note        %s is there from before: its text may be among what is now trained on\n",
               val.c_str());
}

int main(int argc, char** argv) {
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    signal(SIGPIPE, SIG_IGN);  // whoever reads what is printed: the set is written whole
    return run_program("tokenize", [&] {
        try {
            run(parse_options(argc, argv));
        } catch (const std::bad_alloc&) {
            fail("out of memory: a document without white space must fit into it");
        }
    });
}
