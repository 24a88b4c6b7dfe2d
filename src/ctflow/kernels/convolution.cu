// 3 x 3 x 3 convolution of channels-last volumes: (B, D, H, W, CIN) -> (B, D, H, W, COUT).
//
// A block keeps all weights in shared memory and walks along D through a column of 24 x 8 voxels. Each input plane is read
// once, with its border of one voxel, and multiplied with the weights of the three depths at once: one product of 64 voxels
// x 16 channels with 16 channels x 3 COUT feeds the three output planes that the input plane takes part in. One warp group
// loads (and normalises), the others multiply, store, and add up what the next instance norm needs.
//
// FLOP: 54 CIN COUT a voxel. Bytes: 2 CIN (1.35 times, for the border) + 2 COUT a voxel.
//
// ctflow.kernels.convolution puts the constants and multiply(), the matrix instruction, before this file.

using uint32_t = unsigned int;
using uint64_t = unsigned long long;

constexpr int N = 3 * COUT;
constexpr int TILE_H = 8 * GROUPS, TILE_W = 8, EDGE = TILE_W + 2, HALO = (TILE_H + 2) * EDGE, CHUNKS = CIN / 8;
constexpr int STAGE_BYTES = CHUNKS * HALO * 16, WEIGHT_BYTES = 9 * CIN * N * 2;
constexpr int WARPS = GROUPS * 4;
constexpr float SLOPE = 0.01f;

struct Shape { int batch, depth, height, width, chunk; };

// Two half-precision numbers of one register.
__device__ __forceinline__ float2 unpacked(uint32_t pair) {
  float2 x;
#if BF16
  x.x = __uint_as_float(pair << 16);
  x.y = __uint_as_float(pair & 0xFFFF0000u);
#else
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(x.x), "=f"(x.y) : "r"(pair));
#endif
  return x;
}
__device__ __forceinline__ uint32_t packed(float x, float y) {
  uint32_t pair;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
#endif
  return pair;
}


__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, int parity) {
  asm volatile(
    "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
    :: "r"(bar), "r"(parity) : "memory");
}
// K-major, no swizzle: 8 rows of 16 bytes lie side by side; `leading` bytes to the next 8 channels, `stride` to the next 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | ((uint64_t)(leading >> 4) << 16) | ((uint64_t)(stride >> 4) << 32);
}

// One input plane with its border into shared memory as [channels / 8][HALO][8]; normalised and rectified on the way.
__device__ void load_plane(const unsigned short* __restrict__ in, char* stage, const float* norm, Shape s, int b, int z, int h0, int w0, int tid) {
  #pragma unroll 4
  for (int i = tid; i < CHUNKS * HALO; i += LOADERS) {
    int voxel = i / CHUNKS, chunk = i - voxel * CHUNKS;
    int h = h0 + voxel / EDGE - 1, w = w0 + voxel % EDGE - 1;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (h >= 0 && h < s.height && w >= 0 && w < s.width) {
      size_t at = (((size_t)b * s.depth + z) * s.height + h) * s.width + w;
      value = __ldg(reinterpret_cast<const uint4*>(in + at * CIN) + chunk);
      if (NORMALIZED) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(&value);
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
          int c = chunk * 8 + 2 * k;
          float2 x = unpacked(pairs[k]);
          x.x = x.x * norm[c] + norm[CIN + c];
          x.y = x.y * norm[c + 1] + norm[CIN + c + 1];
          pairs[k] = packed(fmaxf(x.x, SLOPE * x.x), fmaxf(x.y, SLOPE * x.y));
        }
      }
    }
    *reinterpret_cast<uint4*>(stage + ((size_t)chunk * HALO + voxel) * 16) = value;
  }
}

// The finished plane of a warp group: stored, and its sums added to the warp's.
__device__ __forceinline__ void store_plane(const float* acc, void* __restrict__ out, const float* __restrict__ before,
                                            float* sums, Shape s, int b, int z, int h0, int w0, int group, int warp, int lane) {
  int w = w0 + lane / 4, h = h0 + group * 8 + warp * 2;
  #pragma unroll
  for (int j = 0; j < COUT / 8; ++j) {
    float s0 = 0, s1 = 0, q0 = 0, q1 = 0;
    #pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (h + row < s.height && w < s.width) {
        size_t at = ((((size_t)b * s.depth + z) * s.height + h + row) * s.width + w) * COUT + j * 8 + (lane % 4) * 2;
        float x = acc[j * 4 + row * 2], y = acc[j * 4 + row * 2 + 1];
        if (ADDS) { float2 p = *reinterpret_cast<const float2*>(before + at); x += p.x; y += p.y; }
        if (PARTIAL) { *reinterpret_cast<float2*>(reinterpret_cast<float*>(out) + at) = make_float2(x, y); }
        else { reinterpret_cast<uint32_t*>(out)[at / 2] = packed(x, y); }
        s0 += x; s1 += y; q0 += x * x; q1 += y * y;
      }
    }
    if (!PARTIAL) {
      #pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        s0 += __shfl_xor_sync(~0u, s0, lanes); s1 += __shfl_xor_sync(~0u, s1, lanes);
        q0 += __shfl_xor_sync(~0u, q0, lanes); q1 += __shfl_xor_sync(~0u, q1, lanes);
      }
      if (lane < 4) {
        int c = j * 8 + lane * 2;
        sums[c] += s0; sums[c + 1] += s1; sums[COUT + c] += q0; sums[COUT + c + 1] += q1;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(128 * GROUPS + LOADERS, 1)
convolve(const unsigned short* __restrict__ in, const unsigned short* __restrict__ weights, const float* __restrict__ norms,
         const float* __restrict__ before, void* __restrict__ out, float* __restrict__ unit_sums, int batch, int depth, int height, int width, int chunk, int units) {
  const Shape s = {batch, depth, height, width, chunk};
  extern __shared__ __align__(1024) char shared[];
  char* ring = shared + WEIGHT_BYTES;
  float* norm = reinterpret_cast<float*>(ring + STAGES * STAGE_BYTES);          // 2 CIN
  float* sums = norm + 2 * CIN;                                                 // WARPS x 2 COUT
  uint64_t* bars = reinterpret_cast<uint64_t*>(sums + WARPS * 2 * COUT);        // full, empty
  uint32_t full = shared_address(bars), empty = full + 8 * STAGES;
  int tid = threadIdx.x, group = __shfl_sync(~0u, tid / 128, 0);
  if (tid == 0)
    for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, LOADERS); barrier_init(empty + 8 * i, WARPS); }
  for (int i = tid; i < WEIGHT_BYTES / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(shared)[i] = __ldg(reinterpret_cast<const uint4*>(weights) + i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  int tiles_w = (s.width + TILE_W - 1) / TILE_W, tiles_h = (s.height + TILE_H - 1) / TILE_H, chunks = (s.depth + s.chunk - 1) / s.chunk;
  int stage = 0, phase = 0;  // of the ring of planes
  if (group == GROUPS) {
    int lane_id = tid - 128 * GROUPS;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      if (NORMALIZED) {
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");  // the last unit's planes are loaded
        for (int i = lane_id; i < 2 * CIN; i += LOADERS) norm[i] = norms[(size_t)b * 2 * CIN + i];
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");
      }
      int last = min(z0 + s.chunk, s.depth - 1);
      for (int z = max(z0 - 1, 0); z <= last; ++z) {
        barrier_wait(empty + 8 * stage, phase ^ 1);
        load_plane(in, ring + stage * STAGE_BYTES, norm, s, b, z, h0, w0, lane_id);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(full + 8 * stage);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
      }
    }
  } else {
    int warp = tid / 32 % 4, lane = tid % 32;
    float* own = sums + (tid / 32) * 2 * COUT;
    uint32_t first = shared_address(ring) + group * 8 * EDGE * 16;
    uint32_t weight = shared_address(shared);
    float acc[N / 2];
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int end = min(z0 + s.chunk, s.depth);
      for (int i = lane; i < 2 * COUT; i += 32) own[i] = 0;
      __syncwarp();
      #pragma unroll
      for (int i = 0; i < N / 2; ++i) acc[i] = 0;
      for (int z = z0 - 1; z <= end; ++z) {
        if (z >= 0 && z < s.depth) {
          barrier_wait(full + 8 * stage, phase);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
          #pragma unroll 1
          for (int tap = 0; tap < 9; ++tap) {
            uint32_t at = first + stage * STAGE_BYTES + ((tap / 3) * EDGE + tap % 3) * 16;
            #pragma unroll
            for (int k = 0; k < CIN / 16; ++k)
              multiply(acc, descriptor(at + k * 2 * HALO * 16, HALO * 16, EDGE * 16),
                       descriptor(weight + (tap * CHUNKS + k * 2) * N * 16, N * 16, 128));
          }
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
          if (lane == 0) barrier_arrive(empty + 8 * stage);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        if (z - 1 >= z0)
          store_plane(acc + 2 * (COUT / 2), out, before, own, s, b, z - 1, h0, w0, group, warp, lane);
        #pragma unroll
        for (int i = 0; i < COUT / 2; ++i) {
          acc[COUT + i] = acc[COUT / 2 + i];
          acc[COUT / 2 + i] = acc[i];
          acc[i] = 0;
        }
      }
      if (!PARTIAL) {
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
        for (int i = tid; i < 2 * COUT; i += 128 * GROUPS) {
          float total = 0;
          for (int w = 0; w < WARPS; ++w) total += sums[w * 2 * COUT + i];
          unit_sums[(size_t)unit * 2 * COUT + i] = total;
        }
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
      }
    }
  }
}
