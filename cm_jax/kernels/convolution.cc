// 3x3 convolutions of NHWC images in float32 on CPUs with a third of the multiplications, as XLA custom calls.
//
// Winograd's minimal filtering (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016): a tile of
// 4x2 outputs, F(4, 3) down and F(2, 3) across, takes 24 products per pair of channels; the direct form takes 72:
//
//   convolution         y = A^T [(G w H^T) * (B^T x C)] D      x: a patch of 6x4 inputs, y: its tile of 4x2 outputs
//   kernel's gradient   w = G^T [sum over tiles of (B^T x C) * (A y D^T)] H
//
// where * is the elementwise product. Summed over channels (or tiles), this is 24 matrix products. A task transforms,
// multiplies and transforms back one group of tiles at a time, so that its data stay in the cache of its core. Every
// task transforms the kernel again, which costs less than reading stored transforms.
//
// The order of sums depends only on shapes, so results do not depend on the number of threads.

#include "products.h"

namespace {

using namespace cm_jax;

// ---- Tiles and transforms ------------------------------------------------------------------------------------------

constexpr int kDown = 4, kAcross = 2;                     // outputs per tile
constexpr int kTall = kDown + 2, kWide = kAcross + 2;     // inputs per tile
constexpr int kProducts = kTall * kWide;

// F(4, 3) interpolates at 0, 3/4, -3/4, 3/2, -3/2 and infinity. The usual points 1 and 2 double the error, because the
// coefficients have a larger range.
constexpr float kNear = 0.75f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;
constexpr float kAtZero = kNear2 * kFar2;
constexpr float kAtNear = 2 * kNear2 * (kNear2 - kFar2), kAtFar = 2 * kFar2 * (kFar2 - kNear2);

struct Images {
  int64_t batch, height, width;
  int64_t down() const { return (height + kDown - 1) / kDown; }
  int64_t across() const { return (width + kAcross - 1) / kAcross; }
  int64_t tiles() const { return batch * down() * across(); }
};

// Pointers to the pixels of a tall x wide patch of an image; pixels outside the image point to zeros.
template <int tall, int wide>
struct Patch {
  const float* at[tall][wide];

  Patch(const float* images, Images shape, int64_t channels, int64_t tile, int64_t margin, const float* zeros) {
    int64_t across = tile % shape.across(), down = tile / shape.across() % shape.down();
    int64_t image = tile / shape.across() / shape.down();
    int64_t top = down * kDown - margin, left = across * kAcross - margin;
    for (int64_t i = 0; i < tall; ++i)
      for (int64_t j = 0; j < wide; ++j) {
        int64_t y = top + i, x = left + j;
        bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        at[i][j] = inside ? images + ((image * shape.height + y) * shape.width + x) * channels : zeros;
      }
  }
};

// v = B^T x C for one patch, for each of `channels` channels. `plane`: distance between the 24 values in v.
void transform_input(const Patch<kTall, kWide>& patch, int64_t first, int64_t channels, float* v, ptrdiff_t plane) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector d[kTall][kWide];
#pragma GCC unroll 6
    for (int i = 0; i < kTall; ++i) {
      Vector x[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) x[j] = load(patch.at[i][j] + first + c);
      d[i][0] = x[0] - x[2];
      d[i][1] = x[1] + x[2];
      d[i][2] = x[2] - x[1];
      d[i][3] = x[1] - x[3];
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      Vector even = d[4][j] - kFar2 * d[2][j], odd = kNear * (d[3][j] - kFar2 * d[1][j]);
      Vector even2 = d[4][j] - kNear2 * d[2][j], odd2 = kFar * (d[3][j] - kNear2 * d[1][j]);
      float* to = v + j * plane + c;
      store(to, d[4][j] - (kNear2 + kFar2) * d[2][j] + kAtZero * d[0][j]);
      store(to + 4 * plane, even + odd);
      store(to + 8 * plane, even - odd);
      store(to + 12 * plane, even2 + odd2);
      store(to + 16 * plane, even2 - odd2);
      store(to + 20 * plane, d[5][j] - (kNear2 + kFar2) * d[3][j] + kAtZero * d[1][j]);
    }
  }
}

// z = A y D^T for one tile.
void transform_gradient(const Patch<kDown, kAcross>& tile, int64_t first, int64_t channels, float* z, ptrdiff_t plane) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector d[kDown][kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kDown; ++i) {
      Vector left = load(tile.at[i][0] + first + c), right = load(tile.at[i][1] + first + c);
      d[i][0] = left;
      d[i][1] = left + right;
      d[i][2] = left - right;
      d[i][3] = -right;
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      Vector even = d[0][j] + kNear2 * d[2][j], odd = kNear * (d[1][j] + kNear2 * d[3][j]);
      Vector even2 = d[0][j] + kFar2 * d[2][j], odd2 = kFar * (d[1][j] + kFar2 * d[3][j]);
      float* to = z + j * plane + c;
      store(to, d[0][j]);
      store(to + 4 * plane, even + odd);
      store(to + 8 * plane, even - odd);
      store(to + 12 * plane, even2 + odd2);
      store(to + 16 * plane, even2 - odd2);
      store(to + 20 * plane, d[3][j]);
    }
  }
}

// y = A^T m D for one tile. Only pixels inside the image are stored.
void transform_output(const float* m, ptrdiff_t plane, int64_t channels, float* y, Images shape, int64_t features,
                      int64_t tile) {
  int64_t across = tile % shape.across(), down = tile / shape.across() % shape.down();
  int64_t image = tile / shape.across() / shape.down();
  int64_t rows = std::min<int64_t>(kDown, shape.height - down * kDown);
  bool both = across * kAcross + 1 < shape.width;
  float* corner = y + ((image * shape.height + down * kDown) * shape.width + across * kAcross) * features;
  ptrdiff_t row = shape.width * features;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector d[kTall][kAcross];
#pragma GCC unroll 6
    for (int i = 0; i < kTall; ++i) {
      const float* from = m + 4 * i * plane + c;
      Vector second = load(from + plane), third = load(from + 2 * plane);
      d[i][0] = load(from) + (second + third);
      d[i][1] = (second - third) - load(from + 3 * plane);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kAcross; ++j) {
      if (j == 1 && !both) break;
      Vector sum = d[1][j] + d[2][j], difference = kNear * (d[1][j] - d[2][j]);
      Vector sum2 = d[3][j] + d[4][j], difference2 = kFar * (d[3][j] - d[4][j]);
      float* to = corner + j * features + c;
      store(to, d[0][j] + sum + sum2);
      if (rows > 1) store(to + row, difference + difference2);
      if (rows > 2) store(to + 2 * row, kNear2 * sum + kFar2 * sum2);
      if (rows > 3) store(to + 3 * row, kNear2 * difference + kFar2 * difference2 + d[5][j]);
    }
  }
}

// u = G w H^T for one vector of 3x3 kernels.
inline void transform_kernel(const Vector w[3][3], float* u, ptrdiff_t plane) {
  Vector d[3][kWide];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vector outer = 0.5f * (w[i][0] + w[i][2]), middle = 0.5f * w[i][1];
    d[i][0] = w[i][0];
    d[i][1] = outer + middle;
    d[i][2] = outer - middle;
    d[i][3] = w[i][2];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kWide; ++j) {
    Vector outer = (d[0][j] + kNear2 * d[2][j]) * (1 / kAtNear), middle = d[1][j] * (kNear / kAtNear);
    Vector outer2 = (d[0][j] + kFar2 * d[2][j]) * (1 / kAtFar), middle2 = d[1][j] * (kFar / kAtFar);
    float* to = u + j * plane;
    store(to, d[0][j] * (1 / kAtZero));
    store(to + 4 * plane, outer + middle);
    store(to + 8 * plane, outer - middle);
    store(to + 12 * plane, outer2 + middle2);
    store(to + 16 * plane, outer2 - middle2);
    store(to + 20 * plane, d[2][j]);
  }
}

// w = G^T p H for one vector of 3x3 kernels.
inline void transform_kernel_gradient(const float* p, ptrdiff_t plane, Vector w[3][3]) {
  Vector d[kTall][3];
#pragma GCC unroll 6
  for (int i = 0; i < kTall; ++i) {
    const float* from = p + 4 * i * plane;
    Vector second = load(from + plane), third = load(from + 2 * plane), half = 0.5f * (second + third);
    d[i][0] = load(from) + half;
    d[i][1] = 0.5f * (second - third);
    d[i][2] = half + load(from + 3 * plane);
  }
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    Vector sum = (d[1][j] + d[2][j]) * (1 / kAtNear), sum2 = (d[3][j] + d[4][j]) * (1 / kAtFar);
    w[0][j] = d[0][j] * (1 / kAtZero) + sum + sum2;
    w[1][j] = (d[1][j] - d[2][j]) * (kNear / kAtNear) + (d[3][j] - d[4][j]) * (kFar / kAtFar);
    w[2][j] = kNear2 * sum + kFar2 * sum2 + d[5][j];
  }
}

// ---- Convolution ---------------------------------------------------------------------------------------------------

constexpr int64_t kTiles = 96;     // maximum number of tiles per group
constexpr int64_t kDepth = 64;     // channels summed in registers before a store

// Distance between the starts of the 24 matrices of `values` elements each. The padding avoids multiples of 4 kB, which
// would map to the same few cache lines.
constexpr int64_t plane_stride(int64_t values) { return values + kLanes; }

// A kernel [3, 3, in, out]. If `mirrored`, a kernel [3, 3, out, in] used with mirrored taps, for gradients of images.
struct Kernel {
  const float* values;
  int64_t in, out;
  bool mirrored;

  // u[product, input channel, vector of output channels] for a range of input and output channels.
  void transformed(int64_t first_in, int64_t depth, int64_t first_out, int64_t vectors, float* u,
                   ptrdiff_t plane) const {
    if (!mirrored) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t n = 0; n < vectors; ++n) {
          Vector w[3][3];
          for (int i = 0; i < 9; ++i)
            w[i / 3][i % 3] = load(values + (i * in + first_in + k) * out + first_out + n * kLanes);
          transform_kernel(w, u + (k * vectors + n) * kLanes, plane);
        }
      return;
    }
    for (int64_t n = 0; n < vectors; ++n)
      for (int64_t k = 0; k < depth; k += kLanes) {
        Vector taps[9][kLanes];
        for (int i = 0; i < 9; ++i) {
          const float* from = values + ((8 - i) * out + first_out + n * kLanes) * in + first_in + k;
          for (int row = 0; row < kLanes; ++row) taps[i][row] = load(from + row * in);
          transpose(taps[i]);
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          Vector w[3][3];
          for (int i = 0; i < 9; ++i) w[i / 3][i % 3] = taps[i][lane];
          transform_kernel(w, u + ((k + lane) * vectors + n) * kLanes, plane);
        }
      }
  }
};

template <int vectors>
void convolve(Images shape, const float* x, Kernel kernel, float* y, int64_t first_tile, int64_t tiles,
              int64_t first_out, int64_t last_out) {
  constexpr int64_t width = vectors * kLanes;
  static thread_local Scratch scratch;
  int64_t slots = (tiles + kRows - 1) / kRows * kRows;
  int64_t parts = (kernel.in + kDepth - 1) / kDepth;
  int64_t v_plane = plane_stride(slots * kDepth), u_plane = plane_stride(kDepth * width);
  int64_t m_plane = plane_stride(slots * width);
  float* zeros = scratch.floats(kernel.in + kProducts * (parts * v_plane + u_plane + m_plane));
  float* v = zeros + kernel.in;
  float* u = v + kProducts * parts * v_plane;
  float* m = u + kProducts * u_plane;
  std::fill(zeros, v, 0.0f);

  for (int64_t tile = 0; tile < slots; ++tile) {
    // Slots without a tile repeat the last tile.
    Patch<kTall, kWide> patch(x, shape, kernel.in, first_tile + std::min(tile, tiles - 1), 1, zeros);
    for (int64_t part = 0; part < parts; ++part) {
      int64_t first = part * kDepth, depth = std::min(kDepth, kernel.in - first);
      transform_input(patch, first, depth, v + kProducts * part * v_plane + tile * depth, v_plane);
    }
  }
  for (int64_t out = first_out; out < last_out; out += width) {
    for (int64_t part = 0; part < parts; ++part) {
      int64_t first = part * kDepth, depth = std::min(kDepth, kernel.in - first);
      kernel.transformed(first, depth, out, vectors, u, u_plane);
      const float* left = v + kProducts * part * v_plane;
      for (int64_t product = 0; product < kProducts; ++product)
        for (int64_t tile = 0; tile < slots; tile += kRows)
          block<vectors>(depth, left + product * v_plane + tile * depth, depth, 1, u + product * u_plane, width,
                         m + product * m_plane + tile * width, width, part > 0);
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
      transform_output(m + tile * width, m_plane, width, y + out, shape, kernel.out, first_tile + tile);
  }
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                    ffi::ResultBuffer<ffi::F32> y, bool mirrored) {
  auto in = x.dimensions(), taps = kernel.dimensions();
  Images shape{in[0], in[1], in[2]};
  Kernel chosen{kernel.typed_data(), in[3], mirrored ? taps[2] : taps[3], mirrored};
  int64_t vectors = vectors_at_once(chosen.out), width = vectors * kLanes;
  // Groups of equal size. If there are few, several tasks share a group and divide its output channels. Every task
  // transforms its whole group, so there are only as many as balance the threads.
  int64_t groups = (shape.tiles() + kTiles - 1) / kTiles;
  int64_t size = ((shape.tiles() + groups - 1) / groups + kRows - 1) / kRows * kRows;
  groups = (shape.tiles() + size - 1) / size;
  int64_t columns = chosen.out / width;
  int64_t tasks = 3 * std::max<int64_t>(1, pool.num_threads());
  int64_t parts = std::min(columns, (tasks + groups - 1) / groups);
  run(pool, groups * parts, [&](int64_t task) {
    int64_t group = task / parts, part = task % parts;
    int64_t first = group * size, tiles = std::min(size, shape.tiles() - first);
    int64_t out = columns * part / parts * width, last = columns * (part + 1) / parts * width;
    auto work = vectors == 3 ? convolve<3> : vectors == 2 ? convolve<2> : convolve<1>;
    work(shape, x.typed_data(), chosen, y->typed_data(), first, tiles, out, last);
  });
  return ffi::Error::Success();
}

// ---- Gradient of the kernel ----------------------------------------------------------------------------------------

template <int vectors>
void kernel_gradient(Images shape, const float* x, int64_t in, const float* dy, int64_t out, int64_t first_in,
                     int64_t rows, int64_t first_out, int64_t columns, int64_t first_tile, int64_t last_tile,
                     float* dw) {
  constexpr int64_t width = vectors * kLanes;
  constexpr int64_t s_plane = plane_stride(kRows * width);
  static thread_local Scratch scratch;
  bool once = last_tile - first_tile <= kTiles;
  int64_t cells = once ? 1 : rows / kRows * (columns / width);
  int64_t v_plane = plane_stride(kTiles * rows), z_plane = plane_stride(kTiles * columns);
  float* zeros = scratch.floats(std::max(in, out) + kProducts * (v_plane + z_plane + cells * s_plane));
  float* v = zeros + std::max(in, out);
  float* z = v + kProducts * v_plane;
  float* sums = z + kProducts * z_plane;
  std::fill(zeros, v, 0.0f);

  for (int64_t begin = first_tile; begin < last_tile; begin += kTiles) {
    int64_t tiles = std::min(kTiles, last_tile - begin);
    bool last = begin + tiles == last_tile;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Patch<kTall, kWide> patch(x, shape, in, begin + tile, 1, zeros);
      transform_input(patch, first_in, rows, v + tile * rows, v_plane);
      Patch<kDown, kAcross> gradient(dy, shape, out, begin + tile, 0, zeros);
      transform_gradient(gradient, first_out, columns, z + tile * columns, z_plane);
    }
    float* sum = sums;
    for (int64_t column = 0; column < columns; column += width)
      for (int64_t row = 0; row < rows; row += kRows, sum += once ? 0 : kProducts * s_plane) {
        for (int64_t product = 0; product < kProducts; ++product)
          block<vectors>(tiles, v + product * v_plane + row, 1, rows, z + product * z_plane + column, columns,
                         sum + product * s_plane, width, begin > first_tile);
        if (!last) continue;
        for (int64_t i = 0; i < kRows; ++i)
          for (int64_t j = 0; j < vectors; ++j) {
            Vector w[3][3];
            transform_kernel_gradient(sum + i * width + j * kLanes, s_plane, w);
            float* to = dw + (first_in + row + i) * out + first_out + column + j * kLanes;
            for (int tap = 0; tap < 9; ++tap) store(to + tap * in * out, w[tap / 3][tap % 3]);
          }
      }
  }
}

ffi::Error KernelGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dy,
                          ffi::ResultBuffer<ffi::F32> dw) {
  auto left = x.dimensions(), right = dy.dimensions();
  Images shape{left[0], left[1], left[2]};
  int64_t in = left[3], out = right[3];
  int64_t vectors = vectors_at_once(out), width = vectors * kLanes;
  int64_t rows = std::min(in, kSide), columns = std::min(out, kSide / width * width);
  int64_t down = (in + rows - 1) / rows, across = (out + columns - 1) / columns;
  int64_t groups = (shape.tiles() + kTiles - 1) / kTiles;
  int64_t parts = std::min(groups, std::max<int64_t>(1, kTasks / (down * across)));
  Partial sums(dw->typed_data(), 9 * in * out, parts);
  run(pool, down * across * parts, [&](int64_t task) {
    int64_t part = task / (down * across), row = task / across % down * rows, column = task % across * columns;
    int64_t first = groups * part / parts * kTiles;
    int64_t last = std::min(groups * (part + 1) / parts * kTiles, shape.tiles());
    auto work = vectors == 3 ? kernel_gradient<3> : vectors == 2 ? kernel_gradient<2> : kernel_gradient<1>;
    work(shape, x.typed_data(), in, dy.typed_data(), out, row, std::min(rows, in - row), column,
         std::min(columns, out - column), first, last, sums.part(part));
  });
  sums.add(pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_convolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("mirrored"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cm_jax_kernel_gradient, KernelGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Numbers of channels must be multiples of this: whole vectors and whole blocks of rows.
extern "C" int cm_jax_lanes() { return std::max(kLanes, kRows); }
