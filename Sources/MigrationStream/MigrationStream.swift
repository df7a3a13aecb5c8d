// The MigrationStream room.
