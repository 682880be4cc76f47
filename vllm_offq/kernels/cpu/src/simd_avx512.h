// AVX-512 with VNNI: 16 lanes; products by vpdpbusd into int32 lanes.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace offq {
namespace {

struct Avx512Vnni {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 10;
  static constexpr int kMaxRows = kRows;
  static constexpr int kPanelRows = 6;  // of many, whose codes are unpacked: the sums are held
  static constexpr int kRegisters = 32;
  // Few rows need more vectors, for the multiply-adds in flight.
  static constexpr int vectors(int rows) { return rows <= 4 ? 4 : 2; }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set(float a) { return _mm512_set1_ps(a); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static F zero_nan(F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
  static F zero_where_zero(F where, F a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(where, zero(), _CMP_NEQ_UQ), a);
  }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static float reduce_min(F a) { return _mm512_reduce_min_ps(a); }

  // Lane i gets the sum of lanes i and i ^ H, or their difference where i has bit H.
  template <int H>
  static F butterfly(F a) {
    constexpr uint32_t kBit = H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00;
    F other;
    if constexpr (H == 1) other = _mm512_permute_ps(a, 0xB1);
    if constexpr (H == 2) other = _mm512_permute_ps(a, 0x4E);
    if constexpr (H == 4) other = _mm512_shuffle_f32x4(a, a, 0xB1);
    if constexpr (H == 8) other = _mm512_shuffle_f32x4(a, a, 0x4E);
    return _mm512_mask_sub_ps(_mm512_add_ps(other, a), kBit, other, a);
  }

  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_half(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, 0));
  }
  static uint16_t half(float a) { return static_cast<uint16_t>(_cvtss_sh(a, 0)); }
  static float from_half(uint16_t a) { return _cvtsh_ss(a); }
  static F load_bfloat(const uint16_t* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_bfloat(uint16_t* p, F a) {
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I top = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    top = _mm512_mask_mov_epi32(top, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16)));
  }
  static F load_int16(const int16_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }

  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I int_zero() { return _mm512_setzero_si512(); }
  static I int_set(int32_t a) { return _mm512_set1_epi32(a); }
  template <int N>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  static I shift_right(I a) {
    return _mm512_srai_epi32(a, N);
  }
  static F scale_by_power(F a, I exponent) {
    return mul(a, _mm512_castsi512_ps(shift_left<23>(add(exponent, int_set(127)))));
  }
  static int32_t reduce_add(I a) { return _mm512_reduce_add_epi32(a); }
  static void store_int8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }

  // 64 bytes: a tile's block.
  using U8 = __m512i;
  static U8 load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_codes(uint8_t* p, U8 a) { _mm512_storeu_si512(p, a); }
  static U8 low_nibbles(U8 a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static U8 high_nibbles(U8 a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
  }
  static I broadcast4(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }

  using Acc = __m512i;
  static constexpr bool kNarrow = false;
  static constexpr int kByteBlocks = 1 << 20;
  static Acc start(int32_t sum) { return _mm512_set1_epi32(sum); }
  static Acc multiply_add(Acc acc, U8 codes, I bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(bytes));
    return acc;
  }
  static I widen(Acc acc) { return acc; }
};

}  // namespace
}  // namespace offq
