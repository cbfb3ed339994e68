# make train_gpt2cu     the trainer, for this machine's GPU if there is one and always for the CPU, and its data
#   USE_CUDNN=1         with cuDNN's attention for lambda = 0, on a GPU
# make infer_gpt2cu     the program that generates text and measures what condensed attention buys
# make test             every test; SAN=1: under AddressSanitizer and UBSan; RACE=1: kernels under the race checker;
#                       PTX=1: those with kernels as nvcc compiles them, its PTX run on the CPU (tests/ptx)
# make ladder           build/attention_ladder: attention from the naive kernel to the fast one, checked and timed
# make bench            times of the machine, each kernel and whole steps; BENCH="--quick": flags, see dev/bench/README.md
# make decode-bench     times of decoding token by token; DECODE="--quick": flags, see there
# make cuda             get NVIDIA's compiler into build/cuda, where the CUDA Toolkit is not installed
# make gpu-compile      compile the GPU code for sm_80 and sm_90a, on a machine that need not have a GPU
#   CXX=g++-12 NVCC=... the compilers; NVCC= for the CPU alone. GPU_ARCH=90a: the GPU to compile for, if not the one here
# make readme           put the table of flags into the README
# make format / make clean
#
# What is missing is found by dev/deps, which installs it where it may and otherwise says what to install.
.DEFAULT_GOAL = all

# A job for each processor, of those that have 2 GB of free memory to compile in; make -j1: one after the other.
ifeq ($(MAKELEVEL),0)
  MAKEFLAGS += -j$(shell awk -v most="$$(nproc)" \
      '/^MemAvailable/ { n = int($$2 / 2e6) } END { print n < 1 ? 1 : n < most ? n : most }' /proc/meminfo)
endif

CXX ?= g++
# The first nvcc of CUDA 12 or newer.
NVCC_PLACES = "$$(command -v nvcc)" /usr/local/cuda/bin/nvcc build/cuda/bin/nvcc
CUDA_RELEASE = "$$("$$nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')"
ifndef NVCC
  NVCC := $(shell for nvcc in $(NVCC_PLACES); do [ -x "$$nvcc" ] && [ $(CUDA_RELEASE) -ge 12 ] && echo "$$nvcc" && break; done 2>/dev/null)
endif

# ---- flags ----

, := ,
# SAN=0 is as if it were not given.
given = $(filter-out 0,$(1))

# Warnings are errors for the compilers that this has been tried with. A newer one may warn of what is none, and that is not
# for who wants to train to mend.
TRIED_GCC = 11 12 13 14 15
TRIED_CUDA = 12 13
GCC := $(shell echo __GNUC__ | $(CXX) -E -P -x c++ - 2>/dev/null)
CUDA := $(shell nvcc="$(NVCC)"; [ -z "$$nvcc" ] || echo $(CUDA_RELEASE))
WARN = -Wall -Wextra $(if $(filter $(TRIED_GCC),$(GCC)),-Werror)
GPU_WARN = $(if $(filter $(TRIED_CUDA),$(CUDA)),-Werror all-warnings)
# g++ 12 reports "literal" + std::string as overlapping copies (its bug 105651)
WARN += -Wno-restrict
# Where this user may not install libraries, dev/deps unpacks them in build/packages (maybe after make read this line, so the
# shell is asked when a command runs). A library there finds another one by an rpath of the old kind alone.
UNPACKED = -isystem build/packages/include
UNPACKED_LIBS = $(shell [ ! -d build/packages ] || \
    echo "-Lbuild/packages/lib -Xlinker --disable-new-dtags -Xlinker -rpath -Xlinker '$(CURDIR)/build/packages/lib'")
# What -O3 adds to this takes a third longer to compile, and in fp32, which the CPU trains in, is no faster.
CPU_FLAGS = -std=c++20 -O2 -ftree-vectorize -fvect-cost-model=dynamic -funswitch-loops -march=native -fopenmp $(UNPACKED) $(WARN)
CPU_LIBS = $(UNPACKED_LIBS) -fopenmp -lopenblas -lpcre2-8 -lsnappy
# What is not the GPU's: files, tokens, flags. It is compiled once, for all programs, and not for this processor alone: those
# for a GPU may be built elsewhere. -O2 takes a sixth longer, and tokenizes and loads no faster.
HOST_FLAGS = -std=c++20 -O1 -fopenmp $(UNPACKED) $(WARN)
HOST_OBJECTS = $(patsubst llmc/%.cpp,%.o,$(filter-out llmc/attention_cudnn.cpp,$(wildcard llmc/*.cpp)))

# Compute capability of the GPU here (80: 8.0), if there is one that is new enough; of several the oldest such, whose code
# the others can run.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | awk '/^[0-9]+$$/ && $$1 >= 80' | sort -n)
GPU := $(firstword $(GPUS))
# What is compiled for: this GPU, or the newest before it that nvcc knows; where there is none, 8.0. Newer GPUs translate
# that on loading. Hopper's own instructions are those of 9.0a, which nothing newer takes: where there is something newer as
# well, they are left out.
ifndef GPU_ARCH
  GPU_ARCH := $(shell "$(NVCC)" --list-gpu-arch 2>/dev/null | tr -dc '0-9\n' | awk -v gpus="$(or $(GPUS),80)" \
      'BEGIN { n = split(gpus, gpu, " ") } $$1 <= gpu[1] + 0 && $$1 > best { best = $$1 } \
       END { print best < 80 ? 80 : best == 90 && gpu[n] == 90 ? "90a" : best }')
endif
FOR_ARCH = -arch=sm_$(1) $(if $(filter 90a,$(1)),-DCOMPILED_FOR_SM_90A)
CUDA_HOME = $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
# -O1 is for the host's code, which has nothing to do that takes long; the GPU's is optimized in any case.
NVCC_FLAGS = -std=c++20 -O1 $(call FOR_ARCH,$(GPU_ARCH)) $(UNPACKED) $(GPU_WARN) -Xcompiler -fopenmp,-Wall,-Wextra,-Wno-restrict
# What nlohmann-json declares for ranges comes out of nvcc 12.0 as something that g++ does not take.
NVCC_FLAGS += -DJSON_HAS_RANGES=0
NVCC_LIBS = $(UNPACKED_LIBS) -L$(CUDA_HOME)/lib64 -lcublasLt -lpcre2-8 -lsnappy -lgomp -Xlinker -rpath,$(CUDA_HOME)/lib64,-rpath,'$$ORIGIN'
ifneq ($(call given,$(USE_CUDNN)),)
  NVCC_FLAGS += -DUSE_CUDNN
  NVCC_LIBS += $(CUDNN_LIBS)
  CUDNN_OBJECT = build/attention_cudnn.o
endif

# Tests are built with the CPU backend's checks; each kind of build has its own folder. More optimization than this would
# take longer to compile than it saves; kernels as they are built for the user, with -O2, are what the scripts run.
CHECKED = -std=c++20 -O1 -g1 -march=native -fopenmp $(UNPACKED) $(WARN) -DCUDA_CPU_CHECK -DEVERY_KERNEL \
    -DDOCTEST_CONFIG_SUPER_FAST_ASSERTS
ifneq ($(call given,$(SAN)),)
  BUILD = build/san
  # Sanitizers' calls take long to optimize; with -Og tests compile in half the time, and hardly run longer.
  SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
  TEST_FLAGS = $(subst -O1,-Og,$(CHECKED)) $(SANITIZE)
  TEST_LIBS = $(CPU_LIBS) -fsanitize=address,undefined
  TESTED_HOST = build/san/host.a
else
  BUILD = build/test
  TEST_FLAGS = $(CHECKED)
  TEST_LIBS = $(CPU_LIBS)
  TESTED_HOST = build/host.a
endif
RACE_FLAGS = $(CHECKED) -Wno-tsan -DCUDA_CPU_RACE

# What nvcc compiles depends on, how it compiles, and how it links.
GPU_NEEDS = build/deps build/gpu_arch Makefile | need_nvcc build/gpu
COMPILE_GPU = $(NVCC) $(NVCC_FLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@
# Linked by our compiler, not by nvcc's: that may be an older one, whose library lacks what ours calls (on Debian 13).
LINK_GPU = $(NVCC) -ccbin "$$(command -v $(lastword $(CXX)))" -allow-unsupported-compiler $(filter %.o %.a,$^) $(NVCC_LIBS) -o $@
build/gpu:
	@mkdir -p $@
# (Without this, a command that begins with a flag in nvcc's place is one whose failure make ignores.)
.PHONY: need_nvcc
need_nvcc:
	@[ -n "$(NVCC)" ] || { echo "this needs nvcc of CUDA 12 or newer: install the CUDA Toolkit, or: make cuda" >&2; exit 1; }

# ---- the programs ----

.PHONY: all test cuda gpu-compile readme format format-check clean FORCE
.DELETE_ON_ERROR:
PROGRAMS = train_gpt2 infer_gpt2
all: $(PROGRAMS:=cu)

# PROGRAMcu runs on the GPU, and where there is none becomes PROGRAMcpu, which is built beside it.
ifneq ($(NVCC),)
$(PROGRAMS:=cu): %cu: build/%_cuda.o build/commit.o $(CUDNN_OBJECT) build/host.a | %cpu data/default_dataset
	$(LINK_GPU)
else
$(PROGRAMS:=cu): %cu: %cpu build/no_nvcc | data/default_dataset
	cp $< $@
build/no_nvcc:
	@for nvcc in $(NVCC_PLACES); do [ ! -x "$$nvcc" ] || [ $(CUDA_RELEASE) -ge 12 ] 2>/dev/null || echo "$$nvcc is of CUDA "$(CUDA_RELEASE)", and 12 is the oldest that will do"; done
	@echo "no nvcc was found: building for the CPU alone"
	@[ -z "$(GPU)" ] || echo "For the NVIDIA GPU here: make cuda (a download of some 600 MB, no root needed), or install the CUDA Toolkit; then make again"
	@touch $@
endif

# (Of what a program needs, only objects are linked: a folder built by an older version may name sources, too.)
$(PROGRAMS:=cpu): %cpu: build/%_cpu.o build/commit.o build/host.a
	$(CXX) $(filter %.o %.a,$^) $(CPU_LIBS) -o $@

build/%_cpu.o: %.cu build/deps Makefile
	llmc/cpu/cpu_nvcc $< -o $@ $(CPU_FLAGS)

build/%_cuda.o: %.cu $(GPU_NEEDS)
	$(COMPILE_GPU)

# Rewritten only when the architecture changes, so that a new GPU means a new build.
build/gpu_arch: FORCE | build/deps
	@echo '$(NVCC_FLAGS)' | cmp -s - $@ || echo '$(NVCC_FLAGS)' >$@

# The commit that runs record; linked in, so that a commit does not recompile the kernels.
build/commit.cpp: FORCE | build/deps
	@commit=$$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown); \
	 printf 'extern const char* const kGitCommit;\nconst char* const kGitCommit = "%s";\n' "$$commit" | cmp -s - $@ || \
	 printf 'extern const char* const kGitCommit;\nconst char* const kGitCommit = "%s";\n' "$$commit" >$@
build/commit.o: build/commit.cpp
	$(CXX) -c $< -o $@

build/host/%.o: llmc/%.cpp build/deps Makefile
	@mkdir -p build/host
	$(CXX) $(HOST_FLAGS) -MMD -MF $(@:.o=.d) -c $< -o $@
build/host.a: $(HOST_OBJECTS:%=build/host/%)
	@rm -f $@
	$(AR) rcs $@ $^

build/tokenize.o: data/tokenize.cpp build/deps Makefile
	$(CXX) $(HOST_FLAGS) -MMD -MF $(@:.o=.d) -c $< -o $@
build/tokenize: build/tokenize.o build/host.a
	$(CXX) $(filter %.o %.a,$^) $(UNPACKED_LIBS) -fopenmp -lpcre2-8 -o $@

# Called as long as something is missing: a network or a mirror may be there by now, for which it looks once a day.
data/default_dataset: $(if $(wildcard data/tinyshakespeare_gpt2_train_000000.bin),,FORCE) | build/tokenize
	@data/prepare || [ -s $@ ]

# NVIDIA's compiler and cuBLAS, where the toolkit is not installed.
cuda:
	dev/get_cuda

build/deps: dev/deps
	@mkdir -p build
	@CXX="$(CXX)" dev/deps
	@touch $@

# ---- cuDNN, only with USE_CUDNN=1: version 9, from where it is installed or from CUDNN_HOME ----

# NVIDIA's headers that describe graphs to it: the user's CUDNN_FRONTEND, or fetched. They are large, so one source includes
# them, and the host's compiler reads it.
CUDNN_FRONTEND ?= build/cudnn_frontend/include
CUDNN_INCLUDES = -isystem $(CUDNN_FRONTEND) $(if $(CUDNN_HOME),-isystem $(CUDNN_HOME)/include) -isystem $(CUDA_HOME)/include
CUDNN_LIBS = $(if $(CUDNN_HOME),-L$(CUDNN_HOME)/lib -Xlinker -rpath$(,)$(CUDNN_HOME)/lib) -lcudnn -ldl
build/cudnn_frontend/include: | build/deps
	data/fetch cudnn-frontend
	python3 -m zipfile -e data/cudnn-frontend.whl build/cudnn_frontend
	@touch $@
build/attention_cudnn.o: llmc/attention_cudnn.cpp $(CUDNN_FRONTEND) build/deps Makefile
	@echo '#include <cudnn_graph.h>' | $(CXX) $(CUDNN_INCLUDES) -fsyntax-only -x c++ - 2>/dev/null || { echo \
	    "USE_CUDNN=1: cudnn_graph.h of cuDNN 9 was not found: install it, or say CUDNN_HOME=the folder that has include/ and lib/" >&2; exit 1; }
	$(CXX) -std=c++20 -O1 $(WARN) $(CUDNN_INCLUDES) -MMD -MF $(@:.o=.d) -c $< -o $@

# Does cuDNN have kernels for attention's graphs? See dev/check_cudnn.cpp.
.PHONY: cudnn-check
cudnn-check: build/check_cudnn
	$<
build/check_cudnn: dev/check_cudnn.cpp $(CUDNN_FRONTEND) build/deps Makefile
	$(CXX) -std=c++20 -O0 $(WARN) $(CUDNN_INCLUDES) -MMD -MF $@.d $< -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 \
	    -lcudart $(subst -Xlinker ,-Wl$(,),$(CUDNN_LIBS)) -o $@

# ---- benchmarks, ladder: on the GPU where there is one, otherwise on the CPU backend ----

HAS_GPU := $(and $(NVCC),$(GPU))
BENCHES = bench decode
.PHONY: bench decode-bench ladder
bench: $(if $(HAS_GPU),build/gpu/bench,build/bench)
	OMP_WAIT_POLICY=passive $< $(BENCH)
decode-bench: $(if $(HAS_GPU),build/gpu/decode,build/decode)
	OMP_WAIT_POLICY=passive $< $(DECODE)
$(BENCHES:%=build/%.o): build/%.o: dev/bench/%.cu build/deps Makefile
	llmc/cpu/cpu_nvcc $< -o $@ $(CPU_FLAGS) -DEVERY_KERNEL
$(BENCHES:%=build/%): build/%: build/%.o build/commit.o build/host.a
	$(CXX) $^ $(CPU_LIBS) -o $@
$(BENCHES:%=build/gpu/%.o): build/gpu/%.o: dev/bench/%.cu $(GPU_NEEDS)
	$(COMPILE_GPU) -DEVERY_KERNEL
$(BENCHES:%=build/gpu/%): build/gpu/%: build/gpu/%.o build/commit.o $(CUDNN_OBJECT) build/host.a
	$(LINK_GPU)
# The benchmark that also times cuDNN's attention, beside the one that does without the library.
build/gpu/bench_cudnn.o: dev/bench/bench.cu $(GPU_NEEDS)
	$(COMPILE_GPU) -DEVERY_KERNEL -DUSE_CUDNN
build/gpu/bench_cudnn: build/gpu/bench_cudnn.o build/commit.o build/attention_cudnn.o build/host.a
	$(LINK_GPU) $(CUDNN_LIBS)

ladder: build/attention_ladder
build/gpu/attention_ladder.o: dev/cuda/attention_ladder.cu $(GPU_NEEDS)
	$(COMPILE_GPU)
build/gpu/attention_ladder $(if $(HAS_GPU),build/attention_ladder): build/gpu/attention_ladder.o build/host.a
	$(LINK_GPU)
ifeq ($(HAS_GPU),)
# Its times on the CPU backend say nothing.
build/attention_ladder.o: dev/cuda/attention_ladder.cu build/deps Makefile
	llmc/cpu/cpu_nvcc $< -o $@ $(subst -O2,-O1,$(CPU_FLAGS))
build/attention_ladder: build/attention_ladder.o build/host.a
	$(CXX) $^ $(CPU_LIBS) -o $@
endif

# ---- tests ----

HOST_TESTS = $(basename $(notdir $(wildcard tests/test_*.cpp)))
KERNEL_TESTS = test_layers test_matmul test_attention test_attention_cut test_attention_decode test_matvec test_decode_layer test_sampler
CU_TESTS = $(basename $(notdir $(wildcard tests/test_*.cu)))
FUZZERS = $(basename $(notdir $(wildcard tests/fuzz_*.cpp)))
SCRIPTS = $(notdir $(wildcard tests/test_*.sh))

# Tests of the host's code do little themselves: -Og compiles as fast as no optimization, and runs in half the time.
$(BUILD)/%.o: tests/%.cpp build/deps Makefile
	@mkdir -p $(BUILD)
	$(CXX) $(patsubst -O%,-Og,$(TEST_FLAGS)) -MMD -MF $(@:.o=.d) -c $< -o $@
# Tests are of the code as it is built for the user, but for the sanitizers, which need code of their own.
build/san/host/%.o: llmc/%.cpp build/deps Makefile
	@mkdir -p build/san/host
	$(CXX) $(TEST_FLAGS) -MMD -MF $(@:.o=.d) -c $< -o $@
build/san/host.a: $(HOST_OBJECTS:%=build/san/host/%)
	@rm -f $@
	$(AR) rcs $@ $^
$(BUILD)/%.o: tests/%.cu build/deps Makefile
	@mkdir -p $(BUILD)
	llmc/cpu/cpu_nvcc $< -o $@ $(TEST_FLAGS)
# make would remove them, and then compile all tests again when only the host's code has changed.
.PRECIOUS: $(BUILD)/%.o build/race/%.o build/gpu/%.o build/ptx/%.o
# The CPU backend's own cudnn_frontend.h, not NVIDIA's.
$(BUILD)/attention_cudnn.o: llmc/attention_cudnn.cpp build/deps Makefile
	@mkdir -p $(BUILD)
	llmc/cpu/cpu_nvcc $< -o $@ $(TEST_FLAGS)
# In these tests there is more to compile than to run.
$(addprefix $(BUILD)/,$(addsuffix .o,test_model test_infer test_decode_step test_attention test_layers test_matmul test_cpu_backend)): \
    TEST_FLAGS := $(subst -O1,-Og,$(TEST_FLAGS))
$(BUILD)/test_attention.o: TEST_FLAGS += -DUSE_CUDNN
$(BUILD)/test_attention: $(BUILD)/attention_cudnn.o
$(BUILD)/test_%: $(BUILD)/test_%.o $(BUILD)/doctest_main.o build/commit.o $(TESTED_HOST)
	$(CXX) $^ $(TEST_LIBS) -o $@
$(BUILD)/fuzz_%: $(BUILD)/fuzz_%.o build/commit.o $(TESTED_HOST)
	$(CXX) $^ $(TEST_LIBS) -o $@

# The race checker takes the place of ThreadSanitizer's run-time library: instrument, but do not link it.
build/race/%.o: tests/%.cu build/deps Makefile
	@mkdir -p build/race
	llmc/cpu/cpu_nvcc $< -o $@ $(RACE_FLAGS) -fsanitize=thread
build/race/test_attention.o build/race/test_layers.o: RACE_FLAGS := $(subst -O1,-Og,$(RACE_FLAGS))
build/race/race_check.o: llmc/cpu/race_check.cpp build/deps Makefile
	@mkdir -p build/race
	$(CXX) $(subst -O1,-O2,$(RACE_FLAGS)) -MMD -MF $(@:.o=.d) -c $< -o $@
build/race/%: build/race/%.o build/race/race_check.o build/test/doctest_main.o build/host.a
	$(CXX) $^ $(CPU_LIBS) -ldl -o $@

# The same kernel tests on the GPU, where there is one.
build/gpu/%.o: tests/%.cu $(GPU_NEEDS)
	$(COMPILE_GPU) -DEVERY_KERNEL
# (Not build/test's doctest_main.o, which is for this machine's processor: the GPU may be in another.)
build/gpu/doctest_main.o: tests/doctest_main.cpp $(GPU_NEEDS)
	$(CXX) $(HOST_FLAGS) -DDOCTEST_CONFIG_SUPER_FAST_ASSERTS -MMD -MF $(@:.o=.d) -c $< -o $@
build/gpu/test_%: build/gpu/test_%.o build/gpu/doctest_main.o build/commit.o $(CUDNN_OBJECT) build/host.a
	$(LINK_GPU)
# test_attention with cuDNN's cases, beside the one that does without the library.
build/gpu/test_attention_cudnn.o: tests/test_attention.cu $(GPU_NEEDS)
	$(COMPILE_GPU) -DEVERY_KERNEL -DUSE_CUDNN
build/gpu/test_attention_cudnn: build/gpu/test_attention_cudnn.o build/gpu/doctest_main.o build/commit.o build/attention_cudnn.o build/host.a
	$(LINK_GPU) $(CUDNN_LIBS)
GPU_TESTS = $(if $(HAS_GPU),$(addprefix build/gpu/,$(filter-out test_cpu_backend,$(CU_TESTS))))

# Tests and programs as nvcc compiles them for a GPU, up to PTX, which tests/ptx runs in a GPU's place. By hand also
# build/ptx/test_model, build/ptx/test_infer (minutes) and build/ptx/train_gpt2.
PTX_ARCH = 90a
COMPILE_PTX = $(GPU_COMPILE) -O1 -gencode arch=compute_$(PTX_ARCH)$(,)code=compute_$(PTX_ARCH) --no-compress \
    $(if $(filter 90a,$(PTX_ARCH)),-DCOMPILED_FOR_SM_90A) -DJSON_HAS_RANGES=0 -Xcompiler -fopenmp -MMD -MP -MF $(@:.o=.d) -c $< -o $@
PTX_MACHINE = $(addprefix build/ptx/,parser.o instructions.o products.o overlap.o machine.o runtime.o cublas.o)
build/ptx:
	@mkdir -p $@
build/ptx/test_%.o: tests/test_%.cu build/deps Makefile | need_nvcc build/ptx
	$(COMPILE_PTX) -DEVERY_KERNEL
build/ptx/%_gpt2.o: %_gpt2.cu build/deps Makefile | need_nvcc build/ptx
	$(COMPILE_PTX)
build/ptx/%.o: tests/ptx/%.cpp build/deps Makefile | build/ptx
	$(CXX) -std=c++20 -O2 -march=native -ffp-contract=off $(WARN) -isystem $(CUDA_HOME)/include -MMD -MF $(@:.o=.d) -c $< -o $@
build/ptx/cublas.o: tests/ptx/cublas.cpp build/deps Makefile | build/ptx
	llmc/cpu/cpu_nvcc $< -o $@ $(CPU_FLAGS)
# The machine first: what it has at hand is made before the tests register their kernels.
LINK_PTX = $(CXX) $(PTX_MACHINE) $(filter-out $(PTX_MACHINE),$^) $(CPU_LIBS) -ldl -o $@
build/ptx/test_%: build/ptx/test_%.o $(PTX_MACHINE) build/gpu/doctest_main.o build/commit.o build/host.a
	$(LINK_PTX)
build/ptx/%_gpt2: build/ptx/%_gpt2.o $(PTX_MACHINE) build/commit.o build/host.a
	$(LINK_PTX)

ifneq ($(call given,$(PTX)),)
# (In a random order, for which tests have fewer cases.)
PTX_TESTS = $(KERNEL_TESTS) test_decode_step
test: $(addprefix build/ptx/,$(PTX_TESTS))
	tests/run $(addprefix CUDA_CPU_SCHEDULE=random:,$^)
else ifneq ($(call given,$(RACE)),)
test: $(addprefix build/race/,$(KERNEL_TESTS))
	tests/run $^
else ifneq ($(call given,$(SAN)),)
SAN_TESTS = $(addprefix $(BUILD)/,$(filter-out $(SKIP),$(CU_TESTS) $(HOST_TESTS) $(FUZZERS)))
test: $(SAN_TESTS)
	tests/run $^
else
# Of the programs for the GPU only those that were built before are brought up to date: the tests need none.
test: $(PROGRAMS:=cpu) $(wildcard $(PROGRAMS:=cu)) $(addprefix $(BUILD)/,$(HOST_TESTS) $(CU_TESTS) $(FUZZERS)) \
      $(addprefix build/race/,$(KERNEL_TESTS)) $(GPU_TESTS) build/tokenize build/attention_ladder
	@CXX="$(CXX)" dev/deps tests
	tests/run $(addprefix tests/,$(SCRIPTS)) $(addprefix build/race/,$(KERNEL_TESTS)) \
	    $(addprefix $(BUILD)/,$(HOST_TESTS) $(CU_TESTS) $(FUZZERS)) \
	    $(foreach s,backward random,$(addprefix CUDA_CPU_SCHEDULE=$(s):$(BUILD)/,$(KERNEL_TESTS))) \
	    $(GPU_TESTS) build/attention_ladder
endif

# The kernels as a GPU runs them, all of them, in both precisions; of tests and benchmarks the code of their own, as far as
# PTX. Host code is only looked at: the programs have it compiled.
GPU_COMPILE_ARCHS = 80 90a
COMPILED_ONLY = $(KERNEL_TESTS:%=tests/%.cu) dev/cuda/attention_ladder.cu $(BENCHES:%=dev/bench/%.cu)
GPU_COMPILE = $(NVCC) -std=c++20 $(UNPACKED) $(GPU_WARN) -Xcompiler -Wno-restrict
gpu-compile: $(foreach a,$(GPU_COMPILE_ARCHS),$(PROGRAMS:%=build/gpu/sm_$(a)/%.cubin)) \
             $(COMPILED_ONLY:%=build/gpu/compiled/%.ptx)
define COMPILE_FOR
build/gpu/sm_$(1)/%.cubin: %.cu build/deps FORCE | need_nvcc
	@mkdir -p $$(@D)
	$$(GPU_COMPILE) $(call FOR_ARCH,$(1)) --cubin $$< -o $$@
endef
$(foreach a,$(GPU_COMPILE_ARCHS),$(eval $(call COMPILE_FOR,$(a))))
build/gpu/compiled/%.ptx: % build/deps FORCE | need_nvcc
	@mkdir -p $(@D)
	$(GPU_COMPILE) -DEVERY_KERNEL -arch=compute_80 -Xcicc -O0 --ptx $< -o $@

# ---- housekeeping ----

readme: $(PROGRAMS:=cpu)
	./train_gpt2cpu --help-markdown | dev/put_table README.md flags
	./infer_gpt2cpu --help-markdown | dev/put_table README.md infer-flags

FORMATTED = $(wildcard *.cu dev/*.cpp dev/*/*.cu dev/*/*.cuh dev/*/*.h llmc/*.h llmc/*.cpp llmc/*.cuh llmc/cpu/*.h llmc/cpu/*.cpp llmc/cpu/include/*.h data/*.cpp tests/*.cpp tests/*.cu tests/*.h tests/ptx/*.cpp tests/ptx/*.h)
format:
	clang-format -i $(FORMATTED)
format-check:
	clang-format --dry-run --Werror $(FORMATTED)

clean:
	rm -rf build $(PROGRAMS:=cu) $(PROGRAMS:=cpu)

-include $(wildcard build/*.d build/*/*.d build/san/host/*.d)
