// One route: its batcher (hexgen/batching/batcher.py over counts), its way through stages and links, its clock.
// Needs the translated policy (`form`) and cost model (`Profile`) before it.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>

#include "table.h"

namespace hexgen {

struct Limits {  // hexgen.batching.limits.BatchLimits
  i64 pages_, page_size_, token_budget_, max_sequences_, context_, depth_;
  i64 token_budget() const { return token_budget_; }
  i64 max_sequences() const { return max_sequences_; }
  i64 depth() const { return depth_; }
};

struct Load {  // hexgen.scheduler.traffic.StepLoad
  double value[9];
  double tokens() const { return value[0]; }
  double attended() const { return value[1]; }
  double kv_read() const { return value[2]; }
  double sequences() const { return value[3]; }
  double samples() const { return value[4]; }
  double prefill_attended() const { return value[6]; }
  double prefill_kv_read() const { return value[7]; }
};

struct Window {  // so many layers attend to so many positions, at most; 0: to all
  i64 positions, layers;
};

class Windows {  // step.py's `_windowed` and `_attended`; none at all: every layer attends to all positions
 public:
  void add(Window one) {
    all_.push_back(one);
    layers_ += one.layers;
  }
  // Positions that the token before `end` attends to, layers averaged.
  double held(i64 end) const {
    if (all_.empty()) return double(end);
    i64 sum = 0;
    for (const Window& w : all_) sum += w.layers * (w.positions == 0 ? end : std::min(end, w.positions));
    return truediv(double(sum), double(layers_));
  }
  // The sum of these over the tokens at [start, end).
  double attended(i64 start, i64 end) const {
    if (all_.empty()) return within(start, end, 0);
    double sum = 0;
    for (const Window& w : all_) sum += double(w.layers) * within(start, end, w.positions);
    return sum / double(layers_);
  }

 private:
  static double within(i64 start, i64 end, i64 window) {
    if (window == 0 || end <= window) return double((end - start) * (start + end + 1)) / 2;
    const i64 growing = std::max<i64>(0, window - start);  // tokens whose whole past is inside the window
    return double(growing * (start + start + growing + 1)) / 2 + double((end - start - growing) * window);
  }

  std::vector<Window> all_;
  i64 layers_ = 0;
};

struct Step {
  List<Segment> segments;
  i64 tokens = 0;
  std::vector<double> seconds;  // on each stage of the route
};

struct Leg {
  i64 stage, link;  // -1: it is the last
  double token_s, delay_s;
  bool waits;  // the next stage serves other routes too
};

struct Part {  // what a stage computes of a step
  const Profile* profile;
  i64 layers;
  bool embeds, samples;
};

// Asked of Python. Seconds on each stage of a route: of decodes, as base and slope of a cell; of any other step.
// They return 1; 0 where Python failed.
using AskCell = int (*)(i64 route, i64 size, i64 number, double* base_and_slope);
using AskStep = int (*)(i64 route, const double* load, double* seconds);

class Route {
 public:
  Route(i64 number, const Limits& told) : limits(told), table(told.pages_, told.page_size_), number_(number) {}

  void add(i64 request, i64 prompt, i64 output) {
    Sequence* s = idle_.empty() ? &made_.emplace_back() : idle_.back();
    if (!idle_.empty()) idle_.pop_back();
    *s = Sequence();
    s->number = added_++;
    s->request = request;
    s->prompt = s->known = prompt;
    s->end = std::min(prompt + output, limits.context_);
    table.enter(s);
  }

  // As `Batcher.next_step`.
  Step* next_step() {
    auto [admitted, segments] = form(table, limits, i64(in_flight.size()), steps);
    if (segments.empty() && (!in_flight.empty() || !table.released)) return nullptr;
    table.released = false;
    ++steps;
    Step* step;
    if (spare_.empty()) {
      step = stored_.emplace_back(std::make_unique<Step>()).get();
    } else {
      step = spare_.back();
      spare_.pop_back();
    }
    step->segments = std::move(segments);
    in_flight.push_back(step);
    return step;
  }

  Step* oldest() {
    Step* step = in_flight.front();
    in_flight.pop_front();
    return step;
  }
  void put_away(Step* step) { spare_.push_back(step); }
  void put_away(Sequence* ended) { idle_.push_back(ended); }

  // Seconds of a step on each stage; false where Python failed. As `CountedStep` counts and `StepClock.seconds`.
  bool time(Step* step) {
    double lone = 0, seen = 0, read = 0;
    i64 tokens = 0, samples = 0, chunks = 0, chunk_tokens = 0;
    for (const Segment& one : step->segments) {
      const i64 count = one.end - one.start;
      tokens += count;
      samples += one.sample;
      if (count == 1) {
        lone += windows.held(one.end);
      } else {
        ++chunks;
        chunk_tokens += count;
        seen += windows.attended(one.start, one.end);
        read += windows.held(one.end);
      }
    }
    const i64 sequences = len(step->segments);
    step->tokens = tokens;
    step->seconds.resize(legs.size());
    if (sequences == 0) {
      std::fill(step->seconds.begin(), step->seconds.end(), 0.0);
      return true;
    }
    if (tokens == samples && tokens == sequences) return decodes(sequences, lone, step->seconds);
    const Load load{{double(tokens), lone + seen, lone + read, double(sequences), double(samples),
                     double(chunk_tokens), seen, read, double(chunks)}};
    if (parts.empty()) return ask_step(number_, load.value, step->seconds.data()) != 0;
    worked_.clear();
    for (const Part& p : parts) worked_.push_back(p.profile->step_s(p.layers, load, p.embeds, p.samples));
    for (std::size_t i = 0; i < legs.size(); ++i) step->seconds[i] = worked_[std::size_t(place[i])];
    return true;
  }

  Limits limits;
  Windows windows;
  Table table;
  std::deque<Step*> in_flight;
  i64 steps = 0;
  std::vector<Leg> legs;
  double back_s = 0;
  std::vector<Part> parts;  // distinct ones; none: Python is asked
  std::vector<i64> place;   // of each stage's part
  AskCell ask_cell = nullptr;
  AskStep ask_step = nullptr;

 private:
  bool decodes(i64 size, double seen, std::vector<double>& seconds) {
    const i64 cell = i64(seen / double(size * CELL_TOKENS));
    auto [found, missing] = cells_.try_emplace(std::uint64_t(size) << 32 | std::uint64_t(cell));
    std::vector<double>& lines = found->second;
    if (missing) {
      lines.resize(2 * legs.size());
      if (ask_cell(number_, size, cell, lines.data()) == 0) return false;
    }
    for (std::size_t i = 0; i < seconds.size(); ++i) seconds[i] = lines[2 * i] + lines[2 * i + 1] * seen;
    return true;
  }

  i64 number_, added_ = 0;
  std::deque<Sequence> made_;
  std::vector<Sequence*> idle_;
  std::vector<std::unique_ptr<Step>> stored_;
  std::vector<Step*> spare_;
  std::unordered_map<std::uint64_t, std::vector<double>> cells_;
  std::vector<double> worked_;
};

}  // namespace hexgen
