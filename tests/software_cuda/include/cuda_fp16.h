// CUDA's half floats, and those of their functions that its header keeps from a host compiler.
//
// Each computes in float or double and rounds the result to nearest even. A double holds the product of two halves and
// all but the rarest sums with a third exactly; a GPU's own exp, sin and the like may differ in the last place.
#pragma once

#include_next <cuda_fp16.h>

#include <cmath>

inline __half __hfma(__half a, __half b, __half c) {
    return __double2half(double(__half2float(a)) * double(__half2float(b)) + double(__half2float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                          __hfma(__high2half(a), __high2half(b), __high2half(c)));
}

#define SWK_HALF_FUNCTION(name, expression)                                                                      \
    inline __half h##name(__half half) {                                                                         \
        float x = __half2float(half);                                                                            \
        return __float2half_rn(expression);                                                                      \
    }                                                                                                            \
    inline __half2 h2##name(__half2 pair) {                                                                      \
        return __halves2half2(h##name(__low2half(pair)), h##name(__high2half(pair)));                             \
    }
SWK_HALF_FUNCTION(sqrt, std::sqrt(x))
SWK_HALF_FUNCTION(rsqrt, 1.0f / std::sqrt(x))
SWK_HALF_FUNCTION(rcp, 1.0f / x)
SWK_HALF_FUNCTION(exp, std::exp(x))
SWK_HALF_FUNCTION(exp2, std::exp2(x))
SWK_HALF_FUNCTION(log, std::log(x))
SWK_HALF_FUNCTION(log2, std::log2(x))
SWK_HALF_FUNCTION(sin, std::sin(x))
SWK_HALF_FUNCTION(cos, std::cos(x))
SWK_HALF_FUNCTION(floor, std::floor(x))
SWK_HALF_FUNCTION(ceil, std::ceil(x))
SWK_HALF_FUNCTION(trunc, std::trunc(x))
SWK_HALF_FUNCTION(rint, std::nearbyint(x))
#undef SWK_HALF_FUNCTION

inline int __half2int_rn(__half h) { return int(std::nearbyint(__half2float(h))); }
inline int __half2int_rd(__half h) { return int(std::floor(__half2float(h))); }
inline int __half2int_ru(__half h) { return int(std::ceil(__half2float(h))); }
inline unsigned __half2uint_rn(__half h) { return unsigned(std::nearbyint(__half2float(h))); }
