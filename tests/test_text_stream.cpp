// Text that comes in pieces: whole characters are shown as soon as they are there, and no byte is lost.
#include <doctest/doctest.h>

#include <random>

#include "../llmc/text_stream.h"
#include "../llmc/tokenizer.h"

TEST_CASE("a terminal gets no control characters, a file gets all") {
    const std::string text = "a\x1b[2J\x07\r\x7f\tb\n\xC2\x9B\xC2\xA0\xC3\xA9\xC2";
    CHECK(terminal_text(text, true) == "a?[2J???\tb\n?\xC2\xA0\xC3\xA9\xC2");
    CHECK(terminal_text(text, false) == text);
    CHECK(terminal_text(std::string(1, '\0'), true) == "?");
}

TEST_CASE("a character is never split") {
    const std::string text = "a é € 😀 z\n日本";
    TextStream stream;
    std::string shown;
    for (const char c : text) {
        const std::string ready = stream.push(std::string(1, c));
        CHECK(bpe::valid_prefix(ready) == ready.size());
        shown += ready;
        // nothing that is complete waits
        CHECK(shown.size() == bpe::valid_prefix(text.substr(0, shown.size() + 4).substr(0, shown.size())));
    }
    CHECK(shown == text);
    CHECK(stream.finish().empty());
}

TEST_CASE("what is complete is shown at once") {
    TextStream stream;
    CHECK(stream.push("ab\xE2\x82") == "ab");
    CHECK(stream.push("\xAC") == "€");
    CHECK(stream.push("\xF0\x9F\x98") == "");
    CHECK(stream.finish() == "\xF0\x9F\x98");
    CHECK(stream.push("x") == "x");
}

TEST_CASE("bytes that cannot become a character do not hold up what follows") {
    for (const std::string bad :
         {"\xFF", "\x80", "\xC0", "\xE0\x80", "\xED\xA0", "\xF5", "\xF4\x90", "\xC3\x28"}) {
        TextStream stream;
        CAPTURE(bad);
        CHECK(stream.push("a" + bad + "b") == "a" + bad + "b");
        CHECK(stream.finish().empty());
    }
}

TEST_CASE("random bytes in random pieces come out as they went in") {
    std::mt19937_64 rng(1);
    for (int round = 0; round < 2000; round++) {
        TextStream stream;
        std::string in, out;
        for (int piece = 0; piece < 20; piece++) {
            std::string bytes;
            for (size_t n = rng() % 4; n > 0; n--)
                bytes += (char)(rng() % 2 ? 0x80 + rng() % 128 : rng() % 256);
            in += bytes;
            out += stream.push(bytes);
            CHECK(in.size() - out.size() <= 3);
        }
        CHECK(out + stream.finish() == in);
    }
}
