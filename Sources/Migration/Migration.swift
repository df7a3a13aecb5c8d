// The Migration room.
