// What each instruction does, by the PTX ISA's chapter 9. Registers hold a value's bits; what is above its
// width is zero.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "../../llmc/cpu/bf16.h"
#include "../../llmc/cpu/fp8.h"
#include "machine.h"

namespace ptx {
namespace {

template <class T>
T as(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
uint64_t bits(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class F>
void each(uint32_t lanes, F f) {
    if (lanes == ~0u)
        for (int i = 0; i < 32; i++) f(i);
    else
        for (int i = 0; i < 32; i++)
            if (lanes >> i & 1) f(i);
}

// ---- arithmetic, comparisons

template <class T, auto F>
void unary(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t* a = w.source(in.o[1]);
    each(lanes, [&](int i) { d[i] = bits(F(as<T>(a[i]))); });
}
template <class T, auto F>
void binary(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t *a = w.source(in.o[1]), *b = w.source(in.o[2]);
    each(lanes, [&](int i) { d[i] = bits(F(as<T>(a[i]), as<T>(b[i]))); });
}
template <class T, auto F>
void ternary(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t *a = w.source(in.o[1]), *b = w.source(in.o[2]), *c = w.source(in.o[3]);
    each(lanes, [&](int i) { d[i] = bits(F(as<T>(a[i]), as<T>(b[i]), as<T>(c[i]))); });
}
// The second operand is a number of places, whatever the first is.
template <class T, auto F>
void shift(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t *a = w.source(in.o[1]), *b = w.source(in.o[2]);
    each(lanes, [&](int i) { d[i] = bits((T)F(as<T>(a[i]), (uint32_t)b[i])); });
}
void select(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t *a = w.source(in.o[1]), *b = w.source(in.o[2]), *p = w.source(in.o[3]);
    each(lanes, [&](int i) { d[i] = p[i] ? a[i] : b[i]; });
}
void insert_bits(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t *a = w.source(in.o[1]), *b = w.source(in.o[2]), *at = w.source(in.o[3]),
                   *n = w.source(in.o[4]);
    each(lanes, [&](int i) {
        uint32_t mask = 0;
        for (uint32_t k = at[i] & 255; k < std::min<uint64_t>(32, (at[i] & 255) + (n[i] & 255)); k++)
            mask |= 1u << k;
        d[i] = ((uint32_t)b[i] & ~mask) | ((uint32_t)a[i] << (at[i] & 31) & mask);
    });
}

// Bytes of b and a, b above: the selector's four digits say which, and whether it is the byte's sign that
// counts.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t from = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++, selector >>= 4) {
        auto byte = (uint8_t)(from >> 8 * (selector & 7));
        if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= (uint32_t)byte << 8 * i;
    }
    return out;
}
uint32_t reverse_bits(uint32_t x) {
    uint32_t y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}

// Of two numbers the larger; of a number and none, the number; 0 is larger than -0.
template <class T>
T larger(T x, T y) {
    if (x != x || y != y) return x != x ? y : x;
    return x > y || (x == y && !std::signbit(x)) ? x : y;
}
template <class T>
T smaller(T x, T y) {
    return -larger<T>(-x, -y);
}
float flush(float x) {  // .ftz
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
// x y + z rounded down. In double the product is exact, and so is what the sum's rounding has left out.
float fma_down(float x, float y, float z) {
    const double product = (double)x * y, sum = product + z;
    const double back = sum - product, left_out = (product - (sum - back)) + (z - back);
    float rounded = (float)sum;
    if ((double)rounded > sum || ((double)rounded == sum && left_out < 0))
        rounded = std::nextafter(rounded, -INFINITY);
    return rounded;
}

// ---- moves and conversions

void move(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    const Operand &to = in.o[0], &from = in.o[1];
    const auto low = [](int bytes) { return bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1; };
    if (from.kind == Operand::list) {  // packs
        const int part = in.bytes / (int)from.parts.size();
        uint64_t* d = w.reg(to.slot);
        each(lanes, [&](int i) {
            uint64_t all = 0;
            for (size_t k = 0; k < from.parts.size(); k++)
                all |= (w.source(from.parts[k])[i] & low(part)) << 8 * part * k;
            d[i] = all;
        });
    } else if (to.kind == Operand::list) {
        const int part = in.bytes / (int)to.parts.size();
        const uint64_t* a = w.source(from);
        each(lanes, [&](int i) {
            const uint64_t all = a[i];
            for (size_t k = 0; k < to.parts.size(); k++)
                if (to.parts[k].kind == Operand::reg)
                    w.reg(to.parts[k].slot)[i] = all >> 8 * part * k & low(part);
        });
    } else {
        uint64_t* d = w.reg(to.slot);
        const uint64_t *a = w.source(from), mask = low(in.bytes);
        each(lanes, [&](int i) { d[i] = a[i] & mask; });
    }
}

constexpr const char* kTypes[] = {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "bf16", "f32", "f64"};
enum Type { kS8, kU8, kS16, kU16, kS32, kU32, kS64, kU64, kBf16, kF32, kF64 };
enum Rounding { kAsItIs, kNearest, kTowardsZero, kDown, kUp };  // to whole numbers

int type_of(const std::string& word) {
    for (int t = 0; t <= kF64; t++)
        if (word == kTypes[t]) return t;
    return -1;
}
int64_t whole_number(uint64_t x, int type) {
    switch (type) {
        case kS8:
            return (int8_t)x;
        case kU8:
            return (uint8_t)x;
        case kS16:
            return (int16_t)x;
        case kU16:
            return (uint16_t)x;
        case kS32:
            return (int32_t)x;
        case kU32:
            return (uint32_t)x;
        default:
            return (int64_t)x;
    }
}
double number(uint64_t x, int type) {
    switch (type) {
        case kU64:
            return (double)x;
        case kBf16:
            return as<__nv_bfloat16>(x);
        case kF32:
            return as<float>(x);
        case kF64:
            return as<double>(x);
        default:
            return (double)whole_number(x, type);
    }
}
// Into the range of a whole number's type; what is no number becomes 0, or of 64 bits the lowest.
template <class T>
uint64_t clamped(double x) {
    if (x != x) return bits(sizeof(T) == 8 ? (T)INT64_MIN : T{0});
    if (x <= (double)std::numeric_limits<T>::lowest()) return bits(std::numeric_limits<T>::lowest());
    return bits(x >= (double)std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : (T)x);
}
uint64_t converted(uint64_t x, const Instruction& in) {
    const int from = in.from, to = in.to;
    if (from <= kU64 && to <= kU64) {
        const int64_t whole = whole_number(x, from);
        return to >= kS64   ? (uint64_t)whole
               : to >= kS32 ? (uint32_t)whole
               : to >= kS16 ? (uint16_t)whole
                            : (uint8_t)whole;
    }
    if (to == kF32 && from == kS64) return bits((float)(int64_t)x);
    if (to == kF32 && from == kU64) return bits((float)x);
    double value = number(x, from);
    switch (in.mode) {
        case kNearest:
            value = std::nearbyint(value);
            break;
        case kTowardsZero:
            value = std::trunc(value);
            break;
        case kDown:
            value = std::floor(value);
            break;
        case kUp:
            value = std::ceil(value);
            break;
    }
    if (in.sign) value = value > 0 ? std::min(value, 1.0) : 0.0;  // .sat; of what is no number, too
    switch (to) {
        case kS32:
            return clamped<int32_t>(value);
        case kU32:
            return clamped<uint32_t>(value);
        case kS64:
            return clamped<int64_t>(value);
        case kU64:
            return clamped<uint64_t>(value);
        case kBf16:
            return bits(__nv_bfloat16((float)value));
        case kF32:
            return bits((float)value);
        case kF64:
            return bits(value);
        default:
            fail("a float to so short a whole number");
    }
}
void convert(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t* a = w.source(in.o[1]);
    each(lanes, [&](int i) { d[i] = converted(a[i], in); });
}
uint32_t bf16_pair(float high, float low) {
    return (uint32_t)(bits(__nv_bfloat16(high)) << 16 | bits(__nv_bfloat16(low)));
}
template <__nv_fp8_interpretation_t FORMAT>
uint16_t fp8_pair(float high, float low) {
    return (uint16_t)(__nv_cvt_float_to_fp8(high, __NV_SATFINITE, FORMAT) << 8 |
                      __nv_cvt_float_to_fp8(low, __NV_SATFINITE, FORMAT));
}

// ---- memory

uint64_t address(Warp& w, const Operand& o, int lane) {
    return w.source(o)[lane] + (uint64_t)o.offset;
}
void load(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        const uint64_t at = address(w, in.o[1], i);
        const uint8_t* p = locate(b, w, i, in.space, at, in.bytes * in.elements);
        if (is_global(in.space, at)) check_early_read(w, i, at, in.bytes * in.elements);
        for (int e = 0; e < in.elements; e++) {
            const Operand& to = in.elements > 1 ? in.o[0].parts[e] : in.o[0];
            uint64_t x = 0;
            memcpy(&x, p + e * in.bytes, in.bytes);
            if (in.sign) x = in.bytes == 1 ? (uint32_t)(int8_t)x : (uint32_t)(int16_t)x;
            if (to.kind == Operand::reg) w.reg(to.slot)[i] = x;
        }
    });
}
uint8_t* place_to_write(Block& b, Warp& w, int lane, const Instruction& in, uint64_t at, int bytes) {
    uint8_t* p = locate(b, w, lane, in.space, at, bytes);
    if (is_global(in.space, at)) {
        if (!(w.waited >> lane & 1)) fail("lane %d writes, and has not waited for the kernel in front", lane);
        note_kernel_write(p, bytes);
    } else {
        note_write(b, w, lane, p, bytes);
    }
    return p;
}
void store(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        uint8_t* p = place_to_write(b, w, i, in, address(w, in.o[0], i), in.bytes * in.elements);
        for (int e = 0; e < in.elements; e++)
            memcpy(p + e * in.bytes, &w.source(in.elements > 1 ? in.o[1].parts[e] : in.o[1])[i], in.bytes);
    });
}
// atom, whose first operand gets what was there, and red, which has none.
template <class T, auto F>
void update(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    const bool returns = in.op.starts_with("atom");
    const Operand &place = in.o[returns], &operands = in.o[returns + 1];
    each(lanes, [&](int i) {
        uint8_t* p = place_to_write(b, w, i, in, address(w, place, i), (int)sizeof(T) * in.elements);
        for (int e = 0; e < in.elements; e++, p += sizeof(T)) {
            T before;
            memcpy(&before, p, sizeof(T));
            const T after = F(before, as<T>(w.source(in.elements > 1 ? operands.parts[e] : operands)[i]));
            memcpy(p, &after, sizeof(T));
            if (returns && in.o[0].kind == Operand::reg) w.reg(in.o[0].slot)[i] = bits(before);
        }
    });
}
template <bool TO_SPACE>
void change_window(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t* a = w.source(in.o[1]);
    const uint64_t window = in.space == Space::shared  ? kSharedWindow
                            : in.space == Space::local ? kLocalWindow
                                                       : 0;
    each(lanes, [&](int i) { d[i] = TO_SPACE ? a[i] - window : a[i] + window; });
}

// ---- cp.async

void deliver(Block& b, Warp& w, int lane, std::vector<AsyncCopy>& copies) {
    for (const AsyncCopy& c : copies) {
        uint8_t* to = locate(b, w, lane, Space::shared, c.to, c.bytes);
        note_write(b, w, lane, to, c.bytes);
        if (c.zeros)
            memset(to, 0, c.bytes);
        else
            memcpy(to, locate(b, w, lane, Space::global, c.from, c.bytes), c.bytes);
    }
    copies.clear();
}
void copy_async(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        const int bytes = (int)w.source(in.o[2])[i],
                  valid = in.o.size() > 3 ? (int)w.source(in.o[3])[i] : bytes;
        if (valid != 0 && valid != bytes) fail("a copy of %d bytes of %d", valid, bytes);
        if (valid != 0) check_early_read(w, i, address(w, in.o[1], i), bytes);
        w.open[i].push_back({address(w, in.o[0], i), address(w, in.o[1], i), bytes, valid == 0});
        if (!copies_are_late) deliver(b, w, i, w.open[i]);
    });
}
void close_group(Block&, Warp& w, const Instruction&, uint32_t lanes) {
    each(lanes, [&](int i) {
        w.groups[i].push_back(w.open[i]);
        w.open[i].clear();
    });
}
void wait_groups(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        for (; w.groups[i].size() > w.source(in.o[0])[i]; w.groups[i].pop_front())
            deliver(b, w, i, w.groups[i].front());
    });
}

// ---- a warp's lanes together

enum Shuffle { kShuffleUp, kShuffleDown, kShuffleXor, kShuffleIndex };
void shuffle(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t from[32], *d = w.reg(in.o[0].slot);
    memcpy(from, w.source(in.o[1]), sizeof from);  // d may be the same register
    const uint64_t *by = w.source(in.o[2]), *c = w.source(in.o[3]);
    each(lanes, [&](int i) {
        const int segment = (int)(c[i] >> 8 & 31), clamp = (int)(c[i] & 31), b = (int)(by[i] & 31);
        const int bound = (i & segment) | (clamp & ~segment);
        int j = in.from == kShuffleUp     ? i - b
                : in.from == kShuffleDown ? i + b
                : in.from == kShuffleXor  ? i ^ b
                                          : (i & segment) | (b & ~segment);
        const bool valid = in.from == kShuffleUp ? j >= bound : j <= bound;
        if (!valid) j = i;
        if (!(lanes >> j & 1)) fail("lane %d reads lane %d, which takes no part", i, j);
        d[i] = from[j] & 0xffffffff;
        if (in.o[0].predicate >= 0) w.reg(in.o[0].predicate)[i] = valid;
    });
}
uint32_t ballot_of(Warp& w, const Operand& o, uint32_t lanes) {
    uint32_t set = 0;
    const uint64_t* p = w.source(o);
    each(lanes, [&](int i) { set |= (uint32_t)((p[i] != 0) != o.negated) << i; });
    return set;
}
template <auto F>
void vote(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    const uint64_t result = F(ballot_of(w, in.o[1], lanes), lanes);
    uint64_t* d = w.reg(in.o[0].slot);
    each(lanes, [&](int i) { d[i] = result; });
}
template <auto F>
void reduce(Block&, Warp& w, const Instruction& in, uint32_t lanes) {
    uint64_t* d = w.reg(in.o[0].slot);
    const uint64_t* a = w.source(in.o[1]);
    uint32_t result = (uint32_t)a[std::countr_zero(lanes)];
    each(lanes & (lanes - 1), [&](int i) { result = F(result, (uint32_t)a[i]); });
    each(lanes, [&](int i) { d[i] = result; });
}
void nothing(Block&, Warp&, const Instruction&, uint32_t) {}

// ---- tensor cores. Lane 4 g + t of a warp has of an accumulator rows g and g + 8, columns 2 t and 2 t + 1
// of each 8; of a 16 x 16 operand the same of its four quarters (upper left, lower left, upper right, lower
// right).

float low_bf16(uint64_t pair) {
    return as<float>(pair << 16 & 0xffffffff);
}
float high_bf16(uint64_t pair) {
    return as<float>(pair & 0xffff0000);
}
void gather_a(float (&a)[16][16], Warp& w, const Operand& fragment) {
    for (int lane = 0; lane < 32; lane++)
        for (int q = 0; q < 4; q++) {
            const uint64_t pair = w.source(fragment.parts[q])[lane];
            float* at = &a[lane / 4 + q % 2 * 8][lane % 4 * 2 + q / 2 * 8];
            at[0] = low_bf16(pair);
            at[1] = high_bf16(pair);
        }
}
// d += a b, of columns 2 t, 2 t + 1 of each 8 of the N that b has: in the PTX's order of d's registers.
template <int N>
void multiply(Warp& w, const Operand& d, const Operand& c, bool add, const float (&a)[16][16],
              const float (&b)[16][N]) {
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < N / 2; e++) {
            const int row = lane / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            if (add) sum += as<float>(w.source(c.parts[e])[lane]);
            w.reg(d.parts[e].slot)[lane] = bits(sum);
        }
}
void mma(Block&, Warp& w, const Instruction& in, uint32_t) {  // {d}, {a}, {b}, {c}
    float a[16][16], b[16][8];
    gather_a(a, w, in.o[1]);
    for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
            const uint64_t pair = w.source(in.o[2].parts[half])[lane];
            b[half * 8 + lane % 4 * 2][lane / 4] = low_bf16(pair);
            b[half * 8 + lane % 4 * 2 + 1][lane / 4] = high_bf16(pair);
        }
    multiply<8>(w, in.o[0], in.o[3], true, a, b);
}
template <bool TRANSPOSED>
void load_matrices(Block& block, Warp& w, const Instruction& in, uint32_t) {  // {r0, r1, r2, r3}, [row]
    for (int q = 0; q < 4; q++) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; row++)
            memcpy(matrix[row],
                   locate(block, w, 8 * q + row, Space::shared, address(w, in.o[1], 8 * q + row), 16), 16);
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t first = TRANSPOSED ? matrix[t][g] : matrix[g][t];
            const uint32_t second = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
            w.reg(in.o[0].parts[q].slot)[lane] = first | second << 16;
        }
    }
}
// Element (row, k) of a matrix of 64 rows and 16 columns in shared memory, by its descriptor (PTX ISA,
// "Matrix descriptor") with 128-byte swizzle: rows, or for a transposed one columns, of 128 bytes lie in
// groups of 8. Its place is one of those that the product reads.
float described(Block& block, Warp& w, Product& product, uint64_t descriptor, bool transposed, int row,
                int k) {
    if (descriptor >> 62 != 1) fail("a descriptor without 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const int line = transposed ? k : row, within = transposed ? row : k;
    uint32_t at = start + line % 8 * 128 + line / 8 * stride + within * 2;
    at ^= at >> 3 & 0x70;
    const uint8_t* p = locate(block, w, 0, Space::shared, at, 2);
    const auto word = (uint32_t)((p - block.shared.data()) / 4);
    check_fenced(block, word);
    product.words.push_back(word);
    uint16_t x;
    memcpy(&x, p, 2);
    return low_bf16(x);
}
// One warp's 16 rows of the 64: {d}, a or {a}, b, add, 1, 1, [a transposed,] b transposed.
void wgmma(Block& block, Warp& w, const Instruction& in, uint32_t) {
    const bool a_in_registers = in.o[1].kind == Operand::list;
    const auto constant = [&](size_t i) { return w.source(in.o.at(i))[0]; };
    const bool b_transposed = constant(a_in_registers ? 6 : 7);
    if (constant(4) != 1 || constant(5) != 1) fail("signs of operands are not known here");
    Product product;
    for (const Operand& sum : in.o[0].parts) product.sums.push_back(sum.slot);
    for (const Operand& fragment : in.o[1].parts) product.fragments.push_back(fragment.slot);
    float a[16][16], b[16][64];
    if (a_in_registers) gather_a(a, w, in.o[1]);
    for (int k = 0; k < 16; k++) {
        for (int r = 0; r < 16 && !a_in_registers; r++)
            a[r][k] = described(block, w, product, constant(1), constant(6), w.number % 4 * 16 + r, k);
        for (int n = 0; n < 64; n++) b[k][n] = described(block, w, product, constant(2), b_transposed, n, k);
    }
    begin_product(block, w, std::move(product));
    multiply<64>(w, in.o[0], in.o[0], constant(3), a, b);
}
void wgmma_fence(Block&, Warp& w, const Instruction&, uint32_t) {
    fence_registers(w);
}
void wgmma_commit(Block&, Warp& w, const Instruction&, uint32_t) {
    commit_products(w);
}
void wgmma_wait(Block& block, Warp& w, const Instruction& in, uint32_t) {
    wait_products(block, w, w.source(in.o[0])[0]);
}
void fence_proxy(Block& block, Warp& w, const Instruction&, uint32_t lanes) {
    fence_writes(block, w, lanes);
}

// ---- clusters. A shared address in another block of the cluster has that block's number + 1 in its upper
// byte.

Mailbox& mailbox(Block& b, uint64_t at) {
    const auto it = b.mailboxes.find((uint32_t)at);
    if (it == b.mailboxes.end()) fail("there is no mbarrier at %llx", (unsigned long long)at);
    return it->second;
}
void open_mailbox(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        const uint64_t at = address(w, in.o[0], i);
        locate(b, w, i, Space::shared, at, 8);
        const auto count = (int64_t)w.source(in.o[1])[i];
        b.mailboxes[(uint32_t)at] = {.count = count, .pending = count};
    });
}
void expect_bytes(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        Mailbox& box = mailbox(b, address(w, in.o[1], i));
        box.bytes += (int64_t)w.source(in.o[2])[i];
        box.pending--;
        box.settle();
    });
}
void has_phase_passed(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        w.reg(in.o[0].slot)[i] = (uint64_t)mailbox(b, address(w, in.o[1], i)).phase != w.source(in.o[2])[i];
    });
}
void map_address(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {
    each(lanes, [&](int i) {
        const uint64_t rank = w.source(in.o[2])[i];
        if (rank >= b.cluster->blocks.size()) fail("a cluster has no block %d", (int)rank);
        w.reg(in.o[0].slot)[i] = (uint32_t)w.source(in.o[1])[i] | (rank + 1) << 24;
    });
}
void store_async(Block& b, Warp& w, const Instruction& in, uint32_t lanes) {  // [to], x, [mbarrier]
    each(lanes, [&](int i) {
        const uint64_t to = address(w, in.o[0], i), box = address(w, in.o[2], i);
        if (to >> 24 == 0 || to >> 24 != box >> 24) fail("a place and its mbarrier in different blocks");
        Block& there = *b.cluster->blocks[(to >> 24) - 1];
        if (there.done()) fail("a store into a block that has ended");
        uint8_t* p = locate(there, w, i, Space::shared, to & 0xffffff, 4 * in.elements);
        for (int e = 0; e < in.elements; e++)
            memcpy(p + 4 * e, &w.source(in.elements > 1 ? in.o[1].parts[e] : in.o[1])[i], 4);
        Mailbox& mail = mailbox(there, box & 0xffffff);
        mail.bytes -= 4 * in.elements;
        mail.settle();
    });
}
void arrive_at_cluster(Block& b, Warp& w, const Instruction&, uint32_t lanes) {
    each(lanes, [&](int i) {
        if (w.arrived[i]) fail("lane %d arrives at the cluster's barrier a second time", i);
        w.arrived[i] = true;
        w.phase[i] = b.cluster->phase;
        b.cluster->arrived++;
    });
    b.cluster->settle();
}

// ---- kernels that begin early

void wait_for_previous(Block&, Warp& w, const Instruction&, uint32_t lanes) {
    w.waited |= lanes;
}
void launch_dependents(Block&, Warp& w, const Instruction&, uint32_t lanes) {
    start_next_kernel(w, lanes);
}

// ---- the table

template <class T>
void add_comparisons(std::unordered_map<std::string, Action>& table, const std::string& type) {
    table["setp.eq." + type] = binary<T, [](T x, T y) { return x == y; }>;
    table["setp.ne." + type] = binary<T, [](T x, T y) { return (x < y || x > y); }>;  // of numbers
    table["setp.lt." + type] = binary<T, [](T x, T y) { return x < y; }>;
    table["setp.le." + type] = binary<T, [](T x, T y) { return x <= y; }>;
    table["setp.gt." + type] = binary<T, [](T x, T y) { return (x > y); }>;
    table["setp.ge." + type] = binary<T, [](T x, T y) { return x >= y; }>;
    if (std::numeric_limits<T>::is_integer) return;
    // and where one is no number
    table["setp.equ." + type] = binary<T, [](T x, T y) { return !(x < y || x > y); }>;
    table["setp.neu." + type] = binary<T, [](T x, T y) { return x != y; }>;
    table["setp.ltu." + type] = binary<T, [](T x, T y) { return !(x >= y); }>;
    table["setp.leu." + type] = binary<T, [](T x, T y) { return !(x > y); }>;
    table["setp.gtu." + type] = binary<T, [](T x, T y) { return !(x <= y); }>;
    table["setp.geu." + type] = binary<T, [](T x, T y) { return !(x < y); }>;
    table["setp.num." + type] = binary<T, [](T x, T y) { return x == x && y == y; }>;
    table["setp.nan." + type] = binary<T, [](T x, T y) { return x != x || y != y; }>;
}
// What is the same for numbers of one width, whole or not, signed or not.
template <class T>
void add_integers(std::unordered_map<std::string, Action>& table, const std::string& width) {
    using Signed = std::make_signed_t<T>;
    for (const char* kind : {"s", "u", "b"}) {
        const std::string type = kind + width;
        table["add." + type] = binary<T, [](T x, T y) -> T { return x + y; }>;
        table["sub." + type] = binary<T, [](T x, T y) -> T { return x - y; }>;
        table["mul.lo." + type] = binary<T, [](T x, T y) -> T { return (T)((uint64_t)x * y); }>;
        table["mad.lo." + type] = ternary<T, [](T x, T y, T z) -> T { return (T)((uint64_t)x * y + z); }>;
        table["neg." + type] = unary<T, [](T x) -> T { return (T)-x; }>;
        table["selp." + type] = select;
    }
    table["selp.f" + width] = select;
    table["and.b" + width] = binary<T, [](T x, T y) -> T { return x & y; }>;
    table["or.b" + width] = binary<T, [](T x, T y) -> T { return x | y; }>;
    table["xor.b" + width] = binary<T, [](T x, T y) -> T { return x ^ y; }>;
    table["not.b" + width] = unary<T, [](T x) -> T { return (T)~x; }>;
    constexpr uint32_t kBits = 8 * sizeof(T);
    table["shl.b" + width] = shift<T, [](T x, uint32_t n) -> T { return n < kBits ? (T)(x << n) : 0; }>;
    for (const char* kind : {"u", "b"})
        table["shr." + (kind + width)] =
            shift<T, [](T x, uint32_t n) -> T { return (n < kBits ? (T)(x >> n) : 0); }>;
    table["shr.s" + width] =
        shift<Signed, [](Signed x, uint32_t n) { return (x >> std::min(n, kBits - 1)); }>;
    table["min.u" + width] = binary<T, [](T x, T y) { return std::min(x, y); }>;
    table["max.u" + width] = binary<T, [](T x, T y) { return std::max(x, y); }>;
    table["min.s" + width] = binary<Signed, [](Signed x, Signed y) { return std::min(x, y); }>;
    table["max.s" + width] = binary<Signed, [](Signed x, Signed y) { return std::max(x, y); }>;
    table["div.u" + width] = binary<T, [](T x, T y) -> T { return y ? x / y : (T)~T{0}; }>;
    table["rem.u" + width] = binary<T, [](T x, T y) -> T { return y ? x % y : x; }>;
    table["div.s" + width] = binary<Signed, [](Signed x, Signed y) -> Signed {
        return y == 0 ? -1 : y == -1 ? (Signed) - (T)x : (Signed)(x / y);
    }>;
    table["rem.s" + width] =
        binary<Signed, [](Signed x, Signed y) -> Signed { return y == 0    ? x
                                                                 : y == -1 ? 0
                                                                           : x % y; }>;
    add_comparisons<T>(table, "u" + width);
    add_comparisons<T>(table, "b" + width);
    add_comparisons<Signed>(table, "s" + width);
}
template <class T>
void add_floats(std::unordered_map<std::string, Action>& table, const std::string& type) {
    for (const char* rounding : {"", "rn."}) {
        table["add." + (rounding + type)] = binary<T, [](T x, T y) { return x + y; }>;
        table["sub." + (rounding + type)] = binary<T, [](T x, T y) { return x - y; }>;
        table["mul." + (rounding + type)] = binary<T, [](T x, T y) { return x * y; }>;
    }
    table["div.rn." + type] = binary<T, [](T x, T y) { return x / y; }>;
    table["rcp.rn." + type] = unary<T, [](T x) { return 1 / x; }>;
    table["sqrt.rn." + type] = unary<T, [](T x) { return std::sqrt(x); }>;
    table["fma.rn." + type] = ternary<T, [](T x, T y, T z) { return std::fma(x, y, z); }>;
    table["neg." + type] = unary<T, [](T x) { return -x; }>;
    table["abs." + type] = unary<T, [](T x) { return std::fabs(x); }>;
    table["min." + type] = binary<T, smaller<T>>;
    table["max." + type] = binary<T, larger<T>>;
    add_comparisons<T>(table, type);
}
std::unordered_map<std::string, Action> make_table() {
    std::unordered_map<std::string, Action> table = {
        {"and.pred", binary<uint64_t, [](uint64_t x, uint64_t y) { return x & y; }>},
        {"or.pred", binary<uint64_t, [](uint64_t x, uint64_t y) { return x | y; }>},
        {"xor.pred", binary<uint64_t, [](uint64_t x, uint64_t y) { return x ^ y; }>},
        {"not.pred", unary<uint64_t, [](uint64_t x) { return x ^ 1; }>},
        {"mul.wide.u16", binary<uint16_t, [](uint32_t x, uint32_t y) { return x * y; }>},
        {"mul.wide.s16", binary<int16_t, [](int32_t x, int32_t y) { return x * y; }>},
        {"mul.wide.u32", binary<uint32_t, [](uint64_t x, uint64_t y) { return x * y; }>},
        {"mul.wide.s32", binary<int32_t, [](int64_t x, int64_t y) { return x * y; }>},
        {"mul.hi.u32", binary<uint32_t, [](uint64_t x, uint64_t y) { return (uint32_t)(x * y >> 32); }>},
        {"mul.hi.s32", binary<int32_t, [](int64_t x, int64_t y) { return (int32_t)(x * y >> 32); }>},
        {"mul.hi.u64",
         binary<uint64_t, [](unsigned __int128 x, unsigned __int128 y) { return (uint64_t)(x * y >> 64); }>},
        {"brev.b32", unary<uint32_t, reverse_bits>},
        {"popc.b32", unary<uint32_t, [](uint32_t x) { return std::popcount(x); }>},
        {"clz.b32", unary<uint32_t, [](uint32_t x) { return std::countl_zero(x); }>},
        {"bfind.u32", unary<uint32_t, [](uint32_t x) { return 31 - std::countl_zero(x); }>},
        {"bfind.shiftamt.u32", unary<uint32_t, [](uint32_t x) { return x ? std::countl_zero(x) : -1; }>},
        {"bfi.b32", insert_bits},
        {"prmt.b32", ternary<uint32_t, permute>},
        {"fma.rm.f32", ternary<float, fma_down>},
        {"ex2.approx.f32", unary<float, [](float x) { return std::exp2(x); }>},
        {"ex2.approx.ftz.f32", unary<float, [](float x) { return flush(std::exp2(flush(x))); }>},
        {"lg2.approx.f32", unary<float, [](float x) { return std::log2(x); }>},
        {"rsqrt.approx.f32", unary<float, [](float x) { return 1 / std::sqrt(x); }>},
        {"cvt.rn.bf16x2.f32", binary<float, bf16_pair>},
        {"cvt.rn.satfinite.e4m3x2.f32", binary<float, fp8_pair<__NV_E4M3>>},
        {"cvt.rn.satfinite.e5m2x2.f32", binary<float, fp8_pair<__NV_E5M2>>},
        {"cp.async.cg.shared.global", copy_async},
        {"cp.async.commit_group", close_group},
        {"cp.async.wait_group", wait_groups},
        {"fence.proxy.async.shared::cta", fence_proxy},
        {"mbarrier.init.shared::cta.b64", open_mailbox},
        {"mbarrier.arrive.expect_tx.shared::cta.b64", expect_bytes},
        {"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", has_phase_passed},
        {"mapa.shared::cluster.u32", map_address},
        {"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32", store_async},
        {"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32", store_async},
        // one memory for all, and each kernel behind the one before
        {"membar.gl", nothing},
        {"fence.mbarrier_init.release.cluster", nothing},
        {"griddepcontrol.wait", wait_for_previous},
        {"griddepcontrol.launch_dependents", launch_dependents},
    };
    add_integers<uint16_t>(table, "16");
    add_integers<uint32_t>(table, "32");
    add_integers<uint64_t>(table, "64");
    add_floats<float>(table, "f32");
    add_floats<double>(table, "f64");
    return table;
}

// Those of a whole warp, or of the lanes that operand `members` names (-1: of all).
struct WarpInstruction {
    Action action;
    int members;
};
const std::unordered_map<std::string, WarpInstruction>& warp_instructions() {
    static const std::unordered_map<std::string, WarpInstruction> table = {
        {"bar.warp.sync", {nothing, 0}},
        {"shfl.sync.up.b32", {shuffle, 4}},
        {"shfl.sync.down.b32", {shuffle, 4}},
        {"shfl.sync.bfly.b32", {shuffle, 4}},
        {"shfl.sync.idx.b32", {shuffle, 4}},
        {"vote.sync.ballot.b32", {vote<[](uint32_t set, uint32_t) { return set; }>, 2}},
        {"vote.sync.any.pred", {vote<[](uint32_t set, uint32_t) { return set != 0; }>, 2}},
        {"vote.sync.all.pred", {vote<[](uint32_t set, uint32_t all) { return set == all; }>, 2}},
        {"redux.sync.max.u32", {reduce<[](uint32_t x, uint32_t y) { return std::max(x, y); }>, 2}},
        {"redux.sync.min.u32", {reduce<[](uint32_t x, uint32_t y) { return std::min(x, y); }>, 2}},
        {"redux.sync.add.s32", {reduce<[](uint32_t x, uint32_t y) { return x + y; }>, 2}},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma, -1}},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", {load_matrices<false>, -1}},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", {load_matrices<true>, -1}},
        {"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", {wgmma, -1}},
        {"wgmma.fence.sync.aligned", {wgmma_fence, -1}},
        {"wgmma.commit_group.sync.aligned", {wgmma_commit, -1}},
        {"wgmma.wait_group.sync.aligned", {wgmma_wait, -1}},
        {"barrier.cluster.arrive.relaxed.aligned", {arrive_at_cluster, -1}},
    };
    return table;
}
const std::unordered_map<std::string, Flow>& flow_instructions() {
    static const std::unordered_map<std::string, Flow> table = {
        {"bra", Flow::branch},
        {"bra.uni", Flow::branch},
        {"ret", Flow::exit},
        {"exit", Flow::exit},
        {"bar.sync", Flow::block_barrier},
        {"bar.red.or.pred", Flow::block_barrier},
        {"barrier.cluster.wait.aligned", Flow::cluster_wait},
    };
    return table;
}

// "ld", "global", "v4", "u32"
std::vector<std::string> words_of(const std::string& op) {
    std::vector<std::string> words;
    for (size_t begin = 0, end; begin <= op.size(); begin = end + 1) {
        end = std::min(op.find('.', begin), op.size());
        words.push_back(op.substr(begin, end - begin));
    }
    return words;
}
int bytes_of(const std::string& type) {
    return type == "pred" ? 1 : atoi(type.c_str() + type.find_first_of("0123456789")) / 8;
}

// In atom and red: the update of a type.
Action update_of(const std::vector<std::string>& words) {
    const std::string what = words[words.size() - 2] == "v2" ? words[words.size() - 3] + "." + words.back()
                                                             : words[words.size() - 2] + "." + words.back();
    static const std::unordered_map<std::string, Action> table = {
        {"add.u32", update<uint32_t, [](uint32_t x, uint32_t y) { return x + y; }>},
        {"add.s32", update<uint32_t, [](uint32_t x, uint32_t y) { return x + y; }>},
        {"add.u64", update<uint64_t, [](uint64_t x, uint64_t y) { return x + y; }>},
        {"add.f32", update<float, [](float x, float y) { return x + y; }>},
        {"max.s32", update<int32_t, [](int32_t x, int32_t y) { return std::max(x, y); }>},
        {"max.u32", update<uint32_t, [](uint32_t x, uint32_t y) { return std::max(x, y); }>},
        {"min.s32", update<int32_t, [](int32_t x, int32_t y) { return std::min(x, y); }>},
        {"min.u32", update<uint32_t, [](uint32_t x, uint32_t y) { return std::min(x, y); }>},
    };
    const auto it = table.find(what);
    return it == table.end() ? nullptr : it->second;
}

}  // namespace

bool decode(Instruction& in) {
    static const std::unordered_map<std::string, Action> table = make_table();
    const std::vector<std::string> words = words_of(in.op);
    const auto has = [&](const char* word) {
        return std::find(words.begin(), words.end(), word) != words.end();
    };
    in.elements = has("v4") ? 4 : has("v2") ? 2 : 1;
    in.space = has("global")                                                   ? Space::global
               : has("shared") || has("shared::cta") || has("shared::cluster") ? Space::shared
               : has("local")                                                  ? Space::local
               : has("param")                                                  ? Space::param
                                                                               : Space::generic;
    // In loops that wait for another thread; and while products are under way, so that who gets at their
    // tiles is seen.
    in.yields = has("acquire") || has("acq_rel") || has("volatile") || in.op.starts_with("wgmma.commit");

    if (const auto it = table.find(in.op); it != table.end()) {
        in.action = it->second;
    } else if (const auto warp = warp_instructions().find(in.op); warp != warp_instructions().end()) {
        in.action = warp->second.action;
        in.members = warp->second.members;
        in.flow = Flow::whole_warp;
        in.from = has("up")     ? kShuffleUp
                  : has("down") ? kShuffleDown
                  : has("bfly") ? kShuffleXor
                                : kShuffleIndex;
    } else if (const auto flow = flow_instructions().find(in.op); flow != flow_instructions().end()) {
        in.action = nothing;
        in.flow = flow->second;
    } else if (words[0] == "mov") {
        in.action = move;
        in.bytes = bytes_of(words.back());
    } else if (words[0] == "ld" || words[0] == "st") {
        in.action = words[0] == "ld" ? load : store;
        in.bytes = bytes_of(words.back());
        in.sign = words.back()[0] == 's' && in.bytes < 4;
    } else if (words[0] == "atom" || words[0] == "red") {
        in.action = update_of(words);
    } else if (words[0] == "cvta") {
        in.action = has("to") ? change_window<true> : change_window<false>;
    } else if (words[0] == "cvt") {
        in.action = convert;
        in.to = type_of(words[words.size() - 2]);
        in.from = type_of(words.back());
        in.sign = has("sat");
        if (in.to < 0 || in.from < 0) return false;
        in.mode = has("rni")   ? kNearest
                  : has("rzi") ? kTowardsZero
                  : has("rmi") ? kDown
                  : has("rpi") ? kUp
                               : kAsItIs;
    }
    return in.action != nullptr;
}

}  // namespace ptx
