// SPDX-License-Identifier: Apache-2.0
// Vectors of float32 numbers and their functions: in and out go registers. All files of this folder are compiled as one, in the
// order that library.py names; after this one comes micro_kernel.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__aarch64__)
constexpr int64_t kLanes = 4;
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 16;  // split up where registers are narrower
#endif
constexpr float kFloor = -75.0f;  // exp below this is near the denormal numbers, which are slow to make and to multiply

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#define INLINE inline __attribute__((always_inline))

INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

INLINE Floats some_floats(const float* from, int64_t count) {
  Floats value = {};
  std::memcpy(&value, from, sizeof(float) * (count < kLanes ? count : kLanes));
  return value;
}

// exp of x <= 0 to about one unit in the last place, 0 below kFloor, NaN for NaN.
// x = n log 2 + r with |r| <= log(2) / 2, and the polynomial is a minimax fit of exp there.
INLINE Floats exp_floor(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = x * 1.44269504088896341f + kMagic;
  const Floats n = shifted - kMagic;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)((Ints)(shifted + 127.0f) << 23);
  return x < kFloor ? Floats{} : p * power;
}

// tanh to about one unit in the last place, NaN for NaN: for small |x| a minimax fit, else (1 - e) / (1 + e) of e = exp(-2 |x|).
INLINE Floats tanh_of(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats z = x * x;
  Floats p = z * -5.60391545939e-3f + 2.05517208422e-2f;
  p = p * z - 5.37141078372e-2f;
  p = p * z + 1.33311528141e-1f;
  p = p * z - 3.33332720831e-1f;
  const Floats small = x + x * (z * p);
  const Floats e = exp_floor(size * -2.0f);
  const Floats large = (1.0f - e) / (1.0f + e);
  return size < 0.64f ? small : (x < 0.0f ? -large : large);
}

// The larger of two, NaN if either is.
INLINE Floats larger(Floats a, Floats b) { return a > b || a != a ? a : b; }

INLINE float sum_of(Floats values) {
  float lanes[kLanes];
  std::memcpy(lanes, &values, sizeof lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace
