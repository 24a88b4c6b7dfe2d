// Convolution of 3 x 3 x 3 of small channels-last volumes with many channels: (B, D, H, W, CIN) -> (B, D, H, W, WIDTH), as
// products of matrices.
//
// Voxels are numbered with one column of zeros behind each row, so that the neighbours along W of voxel p are p - 1 and
// p + 1 everywhere. A block computes TILE such places in a row x N channels. A stage holds CHUNK channels of the TILE + 2
// voxels that lie one of nine shifts along D and H away, gathered with zeros for what lies outside; it is multiplied three
// times, begun at its first, second and third voxel, with the weights of the three shifts along W.
//
// One warp group loads, the other GROUPS multiply 64 places each. With SPLIT the steps (shifts and chunks of channels) are
// divided among several blocks, which store their products in float32; else a block stores the result and its sums.
//
// FLOP: 54 CIN WIDTH a voxel. Bytes that a block reads: (TILE + 2 + 3 N) 18 CIN a tile, nearly all from the L2 cache.
//
// ctflow.kernels.gathered_convolution puts the constants, multiply(), the matrix instruction, halves.cuh and pipeline.cuh
// before this file.

constexpr int SHARE = CIN / SHARES, CHUNKS = CIN / CHUNK, STEPS = 9 * CHUNKS, PIECES = CHUNK / 8;
constexpr int TILE = 64 * GROUPS, VOXELS = TILE + 2, HELD = VOXELS + PIECES / 8;  // pieces of a voxel lie in different banks
constexpr int VOXEL_BYTES = PIECES * HELD * 16, WEIGHT_BYTES = 3 * N * CHUNK * 2, STAGE_BYTES = VOXEL_BYTES + WEIGHT_BYTES;
constexpr int AT_ONCE = 128 / PIECES, ITEMS = (VOXELS + AT_ONCE - 1) / AT_ONCE;
constexpr int WARPS = 4 * GROUPS, BLOCKS_OF_N = WIDTH / N;

// `sets` of `planes` planes each: an image is a set, or all images are one. `depth` planes are an image.
struct Shape { int sets, planes, depth, height, width, tiles, splits; };

// What a block computes at a time; neighbouring blocks read the same weights.
struct Unit {
  int tile, set, part, split;
  __device__ Unit(Shape s, int unit) {
    tile = unit % s.tiles, unit /= s.tiles;
    set = unit % s.sets, unit /= s.sets;
    part = unit % BLOCKS_OF_N, split = unit / BLOCKS_OF_N;
  }
  __device__ int begin(Shape s) const { return split * STEPS / s.splits; }
  __device__ int end(Shape s) const { return (split + 1) * STEPS / s.splits; }
  __device__ size_t voxels(Shape s) const { return (size_t)set * s.planes * s.height * s.width; }  // before its set
};

// K-major, no swizzle: 8 rows of 16 bytes lie side by side; `leading` to the next 8 channels, 8 to the next 8 rows. In units of
// 16 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
  return (uint64_t)8 << 32 | (address + (leading << 16));
}

// A thread loads the same 8 of CHUNK channels of ITEMS voxels.
struct Loader {
  int offsets[ITEMS];  // from the set's begin, in numbers
  int inside[ITEMS];   // a bit for each of nine shifts

  __device__ void begin_unit(Shape s, const Unit& unit, int tid) {
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int place = unit.tile * TILE - 1 + tid / PIECES + k * AT_ONCE;
      const int row = place / (s.width + 1), w = place - row * (s.width + 1), plane = row / s.height;
      const int h = row - plane * s.height, d = plane % s.depth;
      offsets[k] = (row * s.width + w) * SHARE + tid % PIECES * 8;
      inside[k] = 0;
      if (place < 0 || plane >= s.planes || w == s.width) continue;
      #pragma unroll
      for (int shift = 0; shift < 9; ++shift) {
        const int z = d + shift / 3 - 1, y = h + shift % 3 - 1;
        inside[k] |= (z >= 0 && z < s.depth && y >= 0 && y < s.height) << shift;
      }
    }
  }

  __device__ __forceinline__ void load(uint32_t stage, const unsigned short* set, Shape s, int shift, int tid) const {
    const unsigned short* from = set + ((shift / 3 - 1) * s.height + shift % 3 - 1) * s.width * SHARE;
    stage += (tid % PIECES * HELD + tid / PIECES) * 16;
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      if (k + 1 == ITEMS && tid / PIECES + k * AT_ONCE >= VOXELS) break;
      const bool read = inside[k] >> shift & 1;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :: "r"(stage + k * AT_ONCE * 16), "l"(read ? from + offsets[k] : set), "r"(read ? 16 : 0) : "memory");
    }
  }
};

__device__ __forceinline__ void load_weights(uint32_t to, const unsigned short* from, uint32_t bar) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(WEIGHT_BYTES) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(WEIGHT_BYTES), "r"(bar) : "memory");
}

// Two neighbouring threads exchange values, so that each stores four channels that lie side by side.
__device__ __forceinline__ void store_halves(unsigned short* to, uint32_t first, uint32_t second, int lane, bool inside) {
  const bool odd = lane & 1;
  const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
  if (!inside) return;
  to += odd ? 8 + lane % 4 * 2 - 2 : lane % 4 * 2;
  *reinterpret_cast<uint2*>(to) = odd ? make_uint2(other, second) : make_uint2(first, other);
}

// The result of a thread: two places, of each two channels of every 8.
struct Output {
  size_t at[2];
  bool inside[2];

  __device__ Output(Shape s, const Unit& unit, int first, int lane) {
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int place = unit.tile * TILE + first + lane / 4 + 8 * r;
      const int row = place / (s.width + 1), w = place - row * (s.width + 1);
      inside[r] = w < s.width && row < s.planes * s.height;
      at[r] = (unit.voxels(s) + row * s.width + w) * WIDTH + unit.part * N;
    }
  }

  __device__ __forceinline__ void store_products(float* out, const float (&acc)[N / 2], int lane) const {
    #pragma unroll
    for (int r = 0; r < 2; ++r)
      #pragma unroll
      for (int part = 0; part < N / 8; ++part)
        if (inside[r])
          *reinterpret_cast<float2*>(out + at[r] + part * 8 + lane % 4 * 2) = make_float2(acc[part * 4 + r * 2], acc[part * 4 + r * 2 + 1]);
  }

  __device__ __forceinline__ void store(unsigned short* out, const float (&acc)[N / 2], int lane) const {
    #pragma unroll
    for (int r = 0; r < 2; ++r)
      #pragma unroll
      for (int part = 0; part < N / 8; part += 2) {
        const float* x = acc + part * 4 + r * 2;
        store_halves(out + at[r] + part * 8, packed(x[0], x[1]), packed(x[4], x[5]), lane, inside[r]);
      }
  }

  // Of a warp's places: N sums, N sums of squares.
  __device__ __forceinline__ void store_sums(float* own, const float (&acc)[N / 2], int lane) const {
    #pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float x = inside[0] ? acc[i / 2 * 4 + i % 2] : 0, y = inside[1] ? acc[i / 2 * 4 + i % 2 + 2] : 0;
      float sum = x + y, square = x * x + y * y;
      #pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes); square += __shfl_xor_sync(~0u, square, lanes);
      }
      if (lane < 4) {
        const int c = i / 2 * 8 + lane * 2 + i % 2;
        own[c] = sum; own[N + c] = square;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)
convolve(const unsigned short* __restrict__ in, const unsigned short* __restrict__ second, const unsigned short* __restrict__ weights,
         void* __restrict__ out, float* __restrict__ sums, int sets, int planes, int depth, int height, int width, int tiles, int splits) {
  const Shape s = {sets, planes, depth, height, width, tiles, splits};
  extern __shared__ __align__(1024) char shared[];
  float* warp_sums = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES);             // WARPS x 2 N
  const uint32_t ring = shared_address(shared), full = shared_address(warp_sums + (SPLIT ? 0 : WARPS * 2 * N)), empty = full + 8 * STAGES;
  const int tid = threadIdx.x, group = __shfl_sync(~0u, tid / 128, 0), units = tiles * sets * BLOCKS_OF_N * splits;
  if (tid == 0) {
    for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, 129); barrier_init(empty + 8 * i, WARPS); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copy of weights arrives at them, too
  }
  __syncthreads();
  Ring next = {0, 0};
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGISTERS));
    const int id = tid % 128;
    Loader loader;
    for (int u = blockIdx.x; u < units; u += gridDim.x) {
      const Unit unit(s, u);
      loader.begin_unit(s, unit, id);
      const unsigned short* weight = weights + (size_t)unit.part * STEPS * (WEIGHT_BYTES / 2);
      const int end = unit.end(s);
      #pragma unroll 1
      for (int step = unit.begin(s); step < end; ++step, next.advance()) {
        const int channel = step / 9 * CHUNK;
        const unsigned short* from = SHARES == 1 || channel < SHARE ? in + channel : second + channel - SHARE;
        const uint32_t stage = ring + next.stage * STAGE_BYTES, bar = full + 8 * next.stage;
        barrier_wait(empty + 8 * next.stage, next.phase ^ 1);
        if (id == 0) load_weights(stage + VOXEL_BYTES, weight + (size_t)step * (WEIGHT_BYTES / 2), bar);
        loader.load(stage, from + unit.voxels(s) * SHARE, s, step % 9, id);
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
    const int lane = tid % 32, warp = tid / 32;
    float acc[N / 2];
    for (int u = blockIdx.x; u < units; u += gridDim.x) {
      const Unit unit(s, u);
      #pragma unroll
      for (int i = 0; i < N / 2; ++i) acc[i] = 0;
      const int begin = unit.begin(s), end = unit.end(s);
      uint32_t last = empty;  // of the stage before
      #pragma unroll 1
      for (int step = begin; step < end; ++step, next.advance()) {
        const uint32_t voxels = (ring + next.stage * STAGE_BYTES >> 4) + group * 64, weight = ring + next.stage * STAGE_BYTES + VOXEL_BYTES >> 4;
        barrier_wait(full + 8 * next.stage, next.phase);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // voxels were written by ordinary copies
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        #pragma unroll
        for (int column = 0; column < 3; ++column)
          #pragma unroll
          for (int k = 0; k < PIECES; k += 2)
            multiply(acc, descriptor(voxels + column + k * HELD, HELD), descriptor(weight + (column * PIECES + k) * N, N));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the products of the stage before
        if (lane == 0 && step > begin) barrier_arrive(last);
        last = empty + 8 * next.stage;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) barrier_arrive(last);
      const Output output(s, unit, warp * 16, lane);
      if (SPLIT) {
        output.store_products(reinterpret_cast<float*>(out) + (size_t)unit.split * s.sets * s.planes * s.height * s.width * WIDTH, acc, lane);
      } else {
        output.store(reinterpret_cast<unsigned short*>(out), acc, lane);
        output.store_sums(warp_sums + warp * 2 * N, acc, lane);
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
        for (int i = tid; i < 2 * N; i += 128 * GROUPS) {
          float total = 0;
          for (int w = 0; w < WARPS; ++w) total += warp_sums[w * 2 * N + i];
          sums[((size_t)(unit.set * s.tiles + unit.tile) * 2 + i / N) * WIDTH + unit.part * N + i % N] = total;
        }
        asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
      }
    }
  }
}
