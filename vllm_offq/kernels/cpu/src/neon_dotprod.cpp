#include "isa.h"
#include "simd_neon.h"

namespace offq {
const Kernels kNeonDotprod = kernels_of<NeonDotprod>();
}
