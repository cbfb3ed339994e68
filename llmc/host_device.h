// HOST_DEVICE: a function that kernels call as well, in a header that the host's own compiler reads, too.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif
