// Attention within windows, (images, N, 3, HEADS, WIDTH) queries, keys and values -> (images, N, HEADS, WIDTH), with the
// matrix instructions of every GPU since compute capability 8.0 (mma.sync, ldmatrix, cp.async).
//
// A block belongs to one head and PART tiles of 16 queries. It holds their bias in shared memory, in the order in which threads
// multiply it (bias_for_threads), and walks over windows. One warp copies queries, keys and values of the next windows to a
// ring of STAGES; each of the others takes a tile of queries of a window at a time, whichever comes next.
//
// Scores of 16 keys after the other become weights at once and are multiplied with the values. Other units have more to do
// than the matrix units, so these do all they can: scores start as minus what is subtracted from all, to which products add the
// bias (the identity times it), queries times keys, and in windows of several regions MASKED (one-hot rows of queries times
// rows of keys that are zero at their own region). One more product, with ones, sums the weights.
// Scores are logarithms to base 2: queries, bias and MASKED come multiplied by log2(e).
//
// 4 N N WIDTH FLOP and N N exponentials a head and window; the unit of the exponentials is busy for two thirds of the time.
//
// ctflow.kernels.attention puts the constants, halves.cuh, instructions.cuh and pipeline.cuh before this file.

constexpr int THREADS = 32 * (WARPS + 1), KEYS = (N + 15) / 16, ROWS = 16 * KEYS, C = HEADS * WIDTH;
constexpr int PARTS = (KEYS + PART - 1) / PART;
constexpr float LEAST = -3e38f, MOST = 1e30f;
constexpr int SAMPLES = KEYS < 2 ? KEYS : 2;  // tiles of keys from which a first largest score is taken
constexpr int UNIT = WIDTH % 8 ? 8 : 16, UNITS = 2 * WIDTH / UNIT;  // bytes of a copy, copies of a row
constexpr int BIAS_BYTES = PART * KEYS * 512, ROW_BYTES = 32, MASK_BYTES = 16;
constexpr int KEY_BYTES = ROWS * ROW_BYTES, QUERY_BYTES = PART * 16 * ROW_BYTES;
constexpr int STAGE_BYTES = 2 * KEY_BYTES + QUERY_BYTES + (MASKS ? ROWS * MASK_BYTES : 0);

__device__ __forceinline__ void copy(uint32_t to, const void* from) {
  if (UNIT == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
// Whether a phase ended, the same for all lanes of a warp: each asks for itself, and one may see it sooner.
__device__ __forceinline__ bool finished(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return __all_sync(~0u, done);
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
// How many windows were copied: the copying warp says so, and the others wait for it.
__device__ __forceinline__ void publish(uint32_t place, int windows, int lane) {
  __syncwarp();
  if (lane == 0) asm volatile("st.release.cta.shared.u32 [%0], %1;" :: "r"(place), "r"(windows) : "memory");
}
__device__ __forceinline__ void wait_for_window(uint32_t place, int window) {
  int windows;
  do asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(windows) : "r"(place) : "memory");
  while (windows <= window);
  __syncwarp();
}
__device__ __forceinline__ void load_columns(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_two_rows(uint32_t (&a)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(address) : "memory");
}
#if BF16
#define KIND "bf16.bf16"
#else
#define KIND "f16.f16"
#endif
__device__ __forceinline__ void multiply_half(float (&acc)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32." KIND ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
// Adds 16 x 8 of the bias, which is float16 whatever queries and keys are: the identity times it.
__device__ __forceinline__ void add_bias(float (&acc)[4], const uint32_t (&identity)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(identity[0]), "r"(identity[1]), "r"(identity[2]), "r"(identity[3]), "r"(b0), "r"(b1));
}

// Where 16 bytes of a row of 32 lie: the halves of every other four rows are exchanged, so that eight rows are in different banks.
__device__ __forceinline__ uint32_t place(int row, int half) { return row * ROW_BYTES + ((half ^ row >> 2) & 1) * 16; }

// Queries (of this block), keys and values of one window.
__device__ __forceinline__ void copy_window(uint32_t stage, const unsigned short* qkv, const unsigned short* masks, int first, int queries, bool masked, int lane) {
  #pragma unroll 4
  for (int i = lane; i < N * UNITS; i += 32) {
    const int row = i / UNITS, unit = i % UNITS;
    const unsigned short* from = qkv + row * 3 * C + unit * (UNIT / 2);
    const uint32_t to = stage + (UNIT == 16 ? place(row, unit) : place(row, unit >> 1) + unit % 2 * 8);
    copy(to, from + C);
    copy(to + KEY_BYTES, from + 2 * C);
    const int own = row - first;
    if (own >= 0 && own < queries) {
      const uint32_t there = stage + 2 * KEY_BYTES;
      copy(there + (UNIT == 16 ? place(own, unit) : place(own, unit >> 1) + unit % 2 * 8), from);
    }
  }
  if (MASKS && masked)
    for (int row = lane; row < N; row += 32) copy_16(stage + 2 * KEY_BYTES + QUERY_BYTES + row * MASK_BYTES, masks + row * 8);
}

// What a warp needs for a tile of queries: where its rows lie in shared memory, and operands.
struct Operands {
  const uint4* bias;
  uint32_t keys, values, masks;
  uint32_t q[4], own[2], identity[4];
};

// Scores of 16 keys less `top` of rows lane / 4 and 8 further.
template <bool MASKED>
__device__ __forceinline__ void score(float (&x)[2][4], const Operands& given, const float (&top)[2], int tile) {
  uint32_t k[4], m[2];
  const uint4 b = given.bias[tile * 32];
  load_rows(k, given.keys + tile * 16 * ROW_BYTES);
  if (MASKED) load_two_rows(m, given.masks + tile * 16 * MASK_BYTES);
  #pragma unroll
  for (int h = 0; h < 2; ++h) {
    x[h][0] = x[h][1] = -top[0], x[h][2] = x[h][3] = -top[1];
    if (h) add_bias(x[h], given.identity, b.z, b.w);
    else add_bias(x[h], given.identity, b.x, b.y);
    multiply(x[h], given.q, k[2 * h], k[2 * h + 1]);
    if (MASKED) multiply_half(x[h], given.own, m[h]);
  }
}

// Largest scores of two rows among some tiles of keys.
template <bool MASKED>
__device__ __forceinline__ void find_top(float (&top)[2], const Operands& given, int tile, int tiles, int step) {
  const float nothing[2] = {0, 0};
  top[0] = top[1] = LEAST;
  #pragma unroll 4
  for (int i = 0; i < tiles; ++i) {
    float x[2][4];
    score<MASKED>(x, given, nothing, tile);
    #pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(fmaxf(x[0][2 * r], x[0][2 * r + 1]), fmaxf(x[1][2 * r], x[1][2 * r + 1])));
    tile += step;
    if (tile >= KEYS) tile -= KEYS;
  }
  #pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
    #pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], lanes));
}

// Weighted values, and in acc[2] the weights' sums. Subtracted is the largest score among a few keys, the query itself
// among them: it keeps weights in the range of their type unless another score is larger by 16 (float16) or 127. Then sums are
// infinite, and all is done again with the largest score of all keys.
template <bool MASKED>
__device__ __forceinline__ void attend_keys(float (&acc)[3][4], const Operands& given, int own_tile) {
  const uint32_t ones = BF16 ? 0x3F803F80u : 0x3C003C00u;
  for (int again = 0; again < 2; ++again) {
    float top[2];
    find_top<MASKED>(top, given, own_tile, again ? KEYS : SAMPLES, again ? 1 : KEYS / SAMPLES);
    #pragma unroll
    for (int i = 0; i < 12; ++i) acc[i / 4][i % 4] = 0;
    #pragma unroll UNROLL
    for (int tile = 0; tile < KEYS; ++tile) {
      float x[2][4];
      score<MASKED>(x, given, top, tile);
      uint32_t p[4], v[4];
      #pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = packed(power_of_two(x[i / 2][i % 2 * 2]), power_of_two(x[i / 2][i % 2 * 2 + 1]));
      load_columns(v, given.values + tile * 16 * ROW_BYTES);
      multiply(acc[0], p, v[0], v[1]);
      multiply(acc[1], p, v[2], v[3]);
      multiply(acc[2], p, ones, ones);
    }
    if (!__any_sync(~0u, !(acc[2][0] < MOST && acc[2][2] < MOST))) break;
  }
}

// (row, two columns) of a task's result.
__device__ __forceinline__ void store(unsigned short* out, const float (&acc)[3][4], int first, int lane) {
  #pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + lane / 4 + 8 * r;
    float scale;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(scale) : "f"(acc[2][2 * r]));
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = h * 8 + lane % 4 * 2;
      if (row < N && column < WIDTH)
        *reinterpret_cast<uint32_t*>(out + (size_t)row * C + column) = packed(acc[h][2 * r] * scale, acc[h][2 * r + 1] * scale);
    }
  }
}

// A tile of queries of a window, the block's tile `number`; `first` is its first query.
__device__ __forceinline__ void attend_tile(unsigned short* out, const uint4* bias, uint32_t identity, uint32_t stage, int number, int first, bool masked, uint32_t empty, int lane) {
  const int row = lane % 16;
  const uint32_t column = place(row, lane / 16), queries = stage + 2 * KEY_BYTES, masks = queries + QUERY_BYTES;
  Operands given = {bias + number * KEYS * 32 + lane, stage + place(lane % 8 + lane / 16 * 8, lane / 8 % 2), stage + KEY_BYTES + column, masks + row * MASK_BYTES};
  load_rows(given.q, queries + number * 16 * ROW_BYTES + column);
  load_rows(given.identity, identity + column);
  float acc[3][4];
  if (MASKS && masked) {
    load_two_rows(given.own, given.masks + first * MASK_BYTES);
    #pragma unroll
    for (int i = 0; i < 2; ++i) given.own[i] = (~given.own[i] >> 15 & 0x00010001u) * (BF16 ? 0x3F80u : 0x3C00u);  // 1 where it is not negative
    attend_keys<true>(acc, given, first / 16);
  } else attend_keys<false>(acc, given, first / 16);
  __syncwarp();
  if (lane == 0) barrier_arrive(empty);  // the window was read
  store(out, acc, first, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_windows(const unsigned short* __restrict__ qkv, const uint4* __restrict__ bias, const unsigned short* __restrict__ masks,
               unsigned short* __restrict__ out, int images, int windows, int masked_from, int sharing, int sharing_last) {
  extern __shared__ __align__(128) char shared[];  // bias, stages, the identity, barriers, and what the warps tell each other
  unsigned short* const identity = reinterpret_cast<unsigned short*>(shared + BIAS_BYTES + STAGES * STAGE_BYTES);
  uint32_t* const next_task = reinterpret_cast<uint32_t*>(shared + BIAS_BYTES + STAGES * (STAGE_BYTES + 8) + 512);
  const uint32_t stages = shared_address(shared) + BIAS_BYTES, one = stages + STAGES * STAGE_BYTES, empty = one + 512, copied = shared_address(next_task + 1);
  uint32_t* const several = next_task + 2;  // of each stage, whether its window has several regions
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  // Of each head, `sharing` blocks have each part of the queries, `sharing_last` the last one, which may be smaller.
  const int of_head = (PARTS - 1) * sharing + sharing_last, head = blockIdx.x / of_head, number = blockIdx.x % of_head;
  const int part = min(number / sharing, PARTS - 1), share = number - part * sharing, shares = part == PARTS - 1 ? sharing_last : sharing;
  const int tiles = min(PART, KEYS - part * PART), first = part * PART * 16;
  for (int i = tid; i < BIAS_BYTES / 16; i += THREADS) copy_16(stages - BIAS_BYTES + i * 16, bias + (size_t)(head * PARTS + part) * (BIAS_BYTES / 16) + i);
  for (int i = tid; i < STAGES * STAGE_BYTES / 16; i += THREADS) reinterpret_cast<uint4*>(shared + BIAS_BYTES)[i] = make_uint4(0, 0, 0, 0);
  if (tid == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(empty + i * 8, PART);
    next_task[0] = WARPS, next_task[1] = 0;
  }
  // The identity lies in memory: were its numbers computed in registers, the compiler would make them anew for each product.
  for (int i = tid; i < 256; i += THREADS) identity[place(i / 16, i % 16 / 8) / 2 + i % 8] = i / 16 == i % 16 ? 0x3C00 : 0;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  if (warp == WARPS) {
    int k = 0;
    for (int image = share; image < images; ++k, image += shares) {
      const int stage = k % STAGES, window = image % windows;
      if (k >= STAGES && !finished(empty + stage * 8, k / STAGES - 1 & 1)) {
        wait_for_copies<0>();
        publish(copied, k, lane);
        while (!finished(empty + stage * 8, k / STAGES - 1 & 1));
      }
      copy_window(stages + stage * STAGE_BYTES, qkv + (size_t)image * N * 3 * C + head * WIDTH, masks + (size_t)(window - masked_from) * N * 8, first, tiles * 16, window >= masked_from, lane);
      if (MASKS && lane == 0) several[stage] = window >= masked_from;
      commit_copies();
      wait_for_copies<1>();
      publish(copied, k, lane);
    }
    wait_for_copies<0>();
    publish(copied, k, lane);
    return;
  }
  // Of a part with fewer tiles than PART the last tasks are empty.
  const int all = share < images ? ((images - 1 - share) / shares + 1) * PART : 0;
  for (int task = warp; task < all;) {
    uint32_t next = 0;
    if (lane == 0) next = atomicAdd(next_task, 1u);
    const int k = task / PART, tile = task % PART, stage = k % STAGES;
    wait_for_window(copied, k);
    if (tile < tiles) attend_tile(out + (size_t)(share + k * shares) * N * C + head * WIDTH, reinterpret_cast<const uint4*>(shared), one, stages + stage * STAGE_BYTES, tile, first + tile * 16, MASKS && several[stage], empty + stage * 8, lane);
    else if (lane == 0) barrier_arrive(empty + stage * 8);
    task = __shfl_sync(~0u, next, 0);
  }
}
