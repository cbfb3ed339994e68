#include "text_stream.h"

#include "tokenizer.h"

std::string terminal_text(std::string text, bool terminal) {
    if (!terminal) return text;
    std::string shown;
    for (size_t i = 0; i < text.size(); i++) {
        const auto c = static_cast<unsigned char>(text[i]);
        const auto next = static_cast<unsigned char>(i + 1 < text.size() ? text[i + 1] : 0);
        const bool c1 = c == 0xC2 && next >= 0x80 && next < 0xA0;  // U+0080 ... U+009F
        const bool control = c1 || c == 0x7F || (c < 0x20 && c != '\n' && c != '\t');
        shown += control ? '?' : text[i];
        i += c1;
    }
    return shown;
}

std::string TextStream::push(std::string_view bytes) {
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

bool TextStream::may_become_character(std::string_view bytes) {
    if (bytes.size() > 3) return false;
    for (const char last : {'\x80', '\x8F', '\x90', '\x9F', '\xA0', '\xBF'}) {  // after E0, ED, F0, F4 the
        std::string longer(bytes);                                              // second byte's range is cut
        while (longer.size() < 4) {
            longer += longer.size() == bytes.size() ? last : '\x80';
            if (bpe::utf8_length(longer.data(), longer.data() + longer.size()) ==
                static_cast<int>(longer.size()))
                return true;
        }
    }
    return false;
}
