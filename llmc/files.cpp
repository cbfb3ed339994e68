#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <new>
#include <utility>
#include <vector>

#include "error.h"

std::string printable(const std::string& name) {
    std::string text = name.substr(0, 100);
    for (char& c : text)
        if (c < 0x20 || c > 0x7e) c = '?';
    return name.size() > text.size() ? text + "..." : text;
}

std::string shell_word(const std::string& name) {
    constexpr const char* kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+=:,./@%";
    if (!name.empty() && name.find_first_not_of(kPlain) == name.npos) return name;
    std::string word = "'";
    for (char c : name) word += c == '\'' ? "'\\''" : std::string(1, c);
    return word + "'";
}

bool is_file(const std::string& path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

bool is_folder(const std::string& path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

std::string folder_of(const std::string& path) {
    size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
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
        if (at == MAP_FAILED && error == ENOMEM) throw std::bad_alloc();  // the file may be as it should
        if (at == MAP_FAILED) fail("cannot map %s into memory: %s", path.c_str(), strerror(error));
        data_ = static_cast<const unsigned char*>(at);
    } else {
        close(fd);
    }
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
}

MappedFile::~MappedFile() {
    if (data_) munmap(const_cast<unsigned char*>(data_), size_);
}

std::string absolute_path(const std::string& name) {
    std::error_code error;
    if (name.find('/') == name.npos && !is_file(name) && !is_folder(name)) return name;
    const std::filesystem::path path = std::filesystem::absolute(name, error).lexically_normal();
    return error ? name : path.string();
}

std::string temporary_name(const std::string& path) {
    return path + ".tmp-XXXXXX";
}

void set_usual_mode(const std::string& path, mode_t mode) {
    const mode_t mask = umask(0);
    umask(mask);
    [[maybe_unused]] const int result = chmod(path.c_str(), mode & ~mask);
}

OutputTarget output_target(const std::string& path) {
    struct stat info, printed;
    std::error_code error;
    OutputTarget target{path, true};
    if (stat(path.c_str(), &info) != 0) {
        if (lstat(path.c_str(), &info) == 0) fail("%s is a link to nothing: remove it", path.c_str());
    } else {
        if (S_ISDIR(info.st_mode)) fail("cannot write %s: there is a folder of that name", path.c_str());
        target.is_file = S_ISREG(info.st_mode);
        target.mode = info.st_mode & 07777;
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

OutputFile::OutputFile(const std::string& path) : path_(path), target_(output_target(path)) {
    std::string name = target_.is_file ? temporary_name(target_.path) : path;
    fd_ = target_.is_file ? mkostemp(name.data(), O_CLOEXEC) : open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd_ < 0) fail("cannot create %s: %s", path.c_str(), strerror(errno));
    if (!target_.is_file) return;
    temporary_ = name;
    if (target_.mode) {
        [[maybe_unused]] const int result = chmod(name.c_str(), target_.mode);
    } else {
        set_usual_mode(name, 0666);
    }
}

OutputFile::~OutputFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!temporary_.empty()) unlink(temporary_.c_str());
}

void OutputFile::write(const void* data, size_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
        ssize_t n = ::write(fd_, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("cannot write %s: %s", path_.c_str(), strerror(errno));
        at += n;
        bytes -= static_cast<size_t>(n);
    }
}

void OutputFile::close() {
    if (target_.is_file && fsync(fd_) != 0)
        fail("cannot write %s to the disk: %s", path_.c_str(), strerror(errno));
    const int result = ::close(fd_);
    fd_ = -1;
    if (result != 0) fail("cannot write %s: %s", path_.c_str(), strerror(errno));
}

void OutputFile::commit() {
    if (fd_ >= 0) close();
    if (!target_.is_file) return;
    if (rename(temporary_.c_str(), target_.path.c_str()) != 0)
        fail("cannot write %s: %s", path_.c_str(), strerror(errno));
    temporary_.clear();
}

void write_file(const std::string& path, const std::string& text) {
    OutputFile file(path);
    file.write(text.data(), text.size());
    file.commit();
}

void make_folder(const std::string& path, const char* what) {
    std::error_code error;
    std::vector<std::string> made;  // innermost first
    for (std::string at = path; !at.empty() && at != "." && !std::filesystem::exists(at, error);
         at = folder_of(at))
        made.push_back(at);
    std::filesystem::create_directories(path, error);
    if (error || !is_folder(path))
        fail("cannot create the %s %s: %s", what, path.c_str(),
             error ? error.message().c_str() : "there is a file of that name");
    for (const std::string& folder : made) sync_folder(folder_of(folder));
}

FolderLock::FolderLock(const std::string& run_folder)
    : fd_(open(run_folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (fd_ < 0) fail("cannot open the run folder %s: %s", run_folder.c_str(), strerror(errno));
    // Some network file systems have no locks: those are not worth stopping for.
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(fd_);
        fail("another process is training in %s: wait for it, or choose another folder with -o",
             run_folder.c_str());
    }
}

FolderLock::~FolderLock() {
    close(fd_);
}

void sync_folder(const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == EACCES)
        return;  // one may write in it and not list it: then only others can do this
    if (fd < 0) fail("cannot open the folder %s: %s", path.c_str(), strerror(errno));
    // Some network file systems sync names by themselves and answer EINVAL.
    int error = fsync(fd) == 0 || errno == EINVAL ? 0 : errno;
    close(fd);
    if (error) fail("cannot write the folder %s to the disk: %s", path.c_str(), strerror(error));
}
