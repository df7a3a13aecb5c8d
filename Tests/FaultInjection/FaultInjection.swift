//! The FaultInjection tests: real processes, a real guest, and everything that can be taken away from a migration.
