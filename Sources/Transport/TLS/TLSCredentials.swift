import Glibc
import Host

/// What one side shows and demands in handshakes, loaded from files with QEMU's names (`tls-creds-x509`, `tls-creds-psk`).
///
/// The files are read once, in `init`. May be used by any number of channels at once; TLS 1.3 only.
@safe public final class TLSCredentials: Sendable {
    public enum Endpoint: String, Sendable, CaseIterable { case client, server }
    public enum Kind: String, Sendable {
        case x509 = "tls-creds-x509"
        case psk = "tls-creds-psk"
    }

    /// The object's id.
    public let name: String
    public let kind: Kind
    public let endpoint: Endpoint
    let ssl: LibSSL
    let crypto: LibCrypto
    /// SAFETY: an SSL_CTX, which any threads may make connections of; freed once, in `deinit`. Connections hold a count of it.
    nonisolated(unsafe) let context: OpaquePointer
    /// Whether a server demands certificates from clients.
    let verifiesPeer: Bool
    /// Pre-shared keys by user name; a client has only its own.
    let keys: [String: [UInt8]]
    /// A client's user name. SAFETY: allocated in `init`, freed in `deinit`, never changed between.
    nonisolated(unsafe) let identity: UnsafeMutableBufferPointer<UInt8>

    /// The user name that a client shows if none is given.
    public static let defaultUser = "qemu"
    static let longestKey = 64
    /// The only hash that external keys of TLS 1.3 have by default is SHA-256, so these are the suites for them.
    static let pskSuites = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
    static let pskCipher: [UInt8] = [0x13, 0x01]

    /// The certificates of a folder: `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, or `client-cert.pem` and `client-key.pem`
    /// (a client may have none), and `ca-crl.pem` if it is there.
    ///
    /// - Parameters:
    ///   - verifiesPeer: whether a server demands a certificate from clients. A client always verifies the server.
    ///   - checksSanity: whether the own certificate must be good by the own `ca-cert.pem`.
    /// - Throws: `TLSError` naming the file.
    public init(
        _ name: String, x509Folder folder: String, endpoint: Endpoint, verifiesPeer: Bool = true,
        checksSanity: Bool = true
    ) throws(TLSError) {
        let subject = "\(Kind.x509.rawValue) \(name)"
        guard endpoint == .server || verifiesPeer else {
            throw TLSError("\(subject): a client always verifies the server; leave out verify-peer=no")
        }
        (ssl, crypto) = try Self.libraries()
        self.name = name
        self.endpoint = endpoint
        self.verifiesPeer = verifiesPeer
        kind = .x509
        keys = [:]
        unsafe identity = .allocate(capacity: 0)
        unsafe context = try Self.makeContext(ssl, endpoint, subject)
        let loader = unsafe CertificateLoader(
            ssl: ssl, crypto: crypto, context: context, folder: folder, subject: subject)
        try loader.load(endpoint, checksSanity: checksSanity)
        let demand = endpoint == .server ? OpenSSL.failIfNoPeerCertificate : 0
        unsafe ssl.setVerify(
            context, verifiesPeer ? OpenSSL.verifyPeer | demand : 0, { unsafe TLSSession.verify($0, $1) })
    }

    /// The keys of a folder's `keys.psk`: lines `user:hexadecimal key`.
    ///
    /// - Parameter user: whose key a client uses.
    /// - Throws: `TLSError` naming the file and the line.
    public init(
        _ name: String, pskFolder folder: String, endpoint: Endpoint, user: String = defaultUser
    ) throws(TLSError) {
        let subject = "\(Kind.psk.rawValue) \(name)"
        (ssl, crypto) = try Self.libraries()
        self.name = name
        self.endpoint = endpoint
        kind = .psk
        var keys = try Self.keys(in: "\(folder)/keys.psk", subject)
        if endpoint == .client {
            guard let own = keys[user] else {
                throw TLSError(
                    "\(subject): \(folder)/keys.psk has no key of user '\(user)'; add a line '\(user):KEY', or name another user "
                        + "(username)")
            }
            keys = [user: own]
        }
        self.keys = keys
        verifiesPeer = true
        let name = Array(user.utf8)
        unsafe identity = .allocate(capacity: name.count)
        _ = unsafe identity.initialize(from: name)
        unsafe context = try Self.makeContext(ssl, endpoint, subject)
        guard unsafe ssl.setCiphersuites(context, Self.pskSuites) == 1 else {
            throw TLSError("\(subject): OpenSSL has no cipher suite for pre-shared keys")
        }
        switch endpoint {
        case .server: unsafe ssl.setFindSession(context, { unsafe TLSSession.findKey($0, $1, $2, $3) })
        case .client:
            // The server has no certificate that we know: showing one is an error.
            unsafe ssl.setVerify(context, OpenSSL.verifyPeer, nil)
            unsafe ssl.setUseSession(context, { unsafe TLSSession.offerKey($0, $2, $3, $4) })
        }
    }

    deinit {
        unsafe ssl.freeContext(context)
        unsafe identity.deallocate()
    }

    private static func libraries() throws(TLSError) -> (LibSSL, LibCrypto) {
        switch OpenSSL.shared {
        case .success(let (ssl, crypto)): return (ssl, crypto)
        case .failure(let error): throw TLSError(error.description)
        }
    }

    private static func makeContext(
        _ ssl: LibSSL, _ endpoint: Endpoint, _ subject: String
    ) throws(TLSError) -> OpaquePointer {
        let method = unsafe endpoint == .server ? ssl.serverMethod() : ssl.clientMethod()
        guard let context = unsafe ssl.newContext(method) else {
            throw TLSError("\(subject): OpenSSL has no memory for it")
        }
        // kTLS would be asked for here (SSL_OP_ENABLE_KTLS), once there is a kernel to try it on.
        unsafe _ = ssl.controlContext(context, OpenSSL.controlMinimumVersion, OpenSSL.versionTLS13, nil)
        unsafe _ = ssl.controlContext(context, OpenSSL.controlMode, OpenSSL.modes, nil)
        unsafe _ = ssl.controlContext(context, OpenSSL.controlSessionCache, 0, nil)
        // Several records by one system call.
        unsafe _ = ssl.controlContext(context, OpenSSL.controlReadAhead, 1, nil)
        unsafe ssl.setReadBufferLength(context, readBufferBytes)
        // A migration connects once: nothing is resumed.
        unsafe _ = ssl.setTicketCount(context, 0)
        // A key that is encrypted must not ask at the terminal.
        unsafe ssl.setPasswordCallback(context, { _, _, _, _ in 0 })
        return unsafe context
    }

    static let readBufferBytes = 128 << 10

    // MARK: keys.psk

    private static func keys(in path: String, _ subject: String) throws(TLSError) -> [String: [UInt8]] {
        let contents: [UInt8]
        do throws(SystemError) { contents = try Descriptor.contents(of: path, limit: 1 << 20) } catch {
            throw TLSError("\(subject): \(error.description)")
        }
        var keys: [String: [UInt8]] = [:]
        let lines = contents.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        for (index, line) in lines.enumerated() where !line.isEmpty {
            let fields = line.split(separator: UInt8(ascii: ":"), maxSplits: 1, omittingEmptySubsequences: false)
            guard fields.count == 2, !fields[0].isEmpty, let key = hexadecimal(fields[1]) else {
                throw TLSError(
                    "\(subject): \(path) line \(index + 1): 'user:key' is expected, with a key of 1 to \(longestKey) bytes in hexadecimal"
                )
            }
            keys[String(decoding: fields[0], as: UTF8.self)] = key
        }
        guard !keys.isEmpty else {
            throw TLSError("\(subject): \(path) has no key; make one with 'openssl rand -hex 32'")
        }
        return keys
    }

    private static func hexadecimal(_ text: ArraySlice<UInt8>) -> [UInt8]? {
        let text = Array(text.last == UInt8(ascii: "\r") ? text.dropLast() : text)
        guard !text.isEmpty, text.count % 2 == 0, text.count <= 2 * longestKey else { return nil }
        var bytes: [UInt8] = []
        for index in stride(from: 0, to: text.count, by: 2) {
            let digits = String(decoding: text[index..<index + 2], as: UTF8.self)
            guard digits.utf8.first != UInt8(ascii: "+"), let byte = UInt8(digits, radix: 16) else { return nil }
            bytes.append(byte)
        }
        return bytes
    }
}
