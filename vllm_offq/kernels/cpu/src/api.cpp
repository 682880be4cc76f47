// The C interface: picks an instruction set, owns the scratch memory.
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace offq {
namespace {

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

struct Entry {
  const char* name;
  const Kernels* kernels;
  bool usable;
};

#if defined(__x86_64__)
const Entry* entries(int* count) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  static const Entry table[] = {
      {"avx512_vnni", &kAvx512Vnni, avx512},
      {"avx_vnni", &kAvxVnni, avx2 && __builtin_cpu_supports("avxvnni")},
      {"avx2", &kAvx2, avx2},
  };
  *count = 3;
  return table;
}
#elif defined(__aarch64__)
const Entry* entries(int* count) {
  static const Entry table[] = {
      {"neon_dotprod", &kNeonDotprod, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0},
  };
  *count = 1;
  return table;
}
#endif

}  // namespace

void* workspace(size_t bytes) {
  static thread_local Scratch scratch;
  if (bytes > scratch.size) {
    std::free(scratch.memory);
    scratch.size = (bytes + 4095) & ~size_t{4095};
    scratch.memory = std::aligned_alloc(64, scratch.size);
    if (!scratch.memory) scratch.size = 0;
  }
  return scratch.memory;
}

}  // namespace offq

using namespace offq;

namespace {
const Kernels& kernels(int isa) {
  int count;
  return *entries(&count)[isa].kernels;
}
}  // namespace

// Every call returns 0, or 1 if there was no memory for its intermediate results.
extern "C" {

// SHA-256 of the sources that this was built from, which library.py compares with those it sees.
__attribute__((visibility("default"))) const char* offq_sources() {
#define OFFQ_STRING(x) #x
#define OFFQ_STRING_OF(x) OFFQ_STRING(x)
  return OFFQ_STRING_OF(OFFQ_SOURCES);
}
__attribute__((visibility("default"))) int offq_isa_count() {
  int count;
  entries(&count);
  return count;
}
__attribute__((visibility("default"))) const char* offq_isa_name(int isa) {
  int count;
  return entries(&count)[isa].name;
}
__attribute__((visibility("default"))) int offq_isa_usable(int isa) {
  int count;
  return entries(&count)[isa].usable;
}
__attribute__((visibility("default"))) int offq_linear(int isa, const Linear* arguments) {
  return kernels(isa).linear(*arguments);
}
__attribute__((visibility("default"))) int offq_kv_store(int isa, const KVStore* arguments) {
  return kernels(isa).kv_store(*arguments);
}
__attribute__((visibility("default"))) int offq_paged_attention(int isa,
                                                                const Attention* arguments) {
  return kernels(isa).paged_attention(*arguments);
}
}
