#!/usr/bin/env python3
"""Designated initializers that leave out a member between two that they name.

CUDA 12.0's nvcc, Ubuntu 24.04's, silently drops what follows such a gap: of {.a = 1, .c = 3} the 3. Every file
named on the command line is looked at, for the structs that it declares and for such initializers. Prints those
with a gap, and those whose struct it does not find; the exit status is 1 if there are any.
"""
import re
import sys


def without_comments_and_strings(text):
    pattern = r'//[^\n]*|/\*.*?\*/|R"\((?:.*?)\)"|"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])'"
    return re.sub(pattern, lambda m: '""' + "\n" * m[0].count("\n"), text, flags=re.S)


def parts(text, begin, separators):
    """The parts of text from begin to the bracket that closes, cut at separators outside of inner brackets."""
    depth, part = 0, ""
    for at in range(begin, len(text)):
        c = text[at]
        if depth == 0 and (c in separators or c in ")]}"):
            yield part
            part = ""
            if c in ")]}":
                return
            continue
        depth += (c in "([{") - (c in ")]}")
        part += c
        if depth == 0 and c == "}" and re.match(r"[^=]*\)[^=]*\{", part):  # a function's body: no ; behind it
            part = ""


def members(text, begin):
    """The names of a struct's data members, in order; text[begin] is behind its {."""
    names = []
    for declaration in parts(text, begin, ";"):
        declaration = re.sub(r"<[^;{}()]*>", "", declaration)
        if re.match(r"\s*(static|using|friend|template|typedef|enum|struct|explicit)\b|[^={]*\(", declaration):
            continue
        for one in re.sub(r"\{[^{}]*\}|\([^()]*\)", "", declaration).split(","):
            found = re.search(r"(\w+)\s*(\[[^\]]*\]\s*)*$", one.split("=")[0].strip())
            if found:
                names.append(found[1])
    return names


def main(paths):
    structs, initializers = [], []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            text = without_comments_and_strings(file.read())
        for found in re.finditer(r"\bstruct\s+\w+[^;{}()]*\{", text):
            structs.append(members(text, found.end()))
        for found in re.finditer(r"\{\s*\.\w+\s*=[^=]", text):
            names = [re.match(r"\s*\.(\w+)", part) for part in parts(text, found.start() + 1, ",")]
            where = f"{path}:{text.count(chr(10), 0, found.start()) + 1}"
            initializers.append((where, [name[1] for name in names if name]))
    bad = 0
    for where, names in initializers:
        of = [s for s in structs if set(names) <= set(s)]
        if any(s[s.index(names[0]) :][: len(names)] == names for s in of):
            continue
        bad += 1
        print(f"{where}: {{.{', .'.join(names)}}} " + ("leaves out a member in between" if of else "is of no known struct"))
    print(f"{len(initializers)} designated initializers, {bad} with a gap")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
