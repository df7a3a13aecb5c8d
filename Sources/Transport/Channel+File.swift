public import Host
import Synchronization

// What only a regular file can: places.

extension Channel {
    /// The regular file behind the channel, for reading and writing at given places; `nil` for anything else, and once finished.
    public var file: Descriptor? {
        guard kind == .file else { return nil }
        return input ?? output.withLock { $0 }
    }

    /// Where in its file the next byte goes to or comes from. - Throws: `ChannelError.unusable` for what is no regular file.
    public func filePosition() throws(ChannelError) -> UInt64 {
        let file = try requireFile()
        return try channelled { () throws(SystemError) in try file.position() }
    }

    /// Goes on so many bytes further in the file; what is jumped over when sending is a hole.
    public func skip(_ byteCount: UInt64) throws(ChannelError) {
        try token.check()
        let file = try requireFile()
        try channelled { () throws(SystemError) in
            let (target, overflow) = try file.position().addingReportingOverflow(byteCount)
            try file.seek(to: overflow ? .max : target)
        }
    }

    private func requireFile() throws(ChannelError) -> Descriptor {
        guard let file else { throw .unusable("\(peer): only a regular file has places to write to and read from") }
        return file
    }
}
