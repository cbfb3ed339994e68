#include "json_file.h"

#include <algorithm>
#include <cstddef>

#include "error.h"
#include "files.h"

namespace {

// The library takes a zero byte for the end of the text, and would not look at what follows. Here one becomes
// another byte that no JSON has, in a copy.
std::string_view without_zeros(std::string_view text, std::string& copy) {
    if (text.find('\0') == text.npos) return text;
    copy = text;
    std::replace(copy.begin(), copy.end(), '\0', '\1');
    return copy;
}

}  // namespace

nlohmann::json parse_json_object(const std::string& where, std::string_view text, int max_depth,
                                 const JsonLook& look) {
    std::string copy;
    text = without_zeros(text, copy);
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

nlohmann::json read_json_object(const std::string& path) {
    constexpr size_t max_bytes = 4 << 20;
    const MappedFile file(path);
    if (file.size() > max_bytes)
        fail("%s is too large to be a JSON file of ours (%zu bytes)", path.c_str(), file.size());
    return parse_json_object(path, {reinterpret_cast<const char*>(file.data()), file.size()});
}

nlohmann::json parse_json(std::string_view text) {
    std::string copy;
    text = without_zeros(text, copy);
    return nlohmann::json::parse(text.data(), text.data() + text.size(), nullptr, false);
}

bool scan_json(std::string_view text, nlohmann::json_sax<nlohmann::json>& look) {
    std::string copy;
    text = without_zeros(text, copy);
    return nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &look);
}

std::string json_text(const nlohmann::json& json, int indent) {
    return json.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string json_text(const nlohmann::ordered_json& json, int indent) {
    return json.dump(indent, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}
