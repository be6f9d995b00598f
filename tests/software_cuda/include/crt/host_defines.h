// CUDA's headers of vector types and half floats, taken by a host compiler without a CUDA toolkit, want these words.
#pragma once

#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ __attribute__((always_inline)) inline
#define __noinline__ __attribute__((noinline))
#define __CUDA_ARCH_HAS_FEATURE__(feature) 0
#define CUDARTAPI
#define CUDARTAPI_CDECL
