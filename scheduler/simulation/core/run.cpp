// What Python calls (native_loop.py).
#include "run.h"

using hexgen::i64;
using hexgen::Run;

extern "C" {

Run* run_new(i64 stages, i64 links, const i64* prompts, const i64* outputs, double* first_s, double* finish_s,
             i64* delivered, double warmup_s, double until_s) {
  return new Run(stages, links, prompts, outputs, first_s, finish_s, delivered, warmup_s, until_s);
}

void run_delete(Run* run) { delete run; }

// Of the route told last.
void run_window(Run* run, i64 positions, i64 layers) { run->routes.back().windows.add({positions, layers}); }

void run_profile(Run* run, const double* numbers) { run->profiles.emplace_back(numbers); }

// `limits`: as in `Limits`. `legs`: stage, link, waits of each hop; `times`: token_s, delay_s of each, then back_s.
// `parts`: profile, layers, embeds, samples of each of `part_count`; `place`: which of them each hop has.
void run_route(Run* run, const i64* limits, i64 hops, const i64* legs, const double* times, i64 part_count,
               const i64* parts, const i64* place, hexgen::AskCell ask_cell, hexgen::AskStep ask_step) {
  const hexgen::Limits told{limits[0], limits[1], limits[2], limits[3], limits[4], limits[5]};
  hexgen::Route& route = run->routes.emplace_back(i64(run->routes.size()), told);
  for (i64 i = 0; i < hops; ++i, legs += 3, times += 2)
    route.legs.push_back({legs[0], legs[1], times[0], times[1], legs[2] != 0});
  route.back_s = *times;
  for (i64 i = 0; i < part_count; ++i, parts += 4)
    route.parts.push_back({&run->profiles[std::size_t(parts[0])], parts[1], parts[2] != 0, parts[3] != 0});
  route.place.assign(place, place + hops);
  route.ask_cell = ask_cell;
  route.ask_step = ask_step;
}

int run_clock(Run* run, double at_s) { return run->clock(at_s); }

// What Python wants to know after each call: the number of changes, then free pages and how many wait, of each route.
static void show(const Run* run, i64* shown) {
  *shown++ = i64(run->changes.size()) / 3;
  for (const hexgen::Route& route : run->routes) {
    *shown++ = route.table.pool().available();
    *shown++ = hexgen::len(route.table.waiting());
  }
}

int run_advance(Run* run, double limit_s, int stop, i64* shown) {
  const int outcome = run->advance(limit_s, stop != 0);
  show(run, shown);
  return outcome;
}

int run_add(Run* run, i64 route, i64 request, i64* shown) {
  run->add(route, request);
  show(run, shown);
  return run->failed ? hexgen::FAILED : hexgen::WAITS;
}

double run_now(const Run* run) { return run->now_s; }

// The changes since the last call; they are forgotten with the next.
const i64* run_changes(Run* run) {
  run->seen.swap(run->changes);
  run->changes.clear();
  return run->seen.data();
}

void run_counts(Run* run, i64* counts, double* seconds) {
  i64 steps = 0, preemptions = 0;
  for (const hexgen::Route& route : run->routes) steps += route.steps, preemptions += route.table.preemptions;
  const i64 found[] = {run->tokens, run->tokens_before, run->finished, run->finished_before, run->prompt_tokens,
                       steps, preemptions, i64(run->sample_s.size())};
  std::copy(std::begin(found), std::end(found), counts);
  const double times[] = {run->now_s, run->started_s, run->gap_sum_s};
  std::copy(std::begin(times), std::end(times), seconds);
}

void run_arrays(Run* run, double* busy_s, double* link_busy_s, i64* gap_counts, double* sample_s, i64* used,
                i64* running) {
  std::copy(run->busy_s.begin(), run->busy_s.end(), busy_s);
  std::copy(run->link_busy_s.begin(), run->link_busy_s.end(), link_busy_s);
  std::copy(run->gap_counts.begin(), run->gap_counts.end(), gap_counts);
  std::copy(run->sample_s.begin(), run->sample_s.end(), sample_s);
  std::copy(run->sample_used.begin(), run->sample_used.end(), used);
  std::copy(run->sample_running.begin(), run->sample_running.end(), running);
}
}
