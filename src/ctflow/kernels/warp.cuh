// Products of a warp whose factors stay in its registers. A warp has 16 TILES rows; thread 4 g + q has, of rows g and g + 8 of a tile,
// columns 4 q to 4 q + 3 of each 16. So a product's accumulators are in the order in which the next product takes its factor, and
// rows are read and written in pieces of 8 or 16 bytes. Weights come as ctflow.kernels.tokens.packed_layer orders them.

constexpr int LANES = 32, WARPS = THREADS / LANES;

// 16 columns: [tile][columns 4 q and 4 q + 1, or the two after them][the two of row g, the two of row g + 8].
using Accumulators = float[TILES][2][4];
using Factor = uint32_t[TILES][4];

// Column 4 q + e of row g + 8 s.
__device__ __forceinline__ float& number(Accumulators& acc, int m, int s, int e) { return acc[m][e / 2][2 * s + e % 2]; }
__device__ __forceinline__ float number(const Accumulators& acc, int m, int s, int e) { return acc[m][e / 2][2 * s + e % 2]; }
__device__ __forceinline__ float4 numbers_of(const Accumulators& acc, int m, int s) {
  return make_float4(number(acc, m, s, 0), number(acc, m, s, 1), number(acc, m, s, 2), number(acc, m, s, 3));
}
__device__ __forceinline__ void set_numbers(Accumulators& acc, int m, int s, float4 v) {
  number(acc, m, s, 0) = v.x; number(acc, m, s, 1) = v.y;
  number(acc, m, s, 2) = v.z; number(acc, m, s, 3) = v.w;
}
__device__ __forceinline__ void add_numbers(Accumulators& acc, int m, int s, float4 v) {
  number(acc, m, s, 0) += v.x; number(acc, m, s, 1) += v.y;
  number(acc, m, s, 2) += v.z; number(acc, m, s, 3) += v.w;
}
__device__ __forceinline__ void set_rows(Accumulators& acc, float4 v) {
  #pragma unroll
  for (int m = 0; m < TILES; ++m) { set_numbers(acc, m, 0, v); set_numbers(acc, m, 1, v); }
}
__device__ __forceinline__ void put_pairs(Factor& a, int m, int s, uint2 pairs) { a[m][s] = pairs.x; a[m][2 + s] = pairs.y; }
__device__ __forceinline__ uint2 packed(float4 v) { return make_uint2(packed(v.x, v.y), packed(v.z, v.w)); }
__device__ __forceinline__ float4 unpacked(uint2 pairs) {
  float2 low = unpacked(pairs.x), high = unpacked(pairs.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// acc += a times a block of 16 x 16 weights.
__device__ __forceinline__ void multiply_block(Accumulators& acc, const Factor& a, uint4 w) {
  #pragma unroll
  for (int m = 0; m < TILES; ++m) {
    multiply(acc[m][0], a[m], w.x, w.y);
    multiply(acc[m][1], a[m], w.z, w.w);
  }
}
__device__ __forceinline__ float sum_of_row(float x) {  // over the four threads of a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
