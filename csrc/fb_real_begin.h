/* fb_real_begin.h - names for code that is written once for both dtypes, chosen by FB_BITS, 32 or 64; fb_real_end.h
 * takes them back. No include guard: each dtype includes both. */
#if FB_BITS == 32
#define REAL float
#define VEC fb_f32_vec
#define LANES FB_F32_LANES
#define V(operation) FB_CAT(fb_f32_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f32_, FB_TIER))
#define UINT uint32_t /* the bits of a REAL, of which so many are the fraction */
#define FRACTION 23
#else
#define REAL double
#define VEC fb_f64_vec
#define LANES FB_F64_LANES
#define V(operation) FB_CAT(fb_f64_, operation)
#define FN(name) FB_CAT(FB_CAT(fb_, name), FB_CAT(_f64_, FB_TIER))
#define UINT uint64_t
#define FRACTION 52
#endif
#define PANEL ((ptrdiff_t)(FB_PANEL_BYTES / sizeof(REAL)))
#define PANEL_VECS ((int)(FB_PANEL_BYTES / sizeof(VEC)))
