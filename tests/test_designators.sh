#!/usr/bin/env bash
# No designated initializer that nvcc compiles has a gap, which CUDA 12.0 takes for its end (designators.py).
set -u
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
cd "$repository" || exit 1
look() { python3 tests/designators.py "$@" >"$work/out"; }
check "none in what nvcc compiles" look ./*.cu llmc/*.h llmc/*.cuh dev/*/*.cu dev/*/*.cuh dev/*/*.h tests/*.cu tests/*.h
check "there are some to look at" 'grep -qE "^[0-9]{2,} designated" "$work/out"'

cat >"$work/a.cu" <<'END'
struct Inner { int x = 1; };  // struct Commented { int a, c; };
struct Wanted {
    std::map<int, std::string> a = {{1, "struct {"}};
    float *b = nullptr, *c[2] = {};
    Inner d;
    int sum(int first) const { return first; }
    static constexpr int kNone = 0;
    bool e;
};
END
says() { # what, and the code to look at
    { cat "$work/a.cu"; printf '%s\n' "$2"; } >"$work/b.cu"
    ! look "$work/b.cu" && grep -qF "b.cu:10: $1" "$work/out"
}
fine() {
    { cat "$work/a.cu"; printf '%s\n' "$1"; } >"$work/b.cu"
    look "$work/b.cu"
}
check "all members" fine 'Wanted w = {.a = {}, .b = f(1, 2), .c = {}, .d = {.x = 3}, .e = true};'
check "the first ones" fine 'Wanted w{.a = {}, .b = nullptr};'
check "the last ones" fine 'g({.d = {}, .e = false}, x.a == 1);'
check "a gap" says "{.a, .c} leaves out" 'Wanted w{.a = {}, .c = {}};'
check "a gap behind one with a comma" says "{.b, .d} leaves out" 'g(1, {.b = f(1, 2), .d = {4}});'
check "a gap behind a function" says "{.c, .e} leaves out" 'g(1, {.c = {}, .e = true});'
check "a gap over two lines" says "{.c, .e} leaves out" 'g(1, {.c = {},
    .e = true});'
check "a name that there is not" says "{.d, .f} is of no known struct" 'g(1, {{.d = {}, .f = true}});'
finish
