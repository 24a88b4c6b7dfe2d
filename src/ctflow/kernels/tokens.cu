// Layers over tokens (ROWS, C), with the matrix instructions of every GPU since compute capability 8.0 (mma.sync): the end of a
// transformer's block (FINISHES), the norm and the queries, keys and values of the next one (PROJECTS), or one after the other.
//
// A warp has 16 TILES tokens, from the first load to the last store in its registers (warp.cuh). Weights are the same for all warps,
// which find them in the L1 cache or, with HELD, in shared memory.
//
// FLOP: 2 C (C + 2 HIDDEN) a token to finish it, 2 C O to project it. Bytes a token: 10 C to finish it (8 C if tokens are in half
// precision) and 2 O to project it.
//
// ctflow.kernels.tokens puts the constants, halves.cuh, instructions.cuh and warp.cuh before this file.

constexpr int STEPS = (C + 15) / 16, HIDDEN_STEPS = FINISHES ? HIDDEN / 16 : 0, OUTPUT_STEPS = PROJECTS ? (O + 15) / 16 : 0;
// Where packed weights and float32 numbers begin: blocks of 16 x 16 weights, four numbers at a time.
constexpr int UP = STEPS * STEPS, QKV = FINISHES ? UP + 2 * STEPS * HIDDEN_STEPS : 0, WEIGHTS = QKV + STEPS * OUTPUT_STEPS;
constexpr int PROJ_ADDED = 0, SCALE = PROJ_ADDED + STEPS * 4, SHIFT = SCALE + STEPS * 4, DOWN_ADDED = SHIFT + STEPS * 4,
    UP_ADDED = DOWN_ADDED + STEPS * 4, NEXT_SCALE = FINISHES ? UP_ADDED + HIDDEN_STEPS * 4 : 0, NEXT_SHIFT = NEXT_SCALE + STEPS * 4,
    QKV_ADDED = NEXT_SHIFT + STEPS * 4;

#if HELD
extern __shared__ uint4 held[];
#define WEIGHT(number) held[number]
#else
#define WEIGHT(number) __ldg(weights + (number))
#endif

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with a polynomial for log2 Phi(-|x|): less than 1e-6 from it, and falling beyond every x.
__device__ __forceinline__ float gelu(float x) {
  float t = fabsf(x), log = fmaf(fmaf(-0.00047330928f, t, 0.0070845569f), t, -0.051827382f);
  log = fmaf(fmaf(fmaf(log, t, -0.45999244f), t, -1.1507878f), t, -1.0000377f);
  return fmaf(-t, power_of_two(log), fmaxf(x, 0.f));
}

__device__ __forceinline__ float4 loaded(const float* from) { return loaded_once((const float4*)from); }
__device__ __forceinline__ float4 loaded(const unsigned short* from) { return unpacked(loaded_once((const uint2*)from)); }

// Whether a thread's four channels of the 16 from 16 j on are some.
__device__ __forceinline__ bool holds(int j, int q) { return C % 16 == 0 || 16 * j + 4 * q < C; }

// Layer norm of tokens as the factor of a product; those that are not `real` are zeros.
__device__ __forceinline__ void normalize(
    Factor (&h)[STEPS], const Accumulators (&y)[STEPS], const float4* scale, const float4* shift, int q, const bool (&real)[TILES][2]) {
  #pragma unroll
  for (int m = 0; m < TILES; ++m)
    #pragma unroll
    for (int s = 0; s < 2; ++s) {
      float sum = 0, squares = 0;
      #pragma unroll
      for (int j = 0; j < STEPS; ++j)
        #pragma unroll
        for (int e = 0; e < 4; ++e) sum += number(y[j], m, s, e);
      float mean = sum_of_row(sum) / C;
      #pragma unroll
      for (int j = 0; j < STEPS; ++j)
        if (holds(j, q))
          #pragma unroll
          for (int e = 0; e < 4; ++e) {
            float centred = number(y[j], m, s, e) - mean;
            squares = fmaf(centred, centred, squares);
          }
      float factor = rsqrtf(sum_of_row(squares) / C + EPS);
      #pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        float4 a = __ldg(scale + 4 * j + q), b = __ldg(shift + 4 * j + q), v = numbers_of(y[j], m, s);
        v.x = fmaf((v.x - mean) * factor, a.x, b.x); v.y = fmaf((v.y - mean) * factor, a.y, b.y);
        v.z = fmaf((v.z - mean) * factor, a.z, b.z); v.w = fmaf((v.w - mean) * factor, a.w, b.w);
        put_pairs(h[j], m, s, real[m][s] ? packed(v) : make_uint2(0, 0));
      }
    }
}

// Of `batch` windows: tokens (T, C), float32 or half; x (seen, C), of which back (T) names the place of each token; numbers,
// as above. out (T, C) float32. projected (places, O), to (T + pads) the place of each token, and then of each padding.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) compute_tokens(
    const TOKEN* tokens, const unsigned short* x, const int* back, const int* to, const uint4* weights, const float4* numbers,
    float* out, unsigned short* projected, int batch, int count, int pads, int seen, int places) {
  const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, each = count + pads, rows = batch * each;
#if HELD
  for (int k = threadIdx.x; k < WEIGHTS * LANES; k += THREADS) held[k] = weights[k];
  __syncthreads();
#endif
  for (int first = (blockIdx.x * WARPS + threadIdx.x / LANES) * 16 * TILES; first < rows; first += gridDim.x * WARPS * 16 * TILES) {
    uint32_t at[TILES][2], place[TILES][2];  // of a token in tokens and out, of its projection
    bool real[TILES][2], stored[TILES][2];
    Accumulators y[STEPS] = {};
    Factor h[STEPS];
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s) {
        int row = first + 16 * m + 8 * s + g, b = row / each, n = row - b * each;
        stored[m][s] = row < rows;
        real[m][s] = row < rows && n < count;
        at[m][s] = (b * count + n) * C + 4 * q;
        if (PROJECTS) place[m][s] = stored[m][s] ? (b * places + (to ? __ldg(to + n) : n)) * O + 4 * q : 0;
        uint32_t from = FINISHES && real[m][s] ? (b * seen + (back ? __ldg(back + n) : n)) * C + 4 * q : 0;
        #pragma unroll
        for (int j = 0; j < STEPS; ++j) {
          bool held = real[m][s] && holds(j, q);
          if (held) add_numbers(y[j], m, s, loaded(tokens + at[m][s] + 16 * j));
          if (FINISHES) put_pairs(h[j], m, s, held ? loaded_once((const uint2*)(x + from + 16 * j)) : make_uint2(0, 0));
        }
      }
#if FINISHES
    #pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      add_to_rows(y[j], __ldg(numbers + PROJ_ADDED + 4 * j + q));
      #pragma unroll
      for (int i = 0; i < STEPS; ++i) multiply_block(y[j], h[i], WEIGHT((j * STEPS + i) * LANES + lane));
    }
    normalize(h, y, numbers + SCALE, numbers + SHIFT, q, real);
    #pragma unroll UNROLL
    for (int k = 0; k < HIDDEN_STEPS; ++k) {
      Accumulators u = {};
      Factor a;
      add_to_rows(u, __ldg(numbers + UP_ADDED + 4 * k + q));
      #pragma unroll
      for (int i = 0; i < STEPS; ++i) multiply_block(u, h[i], WEIGHT((UP + k * 2 * STEPS + i) * LANES + lane));
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int s = 0; s < 2; ++s) {
          float4 v = numbers_of(u, m, s);
          put_pairs(a, m, s, packed(make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w))));
        }
      #pragma unroll
      for (int j = 0; j < STEPS; ++j) multiply_block(y[j], a, WEIGHT((UP + k * 2 * STEPS + STEPS + j) * LANES + lane));
    }
    #pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      add_to_rows(y[j], __ldg(numbers + DOWN_ADDED + 4 * j + q));
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int s = 0; s < 2; ++s)
          if (real[m][s] && holds(j, q)) *(float4*)(out + at[m][s] + 16 * j) = numbers_of(y[j], m, s);
    }
#endif
#if PROJECTS
    normalize(h, y, numbers + NEXT_SCALE, numbers + NEXT_SHIFT, q, real);
    #pragma unroll UNROLL
    for (int k = 0; k < OUTPUT_STEPS; ++k) {
      Accumulators u = {};
      add_to_rows(u, __ldg(numbers + QKV_ADDED + 4 * k + q));
      #pragma unroll
      for (int i = 0; i < STEPS; ++i) multiply_block(u, h[i], WEIGHT((QKV + k * STEPS + i) * LANES + lane));
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int s = 0; s < 2; ++s)
          if (stored[m][s] && (O % 16 == 0 || 16 * k + 4 * q < O))
            *(uint2*)(projected + place[m][s] + 16 * k) = packed(numbers_of(u, m, s));
    }
#endif
  }
}
