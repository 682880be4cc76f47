#include <omp.h>

#include "linear_problem.h"

namespace offq {
namespace {

void test_layer(const Layer& layer, const std::vector<int>& isas) {
  LinearProblem problem(layer);
  for (int isa : isas) {
    context = std::string(offq_isa_name(isa)) + " " + layer.name();
    omp_set_num_threads(1);
    const Floats y = problem.run(isa);
    problem.compare(y);
    omp_set_num_threads(2);
    check(problem.run(isa).bytes() == y.bytes(), "two threads give another result than one");
  }
}

// Rows that are not finite come out as NaN and leave the others as they were.
void test_not_finite(const Layer& layer, const std::vector<int>& isas) {
  for (int isa : isas) {
    context = std::string(offq_isa_name(isa)) + " not finite, " + layer.name();
    LinearProblem problem(layer);
    const Floats clean = problem.run(isa);
    problem.x().set(0, NAN);
    problem.x().set(2 * problem.stride() + 1, INFINITY);
    problem.x().set(3 * problem.stride() + layer.in_features() - 1, -INFINITY);
    const Floats y = problem.run(isa);
    bool spoilt = true, same = true;
    for (int i = 0; i < layer.tokens * layer.out_features; ++i) {
      const int row = i / layer.out_features;
      if (row == 0 || row == 2 || row == 3) {
        spoilt &= !std::isfinite(y[i]);
      } else {
        same &= y[i] == clean[i];
      }
    }
    check(spoilt, "a row that is not finite has a finite result");
    check(same, "a row that is not finite changes another one");
  }
}

void test_no_memory(const std::vector<int>& isas) {
  LinearProblem problem({1, 1, 64, 16});
  Floats y(DType::kFloat32, 16);
  for (int isa : isas) {
    context = std::string(offq_isa_name(isa)) + " without memory";
    Linear a = problem.describe(&y);
    a.in_features = int64_t{1} << 52;
    check(offq_linear(isa, &a) == 1, "does not say so");
    problem.compare(problem.run(isa));
  }
}

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace

void test_linear(const std::vector<int>& isas) {
  for (int tokens = 0; tokens <= 40; ++tokens) test_layer({tokens, 2, 64, 33}, isas);
  for (int tokens : {130, 257}) test_layer({tokens, 3, 32, 100}, isas);
  int i = 0;
  for (int group_size : {6, 32, 64, 128, 256, 512}) {
    for (int out_features : {1, 15, 17, 100}) {
      for (bool scale_per_group : {false, true}) {
        for (int tokens : {1, 7, 21}) {
          ++i;
          test_layer({tokens, i % 3 + 1, group_size, out_features, scale_per_group, i % 2 == 0,
                      i % 5 == 0, kTypes[i % 3]},
                     isas);
        }
      }
    }
    for (Codes codes : {Codes::kLowest, Codes::kHighest}) {
      for (bool symmetric : {false, true}) {
        for (int bits : {4, 8}) {
          for (int tokens : {1, 30}) {
            test_layer({tokens, 2, group_size, 80, false, false, symmetric, DType::kFloat32, 0, 1,
                        codes, bits},
                       isas);
          }
        }
      }
    }
  }
  const int hadamards[][3] = {{64, 64, 1}, {128, 128, 1}, {96, 96, 12},  {32, 2, 1},
                              {64, 4, 1},  {24, 24, 12},  {152, 152, 76}};
  for (const auto& [group_size, block, core] : hadamards) {
    test_layer({9, 2, group_size, 17, false, false, false, kTypes[++i % 3], block, core}, isas);
  }
  for (DType dtype : kTypes) {
    test_layer({9, 16, 64, 100, false, false, false, dtype, 0, 1, Codes::kIntegers}, isas);
    for (int group_size : {6, 64}) {
      for (int tokens : {5, 30}) {
        test_not_finite({tokens, 2, group_size, 33, false, true, false, dtype}, isas);
        test_not_finite({tokens, 2, group_size, 33, true, true, true, dtype, 2}, isas);
      }
    }
  }
  test_no_memory(isas);
}

}  // namespace offq
