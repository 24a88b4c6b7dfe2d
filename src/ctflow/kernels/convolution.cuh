// What convolution.cu and convolution_fp8.cu have in common: how a finished plane is stored.
//
// The constants (CIN, COUT, GROUPS, ...), multiply(), the matrix instruction, halves.cuh and pipeline.cuh come before this file.

constexpr int N = 3 * COUT, PARTS = COUT / 8, THIRD = COUT / 2;  // columns; of a depth: groups of 8, registers of a thread
constexpr int TILE_H = 8 * GROUPS, TILE_W = 8, WARPS = 4 * GROUPS, SHARE = CIN / SHARES;

struct Shape { int batch, depth, height, width, chunk; };

// A finished plane of a thread: two rows, in each of which it has two channels of every 8. Its sums stay in registers.
struct Output {
  void* out;
  const float *before, *factors;  // what is added; in shared memory, what each channel is multiplied with (SCALED)
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
    if (SCALED) {
      const float2 f = *reinterpret_cast<const float2*>(factors + part * 8 + lane % 4 * 2);
      x.x *= f.x; x.y *= f.y;
    }
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

  // The unit's sums, from those of the warps in shared memory: COUT sums, COUT sums of squares.
  __device__ void end_unit(float* of_warps, float* to, int tid) {
    end_unit_of_warp(of_warps + tid / 32 * 2 * COUT);
    asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
    for (int i = tid; i < 2 * COUT; i += 128 * GROUPS) {
      float total = 0;
      for (int w = 0; w < WARPS; ++w) total += of_warps[w * 2 * COUT + i];
      to[i / COUT * WIDTH + i % COUT] = total;
    }
    asm volatile("bar.sync 1, %0;" :: "n"(128 * GROUPS) : "memory");
  }

  __device__ __forceinline__ void end_unit_of_warp(float* own) {
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
