// Files: written whole or not at all, and read with distrust.
//
// A file that is written here appears under its name only when it is complete and on the disk: it is written
// under a name of its own beside it (NAME.tmp-abcdef), synced, and renamed. Whatever stops the program on the
// way (a full disk, a kill, a power cut) leaves what was there before. What has the name already and is no
// file (/dev/null, a pipe) is written to instead: renaming would put a file in its place. A file that is read
// is memory-mapped; text from it that ends up in a message is made printable first.
#pragma once
#include <sys/types.h>

#include <string>

// A name from a file, fit for a message: control characters and other bytes outside ASCII become '?', and
// what is too long is cut.
std::string printable(const std::string& name);

// A name as a shell takes it: in quotes where it has characters that mean something else there.
std::string shell_word(const std::string& name);

bool is_file(const std::string& path);

bool is_folder(const std::string& path);

// "a/b/c" -> "a/b", "c" -> ".", "/c" -> "/".
std::string folder_of(const std::string& path);

// The absolute path, which means the same in another folder, of what is there or has a slash in its name;
// another name (124M, tiny) stays.
std::string absolute_path(const std::string& name);

// A whole file, mapped for reading.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path);
    MappedFile(MappedFile&& other) noexcept;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;
    ~MappedFile();

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
    mode_t mode = 0;   // permissions of the file that is there; 0: there is none
};

// The name under which a file or a folder is made: mkstemp() and mkdtemp() end it so that it is new, and
// neither the user's nor another process's.
std::string temporary_name(const std::string& path);

// What they made, only for its owner, gets the permissions that any new file or folder would (0666, 0777);
// but for file systems that have none.
void set_usual_mode(const std::string& path, mode_t mode);

// Throws Error where no file of that name can be written: asked before hours of work, too.
OutputTarget output_target(const std::string& path);

// A file being written under a temporary name, which becomes PATH in commit(); without commit() it is
// removed.
class OutputFile {
  public:
    explicit OutputFile(const std::string& path);
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;
    ~OutputFile();

    const std::string& path() const { return path_; }
    std::string folder() const { return folder_of(target_.path); }

    void write(const void* data, size_t bytes);

    // All is written, and on the disk: for what is to appear together with other files.
    void close();

    void commit();

  private:
    std::string path_;  // as it was given
    OutputTarget target_;
    std::string temporary_;  // its name for now, "" if it has none
    int fd_ = -1;
};

void write_file(const std::string& path, const std::string& text);

// A folder, and those that it is in, where they are not there yet. `what` it is goes into the Error.
void make_folder(const std::string& path, const char* what = "folder");

// Keeps other processes from a run folder: Error where one has it. It ends with the object, and with the
// process.
class FolderLock {
  public:
    explicit FolderLock(const std::string& run_folder);
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;
    ~FolderLock();

  private:
    int fd_;
};

// Makes the names in a folder (files created, renamed, removed) survive a power cut.
void sync_folder(const std::string& path);
