// The loop of scheduler/simulation/run.py between two decisions of the front door: steps on their way, and back.
// Events, sums and samples come in the same order as there; the tests compare both to the last bit.
#pragma once

#include <limits>
#include <queue>

#include "table.h"

namespace hexgen {
#include "translated.inc"  // constants, the policy's functions, `Profile`: written by native_build.py
}  // namespace hexgen

#include "route.h"

namespace hexgen {

constexpr double NEVER = std::numeric_limits<double>::infinity();
constexpr i64 BACK = -1;  // instead of a hop: the step's tokens are back at the head

enum Outcome : int { WAITS = 0, CHANGED = 1, OVER = 2, FAILED = 3 };
enum Kind : i64 { BEGAN = 0, ENDED = 1 };

struct Event {
  double at_s;
  i64 order, route, hop;
  Step* step;
  bool operator>(const Event& other) const {
    return at_s != other.at_s ? at_s > other.at_s : order > other.order;
  }
};

class Run {
 public:
  Run(i64 stages, i64 links, const i64* prompts, const i64* outputs, double* first_s, double* finish_s, i64* delivered,
      double warmup_s, double until_s)
      : prompts_(prompts), outputs_(outputs), first_s_(first_s), finish_s_(finish_s), delivered_(delivered),
        warmup_s_(warmup_s), until_s_(until_s), warm_(warmup_s <= 0), stage_free_s_(std::size_t(stages)),
        link_free_s_(std::size_t(links)), busy_s(std::size_t(stages)), link_busy_s(std::size_t(links)),
        gap_counts(std::size_t(GAP_BINS)) {}

  // The clock moves on to `at_s`, where something happens; false where that is after the run's end.
  bool clock(double at_s) {
    if (!warm_ && at_s > warmup_s_) {
      warm_ = true;
      started_s = warmup_s_;
      std::fill(busy_s.begin(), busy_s.end(), 0.0);
      std::fill(link_busy_s.begin(), link_busy_s.end(), 0.0);
      tokens_before = tokens;
      finished_before = finished;
    }
    if (at_s > until_s_) return false;
    now_s = at_s;
    if (at_s >= next_sample_s_) sample();
    return true;
  }

  // Until `limit_s`, where a request arrives: what happens at that very moment comes after it. ``stop``: also where
  // somebody has begun or ended.
  Outcome advance(double limit_s, bool stop) {
    while (!events_.empty() && events_.top().at_s < limit_s) {
      const Event event = events_.top();
      if (!clock(event.at_s)) return OVER;
      events_.pop();
      const std::size_t before = changes.size();
      if (event.hop != BACK) {
        travel(event.route, event.hop, event.step, event.at_s);
      } else {
        back(event.route);
      }
      if (failed) return FAILED;
      if (stop && changes.size() > before) return CHANGED;
    }
    return WAITS;
  }

  void add(i64 route, i64 request) {
    routes[std::size_t(route)].add(request, prompts_[request], outputs_[request]);
    send(route);
  }

  std::deque<Route> routes;
  std::deque<Profile> profiles;
  std::vector<i64> changes, seen;  // kind, route, request
  bool failed = false;
  double now_s = 0, started_s = 0;
  i64 tokens = 0, prompt_tokens = 0, finished = 0, tokens_before = 0, finished_before = 0;
  double gap_sum_s = 0;

 private:
  const i64 *prompts_, *outputs_;
  double *first_s_, *finish_s_;
  i64* delivered_;
  double warmup_s_, until_s_;
  bool warm_;
  std::vector<double> stage_free_s_, link_free_s_;

 public:
  std::vector<double> busy_s, link_busy_s;
  std::vector<i64> gap_counts;
  std::vector<double> sample_s;
  std::vector<i64> sample_used, sample_running;  // [samples, routes]

 private:
  // All the steps that the route may send now.
  void send(i64 number) {
    Route& route = routes[std::size_t(number)];
    while (i64(route.in_flight.size()) < route.limits.depth_) {
      Step* step = route.next_step();
      if (step == nullptr) return;
      if (!route.time(step)) failed = true;
      travel(number, 0, step, now_s);
    }
  }

  void travel(i64 number, i64 hop, Step* step, double at_s) {
    const Route& route = routes[std::size_t(number)];
    for (std::size_t i = std::size_t(hop);; ++i) {
      const Leg& leg = route.legs[i];
      double took = step->seconds[i];
      double& free = stage_free_s_[std::size_t(leg.stage)];
      const double end = (at_s > free ? at_s : free) + took;
      free = end;
      busy_s[std::size_t(leg.stage)] += took;
      if (leg.link < 0) {
        events_.push({end + route.back_s, ++order_, number, BACK, step});
        return;
      }
      took = double(step->tokens) * leg.token_s;
      double& link_free = link_free_s_[std::size_t(leg.link)];
      at_s = (end > link_free ? end : link_free) + took;
      link_free = at_s;
      link_busy_s[std::size_t(leg.link)] += took;
      at_s += leg.delay_s;
      if (leg.waits) {
        events_.push({at_s, ++order_, number, i64(i) + 1, step});
        return;
      }
    }
  }

  // The route's oldest step is through.
  void back(i64 number) {
    Route& route = routes[std::size_t(number)];
    Step* step = route.oldest();
    double gap_s = -1;
    i64 count = 0;  // tokens in a row after such a gap
    for (const Segment& one : step->segments) {
      if (!one.sample) continue;
      Sequence* s = one.sequence;
      ++tokens;
      route.table.accept(s);
      if (s->first) {
        s->first = false;
        first_s_[s->request] = now_s;
        prompt_tokens += s->prompt;
        changes.insert(changes.end(), {BEGAN, number, s->request});
      } else {
        if (now_s - s->last_s != gap_s) {
          gaps(gap_s, count);
          gap_s = now_s - s->last_s;
          count = 0;
        }
        ++count;
      }
      s->last_s = now_s;
      if (s->known >= s->end) {
        ++finished;
        finish_s_[s->request] = now_s;
        delivered_[s->request] = s->end - s->prompt;
        changes.insert(changes.end(), {ENDED, number, s->request});
        route.table.end(s);
        route.put_away(s);
      }
    }
    gaps(gap_s, count);
    route.put_away(step);
    send(number);
  }

  // As `Recorder.gaps`.
  void gaps(double seconds, i64 count) {
    if (count == 0) return;
    gap_sum_s += seconds * double(count);
    const i64 bin = i64(std::log(std::max(seconds, GAP_LEAST_S) / GAP_LEAST_S) / GAP_LOG_WIDTH);
    gap_counts[std::size_t(std::min(bin, GAP_BINS - 1))] += count;
  }

  // As `Recorder.sample`.
  void sample() {
    sample_s.push_back(now_s);
    for (const Route& route : routes) {
      sample_used.push_back(route.limits.pages_ - route.table.pool().available());
      sample_running.push_back(len(route.table.running()));
    }
    const std::size_t width = routes.size();
    if (i64(sample_s.size()) >= 2 * SAMPLES) {
      std::size_t kept = 0;
      for (std::size_t i = 0; i < sample_s.size(); i += 2, ++kept) {
        sample_s[kept] = sample_s[i];
        for (std::size_t r = 0; r < width; ++r) {
          sample_used[kept * width + r] = sample_used[i * width + r];
          sample_running[kept * width + r] = sample_running[i * width + r];
        }
      }
      sample_s.resize(kept);
      sample_used.resize(kept * width);
      sample_running.resize(kept * width);
      spacing_s_ *= 2;
    }
    next_sample_s_ = now_s + spacing_s_;
  }

  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  i64 order_ = 0;
  double next_sample_s_ = 0, spacing_s_ = 0.01;
};

}  // namespace hexgen
