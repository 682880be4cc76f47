// Advanced SIMD with dot products: 4 lanes; products by sdot into int32 lanes.
#pragma once

#include <arm_neon.h>

#include "kernels.h"

namespace offq {
namespace {

struct NeonDotprod {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int kLanes = 4;
  // 16 of the 32 registers accumulate: from 20 on GCC spills.
  static constexpr int kRows = 4;
  static constexpr int kMaxRows = kRows;
  static constexpr int kPanelRows = kRows;
  static constexpr int kRegisters = 32;
  // One row needs more vectors, for the products in flight.
  static constexpr int vectors(int rows) { return rows == 1 ? 8 : 4; }

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F a) { vst1q_f32(p, a); }
  static F set(float a) { return vdupq_n_f32(a); }
  static F zero() { return set(0.0f); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // As on x86: the second operand where one is NaN.
  static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static bool any_nan(F a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
  static F zero_nan(F a) { return keep(vceqq_f32(a, a), a); }
  static F zero_where_zero(F where, F a) { return keep(vmvnq_u32(vceqzq_f32(where)), a); }
  static F keep(uint32x4_t mask, F a) {
    return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
  }
  static float reduce_add(F a) { return vaddvq_f32(a); }
  static float reduce_max(F a) { return vmaxvq_f32(a); }
  static float reduce_min(F a) { return vminvq_f32(a); }

  // Lane i gets the sum of lanes i and i ^ H, or their difference where i has bit H.
  template <int H>
  static F butterfly(F a) {
    constexpr uint32_t kSign = 0x80000000;
    const uint32x4_t sign = {0, H == 1 ? kSign : 0, H == 2 ? kSign : 0, kSign};
    const F other = H == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
    return add(other, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), sign)));
  }

  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_half(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static uint16_t half(float a) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(set(a))), 0);
  }
  static float from_half(uint16_t a) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a))), 0);
  }
  static F load_bfloat(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static void store_bfloat(uint16_t* p, F a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t top = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), top, vdupq_n_u32(0x7FC00000)), 16));
  }
  static F load_int16(const int16_t* p) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(p))); }

  static I to_int(F a) { return vcvtnq_s32_f32(a); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static I sub(I a, I b) { return vsubq_s32(a, b); }
  static I int_zero() { return int_set(0); }
  static I int_set(int32_t a) { return vdupq_n_s32(a); }
  template <int N>
  static I shift_left(I a) {
    return vshlq_n_s32(a, N);
  }
  template <int N>
  static I shift_right(I a) {
    return vshrq_n_s32(a, N);
  }
  static F scale_by_power(F a, I exponent) {
    return mul(a, vreinterpretq_f32_s32(shift_left<23>(add(exponent, int_set(127)))));
  }
  static int32_t reduce_add(I a) { return vaddvq_s32(a); }
  static void store_int8(int8_t* p, I a) {
    const int8x16_t bytes = vreinterpretq_s8_s32(a);
    const int8x16_t halves = vuzp1q_s8(bytes, bytes);
    const int32_t word = vgetq_lane_s32(vreinterpretq_s32_s8(vuzp1q_s8(halves, halves)), 0);
    __builtin_memcpy(p, &word, 4);
  }

  // 16 bytes of a tile's block: 4 channels, 4 + 4 inputs. The codes fit signed bytes.
  using U8 = int8x16_t;
  static U8 load_codes(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static void store_codes(uint8_t* p, U8 a) { vst1q_u8(p, vreinterpretq_u8_s8(a)); }
  static U8 low_nibbles(U8 a) { return vandq_s8(a, vdupq_n_s8(15)); }
  static U8 high_nibbles(U8 a) {
    return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a), 4));
  }
  static int8x16_t broadcast4(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }

  using Acc = I;
  static constexpr bool kNarrow = false;
  static constexpr int kByteBlocks = 1 << 20;
  static Acc start(int32_t sum) { return int_set(sum); }
  static Acc multiply_add(Acc acc, U8 codes, int8x16_t bytes) {
    return vdotq_s32(acc, codes, bytes);
  }
  static I widen(Acc acc) { return acc; }
};

}  // namespace
}  // namespace offq
