#include "pyprune/hessian.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "hessian_kernel.cuh"

namespace pyprune {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("hessian: ") + cudaGetErrorString(status));
}

// The driver's own function, found at run time: this library does not link to the driver.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("hessian: the driver has no cuTensorMapEncodeTiled; it must support CUDA 12.0");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A matrix whose boxes are 128 bytes wide, swizzled in shared memory. Loads outside of it give zeros, adds nothing.
CUtensorMap box_map(CUtensorMapDataType type, int element_bytes, const void* address, int64_t rows, int64_t columns,
                    int64_t stride, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * element_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("hessian: the driver refused a tensor map, error " + std::to_string(status));
  }
  return map;
}

// A vector of float32 whose stretches go to shared memory as they are. Loads outside of it give zeros.
CUtensorMap stretch_map(const float* address, int64_t length, int stretch) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(length)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(length) * 4};  // of no dimension, but it may not be null
  const cuuint32_t box[] = {static_cast<cuuint32_t>(stretch)};
  const cuuint32_t steps[] = {1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 1, const_cast<float*>(address), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("hessian: the driver refused a tensor map, error " + std::to_string(status));
  }
  return map;
}

// Prepares the current device at its first use.
template <typename Element>
void prepare_current_device() {
  static std::mutex mutex;
  static std::map<int, bool> prepared;
  int device;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (prepared[device]) return;
  int major;
  int minor;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) {
    throw std::runtime_error("hessian: this kernel needs a device of compute capability 9.0, device " +
                             std::to_string(device) + " has " + std::to_string(major) + "." + std::to_string(minor));
  }
  check(cudaFuncSetAttribute(accumulate_hessian<Element, false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Layout::BYTES));
  check(cudaFuncSetAttribute(accumulate_hessian<Element, true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Layout::WEIGHTED_BYTES));
  prepared[device] = true;
}

int clusters_of(int multiprocessors) { return std::max(1, multiprocessors / BLOCKS); }

size_t workspace_bytes(int64_t channels) {
  const int64_t tile_rows = ceil_div(channels, TILE);
  return sizeof(Workspace) + tile_rows * (tile_rows + 1) / 2 * sizeof(Workspace::chunks_added[0]);
}

template <typename Element>
void launch(const Rows& x, const HessianState& hessian, void* workspace, int multiprocessors, cudaStream_t stream,
            const HessianWeights& weights) {
  prepare_current_device<Element>();
  const int clusters = clusters_of(multiprocessors);
  const Plan plan = make_plan(x.rows, x.channels, clusters);
  const Arguments arguments = {plan, static_cast<int>(x.channels), hessian.sums, static_cast<Workspace*>(workspace),
                               weights};
  const bool weighted = weights.weights != nullptr;
  // The driver takes no stride shorter than a row, though one row has no use for it.
  const int64_t row_stride = x.rows == 1 ? x.channels : x.row_stride;
  const CUtensorMap x_map =
      box_map(x.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, x.x,
              x.rows, x.channels, row_stride, STAGE_ROWS);
  const CUtensorMap lower_map = box_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, hessian.lower, x.channels, x.channels,
                                        hessian.stride, BAND);
  const CUtensorMap weights_map = weighted ? stretch_map(weights.weights, x.rows, STAGE_ROWS) : x_map;
  check(cudaMemsetAsync(workspace, 0, workspace_bytes(x.channels), stream));

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = BLOCKS;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(BLOCKS * std::min(clusters, plan.units())));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = weighted ? Layout::WEIGHTED_BYTES : Layout::BYTES;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const auto kernel = weighted ? accumulate_hessian<Element, true> : accumulate_hessian<Element, false>;
  check(cudaLaunchKernelEx(&config, kernel, x_map, lower_map, arguments, weights_map));
}

}  // namespace

size_t hessian_update_cuda_workspace(int64_t rows, int64_t channels, int) {
  return rows == 0 || channels == 0 ? 0 : workspace_bytes(channels);
}

void hessian_update_cuda(const Rows& x, const HessianState& hessian, void* workspace, int multiprocessors,
                         CUstream_st* stream, const HessianWeights& weights) {
  if (x.rows == 0 || x.channels == 0) return;
  switch (x.dtype) {
    case DType::bfloat16: launch<__nv_bfloat16>(x, hessian, workspace, multiprocessors, stream, weights); break;
    case DType::float16: launch<__half>(x, hessian, workspace, multiprocessors, stream, weights); break;
    case DType::float32: throw std::runtime_error("hessian: rows must be bfloat16 or float16");
  }
}

}  // namespace pyprune
