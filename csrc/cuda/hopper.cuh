#pragma once

// The instructions of compute capability 9.0 that C++ has no name for: cluster barriers, bulk tensor copies and
// warpgroup products (PTX ISA 8.0 and later). Every address is one of shared memory, as __cvta_generic_to_shared
// gives it; the same number names the same variable in every block of a cluster.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace pyprune {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t block_rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, as the whole cluster understands it, of this block's `address` in another block.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t block) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(block));
  return mapped;
}

// ---- mbarriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all barrier_init and before cluster_sync.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void barrier_arrive_in_block(uint32_t barrier, uint32_t block) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, block)) : "memory");
}

// The same pair, where ordinary stores into another block's memory come before the arrival.
__device__ __forceinline__ void barrier_wait_for_stores(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void barrier_arrive_after_stores(uint32_t barrier, uint32_t block) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, block))
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// ---- named barriers: `threads` counts those that wait and those that only arrive, whole warps of them

__device__ __forceinline__ void named_sync(int name, int threads) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int name, int threads) {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- bulk tensor copies

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// A stretch of a vector that begins at `first`; `to` lies on 128 bytes. (compute-sanitizer knows whose write a bulk copy
// without a map is, not that its barrier orders it before the reads, and reports a race.)
__device__ __forceinline__ void load_stretch(uint32_t to, const CUtensorMap& map, int first, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2}], [%3];" ::"r"(to),
      "l"(&map), "r"(first), "r"(barrier)
      : "memory");
}

// Into every block of the cluster named by a bit of `blocks`, at the same address, announced at the same barrier.
__device__ __forceinline__ void load_box_into(uint16_t blocks, uint32_t to, const CUtensorMap& map, int column, int row,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void add_box(const CUtensorMap& map, int column, int row, uint32_t from) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   &map),
               "r"(column), "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the thread's last `pending` add_box have read their shared memory.
template <int pending>
__device__ __forceinline__ void wait_for_reads_of_boxes() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void wait_for_added_boxes() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's accesses to memory and those of the copy engine.
__device__ __forceinline__ void copy_engine_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void copy_engine_fence_for_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- global memory

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ void add_to_global(float* p, float a) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(a) : "memory");
}

// ---- warpgroup products

// Operands that lie in memory with 64 elements (128 bytes) of the M or N dimension to a row of K, the 16-byte groups of
// row r permuted by XOR with r % 8 (what a bulk tensor copy with 128-byte swizzling leaves of a box 64 elements wide).
// Eight rows are a pattern of 1024 bytes, which follow one another; `box_bytes` on come the next 64 elements of M or N.
// PTX ISA, "matrix descriptor format" and canonical layout ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)).
__device__ __forceinline__ uint64_t product_operand(uint32_t address, int box_bytes) {
  constexpr uint64_t PATTERN_BYTES = 1024;
  constexpr uint64_t SWIZZLE_128 = 1;
  // In a cluster the upper bits of a shared address name the block; an operand is always in the block's own memory.
  constexpr uint32_t OWN_BYTES = (1u << 18) - 1;
  return ((address & OWN_BYTES) >> 4) | static_cast<uint64_t>(box_bytes >> 4) << 16 | (PATTERN_BYTES >> 4) << 32 |
         SWIZZLE_128 << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last `pending` committed groups are done.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define PYPRUNE_8_OPERANDS(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PYPRUNE_32_OPERANDS(d, i) \
  PYPRUNE_8_OPERANDS(d, i), PYPRUNE_8_OPERANDS(d, i + 8), PYPRUNE_8_OPERANDS(d, i + 16), PYPRUNE_8_OPERANDS(d, i + 24)
#define PYPRUNE_NAMES_0 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define PYPRUNE_NAMES_32 \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define PYPRUNE_NAMES_64 \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95"
#define PYPRUNE_NAMES_96 \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118," \
  "%119,%120,%121,%122,%123,%124,%125,%126,%127"
// Both operands are stored with M and N contiguous: the last two 1s of the instruction.
#define PYPRUNE_PRODUCT(shape, type, a, b, names, ...)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." \
               type " {" names "}, " a ", " b ", p, 1, 1, 1, 1;\n}"                                                 \
               : __VA_ARGS__                                                                                        \
               : "l"(a_operand), "l"(b_operand))
#define PYPRUNE_PRODUCTS(type)                                                                                  \
  if constexpr (N == 64) {                                                                                     \
    PYPRUNE_PRODUCT("m64n64k16", type, "%32", "%33", PYPRUNE_NAMES_0, PYPRUNE_32_OPERANDS(sum, 0));      \
  } else if constexpr (N == 128) {                                                                             \
    PYPRUNE_PRODUCT("m64n128k16", type, "%64", "%65", PYPRUNE_NAMES_0 "," PYPRUNE_NAMES_32,              \
                    PYPRUNE_32_OPERANDS(sum, 0), PYPRUNE_32_OPERANDS(sum, 32));                                 \
  } else if constexpr (N == 192) {                                                                             \
    PYPRUNE_PRODUCT("m64n192k16", type, "%96", "%97",                                                    \
                    PYPRUNE_NAMES_0 "," PYPRUNE_NAMES_32 "," PYPRUNE_NAMES_64, PYPRUNE_32_OPERANDS(sum, 0),     \
                    PYPRUNE_32_OPERANDS(sum, 32), PYPRUNE_32_OPERANDS(sum, 64));                                \
  } else {                                                                                                     \
    static_assert(N == 256);                                                                                   \
    PYPRUNE_PRODUCT("m64n256k16", type, "%128", "%129",                                                 \
                    PYPRUNE_NAMES_0 "," PYPRUNE_NAMES_32 "," PYPRUNE_NAMES_64 "," PYPRUNE_NAMES_96,             \
                    PYPRUNE_32_OPERANDS(sum, 0), PYPRUNE_32_OPERANDS(sum, 32), PYPRUNE_32_OPERANDS(sum, 64),    \
                    PYPRUNE_32_OPERANDS(sum, 96));                                                              \
  }

// sum[64, N] += A[64, 16] B[16, N], for the four warps of an aligned warpgroup. Thread t holds in sum[4 j + i] the
// element of row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2) and column 8 j + 2 (t % 4) + i % 2.
template <typename Element, int N>
__device__ __forceinline__ void product_async(float (&sum)[N / 2], uint64_t a_operand, uint64_t b_operand) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    PYPRUNE_PRODUCTS("bf16")
  } else {
    static_assert(std::is_same_v<Element, __half>);
    PYPRUNE_PRODUCTS("f16")
  }
}

#undef PYPRUNE_PRODUCTS
#undef PYPRUNE_PRODUCT
#undef PYPRUNE_NAMES_0
#undef PYPRUNE_NAMES_32
#undef PYPRUNE_NAMES_64
#undef PYPRUNE_NAMES_96
#undef PYPRUNE_32_OPERANDS
#undef PYPRUNE_8_OPERANDS

// Keeps the compiler from reading the registers of a product before the wait above this line.
template <int N>
__device__ __forceinline__ void products_are_done(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

}  // namespace
}  // namespace pyprune

#endif
