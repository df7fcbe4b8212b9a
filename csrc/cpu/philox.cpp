// Random numbers by counting on the CPU. See pywm/ops/philox.py.
//
// What: fills [T, N, slots] with uniform or normal numbers.
// Layout: contiguous, a row (t, n) after the other.
// Mapping: threads share the rows; the words of kBlocks counters, four slots each, are made together, for the vector
//   units.
// Cost: 10 rounds of two 32-bit multiplications for four numbers; a pair of normal ones takes a logarithm, a root, a
//   sine and a cosine besides. Writes every number once.
// Numerics: ../math/philox.h. A number depends on the seed and its own counter alone: the same words on every backend,
//   uniforms equal to the bit, normals to rounding.
// Source: Salmon et al. (2011); normal numbers: Box and Muller (1958).

#include "../math/philox.h"

#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kBlocks = 64;  // counters whose words are made together, for the vector units

template <typename S>
void convert(const uint32_t (&words)[4][kBlocks], S (&numbers)[4][kBlocks], bool normal) {
  if (!normal) {
    for (int w = 0; w < 4; ++w)
#pragma GCC ivdep
      for (int64_t i = 0; i < kBlocks; ++i) numbers[w][i] = math::uniform_of<S>(words[w][i]);
    return;
  }
  for (int w = 0; w < 4; w += 2)
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlocks; ++i) {
      const auto pair = math::normals_of<S>(words[w][i], words[w + 1][i]);
      numbers[w][i] = pair.first;
      numbers[w + 1][i] = pair.second;
    }
}

// Rows (t, n) of the output.
template <typename S>
void philox(const PhiloxArgs<S>& a, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[4][kBlocks];
  alignas(64) S numbers[4][kBlocks];
  const int64_t per_row = (a.slots + 3) / 4, total = (end - begin) * per_row;
  uint32_t row[kBlocks], step[kBlocks], part[kBlocks];
  const uint32_t stream = static_cast<uint32_t>(a.stream);
  int64_t t = begin / a.N, n = begin % a.N, block = 0;
  S* out = a.out + begin * a.slots;
  for (int64_t done = 0; done < total; done += kBlocks) {
    const int64_t count = total - done < kBlocks ? total - done : kBlocks;
    for (int64_t i = 0; i < kBlocks; ++i) {  // past the end, numbers that nobody reads
      row[i] = static_cast<uint32_t>(n);
      step[i] = static_cast<uint32_t>(a.offset + t);
      part[i] = static_cast<uint32_t>(block);
      if (++block < per_row) continue;
      block = 0;
      if (++n < a.N) continue;
      n = 0;
      ++t;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlocks; ++i) {
      const math::PhiloxBlock made = math::philox(row[i], step[i], stream, part[i], a.seed);
      words[0][i] = made.word[0];
      words[1][i] = made.word[1];
      words[2][i] = made.word[2];
      words[3][i] = made.word[3];
    }
    convert(words, numbers, a.normal);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = 4 * static_cast<int64_t>(part[i]);
      const int64_t here = a.slots - first < 4 ? a.slots - first : 4;
      for (int64_t w = 0; w < here; ++w) *out++ = numbers[w][i];
    }
  }
}

}  // namespace

void fill_philox(Kernels& table) {
  table.f32.philox = philox<float>;
  table.f64.philox = philox<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
