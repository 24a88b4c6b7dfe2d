// One warp of a GPU by 32 threads of a CPU, for kernels whose threads meet in products and shuffles alone; in place of halves.cuh
// (float16 only) and instructions.cuh.

#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

constexpr float SLOPE = 0.01f;
thread_local Index threadIdx, blockIdx, gridDim;
std::barrier<> all_threads(32);
uint32_t shown[32][6];  // by each thread to the others

inline void __syncthreads() { all_threads.arrive_and_wait(); }
template <class T> T __ldg(const T* from) { return *from; }
template <class T> T loaded_once(const T* from) { return *from; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float power_of_two(float x) { return std::exp2(x); }
inline float half(uint32_t bits) {
  uint16_t low = bits;
  _Float16 x;
  std::memcpy(&x, &low, 2);
  return x;
}
inline uint32_t bits(float x) {
  _Float16 rounded = x;
  uint16_t found;
  std::memcpy(&found, &rounded, 2);
  return found;
}
inline float2 unpacked(uint32_t pair) { return {half(pair), half(pair >> 16)}; }
inline uint32_t packed(float x, float y) { return bits(x) | bits(y) << 16; }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  std::memcpy(shown[threadIdx.x], &x, 4);
  all_threads.arrive_and_wait();
  std::memcpy(&x, shown[threadIdx.x ^ mask], 4);
  all_threads.arrive_and_wait();
  return x;
}
// The layout of PTX ISA 9.7.14, "Matrix fragments for mma.m16n8k16 with floating point type".
inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x, group = lane / 4, place = lane % 4;
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(shown[lane], own, sizeof own);
  all_threads.arrive_and_wait();
  for (int c = 0; c < 4; ++c)
    for (int k = 0; k < 16; ++k) {
      const int row = group + 8 * (c / 2), column = 2 * place + c % 2, of = k % 8 / 2, shift = 16 * (k % 2);
      acc[c] += half(shown[row % 8 * 4 + of][row / 8 + 2 * (k / 8)] >> shift) * half(shown[column * 4 + of][4 + k / 8] >> shift);
    }
  all_threads.arrive_and_wait();
}

inline void run_blocks(int blocks, const std::function<void()>& kernel) {
  for (int block = 0; block < blocks; ++block) {
    std::vector<std::thread> warp;
    for (int lane = 0; lane < 32; ++lane)
      warp.emplace_back([=, &kernel] {
        threadIdx.x = lane;
        blockIdx.x = block;
        gridDim.x = blocks;
        kernel();
      });
    for (auto& each : warp) each.join();
  }
}
