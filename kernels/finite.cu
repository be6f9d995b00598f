// Whether every number of an array is finite: NaN and infinity are the numbers with all bits of the exponent set.
//
// The bits alone are looked at, sixteen bytes at a time. Whoever finds one writes 1; that several may write the same
// harms nothing, and takes no atomics.

namespace {

constexpr int kBytes = 16;

template <typename Bits>
struct alignas(kBytes) Group {
    Bits value[kBytes / sizeof(Bits)];
};

template <typename Bits, Bits kExponent>
__device__ __forceinline__ void look(const Bits* values, long long count, int grouped, int* found) {
    constexpr int kGroup = kBytes / sizeof(Bits);
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long groups = grouped ? count / kGroup : 0;
    bool beyond = false;
#pragma unroll 1
    for (long long i = first; i < groups; i += step) {
        const Group<Bits> group = reinterpret_cast<const Group<Bits>*>(values)[i];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) beyond |= (group.value[k] & kExponent) == kExponent;
    }
    // What is left over, or all of it where the array does not begin at a multiple of sixteen bytes.
#pragma unroll 1
    for (long long i = groups * kGroup + first; i < count; i += step) {
        beyond |= (values[i] & kExponent) == kExponent;
    }
    if (beyond) *found = 1;
}

}  // namespace

extern "C" __global__ void finite_f16(const unsigned short* values, long long count, int grouped, int* found) {
    look<unsigned short, 0x7c00u>(values, count, grouped, found);
}

extern "C" __global__ void finite_f32(const unsigned int* values, long long count, int grouped, int* found) {
    look<unsigned int, 0x7f800000u>(values, count, grouped, found);
}

extern "C" __global__ void finite_f64(const unsigned long long* values, long long count, int grouped, int* found) {
    look<unsigned long long, 0x7ff0000000000000ull>(values, count, grouped, found);
}
