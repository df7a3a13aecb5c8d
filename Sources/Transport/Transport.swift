//! The Transport room: byte channels with deadlines, over which a virtual machine travels.
//!
//! A `MigrationAddress` says where to (tcp, unix, fd, exec, file). A `Connector` goes there, a `Listener` waits there; both hand out
//! a `Channel`, on which one thread sends and one receives. Nothing here waits forever unless asked to: a `CancelToken` ends a
//! connect or an accept, `Channel.cancel` ends whatever a channel is blocked in, and a peer that stops moving bytes is an error
//! after the stall limit. What the bytes mean is MigrationStream's business; which go when is Migration's.
