// Written by setup.py from vesicle/plan/layout.py, which says what the fields are.
#pragma once

#include <cstdint>

struct VesiclePlanRow {
  int32_t channels[4];
  int32_t bits[4];
  int32_t ffn;
  int32_t attention;
  int32_t kv_blocks;
  int32_t head;
  int32_t likeliest;
  int32_t logits;
};

constexpr uint64_t kPlanLayout = 0x7562699fd1dd2166u;
