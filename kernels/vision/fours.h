// Transposing weights without instructions for it; included for paths that have none.

inline void transpose_fours(const int8_t* weight, int64_t apart, int64_t given, int64_t count,
                            int32_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < kBlocks * kLanes; ++c, ++to) {
      std::memcpy(to, weight + (c < given ? c : given - 1) * apart + 4 * i, sizeof *to);
    }
  }
}
