/* fb_kernels_avx512.c - the kernels compiled for AVX-512F. */
#include <math.h>
#include <string.h>
#include "fb_tier.h"

#if FB_X86
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,popcnt")
#endif
#define FB_TIER avx512
#include "fb_simd_avx512.h"
#define FB_BITS 32
#include "fb_kernels_template.h"
#define FB_BITS 64
#include "fb_kernels_template.h"
#ifdef __clang__
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
const fb_tier *const fb_kernels_avx512[2] = {&fb_kernels_f32_avx512, &fb_kernels_f64_avx512};
#else
const fb_tier *const fb_kernels_avx512[2] = {NULL, NULL};
#endif
