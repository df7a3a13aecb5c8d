// The Accelerator room.
