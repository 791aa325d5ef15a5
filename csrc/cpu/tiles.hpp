// AMX: eight registers of 16 rows by 64 bytes, and a unit that multiplies two of them into a third.
//
// C[16 rows][16 outputs] += A[16 rows][inputs] * B[inputs][16 outputs], where B has the inputs that fill 32 bits beside
// each other: exactly a panel's layout (formats.hpp) and that of keys and values in the cache (program.hpp). So no
// weight is packed another way for it, and whether a product goes through here is decided by the number of rows.
//
// A product takes 16 cycles for 16 x 64 x 16 bytes, ten times what VNNI does, and 9 with fewer rows or inputs: never
// fewer rows than 16, the rest is computed and thrown away. Whoever hands rows to these kernels lets them read up to 15
// rows more than there are.
#pragma once

#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr int kTileRows = 16, kTileOutputs = 16;
constexpr int kTileBytes = 64, kHalfTileBytes = 32;  // of inputs a product takes, with A and B, or the HALF ones

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)

constexpr bool kTiles = true;

// One set of shapes serves every kernel, since changing it costs 160 cycles. Instructions name registers by number.
#define TILE_C0 0  // 16 x 64 bytes: sums
#define TILE_C1 1
#define TILE_C2 2
#define TILE_C3 3
#define TILE_A 4  // 16 x 64 bytes
#define TILE_B 5
#define TILE_HALF_A 6  // 16 x 32 bytes
#define TILE_HALF_B 7  // 8 x 64 bytes

struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

constexpr TileShapes kShapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 32, 64}, {16, 16, 16, 16, 16, 16, 16, 8}};

// Around everything a thread multiplies in a step: others in the process may use tiles too, of other shapes, and a
// thread that holds none is switched faster.
inline void take_tiles() { _tile_loadconfig(&kShapes); }
inline void leave_tiles() { _tile_release(); }

// Compilers do not know that loading a tile reads memory: stands between writing a line and loading it.
INLINE void written() { __asm__ volatile("" ::: "memory"); }

#else

constexpr bool kTiles = false;
inline void take_tiles() {}
inline void leave_tiles() {}

#endif

}  // namespace MARTLET_ISA
}  // namespace martlet
