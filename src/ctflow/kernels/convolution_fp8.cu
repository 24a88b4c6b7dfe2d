// The 3 x 3 x 3 convolution of convolution.cu with products in e4m3: (B, D, H, W, CIN) -> (B, D, H, W, COUT), both in fp16.
//
// The walk is the same. Planes are normalised and rounded to e4m3 as they are stored to shared memory, where 16 channels
// of a voxel are a piece of 16 bytes. One product takes two pieces (K = 32) wherever they lie: the two of a pair may be of
// neighbouring taps, so 48 channels, three pieces, need 14 products of a plane and not 18.
//
// Hopper adds such products with some 14 bits. After at most PROMOTE products the sums are therefore added to others in fp32.
// So a thread keeps two sets of sums, and a block has two groups that multiply.
//
// What is loaded waits in shared memory, in fp16, where each thread that loads has room of its own: AHEAD turns are on their
// way, a turn being the pieces of a plane that are loaded together. Kept in registers they were too few to hide the latency.
//
// FLOP: 54 CIN COUT a voxel. Bytes: 2 CIN (1.41 times, for the border) + 2 COUT a voxel.
//
// ctflow.kernels.convolution_fp8 puts the constants, multiply(), the matrix instruction, halves.cuh, pipeline.cuh and
// convolution.cuh before this file.

constexpr int EDGE = TILE_W + 2, HALO = (TILE_H + 2) * EDGE;  // of the input's tile, with its border
constexpr int LOADERS = 128, LANES = LOADERS / 2, ITEMS = (HALO + LANES - 1) / LANES;
constexpr int CHUNKS = CIN / 16, PIECES = 9 * CHUNKS, STEPS = (PIECES + 1) / 2, ROUNDS = (STEPS + PROMOTE - 1) / PROMOTE;
constexpr int STAGE_BYTES = CHUNKS * HALO * 16, STEP_BYTES = 2 * N * 16, WEIGHT_BYTES = STEPS * STEP_BYTES;
constexpr int TOGETHER = SHARE % 48 == 0 ? 3 : SHARE % 32 == 0 ? 2 : 1;  // pieces of a voxel that are loaded at once
constexpr int TURNS = CHUNKS / TOGETHER, SLOT_BYTES = TOGETHER * ITEMS * LOADERS * 16;

// K-major, no swizzle: 8 rows of 16 bytes lie side by side; `leading` to the next 16 bytes of channels, `stride` to the next 8 rows.
// All in units of 16 bytes; what is added to an address stays in the lower half, so that a product costs few instructions.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t)stride << 32 | (address + (leading << 16));
}

// Where a piece lies, from the first voxel's place in a stage; the last product's missing piece is the first, with weights of 0.
__device__ constexpr int place_of(int piece) {
  int tap = piece % PIECES / CHUNKS, chunk = piece % PIECES % CHUNKS;
  return chunk * HALO + tap / 3 * EDGE + tap % 3;
}
__device__ constexpr int lower_of(int step) {
  return place_of(2 * step) < place_of(2 * step + 1) ? place_of(2 * step) : place_of(2 * step + 1);
}
__device__ constexpr int upper_of(int step) {
  return place_of(2 * step) < place_of(2 * step + 1) ? place_of(2 * step + 1) : place_of(2 * step);
}
__device__ constexpr int first_of(int round) { return round * STEPS / ROUNDS; }

// Four numbers as e4m3, in order; what is larger than 448 becomes 448, and NaN stays NaN.
__device__ __forceinline__ uint32_t rounded(float4 x) {
  uint32_t four;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}" : "=r"(four) : "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
  return four;
}

// What a thread that loads has to do in a plane: ITEMS voxels, in each the same half of every 16 channels. It stores what it has
// loaded itself, so that it waits for no other before that, and room is free once it has been read.
struct Loader {
  const unsigned short *in, *second;  // the volume's tensors, at its half of the first 16 channels
  const float* norm;         // factors and sums of all channels, at that half
  int id, at;                // of the thread; of its first voxel's half in a stage
  int offsets[ITEMS];        // of its voxels in a plane of the volume; -1 outside
  char* slots;               // AHEAD turns' values
  int slot;                  // of the turn to be stored next

  __device__ void begin_unit(Shape s, int h0, int w0) {
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      int voxel = id / 2 + k * LANES, h = h0 + voxel / EDGE - 1, w = w0 + voxel % EDGE - 1;
      bool inside = voxel < HALO && h >= 0 && h < s.height && w >= 0 && w < s.width;
      offsets[k] = inside ? (h * s.width + w) * SHARE : -1;
    }
  }

  __device__ __forceinline__ const unsigned short* plane_of(Shape s, int b, int z, int turn) const {
    const int channel = turn * TOGETHER * 16;
    return (SHARES == 1 || channel < SHARE ? in + channel : second + channel - SHARE) + ((size_t)b * s.depth + z) * s.height * s.width * SHARE;
  }

  // Begins to load a turn's values; nothing, where no plane is left, counts as a turn as well.
  __device__ __forceinline__ void begin(const unsigned short* plane, int to) {
    if (plane) {
      const uint32_t at = shared_address(slots + to * SLOT_BYTES + id * 16);
      #pragma unroll
      for (int chunk = 0; chunk < TOGETHER; ++chunk)
        #pragma unroll
        for (int k = 0; k < ITEMS; ++k)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at + (chunk * ITEMS + k) * LOADERS * 16),
                       "l"(plane + max(offsets[k], 0) + chunk * 16), "r"(offsets[k] >= 0 ? 16 : 0) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // The values of a turn into shared memory as [channels / 16][HALO][16]; those of `next`, a plane or null, are to take their place.
  __device__ __forceinline__ void store(char* stage, int turn, const unsigned short* next) {
    asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 1) : "memory");
    const uint4* values = reinterpret_cast<const uint4*>(slots + slot * SLOT_BYTES) + id;
    #pragma unroll
    for (int chunk = 0; chunk < TOGETHER; ++chunk) {
      const float* own = norm + (turn * TOGETHER + chunk) * 16;
      float4 f[2], t[2];
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        f[half] = reinterpret_cast<const float4*>(own)[half];
        if (NORMALIZED) t[half] = reinterpret_cast<const float4*>(own + CIN)[half];
      }
      #pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const uint4 x = values[(chunk * ITEMS + k) * LOADERS];
        uint2 eight = make_uint2(four_of(x.x, x.y, f[0], t[0]), four_of(x.z, x.w, f[1], t[1]));
        if (NORMALIZED && offsets[k] < 0) eight = make_uint2(0, 0);  // what lies outside stays 0
        if (k + 1 < ITEMS || id / 2 + k * LANES < HALO)
          *reinterpret_cast<uint2*>(stage + at + ((turn * TOGETHER + chunk) * HALO + k * LANES) * 16) = eight;
      }
    }
    begin(next, slot);
    if (++slot == AHEAD) slot = 0;
  }

  __device__ __forceinline__ static uint32_t four_of(uint32_t first, uint32_t second, float4 f, float4 t) {
    const float2 low = unpacked(first), high = unpacked(second);
    float4 x = make_float4(low.x * f.x, low.y * f.y, high.x * f.z, high.y * f.w);
    if (NORMALIZED) {
      x.x += t.x, x.y += t.y, x.z += t.z, x.w += t.w;
      x = make_float4(fmaxf(x.x, SLOPE * x.x), fmaxf(x.y, SLOPE * x.y), fmaxf(x.z, SLOPE * x.z), fmaxf(x.w, SLOPE * x.w));
    }
    return rounded(x);
  }
};

// `scales`: what each channel of the output is multiplied with, then of each share what it is multiplied with before it is rounded.
extern "C" __global__ void __launch_bounds__(128 * GROUPS + LOADERS, 1)
convolve_fp8(const unsigned short* __restrict__ in, const unsigned short* __restrict__ second, const uint4* __restrict__ weights,
             const float* __restrict__ norms, const float* __restrict__ scales, void* __restrict__ out, float* __restrict__ unit_sums,
             int batch, int depth, int height, int width, int chunk, int units) {
  const Shape s = {batch, depth, height, width, chunk};
  extern __shared__ __align__(1024) char shared[];
  char* ring = shared + WEIGHT_BYTES;
  float* norm = reinterpret_cast<float*>(ring + STAGES * STAGE_BYTES + AHEAD * SLOT_BYTES);  // 2 CIN
  float* factors = norm + 2 * CIN;                                              // COUT
  float* sums = factors + COUT;                                                 // WARPS x 2 COUT
  uint64_t* bars = reinterpret_cast<uint64_t*>(sums + WARPS * 2 * COUT);        // full, empty
  uint32_t full = shared_address(bars), empty = full + 8 * STAGES;
  int tid = threadIdx.x, group = __shfl_sync(~0u, tid / 128, 0);
  if (tid == 0)
    for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, LOADERS); barrier_init(empty + 8 * i, WARPS); }
  for (int i = tid; i < WEIGHT_BYTES / 16; i += blockDim.x) reinterpret_cast<uint4*>(shared)[i] = __ldg(weights + i);
  for (int i = tid; i < COUT; i += blockDim.x) factors[i] = scales[i];
  for (int i = tid; i < CIN; i += blockDim.x) norm[i] = scales[COUT + i / SHARE];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  int tiles_w = (s.width + TILE_W - 1) / TILE_W, tiles_h = (s.height + TILE_H - 1) / TILE_H, chunks = (s.depth + s.chunk - 1) / s.chunk;
  Ring next = {0, 0};
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGISTERS));
    Loader loader;
    loader.id = tid - 128 * GROUPS, loader.at = loader.id / 2 * 16 + loader.id % 2 * 8;
    loader.in = in + loader.id % 2 * 8, loader.second = second + loader.id % 2 * 8, loader.norm = norm + loader.id % 2 * 8;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int start = max(z0 - 1, 0), last = min(z0 + s.chunk, s.depth - 1);
      loader.begin_unit(s, h0, w0);
      loader.slots = ring + STAGES * STAGE_BYTES, loader.slot = 0;
      for (int i = 0; i < AHEAD; ++i)
        loader.begin(start + i / TURNS <= last ? loader.plane_of(s, b, start + i / TURNS, i % TURNS) : nullptr, i);
      if (NORMALIZED) {
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");  // the last unit's planes are loaded
        for (int i = loader.id; i < 2 * CIN; i += LOADERS) norm[i] = norms[(size_t)b * 2 * CIN + i] * scales[COUT + i % CIN / SHARE];
        asm volatile("bar.sync 2, %0;" :: "n"(LOADERS) : "memory");
      }
      for (int z = start; z <= last; ++z) {
        barrier_wait(empty + 8 * next.stage, next.phase ^ 1);
        #pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          const int then = z + (turn + AHEAD) / TURNS;
          const unsigned short* after = then <= last ? loader.plane_of(s, b, then, (turn + AHEAD) % TURNS) : nullptr;
          loader.store(ring + next.stage * STAGE_BYTES, turn, after);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(full + 8 * next.stage);
        next.advance();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
    int warp = tid / 32 % 4, lane = tid % 32;
    const uint32_t first = (shared_address(ring) >> 4) + group * 8 * EDGE, weight = shared_address(shared) >> 4;
    Output output;
    output.out = out, output.before = nullptr, output.factors = factors, output.lane = lane;
    float acc[3][THIRD], products[3 * THIRD];  // of the planes after, at and before the input's; what is not promoted yet
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int w0 = unit % tiles_w * TILE_W, h0 = unit / tiles_w % tiles_h * TILE_H;
      int z0 = unit / (tiles_w * tiles_h) % chunks * s.chunk, b = unit / (tiles_w * tiles_h * chunks);
      int start = max(z0 - 1, 0), end = min(z0 + s.chunk, s.depth), last = min(end, s.depth - 1);
      output.begin_unit(s, b, h0 + group * 8 + warp * 2, w0 + lane / 4);
      #pragma unroll
      for (int i = 0; i < THIRD; ++i) acc[0][i] = acc[1][i] = acc[2][i] = 0;
      for (int z = start; z <= last; ++z) {
        barrier_wait(full + 8 * next.stage, next.phase);
        const uint32_t from = first + next.stage * (STAGE_BYTES / 16);
        #pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
          #pragma unroll
          for (int step = first_of(round); step < first_of(round + 1); ++step)
            multiply(products, descriptor(from + lower_of(step), upper_of(step) - lower_of(step), EDGE),
                     descriptor(weight + step * (STEP_BYTES / 16), N, 8), step > first_of(round));
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          if (round == 0 && z - 2 >= z0) output.store(acc[2], z - 2);  // finished by the last plane
          asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
          if (round + 1 == ROUNDS && lane == 0) barrier_arrive(empty + 8 * next.stage);
          #pragma unroll
          for (int i = 0; i < THIRD; ++i) {
            acc[2][i] = (round ? acc[2][i] : acc[1][i]) + products[2 * THIRD + i];  // the first round is the step to this plane
            acc[1][i] = (round ? acc[1][i] : acc[0][i]) + products[THIRD + i];
            acc[0][i] = (round ? acc[0][i] : 0) + products[i];
          }
        }
        next.advance();
      }
      if (last - 1 >= z0) output.store(acc[2], last - 1);
      if (last < end) output.store(acc[1], last);  // the volume's last plane
      output.end_unit(sums, unit_sums + (size_t)unit * 2 * WIDTH, tid);
    }
  }
}
