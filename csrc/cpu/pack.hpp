// Weights from the file's layout into panels, and single rows back.
#pragma once

#include <cstdint>

#include "formats.hpp"

namespace martlet {

// Bytes of one row of k inputs as it lies in a file; `source` is any block format, kInt8 (a float32 scale, then
// bytes), kF32, kBF16 or kF16.
int64_t source_row_bytes(int source, int64_t k);

// Fills one panel from its 32 rows; null rows are zeros. Formats keep their bits when source == target; else rows go
// through f32: to kF32 and kBF16 (rounded), to kInt8 and kQ4_1 (quantised, to the nearest).
void pack_panel(int source, Format target, const uint8_t* const rows[kPanel], int64_t k, uint8_t* panel);

// One row of a panel as floats.
void unpack_row(Format f, const uint8_t* panel, int lane, int64_t k, float* out);

}  // namespace martlet
