// A 1 x 1 x 1 convolution of one or two shares of channels, which is not stored: its sums for a norm (SUMS), or what comes of it after
// that norm (else): leaky(z normalised + it normalised), or with O > 0 a head of that, (O, C) head and (O,) shift.
//
// A warp has 16 TILES voxels; the order of channels and weights in its registers is that of tokens.cu, and so nothing passes through
// shared memory. 2 K C FLOP a voxel; 2 K bytes for sums, else 2 (K + 2 C), or with a head 2 (K + C) + 4 O.

constexpr int FIRST = (KX + 15) / 16, SECOND = (KY + 15) / 16, STEPS = FIRST + SECOND, GROUPS = (C + 15) / 16;
constexpr int LANES = 32, WARPS = THREADS / LANES;
using Accumulators = float[TILES][2][4];
using Factor = uint32_t[TILES][4];

__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_block(Accumulators& acc, const Factor& a, uint4 w) {
  #pragma unroll
  for (int m = 0; m < TILES; ++m) {
    multiply(acc[m][0], a[m], w.x, w.y);
    multiply(acc[m][1], a[m], w.z, w.w);
  }
}
__device__ __forceinline__ uint2 loaded_pairs(const unsigned short* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

// The channels of voxels first + 16 m + 8 s + g, rows from `from` on.
template <int COUNT, int CHANNELS>
__device__ __forceinline__ void load(Factor (&a)[COUNT], const unsigned short* from, int first, int end, int g, int q) {
  #pragma unroll
  for (int m = 0; m < TILES; ++m)
    #pragma unroll
    for (int s = 0; s < 2; ++s) {
      int v = first + 16 * m + 8 * s + g;
      #pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        uint2 pairs = make_uint2(0, 0);
        if (v < end && (CHANNELS % 16 == 0 || 16 * i + 4 * q < CHANNELS)) pairs = loaded_pairs(from + (size_t)v * CHANNELS + 16 * i + 4 * q);
        a[i][m][s] = pairs.x;
        a[i][m][2 + s] = pairs.y;
      }
    }
}

// Blocks are parts of a window, PARTS of them. sums is (B, PARTS, 2, C); out (B, V, C), or float32 (B, O, V).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) compute_pointwise(
    const unsigned short* x, const unsigned short* y, const uint4* weights, float* sums, const unsigned short* z, const float* norm,
    const float* beside, const float* head, const float* shift, void* out, int voxels, int parts) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, q = lane % 4;
  const int b = blockIdx.x / parts, part = blockIdx.x % parts;
  const int per = ((voxels + parts - 1) / parts + 16 * TILES - 1) / (16 * TILES) * (16 * TILES);
  const int begin = part * per, end = begin + per < voxels ? begin + per : voxels;
  x += (size_t)b * voxels * KX;
  if (KY) y += (size_t)b * voxels * KY;
  __shared__ uint4 held[GROUPS * STEPS * LANES];
  for (int k = threadIdx.x; k < GROUPS * STEPS * LANES; k += THREADS) held[k] = weights[k];
#if SUMS
  __shared__ float gathered[WARPS][2][GROUPS * 16];
  float total[GROUPS][4] = {}, square[GROUPS][4] = {};
#else
  __shared__ float4 factors[4 + O][GROUPS * 4];  // scale, scale beside, both shifts together; the head
  z += (size_t)b * voxels * C;
  for (int c = threadIdx.x; c < GROUPS * 16; c += THREADS) {
    const float *n = norm + b * 2 * C, *m = beside + b * 2 * C;
    ((float*)factors[0])[c] = c < C ? n[c] : 0.f;
    ((float*)factors[1])[c] = c < C ? m[c] : 0.f;
    ((float*)factors[2])[c] = c < C ? n[C + c] + m[C + c] : 0.f;
    for (int o = 0; o < O; ++o) ((float*)factors[3 + o])[c] = c < C ? head[o * C + c] : 0.f;
  }
#endif
  __syncthreads();
  for (int first = begin + warp * 16 * TILES; first < end; first += WARPS * 16 * TILES) {
    Factor a[STEPS];
    load<FIRST, KX>(*(Factor(*)[FIRST])&a[0], x, first, end, g, q);
#if KY
    load<SECOND, KY>(*(Factor(*)[SECOND])&a[FIRST], y, first, end, g, q);
#endif
#if !SUMS
    Factor there[GROUPS];
    load<GROUPS, C>(there, z, first, end, g, q);
    float logits[O ? O : 1][TILES][2] = {};
#endif
    #pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      Accumulators u = {};
      #pragma unroll
      for (int i = 0; i < STEPS; ++i) multiply_block(u, a[i], held[(j * STEPS + i) * LANES + lane]);
#if SUMS
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
          float value = u[m][k / 4][k % 4];
          total[j][k / 4 * 2 + k % 2] += value;
          square[j][k / 4 * 2 + k % 2] += value * value;
        }
#else
      float4 scale = factors[0][4 * j + q], scale_beside = factors[1][4 * j + q], offset = factors[2][4 * j + q];
      float sc[4] = {scale.x, scale.y, scale.z, scale.w}, sb[4] = {scale_beside.x, scale_beside.y, scale_beside.z, scale_beside.w};
      float of[4] = {offset.x, offset.y, offset.z, offset.w};
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int s = 0; s < 2; ++s) {
          float2 low = unpacked(there[j][m][s]), high = unpacked(there[j][m][2 + s]);
          float value[4] = {low.x, low.y, high.x, high.y};
          #pragma unroll
          for (int e = 0; e < 4; ++e) {
            value[e] = fmaf(value[e], sc[e], of[e]) + u[m][e / 2][2 * s + e % 2] * sb[e];
            value[e] = fmaxf(value[e], value[e] * SLOPE);
          }
          #pragma unroll
          for (int o = 0; o < O; ++o) {
            float4 row = factors[3 + o][4 * j + q];
            logits[o][m][s] += value[0] * row.x + value[1] * row.y + value[2] * row.z + value[3] * row.w;
          }
          int v = first + 16 * m + 8 * s + g;
          if (O == 0 && v < end && (C % 16 == 0 || 16 * j + 4 * q < C))
            *(uint2*)((unsigned short*)out + ((size_t)b * voxels + v) * C + 16 * j + 4 * q) =
                make_uint2(packed(value[0], value[1]), packed(value[2], value[3]));
        }
#endif
    }
#if !SUMS
    #pragma unroll
    for (int o = 0; o < O; ++o)
      #pragma unroll
      for (int m = 0; m < TILES; ++m)
        #pragma unroll
        for (int s = 0; s < 2; ++s) {
          float logit = logits[o][m][s];
          logit += __shfl_xor_sync(~0u, logit, 1);
          logit += __shfl_xor_sync(~0u, logit, 2);
          int v = first + 16 * m + 8 * s + g;
          if (q == 0 && v < end) ((float*)out)[((size_t)b * O + o) * voxels + v] = logit + shift[o];
        }
#endif
  }
#if SUMS
  #pragma unroll
  for (int j = 0; j < GROUPS; ++j)
    #pragma unroll
    for (int e = 0; e < 4; ++e) {
      #pragma unroll
      for (int step = 4; step < LANES; step *= 2) {
        total[j][e] += __shfl_xor_sync(~0u, total[j][e], step);
        square[j][e] += __shfl_xor_sync(~0u, square[j][e], step);
      }
      if (g == 0) {
        gathered[warp][0][16 * j + 4 * q + e] = total[j][e];
        gathered[warp][1][16 * j + 4 * q + e] = square[j][e];
      }
    }
  __syncthreads();
  for (int k = threadIdx.x; k < 2 * C; k += THREADS) {
    float sum = 0;
    for (int each = 0; each < WARPS; ++each) sum += gathered[each][k / C][k % C];
    sums[(size_t)blockIdx.x * 2 * C + k] = sum;
  }
#endif
}
