import Glibc
import Host
import Synchronization

/// The TLS of one connected socket: the handshake, and bytes through it.
///
/// One thread sends and one receives, but an SSL object is for one thread at a time: a lock is held while OpenSSL works on it, a record
/// at a time, and never while somebody waits for the network. The socket is non-blocking; waits end with a limit, or when the
/// channel's token is cancelled.
@safe final class TLSSession: Sendable {
    /// What callbacks and failures leave behind.
    private struct State {
        var isEstablished = false
        /// No further record may go out: the last one was left in the middle.
        var isBroken = false
        /// What was encrypted with the present key, and after how much a new one is made: RFC 8446, section 5.5, allows AES-GCM
        /// 2^24.5 full records, which are 360 GiB.
        var bytesUnderKey = 0
        var keyBytes = 64 << 30
        /// Why the session cannot go on; whoever comes later is told the same.
        var failure: ChannelError?
    }

    /// What callbacks found out about the peer. Under a lock of its own: they run while `state` is held.
    struct Findings {
        /// The certificate's subject, or the user name of the key.
        var peerName = ""
        var listRefused = false
        /// It does not speak TLS, so OpenSSL has not told it anything.
        var isNotTLS = false
    }

    let settings: TLSSettings
    let socket: Descriptor
    private let token: CancelToken
    private let peer: String
    private let ssl: LibSSL
    private let crypto: LibCrypto
    /// SAFETY: an SSL, used only while `state` is locked (and by callbacks that OpenSSL calls then); freed once, in `deinit`.
    private nonisolated(unsafe) let connection: OpaquePointer
    private let state = Mutex(State())
    let findings = Mutex(Findings())
    /// Where pages that lie apart are put together for records.
    private let staging = Mutex<Mapping?>(nil)

    static let recordBytes = 16 << 10
    private static let stagingBytes = 4 * recordBytes

    /// - Parameter settings: of a client, with the host name that the peer's certificate must have.
    init(_ settings: TLSSettings, socket: Descriptor, token: CancelToken, peer: String) throws(ChannelError) {
        let credentials = settings.credentials
        ssl = credentials.ssl
        crypto = credentials.crypto
        self.settings = settings
        self.socket = socket
        self.token = token
        self.peer = peer
        guard let made = unsafe credentials.ssl.new(credentials.context) else {
            throw .system(SystemError("begin TLS with", peer, code: ENOMEM))
        }
        unsafe connection = made
        try channelled { () throws(SystemError) in try socket.setNonBlocking(true) }
        unsafe _ = ssl.setDescriptor(connection, socket.number)
        // SAFETY: callbacks find the session here while a call of its own is under way, which keeps it alive.
        unsafe _ = ssl.setData(connection, 0, Unmanaged.passUnretained(self).toOpaque())
        switch credentials.endpoint {
        case .server: unsafe ssl.setAcceptState(connection)
        case .client:
            unsafe ssl.setConnectState(connection)
            if credentials.kind == .x509 { try demand(settings.hostname ?? "") }
        }
    }

    deinit { unsafe ssl.free(connection) }

    /// The peer's certificate must be made for this name or address.
    private func demand(_ host: String) throws(ChannelError) {
        unsafe ssl.setHostFlags(connection, OpenSSL.noPartialWildcards)
        let isAddress = unsafe crypto.setParameterIP(ssl.verifyParameters(connection), host) == 1
        guard !isAddress else { return }
        guard !host.isEmpty, unsafe ssl.setHost(connection, host) == 1 else {
            throw .tls("TLS with \(peer): '\(host)' is no host name that a certificate could have")
        }
        var name = Array(host.utf8CString)
        // The name goes along in clear, for servers with several certificates.
        // SAFETY: OpenSSL copies the text.
        unsafe name.withUnsafeMutableBytes {
            _ = unsafe ssl.control(connection, OpenSSL.controlServerName, 0, $0.baseAddress)
        }
    }

    // MARK: Steps

    /// How one call of OpenSSL ended.
    private enum Step {
        case done(Int)
        case wants(Readiness)
        /// The peer said that it is done.
        case closed
        case failed(ChannelError)
    }

    /// One call of OpenSSL under the lock. - Parameter operation: for the sentence, if it fails.
    private func step(_ operation: String, _ call: (OpaquePointer) -> Int32) -> Step {
        state.withLock { state in
            if let failure = state.failure { return .failed(failure) }
            crypto.clear()
            errno = 0
            let result = unsafe call(connection)
            let code = errno
            if result > 0 { return .done(Int(result)) }
            switch unsafe ssl.error(connection, result) {
            case OpenSSL.ErrorCode.wantRead: return .wants(.readable)
            case OpenSSL.ErrorCode.wantWrite: return .wants(.writable)
            case OpenSSL.ErrorCode.closed: return .closed
            case OpenSSL.ErrorCode.systemCall where code != 0:
                let remedy =
                    operation == Self.handshaking ? "it may not speak TLS (tls-creds), or its log says more" : nil
                return .failed(
                    token.isCancelled ? .cancelled : .system(SystemError(operation, peer, code: code, remedy: remedy)))
            default:
                let failure = token.isCancelled ? .cancelled : describe(operation, crypto.takeErrors())
                state.failure = failure
                return .failed(failure)
            }
        }
    }

    private func describe(_ operation: String, _ codes: [UInt]) -> ChannelError {
        let found = findings.withLock { $0 }
        // Of a pre-shared key OpenSSL says "unspecified".
        let verdict = settings.credentials.kind == .x509 ? unsafe ssl.verifyResult(connection) : 0
        let words: String
        if found.listRefused {
            words = "the peer '\(found.peerName)' is not on the list of those who may come (tls-authz)"
        } else if verdict != 0 {
            words = TLSFailure.ofCertificate(
                verdict, subject: found.peerName, wanted: settings.hostname, crypto)
        } else if TLSFailure.isTruncation(codes), operation == Self.handshaking {
            words = "it closed the connection in the middle; it may not speak TLS (tls-creds), or its log says more"
        } else {
            findings.withLock { $0.isNotTLS = TLSFailure.isNotTLS(codes) }
            words = TLSFailure.ofProtocol(codes, settings.credentials.kind, crypto)
        }
        return .tls("\(operation) \(peer): \(words)")
    }

    private static let handshaking = "TLS handshake with"

    /// Waits until the socket is ready. - Returns: false if the deadline passed.
    private func wait(
        _ readiness: Readiness, _ deadline: Deadline, _ other: CancelToken? = nil
    ) throws(ChannelError) -> Bool {
        try token.check()
        try other?.check()
        var wanted = [(socket, readiness), (token.event.descriptor, .readable)]
        if let other { wanted.append((other.event.descriptor, .readable)) }
        let ready = try channelled { () throws(SystemError) in try poll(wanted, deadline: deadline) }
        try token.check()
        try other?.check()
        return !ready[0].isEmpty
    }

    private func wait(_ readiness: Readiness, limit: UInt64?, _ operation: String) throws(ChannelError) {
        let deadline = limit.map { Deadline.after(milliseconds: $0) } ?? .never
        guard try wait(readiness, deadline) else {
            throw .stalled(operation: operation, peer: peer, milliseconds: limit ?? 0)
        }
    }

    // MARK: Handshake

    var isEstablished: Bool { state.withLock { $0.isEstablished } }

    /// Agrees on keys and checks the peer. - Throws: `ChannelError`, after the peer had time to hear why.
    /// - Parameter other: whose cancelling ends it, besides the channel's own.
    func handshake(deadline: Deadline, alsoCancelledBy other: CancelToken? = nil) throws(ChannelError) {
        do throws(ChannelError) {
            try agree(deadline, other)
        } catch {
            if error != .cancelled { linger() }
            throw error
        }
    }

    private func agree(_ deadline: Deadline, _ other: CancelToken?) throws(ChannelError) {
        let limit = min(deadline, .after(milliseconds: TLSSettings.handshakeMilliseconds))
        while true {
            try token.check()
            switch unsafe step(Self.handshaking, { unsafe ssl.doHandshake($0) }) {
            case .done: return try confirm()
            case .failed(let error): throw error
            case .closed: throw .tls("\(Self.handshaking) \(peer): it closed the connection in the middle")
            case .wants(let readiness):
                guard try wait(readiness, limit, other) else {
                    throw .tls(
                        "\(Self.handshaking) \(peer): it was not complete in time; the peer hangs, or does not speak TLS (tls-creds)"
                    )
                }
            }
        }
    }

    /// What the handshake alone does not make sure of.
    private func confirm() throws(ChannelError) {
        let usedKey = state.withLock { _ in unsafe ssl.sessionReused(connection) == 1 }
        guard settings.credentials.kind == .x509 || usedKey else {
            throw .tls(
                "\(Self.handshaking) \(peer): the peer did not use the pre-shared key; both sides need tls-creds-psk")
        }
        state.withLock { $0.isEstablished = true }
    }

    /// For the log: `TLS_AES_256_GCM_SHA384`.
    var cipher: String {
        state.withLock { _ in
            unsafe ssl.cipherName(ssl.currentCipher(connection)).map { unsafe String(cString: $0) } ?? "none"
        }
    }

    /// After a failure: an alert is on its way, and a close with bytes unread would take it back.
    private func linger() {
        if findings.withLock({ $0.isNotTLS }) {
            // RFC 8446, section 6: a fatal alert, protocol_version. A Godwit that sent plaintext knows what it means.
            _ = try? socket.write([0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x46])
        }
        try? Socket.finishSending(socket)
        let deadline = Deadline.after(milliseconds: 500)
        var room = 1 << 20
        while room > 0, (try? wait(.readable, deadline)) == true {
            guard let bytes = try? socket.read(upTo: 1 << 16), !bytes.isEmpty else { return }
            room -= bytes.count
        }
    }

    // MARK: Sending

    /// Sends part of the vector, whole records as long as there is enough. - Returns: how many bytes, which are gone from the vector.
    func send(_ vector: inout IOVector, limit: UInt64?) throws(ChannelError) -> Int {
        let first = vector.firstRangeByteCount
        if first >= Self.recordBytes || first == vector.byteCount {
            return try unsafe vector.withFirstRange { (range) throws(ChannelError) in
                let records = min(range.count / Self.recordBytes * Self.recordBytes, 256 << 10)
                let count = records > 0 ? records : range.count
                try unsafe send(UnsafeRawBufferPointer(start: range.baseAddress, count: count), limit: limit)
                return count
            }
        }
        let buffer = try stagingBuffer()
        let count = min(Self.stagingBytes, vector.byteCount)
        return try unsafe buffer.withMutableBytes(at: 0, count: count) { (room) throws(ChannelError) in
            let filled = unsafe vector.gather(into: room)
            try unsafe send(UnsafeRawBufferPointer(start: room.baseAddress, count: filled), limit: limit)
            return filled
        }
    }

    private func stagingBuffer() throws(ChannelError) -> Mapping {
        if let buffer = staging.withLock({ $0 }) { return buffer }
        let made = try channelled { () throws(SystemError) in try Mapping(anonymousByteCount: Self.stagingBytes) }
        staging.withLock { $0 = made }
        return made
    }

    /// Sends all of the bytes. What cannot be sent to its end breaks the session: half a record cannot be taken back.
    @unsafe func send(_ bytes: UnsafeRawBufferPointer, limit: UInt64?) throws(ChannelError) {
        let (isUsable, needsKey) = state.withLock { state in
            state.bytesUnderKey += bytes.count
            let needsKey = state.bytesUnderKey >= state.keyBytes
            if needsKey { state.bytesUnderKey = 0 }
            return (state.isEstablished && !state.isBroken, needsKey)
        }
        guard isUsable else {
            throw .unusable("send to \(peer): the TLS session has not begun or was broken off")
        }
        // The peer's own key is its own business (SSL_KEY_UPDATE_NOT_REQUESTED).
        if needsKey, case .failed(let error) = unsafe step("send to", { unsafe ssl.updateKey($0, 0) }) { throw error }
        var offset = 0
        do throws(ChannelError) {
            while offset < bytes.count {
                try token.check()
                // SAFETY: the rest of the caller's buffer.
                let result = unsafe step("send to") {
                    unsafe ssl.write($0, bytes.baseAddress! + offset, Int32(min(bytes.count - offset, 1 << 30)))
                }
                switch result {
                case .done(let count): offset += count
                case .wants(let readiness): try wait(readiness, limit: limit, "send to")
                case .closed: throw .system(SystemError("send to", peer, code: EPIPE))
                case .failed(let error): throw reasonBehind(error)
                }
            }
        } catch {
            state.withLock { $0.isBroken = true }
            throw error
        }
    }

    /// A peer that refuses us says why and closes. Who is sending then finds a closed socket, and the reason behind it.
    private func reasonBehind(_ error: ChannelError) -> ChannelError {
        guard case .system = error else { return error }
        var byte: UInt8 = 0
        // SAFETY: OpenSSL writes at most the one byte.
        let result = unsafe withUnsafeMutableBytes(of: &byte) { room in
            unsafe step("send to") { unsafe ssl.peek($0, room.baseAddress!, 1) }
        }
        guard case .failed(let reason) = result, case .tls = reason else { return error }
        return reason
    }

    /// Makes a new key each time so many bytes were sent.
    func updateKeys(everyBytes count: Int) { state.withLock { $0.keyBytes = count } }

    /// Tells the peer that no more comes (close_notify); it may still answer.
    func finish(limit: UInt64?) throws(ChannelError) {
        guard state.withLock({ $0.isEstablished && !$0.isBroken && $0.failure == nil }) else { return }
        while true {
            try token.check()
            // 0 is success: the peer has not answered with its own.
            let result = unsafe step("finish sending to") { connection in
                let result = unsafe ssl.shutdown(connection)
                return result >= 0 ? 1 : result
            }
            switch result {
            case .wants(let readiness): try wait(readiness, limit: limit, "finish sending to")
            default: return
            }
        }
    }

    // MARK: Receiving

    /// Receives what is there, at least one byte. - Returns: the number of bytes; 0 when the peer said that it is done.
    @unsafe func receive(into buffer: UnsafeMutableRawBufferPointer, limit: UInt64?) throws(ChannelError) -> Int {
        guard isEstablished else { throw .unusable("receive from \(peer): the TLS session has not begun") }
        var filled = 0
        while filled < buffer.count {
            // SAFETY: the rest of the caller's buffer.
            let result = unsafe step("receive from") {
                unsafe ssl.read($0, buffer.baseAddress! + filled, Int32(min(buffer.count - filled, 1 << 30)))
            }
            switch result {
            case .done(let count): filled += count
            case .closed: return filled
            // What is behind comes with the next call.
            case .wants where filled > 0, .failed where filled > 0: return filled
            case .wants(let readiness):
                try token.check()
                try wait(readiness, limit: limit, "receive from")
            case .failed(let error): throw error
            }
        }
        return filled
    }

    /// Receives into the front of the vector, a record at most, straight into the memory it names.
    /// - Returns: the number of bytes, which are gone from the vector; 0 when the peer said that it is done.
    func receive(_ vector: inout IOVector, limit: UInt64?) throws(ChannelError) -> Int {
        guard isEstablished else { throw .unusable("receive from \(peer): the TLS session has not begun") }
        while true {
            let result = unsafe step("receive from") { connection in
                var total: Int32 = 0
                repeat {
                    var count: Int32 = 0
                    // SAFETY: SSL_read fills at most the range, during the call.
                    _ = unsafe vector.withFirstRange { range in
                        count = unsafe ssl.read(connection, range.baseAddress!, Int32(min(range.count, 1 << 30)))
                        return max(0, Int(count))
                    }
                    // What is left of a record cannot fail.
                    guard count > 0 else { return total > 0 ? total : count }
                    total += count
                } while unsafe vector.byteCount > 0 && ssl.pending(connection) > 0
                return total
            }
            switch result {
            case .done(let count): return count
            case .closed: return 0
            case .wants(let readiness): try wait(readiness, limit: limit, "receive from")
            case .failed(let error): throw error
            }
        }
    }
}
