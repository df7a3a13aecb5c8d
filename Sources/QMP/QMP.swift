//! The QMP room: how a VM is told what to do, and how it answers. Read `QMPServer` first.
//!
//!     bytes ── MessageFramer ── QMPSession ──┬── in band: worker thread, in order ──┐
//!              (where a         (handshake,  │                                      ├── CommandTable ── OutputQueue
//!               message ends)    request)    └── out of band: reader thread ────────┘    (arguments,     (bounded,
//!                                                                                        handler)         deadline)
//!
//! `JSON`, `MessageFramer`, `QMPSession`, `CommandTable` are values without I/O; `QMPServer`, `ClientConnection` and
//! `OutputQueue` are the threads around them; `QMPClient` is the other end; `ControlSocket` says where a VM's socket lives.
//! The protocol is that of QEMU's "QMP Specification" (docs/interop/qmp-spec), error wording included. Two things it
//! accepts that JSON does not, strings in single quotes and numbers such as `inf`, are refused here.
