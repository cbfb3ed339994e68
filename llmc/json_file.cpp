#include "json_file.h"

#include <cstddef>

#include "error.h"
#include "files.h"

nlohmann::json parse_json_object(const std::string& where, std::string_view text, int max_depth,
                                 const JsonLook& look) {
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

nlohmann::json read_json_object(const std::string& path) {
    constexpr size_t max_bytes = 4 << 20;
    const MappedFile file(path);
    if (file.size() > max_bytes)
        fail("%s is too large to be a JSON file of ours (%zu bytes)", path.c_str(), file.size());
    return parse_json_object(path, {reinterpret_cast<const char*>(file.data()), file.size()});
}

nlohmann::json parse_json(std::string_view text) {
    return nlohmann::json::parse(text.data(), text.data() + text.size(), nullptr, false);
}

bool scan_json(std::string_view text, nlohmann::json_sax<nlohmann::json>& look) {
    return nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &look);
}

std::string json_text(const nlohmann::json& json, int indent) {
    return json.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string json_text(const nlohmann::ordered_json& json, int indent) {
    return json.dump(indent, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}
