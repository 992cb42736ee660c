// SPDX-License-Identifier: Apache-2.0
// How much memory calls take.

extern "C" {

// How many numbers the room of a call has to have: of cce_sums with cce_tiles,
// of cce_weights, of cce_gradients, or of cce_sums with a filter.
int64_t cce_room(const Call* call, int32_t what) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{nullptr};
  const Known known(s, room);
  Room more = room;
  more.take((what == 0 ? s.stretch : s.rows) * s.depth);
  if (what == 1) return room_with<Weights>(q, s, room);
  if (what == 2) return room_with<Again>(q, s, more);
#if STORAGE == 0
  if (q.tiles) {
    const int64_t sums = room_with<Sums>(q, s, more);
    if (what == 0) return std::max(sums, room_with<Kept>(q, s, room));
    return std::max({sums, room_with<Levels>(q, s, room), room_with<Chosen>(q, s, room)});
  }
#endif
  return room_with<Sums>(q, s, more);
}

// For the other side to compare.
int64_t cce_call_size() { return sizeof(Call); }

}  // extern "C"
