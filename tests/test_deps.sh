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

# Without a compiler and python3, and with an apt-get that installs: a machine that lacks both has them after one call.
mkdir "$work/bare" "$work/installed"
for program in bash sh env id xargs tr head echo chmod make perl curl; do
    ln -s "$(type -P $program)" "$work/bare/"
done
cat >"$work/bare/apt-get" <<'END'
#!/bin/sh
echo "$@" >>"$work/apt"
[ "$1" = install ] || exit 0
for package in "$@"; do
    case $package in
        g++) program=$real_cxx ;;
        python3) program=python3 ;;
        *) continue ;;
    esac
    printf '#!/bin/sh\nPATH="%s" exec %s "$@"\n' "$whole_path" "$program" >"$work/installed/$package"
    chmod +x "$work/installed/$package"
done
END
printf '#!/bin/sh\nshift\nexec "$@"\n' >"$work/bare/sudo" # sudo -n true
chmod +x "$work/bare/apt-get" "$work/bare/sudo"
export work whole_path=$PATH real_cxx=$CXX
PATH=$work/installed:$work/bare CXX=g++ dev/deps tests >"$work/out" 2>"$work/err"
check "neither a compiler nor python3: one call installs all" '[ $? = 0 ] && [ ! -s "$work/err" ] && grep -q "g++ .*doctest-dev python3$" "$work/apt"'
finish
