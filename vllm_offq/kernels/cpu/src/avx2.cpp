#include "isa.h"
#include "simd_avx2.h"

namespace offq {
const Kernels kAvx2 = kernels_of<Avx2>();
}
