// The GuestMemory room.
