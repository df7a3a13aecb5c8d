// The Machine room.
