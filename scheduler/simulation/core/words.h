// The words of Python that translated functions use (translate.py), with Python's meaning.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace hexgen {

using i64 = std::int64_t;

template <class T>
struct List : std::vector<T> {
  void append(T value) { this->push_back(std::move(value)); }
};

template <class T>
i64 len(const T& values) {
  return i64(values.size());
}

template <class T>
bool truth(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return value != T(0);
  } else {
    return value.size() != 0;
  }
}

template <class T>
bool is_none(const T& value) {
  if constexpr (requires { value.has_value(); }) {
    return !value.has_value();
  } else {
    return value.none();
  }
}

inline i64 floordiv(i64 a, i64 b) {
  const i64 quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

inline i64 modulo(i64 a, i64 b) { return a - floordiv(a, b) * b; }

inline double truediv(double a, double b) { return a / b; }

inline i64 whole(double value) { return i64(value); }  // towards zero, as int() is

template <class T>
T least(T a) {
  return a;
}

template <class T, class... Rest>
auto least(T a, Rest... rest) {
  const auto b = least(rest...);
  using Both = std::common_type_t<T, decltype(b)>;
  return Both(b) < Both(a) ? Both(b) : Both(a);
}

template <class T>
T most(T a) {
  return a;
}

template <class T, class... Rest>
auto most(T a, Rest... rest) {
  const auto b = most(rest...);
  using Both = std::common_type_t<T, decltype(b)>;
  return Both(b) > Both(a) ? Both(b) : Both(a);
}

// ---- loops ------------------------------------------------------------------------------------------------------

template <class Values, class Function>
struct Each {  // a generator: worked out as it is read
  const Values& values;
  Function function;
};

template <class Values, class Function>
Each<Values, Function> each(const Values& values, Function function) {
  return {values, function};
}

template <class Values, class Function>
auto total(const Each<Values, Function>& made) {
  std::decay_t<decltype(made.function(*made.values.begin()))> sum(0);
  for (auto value : made.values) sum += made.function(value);
  return sum;
}

template <class T>
List<T> only(T value) {
  List<T> made;
  made.append(std::move(value));
  return made;
}

template <class T>
void add_to(List<T>& list, const List<T>& more) {
  list.insert(list.end(), more.begin(), more.end());
}

template <class T, class Values, class Function>
void add_to(List<T>& list, const Each<Values, Function>& more) {
  for (auto value : more.values) list.append(more.function(value));
}

template <class T>
T element(const List<T>&);

template <class Values, class Function>
auto element(const Each<Values, Function>& made) -> std::decay_t<decltype(made.function(*made.values.begin()))>;

template <class First, class... Rest>
auto joined(const First& first, const Rest&... rest) {
  List<decltype(element(first))> made;
  add_to(made, first);
  (add_to(made, rest), ...);
  return made;
}

template <class T, class Key>
List<T> sorted(List<T> list, Key key) {
  std::stable_sort(list.begin(), list.end(), [&](const T& a, const T& b) { return key(a) < key(b); });
  return list;
}

template <class Values>
struct Forward {
  const Values& values;
};

template <class Values>
struct Backward {
  const Values& values;
};

template <class Values>
Forward<Values> iter(const Values& values) {
  return {values};
}

template <class Values>
Backward<Values> reversed(const Values& values) {
  return {values};
}

template <class Values>
auto next(Forward<Values> walk) {
  return walk.values.first();
}

template <class Values>
auto next(Backward<Values> walk) {
  return walk.values.last();
}

}  // namespace hexgen
