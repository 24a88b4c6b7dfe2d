// Layers over tokens (ROWS, C), with the matrix instructions of every GPU since compute capability 8.0 (mma.sync): the end of a
// transformer's block (FINISHES) or the embedding of patches (EMBEDS); then the norm and the queries, keys and values of the next
// block (PROJECTS).
//
// A warp has 16 TILES tokens, from the first load to the last store in its registers (warp.cuh). Weights are the same for all warps,
// which find them in the L1 cache; from shared memory they came no sooner.
//
// FLOP: 2 C (C + 2 HIDDEN) a token to finish it, 2 C O to project it. Bytes a token: 10 C to finish it (8 C if tokens are in half
// precision) and 2 O to project it.
//
// ctflow.kernels.tokens puts the constants, halves.cuh, instructions.cuh and warp.cuh before this file.

constexpr int STEPS = (C + 15) / 16, PATCH_STEPS = EMBEDS ? (8 * INPUTS + 15) / 16 : 0, HIDDEN_STEPS = FINISHES ? HIDDEN / 16 : 0, OUTPUT_STEPS = PROJECTS ? (O + 15) / 16 : 0;
// Where float32 numbers begin, four at a time. Weights are read one after the other, in blocks of 16 x 16.
constexpr int PROJ_ADDED = 0 /* or that of the embedding */, SCALE = PROJ_ADDED + STEPS * 4, SHIFT = SCALE + STEPS * 4, DOWN_ADDED = SHIFT + STEPS * 4,
    UP_ADDED = DOWN_ADDED + STEPS * 4, NEXT_SCALE = FINISHES ? UP_ADDED + HIDDEN_STEPS * 4 : EMBEDS ? STEPS * 4 : 0, NEXT_SHIFT = NEXT_SCALE + STEPS * 4,
    QKV_ADDED = NEXT_SHIFT + STEPS * 4;

#if WHOLE
using Token = float;
#else
using Token = unsigned short;  // the bits of a half
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
// `store` gets them before their own scale and shift.
template <class Store>
__device__ __forceinline__ void normalize(
    Factor (&h)[STEPS], const Accumulators (&y)[STEPS], const float4* scale, const float4* shift, int q, const bool (&real)[TILES][2],
    Store store) {
  float factor[TILES][2], offset[TILES][2];
  #pragma unroll
  for (int m = 0; m < TILES; ++m)
    #pragma unroll
    for (int s = 0; s < 2; ++s) {
      float sum = 0, squares = 0;
      #pragma unroll
      for (int j = 0; j < STEPS; ++j)
        #pragma unroll
        for (int e = 0; e < 4; ++e) sum += number(y[j], m, s, e);
      float mean = sum_of_row(sum) * (1.f / C);
      #pragma unroll
      for (int j = 0; j < STEPS; ++j)
        if (holds(j, q))
          #pragma unroll
          for (int e = 0; e < 4; ++e) {
            float centred = number(y[j], m, s, e) - mean;
            squares = fmaf(centred, centred, squares);
          }
      factor[m][s] = rsqrtf(fmaf(sum_of_row(squares), 1.f / C, EPS));
      offset[m][s] = -mean * factor[m][s];
    }
  #pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    float4 a = __ldg(scale + 4 * j), b = __ldg(shift + 4 * j);
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s) {
        float4 v = numbers_of(y[j], m, s);
        float f = factor[m][s], o = offset[m][s];
        v = make_float4(fmaf(v.x, f, o), fmaf(v.y, f, o), fmaf(v.z, f, o), fmaf(v.w, f, o));
        store(j, m, s, v);
        v = make_float4(fmaf(v.x, a.x, b.x), fmaf(v.y, a.y, b.y), fmaf(v.z, a.z, b.z), fmaf(v.w, a.w, b.w));
        put_pairs(h[j], m, s, real[m][s] ? packed(v) : make_uint2(0, 0));
      }
  }
}

// The patch of a token, for two rows of its voxels: of 16 numbers of it, whose channels are those of a window, four.
__device__ __forceinline__ uint2 patch_of(const float* windows, int b, int n, int i, int q, int count, int height, int width) {
  const int channel = 2 * i + q / 2, plane = height * width, d = n / plane, h = n / width % height, w = n % width;
  if (channel >= INPUTS) return make_uint2(0, 0);
  const size_t row = (((size_t)b * INPUTS + channel) * 2 * (count / plane) + 2 * d + q % 2) * 2 * height + 2 * h;
  const float2 upper = *(const float2*)(windows + (row * width + w) * 2), lower = *(const float2*)(windows + ((row + 1) * width + w) * 2);
  return make_uint2(packed(upper.x, upper.y), packed(lower.x, lower.y));
}

// Of windows: tokens (T, C), float32 or half; x (seen, C), of which back (T) names the place of each token; numbers, as above.
// out (T, C) float32. projected (places, O), to (T + pads) the place of each token, and then of each padding. A window is
// divided into `units` pieces of the blocks' size. With EMBEDS tokens are the windows, (INPUTS, D, 2 height, 2 width), and
// embedded and normalized are (T, C): the patches' tokens, and their layer norm without scale and shift.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) compute_tokens(
    const Token* tokens, const unsigned short* x, const int* back, const int* to, const uint4* weights, const float4* numbers,
    float* out, unsigned short* projected, unsigned short* embedded, unsigned short* normalized, int count, int pads, int seen,
    int places, int units, int height, int width) {
  const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
  const uint4* w = weights + lane;
  numbers += q;
  const int b = blockIdx.x / units, first = (blockIdx.x % units * WARPS + threadIdx.x / LANES) * 16 * TILES + g;
  uint32_t at[TILES][2], place[TILES][2];  // of a token in tokens and out, of its projection
  bool real[TILES][2], stored[TILES][2];
  Accumulators y[STEPS];
  Factor h[STEPS];
  #pragma unroll
  for (int m = 0; m < TILES; ++m)
    #pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int n = first + 16 * m + 8 * s;
      stored[m][s] = n < count + pads;
      real[m][s] = n < count;
      at[m][s] = (b * count + n) * C + 4 * q;
      if (PROJECTS) place[m][s] = (b * places + (stored[m][s] && to ? __ldg(to + n) : n)) * O + 4 * q;
      const uint32_t from = FINISHES ? (b * seen + (real[m][s] && back ? __ldg(back + n) : n)) * C + 4 * q : 0;
      #pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        const bool here = real[m][s] && holds(j, q);
        if (!EMBEDS) set_numbers(y[j], m, s, here ? loaded(tokens + at[m][s] + 16 * j) : make_float4(0.f, 0.f, 0.f, 0.f));
        if (FINISHES) put_pairs(h[j], m, s, here ? loaded_once((const uint2*)(x + from + 16 * j)) : make_uint2(0, 0));
      }
    }
#if FINISHES
  #pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    const float4 added = __ldg(numbers + PROJ_ADDED + 4 * j);
    #pragma unroll
    for (int m = 0; m < TILES; ++m) { add_numbers(y[j], m, 0, added); add_numbers(y[j], m, 1, added); }
    #pragma unroll
    for (int i = 0; i < STEPS; ++i, w += LANES) multiply_block(y[j], h[i], __ldg(w));
  }
  normalize(h, y, numbers + SCALE, numbers + SHIFT, q, real, [](int, int, int, float4) {});
  const float4* up_added = numbers + UP_ADDED;
  #pragma unroll 1
  for (int k = 0; k < HIDDEN_STEPS; ++k, up_added += 4, w += 2 * STEPS * LANES) {
    Accumulators u;
    Factor a;
    set_rows(u, __ldg(up_added));
    #pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply_block(u, h[i], __ldg(w + i * LANES));
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s) {
        float4 v = numbers_of(u, m, s);
        put_pairs(a, m, s, packed(make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w))));
      }
    #pragma unroll
    for (int j = 0; j < STEPS; ++j) multiply_block(y[j], a, __ldg(w + (STEPS + j) * LANES));
  }
  #pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    const float4 added = __ldg(numbers + DOWN_ADDED + 4 * j);
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s) {
        add_numbers(y[j], m, s, added);
        if (real[m][s] && holds(j, q)) *(float4*)(out + at[m][s] + 16 * j) = numbers_of(y[j], m, s);
      }
  }
#endif
#if EMBEDS
  Factor patch[PATCH_STEPS];
  #pragma unroll
  for (int m = 0; m < TILES; ++m)
    #pragma unroll
    for (int s = 0; s < 2; ++s)
      #pragma unroll
      for (int i = 0; i < PATCH_STEPS; ++i)
        put_pairs(patch[i], m, s, real[m][s] ? patch_of(tokens, b, first + 16 * m + 8 * s, i, q, count, height, width) : make_uint2(0, 0));
  #pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    set_rows(y[j], __ldg(numbers + PROJ_ADDED + 4 * j));
    #pragma unroll
    for (int i = 0; i < PATCH_STEPS; ++i, w += LANES) multiply_block(y[j], patch[i], __ldg(w));
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s)
        if (real[m][s] && holds(j, q)) *(uint2*)(embedded + at[m][s] + 16 * j) = packed(numbers_of(y[j], m, s));
  }
#endif
#if PROJECTS
  normalize(h, y, numbers + NEXT_SCALE, numbers + NEXT_SHIFT, q, real, [&](int j, int m, int s, float4 v) {
    if (EMBEDS && real[m][s] && holds(j, q)) *(uint2*)(normalized + at[m][s] + 16 * j) = packed(v);
  });
  const float4* qkv_added = numbers + QKV_ADDED;
  #pragma unroll 3
  for (int k = 0; k < OUTPUT_STEPS; ++k, qkv_added += 4, w += STEPS * LANES) {
    Accumulators u;
    set_rows(u, __ldg(qkv_added));
    #pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply_block(u, h[i], __ldg(w + i * LANES));
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int s = 0; s < 2; ++s)
        if (stored[m][s] && (O % 16 == 0 || 16 * k + 4 * q < O))
          *(uint2*)(projected + place[m][s] + 16 * k) = packed(numbers_of(u, m, s));
  }
#endif
}
