// CUDA C++ for a host compiler: what a kernel's source may use without including anything, as NVRTC has it.
//
// `build.py` puts this in front of a `.cu` file and a table of its kernels behind it. What is not here does not compile,
// which is better than something that behaves differently; add it with CUDA's meaning.
#pragma once

#include <vector_types.h>

#include <vector_functions.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernel_abi.h"

// A toolkit's own header may have been found before ours.
#undef __launch_bounds__
#undef __shared__
#define __launch_bounds__(...)
// `build.py` rewrites declarations in the source itself; what comes from elsewhere is one to a thread of ours, which
// runs whole blocks.
#define __shared__ static thread_local
#undef __grid_constant__
#define __grid_constant__
#undef assert
#define assert(condition) ((condition) ? (void)0 : swk_trap("assertion failed: " #condition, __LINE__))
#define __trap() swk_trap("__trap", __LINE__)
#define __builtin_assume(condition)
#define __assume(condition)

static_assert(sizeof(swk::Index) == sizeof(uint3) && sizeof(swk::Index) == sizeof(dim3), "");
#define threadIdx (reinterpret_cast<const uint3&>(swk_lane->thread))
#define blockIdx (reinterpret_cast<const uint3&>(swk_lane->block))
#define blockDim (reinterpret_cast<const dim3&>(swk_lane->block_size))
#define gridDim (reinterpret_cast<const dim3&>(swk_lane->grid_size))
constexpr int warpSize = 32;

// A thread's own array was written past its end: the compiler's own check calls this when the function is left.
extern "C" __attribute__((visibility("hidden"), noreturn)) void __stack_chk_fail() {
    swk_trap("a local array was written outside of its bounds", 0);
}

// Barriers -------------------------------------------------------------------------------------------------------------

#define __syncthreads() swk_sync_threads(__LINE__)
#define __syncthreads_count(p) swk::count_threads(p, __LINE__)
#define __syncthreads_and(p) int(swk::count_threads(p, __LINE__) == int(blockDim.x * blockDim.y * blockDim.z))
#define __syncthreads_or(p) int(swk::count_threads(p, __LINE__) != 0)

namespace swk {

inline int count_threads(int predicate, int line) {
    static const char key = 0;
    int* total = static_cast<int*>(swk_shared(&key, sizeof(int)));
    swk_sync_threads(line);
    if (swk_lane->number == 0) *total = 0;
    swk_sync_threads(line);
    if (predicate) ++*total;
    swk_sync_threads(line);
    return *total;
}

template <typename T>
T take(const Slot* slots, unsigned lane) {
    T value;
    std::memcpy(&value, slots[lane].bytes, sizeof value);
    return value;
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source, bool own) {
    static_assert(sizeof(T) <= sizeof(Slot) && std::is_trivially_copyable_v<T>, "a shuffle moves 16 bytes at most");
    const Slot* slots = swk_exchange(mask, &value, sizeof value);
    return own ? value : take<T>(slots, source);
}

inline unsigned lane() { return swk_lane->number % 32; }

}  // namespace swk

inline void __syncwarp(unsigned mask = 0xffffffffu) { swk_exchange(mask, nullptr, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned first = swk::lane() / width * width;
    return swk::exchange(mask, value, first + unsigned(source) % width, false);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned first = swk::lane() / width * width;
    bool own = swk::lane() < first + delta;
    return swk::exchange(mask, value, own ? 0 : swk::lane() - delta, own);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned end = swk::lane() / width * width + width;
    bool own = swk::lane() + delta >= end;
    return swk::exchange(mask, value, own ? 0 : swk::lane() + delta, own);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned end = swk::lane() / width * width + width, source = swk::lane() ^ unsigned(bits);
    return swk::exchange(mask, value, source & 31, source >= end);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    int bit = predicate != 0;
    const swk::Slot* slots = swk_exchange(mask, &bit, sizeof bit);
    unsigned votes = 0;
    // Lanes that the block does not have never wrote their slot, and it holds neither 0 nor 1.
    for (unsigned lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && swk::take<int>(slots, lane) == 1) votes |= 1u << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace swk {

template <typename T, typename F>
T reduce(unsigned mask, T value, F combine) {
    // The lanes that are there are those that vote.
    unsigned there = __ballot_sync(mask, 1);
    const Slot* slots = swk_exchange(mask, &value, sizeof value);
    unsigned first = __builtin_ctz(there);
    T result = take<T>(slots, first);
    for (unsigned lane = first + 1; lane < 32; ++lane)
        if (there >> lane & 1) result = combine(result, take<T>(slots, lane));
    return result;
}

}  // namespace swk

#define SWK_REDUCE(name, type, expression)                                              \
    inline type __reduce_##name##_sync(unsigned mask, type value) {                     \
        return swk::reduce(mask, value, [](type a, type b) -> type { return expression; }); \
    }
SWK_REDUCE(add, int, a + b)
SWK_REDUCE(add, unsigned, a + b)
SWK_REDUCE(min, int, a < b ? a : b)
SWK_REDUCE(min, unsigned, a < b ? a : b)
SWK_REDUCE(max, int, a > b ? a : b)
SWK_REDUCE(max, unsigned, a > b ? a : b)
SWK_REDUCE(and, unsigned, a & b)
SWK_REDUCE(or, unsigned, a | b)
SWK_REDUCE(xor, unsigned, a ^ b)
#undef SWK_REDUCE

// Atomics: kernels of two streams run at once, on two threads of ours ---------------------------------------------------

namespace swk {

template <typename T, typename F>
T atomic_update(T* address, F change) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    auto* bits = reinterpret_cast<Bits*>(address);
    Bits seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
    for (;;) {
        T old;
        std::memcpy(&old, &seen, sizeof old);
        T changed = change(old);
        Bits wanted;
        std::memcpy(&wanted, &changed, sizeof wanted);
        if (__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) return old;
    }
}

template <typename T>
struct Same {
    using type = T;
};

}  // namespace swk

// The second argument converts to the first one's type, as CUDA's overloads have it.
#define SWK_ATOMIC(name, types, expression)                                             \
    template <typename T>                                                               \
    T name(T* address, typename swk::Same<T>::type b) {                                 \
        static_assert(types, "CUDA has no " #name " for this type");                     \
        return swk::atomic_update(address, [&](T a) -> T { return expression; });       \
    }
SWK_ATOMIC(atomicAdd, true, a + b)
SWK_ATOMIC(atomicExch, true, b)
SWK_ATOMIC(atomicSub, std::is_integral_v<T>, a - b)
SWK_ATOMIC(atomicMin, std::is_integral_v<T>, b < a ? b : a)
SWK_ATOMIC(atomicMax, std::is_integral_v<T>, a < b ? b : a)
SWK_ATOMIC(atomicAnd, std::is_integral_v<T>, a & b)
SWK_ATOMIC(atomicOr, std::is_integral_v<T>, a | b)
SWK_ATOMIC(atomicXor, std::is_integral_v<T>, a ^ b)
SWK_ATOMIC(atomicInc, std::is_unsigned_v<T>, a >= b ? T(0) : T(a + 1))
#undef SWK_ATOMIC
template <typename T>
T atomicCAS(T* address, typename swk::Same<T>::type compare, typename swk::Same<T>::type value) {
    return swk::atomic_update(address, [&](T old) { return std::memcmp(&old, &compare, sizeof old) ? old : value; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Loads and stores with a hint ------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
    return *address;
}
#define SWK_LOAD(name)             \
    template <typename T>          \
    T name(const T* address) {     \
        return *address;           \
    }
SWK_LOAD(__ldca)
SWK_LOAD(__ldcg)
SWK_LOAD(__ldcs)
SWK_LOAD(__ldlu)
SWK_LOAD(__ldcv)
#undef SWK_LOAD
#define SWK_STORE(name)                                                  \
    template <typename T>                                                \
    void name(T* address, typename swk::Same<T>::type value) {           \
        *address = value;                                                \
    }
SWK_STORE(__stwb)
SWK_STORE(__stcg)
SWK_STORE(__stcs)
SWK_STORE(__stwt)
#undef SWK_STORE

// Arithmetic --------------------------------------------------------------------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

#define SWK_CHOOSE(name, sign)                                                        \
    template <typename A, typename B>                                                 \
    constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> name(A a, B b) { \
        using T = std::common_type_t<A, B>;                                           \
        if constexpr (std::is_floating_point_v<T>)                                    \
            return std::f##name(T(a), T(b));                                          \
        else                                                                          \
            return T(a) sign T(b) ? T(a) : T(b);                                      \
    }
SWK_CHOOSE(min, <)
SWK_CHOOSE(max, >)
#undef SWK_CHOOSE
inline unsigned umin(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned umax(unsigned a, unsigned b) { return a > b ? a : b; }

namespace swk {

template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A conversion from float as the GPU has it: NaN becomes 0, what does not fit the nearest that does.
template <typename To>
To saturated(double value) {
    if (value != value) return 0;
    if (value <= double(std::numeric_limits<To>::lowest())) return std::numeric_limits<To>::lowest();
    if (value >= double(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return To(value);
}

}  // namespace swk

inline float __int_as_float(int x) { return swk::same_bits<float>(x); }
inline int __float_as_int(float x) { return swk::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return swk::same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return swk::same_bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return swk::same_bits<double>(x); }
inline long long __double_as_longlong(double x) { return swk::same_bits<long long>(x); }

#define SWK_FROM_FLOAT(type, word)                                                                         \
    inline type __float2##word##_rn(float x) { return swk::saturated<type>(std::nearbyint(double(x))); }   \
    inline type __float2##word##_rz(float x) { return swk::saturated<type>(std::trunc(double(x))); }       \
    inline type __float2##word##_rd(float x) { return swk::saturated<type>(std::floor(double(x))); }       \
    inline type __float2##word##_ru(float x) { return swk::saturated<type>(std::ceil(double(x))); }
SWK_FROM_FLOAT(int, int)
SWK_FROM_FLOAT(unsigned, uint)
SWK_FROM_FLOAT(long long, ll)
SWK_FROM_FLOAT(unsigned long long, ull)
#undef SWK_FROM_FLOAT
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
// The fast forms are more exact here than on a GPU: compare with a tolerance that a GPU meets too.
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __exp10f(float a) { return std::pow(10.0f, a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __log10f(float a) { return std::log10(a); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __tanf(float a) { return std::tan(a); }
inline float __saturatef(float a) { return a != a ? 0.0f : a < 0.0f ? 0.0f : a > 1.0f ? 1.0f : a; }
inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float rsqrt(float a) { return rsqrtf(a); }
inline float norm3df(float a, float b, float c) { return float(std::sqrt(double(a) * a + double(b) * b + double(c) * c)); }
inline float rnorm3df(float a, float b, float c) { return float(1.0 / std::sqrt(double(a) * a + double(b) * b + double(c) * c)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline int __mul24(int a, int b) { return int(unsigned(a << 8 >> 8) * unsigned(b << 8 >> 8)); }
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned __sad(int a, int b, unsigned c) { return c + unsigned(a > b ? (long long)a - b : (long long)b - a); }
inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= __usad(a >> i & 255, b >> i & 255, 0) << i;
    return result;
}
inline unsigned __vsadu4(unsigned a, unsigned b) {
    unsigned sum = 0;
    for (int i = 0; i < 32; i += 8) sum = __usad(a >> i & 255, b >> i & 255, sum);
    return sum;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned pick = selector >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

// The table of kernels ---------------------------------------------------------------------------------------------------

namespace swk {

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    (void)arguments;
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

template <auto Function>
struct Entry;
template <typename... A, void (*Function)(A...)>
struct Entry<Function> {
    static constexpr int count = sizeof...(A);
    static constexpr size_t sizes[] = {sizeof(A)..., 0};
    static constexpr unsigned char pointers[] = {std::is_pointer_v<A>..., 0};
    static void run(void** arguments) { call(Function, arguments, std::index_sequence_for<A...>{}); }
};

}  // namespace swk

#define SWK_KERNEL(name, bound) \
    {#name, swk::Entry<&name>::run, swk::Entry<&name>::count, swk::Entry<&name>::sizes, swk::Entry<&name>::pointers, bound},
