// What every convolution needs of half-precision numbers: two of them in one register. BF16 chooses the kind.

using uint32_t = unsigned int;

constexpr float SLOPE = 0.01f;  // of the leaky ReLU

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
