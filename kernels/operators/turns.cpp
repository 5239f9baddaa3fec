// The turns of a process, for its runtime.
#include "turns.h"

#include "exported.h"

namespace ive {

Turns& turns() {
  static Turns all;
  return all;
}

}  // namespace ive

IVE_EXPORT void ive_turns_begin_tiles() { ive::turns().begin_tiles(); }
IVE_EXPORT void ive_turns_end_tiles() { ive::turns().end_tiles(); }
IVE_EXPORT void ive_turns_rest() { ive::rest(); }
IVE_EXPORT double ive_turns_enter(double share) { return ive::turns().enter(share); }
IVE_EXPORT void ive_turns_leave() { ive::turns().leave(); }
