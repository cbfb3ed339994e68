// Stands in for CUDA's header of this name.
#include "../cuda_cpu.h"
