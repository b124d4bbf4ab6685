// Group normalization of NHWC images, with a gain and a bias per image and channel, optionally followed by SiLU:
//
//   n = (x + offset - mean) / sqrt(variance + epsilon), over a group's pixels and channels;  y = act(gain n + bias)
//
// A task computes some groups of one image, which stay in the cache of its core. Variances are computed from squared
// differences from the mean of the channel, because sums of squares would cancel in float32.

#include <cmath>

#include "vectors.h"

namespace {

using namespace cm_jax;

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr int64_t kPixels = 64;  // pixels summed in float32; these sums are added in float64, for large images

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

inline void add(double* total, Vector values) {
  typedef double Unaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
  auto* place = reinterpret_cast<Unaligned*>(total);
  *place = *place + __builtin_convertvector(values, Doubles);
}

// Some groups of one image: `channels` of its `stride` channels.
struct Slice {
  int64_t pixels, stride, channels, group;
  float epsilon;

  // Computes `scale` and `center` of n = (x - center) * scale for each channel. (x * scale + shift would lose digits.)
  void normalize(const float* x, const float* offset, float* scale, float* center, double* work) const {
    double* squares = work + channels;
    means(x, nullptr, work);
    for (int64_t c = 0; c < channels; ++c) center[c] = work[c];
    means(x, center, squares);
    for (int64_t first = 0; first < channels; first += group) {
      double middle = 0, variance = 0;
      for (int64_t c = first; c < first + group; ++c) middle += (work[c] + offset[c]) / group;
      for (int64_t c = first; c < first + group; ++c) {
        double difference = work[c] + offset[c] - middle;
        variance += (squares[c] + difference * difference) / group;
      }
      for (int64_t c = first; c < first + group; ++c) {
        scale[c] = 1 / std::sqrt(variance + epsilon);
        center[c] = middle - offset[c];
      }
    }
  }

  // Mean over pixels of x per channel, or, with `center`, of (x - center)^2.
  void means(const float* x, const float* center, double* result) const {
    std::fill(result, result + channels, 0.0);
    for (int64_t begin = 0; begin < pixels; begin += kPixels) {
      int64_t end = std::min(pixels, begin + kPixels);
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vector sum{}, middle = center ? load(center + c) : Vector{};
        for (int64_t pixel = begin; pixel < end; ++pixel) {
          Vector value = load(x + pixel * stride + c) - middle;
          sum += center ? value * value : value;
        }
        add(result + c, sum);
      }
    }
    for (int64_t c = 0; c < channels; ++c) result[c] /= pixels;
  }
};

template <bool silu>
void forward(Slice slice, const float* x, const float* offset, const float* gain, const float* bias, float* y) {
  static thread_local Scratch scratch;
  int64_t channels = slice.channels;
  float* scale = scratch.floats(6 * channels);
  float* center = scale + channels;
  slice.normalize(x, offset, scale, center, reinterpret_cast<double*>(center + channels));
  for (int64_t c = 0; c < channels; ++c) scale[c] *= gain[c];
  for (int64_t pixel = 0; pixel < slice.pixels; ++pixel)
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vector value = (load(x + pixel * slice.stride + c) - load(center + c)) * load(scale + c) + load(bias + c);
      store(y + pixel * slice.stride + c, silu ? value * sigmoid(value) : value);
    }
}

// Gradients of x, offset, gain and bias from dy.
template <bool silu>
void backward(Slice slice, const float* x, const float* offset, const float* gain, const float* bias, const float* dy,
              float* dx, float* d_offset, float* d_gain, float* d_bias) {
  static thread_local Scratch scratch;
  int64_t channels = slice.channels, stride = slice.stride, pixels = slice.pixels;
  double* sums = reinterpret_cast<double*>(scratch.floats(10 * channels));
  double* products = sums + channels;
  float* scale = reinterpret_cast<float*>(products + channels);
  float* center = scale + channels;
  float* first = center + channels;
  float* second = first + channels;
  slice.normalize(x, offset, scale, center, sums);
  std::fill(sums, sums + 2 * channels, 0.0);
  for (int64_t begin = 0; begin < pixels; begin += kPixels)
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vector sum{}, product{};
      for (int64_t pixel = begin; pixel < std::min(pixels, begin + kPixels); ++pixel) {
        Vector normal = (load(x + pixel * stride + c) - load(center + c)) * load(scale + c);
        Vector gradient = load(dy + pixel * stride + c);
        if (silu) {
          Vector value = normal * load(gain + c) + load(bias + c), open = sigmoid(value);
          gradient *= open * (1.0f + value * (1.0f - open));
        }
        store(dx + pixel * stride + c, gradient);
        sum += gradient;
        product += gradient * normal;
      }
      add(sums + c, sum);
      add(products + c, product);
    }
  // dx = (gain dn - mean(gain dn) - n mean(gain dn n)) / std, with means over the group.
  for (int64_t begin = 0; begin < channels; begin += slice.group) {
    double sum = 0, product = 0;
    for (int64_t c = begin; c < begin + slice.group; ++c) {
      d_bias[c] = sums[c];
      d_gain[c] = products[c];
      sum += gain[c] * sums[c];
      product += gain[c] * products[c];
    }
    for (int64_t c = begin; c < begin + slice.group; ++c) {
      first[c] = -scale[c] * sum / (pixels * slice.group);
      second[c] = -scale[c] * product / (pixels * slice.group);
    }
  }
  std::fill(sums, sums + channels, 0.0);
  for (int64_t begin = 0; begin < pixels; begin += kPixels)
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vector sum{}, factor = load(gain + c) * load(scale + c);
      for (int64_t pixel = begin; pixel < std::min(pixels, begin + kPixels); ++pixel) {
        Vector normal = (load(x + pixel * stride + c) - load(center + c)) * load(scale + c);
        Vector result = load(dx + pixel * stride + c) * factor + (load(first + c) + normal * load(second + c));
        store(dx + pixel * stride + c, result);
        sum += result;
      }
      add(sums + c, sum);
    }
  for (int64_t c = 0; c < channels; ++c) d_offset[c] = sums[c];
}

// Calls `task(slice, first index in images, first index in [batch, channels])` for each slice.
template <typename Task>
void by_slices(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, int64_t groups, float epsilon, Task task) {
  auto shape = x.dimensions();
  int64_t pixels = shape[1] * shape[2], channels = shape[3], group = channels / groups;
  int64_t width = group;  // channels of a slice: whole groups and whole vectors
  while (width % kLanes || (width * pixels < 32768 && width < channels && channels % (2 * width) == 0)) width += group;
  while (channels % width || width % kLanes) width += group;
  int64_t parts = channels / width;
  run(pool, shape[0] * parts, [&](int64_t i) {
    int64_t image = i / parts, first = i % parts * width;
    Slice slice{pixels, channels, width, group, epsilon};
    task(slice, image * pixels * channels + first, image * channels + first);
  });
}

using Images = ffi::Buffer<ffi::F32>;
using Results = ffi::ResultBuffer<ffi::F32>;

ffi::Error Norm(ffi::ThreadPool pool, Images x, Images offset, Images gain, Images bias, Results y, int64_t groups,
                float epsilon, bool silu) {
  by_slices(pool, x, groups, epsilon, [&](Slice slice, int64_t at, int64_t row) {
    (silu ? forward<true> : forward<false>)(slice, x.typed_data() + at, offset.typed_data() + row,
                                            gain.typed_data() + row, bias.typed_data() + row, y->typed_data() + at);
  });
  return ffi::Error::Success();
}

ffi::Error NormGradient(ffi::ThreadPool pool, Images x, Images offset, Images gain, Images bias, Images dy, Results dx,
                        Results d_offset, Results d_gain, Results d_bias, int64_t groups, float epsilon, bool silu) {
  by_slices(pool, x, groups, epsilon, [&](Slice slice, int64_t at, int64_t row) {
    (silu ? backward<true> : backward<false>)(
        slice, x.typed_data() + at, offset.typed_data() + row, gain.typed_data() + row, bias.typed_data() + row,
        dy.typed_data() + at, dx->typed_data() + at, d_offset->typed_data() + row, d_gain->typed_data() + row,
        d_bias->typed_data() + row);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Ret<Images>()
                                  .Attr<int64_t>("groups")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("silu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_norm_gradient, NormGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Arg<Images>()
                                  .Ret<Images>()
                                  .Ret<Images>()
                                  .Ret<Images>()
                                  .Ret<Images>()
                                  .Attr<int64_t>("groups")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("silu"));
