// The sequences of one route and the pages they hold: hexgen/batching/table.py over counts of tokens and pages.
// Which changes to make is not decided here, but by the policy, which is translated from hexgen/batching/policy.py.
#pragma once

#include "words.h"

namespace hexgen {

struct Sequence {
  i64 number = 0, request = 0, prompt = 0;
  i64 known = 0;  // prompt and output so far
  i64 end = 0;    // so many tokens, and it has ended
  i64 computed = 0, pages = 0;
  bool running = false, awaiting = false, ready = false;
  bool first = true;   // no token has come yet
  double last_s = 0;   // when its last token came
  // Its neighbours: among the waiting or the running; among those that prefill or those that are ready.
  Sequence *before[2] = {nullptr, nullptr}, *after[2] = {nullptr, nullptr};
};

struct Count {
  i64 count;
  std::size_t size() const { return std::size_t(count); }
};

// What the policy sees of a sequence.
class SequenceState {
 public:
  explicit SequenceState(Sequence* told = nullptr) : s(told) {}
  bool none() const { return s == nullptr; }
  bool operator==(const SequenceState& other) const { return s == other.s; }
  i64 arrival() const { return s->number; }
  i64 computed() const { return s->computed; }
  i64 remaining() const { return s->known - s->computed; }
  bool running() const { return s->running; }
  bool awaiting() const { return s->awaiting; }
  Count pages() const { return {s->pages}; }
  Count tokens() const { return {s->known}; }

  Sequence* s;
};

using Choice = std::tuple<SequenceState, i64>;

struct Segment {
  Sequence* sequence;
  i64 start, end;
  bool sample;
};

struct Admission {};  // the policy only passes them on

template <int Which>
class Ordered {  // a dict of sequences, in the order in which they came in
 public:
  struct Place {
    Sequence* at;
    SequenceState operator*() const { return SequenceState(at); }
    Place& operator++() {
      at = at->after[Which];
      return *this;
    }
    bool operator!=(const Place& other) const { return at != other.at; }
  };
  Place begin() const { return {head_}; }
  Place end() const { return {nullptr}; }
  std::size_t size() const { return std::size_t(count_); }
  const Ordered& values() const { return *this; }
  SequenceState first() const { return SequenceState(head_); }
  SequenceState last() const { return SequenceState(tail_); }

  void push(Sequence* s) {
    s->before[Which] = tail_;
    s->after[Which] = nullptr;
    (tail_ ? tail_->after[Which] : head_) = s;
    tail_ = s;
    ++count_;
  }
  void push_front(Sequence* s) {
    s->before[Which] = nullptr;
    s->after[Which] = head_;
    (head_ ? head_->before[Which] : tail_) = s;
    head_ = s;
    ++count_;
  }
  void remove(Sequence* s) {
    (s->before[Which] ? s->before[Which]->after[Which] : head_) = s->after[Which];
    (s->after[Which] ? s->after[Which]->before[Which] : tail_) = s->before[Which];
    --count_;
  }

 private:
  Sequence *head_ = nullptr, *tail_ = nullptr;
  i64 count_ = 0;
};

struct Pages {
  i64 pages, page_size, free;
};

class Pool {
 public:
  explicit Pool(const Pages& told) : p_(told) {}
  i64 pages() const { return p_.pages; }
  i64 page_size() const { return p_.page_size; }
  i64 available() const { return p_.free; }
  i64 pages_for(i64 tokens) const { return floordiv(tokens + p_.page_size - 1, p_.page_size); }
  i64 unreferenced(const List<i64>& pages) const { return len(pages); }  // no page is shared here

 private:
  const Pages& p_;
};

class Table {
 public:
  Table(i64 pages, i64 page_size) : pages_{pages, page_size, pages} {}

  // ---- what the policy reads ----
  Pool pool() const { return Pool(pages_); }
  i64 page_size() const { return pages_.page_size; }
  i64 waiting_tokens() const { return waiting_tokens_; }
  i64 ready_count() const { return len(ready_); }
  const Ordered<0>& running() const { return running_; }
  const Ordered<0>& waiting() const { return waiting_; }
  const Ordered<1>& prefilling() const { return prefilling_; }
  SequenceState first_waiting() const { return waiting_.first(); }
  List<i64> cached_pages(SequenceState) const { return {}; }  // simulated prompts have nothing in common

  List<SequenceState> longest_ready(i64 count) const {
    List<SequenceState> found;
    for (auto state : ready_) {
      if (len(found) == count) break;
      found.append(state);
    }
    return found;
  }
  SequenceState oldest_idle() const {
    for (auto state : running_)
      if (!state.awaiting()) return state;
    return SequenceState();
  }
  i64 pages_to_decode(i64 count) const {
    i64 needed = 0;
    for (auto state : ready_) {
      if (count-- == 0) break;
      needed += state.s->computed == state.s->pages * pages_.page_size;
    }
    return needed;
  }

  // ---- what it does ----
  Admission start(SequenceState state, const std::optional<List<i64>>&) {
    Sequence* s = state.s;
    waiting_.remove(s);
    waiting_tokens_ -= s->known;
    running_.push(s);
    prefilling_.push(s);
    s->running = true;
    s->pages = s->computed = 0;
    return {};
  }
  Segment extend(SequenceState state, i64 tokens) {
    Sequence* s = state.s;
    const i64 start = s->computed, end = start + tokens;
    if (end > s->pages * pages_.page_size) {
      const i64 more = pool().pages_for(end) - s->pages;
      pages_.free -= more;
      s->pages += more;
    }
    const bool sample = end == s->known;
    if (s->ready) {
      ready_.remove(s);
      s->ready = false;
    } else if (sample) {
      prefilling_.remove(s);
    }
    s->computed = end;
    s->awaiting = sample;
    return {s, start, end, sample};
  }
  List<Segment> decode(i64 count) {
    List<Segment> made;
    made.reserve(std::size_t(count) + 4);
    for (; count > 0; --count) made.push_back(extend(ready_.first(), 1));
    return made;
  }
  void postpone(SequenceState state) {
    if (!state.s->ready) return;
    ready_.remove(state.s);
    ready_.push(state.s);
  }
  void preempt(SequenceState state) {
    withdraw(state.s);
    waiting_.push_front(state.s);
    waiting_tokens_ += state.s->known;
    ++preemptions;
  }

  // ---- what the batcher does ----
  void enter(Sequence* s) {
    waiting_.push(s);
    waiting_tokens_ += s->known;
  }
  void accept(Sequence* s) {
    s->awaiting = false;
    ++s->known;
    if (s->running) {
      s->ready = true;
      ready_.push(s);
    } else {
      ++waiting_tokens_;
    }
  }
  void end(Sequence* s) {
    if (s->running) {
      withdraw(s);
    } else {
      waiting_.remove(s);
      waiting_tokens_ -= s->known;
    }
  }

  i64 preemptions = 0;
  bool released = false;  // the stages have yet to hear of some that left

 private:
  void withdraw(Sequence* s) {
    running_.remove(s);
    if (s->ready) {
      ready_.remove(s);
    } else if (!s->awaiting) {
      prefilling_.remove(s);
    }
    pages_.free += s->pages;
    released = true;
    s->running = s->ready = false;
    s->pages = s->computed = 0;
  }

  Pages pages_;
  Ordered<0> running_, waiting_;
  Ordered<1> prefilling_, ready_;
  i64 waiting_tokens_ = 0;
};

}  // namespace hexgen
