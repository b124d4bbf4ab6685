// Softmax attention over the pixels of an image. Input: [pixels, 3 heads width], queries, keys and values in this order.
//
//   p = softmax(q k^T / sqrt(width)),  o = p v, for each head
//
// A task computes one head of one image, kQueries queries at a time, so that their scores fit in the cache. The
// gradient recomputes the scores.

#include <cmath>

#include "products.h"

namespace {

using namespace cm_jax;

constexpr int64_t kQueries = 32;  // queries at a time

// c[rows, columns] (+)= a b. `columns` is a multiple of the vector width, `rows` of the block height.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, ptrdiff_t a_row, ptrdiff_t a_step,
              const float* b, ptrdiff_t b_step, float* c, ptrdiff_t c_row, bool add) {
  int64_t vectors = vectors_at_once(columns), width = vectors * kLanes;
  auto work = vectors == 3 ? block<3> : vectors == 2 ? block<2> : block<1>;
  for (int64_t column = 0; column < columns; column += width)
    for (int64_t row = 0; row < rows; row += kRows)
      work(depth, a + row * a_row, a_row, a_step, b + column, b_step, c + row * c_row + column, c_row, add);
}

void copy(int64_t rows, int64_t columns, const float* from, ptrdiff_t stride, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; c += kLanes) store(to + row * columns + c, load(from + row * stride + c));
}

// to[column, row] = from[row, column].
void copy_transposed(int64_t rows, int64_t columns, const float* from, ptrdiff_t stride, float* to) {
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vector tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (row + i) * stride + c);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * rows + row, tile[i]);
    }
}

inline float sum(Vector value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// Replaces each row of scores by softmax(scale scores).
void softmax(int64_t rows, int64_t pixels, float scale, float* scores) {
  for (int64_t row = 0; row < rows; ++row, scores += pixels) {
    Vector highest = load(scores);
    for (int64_t i = kLanes; i < pixels; i += kLanes) {
      Vector value = load(scores + i);
      highest = value > highest ? value : highest;
    }
    float top = highest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, highest[lane]);
    Vector total{};
    for (int64_t i = 0; i < pixels; i += kLanes) {
      Vector value = exponential((load(scores + i) - top) * scale);
      total += value;
      store(scores + i, value);
    }
    float factor = 1 / sum(total);
    for (int64_t i = 0; i < pixels; i += kLanes) store(scores + i, load(scores + i) * factor);
  }
}

struct Head {
  int64_t pixels, stride, width;
  const float *query, *key, *value;

  Head(const float* qkv, int64_t pixels, int64_t channels, int64_t width)
      : pixels(pixels), stride(3 * channels), width(width), query(qkv), key(qkv + channels),
        value(qkv + 2 * channels) {}

  float scale() const { return 1 / std::sqrt(static_cast<float>(width)); }
};

void forward(Head head, float* out, ptrdiff_t out_stride) {
  static thread_local Scratch scratch;
  int64_t pixels = head.pixels, width = head.width, size = pixels * width;
  float* keys = scratch.floats(2 * size + kQueries * pixels);
  float* values = keys + size;
  float* scores = values + size;
  copy_transposed(pixels, width, head.key, head.stride, keys);
  copy(pixels, width, head.value, head.stride, values);
  for (int64_t first = 0; first < pixels; first += kQueries) {
    int64_t rows = std::min(kQueries, pixels - first);
    const float* queries = head.query + first * head.stride;
    multiply(rows, pixels, width, queries, head.stride, 1, keys, pixels, scores, pixels, false);
    softmax(rows, pixels, head.scale(), scores);
    multiply(rows, width, pixels, scores, pixels, 1, values, width, out + first * out_stride, out_stride, false);
  }
}

void backward(Head head, const float* d_out, ptrdiff_t d_out_stride, float* d_query, float* d_key, float* d_value) {
  static thread_local Scratch scratch;
  int64_t pixels = head.pixels, width = head.width, size = pixels * width;
  float* keys = scratch.floats(6 * size + 2 * kQueries * (pixels + width));
  float* keys_transposed = keys + size;
  float* values_transposed = keys_transposed + size;
  float* sum_d_key = values_transposed + size;
  float* sum_d_value = sum_d_key + size;
  float* scores = sum_d_value + size;
  float* d_scores = scores + kQueries * pixels;
  float* queries = d_scores + kQueries * pixels;
  float* d_out_rows = queries + kQueries * width;
  copy(pixels, width, head.key, head.stride, keys);
  copy_transposed(pixels, width, head.key, head.stride, keys_transposed);
  copy_transposed(pixels, width, head.value, head.stride, values_transposed);
  for (int64_t first = 0; first < pixels; first += kQueries) {
    int64_t rows = std::min(kQueries, pixels - first);
    copy(rows, width, head.query + first * head.stride, head.stride, queries);
    copy(rows, width, d_out + first * d_out_stride, d_out_stride, d_out_rows);
    multiply(rows, pixels, width, queries, width, 1, keys_transposed, pixels, scores, pixels, false);
    softmax(rows, pixels, head.scale(), scores);
    multiply(rows, pixels, width, d_out_rows, width, 1, values_transposed, pixels, d_scores, pixels, false);
    multiply(pixels, width, rows, scores, 1, pixels, d_out_rows, width, sum_d_value, width, first > 0);
    for (int64_t row = 0; row < rows; ++row) {
      float *p = scores + row * pixels, *d = d_scores + row * pixels;
      Vector total{};
      for (int64_t i = 0; i < pixels; i += kLanes) total += load(p + i) * load(d + i);
      float mean = sum(total);
      for (int64_t i = 0; i < pixels; i += kLanes) store(d + i, head.scale() * load(p + i) * (load(d + i) - mean));
    }
    float* d_queries = d_query + first * head.stride;
    multiply(rows, width, pixels, d_scores, pixels, 1, keys, width, d_queries, head.stride, false);
    multiply(pixels, width, rows, d_scores, 1, pixels, queries, width, sum_d_key, width, first > 0);
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int64_t c = 0; c < width; c += kLanes) {
      store(d_key + pixel * head.stride + c, load(sum_d_key + pixel * width + c));
      store(d_value + pixel * head.stride + c, load(sum_d_value + pixel * width + c));
    }
}

using Images = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

ffi::Error Attention(ffi::ThreadPool pool, Images qkv, Result out, int64_t heads) {
  auto shape = qkv.dimensions();
  int64_t pixels = shape[1], channels = shape[2] / 3, width = channels / heads;
  run(pool, shape[0] * heads, [&](int64_t task) {
    int64_t image = task / heads, first = task % heads * width;
    Head head(qkv.typed_data() + image * pixels * 3 * channels + first, pixels, channels, width);
    forward(head, out->typed_data() + image * pixels * channels + first, channels);
  });
  return ffi::Error::Success();
}

ffi::Error AttentionGradient(ffi::ThreadPool pool, Images qkv, Images d_out, Result gradient, int64_t heads) {
  auto shape = qkv.dimensions();
  int64_t pixels = shape[1], channels = shape[2] / 3, width = channels / heads;
  run(pool, shape[0] * heads, [&](int64_t task) {
    int64_t image = task / heads, first = task % heads * width, at = image * pixels * 3 * channels + first;
    Head head(qkv.typed_data() + at, pixels, channels, width);
    float* d = gradient->typed_data() + at;
    backward(head, d_out.typed_data() + image * pixels * channels + first, channels, d, d + channels, d + 2 * channels);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Images>()
                                  .Ret<Images>()
                                  .Attr<int64_t>("heads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_attention_gradient, AttentionGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Ret<Images>()
                                  .Attr<int64_t>("heads"));
