// SPDX-License-Identifier: Apache-2.0
// The processor's rate of multiply-adds, for peak.py: compiled behind the files of the CPU kernel, whose vectors and instructions
// it takes. Nothing is loaded or stored but the sums, in the same number of registers as the micro-kernel's.

extern "C" {

// `count` times all sums of each thread; how many operations these were, a multiply-add being two.
double cce_multiply_add(int64_t threads, int64_t count, float* memory) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) {
    float* const own = memory + t * kLanes;
    Floats sums[2 * kRows];
    const Floats right = load(own);
    const float word = own[0];
#pragma GCC unroll 32
    for (int i = 0; i < 2 * kRows; ++i) sums[i] = right + float(i);  // equal sums would be one to a compiler
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 32
      for (int i = 0; i < 2 * kRows; ++i) sums[i] = multiply_add(sums[i], right, word);
#pragma GCC unroll 32
    for (int i = 1; i < 2 * kRows; ++i) sums[0] += sums[i];
    store(own, sums[0]);
  }
  return 2.0 * 2 * kRows * kLanes * kPack * double(threads) * double(count);
}

}  // extern "C"
