#!/usr/bin/env bash
# The lines that tests/mutations breaks are all still there. (Whether the tests notice: tests/mutations, by hand.)
set -u
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
check "every mutation changes its file" '"$repository/tests/mutations" --check >"$work/out"'
check "the README has their number" 'grep -q "in $(grep -cE "^[0-9]+\|" "$repository/tests/mutations") places" "$repository/README.md"'
finish
