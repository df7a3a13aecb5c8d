//! The Host room: safe wrappers of Linux. Descriptors, mappings, memory files, sockets, threads, clocks, child processes.
//!
//! System calls of Godwit live here and in KVM only. Everything that owns a descriptor or a mapping is a `final class`:
//! no pointer outlives its owner, and an error is a `SystemError` which names the operation, the object and the cause.
