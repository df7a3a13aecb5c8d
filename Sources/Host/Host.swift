// The Host room.
