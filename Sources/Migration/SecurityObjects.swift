import Synchronization
public import Transport

/// What `object-add` makes for migrations: credentials, and lists of peers.
public enum SecurityObject: Sendable {
    case credentials(TLSCredentials)
    case peers(TLSPeerList)
}

/// The objects by id, and what the parameters `tls-creds`, `tls-hostname` and `tls-authz` make of them. For any thread.
public final class SecurityObjects: Sendable {
    /// Whether a migration may be waited for in plaintext where others reach it (`--insecure-plaintext`).
    let allowsPlaintext: Bool
    private let objects = Mutex<[String: SecurityObject]>([:])

    init(allowsPlaintext: Bool) { self.allowsPlaintext = allowsPlaintext }

    /// - Throws: `MigrationError` if the id is taken.
    public func add(_ object: SecurityObject, id: String) throws(MigrationError) {
        let isTaken = objects.withLock { objects in
            guard objects[id] == nil else { return true }
            objects[id] = object
            return false
        }
        if isTaken {
            throw MigrationError("object-add: there is an object '\(id)' already; delete it first (object-del)")
        }
    }

    /// Channels that use it go on. - Throws: `MigrationError` if there is none.
    public func remove(id: String) throws(MigrationError) {
        guard objects.withLock({ $0.removeValue(forKey: id) }) != nil else {
            throw MigrationError("object-del: there is no object '\(id)'")
        }
    }

    /// What the channels of a migration have to be; `nil` for plaintext.
    /// - Throws: `MigrationError` for an id that names nothing, or something else.
    func settings(_ parameters: MigrationParameters, _ command: String) throws(MigrationError) -> TLSSettings? {
        guard !parameters.tlsCredentials.isEmpty else { return nil }
        let id = parameters.tlsCredentials
        guard case .credentials(let credentials) = objects.withLock({ $0[id] }) else {
            throw MigrationError(
                "\(command): tls-creds '\(id)': there are no credentials of that id; make them with object-add (tls-creds-x509 or "
                    + "tls-creds-psk)")
        }
        let hostname = parameters.tlsHostname.isEmpty ? nil : parameters.tlsHostname
        guard credentials.endpoint == .server, !parameters.tlsAuthorization.isEmpty else {
            return TLSSettings(credentials, hostname: hostname)
        }
        guard case .peers(let peers) = objects.withLock({ $0[parameters.tlsAuthorization] }) else {
            throw MigrationError(
                "\(command): tls-authz '\(parameters.tlsAuthorization)': there is no list of peers of that id; make it with object-add "
                    + "(authz-simple or authz-list)")
        }
        return TLSSettings(credentials, hostname: hostname, peers: peers)
    }
}
