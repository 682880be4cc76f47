#include "isa.h"
#include "simd_avx_vnni.h"

namespace offq {
const Kernels kAvxVnni = kernels_of<AvxVnni>();
}
