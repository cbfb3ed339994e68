#!/usr/bin/env bash
# The lines that tests/mutations breaks are all still there. (Whether the tests notice: tests/mutations, by hand.)
set -u
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
check "every mutation changes its file" '"$repository/tests/mutations" --check >"$work/out"'
finish
