#include "pyprune/channel_moments.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "channel_moments_block.h"
#include "isa.h"

namespace pyprune {
namespace {

// Enough pieces to balance 64 threads; long enough chunks that their partial results (8 bytes a channel)
// stay below 1 % of the traffic.
constexpr int64_t WANTED_PIECES = 128;
constexpr int64_t MIN_CHUNK_ROWS = 512;
// Starting a thread costs about 20 us, in which one core reads about this much.
constexpr int64_t MIN_BYTES_PER_THREAD = 256 << 10;

// Columns are cut into blocks, rows into chunks, by the sizes alone.
struct Partition {
  Partition(int64_t rows, int64_t channels)
      : rows(rows),
        channels(channels),
        blocks((channels + COLUMN_BLOCK - 1) / COLUMN_BLOCK),
        chunks(std::clamp<int64_t>(rows / MIN_CHUNK_ROWS, 1, (WANTED_PIECES + blocks - 1) / blocks)) {}

  int64_t chunk_begin(int64_t chunk) const {
    return chunk * (rows / chunks) + std::min(chunk, rows % chunks);
  }
  int block_columns(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(COLUMN_BLOCK, channels - block * COLUMN_BLOCK));
  }

  int64_t rows, channels, blocks, chunks;
};

BlockMoments choose_kernel(DType dtype) {
  const BlockMomentsTable* table = &portable::block_moments;
#if defined(__x86_64__)
  switch (choose_isa()) {
    case Isa::avx512: table = &avx512::block_moments; break;
    case Isa::avx2: table = &avx2::block_moments; break;
    case Isa::portable: break;
  }
#endif
  switch (dtype) {
    case DType::bfloat16: return table->bfloat16;
    case DType::float16: return table->float16;
    case DType::float32: break;
  }
  return table->float32;
}

// Runs piece(0) ... piece(pieces - 1), whichever thread comes first taking the next; piece must not throw.
template <typename Piece>
void run_pieces(int64_t pieces, int threads, const Piece& piece) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t p; (p = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) piece(p);
  };
  std::vector<std::jthread> helpers;
  helpers.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) helpers.emplace_back(work);
  work();
}

// What the rows of a chunk count: one each, or their weights.
double total_of_chunk(const Partition& partition, int64_t chunk, const float* roots) {
  const int64_t begin = partition.chunk_begin(chunk), end = partition.chunk_begin(chunk + 1);
  if (roots == nullptr) return static_cast<double>(end - begin);
  double total = 0;
  for (int64_t row = begin; row < end; ++row) total += roots[row] * roots[row];
  return total;
}

}  // namespace

void channel_moments_cpu(const Rows& x, const MomentsState& state, int threads, const RowWeights& weights) {
  if (x.rows == 0 || x.channels == 0) return;
  const Partition partition(x.rows, x.channels);
  const BlockMoments kernel = choose_kernel(x.dtype);
  const int64_t size = element_size(x.dtype);

  // [chunks, blocks, COLUMN_BLOCK]: whole blocks, so that the kernel may write whole vectors.
  const int64_t plane = partition.blocks * COLUMN_BLOCK;
  std::vector<float> means(partition.chunks * plane);
  std::vector<float> m2s(partition.chunks * plane);

  const int64_t pieces = partition.blocks * partition.chunks;
  const int64_t useful = std::min(pieces, x.rows * x.channels * size / MIN_BYTES_PER_THREAD + 1);
  run_pieces(pieces, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t piece) {
    const int64_t chunk = piece / partition.blocks;
    const int64_t block = piece % partition.blocks;
    const int64_t begin = partition.chunk_begin(chunk);
    const int64_t offset = chunk * plane + block * COLUMN_BLOCK;
    const char* start = static_cast<const char*>(x.x) + (begin * x.row_stride + block * COLUMN_BLOCK) * size;
    kernel(start, weights.roots == nullptr ? nullptr : weights.roots + begin, partition.chunk_begin(chunk + 1) - begin,
           x.row_stride, partition.block_columns(block), means.data() + offset, m2s.data() + offset);
  });

  std::vector<double> totals(partition.chunks);
  for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
    totals[chunk] = total_of_chunk(partition, chunk, weights.roots);
  }
  const double before = weights.roots == nullptr || state.count == 0 ? static_cast<double>(state.count) : *weights.total;
  for (int64_t c = 0; c < x.channels; ++c) {
    double count = before;
    double mean = state.count > 0 ? state.mean[c] : 0.0;
    double m2 = state.count > 0 ? state.m2[c] : 0.0;
    for (int64_t chunk = 0; chunk < partition.chunks; ++chunk) {
      const double rows = totals[chunk];
      if (rows == 0) continue;
      const double weight = rows / (count + rows);
      const double delta = means[chunk * plane + c] - mean;
      mean += delta * weight;
      m2 += m2s[chunk * plane + c] + delta * delta * count * weight;
      count += rows;
    }
    state.mean[c] = static_cast<float>(mean);
    state.m2[c] = static_cast<float>(m2);
  }
}

}  // namespace pyprune
