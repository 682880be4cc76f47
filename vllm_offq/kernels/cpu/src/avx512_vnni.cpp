#include "isa.h"
#include "simd_avx512.h"

namespace offq {
const Kernels kAvx512Vnni = kernels_of<Avx512Vnni>();
}
