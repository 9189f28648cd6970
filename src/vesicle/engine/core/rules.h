// What becomes of levels; see effectors/rules.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"

namespace vesicle {

// The value that a rule makes of a level, where `visible` blocks can be read.
inline int32_t decided(const VesicleRule& rule, double level, int64_t visible) {
  if (rule.steps >= 0) {
    for (int64_t i = 0; i < rule.steps; ++i)
      if (level >= rule.levels[i]) return rule.values[i];
    return rule.below;
  }
  const int64_t width = rule.width ? rule.width : visible;
  const double share = std::min(1.0, std::max(rule.floor, 1.0 - rule.rate * (1.0 - level)));
  const int64_t count = static_cast<int64_t>(std::ceil(share * width - 1e-9));
  return static_cast<int32_t>(std::min(width, std::max(std::min(width, rule.least), count)));
}

}  // namespace vesicle
