// The GuestPrograms room.
