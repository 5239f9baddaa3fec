// Norms and GELU, row by row; included once for each path, after lanes.h.

IVE_TARGET IVE_INLINE float mean(const float* x, int64_t width) {
  Floats sum = all(0.f);
  for (int64_t i = 0; i < width; i += kLanes) sum = sum + load(x + i, width - i);
  return total(sum) / static_cast<float>(width);
}

IVE_TARGET IVE_INLINE float inverse_deviation(const float* x, int64_t width, float middle,
                                              float epsilon) {
  Floats sum = all(0.f);
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats v = load(x + i) - all(middle);
    sum = sum + v * v;
  }
  if (whole < width) {
    float room[kLanes] = {};
    for (int64_t i = whole; i < width; ++i) room[i - whole] = x[i] - middle;
    sum = sum + load(room) * load(room);
  }
  return 1.f / std::sqrt(total(sum) / static_cast<float>(width) + epsilon);
}

IVE_TARGET inline void norm_row(const Norm& n, int64_t row) {
  const float* x = n.x + row * n.width;
  if (n.added != nullptr) {
    const float* added = n.added + row * n.width;
    float* sum = n.sum + row * n.width;
    for (int64_t i = 0; i < n.width; i += kLanes) {
      const int64_t left = n.width - i;
      store(sum + i, load(x + i, left) + load(added + i, left), left);
    }
    x = sum;
  }
  const float middle = n.centred ? mean(x, n.width) : 0.f;
  const float factor = n.centred ? inverse_deviation(x, n.width, middle, n.epsilon)
                                 : inverse_rms(x, n.width, n.epsilon);
  for (int64_t i = 0; i < n.width; i += kLanes) {
    const int64_t left = n.width - i;
    Floats y = (load(x + i, left) - all(middle)) * all(factor) * load(n.weight + i, left);
    if (n.bias != nullptr) y = y + load(n.bias + i, left);
    store(n.out, row, i, y, left);
  }
}

IVE_TARGET inline void gelu_row(const Gelu& g, int64_t row) {
  const float* x = g.x + row * g.width;
  for (int64_t i = 0; i < g.width; i += kLanes) {
    const int64_t left = g.width - i;
    store(g.out, row, i, gelu(load(x + i, left)), left);
  }
}
