// A layer's experts as an operator: QMoE with four or eight bits. A row goes through the few that
// its router chooses, and of these alone weights are read:
//
//   y[m] = sum over the chosen e of share[m, e] * down[e](silu(gate[e](x[m])) * up[e](x[m]))
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "driver.h"
#include "silu.h"

namespace ive::blocks {

// Weights of one kind of all experts, each as `Product` has them.
struct Stack {
  const uint8_t* values;
  const float* scales;
  int64_t inputs, columns, block, bits;

  // The product of some rows with an expert's.
  Product of(int64_t expert, const float* x, float* y, int64_t rows) const {
    Product product{x, values, scales, nullptr, y, rows, inputs, columns, block, bits};
    product.values += expert * columns * product.column_bytes();
    product.scales += expert * columns * product.blocks();
    return product;
  }
};

struct Layer {
  const float* x;       // (rows, hidden)
  const float* logits;  // (rows, experts)
  float* y;             // (rows, hidden)
  Stack gated, down;    // gate and up in turns; (hidden) columns
  int64_t rows, experts, chosen;

  int64_t hidden() const { return gated.inputs; }
  int64_t width() const { return down.inputs; }
  int64_t routes() const { return rows * chosen; }
};

template <typename T>
bool take(std::unique_ptr<T[]>& array, int64_t count) {
  array.reset(new (std::nothrow) T[count]);
  return array != nullptr;
}

// Products of as many rows with some experts, their tasks numbered one after the other.
class Products {
 public:
  bool allocate(int64_t most) {
    return take(works_, most) && take(roundings_, most + 1) && take(tasks_, most + 1);
  }

  // Begins anew.
  void clear() { count_ = roundings_[0] = tasks_[0] = 0; }

  // False where there is no memory.
  bool add(const Product& product, const Path& path) {
    auto& work = works_[count_];
    work.reset(new (std::nothrow) Multiplication(product, path));
    if (work == nullptr || !work->allocate()) return false;
    roundings_[count_ + 1] = roundings_[count_] + work->roundings();
    tasks_[count_ + 1] = tasks_[count_] + work->products();
    ++count_;
    return true;
  }

  int64_t roundings() const { return roundings_[count_]; }
  int64_t tasks() const { return tasks_[count_]; }

  void round(int64_t row) const {
    const int64_t i = place(roundings_.get(), row);
    works_[i]->round(row - roundings_[i]);
  }

  void multiply(int64_t task) const {
    const int64_t i = place(tasks_.get(), task);
    works_[i]->multiply(task - tasks_[i]);
  }

 private:
  // Whose a number is, of those that begin at `firsts`.
  int64_t place(const int64_t* firsts, int64_t number) const {
    return std::upper_bound(firsts, firsts + count_, number) - firsts - 1;
  }

  std::unique_ptr<std::unique_ptr<Multiplication>[]> works_;
  std::unique_ptr<int64_t[]> roundings_, tasks_;  // the first of each, and how many there are
  int64_t count_ = 0;
};

// One pass of rows through a layer. A route is one row's way through one expert; routes lie expert
// after expert, of each in the order of the rows.
class Mixture {
 public:
  Mixture(const Layer& layer, const Path& path) : l_(layer), path_(path) {}

  // False where there is no memory.
  bool allocate() {
    return take(choices_, l_.routes()) && take(shares_, l_.routes()) &&
           take(routes_, l_.routes()) && take(sources_, l_.routes()) &&
           take(firsts_, l_.experts + 1) && take(rows_, l_.routes() * l_.hidden()) &&
           take(both_, l_.routes() * 2 * l_.width()) && take(inner_, l_.routes() * l_.width()) &&
           products_.allocate(std::min(l_.experts, l_.routes()));
  }

  // Chooses experts for a row, the largest logits, of equals the first; and their shares, a softmax
  // over these. A row that is not finite has shares NaN.
  void choose(int64_t row) const {
    const float* logits = l_.logits + row * l_.experts;
    int64_t* choices = choices_.get() + row * l_.chosen;
    float* shares = shares_.get() + row * l_.chosen;
    bool finite = true;
    for (int64_t e = 0; e < l_.experts; ++e) finite = finite && std::isfinite(logits[e]);
    for (int64_t i = 0; i < l_.chosen; ++i) {
      choices[i] = i;
      shares[i] = std::numeric_limits<float>::quiet_NaN();
    }
    if (!finite) return;
    const auto after = [&](int64_t a, int64_t b) {
      return logits[a] != logits[b] ? logits[a] < logits[b] : a > b;
    };
    for (int64_t i = 0; i < l_.chosen; ++i) {
      int64_t best = -1;
      for (int64_t e = 0; e < l_.experts; ++e) {
        const bool left = i == 0 || after(e, choices[i - 1]);
        if (left && (best < 0 || after(best, e))) best = e;
      }
      choices[i] = best;
    }
    float sum = 0;
    for (int64_t i = 0; i < l_.chosen; ++i) {
      shares[i] = std::exp(logits[choices[i]] - logits[choices[0]]);
      sum += shares[i];
    }
    for (int64_t i = 0; i < l_.chosen; ++i) shares[i] /= sum;
  }

  // Gives every route its place, when all rows have chosen.
  void sort() {
    std::fill(firsts_.get(), firsts_.get() + l_.experts + 1, 0);
    for (int64_t i = 0; i < l_.routes(); ++i) ++firsts_[choices_[i] + 1];
    for (int64_t e = 0; e < l_.experts; ++e) firsts_[e + 1] += firsts_[e];
    for (int64_t i = 0; i < l_.routes(); ++i) {
      routes_[i] = firsts_[choices_[i]]++;
      sources_[routes_[i]] = i / l_.chosen;
    }
    for (int64_t e = l_.experts; e > 0; --e) firsts_[e] = firsts_[e - 1];
    firsts_[0] = 0;
  }

  void gather(int64_t route) const {
    const float* from = l_.x + sources_[route] * l_.hidden();
    std::copy(from, from + l_.hidden(), rows_.get() + route * l_.hidden());
  }

  // Begins the products with gates and ups, and then those with what leads back, for which the rows
  // that were gathered make room; false where there is no memory.
  bool begin_gated() { return begin(l_.gated, rows_.get(), both_.get()); }
  bool begin_down() { return begin(l_.down, inner_.get(), rows_.get()); }

  void activate(int64_t route) const {
    gate(both_.get() + route * 2 * l_.width(), l_.width(), inner_.get() + route * l_.width());
  }

  void combine(int64_t row) const {
    float* y = l_.y + row * l_.hidden();
    std::fill(y, y + l_.hidden(), 0.f);
    for (int64_t i = row * l_.chosen; i < (row + 1) * l_.chosen; ++i) {
      const float* from = rows_.get() + routes_[i] * l_.hidden();
      for (int64_t n = 0; n < l_.hidden(); ++n) y[n] += shares_[i] * from[n];
    }
  }

  const Products& products() const { return products_; }

 private:
  bool begin(const Stack& stack, const float* x, float* y) {
    products_.clear();
    for (int64_t e = 0; e < l_.experts; ++e) {
      const int64_t first = firsts_[e], rows = firsts_[e + 1] - first;
      if (rows == 0) continue;
      const float* from = x + first * stack.inputs;
      if (!products_.add(stack.of(e, from, y + first * stack.columns, rows), path_)) return false;
    }
    return true;
  }

  Layer l_;
  const Path& path_;
  std::unique_ptr<int64_t[]> choices_;  // (rows, chosen)
  std::unique_ptr<float[]> shares_;     // (rows, chosen)
  std::unique_ptr<int64_t[]> routes_;   // (rows, chosen)
  std::unique_ptr<int64_t[]> sources_;  // the row of each route
  std::unique_ptr<int64_t[]> firsts_;   // the first route of each expert, and how many there are
  std::unique_ptr<float[]> rows_;       // (routes, hidden)
  std::unique_ptr<float[]> both_;       // (routes, 2 * width)
  std::unique_ptr<float[]> inner_;      // (routes, width)
  Products products_;
};

}  // namespace ive::blocks
