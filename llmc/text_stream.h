// Text that arrives token by token, of which only whole characters are shown: GPT-2's tokens are bytes, and a
// character of several bytes may be spread over several tokens.
#pragma once
#include <string>
#include <string_view>

#include "tokenizer.h"

class TextStream {
  public:
    // What may be shown now that `bytes` have come. Bytes that cannot become a character are passed on as
    // they are, so that nothing of a model's output is lost.
    std::string push(std::string_view bytes) {
        held_ += bytes;
        std::string ready;
        size_t at = 0;
        for (;;) {
            const std::string_view rest = std::string_view(held_).substr(at);
            const size_t whole = bpe::valid_prefix(rest);
            ready += rest.substr(0, whole);
            at += whole;
            if (at == held_.size() || may_become_character(rest.substr(whole))) break;
            ready += held_[at++];
        }
        held_.erase(0, at);
        return ready;
    }

    // What is still held back when nothing more comes.
    std::string finish() { return std::exchange(held_, {}); }

  private:
    std::string held_;

    // Whether bytes that are no character can be the beginning of one.
    static bool may_become_character(std::string_view bytes) {
        if (bytes.size() > 3) return false;
        for (const char last :
             {'\x80', '\x8F', '\x90', '\x9F', '\xA0', '\xBF'}) {  // after E0, ED, F0, F4 the
            std::string longer(bytes);                            // second byte's range is cut
            while (longer.size() < 4) {
                longer += longer.size() == bytes.size() ? last : '\x80';
                if (bpe::utf8_length(longer.data(), longer.data() + longer.size()) ==
                    static_cast<int>(longer.size()))
                    return true;
            }
        }
        return false;
    }
};
