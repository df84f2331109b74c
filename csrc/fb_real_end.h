/* fb_real_end.h - takes back what fb_real_begin.h has defined. */
#undef REAL
#undef VEC
#undef LANES
#undef V
#undef FN
#undef UINT
#undef FRACTION
#undef PANEL
#undef PANEL_VECS
#undef FB_BITS
