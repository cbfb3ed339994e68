// PTX text to kernels: the PTX ISA's statements as nvcc writes them, and what inline assembly adds (blocks in
// braces with registers of their own).
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string_view>

#include "machine.h"

namespace ptx {
namespace {

constexpr const char* kSpecialNames[kSpecials] = {
    "%tid.x",   "%tid.y",    "%tid.z",    "%ntid.x",   "%ntid.y", "%ntid.z",          "%ctaid.x", "%ctaid.y",
    "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%cluster_ctarank", "%warpid"};

std::map<std::string, std::unique_ptr<Kernel>>& kernels() {
    static std::map<std::string, std::unique_ptr<Kernel>> all;
    return all;
}

int align_up(int x, int alignment) {
    return (x + alignment - 1) / alignment * alignment;
}

std::string strip(std::string_view s) {
    const size_t begin = s.find_first_not_of(" \t\n"), end = s.find_last_not_of(" \t\n");
    return begin == s.npos ? "" : std::string(s.substr(begin, end - begin + 1));
}

// What stands between commas, those within brackets and braces excepted.
std::vector<std::string> split(std::string_view s) {
    std::vector<std::string> parts;
    int depth = 0;
    size_t begin = 0;
    for (size_t i = 0; i <= s.size(); i++) {
        if (i == s.size() || (s[i] == ',' && depth == 0)) {
            parts.push_back(strip(s.substr(begin, i - begin)));
            begin = i + 1;
        } else if (s[i] == '{' || s[i] == '[') {
            depth++;
        } else if (s[i] == '}' || s[i] == ']') {
            depth--;
        }
    }
    return parts;
}

// ".shared .align 4 .b8 sums[128]", and without the length: a variable or parameter.
struct Declaration {
    std::string name;
    int alignment, element, bytes;

    explicit Declaration(const std::string& statement) {
        const size_t space = statement.find_last_of(" \t");
        name = statement.substr(space + 1);
        const std::string type = strip(statement.substr(0, space));
        const int bits = atoi(type.c_str() + type.find_last_of('.') + 2);
        element = bits / 8;
        bytes = element;
        if (const size_t bracket = name.find('['); bracket != name.npos) {
            bytes *= atoi(name.c_str() + bracket + 1);
            name.resize(bracket);
        }
        const size_t align = statement.find(".align");
        alignment = align == statement.npos ? element : atoi(statement.c_str() + align + 6);
        if (element < 1) fail("'%s' is no declaration", statement.c_str());
    }
};

// The text without its comments, and the number of each character's line.
struct Source {
    std::string text;
    std::vector<int> line;
    size_t at = 0;

    explicit Source(const std::string& all) {
        int number = 1;
        for (size_t i = 0; i < all.size(); i++) {
            if (all.compare(i, 2, "//") == 0)
                while (i < all.size() && all[i] != '\n') i++;
            if (i == all.size()) break;
            text += all[i];
            line.push_back(number);
            if (all[i] == '\n') number++;
        }
    }
    bool next() {
        while (at < text.size() && isspace((unsigned char)text[at])) at++;
        return at < text.size();
    }
    // Up to one of these characters, which is passed over.
    std::string until(const char* ends) {
        const size_t end = std::min(text.find_first_of(ends, at), text.size());
        const std::string statement = strip(std::string_view(text).substr(at, end - at));
        at = end + 1;
        return statement;
    }
};

// Whether a variable is an operand somewhere: its name as a whole, and not that of a space ("ld.shared").
bool is_named(const std::string& body, const std::string& name) {
    for (size_t at = 0; (at = body.find(name, at)) != body.npos; at++)
        if (strchr(" \t[", body[at - 1]) && strchr(";]+ ", body[at + name.size()])) return true;
    return false;
}

// Variables of the module.
struct Module {
    std::map<std::string, Declaration> shared;  // of each kernel that names them
    std::map<std::string, Declaration> dynamic;
};

class KernelParser {
  public:
    KernelParser(Source& source, const Module& module, const std::string& head)
        : source_(source), module_(module) {
        parse_head(head);
        kernel_.first_special = kernel_.registers;
        kernel_.registers += kSpecials;
        take_module_variables();
        scopes_.emplace_back();
        open_ = {0};
        while (!open_.empty()) statement();
        Instruction end;
        end.op = end.text = "ret";
        decode(end);
        kernel_.code.push_back(end);
        if (kernel_.has_products)
            for (Instruction& in : kernel_.code)
                if (!in.op.starts_with("wgmma")) note_registers(in);
        for (const Jump& jump : jumps_)
            kernel_.code[jump.instruction].target = find(jump.scopes, &Scope::labels, jump.label);
    }
    Kernel take() { return std::move(kernel_); }

  private:
    struct Scope {
        std::map<std::string, int> registers, labels;
    };
    struct Jump {
        size_t instruction;
        std::string label;
        std::vector<size_t> scopes;
    };

    void parse_head(const std::string& head) {
        const size_t entry = head.find(".entry") + 6, open = head.find('(', entry),
                     close = head.find(')', open);
        kernel_.name = strip(head.substr(entry, open - entry));
        if (const size_t most = head.find(".maxntid"); most != head.npos) {
            int x = 1, y = 1, z = 1;
            sscanf(head.c_str() + most + 8, "%d, %d, %d", &x, &y, &z);
            kernel_.max_threads = x * y * z;
        }
        for (const std::string& text : split(head.substr(open + 1, close - open - 1))) {
            if (text.empty()) continue;
            const Declaration param(text);
            kernel_.param_bytes = align_up(kernel_.param_bytes, param.alignment);
            symbols_[param.name] = kernel_.param_bytes;
            kernel_.params.push_back({kernel_.param_bytes, param.bytes});
            kernel_.param_bytes += param.bytes;
        }
    }

    // Static shared variables that stand in front of the kernels belong to those that use them, and what is
    // dynamic lies behind all that is static: so the body is looked through once beforehand.
    void take_module_variables() {
        size_t end = source_.at;
        for (int depth = 1; depth > 0; end++)
            depth += source_.text[end] == '{' ? 1 : source_.text[end] == '}' ? -1 : 0;
        const std::string body = source_.text.substr(source_.at, end - source_.at);
        for (const auto& [name, variable] : module_.shared)
            if (is_named(body, name)) take_shared(variable);
        int own = kernel_.shared_bytes;
        for (size_t at = 0; (at = body.find(".shared .", at)) != body.npos; at++) {
            const Declaration variable(body.substr(at, body.find(';', at) - at));
            own = align_up(own, variable.alignment) + variable.bytes;
        }
        kernel_.dynamic_start = own;
        for (const auto& [name, variable] : module_.dynamic)
            if (is_named(body, name)) {
                kernel_.dynamic_start = align_up(own, variable.alignment);
                symbols_[name] = kSharedStart + kernel_.dynamic_start;
            }
    }
    void take_shared(const Declaration& variable) {
        kernel_.shared_bytes = align_up(kernel_.shared_bytes, variable.alignment);
        symbols_[variable.name] = kSharedStart + kernel_.shared_bytes;
        kernel_.shared_bytes += variable.bytes;
    }

    void statement() {
        if (!source_.next()) fail("the body of %s has no end", kernel_.name.c_str());
        const char first = source_.text[source_.at];
        if (first == '{') {
            source_.at++;
            open_.push_back(scopes_.size());
            scopes_.emplace_back();
            return;
        }
        if (first == '}') {
            source_.at++;
            open_.pop_back();
            return;
        }
        size_t end = source_.at;
        while (isalnum((unsigned char)source_.text[end]) || strchr("_$%", source_.text[end])) end++;
        if (end > source_.at && source_.text[end] == ':') {
            scopes_[open_.back()].labels[source_.text.substr(source_.at, end - source_.at)] =
                (int)kernel_.code.size();
            source_.at = end + 1;
            return;
        }
        const int line = source_.line[source_.at];
        std::string text = source_.until(";");
        std::replace_if(
            text.begin(), text.end(), [](char c) { return isspace((unsigned char)c); }, ' ');
        if (text.starts_with(".pragma")) return;
        if (text.starts_with(".reg "))
            registers(strip(text.substr(text.find(' ', 5 + text.substr(5).find_first_not_of(' ')))));
        else if (text.starts_with(".shared "))
            take_shared(Declaration(text));
        else if (text.starts_with(".local "))
            local(Declaration(text));
        else if (!text.empty())
            instruction(text, line);
    }

    // "%r<120>" or "done, box"
    void registers(const std::string& names) {
        auto& known = scopes_[open_.back()].registers;
        for (const std::string& name : split(names)) {
            const size_t count = name.find('<');
            if (count == name.npos) {
                known[name] = kernel_.registers++;
                continue;
            }
            for (int i = 0; i < atoi(name.c_str() + count + 1); i++)
                known[name.substr(0, count) + std::to_string(i)] = kernel_.registers++;
        }
    }
    void local(const Declaration& variable) {
        kernel_.local_bytes = align_up(kernel_.local_bytes, variable.alignment);
        symbols_[variable.name] = kernel_.local_bytes;
        kernel_.local_bytes += variable.bytes;
    }

    // "@!%p1 add.s32 %r3, %r1, 4"
    void instruction(const std::string& text, int line) {
        Instruction in;
        in.text = text;
        in.line = line;
        set_place(&in);
        std::string rest = text;
        if (rest[0] == '@') {
            const size_t space = rest.find(' ');
            in.guard_negated = rest[1] == '!';
            in.guard = find_register(rest.substr(1 + in.guard_negated, space - 1 - in.guard_negated));
            if (in.guard < 0) fail("there is no such predicate");
            rest = strip(rest.substr(space));
        }
        const size_t space = rest.find(' ');
        in.op = rest.substr(0, space);
        if (space != rest.npos)
            for (const std::string& part : split(rest.substr(space))) in.o.push_back(operand(part));
        if (!decode(in)) fail("this instruction is not known here");
        kernel_.has_products |= in.op.starts_with("wgmma");
        if (in.flow == Flow::branch)
            jumps_.push_back({kernel_.code.size(), in.o[0].name, open_});
        else
            for (const Operand& o : in.o) check_known(o);
        kernel_.code.push_back(in);
        set_place(nullptr);
    }
    static void check_known(const Operand& o) {
        if (o.kind == Operand::label) fail("%s is not known", o.name.c_str());
        for (const Operand& part : o.parts) check_known(part);
    }

    int find(const std::vector<size_t>& scopes, std::map<std::string, int> Scope::*names,
             const std::string& name) const {
        for (size_t i = scopes.size(); i-- > 0;)
            if (const auto it = (scopes_[scopes[i]].*names).find(name);
                it != (scopes_[scopes[i]].*names).end())
                return it->second;
        return -1;
    }
    int find_register(const std::string& name) const {
        if (const int slot = find(open_, &Scope::registers, name); slot >= 0) return slot;
        for (int i = 0; i < kSpecials; i++)
            if (name == kSpecialNames[i]) return kernel_.first_special + i;
        return -1;
    }

    Operand operand(const std::string& text) {
        Operand o;
        o.name = text;
        if (text == "_") {
            o.kind = Operand::sink;
        } else if (text[0] == '{') {
            o.kind = Operand::list;
            for (const std::string& part : split(text.substr(1, text.rfind('}') - 1)))
                o.parts.push_back(operand(part));
        } else if (text[0] == '[') {
            const std::string inside = strip(text.substr(1, text.rfind(']') - 1));
            const size_t plus = inside.find('+');
            o = operand(strip(inside.substr(0, plus)));
            if (plus != inside.npos) o.offset = strtoll(inside.c_str() + plus + 1, nullptr, 0);
        } else if (text[0] == '!') {
            o = operand(text.substr(1));
            o.negated = true;
        } else if (const size_t bar = text.find('|'); bar != text.npos) {
            o = operand(text.substr(0, bar));
            o.predicate = find_register(text.substr(bar + 1));
        } else if (o.slot = find_register(text); o.slot >= 0) {
            o.kind = Operand::reg;
        } else {
            immediate(o, text);
        }
        return o;
    }
    void immediate(Operand& o, const std::string& text) {
        o.kind = Operand::immediate;
        if (text.starts_with("0f") || text.starts_with("0d"))  // a float's or double's bits
            o.value = strtoull(text.c_str() + 2, nullptr, 16);
        else if (text[0] == '-')
            o.value = (uint64_t)strtoll(text.c_str(), nullptr, 0);
        else if (isdigit((unsigned char)text[0]))
            o.value = strtoull(text.c_str(), nullptr, 0);
        else if (const auto symbol = symbols_.find(text); symbol != symbols_.end())
            o.value = symbol->second;
        else
            o.kind = Operand::label;
        static std::map<uint64_t, std::unique_ptr<uint64_t[]>> values;  // of all kernels
        std::unique_ptr<uint64_t[]>& all = values[o.value];
        if (!all) {
            all.reset(new uint64_t[32]);
            std::fill(all.get(), all.get() + 32, o.value);
        }
        o.all = all.get();
    }

    Source& source_;
    const Module& module_;
    Kernel kernel_ = {};
    std::vector<Scope> scopes_ = {};
    std::vector<size_t> open_ = {};
    std::vector<Jump> jumps_ = {};
    std::map<std::string, uint64_t> symbols_ = {};  // variables' and parameters' addresses in their spaces
};

}  // namespace

Kernel* find_kernel(const std::string& name) {
    const auto it = kernels().find(name);
    return it == kernels().end() ? nullptr : it->second.get();
}

void parse_module(const std::string& text) {
    Source source(text);
    Module module;
    while (source.next()) {
        if (source.text.compare(source.at, 8, ".version") == 0 ||
            source.text.compare(source.at, 7, ".target") == 0 ||
            source.text.compare(source.at, 8, ".address") == 0) {
            source.until("\n");
            continue;
        }
        const std::string statement = source.until(";{");
        if (statement.find(".entry") != statement.npos) {
            Kernel kernel = KernelParser(source, module, statement).take();
            const std::string name = kernel.name;
            kernels()[name] = std::make_unique<Kernel>(std::move(kernel));
        } else if (statement.starts_with(".extern .shared")) {
            const Declaration variable(statement);
            module.dynamic.emplace(variable.name, variable);
        } else if (statement.starts_with(".shared")) {
            const Declaration variable(statement);
            module.shared.emplace(variable.name, variable);
        } else {
            fail("'%s' is a statement that is not known here", statement.c_str());
        }
    }
}

}  // namespace ptx
