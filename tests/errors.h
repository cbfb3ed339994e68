// What a test asks of an error: that there is one, and that its one line has the words that it should.
#pragma once
#include <doctest/doctest.h>

#include <string>

#include "../llmc/error.h"

// The message of the Error that f() throws, "" if it throws none.
template <class F>
std::string error_of(F f) {
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

inline void check_mentions(const std::string& message, const std::string& words) {
    INFO("message: \"" << message << "\", without: " << words);
    CHECK(message.find(words) != message.npos);
    CHECK(message.find('\n') == message.npos);
}
