// Convolution of channels-last volumes: (B, D, H, W, CIN) -> (B, D, H, W, COUT), 3 x 3 x 3 or, with one of TAPS, 3 x 1 x 1;
// with a STRIDE of 2 from volumes of twice the size.
//
// A block keeps all weights in shared memory and walks along D through a column of 8 GROUPS x 8 voxels. Each input plane is
// read once, with its border of one voxel, and multiplied with the weights of the three depths at once: one product of 64
// voxels x 16 channels with 16 channels x 3 COUT feeds the three output planes that the input plane takes part in. With a
// stride of 2 it takes part in one or two, and its even columns lie before its odd ones, so that a product's voxels are
// neighbours. LOADERS load (and normalise), a warp group a plane, the other GROUPS multiply, store, and add up what the next
// instance norm needs.
//
// FLOP: 6 TAPS CIN COUT a voxel. Bytes: 2 CIN (1.35 times, for the border) + 2 COUT a voxel; 2 CIN eight times with the stride.
//
// The input's CIN channels lie in one tensor or, half and half, in two (SHARES); those from NORMED_FROM on are normalised.
// The output's COUT are some of the WIDTH of its tensor.
//
// ctflow.kernels.convolution puts the constants, multiply(), the matrix instruction, halves.cuh, pipeline.cuh and
// convolution.cuh before this file.

constexpr int SIDE = TAPS == 9 ? 3 : 1, CHUNKS = CIN / 8, NORMS = CIN - NORMED_FROM;
// Of the input's tile, with its border:
constexpr int EDGE = STRIDE * (TILE_W - 1) + SIDE, VOXELS = (STRIDE * (TILE_H - 1) + SIDE) * EDGE;
constexpr int HALO = VOXELS + (12 - VOXELS % 8) % 8;  // 4 more than a multiple of 8: chunks begin in other banks
constexpr int STAGE_BYTES = CHUNKS * HALO * 16, WEIGHT_BYTES = TAPS * CIN * N * 2;
constexpr int LANES = 64, ITEMS = (VOXELS + LANES - 1) / LANES;
constexpr int PLANES = STRIDE == 1 ? 3 : 2;  // of the output, in which an input plane takes part
using Sums = float[PLANES * THIRD];

// The leaky ReLU of both; what is negative is a hundredth, and rounded twice.
__device__ __forceinline__ uint32_t leaky(uint32_t pair) {
  uint32_t small, result;
#if BF16
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(small) : "r"(pair), "r"(packed(SLOPE, SLOPE)));
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(small));
#else
  asm("mul.f16x2 %0, %1, %2;" : "=r"(small) : "r"(pair), "r"(packed(SLOPE, SLOPE)));
  asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(small));
#endif
  return result;
}

// K-major, no swizzle: 8 rows of 16 bytes lie side by side; `leading` to the next 8 channels, `stride` to the next 8 rows.
// All in units of 16 bytes; what is added to an address stays in the lower half, so that a product costs few instructions.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t)stride << 32 | (address + (leading << 16));
}

// What a thread that loads has to do in a plane: ITEMS voxels, in each the same half of every 16 channels. Eight neighbouring
// threads write four voxels of two chunks, which lie in different banks. What is read waits in registers while what was read
// before it is normalised and stored, which hides the memory's latency.
struct Loader {
  const unsigned short *in, *second;  // the volume's tensors, at its half of the first 16 channels
  const float* norm;         // factors and sums of NORMS channels, at that half
  uint32_t at;               // of its first voxel in a stage
  int offsets[ITEMS];        // of its voxels in a plane of the volume; -1 outside
  uint4 ahead[ITEMS];        // 8 channels of each, which are to be stored next

  __device__ void begin_unit(Shape s, int h0, int w0, int tid) {
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      int voxel = tid / 2 + k * LANES, column = voxel % EDGE;
      if (STRIDE == 2) column = column <= TILE_W ? 2 * column : 2 * (column - TILE_W) - 1;
      int h = h0 + voxel / EDGE - SIDE / 2, w = w0 + column - SIDE / 2;
      bool inside = voxel < VOXELS && h >= 0 && h < s.height && w >= 0 && w < s.width;
      offsets[k] = inside ? (h * s.width + w) * SHARE : -1;
    }
  }

  // 16 channels of an input plane.
  __device__ __forceinline__ const unsigned short* source(Shape s, int b, int z, int pair) const {
    const size_t start = ((size_t)b * s.depth + z) * s.height * s.width * SHARE;
    return SHARES == 1 || pair * 16 < SHARE ? in + start + pair * 16 : second + start + pair * 16 - SHARE;
  }
  __device__ __forceinline__ uint4 fetched(const unsigned short* plane, int k) const {
    return offsets[k] >= 0 ? __ldg(reinterpret_cast<const uint4*>(plane + offsets[k])) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void fetch_first(Shape s, int b, int z) {
    const unsigned short* plane = source(s, b, z, 0);
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) ahead[k] = fetched(plane, k);
  }

  // One input plane with its border into shared memory as [channels / 8][HALO][8]; the channels from NORMED_FROM on are
  // normalised and rectified on the way. Its first 16 channels were fetched before; those of plane `next` are in the end.
  __device__ __forceinline__ void load_plane(char* stage, Shape s, int b, int z, int next, int tid) {
    #pragma unroll 1
    for (int pair = 0; pair < CHUNKS / 2; ++pair) {
      const unsigned short* plane = pair + 1 < CHUNKS / 2 ? source(s, b, z, pair + 1) : source(s, b, next, 0);
      const bool normed = NORMS == CIN || (NORMS > 0 && pair * 16 >= NORMED_FROM);
      float4 f[2], t[2];
      #pragma unroll
      for (int half = 0; half < 2 && normed; ++half) {
        f[half] = reinterpret_cast<const float4*>(norm + pair * 16 - NORMED_FROM)[half];
        t[half] = reinterpret_cast<const float4*>(norm + NORMS + pair * 16 - NORMED_FROM)[half];
      }
      #pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        if (k + 1 == ITEMS && tid / 2 + k * LANES >= VOXELS) break;
        uint4 value = ahead[k];
        ahead[k] = fetched(plane, k);
        if (normed) {
          value.x = rectified(value.x, f[0].x, t[0].x, f[0].y, t[0].y), value.y = rectified(value.y, f[0].z, t[0].z, f[0].w, t[0].w);
          value.z = rectified(value.z, f[1].x, t[1].x, f[1].y, t[1].y), value.w = rectified(value.w, f[1].z, t[1].z, f[1].w, t[1].w);
          if (offsets[k] < 0) value = make_uint4(0, 0, 0, 0);  // what lies outside stays 0
        }
        *reinterpret_cast<uint4*>(stage + at + (pair * 2 * HALO + k * LANES) * 16) = value;
      }
    }
  }

  __device__ __forceinline__ static uint32_t rectified(uint32_t pair, float fx, float tx, float fy, float ty) {
    float2 x = unpacked(pair);
    return leaky(packed(x.x * fx + tx, x.y * fy + ty));
  }
};

// The products of an input plane with the weights of all output planes that it takes part in (with a stride of 2: of one).
__device__ __forceinline__ void add_products(float* acc, uint32_t planes, uint32_t weight) {
  #pragma unroll 1
  for (int row = 0; row < SIDE; ++row)  // unrolled as well, the compiler waits for each product
    #pragma unroll
    for (int column = 0; column < SIDE; ++column)
      #pragma unroll
      for (int k = 0; k < CIN / 16; ++k) {
        const int beside = STRIDE == 1 ? column : column == 1 ? TILE_W + 1 : column / 2;
        multiply(acc, descriptor(planes + row * EDGE + beside + k * 2 * HALO, HALO, STRIDE * EDGE),
                 descriptor(weight + ((row * SIDE + column) * CHUNKS + k * 2) * N, N, 8));
      }
}

// The sums of a finished plane are taken out, those of the others move on; they lie side by side, the next one's last.
__device__ __forceinline__ void finish(Sums& acc, float (&done)[THIRD]) {
  #pragma unroll
  for (int i = 0; i < THIRD; ++i) {
    done[i] = acc[(PLANES - 1) * THIRD + i];
    #pragma unroll
    for (int plane = PLANES - 1; plane > 0; --plane) acc[plane * THIRD + i] = acc[(plane - 1) * THIRD + i];
    acc[i] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(128 * GROUPS + LOADERS, BLOCKS)
convolve(const unsigned short* __restrict__ in, const unsigned short* __restrict__ second, const unsigned short* __restrict__ weights, const float* __restrict__ norms,
         const float* __restrict__ before, void* __restrict__ out, float* __restrict__ unit_sums, int batch, int depth, int height, int width, int chunk, int units) {
  const Shape s = {batch, depth, height, width, chunk}, given = {batch, STRIDE * depth, STRIDE * height, STRIDE * width, chunk};
  extern __shared__ __align__(1024) char shared[];
  char* ring = shared + WEIGHT_BYTES;
  float* norm = reinterpret_cast<float*>(ring + STAGES * STAGE_BYTES);          // 2 NORMS
  float* sums = norm + 2 * CIN;                                                 // WARPS x 2 COUT
  uint64_t* bars = reinterpret_cast<uint64_t*>(sums + WARPS * 2 * COUT);        // full, empty
  uint32_t full = shared_address(bars), empty = full + 8 * STAGES;
  int tid = threadIdx.x, group = __shfl_sync(~0u, tid / 128, 0);
  if (tid == 0)
    for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, 128); barrier_init(empty + 8 * i, WARPS); }
  for (int i = tid; i < WEIGHT_BYTES / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(shared)[i] = __ldg(reinterpret_cast<const uint4*>(weights) + i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  int tiles_w = (s.width + TILE_W - 1) / TILE_W, tiles_h = (s.height + TILE_H - 1) / TILE_H, chunks = (s.depth + s.chunk - 1) / s.chunk;
  Ring next = {0, 0};
  if (group >= GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGISTERS));
    const int id = tid % 128, others = LOADERS / 128 - 1;
    int turns = group - GROUPS;  // planes until this group's next one
    Loader loader = {in + id % 2 * 8, second + id % 2 * 8, norm + id % 2 * 8, (uint32_t)(id % 2 * HALO + id / 2) * 16};
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int start = max(STRIDE * z0 - 1, 0), last = min(STRIDE * (z0 + s.chunk - 1) + 1, given.depth - 1);
      loader.begin_unit(given, STRIDE * h0, STRIDE * w0, id);
      loader.fetch_first(given, b, min(start + turns, last));
      if (NORMS > 0) {
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");  // the last unit's planes are loaded
        for (int i = tid - 128 * GROUPS; i < 2 * NORMS; i += LOADERS) norm[i] = norms[(size_t)b * 2 * NORMS + i];
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");
      }
      for (int z = start; z <= last; ++z, next.advance()) {
        if (turns-- > 0) continue;
        turns = others;
        barrier_wait(empty + 8 * next.stage, next.phase ^ 1);
        loader.load_plane(ring + next.stage * STAGE_BYTES, given, b, z, min(z + 1 + others, last), id);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(full + 8 * next.stage);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
    int warp = tid / 32 % 4, lane = tid % 32;
    const uint32_t first = (shared_address(ring) >> 4) + group * 8 * STRIDE * EDGE, weight = shared_address(shared) >> 4;
    Output output;
    output.out = out, output.before = before, output.lane = lane;
    Sums acc;
    float done[THIRD];  // of the last finished plane
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int start = max(STRIDE * z0 - 1, 0), end = min(z0 + s.chunk, s.depth), last = min(STRIDE * (end - 1) + 1, given.depth - 1);
      output.begin_unit(s, b, h0 + group * 8 + warp * 2, w0 + lane / 4);
      #pragma unroll
      for (int i = 0; i < PLANES * THIRD; ++i) acc[i] = 0;
      for (int z = start; z <= last; ++z) {
        barrier_wait(full + 8 * next.stage, next.phase);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        const uint32_t planes = first + next.stage * (STAGE_BYTES / 16);
        // With a stride of 2 an odd plane ends an output plane and begins the next, an even one is in the middle of one.
        if (STRIDE == 1) add_products(acc, planes, weight);
        else add_products(acc + THIRD, planes, weight + (z % 2 ? 1 : 2) * COUT);
        if (STRIDE == 2 && z % 2) add_products(acc, planes, weight);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        const int finished = STRIDE == 1 ? z - 2 : z % 2 ? -1 : z / 2 - 1;  // the plane that the last products finished
        if (finished >= z0) output.store(done, finished);  // while the products of plane z are computed
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) barrier_arrive(empty + 8 * next.stage);
        next.advance();
        if (STRIDE == 1 || z % 2) finish(acc, done);
      }
      // The last products finish a plane; with a stride of 1 the volume's last plane is finished without any more.
      for (int z = STRIDE == 1 ? last - 1 : end - 1; z < end; ++z) {
        if (z >= z0) output.store(done, z);
        if (STRIDE == 1) finish(acc, done);
      }
      if (!PARTIAL) {  // as Output::end_unit; written out it is other code, which has been measured
        output.end_unit_of_warp(sums + (tid / 32) * 2 * COUT);
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
