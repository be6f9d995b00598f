// Mesh rasteriser: UV, normal and mask of a frame, the surface's motion to another frame, and the surface atlas.
// The same in NumPy, with the conventions: reference/rasterizer.py.
//
// A frame is three launches: `prepare` (per triangle, per vertex, and the clearing), `draw` (a warp per triangle, all
// extra warps together on each large one), `resolve` (per pixel, coalesced). Nothing depends on the order in which
// threads run: normals are gathered, not scattered, and a pixel keeps the least of 64-bit keys.
//
// For developers:
// - Edges are in double, as in the reference, with its tolerance. Differences and products of float coordinates are
//   exact or nearly so there, so that both sides of a shared edge decide alike to 1e-12 of a pixel and the tolerance of
//   1e-5 of a triangle leaves no hole; a pixel that both sides take goes to one of them by the key. Snapping to a
//   fixed-point grid, the other way to no holes, would move vertices by up to half a step, and with them UV and normals
//   everywhere. A tested pixel takes about ten operations in double, where some GPUs are 64 times slower than in float;
//   tested are only the pixels of boxes, not every triangle at every pixel of a tile.
// - Operations are in the reference's order, and the compiler fuses none: triangle and depth are the reference's to the
//   bit. Weights are worked out by `weights` everywhere, so that a pixel has in `resolve` those it was drawn with.
// - Boxes are exact in float: no pixel of the reference's box is missing and none is added.
// - A comparison with NaN is false: conditions are written so that false means "not drawn" and "not visible".

#include <cuda_fp16.h>

typedef unsigned long long Key;

namespace {

constexpr Key kEmpty = 0xFFFFFFFFFFFFFFFFull;
constexpr double kEdgeTolerance = 1e-5;
constexpr float kVisibilityBiasPx = 1.0f;
constexpr float kLargestFloat = 3.402823466e+38f;
constexpr float kLargestHalf = 65504.0f;

// A warp tests 8x4 pixels at once. A triangle of more such blocks is large: one warp would take too long.
constexpr int kBlockColumns = 8;
constexpr int kBlockRows = 4;
constexpr int kLargeBlocks = 64;

// setups [M, 8]: x and y of corner 0, edges to corners 1 and 2, 1 / (twice the signed area), unused.
constexpr int kSetup = 8;

__device__ __forceinline__ void store(float* target, float value) { *target = value; }

// Saturates: motion to a point far outside is a large number, not an infinity that spoils a whole network.
__device__ __forceinline__ void store(__half* target, float value) {
    *target = __float2half_rn(fminf(fmaxf(value, -kLargestHalf), kLargestHalf));
}

__device__ __forceinline__ bool is_finite(const float* point) {
    return fabsf(point[0]) <= kLargestFloat && fabsf(point[1]) <= kLargestFloat && fabsf(point[2]) <= kLargestFloat;
}

// First pixel whose centre is at or after `least`, in [0, extent].
__device__ __forceinline__ int first_pixel(float least, int extent) {
    if (least <= 0.5f) return 0;
    if (least > (float)extent) return extent;
    const float whole = floorf(least);
    return (int)whole + (least > whole + 0.5f ? 1 : 0);
}

// One after the last pixel whose centre is at or before `most`, in [0, extent].
__device__ __forceinline__ int end_pixel(float most, int extent) {
    if (most < 0.5f) return 0;
    if (most >= (float)extent) return extent;
    const float whole = floorf(most);
    return (int)whole + (most >= whole + 0.5f ? 1 : 0);
}

__device__ __forceinline__ int blocks_across(const int* box) {
    return (box[2] - box[0] + kBlockColumns - 1) / kBlockColumns;
}

__device__ __forceinline__ int blocks_down(const int* box) {
    return (box[3] - box[1] + kBlockRows - 1) / kBlockRows;
}

// Barycentric weights of a pixel's centre; whether it is inside.
__device__ __forceinline__ bool weights(const double* setup, int column, int row, float* weight) {
    const double dx = column + 0.5 - setup[0];
    const double dy = row + 0.5 - setup[1];
    const double b1 = (dx * setup[5] - dy * setup[4]) * setup[6];
    const double b2 = (dy * setup[2] - dx * setup[3]) * setup[6];
    const double b0 = 1.0 - b1 - b2;
    weight[0] = (float)b0;
    weight[1] = (float)b1;
    weight[2] = (float)b2;
    return b0 >= -kEdgeTolerance && b1 >= -kEdgeTolerance && b2 >= -kEdgeTolerance;
}

// Orders by depth, then by the number of the triangle downwards: the least is the nearest, and of several the last.
__device__ __forceinline__ Key pack(float depth, int triangle) {
    // Floats order as unsigned numbers once the sign is turned; + 0 makes -0 the 0 that it equals.
    const unsigned int bits = __float_as_uint(depth + 0.0f);
    const unsigned int order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ((Key)order << 32) | (0xFFFFFFFFu - (unsigned int)triangle);
}

__device__ __forceinline__ int triangle_of(Key key) { return (int)(0xFFFFFFFFu - (unsigned int)key); }

__device__ __forceinline__ float depth_of(Key key) {
    const unsigned int order = (unsigned int)(key >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7FFFFFFFu : ~order);
}

// A vertex attribute at a pixel, summed in the reference's order.
__device__ __forceinline__ float blend(
    const float* values, const int* corner, const float* weight, int width, int channel) {
    float sum = values[corner[0] * width + channel] * weight[0];
    sum += values[corner[1] * width + channel] * weight[1];
    sum += values[corner[2] * width + channel] * weight[2];
    return sum;
}

// Whether a point is inside the frame and at or before its frontmost surface, the deepest of the 3x3 pixels around.
__device__ __forceinline__ bool visible(float x, float y, float z, const Key* keys, int height, int width) {
    if (!(x >= 0.0f && x < (float)width && y >= 0.0f && y < (float)height)) return false;
    const int column = (int)x;
    const int row = (int)y;
    bool found = false;
    float deepest = 0.0f;
    for (int i = max(row - 1, 0); i <= min(row + 1, height - 1); ++i) {
        for (int j = max(column - 1, 0); j <= min(column + 1, width - 1); ++j) {
            const Key key = keys[i * width + j];
            if (key == kEmpty) continue;
            const float depth = depth_of(key);
            deepest = found ? fmaxf(deepest, depth) : depth;
            found = true;
        }
    }
    return found && z <= deepest + kVisibilityBiasPx;
}

// What a triangle needs to be drawn; a triangle that is not drawn has an empty box.
__device__ __forceinline__ void set_up(
    const float* vertices, const int* corner, int height, int width, int cull_back, double* setup, int* box) {
    const float* a = vertices + 3 * corner[0];
    const float* b = vertices + 3 * corner[1];
    const float* c = vertices + 3 * corner[2];
    setup[0] = a[0];
    setup[1] = a[1];
    setup[2] = (double)b[0] - a[0];
    setup[3] = (double)b[1] - a[1];
    setup[4] = (double)c[0] - a[0];
    setup[5] = (double)c[1] - a[1];
    const double area = setup[2] * setup[5] - setup[4] * setup[3];
    const bool drawn = is_finite(a) && is_finite(b) && is_finite(c) && fabs(area) >= 1e-9 && !(cull_back && area > 0.0);
    setup[6] = drawn ? 1.0 / area : 0.0;
    setup[7] = 0.0;
    box[0] = drawn ? first_pixel(fminf(a[0], fminf(b[0], c[0])), width) : 0;
    box[1] = drawn ? first_pixel(fminf(a[1], fminf(b[1], c[1])), height) : 0;
    box[2] = drawn ? end_pixel(fmaxf(a[0], fmaxf(b[0], c[0])), width) : 0;
    box[3] = drawn ? end_pixel(fmaxf(a[1], fmaxf(b[1], c[1])), height) : 0;
    if (box[2] <= box[0] || box[3] <= box[1]) box[0] = box[1] = box[2] = box[3] = 0;
}

// Area-weighted unit normal of a vertex: the sum over the faces around it, always in the same order.
__device__ __forceinline__ void set_normal(
    const float* vertices, const int* triangles, const int* faces, int first, int end, float* normal) {
    double sum[3] = {0.0, 0.0, 0.0};
    for (int i = first; i < end; ++i) {
        const int* corner = triangles + 3 * faces[i];
        const float* a = vertices + 3 * corner[0];
        const float* b = vertices + 3 * corner[1];
        const float* c = vertices + 3 * corner[2];
        const double ux = (double)b[0] - a[0], uy = (double)b[1] - a[1], uz = (double)b[2] - a[2];
        const double vx = (double)c[0] - a[0], vy = (double)c[1] - a[1], vz = (double)c[2] - a[2];
        const double x = uy * vz - uz * vy;
        const double y = uz * vx - ux * vz;
        const double z = ux * vy - uy * vx;
        // Larger than any face of floats, and neither NaN nor infinite.
        if (!(fabs(x) + fabs(y) + fabs(z) <= 1e300)) continue;
        sum[0] += x;
        sum[1] += y;
        sum[2] += z;
    }
    const double length = fmax(sqrt(sum[0] * sum[0] + sum[1] * sum[1] + sum[2] * sum[2]), 1e-12);
    for (int axis = 0; axis < 3; ++axis) normal[axis] = (float)(sum[axis] / length);
}

// A warp draws every `step`-th block of a triangle's box.
__device__ __forceinline__ void draw(
    const float* vertices, const int* triangles, const double* setup, const int* box, int triangle, int first, int step,
    int width, Key* keys) {
    const int lane = threadIdx.x % 32;
    const int across = blocks_across(box);
    const int blocks = across * blocks_down(box);
    const int* corner = triangles + 3 * triangle;
    const float z0 = vertices[3 * corner[0] + 2], z1 = vertices[3 * corner[1] + 2], z2 = vertices[3 * corner[2] + 2];
    for (int block = first; block < blocks; block += step) {
        const int column = box[0] + block % across * kBlockColumns + lane % kBlockColumns;
        const int row = box[1] + block / across * kBlockRows + lane / kBlockColumns;
        float weight[3];
        if (column < box[2] && row < box[3] && weights(setup, column, row, weight)) {
            float depth = weight[0] * z0;
            depth += weight[1] * z1;
            depth += weight[2] * z2;
            atomicMin(keys + row * width + column, pack(depth, triangle));
        }
    }
}

template <typename T>
__device__ __forceinline__ void resolve(
    const Key* keys, const double* setups, const int* triangles, const float* uv, const float* normals, int height,
    int width, int* large, T* condition) {
    const int pixels = height * width;
    const int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p == 0) *large = 0;
    if (p >= pixels) return;
    float plane[6] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const Key key = keys[p];
    if (key != kEmpty) {
        const int t = triangle_of(key);
        const int* corner = triangles + 3 * t;
        float weight[3];
        weights(setups + kSetup * t, p % width, p / width, weight);
        for (int axis = 0; axis < 2; ++axis) plane[axis] = blend(uv, corner, weight, 2, axis);
        for (int axis = 0; axis < 3; ++axis) plane[2 + axis] = blend(normals, corner, weight, 3, axis);
        const float square = plane[2] * plane[2] + plane[3] * plane[3] + plane[4] * plane[4];
        const float length = fmaxf(sqrtf(square), 1e-6f);
        for (int axis = 0; axis < 3; ++axis) plane[2 + axis] /= length;
        plane[5] = 1.0f;
    }
    for (int channel = 0; channel < 6; ++channel) store(condition + channel * (long long)pixels + p, plane[channel]);
}

template <typename T>
__device__ __forceinline__ void motion(
    const Key* keys_t, const double* setups_t, const int* triangles, const float* vertices_s, const Key* keys_s,
    int height, int width, T* result) {
    const int pixels = height * width;
    const int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= pixels) return;
    float plane[3] = {0.0f, 0.0f, 0.0f};
    const Key key = keys_t[p];
    if (key != kEmpty) {
        const int t = triangle_of(key);
        const int* corner = triangles + 3 * t;
        const int column = p % width;
        const int row = p / width;
        float weight[3];
        weights(setups_t + kSetup * t, column, row, weight);
        const float x = blend(vertices_s, corner, weight, 3, 0);
        const float y = blend(vertices_s, corner, weight, 3, 1);
        const float z = blend(vertices_s, corner, weight, 3, 2);
        if (fabsf(x) <= kLargestFloat && fabsf(y) <= kLargestFloat) {
            plane[0] = x - (column + 0.5f);
            plane[1] = y - (row + 0.5f);
        }
        plane[2] = visible(x, y, z, keys_s, height, width) ? 1.0f : 0.0f;
    }
    for (int channel = 0; channel < 3; ++channel) store(result + channel * (long long)pixels + p, plane[channel]);
}

template <typename T>
__device__ __forceinline__ void atlas(
    const float* kept, const Key* keys, const int* corners, const float* texel_weights, int texels, int height,
    int width, float scale_x, float scale_y, T* result) {
    const int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= texels) return;
    float plane[3] = {0.0f, 0.0f, 0.0f};
    const int* corner = corners + 3 * p;
    if (corner[0] >= 0) {
        const float* weight = texel_weights + 3 * p;
        const float x = blend(kept, corner, weight, 3, 0);
        const float y = blend(kept, corner, weight, 3, 1);
        const float z = blend(kept, corner, weight, 3, 2);
        if (fabsf(x) <= kLargestFloat && fabsf(y) <= kLargestFloat) {
            plane[0] = x * scale_x - 1.0f;
            plane[1] = y * scale_y - 1.0f;
        }
        plane[2] = visible(x, y, z, keys, height, width) ? 1.0f : 0.0f;
    }
    for (int channel = 0; channel < 3; ++channel) store(result + channel * (long long)texels + p, plane[channel]);
}

}  // namespace

// Any number of threads. `incidence` [V + 1] and `faces` [3 M]: vertex v is a corner of faces[incidence[v]] up to
// faces[incidence[v + 1]]. `large` [1 + M]: how many, then which; the count is 0 before, `resolve` makes it 0 again.
extern "C" __global__ void rasterizer_prepare(
    const float* vertices, const int* triangles, const int* incidence, const int* faces, int vertex_count,
    int triangle_count, int height, int width, int cull_back, float* kept, float* normals, double* setups, int* boxes,
    int* large, Key* keys) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int threads = gridDim.x * blockDim.x;
    for (int t = thread; t < triangle_count; t += threads) {
        int box[4];
        set_up(vertices, triangles + 3 * t, height, width, cull_back, setups + kSetup * t, box);
        for (int side = 0; side < 4; ++side) boxes[4 * t + side] = box[side];
        if (blocks_across(box) * blocks_down(box) > kLargeBlocks) {
            const int place = atomicAdd(large, 1);
            if (place < triangle_count) large[1 + place] = t;
        }
    }
    // From the other end, so that no thread does a triangle and a vertex while others do neither.
    for (int v = threads - 1 - thread; v < vertex_count; v += threads) {
        for (int axis = 0; axis < 3; ++axis) kept[3 * v + axis] = vertices[3 * v + axis];
        set_normal(vertices, triangles, faces, incidence[v], incidence[v + 1], normals + 3 * v);
    }
    for (int p = thread; p < height * width; p += threads) keys[p] = kEmpty;
}

// Whole warps. The first `small_grid` thread blocks draw a triangle a warp; the others draw the large ones, each with
// all their warps.
extern "C" __global__ void rasterizer_draw(
    const float* kept, const int* triangles, const double* setups, const int* boxes, const int* large,
    int triangle_count, int small_grid, int width, Key* keys) {
    const int warps = blockDim.x / 32;
    const int warp = threadIdx.x / 32;
    if ((int)blockIdx.x < small_grid) {
        const int t = blockIdx.x * warps + warp;
        if (t >= triangle_count) return;
        const int* box = boxes + 4 * t;
        if (blocks_across(box) * blocks_down(box) > kLargeBlocks) return;
        draw(kept, triangles, setups + kSetup * t, box, t, 0, 1, width, keys);
        return;
    }
    const unsigned int all = (gridDim.x - small_grid) * warps;
    const unsigned int mine = (blockIdx.x - small_grid) * warps + warp;
    const int count = min(large[0], triangle_count);
    for (int i = 0; i < count; ++i) {
        const int t = large[1 + i];
        // Each triangle starts at another warp: most have far fewer blocks than there are warps.
        const unsigned int first = (mine + (unsigned int)i * kLargeBlocks % all) % all;
        draw(kept, triangles, setups + kSetup * t, boxes + 4 * t, t, (int)first, (int)all, width, keys);
    }
}

// A thread per pixel. condition [6, H, W]: u, v, unit normal, mask.
extern "C" __global__ void rasterizer_resolve_f32(
    const Key* keys, const double* setups, const int* triangles, const float* uv, const float* normals, int height,
    int width, int* large, float* condition) {
    resolve(keys, setups, triangles, uv, normals, height, width, large, condition);
}

extern "C" __global__ void rasterizer_resolve_f16(
    const Key* keys, const double* setups, const int* triangles, const float* uv, const float* normals, int height,
    int width, int* large, __half* condition) {
    resolve(keys, setups, triangles, uv, normals, height, width, large, condition);
}

// A thread per pixel of frame t. result [3, H, W]: dx and dy in pixels to where the surface point was in frame s, and
// whether it was visible there.
extern "C" __global__ void rasterizer_motion_f32(
    const Key* keys_t, const double* setups_t, const int* triangles, const float* vertices_s, const Key* keys_s,
    int height, int width, float* result) {
    motion(keys_t, setups_t, triangles, vertices_s, keys_s, height, width, result);
}

extern "C" __global__ void rasterizer_motion_f16(
    const Key* keys_t, const double* setups_t, const int* triangles, const float* vertices_s, const Key* keys_s,
    int height, int width, __half* result) {
    motion(keys_t, setups_t, triangles, vertices_s, keys_s, height, width, result);
}

// A thread per texel. corners [texels, 3]: vertices of the texel's triangle, -1 where there is none. scale: 2 / width
// and 2 / height. result [3, texels]: x and y in grid_sample coordinates, and whether the point is visible.
extern "C" __global__ void rasterizer_atlas_f32(
    const float* kept, const Key* keys, const int* corners, const float* texel_weights, int texels, int height,
    int width, float scale_x, float scale_y, float* result) {
    atlas(kept, keys, corners, texel_weights, texels, height, width, scale_x, scale_y, result);
}

extern "C" __global__ void rasterizer_atlas_f16(
    const float* kept, const Key* keys, const int* corners, const float* texel_weights, int texels, int height,
    int width, float scale_x, float scale_y, __half* result) {
    atlas(kept, keys, corners, texel_weights, texels, height, width, scale_x, scale_y, result);
}
