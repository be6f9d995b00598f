// How much two images differ, by blocks of B x B pixels (B a power of two, 4 to 128) and as a whole.
//
// Every sum is taken in one fixed order, without atomics: the same inputs give the same bits on every run. NaN wins
// every comparison here, so that it reaches the results; fmaxf would drop it.

#include <cuda_fp16.h>

// Mirrors `_Pair` in change.py.
struct ChangePair {
    const void* first;
    const void* second;
    long long first_channel, first_row;    // steps in elements; pixels of a row are neighbours
    long long second_channel, second_row;
    int channels, height, width;
    int block_log2;
    int grouped;  // whether four pixels can be read at once
};

namespace {

constexpr int kGroup = 4;
constexpr int kLanes = 32;  // threads across: 128 pixels, a whole number of blocks
constexpr int kRows = 8;    // threads down, at most
constexpr int kSummaryThreads = 256;

template <typename T>
struct alignas(kGroup * sizeof(T)) Group {
    T value[kGroup];
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(unsigned char value) { return static_cast<float>(value); }

// NaN if either is.
__device__ __forceinline__ float larger(float a, float b) { return (b > a || b != b) ? b : a; }

// blocks: [2, down, across], means then maxima.
template <typename T>
__device__ __forceinline__ void measure_blocks(const ChangePair& pair, float* blocks) {
    __shared__ float sums[kRows][kLanes];
    __shared__ float maxima[kRows][kLanes];
    const int size = 1 << pair.block_log2;
    const int lane = threadIdx.x;
    const int row = threadIdx.y;
    const int x = (blockIdx.x * kLanes + lane) * kGroup;
    const int top = blockIdx.y << pair.block_log2;
    const int bottom = top + size < pair.height ? top + size : pair.height;
    float sum = 0.0f;
    float maximum = 0.0f;
    for (int y = top + row; y < bottom; y += blockDim.y) {
        const T* first = static_cast<const T*>(pair.first) + y * pair.first_row + x;
        const T* second = static_cast<const T*>(pair.second) + y * pair.second_row + x;
        if (pair.grouped && x + kGroup <= pair.width) {
            // Three at a time, as colour images have them, so that their loads are under way together.
#pragma unroll 3
            for (int c = 0; c < pair.channels; ++c) {
                const Group<T> a = *reinterpret_cast<const Group<T>*>(first + c * pair.first_channel);
                const Group<T> b = *reinterpret_cast<const Group<T>*>(second + c * pair.second_channel);
#pragma unroll
                for (int i = 0; i < kGroup; ++i) {
                    const float difference = fabsf(widened(a.value[i]) - widened(b.value[i]));
                    sum += difference;
                    maximum = larger(maximum, difference);
                }
            }
        } else {
#pragma unroll 1
            for (int c = 0; c < pair.channels; ++c) {
#pragma unroll 1
                for (int i = 0; i < kGroup && x + i < pair.width; ++i) {
                    const float difference = fabsf(widened(first[c * pair.first_channel + i]) -
                                                   widened(second[c * pair.second_channel + i]));
                    sum += difference;
                    maximum = larger(maximum, difference);
                }
            }
        }
    }
    sums[row][lane] = sum;
    maxima[row][lane] = maximum;
    __syncthreads();
    if (row == 0) {
        for (int other = 1; other < static_cast<int>(blockDim.y); ++other) {
            sum += sums[other][lane];
            maximum = larger(maximum, maxima[other][lane]);
        }
        sums[0][lane] = sum;
        maxima[0][lane] = maximum;
    }
    // Across: a block's lanes, halved until one is left.
    const int lanes = size / kGroup;
    const int at = lane & (lanes - 1);
    for (int step = lanes / 2; step > 0; step /= 2) {
        __syncthreads();
        if (row == 0 && at < step) {
            sums[0][lane] += sums[0][lane + step];
            maxima[0][lane] = larger(maxima[0][lane], maxima[0][lane + step]);
        }
    }
    if (row != 0 || at != 0 || x >= pair.width) return;
    const int right = x + size < pair.width ? x + size : pair.width;
    const int across = (pair.width + size - 1) >> pair.block_log2;
    const long long here = static_cast<long long>(blockIdx.y) * across + (x >> pair.block_log2);
    const long long count = static_cast<long long>(gridDim.y) * across;
    blocks[here] = sums[0][lane] / static_cast<float>(pair.channels * (bottom - top) * (right - x));
    blocks[count + here] = maxima[0][lane];
}

}  // namespace

extern "C" __global__ void change_blocks_f32(ChangePair pair, float* blocks) { measure_blocks<float>(pair, blocks); }

extern "C" __global__ void change_blocks_f16(ChangePair pair, float* blocks) { measure_blocks<__half>(pair, blocks); }

extern "C" __global__ void change_blocks_u8(ChangePair pair, float* blocks) {
    measure_blocks<unsigned char>(pair, blocks);
}

// summary: [3], the mean, the maximum, and the share of blocks whose mean is above the threshold or NaN. It is launched as
// one thread block: the block results are a 256th of the pixels or less.
extern "C" __global__ void change_summary(
    const float* blocks, float* summary, int height, int width, int block_log2, float threshold) {
    __shared__ double sums[kSummaryThreads];
    __shared__ float maxima[kSummaryThreads];
    __shared__ int changed[kSummaryThreads];
    const int size = 1 << block_log2;
    const int across = (width + size - 1) >> block_log2;
    const int down = (height + size - 1) >> block_log2;
    const int count = across * down;
    const int thread = threadIdx.x;
    double sum = 0.0;
    float maximum = 0.0f;
    int above = 0;
    for (int i = thread; i < count; i += kSummaryThreads) {
        const int top = i / across << block_log2;
        const int left = i % across << block_log2;
        // Blocks at the right and lower border have fewer pixels.
        const int tall = top + size < height ? size : height - top;
        const int wide = left + size < width ? size : width - left;
        const float mean = blocks[i];
        sum += static_cast<double>(mean) * (tall * wide);
        maximum = larger(maximum, blocks[count + i]);
        above += !(mean <= threshold);
    }
    sums[thread] = sum;
    maxima[thread] = maximum;
    changed[thread] = above;
    for (int step = kSummaryThreads / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) {
            sums[thread] += sums[thread + step];
            maxima[thread] = larger(maxima[thread], maxima[thread + step]);
            changed[thread] += changed[thread + step];
        }
    }
    if (thread != 0) return;
    summary[0] = static_cast<float>(sums[0] / (static_cast<double>(height) * width));
    summary[1] = maxima[0];
    summary[2] = static_cast<float>(changed[0]) / static_cast<float>(count);
}
