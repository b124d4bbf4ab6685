// Gradient x^T dy of the matrix in a product, summed over all pixels, without copies of x and dy.

#include "products.h"

namespace {

using namespace cm_jax;

constexpr int64_t kPixels = 128;  // pixels summed in registers before a store

// Some rows and columns of the gradient, summed over some of the pixels.
template <int vectors>
void gradient(const float* x, int64_t in, const float* dy, int64_t out, int64_t pixels, int64_t rows, int64_t columns,
              float* dw) {
  constexpr int64_t width = vectors * kLanes;
  for (int64_t begin = 0; begin < pixels; begin += kPixels)
    for (int64_t column = 0; column < columns; column += width)
      for (int64_t row = 0; row < rows; row += kRows)
        block<vectors>(std::min(kPixels, pixels - begin), x + begin * in + row, 1, in, dy + begin * out + column, out,
                       dw + row * out + column, out, begin > 0);
}

ffi::Error ProductGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dy,
                           ffi::ResultBuffer<ffi::F32> dw) {
  auto left = x.dimensions(), right = dy.dimensions();
  int64_t pixels = left[0], in = left[1], out = right[1];
  int64_t vectors = vectors_at_once(out), width = vectors * kLanes;
  int64_t rows = std::min(in, kSide), columns = std::min(out, kSide / width * width);
  int64_t down = (in + rows - 1) / rows, across = (out + columns - 1) / columns;
  int64_t groups = (pixels + kPixels - 1) / kPixels;
  int64_t parts = std::min(groups, std::max<int64_t>(1, kTasks / (down * across)));
  Partial sums(dw->typed_data(), in * out, parts);
  run(pool, down * across * parts, [&](int64_t task) {
    int64_t part = task / (down * across), row = task / across % down * rows, column = task % across * columns;
    int64_t first = groups * part / parts * kPixels, last = std::min(groups * (part + 1) / parts * kPixels, pixels);
    auto work = vectors == 3 ? gradient<3> : vectors == 2 ? gradient<2> : gradient<1>;
    work(x.typed_data() + first * in + row, in, dy.typed_data() + first * out + column, out, last - first,
         std::min(rows, in - row), std::min(columns, out - column), sums.part(part) + row * out + column);
  });
  sums.add(pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_product_gradient, ProductGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
