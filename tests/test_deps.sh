#!/usr/bin/env bash
# dev/deps with the compilers that a machine may have: a g++ that will do, under whatever name, and others, of which it says
# what to do; and for users who may install packages and who may not. Where the tests run nothing is missing, so that and
# apt-get are pretended: nothing is installed.
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
for program in bash sh env true dirname id xargs tr head echo chmod make perl curl; do
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
printf '#!/bin/sh\n[ "$1" != -n ] || shift\nexec "$@"\n' >"$work/bare/sudo"
chmod +x "$work/bare/apt-get" "$work/bare/sudo"
export work whole_path=$PATH real_cxx=$CXX
PATH=$work/installed:$work/bare CXX=g++ dev/deps tests >"$work/out" 2>"$work/err"
check "neither a compiler nor python3: one call installs all" '[ $? = 0 ] && [ ! -s "$work/err" ] && grep -q "^install -y g++ .*doctest-dev python3 " "$work/apt"'

# A user who may not install, with a compiler that finds no header and no library but in build/packages, and an apt-get that
# would install what Ubuntu's does: libraries, of one of which only what compilers need is missing, and a new C library.
mkdir -p "$work/user" "$work/checkout/dev" "$work/system"
touch "$work/system/libpcre2-8.so.0.10.4"
cp dev/deps "$work/checkout/dev/"
cat >"$work/user/apt-get" <<'END'
#!/bin/sh
echo "$*" >>"$work/asked"
if [ "$1 $2" = "install -s" ]; then
    echo "NOTE: This is only a simulation!"
    for package in libc6 libopenblas0-openmp libopenblas-openmp-dev libpcre2-dev libsnappy-dev nlohmann-json3-dev doctest-dev; do
        echo "Inst $package [1.0] (1.1 Ubuntu:22.04/jammy [amd64])"
        echo "Conf $package (1.1 Ubuntu:22.04/jammy [amd64])"
    done
elif [ "$1" = download ] && [ -z "${no_network:-}" ]; then
    cp "$work"/debs/*.deb .
else
    echo "E: Failed to fetch" >&2
    exit 100
fi
END
printf '#!/bin/sh\necho 1000\n' >"$work/user/id"
printf '#!/bin/sh\nexit 1\n' >"$work/user/sudo"
cat >"$work/user/bare_compiler" <<'END'
#!/bin/sh
for argument; do
    case $argument in
        -print-file-name=*) echo "$work/system/${argument#*=}"; exit ;;
        -l*) [ -e "build/packages/lib/lib${argument#-l}.so" ]; exit ;;
    esac
done
exec $real_cxx -nostdinc "$@"
END
chmod +x "$work"/user/*
package() { # its name; its files and, as "LINK -> FILE", links, all below /usr
    local root=$work/debs/$1 file
    mkdir -p "$root/DEBIAN"
    printf 'Package: %s\nVersion: 1.1\nArchitecture: all\nMaintainer: nobody\nDescription: a test\n' "$1" >"$root/DEBIAN/control"
    for file in "${@:2}"; do
        mkdir -p "$root/usr/$(dirname "${file% -> *}")"
        case $file in
            *" -> "*) ln -s "${file#* -> }" "$root/usr/${file% -> *}" ;;
            *) : >"$root/usr/$file" ;;
        esac
    done
    dpkg-deb --build "$root" "$root.deb" >/dev/null
}
processor=$(uname -m)-linux-gnu
package libopenblas0-openmp "lib/$processor/openblas-openmp/libopenblas-r0.so" \
    "lib/$processor/openblas-openmp/libopenblas.so.0 -> libopenblas-r0.so"
package libopenblas-openmp-dev "lib/$processor/openblas-openmp/libopenblas.so -> libopenblas-r0.so"
package libpcre2-dev include/pcre2.h "lib/$processor/libpcre2-8.so -> libpcre2-8.so.0.10.4"
package libsnappy-dev include/snappy-c.h "lib/$processor/libsnappy.so"
package nlohmann-json3-dev include/nlohmann/json.hpp
as_user() { PATH=$work/user:$PATH CXX=bare_compiler env "$@" "$work/checkout/dev/deps" >"$work/out" 2>"$work/err"; }
line="missing packages; paste this line and run make again:    sudo apt-get install -y libopenblas-openmp-dev libpcre2-dev libsnappy-dev nlohmann-json3-dev doctest-dev"
unpacked=$work/checkout/build/packages

as_user no_network=1
check "a user who may not install, and no network: the line to paste" \
    '[ $? = 1 ] && [ ! -s "$work/out" ] && [ "$(cat "$work/err")" = "$line" ]'
as_user
check "packages that lack a header (doctest's): the line to paste" \
    '[ $? = 1 ] && [ ! -s "$work/out" ] && [ "$(cat "$work/err")" = "$line" ]'
package doctest-dev include/doctest/doctest.h
rm -r "$unpacked" "$work/asked"
as_user
check "a user who may not install gets libraries unpacked" \
    '[ $? = 0 ] && [ ! -s "$work/err" ] && [ "$(cat "$work/out")" = "unpacked in build/packages, since this user may not install them: ${line##*-y }" ]'
check "of what apt-get would install those alone" 'grep -q "^download .*libopenblas0-openmp libopenblas-openmp-dev .*doctest-dev$" "$work/asked" && ! grep -q "^download .*libc6" "$work/asked"'
check "libraries in one folder, whatever folders they were in" \
    '[ -e "$unpacked/lib/libopenblas.so" ] && [ -e "$unpacked/lib/libopenblas.so.0" ] && [ -e "$unpacked/include/nlohmann/json.hpp" ] && [ ! -e "$unpacked.part" ]'
check "a link to a library that is installed" '[ "$unpacked/lib/libpcre2-8.so" -ef "$work/system/libpcre2-8.so.0.10.4" ]'
as_user
check "then nothing is missing" '[ $? = 0 ] && [ ! -s "$work/out" ] && [ ! -s "$work/err" ]'
rm -r "$unpacked" "$work/asked"
PATH=$work/user:$PATH CXX=no_compiler "$work/checkout/dev/deps" >"$work/out" 2>"$work/err"
check "a compiler is not unpacked: the line to paste" \
    '[ $? = 1 ] && grep -q "paste this line.* g++ libopenblas.*doctest-dev$" "$work/err" && [ ! -e "$work/asked" ]'
finish
