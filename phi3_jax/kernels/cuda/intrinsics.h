// What the kernels use of the hardware. NVRTC finds no headers of CUDA's, so instructions without a name of its own are
// written out here; with PHI3_EMULATED the tests' emulator.h does the same on a CPU.
//
// All 32 threads of a warp have to call a function that says "warp" together, in the same place.
#pragma once

namespace phi3 {
typedef signed char int8;
typedef long long int64;
struct bf16 {
  unsigned short bits;
};
struct half {
  unsigned short bits;
};
}  // namespace phi3

#define PHI3_DEVICE __device__ __forceinline__
// Begins a kernel, which the host finds by its name: PHI3_KERNEL(threads of a block at most, name, parameters) { ... }
// Its shared memory is declared with PHI3_SHARED(type, name, [n][m]), and PHI3_DYNAMIC_SHARED(name) for the bytes that the
// launch asks for. Neither is initialised.
#if defined(PHI3_EMULATED)
#include "emulator.h"
#else
// One block may fill a multiprocessor: or else the assembler stores registers in memory for the sake of a second one.
#define PHI3_KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define PHI3_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define PHI3_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace phi3 {

#if !defined(PHI3_EMULATED)
template <class T>
PHI3_DEVICE T shuffle(T value, int lane) {  // warp: the value of that lane
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
PHI3_DEVICE T shuffle_xor(T value, int mask) {  // warp: the value of lane ^ mask
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
PHI3_DEVICE unsigned ballot(bool is) {  // warp: bit i is lane i's
  return __ballot_sync(0xffffffffu, is);
}
PHI3_DEVICE void warp_barrier() { __syncwarp(); }
PHI3_DEVICE bool block_any(bool is) { return __syncthreads_or(is); }  // a barrier, too

// 2^x with a relative error of about 2^-22; 0 below -126, also for -inf.
PHI3_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PHI3_DEVICE float to_float(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
PHI3_DEVICE half to_half(float x) {
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
PHI3_DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
PHI3_DEVICE unsigned pack_bf16(float low, float high) {  // two neighbours in memory
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Addresses are multiples of 4, 8 or 16.
PHI3_DEVICE unsigned load4(const void* p) { return *static_cast<const unsigned*>(p); }
PHI3_DEVICE uint2 load8(const void* p) { return *static_cast<const uint2*>(p); }
PHI3_DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
PHI3_DEVICE void store16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }
// From global memory that nothing writes during the kernel, and that is read once.
PHI3_DEVICE uint4 load16_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

PHI3_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// Copies 16 bytes from global to shared memory, or zeros if not `valid` (nothing is read then). They are there for the
// thread that asked after wait_copies, for others after a barrier behind it.
PHI3_DEVICE void copy16_async(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
PHI3_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest>
PHI3_DEVICE void wait_copies() {  // for all committed groups but the newest ones
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// warp: four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8 i + j gives the address of row j (16 bytes) of
// matrix i; r[i] of lane l holds columns 2 (l % 4) and one more of row l / 4, or, transposed, these rows of that column.
PHI3_DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PHI3_DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// warp: c += a . b with a [16, 16] and b [16, 8] in bfloat16, c in float32. With g = lane / 4 and t = 2 (lane % 4):
//   a: rows g, g + 8, g, g + 8 at columns t, t, t + 8, t + 8 (and the next); b: rows t, t + 8 (and the next) of column g
//   c: row g at columns t and t + 1, then row g + 8
PHI3_DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

PHI3_DEVICE float to_float(float x) { return x; }
PHI3_DEVICE float to_float(int8 x) { return x; }
PHI3_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
PHI3_DEVICE float low_float(unsigned pair) { return __uint_as_float(pair << 16); }           // of two bfloat16
PHI3_DEVICE float high_float(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }  // the other

template <int lanes = 32>
PHI3_DEVICE float warp_sum(float x) {  // over `lanes` neighbours; each of them gets it
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int lanes = 32>
PHI3_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace phi3
