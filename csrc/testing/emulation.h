// How the test module's functions ask for emulation, and what they say of it. Part of what is behind _fastattn_core.
#pragma once

#include <string>
#include <tuple>

#include "testing/arrays.h"
#include "testing/emulated_engine.h"

namespace fastattn::testing {

using emulator::CopyTiming;
using emulator::Run;
using emulator::SiteKind;

inline SiteKind site_kind_from_name(const std::string& name) {
  for (const SiteKind kind : {SiteKind::kBarrier, SiteKind::kWarpBarrier, SiteKind::kCpAsyncWait}) {
    if (name == emulator::site_kind_name(kind)) return kind;
  }
  refuse("a call of kind '" + name + "' cannot be left out.");
}

// How a call is emulated: the keyword argument `emulator`, a dict.
struct Emulation {
  emulator::Options options;
  int os_threads = 2;
  // Of the device that is played: many multiprocessors make the engine split the keys.
  cuda::DeviceProperties device{80, 1, 99 * 1024};
  bool unswizzled = false;

  static Emulation from(const py::dict& settings) {
    Emulation e;
    for (const auto& [key, value] : settings) {
      const std::string name = py::cast<std::string>(key);
      if (name == "seed") {
        e.options.seed = py::cast<uint64_t>(value);
      } else if (name == "random_order") {
        e.options.random_order = py::cast<bool>(value);
      } else if (name == "copies") {
        const std::string timing = py::cast<std::string>(value);
        e.options.cp_async_timing = timing == "at_issue"  ? CopyTiming::kAtIssue
                                    : timing == "at_wait" ? CopyTiming::kAtWait
                                                          : CopyTiming::kRandom;
      } else if (name == "skip") {
        const auto [file, line, kind] = py::cast<std::tuple<std::string, int, std::string>>(value);
        e.options.skip_site = {file, line, site_kind_from_name(kind)};
      } else if (name == "count_bank_conflicts") {
        e.options.count_bank_conflicts = py::cast<bool>(value);
      } else if (name == "detect_races") {
        e.options.detect_races = py::cast<bool>(value);
      } else if (name == "threads") {
        e.os_threads = py::cast<int>(value);
      } else if (name == "multiprocessors") {
        e.device.multiprocessors = py::cast<int>(value);
      } else if (name == "unswizzled") {
        e.unswizzled = py::cast<bool>(value);
      } else {
        throw py::type_error("_fastattn_core: there is no setting " + name + " of the emulator.");
      }
    }
    return e;
  }
};

// What ran: {"kernels": [...], "bank_conflicts_load": n, "bank_conflicts_store": n, "sites": [(file, line, kind, calls,
// bank conflicts), ...]}.
inline py::dict as_dict(const Run& run) {
  py::dict result;
  result["kernels"] = run.kernels;
  result["bank_conflicts_load"] = run.report.bank_conflicts_load;
  result["bank_conflicts_store"] = run.report.bank_conflicts_store;
  py::list sites;
  for (const auto& site : run.report.sites) {
    sites.append(
        py::make_tuple(site.file, site.line, emulator::site_kind_name(site.kind), site.calls, site.bank_conflicts));
  }
  result["sites"] = sites;
  return result;
}

}  // namespace fastattn::testing
