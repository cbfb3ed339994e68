# What the test scripts share; they source it. Counts checks, and has a folder $work that goes when the script ends.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
export LC_ALL=C.UTF-8 # numbers with a point, whatever the user's language
exec 3>&1 # where results go, wherever a check's own output does

ok() { passed=$((passed + 1)); echo "ok    $1" >&3; }
# Also shows what the last program said, where the script keeps that in $work/out, err or log.
bad() {
    failed=$((failed + 1))
    { echo "FAIL  $1"; tail -n 20 "$work"/out "$work"/err "$work"/log 2>/dev/null | sed 's/^/        /'; } >&3
}

# check WHAT COMMAND ARGUMENT..., or check WHAT 'SHELL CODE', in which $? is the status of what ran before check.
check() {
    local check_status=$? check_what=$1
    shift
    if [ $# -gt 1 ]; then "$@"; else (exit $check_status); eval "$1"; fi && ok "$check_what" || bad "$check_what"
}

# Until a condition holds; that it does within a minute is a check, too.
waits_for() {
    for _ in $(seq 3000); do
        ! eval "$1" || return 0
        sleep 0.02
    done
    bad "waited a minute for: $1"
}

finish() {
    echo "$passed passed, $failed failed" >&3
    [ "$failed" = 0 ]
    exit
}
