//! The Conformance tests: our streams and our answers, with independent programs as referees.
//!
//! The peer is the real QEMU with a machine that is RAM and nothing else (`-M none`); where it is not installed, the tests
//! are skipped and say so. `drive_migration.py` lets QEMU's own Python client drive two of ours.
