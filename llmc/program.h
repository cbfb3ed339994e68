// A program's surroundings: the frame of its main(), and where it lies, for what belongs to it is found from
// there, wherever it is called from.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <new>
#include <string>

#include "threads.h"

inline std::filesystem::path program_path() {
    std::error_code error;
    const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
    return error ? "./program" : self;
}
inline std::string program_folder() {
    return program_path().parent_path().string();
}

// Standard input, output and error where they were closed: to nowhere. Otherwise the next file that is opened
// would be the standard output, and get what is printed.
inline void open_standard_streams() {
    for (int fd = 0; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);  // takes the lowest number that is free
}

// A mapped file that somebody makes shorter, by copying another one over it, say, ends a program that reads
// it. Set as the handler of SIGBUS, this says so.
inline void on_bus_error(int) {
    constexpr char kText[] =
        "\nerror: a file that is being read (token shards, weights) was cut short, or its disk fails\n";
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kText, sizeof(kText) - 1);
    _exit(1);
}

// What befalls open files is reported, rather than that it kills the program without a word.
inline void report_file_faults() {
    signal(SIGBUS, on_bus_error);
    signal(SIGXFSZ, SIG_IGN);  // a file that may not get so large: write() fails, and that is reported
}

// Ends the program by a signal, from its handler, too.
[[noreturn]] inline void end_by(int sig) {
    signal(sig, SIG_DFL);
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, sig);
    pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
    raise(sig);
    _exit(128 + sig);  // the first process of a container is not killed by what it sends itself
}

// Ctrl-C, for programs that finish what they are at: set as the handler of a signal, which is then in
// g_interrupted. A second one ends the program at once, but for one that comes with the first: timeout, say,
// signals the program, and then the group that it is in.
inline volatile sig_atomic_t g_interrupted = 0;
inline void on_interrupt(int sig) {
    static timespec first;
    timespec now;
    const int error = errno;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!g_interrupted) {
        first = now;
        g_interrupted = sig;
        signal(SIGPIPE, SIG_IGN);  // who read the output may be gone, too: what is to be saved is saved
    } else if ((double)(now.tv_sec - first.tv_sec) + 1e-9 * (double)(now.tv_nsec - first.tv_nsec) > 1) {
        end_by(sig);
    }
    errno = error;
}

// A program's main(): what `body` throws is one sentence on stderr behind `prefix`, and exit status 1. So is
// output that could not be written. A program that was interrupted ends by that signal once it is done with
// what it finishes: a shell script that it is part of is then stopped, too, and does not take it for a
// success.
template <class Body>
int run_program(const char* prefix, Body body) {
    open_standard_streams();
    report_file_faults();
    limit_threads();
    int status = 1;
    try {
        body();
        status = fflush(stdout) == 0 && !ferror(stdout) ? 0 : 1;
        if (status != 0 && !g_interrupted)
            fprintf(stderr, "%s: the standard output could not be written\n", prefix);
    } catch (const std::bad_alloc&) {
        fflush(stdout);
        fprintf(stderr, "%s: there is not enough memory: raise the limit (ulimit -v), or ask for less\n",
                prefix);
    } catch (const std::exception& e) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", prefix, e.what());
    }
    if (g_interrupted) end_by(g_interrupted);
    return status;
}
