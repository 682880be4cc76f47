// AVX2: 8 lanes; 4-bit products by vpmaddubsw into int16 lanes.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace offq {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  // Rows of a register tile where there are many, and of the largest: 12 of the 16 registers
  // accumulate.
  static constexpr int kRows = 6;
  static constexpr int kMaxRows = 12;
  static constexpr int kPanelRows = kRows;
  static constexpr int kRegisters = 16;
  static constexpr int vectors(int rows) { return rows <= kRows ? 2 : 1; }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set(float a) { return _mm256_set1_ps(a); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static F zero_nan(F a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }

  static F zero_where_zero(F where, F a) {
    return _mm256_and_ps(a, _mm256_cmp_ps(where, zero(), _CMP_NEQ_UQ));
  }

  static float reduce_add(F a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  static float reduce_max(F a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  static float reduce_min(F a) {
    __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_min_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_min_ss(b, _mm_movehdup_ps(b)));
  }

  // Lane i gets the sum of lanes i and i ^ H, or their difference where i has bit H.
  template <int H>
  static F butterfly(F a) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i bit =
        _mm256_cmpeq_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(H)), _mm256_set1_epi32(H));
    const F sign = _mm256_castsi256_ps(_mm256_slli_epi32(bit, 31));
    F other;
    if constexpr (H == 1) other = _mm256_permute_ps(a, 0xB1);
    if constexpr (H == 2) other = _mm256_permute_ps(a, 0x4E);
    if constexpr (H == 4) other = _mm256_permute2f128_ps(a, a, 0x01);
    return _mm256_add_ps(other, _mm256_xor_ps(a, sign));
  }

  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_half(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, 0));
  }
  static uint16_t half(float a) { return static_cast<uint16_t>(_cvtss_sh(a, 0)); }
  static float from_half(uint16_t a) { return _cvtsh_ss(a); }
  static F load_bfloat(const uint16_t* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_bfloat(uint16_t* p, F a) {
    const I bits = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I top = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7FC00000), nan);
    top = _mm256_srli_epi32(top, 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static F load_int16(const int16_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I int_zero() { return _mm256_setzero_si256(); }
  static I int_set(int32_t a) { return _mm256_set1_epi32(a); }
  template <int N>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, N);
  }
  template <int N>
  static I shift_right(I a) {
    return _mm256_srai_epi32(a, N);
  }
  static F scale_by_power(F a, I exponent) {
    return mul(a, _mm256_castsi256_ps(shift_left<23>(add(exponent, int_set(127)))));
  }
  static int32_t reduce_add(I a) {
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xB1)));
  }
  static void store_int8(int8_t* p, I a) {
    const I low = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0C080400));
    const I lanes = _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(lanes));
  }

  // 32 bytes of a tile's block: 8 channels, 4 + 4 inputs.
  using U8 = __m256i;
  static U8 load_codes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_codes(uint8_t* p, U8 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static U8 low_nibbles(U8 a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static U8 high_nibbles(U8 a) {
    return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
  }
  static I broadcast4(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }

  // Pairs of products add up in int16 lanes; widen() makes them the int32 sum of four.
  using Acc = __m256i;
  // They do not hold a segment's sum of 8-bit codes.
  static constexpr bool kNarrow = true;
  // Blocks whose products by signed bytes fit the int16 lanes: 4 * 4 * 15 * 128 < 2^15.
  static constexpr int kByteBlocks = 4;
  static Acc start(int32_t sum) { return _mm256_set1_epi32(sum & 0xFFFF); }
  static Acc multiply_add(Acc acc, U8 codes, I bytes) {
    // In assembly, because GCC orders the intrinsics so that it spills accumulators.
    __m256i product;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+x"(acc), "=&x"(product)
        : "x"(codes), "x"(bytes));
    return acc;
  }
  static I widen(Acc acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
};

}  // namespace
}  // namespace offq
