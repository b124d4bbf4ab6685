// Shared by the CPU kernels: vectors of the native width, scratch memory, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace cm_jax {

namespace ffi = xla::ffi;

// ---- Vectors -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }

// e^x with an error of up to 2 units in the last place; x is clipped to [-87, 87].
inline Vector exponential(Vector x) {
  x = x > 87.0f ? all(87.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vector power = (x * 1.44269504f + shift) - shift;
  Vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  Vector series = 1.0f / 5040 * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
  return series * reinterpret_cast<Vector>(exponent);
}

// Transposes a square matrix in place.
inline void transpose(Vector x[kLanes]) {
#if defined(__clang__)  // no shuffle by a vector of indices
  float rows[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(rows[i], x[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < kLanes; ++lane) x[i][lane] = rows[lane][i];
#else
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Integers low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & step ? kLanes + lane - step : lane;
      high[lane] = lane & step ? kLanes + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      Vector a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + step] = __builtin_shuffle(a, b, high);
    }
  }
#endif
}

// ---- Memory and threads --------------------------------------------------------------------------------------------

// Memory of one thread that is kept between calls, because the system clears every page that it hands out.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* floats(int64_t count) {
    if (count > count_) {
      constexpr size_t page = 1 << 21;
      size_t bytes = (count * sizeof(float) + page - 1) / page * page;
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(page, bytes));
#if defined(__linux__)
      if (data_) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
      count_ = data_ ? bytes / sizeof(float) : 0;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

// Runs tasks 0 ... count - 1 on the calling thread and on free threads of XLA's pool. The caller waits only for tasks
// that have started, so that calls from threads of the pool cannot block each other.
inline void run(ffi::ThreadPool pool, int64_t count, const std::function<void(int64_t)>& task) {
  struct Shared {
    std::atomic<int64_t> next{0}, left;
    std::mutex mutex;
    std::condition_variable done;
  };
  auto shared = std::make_shared<Shared>();
  shared->left = count;
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      if (shared->left.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->done.notify_all();
      }
    }
  };
  for (int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1; helpers > 0; --helpers)
    pool.Schedule(std::function<void()>(work));
  work();
  for (int spins = 0; spins < 2000 && shared->left.load() > 0; ++spins) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->done.wait(lock, [&] { return shared->left.load() == 0; });
}

}  // namespace cm_jax
