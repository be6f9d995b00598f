// Kernels that test the software driver: what works, and every mistake that it must find.

#include <cuda_fp16.h>

// A sum in shared memory and warps; NaN in anything that is read before it is written.
extern "C" __global__ void __launch_bounds__(256) selftest_sum(const float* __restrict__ x, float* out, int n) {
    __shared__ float partial[8], total;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0.0f;
        for (int i = 0; i < blockDim.x / warpSize; ++i) total += partial[i];
    }
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = total;
}

// Rows reversed through dynamic shared memory.
extern "C" __global__ void selftest_reverse(float* x) {
    extern __shared__ __align__(16) float row[];
    float* mine = x + blockIdx.x * blockDim.x;
    row[threadIdx.x] = mine[threadIdx.x];
    __syncthreads();
    mine[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// Every way of a shuffle, side by side: out[way][lane].
extern "C" __global__ void selftest_shuffles(const int* x, int* out, int width) {
    int lane = threadIdx.x, n = blockDim.x, value = x[lane];
    unsigned all = 0xffffffffu;
    out[0 * n + lane] = __shfl_sync(all, value, 3, width);
    out[1 * n + lane] = __shfl_up_sync(all, value, 2, width);
    out[2 * n + lane] = __shfl_down_sync(all, value, 2, width);
    out[3 * n + lane] = __shfl_xor_sync(all, value, 1, width);
    out[4 * n + lane] = (int)__ballot_sync(all, value % 3 == 0);
    out[5 * n + lane] = __any_sync(all, value == 5) + 2 * __all_sync(all, value >= 0);
    out[6 * n + lane] = __syncthreads_count(value % 2);
    // The halves of a warp, each on its own.
    unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    if (lane < 16)
        out[7 * n + lane] = __shfl_xor_sync(half, value, 15);
    else
        out[7 * n + lane] = __shfl_xor_sync(half, value, 8);
}

extern "C" __global__ void selftest_atomics(const unsigned* x, int n, unsigned* bins, float* sum, int* least,
                                            unsigned long long* most, unsigned* last) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    atomicAdd(&bins[x[i] % 4], 1u);
    atomicAdd(sum, 0.5f);
    atomicMin(least, (int)x[i]);
    atomicMax(most, (unsigned long long)x[i] << 32);
    atomicCAS(last, 0u, x[i]);
}

// Each operation rounded to a half: out = a * b + a, and |a| as two halves at once.
extern "C" __global__ void selftest_half(const __half* a, const __half* b, __half* out, __half2* pairs, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __hadd(__hmul(a[i], b[i]), a[i]);
    if (i < n / 2) pairs[i] = __habs2(__halves2half2(a[2 * i], a[2 * i + 1]));
}

extern "C" __global__ void selftest_scale(float* x, float factor, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factor;
}

struct Plane {
    float* data;
    int pitch;
};

extern "C" __global__ void selftest_plane(const Plane plane, float value) {
    plane.data[blockIdx.x * plane.pitch + threadIdx.x] = value;
}

// The mistakes, by number.
extern "C" __global__ void selftest_mistake(float* x, int which, int zero, int index) {
    __shared__ float few[4];
    float own[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    if (which == 0 && threadIdx.x < 7) __syncthreads();
    if (which == 1) {
        if (threadIdx.x % 2)
            __syncthreads();
        else
            __syncthreads();
    }
    if (which == 2 && threadIdx.x < 8) __shfl_sync(0xffffu, 1, 0);
    if (which == 3) __trap();
    if (which == 4) few[index] = 1.0f;
    if (which == 5) own[index] = x[0];
    if (which == 6) x[0] = 7 / zero;
    if (which == 7) x[index * 1024] = 1.0f;
    x[0] = own[threadIdx.x % 4];
}

// No kernels: what a parser of the source could take for some.
template <typename T>
__global__ void selftest_template(T* x) {
    *x = T(1);
}
// extern "C" __global__ void selftest_commented_out(float* x) {}
/* extern "C" __global__ void selftest_commented_out_too(float* x) {} */
