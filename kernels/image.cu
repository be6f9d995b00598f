// Pixels as cameras, decoders and encoders have them (uint8 [H, W, C]) to and from what networks take (floats
// [C, H, W]): value = byte * scale + offset, byte = round((value - offset) / scale).
//
// A thread handles four neighbours of a row: with one, three or four channels that is a whole number of 32-bit words of
// pixels and a 16-byte (float32) or 8-byte (float16) group in every plane. Where the layout does not allow that, and at
// the end of a row, the same thread goes pixel by pixel.

#include <cuda_fp16.h>

// Mirrors `_Plan` in image.py.
struct ImagePlan {
    unsigned char* pixels;
    void* image;
    long long pixel_row, pixel_column, pixel_channel;  // steps in bytes
    long long image_channel, image_row, image_column;  // steps in elements
    int channels, height, width;
    int grouped;      // whether four pixels can be moved at once
    // By channel of the pixel. Indexed by constants only: otherwise every thread would copy the plan to local memory.
    int plane[4];     // the channel of the image
    float factor[4];  // scale when loading, 1 / scale when storing
    float offset[4];
};

namespace {

constexpr int kGroup = 4;

template <typename T>
struct alignas(kGroup * sizeof(T)) Group {
    T value[kGroup];
};

// Four pixels of C channels; 12 bytes cannot be aligned to more than 4.
template <int C>
struct alignas(C == 3 ? 4 : 4 * C) Words {
    unsigned int value[C];
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, float& into) { into = value; }
__device__ __forceinline__ void narrow(float value, __half& into) { into = __float2half_rn(value); }

__device__ __forceinline__ unsigned int to_byte(float value, float factor, float offset) {
    const float scaled = (value - offset) * factor;
    // Written so that NaN, which compares false, becomes 0.
    const float low = scaled > 0.0f ? scaled : 0.0f;
    return static_cast<unsigned int>(rintf(low < 255.0f ? low : 255.0f));
}

template <typename T, int C>
__device__ __forceinline__ void load_pixels(const ImagePlan& plan, int x, int y) {
    const unsigned char* pixel = plan.pixels + y * plan.pixel_row + x * plan.pixel_column;
    T* target = static_cast<T*>(plan.image) + y * plan.image_row + x * plan.image_column;
    if (plan.grouped && x + kGroup <= plan.width) {
        const Words<C> words = *reinterpret_cast<const Words<C>*>(pixel);
#pragma unroll
        for (int k = 0; k < C; ++k) {
            const long long plane = plan.plane[k] * plan.image_channel;
            Group<T> group;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const int at = i * C + k;
                const unsigned int byte = (words.value[at / 4] >> (at % 4 * 8)) & 255u;
                narrow(static_cast<float>(byte) * plan.factor[k] + plan.offset[k], group.value[i]);
            }
            *reinterpret_cast<Group<T>*>(target + plane) = group;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < kGroup && x + i < plan.width; ++i) {
#pragma unroll
        for (int k = 0; k < C; ++k) {
            const long long plane = plan.plane[k] * plan.image_channel;
            const unsigned char byte = pixel[i * plan.pixel_column + k * plan.pixel_channel];
            narrow(static_cast<float>(byte) * plan.factor[k] + plan.offset[k],
                   target[plane + i * plan.image_column]);
        }
    }
}

template <typename T, int C>
__device__ __forceinline__ void store_pixels(const ImagePlan& plan, int x, int y) {
    unsigned char* pixel = plan.pixels + y * plan.pixel_row + x * plan.pixel_column;
    const T* source = static_cast<const T*>(plan.image) + y * plan.image_row + x * plan.image_column;
    if (plan.grouped && x + kGroup <= plan.width) {
        Words<C> words = {};
#pragma unroll
        for (int k = 0; k < C; ++k) {
            const long long plane = plan.plane[k] * plan.image_channel;
            const Group<T> group = *reinterpret_cast<const Group<T>*>(source + plane);
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const int at = i * C + k;
                const unsigned int byte = to_byte(widened(group.value[i]), plan.factor[k], plan.offset[k]);
                words.value[at / 4] |= byte << (at % 4 * 8);
            }
        }
        *reinterpret_cast<Words<C>*>(pixel) = words;
        return;
    }
#pragma unroll 1
    for (int i = 0; i < kGroup && x + i < plan.width; ++i) {
#pragma unroll
        for (int k = 0; k < C; ++k) {
            const long long plane = plan.plane[k] * plan.image_channel;
            const float value = widened(source[plane + i * plan.image_column]);
            pixel[i * plan.pixel_column + k * plan.pixel_channel] =
                static_cast<unsigned char>(to_byte(value, plan.factor[k], plan.offset[k]));
        }
    }
}

template <typename T, bool kLoad, int C>
__device__ __forceinline__ void move_pixels(const ImagePlan& plan) {
    const int x = (blockIdx.x * blockDim.x + threadIdx.x) * kGroup;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= plan.width || y >= plan.height) return;
    if (kLoad) {
        load_pixels<T, C>(plan, x, y);
    } else {
        store_pixels<T, C>(plan, x, y);
    }
}

template <typename T, bool kLoad>
__device__ __forceinline__ void move_image(const ImagePlan& plan) {
    switch (plan.channels) {
        case 1: move_pixels<T, kLoad, 1>(plan); break;
        case 3: move_pixels<T, kLoad, 3>(plan); break;
        case 4: move_pixels<T, kLoad, 4>(plan); break;
    }
}

}  // namespace

extern "C" __global__ void image_load_f32(ImagePlan plan) { move_image<float, true>(plan); }

extern "C" __global__ void image_load_f16(ImagePlan plan) { move_image<__half, true>(plan); }

extern "C" __global__ void image_store_f32(ImagePlan plan) { move_image<float, false>(plan); }

extern "C" __global__ void image_store_f16(ImagePlan plan) { move_image<__half, false>(plan); }
