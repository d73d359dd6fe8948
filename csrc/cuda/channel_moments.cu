#include "pyprune/channel_moments.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "strip_readers.cuh"

namespace pyprune {
namespace {

// A chunk's partial moments cost 16 bytes a channel to write and read again, a quarter of 32 bf16 rows.
// Below 64 rows there is one chunk, hence one launch.
constexpr int64_t MIN_CHUNK_ROWS = 4 * TILE_ROWS;

// BLOCKS blocks of WARPS warps share a multiprocessor, and each warp reads through a ring of STAGES tiles: 144 KiB
// in flight. H200, bf16, us of a whole update with L2 full of clean lines (`pyprune benchmark` has the run of today):
//                        65536 x 4096   262144 x 4096   65536 x 11008   32768 x 28672
//   this                        131.1           493.4           335.9           433.9
//   8 warps, 2 blocks, 3        131.9           490.4           337.0           441.7
//   half a copy                 126.7           501.4           337.4           437.1
constexpr int WARPS = 4;
constexpr int BLOCKS = 3;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A warp owns a strip of columns over a chunk of rows. No two warps share anything, so any sizes spread evenly
// over one wave of resident warps.
int row_chunks(DType dtype, int64_t rows, int64_t channels, int multiprocessors) {
  const int64_t resident_warps = int64_t{multiprocessors} * BLOCKS * WARPS;
  const int64_t strips = ceil_div(channels, WARP * VECTOR_BYTES / element_size(dtype));
  return static_cast<int>(std::max<int64_t>(1, std::min(resident_warps / strips, rows / MIN_CHUNK_ROWS)));
}

// Chunk c holds rows [begin(c), begin(c + 1)); lengths differ by one row at most.
struct Chunks {
  int count;
  int longer;  // the first `longer` chunks have one row more
  int64_t length;

  __device__ int64_t begin(int chunk) const { return chunk * length + min(chunk, longer); }
  __device__ int64_t rows(int chunk) const { return length + (chunk < longer ? 1 : 0); }
};

// Merging `rows` new rows into a state of `count`: formed in double on the host, where a count may pass 2^24.
struct MergeWeights {
  bool first;  // count == 0: the state is not read
  float mean;  // rows / (count + rows)
  float m2;    // count * rows / (count + rows)
};

MergeWeights merge_weights(int64_t count, int64_t rows) {
  const double total = static_cast<double>(count) + static_cast<double>(rows);
  return {count == 0, static_cast<float>(rows / total), static_cast<float>(count * (rows / total))};
}

// part / total, and 0 where nothing weighs anything.
__device__ float fraction_of(float part, float total) { return total > 0.0f ? __fdividef(part, total) : 0.0f; }

struct State {
  float* mean;
  float* m2;
  MergeWeights weights;
  const double* total;  // of the weights in the state; null where rows have none

  // Those of a part whose rows have weights, `part_total` together.
  __device__ MergeWeights weights_of(float part_total) const {
    const double before = weights.first ? 0.0 : *total;
    const double fraction = part_total > 0.0f ? part_total / (before + part_total) : 0.0;
    return {weights.first, static_cast<float>(fraction), static_cast<float>(before * fraction)};
  }

  __device__ void merge(int column, float part_mean, float part_m2, const MergeWeights& weights) const {
    const float old_mean = weights.first ? 0.0f : mean[column];
    const float old_m2 = weights.first ? 0.0f : m2[column];
    const float delta = part_mean - old_mean;
    mean[column] = old_mean + delta * weights.mean;
    m2[column] = old_m2 + (part_m2 + delta * delta * weights.m2);
  }

  __device__ void prefetch(int column) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(mean + column));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(m2 + column));
  }
};

// A lane's moments of its columns.
template <typename Reader>
struct LaneMoments {
  static constexpr int COLUMNS = Reader::COLUMNS;
  using Tile = typename Reader::Row[TILE_ROWS];
  float mean[COLUMNS];
  float m2[COLUMNS];
  float rows;

  // Those of a tile without its first `skip` rows, which are zero.
  __device__ LaneMoments(const Tile& tile, int skip) : rows(TILE_ROWS - skip) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) sum += Reader::value(tile[r], j);
      mean[j] = sum / rows;
      m2[j] = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        const float deviation = r >= skip ? Reader::value(tile[r], j) - mean[j] : 0.0f;
        m2[j] += deviation * deviation;
      }
    }
  }

  // Those of a tile whose rows have weights; `rows` is then the sum of these. A row that is left out weighs 0.
  __device__ LaneMoments(const Tile& tile, const float (&weights)[TILE_ROWS]) : rows(0.0f) {
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) rows += weights[r];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) sum += weights[r] * Reader::value(tile[r], j);
      mean[j] = fraction_of(sum, rows);
      m2[j] = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        const float deviation = Reader::value(tile[r], j) - mean[j];
        m2[j] += weights[r] * deviation * deviation;
      }
    }
  }

  // Chan, Golub, LeVeque 1983: neither a large mean nor an outlier in the first row costs digits.
  template <bool WEIGHTED>
  __device__ void merge(const LaneMoments& part) {
    const float all = rows + part.rows;
    const float mean_weight = WEIGHTED ? fraction_of(part.rows, all) : __fdividef(part.rows, all);
    const float m2_weight = rows * mean_weight;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const float delta = part.mean[j] - mean[j];
      mean[j] += delta * mean_weight;
      m2[j] += part.m2[j] + delta * delta * m2_weight;
    }
    rows += part.rows;
  }
};

// The weights of a tile's rows from their roots, 0 for the first `skip` ones, which are not read.
__device__ void load_weights(const float* roots, int skip, float (&weights)[TILE_ROWS]) {
#pragma unroll
  for (int r = 0; r < TILE_ROWS; ++r) {
    const float root = r >= skip ? __ldg(roots + r) : 0.0f;
    weights[r] = root * root;
  }
}

// With one chunk, its moments go straight into the state; with more, into [chunks, channels] planes of
// means and M2s that merge_chunks reads, and with weights into totals [chunks] behind these.
template <typename Reader, bool WEIGHTED>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS)
    chunk_moments(const typename Reader::Element* __restrict__ x, int channels, int64_t row_stride, int strips,
                  Chunks chunks, const float* __restrict__ roots, float* __restrict__ partial, State state) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int warp = blockIdx.x * WARPS + threadIdx.x / WARP;
  const int chunk = warp / strips;
  const int column = Reader::first_column(warp % strips, threadIdx.x % WARP);
  const int columns_left = channels - column;
  if (chunk >= chunks.count || columns_left <= 0) return;

  const int64_t rows = chunks.rows(chunk);
  const int tiles = static_cast<int>(ceil_div(rows, TILE_ROWS));
  // The short tile comes first, where its latency hides behind the next tile's loads: tile 0 begins
  // `skip` rows before the chunk and leaves them out.
  const int skip = static_cast<int>(tiles * TILE_ROWS - rows);
  const int64_t offset = (chunks.begin(chunk) - skip) * row_stride + column;

  Reader reader(x + offset, row_stride, tiles, skip, columns_left);
  typename Reader::Row tile[TILE_ROWS];
  const auto first_tile = [&] {
    if constexpr (WEIGHTED) {
      roots += chunks.begin(chunk) - skip;
      float weights[TILE_ROWS];
      load_weights(roots, skip, weights);
      reader.next(tile, skip);
      return LaneMoments<Reader>(tile, weights);
    } else {
      reader.next(tile, skip);
      return LaneMoments<Reader>(tile, skip);
    }
  };
  LaneMoments<Reader> moments = first_tile();
  for (int t = 1; t < tiles; ++t) {
    if constexpr (WEIGHTED) {
      // On their way while the tile is waited for.
      float weights[TILE_ROWS];
      load_weights(roots + int64_t{t} * TILE_ROWS, 0, weights);
      reader.next(tile, 0);
      moments.template merge<true>(LaneMoments<Reader>(tile, weights));
    } else {
      reader.next(tile, 0);
      moments.template merge<false>(LaneMoments<Reader>(tile, 0));
    }
  }

  if (chunks.count == 1) {
    const MergeWeights weights = WEIGHTED ? state.weights_of(moments.rows) : state.weights;
#pragma unroll
    for (int j = 0; j < Reader::COLUMNS; ++j) {
      const int step = j * Reader::STEP;
      if (step < columns_left) state.merge(column + step, moments.mean[j], moments.m2[j], weights);
    }
  } else {
    if (WEIGHTED && column == 0) partial[2 * int64_t{chunks.count} * channels + chunk] = moments.rows;
    float* chunk_mean = partial + int64_t{chunk} * channels + column;
    Reader::store(chunk_mean, moments.mean, columns_left);
    Reader::store(chunk_mean + int64_t{chunks.count} * channels, moments.m2, columns_left);
  }
}

struct Part {
  float rows;
  float mean;
  float m2;
};

__device__ float warp_sum(float x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A block merges 32 columns: warp w its share of the chunks, a column to a lane (so that loads coalesce);
// then a warp merges the shares of one column, a share to a lane.
template <bool WEIGHTED>
__global__ void merge_chunks(const float* __restrict__ partial, int channels, Chunks chunks, State state) {
  __shared__ Part shares[WARP][WARP + 1];
  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int first_column = blockIdx.x * WARP;
  // The chunks do not touch the state: it comes from memory while they are still being read.
  if (warp == 0 && first_column + lane < channels) state.prefetch(first_column + lane);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  Part share = {0.0f, 0.0f, 0.0f};
  if (first_column + lane < channels) {
    const float* mean = partial + first_column + lane;
    const float* m2 = mean + int64_t{chunks.count} * channels;
    [[maybe_unused]] const float* totals = partial + 2 * int64_t{chunks.count} * channels;
#pragma unroll 4
    for (int chunk = warp; chunk < chunks.count; chunk += blockDim.y) {
      float rows, weight;
      if constexpr (WEIGHTED) {
        rows = totals[chunk];
        weight = fraction_of(rows, share.rows + rows);
      } else {
        rows = chunks.rows(chunk);
        weight = __fdividef(rows, share.rows + rows);
      }
      const float delta = mean[int64_t{chunk} * channels] - share.mean;
      share.mean += delta * weight;
      share.m2 += m2[int64_t{chunk} * channels] + delta * delta * (share.rows * weight);
      share.rows += rows;
    }
  }
  shares[lane][warp] = share;
  __syncthreads();

  for (int c = warp; c < WARP && first_column + c < channels; c += blockDim.y) {
    const Part part = lane < static_cast<int>(blockDim.y) ? shares[c][lane] : Part{0.0f, 0.0f, 0.0f};
    // Relative to one share's mean, so that equal means merge exactly.
    const float origin = __shfl_sync(~0u, part.mean, 0);
    const float moment = warp_sum(part.rows * (part.mean - origin));
    const float total = warp_sum(part.rows);
    const float mean = origin + (WEIGHTED && total == 0.0f ? 0.0f : moment / total);
    const float delta = part.mean - mean;
    const float m2 = warp_sum(part.m2 + part.rows * delta * delta);
    if (lane == 0) state.merge(first_column + c, mean, m2, WEIGHTED ? state.weights_of(total) : state.weights);
  }
}

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("channel moments: ") + cudaGetErrorString(status));
  }
}

// Every row of every lane starts on 16 bytes, and no lane's columns cross the last channel.
bool rows_allow_16_byte_loads(const Rows& x) {
  const int64_t size = element_size(x.dtype);
  return reinterpret_cast<uintptr_t>(x.x) % VECTOR_BYTES == 0 && x.row_stride * size % VECTOR_BYTES == 0 &&
         x.channels * size % VECTOR_BYTES == 0;
}

// Above 48 KiB a kernel's shared memory has to be asked for.
template <bool WEIGHTED, typename... Elements>
void allow_rings() {
  (check(cudaFuncSetAttribute(chunk_moments<RingReader<Elements>, WEIGHTED>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              RingReader<Elements>::WARP_SHARED_BYTES * WARPS)),
   ...);
}

// Prepares the current device at its first use, so that an update costs the host little more than its launches.
// Returns whether merge_chunks waits for the chunks on the device: whether its loaded code is sm_90's or later
// (a newer device runs sm_80's, translated).
bool prepare_current_device() {
  static std::mutex mutex;
  static std::map<int, bool> prepared;
  int device;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (const auto known = prepared.find(device); known != prepared.end()) return known->second;
  allow_rings<false, float, BFloat16, __half>();
  allow_rings<true, float, BFloat16, __half>();
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, merge_chunks<false>));
  return prepared[device] = code.ptxVersion >= 90;
}

template <typename Reader>
void launch_chunk_moments(const Rows& x, const Chunks& chunks, const float* roots, float* partial, const State& state,
                          cudaStream_t stream) {
  const int channels = static_cast<int>(x.channels);
  const int strips = static_cast<int>(ceil_div(channels, WARP * Reader::COLUMNS));
  const int blocks = static_cast<int>(ceil_div(int64_t{strips} * chunks.count, WARPS));
  const auto kernel = roots == nullptr ? chunk_moments<Reader, false> : chunk_moments<Reader, true>;
  kernel<<<blocks, WARPS * WARP, Reader::WARP_SHARED_BYTES * WARPS, stream>>>(
      static_cast<const typename Reader::Element*>(x.x), channels, x.row_stride, strips, chunks, roots, partial, state);
  check(cudaGetLastError());
}

template <typename T>
void launch_chunk_moments_of(const Rows& x, const Chunks& chunks, const float* roots, float* partial,
                             const State& state, cudaStream_t stream) {
  if (rows_allow_16_byte_loads(x)) {
    launch_chunk_moments<RingReader<T>>(x, chunks, roots, partial, state, stream);
  } else {
    launch_chunk_moments<ElementReader<T>>(x, chunks, roots, partial, state, stream);
  }
}

// With `early` its blocks start while the last chunks are still being read, and wait for them on the device.
void launch_merge_chunks(int channels, const Chunks& chunks, const float* partial, const State& state, bool early,
                         cudaStream_t stream) {
  cudaLaunchAttribute early_start;
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(channels, WARP)));
  config.blockDim = dim3(WARP, static_cast<unsigned>(std::min(WARP, chunks.count)));
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = early ? 1 : 0;
  const auto kernel = state.total == nullptr ? merge_chunks<false> : merge_chunks<true>;
  check(cudaLaunchKernelEx(&config, kernel, partial, channels, chunks, state));
}

}  // namespace

size_t channel_moments_cuda_workspace(DType dtype, int64_t rows, int64_t channels, int multiprocessors,
                                      bool weighted) {
  if (rows == 0 || channels == 0) return 0;
  const int64_t chunks = row_chunks(dtype, rows, channels, multiprocessors);
  return chunks == 1 ? 0 : sizeof(float) * chunks * (2 * channels + (weighted ? 1 : 0));
}

void channel_moments_cuda(const Rows& x, const MomentsState& moments, void* workspace, int multiprocessors,
                          CUstream_st* stream, const RowWeights& weights) {
  if (x.rows == 0 || x.channels == 0) return;
  const bool early_merge = prepare_current_device();
  const int count = row_chunks(x.dtype, x.rows, x.channels, multiprocessors);
  const Chunks chunks = {count, static_cast<int>(x.rows % count), x.rows / count};
  const State state = {moments.mean, moments.m2, merge_weights(moments.count, x.rows), weights.total};
  const auto partial = static_cast<float*>(workspace);
  switch (x.dtype) {
    case DType::float32: launch_chunk_moments_of<float>(x, chunks, weights.roots, partial, state, stream); break;
    case DType::bfloat16: launch_chunk_moments_of<BFloat16>(x, chunks, weights.roots, partial, state, stream); break;
    case DType::float16: launch_chunk_moments_of<__half>(x, chunks, weights.roots, partial, state, stream); break;
  }
  if (count > 1) launch_merge_chunks(static_cast<int>(x.channels), chunks, partial, state, early_merge, stream);
}

}  // namespace pyprune
