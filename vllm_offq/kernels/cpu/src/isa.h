// All kernels for one instruction set S. Everything here has internal linkage: the linker must not
// merge code compiled for different instruction sets.
#pragma once

#include "attention.h"
#include "kv_store.h"
#include "linear.h"

namespace offq {
namespace {

template <class S>
constexpr Kernels kernels_of() {
  return Kernels{linear<S>, kv_store<S>, paged_attention<S>};
}

}  // namespace
}  // namespace offq
