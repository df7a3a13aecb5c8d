// The Devices room.
