/* Random fills with the bits of torch's CPU kernels, several times as fast.
 *
 * torch draws from the Mersenne Twister MT19937 one word at a time, in scalar code. Here whole
 * blocks of the generator are made, tempered and transformed by loops that a compiler vectorises.
 * lateinit/_native/trial.py compares each kernel with torch's before its first use.
 * docs/kernels.md explains the algorithms.
 *
 * Sources:
 *   M. Matsumoto and T. Nishimura, "Mersenne Twister: A 623-Dimensionally Equidistributed Uniform
 *     Pseudo-Random Number Generator", ACM TOMACS 8(1), 1998: the generator.
 *   H. Haramoto et al., "Efficient Jump Ahead for F2-Linear Random Number Generators", INFORMS
 *     JoC 20(3), 2008: jumps.
 *   S. Moshier, cephes (logf.c, sinf.c), in the form of aten/src/ATen/native/cpu/avx_mathfun.h.
 *   aten/src/ATen/native/cpu/DistributionTemplates.h: normal_fill and uniform_kernel.
 *
 * Compile with -ffp-contract=off: all fused multiply-adds are explicit.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000 /* CPython 3.10 */
#endif
#include <Python.h>

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A kernel is an inline function that is compiled twice: for AVX2 with FMA, and for any CPU. */
#define KERNEL static inline __attribute__((always_inline))
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_AVX2 1
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#else
#define HAS_AVX2 0
#endif

KERNEL float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

KERNEL uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ---- The generator ---------------------------------------------------------------------------- */

enum { WORDS = 624, MIDDLE = 397, DEGREE = 19937 };

/* `used` words of the block are drawn; with WORDS of them the next draw makes a new block. */
typedef struct {
    uint32_t words[WORDS];
    int used;
} Twister;

/* torch's bytes of a generator (aten/src/ATen/CPUGeneratorImpl.cpp: CPUGeneratorImplStateLegacy). */
enum { LEFT_AT = 8, NEXT_AT = 16, WORDS_AT = 24, STATE_SIZE = 5056 };

/* False if the bytes are no state. Seeding sets left to 1 and next to 0. */
static bool load(Twister *twister, const uint8_t *state)
{
    int32_t left;
    uint64_t next, words[WORDS];
    memcpy(&left, state + LEFT_AT, sizeof left);
    memcpy(&next, state + NEXT_AT, sizeof next);
    memcpy(words, state + WORDS_AT, sizeof words);
    for (int i = 0; i < WORDS; i++)
        twister->words[i] = (uint32_t)words[i];
    twister->used = left == 1 && next == 0 ? WORDS : (int)(next <= WORDS ? next : 0);
    return twister->used > 0 && (next == 0 || left + twister->used == WORDS + 1);
}

static void store(const Twister *twister, uint8_t *state)
{
    int32_t left = WORDS + 1 - twister->used;
    uint64_t next = (uint64_t)twister->used, words[WORDS];
    for (int i = 0; i < WORDS; i++)
        words[i] = twister->words[i];
    memcpy(state + LEFT_AT, &left, sizeof left);
    memcpy(state + NEXT_AT, &next, sizeof next);
    memcpy(state + WORDS_AT, words, sizeof words);
}

KERNEL uint32_t mixed(uint32_t word, uint32_t next)
{
    uint32_t high_and_low = (word & 0x80000000u) | (next & 0x7fffffffu);
    return high_and_low >> 1 ^ ((0u - (next & 1u)) & 0x9908b0dfu);
}

/* The next block. Neither loop reads what it wrote in the last 226 steps: both vectorise. */
KERNEL void twist(uint32_t *w)
{
    for (int i = 0; i < WORDS - MIDDLE; i++)
        w[i] = w[i + MIDDLE] ^ mixed(w[i], w[i + 1]);
    for (int i = WORDS - MIDDLE; i < WORDS - 1; i++)
        w[i] = w[i + MIDDLE - WORDS] ^ mixed(w[i], w[i + 1]);
    w[WORDS - 1] = w[MIDDLE - 1] ^ mixed(w[WORDS - 1], w[0]);
}

KERNEL uint32_t tempered(uint32_t w)
{
    w ^= w >> 11;
    w ^= w << 7 & 0x9d2c5680u;
    w ^= w << 15 & 0xefc60000u;
    return w ^ w >> 18;
}

KERNEL void skip(Twister *twister, uint64_t count)
{
    if (count == 0)
        return;
    uint64_t end = (uint64_t)twister->used + count;
    for (; end > WORDS; end -= WORDS)
        twist(twister->words);
    twister->used = (int)end;
}

KERNEL void draw(Twister *twister, uint32_t *out, size_t count)
{
    while (count > 0) {
        if (twister->used == WORDS) {
            twist(twister->words);
            twister->used = 0;
        }
        size_t left = (size_t)(WORDS - twister->used), length = count < left ? count : left;
        const uint32_t *w = twister->words + twister->used;
        for (size_t i = 0; i < length; i++)
            out[i] = tempered(w[i]);
        twister->used += (int)length;
        out += length;
        count -= length;
    }
}

/* ---- Numbers ---------------------------------------------------------------------------------- */

/* `fused`: compute like torch's AVX2 kernels, with FMA. Otherwise like its DEFAULT kernels, which
 * are scalar and call the C library. */

/* 24 bits of a word, and 53 of two, in [0, 1). */
KERNEL float unit(uint32_t word)
{
    return (float)(int32_t)(word & 0xffffffu) * 0x1p-24f;
}

KERNEL double unit64(uint32_t high, uint32_t low)
{
    uint64_t word = (uint64_t)high << 32 | low;
    return (double)(int64_t)(word & ((1ull << 53) - 1)) * 0x1p-53;
}

/* The logarithm of 0 < x <= 1: cephes' logf, each step of its polynomial fused. */
KERNEL float log_cephes(float x)
{
    uint32_t bits = bits_of(x);
    float e = (float)((int32_t)(bits >> 23) - 127) + 1.0f;
    x = as_float((bits & 0x807fffffu) | 0x3f000000u); /* the mantissa, in [0.5, 1) */
    bool below = x < 0.707106781186547524f;
    float once = below ? x : 0.0f;
    x = x - 1.0f;
    e = e - (below ? 1.0f : 0.0f);
    x = x + once;
    float z = x * x, y = 7.0376836292e-2f;
    y = fmaf(y, x, -1.1514610310e-1f);
    y = fmaf(y, x, 1.1676998740e-1f);
    y = fmaf(y, x, -1.2420140846e-1f);
    y = fmaf(y, x, 1.4249322787e-1f);
    y = fmaf(y, x, -1.6668057665e-1f);
    y = fmaf(y, x, 2.0000714765e-1f);
    y = fmaf(y, x, -2.4999993993e-1f);
    y = fmaf(y, x, 3.3333331174e-1f);
    y = y * x;
    /* avx_mathfun.h multiplies by z and adds; its compiler fuses the two like this (found by
     * trial). */
    y = fmaf(y, z, e * -2.12194440e-4f);
    y = fmaf(-z, 0.5f, y);
    x = x + y;
    return fmaf(e, 0.693359375f, x); /* x + e * log(2) in two parts */
}

/* Sine and cosine of x >= 0: cephes' sinf and cosf, which reduce x by multiples of pi/4. */
KERNEL void sincos_cephes(float x, float *sine, float *cosine)
{
    int32_t octant = ((int32_t)(x * 1.27323954473516f) + 1) & ~1;
    float y = (float)octant;
    x = fmaf(y, -0.78515625f, x);
    x = fmaf(y, -2.4187564849853515625e-4f, x);
    x = fmaf(y, -3.77489497744594108e-8f, x);
    float z = x * x;
    float c = 2.443315711809948e-5f;
    c = fmaf(c, z, -1.388731625493765e-3f);
    c = fmaf(c, z, 4.166664568298827e-2f);
    c = c * z;
    c = fmaf(c, z, -(z * 0.5f)); /* found by trial, as above */
    c = c + 1.0f;
    float s = -1.9515295891e-4f;
    s = fmaf(s, z, 8.3321608736e-3f);
    s = fmaf(s, z, -1.6666654611e-1f);
    s = s * z;
    s = fmaf(s, x, x);
    uint32_t sine_sign = (uint32_t)(octant & 4) << 29;
    uint32_t cosine_sign = (uint32_t)(~(octant - 2) & 4) << 29;
    bool as_named = (octant & 2) == 0; /* otherwise sine and cosine are exchanged */
    *sine = as_float(bits_of(as_named ? s : c) ^ sine_sign);
    *cosine = as_float(bits_of(as_named ? c : s) ^ cosine_sign);
}

/* Box-Muller on 16 uniforms: 8 radii and 8 angles give 8 cosines and 8 sines. */
KERNEL void normal_16(const uint32_t *words, float *out, float mean, float std, bool fused)
{
    for (int i = 0; i < 8; i++) {
        float u1 = 1.0f - unit(words[i]), u2 = unit(words[i + 8]), s, c;
        float radius = sqrtf(-2.0f * (fused ? log_cephes(u1) : logf(u1)));
        if (fused) {
            sincos_cephes(6.283185307179586f * u2, &s, &c);
        } else {
            float theta = (float)(6.283185307179586 * (double)u2);
            s = sinf(theta);
            c = cosf(theta);
        }
        out[i] = fmaf(radius * c, std, mean);
        out[i + 8] = fmaf(radius * s, std, mean);
    }
}

/* Round to nearest even; no value here is NaN. */
KERNEL uint16_t to_bfloat16(float value)
{
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* The hardware's conversion to float16 by float arithmetic: scaling makes too large values
 * infinite, and adding a power of two rounds at the last bit kept. From M. Dukhan's FP16, as is
 * c10/util/Half.h. */
KERNEL uint16_t to_float16(float value)
{
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, twice = bits + bits;
    float base = fabsf(value) * 0x1p+112f * 0x1p-110f;
    uint32_t bias = twice & 0xff000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = as_float((bias >> 1) + 0x07800000u) + base;
    uint32_t rounded = bits_of(base);
    uint32_t magnitude = (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
    return (uint16_t)(sign >> 16 | magnitude);
}

/* ---- Fills ------------------------------------------------------------------------------------ */

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
enum { PART = 4 * WORDS }; /* words drawn at a time, a multiple of 16: they stay in cache */

KERNEL void cast(const float *values, void *target, size_t count, int dtype)
{
    uint16_t *out = target;
    if (dtype == FLOAT32)
        memcpy(target, values, count * sizeof *values);
    else if (dtype == FLOAT16)
        for (size_t i = 0; i < count; i++)
            out[i] = to_float16(values[i]);
    else
        for (size_t i = 0; i < count; i++)
            out[i] = to_bfloat16(values[i]);
}

KERNEL char *element(void *target, size_t at, int dtype)
{
    return (char *)target + at * (dtype == FLOAT32 ? 4 : dtype == FLOAT64 ? 8 : 2);
}

/* Like uniform_kernel: a value that the cast rounds up to `high` becomes `low`. */
KERNEL void uniform_32(Twister *twister, void *target, size_t count, int dtype, float low,
                       float high, bool fused)
{
    uint32_t words[PART];
    float values[PART], width = high - low;
    uint16_t bounds[2];
    cast((float[]){low, high}, bounds, dtype == FLOAT32 ? 0 : 2, dtype);
    for (size_t at = 0; at < count; at += PART) {
        size_t length = count - at < PART ? count - at : PART;
        float *drawn = dtype == FLOAT32 ? (float *)target + at : values;
        draw(twister, words, length);
        for (size_t i = 0; i < length; i++) {
            float u = unit(words[i]), value = fused ? fmaf(u, width, low) : u * width + low;
            drawn[i] = dtype == FLOAT32 && value == high ? low : value;
        }
        if (dtype == FLOAT32)
            continue;
        uint16_t *out = (uint16_t *)target + at;
        cast(drawn, out, length, dtype);
        for (size_t i = 0; i < length; i++) { /* zeros of either sign are equal */
            bool equal = out[i] == bounds[1] || ((out[i] | bounds[1]) & 0x7fff) == 0;
            out[i] = equal ? bounds[0] : out[i];
        }
    }
}

KERNEL void uniform_64(Twister *twister, double *out, size_t count, double low, double high,
                       bool fused)
{
    uint32_t words[PART];
    double width = high - low;
    for (size_t at = 0; at < count; at += PART / 2) {
        size_t length = count - at < PART / 2 ? count - at : PART / 2;
        draw(twister, words, 2 * length);
        for (size_t i = 0; i < length; i++) {
            double u = unit64(words[2 * i], words[2 * i + 1]);
            double value = fused ? fma(u, width, low) : u * width + low;
            out[at + i] = value == high ? low : value;
        }
    }
}

/* Groups of 16 elements. */
KERNEL void groups(Twister *twister, void *target, size_t count, int dtype, float mean, float std,
                   bool fused)
{
    uint32_t words[PART];
    float values[PART];
    for (size_t at = 0; at < count; at += PART) {
        size_t length = count - at < PART ? count - at : PART;
        float *drawn = dtype == FLOAT32 ? (float *)target + at : values;
        draw(twister, words, length);
        for (size_t i = 0; i < length; i += 16)
            normal_16(words + i, drawn + i, mean, std, fused);
        if (dtype != FLOAT32)
            cast(drawn, element(target, at, dtype), length, dtype);
    }
}

/* Like normal_fill: if there is a remainder after the groups of 16, the last 16 elements are drawn
 * again. In float32 the remainder itself is drawn first, and not used. */
KERNEL void last_group(Twister *twister, void *last_16, size_t count, int dtype, float mean,
                      float std, bool fused)
{
    if (count % 16 == 0)
        return;
    if (dtype == FLOAT32)
        skip(twister, count % 16);
    groups(twister, last_16, 16, dtype, mean, std, fused);
}

/* For 16 elements or more: torch draws fewer one by one, with another method. */
KERNEL void normal(Twister *twister, void *target, size_t count, int dtype, float mean, float std,
                   bool fused)
{
    groups(twister, target, count / 16 * 16, dtype, mean, std, fused);
    last_group(twister, element(target, count - 16, dtype), count, dtype, mean, std, fused);
}

/* The elements at `places` (ascending) of a `normal` of `count` elements, one after the other. Only
 * the groups of 16 that contain them are computed; all other words are skipped. */
KERNEL void normal_at(Twister *twister, const int64_t *places, size_t chosen, void *values,
                      size_t count, int dtype, float mean, float std, bool fused)
{
    char drawn[16 * 4];
    size_t size = dtype == FLOAT32 ? 4 : 2, done = 0, i = 0;
    size_t last = count % 16 == 0 ? count : count - 16; /* from here on `last_group` draws */
    while (i < chosen && (size_t)places[i] < last) {
        size_t start = (size_t)places[i] / 16 * 16;
        skip(twister, start - done);
        groups(twister, drawn, 16, dtype, mean, std, fused);
        done = start + 16;
        for (; i < chosen && (size_t)places[i] < (done < last ? done : last); i++)
            memcpy(element(values, i, dtype), drawn + ((size_t)places[i] - start) * size, size);
    }
    skip(twister, count / 16 * 16 - done);
    last_group(twister, drawn, count, dtype, mean, std, fused);
    for (; i < chosen; i++)
        memcpy(element(values, i, dtype), drawn + ((size_t)places[i] - last) * size, size);
}

/* ---- Jumps ------------------------------------------------------------------------------------ */

/* Over GF(2) the words that follow n words later are a sum of words that follow now. The
 * coefficients of x^n modulo the characteristic polynomial of the recurrence select these words. */

enum { LIMBS = DEGREE / 64 + 1 }; /* of a polynomial: bit i % 64 of limb i / 64 belongs to x^i */
enum { TERMS = 134 };             /* of the characteristic polynomial below x^DEGREE */
enum { CHUNK = 8 };               /* limbs reduced at once; the second term is 623 bits below */
enum { SPARE = LIMBS * 64 - DEGREE };

/* With u = x^623 + x^396, the polynomial is the sum of x * u^32, of x * u^(31 - i) for each bit
 * i < 31 of the twist's constant, and of 1 for its bit 31. By Lucas' theorem u^k has the terms
 * x^(396 k + 227 s) for the s whose bits are all among those of k. */
static uint16_t terms[TERMS];

static void find_terms(void)
{
    static uint8_t odd[DEGREE + 1];
    memset(odd, 0, sizeof odd);
    odd[0] = 1;
    for (int k = 32; k >= 0; k--)
        if (k == 32 || (k > 0 && 0x9908b0dfu >> (31 - k) & 1u))
            for (int s = 0; s <= k; s++)
                if ((s & k) == s)
                    odd[1 + 396 * k + 227 * s] ^= 1;
    for (int i = 0, found = 0; i < DEGREE && found < TERMS; i++)
        if (odd[i])
            terms[found++] = (uint16_t)i;
}

/* polynomial += part * x^(bit), for the limbs of `part` between two zeros. */
KERNEL void add_shifted(uint64_t *polynomial, const uint64_t *part, int bit)
{
    uint64_t *into = polynomial + bit / 64;
    int shift = bit % 64;
    for (int i = 0; i <= CHUNK; i++)
        into[i] ^= part[i + 1] << shift | part[i] >> 1 >> (63 - shift);
}

/* The remainder modulo x^SPARE times the characteristic polynomial, whose leading term is bit 0 of
 * a limb. */
KERNEL void reduce(uint64_t *polynomial)
{
    for (int first = 2 * LIMBS - CHUNK; first >= LIMBS; first -= CHUNK) {
        uint64_t part[CHUNK + 2] = {0};
        memcpy(part + 1, polynomial + first, CHUNK * sizeof *part);
        memset(polynomial + first, 0, CHUNK * sizeof *part);
        for (int i = 0; i < TERMS; i++)
            add_shifted(polynomial, part, (first - LIMBS) * 64 + SPARE + terms[i]);
    }
}

/* The square over GF(2) of 32 coefficients: a zero is put after each. */
KERNEL uint64_t spread(uint64_t half)
{
    half = (half | half << 16) & 0x0000ffff0000ffffull;
    half = (half | half << 8) & 0x00ff00ff00ff00ffull;
    half = (half | half << 4) & 0x0f0f0f0f0f0f0f0full;
    half = (half | half << 2) & 0x3333333333333333ull;
    return (half | half << 1) & 0x5555555555555555ull;
}

/* x^exponent: square, and multiply by x. The leading 14 bits give a power below DEGREE. */
KERNEL void power(uint64_t exponent, uint64_t *result)
{
    int bits = 0;
    while (exponent >> bits >= 1u << 14)
        bits++;
    memset(result, 0, LIMBS * sizeof *result);
    result[(exponent >> bits) / 64] = 1ull << (exponent >> bits) % 64;
    while (bits-- > 0) {
        uint64_t square[2 * LIMBS + 1] = {0}, shifted = SPARE + (exponent >> bits & 1);
        for (int i = 0; i < LIMBS; i++) {
            square[2 * i + 1] = spread(result[i] & 0xffffffffu);
            square[2 * i + 2] = spread(result[i] >> 32);
        }
        for (int i = 0; i < 2 * LIMBS; i++)
            square[i] = square[i + 1] << shifted | square[i] >> (64 - shifted);
        reduce(square);
        for (int i = 0; i < LIMBS; i++)
            result[i] = square[i] >> SPARE | square[i + 1] << (64 - SPARE);
    }
}

enum { GROUP = 5, PATTERNS = 1 << GROUP, GROUPS = DEGREE / GROUP + 1 };
enum { TILE = 64, WIDTH = 10 * TILE }; /* words that stay in registers; WORDS + GROUP and more */

typedef uint32_t Lane __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    uint32_t sequence[33 * WORDS]; /* DEGREE - 1 + WIDTH and more */
    uint32_t sums[PATTERNS][WIDTH];
    uint16_t starts[GROUPS];
    int ends[PATTERNS];
} Workspace;

/* Order the places of coefficients, in groups of GROUP, by the pattern that they have. */
KERNEL void sort_groups(Workspace *space, const uint64_t *coefficients)
{
    int counts[PATTERNS + 1] = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < GROUPS; i++) {
            int bit = i * GROUP, limb = bit / 64, shift = bit % 64;
            uint64_t next = limb + 1 < LIMBS ? coefficients[limb + 1] : 0;
            uint64_t bits = coefficients[limb] >> shift | next << 1 << (63 - shift);
            int pattern = (int)(bits & (PATTERNS - 1));
            if (pass == 0)
                counts[pattern + 1]++;
            else
                space->starts[space->ends[pattern]++] = (uint16_t)bit;
        }
        for (int i = 0; i < PATTERNS && pass == 0; i++) {
            counts[i + 1] += counts[i];
            space->ends[i] = counts[i];
        }
    }
}

/* Move to the next block, and from there by the number of words whose power of x is given, to a
 * block of which `used` words are drawn. All runs of words with one pattern are added unshifted;
 * then the sums are shifted by the bits of the pattern. */
KERNEL void leap(Twister *twister, const uint64_t *coefficients, Workspace *space, int used)
{
    twister->used = used;
    for (int i = 0; i < 33; i++) {
        twist(twister->words);
        memcpy(space->sequence + i * WORDS, twister->words, sizeof twister->words);
    }
    sort_groups(space, coefficients);
    for (int tile = 0; tile < WIDTH; tile += TILE) {
        for (int pattern = 1, i = space->ends[0]; pattern < PATTERNS; pattern++) {
            Lane sum[TILE / 8] = {{0}};
            for (; i < space->ends[pattern]; i++) {
                const uint32_t *run = space->sequence + space->starts[i] + tile;
                for (int lane = 0; lane < TILE / 8; lane++)
                    sum[lane] ^= *(const Lane *)(run + 8 * lane);
            }
            memcpy(space->sums[pattern] + tile, sum, sizeof sum);
        }
    }
    memset(twister->words, 0, sizeof twister->words);
    for (int bit = GROUP - 1; bit >= 0; bit--) {
        for (int low = 0; low < 1 << bit; low++) {
            const uint32_t *sum = space->sums[(1 << bit) + low];
            for (int i = 0; i < WORDS; i++)
                twister->words[i] ^= sum[i + bit];
            for (int i = 0; low > 0 && i < WORDS + GROUP; i++)
                space->sums[low][i] ^= sum[i];
        }
    }
}

/* ---- Choice of a kernel ----------------------------------------------------------------------- */

typedef enum { FILL, ROWS, NORMAL_AT, SKIP, POWER, LEAP } Job;

/* A call from Python. */
typedef struct {
    Job job;
    int normal, dtype, fused, avx2;
    double first, second;
    unsigned long long state, target, count, places, chosen, begin, length, stride;
    uint64_t polynomial[LIMBS];
    Workspace *space;
} Task;

#define AT(address) ((void *)(uintptr_t)(address))

/* In each copy of the functions below the dtype and `fused` are constants. */
KERNEL void fill(Twister *twister, const Task *task, void *target, size_t count, int dtype,
                 bool fused)
{
    float first = (float)task->first, second = (float)task->second;
    if (dtype == FLOAT64)
        uniform_64(twister, target, count, task->first, task->second, fused);
    else if (task->normal)
        normal(twister, target, count, dtype, first, second, fused);
    else
        uniform_32(twister, target, count, dtype, first, second, fused);
}

/* `count` ranges of a fill, of `length` elements each, `stride` apart, the first from element
 * `begin` on; one after the other. Only the groups of 16 that hold them are computed. No two ranges
 * share a group. */
KERNEL void rows(Twister *twister, const Task *task, int dtype, bool fused)
{
    double drawn[PART]; /* for values of any dtype */
    char *out = AT(task->target);
    size_t done = 0, words = dtype == FLOAT64 ? 2 : 1;
    for (size_t row = 0; row < task->count; row++) {
        size_t begin = task->begin + row * task->stride, end = begin + task->length;
        size_t at = begin / 16 * 16;
        skip(twister, (at - done) * words);
        for (; at < end; at = done) {
            size_t width = (end - at + 15) / 16 * 16, from = at < begin ? begin - at : 0;
            width = width < PART ? width : PART;
            size_t to = width < end - at ? width : end - at;
            fill(twister, task, drawn, width, dtype, fused);
            memcpy(out, element(drawn, from, dtype), (size_t)(element(out, to - from, dtype) - out));
            out = element(out, to - from, dtype);
            done = at + width;
        }
    }
}

KERNEL void draw_as(Twister *twister, const Task *task, int dtype, bool fused)
{
    if (task->job == FILL)
        fill(twister, task, AT(task->target), (size_t)task->count, dtype, fused);
    else if (task->job == ROWS)
        rows(twister, task, dtype, fused);
    else if (dtype != FLOAT64)
        normal_at(twister, AT(task->places), (size_t)task->chosen, AT(task->target),
                  (size_t)task->count, dtype, (float)task->first, (float)task->second, fused);
}

KERNEL void run(Twister *twister, Task *task)
{
    switch (task->job) {
    case SKIP: skip(twister, task->count); return;
    case POWER: power(task->count, task->polynomial); return;
    case LEAP: leap(twister, task->polynomial, task->space, (int)task->count); return;
    default: break;
    }
    switch (2 * task->dtype + (task->fused != 0)) {
    case 2 * FLOAT32: draw_as(twister, task, FLOAT32, false); break;
    case 2 * FLOAT32 + 1: draw_as(twister, task, FLOAT32, true); break;
    case 2 * FLOAT64: draw_as(twister, task, FLOAT64, false); break;
    case 2 * FLOAT64 + 1: draw_as(twister, task, FLOAT64, true); break;
    case 2 * FLOAT16: draw_as(twister, task, FLOAT16, false); break;
    case 2 * FLOAT16 + 1: draw_as(twister, task, FLOAT16, true); break;
    case 2 * BFLOAT16: draw_as(twister, task, BFLOAT16, false); break;
    case 2 * BFLOAT16 + 1: draw_as(twister, task, BFLOAT16, true); break;
    default: break;
    }
}

static void run_anywhere(Twister *twister, Task *task) { run(twister, task); }

#if HAS_AVX2
FOR_AVX2 static void run_with_avx2(Twister *twister, Task *task) { run(twister, task); }
#else
#define run_with_avx2 run_anywhere
#endif

static bool cpu_has_avx2(void)
{
#if HAS_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

/* ---- Python ----------------------------------------------------------------------------------- */

/* Addresses are integers: lateinit/_native checks that the memory is valid. A state is torch's own
 * bytes, and is changed in place. Every call releases the GIL. */

static PyObject *perform(Task *task)
{
    Twister twister = {.used = WORDS};
    if (task->state != 0 && !load(&twister, AT(task->state))) {
        PyErr_SetString(PyExc_ValueError, "these bytes are not the state of a CPU generator");
        return NULL;
    }
    bool avx2 = task->avx2 && cpu_has_avx2();
    Py_BEGIN_ALLOW_THREADS
    (avx2 ? run_with_avx2 : run_anywhere)(&twister, task);
    if (task->state != 0)
        store(&twister, AT(task->state));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_fill(PyObject *module, PyObject *args)
{
    (void)module;
    Task task = {.job = FILL};
    if (!PyArg_ParseTuple(args, "KKKpippdd", &task.state, &task.target, &task.count, &task.normal,
                          &task.dtype, &task.fused, &task.avx2, &task.first, &task.second))
        return NULL;
    return perform(&task);
}

static PyObject *py_fill_rows(PyObject *module, PyObject *args)
{
    (void)module;
    Task task = {.job = ROWS};
    if (!PyArg_ParseTuple(args, "KKKKKKpippdd", &task.state, &task.target, &task.count,
                          &task.begin, &task.length, &task.stride, &task.normal, &task.dtype,
                          &task.fused, &task.avx2, &task.first, &task.second))
        return NULL;
    return perform(&task);
}

static PyObject *py_normal_at(PyObject *module, PyObject *args)
{
    (void)module;
    Task task = {.job = NORMAL_AT};
    if (!PyArg_ParseTuple(args, "KKKKKippdd", &task.state, &task.places, &task.chosen,
                          &task.target, &task.count, &task.dtype, &task.fused, &task.avx2,
                          &task.first, &task.second))
        return NULL;
    return perform(&task);
}

static PyObject *py_pass_over(PyObject *module, PyObject *args)
{
    (void)module;
    Task task = {.job = SKIP};
    if (!PyArg_ParseTuple(args, "KKp", &task.state, &task.count, &task.avx2))
        return NULL;
    return perform(&task);
}

static PyObject *py_polynomial(PyObject *module, PyObject *args)
{
    (void)module;
    Task task = {.job = POWER};
    if (!PyArg_ParseTuple(args, "Kp", &task.count, &task.avx2))
        return NULL;
    Py_XDECREF(perform(&task));
    return PyBytes_FromStringAndSize((const char *)task.polynomial, sizeof task.polynomial);
}

static PyObject *py_leap_by(PyObject *module, PyObject *args)
{
    (void)module;
    const char *bytes;
    Py_ssize_t length;
    Task task = {.job = LEAP};
    if (!PyArg_ParseTuple(args, "Ky#Kp", &task.state, &bytes, &length, &task.count, &task.avx2))
        return NULL;
    if (length != sizeof task.polynomial || task.count < 1 || task.count > WORDS) {
        PyErr_SetString(PyExc_ValueError, "these bytes are no polynomial, or `used` is no place");
        return NULL;
    }
    memcpy(task.polynomial, bytes, sizeof task.polynomial);
    task.space = malloc(sizeof *task.space);
    if (task.space == NULL)
        return PyErr_NoMemory();
    PyObject *result = perform(&task);
    free(task.space);
    return result;
}

static PyMethodDef methods[] = {
    {"fill", py_fill, METH_VARARGS, "Fill `count` elements by uniform_ or normal_."},
    {"fill_rows", py_fill_rows, METH_VARARGS, "Draw some rows of a uniform_ or normal_."},
    {"normal_at", py_normal_at, METH_VARARGS, "Draw the elements at some places of a normal_."},
    {"pass_over", py_pass_over, METH_VARARGS, "Move a state over words."},
    {"polynomial", py_polynomial, METH_VARARGS, "x**n modulo the characteristic polynomial."},
    {"leap_by", py_leap_by, METH_VARARGS, "Move to the next block, and on by a polynomial."},
    {NULL, NULL, 0, NULL},
};

static int on_import(PyObject *module)
{
    find_terms();
    return PyModule_AddIntConstant(module, "HAS_AVX2", cpu_has_avx2());
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, on_import}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
