// Rounding to bf16 for processors without an instruction for it; the result stays a float32, which they multiply.
// GCC's and clang's vectors: plain C++ that becomes the instruction set of the file that includes this.
typedef uint32_t RoundingBits __attribute__((vector_size(V::kLanes * 4)));

inline RoundingBits round_bits(RoundingBits bits) {
  const RoundingBits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  // The carry would turn some NaN into infinity or zero.
  const RoundingBits is_nan = (RoundingBits)((bits & 0x7fffffffu) > 0x7f800000u);
  return (nearest & ~is_nan) | (((bits | 0x400000u) & 0xffff0000u) & is_nan);
}

void round_row(const float* x, int64_t k, void* rounded) {
  float* out = static_cast<float*>(rounded);
  const int64_t even = k + k % 2;
  for (int64_t i = 0; i < even; i += V::kLanes) {
    RoundingBits bits = {};
    __builtin_memcpy(&bits, x + i, 4 * smaller(V::kLanes, k - i));
    bits = round_bits(bits);
    __builtin_memcpy(out + i, &bits, 4 * smaller(V::kLanes, even - i));
  }
}
