#!/bin/bash
# Verifies the checks of CUDA on the CPU: each kind of mistake in cpu_backend_bugs.cu must be caught by the
# check that is there for it, and the same kernel without the mistake must pass all checks. One line a case.
set -u
cd "$(dirname "$0")/.."
nvcc=llmc/cpu/cpu_nvcc
source tests/script.sh
: "${CXX:=g++}"
export CXX
flags="-std=c++20 -O0 -g1 -fopenmp -Wall -Wextra"

result() { # 0 or 1, the case, output to show if it failed
    if [ "$1" = 0 ]; then
        ok "$2"
    else
        printf '%s\n' "$3" >"$work/out"
        bad "$2"
        rm "$work/out"
    fi
}

run() { # sets $output and $status
    output=$( ("$@") 2>&1)
    status=$?
}

build() { # the program's name, the flags of its objects, those of the link
    # shellcheck disable=SC2086  # the flags are lists
    $nvcc tests/cpu_backend_bugs.cu -o "$work/$1.o" $flags $2 && $CXX "$work/$1.o" -o "$work/$1" -fopenmp $3 && return
    echo "0 passed, 1 failed: cannot build $1"
    exit 1
}

catches() { # the build, the mistake, what the message must contain; the program must not succeed
    run "$work/$1" "$2" bug
    [ $status != 0 ] && grep -q -- "$3" <<<"$output"
    result $? "$1 catches $2" "$output"
}

shows_nan() { # the build, the mistake: the program runs, and its result is NaN
    run "$work/$1" "$2" bug
    [ $status = 0 ] && grep -q '^sum -\?nan$' <<<"$output"
    result $? "$1 shows $2" "$output"
}

build check -DCUDA_CPU_CHECK ""
catches check barrier_after_exit 'a thread exits while others wait in __syncthreads at .*cpu_backend_bugs.cu:'
CUDA_CPU_SCHEDULE=backward \
    catches check barrier_after_exit '__syncthreads after some threads of the block have exited at '
catches check exit_during_barrier 'a thread exits while others wait in __syncthreads at '
catches check two_barriers_meet 'threads of a block meet in two different __syncthreads, the second at '
catches check barrier_meets_shuffle 'deadlock in block (0,0,0): 64 live threads, 48 in __syncthreads'
catches check barrier_meets_shuffle 'thread (0,0,0) waits in __syncthreads at .*cpu_backend_bugs.cu:'
catches check lanes_never_come 'a thread exits while its warp waits for it in a collective at '
catches check lanes_have_exited 'a warp collective names lanes that have exited at '
catches check mask_without_caller 'a lane calls a warp collective that its mask leaves out at '
catches check two_collectives_meet 'lanes of a warp meet in two different collectives, the second at '
catches check misaligned_ldmatrix 'a row address of ldmatrix is not a multiple of 16 bytes at '
catches check misaligned_copy 'an address of cp.async is not a multiple of 16 bytes at '
catches check wait_without_arriving "a thread waits at the cluster's barrier without having arrived at .*cpu_backend_bugs.cu:"
catches check arrives_twice "a thread arrives twice at the cluster's barrier at .*cpu_backend_bugs.cu:"
catches check sends_before_all_have_begun 'a block sends before all of its cluster have begun at .*cpu_backend_bugs.cu:'
catches check mailbox_not_opened 'a mailbox that nobody has opened at .*cpu_backend_bugs.cu:'
catches check more_mail_than_expected 'more was sent to a mailbox than it was opened for at .*cpu_backend_bugs.cu:'
catches check less_mail_than_expected 'deadlock in block'
catches check less_mail_than_expected 'thread (0,0,0) waits in a wait for its cluster at .*cpu_backend_bugs.cu:'
catches check static_in_cluster 'static __shared__ memory in a cluster, whose blocks would share it here'
catches check cluster_barrier_without_cluster "a cluster's barrier in a kernel launched without clusters at "
catches check stack_overrun ''
shows_nan check unwritten_static
shows_nan check unwritten_dynamic
shows_nan check unwritten_global
shows_nan check left_by_another_block
shows_nan check missing_wait

build sanitize "-fsanitize=address,undefined -fno-sanitize-recover=all" "-fsanitize=address,undefined"
catches sanitize global_overrun 'heap-buffer-overflow'
catches sanitize dynamic_overrun 'heap-buffer-overflow'
catches sanitize static_overrun 'index 64 out of bounds'
catches sanitize local_overrun 'stack-buffer-overflow\|insufficient space\|out of bounds'
catches sanitize misaligned_load 'misaligned address'
catches sanitize copy_overrun 'heap-buffer-overflow'
catches sanitize use_after_free 'heap-use-after-free'

# shellcheck disable=SC2086
$CXX $flags -DCUDA_CPU_RACE -I llmc/cpu/include -c llmc/cpu/race_check.cpp -o "$work/race_check.o"
build race "-DCUDA_CPU_RACE -fsanitize=thread" "$work/race_check.o"
catches race missing_barrier 'a write with no barrier after a read in static shared memory by thread (32,0,0)'
catches race missing_barrier 'missing_barrier<true>(float\*) at cpu_backend_bugs.cu:'
catches race missing_second_barrier 'a write with no barrier after a read in dynamic shared memory'
catches race missing_syncwarp 'a read with no barrier after a write in static shared memory'
catches race missing_syncwarp_before_ldmatrix 'a read with no barrier after a write in static shared memory'
catches race missing_barrier_after_wait 'a read of what nobody wrote in static shared memory'
catches race blocks_race 'no barrier .* in global memory by thread (0,0,0) of block (1,0,0)'
catches race atomic_meets_plain 'no barrier .* in global memory'
catches race mail_not_waited_for 'in dynamic shared memory'
catches race mail_of_another_thread 'a read with no barrier after a write in dynamic shared memory'
catches race mail_of_another_thread 'of another block of the cluster'
catches race mail_over_what_is_read 'in dynamic shared memory'
catches race unwritten_static 'a read of what nobody wrote in static shared memory'
catches race left_by_another_block 'a read of what nobody wrote in static shared memory'
catches race unwritten_dynamic 'a read of what nobody wrote in dynamic shared memory'
catches race unwritten_global 'a read of what nobody wrote in global memory'
catches race use_after_free 'a read of what nobody wrote in global memory'

# A missing barrier shows as a result that depends on the schedule.
results() { # of the variant, under each schedule
    for schedule in forward backward random; do CUDA_CPU_SCHEDULE=$schedule "$work/check" missing_barrier "$1"; done
}
run results bug
[ "$(sort -u <<<"$output" | wc -l)" -gt 1 ]
result $? "the schedules show missing_barrier" "$output"
run results correct
[ "$(sort -u <<<"$output" | wc -l)" = 1 ]
result $? "the schedules agree on missing_barrier without the mistake" "$output"

run env CUDA_CPU_SCHEDULE=sideways "$work/check" missing_barrier correct
[ $status = 1 ] && [ "$output" = 'CUDA_CPU_SCHEDULE must be forward, backward or random, not "sideways"' ]
result $? "an unknown schedule is refused" "$output"
run env CUDA_CPU_PROFILE=1 "$work/check" missing_barrier correct
grep -q ' ms  *1 calls  missing_barrier<false>$' <<<"$output"
result $? "the profile names the kernel" "$output"

# No false reports: all kernels without their mistakes, under every check and schedule.
for program in check sanitize race; do
    for schedule in forward backward random; do
        bad=
        for name in $("$work/check"); do
            run env CUDA_CPU_SCHEDULE=$schedule "$work/$program" "$name" correct
            if [ $status != 0 ] || ! grep -q '^sum [0-9.e+]*$' <<<"$output"; then bad="$bad$name: $output"$'\n'; fi
        done
        [ -z "$bad" ]
        result $? "$program reports nothing in kernels without mistakes, $schedule" "$bad"
    done
done

# The compile driver.
cat >"$work/expf.cu" <<'CODE'
#include <cuda_runtime.h>
void apply(float* __restrict__ x, int n) {
    for (int i = 0; i < n; i++) x[i] = __expf(x[i]);
}
CODE
run $nvcc "$work/expf.cu" -o "$work/expf.o" -std=c++20 -O2 -ftree-vectorize -fvect-cost-model=dynamic -march=native -fopenmp
[ $status = 0 ] && ! nm "$work/expf.o" | grep -q ' U .*exp' &&
    objdump -d "$work/expf.o" | sed -n '/<_Z5applyPfi>:/,/^$/p' | grep -q 'ps\b.*[xyz]mm\|fmla.*\.4s\|fmul.*\.4s'
result $? "a loop around __expf is vectorized" "$output"
[ -s "$work/expf.d" ] && grep -q 'cuda_cpu.h' "$work/expf.d" && [ -z "$(find "$work" -name '*.ii')" ]
result $? "cpu_nvcc writes dependencies and leaves no other file" "$(ls "$work")"

refuses() { # the case, the source, what the message must contain
    echo "$2" >"$work/bad.cu"
    run $nvcc "$work/bad.cu" -o "$work/bad.o" -std=c++20 -fopenmp
    [ $status != 0 ] && grep -q "$3" <<<"$output" && [ ! -e "$work/bad.o" ] && [ -z "$(find "$work" -name '*.ii')" ]
    result $? "cpu_nvcc fails on $1" "$output"
}
refuses "a missing header" '#include "no_such_file.h"' 'no_such_file.h'
refuses "a launch that it cannot read" 'void f() { k<<<1, 2>>(3); }' 'bad.cu:1: launch.pl: cannot read this launch'
refuses "a wrong program" $'__global__ void k(int) {}\nvoid f() {\n    k<<<1, 2>>>("text");\n}' 'bad.cu:3:'

finish
