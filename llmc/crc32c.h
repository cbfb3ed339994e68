// CRC32C, the checksum of TensorFlow's checkpoints: the polynomial 0x1edc6f41, bits in reverse.
#pragma once
#include <cstddef>
#include <cstdint>

// Without a special instruction. The bytes may come in pieces: `crc` is the result for those before.
uint32_t crc32c_portable(const void* data, size_t size, uint32_t crc = 0);

uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

uint32_t mask_crc(uint32_t crc);
uint32_t unmask_crc(uint32_t masked);
