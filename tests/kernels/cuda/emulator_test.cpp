// What the emulator promises: results as on a card, and errors where a card hangs or gives something by chance.
#include "intrinsics.h"

#include <cstdio>

namespace phi3 {

PHI3_KERNEL(64, sums, const float* x, float* out, int n) {
  PHI3_SHARED(float, parts, [2]);
  PHI3_DYNAMIC_SHARED(bytes);
  float* const copies = reinterpret_cast<float*>(bytes);
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += 64) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  if (threadIdx.x < 16) copy16_async(copies + 4 * threadIdx.x, x + 4 * threadIdx.x, threadIdx.x != 3);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out + blockIdx.x, parts[0] + parts[1]);
  if (blockIdx.x == 0) out[2 + threadIdx.x] = copies[63 - threadIdx.x];
}

// c[16, 8] = a[16, 16] . b[8, 16]^T, by ldmatrix from shared memory; c2 the same with b given as [16, 8].
PHI3_KERNEL(32, product, const unsigned short* a, const unsigned short* b, float* c) {
  PHI3_SHARED(unsigned short, tile, [16][16]);
  PHI3_SHARED(unsigned short, other, [8][16]);
  PHI3_SHARED(unsigned short, turned, [16][8]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) other[i / 16][i % 16] = turned[i % 16][i / 16] = b[i];
  warp_barrier();
  unsigned x[4], y[4], z[4];
  load_matrices(x, &tile[lane % 16][lane / 16 * 8]);
  load_matrices(y, &other[lane % 8][lane / 8 % 2 * 8]);
  load_matrices_transposed(z, &turned[lane % 16][0]);
  for (int i = 0; i < 2; ++i) {
    float sums[4] = {};
    multiply_add(sums, x, i ? z[0] : y[0], i ? z[1] : y[1]);
    for (int j = 0; j < 4; ++j) c[i * 128 + (lane / 4 + j / 2 * 8) * 8 + lane % 4 * 2 + j % 2] = sums[j];
  }
}

PHI3_KERNEL(64, ended_early, int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[0] = 1;
}
PHI3_KERNEL(32, two_places, int* out) {
  if (threadIdx.x < 16)
    out[0] = shuffle(1, 0);
  else
    out[1] = shuffle(2, 0);
}
PHI3_KERNEL(64, warp_and_block, int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    warp_barrier();
  out[0] = 1;
}
PHI3_KERNEL(32, unaligned, const float* x, float* out) { out[threadIdx.x] = __uint_as_float(load16(x + 1).x); }
PHI3_KERNEL(32, uninitialised, float* out) {
  PHI3_SHARED(float, values, [32]);
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}
PHI3_KERNEL(32, not_waited_for, const float* x, float* out) {
  PHI3_SHARED(float, values, [128]);
  copy16_async(values + 4 * threadIdx.x, x + 4 * threadIdx.x);
  commit_copies();
  wait_copies<1>();
  warp_barrier();
  out[threadIdx.x] = values[threadIdx.x];
}
PHI3_KERNEL(64, no_barrier, float* out) {  // either direction shows in one of two blocks
  PHI3_SHARED(float, values, [64]);
  values[threadIdx.x] = 1;
  out[blockIdx.x * 64 + threadIdx.x] = values[threadIdx.x ^ 1];
}
PHI3_KERNEL(32, beyond, float* out) { out[threadIdx.x + 1] = 0; }
PHI3_KERNEL(64, votes, int* out) {
  const bool some = block_any(threadIdx.x == 40), none = block_any(threadIdx.x == 64);
  out[threadIdx.x] = (some ? 1 : 0) + (none ? 2 : 0) + (ballot(threadIdx.x % 2) == 0xaaaaaaaau ? 4 : 0);
}

}  // namespace phi3

namespace {

int failures = 0;
void check(bool ok, const char* what) {
  if (ok) return;
  std::printf("failed: %s\n", what);
  ++failures;
}
template <class... A>
std::string launched(const char* name, unsigned blocks, unsigned threads, size_t bytes, A... arguments) {
  void* pointers[] = {&arguments...};
  try {
    phi3::emulated::launch(name, {blocks}, {threads}, bytes, pointers);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}
bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

int main(int argc, char**) {
  std::vector<float> x(256), out(128);
  std::vector<int> ints(64);
  for (int i = 0; i < 256; ++i) x[i] = i % 17 - 5;
  check(launched("sums", 2, 64, 256, x.data(), out.data(), 100).empty(), "sums runs");
  for (int b = 0; b < 2; ++b) {
    float sum = 0;
    for (int i = 0; i < 100; ++i) sum += x[b * 100 + i];
    check(out[b] == sum, "sums");
  }
  for (int i = 0; i < 64; ++i) check(out[2 + i] == ((63 - i) / 4 == 3 ? 0 : x[63 - i]), "copies");

  std::vector<unsigned short> a(256), b(128);
  std::vector<float> c(256);
  for (int i = 0; i < 256; ++i) a[i] = phi3::to_bf16(i * 7 % 31 - 15).bits;
  for (int i = 0; i < 128; ++i) b[i] = phi3::to_bf16(i * 5 % 23 - 11).bits;
  check(launched("product", 1, 32, 0, a.data(), b.data(), c.data()).empty(), "product runs");
  for (int i = 0; i < 256; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += phi3::to_float(phi3::bf16{a[i % 128 / 8 * 16 + k]}) * phi3::to_float(phi3::bf16{b[i % 8 * 16 + k]});
    check(c[i] == sum, i < 128 ? "product" : "product, transposed");
  }
  check(launched("votes", 1, 64, 0, ints.data()).empty(), "votes run");
  for (int vote : ints) check(vote == 5, "votes");

  check(contains(launched("ended_early", 1, 64, 0, ints.data()), "has ended"), "a thread that has ended");
  check(contains(launched("two_places", 1, 32, 0, ints.data()), "divergent"), "a warp in two places");
  check(contains(launched("warp_and_block", 1, 64, 0, ints.data()), "divergent"), "a warp and a block");
  check(contains(launched("unaligned", 1, 32, 0, x.data(), out.data()), "multiple of 16"), "alignment");
  check(contains(launched("sums", 1, 128, 0, x.data(), out.data(), 1), "128 threads"), "too large a block");
  check(launched("uninitialised", 2, 32, 0, out.data()).empty() && std::isnan(out[5]), "uninitialised memory");
  check(launched("not_waited_for", 1, 32, 0, x.data(), out.data()).empty() && std::isnan(out[5]), "no wait");
  check(launched("no_barrier", 2, 64, 0, out.data()).empty(), "no_barrier runs");
  check(std::isnan(out[0]) && std::isnan(out[65]), "no barrier");

  for (unsigned i = 0; i < 65536; ++i) {
    const phi3::half h{static_cast<unsigned short>(i)};
    if ((i & 0x7fff) <= 0x7c00) check(phi3::to_half(phi3::to_float(h)).bits == i, "half");
  }
  check(phi3::to_half(2049).bits == phi3::to_half(2048).bits && phi3::to_half(2051).bits == 0x6802, "half rounds");
  check(phi3::to_float(phi3::to_bf16(257)) == 256 && phi3::to_float(phi3::to_bf16(259)) == 260, "bfloat16 rounds");
  if (argc > 1) launched("beyond", 1, 32, 0, std::vector<float>(32).data());
  if (!failures) std::printf("ok\n");
  return failures != 0;
}
