// Between the warp groups that load and those that multiply: barriers, and the ring of STAGES.

using uint64_t = unsigned long long;

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

// The ring of stages in shared memory: which comes next, and in which phase its barriers are.
struct Ring {
  int stage, phase;
  __device__ void advance() { if (++stage == STAGES) { stage = 0; phase ^= 1; } }
};
