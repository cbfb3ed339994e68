#!/usr/bin/env bash
# make on a machine with an NVIDIA GPU and without nvcc: what it says, and what `make cuda` does about it. The packages
# are small ones of our own, nvidia-smi and nvcc are scripts; nothing is fetched from anywhere.
set -u
repository=$(cd "$(dirname "$0")/.." && pwd)
source "$repository/tests/script.sh"
mkdir -p "$work/repo/data" "$work/repo/dev" "$work/bin" "$work/mirror"
cp "$repository/data/fetch" "$work/repo/data/"
cp "$repository/dev/get_cuda" "$repository/dev/deps" "$work/repo/dev/"
sed "s|/usr/local/cuda|$work/none|" "$repository/Makefile" >"$work/repo/Makefile"
cd "$work/repo" || exit 1
unset DATA_MIRROR NVCC MAKEFLAGS MAKELEVEL
# Everything on PATH but nvcc, and the nvidia-smi of this test.
for folder in ${PATH//:/ }; do
    for program in "$folder"/*; do
        name=${program##*/}
        case $name in nvcc | nvidia-smi) ;; *) [ -e "$work/bin/$name" ] || ln -s "$program" "$work/bin/$name" 2>/dev/null ;; esac
    done
done
export PATH=$work/bin
said() { grep -qF -- "$1" out; }
fails() { ! "$@"; }
driver() { # of the version $1, for GPUs of compute capability $2 (8.9); none if there is no GPU
    rm -f "$work/bin/nvidia-smi"
    [ "$1" = none ] && return
    printf '#!/bin/sh\ncase $* in *compute_cap*) printf "%%s\\n" %s ;; *) echo "| NVIDIA-SMI 1  Driver Version: 1  CUDA Version: %s |" ;; esac\n' "${2:-8.9}" "$1" >"$work/bin/nvidia-smi"
    chmod +x "$work/bin/nvidia-smi"
}
value() { make -s --eval 'show: ; @echo "[$('"$1"')]"' show; }
nvcc() { value NVCC; }
without_nvcc() { rm -f build/no_nvcc; mkdir -p build; make -s build/no_nvcc >out 2>&1; }
get() { make -s cuda >out 2>&1; }
machine() { # of the architecture $1
    rm -f "$work/bin/uname"
    printf '#!/bin/sh\necho %s\n' "$1" >"$work/bin/uname"
    chmod +x "$work/bin/uname"
}

# Wheels as NVIDIA's are: one tree in several packages, no program marked as one.
python3 - "$work/mirror" <<'END'
import sys, zipfile
def wheel(name, files):
    with zipfile.ZipFile(f"{sys.argv[1]}/{name}.whl", "w") as z:
        for path, text in files.items():
            z.writestr("nvidia/cu13/" + path, text)
for kind in "", "arm_":
    nvcc = f"#!/bin/sh\nprintf 'first\\n{kind}release 13.0\\nlast\\n'\n"
    wheel(kind + "compiler", {"bin/nvcc": nvcc, "nvvm/bin/cicc": "#!/bin/sh\n"})
    wheel(kind + "library", {"lib/libcublasLt.so.13": "a library", "include/cublasLt.h": "a header"})
END
package() { # $2 of the set $1
    printf '%s\t%s/%s.whl\tfile\t%s\t%s\tfile://%s\n' "$1" "$1" "$2" "$(stat -c %s "$work/mirror/$2.whl")" \
        "$(sha256sum <"$work/mirror/$2.whl" | cut -d' ' -f1)" "$work/mirror/$2.whl"
}
for name in compiler library; do
    package cuda $name
    package cuda-aarch64 arm_$name
done >data/manifest.tsv
machine x86_64

driver none
check "no GPU: builds for the CPU" without_nvcc
check "no GPU: says so" said "no nvcc was found: building for the CPU alone"
check "no GPU: no advice for one" fails said "make cuda"
driver 13.0
check "a GPU: builds for the CPU" without_nvcc
check "a GPU: says what to do for it" said "make cuda"
driver 13.0 7.5
check "a GPU that is too old: builds for the CPU" without_nvcc
check "a GPU that is too old: no advice for it" fails said "make cuda"
check "a GPU that is too old is none" test "$(value GPU)$(value HAS_GPU)" = "[][]"
driver 13.0 "6.1 8.9 8.6 9.0"
check "of several GPUs the oldest that will do" test "$(value GPU)" = "[86]"
driver 13.0 "No devices were found"
check "a driver without a GPU" test "$(value GPU)" = "[]"
driver 13.0
check "no nvcc yet" test "$(nvcc)" = "[]"
needs_nvcc() { make -s need_nvcc >out 2>&1; }
check "what needs nvcc fails" eval '! needs_nvcc'
check "what needs nvcc: how to get it" said "install the CUDA Toolkit, or: make cuda"

printf '#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n' >"$work/bin/nvcc"
chmod +x "$work/bin/nvcc"
check "an nvcc that is too old is none" test "$(nvcc)" = "[]"
check "an nvcc that is too old: builds for the CPU" without_nvcc
check "an nvcc that is too old: which, and what would do" said "$work/bin/nvcc is of CUDA 11, and 12 is the oldest"
sed -i s/11/12/g "$work/bin/nvcc"
check "an nvcc that will do" test "$(nvcc)" = "[$work/bin/nvcc]"
check "what needs nvcc has it" needs_nvcc
printf '#!/bin/sh\n[ $1 = --version ] && echo "release 12.4" || printf "compute_%%s\\n" 52 75 80 86 89 90 90a\n' >"$work/bin/nvcc"
for case in 8.0:80 8.6:86 8.9:89 9.0:90a 10.0:90 12.0:90 7.5:80 "9.0 9.0":90a "9.0 12.0":90 "12.0 8.9 9.0":89; do
    driver 13.0 "${case%:*}"
    check "a GPU of ${case%:*}, an nvcc that knows 9.0: compiles for ${case#*:}" test "$(value GPU_ARCH)" = "[${case#*:}]"
done
driver none
check "no GPU: nvcc compiles for 8.0" test "$(value GPU_ARCH)" = "[80]"
check "unless something else is said" test "$(GPU_ARCH=90a value GPU_ARCH)" = "[90a]"
check "make by itself makes the programs" test "$(value .DEFAULT_GOAL)" = "[all]"
check "make USE_CUDNN=1, SAN=1, RACE=1 are asked for" test "$(USE_CUDNN=1 value CUDNN_OBJECT)$(SAN=1 value BUILD)$(RACE=1 value RACE)" = "[build/attention_cudnn.o][build/san][1]"
check "with 0 they are not" test "$(USE_CUDNN=0 value CUDNN_OBJECT)$(SAN=0 value BUILD)" = "[][build/test]"
check "warnings are errors" test "$(value WARN)$(value GPU_WARN)" = "[-Wall -Wextra -Werror -Wno-restrict][-Werror all-warnings]"
newer() { make -s GCC=99 CUDA=99 --eval 'show: ; @echo "[$('"$1"')]"' show; }
check "but not for compilers newer than those tried" test "$(newer WARN)$(newer GPU_WARN)" = "[-Wall -Wextra  -Wno-restrict][]"
rm "$work/bin/nvcc"

driver 12.4
check "a driver that is too old" fails get
check "a driver that is too old: its version is named" said "up to CUDA 12.4"
check "a driver that is too old: what to install" said "nvidia-cuda-toolkit"
check "a driver that is too old: nothing was fetched" test ! -e data/cuda -a ! -e build/cuda

driver 13.0
mv "$work/mirror/library.whl" "$work/library.whl"
check "a package that cannot be had" fails get
check "a package that cannot be had: no compiler is left" test ! -e build/cuda -a "$(nvcc)" = "[]"
mv "$work/library.whl" "$work/mirror/library.whl"
check "make cuda" get
check "make cuda: the compiler runs" said "release 13.0"
check "make cuda: make finds it" test "$(nvcc)" = "[build/cuda/bin/nvcc]"
check "make cuda: its helper can be run" test -x build/cuda/nvvm/bin/cicc
check "make cuda: the library is found by its name" cmp -s build/cuda/lib64/libcublasLt.so build/cuda/lib/libcublasLt.so.13
check "make cuda: headers" test -s build/cuda/include/cublasLt.h
check "make cuda: nothing half-made is left" test ! -e build/cuda.part
check "make cuda again" get
driver none
check "make cuda without a GPU" get
check "make cuda without a GPU: says so" said "found no NVIDIA GPU here"
machine aarch64
check "make cuda on aarch64" get
check "make cuda on aarch64: its own packages" said "arm_release 13.0"
machine ppc64le
check "make cuda on another processor" fails get
check "make cuda on another processor: which" said "this machine is ppc64le"
finish
