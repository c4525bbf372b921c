// Every word of the vector vocabulary (csrc/cpu/simd) at one level, and the functions that are made of it, against
// plain scalar code: all 65536 float16 and bfloat16 numbers, rounding at every tie between them, what the first n lanes
// read and write, NaN and infinity where the vocabulary promises something about them.
//
// Included last by every csrc/testing/simd/<level>.cpp, inside the level's target region.
#pragma once

#include "cpu/pack.h"
#include "cpu/vector_math.h"
#include "testing/simd/levels.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr float kInf = __builtin_inff();

FASTATTN_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTATTN_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FASTATTN_FN bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

struct FloatLanes {
  float at[kLanes];
};
struct IntLanes {
  uint32_t at[kLanes];
};
FASTATTN_FN FloatLanes lanes(Vf x) {
  FloatLanes to;
  vstore(to.at, x);
  return to;
}
FASTATTN_FN IntLanes int_lanes(Vi x) {
  IntLanes to;
  vistore(to.at, x);
  return to;
}

// A mask, as bits.
FASTATTN_FN uint32_t mask_bits(Vm m) {
  const IntLanes chosen = int_lanes(viselect(m, viset(1), viset(0)));
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= chosen.at[l] << l;
  return bits;
}

// Numbers that a level could treat each in its own way.
constexpr float kNumbers[] = {0.0f,   -0.0f,       1.0f, -1.0f, 1.5f, -2.75f, 3e-39f,   -1e-45f,  0x1p-126f, 1e38f,
                              -3e38f, 16777217.0f, kInf, -kInf, 0.1f, -7e-5f, 65504.0f, 65520.0f, 0x1p-24f,  123456.7f};
constexpr int kNumberCount = sizeof kNumbers / sizeof kNumbers[0];
FASTATTN_FN float number(int n) { return kNumbers[n % kNumberCount]; }

// A generator that every level draws the same numbers with.
struct Random {
  uint64_t state = 1;
  inline uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
};

void check_arithmetic() {
  const float nan = __builtin_nanf("");
  for (int i = 0; i < kNumberCount; ++i) {
    for (int j = 0; j < kNumberCount; ++j) {
      FloatLanes a, b, c;
      for (int l = 0; l < kLanes; ++l)
        a.at[l] = number(i + l), b.at[l] = number(j + 3 * l), c.at[l] = number(i + j + l);
      const Vf x = vload(a.at), y = vload(b.at), z = vload(c.at);
      const FloatLanes sum = lanes(vadd(x, y)), difference = lanes(vsub(x, y)), product = lanes(vmul(x, y));
      const FloatLanes quotient = lanes(vdiv(x, y)), largest = lanes(vmax(x, y)), least = lanes(vmin(x, y));
      const FloatLanes magnitude = lanes(vabs(x)), fused = lanes(vfma(x, y, z));
      const FloatLanes negative = lanes(vnegative_fma(x, y, z));
      const uint32_t less = mask_bits(vless(x, y)), equal = mask_bits(vequal(x, y));
      for (int l = 0; l < kLanes; ++l) {
        const float u = a.at[l], v = b.at[l], w = c.at[l];
        CHECK(same(sum.at[l], u + v) && same(difference.at[l], u - v), "%g, %g", u, v);
        CHECK(same(product.at[l], u * v) && same(quotient.at[l], u / v), "%g, %g", u, v);
        CHECK(same(largest.at[l], u > v ? u : v) && same(least.at[l], u < v ? u : v), "%g, %g", u, v);
        CHECK(same(magnitude.at[l], u < 0.0f || bits_of(u) >> 31 ? -u : u), "%g", u);
        CHECK(((less >> l) & 1) == (u < v) && ((equal >> l) & 1) == (u == v), "%g, %g", u, v);
        // Rounded once or twice.
        const volatile float rounded = u * v;
        CHECK(same(fused.at[l], __builtin_fmaf(u, v, w)) || same(fused.at[l], rounded + w), "%g, %g, %g: %g", u, v, w,
              fused.at[l]);
        CHECK(same(negative.at[l], __builtin_fmaf(-u, v, w)) || same(negative.at[l], w - rounded), "%g, %g, %g: %g", u,
              v, w, negative.at[l]);
      }
    }
    // A NaN that stands second stays, one that stands first does not; it is neither less nor equal.
    const float x = number(i);
    CHECK(same(lanes(vmax(vset(x), vset(nan))).at[0], nan) && same(lanes(vmin(vset(x), vset(nan))).at[0], nan), "%g",
          x);
    CHECK(same(lanes(vmax(vset(nan), vset(x))).at[0], x) && same(lanes(vmin(vset(nan), vset(x))).at[0], x), "%g", x);
    CHECK(!vany(vless(vset(x), vset(nan))) && !vany(vless(vset(nan), vset(x))), "%g", x);
    CHECK(!vany(vequal(vset(x), vset(nan))) && !vany(vequal(vset(nan), vset(nan))), "%g", x);
  }
  CHECK(same(lanes(vzero()).at[kLanes - 1], 0.0f), "zero");
  // y * 2^n, by the low bits of a float.
  for (int n = -126; n <= 127; ++n) {
    const Vf shifted = vadd(vset(static_cast<float>(n)), vset(kRoundingShift));
    const float got = lanes(vadd_exponent(vset(1.25f), shifted)).at[kLanes - 1];
    CHECK(same(got, 1.25f * float_of(static_cast<uint32_t>(n + 127) << 23)), "2^%d: %g", n, got);
  }
  // The estimate's bits, over a range of exponents, and what is made of it.
  double worst = 0.0, worst_rough = 0.0, worst_refined = 0.0;
  for (uint32_t bits = 0x3F000000u; bits < 0x42000000u; bits += 1021) {
    const float x = float_of(bits);
    const auto error = [x](Vf y) { return __builtin_fabs(1.0 - static_cast<double>(lanes(y).at[0]) * x); };
    const double estimate = error(vreciprocal_estimate(vset(x)));
    const double rough = error(vreciprocal<false>(vset(x))), refined = error(vreciprocal<true>(vset(x)));
    worst = worst > estimate ? worst : estimate;
    worst_rough = worst_rough > rough ? worst_rough : rough;
    worst_refined = worst_refined > refined ? worst_refined : refined;
  }
  CHECK(worst <= __builtin_ldexp(1.0, -kReciprocalBits), "the reciprocal's estimate errs by %g", worst);
  CHECK(worst_rough <= 0x1p-14 && worst_refined <= 0x1p-22, "reciprocals err by %g, %g", worst_rough, worst_refined);
}

void check_masks() {
  for (uint32_t bits = 0; bits < 1u << kLanes; ++bits) {
    // Bits beyond the lanes are not looked at.
    const Vm m = vmask_from_bits(bits | ~uint64_t{0} << kLanes);
    CHECK(mask_bits(m) == bits && vany(m) == (bits != 0), "%x", bits);
    const FloatLanes chosen = lanes(vselect(m, vset(1.5f), vset(__builtin_nanf(""))));
    for (int l = 0; l < kLanes; ++l) CHECK(same(chosen.at[l], (bits >> l) & 1 ? 1.5f : __builtin_nanf("")), "%x", bits);
  }
  Random random;
  uint8_t bytes[64 + 1];
  for (int repeat = 0; repeat < 300; ++repeat) {
    uint64_t wanted = 0;
    uint8_t* at = bytes + repeat % 2;
    for (int t = 0; t < 64; ++t) {
      const uint32_t word = random.next();
      at[t] = static_cast<uint8_t>(repeat < 64 ? (t == repeat ? 1u << (word & 7) : 0) : word & 1 ? word >> 24 : 0);
      wanted |= uint64_t{at[t] != 0} << t;
    }
    CHECK(nonzero_bytes(at) == wanted, "repeat %d", repeat);
  }
}

void check_integers() {
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    IntLanes a, b, c;
    for (int l = 0; l < kLanes; ++l) a.at[l] = random.next(), b.at[l] = random.next(), c.at[l] = random.next();
    if (repeat % 3 == 0) b.at[0] = a.at[0];
    const Vi x = viload(a.at), y = viload(b.at), z = viload(c.at);
    const IntLanes sum = int_lanes(viadd(x, y)), difference = int_lanes(visub(x, y));
    const IntLanes both = int_lanes(viand(x, y)), either = int_lanes(vixor(x, y)), three = int_lanes(vixor(x, y, z));
    const IntLanes by31 = int_lanes(vishift_right<31>(x)), by23 = int_lanes(vishift_right<23>(x));
    const IntLanes bits = int_lanes(vbits_as_int(vbits_as_float(x)));
    const FloatLanes as_float = lanes(vfrom_int(x));
    const uint32_t equal = mask_bits(viequal(x, y)), greater_equal = mask_bits(vigreater_equal(x, y));
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t u = a.at[l], v = b.at[l];
      CHECK(sum.at[l] == u + v && difference.at[l] == u - v && both.at[l] == (u & v), "%x, %x", u, v);
      CHECK(either.at[l] == (u ^ v) && three.at[l] == (u ^ v ^ c.at[l]) && bits.at[l] == u, "%x, %x", u, v);
      CHECK(by31.at[l] == (u >> 31 ? ~0u : 0u), "%x", u);
      CHECK(by23.at[l] == static_cast<uint32_t>(static_cast<int32_t>(u) >> 23), "%x", u);
      CHECK(same(as_float.at[l], static_cast<float>(static_cast<int32_t>(u))), "%x", u);
      CHECK(((equal >> l) & 1) == (u == v) && ((greater_equal >> l) & 1) == (u >= v), "%x, %x", u, v);
    }
    const IntLanes product = int_lanes(vimul_even(x, y)), high = int_lanes(vihigh(x)), joined = int_lanes(vijoin(x, y));
    for (int l = 0; l < kLanes; l += 2) {
      const uint64_t wanted = static_cast<uint64_t>(a.at[l]) * b.at[l];
      CHECK(product.at[l] == static_cast<uint32_t>(wanted) && product.at[l + 1] == wanted >> 32, "%x, %x", a.at[l],
            b.at[l]);
      CHECK(high.at[l] == a.at[l + 1] && high.at[l + 1] == 0, "%x", a.at[l + 1]);
      CHECK(joined.at[l] == a.at[l] && joined.at[l + 1] == b.at[l], "%x, %x", a.at[l], b.at[l]);
    }
  }
  const IntLanes iota = int_lanes(viota());
  for (int l = 0; l < kLanes; ++l) CHECK(iota.at[l] == static_cast<uint32_t>(l), "%x", iota.at[l]);
}

void check_lanes() {
  Random random;
  for (int repeat = 0; repeat < 500; ++repeat) {
    FloatLanes rows[kLanes];
    Vf tile[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      for (int l = 0; l < kLanes; ++l) rows[r].at[l] = static_cast<float>(random.next() >> 20);
      tile[r] = vload(rows[r].at);
      // Whole numbers of twelve bits: the order of additions does not matter.
      float sum = 0.0f, largest = -kInf;
      for (int l = 0; l < kLanes; ++l) {
        sum += rows[r].at[l];
        largest = largest > rows[r].at[l] ? largest : rows[r].at[l];
      }
      CHECK(vreduce_add(tile[r]) == sum && vreduce_max(tile[r]) == largest, "row %d", r);
    }
    const FloatLanes sums = lanes(vadd_lanes(tile));
    for (int r = 0; r < kLanes; ++r) CHECK(sums.at[r] == vreduce_add(tile[r]), "row %d", r);
    vtranspose(tile);
    for (int r = 0; r < kLanes; ++r) {
      const FloatLanes row = lanes(tile[r]);
      for (int l = 0; l < kLanes; ++l) CHECK(row.at[l] == rows[l].at[r], "row %d lane %d", r, l);
    }
  }
}

// The first n of a row whose other numbers are not to be touched.
template <class Element, class FromFloat, class ToFloat>
void check_first(const FromFloat& from_float, const ToFloat& to_float, const char* type) {
  using Raw = typename Element::Raw;
  for (int64_t n = 0; n <= kLanes + 2; ++n) {
    Raw from[kLanes + 4], to[kLanes + 4];
    for (int c = 0; c < kLanes + 4; ++c) {
      from[c] = from_float(c < n ? static_cast<float>(c - 3) : __builtin_nanf(""));
      to[c] = from_float(99.0f);
    }
    const FloatLanes got = lanes(Element::load_first(from, n));
    for (int l = 0; l < kLanes; ++l) {
      CHECK(same(got.at[l], l < n ? static_cast<float>(l - 3) : 0.0f), "%s first %d: %g", type, static_cast<int>(n),
            got.at[l]);
    }
    FloatLanes numbers;
    for (int l = 0; l < kLanes; ++l) numbers.at[l] = static_cast<float>(l + 1);
    Element::store_first(to, vload(numbers.at), n);
    for (int c = 0; c < kLanes + 4; ++c) {
      CHECK(to_float(to[c]) == (c < n && c < kLanes ? static_cast<float>(c + 1) : 99.0f), "%s first %d", type,
            static_cast<int>(n));
    }
  }
}

// Half: testing::Float16 or testing::BFloat16.
template <class Half, class Element>
void check_half(const char* type) {
  const auto widened = [](uint16_t bits) { return testing::to_float(Half{bits}); };
  const auto rounded = [](float x) {
    Half half;
    testing::from_float(x, &half);
    return half.bits;
  };
  check_first<Element>(rounded, widened, type);
  for (uint32_t first = 0; first < 0x10000; first += kLanes) {
    uint16_t from[kLanes], back[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) from[l] = static_cast<uint16_t>(first + l);
    const FloatLanes wide = lanes(Element::load(from));
    Element::store(back, vload(wide.at));
    for (int l = 0; l < kLanes; ++l) {
      const float wanted = widened(from[l]);
      CHECK(same(wide.at[l], wanted), "%s %04x: %g, not %g", type, from[l], wide.at[l], wanted);
      CHECK(wanted != wanted ? widened(back[l]) != widened(back[l]) : back[l] == from[l], "%s %04x: back as %04x", type,
            from[l], back[l]);
    }
    // Between a number and the next: a quarter, the tie, three quarters; and what is next to the tie.
    FloatLanes between;
    for (int quarter = 0; quarter < 5; ++quarter) {
      for (int l = 0; l < kLanes; ++l) {
        const double low = widened(from[l]), high = widened(static_cast<uint16_t>(from[l] ^ 1));
        const float tie = static_cast<float>(0.5 * low + 0.5 * high);
        between.at[l] = quarter == 0   ? static_cast<float>(0.75 * low + 0.25 * high)
                        : quarter == 1 ? static_cast<float>(0.25 * low + 0.75 * high)
                                       : float_of(bits_of(tie) + static_cast<uint32_t>(quarter) - 3);
      }
      Element::store(back, vload(between.at));
      for (int l = 0; l < kLanes; ++l) {
        const uint16_t wanted = rounded(between.at[l]);
        CHECK(back[l] == wanted || (between.at[l] != between.at[l] && widened(back[l]) != widened(back[l])),
              "%s %g: %04x, not %04x", type, between.at[l], back[l], wanted);
      }
    }
  }
  Random random;
  for (int repeat = 0; repeat < 20000; ++repeat) {
    FloatLanes numbers;
    uint16_t got[kLanes];
    for (int l = 0; l < kLanes; ++l) numbers.at[l] = float_of(random.next());
    Element::store(got, vload(numbers.at));
    for (int l = 0; l < kLanes; ++l) {
      const float x = numbers.at[l];
      CHECK(x != x ? widened(got[l]) != widened(got[l]) : got[l] == rounded(x), "%s %g: %04x", type, x, got[l]);
    }
  }
}

void check_conversions() {
  check_half<testing::Float16, Float16>("float16");
  check_half<testing::BFloat16, BFloat16>("bfloat16");
  check_first<Float32>([](float x) { return x; }, [](float x) { return x; }, "float32");
  for (int first = -128; first < 128; ++first) {
    int8_t numbers[2 * kLanes];
    for (int c = 0; c < 2 * kLanes; ++c) numbers[c] = static_cast<int8_t>(first + 7 * c);
    for (int64_t n = 0; n <= kLanes + 1; ++n) {
      const FloatLanes got = lanes(Int8::load_first(numbers, n));
      for (int l = 0; l < kLanes; ++l) CHECK(got.at[l] == (l < n ? numbers[l] : 0), "int8 %d first %d", first, int(n));
    }
  }
}

void check_functions() {
  const auto close = [](float got, double wanted, double bound) {
    return __builtin_fabs(got - wanted) <= bound * __builtin_fabs(wanted);
  };
  for (float t = -126.0f; t < 127.0f; t += 0.137f) {
    const double wanted = __builtin_exp2(static_cast<double>(t));
    CHECK(close(lanes(vexp2<5>(vset(t))).at[0], wanted, 3e-7), "2^%g", t);
    CHECK(close(lanes(vexp2<3>(vset(t))).at[0], wanted, 2e-4), "2^%g", t);
    const float x = t * 0.68f;
    CHECK(close(lanes(vexp_precise(vset(x))).at[0], __builtin_exp(static_cast<double>(x)), 3e-7), "e^%g", x);
    const float y = t * 0.05f;
    CHECK(close(lanes(vtanh(vset(y))).at[0], __builtin_tanh(static_cast<double>(y)), 5e-7), "tanh(%g)", y);
  }
  CHECK(lanes(vexp2<5>(vset(-127.0f))).at[0] == 0.0f && lanes(vexp2<3>(vset(-kInf))).at[0] == 0.0f, "2^-127");
  CHECK(same(lanes(vexp2<5>(vset(__builtin_nanf("")))).at[0], __builtin_nanf("")), "NaN");
  CHECK(same(lanes(vtanh(vset(__builtin_nanf("")))).at[0], __builtin_nanf("")), "NaN");
  CHECK(lanes(vtanh(vset(-kInf))).at[0] == -1.0f && lanes(vtanh(vset(1e30f))).at[0] == 1.0f, "tanh far from 0");
  Random random;
  for (int repeat = 0; repeat < 500; ++repeat) {
    const uint64_t seed = static_cast<uint64_t>(random.next()) << 32 | random.next();
    const uint32_t c0 = random.next(), c2 = random.next(), c3 = random.next();
    IntLanes c1;
    for (int l = 0; l < kLanes; ++l) c1.at[l] = random.next();
    Vi words[4];
    vphilox(seed, c0, viload(c1.at), c2, c3, words);
    for (int w = 0; w < 4; ++w) {
      const IntLanes word = int_lanes(words[w]);
      const FloatLanes exponential = lanes(vexponential(words[w]));
      for (int l = 0; l < kLanes; ++l) {
        CHECK(word.at[l] == philox4x32(seed, c0, c1.at[l], c2, c3).w[w], "word %d lane %d", w, l);
        const double u = (word.at[l] + 0.5) / 4294967296.0;
        CHECK(close(exponential.at[l], -__builtin_log(u), 1e-6), "-log(%g): %g", u, exponential.at[l]);
      }
    }
  }
}

#if FASTATTN_BF16_DOT
FASTATTN_FN float brain(uint16_t bits) { return testing::to_float(testing::BFloat16{bits}); }

void check_pairs() {
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    uint16_t a[2 * kLanes], b[2 * kLanes];
    FloatLanes acc, low, high;
    for (int c = 0; c < 2 * kLanes; ++c) {
      // Whole numbers of a few bits, whose products add up without rounding.
      testing::BFloat16 x, y;
      testing::from_float(static_cast<float>(random.next() >> 25) - 60.0f, &x);
      testing::from_float(static_cast<float>(random.next() >> 25) - 60.0f, &y);
      a[c] = x.bits;
      b[c] = y.bits;
    }
    for (int l = 0; l < kLanes; ++l) {
      acc.at[l] = static_cast<float>(random.next() >> 20);
      low.at[l] = float_of(random.next());
      high.at[l] = float_of(random.next());
      // Numbers below the normal ones count as 0 in this arithmetic.
      if (__builtin_fabsf(low.at[l]) < 0x1p-120f) low.at[l] = 1.0f;
      if (__builtin_fabsf(high.at[l]) < 0x1p-120f) high.at[l] = 1.0f;
    }
    const Vi x = vload_pairs_first(a, 2 * kLanes), y = vload_pairs_first(b, 2 * kLanes);
    const FloatLanes dot = lanes(vdot_bf16(vload(acc.at), x, y));
    for (int l = 0; l < kLanes; ++l) {
      const float wanted = acc.at[l] + brain(a[2 * l]) * brain(b[2 * l]) + brain(a[2 * l + 1]) * brain(b[2 * l + 1]);
      CHECK(dot.at[l] == wanted, "%g, not %g", dot.at[l], wanted);
    }
    const Vi narrow = vnarrow(vload(low.at), vload(high.at));
    uint16_t halves[2 * kLanes], interleaved[2 * kLanes];
    vstore_low_half(halves, narrow);
    vstore_high_half(halves + kLanes, narrow);
    const IntLanes words = int_lanes(vinterleave_halves(narrow));
    memcpy(interleaved, words.at, sizeof interleaved);
    for (int c = 0; c < 2 * kLanes; ++c) {
      const float from = c < kLanes ? low.at[c] : high.at[c - kLanes];
      testing::BFloat16 wanted;
      testing::from_float(from, &wanted);
      CHECK(halves[c] == wanted.bits || (from != from && brain(halves[c]) != brain(halves[c])), "%g: %04x", from,
            halves[c]);
      CHECK(interleaved[c] == halves[c % 2 * kLanes + c / 2], "number %d", c);
    }
    Vi first, second;
    vinterleave_rows(x, y, &first, &second);
    const IntLanes both[2] = {int_lanes(first), int_lanes(second)};
    for (int c = 0; c < 2 * kLanes; ++c) {
      CHECK(both[c / kLanes].at[c % kLanes] == (a[c] | static_cast<uint32_t>(b[c]) << 16), "number %d", c);
    }
    const int64_t n = repeat % (2 * kLanes + 2);
    uint16_t some[2 * kLanes];
    const IntLanes taken = int_lanes(vload_pairs_first(a, n));
    memcpy(some, taken.at, sizeof some);
    for (int c = 0; c < 2 * kLanes; ++c) CHECK(some[c] == (c < n ? a[c] : 0), "first %d", static_cast<int>(n));
  }
}
#endif

#if FASTATTN_I16_DOT
void check_short_pairs() {
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    int8_t a[2 * kLanes];
    int16_t b[2 * kLanes];
    FloatLanes numbers;
    IntLanes acc;
    for (int c = 0; c < 2 * kLanes; ++c) {
      a[c] = static_cast<int8_t>(random.next() >> 24);
      b[c] = static_cast<int16_t>(random.next() >> 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      acc.at[l] = random.next() >> 8;
      numbers.at[l] = static_cast<float>(static_cast<int32_t>(random.next() >> 16) - 32768) * 0.999f;
    }
    uint32_t pairs[kLanes];
    memcpy(pairs, b, sizeof pairs);
    const IntLanes dot = int_lanes(vdot_i16(viload(acc.at), vload_i8_pairs(a), viload(pairs)));
    for (int l = 0; l < kLanes; ++l) {
      const int32_t wanted = static_cast<int32_t>(acc.at[l]) + a[2 * l] * b[2 * l] + a[2 * l + 1] * b[2 * l + 1];
      CHECK(static_cast<int32_t>(dot.at[l]) == wanted, "%d, not %d", static_cast<int32_t>(dot.at[l]), wanted);
    }
    const int64_t n = repeat % (2 * kLanes + 1);
    int16_t some[2 * kLanes], rounded[kLanes];
    const IntLanes taken = int_lanes(vload_i8_pairs_first(a, n));
    memcpy(some, taken.at, sizeof some);
    for (int c = 0; c < 2 * kLanes; ++c) CHECK(some[c] == (c < n ? a[c] : 0), "first %d", static_cast<int>(n));
    vistore_shorts(rounded, vround(vload(numbers.at)));
    for (int l = 0; l < kLanes; ++l) CHECK(rounded[l] == __builtin_rintf(numbers.at[l]), "%g", numbers.at[l]);
    Vi rows[kLanes];
    uint32_t sums[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      IntLanes row;
      sums[r] = 0;
      for (int l = 0; l < kLanes; ++l) sums[r] += row.at[l] = random.next();
      rows[r] = viload(row.at);
    }
    const IntLanes added = int_lanes(viadd_lanes(rows));
    for (int r = 0; r < kLanes; ++r) CHECK(added.at[r] == sums[r], "row %d", r);
  }
}
#endif

}  // namespace

void check_vocabulary() {
  check_arithmetic();
  check_masks();
  check_integers();
  check_lanes();
  check_conversions();
  check_functions();
#if FASTATTN_BF16_DOT
  check_pairs();
#endif
#if FASTATTN_I16_DOT
  check_short_pairs();
#endif
}

}  // namespace fastattn::cpu::FASTATTN_ISA
