/* fb_kernels_portable.c - the kernels compiled in plain C, for every CPU, with or without fma: slow, and the same
 * bits. */
#include <math.h>
#include <string.h>
#include "fb_tier.h"

#define FB_TIER portable
#include "fb_simd_portable.h"
#define FB_BITS 32
#include "fb_kernels_template.h"
#define FB_BITS 64
#include "fb_kernels_template.h"
const fb_tier *const fb_kernels_portable[2] = {&fb_kernels_f32_portable, &fb_kernels_f64_portable};
