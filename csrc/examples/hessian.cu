// The core's Hessian kernel from C++ with the CUDA runtime: H = sum of x x^T over bfloat16 rows, in two updates.
// Build and run, in this folder, on a GPU of compute capability 9.0:  make run-hessian
// which is  nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -I../include hessian.cu ../cuda/hessian.cu
// Exit status 1: a result is wrong, or CUDA reports an error. nvcc includes the CUDA runtime's header by itself.

#include "pyprune/hessian.h"

#include <bit>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* copy;
  check(cudaMalloc(&copy, values.size() * sizeof(T)));
  check(cudaMemcpy(copy, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return copy;
}

template <typename T>
void to_host(std::vector<T>& values, const T* device) {
  check(cudaMemcpy(values.data(), device, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
}

int run() {
  constexpr int64_t rows = 5000, first_part = 3000, channels = 520;
  // Integers so small that every sum is exact in float32, whatever its order: the comparison is for equality.
  std::mt19937 generator(0);
  std::uniform_int_distribution<int> integer(-3, 3);
  std::vector<uint16_t> x(rows * channels);
  for (uint16_t& value : x) {
    value = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(integer(generator))) >> 16);
  }
  std::vector<float> lower(channels * channels), sums(channels);

  uint16_t* x_device = on_device(x);
  float* lower_device = on_device(lower);
  float* sums_device = on_device(sums);
  int device, multiprocessors;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  const pyprune::HessianState hessian = {lower_device, channels, sums_device};
  for (const auto& [first, last] : {std::pair{int64_t{0}, first_part}, std::pair{first_part, rows}}) {
    void* workspace;
    check(cudaMallocAsync(
        &workspace, pyprune::hessian_update_cuda_workspace(last - first, channels, multiprocessors), stream));
    const pyprune::Rows part = {x_device + first * channels, pyprune::DType::bfloat16, last - first, channels,
                                channels};
    pyprune::hessian_update_cuda(part, hessian, workspace, multiprocessors, stream);
    check(cudaFreeAsync(workspace, stream));
  }
  check(cudaStreamSynchronize(stream));
  to_host(lower, lower_device);
  to_host(sums, sums_device);
  check(cudaFree(x_device));
  check(cudaFree(lower_device));
  check(cudaFree(sums_device));
  check(cudaStreamDestroy(stream));

  auto value = [&](int64_t r, int64_t c) -> double {
    return std::bit_cast<float>(static_cast<uint32_t>(x[r * channels + c]) << 16);
  };
  for (const int64_t column : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{256}, channels - 1}) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += value(r, column);
    bool right = sums[column] == sum;
    for (int64_t i = column; i < channels; ++i) {
      double exact = 0;
      for (int64_t r = 0; r < rows; ++r) exact += value(r, i) * value(r, column);
      right &= lower[i * channels + column] == exact;
    }
    if (!right) {
      std::printf("column %lld is wrong\n", static_cast<long long>(column));
      return 1;
    }
  }
  std::puts("the Hessian's columns are those of float64");
  return 0;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
