// Convolution of channels-last volumes: (B, D, H, W, CIN) -> (B, D, H, W, COUT), 3 x 3 x 3 or, with one of TAPS, 3 x 1 x 1.
//
// A block keeps all weights in shared memory and walks along D through a column of 24 x 8 voxels. Each input plane is read
// once, with its border of one voxel, and multiplied with the weights of the three depths at once: one product of 64 voxels
// x 16 channels with 16 channels x 3 COUT feeds the three output planes that the input plane takes part in. One warp group
// loads (and normalises), the others multiply, store, and add up what the next instance norm needs.
//
// FLOP: 6 TAPS CIN COUT a voxel. Bytes: 2 CIN (1.35 times, for the border) + 2 COUT a voxel.
//
// The input's CIN channels lie in one tensor or, half and half, in two (SHARES); the output's COUT are some of the WIDTH of its tensor.
//
// ctflow.kernels.convolution puts the constants and multiply(), the matrix instruction, before this file.

using uint32_t = unsigned int;
using uint64_t = unsigned long long;

constexpr int N = 3 * COUT, PARTS = COUT / 8, THIRD = COUT / 2;  // columns; of a depth: groups of 8, registers of a thread
constexpr int TILE_H = 8 * GROUPS, TILE_W = 8, EDGE = TILE_W + 2, HALO = (TILE_H + 2) * EDGE, CHUNKS = CIN / 8, SHARE = CIN / SHARES;
constexpr int STAGE_BYTES = CHUNKS * HALO * 16, WEIGHT_BYTES = TAPS * CIN * N * 2;
constexpr int WARPS = GROUPS * 4, LOADERS = 128, LANES = LOADERS / 2, ITEMS = (HALO + LANES - 1) / LANES;
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

// What a thread that loads has to do in a plane: ITEMS voxels, in each the same half of every 16 channels. Eight neighbouring
// threads write four voxels of two chunks, which lie in different banks (HALO is 4 more than a multiple of 8).
struct Loader {
  const unsigned short *in, *second;  // the volume's tensors, at its half of the first 16 channels
  const float* norm;         // factors and sums of all channels, at that half
  uint32_t at;               // of its first voxel in a stage
  int offsets[ITEMS];        // of its voxels in a plane of the volume; -1 outside

  __device__ void begin_unit(Shape s, int h0, int w0, int tid) {
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      int voxel = tid / 2 + k * LANES, h = h0 + voxel / EDGE - 1, w = w0 + voxel % EDGE - 1;
      bool inside = voxel < HALO && h >= 0 && h < s.height && w >= 0 && w < s.width;
      offsets[k] = inside ? (h * s.width + w) * SHARE : -1;
    }
  }

  // One input plane with its border into shared memory as [channels / 8][HALO][8]; normalised and rectified on the way.
  __device__ void load_plane(char* stage, Shape s, int b, int z, int tid) {
    const size_t start = ((size_t)b * s.depth + z) * s.height * s.width * SHARE;
    #pragma unroll 1
    for (int pair = 0; pair < CHUNKS / 2; ++pair) {
      const unsigned short* plane = SHARES == 1 || pair * 16 < SHARE ? in + start + pair * 16 : second + start + pair * 16 - SHARE;
      uint4 values[ITEMS];
      #pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        values[k] = offsets[k] >= 0 ? __ldg(reinterpret_cast<const uint4*>(plane + offsets[k])) : make_uint4(0, 0, 0, 0);
      if (NORMALIZED) normalize(values, pair);
      #pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        if (k + 1 < ITEMS || tid / 2 + k * LANES < HALO)
          *reinterpret_cast<uint4*>(stage + at + (pair * 2 * HALO + k * LANES) * 16) = values[k];
    }
  }

  __device__ __forceinline__ void normalize(uint4 (&values)[ITEMS], int pair) {
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 f = reinterpret_cast<const float4*>(norm + pair * 16)[half], t = reinterpret_cast<const float4*>(norm + CIN + pair * 16)[half];
      #pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        if (offsets[k] < 0) continue;  // what lies outside stays 0
        uint32_t* pairs = &values[k].x + 2 * half;
        pairs[0] = rectified(pairs[0], f.x, t.x, f.y, t.y);
        pairs[1] = rectified(pairs[1], f.z, t.z, f.w, t.w);
      }
    }
  }

  __device__ __forceinline__ static uint32_t rectified(uint32_t pair, float fx, float tx, float fy, float ty) {
    float2 x = unpacked(pair);
    x.x = x.x * fx + tx, x.y = x.y * fy + ty;
    return packed(fmaxf(x.x, SLOPE * x.x), fmaxf(x.y, SLOPE * x.y));
  }
};

// A finished plane of a thread: two rows, in each of which it has two channels of every 8. Its sums stay in registers.
struct Output {
  void* out;
  const float* before;
  float sums[2 * PARTS], squares[2 * PARTS];
  int lane;
  size_t at, row, plane;  // of its first value in plane 0, and from a row or plane to the next
  bool inside[2];

  __device__ void begin_unit(Shape s, int b, int h, int w) {
    row = (size_t)s.width * WIDTH, plane = s.height * row;
    at = (size_t)b * s.depth * plane + h * row + (size_t)w * WIDTH;
    inside[0] = w < s.width && h < s.height, inside[1] = w < s.width && h + 1 < s.height;
    #pragma unroll
    for (int i = 0; i < 2 * PARTS; ++i) sums[i] = squares[i] = 0;
  }

  __device__ __forceinline__ float2 value(const float (&acc)[THIRD], int part, int r, size_t at) {
    float2 x = make_float2(acc[part * 4 + r * 2], acc[part * 4 + r * 2 + 1]);
    if (ADDS && inside[r]) {
      float2 p = __ldg(reinterpret_cast<const float2*>(before + at + part * 8 + lane % 4 * 2));
      x.x += p.x; x.y += p.y;
    }
    if (!PARTIAL && inside[r]) {
      sums[2 * part] += x.x; sums[2 * part + 1] += x.y;
      squares[2 * part] += x.x * x.x; squares[2 * part + 1] += x.y * x.y;
    }
    return x;
  }

  __device__ __forceinline__ void store(const float (&acc)[THIRD], int z) {
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
      size_t start = at + z * plane + r * row;
      #pragma unroll
      for (int part = 0; part < PARTS; part += 2) {
        float2 x = value(acc, part, r, start);
        if (PARTIAL || part + 1 == PARTS) {
          put(x, r, start + part * 8);
          if (part + 1 < PARTS) put(value(acc, part + 1, r, start), r, start + part * 8 + 8);
        } else {
          put_both(x, value(acc, part + 1, r, start), r, start + part * 8);
        }
      }
    }
  }

  __device__ __forceinline__ void put(float2 x, int r, size_t to) {
    if (!inside[r]) return;
    to += lane % 4 * 2;
    if (PARTIAL) *reinterpret_cast<float2*>(reinterpret_cast<float*>(out) + to) = x;
    else reinterpret_cast<uint32_t*>(out)[to / 2] = packed(x.x, x.y);
  }

  // Two neighbouring threads exchange values, so that each stores four channels that lie side by side: 32 bytes of four threads.
  __device__ __forceinline__ void put_both(float2 x, float2 y, int r, size_t to) {
    uint32_t first = packed(x.x, x.y), second = packed(y.x, y.y);
    bool odd = lane & 1;
    uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
    if (!inside[r]) return;
    to += odd ? 8 + lane % 4 * 2 - 2 : lane % 4 * 2;
    *reinterpret_cast<uint2*>(reinterpret_cast<unsigned short*>(out) + to) = odd ? make_uint2(other, second) : make_uint2(first, other);
  }

  // The sums of a warp, in shared memory: COUT sums, COUT sums of squares.
  __device__ void end_unit(float* own) {
    #pragma unroll
    for (int i = 0; i < 2 * PARTS; ++i) {
      float sum = sums[i], square = squares[i];
      #pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes); square += __shfl_xor_sync(~0u, square, lanes);
      }
      if (lane < 4) {
        int c = i / 2 * 8 + lane * 2 + i % 2;
        own[c] = sum; own[COUT + c] = square;
      }
    }
  }
};

// The ring of planes: which stage comes next, and in which phase its barriers are.
struct Ring {
  int stage, phase;
  __device__ void advance() { if (++stage == STAGES) { stage = 0; phase ^= 1; } }
};

extern "C" __global__ void __launch_bounds__(128 * GROUPS + LOADERS, 1)
convolve(const unsigned short* __restrict__ in, const unsigned short* __restrict__ second, const unsigned short* __restrict__ weights, const float* __restrict__ norms,
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
  Ring next = {0, 0};
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGISTERS));
    int id = tid - 128 * GROUPS;
    Loader loader = {in + id % 2 * 8, second + id % 2 * 8, norm + id % 2 * 8, (uint32_t)(id % 2 * HALO + id / 2) * 16};
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      loader.begin_unit(s, h0, w0, id);
      if (NORMALIZED) {
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");  // the last unit's planes are loaded
        for (int i = id; i < 2 * CIN; i += LOADERS) norm[i] = norms[(size_t)b * 2 * CIN + i];
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");
      }
      int last = min(z0 + s.chunk, s.depth - 1);
      for (int z = max(z0 - 1, 0); z <= last; ++z) {
        barrier_wait(empty + 8 * next.stage, next.phase ^ 1);
        loader.load_plane(ring + next.stage * STAGE_BYTES, s, b, z, id);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(full + 8 * next.stage);
        next.advance();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
    int warp = tid / 32 % 4, lane = tid % 32;
    uint32_t first = shared_address(ring) + group * 8 * EDGE * 16, weight = shared_address(shared);
    Output output;
    output.out = out, output.before = before, output.lane = lane;
    float acc[3 * THIRD], done[THIRD];  // of the planes after, at and before the input's; the last finished one
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int start = max(z0 - 1, 0), end = min(z0 + s.chunk, s.depth), last = min(end, s.depth - 1);
      output.begin_unit(s, b, h0 + group * 8 + warp * 2, w0 + lane / 4);
      #pragma unroll
      for (int i = 0; i < 3 * THIRD; ++i) acc[i] = 0;
      for (int z = start; z <= last; ++z) {
        barrier_wait(full + 8 * next.stage, next.phase);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        #pragma unroll 1
        for (int tap = 0; tap < TAPS; ++tap) {
          uint32_t from = first + next.stage * STAGE_BYTES + (TAPS == 9 ? tap / 3 * EDGE + tap % 3 : EDGE + 1) * 16;
          #pragma unroll
          for (int k = 0; k < CIN / 16; ++k)
            multiply(acc, descriptor(from + k * 2 * HALO * 16, HALO * 16, EDGE * 16),
                     descriptor(weight + (tap * CHUNKS + k * 2) * N * 16, N * 16, 128));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (z - 2 >= z0) output.store(done, z - 2);  // while the products of plane z are computed
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) barrier_arrive(empty + 8 * next.stage);
        next.advance();
        #pragma unroll
        for (int i = 0; i < THIRD; ++i) {
          done[i] = acc[2 * THIRD + i];
          acc[2 * THIRD + i] = acc[THIRD + i];
          acc[THIRD + i] = acc[i];
          acc[i] = 0;
        }
      }
      for (int z = last - 1; z < end; ++z) {  // the last plane's products finish it, and the volume's last plane
        if (z >= z0) output.store(done, z);
        #pragma unroll
        for (int i = 0; i < THIRD; ++i) done[i] = acc[2 * THIRD + i];
      }
      if (!PARTIAL) {
        output.end_unit(sums + (tid / 32) * 2 * COUT);
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
        for (int i = tid; i < 2 * COUT; i += 128 * GROUPS) {
          float total = 0;
          for (int w = 0; w < WARPS; ++w) total += sums[w * 2 * COUT + i];
          unit_sums[(size_t)unit * 2 * WIDTH + i / COUT * WIDTH + i % COUT] = total;
        }
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
      }
    }
  }
}
