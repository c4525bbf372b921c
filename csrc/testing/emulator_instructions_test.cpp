// The emulator against what PTX says of the instructions that compute: mma, ldmatrix, shuffles, conversions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "testing/emulator_kernel.h"
#include "testing/half.h"

namespace {

using namespace fastattn::cuda;
using namespace fastattn::testing;

// Matrices A [16, K], B [K, 8] and C [16, 8] of one warp, as PTX spreads them over its registers.
template <class Element, int K, class Mma>
void check_mma(const char* what, Mma mma, bool has_specials) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 4; ++round) {
    std::vector<Element> a(16 * K), b(K * 8);
    std::vector<float> c(16 * 8), got(16 * 8);
    const auto fill = [&](std::vector<Element>& elements) {
      for (Element& x : elements) {
        if constexpr (sizeof(Element) == 4) {
          x = bits_float(float_bits(normal(random)) & ~0x1fffu);
        } else {
          from_float(normal(random) * (round == 1 ? 1e-5f : 1.0f), &x);  // subnormal as float16
        }
      }
    };
    fill(a);
    fill(b);
    for (float& x : c) x = normal(random);
    if (has_specials && round == 2) {
      if constexpr (sizeof(Element) == 2) {
        from_float(std::numeric_limits<float>::infinity(), &a[3 * K + 5]);
        from_float(std::numeric_limits<float>::quiet_NaN(), &b[5 * 8 + 2]);
      }
    }
    const auto word = [](const Element& lo, const Element& hi) -> uint32_t {
      if constexpr (sizeof(Element) == 4) {
        return float_bits(lo) | 0x1234u % 0x2000u;  // what the hardware ignores
      } else {
        return lo.bits | static_cast<uint32_t>(hi.bits) << 16;
      }
    };
    run(1, 32, with_seed(static_cast<uint64_t>(round)), [&] {
      const int g = thread_index() / 4, t = thread_index() % 4;
      uint32_t ra[4], rb[2];
      if constexpr (K == 16) {
        const auto pair_a = [&](int i, int k) { return word(a[i * K + k], a[i * K + k + 1]); };
        const auto pair_b = [&](int k, int n) { return word(b[k * 8 + n], b[(k + 1) * 8 + n]); };
        ra[0] = pair_a(g, 2 * t);
        ra[1] = pair_a(g + 8, 2 * t);
        ra[2] = pair_a(g, 2 * t + 8);
        ra[3] = pair_a(g + 8, 2 * t + 8);
        rb[0] = pair_b(2 * t, g);
        rb[1] = pair_b(2 * t + 8, g);
      } else {
        const auto one_a = [&](int i, int k) { return word(a[i * K + k], a[i * K + k]); };
        const auto one_b = [&](int k, int n) { return word(b[k * 8 + n], b[k * 8 + n]); };
        ra[0] = one_a(g, t);
        ra[1] = one_a(g + 8, t);
        ra[2] = one_a(g, t + 4);
        ra[3] = one_a(g + 8, t + 4);
        rb[0] = one_b(t, g);
        rb[1] = one_b(t + 4, g);
      }
      float rc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
      mma(rc, ra, rb[0], rb[1]);
      got[g * 8 + 2 * t] = rc[0];
      got[g * 8 + 2 * t + 1] = rc[1];
      got[(g + 8) * 8 + 2 * t] = rc[2];
      got[(g + 8) * 8 + 2 * t + 1] = rc[3];
    });
    for (int i = 0; i < 16; ++i) {
      for (int n = 0; n < 8; ++n) {
        double expected = c[i * 8 + n], magnitude = std::abs(expected);
        for (int k = 0; k < K; ++k) {
          const double product = double(to_float(a[i * K + k])) * double(to_float(b[k * 8 + n]));
          expected += product;
          magnitude += std::abs(product);
        }
        const double difference = std::abs(double(got[i * 8 + n]) - expected);
        const bool is_same = std::isfinite(expected) ? difference <= 0x1p-22 * magnitude
                                                     : std::isnan(expected) == std::isnan(got[i * 8 + n]) &&
                                                           (std::isnan(expected) || got[i * 8 + n] == expected);
        CHECK(is_same, "%s round %d (%d, %d): %g, not %g", what, round, i, n, double(got[i * 8 + n]), expected);
      }
    }
  }
}

void check_ldmatrix() {
  for (const bool is_transposed : {false, true}) {
    std::vector<uint32_t> got(32 * 4);
    // Row r of matrix m lies at chunk (5 r + 9 m) mod 41, and element j of it is 1000 m + 10 r + j.
    const auto chunk = [](int m, int r) { return static_cast<uint32_t>((5 * r + 9 * m) % 41); };
    run(1, 32, with_seed(3), [&] {
      const int lane = thread_index(), m = lane / 8, r = lane % 8;
      U32x4 row;
      for (int j = 0; j < 8; j += 2) {
        row.x[j / 2] = static_cast<uint32_t>(1000 * m + 10 * r + j) | static_cast<uint32_t>(1000 * m + 10 * r + j + 1)
                                                                          << 16;
      }
      store_shared_u32x4(shared_base() + 16 * chunk(m, r), row);
      sync_warp();
      uint32_t x[4];
      if (is_transposed) {
        ldmatrix_x4_trans(x, shared_base() + 16 * chunk(m, r));
      } else {
        ldmatrix_x4(x, shared_base() + 16 * chunk(m, r));
      }
      std::copy(x, x + 4, &got[4 * static_cast<size_t>(lane)]);
    });
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        for (int half = 0; half < 2; ++half) {
          const int i = lane / 4, j = 2 * (lane % 4) + half;
          const int expected = 1000 * m + (is_transposed ? 10 * j + i : 10 * i + j);
          const int found = static_cast<int>(got[4 * lane + m] >> 16 * half & 0xffffu);
          CHECK(found == expected, "trans %d, lane %d, matrix %d: %d, not %d", is_transposed, lane, m, found, expected);
        }
      }
    }
  }
}

void check_shuffles() {
  for (const int mask : {0, 1, 2, 4, 8, 16, 31}) {
    std::vector<float> got(64), chained(64);
    run(1, 64, with_seed(9), [&] {
      const int thread = thread_index();
      got[thread] = shuffle_xor(static_cast<float>(thread), mask);
      uint32_t sum = static_cast<uint32_t>(thread);
      for (int step = 1; step < 32; step *= 2) sum += shuffle_xor(sum, step);
      chained[thread] = static_cast<float>(sum);
    });
    for (int thread = 0; thread < 64; ++thread) {
      CHECK(got[thread] == static_cast<float>(thread ^ mask), "mask %d, thread %d: %g", mask, thread, got[thread]);
      CHECK(chained[thread] == static_cast<float>(thread / 32 * 1024 + 496), "thread %d: %g", thread, chained[thread]);
    }
  }
}

void check_numbers() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    const float x = to_float(half), y = to_float(brain);
    CHECK(float_bits(f16_to_float(half.bits)) == float_bits(x), "float16 %04x: %g", bits, double(x));
    CHECK(float_bits(bf16_to_float(brain.bits)) == float_bits(y), "bfloat16 %04x: %g", bits, double(y));
    if (x == x) CHECK(pack_f16(x, -x) == (bits | (bits ^ 0x8000u) << 16), "float16 %04x: %08x", bits, pack_f16(x, -x));
    if (y == y) CHECK(pack_bf16(y, -y) == (bits | (bits ^ 0x8000u) << 16), "bfloat16 %04x", bits);
  }
  std::mt19937 random(11);
  for (int n = 0; n < 100000; ++n) {
    const float x = bits_float(static_cast<uint32_t>(random()));
    if (x != x) continue;
    Float16 half;
    BFloat16 brain;
    from_float(x, &half);
    from_float(x, &brain);
    CHECK(pack_f16(x, 0.0f) == half.bits, "%g: %08x", double(x), pack_f16(x, 0.0f));
    CHECK(pack_bf16(x, 0.0f) == brain.bits, "%g: %08x", double(x), pack_bf16(x, 0.0f));
    // Half of the last of the eleven bits at most, and ties go away from zero.
    const float rounded = bits_float(to_tf32(x));
    CHECK((to_tf32(x) & 0x1fffu) == 0, "%g", double(x));
    if (std::isnormal(x) && std::isfinite(rounded)) {
      CHECK(std::abs(double(rounded) - x) <= std::ldexp(1.0, std::ilogb(x) - 11), "%g: %g", double(x), double(rounded));
    }
  }
  CHECK(to_tf32(bits_float(0x3f801000u)) == 0x3f802000u && to_tf32(bits_float(0xbf801000u)) == 0xbf802000u, "ties");
  CHECK(std::isinf(bits_float(to_tf32(std::numeric_limits<float>::infinity()))), "infinity");
  CHECK(std::isnan(bits_float(to_tf32(bits_float(0x7fffffffu)))), "NaN");
  CHECK(exp2_approx(-std::numeric_limits<float>::infinity()) == 0.0f, "-inf");
  CHECK(exp2_approx(-140.0f) == 0.0f && exp2_approx(-126.0f) == 0x1p-126f && exp2_approx(3.0f) == 8.0f, "exp2");
  CHECK(std::isinf(exp2_approx(200.0f)) && std::isnan(exp2_approx(bits_float(0x7fc00000u))), "exp2");
}

}  // namespace

int main() {
  check_mma<BFloat16, 16>("bf16", [](auto&... args) { mma_bf16(args...); }, true);
  check_mma<Float16, 16>("f16", [](auto&... args) { mma_f16(args...); }, true);
  check_mma<float, 8>("tf32", [](auto&... args) { mma_tf32(args...); }, false);
  check_ldmatrix();
  check_shuffles();
  check_numbers();
  return fastattn::testing::report("emulator_instructions_test");
}
