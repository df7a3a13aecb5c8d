/// What makes the channels of a connector or a listener TLS from their first byte.
public struct TLSSettings: Sendable {
    public let credentials: TLSCredentials
    /// The name or address that the certificate of who listens must have; `nil`: the host of the address. Only for connecting.
    public let hostname: String?
    /// Who may connect; `nil`: everybody whose certificate or key is good. Only for listening.
    public let peers: TLSPeerList?

    public init(_ credentials: TLSCredentials, hostname: String? = nil, peers: TLSPeerList? = nil) {
        self.credentials = credentials
        self.hostname = hostname
        self.peers = peers
    }

    /// How long a handshake may take.
    public static let handshakeMilliseconds: UInt64 = 10_000

    /// The settings for connecting to `address`. - Throws: `ChannelError` if nothing there can be checked against a certificate.
    func connecting(to address: MigrationAddress) throws(ChannelError) -> TLSSettings {
        try check(.client, address)
        guard credentials.kind == .x509, hostname == nil else { return self }
        guard case .tcp(let host, _) = address else {
            throw .tls(
                "connect to \(address): the address has no host name to hold the certificate against; "
                    + "say which it shall have (tls-hostname), or use a pre-shared key (tls-creds-psk)")
        }
        return TLSSettings(credentials, hostname: host.isEmpty ? "localhost" : host, peers: peers)
    }

    func check(_ endpoint: TLSCredentials.Endpoint, _ address: MigrationAddress) throws(ChannelError) {
        switch address {
        case .tcp, .unix, .descriptor: break
        case .exec, .file:
            throw .tls("\(address): TLS needs a socket; clear tls-creds for this migration, or use tcp:, unix: or fd:")
        }
        guard credentials.endpoint == endpoint else {
            let purpose = endpoint == .server ? "wait for a migration" : "send one"
            throw .tls(
                "\(address): the credentials '\(credentials.name)' are those of a \(credentials.endpoint.rawValue); to "
                    + "\(purpose) give tls-creds an object with endpoint=\(endpoint.rawValue)")
        }
        guard peers == nil || credentials.verifiesPeer else {
            throw .tls(
                "\(address): a list of peers (tls-authz) needs credentials with verify-peer=yes, or nobody is known by name"
            )
        }
    }
}

/// TLS credentials that cannot be used: the object, the file, the cause and the remedy.
public struct TLSError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
