// Matrix products in blocks of registers, and sums shared by several tasks.

#pragma once

#include "vectors.h"

namespace cm_jax {

constexpr int kRows = kRegisters / 4;                  // rows of a block, whose sums fill most registers
constexpr int kVectors = 3;                            // maximum number of vectors per row of a block

// One block of c (+)= a b, with a [kRows, depth], b [depth, vectors * kLanes] and c [kRows, vectors * kLanes].
template <int vectors>
inline void block(int64_t depth, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b, ptrdiff_t b_step,
                  float* c, ptrdiff_t c_row, bool add) {
  Vector sums[kRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Vector left = all(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

// Vectors per block: the largest number up to kVectors that divides the vectors in `channels`.
inline int64_t vectors_at_once(int64_t channels) {
  int64_t vectors = channels / kLanes;
  for (int64_t count = kVectors; count > 1; --count)
    if (vectors % count == 0) return count;
  return 1;
}

constexpr int64_t kSide = 192;  // rows and columns of the sums of a task
constexpr int64_t kTasks = 8;   // minimum number of tasks, if there are enough terms

// Sums of `parts` tasks, added in a fixed order.
class Partial {
 public:
  Partial(float* result, int64_t size, int64_t parts)
      : result_(result), size_(size), parts_(parts), own_(parts > 1 ? new float[parts * size] : nullptr) {}

  float* part(int64_t which) { return own_ ? own_.get() + which * size_ : result_; }

  void add(ffi::ThreadPool pool) {
    if (!own_) return;
    int64_t tasks = std::min<int64_t>(kTasks, size_ / kLanes);
    run(pool, tasks, [&](int64_t task) {
      int64_t vectors = size_ / kLanes, last = vectors * (task + 1) / tasks * kLanes;
      for (int64_t i = vectors * task / tasks * kLanes; i < last; i += kLanes) {
        Vector sum = load(part(0) + i);
        for (int64_t other = 1; other < parts_; ++other) sum += load(part(other) + i);
        store(result_ + i, sum);
      }
    });
  }

 private:
  float* result_;
  int64_t size_, parts_;
  std::unique_ptr<float[]> own_;
};

}  // namespace cm_jax
