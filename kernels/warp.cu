// Backward warp of several feature maps at once: every output pixel reads the grid once, works out its four neighbours
// and their weights once for every size of map, and uses them for all channels of all maps of that size.
//
// Arithmetic is float32 and in the order of torch's grid_sample (bilinear, align_corners=False).

#include <cuda_fp16.h>

constexpr int kMaps = 8;

// Mirrors `_Map` in warp.py.
struct WarpMap {
    const void* source;  // [channels, height, width]
    void* target;        // [channels, plan.height, plan.width]
    long long source_channel, source_row;  // steps in elements; pixels of a row are neighbours
    long long target_channel, target_row;
    int channels, height, width;
    int half_precision;  // __half rather than float, both of them
};

// Mirrors `_Plan` in warp.py.
struct WarpPlan {
    WarpMap maps[kMaps];
    const float* grid;  // [2, height, width]: x, y
    long long grid_plane, grid_row;
    int count;  // of maps
    int height, width;
    int clamp;    // whether reads outside give the border's value, rather than 0
    int channels;  // how many channels, counted through all maps, a thread does
};

namespace {

constexpr int kTogether = 4;  // channels

// The four pixels around a point: which of them are inside, where they are, and what they weigh.
struct Taps {
    int inside[4];
    long long at[4];
    float weight[4];
};

__device__ __forceinline__ Taps find_taps(float grid_x, float grid_y, const WarpMap& map, int clamp) {
    Taps taps = {};
    const float width = static_cast<float>(map.width);
    const float height = static_cast<float>(map.height);
    float x = ((grid_x + 1.0f) * width - 1.0f) * 0.5f;
    float y = ((grid_y + 1.0f) * height - 1.0f) * 0.5f;
    if (clamp) {
        x = x < 0.0f ? 0.0f : (x > width - 1.0f ? width - 1.0f : x);
        y = y < 0.0f ? 0.0f : (y > height - 1.0f ? height - 1.0f : y);
    }
    // Also false for NaN; beyond it the conversion to int would be undefined.
    if (!(x > -1.0f && x < width && y > -1.0f && y < height)) return taps;
    const int left = static_cast<int>(floorf(x));
    const int top = static_cast<int>(floorf(y));
    const float from_left = x - static_cast<float>(left);
    const float from_top = y - static_cast<float>(top);
    const float to_right = static_cast<float>(left + 1) - x;
    const float to_bottom = static_cast<float>(top + 1) - y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = left + i % 2;
        const int row = top + i / 2;
        taps.inside[i] = column >= 0 && column < map.width && row >= 0 && row < map.height;
        taps.at[i] = row * map.source_row + column;
        taps.weight[i] = (i % 2 ? from_left : to_right) * (i / 2 ? from_top : to_bottom);
    }
    return taps;
}

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, float& into) { into = value; }
__device__ __forceinline__ void narrow(float value, __half& into) { into = __float2half_rn(value); }

// `nothing` is what no tap adds to: 0, or NaN where the point is unknown.
template <typename T>
__device__ __forceinline__ void sample(
    const WarpMap& map, const Taps& taps, float nothing, int x, int y, int begin, int end) {
    const T* source = static_cast<const T*>(map.source);
    T* target = static_cast<T*>(map.target) + y * map.target_row + x;
    // Several channels are read before the first is written: the compiler must assume that a write changes what is read
    // after it, and would wait for every channel's four values on their own.
    for (int first = begin; first < end; first += kTogether) {
        float value[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            value[j] = nothing;
            if (first + j < end) {
                const T* plane = source + (first + j) * map.source_channel;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (taps.inside[i]) value[j] += widened(plane[taps.at[i]]) * taps.weight[i];
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (first + j < end) narrow(value[j], target[(first + j) * map.target_channel]);
        }
    }
}

}  // namespace

extern "C" __global__ void warp_maps(WarpPlan plan) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= plan.width || y >= plan.height) return;
    const float grid_x = plan.grid[y * plan.grid_row + x];
    const float grid_y = plan.grid[plan.grid_plane + y * plan.grid_row + x];
    // NaN, not x + y: the sum of infinities of both signs is NaN as well, and known to be outside.
    const float nothing = grid_x != grid_x ? grid_x : (grid_y != grid_y ? grid_y : 0.0f);
    // This thread's channels, counted through all maps.
    const int begin = blockIdx.z * plan.channels;
    const int end = begin + plan.channels;
    int passed = 0;
    int known_height = 0;
    int known_width = 0;
    long long known_row = 0;
    Taps taps = {};
    for (int m = 0; m < plan.count; ++m) {
        const WarpMap& map = plan.maps[m];
        const int from = begin > passed ? begin - passed : 0;
        const int to = end - passed < map.channels ? end - passed : map.channels;
        passed += map.channels;
        if (from >= to) continue;
        if (map.height != known_height || map.width != known_width || map.source_row != known_row) {
            taps = find_taps(grid_x, grid_y, map, plan.clamp);
            known_height = map.height;
            known_width = map.width;
            known_row = map.source_row;
        }
        if (map.half_precision) {
            sample<__half>(map, taps, nothing, x, y, from, to);
        } else {
            sample<float>(map, taps, nothing, x, y, from, to);
        }
    }
}
