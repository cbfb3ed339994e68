// JSON, read with distrust and written as text. The library's parser and printer are templates that take
// seconds to compile, so that only json_file.cpp calls them.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

// Is asked for each value, key, and begin and end of an array or object that is parsed; false drops it.
using JsonLook = std::function<bool(int depth, nlohmann::json::parse_event_t, const nlohmann::json&)>;

// The object that `text` is, `where` being the file's name (and the line's number) for errors. The limit on
// nesting keeps a hostile file from taking stack that is out of proportion.
nlohmann::json parse_json_object(const std::string& where, std::string_view text, int max_depth = 64,
                                 const JsonLook& look = nullptr);

// A small JSON file whose root is an object.
nlohmann::json read_json_object(const std::string& path);

// The value that `text` is; where it is none, value.is_discarded().
nlohmann::json parse_json(std::string_view text);

// Tells `look` of the values as they come, and builds none. False where it answered so, or `text` is no JSON.
bool scan_json(std::string_view text, nlohmann::json_sax<nlohmann::json>& look);

// JSON as text. A string that is not UTF-8 (a path may be anything) gets U+FFFD in its place, for the library
// would throw.
std::string json_text(const nlohmann::json& json, int indent = -1);
std::string json_text(const nlohmann::ordered_json& json, int indent = -1);
