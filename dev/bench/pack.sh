#!/usr/bin/env bash
# pack.sh FOLDER: builds for a GPU that is elsewhere, and collects in FOLDER what gpu_session.sh and compare need there:
# the trainer, the inference program, the tests, the benchmarks and the ladder, the shared libraries that are neither
# CUDA's nor the C and C++ libraries, and tokens to train on. The machine that builds needs nvcc, but no GPU. The
# programs are packed into one file, which makes them a quarter as large, for they have much in common; gpu_session.sh
# unpacks it.
#
#   GPU_ARCH=90a   compute capability to build for (default: 90a, the H100's)
#   MAX_MIB=64     fail if FOLDER becomes larger than this
set -eu -o pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
arch=${GPU_ARCH:-90a}
max_mib=${MAX_MIB:-64}
programs=(train_gpt2cu infer_gpt2cu)
built=(bench decode test_layers test_attention test_attention_cut test_attention_decode test_matmul test_matvec
    test_decode_layer test_sampler test_decode_step test_infer test_model attention_ladder)
# Beside the others, because they do not start where cuDNN is not: its tests, and the benchmark of its attention.
with_cudnn=(bench_cudnn test_attention_cudnn)

die() { printf 'pack.sh: %s\n' "$1" >&2; exit 1; }

[[ ${1:-} == -h || ${1:-} == --help ]] && { sed -n '2,/^set/s/^# \?//p' "${BASH_SOURCE[0]}"; exit 0; }
(($# == 1)) && [[ $1 != -* ]] || die "give one folder, for example: dev/bench/pack.sh /tmp/gpu"
folder=$1
make -C "$root" GPU_ARCH="$arch" "${programs[@]}" "${built[@]/#/build/gpu/}"
if make -C "$root" GPU_ARCH="$arch" "${with_cudnn[@]/#/build/gpu/}"; then
    built+=("${with_cudnn[@]}")
else
    printf 'pack.sh: cuDNN is left out, for it could not be built\n' >&2
fi

mkdir -p "$folder/lib" "$folder/data/gpt2"
folder=$(cd "$folder" && pwd)
for name in "${programs[@]}"; do cp "$root/$name" "$folder/"; done
for name in "${built[@]}"; do cp "$root/build/gpu/$name" "$folder/"; done
cp "$here/gpu_session.sh" "$here/compare" "$here/torch_gpt2.py" "$folder/"

for name in "${programs[@]}" "${built[@]}"; do
    strip "$folder/$name"
    ldd "$folder/$name" | awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}'
done | sort -u | while read -r library path; do
    case $library in
        libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | libstdc++.so.* | libgcc_s.so.*) ;;
        libcu* | libnv*) ;;
        *) cp -L "$path" "$folder/lib/$library" ;;
    esac
done

# Same code in two programs is found only as far back as the dictionary reaches.
tar -cf - -C "$folder" "${programs[@]}" "${built[@]}" | xz --lzma2=preset=6,dict=128MiB >"$folder/programs.tar.xz"
(cd "$folder" && rm "${programs[@]}" "${built[@]}")

dataset=$(cat "$root/data/default_dataset" 2>/dev/null) || die "there is no data yet: run data/prepare"
cp "$root/data/default_dataset" "$folder/data/"
cp "$root/data/$dataset"_*_{train,val}_*.bin "$folder/data/"
if [ -f "$root/data/gpt2/vocab.bpe" ]; then
    cp "$root/data/gpt2/encoder.json" "$root/data/gpt2/vocab.bpe" "$folder/data/gpt2/"
fi
compgen -G "$folder/data/${dataset}_gpt2_train_*.bin" >/dev/null ||
    die "there are no GPT-2 tokens of $dataset, which the training run on the GPU needs: run data/fetch gpt2 && data/prepare"

mib=$(($(du -sk "$folder" | cut -f1) / 1024))
printf '%s: %d MiB for compute capability %s\n' "$folder" "$mib" "$arch"
ls "$folder" "$folder/lib"
((mib < max_mib)) || die "$folder has $mib MiB, and $max_mib is the limit: du -a $folder says what is large"
printf 'there: %s/gpu_session.sh\n' "$folder"
