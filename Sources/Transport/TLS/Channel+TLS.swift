public import Host
import Synchronization

extension Channel {
    /// Whether what goes through is encrypted, and the peer checked.
    public var isSecure: Bool { tls != nil }

    /// Whether `handshake` comes before anything else.
    public var awaitsHandshake: Bool { tls.map { !$0.isEstablished } ?? false }

    /// The TLS handshake of a channel that was accepted: call it on the connection's own thread. Without TLS nothing happens.
    ///
    /// It takes at most `TLSSettings.handshakeMilliseconds`, and half a second more when it fails: the peer is told why.
    /// - Throws: `ChannelError.tls` with the peer, what is wrong with it, and the remedy.
    public func handshake(deadline: Deadline = .never) throws(ChannelError) {
        guard let tls, !tls.isEstablished else { return }
        try tls.handshake(deadline: deadline)
    }

    /// The handshake of a channel that was connected, which the token of who connects ends too.
    func handshake(deadline: Deadline, cancel: CancelToken?) throws(ChannelError) {
        guard let cancel else { return try handshake(deadline: deadline) }
        try tls?.handshake(deadline: deadline, alsoCancelledBy: cancel)
    }

    /// The cipher suite, and what the peer proved to be: a certificate's subject or a user name. `nil` for plaintext.
    public var security: (cipher: String, peerName: String)? {
        guard let tls, tls.isEstablished else { return nil }
        return (tls.cipher, tls.findings.withLock { $0.peerName })
    }

    /// For the log: how the channel is protected, or that it is not where it should be. `nil` where nothing is to be said.
    public var securityNotice: String? {
        if let (cipher, name) = security {
            return "\(peer): TLS 1.3, \(cipher)\(name.isEmpty ? "" : ", the peer is '\(name)'")"
        }
        guard kind == .socket, let input, let address = try? Socket.peerAddress(of: input), !address.isLocal else {
            return nil
        }
        return "\(peer): guest memory travels in plaintext, to whoever answered there; use TLS (tls-creds)"
    }

    // MARK: Bytes through TLS

    /// How much of an array is sent before it is counted.
    private static let bytesAtOnce = 4 * TLSSession.recordBytes

    func send(_ vector: inout IOVector, through tls: TLSSession) throws(ChannelError) {
        while vector.byteCount > 0 {
            try token.check()
            let count = try tls.send(&vector, limit: stallLimits.sendMilliseconds)
            sent.wrappingAdd(UInt64(count), ordering: .relaxed)
        }
    }

    func send(_ bytes: [UInt8], through tls: TLSSession) throws(ChannelError) {
        let limit = stallLimits.sendMilliseconds
        for start in stride(from: 0, to: bytes.count, by: Self.bytesAtOnce) {
            var outcome: Result<Void, ChannelError> = .success(())
            let count = min(Self.bytesAtOnce, bytes.count - start)
            unsafe bytes.withUnsafeBytes { all in
                // SAFETY: a part of the array, used during the call.
                let part = unsafe UnsafeRawBufferPointer(rebasing: all[start..<start + count])
                do throws(ChannelError) { try unsafe tls.send(part, limit: limit) } catch { outcome = .failure(error) }
            }
            try outcome.get()
            sent.wrappingAdd(UInt64(count), ordering: .relaxed)
        }
    }

    @unsafe func receive(
        into buffer: UnsafeMutableRawBufferPointer, through tls: TLSSession
    ) throws(ChannelError) -> Int {
        try token.check()
        hasReceived.store(true, ordering: .relaxed)
        let count = try unsafe tls.receive(into: buffer, limit: stallLimits.receiveMilliseconds)
        received.wrappingAdd(UInt64(count), ordering: .relaxed)
        return count
    }

    /// Receives into the array from `start` on.
    func receive(into bytes: inout [UInt8], from start: Int, through tls: TLSSession) throws(ChannelError) -> Int {
        var outcome: Result<Int, ChannelError> = .success(0)
        unsafe bytes.withUnsafeMutableBytes { all in
            // SAFETY: the rest of the array's own bytes.
            let rest = unsafe UnsafeMutableRawBufferPointer(rebasing: all[start...])
            do throws(ChannelError) { outcome = .success(try unsafe receive(into: rest, through: tls)) } catch {
                outcome = .failure(error)
            }
        }
        return try outcome.get()
    }

    /// Receives into the front of the vector, straight into the memory it names.
    func receive(_ vector: inout IOVector, through tls: TLSSession) throws(ChannelError) -> Int {
        try token.check()
        hasReceived.store(true, ordering: .relaxed)
        let count = try tls.receive(&vector, limit: stallLimits.receiveMilliseconds)
        received.wrappingAdd(UInt64(count), ordering: .relaxed)
        return count
    }

    // MARK: Plaintext that is none

    /// The first bytes of a stream that begins with a TLS record: a handshake, or an alert from a peer that wanted TLS.
    func refuseTLS(_ start: some Collection<UInt8>) throws(ChannelError) {
        let head = Array(start.prefix(3))
        guard head.count == 3, head[0] == 0x16 || head[0] == 0x15, head[1] == 3, head[2] <= 4 else { return }
        throw .tls("receive from \(peer): it speaks TLS, and this side does not; set tls-creds here, or clear it there")
    }
}
