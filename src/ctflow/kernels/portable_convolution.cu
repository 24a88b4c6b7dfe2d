// The convolution of convolution.cu, (B, D, H, W, CIN) -> (B, D, H, W, COUT), 3 x 3 x 3 or 3 x 1 x 1, with the matrix
// instructions of every GPU since compute capability 8.0 (mma.sync, ldmatrix, cp.async).
//
// A block computes tiles of 4 x 8 x 16 voxels, one after the other; a warp has one row of 16 voxels at all four depths. The input comes in chunks of 16 channels, each tile with its border of one voxel. While a
// chunk is multiplied with its weights, the next one is copied to shared memory, and then normalised there by the threads
// that copied it. For one place of the kernel in its plane, a warp reads six rows, one for each depth of the input, and multiplies
// them with the weights of three depths: 12 products of 16 voxels, for which it would otherwise read 12 rows.
// Weights come in the order in which threads hold them (weights_for_threads), PLACES places of the plane at a time.
//
// FLOP: 6 SIDE SIDE CIN COUT a voxel. Bytes: 2 CIN (2.1 times, for the border, mostly from the L2 cache) + 2 COUT a voxel, and all
// weights from the L2 cache for each tile.
//
// The input's channels lie in one tensor (FIRST = CIN) or in two, FIRST of them in the first.
//
// ctflow.kernels.portable_convolution puts the constants, halves.cuh and instructions.cuh before this file.

constexpr int WARPS = 8, TILE_D = 4, TILE_H = WARPS, TILE_W = 16, THREADS = 32 * WARPS, BORDER = SIDE / 2;
constexpr int ROWS = TILE_D + 2, HALO_H = TILE_H + 2 * BORDER, HALO_W = TILE_W + 2 * BORDER, HALO = ROWS * HALO_H * HALO_W;
constexpr int PITCH = HALO + (12 - HALO % 8) % 8;  // voxels from 8 channels to the next: 4 more than a multiple of 8
constexpr int CHUNKS = CIN / 16, PARTS = COUT / 8, STEPS = SIDE * SIDE / PLACES;
constexpr int HALO_BYTES = 2 * PITCH * 16, STEP_BYTES = PLACES * 3 * 16 * COUT * 2;
constexpr int ITEMS = (2 * HALO + THREADS - 1) / THREADS, LOADING = STEPS > 1 ? STEPS - 1 : 1, AT_ONCE = (ITEMS + LOADING - 1) / LOADING;

struct Shape { int batch, depth, height, width; };
struct Tile { int number, b, d, h, w; };  // of its first voxel

__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool all) {  // zeros if not all
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(all ? 16 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ Tile tile_of(Shape s, int number) {
  int across = (s.width + TILE_W - 1) / TILE_W, down = (s.height + TILE_H - 1) / TILE_H, deep = (s.depth + TILE_D - 1) / TILE_D;
  return {number, number / (across * down * deep), number / (across * down) % deep * TILE_D, number / across % down * TILE_H, number % across * TILE_W};
}

// What a thread copies of a chunk: ITEMS voxels, in each the same half of the 16 channels. Eight neighbouring threads write
// four voxels of both halves, which lie in different banks.
struct Loader {
  const unsigned short *in, *second;  // the tensors, at its half of the first 16 channels
  int tid;
  uint32_t inside;  // which of its voxels lie in the volume

  __device__ __forceinline__ uint32_t at(int k) const { return (tid % 2 * PITCH + tid / 2 + k * (THREADS / 2)) * 16; }

  __device__ __forceinline__ void copy(uint32_t stage, Shape s, Tile t, int chunk, int begin, int end) {
    const bool early = FIRST == CIN || chunk * 16 < FIRST;
    const unsigned short* from = early ? in + chunk * 16 : second + chunk * 16 - FIRST;
    const int channels = early ? FIRST : CIN - FIRST;
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      if (k < begin || k >= end) continue;
      int voxel = tid / 2 + k * (THREADS / 2);
      int d = t.d + voxel / (HALO_H * HALO_W) - 1, h = t.h + voxel / HALO_W % HALO_H - BORDER, w = t.w + voxel % HALO_W - BORDER;
      if (voxel >= HALO) continue;
      bool in_it = d >= 0 && d < s.depth && h >= 0 && h < s.height && w >= 0 && w < s.width;
      size_t place = in_it ? (size_t)(((t.b * s.depth + d) * s.height + h) * s.width + w) * channels : 0;
      copy_16(stage + at(k), from + place, in_it);
      if (NORMALIZED) inside = inside & ~(1u << k) | (uint32_t)in_it << k;
    }
  }

  // The norm and a leaky ReLU, in place, of what this thread has copied; what lies outside stays 0.
  __device__ __forceinline__ void normalize(char* stage, const float* norms, int b, int chunk) {
    const float4* of = reinterpret_cast<const float4*>(norms + (size_t)b * 2 * CIN + chunk * 16 + tid % 2 * 8);
    const float4 f = __ldg(of), g = __ldg(of + 1), t = __ldg(of + CIN / 4), u = __ldg(of + CIN / 4 + 1);
    #pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      if (!(inside >> k & 1) || tid / 2 + k * (THREADS / 2) >= HALO) continue;
      uint4* place = reinterpret_cast<uint4*>(stage + at(k));
      uint4 x = *place;
      x.x = rectified(x.x, f.x, t.x, f.y, t.y), x.y = rectified(x.y, f.z, t.z, f.w, t.w);
      x.z = rectified(x.z, g.x, u.x, g.y, u.y), x.w = rectified(x.w, g.z, u.z, g.w, u.w);
      *place = x;
    }
  }

  __device__ __forceinline__ static uint32_t rectified(uint32_t pair, float fx, float tx, float fy, float ty) {
    float2 x = unpacked(pair);
    x.x = x.x * fx + tx, x.y = x.y * fy + ty;
    return packed(fmaxf(x.x, SLOPE * x.x), fmaxf(x.y, SLOPE * x.y));
  }
};

__device__ __forceinline__ void copy_weights(uint32_t to, const char* weights, int chunk, int step, int tid) {
  const char* from = weights + (chunk * STEPS + step) * STEP_BYTES;
  for (int i = tid; i < STEP_BYTES / 16; i += THREADS) copy_16(to + i * 16, from + i * 16, true);
}

// The products of one step: `rows` is this lane's row at the first place, `weights` the step's weights for this lane.
__device__ __forceinline__ void multiply_step(float (&acc)[TILE_D][PARTS][4], uint32_t rows, const char* weights, int lane) {
  #pragma unroll
  for (int place = 0; place < PLACES; ++place) {
    uint32_t a[ROWS][4];
    #pragma unroll
    for (int z = 0; z < ROWS; ++z) load_rows(a[z], rows + (z * HALO_H * HALO_W + place) * 16);
    #pragma unroll
    for (int kd = 0; kd < 3; ++kd) {
      const char* from = weights + (place * 3 + kd) * PARTS * 256;
      uint32_t b[PARTS][2];
      #pragma unroll
      for (int j = 0; j < PARTS / 2; ++j) {
        uint4 two = *reinterpret_cast<const uint4*>(from + j * 512 + lane * 16);
        b[2 * j][0] = two.x, b[2 * j][1] = two.y, b[2 * j + 1][0] = two.z, b[2 * j + 1][1] = two.w;
      }
      if (PARTS % 2) {
        uint2 one = *reinterpret_cast<const uint2*>(from + (PARTS - 1) * 256 + lane * 8);
        b[PARTS - 1][0] = one.x, b[PARTS - 1][1] = one.y;
      }
      #pragma unroll
      for (int d = 0; d < TILE_D; ++d)
        #pragma unroll
        for (int j = 0; j < PARTS; ++j) multiply(acc[d][j], a[d + kd], b[j][0], b[j][1]);
    }
  }
}

// A finished tile of a warp: a thread has two voxels at each depth, in each two channels of every 8. The sums of the warp go to
// `own`: COUT sums, COUT sums of squares.
__device__ __forceinline__ void store_tile(const float (&acc)[TILE_D][PARTS][4], unsigned short* out, float* own, Shape s, Tile t, int warp, int lane) {
  float sums[2 * PARTS], squares[2 * PARTS];
  #pragma unroll
  for (int i = 0; i < 2 * PARTS; ++i) sums[i] = squares[i] = 0;
  const bool odd = lane & 1;
  #pragma unroll
  for (int d = 0; d < TILE_D; ++d)
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int w = t.w + lane / 4 + 8 * r, h = t.h + warp, z = t.d + d;
      const bool inside = w < s.width && h < s.height && z < s.depth;
      unsigned short* to = out + (size_t)(((t.b * s.depth + z) * s.height + h) * s.width + w) * COUT;
      uint32_t pairs[PARTS];
      #pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        float x = acc[d][j][2 * r], y = acc[d][j][2 * r + 1];
        pairs[j] = packed(x, y);
        if (!inside) continue;
        sums[2 * j] += x, sums[2 * j + 1] += y;
        squares[2 * j] += x * x, squares[2 * j + 1] += y * y;
      }
      // Two neighbouring threads exchange values, so that each stores four channels that lie side by side.
      #pragma unroll
      for (int j = 0; j + 1 < PARTS; j += 2) {
        uint32_t other = __shfl_xor_sync(~0u, odd ? pairs[j] : pairs[j + 1], 1);
        uint2 both = odd ? make_uint2(other, pairs[j + 1]) : make_uint2(pairs[j], other);
        if (inside) *reinterpret_cast<uint2*>(to + j * 8 + (odd ? 8 + lane % 4 * 2 - 2 : lane % 4 * 2)) = both;
      }
      if (PARTS % 2 && inside) *reinterpret_cast<uint32_t*>(to + (PARTS - 1) * 8 + lane % 4 * 2) = pairs[PARTS - 1];
    }
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

// The sums of a tile, of all warps in their order: the same bits each time.
__device__ __forceinline__ void store_sums(const float* sums, float* tile_sums, Tile t, int tid) {
  for (int i = tid; i < 2 * COUT; i += THREADS) {
    float total = 0;
    for (int w = 0; w < WARPS; ++w) total += sums[w * 2 * COUT + i];
    tile_sums[(size_t)t.number * 2 * COUT + i] = total;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
convolve(const unsigned short* __restrict__ in, const unsigned short* __restrict__ second, const char* __restrict__ weights, const float* __restrict__ norms,
         unsigned short* __restrict__ out, float* __restrict__ tile_sums, int batch, int depth, int height, int width, int tiles) {
  const Shape s = {batch, depth, height, width};
  extern __shared__ __align__(128) char shared[];  // two chunks, the weights of two steps, sums of warps
  char* const kept = shared + 2 * HALO_BYTES;
  float* const sums = reinterpret_cast<float*>(kept + 2 * STEP_BYTES);
  const uint32_t chunks = shared_address(shared), steps = shared_address(kept);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const uint32_t row = (warp * HALO_W + lane % 16 + lane / 16 * PITCH) * 16;
  Loader loader = {in + tid % 2 * 8, second + tid % 2 * 8, tid, 0};
  int stage = 0, slot = 0;
  Tile tile = tile_of(s, blockIdx.x), last = tile;
  loader.copy(chunks, s, tile, 0, 0, ITEMS);
  copy_weights(steps, weights, 0, 0, tid);
  wait_for_copies();
  if (NORMALIZED) loader.normalize(shared, norms, tile.b, 0);
  bool finished = false;  // whether the sums of a tile wait to be stored
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const bool more = number + gridDim.x < tiles;
    const Tile following = tile_of(s, more ? number + gridDim.x : number);
    float acc[TILE_D][PARTS][4];
    #pragma unroll
    for (int i = 0; i < TILE_D * PARTS * 4; ++i) acc[i / (PARTS * 4)][i / 4 % PARTS][i % 4] = 0;
    #pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const bool ends = chunk + 1 == CHUNKS, any = !ends || more;
      const Tile next = ends ? following : tile;
      const int next_chunk = ends ? 0 : chunk + 1;
      #pragma unroll 1
      for (int step = 0; step < STEPS; ++step) {
        wait_for_copies();
        __syncthreads();  // what was copied and normalised is seen, and what is overwritten now was read
        if (finished) {
          store_sums(sums, tile_sums, last, tid);
          finished = false;
          if (CHUNKS * STEPS == 1) __syncthreads();  // else another barrier comes before the next sums
        }
        if (step + 1 < STEPS) copy_weights(steps + (slot ^ 1) * STEP_BYTES, weights, chunk, step + 1, tid);
        else if (any) copy_weights(steps + (slot ^ 1) * STEP_BYTES, weights, next_chunk, 0, tid);
        if (any && (STEPS == 1 || step < LOADING)) loader.copy(chunks + (stage ^ 1) * HALO_BYTES, s, next, next_chunk, step * AT_ONCE, (step + 1) * AT_ONCE);
        const bool normalizes = NORMALIZED && any && step + 1 == STEPS;
        if (normalizes && STEPS > 1 && warp >= WARPS / 2) loader.normalize(shared + (stage ^ 1) * HALO_BYTES, norms, next.b, next_chunk);
        const int place = step * PLACES;
        multiply_step(acc, chunks + stage * HALO_BYTES + row + (place / SIDE * HALO_W + place % SIDE) * 16, kept + slot * STEP_BYTES, lane);
        if (STEPS == 1) wait_for_copies();
        // Half of the warps multiply first, so that the matrix units have work while others normalise.
        if (normalizes && (STEPS == 1 || warp < WARPS / 2)) loader.normalize(shared + (stage ^ 1) * HALO_BYTES, norms, next.b, next_chunk);
        slot ^= 1;
      }
      stage ^= 1;
    }
    store_tile(acc, out, sums + warp * 2 * COUT, s, tile, warp, lane);
    last = tile, finished = true, tile = following;
  }
  __syncthreads();
  if (finished) store_sums(sums, tile_sums, last, tid);
}
