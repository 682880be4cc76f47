// AVX-VNNI: the lanes of AVX2; products by vpdpbusd into int32 lanes.
#pragma once

#include "simd_avx2.h"

namespace offq {
namespace {

struct AvxVnni : Avx2 {
  static constexpr bool kNarrow = false;
  static constexpr int kByteBlocks = 1 << 20;
  static Acc start(int32_t sum) { return _mm256_set1_epi32(sum); }
  static Acc multiply_add(Acc acc, U8 codes, I bytes) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(bytes));
    return acc;
  }
  static I widen(Acc acc) { return acc; }
};

}  // namespace
}  // namespace offq
