// The QMP room.
