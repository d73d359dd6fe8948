#include "pyprune/channel_moments.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pyprune {
namespace {

constexpr int WARP = 32;
constexpr int WARPS_PER_BLOCK = 8;
// Eight 16-byte loads a lane and 512 lanes a multiprocessor keep 64 KiB in flight on each, twice what
// HBM3e's latency asks for.
constexpr int TILE_ROWS = 8;
// Shorter chunks would read and write more partial results than they save in waiting.
constexpr int64_t MIN_CHUNK_ROWS = 4 * TILE_ROWS;
constexpr int VECTOR_BYTES = 16;

// A warp owns a strip of columns over a chunk of rows; no two warps share anything, so any sizes spread
// evenly over one resident wave.
constexpr int64_t strip_columns(int64_t element_bytes) { return WARP * VECTOR_BYTES / element_bytes; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int row_chunks(DType dtype, int64_t rows, int64_t channels, int multiprocessors, int variant) {
  const int64_t resident_warps = int64_t{multiprocessors} * (variant == 0 ? 3 : 2) * WARPS_PER_BLOCK;
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
};

struct BFloat16 {
  uint16_t bits;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ float to_float(__half x) { return __half2float(x); }

__device__ uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// How a lane reads its columns of one row: 16 bytes at once ...
template <typename T>
struct VectorAccess {
  using Element = T;
  using Row = uint4;
  static constexpr int COLUMNS = VECTOR_BYTES / sizeof(T);
  static constexpr int STEP = 1;

  static __device__ int first_column(int strip, int lane) { return (strip * WARP + lane) * COLUMNS; }
  static __device__ Row load(const T* x, int) { return load_streaming(x); }
  static __device__ float value(const Row& row, int j) {
    const uint32_t word = (&row.x)[j * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    const uint16_t bits = j % 2 == 0 ? word & 0xffff : word >> 16;
    return to_float(reinterpret_cast<const T&>(bits));
  }
};

// ... or, where rows do not start on 16 bytes, element by element, neighbouring lanes side by side.
template <typename T>
struct ScalarAccess {
  using Element = T;
  struct Row {
    T x[2];
  };
  static constexpr int COLUMNS = 2;
  static constexpr int STEP = WARP;

  static __device__ int first_column(int strip, int lane) { return strip * WARP * COLUMNS + lane; }
  static __device__ Row load(const T* x, int columns_left) {
    Row row{};
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (j * STEP < columns_left) row.x[j] = x[j * STEP];
    }
    return row;
  }
  static __device__ float value(const Row& row, int j) { return to_float(row.x[j]); }
};

template <typename Access>
struct LaneMoments {
  float mean[Access::COLUMNS];
  float m2[Access::COLUMNS];
  float rows;

  // Centres the tile's rows [skip, TILE_ROWS) on their own mean; the rows before are zero.
  __device__ void start(const typename Access::Row (&tile)[TILE_ROWS], int skip) {
    rows = TILE_ROWS - skip;
    const float inverse = 1.0f / rows;
#pragma unroll
    for (int j = 0; j < Access::COLUMNS; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) sum += Access::value(tile[r], j);
      mean[j] = sum * inverse;
      m2[j] = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        const float deviation = r >= skip ? Access::value(tile[r], j) - mean[j] : 0.0f;
        m2[j] += deviation * deviation;
      }
    }
  }

  // Centres a whole tile on its own mean, then merges it (Chan, Golub, LeVeque 1979): neither a large
  // mean nor an outlier in the first row costs digits.
  __device__ void merge(const typename Access::Row (&tile)[TILE_ROWS]) {
    const float mean_weight = __fdividef(TILE_ROWS, rows + TILE_ROWS);
    const float m2_weight = rows * mean_weight;
#pragma unroll
    for (int j = 0; j < Access::COLUMNS; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) sum += Access::value(tile[r], j);
      const float tile_mean = sum * (1.0f / TILE_ROWS);
      float squares = 0.0f;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        const float deviation = Access::value(tile[r], j) - tile_mean;
        squares += deviation * deviation;
      }
      const float delta = tile_mean - mean[j];
      mean[j] += delta * mean_weight;
      m2[j] += squares + delta * delta * m2_weight;
    }
    rows += TILE_ROWS;
  }
};

template <typename Access>
struct RegisterReader {
  using T = typename Access::Element;
  static constexpr int BLOCKS = 3;
  static constexpr int SHARED_BYTES = 0;
  const T* x;
  int64_t row_stride;
  int columns_left;

  __device__ RegisterReader(const T* x, int64_t row_stride, int, int columns_left, void*)
      : x(x), row_stride(row_stride), columns_left(columns_left) {}
  __device__ void start(int) {}
  __device__ void next(typename Access::Row (&tile)[TILE_ROWS], int skip) {
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = r >= skip ? Access::load(x + r * row_stride, columns_left) : typename Access::Row{};
    }
    x += TILE_ROWS * row_stride;
  }
};

template <typename Access>
struct DoubleRegisterReader : RegisterReader<Access> {
  static constexpr int BLOCKS = 2;
  using RegisterReader<Access>::RegisterReader;
};

constexpr int STAGES = 3;
constexpr int TILE_BYTES = TILE_ROWS * WARP * VECTOR_BYTES;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

template <typename Access>
struct AsyncCopyReader {
  using T = typename Access::Element;
  static constexpr int BLOCKS = 2;
  static constexpr int SHARED_BYTES = WARPS_PER_BLOCK * STAGES * TILE_BYTES;
  const T* x;
  int64_t row_stride;
  int left;
  uint4* ring;
  int stage = 0;

  __device__ AsyncCopyReader(const T* x, int64_t row_stride, int tiles, int, unsigned char* shared)
      : x(x), row_stride(row_stride), left(tiles) {
    ring = reinterpret_cast<uint4*>(shared + threadIdx.x / WARP * STAGES * TILE_BYTES) + threadIdx.x % WARP;
  }
  __device__ void issue(int slot, int skip) {
    if (left > 0) {
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        if (r >= skip) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                           shared_address(ring + (slot * TILE_ROWS + r) * WARP)),
                       "l"(x + r * row_stride)
                       : "memory");
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    x += TILE_ROWS * row_stride;
    --left;
  }
  __device__ void start(int skip) {
    issue(0, skip);
    for (int s = 1; s < STAGES - 1; ++s) issue(s, 0);
  }
  __device__ void next(typename Access::Row (&tile)[TILE_ROWS], int skip) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = r >= skip ? ring[(stage * TILE_ROWS + r) * WARP] : typename Access::Row{};
    }
    issue(stage == 0 ? STAGES - 1 : stage - 1, 0);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
};

template <typename Access>
struct BulkCopyReader {
  using T = typename Access::Element;
  static constexpr int BLOCKS = 2;
  static constexpr int RING_BYTES = STAGES * TILE_BYTES;
  static constexpr int SHARED_BYTES = WARPS_PER_BLOCK * (RING_BYTES + STAGES * 8);
  const T* x;
  int64_t row_stride;
  int left;
  uint4* ring;
  uint32_t full;  // the first of STAGES barriers
  uint32_t row_bytes;
  int stage = 0;
  uint32_t phase = 0;
  bool leader;

  __device__ BulkCopyReader(const T* x, int64_t row_stride, int tiles, int columns_left,
                            unsigned char* shared)
      : x(x), row_stride(row_stride), left(tiles), leader(threadIdx.x % WARP == 0) {
    const int warp = threadIdx.x / WARP;
    ring = reinterpret_cast<uint4*>(shared + warp * RING_BYTES) + threadIdx.x % WARP;
    full = shared_address(shared + WARPS_PER_BLOCK * RING_BYTES + warp * STAGES * 8);
    row_bytes = sizeof(T) * min(columns_left, WARP * Access::COLUMNS);
  }
  __device__ void issue(int slot, int skip) {
    if (leader && left > 0) {
      const uint32_t barrier = full + slot * 8;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"((TILE_ROWS - skip) * row_bytes)
                   : "memory");
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        if (r >= skip) {
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  shared_address(ring + (slot * TILE_ROWS + r) * WARP)),
              "l"(x + r * row_stride), "r"(row_bytes), "r"(barrier)
              : "memory");
        }
      }
    }
    x += TILE_ROWS * row_stride;
    --left;
  }
  __device__ void start(int skip) {
    if (leader) {
      for (int s = 0; s < STAGES; ++s) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    issue(0, skip);
    for (int s = 1; s < STAGES - 1; ++s) issue(s, 0);
  }
  __device__ void next(typename Access::Row (&tile)[TILE_ROWS], int skip) {
    // Every lane has read the slot before this one.
    __syncwarp();
    issue(stage == 0 ? STAGES - 1 : stage - 1, 0);
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait;\n"
        "}" ::"r"(full + stage * 8),
        "r"(phase)
        : "memory");
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = r >= skip ? ring[(stage * TILE_ROWS + r) * WARP] : typename Access::Row{};
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    phase ^= stage == 0;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename Reader>
struct Supported { using Type = Reader; };
template <typename Access>
struct Supported<BulkCopyReader<Access>> { using Type = AsyncCopyReader<Access>; };
#else
template <typename Reader>
struct Supported { using Type = Reader; };
#endif

// With one chunk, its moments go straight into the state; with more, into [chunks, channels] planes of
// means and M2s that merge_chunks reads.
template <typename Access, typename Reader>
__global__ void __launch_bounds__(WARPS_PER_BLOCK* WARP, Reader::BLOCKS)
    chunk_moments(const typename Access::Element* __restrict__ x, int channels, int64_t row_stride,
                  int strips, Chunks chunks, float* __restrict__ partial, State state) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  using Row = typename Access::Row;
  const int warp = blockIdx.x * WARPS_PER_BLOCK + threadIdx.x / WARP;
  const int chunk = warp / strips;
  const int column = Access::first_column(warp % strips, threadIdx.x % WARP);
  const int columns_left = channels - column;
  if (chunk >= chunks.count || columns_left <= 0) return;

  const int64_t rows = chunks.rows(chunk);
  const int tiles = static_cast<int>(ceil_div(rows, TILE_ROWS));
  // The short tile comes first, where its latency hides behind the next tile's loads: tile 0 begins
  // `skip` rows before the chunk and leaves them out.
  const int skip = static_cast<int>(tiles * TILE_ROWS - rows);
  const int64_t offset = (chunks.begin(chunk) - skip) * row_stride + column;

  extern __shared__ __align__(128) unsigned char shared[];
  typename Supported<Reader>::Type reader(x + offset, row_stride, tiles, columns_left, shared);
  Row tile[TILE_ROWS];
  LaneMoments<Access> moments;
  reader.start(skip);
  reader.next(tile, skip);
  moments.start(tile, skip);
  for (int t = 1; t < tiles; ++t) {
    reader.next(tile, 0);
    moments.merge(tile);
  }

  float* chunk_mean = partial + int64_t{chunk} * channels + column;
  float* chunk_m2 = chunk_mean + int64_t{chunks.count} * channels;
  if (chunks.count == 1) {
#pragma unroll
    for (int j = 0; j < Access::COLUMNS; ++j) {
      if (j * Access::STEP < columns_left) state.merge(column + j * Access::STEP, moments.mean[j], moments.m2[j]);
    }
  } else if constexpr (Access::STEP == 1) {
#pragma unroll
    for (int j = 0; j < Access::COLUMNS; j += 4) {
      const float* mean = moments.mean + j;
      const float* m2 = moments.m2 + j;
      *reinterpret_cast<float4*>(chunk_mean + j) = make_float4(mean[0], mean[1], mean[2], mean[3]);
      *reinterpret_cast<float4*>(chunk_m2 + j) = make_float4(m2[0], m2[1], m2[2], m2[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Access::COLUMNS; ++j) {
      if (j * Access::STEP < columns_left) {
        chunk_mean[j * Access::STEP] = moments.mean[j];
        chunk_m2[j * Access::STEP] = moments.m2[j];
      }
    }
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
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __shared__ Part shares[WARP][WARP + 1];
  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int first_column = blockIdx.x * WARP;

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

template <typename Access, template <typename> typename ReaderOf>
void launch_chunk_moments(const Rows& x, const Chunks& chunks, float* partial, const State& state,
                          cudaStream_t stream) {
  const int channels = static_cast<int>(x.channels);
  const int strips = static_cast<int>(ceil_div(channels, WARP * Access::COLUMNS));
  const int blocks = static_cast<int>(ceil_div(int64_t{strips} * chunks.count, WARPS_PER_BLOCK));
  using Reader = ReaderOf<Access>;
  if (Reader::SHARED_BYTES > 0)
    check(cudaFuncSetAttribute(chunk_moments<Access, Reader>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Reader::SHARED_BYTES));
  chunk_moments<Access, Reader><<<blocks, WARPS_PER_BLOCK * WARP, Reader::SHARED_BYTES, stream>>>(
      static_cast<const typename Access::Element*>(x.x), channels, x.row_stride, strips, chunks, partial, state);
  check(cudaGetLastError());
}

template <typename T>
void launch_chunk_moments_of(const Rows& x, const Chunks& chunks, float* partial, const State& state,
                             cudaStream_t stream, int variant) {
  if (!rows_allow_16_byte_loads(x)) {
    launch_chunk_moments<ScalarAccess<T>, RegisterReader>(x, chunks, partial, state, stream);
  } else if (variant == 0) {
    launch_chunk_moments<VectorAccess<T>, RegisterReader>(x, chunks, partial, state, stream);
  } else if (variant == 1) {
    launch_chunk_moments<VectorAccess<T>, AsyncCopyReader>(x, chunks, partial, state, stream);
  } else if (variant == 3) {
    launch_chunk_moments<VectorAccess<T>, DoubleRegisterReader>(x, chunks, partial, state, stream);
  } else {
    launch_chunk_moments<VectorAccess<T>, BulkCopyReader>(x, chunks, partial, state, stream);
  }
}

// On sm_90 its blocks start while the last chunks are still being read, and wait for them on the device.
void launch_merge_chunks(int channels, const Chunks& chunks, const float* partial, const State& state,
                         cudaStream_t stream) {
  int device, major;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaLaunchAttribute early_start;
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(channels, WARP)));
  config.blockDim = dim3(WARP, static_cast<unsigned>(std::min<int64_t>(WARP, chunks.count)));
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = major >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, merge_chunks, partial, channels, chunks, state));
}

}  // namespace

size_t channel_moments_cuda_workspace(DType dtype, int64_t rows, int64_t channels, int multiprocessors) {
  if (rows == 0 || channels == 0) return 0;
  const int64_t chunks = row_chunks(dtype, rows, channels, multiprocessors, 0);
  return chunks == 1 ? 0 : 2 * sizeof(float) * chunks * channels;
}

void channel_moments_cuda(const Rows& x, const MomentsState& moments, void* workspace, int multiprocessors,
                          CUstream_st* stream, int variant) {
  if (x.rows == 0 || x.channels == 0) return;
  const int count = row_chunks(x.dtype, x.rows, x.channels, multiprocessors, variant);
  const Chunks chunks = {count, static_cast<int>(x.rows % count), x.rows / count};
  const State state = {moments.mean, moments.m2, merge_weights(moments.count, x.rows)};
  float* partial = static_cast<float*>(workspace);
  switch (x.dtype) {
    case DType::float32: launch_chunk_moments_of<float>(x, chunks, partial, state, stream, variant); break;
    case DType::bfloat16: launch_chunk_moments_of<BFloat16>(x, chunks, partial, state, stream, variant); break;
    case DType::float16: launch_chunk_moments_of<__half>(x, chunks, partial, state, stream, variant); break;
  }
  if (count > 1) launch_merge_chunks(static_cast<int>(x.channels), chunks, partial, state, stream);
}

}  // namespace pyprune
