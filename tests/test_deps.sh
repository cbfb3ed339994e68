#!/usr/bin/env bash
# dev/deps with the compilers that a machine may have: a g++ that will do, under whatever name, and others, of which it says
# what to do. Everything else is installed where the tests run, so that nothing here installs anything.
set -u
cd "$(dirname "$0")/.."
source tests/script.sh
: "${CXX:=g++}"
deps() { CXX=$1 dev/deps >"$work/out" 2>"$work/err"; }
compiler() { # name, what it says of __GNUC__
    printf '#!/bin/sh\n[ "$1" != --version ] || exec echo "%s of 2019"\necho %s\n' "$1" "$2" >"$work/$1"
    chmod +x "$work/$1"
}

deps "$CXX"
check "nothing is missing" '[ $? = 0 ] && [ ! -s "$work/out" ] && [ ! -s "$work/err" ]'
deps "env $CXX"
check "the compiler may be several words" '[ $? = 0 ] && [ ! -s "$work/out" ] && [ ! -s "$work/err" ]'
for version in 4 9 10 "" "words"; do
    compiler "compiler$version" "$version"
    deps "$work/compiler$version"
    check "a compiler of version '$version'" '[ $? = 1 ] && [ ! -s "$work/out" ] && [ "$(wc -l <"$work/err")" = 1 ] && grep -q "compiler$version will not do, g++ 11 or newer .*(here: compiler$version of 2019)" "$work/err"'
done
finish
