// Files: written whole or not at all, and read with distrust.
//
// A file that is written here appears under its name only when it is complete and on the disk: it is written
// under a name of its own beside it (NAME.tmp-abcdef), synced, and renamed. Whatever stops the program on the
// way (a full disk, a kill, a power cut) leaves what was there before. What has the name already and is no
// file (/dev/null, a pipe) is written to instead: renaming would put a file in its place. A file that is read
// is memory-mapped; text from it that ends up in a message is made printable first.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "error.h"

// A name from a file, fit for a message: control characters and other bytes outside ASCII become '?', and
// what is too long is cut.
inline std::string printable(const std::string& name) {
    std::string text = name.substr(0, 100);
    for (char& c : text)
        if (c < 0x20 || c > 0x7e) c = '?';
    return name.size() > text.size() ? text + "..." : text;
}

inline bool is_file(const std::string& path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

inline bool is_folder(const std::string& path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

// "a/b/c" -> "a/b", "c" -> ".", "/c" -> "/".
inline std::string folder_of(const std::string& path) {
    size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

// A whole file, mapped for reading.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path) : path_(path) {
        // O_NONBLOCK so that a named pipe is refused below instead of waited for.
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) fail("cannot open %s: %s", path.c_str(), strerror(errno));
        struct stat info;
        if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
            close(fd);
            fail("%s is not a file", path.c_str());
        }
        size_ = static_cast<size_t>(info.st_size);
        if (size_ > 0) {
            void* at = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
            int error = errno;
            close(fd);
            if (at == MAP_FAILED) fail("cannot map %s into memory: %s", path.c_str(), strerror(error));
            data_ = static_cast<const unsigned char*>(at);
        } else {
            close(fd);
        }
    }
    MappedFile(MappedFile&& other) noexcept
        : path_(std::move(other.path_)), data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
    }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;
    ~MappedFile() {
        if (data_) munmap(const_cast<unsigned char*>(data_), size_);
    }

    const std::string& path() const { return path_; }
    const unsigned char* data() const { return data_; }
    size_t size() const { return size_; }

  private:
    std::string path_;
    const unsigned char* data_ = nullptr;
    size_t size_ = 0;
};

// Where a file that is written goes.
struct OutputTarget {
    std::string path;  // the file; behind a link, what it points to
    bool is_file;      // false: a device or a pipe, which is written to as it is
};

// The name under which a file or a folder is made: mkstemp() and mkdtemp() end it so that it is new, and
// neither the user's nor another process's.
inline std::string temporary_name(const std::string& path) {
    return path + ".tmp-XXXXXX";
}

// What they made, only for its owner, gets the permissions that any new file or folder would (0666, 0777);
// but for file systems that have none.
inline void set_usual_mode(const std::string& path, mode_t mode) {
    const mode_t mask = umask(0);
    umask(mask);
    [[maybe_unused]] const int result = chmod(path.c_str(), mode & ~mask);
}

// Throws Error where no file of that name can be written: asked before hours of work, too.
inline OutputTarget output_target(const std::string& path) {
    struct stat info, printed;
    std::error_code error;
    OutputTarget target{path, true};
    if (stat(path.c_str(), &info) != 0) {
        if (lstat(path.c_str(), &info) == 0) fail("%s is a link to nothing: remove it", path.c_str());
    } else {
        if (S_ISDIR(info.st_mode)) fail("cannot write %s: there is a folder of that name", path.c_str());
        target.is_file = S_ISREG(info.st_mode);
        for (int fd : {STDOUT_FILENO, STDERR_FILENO})
            if (target.is_file && fstat(fd, &printed) == 0 && printed.st_dev == info.st_dev &&
                printed.st_ino == info.st_ino)
                fail("%s is the file that the output goes to: give another name", path.c_str());
    }
    if (target.is_file) target.path = std::filesystem::weakly_canonical(path, error).string();
    if (error) target.path = path;
    const std::string place = target.is_file ? folder_of(target.path) : path;
    if (access(place.c_str(), target.is_file ? W_OK | X_OK : W_OK) != 0)
        fail("cannot create %s: %s", path.c_str(), strerror(errno));
    return target;
}

// A file being written under a temporary name, which becomes PATH in commit(); without commit() it is
// removed.
class OutputFile {
  public:
    explicit OutputFile(const std::string& path) : path_(path), target_(output_target(path)) {
        std::string name = target_.is_file ? temporary_name(target_.path) : path;
        fd_ = target_.is_file ? mkostemp(name.data(), O_CLOEXEC) : open(path.c_str(), O_WRONLY | O_CLOEXEC);
        if (fd_ < 0) fail("cannot create %s: %s", path.c_str(), strerror(errno));
        if (!target_.is_file) return;
        set_usual_mode(name, 0666);
        temporary_ = name;
    }
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;
    ~OutputFile() {
        if (fd_ >= 0) ::close(fd_);
        if (!temporary_.empty()) unlink(temporary_.c_str());
    }

    const std::string& path() const { return path_; }
    std::string folder() const { return folder_of(target_.path); }

    void write(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        while (bytes > 0) {
            ssize_t n = ::write(fd_, at, bytes);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail("cannot write %s: %s", path_.c_str(), strerror(errno));
            at += n;
            bytes -= static_cast<size_t>(n);
        }
    }

    // All is written, and on the disk: for what is to appear together with other files.
    void close() {
        if (target_.is_file && fsync(fd_) != 0)
            fail("cannot write %s to the disk: %s", path_.c_str(), strerror(errno));
        const int result = ::close(fd_);
        fd_ = -1;
        if (result != 0) fail("cannot write %s: %s", path_.c_str(), strerror(errno));
    }

    void commit() {
        if (fd_ >= 0) close();
        if (!target_.is_file) return;
        if (rename(temporary_.c_str(), target_.path.c_str()) != 0)
            fail("cannot write %s: %s", path_.c_str(), strerror(errno));
        temporary_.clear();
    }

  private:
    std::string path_;  // as it was given
    OutputTarget target_;
    std::string temporary_;  // its name for now, "" if it has none
    int fd_ = -1;
};

inline void write_file(const std::string& path, const std::string& text) {
    OutputFile file(path);
    file.write(text.data(), text.size());
    file.commit();
}

// Makes the names in a folder (files created, renamed, removed) survive a power cut.
inline void sync_folder(const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) fail("cannot open the folder %s: %s", path.c_str(), strerror(errno));
    // Some network file systems sync names by themselves and answer EINVAL.
    int error = fsync(fd) == 0 || errno == EINVAL ? 0 : errno;
    close(fd);
    if (error) fail("cannot write the folder %s to the disk: %s", path.c_str(), strerror(error));
}

// Is asked for each value, key, and begin and end of an array or object that is parsed; false drops it.
using JsonLook = std::function<bool(int depth, nlohmann::json::parse_event_t, const nlohmann::json&)>;

// The object that `text` is, `where` being the file's name (and the line's number) for errors. The limit on
// nesting keeps a hostile file from taking stack that is out of proportion.
inline nlohmann::json parse_json_object(const std::string& where, std::string_view text, int max_depth = 64,
                                        const JsonLook& look = nullptr) {
    // The parser would take a zero byte for the end, and not look at what follows.
    if (text.find('\0') != text.npos) fail("%s is not valid JSON (it has a zero byte)", where.c_str());
    nlohmann::json root;
    try {
        root = nlohmann::json::parse(
            text.data(), text.data() + text.size(),
            [&](int depth, nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
                if (depth > max_depth)
                    fail("%s is nested more than %d levels deep", where.c_str(), max_depth);
                return !look || look(depth, event, parsed);
            });
    } catch (const nlohmann::json::parse_error& e) {
        fail("%s is not valid JSON (at byte %zu)", where.c_str(), e.byte);
    } catch (const nlohmann::json::exception&) {
        fail("%s is not valid JSON (a number is out of range)", where.c_str());
    }
    if (!root.is_object()) fail("%s must hold a JSON object", where.c_str());
    return root;
}

// A small JSON file whose root is an object.
inline nlohmann::json read_json_object(const std::string& path) {
    constexpr size_t max_bytes = 4 << 20;
    const MappedFile file(path);
    if (file.size() > max_bytes)
        fail("%s is too large to be a JSON file of ours (%zu bytes)", path.c_str(), file.size());
    return parse_json_object(path, {reinterpret_cast<const char*>(file.data()), file.size()});
}

// JSON as text. A string that is not UTF-8 (a path may be anything) gets U+FFFD in its place, for the library
// would throw.
template <class Json>  // nlohmann::json or ordered_json
std::string json_text(const Json& json, int indent = -1) {
    return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}
