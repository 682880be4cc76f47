#include <omp.h>

#include "attention_problem.h"

namespace offq {
namespace {

void test_batch(const Batch& batch, const std::vector<int>& isas) {
  AttentionProblem problem(batch);
  for (int isa : isas) {
    context = std::string(offq_isa_name(isa)) + " " + batch.name();
    omp_set_num_threads(1);
    check(problem.store(isa) == problem.expected_pages(), "the pages have other bytes");
    const Floats output = problem.attend(isa);
    problem.compare(output);
    omp_set_num_threads(2);
    check(problem.store(isa) == problem.expected_pages(), "two threads store other bytes");
    check(problem.attend(isa).bytes() == output.bytes(), "two threads give another result");
  }
}

// A NaN in one query stays in the output of that token and head.
void test_nan(const Batch& batch, const std::vector<int>& isas) {
  for (int isa : isas) {
    context = std::string(offq_isa_name(isa)) + " NaN, " + batch.name();
    AttentionProblem problem(batch);
    const Floats clean = problem.attend(isa);
    const int first = problem.query_stride() + batch.head_size;  // second token, second head
    problem.query().set(first + 3, NAN);
    const Floats output = problem.attend(isa);
    bool spoilt = true, same = true;
    for (int i = 0; i < batch.new_tokens() * problem.query_stride(); ++i) {
      if (i % problem.query_stride() >= batch.heads() * batch.head_size) continue;
      if (i >= first && i < first + batch.head_size) {
        spoilt &= std::isnan(output[i]);
      } else {
        same &= output[i] == clean[i];
      }
    }
    check(spoilt, "a query with a NaN has a finite result");
    check(same, "a query with a NaN changes another one");
  }
}

}  // namespace

void test_attention(const std::vector<int>& isas) {
  constexpr DType kHalf = DType::kFloat16, kBFloat = DType::kBFloat16, kFloat = DType::kFloat32;
  const std::vector<Request> ragged = {{1, 1}, {33, 33}, {0, 0}, {70, 5}, {45, 0}, {17, 1}};
  for (bool heads_first : {false, true}) {
    test_batch({ragged, 2, 2, 64, 64, 16, 0, kFloat, false, heads_first}, isas);
    test_batch({ragged, 1, 3, 64, 32, 32, 0, kBFloat, true, heads_first}, isas);
    test_batch({ragged, 3, 1, 128, 128, 16, 0, kHalf, true, heads_first}, isas);
    test_batch({ragged, 2, 1, 80, 16, 48, 0, kFloat, true, heads_first}, isas);
    test_batch({ragged, 1, 8, 128, 64, 128, 0, kFloat, false, heads_first}, isas);
    test_batch({ragged, 2, 2, 64, 64, 16, 20, kFloat, false, heads_first}, isas);
  }
  for (int window : {1, 16, 37}) test_batch({ragged, 1, 4, 64, 64, 32, window}, isas);
  // Long enough to be split, with one tile of queries and with several.
  for (int window : {0, 1500}) {
    test_batch({{{2500, 1}, {90, 2}, {1100, 3}}, 1, 3, 64, 64, 16, window}, isas);
    test_batch({{{1200, 40}}, 2, 2, 64, 64, 256, window, kBFloat}, isas);
  }
  test_batch({{{20, 3}, {5, 1}}, 1, 36, 64, 64, 16}, isas);  // more heads than rows of a piece
  for (int group_size : {16, 64, 128}) {
    test_batch({ragged, 1, 2, 128, group_size, 128, 0, kFloat, false, false, true}, isas);
  }
  test_nan({ragged, 2, 2, 64, 32, 16}, isas);
  test_nan({{{1, 1}, {1100, 2}}, 2, 2, 64, 32, 32}, isas);
}

}  // namespace offq
