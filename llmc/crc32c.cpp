#include "crc32c.h"

#ifdef __x86_64__
#include <nmmintrin.h>
#endif

#include <array>
#include <bit>
#include <cstring>

namespace {

// tables[k][b]: what byte b does to the checksum when k more bytes follow it.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        tables[0][b] = crc;
    }
    for (size_t k = 1; k < 8; k++)
        for (size_t b = 0; b < 256; b++)
            tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
    return tables;
}

constexpr auto kTables = make_tables();

#ifdef __x86_64__
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* data, size_t size, uint32_t crc) {
    const unsigned char* at = static_cast<const unsigned char*>(data);
    uint64_t c = ~crc;
    for (; size >= 8; at += 8, size -= 8) {
        uint64_t x;
        memcpy(&x, at, 8);
        c = _mm_crc32_u64(c, x);
    }
    crc = static_cast<uint32_t>(c);
    for (; size > 0; at++, size--) crc = _mm_crc32_u8(crc, *at);
    return ~crc;
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t size, uint32_t crc) {
    const auto& t = kTables;
    const unsigned char* at = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; size >= 8; at += 8, size -= 8) {  // eight bytes at once: their tables do not wait for one another
        uint64_t x;
        memcpy(&x, at, 8);
        x ^= crc;
        crc = t[7][x & 255] ^ t[6][x >> 8 & 255] ^ t[5][x >> 16 & 255] ^ t[4][x >> 24 & 255] ^
              t[3][x >> 32 & 255] ^ t[2][x >> 40 & 255] ^ t[1][x >> 48 & 255] ^ t[0][x >> 56];
    }
    for (; size > 0; at++, size--) crc = crc >> 8 ^ t[0][(crc ^ *at) & 255];
    return ~crc;
}

uint32_t crc32c(const void* data, size_t size, uint32_t crc) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2")) return crc32c_sse42(data, size, crc);
#endif
    return crc32c_portable(data, size, crc);
}

uint32_t mask_crc(uint32_t crc) {
    return std::rotr(crc, 15) + 0xa282ead8u;
}

uint32_t unmask_crc(uint32_t masked) {
    return std::rotl(masked - 0xa282ead8u, 15);
}
