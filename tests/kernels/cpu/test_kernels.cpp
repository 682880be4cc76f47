// Tests of the library's C interface, for every instruction set of this processor.
#include <thread>

#include "attention_problem.h"
#include "linear_problem.h"

namespace offq {
namespace {

// Each thread has scratch memory of its own.
void test_concurrent_calls(int isa) {
  context = std::string(offq_isa_name(isa)) + " called by two threads at once";
  LinearProblem linear({50, 2, 64, 100});
  AttentionProblem attention({{{90, 4}, {30, 30}}, 2, 2, 64, 64, 16});
  const Floats y = linear.run(isa), output = attention.attend(isa);
  bool linear_same = true, attention_same = true;
  std::atomic<bool> done = false;
  std::thread other([&] {
    while (!done) attention_same &= attention.attend(isa).bytes() == output.bytes();
  });
  for (int i = 0; i < 200; ++i) linear_same &= linear.run(isa).bytes() == y.bytes();
  done = true;
  other.join();
  check(linear_same && attention_same, "another result than alone");
}

}  // namespace
}  // namespace offq

int main() {
  using namespace offq;
  std::vector<int> isas;
  for (int isa = 0; isa < offq_isa_count(); ++isa) {
    const bool usable = offq_isa_usable(isa);
    std::printf("%s: %s\n", offq_isa_name(isa), usable ? "tested" : "this processor has it not");
    if (usable) isas.push_back(isa);
  }
  check(!isas.empty(), "no instruction set is usable");
  test_linear(isas);
  test_attention(isas);
  for (int isa : isas) test_concurrent_calls(isa);
  std::printf("%ld checks, %ld failed\n", checks.load(), failures.load());
  return failures != 0;
}
