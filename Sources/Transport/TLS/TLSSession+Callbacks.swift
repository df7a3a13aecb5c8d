import Synchronization

// What OpenSSL asks during a handshake. All run on the thread that is in it.

extension TLSSession {
    /// The session a callback is about. - Returns: `nil` for an SSL that is not ours.
    ///
    /// SAFETY: see `init`: the session is alive as long as a call of its own is under way.
    private static func session(of connection: OpaquePointer?) -> TLSSession? {
        guard case .success(let libraries) = OpenSSL.shared, let connection = unsafe connection,
            let data = unsafe libraries.ssl.data(connection, 0)
        else { return nil }
        return unsafe Unmanaged<TLSSession>.fromOpaque(data).takeUnretainedValue()
    }

    /// After each certificate of the peer's chain, the peer's own last. - Returns: 1 to go on.
    static func verify(_ isGood: Int32, _ verification: OpaquePointer?) -> Int32 {
        guard case .success(let (ssl, crypto)) = OpenSSL.shared,
            let connection = unsafe crypto.verificationData(verification, ssl.verificationDataIndex()),
            let session = unsafe session(of: OpaquePointer(connection))
        else { return 0 }
        let names = unsafe crypto.subjects(of: crypto.verifiedCertificate(verification))
        session.findings.withLock { $0.peerName = names.first ?? "" }
        guard isGood == 1 else { return 0 }
        guard unsafe crypto.verificationDepth(verification) == 0, let list = session.settings.peers,
            !list.admits(names)
        else { return 1 }
        session.findings.withLock { $0.listRefused = true }
        // X509_V_ERR_CERT_REJECTED: the peer hears that its certificate is bad.
        unsafe crypto.setVerificationError(verification, 28)
        return 0
    }

    /// A server's: the key of the user that a client names. - Returns: 1, with no session for a user who is unknown or may not come.
    static func findKey(
        _ connection: OpaquePointer?, _ identity: UnsafePointer<UInt8>?, _ count: Int,
        _ result: UnsafeMutablePointer<OpaquePointer?>?
    ) -> Int32 {
        guard let session = unsafe session(of: connection), let result = unsafe result else { return 0 }
        unsafe result.pointee = nil
        // SAFETY: OpenSSL's buffer of `count` bytes, for the time of the call.
        let user = unsafe String(decoding: UnsafeBufferPointer(start: identity, count: count), as: UTF8.self)
        guard let key = session.settings.credentials.keys[user] else { return 1 }
        session.findings.withLock { $0.peerName = user }
        if let list = session.settings.peers, !list.admits([user]) {
            session.findings.withLock { $0.listRefused = true }
            return 1
        }
        unsafe result.pointee = session.pskSession(connection, key)
        return unsafe result.pointee == nil ? 0 : 1
    }

    /// A client's: its own user and key. - Returns: 1.
    static func offerKey(
        _ connection: OpaquePointer?, _ identity: UnsafeMutablePointer<UnsafePointer<UInt8>?>?,
        _ count: UnsafeMutablePointer<Int>?, _ result: UnsafeMutablePointer<OpaquePointer?>?
    ) -> Int32 {
        guard let session = unsafe session(of: connection), let identity = unsafe identity, let count = unsafe count,
            let result = unsafe result, let key = session.settings.credentials.keys.first?.value
        else { return 0 }
        // SAFETY: the name lives as long as the credentials, which the session holds.
        unsafe identity.pointee = UnsafePointer(session.settings.credentials.identity.baseAddress)
        unsafe count.pointee = session.settings.credentials.identity.count
        unsafe result.pointee = session.pskSession(connection, key)
        return unsafe result.pointee == nil ? 0 : 1
    }

    /// An external key as OpenSSL wants it: a session that never was. - Returns: one that OpenSSL frees; `nil` without memory.
    private func pskSession(_ connection: OpaquePointer?, _ key: [UInt8]) -> OpaquePointer? {
        let ssl = settings.credentials.ssl
        guard let made = unsafe ssl.newSession() else { return nil }
        guard unsafe ssl.setSessionKey(made, key, key.count) == 1,
            unsafe ssl.setSessionCipher(made, ssl.findCipher(connection, TLSCredentials.pskCipher)) == 1,
            unsafe ssl.setSessionVersion(made, Int32(OpenSSL.versionTLS13)) == 1
        else { return nil }
        return unsafe made
    }
}
