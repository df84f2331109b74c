/* fb_kernels_avx2.c - the kernels compiled for AVX2 + FMA. */
#include <math.h>
#include <string.h>
#include "fb_tier.h"

#if FB_X86
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif
#define FB_TIER avx2
#include "fb_simd_avx2.h"
#define FB_BITS 32
#include "fb_kernels_template.h"
#define FB_BITS 64
#include "fb_kernels_template.h"
#ifdef __clang__
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const fb_tier *const fb_kernels_avx2[2] = {&fb_kernels_f32_avx2, &fb_kernels_f64_avx2};
#else
const fb_tier *const fb_kernels_avx2[2] = {NULL, NULL};
#endif
