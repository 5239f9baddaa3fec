// What callers of the library see; the rest is hidden.
#pragma once

#include <cstdint>

#define IVE_EXPORT extern "C" __attribute__((visibility("default")))
