#include "pyprune/channel_moments.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace pyprune {
namespace {

constexpr int WARP = 32;
constexpr int VECTOR_BYTES = 16;  // the widest load of a lane
// A tile is centred on its own mean and then merged: 8 rows spread the merge over enough elements, and 8
// columns of them (32 registers) fit beside the moments without spills.
constexpr int TILE_ROWS = 8;
constexpr int TILE_BYTES = TILE_ROWS * WARP * VECTOR_BYTES;
// A chunk's partial moments cost 16 bytes a channel to write and read again, a quarter of 32 bf16 rows.
// Below 64 rows there is one chunk, hence one launch.
constexpr int64_t MIN_CHUNK_ROWS = 4 * TILE_ROWS;

// How many warps read, and how far ahead: `blocks` blocks of `warps` share a multiprocessor, and each warp
// keeps `stages` tiles of shared memory, all but one of them in flight.
struct Geometry {
  int warps;
  int blocks;
  int stages;
  bool evict_first;  // lines of x leave L2 before any other

  constexpr int threads() const { return warps * WARP; }
  constexpr int shared_bytes() const { return warps * stages * TILE_BYTES; }
  constexpr Geometry with_stages(int count) const { return {warps, blocks, count, evict_first}; }
};

constexpr Geometry GEOMETRIES[] = {
    // 128 KiB in flight and 192 KiB of shared memory on a multiprocessor. H200, bf16, dirty L2: 65536 x 4096 in
    // 138.1 us, 262144 x 4096 in 488.3; loads into registers with 3 blocks of 8 warps took 143.4 and 510.4, bulk
    // copies into the same ring 137.9 and 491.0, and device copies of as many bytes 130.3 and 507.5.
    {8, 2, 3, false},
    // 144 KiB in flight and a quarter fewer chunks.
    {4, 3, 4, true},
};
// Where shared memory is smaller: 64 KiB are enough below 2.5 TB/s (A100).
constexpr int FEWEST_STAGES = 2;

// A warp owns a strip of columns over a chunk of rows; no two warps share anything, so any sizes spread
// evenly over one resident wave.
constexpr int64_t strip_columns(int64_t element_bytes) { return WARP * VECTOR_BYTES / element_bytes; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int row_chunks(DType dtype, int64_t rows, int64_t channels, int multiprocessors, const Geometry& geometry) {
  const int64_t resident_warps = int64_t{multiprocessors} * geometry.blocks * geometry.warps;
  const int64_t strips = ceil_div(channels, strip_columns(element_size(dtype)));
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

struct State {
  float* mean;
  float* m2;
  MergeWeights weights;

  __device__ void merge(int column, float part_mean, float part_m2) const {
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

struct BFloat16 {
  uint16_t bits;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ float to_float(__half x) { return __half2float(x); }

// Reads a warp's strip tile by tile where every row starts on 16 bytes: neighbouring columns to a lane, through
// a ring in shared memory that cp.async fills. A lane reads only what it copied itself, so nothing but its own
// copies has to be waited for.
template <typename T, Geometry G>
struct RingReader {
  using Element = T;
  using Row = uint4;
  static constexpr int COLUMNS = VECTOR_BYTES / sizeof(T);
  static constexpr int STEP = 1;  // between a lane's columns
  static constexpr int SHARED_BYTES = G.shared_bytes();

  const T* x;  // the row that is copied next
  int64_t row_stride;
  int tiles_left;
  uint32_t ring;  // the lane's first 16 bytes
  int stage = 0;
  uint64_t policy = 0;

  static __device__ int first_column(int strip, int lane) { return (strip * WARP + lane) * COLUMNS; }

  __device__ RingReader(const T* x, int64_t row_stride, int tiles, int /*columns_left*/, int skip)
      : x(x), row_stride(row_stride), tiles_left(tiles) {
    extern __shared__ uint4 shared[];
    const int first = threadIdx.x / WARP * G.stages * (TILE_BYTES / VECTOR_BYTES) + threadIdx.x % WARP;
    ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared + first));
    if constexpr (G.evict_first) {
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    copy(0, skip);
#pragma unroll
    for (int s = 1; s < G.stages - 1; ++s) copy(s, 0);
  }

  __device__ uint32_t address(int stage, int row) const {
    return ring + (stage * TILE_ROWS + row) * (WARP * VECTOR_BYTES);
  }

  // Starts the copy of the next tile; past the last one, of an empty group, so that groups count tiles.
  __device__ void copy(int stage, int skip) {
    if (tiles_left > 0) {
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        if (r < skip) continue;
        if constexpr (G.evict_first) {
          asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address(stage, r)),
                       "l"(x + r * row_stride), "l"(policy)
                       : "memory");
        } else {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(stage, r)),
                       "l"(x + r * row_stride)
                       : "memory");
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    x += TILE_ROWS * row_stride;
    --tiles_left;
  }

  // The next tile; its first `skip` rows are zero.
  __device__ void next(Row (&tile)[TILE_ROWS], int skip) {
    asm volatile("cp.async.wait_group %0;" ::"n"(G.stages - 2) : "memory");
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = {};
      if (r >= skip) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(tile[r].x), "=r"(tile[r].y), "=r"(tile[r].z), "=r"(tile[r].w)
                     : "r"(address(stage, r))
                     : "memory");
      }
    }
    copy(stage == 0 ? G.stages - 1 : stage - 1, 0);
    stage = stage == G.stages - 1 ? 0 : stage + 1;
  }

  static __device__ float value(const Row& row, int j) {
    const uint32_t word = (&row.x)[j * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    const uint16_t bits = j % 2 == 0 ? word & 0xffff : word >> 16;
    return to_float(reinterpret_cast<const T&>(bits));
  }

  static __device__ void store(float* target, const float (&values)[COLUMNS], int /*columns_left*/) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      *reinterpret_cast<float4*>(target + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
    }
  }
};

// Reads any other strip element by element, neighbouring columns to neighbouring lanes, into registers.
template <typename T>
struct ElementReader {
  using Element = T;
  static constexpr int COLUMNS = VECTOR_BYTES / sizeof(T);
  static constexpr int STEP = WARP;
  static constexpr int SHARED_BYTES = 0;
  struct Row {
    T x[COLUMNS];
  };

  const T* x;
  int64_t row_stride;
  int columns_left;

  static __device__ int first_column(int strip, int lane) { return strip * WARP * COLUMNS + lane; }

  __device__ ElementReader(const T* x, int64_t row_stride, int /*tiles*/, int columns_left, int /*skip*/)
      : x(x), row_stride(row_stride), columns_left(columns_left) {}

  __device__ void next(Row (&tile)[TILE_ROWS], int skip) {
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = {};
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (r >= skip && j * STEP < columns_left) tile[r].x[j] = x[r * row_stride + j * STEP];
      }
    }
    x += TILE_ROWS * row_stride;
  }

  static __device__ float value(const Row& row, int j) { return to_float(row.x[j]); }

  static __device__ void store(float* target, const float (&values)[COLUMNS], int columns_left) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (j * STEP < columns_left) target[j * STEP] = values[j];
    }
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

  // Chan, Golub, LeVeque 1983: neither a large mean nor an outlier in the first row costs digits.
  __device__ void merge(const LaneMoments& part) {
    const float mean_weight = __fdividef(part.rows, rows + part.rows);
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

// With one chunk, its moments go straight into the state; with more, into [chunks, channels] planes of
// means and M2s that merge_chunks reads.
template <typename Reader, Geometry G>
__global__ void __launch_bounds__(G.threads(), G.blocks)
    chunk_moments(const typename Reader::Element* __restrict__ x, int channels, int64_t row_stride, int strips,
                  Chunks chunks, float* __restrict__ partial, State state) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int warp = blockIdx.x * G.warps + threadIdx.x / WARP;
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

  Reader reader(x + offset, row_stride, tiles, columns_left, skip);
  typename Reader::Row tile[TILE_ROWS];
  reader.next(tile, skip);
  LaneMoments<Reader> moments(tile, skip);
  for (int t = 1; t < tiles; ++t) {
    reader.next(tile, 0);
    moments.merge(LaneMoments<Reader>(tile, 0));
  }

  if (chunks.count == 1) {
#pragma unroll
    for (int j = 0; j < Reader::COLUMNS; ++j) {
      const int step = j * Reader::STEP;
      if (step < columns_left) state.merge(column + step, moments.mean[j], moments.m2[j]);
    }
  } else {
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
#pragma unroll 4
    for (int chunk = warp; chunk < chunks.count; chunk += blockDim.y) {
      const float rows = chunks.rows(chunk);
      const float weight = __fdividef(rows, share.rows + rows);
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
    const float mean = origin + warp_sum(part.rows * (part.mean - origin)) / warp_sum(part.rows);
    const float delta = part.mean - mean;
    const float m2 = warp_sum(part.m2 + part.rows * delta * delta);
    if (lane == 0) state.merge(first_column + c, mean, m2);
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

// What the launches depend on beside the sizes.
struct Device {
  bool deep_ring;    // shared memory holds all stages of all blocks
  bool early_merge;  // the loaded code is sm_90's or later, where merge_chunks waits for the chunks on the device
};

// Above 48 KiB shared memory has to be asked for.
template <Geometry G, typename... Elements>
void allow_rings() {
  (check(cudaFuncSetAttribute(chunk_moments<RingReader<Elements, G>, G>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              G.shared_bytes())),
   ...);
}

template <Geometry G>
Device prepare_device(int index) {
  int shared, reserved;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  check(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, index));
  cudaFuncAttributes merge;
  check(cudaFuncGetAttributes(&merge, merge_chunks));
  const Device device = {G.blocks * (G.shared_bytes() + reserved) <= shared, merge.ptxVersion >= 90};
  if (device.deep_ring) {
    allow_rings<G, float, BFloat16, __half>();
  } else {
    allow_rings<G.with_stages(FEWEST_STAGES), float, BFloat16, __half>();
  }
  return device;
}

// The current device, prepared at its first use: the driver's answers do not change.
template <Geometry G>
Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> prepared;
  int index;
  check(cudaGetDevice(&index));
  const std::lock_guard lock(mutex);
  const auto known = prepared.find(index);
  return known != prepared.end() ? known->second : prepared.emplace(index, prepare_device<G>(index)).first->second;
}

template <typename Reader, Geometry G>
void launch_chunk_moments(const Rows& x, const Chunks& chunks, float* partial, const State& state,
                          cudaStream_t stream) {
  const int channels = static_cast<int>(x.channels);
  const int strips = static_cast<int>(ceil_div(channels, WARP * Reader::COLUMNS));
  const int blocks = static_cast<int>(ceil_div(int64_t{strips} * chunks.count, G.warps));
  chunk_moments<Reader, G><<<blocks, G.threads(), Reader::SHARED_BYTES, stream>>>(
      static_cast<const typename Reader::Element*>(x.x), channels, x.row_stride, strips, chunks, partial, state);
  check(cudaGetLastError());
}

template <typename T, Geometry G>
void launch_chunk_moments_of(const Rows& x, const Device& device, const Chunks& chunks, float* partial,
                             const State& state, cudaStream_t stream) {
  constexpr Geometry SHALLOW = G.with_stages(FEWEST_STAGES);
  if (!rows_allow_16_byte_loads(x)) {
    launch_chunk_moments<ElementReader<T>, G>(x, chunks, partial, state, stream);
  } else if (device.deep_ring) {
    launch_chunk_moments<RingReader<T, G>, G>(x, chunks, partial, state, stream);
  } else {
    launch_chunk_moments<RingReader<T, SHALLOW>, SHALLOW>(x, chunks, partial, state, stream);
  }
}

void launch_merge_chunks(int channels, const Device& device, const Chunks& chunks, const float* partial,
                         const State& state, cudaStream_t stream) {
  cudaLaunchAttribute early_start;
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(channels, WARP)));
  config.blockDim = dim3(WARP, static_cast<unsigned>(std::min<int64_t>(WARP, chunks.count)));
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = device.early_merge ? 1 : 0;
  check(cudaLaunchKernelEx(&config, merge_chunks, partial, channels, chunks, state));
}

template <Geometry G>
void update(const Rows& x, const MomentsState& moments, float* partial, int multiprocessors, cudaStream_t stream) {
  const Device device = current_device<G>();
  const int count = row_chunks(x.dtype, x.rows, x.channels, multiprocessors, G);
  const Chunks chunks = {count, static_cast<int>(x.rows % count), x.rows / count};
  const State state = {moments.mean, moments.m2, merge_weights(moments.count, x.rows)};
  switch (x.dtype) {
    case DType::float32: launch_chunk_moments_of<float, G>(x, device, chunks, partial, state, stream); break;
    case DType::bfloat16: launch_chunk_moments_of<BFloat16, G>(x, device, chunks, partial, state, stream); break;
    case DType::float16: launch_chunk_moments_of<__half, G>(x, device, chunks, partial, state, stream); break;
  }
  if (count > 1) launch_merge_chunks(static_cast<int>(x.channels), device, chunks, partial, state, stream);
}

}  // namespace

size_t channel_moments_cuda_workspace(DType dtype, int64_t rows, int64_t channels, int multiprocessors) {
  if (rows == 0 || channels == 0) return 0;
  const int64_t chunks = row_chunks(dtype, rows, channels, multiprocessors, GEOMETRIES[0]);
  return chunks == 1 ? 0 : 2 * sizeof(float) * chunks * channels;
}

void channel_moments_cuda(const Rows& x, const MomentsState& moments, void* workspace, int multiprocessors,
                          CUstream_st* stream, int candidate) {
  if (x.rows == 0 || x.channels == 0) return;
  float* partial = static_cast<float*>(workspace);
  if (candidate == 0) {
    update<GEOMETRIES[0]>(x, moments, partial, multiprocessors, stream);
  } else {
    update<GEOMETRIES[1]>(x, moments, partial, multiprocessors, stream);
  }
}

}  // namespace pyprune
