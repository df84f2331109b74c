/* fb_kernels_neon.c - the kernels compiled for AArch64 Advanced SIMD, which every AArch64 CPU has. */
#include <math.h>
#include <string.h>
#include "fb_tier.h"

#if FB_AARCH64
#define FB_TIER neon
#include "fb_simd_neon.h"
#define FB_BITS 32
#include "fb_kernels_template.h"
#define FB_BITS 64
#include "fb_kernels_template.h"
const fb_tier *const fb_kernels_neon[2] = {&fb_kernels_f32_neon, &fb_kernels_f64_neon};
#else
const fb_tier *const fb_kernels_neon[2] = {NULL, NULL};
#endif
