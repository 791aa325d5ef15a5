// The C interface; its Python side is martlet/kernels/cpu/library.py.
#include <cstring>

#include "pack.hpp"
#include "step.hpp"

using namespace martlet;

#define API extern "C" __attribute__((visibility("default")))

API int martlet_widest_isa() { return widest_isa(); }

API int martlet_fastest_isa() { return fastest_isa(); }

// null when this processor cannot run `isa`.
API Executor* martlet_open(int threads, int spins, int isa) {
  if (isa < 0 || isa > widest_isa() || !kernels_for(Isa(isa))) return nullptr;
  return new Executor(threads, spins, Isa(isa));
}

API void martlet_close(Executor* executor) { delete executor; }

API int64_t martlet_panel_bytes(int format, int64_t k) { return panel_bytes(Format(format), k); }

API int64_t martlet_source_row_bytes(int source, int64_t k) { return source_row_bytes(source, k); }

// rows: 32 * panels addresses of rows, null for zeros.
API void martlet_pack(Executor* executor, int source, int target, const uint8_t* const* rows, int64_t panels, int64_t k,
                      uint8_t* out) {
  executor->team().run([&](Worker& worker) {
    worker.each((int)panels, 1, [&](int begin, int end) {
      for (int p = begin; p < end; ++p)
        pack_panel(source, Format(target), rows + int64_t(p) * kPanel, k, out + p * panel_bytes(Format(target), k));
    });
  });
}

// See Executor for what may happen between these.
API void martlet_begin(Executor* executor, const Op* ops, int n_ops, const Batch* batch) {
  executor->begin(ops, n_ops, *batch);
}

API void martlet_help(Executor* executor) { executor->help(); }

API void martlet_finish(Executor* executor) { executor->finish(); }

// Rows up to which a head of this format is worth a screen; 0: it is not.
API int martlet_screen_rows(Executor* executor, int format) { return executor->screen_rows(Format(format)); }

// head: packed panels. out: panels * martlet_panel_bytes(kScreen, k) bytes.
API void martlet_screen(Executor* executor, const Matrix* head, uint8_t* out) { executor->make_screen(*head, out); }

API void martlet_run(Executor* executor, const Op* ops, int n_ops, const Batch* batch) {
  executor->run(ops, n_ops, *batch);
}
