// Text that arrives token by token, of which only whole characters are shown: GPT-2's tokens are bytes, and a
// character of several bytes may be spread over several tokens.
#pragma once
#include <unistd.h>

#include <string>
#include <string_view>
#include <utility>

// Text as it is shown: on a terminal, which would obey them, control characters other than line feed and tab
// become '?'. The bytes of a model can be any.
std::string terminal_text(std::string text, bool terminal = isatty(STDOUT_FILENO));

class TextStream {
  public:
    // What may be shown now that `bytes` have come. Bytes that cannot become a character are passed on as
    // they are, so that nothing of a model's output is lost.
    std::string push(std::string_view bytes);

    // What is still held back when nothing more comes.
    std::string finish() { return std::exchange(held_, {}); }

  private:
    std::string held_;

    // Whether bytes that are no character can be the beginning of one.
    static bool may_become_character(std::string_view bytes);
};
