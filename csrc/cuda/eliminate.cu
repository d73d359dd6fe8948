#include "pyprune/eliminate.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pyprune {
namespace {

constexpr int WARP = 32;
constexpr int THREADS = 512;
// Below this many rows a block, more blocks only make the exchange longer.
constexpr int MIN_ROWS = 32;
// The longest panel that fits the shared memory is taken, up to this: 128 on an H100 or H200 for up to 28672 channels.
// The updates of A and G after it then do 48 FLOP for a byte that they move, more than float32 units need.
constexpr int MAX_PANEL = 128;
constexpr int MIN_PANEL = 16;

// What a block publishes for one pivot: its best remaining channel. One word carries rank, pivot number and channel,
// so that it can be read at once with the question whether it is already there; smaller is better.
using Key = unsigned long long;
constexpr int CHANNEL_BITS = 20;
constexpr int SEQUENCE_BITS = 12;
constexpr unsigned NOTHING_LEFT = ~0u;
constexpr Key NO_KEY = ~Key{0};
constexpr float REMOVED = -1.0f;  // in place of a floor, which is positive

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ unsigned sequence_of(Key key) {
  return static_cast<unsigned>(key >> CHANNEL_BITS) & ((1u << SEQUENCE_BITS) - 1);
}

__device__ int channel_of(Key key) { return static_cast<int>(key & ((Key{1} << CHANNEL_BITS) - 1)); }

__device__ Key make_key(unsigned rank, unsigned sequence, int channel) {
  return Key{rank} << 32 | Key{sequence & ((1u << SEQUENCE_BITS) - 1)} << CHANNEL_BITS | static_cast<Key>(channel);
}

// Errors are not negative: their bits ascend with them, NaN's lie above infinity's.
__device__ unsigned rank_of(float error) { return __float_as_uint(error) & 0x7fffffffu; }

// What this block wrote before, and its threads before a __syncthreads, is seen by whoever acquires the key.
__device__ void release(Key* slot, Key key) {
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(slot), "l"(key) : "memory");
}

__device__ Key acquire(const Key* slot) {
  Key key;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(key) : "l"(slot) : "memory");
  return key;
}

__device__ Key warp_min(Key key) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(~0u, key, offset);
    key = other < key ? other : key;
  }
  return key;
}

// A block's rows in shared memory, column after column, so that neighbouring threads read neighbouring words.
struct Layout {
  int rows;
  int panel;
  int row_threads;  // threads side by side over the rows, whole warps
  int slices;       // so many strided sums make a product with a row

  __host__ __device__ Layout(int rows, int panel)
      : rows(rows),
        panel(panel),
        row_threads(rows < THREADS ? static_cast<int>(ceil_div(rows, WARP)) * WARP : THREADS),
        slices(THREADS / row_threads) {}

  // pivot_row: float4 [panel]; keys: Key [2, THREADS / WARP]; then floats.
  __host__ __device__ int64_t key_bytes() const { return int64_t{16} * panel; }
  __host__ __device__ int64_t float_bytes() const { return key_bytes() + 2 * (THREADS / WARP) * 8; }
  // lower, u: [panel, rows]; c, q: [slices, rows]; both diagonals and the floor: [rows].
  __host__ __device__ int64_t bytes() const { return float_bytes() + int64_t{4} * rows * (2 * panel + 2 * slices + 3); }
};

struct Exchange {
  Key* slots;      // [2, blocks]
  float2* pivots;  // [2, blocks], diagonals of A and G at the channel in the slot
};

// One block owns rows_per_block rows and keeps their entries of the panel in shared memory. For every pivot the blocks
// exchange their best candidates, once: pivot k + 2 overwrites what was said at k, and nobody says k + 2 before
// everybody, having read k, said k + 1. The slots tell the pivots of all panels apart by their number.
__global__ void __launch_bounds__(THREADS, 1)
    eliminate_panel(Elimination elimination, EliminationPanel panel, Exchange exchange, int rows_per_block) {
  extern __shared__ float4 shared[];
  const Layout layout(rows_per_block, panel.width);
  float4* pivot_row = shared;
  Key* warp_keys = reinterpret_cast<Key*>(reinterpret_cast<char*>(shared) + layout.key_bytes());
  Key* grid_keys = warp_keys + THREADS / WARP;
  float* lower = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + layout.float_bytes());
  float* u = lower + layout.panel * rows_per_block;
  float* c = u + layout.panel * rows_per_block;
  float* q = c + layout.slices * rows_per_block;
  float* a_diagonal = q + layout.slices * rows_per_block;
  float* g_diagonal = a_diagonal + rows_per_block;
  float* floors = g_diagonal + rows_per_block;  // negative: removed

  const int thread = threadIdx.x;
  const int blocks = gridDim.x;
  const int64_t channels = elimination.channels;
  const int begin = blockIdx.x * rows_per_block;
  const int rows = min(rows_per_block, static_cast<int>(channels) - begin);
  const int64_t product_stride = int64_t{2} * panel.width;
  const int slice = thread / layout.row_threads;
  const int slice_row = thread % layout.row_threads;

  for (int row = thread; row < rows; row += THREADS) {
    a_diagonal[row] = elimination.a_diagonal[begin + row];
    g_diagonal[row] = elimination.g_diagonal[begin + row];
    floors[row] = elimination.removed[begin + row] ? REMOVED : elimination.floor[begin + row];
  }

  for (int k = 0; k < panel.pivots; ++k) {
    const unsigned sequence = static_cast<unsigned>(panel.first) + k + 1;
    const int parity = sequence % 2;

    // Every thread ranks the rows that it has just updated.
    Key best = NO_KEY;
    for (int row = thread; row < rows; row += THREADS) {
      const unsigned rank = floors[row] < 0.0f ? NOTHING_LEFT : rank_of(g_diagonal[row] / a_diagonal[row]);
      best = min(best, make_key(rank, sequence, begin + row));
    }
    best = warp_min(best);
    if (thread % WARP == 0) warp_keys[thread / WARP] = best;
    __syncthreads();
    if (thread == 0) {
#pragma unroll
      for (int warp = 1; warp < THREADS / WARP; ++warp) best = min(best, warp_keys[warp]);
      const int row = channel_of(best) - begin;
      exchange.pivots[parity * blocks + blockIdx.x] = make_float2(a_diagonal[row], g_diagonal[row]);
      release(exchange.slots + parity * blocks + blockIdx.x, best);
    }

    // Wait for all blocks' candidates; the plan has no more blocks than threads.
    best = NO_KEY;
    if (thread < blocks) {
      const Key* slot = exchange.slots + parity * blocks + thread;
      do {
        best = acquire(slot);
      } while (sequence_of(best) != (sequence & ((1u << SEQUENCE_BITS) - 1)));
    }
    best = warp_min(best);
    if (thread % WARP == 0) grid_keys[thread / WARP] = best;
    __syncthreads();
    best = grid_keys[0];
    for (int warp = 1; warp * WARP < blocks; ++warp) best = min(best, grid_keys[warp]);
    const int pivot = channel_of(best);

    // What others wrote during this launch is read past the first-level cache. The last threads read the pivot's row
    // of the panel, the first ones the columns of A and G, all at the same time.
    const float2 diagonals = __ldcg(exchange.pivots + parity * blocks + pivot / rows_per_block);
    if (const int t = THREADS - 1 - thread; t < k) {
      const float scale = pivot_row[t].w;
      const float l_p = __ldcg(panel.lower + pivot * panel.lower_stride + t);
      const float u_p = __ldcg(panel.products + pivot * product_stride + t);
      pivot_row[t] = make_float4(l_p, l_p * scale, u_p * scale, scale);
    }
    for (int row = thread; row < rows; row += THREADS) {
      if (floors[row] < 0.0f) continue;
      const int64_t channel = begin + row;
      const int64_t entry = channel < pivot ? pivot * channels + channel : channel * channels + pivot;
      c[row] = elimination.a[entry];
      q[row] = elimination.g[entry];
    }
    __syncthreads();

    // A_ip − Σ L_i L_p and G_ip − Σ (U_i R_p + R_i U_p) over the panel, R = L scaled; the first slice has A and G.
    if (slice < layout.slices) {
      for (int row = slice_row; row < rows; row += layout.row_threads) {
        float c_sum = slice == 0 ? c[row] : 0.0f;
        float q_sum = slice == 0 ? q[row] : 0.0f;
#pragma unroll 4
        for (int t = slice; t < k; t += layout.slices) {
          const float4 p = pivot_row[t];
          const float l = lower[t * rows_per_block + row];
          c_sum -= l * p.x;
          q_sum -= u[t * rows_per_block + row] * p.y + l * p.z;
        }
        c[slice * rows_per_block + row] = c_sum;
        q[slice * rows_per_block + row] = q_sum;
      }
    }
    __syncthreads();

    const float root = sqrtf(diagonals.x);
    const float scale = 1.0f / root;
    if (thread == 0) pivot_row[k].w = scale;
    for (int row = thread; row < rows; row += THREADS) {
      const int64_t channel = begin + row;
      float l = 0.0f;
      float r = 0.0f;
      float u_row = 0.0f;
      if (channel == pivot) {
        l = root;
        r = 1.0f;
        u_row = 0.5f * diagonals.y;
        floors[row] = REMOVED;
        elimination.order[panel.first + k] = channel;
        elimination.errors[panel.first + k] = diagonals.y / diagonals.x;
      } else if (!(floors[row] < 0.0f)) {
        float c_row = c[row];
        float q_row = q[row];
        for (int s = 1; s < layout.slices; ++s) {
          c_row += c[s * rows_per_block + row];
          q_row += q[s * rows_per_block + row];
        }
        l = c_row * scale;
        r = l * scale;
        u_row = q_row - 0.5f * diagonals.y * r;
        // Comparisons that let NaN through.
        const float a_left = a_diagonal[row] - l * l;
        a_diagonal[row] = a_left < floors[row] ? floors[row] : a_left;
        const float g_left = g_diagonal[row] - 2.0f * u_row * r;
        g_diagonal[row] = g_left < 0.0f ? 0.0f : g_left;
      }
      lower[k * rows_per_block + row] = l;
      u[k * rows_per_block + row] = u_row;
      panel.lower[channel * panel.lower_stride + k] = l;
      float* products = panel.products + channel * product_stride + k;
      products[0] = u_row;
      products[panel.width] = r;
    }
  }

  for (int row = thread; row < rows; row += THREADS) {
    elimination.a_diagonal[begin + row] = a_diagonal[row];
    elimination.g_diagonal[begin + row] = g_diagonal[row];
    elimination.removed[begin + row] = floors[row] < 0.0f;
  }
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("eliminate: ") + cudaGetErrorString(status));
}

int rows_per_block(int64_t channels, int blocks) { return static_cast<int>(ceil_div(channels, blocks)); }

// Lets the kernel have all the shared memory of the current device that a block may ask for; returns its bytes.
int allow_shared_memory() {
  int device;
  int bytes;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(eliminate_panel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return bytes;
}

}  // namespace

EliminationPlan eliminate_cuda_plan(int64_t channels, int multiprocessors) {
  if (channels == 0) return {MAX_PANEL, 0, 0};
  if (channels >= int64_t{1} << CHANNEL_BITS) throw std::runtime_error("eliminate: 2^20 channels or more");
  const int64_t most = std::min<int64_t>(std::min(multiprocessors, THREADS), ceil_div(channels, MIN_ROWS));
  const int rows = rows_per_block(channels, static_cast<int>(most));
  const int blocks = static_cast<int>(ceil_div(channels, rows));  // none without rows
  const int shared_bytes = allow_shared_memory();
  int panel = MAX_PANEL;
  while (panel >= MIN_PANEL && Layout(rows, panel).bytes() > shared_bytes) panel /= 2;
  if (panel < MIN_PANEL) {
    throw std::runtime_error("eliminate: " + std::to_string(rows) + " of " + std::to_string(channels) +
                             " channels do not fit into the shared memory of a multiprocessor");
  }
  return {panel, blocks, blocks * 2 * (sizeof(Key) + sizeof(float2))};
}

void eliminate_panel_cuda(const Elimination& elimination, const EliminationPanel& panel, int multiprocessors,
                          void* workspace, CUstream_st* stream) {
  if (panel.pivots == 0) return;
  const EliminationPlan plan = eliminate_cuda_plan(elimination.channels, multiprocessors);
  const auto slots = static_cast<Key*>(workspace);
  Exchange exchange = {slots, reinterpret_cast<float2*>(slots + 2 * plan.blocks)};
  int rows = rows_per_block(elimination.channels, plan.blocks);
  void* arguments[] = {const_cast<Elimination*>(&elimination), const_cast<EliminationPanel*>(&panel), &exchange, &rows};
  // A cooperative launch fails, instead of waiting forever, where the blocks cannot all be resident.
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(eliminate_panel), dim3(plan.blocks), dim3(THREADS),
                                    arguments, Layout(rows, panel.width).bytes(), stream));
}

}  // namespace pyprune
