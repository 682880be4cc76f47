// The kernels' inner loop and nothing else, on data in the first-level cache.
#if defined(PEAK_AVX512_VNNI)
#include "simd_avx512.h"
using Isa = offq::Avx512Vnni;
#elif defined(PEAK_AVX_VNNI)
#include "simd_avx_vnni.h"
using Isa = offq::AvxVnni;
#elif defined(PEAK_AVX2)
#include "simd_avx2.h"
using Isa = offq::Avx2;
#else
#include "simd_neon.h"
using Isa = offq::NeonDotprod;
#endif
#include "tile.h"

// Returns how many multiply-adds it did.
extern "C" double peak(int64_t repeats) {
  using namespace offq;
  constexpr int kM = Isa::kRows, kV = Isa::vectors(kM);
  constexpr int64_t kChannels = 128, kTileBytes = kChannels * kTile / 2;
  alignas(64) static int8_t rows[kM * kChannels];
  alignas(64) static uint8_t codes[kTileBytes * kV];
  Isa::Acc acc[kM][kV];
  for (auto& row : acc)
    for (auto& lane : row) lane = Isa::start(0);
  for (int64_t i = 0; i < repeats; ++i) {
    multiply_tiles<Isa, kM, kV>(rows, kChannels, codes, kTileBytes, kChannels / kBlock, acc);
    asm volatile("" ::: "memory");
  }
  Isa::I sum = Isa::int_zero();
  for (auto& row : acc)
    for (auto& lane : row) sum = Isa::add(sum, Isa::widen(lane));
  asm volatile("" : : "r"(&sum) : "memory");
  return double(repeats) * kM * kV * Isa::kLanes * kChannels;
}

// Adds up `count` floats, a multiple of 64: how fast memory can be read.
extern "C" float read_all(const float* data, int64_t count) {
  Isa::F sum[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
  for (int64_t i = 0; i < count; i += 4 * Isa::kLanes)
    for (int k = 0; k < 4; ++k) sum[k] = Isa::add(sum[k], Isa::load(data + i + k * Isa::kLanes));
  return Isa::reduce_add(Isa::add(Isa::add(sum[0], sum[1]), Isa::add(sum[2], sum[3])));
}
